"""The law of completions as text: the text of a prompt with that of its completion is the text of the whole."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textgym.tokenizers import UNFINISHED, common_length, decode, decode_completions, prompt_ends

SPELT = " aé€😀"  # characters of one to four bytes
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def fast(model: Any, decoder: Any, **options: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(model)
    if decoder is not None:
        words.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=words, **{"bos_token": "<s>", "eos_token": "</s>", **options})


def byte_level() -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "</s>", *symbols, *(BYTES.pre_tokenize_str(text)[0][0] for text in (" time", "me", "é!", "to 語"))]
    tokenizer = fast(models.BPE({piece: index for index, piece in enumerate(pieces)}, []), decoders.ByteLevel())
    tokenizer.backend_tokenizer.pre_tokenizer = BYTES
    return tokenizer


def spelt_in_bytes(*, strip: bool, **options: Any) -> PreTrainedTokenizerFast:
    """Llama 2 (`strip`) and Gemma."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁time", "me", "▁▁", "é", "▁to"]
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *[decoders.Strip(" ", 1, 0)] * strip]
    return fast(models.BPE({piece: index for index, piece in enumerate(pieces)}, []), decoders.Sequence(parts), **options)


def of_words(decoder: Any, words: str, **options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", *words.split()])}
    return fast(models.WordLevel(vocabulary, unk_token="</s>"), decoder, **options)


PIECES = "time ##me ##. . , ' s n't 've a ?"
TOKENIZERS = {
    "byte-level": byte_level(),
    "Llama": spelt_in_bytes(strip=True),
    "Llama, cleaned": spelt_in_bytes(strip=True, clean_up_tokenization_spaces=True),  # which transformers declines to do for BPE
    "Gemma": spelt_in_bytes(strip=False),
    "Metaspace": of_words(decoders.Metaspace(), "▁ ▁time me ▁to ▁▁ . ▁a▁b"),
    "WordPiece": of_words(decoders.WordPiece(), PIECES),
    "WordPiece, cleaned": of_words(decoders.WordPiece(cleanup=False), PIECES, clean_up_tokenization_spaces=True),
    "word level": of_words(None, "time to . a"),
    "word level, cleaned": of_words(None, "time ' . s n't", clean_up_tokenization_spaces=True),
    "put end to end": of_words(decoders.Fuse(), "▁time to . a"),
    "ends of words": of_words(decoders.BPEDecoder(), "time</w> to a</w> .</w>"),
    "unknown": of_words(decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), "a b c ab"),
    "CTC": of_words(decoders.CTC(), "a b <pad> |"),
}
IN_BYTES = ("Llama", "Llama, cleaned", "Gemma")
LOCAL = ("byte-level", *IN_BYTES, "Metaspace", "WordPiece", "word level", "put end to end")
EXACT = ("Metaspace", "WordPiece", "word level", "put end to end", "ends of words", "CTC")  # of any ids; the others: of whole characters
every = pytest.mark.parametrize("kind", TOKENIZERS)


def usable(kind: str) -> list[int]:
    """The ids that a test draws from: of the bytes only those of a few characters, so that they often make one."""
    tokenizer = TOKENIZERS[kind]
    if kind in IN_BYTES:
        kept = {*spelt(*SPELT.encode()), "<0xFF>"}
        return [index for piece, index in tokenizer.get_vocab().items() if not piece.startswith("<0x") or piece in kept]
    if kind == "byte-level":
        kept = set(BYTES.pre_tokenize_str(SPELT)[0][0])
        return [index for piece, index in tokenizer.get_vocab().items() if len(piece) > 1 or piece in kept]
    return sorted(tokenizer.get_vocab().values())


def text(kind: str, prompt: list[int], completion: list[int]) -> str:
    return decode_completions(TOKENIZERS[kind], [prompt], [completion])[0]


@every
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_prompt_and_completion_make_the_text_of_the_whole(kind: str, data: st.DataObject) -> None:
    ids = st.lists(st.sampled_from(usable(kind)), max_size=9)
    prompt, completion = data.draw(ids), data.draw(ids)
    tokenizer, own = TOKENIZERS[kind], text(kind, prompt, completion)
    before, whole, alone = decode(tokenizer, [prompt, [*prompt, *completion], completion])
    if whole.startswith(before):
        assert before + own == whole
    elif before.endswith(UNFINISHED):  # the completion finishes a character: whole and prompt differ from there on
        assert whole[: common_length(before, whole)] + own == whole
    else:  # the completion would spoil the prompt's text
        assert own == alone
        assert kind in (*IN_BYTES, "WordPiece, cleaned", "word level, cleaned", "unknown")
    assert whole.startswith(before) or kind not in EXACT
    if kind in ("byte-level", *IN_BYTES) and UNFINISHED not in whole:
        assert whole.startswith(before) or before.endswith(UNFINISHED)
    assert not (set(tokenizer.all_special_tokens) & set(own.split()))


@every
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_end_of_a_prompt_is_enough(kind: str, data: st.DataObject) -> None:
    ids = st.lists(st.sampled_from(usable(kind)), max_size=14)
    prompt, completion = data.draw(ids), data.draw(ids)
    (end,) = prompt_ends(TOKENIZERS[kind], [prompt])
    assert end == prompt[len(prompt) - len(end) :]
    assert prompt_ends(TOKENIZERS[kind], [end]) == [end]
    assert prompt_ends(TOKENIZERS[kind], [np.array(prompt, dtype=np.int64)]) == [end]
    assert text(kind, end, completion) == text(kind, prompt, completion)


