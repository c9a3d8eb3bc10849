"""Reinforcement learning from human feedback, whole: ask, fit, improve, once or again and again.

    π_ref   = SFT(π_0)                                     if there are demonstrations
    round k:  ask       y, y' ~ π_{k−1}(·|x), compared by the annotator, join D
              fit       r̂_k = Bradley–Terry on D, its mean on π_ref's completions taken out
              improve   π_k: further steps of RL for E[r̂_k] − β KL(π ‖ π_ref)

One round is the pipeline of Ziegler et al. 2019 (arXiv:1909.08593) and InstructGPT (Ouyang et al. 2022, arXiv:2203.02155); several are the
loop of Christiano et al. 2017 (arXiv:1706.03741): the reward model sees what the policy has come to write, so that what it was fooled by
yesterday is labelled today.

Everything lies in one folder, and each step writes its result before the next begins: calling `run` again on that folder goes on.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from textgym import agents
from textgym.agents.common.checks import check_count
from textgym.agents.common.rlhf_steps import fit_reward_model, readable_prompts, sample_pairs
from textgym.agents.common.scored_completions import PromptRows
from textgym.agents.online import OnlineAgent
from textgym.agents.policy import CausalLMPolicy
from textgym.agents.reward_model import RewardModel
from textgym.agents.sft import SFT
from textgym.conversations import template_columns
from textgym.errors import FeedbackNeeded
from textgym.feedback import Comparison, Record, read_feedback, to_comparisons, write_feedback
from textgym.prompts import PromptText

Options: TypeAlias = Mapping[str, Any]
Callbacks: TypeAlias = list[BaseCallback]


class Annotator(Protocol):
    """Who compares: a `textgym.feedback.SyntheticAnnotator`, or anything of yours with this method.

    If it draws, from a numpy `generator` of that name, an interrupted run goes on exactly.
    """

    def compare(self, prompts: Sequence[PromptText], first: Sequence[PromptText], second: Sequence[PromptText]) -> list[Comparison]:
        """Returns one comparison per pair."""
        ...


@dataclass(frozen=True)
class Round:
    """What one round came to.

    Attributes:
        number: from 1.
        comparisons: in D, those of earlier rounds included.
        reward_model: how good the reward model is on held-out comparisons, `RewardModelReport.to_dict()` (nothing of it where it could not
            be measured, but `not_measured`, why); and `training`, the comparisons that it learned from and those that were left out.
        timesteps: generated tokens of RL so far.
    """

    number: int
    comparisons: int
    reward_model: dict[str, Any]
    timesteps: int


class Saving(BaseCallback):
    """Saves now and then, between two iterations: an agent's state is whole there.

    Args:
        save: saves a checkpoint.
        interval: timesteps between two.
    """

    def __init__(self, save: Callable[[], None], interval: int) -> None:
        super().__init__()
        self._save, self._interval, self._saved_at = save, interval, 0

    def _on_training_start(self) -> None:
        self._saved_at = self.model.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps - self._saved_at >= self._interval:
            self._save()
            self._saved_at = self.model.num_timesteps


class LatestReward:
    """The reward of an environment that outlives its reward models: `model` is replaced between rounds."""

    __name__ = "reward_model"

    def __init__(self) -> None:
        self.model: RewardModel | None = None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Returns one reward per completion."""
        assert self.model is not None  # `RLHF.run` fits one before it samples
        rewards: list[float] = self.model(prompts=prompts, completions=completions, **columns)
        return rewards

    def __deepcopy__(self, memo: dict[int, Any]) -> "LatestReward":
        return self


