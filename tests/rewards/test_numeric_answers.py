r"""Which part of a completion is its answer, what a column of answers may hold, and that no text ends a run."""

import random
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from textgym.rewards import NumericReward

pytest.importorskip("math_verify")

STEPS = "#### Step 1: add\n400 + 60 = 460\n#### Step 2: check\nThe total is 460.\n"
NUMBERED = "#### 1 Add\n3 + 4 = 7\n#### 2 Check\n10 - 3 is 7"


@pytest.fixture(scope="module")
def reward():
    return NumericReward(timeout=1)


@pytest.mark.parametrize(
    ("completion", "right", "wrong"),
    [
        # boxes
        (r"First \boxed{1}. No, it is \boxed{2}.", 2, 1),
        (r"\boxed{1} and $\boxed{2}$", "1, 2", 2),
        (r"\boxed{\frac{1}{\frac{2}{3}}}", 1.5, 2),
        (r"so \fbox{72} clips for 3 friends", 72, 3),
        (r"so \boxed 72 clips for 3 friends", 72, 3),
        (r"so 5 and \boxed{72", 72, 5),
        (r"it was 72, \boxed{}", 72, 7),
        (r"\boxed{x = 72} for 3 friends", 72, 3),
        # GSM8K's mark
        ("first #### 3, then #### 4", 4, 3),
        ("#### 3\nNo:\n#### 4", 4, 3),
        ("#### 72 apples\nfor 3 friends", 72, 3),
        ("####72", 72, 7),
        ("so 5 of them\n#### The answer is 72", 72, 5),
        ("it is not so\n#### no", "no", "yes"),
        (r"\boxed{70} is too few" + "\n#### 72", 72, 70),
        ("#### 72\n" + r"or rather \boxed{70}", 70, 72),
        # headings
        (STEPS + r"\boxed{460}", 460, 2),
        (STEPS, 460, 2),
        (NUMBERED, 7, 2),
        ("#### 1. Add\nso 7", 7, 1),
        ("#### Final Answer\n" + r"\boxed{460}", 460, "Final Answer"),
        ("#### Final Answer\nThe total is 460.", 460, 4),
        ("#### Final Answer\n\n460", 460, 4),
        (r"\boxed{460}" + "\n#### Check of 5 steps\nall is well", 460, 5),
        (r"\boxed{460}" + "\n#### Remarks", 460, "Remarks"),
        ("### 5 steps\nso 7", 7, 5),
        # announcements
        ("The answer is 72 because 8 times 9 is so in 1 step.", 72, 1),
        ("The answer is 8 * 9 = 72. I took 2 steps.", 72, 2),
        ("The final answer is: $\\frac{1}{2}$. I hope it is correct, all 3 steps of it.", 0.5, 3),
        ("Final Answer:\n72\nin 2 steps", 72, 2),
        ("**Final Answer**: 72, which took 2 steps", 72, 2),
        ("Final answer:\n\\[\n72\n\\]\nin 2 steps", 72, 2),
        ("**The answer is 72**, in 2 steps", 72, 2),
        ("Answer: **72**.\nIt took 2 steps", 72, 2),
        ("The answer is approximately 3.14 in 2 steps", 3.14, 2),
        ("The answer is 72!", 72, 2),
        ("The answer is $72 per week.", 72, 7),
        ("The answer is $1$ or $2$.", "1, 2", 2),
        ("The answer is (B).", "B", "A"),
        ("The answer is Tuesday 3.", "Tuesday 3", "Monday 3"),
        # the last number or mathematics
        ("48/2 = 24 clips. 48 + 24 = 72", 72, 48),
        ("3 + 4 = 7, and y = 14", 14, 7),
        ("3 + 4 = 7; 2 * 7 = 14", 14, 7),
        ("3 + 4 = 7", 7, 3),
        ("She has $5 and then $3, in all $8.", 8, 5),
        ("so it is 1/2", 0.5, 2),
        (r"so it is \frac{1}{2}", 0.5, 2),
        (r"so $y = \frac{1}{2}$ for every $x$", 0.5, 2),
        ("with $x$ and $y$ there are 72", 72, "y"),
        ("COVID-19 took 5", 5, 19),
        ("there are 5 million", 5_000_000, 5),
        ("the speed is 3 \u00d7 10^8 m/s", 3e8, 8),
        ("it is 50 percent", "50%", 5),
        ("it is 72?", 72, 7),
        ("It's ~72.", 72, 7),
        ("(a) 72", 72, "a"),
        ("b) 72)", 72, "b"),
        ("we leave at 10:31.", "10:31", 31),
        ("on 2024-01-05", "2024-01-05", 5),
        ("on May 20", "May 20", 20),
        ("version 1.2.3", "1.2.3", 3),
        ("between 3 and 5", "3 and 5", 5),
        ("it takes 3 to 5", "3 to 5", 5),
        ("it takes 3 hours and 30 minutes", "3 hours and 30 minutes", 30),
        ("as a whole 2x", "2x", 2),
        # nothing that could be right
        ("", "", 4),
        ("####", None, 4),
        ("no idea", "no idea", 4),
    ],
)
def test_where_the_answer_is(reward, completion, right, wrong):
    expected = None if right in ("", None) else 1.0
    assert reward(completions=[completion] * 2, answer=[right, wrong]) == [expected, 0.0]


