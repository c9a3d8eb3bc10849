"""`RewardModelTrainer`: every form of feedback has its loss, and the loop keeps the promises of all learners from examples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.utils import LinearSchedule
from torch import tensor

from textgym.agents import SFT, CausalLMPolicy, HeldOut, RewardModel, RewardModelTrainer
from textgym.agents.common.feedback_sets import LeftOut
from textgym.agents.common.reward_losses import (
    bradley_terry_loss,
    centering_penalty,
    classifier_loss,
    compared_loss,
    label_loss,
    ranking_loss,
    span_loss,
)
from textgym.feedback import (
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

PROMPT = "tell me. "
ANSWERS = ("yes", "no, never", "it is so", "what")


@pytest.fixture
def policy(tiny_model, tokenizer, device: str) -> CausalLMPolicy:
    return CausalLMPolicy(tiny_model("gpt2", len(tokenizer)), tokenizer, device=device)


def rewards_of(model: RewardModel, answers: Any = ANSWERS, prompt: str = PROMPT) -> torch.Tensor:
    return tensor(model.score_texts([prompt] * len(answers), answers), dtype=torch.float32)


def loss_of(model: RewardModel, records: list[Record], **settings: Any) -> float:
    return RewardModelTrainer(model, None, seed=0, **settings).evaluate(records).loss


# -- the loss of each form -----------------------------------------------------------------------------------------------


def test_comparisons(policy) -> None:
    model = RewardModel.from_policy(policy)
    r = rewards_of(model)[:, 0]
    record = Comparison(PROMPT, ANSWERS[0], ANSWERS[1])
    assert loss_of(model, [record]) == pytest.approx(float(-torch.nn.functional.logsigmoid(r[0] - r[1])), abs=1e-5)
    soft = Comparison(PROMPT, ANSWERS[2], ANSWERS[1], preference=0.3, margin=0.7, weight=3.0)
    wanted = bradley_terry_loss(r[[0, 2]] - r[[1, 1]], tensor([1.0, 0.3]), tensor([0.0, 0.7]))
    assert loss_of(model, [record, soft]) == pytest.approx(float(0.5 * wanted[0] + 1.5 * wanted[1]) / 2, abs=1e-5)
    half = bradley_terry_loss(r[[2]] - r[[1]], tensor([0.3]), tensor([0.35]))
    assert loss_of(model, [soft], margin_scale=0.5) == pytest.approx(float(half), abs=1e-5)
    centred = wanted[0] + 0.1 * centering_penalty(r[None, :2], torch.ones(1, 2, dtype=torch.bool))[0]
    assert loss_of(model, [record], center_coef=0.1) == pytest.approx(float(centred), abs=1e-5)


def test_rankings_by_plackett_luce_and_by_pairs(policy) -> None:
    model = RewardModel.from_policy(policy)
    r, ranks, everyone = rewards_of(model)[None, :, 0], tensor([[2, 1, 2, 3]]), torch.ones(1, 4, dtype=torch.bool)
    record = Ranking(PROMPT, ANSWERS, (2, 1, 2, 3))
    assert loss_of(model, [record]) == pytest.approx(float(ranking_loss(r, ranks, everyone)), abs=1e-5)
    better = ranks[:, :, None] < ranks[:, None, :]
    assert int(better.sum()) == 5  # of the six pairs one is a tie
    assert loss_of(model, [record], ranking_loss="pairwise") == pytest.approx(float(compared_loss(r, better.float(), better)), abs=1e-5)
    with pytest.raises(ValueError, match="record 0 of `feedback` is one tie, which has no pairs"):
        loss_of(model, [Ranking(PROMPT, ANSWERS, (1, 1, 1, 1))], ranking_loss="pairwise")


def test_a_ranking_is_one_batch_element(policy) -> None:
    """It weighs as much as one pair, its answers are read once, and never by two steps."""
    model = RewardModel.from_policy(policy)
    ranking, pair = Ranking(PROMPT, ANSWERS, (1, 2, 3, 4)), Comparison(PROMPT, "so", "be")
    trainer = RewardModelTrainer(model, [ranking, pair], ranking_loss="pairwise", seed=0)
    alone = [trainer.evaluate([record]).loss for record in (ranking, pair)]
    assert trainer.evaluate([ranking, pair]).loss == pytest.approx(sum(alone) / 2, abs=1e-5)
    assert trainer.examples is not None
    batch = trainer.examples.select(torch.arange(2), model.device)
    assert len(batch.lengths) == 6 and len(batch.piece_rows) == 6
    assert trainer.examples.num_tokens.tolist() == [4 * len(PROMPT) + sum(map(len, ANSWERS)), 2 * len(PROMPT) + 4]


def test_judgements(policy) -> None:
    model = RewardModel.from_policy(policy)
    r = rewards_of(model)[:, 0]
    record = Judgements(PROMPT, ANSWERS, (Judgement(0, 1, 1), Judgement(2, 1, -1), Judgement(3, 0, 0)))
    wanted = bradley_terry_loss(r[[0, 2, 3]] - r[[1, 1, 0]], tensor([1.0, 0.0, 0.5])).mean()
    assert loss_of(model, [record]) == pytest.approx(float(wanted), abs=1e-5)


def test_labels(policy) -> None:
    model = RewardModel.from_policy(policy)
    records = [Label(PROMPT, ANSWERS[0], True), Label("", "bad text", False)]
    r = tensor([float(rewards_of(model)[0]), float(rewards_of(model, ["bad text"], "")[0])])
    assert loss_of(model, records) == pytest.approx(float(label_loss(r, tensor([True, False])).mean()), abs=1e-5)
    two = RewardModel.from_policy(policy, output_names=["hate", "not hate"], label="not hate")
    logits = torch.cat([rewards_of(two)[:1], rewards_of(two, ["bad text"], "")])
    wanted = classifier_loss(logits, tensor([True, False]), positive=1).mean()
    assert loss_of(two, records) == pytest.approx(float(wanted), abs=1e-5)


def test_segments_are_sums_of_token_rewards(policy) -> None:
    model = RewardModel.from_policy(policy, per_token=True)
    first, second = Segment((5, 6), (7, 8, 9, 10), 1, 3), Segment((11,), (12, 13), 0, 1)

    def tokens(segment: Segment) -> torch.Tensor:
        ids = ([list(segment.prompt_ids)], [len(segment.prompt_ids)], [list(segment.completion_ids)], [len(segment.completion_ids)])
        return model.score_tokens(*(tensor(one, device=model.device) for one in ids))[0].detach().cpu()

    difference = tokens(first)[1:3].sum() - tokens(second)[0]
    record = SegmentPair(first, second, 0.8)
    assert loss_of(model, [record]) == pytest.approx(float(bradley_terry_loss(difference, tensor(0.8))), abs=1e-5)
    with pytest.raises(ValueError, match="record 0 of `feedback` is a pair of segments, which only a reward model with a score per token"):
        loss_of(RewardModel.from_policy(policy), [record])


def test_whole_texts_of_a_per_token_model_are_sums(policy) -> None:
    model = RewardModel.from_policy(policy, per_token=True)
    sums = tensor([sum(row) for row in model([PROMPT] * 2, ANSWERS[:2])])
    wanted = bradley_terry_loss(sums[0] - sums[1], tensor(1.0))
    assert loss_of(model, [Comparison(PROMPT, ANSWERS[0], ANSWERS[1])]) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
def test_markings_have_a_score_per_category_and_segment(policy, per_token: bool) -> None:
    model = RewardModel.from_policy(policy, output_names=["rude", "wrong"], per_token=per_token)
    text = "no, you fool. ok"
    spans = (Span("rude", 4, 12), Span("wrong", 0, 2), Span("wrong", 15, 16))
    record = Marking(PROMPT, text, spans)
    # Sub-sentences: "no,", " you fool.", " ok".
    clean = tensor([[[True, False], [False, True], [True, False]]])
    if per_token:
        every = model.output(0)([PROMPT], [text]), model.output(1)([PROMPT], [text])
        cuts = ((0, 3), (3, 13), (13, 17))  # the EOS behind the text belongs to the last segment
        r = tensor([[[sum(column[0][a:b]) for column in every] for a, b in cuts]])
    else:
        r = rewards_of(model, ["no,", "no, you fool.", text])[None]
    wanted = span_loss(r, clean, torch.ones(1, 3, dtype=torch.bool)).sum()
    assert loss_of(model, [record]) == pytest.approx(float(wanted), abs=1e-4)
    whole = loss_of(model, [Marking(PROMPT, text, ())], segmenter="whole")
    r = tensor(model.score_texts([PROMPT], [text]), dtype=torch.float32)
    assert whole == pytest.approx(float(label_loss(r, torch.ones_like(r)).sum()), abs=1e-4)
    with pytest.raises(
        ValueError, match=r"record 0 of `feedback` marks \['dull'\], but the reward model's outputs are \['rude', 'wrong'\]"
    ):
        loss_of(model, [Marking(PROMPT, text, (Span("dull", 0, 2),))])


def test_all_forms_in_one_data_set(policy) -> None:
    model = RewardModel.from_policy(policy)
    records = one_of_each_text_form()
    trainer = RewardModelTrainer(model, records, batch_size=3, seed=0)
    alone = [trainer.evaluate([record]).loss for record in records]
    assert trainer.evaluate(records).loss == pytest.approx(np.average(alone, weights=[1, 1, 1, 1, 2]), abs=1e-5)
    with pytest.raises(ValueError, match="a record that a reward is learned from, got 1 comments only; a judge"):
        trainer.read([Comment(PROMPT, ANSWERS[:1], "nice")])


def one_of_each_text_form() -> list[Record]:
    return [
        Comparison(PROMPT, ANSWERS[0], ANSWERS[1]),
        Ranking(PROMPT, ANSWERS, (1, 3, 2, 3)),
        Judgements(PROMPT, ANSWERS[:3], (Judgement(0, 1, 1), Judgement(2, 1, 0))),
        Label(PROMPT, ANSWERS[3], False),
        Comparison("and you? ", ANSWERS[2], ANSWERS[3], preference=0.5, weight=2.0),
    ]


# -- the loop ------------------------------------------------------------------------------------------------------------


def many_records() -> list[Record]:
    """Answers with an "a" in them are liked."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcd e"), 5)) for _ in range(80)]
    return [Comparison(PROMPT, *sorted(words[2 * i : 2 * i + 2], key=lambda word: -word.count("a"))) for i in range(40)]


