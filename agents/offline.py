"""`OfflineAgent`: a language model that learns from texts: how its examples are read, tokenised and scored. `OfflineLearner` has the loop.

An algorithm is a final subclass that reads its rows (`parse`) and says what its loss is on a minibatch of them (`minibatch_loss`).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, ClassVar, TypeAlias, Unpack

import numpy as np
import torch
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from textgym.agents.common.batches import micro_batches
from textgym.agents.common.checks import check_count
from textgym.agents.common.offline_batches import CompletionBatch, ExampleBatch, ExampleSet, TokenRows
from textgym.agents.common.offline_rows import Example, read_examples
from textgym.agents.common.offline_tokens import is_ids, tokenise
from textgym.agents.common.options import CommonOptions
from textgym.agents.common.packing import check_packing, score_packed
from textgym.agents.common.progress import counting_bar
from textgym.agents.offline_learner import SCORED_AT_ONCE, Metrics, OfflineLearner, Share
from textgym.agents.policy import CausalLMPolicy
from textgym.feedback.records import Record

__all__ = ["Metrics", "MicroBatchShare", "OfflineAgent", "Share"]

MicroBatchShare: TypeAlias = Callable[[ExampleBatch], Share]


class OfflineAgent(OfflineLearner):
    """A language model that learns from examples.

    Args:
        policy: the `CausalLMPolicy` to train, in place. It must not truncate its distribution: examples are no samples of it.
        examples: a list of dicts, the path of a .jsonl or .jsonl.gz file, or a `datasets.Dataset`; columns as each algorithm says. Or
            records of `textgym.feedback`. None where `connect` gives them later.
        learning_rate: a number or an SB3 schedule of the progress remaining, 1 at the first step.
        n_epochs: passes over the examples.
        batch_size: examples per optimiser step, at most; the steps of a pass have sizes that differ by one at most.
        reference: π_ref; None where the algorithm has none.
        append_eos: put EOS behind completions given as texts, unless they end with one.
        max_tokens: examples whose prompt and completion are longer together are left out; None takes all. Unless all fit into the
            model's positions, an error names the longest.
        packing: several completions in one row of the model's input, prompts shared: less padding, the same numbers to rounding.
        **options: see `CommonOptions`.

    Raises:
        ValueError: an argument breaks one of the rules above.
    """

    policy: CausalLMPolicy  # type: ignore[assignment]
    reference: CausalLMPolicy | None
    examples: ExampleSet | None
    loss_has_reference: ClassVar[bool] = True
    saved_arguments: ClassVar[tuple[str, ...]] = ("append_eos", "max_tokens", "packing")

    def __init__(
        self,
        policy: CausalLMPolicy,
        examples: Any,
        learning_rate: float | Schedule,
        *,
        n_epochs: int,
        batch_size: int,
        reference: CausalLMPolicy | None,
        append_eos: bool = True,
        max_tokens: int | None = None,
        packing: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        if max_tokens is not None:
            check_count("max_tokens", max_tokens, "tokens")
        if reference is not None and not isinstance(reference, CausalLMPolicy):
            raise ValueError(
                f"`reference` must be a CausalLMPolicy, got {type(reference).__name__}. Make one with `CausalLMPolicy(model, tokenizer)."
                "reference()`."
            )
        self.append_eos, self.max_tokens, self.packing = append_eos, max_tokens, packing
        super().__init__(policy, learning_rate, n_epochs=n_epochs, batch_size=batch_size, reference=reference, **options)
        if policy.sampling.truncates:
            raise ValueError(
                f"`policy` must not truncate its distribution (top_k, top_p, min_p), got {policy.sampling}: the tokens of an example need "
                "not be among those it keeps. Truncate in `generate(..., top_p=...)` instead."
            )
        if packing:
            check_packing(policy)
        if examples is not None:
            self.connect(examples)

    @staticmethod
    @abstractmethod
    def parse(row: Mapping[str, Any] | Record, where: str) -> Example:
        """Reads one row; what it lacks is a `ValueError` that calls it `where`."""

    # -- examples ---------------------------------------------------------------------------------------------------

    def read(self, source: Any) -> ExampleSet:
        """Reads and tokenises examples.

        Args:
            source: as in the constructor.

        Raises:
            ValueError: a row is not as it should be, or longer than the model can read; which one and how is said.
        """
        examples, where = read_examples(source, self.argument, type(self).parse)
        tokens = tokenise(examples, self.policy.tokenizer, self.policy.eos_token_ids, where, append_eos=self.append_eos)
        sizes = [len(row.prompt) + max(map(len, row.completions)) for row in tokens]
        kept = list(range(len(sizes)))
        names = [where.format(number) for number in range(len(tokens))]
        texts = [number for number, example in enumerate(examples) if not is_ids(example.completions[0])]
        rows = TokenRows([[*tokens[number].prompt, *chain(*tokens[number].completions)] for number in texts])
        rows.check_known(self.policy.tokenizer, f"`{self.argument}`", lambda row: names[texts[row]])
        if self.max_tokens is not None:
            kept = [number for number in kept if sizes[number] <= self.max_tokens]
            if not kept:
                raise ValueError(f"`max_tokens` must be at least {min(sizes)}, the shortest of `{self.argument}`, got {self.max_tokens}.")
            examples, tokens = [examples[number] for number in kept], [tokens[number] for number in kept]
            sizes, names = [sizes[number] for number in kept], [names[number] for number in kept]
        limit = self.policy.backbone.max_positions
        if limit is not None and max(sizes) > limit:
            raise ValueError(
                f"{names[int(np.argmax(sizes))]} has {max(sizes)} tokens with its prompt, but the model has {limit} positions; "
                f"pass `max_tokens={limit}` to leave out what is longer."
            )
        data = ExampleSet(examples, tokens, names)
        data.places = np.array(kept, dtype=np.int64)
        self.check_examples(data)
        return data

    def check_examples(self, examples: ExampleSet) -> None:
        """Raises a `ValueError` where the algorithm's settings do not suit these examples; a hook."""

    def prepare(self, examples: ExampleSet, progress_bar: bool = False) -> None:
        """Works out log π_ref(y|x) of every completion, once."""
        self.add_reference(examples, progress_bar)

    def evaluate(self, examples: Any) -> dict[str, float]:
        """Returns the loss and the other numbers of `train`, by log key, on examples that are not trained on.

        Args:
            examples: as in the constructor, or what `read` returned, which saves reading them again.
        """
        return self.numbers_on(examples if isinstance(examples, ExampleSet) else self.read(examples))

    @abstractmethod
    def minibatch_loss(self, examples: ExampleSet, rows: Tensor) -> MicroBatchShare:
        """Prepares the loss of a minibatch, the examples `rows`; what is returned gives the share of each of its micro-batches."""

    # -- scores -----------------------------------------------------------------------------------------------------

    def score(self, policy: CausalLMPolicy, batch: CompletionBatch) -> Tensor:
        """Returns log π(y_t|s_t) of completions, (U, T), with gradient unless `policy` is frozen."""
        if self.packing:
            return score_packed(policy, batch)
        return policy.score(batch.prompt_ids, batch.prompt_lengths, batch.completion_ids, batch.lengths).log_probs

    @torch.no_grad()
    def add_reference(self, examples: ExampleSet, progress_bar: bool = False) -> None:
        """Works out log π_ref(y|x) of every completion, once; `progress_bar` shows how many are done."""
        if not self.loss_has_reference or self.reference is None or examples.reference_log_probs is not None:
            return
        found = torch.empty(examples.num_completions)
        longest_first = np.argsort(-examples.completions.lengths, kind="stable")  # completions of one length need no padding
        lengths = torch.from_numpy(examples.pair_lengths[longest_first])
        with counting_bar("Scoring by the reference", examples.num_completions, shown=progress_bar) as advance:
            for part in micro_batches(lengths, SCORED_AT_ONCE, self.micro_batch_tokens):
                places = longest_first[part.numpy()]
                batch = examples.completion_batch(places, self.policy.device)
                found[torch.from_numpy(places)] = self.score(self.reference, batch).sum(1).cpu()
                advance(len(places))
        examples.reference_log_probs = found
