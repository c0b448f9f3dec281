"""Ranks that are threads of the test."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable

import swiftep

#: Long against anything that a test does, short against what a test may take.
TIMEOUT = 20.0


def outcomes(rank_count: int, body: Callable[[swiftep.Communicator], Any]) -> list[Any]:
    """What `body` returned on each rank, or raised."""
    communicators = swiftep.Communicator.threads(rank_count)
    found: list[Any] = [None] * rank_count

    def run(rank: int) -> None:
        try:
            found[rank] = body(communicators[rank])
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=[rank], daemon=True) for rank in range(rank_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * TIMEOUT)
        assert not thread.is_alive(), "a rank hangs"
    return found


def results(rank_count: int, body: Callable[[swiftep.Communicator], Any]) -> list[Any]:
    """What `body` returned on each rank; raises what one of them did."""
    found = outcomes(rank_count, body)
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return found


def on_buffers(plan: swiftep.Plan, rank_count: int, body: Callable[[swiftep.Buffer], Any], **options: Any) -> list[Any]:
    """As `results`, with a buffer for each rank, which is closed when all have returned."""
    return results(rank_count, with_buffers(plan, rank_count, body, **options))


def outcomes_on_buffers(
    plan: swiftep.Plan, rank_count: int, body: Callable[[swiftep.Buffer], Any], **options: Any
) -> list[Any]:
    """As `outcomes`, with a buffer for each rank, which is closed when all have returned."""
    return outcomes(rank_count, with_buffers(plan, rank_count, body, **options))


def with_buffers(
    plan: swiftep.Plan, rank_count: int, body: Callable[[swiftep.Buffer], Any], **options: Any
) -> Callable[[swiftep.Communicator], Any]:
    options = {"workers": 1, "timeout": TIMEOUT, **options}
    barrier = threading.Barrier(rank_count)

    def run(communicator: swiftep.Communicator) -> Any:
        with swiftep.Buffer(communicator, plan, **options) as buffer:
            try:
                return body(buffer)
            finally:
                barrier.wait(3 * TIMEOUT)

    return run


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something becomes true."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
