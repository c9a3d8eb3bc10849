"""From settings to an agent that learns from examples: `textgym sft` and `textgym train dpo|kto`."""

import random
from typing import Any

import gymnasium
from stable_baselines3.common.utils import LinearSchedule

from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.cli import default_data
from textgym.cli.algorithms import SFT, agent_class
from textgym.cli.errors import UserError, one_line
from textgym.cli.measuring import UNMEASURED, OfflineEvaluation, unmeasured
from textgym.cli.run_folder import RunFolder
from textgym.cli.settings import TrainSettings
from textgym.cli.workplace import (
    MAX_EVALUATION_ROWS,
    MAX_HELD_OUT,
    Row,
    check_device,
    load_policies,
    load_policy,
    load_rewards,
    read_prompt_rows,
)
from textgym.feedback.rows import parse_comparison
from textgym.prompts import PromptText
from textgym.rewards import RewardSet
from textgym.rows import FILES, read_rows
from textgym.tokenizers import load_tokenizer

BEGINNING_WORDS = 5  # of a plain text without a prompt, to sample from
EVALUATIONS = 20
BUNDLED_PASSES = 2  # over the bundled preferences, of which there are few


def make_agent(settings: TrainSettings, folder: RunFolder, options: dict[str, Any]) -> tuple[Any, Any, str | None]:
    """Returns an agent with its examples, the environment over held-out prompts, and the name of the reward that is only measured."""
    policy, reference = load_policies(settings)
    if settings.algorithm != SFT:
        passes = {"n_epochs": BUNDLED_PASSES} if settings.examples is None else {}
        options = {"beta": settings.beta, **passes, **options}
    elif reference is None:
        reference = policy.reference()  # what KL is measured to
    falling = LinearSchedule(settings.step_size, 0.0, 1.0)
    agent = agent_class(settings.algorithm)(policy, None, falling, reference=reference, seed=settings.seed, **options)
    train, held_out = load_examples(settings, agent)
    environment, true_name = make_environment(settings, held_out, policy.tokenizer)
    agent.evaluation = _evaluation(settings, held_out, environment, true_name, folder)
    agent.connect(train)
    agent.evaluation.interval = settings.eval_interval or _interval(agent)
    return agent, environment, true_name


def load_agent(settings: TrainSettings, folder: RunFolder) -> tuple[Any, Any, str | None]:
    """The same from the checkpoint in a run folder."""
    kind = agent_class(settings.algorithm)
    train, held_out = load_examples(settings, None)
    environment, true_name = make_environment(settings, held_out, load_tokenizer(folder.checkpoint / "model"))
    evaluation = _evaluation(settings, held_out, environment, true_name, folder)
    agent = kind.load(folder.checkpoint, train, device=check_device(settings.device), evaluation=evaluation)
    evaluation.interval = settings.eval_interval or _interval(agent)
    return agent, environment, true_name


def count_passes(settings: TrainSettings, agent: Any) -> int:
    """Returns the timesteps to train for: those that were asked for, else the agent's passes over its examples."""
    return settings.total_timesteps or agent.n_epochs * int(agent.examples.num_tokens.sum())


def load_examples(settings: TrainSettings, agent: Any) -> tuple[list[Row], list[Row]]:
    """Returns the examples to train on and a random tenth of them (at most 64) that is held out.

    Args:
        settings: the run's.
        agent: reads the whole file first, so that an error names the right row; None for a file that was read before.
    """
    name = "--examples" if settings.algorithm == SFT else "--preferences"
    if settings.examples is None:
        rows = _default_rows(settings, name)
    else:
        try:
            rows = read_rows(settings.examples, name.removeprefix("--"), forms=f"the path of {FILES}")
            if agent is not None:
                agent.read(settings.examples)
        except (ValueError, OSError) as error:
            raise UserError(f"{name}: {one_line(error)}") from error
    if len(rows) < 2:
        raise UserError(f"{name} {settings.examples} holds one row, so none can be held out.")
    random.Random(settings.seed).shuffle(rows)
    count = min(MAX_HELD_OUT, max(1, len(rows) // 10))
    return rows[count:], rows[:count]


def _default_rows(settings: TrainSettings, name: str) -> list[Row]:
    if settings.model is not None:
        raise UserError(f"{name} must be given with --model: what is used without it was made for the bundled model.")
    if settings.algorithm == SFT:
        return default_data.demonstrations(settings.seed)
    policy = load_policy("--model", str(bundled_model_path()), settings.device)
    make = default_data.preferences if settings.algorithm == "dpo" else default_data.labelled
    return make(policy, settings.seed, settings.max_new_tokens)


def make_environment(settings: TrainSettings, held_out: list[Row], tokenizer: Any) -> tuple[Any, str | None]:
    """Returns the environment over held-out prompts and the name of the reward that is only measured.

    The prompts are those of `--eval-prompts`, the bundled ones beside the bundled data, else those of the held-out examples.
    """
    import textgym.envs  # noqa: F401  (registers the id)

    if settings.eval_prompts is not None:
        prompts: list[Row] = read_prompt_rows("--eval-prompts", settings.eval_prompts)
    elif settings.examples is None:
        prompts = list(bundled_prompts("eval"))
    else:
        prompts = [{**row, "prompt": prompt_of(row)} for row in held_out]
    if settings.reward:
        rewards = load_rewards(settings)
        reward, true_name = rewards.measured, rewards.true_name
    else:
        reward, true_name = RewardSet.build([unmeasured], [1.0], [UNMEASURED]), None
    environment = gymnasium.make_vec(
        "TextGen-v0",
        num_envs=min(len(prompts), MAX_EVALUATION_ROWS),
        prompts=prompts,
        tokenizer=tokenizer,
        reward=reward,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_new_tokens=settings.max_new_tokens,
        truncate_prompts=settings.truncate_prompts,
    )
    return environment, true_name


def prompt_of(row: Row) -> PromptText:
    """Returns what to sample from of an example: its prompt, or how its text begins."""
    if row.get("prompt") is not None:
        prompt: PromptText = row["prompt"]
        return prompt
    if row.get("messages") is not None:
        return list(row["messages"][:-1])
    if row.get("chosen") is not None:
        return parse_comparison(row, "a held-out row").prompt
    if row.get("text") is not None:
        return " ".join(str(row["text"]).split()[:BEGINNING_WORDS])
    raise UserError("--eval-prompts must be given with examples that are ids: there are no texts to sample from.")


def _evaluation(
    settings: TrainSettings, held_out: list[Row], environment: Any, true_name: str | None, folder: RunFolder
) -> OfflineEvaluation:
    return OfflineEvaluation(held_out, bool(settings.reward), environment, true_name, 1, folder.best_model, settings.max_kl)


def _interval(agent: Any) -> int:
    """Optimiser steps between two evaluations, so that the passes have about twenty."""
    steps: int = agent.n_epochs * -(-len(agent.examples) // agent.batch_size)
    return max(1, round(steps / EVALUATIONS))
