"""BERTScore (Zhang et al. 2020, arXiv:1904.09675) with any encoder of transformers. Torch is imported when the reward first scores.

An implementation of its own, equal to the package bert-score where that works: the package fails on empty completions under
transformers 5, lets a score depend on the padding of its batch (a negative similarity becomes 0 beside a longer text) and loads few kinds
of models.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from textgym.alignment import aligned
from textgym.rewards.classifier import without_progress_bars
from textgym.rewards.model_trials import batches, readable, try_reading
from textgym.rewards.references import ReferenceReward
from textgym.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch

BertScoreFigure = Literal["f1", "precision", "recall"]


class BertScoreReward(ReferenceReward):
    """Greedy matching of the token embeddings of completion and reference by their cosine.

        P = 1/|y| Σ_i max_j cos(y_i, x_j),   R = 1/|x| Σ_j max_i cos(y_i, x_j),   F1 = 2 P R / (P + R)

    The averages leave out the encoder's special tokens, the maxima do not, as in the package bert-score (without idf weights and without
    rescaling). Of several references the one with the best figure counts. An empty text on either side gets 0, and F1 is 0 where
    P + R is not positive.

    Args:
        model: a folder or hub id of an encoder for `AutoModel`, or such a model.
        column: the column with the references; see `ReferenceReward`.
        tokenizer: its tokenizer, or a folder or id of one; by default the one that lies beside the model.
        layer: which hidden layer's embeddings, 0 for the input embeddings, -1 for the last. bert-score's table of best layers is a good
            guide: 9 of bert-base, 17 of roberta-large.
        figure: `"f1"`, `"precision"` or `"recall"`.
        batch_size: texts per forward pass.
        max_length: longest text in tokens; by default the smallest of what the tokenizer, the configuration and the model's table of
            positions (tried when it is loaded) allow. The end of a longer text is cut off.
        device: where the model runs. `"auto"`: a GPU if there is one, for a model loaded from a path; where it is, for a given model.

    Raises:
        ValueError: an argument breaks these rules, or the model cannot be loaded.
    """

    def __init__(
        self,
        model: Any,
        column: str | None = None,
        *,
        tokenizer: Any = None,
        layer: int = -1,
        figure: BertScoreFigure = "f1",
        batch_size: int = 64,
        max_length: int | None = None,
        device: Any = "auto",
    ) -> None:
        super().__init__("bert-score", column)
        if figure not in get_args(BertScoreFigure):
            raise ValueError(f"`figure` must be one of {', '.join(get_args(BertScoreFigure))}, got {figure!r}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if not isinstance(model, str | os.PathLike) and not hasattr(model, "forward"):
            raise ValueError(f"`model` must be a folder or id of an encoder, or a transformers model, got {type(model).__name__}.")
        self.layer, self.figure, self.batch_size, self.max_length, self.device = layer, figure, batch_size, max_length, device
        self._source = os.fspath(model) if isinstance(model, str | os.PathLike) else None
        self._model: Any = None if self._source is not None else model
        self._tokenizer = tokenizer
        self._ready = False

    def __getstate__(self) -> dict[str, Any]:
        """A model that came from a path is read again where the pickle is opened."""
        reloaded = {"_model": None, "_ready": False} if self._source is not None else {}
        return {**self.__dict__, **reloaded}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns itself: Gymnasium copies the arguments of an environment several times, and a model is large."""
        return self

    def scores(self, texts: list[str], references: list[list[str]]) -> list[float]:
        """Returns the chosen figure of each text."""
        self._load()
        distinct = list(dict.fromkeys([*texts, *(reference for own in references for reference in own)]))
        embedded = dict(zip(distinct, self._embed(distinct), strict=True))
        return [
            max(_matched(*embedded[text], *embedded[reference])[self.figure] for reference in own)
            for text, own in zip(texts, references, strict=True)
        ]

    def _load(self) -> None:
        if self._ready:
            return
        import torch
        from transformers import AutoModel

        tokenizer = self._tokenizer
        try:
            if self._source is not None:
                with without_progress_bars():
                    self._model = AutoModel.from_pretrained(self._source)
            if tokenizer is None:
                tokenizer = self._source or self._model.config.name_or_path
            if not isinstance(tokenizer, str | os.PathLike) or os.fspath(tokenizer):
                tokenizer = load_tokenizer(tokenizer)
            else:
                raise ValueError("the model does not say where it was loaded from; give its `tokenizer`")
        except (OSError, ValueError) as error:
            raise ValueError(f"reward `{self.__name__}`: cannot load the encoder or its tokenizer: {error}") from error
        device = self.device
        if device == "auto" and self._source is not None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device != "auto":
            self._model = self._model.to(device)
        layers = self._model.config.num_hidden_layers
        if not -layers - 1 <= self.layer <= layers:
            raise ValueError(f"`layer` must be from {-layers - 1} to {layers}, the layers of this encoder, got {self.layer}.")
        aligned(self._model).eval()
        self._tokenizer = tokenizer
        limit, self._batching = try_reading(self._model, self._forward, f"reward `{self.__name__}`", tokenizer, self.max_length)
        self._limit = limit or int(1e9)
        self._ready = True

    def _embed(self, texts: list[str]) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """Returns per text its tokens' unit vectors (T, H) in float32 and (T,) bool, True on tokens that are not special."""
        import torch

        encoded = [self._encode(text) for text in texts]
        result: list[tuple[torch.Tensor, torch.Tensor]] = [(torch.zeros(0, 1), torch.zeros(0, dtype=torch.bool))] * len(texts)
        filled = [i for i, (ids, _) in enumerate(encoded) if ids]
        with readable(f"reward `{self.__name__}`", self._model):
            for places in batches([len(encoded[i][0]) for i in filled], self.batch_size, self._batching):
                batch = [filled[place] for place in places]
                for i, vectors in zip(batch, self._forward([encoded[i][0] for i in batch]), strict=True):
                    result[i] = vectors, torch.tensor(encoded[i][1], dtype=torch.bool)
        return result

    def _encode(self, text: str) -> tuple[list[int], list[bool]]:
        """Returns the ids of a text with the tokenizer's special tokens, and which of them are its own."""
        kept = self._tokenizer(text.strip(), truncation=True, max_length=self._limit, return_special_tokens_mask=True)
        return list(kept["input_ids"]), [not special for special in kept["special_tokens_mask"]]

    def _forward(self, rows: Sequence[Sequence[int]]) -> "list[torch.Tensor]":
        """Returns the unit vectors of the tokens of each row."""
        import torch

        lengths = torch.tensor([len(row) for row in rows])
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.full((len(rows), int(lengths.max())), pad)  # (B, L), right-padded
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        device = self._model.device
        with torch.no_grad():
            hidden = self._model(ids.to(device), attention_mask=mask.to(device), output_hidden_states=True).hidden_states[self.layer]
        units = torch.nn.functional.normalize(hidden.float(), dim=-1).cpu()
        return [units[i, : len(row)] for i, row in enumerate(rows)]


def _matched(
    vectors: "torch.Tensor", own: "torch.Tensor", reference_vectors: "torch.Tensor", reference_own: "torch.Tensor"
) -> dict[str, float]:
    """Returns the three figures of one completion and one reference.

    Args:
        vectors: unit vectors of the completion's tokens, (T, H).
        own: which tokens are no special ones, (T,).
        reference_vectors: those of the reference, (R, H).
        reference_own: likewise, (R,).
    """
    if not own.any() or not reference_own.any():
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    cosines = vectors @ reference_vectors.T  # (T, R)
    precision = float(cosines.max(dim=1).values[own].mean())
    recall = float(cosines.max(dim=0).values[reference_own].mean())
    total = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / total if total > 0 else 0.0}
