"""Operations that are recorded once and run as often as wanted."""

from __future__ import annotations

from typing import Any, Callable, Optional

from . import _streams
from ._native_types import ERROR_OUT, NULL, ffi, lib, new
from .errors import check, taken
from .events import Event


class Graph:
    """Operations of one buffer; on a GPU a CUDA graph, which costs one launch.

    It keeps what its operations were given and what they return.

    Attributes:
        result: what the recorded function has returned.
    """

    __slots__ = ("_c", "result", "__weakref__")

    _c: Any
    result: Any

    def __init__(self) -> None:
        raise TypeError("graphs are made by Buffer.record")

    def launch(self, *, stream: Any = None) -> Event:
        """Runs the operations once more, and returns at once. Collective: all ranks launch graphs of the same operations.

        Args:
            stream: a CUDA stream of the caller's; see `Buffer.dispatch`.

        Returns:
            What is complete when all of them are.

        Raises:
            BufferLost, BufferClosed; InvalidArgument inside of a recording, or while results are to be received; ValueError
            where the graph is closed.
        """
        if self._c is None:
            raise ValueError("the graph is closed")
        event, error = new("swiftep_event **"), new(ERROR_OUT)
        pointer = NULL if stream is None else _streams.pointer(stream)
        check(lib.swiftep_graph_launch(self._c, stream is not None, pointer, event, error), error)
        return Event._owning(event[0])

    def close(self) -> None:
        """Lets go of what the operations use. Closed again, nothing happens."""
        self._c = self.result = None


class _Recording:
    """A call of the caller's function: what that raises goes past the library."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self.body = body
        self.result: Any = None
        self.exception: Optional[BaseException] = None


@ffi.def_extern(name="swiftep_py_record_body", error=lib.SWIFTEP_INVALID_ARGUMENT)  # type: ignore[untyped-decorator, unused-ignore]
def _record_body(context: Any) -> int:
    recording: _Recording = ffi.from_handle(context)
    try:
        recording.result = recording.body()
        return 0
    except BaseException as exception:
        recording.exception = exception
        return int(lib.SWIFTEP_INVALID_ARGUMENT)


def record(buffer: Any, body: Callable[[], Any]) -> Graph:
    recording = _Recording(body)
    handle = ffi.new_handle(recording)
    made, error = new("swiftep_graph **"), new(ERROR_OUT)
    code = lib.swiftep_graph_record(buffer, lib.swiftep_py_record_body, handle, made, error)
    if recording.exception is not None:
        if error[0] != NULL:
            recording.exception.__context__ = taken(code, error[0])
        raise recording.exception
    check(code, error)
    graph = Graph.__new__(Graph)
    graph._c = ffi.gc(made[0], lib.swiftep_graph_free)
    graph.result = recording.result
    return graph
