"""Deliberate mistakes in the agents that compare the completions of a prompt; rows of `Mutation`, see `mutations.py`."""

LOSSES, ADVANTAGES, CHECKS = (
    "textgym.agents.common.losses",
    "textgym.agents.common.advantages",
    "certification/test_group_gradients.py::test_",
)
RLOO = "textgym.agents.rloo:RLOO"
RLOO_UPDATE, RLOO_CLIPPED = f"{CHECKS}two_epochs_of_rloo[mixed lengths-None]", f"{CHECKS}two_epochs_of_rloo[mixed lengths-0.1]"


def hand(file: str, test: str) -> str:
    return f"agents/test_{file}.py::test_{test}"


def first_step(name: str) -> str:
    return f"{CHECKS}expected_gradient_is_the_policy_gradient[{name}-1.0]"


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
    ("RLOO: clip range not passed on", f"{RLOO}.loss", "clip_range=clip_range, count", "clip_range=None, count", RLOO_CLIPPED),
]
# fmt: on
