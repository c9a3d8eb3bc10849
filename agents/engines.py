"""Engines that sample completions for a policy: the built-in decode loop, transformers' `generate`, or one of your own.

An engine has to give ids alone: `scored_generation` makes the log-probs and kept sets from them with the policy itself, so that they are
right whatever the engine's own arithmetic.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from textgym.agents.common.backbone import without_peft
from textgym.agents.common.decode_loop import decode, fixed_mask
from textgym.agents.common.generation import DecodeOptions, Generation
from textgym.agents.common.layout import lay_out
from textgym.agents.common.sampling import draw, kept_tokens, pack_kept, scale_logits
from textgym.agents.common.scoring import score_completions

if TYPE_CHECKING:
    from textgym.agents.policy import CausalLMPolicy

HOW_NOT_WHAT = ("cache_config", "cache_implementation", "compile_config", "disable_compile", "prefill_chunk_size", "use_cache")


class GenerationEngine(Protocol):
    """Samples completions for a policy.

    The contract:

    - Rows are prompt-major, `options.num_generations` per prompt. A row's ids end with the first of `options.eos_token_ids`, included,
      or at `options.max_new_tokens`; `lengths` counts them.
    - Draws are from the policy's distribution under `options`: logits over the first `policy.vocab_size` outputs, temperature, legal
      tokens, top-k, top-p, min-p. `log_probs` are those of the sampled tokens under exactly that distribution in float32, and `kept`
      holds its kept sets where something is left out of it.
    - Everything is on the policy's device.
    - The same state of `generator` gives the same completions; torch's global generators are left as they were.
    - Weights are read from `policy` at each call, since they change between calls. One engine may serve several policies.
    - What an engine cannot do it refuses with a `ValueError` that names the option.
    """

    def generate(
        self,
        policy: "CausalLMPolicy",
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        options: DecodeOptions,
        generator: torch.Generator,
    ) -> Generation:
        """Samples completions.

        Args:
            policy: whose model, distribution and texts are meant.
            prompt_ids: (B, P) int64, left-padded, on the policy's device.
            prompt_lengths: (B,) int64, at least 1.
            options: see `DecodeOptions`; its `sampling` stands in for the policy's.
            generator: the only source of randomness.

        Returns:
            B * `num_generations` rows.
        """
        ...


class CachedEngine:
    """The built-in decode loop, which does all that `DecodeOptions` has."""

    def generate(
        self,
        policy: "CausalLMPolicy",
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        options: DecodeOptions,
        generator: torch.Generator,
    ) -> Generation:
        """See `GenerationEngine`."""
        return decode(policy.backbone, prompt_ids, prompt_lengths, options, generator, policy.decode_texts)


class TransformersEngine:
    """The model's own `generate`, with the caches and the compilation that it has.

    It runs the model. Each token is chosen by the policy's rules from random numbers of `generator`, one per row and step as in the
    built-in loop, so that ties at top-k, extra outputs of the model and the end tokens mean the same, and completions differ from the
    built-in loop's only where rounding moves a draw across a boundary. Nothing of the model's `generation_config` is used. Log-probs
    and kept sets come from a further pass, `scored_generation`.

    Args:
        **generate_settings: of transformers' `GenerationConfig`, those that say how to run and not what to draw:
            `cache_implementation` ("static" compiles the decode steps on a GPU), `cache_config`, `compile_config`, `disable_compile`,
            `prefill_chunk_size`, `use_cache`.

    Raises:
        ValueError: for other settings; by `generate`, for `epsilon`, stop strings and an `ActionMasker` (`policy.mask` too).
    """

    def __init__(self, **generate_settings: Any) -> None:
        unknown = sorted(set(generate_settings) - set(HOW_NOT_WHAT))
        if unknown:
            raise ValueError(
                f"`generate_settings` must be among {', '.join(HOW_NOT_WHAT)}, got {', '.join(unknown)}. "
                "What is drawn is said by the policy and by the arguments of `policy.generate`."
            )
        self.generate_settings = generate_settings
        self._compiled: dict[nn.Module, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out compiled models, which no other process can use."""
        return {**self.__dict__, "_compiled": {}}

    @torch.no_grad()
    def generate(
        self,
        policy: "CausalLMPolicy",
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        options: DecodeOptions,
        generator: torch.Generator,
    ) -> Generation:
        """See `GenerationEngine`."""
        if options.stop_strings:
            raise ValueError(f"`stop_strings` must be empty with `TransformersEngine`, got {options.stop_strings}. Use `CachedEngine`.")
        _refuse_unscorable(options)
        repeats, steps = options.num_generations, options.max_new_tokens
        rows = len(prompt_ids) * repeats
        uniforms = torch.rand((steps, rows), generator=generator, device=generator.device, dtype=torch.float64).to(policy.device)
        legal = _legal_tokens(policy, prompt_ids, options)
        longest = int(prompt_lengths.max())
        policy.backbone.check_length(longest + steps, "Generation")
        prompts = prompt_ids[:, -longest:].repeat_interleave(repeats, 0)
        visible = torch.arange(longest, 0, -1, device=prompts.device) <= prompt_lengths.repeat_interleave(repeats).unsqueeze(1)
        ids = torch.full((rows, steps), options.fill_token_id, dtype=torch.int64, device=prompts.device)
        size = options.max_batch_size or rows
        for piece in (slice(start, start + size) for start in range(0, rows, size)):
            early, late = (None if tokens is None else tokens[piece] for tokens in legal)
            choice = _Choice(policy.vocab_size, longest, options, uniforms[:, piece], early, late)
            drawn = self._run(policy, prompts[piece], visible[piece], options, choice)[:, longest:]
            ids[piece, : drawn.shape[1]] = drawn
        return scored_generation(policy, prompt_ids, prompt_lengths, ids, lengths_to_eos(ids, options.eos_token_ids), options)

    def _run(self, policy: "CausalLMPolicy", prompts: Tensor, visible: Tensor, options: DecodeOptions, choice: LogitsProcessor) -> Tensor:
        """Returns prompts (rows, P) with their completions, (rows, at most P + T) int64."""
        policy.backbone.without_dropout()
        config = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=False,  # `choice` has drawn
            eos_token_id=list(options.eos_token_ids) or None,
            pad_token_id=options.fill_token_id,
            **self.generate_settings,
        )
        model: Any = without_peft(policy.model)
        own = model.generation_config
        # transformers leaves its compiled call on the model, where a copy of the model would share it and run the weights of this one.
        if model in self._compiled:
            model._compiled_call = self._compiled[model]
        # transformers takes from there whatever is None in the configuration it is given.
        model.generation_config = GenerationConfig()
        try:
            with policy.backbone.running():
                whole: Tensor = model.generate(
                    input_ids=prompts,
                    attention_mask=visible.long(),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([choice]),
                )
        finally:
            model.generation_config = own
            compiled = model.__dict__.pop("_compiled_call", None)
            if compiled is not None:
                self._compiled[model] = compiled
        return whole


