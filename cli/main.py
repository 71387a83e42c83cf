"""The `ossia` command: the three processes, a whole cluster of them on one machine, a chat with it, and checkpoints to try it on."""

import asyncio
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli import checkpoint, keys, weights
from cli.certificates import write_certificates
from cli.chat import ask, converse, first_model
from cli.nano import is_nano, nano_flags, title
from cli.status import show_status
from cli.up import UpOptions, run_cluster
from models.nano.cache import NANO_NAME, expanded_model
from protos.ossia.v1 import inference_pb2 as pb
from services.errors import OssiaError, Unavailable
from services.grpc_server import PortInUse
from services.process import StartError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(keys.app, name="keys")
app.add_typer(weights.app, name="weights")

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
TlsDir = Annotated[Path | None, typer.Option(help="folder that `ossia certificates` wrote: mutual TLS between the processes")]
Address = Annotated[str, typer.Option(help="the gRPC door of a running cluster; https://host:port where it has a certificate")]


def main() -> None:
    """Runs the command; what a user can cause ends in one line."""
    try:
        app()
    except (StartError, PortInUse, OssiaError) as error:
        print(f"ossia: {error}", file=sys.stderr)
        sys.exit(1)


@app.command(context_settings=PASS_ON)
def edge(context: typer.Context) -> None:
    """The edge process; --help lists its flags."""
    _become("edge", context.args)


@app.command(context_settings=PASS_ON)
def scheduler(context: typer.Context) -> None:
    """The scheduler process; --help lists its flags."""
    _become("scheduler", context.args)


@app.command(context_settings=PASS_ON)
def worker(context: typer.Context) -> None:
    """The worker process, rank 0 of a group; --help lists its flags. `--model ossia-nano` needs no --model-dir."""
    _become("worker", [*context.args, *nano_flags(context.args)])


def _become(process: str, argv: list[str]) -> None:
    os.execv(sys.executable, [sys.executable, "-m", process, *argv])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def up(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="address that both doors listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="REST door; 0 takes a free port")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC door; 0 takes a free port")] = 9000,
    model: Annotated[Path | None, typer.Option(help="folder of a checkpoint; none: ossia-nano, a small demonstration model")] = None,
    model_name: Annotated[str, typer.Option(help="name to serve it under; none: the folder's")] = "",
    tp: Annotated[int, typer.Option(min=1, max=8, help="ranks of each group")] = 1,
    groups: Annotated[int, typer.Option(min=1, max=64, help="worker groups, each a copy of the model")] = 1,
    backend: Annotated[str, typer.Option(help="model, or scripted: replies from a file")] = "model",
    script: Annotated[Path | None, typer.Option(help="rules of the scripted backend (YAML)")] = None,
    etcd: Annotated[str, typer.Option(help="etcd endpoints, comma separated; none: static addresses")] = "",
    otlp_endpoint: Annotated[str, typer.Option(help="OTLP gRPC collector for traces")] = "",
    tls_dir: TlsDir = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="where ossia-nano is expanded; none: $OSSIA_CACHE_DIR, or the user's cache")
    ] = None,
) -> None:
    """Starts edge, scheduler and workers on this machine and keeps them alive until Ctrl-C. Other flags go to the workers."""
    console = Console()
    if backend == "model" and is_nano(model):
        model, model_name = expanded_model(root=cache_dir, tell=console.print), model_name or NANO_NAME
    options = UpOptions(
        host=host,
        port=port,
        grpc_port=grpc_port,
        model=model or Path(),
        model_name=model_name or (model.resolve().name if model else "scripted"),
        backend=backend,
        script=script,
        num_groups=groups,
        tensor_parallel_size=tp,
        etcd=etcd,
        otlp_endpoint=otlp_endpoint,
        tls_dir=tls_dir,
        worker_flags=tuple(context.args),
    )
    asyncio.run(run_cluster(options, console))


@app.command()
def run(model: str, prompt: str, address: Address = "127.0.0.1:9000") -> None:
    """Asks MODEL of a running cluster one thing and streams its answer."""
    message = pb.Message(role=pb.ROLE_USER, content=[pb.ContentPart(text=prompt)])
    _with_cluster(address, ask(address, model, [message], Console()))


@app.command()
def chat(model: Annotated[str, typer.Option(help="none: the first one served")] = "", address: Address = "127.0.0.1:9000") -> None:
    """A conversation with a running cluster; Ctrl-D ends it."""
    _with_cluster(address, _chat(address, model))


async def _chat(address: str, model: str) -> None:
    console = Console()
    name = model or await first_model(address)
    console.print(f"{title(name)}; Ctrl-D ends", style="dim")
    await converse(address, name, console, lambda: console.input("[bold]> [/]"))


@app.command()
def status(port: Annotated[int, typer.Option(help="the --port that the cluster was started with")] = 8000, tls_dir: TlsDir = None) -> None:
    """The processes of a cluster that `ossia up` started on this machine, and what its groups hold."""
    asyncio.run(show_status(port, Console(), tls_dir))


@app.command()
def certificates(
    directory: Path,
    days: Annotated[int, typer.Option(min=1, max=825, help="how long the roles' certificates are good for")] = 90,
    host: Annotated[list[str] | None, typer.Option(help="a name or address that the edge's certificate bears too; may be repeated")] = None,
) -> None:
    """Makes an authority in DIRECTORY and a certificate for each role, for --tls-dir. Run it again to rotate those of the roles."""
    write_certificates(directory, days, tuple(host or ()))


def _with_cluster(address: str, work: Coroutine[None, None, object]) -> None:
    try:
        asyncio.run(work)
    except Unavailable as error:
        raise StartError(f"no cluster answers at {address} ({error.message}): start one with `ossia up`") from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


if __name__ == "__main__":
    main()
