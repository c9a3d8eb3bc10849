"""Feedback on texts, in every form: records, files of them, converters between the forms, and an annotator whose truth is known.

Nothing here loads torch when imported.
"""

from textgym.feedback.records import (
    Comment,
    Comparison,
    Judgement,
    Judgements,
    Label,
    Marking,
    Ranking,
    Record,
    Segment,
    SegmentPair,
    Span,
)

__all__ = [
    "Comment",
    "Comparison",
    "Judgement",
    "Judgements",
    "Label",
    "Marking",
    "Ranking",
    "Record",
    "Segment",
    "SegmentPair",
    "Span",
]
