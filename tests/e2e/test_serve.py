"""The real server on a tiny model: official client, job view, drain, and what is left after a kill."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import threading
import time
import urllib.request
from pathlib import Path

import openai
import pytest

from tests import test_bad_input, tiny
from tests.server import Server, alive, family, wait_until


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def server(model):
    with Server(model, "--te", "2", "--max-model-len", "512", "--kv-cache-memory-bytes", "64M") as running:
        yield running.ready()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as made:
        yield made


QUESTION = [{"role": "user", "content": "Say something."}]


def test_stream_and_whole_answer_are_the_same(client):
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=40, temperature=0)
    stream = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=40, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 40 or whole.choices[0].finish_reason == "stop"


def test_sampling_with_a_seed_repeats_itself_in_any_company(client):
    def ask(**more):
        return client.completions.create(
            model="tiny", prompt="abc", max_tokens=24, temperature=1.0, seed=11, extra_body={"ignore_eos": True}, **more
        )

    alone = ask().choices[0].text
    texts = [""] * 8

    def crowd(i: int) -> None:
        texts[i] = ask().choices[0].text if i % 2 else ask(logprobs=2).choices[0].text

    threads = [threading.Thread(target=crowd, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert set(texts) == {alone}


def test_n_logprobs_and_echo(client):
    letters = {str(i): 100 for i in range(64, 80)}  # raw log-probabilities don't see the bias, and the text stays ASCII
    ask = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "logit_bias": letters}
    reply = client.completions.create(**ask, n=3, temperature=1.0, logprobs=2, echo=True, seed=3)
    assert len(reply.choices) == 3 and all(c.text.startswith("hello") and len(c.text) == 10 for c in reply.choices)
    lp = reply.choices[0].logprobs
    assert lp.token_logprobs[0] is None and all(x <= 0 for x in lp.token_logprobs[1:])
    assert len(lp.tokens) == len(lp.token_logprobs) == len(lp.text_offset)
    # Scored in one go (echo) and generated one by one, a text must have the same log-probabilities.
    again = client.completions.create(model="tiny", prompt=reply.choices[0].text, max_tokens=0, logprobs=2, echo=True)
    both = list(zip(lp.token_logprobs[1:], again.choices[0].logprobs.token_logprobs[1:], strict=True))
    assert len(both) == 9 and all(abs(a - b) < 1e-3 for a, b in both)


def test_prefix_hits_are_reported(client):
    prompt = "x" * 200
    first = client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    seen = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage.prompt_tokens_details.cached_tokens
        for _ in range(3)
    ]
    assert first.usage.prompt_tokens == 200 and max(seen) == 192


def test_the_job_view(server):
    body = json.dumps({"model": "tiny", "messages": QUESTION, "max_tokens": 3}).encode()
    headers = {"Content-Type": "application/json", "X-Request-Id": "my-request"}
    with urllib.request.urlopen(urllib.request.Request(server.url + "/v1/chat/completions", body, headers)) as reply:
        assert reply.headers["X-Request-Id"] == "my-request"
        answer = json.loads(reply.read())
    for name in (answer["id"], "my-request"):
        status, shown = server.get(f"/v1/jobs/{name}")
        assert status == 200 and shown["state"] == "done"
        (job,) = shown["jobs"]
        (task,) = job["tasks"]
        assert (job["kind"], task["kind"], task["state"], task["te"] in (0, 1)) == ("serving", "unified", "done", True)
        times = [t["at"] for t in task["times"]]
        assert times == sorted(times) and [t["state"] for t in task["times"]] == ["queued", "dispatched", "decode", "done"]
    assert server.get("/v1/jobs/nobody")[0] == 404


def test_executors_health_metrics(server):
    tes = server.tes()
    assert [t["id"] for t in tes] == [0, 1] and all(
        t["state"] == "ready" and alive(t["pid"]) and t["role"] == "colocated" for t in tes
    )
    assert set(tes[0]["scale_steps_s"]) == {"scaler_pre", "te_pre_load", "te_load", "te_post_load", "scaler_post"}
    status, text = server.get("/metrics")
    assert status == 200
    for stem in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_hits_total",
        "num_preemptions_total",
    ):
        assert f'deepserve:{stem}{{model_name="tiny"' in text, stem
    for stem in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
    ):
        assert f"deepserve:{stem}_bucket" in text, stem


def test_bad_input_leaves_the_real_server_serving(server):
    assert asyncio.run(test_bad_input.misbehave(server.url)) == []
    assert server.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2})[0] == 200
    assert server.get("/health")[0] == 200


def test_a_client_that_leaves_frees_everything(server):
    for _ in range(4):
        body = json.dumps({"model": "tiny", "prompt": "z" * 100, "max_tokens": 400, "stream": True, "ignore_eos": True}).encode()
        request = urllib.request.Request(server.url + "/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            reply.readline()
    wait_until("no sequence runs", lambda: all(t["load"]["running"] == t["load"]["blocks_used"] == 0 for t in server.tes()))


def test_sigterm_drains_and_a_full_queue_says_when_to_come_again(model):
    with Server(model, "--max-num-seqs", "2", "--max-num-queued-reqs", "1", "--max-model-len", "4096") as server:
        server.ready()
        got: list[tuple[int, dict]] = []
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2500, "ignore_eos": True, "temperature": 0}
        threads = [threading.Thread(target=lambda: got.append(server.post("/v1/completions", body))) for _ in range(3)]
        for t in threads:
            t.start()
        wait_until(
            "three run",
            lambda: server.get("/metrics")[1].count('generation_tokens_total{model_name="tiny"}') and busy(server) >= 2,
        )
        request = urllib.request.Request(
            server.url + "/v1/completions", json.dumps(body | {"n": 2}).encode(), {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        with refused.value as e:
            assert e.code == 429 and int(e.headers["Retry-After"]) >= 1 and json.loads(e.read())["error"]["message"]
        server.signal(signal.SIGTERM)
        wait_until("draining is told", lambda: server.get("/health")[1]["status"] == "draining")
        assert server.get("/health")[0] == 503
        assert server.post("/v1/completions", body)[0] == 503
        for t in threads:
            t.join()
        assert [status for status, _ in got] == [200] * 3 and all(r["usage"]["completion_tokens"] == 2500 for _, r in got)
        assert server.process.wait(20) == 0


def busy(server: Server) -> int:
    return sum(t["load"]["running"] for t in server.tes())


def test_a_second_signal_does_not_wait(model):
    with Server(model, "--max-model-len", "4096", "--max-num-seqs", "4") as server:
        server.ready()
        body = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "ignore_eos": True}

        def ask() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # it will be cut off
                server.post("/v1/completions", body)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until("it runs", lambda: busy(server))
        server.signal(signal.SIGTERM)
        wait_until("it drains", lambda: "finishing what runs" in server.stderr())
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.process.wait(20) == 1
        assert time.monotonic() - began < 15
        thread.join(10)


def test_killing_the_control_process_leaves_nothing(model):
    before = set(Path("/dev/shm").iterdir())
    with Server(model, "--te", "2", "--max-model-len", "256") as server:
        server.ready()
        assert len(family(server.marker)) == 4  # control, keeper, two TEs
        server.signal(signal.SIGKILL)
        server.process.wait()
        wait_until("everything has ended", lambda: not family(server.marker), 5.0)
    assert set(Path("/dev/shm").iterdir()) <= before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--max-model-len", "99999999"], "--max-model-len"),
        (["--kv-cache-memory-bytes", "9999T"], "would fit"),
        (["--prot", "1"], "--prot"),
        (["--max-num-seqs", "0"], "max-num-seqs"),
        (["--tensor-parallel-size", "3"], "--tensor-parallel-size 3"),
    ],
)
def test_a_wrong_flag_ends_with_a_message_that_names_it(model, args, says):
    server = Server(model, *args)
    assert server.process.wait(60) == 2
    server.reader.join(10)
    assert says in server.stderr() and "Traceback" not in server.stderr()
    server.__exit__()
