"""Tensors that calls are given, of whatever library.

An array is passed as it is: what the library does not take (an element type, strides, a device) it refuses on all ranks.
Only what is no array at all raises here.
"""

from __future__ import annotations

import operator
import sys
from typing import Any, Callable

from . import dtypes
from ._native_types import INT64S, TENSOR_SIZE, VOID_POINTER, ffi, lib, new
from .tensors import Tensor

# Returns the address of a capsule and an element type, or fills the argument of that name and returns 0 and 0.
Reader = Callable[[Any, str, Any, "list[Any]"], "tuple[int, int]"]

_readers: dict[type, Reader] = {}
_numpy_codes: dict[Any, int] = {}


def read(call: Any, name: str, value: Any, held: list[Any]) -> tuple[int, int]:
    """Reads an array that a call is given as its argument `name`, and adds to `held` what has to live until it has returned.

    Returns:
        The address of a capsule that describes the array, and its element type as the library numbers them; 0 and 0 where
        the argument is described in `call` already.

    Raises:
        TypeError: `value` is no array.
    """
    try:
        reader = _readers[type(value)]
    except KeyError:
        reader = _readers[type(value)] = _find_reader(value)
    return reader(call, name, value, held)


def set_argument(call: Any, name: str, value: Any, held: list[Any]) -> None:
    """Reads an array into `call`."""
    capsule, code = read(call, name, value, held)
    if capsule:
        argument = getattr(call, name)
        argument.capsule = capsule
        argument.tensor.dtype = code


class Element:
    """The argument of a call that is an element of an array, with the name of none."""

    __slots__ = ("element",)

    def __init__(self, element: Any) -> None:
        self.element = element


def _find_reader(value: Any) -> Reader:
    numpy = sys.modules.get("numpy")
    if isinstance(value, Tensor):
        return _read_own
    if numpy is not None and isinstance(value, numpy.ndarray):
        return _read_numpy
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _read_torch
    if hasattr(value, "__cuda_array_interface__"):
        return _read_cuda_interface
    # Before `__array_interface__`, which has no name for bf16.
    if hasattr(value, "__dlpack__") and not isinstance(value, type):
        return _read_dlpack
    if hasattr(value, "__array_interface__") and not isinstance(value, type):
        return _read_interface
    raise TypeError(
        f"expected an array (__dlpack__, __array_interface__ or __cuda_array_interface__), found {type(value).__name__}"
    )


def _read_own(call: Any, name: str, tensor: Tensor, held: list[Any]) -> tuple[int, int]:
    getattr(call, name).tensor = tensor._c[0]
    return 0, 0


def _read_numpy(call: Any, name: str, array: Any, held: list[Any]) -> tuple[int, int]:
    capsule = array.__array_struct__
    held.append(capsule)
    dtype = array.dtype
    try:
        return id(capsule), _numpy_codes[dtype]
    except KeyError:
        code = _numpy_codes[dtype] = dtypes.code_of(dtype)
        return id(capsule), code


def _read_torch(call: Any, name: str, array: Any, held: list[Any]) -> tuple[int, int]:
    try:
        capsule = sys.modules["torch.utils.dlpack"].to_dlpack(array)
    except (RuntimeError, BufferError):
        # Of what DLPack has no name for there, or no place.
        _describe_torch(getattr(call, name), array, held)
        return 0, 0
    held.append(capsule)
    return id(capsule), dtypes.UNKNOWN


def _describe_torch(argument: Any, array: Any, held: list[Any]) -> None:
    device = array.device
    _describe(
        argument,
        held,
        address=array.data_ptr(),
        code=dtypes.code_of(array.dtype),
        shape=array.shape,
        strides=None if array.is_contiguous() else array.stride(),
    )
    if device.type == "cuda":
        argument.tensor.device_type = lib.SWIFTEP_CUDA
        argument.tensor.device_index = device.index
    elif device.type != "cpu":
        argument.tensor.device_type = -1


def _read_dlpack(call: Any, name: str, array: Any, held: list[Any]) -> tuple[int, int]:
    try:
        capsule = array.__dlpack__()
    except BufferError:
        # Of read-only memory, there is none without a version.
        capsule = array.__dlpack__(max_version=(1, 0))
    held.append(capsule)
    return id(capsule), dtypes.UNKNOWN


def _read_interface(call: Any, name: str, array: Any, held: list[Any]) -> tuple[int, int]:
    _read_dictionary(getattr(call, name), array.__array_interface__, held)
    return 0, 0


def _read_cuda_interface(call: Any, name: str, array: Any, held: list[Any]) -> tuple[int, int]:
    argument = getattr(call, name)
    _read_dictionary(argument, array.__cuda_array_interface__, held)
    argument.tensor.device_type = lib.SWIFTEP_CUDA
    if hasattr(array, "__dlpack_device__"):
        argument.tensor.device_index = array.__dlpack_device__()[1]
    return 0, 0


_TYPE_STRINGS = {
    "<f2": int(dtypes.DType.FP16),
    "<f4": int(dtypes.DType.FP32),
    "|u1": int(dtypes.DType.UINT8),
    "|b1": int(dtypes.DType.UINT8),
    "<i4": int(dtypes.DType.INT32),
    "<i8": int(dtypes.DType.INT64),
}


def _read_dictionary(argument: Any, interface: dict[str, Any], held: list[Any]) -> None:
    held.append(interface)
    address, is_read_only = interface["data"]
    type_string = interface["typestr"]
    shape = interface["shape"]
    byte_strides = interface.get("strides")
    strides = None
    if byte_strides is not None:
        byte_count = int(type_string[2:])
        whole = all(stride % byte_count == 0 for stride in byte_strides)
        # No tensor has strides of -1: those that cannot be said are refused.
        strides = [stride // byte_count if whole else -1 for stride in byte_strides]
    _describe(
        argument,
        held,
        address=address,
        code=_TYPE_STRINGS.get(type_string, dtypes.UNKNOWN),
        shape=shape,
        strides=strides,
    )
    argument.is_read_only = bool(is_read_only)


def _describe(argument: Any, held: list[Any], *, address: int, code: int, shape: Any, strides: Any) -> None:
    tensor = argument.tensor
    tensor.size = TENSOR_SIZE
    tensor.data = ffi.cast(VOID_POINTER, address)
    tensor.dtype = code
    tensor.dimension_count = len(shape)
    sizes = new(INT64S, tuple(shape))
    held.append(sizes)
    tensor.shape = sizes
    if strides is not None:
        steps = new(INT64S, tuple(strides))
        held.append(steps)
        tensor.strides = steps


_INT32_MAX = 2**31 - 1


def int32(value: Any) -> int:
    """A number as the library takes it; one that is too large stays too large for anything it is used for."""
    return max(-_INT32_MAX, min(operator.index(value), _INT32_MAX))


def count_or_refused(value: Any) -> int:
    """A count that the library reads 0 as a default of: 0 itself is refused."""
    return int32(value) or -1
