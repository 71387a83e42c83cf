"""`ossia weights`: checkpoints from a store to where a worker reads them, byte for byte as listed."""

import asyncio
from pathlib import Path
from typing import Annotated

import httpx
import typer

from cli.download import Download, Retries
from cli.object_store import open_store
from services.file_digests import make_manifest, read_manifest

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 30.0
app = typer.Typer(no_args_is_help=True, help="Downloads of checkpoints, each file checked against its SHA-256.")


@app.command()
def fetch(
    url: Annotated[str, typer.Argument(help="folder of the checkpoint: https://…, http://… or s3://bucket/prefix")],
    directory: Annotated[Path, typer.Argument(help="folder to fill; what is right in it stays, what broke off goes on")],
    manifest: Annotated[Path, typer.Option(help="list of files and digests, as sha256sum writes it")],
    credentials: Annotated[
        Path | None, typer.Option(help="folder with files named authorization, or access-key and secret-key (session-token)")
    ] = None,
    s3_endpoint: Annotated[str, typer.Option(help="endpoint of an S3-style store; none: AWS")] = "",
    s3_region: Annotated[str, typer.Option(help="region of the store")] = "us-east-1",
    attempts: Annotated[int, typer.Option(min=1, max=1000, help="tries in a row without a byte before it gives up")] = 10,
    at_once: Annotated[int, typer.Option(min=1, max=64, help="files downloaded at once")] = 4,
) -> None:
    """Fills DIRECTORY with exactly the listed files; ends with an error, and leaves nothing to serve, where one is not as listed."""
    files, store = read_manifest(manifest), open_store(url, s3_endpoint, s3_region, credentials)

    async def run() -> None:
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        async with httpx.AsyncClient(timeout=timeout, follow_redirects=True) as client:
            await Download(store, files, directory, client, Retries(attempts)).run(at_once)

    asyncio.run(run())


@app.command()
def manifest(
    directory: Annotated[Path, typer.Argument(help="folder of a checkpoint", exists=True, file_okay=False)],
    values: Annotated[bool, typer.Option("--values", help="as the chart's values take it: models.NAME.source.files")] = False,
) -> None:
    """Lists the files of DIRECTORY with their digests, for `fetch` or for the chart."""
    for file in make_manifest(directory):
        print(f'{file.name}: "{file.sha256}"' if values else f"{file.sha256}  {file.name}")
