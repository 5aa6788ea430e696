"""`bench serve`: load on any OpenAI-compatible server, with the flags, the table and the JSON keys of `vllm bench serve`.

It knows nothing of DeepServe: only the HTTP API. Tokens are counted by the server's own usage, times on this side of the wire.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from engine.types import UserError
from sched.gateway.client import Client, RequestFailed, api_root

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}

# Everyday words, a token each in most vocabularies; how many tokens a prompt really has is asked of the server.
EVERYDAY = (
    "time year people way day man thing woman life child world school state family student group country problem hand part"
    " place case week company system program question work government number night point home water room mother area money"
    " story fact month lot right study book eye job word business issue side kind head house service friend father power hour"
    " game line end member law car city name team minute idea kid body information back parent face level office door health"
    " person art war history party result change morning reason research girl guy moment air teacher force education"
)
WORDS = EVERYDAY.split()

FITTING_ROUNDS = 6  # corrections of a prompt's length; three are enough for every vocabulary tried
WARM_UP = "Say hello."
WARM_UP_TOKENS = 8


class Work(msgspec.Struct):
    """A prompt and how many tokens to ask for."""

    prompt: str
    output_len: int
    input_len: int | None = None  # what was aimed at; the server's usage has the last word


class Outcome(msgspec.Struct):
    """One request as the client saw it. Seconds."""

    start: float
    ok: bool = False
    error: str = ""
    ttft: float = 0.0
    itl: list[float] = []
    latency: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    counted: bool = False  # by the server's usage, not by chunks
    text: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None where there was no second."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


Count = Callable[[str], Awaitable[int]]

# ---- prompts --------------------------------------------------------------------------------------------------------


async def fitted(count: Count, rng: np.random.Generator, head: str, tokens: int) -> str:
    """`head` followed by random words, `tokens` in all as `count` has it, or as near as whole words come."""
    words: list[str] = []
    fixed = await count(head) if head else 0
    used, best, best_error = max(1, tokens - fixed), "", float("inf")
    for _ in range(FITTING_ROUNDS):
        words += map(str, rng.choice(WORDS, max(0, used - len(words))))
        text = " ".join([head, *words[:used]] if head else words[:used])
        found = await count(text)
        if abs(found - tokens) < best_error:
            best, best_error = text, abs(found - tokens)
        better = max(1, round(used * (tokens - fixed) / max(1, found - fixed)))
        if found == tokens or better == used == 1:
            break
        used = better if better != used else max(1, used + (1 if found < tokens else -1))
    return best


async def random_work(args: argparse.Namespace, client: Client, model: str) -> list[Work]:
    """Random prompts of the length asked for: as the server counts it, or in words where it doesn't say."""
    asked = await client.count_tokens(WARM_UP, model) is not None

    async def count(text: str) -> int:
        found = await client.count_tokens(text, model) if asked else None
        return len(text.split()) if found is None else found

    rng = np.random.default_rng(args.seed)
    head = await fitted(count, rng, "", args.random_prefix_len) if args.random_prefix_len else ""
    total = args.random_prefix_len + args.random_input_len
    return [Work(await fitted(count, rng, head, total), args.random_output_len, total) for _ in range(args.num_prompts)]


def custom_work(args: argparse.Namespace) -> list[Work]:
    """Prompts from a JSONL file: {"prompt": "…", "output_tokens": N}, over again where there are too few."""
    if not args.dataset_path:
        raise UserError('--dataset-path is needed with --dataset-name custom: a file of lines such as {"prompt": "…"}')
    work = []
    try:
        lines = Path(args.dataset_path).read_text().splitlines()
    except OSError as e:
        raise UserError(f"--dataset-path {args.dataset_path}: {e.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            work.append(Work(str(row["prompt"]), int(row.get("output_tokens") or args.custom_output_len)))
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f'--dataset-path {args.dataset_path}, line {number}: expected {{"prompt": …}}: {e}') from None
    if not work:
        raise UserError(f"--dataset-path {args.dataset_path}: no prompts in it")
    return [work[i % len(work)] for i in range(args.num_prompts)]


# ---- load -----------------------------------------------------------------------------------------------------------


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """When each request is sent, in seconds from the start: a gamma process, Poisson at burstiness 1."""
    if rate == float("inf"):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), count)
    gaps[0] = 0.0
    return list(map(float, np.cumsum(gaps)))


