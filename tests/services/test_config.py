from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.config import Address, AddressList, ConfigError, ProcessConfig, load_config


class ToyConfig(ProcessConfig):
    model_config = SettingsConfigDict(env_prefix="OSSIA_TOY_", cli_prog_name="ossia toy")
    listen: Annotated[Address, Field(description="where it is served")] = "127.0.0.1:0"
    peers: Annotated[AddressList, Field(description="the others")] = ()
    num_things: Annotated[int, Field(ge=1, le=5, description="how many")] = 3


def test_flags_win_over_environment_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSSIA_TOY_NUM_THINGS", "4")
    monkeypatch.setenv("OSSIA_TOY_LISTEN", "0.0.0.0:1")
    config = load_config(ToyConfig, ["--num-things", "5"])
    assert (config.num_things, config.listen, config.peers) == (5, "0.0.0.0:1", ())


@pytest.mark.parametrize("by_flag", [True, False])
def test_lists_are_comma_separated_as_flag_and_in_the_environment(monkeypatch: pytest.MonkeyPatch, by_flag: bool) -> None:
    text = "10.0.0.1:9, [::1]:8"
    if not by_flag:
        monkeypatch.setenv("OSSIA_TOY_PEERS", text)
    assert load_config(ToyConfig, ["--peers", text] if by_flag else []).peers == ("10.0.0.1:9", "[::1]:8")


def test_one_error_lists_every_bad_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSSIA_TOY_NUM_THINGS", "many")
    with pytest.raises(ConfigError) as refusal:
        load_config(ToyConfig, ["--listen", "here", "--peers", "a:1,b", "--drain-s", "-1"])
    lines = str(refusal.value).splitlines()
    assert len(lines) == 4
    for flag in ("--num-things or OSSIA_TOY_NUM_THINGS", "--listen", "--peers", "--drain-s"):
        assert any(line.startswith(flag) for line in lines)


def test_an_unknown_flag_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"--thing.*--help") as refusal:
        load_config(ToyConfig, ["--thing", "1"])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("address", ["host", ":80", "host:", "host:-1", "host:65536", "host:8O", "::1:80", "[zz]:80"])
def test_a_bad_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--listen"):
        load_config(ToyConfig, [f"--listen={address}"])


def test_a_secret_may_be_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ossia_toy_peers").write_text("10.0.0.1:1,10.0.0.2:2\n")
    (tmp_path / "ossia_toy_num_things").write_text("2")
    monkeypatch.setenv("OSSIA_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("OSSIA_TOY_NUM_THINGS", "4")
    config = load_config(ToyConfig, [])
    assert config.peers == ("10.0.0.1:1", "10.0.0.2:2") and config.num_things == 4


def test_the_config_is_frozen() -> None:
    config = load_config(ToyConfig, [])
    with pytest.raises(ValueError, match="frozen"):
        config.num_things = 1  # type: ignore[misc]  # what must not work