def make(policy: CausalLMPolicy, **settings: Any) -> RewardModelTrainer:
    options = {"learning_rate": 3e-3, "n_epochs": 2, "batch_size": 8, "seed": 1, **settings}
    records = [*many_records(), *one_of_each_text_form()]
    return RewardModelTrainer(RewardModel.from_policy(policy, seed=2), records, **options)


def parameters(trainer: RewardModelTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in trainer.trainable_parameters()])


class SaveAt(BaseCallback):
    """Saves before a step."""

    def __init__(self, step: int, path: Path) -> None:
        super().__init__()
        self.step, self.path, self.steps = step, path, 0

    def _on_rollout_start(self) -> None:
        if self.steps == self.step:
            self.model.save(self.path)

    def _on_step(self) -> bool:
        self.steps += 1
        return True


def test_it_learns_and_two_runs_are_bit_identical(policy) -> None:
    first, second = (make(policy, n_epochs=4).learn() for _ in range(2))
    assert torch.equal(parameters(first), parameters(second))
    assert not torch.equal(parameters(first), parameters(make(policy, n_epochs=4, seed=2).learn()))
    before, after = make(policy).evaluate(many_records()), first.evaluate(many_records())
    assert after.loss < before.loss - 0.1 and after.accuracy.mean > 0.8


