"""Expert-parallel communication for Mixture-of-Experts models.

    import numpy, swiftep
    from threading import Thread

    plan = swiftep.Plan(rank_count=2, tokens_per_rank_max=4, hidden=8, top_k=2, expert_count=4, dtype="float32",
                        combine_dtype="float32")

    def run(communicator):
        with swiftep.Buffer(communicator, plan) as buffer:
            x = numpy.ones((4, 8), numpy.float32)
            indices = numpy.array([[0, 2], [1, 0], [3, 2], [1, 3]])
            received = buffer.dispatch(x, indices)
            # The experts of this rank compute here, on received.rows.numpy(), in place.
            print(buffer.combine(received.rows, received.handle).tokens.numpy())

    for communicator in swiftep.Communicator.threads(2):
        Thread(target=run, args=[communicator]).start()
"""

from __future__ import annotations

from ._native import ffi as _ffi
from ._native import lib as _lib
from .buffer import Buffer
from .combine import CombineResult
from .communicator import Admission, AllGather, Communicator, MeetingPoint
from .dispatch import DispatchResult, Handle, ScaleOrder, Sizing, Waiting
from .dtypes import DType
from .errors import (
    BufferClosed,
    BufferLost,
    CheckFailed,
    DriverError,
    Error,
    InvalidArgument,
    MachineUnavailable,
    OutOfMemory,
    RankMasked,
    RankMissing,
    RanksDisagree,
    RendezvousFailed,
    SystemCallError,
)
from .events import Event
from .graphs import Graph
from .plan import Encoding, Layout, Masking, Plan, Scales
from .tensors import Tensor

__version__: str = _ffi.string(_lib.swiftep_version()).decode()

__all__ = [
    "Admission",
    "AllGather",
    "Buffer",
    "BufferClosed",
    "BufferLost",
    "CheckFailed",
    "CombineResult",
    "Communicator",
    "DType",
    "DispatchResult",
    "DriverError",
    "Encoding",
    "Error",
    "Event",
    "Graph",
    "Handle",
    "InvalidArgument",
    "Layout",
    "MachineUnavailable",
    "Masking",
    "MeetingPoint",
    "OutOfMemory",
    "Plan",
    "RankMasked",
    "RankMissing",
    "RanksDisagree",
    "RendezvousFailed",
    "ScaleOrder",
    "Scales",
    "Sizing",
    "SystemCallError",
    "Tensor",
    "Waiting",
]
