"""The walk itself: what it refuses, when it is one pass, what it leaves behind, and stepping by hand inside it."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import textgym
from textgym.envs.text_gen_vector import TextGenVectorEnv
from textgym.sequences import SequenceWalk, one_pass, step_sequence
from textgym.wrappers.vector import KLShaping

N, T, V = 3, 4, 8
MODES = list(AutoresetMode)
TWOS = np.full((N, T), 2)


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")
    return {"prompts": ["w2 w3", "w5"], "tokenizer": fast, "reward": lambda completions, **_: [1.0] * len(completions), "max_new_tokens": T}


@pytest.fixture
def envs(arguments: Any) -> Any:
    made = gym.make_vec("TextGen-v0", num_envs=N, **arguments)
    made.reset(seed=0)
    return made


@pytest.fixture
def sync(arguments: Any) -> Any:
    made = SyncVectorEnv([lambda: gym.make("TextGen-v0", **arguments)] * N)
    made.reset(seed=0)
    return made


# --- What is refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "lengths", "message"),
    [
        (np.full((N + 1, T), 2), np.full(N, 1), r"`actions` must be integers of shape .*\(3, T\)"),
        (np.full(N, 2), np.full(N, 1), "`actions` must be integers of shape"),
        (np.full((N, T), 2.0), np.full(N, 1), "`actions` must be integers .* got float64"),
        (np.full((N, 0), 2), np.full(N, 1), "`actions` must be integers of shape"),
        (TWOS, np.full(N + 1, 1), "`lengths` must be integers of shape"),
        (TWOS, np.full(N, 1.0), "`lengths` must be integers of shape"),
        (TWOS, np.array([1, 0, 1]), r"`lengths` must be from 1 to T = 4.* got 0 in row 1"),
        (TWOS, np.array([1, 1, 5]), r"`lengths` must be from 1 to T = 4.* got 5 in row 2"),
        (np.where(np.arange(T) == 1, V, TWOS), np.array([1, 2, 1]), r"token ids from 0 to 7, got 8 \(row 1, token 1\)"),
        (np.where(np.arange(T) == 0, -1, TWOS), np.full(N, 1), "token ids from 0 to 7, got -1"),
    ],
)
def test_bad_arguments(envs: Any, sync: Any, actions: Any, lengths: Any, message: str) -> None:
    for one in (envs, sync):
        with pytest.raises(ValueError, match=message):
            textgym.step_sequence(one, actions, lengths)
        assert np.all(one.fresh if one is envs else one.get_attr("fresh")), "it was stepped before it was checked"


def test_fillers_may_be_anything(envs: Any) -> None:
    result = textgym.step_sequence(envs, np.where(np.arange(T) < 2, TWOS, -100), np.full(N, 2))
    assert result.lengths_used.tolist() == [2] * N


def test_log_probs_have_the_shape_of_actions(envs: Any) -> None:
    with pytest.raises(ValueError, match="`log_probs` must have the shape of `actions`"):
        textgym.step_sequence(envs, TWOS, np.full(N, 1), np.zeros((N, T - 1)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_rows_must_be_fresh(envs: Any, sync: Any, tabular_policy: Any, wrapped: bool) -> None:
    for base in (envs, sync):
        one = KLShaping(base, tabular_policy(1, V), tabular_policy(2, V)) if wrapped else base
        one.reset(seed=0)
        one.step(np.full(N, 2))
        with pytest.raises(ValueError, match="freshly reset"):
            textgym.step_sequence(one, TWOS, np.full(N, 1))
        with pytest.raises(ValueError, match="freshly reset"):
            SequenceWalk(one)
        one.reset(options={"reset_mask": np.array([True, True, False])})
        with pytest.raises(ValueError, match="freshly reset"):
            textgym.step_sequence(one, TWOS, np.full(N, 1))
        one.reset()
        textgym.step_sequence(one, TWOS, np.full(N, 1))


def test_never_reset(arguments: Any) -> None:
    with pytest.raises(ValueError, match="reset"):
        textgym.step_sequence(gym.make_vec("TextGen-v0", num_envs=N, **arguments), TWOS, np.full(N, 1))


def test_other_things_than_vector_environments(arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"`envs` must be .*SyncVectorEnv\(\[lambda: env\]\)"):
        textgym.step_sequence(gym.make("TextGen-v0", **arguments), TWOS, np.full(N, 1))
    with pytest.raises(ValueError, match=r"`envs` must be .* got list"):
        textgym.step_sequence([], TWOS, np.full(N, 1))
    cartpole = gym.make_vec("Pendulum-v1", num_envs=N, vectorization_mode="sync")
    cartpole.reset(seed=0)
    with pytest.raises(ValueError, match="`Discrete` action space"):
        textgym.step_sequence(cartpole, TWOS, np.full(N, 1))


# --- One pass or not ------------------------------------------------------------------------------------------------------------


class Passing(VectorWrapper):
    """A user's wrapper that changes nothing it has defined."""


