"""Texts that a tokenizer does not know are named: prompts, examples, feedback and what is generated from."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import textgym  # noqa: F401
from textgym.agents import DPO, SFT, CausalLMPolicy, RewardModel, RewardModelTrainer
from textgym.bundled import bundled_model_path
from textgym.prompts import PromptSet
from textgym.unknown_tokens import check_known, unknown_token_id

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c"]


def words(**special: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special})


def test_the_id_that_stands_for_what_is_not_known() -> None:
    assert unknown_token_id(words()) == 0
    assert unknown_token_id(words(unk_token=None)) is None
    for shared in ("bos_token", "eos_token", "pad_token"):
        assert unknown_token_id(words(**{shared: "<unk>"})) is None


def check(*rows: list[int], refuse: bool = True) -> list[str]:
    tokens, lengths = np.concatenate([np.array(row) for row in rows]), np.array([len(row) for row in rows])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_known(words(), tokens, lengths, "`texts`", "row {}".format, refuse=refuse)
    return [str(one.message) for one in said]


def test_what_is_said() -> None:
    known = [1, 3, 4, 5, 3]
    assert check(known, known) == []
    assert check([1, 3, 4, 5, 3, 3, 3, 3, 3, 3, 0], known) == []  # 1 of 14 tokens, BOS not counted
    assert check(known, [1, 0, 3], known) == []  # 1 of 10 is not above a tenth
    (said,) = check([1, 3], [1, 0, 3], known)
    assert said.startswith("14% of the tokens of `texts` are unknown") and ": row 1. " in said
    (said,) = check(*[known] * 9, [1, 0])
    assert "3% of the tokens" in said and "and in 1 of 10 texts all: row 9." in said
    (said,) = check(*[[1, 0, 3]] * 8)
    assert "50%" in said and "row 0, row 1, row 2, row 3, row 4, ..." in said
    (said,) = check([1, 0], [0, 0], refuse=False)
    assert "100%" in said
    with pytest.raises(
        ValueError, match=r"`texts` must have tokens that the tokenizer knows, .* \(<unk>\): row 0, row 1\. Give the tokenizer"
    ):
        check([1, 0], [0, 0])


def test_every_entrance_says_it() -> None:
    policy = CausalLMPolicy.from_pretrained(bundled_model_path(), device="cpu")
    with pytest.raises(ValueError, match="`prompts` must have tokens that the tokenizer knows"):
        gym.make("TextGen-v0", prompts=["你好世界"])
    with pytest.warns(UserWarning, match=r"of the tokens of `prompts` .*: row 1 of `prompts`\."):
        PromptSet(["the film was", "xyzzy film"], policy.tokenizer)
    with pytest.warns(UserWarning, match="100% of the tokens of `prompts` .* 'xyzzy quux'"):
        policy.generate(["xyzzy quux"], 1)
    with pytest.warns(UserWarning, match="of the tokens of `examples` .* row 0 of `examples`"):
        SFT(policy, [{"prompt": "the film was", "completion": " xyzzy quux"}])
    with pytest.warns(UserWarning, match="of the tokens of `preferences` .* row 0 of `preferences`"):
        DPO(policy, [{"prompt": "the film was", "chosen": " xyzzy quux", "rejected": " good"}])
    with pytest.warns(UserWarning, match="of the tokens of `feedback` .* record 0 of `feedback`"):
        RewardModelTrainer(RewardModel.from_policy(policy), [{"prompt": "the film was", "chosen": " xyzzy quux", "rejected": " good"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.generate(["the film was"], 1)
        policy.generate([policy.tokenizer("xyzzy")["input_ids"]], 1)  # ids are the user's own
        SFT(policy, [{"prompt_ids": [2], "completion_ids": [2, 0]}])
