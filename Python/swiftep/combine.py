"""What a combine returns."""

from __future__ import annotations

from typing import Any, Optional

from . import tensors
from ._native_types import ERROR_OUT, ffi, lib, new
from .errors import check
from .events import Event
from .tensors import Tensor


class CombineResult:
    """What has come back to this rank's tokens."""

    __slots__ = ("_c", "_output", "_tokens", "_weights", "_event", "__weakref__")

    _c: Any
    _output: Any
    _tokens: Any
    _weights: Optional[Tensor]
    _event: Optional[Event]

    def __init__(self) -> None:
        raise TypeError("results are made by Buffer.combine")

    @classmethod
    def _owning(cls, pointer: Any, output: Any) -> CombineResult:
        result = cls.__new__(cls)
        result._c = ffi.gc(pointer, lib.swiftep_combine_result_free)
        result._output = output
        result._tokens = result._weights = result._event = None
        return result

    def _tensor(self, which: int) -> Optional[Tensor]:
        filled = tensors.empty()
        if not lib.swiftep_combine_result_tensor(self._c, which, filled):
            return None
        return tensors.owned(filled, self.event if filled.device_type != lib.SWIFTEP_CPU else None)

    @property
    def tokens(self) -> Any:
        """`[tokens, hidden]`: a `Tensor`, or the array that the call was given as `output`."""
        if self._output is not None:
            return self._output
        if self._tokens is None:
            self._tokens = self._tensor(lib.SWIFTEP_TOKENS)
        return self._tokens

    @property
    def top_k_weights(self) -> Optional[Tensor]:
        """fp32 `[tokens, top_k]`: the sums of the weights that were brought back; None where none were given."""
        if self._weights is None:
            self._weights = self._tensor(lib.SWIFTEP_SUMMED_WEIGHTS)
        return self._weights

    @property
    def event(self) -> Event:
        """Complete when the sums are there and all peers have read this rank's rows, which may then be overwritten."""
        if self._event is None:
            self._event = Event._owning(lib.swiftep_combine_result_event(self._c))
        return self._event

    def receive(self) -> None:
        """The second half of a combine with `receives_later`; once. Collective.

        Raises:
            Error: what the combine has failed with; InvalidArgument where there is nothing to be received.
        """
        error = new(ERROR_OUT)
        check(lib.swiftep_combine_receive(self._c, error), error)
