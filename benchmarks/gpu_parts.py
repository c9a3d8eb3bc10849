"""The parts of `gpu.py`: what is checked and what is measured on one device. Each part is a function of its own that builds all it needs.

A part returns figures by name. A figure with a limit is a check: it fails where the value is above the limit, or is no number.
"""

import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import floors
import gymnasium as gym
import speed_task
import torch
import training_speed
import transformers
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn
from transformers import (
    CompileConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from textgym.agents import (
    DPO,
    DQN,
    GRPO,
    KTO,
    NLPO,
    PPO,
    REBEL,
    REINFORCE,
    RLOO,
    SFT,
    CausalLMPolicy,
    RewardModel,
    RewardModelTrainer,
)
from textgym.agents.common import captured_step

# Nats per token. In float32 it is the numerical law of docs/policy.md. In bfloat16 each way rounds its products to 8 bits in another order:
# the largest of some thousand tokens was .044 on a CPU for these models, the mean .007; a wrong position or mask is off by nats.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
MEAN_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
# Of a ratio from 1, and of a log-ratio from 0: both sides come from the training pass, so that half precision may not add much.
SAME_PASS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


class Figure(NamedTuple):
    """One number of a part.

    Attributes:
        value: the number; for a check, how far it is from right.
        limit: the largest value that is right; None for a measurement.
    """

    value: float
    limit: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether it is a measurement, or within its limit; what is no number is not."""
        return self.limit is None or self.value <= self.limit


Figures = dict[str, Figure]


@dataclass(frozen=True)
class Sizes:
    """How large the parts are.

    Attributes:
        shapes: models that are timed, by name.
        batches: completions at a time.
        prompt_tokens: of the prompts of timed calls.
        new_tokens: of their completions.
        repeats: measured rounds.
        completions: of a timed training iteration.
        iterations: of a round of training.
    """

    shapes: tuple[str, ...]
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    repeats: int
    completions: int
    iterations: int


FULL = Sizes(("1.1M", "135M", "0.5B"), (64, 512), 128, 128, 3, 64, 6)
SMALL = Sizes(("tiny",), (4,), 8, 8, 1, 8, 1)


class Task(NamedTuple):
    """What a part is told.

    Attributes:
        device: where it runs.
        sizes: how large it is.
    """

    device: torch.device
    sizes: Sizes


# -- models -------------------------------------------------------------------------------------------------------------


def timed_model(shape: str) -> PreTrainedModel:
    """Returns a random model in the shape of a real one: SmolLM2-135M, Qwen2-0.5B, or the small ones of the other benchmarks."""
    torch.manual_seed(0)
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if shape == "1.1M":
        return speed_task.make_model()
    if shape == "135M":
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True, dtype="bfloat16", **sizes, **ends)
        )
    if shape == "0.5B":
        sizes = {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        }
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=151936, tie_word_embeddings=True, dtype="bfloat16", **sizes, **ends))
    return checked_model("llama", 512)


def checked_model(kind: str, vocab_size: int = 600) -> PreTrainedModel:
    """Returns a small model whose random weights are large enough that a wrong position or mask shows: some nats per token."""
    torch.manual_seed(0)
    ends: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None}
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512}
    gated = {"intermediate_size": 128, "num_key_value_heads": 2}
    model: PreTrainedModel
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=512, **ends))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, **gated, **ends))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, **gated, **ends))
    else:
        model = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=128, word_embed_proj_dim=64, pad_token_id=1, **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()


def policy_of(model: PreTrainedModel, device: torch.device, **settings: Any) -> CausalLMPolicy:
    return CausalLMPolicy(model, floors.make_tokenizer(model.config.vocab_size), device=device, seed=0, **settings)


def random_prompts(vocab_size: int, rows: int, shortest: int, longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns left-padded ids and lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(floors.FIRST_WORD, vocab_size, (rows, longest), generator=generator)
    lengths = torch.randint(shortest, longest + 1, (rows,), generator=generator)
    return ids.to(device), lengths.to(device)


# -- checks -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_distribution(task: Task, dtype: torch.dtype) -> Figures:
    """Log-probs of sampled tokens: as generated, as scored, and by transformers' plain forward of each row without padding."""
    figures: Figures = {}
    for kind in ("gpt2", "llama", "qwen2", "opt"):
        model = checked_model(kind).to(dtype)
        policy = policy_of(model, task.device)
        prompts = random_prompts(policy.vocab_size, 6, 3, 40, task.device)
        found = policy.generate_ids(*prompts, 24, num_generations=3, eos_token_ids=tuple(range(0, 600, 20)))
        scored = policy.score(found.prompt_ids, found.prompt_lengths, found.ids, found.lengths).log_probs
        plain = torch.zeros_like(scored)
        for row, (prompt, ids) in enumerate(zip(found.prompt_id_lists, found.completion_ids, strict=True)):
            logits = model(torch.tensor([[*prompt, *ids]], device=task.device)).logits[0, len(prompt) - 1 : -1]
            log_probs = logits.float().log_softmax(-1).gather(1, torch.tensor(ids, device=task.device).unsqueeze(1))
            plain[row, : len(ids)] = log_probs.squeeze(1)
        counts = plain != 0
        for name, one in (("generated", found.log_probs), ("scored", scored)):
            off = (one - plain).abs()[counts]
            figures[f"{kind}: {name} against transformers, largest"] = Figure(float(off.max()), TOLERANCE[dtype])
            figures[f"{kind}: {name} against transformers, mean"] = Figure(float(off.mean()), MEAN_TOLERANCE[dtype])
    return figures


def graphs(task: Task, dtype: torch.dtype) -> Figures:
    """Captured decode steps beside the same steps one kernel at a time: completions with ends on the way, places filled again."""
    figures: Figures = {}
    for kind in ("gpt2", "llama", "qwen2"):
        policy = policy_of(checked_model(kind).to(dtype), task.device)
        prompts = random_prompts(policy.vocab_size, 16, 3, 60, task.device)
        sample = partial(policy.generate_ids, *prompts, 100, num_generations=4, eos_token_ids=tuple(range(0, 600, 30)))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rows = (None, 24, None, 24)  # at a time; from the third call on nothing is captured any more
            found = [sample(max_batch_size=size, generator=seeded(task.device)) for size in rows]
        capture = captured_step.CAPTURES.pop(task.device.type)
        try:
            expected = sample(generator=seeded(task.device))
        finally:
            captured_step.CAPTURES[task.device.type] = capture
        figures[f"{kind}: warnings"] = Figure(float(len(said)), 0)
        figures[f"{kind}: buffers that were not kept"] = Figure(float(not policy.backbone.kept_rows), 0)
        for name, one in zip(("captured", "captured, refilled", "replayed", "replayed, refilled"), found, strict=True):
            same = (one.ids == expected.ids).all(1)
            # Rounding may move a draw across a boundary, and from there on the completion is another.
            figures[f"{kind}: rows that differ, {name}"] = Figure(float((~same).sum()), 0 if dtype == torch.float32 else len(same) / 4)
            off = (one.log_probs - expected.log_probs).abs()[same]
            figures[f"{kind}: log-probs, {name}"] = Figure(float(off.max()), TOLERANCE[dtype])
    return figures


def seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


class FirstRollout(BaseCallback):
    """Keeps the first rollout, and what the policy says of it before any step."""

    def __init__(self) -> None:
        super().__init__()
        self.log_ratios: Tensor | None = None
        self.kl: Tensor | None = None

    def _on_rollout_end(self) -> None:
        if self.log_ratios is None:
            rollout, policy = self.locals["rollout"], self.model.policy
            with torch.no_grad():
                scores = policy.score(
                    rollout.prompt_ids, rollout.prompt_lengths, rollout.completion_ids, rollout.lengths, keep=rollout.kept
                )
            self.log_ratios = (scores.log_probs - rollout.log_probs)[rollout.completion_mask]
            self.kl = rollout.kl_per_sequence

    def _on_step(self) -> bool:
        return True


def before_the_first_step(task: Task, dtype: torch.dtype) -> Figures:
    """PPO's ratio is 1 and the KL to the reference is 0 before anything has been learnt, also under temperature and top-p."""
    figures: Figures = {}
    for name, sampling in (("plain", {}), ("temperature .7, top-p .9", {"temperature": 0.7, "top_p": 0.9})):
        policy = policy_of(checked_model("llama", speed_task.VOCAB_SIZE).to(dtype), task.device, **sampling)
        policy.tokenizer = speed_task.make_tokenizer()
        first = FirstRollout()
        PPO(policy, speed_task.make_envs(16, 16), beta=0.05, seed=0, device=task.device).learn(16, callback=first)
        assert first.log_ratios is not None and first.kl is not None, "one rollout was sampled"
        figures[f"{name}: ratio of one token, from 1"] = Figure(float(first.log_ratios.exp().sub(1).abs().max()), SAME_PASS[dtype])
        figures[f"{name}: KL of a sequence"] = Figure(float(first.kl.abs().max()), 16 * SAME_PASS[dtype])
    return figures


def resuming(task: Task) -> Figures:
    """A run that is saved and loaded half-way ends with the weights of one that was not."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    steps = 8 * 8

    def fresh() -> PPO:
        policy = policy_of(checked_model("gpt2", speed_task.VOCAB_SIZE), task.device)
        policy.tokenizer = speed_task.make_tokenizer()
        return PPO(policy, speed_task.make_envs(8, 8), 1e-3, n_epochs=2, batch_size=4, seed=0, device=task.device)

    whole = [fresh().learn(4 * steps) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        fresh().learn(2 * steps).save(folder)
        resumed = PPO.load(folder, env=speed_task.make_envs(8, 8), device=task.device)
    resumed.learn(2 * steps, reset_num_timesteps=False)
    torch.use_deterministic_algorithms(False)
    return {
        "the same run again": Figure(largest_difference(whole[0].policy, whole[1].policy), 0),
        "the resumed run": Figure(largest_difference(whole[0].policy, resumed.policy), 0),
    }


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def every_agent(task: Task) -> Figures:
    """Three iterations of every learner: its weights have moved and are numbers."""
    tokenizer = speed_task.make_tokenizer()
    texts = speed_task.make_texts(12, 6)
    pairs = [{"prompt": a, "chosen": f" {b}", "rejected": f" {c}"} for a, b, c in zip(texts[:4], texts[4:8], texts[8:], strict=True)]
    labels = [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": place % 2 == 0} for place, pair in enumerate(pairs)]
    examples = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    groups: dict[str, Any] = {"num_generations": 4}
    online: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "REINFORCE": (REINFORCE, {}), "PPO": (PPO, {}), "NLPO": (NLPO, {}), "RLOO": (RLOO, groups), "GRPO": (GRPO, groups),
        "REBEL": (REBEL, {"num_generations": 2}), "DQN, soft": (DQN, {"beta": 0.5}), "DQN, hard": (DQN, {}),
    }  # fmt: skip
    offline: dict[str, Callable[[CausalLMPolicy], Any]] = {
        "SFT": lambda policy: SFT(policy, examples, 1e-3, batch_size=2, seed=0),
        "DPO": lambda policy: DPO(policy, pairs, 1e-3, batch_size=2, seed=0),
        "KTO": lambda policy: KTO(policy, labels, 1e-3, batch_size=2, seed=0),
        "reward model": lambda policy: RewardModelTrainer(RewardModel.from_policy(policy), pairs, 1e-3, batch_size=2, seed=0),
    }

    def policy() -> CausalLMPolicy:
        return CausalLMPolicy(checked_model("gpt2", speed_task.VOCAB_SIZE), tokenizer, device=task.device, seed=0)

    figures: Figures = {}
    for name, (kind, options) in online.items():
        agent = kind(policy(), speed_task.make_envs(8, 8), 1e-3, seed=0, device=task.device, **options)
        figures[name] = stuck_or_broken(agent, lambda agent: agent.learn(3 * 64))
    for name, make in offline.items():
        figures[name] = stuck_or_broken(make(policy()), lambda agent: agent.learn())
    return figures


def stuck_or_broken(agent: Any, learn: Callable[[Any], object]) -> Figure:
    """Returns 0 where training has changed the weights and left them finite, else 1."""
    model: nn.Module = getattr(agent, "policy", None) or agent.model
    before = copy.deepcopy(model.state_dict())
    learn(agent)
    after = model.state_dict()
    moved = any(not torch.equal(before[name], after[name]) for name in before)
    finite = all(bool(value.isfinite().all()) for value in after.values() if value.is_floating_point())
    return Figure(float(not (moved and finite)), 0)


# -- measurements -------------------------------------------------------------------------------------------------------


def sampling_speed(task: Task, shape: str) -> Figures:
    """Sampled tokens per second and peak memory, beside transformers' `generate` with its caches."""
    sizes, device = task.sizes, task.device
    model = timed_model(shape)
    positions = int(model.config.max_position_embeddings)
    policy = policy_of(model, device)
    new = min(sizes.new_tokens, positions // 2)
    figures: Figures = {}
    for rows in sizes.batches:
        prompts, lengths = random_prompts(policy.vocab_size, rows, 0, min(sizes.prompt_tokens, positions - new), device)
        lengths.fill_(prompts.shape[1])
        runs = {
            "textgym": partial(sample, policy, prompts, lengths, new),
            "transformers, growing cache": partial(generate, model, prompts, new, None, None),
            "transformers, static cache": partial(generate, model, prompts, new, "static", None),
        }
        if device.type == "cuda" and shape != "0.5B":  # whose compilation alone would take a minute
            for mode in ("default", "reduce-overhead"):
                runs[f"transformers, compiled ({mode})"] = partial(generate, model, prompts, new, "static", mode)
        for name, run in list(runs.items()):
            memory = peak_of(run, device)
            if memory is None:
                del runs[name]
            figures[f"{name}, {rows} rows, peak bytes"] = Figure(float("nan") if memory is None else memory)
        rates = common.alternate({name: common.per_second(run, device) for name, run in runs.items()}, sizes.repeats)
        figures |= {f"{name}, {rows} rows, tokens/s": Figure(rate) for name, rate in rates.items()}
        best = max((rate for name, rate in rates.items() if name != "textgym"), default=float("nan"))
        figures[f"{rows} rows, textgym / the best of the others"] = Figure(rates["textgym"] / best)
    return figures


def peak_of(run: Callable[[], float], device: torch.device) -> float | None:
    """Returns the memory that a run takes beyond what is there, in bytes; None where the run is not possible, after saying why."""
    before = common.reset_peak(device)
    try:
        run()
    except Exception as error:  # memory, or what a machine's compilers make of another package's code
        print(f"    left out: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None
    return common.peak(device) - before


def sample(policy: CausalLMPolicy, prompts: Tensor, lengths: Tensor, new: int) -> int:
    return int(policy.generate_ids(prompts, lengths, new, eos_token_ids=()).lengths.sum())


def generate(model: PreTrainedModel, prompts: Tensor, new: int, cache: str | None, mode: str | None) -> int:
    plain: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None, "pad_token_id": 0}
    compilation = None if mode is None else CompileConfig(mode=mode, dynamic=False)
    out = model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, cache_implementation=cache,
        compile_config=compilation, disable_compile=mode is None, **plain,
    )  # fmt: skip
    return out[:, prompts.shape[1] :].numel()


def training_beside_trl(task: Task) -> Figures:
    """Completions (DPO: pairs) per second of whole iterations of the 1.1 M model, beside TRL where it is installed."""
    names = ("RLOO", "GRPO", "PPO", "DPO", "TRL RLOO", "TRL GRPO", "TRL DPO, reference once")
    chosen = {name: measure for name, measure in training_speed.candidates().items() if name in names}
    if not training_speed.HAS_TRL:
        print(f"    {training_speed.WITHOUT_TRL}", flush=True)
        chosen = {name: measure for name, measure in chosen.items() if not name.startswith("TRL")}
    os.environ["TQDM_DISABLE"] = "1"
    sizes = task.sizes
    new = min(sizes.new_tokens, 32)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        speed_task.make_model().save_pretrained(folder)
        speed_task.make_tokenizer().save_pretrained(folder)
        run = training_speed.Run(task.device, sizes.completions, sizes.completions // 2, new, sizes.iterations, Path(folder))
        rates = {name: measure(run) for name, measure in chosen.items()}  # each leaves its own warm-up out
    figures = {f"{name}, per second": Figure(rate) for name, rate in rates.items()}
    ratios = training_speed.ratios(rates, task.device)
    return figures | {name: Figure(found["ratio"]) for name, found in ratios.items()}


def training_speed_of(task: Task, shape: str) -> Figures:
    """Tokens per second of whole iterations of RLOO in mixed precision, and their peak memory."""
    sizes, device = task.sizes, task.device
    model = timed_model(shape).float()
    tokenizer = floors.make_tokenizer(model.config.vocab_size)
    autocast = "bfloat16" if device.type == "cuda" else None
    policy = CausalLMPolicy(model, tokenizer, device=device, seed=0, autocast=autocast, eos_token_ids=[1])
    policy.eos_token_ids = (1,)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(floors.FIRST_WORD, model.config.vocab_size, (64, sizes.prompt_tokens), generator=generator).tolist()
    prompts = [" ".join(f"w{token}" for token in row) for row in words]
    envs = gym.make_vec(
        "textgym:TextGen-v0", num_envs=sizes.completions, prompts=prompts, tokenizer=tokenizer, reward=speed_task.reward,
        max_prompt_tokens=sizes.prompt_tokens, max_new_tokens=sizes.new_tokens,
    )  # fmt: skip
    agent = RLOO(policy, envs, 1e-6, num_generations=4, gradient_checkpointing=True, micro_batch_tokens=16384, seed=0, device=device)
    before = common.reset_peak(device)
    iteration = sizes.completions * sizes.new_tokens
    agent.learn(iteration)  # warms up
    start, tokens = time.perf_counter(), agent.num_timesteps
    agent.learn(max(1, sizes.iterations // 2) * iteration, reset_num_timesteps=False)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    rate = (agent.num_timesteps - tokens) / (time.perf_counter() - start)
    return {"RLOO, tokens/s of whole iterations": Figure(rate), "RLOO, peak bytes": Figure(common.peak(device) - before)}


# -- all of them --------------------------------------------------------------------------------------------------------


def parts(device: torch.device, sizes: Sizes) -> dict[str, tuple[Callable[[Task], Figures], float]]:
    """Returns every part by name, with the seconds that it may take at most; the checks first, the most telling first."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found: dict[str, tuple[Callable[[Task], Figures], float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        found[f"one distribution, {short}"] = partial(one_distribution, dtype=dtype), 60
        if device.type in captured_step.CAPTURES:
            found[f"graphs against eager steps, {short}"] = partial(graphs, dtype=dtype), 60
        found[f"ratio 1 and KL 0 before the first step, {short}"] = partial(before_the_first_step, dtype=dtype), 60
    found["resuming"] = resuming, 60
    found["every agent, three iterations"] = every_agent, 90
    for shape in sizes.shapes:
        found[f"sampling, {shape}"] = partial(sampling_speed, shape=shape), 120
    found["training beside TRL"] = training_beside_trl, 120
    for shape in sizes.shapes[1:] or sizes.shapes:
        found[f"training, {shape}"] = partial(training_speed_of, shape=shape), 90
    return found
