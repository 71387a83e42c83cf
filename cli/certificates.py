"""`ossia certificates`: an authority and a certificate per role, for one machine or a trial. A cluster's come from its own authority."""

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.process import StartError
from services.tls import BadCertificate, Identity, name_of

ROLES = ("edge", "scheduler", "worker", "client")
CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"  # the names that a Kubernetes secret of cert-manager has
AUTHORITY_DAYS = 3650
NOT_BEFORE = datetime.timedelta(minutes=5)  # clocks differ


def write_certificates(directory: Path, days: int, hosts: tuple[str, ...] = ()) -> None:
    """Signs a new certificate for every role, under DIRECTORY/<role>/; the authority is made where there is none.

    Run it again to rotate: each file is replaced at once, key first. `hosts` are names or addresses that the edge's certificate bears too.
    """
    authority, signer = _open_authority(directory)
    for role in ROLES:
        folder = directory / role
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(name_of(role)), *(map(_as_name, hosts) if role == "edge" else ())]
        certificate = _sign(key, role, authority.subject, signer, days, x509.SubjectAlternativeName(names))
        _replace(folder / KEY, _pem_of(key))
        _replace(folder / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
        _replace(folder / AUTHORITY, authority.public_bytes(serialization.Encoding.PEM))


def tls_flags(directory: Path, role: str) -> list[str]:
    """What tells a process of `role` to use the files that `write_certificates` wrote. Raises StartError where there are none."""
    folder = directory / role
    if not folder.is_dir():
        raise StartError(f"--tls-dir: {folder} does not exist; make it with `ossia certificates {directory}`")
    return ["--tls-cert", str(folder / CERTIFICATE), "--tls-key", str(folder / KEY), "--tls-ca", str(folder / AUTHORITY)]


def open_identity(directory: Path | None, role: str) -> Identity | None:
    """The same files, for a caller in this process; None where there is no directory. Raises StartError."""
    if directory is None:
        return None
    folder = directory / role
    try:
        return Identity(folder / CERTIFICATE, folder / KEY, folder / AUTHORITY)
    except BadCertificate as error:
        raise StartError(f"--tls-dir: {error}; make it with `ossia certificates {directory}`") from None


def _open_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_path, key_path = directory / AUTHORITY, directory / "ca.key"
    if certificate_path.exists():
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey), "it was written below"
        return x509.load_pem_x509_certificate(certificate_path.read_bytes()), key
    directory.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    made = _sign(key, "authority", None, key, AUTHORITY_DAYS, None)
    _replace(key_path, _pem_of(key))
    _replace(certificate_path, made.public_bytes(serialization.Encoding.PEM))
    return made, key


def _sign(
    key: ec.EllipticCurvePrivateKey,
    name: str,
    issuer: x509.Name | None,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
    names: x509.SubjectAlternativeName | None,
) -> x509.Certificate:
    """A certificate of `key`; without an issuer it is an authority's, signed by itself."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Ossia {name}")])
    now = datetime.datetime.now(datetime.UTC)
    draft = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - NOT_BEFORE)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=0 if issuer is None else None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if names is None:
        draft = draft.add_extension(_usage(signs=True), critical=True)
    else:
        uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        draft = draft.add_extension(_usage(signs=False), critical=True).add_extension(uses, critical=False)
        draft = draft.add_extension(names, critical=False)
    return draft.sign(signer, hashes.SHA256())


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _as_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_suffix(".new")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    unfinished.rename(path)
