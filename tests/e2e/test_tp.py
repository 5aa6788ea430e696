"""Tensor parallelism with real processes: a TE of several ranks gives the text that a TE of one gives, and dies as one."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import tiny
from tests.assets import default_model
from tests.server import Server, alive, family, wait_until

SHAPE = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
SETTINGS = ("--max-model-len", "1024", "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", "16M")
STREAMS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny", **SHAPE)


def ask(server: Server, i: int, tokens: int = 60) -> dict:
    """Even ones greedy, odd ones sampled; some with log-probabilities, penalties and several samples."""
    body = {
        "model": server.tes()[0]["model"],
        "prompt": f"stream {i} " * 12,
        "max_tokens": tokens,
        "temperature": float(i % 2),
        "seed": i,
        "ignore_eos": True,
        "n": 1 + i % 3,
        "logprobs": 3 if i % 3 == 0 else None,
        "frequency_penalty": 0.5 if i % 4 == 1 else 0.0,
    }
    status, reply = server.post("/v1/completions", body)
    assert status == 200, reply
    return {"choices": reply["choices"], "usage": reply["usage"]["completion_tokens"]}


def all_of(server: Server, tokens: int = 60) -> list[dict]:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(lambda i: ask(server, i, tokens), range(STREAMS)))


@pytest.fixture(scope="module")
def expected(model) -> list[dict]:
    with Server(model, *SETTINGS) as server:
        return all_of(server.ready())


def ranks(server: Server) -> dict[str, int]:
    """The TE's processes by name."""
    named = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in family(server.marker)}
    return {name: pid for name, pid in named.items() if name.startswith("deepserve-te")}


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_give_the_text_of_one(model, expected, count):
    with Server(model, *SETTINGS, "--tensor-parallel-size", str(count)) as server:
        server.ready()
        assert sorted(ranks(server)) == sorted(["deepserve-te0", *(f"deepserve-te0.{i}" for i in range(1, count))])
        assert all_of(server) == expected
        assert all_of(server) == expected, "with prompts found in the prefix tree"


def test_plain_loop_and_drafts(model, expected):
    settings = ("--no-async-scheduling", "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4}')
    with Server(model, *SETTINGS, *settings, "--tensor-parallel-size", "2") as server:
        assert all_of(server.ready()) == expected


@pytest.mark.parametrize("victim", ["master", "rank"])
def test_a_killed_rank_takes_the_te_with_it_and_its_requests_are_replayed(model, victim):
    with Server(model, *SETTINGS, "--tensor-parallel-size", "2") as server:
        expected = all_of(server.ready(), 400)
        before = ranks(server)
        texts: list[dict] = []
        asking = threading.Thread(target=lambda: texts.extend(all_of(server, 400)))
        asking.start()
        wait_until("streams run", lambda: server.tes()[0]["load"]["running"])
        os.kill(before["deepserve-te0" if victim == "master" else "deepserve-te0.1"], signal.SIGKILL)
        asking.join()
        assert texts == expected
        after = ranks(server)
        assert len(after) == 2 and not set(before.values()) & set(after.values())
        assert not any(alive(pid) for pid in before.values())


def test_a_rank_that_stands_still_is_replaced(model):
    with Server(model, *SETTINGS, "--tensor-parallel-size", "2", "--stall-timeout", "1") as server:
        expected = all_of(server.ready())
        before = ranks(server)
        os.kill(before["deepserve-te0.1"], signal.SIGSTOP)
        assert all_of(server) == expected
        wait_until("the old ranks are gone", lambda: not any(alive(pid) for pid in before.values()))


def test_ranks_live_on_without_the_keeper_and_end_with_the_control_process(model):
    with Server(model, *SETTINGS, "--tensor-parallel-size", "2") as server:
        expected = all_of(server.ready())
        before, keeper = ranks(server), server.keeper()
        os.kill(keeper, signal.SIGKILL)
        wait_until("a new keeper", lambda: server.keeper() not in (0, keeper))
        assert all_of(server) == expected and ranks(server) == before
        os.kill(before["deepserve-te0.1"], signal.SIGKILL)
        assert all_of(server) == expected, "by a TE of the new keeper"
        assert len(ranks(server)) == 2 and not set(ranks(server).values()) & set(before.values())
        server.signal(signal.SIGKILL)
        server.process.wait()
        wait_until("everything has ended", lambda: not family(server.marker), 5.0)


def test_three_ranks_of_the_default_model():
    """9 query heads, 3 KV heads, 4-bit weights."""
    texts = []
    for count in (1, 3):
        settings = ("--max-model-len", "512", "--kv-cache-memory-bytes", "64M", "--tensor-parallel-size", str(count))
        with Server(default_model(), *settings) as server:
            server.ready()
            texts.append([ask(server, i, 24)["choices"] for i in range(3)])
    assert texts[0] == texts[1]


def test_a_number_that_does_not_divide_is_refused_by_name(model):
    for count, said in (("3", "8 query heads and 4 KV heads"), ("8", "4 KV heads")):
        server = Server(model, *SETTINGS, "--tensor-parallel-size", count)
        assert server.process.wait(60) != 0
        server.reader.join(10)
        assert f"--tensor-parallel-size {count}" in server.stderr() and said in server.stderr(), server.stderr()
        assert "use 1 or 2 or 4" in server.stderr()
        server.__exit__()


# ---- prefill and decode apart ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ("--tensor-parallel-size", "2"),
        ("--prefill-tensor-parallel-size", "4"),
        ("--prefill-tensor-parallel-size", "1", "--tensor-parallel-size", "2", "--kv-transfer", "request"),
        ("--prefill-tensor-parallel-size", "2", "--tensor-parallel-size", "4", "--kv-cache-dtype", "int8"),
    ],
    ids=" ".join,
)
def test_keys_and_values_find_their_ranks(model, expected, settings):
    with Server(model, *SETTINGS, "--pd", "1p1d", *settings) as server:
        server.ready()
        if "int8" in settings:
            with Server(model, *SETTINGS, "--kv-cache-dtype", "int8") as other:
                expected = all_of(other.ready())
        assert all_of(server) == expected
        prefill, decode = server.tes()
        assert prefill["load"]["prompt_tokens"] and decode["load"]["steps"] > prefill["load"]["steps"]
        wait_until("no block is in use", lambda: not any(te["load"]["blocks_used"] for te in server.tes()))
