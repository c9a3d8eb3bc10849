"""The examples about rewards run, in a process of their own, and print what they are about."""

import math
import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, **environment):
    command = [sys.executable, "-P", "-W", "error", str(EXAMPLES / name)]
    inherited = {name: value for name, value in os.environ.items() if name != "VADER_LEXICON"}
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=60)


def test_own_reward():
    result = run("own_reward.py")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("'")]
    paid = {token.strip("'"): float(line[-1]) for token, *line in lines}
    assert paid["."] != 0  # the sentence is paid at its stop
    parts = {line.split()[0]: float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("  ")}
    assert parts["mentions"] == 1.0
    assert parts["short_sentences"] == round(5 / 7 + 1.0, 3)
    assert parts["RepetitionPenalty"] < 0
    total = sum(float(line[-1]) for line in lines)
    assert math.isclose(total, 2 * parts["mentions"] + parts["short_sentences"] + parts["RepetitionPenalty"], abs_tol=0.01)


def test_vader_reward(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("lovely\t2.8\nhappy\t2.7\nsad\t-2.1\n", encoding="utf-8")
    result = run("vader_reward.py", VADER_LEXICON=str(words))
    assert result.returncode == 0, result.stderr
    scores = [float(line.split()[0]) for line in result.stdout.splitlines()]
    assert scores == [round(5.5 / math.sqrt(5.5**2 + 15), 3), round(-2.1 / math.sqrt(2.1**2 + 15), 3), 0.0]


def test_vader_reward_has_words_of_its_own():
    result = run("vader_reward.py")
    assert result.returncode == 0, result.stderr
    scores = [float(line.split()[0]) for line in result.stdout.splitlines()]
    assert scores == [round(5 / math.sqrt(5**2 + 15), 3), round(-4 / math.sqrt(4**2 + 15), 3), 0.0]


def test_vader_reward_without_the_list_that_was_named():
    result = run("vader_reward.py", VADER_LEXICON="nowhere.txt")
    assert result.returncode == 1
    assert result.stderr.strip() == "There is no word list 'nowhere.txt'; set VADER_LEXICON to the path of vader_lexicon.txt."