def test_a_resumed_run_equals_an_uninterrupted_one(policy, tmp_path: Path, device: str) -> None:
    held_out = one_of_each_text_form()
    settings = {"learning_rate": LinearSchedule(1e-2, 0.0, 1.0), "ranking_loss": "pairwise", "center_coef": 0.1, "segmenter": "sentence"}
    whole = make(policy, evaluation=HeldOut(held_out, interval=2), **settings)
    whole.learn(callback=SaveAt(5, tmp_path / "trainer"))
    evaluation = HeldOut(held_out, interval=2)
    records = [*many_records(), *one_of_each_text_form()]
    resumed = RewardModelTrainer.load(tmp_path / "trainer", records, device=device, evaluation=evaluation)
    assert (resumed.ranking_loss, resumed.center_coef, resumed.segmenter, resumed.batch_size) == ("pairwise", 0.1, "sentence", 8)
    assert 0 < resumed.num_timesteps < whole.num_timesteps
    resumed.learn(reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps
    assert torch.equal(parameters(resumed), parameters(whole))
    assert evaluation.state_dict() == whole.evaluation.state_dict()
    with pytest.raises(ValueError, match="`feedback` must be those that the checkpoint was trained on, 45 with"):
        RewardModelTrainer.load(tmp_path / "trainer", [*records[:-1], Comparison("and you? ", ANSWERS[2], ANSWERS[3], weight=2.0)])


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("kind", ["mixed", "rankings", "centred"])
def test_micro_batches_change_no_gradient(policy, micro_batch_size: int, kind: str) -> None:
    gradients, numbers = [], []
    for size in (None, micro_batch_size):
        extra: dict[str, Any] = {"rankings": {"ranking_loss": "pairwise"}, "centred": {"center_coef": 0.3}}.get(kind, {})
        trainer = make(policy, batch_size=45, max_grad_norm=None, micro_batch_size=size, learning_rate=0.0, **extra)
        trainer.learn(1, log_interval=None)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.reward_model.parameters() if p.grad is not None]))
        numbers.append(trainer._last_metrics)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    assert gradients[0].norm() > 1e-3
    assert numbers[1] == pytest.approx(numbers[0], abs=1e-5)


