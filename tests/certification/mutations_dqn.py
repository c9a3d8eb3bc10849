"""Deliberate mistakes in DQN and what it is made of; rows of `Mutation`, see `mutations.py`."""

BELLMAN, REPLAY = "textgym.agents.common.bellman", "textgym.agents.common.replay:SequenceReplay"
TARGET, DQN = "textgym.agents.common.target_network:TargetNetwork", "textgym.agents.dqn:DQN"


def hand(file: str, test: str) -> str:
    return f"agents/test_{file}.py::test_{test}"


def first_step(name: str) -> str:
    return f"certification/test_dqn_gradients.py::test_expected_first_step_is_the_exact_one[{name}]"


EXACT = hand("bellman", "every_soft_residual_is_zero_at_the_exact_solution_and_so_is_its_gradient")
PATH = hand("bellman", "path_consistency_by_hand")
CUT = "only_rows_that_were_cut_go_on_behind_their_end"
DRAWS = hand("dqn", "epsilon_greedy_draws_follow_its_probabilities_and_says_them")

# fmt: off
MUTATIONS = [
    ("n-step: value one step early", f"{BELLMAN}:n_step_returns",
     "torch.minimum(tokens + steps, lengths", "torch.minimum(tokens + steps - 1, lengths", first_step("hard")),
    ("n-step: value not discounted", f"{BELLMAN}:n_step_returns",
     "discounts * states.gather", "states.gather", first_step("one step")),
    ("n-step: value discounted by n behind a shorter path", f"{BELLMAN}:n_step_returns",
     "** (after - tokens).clamp(min=0)", "** (steps + 0 * tokens)", hand("bellman", f"{CUT}[2]")),
    ("n-step: rewards not discounted", f"{BELLMAN}:n_step_returns", "gamma**k * rewards", "rewards", PATH),
    ("n-step: ended rows go on as if cut", f"{BELLMAN}:n_step_returns",
     "at_end & truncated[:, None]", "at_end", hand("bellman", f"{CUT}[1]")),
    ("n-step: cut rows have ended", f"{BELLMAN}:n_step_returns",
     "at_end & truncated[:, None]", "at_end & ~truncated[:, None] & truncated[:, None]", hand("bellman", f"{CUT}[None]")),
    ("n-step: value of the padding behind the end", f"{BELLMAN}:n_step_returns",
     "pad(zero_outside(values, mask), (0, 1))", "pad(torch.nan_to_num(values, nan=7.0), (0, 1))",
     hand("bellman", "padding_reaches_neither_loss_nor_gradient")),
    ("soft Q: sign of the log-ratio", f"{BELLMAN}:soft_action_values",
     "(log_probs - reference_log_probs.detach())", "(reference_log_probs.detach() - log_probs)", EXACT),
    ("soft Q: β left out", f"{BELLMAN}:soft_action_values", "values + beta * ", "values + ", EXACT),
    ("soft Q: no reference", f"{BELLMAN}:soft_action_values", "log_probs - reference_log_probs.detach()", "log_probs",
     hand("bellman", "soft_action_values_by_hand")),
    ("PCL: KL added to the reward", f"{BELLMAN}:path_consistency_loss", "rewards.detach() - beta", "rewards.detach() + beta", EXACT),
    ("PCL: V(s_t) added", f"{BELLMAN}:path_consistency_loss",
     "residuals = returns - zero_outside", "residuals = returns + zero_outside", EXACT),
    ("PCL: no gradient through V(s_t)", f"{BELLMAN}:path_consistency_loss",
     "returns - zero_outside(values, mask)", "returns - zero_outside(values, mask).detach()", PATH),
    ("PCL: no gradient through the value at the end of the path", f"{BELLMAN}:path_consistency_loss",
     "beta * log_ratios, values, lengths", "beta * log_ratios, values.detach(), lengths",
     hand("bellman", "the_value_at_the_end_of_a_short_path_gets_gradient_too")),
    ("PCL: only the first token's log-ratio has gradient", f"{BELLMAN}:path_consistency_loss",
     "rewards.detach() - beta * log_ratios", "rewards.detach() - beta * torch.cat([log_ratios[:, :1], log_ratios[:, 1:].detach()], 1)",
     first_step("path")),
    ("PCL: no half", f"{BELLMAN}:path_consistency_loss", "0.5 * residuals", "residuals", PATH),
    ("target: never updated", f"{TARGET}.after_step", "if steps % self.interval:", "if steps:",
     hand("target_network", "hard_update_copies_at_the_interval_and_only_then")),
    ("target: updated at every step", f"{TARGET}.after_step", "if steps % self.interval:", "if False:",
     hand("target_network", "hard_update_copies_at_the_interval_and_only_then")),
    ("target: τ for 1 − τ", f"{TARGET}.after_step", "self.tau)", "1 - self.tau)",
     hand("target_network", "averaged_update_moves_by_tau")),
    ("target: the online weights are lent", f"{TARGET}.lent", "self._exchange()\n    self._lent += 1", "pass\n    self._lent += 1",
     first_step("one step")),
    ("replay: a row ahead of its columns", f"{REPLAY}.add", "column[places] = table", "column[np.roll(places, 1)] = table",
     hand("replay", "the_oldest_are_forgotten_first")),
    ("replay: the newest are overwritten", f"{REPLAY}.add", "self.position = int((self.position + count) % self.capacity)", "pass",
     hand("replay", "the_oldest_are_forgotten_first")),
    ("replay: prompts padded on the wrong side", f"{REPLAY}.add",
     "column[places, column.shape[1] - table.shape[1] :] = table", "column[places, : table.shape[1]] = table",
     hand("replay", "rows_may_get_wider_and_narrower")),
    ("replay: the environment's rewards, not those given", f"{REPLAY}.add", '"rewards": rewards,', '"rewards": rollout.rewards,',
     hand("replay", "rewards_are_those_given_and_closed_loops_are_refused")),
    ("hard: the online network values the maximum", f"{DQN}.hard_loss",
     "best = lagged.values", "best = scores.values.detach()", first_step("hard")),
    ("hard: no double Q", f"{DQN}.hard_loss", "tokens=scores.best if self.double_q else None, best=not self.double_q", "best=True",
     first_step("hard")),
    ("hard: the value of the token taken, not of the best", f"{DQN}.hard_loss",
     "lagged.log_probs if self.double_q else lagged.best_log_probs", "lagged.log_probs", first_step("hard, not double")),
    ("hard: scale left out of the target", f"{DQN}.hard_loss", "lagged.values + self.advantage_scale * best_log_probs",
     "lagged.values + best_log_probs", first_step("hard")),
    ("hard: always one step", f"{DQN}.hard_loss", "n_steps=self.n_steps or 1", "n_steps=1", first_step("hard, two steps")),
    ("soft: path of one step", f"{DQN}.soft_loss", "n_steps=self.n_steps,", "n_steps=1,", first_step("path")),
    ("soft: the value of the online network as its own target", f"{DQN}.soft_loss",
     "lagged = state_values(self.policy, self.critic, states)", "lagged = scores.values.detach()", first_step("one step")),
    ("exploration: ε is the chance of the best token", "textgym.agents.common.sampling:draw_epsilon_greedy",
     "uniforms < epsilon", "uniforms >= epsilon", DRAWS),
    ("exploration: outside the kept set", "textgym.agents.common.sampling:draw_epsilon_greedy",
     "kept = logits > -torch.inf", "kept = torch.ones_like(logits, dtype=torch.bool)", DRAWS),
    ("exploration: log-prob without the exploring part", "textgym.agents.common.sampling:draw_epsilon_greedy",
     "epsilon / count + ", "0 * epsilon / count + ", DRAWS),
]
# fmt: on