class _Choice(LogitsProcessor):
    """Draws the next token of every row and leaves nothing else for `generate` to take.

    Args:
        vocab_size: V; the model may have more outputs.
        width: of the prompts, P.
        options: temperature, truncation, `greedy` and `min_new_tokens` are read.
        uniforms: (T, rows) float64.
        early: tokens that are legal before `min_new_tokens`, (rows, V) bool; None allows all.
        late: tokens that are legal afterwards.
    """

    def __init__(
        self, vocab_size: int, width: int, options: DecodeOptions, uniforms: Tensor, early: Tensor | None, late: Tensor | None
    ) -> None:
        self._vocab_size, self._width, self._options, self._uniforms = vocab_size, width, options, uniforms
        self._early, self._late = early, late

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Turns logits (rows, outputs) into 0 for the token drawn and -inf for the others."""
        step, sampling = input_ids.shape[1] - self._width, self._options.sampling
        logits = scale_logits(scores[:, : self._vocab_size], sampling.temperature)
        kept = kept_tokens(logits, sampling, self._early if step < self._options.min_new_tokens else self._late)
        if kept is not None:
            logits = logits.masked_fill(~kept, -torch.inf)
        tokens = logits.argmax(-1) if self._options.greedy else draw(logits, self._uniforms[step])[0]
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)


@torch.no_grad()
def scored_generation(
    policy: "CausalLMPolicy", prompt_ids: Tensor, prompt_lengths: Tensor, ids: Tensor, lengths: Tensor, options: DecodeOptions
) -> Generation:
    """Makes a `Generation` of sampled ids alone: log-probs and kept sets are the policy's, from one pass of scoring.

    A token outside the truncated set of the policy's own logits counts as kept, since an engine's rounding may put it on the other side of
    the edge. One that a mask or `min_new_tokens` forbids is an error.

    Args:
        policy: scores.
        prompt_ids: (B, P) int64, left-padded.
        prompt_lengths: (B,) int64.
        ids: (B * `num_generations`, at most T) int64, prompt-major, on any device; what stands from `lengths` on is not read.
        lengths: (B * `num_generations`,) int64, from 1 to T = `max_new_tokens`, the end token included.
        options: what was asked of the engine. `max_batch_size` rows are scored at a time.

    Raises:
        ValueError: `epsilon` or an `ActionMasker` was asked for; the ids break the contract of `GenerationEngine`; the model's logits are
            not finite.
    """
    _refuse_unscorable(options)
    device, repeats, steps = policy.device, options.num_generations, options.max_new_tokens
    prompt_ids, prompt_lengths, ids, lengths = (tensor.to(device) for tensor in (prompt_ids, prompt_lengths, ids, lengths))
    rows = len(prompt_ids) * repeats
    if ids.ndim != 2 or ids.shape[0] != rows or ids.shape[1] > steps or lengths.shape != (rows,):
        raise ValueError(
            f"`ids` must be (B * num_generations, at most max_new_tokens) = ({rows}, <= {steps}) with `lengths` ({rows},), "
            f"got {tuple(ids.shape)} and {tuple(lengths.shape)}."
        )
    ids = torch.nn.functional.pad(ids, (0, steps - ids.shape[1]), value=options.fill_token_id)
    ids = ids.masked_fill(torch.arange(steps, device=device) >= lengths.unsqueeze(1), options.fill_token_id)
    if int(ids.min()) < 0 or int(ids.max()) >= policy.vocab_size:
        raise ValueError(f"`ids` must be from 0 to V - 1 = {policy.vocab_size - 1}, got {int(ids.min())} to {int(ids.max())}.")
    result = Generation(
        ids=ids,
        lengths=lengths,
        log_probs=torch.zeros(ids.shape, dtype=torch.float32, device=device),
        prompt_ids=prompt_ids.repeat_interleave(repeats, 0),
        prompt_lengths=prompt_lengths.repeat_interleave(repeats),
        kept=None,
        stopped=torch.zeros(rows, dtype=torch.bool, device=device),
        eos_token_ids=options.eos_token_ids,
        decode=policy.decode_texts,
    )
    if options.stop_strings:
        found = [any(stop in text for stop in options.stop_strings) for text in result.texts]
        result.stopped = torch.tensor(found, device=device)
    _check_ends(result, options)
    _score(policy, result, _legal_tokens(policy, prompt_ids, options), options)
    return result


def lengths_to_eos(ids: Tensor, eos_token_ids: tuple[int, ...]) -> Tensor:
    """Returns how many tokens of each row (B, T) count: up to the first of `eos_token_ids`, included, else T; (B,) int64."""
    is_eos = torch.isin(ids, torch.tensor(eos_token_ids, dtype=torch.int64, device=ids.device))
    before = (is_eos.cumsum(1) == 0).sum(1)
    return (before + 1).clamp(max=ids.shape[1])


def _refuse_unscorable(options: DecodeOptions) -> None:
    """What the ids alone, scored afterwards, do not say."""
    if options.epsilon is not None:
        raise ValueError(f"`epsilon` must be None with this engine, got {options.epsilon}. Use `CachedEngine` for ε-greedy draws.")
    if options.action_mask is not None and not isinstance(options.action_mask, Tensor):
        raise ValueError(
            "`action_mask` (or `policy.mask`) must be None or a fixed mask, (V,) or (B, V), with this engine, got "
            f"{type(options.action_mask).__name__}, which follows the rows. Use `CachedEngine`."
        )


def _legal_tokens(policy: "CausalLMPolicy", prompt_ids: Tensor, options: DecodeOptions) -> tuple[Tensor | None, Tensor | None]:
    """Returns the tokens that are legal before `min_new_tokens` and afterwards, each (B * `num_generations`, V) bool or None for all."""
    mask = fixed_mask(options.action_mask, prompt_ids, policy.vocab_size)
    rows = len(prompt_ids) * options.num_generations
    late = mask
    if mask is not None:
        late = mask.expand(rows, -1) if mask.ndim == 1 else mask.repeat_interleave(options.num_generations, 0)
    early = late
    if options.min_new_tokens:
        early = torch.ones((rows, policy.vocab_size), dtype=torch.bool, device=prompt_ids.device) if late is None else late.clone()
        early[:, list(options.eos_token_ids)] = False
    late_counts = options.min_new_tokens < options.max_new_tokens
    for tokens in (early, late if late_counts else None):
        if tokens is not None and not bool(tokens.any(-1).all()):
            raise ValueError("`action_mask` (with `min_new_tokens` and EOS taken out) left a row without any legal token.")
    return early, late


def _check_ends(result: Generation, options: DecodeOptions) -> None:
    """Raises if a row goes on behind an end token, or ends for no reason that the options have."""
    steps = result.ids.shape[1]
    counts = bool(((result.lengths >= 1) & (result.lengths <= steps)).all())
    to_eos = lengths_to_eos(result.ids.masked_fill(~result.completion_mask, -1), options.eos_token_ids)
    short = (result.lengths < to_eos) & ~result.stopped
    if not counts or bool((result.lengths > to_eos).any() | short.any()):
        raise ValueError(
            f"`lengths` must be from 1 to {steps} and reach to the first end token, a stop string, or `max_new_tokens`, "
            f"got {result.lengths.tolist()[:16]} where rows end at {to_eos.tolist()[:16]}. The engine cut rows short or went on behind EOS."
        )


def _score(policy: "CausalLMPolicy", result: Generation, legal: tuple[Tensor | None, Tensor | None], options: DecodeOptions) -> None:
    """Fills in `log_probs` and `kept`."""
    rows, steps = result.ids.shape
    early, late = legal
    kept = []
    size = options.max_batch_size or rows
    for piece in (slice(start, start + size) for start in range(0, rows, size)):
        layout = lay_out(result.prompt_ids[piece], result.prompt_lengths[piece], result.ids[piece], result.lengths[piece])
        allowed = None
        if early is not None:
            first = pack_kept(early[piece])
            rest = torch.full_like(first, 255) if late is None else pack_kept(late[piece])
            is_early = torch.arange(steps, device=first.device) < options.min_new_tokens
            allowed = torch.where(is_early[:, None], first.unsqueeze(1), rest.unsqueeze(1))[layout.mask]
            byte = allowed.gather(1, (layout.targets // 8).unsqueeze(1)).squeeze(1)
            if not bool(((byte >> (layout.targets % 8).to(torch.uint8)) & 1).all()):
                raise ValueError("`ids` must be legal under `action_mask` and `min_new_tokens`, got tokens that they forbid.")
        scores = score_completions(policy.backbone, layout, options.sampling, legal=allowed, return_kept=True)
        result.log_probs[piece] = scores.log_probs
        if scores.kept is not None:
            kept.append(scores.kept)
    result.kept = torch.cat(kept) if kept else None
    if not bool(result.log_probs.isfinite().all()):
        raise ValueError("`model` gave logits that are not finite (NaN or infinite): its weights are broken, or training diverged.")
