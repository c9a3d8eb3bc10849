"""Every kind of sequence classifier of transformers as a reward: right by itself, whatever stands beside it, or refused in a sentence."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from textgym.agents import CausalLMPolicy, RewardModel
from textgym.errors import RewardError
from textgym.rewards import BertScoreReward, ClassifierReward
from textgym.rewards.model_trials import batches

WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim")
FEED_FORWARD = ("hidden_dim", "intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "num_key_value_heads",
)
SIZES = {
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(FEED_FORWARD, 48),
    **dict.fromkeys(LAYERS, 2),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(("head_dim", "d_head", "d_kv"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "max_position_embeddings": 64, "n_positions": 64, "vocab_size": 60},
    **{"num_labels": 1, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
}
SPECIAL = {
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 1, "num_blocks": 1, "num_self_attention_heads": 4}
    | {"num_cross_attention_heads": 4},
    "longformer": {"attention_window": 8},
}
REFUSED = {"big_bird", "canine"}  # of those that can be made so small and are neither encoder-decoders nor of a refused type
SHORT, OTHER, LONG = "w31 w33 w35 w32 w40", "w41 w42 w43 w44 w45", " ".join(f"w{30 + i % 20}" for i in range(50))


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2")


def tiny(kind, auto=AutoModelForSequenceClassification, **more):
    """A random model of a kind; None where these settings do not make a small one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = AutoConfig.for_model(kind, **{**SIZES, **SPECIAL.get(kind, {}), **more})
            with torch.device("meta"):
                if sum(parameter.numel() for parameter in auto.from_config(config).parameters()) > 2_000_000:
                    return None
            torch.manual_seed(0)
            model = auto.from_config(config).eval()
        except Exception:
            return None
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


COUNTS = {"right": 0, "refused": 0, "not made": 0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES))
def test_every_kind_of_classifier(kind):
    model = tiny(kind)
    if model is None:
        COUNTS["not made"] += 1
        return
    tokenizer = word_tokenizer()
    try:
        reward = ClassifierReward(model, tokenizer, truncation=True)
        alone, *_ = reward(prompts=[""], completions=[SHORT])
        assert len(reward(prompts=["", ""], completions=[LONG * 3, "w40"])) == 2  # the first is cut
    except ValueError as error:  # `RewardError` is one
        COUNTS["refused"] += 1
        assert "cannot be" in str(error) or kind in REFUSED
        return
    COUNTS["right"] += 1
    close = pytest.approx(alone, rel=1e-4, abs=1e-5)
    ids = torch.tensor([tokenizer(SHORT)["input_ids"]])
    with torch.no_grad():
        bare = model(input_ids=ids, **({"use_cache": False} if "score" in dict(model.named_children()) else {})).logits[0, 0].item()
    assert bare == close
    for row, texts in enumerate([[SHORT, LONG], [OTHER, SHORT], [LONG, OTHER, SHORT]]):
        assert reward(prompts=[""] * len(texts), completions=texts)[texts.index(SHORT)] == close, row


def test_most_kinds_were_made_and_are_right():
    if sum(COUNTS.values()) == len(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES):  # in one process, after all of them
        assert COUNTS["right"] >= 75 and COUNTS["not made"] <= 35, COUNTS


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text", "esm", "xlm-roberta-xl"])
def test_positions_that_begin_behind_the_pad_id(kind):
    """64 positions of which the first two are not for tokens: 62 tokens fit."""
    model, tokenizer = tiny(kind), word_tokenizer()
    text = " ".join(["w7"] * 62)
    reward = ClassifierReward(model, tokenizer)
    assert len(reward(prompts=[""], completions=[text])) == 1
    with pytest.raises(RewardError, match=r"has 63 tokens .* more than the 62 it can read"):
        reward(prompts=[""], completions=[text + " w7"])
    cut = ClassifierReward(model, tokenizer, truncation=True)(prompts=[""] * 2, completions=["w9 " * 40 + text, text])
    assert cut[0] == pytest.approx(cut[1], rel=1e-4)
    with pytest.raises(ValueError, match="`max_length` must be at most 62, the positions that the model has, got 64"):
        ClassifierReward(model, tokenizer, max_length=64)(prompts=[""], completions=["w9"])
    assert len(ClassifierReward(model, tokenizer, max_length=20, truncation=True).tokens("", text)) == 20


