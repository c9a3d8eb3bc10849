"""Token MDPs small enough to write down: every prompt, every completion, every state."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from textgym.exact.texts import TreeReward, prompt_text, word_tokenizer
from textgym.types import BoolArray, IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Table = npt.NDArray[np.float64]
TreeRewardFunction = Callable[[int, Sequence[int]], float]


class TreeBatch(NamedTuple):
    """Every (prompt, completion) pair of a tree as one batch, prompt-major: row `i * C + j` is completion j of prompt i.

    Attributes:
        prompt_ids: (N * C, P) int64, left-padded with token 0.
        prompt_lengths: (N * C,) int64.
        completion_ids: (N * C, H) int64, token 0 behind the end.
        lengths: (N * C,) int64.
    """

    prompt_ids: IntArray
    prompt_lengths: IntArray
    completion_ids: IntArray
    lengths: IntArray


class TokenTree:
    """A token MDP with every completion enumerated: what an agent's result is compared with.

    A completion is a list of at most `horizon` tokens that ends with its first EOS, or at the horizon without one. The states are
    the prefixes that are no completions. A *tabular policy* is a (N, S, V) array of log π(a|s), S states for each of N prompts; a
    *distribution over completions* is a (N, C) array of log π(y|x). Functions that take a policy take a tabular one, or an object
    with the method `sequence_log_probs` of `textgym.types.TokenPolicy` (every policy of `textgym.agents` has it).
    `textgym.exact.solutions` has what can be computed on a tree.

    The tree is also the description of a real environment:

        gym.make_vec("TextGen-v0", num_envs=64, prompts=tree.prompt_texts, tokenizer=tree.tokenizer(),
                     reward=tree.reward_function(), max_new_tokens=tree.horizon)

    Args:
        vocab_size: V, at least 2.
        horizon: H, the most tokens of a completion, at least 1.
        eos_token_id: the token that ends a completion.
        prompts: N lists of token ids, of any lengths, all different, without EOS.
        reward: r(x, y): a function of (index of the prompt, ids of the completion with its EOS), or a (N, C) table in the order of
            `completions`.

    Attributes:
        completions: (C, H) int64, every completion in lexicographic order, token 0 behind the end.
        lengths: (C,) int64.
        mask: (C, H) bool, True at the tokens of each completion.
        states: the S prefixes, as tuples; the empty one first.
        state_of: (C, H) int64, the state in which each token is chosen; -1 behind the end.
        next_state: (S, V) int64, the state after an action; -1 where the episode ends.
        completion_of: (S, V) int64, the completion that an action finishes; -1 where the episode goes on.
        rewards: (N, C) float64.

    Example:
        >>> tree = TokenTree(vocab_size=3, horizon=2, eos_token_id=2, prompts=[[0], [0, 1]], reward=lambda i, y: float(len(y) + i))
        >>> tree.num_completions, tree.num_states
        (7, 3)
        >>> tree.ids(4)
        (1, 1)
        >>> tree.rewards[0].tolist()
        [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0]
    """

    def __init__(
        self,
        vocab_size: int,
        horizon: int,
        eos_token_id: int,
        prompts: Sequence[Sequence[int]],
        reward: TreeRewardFunction | npt.ArrayLike,
    ) -> None:
        _check_size(vocab_size, horizon, eos_token_id)
        self.vocab_size, self.horizon, self.eos_token_id = vocab_size, horizon, eos_token_id
        self.prompts = _checked_prompts(prompts, vocab_size, eos_token_id)
        self._enumerate()
        self.rewards = self._reward_table(reward)

    def _enumerate(self) -> None:
        """Walks the tree depth first, so that the completions come in lexicographic order."""
        completions: list[tuple[int, ...]] = []
        states: list[tuple[int, ...]] = []
        paths: list[list[int]] = []
        edges: dict[tuple[int, int], tuple[int, int]] = {}

        def visit(prefix: tuple[int, ...], path: list[int]) -> int:
            state = len(states)
            states.append(prefix)
            for token in range(self.vocab_size):
                child = (*prefix, token)
                if token == self.eos_token_id or len(child) == self.horizon:
                    edges[state, token] = (-1, len(completions))
                    completions.append(child)
                    paths.append([*path, state])
                else:
                    edges[state, token] = (visit(child, [*path, state]), -1)
            return state

        visit((), [])
        self.states = tuple(states)
        self.lengths: IntArray = np.array([len(ids) for ids in completions], dtype=np.int64)
        self.mask: BoolArray = np.arange(self.horizon) < self.lengths[:, None]
        self.completions: IntArray = _padded(completions, self.horizon, 0)
        self.state_of: IntArray = _padded(paths, self.horizon, -1)
        pairs = np.array([edges[s, a] for s in range(len(states)) for a in range(self.vocab_size)], dtype=np.int64)
        self.next_state: IntArray = pairs[:, 0].reshape(len(states), self.vocab_size)
        self.completion_of: IntArray = pairs[:, 1].reshape(len(states), self.vocab_size)

    def _reward_table(self, reward: TreeRewardFunction | npt.ArrayLike) -> Table:
        shape = (self.num_prompts, self.num_completions)
        if callable(reward):
            reward = [[reward(i, self.ids(j)) for j in range(shape[1])] for i in range(shape[0])]
        table = np.array(reward, dtype=np.float64)
        if table.shape != shape:
            raise ValueError(f"`reward` must be a function or a table of (prompts, completions) = {shape}, got shape {table.shape}.")
        if not np.isfinite(table).all():
            row, column = np.argwhere(~np.isfinite(table))[0]
            raise ValueError(f"`reward` must be finite, got {table[row, column]} for prompt {row} and completion {self.ids(column)}.")
        return table

    @property
    def num_prompts(self) -> int:
        """N."""
        return len(self.prompts)

    @property
    def num_completions(self) -> int:
        """C, completions of each prompt."""
        return len(self.lengths)

    @property
    def num_states(self) -> int:
        """S, states of each prompt."""
        return len(self.states)

    @property
    def max_prompt_tokens(self) -> int:
        """P, the length of the longest prompt."""
        return max(len(ids) for ids in self.prompts)

    def ids(self, completion: int) -> tuple[int, ...]:
        """Returns the tokens of a completion given by its index, EOS included, without padding."""
        return tuple(self.completions[completion, : self.lengths[completion]].tolist())

    def batch(self) -> TreeBatch:
        """Returns all N * C pairs of a prompt and a completion as one batch."""
        count, width = self.num_completions, self.max_prompt_tokens
        prompt_ids = np.zeros((self.num_prompts, width), dtype=np.int64)
        for row, ids in enumerate(self.prompts):
            prompt_ids[row, width - len(ids) :] = ids
        prompt_lengths = np.array([len(ids) for ids in self.prompts], dtype=np.int64)
        return TreeBatch(
            prompt_ids=np.repeat(prompt_ids, count, axis=0),
            prompt_lengths=np.repeat(prompt_lengths, count),
            completion_ids=np.tile(self.completions, (self.num_prompts, 1)),
            lengths=np.tile(self.lengths, self.num_prompts),
        )

    @property
    def prompt_texts(self) -> list[str]:
        """The prompts in words of `tokenizer()`."""
        return [prompt_text(ids) for ids in self.prompts]

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Returns a transformers tokenizer whose token `i` is the word `w{i}`, EOS excepted, which is `</s>`; it has no pad token."""
        return word_tokenizer(self.vocab_size, self.eos_token_id)

    def reward_function(self) -> TreeReward:
        """Returns r(x, y) in the calling form of `textgym.rewards`; it counts its queries."""
        table = {
            (prompt_text(ids), self.ids(j)): float(self.rewards[i, j])
            for i, ids in enumerate(self.prompts)
            for j in range(self.num_completions)
        }
        return TreeReward(table)

    def uniform_policy(self) -> Table:
        """Returns the tabular policy with π(a|s) = 1/V everywhere, (N, S, V)."""
        return np.full((self.num_prompts, self.num_states, self.vocab_size), -np.log(self.vocab_size))

    def random_policy(self, seed: int, scale: float = 1.0) -> Table:
        """Returns a tabular policy whose logits are normal with standard deviation `scale`, (N, S, V)."""
        logits = scale * np.random.default_rng(seed).standard_normal((self.num_prompts, self.num_states, self.vocab_size))
        return np.asarray(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))

    def token_log_probs(self, policy: Any) -> Table:
        """Returns log π(y_t|s_t) of every token of every completion, (N, C, H), zero behind the end."""
        shape = (self.num_prompts, self.num_completions, self.horizon)
        if isinstance(policy, np.ndarray):
            expected = (self.num_prompts, self.num_states, self.vocab_size)
            if policy.shape != expected:
                raise ValueError(f"`policy` must be a tabular policy of shape (N, S, V) = {expected}, got {policy.shape}.")
            # Index -1 behind the end picks some state: masked.
            return np.where(self.mask, policy[:, self.state_of, self.completions], 0.0)
        if not callable(getattr(policy, "sequence_log_probs", None)):
            raise ValueError(
                f"`policy` must be a tabular policy or have `sequence_log_probs(prompt_ids, prompt_lengths, actions, lengths)`, "
                f"got {type(policy).__name__}."
            )
        log_probs = np.asarray(policy.sequence_log_probs(*self.batch()), dtype=np.float64).reshape(shape)
        return np.where(self.mask, log_probs, 0.0)

    def log_probs(self, policy: Any) -> Table:
        """Returns log π(y|x) of every completion, (N, C)."""
        return np.asarray(self.token_log_probs(policy).sum(axis=-1))

    def tabular(self, log_probs: Table) -> Table:
        """Returns the tabular policy (N, S, V) of a distribution over completions (N, C); uniform at states that it never reaches."""
        mass = np.full((self.num_prompts, self.num_states, self.vocab_size), -np.inf)
        # Children have larger indices than their parents, so that one pass from the back sums up every subtree.
        for state in reversed(range(self.num_states)):
            ends, follows = self.completion_of[state], self.next_state[state]
            below = np.logaddexp.reduce(mass[:, follows], axis=-1)  # (N, V), of state -1 too: not used
            mass[:, state] = np.where(ends >= 0, log_probs[:, ends], below)
        totals = np.logaddexp.reduce(mass, axis=-1, keepdims=True)
        reached = np.isfinite(totals)
        return np.where(reached, mass - np.where(reached, totals, 0.0), -np.log(self.vocab_size))


