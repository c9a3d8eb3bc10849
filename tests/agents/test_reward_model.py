"""`RewardModel`: its scores, what it saves, and everything that takes a reward taking it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

from textgym.agents import PPO, CausalLMPolicy, RewardModel, RewardModelTrainer, ValueModel
from textgym.feedback import Comparison
from textgym.rewards import ClassifierReward, RewardSet, segment_level
from textgym.wrappers.vector import KLShaping

PROMPTS = ["abc", "hello", "a", "the cat "]
COMPLETIONS = ["def", " you<eos>", "bcdefgh, ij<eos><eos>", "sat."]
TEXTS = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def pad_is_eos(tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def policy(model: Any, pad_is_eos: Any, device: str) -> CausalLMPolicy:
    return CausalLMPolicy(model, pad_is_eos, device=device)


def by_transformers(model: Any, tokenizer: Any, texts: list[str], **options: Any) -> np.ndarray:
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt", **options).to(model.device)).logits.float().cpu().numpy()


def alone(reward_model: RewardModel, text: str) -> float:
    """The head on the last hidden state of one text without any padding: the definition."""
    ids = torch.tensor([reward_model.tokenizer(text)["input_ids"]], device=reward_model.device)
    with torch.no_grad():
        return float(reward_model.model.score(reward_model.model.base_model(ids).last_hidden_state[0, -1])[0])


# -- what is saved -------------------------------------------------------------------------------------------------------


def test_transformers_and_textgym_agree_also_on_texts_that_end_in_eos(policy, tmp_path: Path) -> None:
    """Where pad is EOS, in a batch of different lengths: transformers pools by the pad id, which is a token of its own now."""
    reward_model = RewardModel.from_policy(policy, seed=1)
    scores = reward_model(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(scores, [alone(reward_model, text) for text in TEXTS], atol=1e-5)
    assert len(set(np.round(scores, 3))) == len(TEXTS)
    reward_model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".jinja"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).to(policy.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.padding_side == "right"
    np.testing.assert_allclose(by_transformers(model, tokenizer, TEXTS)[:, 0], scores, atol=1e-5)
    for text, score in zip(TEXTS, scores, strict=True):
        np.testing.assert_allclose(by_transformers(model, tokenizer, [text]), [[score]], atol=1e-5)
    np.testing.assert_allclose(ClassifierReward(tmp_path)(PROMPTS, COMPLETIONS), scores, atol=1e-5)
    np.testing.assert_allclose(RewardModel.from_pretrained(tmp_path)(PROMPTS, COMPLETIONS), scores, atol=1e-5)
    loaded = RewardModel.from_pretrained(tmp_path, batch_size=1)
    assert loaded.tokenizer.pad_token_id == reward_model.tokenizer.pad_token_id  # no second one
    np.testing.assert_allclose(loaded(PROMPTS, COMPLETIONS), scores, atol=1e-5)


def test_left_padding_through_transformers(policy, model_type: str, tmp_path: Path) -> None:
    RewardModel.from_policy(policy, seed=1).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).to(policy.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt").to(policy.device)
    if model_type == "gpt2":  # counts positions from the left edge unless it is told
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(**inputs).logits[:, 0].cpu().numpy()
    np.testing.assert_allclose(found, RewardModel.from_pretrained(tmp_path)(PROMPTS, COMPLETIONS), atol=1e-4)


def test_without_a_pad_token_of_its_own_transformers_would_be_wrong(policy) -> None:
    """The mistake that the own pad token avoids, shown."""
    reward_model = RewardModel.from_policy(policy, seed=1)
    reward_model.model.config.pad_token_id = policy.tokenizer.eos_token_id
    wrong = by_transformers(reward_model.model, policy.tokenizer, TEXTS)[:, 0]
    right = np.array(reward_model(PROMPTS, COMPLETIONS))
    assert (np.abs(wrong - right) > 1e-3).tolist() == [False, True, True, False]


def test_the_pad_token(tiny_model, tokenizer, model_type: str) -> None:
    rows = len(tokenizer)
    own = RewardModel.from_policy(CausalLMPolicy(tiny_model(model_type, rows), tokenizer, device="cpu"))
    assert own.tokenizer.pad_token == "<pad>" and own.model.get_input_embeddings().weight.shape[0] == rows
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    added = RewardModel.from_policy(CausalLMPolicy(tiny_model(model_type, rows), bare, device="cpu"))
    assert (added.tokenizer.pad_token_id, added.model.config.pad_token_id) == (rows, rows)
    assert added.model.get_input_embeddings().weight.shape[0] == rows + 1 and bare.pad_token is None
    spare = RewardModel.from_policy(CausalLMPolicy(tiny_model(model_type, rows + 3), bare, device="cpu"))
    assert spare.tokenizer.pad_token_id == rows and spare.model.get_input_embeddings().weight.shape[0] == rows + 3


def test_starting_from_a_folder(policy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "lm")
    from_folder = RewardModel.from_pretrained(tmp_path / "lm", seed=3)
    from_policy = RewardModel.from_policy(policy, seed=3)
    np.testing.assert_allclose(from_folder(PROMPTS, COMPLETIONS), from_policy(PROMPTS, COMPLETIONS), atol=1e-5)
    assert from_folder(PROMPTS, COMPLETIONS) != RewardModel.from_policy(policy, seed=4)(PROMPTS, COMPLETIONS)
    trunk = dict(from_policy.model.base_model.named_parameters())
    own = dict(policy.backbone.copy_trunk().named_parameters())
    assert trunk.keys() == own.keys()
    assert not {p.data_ptr() for p in from_policy.parameters()} & {p.data_ptr() for p in policy.parameters()}
    state = torch.get_rng_state()
    RewardModel.from_policy(policy)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for its old name
def test_an_adapter_is_merged(tiny_model, tokenizer) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model("llama", len(tokenizer)), config)
    policy = CausalLMPolicy(adapted, tokenizer, device="cpu")
    reward_model = RewardModel.from_policy(policy)
    assert isinstance(reward_model.model, LlamaForSequenceClassification)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found = reward_model.model.base_model(ids).last_hidden_state
        torch.testing.assert_close(found, adapted.get_base_model().model(ids).last_hidden_state, atol=1e-4, rtol=1e-4)
    assert any("lora" in name for name, _ in policy.model.named_parameters())


# -- scores --------------------------------------------------------------------------------------------------------------


def test_ids_and_texts_have_the_same_scores(policy) -> None:
    reward_model = RewardModel.from_policy(policy)
    generated = policy.generate(["abc", "hello there", "a"], 6, seed=0, num_generations=2)
    scores = reward_model.score_tokens(generated.prompt_ids, generated.prompt_lengths, generated.ids, generated.lengths)
    prompts = ["abc", "hello there", "a"]
    for row in range(6):
        ids = generated.ids[row, : int(generated.lengths[row])].tolist()
        text = prompts[row // 2] + policy.tokenizer.decode(ids)  # special tokens kept, as the ids have them
        assert float(scores[row].detach()) == pytest.approx(alone(reward_model, text), abs=1e-4)
    scores.sum().backward()
    assert all(p.grad is not None for name, p in reward_model.model.named_parameters() if "wte" not in name and "embed" not in name)


def test_per_token_scores_by_hand(policy) -> None:
    reward_model = RewardModel.from_policy(policy, per_token=True)
    prompt, completion = policy.tokenizer("abc")["input_ids"], [8, 9, 10, 2]
    ids = torch.tensor([prompt + completion], device=policy.device)
    with torch.no_grad():
        by_hand = reward_model.model.score(reward_model.model.base_model(ids).last_hidden_state)[0, len(prompt) :, 0]
    found = reward_model(["abc", "abc"], ["", ""], [completion, completion[:2]])
    np.testing.assert_allclose(found[0], by_hand.cpu(), atol=1e-5)
    np.testing.assert_allclose(found[1], by_hand[:2].cpu(), atol=1e-5)  # causal
    tensors = reward_model.score_tokens(
        torch.tensor([[0, *prompt], [0, *prompt]], device=policy.device),
        torch.tensor([3, 3], device=policy.device),
        torch.tensor([completion, [8, 9, 77, 77]], device=policy.device),
        torch.tensor([4, 2], device=policy.device),
    )
    np.testing.assert_allclose(tensors[0].detach().cpu(), by_hand.cpu(), atol=1e-5)
    np.testing.assert_allclose(tensors[1].detach().cpu(), [*found[1], 0, 0], atol=1e-5)
    # The reward of a text is the sum, with the EOS of a finished answer.
    text = policy.tokenizer.decode(completion[:3])
    np.testing.assert_allclose(reward_model.score_texts(["abc"], [text])[0, 0], sum(found[0]), atol=1e-5)
    np.testing.assert_allclose(sum(reward_model(["abc"], [text])[0]), sum(found[0]), atol=1e-5)


def test_a_per_token_model_is_saved_as_one_and_is_no_classifier(policy, tmp_path: Path) -> None:
    reward_model = RewardModel.from_policy(policy, per_token=True)
    reward_model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path)
    assert loaded.per_token
    np.testing.assert_allclose(loaded(["ab"], [""], [[5, 6]]), reward_model(["ab"], [""], [[5, 6]]), atol=1e-6)
    with pytest.raises(ValueError, match=r"scores every token.*RewardModel.from_pretrained"):
        ClassifierReward(tmp_path)
    with pytest.raises(ValueError, match="scores every token"):
        RewardSet.build(reward_model.model)


def test_several_outputs(policy, tmp_path: Path) -> None:
    reward_model = RewardModel.from_policy(policy, output_names=["helpful", "harmless", "true"])
    assert (reward_model.num_outputs, reward_model.output_names) == (3, ["helpful", "harmless", "true"])
    with pytest.raises(ValueError, match=r"3 outputs \(helpful, harmless, true\), so one must be chosen"):
        reward_model(PROMPTS, COMPLETIONS)
    scores = reward_model.score_texts(PROMPTS, COMPLETIONS)
    harmless = reward_model.output("harmless")
    assert harmless.model is reward_model.model and harmless.__name__ == "harmless"
    np.testing.assert_allclose(harmless(PROMPTS, COMPLETIONS), scores[:, 1], atol=1e-6)
    reward_model.save_pretrained(tmp_path)
    np.testing.assert_allclose(ClassifierReward(tmp_path, label="true")(PROMPTS, COMPLETIONS), scores[:, 2], atol=1e-6)
    assert RewardModel.from_pretrained(tmp_path, label=2)(PROMPTS, COMPLETIONS) == pytest.approx(scores[:, 2], abs=1e-5)
    ids = torch.tensor([[5, 6]], device=policy.device)
    assert reward_model.score_tokens(ids, torch.tensor([2], device=policy.device), ids, torch.tensor([2], device=policy.device)).shape == (
        1,
        3,
    )
    segments = segment_level("sub_sentence")(harmless)
    parts = RewardSet.build([segments, reward_model.output("true")], [1.0, 2.0])
    assert parts.names == ("harmless", "true") or list(parts.names) == ["harmless", "true"]


def test_conversations(policy) -> None:
    policy.tokenizer.chat_template = CHAT
    reward_model = RewardModel.from_policy(policy)
    prompt = [{"role": "user", "content": "hello"}]
    as_messages = reward_model([prompt], [[{"role": "assistant", "content": "you"}]])
    as_text = reward_model([prompt], ["you"])
    assert as_messages == as_text == [pytest.approx(alone(reward_model, "user hello<eos>assistant you<eos>"), abs=1e-5)]
    per_token = RewardModel.from_policy(policy, per_token=True)
    assert len(per_token([prompt], ["you"])[0]) == len("you") + 1


def test_normalisation_goes_into_the_weights_where_there_is_a_bias(policy, model_type: str, tmp_path: Path) -> None:
    reward_model = RewardModel.from_policy(policy, seed=2)
    before = np.array(reward_model(PROMPTS, COMPLETIONS))
    found = reward_model.normalise(PROMPTS[:3], COMPLETIONS[:3], unit_std=True)
    mean, std = before[:3].mean(), before[:3].std()
    assert (found.mean[0], found.std[0]) == (pytest.approx(mean, abs=1e-5), pytest.approx(std, abs=1e-5))
    after = np.array(reward_model(PROMPTS, COMPLETIONS))
    np.testing.assert_allclose(after, (before - mean) / std, atol=2e-5)
    reward_model.save_pretrained(tmp_path)
    np.testing.assert_allclose(ClassifierReward(tmp_path)(PROMPTS, COMPLETIONS), after, atol=1e-5)
    np.testing.assert_allclose(RewardModel.from_pretrained(tmp_path)(PROMPTS, COMPLETIONS), after, atol=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).to(policy.device).eval()
    bare = by_transformers(model, AutoTokenizer.from_pretrained(tmp_path), TEXTS)[:, 0]
    # Llama's RMS norm has no bias, and its head none either: there the constant stands in config.json, for textgym to add.
    assert found.in_weights == (model_type != "llama")
    np.testing.assert_allclose(bare + (0 if found.in_weights else model.config.reward_offset[0]), after, atol=2e-5)
    again = reward_model.normalise(PROMPTS, COMPLETIONS)
    assert np.mean(reward_model(PROMPTS, COMPLETIONS)) == pytest.approx(0, abs=1e-5)
    assert again.std[0] == 1.0


def test_normalisation_of_outputs_and_of_tokens(policy) -> None:
    outputs = RewardModel.from_policy(policy, num_outputs=3)
    outputs.normalise(PROMPTS, COMPLETIONS, unit_std=True)
    scores = outputs.score_texts(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scores.std(0), 1, atol=1e-4)
    tokens = RewardModel.from_policy(policy, per_token=True)
    tokens.normalise(PROMPTS, COMPLETIONS)
    each = [score for row in tokens(PROMPTS, COMPLETIONS) for score in row]
    assert np.mean(each) == pytest.approx(0, abs=1e-5)
    assert tokens.score_texts(PROMPTS, COMPLETIONS).mean() == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="`completions` must have rewards that differ"):
        outputs.normalise(PROMPTS[:1], COMPLETIONS[:1], unit_std=True)


# -- where rewards are taken ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_token", [False, True])
def test_environments_pay_it(task, per_token: bool) -> None:
    policy = task.policy()
    reward_model = RewardModel.from_policy(policy, per_token=per_token)
    arguments = {**task.arguments(), "reward": reward_model}
    if not per_token:
        # The tree's tokens are words that need a space between them, so its prompts end with one.
        arguments["prompts"] = [prompt + " " for prompt in task.tree.prompt_texts]
    envs = gym.make_vec("TextGen-v0", num_envs=6, **arguments)
    reference = policy.reference()
    shaped = KLShaping(envs, policy=policy, reference=reference, beta=0.1)
    agent = PPO(policy, shaped, beta=0.1, reference=reference, seed=0, critic=ValueModel.from_classifier(reward_model))
    agent.learn(40)
    env = gym.make("TextGen-v0", **arguments)
    env.reset(seed=0)
    rewards, actions = [], [0, 1, task.tree.eos_token_id][: task.tree.horizon]
    for action in actions:
        _, reward, terminated, _, info = env.step(action)
        rewards.append(reward)
    assert terminated
    if per_token:
        np.testing.assert_allclose(rewards, reward_model([info["prompt"]], [""], [actions])[0], atol=1e-5)
    else:
        assert rewards[:-1] == [0.0] * (len(actions) - 1)
        assert rewards[-1] == pytest.approx(alone(reward_model, info["prompt"] + info["completion"]), abs=1e-5)
        assert info["rewards"]["reward_model"] == pytest.approx(rewards[-1])


def test_a_critic_starts_as_the_reward_model(policy) -> None:
    reward_model = RewardModel.from_policy(policy)
    reward_model.normalise(PROMPTS, COMPLETIONS)
    critic = ValueModel.from_classifier(reward_model, policy.device)
    ids, lengths = torch.tensor([[7, 8, 9]], device=policy.device), torch.tensor([3], device=policy.device)
    values = critic(ids, lengths, torch.tensor([[5, 6]], device=policy.device), torch.tensor([2], device=policy.device))
    score = reward_model.score_tokens(ids[:, :2], lengths - 1, ids[:, 2:], lengths - 2)
    assert float(values[0, 0].detach()) == pytest.approx(float(score[0].detach()), abs=1e-5)


def test_copies(policy) -> None:
    reward_model = RewardModel.from_policy(policy)
    assert copy.deepcopy(reward_model) is reward_model  # Gymnasium copies arguments
    other = reward_model.copy()
    assert other(PROMPTS, COMPLETIONS) == reward_model(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        other.model.score.weight.zero_()
    assert other(PROMPTS, COMPLETIONS) != reward_model(PROMPTS, COMPLETIONS)
    assert pickle.loads(pickle.dumps(reward_model))(PROMPTS, COMPLETIONS) == reward_model(PROMPTS, COMPLETIONS)


def test_dropout_is_off(tiny_model, tokenizer, model_type: str) -> None:
    policy = CausalLMPolicy(tiny_model(model_type, len(tokenizer), dropout=0.5), tokenizer, device="cpu")
    reward_model = RewardModel.from_policy(policy)
    reward_model.model.train()
    assert reward_model(PROMPTS, COMPLETIONS) == reward_model(PROMPTS, COMPLETIONS)
    assert reward_model.score_texts(PROMPTS, COMPLETIONS).tolist() == reward_model.score_texts(PROMPTS, COMPLETIONS).tolist()


def test_bad_arguments(policy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="linear head called `score`"):
        RewardModel(policy.model, policy.tokenizer)
    with pytest.raises(ValueError, match="`label` must be one of"):
        RewardModel.from_policy(policy, label="good")
    with pytest.raises(ValueError, match="`num_outputs` must be"):
        RewardModel.from_policy(policy, num_outputs=0)
    with pytest.raises(ValueError, match="`output_names` must be 2 different names"):
        RewardModel.from_policy(policy, output_names=["a", "a"])
    with pytest.raises(ValueError, match="`path`: no model could be loaded from"):
        RewardModel.from_pretrained(tmp_path)
    RewardModel.from_policy(policy).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="`num_outputs` must be that of the classifier"):
        RewardModel.from_pretrained(tmp_path / "one", num_outputs=2)
    if policy.backbone.max_positions is not None:
        with pytest.raises(ValueError, match="more than the 128 that"):
            RewardModel.from_policy(policy).score_texts(["a" * 200], [""])


STRICT = (
    "{% for m in messages %}{% if loop.index0 > 0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ style or '' }}{{ m.role[0] }}{{ m.content }}.{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


@pytest.mark.parametrize("per_token", [False, True])
def test_begun_answers_and_columns_for_the_template_reach_reward_models(policy: CausalLMPolicy, per_token: bool) -> None:
    model = RewardModel.from_policy(policy, per_token=per_token)
    model.tokenizer.chat_template = STRICT
    prompt = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"}]
    answer, columns = [{"role": "assistant", "content": "ef"}], {"chat_template_kwargs": [{"style": "x"}]}
    (piece,) = model.encode([prompt], [answer])
    assert model.tokenizer.decode(piece.ids).startswith("uabc.adef.")
    (piece,) = model.encode([prompt], [answer], columns)
    assert model.tokenizer.decode(piece.ids).startswith("xuabc.xadef.")
    records = [Comparison(prompt, answer, [{"role": "assistant", "content": "g"}], columns={"chat_template_kwargs": {"style": "x"}})]
    (entry,) = RewardModelTrainer(model, records).examples.entries
    assert [model.tokenizer.decode(one.ids).split(".xa")[1][:3] for one in entry.pieces] == ["def", "dg."]
    assert model([prompt], [answer], **columns) == model([prompt], [answer], **columns) != model([prompt], [answer])


def test_a_policy_completes_rows_with_columns_for_the_template(policy: CausalLMPolicy) -> None:
    policy.tokenizer.chat_template = STRICT
    rows = [{"prompt": [{"role": "user", "content": "abc"}], "chat_template_kwargs": {"style": "x"}, "answer": 1}, "ab"]
    ids, lengths = policy.encode_prompts(rows)
    texts = [policy.tokenizer.decode(row[-length:]) for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
    policy.tokenizer.chat_template = None
    assert texts == ["xuabc.a", "ab"]
