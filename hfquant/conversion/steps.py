"""The steps of one conversion.  Each may be cut anywhere and begun again: it looks first at what is there.

What a step hands on lies in the job's folder and in its row; what it returns is small and plain.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from huggingface_hub import HfApi, get_token

from .. import report
from ..errors import HubError, QualityError, ResourceError, TokenError
from ..measure import card
from ..model.hub import facts, understood
from ..model.remote import Look, look
from . import artefact, checks, figures, hub
from .attend import attend
from .claims import Claim, Claims
from .executors import Executor, Task
from .executors.hf_jobs import hardware, price
from .job import Kind, Unwanted
from .provenance import FILE as PROVENANCE
from .pull import pull
from .record import Row
from .request import Request
from .retry import insisting, patiently
from .settings import Settings
from .vault import EXPIRED
from .verify import Remote, check, read_text
from .workspace import Room, Workspace

SPARE = 500_000_000  # bytes of disk that a job leaves alone
PUBLISHED = (card.FILE, report.FILE, PROVENANCE)
SOON = 120.0  # seconds that a token must still be good for when a push begins


class Review(Exception):
    """The result waits for somebody to look at it."""


@dataclass(frozen=True)
class Tools:
    """What steps work with."""

    claims: Claims
    workspace: Workspace
    settings: Settings
    memory: int
    executors: Mapping[str, Executor]


class Steps:
    """The steps of one attempt.  `run(name)` does one; raises HfquantError, Unwanted, Review."""

    def __init__(self, tools: Tools, row: Row, claim: Claim) -> None:
        self.tools, self.row, self.claim = tools, row, claim
        self.job, self.attempt = claim.job, claim.attempt
        self.request = Request.model_validate(row["request"])
        self.room: Room = tools.workspace.room(self.job)
        self._asked = 0.0

    def run(self, name: str) -> dict[str, Any]:
        """Do one step -> what is worth writing down of it."""
        self.guard(now=True)
        work: Callable[[], dict[str, Any]] = getattr(self, f"_{name}")
        return work()

    def guard(self, now: bool = False) -> None:
        """Raises Unwanted if the job was cancelled; looks no more than four times a second."""
        if now or time.monotonic() - self._asked > 0.25:
            self._asked = time.monotonic()
            if not self.tools.claims.wanted(self.claim):
                raise Unwanted

    def tell(self, kind: Kind, **data: Any) -> None:
        self.tools.claims.note(self.claim, [(kind, data)])

    def note(self, **changes: Any) -> None:
        """Keep what belongs to the job, not to the attempt."""
        self.tools.claims.note(self.claim, [], **changes)

    def token(self, until: float = 0.0) -> str | bool | None:
        """What the Hub is asked with: the owner's token, the machine's login where that was agreed, or nothing.

        until: seconds from now that it must be good for.  Raises TokenError.
        """
        if self.row["own_login"] and self.tools.settings.own_login:
            return None
        found = self.tools.claims.vault.take(self.job)
        if found is None:
            if self.row["with_token"]:
                raise TokenError("the token of this job is not there any more", EXPIRED)
            return False
        if found.expires is not None and found.expires < time.time() + until:
            raise TokenError("your login at the Hub has expired", EXPIRED)
        return found.value

    def look(self) -> Look:
        with understood(self.request.model, self.row["revision"]):
            return insisting(lambda: look(self.request.model, self.row["revision"], self.token()))

    @property
    def measured(self) -> bool:
        """Whether nothing of the original is needed any more."""
        return (self.room.out / report.FILE).is_file() and bool(report.read(self.room.out).get("gate"))

    # -- the steps, in order -----------------------------------------------------------------------------------------

    def _preflight(self) -> dict[str, Any]:
        """Everything that can be refused is refused here, by the Hub's word and the files' headers."""
        self.room.enter(self.attempt, fresh=self.row["fresh"])
        seen = self.look()
        found = checks.model(seen, self.tools.settings.limits, self.request, self.token())
        checks.target(self.request, self.token())
        self.note(facts=facts(seen.info))
        return {"bytes": seen.bytes, "parameters": found.parameters}

    def _resolve(self) -> dict[str, Any]:
        """The commit was fixed when the job was asked for; it must still be there, and be it."""
        seen = self.look()
        if seen.commit != self.row["revision"]:
            raise HubError(f"{self.request.model} answers with another commit", "submit the job again")
        return {"commit": seen.commit}

    def _download(self) -> dict[str, Any]:
        if self.measured:
            return {"skipped": True}
        seen = self.look()
        needed = sum(seen.files.values()) if not any(self.room.source.iterdir()) else 0
        self.tools.workspace.check(needed + SPARE)
        if seen.bytes * 2 > self.tools.settings.limits.disk:
            raise ResourceError(f"{seen.model} is too large for a job's share of the disk", "take a smaller model")
        size = pull(seen, self.room.source, self.token(), self.guard, lambda text: self.tell("progress", text=text))
        if self.row["text"] is not None:
            self.room.text.write_text(self.row["text"], encoding="utf-8")
        return {"bytes": size}

    def _settings(self) -> dict[str, Any]:
        """What a child is told of the work.  No token, no name of the owner."""
        return {
            "source": str(self.room.source),
            "out": str(self.room.out),
            "model": self.request.model,
            "revision": self.row["revision"],
            "recipe": self.request.recipe,
            "memory": int(self.tools.memory * 0.8),
            "measuring": asdict(self.tools.settings.measuring),
            "text": str(self.room.text) if self.row["text"] is not None else None,
            "facts": (self.tools.claims.find(self.job) or {}).get("facts") or {},
        }

    def _run(self) -> dict[str, Any]:
        """All of it, on a machine elsewhere; then the card and the report are fetched from the Hub."""
        seconds = self._seconds()
        if self.request.executor == "hf-jobs":
            most = min(self.request.max_usd or math.inf, self.tools.settings.limits.usd)
            _, seconds = price(hardware(self.token()), self.request.hardware, seconds, most)
        told = {key: getattr(self.request, key) for key in ("model", "recipe", "target", "private", "pull_request")}
        settings = {**told, "revision": self.row["revision"], "text": self.row["text"], "seconds": seconds}
        settings["measuring"] = asdict(self.tools.settings.measuring)
        pushed = self._attend("run", settings, seconds)
        self.note(pushed=pushed)
        return pushed

    def _compress(self) -> dict[str, Any]:
        if self.measured:
            return {"skipped": True}
        return self._attend("compress", self._settings(), self._seconds())

    def _evaluate(self) -> dict[str, Any]:
        if self.measured:
            return {"skipped": True}
        return self._attend("evaluate", self._settings(), self._seconds())

    def _seconds(self) -> float:
        """What is left of the time that this attempt may take."""
        spent = self.tools.claims.now() - float(self.row["started"])
        return max(1.0, min(self.request.timeout or math.inf, self.tools.settings.limits.seconds) - spent)

    def _attend(self, name: str, settings: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        executor = self.tools.executors[self.request.executor]
        task = Task(
            name=name,
            job=self.job,
            key=f"{self.job}-{self.attempt}-{name}",
            room=self.room,
            settings=settings,
            seconds=seconds,
            hardware=self.request.hardware,
            token=self._plain_token() if executor.remote else None,
            known=self.row["handle"],
        )
        return attend(executor, task, self)

    def _plain_token(self) -> str:
        found = self.token(until=SOON)
        if found is None:
            found = get_token()  # the machine's login, where that was agreed
        if not isinstance(found, str):
            raise TokenError("work on other machines needs a token", "log in, and submit the job again")
        return found

    def _gate(self) -> dict[str, Any]:
        verdict = report.read(self.room.out).get("gate") or {}
        if not verdict.get("passed"):  # its owner may look at what was measured
            self.note(report=artefact.as_json(artefact.read(self.room.out, force=True).report).decode())
            failures = "\n".join(f"- {failure}" for failure in verdict.get("broken") or ())
            raise QualityError(
                f"the result is below its recipe's gate, nothing was pushed:\n{failures}",
                "use more bits, smaller groups or a calibrated method, or relax the recipe's `gate`",
            )
        return {"passed": True}

    def _card(self) -> dict[str, Any]:
        """The card and the report as they will be published; refused if a token had got into one of the files."""
        published = artefact.read(self.room.out)
        text = (self.room.out / card.FILE).read_text("utf-8")
        self.note(card=text, report=artefact.as_json(published.report).decode())
        self.tools.claims.keep(self.claim, figures.of_artefact(published))
        return {"files": len(published.files), "bytes": published.bytes}

    def _push(self) -> dict[str, Any]:
        if self.request.target is None:
            return {"skipped": True}
        if not self.row["released"]:
            raise Review
        self.token(until=SOON)
        done = hub.push(
            self.room.out,
            self.request.target,
            private=self.request.private,
            pr=self.request.pull_request,
            token=self.token(),
            guard=lambda: self.guard(now=True),
        )
        pushed = {"repo": done.repo, "url": done.url, "commit": done.commit, "pull_request": done.pull_request}
        self.note(pushed=pushed)
        return pushed

    def _verify(self) -> dict[str, Any]:
        """Ask the Hub once more, as a stranger would: is every file there, with the hash that it had here?"""
        pushed = (self.tools.claims.find(self.job) or {}).get("pushed")
        if self.request.target is None or not pushed:
            return {"skipped": True}
        api = HfApi(token=self.token())
        found = patiently(lambda: Remote.read(api, pushed["repo"], pushed["commit"]))
        if found is None:
            raise HubError(f"{pushed['repo']} does not know the commit that was pushed", "resume the job")
        self.note(pushed=pushed | {"private": found.private})
        if not self.room.out.is_dir():  # it was made elsewhere
            return self._verify_remote(api, pushed["repo"], found)
        published = artefact.read(self.room.out)
        if problem := patiently(lambda: check(published, found, api=api, repo=pushed["repo"])):
            raise HubError(f"{pushed['repo']} is not what was pushed: {problem}", "resume the job")
        return {"files": len(published.files)}

    def _verify_remote(self, api: HfApi, repo: str, found: Remote) -> dict[str, Any]:
        """Compare the files with the hashes in hfquant.json; keep card and report."""
        texts = {name: patiently(partial(read_text, api, repo, found.commit, name)) for name in PUBLISHED}
        for file in json.loads(texts[PROVENANCE])["files"]:
            there = found.files.get(file["path"])
            if there is None or there.size != file["size"] or (there.lfs and there.lfs.sha256 != file["sha256"]):
                raise HubError(f"{repo} is not what was pushed: {file['path']} differs", "resume the job")
        self.note(card=texts[card.FILE], report=texts[report.FILE])
        self.tools.claims.keep(self.claim, figures.of_repository(api, repo, found))
        return {"files": len(found.files)}

    def _cleanup(self) -> dict[str, Any]:
        """The room is given back; of a result that nobody pushed, the result stays."""
        if self.request.target is not None:
            self.room.remove()
        else:
            for folder in (self.room.source, self.room.tmp, self.room.out / ".hfquant"):
                shutil.rmtree(folder, ignore_errors=True)
            self.room.text.unlink(missing_ok=True)
        return {}
