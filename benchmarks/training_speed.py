"""Completions (DPO: pairs) per second of whole training iterations, beside TRL and stock Stable-Baselines3; all take turns in one process.

    python benchmarks/training_speed.py [--threads 2] [--repeats 5] [--iterations 10] [--device cpu] [--only NAME ...] [--out result.json]

It needs TRL 1.16 (`pip install "trl==1.16.0" datasets`), which is no dependency of textgym; without, TRL's candidates are left out, with a
note.

The setting: a random GPT-2 of 1.1 million parameters in float32 (`speed_task.py`), prompts of 16 tokens, completions of 32 (the end token
is never drawn), 64 completions an iteration, 4 of each prompt where the algorithm has groups, β = 0.05 with the reference scored in every
iteration, one optimiser step a rollout, the same cheap Python reward, Adam or AdamW (each side's own) at one learning rate, gradients
clipped to norm 1; nothing is logged, reported or saved. DPO: 32 pairs a step, 16 + 32 tokens, the end token one of these.

TRL has its best settings: no gradient checkpointing (its default), no mixed precision (its default is bfloat16, here everyone computes in
float32), the cache on, a rollout for every step, old log-probs only where its trainer insists (RLOO). It appears with its growing and with
its static cache, DPO with the reference scored in every step (its default) and once before training, as textgym does it; the better of the
two counts. Stock PPO of Stable-Baselines3 has the language model as its actor-critic policy: no cache is possible there, the prefix is run
again for every token, but only as many columns as are used, and the head only at the last. It appears in the same KL-shaped environment
(through `ActorCriticAdapter`, which asks the policy and the reference again) and in the plain one, without the KL term; the first is the
same task. Its rollout is learned from in minibatches of 64 steps, its default, as it cannot accumulate gradients (one step on the whole
rollout was slower); it is so slow that one round of two iterations is measured.

An iteration is timed by callbacks in each framework, from the beginning of one rollout (or step) to that of the next. Each round builds its
trainer anew, leaves the first iterations out and takes the median of the others; the table has the median over rounds. What happens before
the first iteration, such as loading, tokenising and scoring DPO's reference once, is in nobody's figure.

Expected: on the CPU at least 2 times TRL's RLOO, GRPO and DPO, 25 times stock PPO, and PPO no slower than TRL's RLOO; on a GPU 5, 5, 2, 50
and 3.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import gymnasium as gym
import speed_task
import stable_baselines3
import torch
import transformers
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from textgym.agents import DPO, GRPO, PPO, RLOO, CausalLMPolicy
from textgym.vec_env_adapter import as_sb3_vec_env
from textgym.wrappers import ActorCriticAdapter
from textgym.wrappers.vector import KLShaping

HAS_TRL = all(importlib.util.find_spec(name) for name in ("trl", "datasets"))
WITHOUT_TRL = 'TRL is not installed, so its candidates are left out; `pip install "trl==1.16.0" datasets` brings them.'
BETA, LEARNING_RATE, MAX_GRAD_NORM, GENERATIONS = 0.05, 1e-5, 1.0, 4
STOCK_MINIBATCH, STOCK_ITERATIONS, STOCK_WARM_UP = 64, 2, 1
NEVER = 10**9  # iterations between two rows of a log
AGENTS = {"RLOO": RLOO, "GRPO": GRPO, "PPO": PPO}

# What is divided by the best of what, and what should come out at least: on the CPU, on a GPU.
RATIOS: dict[str, tuple[str, tuple[str, ...], float, float]] = {
    "RLOO / TRL RLOO": ("RLOO", ("TRL RLOO", "TRL RLOO, static cache"), 2.0, 5.0),
    "GRPO / TRL GRPO": ("GRPO", ("TRL GRPO", "TRL GRPO, static cache"), 2.0, 5.0),
    "PPO / stock PPO": ("PPO", ("stock PPO",), 25.0, 50.0),
    "PPO / TRL RLOO": ("PPO", ("TRL RLOO", "TRL RLOO, static cache"), 1.0, 3.0),
    "DPO / TRL DPO": ("DPO", ("TRL DPO", "TRL DPO, reference once"), 2.0, 2.0),
    "DPO, packed / TRL DPO": ("DPO, packed", ("TRL DPO", "TRL DPO, reference once"), 2.0, 2.0),
}


class Run(NamedTuple):
    """What a candidate is told.

    Attributes:
        device: where it trains.
        completions: of an iteration.
        pairs: of a step of DPO.
        new_tokens: of a completion.
        iterations: that are measured.
        folder: the model and the tokenizer, as transformers reads them.
    """

    device: torch.device
    completions: int
    pairs: int
    new_tokens: int
    iterations: int
    folder: Path

    @property
    def length(self) -> int:
        """Iterations of a run, warm-up included."""
        return speed_task.WARM_UP + self.iterations

    def preferences(self) -> list[dict[str, str]]:
        """Pairs for all steps: prompts, and completions that the end token makes `new_tokens` long."""
        count = self.pairs * self.length
        sides = (speed_task.make_texts(count, self.new_tokens - 1, seed) for seed in (1, 2))
        prompts = speed_task.make_texts(count, speed_task.PROMPT_TOKENS)
        return [{"prompt": p, "chosen": f" {a}", "rejected": f" {b}"} for p, a, b in zip(prompts, *sides, strict=True)]


# -- textgym ------------------------------------------------------------------------------------------------------------


def make_policy(run: Run) -> CausalLMPolicy:
    return CausalLMPolicy.from_pretrained(run.folder, device=run.device)


def make_envs(run: Run) -> Any:
    return speed_task.make_envs(run.completions, run.new_tokens)


def online(run: Run, name: str) -> float:
    """Completions per second of an agent with an environment."""
    options: dict[str, Any] = {"n_epochs": 1} | ({} if name == "PPO" else {"num_generations": GENERATIONS})
    agent = AGENTS[name](make_policy(run), make_envs(run), LEARNING_RATE, beta=BETA, max_grad_norm=MAX_GRAD_NORM, seed=0, **options)
    clock = speed_task.IterationClock(run.device)
    agent.learn(run.length * run.completions * run.new_tokens, callback=clock, log_interval=NEVER)
    return run.completions / clock.seconds(speed_task.WARM_UP)


def dpo(run: Run, packing: bool) -> float:
    """Pairs per second of DPO."""
    agent = DPO(
        make_policy(run), run.preferences(), LEARNING_RATE,
        beta=BETA, batch_size=run.pairs, max_grad_norm=MAX_GRAD_NORM, packing=packing, seed=0,
    )  # fmt: skip
    clock = speed_task.IterationClock(run.device)
    agent.learn(callback=clock, log_interval=NEVER)
    return run.pairs / clock.seconds(speed_task.WARM_UP)


# -- stock Stable-Baselines3 --------------------------------------------------------------------------------------------


class LastHidden(BaseFeaturesExtractor):
    """The trunk's output at the last token of each row, as the features of an observation."""

    def __init__(self, observation_space: gym.spaces.Dict, model: transformers.GPT2LMHeadModel) -> None:
        super().__init__(observation_space, model.config.n_embd)
        self.model = model

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        """Runs the prefixes, without the columns that no row uses."""
        mask = observations["attention_mask"].long()
        width = int(mask.any(0).nonzero().max()) + 1
        ids, mask = observations["input_ids"].long()[:, :width], mask[:, :width]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = self.model.transformer(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(ids), device=ids.device), positions.argmax(1)]


