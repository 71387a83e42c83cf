"""How rank 0 leads: every command that changes the table goes to the other ranks as bytes, before rank 0 computes it.

Rank 0 has judged a plan when it sends it, so a follower that refuses one is out of step with the group: it raises, and the group dies. A
plan says whether the step before it was settled when rank 0 judged it, so that every rank judges it by an equal table.
"""

from typing import Protocol

from protos.ossia.v1 import worker_pb2
from worker.backend import Backend
from worker.sequence_table import SequenceTable
from worker.step_pipeline import StepPipeline
from worker.step_wire import decode_plan

PLAN, PLAN_AHEAD, FORGET, STOP = b"P", b"A", b"F", b"S"  # ahead: the step before it was still under way


class Ranks(Protocol):
    """What is needed of a group's ranks (`tensor_parallel.TensorParallel`), without its tensors."""

    def broadcast_bytes(self, payload: bytes | None) -> bytes: ...

    def close(self) -> None: ...


class Leader:
    """Rank 0's side."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def send_plan(self, message: worker_pb2.StepPlan, is_ahead: bool) -> None:
        self._ranks.broadcast_bytes((PLAN_AHEAD if is_ahead else PLAN) + message.SerializeToString())

    def send_forget(self) -> None:
        self._ranks.broadcast_bytes(FORGET)

    def send_stop(self) -> None:
        self._ranks.broadcast_bytes(STOP)


def follow(ranks: Ranks, backend: Backend, table: SequenceTable) -> None:
    """The other ranks' side: does what rank 0 does until it says stop."""
    pipeline = StepPipeline(backend, table)
    while (command := ranks.broadcast_bytes(None)) != STOP:
        kind, message = command[:1], command[1:]
        if kind != PLAN_AHEAD:
            pipeline.settle()
        if kind == FORGET:
            table.forget()
            continue
        plan = decode_plan(worker_pb2.StepPlan.FromString(message), backend.facts)
        pipeline.run(plan, table.apply(plan), lambda _output, _time: None)
