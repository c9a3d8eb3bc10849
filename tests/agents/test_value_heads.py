import pytest
import torch
from transformers import AutoModelForSequenceClassification

from textgym.agents import CausalLMPolicy, ValueHead, ValueModel

PROMPTS = ["abc", "hello there", "a", "the cat sat on the mat."]


@pytest.fixture
def policy(model, tokenizer, device):
    return CausalLMPolicy(model, tokenizer, device=device)


@pytest.fixture
def rows(policy):
    generated = policy.generate(PROMPTS, 12, seed=1, num_generations=3)
    return generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths


@pytest.fixture
def classifier(model, device):
    """A reward model of the same family with random weights."""
    torch.manual_seed(0)
    config = type(model.config).from_dict({**model.config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    return AutoModelForSequenceClassification.from_config(config).to(device).eval()


def completion_mask(rows):
    return torch.arange(rows[2].shape[1], device=rows[2].device) < rows[3][:, None]


@pytest.mark.parametrize("mlp_size", [None, 16])
def test_a_value_head_starts_at_zero_and_learns(policy, rows, device, mlp_size):
    head = ValueHead(policy.hidden_size, mlp_size).to(device)
    hidden = policy.score(*rows, hidden=True).hidden.detach()
    assert head(hidden).shape == rows[2].shape
    assert head(hidden).abs().max() == 0
    targets = completion_mask(rows).cumsum(1).float()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    errors = []
    for _ in range(60):
        loss = ((head(hidden) - targets)[completion_mask(rows)] ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("mlp_size", [None, 16])
def test_a_value_head_is_saved_and_read(tmp_path, device, mlp_size):
    head = ValueHead(8, mlp_size).to(device)
    torch.nn.init.normal_(head.output.weight)
    head.save(tmp_path / "head.safetensors")
    hidden = torch.randn(3, 5, 8, device=device)
    assert torch.equal(ValueHead.load(tmp_path / "head.safetensors", device)(hidden), head(hidden))


def test_a_value_head_computes_in_float32(device):
    head = ValueHead(8).to(device)
    torch.nn.init.normal_(head.output.weight)
    assert head(torch.randn(2, 8, device=device, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_value_model_from_a_policy_shares_nothing_with_it(policy, rows):
    critic = ValueModel.from_policy(policy)
    assert critic(*rows).abs().max() == 0
    torch.nn.init.normal_(critic.head.output.weight)
    values = critic(*rows)
    hidden = policy.score(*rows, hidden=True).hidden
    torch.testing.assert_close(values, critic.head(hidden).detach() * completion_mask(rows), atol=1e-4, rtol=1e-4)
    assert values[~completion_mask(rows)].abs().sum() == 0
    own = {parameter.data_ptr() for parameter in critic.parameters()}
    assert not own & {parameter.data_ptr() for parameter in policy.parameters()}
    values.sum().backward()
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert critic.trunk.get_input_embeddings().weight.grad.abs().sum() > 0


def test_values_do_not_depend_on_padding_or_fillers(policy, rows, device):
    critic = ValueModel.from_policy(policy)
    torch.nn.init.normal_(critic.head.output.weight)
    prompt_ids, prompt_lengths, ids, lengths = rows
    junk = torch.full((len(ids), 5), -1, device=device)
    dirty = torch.where(completion_mask(rows), ids, -7)
    padded = critic(torch.cat((junk, prompt_ids), 1), prompt_lengths, torch.cat((dirty, junk), 1), lengths)
    torch.testing.assert_close(padded[:, : ids.shape[1]], critic(*rows), atol=1e-5, rtol=1e-5)


def test_a_value_model_from_a_reward_model_starts_as_its_score(classifier, rows, device):
    critic = ValueModel.from_classifier(classifier, device)
    values = critic(*rows)
    prompt_ids, prompt_lengths, ids, lengths = rows
    for i in (0, 4, 9):
        for t in (0, int(lengths[i]) - 1):
            # V(s_t) is the score of what stood there when token t was chosen.
            state = torch.cat((prompt_ids[i, prompt_ids.shape[1] - prompt_lengths[i] :], ids[i, :t]))
            with torch.no_grad():
                score = classifier(state[None], attention_mask=torch.ones_like(state[None])).logits[0, 0]
            torch.testing.assert_close(values[i, t], score, atol=1e-4, rtol=1e-4)
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in classifier.parameters()}


def test_a_value_model_is_saved_and_read(classifier, rows, device, tmp_path):
    critic = ValueModel.from_classifier(classifier, device)
    critic.save(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    assert torch.equal(ValueModel.load(tmp_path, device)(*rows), critic(*rows))
    classifier.save_pretrained(tmp_path / "classifier")
    assert torch.equal(ValueModel.from_classifier(tmp_path / "classifier", device)(*rows), critic(*rows))


def test_dropout_of_a_critic_is_off(tiny_model, tokenizer, model_type, rows, device):
    policy = CausalLMPolicy(tiny_model(model_type, len(tokenizer), dropout=0.5), tokenizer, device=device)
    critic = ValueModel.from_policy(policy)
    torch.nn.init.normal_(critic.head.output.weight)
    critic.train()
    assert torch.equal(critic(*rows), critic(*rows))


def test_classifiers_with_several_labels_are_refused(model):
    config = type(model.config).from_dict({**model.config.to_dict(), "num_labels": 2})
    with pytest.raises(ValueError, match=r"`model` must be a decoder with a linear `score` layer of one label .* with 2 labels"):
        ValueModel.from_classifier(AutoModelForSequenceClassification.from_config(config))
    with pytest.raises(ValueError, match="no linear `score` layer"):
        ValueModel.from_classifier(model)
