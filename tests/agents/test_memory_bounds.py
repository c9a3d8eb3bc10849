"""`micro_batch_tokens` and `gradient_checkpointing`: less memory for an update, and the same gradient."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig

from textgym.agents import DPO, DQN, GRPO, KTO, PPO, REBEL, REINFORCE, RLOO, SFT, CausalLMPolicy, RewardModel, RewardModelTrainer
from textgym.agents.common.batches import RolloutBatch, StepObservations, micro_batches
from textgym.agents.common.critic import Critic
from textgym.agents.common.pretraining import PretrainingMix
from textgym.agents.common.rollout_scores import reference_log_probs, score_in_parts, score_rollout, values_in_parts
from textgym.cli.arguments import check_options
from textgym.feedback import Comparison, Ranking

BUDGET = 17
ONE_STEP: dict[str, Any] = {"seed": 1, "max_grad_norm": None, "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
ONLINE: dict[str, Any] = {
    "ppo": (PPO, {"n_epochs": 1, "ent_coef": 0.1}),
    "ppo, separate": (PPO, {"n_epochs": 1, "critic": "separate"}),
    "ppo, texts": (PPO, {"n_epochs": 1, "ptx_coef": 0.5, "ptx_texts": [[1, 2, 3], [2, 1], [3, 3, 2, 1, 1], [1, 1]], "ptx_batch_size": 4}),
    "reinforce, value": (REINFORCE, {"baseline": "value", "critic": "separate"}),
    "rloo": (RLOO, {"n_epochs": 1, "num_generations": 4}),
    "grpo": (GRPO, {"n_epochs": 1, "num_generations": 4, "beta": 0.1}),
    "rebel": (REBEL, {"n_epochs": 1, "num_generations": 2}),
    "dqn, soft": (DQN, {"beta": 0.5, "learning_starts": 0}),
    "dqn, hard": (DQN, {"beta": 0.0, "learning_starts": 0}),
}
OFFLINE: dict[str, Any] = {"sft": SFT, "dpo": DPO, "rankings": DPO, "kto": KTO}


def rows_of(tree: Any, kind: str, count: int = 21) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        prompt = list(tree.prompts[number % tree.num_prompts])
        first, second, third = (list(tree.ids((7 * number + shift) % tree.num_completions)) for shift in (0, 11, 30))
        rows.append(
            {
                "sft": {"prompt_ids": prompt, "completion_ids": first},
                "dpo": {"prompt_ids": prompt, "chosen_ids": first, "rejected_ids": second},
                "rankings": {"prompt_ids": prompt, "completion_ids": [first, second, third][: 2 + number % 2]},
                "kto": {"prompt_ids": prompt, "completion_ids": first, "label": number % 3 == 0},
            }[kind]
        )
    return rows


def gradient_of(agent: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in agent.trainable_parameters() if p.grad is not None])


def online(task: Any, kind: str, **options: Any) -> Any:
    agent_class, own = ONLINE[kind]
    return agent_class(task.policy(), task.envs(), learning_rate=1e-3, **{**ONE_STEP, **own, **options})


def offline(task: Any, kind: str, **options: Any) -> Any:
    return OFFLINE[kind](task.policy(), rows_of(task.tree, kind), learning_rate=1e-3, **{**ONE_STEP, "batch_size": 21, **options})


class Passes:
    """Counts the tokens of every pass that a policy trains on: of this package's trunk, or, padding included, of transformers'."""

    def __init__(self, policy: CausalLMPolicy, padded: bool) -> None:
        self.sizes: list[int] = []
        if padded:
            policy.backbone._fast_trunk = None
        policy.model.get_input_embeddings().register_forward_hook(lambda module, inputs, states: self.note(states[..., 0]))
        assert padded or policy.backbone.fast_trunk is not None, "the hook is heard there, too"

    def note(self, tokens: torch.Tensor) -> None:
        self.sizes.append(tokens.numel())


# -- the split --------------------------------------------------------------------------------------------------------


def test_without_a_budget_rows_are_split_as_they_stand() -> None:
    lengths = torch.tensor([3, 9, 1, 4, 4])
    for size in (None, 1, 2, 5, 7):
        expected = torch.arange(5).split(size or 5)
        assert [part.tolist() for part in micro_batches(lengths, size, None)] == [part.tolist() for part in expected]


def test_a_budget_bounds_padded_tokens_and_rows_of_like_length_stand_together() -> None:
    lengths = torch.tensor([3, 9, 1, 4, 4, 20, 2])
    split = [part.tolist() for part in micro_batches(lengths, None, 12)]
    assert split == [[5], [1], [3, 4, 0], [6, 2]]  # 20 alone beyond it; 9; 3 rows of 4; 2 of 2
    assert [part.tolist() for part in micro_batches(lengths, 2, 12)] == [[5], [1], [3, 4], [0, 6], [2]]
    assert [part.tolist() for part in micro_batches(lengths, None, 1)] == [[5], [1], [3], [4], [0], [6], [2]]
    assert [part.tolist() for part in micro_batches(lengths, None, 1000)] == [[5, 1, 3, 4, 0, 6, 2]]
    assert micro_batches(lengths[:0], None, 12) == micro_batches(lengths[:0], 3, None) == []


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_one_part(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 30, (50,), generator=generator)
    parts = micro_batches(lengths, 6, 64)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(50))
    assert all(len(part) <= 6 and (len(part) == 1 or int(lengths[part].max()) * len(part) <= 64) for part in parts)


# -- scores in parts --------------------------------------------------------------------------------------------------


@pytest.fixture
def rollout(task) -> tuple[PPO, RolloutBatch]:
    agent = PPO(task.policy(), task.envs(), seed=0)
    kept: list[RolloutBatch] = []
    agent.train = kept.append  # type: ignore[method-assign]
    agent.learn(1)
    assert len(set(kept[0].pass_tokens.tolist())) > 2
    return agent, kept[0]


@pytest.mark.parametrize("size", [None, 3])
def test_scores_come_back_in_the_rows_own_order(rollout, size: int | None) -> None:
    agent, batch = rollout
    critic = Critic.build(agent.policy, "joint")
    with torch.no_grad():
        critic.network.output.weight.normal_()
        expected = score_rollout(agent.policy, batch, critic, entropy=True, end_values=True)
        found = score_in_parts(agent.policy, batch, critic, size, BUDGET, entropy=True, end_values=True)
        separate = Critic.build(agent.policy, "separate")
        separate.network.head.output.weight.normal_()
        values = values_in_parts(agent.policy, batch, separate, size, BUDGET)
        whole = values_in_parts(agent.policy, batch, separate)
    for one, other in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference_log_probs(agent.policy, batch, size, BUDGET), expected.log_probs, atol=1e-5, rtol=1e-5)
    assert expected.log_probs.std(0).max() > 1e-3 and whole.std(0).max() > 1e-3, "rows differ, so their order is seen"


def test_closed_loop_rows_cost_all_their_observations(rollout) -> None:
    agent, batch = rollout
    steps = int(batch.lengths.max()) + 1
    width = batch.prompt_ids.shape[1] + steps - 1
    masks = torch.ones(len(batch), steps, width, dtype=torch.bool)
    ids = torch.ones(len(batch), steps, width, dtype=torch.int64)
    closed = replace(batch, steps=StepObservations(ids.to(batch.lengths.device), masks.to(batch.lengths.device)))
    passes = Passes(agent.policy, padded=False)
    budget = 3 * int(closed.pass_tokens.max())
    with torch.no_grad():
        whole = score_rollout(agent.policy, closed).log_probs
        passes.sizes.clear()
        torch.testing.assert_close(score_in_parts(agent.policy, closed, None, None, budget).log_probs, whole, atol=1e-5, rtol=1e-5)
    assert len(passes.sizes) > 1 and max(passes.sizes) <= budget


# -- agents -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("extra", [{}, {"micro_batch_size": 4}])
def test_a_token_budget_changes_no_gradient_of_online_agents(task, kind: str, extra: dict[str, int]) -> None:
    plain, split = online(task, kind).learn(1), online(task, kind, micro_batch_tokens=BUDGET, **extra).learn(1)
    torch.testing.assert_close(gradient_of(split), gradient_of(plain), atol=1e-6, rtol=1e-4)
    assert gradient_of(plain).norm() > 1e-3


@pytest.mark.parametrize("kind", OFFLINE)
@pytest.mark.parametrize("extra", [{}, {"micro_batch_size": 2}, {"packing": True}])
def test_a_token_budget_changes_no_gradient_of_offline_agents(task, kind: str, extra: dict[str, Any]) -> None:
    plain, split = offline(task, kind).learn(1), offline(task, kind, micro_batch_tokens=BUDGET, **extra).learn(1)
    torch.testing.assert_close(gradient_of(split), gradient_of(plain), atol=1e-6, rtol=1e-4)
    assert gradient_of(plain).norm() > 1e-3
    for name, value in plain.evaluate(rows_of(task.tree, kind)).items():
        assert split.evaluate(rows_of(task.tree, kind))[name] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["ppo", "ppo, texts", "rloo", "grpo", "rebel", "dqn, soft"])
def test_no_pass_of_an_update_exceeds_the_budget(task, kind: str, padded: bool) -> None:
    sizes = []
    for budget in (None, 2 * BUDGET):
        agent = online(task, kind, micro_batch_tokens=budget)
        update = agent.train

        def train(rollout: Any, update: Any = update, agent: Any = agent) -> None:
            passes = Passes(agent.policy, padded)
            update(rollout)
            sizes.append(passes.sizes)

        agent.train = train
        agent.learn(1)
    assert max(sizes[0]) > 2 * BUDGET >= max(sizes[1]) and len(sizes[1]) > len(sizes[0])
    if padded:
        assert max(sizes[1]) > BUDGET, "and passes are not needlessly small"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", OFFLINE)
def test_no_pass_of_an_offline_step_exceeds_the_budget(task, kind: str, padded: bool) -> None:
    sizes = []
    for budget in (None, 2 * BUDGET):
        agent = offline(task, kind, micro_batch_tokens=budget)
        for policy in [one for one in (agent.policy, agent.reference) if one is not None]:
            passes = Passes(policy, padded)
            sizes.append(passes.sizes)
        agent.learn(1)
    half = len(sizes) // 2
    assert all(max(free) > 2 * BUDGET >= max(bound) for free, bound in zip(sizes[:half], sizes[half:], strict=True))


def test_a_reward_models_gradient_is_the_same_and_its_passes_are_bounded(tokenizer, device) -> None:
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, **ends)
    policy = CausalLMPolicy(AutoModelForCausalLM.from_config(config), tokenizer, device=device)
    records = [Comparison("hi " * (n % 3 + 1), "yes" * (n % 4 + 1), "no" * (n % 5 + 1)) for n in range(12)]
    records += [Ranking("who?", ["me", "you and me", "none"][: 2 + n % 2], (0, 1, 2)[: 2 + n % 2]) for n in range(4)]
    budget, gradients, sizes = 100, [], []
    for tokens in (None, budget):
        trainer = RewardModelTrainer(RewardModel.from_policy(policy), records, batch_size=16, micro_batch_tokens=tokens, **ONE_STEP)
        seen: list[int] = []
        trainer.reward_model.model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, states, seen=seen: seen.append(states[..., 0].numel())
        )
        trainer.learn(1)
        gradients.append(gradient_of(trainer))
        sizes.append(seen)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    assert max(sizes[0]) > budget >= max(sizes[1])


def test_the_texts_mix_keeps_to_the_budget(task) -> None:
    agent = PPO(task.policy(), task.envs(), seed=0)
    mix = PretrainingMix(agent.policy, [[1, 2, 3], [2, 1], [3, 3, 2, 1, 1], [1, 1]], 1.0, batch_size=4, seed=0)
    whole, split = list(mix.losses(agent.policy, None, agent.logger)), list(mix.losses(agent.policy, None, agent.logger, 6))
    assert (len(whole), len(split)) == (1, 3)  # 5 alone; 3 and 2; 2
    torch.testing.assert_close(sum(split), whole[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "8"])
def test_a_bad_budget_is_named(task, value: Any) -> None:
    with pytest.raises(ValueError, match="`micro_batch_tokens` must be a whole number of tokens"):
        online(task, "ppo", micro_batch_tokens=value)
    with pytest.raises(ValueError, match="`micro_batch_tokens` must be a whole number of tokens"):
        offline(task, "sft", micro_batch_tokens=value)


def test_checkpoints_and_the_command_line_know_both_options(task, tmp_path: Path) -> None:
    options = {"micro_batch_tokens": BUDGET, "gradient_checkpointing": True}
    for agent_class in (PPO, DQN, SFT, DPO):
        check_options(options, agent_class, ())
    whole = online(task, "rloo", optimizer=torch.optim.SGD, **options)
    whole.save(tmp_path / "online")
    resumed = RLOO.load(tmp_path / "online", task.envs(), device=task.device, optimizer=torch.optim.SGD)
    assert (resumed.micro_batch_tokens, resumed.gradient_checkpointing) == (BUDGET, True)
    assert resumed.policy.model.base_model.gradient_checkpointing
    assert torch.equal(*(torch.cat([p.flatten() for p in one.learn(1).policy.parameters()]) for one in (whole, resumed)))


# -- gradient checkpointing -------------------------------------------------------------------------------------------


def saved_bytes(agent: Any) -> int:
    """Bytes of activations that the agent's update keeps for its backward passes."""
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in agent.trainable_parameters()}
    kept: list[torch.Tensor] = []  # so that no address is given out twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(tensor.detach())
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    step = agent.step

    def watched(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return function(*arguments)

        return call

    agent.step = lambda losses, *arguments: bool(step(watched(list)(losses), *arguments))
    if hasattr(agent, "_first_scores"):  # PPO's first step goes on from the pass that its targets were worked out in
        agent._first_scores = watched(agent._first_scores)
    agent.learn(1)
    return sum(seen.values())


@pytest.mark.parametrize("kind", ["ppo", "ppo, separate", "rloo", "grpo", "dqn, hard"])
def test_checkpointing_changes_no_gradient_and_saves_activations_online(task, kind: str) -> None:
    plain, again = online(task, kind), online(task, kind, gradient_checkpointing=True)
    before, after = saved_bytes(plain), saved_bytes(again)
    torch.testing.assert_close(gradient_of(again), gradient_of(plain), atol=1e-6, rtol=1e-6)
    assert gradient_of(plain).norm() > 1e-3
    assert after < 0.7 * before, (after, before)


@pytest.mark.parametrize("kind", OFFLINE)
def test_checkpointing_changes_no_gradient_and_saves_activations_offline(task, kind: str) -> None:
    plain, again = offline(task, kind), offline(task, kind, gradient_checkpointing=True)
    before, after = saved_bytes(plain), saved_bytes(again)
    torch.testing.assert_close(gradient_of(again), gradient_of(plain), atol=1e-6, rtol=1e-6)
    assert after < 0.7 * before, (after, before)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_of_llamas_and_adapters(task, lora: bool) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        tokenizer = task.tree.tokenizer()
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends))
        if lora:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data.normal_(std=0.3)
        policy = CausalLMPolicy(model, tokenizer, device=task.device)
        agent = RLOO(policy, task.envs(), 1e-3, num_generations=4, n_epochs=1, gradient_checkpointing=on, **ONE_STEP)
        assert policy.backbone.fast_trunk is not None
        found.append((saved_bytes(agent), gradient_of(agent)))
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-6, rtol=1e-6)
    assert found[0][1].norm() > 1e-3 and found[1][0] < 0.8 * found[0][0]


