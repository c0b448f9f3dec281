"""What a call comes behind, and what comes behind it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

import torch
from torch import Tensor

from ..combine import CombineResult
from ..dispatch import DispatchResult
from ._checks import required
from .utils import EventHandle, EventOverlap

if TYPE_CHECKING:
    from ._shared import Shared

Hook = Optional[Callable[[], None]]


class Order:
    """Of one call; on CPUs, everything in turn."""

    def __init__(
        self,
        buffer: Shared,
        previous_event: Optional[EventOverlap],
        is_async: bool,
        allocates_there: bool = False,
        runs_here: bool = False,
    ) -> None:
        if allocates_there:
            required(
                previous_event is not None and is_async, "allocate_on_comm_stream", "previous_event and async_finish", "none"
            )
        self.options: dict[str, Any] = {}
        self._is_async = is_async
        self._stream: Any = None
        if not buffer._is_on_gpu:
            return
        # By its number, which PyTorch takes without looking further.
        self._current = torch.cuda.current_stream(buffer._device.index)
        # Where this stream waits for all of it, and it for all of this stream, it may as well run here.
        self._stream = buffer._streams[0] if (is_async or previous_event is not None) and not runs_here else self._current
        if self._stream is not self._current:
            event = previous_event.event.event if previous_event is not None and previous_event.event else None
            if event is not None:
                self._stream.wait_event(event)
            else:
                self._stream.wait_stream(self._current)
        self.options = {"asynchronous": True, "stream": self._stream.cuda_stream, "_keeps": False}

    def on_stream(self, is_later: bool = False) -> Any:
        """What PyTorch does of it runs on the same stream.

        Args:
            is_later: in a call of its own, when another stream may be current.
        """
        is_current = self._stream is None or (self._stream is self._current and not is_later)
        return contextlib.nullcontext() if is_current else torch.cuda.stream(self._stream)

    def end(
        self, used: tuple[Any, ...], made: tuple[Tensor, ...], result: Optional[DispatchResult] = None
    ) -> EventOverlap:
        """The call has been queued: what it uses, and PyTorch's tensors that it has made, are not used again before all have
        done with them."""
        if self._stream is None:
            return EventOverlap(EventHandle() if self._is_async else None)
        if self._stream is self._current:
            return EventOverlap(None)
        if not self._is_async:
            self._current.wait_stream(self._stream)
        if not torch.cuda.is_current_stream_capturing():
            if result is not None:
                # It is made for the stream of the call, and read on this one.
                result.rows.note_use(self._current)
            for tensor in _flat(used) if self._is_async else []:
                tensor.record_stream(self._stream)
            for tensor in made:
                tensor.record_stream(self._current)
                tensor.record_stream(self._stream)
        return EventOverlap(EventHandle(self._stream) if self._is_async else None, used if self._is_async else None)


def finished(
    result: Union[DispatchResult, CombineResult],
    finish: Callable[[], None],
    order: Order,
    is_later: bool,
    used: tuple[Any, ...],
) -> Hook:
    """Does what is left of a call, or returns the hook that does, which keeps what it uses."""
    uses = list(used)

    def finish_there() -> None:
        with order.on_stream(is_later):
            finish()

    def receive() -> None:
        result.receive()
        finish_there()
        # What is made from now on comes behind it.
        uses.clear()

    if is_later:
        return receive
    finish_there()
    return None


def _flat(values: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        found.extend(_flat(value) if isinstance(value, tuple) else [] if value is None else [value])
    return found
