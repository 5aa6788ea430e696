"""The gateway's routes that say and change how many TEs there are, and what a held request's stream tells meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import orjson
import pytest

import deepserve
from sched.gateway.ps import picture, span
from sched.stream import Unavailable
from tests.fake import FakeService
from tests.test_gateway import CHAT, HI, Rig, drive


def test_scale_sleep_wake_drain() -> None:
    async def run(rig: Rig) -> None:
        async with rig.http.get(rig.url + "/v1/admin/scale") as response:
            assert (await response.json())["models"][0]["te_wanted"] == {"colocated": 1}
        for path, body in (
            ("scale", {"te": 64}),
            ("scale", {"model": "tiny", "te": 0, "role": "prefill"}),
            ("sleep", {}),
            ("sleep", {"model": "tiny", "level": 2}),
            ("wake", {"model": None}),
            ("drain", {"te": 0}),
        ):
            status, answer, _ = await rig.post(f"/v1/admin/{path}", body)
            assert status == 200 and answer["model"] == "tiny", answer
        assert rig.service.orders == [
            ("", {"te": 64, "role": None}),
            ("tiny", {"te": 0, "role": "prefill"}),
            ("", {"level": 1}),
            ("tiny", {"level": 2}),
            ("", {}),
            ("", {"te": 0}),
        ]
        for path in ("sleep", "wake"):  # the default model's, as curl -X POST sends it
            async with rig.http.post(f"{rig.url}/v1/admin/{path}") as response:
                assert response.status == 200

    drive(run)


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "says"),
    [
        ("scale", {}, 400, "te", "required"),
        ("scale", {"te": 257}, 400, "te", "<= 256"),
        ("scale", {"te": "2"}, 400, "te", "expected"),
        ("scale", {"te": 1, "role": "semi"}, 400, "role", "semi"),
        ("scale", {"te": 1, "roll": "prefill"}, 400, "roll", "no field"),
        ("scale", {"model": "nobody", "te": 1}, 404, "model", "nobody"),
        ("sleep", {"level": 3}, 400, "level", "3"),
        ("wake", {"level": 1}, 400, "level", "no field"),
        ("wake", {"model": "nobody"}, 404, "model", "nobody"),
        ("drain", {}, 400, "te", "required"),
        ("drain", {"te": 7}, 400, "te", "no TE 7"),
    ],
)
def test_impossible_orders_are_refused(path: str, body: Any, status: int, param: str, says: str) -> None:
    async def run(rig: Rig) -> None:
        got, answer, _ = await rig.post(f"/v1/admin/{path}", body)
        assert (got, answer["error"]["param"]) == (status, param) and says in answer["error"]["message"], answer
        assert not rig.service.orders

    drive(run)


def test_vllms_names() -> None:
    async def run(rig: Rig) -> None:
        async def sleeping(query: str = "") -> bool:
            async with rig.http.get(rig.url + "/is_sleeping" + query) as response:
                return (await response.json())["is_sleeping"]

        async def order(path: str) -> tuple[int, Any]:
            async with rig.http.post(rig.url + path) as response:
                return response.status, await response.json()

        assert not await sleeping()
        assert (await order("/sleep?level=2"))[0] == 200 and await sleeping() and await sleeping("?model=tiny")
        assert (await order("/wake_up?model=tiny"))[0] == 200 and not await sleeping()
        assert (await order("/sleep"))[0] == 200 and rig.service.card.state == "asleep"
        assert rig.service.orders == [("", {"level": 2}), ("tiny", {}), ("", {"level": 1})]
        for path, status, param in (
            ("/sleep?level=0", 400, "level"),
            ("/sleep?mode=abort", 400, "mode"),
            ("/wake_up?tags=weights", 400, "tags"),
            ("/wake_up?model=nobody", 404, "model"),
        ):
            got, answer = await order(path)
            assert (got, answer["error"]["param"]) == (status, param), answer

    drive(run)


def test_orders_need_the_key() -> None:
    async def run(rig: Rig) -> None:
        for path in ("/v1/admin/scale", "/v1/admin/sleep", "/v1/admin/wake", "/v1/admin/drain", "/sleep", "/wake_up"):
            assert (await rig.post(path, {}))[0] == 401
        for path in ("/v1/admin/scale", "/is_sleeping"):
            async with rig.http.get(rig.url + path) as response:
                assert response.status == 401

    drive(run, api_keys=["secret"])


def test_a_held_request_tells_how_it_comes_along() -> None:
    async def run(rig: Rig) -> None:
        rig.service.notes = ["tiny: weights from disk, 40 %", "two\n\nlines: data"]
        async with rig.http.post(rig.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            events = (await response.read()).split(b"\n\n")
        assert events[:2] == [b": tiny: weights from disk, 40 %", b": two lines: data"]
        assert all(e.startswith(b"data: ") for e in events[2:-1]) and events[-2] == b"data: [DONE]"
        # What is no stream has no room for comments, and the official client skips them.
        assert (await rig.ai.chat.completions.create(model="tiny", messages=HI)).choices[0].message.content == "Hello, wörld!"
        stream = await rig.ai.chat.completions.create(model="tiny", messages=HI, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "Hello, wörld!"

    drive(run)


def test_too_many_held_requests_are_refused() -> None:
    async def run(rig: Rig) -> None:
        rig.service.refuse = Unavailable("tiny is not up, and 512 requests wait for it", 2.5)
        with pytest.raises(openai.InternalServerError) as caught:
            await rig.ai.chat.completions.create(model="tiny", messages=HI, stream=True)
        assert caught.value.status_code == 503 and caught.value.response.headers["Retry-After"] == "3"

    drive(run)


# ---- ps -------------------------------------------------------------------------------------------------------------


def seen(width: int) -> list[str]:
    """The picture of a fake's state, and of a TE that is on its way."""
    service = FakeService()
    [up] = asyncio.run(service.executors())
    model = "a-model-with-a-rather-long-name-Q4_1"
    coming = up | {"id": 11, "model": model, "state": "loading", "step": "te_load", "path": None, "pid": 0, "private_bytes": 0}
    coming |= {"load": {"running": 0, "waiting": 0, "blocks_used": 0}, "kv_blocks": 0}
    scale = service.scale_state()
    asleep = {"id": model, "state": "asleep", "te_ready": 0, "te_wanted": {}, "idle_s": 7300.0, "reason": "idle for 60 s"}
    scale["models"].append(scale["models"][0] | asleep)
    return picture([up, coming], scale, service.now, width).splitlines()


