"""JSON validity: what the RFC allows, which keys are there, and schemas where jsonschema is installed."""

import pytest

from textgym.rewards import JsonReward
from textgym.rewards import references as references_module


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": [1, 2.5e3, null, true]}', True),
        (' "text"\n', True),
        ("3", True),
        ("", False),
        ("{'a': 1}", False),
        ('{"a": 1} and more', False),
        ('{"a": NaN}', False),
        ("[-Infinity]", False),
        ("[" * 100_000, False),
        ("1" * 4301, True),
        ('{"a": -' + "1" * 9000 + "}", True),
        ("{}\r\n\t ", True),
        ("\u00a0{}", False),
        ("{}\u2028", False),
        ("\ufeff{}", False),
        ("\x0c{}", False),
        ('```json\n{"a": 1}\n```', False),
    ],
)
def test_validity(text, valid):
    assert JsonReward()(completions=[text]) == [float(valid)]
    assert JsonReward(valid=0.5, invalid=-2)(completions=[[{"role": "assistant", "content": text}]]) == [0.5 if valid else -2.0]


def test_required_keys():
    reward = JsonReward(["a", "b"])
    assert reward(completions=['{"a": 1, "b": null}', '{"a": 1}', '["a", "b"]', "1"]) == [1.0, 0.0, 0.0, 0.0]


def test_fenced_blocks():
    fenced = JsonReward(fenced=True)
    assert fenced(completions=["```json\r\n{}\r\n```", "```JSON\n{}\n```", "```Json \n{}\n```", "```\r\n{}\r\n```"]) == [1.0] * 4
    texts = ['```json\n{"a": 1}\n```', "```\n1\n```", "1", "```python\n1\n```", "```json 1```", "```json\n{\n```"]
    assert fenced(completions=texts) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match=r"`required` must be a list of keys, got the string 'a'; did you mean \['a'\]"):
        JsonReward("a")
    monkeypatch.setattr(references_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package jsonschema, which is not installed: pip install jsonschema"):
        JsonReward(schema={"type": "object"})


def test_schemas(tmp_path):
    pytest.importorskip("jsonschema")
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {"age": {"type": "integer"}}}', encoding="utf-8")
    reward = JsonReward(schema=tmp_path / "schema.json")
    assert reward(completions=['{"age": 3}', '{"age": "3"}', "[]"]) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="`schema` must be a JSON schema"):
        JsonReward(schema={"type": 3})


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "https://example.org/x.json"},
        {"properties": {"a": {"$ref": "#/$defs/b"}}},
        {"anyOf": [{"type": "null"}, {"items": {"$ref": "other.json"}}]},
        {"$ref": "#/x", "x": {"$ref": "#/y"}},
        {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"b": {"not": {"$ref": "#/definitions/c"}}}},
    ],
    ids=["remote", "property", "inside a list", "behind another", "draft 7"],
)
def test_a_reference_to_nothing_is_an_error_at_once(schema):
    pytest.importorskip("jsonschema")
    with pytest.raises(ValueError, match=r"`schema` must hold everything that it refers to; nothing is there for the `\$ref` '"):
        JsonReward(schema=schema)


def test_references_that_are_there():
    pytest.importorskip("jsonschema")
    inside = JsonReward(schema={"$defs": {"b": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/b"}}})
    assert inside(completions=['{"a": 1}', '{"a": "1"}', '{"a": ' + "1" * 5000 + "}"]) == [1.0, 0.0, 1.0]
    anchored = JsonReward(schema={"$id": "https://a.b/c", "$defs": {"d": {"$anchor": "q", "type": "string"}}, "items": {"$ref": "#q"}})
    assert anchored(completions=['["a"]', "[1]"]) == [1.0, 0.0]
    assert JsonReward(schema={"$ref": "https://json-schema.org/draft/2020-12/schema"})(completions=['{"type": 3}']) == [0.0]


def test_no_text_ends_a_run():
    pytest.importorskip("jsonschema")
    assert JsonReward(schema={"multipleOf": 0.1})(completions=["1" * 5000]) == [0.0]
    assert JsonReward(schema={"items": {"$ref": "#"}})(completions=["[" * 900 + "]" * 900]) in ([0.0], [1.0])
