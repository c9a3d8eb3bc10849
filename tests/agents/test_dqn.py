"""DQN: what it explores, what it may take, what it refuses, that it goes on exactly, and what it learns."""

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from textgym.agents import DQN
from textgym.agents.common.q_values import score_states, states_of
from textgym.agents.common.sampling import Sampling, draw_epsilon_greedy, kept_tokens
from textgym.exact import TokenTree, hard_solution, soft_solution, total_variation
from textgym.kl import AdaptiveKLController
from textgym.wrappers.vector import KLShaping

KINDS: dict[str, dict[str, Any]] = {
    "hard": {"target_update_interval": 3},
    "hard, polyak, not double, two steps": {"tau": 0.2, "target_update_interval": 1, "double_q": False, "n_steps": 2},
    "hard, boltzmann, top-k": {"boltzmann_temperature": LinearSchedule(1.0, 0.2, 1.0), "top_k": 3},
    "soft": {"beta": 0.5},
    "soft, one step": {"beta": AdaptiveKLController(0.5, target=0.5, horizon=1000), "consistency": "one_step", "target_update_interval": 3},
    "soft, paths of two, top-p": {"beta": LinearSchedule(0.5, 0.3, 1.0), "n_steps": 2, "top_p": 0.8},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def of_kind(kind: str) -> dict[str, Any]:
    """Its options afresh: an adaptive controller moves."""
    return copy.deepcopy(KINDS[kind])


SMALL = {"learning_rate": 1e-3, "batch_size": 8, "gradient_steps": 2, "learning_starts": 0, "seed": 1}


def parameters(agent: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in agent.trainable_parameters()])


# -- exploration ----------------------------------------------------------------------------------------------------


def test_epsilon_greedy_draws_follow_its_probabilities_and_says_them() -> None:
    logits = torch.tensor([0.3, -torch.inf, 2.0, -1.0, -torch.inf]).expand(20_000, -1)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, log_probs = draw_epsilon_greedy(logits, uniforms, 0.3)
    expected = torch.tensor([0.1, 0.0, 0.8, 0.1, 0.0])
    torch.testing.assert_close(log_probs, expected[tokens].log())
    shares = torch.bincount(tokens, minlength=5) / 20_000
    assert (shares - expected).abs().max() < 5 * (0.8 * 0.2 / 20_000) ** 0.5
    assert not shares[1] and not shares[4]
    assert (draw_epsilon_greedy(logits, uniforms, 0.0)[0] == 2).all()
    one = draw_epsilon_greedy(logits, uniforms, 1.0)[0]
    assert (torch.bincount(one, minlength=5)[[0, 2, 3]] - 20_000 / 3).abs().max() < 5 * (20_000 * 2 / 9) ** 0.5
    # One number decides alone: the largest ones below ε take the last of the kept tokens, those above it the best.
    assert draw_epsilon_greedy(logits[:3], torch.tensor([0.0, 0.3 - 1e-12, 0.3], dtype=torch.float64), 0.3)[0].tolist() == [0, 3, 2]


@pytest.mark.parametrize("options", [{}, {"boltzmann_temperature": 5.0}, {"beta": 0.5}], ids=["epsilon-greedy", "boltzmann", "soft"])
@pytest.mark.parametrize("action_set", [{"top_k": 2}, {"top_p": 0.6}], ids=str)
def test_what_is_taken_is_in_the_references_set(task, options, action_set) -> None:
    agent = DQN(task.policy(), task.envs(96), **SMALL, **options, **action_set)
    with torch.no_grad():  # away from the reference, whose set it has to stay
        for parameter in agent.policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    rollout = agent.collector.walk(np.arange(96) % 3, agent.sampling_generator)
    taken, outside_of_own = set(), 0
    for row in range(96):
        for t in range(int(rollout.lengths[row])):
            prompt = rollout.prompt_ids[row, -int(rollout.prompt_lengths[row]) :]
            ids = torch.cat([prompt, rollout.completion_ids[row, :t]])[None]
            own, reference = (model(input_ids=ids).logits[0, -1] for model in (agent.policy.model, agent.reference.model))
            token = int(rollout.completion_ids[row, t])
            assert kept_tokens(reference, Sampling(**action_set))[token]
            outside_of_own += not kept_tokens(own, Sampling(**action_set))[token]
            taken.add((tuple(ids[0].tolist()), token))
    assert outside_of_own > 10  # the policy's own set is another one
    assert len(taken) > 10


