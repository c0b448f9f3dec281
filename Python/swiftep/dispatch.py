"""What a dispatch returns."""

from __future__ import annotations

import enum
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

    __slots__ = ("_c", "_tensors", "_handle", "_event", "_sidecar_count", "__weakref__")

    _c: Any
    _tensors: dict[int, Optional[Tensor]]
    _handle: Optional[Handle]
    _event: Optional[Event]
    _sidecar_count: int

    def __init__(self) -> None:
        raise TypeError("results are made by Buffer.dispatch")

    @classmethod
    def _owning(cls, pointer: Any, sidecar_count: int) -> DispatchResult:
        result = cls.__new__(cls)
        result._c = ffi.gc(pointer, lib.swiftep_dispatch_result_free)
        result._tensors = {}
        result._handle = result._event = None
        result._sidecar_count = sidecar_count
        return result

    def _tensor(self, which: int) -> Optional[Tensor]:
        try:
            return self._tensors[which]
        except KeyError:
            pass
        filled = tensors.empty()
        found = None
        if lib.swiftep_dispatch_result_tensor(self._c, which, filled):
            # Only streams need the event: of host memory, who reads it has waited for it.
            event = self.event if filled.device_type != lib.SWIFTEP_CPU else None
            found = tensors.owned(filled, event)
        # Two threads may ask at the same time: both get the same.
        return self._tensors.setdefault(which, found)

    def _present(self, which: int) -> Tensor:
        tensor = self._tensor(which)
        if tensor is None:
            raise AttributeError("the result has no such tensor")
        return tensor

    @property
    def rows(self) -> Tensor:
        """`[rows, hidden]`; NVFP4: `[rows, hidden / 2]`."""
        return self._present(_ROWS)

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
        if self._handle is None:
            handle = Handle.__new__(Handle)
            handle._c = ffi.gc(lib.swiftep_dispatch_result_handle(self._c), lib.swiftep_handle_free)
            self._handle = handle
        return self._handle

    @property
    def event(self) -> Event:
        """Complete when all rows have arrived."""
        if self._event is None:
            self._event = Event._owning(lib.swiftep_dispatch_result_event(self._c))
        return self._event

    def receive(self) -> None:
        """The second half of a dispatch with `receives_later`; once. Not collective.

        Raises:
            Error: what the dispatch has failed with; InvalidArgument where there is nothing to be received.
        """
        error = new(ERROR_OUT)
        check(lib.swiftep_dispatch_receive(self._c, error), error)


_ROWS = lib.SWIFTEP_ROWS
