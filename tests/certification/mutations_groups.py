"""Deliberate mistakes in the agents that compare the completions of a prompt; rows of `Mutation`, see `mutations.py`."""

LOSSES, ADVANTAGES, CHECKS = (
    "textgym.agents.common.losses",
    "textgym.agents.common.advantages",
    "certification/test_group_gradients.py::test_",
)
RLOO, REBEL, GRPO = "textgym.agents.rloo:RLOO", "textgym.agents.rebel:REBEL", "textgym.agents.grpo:GRPO"
RLOO_UPDATE, RLOO_CLIPPED = f"{CHECKS}two_epochs_of_rloo[mixed lengths-None]", f"{CHECKS}two_epochs_of_rloo[mixed lengths-0.1]"


GRPO_STEP = f"{CHECKS}expected_step_of_grpo_is_its_exact_one[grpo]"
GRPO_UPDATE = {name: f"{CHECKS}two_epochs_of_grpo[mixed lengths-{name}]" for name in ("grpo", "bnpo", "dr_grpo", "dapo")}
REBEL_UPDATE = f"{CHECKS}two_epochs_of_rebel[mixed lengths]"


def hand(file: str, test: str) -> str:
    return f"agents/test_{file}.py::test_{test}"


def first_step(name: str) -> str:
    return f"{CHECKS}expected_gradient_is_the_policy_gradient[{name}]"