def test_the_last_marked_answer_counts():
    texts = ["first #### 3, then #### 4", "#### 3\nNo:\n#### 4", r"\boxed{3}, no: \boxed{4}", "the answer is 3. No, the answer is 4."]
    assert NumericReward()(completions=texts, answer=[4] * 4) == [1.0] * 4
    assert NumericReward()(completions=texts, answer=[3] * 4) == [0.0] * 4


def test_a_heading_is_no_answer():
    texts = [STEPS + r"\boxed{460}", STEPS, NUMBERED, "#### 2. Check\nso 7"]
    assert NumericReward()(completions=texts, answer=[2] * 4) == [0.0] * 4


def test_no_answer_is_its_first_number():
    answers = [("10:31", "10:30"), ("3:2", 3), ("2024-01-05", 2024), ("1.2.3", 1.2), ("3 to 5", 3), ("2x", 2), (r"\boxed{5 and a half}", 5)]
    assert NumericReward()(completions=[text for text, _ in answers], answer=[gold for _, gold in answers]) == [0.0] * len(answers)


def test_what_looks_like_a_sum_is_none():
    """An algebra system would read 2024-01-05 as 2018, and 3-5 as -2."""
    answers = [("2024-01-05", 2018), ("3-5", -2), ("3:2", 1.5), ("1/2/4", 0.125), ("5 5", 25), ("2516_8", 2516), ("x: 5", "5x")]
    assert NumericReward()(completions=[rf"\boxed{{{text}}}" for text, _ in answers], answer=[gold for _, gold in answers]) == [0.0] * 7


def test_an_answer_in_latex_needs_no_dollars():
    golds, wrong = [r"1-\sqrt{2}", r"\left( 3, \frac{\pi}{2} \right)", r"2\pi"], ["1", "3", "2"]
    same = [r"\boxed{-\sqrt{2}+1}", r"$(3, \pi/2)$", r"The answer is $\pi + \pi$."]
    assert NumericReward()(completions=[*same, *wrong], answer=golds * 2) == [1.0] * 3 + [0.0] * 3


def test_the_tolerance_of_plain_numbers_boxes_and_mathematics():
    texts = ["#### 3.141", "The answer is 3.141", r"\boxed{3.141}", r"\boxed{\pi}", r"$\frac{314}{100}$"]
    assert TOLERANT(completions=texts, answer=[3.14] * 5) == [1.0] * 5


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("0", "0.0000001"),
        ("0.000000", "1/10000000"),
        ("0.0", r"\sqrt{2}\times10^{-9}"),
        ("3.14", r"\pi"),
        ("(3,4)", "(4,3)"),
        ("3", "(3,4)"),
        ("(3,4)", "3"),
        ("1,2,3", "123"),
        ("5 \\pmod{7}", "5"),
        ("50%", 5000),
        ("5 and 7", 7),
        ("2 dozen", 2),
        ("1 2", 12),
        ("31/2", "3 1/2"),
        ("1 1/2", "11/2"),
        ("Room 1 2", "Room 12"),
        ("2", "x=1 or x=2"),
        ("2", r"x=1 \text{ and } y=2"),
        ("E", "2.718282"),
        ("neve", "even"),
        ("1/0", "0"),
        ("1e99999", "1"),
        ("1" * 50, "1"),
    ],
)
def test_what_is_near_or_shares_a_part_is_wrong(reward, completion, answer):
    boxed = rf"\boxed{{{completion}}}"
    assert reward(completions=[completion, boxed, f"#### {completion}"], answer=[answer] * 3) == [0.0] * 3


@pytest.mark.parametrize("frame", ["{}", "#### {}", "The answer is {}", r"\boxed{{{}}}", "in the end {}."])
@pytest.mark.parametrize(
    ("answer", "near", "far"),
    [
        (3.14, "3.141", "3.16"),
        ("1/3", "0.333", "0.35"),
        (0.333, "1/3", "0.35"),
        ("45%", "45.01%", "45.1%"),
        (0.45, "45.5%", "47%"),
        (1e-3, "1.1e-3", "1e-1"),
        (r"$\pi$", "3.14", "3.2"),
        (3.14, r"$\pi$", r"$\pi + 1$"),
        (r"\sqrt{2}", "1.41", "1.43"),
        (r"(3.14, 2)", r"$(\pi, 2)$", r"$(\pi, 3)$"),
        (r"$\{1.5, 2.5\}$", r"$\{2.505, 1.5\}$", r"$\{2.6, 1.5\}$"),
        (r"[0, 3.14]", r"$[0, \pi]$", r"$[0, \pi)$"),
        ("x = 3.14", "3.141", "3.16"),
        (3.14, r"$\pi \approx 3.141$", r"$\pi + 1$"),
    ],
)
def test_the_tolerance_acts_everywhere(frame, answer, near, far):
    completions = [frame.format(near), frame.format(far)]
    tolerant = TOLERANT(completions=completions, answer=[answer] * 2)
    assert tolerant == [1.0, 0.0]


