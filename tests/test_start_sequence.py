"""A `step_sequence` whose rewards are waited for later is the same `step_sequence`, whatever the rows do meanwhile."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorRewardWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import textgym
from textgym.errors import RewardError
from textgym.kl import AdaptiveKLController
from textgym.rewards import token_level
from textgym.sequences import one_pass, start_sequence
from textgym.wrappers.vector import ClipReward, KLShaping, NormalizeReward

N, T, V, EOS = 4, 5, 12, 1


def paid(completion_ids: list[list[int]], prompts: list[str]) -> list[float]:
    return [len(p) + sum((t + 1) * i for t, i in enumerate(ids)) / 7 for p, ids in zip(prompts, completion_ids, strict=True)]


class Judge:
    """An async reward that answers when it is told to."""

    __name__ = "judge"

    def __init__(self) -> None:
        self.asked = self.cancelled = 0
        self.answers = True

    async def __call__(self, prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        self.asked += 1
        try:
            async with asyncio.timeout(20):
                while not self.answers:
                    await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return paid(completion_ids, prompts)


@token_level
async def each(completion_ids: list[list[int]], **columns: Any) -> list[list[float]]:
    await asyncio.sleep(0.001)
    return [[0.01 * (sum(ids[: t + 1]) % 5) for t in range(len(ids))] for ids in completion_ids]


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")


@pytest.fixture
def judge() -> Judge:
    return Judge()


@pytest.fixture
def make(judge: Judge, sequence_policy: Any, words: Any) -> Any:
    def make(*layers: Any, dense: bool = True, **arguments: Any) -> Any:
        reward = [judge, each] if dense else judge
        envs = gym.make_vec(
            "TextGen-v0", num_envs=N, prompts=["w2 w3 w4", "w5", "w6 w7"], tokenizer=words, reward=reward, max_new_tokens=T, **arguments
        )
        for layer in layers:
            envs = layer(envs)
        return envs

    return make


@pytest.fixture
def shaped(sequence_policy: Any) -> Any:
    return lambda envs: KLShaping(
        envs, sequence_policy(1), sequence_policy(2), beta=AdaptiveKLController(0.3, target=1.0, horizon=100), full_kl=True
    )


def episodes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    actions = rng.integers(0, V, size=(N, T))
    actions[rng.random((N, T)) < 0.15] = EOS
    return actions, rng.integers(1, T + 1, size=N)


def same(one: Any, other: Any) -> None:
    for a, b in zip(one[:-1], other[:-1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.infos == other.infos


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("stack", ["bare", "shaped", "clipped", "shaped and clipped"])
def test_rows_may_go_on_before_the_result_is_asked_for(make: Any, judge: Judge, shaped: Any, stack: str, mode: Any, dense: bool) -> None:
    layers = {
        "bare": [],
        "shaped": [shaped],
        "clipped": [lambda envs: ClipReward(envs, 0.2, 9.0)],
        "shaped and clipped": [shaped, lambda envs: ClipReward(envs, 0.2, 9.0)],
    }[stack]
    plain, started = (make(*layers, dense=dense, autoreset_mode=mode) for _ in range(2))
    assert one_pass(started)
    expected = []
    for turn in range(3):
        plain.reset(seed=turn)
        expected.append(textgym.step_sequence(plain, *episodes(turn)))
    judge.answers = False
    waiting = []
    for turn in range(3):
        started.reset(seed=turn)
        waiting.append(start_sequence(started, *episodes(turn)))
        assert not waiting[-1].is_there
    if stack.startswith("shaped"):
        layer = started if stack == "shaped" else started.env
        layer.controller.update(5.0, 50)  # of episodes to come
    started.reset(seed=3)
    started.step(np.full(N, 3))
    judge.answers = True
    for pending, result in zip(waiting, expected, strict=True):
        same(pending.result(), result)


def test_what_comes_of_an_episode_is_rendered_unless_the_next_has_begun(make: Any, judge: Judge) -> None:
    envs, plain = (make(render_mode="ansi", autoreset_mode=AutoresetMode.DISABLED) for _ in range(2))
    actions, lengths = episodes(0)
    for each_envs in (envs, plain):
        each_envs.reset(seed=0)
    textgym.step_sequence(plain, actions, lengths)
    pending = start_sequence(envs, actions, lengths)
    assert envs.render() != plain.render(), "no reward is known yet"
    pending.result()
    assert envs.render() == plain.render()
    envs.reset(seed=0)
    pending = start_sequence(envs, actions, lengths)
    envs.reset(options={"reset_mask": np.array([True, False, False, True])})
    fresh = envs.render()
    pending.result()
    assert envs.render()[0] == fresh[0] and envs.render()[3] == fresh[3]
    assert envs.render()[1:3] == plain.render()[1:3]


def test_in_human_mode_it_is_waited_for(make: Any, capsys: Any) -> None:
    envs = make(render_mode="human")
    envs.reset(seed=0)
    actions, lengths = np.full((N, T), 3), np.full(N, T)
    assert start_sequence(envs, actions, lengths).is_there
    assert capsys.readouterr().out.count("reward") == N


def test_statistics_are_waited_for(make: Any) -> None:
    """The next episodes are normalised by the returns of these, so there is nothing that could be done meanwhile."""
    envs, plain = (make(NormalizeReward) for _ in range(2))
    for turn in range(3):
        for each_envs in (envs, plain):
            each_envs.reset(seed=turn)
        pending = start_sequence(envs, *episodes(turn))
        assert pending.is_there
        same(pending.result(), textgym.step_sequence(plain, *episodes(turn)))
    assert envs.statistics.count == plain.statistics.count > 0


class Halved(VectorRewardWrapper):
    def rewards(self, rewards: Any) -> Any:
        return rewards / 2


class OwnSequences(ClipReward):
    """Of a user who knows nothing of starting sequences."""

    def step_sequence(self, *args: Any) -> Any:
        result = super().step_sequence(*args)
        return result._replace(rewards=result.rewards + 1)


@pytest.mark.parametrize("layer", [Halved, lambda envs: OwnSequences(envs, 0.2)], ids=["stepped", "own step_sequence"])
def test_layers_that_start_nothing_are_taken_through(make: Any, layer: Any) -> None:
    envs, plain = (make(layer) for _ in range(2))
    for each_envs in (envs, plain):
        each_envs.reset(seed=0)
    pending = start_sequence(envs, *episodes(0))
    assert pending.is_there
    same(pending.result(), textgym.step_sequence(plain, *episodes(0)))


def test_a_step_sequence_of_the_object_itself_is_heard(make: Any) -> None:
    envs = make()
    calls, own = [], envs.step_sequence
    envs.step_sequence = lambda *args: calls.append(args) or own(*args)
    envs.reset(seed=0)
    start_sequence(envs, *episodes(0)).result()
    assert len(calls) == 1


def test_plain_rewards_are_there_at_once(make: Any, words: Any) -> None:
    envs = gym.make_vec("TextGen-v0", num_envs=N, prompts=["w2"], tokenizer=words, reward=paid, max_new_tokens=T)
    envs.reset(seed=0)
    assert start_sequence(envs, *episodes(0)).is_there


def test_rewards_are_on_their_way_while_the_reference_scores(make: Any, judge: Judge, sequence_policy: Any) -> None:
    """The judge answers only once the reference has been asked: had it been waited for before, this would not end."""
    judge.answers = False
    policy = sequence_policy(1)
    scored = policy.paired_sequence_log_probs

    def noting(*args: Any) -> Any:
        judge.answers = True
        return scored(*args)

    policy.paired_sequence_log_probs = noting
    envs = make(lambda envs: KLShaping(envs, policy, sequence_policy(2), beta=0.3))
    envs.reset(seed=0)
    textgym.step_sequence(envs, *episodes(0))
    assert judge.asked == 1


def test_a_policy_that_fails_leaves_no_reward_running(make: Any, judge: Judge, sequence_policy: Any) -> None:
    judge.answers = False
    policy = sequence_policy(1)

    def broken(*args: Any) -> Any:
        wait_for(lambda: judge.asked)
        raise FloatingPointError("no numbers")

    policy.paired_sequence_log_probs = broken
    envs = make(lambda envs: KLShaping(envs, policy, sequence_policy(2), beta=0.3))
    envs.reset(seed=0)
    with pytest.raises(FloatingPointError):
        start_sequence(envs, *episodes(0))
    wait_for(lambda: judge.cancelled)
    assert (judge.asked, judge.cancelled) == (1, 1)


def wait_for(condition: Callable[[], int]) -> None:
    """Until it holds, or 20 seconds."""
    for _ in range(20_000):
        if condition():
            return
        time.sleep(0.001)


def test_a_wrong_answer_is_an_error_when_the_result_is_asked_for(words: Any) -> None:
    async def short(completions: list[str], **columns: Any) -> list[float]:
        return [0.0]

    envs = gym.make_vec("TextGen-v0", num_envs=N, prompts=["w2"], tokenizer=words, reward=short, max_new_tokens=T)
    envs.reset(seed=0)
    pending = start_sequence(envs, np.full((N, T), 3), np.full(N, T))
    with pytest.raises(RewardError, match="`short` returned 1 values for 4 completions"):
        pending.result()