async def one(client: Client, endpoint: str, model: str, work: Work, params: dict[str, Any]) -> Outcome:
    """Send one request and time what comes back."""
    body = {"messages": [{"role": "user", "content": work.prompt}]} if "chat" in endpoint else {"prompt": work.prompt}
    params = {**params, "max_tokens": work.output_len}
    out = Outcome(time.monotonic())
    last, end, pieces, texts = out.start, out.start, 0, []
    try:
        async for event in client.stream(endpoint, body, model, params):
            if event.text:
                if not pieces:
                    out.ttft = event.at - out.start
                else:
                    out.itl.append(event.at - last)
                last, pieces = event.at, pieces + 1
                texts.append(event.text)
            if event.text or event.finish:
                end = event.at
            if event.usage:
                out.input_tokens = event.usage.get("prompt_tokens") or 0
                out.output_tokens = event.usage.get("completion_tokens") or 0
                out.counted = True
    except RequestFailed as e:
        out.error = str(e)
        return out
    out.text = "".join(texts)
    if not out.counted:
        out.input_tokens, out.output_tokens = work.input_len or 0, pieces
    if not pieces:
        out.error = "no text came back"
        return out
    out.latency = end - out.start
    out.ok = True
    return out


async def load(
    client: Client, args: argparse.Namespace, model: str, work: list[Work], params: dict[str, Any]
) -> tuple[list[Outcome], float]:
    """Send all of `work` as the rate and the concurrency say; the outcomes and the seconds it took."""
    gate: AbstractAsyncContextManager[Any] = asyncio.Semaphore(args.max_concurrency) if args.max_concurrency else nullcontext()
    start = time.monotonic()

    async def send(item: Work, at: float) -> Outcome:
        await asyncio.sleep(max(0.0, start + at - time.monotonic()))
        async with gate:
            return await one(client, args.endpoint, model, item, params)

    times = arrivals(len(work), args.request_rate, args.burstiness, args.seed)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(item, at)) for item, at in zip(work, times, strict=True)]
    return [t.result() for t in tasks], time.monotonic() - start


# ---- figures --------------------------------------------------------------------------------------------------------


def samples(outcomes: list[Outcome], metric: str) -> list[float]:
    """Milliseconds of a metric over the successful requests."""
    good = [o for o in outcomes if o.ok]
    values: list[float] = {
        "ttft": [o.ttft for o in good],
        "tpot": [o.tpot for o in good if o.tpot is not None],
        "itl": [gap for o in good for gap in o.itl],
        "e2el": [o.latency for o in good],
    }[metric]
    return [v * 1000 for v in values]


def meets(outcome: Outcome, goals: dict[str, float]) -> bool:
    """Whether a request kept every goal (milliseconds)."""
    seen = {"ttft": outcome.ttft, "tpot": outcome.tpot or 0.0, "e2el": outcome.latency}
    return outcome.ok and all(seen[name] * 1000 <= goal for name, goal in goals.items())


def peak_concurrency(outcomes: list[Outcome]) -> int:
    edges = sorted((t, step) for o in outcomes if o.ok for t, step in ((o.start, 1), (o.start + o.latency, -1)))
    return int(max(np.cumsum([step for _, step in edges]), default=0))


def word(percentile: float) -> str:
    return f"p{percentile:g}"


def figures(outcomes: list[Outcome], duration: float, args: argparse.Namespace, model: str) -> dict[str, Any]:
    """The result under vLLM's keys."""
    good = [o for o in outcomes if o.ok]
    inputs, outputs = sum(o.input_tokens for o in good), sum(o.output_tokens for o in good)
    result: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if "chat" in args.endpoint else "openai",
        "backend": "openai-chat" if "chat" in args.endpoint else "openai",
        "base_url": api_root(args.base_url),
        "label": None,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(outcomes),
        "request_rate": args.request_rate if args.request_rate < float("inf") else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / duration,
        "request_goodput": sum(meets(o, args.goodput) for o in outcomes) / duration if args.goodput else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_concurrent_requests": peak_concurrency(outcomes),
    }
    for metric in args.percentile_metrics:
        values = samples(outcomes, metric) or [0.0]
        result[f"mean_{metric}_ms"] = float(np.mean(values))
        result[f"median_{metric}_ms"] = float(np.median(values))
        result[f"std_{metric}_ms"] = float(np.std(values))
        for percentile in args.metric_percentiles:
            result[f"{word(percentile)}_{metric}_ms"] = float(np.percentile(values, percentile))
    return result