class LanguageModelPolicy(MultiInputActorCriticPolicy):
    """SB3's actor-critic policy with a language model in it: its head is the actor's, a linear layer beside it the critic's."""

    def __init__(self, *arguments: Any, model: transformers.GPT2LMHeadModel, **options: Any) -> None:
        options |= {"net_arch": [], "ortho_init": False, "features_extractor_class": LastHidden}
        super().__init__(*arguments, features_extractor_kwargs={"model": model}, **options)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = self.features_extractor.model.lm_head
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


def stock_ppo(run: Run, shaped: bool) -> float:
    """Completions per second of Stable-Baselines3's own PPO."""
    envs = KLShaping(make_envs(run), beta=BETA) if shaped else make_envs(run)
    agent = stable_baselines3.PPO(
        LanguageModelPolicy, as_sb3_vec_env(envs), LEARNING_RATE,
        n_steps=run.new_tokens, batch_size=min(STOCK_MINIBATCH, run.completions * run.new_tokens), n_epochs=1,
        gamma=1.0, normalize_advantage=False, max_grad_norm=MAX_GRAD_NORM, seed=0, device=run.device,
        policy_kwargs={"model": transformers.GPT2LMHeadModel.from_pretrained(run.folder)},
    )  # fmt: skip
    if shaped:
        envs.set_policy(ActorCriticAdapter(agent.policy))
        envs.set_reference(ActorCriticAdapter(agent.policy).frozen_copy())
    clock = speed_task.IterationClock(run.device)
    iterations = STOCK_WARM_UP + min(run.iterations, STOCK_ITERATIONS)
    agent.learn(iterations * run.completions * run.new_tokens, callback=clock, log_interval=NEVER)
    return run.completions / clock.seconds(STOCK_WARM_UP)


