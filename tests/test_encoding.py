"""What is trained on is what stands behind the prompt: completions of every kind of tokenizer, and special tokens that are there once."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from textgym.encoding import completion_offsets, encode_beginnings, encode_completions, encode_whole
from textgym.tokenizers import decode_completions

CORPUS = [
    "Hello, how are you? The sky is blue. Answer: 4\n<|user|>\n<|assistant|>\n 0123456789",
    "it's a film, but good. the film was good and we saw it",
] * 9
SPECIAL = ["<unk>", "<s>", "</s>"]
SPACE, ALPHABET = "▁", pre_tokenizers.ByteLevel.alphabet()


def bpe(pre_tokenizer: Any = None, normalizer: Any = None, decoder: Any = None, alphabet: Any = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=None if alphabet else "<unk>"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL, show_progress=False, initial_alphabet=list(alphabet))
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace(scheme: str, split: bool) -> Tokenizer:
    how = {"prepend_scheme": scheme, "split": split}
    return bpe(pre_tokenizers.Metaspace(**how), decoder=decoders.Metaspace(**how))


def normalised(*, prepend: bool) -> Tokenizer:
    """Llama 2, TinyLlama and the first Mistral (`prepend`); Gemma."""
    parts = [normalizers.Prepend(SPACE)] * prepend + [normalizers.Replace(" ", SPACE)]
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *[decoders.Strip(" ", 1, 0)] * prepend]
    return bpe(normalizer=normalizers.Sequence(parts), decoder=decoders.Sequence(back))


def byte_level(*, add_prefix_space: bool) -> Tokenizer:
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space), decoder=decoders.ByteLevel(), alphabet=ALPHABET)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"vocab_size": 150, "special_tokens": SPECIAL, "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(**options))
    return tokenizer


def word_piece(*, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=SPECIAL, show_progress=False))
    return tokenizer


def whole_words() -> Tokenizer:
    words = [*SPECIAL, *["the", "film", "was", "good", "bad", ".", ","]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    given = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)


EXACT = {
    "Metaspace, first": fast(metaspace("first", False)),
    "Metaspace, first, split": fast(metaspace("first", True)),
    "Metaspace, always": fast(metaspace("always", False)),
    "Metaspace, always, split": fast(metaspace("always", True)),
    "Metaspace, never": fast(metaspace("never", True)),
    "Llama 2": fast(normalised(prepend=True)),
    "Gemma": fast(normalised(prepend=False)),
    "byte-level": fast(byte_level(add_prefix_space=False)),
    "byte-level with a space in front": fast(byte_level(add_prefix_space=True)),
    "Unigram": fast(unigram()),
}
KINDS = {
    **EXACT,
    "WordPiece": fast(word_piece(lowercase=False)),
    "WordPiece, lower case": fast(word_piece(lowercase=True)),
    "whole words": fast(whole_words()),
}


def read(tokenizer: Any, prompt: str, completion: str) -> tuple[str, list[str]]:
    """How a completion reads behind its prompt, and its tokens."""
    ids = encode_beginnings(tokenizer, [prompt])
    (own,) = encode_completions(tokenizer, ids, [completion])
    return decode_completions(tokenizer, ids, [own])[0], tokenizer.convert_ids_to_tokens(own)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Answer:", "4"),
        ("Answer:\n", "The sky"),
        ("the film", " was good"),
        ("the film", ", but"),
        ("it", "'s good"),
        ("it", "\n\nHello"),
        ("the film", "was good"),
        ("a ", "film"),
        ("a  ", " film"),
        ("Hello.", " Hello  you"),
        ("Hello\n", "\n  12"),
    ],
)
def test_a_completion_reads_as_it_is_written(kind: str, prompt: str, completion: str) -> None:
    assert read(EXACT[kind], prompt, completion)[0] == completion


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.text("aeo .,:4\nH'", min_size=1, max_size=7), st.text("aeo .,:4\nH'", min_size=1, max_size=9))
def test_any_completion_reads_as_it_is_written_and_has_the_tokens_of_the_joint_text(kind: str, prompt: str, completion: str) -> None:
    tokenizer = EXACT[kind]
    (before,), (whole,) = (encode_beginnings(tokenizer, [text]) for text in (prompt, prompt + completion))
    (own,) = encode_completions(tokenizer, [before], [completion])
    if decode_completions(tokenizer, [()], [before])[0].strip(" "):  # a text of spaces alone is none to some, and a text begins
        assert decode_completions(tokenizer, [before], [own]) == [completion]
    if whole[: len(before)] == before and decode_completions(tokenizer, [before], [whole[len(before) :]]) == [completion]:
        alternatives = [whole[len(before) :], tokenizer(completion, add_special_tokens=False)["input_ids"]]
        assert own in alternatives


@pytest.mark.parametrize(
    ("kind", "prompt", "completion", "tokens"),
    [
        ("Metaspace, first, split", "Answer:", "4", ["4"]),
        ("Llama 2", "Answer:", "4", ["4"]),
        ("Llama 2", "Answer:", " 4", ["▁", "4"]),
        ("Gemma", "the film", "was good", ["was▁", "goo", "d"]),
        ("byte-level with a space in front", "the film", "was good", ["w", "as", "Ġgood"]),
        ("Unigram", "the film", " was", ["▁w", "as"]),
        ("WordPiece", "the film", "was good", ["##w", "##a", "##s", "good"]),  # "the filmwas good"
        ("WordPiece", "the film", " was good", ["was", "good"]),
        ("WordPiece", "the film", ", but", [",", "but"]),  # which it always writes with spaces
        ("WordPiece, lower case", "the film", " Was good", ["was", "good"]),
        ("whole words", "the film", "was good", ["was", "good"]),  # a joint without a space it cannot write at all
        ("whole words", "the film", "", []),
    ],
)
def test_by_hand(kind: str, prompt: str, completion: str, tokens: list[str]) -> None:
    assert read(KINDS[kind], prompt, completion)[1] == tokens


def test_prompts_keep_their_tokens_and_none_stands_across_the_joint() -> None:
    tokenizer = EXACT["Gemma"]
    (prompt,) = encode_beginnings(tokenizer, ["the fi"])
    (whole,) = encode_beginnings(tokenizer, ["the film"])
    (own,) = encode_completions(tokenizer, [prompt], ["lm"])
    assert whole[: len(prompt)] != prompt  # "film" is a token
    assert decode_completions(tokenizer, [prompt], [own]) == ["lm"]


def test_what_cannot_be_written_is_said_once() -> None:
    before = [SPACE, "c", ":", "\n", "a", "1", "."]
    pieces = ["<unk>", "b", *before, *(one + "b" for one in before)]  # "b" alone stands behind nothing
    merging = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [(one, "b") for one in before], unk_token="<unk>"))
    merging.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    merging.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, unk_token="<unk>")
    prompts = encode_beginnings(tokenizer, ["c", "c"])
    with pytest.warns(UserWarning, match="2 of 2 completions cannot be written .* 'b' reads ' b'") as said:
        assert encode_completions(tokenizer, prompts, ["b", "b"]) == [tokenizer("b")["input_ids"]] * 2
    assert len(said) == 1


def test_a_tokenizer_that_refuses_unknown_words_is_asked_for_none() -> None:
    words = Tokenizer(models.WordLevel({"w0": 0, "w1": 1}, unk_token=None))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert encode_completions(tokenizer, [[0]], ["w1 w0"]) == [[1, 0]]
    assert completion_offsets(tokenizer, [0], "w1 w0", [0, 0]) is None


def test_a_text_begins_as_the_tokenizer_begins_texts() -> None:
    for kind, expected in (("Llama 2", "Hello"), ("Metaspace, first", "Hello"), ("byte-level with a space in front", " Hello")):
        assert read(EXACT[kind], "<s>", "Hello")[0] == expected


@pytest.mark.parametrize("kind", EXACT)
def test_offsets_are_those_of_the_completion(kind: str) -> None:
    tokenizer = EXACT[kind]
    for prompt, completion in (("Answer:", "the film was good"), ("the film", " was good, but"), ("Answer:\n", "4 good 4")):
        (before,) = encode_beginnings(tokenizer, [prompt])
        (own,) = encode_completions(tokenizer, [before], [completion])
        offsets = completion_offsets(tokenizer, before, completion, own)
        assert offsets is not None and len(offsets) == len(own)
        for count, (_, last) in enumerate(offsets, start=1):
            assert decode_completions(tokenizer, [before], [own[:count]])[0].strip() == completion[:last].strip()
        assert offsets[-1][1] == len(completion)
        assert completion_offsets(tokenizer, before, completion, own[:1]) == offsets[:1]
    assert completion_offsets(tokenizer, before, "good", own) is None


def with_special(single: str, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer = metaspace("first", True)
    ids = [(token, tokenizer.token_to_id(token)) for token in SPECIAL]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[one for one in ids if one[0] in single])
    return fast(tokenizer, **options)


def test_a_bos_that_stands_in_the_text_is_not_put_there_again() -> None:
    tokenizer = with_special("<s> $A")
    plain = tokenizer("the film", add_special_tokens=False)["input_ids"]
    once, written, twice, later = encode_beginnings(tokenizer, ["the film", "<s>the film", "<s><s>the film", "the <s>film"])
    assert once == [1, *plain] and written[0] == 1 and written.count(1) == 1
    assert twice[:2] == [1, 1] and twice.count(1) == 2  # what the user wrote
    assert later.count(1) == 2
    assert encode_beginnings(with_special("$A"), ["<s>the film", "the film"]) == [written, plain]
    assert encode_beginnings(tokenizer, []) == []


def test_several_special_tokens_in_front_and_one_behind() -> None:
    tokenizer = with_special("<unk> <s> $A </s>")
    whole, written = encode_whole(tokenizer, ["good", "<unk><s>good"])
    assert whole[:2] == [0, 1] and whole[-1] == 2
    assert written[:2] == [0, 1] and written[2] != 0 and written[-1] == 2 and written.count(1) == 1
    assert encode_beginnings(tokenizer, ["good", "<unk><s>good"]) == [whole[:-1], written[:-1]]
    assert encode_beginnings(tokenizer, ["good</s>"])[0][-1] == 2  # the user's own end
