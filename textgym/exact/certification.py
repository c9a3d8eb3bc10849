"""Certification: is an agent's fixed point, and its first step, what the mathematics says?

(a) `certify_fixed_point`: total variation between the trained policy and π* on the hard tree.
(b) `sampled_gradients` with `compare_gradients`, and `expected_gradient`, which has no noise: the gradient of an on-policy agent at a
    policy far from π*. At π* every advantage is zero, so that many wrong algorithms end there too; only the gradient tells them apart.

An agent enters as a function that makes one from a `Setup`. Importing this module loads torch and transformers.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from textgym.exact.gradients import completion_log_probs, exact_gradient, model_score
from textgym.exact.models import tiny_lm
from textgym.exact.problems import HARD_TREE_BETA, hard_tree
from textgym.exact.solutions import completion_distance, completion_kl, restrict, soft_solution
from textgym.exact.texts import TreeReward
from textgym.exact.tree import Table, TokenTree
from textgym.types import BoolArray


class Agent(Protocol):
    """What certification asks of an agent.

    Attributes:
        policy: the trained policy; it has the `sequence_log_probs` of `textgym.types.TokenPolicy`.
    """

    policy: Any

    def learn(self, total_timesteps: int) -> Any:
        """Trains for that many tokens."""
        ...


@dataclass(frozen=True)
class Setup:
    """What an agent is made from.

    Attributes:
        tree: the MDP.
        envs: it as a native `TextGen-v0` environment.
        model: the model to train, in place.
        reference: π_ref as a model of its own.
        tokenizer: of both.
        reward: the reward function of `envs`; it counts its queries.
        beta: β, in reward per nat.
        seed: for the agent.
        temperature: of the policy, and with it of the reference; the agent's factory has to use it.
    """

    tree: TokenTree
    envs: gym.vector.VectorEnv[Any, Any, Any]
    model: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    reward: TreeReward
    beta: float
    seed: int
    temperature: float = 1.0

    def reference_policy(self) -> Table:
        """Returns π_ref as a tabular policy."""
        return tabular_policy(self, self.reference)


MakeAgent = Callable[[Setup], Agent]


def tabular_policy(setup: Setup, model: PreTrainedModel) -> Table:
    """Returns the distribution of a model, at the setup's temperature and over the whole vocabulary, as a tabular policy."""
    with torch.no_grad():
        log_probs = completion_log_probs(setup.tree, model_score(model, setup.temperature), model.device)
    return setup.tree.tabular(log_probs.double().cpu().numpy())


def make_setup(
    tree: TokenTree,
    *,
    seed: int,
    num_envs: int,
    beta: float = HARD_TREE_BETA,
    temperature: float = 1.0,
    displaced: bool = False,
    device: str = "cpu",
) -> Setup:
    """Makes the environment and the models of a certification.

    Args:
        tree: the MDP.
        seed: of the models and the agent.
        num_envs: rows of the environment.
        beta: β, in reward per nat.
        temperature: of policy and reference.
        displaced: start at another model than the reference, far from it and from π*; for gradients.
        device: of the models.
    """
    reward, tokenizer = tree.reward_function(), tree.tokenizer()
    envs = gym.make_vec(
        "textgym:TextGen-v0", num_envs=num_envs, prompts=tree.prompt_texts, tokenizer=tokenizer, reward=reward, max_new_tokens=tree.horizon
    )
    model, reference = tiny_lm(tree, seed=seed + 1000 if displaced else seed), tiny_lm(tree, seed=seed)
    for network in (model, reference):
        torch.nn.Module.to(network, device)
    return Setup(tree, envs, model, reference, tokenizer, reward, beta, seed, temperature)


class FixedPoint(NamedTuple):
    """Where an agent ended, beside where it should.

    Attributes:
        seed: of the tree, the models and the agent.
        total_variation: of each prompt to π*, or to the `target`, in [0, 1].
        start: that of the reference.
        objective: J of the trained policy, mean over the prompts.
        optimum: J(π*).
        kl: KL(π ‖ π_ref) in nats per sequence, mean over the prompts.
        optimal_kl: that of π*.
        reward_queries: completions whose reward the environment computed.
        seconds: of `learn`.
    """

    seed: int
    total_variation: tuple[float, ...]
    start: tuple[float, ...]
    objective: float
    optimum: float
    kl: float
    optimal_kl: float
    reward_queries: int
    seconds: float

    @property
    def worst(self) -> float:
        """The largest total variation of a prompt."""
        return max(self.total_variation)


