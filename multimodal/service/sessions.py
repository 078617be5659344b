"""Sessions over HTTP: their owner lists and deletes them."""

from __future__ import annotations

from typing import Any

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request

from multimodal.service.doors import Doors
from multimodal.service.errors import ApiError
from multimodal.store import SessionStore


def add_sessions(app: FastAPI, sessions: SessionStore, doors: Doors) -> None:
    """Add the addresses of sessions to an application.

    Args:
        app: The application.
        sessions: What it remembers.
        doors: Who is let in, and so whose sessions are meant.
    """

    @app.get("/v1/sessions")
    async def list_sessions(request: Request) -> dict[str, Any]:
        """The caller's sessions, the last used first."""
        caller = await doors.caller(request, "sessions")
        return {"object": "list", "data": await run_sync(sessions.list, caller.id)}

    @app.delete("/v1/sessions/{session_id}")
    async def delete_session(request: Request, session_id: str) -> dict[str, Any]:
        """Delete one of them, with the pictures that no other session shows."""
        caller = await doors.caller(request, "sessions")
        if not await run_sync(sessions.delete, caller.id, session_id):
            raise ApiError(404, f"there is no session {session_id!r:.80} of yours", code="session_not_found")
        return {"id": session_id, "object": "session", "deleted": True}
