"""Deliberate mistakes in learning from feedback, its evaluation and verifiable rewards; rows of `Mutation`, see `mutations.py`."""

STEPS, LOOP = "textgym.agents.common.rlhf_steps", "textgym.agents.rlhf:RLHF"
OVER, NUMERIC = "textgym.evaluation.over_optimisation", "textgym.rewards.numeric"
FINDING, NUMBERS, EXPRESSIONS = (f"textgym.rewards.answers.{name}" for name in ("finding", "numbers", "expressions"))
TESTS, ANSWERS = "agents/test_rlhf_steps.py::test_", "rewards/test_numeric_answers.py::test_"
EXACTLY_NOTHING = "evaluation/test_over_optimisation.py::test_a_change_of_exactly_nothing_is_neither_rise_nor_fall"
MEAN_ZERO = f"{TESTS}the_reward_has_mean_zero_on_the_references_completions"
FROM_REFERENCE = f"{TESTS}the_reward_model_comes_from_the_reference"

# fmt: off
MUTATIONS = [
    # the mean on the reference's completions
    ("reward model: not normalised", f"{STEPS}:fit_reward_model",
     "model.normalise(drawn.texts, texts, columns=drawn.columns, progress_bar=progress_bar)", "drawn.texts", MEAN_ZERO),
    ("reward model: normalised on what was compared", f"{STEPS}:fit_reward_model",
     "model.normalise(drawn.texts, texts, columns=drawn.columns, progress_bar=progress_bar)",
     "model.normalise([one.prompt for one in train], [one.chosen for one in train])", MEAN_ZERO),
    ("reward model: normalised before it learns", f"{STEPS}:fit_reward_model",
     "trainer.learn(progress_bar=progress_bar)",
     "model.normalise(prompts.texts, sample_completions(reference, prompts.texts, max_new_tokens, seed))\n"
     "    model.normalise = lambda *_, **__: None\n    trainer.learn(progress_bar=progress_bar)", MEAN_ZERO),
    # whose head and normalisation
    ("reward model: from the present policy", f"{LOOP}.fit", "self.agent.reference, self._round", "self.agent.policy, self._round",
     FROM_REFERENCE),
    ("reward model: normalised on the present policy", f"{LOOP}.fit",
     "fitted.model.save_pretrained(folder)",
     "fitted.model.normalise(self.prompts.texts, self.agent.policy.generate(self.prompts.texts, self.max_new_tokens).texts); "
     "fitted.model.save_pretrained(folder)", FROM_REFERENCE),
    ("reward model: the same seed in every round", f"{LOOP}.fit", "self.seed + number, options", "self.seed, options", FROM_REFERENCE),
    ("RLHF: the first round's reward pays for ever", f"{LOOP}.fit",
     "self.reward.model = RewardModel", "self.reward.model = self.reward.model or RewardModel",
     f"{TESTS}each_round_pays_by_its_own_reward_model"),
    ("RLHF: only the last round is learned from", f"{LOOP}.comparisons", "range(1, number + 1)", "range(number, number + 1)",
     f"{TESTS}a_round_learns_from_the_comparisons_of_all_rounds_so_far"),
    # what is held out
    ("held out: learned from too", f"{STEPS}:split_by_prompt",
     "parts[repr(one.prompt) in held_out].append(one)",
     "parts[0].append(one); parts[1].append(one) if repr(one.prompt) in held_out else None", f"{TESTS}comparisons_are_parted_by_prompt"),
    ("held out: by comparison, not by prompt", f"{STEPS}:split_by_prompt",
     "parts[repr(one.prompt) in held_out]", "parts[comparisons.index(one) % 10 == 0]", f"{TESTS}comparisons_are_parted_by_prompt"),
    ("held out: a share of the comparisons", f"{STEPS}:split_by_prompt",
     "round(share * len(prompts))", "round(share * len(comparisons))", f"{TESTS}comparisons_are_parted_by_prompt"),
    ("held out: the same prompts with every seed", f"{STEPS}:split_by_prompt",
     "np.random.default_rng(seed)", "np.random.default_rng(0)", f"{TESTS}comparisons_are_parted_by_prompt"),
    ("reward model: learns from all comparisons", f"{STEPS}:fit_reward_model",
     "trainer.connect(train,", "trainer.connect(comparisons,", f"{TESTS}what_is_held_out_is_not_learned"),
    ("reward model: measured on what it learned", f"{STEPS}:fit_reward_model",
     "_read_held_out(trainer, held_out)", "_read_held_out(trainer, train)", f"{TESTS}what_is_held_out_is_not_learned"),
    # draws
    ("RLHF: every round samples with the same seed", f"{LOOP}.ask", "self.seed + number", "self.seed",
     f"{TESTS}each_round_asks_about_other_samples"),
    ("pairs: the same draws with every seed", f"{STEPS}:sample_pairs", "max_new_tokens, seed, 2, progress_bar",
     "max_new_tokens, 0, 2, progress_bar", f"{TESTS}pairs_are_new_draws_in_a_new_order_with_every_seed"),
    ("pairs: the same order with every seed", f"{STEPS}:sample_pairs", "np.random.default_rng(seed)", "np.random.default_rng(0)",
     f"{TESTS}pairs_are_new_draws_in_a_new_order_with_every_seed"),
    ("pairs: a completion beside itself", f"{STEPS}:sample_pairs", "texts[2 * i : 2 * i + 2]", "[texts[2 * i]] * 2",
     f"{TESTS}pairs_are_new_draws_in_a_new_order_with_every_seed"),
    ("samples: every batch has the same draws", f"{STEPS}:sample_completions", "generator=generator", "seed=seed",
     f"{TESTS}every_batch_of_samples_is_a_new_draw"),
    # over-optimisation
    ("over-optimisation: no change of the gold reward is a fall", f"{OVER}:Change.direction", "self.change.high < 0",
     "self.change.high <= 0", EXACTLY_NOTHING),
    ("over-optimisation: no change is a rise", f"{OVER}:Change.direction", "self.change.low > 0", "self.change.low >= 0", EXACTLY_NOTHING),
    ("over-optimisation: hacked without a fall", f"{OVER}:_verdict", "gold < 0", "gold <= 0", EXACTLY_NOTHING),
    ("over-optimisation: a proxy that stayed was optimised", f"{OVER}:_verdict", "proxy <= 0", "proxy < 0", EXACTLY_NOTHING),
    # numeric answers
    ("numeric: the first mark, not the last", f"{FINDING}:find_answer", "reversed(list(_MARK.finditer(text)))", "_MARK.finditer(text)",
     f"{ANSWERS}the_last_marked_answer_counts"),
    ("numeric: all behind the first mark", f"{FINDING}:_line_of_mark", 'line: str = mark["line"].strip()',
     'line = text.partition("####")[2].strip()', f"{ANSWERS}the_last_marked_answer_counts"),
    ("numeric: the first box", f"{FINDING}:_last_box", "reversed(list(_BOX.finditer(text)))", "_BOX.finditer(text)",
     f"{ANSWERS}the_last_marked_answer_counts"),
    ("numeric: the first announcement", f"{FINDING}:_announced", "next(reversed(list(_ANNOUNCEMENT.finditer(text))), None)",
     "next(_ANNOUNCEMENT.finditer(text), None)", f"{ANSWERS}the_last_marked_answer_counts"),
    ("numeric: a numbered heading is an answer", f"{FINDING}:_line_of_mark",
     "(at_beginning and _HEADING.match(line) and text[mark.end() :].strip())", "False", f"{ANSWERS}a_heading_is_no_answer"),
    ("numeric: words of all kinds are units", f"{NUMBERS}:_read_behind", " or not _NO_UNITS.isdisjoint(words)", "",
     f"{ANSWERS}no_answer_is_its_first_number"),
    ("numeric: letters behind a number are its unit", f"{NUMBERS}:_read_behind", "None if _is_product(words, unit, apart) else ", "",
     f"{ANSWERS}no_answer_is_its_first_number"),
    ("numeric: dates are sums", f"{EXPRESSIONS}:is_expression", " or _LOOK_LIKE_SUMS.search(answer)", "",
     f"{ANSWERS}what_looks_like_a_sum_is_none"),
    ("numeric: mathematics is compared as text", f"{NUMERIC}:_side", "if is_expression(answer) else None", "if False else None",
     f"{ANSWERS}an_answer_in_latex_needs_no_dollars"),
    ("numeric: tolerance on plain numbers only", f"{NUMERIC}:NumericReward._same", "max(self.tolerance, ", "max(Fraction(0), ",
     f"{ANSWERS}the_tolerance_of_plain_numbers_boxes_and_mathematics"),
    ("numeric: tolerance on mathematics only", f"{NUMERIC}:NumericReward._same",
     "same_number(numbers[0], numbers[1], self.tolerance)", "same_number(numbers[0], numbers[1], Fraction(0))",
     f"{ANSWERS}the_tolerance_of_plain_numbers_boxes_and_mathematics"),
]
# fmt: on