def certify_fixed_point(
    make_agent: MakeAgent,
    *,
    seed: int,
    num_envs: int,
    total_timesteps: int,
    tree: TokenTree | None = None,
    kept: Callable[[Agent, Setup], BoolArray] | None = None,
    target: Callable[[Setup], Table] | None = None,
    device: str = "cpu",
) -> FixedPoint:
    """Trains an agent on the hard tree and measures its distance to π*.

    Args:
        make_agent: makes the agent; it should lower its learning rate to 0.
        seed: of the tree, the models and the agent.
        num_envs: rows of the environment.
        total_timesteps: tokens to train for.
        tree: another tree than `hard_tree(seed)`.
        kept: for an agent whose policy and reference are renormalised over a part of the vocabulary, what that part is when it has
            learned, (N, S, V): π* is then the optimum inside it (`solutions.restrict`).
        target: for an algorithm whose fixed point is not π* (GRPO's is `groups.grpo_fixed_point`), a function that returns it as a
            tabular policy: the distances are then those to it. The objectives stay J and that of π*.
        device: of the models.
    """
    setup = make_setup(hard_tree(seed) if tree is None else tree, seed=seed, num_envs=num_envs, device=device)
    reference = setup.reference_policy()
    agent = make_agent(setup)
    begin = time.perf_counter()
    agent.learn(total_timesteps)
    seconds = time.perf_counter() - begin
    policy = agent.policy
    if kept is not None:
        part = kept(agent, setup)
        policy, reference = restrict(tabular_policy(setup, setup.model), part), restrict(reference, part)
    solution = soft_solution(setup.tree, reference, setup.beta)
    log_probs, reference_log_probs = setup.tree.log_probs(policy), setup.tree.log_probs(reference)
    goal = solution.log_probs if target is None else setup.tree.log_probs(target(setup))
    kl = completion_kl(log_probs, reference_log_probs)
    reward = (np.exp(log_probs) * setup.tree.rewards).sum(axis=-1)
    return FixedPoint(
        seed=seed,
        total_variation=tuple(completion_distance(log_probs, goal).tolist()),
        start=tuple(completion_distance(reference_log_probs, goal).tolist()),
        objective=float((reward - setup.beta * kl).mean()),
        optimum=float(solution.objective.mean()),
        kl=float(kl.mean()),
        optimal_kl=float(completion_kl(solution.log_probs, reference_log_probs).mean()),
        reward_queries=setup.reward.num_queries,
        seconds=seconds,
    )


class _EnoughError(Exception):
    """Ends `learn` when all gradients are there."""


def _record_gradients(agent: Agent, setup: Setup, count: int) -> Tensor:
    """Lets an agent learn and returns its first `count` steps' −gradients, (count, D); every step is held back, nothing moves."""
    parameters = list(setup.model.parameters())
    recorded: list[Tensor] = []

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        recorded.append(-torch.cat([g.detach().reshape(-1) for g in gradients]).double().cpu())
        # Without gradients an optimiser skips its parameters: the next rollout comes from the same policy and critic.
        optimizer.zero_grad(set_to_none=True)
        if len(recorded) == count:
            raise _EnoughError

    handle = register_optimizer_step_pre_hook(hook)
    try:
        agent.learn(2**62)
    except _EnoughError:
        pass
    finally:
        handle.remove()
    if len(recorded) < count:
        raise RuntimeError(f"`learn` ended after {len(recorded)} optimiser steps, {count} were to be recorded.")
    return torch.stack(recorded)


def exact_setup_gradient(setup: Setup) -> Tensor:
    """Returns ∇J at the setup's model, (D,) float64, in the order of `model.parameters()`."""
    score = model_score(setup.model, setup.temperature)
    gradient = exact_gradient(setup.tree, score, list(setup.model.parameters()), setup.reference_policy(), setup.beta, setup.model.device)
    return gradient.double().cpu()


def sampled_gradients(make_agent: MakeAgent, setup: Setup, count: int) -> Tensor:
    """Returns the −gradients of the first step of `count` independent rollouts at one and the same policy, (count, D) float64.

    Every optimiser step is recorded and held back, so the policy and its critic stay where they are. The agent should take one
    step per rollout and leave the gradient's norm unclipped.

    Args:
        make_agent: makes the agent.
        setup: with `displaced=True`.
        count: rollouts.
    """
    return _record_gradients(make_agent(setup), setup, count)


class GradientComparison(NamedTuple):
    """How sampled gradients compare with the exact one.

    Attributes:
        slope: projection of their mean on the exact gradient, as a multiple of its norm; 1 if unbiased.
        slope_error: the standard error of `slope`.
        residual: squared distance of the mean from `scale` times the exact gradient, divided by what its standard error makes one
            expect; 1 if unbiased.
        residual_error: the standard deviation of `residual` if unbiased.
        norm_error: the standard error of the mean as a multiple of the exact gradient's norm: what the test can see at all.
    """

    slope: float
    slope_error: float
    residual: float
    residual_error: float
    norm_error: float

    def deviations(self, scale: float = 1.0) -> tuple[float, float]:
        """Returns in standard deviations how far `slope` is from `scale`, and `residual` from 1."""
        return (self.slope - scale) / self.slope_error, (self.residual - 1) / self.residual_error


