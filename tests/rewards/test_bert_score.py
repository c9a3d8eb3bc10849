"""BERTScore: greedy matching on vectors by hand, equality with the package bert-score, independence of the batch."""

import pickle

import pytest
import torch

from textgym.rewards import BertScoreReward
from textgym.rewards.bert_score import _matched

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "cat", "sat", "on", "mat", "a", "dog", "film", "was", "good", "bad", "very"]
COMPLETIONS = ["the cat sat", "a dog sat on the mat", "film", "very very very very good film was bad"]
REFERENCES = ["a dog sat on the mat", "the cat", "the film was good", "bad"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random BERT of three layers with a vocabulary of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", model_max_length=16
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, initializer_range=1.0
    )
    path = tmp_path_factory.mktemp("encoder")
    BertModel(config).save_pretrained(path)
    fast.save_pretrained(path)
    return path


def test_greedy_matching_by_hand():
    """Completion e1, e2 and a special token; reference (0.6, 0.8), -e1 and a special token e2."""
    e1, e2 = [1.0, 0.0], [0.0, 1.0]
    ours, theirs = torch.tensor([e1, e2, e2]), torch.tensor([[0.6, 0.8], [-1.0, 0.0], e2])
    special = torch.tensor([True, True, False])
    scores = _matched(ours, special, theirs, special)
    # e1 finds 0.6; e2 finds the special e2, 1. (0.6, 0.8) finds 0.8; -e1 finds 0 (at e2), not -1.
    assert scores["precision"] == pytest.approx((0.6 + 1.0) / 2)
    assert scores["recall"] == pytest.approx((0.8 + 0.0) / 2)
    assert scores["f1"] == pytest.approx(2 * 0.8 * 0.4 / 1.2)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_equal_to_the_package(folder, layer, capsys):
    bert_score = pytest.importorskip("bert_score")
    package = bert_score.BERTScorer(model_type=str(folder), num_layers=layer, device="cpu")
    for completion, reference in zip(COMPLETIONS, REFERENCES, strict=True):  # one at a time: its scores depend on the padding
        expected = [float(figure) for figure in package.score([completion], [reference])]
        for figure, value in zip(("precision", "recall", "f1"), expected, strict=True):
            (score,) = BertScoreReward(folder, layer=layer, figure=figure)(completions=[completion], reference=[reference])
            assert score == pytest.approx(value, abs=1e-5)


def test_scores_do_not_depend_on_the_batch(folder):
    together = BertScoreReward(folder, layer=2)(completions=COMPLETIONS, reference=REFERENCES)
    in_twos = BertScoreReward(folder, layer=2, batch_size=2)
    alone = [in_twos(completions=[text], reference=[reference])[0] for text, reference in zip(COMPLETIONS, REFERENCES, strict=True)]
    assert in_twos(completions=COMPLETIONS, reference=REFERENCES) == pytest.approx(together, abs=1e-5)
    assert alone == pytest.approx(together, abs=1e-5)


def test_the_best_reference_counts_and_empty_texts_get_nothing(folder):
    reward = BertScoreReward(folder)
    assert reward(completions=["the cat", "", "a cat"], references=[["bad", "the cat"], ["bad"], ""]) == pytest.approx([1.0, 0.0, 0.0])
    assert reward(completions=["the cat"], references=[None]) == [None]


def test_long_texts_are_cut_and_models_are_taken_as_they_are(folder):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given, loaded = BertScoreReward(model, tokenizer=tokenizer), BertScoreReward(folder)
    texts = {"completions": ["the cat " * 20], "reference": ["the cat " * 20 + "was bad"]}
    assert given(**texts) == loaded(**texts) == pytest.approx([1.0], abs=1e-5)
    assert pickle.loads(pickle.dumps(loaded))(**texts) == loaded(**texts)


def test_bad_arguments(folder):
    with pytest.raises(ValueError, match="`figure` must be one of f1, precision, recall, got 'f'"):
        BertScoreReward(folder, figure="f")
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        BertScoreReward(folder, batch_size=0)
    with pytest.raises(ValueError, match="`model` must be a folder or id of an encoder"):
        BertScoreReward(3)
    with pytest.raises(ValueError, match="`layer` must be from -4 to 3, the layers of this encoder, got 4"):
        BertScoreReward(folder, layer=4)(completions=["a"], reference=["a"])
    with pytest.raises(ValueError, match="cannot load the encoder"):
        BertScoreReward(folder / "missing")(completions=["a"], reference=["a"])
