import json

import numpy as np
import pytest

from textgym.agents import BestOfN, CausalLMPolicy, compare_policies, evaluate_policy
from textgym.exact.models import tiny_lm
from textgym.kl import best_of_n_kl


def rows(task, copies=10):
    """Prompts with a text each, "w0 w1": the completion 0, 1, EOS of the tree."""
    return [{"prompt": text, "reference": "w0 w1"} for text in task.tree.prompt_texts * copies]


def gold(prompts, completion_ids, **columns):
    return [-float(len(ids)) for ids in completion_ids]


def test_policy_against_policy_counts_what_was_sampled(task):
    first, second = task.policy(0), task.policy(1)
    report = compare_policies(first, rows(task), second, reward=task.reward, true_reward=gold, max_new_tokens=3, seed=4)
    texts = [policy.generate(task.tree.prompt_texts * 10, 3, seed=4) for policy in (first, second)]
    proxies = [task.reward(prompts=task.tree.prompt_texts * 10, completion_ids=one.completion_ids) for one in texts]
    assert [sample["A"]["completion"] for sample in report.samples] == texts[0].texts
    assert [sample["B"]["reward"] for sample in report.samples] == proxies[1]
    difference = np.subtract(*proxies)
    assert report.win_rates["reward"].rate == pytest.approx(np.mean(difference > 0) + 0.5 * np.mean(difference == 0))
    shorter = texts[0].lengths < texts[1].lengths
    assert report.win_rates["true_reward"].wins == int(shorter.sum())
    assert report.sides[0].rewards["reward"].mean == pytest.approx(np.mean(proxies[0]))
    assert report.sides[1].texts.tokens == pytest.approx(float(texts[1].lengths.float().mean()))
    assert report.sides[0].texts.ended == pytest.approx(np.mean([reason == "eos" for reason in texts[0].finish_reasons]))


def test_a_policy_against_itself_ties(task):
    policy = task.policy()
    report = compare_policies(policy, rows(task), policy, reward=task.reward, max_new_tokens=3)
    assert report.win_rates["reward"].ties == 30 and report.win_rates["reward"].rate == 0.5


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_k": 2}])
def test_the_kl_is_that_of_evaluation_in_the_environment(task, sampling):
    policy, reference = task.policy(1, **sampling), task.policy(0).reference()
    report = compare_policies(policy, task.tree.prompt_texts, reference=reference, max_new_tokens=3, seed=5, num_generations=1)
    found = evaluate_policy(policy, task.envs(num_envs=3), reference, seed=5)
    assert report.sides[0].kl_per_sequence.mean == pytest.approx(found.kl_mean, abs=1e-4)


def test_the_kl_of_a_policy_to_itself_is_zero_and_of_its_best_of_n_the_bound(task):
    policy = task.policy()
    report = compare_policies(
        BestOfN(policy, task.reward, n=4), rows(task), policy, reward=task.reward, reference=policy.reference(), max_new_tokens=3
    )
    assert report.sides[0].kl_per_sequence.mean == pytest.approx(best_of_n_kl(4), abs=1e-5)
    assert report.sides[1].kl_per_sequence.mean == pytest.approx(0.0, abs=1e-5)
    assert (report.sides[0].kl_is_bound, report.sides[1].kl_is_bound) == (True, False)
    row = next(row for row in report.table() if row[0].startswith("KL"))
    assert row[1:] == ["at most 0.636", "0.000 [0.000, 0.000]"]
    assert (report.sides[0].reward_queries, report.sides[1].reward_queries) == (120, 0)
    assert report.win_rates["reward"].low > 0.5


def test_against_the_texts_of_a_column(task):
    reference = task.policy().reference()
    report = compare_policies(
        task.policy(), rows(task), "reference", reward=task.reward, true_reward=gold, reference=reference, max_new_tokens=3
    )
    given = report.sides[1]
    tree = task.tree
    place = next(j for j in range(tree.num_completions) if tree.ids(j) == (0, 1, tree.eos_token_id))
    assert given.rewards["reward"].mean == pytest.approx(tree.rewards[:, place].mean())
    assert given.perplexity.nats_per_token == pytest.approx(-tree.log_probs(reference)[:, place].mean() / 3, abs=1e-4)
    assert given.texts.tokens == 3 and given.texts.ended == 1.0
    assert given.kl_per_sequence is None and report.over_optimisation is None


def test_several_completions_per_prompt_are_compared_with_the_one_text(task):
    judged = []

    def judge(prompt, first, second):
        judged.append((prompt, first, second))
        return "first" if len(first) > len(second) else "second"

    report = compare_policies(
        task.policy(), rows(task, 2), "reference", judge=judge, reward=task.reward, num_generations=4, max_new_tokens=3
    )
    rate = report.win_rates["judge"]
    assert rate.wins + rate.ties + rate.losses == 24 and len(judged) == 48
    assert all(" w0 w1" in pair for pair in judged for pair in [pair[1:]])
    reward = report.win_rates["reward"]
    assert reward.wins + reward.ties + reward.losses == 24
    assert len(report.samples) == 24 and {sample["B"]["completion"] for sample in report.samples} == {" w0 w1"}


