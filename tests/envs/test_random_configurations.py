"""A thousand random environments keep the invariants of the token MDP, and the batched one is the single ones side by side."""

import functools
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textgym.envs.text_gen import TextGenEnv
from textgym.envs.text_gen_vector import TextGenVectorEnv
from textgym.prompts import PromptSet
from textgym.rewards import token_level
from textgym.rewards.compose import RewardSet

STEPS = 7


@dataclass(frozen=True)
class Configuration:
    """What an environment is made of, and a seed for prompts and actions."""

    vocab_size: int
    has_pad: bool
    prompts: list[list[int]]
    room: int
    max_new_tokens: int
    ends: list[int]
    rewards: tuple[str, ...]
    weights: list[float]
    num_envs: int
    mode: AutoresetMode
    limit: int | None
    seed: int


REWARDS: dict[str, Any] = {
    "total": lambda completion_ids, **columns: [float(sum(ids)) for ids in completion_ids],
    "column": lambda completions, value, **columns: [number + len(text) for number, text in zip(value, completions, strict=True)],
    "odd": lambda completion_ids, **columns: [float(len(ids)) if len(ids) % 2 else None for ids in completion_ids],
    "dense": token_level(lambda completion_ids, **columns: [[token / 4 for token in ids] for ids in completion_ids]),
}
for _name, _function in REWARDS.items():
    _function.__name__ = _name


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    vocab_size = draw(st.integers(2, 7))
    tokens = st.integers(0, vocab_size - 1)
    rewards = draw(st.sampled_from([("total",), ("column",), ("total", "odd"), ("dense",), ("dense", "column"), ("dense", "odd")]))
    return Configuration(
        vocab_size=vocab_size,
        has_pad=draw(st.booleans()),
        prompts=draw(st.lists(st.lists(tokens, min_size=1, max_size=4), min_size=1, max_size=3)),
        room=draw(st.integers(0, 2)),
        max_new_tokens=draw(st.integers(1, 5)),
        ends=draw(st.lists(tokens, min_size=1, max_size=2)),
        rewards=rewards,
        weights=draw(st.lists(st.sampled_from([-1.0, 0.5, 2.0]), min_size=len(rewards), max_size=len(rewards))),
        num_envs=draw(st.integers(1, 3)),
        mode=draw(st.sampled_from(list(AutoresetMode))),
        limit=draw(st.none() | st.integers(1, 4)),
        seed=draw(st.integers(0, 2**16)),
    )


@functools.cache
def tokenizer_of(vocab_size: int, has_pad: bool) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **({"pad_token": "w0"} if has_pad else {}))


def arguments_of(configuration: Configuration) -> dict[str, Any]:
    prompts = [{"prompt": " ".join(f"w{i}" for i in ids), "value": 10.0 * i} for i, ids in enumerate(configuration.prompts)]
    tokenizer = tokenizer_of(configuration.vocab_size, configuration.has_pad)
    return {
        "prompts": PromptSet(prompts, tokenizer),
        "tokenizer": tokenizer,
        "reward": RewardSet.build([REWARDS[name] for name in configuration.rewards], configuration.weights),
        "max_prompt_tokens": max(map(len, configuration.prompts)) + configuration.room,
        "max_new_tokens": configuration.max_new_tokens,
        "eos_token_ids": configuration.ends,
    }


def make_single(arguments: dict[str, Any], limit: int | None) -> Any:
    env = TextGenEnv(**arguments)
    return env if limit is None else gym.wrappers.TimeLimit(env, limit)


@dataclass
class Row:
    """What one row should look like, kept in plain lists."""

    prompt: int = 0
    tokens: list[int] = field(default_factory=list)
    over: bool = False


