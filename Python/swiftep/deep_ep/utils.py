"""Events, as DeepEP's users wait for them."""

from __future__ import annotations

from typing import Any, Optional

import torch

from ..errors import refusal


class EventHandle:
    """What the current stream, or another, has been told to do by now. On CPUs all of it is done."""

    def __init__(self, stream: Optional[torch.cuda.Stream] = None) -> None:
        self.event: Optional[torch.cuda.Event] = None
        if stream is not None or torch.cuda.is_available():
            self.event = torch.cuda.Event()
            self.event.record(stream or torch.cuda.current_stream())

    def current_stream_wait(self) -> None:
        """What the current stream is told later comes behind the event."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class EventOverlap:
    """An event, or none, and the tensors that are in use until then; at the end of a `with` block the current stream waits.

    Attributes:
        event: the event; None after a call that was not asynchronous.
        extra_tensors: kept as long as this is.
    """

    def __init__(
        self, event: Optional[EventHandle] = None, extra_tensors: Optional[tuple[Any, ...]] = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """What the current stream is told later comes behind the event.

        Raises:
            InvalidArgument: there is none.
        """
        if self.event is None:
            raise refusal("event", "that of a call with async_finish", None)
        self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.event is not None:
            self.event.current_stream_wait()


def check_nvlink_connections(group: Any) -> None:
    """Nothing: without NVLink, rows go over PCIe, or through the host's memory."""
