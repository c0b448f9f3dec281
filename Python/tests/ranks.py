"""Ranks that are threads of the test."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable

import swiftep

#: Long against anything that a test does, short against what a test may take.
TIMEOUT = 20.0


def results(rank_count: int, body: Callable[[swiftep.Communicator], Any]) -> list[Any]:
    """What `body` returned on each rank; raises what one of them did."""
    communicators = swiftep.Communicator.threads(rank_count)
    found: list[Any] = [None] * rank_count
    raised: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = body(communicators[rank])
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=[rank], daemon=True) for rank in range(rank_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * TIMEOUT)
        assert not thread.is_alive(), "a rank hangs"
    if raised:
        raise raised[0]
    return found


def errors(rank_count: int, body: Callable[[swiftep.Communicator], Any]) -> list[swiftep.Error]:
    """What `body` raised on each rank, as on each it has to."""

    def run(communicator: swiftep.Communicator) -> swiftep.Error:
        try:
            body(communicator)
        except swiftep.Error as error:
            return error
        raise AssertionError(f"rank {communicator.rank} raised nothing")

    return results(rank_count, run)


def on_buffers(plan: swiftep.Plan, rank_count: int, body: Callable[[swiftep.Buffer], Any], **options: Any) -> list[Any]:
    """As `results`, with a buffer for each rank, which is closed when all have returned."""
    return results(rank_count, with_buffers(plan, rank_count, body, **options))


def errors_on_buffers(
    plan: swiftep.Plan, rank_count: int, body: Callable[[swiftep.Buffer], Any], **options: Any
) -> list[swiftep.Error]:
    """As `errors`, with a buffer for each rank, which is closed when all have returned."""
    return errors(rank_count, with_buffers(plan, rank_count, body, **options))


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