@pytest.mark.parametrize(("progress", "expected"), [(1.0, 1.0), (0.9, 0.55), (0.8, 0.1), (0.3, 0.1)])
def test_epsilon_falls_in_a_line_and_stays(task, progress, expected) -> None:
    agent = DQN(task.policy(), task.envs(4), exploration_fraction=0.2, exploration_final_eps=0.1)
    agent._current_progress_remaining = progress
    assert agent.exploration_rate == pytest.approx(expected)
    assert agent.behaviour() == {"epsilon": agent.exploration_rate}


def test_boltzmann_samples_in_units_of_reward(task) -> None:
    agent = DQN(task.policy(temperature=0.8), task.envs(4), boltzmann_temperature=0.5, advantage_scale=2.0)
    # softmax(Q/0.5) with Q = V + 2 log π and π at 0.8.
    assert agent.behaviour()["sampling"].temperature == pytest.approx(0.8 * 0.5 / 2)
    assert DQN(task.policy(), task.envs(4), beta=0.5).behaviour() == {}


def test_predict_is_greedy_inside_the_set(task) -> None:
    free, bound = (DQN(task.policy(), task.envs(4), **options) for options in ({}, {"top_k": 1}))
    observation, _ = task.envs(4).reset(seed=0)
    for agent in (free, bound):
        with torch.no_grad():
            agent.policy.model.transformer.wte.weight.neg_()
    own = free.predict(observation, deterministic=True)[0]
    inside = bound.predict(observation, deterministic=True)[0]
    of_reference = bound.reference.predict(observation, deterministic=True)[0]
    np.testing.assert_array_equal(inside, of_reference)
    np.testing.assert_array_equal(bound.predict(observation)[0], of_reference)
    assert (own != of_reference).any()
    single = {key: value[0] for key, value in observation.items()}
    assert bound.predict(single, deterministic=True)[0] == of_reference[0]


# -- targets --------------------------------------------------------------------------------------------------------


class HandMade:
    """A hard agent with its batch, and a second implementation of its loss: one state at a time."""

    def __init__(self, task: Any, **options: Any) -> None:
        settings = {"gamma": 0.9, "advantage_scale": 0.7, "critic": "joint", **SMALL, **options}
        self.agent = agent = DQN(
            task.policy(), task.envs(24, **options.pop("env", {})), **{k: v for k, v in settings.items() if k != "env"}
        )
        torch.nn.init.normal_(agent.critic.network.output.weight, generator=torch.Generator().manual_seed(0))
        self.lagged = task.policy(seed=5)
        for name, tensor in agent.target.tensors().items():
            if name.startswith("policy."):
                tensor.copy_(dict(self.lagged.named_parameters())[name.removeprefix("policy.")])
            else:
                tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
        self.batch = agent.collector.walk(np.arange(24) % 3, agent.sampling_generator)
        self.batch = agent.with_reference(self.batch)

    def q_table(self, lagged: bool, row: int, t: int) -> torch.Tensor:
        """Q(s_t, ·) of a row, -inf outside the reference's set."""
        agent, batch = self.agent, self.batch
        ids = torch.cat([batch.prompt_ids[row, -int(batch.prompt_lengths[row]) :], batch.completion_ids[row, :t]])[None]
        policy = self.lagged if lagged else agent.policy
        outputs = policy.model(input_ids=ids, output_hidden_states=True)
        kept = kept_tokens(agent.reference.model(input_ids=ids).logits[0, -1], Sampling(top_k=agent.top_k, top_p=agent.top_p))
        logits = outputs.logits[0, -1]
        log_probs = (logits if kept is None else logits.masked_fill(~kept, -torch.inf)).log_softmax(-1)
        hidden = outputs.hidden_states[-1][0, -1]
        head = agent.critic.network
        if lagged:
            weights = {n.removeprefix("critic.network."): w for n, w in agent.target.tensors().items() if n.startswith("critic.")}
            value = torch.func.functional_call(head, weights, (hidden,))
        else:
            value = head(hidden)
        return value + agent.advantage_scale * log_probs

    def loss(self) -> torch.Tensor:
        agent, batch, total = self.agent, self.batch, 0.0
        steps = agent.n_steps or 1
        for row in range(len(batch)):
            length = int(batch.lengths[row])
            for t in range(length):
                end = min(t + steps, length)
                target = sum(agent.gamma ** (k - t) * batch.rewards[row, k] for k in range(t, end))
                if end < length or batch.truncated[row]:
                    lagged = self.q_table(True, row, end).detach()
                    best = self.q_table(False, row, end).argmax() if agent.double_q else lagged.argmax()
                    target = target + agent.gamma ** (end - t) * lagged[best]
                total = total + 0.5 * (self.q_table(False, row, t)[batch.completion_ids[row, t]] - target) ** 2
        return total / len(batch)