def test_metrics_by_hand(policy) -> None:
    model = RewardModel.from_policy(policy)
    r = rewards_of(model)[:, 0].tolist()
    records = [
        Comparison(PROMPT, ANSWERS[0], ANSWERS[1], weight=3.0),
        Comparison(PROMPT, ANSWERS[2], ANSWERS[1], preference=0.2),
        Ranking(PROMPT, ANSWERS[:3], (2, 1, 2)),
        Label(PROMPT, ANSWERS[3], False),
    ]
    trainer = RewardModelTrainer(model, records, center_coef=0.5, seed=0)
    found = trainer.numbers_on(trainer.examples)
    weights = np.array([3, 1, 1, 1]) / 6
    right = [r[0] > r[1], 0.2 if r[2] > r[1] else 0.8, np.mean([r[1] > r[0], r[1] > r[2]]), r[3] < 0]
    margins = [r[0] - r[1], -0.6 * (r[2] - r[1]), r[1] - (r[0] + r[2]) / 2, -r[3]]
    centring = [(r[0] + r[1]) ** 2, (r[1] + r[2]) ** 2, np.mean([(r[0] + r[1]) ** 2, (r[0] + r[2]) ** 2, (r[1] + r[2]) ** 2]), 0.0]
    means = [(r[0] + r[1]) / 2, (r[1] + r[2]) / 2, sum(r[:3]) / 3, r[3]]
    assert found["train/accuracy"] == pytest.approx(weights @ np.array(right, dtype=float), abs=1e-5)
    assert found["train/reward_margin"] == pytest.approx(weights @ margins, abs=1e-4)
    assert found["train/centering"] == pytest.approx(weights @ centring, abs=1e-4)
    assert found["train/reward_mean"] == pytest.approx(weights @ means, abs=1e-4)


