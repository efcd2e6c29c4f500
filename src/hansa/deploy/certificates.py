"""Certificates and keys for a trial, and checks of whatever stands in their place.

A federation's server shows ``tls/server.crt``, signed by the authority in ``tls/ca.crt``; each of
its nodes has a copy of the latter, and a key of its own that the server knows. Files in ``tls/``
that begin with ``loopback-`` are for the server's own processes on its machine, and stay.
"""

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hansa.errors import InputError
from hansa.files import write_atomic

_DAYS = 90
LOOPBACK = "loopback-"
LOOPBACK_DAYS = 3650
_PRIVATE = 0o600


def write_authority(folder: Path, name: str, days: int = _DAYS, prefix: str = "") -> None:
    """Write a certificate authority: ``ca.crt`` and ``ca.key``, after a prefix."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(f"{name}, trial authority")
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    mine = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    made = (
        _certificate(subject, subject, key, days)
        .add_extension(mine, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    _write(folder / f"{prefix}ca.crt", made.public_bytes(serialization.Encoding.PEM))
    _write_key(folder / f"{prefix}ca.key", key, serialization.PrivateFormat.PKCS8)


def write_server(folder: Path, host: str, days: int = _DAYS, prefix: str = "") -> None:
    """Write ``server.crt`` and ``server.key``, signed by the authority of the same prefix.

    Raises:
        InputError: that authority's key is not one of ``write_authority``.
    """
    place = folder / f"{prefix}ca.key"
    authority = x509.load_pem_x509_certificate((folder / f"{prefix}ca.crt").read_bytes())
    signer = serialization.load_pem_private_key(place.read_bytes(), None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise InputError(str(place), "another kind of key", "one on an elliptic curve")
    key = ec.generate_private_key(ec.SECP384R1())
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    names = dict.fromkeys([host, "localhost", "127.0.0.1"])
    usage = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH])
    made = (
        _certificate(_name(host), authority.subject, key, days)
        .add_extension(signed_by, critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(n) for n in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .sign(signer, hashes.SHA384())
    )
    _write(folder / f"{prefix}server.crt", made.public_bytes(serialization.Encoding.PEM))
    _write_key(folder / f"{prefix}server.key", key, serialization.PrivateFormat.PKCS8)


def write_node_key(path: Path) -> str:
    """Write a node's private key, and return its public one as a line of text (OpenSSH)."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(path, key, serialization.PrivateFormat.OpenSSH)
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(encoding, form).decode()


def public_key(path: Path) -> bytes:
    """Return a node's public key as a SuperLink reports it.

    Raises:
        InputError: no such key.
    """
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            str(path), f"no public key ({error})", "one as OpenSSH writes it"
        ) from error
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form)


def check_server(folder: Path) -> None:
    """Refuse certificates that no node would accept.

    Raises:
        InputError: a file is missing, out of date, or does not belong to the others.
    """
    check_authority(folder / "ca.crt")
    for name in ("server.crt", "server.key"):
        if not (folder / name).is_file():
            raise InputError(str(folder / name), "no such file", "a certificate and its key")
    certificate = _load(folder / "server.crt")
    _check_date(folder / "server.crt", certificate)
    try:
        ssl.create_default_context().load_cert_chain(folder / "server.crt", folder / "server.key")
    except ssl.SSLError as error:
        raise InputError(
            str(folder / "server.crt"), "no certificate for server.key", "the two of one server"
        ) from error


def check_authority(path: Path) -> None:
    """Refuse an authority's certificate that is missing or out of date.

    Raises:
        InputError: it is.
    """
    if not path.is_file():
        raise InputError(str(path), "no such file", "the certificate of the server's authority")
    _check_date(path, _load(path))


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise InputError(str(path), "no certificate", "one in PEM") from error


def _check_date(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        ended = certificate.not_valid_after_utc.date()
        raise InputError(str(path), f"a certificate that expired on {ended}", "one in force")
    if now < certificate.not_valid_before_utc:
        begins = certificate.not_valid_before_utc
        raise InputError(str(path), f"a certificate from {begins} on", "one in force")


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    begin = now + timedelta(days=min(days, 0)) - timedelta(hours=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


def _write_key(
    path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(_PRIVATE)
    plain = serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
