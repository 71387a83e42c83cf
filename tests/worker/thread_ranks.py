"""A group's ranks as threads of one process: 8 of them start in no time. Sums run in the order of the ranks, so that they are exact."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from worker.plan_draft import Limits
from worker.runner import ModelBackend
from worker.sequence_table import SequenceTable
from worker.step_broadcast import Leader, follow
from worker.tensor_parallel import TensorParallel

TIMEOUT_S = 240.0


class Meeting:
    """Where the ranks of one group lay down what they bring. Of the two tables, one is taken from while the other is laid."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.tables: list[list[Tensor | bytes | None]] = [[None] * size, [None] * size]


class ThreadRank:
    """One rank's `TensorParallel`."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        self.rank = rank
        self.size = size
        self._meeting = meeting
        self._turn = 0

    def _exchange(self, brought: Tensor | bytes | None) -> list[Tensor | bytes | None]:
        table, self._turn = self._meeting.tables[self._turn], 1 - self._turn
        table[self.rank] = brought
        self._meeting.barrier.wait()
        return table.copy()

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._tensors(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._tensors(x), dim=-1)

    def _tensors(self, x: Tensor) -> list[Tensor]:
        return [one for one in self._exchange(x) if isinstance(one, Tensor)]

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        first = self._exchange(payload)[0]
        assert isinstance(first, bytes)
        return first

    def close(self) -> None:
        self._meeting.barrier.abort()


@contextmanager
def rank_threads(
    size: int, load: Callable[[TensorParallel], ModelBackend], limits: Callable[[ModelBackend], Limits]
) -> Iterator[tuple[ModelBackend, Leader | None]]:
    """Rank 0's backend, and what leads the others, which follow on threads of their own."""
    meeting = Meeting(size)
    ranks = [ThreadRank(rank, size, meeting) for rank in range(size)]

    def run(rank: ThreadRank) -> None:
        backend = load(rank)
        follow(rank, backend, SequenceTable(limits(backend)))

    with ThreadPoolExecutor(size) as threads:
        following = [threads.submit(run, rank) for rank in ranks[1:]]
        try:
            backend = load(ranks[0])
            leader = Leader(ranks[0]) if size > 1 else None
            yield backend, leader
            if leader:
                leader.send_stop()
            for one in following:
                one.result(TIMEOUT_S)
        finally:
            meeting.barrier.abort()
