"""Where a request's tokens go: to the edge's shared stream, or to the one caller of Generate. Both take one frame per step.

A frame that has not been written yet takes in the next one, so that a slow reader costs memory for its tokens and not for its frames.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence

from protos.ossia.v1 import scheduler_pb2


class Outbox:
    """Frames for one caller. `put` never waits; `frames` gives what has gathered since the last one."""

    def __init__(self) -> None:
        self._pending = scheduler_pb2.SchedulerFrame()
        self._is_ready = asyncio.Event()
        self._is_closed = False

    def put(self, deltas: Sequence[scheduler_pb2.TokenDelta]) -> None:
        self._pending.deltas.extend(deltas)
        self._is_ready.set()

    def put_status(self, status: scheduler_pb2.SchedulerStatus) -> None:
        self._pending.status.CopyFrom(status)
        self._is_ready.set()

    def close(self) -> None:
        """Ends `frames` after what is pending."""
        self._is_closed = True
        self._is_ready.set()

    async def frames(self) -> AsyncIterator[scheduler_pb2.SchedulerFrame]:
        while True:
            await self._is_ready.wait()
            self._is_ready.clear()
            frame, self._pending = self._pending, scheduler_pb2.SchedulerFrame()
            if frame.ByteSize():
                yield frame
            if self._is_closed and not self._pending.ByteSize():
                return
