"""Rows of every form, how they are tokenised, and what is said about those that are wrong."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents.common.offline_batches import ExampleSet
from textgym.agents.common.offline_rows import Example, labelled_row, preference_row, read_examples, supervised_row
from textgym.agents.common.offline_tokens import TokenisedExample, tokenise
from textgym.agents.common.same_sides import check_sides
from textgym.feedback import Comparison, Label, Ranking, read_feedback, to_demonstrations, write_feedback

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
BAD = {"role": "assistant", "content": "no"}


@pytest.fixture
def ids(tokenizer):
    """Reads rows and returns (text of the prompt, texts of the completions with their special tokens)."""

    def read(source: Any, parse: Any = supervised_row, chat: bool = False, append_eos: bool = True) -> list[tuple[str, list[str]]]:
        tokenizer.chat_template = TEMPLATE if chat else None
        examples, where = read_examples(source, "examples", parse)
        rows = tokenise(examples, tokenizer, [tokenizer.eos_token_id], where, append_eos=append_eos)
        tokenizer.chat_template = None
        return [(tokenizer.decode(row.prompt), [tokenizer.decode(one) for one in row.completions]) for row in rows]

    return read


def test_prompt_and_completion(ids) -> None:
    assert ids([{"prompt": "ab", "completion": " c"}, {"prompt": "a", "completion": "b<eos>"}]) == [("ab", [" c<eos>"]), ("a", ["b<eos>"])]
    assert ids([{"prompt": "ab", "completion": "c"}], append_eos=False) == [("ab", ["c"])]
    assert ids([{"prompt": "ab", "completion": ""}]) == [("ab", ["<eos>"])]


def test_every_token_of_a_text_counts_but_the_first_which_nothing_predicts(ids) -> None:
    assert ids([{"text": "abc"}]) == [("a", ["bc<eos>"])]


def test_ids_are_taken_as_they_are(ids, tokenizer) -> None:
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert ids([{"prompt_ids": [a], "completion_ids": np.array([b, a])}]) == [("a", ["ba"])]
    assert ids([{"prompt_ids": [a], "chosen_ids": [b], "rejected_ids": [a]}], preference_row) == [("a", ["b", "a"])]
    assert ids([{"prompt_ids": [a], "completion_ids": [[b], [a], [b, b]]}], preference_row) == [("a", ["b", "a", "bb"])]


def test_ids_and_texts_may_stand_in_one_set_in_any_order(ids, tokenizer) -> None:
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    rows: list[dict[str, Any]] = [{"prompt_ids": [a], "completion_ids": [b]}, {"prompt": "b", "completion": "a"}]
    assert ids(rows) == [("a", ["b"]), ("b", ["a<eos>"])]
    assert ids(rows[::-1]) == [("b", ["a<eos>"]), ("a", ["b"])]


def test_conversations_go_through_the_chat_template_to_their_first_eos(ids) -> None:
    wanted = ("<user>hi<eos>\n<assistant>", ["yes<eos>"])
    # the tokenizer of the tests has no "<": it is unknown there, and decodes to "?"
    wanted = (wanted[0].replace("<user>", "?user?").replace("<assistant>", "?assistant?"), wanted[1])
    assert ids([{"messages": [USER, ANSWER]}], chat=True) == [wanted]
    assert ids([{"prompt": [USER], "completion": [ANSWER]}], chat=True) == [wanted]
    assert ids([{"prompt": [USER], "completion": "yes"}], chat=True) == [wanted]
    pair = (wanted[0], ["yes<eos>", "no<eos>"])
    assert ids([{"prompt": [USER], "chosen": [ANSWER], "rejected": [BAD]}], preference_row, chat=True) == [pair]
    assert ids([{"chosen": [USER, ANSWER], "rejected": [USER, BAD]}], preference_row, chat=True) == [pair]


def test_a_tokenizers_own_bos_stands_before_the_prompt_only(tokenizer) -> None:
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    with_bos = deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", with_bos.bos_token_id)])
    examples, where = read_examples([{"prompt": "a", "completion": "b"}, {"text": "ab"}], "examples", supervised_row)
    first, second = tokenise(examples, with_bos, [with_bos.eos_token_id], where, append_eos=True)
    bos, eos = with_bos.bos_token_id, with_bos.eos_token_id
    a, b = with_bos.convert_tokens_to_ids(["a", "b"])
    assert first == ([bos, a], [[b, eos]])
    assert second == ([bos], [[a, b, eos]])


def test_a_tokenizer_that_adds_a_space_of_its_own_adds_none_behind_a_prompt() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", "▁", "a", "b", "▁a", "▁b"])}, [("▁", "a"), ("▁", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    llama_like = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert llama_like(" a", add_special_tokens=False)["input_ids"] == llama_like("a", add_special_tokens=False)["input_ids"]
    # Mistral's way: the mark is prepended to a text that has one already
    from tokenizers import normalizers

    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    mistral_like = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert len(mistral_like(" a", add_special_tokens=False)["input_ids"]) == 2
    for kind in (llama_like, mistral_like):
        examples, where = read_examples([{"prompt": "b", "chosen": " a", "rejected": "a"}], "preferences", preference_row)
        (row,) = tokenise(examples, kind, [0], where, append_eos=True)
        assert row.completions == [[4, 0], [2, 0]]  # "▁a" and "a": the prompt goes on, no text begins


def test_a_completion_ends_at_its_first_end(ids) -> None:
    assert ids([{"prompt": "a", "completion": "b<eos>cd"}]) == [("a", ["b<eos>"])]
    assert ids([{"prompt": "a", "completion": "b<eos><eos>"}], append_eos=False) == [("a", ["b<eos>"])]
    pair = {"prompt": "a", "chosen": "b<eos>c", "rejected": "<eos>c"}
    assert ids([pair], preference_row) == [("a", ["b<eos>", "<eos>"])]
    assert ids([{"text": "ab<eos>cd"}]) == [("a", ["b<eos>cd<eos>"])]  # of a plain text all counts


def test_a_begun_answer_is_gone_on_with_in_every_algorithm(ids) -> None:
    begun, rest = [USER, {"role": "assistant", "content": "ye"}], {"role": "assistant", "content": "s"}
    wanted = "?user?hi<eos>\n?assistant?ye"
    assert ids([{"prompt": begun, "completion": [rest]}], chat=True) == [(wanted, ["s<eos>"])]
    assert ids([{"prompt": begun, "chosen": [rest], "rejected": [BAD]}], preference_row, chat=True) == [(wanted, ["s<eos>", "no<eos>"])]
    assert ids([{"prompt": begun, "completion": [rest], "label": True}], labelled_row, chat=True) == [(wanted, ["s<eos>"])]
    assert ids([Comparison(begun, [rest], [BAD])], preference_row, chat=True) == [(wanted, ["s<eos>", "no<eos>"])]


@pytest.mark.parametrize(
    ("parse", "row"),
    [
        (supervised_row, {"prompt": [USER], "completion": [ANSWER]}),
        (supervised_row, {"messages": [USER, ANSWER]}),
        (preference_row, {"prompt": [USER], "chosen": [ANSWER], "rejected": [BAD]}),
        (preference_row, {"chosen": [USER, ANSWER], "rejected": [USER, BAD]}),
        (labelled_row, {"prompt": [USER], "completion": [ANSWER], "label": True}),
        (preference_row, Comparison([USER], [ANSWER], [BAD], columns={"chat_template_kwargs": {"language": "latin"}})),
    ],
)
def test_columns_for_the_chat_template_reach_it(ids, tokenizer, monkeypatch, parse, row) -> None:
    monkeypatch.setitem(globals(), "TEMPLATE", "{{ language }}" + TEMPLATE)
    if isinstance(row, dict):
        row = {**row, "chat_template_kwargs": {"language": "latin"}}
    ((prompt, (answer, *_)),) = ids([row], parse, chat=True)
    assert prompt == "latin?user?hi<eos>\n?assistant?" and answer == "yes<eos>"


@pytest.mark.parametrize(
    ("parse", "row"),
    [
        (supervised_row, {"messages": [{"role": "system", "content": "x"}, USER, ANSWER]}),
        (preference_row, {"prompt": [{"role": "system", "content": "x"}, USER], "chosen": [ANSWER], "rejected": [BAD]}),
        (labelled_row, {"prompt": [{"role": "system", "content": "x"}, USER], "completion": [ANSWER], "label": False}),
    ],
)
def test_a_refusal_of_the_chat_template_names_the_row(ids, monkeypatch, parse, row) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    monkeypatch.setitem(globals(), "TEMPLATE", refusing + TEMPLATE)
    with pytest.raises(ValueError, match=r"row 0 of `examples`: the chat template refuses .* no system"):
        ids([row], parse, chat=True)


def test_preferences_labels_and_weights() -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "preference": 0.25, "weight": 2},
        {"prompt": "a", "completions": ["x", "y", "z"]},
    ]
    examples, _ = read_examples(rows, "preferences", preference_row)
    assert examples == [Example("a", ["b", "c"], 0.25, 2.0), Example("a", ["x", "y", "z"], 1.0, 1.0)]
    examples, _ = read_examples([{"prompt": "a", "completion": "b", "label": flag} for flag in (True, False)], "examples", labelled_row)
    assert [example.label for example in examples] == [1.0, 0.0]


def test_records_of_feedback_are_rows(tmp_path: Path) -> None:
    pair, label = Comparison([USER], [ANSWER], [BAD], 0.25, weight=2.0), Label("a", "b", False, weight=3.0)
    ranking = Ranking("a", ("x", "y", "z"), (2, 3, 1))
    wanted = [Example([USER], [[ANSWER], [BAD]], 0.25, 2.0), Example("a", ["z", "x", "y"], 1.0, 1.0)]
    assert read_examples([pair, ranking], "preferences", preference_row)[0] == wanted
    write_feedback(tmp_path / "a.jsonl", [pair, ranking])
    for source in (tmp_path / "a.jsonl", read_feedback(tmp_path / "a.jsonl")):
        assert read_examples(source, "preferences", preference_row)[0] == wanted
    assert read_examples([label], "examples", labelled_row)[0] == [Example("a", ["b"], 0.0, 3.0)]
    rows = to_demonstrations([pair, ranking, label])
    assert read_examples(rows, "examples", supervised_row)[0] == [Example([USER], [[BAD]], 1.0, 2.0), Example("a", ["z"], 1.0, 1.0)]


def test_ranks_and_signs_are_read(ids) -> None:
    ranked = {"prompt": "a", "completions": ["x", "y", "z"], "rank": [3, 1, 2]}
    assert read_examples([ranked], "preferences", preference_row)[0] == [Example("a", ["y", "z", "x"], 1.0, 1.0)]
    two = {"prompt": "a", "completions": ["x", "y"], "ranks": [2, 1], "preference": 0.75}
    assert read_examples([two], "preferences", preference_row)[0] == [Example("a", ["y", "x"], 0.75, 1.0)]
    signs = [{"prompt": "a", "completion": "b", "label": label} for label in (1, -1)]
    assert [example.label for example in read_examples(signs, "examples", labelled_row)[0]] == [1.0, 0.0]


def test_sources(ids, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    datasets = pytest.importorskip("datasets")
    for source in (tmp_path / "rows.jsonl", str(tmp_path / "rows.jsonl.gz"), datasets.Dataset.from_list(rows)):
        assert ids(source) == ids(rows)


@pytest.mark.parametrize(
    ("parse", "rows", "said"),
    [
        (supervised_row, [], "`examples` must hold at least one example"),
        (supervised_row, 3, "`examples` must be a list of dicts"),
        (supervised_row, ["text"], r"row 0 of `examples` must be a dict"),
        (
            supervised_row,
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "answer": "b"}],
            r"row 1 of `examples` must have the columns",
        ),
        (supervised_row, [{"prompt": "a", "completion": 3}], r"`completion` of row 0"),
        (supervised_row, [{"prompt": "a", "completion": [USER]}], "one assistant message"),
        (supervised_row, [{"messages": [ANSWER, USER]}], "last one the assistant's"),
        (supervised_row, [{"text": 3}], "`text` of row 0"),
        (supervised_row, [{"prompt_ids": [], "completion_ids": [1]}], "`prompt_ids` of row 0"),
        (supervised_row, [{"prompt_ids": [1], "completion_ids": ["x"]}], "`completion_ids` of row 0"),
        (supervised_row, [{"prompt_ids": [1], "completion_ids": [1000]}], r"row 0 of `examples` must have ids from 0 to"),
        (supervised_row, [{"text": "a", "weight": -1}], "`weight` of row 0"),
        (supervised_row, [{"text": "a", "weight": 0}], "at least one row with a `weight` above 0"),
        (supervised_row, [{"prompt": "", "completion": "b"}], "the prompt of row 0"),
        (supervised_row, [{"prompt": "a", "completion": [ANSWER]}], "no conversation"),
        (supervised_row, [{"messages": [USER, ANSWER]}], "no chat template"),
        (preference_row, [{"chosen": "a b", "rejected": "a c"}], "put what `chosen` and `rejected` begin with"),
        (preference_row, [{"chosen": [USER, ANSWER], "rejected": [ANSWER]}], "must begin with the same message"),
        (preference_row, [{"prompt": "a", "completions": ["b"]}], "at least two completions"),
        (preference_row, [{"prompt": "a", "completions": ["b", "c", "d"], "preference": 0.5}], "a ranking of 3"),
        (preference_row, [{"prompt": "a", "chosen": "b", "rejected": "c", "preference": 1.5}], "`preference` of row 0"),
        (preference_row, [{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1]}], r"ties in \[1, 1\].*to_comparisons"),
        (
            preference_row,
            [{"prompt": "a", "completions": ["b", "c"], "rank": None, "comparisons": [{"i": 0, "j": 1, "z": 1}]}],
            "must be a comparison or a ranking, got a judgements.*to_comparisons",
        ),
        (preference_row, [Label("a", "b", True)], "row 0 of `examples` must be a comparison or a ranking, got a label"),
        (labelled_row, [Comparison("a", "b", "c")], "row 0 of `examples` must be a label, got a comparison.*to_labels"),
        (supervised_row, [Label("a", "b", True)], "row 0 of `examples` must be a demonstration, got a label.*to_demonstrations"),
        (labelled_row, [{"prompt": "a", "completion": "b"}], "must have the columns label"),
        (labelled_row, [{"prompt": "a", "completion": "b", "label": "good"}], "`label` of row 0"),
    ],
)
def test_what_is_wrong_is_named_with_its_row(ids, parse, rows, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ids(rows, parse)


def test_a_row_of_a_file_is_named_with_the_file(ids, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "a"}\n')
    with pytest.raises(ValueError, match=r"row 1 of '.*mine\.jsonl'"):
        ids(path)


def test_a_completion_without_tokens_is_an_error(ids) -> None:
    with pytest.raises(ValueError, match="at least one token in the prompt"):
        ids([{"prompt": "a", "completion": ""}], append_eos=False)


def example_set() -> ExampleSet:
    tokens = [
        TokenisedExample([5], [[6, 7], [8]]),
        TokenisedExample([5], [[8], [6, 7], [9, 9, 9]]),
        TokenisedExample([4, 5], [[6, 7], [8]]),
    ]
    return ExampleSet([Example("", [], 1.0, weight) for weight in (1.0, 3.0, 2.0)], tokens)


def test_each_completion_is_stored_once() -> None:
    data = example_set()
    assert data.num_completions == 5
    assert data.index.tolist() == [[0, 1, -1], [1, 0, 2], [3, 4, -1]]
    assert data.num_tokens.tolist() == [3, 6, 3]
    assert data.weights.tolist() == [0.5, 1.5, 1.0]
    assert data.longest == 4


def test_batches_hold_what_their_examples_need() -> None:
    data = example_set()
    data.reference_log_probs = torch.arange(5.0)
    batch = data.select(torch.tensor([2, 0]), torch.device("cpu"))
    assert batch.places.shape == (2, 2) and batch.present.all()
    assert batch.gather(batch.reference_log_probs).tolist() == [[3.0, 4.0], [0.0, 1.0]]
    assert batch.weights.tolist() == [1.0, 0.5]
    assert batch.completions.prompt_ids.tolist() == [[0, 5], [0, 5], [4, 5], [4, 5]]
    assert batch.completions.completion_ids.tolist() == [[6, 7], [8, 0], [6, 7], [8, 0]]
    assert batch.completions.completion_mask.tolist() == [[True, True], [True, False]] * 2
    ranking = data.select(torch.tensor([0, 1]), torch.device("cpu"))
    assert ranking.present.tolist() == [[True, True, False], [True, True, True]]
    assert len(ranking.completions) == 3


def test_fingerprints_tell_data_apart() -> None:
    assert example_set().fingerprint() == example_set().fingerprint()
    other = ExampleSet([Example("", [])], [TokenisedExample([5], [[6, 7], [9]])])
    assert other.fingerprint()["checksum"] != example_set().fingerprint()["checksum"]


def test_rows_whose_sides_are_the_same_are_found() -> None:
    tokens = [
        TokenisedExample([5], [[6, 7], [6, 7]]),
        TokenisedExample([5], [[6, 7], [6, 7], [6, 7]]),
        TokenisedExample([5], [[6, 7], [6, 7], [8]]),
        TokenisedExample([5], [[6, 7]]),
        TokenisedExample([4], [[6, 7], [8]]),
    ]
    assert ExampleSet([Example("", [])] * 5, tokens).same_sides().tolist() == [True, True, False, False, False]


def test_the_same_sides_are_counted_once_and_all_are_refused() -> None:
    names = [f"row {number} of `preferences`" for number in range(9)]
    same = np.array([True, False, True, True, True, True, True, False, True])
    with pytest.warns(UserWarning, match=r"7 of 9 rows of `preferences` .* \(row 0 of `preferences`, row 2 .* and 2 more\)") as said:
        check_sides(same, names, "preferences")
    assert len(said) == 1
    check_sides(~np.ones(9, dtype=bool), names, "preferences")
    check_sides(np.zeros(0, dtype=bool), [], "preferences")
    with pytest.raises(ValueError, match="answers of every row are the same tokens"):
        check_sides(np.ones(9, dtype=bool), names, "preferences")
