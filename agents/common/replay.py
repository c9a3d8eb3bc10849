"""A replay of whole completions: ids as small integers and two or three numbers per token, never an observation per token."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from textgym.agents.common.batches import RolloutBatch

# Per token of the prompt, per token of the completion, and one number per row.
PROMPT_COLUMNS, TOKEN_COLUMNS = ("prompt_ids",), ("completion_ids", "rewards", "reference_log_probs")


class SequenceReplay:
    """A ring of the last `capacity` completions, in host memory.

    A row of T new tokens holds its ids in 2 bytes each (4 from 65,536 tokens on), 4 bytes of reward and 4 of log π_ref per new token, and 9
    bytes more: with T = 32 that is 265 bytes beyond the ids, and what padding shorter prompts and completions takes.

    Args:
        capacity: completions.
        vocab_size: V, which decides how wide an id is.

    Attributes:
        size: completions that are there.
        position: where the next one goes.
    """

    def __init__(self, capacity: int, vocab_size: int) -> None:
        self.capacity, self.size, self.position = capacity, 0, 0
        id_type = np.uint16 if vocab_size <= 2**16 else np.int32
        self._columns: dict[str, npt.NDArray[np.generic]] = {
            "prompt_ids": np.zeros((capacity, 0), id_type),
            "prompt_lengths": np.zeros(capacity, np.int32),
            "completion_ids": np.zeros((capacity, 0), id_type),
            "rewards": np.zeros((capacity, 0), np.float32),
            "reference_log_probs": np.zeros((capacity, 0), np.float32),
            "lengths": np.zeros(capacity, np.int32),
            "truncated": np.zeros(capacity, np.bool_),
        }

    def __len__(self) -> int:
        return self.size

    @property
    def num_bytes(self) -> int:
        """Bytes of all columns, whether a row is filled or not."""
        return sum(column.nbytes for column in self._columns.values())

    def add(self, rollout: RolloutBatch, rewards: Tensor) -> None:
        """Adds the completions of a rollout, over the oldest ones once it is full.

        Args:
            rollout: episodes, with `reference_log_probs`; of more than `capacity` the last are kept.
            rewards: what is learned from, (B, T); in the place of `rollout.rewards`.
        """
        if rollout.steps is not None:
            raise ValueError(
                "`rollout` must be open-loop for DQN: its observations are not the prompt and the tokens sent so far "
                "(a wrapper changes observations or actions, or another side takes a turn), which a replay of token ids cannot give back. "
                "Leave the wrapper away, or use an on-policy agent (PPO, REINFORCE) there."
            )
        assert rollout.reference_log_probs is not None, "filled in for agents that apply β themselves"
        tables = {
            "prompt_ids": rollout.prompt_ids,
            "prompt_lengths": rollout.prompt_lengths,
            "completion_ids": rollout.completion_ids,
            "rewards": rewards,
            "reference_log_probs": rollout.reference_log_probs,
            "lengths": rollout.lengths,
            "truncated": rollout.truncated,
        }
        added = {name: table.cpu().numpy()[-self.capacity :] for name, table in tables.items()}
        count = len(added["lengths"])
        places = (self.position + np.arange(count)) % self.capacity
        for name, table in added.items():
            if table.ndim == 2:
                self._widen(name, table.shape[1])
            column = self._columns[name]
            if name in PROMPT_COLUMNS:  # left-padded: the last token stands in the last place
                column[places, column.shape[1] - table.shape[1] :] = table
            elif name in TOKEN_COLUMNS:
                column[places, : table.shape[1]] = table
            else:
                column[places] = table
        self.position = int((self.position + count) % self.capacity)
        self.size = min(self.size + count, self.capacity)

    def _widen(self, name: str, width: int) -> None:
        """Makes room for longer rows: the first ones, or those of another environment."""
        column = self._columns[name]
        missing = width - column.shape[1]
        if missing > 0:
            self._columns[name] = np.pad(column, ((0, 0), (missing, 0) if name in PROMPT_COLUMNS else (0, missing)))

    def sample(self, batch_size: int, generator: np.random.Generator, device: torch.device | str = "cpu") -> RolloutBatch:
        """Draws `batch_size` completions uniformly, none of them twice; all there are, in random order, if they are fewer.

        Returns:
            A batch with `rewards` and `reference_log_probs` as they were added. The behaviour's log-probs are not kept (zeros stand there):
            no loss that learns from a replay may need them.
        """
        rows = generator.choice(self.size, min(batch_size, self.size), replace=False)
        tables = {name: torch.from_numpy(_as_torch_likes(column[rows])).to(device) for name, column in self._columns.items()}
        lengths = tables["lengths"].long()
        # Rows shorter than the widest end in whatever an older one left there.
        mask = torch.arange(tables["rewards"].shape[1], device=lengths.device) < lengths[:, None]
        rewards = tables["rewards"] * mask
        batch = RolloutBatch(
            prompt_ids=tables["prompt_ids"].long(),
            prompt_lengths=tables["prompt_lengths"].long(),
            completion_ids=tables["completion_ids"].long() * mask,
            lengths=lengths,
            log_probs=torch.zeros_like(rewards),
            rewards=rewards,
            truncated=tables["truncated"],
            unshaped_returns=rewards.sum(1),
            kl_per_sequence=torch.full_like(rewards[:, 0], torch.nan),
            reference_log_probs=tables["reference_log_probs"] * mask,
        )
        return batch.select(torch.arange(len(rows), device=lengths.device))

    def tensors(self) -> dict[str, Tensor]:
        """The filled rows as tensors, for a checkpoint; they share memory with the replay."""
        return {name: torch.from_numpy(column[: self.size]) for name, column in self._columns.items()}

    def load(self, tensors: dict[str, Tensor], position: int) -> None:
        """Takes back what `tensors` gave, and where the next row goes."""
        self.size, self.position = len(tensors["lengths"]), position
        for name, tensor in tensors.items():
            table = tensor.cpu().numpy()
            if table.ndim == 2:
                self._widen(name, table.shape[1])
            self._columns[name][: self.size] = table


def _as_torch_likes(column: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Torch computes with few of its unsigned types; the rows of one batch may be wide."""
    return column.astype(np.int64) if column.dtype == np.uint16 else column
