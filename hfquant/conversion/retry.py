"""Patience with the Hub: what passes is tried again, what does not becomes a message and a way out."""

import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubError
from .redact import redact

T = TypeVar("T")
TRIES = 6
LONGEST = 60.0  # seconds between two of them
TRANSIENT = (
    httpx2.TransportError, ConnectionError, TimeoutError, LocalEntryNotFoundError, json.JSONDecodeError,
)  # fmt: skip
FAILURES = (HfHubHTTPError, RuntimeError, *TRANSIENT)
PASSING = (408, 429, 500, 502, 503, 504)
sleep = time.sleep


def patiently(work: Callable[[], T]) -> T:
    """Do work that may be repeated, again after 1, 2, 4... seconds, or what the Hub says, while errors are passing.

    Raises HubError for an error that stays.
    """
    with understood():
        return insisting(work)


def insisting(work: Callable[[], T], until: float = math.inf) -> T:
    """The same; an error that stays is raised as the client had it.

    until: by `time.monotonic()`; work that could only be done again later than that is not.
    """
    for attempt in range(TRIES - 1):
        try:
            return work()
        except FAILURES as error:
            wait = _wait(error, attempt)
            if not passing(error) or time.monotonic() + wait > until:
                raise
            sleep(wait)
    return work()


def passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, OfflineModeIsEnabled | httpx2.UnsupportedProtocol):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in PASSING
    # LocalEntryNotFoundError: the client could not fetch a file; JSONDecodeError: it read an error page as an answer
    if isinstance(error, TRANSIENT):
        return True
    # the client says "error while uploading", and why in the cause
    return isinstance(error, RuntimeError) and error.__cause__ is not None and passing(error.__cause__)


def _wait(error: BaseException, attempt: int) -> float:
    """Seconds.  A little chance keeps many clients from coming back together."""
    said = ""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        headers = error.response.headers
        limit = re.search(r"t=(\d+)", headers.get("RateLimit", ""))
        said = headers.get("Retry-After", "") or (limit[1] if limit else "")
    base = float(said) if said.isdigit() else 2.0**attempt
    return min(base, LONGEST) * random.uniform(1.0, 1.25)


@contextmanager
def understood() -> Iterator[None]:
    """Turn what the client raises into HubErrors; no token gets into their text."""
    try:
        yield
    except HFValidationError as error:
        raise HubError(said(error), "a repository is named like `user/name`") from None
    except LocalTokenNotFoundError as error:
        raise HubError("you are not logged in to the Hub", "`hf auth login`, or set HF_TOKEN") from error
    except OIDCError as error:
        raise HubError(
            said(error), "`permissions: id-token: write`, or unset HF_OIDC_RESOURCE and set HF_TOKEN"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError("the Hub is switched off by HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE") from error
    except httpx2.UnsupportedProtocol as error:
        address = redact(repr(constants.ENDPOINT))
        raise HubError(f"{address} is not the address of a Hub", "correct HF_ENDPOINT, or unset it") from error
    except FAILURES as error:
        raise HubError(*_explained(error)) from error


def _explained(error: BaseException) -> tuple[str, str]:
    if isinstance(error, GatedRepoError):
        return said(error), "accept its terms on its Hub page"
    if isinstance(error, DisabledRepoError):
        return said(error), "the Hub has closed this repository: ask its owners"
    if isinstance(error, RevisionNotFoundError | RepositoryNotFoundError):
        return said(error), "check the name; log in with `hf auth login` if it is private"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if status == 401:
        return said(error), "log in again with `hf auth login`"
    if status == 403:
        return said(error), "use a token that may write there, or offer the files with `--pr`"
    if status in (412, 409):
        return said(error), "somebody else changed the repository: look at it, then run the command again"
    if status and status not in PASSING:
        return said(error), "the Hub refused this: what it says above is all that is known"
    return said(error), "run the same command again: what has arrived is kept"


def said(error: BaseException) -> str:
    """The first thing an error says, in one line and without tokens."""
    message = getattr(error, "server_message", None) or str(error) or type(error).__name__
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        message = f"{message}: {said(error.__cause__)}"
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    return redact(f"the Hub: {lines[0] if lines else type(error).__name__}")
