"""Sequence classifiers as rewards: the logit of the last token by length, for every family, with tokenizers of their own."""

import copy
import pickle

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from textgym.errors import RewardError
from textgym.rewards import ClassifierReward, RewardSet

WORDS = ["<pad>", "<bos>", "<eos>", "[CLS]", "[SEP]", "good", "bad", "film", "a", "the", "user", "assistant", ":"]
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}<eos>"


def word_tokenizer(pad: bool = True, frame: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=[(word, i) for i, word in enumerate(WORDS) if word in frame.split()]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>" if pad else None, eos_token="<eos>")


def classifier(family: str, labels: int = 1):
    torch.manual_seed(0)
    small = {"vocab_size": len(WORDS), "num_labels": labels, "initializer_range": 0.5}
    deep = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if family == "gpt2":
        return GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **small)).eval()
    if family == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**deep, **small)).eval()
    if family == "gpt_neox":
        return GPTNeoXForSequenceClassification(GPTNeoXConfig(**deep, **small)).eval()
    if family == "roberta":
        return RobertaForSequenceClassification(RobertaConfig(pad_token_id=0, **deep, **small)).eval()
    return BertForSequenceClassification(BertConfig(**deep, **small)).eval()


DECODERS = ["gpt2", "llama", "gpt_neox"]
TEXTS = [("a film", " good"), ("the film", " bad bad good film"), ("a", " the"), ("good good good", ""), ("the", " film good bad a")]


def one_by_one(model, tokenizer, texts, device="cpu"):
    """The scores of transformers' own forward, each text alone, with no pad id that anything could be compared with."""
    model = copy.deepcopy(model).to(device)
    if not isinstance(model, BertForSequenceClassification | RobertaForSequenceClassification):
        model.config.pad_token_id = None  # then it reads the last column
    with torch.no_grad():
        rows = [torch.tensor([tokenizer(text)["input_ids"]], device=device) for text in texts]
        return [model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, 0].item() for row in rows]


@pytest.mark.parametrize("family", [*DECODERS, "bert", "roberta"])
@pytest.mark.parametrize("pad", [True, False])
def test_scores_equal_those_of_each_text_alone(family, pad, device):
    frame = "[CLS] $A [SEP]" if family in ("bert", "roberta") else None
    model, tokenizer = classifier(family), word_tokenizer(pad, frame)
    reward = ClassifierReward(model, tokenizer, batch_size=2, device=device)
    scores = reward([prompt for prompt, _ in TEXTS], [completion for _, completion in TEXTS])
    expected = one_by_one(model, tokenizer, [prompt + completion for prompt, completion in TEXTS], device)
    assert len(set(np.round(expected, 3))) == len(TEXTS)  # the texts are told apart
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert all(type(score) is float for score in scores)


@pytest.mark.parametrize("family", DECODERS)
def test_a_text_that_ends_with_the_pad_token_is_read_at_its_end(family):
    model, tokenizer = classifier(family), word_tokenizer()
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = ["good film <pad>", "good film <pad> <pad>", "good film", "a good film here there"]
    scores = ClassifierReward(model, tokenizer)([""] * len(texts), texts)
    np.testing.assert_allclose(scores, one_by_one(model, tokenizer, texts), atol=1e-4)
    assert abs(scores[0] - scores[2]) > 1e-3


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_the_filler_id_does_not_matter(family):
    model = classifier(family)
    results = []
    for filler in ("<pad>", "<eos>", "good"):
        tokenizer = word_tokenizer()
        tokenizer.pad_token = filler
        results.append(ClassifierReward(model, tokenizer)(["a film"] * 2, [" good", " bad bad bad"]))
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)
    np.testing.assert_allclose(results[0], results[2], atol=1e-6)


def test_a_pad_token_that_the_model_does_not_know_is_not_used():
    model, tokenizer = classifier("gpt2"), word_tokenizer(pad=False)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id == len(WORDS)
    assert len(ClassifierReward(model, tokenizer)(["a", "a film"], ["", ""])) == 2


def test_special_tokens_are_those_of_its_tokenizer():
    model, tokenizer = classifier("bert"), word_tokenizer(frame="[CLS] $A [SEP]")
    framed = ClassifierReward(model, tokenizer)(["a"], [" film"])
    np.testing.assert_allclose(framed, one_by_one(model, tokenizer, ["a film"]), atol=1e-5)
    bare = ClassifierReward(model, tokenizer, add_special_tokens=False)(["a"], [" film"])
    np.testing.assert_allclose(bare, one_by_one(model, word_tokenizer(), ["a film"]), atol=1e-5)


