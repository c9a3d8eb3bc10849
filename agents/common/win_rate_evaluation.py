"""The win rate during training: how often the policy's held-out texts beat given texts, or those of the policy at the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from textgym.agents.common.environments import attribute
from textgym.agents.common.evaluation import Evaluation, EvaluationResult, evaluate_policy
from textgym.agents.common.scored_completions import Float64Array, PromptRows, score, text_ids
from textgym.agents.policy import CausalLMPolicy
from textgym.evaluation.win_rate import WinRate, judged_win_rate, win_rate
from textgym.feedback.judging import PairJudge


class _Texts(NamedTuple):
    """Texts of N episodes and their scores."""

    texts: list[str]
    scores: Float64Array


class WinRateEvaluation(Evaluation):
    """An `Evaluation` that also logs `eval/win_rate`, ties counted half, with its bootstrap interval over episodes.

    Logged besides: `eval/win_rate_low`, `eval/win_rate_high`.

    Args:
        env: an environment over held-out prompts.
        opponent: whose texts are to be beaten, sampled or read once: a policy; the name of a column of the environment's prompts; None is
            the agent's reference (the policy at the start, unless it was given another one).
        judge: None compares unshaped rewards; a name compares that part of `info["rewards"]` (a gold reward at weight 0, for one); a
            function `judge(prompt, first, second)` is asked in both orders. The texts of a column are scored by the environment's rewards
            alone, without what wrappers add.
        interval: see `Evaluation`.
        episodes: see `Evaluation`.
        best_model_path: see `Evaluation`.
        max_kl: see `Evaluation`.
        seed: see `Evaluation`; the opponent is sampled with the same.

    Attributes:
        last_win_rate: of the last evaluation.
    """

    def __init__(
        self,
        env: Any,
        opponent: CausalLMPolicy | str | None = None,
        *,
        judge: PairJudge | str | None = None,
        interval: int = 10,
        episodes: int | None = None,
        best_model_path: str | Path | None = None,
        max_kl: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(env, interval=interval, episodes=episodes, best_model_path=best_model_path, max_kl=max_kl, seed=seed)
        if isinstance(opponent, str) and opponent not in self._columns():
            raise ValueError(
                f"`opponent` must be a policy or a column of the environment's prompts, got {opponent!r}; the columns are "
                f"{sorted(self._columns())}."
            )
        self.opponent, self.judge = opponent, judge
        self.last_win_rate: WinRate | None = None
        self._others: _Texts | None = None

    def run(self, agent: Any) -> EvaluationResult:
        """Evaluates now, and logs."""
        result = super().run(agent)
        if self._others is None:
            self._others = self._opponents_texts(agent, len(result.infos))
        own, other = _Texts([info["completion"] for info in result.infos], self._scores(result)), self._others
        if callable(self.judge):
            prompts = [info["prompt"] for info in result.infos]
            self.last_win_rate = judged_win_rate(self.judge, prompts, own.texts, other.texts, num_resamples=2000)
        else:
            self.last_win_rate = win_rate(own.scores, other.scores, num_resamples=2000)
        for name, value in zip(
            ("", "_low", "_high"), (self.last_win_rate.rate, self.last_win_rate.low, self.last_win_rate.high), strict=True
        ):
            agent.logger.record(f"eval/win_rate{name}", value)
        return result

    def _opponents_texts(self, agent: Any, episodes: int) -> _Texts:
        if isinstance(self.opponent, str):
            return self._column(self.opponent, agent.policy, episodes)
        opponent = agent.reference if self.opponent is None else self.opponent
        if not isinstance(opponent, CausalLMPolicy):
            raise ValueError(f"`opponent` must be given: this {type(agent).__name__} has no reference policy to be compared with.")
        result = evaluate_policy(opponent, self.env, None, episodes=self.episodes, seed=self.seed)
        return _Texts([info["completion"] for info in result.infos], self._scores(result))

    def _column(self, column: str, policy: CausalLMPolicy, episodes: int) -> _Texts:
        prompt_set = attribute(self.env, "prompt_set")
        everything = PromptRows(prompt_set.texts, prompt_set.columns)
        rows = everything.select([episode % len(everything) for episode in range(episodes)])
        texts = rows.columns[column]
        prompt_ids, ids = text_ids(policy, rows, texts, f"{column!r} of prompt {{}}")
        totals, parts = score(attribute(self.env, "reward_set"), rows, prompt_ids, ids, policy.decode_texts)
        if isinstance(self.judge, str):
            return _Texts(texts, self._part(parts.__getitem__, list(parts)))
        return _Texts(texts, totals.astype(np.float32).astype(np.float64))  # as an environment pays: equal texts tie

    def _scores(self, result: EvaluationResult) -> Float64Array:
        if not isinstance(self.judge, str):
            return result.rewards.astype(np.float64)
        return self._part(lambda name: np.array([info["rewards"][name] for info in result.infos]), list(result.infos[0]["rewards"]))

    def _part(self, read: Callable[[str], Float64Array], names: list[str]) -> Float64Array:
        if self.judge not in names:
            raise ValueError(f"`judge` must be a function or the name of a reward of the environment, {names}, got {self.judge!r}.")
        return read(str(self.judge))

    def _columns(self) -> list[str]:
        prompt_set = attribute(self.env, "prompt_set")
        return [] if prompt_set is None else list(prompt_set.columns)
