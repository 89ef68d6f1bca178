"""What the demo's server refuses, and what it tells browsers to refuse: nothing leaves the machine by way of it."""

from __future__ import annotations

import re
from typing import Any

POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "  # Gradio's own page has inline code
    "object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)
"""Content-Security-Policy: the page may load from this server alone."""

_FETCHING = re.compile(r"/(?:file=|file/|proxy=)\s*\w+:", re.IGNORECASE)


class Guard:
    """ASGI middleware: refuses the routes by which Gradio would fetch an address, and sends `POLICY`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if _FETCHING.search(scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            return await send({"type": "http.response.body", "body": b"This server opens no addresses."})

        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def fetch_nothing() -> None:
    """Gradio fetches an address that a client names in place of an uploaded file: from now on it raises."""
    from gradio import processing_utils

    async def refuse(url: str) -> Any:
        raise ValueError("this server opens no addresses: upload the picture")

    processing_utils.async_ssrf_protected_get = refuse
