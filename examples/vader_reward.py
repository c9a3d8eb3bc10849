"""A sentiment reward from a list of words, for the command line.

    textgym train ppo --reward examples/vader_reward.py:sentiment ...
    VADER_LEXICON=path/to/vader_lexicon.txt textgym train ppo --reward examples/vader_reward.py:sentiment ...

The first takes the few words below; the second a tab-separated file of words and valences, such as that of VADER
(github.com/cjhutto/vaderSentiment). The reward of a completion is s / sqrt(s² + 15) with s the summed valence of its words: in (-1, 1),
0 for a text without any word of the list.
"""

import os
from functools import cache

from textgym.rewards import LexiconReward

# Enough to see what it does, by valence: from -4 (most unpleasant) to 4.
WORDS = {
    3.0: "beautiful brilliant delightful excellent great love loved lovely perfect superb wonderful",
    2.0: "enjoy enjoyed fun funny glad good happy joy kind laugh nice smile smiled warm",
    -2.0: "bad boring cold cry cried dark dull fear lonely poor sad slow tired ugly weak",
    -3.0: "angry awful cruel dreadful hate hated horrible terrible worst",
}


@cache
def _lexicon():
    path = os.environ.get("VADER_LEXICON")
    if path is None:
        return LexiconReward({word: valence for valence, words in WORDS.items() for word in words.split()})
    try:
        return LexiconReward.from_file(path)
    except FileNotFoundError:
        raise SystemExit(f"There is no word list {path!r}; set VADER_LEXICON to the path of vader_lexicon.txt.") from None


def sentiment(completions, **kwargs):
    """The sentiment of each completion, in (-1, 1)."""
    return _lexicon()(completions)


if __name__ == "__main__":
    for text in ("What a lovely day, I am so happy!", "It was dark and the dog was sad.", "The cat sat on the mat."):
        print(f"{sentiment([text])[0]:6.3f}  {text}")
