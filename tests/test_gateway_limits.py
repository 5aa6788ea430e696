"""What a key may take, deadlines and targets, over a scripted service on a real socket."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import orjson
import pytest

from engine.types import UserError
from sched.gateway.app import build
from sched.stream import Overloaded, Unavailable
from sched.tenants import Key, Tenant
from tests.fake import FakeModel, FakeService
from tests.test_gateway import CHAT, HI, Rig, drive, rigged

PROMPT = len("[user]hi[assistant]")  # tokens of HI
ANSWER = len("Hello, wörld!".encode()) + 1


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(secret: str = "secret", **tenant: Any) -> Key:
    return Key(secret.encode(), Tenant(name=secret.title(), **tenant))


async def chat(rig: Rig, secret: str = "secret", **headers: str) -> tuple[int, Any, Any]:
    return await rig.post("/v1/chat/completions", CHAT, Authorization=f"Bearer {secret}", **headers)


# ---- placement ------------------------------------------------------------------------------------------------------


def test_where_a_request_was_put_and_why() -> None:
    async def run(rig: Rig) -> None:
        rig.service.reasons = ["colocated 2: least cost", ""]
        _, _, headers = await chat(rig)
        assert "X-Placement" not in headers
        for stream in (False, True):
            url, asked = rig.url + "/v1/chat/completions", CHAT | {"stream": stream}
            async with rig.http.post(url, json=asked, headers={"X-Explain": "placement"}) as response:
                assert response.headers["X-Placement"] == "colocated 2: least cost | held: no TE takes it yet"
        status, answer, _ = await rig.post("/v1/chat/completions", CHAT, X_Explain="everything")
        assert status == 400 and "send placement" in answer["error"]["message"]

    drive(run)


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_whose_a_request_is() -> None:
    async def run(rig: Rig) -> None:
        assert (await chat(rig))[0] == 200 and (await chat(rig, "plain"))[0] == 200 and (await chat(rig, "none"))[0] == 401
        first, second = rig.service.submissions
        assert first.tenant == Tenant(name="Secret", weight=3.0, priority=-1, slo_ttft_ms=400.0)
        assert (first.slo_ttft_ms, first.slo_tpot_ms, first.deadline, first.reject_late) == (400.0, None, 0.0, False)
        assert second.tenant == Tenant(name="api-key-1") and first.salt != second.salt

    drive(run, api_keys=["plain"], keys=[key(weight=3.0, priority=-1, slo_ttft_ms=400.0)])


def test_keys_that_clash_are_refused_at_the_start() -> None:
    with pytest.raises(UserError, match="it has the key of api-key-1"):
        build(FakeService(), api_keys=["secret"], keys=[key()])


def test_requests_a_minute() -> None:
    clock = Clock()

    async def run(rig: Rig) -> None:
        for left in (1, 0):
            status, _, headers = await chat(rig)
            assert status == 200 and headers["x-ratelimit-limit-requests"] == "2"
            assert headers["x-ratelimit-remaining-requests"] == str(left) and "x-ratelimit-limit-tokens" not in headers
        assert headers["x-ratelimit-reset-requests"] == "1m0s"
        status, answer, headers = await chat(rig)
        assert status == 429 and headers["Retry-After"] == "30" and answer["error"]["code"] == "rate_limit_exceeded"
        assert headers["x-ratelimit-remaining-requests"] == "0" and "2 requests a minute" in answer["error"]["message"]
        with pytest.raises(openai.RateLimitError):
            await rig.ai.with_options(api_key="secret").chat.completions.create(model="tiny", messages=HI, stream=True)
        assert (await chat(rig, "free"))[0] == 200, "other keys have their own"
        assert rig.service.refusals == [("tiny", "rpm")] * 2
        clock.now += 29.5
        assert (await chat(rig))[0] == 429
        clock.now += 0.5
        status, _, headers = await chat(rig)
        assert status == 200 and headers["x-ratelimit-reset-requests"] == "1m0s"

    drive(run, keys=[key(rpm=2), key("free")], clock=clock)


def test_tokens_a_minute_are_those_that_were_used() -> None:
    clock = Clock()

    async def run(rig: Rig) -> None:
        reply = await rig.ai.with_options(api_key="secret").chat.completions.with_raw_response.create(model="tiny", messages=HI)
        expected = 400 - PROMPT - 256
        assert reply.headers["x-ratelimit-remaining-tokens"] == str(400 - PROMPT - ANSWER), "settled before the answer goes out"
        stream = await rig.ai.with_options(api_key="secret").chat.completions.with_raw_response.create(
            model="tiny", messages=HI, stream=True
        )
        assert expected - PROMPT - ANSWER <= int(stream.headers["x-ratelimit-remaining-tokens"]) < expected
        async for _ in stream.parse():
            pass
        _, _, headers = await chat(rig)
        assert headers["x-ratelimit-remaining-tokens"] == str(400 - 3 * (PROMPT + ANSWER))
        body = {"model": "tiny", "prompt": "x" * 200, "max_tokens": 5}
        answers = [await rig.post("/v1/completions", body, Authorization="Bearer secret") for _ in range(2)]
        assert [status for status, _, _ in answers] == [200, 429] and rig.service.refusals == [("tiny", "tpm")]
        clock.now += int(answers[1][2]["Retry-After"])
        assert (await rig.post("/v1/completions", body, Authorization="Bearer secret"))[0] == 200

    drive(run, keys=[key(tpm=400)], clock=clock)


def test_a_prompt_beyond_the_limit_is_not_told_to_wait() -> None:
    async def run(rig: Rig) -> None:
        status, answer, headers = await chat(rig)
        assert status == 413 and answer["error"]["code"] == "tokens_exceed_limit" and "Retry-After" not in headers
        assert rig.service.refusals == [("tiny", "tpm_never")] and not rig.service.submissions

    drive(run, keys=[key(tpm=10)])


def test_what_is_refused_later_costs_nothing() -> None:
    clock = Clock()

    async def run(rig: Rig) -> None:
        for refuse in (Overloaded("full", 3), Unavailable("draining"), UserError("no")):
            rig.service.refuse = refuse
            _, _, headers = await chat(rig)
            assert headers["x-ratelimit-remaining-requests"] == "5" and headers["x-ratelimit-remaining-tokens"] == "900"
        status, _, headers = await rig.post("/v1/chat/completions", {"messages": 3}, Authorization="Bearer secret")
        assert status == 400 and headers["x-ratelimit-remaining-requests"] == "5"

    drive(run, keys=[key(rpm=5, tpm=900)], clock=clock)


def test_a_client_that_leaves_has_used_what_was_made() -> None:
    clock = Clock()

    async def run(rig: Rig) -> None:
        rig.service.hold_after = 3
        body = orjson.dumps({**CHAT, "stream": True})
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: %d\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(head % len(body) + body)
        await rig.service.silent.wait()
        writer.close()
        await rig.service.left.wait()
        rig.service.hold_after = None
        _, _, headers = await chat(rig)
        assert headers["x-ratelimit-remaining-tokens"] == str(900 - PROMPT - 3 - PROMPT - ANSWER)
        assert await reader.read() is not None

    drive(run, keys=[key(tpm=900)], clock=clock)


def test_contexts_count() -> None:
    async def run(rig: Rig) -> None:
        made, _, _ = await rig.post("/v1/contexts", {"prompt": "abc"}, Authorization="Bearer secret")
        again, _, _ = await rig.post("/v1/contexts", {"prompt": "abc"}, Authorization="Bearer secret")
        assert (made, again) == (201, 429)

    drive(run, keys=[key(rpm=1)])


# ---- targets --------------------------------------------------------------------------------------------------------


def test_targets_of_a_request_go_before_its_keys() -> None:
    async def run(rig: Rig) -> None:
        headers = {"x_slo_ttft_ms": "250", "X_SLO_Action": "Reject"}
        assert (await chat(rig, **headers))[0] == 200
        [sent] = rig.service.submissions
        assert (sent.slo_ttft_ms, sent.slo_tpot_ms, sent.reject_late) == (250.0, 40.0, True)
        rig.service.refuse = Overloaded("its first token is predicted in 900 ms", 0.65, "ttft")
        status, answer, headers = await chat(rig, **headers)
        assert status == 429 and answer["error"]["code"] == "slo_unreachable" and headers["Retry-After"] == "1"

    drive(run, keys=[key(slo_ttft_ms=400.0, slo_tpot_ms=40.0)])


@pytest.mark.parametrize(
    "headers",
    [{"X_Request_Timeout": v} for v in ("0", "-1", "nan", "inf", "1e9", "soon", "")]
    + [{"X_SLO_TTFT_MS": "no"}, {"X_SLO_TPOT_MS": "0"}, {"X_SLO_Action": "maybe"}],
)
def test_headers_that_can_not_be_meant(headers: dict[str, str]) -> None:
    async def run(rig: Rig) -> None:
        status, answer, _ = await rig.post("/v1/chat/completions", CHAT, **headers)
        [name] = headers
        assert status == 400 and answer["error"]["param"].lower() == name.lower().replace("_", "-")
        assert not rig.service.submissions

    drive(run)


# ---- deadlines ------------------------------------------------------------------------------------------------------


def test_a_deadline_that_is_kept_changes_nothing() -> None:
    async def run(rig: Rig) -> None:
        status, answer, _ = await rig.post("/v1/chat/completions", CHAT, X_Request_Timeout="50")
        assert status == 200 and answer["choices"][0]["finish_reason"] == "stop"
        [sent] = rig.service.submissions
        assert 0 < sent.deadline < asyncio.get_running_loop().time() + 60

    drive(run)


def test_a_deadline_that_passes_ends_the_request_and_tells_what_there_is() -> None:
    async def run(rig: Rig) -> None:
        rig.service.hold_after = 4
        status, answer, headers = await rig.post("/v1/chat/completions", CHAT, X_Request_Timeout="0.2")
        error = answer["error"]
        assert status == 504 and (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
        assert "0.2 s have passed, and 4 tokens" in error["message"] and headers["x-should-retry"] == "false"
        assert answer["partial"]["choices"][0]["message"]["content"] == "Hell"
        assert answer["partial"]["choices"][0]["finish_reason"] is None
        assert answer["partial"]["usage"]["completion_tokens"] == 4
        assert not rig.service.live
        echo = {"model": "tiny", "prompt": "ab", "echo": True, "logprobs": 0}
        status, answer, _ = await rig.post("/v1/completions", echo, X_Request_Timeout="0.2")
        assert status == 504 and "partial" not in answer

    drive(run)


def test_a_deadline_before_the_first_token() -> None:
    async def run(rig: Rig) -> None:
        rig.service.hold_after = 0
        status, answer, _ = await rig.post("/v1/chat/completions", CHAT, X_Request_Timeout="0.1")
        assert status == 504 and "no token of an answer yet" in answer["error"]["message"] and "partial" not in answer

    drive(run)


def test_a_deadline_within_a_stream_is_its_last_event() -> None:
    async def run(rig: Rig) -> None:
        rig.service.hold_after = 4
        headers = {"X-Request-Timeout": "0.2"}
        stream = await rig.ai.chat.completions.create(model="tiny", messages=HI, stream=True, extra_headers=headers)
        text = ""
        with pytest.raises(openai.APIError, match="4 tokens of the answer were there"):
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        assert text == "Hell" and not rig.service.live

    drive(run)


def test_a_deadline_while_the_model_comes_up() -> None:
    class Slow(FakeService):
        async def model(self, name: str, wake: bool = True) -> FakeModel:
            await asyncio.Event().wait()
            return self.card

    async def run() -> None:
        async with asyncio.timeout(30), rigged(Slow()) as rig:
            status, answer, _ = await rig.post("/v1/chat/completions", CHAT, X_Request_Timeout="0.05")
            assert status == 504 and answer["error"]["code"] == "deadline_exceeded"
            async with rig.http.get(rig.url + "/health") as response:
                assert response.status == 200

    asyncio.run(run())


def test_a_timeout_of_our_own_is_no_deadline() -> None:
    async def run(rig: Rig) -> None:
        rig.service.refuse = TimeoutError("a bug")
        status, answer, _ = await rig.post("/v1/chat/completions", CHAT, X_Request_Timeout="50")
        assert status == 500 and answer["error"]["code"] == "internal_error"

    drive(run)