def test_checkpointing_is_refused_where_transformers_runs_the_model(task) -> None:
    tokenizer = task.tree.tokenizer()
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2))
    policy = CausalLMPolicy(bloom, tokenizer, device=task.device)
    with pytest.raises(ValueError, match="`gradient_checkpointing` must be False for a `policy` that transformers runs"):
        PPO(policy, task.envs(), gradient_checkpointing=True)
    with pytest.raises(ValueError, match="`gradient_checkpointing` must be False for a `reward_model` that transformers runs"):
        RewardModelTrainer(RewardModel.from_policy(task.policy()), None, gradient_checkpointing=True)
    eager = Critic.build(task.policy(), "separate").network
    eager._fast_trunk = None
    own = task.policy()
    with pytest.raises(ValueError, match="`gradient_checkpointing` must be False for a `critic` that transformers runs"):
        PPO(own, task.envs(), critic=eager, gradient_checkpointing=True)
    assert not own.model.base_model.gradient_checkpointing, "nothing is changed by what is refused"


def test_a_checkpointed_policy_samples_as_before(task) -> None:
    first, second = online(task, "ppo"), online(task, "ppo", gradient_checkpointing=True)
    prompts = [list(ids) for ids in task.tree.prompts]
    assert torch.equal(*(agent.policy.generate(prompts, 3, num_generations=20, seed=3).ids for agent in (first, second)))