class Model:
    """The token MDP of the specification, written down once more, slowly, for `check` to compare with."""

    def __init__(self, configuration: Configuration, envs: TextGenVectorEnv) -> None:
        self.configuration, self.envs = configuration, envs
        self.rows = [Row() for _ in range(configuration.num_envs)]

    def begin(self, row: int, infos: dict[str, Any]) -> None:
        assert infos["_prompt_index"][row]
        self.rows[row] = Row(prompt=int(infos["prompt_index"][row]))

    def check_observation(self, row: int, ids: Any, mask: Any) -> None:
        prompt, tokens = self.configuration.prompts[self.rows[row].prompt], self.rows[row].tokens
        before = self.envs.max_prompt_tokens - len(prompt)
        after = self.configuration.max_new_tokens - len(tokens)
        assert mask.tolist() == [0] * before + [1] * (len(prompt) + len(tokens)) + [0] * after
        assert ids[before : len(ids) - after].tolist() == prompt + tokens

    def check_observations(self, observations: dict[str, Any]) -> None:
        assert observations in self.envs.observation_space
        for row in range(len(self.rows)):
            self.check_observation(row, observations["input_ids"][row], observations["attention_mask"][row])

    def text(self, row: Row) -> str:
        """The completion's text: that of the whole without that of the prompt."""
        prompt = self.configuration.prompts[row.prompt]
        before, whole = (self.envs.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + row.tokens))
        assert whole.startswith(before)
        return whole[len(before) :]

    def expected_reward(self, row: Row, ended: bool) -> tuple[float, dict[str, float]]:
        """The reward of the last token, and at the end the named parts."""
        reward, parts = 0.0, {}
        text = self.text(row)
        for name, weight in zip(self.configuration.rewards, self.configuration.weights, strict=True):
            if name == "dense":
                reward += weight * row.tokens[-1] / 4
                parts[name] = sum(row.tokens) / 4
            elif ended:
                value = {"total": sum(row.tokens), "column": 10.0 * row.prompt + len(text), "odd": len(row.tokens)}[name]
                if name != "odd" or len(row.tokens) % 2:
                    parts[name] = float(value)
                    reward += weight * value
        return reward, parts if ended else {}

    def step(self, actions: Any, result: Any) -> None:
        """Follows one step and checks what it returned."""
        observations, rewards, terminated, truncated, infos = result
        for i, row in enumerate(self.rows):
            if row.over:  # NEXT_STEP: this step only reset the row
                assert (rewards[i], terminated[i], truncated[i]) == (0.0, False, False)
                self.begin(i, infos)
                continue
            row.tokens.append(int(actions[i]))
            ended = row.tokens[-1] in self.configuration.ends or len(row.tokens) == self.configuration.max_new_tokens
            cut = self.configuration.limit is not None and len(row.tokens) >= self.configuration.limit
            reward, parts = self.expected_reward(row, ended)
            assert (terminated[i], truncated[i]) == (ended, cut)
            assert rewards[i] == pytest.approx(reward)
            row.over = ended or cut
            own = infos
            if row.over and self.configuration.mode == AutoresetMode.SAME_STEP:
                final = infos["final_obs"][i]
                self.check_observation(i, final["input_ids"], final["attention_mask"])
                own = infos["final_info"]
                self.begin(i, infos)
            self.check_info(i, row, ended, parts, own)
        self.check_observations(observations)

    def check_info(self, i: int, row: Row, ended: bool, parts: dict[str, float], infos: dict[str, Any]) -> None:
        assert bool("_rewards" in infos and infos["_rewards"][i]) == ended
        if not ended:
            return
        assert infos["completion_ids"][i] == row.tokens
        assert infos["prompt"][i] == " ".join(f"w{token}" for token in self.configuration.prompts[row.prompt])
        assert infos["completion"][i] == self.text(row)
        assert infos["finish_reason"][i] == ("eos" if row.tokens[-1] in self.configuration.ends else "length")
        rewards = infos["rewards"]
        assert {name for name in self.configuration.rewards if name in rewards and rewards[f"_{name}"][i]} == parts.keys()
        assert {name: rewards[name][i] for name in parts} == pytest.approx(parts)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(configurations())
def test_invariants(assert_equal: Any, configuration: Configuration) -> None:
    num_envs, mode, limit, arguments = configuration.num_envs, configuration.mode, configuration.limit, arguments_of(configuration)
    native = TextGenVectorEnv(num_envs, autoreset_mode=mode, max_episode_steps=limit, **arguments)
    sync = SyncVectorEnv([lambda: make_single(arguments, limit)] * num_envs, autoreset_mode=mode)
    model = Model(configuration, native)
    result = native.reset(seed=configuration.seed)
    assert_equal(result, sync.reset(seed=configuration.seed))
    for row in range(configuration.num_envs):
        model.begin(row, result[1])
    model.check_observations(result[0])
    rng = np.random.default_rng(configuration.seed)
    for _ in range(STEPS):
        actions = rng.integers(0, configuration.vocab_size, configuration.num_envs)
        stepped = native.step(actions)
        assert_equal(stepped, sync.step(actions))
        model.step(actions, stepped)
        over = np.array([row.over for row in model.rows])
        if configuration.mode == AutoresetMode.DISABLED and over.any():
            again = native.reset(options={"reset_mask": over})
            assert_equal(again, sync.reset(options={"reset_mask": over}))
            for row in np.flatnonzero(over):
                model.begin(int(row), again[1])
            model.check_observations(again[0])