def test_centring_keeps_the_level_and_margins_hold_apart(policy) -> None:
    def trained(records: list[Record], **settings: Any) -> np.ndarray:
        trainer = RewardModelTrainer(RewardModel.from_policy(policy), records, 1e-2, n_epochs=60, seed=0, **settings).learn()
        return trainer.reward_model.score_texts([PROMPT] * 2, ANSWERS[:2])[:, 0]

    tie = [Comparison(PROMPT, ANSWERS[0], ANSWERS[1], preference=0.7)]
    centred, plain = trained(tie, center_coef=1.0), trained(tie)
    # The level is −1.67 without the term; with it Adam's steps leave it within ±0.04 of zero, whenever one stops.
    assert abs(centred.mean()) < 0.1 < 1.0 < abs(plain.mean())
    assert plain[0] - plain[1] == pytest.approx(np.log(0.7 / 0.3), abs=0.02)
    apart = trained([Comparison(PROMPT, ANSWERS[0], ANSWERS[1], preference=0.7, margin=1.5)])
    assert apart[0] - apart[1] == pytest.approx(1.5 + np.log(0.7 / 0.3), abs=0.05)


def test_early_stopping_keeps_the_best_model(policy, tmp_path: Path) -> None:
    """The held-out labels say the opposite, so their loss rises from the first measurement on."""
    held_out = [Comparison(one.prompt, one.rejected, one.chosen) for one in many_records()]
    evaluation = HeldOut(held_out, interval=2, patience=3, best_model_path=tmp_path / "best")
    trainer = make(policy, n_epochs=50, evaluation=evaluation).learn()
    assert evaluation.waited == 3
    assert trainer._n_updates == evaluation.iterations < 50 * 6
    best = RewardModel.from_pretrained(tmp_path / "best", device=trainer.policy.device)
    assert RewardModelTrainer(best, None).evaluate(held_out).loss == pytest.approx(evaluation.best_loss, abs=1e-4)
    assert {"eval/loss", "eval/accuracy", "eval/reward_margin"} <= set(evaluation.last)


def test_every_learner_from_examples_can_be_stopped_early(task, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [0], "completion_ids": [1, 4]}, {"prompt_ids": [0], "completion_ids": [2, 4]}]
    evaluation = HeldOut([{"prompt_ids": [0], "completion_ids": [3, 3, 3]}], interval=1, patience=2)
    agent = SFT(task.policy(), rows, 1e-2, n_epochs=50, batch_size=2, seed=0, evaluation=evaluation).learn()
    assert agent._n_updates < 50 and evaluation.waited == 2
    with pytest.raises(ValueError, match="got a HeldOut of examples"):
        from textgym.agents import RLOO

        RLOO(task.policy(), task.envs(4), num_generations=2, evaluation=evaluation)


def test_callbacks_progress_bar_and_log(policy, tmp_path: Path) -> None:
    trainer = make(policy, tensorboard_log=str(tmp_path / "tb"), evaluation=HeldOut(one_of_each_text_form(), interval=3))
    logged: list[dict[str, float]] = []

    class Spy(BaseCallback):
        def _on_training_start(self) -> None:
            dump = self.model.logger.dump

            def spy(step: int = 0) -> None:
                logged.append(dict(self.model.logger.name_to_value))
                dump(step)

            self.model.logger.dump = spy

        def _on_step(self) -> bool:
            return True

    trainer.learn(callback=[Spy(), CheckpointCallback(save_freq=4, save_path=str(tmp_path / "saved"))], log_interval=4, progress_bar=True)
    keys = {"train/loss", "train/accuracy", "train/reward_margin", "train/reward_mean", "train/learning_rate", "train/grad_norm"}
    assert keys | {"train/epoch", "eval/loss", "time/total_timesteps"} <= set().union(*logged)
    assert (next((tmp_path / "saved").iterdir()) / "model" / "config.json").exists()
    assert "accuracy" in trainer.progress_text({})
    assert trainer.get_parameters().keys() >= {"policy", "optimizer"}


