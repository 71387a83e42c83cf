"""Bearer tokens: only those that our provider signed, for us, in time, by a pinned algorithm."""

import asyncio
import base64
import contextlib
import datetime
import hmac
import ipaddress
import json
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from edge.access import jwt as jwt_module
from edge.access.caller import ADMIN, INFERENCE
from edge.access.jwt import MAX_JWKS_BYTES, REFRESH_S, RETRY_S, JwtSettings, JwtVerifier, fetch_jwks
from services.errors import Unauthenticated, Unavailable
from tests.edge.scripted_scheduler import PATIENCE_S

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
SETTINGS = JwtSettings("unused", "https://issuer.example", "ossia", ("RS256", "ES256"))
SECRET = "a shared secret of thirty-two bytes!"


def jwks(**keys: Any) -> bytes:
    listed = []
    for key_id, key in keys.items():
        algorithm = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
        listed.append({**json.loads(algorithm.to_jwk(key.public_key())), "kid": key_id})
    secret = {"kty": "oct", "kid": "shared", "k": base64.urlsafe_b64encode(SECRET.encode()).decode().rstrip("=")}
    return json.dumps({"keys": [*listed, secret]}).encode()


class Provider:
    """Serves a key set, or fails."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = content or jwks(one=RSA_KEY, two=EC_KEY)
        self.fails = False
        self.num_fetches = 0
        self.now = 0.0

    async def fetch(self) -> bytes:
        self.num_fetches += 1
        if self.fails:
            raise OSError("away")
        return self.content

    def verifier(self) -> JwtVerifier:
        return JwtVerifier(SETTINGS, self.fetch, lambda: self.now)


def sign(key: Any = RSA_KEY, algorithm: str = "RS256", key_id: str = "one", **claims: Any) -> str:
    base = {
        "iss": SETTINGS.issuer,
        "aud": "ossia",
        "exp": time.time() + 600,
        "sub": "ann",
        "tenant": "acme",
        "roles": ["inference", "king"],
    }
    payload = {name: value for name, value in (base | claims).items() if value is not None}
    return jwt.encode(payload, key, algorithm, headers={"kid": key_id})


@pytest.mark.parametrize(("key", "algorithm", "key_id"), [(RSA_KEY, "RS256", "one"), (EC_KEY, "ES256", "two")])
async def test_a_good_token_says_who_and_for_whom(key: Any, algorithm: str, key_id: str) -> None:
    caller = await Provider().verifier().verify(sign(key, algorithm, key_id))
    assert (caller.subject, caller.tenant, caller.roles) == ("jwt:ann", "acme", {INFERENCE})
    spaced = await Provider().verifier().verify(sign(roles="admin inference"))
    assert spaced.may(ADMIN)


def sign_by_hand(secret: bytes, **header: str) -> str:
    """A token that no library would make."""
    claims = {"iss": SETTINGS.issuer, "aud": "ossia", "exp": time.time() + 600, "tenant": "acme"}
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    signature = base64.urlsafe_b64encode(hmac.digest(secret, b".".join(parts), "sha256")).rstrip(b"=")
    return b".".join((*parts, signature)).decode()


FORGED = {
    "expired": {"exp": time.time() - 120},
    "not yet": {"nbf": time.time() + 86_400},  # from when this file was read, which a long run does before its first test
    "no end": {"exp": None},
    "other issuer": {"iss": "https://other.example"},
    "other audience": {"aud": "other"},
    "no audience": {"aud": None},
    "no tenant": {"tenant": None},
    "odd tenant": {"tenant": 7},
    "empty tenant": {"tenant": ""},
    "long tenant": {"tenant": "x" * 129},
}


@pytest.mark.parametrize("claims", FORGED.values(), ids=FORGED)
async def test_a_token_that_is_not_for_us_now_is_refused(claims: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated):
        await Provider().verifier().verify(sign(**claims))


async def test_no_algorithm_but_the_pinned_ones_counts() -> None:
    verifier = Provider().verifier()
    public = RSA_KEY.public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    unsigned = jwt.encode({"tenant": "acme"}, None, "none", headers={"kid": "one"})  # type: ignore[arg-type]  # as a forger would
    shared = sign(SECRET, "HS256", "shared")
    confused = sign_by_hand(pem, alg="HS256", kid="one")  # the public key as if it were a secret
    other = sign(RSA_KEY, "PS256")  # a good algorithm that is not pinned
    stranger = sign(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    whole = sign()
    head, body, _ = whole.split(".")
    for forged in (unsigned, shared, confused, other, stranger, f"{head}.{body}.", whole[:-4], "eyJ.eyJ.x", "a.b.c"):
        with pytest.raises(Unauthenticated):
            await verifier.verify(forged)


async def test_keys_are_fetched_again_for_new_ids_but_not_for_every_forged_one() -> None:
    provider = Provider(jwks(one=RSA_KEY))
    verifier = provider.verifier()
    await verifier.verify(sign())
    for _ in range(5):
        with pytest.raises(Unauthenticated):
            await verifier.verify(sign(EC_KEY, "ES256", "two"))
    assert provider.num_fetches == 1
    provider.content, provider.now = jwks(one=RSA_KEY, two=EC_KEY), RETRY_S
    await verifier.verify(sign(EC_KEY, "ES256", "two"))
    assert provider.num_fetches == 2


async def test_a_provider_that_is_away_ends_nobodys_access() -> None:
    provider = Provider()
    verifier = provider.verifier()
    provider.fails = True
    with pytest.raises(Unavailable):
        await verifier.verify(sign())
    provider.fails, provider.now = False, RETRY_S
    await verifier.verify(sign())
    provider.fails, provider.now = True, RETRY_S + REFRESH_S
    assert (await verifier.verify(sign())).tenant == "acme"
    provider.fails, provider.now, provider.content = False, 2 * (RETRY_S + REFRESH_S), jwks(two=EC_KEY)
    with pytest.raises(Unauthenticated):  # a key that was withdrawn
        await verifier.verify(sign())


async def test_keys_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks(one=RSA_KEY))
    settings = JwtSettings(str(path), SETTINGS.issuer, SETTINGS.audience, SETTINGS.algorithms, tenant_claim="org", roles_claim="scope")
    caller = await JwtVerifier(settings).verify(sign(org="acme", scope="metrics"))
    assert caller.tenant == "acme" and caller.roles == {"metrics"}


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed one for 127.0.0.1, and its key."""
    name, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "provider")]), datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(EC_KEY.public_key())
    builder = builder.serial_number(7).not_valid_before(now).not_valid_after(now + datetime.timedelta(hours=1)).add_extension(names, False)
    certificate, key = directory / "cert.pem", directory / "key.pem"
    certificate.write_bytes(builder.sign(EC_KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    key.write_bytes(EC_KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return certificate, key


async def test_keys_come_over_https_from_a_server_that_is_who_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwt_module, "FETCH_TIMEOUT_S", PATIENCE_S)
    certificate, key = make_certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    body, served = jwks(one=RSA_KEY), asyncio.Semaphore(0)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        content = body if b" /keys " in asked else b"x" * (MAX_JWKS_BYTES + 1)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(content) + content)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):  # the client may have gone in the middle
            await writer.wait_closed()
        served.release()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(httpx.ConnectError):  # nobody vouches for it
            await fetch_jwks(f"{url}/keys")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert await fetch_jwks(f"{url}/keys") == body
        with pytest.raises(ValueError, match="more than"):
            await fetch_jwks(f"{url}/large")
        for _ in range(2):
            await asyncio.wait_for(served.acquire(), PATIENCE_S)  # or a connection would be left open
