"""Groups of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple, Optional

from ._arguments import int32
from ._native_types import ERROR_OUT, NULL, ffi, lib, new
from ._timeouts import nanoseconds
from .errors import Error, check, taken

#: Tells bytes to all ranks: takes this rank's, 1028 bytes on all, and returns those of all ranks in rank order. What it tells is
#: a secret of the ranks'.
AllGather = Callable[[bytes], "list[bytes]"]

_OUT = ffi.typeof("swiftep_communicator **")
_OUTS = ffi.typeof("swiftep_communicator *[]")


@dataclass(frozen=True)
class MeetingPoint:
    """Where the processes of a job meet.

    Attributes:
        token: a secret that they share, 16 to 1024 bytes of UTF-8: what `swiftep token` prints.
        address: "host:port", where the lowest rank listens; None: on the loopback address.
        job: keeps jobs apart that have the same token and no address.
    """

    token: str = field(repr=False)
    address: Optional[str] = None
    job: str = ""


class Admission(NamedTuple):
    """What `Communicator.admit` returns."""

    communicator: Communicator
    #: Why nobody new is in it; None where somebody is.
    refusal: Optional[Error]


class Communicator:
    """A rank's membership in a group of ranks.

    Creating buffers is collective: all ranks of a communicator do it in the same order. When ranks are missing, those that
    are left go on with `shrink`, and take in others with `admit`; both make a new communicator, since ranks are counted anew.

    The rank's membership ends when its communicator is closed, or unreferenced, and so are its buffers.

    Timeouts are in seconds. Where a function of the caller's raises an exception, that is raised.
    """

    __slots__ = ("_c", "__weakref__")

    def __init__(self) -> None:
        raise TypeError("communicators are made by Communicator.threads, .processes, .from_environment and others")

    @classmethod
    def _owning(cls, pointer: Any) -> Communicator:
        communicator = cls.__new__(cls)
        communicator._c = ffi.gc(pointer, lib.swiftep_communicator_free)
        return communicator

    # Making a group

    @classmethod
    def threads(cls, rank_count: int) -> list[Communicator]:
        """Ranks that are threads of this process, one communicator each, to be used from a thread of its own.

        Raises:
            InvalidArgument: `rank_count` is not positive.
        """
        # More than the library takes are refused before any is stored.
        made = new(_OUTS, max(1, min(rank_count, 1 << 16)))
        error = new(ERROR_OUT)
        check(lib.swiftep_communicators_of_threads(int32(rank_count), made, error), error)
        return [cls._owning(made[rank]) for rank in range(rank_count)]

    @classmethod
    def processes(
        cls, rank: int, rank_count: int, all_gather: AllGather, *, timeout: Optional[float] = None
    ) -> Communicator:
        """Ranks that are processes of this host, this one being `rank`. Collective.

        Args:
            all_gather: is called once, on this thread.
            timeout: how long each other process is waited for, once `all_gather` has returned; None: 100 seconds.

        Raises:
            InvalidArgument, RanksDisagree, RankMissing, RendezvousFailed, SystemCallError; what `all_gather` raises.
        """
        with _Gathering(all_gather, rank_count) as gathering:
            return gathering.call(
                lambda context, made, error: lib.swiftep_communicator_of_processes(
                    rank, rank_count, nanoseconds(timeout), lib.swiftep_py_all_gather, context, made, error
                )
            )

    @classmethod
    def from_environment(cls, *, timeout: Optional[float] = None) -> Communicator:
        """Ranks that find each other by what their launcher has set in the environment. Collective.

        Raises:
            InvalidArgument, RanksDisagree, RankMissing, RendezvousFailed, SystemCallError.
        """
        return _made(
            lambda made, error: lib.swiftep_communicator_from_environment(nanoseconds(timeout), made, error)
        )

    @classmethod
    def at(
        cls, point: MeetingPoint, rank: int, rank_count: int, *, timeout: Optional[float] = None
    ) -> Communicator:
        """Ranks that are processes of this host, this one being `rank`, which meet at `point`. Collective.

        Raises:
            InvalidArgument, RanksDisagree, RankMissing, RendezvousFailed, SystemCallError.
        """
        with _c_point(point) as place:
            return _made(
                lambda made, error: lib.swiftep_communicator_at(
                    place, rank, rank_count, nanoseconds(timeout), made, error
                )
            )

    # Joining one

    @classmethod
    def join(cls, all_gather: AllGather, *, timeout: Optional[float] = None) -> Communicator:
        """Becomes the last rank of a group whose ranks call `admit`.

        Args:
            all_gather: is called once, as the second of two.

        Raises:
            RanksDisagree, RankMissing, RendezvousFailed, SystemCallError; what `all_gather` raises.
        """
        with _Gathering(all_gather, 2) as gathering:
            return gathering.call(
                lambda context, made, error: lib.swiftep_communicator_join(
                    nanoseconds(timeout), lib.swiftep_py_all_gather, context, made, error
                )
            )

    @classmethod
    def join_from_environment(cls, *, timeout: Optional[float] = None) -> Communicator:
        """Becomes the last rank of a group that was made from the environment.

        Raises:
            As `from_environment`.
        """
        return _made(
            lambda made, error: lib.swiftep_communicator_join_from_environment(nanoseconds(timeout), made, error)
        )

    @classmethod
    def join_at(cls, point: MeetingPoint, *, timeout: Optional[float] = None) -> Communicator:
        """Becomes the last rank of a group that was made at `point`.

        Raises:
            As `at`.
        """
        with _c_point(point) as place:
            return _made(
                lambda made, error: lib.swiftep_communicator_join_at(place, nanoseconds(timeout), made, error)
            )

    # Changing it

    def shrink(self, *, timeout: Optional[float] = None) -> Communicator:
        """The ranks that are still there, in the same order, counted anew. Collective over those.

        Args:
            timeout: how long a rank is waited for that is alive but does not call this; None: 100 seconds.

        Raises:
            RankMissing: step "regrouping", with this rank's own number: the others go on without it.
        """
        current = self._open
        return _made(
            lambda made, error: lib.swiftep_communicator_shrink(current, nanoseconds(timeout), made, error)
        )

    def admit(self, all_gather: Optional[AllGather] = None, *, timeout: Optional[float] = None) -> Admission:
        """As `shrink`, and a process that calls `join` becomes the last rank. Collective.

        Args:
            all_gather: is called on the lowest rank only, as the first of two; None: they meet where the job was started.
            timeout: how long to wait for the one that joins; None: 100 seconds.

        Returns:
            The new communicator, with one rank more than stayed, or a refusal that says why not. An exception of
            `all_gather`'s is the refusal's `__cause__`.

        Raises:
            As `shrink`; InvalidArgument where ranks are threads.
        """
        current = self._open
        refusal = new(ERROR_OUT)
        if all_gather is None:
            communicator = _made(
                lambda made, error: lib.swiftep_communicator_admit(
                    current, nanoseconds(timeout), NULL, NULL, made, refusal, error
                )
            )
            return Admission(communicator, _refusal(refusal[0]))
        with _Gathering(all_gather, 2) as gathering:
            try:
                communicator = gathering.call(
                    lambda context, made, error: lib.swiftep_communicator_admit(
                        current, nanoseconds(timeout), lib.swiftep_py_all_gather, context, made, refusal, error
                    )
                )
            finally:
                refused = _refusal(refusal[0])
            if refused is not None and gathering.exception is not None:
                if not isinstance(gathering.exception, Exception):
                    raise gathering.exception
                refused.__cause__ = gathering.exception
            return Admission(communicator, refused)

    # What it is

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""
        return int(lib.swiftep_communicator_rank(self._open))

    @property
    def rank_count(self) -> int:
        """How many ranks there are."""
        return int(lib.swiftep_communicator_rank_count(self._open))

    @property
    def generation(self) -> int:
        """How often the group has changed."""
        return int(lib.swiftep_communicator_generation(self._open))

    def close(self) -> None:
        """Ends the rank's membership, once its buffers are gone too. Closed again, nothing happens."""
        # Calls under way hold the pointer, which is freed with the last of them.
        self._c = None

    @property
    def _open(self) -> Any:
        pointer = self._c
        if pointer is None:
            raise ValueError("the communicator is closed")
        return pointer

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._c is None:
            return "<swiftep.Communicator, closed>"
        return f"<swiftep.Communicator of rank {self.rank} of {self.rank_count}>"


