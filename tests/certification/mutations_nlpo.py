"""Deliberate mistakes in NLPO, and in the pretraining texts of PPO; rows of `Mutation`, see `mutations.py`."""

PROTOCOL, MASK = "textgym.agents.common.numpy_protocol:NumpyProtocol", "textgym.agents.common.lagged_mask:LaggedMask"
MIX = "textgym.agents.common.pretraining:PretrainingMix"
TEXTS = "agents/test_ppo_ptx.py::test_expected_gradient_is_that_of_ppo_plus_that_of_the_texts"
EXACT = "certification/test_nlpo_exact.py::test_"
GRADIENT, STEPPED = f"{EXACT}expected_gradient_is_that_of_the_masked_objective[head]", f"{EXACT}expected_gradient_through_a_users_wrapper"
FOLLOWS, RATIO = f"{EXACT}the_sampling_mask_follows_the_policy", f"{EXACT}both_sides_of_the_ratio_are_renormalised"
CLOSED, SINGLE = f"{EXACT}kl_is_taken_under_the_mask[closed loop]", f"{EXACT}what_the_protocol_says_is_masked"

# fmt: off
MUTATIONS = [
    ("NLPO: masked, not renormalised", "textgym.agents.common.scoring:_sampling_logits",
     "return logits.masked_fill(~mask, -torch.inf), mask", "return logits, mask", RATIO),
    ("NLPO: the sampler keeps the first mask", f"{MASK}.refresh", "for source, twin in self._pairs.values():\n        twin.copy_(source)",
     "self.model = copy.deepcopy(self.model)\n    for source, twin in self._pairs.values():\n        pass", FOLLOWS),
    ("NLPO: the copy is no copy", f"{MASK}.__init__", "if not tensor.requires_grad]", "]", FOLLOWS),
    ("NLPO: sampled without the mask", "textgym.agents.policy:CausalLMPolicy.generate_ids",
     "self.mask.masker() if action_mask is None and self.mask is not None else action_mask", "action_mask",
     f"{EXACT}sampling_follows_the_masked_policy"),
    ("NLPO: reference over the whole vocabulary", f"{PROTOCOL}.reference_sequence_log_probs",
     ", legal=self._legal_along(layout)", "", GRADIENT),
    ("NLPO: reference over the whole vocabulary, stepping", "textgym.agents.common.scoring:paired_distributions",
     "other_logits.masked_fill(~mask, -torch.inf)", "other_logits", CLOSED),
    ("NLPO: update without the mask", "textgym.agents.common.rollout_scores:score_rollout", "keep=kept,",
     "keep=None if kept is None else kept | 255,", GRADIENT),
    ("NLPO: the mask of now in the update", "textgym.agents.common.rollout_scores:score_rollout", "keep=kept,", "keep=None,",
     f"{EXACT}kl_is_taken_under_the_mask[one pass]"),
    ("NLPO: the mask of now in the update, closed loop", "textgym.agents.common.rollout_scores:_score_steps",
     "keep = None if batch.kept is None else", "keep = None if True else", CLOSED),
    ("NLPO: acts without the mask", "textgym.agents.common.numpy_protocol:NumpyProtocol.predict", "self._legal_at(batch)", "None", SINGLE),
    ("NLPO: EOS can be illegal", "textgym.agents.common.sampling:TokenRule.__call__", "kept | self._in_any_case(logits)", "kept", FOLLOWS),
    ("NLPO: the floor is forgotten", "textgym.agents.common.sampling:TokenRule.__call__",
     "kept = kept | (logits >= last)", "pass", f"{EXACT}a_floor_keeps_the_most_probable_tokens"),
    ("NLPO: mask at temperature 1", "textgym.agents.common.sampling:TokenRule.__call__",
     "scale_logits(logits, self.sampling.temperature)", "logits.float()", f"{EXACT}the_mask_is_taken_at_the_policys_temperature"),
    ("NLPO: refreshed before its time", "textgym.agents.nlpo:NLPO.train", "self.mask_age == self.mask_refresh_interval", "True",
     f"{EXACT}the_mask_waits_for_its_interval"),
    ("PPO-ptx: sign", f"{MIX}.losses", "reduce_tokens(-log_probs", "reduce_tokens(log_probs", TEXTS),
    ("PPO-ptx: micro-batch divided by its own tokens", f"{MIX}.losses", "count=tokens", "count=None", TEXTS),
    ("PPO-ptx: mean over texts for the mean over tokens", f"{MIX}.losses",
     'reduction="token_mean", count=tokens', 'reduction="sequence_sum", count=len(rows)', TEXTS),
    ("PPO-ptx: coefficient forgotten", f"{MIX}.losses", "yield self.coefficient * loss", "yield loss", TEXTS),
    ("PPO-ptx: no texts in the update", "textgym.agents.online:OnlineAgent.update", "chain(losses(), extra_losses)", "losses()", TEXTS),
]
# fmt: on