def _check_size(vocab_size: int, horizon: int, eos_token_id: int) -> None:
    if vocab_size < 2:
        raise ValueError(f"`vocab_size` must be at least 2 (EOS and another token), got {vocab_size}.")
    if horizon < 1:
        raise ValueError(f"`horizon` must be at least 1, got {horizon}.")
    if not 0 <= eos_token_id < vocab_size:
        raise ValueError(f"`eos_token_id` must be in [0, {vocab_size}), got {eos_token_id}.")
    leaves = (vocab_size - 1) ** horizon
    if leaves > 1_000_000:
        raise ValueError(f"`vocab_size` and `horizon` must be small: {vocab_size} and {horizon} have more than {leaves} completions.")


def _checked_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, eos_token_id: int) -> tuple[tuple[int, ...], ...]:
    checked = tuple(tuple(int(token) for token in ids) for ids in prompts)
    if not checked:
        raise ValueError("`prompts` must not be empty.")
    for index, ids in enumerate(checked):
        if not ids or any(not 0 <= token < vocab_size or token == eos_token_id for token in ids):
            raise ValueError(f"`prompts` must be non-empty lists of ids in [0, {vocab_size}) without EOS {eos_token_id}; {index} is {ids}.")
    if len(set(checked)) < len(checked):
        twin = next(b for a, b in pairwise(sorted(checked)) if a == b)
        raise ValueError(f"`prompts` must all be different, got {twin} twice.")
    return checked


def _padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> IntArray:
    table = np.full((len(rows), width), fill, dtype=np.int64)
    for row, ids in enumerate(rows):
        table[row, : len(ids)] = ids
    return table
