"""BLEU, chrF, n-gram precision and ROUGE: published numbers, hand-computed ones, and which references count."""

import pickle

import pytest

from textgym.rewards import BleuReward, ChrfReward, ExactMatchReward, NgramPrecisionReward, RewardSet, RougeReward
from textgym.rewards import references as references_module

ROMANIAN = ("Producția de zahăr primă va fi exprimată în ceea ce privește zahărul alb;", "producţia de zahăr brut se exprimă în zahăr alb;")


def one(reward, completion, *references):
    (score,) = reward(completions=[completion], references=[list(references)])
    return score


@pytest.mark.parametrize(
    ("options", "published"),  # sacrebleu, test/test_sentence_bleu.py: to 0.001
    [
        ({"smoothing": "exp"}, 8.493),
        ({"smoothing": "none"}, 0.0),
        ({"smoothing": "floor"}, 4.51688),
        ({"smoothing": "floor", "smooth_value": 0.1}, 4.51688),
        ({"smoothing": "floor", "smooth_value": 0.5}, 10.1),
        ({"smoothing": "add-k", "smooth_value": 1}, 14.882),
        ({"smoothing": "add-k", "smooth_value": 2}, 21.389),
        ({"tokenize": "none"}, 7.347),
        ({"tokenize": "char"}, 40.8759),
        ({"tokenize": "char", "lowercase": True}, 42.0267),
    ],
)
def test_published_sentence_bleu(options, published):
    assert 100 * one(BleuReward(**options), *ROMANIAN) == pytest.approx(published, abs=6e-3 if published == 10.1 else 1e-3)


def test_bleu_by_hand():
    """Matches of 4, 3, 2 and 1 n-grams of 5, 4, 3 and 2; the lengths are equal, so there is no penalty."""
    completion, reference = "a b c d e", "a b c d f"
    assert one(BleuReward(), completion, reference) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert one(BleuReward(max_ngram_order=2), completion, reference) == pytest.approx((4 / 5 * 3 / 4) ** 0.5)


def test_effective_order_scores_short_texts(caplog):
    assert one(BleuReward(), "good film", "good film") == 1.0
    assert one(BleuReward(effective_order=False, smoothing="none"), "good film", "good film") == 0.0
    assert not caplog.records, "a warning at every completion"


@pytest.mark.parametrize(
    ("completion", "reference", "options", "published"),  # sacrebleu, test/test_chrf.py
    [
        ("aa", "ab", {"beta": 3, "eps_smoothing": True}, 8.3333),
        ("aa", "ab", {"beta": 3}, 25.0),
        ("a", "a", {"beta": 3, "eps_smoothing": True}, 16.6667),
        ("a b c", "abc", {"beta": 3}, 100.0),
        ("", "reference", {"beta": 3}, 0.0),
        (
            "Lapali po dechu, jejich životy skončily dřív, než skutečně začaly.",
            "Lapali po dechu a pak jejich život skončil - dřív, než skutečně mohl začít, připomněli.",
            {"eps_smoothing": True},
            57.15704,
        ),
    ],
)
def test_published_chrf(completion, reference, options, published):
    assert 100 * one(ChrfReward(**options), completion, reference) == pytest.approx(published, abs=1e-4)


@pytest.mark.parametrize(
    ("completion", "reference", "precision"),
    [
        ("$3.50", "$350", 0.0),
        ("-5", "5", 0.0),
        ("\u22125", "-5", 1.0),
        ("1.5", "15", 0.0),
        (".5", "5", 0.0),
        ("10:31", "1031", 0.0),
        ("3/4", "34", 0.0),
        ("3-5", "35", 0.0),
        ("50%", "50", 0.0),
        ("1,234", "1234", 1.0),
        ("1,5", "15", 0.0),
        ("It is 5.", "it is 5", 1.0),
        ("well-known - yes!", "wellknown yes", 1.0),
    ],
)
def test_the_precision_knows_numbers_apart(completion, reference, precision):
    assert NgramPrecisionReward()(completions=[completion], reference=[reference]) == [precision]


def test_the_clipped_precision_of_the_textbook():
    mats = "The cat is on the mat.", "There is a cat on the mat."
    assert one(NgramPrecisionReward(), "the the the the the the the", *mats) == 2 / 7
    assert one(NgramPrecisionReward(), "the the the the the the the", mats[1]) == 1 / 7
    assert one(NgramPrecisionReward(n=2), "The cat, the cat", *mats) == 1 / 3  # "the cat" twice of which one counts, "cat the" never
    assert one(NgramPrecisionReward(n=2), "cat", *mats) == one(NgramPrecisionReward(), "", *mats) == 0.0
    assert one(NgramPrecisionReward(), "Éléphant!", "«éléphant»") == 1.0


