"""Deliberate mistakes, each with the test that catches it.

A mutation rewrites one line of one function: `find` (which must be there exactly once) becomes `replace`. The function is compiled anew
and put in the place of the right one in every module that holds it. `check` names a test of this suite, as pytest would,
`folder/file.py::test_name` or `...::test_name[parameter]`.

When a function is rewritten and a `find` is gone, rewrite the mutation with it: the mistake can still be made.
"""

import runpy
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        name: what is wrong.
        target: `module:function` or `module:Class.method`.
        find: a piece of its source.
        replace: what stands there instead.
        check: the test that must pass without the mutation and fail with it.
        raises: how it fails; anything else is a mutation that merely crashes.
    """

    name: str
    target: str
    find: str
    replace: str
    check: str
    raises: type[Exception] = AssertionError


LOSSES, MASKING = "textgym.agents.common.losses", "textgym.agents.common.masking"
ADVANTAGES, IMPORTANCE = "textgym.agents.common.advantages", "textgym.agents.common.importance"
REINFORCE, PPO = "textgym.agents.reinforce:REINFORCE", "textgym.agents.clipped:ClippedAgent"
BASE = "textgym.agents.online:OnlineAgent"
SHAPING = "textgym.wrappers.shaping:ShapingState"
SHAPED = "textgym.wrappers.shaping:shape_completions"


def family(name: str) -> list[Mutation]:
    """The mutations of a family of algorithms, from the file of that name beside this one."""
    rows = runpy.run_path(str(Path(__file__).with_name(f"mutations_{name}.py")))["MUTATIONS"]
    return [Mutation(*row) for row in rows]


def hand(file: str, test: str) -> str:
    return f"agents/test_{file}.py::test_{test}"


def estimator(name: str) -> str:
    return f"certification/test_expected_gradient.py::test_expected_gradient_is_the_policy_gradient[{name}]"


def stale(name: str) -> str:
    return f"certification/test_expected_gradient.py::test_cumulative_weights_make_stale_samples_unbiased[{name}]"


def agent(name: str, test: str = "expected_gradient_is_the_policy_gradient") -> str:
    return f"certification/test_agent_gradients.py::test_{test}[{name}]"


def update(test: str, *parameters: str) -> str:
    return f"certification/test_updates_by_hand.py::test_{test}[{'-'.join(parameters)}]"


PPO_UPDATE = update("two_epochs_of_ppo", "mixed lengths", "sequence_sum", "0.05")
REINFORCE_UPDATE = update("two_epochs_of_reinforce_with_leave_one_out", "mixed lengths", "cumulative")

# fmt: off
LOSS_MUTATIONS = [
    Mutation("REINFORCE: sign", f"{LOSSES}:reinforce_loss", "return -reduce", "return reduce", estimator("whole return")),
    Mutation("REINFORCE: mean over tokens", f"{LOSSES}:reinforce_loss",
             'Reduction = "sequence_sum"', 'Reduction = "token_mean"', estimator("reward-to-go")),
    Mutation("REINFORCE: log π detached, advantage not", f"{LOSSES}:reinforce_loss",
             "log_probs * advantages.detach()", "log_probs.detach() * advantages",
             hand("losses", "advantages_and_old_log_probs_are_constants")),
    Mutation("PPO: sign", f"{LOSSES}:clipped_surrogate_loss", "return -reduce", "return reduce", estimator("PPO, any values, λ = 1")),
    Mutation("PPO: max for min", f"{LOSSES}:clipped_surrogate_loss",
             "torch.min(", "torch.max(", hand("losses", "clipped_surrogate_by_hand")),
    Mutation("PPO: no clipping", f"{LOSSES}:clipped_surrogate_loss",
             "clipped_ratios * advantages)", "ratios * advantages)", hand("losses", "clipped_surrogate_by_hand")),
    Mutation("PPO: clipped from above only", f"{LOSSES}:clipped_surrogate_loss",
             "ratios.clamp(1 - clip_range, 1 +", "ratios.clamp(0.0, 1 +",
             hand("losses", "clipping_from_below_by_hand")),
    Mutation("PPO: clipped ratio alone, no minimum", f"{LOSSES}:clipped_surrogate_loss",
             "torch.min(ratios * advantages, clipped_ratios * advantages)", "clipped_ratios * advantages",
             hand("losses", "clipped_surrogate_gradient_by_hand")),
    Mutation("PPO: log-ratio for the ratio", f"{LOSSES}:clipped_surrogate_loss",
             "completion_mask).exp()", "completion_mask)", hand("losses", "clipped_surrogate_by_hand")),
    Mutation("PPO: gradient through the old log-probs", f"{LOSSES}:clipped_surrogate_loss",
             "old_log_probs.detach()", "old_log_probs", hand("losses", "advantages_and_old_log_probs_are_constants")),
    Mutation("PPO: gradient through the advantages", f"{LOSSES}:clipped_surrogate_loss",
             "advantages = advantages.detach()", "advantages = advantages * 1",
             hand("losses", "advantages_and_old_log_probs_are_constants")),
    Mutation("value loss: no half", f"{LOSSES}:value_loss", "0.5 * errors", "errors", hand("losses", "value_loss_by_hand")),
    Mutation("value loss: min for max", f"{LOSSES}:value_loss", "torch.max(", "torch.min(", hand("losses", "value_clipping_by_hand")),
    Mutation("value loss: clipped around the new value", f"{LOSSES}:value_loss",
             "clipped = old_values +", "clipped = values.detach() +", hand("losses", "value_clipping_by_hand")),
    Mutation("value loss: gradient through the target", f"{LOSSES}:value_loss",
             "returns.detach()", "returns", hand("losses", "value_targets_are_constants")),
    Mutation("diagnostics: k3 with the wrong sign", f"{LOSSES}:ratio_diagnostics",
             "ratios - 1 - log_ratios", "ratios - 1 + log_ratios", hand("losses", "ratio_diagnostics_by_hand")),
]
# fmt: on

# fmt: off
MASK_MUTATIONS = [
    Mutation("mask: one token too many", f"{MASKING}:completion_mask_from_lengths",
             "< lengths", "<= lengths", hand("masking", "mask_comes_from_lengths")),
    Mutation("mask: the last token (EOS) left out", f"{MASKING}:completion_mask_from_lengths",
             "< lengths.unsqueeze(-1)", "< lengths.unsqueeze(-1) - 1", hand("masking", "mask_comes_from_lengths")),
    Mutation("mask ignored", f"{MASKING}:zero_outside",
             "torch.where(mask, values,", "torch.where(mask | True, values,", hand("masking", "sum_and_mean_see_only_true_places")),
    Mutation("mean over padding too", f"{MASKING}:masked_mean",
             "count = mask.sum() if dim is None else mask.sum(dim)",
             "count = torch.tensor(mask.numel() if dim is None else mask.shape[dim])",
             hand("masking", "sum_and_mean_see_only_true_places")),
    Mutation("whitening: mean over padding", f"{MASKING}:masked_whiten",
             "mean = masked_mean(values, mask)", "mean = values.mean()", hand("masking", "whitening_ignores_padding")),
    Mutation("whitening: variance over padding", f"{MASKING}:masked_whiten",
             "masked_mean((values - mean).square(), mask)", "(values - mean).square().mean()",
             hand("masking", "whitening_ignores_padding")),
    Mutation("whitening: root of the standard deviation", f"{MASKING}:masked_whiten",
             "torch.rsqrt(variance + eps)", "torch.rsqrt((variance + eps).sqrt())", hand("masking", "whitening_by_hand")),
    Mutation("whitening: eps outside the root", f"{MASKING}:masked_whiten",
             "torch.rsqrt(variance + eps)", "(1 / (variance.sqrt() + eps))", hand("masking", "whitening_eps_is_added_to_the_variance")),
    Mutation("reduction: divided by tokens, not sequences", f"{MASKING}:reduce_tokens",
             "masked_sum(values, completion_mask) / sequences", "masked_sum(values, completion_mask) / completion_mask.sum()",
             estimator("leave-one-out")),
    Mutation("reduction: micro-batch divided by its own size", f"{MASKING}:reduce_tokens",
             "sequences = values.shape[0] if count is None else count", "sequences = values.shape[0]", agent("PPO, micro-batches")),
]
# fmt: on

# fmt: off
ADVANTAGE_MUTATIONS = [
    Mutation("GAE: forwards in time", f"{ADVANTAGES}:generalized_advantages",
             "in reversed(range(rewards.shape[1]))", "in range(rewards.shape[1])", hand("advantages", "gae_by_hand")),
    Mutation("GAE: λ left out", f"{ADVANTAGES}:generalized_advantages",
             "gamma * gae_lambda * following", "gamma * following", hand("advantages", "gae_by_hand")),
    Mutation("GAE: γ left out of δ", f"{ADVANTAGES}:generalized_advantages",
             "gamma * next_values", "next_values", hand("advantages", "gae_by_hand")),
    Mutation("GAE: sign of V(s_t)", f"{ADVANTAGES}:generalized_advantages",
             "- values[:, t]", "+ values[:, t]", hand("advantages", "gae_by_hand")),
    Mutation("GAE: V(s_t) for V(s_{t+1})", f"{ADVANTAGES}:generalized_advantages",
             "values[:, t + 1] if", "values[:, t] if", hand("advantages", "gae_by_hand")),
    Mutation("GAE: bootstrap past the end of the episode", f"{ADVANTAGES}:generalized_advantages",
             "torch.where(last == t, end_values, next_values)", "next_values", hand("advantages", "padding_changes_no_advantage")),
    Mutation("GAE: rows that ended are bootstrapped as if cut", f"{ADVANTAGES}:_values_after_end",
             "torch.where(truncated, bootstrap_values.to(rewards.dtype), zeros)", "bootstrap_values.to(rewards.dtype)",
             hand("advantages", "only_truncated_rows_bootstrap")),
    Mutation("GAE: rows that were cut are taken as ended", f"{ADVANTAGES}:_values_after_end",
             "torch.where(truncated, bootstrap_values.to(rewards.dtype), zeros)", "zeros",
             hand("advantages", "only_truncated_rows_bootstrap")),
    Mutation("returns: γ left out", f"{ADVANTAGES}:rewards_to_go",
             "gamma=gamma, gae_lambda=1.0", "gamma=1.0, gae_lambda=1.0", hand("advantages", "returns_by_hand")),
    Mutation("leave-one-out: the own return left in", f"{ADVANTAGES}:leave_one_out_baseline",
             "(groups.sum(dim=1, keepdim=True) - groups) / (num_generations - 1)", "groups.mean(dim=1, keepdim=True).expand_as(groups)",
             estimator("leave-one-out")),
    Mutation("leave-one-out: normaliser G", f"{ADVANTAGES}:leave_one_out_baseline",
             "/ (num_generations - 1)", "/ num_generations", hand("advantages", "leave_one_out_by_hand")),
    Mutation("leave-one-out: wrong group (strided rows)", f"{MASKING}:as_groups",
             "values.view(-1, num_generations, *values.shape[1:])",
             "values.view(num_generations, -1, *values.shape[1:]).transpose(0, 1)",
             hand("advantages", "leave_one_out_by_hand")),
    Mutation("leave-one-out: ended rows count as 0", f"{ADVANTAGES}:_held_returns",
             "return hold_last(returns, lengths)", "return torch.nan_to_num(returns)",
             hand("advantages", "leave_one_out_of_returns_to_go")),
    Mutation("moving average: weights swapped", f"{ADVANTAGES}:moving_average",
             "decay * previous + (1 - decay) * value", "(1 - decay) * previous + decay * value", hand("advantages", "moving_average")),
    Mutation("importance: weight of the first token for every reward", f"{ADVANTAGES}:importance_weighted_returns",
             "weights * rewards", "weights[:, :1] * rewards", stale("cumulative")),
    Mutation("importance: ratio upside down", f"{IMPORTANCE}:masked_log_ratios",
             "log_probs - old_log_probs", "old_log_probs - log_probs", hand("importance", "token_ratios_by_hand")),
    Mutation("importance: product left out", f"{IMPORTANCE}:cumulative_ratios",
             ".cumsum(dim=1)", "", hand("importance", "cumulative_ratios_by_hand")),
    Mutation("importance: product over rows", f"{IMPORTANCE}:cumulative_ratios",
             "cumsum(dim=1)", "cumsum(dim=0)", hand("importance", "cumulative_ratios_by_hand")),
    Mutation("importance: truncated from below", f"{IMPORTANCE}:truncated_cumulative_ratios",
             "clamp(max=", "clamp(min=", hand("importance", "truncation_cuts_only_large_weights")),
    Mutation("importance: KL of the old policy moved the wrong way", f"{IMPORTANCE}:restate_kl_rewards",
             "rewards - beta", "rewards + beta", stale("cumulative")),
]
# fmt: on

# fmt: off
AGENT_MUTATIONS = [
    Mutation("KL: sign", SHAPED, "rewards - betas", "rewards + betas", agent("PPO, value head")),
    Mutation("KL: β doubled", SHAPED, "rewards - betas", "rewards - 2 * betas", agent("PPO, value head")),
    Mutation("KL: k3 in the reward", SHAPED,
             "betas[:, None] * log_ratio", "betas[:, None] * k3(log_ratio)", agent("PPO, value head")),
    Mutation("KL: k2 in the reward", SHAPED,
             "betas[:, None] * log_ratio", "betas[:, None] * k2(log_ratio)", agent("REINFORCE, no baseline")),
    Mutation("KL: the last token is not penalised", SHAPED,
             "mask = np.arange(width) < lengths_used[:, None]", "mask = np.arange(width) < lengths_used[:, None] - 1",
             agent("REINFORCE, no baseline")),
    Mutation("KL: sign, stepping", f"{SHAPING}.account",
             "rewards - self.betas", "rewards + self.betas", agent("PPO, value head", "expected_gradient_through_a_users_wrapper")),
    Mutation("reference is the policy itself", "textgym.agents.policy:CausalLMPolicy.reference",
             "copy.deepcopy(self, {id(self.engine): self.engine})\n        frozen.requires_grad_(False)", "copy.copy(self)",
             "certification/test_agent_gradients.py::test_the_default_reference_is_frozen", raises=ValueError),  # the agent refuses it
    Mutation("temperature: not on the reference", "textgym.agents.common.numpy_protocol:NumpyProtocol.reference_sequence_log_probs",
             "self._other(reference), layout, self.sampling", "self._other(reference), layout, type(self.sampling)()",
             agent("PPO, value head", "expected_gradient_at_another_temperature")),
    Mutation("temperature: not in the update", "textgym.agents.common.scoring:_sampling_logits",
             "scale_logits(backbone.logits(features), sampling.temperature)", "scale_logits(backbone.logits(features), 1.0)",
             agent("REINFORCE, no baseline", "expected_gradient_at_another_temperature")),
    Mutation("temperature: multiplied", "textgym.agents.common.sampling:scale_logits",
             "logits / temperature", "logits * temperature",
             "certification/test_agent_gradients.py::test_samples_follow_the_distribution_that_is_scored"),
    Mutation("sampling: the same random number every time", "textgym.agents.common.sampling:draw",
             "uniforms.unsqueeze(-1)", "torch.full_like(uniforms, 0.5).unsqueeze(-1)",
             "certification/test_agent_gradients.py::test_samples_follow_the_distribution_that_is_scored"),
    Mutation("scoring: the state after the token", "textgym.agents.common.layout:lay_out",
             "columns=prompt_lengths[rows] - 1 + offsets", "columns=(prompt_lengths[rows] + offsets).clamp(max=int(inputs.max()) - 1)",
             agent("REINFORCE, no baseline")),
    Mutation("scoring: left padding counted as prompt", "textgym.agents.common.layout:lay_out",
             "columns + (width - prompt_lengths).unsqueeze(1)", "columns + 0 * (width - prompt_lengths).unsqueeze(1)",
             agent("REINFORCE, no baseline")),
    Mutation("REINFORCE: baseline added", f"{REINFORCE}.loss",
             "returns[:, :1]) - baselines", "returns[:, :1]) + baselines",
             update("one_step_of_reinforce_with_whole_returns", "mixed lengths", "leave_one_out")),
    Mutation("REINFORCE: leave-one-out over the whole batch", f"{REINFORCE}.baselines",
             'rollout.num_generations if self.baseline == "leave_one_out" else len(rollout)', "len(rollout)", REINFORCE_UPDATE),
    Mutation("REINFORCE: stale samples taken as fresh", f"{REINFORCE}.train",
             "stale = self.n_epochs > 1 or batch_size < len(rollout)", "stale = False", REINFORCE_UPDATE),
    Mutation("REINFORCE: KL of stale samples not restated", f"{REINFORCE}.stale_advantages",
             "beta=self._beta_in_rewards(batch)", "beta=0.0", REINFORCE_UPDATE),
    Mutation("REINFORCE: baseline without its weight", f"{REINFORCE}.stale_advantages",
             "gamma=self.gamma) - weights * baselines", "gamma=self.gamma) - baselines", REINFORCE_UPDATE),
    Mutation("REINFORCE: entropy minimised", f"{REINFORCE}.loss",
             "total - self.ent_coef", "total + self.ent_coef",
             agent("REINFORCE, no baseline", "entropy_bonus_adds_the_gradient_of_the_visited_entropies")),
    Mutation("PPO: entropy minimised", f"{PPO}.loss",
             "total - self.ent_coef", "total + self.ent_coef",
             agent("PPO, value head", "entropy_bonus_adds_the_gradient_of_the_visited_entropies")),
    Mutation("PPO: missing ratio (old log-probs of the present)", f"{PPO}.loss",
             "scores.log_probs, targets.log_probs, targets.advantages", "scores.log_probs, scores.log_probs, targets.advantages",
             PPO_UPDATE),
    Mutation("PPO: advantage as value target", f"{PPO}.targets", "returns = advantages + old.values", "returns = advantages", PPO_UPDATE),
    Mutation("PPO: critic pushed away", f"{PPO}.loss", "+ self.vf_coef", "- self.vf_coef", PPO_UPDATE),
    Mutation("PPO: γ not passed on", f"{PPO}.estimate", "gamma=self.gamma", "gamma=1.0", PPO_UPDATE),
    Mutation("PPO: λ not passed on", f"{PPO}.estimate", "gae_lambda=self.gae_lambda", "gae_lambda=0.95", agent("PPO, value head")),
    Mutation("PPO: advantages whitened unasked", f"{PPO}.targets",
             "if self.normalize_advantage:", "if True:", agent("PPO, separate critic")),
    Mutation("missing EOS: rewarded", f"{BASE}._penalties",
             "-self.missing_eos_penalty", "self.missing_eos_penalty",
             "certification/test_agent_gradients.py::test_expected_gradient_with_a_missing_eos_penalty"),
    Mutation("missing EOS: every completion pays", f"{BASE}._penalties",
             "missing = ~torch.isin(last, eos)", "missing = torch.ones_like(last)",
             "certification/test_agent_gradients.py::test_expected_gradient_with_a_missing_eos_penalty"),
    Mutation("rollout: groups mix prompts", f"{BASE}._next_prompts",
             "np.repeat(", "np.tile(", "certification/test_updates_by_hand.py::test_groups_share_a_prompt[mixed lengths]"),
    Mutation("rollout: EOS masked out", "textgym.agents.common.batches:RolloutBatch.completion_mask",
             "< self.lengths[:, None]", "< self.lengths[:, None] - 1", agent("REINFORCE, no baseline")),
    Mutation("gradient accumulated over updates", "textgym.agents.base:Agent.step",
             "self.optimizer.zero_grad(set_to_none=True)", "pass", PPO_UPDATE),
    Mutation("environment: reward on the first token", "textgym.envs.sequences:start_sequences",
             "rewards[finished, used[finished] - 1] += totals", "rewards[finished, 0] += totals", agent("REINFORCE, no baseline")),
    Mutation("environment: reward one token late, on the padding", "textgym.envs.sequences:start_sequences",
             "rewards[finished, used[finished] - 1] += totals",
             "rewards[finished, np.minimum(used[finished], rewards.shape[1] - 1)] += totals",
             agent("REINFORCE, no baseline")),
    Mutation("environment: the horizon is a truncation", "textgym.envs.sequences:start_sequences",
             "truncated = used == max_episode_steps if max_episode_steps is not None else",
             "truncated = used == max_episode_steps if max_episode_steps is not None else (used == rows.task.max_new_tokens) |",
             agent("PPO, value head")),
    Mutation("environment: EOS ends nothing", "textgym.envs.core:EpisodeRows.append",
             "self.task.ends_episode[tokens]", "np.zeros(len(tokens), dtype=np.bool_)",
             agent("PPO, value head", "expected_gradient_through_a_users_wrapper"),
             raises=ValueError),  # the completion that goes on is no completion of the tree
    Mutation("environment: EOS not in the reward's ids", "textgym.envs.core:EpisodeRows.batch",
             "ids[:length] for", "ids[: length - 1] for", agent("REINFORCE, no baseline"),
             raises=ValueError),  # the tree's reward knows no such completion
]
# fmt: on

MUTATIONS = [
    *LOSS_MUTATIONS,
    *MASK_MUTATIONS,
    *ADVANTAGE_MUTATIONS,
    *AGENT_MUTATIONS,
    *(mutation for name in ("groups", "nlpo", "dqn", "offline", "reward_models", "rlhf") for mutation in family(name)),
]
