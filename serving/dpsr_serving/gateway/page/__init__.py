"""The page of `dpsr search --page`: its files, its headers, and the judgments made on it.

The page is plain HTML with one script and one style sheet, which call POST /v1/search. It shows texts of the shop and
of users, so it never makes HTML of them, and a Content-Security-Policy forbids all scripts but its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from dpsr_serving.gateway.catalogue import Catalogue
from dpsr_serving.gateway.judgments import JudgmentFile
from dpsr_serving.gateway.messages import RequestError, load_json
from dpsr_serving.gateway.rerank import find_items

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # The browser asks each time whether the file has changed, so that a new version is shown at once.
    "Cache-Control": "no-cache",
}
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_page(
    app: web.Application,
    catalogue: Catalogue,
    judgments: JudgmentFile | None,
    host: str,
    read_body: Callable[[web.Request], Awaitable[bytes]],
) -> None:
    """Adds the page to a server, and refuses what pages of other origins send to it.

    Args:
        app: has POST /v1/search and GET /v1/pipelines, and a middleware that answers RequestError.
        catalogue: the items that can be judged.
        judgments: where judgments are saved; None: the page has no judgments.
        host: the address that the server listens on.
        read_body: returns the body of a request, within the server's limits.
    """
    app.middlewares.append(_refuse_other_origins(loopback=_is_loopback(host)))
    for path, (name, kind) in _FILES.items():
        app.router.add_get(path, _file(name, kind))

    async def settings(_: web.Request) -> web.Response:
        file = None if judgments is None else str(judgments.path)
        return web.json_response({"judgments": file, "keys": catalogue.has_keys}, headers=HEADERS)

    app.router.add_get("/page.json", settings)
    if judgments is not None:
        handlers = _JudgmentHandlers(judgments, catalogue, read_body)
        app.router.add_get("/v1/judgments", handlers.read)
        app.router.add_post("/v1/judgments", handlers.judge)


def _file(name: str, kind: str) -> _Handler:
    body = resources.files(__package__).joinpath(name).read_bytes()
    tag = hashlib.blake2b(body, digest_size=12).hexdigest()

    async def answer(request: web.Request) -> web.Response:
        if any(given.value == tag for given in request.if_none_match or ()):
            return web.Response(status=304, headers={**HEADERS, "ETag": f'"{tag}"'})
        return web.Response(body=body, content_type=kind, charset="utf-8", headers={**HEADERS, "ETag": f'"{tag}"'})

    return answer


class _JudgmentHandlers:
    """GET and POST /v1/judgments."""

    def __init__(
        self, judgments: JudgmentFile, catalogue: Catalogue, read_body: Callable[[web.Request], Awaitable[bytes]]
    ) -> None:
        self._judgments = judgments
        self._catalogue = catalogue
        self._read_body = read_body

    async def read(self, request: web.Request) -> web.Response:
        """Answers the grades of a query: {"query", "grades": {item: grade}, "judgments": number of all}."""
        query = request.query.get("query", "")
        grades, total = await asyncio.to_thread(lambda: (self._judgments.of_query(query), len(self._judgments)))
        return web.json_response({"query": query, "grades": grades, "judgments": total})

    async def judge(self, request: web.Request) -> web.Response:
        """Saves {"query", "item", "grade"}, where the grade null takes a judgment back."""
        tree = load_json(await self._read_body(request))
        if not isinstance(tree, dict) or set(tree) != {"query", "item", "grade"}:
            raise RequestError("got another body, expected an object with query, item and grade")
        query, item, grade = tree["query"], tree["item"], tree["grade"]
        if not isinstance(query, str):
            raise RequestError("query: expected a text")
        if not isinstance(item, (str, int)) or isinstance(item, bool):
            raise RequestError("item: expected an id of the shop, a text or an integer")
        if grade is not None and (not isinstance(grade, (int, float)) or isinstance(grade, bool)):
            raise RequestError("grade: expected a number, or null to take the judgment back")
        # In a thread, as is what saves: both can take longer than a search may wait.
        (row,) = (await asyncio.to_thread(find_items, self._catalogue, [item])).tolist()
        if row < 0:
            raise RequestError(f"item: the index has no item {str(item)[:80]!r}")
        name = self._catalogue.key(row) or str(self._catalogue.ids[row])
        try:
            total = await asyncio.to_thread(self._judgments.judge, query, name, grade)
        except ValueError as error:
            raise RequestError(str(error)) from None
        return web.json_response({"query": query, "item": name, "grade": grade, "judgments": total})


def _refuse_other_origins(loopback: bool) -> Any:
    """Returns a middleware that keeps pages of other origins from using the server through a visitor's browser.

    A browser sends the origin of the page with every POST. On a loopback address, it also refuses names of other hosts,
    which a page could let point to this machine (DNS rebinding). Clients that are not browsers send neither header.
    """

    @web.middleware
    async def refuse(request: web.Request, handler: _Handler) -> web.StreamResponse:
        origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
        if origin is None and site is None:
            return await handler(request)
        host = urlsplit(f"//{request.host}").hostname or ""
        if loopback and not _is_loopback(host):
            raise web.HTTPForbidden(text=f"Host: got {request.host}, expected localhost, where the gateway listens")
        if request.method not in ("GET", "HEAD"):
            other = origin is not None and urlsplit(origin).netloc != request.host
            if other or site not in (None, "same-origin", "none"):
                raise web.HTTPForbidden(text=f"Origin: got {origin}, expected the page of this gateway, {request.host}")
        return await handler(request)

    return refuse


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
