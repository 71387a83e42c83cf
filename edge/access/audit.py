"""The audit log: one JSON line a call, in a file of its own. Who, what, when and how it ended; never what was said.

Lines are written on a thread. The file may be moved away at any time: a new one is begun.
"""

import datetime
import logging
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener, WatchedFileHandler
from pathlib import Path

import orjson

MAX_WAITING = 10_000  # lines; beyond it the disk is too slow, and lines are dropped and counted


class AuditLog:
    def __init__(self, waiting: "queue.Queue[logging.LogRecord]") -> None:
        self._handler = _AuditQueue(waiting)

    @property
    def num_dropped(self) -> int:
        return self._handler.num_dropped

    def note(self, **fields: object) -> None:
        line = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"), **fields}
        self._handler.handle(logging.LogRecord("audit", logging.INFO, "", 0, orjson.dumps(line).decode(), None, None))


class _AuditQueue(QueueHandler):
    num_dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            super().enqueue(record)
        except queue.Full:
            self.num_dropped += 1


@contextmanager
def open_audit_log(path: Path) -> Iterator[AuditLog]:
    """Appends to `path`. Leaving writes what waits. Raises OSError where the file cannot be opened."""
    writer = WatchedFileHandler(path, encoding="utf-8")
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING)
    listener = QueueListener(waiting, writer)
    listener.start()
    try:
        yield AuditLog(waiting)
    finally:
        listener.stop()
        writer.close()
