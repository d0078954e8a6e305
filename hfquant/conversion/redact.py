"""No token of the Hub in any text that is kept or shown."""

import logging
import re
import sys
from typing import Any

TOKEN = re.compile(r"hf_(?:oauth|jwt)_[\w.-]{8,}|hf_[A-Za-z0-9]{16,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}", re.ASCII)
BEARER = re.compile(r"(?i)(bearer\s+)[\w.~+/=-]{8,}")


def redact(text: str) -> str:
    """The text with every token replaced by its first letters: of the Hub, JSON web tokens, and what follows `Bearer`.

    What only looks like a token is replaced too: `hf_` and sixteen letters.
    """
    return TOKEN.sub(lambda found: f"{found[0][:3]}…", BEARER.sub(r"\1…", text))


def log_to_stderr() -> None:
    """All logs of this process go to stderr, and no tokens with them."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(Redact())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("hfquant").setLevel(logging.INFO)


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what is stderr at that moment: one that was taken in its place for a while may be closed since."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


class Redact(logging.Filter):
    """A filter for handlers: what passes has no tokens in it, tracebacks included."""

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if (clean := redact(said)) != said:
            record.msg, record.args = clean, ()
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        return True