def test_conversations_go_through_its_chat_template():
    model, tokenizer = classifier("llama"), word_tokenizer(frame="<bos> $A")
    prompt = [{"role": "user", "content": "a film"}]
    completion = [{"role": "assistant", "content": "good film"}]
    reward = ClassifierReward(model, tokenizer)
    with pytest.raises(ValueError, match="the classifier's tokenizer has no chat template"):
        reward([prompt], [completion])
    tokenizer.chat_template = CHAT
    # the template writes every special token itself: no second <bos>
    expected = one_by_one(model, word_tokenizer(), ["user : a film assistant : good film <eos>"])
    np.testing.assert_allclose(reward([prompt], [completion]), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_one_logit_of_several_is_chosen_by_label(family):
    model, tokenizer = classifier(family, labels=3), word_tokenizer()
    model.config.id2label = {0: "neg", 1: "neutral", 2: "pos"}
    model.config.label2id = {"neg": 0, "neutral": 1, "pos": 2}
    ids = torch.tensor([tokenizer("a good film")["input_ids"]])
    model.config.pad_token_id = None
    expected = model(input_ids=ids).logits[0].tolist()
    for label in (0, 1, 2):
        assert ClassifierReward(model, tokenizer, label=label)(["a good"], [" film"])[0] == pytest.approx(expected[label], abs=1e-5)
    assert ClassifierReward(model, tokenizer, label="pos")(["a good"], [" film"])[0] == pytest.approx(expected[2], abs=1e-5)
    with pytest.raises(ValueError, match=r"has 3 labels \(neg, neutral, pos\), so one of its logits must be chosen: .*label="):
        ClassifierReward(model, tokenizer)
    for wrong in ("great", 3, -1):
        with pytest.raises(ValueError, match=r"`label` must be one of \['neg', 'neutral', 'pos'\] or an index below 3, got"):
            ClassifierReward(model, tokenizer, label=wrong)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my-reward-model"
    classifier("gpt2").save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("form", [str, lambda path: path])
def test_a_folder_is_a_reward(folder, form, make_batch):
    rewards = RewardSet.build(form(folder))
    assert rewards.names == ("my-reward-model",)
    batch = make_batch("good", "bad film", prompts=["a ", "the "])
    expected = one_by_one(classifier("gpt2"), word_tokenizer(), ["a good", "the bad film"])
    np.testing.assert_allclose(rewards.terminal(batch)[0], expected, atol=1e-5)


def test_loading_prints_nothing_and_leaves_progress_bars_as_they_were(folder, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    ClassifierReward(folder)(["a"], [" film"])
    assert logging.is_progress_bar_enabled()
    assert capfd.readouterr().err == ""


def test_a_model_finds_its_tokenizer_beside_it(folder, make_batch):
    model = GPT2ForSequenceClassification.from_pretrained(folder)
    rewards = RewardSet.build(model)
    assert rewards.names == ("my-reward-model",)
    expected = one_by_one(classifier("gpt2"), word_tokenizer(), ["a good"])
    np.testing.assert_allclose(rewards.terminal(make_batch("good", prompts=["a "]))[0], expected, atol=1e-5)


def test_a_model_without_a_tokenizer_says_how_to_give_one(make_batch):
    rewards = RewardSet.build(classifier("gpt2"))
    assert rewards.names == ("GPT2ForSequenceClassification",)
    with pytest.raises(
        ValueError, match=r"cannot load the classifier's tokenizer from '' .* give it: ClassifierReward\(model, tokenizer\)"
    ):
        rewards.terminal(make_batch("good"))


def test_pickles_copies_and_types(folder):
    reward = ClassifierReward(folder, dtype=torch.bfloat16)
    assert reward.model.dtype == torch.bfloat16
    assert len(pickle.dumps(reward)) < 3_000  # the model is read again from its folder
    again = pickle.loads(pickle.dumps(reward))
    assert again(["a"], [" film"]) == reward(["a"], [" film"])
    assert again.model is not reward.model
    assert copy.deepcopy(reward) is reward
    given = pickle.loads(pickle.dumps(ClassifierReward(classifier("gpt2"), word_tokenizer())))
    assert given(["a"], [" film"])[0] == pytest.approx(reward(["a"], [" film"])[0], abs=0.05)


def test_a_model_in_training_is_scored_without_dropout_and_goes_on_training():
    model = classifier("gpt2")  # GPT2Config drops out 10 % by default
    quiet = ClassifierReward(model, word_tokenizer())(["a film"], [" good"])
    model.train()
    reward = ClassifierReward(model, word_tokenizer())
    assert reward(["a film"], [" good"]) == quiet
    assert model.training
    assert model.transformer.h[0].training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_text_that_is_too_long(folder):
    with pytest.raises(RewardError, match=r"has 40 tokens of the classifier's tokenizer, more than the 32 it can read; .*truncation=True"):
        ClassifierReward(folder)(["a"], [" film" * 39])
    model, tokenizer = classifier("gpt2"), word_tokenizer()
    expected = one_by_one(model, tokenizer, ["film film good bad"])
    cut = ClassifierReward(model, tokenizer, max_length=4, truncation=True)
    np.testing.assert_allclose(cut(["a bad film"], [" film film good bad"]), expected, atol=1e-5)  # the end is kept
    assert tokenizer.truncation_side == "right"  # the user's object is as it was
    with pytest.raises(RewardError, match="more than the 4 it can read"):
        ClassifierReward(model, tokenizer, max_length=4)(["a bad film"], [" film film good bad"])


def test_a_text_without_tokens_has_no_last_token():
    with pytest.raises(RewardError, match="the text '' has no tokens"):
        ClassifierReward(classifier("gpt2"), word_tokenizer())([""], [""])


def test_what_is_no_classifier_is_refused(tmp_path, folder):
    language_model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(ValueError, match="must be a transformers model for sequence classification or a path of one, got GPT2LMHeadModel"):
        ClassifierReward(language_model, word_tokenizer())
    with pytest.raises(ValueError, match=r"`reward` must be a function, .* got the torch module GPT2LMHeadModel"):
        RewardSet.build(language_model)
    language_model.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="holds a GPT2LMHeadModel, not a model for sequence classification"):
        RewardSet.build(tmp_path / "lm")
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartForSequenceClassification(BartConfig(num_labels=1, vocab_size=len(WORDS), **small))
    with pytest.raises(ValueError, match="a classifier of type 'bart' cannot be a reward here"):
        ClassifierReward(bart, word_tokenizer())


def test_bad_folders_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"holds no `config\.json`"):
        ClassifierReward(tmp_path)
    with pytest.raises(ValueError, match="which is no folder"):
        ClassifierReward(tmp_path / "nowhere")
    classifier("gpt2", labels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="reward `two`: the classifier has 2 labels"):
        RewardSet.build(tmp_path / "two")
    word_tokenizer().save_pretrained(tmp_path / "two")
    assert len(ClassifierReward(tmp_path / "two", label=1)(["a"], [" film"])) == 1


