from typing import Any

import gymnasium as gym
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import textgym.rewards
from textgym.envs.rendering import prompt_text

END = 1


def constant(completions: list[str], **columns: Any) -> list[float]:
    return [0.5] * len(completions)


@pytest.fixture
def kwargs(tokenizer: Any) -> dict[str, Any]:
    return {"prompts": ["w2 w3", "w4"], "tokenizer": tokenizer, "reward": [constant], "reward_weights": [3.0], "max_new_tokens": 4}


def test_ansi(kwargs: dict[str, Any]) -> None:
    env = gym.make("TextGen-v0", render_mode="ansi", **kwargs)
    env.reset(options={"prompt_index": 0})
    assert env.render() == " prompt | w2 w3\n   text > \n        = 0/4 tokens"
    env.step(5)
    assert env.render() == " prompt | w2 w3\n   text >  w5\n        = 1/4 tokens"
    env.step(END)
    assert env.render() == " prompt | w2 w3\n   text >  w5\n        = 2/4 tokens, ended by eos, reward 1.5 = 3 x 0.5 constant"


def test_ansi_of_rows(kwargs: dict[str, Any]) -> None:
    envs = gym.make_vec("TextGen-v0", num_envs=2, render_mode="ansi", **kwargs)
    envs.reset(options={"prompt_index": [0, 1]})
    envs.step([END, 6])
    assert envs.render() == (
        " prompt | w2 w3\n   text > \n        = 1/4 tokens, ended by eos, reward 1.5 = 3 x 0.5 constant",
        " prompt | w4\n   text >  w6\n        = 1/4 tokens",
    )


def test_long_texts_are_wrapped(kwargs: dict[str, Any]) -> None:
    env = gym.make("TextGen-v0", render_mode="ansi", **{**kwargs, "prompts": [" ".join(["w3"] * 50)]})
    env.reset()
    lines = env.render().splitlines()
    assert [line[:10] for line in lines] == [" prompt | ", "        | ", "   text > ", "        = "]
    assert max(map(len, lines)) <= 100


def test_messages_are_shown_with_their_roles() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert prompt_text(messages) == "system: Be kind.\nuser: Hello"


def test_dense_rewards_are_shown_on_the_way(kwargs: dict[str, Any]) -> None:
    ids = textgym.rewards.token_level(lambda completion_ids, **columns: [[0.25] * len(row) for row in completion_ids])
    env = gym.make("TextGen-v0", render_mode="ansi", **{**kwargs, "reward": [constant, ids], "reward_weights": [3.0, 1.0]})
    env.reset(options={"prompt_index": 1})
    env.step(5)
    env.step(5)
    assert env.render().endswith("= 2/4 tokens, reward so far 0.5")
    env.step(END)
    assert "reward 2.25 = 3 x 0.5 constant + 1 x 0.75" in env.render()


def test_human_types_the_text_as_it_grows(kwargs: dict[str, Any], capsys: Any) -> None:
    env = gym.make("TextGen-v0", render_mode="human", **kwargs)
    env.reset(options={"prompt_index": 0})
    assert capsys.readouterr().out == " prompt | w2 w3\n   text > "
    env.step(5)
    assert capsys.readouterr().out == " w5"
    env.step(6)
    assert capsys.readouterr().out == " w6"
    assert env.render() is None
    env.reset(options={"prompt_index": 1})  # in the middle of an episode
    assert capsys.readouterr().out == "\n prompt | w4\n   text > "
    env.step(END)
    assert capsys.readouterr().out == "\n        = 1/4 tokens, ended by eos, reward 1.5 = 3 x 0.5 constant\n"
    env.reset(options={"prompt_index": 1})
    assert capsys.readouterr().out == " prompt | w4\n   text > "


def test_human_shows_no_half_characters(capsys: Any) -> None:
    words = Tokenizer(models.BPE({**{symbol: i for i, symbol in enumerate(pre_tokenizers.ByteLevel.alphabet())}, "<end>": 256}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    env = gym.make("TextGen-v0", prompts=["a"], tokenizer=tokenizer, reward=constant, render_mode="human", max_new_tokens=4)
    env.reset()
    typed = []
    capsys.readouterr()
    for token in tokenizer("né")["input_ids"]:
        env.step(token)
        typed.append(capsys.readouterr().out)
    assert typed == ["n", "", "é"]


def test_human_types_anew_what_a_decoder_changes(capsys: Any) -> None:
    words = Tokenizer(models.WordLevel({"?": 0, "<end>": 1, "a": 2, "##b": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), decoders.Replace("ab", "c")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    env = gym.make("TextGen-v0", prompts=["a"], tokenizer=tokenizer, reward=constant, render_mode="human", max_new_tokens=4)
    env.reset()
    env.step(2)
    assert capsys.readouterr().out.endswith("text >  a")
    env.step(3)
    assert capsys.readouterr().out == "\n   text >  c"


def test_human_prints_rows_when_they_end(kwargs: dict[str, Any], capsys: Any) -> None:
    envs = gym.make_vec("TextGen-v0", num_envs=2, render_mode="human", **kwargs)
    envs.reset(options={"prompt_index": [0, 1]})
    assert envs.render() is None
    envs.step([5, 5])
    assert capsys.readouterr().out == ""
    envs.step([5, END])
    frame = " prompt | w4\n   text >  w5\n        = 2/4 tokens, ended by eos, reward 1.5 = 3 x 0.5 constant\n"
    assert capsys.readouterr().out == "[1]\n" + frame