class Shaped(KLShaping):
    """A user's subclass that changes nothing about stepping."""


class SteppedShaped(KLShaping):
    def step(self, actions: Any) -> Any:
        observations, rewards, *rest = super().step(actions)
        return observations, rewards + 1.0, *rest


class SteppedEnv(TextGenVectorEnv):
    def step(self, actions: Any) -> Any:
        observations, rewards, *rest = super().step(actions)
        return observations, rewards + 1.0, *rest


class ResetShaped(KLShaping):
    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)


def test_one_pass(envs: Any, sync: Any, arguments: Any, tabular_policy: Any) -> None:
    policies = tabular_policy(1, V), tabular_policy(2, V)
    assert one_pass(envs) and one_pass(KLShaping(envs)) and one_pass(Shaped(envs))
    for other in (sync, KLShaping(sync), Passing(envs), Passing(KLShaping(envs)), SteppedShaped(envs), ResetShaped(envs)):
        assert not one_pass(other)
    assert not one_pass(SteppedEnv(N, **arguments)) and not one_pass(KLShaping(SteppedEnv(N, **arguments)))
    rewarded = [
        textgym.step_sequence(made, TWOS, np.full(N, 3)).rewards
        for made in (KLShaping(envs, *policies), SteppedShaped(envs, *policies), KLShaping(SteppedEnv(N, **arguments), *policies))
        if made.reset(seed=0)
    ]
    for changed in rewarded[1:]:
        np.testing.assert_allclose(changed[:, :3], rewarded[0][:, :3] + 1.0, rtol=1e-5)
        assert not changed[:, 3:].any()


def test_a_patched_step_is_honoured(envs: Any) -> None:
    calls = []
    original = envs.step
    envs.step = lambda actions: calls.append(1) or original(actions)
    assert not one_pass(envs)
    textgym.step_sequence(envs, TWOS, np.full(N, 3))
    assert len(calls) == 3


def test_calling_a_wrappers_method_directly_is_the_same(envs: Any, sync: Any, tabular_policy: Any) -> None:
    results = []
    for base in (envs, sync):
        for function in (KLShaping.step_sequence, step_sequence):
            shaped = KLShaping(base, tabular_policy(1, V), tabular_policy(2, V))
            shaped.reset(seed=0)
            results.append(function(shaped, TWOS, np.full(N, 3)))
    for result in results[1:]:
        np.testing.assert_allclose(result.rewards, results[0].rewards, rtol=1e-5)
        assert [info["log_ratio"] for info in result.infos] == pytest.approx([info["log_ratio"] for info in results[0].infos])


# --- Acting inside a walk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["native", "sync"])
def test_a_closed_loop(kind: str, mode: AutoresetMode, arguments: Any) -> None:
    envs = (
        gym.make_vec("TextGen-v0", num_envs=N, autoreset_mode=mode, **arguments)
        if kind == "native"
        else SyncVectorEnv([lambda: gym.make("TextGen-v0", **arguments)] * N, autoreset_mode=mode)
    )
    envs.reset(options={"prompt_index": 0})
    with SequenceWalk(envs) as walk:
        seen, active = walk.step([1, 3, 3])
        assert active.tolist() == [False, True, True] and walk.last_rewards.tolist() == [1.0, 0.0, 0.0]
        assert walk.infos[0]["finish_reason"] == "eos" and walk.infos[1] == {}
        walk.stop(np.array([False, False, True]))
        seen, active = walk.step([5, 4, 5])
        assert active.tolist() == [False, True, False]
        assert seen["input_ids"][:, :4].tolist() == [[2, 3, 1, 1], [2, 3, 3, 4], [2, 3, 3, 3]] or (
            seen["attention_mask"].sum(1).tolist() == [3, 4, 3]
        )
        for token in (5, 6):
            seen, active = walk.step([0, token, 0])
        assert not active.any() and seen["input_ids"][1].tolist() == [2, 3, 3, 4, 5, 6]
        result = walk.result()
    assert result.lengths_used.tolist() == [1, 4, 1] and result.terminated.tolist() == [True, True, False]
    assert result.rewards.shape == (N, 4) and result.rewards.sum(1).tolist() == [1.0, 1.0, 0.0]
    assert [info.get("finish_reason") for info in result.infos] == ["eos", "length", None]
    envs.reset(seed=1)
    envs.step(np.full(N, 2))