TOLERANT = NumericReward(tolerance=0.01)


def test_without_a_tolerance_near_is_wrong(reward):
    assert reward(completions=["3.141", r"\boxed{3.141}", "(3.141, 2)"], answer=[3.14, 3.14, "(3.14, 2)"]) == [0.0] * 3


@pytest.mark.parametrize(
    "five",
    [
        5,
        5.0,
        "5",
        np.int64(5),
        np.float32(5),
        np.array(5),
        np.array([5, 6]),
        np.str_("5"),
        torch.tensor(5),
        torch.tensor([6.0, 5.0]),
        torch.tensor(5, dtype=torch.bfloat16),
        [np.int64(5)],
        (6, 5),
        Fraction(10, 2),
        Decimal("5.0"),
        [{"role": "assistant", "content": "#### 5"}],
    ],
    ids=repr,
)
def test_numbers_of_any_library(reward, five):
    assert reward(completions=["5", "7"], answer=[five] * 2) == [1.0, 0.0]


def test_numbers_have_the_value_of_their_own_precision(reward):
    tenths = [0.1, np.float32(0.1), np.float16(0.1), torch.tensor(0.1), Decimal("0.1")]
    assert reward(completions=["0.1"] * 5, answer=tenths) == [1.0] * 5


@pytest.mark.parametrize("missing", [None, [], "", " ", [None], float("nan"), np.nan, np.float32("nan"), Decimal("nan")], ids=repr)
def test_a_row_without_an_answer_is_not_scored(reward, missing):
    assert reward(completions=["5", "5"], answer=[missing, 5]) == [None, 1.0]


@pytest.mark.parametrize("value", [{"a": 1}, b"5", 1j, object(), [["5", {"a": 1}]]], ids=["dict", "bytes", "complex", "object", "nested"])
def test_a_value_that_is_no_answer_is_an_error_that_names_it(reward, value):
    with pytest.raises(ValueError, match="column 'answer', row 1: the column must hold texts"):
        reward(completions=["5"] * 2, answer=[5, value])


def test_a_column_of_explanations_is_an_error_and_one_of_them_is_not_scored():
    explanation = "She began with five of them and then bought three more, so that in the end she had a few."
    fresh = NumericReward()
    with pytest.raises(ValueError, match=r"column 'answer', row 1: 'She began .*' is an explanation that marks no answer"):
        fresh(completions=["8"] * 2, answer=[None, explanation])
    assert fresh(completions=["8", "8"], answer=[explanation, 8]) == [None, 1.0]
    assert fresh(completions=["8"], answer=[explanation]) == [None]
    assert fresh(completions=["8"], answer=[f"{explanation} The answer is 8."]) == [1.0]


@pytest.mark.parametrize("text", ["9" * 4301, "#### " + "9" * 5000, r"\boxed{" + "9" * 5000 + "}", "0." + "3" * 6000, "1/" + "7" * 4400])
def test_numbers_of_any_length(reward, text):
    assert reward(completions=[text] * 3, answer=[5, r"\sqrt{2}", text]) == [0.0, 0.0, 1.0]


def test_a_long_number_of_the_column(reward):
    assert reward(completions=["1" + "0" * 5000, "1"], answer=[10**5000] * 2) == [1.0, 0.0]


PIECES = [
    *("the answer is", "Answer:", "x", "and", "to", "May", "72", "5", "1/2", "#### ", "\n", " ", "$", "\\$", "e5", "10^", "/0", "1e99999"),
    *("\\boxed{", "}", "\\frac", "{", "\\[", "\\]", "\\(", "\\)", "\\text{", "\\overline{", "\\begin{pmatrix}", "\\\\", "&", "\\,", "{,}"),
    *("**", "`", "_", "=", "\u2248", ":", "-", "\u2212", "\u00bd", "\u00b2", "\u221a", "%", ",", ".", "!", "\u0663", "\u03c0", "\u221e"),
    *("(", ")", "[", "]", "'", "<", "\\left", "\ud800", "\x00"),
]


def test_no_text_ends_a_run():
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(0, 20))) for _ in range(250)]
    reward = NumericReward(timeout=1)
    answers = [(72, "10:31", "x^2", "even", "1/2")[i % 5] for i in range(250)]
    assert set(reward(completions=texts, answer=answers)) <= {0.0, 1.0}


@pytest.mark.parametrize("piece", ["5", "1,", "####\n", "\\[", "$1", "**a", "\\boxed{", "answer is ", "(", "1 to ", "\n ", "\u2248"])
def test_long_texts_of_one_piece_are_read_in_a_moment(reward, piece):
    """No pattern tries every end for every beginning: that would take minutes here."""
    assert reward(completions=[piece * (20_000 // len(piece))], answer=["x + 1"]) == [0.0]