@pytest.mark.parametrize("double_q", [True, False])
@pytest.mark.parametrize("n_steps", [1, 2])
@pytest.mark.parametrize("action_set", [{}, {"top_k": 2}, {"top_p": 0.7}], ids=str)
def test_hard_loss_and_gradient_by_hand(task, double_q, n_steps, action_set) -> None:
    hand = HandMade(task, double_q=double_q, n_steps=n_steps, **action_set)
    check_by_hand(hand)


def test_rows_cut_by_a_time_limit_bootstrap_and_no_others(task) -> None:
    hand = HandMade(task, top_k=3, env={"max_episode_steps": 2})
    assert hand.batch.truncated.any() and not hand.batch.truncated.all()
    check_by_hand(hand)


def check_by_hand(hand: HandMade) -> None:
    found, expected = hand.agent.hard_loss(hand.batch, len(hand.batch)), hand.loss()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = [p for p in hand.agent.trainable_parameters()]
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]) for loss in (found, expected)]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def test_states_have_the_references_sets_and_the_taken_token_is_in(task) -> None:
    agent = DQN(task.policy(), task.envs(24, max_episode_steps=2), top_k=1, beta=0.5, **SMALL)
    rollout = agent.collector.walk(np.arange(24) % 3, agent.sampling_generator)
    states = states_of(rollout, agent.policy.mask, end_states=True)
    assert states.taken.sum() == rollout.num_tokens and len(states.taken) == rollout.num_tokens + len(rollout)
    scores = score_states(agent.policy, agent.critic, states, best=True)
    # One token a state: what was taken is what is best, for certain.
    width = rollout.completion_ids.shape[1]
    assert torch.equal(scores.best[:, :width][rollout.completion_mask], rollout.completion_ids[rollout.completion_mask])
    assert not scores.log_probs[:, :width][rollout.completion_mask].any()
    # A taken token outside the set (a rounding at its edge) counts as in.
    other = states_of(rollout, agent.policy.mask, end_states=False)
    other.layout.targets.copy_((other.layout.targets + 1) % 5)
    assert score_states(agent.policy, agent.critic, other).log_probs.isfinite().all()


