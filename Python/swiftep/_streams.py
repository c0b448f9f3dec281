"""CUDA streams of the caller's."""

from __future__ import annotations

from typing import Any

from ._native_types import VOID_POINTER, ffi


def pointer(stream: Any) -> Any:
    """The `CUstream` of an integer (0: the default stream), or of a stream of torch's, CuPy's or cuda.core's.

    Raises:
        TypeError: it is no stream.
    """
    if isinstance(stream, int):
        return ffi.cast(VOID_POINTER, stream)
    for attribute in ("cuda_stream", "ptr", "handle"):
        value = getattr(stream, attribute, None)
        if isinstance(value, int):
            return ffi.cast(VOID_POINTER, value)
    if hasattr(stream, "__cuda_stream__"):
        return ffi.cast(VOID_POINTER, stream.__cuda_stream__()[1])
    raise TypeError(f"{stream!r} is no CUDA stream")
