from typing import Any

# Declared by the library's C header, which cffi reads.
ffi: Any
lib: Any