# -- TRL ----------------------------------------------------------------------------------------------------------------


def trl_settings(run: Run) -> dict[str, Any]:
    """Returns what TRL's three trainers have in common: no work besides the training, and float32."""
    return {
        "output_dir": str(run.folder / "trl"),
        "max_steps": run.length,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "beta": BETA,
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 1,
        "bf16": False,
        "fp16": False,
        "use_cpu": run.device.type == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "model_init_kwargs": {"dtype": "float32"},
    }


def timed(run: Run, make: Callable[..., Any], **arguments: Any) -> float:
    """Trains with one of TRL's trainers and returns the median seconds of a step, generation included."""
    clock = speed_task.IterationClock(run.device)

    class Ticks(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    trainer = make(model=str(run.folder), processing_class=speed_task.make_tokenizer(), callbacks=[Ticks()], **arguments)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock.seconds(speed_task.WARM_UP)


def trl_online(run: Run, name: str, cache: str | None) -> float:
    """Completions per second of TRL's RLOO or GRPO."""
    import datasets
    import trl

    config, trainer = {"RLOO": (trl.RLOOConfig, trl.RLOOTrainer), "GRPO": (trl.GRPOConfig, trl.GRPOTrainer)}[name]
    settings = config(
        **trl_settings(run),
        per_device_train_batch_size=run.completions,
        steps_per_generation=1,
        num_iterations=1,
        num_generations=GENERATIONS,
        max_completion_length=run.new_tokens,
        cache_implementation=cache,
    )
    prompts = speed_task.make_texts(speed_task.NUM_PROMPTS, speed_task.PROMPT_TOKENS)
    data = datasets.Dataset.from_list([{"prompt": text} for text in prompts])
    return run.completions / timed(run, trainer, args=settings, train_dataset=data, reward_funcs=speed_task.reward)


def trl_dpo(run: Run, once: bool) -> float:
    """Pairs per second of TRL's DPO; `once`: with the reference scored before training."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    settings = trl.DPOConfig(**trl_settings(run), per_device_train_batch_size=run.pairs, precompute_ref_log_probs=once)
    return run.pairs / timed(run, trl.DPOTrainer, args=settings, train_dataset=datasets.Dataset.from_list(run.preferences()))


# -- all of them --------------------------------------------------------------------------------------------------------


def candidates() -> dict[str, Callable[[Run], float]]:
    """Returns a function per candidate, which trains for some iterations and returns completions or pairs per second."""
    ours: dict[str, Callable[[Run], float]] = {name: partial(online, name=name) for name in AGENTS}
    ours |= {"DPO": partial(dpo, packing=False), "DPO, packed": partial(dpo, packing=True)}
    stock = {"stock PPO": partial(stock_ppo, shaped=True), "stock PPO, no KL term": partial(stock_ppo, shaped=False)}
    theirs: dict[str, Callable[[Run], float]] = {}
    for name in ("RLOO", "GRPO"):
        theirs[f"TRL {name}"] = partial(trl_online, name=name, cache=None)
        theirs[f"TRL {name}, static cache"] = partial(trl_online, name=name, cache="static")
    theirs |= {"TRL DPO": partial(trl_dpo, once=False), "TRL DPO, reference once": partial(trl_dpo, once=True)}
    return ours | theirs | stock


def ratios(rates: dict[str, float], device: torch.device) -> dict[str, dict[str, float]]:
    """Returns each ratio of which both sides were measured, and what it should be."""
    found = {}
    for name, (ours, theirs, on_cpu, on_gpu) in RATIOS.items():
        others = [rates[other] for other in theirs if other in rates]
        if ours in rates and others:
            found[name] = {"ratio": rates[ours] / max(others), "wanted": on_cpu if device.type == "cpu" else on_gpu}
    return found


def parser() -> argparse.ArgumentParser:
    result = common.parser(__doc__, device="cpu", repeats=5)
    result.add_argument("--iterations", type=int, default=10, help="iterations of a round whose median counts; default: 10")
    result.add_argument("--threads", type=int, default=None, help="torch's threads")
    result.add_argument("--only", nargs="+", default=None, metavar="NAME", choices=list(candidates()), help="measure these candidates only")
    result.add_argument("--completions", type=int, default=64, help="of an iteration, a multiple of 4; default: 64")
    result.add_argument("--pairs", type=int, default=32, help="of a step of DPO; default: 32")
    result.add_argument("--new-tokens", type=int, default=32, help="of a completion, 2 to 48; default: 32")
    return result


def main() -> None:
    """Measures, prints the tables and writes the JSON file."""
    options = parser().parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"  # TRL asks it
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries that are measured
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    chosen = {name: measure for name, measure in candidates().items() if options.only is None or name in options.only}
    if not HAS_TRL:
        print(WITHOUT_TRL)
        chosen = {name: measure for name, measure in chosen.items() if not name.startswith("TRL")}
    with tempfile.TemporaryDirectory() as folder:
        speed_task.make_model().save_pretrained(folder)
        speed_task.make_tokenizer().save_pretrained(folder)
        run = Run(device, options.completions, options.pairs, options.new_tokens, options.iterations, Path(folder))
        slow = {name for name in chosen if name.startswith("stock")}
        rates = common.alternate({name: partial(measure, run) for name, measure in chosen.items()}, options.repeats, once=slow)
    print(f"{'':28}{'per second':>12}{'ms an iteration':>18}")
    for name, rate in rates.items():
        amount = run.pairs if "DPO" in name else run.completions
        print(f"{name:28}{rate:12,.1f}{1000 * amount / rate:18,.1f}")
    compared = ratios(rates, device)
    print(f"\n{'':28}{'ratio':>8}{'at least':>10}")
    for name, values in compared.items():
        print(f"{name:28}{values['ratio']:8.2f}{values['wanted']:10.1f}")
    sizes = {"completions": run.completions, "pairs": run.pairs, "new_tokens": run.new_tokens, "prompt_tokens": speed_task.PROMPT_TOKENS}
    sizes |= {"iterations": run.iterations, "repeats": options.repeats, "num_generations": GENERATIONS, "vocab_size": speed_task.VOCAB_SIZE}
    common.write(options.out, {"setting": setting(device) | sizes, "per second": rates, "ratios": compared})


def setting(device: torch.device) -> dict[str, Any]:
    """Returns what a figure depends on besides the sizes."""
    names = ["stable_baselines3", "datasets", "trl"] if HAS_TRL else ["stable_baselines3"]
    return common.setting(device) | {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    main()
