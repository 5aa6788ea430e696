"""Processes that die under load: every stream must end with the text it would have had. `bench/soak.py` does the same
for longer."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import openai
import pytest

from tests import tiny
from tests.server import Server, alive, wait_until

STREAMS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    # Large enough that a stream lasts a while: a kill in the middle must find all of them running.
    shape = {
        "num_hidden_layers": 12,
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
    }
    model = tiny.make(tmp_path_factory.mktemp("models") / "tiny", **shape)
    with Server(
        model, "--te", "2", "--max-model-len", "2048", "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", "256M"
    ) as running:
        yield running.ready()


def stream_all(server: Server, tokens: int, on_token=lambda i: None) -> list[str]:
    """16 streams at once; even ones greedy, odd ones sampled with a seed."""
    texts = [""] * STREAMS
    failures: list[BaseException] = []

    def one(i: int) -> None:
        try:
            with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
                # Kept apart from the prefix cache of earlier rounds by nothing: a hit must not change the text either.
                stream = client.completions.create(
                    model="tiny",
                    prompt=f"stream {i} " * 60,
                    max_tokens=tokens,
                    temperature=float(i % 2),
                    seed=i,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                for chunk in stream:
                    texts[i] += chunk.choices[0].text
                    on_token(i)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(STREAMS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures
    return texts


@pytest.fixture(scope="module")
def undisturbed(server):
    return stream_all(server, 300)


def victim(server: Server) -> int:
    """The TE with most to do."""
    return max((t for t in server.tes() if t["state"] == "ready"), key=lambda t: t["load"]["running"] + t["load"]["waiting"])[
        "pid"
    ]


def replays(server: Server) -> float:
    return float(re.search(r"task_replays_total\{.*?\} (\S+)", server.get("/metrics")[1])[1])


@pytest.mark.parametrize("when", ["decode", "decode again", "prefill"])
def test_killed_te_is_replayed(server, undisturbed, when):
    wait_until("all are well", lambda: server.get("/health")[0] == 200)
    seen = [0]
    begun = threading.Event()

    def count(_: int) -> None:
        seen[0] += 1
        if seen[0] > STREAMS * 8:
            begun.set()

    def kill() -> None:
        if when.startswith("decode"):
            begun.wait(60)
        else:
            wait_until("a prefill runs", lambda: any(t["load"]["running"] + t["load"]["waiting"] for t in server.tes()))
        pid = victim(server)
        os.kill(pid, signal.SIGKILL)
        told = time.monotonic()
        wait_until("the death is seen", lambda: server.get("/health")[0] == 503 or all(t["pid"] != pid for t in server.tes()))
        noticed.append(time.monotonic() - told)

    before = replays(server)
    noticed: list[float] = []
    killer = threading.Thread(target=kill)
    killer.start()
    texts = stream_all(server, 300, count)
    killer.join()
    assert texts == undisturbed
    assert noticed
    wait_until("a new TE has come", lambda: server.get("/health")[0] == 200)
    assert replays(server) > before, "nothing was replayed: the kill came too early or too late"


def test_killed_keeper_disturbs_nobody_and_a_new_one_serves_the_next_te(server, undisturbed):
    wait_until("all are well", lambda: server.get("/health")[0] == 200)
    old = server.keeper()
    assert old, "no keeper found"
    pids = {t["pid"] for t in server.tes()}
    killed = threading.Event()

    def kill(_: int) -> None:
        if not killed.is_set():
            killed.set()
            os.kill(old, signal.SIGKILL)

    assert stream_all(server, 300, kill) == undisturbed
    assert {t["pid"] for t in server.tes()} == pids, "no TE may have been restarted"
    wait_until("a new keeper", lambda: server.keeper() not in (0, old))
    os.kill(victim(server), signal.SIGKILL)
    wait_until("the next TE", lambda: len({t["pid"] for t in server.tes()} - pids) == 1 and server.get("/health")[0] == 200)
    assert stream_all(server, 300) == undisturbed


def test_a_stopped_te_makes_health_fail(server):
    wait_until("all are well", lambda: server.get("/health")[0] == 200)
    pid = victim(server)
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until("health fails", lambda: server.get("/health")[0] == 503)
        assert alive(pid)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until("health recovers", lambda: server.get("/health")[0] == 200)


def test_a_stuck_te_is_replaced_and_its_requests_replayed(tmp_path):
    """A process that hangs without dying is killed after --stall-timeout; the stream goes on elsewhere."""
    model = tiny.make(tmp_path / "tiny", max_position_embeddings=4096)
    with Server(model, "--max-model-len", "2048", "--stall-timeout", "1") as server:
        server.ready()
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:

            def text(on_chunk=lambda n: None) -> str:
                ask = {"model": "tiny", "prompt": "abc", "max_tokens": 1500, "temperature": 0, "extra_body": {"ignore_eos": True}}
                found = ""
                for n, chunk in enumerate(client.completions.create(**ask, stream=True)):
                    found += chunk.choices[0].text
                    on_chunk(n)
                return found

            undisturbed = text()
            (before,) = server.tes()
            assert text(lambda n: n == 20 and os.kill(before["pid"], signal.SIGSTOP)) == undisturbed
            assert server.tes()[0]["pid"] != before["pid"] and replays(server) == 1
