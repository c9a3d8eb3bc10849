"""The decode loop: sampling whole completions with a key-value cache, one model step per token.

Row for row and token for token the numbers that come out are those of `textgym.agents.common.scoring` on the same ids.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from textgym.agents.common.backbone import Backbone
from textgym.agents.common.cached_decoder import ActionMasker, CachedDecoder
from textgym.agents.common.sampling import (
    Sampling,
    draw,
    draw_epsilon_greedy,
    kept_tokens,
    pack_kept,
    packed_width,
    scale_logits,
    token_log_probs,
)
from textgym.tokenizers import Decode


@dataclass(eq=False)
class Generation:
    """Completions, one per row. Rows are prompt-major: row `i * num_generations + j` is completion `j` of prompt `i`.

    Attributes:
        ids: (B, T) int64, T = `max_new_tokens`; row i counts up to `lengths[i]` (EOS included), the rest is filler.
        lengths: (B,) int64, from 1 to T.
        log_probs: log-probs of `ids` under the distribution they were drawn from, in nats, zero on filler, (B, T) float32.
        prompt_ids: (B, P) int64, left-padded.
        prompt_lengths: (B,) int64.
        kept: the packed kept set of every draw (`sampling.unpack_kept` gives booleans), (B, T, ceil(V/8)) uint8; None when every token
            could be drawn at every step.
        stopped: the row ended because its text contains a stop string, (B,) bool.
        eos_token_ids: the ids that ended a row.
        decode: the ids of prompts and completions to texts, for `texts`.
    """

    ids: Tensor
    lengths: Tensor
    log_probs: Tensor
    prompt_ids: Tensor
    prompt_lengths: Tensor
    kept: Tensor | None
    stopped: Tensor
    eos_token_ids: tuple[int, ...]
    decode: Decode = field(repr=False)

    @cached_property
    def completion_ids(self) -> list[list[int]]:
        """The ids of each row without filler, EOS kept."""
        return [row[:length] for row, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    @cached_property
    def prompt_id_lists(self) -> list[list[int]]:
        """The ids of each row's prompt, without filler."""
        return _without_filler(self.prompt_ids, self.prompt_lengths)

    @cached_property
    def texts(self) -> list[str]:
        """The completions as text, as they read behind their prompts, without special tokens; decoded when first asked for."""
        return self.decode(self.prompt_id_lists, self.completion_ids)

    @property
    def completion_mask(self) -> Tensor:
        """True on the tokens that were drawn, (B, T) bool."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths.unsqueeze(1)

    @cached_property
    def finish_reasons(self) -> list[str]:
        """Why each row ended: "eos", "stop" (a stop string; the last token may be EOS as well) or "length"."""
        ends = [row[-1] in self.eos_token_ids for row in self.completion_ids]
        return ["stop" if stop else "eos" if eos else "length" for stop, eos in zip(self.stopped.tolist(), ends, strict=True)]


@dataclass(frozen=True)
class DecodeOptions:
    """What `decode` needs besides the prompts.

    Attributes:
        max_new_tokens: T.
        sampling: the distribution to draw from.
        num_generations: completions per prompt; the prompt is run once.
        greedy: take the most probable token instead of drawing; `log_probs` stay those of `sampling`.
        epsilon: draw ε-greedily over the legal tokens that `sampling` keeps; `log_probs` are those of that draw. None: do not.
        min_new_tokens: EOS is no legal token before that many.
        eos_token_ids: ids that end a row.
        fill_token_id: stands where a row has ended.
        stop_strings: a row ends with the token that makes its text contain one.
        action_mask: legal tokens, (V,) or (B, V) bool, or an `ActionMasker`.
    """

    max_new_tokens: int
    sampling: Sampling
    num_generations: int = 1
    greedy: bool = False
    epsilon: float | None = None
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    fill_token_id: int = 0
    stop_strings: tuple[str, ...] = ()
    action_mask: Tensor | ActionMasker | None = None


@torch.no_grad()
def decode(
    backbone: Backbone,
    prompt_ids: Tensor,
    prompt_lengths: Tensor,
    options: DecodeOptions,
    generator: torch.Generator,
    to_texts: Decode,
) -> Generation:
    """Samples completions. On an accelerator nothing in the loop waits for the device, unless stop strings are given.

    All random numbers are drawn before the first token, one per row and step, so a row's completion depends neither on which other
    rows have ended nor on how many steps were taken.

    Args:
        backbone: the model.
        prompt_ids: (B, P) int64, left-padded.
        prompt_lengths: (B,) int64, at least 1.
        options: see `DecodeOptions`.
        generator: the source of randomness, on any device.
        to_texts: the ids of prompts and completions to texts without special tokens.

    Returns:
        B * `num_generations` rows.
    """
    backbone.without_dropout()
    loop = _DecodeLoop(backbone, prompt_ids, prompt_lengths, options, generator, to_texts)
    loop.run()
    return loop.result()


class _DecodeLoop:
    """The state of one `decode` call."""

    def __init__(
        self,
        backbone: Backbone,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        options: DecodeOptions,
        generator: torch.Generator,
        to_texts: Decode,
    ) -> None:
        device = prompt_ids.device
        rows, steps = prompt_ids.shape[0] * options.num_generations, options.max_new_tokens
        self._options = options
        self._to_texts = to_texts
        self._vocab_size = backbone.vocab_size
        self._prompts = (prompt_ids, prompt_lengths)
        self._prompt_id_lists = _without_filler(prompt_ids, prompt_lengths) if options.stop_strings else []
        self._uniforms = torch.rand((steps, rows), generator=generator, device=generator.device, dtype=torch.float64).to(device)
        self._decoder = CachedDecoder(backbone, prompt_ids, prompt_lengths, steps, options.num_generations)
        self._eos = torch.tensor(options.eos_token_ids, dtype=torch.int64, device=device)
        self._not_eos = torch.ones(backbone.vocab_size, dtype=torch.bool, device=device)
        self._not_eos[self._eos] = False
        self._masker = None if options.action_mask is None or isinstance(options.action_mask, Tensor) else options.action_mask
        self._legal: Tensor | None = self._first_mask(options.action_mask, rows)
        # Time comes first in these, so that a step writes one contiguous line.
        self._ids = torch.full((steps, rows), options.fill_token_id, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros((steps, rows), dtype=torch.float32, device=device)
        masked = options.sampling.truncates or options.action_mask is not None or options.min_new_tokens > 0
        width = packed_width(backbone.vocab_size)
        self._kept = torch.zeros((steps, rows, width), dtype=torch.uint8, device=device) if masked else None
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self._no_choice = torch.zeros((), dtype=torch.bool, device=device)
        # Of the rows still in the batch: who they are (None = all), and which of them have ended.
        self._rows: Tensor | None = None
        self._finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self._watch = _FinishWatch(device)

    def run(self) -> None:
        """Takes all steps."""
        steps = self._options.max_new_tokens
        for step in range(steps):
            tokens = self._choose(step)
            if self._options.stop_strings:
                self._stop(step)
            if step + 1 == steps or self._watch.all_finished(self._finished):
                break
            tokens = self._drop_finished(tokens)
            self._decoder.step(tokens)
            if self._masker is not None:
                self._legal = self._masker.step(tokens)

    def result(self) -> Generation:
        """Collects the outcome, prompt-major."""
        if bool(self._no_choice):
            raise ValueError("`action_mask` (with `min_new_tokens` and EOS taken out) left a row without any legal token.")
        if not bool(self._log_probs.isfinite().all()):
            raise ValueError("`model` gave logits that are not finite (NaN or infinite): its weights are broken, or training diverged.")
        repeats = self._options.num_generations
        prompt_ids, prompt_lengths = self._prompts
        return Generation(
            ids=self._ids.T.contiguous(),
            lengths=self._lengths,
            log_probs=self._log_probs.T.contiguous(),
            prompt_ids=prompt_ids.repeat_interleave(repeats, 0),
            prompt_lengths=prompt_lengths.repeat_interleave(repeats, 0),
            kept=None if self._kept is None else self._kept.transpose(0, 1).contiguous(),
            stopped=self._stopped,
            eos_token_ids=self._options.eos_token_ids,
            decode=self._to_texts,
        )

    def _first_mask(self, mask: Tensor | ActionMasker | None, rows: int) -> Tensor | None:
        if mask is None:
            return None
        repeats = self._options.num_generations
        if not isinstance(mask, Tensor):
            return mask.start(*self._prompts, self._options.max_new_tokens, repeats)
        prompts = self._prompts[0].shape[0]
        if mask.shape not in ((self._vocab_size,), (prompts, self._vocab_size)):
            raise ValueError(
                f"`action_mask` must have the shape (V,) = ({self._vocab_size},) or (prompts, V) = ({prompts}, {self._vocab_size}), "
                f"got {tuple(mask.shape)}; for masks that change from step to step give an `ActionMasker`."
            )
        mask = mask.to(device=self._uniforms.device, dtype=torch.bool)
        return mask.expand(rows, -1) if mask.ndim == 1 else mask.repeat_interleave(repeats, 0)

    def _choose(self, step: int) -> Tensor:
        """Draws token `step` of every row that is left and writes it down; returns the tokens, (rows,)."""
        options = self._options
        legal = self._legal
        if step < options.min_new_tokens:
            legal = self._not_eos if legal is None else legal & self._not_eos
        logits = scale_logits(self._decoder.logits, options.sampling.temperature)
        kept = kept_tokens(logits, options.sampling, legal)
        if kept is not None:
            logits = logits.masked_fill(~kept, -torch.inf)
            self._no_choice |= ~kept.any(-1).all()
        uniforms = self._uniforms[step] if self._rows is None else self._uniforms[step].index_select(0, self._rows)
        if options.greedy:
            tokens = logits.argmax(-1)
            log_probs = token_log_probs(logits, tokens)
        elif options.epsilon is not None:
            tokens, log_probs = draw_epsilon_greedy(logits, uniforms, options.epsilon)
        else:
            tokens, log_probs = draw(logits, uniforms)
        tokens = torch.where(self._finished, options.fill_token_id, tokens)
        log_probs = torch.where(self._finished, 0.0, log_probs)
        self._write(self._ids[step], tokens)
        self._write(self._log_probs[step], log_probs)
        if self._kept is not None:
            whole = torch.ones_like(logits, dtype=torch.bool) if kept is None else kept
            self._write(self._kept[step], pack_kept(whole & ~self._finished.unsqueeze(-1)))
        self._add(self._lengths, ~self._finished)
        self._finished = self._finished | (tokens.unsqueeze(-1) == self._eos).any(-1)
        return tokens

    def _write(self, line: Tensor, values: Tensor) -> None:
        """Writes one step's values (rows, ...) into their places in a line over all rows."""
        if self._rows is None:
            line.copy_(values)
        else:
            line.index_copy_(0, self._rows, values)

    def _add(self, totals: Tensor, amounts: Tensor) -> None:
        if self._rows is None:
            totals.add_(amounts)
        else:
            totals.index_add_(0, self._rows, amounts.to(totals.dtype))

    def _stop(self, step: int) -> None:
        """Ends the rows whose text contains a stop string. Reads the tokens back, so this is the one part that waits for a device."""
        running = (~self._finished).nonzero().squeeze(1)
        rows = running if self._rows is None else self._rows.index_select(0, running)
        prompts = [self._prompt_id_lists[row // self._options.num_generations] for row in rows.tolist()]
        texts = self._to_texts(prompts, self._ids[: step + 1, rows].T.tolist())
        found = torch.tensor([any(stop in text for stop in self._options.stop_strings) for text in texts], device=rows.device)
        self._finished[running] = found
        self._stopped[rows] = found

    def _drop_finished(self, tokens: Tensor) -> Tensor:
        """Thins the batch out once half of it has ended; returns the tokens of the rows that go on."""
        if not self._watch.should_drop(self._finished):
            return tokens
        running = (~self._finished).nonzero().squeeze(1)
        self._rows = running if self._rows is None else self._rows.index_select(0, running)
        self._decoder.select(running)
        if self._masker is not None:
            self._masker.select(running)
        elif self._legal is not None:
            self._legal = self._legal.index_select(0, running)
        self._finished = self._finished.index_select(0, running)
        return tokens.index_select(0, running)


def _without_filler(prompt_ids: Tensor, prompt_lengths: Tensor) -> list[list[int]]:
    width = prompt_ids.shape[1]
    return [row[width - length :] for row, length in zip(prompt_ids.tolist(), prompt_lengths.tolist(), strict=True)]


class _FinishWatch:
    """Knows, without making the host wait, whether all rows have ended.

    On the CPU looking costs nothing. On an accelerator the answer is sent to pinned memory and read some steps later: a few steps are
    run too many, whose tokens are filler.

    Args:
        device: where the rows are.
    """

    _SMALLEST_BATCH = 4  # below, dropping rows saves less than it costs

    def __init__(self, device: torch.device) -> None:
        self._on_host = device.type == "cpu"
        self._running = 0
        self._pinned: Tensor | None = None if self._on_host else torch.zeros((), dtype=torch.bool, pin_memory=True)
        self._event: torch.Event | None = None if self._on_host else torch.Event(device)
        self._asked = False

    def all_finished(self, finished: Tensor) -> bool:
        """Returns True once all of `finished` (rows,) are known to be True; may be late on an accelerator, never early."""
        if self._pinned is None or self._event is None:
            self._running = finished.shape[0] - int(finished.count_nonzero())
            return self._running == 0
        if self._asked and self._event.query():
            if bool(self._pinned):
                return True
            self._asked = False
        if not self._asked:
            self._pinned.copy_(finished.all(), non_blocking=True)
            self._event.record()
            self._asked = True
        return False

    def should_drop(self, finished: Tensor) -> bool:
        """Whether at most half of the rows still run, as far as the host knows without waiting."""
        return self._on_host and finished.shape[0] > self._SMALLEST_BATCH and 2 * self._running <= finished.shape[0]
