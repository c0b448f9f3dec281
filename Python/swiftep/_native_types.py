"""C types that are looked up once: cffi parses a type's name each time that it is given one."""

from ._native import ffi, lib

NULL = ffi.NULL
new = ffi.new

ERROR_OUT = ffi.typeof("swiftep_error **")
TENSOR = ffi.typeof("swiftep_tensor *")
TENSOR_SIZE = ffi.sizeof("swiftep_tensor")
ARGUMENTS = ffi.typeof("swiftep_py_argument[]")
TENSORS = ffi.typeof("const swiftep_tensor *[]")
DISPATCH_CALL = ffi.typeof("swiftep_py_dispatch_call *")
COMBINE_CALL = ffi.typeof("swiftep_py_combine_call *")
EVENTS = ffi.typeof("const swiftep_event *[]")
INT64S = ffi.typeof("int64_t[]")
VOID_POINTER = ffi.typeof("void *")

__all__ = ["ffi", "lib"]