# fmt: off
MUTATIONS = [
    ("GRPO: mean and deviation of the whole rollout", f"{GRPO}.train",
     "group_normalized_advantages(returns, rollout.num_generations,", "group_normalized_advantages(returns, len(rollout),",
     GRPO_UPDATE["dapo"]),
    ("GRPO: standard deviation with n in the denominator", f"{ADVANTAGES}:group_std",
     ".std(dim=1)", ".std(dim=1, correction=0)", GRPO_STEP),
    ("GRPO: variance for the standard deviation", f"{ADVANTAGES}:group_std", ".std(dim=1)", ".var(dim=1)", GRPO_STEP),
    ("GRPO: no mean", f"{ADVANTAGES}:group_normalized_advantages",
     "relative - relative.mean(dim=1, keepdim=True)", "groups", hand("advantages", "group_normalised_by_hand")),
    ("GRPO: level left in where all returns are equal", f"{ADVANTAGES}:group_normalized_advantages",
     "relative = groups - groups[:, :1]", "relative = groups", hand("advantages", "a_group_of_equal_returns_has_no_advantage")),
    ("GRPO: batch scaled by its groups", f"{ADVANTAGES}:group_normalized_advantages",
     "returns.std()", "group_std(returns, num_generations).mean()", hand("advantages", "group_normalised_by_hand")),
    ("GRPO: KL subtracted", f"{GRPO}.loss", "return policy_loss + self", "return policy_loss - self", GRPO_STEP),
    ("GRPO: KL of the other direction", f"{LOSSES}:reference_kl_loss",
     "to_reference = -masked", "to_reference = masked", GRPO_STEP),
    ("GRPO: k1 in the loss", f"{LOSSES}:reference_kl_loss",
     "torch.expm1(to_reference) - to_reference", "-to_reference", GRPO_STEP),
    ("GRPO: k2 in the loss", f"{LOSSES}:reference_kl_loss",
     "torch.expm1(to_reference) - to_reference", "0.5 * to_reference.square()", GRPO_STEP),
    ("GRPO: stale samples taken as fresh", f"{GRPO}.train",
     "stale = self.n_epochs > 1 or batch_size < len(rollout)", "stale = False", GRPO_UPDATE["grpo"]),
    ("GRPO: one clip range for both sides", f"{GRPO}.loss",
     "clip_range=clip_range, clip_range_high=clip_range_high, **reduction", "clip_range=clip_range, **reduction",
     f"{CHECKS}two_epochs_of_grpo[another batch-bnpo]"),
    ("GRPO: bounds swapped", f"{LOSSES}:clipped_surrogate_loss", "ratios.clamp(1 - clip_range, 1 +",
     "ratios.clamp(1 - (clip_range_high or clip_range), 1 +", hand("losses", "two_clip_ranges_by_hand")),
    ("GRPO: grpo as token mean", f"{LOSSES}:grpo_reduction",
     '{"reduction": "sequence_mean", "count": sequences}', '{"reduction": "token_mean", "count": tokens}', GRPO_UPDATE["grpo"]),
    ("GRPO: bnpo by the rollout's tokens", f"{LOSSES}:grpo_reduction", 'if loss_type == "bnpo"', 'if loss_type == "none"',
     GRPO_UPDATE["bnpo"]),
    ("GRPO: dapo by the minibatch's tokens", f"{LOSSES}:grpo_reduction",
     'max_length if loss_type == "dr_grpo" else mean_length', 'max_length if loss_type == "dr_grpo" else tokens / sequences',
     GRPO_UPDATE["dapo"]),
    ("GRPO: dr_grpo by the lengths at hand", f"{LOSSES}:grpo_reduction",
     'max_length if loss_type == "dr_grpo" else mean_length', "mean_length", GRPO_UPDATE["dr_grpo"]),
    ("GRPO: longest length with the prompt in it", "textgym.agents.online:OnlineAgent.max_length",
     "shape[-1] - rollout.prompt_ids.shape[1]", "shape[-1]", GRPO_UPDATE["dr_grpo"]),
    ("GRPO: dr_grpo scaled unasked", f"{GRPO}.__init__", '"none" if loss_type == "dr_grpo" else "group"', '"group"',
     GRPO_UPDATE["dr_grpo"]),
    ("RLOO: sign", f"{LOSSES}:sequence_surrogate_loss", "return -surrogate", "return surrogate", first_step("RLOO, k = 2")),
    ("RLOO: micro-batch divided by its own size", f"{LOSSES}:sequence_surrogate_loss",
     "(len(surrogate) if count is None else count)", "len(surrogate)", first_step("RLOO, micro-batches")),
    ("RLOO: max for min", f"{LOSSES}:sequence_surrogate_loss", "torch.min(", "torch.max(", hand("losses", "sequence_surrogate_by_hand")),
    ("RLOO: clipped ratio alone, no minimum", f"{LOSSES}:sequence_surrogate_loss",
     "torch.min(surrogate, ratios.clamp(1 - clip_range, 1 + clip_range) * advantages)",
     "ratios.clamp(1 - clip_range, 1 + clip_range) * advantages", hand("losses", "sequence_surrogate_by_hand")),
    ("RLOO: mean for the sum over tokens", "textgym.agents.common.importance:sequence_log_ratios",
     ".sum(dim=1)", ".mean(dim=1)", first_step("RLOO, k = 2")),
    ("RLOO: baseline added", f"{RLOO}.loss", "gamma=self.gamma) - baselines", "gamma=self.gamma) + baselines", RLOO_UPDATE),
    ("RLOO: the whole rollout as one group", f"{RLOO}.train",
     "gamma=self.gamma), rollout.num_generations)", "gamma=self.gamma), len(rollout))", RLOO_UPDATE),
    ("RLOO: stale samples taken as fresh", f"{RLOO}.train",
     "stale = self.n_epochs > 1 or batch_size < len(rollout)", "stale = False", RLOO_UPDATE),
    ("RLOO: KL of stale samples not restated", f"{RLOO}.loss", "beta=self.current_beta", "beta=0.0", RLOO_UPDATE),
    ("RLOO: KL of clipped samples restated", f"{RLOO}.loss",
     "clip_range is None and not self.whiten_rewards", "not self.whiten_rewards", RLOO_CLIPPED),
    ("REBEL: sign of the return", f"{LOSSES}:rebel_loss", "/ eta - returns", "/ eta + returns", first_step("REBEL")),
    ("REBEL: η on the wrong side", f"{LOSSES}:rebel_loss",
     "completion_mask) / eta", "completion_mask) * eta", hand("losses", "rebel_by_hand")),
    ("REBEL: diagonal counted as pairs", f"{LOSSES}:rebel_loss",
     "(num_generations * (num_generations - 1))", "num_generations**2", first_step("REBEL, G = 3")),
    ("REBEL: mean over completions, not prompts", f"{LOSSES}:rebel_loss",
     "(len(groups) if count is None else count)", "len(residuals)", hand("losses", "rebel_by_hand")),
    ("REBEL: gradient through the returns", f"{LOSSES}:rebel_loss", "returns.detach()", "returns",
     hand("losses", "advantages_and_old_log_probs_are_constants")),
    ("REBEL: log-ratio to the present policy", f"{REBEL}.loss",
     "rebel_loss(log_probs, old_log_probs, returns", "rebel_loss(log_probs, log_probs.detach(), returns", REBEL_UPDATE),
    ("REBEL: pairs torn apart in minibatches", f"{REBEL}.train",
     "chosen[:, None] * group + torch.arange(group)", "chosen[:, None] + groups * torch.arange(group)", REBEL_UPDATE),
    ("REBEL: η not passed on", f"{REBEL}.loss", "eta=self.eta, ", "", first_step("REBEL")),
    ("REBEL: count in completions", f"{REBEL}.loss", "count=sequences // group", "count=sequences", first_step("REBEL")),
    ("RLOO: clip range not passed on", f"{RLOO}.loss", "clip_range=clip_range, count", "clip_range=None, count", RLOO_CLIPPED),
]
# fmt: on
