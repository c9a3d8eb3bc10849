"""Sequence classifiers of transformers as reward models: a fresh head on a language model's trunk, a pad token, a constant added."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from textgym.agents.common.backbone import without_peft
from textgym.agents.common.checks import check_count
from textgym.rewards.classifier import OFFSET, has_score_head, head_scores, hidden_states, right_padded
from textgym.rewards.model_trials import Reading, try_reading

PAD = "<|pad|>"
_PROBE_LENGTH = 4


def fresh_classifier(language_model: nn.Module, num_outputs: int | None, output_names: Sequence[str] | None, seed: int) -> Any:
    """Returns a classifier with a copy of a language model's trunk and a fresh head, see `classifier_on_trunk`, whose outputs have names.

    Args:
        language_model: a transformers causal LM, or a peft model around one.
        num_outputs: scores per text; None for as many as there are names, or one.
        output_names: their names; None for those of transformers.
        seed: of the head.

    Raises:
        ValueError: the names are not as many as the outputs, or not different.
    """
    count = num_outputs if num_outputs is not None else 1 if output_names is None else len(output_names)
    check_count("num_outputs", count, "outputs")
    if output_names is not None and (len(output_names) != count or len(set(output_names)) != count):
        raise ValueError(f"`output_names` must be {count} different names, one per output, got {list(output_names)}.")
    model = classifier_on_trunk(language_model, count, seed)
    if output_names is not None:
        model.config.id2label = dict(enumerate(output_names))
        model.config.label2id = {name: index for index, name in enumerate(output_names)}
    return model


def classifier_on_trunk(language_model: nn.Module, num_outputs: int, seed: int) -> PreTrainedModel:
    """Returns a classifier with a copy of a causal language model's trunk (adapters merged into it) and a fresh linear head.

    The head's weights are N(0, 1/(H + 1)) (Ziegler et al. 2019, arXiv:1909.08593), so that scores begin with a variance near 1.

    Args:
        language_model: a transformers causal LM, or a peft model around one.
        num_outputs: scores per text.
        seed: of the head; torch's global generator is left alone.

    Raises:
        ValueError: transformers has no classifier of this architecture, or one whose head cannot be applied to a hidden state.
    """
    base = without_peft(language_model)
    if base is not language_model:
        merged: Any = copy.deepcopy(language_model)
        base = merged.merge_and_unload()
    config = copy.deepcopy(base.config)
    config.num_labels = num_outputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            classifier: Any = AutoModelForSequenceClassification.from_config(config, dtype=base.dtype)
        except ValueError as error:
            raise ValueError(
                f"`policy` must be of an architecture that transformers has a sequence classifier for, got {config.model_type!r}."
            ) from error
        check_score_head(classifier)
        nn.init.normal_(classifier.score.weight, std=(classifier.score.in_features + 1) ** -0.5)
        if classifier.score.bias is not None:
            nn.init.zeros_(classifier.score.bias)
    classifier.base_model.load_state_dict(base.base_model.state_dict())
    placed: PreTrainedModel = classifier.to(base.device).eval()
    return placed


def check_score_head(model: Any) -> None:
    """Raises a `ValueError` unless `model` is a decoder with a linear head called `score`."""
    if not has_score_head(model) or not isinstance(model.score, nn.Linear):
        raise ValueError(
            "`model` must be a decoder for sequence classification with a linear head called `score` (GPT-2, Llama, Qwen, GPT-NeoX, ...), "
            f"got {type(model).__name__}."
        )


def with_own_pad_token(model: Any, tokenizer: Any) -> Any:
    """Gives a model and a copy of its tokenizer a pad token that no text ends with; returns the copy.

    transformers' classifiers read the score at the last token that is not the pad token. Where EOS (or the unknown token) is the pad
    token, that is not the last token of a text which ends in it, so a pad token of its own is added, which takes a new row of the
    embedding unless there is a spare one. The copy pads on the right: a left-padded GPT-2 counts its positions wrongly unless it is told.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    rows = model.get_input_embeddings().weight.shape[0]
    others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "unk", "sep", "cls", "mask")}
    ends = model.config.get_text_config().eos_token_id
    others |= set(ends) if isinstance(ends, list) else {ends}
    pad = tokenizer.pad_token_id
    if pad is None or pad in others or pad >= rows:
        name = PAD
        while name in tokenizer.get_vocab():
            name = f"<{name}>"
        tokenizer.add_special_tokens({"pad_token": name})
        pad = tokenizer.pad_token_id
        if pad >= rows:
            _add_rows(model, pad + 1)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
    return tokenizer


def _add_rows(model: Any, rows: int) -> None:
    """Adds rows of zeros to the embedding."""
    known = model.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        # transformers warns of a size that tensor cores do not like, for the sake of an output layer that a classifier has not.
        model.resize_token_embeddings(rows, pad_to_multiple_of=1, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[known:] = 0


def try_states(model: Any, tokenizer: Any, name: str) -> Reading:
    """Returns how a decoder reads texts by its hidden states, see `try_reading`."""

    def read(rows: Sequence[Sequence[int]]) -> list[Tensor]:
        states = hidden_states(model.eval(), *right_padded(rows, tokenizer.pad_token_id, model.device))
        return [states[place, : len(row)] for place, row in enumerate(rows)]

    return try_reading(model, read, name, tokenizer)


@torch.no_grad()
def scale_scores(model: Any, factors: Tensor) -> None:
    """Multiplies every output of the head by its factor, (C,)."""
    factors = factors.to(model.score.weight)
    model.score.weight.mul_(factors[:, None])
    if model.score.bias is not None:
        model.score.bias.mul_(factors)
    offset = getattr(model.config, OFFSET, None)
    if offset is not None:
        setattr(model.config, OFFSET, (factors.cpu() * torch.tensor(offset)).tolist())


@torch.no_grad()
def shift_scores(model: Any, amounts: Tensor) -> bool:
    """Adds a constant to every output of the head, (C,).

    It goes into the head's bias, or, as transformers' heads have none, into the bias of the layer norm before the head, moved along the
    head's rows. A model without either (Llama and others with an RMS norm) has no parameter that adds a constant: there it is written
    into the configuration, as `reward_offset`, which textgym adds to the scores and transformers does not.

    Returns:
        Whether transformers' own logits have the constant too.
    """
    if model.score.bias is not None:
        model.score.bias.add_(amounts.to(model.score.bias))
        return True
    step = torch.linalg.pinv(model.score.weight.double()) @ amounts.to(model.score.weight.device).double()  # (H,)
    for norm in _final_norms(model):
        before, bias = _probe(model), norm.bias.clone()
        norm.bias.add_(step.to(bias))
        if torch.allclose(_probe(model), before + amounts.to(before), rtol=1e-4, atol=1e-4):
            return True
        norm.bias.copy_(bias)
    offset = torch.tensor(getattr(model.config, OFFSET, None) or [0.0] * len(amounts)) + amounts.float().cpu()
    setattr(model.config, OFFSET, offset.tolist())
    return False


def _final_norms(model: Any) -> Iterator[nn.LayerNorm]:
    """The layer norms with a bias that stand outside the blocks."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.LayerNorm) and module.bias is not None and not any(part.isdigit() for part in name.split(".")):
            yield module


def _probe(model: Any) -> Tensor:
    """The scores of a few tokens, float32."""
    ids = torch.arange(_PROBE_LENGTH, device=model.device)[None] % model.config.get_text_config().vocab_size
    return head_scores(model, hidden_states(model, ids, ids.new_tensor([_PROBE_LENGTH]))).float()
