"""The replay gives back what it was given, forgets the oldest, is small, and goes through a checkpoint."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from textgym.agents.common.batches import RolloutBatch, StepObservations
from textgym.agents.common.replay import SequenceReplay


def rollout(first: int, count: int, prompt_width: int = 3, width: int = 4, device: str = "cpu") -> RolloutBatch:
    """Rows whose every number says which row it is; what is behind the ends is rubbish."""
    rows = torch.arange(first, first + count)
    lengths, prompt_lengths = 1 + rows % width, 1 + rows % prompt_width
    tokens = torch.arange(width)
    batch = RolloutBatch(
        prompt_ids=10 * rows[:, None] + torch.arange(prompt_width),
        prompt_lengths=prompt_lengths,
        completion_ids=100 * rows[:, None] + tokens,
        lengths=lengths,
        log_probs=torch.zeros(count, width),
        rewards=rows[:, None] + 0.1 * tokens,
        truncated=rows % 2 == 0,
        unshaped_returns=torch.zeros(count),
        kl_per_sequence=torch.zeros(count),
        reference_log_probs=-rows[:, None] - 0.01 * tokens,
    )
    return batch.select(torch.arange(count))


def row_numbers(batch: RolloutBatch) -> list[int]:
    return [int(row) for row in batch.completion_ids[:, 0] // 100]


def check_rows(batch: RolloutBatch, prompt_width: int = 3, width: int = 4) -> None:
    """Every row is wholly the one that its first token says."""
    for i, row in enumerate(row_numbers(batch)):
        length, prompt_length = 1 + row % width, 1 + row % prompt_width
        tokens = torch.arange(length)
        assert batch.lengths[i] == length and batch.prompt_lengths[i] == prompt_length
        assert batch.truncated[i] == (row % 2 == 0)
        torch.testing.assert_close(batch.completion_ids[i, :length].cpu(), 100 * row + tokens)
        torch.testing.assert_close(batch.prompt_ids[i, -prompt_length:].cpu(), 10 * row + torch.arange(prompt_width)[-prompt_length:])
        torch.testing.assert_close(batch.rewards[i, :length].cpu(), row + 0.1 * tokens)
        torch.testing.assert_close(batch.reference_log_probs[i, :length].cpu(), -row - 0.01 * tokens)
        for name in ("completion_ids", "rewards", "reference_log_probs"):
            assert not getattr(batch, name)[i, length:].any()


def test_rows_come_back_whole_and_none_twice(device) -> None:
    replay = SequenceReplay(50, vocab_size=50_000)
    batch = rollout(0, 30)
    replay.add(batch, batch.rewards)
    found = replay.sample(20, np.random.default_rng(0), device)
    check_rows(found)
    assert len(set(row_numbers(found))) == 20
    everything = replay.sample(500, np.random.default_rng(0))
    assert sorted(row_numbers(everything)) == list(range(30))


def test_the_oldest_are_forgotten_first() -> None:
    replay = SequenceReplay(8, vocab_size=50_000)
    for first in range(0, 15, 5):
        batch = rollout(first, 5)
        replay.add(batch, batch.rewards)
    found = replay.sample(8, np.random.default_rng(0))
    assert len(replay) == 8
    assert sorted(row_numbers(found)) == list(range(7, 15))
    check_rows(found)


def test_of_a_rollout_larger_than_the_replay_the_last_rows_stay() -> None:
    replay = SequenceReplay(4, vocab_size=50_000)
    batch = rollout(0, 11)
    replay.add(batch, batch.rewards)
    assert sorted(row_numbers(replay.sample(4, np.random.default_rng(0)))) == [7, 8, 9, 10]


def test_draws_are_uniform_and_follow_the_seed() -> None:
    replay = SequenceReplay(10, vocab_size=50_000)
    batch = rollout(0, 10)
    replay.add(batch, batch.rewards)
    generator, counts = np.random.default_rng(0), np.zeros(10)
    for _ in range(2000):
        counts[row_numbers(replay.sample(3, generator))] += 1
    assert abs(counts - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)
    again = [row_numbers(replay.sample(3, np.random.default_rng(5))) for _ in range(2)]
    assert again[0] == again[1]


def test_rows_may_get_wider_and_narrower() -> None:
    replay = SequenceReplay(20, vocab_size=50_000)
    narrow, wide = rollout(0, 2, prompt_width=2, width=2), rollout(4, 3, prompt_width=5, width=6)
    replay.add(narrow, narrow.rewards)
    replay.add(wide, wide.rewards)
    narrow = rollout(2, 2, prompt_width=2, width=2)
    replay.add(narrow, narrow.rewards)
    found = replay.sample(7, np.random.default_rng(0))
    check_rows(found.select(torch.tensor([i for i, row in enumerate(row_numbers(found)) if row < 4])), 2, 2)
    check_rows(found.select(torch.tensor([i for i, row in enumerate(row_numbers(found)) if row >= 4])), 5, 6)


@pytest.mark.parametrize(("vocab_size", "bytes_per_id"), [(50_257, 2), (65_536, 2), (65_537, 4)])
def test_a_row_takes_less_than_a_kilobyte_beyond_its_ids(vocab_size, bytes_per_id) -> None:
    replay, prompt, new = SequenceReplay(100, vocab_size), 16, 32
    batch = RolloutBatch(
        prompt_ids=torch.full((100, prompt), vocab_size - 1),
        prompt_lengths=torch.full((100,), prompt),
        completion_ids=torch.full((100, new), vocab_size - 1),
        lengths=torch.full((100,), new),
        log_probs=torch.zeros(100, new),
        rewards=torch.zeros(100, new),
        truncated=torch.zeros(100, dtype=torch.bool),
        unshaped_returns=torch.zeros(100),
        kl_per_sequence=torch.zeros(100),
        reference_log_probs=torch.zeros(100, new),
    )
    replay.add(batch, batch.rewards)
    assert (replay.sample(3, np.random.default_rng(0)).completion_ids == vocab_size - 1).all()
    assert replay.num_bytes / 100 == (prompt + new) * bytes_per_id + 265


def test_a_checkpoint_holds_it(tmp_path) -> None:
    replay = SequenceReplay(8, vocab_size=50_000)
    batch = rollout(0, 11)
    for part in batch.select(torch.arange(5)), batch.select(torch.arange(5, 11)):
        replay.add(part, part.rewards)
    save_file(replay.tensors(), tmp_path / "replay.safetensors")
    other = SequenceReplay(8, vocab_size=50_000)
    other.load(load_file(tmp_path / "replay.safetensors"), replay.position)
    more = rollout(20, 2)
    for each in (replay, other):
        each.add(more, more.rewards)
    found = [each.sample(5, np.random.default_rng(3)) for each in (replay, other)]
    assert row_numbers(found[0]) == row_numbers(found[1])
    torch.testing.assert_close(found[0].rewards, found[1].rewards)
    check_rows(found[1])


def test_rewards_are_those_given_and_closed_loops_are_refused() -> None:
    replay, batch = SequenceReplay(4, vocab_size=50_000), rollout(0, 3)
    replay.add(batch, 2 * batch.rewards)
    found = replay.sample(3, np.random.default_rng(0))
    order = torch.tensor(row_numbers(found))
    torch.testing.assert_close(found.rewards, 2 * (batch.rewards * batch.completion_mask)[order])
    steps = StepObservations(torch.zeros(3, 4, 7, dtype=torch.long), torch.ones(3, 4, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be open-loop for DQN"):
        replay.add(RolloutBatch(**{**vars(batch), "steps": steps}), batch.rewards)
