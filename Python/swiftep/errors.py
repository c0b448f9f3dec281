"""What can go wrong. Where all ranks are concerned, all of them raise the same from the same collective call."""

from __future__ import annotations

from typing import Any, Optional

from ._native import ffi, lib


class Error(Exception):
    """Everything that the library refuses or fails with.

    Attributes (None where an error does not have it):
        code: the number that the C library has for it.
        rank: the rank at fault.
        argument: the argument that cannot be used, or what the ranks disagree about.
        expected: what would have been right, or what rank 0 has passed.
        found: what was passed instead, or what `rank` has passed.
        step: where a missing rank was waited for: "setup", "regrouping", "input", "exchange" or "completion".
        needed_byte_count, available_byte_count: of memory.
        system_code: the system's errno, or the driver's code.
        masking_rank: the rank that goes on without `rank`.
        cause: the error that a buffer was lost by.
    """

    def __init__(
        self,
        message: str,
        *,
        code: int = 0,
        rank: Optional[int] = None,
        argument: Optional[str] = None,
        expected: Optional[str] = None,
        found: Optional[str] = None,
        step: Optional[str] = None,
        needed_byte_count: Optional[int] = None,
        available_byte_count: Optional[int] = None,
        system_code: Optional[int] = None,
        masking_rank: Optional[int] = None,
        cause: Optional[Error] = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.rank = rank
        self.argument = argument
        self.expected = expected
        self.found = found
        self.step = step
        self.needed_byte_count = needed_byte_count
        self.available_byte_count = available_byte_count
        self.system_code = system_code
        self.masking_rank = masking_rank
        self.cause = cause
        self.__cause__ = cause

    def __reduce__(self) -> Any:
        fields = {name: value for name, value in vars(self).items() if name in _FIELDS}
        return _restored, (type(self), self.message, fields)


class InvalidArgument(Error, ValueError):
    """An argument cannot be used; `rank` is the rank that passed it."""


class RanksDisagree(Error):
    """The ranks made calls that do not belong together."""


class RankMissing(Error):
    """`rank` did not reach `step`. The buffer is lost. All ranks that are left name the same rank."""


class OutOfMemory(Error, MemoryError):
    """The arena of `rank` can hold no more, or a buffer does not fit."""


class BufferLost(Error):
    """An earlier operation of this buffer has failed for `cause`; the buffer can only be closed."""


class CheckFailed(Error):
    """Of checked kernels: a kernel of `rank` would have gone astray."""


class RankMasked(Error):
    """Rank `masking_rank` goes on without `rank`, which is the caller's own."""


class BufferClosed(Error):
    """The buffer is closed."""


class RendezvousFailed(Error):
    """The ranks could not find each other."""


class SystemCallError(Error):
    """The system refused `rank` a call."""


class DriverError(Error):
    """The NVIDIA driver refused `rank` a call."""


class MachineUnavailable(Error):
    """The machine that was asked for is not here, or cannot do what was asked."""


_TYPES = {
    lib.SWIFTEP_INVALID_ARGUMENT: InvalidArgument,
    lib.SWIFTEP_RANKS_DISAGREE: RanksDisagree,
    lib.SWIFTEP_RANK_MISSING: RankMissing,
    lib.SWIFTEP_OUT_OF_MEMORY: OutOfMemory,
    lib.SWIFTEP_BUFFER_LOST: BufferLost,
    lib.SWIFTEP_CHECK_FAILED: CheckFailed,
    lib.SWIFTEP_RANK_MASKED: RankMasked,
    lib.SWIFTEP_BUFFER_CLOSED: BufferClosed,
    lib.SWIFTEP_RENDEZVOUS_FAILED: RendezvousFailed,
    lib.SWIFTEP_SYSTEM_CALL: SystemCallError,
    lib.SWIFTEP_DRIVER: DriverError,
    lib.SWIFTEP_MACHINE_UNAVAILABLE: MachineUnavailable,
}

_FIELDS = (
    "code",
    "rank",
    "argument",
    "expected",
    "found",
    "step",
    "needed_byte_count",
    "available_byte_count",
    "system_code",
    "masking_rank",
    "cause",
)


def _restored(kind: type[Error], message: str, fields: dict[str, Any]) -> Error:
    return kind(message, **fields)


def _text(pointer: Any) -> Optional[str]:
    return None if pointer == ffi.NULL else ffi.string(pointer).decode(errors="replace")


def _read(error: Any) -> Error:
    code = error.code
    has_memory = code == lib.SWIFTEP_OUT_OF_MEMORY
    has_system_code = code in (lib.SWIFTEP_SYSTEM_CALL, lib.SWIFTEP_DRIVER)
    return _TYPES.get(code, Error)(
        _text(error.message) or f"error {code}",
        code=code,
        rank=error.rank if error.rank >= 0 else None,
        argument=_text(error.argument),
        expected=_text(error.expected),
        found=_text(error.found),
        step=_text(error.step),
        needed_byte_count=error.needed_byte_count if has_memory else None,
        available_byte_count=error.available_byte_count if has_memory else None,
        system_code=error.system_code if has_system_code else None,
        masking_rank=error.masking_rank if code == lib.SWIFTEP_RANK_MASKED else None,
        cause=_read(error.cause) if error.cause != ffi.NULL else None,
    )


def taken(code: int, error: Any) -> Error:
    """The exception for a call that has returned `code` and stored `error` (a `swiftep_error *`), which is freed."""
    if error == ffi.NULL:
        return _TYPES.get(code, Error)(f"error {code}", code=code)
    try:
        return _read(error)
    finally:
        lib.swiftep_error_free(error)


def refusal(argument: str, expected: str, found: Any) -> InvalidArgument:
    """An error of this rank alone, before the others are told anything."""
    return InvalidArgument(
        f"{argument}: expected {expected}, found {found}",
        code=lib.SWIFTEP_INVALID_ARGUMENT,
        argument=argument,
        expected=expected,
        found=str(found),
    )


def check(code: int, error: Any) -> None:
    """Raises what a call has failed with. `error` is the `swiftep_error **` that it was given."""
    if code != 0:
        raise taken(code, error[0])
