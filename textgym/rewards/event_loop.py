"""The event loop that async rewards run in: one background thread per process.

A loop of its own, because the caller may already be inside a running loop (a notebook), and one that lives as long as the process,
because a user's HTTP session is tied to the loop in which it was made.
"""

import asyncio
import os
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process id: a forked worker inherits the table but not the thread


def _background_loop() -> asyncio.AbstractEventLoop:
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(loop,), name="textgym-async-rewards", daemon=True).start()
            _loops[os.getpid()] = loop
        return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Runs as long as the process: a task that ends with one of these takes the loop down with it, and others wait for it."""
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            continue


async def _await(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:  # nobody would hear of them, and who waits would wait for ever
        raise RuntimeError(f"the reward raised {error!r}") from error


def start(awaitable: Awaitable[Any]) -> "Future[Any]":
    """Starts `awaitable` in the background loop and returns at once; `.result()` of what it returns waits for it."""
    return asyncio.run_coroutine_threadsafe(_await(awaitable), _background_loop())
