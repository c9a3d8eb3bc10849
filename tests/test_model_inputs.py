from typing import Any

import numpy as np
import pytest
import torch

import textgym

IDS = np.array([[9, 9, 5, 6, 7, 9], [9, 3, 4, 9, 9, 9]])
MASK = np.array([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=np.int8)


def test_positions_count_from_the_first_token() -> None:
    inputs = textgym.model_inputs({"input_ids": IDS, "attention_mask": MASK})
    assert inputs.keys() == {"input_ids", "attention_mask", "position_ids"}
    assert all(tensor.dtype == torch.int64 for tensor in inputs.values())
    assert inputs["input_ids"].tolist() == IDS[:, :5].tolist()
    assert inputs["attention_mask"].tolist() == MASK[:, :5].tolist()
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 0, 1, 1, 1]]


def test_a_single_observation_becomes_a_batch_of_one() -> None:
    inputs = textgym.model_inputs({"input_ids": IDS[0], "attention_mask": MASK[0]})
    assert inputs["input_ids"].tolist() == [[9, 9, 5, 6, 7]]
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2]]


def test_tensors_are_copies() -> None:
    observation = {"input_ids": IDS.copy(), "attention_mask": np.ones_like(IDS)}
    textgym.model_inputs(observation)["input_ids"].zero_()
    np.testing.assert_array_equal(observation["input_ids"], IDS)


def test_device(device: str) -> None:
    inputs = textgym.model_inputs({"input_ids": IDS, "attention_mask": MASK}, device=device)
    assert {tensor.device.type for tensor in inputs.values()} == {torch.device(device).type}


@pytest.mark.parametrize("mask", [MASK[:, :3], MASK[0]])
def test_shapes_that_do_not_fit(mask: Any) -> None:
    with pytest.raises(ValueError, match="`observation` must have `input_ids` and `attention_mask` of the same shape"):
        textgym.model_inputs({"input_ids": IDS, "attention_mask": mask})


def test_next_token_logits_do_not_depend_on_the_padding(model: Any) -> None:
    """Learned positions (GPT-2) are wrong by nats without `position_ids`; rotary ones only need the mask."""
    model.eval()
    padded = {"input_ids": np.array([0, 0, 0, 5, 6, 7, 0, 0]), "attention_mask": np.array([0, 0, 0, 1, 1, 1, 0, 0])}
    bare = {"input_ids": np.array([5, 6, 7]), "attention_mask": np.ones(3)}
    device = next(model.parameters()).device
    with torch.no_grad():
        one, other = (model(**textgym.model_inputs(observation, device)).logits[0, -1] for observation in (padded, bare))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
