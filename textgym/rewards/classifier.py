"""A transformers sequence classifier as a reward, with its own tokenizer. Torch is imported when the reward is first called.

transformers' `ForSequenceClassification` of a decoder finds the last token by comparing ids with the pad id, which is wrong where the
text holds that id and impossible where there is none. Here the batch is padded on the right, the base model runs on it, and the head
reads the hidden state at the last token *by length*.
"""

import copy
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from textgym.alignment import aligned
from textgym.conversations import answered, conversation_text, row_columns
from textgym.encoding import encode_plain, encode_whole
from textgym.errors import RewardError
from textgym.rewards.calling import NamedReward
from textgym.rewards.episodes import Prompt, as_completion, excerpt
from textgym.rewards.model_trials import batches, readable, try_reading
from textgym.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# These pool inside `forward` by comparing ids, or at a column of the padded batch, without a head that could be applied from outside.
_REFUSED_TYPES = frozenset({"ctrl", "modernbert-decoder", "xlnet"})
# What `textgym.agents.RewardModel` writes into the configuration: that every token has a score, and what is added to the head's outputs
# where the model has no parameter that adds a constant.
PER_TOKEN, OFFSET = "reward_per_token", "reward_offset"


def is_classifier(value: object) -> bool:
    """Returns whether `value` is a transformers model with a classification head. Does not import torch."""
    return any(base.__name__.endswith("ForSequenceClassification") for base in type(value).__mro__) or _is_adapted_classifier(value)


def _is_adapted_classifier(value: object) -> bool:
    # peft wraps the model
    inner = getattr(value, "get_base_model", None)
    return callable(inner) and "peft" in sys.modules and is_classifier(inner())


