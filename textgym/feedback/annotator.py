"""A synthetic annotator: feedback of every form, drawn from a known reward, so that what is learned from it can be held against the truth.

Its utility of an answer, and its preference between two, are

    u(x, y)     = r(x, y) + b · words(y)                                    b: `length_bias`
    δ(x, y, y') = u(x, y) − u(x, y') + c · sin(φ(x, y) − φ(x, y'))          c: `intransitivity`
    P(y ≻ y')   = (1 − ε) σ(δ/T) + ε σ(−δ/T)                                T: `temperature`, ε: `label_noise`

Bradley–Terry for pairs, Plackett–Luce for rankings, Bernoulli σ(u/T) for labels. The cyclic term is the disc game of Balduzzi et al. 2019
(arXiv:1901.08106): each answer has an angle φ on a circle, uniform and fixed by a hash of the seed and the text, and beats what stands up
to half a turn behind it. It is antisymmetric, no reward can express it, and where r is constant and T = 0 a quarter of all triples are
cycles: the chance that three random points of a circle have its centre between them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise, permutations
from typing import Any, TypeAlias

import numpy as np

from textgym.encoding import encode_plain
from textgym.feedback.judging import comparison
from textgym.feedback.records import Comparison, Judgement, Judgements, Label, Ranking, Segment, SegmentPair, Text
from textgym.rewards.calling import Float64Array
from textgym.rewards.episodes import completion_text
from textgym.rewards.texts import score_texts

TokenRewards: TypeAlias = Callable[[tuple[int, ...], tuple[int, ...]], Sequence[float]]
_MOST_RANKED = 8  # answers whose K! orders are enumerated


@dataclass(frozen=True)
class _Options:
    """How the annotator errs; see `SyntheticAnnotator`."""

    temperature: float
    label_noise: float
    length_bias: float
    intransitivity: float
    tie_threshold: float | None

    def __post_init__(self) -> None:
        rules = (
            ("temperature", 0.0, math.inf, "of at least 0"),
            ("label_noise", 0.0, 0.5, "from 0 to 0.5"),
            ("length_bias", -math.inf, math.inf, ""),
            ("intransitivity", 0.0, math.inf, "of at least 0"),
            ("tie_threshold", 0.0, math.inf, "of at least 0 (or None: no ties)"),
        )
        for name, low, high, rule in rules:
            value = getattr(self, name)
            if value is None and name == "tie_threshold":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
                raise ValueError(f"`{name}` must be a finite number {rule}".rstrip() + f", got {value!r}.")


class SyntheticAnnotator:
    """Gives feedback by a known reward, with human failings as options; the formulas are at the top of this module.

    Args:
        reward: r, anything that `RewardSet.build` takes; it scores whole completions from their texts. None where only segments are
            compared.
        tokenizer: a transformers tokenizer, for rewards that read `completion_ids`: what they get are its tokens of the answers. None:
            such a reward is an error.
        temperature: T, in reward: how often the worse answer wins. 0 always takes the better one.
        label_noise: ε in [0, ½], the probability that a verdict is the opposite of what was meant (a ranking: reversed; no tie is touched).
        length_bias: b, reward per word (`str.split`) of an answer, per token of a segment.
        intransitivity: c, in reward: the weight of the cyclic term. For comparisons only; rankings and labels refuse it.
        tie_threshold: pairs with |δ| at most this, in reward, are ties; None: none. In rankings neighbours of so like
            utilities share a rank; labels refuse it.
        seed: of all draws, a number or a sequence of numbers: the same calls in the same order give the same feedback. `generator` is
            what draws; its `bit_generator.state` can be saved.

    Raises:
        ValueError: an argument breaks one of the rules above.
    """

    def __init__(
        self,
        reward: Any,
        *,
        tokenizer: Any = None,
        temperature: float = 1.0,
        label_noise: float = 0.0,
        length_bias: float = 0.0,
        intransitivity: float = 0.0,
        tie_threshold: float | None = None,
        seed: int | Sequence[int] = 0,
    ) -> None:
        self.reward, self.tokenizer = reward, tokenizer
        self.options = _Options(temperature, label_noise, length_bias, intransitivity, tie_threshold)
        self.seed = seed
        self.generator = np.random.default_rng(seed)

    def utilities(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: list[Any]) -> Float64Array:
        """Returns u(x, y), (N,), in one call of the reward.

        Args:
            prompts: N prompts.
            completions: N answers.
            **columns: what else the reward reads, N values each.
        """
        if self.reward is None:
            raise ValueError("`reward` must be given to judge texts, got None; without one only segments can be compared.")
        texts = [completion_text(one) for one in completions]
        words = np.array([len(text.split()) for text in texts], dtype=np.float64)
        ids = None if self.tokenizer is None else encode_plain(self.tokenizer, texts)
        return score_texts(self.reward, prompts, completions, ids, **columns) + self.options.length_bias * words

    # -- pairs ------------------------------------------------------------------------------------------------------

    def probabilities(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text], **columns: list[Any]) -> Float64Array:
        """Returns P(first ≻ second), (N,); ½ for ties. Nothing is drawn.

        Args:
            prompts: N prompts.
            first: N answers.
            second: N others.
            **columns: what else the reward reads, N values each.
        """
        return self._chances(self._differences(prompts, first, second, columns))

    def outcomes(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text], **columns: list[Any]) -> Float64Array:
        """Draws one outcome per pair, (N,): 1 the first is better, 0 the second, ½ a tie. Arguments as of `probabilities`."""
        return self._draw(self._differences(prompts, first, second, columns))

    def compare(
        self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text], *, soft: bool = False, **columns: list[Any]
    ) -> list[Comparison]:
        """Compares N pairs.

        Args:
            prompts: N prompts.
            first: N answers.
            second: N others.
            soft: store the probability as `preference`, with the more probable answer as `chosen`, and draw nothing.
            **columns: what else the reward reads, N values each.

        Returns:
            N records, the winner as `chosen`; a tie has `preference` ½.
        """
        differences = self._differences(prompts, first, second, columns)
        preferences = self._chances(differences) if soft else self._draw(differences)
        return [comparison(*row) for row in zip(prompts, first, second, preferences.tolist(), strict=True)]

    def judge_pairs(self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]], **columns: list[Any]) -> list[Judgements]:
        """Compares all C(K, 2) pairs of the answers to each prompt, one independently of the others.

        Args:
            prompts: N prompts.
            completions: K ≥ 2 answers to each; K may differ.
            **columns: what else the reward reads, N values each.
        """
        utilities = self._utilities_of_lists(prompts, completions, columns)
        found = []
        for prompt, answers, values in zip(prompts, completions, utilities, strict=True):
            pairs = list(combinations(range(len(answers)), 2))
            angles = self._angles([(prompt, one) for one in answers])
            differences = np.array([values[i] - values[j] + self._cycle(angles[i], angles[j]) for i, j in pairs])
            verdicts = [Judgement(i, j, int(2 * won - 1)) for (i, j), won in zip(pairs, self._draw(differences), strict=True)]
            found.append(Judgements(prompt, tuple(answers), tuple(verdicts)))
        return found

    def _differences(
        self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text], columns: dict[str, list[Any]]
    ) -> Float64Array:
        """δ of each pair, (N,), in one call of the reward."""
        if not len(prompts) == len(first) == len(second):
            raise ValueError(f"`prompts`, `first` and `second` must be as many, got {len(prompts)}, {len(first)} and {len(second)}.")
        twice = {name: [*values, *values] for name, values in columns.items()}
        values = self.utilities([*prompts, *prompts], [*first, *second], **twice)
        angles = self._angles(list(zip([*prompts, *prompts], [*first, *second], strict=True)))
        return np.asarray(values[: len(first)] - values[len(first) :] + self._cycle(angles[: len(first)], angles[len(first) :]))

    def _ties(self, differences: Float64Array) -> Any:
        threshold = self.options.tie_threshold
        return np.zeros(len(differences), dtype=bool) if threshold is None else np.abs(differences) <= threshold

    def _chances(self, differences: Float64Array) -> Float64Array:
        chances = self._flipped(_sigmoid(differences, self.options.temperature))
        return np.where(self._ties(differences), 0.5, chances)

    def _draw(self, differences: Float64Array) -> Float64Array:
        """One uniform number per row, ties included."""
        won = self.generator.random(len(differences)) < self._chances(differences)
        return np.where(self._ties(differences), 0.5, won.astype(np.float64))

    def _flipped(self, chances: Float64Array) -> Float64Array:
        return (1 - self.options.label_noise) * chances + self.options.label_noise * (1 - chances)

    def _angles(self, keys: Sequence[Any]) -> Float64Array:
        """φ of each, (N,), in radians; 0 where no term needs them."""
        return np.array([_angle(json.dumps([self.seed, key])) if self.options.intransitivity else 0.0 for key in keys])

    def _cycle(self, first: Any, second: Any) -> Any:
        return self.options.intransitivity * np.sin(first - second)

    # -- rankings ---------------------------------------------------------------------------------------------------

    def rank(self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]], **columns: list[Any]) -> list[Ranking]:
        """Ranks the answers to each prompt by Plackett–Luce: the order of u/T plus Gumbel noise.

        Args:
            prompts: N prompts.
            completions: K ≥ 2 answers to each; K may differ.
            **columns: what else the reward reads, N values each.
        """
        self._refuse("rank", "intransitivity")
        found = []
        for prompt, answers, values in zip(prompts, completions, self._utilities_of_lists(prompts, completions, columns), strict=True):
            noise = self.generator.gumbel(size=len(values))
            order = np.lexsort((-noise, -(values + self.options.temperature * noise)))  # at T = 0 equal utilities come in any order
            if self.generator.random() < self.options.label_noise:
                order = order[::-1]
            found.append(Ranking(prompt, tuple(answers), self._ranks(order.tolist(), values)))
        return found

    def ranking_probabilities(
        self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]], **columns: list[Any]
    ) -> list[dict[tuple[int, ...], float]]:
        """Returns for each prompt the probability of every `Ranking.ranks` that `rank` can give; at most 8 answers."""
        self._refuse("ranking_probabilities", "intransitivity")
        if any(len(answers) > _MOST_RANKED for answers in completions):
            raise ValueError(
                f"`completions` must hold at most {_MOST_RANKED} answers to a prompt, whose orders are enumerated; give fewer."
            )
        found = []
        for values in self._utilities_of_lists(prompts, completions, columns):
            chances: dict[tuple[int, ...], float] = {}
            for order in permutations(range(len(values))):
                probability = _plackett_luce(values[list(order)], self.options.temperature)
                for seen, share in ((order, 1 - self.options.label_noise), (order[::-1], self.options.label_noise)):
                    ranks = self._ranks(list(seen), values)
                    chances[ranks] = chances.get(ranks, 0.0) + share * probability
            found.append({ranks: chance for ranks, chance in chances.items() if chance > 0})
        return found

    def _ranks(self, order: list[int], values: Float64Array) -> tuple[int, ...]:
        """The rank of each answer, 1 the best; neighbours in `order` that differ by no more than the threshold share one."""
        threshold = -1.0 if self.options.tie_threshold is None else self.options.tie_threshold
        ranks = {order[0]: 1}
        for before, place in pairwise(order):
            ranks[place] = ranks[before] + int(abs(values[before] - values[place]) > threshold)
        return tuple(ranks[place] for place in range(len(order)))

    def _utilities_of_lists(
        self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]], columns: dict[str, list[Any]]
    ) -> list[Float64Array]:
        if len(prompts) != len(completions):
            raise ValueError(f"`completions` must hold a list per prompt: {len(prompts)} prompts, {len(completions)} lists.")
        for row, answers in enumerate(completions):
            if isinstance(answers, str) or len(answers) < 2:
                raise ValueError(f"`completions` must hold lists of at least 2 answers, got {answers!r} in row {row}.")
        counts = [len(answers) for answers in completions]

        def repeated(values: Sequence[Any]) -> list[Any]:
            return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]

        flat = [one for answers in completions for one in answers]
        values = self.utilities(repeated(prompts), flat, **{name: repeated(column) for name, column in columns.items()})
        return np.split(values, np.cumsum(counts)[:-1])

    # -- labels -----------------------------------------------------------------------------------------------------

    def label(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: list[Any]) -> list[Label]:
        """Labels N answers good with probability σ(u/T): a reward of 0 is as often good as bad.

        Args:
            prompts: N prompts.
            completions: N answers.
            **columns: what else the reward reads, N values each.
        """
        chances = self.label_probabilities(prompts, completions, **columns)
        verdicts = (self.generator.random(len(chances)) < chances).tolist()
        return [Label(*row) for row in zip(prompts, completions, verdicts, strict=True)]

    def label_probabilities(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: list[Any]) -> Float64Array:
        """Returns P(good), (N,). Arguments as of `label`."""
        self._refuse("label", "intransitivity")
        self._refuse("label", "tie_threshold")
        return self._flipped(_sigmoid(self.utilities(prompts, completions, **columns), self.options.temperature))

    def _refuse(self, method: str, option: str) -> None:
        if getattr(self.options, option):
            raise ValueError(f"`{option}` must be left out for `{method}`, which has no place for it; ask for comparisons.")

    # -- segments ---------------------------------------------------------------------------------------------------

    def compare_segments(
        self, pairs: Sequence[tuple[Segment, Segment]], token_rewards: TokenRewards, *, soft: bool = False
    ) -> list[SegmentPair]:
        """Compares segments by the sums of their tokens' rewards (Christiano et al. 2017, arXiv:1706.03741, eq. 1).

        Args:
            pairs: N pairs of segments; `sample_segment_pairs` draws some.
            token_rewards: `token_rewards(prompt_ids, completion_ids)` returns r(s_t, a_t) of each of the completion's tokens; it is given
                what a segment holds, up to its `end` at least, and must not look ahead.
            soft: store the probability instead of a drawn outcome.

        Returns:
            N records with `preference` 1, 0 or ½ (a tie); with `soft` the probability.
        """
        differences = self._segment_differences(pairs, token_rewards)
        preferences = self._chances(differences) if soft else self._draw(differences)
        return [SegmentPair(first, second, value) for (first, second), value in zip(pairs, preferences.tolist(), strict=True)]

    def segment_probabilities(self, pairs: Sequence[tuple[Segment, Segment]], token_rewards: TokenRewards) -> Float64Array:
        """Returns P(first ≻ second), (N,); ½ for ties. Arguments as of `compare_segments`."""
        return self._chances(self._segment_differences(pairs, token_rewards))

    def _segment_differences(self, pairs: Sequence[tuple[Segment, Segment]], token_rewards: TokenRewards) -> Float64Array:
        @cache
        def rewards(prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...]) -> Float64Array:
            values = np.asarray(token_rewards(prompt_ids, completion_ids), dtype=np.float64)
            if values.shape != (len(completion_ids),) or not np.isfinite(values).all():
                raise ValueError(
                    f"`token_rewards` must return a finite number for each of {len(completion_ids)} tokens, got {values!r} "
                    f"for the completion {completion_ids} of {prompt_ids}."
                )
            return values

        def utility(segment: Segment) -> float:
            values = rewards(segment.prompt_ids, segment.completion_ids)[segment.start : segment.end]
            return float(values.sum()) + self.options.length_bias * (segment.end - segment.start)

        def key(segment: Segment) -> list[Any]:
            return [segment.prompt_ids, segment.completion_ids[: segment.end], segment.start]

        straight = np.array([utility(first) - utility(second) for first, second in pairs], dtype=np.float64)
        first_angles, second_angles = (self._angles([key(pair[place]) for pair in pairs]) for place in (0, 1))
        return np.asarray(straight + self._cycle(first_angles, second_angles))


def _sigmoid(values: Float64Array, temperature: float) -> Float64Array:
    """σ(values / temperature), its limit at temperature 0."""
    if temperature == 0:
        return 0.5 * (1 + np.sign(values))
    return np.asarray(1 / (1 + np.exp(-np.clip(values / temperature, -700, 700))))


def _plackett_luce(values: Float64Array, temperature: float) -> float:
    """P(this order) = Π_i exp(u_i/T) / Σ_{j≥i} exp(u_j/T), utilities best first; at T = 0 equals come in any order."""
    probability = 1.0
    for place in range(len(values) - 1):
        left = values[place:] - values[place:].max()
        weights = (left == 0).astype(np.float64) if temperature == 0 else np.exp(left / temperature)
        probability *= float(weights[0] / weights.sum())
    return probability


def _angle(key: str) -> float:
    """A number in [0, 2π) that is fixed by `key` and as good as random."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") / 2**56 * 2 * math.pi
