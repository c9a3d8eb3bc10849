"""Mixed precision: products in bfloat16, everything that is kept in float32."""

import pytest
import torch

from textgym.agents import RLOO, CausalLMPolicy
from textgym.agents.common.critic import Critic

PROMPTS = ["abc", "hello there", "a", "the cat sat on the mat."]


@pytest.fixture
def policies(tiny_model, model_type, tokenizer, device):
    model = tiny_model(model_type, len(tokenizer), scale=0.2)
    full = CausalLMPolicy(model, tokenizer, device=device, seed=0)
    return full, CausalLMPolicy(model, tokenizer, device=device, seed=0, autocast="bfloat16")


def rows_of(generated):
    return generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths


def test_products_are_rounded_and_nothing_else(policies):
    full, mixed = policies
    rows = rows_of(full.generate(PROMPTS, 20, seed=1, num_generations=4))
    gradients = []
    for policy in policies:
        policy.zero_grad()
        scores = policy.score(*rows, entropy=True)
        assert scores.log_probs.dtype == scores.entropy.dtype == torch.float32
        scores.log_probs.sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()]))
    assert {parameter.dtype for parameter in mixed.model.parameters()} == {torch.float32}
    assert gradients[0].dtype == gradients[1].dtype == torch.float32
    difference = (full.score(*rows).log_probs - mixed.score(*rows).log_probs).abs()
    assert 1e-5 < difference.max() < 0.3 and difference.mean() < 0.03
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"max_batch_size": 3}])
def test_what_is_sampled_is_what_is_scored(policies, settings):
    mixed = policies[1]
    generated = mixed.generate(PROMPTS, 20, seed=1, num_generations=4, **settings)
    scores = mixed.score(*rows_of(generated), keep=generated.kept)
    assert (scores.log_probs - generated.log_probs).abs().mean() < 0.03


def test_references_copies_and_checkpoints_keep_it(policies, tmp_path):
    mixed = policies[1]
    assert mixed.reference().backbone.autocast == torch.bfloat16
    mixed.save_pretrained(tmp_path)
    again = CausalLMPolicy.from_pretrained(tmp_path, device=mixed.device, **mixed.loading_arguments())
    rows = rows_of(mixed.generate(PROMPTS, 5, seed=0))
    assert torch.equal(again.score(*rows).log_probs, mixed.score(*rows).log_probs)


@pytest.mark.filterwarnings("ignore::textgym.errors.TrainingWarning")  # it learns all that there is
def test_an_agent_learns_in_it(task, tmp_path):
    policy = task.policy(autocast=torch.bfloat16)
    agent = RLOO(policy, task.envs(96), 5e-3, beta=0.1, num_generations=4, seed=0)
    start = agent.learn(1).ep_info_buffer[-1]["r"]
    before = sum(float(row["r"]) for row in agent.ep_info_buffer) / len(agent.ep_info_buffer)
    agent.learn(96 * 3 * 30)
    after = sum(float(row["r"]) for row in agent.ep_info_buffer) / len(agent.ep_info_buffer)
    assert after > before + 0.3, start
    agent.save(tmp_path / "agent")
    assert RLOO.load(tmp_path / "agent", env=task.envs(96), device=task.device).policy.backbone.autocast == torch.bfloat16


def test_a_critic_of_its_own_runs_in_it_too(policies, tmp_path):
    full, mixed = policies
    rows = rows_of(full.generate(PROMPTS, 20, seed=1, num_generations=4))
    critic = Critic.build(mixed, "separate").network
    torch.nn.init.normal_(critic.head.output.weight)
    assert {parameter.dtype for parameter in critic.parameters()} == {torch.float32}
    values = critic(*rows)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in critic.head.parameters())
    Critic(critic).save(tmp_path)
    assert torch.equal(Critic.load(tmp_path, full).network(*rows), values)
    critic.autocast = None
    difference = (critic(*rows) - values).abs()
    assert 1e-5 < difference.max() < 0.3 * values.abs().max()
    Critic(critic).save(tmp_path)
    assert torch.equal(Critic.load(tmp_path, mixed).network(*rows), critic(*rows))


def test_other_dtypes_are_refused(tiny_model, tokenizer):
    for wrong in ("float64", "bf16", torch.float32):
        with pytest.raises(ValueError, match="`autocast` must be 'bfloat16'"):
            CausalLMPolicy(tiny_model("llama", len(tokenizer)), tokenizer, device="cpu", autocast=wrong)
