"""`CausalLMPolicy`: a transformers causal LM as a policy over tokens, which samples, scores and acts with one and the same distribution."""

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from textgym.agents.common.acting import ActingState
from textgym.agents.common.action_masks import ActionMasker, PolicyMask
from textgym.agents.common.adapters import adds_nothing, is_adapter, save_names, save_outside, trained_outside
from textgym.agents.common.backbone import Backbone, without_peft
from textgym.agents.common.devices import as_device
from textgym.agents.common.generation import DecodeOptions, Generation
from textgym.agents.common.loading import load_model
from textgym.agents.common.numpy_protocol import NumpyProtocol
from textgym.agents.common.precision import AUTO, half_dtype, name_of, products_for, tell_once
from textgym.agents.common.prompt_batches import Prompts, encode, warn_of_unknown
from textgym.agents.common.sampling import Sampling, TokenRule
from textgym.agents.common.scoring import Scores, score_completions
from textgym.agents.common.target_network import TargetNetwork
from textgym.agents.common.token_mask import TokenMask
from textgym.agents.common.trial import choose_ways
from textgym.agents.engines import CachedEngine, GenerationEngine
from textgym.alignment import aligned
from textgym.end_tokens import write_end_ids
from textgym.tokenizers import decode_completions, end_token_ids, filler_token_id

Array = npt.NDArray[Any]
Observation = Mapping[str, Array]


