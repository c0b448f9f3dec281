"""The extension module `swiftep._native`: the library's C header and `native/`, through cffi.

What cffi is told of the library is the header itself, so that there is no second copy to go stale.
"""

import os
import re
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
# The folder with `include/swiftep.h` and `lib/libswiftep.so`.
LIBRARY = Path(os.environ["SWIFTEP_C"])

CALLBACKS = """
extern "Python" int32_t swiftep_py_all_gather(void *context, const void *bytes, size_t byte_count, void *all);
extern "Python" swiftep_code swiftep_py_record_body(void *context);
extern "Python+C" void swiftep_py_drain(void);
"""


def declarations(header: Path) -> str:
    """What a header declares, without comments and preprocessor lines."""
    text = header.read_text()
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.DOTALL)
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    return re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)


ffi = cffi.FFI()
ffi.cdef(
    declarations(LIBRARY / "include/swiftep.h")
    + declarations(HERE / "native/swiftep_python.h")
    + CALLBACKS
)
ffi.set_source(
    "swiftep._native",
    '#include "swiftep_python.h"',
    sources=[f"native/{name}.c" for name in ("owners", "arguments", "dlpack", "pool")],
    include_dirs=["native", str(LIBRARY / "include")],
    library_dirs=[str(LIBRARY / "lib")],
    libraries=["swiftep"],
    extra_compile_args=["-std=c11", "-O2", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    extra_link_args=["-s", "-Wl,-rpath,$ORIGIN"],
    py_limited_api=True,
)
