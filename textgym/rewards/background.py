"""Plain reward functions that are waited for as async ones are."""

import asyncio
import functools
from typing import Any

from textgym.rewards.resolve import loaded_reward, resolve_reward


class InBackground:
    """Runs a reward in a thread of its own, so that other rewards, the reference's scores and the next completions need not wait for it.

    For functions that wait for others: a service, a process, another device. One that computes in Python takes turns with the rest of the
    program and gains nothing; one that uses the model in training would see it in the middle of something else. It is never run twice at
    once. A call that is given up (Ctrl-C, an error elsewhere) goes on to its end, and nobody reads its result.

    Args:
        reward: a plain reward in any form that `RewardSet.build` takes as one; async functions need no such thing.

    Raises:
        ValueError: `reward` is no reward, or an async function.
    """

    def __init__(self, reward: Any) -> None:
        name, function = resolve_reward(loaded_reward(reward))
        if asyncio.iscoroutinefunction(function):
            raise ValueError(f"`reward` must be a plain function, got the async function {name}, which runs in the background as it is.")
        functools.update_wrapper(self, function)  # its parameters, and the mark of a dense reward
        self.__name__ = name
        self._function = function
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self, **arguments: Any) -> Any:
        """Calls the function."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._function, **arguments)
