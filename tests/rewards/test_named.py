"""Rewards by name, with options, in Python and as strings."""

import subprocess
import sys

import pytest

from textgym.rewards import (
    BleuReward,
    JsonReward,
    LengthReward,
    LexiconReward,
    RegexReward,
    RewardSet,
    RougeReward,
    make_reward,
    reward_names,
)
from textgym.rewards.resolve import resolve_reward

NEEDED = {"bert-score": {"model": "."}, "regex": {"pattern": "a"}}


@pytest.mark.parametrize("name", [name for name in reward_names() if name not in ("lexicon", "classifier")])
def test_every_name_makes_a_reward(name):
    reward = make_reward(name, **NEEDED.get(name, {}))
    assert RewardSet.build(reward).has_terminal
    assert name.startswith("film-review") or RewardSet.build(reward).names == (name,)


def test_lexicon_and_classifier(tmp_path):
    from textgym.bundled import bundled_reward_model_path

    (tmp_path / "words.tsv").write_text("good\t2\nbad\t-2\n", encoding="utf-8")
    lexicon = make_reward(f"lexicon?path={tmp_path / 'words.tsv'}&normalise=mean")
    assert isinstance(lexicon, LexiconReward) and lexicon(completions=["good, good, bad"]) == [pytest.approx(2 / 3)]
    named = make_reward(f"classifier?model={bundled_reward_model_path()}&batch_size=2")
    assert named(prompts=["the film"], completions=[" was good."]) == make_reward("film-review")(
        prompts=["the film"], completions=[" was good."]
    )


def test_options_in_python_and_in_strings():
    texts = {"completions": ["he testing"], "summary": ["he tested"]}
    assert make_reward("rouge-1", stemmer=True, column="summary")(**texts) == [1.0]
    assert make_reward("rouge-1?stemmer=true&column=summary")(**texts) == [1.0]
    assert make_reward("rouge-1?stemmer=true&column=summary", stemmer=False)(**texts) == [0.5]
    bleu, expected = make_reward("bleu?smoothing=floor&smooth_value=0.5"), BleuReward(smoothing="floor", smooth_value=0.5)
    texts = {"completions": ["a b c d x"], "reference": ["a b e f d"]}
    assert bleu(**texts) == expected(**texts) != BleuReward()(**texts)


def test_values_are_read_as_what_the_option_takes():
    length = make_reward("length?target=20&width=null&unit=words")
    assert isinstance(length, LengthReward) and (length.target, length.width, length.unit) == (20.0, 20.0, "words")
    regex = make_reward("regex?pattern=12:%26a=b&found=2")
    assert isinstance(regex, RegexReward) and regex.pattern.pattern == "12:&a=b" and regex.found == 2.0
    json = make_reward("json?required=name,age&fenced=true")
    assert isinstance(json, JsonReward) and json.required == ("name", "age") and json.fenced


def test_spelling_does_not_matter():
    for name in ("rouge-l", "rougeL", "ROUGE_L", "rouge-l?score=recall"):
        resolved, reward = resolve_reward(name)
        assert resolved == "rouge-l" and isinstance(reward, RougeReward)


def test_in_a_list_with_weights(make_batch):
    rewards = RewardSet.build(["bleu", "length", "length?target=4", "ngram-precision?n=2"], [1.0, -0.1, 2.0, 1.0])
    assert rewards.names == ("bleu", "length", "length_2", "ngram-precision")
    totals, parts = rewards.terminal(make_batch("abc", references=["abc"]))  # three letters and EOS
    assert {name: values.tolist() for name, values in parts.items()} == {
        "bleu": [pytest.approx(1.0)],
        "length": [4.0],
        "length_2": [1.0],
        "ngram-precision": [0.0],
    }
    assert totals.tolist() == [pytest.approx(1 - 0.4 + 2)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bleuu", "`reward` must be the name of a reward .*rouge-l.*, got 'bleuu'. Did you mean 'bleu'"),
        ("bleu?smooth=floor", "reward 'bleu' has no option `smooth`. Did you mean `smoothing`.* It has: column, smoothing"),
        ("film-review?x=1", "reward 'film-review' has no option `x`. It has none"),
        ("length?target=x", "reward 'length': `target` must be float or NoneType, got 'x'"),
        ("length?target", "options must have the form `name=value` with `&` between them.*, got 'target'"),
        ("length?width=3", "`width` is the distance from a `target`"),
        ("lexicon", r"reward 'lexicon' needs `path`: 'lexicon\?path=...'"),
    ],
)
def test_mistakes(spec, message):
    with pytest.raises(ValueError, match=message):
        RewardSet.build(spec)
    with pytest.raises(ValueError):
        make_reward(spec)


def test_a_folder_of_the_same_name_is_reached_with_its_path(tmp_path, monkeypatch):
    (tmp_path / "length").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_reward("length")[0] == "length"
    with pytest.raises(ValueError, match=r"holds no `config\.json`"):
        resolve_reward("./length")


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, textgym.rewards; heavy = {'torch', 'sacrebleu', 'rouge_score', 'nltk', 'math_verify', 'sympy', 'bert_score'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
