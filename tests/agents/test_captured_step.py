"""Decode steps that are recorded once and replayed, as on a GPU. Here a recorder for the CPU stands in for CUDA's graphs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from textgym.agents import CausalLMPolicy
from textgym.agents.common import captured_step

PROMPTS = ["abc", "hello there", "a", "the cat sat on the mat."]


class Recorder(TorchDispatchMode):
    """Writes down every operation with the very tensors it was given; replaying computes on these tensors again, and on nothing else."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage().data_ptr() for tensor in tree_flatten((args, kwargs))[0] if isinstance(tensor, torch.Tensor)}
        outputs = [tensor for tensor in tree_flatten(results)[0] if isinstance(tensor, torch.Tensor)]
        fresh = [tensor.untyped_storage().data_ptr() not in inputs for tensor in outputs]
        changes = func._schema.is_mutable
        if changes or any(fresh):  # a view needs no computing
            self.operations.append((func, args, kwargs or {}, outputs, changes))
        return results

    def replay(self):
        for func, args, kwargs, outputs, changes in self.operations:
            results = [tensor for tensor in tree_flatten(func(*args, **kwargs))[0] if isinstance(tensor, torch.Tensor)]
            if not changes:
                for output, result in zip(outputs, results, strict=True):
                    output.copy_(result)


@pytest.fixture
def captures(monkeypatch):
    """Captures steps on the CPU, and counts captures and replays."""
    counts = {"captured": 0, "replayed": 0}

    def capture(step):
        counts["captured"] += 1
        kept = {}
        recorder = Recorder()

        def replay():
            counts["replayed"] += 1
            if not kept:
                # A capture computes nothing; this one does, and so it is the first replay.
                with recorder:
                    step()
                kept["done"] = True
            else:
                recorder.replay()

        return replay

    monkeypatch.setitem(captured_step.CAPTURES, "cpu", capture)
    return counts


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_generations": 8},
        {"num_generations": 8, "max_batch_size": 7},
        {"num_generations": 4, "top_p": 0.9, "min_new_tokens": 3},
    ],
)
def test_replayed_steps_are_steps(model, tokenizer, captures, settings):
    policy = CausalLMPolicy(model.cpu(), tokenizer, device="cpu", eos_token_ids=tokenizer.convert_tokens_to_ids(["e", "t", "o"]))
    found = policy.generate(PROMPTS, 30, seed=0, **settings)
    counts = dict(captures)
    captured_step.CAPTURES.pop("cpu")
    expected = policy.generate(PROMPTS, 30, seed=0, **settings)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=5e-5, rtol=0)
    if policy.backbone.fast_trunk is None:
        assert counts == {"captured": 0, "replayed": 0}
    else:
        assert counts["captured"] > 0 and counts["replayed"] > counts["captured"]
        assert int(expected.lengths.min()) < int(expected.lengths.max()), "rows have been dropped on the way"


def test_the_recorder_catches_what_is_no_part_of_a_step():
    """A value that the host holds is frozen by a capture: the recorder must show it."""
    total, column = torch.zeros(4), 0
    recorder = Recorder()
    with recorder:
        total[column] += 1
    column = 1
    recorder.replay()
    assert total.tolist() == [2, 0, 0, 0]


def test_what_cannot_be_captured_is_run(monkeypatch):
    class Broken:
        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *arguments):
            return False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Broken())
    calls = []
    with pytest.warns(UserWarning, match="could not be captured: operation not permitted"):
        step = captured_step.capture_on_cuda(lambda: calls.append(1))
    step()
    assert calls == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs(tiny_model, tokenizer, monkeypatch, recwarn):
    policy = CausalLMPolicy(tiny_model("llama", len(tokenizer)), tokenizer, device="cuda")
    found = policy.generate(PROMPTS, 30, seed=0, num_generations=8, max_batch_size=20)
    assert not [warning for warning in recwarn if "captured" in str(warning.message)]
    monkeypatch.delitem(captured_step.CAPTURES, "cuda")
    expected = policy.generate(PROMPTS, 30, seed=0, num_generations=8, max_batch_size=20)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-4, rtol=0)
