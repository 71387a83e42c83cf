"""Keys: hashed at rest, compared in constant time, gone when they are revoked; and the command that writes them."""

import contextlib
import datetime
import hmac
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.keys import app
from edge.access.caller import ADMIN, INFERENCE, METRICS, Caller
from edge.access.keys import CHECK_INTERVAL_S, KeyFileError, KeyStore, edit_keys, make_key, read_keys, utc_now

RUN = CliRunner()
EDIT = """
import sys
from pathlib import Path
from edge.access.keys import edit_keys, make_key
print("ready", flush=True)
sys.stdin.read()
with edit_keys(Path(sys.argv[1])) as keys:
    keys.append(make_key(sys.argv[2])[1])
"""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += CHECK_INTERVAL_S  # every look is a new one
        return self.now


def run(file: Path, *words: str) -> str:
    result = RUN.invoke(app, [*words, "--file", str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output or str(result.exception)
    return result.output.strip()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "keys.json"


def test_a_key_is_found_by_its_text_and_kept_as_a_hash(file: Path) -> None:
    text = run(file, "create", "--tenant", "acme", "--role", "inference", "--role", "metrics", "--tokens-per-minute", "100")
    caller = KeyStore(file).find(text)
    assert caller is not None and caller.tenant == "acme" and caller.limits.tokens_per_minute == 100
    assert caller.may(INFERENCE) and caller.may(METRICS) and not caller.may(ADMIN)
    written = file.read_text()
    assert text not in written and text.rpartition("-")[2] not in written
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for wrong in ("", "x", text[:-1], text + "x", text.replace("sk-ossia-", "sk-other-"), "sk-ossia-", "é" * 50, "\udcff"):
        assert KeyStore(file).find(wrong) is None


def test_every_comparison_is_constant_time_and_made_for_unknown_ids_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(file, "create", "--tenant", "acme")
    store, compared = KeyStore(file, "single"), list[int]()
    real = hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append(len(a) == len(b) == 64)
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for candidate in (text, "sk-ossia-000000000000-unknown", "single", "nothing"):
        compared.clear()
        store.find(candidate)
        assert compared == [True, True]


def test_a_single_key_needs_no_file() -> None:
    store = KeyStore(None, "a secret of ours")
    assert store.find("a secret of ours") == Caller("key:configured", "default", frozenset({INFERENCE}))
    assert store.find("another") is None
    assert KeyStore(None).find("") is None


def test_revoked_and_rotated_keys_end_without_a_restart(file: Path) -> None:
    first = run(file, "create", "--tenant", "acme", "--name", "ci")
    store = KeyStore(file, clock=Clock())
    key_id = read_keys(file)[0].id
    second = run(file, "rotate", key_id)
    assert store.find(first) is not None  # within its grace
    found = store.find(second)
    assert found is not None and found.tenant == "acme"
    run(file, "revoke", key_id)
    assert store.find(first) is None and store.find(second) is not None
    third = run(file, "rotate", read_keys(file)[1].id, "--grace-s", "0")
    assert store.find(second) is None and store.find(third) is not None
    file.unlink()
    assert store.find(third) is None


def test_the_list_shows_all_but_the_text(file: Path) -> None:
    text = run(file, "create", "--tenant", "acme", "--name", "ci", "--expires-in-days", "1")
    run(file, "create", "--tenant", "umbrella", "--requests-per-minute", "7")
    run(file, "revoke", read_keys(file)[1].id)
    shown = run(file, "list")
    for word in ("acme", "umbrella", "ci", "inference", "7 requests per minute", "until", "revoked", read_keys(file)[0].id):
        assert word in shown
    assert text not in shown and read_keys(file)[0].digest not in shown


def test_an_expired_key_is_refused(file: Path) -> None:
    text, record = make_key("acme", expires_at=utc_now() - datetime.timedelta(seconds=1))
    with edit_keys(file) as keys:
        keys.append(record)
    assert KeyStore(file).find(text) is None


@pytest.mark.parametrize(
    "words",
    [("revoke", "0123456789ab"), ("rotate", "0123456789ab"), ("create", "--tenant", ""), ("create", "--tenant", "a", "--role", "king")],
)
def test_what_cannot_be_done_is_said_in_a_line(file: Path, words: tuple[str, ...]) -> None:
    result = RUN.invoke(app, [*words, "--file", str(file)])
    assert result.exit_code != 0 and result.exception is not None and "\n" not in str(result.exception)
    assert not read_keys(file)


def test_a_broken_file_stops_a_start_and_leaves_a_running_edge_as_it_is(file: Path) -> None:
    text = run(file, "create", "--tenant", "acme")
    store = KeyStore(file, clock=Clock())
    good = json.loads(file.read_text())
    for broken in ("{", '{"keys": [{"id": "x"}]}', json.dumps({"keys": [{**good["keys"][0], "surplus": 1}]})):
        file.write_text(broken)
        with pytest.raises(KeyFileError, match=r"keys.json"):
            KeyStore(file)
        assert store.find(text) is not None
    file.write_text(json.dumps({"keys": []}))
    assert store.find(text) is None


def test_edits_at_once_lose_nothing(file: Path) -> None:
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-c", EDIT, str(file)]
        children = [
            stack.enter_context(subprocess.Popen([*command, f"tenant-{number}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for number in range(4)
        ]
        assert [child.stdout.readline() for child in children if child.stdout] == ["ready\n"] * 4
        for child in children:
            assert child.stdin
            child.stdin.close()
        assert [child.wait() for child in children] == [0] * 4
    assert sorted(key.tenant for key in read_keys(file)) == [f"tenant-{number}" for number in range(4)]
