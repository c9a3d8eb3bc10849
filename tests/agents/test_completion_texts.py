"""Policies, rewards outside of environments and reports read a completion as the environment does: behind its prompt."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import textgym
from textgym.agents import BestOfN, CausalLMPolicy, RewardModel, compare_policies
from textgym.agents.common.offline_rows import Example
from textgym.agents.common.offline_tokens import tokenise
from textgym.agents.common.segments import segment_pieces
from textgym.agents.common.win_rate_evaluation import WinRateEvaluation
from textgym.agents.rejection_sampling import keep_best
from textgym.feedback.records import Marking, Span
from textgym.rewards import segment_level
from textgym.tokenizers import decode

PROMPTS = ["a", "a to", "é", "<s>"]


WORDS = ("▁time", "me", "▁", "▁a", "▁to", "<s>", "</s>", "<0xC3>", "<0xA9>")


@pytest.fixture
def policy(tiny_model: Any, sentencepiece_tokenizer: Any, device: str) -> CausalLMPolicy:
    """It writes words, pieces of words, two bytes and special tokens most of the time."""
    model = tiny_model("llama", len(sentencepiece_tokenizer))
    likely = sentencepiece_tokenizer.convert_tokens_to_ids(list(WORDS))
    model.lm_head.bias = torch.nn.Parameter(torch.full((len(sentencepiece_tokenizer),), -20.0))
    model.lm_head.bias.data[likely] = 0.0
    return CausalLMPolicy(model.to(device), sentencepiece_tokenizer, device=device)


def only(policy: CausalLMPolicy, piece: str) -> torch.Tensor:
    """One legal token, (V,)."""
    legal = torch.zeros(policy.vocab_size, dtype=torch.bool)
    legal[policy.tokenizer.convert_tokens_to_ids(piece)] = True
    return legal


def recording(seen: list[Any]) -> Any:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(sum(map(ord, prompt + text)) % 31) for prompt, text in zip(prompts, completions, strict=True)]

    return reward


def test_generated_texts_are_the_environments(policy: CausalLMPolicy) -> None:
    generated = policy.generate(PROMPTS, 8, seed=0, num_generations=6)
    seen: list[Any] = []
    envs: Any = gym.make_vec(
        "TextGen-v0", num_envs=len(generated.texts), prompts=PROMPTS, tokenizer=policy.tokenizer, reward=recording(seen), max_new_tokens=8
    )
    envs.reset(options={"prompt_index": [row // 6 for row in range(24)]})
    infos = textgym.step_sequence(envs, generated.ids.cpu().numpy(), generated.lengths.cpu().numpy()).infos
    assert [info["completion"] for info in infos] == generated.texts
    assert seen == [(PROMPTS[row // 6], text) for row, text in enumerate(generated.texts)]
    assert any(text.startswith(" ") for text in generated.texts[:18])
    for prompt, ids, text in zip(generated.prompt_id_lists, generated.completion_ids, generated.texts, strict=True):
        before, whole = decode(policy.tokenizer, [prompt, prompt + ids])
        assert before + text == whole or not whole.startswith(before)


def test_stop_strings_see_the_leading_space(policy: CausalLMPolicy) -> None:
    free = policy.generate(PROMPTS, 8, seed=0, num_generations=6)
    stopped = policy.generate(PROMPTS, 8, seed=0, num_generations=6, stop_strings=" time")
    at_once = [row for row, text in enumerate(free.texts) if text.startswith(" time")]
    assert at_once
    for row in range(24):
        assert (" time" in stopped.texts[row]) == (stopped.finish_reasons[row] == "stop") == (" time" in free.texts[row])
        if row in at_once:
            assert stopped.completion_ids[row] == free.completion_ids[row][: int(stopped.lengths[row])]
            assert stopped.texts[row] == " time"


def test_stop_strings_know_the_prompt_of_each_row(policy: CausalLMPolicy) -> None:
    stopped = policy.generate(["a", "<s>"], 3, num_generations=2, action_mask=only(policy, "▁time"), stop_strings=" time")
    assert stopped.texts == [" time", " time", "time time", "time time"]


@pytest.mark.parametrize("stop", ["", [""], [" time", ""], [3]])
def test_a_stop_string_that_every_text_contains_is_an_error(policy: CausalLMPolicy, stop: Any) -> None:
    with pytest.raises(ValueError, match="`stop_strings` must be texts of at least one character"):
        policy.generate(PROMPTS, 8, stop_strings=stop)


def test_whoever_scores_outside_an_environment_sees_the_same_texts(policy: CausalLMPolicy) -> None:
    seen: list[Any] = []
    best = BestOfN(policy, recording(seen), n=3).generate(PROMPTS, 6, seed=0)
    pairs = list(zip(PROMPTS, best.texts, strict=True))
    assert len(seen) == 12 and set(pairs) <= set(seen)
    assert any(text.startswith(" ") for text in best.texts)
    seen.clear()
    kept = keep_best(policy, PROMPTS, recording(seen), n=2, max_new_tokens=6, seed=0).examples
    assert {(row["prompt"], row["completion"]) for row in kept} <= set(seen)
    for row in kept:
        before, whole = decode(policy.tokenizer, [row["prompt_ids"], row["prompt_ids"] + row["completion_ids"]])
        assert before + row["completion"] == whole or not whole.startswith(before)


def test_reports_show_and_score_the_same_texts(policy: CausalLMPolicy) -> None:
    rows = [{"prompt": prompt, "reference": " time to"} for prompt in PROMPTS[:2]]
    seen: list[Any] = []
    report = compare_policies(policy, rows, "reference", reward=recording(seen), max_new_tokens=4, seed=0)
    assert ("a", " time to") in seen and ("a to", " time to") in seen
    texts = [one["completion"] for sample in report.samples for one in sample.values() if isinstance(one, dict)]
    assert {text for _, text in seen} == set(texts)


def test_the_win_rate_in_training_scores_given_texts_alike(policy: CausalLMPolicy) -> None:
    seen: list[Any] = []
    prompts = [{"prompt": prompt, "reference": " time"} for prompt in PROMPTS[:2]]
    env = gym.make("TextGen-v0", prompts=prompts, tokenizer=policy.tokenizer, reward=recording(seen), max_new_tokens=2)
    texts = WinRateEvaluation(env, "reference")._column("reference", policy, 2).texts
    assert seen == [("a", " time"), ("a to", " time")] and texts == [" time", " time"]


def test_dense_rewards_of_prefixes_have_it(policy: CausalLMPolicy) -> None:
    prefixes: list[str] = []

    @segment_level(segmenter=lambda segment, ids: True)
    def reward(segments: list[str], completions: list[str]) -> list[float]:
        prefixes.extend(completions)
        return [0.0] * len(segments)

    BestOfN(policy, reward, n=1).generate(["a"], 1, seed=0, action_mask=only(policy, "▁time"))
    assert prefixes == [" time"]


def test_a_text_that_was_sampled_is_read_back_as_its_tokens(policy: CausalLMPolicy) -> None:
    ids = [policy.tokenizer.get_vocab()[piece] for piece in ("▁time", "▁to", "▁a")]
    prompt = policy.tokenizer("a to")["input_ids"]
    (text,) = policy.decode_texts([prompt], [ids])
    (row,) = tokenise([Example("a to", [text])], policy.tokenizer, (2,), "row {}", append_eos=False)
    assert (text, row.prompt, row.completions) == (" time to a", prompt, [ids])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("completion", [" time to", "time to"])
def test_markings_find_the_tokens_of_a_text_with_a_leading_space(policy: CausalLMPolicy, per_token: bool, completion: str) -> None:
    model = RewardModel.from_policy(policy, per_token=per_token, output_names=["wrong"])
    start = completion.index("to")
    marking = Marking("a", completion, (Span("wrong", start, start + 2),))
    pieces, clean = segment_pieces(model, marking, lambda segment, ids: True)
    marked = [piece for piece, row in zip(pieces, clean, strict=True) if not row[0]]
    (token,) = {policy.tokenizer.convert_ids_to_tokens(piece.ids[piece.end - 1]) for piece in marked}
    assert token == "▁to" and np.count_nonzero(~clean) == 1
