"""The gateway over a scripted service, on a real socket: shapes as the official client reads them, and what raw bytes must be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import openai
import orjson
import pytest

from engine.types import UserError
from sched.gateway import shapes
from sched.gateway.app import Listener, build, listen
from sched.gateway.client import Client, RequestFailed, api_root
from sched.stream import Overloaded, Unavailable
from tests.fake import BOS, EOS, FakeService

HI: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = {"model": "tiny", "messages": HI}


class Rig:
    """A served fake, the official client, and a plain one."""

    def __init__(self, service: FakeService, listener: Listener, ai: openai.AsyncOpenAI, http: aiohttp.ClientSession):
        self.service, self.url, self.port, self.ai, self.http = service, listener.url, listener.port, ai, http

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        async with self.http.post(self.url + path, json=body, headers=named) as response:
            return response.status, orjson.loads(await response.read()), response.headers

    async def raw(self, request: bytes) -> bytes:
        """Everything the server answers to `request` before it closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        try:
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def rigged(service: FakeService, key: str = "unused", **app: Any) -> AsyncIterator[Rig]:
    listener = await listen(build(service, version="1.2.3", **app), "127.0.0.1", 0)
    try:
        async with (
            openai.AsyncOpenAI(base_url=listener.url + "/v1", api_key=key, max_retries=0) as ai,
            aiohttp.ClientSession() as http,
        ):
            yield Rig(service, listener, ai, http)
    finally:
        await listener.close()


def drive(test: Callable[[Rig], Awaitable[None]], text: str = "Hello, wörld!", **app: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), rigged(FakeService(text), **app) as rig:
            await test(rig)

    asyncio.run(run())


# ---- chat, through the official client ------------------------------------------------------------------------------


def test_chat() -> None:
    async def run(rig: Rig) -> None:
        reply = await rig.ai.chat.completions.create(model="tiny", messages=HI)
        assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion" and reply.model == "tiny"
        assert reply.system_fingerprint and reply.system_fingerprint.startswith("fp_")
        [choice] = reply.choices
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
        assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", "Hello, wörld!", None)
        prompt = len("[user]hi[assistant]")
        assert reply.usage and reply.usage.prompt_tokens == prompt
        assert reply.usage.completion_tokens == len("Hello, wörld!".encode()) + 1
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
        assert reply.usage.prompt_tokens_details and reply.usage.prompt_tokens_details.cached_tokens == prompt // 2

    drive(run)


def test_chat_stream() -> None:
    async def run(rig: Rig) -> None:
        stream = await rig.ai.chat.completions.create(model="tiny", messages=HI, stream=True)
        chunks = [chunk async for chunk in stream]
        assert {c.object for c in chunks} == {"chat.completion.chunk"}
        assert len({c.id for c in chunks}) == len({c.created for c in chunks}) == 1
        first, last = chunks[0].choices[0], chunks[-1].choices[0]
        assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
        assert (last.delta.content, last.finish_reason) == (None, "stop")
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello, wörld!"
        # one chunk a character, the role and the finish: the half of ö that came first made none of its own
        assert len(chunks) == len("Hello, wörld!") + 2

    drive(run)