class CausalLMPolicy(NumpyProtocol, nn.Module):
    """A causal language model that chooses tokens.

    Sampling (`generate`, `predict`) and scoring (`score`, `log_probs`, ...) use the same distribution: the model's logits over the
    tokenizer's vocabulary, divided by `temperature`, restricted by `top_k`, `top_p` and `min_p`, renormalised. Nothing but the end tokens
    is inherited from the model's `generation_config`. Dropout is off at all times: the model stays in evaluation mode, whatever
    `train()` is called with.

    Args:
        model: a transformers causal LM, or a peft model around one.
        tokenizer: its tokenizer; V = `len(tokenizer)`.
        temperature: see `Sampling`.
        top_k: see `Sampling`.
        top_p: see `Sampling`.
        min_p: see `Sampling`.
        device: where the model goes; "auto" takes a GPU if there is one. A model that was loaded with a `device_map` is not moved.
        eos_token_ids: the ids that end a completion; by default the tokenizer's, those of the model's `generation_config`, and the special
            token with which the chat template closes an answer, see `textgym.end_tokens`.
        decode_batch_size: completions that are sampled at a time where `generate` is not told otherwise; None: all of them.
        autocast: mixed precision: the dtype of the model's matrix products, "bfloat16" or a `torch.dtype`; weights, norms, log-probs and
            gradients stay what they are. None: that of the weights.
        engine: samples completions in the place of the built-in decode loop; None: that loop, `CachedEngine()`.
        seed: of the policy's own random generator, which serves whenever no seed or generator is given; None seeds it from the system.

    Attributes:
        model: the transformers (or peft) model itself.
        tokenizer: the transformers tokenizer itself.
        vocab_size: V.
        sampling: the distribution, a `Sampling`.
        eos_token_ids: tuple of int.
        fill_token_id: what stands past the end of a completion; nothing depends on it.
        engine: the `GenerationEngine` that `generate` calls; shared with references, and no part of what `save_pretrained` writes.
        frozen: True for a reference: it is never scored with gradients.
        mask: a `TokenMask` that says which tokens are legal in each state, before any truncation; a part of the distribution like
            `sampling`, and like it no part of what `save_pretrained` writes. None allows every token. `NLPO` sets it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        device: torch.device | str = "auto",
        eos_token_ids: Sequence[int] | None = None,
        decode_batch_size: int | None = None,
        autocast: torch.dtype | str | None = None,
        engine: GenerationEngine | None = None,
        seed: int | None = None,
    ) -> None:
        if decode_batch_size is not None:
            _check_counts(decode_batch_size=decode_batch_size)
        super().__init__()
        self.decode_batch_size = decode_batch_size
        self.engine = CachedEngine() if engine is None else engine
        self.sampling = Sampling(temperature, top_k, top_p, min_p)
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.eos_token_ids = end_token_ids(tokenizer, eos_token_ids, model=without_peft(model))
        self.fill_token_id = filler_token_id(tokenizer, self.eos_token_ids)
        self.frozen = False
        self.mask: TokenMask | None = None
        if getattr(model, "hf_device_map", None) is None:
            model.to(as_device(device))
        self.model: Any = aligned(model)
        self.backbone = Backbone(model, self.vocab_size, autocast=half_dtype(autocast))
        choose_ways(self.backbone)
        self._acting = ActingState()
        self._generator: torch.Generator | None = None
        self._seed = seed
        self.train(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        autocast: torch.dtype | str | None = "auto",
        trust_remote_code: bool = False,
        lora: Any = None,
        **settings: Any,
    ) -> "CausalLMPolicy":
        """Loads model and tokenizer.

        Args:
            path: a folder that `save_pretrained` wrote (a LoRA adapter alone is put on the model that it names), or an id of the Hugging
                Face hub (its cache, or a download).
            device: see the class.
            dtype: of the weights. "auto" is that of the checkpoint, but float32 for one in half precision, whose weights would not move by
                the small steps of training; under an adapter, where they take none, they stay as they are. "checkpoint" is that of the
                checkpoint: half the memory, for generating and scoring.
            autocast: see the class. "auto" is bfloat16 where a bfloat16 checkpoint was loaded as float32 and the device has units for it
                (newer GPUs; CPUs with AVX512-BF16 or AMX), else None.
            trust_remote_code: run Python code that comes with the checkpoint.
            lora: a `peft.LoraConfig`: train this adapter and leave the weights alone.
            **settings: further arguments of the class (`temperature`, ...).

        Raises:
            ValueError: there is no such model, or an argument breaks one of the rules above.
        """
        place = as_device(device)
        model, tokenizer, widened = load_model(path, dtype, trust_remote_code, lora)
        if autocast == AUTO:
            autocast = None if widened is None else products_for(widened, place)
        policy = cls(model, tokenizer, device=place, autocast=autocast, **settings)
        if widened is not None:
            tell_once(os.fspath(path), widened, policy.backbone.autocast)
        return policy

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes model and tokenizer as transformers reads them, weights as safetensors only; `generation_config.json` has the end tokens.

        Of a LoRA policy the adapter alone is written, with the name of the model that it belongs to; so that model must have come from a
        folder or the hub. `policy.model.merge_and_unload().save_pretrained(folder)` writes a whole model instead.
        """
        if self.is_adapter and not self.backbone.config.name_or_path:
            raise ValueError(
                "A LoRA policy is saved as its adapter, but the model under it was made in memory and has no name to find it by. Save that "
                "model first and load it with `from_pretrained`, or save `policy.model.merge_and_unload()`."
            )
        with self.backbone.holding():
            self.model.save_pretrained(folder)
            if self.is_adapter:
                save_names(self.model, Path(folder))
                save_outside(self.model, Path(folder))
        self.tokenizer.save_pretrained(folder)
        write_end_ids(folder, self.tokenizer, self.eos_token_ids)

    def loading_arguments(self) -> dict[str, Any]:
        """What `from_pretrained` must be told to get the same distribution again from what `save_pretrained` wrote."""
        autocast = self.backbone.autocast
        return {
            **dataclasses.asdict(self.sampling),
            "eos_token_ids": list(self.eos_token_ids),
            "decode_batch_size": self.decode_batch_size,
            "dtype": name_of(self.backbone.dtype),
            "autocast": None if autocast is None else name_of(autocast),
        }

    def reference(self, *, adapter: bool = True) -> "CausalLMPolicy":
        """Returns the policy as it is now, frozen.

        It is a copy, of a policy with an adapter a copy of what is trained alone: the rest is shared, and during a pass of the reference
        the model holds the copied weights. While a LoRA adapter is fresh (it adds nothing yet) the reference is the model with the
        adapter off, which needs no copy.

        Args:
            adapter: False leaves the adapter of a policy off whatever it has learned: the reference is the model under it.

        Raises:
            ValueError: `adapter` is False and there is none.
        """
        if not adapter and not self.is_adapter:
            raise ValueError("`adapter` must be True for a policy without an adapter, got False. Take `policy.reference()`.")
        if self.is_adapter:
            frozen = copy.copy(self)
            # nn.Module keeps its registries in dicts that a shallow copy would share.
            frozen._modules = dict(self._modules)
            bare = not adapter or adds_nothing(self.model)
            kept = None if bare and not trained_outside(self.model) else TargetNetwork({"model": self.model})
            frozen.backbone = self.backbone.shared(without_adapter=bare, frozen=kept)
            frozen._acting, frozen._generator = ActingState(), None
        else:
            # The engine is shared: it may hold what no copy can be made of.
            frozen = copy.deepcopy(self, {id(self.engine): self.engine})
            frozen.requires_grad_(False)
        frozen.frozen, frozen.mask = True, None
        return frozen

    frozen_copy = reference  # what `ActorCriticAdapter` calls it

    @property
    def is_adapter(self) -> bool:
        """Whether the model is a peft model: its adapter is trained, its weights are not."""
        return is_adapter(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.device

    @property
    def hidden_size(self) -> int:
        """H, for value heads."""
        return int(self.backbone.config.get_text_config().hidden_size)

    def seed(self, seed: int | None) -> None:
        """Restarts the policy's own random generator."""
        self._seed, self._generator = seed, None

    @property
    def generator(self) -> torch.Generator:
        """The policy's own random generator."""
        if self._generator is None or self._generator.device != self.device:
            self._generator = torch.Generator(self.device)
            if self._seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self._seed)
        return self._generator

    def train(self, mode: bool = True) -> "CausalLMPolicy":
        """Keeps everything in evaluation mode: with dropout the policy that is scored is not the one that sampled."""
        del mode
        return super().train(False)

    def set_training_mode(self, mode: bool) -> None:
        """Stable-Baselines3's name for `train`."""
        self.train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what belongs to a running loop: caches and the generator."""
        return {**self.__dict__, "_acting": ActingState(), "_generator": None}

    # --- sampling

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int = 32,
        temperature: float | None = None,
        num_generations: int = 1,
        seed: int | None = None,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        min_new_tokens: int = 0,
        stop_strings: str | Sequence[str] | None = None,
        action_mask: Tensor | ActionMasker | None = None,
        max_batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Completes prompts.

        Args:
            prompts: texts and message lists (tokenised as the environment does), id lists, an observation of the environment, or a
                pair (left-padded ids (B, P), lengths (B,)).
            max_new_tokens: a completion ends there, or at EOS.
            temperature: this call's own; 0 takes the most probable token each time. None: the policy's.
            num_generations: completions per prompt; rows are prompt-major.
            seed: the same seed gives the same completions. None: the policy's own generator goes on.
            top_k: this call's own, None: the policy's.
            top_p: this call's own, None: the policy's.
            min_p: this call's own, None: the policy's.
            min_new_tokens: EOS is left out of the distribution before that many.
            stop_strings: a completion also ends with the token that makes its text contain one of these. The environment knows nothing
                of them: to it, such a completion has not ended.
            action_mask: legal tokens, (V,) or (B, V) bool, or an `ActionMasker`; the distribution is renormalised over them. None: the
                policy's `mask`.
            max_batch_size: completions that are sampled at a time, which bounds the memory of the key-value cache; another one begins
                as soon as one has ended. No completion depends on it. None: the policy's `decode_batch_size`.
            generator: takes the place of `seed`.
        """
        given: dict[str, Any] = {"temperature": temperature or None, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampling = dataclasses.replace(self.sampling, **{name: value for name, value in given.items() if value is not None})
        prompt_ids, prompt_lengths = self.encode_prompts(prompts)
        warn_of_unknown(prompts, prompt_ids, prompt_lengths, self.tokenizer)
        if seed is not None:
            if generator is not None:
                raise ValueError("Give `seed` or `generator`, not both: a generator carries its own state.")
            generator = torch.Generator(self.device).manual_seed(seed)
        return self.generate_ids(
            prompt_ids,
            prompt_lengths,
            max_new_tokens,
            generator=generator,
            sampling=sampling,
            num_generations=num_generations,
            greedy=temperature == 0,
            min_new_tokens=min_new_tokens,
            stop_strings=stop_strings,
            action_mask=action_mask,
            max_batch_size=max_batch_size,
        )

    def generate_ids(
        self,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        max_new_tokens: int,
        *,
        generator: torch.Generator | None = None,
        sampling: Sampling | None = None,
        num_generations: int = 1,
        greedy: bool = False,
        epsilon: float | None = None,
        min_new_tokens: int = 0,
        stop_strings: str | Sequence[str] | None = None,
        action_mask: Tensor | ActionMasker | None = None,
        max_batch_size: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ) -> Generation:
        """Completes prompts given as ids, (B, P) int64 left-padded with lengths (B,).

        `greedy` takes the most probable token; `log_probs` are still those of `sampling`. With `epsilon` a token is that one with
        probability 1 − ε, else one of those kept, each alike, and `log_probs` are those of this draw. `eos_token_ids` stand in for the
        policy's own (an environment may have others). The rest is as in `generate`.
        """
        _check_counts(max_new_tokens=max_new_tokens, num_generations=num_generations)
        if max_batch_size is not None:
            _check_counts(max_batch_size=max_batch_size)
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise ValueError(f"`min_new_tokens` must be between 0 and `max_new_tokens` = {max_new_tokens}, got {min_new_tokens}.")
        prompt_ids, prompt_lengths = self._ids(prompt_ids), self._ids(prompt_lengths)
        options = DecodeOptions(
            max_new_tokens=max_new_tokens,
            sampling=sampling or self.sampling,
            num_generations=num_generations,
            max_batch_size=max_batch_size or self.decode_batch_size,
            greedy=greedy,
            epsilon=epsilon,
            min_new_tokens=min_new_tokens,
            eos_token_ids=self.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids),
            fill_token_id=self.fill_token_id,
            stop_strings=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ()),
            action_mask=self.mask.masker() if action_mask is None and self.mask is not None else action_mask,
        )
        return self.engine.generate(self, prompt_ids, prompt_lengths, options, generator or self.generator)

    def kept_mask(self, sampling: Sampling) -> PolicyMask:
        """Returns an `ActionMasker` of the tokens that this policy keeps under `sampling`, for `action_mask` of another one."""
        return PolicyMask(self.backbone, TokenRule(sampling))

    def decode_texts(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[str]:
        """Returns the texts of completions behind their prompts, without special tokens, as the environment does."""
        return decode_completions(self.tokenizer, prompt_ids, completion_ids)

    def encode_prompts(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Turns every form of prompts that `generate` takes into left-padded ids (B, P) and lengths (B,), on the policy's device."""
        return encode(prompts, self.tokenizer, self.fill_token_id, self.device)

    # --- scoring, torch

    def score(
        self,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        completion_ids: Tensor,
        lengths: Tensor,
        *,
        entropy: bool = False,
        hidden: bool = False,
        values: nn.Module | None = None,
        keep: Tensor | None = None,
        return_keep: bool = False,
        sampling: Sampling | None = None,
    ) -> Scores:
        """Scores completions in one teacher-forced pass, with gradients where they are enabled (a frozen policy: never).

        Args:
            prompt_ids: (B, P) int64, left-padded.
            prompt_lengths: (B,) int64.
            completion_ids: (B, T) int64; the first `lengths[i]` count.
            lengths: (B,) int64.
            entropy: also give the entropies.
            hidden: also give the hidden states at s_t.
            values: a value head, whose values at s_t are given too.
            keep: kept sets to renormalise over, as `Generation.kept` holds them. None with truncation or a mask on: those of the present
                logits and the present mask.
            return_keep: also give the kept sets that were used.
            sampling: another distribution than the policy's own.
        """
        layout = self._layout(prompt_ids, prompt_lengths, completion_ids, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return score_completions(
                self.backbone,
                layout,
                sampling or self.sampling,
                kept=None if keep is None else keep.to(self.device),
                legal=self._legal_along(layout) if keep is None else None,
                entropy=entropy,
                hidden=hidden,
                value_head=values,
                return_kept=return_keep,
            )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
