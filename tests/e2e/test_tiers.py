"""The DRAM and SSD tiers with real processes: a text is the same wherever its prefix comes from, nothing of another key's is
found or told, and what dies costs time alone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepserve import AsyncLLM, SamplingParams, UserError
from tests import tiny
from tests.assets import default_model

# Wide enough that computing a prompt takes longer than loading it: the rule decides by what it measures.
SHAPE = {
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 1024,
    "max_position_embeddings": 1024,
}
BLOCK = 16 * 8 * 2 * 64 * 2  # bytes: tokens, layers, keys and values, width of the one head, bfloat16
SMALL: dict[str, Any] = {"max_model_len": 512, "kv_cache_memory_bytes": 64 * BLOCK, "max_num_seqs": 4}
STORIES = [f"Story number {n}. " + " ".join(f"word{n * i % 89}" for i in range(36)) for n in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny", **SHAPE)


async def ask(llm: AsyncLLM, prompt: str, **params: Any) -> tuple[list[int], int]:
    """The ids that follow, and how many prompt tokens were cached."""
    kind = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, "temperature": 0.7, "seed": 5, **params})
    *_, last = [output async for output in llm.generate(prompt, kind)]
    return last.outputs[0].token_ids, last.num_cached_tokens


async def ask_all(llm: AsyncLLM, prompts: list[str] = STORIES) -> list[list[int]]:
    return [(await ask(llm, prompt))[0] for prompt in prompts]


async def until(found: Callable[[], bool]) -> None:
    for _ in range(2000):
        if found():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited 20 s in vain")


def load(llm: AsyncLLM, te: int = 0) -> dict[str, Any]:
    return llm.cluster.describe()[te]["load"]


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    async def cold() -> list[list[int]]:
        async with AsyncLLM(model, enable_prefix_caching=False, **SMALL) as llm:
            return await ask_all(llm)

    return asyncio.run(cold())


@pytest.mark.parametrize("tiers", ["dram", "ssd", "both", "dram+async off"])
def test_a_prefix_from_any_tier_gives_the_text_of_a_cold_one(model, expected, tmp_path, tiers):
    settings: dict[str, Any] = {}
    if tiers != "ssd":
        settings["kv_dram_bytes"] = (88 if tiers == "both" else 512) * BLOCK
    if tiers in ("ssd", "both"):
        settings["kv_ssd_dir"] = str(tmp_path)
    if tiers == "dram+async off":
        settings["async_scheduling"] = False

    async def run() -> None:
        async with AsyncLLM(model, **SMALL, **settings) as llm:
            assert await ask_all(llm) == expected, "cold"
            assert await ask_all(llm, [STORIES[-1]]) == expected[-1:], "from the device"
            assert await ask_all(llm, STORIES[::-1]) == expected[::-1]
            assert await ask_all(llm) == expected
            together = await asyncio.gather(*(ask(llm, prompt) for prompt in STORIES))
            assert [ids for ids, _ in together] == expected
            found = load(llm)
            assert found["blocks_torn"] == found["tiers_gone"] == found["blocks_used"] == 0
            assert (found["dram_hits"] > 0) == (tiers != "ssd") and (found["ssd_hits"] > 0) == (tiers in ("ssd", "both"))
            assert found["prefix_hits"] > sum(map(len, STORIES)), "of four times that"

    asyncio.run(run())


def test_files_are_found_after_a_restart_and_torn_ones_are_not(model, expected, tmp_path):
    async def run(torn: int) -> dict[str, Any]:
        async with AsyncLLM(model, **SMALL, kv_dram_bytes=512 * BLOCK, kv_ssd_dir=str(tmp_path)) as llm:
            assert await ask_all(llm) == expected
            found = load(llm)
            assert found["blocks_torn"] == torn
            return found

    assert asyncio.run(run(0))["ssd_hits"] == 0
    files = sorted(tmp_path.iterdir())
    assert files and all(f.suffix == ".kv" for f in files), "written by the TE that left"
    assert asyncio.run(run(0))["ssd_hits"] > 0.3 * sum(map(len, STORIES))
    for n, file in enumerate(files[:6]):
        data = bytearray(file.read_bytes())
        data[n * 40] ^= 255
        file.write_bytes(data)
    (tmp_path / files[6].name).write_bytes(b"not a block")
    (tmp_path / "note.txt").write_text("somebody else's")
    again = asyncio.run(run_any(model, expected, tmp_path))
    assert again["blocks_torn"] > 0 and (tmp_path / "note.txt").exists()
    # Another precision of the cache is another model: its files are neither read nor deleted.
    other = asyncio.run(run_other(model, tmp_path))
    assert other["ssd_hits"] == other["blocks_torn"] == 0


async def run_any(model: Path, expected: list[list[int]], folder: Path) -> dict[str, Any]:
    async with AsyncLLM(model, **SMALL, kv_ssd_dir=str(folder)) as llm:
        assert await ask_all(llm) == expected
        return load(llm)


async def run_other(model: Path, folder: Path) -> dict[str, Any]:
    async with AsyncLLM(model, **SMALL, kv_ssd_dir=str(folder), kv_cache_dtype="int8") as llm:
        await ask_all(llm, STORIES[:2])
        return load(llm)


def test_a_te_reads_what_another_stored_also_one_that_was_killed(model, expected):
    async def run() -> None:
        async with AsyncLLM(model, te=2, **SMALL, kv_dram_bytes=512 * BLOCK) as llm:
            for _ in range(3):
                together = await asyncio.gather(*(ask(llm, prompt) for prompt in STORIES + STORIES))
                assert [ids for ids, _ in together] == expected + expected
            before = [load(llm, te)["dram_hits"] for te in (0, 1)]
            assert all(before)
            dead = llm.cluster.describe()[0]["pid"]
            asking = [asyncio.create_task(ask(llm, prompt, max_tokens=60)) for prompt in STORIES]
            await asyncio.sleep(0.02)
            os.kill(dead, signal.SIGKILL)
            assert [ids[:8] for ids, _ in await asyncio.gather(*asking)] == expected
            await until(
                lambda: llm.cluster.describe()[0]["pid"] != dead and all(te["state"] == "ready" for te in llm.cluster.describe())
            )
            together = await asyncio.gather(*(ask(llm, prompt) for prompt in STORIES + STORIES))
            assert [ids for ids, _ in together] == expected + expected
            assert load(llm, 0)["dram_hits"] > 0, "the new TE finds what the old one stored"

    asyncio.run(run())


def test_when_the_keeper_dies_tes_go_on_without_its_pool(model, expected, caplog):
    async def run() -> None:
        async with AsyncLLM(model, **SMALL, kv_dram_bytes=512 * BLOCK) as llm:
            for _ in range(2):
                assert await ask_all(llm) == expected
            hits = load(llm)["dram_hits"]
            assert hits and llm.cluster is not None and llm.cluster.keeper is not None
            os.kill(llm.cluster.keeper.pid, signal.SIGKILL)
            cluster = llm.cluster
            await until(lambda: cluster.keeper_starts == 2)
            for _ in range(2):
                assert await ask_all(llm) == expected
            found = load(llm)
            assert found["tiers_gone"] == 1 and found["dram_hits"] - hits < 400 and found["dram_bytes"] == 0
            os.kill(llm.cluster.describe()[0]["pid"], signal.SIGKILL)
            for _ in range(2):
                assert await ask_all(llm) == expected
            found = load(llm)
            assert found["tiers_gone"] == 0 and found["dram_hits"] > 0, "a TE of the new keeper has the new one's pool"

    asyncio.run(run())


@pytest.mark.parametrize("pd", ["1p1d", "semi"])
def test_tiers_under_disaggregation(model, expected, pd):
    async def run() -> None:
        async with AsyncLLM(model, pd=pd, **SMALL, kv_dram_bytes=512 * BLOCK) as llm:
            for _ in range(3):
                assert await ask_all(llm) == expected
            assert sum(te["load"]["dram_hits"] for te in llm.cluster.describe()) > 0

    asyncio.run(run())


def test_the_default_model_speaks_the_same_from_every_tier(tmp_path):
    path = default_model()
    stories = [f"{n} " + "The miller's third son got the cat, and was not glad of it. " * 9 for n in range(5)]

    async def run() -> None:
        settings: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 2, "kv_cache_memory_bytes": 23040 * 16 * 34}
        async with AsyncLLM(path, enable_prefix_caching=False, **settings) as llm:
            cold = [(await ask(llm, story, temperature=0.0))[0] for story in stories]
        async with AsyncLLM(path, **settings, kv_dram_bytes=23040 * 16 * 40, kv_ssd_dir=str(tmp_path)) as llm:
            for _ in range(3):
                assert [(await ask(llm, story, temperature=0.0))[0] for story in stories] == cold
            found = load(llm)
            assert found["dram_hits"] and found["ssd_hits"]

    asyncio.run(run())


def test_what_cannot_be_had_is_refused_by_name(model):
    async def refused(**settings: Any) -> UserError:
        with pytest.raises(UserError) as error:
            async with AsyncLLM(model, **{**SMALL, **settings}):
                pass
        return error.value

    for settings, param, text in (
        ({"kv_dram_bytes": "lots"}, None, "4G"),
        ({"kv_dram_bytes": "100"}, "kv_dram_bytes", str(BLOCK)),
        ({"kv_dram_bytes": 1 << 50}, "kv_dram_bytes", "would fit"),
        ({"kv_dram_bytes": 1 << 30, "enable_prefix_caching": False}, "kv_dram_bytes", "prefix"),
        ({"kv_dram_bytes": 1 << 30, "dtype": "float32"}, "kv_dram_bytes", "compiled"),
        ({"kv_ssd_dir": "/proc/nowhere"}, "kv_ssd_dir", "written"),
    ):
        error = asyncio.run(refused(**settings))
        assert error.param == param and text in str(error), error
