"""Every snippet of docs/reward_models.md runs, in order, and prints what the comments after its `print`s say."""

from typing import Any


def test_every_snippet_says_what_each_print_prints(docs_page: Any) -> None:
    page = docs_page("reward_models.md")
    for snippet in page.snippets:
        assert snippet.count("print(") == len(page.printed(snippet)) > 0, snippet


def test_every_logged_key_is_on_the_page(docs_page: Any) -> None:
    from textgym.agents.reward_model_trainer import RewardModelTrainer

    trainer = object.__new__(RewardModelTrainer)
    trainer.center_coef = 1.0
    page = docs_page("reward_models.md").text
    assert [name for name in ["train/loss", *trainer._metric_names()] if f"`{name}`" not in page] == []
