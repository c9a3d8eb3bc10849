"""Deliberate mistakes in the agents that compare the completions of a prompt; rows of `Mutation`, see `mutations.py`."""

LOSSES, ADVANTAGES, CHECKS = (
    "textgym.agents.common.losses",
    "textgym.agents.common.advantages",
    "certification/test_group_gradients.py::test_",
)
RLOO, REBEL = "textgym.agents.rloo:RLOO", "textgym.agents.rebel:REBEL"
RLOO_UPDATE, RLOO_CLIPPED = f"{CHECKS}two_epochs_of_rloo[mixed lengths-None]", f"{CHECKS}two_epochs_of_rloo[mixed lengths-0.1]"


REBEL_UPDATE = f"{CHECKS}two_epochs_of_rebel[mixed lengths]"


def hand(file: str, test: str) -> str:
    return f"agents/test_{file}.py::test_{test}"


def first_step(name: str) -> str:
    return f"{CHECKS}expected_gradient_is_the_policy_gradient[{name}]"


# fmt: off
MUTATIONS = [
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
