"""Work that ends when its client goes away."""

import asyncio
from types import TracebackType

from starlette.types import Receive

from services.errors import Cancelled


class while_connected:  # noqa: N801 - used as a statement, as asyncio.timeout is
    """Cancels the block as soon as the client has gone, and raises Cancelled then.

    The request's body must have been read: what `receive` says next is the disconnect. The block runs on the task that enters it, so that
    what it sends goes out in the turn of the event loop that brought it.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_gone = False

    def __enter__(self) -> None:
        owner = asyncio.current_task()
        assert owner is not None
        self._owner, self._num_cancelling = owner, owner.cancelling()
        self._watcher = asyncio.create_task(_wait_gone(self._receive))
        self._watcher.add_done_callback(self._cancel)

    def _cancel(self, watcher: "asyncio.Task[None]") -> None:
        if not watcher.cancelled():
            self._has_gone = True
            self._owner.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._watcher.remove_done_callback(self._cancel)
        self._watcher.cancel()
        if self._has_gone and self._owner.uncancel() <= self._num_cancelling and kind is asyncio.CancelledError:
            raise Cancelled("the client went away") from self._watcher.exception()


async def _wait_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
