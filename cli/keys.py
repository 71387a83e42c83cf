"""`ossia keys`: the file of API keys that edges read. A key's text is shown once, when it is made; the file holds its hash."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from edge.access.caller import INFERENCE, ROLES
from edge.access.keys import KeyFileError, KeyRecord, edit_keys, make_key, read_keys, utc_now
from services.process import StartError

app = typer.Typer(no_args_is_help=True, help="API keys: edges read the file again within a second of a change.")
File = Annotated[Path, typer.Option("--file", envvar="OSSIA_EDGE_API_KEYS_FILE", help="file of keys, as in ossia edge --api-keys-file")]
KeyId = Annotated[str, typer.Argument(help="id of a key, as `list` shows it")]
Limit = typer.Option(min=0, help="limit of this key's tenant; 0: none; not given: the edge's own")


@app.command()
def create(
    file: File,
    tenant: Annotated[str, typer.Option(help="whom its requests count for")],
    name: Annotated[str, typer.Option(help="what it is for")] = "",
    role: Annotated[list[str] | None, typer.Option(help=f"what it may do: {', '.join(ROLES)}; repeat for several")] = None,
    requests_per_minute: Annotated[int | None, Limit] = None,
    tokens_per_minute: Annotated[int | None, Limit] = None,
    tokens_per_day: Annotated[int | None, Limit] = None,
    expires_in_days: Annotated[float | None, typer.Option(min=0, help="not given: it does not expire")] = None,
) -> None:
    """Makes a key and prints it, once."""
    if unknown := set(role or ()) - set(ROLES):
        raise StartError(f"--role: there is no role {', '.join(sorted(unknown))}; choose from {', '.join(ROLES)}")
    if not 0 < len(tenant) <= 128 or len(name) > 128:
        raise StartError("--tenant, --name: use 1 to 128 characters")
    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute, "tokens_per_day": tokens_per_day}
    given = {field: value for field, value in limits.items() if value is not None}
    expires_at = None if expires_in_days is None else utc_now() + datetime.timedelta(days=expires_in_days)
    text, record = make_key(tenant, name=name, roles=tuple(role or (INFERENCE,)), limits=given, expires_at=expires_at)
    with _editing(file) as keys:
        keys.append(record)
    print(text)


@app.command(name="list")
def list_keys(file: File) -> None:
    """Shows every key but its text."""
    try:
        keys = read_keys(file)
    except KeyFileError as error:
        raise StartError(str(error)) from None
    table = Table(Column("id", no_wrap=True), "tenant", "name", "roles", "limits", "created", "state")
    now = datetime.datetime.now(datetime.UTC)
    for key in keys:
        limits = ", ".join(f"{value} {field.replace('_', ' ')}" for field, value in key.limits.model_dump(exclude_none=True).items())
        table.add_row(key.id, key.tenant, key.name, ", ".join(key.roles), limits, f"{key.created_at:%Y-%m-%d %H:%M}", _describe(key, now))
    Console().print(table)


@app.command()
def rotate(
    key_id: KeyId,
    file: File,
    grace_s: Annotated[float, typer.Option(min=0, help="seconds that the old key stays valid beside the new one")] = 3600.0,
) -> None:
    """Makes a new key in the place of one, which expires after a grace; prints the new one, once."""
    with _editing(file) as keys:
        at = _find(keys, key_id)
        old = keys[at]
        if not old.is_valid(datetime.datetime.now(datetime.UTC)):
            raise StartError(f"the key {key_id} is revoked or expired; create a new one")
        text, new = make_key(old.tenant, name=old.name, roles=old.roles, limits=old.limits, expires_at=old.expires_at)
        ends_at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=grace_s)
        keys[at] = old.model_copy(update={"expires_at": min(ends_at, old.expires_at or ends_at)})
        keys.append(new)
    print(text)


@app.command()
def revoke(key_id: KeyId, file: File) -> None:
    """Ends a key. It stays listed, so that the audit log can be read."""
    with _editing(file) as keys:
        at = _find(keys, key_id)
        if keys[at].revoked_at is None:
            keys[at] = keys[at].model_copy(update={"revoked_at": utc_now()})
    print(f"{key_id} is revoked")


@contextmanager
def _editing(file: Path) -> Iterator[list[KeyRecord]]:
    """`edit_keys` whose errors are the command's."""
    try:
        with edit_keys(file) as keys:
            yield keys
    except (KeyFileError, OSError) as error:
        raise StartError(f"--file: {error}") from None


def _find(keys: list[KeyRecord], key_id: str) -> int:
    found = next((at for at, key in enumerate(keys) if key.id == key_id), None)
    if found is None:
        raise StartError(f"there is no key {key_id}; `ossia keys list` shows their ids")
    return found


def _describe(key: KeyRecord, now: datetime.datetime) -> str:
    if key.revoked_at is not None:
        return f"revoked {key.revoked_at:%Y-%m-%d %H:%M}"
    if key.expires_at is not None:
        return f"{'expired' if key.expires_at <= now else 'until'} {key.expires_at:%Y-%m-%d %H:%M}"
    return "valid"
