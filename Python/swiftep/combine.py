"""What a combine returns."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

from . import tensors
from ._native_types import ERROR_OUT, ffi, lib, new
from .errors import check
from .events import Event
from .tensors import Tensor


class CombineResult:
    """What has come back to this rank's tokens."""

    __slots__ = ("_call", "_output", "_tokens", "_weights", "_event", "__weakref__")

    #: The call, which owns the library's result, and with it the tokens.
    _call: Any
    _output: Any
    _tokens: Optional[Tensor]
    _weights: Optional[Tensor]
    _event: Optional[Event]

    def __init__(self) -> None:
        raise TypeError("results are made by Buffer.combine")

    @classmethod
    def _owning(cls, call: Any, output: Any) -> CombineResult:
        result = _new_result(cls)
        result._call = _gc(call, _FREE)
        result._output = output
        result._tokens = result._weights = result._event = None
        return result

    def _event_for(self, tensor: Any) -> Any:
        """Returns what a stream that is given the tensor is to wait for; who reads host memory waits itself."""
        return None if tensor.device_type == _CPU else partial(_event_of, self._call)

    @property
    def tokens(self) -> Any:
        """`[tokens, hidden]`: a `Tensor`, or the array that the call was given as `output`."""
        if self._output is not None:
            return self._output
        if self._tokens is None:
            filled = self._call.combined
            self._tokens = tensors.part(filled, self._call, self._event_for(filled))
        return self._tokens

    @property
    def top_k_weights(self) -> Optional[Tensor]:
        """fp32 `[tokens, top_k]`: the sums of the weights that were brought back; None where none were given."""
        if self._weights is None:
            filled = tensors.empty()
            if lib.swiftep_combine_result_tensor(self._call.result, lib.SWIFTEP_SUMMED_WEIGHTS, filled):
                self._weights = tensors.owned(filled, self._event_for(filled))
        return self._weights

    @property
    def event(self) -> Event:
        """Complete when the sums are there and all peers have read this rank's rows, which may then be overwritten."""
        if self._event is None:
            self._event = _event_of(self._call)
        return self._event

    def receive(self) -> None:
        """The second half of a combine with `receives_later`; once. Collective.

        Raises:
            Error: what the combine has failed with; InvalidArgument where there is nothing to be received.
        """
        error = new(ERROR_OUT)
        check(lib.swiftep_combine_receive(self._call.result, error), error)


def _event_of(call: Any) -> Event:
    return Event._owning(lib.swiftep_combine_result_event(call.result))


_CPU = lib.SWIFTEP_CPU
_FREE = lib.swiftep_py_combine_free
_new_result = CombineResult.__new__
_gc = ffi.gc
