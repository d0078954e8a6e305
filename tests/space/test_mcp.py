"""The same calls as tools of the Model Context Protocol, with the same rights."""

import asyncio
import json
from typing import Any

import pytest

from space_app.app import create
from space_app.login import Login
from tests.conversion.jobs.conftest import RECIPE
from tests.serving import serving
from tests.space.conftest import Site, bearer

PREFIX = "space_"  # on a Space gradio puts the Space's name before a tool's

pytest.importorskip("mcp", reason="needs gradio's extra [mcp]")


def call(url: str, user: str | None, name: str, **arguments: Any) -> tuple[bool, str]:
    """(whether it went well, what was said)"""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def talk() -> tuple[bool, str]:
        headers = bearer(user) if user else {}
        async with (
            streamablehttp_client(f"{url}/gradio_api/mcp/", headers=headers) as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            if name == "tools":
                return True, json.dumps([tool.name for tool in (await session.list_tools()).tools])
            answer = await session.call_tool(PREFIX + name, arguments)
            return not answer.isError, " ".join(getattr(part, "text", "") for part in answer.content)

    return asyncio.run(talk())


@pytest.mark.slow
def test_tools_see_and_touch_their_callers_jobs_only(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_MCP_SERVER", "True")
    with serving(create(site.desk.service, Login())) as url:
        tools = json.loads(call(url, "alice", "tools")[1])
        own = {name for name in tools if not name.startswith("space__")}  # the login button has one of gradio's
        assert own == {PREFIX + name for name in ("preview", "submit", "status", "jobs", "report", "cancel", "resume",
                                             "publish")}  # fmt: skip
        wish = {"model": "alice/model", "recipe": RECIPE, "target": "alice/small"}
        assert not call(url, None, "submit", conversion=wish)[0]
        went, said = call(url, "alice", "submit", conversion=wish)
        assert went, said
        (job,) = site.desk.service.jobs("alice")
        for user in ("bob", None):
            for name in ("status", "cancel", "resume", "report", "publish"):
                went, said = call(url, user, name, job=job.id)
                assert not went, name
                assert "no such job" in said or "log in" in said, said
        assert call(url, "alice", "cancel", job=job.id)[0]
        assert site.desk.service.status(job.id, "alice").state == "cancelled"
