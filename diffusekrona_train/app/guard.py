"""Which requests are answered: a known Host, not from another site, with the access token where one is needed.

Forms carry one more token (`csrf`), which another site cannot read. Both come from a secret that is kept beside the
runs, so that a page that was open while the server restarted still works.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 256 * 2**20  # bytes of one request: a few photos
COOKIE = "krona_studio"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def secret_of(folder: Path) -> bytes:
    """Return the secret of a studio folder, made at the first call; only its owner may read it."""
    path = folder / "secret"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secrets.token_hex(32).encode())
    return path.read_bytes()


def token_for(secret: bytes, purpose: str) -> str:
    """Return the token of a purpose (`access`, `csrf`): 32 hex digits."""
    return hmac.new(secret, purpose.encode(), hashlib.sha256).hexdigest()[:32]


def same(given: str | None, wanted: str) -> bool:
    """Compare two tokens in constant time."""
    return hmac.compare_digest((given or "").encode(), wanted.encode())


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_of(host: str) -> frozenset[str]:
    """Return the names under which a server on `host` may be addressed, besides IP addresses."""
    name = socket.gethostname().lower()
    local = ("localhost", "127.0.0.1", "::1", host.lower())
    return frozenset(local if is_loopback(host) else (*local, name, f"{name}.local"))


class Guard:
    """ASGI middleware around the pages; a refusal is one line of text and its status."""

    def __init__(self, app: ASGIApp, names: Iterable[str], access: str | None):
        self.app, self.names, self.access = app, frozenset(names), access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":  # no page uses websockets

            async def with_headers(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)
                    for name, value in HEADERS.items():
                        headers.setdefault(name, value)
                await send(message)

            await (self.refusal(Request(scope)) or self.app)(scope, receive, with_headers)

    def refusal(self, request: Request) -> Response | None:
        """Return the answer to a request that no page may see; None where it may pass."""
        posts, length = request.method == "POST", request.headers.get("content-length", "")
        rules = (
            (421, not self.knows(request.headers.get("host", "")), "unknown Host; open the address that was printed"),
            (403, foreign(request.method, request.headers), "another site asks for this; open the studio itself"),
            (405, not posts and request.method not in ("GET", "HEAD"), "only GET and POST are answered"),
            (411, posts and not length.isdigit(), "the request does not say how long it is"),
            (413, posts and length.isdigit() and int(length) > LARGEST_BODY, "too many bytes for one request"),
        )
        for status, broken, why in rules:
            if broken:
                return PlainTextResponse(f"error: {why}\n", status)
        if self.access is None or same(request.cookies.get(COOKIE), self.access):
            return None
        if request.method == "GET" and same(request.query_params.get("token"), self.access):
            answer = RedirectResponse(request.url.path, 303)
            answer.set_cookie(COOKIE, self.access, httponly=True, samesite="strict", max_age=90 * 86400)
            return answer
        return PlainTextResponse("error: the token is missing; open the address that was printed\n", 401)

    def knows(self, host: str) -> bool:
        """Return whether a Host header names this server; an IP address cannot be rebound to another one."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            return name in self.names or (self.access is not None and bool(ipaddress.ip_address(name)))
        except ValueError:
            return False


def foreign(method: str, headers: Headers) -> bool:
    """Return whether a request seems to come from another site; a link that is followed does not count."""
    site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
    if site not in ("same-origin", "none"):
        follows = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        return method not in ("GET", "HEAD") or not follows
    return method not in ("GET", "HEAD") and origin is not None and urlsplit(origin).netloc != headers.get("host")
