"""`ossia status`: the processes of a local cluster and what its groups hold."""

import json
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from cli.certificates import open_identity
from cli.home import cluster_dir
from protos.ossia.v1 import scheduler_pb2
from protos.ossia.v1.scheduler_pb2_grpc import SchedulerStub
from services.errors import from_rpc_error
from services.grpc_channel import open_channel
from services.process import StartError
from services.tls import Identity

TIMEOUT_S = 5.0


async def show_status(port: int, console: Console, tls_dir: Path | None = None) -> None:
    """Raises StartError where no cluster runs, OssiaError where its scheduler does not answer."""
    try:
        state = json.loads((cluster_dir(port) / "state.json").read_text())
    except FileNotFoundError:
        raise StartError(f"no cluster was started with --port {port} on this machine: start one with `ossia up --port {port}`") from None
    processes = Table("process", "pid", "address", "metrics")
    for name, facts in state.items():
        processes.add_row(name, str(facts["pid"]), facts.get("rest", facts["grpc"]), f"http://{facts['metrics']}/metrics")
    console.print(processes)
    console.print(_groups(await _ask(state["scheduler"]["grpc"], open_identity(tls_dir, "client"))))


async def _ask(address: str, identity: Identity | None) -> scheduler_pb2.SchedulerStatus:
    async with open_channel(address, identity=identity, role="scheduler") as channel:
        try:
            return await SchedulerStub(channel).Status(scheduler_pb2.StatusRequest(), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None


def _groups(status: scheduler_pb2.SchedulerStatus) -> Table:
    table = Table("group", "model", "running", "waiting", "blocks in use", "prefill tokens/s", "decode step", "steps")
    for group in status.groups:
        in_use = f"{group.num_full_blocks - group.num_free_full_blocks}/{group.num_full_blocks}"
        step, rate = f"{group.step_s * 1e3:.1f} ms", f"{group.prefill_tokens_per_s:,.0f}"
        table.add_row(
            group.group_id, group.model, str(group.num_running), str(group.num_waiting), in_use, rate, step, f"{group.num_steps:,}"
        )
    return table
