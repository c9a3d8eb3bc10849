"""One known reward, feedback in every form: what an annotator says of the same texts, written, read, and turned into pairs.

The annotator follows Bradley–Terry and Plackett–Luce over the bundled true reward: sure where reviews differ much, undecided where they
are alike. With noise and a liking for long texts it agrees with the reward less often.
"""

from tempfile import TemporaryDirectory

from textgym.bundled import bundled_prompts, true_reward
from textgym.feedback import SyntheticAnnotator, judgements_to_ranking, read_feedback, to_comparisons, write_feedback

TEMPERATURE = 1.0  # in reward
ENDINGS = [" wonderful.", " not bad.", " dull, and the jokes were bad.", " bad. bad. bad. bad."]


def agreement(annotator: SyntheticAnnotator, prompts: list[str]) -> float:
    """The share of pairs in which the annotator prefers the text of the higher reward."""
    pairs = to_comparisons(annotator.judge_pairs(prompts, [ENDINGS] * len(prompts)))
    chosen, rejected = (
        true_reward([pair.prompt for pair in pairs], [getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected")
    )
    return sum(one > other for one, other in zip(chosen, rejected, strict=True)) / len(pairs)


def main() -> None:
    prompts = [row["prompt"] for row in bundled_prompts("train") if row["prompt"].endswith((" was", " were"))]
    annotator = SyntheticAnnotator("film-review-true", temperature=TEMPERATURE, seed=0)
    rankings, judged = (give(prompts, [ENDINGS] * len(prompts)) for give in (annotator.rank, annotator.judge_pairs))
    labels = annotator.label(prompts, [ENDINGS[0]] * len(prompts))
    with TemporaryDirectory() as folder:
        write_feedback(f"{folder}/feedback.jsonl", [*rankings, *judged, *labels])
        feedback = read_feedback(f"{folder}/feedback.jsonl")
    print(f"{len(feedback)} records on {len(prompts)} prompts; {len(to_comparisons([*rankings, *judged]))} pairs among them")

    print(f"{prompts[0]} ...")
    for text, rank, score in zip(ENDINGS, rankings[0].ranks, true_reward([prompts[0]] * len(ENDINGS), ENDINGS), strict=True):
        print(f"  ranked {rank}, reward {score:5.2f} {text}")
    circles = 0
    for record in judged:
        try:
            judgements_to_ranking(record)
        except ValueError:
            circles += 1
    print(f"{circles} of {len(judged)} prompts were judged in circles")
    print(f"{sum(label.good for label in labels)} of {len(labels)} of the first kind were labelled good")

    failings = {"exact": {"temperature": 0.0}, "as above": {}, "noisy": {"label_noise": 0.2}, "likes words": {"length_bias": 0.2}}
    for name, options in failings.items():
        other = SyntheticAnnotator("film-review-true", **{"temperature": TEMPERATURE, **options})
        print(f"{name:12} {agreement(other, prompts):.0%} as the reward")


if __name__ == "__main__":
    main()
