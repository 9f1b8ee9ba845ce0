"""Who made this package?  An Ed25519 signature over the manifest, as a DSSE envelope.

DSSE v1 (secure-systems-lab/dsse): what is signed is the pre-authentication encoding of payload type and payload, so a
signature over a package manifest can never be taken for one over anything else.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from manifests.canonical import canonical_bytes, digest
from runtime.prepare.errors import PackageRefused
from traces.ledger.layout import write_durably

PAYLOAD_TYPE = "application/vnd.replaylab.package.v1+json"
PRIVATE_KEY, PUBLIC_KEY = "packages.key", "packages.pub"


def _encode(payload: bytes) -> bytes:
    kind = PAYLOAD_TYPE.encode()
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])


def key_name(public: Ed25519PublicKey) -> str:
    """Name a public key by its raw bytes."""
    return digest(public.public_bytes(Encoding.Raw, PublicFormat.Raw))


def signing_key(keys: Path) -> Ed25519PrivateKey:
    """Read the store's private key (32 raw bytes), making it the first time."""
    path = keys / PRIVATE_KEY
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        seed = path.read_bytes()
    else:
        seed = os.urandom(32)
        with os.fdopen(descriptor, "wb") as file:
            file.write(seed)
            file.flush()
            os.fsync(file.fileno())
    key = Ed25519PrivateKey.from_private_bytes(seed)
    public = keys / PUBLIC_KEY
    if not public.exists():
        write_durably(public, key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw), mode=0o644)
    return key


def sign(payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """Sign a manifest; returns the envelope, which refers to the payload by digest instead of repeating it."""
    return canonical_bytes(
        {
            "payloadType": PAYLOAD_TYPE,
            "payloadDigest": digest(payload),
            "signatures": [
                {"keyid": key_name(key.public_key()), "sig": base64.b64encode(key.sign(_encode(payload))).decode()}
            ],
        }
    )


def verify(payload: bytes, envelope: bytes, keys: Path) -> str:
    """Check an envelope over a manifest against the store's public key; returns the key's name.

    Errors: `PackageRefused` when the key is absent, the envelope is malformed or the signature is not by that key.
    """
    try:
        public = Ed25519PublicKey.from_public_bytes((keys / PUBLIC_KEY).read_bytes())
    except (OSError, ValueError) as error:
        raise PackageRefused(
            f"no usable public key {PUBLIC_KEY} to check packages with",
            fix=f"copy the key of the store that made the package to {PUBLIC_KEY} in the ledger's keys folder",
            evidence={"validation_output": str(error)},
        ) from error
    try:
        parsed = json.loads(envelope)
        signatures = parsed["signatures"]
        if parsed["payloadType"] != PAYLOAD_TYPE or not signatures:
            raise ValueError("another payload type, or no signature")
        public.verify(base64.b64decode(signatures[0]["sig"], validate=True), _encode(payload))
    except (ValueError, KeyError, TypeError, InvalidSignature) as error:
        raise PackageRefused(
            "the package's signature is not by this ledger's key, or the manifest was changed after signing",
            fix="restore the package from where it was made, or prepare the model again",
            evidence={"validation_output": f"{type(error).__name__}: {error}"},
        ) from error
    return key_name(public)
