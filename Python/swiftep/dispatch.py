"""What a dispatch returns."""

from __future__ import annotations

import enum
from functools import partial
from typing import Any, Optional

from . import tensors
from ._native_types import ERROR_OUT, ffi, lib, new
from .errors import check
from .events import Event
from .plan import Layout
from .tensors import Tensor


class Sizing(enum.IntEnum):
    """How large the tensors are that a dispatch returns."""

    #: As large as what arrives: the call returns when the counts are known.
    EXACT = lib.SWIFTEP_EXACT
    #: For all tokens of all ranks, or as many as the plan allows; nobody waits for counts.
    WORST_CASE = lib.SWIFTEP_WORST_CASE


class Waiting(enum.IntEnum):
    """What waits for the peers of an operation."""

    WORKERS = lib.SWIFTEP_WAITING_WORKERS
    #: On a GPU the stream, so that nothing occupies a multiprocessor meanwhile.
    STREAM = lib.SWIFTEP_WAITING_STREAM


class ScaleOrder(enum.IntEnum):
    """How the scales of grouped rows lie in memory."""

    #: `[local experts, rows of a group, scales]`.
    ROW_MAJOR = lib.SWIFTEP_ROW_MAJOR
    #: Of rows that are quantized on the way: `[local experts, scales, rows of a group]`.
    COLUMN_MAJOR = lib.SWIFTEP_COLUMN_MAJOR


class Handle:
    """What repeats a dispatch, or undoes it. Belongs to the buffer that made it."""

    __slots__ = ("_c", "__weakref__")

    _c: Any

    def __init__(self) -> None:
        raise TypeError("handles are made by dispatches")

    @property
    def token_count(self) -> int:
        """Tokens that this rank has dispatched."""
        return int(lib.swiftep_handle_token_count(self._c))

    @property
    def row_capacity(self) -> int:
        """Rows of the tensors that the dispatch returned."""
        return int(lib.swiftep_handle_row_capacity(self._c))

    @property
    def top_k(self) -> int:
        """Experts of a token; 0 where it was routed by a table."""
        return int(lib.swiftep_handle_top_k(self._c))

    @property
    def layout(self) -> Layout:
        """How the rows are ordered."""
        return Layout(lib.swiftep_handle_layout(self._c))


