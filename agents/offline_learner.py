"""`OfflineLearner`: the loop of everything that learns from a fixed set of examples: nothing is sampled and no environment is needed.

    learn: while tokens are left:  take examples → callbacks → one optimiser step → evaluate → log

    OfflineLearner ── OfflineAgent         a language model, on texts          SFT, DPO, ...
                  └── RewardModelTrainer   a reward model, on feedback

What examples are is the subclass's affair: it reads them (`read`) and says what its loss is on a minibatch of them (`minibatch_loss`).
"""

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from textgym.agents.base import Agent
from textgym.agents.common.batches import micro_batches
from textgym.agents.common.checks import check_count
from textgym.agents.common.item_order import ItemOrder
from textgym.agents.common.options import CommonOptions, with_common_defaults
from textgym.agents.common.same_sides import check_sides
from textgym.types import IntArray

SCORED_AT_ONCE = 32  # examples per pass where nothing is trained and `micro_batch_size` is not given

Metrics: TypeAlias = dict[str, Tensor]


class DataSet(Protocol):
    """What the loop asks of a set of examples.

    Attributes:
        num_tokens: (N,) int64, what each example adds to `num_timesteps`.
        pass_tokens: (N,) int64, what each example takes of a pass at most: its longest text, prompt included, times the texts that one
            example has at most.
        names: what error messages call each example, N.
    """

    num_tokens: Tensor
    pass_tokens: Tensor
    names: Sequence[str]

    def __len__(self) -> int:
        """N."""

    def select(self, rows: Tensor, device: torch.device) -> Any:
        """Returns the examples `rows` (an index tensor on the CPU) as a batch."""

    def same_sides(self) -> npt.NDArray[np.bool_]:
        """Which examples compare answers that are all the same tokens, (N,)."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set from others, as JSON types: `num_items`, `tokens` and a checksum."""


class Share(NamedTuple):
    """What a micro-batch adds to its minibatch: the shares of all micro-batches sum up to the minibatch's numbers.

    Attributes:
        loss: scalar with gradient.
        metrics: by log key, scalars without gradient.
    """

    loss: Tensor
    metrics: Metrics


MicroBatchShare: TypeAlias = Callable[[Any], Share]


