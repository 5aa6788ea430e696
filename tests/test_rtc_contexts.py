"""Explicit contexts and retention: the table, and the routes over a scripted service."""

from __future__ import annotations

import asyncio
from array import array
from typing import Any

import pytest

from sched.contexts import LONGEST_TTL, MOST_CONTEXTS, Contexts, UnknownContext
from tests.fake import BOS
from tests.test_gateway import HI, Rig, drive

# ---- the table ------------------------------------------------------------------------------------------------------


def table() -> tuple[Contexts, list[str], list[float]]:
    gone: list[str] = []
    now = [1000.0]
    return Contexts(gone.append, lambda: now[0]), gone, now


def test_a_context_is_its_keys_own():
    contexts, gone, _ = table()
    made = contexts.add("ctx-1", b"A", "m", array("i", [1, 2]), "ab", None, 60.0)
    assert (made.created, made.expires) == (1000.0, 1060.0) and contexts.get("ctx-1", b"A") is made
    for use in (contexts.get, contexts.delete):
        with pytest.raises(UnknownContext, match="'ctx-1'"):
            use("ctx-1", b"B")
    assert contexts.of(b"B") == [] and contexts.of(b"A") == [made] and gone == []
    assert contexts.delete("ctx-1", b"A") is made and gone == ["ctx-1"] and contexts.of(b"A") == []


def test_its_time_ends():
    contexts, gone, now = table()
    contexts.add("short", b"", "m", array("i", [1]), "", None, 10.0)
    contexts.add("long", b"", "m", array("i", [1]), "", None, 100.0)
    now[0] = 1009.9
    assert [c.id for c in contexts.of(b"")] == ["short", "long"]
    now[0] = 1010.0
    assert [c.id for c in contexts.of(b"")] == ["long"] and gone == ["short"]
    with pytest.raises(UnknownContext):
        contexts.get("short", b"")


def test_a_key_has_so_many():
    contexts, _, now = table()
    for n in range(MOST_CONTEXTS):
        contexts.check_room(b"A")
        contexts.add(f"ctx-{n}", b"A", "m", array("i", [1]), "", None, 10.0)
    with pytest.raises(ValueError, match="delete some"):
        contexts.check_room(b"A")
    contexts.check_room(b"B")
    now[0] += 10.0
    contexts.check_room(b"A")


# ---- the routes -----------------------------------------------------------------------------------------------------


async def call(rig: Rig, method: str, path: str, **headers: str) -> tuple[int, Any]:
    async with rig.http.request(method, rig.url + path, headers={k.replace("_", "-"): v for k, v in headers.items()}) as r:
        return r.status, await r.json()


def test_stored_used_listed_deleted() -> None:
    async def run(rig: Rig) -> None:
        status, made, _ = await rig.post("/v1/contexts", {"prompt": "Once upon", "ttl": 50})
        assert status == 201 and made.pop("id").startswith("ctx-")
        (submission,) = rig.service.submissions
        id = submission.id
        assert made == {
            "object": "context",
            "model": "tiny",
            "tokens": 10,
            "ttl": 50.0,
            "created_at": 1_700_000_000,
            "expires_at": 1_700_000_050,
        }
        assert (submission.context, submission.preserve, submission.retain, submission.params.max_tokens) == (id, True, 50.0, 1)
        assert list(submission.prompts[0]) == [BOS, *b"Once upon"]

        reply = await rig.ai.completions.create(model="tiny", prompt=[" a", " b"], extra_body={"context_id": id})
        used = rig.service.submissions[-1]
        assert [list(p) for p in used.prompts] == [[BOS, *b"Once upon", *end] for end in (b" a", b" b")]
        assert (used.context, used.context_tokens, used.preserve) == (id, 10, False)
        assert reply.usage is not None and reply.usage.prompt_tokens == 24

        assert await call(rig, "GET", "/v1/contexts") == (200, {"object": "list", "data": [{"id": id, **made}]})
        assert await call(rig, "GET", f"/v1/contexts/{id}") == (200, {"id": id, **made})
        assert await call(rig, "DELETE", f"/v1/contexts/{id}") == (200, {"id": id, "object": "context", "deleted": True})
        assert rig.service.forgotten == [id]
        for status, reply in (await call(rig, "GET", f"/v1/contexts/{id}"), await call(rig, "DELETE", f"/v1/contexts/{id}")):
            assert status == 404 and reply["error"]["code"] == "context_not_found"
        status, reply, _ = await rig.post("/v1/completions", {"prompt": "x", "context_id": id})
        assert status == 404 and reply["error"]["param"] == "context_id"

    drive(run)


def test_a_conversation_goes_on() -> None:
    async def run(rig: Rig) -> None:
        rules = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
        status, made, _ = await rig.post("/v1/contexts", {"messages": rules})
        assert status == 201 and made["ttl"] == 3600.0
        stored = list(rig.service.submissions[0].prompts[0])
        assert stored == list(b"[system]Be brief.[user]hello")
        await rig.ai.chat.completions.create(model="tiny", messages=HI, extra_body={"context_id": made["id"]})
        assert list(rig.service.submissions[-1].prompts[0]) == stored + list(b"[user]hi[assistant]")
        status, raw, _ = await rig.post("/v1/contexts", {"prompt": [1, 2, 3]})
        assert status == 201 and raw["tokens"] == 3
        status, reply, _ = await rig.post("/v1/chat/completions", {"messages": HI, "context_id": raw["id"]})
        assert status == 400 and reply["error"]["param"] == "context_id"
        await rig.ai.completions.create(model="tiny", prompt=[7], extra_body={"context_id": raw["id"]})
        assert list(rig.service.submissions[-1].prompts[0]) == [1, 2, 3, 7]

    drive(run)