class DispatchResult:
    """What has arrived at this rank. Its tensors are the memory that peers wrote, given back when the last that uses it is
    gone.

    Where `[rows, ...]` is written, grouped tensors have `[local experts, rows of a group, ...]`. Counts are valid once the
    event is complete; after a dispatch of exact size, at once.
    """

    __slots__ = ("_call", "_sidecar_count", "_made", "__weakref__")

    #: The call, which owns the library's result, and with it the rows.
    _call: Any
    _sidecar_count: int
    #: What has been asked for so far: tensors by their numbers, handle and event by their names.
    _made: dict[Any, Any]

    def __init__(self) -> None:
        raise TypeError("results are made by Buffer.dispatch")

    @classmethod
    def _owning(cls, call: Any, sidecar_count: int) -> DispatchResult:
        result = _new_result(cls)
        result._call = _gc(call, _FREE)
        result._sidecar_count = sidecar_count
        result._made = {}
        return result

    # Two threads may ask at the same time: both get what is the first to be kept.

    def _tensor(self, which: int) -> Optional[Tensor]:
        try:
            return self._made[which]  # type: ignore[no-any-return]
        except KeyError:
            pass
        filled = tensors.empty()
        found = None
        # What a stream that is given the tensor is to wait for; who reads host memory waits itself.
        if lib.swiftep_dispatch_result_tensor(self._call.result, which, filled):
            found = tensors.owned(filled, None if filled.device_type == _CPU else partial(_event_of, self._call))
        return self._made.setdefault(which, found)

    def _present(self, which: int) -> Tensor:
        tensor = self._tensor(which)
        if tensor is None:
            raise AttributeError("the result has no such tensor")
        return tensor

    @property
    def rows(self) -> Tensor:
        """`[rows, hidden]`; NVFP4: `[rows, hidden / 2]`."""
        rows = self._made.get(_ROWS)
        if rows is None:
            call = self._call
            received = call.received
            rows = _part(received, call, None if received.device_type == _CPU else partial(_event_of, call))
            rows = self._made.setdefault(_ROWS, rows)
        return rows  # type: ignore[no-any-return]

    @property
    def scales(self) -> Optional[Tensor]:
        """Of FP8 and NVFP4 rows; see `Scales`."""
        return self._tensor(lib.SWIFTEP_ROW_SCALES)

    @property
    def sidecars(self) -> tuple[Tensor, ...]:
        """`[rows, ...]` each, as the sender's."""
        return tuple(self._present(lib.SWIFTEP_SIDECARS + index) for index in range(self._sidecar_count))

    @property
    def origins(self) -> Tensor:
        """int32 `[rows, 2]`: source rank and token; -1 in rows that no token fills, except grouped ones and with masks."""
        return self._present(lib.SWIFTEP_ORIGINS)

    @property
    def top_k_indices(self) -> Optional[Tensor]:
        """`[rows, top_k]`, by expert and grouped `[rows, 1]`, in the sender's index type: local experts, -1 for those of other
        ranks. None where tokens were not routed by top-k indices."""
        return self._tensor(lib.SWIFTEP_TOP_K_INDICES)

    @property
    def top_k_weights(self) -> Optional[Tensor]:
        """fp32, as `top_k_indices`; None where no weights were given."""
        return self._tensor(lib.SWIFTEP_TOP_K_WEIGHTS)

    @property
    def row_count(self) -> Tensor:
        """int32 `[1]`: rows that arrived, padding between groups included."""
        return self._present(lib.SWIFTEP_ROW_COUNT)

    @property
    def tokens_per_source(self) -> Tensor:
        """int32 `[ranks]`: tokens from each source rank."""
        return self._present(lib.SWIFTEP_TOKENS_PER_SOURCE)

    @property
    def tokens_per_pair(self) -> Tensor:
        """int32 `[ranks, ranks]`: tokens from each source rank, by row, to each rank. The same on all ranks."""
        return self._present(lib.SWIFTEP_TOKENS_PER_PAIR)

    @property
    def tokens_per_expert(self) -> Tensor:
        """int32 `[local experts]`: tokens of each, rounded up to the alignment."""
        return self._present(lib.SWIFTEP_TOKENS_PER_EXPERT)

    @property
    def unaligned_tokens_per_expert(self) -> Tensor:
        """int32 `[local experts]`: tokens of each, as they are."""
        return self._present(lib.SWIFTEP_UNALIGNED_TOKENS_PER_EXPERT)

    @property
    def source_offsets(self) -> Optional[Tensor]:
        """int32 `[local experts, ranks + 1]`: where the rows of each source begin in a group. None by source, and with
        masks."""
        return self._tensor(lib.SWIFTEP_SOURCE_OFFSETS)

    @property
    def source_counts(self) -> Optional[Tensor]:
        """int32 `[local experts, ranks]`, with masks: tokens of each expert from each source, whose rows begin at
        `source * tokens_per_rank_max`. None without masks."""
        return self._tensor(lib.SWIFTEP_SOURCE_COUNTS)

    @property
    def handle(self) -> Handle:
        """What repeats the dispatch, or undoes it."""
        handle = self._made.get("handle")
        if handle is None:
            handle = _new_handle(Handle)
            handle._c = _gc(lib.swiftep_dispatch_result_handle(self._call.result), lib.swiftep_handle_free)
            handle = self._made.setdefault("handle", handle)
        return handle  # type: ignore[no-any-return]

    @property
    def event(self) -> Event:
        """Complete when all rows have arrived."""
        event = self._made.get("event")
        if event is None:
            event = _event_of(self._call)
            event = self._made.setdefault("event", event)
        return event  # type: ignore[no-any-return]

    def receive(self) -> None:
        """The second half of a dispatch with `receives_later`; once. Not collective.

        Raises:
            Error: what the dispatch has failed with; InvalidArgument where there is nothing to be received.
        """
        error = new(ERROR_OUT)
        check(lib.swiftep_dispatch_receive(self._call.result, error), error)


def _event_of(call: Any) -> Event:
    return Event._owning(lib.swiftep_dispatch_result_event(call.result))


_ROWS = lib.SWIFTEP_ROWS
_CPU = lib.SWIFTEP_CPU
_FREE = lib.swiftep_py_dispatch_free
_new_result = DispatchResult.__new__
_new_handle = Handle.__new__
_gc = ffi.gc
_part = tensors.part
