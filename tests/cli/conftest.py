import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from textgym.cli.main import main

TestCommand = Callable[..., int]


DEVICE = os.environ.get("TEXTGYM_TEST_DEVICE", "cpu")
SMALL = ["--total-timesteps", "300", "--num-envs", "16", "--max-new-tokens", "8", "--device", DEVICE]
EPISODES = 50  # of a measurement: one per held-out prompt


def run_command(*arguments: str) -> int:
    """Runs the command line in this process and returns its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.fixture
def textgym(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TestCommand:
    """Runs the command line in this process, in an empty folder, and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("textgym.cli.measuring.EPISODES", EPISODES)
    monkeypatch.setattr("textgym.cli.train.plot_curves", lambda rows, path, title: path.write_bytes(b"drawn in `finished`; takes a second"))
    return run_command


@pytest.fixture
def small() -> list[str]:
    """Options of a run that takes about a second."""
    return list(SMALL)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished PPO run with seed 3, not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textgym.cli.measuring.EPISODES", EPISODES)
        assert run_command("train", "ppo", *SMALL, "--seed", "3", "--eval-interval", "1", "--out", str(folder)) == 0
    return folder


@pytest.fixture
def run(finished: Path, textgym: TestCommand) -> Path:
    """A copy of `finished`, as `run` in the current folder."""
    return Path(shutil.copytree(finished, "run"))


@pytest.fixture
def save_model(textgym: TestCommand, tokenizer: PreTrainedTokenizerFast) -> Callable[[str, int], None]:
    """Saves a random model with a character tokenizer under a name in the current folder, which `textgym` has made an empty one."""

    def save(name: str, seed: int) -> None:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes))
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)

    return save
