"""Many models on one server, TEs that come and go: over HTTP, with real processes."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request

import pytest

from tests import tiny
from tests.server import Server, alive, family, wait_until

NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [tiny.make(folder / name, seed=i) for i, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def server(models):
    """Three models; one of them up at the start."""
    with Server(*models, "--max-model-len", "256", "--kv-cache-memory-bytes", "4M", "--max-te", "4") as running:
        yield running.ready()


def ask(server: Server, model: str, prompt: str = "once upon", **more) -> tuple[int, dict]:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True} | more
    return server.post("/v1/completions", body)


def text(server: Server, model: str, prompt: str = "once upon") -> str:
    status, reply = ask(server, model, prompt)
    assert status == 200, reply
    return reply["choices"][0]["text"]


def states(server: Server) -> dict[str, str]:
    return {card["id"]: card["state"] for card in server.get("/v1/models")[1]["data"]}


def scale(server: Server) -> dict:
    return server.get("/v1/admin/scale")[1]


def climbs(server: Server, model: str) -> list[dict]:
    return [climb for climb in scale(server)["climbs"] if climb["model"] == model]


def test_a_model_comes_up_when_it_is_asked_for(server):
    assert states(server) == {"one": "ready", "two": "off", "three": "off"}
    first = text(server, "two")
    assert states(server)["two"] == "ready" and states(server)["three"] == "off"
    assert text(server, "two") == first != text(server, "one")
    (climb,) = climbs(server, "two")
    assert climb["path"] == "disk" and set(climb["steps"]) == {
        "scaler_pre",
        "te_pre_load",
        "te_load",
        "te_post_load",
        "scaler_post",
    }
    status, refused = ask(server, "four")
    assert status == 404 and "four" in refused["error"]["message"]


def test_more_tes_take_their_weights_from_a_running_one(server):
    before = text(server, "one")
    status, reply = server.post("/v1/admin/scale", {"model": "one", "te": 4})
    assert status == 200 and reply["te"] == 4, reply
    tes = [te for te in server.tes() if te["model"] == "one"]
    assert [te["state"] for te in tes] == ["ready"] * 4 and len({te["pid"] for te in tes}) == 4
    later = climbs(server, "one")[1:]
    assert len(later) == 3 and {climb["path"] for climb in later} == {"fork"} and not any(climb["fell"] for climb in later)
    # The least loaded of idle ones is the lowest number, so that all four answer only if all run at once.
    bodies = [f"text {i} " * 3 for i in range(12)]
    alone = [text(server, "one", body) for body in bodies]
    together: list[str] = [""] * len(bodies)
    threads = [
        threading.Thread(target=lambda i=i: together.__setitem__(i, text(server, "one", bodies[i]))) for i in range(len(bodies))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and text(server, "one") == before
    status, reply = server.post("/v1/admin/scale", {"model": "one", "te": 1})
    assert status == 200 and reply["te"] == 1
    wait_until("three TEs have left", lambda: len([te for te in server.tes() if te["model"] == "one"]) == 1)
    assert text(server, "one") == before


def test_sleeping_frees_what_it_says_and_the_next_request_wakes(server):
    before = text(server, "two")
    pids = [te["pid"] for te in server.tes() if te["model"] == "two"]
    status, slept = server.post("/v1/admin/sleep", {"model": "two", "level": 1})
    assert status == 200 and slept["verified"] and slept["state"] == "asleep", slept
    assert slept["freed"]["private_bytes"] > 1 << 20 and slept["freed"]["kv_bytes"] > 0 and not slept["freed"]["weights_bytes"]
    assert not any(map(alive, pids))
    assert states(server)["two"] == "asleep" and server.get("/health")[0] == 200
    assert text(server, "two") == before
    assert climbs(server, "two")[-1]["path"] == "dram"
    status, slept = server.post("/v1/admin/sleep", {"model": "two", "level": 2})
    assert status == 200 and slept["state"] == "off" and slept["freed"]["weights_bytes"] > 0, slept
    assert text(server, "two") == before
    assert climbs(server, "two")[-1]["path"] == "disk"
    status, woken = server.post("/v1/admin/wake", {"model": "three"})
    assert status == 200 and woken["state"] == "ready" and woken["path"] == "disk"


def test_a_drained_te_ends_and_its_requests_do_not_notice(server):
    server.post("/v1/admin/scale", {"model": "one", "te": 2})
    alone = {i: text(server, "one", f"drain {i}") for i in range(6)}
    ids = [te["id"] for te in server.tes() if te["model"] == "one"]
    got: dict[int, str] = {}

    def run(i: int) -> None:
        got[i] = ask(server, "one", f"drain {i}", max_tokens=120)[1]["choices"][0]["text"]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    status, reply = server.post("/v1/admin/drain", {"te": ids[0]})
    for thread in threads:
        thread.join()
    assert status == 200 and reply["drained"], reply
    assert all(got[i].startswith(alone[i]) for i in got) and len(got) == 6
    assert [te["id"] for te in server.tes() if te["model"] == "one"] == ids[1:]
    assert server.post("/v1/admin/drain", {"te": 77})[0] == 400


def test_a_new_keeper_needs_no_packing_while_a_te_runs(server):
    before = text(server, "one")
    count = len(climbs(server, "one"))
    keeper = server.keeper()
    os.kill(keeper, signal.SIGKILL)
    wait_until("another keeper", lambda: server.keeper() not in (0, keeper))
    running = len([te for te in server.tes() if te["model"] == "one"])
    status, reply = server.post("/v1/admin/scale", {"model": "one", "te": running + 1})
    assert status == 200, reply
    assert [climb["path"] for climb in climbs(server, "one")[count:]] == ["fork"]
    assert text(server, "one") == before


def test_a_held_request_hears_how_its_model_comes_up(server):
    server.post("/v1/admin/sleep", {"model": "three", "level": 2})
    body = {"model": "three", "prompt": "hello", "max_tokens": 4, "stream": True}
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    comments = [line for line in lines if line.startswith(": ")]
    assert any("three" in line for line in comments), lines
    assert lines.index(comments[0]) < next(i for i, line in enumerate(lines) if line.startswith("data: "))
    assert "data: [DONE]" in lines


def test_models_take_turns_in_a_budget_that_holds_two(models):
    with Server(*models, "--max-model-len", "256", "--kv-cache-memory-bytes", "4M", "--memory-budget", "120M") as server:
        server.ready()
        texts = {name: text(server, name) for name in NAMES}
        assert list(states(server).values()).count("ready") == 2 and states(server)["one"] == "asleep"
        failures: list[tuple[int, dict]] = []

        def run(start: int) -> None:
            for i in range(8):
                name = NAMES[(start + i) % 3]
                status, reply = ask(server, name)
                if status != 200 or reply["choices"][0]["text"] != texts[name]:
                    failures.append((status, reply))

        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        memory = scale(server)["memory"]
        assert memory["used_bytes"] <= memory["budget_bytes"]


def test_an_idle_model_sleeps_and_wakes(models):
    with Server(models[0], "--max-model-len", "256", "--kv-cache-memory-bytes", "4M", "--keep-alive", "0.5") as server:
        server.ready()
        before = text(server, "one")
        wait_until("it sleeps", lambda: states(server)["one"] == "asleep")
        wait_until("no TE is left", lambda: not server.tes())
        assert text(server, "one") == before
        assert climbs(server, "one")[-1]["path"] == "dram"
        assert len(family(server.marker)) >= 3


def test_each_role_of_a_disaggregated_model_is_scaled_by_itself(models):
    with Server(models[0], "--max-model-len", "256", "--kv-cache-memory-bytes", "4M", "--pd", "1p1d", "--max-te", "3") as server:
        server.ready()
        before = text(server, "one")
        status, reply = server.post("/v1/admin/scale", {"te": 3, "role": "decode"})
        assert status == 200 and reply["te"] == 3, reply
        assert sorted(te["role"] for te in server.tes()) == ["decode"] * 3 + ["prefill"]
        assert text(server, "one") == before
        first = next(te["id"] for te in server.tes() if te["role"] == "decode")
        assert server.post("/v1/admin/drain", {"te": first})[0] == 200
        assert text(server, "one") == before
        assert sorted(te["role"] for te in server.tes()) == ["decode"] * 2 + ["prefill"]
        status, refused = server.post("/v1/admin/scale", {"te": 500})
        assert status == 400 and "256" in refused["error"]["message"]


def test_more_load_brings_more_tes(models):
    with Server(
        models[0], "--max-model-len", "256", "--kv-cache-memory-bytes", "4M", "--max-te", "3", "--max-num-seqs", "2"
    ) as server:
        server.ready()
        alone = [text(server, "one", f"burst {i}") for i in range(4)]
        got: dict[int, list[str]] = {i: [] for i in range(24)}
        over = threading.Event()

        def run(i: int) -> None:
            while not over.is_set():
                got[i].append(ask(server, "one", f"burst {i % 4}", max_tokens=100)[1]["choices"][0]["text"])

        threads = [threading.Thread(target=run, args=(i,)) for i in got]
        for thread in threads:
            thread.start()
        wait_until("three TEs", lambda: len([te for te in server.tes() if te["state"] == "ready"]) == 3)
        over.set()
        for thread in threads:
            thread.join()
        assert all(t.startswith(alone[i % 4]) for i, texts in got.items() for t in texts)
        shown = scale(server)["models"][0]
        assert shown["te_wanted"] == {"colocated": 3} and shown["reason"]
        metrics = server.get("/metrics")[1]
        assert 'deepserve:scale_decisions_total{direction="up",model_name="one",role="colocated"}' in metrics


def test_counting_tokens_wakes_nothing(server):
    server.post(
        "/v1/admin/sleep", {"model": "two", "level": 2}
    )  # an earlier test has killed the keeper, and with it what was packed
    text(server, "two")
    server.post("/v1/admin/sleep", {"model": "two"})
    assert server.post("/tokenize", {"model": "two", "prompt": "once upon"})[1]["count"] > 0
    assert states(server)["two"] == "asleep"
