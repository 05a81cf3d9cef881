"""Mutually authenticated TLS 1.3 from the shared secret.

Both machines derive the same certificate authority from the secret (scrypt to an Ed25519 key). Each process creates a
fresh certificate signed by that authority and accepts only peers that have one too. A peer without the secret fails in
the handshake, so no unauthenticated data is unpickled. The traffic of the collectives and of NCCL is not covered
(docs/protocol.md, "What is not protected").
"""

from __future__ import annotations

import datetime
import os
import ssl
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.x509.oid import NameOID

Role = Literal["leader", "follower"]

AUTHORITY_NAME = "vllm-spark authority"
"""Common name of the issuer of every certificate of this project, with any secret."""

PROTOCOL, DOCTOR_PROTOCOL = "vllm-spark", "vllm-spark-doctor"
"""ALPN protocols of a follower, and of `vllm-spark doctor --leader`. They tell the leader who connects, also if the
secrets differ; they prove nothing."""

# Validity must not depend on clocks: a machine whose clock was reset has the date 1970, and the link may have no time
# server. These are the earliest and the latest date that X.509 can express.
_VALID_FROM = datetime.datetime(1950, 1, 1)
_VALID_UNTIL = datetime.datetime(9999, 12, 31, 23, 59, 59)
_AUTHORITY = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, AUTHORITY_NAME)])


def tls_context(secret: bytes, role: Role, protocol: str = PROTOCOL) -> ssl.SSLContext:
    """A context for `role`'s end of the channel: TLS 1.3, both sides authenticated by the secret.

    A follower's announces `protocol`; a leader's takes both protocols, and a follower that announces none.
    """
    authority, certificate, key = _identity(secret, role)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "leader" else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The authority is derived from the secret and signs nothing else, so host names would add nothing.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=authority.public_bytes(serialization.Encoding.DER))
    context.set_alpn_protocols([PROTOCOL, DOCTOR_PROTOCOL] if role == "leader" else [protocol])
    # A session ticket would let a peer reconnect without its certificate.
    if role == "leader":
        context.num_tickets = 0
    _load_identity(context, certificate, key)
    return context


def inspecting_context() -> ssl.SSLContext:
    """A client's context that takes any certificate and has none: to find out what listens at a port.

    Only for `vllm-spark doctor`, which sends nothing over such a connection.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([DOCTOR_PROTOCOL])
    return context


def _identity(secret: bytes, role: str) -> tuple[x509.Certificate, x509.Certificate, Ed25519PrivateKey]:
    """The authority derived from the secret, and a fresh certificate of it for `role` with its key."""
    # Anybody who connects gets the leader's certificate and can test secrets against it: scrypt makes that slow.
    stretched = Scrypt(salt=b"vllm-spark channel authority 2", length=32, n=1 << 15, r=8, p=1).derive(secret)
    authority_key = Ed25519PrivateKey.from_private_bytes(stretched)
    authority = _certificate(_AUTHORITY, authority_key, authority_key, is_authority=True)
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role)])
    return authority, _certificate(name, key, authority_key, is_authority=False), key


def _certificate(
    subject: x509.Name, key: Ed25519PrivateKey, signer: Ed25519PrivateKey, *, is_authority: bool
) -> x509.Certificate:
    usage = dict.fromkeys(
        (
            "content_commitment",
            "crl_sign",
            "data_encipherment",
            "decipher_only",
            "encipher_only",
            "key_agreement",
            "key_encipherment",
        ),
        False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_AUTHORITY)
        .public_key(key.public_key())
        .serial_number(1 if is_authority else x509.random_serial_number())
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_UNTIL)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not is_authority, key_cert_sign=is_authority, **usage),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, None)
    )


def _load_identity(context: ssl.SSLContext, certificate: x509.Certificate, key: Ed25519PrivateKey) -> None:
    """Loads the identity into `context` from an anonymous file: the ssl module reads identities from files only."""
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    descriptor = os.memfd_create("vllm-spark-identity", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
