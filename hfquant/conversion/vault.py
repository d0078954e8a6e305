"""Tokens on their way from whoever submits to the worker that pushes: sealed, or never out of this process' memory."""

import hashlib
import threading
from typing import NamedTuple, Protocol

import sqlalchemy as sa

from ..errors import RequestError, TokenError
from .database import Database, tokens

EXPIRED = "log in again, then resume the job: what is finished is kept"


class Token(NamedTuple):
    """A token of the Hub.  expires: in seconds since 1970, None if it does not."""

    value: str
    expires: float | None


class Vault(Protocol):
    """Where the tokens of jobs are kept.  A job has one at most; all calls that change something are in a write."""

    def put(self, connection: sa.Connection, job: str, token: Token) -> None: ...

    def take(self, job: str) -> Token | None:
        """The job's token; it stays where it is."""
        ...

    def forget(self, connection: sa.Connection, job: str) -> None: ...


class Memory:
    """Tokens in this process, for a worker in this process.  Gone with it."""

    def __init__(self) -> None:
        self._kept: dict[str, Token] = {}
        self._lock = threading.Lock()

    def put(self, connection: sa.Connection, job: str, token: Token) -> None:
        with self._lock:
            self._kept[job] = token

    def take(self, job: str) -> Token | None:
        with self._lock:
            return self._kept.get(job)

    def forget(self, connection: sa.Connection, job: str) -> None:
        with self._lock:
            self._kept.pop(job, None)


class Sealed:
    """Tokens in the database, encrypted and bound to their job; whoever has the key and the database can read them."""

    def __init__(self, database: Database, secret: str) -> None:
        from cryptography.fernet import Fernet

        try:
            self._box = Fernet(secret)
        except (ValueError, TypeError):
            raise RequestError(
                "HFQUANT_SECRET is not a key",
                "make one with `hfquant worker --new-secret`, and give it to all processes",
            ) from None
        self._database = database

    def put(self, connection: sa.Connection, job: str, token: Token) -> None:
        sealed = self._box.encrypt(f"{job} {token.value}".encode()).decode()
        self.forget(connection, job)
        connection.execute(tokens.insert().values(job=job, sealed=sealed, expires=token.expires))

    def take(self, job: str) -> Token | None:
        from cryptography.fernet import InvalidToken

        with self._database.read() as connection:
            found = connection.execute(sa.select(tokens).where(tokens.c.job == job)).mappings().first()
        if found is None:
            return None
        try:
            owner, _, value = self._box.decrypt(found["sealed"].encode()).decode().partition(" ")
        except InvalidToken:
            raise TokenError("the token of this job was sealed with another key", EXPIRED) from None
        if owner != job:
            raise TokenError("the token of this job belongs to another one", EXPIRED)
        return Token(value, found["expires"])

    def forget(self, connection: sa.Connection, job: str) -> None:
        connection.execute(tokens.delete().where(tokens.c.job == job))


def vault_for(secret: str | None, database: Database) -> Vault:
    """With a secret: sealed in the database.  Without: in this process alone."""
    return Sealed(database, secret) if secret else Memory()


def new_secret() -> str:
    """A key for HFQUANT_SECRET."""
    from cryptography.fernet import Fernet

    return Fernet.generate_key().decode()


def fingerprint(token: str | None) -> str:
    """Tells tokens apart in a cache's key without keeping them."""
    return hashlib.sha256((token or "").encode()).hexdigest()
