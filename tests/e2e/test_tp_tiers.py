"""Ranks with slower tiers, and with a KV cache that two workers share: the text of one rank, whoever wrote what is found."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from deepserve import AsyncLLM
from tests import tiny
from tests.e2e.test_tiers import BLOCK, SHAPE, SMALL, STORIES, ask, ask_all, load, until

# Two heads, and so twice the bytes of a block.
EACH = 2 * BLOCK
SETTINGS: dict[str, Any] = {**SMALL, "kv_cache_memory_bytes": 64 * EACH}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny", **{**SHAPE, "num_key_value_heads": 2})


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    async def cold() -> list[list[int]]:
        async with AsyncLLM(model, enable_prefix_caching=False, **SETTINGS) as llm:
            return await ask_all(llm)

    return asyncio.run(cold())


async def together(llm: AsyncLLM) -> list[list[int]]:
    return [ids for ids, _ in await asyncio.gather(*(ask(llm, prompt) for prompt in STORIES))]


def test_ranks_find_in_dram_what_their_pools_have_lost(model, expected):
    async def run() -> None:
        async with AsyncLLM(model, **SETTINGS, tensor_parallel_size=2, kv_dram_bytes=512 * EACH) as llm:
            assert await ask_all(llm) == expected, "cold"
            assert await ask_all(llm, STORIES[::-1]) == expected[::-1]
            for _ in range(3):
                assert await together(llm) == expected
            found = load(llm)
            assert found["dram_hits"] > sum(map(len, STORIES)) and found["blocks_used"] == found["blocks_torn"] == 0

    asyncio.run(run())


def test_files_are_found_by_any_number_of_ranks(model, expected, tmp_path):
    async def run(ranks: int, **more: Any) -> dict[str, Any]:
        settings = {**SETTINGS, "kv_ssd_dir": str(tmp_path), "tensor_parallel_size": ranks, **more}
        async with AsyncLLM(model, **settings) as llm:
            assert await ask_all(llm) == expected
            return load(llm)

    assert asyncio.run(run(2, kv_dram_bytes=88 * EACH))["ssd_hits"] == 0
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    found = asyncio.run(run(1))
    assert found["ssd_hits"] > 0.3 * sum(map(len, STORIES)) and found["blocks_torn"] == 0
    for file in tmp_path.iterdir():
        file.unlink()
    asyncio.run(run(1))
    common = [name for name in written if (tmp_path / name).exists()]
    assert common and all((tmp_path / name).read_bytes() == written[name] for name in common)
    found = asyncio.run(run(2, async_scheduling=False))
    assert found["ssd_hits"] > 0.3 * sum(map(len, STORIES)) and found["blocks_torn"] == 0


def test_every_rank_goes_on_without_the_keeper(model, expected):
    async def run() -> None:
        async with AsyncLLM(model, **SETTINGS, tensor_parallel_size=2, kv_dram_bytes=512 * EACH) as llm:
            for _ in range(2):
                assert await ask_all(llm) == expected
            assert load(llm)["dram_hits"] and llm.cluster is not None and llm.cluster.keeper is not None
            cluster, pid = llm.cluster, llm.cluster.describe()[0]["pid"]
            asking = asyncio.create_task(together(llm))
            await asyncio.sleep(0)
            os.kill(llm.cluster.keeper.pid, signal.SIGKILL)
            assert await asking == expected
            await until(lambda: cluster.keeper_starts == 2)
            assert await together(llm) == expected
            assert load(llm)["tiers_gone"] == 1 and llm.cluster.describe()[0]["pid"] == pid

    asyncio.run(run())


@pytest.mark.parametrize(
    "settings",
    [
        {"pd": "1p1d", "prefill_tensor_parallel_size": 2, "kv_dram_bytes": 512 * EACH},
        {"pd": "semi", "tensor_parallel_size": 2, "kv_dram_bytes": 512 * EACH, "slo_ttft_ms": 100.0, "slo_tpot_ms": 10.0},
    ],
    ids=["1p1d", "semi, with shares"],
)
def test_ranks_under_disaggregation(model, expected, settings):
    async def run() -> None:
        async with AsyncLLM(model, **SETTINGS, **settings) as llm:
            for _ in range(2):
                assert await ask_all(llm) == expected
            assert await together(llm) == expected
            assert sum(te["load"]["dram_hits"] for te in llm.cluster.describe()) > 0
            if settings["pd"] == "semi":
                os.kill(llm.cluster.describe()[1]["pid"], signal.SIGKILL)
                assert await together(llm) == expected, "by another prefill worker"
            await until(lambda: not any(te["load"]["blocks_used"] for te in llm.cluster.describe()))

    asyncio.run(run())
