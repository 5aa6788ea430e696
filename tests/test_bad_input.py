"""Malformed requests: each gets a 4xx with OpenAI's error object naming the field at fault, and the server goes on serving.

`cases()` needs no fake: the end-to-end tests send the same list to a real server. What depends on the model is taken from its
/v1/models and /tokenize answers.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from typing import Any

import aiohttp
import msgspec
import orjson

from sched.gateway.app import build, listen
from tests.fake import FakeService

CHAT, COMPLETION, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
DEEP = 100_000


class Case(msgspec.Struct):
    """One wrong request. `param` None: no field is at fault."""

    name: str
    path: str
    body: bytes
    param: str | None = None
    status: int = 400
    method: str = "POST"
    headers: dict[str, str] = {}


def chat(name: str, param: str | None = None, /, status: int = 400, **fields: Any) -> Case:
    body = {"model": "MODEL", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **fields}
    return Case("chat " + name, CHAT, json.dumps(body).encode(), param or name, status)


def completion(name: str, param: str | None = None, /, status: int = 400, **fields: Any) -> Case:
    body = {"model": "MODEL", "prompt": "hi", "max_tokens": 4, **fields}
    return Case("completion " + name, COMPLETION, json.dumps(body).encode(), param or name, status)


def raw(name: str, body: bytes, path: str = CHAT, param: str | None = None, **more: Any) -> Case:
    return Case("raw " + name, path, body, param, **more)


def said(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def cases() -> list[Case]:
    """`MODEL` in a body stands for the served model's id."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    user = {"role": "user", "content": "hi"}
    nested = b"[" * DEEP + b"]" * DEEP
    return [
        # ---- not JSON, not UTF-8, not an object
        raw("empty body", b""),
        raw("cut short", b'{"model": "MODEL", "messages": [{"role"'),
        raw("not JSON", b"hello"),
        raw("trailing comma", b'{"model": "MODEL",}'),
        raw("two values", b'{"model": "MODEL", "prompt": "hi"} {}', COMPLETION),
        raw("an array", b"[]"),
        raw("null", b"null"),
        raw("NaN", b'{"model": "MODEL", "prompt": "hi", "temperature": NaN}', COMPLETION),
        raw("number out of range", b'{"model": "MODEL", "prompt": "hi", "temperature": 1e999}', COMPLETION, "temperature"),
        raw("UTF-16", '{"model": "MODEL"}'.encode("utf-16")),
        raw("invalid UTF-8 in a string", b'{"model": "MODEL", "prompt": "\xff\xfe"}', COMPLETION),
        raw("invalid UTF-8 in a key", b'{"mod\xffel": "MODEL"}', COMPLETION),
        raw("half a surrogate pair", b'{"model": "MODEL", "prompt": "\\ud800 x"}', COMPLETION),
        raw("deep prompt", b'{"model": "MODEL", "prompt": ' + nested + b"}", COMPLETION, "prompt[0][0]"),
        raw("deep message", b'{"model": "MODEL", "messages": [{"role": "user", "content": ' + nested + b"}]}"),
        raw("deep tools", b'{"model": "MODEL", "messages": [{"role": "user", "content": "hi"}], "tools": ' + nested + b"}"),
        raw("deep nowhere", b"[" * DEEP),
        raw("no gzip", b'{"prompt": "hi"}', COMPLETION, headers={"Content-Encoding": "gzip"}, status=415),
        raw("a gzip bomb", gzip.compress(b" " * (40 << 20), 9), headers={"Content-Encoding": "gzip"}, status=415),
        raw("too large", b" " * ((32 << 20) + 1), COMPLETION, status=413),
        # ---- routes and methods
        Case("unknown route", "/v1/nowhere", b"{}", None, 404),
        Case("route with a slash too many", "/v1/completions/", b"{}", None, 404),
        Case("wrong method", COMPLETION, b"", None, 405, "GET"),
        Case("wrong method on models", "/v1/models", b"{}", None, 405),
        Case("unknown model by id", "/v1/models/nobody", b"", "model", 404, "GET"),
        Case("unknown job", "/v1/jobs/nothing", b"", "id", 404, "GET"),
        # ---- model and prompt
        chat("model", model="nobody", status=404),
        completion("model", model="nobody", status=404),
        chat("model", model=7),
        raw("no messages", b'{"model": "MODEL"}', CHAT, "messages"),
        raw("no prompt", b'{"model": "MODEL"}', COMPLETION, "prompt"),
        chat("messages", **said()),
        chat("messages", messages=None),
        chat("messages", messages="hi"),
        chat("messages", "messages[0]", **said("hi")),
        chat("role missing", "messages[0].role", **said({"content": "hi"})),
        chat("role unknown", "messages[1].role", **said(user, {"role": "robot", "content": "hi"})),
        chat("role no string", "messages[0].role", **said({"role": ["user"], "content": "hi"})),
        chat("content missing", "messages[0].content", **said({"role": "user"})),
        chat("content a number", "messages[0].content", **said({"role": "user", "content": 5})),
        chat("image", "messages[0].content[1]", **said({"role": "user", "content": [{"type": "text", "text": "what?"}, image]})),
        chat("part a string", "messages[0].content[0]", **said({"role": "user", "content": ["hi"]})),
        chat("part without text", "messages[0].content[0].text", **said({"role": "user", "content": [{"type": "text"}]})),
        chat("tool calls", "messages[1].tool_calls", **said(user, {"role": "assistant", "content": None, "tool_calls": "x"})),
        chat("prompt", prompt="a field of the other endpoint"),
        completion("prompt", prompt=[]),
        completion("prompt", prompt=None),
        completion("prompt", prompt=5),
        completion("prompt", prompt=[[]]),
        completion("prompt", prompt=["hi", 5]),
        completion("prompt", "prompt[0]", prompt=[True]),
        completion("prompt", prompt=[-1]),
        completion("prompt", prompt=[10**9]),
        completion("prompt", prompt=[10**30]),
        completion("prompt", "prompt[1]", prompt=[[1], [10**9]]),
        completion("prompt", prompt=["x"] * 3000),
        completion("prompt too long", "prompt", prompt="word " * 200_000),
        completion("prompt too long in ids", "prompt", prompt=[1] * 1_000_000),
        chat("messages too long", "messages", **said({"role": "user", "content": "word " * 200_000})),
        # ---- lengths
        chat("max_tokens", max_tokens=0),
        chat("max_tokens", max_tokens=-1),
        chat("max_tokens", max_tokens=1.5),
        chat("max_tokens", max_tokens="4"),
        chat("max_tokens", max_tokens=10**7),
        chat("max_tokens", max_tokens=10**30),
        completion("max_tokens", max_tokens=0),
        chat("max_completion_tokens", max_tokens=4, max_completion_tokens=5),
        chat("max_completion_tokens", max_tokens=None, max_completion_tokens=10**9),
        chat("min_tokens", min_tokens=5),
        chat("min_tokens", min_tokens=-1),
        chat("min_tokens", max_tokens=None, min_tokens=10**9),
        # ---- sampling
        chat("n", n=0),
        chat("n", n=129),
        chat("n", n=10**30),
        chat("n", n="two"),
        chat("n", n=True),
        chat("temperature", temperature=-0.1),
        chat("temperature", temperature=101),
        chat("temperature", temperature="hot"),
        chat("top_p", top_p=0),
        chat("top_p", top_p=1.1),
        chat("top_k", top_k=-2),
        chat("top_k", top_k=0.5),
        chat("min_p", min_p=-0.5),
        chat("min_p", min_p=2),
        chat("seed", seed="lucky"),
        chat("seed", seed=2**63),
        chat("stop", stop=5),
        chat("stop", stop=""),
        chat("stop", stop=["a", ""]),
        chat("stop", "stop[0]", stop=[5]),
        chat("stop", stop=["x"] * 17),
        chat("stop_token_ids", stop_token_ids=5),
        chat("stop_token_ids", stop_token_ids=[10**9]),
        chat("stop_token_ids", stop_token_ids=[-1]),
        chat("ignore_eos", ignore_eos="yes"),
        chat("presence_penalty", presence_penalty=2.1),
        chat("frequency_penalty", frequency_penalty=-2.1),
        chat("repetition_penalty", repetition_penalty=0),
        chat("logit_bias", logit_bias={"hello": 1}),
        chat("logit_bias", logit_bias={"999999999": 1}),
        chat("logit_bias", logit_bias={"5": 101}),
        chat("logit_bias", logit_bias=[1]),
        chat("logprobs", logprobs=3),
        chat("top_logprobs", logprobs=True, top_logprobs=21),
        chat("top_logprobs", top_logprobs=2),
        completion("logprobs", logprobs=-1),
        completion("logprobs", logprobs=21),
        completion("logprobs", logprobs=True),
        chat("priority", priority=2**40),
        chat("skip_special_tokens", skip_special_tokens=1),
        # ---- streaming, templates, echo
        chat("stream", stream="yes"),
        chat("stream_options", stream_options={"include_usage": True}),
        chat("stream_options", "stream_options.usage", stream=True, stream_options={"usage": True}),
        chat("echo", echo=True),
        completion("echo", echo="yes"),
        completion("best_of", best_of=3),
        chat("chat_template_kwargs", chat_template_kwargs="x"),
        chat("template kwargs", "chat_template_kwargs.messages", chat_template_kwargs={"messages": []}),
        chat("continue_final_message", add_generation_prompt=True, continue_final_message=True),
        # ---- documented, and not done yet
        chat("tools", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        chat("tool_choice", tool_choice="required"),
        chat("functions", functions=[{"name": "f"}]),
        chat("response_format", response_format={"type": "json_object"}),
        chat("modalities", modalities=["text", "audio"]),
        chat("audio", audio={"voice": "alloy", "format": "wav"}),
        chat("store", store=True),
        chat("service_tier", service_tier="flex"),
        chat("reasoning_effort", reasoning_effort="high"),
        chat("prediction", prediction={"type": "content", "content": "x"}),
        completion("suffix", suffix="and so on"),
        # ---- no such field
        chat("temprature", temprature=1),
        chat("guided_json", guided_json={}),
        completion("x" * 100_000, "x" * 2000, **{"x" * 100_000: 1}),
        # ---- tokens
        Case("tokenize nothing", TOKENIZE, b'{"model": "MODEL"}', "prompt"),
        Case(
            "tokenize both",
            TOKENIZE,
            b'{"model": "MODEL", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}',
            "prompt",
        ),
        Case("tokenize a number", TOKENIZE, b'{"model": "MODEL", "prompt": 5}', "prompt"),
        Case("tokenize elsewhere", TOKENIZE, b'{"model": "nobody", "prompt": "a"}', "model", 404),
        Case("detokenize nothing", DETOKENIZE, b'{"model": "MODEL"}', "tokens"),
        Case("detokenize text", DETOKENIZE, b'{"model": "MODEL", "tokens": "hi"}', "tokens"),
        Case("detokenize too high", DETOKENIZE, b'{"model": "MODEL", "tokens": [1000000000]}', "tokens"),
        # ---- roles
        Case("role that isn't one", "/v1/admin/te/0/role", b'{"role": "king"}', "role"),
        Case("role of nothing", "/v1/admin/te/0/role", b"{}", "role"),
        Case("role of nobody", "/v1/admin/te/999/role", b'{"role": "prefill"}', "id"),
        Case("role of no number", "/v1/admin/te/one/role", b'{"role": "prefill"}', "id"),
    ]


async def send(session: aiohttp.ClientSession, url: str, model: str, case: Case) -> list[str]:
    """What is wrong with the server's answer to `case`."""
    body = case.body.replace(b"MODEL", model.encode())
    async with session.request(case.method, url + case.path, data=io.BytesIO(body), headers=case.headers) as response:
        text = await response.read()
        wrong = [] if response.status == case.status else [f"status {response.status}"]
        if "X-Request-Id" not in response.headers:
            wrong.append("no X-Request-Id")
    try:
        error = orjson.loads(text)["error"]
        if error.keys() != {"message", "type", "param", "code"} or not error["message"]:
            wrong.append(f"error object {error}")
        if error["param"] != case.param and not (case.param is None and case.name.startswith("raw deep")):
            wrong.append(
                f"param {error['param'][:80] if error['param'] else None!r}, not {case.param!r}: {error['message'][:200]}"
            )
    except (ValueError, KeyError, TypeError):
        wrong.append(f"no error object: {text[:200]!r}")
    return [f"{case.name}: {w}" for w in wrong]


async def misbehave(url: str) -> list[str]:
    """Send every case to the server at `url`, with a good request after each ten; returns what was answered wrongly."""
    wrong = []
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async with session.get(url + "/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        good = {"model": model, "prompt": "hi", "max_tokens": 1}
        for i, case in enumerate(cases()):
            wrong += await send(session, url, model, case)
            if i % 10 == 9:
                async with session.post(url + COMPLETION, json=good) as response:
                    if response.status != 200:
                        wrong.append(f"after {case.name}: a good request got {response.status}")
    return wrong


def test_there_are_many_cases() -> None:
    assert len(cases()) >= 60


def test_every_malformed_request_is_refused_by_name() -> None:
    async def run() -> None:
        service = FakeService()
        listener = await listen(build(service), "127.0.0.1", 0)
        try:
            assert await misbehave(listener.url) == []
        finally:
            await listener.close()
        assert not service.live
        assert all(s.params.max_tokens == 1 for s in service.submissions), "a malformed request was submitted"

    asyncio.run(run())


def test_values_that_change_nothing_are_accepted() -> None:
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "store": False,
        "service_tier": "auto",
        "tools": [],
        "tool_choice": "none",
        "functions": [],
        "parallel_tool_calls": False,
        "response_format": {"type": "text"},
        "modalities": ["text"],
    }
    nulls = [
        "tools",
        "prediction",
        "reasoning_effort",
        "verbosity",
        "audio",
        "stop",
        "n",
        "temperature",
        "top_p",
        "seed",
        "stream",
    ]
    nulls += ["logit_bias", "logprobs", "top_logprobs", "stream_options", "max_tokens", "store", "response_format", "top_k"]

    async def run() -> None:
        listener = await listen(build(FakeService()), "127.0.0.1", 0)
        base = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        bodies = [{**base, name: value} for name, value in harmless.items()]
        bodies += [{**base, name: None} for name in nulls]
        bodies += [{**base, **harmless}]
        try:
            async with aiohttp.ClientSession() as session:
                for body in bodies:
                    async with session.post(listener.url + CHAT, json=body) as response:
                        assert response.status == 200, (body, await response.text())
        finally:
            await listener.close()

    asyncio.run(run())