def test_another_key_sees_nothing_of_it() -> None:
    async def run(rig: Rig) -> None:
        one, two = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}
        status, made, _ = await rig.post("/v1/contexts", {"prompt": "secret"}, **one)
        assert status == 201
        salts = {bytes(s.salt) for s in rig.service.submissions}
        path = f"/v1/contexts/{made['id']}"
        for method in ("GET", "DELETE"):
            status, refused = await call(rig, method, path, **two)
            absent = await call(rig, method, "/v1/contexts/ctx-absent", **two)
            assert status == 404 and absent[0] == 404
            assert refused["error"]["message"].replace(made["id"], "ctx-absent") == absent[1]["error"]["message"]
        assert (await call(rig, "GET", "/v1/contexts", **two))[1]["data"] == []
        status, _, _ = await rig.post("/v1/completions", {"prompt": "x", "context_id": made["id"]}, **two)
        assert status == 404
        assert (await call(rig, "GET", path, **one))[0] == 200
        await rig.post("/v1/contexts", {"prompt": "secret"}, **two)
        assert len({bytes(s.salt) for s in rig.service.submissions} | salts) == 2, "and its blocks have other keys"

    drive(run, api_keys=["one", "two"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": HI}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": "a", "ttl": 0}, "ttl"),
        ({"prompt": "a", "ttl": LONGEST_TTL + 1}, "ttl"),
        ({"prompt": "a" * 256}, "prompt"),
        ({"prompt": "a", "model": "absent"}, "model"),
        ({"prompt": "a", "id": "mine"}, "id"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
    ],
)
def test_what_makes_no_context_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    async def run(rig: Rig) -> None:
        if "prompt" in body and body["prompt"] == "":
            body["add_special_tokens"] = False
        status, reply, _ = await rig.post("/v1/contexts", body)
        assert status in (400, 404) and reply["error"]["param"] == param, reply
        assert rig.service.contexts.of(b"") == [] and not rig.service.submissions

    drive(run)


def test_a_context_that_fails_or_is_cancelled_is_none() -> None:
    async def run(rig: Rig) -> None:
        rig.service.fail_after = 0
        status, _, _ = await rig.post("/v1/contexts", {"prompt": "abc"})
        assert status == 500 and rig.service.contexts.table == {}
        assert rig.service.forgotten == [rig.service.submissions[0].id], "a TE may know of it"
        rig.service.fail_after, rig.service.hold_after = None, 0
        asking = asyncio.create_task(rig.post("/v1/contexts", {"prompt": "abc"}))
        await rig.service.silent.wait()
        asking.cancel()
        rig.service.left.clear()
        await rig.service.left.wait()
        assert rig.service.contexts.table == {} and not rig.service.live

    drive(run)


def test_echo_and_context_do_not_go_together() -> None:
    async def run(rig: Rig) -> None:
        _, made, _ = await rig.post("/v1/contexts", {"prompt": "abc"})
        status, reply, _ = await rig.post("/v1/completions", {"prompt": "x", "echo": True, "context_id": made["id"]})
        assert status == 400 and reply["error"]["param"] == "echo"

    drive(run)


@pytest.mark.parametrize(
    ("more", "seconds"),
    [
        ({}, 0.0),
        ({"cache_ttl": 20}, 20.0),
        ({"session_id": "s"}, 300.0),
        ({"session_id": "s", "cache_ttl": 20}, 300.0),
        ({"session_id": "s", "cache_ttl": 900.5}, 900.5),
    ],
)
def test_retention(more: dict[str, Any], seconds: float) -> None:
    async def run(rig: Rig) -> None:
        for path, body in (("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "x"})):
            status, _, _ = await rig.post(path, {**body, **more})
            assert status == 200 and rig.service.submissions[-1].retain == seconds

    drive(run)


@pytest.mark.parametrize(
    "wrong",
    [{"cache_ttl": 0}, {"cache_ttl": 90000}, {"session_id": ""}, {"session_id": 5}, {"context_id": ""}, {"cache_ttl": "x"}],
)
def test_impossible_retention_is_refused(wrong: dict[str, Any]) -> None:
    async def run(rig: Rig) -> None:
        status, reply, _ = await rig.post("/v1/completions", {"prompt": "x", **wrong})
        assert status == 400 and reply["error"]["param"] == next(iter(wrong))

    drive(run)


def test_usage_tells_the_tiers() -> None:
    async def run(rig: Rig) -> None:
        reply = await rig.ai.completions.create(model="tiny", prompt="abcd")
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        details = reply.usage.prompt_tokens_details.model_dump()
        assert details["cached_tokens"] == 2 == details["cached_tokens_device"]
        assert details["cached_tokens_dram"] == details["cached_tokens_ssd"] == 0

    drive(run)