def test_ps() -> None:
    assert seen(1000) == [
        "MODEL                                 STATE    TE  HELD  WEIGHTS MB  IDLE  WHY",
        "tiny                                  ready   1/1     0          98   7 s",
        "a-model-with-a-rather-long-name-Q4_1  asleep  0/0     0          98   2 h  idle for 60 s",
        "",
        "TE  MODEL                                 ROLE       STATE             WEIGHTS BY   PID  RUN  WAIT  KV %  PRIVATE MB  "
        "WEIGHTS MB  SINCE",
        "0   tiny                                  colocated  ready             fork        4711    3     1    25          31  "
        "        98  2 min",
        "11  a-model-with-a-rather-long-name-Q4_1  colocated  loading: te_load  -              -    0     0     -           -  "
        "        98  2 min",
        "",
        "Models that are up: 140 MB of 1.0 GB. Packed weights of others: 98 MB of 0 MB. Warm processes wanted: 3.",
    ]


def test_ps_in_a_narrow_terminal() -> None:
    lines = seen(100)
    assert max(map(len, lines[:-1])) <= 100 and lines[-3].startswith("11  a-model-…")
    assert seen(10)[6].startswith("11  a-mod…  coloc…  loadi…")  # below some width the terminal breaks lines


def test_spans() -> None:
    assert [span(s) for s in (-3, 0, 119, 120, 7199, 7200, 200_000)] == ["0 s", "0 s", "119 s", "2 min", "120 min", "2 h", "2 d"]


def test_ps_asks_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    async def run(rig: Rig) -> None:
        def ask(*flags: str) -> str:
            assert deepserve.main(["ps", "--url", rig.url, *flags]) == 0
            return capsys.readouterr().out

        assert "tiny" in await asyncio.to_thread(ask)
        found = orjson.loads(await asyncio.to_thread(ask, "--json"))
        assert found["te"][0]["pid"] == 4711 and found["scale"]["object"] == "scale"

    drive(run)
