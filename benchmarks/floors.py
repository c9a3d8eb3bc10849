"""GPT-2-type models of random weights, what running them costs at least, and how fast this machine does that alone.

A floor is counted, not measured: the matrix products of a model call at the rate of this machine's own large products, or the bytes that
the call cannot help reading at the rate of this machine's own copies, whichever takes longer. Everything else (normalisation, softmax,
sampling, launches, Python) counts as nothing.

    shape = floors.Shape(vocab_size=2048, width=128, layers=4)
    machine = floors.Machine("cpu")
    seconds = machine.seconds(shape.decoding(rows=64, prompts=16, prompt_tokens=16, new_tokens=32))
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from textgym.agents import CausalLMPolicy

HEAD_SIZE = 32  # of attention
MEASURED_SECONDS = 0.2  # for each rate
FIRST_WORD = 2  # the tokens before are the unknown and the end token


class Work(NamedTuple):
    """What one call of a model must do at least.

    Attributes:
        flops: of matrix products, a multiplication and an addition counted as two.
        bytes: to be read (and of an optimiser also written) once.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2-type model: head and token embeddings share their weights.

    Attributes:
        vocab_size: V.
        width: H, a multiple of `HEAD_SIZE`.
        layers: how many.
        itemsize: bytes of a weight.
    """

    vocab_size: int
    width: int
    layers: int
    itemsize: int = 4

    @property
    def layer_weights(self) -> int:
        """Of all layers' matrices: 3 H² into queries, keys and values, H² out of the attention, 8 H² in the two-layer network."""
        return 12 * self.layers * self.width**2

    @property
    def head_weights(self) -> int:
        """Of the language-model head."""
        return self.vocab_size * self.width

    @property
    def parameters(self) -> int:
        """Those that count: of the matrices."""
        return self.layer_weights + self.head_weights

    def policy(self, positions: int, device: str = "auto", seed: int = 0) -> CausalLMPolicy:
        """Returns a model of this shape with random weights, as a policy."""
        ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
        sizes = {"n_embd": self.width, "n_layer": self.layers, "n_head": self.width // HEAD_SIZE, "n_positions": positions}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = GPT2LMHeadModel(GPT2Config(vocab_size=self.vocab_size, **sizes, **ends))
        dtype = {2: torch.bfloat16, 4: torch.float32}[self.itemsize]
        return CausalLMPolicy(model.to(dtype), make_tokenizer(self.vocab_size), device=device, seed=seed)

    def cache_bytes(self, tokens: float) -> float:
        """Keys and values of so many tokens."""
        return 2.0 * self.layers * self.width * tokens * self.itemsize

    def call(self, tokens: float, predicted: float, seen: float, cached: float = 0.0) -> Work:
        """One call of the model.

        Args:
            tokens: that go in.
            predicted: positions whose logits are made.
            seen: pairs of a token and one that it attends to.
            cached: tokens whose keys and values are read.
        """
        attention = 4.0 * self.layers * self.width * seen  # scores, and the mean of the values
        flops = 2.0 * (self.layer_weights * tokens + self.head_weights * predicted) + attention
        return Work(flops, self.parameters * self.itemsize + self.cache_bytes(cached))

    def decoding(self, rows: int, prompts: int, prompt_tokens: int, new_tokens: int) -> list[Work]:
        """The calls that sample `rows` completions of `new_tokens` with a cache, each of the `prompts` prompts run once."""
        prefill = self.call(prompts * prompt_tokens, prompts, prompts * triangle(prompt_tokens))
        contexts = [rows * (prompt_tokens + step) for step in range(1, new_tokens)]
        return [prefill, *(self.call(rows, rows, context, context) for context in contexts)]

    def scoring(self, rows: int, prompts: int, prompt_tokens: int, new_tokens: int) -> Work:
        """The call that scores those completions at once, each prompt run once."""
        inputs = new_tokens - 1  # the last token predicts nothing that is scored
        seen = prompts * triangle(prompt_tokens) + rows * (inputs * prompt_tokens + triangle(inputs))
        return self.call(prompts * prompt_tokens + rows * inputs, rows * new_tokens, seen)

    def optimiser_step(self) -> Work:
        """A step of Adam, which reads weight, gradient and two moments and writes three of them."""
        return Work(0.0, 7.0 * self.parameters * self.itemsize)


def triangle(tokens: int) -> float:
    """Pairs of a token and one that it attends to, in a row of so many."""
    return tokens * (tokens + 1) / 2


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of `vocab_size` words."""
    words = ["<unknown>", "<end>", *(f"w{i}" for i in range(FIRST_WORD, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


class Machine:
    """The rates of this machine, measured when they are asked for.

    Args:
        device: whose.
        dtype: of the products.

    Attributes:
        flops: of large square matrix products per second.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype
        side = 1024 if self.device.type == "cpu" else 8192
        self.flops = 2.0 * side**3 / self.fastest_product(side, side, side)
        self._bandwidths: dict[int, float] = {}

    def fastest_product(self, rows: int, inner: int, columns: int) -> float:
        """Seconds of one product (rows, inner) × (inner, columns), the fastest seen."""
        first = torch.randn((rows, inner), device=self.device).to(self.dtype)
        second = torch.randn((inner, columns), device=self.device).to(self.dtype)
        out = torch.empty((rows, columns), device=self.device, dtype=self.dtype)
        return self._fastest(lambda: torch.mm(first, second, out=out))

    def bandwidth(self, size: float) -> float:
        """Bytes per second of a copy that reads and writes `size` bytes in all: what fits into a cache has the cache's bandwidth."""
        size = 1 << max(16, min(30, round(size).bit_length()))  # 64 KB to 1 GB, a power of two
        if size not in self._bandwidths:
            source = torch.zeros(size // 2, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._bandwidths[size] = size / self._fastest(lambda: target.copy_(source))
        return self._bandwidths[size]

    def parts(self, calls: Sequence[Work]) -> tuple[float, float]:
        """Seconds of the matrix products of some calls, and of what they read."""
        return sum(call.flops for call in calls) / self.flops, sum(call.bytes / self.bandwidth(call.bytes) for call in calls)

    def seconds(self, calls: Sequence[Work]) -> float:
        """The floor of some calls, one after the other: of each the longer one of the two parts."""
        return sum(max(self.parts([call])) for call in calls)

    def _fastest(self, work: Callable[[], Tensor]) -> float:
        work()
        found: list[float] = []
        # In rounds: a single call is too short for the clock, and on an accelerator returns before it is done.
        count, until = 1, time.perf_counter() + MEASURED_SECONDS
        while time.perf_counter() < until or not found:
            self.wait()
            start = time.perf_counter()
            for _ in range(count):
                work()
            self.wait()
            seconds = time.perf_counter() - start
            if seconds < MEASURED_SECONDS / 20:
                count *= 2
            else:
                found.append(seconds / count)
        return min(found)

    def wait(self) -> None:
        """Until the device has done what it was asked."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def to_json(self) -> dict[str, Any]:
        """The rates that were measured."""
        bandwidths = {str(size): rate for size, rate in sorted(self._bandwidths.items())}
        return {"flop/s": self.flops, "bytes/s by size": bandwidths, "dtype": str(self.dtype).removeprefix("torch.")}
