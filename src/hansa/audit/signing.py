"""Signed bodies: HTTP message signatures (RFC 9421) over the digest of a response.

The signature covers the status, the body's digest, and the request's method and URL, so that a
genuine answer to one question does not stand for another. It tells that a response is what its
provider sent, and not that it is true.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hansa.errors import InputError

COVERED = ("@status", "content-digest", '"@method";req', '"@target-uri";req')
_ID = "provider"


@dataclass(frozen=True)
class Received:
    """A response as an application gets it.

    Attributes:
        body: its bytes, before any decoding of JSON.
        headers: its headers.
        status: its status code.
        request: what was asked: ``method``, ``url``, ``time`` in seconds since 1970.
    """

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200
    request: Mapping[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> "Received":
        """Return the response with some attributes changed."""
        return replace(self, **changes)


@dataclass
class _Message:
    """A request or response in the form that the library takes."""

    headers: dict[str, str]
    method: str = "GET"
    url: str = ""
    request: "_Message | None" = None


class _Answer(_Message):
    status_code: int = 200


def new_key() -> Any:
    """Return a new private key, for Ed25519; ``key.public_key()`` is what verifies.

    Raises:
        InputError: the library is missing.
    """
    _library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()


def sign(received: Received, key: Any, age: float = 0.0) -> Received:
    """Return a response with the signature of its provider.

    Args:
        received: the response.
        key: the provider's private key.
        age: seconds since it was signed.

    Raises:
        InputError: the library is missing.
    """
    library = _library()
    signer = library.HTTPMessageSigner(
        signature_algorithm=library.algorithms.ED25519, key_resolver=_keys(library, private=key)
    )
    message = _message(received)
    signer.sign(
        message,
        key_id=_ID,
        created=datetime.fromtimestamp(time.time() - age, UTC),
        covered_component_ids=COVERED,
        body=received.body,
    )
    return received.but(headers=dict(message.headers))


def verify(received: Received, key: Any, max_age: float = 3600.0) -> str:
    """Return what is wrong with a response's signature, nothing where it holds.

    Args:
        received: the response.
        key: the provider's public key, known beforehand.
        max_age: seconds that a signature is good for; without a limit an old one could be replayed.

    Raises:
        InputError: the library is missing.
    """
    library = _library()
    verifier = library.HTTPMessageVerifier(
        signature_algorithm=library.algorithms.ED25519, key_resolver=_keys(library, public=key)
    )
    try:
        verifier.verify(
            _message(received),
            max_age=timedelta(seconds=max_age),
            require_components=COVERED,
            body=received.body,
        )
    except library.HTTPMessageSignaturesException as error:
        return str(error) or type(error).__name__
    return ""


def _message(received: Received) -> _Answer:
    asked = received.request
    request = _Message({}, str(asked.get("method", "GET")), _ascii(str(asked.get("url", ""))))
    message = _Answer(dict(received.headers), request=request)
    message.status_code = received.status
    return message


def _ascii(url: str) -> str:
    from urllib.parse import quote

    return quote(url, safe=":/?#[]@!$&'()*+,;=%~-._")


def _keys(library: Any, private: Any = None, public: Any = None) -> Any:
    class Keys(library.HTTPSignatureKeyResolver):  # type: ignore[misc]
        def resolve_private_key(self, key_id: str) -> Any:
            return private

        def resolve_public_key(self, key_id: str) -> Any:
            return public

    return Keys()


def _library() -> Any:
    try:
        import http_message_signatures
    except ImportError as error:
        raise InputError(
            "defences",
            "'signature' without the library http-message-signatures",
            "pip install hansa[audit]",
        ) from error
    return http_message_signatures


def is_installed() -> bool:
    """Tell whether the library of signatures is there."""
    try:
        _library()
    except InputError:
        return False
    return True
