"""An address carries its own permission: one file of one checkpoint, until a time."""

import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass

from manylora.service.http_errors import Gone, missing
from manylora.service.wire.paths import TinkerPath
from manylora.types import ManyloraError

MAX_TOKEN = 4096
SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Grant:
    """A `Grant` is what a token allows."""

    tenant: str
    path: TinkerPath
    file: str
    expires: int


class Signer:
    """A `Signer` makes tokens and takes them back. Who has its `secret` can make tokens; those of
    another secret are worthless, so a secret that is new at every start ends them there."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def token(self, grant: Grant) -> str:
        """Return a token, safe in a URL."""
        content = [grant.tenant, str(grant.path), grant.file, grant.expires]
        payload = json.dumps(content, separators=(",", ":")).encode()
        return f"{_encode(payload)}.{_encode(self._seal(payload))}"

    def grant(self, token: str) -> Grant:
        """Return what a token allows. Raises NotFound: it is none of ours; Gone: its time is
        over."""
        try:
            payload, seal = (_decode(part) for part in token[:MAX_TOKEN].split("."))
            if not hmac.compare_digest(seal, self._seal(payload)):
                raise missing("file")
            tenant, path, file, expires = json.loads(payload)
            grant = Grant(tenant, TinkerPath.parse(path), file, expires)
        except (ManyloraError, ValueError):
            raise missing("file") from None
        if time.time() > grant.expires:
            raise Gone("this address has expired; ask for a new one")
        return grant

    def _seal(self, payload: bytes) -> bytes:
        return hmac.digest(self._secret, payload, hashlib.sha256)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4))
