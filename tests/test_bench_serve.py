"""`bench serve` against the gateway over a scripted service and against servers that are less able."""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from bench import serve
from sched.gateway.app import build, listen
from sched.stream import Overloaded
from tests.fake import FakeService

VLLM_KEYS = {
    "date", "backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency", "duration", "completed",
    "failed", "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput", "output_throughput",
    "total_token_throughput", "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p90_itl_ms",
    "mean_e2el_ms",
}  # fmt: skip


@contextmanager
def serving(app: Callable[[], web.Application]) -> Iterator[str]:
    """The application's URL, served from a loop in a thread: `bench serve` has a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def do(work: Awaitable[Any]) -> Any:
        async def wrapped() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(wrapped(), loop).result(30)

    async def start() -> Any:
        return await listen(app(), "127.0.0.1", 0)

    listener = do(start())
    try:
        yield listener.url
    finally:
        do(listener.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def spare_service() -> FakeService:
    service = FakeService("some words to say, over and over")
    service.card.max_model_len = 4096
    return service


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_random(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = spare_service()
    argv = ["--endpoint", endpoint, "--num-prompts", "5", "--random-input-len", "40", "--random-output-len", "6", "--ignore-eos"]
    argv += ["--random-prefix-len", "30", "--max-concurrency", "2", "--goodput", "ttft:60000", "tpot:60000", "--save-result"]
    argv += ["--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json", "--seed", "3"]
    with serving(lambda: build(service)) as url:
        assert serve.main(["--base-url", url, *argv]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result.keys() >= VLLM_KEYS
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (5, 0, 30)
    assert result["total_input_tokens"] == sum(len(s.prompts[0]) for s in service.submissions[1:])
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert result["generated_texts"] == ["some w"] * 5 and [len(i) for i in result["itls"]] == [5] * 5
    assert result["max_concurrent_requests"] <= 2
    sent = [s.params for s in service.submissions[1:]]
    assert all(p.ignore_eos and p.temperature == 0 and p.max_tokens == 6 for p in sent)
    prompts = [bytes(t for t in s.prompts[0] if t < 256) for s in service.submissions[1:]]
    assert len(set(prompts)) == 5
    begin = len(b"[user]") if "chat" in endpoint else 0
    assert len({p[: begin + 25] for p in prompts}) == 1, "all prompts begin with the shared prefix"
    out = capsys.readouterr().out
    assert " Serving Benchmark Result " in out and "P99 TTFT (ms):" in out and "Request goodput (req/s):" in out


def test_prompts_have_the_length_asked_for() -> None:
    async def words(text: str) -> int:
        return len(text.split())

    async def letters(text: str) -> int:
        return len(text)

    async def wordy(text: str) -> int:  # a beginning-of-text token, and long words count twice
        return 1 + sum(1 + (len(w) > 5) for w in text.split())

    async def run() -> None:
        rng = np.random.default_rng(0)
        for tokens in (1, 2, 17, 300):
            assert await words(await serve.fitted(words, rng, "", tokens)) == tokens
        head = await serve.fitted(wordy, rng, "", 50)
        text = await serve.fitted(wordy, rng, head, 200)
        assert text.startswith(head) and abs(await wordy(text) - 200) <= 1
        assert abs(len(await serve.fitted(letters, rng, "", 400)) - 400) <= 10

    asyncio.run(run())


def test_custom_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = spare_service()
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "one", "output_tokens": 2}\n\n{"prompt": "two"}\n')
    argv = ["--dataset-name", "custom", "--dataset-path", str(data), "--num-prompts", "3", "--custom-output-len", "4"]
    with serving(lambda: build(service)) as url:
        assert serve.main(["--base-url", url, *argv]) == 0
    assert [(bytes(list(s.prompts[0])[1:]), s.params.max_tokens) for s in service.submissions[1:]] == [
        (b"one", 2),
        (b"two", 4),
        (b"one", 2),
    ]
    data.write_text('{"promt": "one"}\n')
    with serving(lambda: build(service)) as url:
        assert serve.main(["--base-url", url, *argv]) == 2
    assert "line 1" in capsys.readouterr().err


def test_failures_are_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    service = spare_service()
    service.text = "ok" * 20
    argv = ["--num-prompts", "4", "--random-input-len", "5", "--random-output-len", "12", "--max-concurrency", "1"]
    with serving(lambda: build(service)) as url:
        argv = ["--base-url", url, *argv]
        service.fail_after = 10  # the warm-up asks for fewer
        assert serve.main(argv) == 1
        assert "4 requests failed: 500: the task executor died" in capsys.readouterr().err
        service.refuse = Overloaded("the queue is full", 1)
        assert serve.main(argv) == 1
        assert "first request failed: 429: the queue is full" in capsys.readouterr().err
    assert serve.main([*argv, "--base-url", "http://127.0.0.1:1"]) == 1
    assert "no answer from" in capsys.readouterr().err


def test_a_server_without_usage_and_tokenize(capsys: pytest.CaptureFixture[str]) -> None:
    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "plain"}]})

    async def chat(request: web.Request) -> web.Response:
        asked = await request.json()
        assert asked["messages"][0]["content"] and asked["stream"] and "ignore_eos" not in asked
        chunk = b'data: {"choices": [{"delta": {"content": "x"}}]}\r\n\r\n'
        return web.Response(body=chunk * 3 + b"data: [DONE]\r\n\r\n", content_type="text/event-stream")

    def app() -> web.Application:
        plain = web.Application()
        plain.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", chat)])
        return plain

    argv = ["--endpoint", "/v1/chat/completions", "--num-prompts", "2", "--random-input-len", "9", "--fresh-connections"]
    with serving(app) as url:
        assert serve.main(["--base-url", url, *argv]) == 0
    captured = capsys.readouterr()
    assert "Total generated tokens:                  6" in captured.out
    assert "Total input tokens:                      18" in captured.out and "sends no usage" in captured.err


def test_figures() -> None:
    made = [serve.Outcome(start=0.0, ok=True, ttft=0.1, itl=[0.1, 0.3], latency=0.5, input_tokens=10, output_tokens=3)]
    made += [serve.Outcome(start=0.2, ok=True, ttft=0.3, itl=[], latency=0.3, input_tokens=10, output_tokens=1)]
    made += [serve.Outcome(start=0.2, error="no")]
    args = serve.parser().parse_args(["--goodput", "ttft:200", "tpot:250", "--metric-percentiles", "50,99.9"])
    args.base_url, args.goodput = "http://h:1", dict(args.goodput)
    got = serve.figures(made, 2.0, args, "m")
    assert (got["completed"], got["failed"], got["max_concurrent_requests"]) == (2, 1, 2)
    assert (got["total_input_tokens"], got["total_output_tokens"]) == (20, 4)
    assert (got["request_throughput"], got["output_throughput"], got["total_token_throughput"]) == (1.0, 2.0, 12.0)
    assert got["request_goodput"] == 0.5, "one request kept both goals"
    assert got["mean_ttft_ms"] == pytest.approx(200) and got["p50_itl_ms"] == pytest.approx(200)
    assert got["mean_tpot_ms"] == pytest.approx(200), "a single token has no TPOT"
    assert got["p99.9_e2el_ms"] == pytest.approx(499.8)
    assert got["request_rate"] == "inf"
    assert "P99.9 E2EL (ms):" in serve.table(got, args)


def test_arrivals() -> None:
    assert serve.arrivals(3, float("inf"), 1.0, 0) == [0.0, 0.0, 0.0]
    poisson, even = (np.diff(serve.arrivals(4000, 10.0, b, 1)) for b in (1.0, 100.0))
    assert poisson.mean() == pytest.approx(0.1, rel=0.1) and poisson.std() == pytest.approx(0.1, rel=0.15)
    assert even.mean() == pytest.approx(0.1, rel=0.1) and even.std() < 0.02
    assert serve.arrivals(5, 10.0, 1.0, 1) == serve.arrivals(5, 10.0, 1.0, 1)


@pytest.mark.parametrize(
    "argv", [["--goodput", "itl:5"], ["--percentile-metrics", "x"], ["--request-rate", "0"], ["--num-prompts", "0"]]
)
def test_wrong_flags(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.parser().parse_args(argv)
    assert argv[0] in capsys.readouterr().err
    assert isinstance(serve.parser(), argparse.ArgumentParser)
