"""A probabilistic grammar of short film reviews: the language of the bundled model, its prompts and its references.

The grammar is finite (no symbol reaches itself), so it can also *recognise*: `is_sentence` says exactly whether the grammar can produce a
sentence, which the true reward uses to tell sentences from word salad.

How to read `RULES`: one rule per line, `SYMBOL = weight expansion | weight expansion | ...`; a line that starts with `|` goes on with the
rule above. Words in capitals are symbols. A weight with `+` or `-` belongs to a favourable or unfavourable alternative: a review has a
*mood* in [0, 1], and such weights are multiplied by `2 * mood` or `2 * (1 - mood)`. `~SYMBOL` expands with the opposite mood, which is
what makes "although" and "but" contrast.
"""

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

RULES = """
REVIEW = 4 SENTENCE STOP | 6 SENTENCE STOP FOLLOW STOP | 1 SENTENCE STOP FOLLOW STOP VERDICT STOP
STOP = 9 . | 1 !

SENTENCE = 6 CLAUSE | 3 CLAUSE , but ~CLAUSE | 2 although ~CLAUSE , CLAUSE | 2 CLAUSE and CLAUSE | 2 CLAUSE because CLAUSE | 5 SETTING
FOLLOW = 4 CLAUSE | 1 CLAUSE , but ~CLAUSE | 1 CLAUSE and CLAUSE | 2 VERDICT
SETTING = 4 i SAW FILM with SOMEONE and SHARED | 3 i SAW FILM WHEN and ALONE | 2 SOMEONE and i SAW FILM WHEN , and SHARED
| 2 when i SAW FILM WHEN , ALONE | 1 we SAW FILM with SOMEONE WHEN and SHARED
SAW = 5 watched | 4 saw | 1 rented
WHEN = 3 last night | 2 last week | 2 on sunday | 2 yesterday | 2 at home | 2 after work | 2 in the cinema | 1 on a rainy evening
SOMEONE = 3 my FAMILY | 2 my FRIEND | 1 an old friend | 1 two friends | 1 the children
FAMILY = 2 sister | 2 brother | 2 wife | 2 husband | 1 mother | 1 father | 1 daughter | 1 son | 1 parents | 1 grandmother
FRIEND = 2 best friend | 1 neighbour | 1 teacher | 1 boss | 1 cousin
SHARED = 4+ we LIKED it | 4- we DISLIKED it | 3+ we thought it was GOOD | 3- we thought it was BAD | 1+ we laughed a lot
| 1+ we talked about the ASPECT for days | 1- we left early | 1- we fell asleep | 1 we talked about the ASPECT on the way home
ALONE = 4+ i LIKED it | 4- i DISLIKED it | 3+ i thought it was GOOD | 3- i thought it was BAD | 1+ i could not stop laughing
| 1+ i could not look away | 1- i fell asleep | 1- i looked at my watch all the time | 1 i did not know what to expect

CLAUSE = 9 SUBJECT was QUALITY | 5 SUBJECTS were QUALITY | 3 SUBJECT SEEMED QUALITY | 3 i thought SUBJECT was QUALITY
| 4 this is WORK | 2 it is WORK about TOPIC | 5 OPINION | 3 EFFECT | 1 the director tells the story of TOPIC
SEEMED = 3 felt | 3 seemed | 2 looked | 1 sounded
SUBJECT = 6 the ASPECT | 4 FILM | 1 the whole thing | 1 the ASPECT of FILM | 1 every minute
FILM = 5 the GENRE | 4 this GENRE
GENRE = 6 film | 6 movie | 2 comedy | 2 drama | 2 thriller | 1 sequel | 1 documentary | 1 musical | 1 western | 1 cartoon
ASPECT = 4 plot | 4 acting | 4 ending | 3 music | 3 script | 3 story | 2 dialogue | 2 editing | 2 lighting | 2 soundtrack | 2 cast
| 2 villain | 2 hero | 2 humour | 2 pacing | 2 first half | 2 second half | 1 opening scene | 1 final scene | 1 camera work | 1 romance
| 1 lead actor | 1 lead actress | 1 setting | 1 mystery | 1 title song
SUBJECTS = 4 the PARTS | 1 the PARTS of FILM | 1 all the PARTS
PARTS = 4 actors | 4 characters | 3 jokes | 3 songs | 2 costumes | 2 effects | 2 scenes | 2 twists | 2 stunts | 2 performances | 1 dances
| 1 pictures | 1 colours | 1 chases | 1 fights

QUALITY = 10+ GOOD | 10- BAD | 1 PLAIN
GOOD = 6 GOOD_WORD | 2 MORE GOOD_MILD | 2 TRULY GOOD_STRONG | 2 GOOD_WORD and GOOD_WORD | 2 not BAD_MILD | 1 never BAD_MILD
| 1 far from BAD_WORD | 1 neither BAD_MILD nor BAD_MILD | 1 LESS GOOD_MILD
BAD = 6 BAD_WORD | 2 MORE BAD_MILD | 2 TRULY BAD_STRONG | 2 BAD_WORD and BAD_WORD | 3 not GOOD_WORD | 1 never GOOD_WORD
| 1 far from GOOD_WORD | 1 neither GOOD_MILD nor GOOD_MILD | 1 LESS BAD_MILD | 1 not MORE GOOD_MILD
PLAIN = 1 rather long | 1 quite short | 1 not what i expected | 1 like the book | 1 very quiet | 1 unusual
MORE = 4 very | 3 really | 3 so | 1 truly
TRULY = 3 really | 3 truly | 2 absolutely
LESS = 2 quite | 1 rather | 1 fairly
GOOD_WORD = 5 GOOD_MILD | 4 GOOD_STRONG
BAD_WORD = 5 BAD_MILD | 4 BAD_STRONG
GOOD_MILD = good | fun | funny | warm | clever | charming | honest | sweet | fresh | enjoyable | likable | convincing | tense | tender
| witty | smart
GOOD_STRONG = 4 brilliant | 3 wonderful | 3 great | 2 excellent | 2 superb | 2 perfect | 2 amazing | 2 beautiful | 1 moving | 1 fantastic
| 1 delightful | 1 unforgettable | 1 gripping | 1 stunning
BAD_MILD = bad | boring | slow | flat | weak | silly | dull | predictable | messy | confusing | tired | noisy | cold | clumsy | shallow
| lazy
BAD_STRONG = 4 terrible | 3 awful | 3 horrible | 2 dreadful | 2 painful | 2 pathetic | 1 unbearable | 1 ridiculous | 1 worthless
| 1 laughable | 1 embarrassing | 1 hopeless

WORK = 5+ a NICE KIND | 5- a NASTY KIND | 2+ an excellent KIND | 2- an awful KIND | 1+ an enjoyable KIND | 1 a SIMPLE KIND
| 2+ one of the best films of the year | 2- one of the worst films of the year | 1+ not a bad film | 1- not a good film
NICE = 3 great | 3 wonderful | 3 brilliant | 2 good | 2 funny | 2 clever | 2 charming | 2 beautiful | 1 warm | 1 honest | 1 smart | 1 sweet
NASTY = 3 terrible | 3 bad | 2 boring | 2 dull | 2 weak | 2 horrible | 2 silly | 1 predictable | 1 messy | 1 lazy | 1 cold | 1 tired
SIMPLE = simple | strange | short | long | quiet | modern | serious
KIND = 4 film | 4 movie | 2 comedy | 2 drama | 2 thriller | 2 story | 1 sequel | 1 musical | 1 cartoon | 1 documentary
TOPIC = a lonely sailor | two brothers | a lost dog | a young painter | a small village | a retired teacher | a family in trouble
| a long journey | an old lighthouse | a stolen letter | three sisters | a winter wedding | a night train | a missing child

OPINION = 4+ i LIKED the ASPECT | 4- i DISLIKED the ASPECT | 2+ i LIKED the PARTS | 2- i DISLIKED the PARTS | 2+ everyone LIKED the PARTS
| 2- nobody LIKED the PARTS | 2- i did not ENJOY the ASPECT | 2+ i would recommend it to FANS | 2- i would not recommend it to FANS
| 2+ i would watch it again | 2- i would never watch it again | 1- i wanted to leave | 1+ i wanted to see more
LIKED = 4 loved | 4 enjoyed | 3 liked | 2 adored | 2 admired
DISLIKED = 4 hated | 4 disliked | 2 regretted | 2 endured
ENJOY = 3 enjoy | 3 like | 2 love | 1 understand
FANS = 3 anyone | 3 my friends | 2 families | 2 children | 1 fans of the book
EFFECT = 2+ the ASPECT moved me | 2- the ASPECT bored me | 2+ the PARTS made me laugh | 2+ the ASPECT made me cry
| 2- the ASPECT made me yawn | 2- the PARTS gave me a headache | 2+ the ASPECT gave me hope | 1+ the PARTS surprised me
| 1- the PARTS annoyed me | 2- the ASPECT did not work | 2+ the ASPECT worked | 1- nothing about the ASPECT worked
| 1+ everything about the ASPECT worked | 1- the director wasted a good idea | 1+ the director saved a weak idea

VERDICT = 3+ it is worth seeing | 3- it is not worth seeing | 2+ do not miss it | 2- it is a waste of time | 2- avoid it | 2+ go and see it
| 2- save your money | 1+ bring the whole family | 1+ it deserves a prize | 1- stay at home | 1 make up your own mind
"""

