"""How far one rank's start is: in its log, and for whoever started the process."""

import time
from collections.abc import Callable

from services.process import announce_progress
from services.telemetry import get_logger

log = get_logger(__name__)

NUM_TOLD = 10  # times that each phase tells something


class StartProgress:
    """Hears how a start goes on. This one tells nobody."""

    def begin(self, phase: str) -> None:
        return

    def note_bytes(self, num_done: int, num_all: int) -> None:
        return

    def note_count(self, num_done: int, num_all: int) -> None:
        return


class LoadProgress(StartProgress):
    """Tells of each phase a few times: bytes, GB/s and the seconds left at that rate. `on_loading` hears every count of loaded bytes."""

    def __init__(
        self,
        rank: int,
        on_loading: Callable[[int, int], None] = lambda num_done, num_all: None,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[str], None] = announce_progress,
    ) -> None:
        self._rank = rank
        self._on_loading = on_loading
        self._clock = clock
        self._tell = tell
        self._phase = ""
        self._told = -1  # tenths of the phase
        self._began_s = 0.0

    def begin(self, phase: str) -> None:
        """What follows until the next one."""
        self._phase, self._told, self._began_s = phase, -1, self._clock()
        log.info("starting", rank=self._rank, phase=phase)
        self._tell(f"rank {self._rank}: {phase}")

    def note_bytes(self, num_done: int, num_all: int) -> None:
        if self._phase == "loading":
            self._on_loading(num_done, num_all)
        if not self._is_worth_telling(num_done, num_all):
            return
        rate = num_done / max(1e-9, self._clock() - self._began_s)
        left_s = (num_all - num_done) / max(1.0, rate)
        log.info(
            self._phase,
            rank=self._rank,
            bytes_done=num_done,
            bytes_total=num_all,
            gb_per_s=round(rate / 1e9, 3),
            left_s=round(left_s, 1),
        )
        done, total = num_done / 2**20, num_all / 2**20
        self._tell(f"rank {self._rank}: {self._phase}, {done:,.0f} of {total:,.0f} MiB, {rate / 1e9:.2f} GB/s, {left_s:.0f} s left")

    def note_count(self, num_done: int, num_all: int) -> None:
        """The same for a phase that counts things."""
        if self._is_worth_telling(num_done, num_all):
            self._tell(f"rank {self._rank}: {self._phase}, {num_done} of {num_all}")

    def _is_worth_telling(self, num_done: int, num_all: int) -> bool:
        reached = NUM_TOLD * num_done // max(1, num_all)
        is_new, self._told = reached > self._told, max(reached, self._told)
        return is_new