def detail(outcomes: list[Outcome]) -> dict[str, Any]:
    """A row per request, under vLLM's keys."""
    return {
        "input_lens": [o.input_tokens for o in outcomes],
        "output_lens": [o.output_tokens for o in outcomes],
        "start_times": [o.start for o in outcomes],
        "ttfts": [o.ttft for o in outcomes],
        "itls": [o.itl for o in outcomes],
        "generated_texts": [o.text for o in outcomes],
        "errors": [o.error for o in outcomes],
    }


def table(result: dict[str, Any], args: argparse.Namespace) -> str:
    """The result as vLLM prints it."""
    rows = ["{s:{c}^{n}}".format(s=" Serving Benchmark Result ", n=50, c="=")]

    def row(name: str, value: Any) -> None:
        rows.append(f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}")

    row("Successful requests:", result["completed"])
    row("Failed requests:", result["failed"])
    if args.max_concurrency:
        row("Maximum request concurrency:", args.max_concurrency)
    if args.request_rate < float("inf"):
        row("Request rate configured (RPS):", args.request_rate)
    row("Benchmark duration (s):", result["duration"])
    row("Total input tokens:", result["total_input_tokens"])
    row("Total generated tokens:", result["total_output_tokens"])
    row("Request throughput (req/s):", result["request_throughput"])
    if result["request_goodput"] is not None:
        row("Request goodput (req/s):", result["request_goodput"])
    row("Output token throughput (tok/s):", result["output_throughput"])
    row("Peak concurrent requests:", result["max_concurrent_requests"])
    row("Total token throughput (tok/s):", result["total_token_throughput"])
    for metric in args.percentile_metrics:
        name = metric.upper()
        rows.append("{s:{c}^{n}}".format(s=METRICS[metric], n=50, c="-"))
        row(f"Mean {name} (ms):", result[f"mean_{metric}_ms"])
        row(f"Median {name} (ms):", result[f"median_{metric}_ms"])
        for percentile in args.metric_percentiles:
            row(f"{word(percentile).upper()} {name} (ms):", result[f"{word(percentile)}_{metric}_ms"])
    return "\n".join([*rows, "=" * 50])


# ---- command line ---------------------------------------------------------------------------------------------------


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def metric_list(text: str) -> list[str]:
    names = [n.strip() for n in text.split(",") if n.strip()]
    if unknown := [n for n in names if n not in METRICS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(METRICS)}")
    return names


def percentile_list(text: str) -> list[float]:
    values = [float(p) for p in text.split(",")]
    if not all(0 <= v <= 100 for v in values):
        raise argparse.ArgumentTypeError("percentiles lie between 0 and 100")
    return values


