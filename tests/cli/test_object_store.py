"""Requests to stores are what the stores' own documentation says."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from cli.object_store import Bucket, WebFolder, open_store, sign
from services.process import StartError


def test_a_signature_is_that_of_the_published_example() -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, «GET Object»."""
    headers = sign(
        "https://examplebucket.s3.amazonaws.com/test.txt",
        {"range": "bytes=0-9"},
        "us-east-1",
        "AKIAIOSFODNN7EXAMPLE",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        datetime(2013, 5, 24, tzinfo=UTC),
    )
    assert headers["authorization"].endswith("Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41")
    assert "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date," in headers["authorization"]


def test_objects_are_addressed_by_path() -> None:
    url, headers = Bucket("http://minio:9000/", "models", "/gpt oss/", "us-east-1").request("a/b.json", {"range": "bytes=1-"})
    assert url == "http://minio:9000/models/gpt%20oss/a/b.json" and headers == {"range": "bytes=1-"}


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_", "-")).write_text(text + "\n")
    return folder


def test_credentials_are_read_from_files_and_not_shown(tmp_path: Path) -> None:
    write(tmp_path, access_key="AK", secret_key="very-secret", session_token="also-secret")
    store = open_store("s3://models/m", "", "eu-west-1", tmp_path)
    url, headers = store.request("config.json", {})
    assert url == "https://s3.eu-west-1.amazonaws.com/models/m/config.json"
    assert headers["x-amz-security-token"] == "also-secret" and "x-amz-security-token" in headers["authorization"]
    assert "very-secret" not in repr(store) + str(headers)


def test_an_authorization_goes_over_https_only(tmp_path: Path) -> None:
    write(tmp_path, authorization="Bearer t")
    assert open_store("https://host/m/", "", "", tmp_path).request("a", {}) == ("https://host/m/a", {"authorization": "Bearer t"})
    with pytest.raises(StartError, match="readable on its way; take https"):
        open_store("http://host/m", "", "", tmp_path)
    assert open_store("http://host/m", "", "", None) == WebFolder("http://host/m")


@pytest.mark.parametrize("url", ["ftp://host/m", "host/m", "https:///m", "file:///etc"])
def test_a_url_of_no_store_is_refused(url: str) -> None:
    with pytest.raises(StartError, match="give a folder as https://host/path"):
        open_store(url, "", "", None)


def test_half_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="needs both access-key and secret-key"):
        open_store("s3://models/m", "", "us-east-1", write(tmp_path, access_key="AK"))
    with pytest.raises(StartError, match="name the bucket"):
        open_store("s3:///m", "", "us-east-1", None)
