import pytest

from textgym.cli import timing


def test_candidates_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    values = {"a": iter([100.0, 3.0, 1.0, 2.0]), "b": iter([0.0, 7.0, 5.0, 9.0])}

    def candidate(name: str):
        def measure() -> float:
            calls.append(name)
            return next(values[name])

        return measure

    seen: list[int] = []
    found = timing.alternate({"a": candidate("a"), "b": candidate("b")}, 3, measured=lambda: seen.append(len(calls)))
    assert found == {"a": 2.0, "b": 7.0}
    assert calls == ["a", "b"] * 4 and seen == list(range(1, 9))


def test_a_slow_candidate_is_measured_once() -> None:
    counts = {"fast": 0, "slow": 0}

    def candidate(name: str):
        def measure() -> float:
            counts[name] += 1
            return float(counts[name])

        return measure

    found = timing.alternate({name: candidate(name) for name in counts}, 4, once={"slow"})
    assert counts == {"fast": 5, "slow": 2}
    assert found == {"fast": 3.5, "slow": 2.0}


@pytest.mark.parametrize(("amount", "rate"), [(10, 4.0), (None, 0.4)])
def test_work_per_second(amount, rate, monkeypatch) -> None:
    clock = iter([1.0, 3.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.per_second(lambda: amount)() == pytest.approx(rate)
