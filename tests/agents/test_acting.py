"""Token by token through observations: the cache is reused where it can be, and its numbers are those of a fresh run."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import textgym  # noqa: F401  (registers the environments)
from textgym.agents import CausalLMPolicy
from textgym.agents.common.acting import ActingState

PROMPT_TOKENS, NEW_TOKENS = 12, 20


class Rows:
    """Observations as the environment makes them: prompts of any length, rows that grow and start again on their own."""

    def __init__(self, rows, vocab_size, seed=0):
        self.rng, self.vocab_size = np.random.default_rng(seed), vocab_size
        self.ids = np.zeros((rows, PROMPT_TOKENS + NEW_TOKENS), np.int64)
        self.mask = np.zeros_like(self.ids, dtype=np.int8)
        self.steps = np.zeros(rows, int)
        for row in range(rows):
            self.restart(row)

    def restart(self, row):
        length = self.rng.integers(1, PROMPT_TOKENS + 1)
        self.ids[row], self.mask[row], self.steps[row] = self.rng.integers(0, self.vocab_size, self.ids.shape[1]), 0, 0
        self.mask[row, PROMPT_TOKENS - length : PROMPT_TOKENS] = 1

    def append(self, row, token):
        self.ids[row, PROMPT_TOKENS + self.steps[row]] = token
        self.mask[row, PROMPT_TOKENS + self.steps[row]] = 1
        self.steps[row] += 1

    def show(self):
        return {"input_ids": self.ids.copy(), "attention_mask": self.mask.copy()}


@pytest.fixture
def policy(model, tokenizer, device):
    return CausalLMPolicy(model, tokenizer, device=device)


@pytest.fixture
def work(policy, monkeypatch):
    """How many tokens the model was run on, call by call."""
    tokens = []
    features = policy.backbone.features
    monkeypatch.setattr(policy.backbone, "features", lambda ids, *rest: tokens.append(ids.numel()) or features(ids, *rest))
    return tokens


def fresh(policy, observation):
    """Log-probs of all tokens by a run of each row alone."""
    result = []
    for ids, mask in zip(observation["input_ids"], observation["attention_mask"], strict=True):
        row = torch.as_tensor(ids[mask.astype(bool)][None], device=policy.device)
        with torch.no_grad():
            result.append(policy.model(row).logits[0, -1, : policy.vocab_size].log_softmax(-1))
    return torch.stack(result)


def test_acting_equals_a_fresh_run_whatever_the_rows_do(policy):
    rows, state = Rows(6, policy.vocab_size), ActingState()
    rng = np.random.default_rng(1)
    for _ in range(60):
        observation = rows.show()
        logits = state.observe(policy.backbone, observation)
        torch.testing.assert_close(logits.log_softmax(-1), fresh(policy, observation), atol=1e-4, rtol=0)
        for row in range(6):
            kind = rng.choice(["grow", "grow", "grow", "grow", "stay", "restart"])
            if kind == "restart" or rows.steps[row] == NEW_TOKENS:
                rows.restart(row)
            elif kind == "grow":
                rows.append(row, rng.integers(policy.vocab_size))


def test_a_growing_batch_costs_one_token_per_row_and_step(policy, work):
    rows = Rows(6, policy.vocab_size)
    for step in range(NEW_TOKENS):
        work.clear()
        actions, _ = policy.predict(rows.show())
        log_probs = policy.log_probs(rows.show(), actions)
        assert work == [6] if step else len(work) == 1, "what asks again about the same observations finds them known"
        assert log_probs.shape == (6,)
        for row in range(6):
            rows.append(row, actions[row])


def test_a_row_that_restarts_is_run_alone(policy, work):
    rows = Rows(6, policy.vocab_size)
    policy.predict(rows.show())
    for row in range(6):
        rows.append(row, 5)
    rows.restart(2)
    work.clear()
    policy.predict(rows.show())
    assert work == [6, int(rows.mask[2].sum())]


@pytest.mark.parametrize("change", ["another token", "another prompt", "one token fewer", "two tokens more", "other rows", "wider"])
def test_a_changed_history_is_never_taken_for_a_longer_one(policy, change):
    rows, state = Rows(4, policy.vocab_size), ActingState()
    for row in range(4):
        rows.append(row, 7)
    state.observe(policy.backbone, rows.show())
    for row in range(4):
        rows.append(row, 9)
    if change == "another token":
        rows.ids[:, PROMPT_TOKENS] = 8
    if change == "another prompt":
        rows.ids[:, PROMPT_TOKENS - 1] = (rows.ids[:, PROMPT_TOKENS - 1] + 1) % policy.vocab_size
    if change == "one token fewer":
        rows.mask[:, PROMPT_TOKENS:] = 0
    if change == "two tokens more":
        for row in range(4):
            rows.append(row, 3)
    observation = rows.show()
    if change == "other rows":
        observation = {key: value[[1, 0, 3]] for key, value in observation.items()}
    if change == "wider":
        observation = {key: np.pad(value, ((0, 0), (3, 0))) for key, value in observation.items()}
    logits = state.observe(policy.backbone, observation)
    torch.testing.assert_close(logits.log_softmax(-1), fresh(policy, observation), atol=1e-4, rtol=0)


def test_an_update_of_the_weights_is_noticed(policy):
    rows = Rows(3, policy.vocab_size)
    policy.predict(rows.show())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05)
    prompt_ids, prompt_lengths = policy.encode_prompts(["abc"])
    policy.score(prompt_ids, prompt_lengths, prompt_ids, prompt_lengths).log_probs.sum().backward()
    optimizer.step()
    for row in range(3):
        rows.append(row, 5)
    logits = policy._acting.observe(policy.backbone, rows.show())
    torch.testing.assert_close(logits.log_softmax(-1), fresh(policy, rows.show()), atol=1e-4, rtol=0)


def test_predict_speaks_stable_baselines3(policy):
    rows = Rows(5, policy.vocab_size)
    batch = rows.show()
    single = {key: value[2] for key, value in batch.items()}
    actions, state = policy.predict(batch, deterministic=True)
    assert actions.dtype == np.int64
    assert actions.tolist() == fresh(policy, batch).argmax(-1).tolist()
    action, _ = policy.predict(single, deterministic=True)
    assert np.ndim(action) == 0
    assert int(action) == actions[2]
    again, _ = policy.predict(batch, state, np.zeros(5, bool), deterministic=True)
    assert again.tolist() == actions.tolist()
    mine = ActingState()
    assert policy.predict(batch, mine)[1] is mine


def test_predict_samples_the_policys_distribution_from_its_own_generator(model, tokenizer, device):
    policy = CausalLMPolicy(model, tokenizer, device=device, top_k=3, temperature=1.5, seed=4)
    row = Rows(1, policy.vocab_size).show()
    batch = {key: np.repeat(value, 3000, 0) for key, value in row.items()}
    before = torch.get_rng_state()
    actions, _ = policy.predict(batch)
    assert torch.equal(torch.get_rng_state(), before)
    counts = np.bincount(actions, minlength=policy.vocab_size)
    top = (fresh(policy, row)[0] / 1.5).topk(3)
    assert set(np.flatnonzero(counts)) == set(top.indices.tolist())
    probs = top.values.softmax(-1).cpu().numpy()
    np.testing.assert_allclose(counts[top.indices.cpu()] / 3000, probs, atol=5 * np.sqrt(0.25 / 3000))
    policy.seed(4)
    assert policy.predict(batch)[0].tolist() == actions.tolist()


def no_reward(completions, **_):
    return [0.0] * len(completions)


def test_acting_in_the_environment_is_one_step_per_token(policy, tokenizer, work):
    """The closed loop of stock code: whole episodes in an environment with next-step autoreset."""
    texts = ["abc", "hello", "a", "the cat"]
    envs = gym.make_vec(
        "TextGen-v0", num_envs=4, prompts=texts, tokenizer=tokenizer, reward=no_reward, max_prompt_tokens=8, max_new_tokens=10
    )
    observation, _ = envs.reset(seed=0)
    for _ in range(35):
        work.clear()
        actions, _ = policy.predict(observation)
        assert sum(work) <= 4 + 4 * 8, "a step of all rows, and at most a prompt for each"
        expected = fresh(policy, observation).gather(-1, torch.as_tensor(actions, device=policy.device)[:, None])[:, 0]
        np.testing.assert_allclose(policy.log_probs(observation, actions), expected.cpu(), atol=1e-4)
        observation, *_ = envs.step(actions)
    envs.close()


@pytest.mark.parametrize(
    ("mask", "message"),
    [([[1, 1, 0, 0], [0, 0, 0, 0]], r"rows without a single token: \[1\]"), ([[1, 0, 1, 0], [1, 1, 0, 0]], "one block of ones")],
)
def test_observations_that_are_none_are_refused(policy, mask, message):
    with pytest.raises(ValueError, match=message):
        policy.predict({"input_ids": np.ones((2, 4), np.int64), "attention_mask": np.array(mask)})
