"""Element types, and what they are called elsewhere."""

from __future__ import annotations

import enum
import sys
from typing import Any

from ._native import lib


class DType(enum.IntEnum):
    """An element's type."""

    BF16 = lib.SWIFTEP_BF16
    FP16 = lib.SWIFTEP_FP16
    FP32 = lib.SWIFTEP_FP32
    #: OCP FP8 E4M3: no infinities, the largest finite value is 448.
    FP8_E4M3 = lib.SWIFTEP_FP8_E4M3
    #: Two OCP FP4 E2M1 in a byte, the even channel in the low four bits: one element is two channels.
    FP4_E2M1_X2 = lib.SWIFTEP_FP4_E2M1_X2
    UINT8 = lib.SWIFTEP_UINT8
    INT32 = lib.SWIFTEP_INT32
    INT64 = lib.SWIFTEP_INT64

    @property
    def byte_count(self) -> int:
        """Bytes of an element."""
        return _BYTE_COUNTS[self]

    @property
    def numpy(self) -> Any:
        """NumPy's dtype; those that NumPy has not are `ml_dtypes`', two FP4 in a byte are uint8."""
        import numpy

        name = _NUMPY_NAMES[self]
        if self in _OF_ML_DTYPES:
            import ml_dtypes

            return numpy.dtype(getattr(ml_dtypes, name))
        return numpy.dtype(name)

    @classmethod
    def of(cls, dtype: Any) -> DType:
        """The element type that a `DType`, a dtype of NumPy, ml_dtypes or torch, or a name like "bfloat16" stands for.

        Raises:
            TypeError: it stands for none.
        """
        code = code_of(dtype)
        if code < 0:
            raise TypeError(f"{dtype!r} is no element type of SwiftEP's")
        return cls(code)


_BYTE_COUNTS = {
    DType.BF16: 2,
    DType.FP16: 2,
    DType.FP32: 4,
    DType.FP8_E4M3: 1,
    DType.FP4_E2M1_X2: 1,
    DType.UINT8: 1,
    DType.INT32: 4,
    DType.INT64: 8,
}

_NUMPY_NAMES = {
    DType.BF16: "bfloat16",
    DType.FP16: "float16",
    DType.FP32: "float32",
    DType.FP8_E4M3: "float8_e4m3fn",
    DType.FP4_E2M1_X2: "uint8",
    DType.UINT8: "uint8",
    DType.INT32: "int32",
    DType.INT64: "int64",
}

_OF_ML_DTYPES = (DType.BF16, DType.FP8_E4M3)

_CODES = {
    "bfloat16": int(DType.BF16),
    "float16": int(DType.FP16),
    "float32": int(DType.FP32),
    "float8_e4m3fn": int(DType.FP8_E4M3),
    "float4_e2m1fn_x2": int(DType.FP4_E2M1_X2),
    "uint8": int(DType.UINT8),
    "bool": int(DType.UINT8),
    "int32": int(DType.INT32),
    "int64": int(DType.INT64),
}

#: What the library is told of an element type that it does not have: it refuses the call on all ranks, instead of one rank
#: raising and the others waiting for it.
UNKNOWN = -1


def code_of(dtype: Any) -> int:
    """The library's number for an element type; `UNKNOWN` where it has none."""
    if isinstance(dtype, DType):
        return int(dtype)
    if isinstance(dtype, str):
        return _CODES.get(dtype, UNKNOWN)
    numpy = sys.modules.get("numpy")
    if numpy is not None and not type(dtype).__module__.startswith("torch"):
        try:
            dtype = numpy.dtype(dtype)
        except TypeError:
            return UNKNOWN
        # Another byte order has the same name.
        return _CODES.get(dtype.name, UNKNOWN) if dtype.isnative else UNKNOWN
    return _CODES.get(str(dtype).rpartition(".")[2], UNKNOWN)
