"""Objects that asynchronous calls use after they have returned.

The library says when it uses them no more, on any thread. Its threads do not run Python: what is unused is forgotten here,
on the interpreter's main thread as soon as it runs, or in the next call.
"""

from __future__ import annotations

import atexit
import itertools
from typing import Any

from ._native import ffi, lib

_kept: dict[int, Any] = {}
_keys = itertools.count(1)


def keep(objects: Any) -> Any:
    """Keeps `objects` until nobody uses the owner that is returned any more: the caller does until `end_use`."""
    drain()
    key = next(_keys)
    owner = lib.swiftep_py_owner_create(key)
    if owner == ffi.NULL:
        raise MemoryError
    _kept[key] = objects
    return owner


def end_use(owner: Any) -> None:
    lib.swiftep_py_owner_release(owner)
    drain()


def drain() -> None:
    """Forgets what nobody uses any more."""
    while True:
        key = lib.swiftep_py_next_unused()
        if key == 0:
            return
        _kept.pop(key, None)


@ffi.def_extern(name="swiftep_py_drain")  # type: ignore[untyped-decorator, unused-ignore]
def _drain() -> None:
    drain()


atexit.register(lib.swiftep_py_stop)
