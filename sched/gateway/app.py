"""The application: which route goes where, who may call it, request ids, and the listening socket.

It runs inside somebody else's loop: no signal handlers, no printing, and closing it leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Sequence

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from engine.types import UserError
from sched.gateway import admin, contexts, errors, limits, openai, scaling
from sched.gateway.face import Service
from sched.gateway.keys import CALLER_ID, FINGERPRINT, HEART, REQUEST_ID, SERVICE, TENANT, VERSION
from sched.gateway.limits import ACCOUNT, LIMIT, TERMS, Account
from sched.gateway.sse import PING_INTERVAL, Handler, Heart
from sched.tenants import Key, plain, together

log = logging.getLogger(__name__)

LARGEST_BODY = 32 << 20  # bytes: some 8 million tokens of text, beyond any context
OPEN = ("/health", "/metrics", "/version")  # probes and scrapers carry no key
SANE_ID = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,126}[\x21-\x7e])?")  # goes into logs and headers unchanged
CLOSE_GRACE = 1.0  # seconds handlers get when the listener closes; the service drains before that
# Seconds of reading on after an early refusal, so that the client sees the answer and not a reset.
LINGER = 2.0

ROUTES = (
    web.post("/v1/completions", openai.completion),
    web.post("/v1/chat/completions", openai.chat),
    web.get("/v1/models", admin.models),
    web.get("/v1/models/{id:.+}", admin.model),
    web.post("/tokenize", admin.tokenize),
    web.post("/detokenize", admin.detokenize),
    web.get("/health", admin.health),
    web.get("/metrics", admin.metrics),
    web.get("/version", admin.version),
    web.post("/v1/contexts", contexts.create),
    web.get("/v1/contexts", contexts.every),
    web.get("/v1/contexts/{id}", contexts.one),
    web.delete("/v1/contexts/{id}", contexts.delete),
    web.get("/v1/jobs/{id}", admin.job),
    web.get("/v1/admin/te", admin.executors),
    web.post("/v1/admin/te/{id}/role", admin.give_role),
    web.get("/v1/admin/scale", scaling.state),
    web.post("/v1/admin/scale", scaling.scale),
    web.post("/v1/admin/sleep", scaling.sleep),
    web.post("/v1/admin/wake", scaling.wake),
    web.post("/v1/admin/drain", scaling.drain),
    web.post("/sleep", scaling.vllm_sleep),
    web.post("/wake_up", scaling.vllm_wake_up),
    web.get("/is_sleeping", scaling.vllm_is_sleeping),
)


def build(
    service: Service,
    *,
    api_keys: Sequence[str] = (),
    keys: Sequence[Key] = (),
    version: str = "dev",
    ping_interval: float = PING_INTERVAL,
    clock: Callable[[], float] = time.monotonic,
) -> web.Application:
    """The application over `service`. With `api_keys` or `keys`, all but health, metrics and version asks for one of them.
    `clock`: what the keys' limits go by, in seconds. Raises `UserError` where keys clash."""
    app = web.Application(middlewares=[guard(together(plain(api_keys), keys), clock)], client_max_size=LARGEST_BODY)
    app[SERVICE], app[VERSION] = service, version
    app[FINGERPRINT] = "fp_" + hashlib.sha256(f"deepserve {version}".encode()).hexdigest()[:10]
    app[HEART] = Heart(ping_interval)
    app.cleanup_ctx.append(app[HEART].running)
    app.on_response_prepare.append(name_request)
    app.add_routes(ROUTES)
    return app


async def name_request(request: web.Request, response: web.StreamResponse) -> None:
    if id := request.get(REQUEST_ID):  # absent only where the request was no HTTP
        response.headers["X-Request-Id"] = id
    if account := request.get(ACCOUNT):
        response.headers.update(account.headers())


