"""Inside somebody else's program: its loop, its signals, its standard output."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepserve import LLM, AsyncLLM, SamplingParams, UserError
from engine import capacity
from sched.stream import Unavailable
from tests import tiny
from tests.server import family

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {"max_model_len": 256, "kv_cache_memory_bytes": 32 << 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def children(monkeypatch):
    """Counts the processes that the test's engines have left, however they are related to this one."""
    name = f"embed-{time.monotonic_ns()}"
    monkeypatch.setenv("DEEPSERVE_TEST", name)
    return lambda: family(f"DEEPSERVE_TEST={name}")


def test_llm_generates_and_chats(model, children):
    with LLM(model, **SMALL) as llm:
        assert len(children()) == 2, "the keeper and one TE"
        greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        one, two = llm.generate(["abc", "xyz"], greedy)
        assert one.finished and len(one.outputs[0].token_ids) == 12 and one.outputs[0].finish_reason == "length"
        assert llm.generate(one.prompt_token_ids, greedy)[0].outputs[0].text == one.outputs[0].text != two.outputs[0].text
        (answer,) = llm.chat([{"role": "user", "content": "hi"}], greedy)
        assert answer.outputs[0].token_ids and "<|im_start|>" in (answer.prompt or "")
        several = llm.generate(["q"] * 40, [SamplingParams(max_tokens=3, seed=i, ignore_eos=True, logprobs=1) for i in range(40)])
        assert [len(r.outputs[0].logprobs or []) for r in several] == [3] * 40
        with pytest.raises(UserError, match="temperature"):
            llm.generate("a", SamplingParams(temperature=-1))
        with pytest.raises(UserError, match="512 tokens"):
            llm.generate([[1] * 512], greedy)
        assert llm.generate("abc", greedy)[0].outputs[0].text == one.outputs[0].text
    assert not children()
    llm.close()


@pytest.mark.skipif(not capacity.has_compiled_kernels(), reason="the compiled kernels' option")
def test_keys_and_values_as_integers(model):
    """They take half the memory that bfloat16 takes, and say what it says but for close calls, which a tiny model has many of."""
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    taken, texts = {}, {}
    for kind in ("bfloat16", "int8"):
        with LLM(model, dtype="bfloat16", kv_cache_dtype=kind, max_model_len=256, max_num_seqs=4) as llm:
            assert llm.engine is not None
            taken[kind] = llm.engine.cluster.describe()[0]["memory_bytes"]["kv"]
            texts[kind] = [r.outputs[0].token_ids for r in llm.generate([[i] * 40 for i in range(5, 25)], greedy)]
            assert texts[kind] == [r.outputs[0].token_ids for r in llm.generate([[i] * 40 for i in range(5, 25)], greedy)]
    assert 0.5 < taken["int8"] / taken["bfloat16"] < 0.6
    assert sum(a[0] == b[0] for a, b in zip(texts["bfloat16"], texts["int8"], strict=True)) > 15


def test_async_llm_lives_in_a_host_loop_and_leaves_it_clean(model, children):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}

    async def host():
        before = asyncio.all_tasks()
        fds = len(os.listdir("/proc/self/fd"))
        async with AsyncLLM(model, **SMALL) as engine:
            texts = []
            async for out in engine.generate("abc", SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)):
                texts.append(out.outputs[0].text)
            assert out.finished and len(texts) > 1 and texts == sorted(texts, key=len)
            leaving_early = engine.generate("abc", SamplingParams(max_tokens=200, ignore_eos=True))
            assert not (await anext(leaving_early)).finished
            await leaving_early.aclose()  # cancels
            assert engine.health()["status"] == "ok"
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
        assert len(os.listdir("/proc/self/fd")) == fds, "descriptors leaked"
        with pytest.raises(Unavailable, match="shutting down"):
            await anext(engine.generate("abc"))

    asyncio.run(host())
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    assert not children()


def test_a_model_that_is_not_there_says_so():
    with pytest.raises(UserError, match="no such file"):
        LLM("/nonexistent/model")


def test_nothing_is_printed(model):
    code = f"""
from deepserve import LLM, SamplingParams
with LLM({str(model)!r}, max_model_len=256) as llm:
    assert llm.generate("abc", SamplingParams(max_tokens=4))[0].finished
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