def compare_gradients(samples: Tensor, exact: Tensor, scale: float = 1.0) -> GradientComparison:
    """Compares the mean of independent gradients with `scale` times the exact one.

    Args:
        samples: (K, D) float64.
        exact: ∇J, (D,) float64.
        scale: what the estimator's expectation is known to be, in units of ∇J.
    """
    count, norm = len(samples), exact.norm()
    slopes = samples @ exact / norm**2
    mean = samples.mean(dim=0)
    centred = samples - mean
    gram = centred @ centred.T / (count - 1)  # (K, K), the covariance's nonzero spectrum
    variance = gram.trace() / count
    # tr(Σ²) is overestimated by the sampling noise of Σ; the unbiased form of Bai & Saranadasa (1996).
    square = (gram.square().sum() - gram.trace() ** 2 / (count - 1)).clamp(min=0) * (count - 1) ** 2 / ((count - 2) * (count + 1))
    return GradientComparison(
        slope=float(slopes.mean()),
        slope_error=float(slopes.std() / count**0.5),
        residual=float((mean - scale * exact).square().sum() / variance),
        residual_error=float((2 * square).sqrt() / count / variance),
        norm_error=float(variance.sqrt() / norm),
    )


def expected_gradient(
    make_agent: MakeAgent,
    setup: Setup,
    *,
    group: int = 1,
    before_rollout: Callable[[Agent], None] = lambda agent: None,
    log_probs: Table | None = None,
) -> Tensor:
    """Returns E[−gradient] of an agent's first step, (D,) float64, by giving it every completion instead of samples.

    The agent's own code does everything but draw: `policy.generate_ids` returns, rollout after rollout, each tuple of `group`
    completions of each prompt, and the recorded gradients are added up with the probabilities of the tuples. Nothing is random, so that
    a mistake of a thousandth shows. It takes N · C^group rollouts: use a tiny tree.

    Args:
        make_agent: makes an agent whose policy is a `CausalLMPolicy` and which takes one step per rollout.
        setup: with `num_envs=group`.
        group: rows of a rollout; they must share the prompt (`num_generations`), unless the tree has one prompt.
        before_rollout: called with the agent before each rollout, to put back what the agent carries on.
        log_probs: log π(y|x) of the policy that samples, (N, C), where it leaves completions out (with −∞ there); by default what the
            agent's policy says, which counts every token of a completion as one that could be drawn.
    """
    if setup.envs.num_envs != group:
        raise ValueError(f"`group` must be the number of environments, {setup.envs.num_envs}, got {group}.")
    tree, agent = setup.tree, make_agent(setup)
    log_probs = tree.log_probs(agent.policy) if log_probs is None else log_probs
    remaining = {ids: itertools.product(range(tree.num_completions), repeat=group) for ids in tree.prompts}
    weights: list[float] = []
    generate_ids = agent.policy.generate_ids

    def enumerate_ids(prompt_ids: Tensor, prompt_lengths: Tensor, *args: Any, **options: Any) -> Any:
        before_rollout(agent)
        prompts = {_unpadded(*row) for row in zip(prompt_ids.tolist(), prompt_lengths.tolist(), strict=True)}
        if len(prompts) != 1:
            raise ValueError(f"`group` rows must share one prompt, got {sorted(prompts)}.")
        prompt = prompts.pop()
        rows = next(remaining[prompt])
        weights.append(float(np.exp(log_probs[tree.prompts.index(prompt), list(rows)].sum())))
        return with_completions(agent.policy, generate_ids(prompt_ids, prompt_lengths, *args, **options), tree, rows)

    agent.policy.generate_ids = enumerate_ids
    gradients = _record_gradients(agent, setup, tree.num_prompts * tree.num_completions**group)
    return torch.tensor(weights, dtype=torch.float64) @ gradients / tree.num_prompts


def _unpadded(ids: Sequence[int], length: int) -> tuple[int, ...]:
    return tuple(ids[len(ids) - length :])


def with_completions(policy: Any, generation: Any, tree: TokenTree, rows: Sequence[int]) -> Any:
    """Returns `generation` with the completions `rows` of a tree in the place of the sampled ones, and their log-probs under `policy`."""
    device = generation.ids.device
    ids, lengths = (torch.as_tensor(table[list(rows)], device=device) for table in (tree.completions, tree.lengths))
    with torch.no_grad():
        scores = policy.score(generation.prompt_ids, generation.prompt_lengths, ids, lengths, return_keep=True)
    return replace(cast(Any, generation), ids=ids, lengths=lengths, log_probs=scores.log_probs, kept=scores.kept)