def secret(request: web.Request) -> bytes:
    """The key that the caller sends. Raises `Problem` where there is none."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        given = request.headers.get("x-api-key", "")
    if not given:
        message = "no API key: send the header `Authorization: Bearer KEY`"
        raise errors.Problem(message, status=401, headers={"WWW-Authenticate": "Bearer"})
    return given.strip().encode("utf-8", "surrogateescape")


def guard(keys: Sequence[Key], clock: Callable[[], float]):  # type: ignore[no-untyped-def]  # an aiohttp middleware
    """Everything that is the same for every route: its id, its key, its deadline, and errors in OpenAI's shape."""
    anyone = Account(None, clock)
    accounts = [Account(key, clock) for key in keys]

    def account(request: web.Request) -> Account:
        """The caller's. Raises `Problem` where the key is missing or wrong."""
        if not keys or request.path in OPEN:
            return anyone
        offered = secret(request)
        # Every key is compared, each in constant time: how long a refusal takes tells nothing about the keys.
        found = [hmac.compare_digest(offered, key.secret) for key in keys]
        if not any(found):
            raise errors.Problem("the API key is wrong", status=401, headers={"WWW-Authenticate": "Bearer"})
        return accounts[found.index(True)]

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "").strip()
        request[CALLER_ID] = given if SANE_ID.fullmatch(given) else ""
        request[REQUEST_ID] = request[CALLER_ID] or openai.new_id("req-")
        try:
            request[ACCOUNT] = account(request)
            request[TENANT] = request[ACCOUNT].salt
            terms = request[TERMS] = limits.terms(request.headers)
            if encoding := request.headers.get("Content-Encoding"):
                raise errors.Problem(f"send the body plain, not with Content-Encoding: {encoding}", status=415)
            request[LIMIT] = limit = asyncio.timeout(terms.timeout)
            try:
                async with limit:
                    return await handler(request)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise limits.expired(terms) from None
        except ConnectionError:  # the client has left: there is nobody to answer
            raise
        except Exception as e:
            if request.writer.output_size:  # an answer is under way: all that is left is to cut it
                raise
            found = errors.problem(e, request)
            if found is None:
                log.exception("request=%s %s %s failed", request[REQUEST_ID], request.method, request.path)
                message = f"internal error; the server's log says more under request={request[REQUEST_ID]}"
                found = errors.Problem(message, status=500)
            return errors.response(found)

    return guarded


# ---- listening ------------------------------------------------------------------------------------------------------


class Listener(msgspec.Struct):
    """A listening gateway."""

    runner: web.AppRunner
    host: str
    port: int  # the real one, where 0 was asked for

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    async def close(self) -> None:
        """Stop listening; requests still running after a second are cancelled."""
        await self.runner.cleanup()


def no_tracebacks(record: logging.LogRecord) -> bool:
    """aiohttp logs a traceback for every line that isn't HTTP; a port scan is no fault of ours."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


async def listen(app: web.Application, host: str, port: int) -> Listener:
    """Serve `app` at host:port, in the running loop. Raises `UserError` naming the flag."""
    server_log = log.getChild("http")
    server_log.addFilter(no_tracebacks)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,  # a client that leaves cancels its handler, and so its request
        access_log=None,
        auto_decompress=False,  # no compressed bodies, and so no bombs
        shutdown_timeout=CLOSE_GRACE,
        lingering_time=LINGER,
        logger=server_log,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host or None, port).start()
    except OSError as e:
        await runner.cleanup()
        if e.errno == errno.EADDRINUSE:
            message = f"--port {port}: something else listens on {host}:{port}; choose another, or --port 0 for any free one"
            raise UserError(message, "port") from None
        if e.errno == errno.EACCES:
            raise UserError(f"--port {port}: not permitted here; choose one above 1023", "port") from None
        message = f"--host {host}: can't listen there ({e.strerror}); 127.0.0.1 is this machine, 0.0.0.0 every interface"
        raise UserError(message, "host") from None
    return Listener(runner, host, runner.addresses[0][1])
