"""The private authority: it signs what RabbitMQ, Redis, our own ports and, with mutual TLS, devices show of themselves.

ECDSA on P-256, which the smallest device checks in a millisecond. The authority's key signs certificates only, never a
connection, and stays with the operator. A renewed authority keeps its key and its name: certificates signed before stay
good, and so do those signed later with devices that still hold its former certificate, until that ends.

An operator's own authority, with a key of any kind, signs just the same; it is never renewed here. Every certificate
that is made here says so in its subject: it is the only kind that `fedmq secrets make` puts another in the place of.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ops.private_file import write_private
from shared.errors import SettingsError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 365
CLIENT_DAYS = 365
RENEW_DAYS = 30  # a certificate is made anew so long before its end
AUTHORITY_RENEW_DAYS = 400  # the authority so long: no certificate that it signs is to outlive it
BACKDATED = timedelta(days=1)  # a device whose clock is behind must not find it not yet valid
CA_FILE, KEY_FILE = "ca.pem", "ca.key"
NAME = "FedMQ private authority"
MARK = "made by fedmq"  # the organisation in the subject of what is signed here
HOST_CHARS_MAX = 253
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and its key.

    Attributes:
        certificate: PEM.
        key: PEM, PKCS #8, not encrypted.
    """

    certificate: str
    key: str


