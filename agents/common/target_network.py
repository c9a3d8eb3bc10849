"""A target network: the weights a network had a while ago, lent to it for a pass."""

# The reference of a policy with an adapter is one too, which never follows.

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class TargetNetwork:
    """Lagged copies of the trainable parameters of some modules (Mnih et al. 2015; frozen ones, as under LoRA, need no copy).

    Args:
        modules: by name; their trainable parameters are copied as they are now.
        tau: share of the new weights in an update, in (0, 1]: 1 copies (hard), less is Polyak averaging (Lillicrap et al. 2016).
        interval: optimiser steps between updates.
    """

    def __init__(self, modules: dict[str, nn.Module], *, tau: float = 1.0, interval: int = 1) -> None:
        self.tau, self.interval = tau, interval
        # By name, for checkpoints; a parameter that two layers share is listed once.
        self._online = {
            f"{name}.{key}": parameter
            for name, module in modules.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self._lagged = {name: parameter.detach().clone() for name, parameter in self._online.items()}
        self._lent = 0

    @torch.no_grad()
    def after_step(self, steps: int) -> None:
        """Follows the online weights, θ⁻ ← (1 − τ) θ⁻ + τ θ, if `steps` optimiser steps are a multiple of the interval."""
        if steps % self.interval:
            return
        for name, lagged in self._lagged.items():
            lagged.lerp_(self._online[name], self.tau)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, the modules compute with the lagged weights, without gradients; graphs made before stay valid. Nests."""
        if not self._lent:
            self._exchange()
        self._lent += 1
        try:
            with torch.no_grad():
                yield
        finally:
            self._lent -= 1
            if not self._lent:
                self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self._online.items():
            # Storages change hands; nothing is copied, and autograd's saved tensors see their own again afterwards. (A module that was
            # moved to another device meanwhile takes its lagged weights along.)
            parameter.data, self._lagged[name] = self._lagged[name].to(parameter.device), parameter.data

    @property
    def is_lent(self) -> bool:
        """Whether the modules hold the lagged weights at the moment."""
        return self._lent > 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that have a lagged copy."""
        return list(self._online.values())

    def tensors(self) -> dict[str, Tensor]:
        """The lagged weights by name, for a checkpoint."""
        return dict(self._lagged)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `tensors` gave.

        Raises:
            ValueError: these are not the tensors of the same parameters.
        """
        if tensors.keys() != self._lagged.keys():
            different = sorted(tensors.keys() ^ self._lagged.keys())
            raise ValueError(f"the tensors must be those of the parameters that are trained, one each; they differ in {different[:4]}.")
        for name, lagged in self._lagged.items():
            lagged.copy_(tensors[name])
