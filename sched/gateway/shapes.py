"""Replies and chunks of the OpenAI API, from the service's deltas. Knows no HTTP and no service: deltas in, bytes out.

A chunk's JSON is constant for a choice but for its text, so the constant parts are made once and a token costs one
encoded string and one join.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from engine.types import TokenLogprobs
from sched.gateway.face import Tokenizer
from sched.stream import Delta, Usage

LEAST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON has not
DONE = b"data: [DONE]\n\n"
PLAIN = b',"logprobs":null,"finish_reason":null'  # what follows the text of a chunk that has nothing else


class Head(msgspec.Struct):
    """What every chunk and reply of one request begins with."""

    id: str
    created: int
    model: str
    fingerprint: str

    def fields(self, object: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Gathered(msgspec.Struct):
    """One choice of a reply that isn't streamed."""

    text: list[str] = []
    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish: str | None = None
    stop_reason: str | int | None = None


class Gathering:
    """A sink that keeps what a reply needs."""

    def __init__(self, choices: int):
        self.choices = [Gathered() for _ in range(choices)]

    def add(self, deltas: list[Delta]) -> None:
        for d in deltas:
            choice = self.choices[d.index]
            choice.text.append(d.text)
            choice.ids += d.ids
            choice.logprobs += d.logprobs or ()
            if d.finish is not None:
                choice.finish, choice.stop_reason = d.finish, d.stop_reason


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cached_tokens_device": usage.cached_tokens - usage.dram_tokens - usage.ssd_tokens,
            "cached_tokens_dram": usage.dram_tokens,
            "cached_tokens_ssd": usage.ssd_tokens,
        },
    }


# ---- logprobs -------------------------------------------------------------------------------------------------------


def token_text(raw: bytes) -> str:
    """A token as text; one that is no whole character is written as its bytes, so that two such tokens stay apart."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


def chat_logprobs(tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[TokenLogprobs], top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(id)
        return {"token": token_text(raw), "logprob": max(logprob, LEAST), "bytes": list(raw)}

    content = [
        entry(id, one.chosen) | {"top_logprobs": [entry(t, p) for t, p in zip(one.top_ids[:top], one.top, strict=False)]}
        for id, one in zip(ids, found, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[TokenLogprobs | None], top: int, offset: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion; `offset` is where the first token begins in the choice's text."""
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    for id, one in zip(ids, found, strict=True):
        raw = tokenizer.token_bytes(id)
        tokens.append(token_text(raw))
        text_offset.append(offset)
        offset += sum(b & 0xC0 != 0x80 for b in raw)  # characters that begin in this token
        if one is None:  # nothing comes before the first token of a prompt
            token_logprobs.append(None)
            top_logprobs.append(None)
            continue
        token_logprobs.append(max(one.chosen, LEAST))
        likely = {token_text(tokenizer.token_bytes(t)): max(p, LEAST) for t, p in zip(one.top_ids[:top], one.top, strict=False)}
        top_logprobs.append({**likely, tokens[-1]: max(one.chosen, LEAST)})
    return {"tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top_logprobs, "text_offset": text_offset}


# ---- chat -----------------------------------------------------------------------------------------------------------


class Chat:
    """The shapes of /v1/chat/completions."""

    __slots__ = ("before", "chunk", "end", "head", "include_usage", "tokenizer", "top")

    def __init__(self, head: Head, tokenizer: Tokenizer, top: int | None, include_usage: bool):
        self.head, self.tokenizer, self.top, self.include_usage = head, tokenizer, top, include_usage
        self.chunk = orjson.dumps(head.fields("chat.completion.chunk"))[:-1]
        self.end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self.before: dict[int, bytes] = {}  # choice -> its chunks up to the delta

    def chunks(self, deltas: list[Delta]) -> bytes:
        out: list[bytes] = []
        for d in deltas:
            before = self.before.get(d.index)
            if before is None:
                before = self.before[d.index] = b'data: %b,"choices":[{"index":%d,"delta":' % (self.chunk, d.index)
                # With the first token and not earlier, since clients take this chunk for the first token's arrival.
                out += before, b'{"role":"assistant","content":""}', PLAIN, self.end
            if self.top is None:
                if d.text:
                    out += before, b'{"content":', orjson.dumps(d.text), b"}", PLAIN, self.end
            elif d.text or d.logprobs:
                out += before, b'{"content":', orjson.dumps(d.text), b'},"logprobs":', self.logprobs(d.ids, d.logprobs)
                out += b',"finish_reason":null', self.end
            if d.finish is not None:
                out += before, b'{},"logprobs":null,"finish_reason":', orjson.dumps(d.finish)
                out += b',"stop_reason":', orjson.dumps(d.stop_reason), self.end
        return b"".join(out)

    def logprobs(self, ids: list[int], found: list[TokenLogprobs] | None) -> bytes:
        if self.top is None or found is None:
            return b"null"
        return orjson.dumps(chat_logprobs(self.tokenizer, ids, found, self.top))

    def tail(self, usage: Usage) -> bytes:
        return tail(self.chunk, usage) if self.include_usage else DONE

    def whole(self, gathering: Gathering, usage: Usage) -> bytes:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": "".join(c.text), "refusal": None},
                "logprobs": None if self.top is None else chat_logprobs(self.tokenizer, c.ids, c.logprobs, self.top),
                "finish_reason": c.finish,
                "stop_reason": c.stop_reason,
            }
            for i, c in enumerate(gathering.choices)
        ]
        return orjson.dumps({**self.head.fields("chat.completion"), "choices": choices, "usage": usage_of(usage)})


