"""What calls of both kinds share: the buffers of each kind, and SwiftEP's handles behind DeepEP's."""

from __future__ import annotations

from typing import Any, Callable, Optional, Union

import torch
from torch import Tensor

from ..buffer import Buffer as Plain
from ..communicator import Communicator
from ..dispatch import Handle
from ..errors import refusal
from ..plan import Plan
from ._checks import required

#: Address space for the rows that callers keep; memory is taken as they come.
ARENA_BYTE_COUNT_MAX = 64 << 30

#: As they are, or quantized, with their scales.
Rows = Union[Tensor, "tuple[Tensor, Tensor]"]


class Shared:
    """What `Buffer` is made of."""

    rank: int
    group_size: int
    low_latency_mode: bool
    enable_shrink: bool
    #: None: the buffer has been destroyed.
    runtime: Optional[object]

    _communicator: Communicator
    _timeout: Optional[float]
    _is_on_gpu: bool
    _device: torch.device
    #: That calls run on, and that the host reads counts on; none on CPUs.
    _streams: list[Any]
    #: By kind.
    _buffers: dict[tuple[str, int, int], Plain]

    def _open(self) -> None:
        if self.runtime is None:
            raise refusal("buffer", "one that has not been destroyed", "a destroyed one")

    def _find_known(self, tensor: Any) -> Known:
        known = getattr(tensor.untyped_storage(), "_swiftep", None) if isinstance(tensor, Tensor) else None
        if not isinstance(known, Known) or all(known.buffer is not buffer for buffer in self._buffers.values()):
            raise refusal("handle", "what a dispatch of this buffer has returned", "another")
        return known

    def _made(self, key: tuple[str, int, int], plan: Callable[[], Plan], workers: Optional[int]) -> Plain:
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = Plain(
                self._communicator,
                plan(),
                workers=workers if self._is_on_gpu else None,
                device=str(self._device),
                timeout=self._timeout,
            )
        return buffer


class Known:
    """SwiftEP's own handle, and whose it is."""

    __slots__ = ("buffer", "handle", "indices", "indices_version", "places", "combine_input")

    def __init__(
        self, buffer: Plain, handle: Handle, indices: Optional[Tensor] = None, places: Optional[Tensor] = None
    ) -> None:
        self.buffer, self.handle = buffer, handle
        #: By which a low-latency dispatch routed, and what PyTorch said of them then.
        self.indices = indices
        self.indices_version = None if indices is None else _version(indices)
        #: See `Groups`.
        self.places = places
        #: What `get_next_low_latency_combine_buffer` has returned last.
        self.combine_input: Optional[Tensor] = None

    def has_routed_by(self, indices: Tensor) -> bool:
        """Whether these are the dispatch's own, for sure unchanged since. The host looks at no element."""
        mine, version = self.indices, self.indices_version
        return (
            mine is not None
            and version is not None
            and mine.data_ptr() == indices.data_ptr()
            and mine.shape == indices.shape
            and version == _version(indices)
        )


def keep_known(tensor: Tensor, known: Known) -> None:
    """The memory of a handle's tensor stands for it, and keeps it: also where a caller has saved the tensors one by one."""
    tensor.untyped_storage()._swiftep = known


def shape_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _version(tensor: Tensor) -> Optional[int]:
    """Counts what PyTorch has changed in place; None, where it does not."""
    return None if tensor.is_inference() else tensor._version
