"""The text face of a token tree: its words, its tokenizer, its reward as a function of texts and ids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def prompt_text(ids: Sequence[int]) -> str:
    """Returns the words of a prompt."""
    return " ".join(f"w{token}" for token in ids)


def word_tokenizer(vocab_size: int, eos_token_id: int) -> "PreTrainedTokenizerFast":
    """Returns a tokenizer whose token `i` is the word `w{i}`, EOS excepted, which is `</s>`; it has no pad token. Loads no torch."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["</s>" if token == eos_token_id else f"w{token}" for token in range(vocab_size)]
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


class TreeReward:
    """r(x, y) of a tree in the calling form of `textgym.rewards`; `num_queries` counts the completions it was asked about.

    Args:
        table: the reward of each (prompt text, completion ids with EOS).
    """

    __name__ = "tree"

    def __init__(self, table: dict[tuple[str, tuple[int, ...]], float]) -> None:
        self.table = table
        self.num_queries = 0

    def __call__(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """Returns one reward per row; a completion that the tree does not have is a `ValueError`."""
        self.num_queries += len(prompts)
        return [self._look_up(prompt, tuple(int(token) for token in ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    def _look_up(self, prompt: str, ids: tuple[int, ...]) -> float:
        try:
            return self.table[prompt, ids]
        except KeyError:
            raise ValueError(
                f"`completion_ids` must be completions of the tree (ended by EOS or at its horizon), got {ids} for prompt {prompt!r}."
            ) from None