def test_chat_stream_with_usage_and_samples() -> None:
    async def run(rig: Rig) -> None:
        stream = await rig.ai.chat.completions.create(
            model="tiny", messages=HI, stream=True, n=3, max_tokens=5, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices == [] and chunks[-1].usage and chunks[-1].usage.completion_tokens == 15
        assert all(c.usage is None for c in chunks[:-1])
        texts, finished = {0: "", 1: "", 2: ""}, []
        for c in chunks[:-1]:
            [choice] = c.choices
            texts[choice.index] += choice.delta.content or ""
            finished += [choice.index] * (choice.finish_reason == "length")
        assert texts == {0: "Hello", 1: "Hello", 2: "Hello"} and finished == [0, 1, 2]

    drive(run)


@pytest.mark.parametrize("streamed", [False, True])
def test_chat_logprobs(streamed: bool) -> None:
    async def run(rig: Rig) -> None:
        asked: Any = {"model": "tiny", "messages": HI, "logprobs": True, "top_logprobs": 2, "stream": streamed}
        reply = await rig.ai.chat.completions.create(**asked)
        if streamed:
            found = [e for c in [c async for c in reply] if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
        else:
            found = reply.choices[0].logprobs.content
            assert reply.choices[0].logprobs.refusal is None
        assert bytes(b for e in found for b in e.bytes) == "wö<|end|>".encode()
        assert [e.token for e in found] == ["w", r"bytes:\xc3", r"bytes:\xb6", "<|end|>"]
        assert [(t.token, t.logprob) for t in found[0].top_logprobs] == [("w", -0.5), ("x", -9999.0)]

    drive(run, text="wö")


def test_chat_messages_reach_the_template() -> None:
    async def run(rig: Rig) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        botched = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{no json"}}
        messages: list[Any] = [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": None, "tool_calls": [call, botched]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ]
        await rig.ai.chat.completions.create(
            model="tiny", messages=messages, extra_body={"chat_template_kwargs": {"enable_thinking": False}, "top_k": 10**30}
        )
        [sent] = rig.service.submissions
        text = rig.service.card.tokenizer.decode(sent.prompts[0])
        assert text.startswith("[system]be brief[user]one\ntwo[assistant]")
        assert "'arguments': {'a': 1}" in text and "'arguments': '{no json'" in text
        assert text.endswith("[tool]42{enable_thinking=False}[assistant]")
        assert sent.params.max_tokens is None and sent.params.top_k == 258 and sent.kind == "chat"

    drive(run)


def test_final_message_is_continued_without_a_new_turn() -> None:
    async def run(rig: Rig) -> None:
        messages = [*HI, {"role": "assistant", "content": "Sure"}]
        status, _, _ = await rig.post("/v1/chat/completions", {"messages": messages, "continue_final_message": True})
        assert status == 200
        assert rig.service.card.tokenizer.decode(rig.service.submissions[0].prompts[0]) == "[user]hi[assistant]Sure"

    drive(run)


def test_every_sampling_field_arrives() -> None:
    async def run(rig: Rig) -> None:
        fields = {
            "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": 7, "min_tokens": 1, "stop": ["a", "b"],
            "stop_token_ids": [5], "ignore_eos": True, "presence_penalty": 0.5, "frequency_penalty": -0.5, "n": 2,
            "repetition_penalty": 1.1, "skip_special_tokens": False, "include_stop_str_in_output": True,
        }  # fmt: skip
        body = {**CHAT, **fields, "max_completion_tokens": 3, "logit_bias": {"65": -100}, "priority": -2}
        assert (await rig.post("/v1/chat/completions", body))[0] == 200
        [sent] = rig.service.submissions
        assert {name: getattr(sent.params, name) for name in fields} == fields
        assert sent.params.logit_bias == {65: -100} and sent.params.max_tokens == 3 and sent.priority == -2
        assert sent.params.logprobs is None

    drive(run)


# ---- completions ----------------------------------------------------------------------------------------------------


def test_completion() -> None:
    async def run(rig: Rig) -> None:
        reply = await rig.ai.completions.create(model="tiny", prompt="Say:")
        assert reply.id.startswith("cmpl-") and reply.object == "text_completion"
        assert reply.choices[0].text == "Hello, wörld!" and reply.choices[0].finish_reason == "stop"
        assert rig.service.submissions[0].params.max_tokens == 16, "OpenAI's default"
        assert list(rig.service.submissions[0].prompts[0]) == [BOS, *b"Say:"]

    drive(run)


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_completion_prompts(prompt: Any, rows: list[list[int]]) -> None:
    async def run(rig: Rig) -> None:
        reply = await rig.ai.completions.create(model="tiny", prompt=prompt, n=2, max_tokens=5, echo=True)
        assert [list(p) for p in rig.service.submissions[0].prompts] == rows
        assert [c.index for c in reply.choices] == list(range(2 * len(rows)))
        given = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt[0], str) else None
        texts = given or [rig.service.card.tokenizer.decode(r) for r in rows]
        assert [c.text for c in reply.choices] == [t + "Hello" for t in texts for _ in range(2)]

    drive(run)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_completion_logprobs(streamed: bool, echo: bool) -> None:
    async def run(rig: Rig) -> None:
        asked: Any = {"model": "tiny", "prompt": [[104, 0xC3, 0xB6]], "logprobs": 1, "echo": echo, "stream": streamed}
        reply = await rig.ai.completions.create(**asked)
        choices = [c.choices[0] async for c in reply] if streamed else reply.choices
        text = "".join(c.text for c in choices)
        parts = [c.logprobs for c in choices if c.logprobs]
        tokens, offsets = [t for p in parts for t in p.tokens], [o for p in parts for o in p.text_offset]
        chosen, top = [x for p in parts for x in p.token_logprobs], [x for p in parts for x in p.top_logprobs]
        expect = ["w", "x", "<|end|>"]
        if echo:
            assert text == "höwx" and chosen[0] is None and top[0] is None
            expect = ["h", r"bytes:\xc3", r"bytes:\xb6", *expect]
            assert offsets == [0, 1, 2, 2, 3, 4]
        else:
            assert text == "wx" and offsets == [0, 1, 2]
        assert tokens == expect and chosen[-1] == -0.5 and top[-1] == {"<|end|>": -0.5}

    drive(run, text="wx")


@pytest.mark.parametrize("streamed", [False, True])
def test_echo_alone(streamed: bool) -> None:
    async def run(rig: Rig) -> None:
        asked: Any = {"model": "tiny", "prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 0, "stream": streamed}
        reply = await rig.ai.completions.create(**asked)
        [choice] = [c.choices[0] async for c in reply] if streamed else reply.choices
        assert choice.text == "ab" and choice.finish_reason == "length"
        assert choice.logprobs.tokens == ["<|begin|>", "a", "b"] and choice.logprobs.token_logprobs == [None, -0.5, -0.5]

    drive(run)


def test_a_default_is_cut_to_the_room_and_a_wish_is_not() -> None:
    async def run(rig: Rig) -> None:
        prompt = [97] * 250  # of a context of 256
        await rig.ai.completions.create(model="tiny", prompt=prompt)
        assert rig.service.submissions[0].params.max_tokens == 6
        with pytest.raises(openai.BadRequestError) as e:
            await rig.ai.completions.create(model="tiny", prompt=prompt, max_tokens=7)
        assert e.value.code == "context_length_exceeded" and "256" in e.value.message and "257" in e.value.message
        with pytest.raises(openai.BadRequestError) as e:
            await rig.ai.completions.create(model="tiny", prompt=[97] * 256)
        assert e.value.code == "context_length_exceeded" and e.value.param == "prompt"
        await rig.ai.completions.create(model="tiny", prompt=[97] * 256, max_tokens=0, echo=True)

    drive(run)


# ---- the other routes -----------------------------------------------------------------------------------------------


def test_models() -> None:
    async def run(rig: Rig) -> None:
        [model] = (await rig.ai.models.list()).data
        assert (model.id, model.object, model.owned_by) == ("tiny", "model", "deepserve")
        described = {"root": "models/tiny", "parent": None, "max_model_len": 256}
        assert model.model_extra == described | {"state": "ready", "te": 1}
        rig.service.card.state, rig.service.card.te = "asleep", 0
        assert (await rig.ai.models.retrieve("tiny")).model_extra == described | {"state": "asleep", "te": 0}
        rig.service.card.id = "org/tiny"
        assert (await rig.ai.models.retrieve("org/tiny")).id == "org/tiny"
        with pytest.raises(openai.NotFoundError) as e:
            await rig.ai.models.retrieve("nobody")
        assert e.value.code == "model_not_found"

    drive(run)


def test_tokens_there_and_back() -> None:
    async def run(rig: Rig) -> None:
        status, answer, _ = await rig.post("/tokenize", {"model": "tiny", "prompt": "hö", "return_token_strs": True})
        assert status == 200 and answer["tokens"] == [BOS, *"hö".encode()]
        assert (answer["count"], answer["max_model_len"], answer["token_strs"][0]) == (4, 256, "<|begin|>")
        _, answer, _ = await rig.post("/tokenize", {"prompt": "h", "add_special_tokens": False})
        assert answer["tokens"] == [104] and answer["token_strs"] is None
        _, answer, _ = await rig.post("/tokenize", {"messages": HI})
        assert bytes(answer["tokens"]) == b"[user]hi[assistant]"
        long = "wörd " * 5000  # long enough to be tokenised in a thread
        _, answer, _ = await rig.post("/tokenize", {"prompt": long})
        assert (await rig.post("/detokenize", {"tokens": answer["tokens"]}))[1] == {"prompt": "<|begin|>" + long}

    drive(run)


def test_health_tells_the_services_truth() -> None:
    async def run(rig: Rig) -> None:
        for status, code in (("ok", 200), ("loading", 503), ("degraded", 503), ("draining", 503), ("dead", 503)):
            rig.service.state = {"status": status, "te": 1}
            async with rig.http.get(rig.url + "/health") as response:
                assert response.status == code and await response.json() == {"status": status, "te": 1}

    drive(run)


def test_metrics_version_jobs_executors() -> None:
    async def run(rig: Rig) -> None:
        async with rig.http.get(rig.url + "/metrics") as response:
            assert response.content_type == "text/plain" and b"deepserve:num_requests_running" in await response.read()
        async with rig.http.get(rig.url + "/version") as response:
            assert await response.json() == {"version": "1.2.3"}
        async with rig.http.get(rig.url + "/v1/admin/te") as response:
            assert (await response.json())["data"][0]["role"] == "colocated"
        status, reply, _ = await rig.post("/v1/admin/te/0/role", {"role": "prefill"})
        assert status == 200 and reply == {"id": 0, "object": "task_executor", "role": "prefill", "moving": 0, "draining": 0}
        _, reply, _ = await rig.post("/v1/chat/completions", CHAT, X_Request_Id="mine")
        for id in (reply["id"], "mine"):
            async with rig.http.get(f"{rig.url}/v1/jobs/{id}") as response:
                assert (await response.json())["id"] == reply["id"]

    drive(run)


# ---- request ids and keys -------------------------------------------------------------------------------------------


def test_request_ids() -> None:
    async def run(rig: Rig) -> None:
        _, reply, headers = await rig.post("/v1/chat/completions", CHAT)
        assert headers["X-Request-Id"] == reply["id"] and rig.service.submissions[-1].trace_id == ""
        _, _, headers = await rig.post("/v1/chat/completions", {**CHAT, "stream": False}, X_Request_Id="a b/c~")
        assert headers["X-Request-Id"] == "a b/c~" and rig.service.submissions[-1].trace_id == "a b/c~"
        for insane in ("x" * 129, "ümlaut", "a\tb"):
            _, reply, headers = await rig.post("/v1/chat/completions", CHAT, X_Request_Id=insane)
            assert headers["X-Request-Id"] == reply["id"]
        stream = await rig.ai.chat.completions.with_raw_response.create(model="tiny", messages=HI, stream=True)
        assert stream.request_id and stream.request_id.startswith("chatcmpl-")
        async for _ in stream.parse():
            pass
        async with rig.http.get(rig.url + "/nowhere") as response:
            assert response.headers["X-Request-Id"].startswith("req-")

    drive(run)


def test_api_keys() -> None:
    async def run() -> None:
        service = FakeService()
        async with rigged(service, key="one", api_keys=["one", "twö"]) as rig:
            await rig.ai.models.list()
            for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": "one"}, {"x-api-key": "tw"}):
                status, answer, headers = await rig.post("/v1/chat/completions", CHAT, **wrong)
                assert status == 401 and answer["error"]["code"] == "invalid_api_key", wrong
                assert headers["X-Request-Id"] and headers["WWW-Authenticate"] == "Bearer"
            assert not service.submissions
            for right in ({"Authorization": "bearer one"}, {"x-api-key": "one"}, {"x-api-key": "twö"}):
                assert (await rig.post("/v1/chat/completions", CHAT, **right))[0] == 200
            salts = [s.salt for s in service.submissions]
            assert salts[0] == salts[1] != salts[2], "two keys must not share a prefix cache"
            for path in ("/health", "/metrics", "/version"):
                async with rig.http.get(rig.url + path) as response:
                    assert response.status == 200
            async with rig.http.get(rig.url + "/v1/admin/te") as response:
                assert response.status == 401
            with pytest.raises(openai.AuthenticationError):
                await rig.ai.with_options(api_key="wrong").models.list()

    asyncio.run(run())


# ---- failures -------------------------------------------------------------------------------------------------------


def test_refusals_are_statuses_even_for_streams() -> None:
    async def run(rig: Rig) -> None:
        rig.service.refuse = Overloaded("the queue is full; try again in 3 s", 2.1)
        with pytest.raises(openai.RateLimitError) as limited:
            await rig.ai.chat.completions.create(model="tiny", messages=HI, stream=True)
        assert limited.value.response.headers["Retry-After"] == "3" and limited.value.code == "rate_limit_exceeded"
        rig.service.refuse = Unavailable("draining", 0)
        status, answer, headers = await rig.post("/v1/completions", {"prompt": "x"})
        assert status == 503 and headers["Retry-After"] == "1" and answer["error"]["message"] == "draining"
        rig.service.refuse = UserError("no", "seed")
        with pytest.raises(openai.BadRequestError) as bad:
            await rig.ai.chat.completions.create(model="tiny", messages=HI)
        assert bad.value.param == "seed"
        with pytest.raises(openai.NotFoundError) as unknown:
            await rig.ai.chat.completions.create(model="nobody", messages=HI)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as template:
            await rig.ai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "untemplatable"}])
        assert template.value.param == "messages"

    drive(run)


def test_our_own_fault_is_a_500_with_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    async def run(rig: Rig) -> None:
        rig.service.refuse = ZeroDivisionError("secret")
        status, answer, headers = await rig.post("/v1/chat/completions", CHAT)
        assert status == 500 and headers["X-Request-Id"] in answer["error"]["message"]
        assert "secret" not in answer["error"]["message"] and "secret" in caplog.text

    drive(run)


def test_a_task_that_fails() -> None:
    async def run(rig: Rig) -> None:
        rig.service.fail_after = 3
        with pytest.raises(openai.InternalServerError, match="died three times"):
            await rig.ai.chat.completions.create(model="tiny", messages=HI)
        stream, text = await rig.ai.chat.completions.create(model="tiny", messages=HI, stream=True), ""
        with pytest.raises(openai.APIError, match="died three times"):
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        assert text == "Hel"
        async with rig.http.post(rig.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            body = await response.read()
        assert b"[DONE]" not in body and body.rstrip().split(b"\n\n")[-1].startswith(b'data: {"error":{')
        assert not rig.service.live

    drive(run)


def test_a_fault_in_writing_one_stream_is_that_streams_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> bytes:
        raise ZeroDivisionError("secret")

    async def run(rig: Rig) -> None:
        with monkeypatch.context() as m:
            m.setattr(shapes.Chat, "chunks", broken)
            stream = await rig.ai.chat.completions.create(model="tiny", messages=HI, stream=True)
            with pytest.raises(openai.APIError, match="internal error"):
                await anext(aiter(stream))
        assert not rig.service.live
        assert (await rig.ai.chat.completions.create(model="tiny", messages=HI)).choices[0].message.content

    drive(run)
    assert "secret" in caplog.text


# ---- disconnects, silence, framing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_leaving_frees_everything(streamed: bool) -> None:
    async def run(rig: Rig) -> None:
        rig.service.hold_after = 2
        body = orjson.dumps({**CHAT, "stream": streamed})
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(head + body)
        if streamed:  # the headers come before any token
            await reader.readuntil(b"\r\n\r\n")
        await rig.service.silent.wait()
        assert rig.service.live
        writer.close()
        await writer.wait_closed()
        await rig.service.left.wait()
        assert not rig.service.live and rig.service.steps == 2

    drive(run)


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("sched.gateway.sse.MOST_UNSENT", 1 << 16)

    async def run(rig: Rig) -> None:
        rig.service.card.max_model_len = 10**6
        body = orjson.dumps({**CHAT, "stream": True, "n": 64})
        _, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=1024)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await rig.service.left.wait()
        assert not rig.service.live and rig.service.steps < len(rig.service.text)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    drive(run, text="x" * 20_000)
    assert "does not read" in caplog.text


def test_silent_streams_are_kept_alive() -> None:
    async def run(rig: Rig) -> None:
        rig.service.hold_after = 1
        async with rig.http.post(rig.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            seen = b""
            while seen.count(b": ping\n\n") < 2:
                seen += await response.content.readany()
            rig.service.go.set()
            seen += await response.read()
        assert seen.endswith(b"data: [DONE]\n\n")
        events = [e for e in seen.split(b"\n\n") if e and not e.startswith(b":")]
        assert all(e.startswith(b"data: ") for e in events), "a ping must not fall into an event"

    drive(run, ping_interval=0.02)


def test_stream_headers() -> None:
    async def run(rig: Rig) -> None:
        async with rig.http.post(rig.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert response.headers["Cache-Control"] == "no-cache"
            lines = (await response.read()).split(b"\n\n")
        assert lines[-2:] == [b"data: [DONE]", b""]
        assert (
            b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]' in lines[0]
        )

    drive(run)


@pytest.mark.parametrize(
    ("version", "header"), [(b"1.0", b""), (b"1.1", b"Connection: close\r\n"), (b"1.0", b"Connection: keep-alive\r\n")]
)
def test_streams_to_old_and_to_closing_clients(version: bytes, header: bytes) -> None:
    async def run(rig: Rig) -> None:
        body = orjson.dumps({**CHAT, "stream": True})
        answer = await rig.raw(
            b"POST /v1/chat/completions HTTP/%b\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (version, header, len(body), body)
        )
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert (b"chunked" in head) == (version == b"1.1")
        if version == b"1.1":
            assert rest.endswith(b"\r\n0\r\n\r\n")
        else:
            assert rest.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")

    drive(run)


def test_a_connection_serves_stream_after_stream() -> None:
    async def run(rig: Rig) -> None:
        connector = aiohttp.TCPConnector(limit=1)
        async with aiohttp.ClientSession(connector=connector) as one:
            for streamed in (True, False, True):
                async with one.post(rig.url + "/v1/chat/completions", json={**CHAT, "stream": streamed}) as response:
                    assert response.status == 200 and await response.read()
                    assert response.connection is None  # given back: the framing was whole

    drive(run)


def test_head_and_not_http(caplog: pytest.LogCaptureFixture) -> None:
    async def run(rig: Rig) -> None:
        async with rig.http.head(rig.url + "/health") as response:
            assert response.status == 200 and await response.read() == b""
        assert (await rig.raw(b"\x16\x03\x01 hello?\r\n\r\n")).startswith(b"HTTP/1.0 400")

    drive(run)
    assert "Traceback" not in caplog.text


def test_a_taken_port_names_the_flag() -> None:
    async def run(rig: Rig) -> None:
        with pytest.raises(UserError, match=f"--port {rig.port}") as e:
            await listen(build(FakeService()), "127.0.0.1", rig.port)
        assert e.value.param == "port"
        with pytest.raises(UserError, match="--host"):
            await listen(build(FakeService()), "203.0.113.7", 0)

    drive(run)


# ---- the client -----------------------------------------------------------------------------------------------------


def test_client() -> None:
    async def run(rig: Rig) -> None:
        async with Client(rig.url + "/v1/", "key") as client:
            assert await client.models() == ["tiny"]
            events = [e async for e in client.chat(HI, "tiny", max_tokens=5)]
            assert "".join(e.text for e in events) == "Hello" and [e.finish for e in events if e.finish] == ["length"]
            assert [e.usage["completion_tokens"] for e in events if e.usage] == [5]
            assert [e.at for e in events] == sorted(e.at for e in events)
            assert "".join([e.text async for e in client.complete("x")]) == "Hello, wörld!"
            assert await client.count_tokens("abc") == 4
            with pytest.raises(RequestFailed, match="nobody") as e:
                await anext(client.chat(HI, "nobody"))
            assert e.value.status == 404 and e.value.param == "model"
            rig.service.fail_after = 2
            with pytest.raises(RequestFailed, match="died three times"):
                async for _ in client.chat(HI):
                    pass

    drive(run)


def test_client_that_stops_reading_early_cancels() -> None:
    async def run(rig: Rig) -> None:
        rig.service.hold_after = 3
        async with Client(rig.url) as client:
            events = client.chat(HI)
            assert (await anext(events)).text == ""
            await events.aclose()
            await rig.service.left.wait()
        assert not rig.service.live

    drive(run)


def test_client_says_who_does_not_answer() -> None:
    async def run() -> None:
        async with Client("127.0.0.1:1") as client:
            with pytest.raises(RequestFailed, match=r"no answer from http://127\.0\.0\.1:1"):
                await client.models()

    asyncio.run(run())
    assert api_root("http://h:1/v1/") == api_root("h:1/") == "http://h:1"


# ---- shapes ---------------------------------------------------------------------------------------------------------


def test_partial_characters_stay_apart() -> None:
    assert shapes.token_text(b"ok") == "ok"
    assert shapes.token_text(b"\xe2\x80") == r"bytes:\xe2\x80"
    assert EOS not in range(256)
