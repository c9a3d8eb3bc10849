"""From settings to an agent that learns from examples: `textgym sft` and `textgym train dpo|kto`."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from stable_baselines3.common.utils import LinearSchedule

from textgym.agents.common.options import arguments_of
from textgym.bundled import bundled_model_path, bundled_prompts
from textgym.cli import default_data
from textgym.cli.algorithms import SFT, agent_class
from textgym.cli.errors import UserError
from textgym.cli.measuring import UNMEASURED, OfflineEvaluation, unmeasured
from textgym.cli.run_folder import RunFolder
from textgym.cli.schedules import schedule, with_schedules
from textgym.cli.settings import TrainSettings
from textgym.cli.splitting import Row, Split, given_sides, prompt_key, shared_prompts, split_rows
from textgym.cli.workplace import (
    Prepared,
    check_device,
    load_policies,
    load_policy,
    load_rewards,
    make_environment,
    read_file,
    read_prompt_rows,
    unknown_options,
)
from textgym.feedback.rows import parse_comparison, recognise_form
from textgym.prompts import PromptText
from textgym.rewards import RewardSet
from textgym.rows import FILES, read_rows

BEGINNING_WORDS = 5  # of a plain text without a prompt, to sample from
EVALUATIONS = 20
BUNDLED_PASSES = 2  # over the bundled preferences, of which there are few


def make_agent(settings: TrainSettings, folder: RunFolder) -> Prepared:
    """Returns an agent with its examples, and the environment over held-out prompts."""
    policy, reference = load_policies(settings)
    options = dict(settings.options)
    if settings.algorithm != SFT:
        passes = {"n_epochs": BUNDLED_PASSES} if settings.examples is None else {}
        options = {"beta": settings.beta, **passes, **options}
    elif reference is None:
        reference = policy.reference()  # what KL is measured to
    kind, step_size = agent_class(settings.algorithm), settings.step_size
    falling = schedule(step_size) if isinstance(step_size, str) else LinearSchedule(step_size, 0.0, 1.0)
    with unknown_options():
        agent = kind(policy, None, falling, reference=reference, seed=settings.seed, **with_schedules(options, arguments_of(kind)))
    return _connected(settings, agent, folder)


def load_agent(settings: TrainSettings, folder: RunFolder) -> Prepared:
    """The same from the checkpoint in a run folder.

    Raises:
        UserError: the file of examples is not what it was.
    """
    agent = agent_class(settings.algorithm).load(folder.checkpoint, None, device=check_device(settings.device))
    position = agent.position()
    prepared = _connected(settings, agent, folder)
    if position is not None and agent.examples.fingerprint() != position["fingerprint"]:
        name = _option(settings)
        raise UserError(f"--resume {folder.path}: {name} {settings.examples} holds other rows than when the run began; start a new run.")
    state = json.loads((folder.checkpoint / "agent.json").read_text(encoding="utf-8"))["state"]["evaluation"]
    if state is not None:
        agent.evaluation.load_state_dict(state)
    return prepared


def _connected(settings: TrainSettings, agent: Any, folder: RunFolder) -> Prepared:
    """Gives an agent its examples and its evaluation."""
    examples = load_examples(settings, agent)
    environment, true_name = make_held_out(settings, examples.held_out, agent.policy.tokenizer)
    agent.evaluation = OfflineEvaluation(
        examples.held_out, bool(settings.reward), environment, true_name, 1, folder.best_model, settings.max_kl
    )
    agent.connect(examples.train)
    agent.evaluation.interval = settings.eval_interval or _interval(agent)
    return Prepared(agent, environment, true_name, examples)


def count_passes(settings: TrainSettings, agent: Any) -> int:
    """Returns the timesteps to train for: those that were asked for, else the agent's passes over its examples."""
    return settings.total_timesteps or agent.n_epochs * int(agent.examples.num_tokens.sum())


