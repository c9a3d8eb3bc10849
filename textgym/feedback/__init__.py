"""Feedback on texts, in every form: records, files of them, converters between the forms, and an annotator whose truth is known.

Nothing here loads torch when imported.
"""

from textgym.feedback.annotator import SyntheticAnnotator
from textgym.feedback.conversion import Converted, convert
from textgym.feedback.converting import (
    comparison_to_judgements,
    comparison_to_labels,
    judgements_to_comparisons,
    judgements_to_ranking,
    labels_to_comparisons,
    marking_to_label,
    marking_to_segment_labels,
    ranking_to_comparisons,
    ranking_to_judgements,
    to_comparisons,
    to_demonstrations,
    to_labels,
)
from textgym.feedback.judging import (
    CommentJudge,
    PairJudge,
    TextJudge,
    comments_to_records,
    judge_pairs,
    judge_rankings,
    judge_texts,
    reward_judge,
    swapped,
)
from textgym.feedback.reading import BadRow, Feedback, read_feedback
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
from textgym.feedback.rows import record_to_row
from textgym.feedback.segment_pairs import sample_segment_pairs
from textgym.feedback.writing import write_feedback

__all__ = [
    "BadRow",
    "Comment",
    "CommentJudge",
    "Comparison",
    "Converted",
    "Feedback",
    "Judgement",
    "Judgements",
    "Label",
    "Marking",
    "PairJudge",
    "Ranking",
    "Record",
    "Segment",
    "SegmentPair",
    "Span",
    "SyntheticAnnotator",
    "TextJudge",
    "comments_to_records",
    "comparison_to_judgements",
    "comparison_to_labels",
    "convert",
    "judge_pairs",
    "judge_rankings",
    "judge_texts",
    "judgements_to_comparisons",
    "judgements_to_ranking",
    "labels_to_comparisons",
    "marking_to_label",
    "marking_to_segment_labels",
    "ranking_to_comparisons",
    "ranking_to_judgements",
    "read_feedback",
    "record_to_row",
    "reward_judge",
    "sample_segment_pairs",
    "swapped",
    "to_comparisons",
    "to_demonstrations",
    "to_labels",
    "write_feedback",
]