def test_the_report_stands_beside_the_length_baseline(policy) -> None:
    """Records in which the longer text wins nine times in ten, and a model that knows nothing."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(100):
        short, long = "".join(rng.choice(list("abc"), 3)), "".join(rng.choice(list("abc"), 6))
        records.append(Comparison(f"prompt {number // 2} ", *((long, short) if number % 10 else (short, long))))
    trainer = RewardModelTrainer(RewardModel.from_policy(policy), records[:50], seed=0)
    report = trainer.evaluate(records[50:])
    assert report.length_accuracy.mean == pytest.approx(0.9)
    assert report.longer_wins and report.num_records == report.num_decisions == 50
    assert report.accuracy.low < report.accuracy.mean < report.accuracy.high
    assert 0 <= report.expected_calibration_error <= 1
    # The direction comes from the training feedback, not from what is measured.
    flipped = [Comparison(one.prompt, one.rejected, one.chosen) for one in records[50:]]
    assert trainer.evaluate(flipped).length_accuracy.mean == pytest.approx(0.1)
    rewards = {text: float(trainer.reward_model([one.prompt], [text])[0]) for one in records[50:] for text in (one.chosen, one.rejected)}
    assert len(rewards) <= 100


def test_labels_and_markings_are_reported_too(policy) -> None:
    labels = [Label(PROMPT, "good one" if number % 2 else "bad", bool(number % 2)) for number in range(20)]
    for names in (None, ["bad", "good"]):
        model = RewardModel.from_policy(policy, output_names=names, label=None if names is None else "good")
        report = RewardModelTrainer(model, labels, 1e-2, n_epochs=20, seed=0).learn().evaluate(labels)
        assert report.accuracy.mean == 1.0 and report.length_accuracy.mean == 1.0
    apart = [Label("", f"text {number}", number % 3 == 0) for number in range(30)]  # no prompt that they share
    interval = RewardModelTrainer(RewardModel.from_policy(policy), None).evaluate(apart).accuracy
    assert interval.high - interval.low > 0.1
    marked = [Marking(PROMPT, "a fool. ok.", (Span("rude", 2, 6),)), Marking(PROMPT, "a joy. ok.", ())] * 4
    model = RewardModel.from_policy(policy, output_names=["rude"])
    report = RewardModelTrainer(model, marked, 1e-2, n_epochs=30, seed=0).learn().evaluate(marked)
    assert report.num_decisions == 16 and report.accuracy.mean == 1.0


def test_too_long_records(policy) -> None:
    model = RewardModel.from_policy(policy)
    records = [Comparison(PROMPT, "a" * 200, "b"), Comparison(PROMPT, "a", "b")]
    with pytest.raises(ValueError, match=r"record 0 of `feedback` has 209 tokens, but the reward model reads 128; pass `max_tokens=128`"):
        RewardModelTrainer(model, records)
    trainer = RewardModelTrainer(model, records, max_tokens=128)
    assert trainer.examples is not None and len(trainer.examples) == 1
    with pytest.raises(ValueError, match="a record within the 128 tokens that the reward model reads, but the shortest of these 1 has 209"):
        RewardModelTrainer(model, records[:1], max_tokens=128)
    with pytest.raises(ValueError, match="`max_tokens` must be at least 10 to leave one of these 2 records of `feedback`, got 5"):
        RewardModelTrainer(model, records, max_tokens=5)


def test_what_is_left_out_is_counted(policy) -> None:
    model = RewardModel.from_policy(policy)
    good = [Comparison(PROMPT, "a", "b"), Ranking(PROMPT, ("a", "a", "b"), (1, 2, 3))]
    same = [Comparison(PROMPT, "a", "a"), Comparison(PROMPT, "a", "a", preference=0.5), Ranking(PROMPT, ("a", "a"), (1, 2))]
    records = [Comparison(PROMPT, "a" * 200, "b"), *good, *same, Comment(PROMPT, ("a",), "nice"), Label(PROMPT, "c" * 200, True)]
    with pytest.warns(UserWarning, match=r"3 of 5 rows of `feedback` have answers that are the same tokens.*record 3 .*record 5 "):
        trainer = RewardModelTrainer(model, records, max_tokens=128, seed=0)
    assert trainer.examples is not None and len(trainer.examples) == 2
    assert trainer.examples.left_out == LeftOut(too_long=2, same_answers=3, comments=1)
    report = trainer.evaluate([*records, *same])
    assert report.num_records == 2 and report.left_out == {"too_long": 2, "same_answers": 6, "comments": 1}
    assert "2 longer than `max_tokens`, 6 whose answers are the same tokens, 1 comments" in str(report)
    assert report.to_dict()["left_out"]["too_long"] == 2
    with pytest.raises(ValueError, match="`feedback` must have answers that differ, but the answers of every row are the same tokens"):
        RewardModelTrainer(model, same, seed=0)
    alike = RewardModelTrainer(model, None, seed=0)
    alike.connect(same, sampled=True)  # answers that a policy wrote may be the same now and then
    report = alike.learn().evaluate(good)
    assert report.num_records == 2 and alike.evaluate(same).accuracy.mean == 0.5
    with pytest.raises(ValueError, match="at least one record with a `weight` above 0"):
        RewardModelTrainer(model, [Comparison(PROMPT, "a", "b", weight=0.0)])


TIE = Ranking(PROMPT, ANSWERS[:3], (1, 1, 1))


@pytest.mark.parametrize(
    "ties", [[TIE], [Comparison(PROMPT, "a", "b", preference=0.5)], [Judgements(PROMPT, ("a", "b"), (Judgement(0, 1, 0),))]]
)
def test_ties_alone_teach_equality_which_is_said_and_measuring_goes_on(policy, ties: list[Record]) -> None:
    decided = [Comparison(PROMPT, "yes yes", "no")]
    model = RewardModel.from_policy(policy)
    with pytest.warns(UserWarning, match="1 records, all of them ties.*equally good, and nothing else"):
        trainer = RewardModelTrainer(model, ties, 1e-2, n_epochs=20, seed=0)
    report = trainer.learn().evaluate(decided)
    assert 0 <= report.accuracy.mean <= 1 and np.isfinite(report.log_loss)
    if ties == [TIE]:  # a ranking's ties are no pairs: nothing tells which length wins
        assert report.longer_wins is None and np.isnan(report.length_accuracy.mean)
        assert "decides nothing" in str(report) and report.to_dict()["length_accuracy"]["mean"] is None
        scores = model.score_texts([PROMPT] * 3, ANSWERS[:3])
        assert scores.std() < 0.2


def test_what_decides_nothing_is_measured_as_not_a_number(policy) -> None:
    trainer = RewardModelTrainer(RewardModel.from_policy(policy), many_records(), seed=0)
    report = trainer.evaluate([TIE, TIE])
    assert report.num_records == 2 and report.num_decisions == 0 and np.isfinite(report.loss)
    assert all(np.isnan(value) for value in (report.accuracy.mean, report.log_loss, report.expected_calibration_error))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["accuracy"]["mean"] is None
    # The decisions that there are weigh nothing.
    report = trainer.evaluate([TIE, Comparison(PROMPT, "a", "b", weight=0.0)])
    assert report.num_decisions == 1 and np.isnan(report.accuracy.mean) and np.isnan(report.log_loss)


def test_markings_are_reported_by_category(policy) -> None:
    """What is known of every category by hand: shares of clean segments, and scores that tell them apart or do not."""
    fool, bore = Span("rude", 2, 6), Span("dull", 8, 10)
    marked = [Marking(PROMPT, "a fool. ok.", (fool, bore)), Marking(PROMPT, "a joy. ok.", ()), Marking("x ", "a fool. ok.", (fool,))]
    model = RewardModel.from_policy(policy, output_names=["rude", "dull"])
    report = RewardModelTrainer(model, marked, 1e-2, n_epochs=40, segmenter="sentence", seed=0).learn().evaluate(marked)
    assert set(report.by_category) == {"rude", "dull"}
    rude, dull = report.by_category["rude"], report.by_category["dull"]
    assert rude.num_decisions == dull.num_decisions == 6 and report.num_decisions == 12
    assert rude.clean == pytest.approx(4 / 6) and dull.clean == pytest.approx(5 / 6)
    assert rude.accuracy.mean == 1.0 and rude.area_under_roc == 1.0
    assert report.accuracy.mean == pytest.approx((rude.accuracy.mean + dull.accuracy.mean) / 2)
    assert report.to_dict()["by_category"]["rude"]["area_under_roc"] == 1.0 and "rude: 6 verdicts, 66.7% clean" in str(report)
    assert RewardModelTrainer(RewardModel.from_policy(policy), many_records()).evaluate(many_records()).by_category == {}


def test_a_measurement_reads_every_text_once_and_its_loss_is_that_of_training(policy) -> None:
    trainer = RewardModelTrainer(RewardModel.from_policy(policy), many_records(), center_coef=0.1, micro_batch_size=7, seed=0)
    report = trainer.evaluate(many_records(), progress_bar=True)
    assert trainer.examples is not None
    assert report.loss == pytest.approx(trainer.numbers_on(trainer.examples)["train/loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ranking_loss": "listwise"}, "`ranking_loss` must be one of"),
        ({"center_coef": -1.0}, "`center_coef` must be"),
        ({"margin_scale": -1.0}, "`margin_scale` must be"),
        ({"segmenter": "word"}, "`segmenter` must be one of"),
        ({"max_tokens": 0}, "`max_tokens` must be"),
        ({"n_epochs": 0}, "`n_epochs` must be"),
        ({"learning_rate": -1.0}, "`learning_rate` must be"),
    ],
)
def test_bad_arguments(policy, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(policy, **settings)


def test_what_it_cannot_train(policy) -> None:
    with pytest.raises(ValueError, match="`reward_model` must be a RewardModel, got CausalLMPolicy"):
        RewardModelTrainer(policy, [])
    with pytest.raises(ValueError, match="`feedback` must hold at least one"):
        RewardModelTrainer(RewardModel.from_policy(policy), [])
    with pytest.raises(ValueError, match="so one must be chosen"):
        RewardModelTrainer(RewardModel.from_policy(policy, num_outputs=3), many_records())
    with pytest.raises(ValueError, match="no feedback"):
        RewardModelTrainer(RewardModel.from_policy(policy), None).learn()
    for interval in (0, 1.5):
        with pytest.raises(ValueError, match="`interval` must be"):
            HeldOut([], interval=interval)  # type: ignore[arg-type]


def test_records_whose_answers_are_the_same_tokens_are_counted(policy) -> None:
    model = RewardModel.from_policy(policy)
    same = [Comparison(PROMPT, "yes", "yes"), Ranking(PROMPT, ("no", "no", "no"), (1, 2, 2))]
    with pytest.warns(UserWarning, match=r"2 of 4 rows of `feedback` have answers that are the same .*record 0 .*, record 2 "):
        RewardModelTrainer(model, [same[0], Comparison(PROMPT, "yes", "no"), same[1], Label(PROMPT, "yes", True)])
    with pytest.raises(ValueError, match="`feedback` must have answers that differ"):
        RewardModelTrainer(model, same)
