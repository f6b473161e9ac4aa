"""A page's server on this machine's own interface. It checks requests, takes turns, and writes nothing."""

import asyncio
import json
import os
import platform
import secrets
import socket
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NoReturn

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from charlm.config import UserError
from charlm.files import parse_json
from charlm.lens.answers import ANSWERS, answer
from charlm.lens.render import render
from charlm.lens.runs import Runs
from charlm.text import say

HOST = "127.0.0.1"
MAX_BODY, PATIENCE = 2**20, 30.0
"""Bytes of a request, and seconds in which it must arrive."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page itself has the rest, see `render`
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_app(runs: Runs, token: str, port: int, is_over: Callable[[], bool] = lambda: False) -> Starlette:
    """The page of some runs, and the answers to it, until the server `is_over`."""
    html, hosts, turn = render(runs.facts(live=True)), (f"{HOST}:{port}", f"localhost:{port}"), asyncio.Lock()

    async def take(request: Request, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of `work`, in a thread; one at a time. ClientDisconnect if the page gives its request up."""
        waiting = asyncio.ensure_future(request.receive())  # which ends with that: its body was read before

        def watch() -> None:
            if waiting.done() or is_over():
                raise ClientDisconnect("the request was given up, or the server has ended")

        try:
            async with turn:
                watch()
                runs.watch = watch
                return await run_in_threadpool(work, *arguments)
        finally:
            waiting.cancel()

    def check(request: Request, given: str | None) -> None:
        host, origin = request.headers.get("host"), request.headers.get("origin")
        if host not in hosts or origin not in (None, f"http://{host}"):
            raise HTTPException(403, "asked by another page, or for another machine; open the printed address")
        if not secrets.compare_digest((given or "").encode(), token.encode()):
            raise HTTPException(403, "the token is missing or wrong; open the printed address")

    async def page(request: Request) -> Response:
        check(request, request.query_params.get("token"))
        return HTMLResponse(html, headers=HEADERS)

    async def reply(request: Request) -> Response:
        check(request, request.headers.get("x-token"))
        if (name := request.path_params["name"]) not in ANSWERS:
            raise HTTPException(404, "there is no such request")
        found = await take(request, answer, runs, name, await values_of(request))
        if isinstance(found, dict):  # in ASCII, as stray bytes are lone surrogates, which UTF-8 does not have
            return Response(json.dumps(found, allow_nan=False), 200, HEADERS, "application/json")
        first = await take(request, next, found)
        return StreamingResponse(events(request, first, found), 200, HEADERS, "text/event-stream")

    async def events(request: Request, event: Any, rest: Iterator[Any]) -> AsyncIterator[str]:
        try:
            while event is not None:
                yield f"data: {json.dumps(event)}\n\n"
                event = await take(request, next, rest, None)
        except (ClientDisconnect, UserError) as error:
            yield f"data: {json.dumps({'error': str(error)})}\n\n"

    def refuse(request: Request, error: Exception) -> Response:
        """An error, after which no more is read of the request."""
        status, reason = getattr(error, "status_code", 400), getattr(error, "detail", str(error))
        return Response(json.dumps({"error": reason}), status, HEADERS | {"Connection": "close"}, "application/json")

    routes = [Route("/", page, methods=["GET"]), Route("/{name}", reply, methods=["POST"])]
    handlers = dict.fromkeys((HTTPException, UserError, ClientDisconnect), refuse)
    return Starlette(routes=routes, exception_handlers=handlers)


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
        raise ValueError("it is no object")
    except (TimeoutError, ValueError) as error:
        raise HTTPException(400, f"the request is no JSON: {error or 'it is too slow'}") from None


def serve(runs: Runs, port: int, is_opened: bool) -> NoReturn:
    """Say where the page of some runs is, open it, and answer it until Ctrl-C. UserError if the port is taken."""
    token = secrets.token_urlsafe()
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
        app = create_app(runs, token, port, lambda: server.should_exit)
        server = uvicorn.Server(uvicorn.Config(app, **how))
        say(f"The page is at http://{HOST}:{port}/?token={token}\nCtrl-C ends it.", flush=True)
        if "SSH_CONNECTION" in os.environ:
            say(f"On your own machine, first: ssh -N -L {port}:{HOST}:{port} {platform.node()}", flush=True)
        elif is_opened:
            webbrowser.open(f"http://{HOST}:{port}/?token={token}")
        server.run(sockets=[listening])
    raise KeyboardInterrupt  # which uvicorn raises itself, but not where the parent ignored Ctrl-C