class ClassifierReward(NamedReward):
    """Scores prompt and completion with a sequence classifier: the reward is its logit.

    The text is the prompt followed by the completion, encoded by the classifier's own tokenizer, with the special tokens that it adds;
    a conversation goes through its chat template. Of a decoder (GPT-2, Llama, GPT-NeoX, Qwen, ...: a model whose head is called
    `score`) the logit is read at the last token by length; an encoder (BERT, RoBERTa, DistilBERT, ...) pools in its own way under the
    attention mask. Encoder-decoders, CTRL, XLNet and the ModernBERT decoder are refused.

    When the model is loaded it is tried whether a text gets the same score alone and padded beside a longer one. Where not (FNet, ConvBERT,
    ...), only texts of one length share a forward pass, or none do, so no score depends on the other texts.

    Args:
        model: a folder or id for `AutoModelForSequenceClassification`, or such a model.
        tokenizer: its tokenizer, or a folder or id of one; by default the one that lies beside the model.
        label: which logit, as an index or a name of the model's `label2id`. Needed if the model has more than one label.
        batch_size: texts per forward pass.
        max_length: longest text in tokens; by default the smallest of what the tokenizer, the configuration and the model's table of
            positions (tried when it is loaded) allow. A longer text is an error, or is cut.
        truncation: cut texts that are too long, keeping the end, instead of raising.
        add_special_tokens: whether the tokenizer adds its special tokens (`[CLS]`, a BOS) to plain texts; a chat template has its own.
        device: where the model runs. `"auto"`: a GPU if there is one, for a model loaded from a path; where it is, for a given model.
        dtype: of a model loaded from a path, `"auto"` for that of the file. A given model is not cast.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        label: int | str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
        device: Any = "auto",
        dtype: Any = "auto",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
        self.label, self.batch_size, self.max_length, self.truncation = label, batch_size, max_length, truncation
        self.add_special_tokens, self.device, self.dtype = add_special_tokens, device, dtype
        self._tokenizer = tokenizer
        self._ready = False
        self._source: str | None = None
        self._model: Any = None
        if isinstance(model, str | os.PathLike):
            self._source = os.fspath(model)
            _check_source(self._source, label)
            self.__name__ = Path(self._source).name
        else:
            self._model = _unwrapped(model)
            _check_model(self._model)
            self.__name__ = Path(self._model.config.name_or_path or type(self._model).__name__).name
            _label_index(self._model.config.num_labels, self._model.config.label2id, label, self.__name__)

    def __getstate__(self) -> dict[str, Any]:
        """A model that came from a path is read again where the pickle is opened."""
        reloaded = {"_model": None, "_ready": False} if self._source is not None else {}
        return {**self.__dict__, **reloaded}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns itself: Gymnasium copies the arguments of an environment several times, and a model is large."""
        return self

    @property
    def model(self) -> Any:
        """The transformers model."""
        self._load()
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The classifier's own tokenizer."""
        self._load()
        return self._tokenizer

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Prompt], **columns: Any) -> list[float]:
        """Returns one logit per row; of the other columns those that go into a chat template are looked at."""
        import torch

        self._load()
        rows = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            of_row = row_columns(columns, row)
            ids = self.tokens(prompt, completion, of_row, f"reward `{self.__name__}`, row {row}")
            rows.append(self._checked(ids, prompt, completion, of_row))
        scores = [0.0] * len(rows)
        with torch.no_grad(), _evaluating(self._model), readable(f"reward `{self.__name__}`", self._model):
            for batch in batches([len(row) for row in rows], self.batch_size, self._batching):
                logits = self.logits([rows[row] for row in batch])[:, self._label].float().tolist()
                for row, score in zip(batch, logits, strict=True):
                    scores[row] = score
        return scores

    def _load(self) -> None:
        if self._ready:
            return
        import torch
        from transformers import AutoModelForSequenceClassification

        if self._source is not None:
            device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
            try:
                with without_progress_bars():
                    model = AutoModelForSequenceClassification.from_pretrained(self._source, dtype=self.dtype)
            except OSError as error:
                raise ValueError(f"`reward`: cannot load a sequence classifier from {self._source!r}: {error}") from error
            _check_model(model)
            self._model = model.to(device)
        elif self.device != "auto":
            self._model = self._model.to(self.device)
        self._model = aligned(self._model)
        self._tokenizer = self._load_tokenizer()
        self._label = _label_index(self._model.config.num_labels, self._model.config.label2id, self.label, self.__name__)
        with _evaluating(self._model):
            self._limit, self._batching = try_reading(
                self._model, self._logits, f"reward `{self.__name__}`", self._tokenizer, self.max_length
            )
        if self.truncation:
            self._tokenizer = copy.deepcopy(self._tokenizer)  # the side is a setting of the user's object
            self._tokenizer.truncation_side = "left"
        self._ready = True

    def _load_tokenizer(self) -> Any:
        tokenizer = self._tokenizer
        if tokenizer is None:
            tokenizer = self._source or self._model.config.name_or_path
        if not isinstance(tokenizer, str | os.PathLike):
            return load_tokenizer(tokenizer)
        try:
            if not os.fspath(tokenizer):
                raise OSError("the model does not say where it was loaded from")
            return load_tokenizer(os.fspath(tokenizer))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"reward `{self.__name__}`: cannot load the classifier's tokenizer from {os.fspath(tokenizer)!r} ({error}); "
                "give it: ClassifierReward(model, tokenizer)."
            ) from error

    def tokens(self, prompt: Prompt, completion: Prompt, columns: Mapping[str, Any] | None = None, where: str | None = None) -> list[int]:
        """Returns the tokens of a prompt with its completion, however many; a text without any is a `RewardError`.

        Special tokens that the text begins with, such as a BOS that was written there, are not added a second time.
        """
        self._load()
        text, special = self.text(prompt, completion, columns, where)
        cut = {"truncation": True, "max_length": self._limit} if self.truncation and self._limit is not None else {}
        # Neither warns of a length that `_checked` turns into an error.
        (ids,) = encode_whole(self._tokenizer, [text], **cut) if special else encode_plain(self._tokenizer, [text], **cut)
        if not ids:
            raise RewardError(f"reward `{self.__name__}`: the text {excerpt(text)} has no tokens, so there is no last token to score.")
        return ids

    def _checked(self, ids: list[int], prompt: Prompt, completion: Prompt, columns: Mapping[str, Any]) -> list[int]:
        """Returns `ids`; too many for the model are a `RewardError`."""
        if self._limit is not None and len(ids) > self._limit:
            raise RewardError(
                f"reward `{self.__name__}`: the text {excerpt(self.text(prompt, completion, columns)[0])} has {len(ids)} tokens of the "
                f"classifier's tokenizer, more than the {self._limit} it can read; shorten prompts or completions, or use "
                "ClassifierReward(..., truncation=True)."
            )
        return ids

    def text(
        self, prompt: Prompt, completion: Prompt, columns: Mapping[str, Any] | None = None, where: str | None = None
    ) -> tuple[str, bool]:
        """Returns the text of a row, and whether its special tokens are still to be added.

        Args:
            prompt: a string, or messages; the answer goes on with an assistant message that ends them.
            completion: what answers it.
            columns: the other columns of the row, of which some go into a chat template.
            where: what error messages call the row.

        Raises:
            ValueError: there is no chat template, or it refuses the conversation.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion, self.add_special_tokens
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(
                f"reward `{self.__name__}`: the prompts are conversations, but the classifier's tokenizer has no chat template; "
                "set `tokenizer.chat_template` or use prompts that are strings."
            )
        answer = as_completion(prompt, completion) if isinstance(completion, str) else completion
        whole = answered(prompt, answer)  # type: ignore[arg-type]
        name = where or f"reward `{self.__name__}`"
        return conversation_text(self._tokenizer, whole, name, as_prompt=False, columns=columns), False

    def logits(self, rows: Sequence[Sequence[int]]) -> "torch.Tensor":
        """Returns the logits of every label of encoded texts, (B, labels), in one pass; with gradient where that is enabled."""
        self._load()
        return self._logits(rows)

    def _logits(self, rows: Sequence[Sequence[int]]) -> "torch.Tensor":
        ids, lengths = right_padded(rows, _filler(self._model, self._tokenizer), self._model.device)
        if not has_score_head(self._model):  # an encoder, with a head of its own
            logits: torch.Tensor = self._model(input_ids=ids, attention_mask=attention_mask(ids, lengths)).logits
            return logits
        hidden = hidden_states(self._model, ids, lengths)
        return head_scores(self._model, hidden[_range(lengths), lengths - 1])


def right_padded(rows: Sequence[Sequence[int]], filler: int, device: Any) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Returns id lists as (B, L) int64 with `filler` behind their ends, and their lengths (B,)."""
    import torch

    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), filler)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths.to(device)


