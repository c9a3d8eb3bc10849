"""Plain reward functions that are waited for as async ones are."""

import asyncio
import contextvars
import functools
import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from textgym.rewards.calling import read_parameters
from textgym.rewards.dense import dense_kind, marked
from textgym.rewards.resolve import loaded_reward, resolve_reward


class InBackground:
    """Runs a reward in a thread of its own, so that other rewards, the reference's scores and the next completions need not wait for it.

    For functions that wait for others: a service, a process, another device. One that computes in Python takes turns with the rest of the
    program and gains nothing; one that uses the model in training would see it in the middle of something else. It is never run twice at
    once. A call that is given up (Ctrl-C, an error elsewhere) goes on to its end, nobody reads its result, and the next one begins then.

    Args:
        reward: a plain reward in any form that `RewardSet.build` takes as one; async functions need no such thing.

    Raises:
        ValueError: `reward` is no reward, or async.
    """

    def __init__(self, reward: Any) -> None:
        name, function = resolve_reward(loaded_reward(reward))
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            raise ValueError(f"`reward` must be a plain function, got the async function {name}, which runs in the background as it is.")
        functools.update_wrapper(self, function, updated=())  # its parameters
        self.__name__ = name
        if (kind := dense_kind(function)) is not None:
            marked(self, kind)
        self._function, self._parameters = function, read_parameters(function, name)
        self._executor: ThreadPoolExecutor | None = None
        self._process = 0

    async def __call__(self, **arguments: Any) -> Any:
        """Calls the function."""
        run = functools.partial(contextvars.copy_context().run, self._run, arguments)
        return await asyncio.get_running_loop().run_in_executor(self._thread(), run)

    def _run(self, arguments: dict[str, Any]) -> Any:
        try:
            return self._function(**self._parameters.select(arguments, self.__name__))
        except (StopIteration, SystemExit, KeyboardInterrupt) as error:  # asyncio cannot hand these on, and would wait for ever
            raise RuntimeError(f"the reward raised {error!r}") from error

    def _thread(self) -> ThreadPoolExecutor:
        if self._executor is None or self._process != os.getpid():  # a fork has no threads
            self._executor, self._process = ThreadPoolExecutor(1, "textgym-reward"), os.getpid()
        return self._executor

    def __getstate__(self) -> dict[str, Any]:
        """Copies have a thread of their own."""
        return {**self.__dict__, "_executor": None}
