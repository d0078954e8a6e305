"""Logging in: OpenID Connect as the Hub does it, with a user who always agrees; and trusted publishers, whose
workflow swaps the token of its run for one that may write to one repository (RFC 8693)."""

import base64
import json
import secrets
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from .store import Refused

if TYPE_CHECKING:
    from .server import Answer, Hub, Request


class Provider:
    """user: who agrees.  codes: handed out and not used yet, with what they are for.  Tokens become the store's.

    trusted: repositories that trust the workflow which has the `run` token.
    """

    def __init__(self) -> None:
        self.user = "alice"
        self.organizations: tuple[str, ...] = ()
        self.codes: dict[str, tuple[str, str | None]] = {}
        self.scopes: set[str] = set()
        self.issued: list[str] = []
        self.trusted: set[str] = set()
        self.run = "run-" + secrets.token_hex(8)
        self._key: rsa.RSAPrivateKey | None = None

    @property
    def key(self) -> rsa.RSAPrivateKey:
        if self._key is None:
            self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        return self._key


def configuration(hub: "Hub", request: "Request") -> "Answer":
    from .server import Answer

    return Answer.of(
        {
            "issuer": hub.url,
            "authorization_endpoint": f"{hub.url}/oauth/authorize",
            "token_endpoint": f"{hub.url}/oauth/token",
            "userinfo_endpoint": f"{hub.url}/oauth/userinfo",
            "jwks_uri": f"{hub.url}/oauth/jwks",
            "id_token_signing_alg_values_supported": ["RS256"],
        }
    )


def authorize(hub: "Hub", request: "Request") -> "Answer":
    """The user agrees at once, and is sent back."""
    from .server import Answer

    code = secrets.token_urlsafe(16)
    hub.oauth.scopes = set(request.query.get("scope", "").split())
    hub.oauth.codes[code] = (hub.oauth.user, request.query.get("nonce"))
    back = request.query["redirect_uri"]
    joined = "&" if "?" in back else "?"
    return Answer(302, b"", {"Location": back + joined + urlencode({"code": code, "state": request.query["state"]})})


def token(hub: "Hub", request: "Request") -> "Answer":
    """A code for a token, once; or the token of a run."""
    from .server import Answer

    if request.headers.get("content-type", "").startswith("application/json"):
        return _exchanged(hub, request.json())
    form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
    found = hub.oauth.codes.pop(form.get("code", ""), None)
    if found is None or not request.headers.get("authorization", "").startswith("Basic "):
        raise Refused(400, message="invalid_grant")
    user, nonce = found
    access = "hf_oauth_" + secrets.token_hex(20)
    hub.store.tokens[access] = user
    hub.oauth.issued.append(access)
    claims = {**_claims(hub, user), "iss": hub.url, "aud": _client(request), "iat": int(time.time()),
              "exp": int(time.time()) + 3600}  # fmt: skip
    if nonce is not None:
        claims["nonce"] = nonce
    signed = _signed(hub, claims)
    return Answer.of({"access_token": access, "token_type": "bearer", "expires_in": 3600, "id_token": signed})


def _exchanged(hub: "Hub", asked: dict[str, Any]) -> "Answer":
    from .server import Answer

    resource = asked["resource"]
    if (
        asked["subject_token"] != _run_token(hub)
        or resource not in hub.oauth.trusted
        or resource not in hub.store.repos
    ):
        raise Refused(400, message="invalid_grant")
    access = "hf_jwt_" + secrets.token_hex(20)
    hub.store.tokens[access], hub.store.bound[access] = resource.partition("/")[0], resource
    hub.oauth.issued.append(access)
    return Answer.of({"access_token": access, "token_type": "bearer", "expires_in": 3600})


def run(hub: "Hub", request: "Request") -> "Answer":
    """GitHub's part: says of a run which workflow it is of."""
    from .server import Answer

    if request.token != hub.oauth.run or request.query.get("audience") != hub.url:
        raise Refused(401)
    return Answer.of({"value": _run_token(hub)})


def _run_token(hub: "Hub") -> str:
    return _signed(hub, {"iss": "https://token.actions.example", "aud": hub.url, "sub": hub.oauth.run})


def userinfo(hub: "Hub", request: "Request") -> "Answer":
    from .server import Answer

    if request.user is None:
        raise Refused(401)
    return Answer.of(_claims(hub, request.user))


def jwks(hub: "Hub", request: "Request") -> "Answer":
    from .server import Answer

    numbers = hub.oauth.key.public_key().public_numbers()
    return Answer.of(
        {
            "keys": [
                {
                    "kty": "RSA",
                    "alg": "RS256",
                    "use": "sig",
                    "kid": "1",
                    "n": _number(numbers.n),
                    "e": _number(numbers.e),
                }
            ]
        }
    )


def _claims(hub: "Hub", user: str) -> dict[str, Any]:
    orgs = [{"sub": name, "name": name.title(), "preferred_username": name} for name in hub.oauth.organizations]
    return {"sub": user, "name": user.title(), "preferred_username": user, "profile": f"{hub.url}/{user}",
            "picture": f"{hub.url}/{user}.png", "orgs": orgs}  # fmt: skip


def _client(request: "Request") -> str:
    return base64.b64decode(request.headers["authorization"].removeprefix("Basic ")).decode().partition(":")[0]


def _signed(hub: "Hub", claims: dict[str, Any]) -> str:
    """A JSON web token."""
    parts = [_text(json.dumps(part).encode()) for part in ({"alg": "RS256", "typ": "JWT", "kid": "1"}, claims)]
    signature = hub.oauth.key.sign(".".join(parts).encode(), padding.PKCS1v15(), hashes.SHA256())
    return ".".join([*parts, _text(signature)])


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _number(value: int) -> str:
    return _text(value.to_bytes((value.bit_length() + 7) // 8, "big"))
