"""A client for any OpenAI-compatible server, for `deepserve.py chat` and `bench serve`: chunks with the time they came.

Not a general library: it streams, it measures, and it says in a person's words what went wrong.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import orjson

from engine.types import UserError


class RequestFailed(UserError):
    """The server refused, broke off or could not be reached. `status` is 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0, param: str | None = None):
        super().__init__(message, param)
        self.status = status


class Event(NamedTuple):
    """One chunk of one choice; the last of a request has the usage, where the server sends it."""

    at: float  # CLOCK_MONOTONIC seconds when its bytes came
    text: str
    finish: str | None = None
    usage: dict[str, Any] | None = None
    choice: int = 0


def api_root(base_url: str) -> str:
    """`http://host:port` however the user wrote it: without a scheme, with a slash, with /v1."""
    url = base_url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    return url if "://" in url else f"http://{url}"


def complaint(status: int, body: bytes) -> RequestFailed:
    """What a server's error reply says, whatever its shape."""
    message, param = body.decode("utf-8", "replace").strip()[:500], None
    try:
        error = orjson.loads(body)
        error = error.get("error", error)
        message, param = error.get("message") or error.get("detail") or message, error.get("param")
    except (ValueError, AttributeError):
        pass
    return RequestFailed(f"{status}: {message}", status, param)


async def events_in(content: aiohttp.StreamReader) -> AsyncIterator[tuple[float, bytes]]:
    """(arrival, payload) of every `data:` line. Lines may be of any length and end in LF or CRLF."""
    rest = b""
    async for piece in content.iter_any():
        at = time.monotonic()
        *lines, rest = (rest + piece).split(b"\n") if rest else piece.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at, line[5:].strip()


class Client:
    """Talks to the server at `base_url`. `fresh=True` opens a connection for each request: some servers drop idle ones."""

    def __init__(self, base_url: str, api_key: str | None = None, *, fresh: bool = False, timeout: float | None = None):
        self.root, self.fresh = api_root(base_url), fresh
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # No limit on a whole reply by default (a model may think for an hour), but one on getting through at all.
        self.timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=30)
        self.session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0, force_close=self.fresh)  # whoever measures sets the concurrency
        self.session = aiohttp.ClientSession(
            connector=connector,
            headers=self.headers,
            timeout=self.timeout,
            read_bufsize=1 << 20,
            json_serialize=lambda value: orjson.dumps(value).decode(),
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self.session is not None
        await self.session.close()

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON reply of a plain call. Raises `RequestFailed`."""
        assert self.session is not None
        try:
            async with self.session.request(method, self.root + path, json=body) as response:
                data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise self.unreachable(e) from None
        if response.status >= 400:
            raise complaint(response.status, data)
        try:
            return orjson.loads(data)
        except ValueError:
            raise RequestFailed(f"{path} did not answer in JSON; is {self.root} an OpenAI-compatible server?") from None

    def unreachable(self, error: Exception) -> RequestFailed:
        return RequestFailed(f"no answer from {self.root}: {error or type(error).__name__}")

    async def models(self) -> list[str]:
        """The ids of what the server serves."""
        try:
            return [model["id"] for model in (await self.ask("GET", "/v1/models"))["data"]]
        except (KeyError, TypeError):
            raise RequestFailed(f"/v1/models lists no models; is {self.root} an OpenAI-compatible server?") from None

    def chat(self, messages: list[dict[str, Any]], model: str | None = None, **params: Any) -> AsyncGenerator[Event, None]:
        """The chunks of a streamed chat. Leaving the iteration early (aclose) cancels it at the server."""
        return self.stream("/v1/chat/completions", {"messages": messages}, model, params)

    def complete(self, prompt: Any, model: str | None = None, **params: Any) -> AsyncGenerator[Event, None]:
        """The chunks of a streamed completion."""
        return self.stream("/v1/completions", {"prompt": prompt}, model, params)

    async def stream(
        self, path: str, body: dict[str, Any], model: str | None, params: dict[str, Any]
    ) -> AsyncGenerator[Event, None]:
        assert self.session is not None
        body = {**body, "stream": True, "stream_options": {"include_usage": True}, **params}
        if model is not None:
            body["model"] = model
        whole = False  # an end without a finish reason or [DONE] is a broken connection, not a short answer
        try:
            async with self.session.post(self.root + path, json=body) as response:
                if response.status >= 400:
                    raise complaint(response.status, await response.read())
                async for at, data in events_in(response.content):
                    if data == b"[DONE]":
                        whole = True
                        continue
                    chunk = orjson.loads(data)
                    if chunk.get("error"):
                        raise complaint(500, data)
                    usage = chunk.get("usage")
                    for choice in chunk.get("choices") or ():
                        text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
                        finish = choice.get("finish_reason")
                        whole |= finish is not None
                        yield Event(at, text or "", finish, usage, choice.get("index", 0))
                    if not chunk.get("choices") and usage:
                        yield Event(at, "", None, usage)
        except RequestFailed:
            raise
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise self.unreachable(e) from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise RequestFailed(f"{path} sent what is no OpenAI chunk ({type(e).__name__}: {e})") from None
        if not whole:
            raise RequestFailed(f"{path}: the stream broke off")

    async def count_tokens(self, text: str, model: str | None = None) -> int | None:
        """Tokens of `text` as this server counts them, by vLLM's /tokenize or llama-server's; None where it has neither."""
        vllm = {"prompt": text} | ({"model": model} if model else {})
        for body in (vllm, {"content": text, "add_special": True}):
            try:
                answer = await self.ask("POST", "/tokenize", body)
                # Some servers answer a body they don't understand with no tokens.
                if answer["tokens"] or not text:
                    return len(answer["tokens"])
            except (RequestFailed, KeyError, TypeError):
                continue
        return None