@pytest.mark.parametrize(("option", "value"), [("batch_size", 0), ("max_length", 0)])
def test_bad_options(folder, option, value):
    with pytest.raises(ValueError, match=f"`{option}` must be at least 1, got 0"):
        ClassifierReward(folder, **{option: value})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for its old name
def test_a_lora_adapter_counts(make_batch):
    peft = pytest.importorskip("peft")
    model, tokenizer = classifier("gpt2"), word_tokenizer()
    plain = ClassifierReward(model, tokenizer)(["a film"], [" good"])[0]
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(model, lora)
    (score,) = ClassifierReward(adapted, tokenizer)(["a film"], [" good"])
    adapted.config.pad_token_id = None
    expected = adapted.eval()(input_ids=torch.tensor([tokenizer("a film good")["input_ids"]])).logits.item()
    assert score == pytest.approx(expected, abs=1e-5)
    assert abs(score - plain) > 1e-4
    assert RewardSet.build(adapted).names == ("GPT2ForSequenceClassification",)


STRICT = (
    "{% for m in messages %}{% if loop.index0 > 0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ style ~ ' ' if style else '' }}{{ m.role }} : {{ m.content }} {% endfor %}"
)
BEGUN = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "a"}]


def test_an_answer_that_the_prompt_begins_is_one_message():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = STRICT
    reward = ClassifierReward(classifier("gpt2"), tokenizer)
    answer = [{"role": "assistant", "content": " good"}]
    text = "user : the film assistant : a good "
    assert reward.tokens(BEGUN, answer) == tokenizer(text)["input_ids"]
    assert reward.text(BEGUN, " good") == (text, False)
    assert reward([BEGUN], [answer]) == reward(["user : the film assistant : a"], [" good "])
    assert reward([BEGUN], [answer], chat_template_kwargs=[{"style": "bad"}]) == reward(
        ["bad user : the film bad assistant : a"], [" good"]
    )
    with pytest.raises(ValueError, match=r"reward `GPT2.*`, row 1: the chat template refuses .*must alternate; .*join messages"):
        reward([BEGUN, [*BEGUN[:1], *BEGUN[:1]]], [answer, answer])


def test_a_text_that_begins_with_bos_gets_no_second_one():
    tokenizer = word_tokenizer(frame="<bos> $A")
    reward = ClassifierReward(classifier("gpt2"), tokenizer)
    assert reward.tokens("<bos> a film", " good") == reward.tokens("a film", " good") == [1, 8, 7, 5]
