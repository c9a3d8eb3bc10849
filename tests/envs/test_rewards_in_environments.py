from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import textgym.rewards
from textgym.rewards import FineGrainedReward, Objective, TokenCount, segment_level, token_level
from textgym.rewards.compose import RewardSet
from textgym.vector_infos import row_info

END = 1
NUM_ENVS = 4


@token_level
def ids_so_far(completion_ids: list[list[int]], **columns: Any) -> list[list[float]]:
    return [[0.5 * token for token in ids] for ids in completion_ids]


@segment_level(textgym.rewards.segmenters.TokenCount(2))
def every_second(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def final(completions: list[str], **columns: Any) -> list[float]:
    return [100.0] * len(completions)


def sometimes(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    return [None if len(ids) % 2 else float(len(ids)) for ids in completion_ids]


def make(envs_or_not: str, reward: Any, tokenizer: Any, **kwargs: Any) -> Any:
    arguments = {"prompts": ["w2 w3", "w4"], "tokenizer": tokenizer, "reward": reward, "max_new_tokens": 4, **kwargs}
    if envs_or_not == "single":
        return gym.make("TextGen-v0", **arguments)
    return gym.make_vec("TextGen-v0", num_envs=NUM_ENVS, vectorization_mode=envs_or_not, **arguments)


def test_one_call_for_all_rows_that_end_in_a_step(tokenizer: Any) -> None:
    calls: list[int] = []

    def counted(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        return [1.0] * len(completions)

    envs = make("vector_entry_point", counted, tokenizer)
    envs.reset()
    envs.step([END, 5, END, 5])
    assert calls == [2]
    envs.step([5, 5, 5, 5])
    assert calls == [2]
    envs.step([5, 5, END, END])
    assert calls == [2, 2]
    envs.step([5, 5, 5, 5])
    assert calls == [2, 2, 1]
    envs.reset()
    envs.step_sequence(np.full((NUM_ENVS, 4), 5), np.array([4, 4, 4, 3]))
    assert calls == [2, 2, 1, 3]


def test_weighted_parts_stay_visible(tokenizer: Any) -> None:
    env = make("single", [final, sometimes], tokenizer, reward_weights=[0.5, 2.0])
    env.reset()
    env.step(5)
    _, reward, *_, info = env.step(END)
    assert reward == 0.5 * 100 + 2.0 * 2
    assert info["rewards"] == {"final": 100.0, "sometimes": 2.0}


def test_a_part_that_does_not_apply_is_left_out(tokenizer: Any) -> None:
    env = make("single", [final, sometimes], tokenizer)
    env.reset()
    assert env.step(END)[4]["rewards"] == {"final": 100.0}
    envs = make("vector_entry_point", [final, sometimes], tokenizer)
    envs.reset()
    envs.step([5, 5, 5, 5])
    rewards = envs.step([END, 5, END, 5])[4]["rewards"]
    assert rewards["_sometimes"].tolist() == rewards["_final"].tolist() == [True, False, True, False]
    envs.reset()
    assert "sometimes" not in envs.step([END] * 4)[4]["rewards"]


@pytest.mark.parametrize("reward", [[ids_so_far], [every_second, final], [ids_so_far, every_second, final, sometimes]], ids=len)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_dense_rewards_native_is_sync(reward: Any, mode: AutoresetMode, tokenizer: Any, assert_equal: Any) -> None:
    weights = [0.5, 2.0, 1.0, 3.0][: len(reward)]
    native = make("vector_entry_point", reward, tokenizer, reward_weights=weights, autoreset_mode=mode, max_episode_steps=3)
    sync = make("sync", reward, tokenizer, reward_weights=weights, vector_kwargs={"autoreset_mode": mode}, max_episode_steps=3)
    rng = np.random.default_rng(0)
    assert_equal(native.reset(seed=0), sync.reset(seed=0))
    for _ in range(30):
        actions = rng.integers(0, 6, NUM_ENVS)
        one, other = native.step(actions), sync.step(actions)
        assert_equal(one, other)
        over = one[2] | one[3]
        if mode == AutoresetMode.DISABLED and over.any():
            assert_equal(native.reset(options={"reset_mask": over}), sync.reset(options={"reset_mask": over}))


def test_dense_rewards_are_paid_at_their_tokens(tokenizer: Any) -> None:
    env = make("single", [ids_so_far, every_second, final], tokenizer, reward_weights=[1.0, 10.0, 1.0])
    env.reset()
    _, reward, *_, info = env.step(6)
    assert reward == 3.0 and info == {"dense_rewards": {"ids_so_far": 3.0, "every_second": 0.0}}
    _, reward, *_, info = env.step(8)
    assert reward == 4.0 + 20.0 and info == {"dense_rewards": {"ids_so_far": 4.0, "every_second": 2.0}}
    env.step(4)
    _, reward, *_, info = env.step(END)  # closes the second segment
    assert reward == 0.5 + 40.0 + 100.0
    assert info["dense_rewards"] == {"ids_so_far": 0.5, "every_second": 4.0}
    assert info["rewards"] == {"ids_so_far": 9.5, "every_second": 6.0, "final": 100.0}
    env.reset()
    for token in (2, 2, 2):
        env.step(token)
    assert env.step(2)[4]["rewards"] == {"ids_so_far": 4.0, "every_second": 6.0, "final": 100.0}  # sums begin anew


@pytest.mark.parametrize("limit", [None, 3])
def test_dense_rewards_of_a_sequence_are_those_of_its_steps(limit: int | None, tokenizer: Any) -> None:
    envs = make("vector_entry_point", [ids_so_far, every_second, final], tokenizer, max_episode_steps=limit)
    actions = np.array([[5, END, 0, 0], [5, 6, 7, 8], [3, 4, 5, 0], [END, 0, 0, 0]])
    lengths = np.array([2, 4, 2, 1])
    envs.reset(seed=0)
    result = envs.step_sequence(actions, lengths)
    envs.reset(seed=0)
    envs.hold = True
    over = np.zeros(NUM_ENVS, dtype=bool)
    for t in range(4):
        envs.hold_rows((t >= lengths) | over)
        _, rewards, terminated, truncated, infos = envs.step(actions[:, t])
        np.testing.assert_array_equal(result.rewards[:, t], rewards.astype(np.float32))
        for row in np.flatnonzero(t == result.lengths_used - 1):
            parts = infos["dense_rewards"]
            assert result.infos[row]["dense_rewards"] == {name: parts[name][row] for name in ("ids_so_far", "every_second")}
        over |= terminated | truncated


@pytest.mark.parametrize("vectorization", ["single", "vector_entry_point"])
def test_messages(vectorization: str, word_tokenizer: Any) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    seen: list[Any] = []

    def chatty(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.append((prompts, completions))
        prompts[0].append("rewards cannot spoil the prompts")
        return [0.0] * len(prompts)

    messages = [{"role": "system", "content": "w2"}, {"role": "user", "content": "w3"}]
    env = make(vectorization, chatty, tokenizer, prompts=[messages])
    observation = env.reset()[0]["input_ids"]
    assert observation.reshape(-1)[:3].tolist() == [2, 3, 9]
    info = env.step(5 if vectorization == "single" else [5] * 4)[4]
    info = env.step(END if vectorization == "single" else [END] * 4)[4]
    assert seen[0][1][0] == [{"role": "assistant", "content": " w5"}]  # behind the words of the chat template
    prompt, completion = (info["prompt"], info["completion"]) if vectorization == "single" else (info["prompt"][0], info["completion"][0])
    assert completion == " w5"
    assert prompt[:2] == messages
    assert env.unwrapped.prompt_set.texts == [messages]


def test_rewards_are_counted_where_they_are_shared(tokenizer: Any) -> None:
    rewards = RewardSet.build(final)
    env = make("single", rewards, tokenizer)
    for _ in range(3):
        env.reset()
        env.step(END)
    assert (rewards.calls, rewards.rows) == (3, 3)


def test_after_a_failing_reward_the_episode_is_over(tokenizer: Any) -> None:
    def failing(completions: list[str], **columns: Any) -> list[float]:
        raise RuntimeError("no network")

    env = make("single", failing, tokenizer)
    env.reset()
    with pytest.raises(RuntimeError, match="no network"):
        env.step(END)
    with pytest.raises(ValueError, match="call `reset` first"):
        env.step(5)


# --- Several objectives ---------------------------------------------------------------------------------------------------------


def objectives() -> FineGrainedReward:
    return FineGrainedReward(
        [
            Objective(last_id, TokenCount(1), weight=0.5),
            Objective(how_many, TokenCount(2), weight=2.0, sees="segment"),
            Objective(how_many, TokenCount(2), weight=-1.0, name="late", paid="end"),
            Objective(final, weight=0.01),
        ]
    )


def last_id(completion_ids: list[list[int]]) -> list[float]:
    return [float(ids[-1]) for ids in completion_ids]


def how_many(completion_ids: list[list[int]]) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


EPISODES = np.array([[5, 6, 7, 8], [5, END, 0, 0], [END, 0, 0, 0], [2, 3, END, 0]])


@pytest.mark.parametrize("kind", ["single", "sync", "vector_entry_point", "async"])
def test_the_vector_of_objectives_adds_up_to_the_reward(kind: str, tokenizer: Any) -> None:
    """At every step: weights · what each dense objective pays, and at the end those that are paid once; the same in each form."""
    reward = objectives()
    rows = []
    if kind == "single":
        env = make("single", reward, tokenizer)
        for tokens in EPISODES:
            env.reset()
            rows.append([env.step(int(token)) for token in tokens[: list(tokens).index(END) + 1 if END in tokens else 4]])
    else:
        envs = make(kind, reward, tokenizer)
        envs.reset()
        steps = [envs.step(tokens) for tokens in EPISODES.T]
        for i, tokens in enumerate(EPISODES):
            count = list(tokens).index(END) + 1 if END in tokens else 4
            rows.append([(None, r[i], terminated[i], None, row_info(infos, i)) for _, r, terminated, _, infos in steps[:count]])
        envs.close()
    for tokens, row in zip(EPISODES, rows, strict=True):
        total = 0.0
        for t, (_, paid, terminated, _, info) in enumerate(row):
            assert set(info["dense_rewards"]) == {"last_id", "how_many", "late"}
            assert info["dense_rewards"]["last_id"] == tokens[t]
            once = reward.weights[3] * info["rewards"]["final"] if terminated else 0.0
            assert paid == pytest.approx(reward.vector(info["dense_rewards"]) @ reward.weights + once)
            assert info["dense_rewards"]["late"] == 0.0 or terminated
            total += paid
        assert terminated and total == pytest.approx(reward.vector(info["rewards"]) @ reward.weights)
        # Lengths of the segments of two tokens, and of the prefixes that end with one. An end token alone is no segment of its own.
        expected = {1: (1.0, 1.0), 2: (2.0, 2.0), 3: (2.0, 2.0), 4: (2.0 + 2.0, 2.0 + 4.0)}[len(row)]
        assert (info["rewards"]["how_many"], info["rewards"]["late"]) == expected


def test_the_vector_of_objectives_of_whole_sequences(tokenizer: Any) -> None:
    reward = objectives()
    envs = make("vector_entry_point", reward, tokenizer)
    envs.reset()
    result = envs.step_sequence(EPISODES, np.array([4, 2, 1, 3]))
    for row, info in enumerate(result.infos):
        assert result.rewards[row].sum() == pytest.approx(reward.vector(info["rewards"]) @ reward.weights)
        assert result.rewards[row, result.lengths_used[row] - 1] == pytest.approx(
            reward.vector(info["dense_rewards"]) @ reward.weights + 1.0
        )


@pytest.mark.parametrize("kind", ["single", "sync", "vector_entry_point", "async"])
def test_weights_change_in_every_form(kind: str, tokenizer: Any) -> None:
    env = make(kind, [final, sometimes], tokenizer, reward_weights=[1.0, 2.0])

    def total() -> float:
        env.reset()
        actions = 5 if kind == "single" else [5] * NUM_ENVS
        env.step(actions)
        return float(np.max(env.step(END if kind == "single" else [END] * NUM_ENVS)[1]))

    assert total() == 104.0
    if kind == "async":
        env.call("set_reward_weights", {"sometimes": -1.0})
    elif kind == "sync":
        env.set_attr("reward_weights", {"sometimes": -1.0})
    else:
        env.unwrapped.reward_weights = {"sometimes": -1.0}
    assert total() == 98.0
    if kind in ("sync", "async"):
        env.call("set_reward_weights", [0.5, 0.0])
        assert env.call("reward_weights") == ((0.5, 0.0),) * NUM_ENVS
    else:
        env.unwrapped.set_reward_weights([0.5, 0.0])
        assert env.unwrapped.reward_weights == (0.5, 0.0)
    assert total() == 50.0
    env.close()