def load_examples(settings: TrainSettings, agent: Any) -> Split:
    """Returns the examples to train on and those of a random tenth of the prompts (at most 64 rows), or of `--held-out`.

    Args:
        settings: the run's.
        agent: reads the whole file first, so that an error names the right row; what it leaves out is on neither side.

    Raises:
        UserError: a file is not as it should be, or all rows have the same prompt.
    """
    name = _option(settings)
    if settings.examples is None:
        return split_rows(_default_rows(settings, name), _key(agent), settings.seed, f"{name}: give more.")
    rows, left_out = _read(name, settings.examples, agent)
    if settings.held_out is None:
        cure = f"{name} {settings.examples}: give --held-out too."
        return split_rows(rows, _key(agent), settings.seed, cure, left_out)
    held_out, more = _read("--held-out", settings.held_out, agent)
    split = given_sides(rows, held_out, _key(agent), left_out + more)
    if shared := shared_prompts(split, _key(agent)):
        raise UserError(
            f"--held-out {settings.held_out} has {shared:,} of its {split.held_out_prompts:,} prompts in common with {name}: what is "
            "trained on cannot be held out; take those rows out of one of the files."
        )
    return split


def _option(settings: TrainSettings) -> str:
    return "--examples" if settings.algorithm == SFT else "--preferences"


def _read(name: str, path: str, agent: Any) -> tuple[list[Row], int]:
    """Returns the rows of a file that the agent reads, and how many it leaves out."""

    def read(path: str) -> tuple[list[Row], Sequence[int], int]:
        labels = not isinstance(agent, agent_class(SFT))  # a demonstration may have any column
        rows = read_rows(path, agent.argument, forms=f"the path of {FILES}")
        said = [row for row in rows if not (isinstance(row, dict) and labels and recognise_form(row) == "comment")]
        # As a file where nothing is passed over: messages then name its rows.
        return said, agent.read(path if len(said) == len(rows) else said).places.tolist(), len(rows)

    rows, places, count = read_file(name, path, read)
    if comments := count - len(rows):
        print(f"textgym: {name}: left out {comments:,} comments, which textgym label writes between its labels")
    return [rows[place] for place in places], count - len(places)


def _key(agent: Any) -> Callable[[Row], str]:
    """Returns what tells the prompt of an example from others; a plain text is its own."""

    def key(row: Row) -> str:
        example = type(agent).parse(row, "a row")
        return prompt_key(example.completions[0] if example.prompt is None else example.prompt)

    return key


def _default_rows(settings: TrainSettings, name: str) -> list[Row]:
    if settings.model is not None:
        raise UserError(f"{name} must be given with --model: what is used without it was made for the bundled model.")
    if settings.algorithm == SFT:
        return default_data.demonstrations(settings.seed)
    policy = load_policy("--model", str(bundled_model_path()), settings.device)
    make = default_data.preferences if settings.algorithm == "dpo" else default_data.labelled
    return make(policy, settings.seed, settings.max_new_tokens)


def make_held_out(settings: TrainSettings, held_out: list[Row], tokenizer: Any) -> tuple[Any, str | None]:
    """Returns the environment over held-out prompts and the name of the reward that is only measured.

    The prompts are those of `--eval-prompts`, the bundled ones beside the bundled data, else those of the held-out examples, each once.
    """
    if settings.eval_prompts is not None:
        prompts: list[Row] = read_prompt_rows("--eval-prompts", settings.eval_prompts)
    elif settings.examples is None:
        prompts = list(bundled_prompts("eval"))
    else:
        once: dict[str, Row] = {}
        for row in held_out:
            prompt = prompt_of(row)
            once.setdefault(prompt_key(prompt), {**row, "prompt": prompt})
        prompts = list(once.values())
    if not settings.reward:
        return make_environment(settings, prompts, tokenizer, RewardSet.build([unmeasured], [1.0], [UNMEASURED])), None
    rewards = load_rewards(settings)
    return make_environment(settings, prompts, tokenizer, rewards.measured), rewards.true_name


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


def _interval(agent: Any) -> int:
    """Optimiser steps between two evaluations, so that the passes have about twenty."""
    steps: int = agent.n_epochs * -(-len(agent.examples) // agent.batch_size)
    return max(1, round(steps / EVALUATIONS))
