"""Feedback on texts: one small record for every form in which people, rules and models give it.

    Comparison     A against B, or a tie                       Bradley–Terry
    Ranking        K answers, best first, ties allowed          Plackett–Luce, or all of its pairs
    Judgements     K answers, compared pairwise                 the mean over the pairs (InstructGPT)
    Label          good or bad, a class or its opposite         Bernoulli
    SegmentPair    two pieces of token sequences                Bradley–Terry over sums of per-token rewards
    Marking        spans of a text, each with a category        one score per category and segment
    Comment        natural language                             a judge turns it into one of the others

Texts are strings or lists of `{role, content}` messages. Records know nothing of files and models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from textgym.prompts import PromptText

Text: TypeAlias = PromptText


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt.

    Attributes:
        prompt: x.
        chosen: the better one; of a tie, either.
        rejected: the other.
        preference: P(chosen ≻ rejected) in [0, 1]; 1 for a plain label, ½ for a tie.
        margin: by how much, in reward, if the annotator said it (Llama 2's margin); else 0.
        weight: how much the record counts beside others.
        columns: whatever else stood in its row.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    preference: float = 1.0
    margin: float = 0.0
    weight: float = 1.0
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranking:
    """K ≥ 2 answers to one prompt, ranked.

    Attributes:
        prompt: x.
        completions: the K answers, in any order.
        ranks: the rank of each: 1 is the best, equal numbers are ties.
        weight: how much the record counts beside others.
        columns: whatever else stood in its row.
    """

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[int, ...]
    weight: float = 1.0
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """The outcome z of comparing answer `first` with answer `second` (places in a list): 1 the first is better, −1 the second, 0 a tie."""

    first: int
    second: int
    z: int


@dataclass(frozen=True)
class Judgements:
    """K ≥ 2 answers to one prompt, compared pairwise; the outcomes need not make one ranking.

    Attributes:
        prompt: x.
        completions: the K answers.
        judgements: the outcomes, at most one for each unordered pair.
        weight: how much the record counts beside others.
        columns: whatever else stood in its row.
    """

    prompt: Text
    completions: tuple[Text, ...]
    judgements: tuple[Judgement, ...]
    weight: float = 1.0
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Label:
    """One text with a verdict.

    Attributes:
        prompt: x; "" for a text that answers nothing.
        completion: the text that is judged.
        good: the verdict z = +1 (True) or −1 (False).
        weight: how much the record counts beside others.
        columns: whatever else stood in its row.
    """

    prompt: Text
    completion: Text
    good: bool
    weight: float = 1.0
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `end` (exclusive) of a completion, with all that came before them: a piece of a trajectory (s_t, a_t).

    Attributes:
        prompt_ids: the prompt's tokens.
        completion_ids: the completion's tokens, up to `end` at least.
        start: place of the first token of the segment in the completion.
        end: place behind its last token; more than `start`.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SegmentPair:
    """Two segments, compared (Christiano et al. 2017); their prompts may differ.

    Attributes:
        first: σ¹.
        second: σ².
        preference: P(σ¹ ≻ σ²) in [0, 1]; ½ for a tie.
        weight: how much the record counts beside others.
        columns: whatever else stood in its row.
    """

    first: Segment
    second: Segment
    preference: float
    weight: float = 1.0
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` (exclusive) of a completion, and what they are an instance of."""

    category: str
    start: int
    end: int


@dataclass(frozen=True)
class Marking:
    """A text in which spans are marked (Fine-Grained RLHF, Wu et al. 2023); no spans means that nothing was found.

    Attributes:
        prompt: x.
        completion: the marked text, a string.
        spans: the marked spans; they may overlap.
        weight: how much the record counts beside others.
        columns: whatever else stood in its row.
    """

    prompt: Text
    completion: str
    spans: tuple[Span, ...]
    weight: float = 1.0
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comment:
    """What somebody said of one or several answers, in words; a judge makes another record of it.

    Attributes:
        prompt: x.
        completions: the answers that it is about.
        comment: the words.
        weight: how much the record counts beside others.
        columns: whatever else stood in its row.
    """

    prompt: Text
    completions: tuple[Text, ...]
    comment: str
    weight: float = 1.0
    columns: Mapping[str, Any] = field(default_factory=dict)


Record: TypeAlias = Comparison | Ranking | Judgements | Label | SegmentPair | Marking | Comment
