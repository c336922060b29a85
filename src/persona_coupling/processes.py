"""Processes side by side: pools whose members share the cores out, and environment variables for a while."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import SpawnContext
from typing import Any

# read when a process starts, and beyond the reach of PyTorch's own setting: without them each process of a pool would start
# a thread per core of the machine, and eight of them took minutes for seconds of algebra
BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SPAWN: SpawnContext = multiprocessing.get_context("spawn")


def threads(workers: int) -> int:
    """Each worker's share of the cores."""
    return max(1, (os.cpu_count() or 1) // workers)


@contextmanager
def pool(
    workers: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = (), *, beside: int = 0
) -> Iterator[ProcessPoolExecutor]:
    """So many fresh processes, each with its share of the cores for linear algebra; `beside` more work next to them. After
    an error inside, what has not begun is not begun any more."""
    with (
        environment(dict.fromkeys(BLAS, str(threads(workers + beside)))),
        ProcessPoolExecutor(workers, mp_context=SPAWN, initializer=_begin, initargs=(initializer, initargs)) as made,
    ):
        try:
            yield made
        except BaseException:
            made.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    """In a member: end with the process that made the pool, and not wait for work of one that was killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables set inside, as they were outside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
