"""Every reward of the package is a reward function of TRL: called with all that TRL's trainers pass, it gives what it gives here."""

import asyncio
import inspect
import types

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import textgym.rewards
from textgym.agents import RewardEnsemble, RewardModel
from textgym.bundled import bundled_reward_model_path
from textgym.rewards import (
    BertScoreReward,
    ClassifierReward,
    ExactMatchReward,
    InBackground,
    JsonReward,
    LengthReward,
    LexiconReward,
    RegexReward,
    RepetitionPenalty,
    make_reward,
    reward_names,
)

TEXTS = {"prompts": ["the film", "a film"], "completions": [" was good .", " was a bore ."]}
COLUMNS = {"answer": ["was good .", "7"], "reference": ["was good .", "was bad ."], "source": [1, 2]}
LOGGED: list = []
TRL = {  # `GRPOTrainer._calculate_rewards`
    **TEXTS,
    **COLUMNS,
    "completion_ids": [[4, 5, 6], [4, 7, 8, 6]],
    "trainer_state": types.SimpleNamespace(global_step=3),
    "log_extra": lambda column, values: LOGGED.append(column),
    "log_metric": lambda name, value: LOGGED.append(name),
    "environments": [object(), object()],
}
CONVERSATIONS = TRL | {
    "prompts": [[{"role": "user", "content": text}] for text in TEXTS["prompts"]],
    "completions": [[{"role": "assistant", "content": text}] for text in TEXTS["completions"]],
}


def tiny_encoder() -> tuple[BertModel, PreTrainedTokenizerFast]:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", "was", "good", "bad", "."])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    size = {"vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertModel(BertConfig(**size)).eval(), PreTrainedTokenizerFast(tokenizer_object=words, pad_token="?")


@pytest.fixture
def options(tmp_path):
    """What the rewards need that cannot be made of their name alone."""
    (tmp_path / "words.tsv").write_text("good\t2\nbore\t-2\n", encoding="utf-8")
    encoder, tokenizer = tiny_encoder()
    return {
        "bert-score": {"model": encoder, "tokenizer": tokenizer},
        "classifier": {"model": str(bundled_reward_model_path())},
        "lexicon": {"path": tmp_path / "words.tsv"},
        "regex": {"pattern": "good"},
    }


@pytest.mark.parametrize("name", reward_names())
def test_every_named_reward_takes_all_that_trl_passes(name, options):
    reward = make_reward(name, **options.get(name, {}))
    assert isinstance(reward.__name__, str)
    scores = reward(**TRL)
    assert len(scores) == 2 and all(one is None or isinstance(one, float) for one in scores)
    wanted = inspect.signature(reward).parameters
    own = {key: value for key, value in TRL.items() if key in wanted or key in COLUMNS}
    assert scores == reward(**own)


@pytest.mark.parametrize("name", [name for name in reward_names() if name not in ("film-review", "classifier")])
def test_every_named_reward_takes_conversations(name, options):
    assert len(make_reward(name, **options.get(name, {}))(**CONVERSATIONS)) == 2


def test_every_exported_class_is_covered():
    covered = {type(make_reward(name, **more)) for name, more in (("regex", {"pattern": "a"}), ("json", {}), ("length", {}))}
    exported = {one for one in vars(textgym.rewards).values() if isinstance(one, type) and "__call__" in vars(one)}
    assert covered < exported
    for one in exported:
        parameters = inspect.signature(one.__call__).parameters.values()
        assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters) or one.__name__ in ("Sentences", "TokenCount"), one


def test_objects_that_were_made_without_a_name_have_that_of_their_class():
    class Short(LengthReward):
        pass

    assert Short(target=3).__name__ == "Short" and Short(target=3)(**TRL) == [1.0, pytest.approx(2 / 3)]
    rewards = [RegexReward("good"), ExactMatchReward(), JsonReward(), RepetitionPenalty(), LexiconReward({"good": 1.0})]
    assert [one.__name__ for one in rewards] == ["RegexReward", "ExactMatchReward", "JsonReward", "RepetitionPenalty", "LexiconReward"]
    assert make_reward("length").__name__ == "length" and LengthReward().__name__ == "LengthReward"


def test_rewards_in_the_background_pass_on_what_their_function_takes():
    good = InBackground(lambda completions: [float("good" in text) for text in completions])
    assert asyncio.run(good(**TRL)) == [1.0, 0.0]
    assert asyncio.run(InBackground("length")(**TRL)) == [3.0, 4.0]


def test_reward_models_and_ensembles():
    model = RewardModel.from_pretrained(bundled_reward_model_path(), device="cpu")
    assert model(**TRL) == model(**TEXTS) == pytest.approx(ClassifierReward(bundled_reward_model_path())(**TRL))
    assert RewardEnsemble([model, model.copy()])(**TRL) == pytest.approx(model(**TRL))
    assert isinstance(BertScoreReward(tiny_encoder()[0], tokenizer=tiny_encoder()[1])(**TRL)[0], float)


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_in_trl_itself(tmp_path):
    """The reward path of a real trainer, for all rewards that need no column, side by side."""
    pytest.importorskip("trl")
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from textgym.bundled import bundled_model_path

    rewards = [make_reward(name) for name in ("film-review", "film-review-true", "length", "repetition", "json")] + [RegexReward("good")]
    settings = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=1, report_to=[],
        use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(bundled_model_path()),
        rewards,
        settings,
        train_dataset=datasets.Dataset.from_list([{"prompt": "the film", "source": i} for i in range(4)]),
        processing_class=AutoTokenizer.from_pretrained(bundled_model_path()),
    )
    assert trainer.reward_func_names[-1] == "RegexReward"
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert logged and all(f"rewards/{name}/mean" in logged[0] for name in ("true_reward", "length", "repetition"))
