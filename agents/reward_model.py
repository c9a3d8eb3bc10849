"""`RewardModel`: a transformers decoder with a linear head as a reward, to train (`RewardModelTrainer`) and to be paid by.

Of the language model that it starts from it keeps the trunk; instead of a distribution over the next token, the head reads a number from
the hidden state of the last token (Ziegler et al. 2019, arXiv:1909.08593; Ouyang et al. 2022, arXiv:2203.02155), or of every token
(Christiano et al. 2017, arXiv:1706.03741). What it saves is a sequence classifier of transformers.
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from textgym.agents.common.checks import check_count
from textgym.agents.common.classifiers import check_score_head, fresh_classifier, scale_scores, shift_scores, try_states, with_own_pad_token
from textgym.agents.common.devices import as_device
from textgym.agents.common.layout import lay_out
from textgym.agents.common.loading import load_for_training, load_model
from textgym.agents.common.offline_rows import Example
from textgym.agents.common.offline_tokens import tokenise
from textgym.agents.common.pieces import Piece
from textgym.agents.common.precision import AUTO, CHECKPOINT, checked_dtype, name_of, tell_once
from textgym.agents.common.progress import counting_bar
from textgym.agents.common.scoring import spread
from textgym.agents.policy import CausalLMPolicy
from textgym.alignment import aligned
from textgym.conversations import row_columns
from textgym.prompts import PromptText
from textgym.rewards.classifier import PER_TOKEN, ClassifierReward, head_scores, hidden_states, refuse_adapter, right_padded
from textgym.rewards.dense import token_level
from textgym.rewards.episodes import as_completion
from textgym.rewards.model_trials import Reading, batches
from textgym.tokenizers import end_token_ids, load_tokenizer

Scores = npt.NDArray[np.float64]
Columns: TypeAlias = Mapping[str, Sequence[Any]]


class Normalisation(NamedTuple):
    """What `RewardModel.normalise` took out.

    Attributes:
        mean: of the rewards (per-token model: per token) before, (C,).
        std: what they were divided by, (C,).
        in_weights: whether transformers' own logits are normalised too; False where the mean had to go into `config.reward_offset`.
    """

    mean: Scores
    std: Scores
    in_weights: bool


class RewardModel:
    """A reward that is learned.

        r(x, y) = w · h_T,  h_T the hidden state of the last token of x and y           (one score per text)
        r̂(s_t, a_t) = w · h_t,  h_t that of the token a_t;  r(x, y) = Σ_t r̂(s_t, a_t)   (`per_token`)

    It is a reward in TRL's calling form, for `gym.make(..., reward=model)`; a per-token model is a `token_level` one. A model with one
    score per text reads *texts*: the prompt followed by the completion, in its own tokenizer, exactly as `ClassifierReward` reads them. It
    never sees the EOS that ends an episode (a text that is written with an EOS keeps it), so it cannot tell a finished answer from one that
    was cut; that is what an agent's `missing_eos_penalty` is for. A per-token model reads the policy's *ids*, EOS included, so it must have
    the policy's tokenizer; behind texts without ids it puts EOS.

    Dropout is off at all times. The tokenizer is copied, and both get a pad token that no text ends with, if they have none; so that
    transformers' own forward, which finds the last token by comparing ids with the pad id, is right about every text.

    Args:
        model: a transformers decoder for sequence classification, with a linear head called `score`.
        tokenizer: its tokenizer.
        per_token: one score per token; None takes what the model was saved with.
        label: which output is the reward, as an index or a name; needed only where there are several, before one is asked for.
        batch_size: texts per forward pass of scoring.
        device: where the model goes; "auto" takes a GPU if there is one.

    Attributes:
        model: the transformers model itself.
        tokenizer: its own tokenizer.
        num_outputs: C, scores per text.
        output_names: their C names.

    Raises:
        ValueError: the model has no such head, or the label is none of its outputs.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        per_token: bool | None = None,
        label: int | str | None = None,
        batch_size: int = 32,
        device: torch.device | str = "auto",
    ) -> None:
        check_score_head(model)
        check_count("batch_size", batch_size, "texts")
        self.model: Any = aligned(model.to(as_device(device))).eval()
        self.tokenizer = with_own_pad_token(model, tokenizer)
        self.per_token = bool(getattr(model.config, PER_TOKEN, False)) if per_token is None else per_token
        self.num_outputs = int(model.config.num_labels)
        self.output_names = [str(model.config.id2label[index]) for index in range(self.num_outputs)]
        self.label, self.batch_size = self._index(label), batch_size
        if self.per_token != getattr(model.config, PER_TOKEN, False):
            setattr(model.config, PER_TOKEN, self.per_token)
        self._reader = None if self.per_token else ClassifierReward(model, self.tokenizer, label=self.label or 0, batch_size=batch_size)
        if self.per_token:
            token_level(self)
        self.__name__ = "reward_model" if self.label is None or self.num_outputs == 1 else self.output_names[self.label]

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        num_outputs: int | None = None,
        per_token: bool | None = None,
        output_names: Sequence[str] | None = None,
        seed: int = 0,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        **settings: Any,
    ) -> "RewardModel":
        """Loads a sequence classifier, or puts a fresh head on a causal language model.

        Args:
            path: a folder, or an id of the Hugging Face hub.
            num_outputs: scores per text of a fresh head (default 1); a classifier has its own.
            per_token: one score per token; None takes what a classifier was saved with.
            output_names: names of the outputs of a fresh head.
            seed: of a fresh head.
            device: see the class.
            dtype: of the weights. "auto" is that of the checkpoint, but float32 for one in half precision, whose weights would not move by
                the small steps of training; "checkpoint" is that of the checkpoint: half the memory, for a reward that is not trained.
            **settings: further arguments of the class (`label`, ...).

        Raises:
            ValueError: there is no such model, or it has another number of outputs.
        """
        refuse_adapter("path", name := os.fspath(path))
        place, dtype = as_device(device), checked_dtype(dtype)
        try:
            kinds = AutoConfig.from_pretrained(name).architectures or []
        except (OSError, ValueError) as error:
            raise ValueError(f"`path`: no model could be loaded from {name!r}: {str(error).strip().splitlines()[0]}") from error
        if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            language_model, tokenizer, widened = load_model(path, dtype, False, None)
            made = fresh_classifier(language_model, num_outputs, output_names, seed)
            if widened is not None:
                tell_once(name, widened, None)
            return cls(made, tokenizer, per_token=per_token, device=place, **settings)
        if dtype == AUTO:
            model, widened = load_for_training(AutoModelForSequenceClassification, name)
            if widened is not None:
                tell_once(name, widened, None)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(name, dtype=AUTO if dtype == CHECKPOINT else dtype)
        found = cls(model, load_tokenizer(name), per_token=per_token, device=place, **settings)
        if num_outputs not in (None, found.num_outputs) or (output_names is not None and list(output_names) != found.output_names):
            raise ValueError(f"`num_outputs` must be that of the classifier in {name!r}, which has {found.output_names}; leave it out.")
        return found

    @classmethod
    def from_policy(
        cls,
        policy: CausalLMPolicy,
        *,
        per_token: bool = False,
        num_outputs: int | None = None,
        output_names: Sequence[str] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> "RewardModel":
        """Starts from a copy of a policy's trunk (a LoRA policy's with its adapter merged; a reference's as it is) with a fresh head.

        Args:
            policy: the policy, which stays as it is.
            per_token: one score per token.
            num_outputs: scores per text (default 1).
            output_names: their names, for instance the categories of markings.
            seed: of the head.
            **settings: further arguments of the class.
        """
        with policy.backbone.holding():
            source = copy.deepcopy(policy.model).unload() if policy.backbone.without_adapter else policy.model
            model = fresh_classifier(source, num_outputs, output_names, seed)
        return cls(model, policy.tokenizer, per_token=per_token, **{"device": policy.device, **settings})

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes model and tokenizer; `AutoModelForSequenceClassification` and `ClassifierReward` read them, with the same scores."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def loading_arguments(self) -> dict[str, Any]:
        """What `from_pretrained` must be told to get the same again from what `save_pretrained` wrote."""
        return {"label": self.label, "batch_size": self.batch_size, "dtype": name_of(self.model.dtype)}

    def copy(self) -> "RewardModel":
        """Returns a model of the same weights that shares nothing with this one."""
        settings: Any = {"per_token": self.per_token, "label": self.label, "batch_size": self.batch_size, "device": self.device}
        return RewardModel(copy.deepcopy(self.model), self.tokenizer, **settings)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns itself: Gymnasium copies the arguments of an environment several times. `copy` makes a copy."""
        return self

    def output(self, label: int | str) -> "RewardModel":
        """Returns the same model, weights shared, whose reward is the output `label`."""
        return RewardModel(
            self.model, self.tokenizer, per_token=self.per_token, label=label, batch_size=self.batch_size, device=self.device
        )

    def _index(self, label: int | str | None) -> int | None:
        if label is None:
            return 0 if self.num_outputs == 1 else None
        index = self.output_names.index(label) if label in self.output_names else label
        if isinstance(index, str) or not 0 <= index < self.num_outputs:
            raise ValueError(f"`label` must be one of {self.output_names} or an index below {self.num_outputs}, got {label!r}.")
        return int(index)

    @property
    def reader(self) -> ClassifierReward:
        """What reads texts of a model with one score per text."""
        if self._reader is None:
            raise ValueError("a per-token reward model reads ids, not texts.")
        return self._reader

    @property
    def limit(self) -> int | None:
        """The longest text, prompt included, in tokens; None without a limit."""
        return self.reading.limit

    @cached_property
    def reading(self) -> Reading:
        """How the model reads texts, tried when it is first asked for."""
        return try_states(self.model, self.tokenizer, f"reward model `{self.__name__}`")

    @property
    def reward_output(self) -> int:
        """The index of the output that is the reward; an error where none was chosen."""
        if self.label is None:
            raise ValueError(
                f"the reward model has {self.num_outputs} outputs ({', '.join(self.output_names)}), so one must be chosen: "
                "`reward_model.output(name)`."
            )
        return self.label

    # -- what an agent asks of what it trains -----------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def to(self, device: torch.device | str) -> Self:
        """Moves the model."""
        self.model.to(as_device(device))
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of trunk and head."""
        parameters: Iterator[nn.Parameter] = self.model.parameters()
        return parameters

    def state_dict(self) -> dict[str, Tensor]:
        """The weights by name."""
        state: dict[str, Tensor] = self.model.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None:
        """Takes the weights that `state_dict` gave."""
        self.model.load_state_dict(state, strict=strict)

    # -- scores -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[PromptText],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> Any:
        """Returns one reward per row, a list of floats; a per-token model one list of floats per row, a reward per id.

        Args:
            prompts: strings or message lists.
            completions: the same.
            completion_ids: the tokens of the completions; what a per-token model scores, if given.
            **columns: of them `tools`, `documents` and `chat_template_kwargs` go into the chat template of a conversation.
        """
        if not self.per_token:
            self.reward_output  # noqa: B018  (raises where no output was chosen)
            return self.reader(prompts, completions, **columns)
        if completion_ids is None:
            pieces = self.encode(prompts, completions, columns)
        else:
            rows = enumerate(zip(prompts, completion_ids, strict=True))
            pieces = self._token_pieces([Example(prompt, [list(ids)], columns=row_columns(columns, row)) for row, (prompt, ids) in rows])
        singles = [Piece(piece.ids, end - 1, end) for piece in pieces for end in range(piece.start + 1, piece.end + 1)]
        scores = iter(self.score_pieces(singles)[:, self.reward_output].tolist())
        return [[next(scores) for _ in range(piece.start, piece.end)] for piece in pieces]

    def score_texts(self, prompts: Sequence[PromptText], completions: Sequence[PromptText], columns: Columns | None = None) -> Scores:
        """Returns the scores of whole texts, all outputs, (N, C) float64; of a per-token model the sums over the tokens.

        `columns` are other columns of the rows, N values each, of which some go into a chat template.
        """
        return self.score_pieces(self.encode(prompts, completions, columns))

    def encode(self, prompts: Sequence[PromptText], completions: Sequence[PromptText], columns: Columns | None = None) -> list[Piece]:
        """Returns what is read of each text: its tokens, and of which of them the scores are added up; `columns` as in `score_texts`."""
        rows = list(enumerate(zip(prompts, completions, strict=True)))
        if not self.per_token:
            name = f"reward `{self.__name__}`, row {{}}"
            read = (self.reader.tokens(*pair, row_columns(columns, row), name.format(row)) for row, pair in rows)
            return [Piece(ids, len(ids) - 1, len(ids)) for ids in read]
        answers = (as_completion(prompt, text) if isinstance(text, str) else text for _, (prompt, text) in rows)
        return self._token_pieces(
            [Example(prompts[row], [answer], columns=row_columns(columns, row)) for row, answer in enumerate(answers)]
        )

    def _token_pieces(self, rows: Sequence[Example]) -> list[Piece]:
        """Encodes prompt and completion apart, as they are when a policy generates; EOS goes behind texts."""
        ends = end_token_ids(self.tokenizer)
        encoded = tokenise(rows, self.tokenizer, ends, "row {} of the texts", append_eos=True)
        return [Piece([*row.prompt, *row.completions[0]], len(row.prompt), len(row.prompt) + len(row.completions[0])) for row in encoded]

    @torch.no_grad()
    def score_pieces(self, pieces: Sequence[Piece], *, progress_bar: bool = False) -> Scores:
        """Returns the scores of pieces, (N, C) float64: batches of like length, each different text once.

        Args:
            pieces: N pieces.
            progress_bar: show one, on a terminal.
        """
        places: dict[tuple[int, ...], list[int]] = {}
        for number, piece in enumerate(pieces):
            places.setdefault(tuple(piece.ids), []).append(number)
        scores = np.empty((len(pieces), self.num_outputs))
        texts = sorted(places, key=len)
        if self.limit is not None and texts and len(texts[-1]) > self.limit:
            raise ValueError(f"the longest text has {len(texts[-1])} tokens, more than the {self.limit} that the reward model can read.")
        with counting_bar("scoring", len(texts), shown=progress_bar) as advance:
            for places_of_batch in batches([len(text) for text in texts], self.batch_size, self.reading.batching):
                batch = [texts[place] for place in places_of_batch]
                wanted = [(row, number) for row, text in enumerate(batch) for number in places[text]]
                table = torch.tensor([(row, pieces[number].start, pieces[number].end) for row, number in wanted], device=self.device)
                ids, lengths = right_padded(batch, self.tokenizer.pad_token_id, self.device)
                scores[[number for _, number in wanted]] = self.piece_scores(ids, lengths, *table.unbind(1)).double().cpu().numpy()
                advance(len(batch))
        return scores

    def piece_scores(self, ids: Tensor, lengths: Tensor, rows: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        """Returns the summed scores of pieces of texts, (I, C) float32, with gradient where that is enabled.

        Args:
            ids: (U, L) int64, right-padded texts.
            lengths: (U,) int64.
            rows: the text of each piece, (I,) int64.
            starts: its first token, (I,) int64.
            ends: the place behind its last token, (I,) int64.
        """
        hidden = hidden_states(self.model.eval(), ids, lengths)  # (U, L, H)
        sizes = ends - starts
        piece = torch.arange(len(rows), device=rows.device).repeat_interleave(sizes)  # (M,), M tokens that are read
        offset = torch.arange(len(piece), device=rows.device) - (sizes.cumsum(0) - sizes)[piece]
        scores = head_scores(self.model, hidden[rows[piece], starts[piece] + offset]).float()  # (M, C)
        return scores.new_zeros(len(rows), self.num_outputs).index_add(0, piece, scores)

    def score_tokens(self, prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns the scores of completions given as ids, float32, with gradient where that is enabled.

        Args:
            prompt_ids: (B, P) int64, left-padded.
            prompt_lengths: (B,) int64.
            completion_ids: (B, T) int64; the first `lengths[i]` count. They are read as they are: an EOS among them is scored.
            lengths: (B,) int64, at least 1.

        Returns:
            (B,), or (B, T) and zero from `lengths` on of a per-token model. Where no output was chosen among several, one dimension more,
            of size C.
        """
        # States s_0 ... s_T, of which the first, before any token, has no score: hence one column more.
        extra = completion_ids.new_zeros(len(completion_ids), 1)
        layout = lay_out(prompt_ids, prompt_lengths, torch.cat([completion_ids, extra], 1), lengths + 1)
        hidden = hidden_states(self.model.eval(), layout.input_ids, prompt_lengths + lengths)
        scores = spread(head_scores(self.model, hidden[layout.rows, layout.columns]).float(), layout.mask)[:, 1:]  # (B, T, C)
        if not self.per_token:
            scores = scores[torch.arange(len(scores), device=scores.device), lengths - 1]
        return scores if self.label is None else scores[..., self.label]

    # -- normalisation ----------------------------------------------------------------------------------------------

    def normalise(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[PromptText],
        *,
        unit_std: bool = False,
        columns: Columns | None = None,
        progress_bar: bool = False,
    ) -> Normalisation:
        """Makes the mean reward of given completions, those of the reference, zero; the change is a part of what is saved.

        Comparisons fix a reward up to a constant, so nothing that was learned is lost. Of a per-token model the mean per *token* becomes
        zero, and with it the mean of the sums: its constant, times the length, is a preference for long or short texts.

        Args:
            prompts: prompts.
            completions: the reference's completions of them.
            unit_std: also divide by the standard deviation of the rewards of these texts, which changes the scale of β.
            columns: other columns of the rows, of which some go into a chat template.
            progress_bar: show one, on a terminal.

        Returns:
            What was taken out, and where it was written.
        """
        pieces = self.encode(prompts, completions, columns)
        scores = self.score_pieces(pieces, progress_bar=progress_bar)  # (N, C)
        counts = np.array([piece.end - piece.start for piece in pieces])[:, None]
        mean = scores.sum(0) / counts.sum()
        std = (scores - mean * counts).std(0) if unit_std else np.ones(self.num_outputs)
        if unit_std and not (std > 1e-6).all():
            raise ValueError(f"`completions` must have rewards that differ for `unit_std`, got a standard deviation of {std.min():.2g}.")
        in_weights = shift_scores(self.model, torch.tensor(-mean))
        scale_scores(self.model, torch.tensor(1 / std))
        return Normalisation(mean, std, in_weights)