def _made(call: Callable[[Any, Any], int]) -> Communicator:
    made, error = new(_OUT), new(ERROR_OUT)
    check(call(made, error), error)
    return Communicator._owning(made[0])


def _refusal(error: Any) -> Optional[Error]:
    return None if error == NULL else taken(0, error)


class _c_point:
    """The C struct of a meeting point, and the texts that it points to."""

    def __init__(self, point: MeetingPoint) -> None:
        self._texts = [
            NULL if text is None else new("char[]", text.encode())
            for text in (point.token, point.address, point.job)
        ]

    def __enter__(self) -> Any:
        place = new("swiftep_meeting_point *")
        place.size = ffi.sizeof(place[0])
        place.token, place.address, place.job = self._texts
        return place

    def __exit__(self, *_: Any) -> None:
        self._texts.clear()


class _Gathering:
    """A call that is given a function of the caller's: what that raises goes past the library, and is raised behind it."""

    def __init__(self, all_gather: AllGather, rank_count: int) -> None:
        self._all_gather = all_gather
        self._rank_count = rank_count
        self._handle = ffi.new_handle(self)
        self.exception: Optional[BaseException] = None

    def __enter__(self) -> _Gathering:
        return self

    def __exit__(self, *_: Any) -> None:
        # The handle's cycle.
        self._handle = None

    def call(self, function: Callable[[Any, Any, Any], int]) -> Communicator:
        try:
            return _made(lambda made, error: function(self._handle, made, error))
        except Error:
            if self.exception is not None:
                raise self.exception
            raise

    def gather(self, mine: bytes, everything: Any) -> None:
        gathered = list(self._all_gather(mine))
        if len(gathered) != self._rank_count or any(len(bytes(other)) != len(mine) for other in gathered):
            lengths = [len(bytes(other)) for other in gathered]
            raise ValueError(
                f"all_gather: expected {self._rank_count} times {len(mine)} bytes, found lengths {lengths}"
            )
        joined = b"".join(bytes(other) for other in gathered)
        ffi.memmove(everything, joined, len(joined))


@ffi.def_extern(name="swiftep_py_all_gather", error=1)  # type: ignore[untyped-decorator, unused-ignore]
def _all_gather(context: Any, mine: Any, byte_count: int, everything: Any) -> int:
    gathering: _Gathering = ffi.from_handle(context)
    try:
        gathering.gather(bytes(ffi.buffer(mine, byte_count)), everything)
        return 0
    except BaseException as exception:
        gathering.exception = exception
        return 1