def test_chunks_of_a_large_vocabulary_change_nothing(task, monkeypatch) -> None:
    hand = HandMade(task, top_k=3)
    weights = list(hand.agent.trainable_parameters())
    whole = torch.autograd.grad(hand.agent.hard_loss(hand.batch, 24), weights)
    monkeypatch.setattr("textgym.agents.common.scoring.PLAIN_LOGITS", 1)
    monkeypatch.setattr("textgym.agents.common.scoring.CHUNK_LOGITS", 35)
    for gradient, expected in zip(torch.autograd.grad(hand.agent.hard_loss(hand.batch, 24), weights), whole, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


# -- the loop -------------------------------------------------------------------------------------------------------


@every_kind
def test_two_runs_with_the_same_seed_are_bit_identical(task, kind) -> None:
    first, second = (DQN(task.policy(), task.envs(), **SMALL, **of_kind(kind)).learn(400) for _ in range(2))
    assert torch.equal(parameters(first), parameters(second))
    assert not torch.equal(
        parameters(first), parameters(DQN(task.policy(), task.envs(), **{**SMALL, "seed": 2}, **of_kind(kind)).learn(400))
    )


@every_kind
def test_a_resumed_run_equals_an_uninterrupted_one(task, kind, tmp_path: Path) -> None:
    settings = {**SMALL, "learning_rate": LinearSchedule(1e-3, 0.0, 1.0), "buffer_size": 80, **of_kind(kind)}
    whole = DQN(task.policy(), task.envs(), **settings)
    rollouts = []

    class SaveBeforeTheFourth(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            rollouts.append(self.num_timesteps)
            if len(rollouts) == 4:
                self.model.save(tmp_path / "agent")

    whole.learn(600, callback=SaveBeforeTheFourth())
    assert len(rollouts) > 5
    resumed = DQN.load(tmp_path / "agent", env=task.envs(), device=task.device)
    assert 0 < resumed.num_timesteps < 600 and len(resumed.replay) == 80
    resumed.learn(600 - resumed.num_timesteps, reset_num_timesteps=False)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert resumed.current_beta == whole.current_beta
    tensors, others = resumed.extra_tensors(), whole.extra_tensors()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


@every_kind
def test_micro_batches_change_no_update(task, kind) -> None:
    agents = [DQN(task.policy(), task.envs(), **SMALL, micro_batch_size=size, **of_kind(kind)) for size in (None, 3)]
    for agent in agents:
        agent.learn(60)
    assert agents[0]._n_updates == 2
    torch.testing.assert_close(parameters(agents[0]), parameters(agents[1]), atol=2e-5, rtol=0)


def test_updates_wait_for_the_first_tokens_and_draw_from_all_that_was_seen(task) -> None:
    agent = DQN(task.policy(), task.envs(), **{**SMALL, "learning_starts": 200, "buffer_size": 1000}, beta=0.5)
    agent.learn(150)
    assert agent._n_updates == 0 and len(agent.replay) > 32
    agent.learn(150, reset_num_timesteps=False)
    assert agent._n_updates > 0


def test_loss_log_is_that_of_the_whole_batch(task) -> None:
    logged = []
    for size in (None, 3):
        agent = DQN(task.policy(), task.envs(), **{**SMALL, "gradient_steps": 1}, micro_batch_size=size)
        agent.learn(1, log_interval=None)
        logged.append(dict(agent.logger.name_to_value))
    assert logged[0]["train/loss"] == pytest.approx(logged[1]["train/loss"], rel=1e-4)
    assert logged[0]["rollout/exploration_rate"] < 1 and logged[0]["train/replay_size"] == 32
    assert {"train/root_value", "train/q_mean"} <= logged[0].keys()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for its old name
def test_a_lora_policy_learns_and_keeps_its_reference(task, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from textgym.agents import CausalLMPolicy

    task.policy().save_pretrained(tmp_path / "base")
    for options in ({"top_k": 3}, {"beta": 0.5, "consistency": "one_step"}):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        policy = CausalLMPolicy.from_pretrained(tmp_path / "base", lora=config, device=task.device)
        agent = DQN(policy, task.envs(), **SMALL, **options)
        assert all("lora" in name for name in agent.target.tensors() if name.startswith("policy."))
        before = parameters(agent)
        agent.learn(200)
        assert not torch.equal(before, parameters(agent))
        agent.save(tmp_path / "agent")
        loaded = DQN.load(tmp_path / "agent", env=task.envs(), device=task.device)
        assert torch.equal(parameters(agent), parameters(loaded))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_wrapper_that_breaks_concatenation_is_refused(task, beta) -> None:
    class NextToken(gym.vector.VectorActionWrapper):
        def actions(self, actions: Any) -> Any:
            return (np.asarray(actions) + 1) % self.single_action_space.n

    agent = DQN(task.policy(), NextToken(task.envs(8)), **SMALL, beta=beta)
    with pytest.warns(UserWarning, match="what it sees"), pytest.raises(ValueError, match="must be open-loop for DQN"):
        agent.learn(10)


def test_a_shaped_environment_is_refused(task) -> None:
    policy = task.policy()
    envs = KLShaping(task.envs(4), policy=policy, reference=policy.reference(), beta=0.5)
    for beta in (0.0, 0.5):
        with pytest.raises(ValueError, match="must not have KLShaping for DQN"):
            DQN(policy, envs, beta=beta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer_size": 0}, "`buffer_size` must be a whole number of completions"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of completions"),
        ({"gradient_steps": -1}, "`gradient_steps` must be a whole number"),
        ({"learning_starts": -1}, "`learning_starts` must be a number at least 0"),
        ({"target_update_interval": 0}, "`target_update_interval` must be a whole number"),
        ({"tau": 0.0}, "`tau` must be a number above 0 and at most 1"),
        ({"n_steps": 0}, "`n_steps` must be a whole number of tokens"),
        ({"advantage_scale": 0.0}, "`advantage_scale` must be a number above 0"),
        ({"exploration_final_eps": 1.5}, "`exploration_final_eps` must be a number at least 0 and at most 1"),
        ({"exploration_initial_eps": -0.1}, "`exploration_initial_eps` must be"),
        ({"exploration_fraction": 0.0}, "`exploration_fraction` must be a number above 0"),
        ({"boltzmann_temperature": 0.0}, "`boltzmann_temperature` must be"),
        ({"consistency": "three_step"}, "`consistency` must be one of"),
        ({"top_k": -1}, "`top_k` must be a whole number"),
        ({"top_p": 0.0}, "`top_p` must be in"),
        ({"beta": -0.5}, "`beta` must"),
        ({"beta": 0.5, "double_q": False}, "`double_q` is an option of hard DQN"),
        ({"beta": 0.5, "exploration_fraction": 0.3}, "`exploration_fraction` is an option of hard DQN"),
        ({"consistency": "one_step"}, "`consistency` is an option of soft DQN"),
        ({"beta": 0.5, "tau": 0.5}, "`tau` needs a target network"),
        ({"beta": 0.5, "consistency": "one_step", "n_steps": 2}, "`n_steps` must be 1"),
    ],
)
def test_bad_arguments_are_refused(task, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        DQN(task.policy(), task.envs(4), **options)


def test_a_policy_that_truncates_is_refused(task) -> None:
    with pytest.raises(ValueError, match="`policy` must not truncate"):
        DQN(task.policy(top_k=2), task.envs(4))


# -- learning -------------------------------------------------------------------------------------------------------


class PayTokenZero(gym.vector.VectorWrapper):
    """Pays 1 for every token 0 that is sent."""

    def step(self, actions: Any) -> Any:
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        return observations, rewards + (np.asarray(actions) == 0), terminated, truncated, infos


def paying(tree: TokenTree) -> TokenTree:
    bonus = np.array([sum(token == 0 for token in tree.ids(i)) for i in range(tree.num_completions)])
    return TokenTree(tree.vocab_size, tree.horizon, tree.eos_token_id, tree.prompts, tree.rewards + bonus)


LEARNING = {"learning_rate": LinearSchedule(5e-3, 0.0, 1.0), "batch_size": 64, "gradient_steps": 6, "seed": 0}


def root_values(agent: DQN, tree: TokenTree) -> np.ndarray:
    """V(s_0) of each prompt."""
    envs = agent.vector_env
    rollout = agent.collector.walk(np.arange(envs.num_envs) % tree.num_prompts, agent.sampling_generator)
    with torch.no_grad():
        states = states_of(rollout, agent.policy.mask, end_states=False)
        return score_states(agent.policy, agent.critic, states).values[: tree.num_prompts, 0].cpu().numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        # Paths want a replay that has seen most completions before the first step, and small steps: at most 0.001 on three seeds so.
        {"learning_rate": LinearSchedule(2e-3, 0.0, 1.0), "batch_size": 128, "learning_starts": 600},
        {"consistency": "one_step", "tau": 0.2, "target_update_interval": 1},
    ],
    ids=["path", "one step"],
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_soft_learns_the_optimum_and_its_value_with_any_wrapper(small_task, options, wrapped) -> None:
    task, beta = small_task, 0.5
    tree = paying(task.tree) if wrapped else task.tree
    envs = PayTokenZero(task.envs(48)) if wrapped else task.envs(48)
    critic_rate = LinearSchedule(1e-2, 0.0, 1.0)
    agent = DQN(task.policy(), envs, beta=beta, critic_learning_rate=critic_rate, **(LEARNING | options)).learn(8_000)
    solution = soft_solution(tree, agent.reference, beta)
    assert total_variation(tree, agent.policy, solution.policy).max() < 0.1
    np.testing.assert_allclose(root_values(agent, tree), beta * solution.log_z, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"boltzmann_temperature": 0.5}], ids=["epsilon-greedy", "boltzmann"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_hard_learns_the_best_completion_with_any_wrapper(small_task, options, wrapped) -> None:
    task = small_task
    tree = paying(task.tree) if wrapped else task.tree
    envs = PayTokenZero(task.envs(48)) if wrapped else task.envs(48)
    if not options:
        options = {"exploration_final_eps": 0.2, "exploration_fraction": 0.5}
    agent = DQN(task.policy(), envs, target_update_interval=20, **LEARNING, **options).learn(8_000)
    greedy = agent.policy.generate(tree.prompt_texts, tree.horizon, temperature=0).completion_ids
    solution = hard_solution(tree)
    assert [tuple(ids) for ids in greedy] == [tree.ids(i) for i in solution.completions]
    np.testing.assert_allclose(best_root_values(agent, tree), solution.state_values[:, 0], atol=0.2)


def best_root_values(agent: DQN, tree: TokenTree) -> np.ndarray:
    """max_a Q(s_0, a) of each prompt."""
    rollout = agent.collector.walk(np.arange(agent.vector_env.num_envs) % tree.num_prompts, agent.sampling_generator)
    with torch.no_grad():
        states = states_of(rollout, agent.policy.mask, end_states=False)
        scores = score_states(agent.policy, agent.critic, states, best=True)
    return (scores.values + agent.advantage_scale * scores.best_log_probs)[: tree.num_prompts, 0].cpu().numpy()