def attention_mask(ids: "torch.Tensor", lengths: "torch.Tensor") -> "torch.Tensor":
    """Returns what a right-padded batch (B, L) hides of its ends, (B, L) of 0 and 1."""
    import torch

    return (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def has_score_head(model: Any) -> bool:
    """Returns whether a classifier is a decoder whose head can be applied to any hidden state."""
    import torch

    return isinstance(getattr(model, "score", None), torch.nn.Module)


def hidden_states(model: Any, ids: "torch.Tensor", lengths: "torch.Tensor") -> "torch.Tensor":
    """Returns the last hidden states of a decoder on a right-padded batch, (B, L, H)."""
    states: torch.Tensor = model.base_model(input_ids=ids, attention_mask=attention_mask(ids, lengths), use_cache=False).last_hidden_state
    return states


def head_scores(model: Any, hidden: "torch.Tensor") -> "torch.Tensor":
    """Returns the scores of hidden states, (..., labels) from (..., H), `reward_offset` of the model's configuration included."""
    scores: torch.Tensor = model.score(hidden)
    offset = getattr(model.config, OFFSET, None)
    return scores if offset is None else scores + scores.new_tensor(offset)


def _range(lengths: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.arange(len(lengths), device=lengths.device)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Loads without transformers' bar, which would appear in the middle of whatever first asked for a reward."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Switches dropout off for the scores, and on again if the model is being trained elsewhere."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _unwrapped(model: Any) -> Any:
    """Returns the transformers model inside a peft model (the adapter's layers stay in it), or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def _check_model(model: Any) -> None:
    if not is_classifier(model):
        raise ValueError(f"`model` must be a transformers model for sequence classification or a path of one, got {type(model).__name__}.")
    if model.config.is_encoder_decoder or model.config.model_type in _REFUSED_TYPES:
        raise ValueError(
            f"a classifier of type {model.config.model_type!r} cannot be a reward here: its score cannot be read at the last token by "
            "length. Decoders with a head called `score` and encoders can."
        )
    _check_whole(getattr(model.config, PER_TOKEN, False), "this model")


def _check_whole(per_token: bool, what: str) -> None:
    if per_token:
        raise ValueError(
            f"`model`: {what} scores every token, and the reward of a text is their sum; a classifier reads one token. "
            "Use `textgym.agents.RewardModel.from_pretrained(folder)` as the reward."
        )


def _check_source(source: str, label: int | str | None) -> None:
    """Refuses a folder or id that cannot serve, from its `config.json` alone, so that the error comes before any training."""
    config = json.loads(_config_file(source).read_text(encoding="utf-8"))
    architectures = config.get("architectures") or []
    if architectures and not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise ValueError(f"`model`: {source!r} holds a {architectures[0]}, not a model for sequence classification.")
    _check_whole(config.get(PER_TOKEN, False), repr(source))
    names = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}  # transformers leaves its default of two labels out of the file
    _label_index(len(names), {name: int(index) for index, name in names.items()}, label, Path(source).name)


def _config_file(source: str) -> Path:
    """Returns the `config.json` of a folder, or of an id of the hub (from its cache, else downloaded)."""
    folder = Path(source)
    if folder.is_dir():
        refuse_adapter("model", source)
        if not (folder / "config.json").is_file():
            raise ValueError(f"`model`: the folder {source!r} holds no `config.json`; it must be one that `save_pretrained` wrote.")
        return folder / "config.json"
    if folder.exists() or not HUB_ID.fullmatch(source):
        raise ValueError(f"`model` must be a folder with a sequence classifier, or the id of one, got {source!r}, which is no folder.")
    from transformers.utils.hub import cached_file  # without torch, unlike the model classes

    try:
        return Path(str(cached_file(source, "config.json")))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`model`: {source!r} is no folder, and as an id of the hub it cannot be loaded: {reason}") from error


def refuse_adapter(argument: str, source: str) -> None:
    """Raises a `ValueError` for a folder that holds a peft adapter alone."""
    if Path(source, "adapter_config.json").is_file() and not Path(source, "config.json").is_file():
        raise ValueError(
            f"`{argument}`: the folder {source!r} holds an adapter, not a model. Merge it first: load it with peft and save what "
            "`merge_and_unload()` returns, and the tokenizer, in a folder of its own."
        )


def _label_index(count: int, label2id: dict[str, int], label: int | str | None, name: str) -> int:
    """Returns which logit to read."""
    if label is None:
        if count != 1:
            raise ValueError(
                f"reward `{name}`: the classifier has {count} labels ({', '.join(label2id)}), so one of its logits must be chosen: "
                "ClassifierReward(model, label=...)."
            )
        return 0
    index = label2id.get(label, -1) if isinstance(label, str) else label
    if not 0 <= index < count:
        raise ValueError(f"`label` must be one of {list(label2id)} or an index below {count}, got {label!r}.")
    return index


def _filler(model: Any, tokenizer: Any) -> int:
    """Returns an id for the columns after the end, which no score depends on; the tokenizer's pad id if it has one that the model knows."""
    pad = tokenizer.pad_token_id
    return pad if pad is not None and pad < model.config.vocab_size else 0