@every
def test_long_prompts_are_not_decoded_where_their_end_tells_enough(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    common = [index for piece, index in tokenizer.get_vocab().items() if piece in ("me", "##me", "to", ".", "a")]
    prompt = [common[0]] * 50
    (end,) = prompt_ends(tokenizer, [prompt])
    assert len(end) == (0 if kind == "put end to end" else 3 if kind in LOCAL else 50)
    (end,) = prompt_ends(tokenizer, [[*prompt, *[tokenizer.eos_token_id] * 5]])  # special tokens have no text
    assert len(end) == (0 if kind == "put end to end" else 8 if kind in LOCAL else 55)


@every
def test_a_batch_is_its_rows(kind: str) -> None:
    rng = np.random.default_rng(0)
    ids = usable(kind)
    prompts = [rng.choice(ids, length).tolist() for length in (0, 1, 7, 7, 7)]
    prompts[3] = prompts[2]
    completions = [rng.choice(ids, length).tolist() for length in (4, 0, 5, 6, 7)]
    one_by_one = [text(kind, prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    assert decode_completions(TOKENIZERS[kind], prompts, completions) == one_by_one
    assert one_by_one[1] == ""
    assert decode_completions(TOKENIZERS[kind], [], []) == []


def ids_of(kind: str, *pieces: str) -> list[int]:
    return [TOKENIZERS[kind].get_vocab()[piece] for piece in pieces]


def spelt(*numbers: int) -> list[str]:
    return [f"<0x{number:02X}>" for number in numbers]


JAPANESE = spelt(*"日本".encode())


@pytest.mark.parametrize(
    ("kind", "prompt", "completion", "expected"),
    [
        ("Llama", ["▁to"], ["▁time"], " time"),
        ("Llama", ["▁to"], ["me"], "me"),
        ("Llama", ["▁"], ["▁time"], " time"),
        ("Llama", ["▁to", "<s>", "</s>", "<s>", "<s>"], ["</s>", "▁time"], " time"),
        ("Llama", ["<s>"], ["▁time"], "time"),  # the text begins here
        ("Llama", ["<s>"], ["▁▁"], " "),
        ("Llama", [*spelt(0x20)], ["▁time"], " time"),
        ("Llama", ["▁to", *spelt(0xE2, 0x82)], [*spelt(0xAC), "me"], "€me"),
        ("Llama", ["▁to", *spelt(0xE2, 0x82)], ["me"], "me"),
        ("Llama", ["▁to", *JAPANESE], [*spelt(*"語".encode()), "▁time"], "語 time"),
        ("Llama", ["▁to", *JAPANESE], [*spelt(0xE8, 0xAA)], 2 * UNFINISHED),  # not eight
        ("Llama", JAPANESE, ["▁time"], " time"),
        ("Gemma", ["<s>"], ["▁time"], " time"),
        ("Metaspace", ["▁to"], ["▁time"], " time"),
        ("WordPiece", ["time"], ["time", "##me"], " timeme"),
        ("WordPiece", ["time"], ["##me"], "me"),
        ("word level", ["to"], ["time", "</s>"], " time"),
        ("word level", ["<s>"], ["time"], "time"),
        ("word level, cleaned", ["time"], ["."], "."),
        ("word level, cleaned", ["time", "'"], ["s"], "s"),
        ("ends of words", ["time</w>"], ["to"], " to"),
        ("unknown", ["c", "a"], ["b"], "b"),
    ],
)
def test_by_hand(kind: str, prompt: list[str], completion: list[str], expected: str) -> None:
    assert text(kind, ids_of(kind, *prompt), ids_of(kind, *completion)) == expected


def test_a_byte_level_character_that_is_cut_at_the_border_is_the_completions() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer("a😀b")["input_ids"]
    assert len(ids) == 6
    for cut in range(1, 7):
        expected = "😀b" if cut < 5 else "a😀b"[cut - 3 :]
        assert text("byte-level", ids[:cut], ids[cut:]) == expected
    assert text("byte-level", ids[:3], ids[3:4]) == ""  # still unfinished: the mark is the prompt's


def test_a_special_token_that_is_added_later_is_passed_over() -> None:
    tokenizer = spelt_in_bytes(strip=True)
    word, time = (tokenizer.get_vocab()[piece] for piece in ("▁to", "▁time"))
    assert decode_completions(tokenizer, [[word]], [[time]]) == [" time"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert decode_completions(tokenizer, [[word, *[turn] * 4]], [[time]]) == [" time"]


def test_tokenizers_that_decode_in_their_own_way_are_given_whole_prompts() -> None:
    class Loud(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **kwargs: Any) -> str:
            return str(super()._decode(*args, **kwargs)).upper()

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    tokenizer = Loud(tokenizer_object=words, eos_token="</s>")
    assert prompt_ends(tokenizer, [[0, 1, 0, 1, 0]]) == [[0, 1, 0, 1, 0]]
    assert decode_completions(tokenizer, [[0, 1]], [[1, 2]]) == [" B"]
