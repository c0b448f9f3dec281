"""Points in the work of a buffer, or of the caller."""

from __future__ import annotations

from typing import Any, Optional

from . import _keeping, _streams
from ._native_types import ERROR_OUT, NULL, ffi, lib, new
from .errors import check


class Event:
    """Something that can be waited for, and that operations can wait for (`after`).

    `Event()` is one that the caller completes with `signal`, for work of its own.
    """

    __slots__ = ("_c", "__weakref__")

    def __init__(self) -> None:
        self._c = _owned(lib.swiftep_event_create())

    @classmethod
    def _owning(cls, pointer: Any) -> Event:
        event = cls.__new__(cls)
        event._c = _owned(pointer)
        return event

    @classmethod
    def recorded(cls, stream: Any, device_index: int = 0) -> Event:
        """What a stream of the caller's has been told to do by now.

        Args:
            stream: see `Buffer.dispatch`.
            device_index: the stream's GPU, among those that the driver shows.

        Raises:
            MachineUnavailable, DriverError.
        """
        made, error = new("swiftep_event **"), new(ERROR_OUT)
        check(lib.swiftep_event_record(_streams.pointer(stream), device_index, made, error), error)
        return cls._owning(made[0])

    def signal(self) -> None:
        """Completes an event that was made with `Event()`; of others, nothing changes."""
        lib.swiftep_event_signal(self._c)

    def enqueue_wait(self, stream: Any) -> None:
        """What is queued on the stream later comes behind the event, without any wait of the host.

        Raises:
            InvalidArgument: no GPU completes the event.
            DriverError
        """
        error = new(ERROR_OUT)
        check(lib.swiftep_event_enqueue_wait(self._c, _streams.pointer(stream), error), error)

    @property
    def is_complete(self) -> bool:
        """Whether what the event stands for has been done, or has failed."""
        return bool(lib.swiftep_event_is_complete(self._c))

    def wait(self) -> None:
        """Returns when the event is complete.

        Raises:
            Error: what its operation has failed with; InvalidArgument where its result is still to be received.
        """
        error = new(ERROR_OUT)
        code = lib.swiftep_event_wait(self._c, error)
        _keeping.drain()
        check(code, error)


def _owned(pointer: Optional[Any]) -> Any:
    if pointer == NULL:
        raise MemoryError
    return ffi.gc(pointer, lib.swiftep_event_free)
