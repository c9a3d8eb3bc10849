"""Chat templates: what goes into them beside the messages, answers that are begun, and what they refuse."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textgym.conversations import answered, conversation_text, row_columns, template_columns, with_template_columns
from textgym.prompts import PromptSet, encode_prompts

WORDS = ["<unk>", "</s>", "[u]", "[a]", "the", "film", "story", "was", "good", "docs:", "7", "be", "kind", ".", "tools:", "and"]
TEMPLATE = (
    "{% for tool in tools or [] %}tools: {{ tool['function']['name'] }} {% endfor %}"
    "{% for document in documents or [] %}docs: {{ document['text'] }} {% endfor %}"
    "{{ style ~ ' ' if style else '' }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'assistant') != (loop.index0 % 2 == 1) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "[{{ m['role'][0] }}] {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}[a] {% endif %}"
)
USER, SYSTEM = {"role": "user", "content": "the film"}, {"role": "system", "content": "be kind"}
BEGUN, REST = {"role": "assistant", "content": "was"}, {"role": "assistant", "content": " good"}
TOOL = {"type": "function", "function": {"name": "story", "description": "", "parameters": {}}}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text(tokenizer: Any, messages: Any = (USER,), as_prompt: bool = True, **columns: Any) -> str:
    return conversation_text(tokenizer, list(messages), "row 3", as_prompt=as_prompt, columns=columns)


def test_what_a_row_holds_for_its_template_gets_there(tokenizer) -> None:
    assert text(tokenizer) == "[u] the film </s> [a] "
    for tools in ([TOOL], '[{"function": {"name": "story"}}]'):
        assert text(tokenizer, tools=tools) == "tools: story [u] the film </s> [a] "
    assert text(tokenizer, documents=[{"title": "", "text": "7"}]) == "docs: 7 [u] the film </s> [a] "
    assert text(tokenizer, chat_template_kwargs={"style": "kind", "other": None}) == "kind [u] the film </s> [a] "
    assert text(tokenizer, chat_template_kwargs='{"style": "kind"}').startswith("kind")
    for nothing in ({"tools": []}, {"tools": None}, {"tools": ""}, {"chat_template_kwargs": {}}, {"answer": 7}):
        assert text(tokenizer, **nothing) == text(tokenizer)


def test_a_template_that_does_not_read_a_column_leaves_it_to_the_rewards(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"`tools` of row 3 .* list of JSON schemas, got \['hammer'\]"):
        text(tokenizer, tools=["hammer"])
    with pytest.raises(ValueError, match=r"`documents` of row 3 .* list of dicts"):
        text(tokenizer, documents=["a text"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert text(tokenizer, tools=["hammer"], documents=["a text"]) == "the film"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["style"], r"must be a dict of arguments of the chat template, got \['style'\]"),
        ({"tokenize": True}, "must not hold tokenize"),
        ({"add_generation_prompt": False, "padding": True}, "must not hold add_generation_prompt, padding"),
    ],
)
def test_arguments_that_are_none(tokenizer, arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"`chat_template_kwargs` of row 3 {said}"):
        text(tokenizer, chat_template_kwargs=arguments)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([SYSTEM, USER], "roles system, user: System role not supported; .* in front of the first user message"),
        ([USER, USER], "Conversation roles must alternate; .* join messages of one role"),
        ([{"role": "assistant", "content": "x"}, USER, BEGUN], "Conversation roles must alternate"),
    ],
)
def test_a_refusal_of_the_template_names_the_row_its_reason_and_a_cure(tokenizer, messages: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^row 3: the chat template refuses .* {said}"):
        text(tokenizer, messages)
    with pytest.raises(ValueError, match=f"^row 1 of `prompts`: .* {said}"):
        PromptSet([[USER], messages], tokenizer)


def test_whatever_the_template_runs_into_is_an_error_with_the_row(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(ValueError, match=r"row 3: the chat template refuses the conversation of the roles user: .*str"):
        text(tokenizer)


def test_an_answer_goes_on_with_a_begun_message() -> None:
    assert answered([USER], [REST]) == [USER, REST]
    assert answered([USER, BEGUN], [REST]) == [USER, {"role": "assistant", "content": "was good"}]
    assert answered([USER, BEGUN], [REST, USER]) == [USER, {"role": "assistant", "content": "was good"}, USER]
    assert answered([USER, BEGUN], [USER]) == [USER, BEGUN, USER]
    parts = {"role": "assistant", "content": [{"type": "text", "text": "was"}]}
    for first, second in ((parts, REST), (BEGUN, {**REST, "content": [{"type": "text", "text": " good"}]})):
        assert answered([USER, first], [second])[-1]["content"] == [{"type": "text", "text": "was good"}]
    called = {"role": "assistant", "content": None, "tool_calls": [1]}
    assert answered([USER, called], [REST])[-1] == {"role": "assistant", "content": " good", "tool_calls": [1]}


def test_columns_of_rows() -> None:
    columns = {"tools": [[TOOL], None], "answer": [1, 2]}
    assert template_columns(columns) == {"tools": columns["tools"]}
    assert [row_columns(columns, row) for row in (0, 1)] == [{"tools": [TOOL]}, {}]
    assert row_columns(None, 0) == {}
    assert with_template_columns(["a", "b"], columns) == [{"prompt": "a", "tools": [TOOL]}, {"prompt": "b"}]
    assert with_template_columns(["a"], {"answer": [1]}) == ["a"]


def test_prompts_of_an_environment_get_their_columns(tokenizer) -> None:
    prompts = PromptSet(
        [{"prompt": [USER], "tools": [TOOL], "answer": "x"}, {"prompt": [USER]}, {"prompt": "the film", "tools": [TOOL]}], tokenizer
    )
    assert [tokenizer.decode(ids) for ids in prompts.ids] == ["tools: story [u] the film </s> [a]", "[u] the film </s> [a]", "the film"]
    assert prompts.columns["tools"] == [[TOOL], None, [TOOL]]  # and the rewards do too
    (ids,) = encode_prompts(tokenizer, [[USER]], columns={"tools": [[TOOL]]})
    assert ids.tolist() == prompts.ids[0].tolist()