PUNCTUATION = frozenset(".,!?")


class Production(NamedTuple):
    """One alternative of a symbol: what it expands to, how likely, and whether it praises (+1), blames (-1) or neither (0)."""

    expansion: tuple[str, ...]
    weight: float
    polarity: int


def _parse_production(text: str) -> Production:
    first, *rest = text.split()
    if not first[0].isdigit():  # a plain word list: equal weights
        return Production((first, *rest), 1.0, 0)
    polarity = {"+": 1, "-": -1}.get(first[-1], 0)
    return Production(tuple(rest), float(first.rstrip("+-")), polarity)


def _parse_rules(text: str) -> dict[str, tuple[Production, ...]]:
    joined = text.replace("\n|", " |")
    rules = {}
    for line in filter(None, map(str.strip, joined.splitlines())):
        symbol, _, alternatives = line.partition(" = ")
        rules[symbol] = tuple(_parse_production(part) for part in alternatives.split("|"))
    return rules


GRAMMAR: dict[str, tuple[Production, ...]] = _parse_rules(RULES)


def words_of(symbol: str) -> list[str]:
    """Returns the single words that `symbol` can expand to, without repeats, in the order of the rules."""
    return list(dict.fromkeys(word for production in GRAMMAR[symbol] for word in production.expansion if word not in GRAMMAR))


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Returns every word and punctuation mark of the grammar, sorted, punctuation first."""
    words = {word for productions in GRAMMAR.values() for production in productions for word in production.expansion}
    terminals = {word for word in words if word.lstrip("~") not in GRAMMAR}
    return tuple(sorted(terminals, key=lambda word: (word not in PUNCTUATION, word)))


def _expand(symbol: str, mood: float, rng: random.Random) -> Iterator[str]:
    if symbol.startswith("~"):
        symbol, mood = symbol[1:], 1.0 - mood
    if symbol not in GRAMMAR:
        yield symbol
        return
    factors = (1.0, 2.0 * mood, 2.0 * (1.0 - mood))  # indexed by polarity: 0, +1, -1
    weights = [production.weight * factors[production.polarity] for production in GRAMMAR[symbol]]
    for part in rng.choices(GRAMMAR[symbol], weights)[0].expansion:
        yield from _expand(part, mood, rng)


def sample_review(rng: random.Random, mood: float | None = None) -> list[str]:
    """Samples one review.

    Args:
        rng: the source of randomness.
        mood: probability, in [0, 1], that an opinion is favourable; None draws 0.05, 0.5 or 0.95 with probabilities 0.4, 0.2, 0.4.

    Returns:
        Its words and punctuation marks, e.g. `["the", "plot", "was", "dull", "."]`.
    """
    if mood is None:
        mood = rng.choices((0.05, 0.5, 0.95), (0.4, 0.2, 0.4))[0]
    return list(_expand("REVIEW", mood, rng))


def to_text(words: Sequence[str]) -> str:
    """Joins words with spaces, none before punctuation: the spacing that the bundled tokenizer decodes to."""
    return "".join(word if word in PUNCTUATION else " " + word for word in words).strip()


def split_words(text: str) -> list[str]:
    """Splits text into lower-case words and single punctuation marks."""
    for mark in PUNCTUATION:
        text = text.replace(mark, f" {mark} ")
    return text.lower().split()


@lru_cache(maxsize=1 << 16)
def is_sentence(words: tuple[str, ...]) -> bool:
    """Says whether the grammar can produce `words` (without the final stop) as one sentence of a review."""
    return any(len(words) in _ends(symbol, words, 0, {}) for symbol in ("SENTENCE", "FOLLOW", "VERDICT"))


def _ends(symbol: str, words: tuple[str, ...], start: int, memo: dict[tuple[str, int], frozenset[int]]) -> frozenset[int]:
    """Returns every position at which an expansion of `symbol` that begins at `start` can end."""
    symbol = symbol.lstrip("~")  # the mood moves probabilities only, never what is possible
    if symbol not in GRAMMAR:
        return frozenset((start + 1,)) if words[start : start + 1] == (symbol,) else frozenset()
    if (symbol, start) not in memo:
        ends: set[int] = set()
        for production in GRAMMAR[symbol]:
            fronts = {start}
            for part in production.expansion:
                fronts = {end for front in fronts for end in _ends(part, words, front, memo)}
            ends |= fronts
        memo[symbol, start] = frozenset(ends)
    return memo[symbol, start]