def goal(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    if name not in ("ttft", "tpot", "e2el"):
        raise argparse.ArgumentTypeError(f"{text!r}: write ttft:MS, tpot:MS or e2el:MS")
    return name, positive(value)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="deepserve.py bench serve", description="Measure any OpenAI-compatible server under load.")
    where = p.add_argument_group("server")
    where.add_argument("--base-url", help="such as http://127.0.0.1:8000; instead of --host and --port")
    where.add_argument("--host", default="127.0.0.1")
    where.add_argument("--port", type=int, default=8000)
    where.add_argument("--endpoint", default="/v1/completions", help="or /v1/chat/completions")
    where.add_argument("--model", help="default: the first that the server lists")
    where.add_argument("--api-key", help="sent as Authorization: Bearer")
    where.add_argument(
        "--fresh-connections", action="store_true", help="a connection for each request: some servers drop idle ones"
    )
    what = p.add_argument_group("requests")
    what.add_argument("--dataset-name", choices=["random", "custom"], default="random")
    what.add_argument("--dataset-path", help='JSONL file for custom: {"prompt": "…", "output_tokens": N}')
    what.add_argument("--custom-output-len", type=natural, default=256, help="where a line of the file does not say")
    what.add_argument("--num-prompts", type=natural, default=1000)
    what.add_argument("--random-input-len", type=natural, default=1024)
    what.add_argument("--random-output-len", type=natural, default=128)
    what.add_argument("--random-prefix-len", type=int, default=0, help="tokens that all prompts begin with, besides the input")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--temperature", type=float, default=0.0)
    what.add_argument("--ignore-eos", action="store_true", help="ask for the whole output length (not every server can)")
    load = p.add_argument_group("load")
    load.add_argument("--request-rate", type=positive, default=float("inf"), help="requests a second; inf sends all at once")
    load.add_argument("--burstiness", type=positive, default=1.0, help="1: Poisson; less: burstier; more: more even")
    load.add_argument("--max-concurrency", type=natural)
    out = p.add_argument_group("result")
    out.add_argument("--percentile-metrics", type=metric_list, default=list(METRICS), metavar="NAMES", help="ttft,tpot,itl,e2el")
    out.add_argument("--metric-percentiles", type=percentile_list, default=[50.0, 90.0, 99.0], metavar="LIST", help="50,90,99")
    out.add_argument("--goodput", type=goal, nargs="+", default=[], metavar="NAME:MS", help="ttft:200 tpot:50 e2el:1000")
    out.add_argument("--save-result", action="store_true", help="write the result as JSON")
    out.add_argument("--save-detailed", action="store_true", help="with a row per request in it")
    out.add_argument("--result-dir", default=".")
    out.add_argument("--result-filename", help="default: made of rate, model and time")
    return p


async def run(args: argparse.Namespace) -> int:
    """The whole benchmark; returns the exit status."""
    params: dict[str, Any] = {"temperature": args.temperature} | ({"ignore_eos": True} if args.ignore_eos else {})
    async with Client(args.base_url, args.api_key, fresh=args.fresh_connections) as client:
        try:
            model = args.model or (await client.models())[0]
        except (RequestFailed, IndexError) as e:
            print(f"bench serve: {e}; name the model with --model if the server does not list it", file=sys.stderr)
            return 1
        work = custom_work(args) if args.dataset_name == "custom" else await random_work(args, client, model)
        # One request outside the measurement opens the connection and wakes what a server does lazily.
        first = await one(client, args.endpoint, model, Work(WARM_UP, WARM_UP_TOKENS), params)
        if not first.ok:
            print(f"bench serve: the first request failed: {first.error}", file=sys.stderr)
            return 1
        outcomes, duration = await load(client, args, model, work, params)
    result = figures(outcomes, duration, args, model)
    if result["completed"]:
        print(table(result, args))
    report(outcomes, work)
    if args.save_result:
        save(args, result | (detail(outcomes) if args.save_detailed else {}), model)
    return 0 if result["completed"] else 1


def report(outcomes: list[Outcome], work: list[Work]) -> None:
    """What the reader of the table has to know besides, on stderr."""
    errors: dict[str, int] = {}
    for o in outcomes:
        if not o.ok:
            errors[o.error] = errors.get(o.error, 0) + 1
    for message, times in errors.items():
        print(f"bench serve: {times} request{'s' * (times > 1)} failed: {message}", file=sys.stderr)
    good = [(o, w) for o, w in zip(outcomes, work, strict=True) if o.ok]
    if any(not o.counted for o, _ in good):
        print("bench serve: the server sends no usage; tokens are chunks, and inputs are what was aimed at", file=sys.stderr)
    elif off := [o.input_tokens - w.input_len for o, w in good if w.input_len is not None and o.input_tokens != w.input_len]:
        note = f"{len(off)} of {len(good)} prompts differ from the length asked for, by {min(off):+} to {max(off):+} tokens"
        print(f"bench serve: {note}; the table counts the server's own", file=sys.stderr)


def save(args: argparse.Namespace, result: dict[str, Any], model: str) -> None:
    rate = f"{args.request_rate:g}qps"
    name = args.result_filename or f"{result['backend']}-{rate}-{model.rsplit('/', 1)[-1]}-{result['date']}.json"
    path = Path(args.result_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"result written to {path}")


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    args.base_url = args.base_url or f"http://{args.host}:{args.port}"
    args.goodput = dict(args.goodput)
    try:
        return asyncio.run(run(args))
    except UserError as e:
        print(f"bench serve: {e}", file=sys.stderr)
        return 2
