"""Models in tables of a TOML file, as a person sees them: the console, `ps`, vLLM's names, and one scrape for all."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from deepserve import LLM, AsyncLLM, Config, SamplingParams
from tests import tiny
from tests.server import ROOT, Server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    path = tiny.make(folder / "one", seed=1)
    tiny.make(folder / "two", seed=2)
    file = folder / "deepserve.toml"
    file.write_text(
        f"""
        max-model-len = 256
        kv-cache-memory-bytes = "4M"
        [models.small]
        model = "{path}"
        max-te = 2
        [models."{folder / "two"}"]
        max-model-len = 128
        """
    )
    with Server("--config", file) as running:
        yield running.ready()


def ps(server: Server, *flags: str) -> str:
    command = [sys.executable, "deepserve.py", "ps", "--url", server.url, *flags]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_what_is_served(server):
    cards = {card["id"]: card for card in server.get("/v1/models")[1]["data"]}
    assert {name: (card["state"], card["te"]) for name, card in cards.items()} == {"small": ("ready", 1), "two": ("off", 0)}
    assert [cards[name]["max_model_len"] for name in ("small", "two")] == [256, 128]
    assert "also served, and brought up when asked for: two" in server.stderr()
    assert "TE 0 (small) ready after" in server.stderr() and "scaler_pre" in server.stderr()


def test_ps_shows_what_comes_and_goes(server):
    assert server.post("/v1/completions", {"model": "two", "prompt": "a", "max_tokens": 1})[0] == 200
    assert server.post("/v1/admin/scale", {"te": 2})[0] == 200
    models, tes, _ = ps(server).split("\n\n")
    assert [line.split()[:3] for line in models.splitlines()[1:]] == [["small", "ready", "2/2"], ["two", "ready", "1/1"]]
    shown = sorted(" ".join(line.split()[1:5]) for line in tes.splitlines()[1:])
    assert shown == ["small colocated ready disk", "small colocated ready fork", "two colocated ready disk"]
    assert server.post("/sleep?model=two", {})[0] == 200
    assert server.get("/is_sleeping?model=two")[1] == {"is_sleeping": True}
    assert server.get("/is_sleeping")[1] == {"is_sleeping": False}
    assert "asleep" in ps(server)
    assert server.post("/wake_up?model=two", {})[1]["path"] == "dram"


def test_one_scrape_for_all_models(server):
    lines = server.get("/metrics")[1].splitlines()
    families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    for model in ("small", "two"):
        assert f'deepserve:model_state{{model_name="{model}",state="ready"}} 1.0' in lines
        assert any(line.startswith(f'deepserve:num_requests_running{{model_name="{model}"') for line in lines)
        assert any(line.startswith("deepserve:scale_step_seconds_count") and f'model_name="{model}"' in line for line in lines)


def test_an_embedded_model_sleeps(tmp_path):
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    with LLM(tiny.make(tmp_path / "one"), max_model_len=256, kv_cache_memory_bytes=4 << 20) as llm:
        before = llm.generate("abc", greedy)[0].outputs[0].token_ids
        slept = llm.sleep()
        assert slept["state"] == "asleep" and slept["verified"] and slept["freed"]["private_bytes"] > 0
        assert llm.wake_up()["path"] == "dram"
        assert llm.generate("abc", greedy)[0].outputs[0].token_ids == before
        assert llm.sleep(level=2)["state"] == "off"
        assert llm.generate("abc", greedy)[0].outputs[0].token_ids == before


def test_an_embedding_program_names_the_model(tmp_path):
    configs = [
        Config(model=str(tiny.make(tmp_path / name, seed=seed)), max_model_len=256, kv_cache_memory_bytes=4 << 20)
        for seed, name in enumerate(("one", "two"))
    ]

    async def run() -> list[list[int]]:
        async with AsyncLLM(configs=configs) as engine:
            greedy = SamplingParams(max_tokens=8, temperature=0.0)
            return [
                [out async for out in engine.generate("abc", greedy, model=model)][-1].outputs[0].token_ids
                for model in ("", "one", "two")
            ]

    default, one, two = asyncio.run(run())
    assert default == one != two
