"""`textgym label`: what a person types becomes feedback at once; resuming; rewards and judges in a person's place."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from textgym.cli.main import app
from textgym.feedback import Comment, Comparison, read_feedback

CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "how are you?"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "completions": ["11", "12"], "topic": "numbers"},
    {"prompt": CHAT, "completions": [[{"role": "assistant", "content": "well"}], [{"role": "assistant", "content": "go away"}]]},
    {"prompt": "three", "chosen": "31", "rejected": "32", "margin": 3, "form": "comparison"},
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    write("pairs.jsonl", ROWS)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def label(*arguments: str, typed: str = "") -> Result:
    return CliRunner().invoke(app, ["label", *arguments], input=typed)


def labels(name: str = "labels.jsonl") -> list[Any]:
    return read_feedback(name).records


def shown(output: str) -> list[tuple[str, str]]:
    """The texts that stood at a and at b, pair by pair."""
    bodies = [line.strip("│ ") for line in output.splitlines() if line.startswith("│")]
    first, second = {"11", "well", "31"}, {"12", "go away", "32"}
    texts = [text for text in bodies if text in first | second]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_what_is_typed_becomes_feedback_with_the_order_in_which_it_was_shown() -> None:
    done = label("pairs.jsonl", typed="a\nB\ntie\n")
    assert done.exit_code == 0 and "3 of 3 pairs labelled, in labels.jsonl." in done.output
    (one, chat, three), (first, second, third) = labels(), shown(done.output)
    assert (one.prompt, one.chosen, one.rejected, one.preference) == ("one", *first, 1.0)
    assert one.columns == {"topic": "numbers", "by": "person", "shown_first": "chosen"}
    assert chat.prompt == CHAT and (chat.chosen[0]["content"], chat.rejected[0]["content"]) == second[::-1]
    assert chat.columns == {"by": "person", "shown_first": "rejected"}
    assert {three.chosen, three.rejected} == set(third) and three.preference == 0.5 and three.margin == 0
    assert "system: be kind" in done.output and "user: how are you?" in done.output


def test_the_order_is_drawn_by_the_seed() -> None:
    write("pairs.jsonl", [{"prompt": str(number), "completions": ["11", "12"]} for number in range(40)])
    orders = [
        shown(label("pairs.jsonl", "--seed", seed, "--out", f"{place}.jsonl", typed="t\n" * 40).output) for place, seed in enumerate("001")
    ]
    assert orders[0] == orders[1] != orders[2]
    assert 8 < orders[0].count(("11", "12")) < 32


def test_it_goes_on_where_it_stopped_and_skipped_pairs_come_again() -> None:
    done = label("pairs.jsonl", typed="s\na\nq\n")
    assert "1 of 3 pairs labelled, in labels.jsonl; 2 left: the same command goes on" in done.output
    assert len(labels()) == 1 and labels()[0].prompt == CHAT
    done = label("pairs.jsonl", typed="a\n")  # standard input ends after one answer
    assert done.exit_code == 0 and "1 of 2 pairs labelled" in done.output and [one.prompt for one in labels()] == [CHAT, "one"]
    assert "1 of 1 pairs labelled" in label("pairs.jsonl", typed="b\n").output
    assert "Nothing is left to label" in label("pairs.jsonl").output
    assert [one.prompt for one in labels()] == [CHAT, "one", "three"]


def test_a_comment_is_a_line_of_its_own_and_no_label() -> None:
    done = label("pairs.jsonl", typed="what\nc\n\nc\nthe [first] one rambles\nq\n")
    assert "'what' is none of these" in done.output
    (comment,) = labels()
    assert isinstance(comment, Comment) and comment.comment == "the [first] one rambles"
    assert comment.completions == shown(done.output)[0] and comment.columns == {"topic": "numbers", "by": "person"}
    assert "3 of 3 pairs labelled" in label("pairs.jsonl", typed="a\na\na\n").output


def test_ctrl_c_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["a", "c", "half"])

    def typed(*_: Any, **__: Any) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("rich.console.Console.input", typed)
    done = label("pairs.jsonl")
    assert done.exit_code == 130 and "1 of 3 pairs labelled" in done.output
    assert [type(one) for one in labels()] == [Comparison, Comment]


def test_all_pairs_of_several_texts_but_equal_ones() -> None:
    write("pairs.jsonl", [{"prompt": "x", "completions": ["a", "b", "c", "a"]}, {"prompt": "x", "completions": ["b", "a"]}])
    done = label("pairs.jsonl", "--by-judge", judge("return 'first' if first < second else 'second'"))
    assert done.exit_code == 0, done.output
    assert [(one.chosen, one.rejected) for one in labels()] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_a_line_that_was_cut_off_spoils_no_other() -> None:
    label("pairs.jsonl", typed="a\nq\n")
    with Path("labels.jsonl").open("a") as file:
        file.write('{"prompt": "th')
    done = label("pairs.jsonl", typed="a\na\n")
    assert "passed over" in done.output and "2 of 2 pairs labelled" in done.output
    assert len(read_feedback("labels.jsonl", on_bad_row="keep_good").records) == 3


def judge(body: str, name: str = "judge") -> str:
    Path(f"mine_{name}.py").write_text(f"def {name}(prompt, first, second):\n    {body}\n")
    return f"mine_{name}.py:{name}"


def test_a_judge_is_asked_in_both_orders() -> None:
    done = label("pairs.jsonl", "--by-judge", judge("return 0.75 if '1' in first else 'tie'", "soft"))
    assert done.exit_code == 0 and "3 of 3 pairs labelled" in done.output
    one, chat, three = labels()
    assert (one.chosen, one.preference) == ("11", 0.5)  # in either order the first one has a 1 in it
    assert chat.preference == 0.5 and (three.chosen, three.preference) == ("31", pytest.approx((0.75 + 0.5) / 2))
    assert one.columns == {"topic": "numbers", "by": "mine_soft.py:soft"}


def test_a_judge_that_fails_loses_no_label() -> None:
    spec = judge("return 'first' if prompt == 'one' else 'none of them'", "failing")
    done = label("pairs.jsonl", "--by-judge", spec)
    assert done.exit_code == 2 and "pair 2 of 3: the judge must return 'first'" in done.output and len(labels()) == 1
    done = label("pairs.jsonl", "--by-judge", judge("return 1 / 0", "raising"))
    assert "pair 1 of 2: ZeroDivisionError" in done.output


def test_a_reward_labels_in_a_persons_place() -> None:
    Path("mine_reward.py").write_text(
        "def last(completions, **columns):\n    return [float(str(text)[-1] == '2') for text in completions]\n"
    )
    done = label("pairs.jsonl", "--by", "mine_reward.py:last")
    assert done.exit_code == 0, done.output
    one, chat, three = labels()
    assert [(one.chosen, one.preference), chat.preference, three.chosen] == [("12", 1.0), 0.5, "32"]
    assert one.columns == {"topic": "numbers", "by": "mine_reward.py:last"}


def test_draws_of_a_reward_have_their_probability_and_belong_to_the_pair() -> None:
    rows = [{"prompt": str(number), "completions": ["11", "12"]} for number in range(400)]
    write("pairs.jsonl", rows)
    Path("mine_odds.py").write_text("def odds(completions):\n    return [float(text[-1]) for text in completions]\n")
    options = ["--by", "mine_odds.py:odds", "--annotator-temperature", "1", "--seed", "4"]
    label("pairs.jsonl", *options)
    wins = sum(one.chosen == "12" for one in labels())
    assert abs(wins / 400 - 0.731) < 4 * 0.0222  # σ(1), and its standard error
    label("pairs.jsonl", *options, "--num-pairs", "100", "--out", "parts.jsonl")
    assert "300 of 300" in label("pairs.jsonl", *options, "--out", "parts.jsonl").output
    assert labels("parts.jsonl") == labels()


def test_the_bundled_model_makes_pairs_that_are_kept() -> None:
    options = ["--num-pairs", "20", "--by", "film-review", "--max-new-tokens", "4", "--device", "cpu"]
    done = label(*options)
    assert done.exit_code == 0 and "20 of 20 pairs labelled" in done.output, done.output
    kept = Path("labels.pairs.jsonl").read_text()
    assert len(kept.splitlines()) == 200 and len(labels()) == 20
    assert all("generated" not in one.columns and one.columns["by"] == "film-review" for one in labels())
    assert "Nothing is left" in label(*options).output and Path("labels.pairs.jsonl").read_text() == kept
    done = label(*options, "--seed", "1")
    assert done.exit_code == 2 and "generated with other options" in done.output
    assert "20 of 20" in label(*options, "--seed", "1", "--out", "other.jsonl").output
    assert Path("other.pairs.jsonl").read_text() != kept


def test_one_text_of_either_of_two_models(save_model) -> None:
    save_model("one", 0)
    save_model("two", 1)
    write("prompts.jsonl", [{"prompt": "ab", "id": number} for number in range(3)])
    options = ["--model", "one", "--model", "two", "--prompts", "prompts.jsonl", "--by", "mine_len.py:length", "--device", "cpu"]
    Path("mine_len.py").write_text("def length(completions):\n    return [float(len(text)) for text in completions]\n")
    assert label(*options).exit_code == 0
    rows = [json.loads(line) for line in Path("labels.pairs.jsonl").read_text().splitlines()]
    assert [(row["id"], len(row["completions"])) for row in rows] == [(0, 2), (1, 2), (2, 2)]
    # each model's texts are its own draws: with the models exchanged the second places become the first
    assert label(*options, "--model", "one", "--out", "c.jsonl").exit_code == 2
    exchanged = ["--model", "two", "--model", "two", *options[4:], "--out", "d.jsonl"]
    assert label(*exchanged).exit_code == 0
    other = [json.loads(line)["completions"] for line in Path("d.pairs.jsonl").read_text().splitlines()]
    assert [texts[1] for texts in other] == [row["completions"][1] for row in rows]
    assert [texts[0] for texts in other] != [row["completions"][0] for row in rows]


def test_the_model_of_a_run(run: Path) -> None:
    write("prompts.jsonl", [{"prompt": "the film was"}] * 4)
    options = ["--prompts", "prompts.jsonl", "--by", "film-review", "--max-new-tokens", "6", "--device", "cpu"]
    for model, out in (("run", "a.jsonl"), ("run/model", "b.jsonl")):
        assert label("--model", model, *options, "--out", out).exit_code == 0
    assert labels("a.jsonl") == labels("b.jsonl")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("nowhere.jsonl", "there is none at 'nowhere.jsonl'"),
        ("pairs.jsonl --out labels.csv", "--out must end in .jsonl, not 'labels.csv'"),
        ("pairs.jsonl --out pairs.jsonl", "--out must be another file"),
        ("pairs.jsonl --by film-review --by-judge a:b", "cannot be given together"),
        ("pairs.jsonl --annotator-temperature 1", "belongs to --by"),
        ("pairs.jsonl --by film-review --annotator-temperature -1", "must be 0 or above, not -1.0"),
        ("pairs.jsonl --model a", "cannot be given with --model or --prompts"),
        ("pairs.jsonl --num-pairs 0", "--num-pairs must be at least 1, not 0"),
        ("--model a --model b --model c", "once or twice, not 3 times"),
        ("--model a", "--prompts must be given with --model"),
        ("--temperature 0", "--temperature must be above 0"),
        ("--max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("pairs.jsonl --by film-reviw", "Did you mean 'film-review'?"),
        ("pairs.jsonl --by-judge no_such_module:judge", "--by-judge: "),
        ("pairs.jsonl --by-judge json:__name__", "must be a function judge(prompt, first, second), not a str"),
        ("bad.jsonl", "line 2 of 'bad.jsonl' must have the columns prompt and completions"),
        ("broken.jsonl", "line 1 of 'broken.jsonl' is not JSON"),
        ("same.jsonl", "no two different texts"),
        ("pairs.jsonl --out bad.jsonl", "--out bad.jsonl holds something else than labels"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments: str, sentence: str) -> None:
    write("bad.jsonl", [{"prompt": "x", "answers": []}] if "--out" in arguments else [ROWS[0], {"prompt": "x", "answers": []}])
    write("same.jsonl", [{"prompt": "x", "completions": ["a", "a"]}])
    Path("broken.jsonl").write_text("{\n")
    done = label(*arguments.split())
    assert done.exit_code == 2 and sentence in " ".join(done.output.split()), done.output
    assert done.output.count("\n") == 1 and not Path("labels.jsonl").exists()


def test_a_reward_that_reads_tokens_is_given_some(save_model) -> None:
    rows = [{"prompt": "x", "completions": ["a film", "a film that was very good"]}, {"prompt": "y", "completions": ["bad bad bad", "bad"]}]
    write("pairs.jsonl", rows)
    done = label("pairs.jsonl", "--by", "length")
    assert done.exit_code == 0, done.output
    assert [one.chosen for one in labels()] == ["a film that was very good", "bad bad bad"]
    save_model("characters", 0)
    write("pairs.jsonl", [{"prompt": "x", "completions": ["good good", "a b c d"]}])
    for tokens_of, longer in ((["--tokenizer", "characters"], "good good"), ([], "a b c d")):
        done = label("pairs.jsonl", "--by", "length", *tokens_of, "--out", f"{len(tokens_of)}.jsonl")
        assert done.exit_code == 0 and labels(f"{len(tokens_of)}.jsonl")[0].chosen == longer
    assert "--tokenizer belongs to --by" in label("pairs.jsonl", "--tokenizer", "characters").output


def test_pairs_that_are_left_out_are_counted() -> None:
    write("pairs.jsonl", [{"prompt": "x", "completions": ["a", "b", "b"]}, {"prompt": "x", "completions": ["b", "a"]}])
    done = label("pairs.jsonl", "--by", "length?unit=characters")
    assert "left out: 1 pairs of equal texts" in done.output and "left out: 2 pairs that are there already" in done.output
    assert len(labels()) == 1


@pytest.mark.filterwarnings("ignore:.*unknown to the tokenizer")  # which is not what this is about
def test_what_it_writes_trains_dpo_comments_and_all(textgym) -> None:
    rows = [{"prompt": f"the film was {i}", "completions": [" good.", " bad."]} for i in range(12)]
    write("pairs.jsonl", rows)
    assert label("pairs.jsonl", "--seed", "1", typed="c\nboth poor\na\n" + "a\n" * 11).exit_code == 0
    assert sum(isinstance(one, Comment) for one in labels()) == 1
    command = ["train", "dpo", "--preferences", "labels.jsonl", "--total-timesteps", "20", "--max-new-tokens", "4", "--device", "cpu"]
    assert textgym(*command, "--out", "run") == 0
    counts = json.loads(Path("run/config.json").read_text())
    assert '"left_out_rows": 1' in json.dumps(counts)
