import gymnasium as gym
import numpy as np
import pytest

from textgym.agents import RLOO, SFT, WinRateEvaluation, evaluate_policy


def logged(agent, evaluation):
    evaluation.run(agent)
    return dict(agent.logger.name_to_value)


@pytest.fixture
def held_out(task):
    arguments = task.arguments()
    arguments["prompts"] = [{"prompt": text, "reference": "w0"} for text in task.tree.prompt_texts]

    def short(completion_ids, **_):
        return [-float(len(ids)) for ids in completion_ids]

    return gym.make_vec("TextGen-v0", num_envs=6, **{**arguments, "reward": [task.reward, short], "reward_weights": [1.0, 0.0]})


def agent_of(task, **options):
    return RLOO(task.policy(), task.envs(8), num_generations=4, learning_rate=5e-3, beta=0.0, seed=0, **options)


def test_against_itself_everything_ties(task, held_out):
    agent = agent_of(task)
    values = logged(agent, WinRateEvaluation(held_out, episodes=60))
    assert values["eval/win_rate"] == values["eval/win_rate_low"] == values["eval/win_rate_high"] == 0.5
    assert "eval/reward_mean" in values  # what every evaluation logs


@pytest.mark.filterwarnings("ignore:No prompt had two completions")  # it learns until none has
def test_training_beats_the_start(task, held_out):
    evaluation = WinRateEvaluation(held_out, interval=20, episodes=120)
    agent = agent_of(task, evaluation=evaluation)
    agent.learn(8 * 2 * 80)
    assert evaluation.last_win_rate.low > 0.5
    # The number itself, from the rewards of both policies on the same prompts.
    rewards = [evaluate_policy(policy, held_out, None, episodes=120, seed=0).rewards for policy in (agent.policy, agent.reference)]
    evaluation.run(agent)
    difference = np.subtract(*rewards)
    assert evaluation.last_win_rate.rate == pytest.approx(np.mean(difference > 0) + 0.5 * np.mean(difference == 0))


def test_against_a_column(task, held_out):
    agent = agent_of(task)
    evaluation = WinRateEvaluation(held_out, "reference", episodes=600)
    evaluation.run(agent)
    tree = task.tree
    place = next(j for j in range(tree.num_completions) if tree.ids(j) == (0, tree.eos_token_id))
    result = evaluate_policy(agent.policy, held_out, None, episodes=600, seed=0)
    difference = result.rewards - np.tile(tree.rewards[:, place], 200)
    equal = np.abs(difference) < 1e-6  # the same text: rewards come out of the environment as float32
    assert equal.any()
    assert (evaluation.last_win_rate.ties, evaluation.last_win_rate.wins) == (equal.sum(), (difference > 1e-6).sum())


def test_by_a_part_of_the_reward_and_by_a_judge(task, held_out):
    agent = agent_of(task)
    by_part = WinRateEvaluation(held_out, "reference", judge="short", episodes=60)
    by_part.run(agent)
    lengths = by_part.last.lengths
    assert by_part.last_win_rate.wins == int((lengths < 2).sum())
    by_judge = WinRateEvaluation(held_out, "reference", judge=lambda prompt, first, second: "tie", episodes=60)
    by_judge.run(agent)
    assert by_judge.last_win_rate.ties == 60


def test_against_another_policy(task, held_out):
    evaluation = WinRateEvaluation(held_out, task.policy(7), episodes=60)
    evaluation.run(agent_of(task))
    rewards = [evaluate_policy(task.policy(seed), held_out, None, episodes=60, seed=0).rewards for seed in (0, 7)]
    assert evaluation.last_win_rate.wins == int((rewards[0] > rewards[1]).sum())


def test_offline_agents_need_an_opponent(task, held_out):
    examples = [{"prompt": "w0", "completion": "w1"}]
    with pytest.raises(ValueError, match="`opponent` must be given"):
        WinRateEvaluation(held_out, episodes=6).run(SFT(task.policy(), examples))
    agent = SFT(task.policy(), examples, evaluation=WinRateEvaluation(held_out, "reference", interval=1, episodes=6))
    agent.learn()
    assert agent.evaluation.last_win_rate is not None


def test_wrong_arguments_are_errors(task, held_out):
    with pytest.raises(ValueError, match=r"the columns are \['reference'\]"):
        WinRateEvaluation(held_out, "answer")
    with pytest.raises(ValueError, match="name of a reward of the environment"):
        WinRateEvaluation(held_out, "reference", judge="gold", episodes=6).run(agent_of(task))


@pytest.mark.parametrize("opponent", [None, "reference"])
def test_the_opponent_is_sampled_and_scored_once(task, held_out, opponent):
    evaluation = WinRateEvaluation(held_out, opponent, episodes=12)
    agent = agent_of(task)
    queries = []
    for _ in range(3):
        before = task.reward.rows
        evaluation.run(agent)
        queries.append(task.reward.rows - before)
    assert queries == [24, 12, 12]
