"""The process in which math-verify runs: `textgym.rewards.numeric` executes this file, which imports nothing of textgym.

math-verify stops what takes too long with an alarm signal, which works in the main thread of a process only, and an alarm does not
interrupt a long computation in C. Here is a main thread of its own, and a process that the caller may kill.

One JSON line in, `{"gold": ..., "text": ..., "timeout": seconds}`; one out, `{"has_gold": ..., "equal": ...}`. The first line out is `{}`.
"""

import contextlib
import json
import logging
import sys


def main() -> None:
    """Answers requests until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the libraries print must not get between the answers
    logging.disable()  # a timeout is an answer here, not worth a line
    from math_verify import parse, verify

    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        seconds = request["timeout"]
        gold = parse(request["gold"], parsing_timeout=seconds)
        equal = bool(gold) and verify(gold, parse(request["text"], parsing_timeout=seconds), timeout_seconds=seconds)
        print(json.dumps({"has_gold": bool(gold), "equal": bool(equal)}), file=answers, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C in a terminal reaches this process too
        main()