class OfflineLearner(Agent):
    """A model that learns from examples. Abstract.

    Args:
        model: what is trained, in place.
        learning_rate: a number or an SB3 schedule of the progress remaining, 1 at the first step.
        n_epochs: passes over the examples.
        batch_size: examples per optimiser step, at most; the steps of a pass have sizes that differ by one at most. One more where else
            fewer than the algorithm needs (`smallest_step`) would be left.
        reference: π_ref; None where the algorithm has none.
        **options: see `CommonOptions`.

    Raises:
        ValueError: an argument breaks one of the rules above.
    """

    argument: ClassVar[str] = "examples"  # what error messages call them
    examples: Any  # a `DataSet`, once there is one
    smallest_step: ClassVar[int] = 1  # examples that an optimiser step must have
    saved_arguments: ClassVar[tuple[str, ...]] = ("n_epochs", "batch_size")

    def __init__(
        self,
        model: Any,
        learning_rate: float | Schedule,
        *,
        n_epochs: int,
        batch_size: int,
        reference: Any,
        **options: Unpack[CommonOptions],
    ) -> None:
        check_count("n_epochs", n_epochs, "passes")
        check_count("batch_size", batch_size, "examples")
        self.n_epochs, self.batch_size = n_epochs, batch_size
        self.examples = None
        self.order: ItemOrder | None = None
        self._saved_position: dict[str, Any] | None = None
        self._last_metrics: dict[str, float] = {}
        super().__init__(model, learning_rate, reference=reference, settings=with_common_defaults(options, type(self)))

    # -- examples ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, source: Any) -> Any:
        """Reads and tokenises examples: a `DataSet`."""

    def connect(self, source: Any, *, sampled: bool = False) -> None:
        """Takes examples; if they are those of the checkpoint that this agent was loaded from, it goes on where that stopped.

        Args:
            source: as in the constructor.
            sampled: the answers are samples of a policy, which are the same now and then: nothing is said of such rows.
        """
        examples = self.read(source)
        if len(examples) < self.smallest_step:
            raise ValueError(
                f"`{self.argument}` must hold at least {self.smallest_step} rows to train {type(self).__name__} on, got {len(examples)}."
            )
        if not sampled:
            check_sides(examples.same_sides(), examples.names, self.argument)
        self.examples = examples
        self.order = ItemOrder(len(self.examples), self.item_generator)
        if self._saved_position is not None and self._saved_position["fingerprint"] == self.examples.fingerprint():
            self.order.load_state_dict(self._saved_position["order"])
        self._saved_position = None

    def connected(self) -> tuple[Any, ItemOrder]:
        """Returns the examples and their order; none is an error."""
        if self.examples is None or self.order is None:
            name, kind = self.argument, type(self).__name__
            raise ValueError(f"This {kind} has no {name}; give it some with `connect({name})` or `load(path, {name})`.")
        return self.examples, self.order

    def position(self) -> dict[str, Any] | None:
        """Where the agent stands in its examples, and which they are; the examples themselves are not stored."""
        if self.examples is None or self.order is None:
            return self._saved_position
        return {"fingerprint": self.examples.fingerprint(), "order": self.order.state_dict()}

    def restore_position(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint stopped, or will once its examples are connected."""
        self.item_generator.bit_generator.state = state["order"]["generator"]
        if self.examples is None or self.order is None:
            self._saved_position = state
            return
        if self.examples.fingerprint() != state["fingerprint"]:
            raise ValueError(_difference(self.argument, state["fingerprint"], self.examples.fingerprint()))
        self.order.load_state_dict(state["order"])

    # -- the loop ---------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int | None = None,
        callback: MaybeCallback = None,
        log_interval: int | None = 10,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Trains on the examples.

        Args:
            total_timesteps: completion tokens to train on, those of every completion of an example counted, prompts and padding not (a
                lower bound: whole steps are taken). None: until `n_epochs` passes are done, those of a resumed run included.
            callback: SB3 callback(s); `_on_step` runs once per optimiser step, and `False` stops before the update.
            log_interval: steps between two rows of the log, which are means over them.
            tb_log_name: name of the TensorBoard run (default: the class name).
            reset_num_timesteps: False goes on counting, and continues a schedule.
            progress_bar: show the loss, tokens per second and time left.

        Returns:
            self
        """
        examples, order = self.connected()
        if total_timesteps is None:
            done = 0 if reset_num_timesteps else self.num_timesteps
            total_timesteps = self.n_epochs * int(examples.num_tokens.sum()) - done
            if total_timesteps <= 0:
                raise ValueError(f"`total_timesteps` must be given: the {self.n_epochs} passes of `n_epochs` are done.")
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        self.prepare(examples, progress_bar)
        callback.on_training_start({"self": self, "total_timesteps": total_timesteps}, {})
        iteration = 0
        while self.num_timesteps < total_timesteps:
            callback.on_rollout_start()
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            rows = torch.from_numpy(self._next_examples(order))
            self.num_timesteps += int(examples.num_tokens[rows].sum())
            callback.update_locals({"rows": rows})
            if not callback.on_step():
                break
            callback.on_rollout_end()
            iteration += 1
            self._set_learning_rates()
            self._remember_losses(examples, rows[:4])
            self.train(rows)
            self.logger.record("train/epoch", self.num_timesteps / int(examples.num_tokens.sum()))
            stop = self.evaluation is not None and self.evaluation.after_iteration(self)
            if log_interval and iteration % log_interval == 0:
                self.dump_logs(iteration)
            if stop:
                break
        if log_interval and iteration % log_interval:
            self.dump_logs(iteration)
        callback.on_training_end()
        return self

    def _next_examples(self, order: ItemOrder) -> IntArray:
        """Returns the examples of the next step: what is left of a pass, shared out evenly over the steps that it takes."""
        left = order.left or order.num_items
        steps = max(1, min(-(-left // self.batch_size), left // self.smallest_step))
        return order.take(-(-left // steps))

    def train(self, rows: Tensor) -> None:
        """One optimiser step on the examples `rows`, in micro-batches whose losses add up to that of all."""
        examples, _ = self.connected()
        metrics: dict[str, float] = {}

        def losses() -> Iterator[Tensor]:
            for share in self.shares(examples, rows, self.micro_batch_size):
                _add(metrics, share)
                yield share.loss

        self.step(losses())
        self._last_metrics = metrics
        for name, value in metrics.items():
            self.logger.record_mean(name, value)

    def _remember_losses(self, examples: Any, few: Tensor) -> None:
        @torch.no_grad()
        def losses() -> Tensor:
            return torch.stack([share.loss for share in self.shares(examples, few, 1)])

        self.remember_outputs(losses)

    def shares(self, examples: Any, rows: Tensor, size: int | None) -> Iterator[Share]:
        """Yields what each `size` of the examples `rows`, or fewer, add to the minibatch that those are."""
        share_of = self.minibatch_loss(examples, rows)
        for part in micro_batches(examples.pass_tokens[rows], size, self.micro_batch_tokens):
            yield share_of(examples.select(rows[part], self.policy.device))

    @abstractmethod
    def minibatch_loss(self, examples: Any, rows: Tensor) -> MicroBatchShare:
        """Prepares the loss of a minibatch, the examples `rows`; what is returned gives the share of each of its micro-batches."""

    def prepare(self, examples: Any, progress_bar: bool = False) -> None:
        """Called with examples before the first loss on them; a hook, which may show how far it is."""

    @torch.no_grad()
    def numbers_on(self, examples: Any) -> dict[str, float]:
        """Returns the loss and the other numbers of `train`, by log key, on examples that are not trained on.

        Args:
            examples: what `read` returned.
        """
        self.prepare(examples)
        metrics: dict[str, float] = {}
        for share in self.shares(examples, torch.arange(len(examples)), self.micro_batch_size or SCORED_AT_ONCE):
            _add(metrics, share)
        return metrics

    # -- what SB3 expects of an algorithm with an environment ---------------------------------------------------------

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        """SB3's, without the environment that it resets."""
        self.start_time = time.time_ns()
        if self.ep_info_buffer is None or reset_num_timesteps:
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
        if reset_num_timesteps:
            self.num_timesteps = 0
        else:
            total_timesteps += self.num_timesteps
        self._total_timesteps, self._num_timesteps_at_start = total_timesteps, self.num_timesteps
        if not self._custom_logger:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps)
        return total_timesteps, self._init_callback(callback, progress_bar)

    def get_env(self) -> VecEnv | None:
        """Raises: there is no environment. SB3's callbacks that need one come here."""
        raise ValueError(
            f"{type(self).__name__} learns from {self.argument} and has no environment; a callback that needs one cannot be used. "
            "To measure in an environment during training pass `evaluation=Evaluation(env)`."
        )

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Raises: there is no environment to exchange."""
        self.get_env()

    def progress_text(self, shown: dict[str, Any]) -> str:
        """What the progress bar says: the loss of the last step, and its accuracy where there is one."""
        names = {"train/loss": "loss", "rewards/accuracies": "accuracy", "train/accuracy": "accuracy"}
        return "  ".join(f"{short} {self._last_metrics[key]:.3f}" for key, short in names.items() if key in self._last_metrics)


def _difference(argument: str, saved: dict[str, Any], found: dict[str, Any]) -> str:
    """Says in what examples differ from those of a checkpoint."""
    counts = f"{saved['num_items']} with {saved['tokens']} tokens"
    if saved["num_items"] != found["num_items"]:
        what = f"got {found['num_items']} with {found['tokens']} tokens"
    elif saved["tokens"] != found["tokens"]:
        what = f"got as many with {found['tokens']} tokens: other texts, or another setting of what is a token of them (`append_eos`, ends)"
    else:
        what = "got as many with as many tokens, but their contents, weights or order are others"
    return (
        f"`{argument}` must be those that the checkpoint was trained on, {counts}, {what}. "
        "To train on others, load without and call `connect`."
    )


def _add(metrics: dict[str, float], share: Share) -> None:
    for name, value in {"train/loss": share.loss, **share.metrics}.items():
        metrics[name] = metrics.get(name, 0.0) + float(value.detach())