class RLHF:
    """Trains a policy by somebody's preferences, in rounds of asking, fitting and improving.

    Args:
        policy: where to start; it is not changed, `RLHF.policy` is what comes out.
        prompts: to sample from and to train on, in any form that an environment takes. Those that with `max_new_tokens` are longer than
            the `max_tokens` of `reward_model_options` are left out; without that, one longer than the model reads is an error.
        annotator: who compares pairs of completions. None asks outside: `run` writes the pairs, stops with `FeedbackNeeded`, and goes on
            when it is called again after `textgym label` (or anything else) has written the comparisons.
        folder: where everything lies. One that an interrupted run left is gone on with.
        demonstrations: what SFT imitates before the first round, see `SFT`; None: `policy` is π_ref as it is.
        feedback: comparisons that are there already, in any form that `read_feedback` takes. With them the first round asks nothing.
        algorithm: the online agent, by its name in `textgym.agents`.
        num_pairs: pairs to compare in each round.
        timesteps_per_round: generated tokens of RL in each round.
        max_new_tokens: of a completion.
        num_envs: completions per iteration of RL.
        agent_options: further arguments of the agent, such as `learning_rate`, `beta`, `num_generations`. A schedule sees the progress
            remaining of all tokens up to the end of the round.
        reward_model_options: further arguments of `RewardModelTrainer`.
        sft_options: further arguments of `SFT`.
        checkpoint_interval: timesteps of RL between two checkpoints.
        logger: where the agent logs; None as an agent does by itself.
        seed: of everything that is drawn here; the annotator has its own.

    Attributes:
        agent: who learns; None before `run`. Its `reference` is π_ref.
        rounds: the rounds that are done.
        num_left_out: prompts that were left out.

    Raises:
        ValueError: an argument breaks one of the rules above, or `folder` holds a run with other settings.
    """

    def __init__(
        self,
        policy: CausalLMPolicy,
        prompts: Any,
        annotator: Annotator | None,
        folder: str | os.PathLike[str],
        *,
        demonstrations: Any = None,
        feedback: Any = None,
        algorithm: str = "RLOO",
        num_pairs: int = 2_000,
        timesteps_per_round: int = 60_000,
        max_new_tokens: int = 32,
        num_envs: int = 64,
        agent_options: Options | None = None,
        reward_model_options: Options | None = None,
        sft_options: Options | None = None,
        checkpoint_interval: int = 20_000,
        logger: Logger | None = None,
        seed: int = 0,
    ) -> None:
        counts = {
            "num_pairs": num_pairs,
            "timesteps_per_round": timesteps_per_round,
            "max_new_tokens": max_new_tokens,
            "num_envs": num_envs,
        }
        for name, value in {**counts, "checkpoint_interval": checkpoint_interval}.items():
            check_count(name, value, _UNITS.get(name, "tokens"))
        self.agent_class = _online_agent(algorithm)
        max_tokens = dict(reward_model_options or {}).get("max_tokens")
        self.prompts, self.num_left_out = readable_prompts(PromptRows.read(prompts), policy, max_new_tokens, max_tokens)
        self.start, self.annotator, self.demonstrations, self.feedback = policy, annotator, demonstrations, feedback
        self.num_pairs, self.timesteps_per_round, self.max_new_tokens = num_pairs, timesteps_per_round, max_new_tokens
        self.num_envs, self.checkpoint_interval, self.seed = num_envs, checkpoint_interval, seed
        self.agent_options, self.reward_model_options = dict(agent_options or {}), dict(reward_model_options or {})
        self.sft_options, self.logger = dict(sft_options or {}), logger
        self.reward = LatestReward()
        self.agent: OnlineAgent | None = None
        self.rounds: list[Round] = []
        self.folder = Path(folder)
        self._open({"algorithm": algorithm, "seed": seed, **counts})

    def _open(self, settings: dict[str, Any]) -> None:
        """Begins the folder, or takes up the run that is in it."""
        path = self.folder / "rlhf.json"
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
        for name, value in settings.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"`{name}` must be that of the run in {self.folder}, {saved.get(name)!r}, got {value!r}. "
                    "Another run needs another folder."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(path, settings)
        while (report := self._round(len(self.rounds) + 1) / "round.json").exists():
            self.rounds.append(Round(**json.loads(report.read_text(encoding="utf-8"))))

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    @property
    def policy(self) -> CausalLMPolicy:
        """π as it is now."""
        return self.start if self.agent is None else self.agent.policy

    @property
    def reward_model(self) -> RewardModel | None:
        """The latest reward model; None before there is one."""
        return self.reward.model

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(
        self,
        rounds: int = 1,
        *,
        callback: Callbacks | None = None,
        progress_bar: bool = False,
        announce: Callable[[str], None] = lambda text: None,
    ) -> list[Round]:
        """Goes on until `rounds` rounds are done, those of earlier calls on this folder included.

        Args:
            rounds: 1 is the pipeline, more the loop.
            callback: SB3 callbacks of the RL steps.
            progress_bar: show one in each step.
            announce: is told, in words, what begins.

        Returns:
            all rounds.

        Raises:
            FeedbackNeeded: `annotator` is None, and the comparisons of a round are not there yet.
        """
        check_count("rounds", rounds, "rounds")
        if self.agent is None:
            if self.demonstrations is not None and not (self.folder / "reference").exists():
                announce("Fine-tuning on the demonstrations")
            self.agent = self._make_agent(self.make_reference(progress_bar))
        for number in range(len(self.rounds) + 1, rounds + 1):
            folder = self._round(number)
            folder.mkdir(exist_ok=True)
            announce(f"Round {number} of {rounds}: comparing completions")
            self.ask(number, progress_bar)
            comparisons = self.comparisons(number)
            announce(f"Round {number} of {rounds}: fitting the reward model to {len(comparisons):,} comparisons")
            report = self.fit(number, comparisons, progress_bar)
            announce(f"Round {number} of {rounds}: training the policy against it")
            self.improve(number, callback or [], progress_bar)
            self.policy.save_pretrained(folder / "model")
            done = Round(number, len(comparisons), report, self.agent.num_timesteps)
            _write(folder / "round.json", asdict(done))
            self.rounds.append(done)
        return self.rounds

    def make_reference(self, progress_bar: bool = False) -> CausalLMPolicy:
        """Returns π_ref: the policy at the start, fine-tuned on the demonstrations if there are some."""
        folder = self.folder / "reference"
        if not folder.exists():
            fresh = self.folder / "reference.new"
            self.start.save_pretrained(fresh)
            if self.demonstrations is not None:
                policy = self._load(fresh)
                SFT(policy, self.demonstrations, **{"seed": self.seed, **self.sft_options}).learn(progress_bar=progress_bar)
                policy.save_pretrained(fresh)
            fresh.replace(folder)  # there whole, or not at all
        return self._load(folder)

    def _load(self, folder: Path) -> CausalLMPolicy:
        return CausalLMPolicy.from_pretrained(folder, device=self.start.device, **self.start.loading_arguments())

    def ask(self, number: int, progress_bar: bool = False) -> None:
        """Gets the comparisons of a round, unless they are there: from the feedback given, or of fresh samples of the policy."""
        answers, questions = self._round(number) / "comparisons.jsonl", self._round(number) / "pairs.jsonl"
        if answers.exists():
            return
        if number == 1 and self.feedback is not None:
            _write_comparisons(answers, read_feedback(self.feedback).records)
            return
        if not questions.exists():
            pairs = sample_pairs(self.policy, self.prompts, self.num_pairs, self.max_new_tokens, self.seed + number, progress_bar)
            _replace(questions, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
        if self.annotator is None:
            raise FeedbackNeeded(
                f"{questions} holds {self.num_pairs} pairs of completions to compare. Do it, for instance with\n"
                f"  textgym label {questions} --out {answers}\nand run again: what {answers.name} then holds is learned from."
            )
        rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
        prompts = [row["prompt"] for row in rows]
        first, second = ([row["completions"][place] for row in rows] for place in (0, 1))
        self._restore_annotator(number)
        compared = self.annotator.compare(prompts, first, second)
        generator = getattr(self.annotator, "generator", None)
        if generator is not None:
            _write(self._round(number) / "annotator.json", generator.bit_generator.state)
        templates = {repr(row["prompt"]): template_columns(row) for row in rows}  # the reward model reads them with the prompt
        _write_comparisons(answers, [replace(one, columns={**templates.get(repr(one.prompt), {}), **one.columns}) for one in compared])

    def _restore_annotator(self, number: int) -> None:
        """Puts the annotator where the rounds before left it."""
        saved = self._round(number - 1) / "annotator.json"
        if saved.exists():
            self.annotator.generator.bit_generator.state = json.loads(saved.read_text(encoding="utf-8"))  # type: ignore[union-attr]

    def comparisons(self, number: int) -> list[Comparison]:
        """Returns D: the comparisons of the rounds up to this one."""
        files = [self._round(one) / "comparisons.jsonl" for one in range(1, number + 1)]
        return [record for record in read_feedback(files) if isinstance(record, Comparison)]

    def fit(self, number: int, comparisons: list[Comparison], progress_bar: bool) -> dict[str, Any]:
        """Fits the reward model of a round, or reads it; returns what it is worth on held-out comparisons."""
        assert self.agent is not None
        reference, folder = self.agent.reference, self._round(number) / "reward-model"
        if not (folder / "report.json").exists():
            options = self.reward_model_options
            fitted = fit_reward_model(reference, comparisons, self.prompts, self.max_new_tokens, self.seed + number, options, progress_bar)
            fitted.model.save_pretrained(folder)
            numbers = {"not_measured": fitted.not_measured} if fitted.report is None else fitted.report.to_dict()
            _write(folder / "report.json", {**numbers, "training": fitted.training})
        self.reward.model = RewardModel.from_pretrained(folder, device=reference.device)
        worth: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return worth

    def improve(self, number: int, callback: Callbacks, progress_bar: bool) -> None:
        """Trains the policy against the reward model of a round, from the last checkpoint on."""
        assert self.agent is not None
        remaining = number * self.timesteps_per_round - self.agent.num_timesteps
        if remaining > 0:
            saving = Saving(self.save, self.checkpoint_interval)
            self.agent.learn(remaining, callback=[saving, *callback], reset_num_timesteps=False, progress_bar=progress_bar)
        self.save()

    def save(self) -> None:
        """Saves the agent, to go on from; between two iterations of it."""
        assert self.agent is not None
        self.agent.save(self.folder / "agent")

    def _make_agent(self, policy: CausalLMPolicy) -> OnlineAgent:
        """Returns the agent in its environment: as it was saved, or at the start, where the policy is π_ref."""
        envs = gym.make_vec(
            "textgym:TextGen-v0",
            num_envs=self.num_envs,
            prompts=self.prompts.as_rows(),
            tokenizer=policy.tokenizer,
            reward=self.reward,
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=policy.eos_token_ids,
        )
        saved = self.folder / "agent"
        if saved.exists():
            not_saved = {name: value for name, value in self.agent_options.items() if callable(value) or name == "evaluation"}
            agent: OnlineAgent = self.agent_class.load(saved, env=envs, device=policy.device, **not_saved)
        else:
            agent = self.agent_class(policy, envs, **{"seed": self.seed, **self.agent_options})
        if self.logger is not None:
            agent.set_logger(self.logger)
        return agent


_UNITS = {"num_pairs": "pairs", "num_envs": "completions"}


def _online_agent(name: str) -> Any:
    """Returns the class of an online agent."""
    found = getattr(agents, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, OnlineAgent)):
        raise ValueError(f"`algorithm` must be the name of an online agent, such as 'PPO' or 'RLOO', got {name!r}.")
    return found


def _write_comparisons(path: Path, records: Sequence[Record]) -> None:
    """Writes comparisons, whole or not at all; rankings and judgements count as their pairs."""
    comparisons = to_comparisons(records)
    if not comparisons:
        raise ValueError("There must be at least one comparison to learn a reward from, got none.")
    temporary = path.with_name("comparisons-new.jsonl")
    write_feedback(temporary, comparisons)
    temporary.replace(path)


def _write(path: Path, document: Any) -> None:
    _replace(path, json.dumps(document, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    """Writes a file that is there whole, or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
