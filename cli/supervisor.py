"""Child processes: started, heard until they serve, started again when they die, ended in order."""

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.process import StartError, die_with_parent

RESTART_S = (0.2, 5.0)  # first and longest wait before a dead child is started again
STEADY_S = 10.0  # a child that lived so long is started again without a wait

Report = Callable[[str], None]


@dataclass
class Child:
    """One process to keep alive. `argv` may change between its lives: a port once taken is kept."""

    name: str
    argv: list[str]
    log_path: Path
    announced: Mapping[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None

    async def start(self, report: Report) -> None:
        """Returns once it serves. Raises StartError with its own last words where it ends before."""
        with self.log_path.open("ab") as log:
            log_start = log.tell()
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                *self.argv,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            said = json.loads(line)
            if said["event"] == "serving":
                self.announced = said
                return
            report(f"{self.name}: {said['message']}")
        await self.process.wait()
        raise StartError(f"{self.name} did not start: {self._last_words(log_start)}")

    def _last_words(self, log_start: int) -> str:
        lines = self.log_path.read_bytes()[log_start:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended without a word; see {self.log_path}"

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL where it does not end within `grace_s`."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), grace_s)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


async def keep_alive(child: Child, report: Report) -> None:
    """Starts the child again whenever it ends, for ever. Its addresses stay as they were announced first."""
    wait_s, clock = RESTART_S[0], asyncio.get_running_loop().time
    while True:
        assert child.process is not None
        started = clock()
        code = await child.process.wait()
        if clock() - started > STEADY_S:
            wait_s = RESTART_S[0]
        report(f"{child.name} ended ({_describe(code)}) and is started again; its log is {child.log_path}")
        while True:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RESTART_S[1])
            try:
                await child.start(report)
            except StartError as error:
                report(str(error))
            else:
                report(f"{child.name} serves again")
                break


def _describe(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