class Authority:
    """What signs certificates.

    Args:
        certificate: of the authority.
        key: its private key.
        pem: its certificate and those above it, as clients need them; by default it alone.
    """

    def __init__(self, certificate: x509.Certificate, key: Key, pem: str = "") -> None:
        self._certificate, self._key = certificate, key
        self.pem = pem or _pem(certificate)

    def server(self, name: str, hosts: Iterable[str], now: datetime) -> Identity:
        """Sign a server's certificate.

        Args:
            name: shown to people; clients look at `hosts` alone.
            hosts: DNS names and addresses that clients reach it by.
            now: UTC.

        Raises:
            SettingsError: a host is neither.
        """
        alternatives = x509.SubjectAlternativeName([_alternative(host) for host in dict.fromkeys(hosts)])
        return self._sign(name, alternatives, ExtendedKeyUsageOID.SERVER_AUTH, SERVER_DAYS, now)

    def client(self, name: str, now: datetime) -> Identity:
        """Sign the certificate that a device, or a program, shows to servers; its common name is `name`, its login."""
        # A common name holds 64 characters, a login twice as many: the alternative name holds all of it.
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name)])
        return self._sign(name, alternatives, ExtendedKeyUsageOID.CLIENT_AUTH, CLIENT_DAYS, now)

    def signed(self, certificate: str) -> bool:
        """Tell whether a PEM certificate is one of this authority's."""
        try:
            x509.load_pem_x509_certificate(certificate.encode()).verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def _sign(
        self, name: str, alternatives: x509.SubjectAlternativeName, usage: x509.ObjectIdentifier, days: int,
        now: datetime,
    ) -> Identity:  # fmt: skip
        key = ec.generate_private_key(ec.SECP256R1())
        end = min(now + timedelta(days=days), self._certificate.not_valid_after_utc)
        if end <= now:
            raise SettingsError(f"the authority's certificate ended {end:%Y-%m-%d}: put its successor into {CA_FILE}")
        subject = x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, MARK), x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]
        )
        certificate = (
            _builder(subject, self._certificate.subject, key.public_key(), now, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(self._identifier(), critical=False)
            .add_extension(alternatives, critical=False)
            .sign(self._key, _digest(self._key))
        )
        return Identity(_pem(certificate), _key_pem(key))

    def _identifier(self) -> x509.AuthorityKeyIdentifier:
        """Return how our certificate names its own key, as what it signs has to name it."""
        try:
            own = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except x509.ExtensionNotFound:
            return x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def make(now: datetime, key: Key | None = None) -> tuple[Authority, str]:
    """Make an authority, or one that follows another with the same key; return it and its key as PEM."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    certificate = (
        _builder(name, name, key.public_key(), now, now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True), critical=True)
        .sign(key, _digest(key))
    )
    return Authority(certificate, key), _key_pem(key)


def keep(folder: Path, now: datetime) -> tuple[Authority, str]:
    """Return the authority that a folder holds; make it, or renew it if it was made here, if need be.

    Returns:
        It, and what was done: "made", "renewed" or "kept".

    Raises:
        SettingsError: as for `read`, or there is a certificate but no key.
    """
    ca_file, key_file = folder / CA_FILE, folder / KEY_FILE
    if not ca_file.exists() and not key_file.exists():
        authority, key = make(now)
        write_private(key_file, key)  # first: a certificate without its key could never sign
        write_private(ca_file, authority.pem, 0o644)
        return authority, "made"
    if key_file.exists() and not ca_file.exists():  # a crash in between
        authority, _ = make(now, _load_key(key_file))
        write_private(ca_file, authority.pem, 0o644)
        return authority, "made"
    authority = read(folder)
    ours = _named(authority._certificate.subject, NameOID.COMMON_NAME) == NAME
    if not ours or not due(authority.pem, now, AUTHORITY_RENEW_DAYS):
        return authority, "kept"
    authority, _ = make(now, authority._key)
    write_private(ca_file, authority.pem, 0o644)
    return authority, "renewed"


def read(folder: Path) -> Authority:
    """Return the authority that a folder holds.

    Raises:
        SettingsError: it holds none, its certificate is not an authority's, or the key is another one's.
    """
    ca_file, key_file = folder / CA_FILE, folder / KEY_FILE
    try:
        text = ca_file.read_text()
        certificate, *above = x509.load_pem_x509_certificates(text.encode())
        may_sign = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        may_sign = False
    except (OSError, ValueError) as error:
        raise SettingsError(f"{ca_file} is no certificate of an authority: {error}") from error
    if not may_sign:
        raise SettingsError(f"{ca_file} is a certificate, but not of an authority: it may not sign others (CA:TRUE)")
    key = _load_key(key_file)
    if certificate.public_key() != key.public_key():
        raise SettingsError(f"{ca_file} and {key_file} do not go together: restore both from one backup")
    return Authority(certificate, key, "".join(map(_pem, (certificate, *above))))


def certificates_of(text: str) -> list[str]:
    """Return the certificates in a text, each as PEM.

    Raises:
        SettingsError: there is none.
    """
    try:
        return [_pem(one) for one in x509.load_pem_x509_certificates(text.encode())]
    except ValueError as error:
        raise SettingsError(f"this is no PEM certificate: {error}") from error


def made_here(certificate: str) -> bool:
    """Tell whether a PEM certificate was made here, whichever authority signed it; the private authority's own is too.

    Raises:
        SettingsError: it is none.
    """
    (first, *_) = certificates_of(certificate)
    found = x509.load_pem_x509_certificate(first.encode())
    return _named(found.subject, NameOID.ORGANIZATION_NAME) == MARK or _named(found.issuer, NameOID.COMMON_NAME) == NAME


def go_together(certificate: str, key: str) -> bool:
    """Tell whether a PEM key is that of a PEM certificate."""
    try:
        loaded = serialization.load_pem_private_key(key.encode(), None)
        return x509.load_pem_x509_certificate(certificate.encode()).public_key() == loaded.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False


def ends_at(certificate: str) -> datetime:
    """Return the end of a PEM certificate, UTC.

    Raises:
        SettingsError: it is none.
    """
    try:
        return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc
    except ValueError as error:
        raise SettingsError(f"this is no PEM certificate: {error}") from error


def due(certificate: str, now: datetime, days: int = RENEW_DAYS) -> bool:
    """Tell whether a PEM certificate ends within so many days."""
    return ends_at(certificate) - now < timedelta(days=days)


def hosts_of(certificate: str) -> set[str]:
    """Return the DNS names and addresses of a PEM certificate."""
    names = x509.load_pem_x509_certificate(certificate.encode()).extensions
    try:
        alternatives = names.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    addresses = {str(address) for address in alternatives.get_values_for_type(x509.IPAddress)}
    return addresses | set(alternatives.get_values_for_type(x509.DNSName))


def is_host(text: str) -> bool:
    """Tell whether a text is a host name."""
    return len(text) <= HOST_CHARS_MAX and _HOST.fullmatch(text) is not None


def utc_now() -> datetime:
    """Return the time by this machine's clock."""
    return datetime.now(UTC)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: CertificatePublicKeyTypes, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, key_cert_sign=key_cert_sign, crl_sign=key_cert_sign,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not is_host(host):
            raise SettingsError(f"{host!r} is neither a host name nor an address (no port, no https://)") from None
        return x509.DNSName(host)


def _load_key(path: Path) -> Key:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except TypeError as error:  # it has a passphrase
        raise SettingsError(
            f"{path} is encrypted, and nobody is there to be asked: `openssl pkey -in {path} -out FILE` decrypts it"
        ) from error
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"{path} is no key of an authority: {error}") from error
    if not isinstance(key, Key):
        raise SettingsError(f"{path} is no key that signs certificates: RSA, ECDSA and EdDSA ones do")
    return key


def _digest(key: Key) -> hashes.SHA256 | None:
    """Return what to sign with; EdDSA has its own."""
    return hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) else None


def _named(name: x509.Name, part: x509.ObjectIdentifier) -> str:
    return "".join(str(one.value) for one in name.get_attributes_for_oid(part))


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: Key) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
