"""Decode steps that are recorded once and replayed, as on a GPU. Here a recorder for the CPU stands in for CUDA's graphs."""

import pytest
import torch

from textgym.agents import CausalLMPolicy
from textgym.agents.common import captured_step, decode_loop

PROMPTS = ["abc", "hello there", "a", "the cat sat on the mat."]


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
    expected, captured = captures.check(policy, PROMPTS, 30, seed=0, **settings)
    if policy.backbone.fast_trunk is None:
        assert captured == captures.replayed == 0
    else:
        assert captured > 0 and captures.replayed > captured
        assert int(expected.lengths.min()) < int(expected.lengths.max()), "rows have been dropped on the way"


def test_the_recorder_catches_what_is_no_part_of_a_step(captures):
    """A value that the host holds is frozen by a capture, and so is the memory of a parameter: the recorder must show it."""
    total, column = torch.zeros(4), 0
    weight = torch.nn.Parameter(torch.ones(1))
    memory = weight.data
    recorder = captures.recorder()
    with recorder, torch.no_grad():
        total[column] += 2 * weight[0]
    column = 1
    with torch.no_grad():
        weight += 1
    recorder.replay()
    assert total.tolist() == [6, 0, 0, 0]
    weight.data = torch.zeros(1)
    recorder.replay()
    assert total.tolist() == [10, 0, 0, 0]
    del memory
    with pytest.raises(AssertionError, match="memory that has been freed"):
        recorder.replay()


def test_what_cannot_be_captured_on_cuda_is_named(monkeypatch):
    class Broken:
        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *arguments):
            return False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: Broken())
    with pytest.warns(UserWarning, match="could not be captured: operation not permitted"):
        assert captured_step.capture_on_cuda(lambda: None) is None


@pytest.mark.parametrize("size", [None, 3])
def test_what_cannot_be_captured_is_run_and_not_tried_again(tiny_model, tokenizer, monkeypatch, size):
    policy = CausalLMPolicy(tiny_model("llama", len(tokenizer)), tokenizer, device="cpu")
    arguments = {"seed": 0, "num_generations": 2, "max_batch_size": size}
    expected = policy.generate(PROMPTS, 60, **arguments)
    tried = []
    monkeypatch.setitem(captured_step.CAPTURES, "cpu", tried.append)
    for _ in range(2):
        assert torch.equal(policy.generate(PROMPTS, 60, **arguments).ids, expected.ids)
    assert len(tried) == 1


@pytest.mark.parametrize("mistake", ["frozen column", "stale logits", "half the rows", "not finite", "keys not written"])
def test_a_replay_that_differs_is_not_used(tiny_model, tokenizer, monkeypatch, mistake):
    """Each capture is compared with the step itself; one warning, and the numbers are right all the same."""
    policy = CausalLMPolicy(tiny_model("llama", len(tokenizer)), tokenizer, device="cpu")
    arguments = {"seed": 0, "num_generations": 2}
    expected = policy.generate(PROMPTS, 40, **arguments)

    def capture(step):
        buffers, size = step.func.__self__, step.args[-1]
        column = buffers._column.clone()

        def replay():
            logits = buffers._logits[:size].clone()
            if mistake == "frozen column":
                buffers._column.copy_(column)
            step()
            if mistake == "stale logits":
                buffers._logits[:size] = logits
            elif mistake == "half the rows":
                buffers._logits[size // 2 : size] = 0
            elif mistake == "not finite":
                buffers._logits[0, 0] = torch.nan
            elif mistake == "keys not written":
                buffers._table[:, :, :size, :, buffers.filled] = 0

        return replay

    monkeypatch.setitem(captured_step.CAPTURES, "cpu", capture)
    with pytest.warns(UserWarning, match="came to other numbers than the step itself") as caught:
        found = [policy.generate(PROMPTS, 40, **arguments) for _ in range(2)]
    assert len(caught) == 1, "it is not tried again"
    for one in found:
        assert torch.equal(one.ids, expected.ids)
        torch.testing.assert_close(one.log_probs, expected.log_probs, atol=1e-5, rtol=0)


def test_rounding_is_no_difference():
    numbers = torch.tensor([10.0, -3.0, torch.nan])
    assert captured_step.same_numbers(numbers + 1e-3, numbers)
    assert not captured_step.same_numbers(numbers + 2e-2, numbers)
    assert captured_step.same_numbers(numbers.bfloat16() + 0.1, numbers.bfloat16())
    assert not captured_step.same_numbers(torch.tensor([3]), torch.tensor([4]))


def test_late_answers_and_replayed_steps(model, tokenizer, captures, monkeypatch):
    """A row that has ended stays in the batch while younger ones go on, beyond the last position that there is."""
    monkeypatch.setattr(decode_loop, "ENDED_WORTH_DROPPING", 0.9)
    policy = CausalLMPolicy(model.cpu(), tokenizer, device="cpu", eos_token_ids=tokenizer.convert_tokens_to_ids(["e"]))
    steps = int(model.config.max_position_embeddings) - max(map(len, PROMPTS))
    for _ in range(2):
        captures.check(policy, PROMPTS, steps, seed=0, num_generations=8, max_batch_size=10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs(tiny_model, tokenizer, monkeypatch, recwarn):
    policy = CausalLMPolicy(tiny_model("llama", len(tokenizer)), tokenizer, device="cuda")
    arguments = {"seed": 0, "num_generations": 8, "max_batch_size": 20}
    found = [policy.generate(PROMPTS, 30, **arguments) for _ in range(3)]
    assert not [warning for warning in recwarn if "captured" in str(warning.message)]
    assert len(policy.backbone.kept_rows) > 0
    monkeypatch.delitem(captured_step.CAPTURES, "cuda")
    expected = policy.generate(PROMPTS, 30, **arguments)
    for one in found:
        assert torch.equal(one.ids, expected.ids)
        torch.testing.assert_close(one.log_probs, expected.log_probs, atol=1e-4, rtol=0)
