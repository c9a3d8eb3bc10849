"""Numeric answers: plain numbers exactly, everything else by math-verify, in a process that a slow answer cannot hang."""

import os
import pickle
import threading
import time

import pytest

from textgym.rewards import NumericReward
from textgym.rewards import references as references_module

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("Natalia sold 48/2 = 24.\n#### 72", "She sold 72.\n#### 72", 1.0),
        ("#### 1,234", "1234.0", 1.0),
        ("#### $18.", 18, 1.0),
        ("first #### 3, then #### 4", "4", 1.0),
        ("#### 3", "4", 0.0),
        ("-.5", "-0.50", 1.0),
        ("", "4", 0.0),
        ("#### ", "4", 0.0),
        ("42", ["7", 42], 1.0),
        ("42", None, None),
    ],
)
def test_plain_numbers(completion, answer, expected):
    assert NumericReward()(completions=[completion], answer=[answer]) == [expected]


def test_tolerance():
    texts = {"completions": ["0.30", "0.31", "0.32"], "answer": ["0.3"] * 3}
    assert NumericReward()(**texts) == [1.0, 0.0, 0.0]
    assert NumericReward(tolerance=0.01)(**texts) == [1.0, 1.0, 0.0]
    assert NumericReward(tolerance=1e-6)(**texts) == [1.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def reward():
    return NumericReward(timeout=1)


def test_answers_that_are_found_and_compared_as_mathematics(reward):
    texts = [r"so $x = \frac{1}{2}$", r"\boxed{0.5}", "it is 1/2", "The answer is 5.", r"$\{2, 1\}$"]
    answers = ["0.5", r"$\frac12$", "$0.5$", "6", r"$\{1, 2\}$"]
    assert reward(completions=texts, answer=answers) == [1.0, 1.0, 1.0, 0.0, 1.0]


def test_an_answer_in_words_is_compared_as_text(reward):
    assert reward(completions=["5 apples", "Some apples."], answer=["some apples"] * 2) == [0.0, 1.0]


def test_in_a_thread_and_after_pickling(reward):
    found = []
    thread = threading.Thread(target=lambda: found.extend(reward(completions=["it is $x + x$"], answer=["2x"])))
    thread.start()
    thread.join()
    assert found == [1.0]
    assert pickle.loads(pickle.dumps(reward))(completions=["it is $x + x$"], answer=["2x"]) == [1.0]


@pytest.mark.slow
def test_in_the_workers_of_a_vector_environment(reward):
    """Daemonic processes, which may not have children of `multiprocessing`."""
    import gymnasium as gym

    prompts = [{"prompt": "the film", "answer": r"$\frac{1}{2}$"}]
    envs = gym.make_vec("TextGen-v0", num_envs=2, vectorization_mode="async", prompts=prompts, reward=reward, max_new_tokens=8)
    try:
        envs.reset(seed=0)
        end = envs.call("eos_token_ids")[0][0]
        *_, infos = envs.step([end, end])
        assert infos["rewards"]["numeric"].tolist() == [0.0, 0.0]
    finally:
        envs.close()


@pytest.mark.slow
def test_slow_answers_cost_their_time_and_no_more(reward):
    """The alarm of math-verify stops the first; a process that does not answer at all is killed and started again."""
    start = time.perf_counter()
    assert reward(completions=["$9^{9^{9^{9}}}$"], answer=["$5 x$"]) == [0.0]
    reward._worker._process.send_signal(19 if os.name == "posix" else 9)  # SIGSTOP
    assert reward(completions=["it is $x + x$"], answer=["2x"]) == [0.0]
    assert time.perf_counter() - start < 20
    assert reward(completions=["it is $x + x$"], answer=["2x"]) == [1.0]


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match="`tolerance` must be at least 0, got -1"):
        NumericReward(tolerance=-1)
    with pytest.raises(ValueError, match="`tolerance` must be finite"):
        NumericReward(tolerance=float("inf"))
    with pytest.raises(ValueError, match="`timeout` must be at least 1 second, got 0"):
        NumericReward(timeout=0)
    with pytest.raises(ValueError, match="none of the columns answer, reference, references"):
        NumericReward()(completions=["1"])
    monkeypatch.setattr(references_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package math-verify, which is not installed: pip install 'textgym\[metrics\]'"):
        NumericReward()
