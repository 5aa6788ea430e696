"""Prefill and decode on an NPU each, over the stub: collected by the pytest that tests/e2e/test_pd_npu.py starts in the npu
environment, and by no other. In float32, where greedy texts can be compared whatever else is in a batch."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deepserve import AsyncLLM, SamplingParams, UserError
from tests import tiny
from tests.npu.stub import Faults

SMALL: dict[str, Any] = {
    "device": "npu",
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_batched_tokens": 96,
    "max_num_seqs": 4,
}
STORY = "There was a miller who had three sons, his mill, a donkey and a cat. " * 4
PROMPTS = ["abc", STORY + "The sons", STORY + "ground and the donkey", "x" * 140, STORY[:128]]


@pytest.fixture(scope="session")
def path(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=6, max_position_embeddings=1024)


def faults(monkeypatch, **settings: int) -> None:
    """For the processes started from now on."""
    monkeypatch.setenv("ACL_STUB", Faults(**settings).environment())


async def one(llm: AsyncLLM, prompt: str, tokens: int = 10, begun: Callable[[], None] = lambda: None, **params: Any) -> list[int]:
    kind = SamplingParams(**{"max_tokens": tokens, "ignore_eos": True, "temperature": 0.0, **params})
    outputs = []
    async for output in llm.generate(prompt, kind):
        outputs.append(output)
        begun()
    assert outputs[-1].finished
    return outputs[-1].outputs[0].token_ids


def counted(llm: AsyncLLM, stem: str) -> float:
    return llm.families.registry.get_sample_value(f"deepserve:{stem}_total", {"model_name": llm.names[0]}) or 0.0


async def until(found: Callable[[], Any]) -> None:
    for _ in range(15_000):
        if found():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("waited 30 s in vain")


async def let_go(llm: AsyncLLM) -> None:
    """Wait until every TE has said that it holds nothing."""

    def drained() -> bool:
        loads = [te["load"] for te in llm.cluster.describe()]
        return all(load["blocks_used"] == load["running"] == load["waiting"] == 0 for load in loads)

    await until(drained)
    je = llm.deployments[0].listener
    assert not (je.live or je.passages.table or je.moves)


async def texts(llm: AsyncLLM) -> list[list[int]]:
    """What a model says to a mix of requests, of whose prompts some begin alike."""
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 3}]
    found = await asyncio.gather(*(one(llm, prompt, **kind) for prompt in PROMPTS for kind in kinds))
    await let_go(llm)
    return found


@pytest.fixture(scope="session")
def expected(path) -> list[list[int]]:
    """The texts of one TE, on cpu."""

    async def run() -> list[list[int]]:
        async with AsyncLLM(path, **{**SMALL, "device": "cpu"}) as llm:
            return await texts(llm)

    return asyncio.run(run())


def test_two_tes_become_a_pair_and_either_dies(path, expected, monkeypatch):
    """The texts of one TE each; of texts that move while one takes the role of a prefill TE; of the pair, by layer; and of a pair
    whose prefill TE is killed while it computes prompts, whose decode TE while it generates.

    Queued: every stream of the stub runs in a thread of its own, so that a copy that doesn't wait for its layer is seen."""
    faults(monkeypatch, queued=1)
    tokens = 48

    async def run() -> None:
        async with AsyncLLM(path, **SMALL, te=2) as llm:
            assert await texts(llm) == expected
            wanted = await asyncio.gather(*(one(llm, f"{i} " + STORY, tokens) for i in range(4)))
            async with asyncio.TaskGroup() as group:
                said: set[int] = set()
                running = [group.create_task(one(llm, f"{i} " + STORY, tokens, partial(said.add, i))) for i in range(4)]
                await until(lambda: len(said) == 4)  # who has no token yet doesn't move
                assert llm.give_role(0, "prefill")["moving"]
                await until(lambda: not llm.cluster.describe()[0]["load"]["running"])
                llm.give_role(1, "decode")
            assert [t.result() for t in running] == wanted
            assert counted(llm, "task_moves") >= 1
            await let_go(llm)

            computed = [te["load"]["prompt_tokens"] for te in llm.cluster.describe()]
            assert await texts(llm) == expected
            first, second = (te["load"]["prompt_tokens"] - n for te, n in zip(llm.cluster.describe(), computed, strict=True))
            assert first and not second, "the decode TE computed a prompt"

            busy, replays = asyncio.Event(), [0.0]
            for te, fresh in ((0, "first "), (1, "second ")):
                busy.clear()
                async with asyncio.TaskGroup() as group:
                    more = [group.create_task(one(llm, f"{i} " + STORY, tokens, busy.set)) for i in range(4)]
                    others = [group.create_task(one(llm, fresh + f"{i} " + STORY, tokens)) for i in range(2)]
                    await until(lambda: llm.cluster.describe()[0]["load"]["running"]) if te == 0 else await busy.wait()
                    os.kill(llm.cluster.describe()[te]["pid"], signal.SIGKILL)
                assert [t.result() for t in more] == wanted
                assert all(len(t.result()) == tokens for t in others)
                await until(lambda: all(t["state"] == "ready" for t in llm.cluster.describe()))
                replays.append(counted(llm, "task_replays"))
            assert replays[0] < replays[1] < replays[2], "both deaths met running requests"
            assert await texts(llm) == expected, "with nothing cached but what was computed since"

    asyncio.run(run())


def test_a_pair_by_request(path, expected):
    async def run() -> None:
        async with AsyncLLM(path, **SMALL, pd="1p1d", kv_transfer="request") as llm:
            assert await texts(llm) == expected
            assert await texts(llm) == expected, "a prefix hit changed a text"

    asyncio.run(run())


def test_a_runtime_that_exports_nothing(path, monkeypatch):
    """TEs that need no other's blocks serve, and stay what they are. A pair is refused: test_distflow_devices.py."""
    faults(monkeypatch, refuse_export=1)

    async def run() -> None:
        async with AsyncLLM(path, **SMALL, te=2) as llm:
            assert len(await one(llm, "abc")) == 10
            with pytest.raises(UserError, match="no other TE can reach its KV cache"):
                llm.give_role(0, "prefill")

    asyncio.run(run())