def test_the_policy_alone(task):
    report = compare_policies(task.policy(), task.tree.prompt_texts, max_new_tokens=3)
    assert len(report.sides) == 1 and report.win_rates == {}
    assert all(len(row) == 2 for row in report.table())


def test_batches_do_not_mix_up_prompts(task):
    for batch_size in (4, 64):
        report = compare_policies(task.policy(), rows(task), reward=task.reward, max_new_tokens=3, num_generations=2, batch_size=batch_size)
        assert [sample["prompt"] for sample in report.samples] == [text for text in task.tree.prompt_texts * 10 for _ in range(2)]
        ids = [task.tree.tokenizer()(sample["A"]["completion"])["input_ids"] for sample in report.samples]
        ended = [one if len(one) == 3 else [*one, task.tree.eos_token_id] for one in ids]
        # `reward` scores the completion with the prompt of its own row.
        expected = task.reward(prompts=[sample["prompt"] for sample in report.samples], completion_ids=ended)
        assert [sample["A"]["reward"] for sample in report.samples] == expected


def test_the_hacking_report_has_b_as_before(task):
    report = compare_policies(
        BestOfN(task.policy(), task.reward, 16), rows(task, 40), task.policy(), reward=task.reward, true_reward=gold, max_new_tokens=3
    )
    hacking = report.over_optimisation
    assert hacking.proxy.after.mean == pytest.approx(report.sides[0].rewards["reward"].mean)
    assert hacking.proxy.direction == 1


def test_other_tokens_have_no_kl_and_are_read_again(task):
    """The reference has the words of the policy under other ids, and says of the texts what it says of its own tokens."""
    tree = task.tree
    plain = task.policy().reference()
    tokenizer = tree.tokenizer()
    tokenizer.add_tokens(["other"])
    model = tiny_lm(tree)
    model.resize_token_embeddings(6, mean_resizing=False)
    other = CausalLMPolicy(model, tokenizer, device=task.device).reference()
    report = compare_policies(task.policy(), rows(task), "reference", reference=other, max_new_tokens=3)
    assert report.sides[0].kl_per_sequence is None
    assert report.sides[1].perplexity.tokens == 90
    assert compare_policies(task.policy(), rows(task), reference=plain, max_new_tokens=3).sides[0].kl_per_sequence is not None


def test_it_is_repeatable_readable_and_storable(task):
    def report(seed):
        return compare_policies(
            task.policy(0),
            rows(task),
            task.policy(1),
            reward=task.reward,
            true_reward=gold,
            reference=task.policy().reference(),
            seed=seed,
            max_new_tokens=3,
            names=("trained", "start"),
        )

    first = report(0)
    assert (
        json.loads(json.dumps(first.to_dict()))
        == json.loads(json.dumps(report(0).to_dict()))
        != json.loads(json.dumps(report(1).to_dict()))
    )
    text = first.to_markdown()
    assert "| trained |" in text.splitlines()[0].replace("  ", "")
    assert "trained against start by true reward: " in text and "Verdict: " in text
    labels = [row[0] for row in first.table()]
    assert labels[:2] == ["reward", "true reward"] and "perplexity under the reference" in labels


def test_wrong_arguments_are_errors(task):
    with pytest.raises(ValueError, match=r"the columns are \['reference'\]"):
        compare_policies(task.policy(), rows(task), "answer")
    with pytest.raises(ValueError, match="in row 1"):
        compare_policies(task.policy(), [{"prompt": "w0", "text": "w1"}, {"prompt": "w1"}], "text")
    with pytest.raises(ValueError, match="CausalLMPolicy or a BestOfN"):
        compare_policies(task.policy().model, rows(task))
    with pytest.raises(ValueError, match="batch_size"):
        compare_policies(task.policy(), rows(task), batch_size=0)


def test_conversations_reach_rewards_as_messages_and_references_follow_the_template(task):
    tokenizer = task.tree.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    policy = CausalLMPolicy(tiny_lm(task.tree), tokenizer, device=task.device)
    prompts = [{"prompt": [{"role": "user", "content": text}], "reference": "w0 w1"} for text in task.tree.prompt_texts]
    seen = []

    def reward(prompts, completions, completion_ids, **_):
        seen.extend(completions)
        return task.reward(prompts=[prompt[0]["content"] for prompt in prompts], completion_ids=completion_ids)

    report = compare_policies(BestOfN(policy, reward, 2), prompts, "reference", reward=reward, true_reward=reward, max_new_tokens=3)
    assert all(messages[0]["role"] == "assistant" for messages in seen) and len(seen) == 6 + 2 * 6
    place = next(j for j in range(task.tree.num_completions) if task.tree.ids(j) == (0, 1, task.tree.eos_token_id))
    assert report.sides[1].rewards["reward"].mean == pytest.approx(task.tree.rewards[:, place].mean())
    hacking = compare_policies(BestOfN(policy, reward, 2), prompts, policy, reward=reward, true_reward=reward, max_new_tokens=3)
    assert hacking.over_optimisation.gold == hacking.over_optimisation.proxy
    assert json.dumps(hacking.to_dict()) and "Verdict" in hacking.to_markdown()
