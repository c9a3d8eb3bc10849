"""What rewards and infos get as the text of a completion, of tokenizers that read one differently behind its prompt."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import textgym
from textgym.envs.text_gen import TextGenEnv
from textgym.envs.text_gen_vector import TextGenVectorEnv
from textgym.rewards import segment_level, token_level
from textgym.tokenizers import decode

CHAT = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@pytest.fixture
def tokenizer(sentencepiece_tokenizer: Any) -> Any:
    return sentencepiece_tokenizer


def ids_of(tokenizer: Any, *pieces: str) -> list[int]:
    return [tokenizer.get_vocab()[piece] for piece in pieces]


def seen_texts(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Any function of the whole text will do."""
    return [float(sum(ord(character) for character in prompt + text) % 997) for prompt, text in zip(prompts, completions, strict=True)]


@segment_level(segmenter=lambda segment, ids: segment.endswith("e"))
def seen_segments(segments: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [len(segment) + 0.01 * len(text) for segment, text in zip(segments, completions, strict=True)]


@token_level
def seen_prefixes(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[list[float]]:
    return [[0.5] * len(ids) for ids in completion_ids]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("a", ["▁time", "</s>"], " time"),
        ("a", ["me", "▁to"], "me to"),
        ("a ", ["▁time"], " time"),
        ("é", ["▁", "time"], " time"),
        ("a to", ["<0xE2>", "<0x82>", "<0xAC>", "</s>"], "€"),
        ("a", ["</s>"], ""),
        ("a", ["<s>", "▁time"], " time"),
        ("<s>", ["▁time"], "time"),  # nothing stands before it
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_the_reward_and_the_info_have_the_leading_space(
    prompt: str, completion: list[str], expected: str, batched: bool, tokenizer: Any
) -> None:
    seen: list[Any] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    arguments = {"prompts": [prompt], "tokenizer": tokenizer, "reward": reward, "max_new_tokens": len(completion)}
    env: Any = gym.make_vec("TextGen-v0", num_envs=2, **arguments) if batched else gym.make("TextGen-v0", **arguments)
    env.reset()
    for token in ids_of(tokenizer, *completion):
        info = env.step([token, token] if batched else token)[4]
    assert seen == [(prompt, expected)] * (1 + batched)
    assert info["completion"][0 if batched else slice(None)] == expected


def test_prompts_of_the_moment_and_truncated_ones_count_too(tokenizer: Any) -> None:
    env = gym.make(
        "TextGen-v0", prompts=["a"], tokenizer=tokenizer, reward=seen_texts, max_prompt_tokens=2, max_new_tokens=1, truncate_prompts=True
    )
    for prompt in ("to", "a to a to", {"prompt": "a"}):
        env.reset(options={"prompt": prompt})
        assert env.step(ids_of(tokenizer, "▁time")[0])[4]["completion"] == " time"


def test_a_conversation_is_gone_on_with_where_the_chat_template_ends(sentencepiece_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "a"}]
    tokenizer = copy.deepcopy(sentencepiece_tokenizer)
    tokenizer.chat_template = CHAT
    env = gym.make("TextGen-v0", prompts=[messages], tokenizer=tokenizer, reward=lambda completions: [0.0], max_new_tokens=1)
    env.reset()
    assert env.step(ids_of(tokenizer, "▁time")[0])[4]["completion"] == " time"
    env.reset()
    assert env.step(ids_of(tokenizer, "time")[0])[4]["completion"] == "time"


@pytest.mark.parametrize("rewards", [[seen_texts], [seen_texts, seen_segments], [seen_prefixes, seen_segments]])
def test_single_native_and_sync_environments_see_the_same_texts(rewards: list[Any], tokenizer: Any, assert_equal: Any) -> None:
    prompts = ["a", "a to", "é", "<s>", "to a to a to"]
    arguments: dict[str, Any] = {"prompts": prompts, "tokenizer": tokenizer, "reward": rewards, "max_new_tokens": 6}
    mode = AutoresetMode.SAME_STEP
    native = TextGenVectorEnv(5, autoreset_mode=mode, **arguments)
    sync = SyncVectorEnv([lambda: TextGenEnv(**arguments)] * 5, autoreset_mode=mode)
    assert_equal(native.reset(seed=0), sync.reset(seed=0))
    often = ids_of(tokenizer, "▁time", "time", "me", "▁", "▁a", "<s>", "</s>", "<0xC3>", "<0xA9>", "<0x20>")
    rng = np.random.default_rng(0)
    texts = 0
    for _ in range(60):
        actions = rng.choice(often, 5)
        stepped = native.step(actions)
        assert_equal(stepped, sync.step(actions))
        final = stepped[4].get("final_info", {})
        for row in np.flatnonzero(final.get("_completion", [])):
            prompt = native.prompt_set.ids[prompts.index(final["prompt"][row])].tolist()
            before, whole = decode(tokenizer, [prompt, prompt + final["completion_ids"][row]])
            if whole.startswith(before):
                texts += 1
                assert before + final["completion"][row] == whole
    assert texts > 20


def test_a_walked_sequence_is_paid_as_the_same_steps(tokenizer: Any) -> None:
    arguments: dict[str, Any] = {
        "prompts": ["a", "é", "<s>"],
        "tokenizer": tokenizer,
        "reward": [seen_texts, seen_segments],
        "max_new_tokens": 5,
    }
    walked, stepped = (TextGenVectorEnv(3, autoreset_mode=AutoresetMode.DISABLED, **arguments) for _ in range(2))
    pieces = ["▁time", "<0xA9>", "time", "▁a", "me"]
    actions = np.array([ids_of(tokenizer, *pieces), ids_of(tokenizer, *pieces[::-1]), ids_of(tokenizer, *pieces)])
    for envs in (walked, stepped):
        envs.reset(options={"prompt_index": [0, 1, 2]})
    result = textgym.step_sequence(walked, actions, np.array([5, 5, 5]))
    rewards = np.stack([stepped.step(actions[:, t])[1] for t in range(5)], axis=1)
    np.testing.assert_allclose(result.rewards, rewards, rtol=1e-6)


def test_rows_that_write_the_same_behind_other_prompts_have_their_own_segments(tokenizer: Any) -> None:
    """What is remembered of a prefix is that of its prompt too."""
    seen = []

    @segment_level(segmenter=lambda segment, ids: segment.endswith("e"))
    def reward(segments: list[str]) -> list[float]:
        seen.append(list(segments))
        return [0.0] * len(segments)

    envs = TextGenVectorEnv(2, prompts=["<s>", "a"], tokenizer=tokenizer, reward=reward, max_new_tokens=3)
    envs.reset(options={"prompt_index": [0, 1]})
    for token in ids_of(tokenizer, "▁time", "▁time"):
        envs.step([token, token])
    assert seen == [["time", " time"], [" time", " time"]]


@pytest.mark.parametrize("prompt", ["a", "<s>"])
def test_rendering_shows_the_space(prompt: str, tokenizer: Any, capsys: Any) -> None:
    space = "" if prompt == "<s>" else " "
    arguments: dict[str, Any] = {"prompts": [prompt], "tokenizer": tokenizer, "reward": seen_texts}
    for mode in ("ansi", "human"):
        env = gym.make("TextGen-v0", render_mode=mode, **arguments)
        env.reset()
        for token in ids_of(tokenizer, "▁time", "▁to"):
            env.step(token)
        shown = env.render() if mode == "ansi" else capsys.readouterr().out
        assert shown is not None and f"text > {space}time to" in shown