@pytest.mark.parametrize(
    ("kind", "completion", "reference", "recall", "precision", "fmeasure"),  # google-research, rouge/rouge_scorer_test.py
    [
        ("rouge1", "testing", "testing one two", 1 / 3, 1, 0.5),
        ("rouge2", "testing one", "testing one two", 0.5, 1, 2 / 3),
        ("rougeL", "testing two", "testing one two", 2 / 3, 1, 0.8),
        ("rougeLsum", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 0.8, 0.4, 0.53333),
        ("rougeL", "", "testing one two", 0, 0, 0),
        ("rougeLsum", "/", "w1 w2", 0, 0, 0),
    ],
)
def test_published_rouge(kind, completion, reference, recall, precision, fmeasure):
    for score, published in (("recall", recall), ("precision", precision), ("fmeasure", fmeasure)):
        assert one(RougeReward(kind, score=score), completion, reference) == pytest.approx(published, abs=1e-5)


def test_rouge_stems_and_takes_the_best_reference():
    assert one(RougeReward("rouge1", stemmer=True), "he testing", "he tested") == 1.0
    assert one(RougeReward("rouge1"), "he testing", "he tested") == 0.5
    assert one(RougeReward("rouge1"), "a b", "c d", "a c", "c") == 0.5


@pytest.mark.parametrize("make", [BleuReward, ChrfReward, NgramPrecisionReward, RougeReward])
def test_which_references_count(make):
    """One text, several, message lists or none; the first known column, or the one that is named."""
    texts = ["good film"] * 5
    values = ["good film", ["bad", "good film"], [{"role": "assistant", "content": "good film"}], None, []]
    assert make()(completions=texts, references=values) == [pytest.approx(1.0)] * 3 + [None] * 2
    assert make()(completions=["a"], reference=["a"], answer=["b"], references=["b"]) == [pytest.approx(1.0)]
    assert make(column="summary")(completions=["a"], reference=["b"], summary=["a"]) == [pytest.approx(1.0)]
    assert make()(completions=[[{"role": "assistant", "content": "good film"}]], answer=["good film"]) == [pytest.approx(1.0)]
    with pytest.raises(ValueError, match="none of the columns reference, references, answer; name the one"):
        make()(completions=["a"], summary=["a"])
    with pytest.raises(ValueError, match="no column 'summary'"):
        make(column="summary")(completions=["a"], reference=["a"])
    with pytest.raises(ValueError, match="must hold texts or lists of texts, got 3"):
        make()(completions=["a"], reference=[3])


@pytest.mark.parametrize("reward", [BleuReward(), ChrfReward(), NgramPrecisionReward(), RougeReward("rougeLsum", stemmer=True)])
def test_they_pickle_and_say_their_names(reward):
    assert one(pickle.loads(pickle.dumps(reward)), "the cats sat", "the cat sat") == one(reward, "the cats sat", "the cat sat")
    assert RewardSet.build(reward).names == ({"RougeReward": "rouge-lsum"}.get(type(reward).__name__, reward.__name__),)


def test_rows_without_a_reference_are_left_to_the_other_rewards(make_batch):
    rewards = RewardSet.build([NgramPrecisionReward(), ExactMatchReward()], [1.0, 10.0])
    batch = make_batch("a b", "a b", reference=["a", None], answer=[None, "a b"])
    assert rewards.terminal(batch)[0].tolist() == [0.5, 10.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BleuReward(smoothing="exponential"), "`smoothing` must be one of none, floor, add-k, exp, got 'exponential'"),
        (lambda: BleuReward(tokenize="14a"), "`tokenize` must be one of .*13a.*, got '14a'"),
        (lambda: BleuReward(max_ngram_order=0), "`max_ngram_order` must be at least 1"),
        (lambda: ChrfReward(char_order=0), "`char_order` must be at least 1"),
        (lambda: ChrfReward(beta=0), "`beta` must be more than 0"),
        (lambda: NgramPrecisionReward(n=0), "`n` must be at least 1"),
        (lambda: RougeReward("rouge-l"), "`kind` must be rouge1 to rouge9, rougeL or rougeLsum, got 'rouge-l'"),
        (lambda: RougeReward(score="f1"), "`score` must be one of fmeasure, precision, recall, got 'f1'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("make", "package"), [(BleuReward, "sacrebleu"), (ChrfReward, "sacrebleu"), (RougeReward, "rouge-score")])
def test_a_missing_package_is_named_with_its_extra(make, package, monkeypatch):
    monkeypatch.setattr(references_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"needs the package {package}, which is not installed: pip install 'textgym\[metrics\]'"):
        make()
