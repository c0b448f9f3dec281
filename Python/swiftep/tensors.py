"""Memory of the library's, as arrays of other libraries."""

from __future__ import annotations

import ctypes
from typing import Any, Optional, Union

from . import _streams
from ._native_types import ERROR_OUT, NULL, TENSOR, TENSOR_SIZE, ffi, lib, new
from .dtypes import DType
from .errors import check

_RELEASE = lib.swiftep_tensor_release

# What is exchanged as bytes has no name there.
_TYPE_STRINGS = {
    DType.FP16: "<f2",
    DType.FP32: "<f4",
    DType.UINT8: "|u1",
    DType.FP4_E2M1_X2: "|u1",
    DType.INT32: "<i4",
    DType.INT64: "<i8",
}

# DLPack's numbers of devices.
_DLPACK_CPU = 1
_DLPACK_CUDA = 2

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]


class Tensor:
    """A dense row-major array in memory of the library's: the arena's own, without a copy.

    Other libraries take it as it is: `numpy.from_dlpack(t)`, `torch.from_dlpack(t)`, `numpy.asarray(t)`, `t.numpy()`. The
    memory stays as long as the tensor or any array that was made from it, also when the buffer is closed.
    """

    __slots__ = ("_c", "_owner", "_event", "__weakref__")

    #: The struct, and what it is a part of, which releases it.
    _c: Any
    _owner: Any
    _event: Any

    def __init__(self) -> None:
        raise TypeError("tensors are made by Buffer.make_tensor, and by dispatches and combines")

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements in each dimension."""
        return tuple(ffi.unpack(self._c.shape, self._c.dimension_count)) if self._c.dimension_count else ()

    @property
    def ndim(self) -> int:
        """How many dimensions there are."""
        return int(self._c.dimension_count)

    @property
    def size(self) -> int:
        """Elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.byte_count

    @property
    def dtype(self) -> DType:
        """The elements' type."""
        return DType(self._c.dtype)

    @property
    def device(self) -> str:
        """Where the memory lies: "cpu" or "cuda:INDEX"."""
        return f"cuda:{self._c.device_index}" if self._is_on_gpu else "cpu"

    @property
    def address(self) -> int:
        """The first byte's address, on a GPU its device address."""
        return int(ffi.cast("uintptr_t", self._c.data))

    @property
    def _is_on_gpu(self) -> bool:
        return bool(self._c.device_type == lib.SWIFTEP_CUDA)

    def note_use(self, stream: Any) -> None:
        """The stream uses the memory: once it is released, it is used again only behind what the stream has been told to do
        by then. While a graph is captured on the stream, the graph keeps the memory.

        Args:
            stream: of the caller's on the tensor's GPU; see `Buffer.dispatch`.

        Raises:
            DriverError: the driver refused it.
        """
        error = new(ERROR_OUT)
        check(lib.swiftep_tensor_note_use(self._c, _streams.pointer(stream), error), error)

    def numpy(self) -> Any:
        """A NumPy array of this memory, which it keeps.

        Returns:
            `shape`, in `dtype.numpy`; of GPU memory none.

        Raises:
            TypeError: the memory is a GPU's.
            ImportError: of bf16 and fp8: `ml_dtypes` is not installed.
        """
        import numpy

        if self._is_on_gpu:
            raise TypeError("NumPy has no arrays in GPU memory")
        dtype = self.dtype.numpy
        return numpy.asarray(_Bytes(self)).view(dtype).reshape(self.shape)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        if self._is_on_gpu:
            raise AttributeError("__array_interface__ of GPU memory")
        return self._interface()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if not self._is_on_gpu:
            raise AttributeError("__cuda_array_interface__ of host memory")
        return self._interface()

    def _interface(self) -> dict[str, Any]:
        # Without an attribute, NumPy asks for `__array__`.
        type_string = _TYPE_STRINGS.get(self.dtype)
        if type_string is None:
            raise AttributeError(f"{self.dtype.name} has no type string")
        return {
            "shape": self.shape,
            "typestr": type_string,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }

    def __array__(self, dtype: Any = None, copy: Optional[bool] = None) -> Any:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            if copy is False:
                raise ValueError(f"{self.dtype.name} becomes {dtype} only by a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_DLPACK_CUDA, self._c.device_index) if self._is_on_gpu else (_DLPACK_CPU, 0)

    def __dlpack__(
        self,
        *,
        stream: Union[int, Any, None] = None,
        max_version: Optional[tuple[int, int]] = None,
        dl_device: Optional[tuple[int, int]] = None,
        copy: Optional[bool] = None,
    ) -> Any:
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("the memory is exported as it is, where it is")
        # -1: the consumer sees to the order itself.
        if self._is_on_gpu and stream != -1:
            if self._event is not None:
                self._event().enqueue_wait(stream or 0)
            self.note_use(stream or 0)
        is_versioned = max_version is not None and max_version[0] >= 1
        return self._capsule(self._c.dtype, is_versioned)

    def _capsule(self, dtype: int, is_versioned: bool = False) -> Any:
        """DLPack's, of elements that are called `dtype`, as large as they are."""
        managed = lib.swiftep_py_export(self._c, dtype, is_versioned)
        if managed == NULL:
            raise MemoryError
        return _new_capsule(
            int(ffi.cast("uintptr_t", managed)),
            lib.swiftep_py_capsule_name(is_versioned),
            lib.swiftep_py_capsule_destructor(is_versioned),
        )

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("a tensor without dimensions has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<swiftep.Tensor {self.dtype.name} {list(self.shape)} on {self.device}>"


class _Bytes:
    """A tensor's bytes, which NumPy can name whatever the elements are."""

    __slots__ = ("tensor", "__array_interface__")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.__array_interface__ = {
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.address, False),
            "strides": None,
            "version": 3,
        }


def empty() -> Any:
    """A `swiftep_tensor *` for the library to fill."""
    tensor = new(TENSOR)
    tensor.size = TENSOR_SIZE
    return tensor


def owned(filled: Any, event: Any = None) -> Tensor:
    """The tensor that the library has stored in `filled`, released when the last that uses it is gone.

    Args:
        event: returns what the elements are there after, for streams that are given them.
    """
    owner = ffi.gc(filled, _RELEASE)
    return part(owner, owner, event)


def part(struct: Any, owner: Any, event: Any = None) -> Tensor:
    """The tensor that is stored in a part of what `owner` owns."""
    tensor = _new_tensor(Tensor)
    tensor._c = struct
    tensor._owner = owner
    tensor._event = event
    return tensor


_new_tensor = Tensor.__new__