def test_a_dropped_plan_ends_no_rows(envs: Any) -> None:
    with SequenceWalk(envs) as walk:
        walk.prime(TWOS, np.array([1, 2, 3]))
        assert walk.step([2, 2, 2])[1].tolist() == [False, True, True]
        walk.drop_plan()
        for _ in range(2):
            assert walk.step([2, 2, 2])[1].tolist() == [False, True, True]
        assert walk.result().lengths_used.tolist() == [1, 3, 3]


def test_stop_needs_a_step(envs: Any) -> None:
    with SequenceWalk(envs) as walk, pytest.raises(ValueError, match="`stop` needs a step"):
        walk.stop(np.ones(N, dtype=bool))


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_an_error_inside_a_walk_leaves_nothing_behind(kind: str, envs: Any, sync: Any) -> None:
    one = envs if kind == "native" else sync
    rows = None if kind == "native" else list(sync.envs)
    with pytest.raises(ValueError, match=r"`actions?`"), SequenceWalk(one) as walk:
        walk.step([2, 1, 2])
        walk.step([2, 2, 99])
    assert rows is None or sync.envs == rows
    one.reset(seed=1)
    _, _, terminated, *_ = one.step(np.full(N, 1))
    assert terminated.all()
    one.step(np.full(N, 2))
    assert (one.fresh if kind == "native" else np.array(one.get_attr("fresh"))).all(), "autoreset does not work any more"


def test_an_interrupt_comes_through_although_workers_are_gone(arguments: Any) -> None:
    envs = AsyncVectorEnv([lambda: gym.make("TextGen-v0", **arguments)] * N)
    envs.reset(seed=0)
    with pytest.raises(KeyboardInterrupt), SequenceWalk(envs) as walk:
        walk.step(np.full(N, 2))
        for process in envs.processes:
            process.kill()
            process.join()
        raise KeyboardInterrupt
    envs.closed = True  # there is nothing left to close


# --- Other people's vector environments -----------------------------------------------------------------------------------------


class Counter(VectorEnv):
    """A batched environment that cannot hold rows. It pays step counts, terminates rows 0, 1 after 1, 3 steps, cuts row 2 after 2."""

    def __init__(self, mode: AutoresetMode) -> None:
        self.num_envs, self.metadata = N, {"autoreset_mode": mode}
        self.single_action_space, self.single_observation_space = gym.spaces.Discrete(V), gym.spaces.Box(0, 99, (1,))
        self.steps = np.zeros(N)

    def reset(self, **kwargs: Any) -> Any:
        self.steps[:] = 0
        return self.steps[:, None].copy(), {}

    def step(self, actions: Any) -> Any:
        self.steps += 1
        over = self.steps >= np.array([1, 3, 2])
        cut = over & (np.arange(N) == 2)
        rewards, final, infos = self.steps.copy(), self.steps[:, None].copy(), {}
        if self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and over.any():
            for i in np.flatnonzero(over):
                infos = self._add_info(infos, {"final_obs": final[i], "final_info": {"steps": float(rewards[i])}, "new": True}, i)
        self.steps[over] = 0
        return self.steps[:, None].copy(), rewards, over & ~cut, cut, infos


def test_an_environment_that_cannot_hold_rows() -> None:
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        envs = Counter(mode)
        envs.reset()
        result = textgym.step_sequence(envs, TWOS, np.array([4, 4, 1]))
        assert result.rewards.tolist() == [[1, 0, 0, 0], [1, 2, 3, 0], [1, 0, 0, 0]]
        assert result.terminated.tolist() == [True, True, False] and result.lengths_used.tolist() == [1, 3, 1]
        assert not result.truncated.any(), "row 2 was cut by the environment only after its part of the walk"
    assert result.infos == [{"steps": 1.0}, {"steps": 3.0}, {}]
    envs.reset()
    result = textgym.step_sequence(envs, TWOS, np.array([4, 4, 4]))
    assert result.truncated.tolist() == [False, False, True] and result.lengths_used.tolist() == [1, 3, 2]
    envs.reset()
    with SequenceWalk(envs) as walk:
        observations, _ = walk.step([2, 2, 2])
    assert observations.tolist() == [[1.0], [1.0], [1.0]], "row 0's last observation, not its next episode's first"
    with pytest.raises(ValueError, match=r"`DISABLED` cannot be walked.*hold_rows"):
        textgym.step_sequence(Counter(AutoresetMode.DISABLED), TWOS, np.full(N, 4))
