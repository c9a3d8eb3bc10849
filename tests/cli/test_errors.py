"""Every mistake of the user's ends in one sentence on stderr, exit code 2, no traceback, and leaves nothing behind."""

import io
import json
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train", "Missing argument"),
        ("train ppp", "'ppp' is not one of 'ppo', 'reinforce'"),
        ("frobnicate", "No such command 'frobnicate'"),
        ("train ppo --bata 1", "No such option: --bata"),
        ("train ppo --beta much", "--beta must be a number, linear:START:END or constant:VALUE or adaptive:TARGET"),
        ("train ppo --beta -1", "--beta must be a number, 0 or above, not -1.0"),
        ("train ppo --beta nan", "--beta must be a number"),
        ("train ppo --temperature 0", "--temperature must be above 0"),
        ("train ppo --total-timesteps 0", "--total-timesteps must be at least 1, not 0"),
        ("train ppo --num-envs 0", "--num-envs must be at least 1, not 0"),
        ("train ppo --max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("train ppo --max-new-tokens 500", "the model has 192 positions"),
        ("train ppo --max-prompt-tokens 2", "--max-prompt-tokens = 2"),
        ("train ppo --learning-rate -1", "--learning-rate must be"),
        ("train ppo --reward-weight 1 --reward-weight 2", "--reward-weight must be given once per --reward: 1 times, not 2"),
        ("train ppo --reward film-reviw", "Did you mean 'film-review'?"),
        ("train ppo --reward no_such_module:reward", "no module 'no_such_module'"),
        ("train ppo --reward json:no_such", "has no 'no_such'"),
        ("train ppo --reward broken:reward", "could not be loaded: ZeroDivisionError"),
        ("train ppo --reward unfinished:reward", "could not be loaded: SyntaxError"),
        ("train ppo --true-reward nonsense", "--true-reward 'nonsense' is no reward. It takes"),
        ("train ppo --model ./nowhere", "--model: there is no folder './nowhere'"),
        ("train ppo --reference ./nowhere", "--reference: there is no folder './nowhere'"),
        ("train ppo --reference other", "another vocabulary"),
        ("train ppo --prompts nowhere.jsonl", "--prompts given as a path must be a file"),
        ("train ppo --prompts one.jsonl", "give --eval-prompts"),
        ("train ppo --eval-prompts bad.jsonl", "--eval-prompts: "),
        ("train ppo --device gpu7", "--device gpu7 cannot be used here"),
        ("train ppo --set clip_range", "--set takes NAME=VALUE"),
        ("train ppo --set clip_rang=0.1", "Did you mean clip_range?"),
        ("train ppo --set beta=1", "has an option of its own"),
        ("train ppo --set n_epochs=0", "--set n_epochs=... must be"),
        ("train ppo --set num_generations=7", "--set num_generations=... must divide"),
        ("train ppo --resume nowhere", "there is no run"),
        ("train ppo --out full", "--out full exists and is not empty"),
        ("train ppo --out full/file/run", "--out full/file/run cannot be made: Not a directory."),
        ("train ppo --beta adaptive", "--beta must be a number, linear:START:END or constant:VALUE or adaptive:TARGET"),
        ("train ppo --beta linear:0.2", "--beta must be a number, linear:START:END"),
        ("train ppo --beta linear:0.2:-1", "--beta linear:0.2:-1: its numbers must be 0 or above."),
        ("train ppo --beta adaptive:0", "--beta adaptive:0: its numbers must be above 0."),
        ("train ppo --beta adaptive:6:0.2:3", "the horizon must be more than 12.8 completions"),
        ("train ppo --learning-rate adaptive:6", "--learning-rate must be a number, linear:START:END or constant:VALUE, not 'adaptive:6'"),
        ("train ppo --set clip_range=linear:0.2", "--set clip_range must be a number, linear:START:END"),
        ("train ppo --set n_epochs=linear:4:1", "--set n_epochs=linear:4:1: this argument does not change during training"),
        ("train dpo --beta linear:0.2:0", "--beta linear:0.2:0: dpo takes a number"),
        ("train kto --beta adaptive:6", "--beta adaptive:6: kto takes a number"),
        ("train ppo --dtype float8", "--dtype must be one of auto, checkpoint, float32, bfloat16, float16, not float8."),
        ("train ppo --autocast float32", "--autocast must be one of auto, none, bfloat16, float16, not float32."),
        ("train ppo --model other", "--prompts must be given with --model"),
        ("train ppo --model other --prompts two.jsonl", "--reward must be given with --model: the bundled reward judges film reviews."),
        ("train ppo --prompts empty.jsonl", "empty.jsonl is empty: it must hold one JSON object per line."),
        ("train ppo --model full/file --prompts two.jsonl --reward length", "--model full/file is a file: give the folder that it is in."),
        (
            "train ppo --model checkpoint --prompts two.jsonl --reward length",
            "is the checkpoint of an agent: give its model, checkpoint/model",
        ),
        ("generate hi --model full/nothere", "--model: there is no folder 'full/nothere'."),
        ("generate hi --model checkpoint", "--model checkpoint is the checkpoint of an agent: give its model, checkpoint/model."),
        ("generate hi --model unfinished-run", "--model unfinished-run is the folder of a run that has saved no model yet."),
        ("evaluate --model full/nothere", "--model: there is no folder 'full/nothere'."),
        ("evaluate --out full/file/report", "--out full/file/report cannot be made: Not a directory."),
        ("generate hi --model ./nowhere", "--model: there is no folder './nowhere'"),
        ("generate --model other", "give a prompt"),
        ("generate --top-p 2", "--top-p must be above 0 and at most 1, not 2.0"),
        ("generate --temperature -1", "--temperature must be 0 or above"),
        ("generate --num-generations 0", "--num-generations must be at least 1"),
        ("generate --max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("generate --prompts nowhere.jsonl", "must be a file"),
        ("generate hello --prompts one.jsonl", "not from both"),
        ("generate -", "no prompts on standard input"),
        ("generate --max-new-tokens 500", "192"),
        ("evaluate --model ./nowhere", "--model: there is no folder './nowhere'"),
        ("evaluate --model ./nowhere --prompts one.jsonl", "--model: there is no folder './nowhere'"),
        ("evaluate --against ./nowhere", "--against: there is no folder './nowhere'"),
        ("evaluate --reference ./nowhere", "--reference: there is no folder './nowhere'"),
        ("evaluate --against other --references answer", "give --against or --references, not both"),
        ("evaluate --references answer", "the columns are ['reference']"),
        ("evaluate --prompts nowhere.jsonl", "--prompts given as a path must be a file"),
        ("evaluate --prompts one.jsonl --best-of 2", "--best-of needs a --reward"),
        ("evaluate --best-of 0", "--best-of must be at least 1, not 0"),
        ("evaluate --temperature 0", "--temperature must be above 0, not 0.0"),
        ("evaluate --num-generations 0", "--num-generations must be at least 1"),
        ("evaluate --reward film-reviw", "Did you mean 'film-review'?"),
        ("evaluate --reward-weight 2", "--reward-weight belongs to --reward"),
        ("evaluate --reward film-review --reward-weight 1 --reward-weight 2", "must be given once per --reward: 1 times, not 2"),
        ("evaluate --true-reward nonsense", "--true-reward 'nonsense' is no reward. It takes"),
        ("evaluate --judge json:no_such", "--judge: "),
        ("evaluate --judge broken:judge", "--judge broken:judge could not be loaded: ZeroDivisionError"),
        ("evaluate --judge string:digits", "must be a function judge(prompt, first, second), not a str"),
        ("evaluate --max-new-tokens 500", "192"),
        ("evaluate --out reported", "--out reported holds a report.json already"),
        ("plot nowhere", "nowhere is no run folder"),
        ("plot unmeasured", "holds no metrics"),
        ("plot unmeasured --out curves.pdf", "--out must be a .png file"),
        ("plot unmeasured --label a --label b", "--label must be given once per run: 1 times, not 2"),
    ],
)
def test_one_sentence(textgym, files, capsys, monkeypatch, arguments: str, sentence: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    before = sorted(Path().rglob("*"))
    assert textgym(*arguments.split()) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("textgym: ") and sentence in output.err
    assert [path for path in sorted(Path().rglob("*")) if "__pycache__" not in path.parts] == before


@pytest.fixture
def files(save_model) -> None:
    """What the commands above name, in the current folder."""
    Path("broken.py").write_text("1 / 0\n")
    Path("unfinished.py").write_text("def reward(:\n")
    Path("one.jsonl").write_text(json.dumps({"prompt": "only one"}) + "\n")
    Path("bad.jsonl").write_text("{no json\n")
    Path("full").mkdir()
    Path("full/file").touch()
    Path("reported").mkdir()
    Path("reported/report.json").touch()
    Path("unmeasured").mkdir()
    Path("unmeasured/config.json").write_text("{}")
    Path("two.jsonl").write_text('{"prompt": "the plot"}\n{"prompt": "the film"}\n')
    Path("empty.jsonl").touch()
    Path("checkpoint/model").mkdir(parents=True)
    Path("checkpoint/agent.json").touch()
    Path("unfinished-run").mkdir()
    Path("unfinished-run/config.json").write_text('{"settings": {"algorithm": "ppo"}}')
    save_model("other", 0)


def test_a_mistake_in_textgym_itself_keeps_its_traceback(textgym, monkeypatch) -> None:
    monkeypatch.setattr("textgym.cli.generate._prompts", lambda *_: [][0])
    with pytest.raises(IndexError):
        from textgym.cli.main import main

        main(["generate"])