@pytest.mark.parametrize(
    ("kind", "limit"), [("bert", 64), ("roberta", 62), ("mpnet", 62), ("fnet", 64), ("convbert", 64), ("roformer", 64)]
)
def test_embeddings_of_encoders(kind, limit):
    """BERTScore: long texts are cut, and a text's score does not depend on the others."""
    reward = BertScoreReward(tiny(kind, AutoModel), tokenizer=word_tokenizer())
    alone = reward(completions=[SHORT], reference=[OTHER])
    together = reward(completions=[SHORT, LONG * 3, OTHER], reference=[OTHER, SHORT, SHORT])
    assert alone[0] == pytest.approx(together[0], rel=1e-5)
    assert reward._limit == limit
    with pytest.raises(ValueError, match=f"`max_length` must be at most {limit}, "):
        BertScoreReward(tiny(kind, AutoModel), tokenizer=word_tokenizer(), max_length=70)(completions=["w5"], reference=["w6"])


@pytest.mark.parametrize("kind", ["fnet", "convbert", "mobilebert", "yoso", "nystromformer"])
def test_encoders_that_read_their_padding(kind):
    reward = ClassifierReward(tiny(kind), word_tokenizer(), batch_size=2)
    texts = [SHORT, LONG, OTHER, "w9 w31", SHORT + " w8"]
    alone = [reward(prompts=[""], completions=[text])[0] for text in texts]
    assert reward(prompts=[""] * 5, completions=texts) == pytest.approx(alone, rel=1e-4)


def test_models_that_cannot_serve_say_why():
    with pytest.raises(ValueError, match="must have `attention_type='original_full'`, got 'block_sparse'"):
        ClassifierReward(tiny("big_bird"), word_tokenizer())(prompts=[""], completions=["w5"])
    full = ClassifierReward(tiny("big_bird", attention_type="original_full"), word_tokenizer())
    assert full(prompts=[""] * 2, completions=[SHORT, LONG])[0] == pytest.approx(full(prompts=[""], completions=[SHORT])[0], rel=1e-4)
    with pytest.raises(RewardError, match="CanineForSequenceClassification cannot read one of the texts: max_pool1d"):
        ClassifierReward(tiny("canine"), word_tokenizer())(prompts=[""], completions=["w5 w6"])

    random = tiny("bert")
    random.bert.embeddings.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
    with pytest.raises(ValueError, match="a text gets another result each time"):
        ClassifierReward(random, word_tokenizer())(prompts=[""], completions=["w5"])


def test_rotary_positions_that_depend_on_the_longest_text():
    """Phi-3's two sets of frequencies: one batch must not hold texts of both; dynamic ones stay stretched, so texts end before."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 10000.0}
    long = tiny("phi3", original_max_position_embeddings=16, rope_parameters=factors | {"original_max_position_embeddings": 16})
    reward = ClassifierReward(long, word_tokenizer())
    alone = reward(prompts=[""], completions=[SHORT])[0]
    assert reward(prompts=[""] * 2, completions=[SHORT, LONG])[0] == pytest.approx(alone, rel=1e-4)
    dynamic = tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert RewardModel(dynamic, word_tokenizer(), device="cpu").limit == 64


def test_batches_of_one_length_and_of_one():
    assert list(batches([3, 1, 3, 2, 1], 2, "any")) == [[1, 4], [3, 0], [2]]
    assert list(batches([3, 1, 3, 2, 1], 2, "same length")) == [[1, 4], [3], [0, 2]]
    assert list(batches([3, 1], 8, "alone")) == [[1], [0]]
    assert list(batches([], 8, "any")) == []


def test_the_folder_s_own_tokenizer(tmp_path):
    """A model type whose `AutoTokenizer` takes a class of its own, whatever the file says."""
    size = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    language_model = Qwen2ForCausalLM(Qwen2Config(**size, intermediate_size=48, initializer_range=0.3, eos_token_id=2))
    model = RewardModel.from_policy(CausalLMPolicy(language_model, word_tokenizer(), device="cpu"))
    model.save_pretrained(tmp_path)
    row = (["w5 w6"], [" w7 w8"])
    expected = pytest.approx(model(*row), abs=1e-5)
    assert ClassifierReward(tmp_path)(*row) == expected == RewardModel.from_pretrained(tmp_path, device="cpu")(*row)
    assert ClassifierReward(AutoModelForSequenceClassification.from_pretrained(tmp_path))(*row) == expected
    language_model.model.save_pretrained(tmp_path / "encoder")
    model.tokenizer.save_pretrained(tmp_path / "encoder")
    by_path, by_hand = BertScoreReward(tmp_path / "encoder"), BertScoreReward(language_model.model, tokenizer=model.tokenizer)
    texts = {"completions": ["w5 w6"], "reference": ["w5 w8"]}
    assert by_path(**texts) == pytest.approx(by_hand(**texts), abs=1e-5)


def test_an_adapter_s_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    for load in (ClassifierReward, RewardModel.from_pretrained):
        with pytest.raises(ValueError, match=r"holds an adapter, not a model\. Merge it first: .*merge_and_unload"):
            load(str(tmp_path))
