"""Rewards by name, by `module:function`, and objects that have a score."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from textgym.bundled import BUNDLED_REWARDS, true_reward
from textgym.rewards import ClassifierReward, RewardSet, load_reward
from textgym.rewards.resolve import resolve_reward

MODULE = """
import functools

def length(completions):
    return [float(len(text)) for text in completions]

class Rewards:
    doubled = staticmethod(lambda completions: [2.0 * len(text) for text in completions])

number = 3
several = [length, functools.partial(length)]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module `my_rewards_<n>` in the current folder, which is not on Python's path."""
    name = f"my_rewards_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield name
    sys.modules.pop(name, None)


def test_module_and_function(module, make_batch):
    assert load_reward(f"{module}:length")(["abc"]) == [3.0]
    assert load_reward(f"{module}:Rewards.doubled")(["abc"]) == [6.0]
    rewards = RewardSet.build([f"{module}:length", f"{module}:Rewards.doubled"])
    assert rewards.names == ("length", "lambda_reward")
    assert rewards.terminal(make_batch("abc"))[0][0] == 9.0


def test_a_list_in_a_module(module, make_batch):
    assert RewardSet.build(load_reward(f"{module}:several")).names == ("length", "length_2")
    assert RewardSet.build(f"{module}:several", [1.0, 2.0]).weights == (1.0, 2.0)


def test_file_and_function(module):
    path = Path(f"{module}.py").resolve()
    first = load_reward(f"{path}:length")
    assert first(["abc"]) == [3.0]
    assert load_reward(f"{path}:length") is first  # read once
    assert RewardSet.build(f"{module}.py:length").names == ("length",)


def test_a_file_whose_name_is_taken(tmp_path):
    (tmp_path / "textwrap.py").write_text(MODULE)
    with pytest.raises(ValueError, match="a module named 'textwrap' is loaded already, from another file"):
        load_reward(f"{tmp_path / 'textwrap.py'}:length")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("length", "must be given as 'module:function' or 'file.py:function', got 'length'"),
        ("module:", "must be given as 'module:function'"),
        (3, "must be given as 'module:function'"),
        ("no_such_module_anywhere:f", "there is no module 'no_such_module_anywhere' on Python's path or in "),
        ("json.no_such_part:f", "there is no module 'json.no_such_part'"),
        ("no_such_file.py:f", "there is no file 'no_such_file.py'"),
        ("json:JSONDecodr", r"'json' has no 'JSONDecodr'. Did you mean 'JSONDecoder'\?"),
        ("json:zzzzzz", "'json' has no 'zzzzzz'.$"),
    ],
)
def test_clear_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_an_import_that_fails_inside_the_module_is_not_hidden(module):
    Path(f"{module}.py").write_text("import a_missing_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="a_missing_dependency"):
        load_reward(f"{module}:length")
    with pytest.raises(ModuleNotFoundError, match="a_missing_dependency"):
        load_reward(f"{module}.py:length")


def test_the_true_bundled_reward_by_name(make_batch):
    rewards = RewardSet.build("film-review-true")
    assert rewards.names == ("film-review-true",)
    batch = make_batch(" was brilliant.", prompts=["The film"])
    assert rewards.terminal(batch)[0][0] == true_reward(["The film"], [" was brilliant."])[0]


def test_every_bundled_name_resolves():
    for name in BUNDLED_REWARDS:
        assert resolve_reward(name)[0] == name


def test_the_trained_bundled_reward_by_name(make_batch):
    name, reward = resolve_reward("film-review")
    assert name == "film-review"
    assert isinstance(reward, ClassifierReward)
    good, bad = reward(["The film"] * 2, [" was brilliant.", " was terrible."])
    assert good > bad


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            "film-reviw",
            r"must be the name of a reward \(film-review, film-review-true, bleu, .* got 'film-reviw'. Did you mean 'film-review'\?",
        ),
        ("zzz", "got 'zzz'.$"),
        ("./no/such/folder", "got './no/such/folder'"),
        (3, "`reward` must be a function, a list of functions, .* got int 3"),
        (None, "got NoneType None"),
        (dict, r"got the class dict; did you mean dict\(\)\?"),
        (torch.nn.Linear(1, 1), "got the torch module Linear"),
    ],
)
def test_what_is_no_reward(reward, message):
    with pytest.raises(ValueError, match=message):
        RewardSet.build(reward)


def test_an_id_that_is_not_in_the_cache_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'no-such-owner/no-such-model' is no folder, and as an id of the hub it cannot be loaded: "):
        RewardSet.build("no-such-owner/no-such-model")


def test_a_file_without_a_function_says_how(module):
    with pytest.raises(ValueError, match=f"To use a function of this file: '{module}.py:name_of_the_function'"):
        RewardSet.build(f"{module}.py")


class Model:
    """Has a score, and a `__call__` that is something else."""

    def __call__(self):
        raise AssertionError

    def score(self, prompts, completions):
        return [float(len(prompt) + len(completion)) for prompt, completion in zip(prompts, completions, strict=True)]


class TorchModel(torch.nn.Module):
    def score(self, completions):
        return torch.tensor([float(len(completion)) for completion in completions])


class TorchModelWithHead(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.score = torch.nn.Linear(2, 1)  # a head, not a method


def test_a_head_called_score_is_no_method():
    with pytest.raises(ValueError, match="got the torch module TorchModelWithHead"):
        RewardSet.build(TorchModelWithHead())


def test_an_object_with_a_score(make_batch):
    rewards = RewardSet.build([Model(), TorchModel()])
    assert rewards.names == ("Model", "TorchModel")
    totals, raw = rewards.terminal(make_batch("abc", prompts=["ab"]))
    assert (raw["Model"][0], raw["TorchModel"][0], totals[0]) == (5.0, 3.0, 8.0)
    np.testing.assert_array_equal(totals, [8.0])


def test_no_torch_before_a_classifier_scores():
    script = """
import sys
import numpy as np
from textgym.rewards import ClassifierReward, EpisodeBatch, RewardSet, token_level, segment_level
from textgym.bundled import bundled_reward_model_path

async def later(completions):
    return [1.0] * len(completions)

@segment_level("sentence")
def per_sentence(segments):
    return [1.0] * len(segments)

rewards = RewardSet.build([lambda completions: [1.0], later, per_sentence, "film-review-true"])
batch = EpisodeBatch(["A"], [[1, 2]], decode=lambda prompts, rows: ["film."] * len(rows))
rewards.terminal(batch)
rewards.dense_sequence(batch, np.array([True]))
RewardSet.build("film-review")
assert "torch" not in sys.modules, "torch was imported"
assert "transformers" not in sys.modules, "transformers was imported"
"""
    subprocess.run([sys.executable, "-P", "-c", script], check=True)
