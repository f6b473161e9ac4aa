"""A page's server on this machine's own interface. It checks requests, takes turns, and writes nothing."""

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from charlm.config import UserError
from charlm.files import parse_json
from charlm.lens.answers import ANSWERS, answer
from charlm.lens.render import render
from charlm.lens.runs import Runs

HOST = "127.0.0.1"
MAX_BODY, PATIENCE = 2**20, 30.0
"""Bytes of a request, and seconds in which it must arrive."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""The page itself names its own script and style, see `render`."""


Watch = Callable[[], None]


class Superseded(Exception):
    """A newer request made this one useless."""


class Turns:
    """One computation at a time. A request is superseded by a newer one of its name, or a newer `read`."""

    def __init__(self, runs: Runs):
        self.runs, self.lock = runs, asyncio.Lock()
        self.is_over: Callable[[], bool] = lambda: False  # when the server was asked to end
        self._count, self._newest = 0, {"read": 0}

    def watch(self, name: str) -> Watch:
        """A new request's place: what raises `Superseded` when it is useless."""
        self._count = self._newest[name] = number = self._count + 1

        def watch() -> None:
            if self.is_over() or max(self._newest[name], self._newest["read"]) > number:
                raise Superseded("superseded")

        return watch

    async def take(self, watch: Watch, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of `work`, done in a thread when it is its turn."""
        async with self.lock:
            watch()
            self.runs.watch = watch
            return await run_in_threadpool(work, *arguments)


class Guard:
    """Refuses requests of other pages and programs, and sets the headers of all answers."""

    def __init__(self, app: ASGIApp, token: str, port: int):
        self.app, self.token, self.hosts = app, token.encode(), (f"{HOST}:{port}", f"localhost:{port}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        request = Request(scope)
        given = request.headers.get("x-token") if request.method == "POST" else request.query_params.get("token")
        host, origin = request.headers.get("host"), request.headers.get("origin")
        app = self.app
        if host not in self.hosts or origin not in (None, f"http://{host}"):
            app = refusal(403, "asked by another page, or for another machine; open the printed address")
        elif not secrets.compare_digest((given or "").encode(), self.token):
            app = refusal(403, "the token is missing or wrong; open the printed address")
        await app(scope, receive, send_with_headers)


def refusal(status: int, reason: object) -> Response:
    """An error, after which no more is read of the request."""
    return Response(json.dumps({"error": str(reason)}), status, {"Connection": "close"}, "application/json")


def create_app(turns: Turns, token: str, port: int) -> Starlette:
    """The page of some runs, and the answers to it."""

    async def reply(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ANSWERS:
            raise HTTPException(404, "there is no such request")
        values = await values_of(request)
        watch = turns.watch(name)
        found = await turns.take(watch, answer, turns.runs, name, values)
        if isinstance(found, dict):  # in ASCII, as stray bytes are lone surrogates, which UTF-8 does not have
            return Response(json.dumps(found, allow_nan=False), media_type="application/json")
        first = await turns.take(watch, next, found)
        return StreamingResponse(events(request, first, found, watch), media_type="text/event-stream")

    async def events(request: Request, event: Any, rest: Iterator[Any], watch: Watch) -> AsyncIterator[str]:
        try:
            while event is not None and not await request.is_disconnected():
                yield f"data: {json.dumps(event)}\n\n"
                event = await turns.take(watch, next, rest, None)
        except (Superseded, UserError) as error:
            yield f"data: {json.dumps({'error': str(error)})}\n\n"

    handlers = {
        HTTPException: lambda request, error: refusal(error.status_code, error.detail),
        Superseded: lambda request, error: refusal(409, error),
        UserError: lambda request, error: refusal(400, error),
        ClientDisconnect: lambda request, error: refusal(400, error),
    }
    page = HTMLResponse(render(turns.runs.facts(live=True)))
    routes = [Route("/", page, methods=["GET"]), Route("/{name}", reply, methods=["POST"])]
    guard = Middleware(Guard, token=token, port=port)
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)


async def values_of(request: Request) -> dict[str, Any]:
    """The JSON object in a request. Raises HTTPException for one that is too large, too slow or none."""
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise HTTPException(413, f"the request has more than {MAX_BODY:,} bytes")
        if isinstance(values := parse_json(bytes(body)), dict):
            return values
    except (TimeoutError, ValueError) as error:
        raise HTTPException(400, f"the request is no JSON: {error or 'it is too slow'}") from None
    raise HTTPException(400, "the request is no JSON object")


def serve(runs: Runs, port: int, announce: Callable[[str, int], None]) -> None:
    """Answer the pages of some runs until Ctrl-C, which is raised as KeyboardInterrupt at the end.

    `announce` is called with address and port when they answer. UserError if the port, 0 for any, is taken.
    """
    token, turns = secrets.token_urlsafe(), Turns(runs)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port={port}: cannot be used ({error.strerror}); leave it out", "port") from None
        listening.listen()
        port = listening.getsockname()[1]
        how = {"http": "h11", "ws": "none", "lifespan": "off", "log_level": "error", "access_log": False}
        how |= {"server_header": False, "limit_concurrency": 64, "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(create_app(turns, token, port), **how))
        turns.is_over = lambda: server.should_exit
        announce(f"http://{HOST}:{port}/?token={token}", port)
        server.run(sockets=[listening])
    raise KeyboardInterrupt  # which uvicorn raises itself, but not where the parent ignored Ctrl-C