def tail(chunk: bytes, usage: Usage) -> bytes:
    """The usage chunk and the end mark."""
    return b'data: %b,"choices":[],"usage":%b}\n\n%b' % (chunk, orjson.dumps(usage_of(usage)), DONE)


# ---- completions ----------------------------------------------------------------------------------------------------


class Echo(msgspec.Struct):
    """The prompts, where the reply is to repeat them, each before its choices."""

    ids: list[Sequence[int]]
    texts: list[str]
    samples: int  # choices a prompt
    logprobs: dict[int, list[TokenLogprobs | None]]  # the stream's own; filled before the first delta of a prompt


class Completion:
    """The shapes of /v1/completions."""

    __slots__ = ("before", "chunk", "echo", "end", "head", "include_usage", "offset", "tokenizer", "top")

    def __init__(self, head: Head, tokenizer: Tokenizer, top: int | None, include_usage: bool, echo: Echo | None):
        self.head, self.tokenizer, self.top, self.include_usage, self.echo = head, tokenizer, top, include_usage, echo
        self.chunk = orjson.dumps(head.fields("text_completion"))[:-1]
        self.end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self.before: dict[int, bytes] = {}
        self.offset: dict[int, int] = {}  # choice -> characters sent, kept where logprobs are asked for

    def chunks(self, deltas: list[Delta]) -> bytes:
        out: list[bytes] = []
        for d in deltas:
            text, ids, found = d.text, d.ids, d.logprobs
            before = self.before.get(d.index)
            if before is None:
                before = self.before[d.index] = b'data: %b,"choices":[{"index":%d,"text":' % (self.chunk, d.index)
                if self.echo is not None:
                    text, ids, found = self.echoed(d.index, text, ids, found or [])
            if self.top is None and d.finish is None:
                if text:
                    out += before, orjson.dumps(text), PLAIN, self.end
            elif text or found or d.finish is not None:
                out += before, orjson.dumps(text), b',"logprobs":'
                out += self.logprobs(d.index, text, ids, found), b',"finish_reason":', orjson.dumps(d.finish)
                if d.finish is not None:
                    out += b',"stop_reason":', orjson.dumps(d.stop_reason)
                out.append(self.end)
        return b"".join(out)

    def echoed(self, index: int, text: str, ids: list[int], found: Sequence[TokenLogprobs | None]) -> Any:
        """(text, ids, logprobs) of a choice with its prompt before it."""
        assert self.echo is not None
        prompt = index // self.echo.samples
        text = self.echo.texts[prompt] + text
        if self.top is None:
            return text, ids, None
        return text, [*self.echo.ids[prompt], *ids], [*self.echo.logprobs[prompt], *found]

    def logprobs(self, index: int, text: str, ids: list[int], found: Sequence[TokenLogprobs | None] | None) -> bytes:
        if self.top is None:
            return b"null"
        offset = self.offset.get(index, 0)
        self.offset[index] = offset + len(text)
        return orjson.dumps(completion_logprobs(self.tokenizer, ids, found, self.top, offset)) if found else b"null"

    def tail(self, usage: Usage) -> bytes:
        return tail(self.chunk, usage) if self.include_usage else DONE

    def whole(self, gathering: Gathering, usage: Usage) -> bytes:
        choices = []
        for i, c in enumerate(gathering.choices):
            text, ids, found = "".join(c.text), c.ids, c.logprobs
            if self.echo is not None:
                text, ids, found = self.echoed(i, text, ids, found)
            logprobs = None if self.top is None else completion_logprobs(self.tokenizer, ids, found, self.top, 0)
            choices.append(
                {
                    "index": i,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": c.finish,
                    "stop_reason": c.stop_reason,
                }
            )
        return orjson.dumps({**self.head.fields("text_completion"), "choices": choices, "usage": usage_of(usage)})
