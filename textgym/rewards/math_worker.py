"""The process in which math-verify runs: `textgym.rewards.math_process` executes this file, which imports nothing of textgym.

math-verify stops what takes too long with an alarm signal, which works in the main thread of a process only, and an alarm does not
interrupt a long computation in C. Here is a main thread of its own, and a process that the caller may kill.

One JSON line in, `{"gold": side, "found": side, "tolerance": "1/100", "timeout": seconds}`, where a side is `{"number": "1/2"}` or
`{"latex": "x^2"}`; one out, `{"equal": ...}`. The first line out is `{}`.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any


def main() -> None:
    """Answers requests until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the libraries print must not get between the answers
    logging.disable()  # a timeout is an answer here, not worth a line
    import math_verify  # noqa: F401  (takes a second)

    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"equal": equal(json.loads(line))}), file=answers, flush=True)


def equal(request: Mapping[str, Any]) -> bool:
    """Returns whether both sides are read whole and have the same value, to within the tolerance."""
    from math_verify import verify
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    seconds: int = request["timeout"]
    gold, found = (value(request[side], seconds) for side in ("gold", "found"))
    if gold is None or found is None:
        return False
    if verify(gold, found, allow_set_relation_comp=True, timeout_seconds=seconds):
        return True
    if request["tolerance"] == "0":
        return False
    try:
        return bool(timeout(timeout_seconds=seconds)(near)(gold, found, request["tolerance"]))
    except (Exception, TimeoutException):  # whatever an algebra system stumbles over has no value that is near
        return False


def value(side: Mapping[str, str], seconds: int) -> Any:
    """Returns the value of a side, None where it is no expression as a whole."""
    import sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    if "number" in side:
        return sympy.Rational(side["number"])
    # Units are gone already; math-verify would take the letter off `3t` as one.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False)
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=rules)
    found = parse(f"${side['latex']}$", [config], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=seconds)
    return found[0] if found else None


def near(gold: Any, found: Any, tolerance: str) -> bool:
    """Returns whether two values, or all parts of two points, sets, intervals or matrices, are at most `tolerance` apart."""
    import sympy

    if isinstance(found, sympy.Eq) and not isinstance(gold, sympy.Eq):
        found = found.rhs
    if isinstance(gold, sympy.Eq) and (not isinstance(found, sympy.Eq) or found.lhs == gold.lhs):
        gold, found = gold.rhs, getattr(found, "rhs", found)
    if isinstance(gold, sympy.Interval) and isinstance(found, sympy.Interval):
        same_ends = (gold.left_open, gold.right_open) == (found.left_open, found.right_open)
        return same_ends and near(gold.start, found.start, tolerance) and near(gold.end, found.end, tolerance)
    parts = [list_of_parts(side) for side in (gold, found)]
    if parts[0] is None or parts[1] is None:
        difference = sympy.N(gold - found, 30)
        return bool(difference.is_real and abs(difference) <= sympy.Rational(tolerance))
    return (
        type(gold) is type(found)
        and len(parts[0]) == len(parts[1])
        and all(near(one, other, tolerance) for one, other in zip(parts[0], parts[1], strict=True))
    )


def list_of_parts(value: Any) -> list[Any] | None:
    """Returns the parts of a compound value, those of a set in the order of their size; None for a value that has none."""
    import sympy

    if isinstance(value, sympy.FiniteSet):
        return sorted(value.args, key=lambda part: (float(sympy.re(part)), float(sympy.im(part))))
    if isinstance(value, sympy.Tuple):
        return list(value.args)
    return list(value.flat()) if isinstance(value, sympy.MatrixBase) else None


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C in a terminal reaches this process too
        main()
