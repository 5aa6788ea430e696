"""`python -m bench.cpu`: our CPU backend beside llama.cpp's server and vLLM's, in one run on this machine.

Peers are made once by `bench.peers`. Then, `--rounds` times and each time in another order, every server is started alone, asked
for a first token, loaded with every scenario by the client of `bench serve`, and ended. The result goes into
`bench/results/cpu.json` after each server, so that an interrupted run leaves what it has; figures of servers or scenarios that
this run leaves out stay there, but are never set in a ratio with figures of another run. `--table` prints the file as Markdown.

Client and server share the cores. Memory is the highest sum of proportional set sizes of a server's processes, from its start to
the end of the load with 64 streams. A start to the first token begins with the process, everything it reads in the page cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from bench import cpu_report, kernels, peers, serve
from bench.cpu_report import DECODE, INPUT, OUTPUT, PREFILL, SHARED, Described, Peaks, Report, Round, Run, Shape
from bench.cpu_servers import NAME, SPECS, Server, Spec, settings, version
from deepserve import __version__
from engine import models
from engine.config import Config
from engine.gguf import BLOCKS
from engine.native import cpu
from engine.types import UserError
from engine.weights import open_checkpoint
from sched.gateway.client import Client, RequestFailed

OUT = Path(__file__).parent / "results" / "cpu.json"
START_PATIENCE = 400.0  # seconds; vLLM compiles for 100 of them when it is started for the first time
LOAD_PATIENCE = 400.0
SETTLE, IDLE = 1.0, 5.0  # seconds
PEAK_TRIES = 5
FLAGS_WORTH_NAMING = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
FLAGS_WORTH_NAMING += ("asimd", "asimddp", "i8mm", "bf16", "sve")

# Requests of a decode scenario: some seconds for the slowest server, and at least one wave.
REQUESTS = {1: 4, 4: 12, 16: 32, 64: 64}
PREFILLS = 4
SHARERS, SHARED_AT_ONCE = 24, 8


def flags(requests: int, at_once: int, inputs: int, outputs: int, prefix: int = 0) -> list[str]:
    """Of `bench serve`."""
    lengths = ["--random-input-len", str(inputs), "--random-output-len", str(outputs), "--random-prefix-len", str(prefix)]
    return ["--num-prompts", str(requests), "--max-concurrency", str(at_once), *lengths, "--ignore-eos"]


# In this order: the widest load last, since it is what memory is read after.
LOADS = {
    "decode-1": flags(REQUESTS[1], 1, INPUT, OUTPUT),
    "decode-4": flags(REQUESTS[4], 4, INPUT, OUTPUT),
    "decode-16": flags(REQUESTS[16], 16, INPUT, OUTPUT),
    "prefill": flags(PREFILLS, 1, PREFILL, 1),
    "shared": flags(SHARERS, SHARED_AT_ONCE, SHARED[1], SHARED[2], SHARED[0]),
    "decode-64": flags(REQUESTS[64], 64, INPUT, OUTPUT),
    "te": flags(REQUESTS[16], 16, INPUT, OUTPUT),
}
SCENARIOS = ("start", *LOADS, "memory", "idle")
WEIGHTS = {"decode-1": 0.06, "decode-4": 0.1, "decode-16": 0.2, "prefill": 0.06, "shared": 0.1, "decode-64": 0.4, "idle": 0.08}

WORKLOADS = {
    **{DECODE[s]: f"{s} at once, {REQUESTS[s]} requests of {INPUT} tokens in and {OUTPUT} out" for s in REQUESTS},
    "prefill": f"{PREFILLS} prompts of {PREFILL} tokens one after another, one token out",
    "shared": f"{SHARERS} requests, {SHARED_AT_ONCE} at once, {SHARED[0]} tokens common to all and {SHARED[1]} of their own in, "
    f"{SHARED[2]} out",
    "te": f"16 at once, {REQUESTS[16]} requests of {INPUT} tokens in and {OUTPUT} out; two servers get half each",
    "start": "process start to the first streamed token of a request that is sent again until it is answered",
    "memory": "highest sum of proportional set sizes of the server's processes until the end of decode-64",
    "idle": f"CPU time over {IDLE:g} s without a request, after all loads; before them memory: private (anonymous) and "
    "shared (files and shared memory, where our weights are: another TE maps the same)",
}


def say(text: str) -> None:
    print(f"bench cpu: {text}", file=sys.stderr, flush=True)


# ---- what is measured on ------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    processor = peers.processor()
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return {
        "cpu": processor["model"],
        "cores": len(os.sched_getaffinity(0)),
        "flags": " ".join(f for f in FLAGS_WORTH_NAMING if f in processor["flags"]),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{os.uname().sysname} {os.uname().machine}",
    }


def measured_peaks() -> Peaks:
    """The best of some tries, all cores at once."""
    found = kernels.Peaks(cpu.choose(), len(os.sched_getaffinity(0)))
    tries = [(found.memory(), found.arithmetic(), found.bytes_arithmetic()) for _ in range(PEAK_TRIES)]
    return Peaks(*map(max, zip(*tries, strict=True)))


def shape_of(path: Path) -> Shape:
    model = models.build(open_checkpoint(path).config)
    return Shape(model.layers, model.hidden, model.intermediate, model.heads, model.kv_heads, model.head_dim, model.vocab)


def weight_bytes(spec: Spec, path: Path) -> float:
    """Bytes a weight of the matrices, as the file stores them; one where they are quantised to 8 bits at load."""
    if "int8" in spec.flags:
        return 1.0
    checkpoint = open_checkpoint(path)
    count = total = 0.0
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        if len(shape) > 1:
            weights, size = BLOCKS[checkpoint.dtype(name)]
            count += prod(shape)
            total += prod(shape) / weights * size
    return total / count


def described(spec: Spec, made: peers.Peers) -> Described:
    found = Described(spec.title, version(spec, __version__), settings(spec, made, sorted(os.sched_getaffinity(0))))
    if not spec.ours:
        return found
    stored = weight_bytes(spec, made.models[spec.model])
    return msgspec.structs.replace(found, weight_bytes=stored, arithmetic=spec.arithmetic)


def into_page_cache(spec: Spec, made: peers.Peers) -> None:
    """Read what the server will read: a start is measured, not the disk."""
    model = made.models[spec.model]
    files = list(model.iterdir()) if model.is_dir() else [model]
    if spec.kind == "llama.cpp":
        files.append(made.llama_server)
    elif spec.kind == "vllm":
        root = made.vllm.parent.parent
        files += [path for path in root.rglob("*") if path.suffix in (".py", ".pyc", ".json") or ".so" in path.suffixes]
    for path in files:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            while file.read(1 << 22):
                pass


# ---- one server ---------------------------------------------------------------------------------------------------------


class Counting(Client):
    """Asks for a text's length in the shape that this kind of server knows.

    llama-server answers vLLM's shape with no tokens instead of an error; prompts fitted to that would grow without end.
    """

    def __init__(self, kind: str, url: str):
        # llama-server drops connections that are kept open; a new one for each request would cost the others a little.
        super().__init__(url, fresh=kind == "llama.cpp", timeout=LOAD_PATIENCE)
        self.kind = kind

    async def count_tokens(self, text: str, model: str | None = None) -> int:
        """Tokens of `text`. Raises `UserError`, also where there seem to be none."""
        body = {"content": text, "add_special": True} if self.kind == "llama.cpp" else {"prompt": text, "model": model}
        answer = await self.ask("POST", "/tokenize", body)
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if text and not tokens:
            raise UserError("/tokenize found no tokens in a text: prompts can't be cut to length")
        return len(tokens or ())


async def loaded(spec: Spec, urls: list[str], scenario: str, seed: int) -> dict[str, float]:
    """Run a scenario's load, divided evenly among `urls`. Raises `UserError` unless every request got all its tokens."""
    args = serve.parser().parse_args([*LOADS[scenario], "--seed", str(seed)])
    args.num_prompts //= len(urls)
    args.max_concurrency //= len(urls)
    async with contextlib.AsyncExitStack() as stack:
        clients: list[Counting] = []
        for url in urls:
            clients.append(Counting(spec.kind, url))
            await stack.enter_async_context(clients[-1])
        works = []
        for i, client in enumerate(clients):
            args.seed = seed + i
            works.append(await serve.random_work(args, client, NAME))
        params = {"temperature": 0.0, "ignore_eos": True}
        began = time.monotonic()
        results = await asyncio.gather(
            *(serve.load(client, args, NAME, work, params) for client, work in zip(clients, works, strict=True))
        )
        took = time.monotonic() - began
    outcomes = [o for some, _ in results for o in some]
    if bad := [o for o in outcomes if not o.ok]:
        raise UserError(f"{len(bad)} of {len(outcomes)} requests failed: {bad[0].error}")
    args.base_url = urls[0]
    found = serve.figures(outcomes, took, args, NAME)
    asked = len(outcomes) * args.random_output_len
    if found["total_output_tokens"] != asked:
        raise UserError(f"{found['total_output_tokens']} tokens came back where {asked} were asked for")
    aimed = len(outcomes) * (args.random_input_len + args.random_prefix_len)
    if abs(found["total_input_tokens"] - aimed) > 0.02 * aimed:
        raise UserError(f"prompts had {found['total_input_tokens']} tokens where {aimed} were aimed at")
    if scenario == "prefill":
        return {"prompt_tok_s": found["total_input_tokens"] / took, "ttft_ms": found["median_ttft_ms"]}
    return {
        "output_tok_s": found["output_throughput"],
        "tpot_ms": found["median_tpot_ms"],
        "ttft_ms": found["median_ttft_ms"],
    }


def measured(spec: Spec, made: peers.Peers, scenarios: list[str], seed: str) -> Iterator[tuple[str, dict[str, float] | str]]:
    """Start the server, run `scenarios` on it, end it: (scenario, values or what went wrong) as they come."""
    into_page_cache(spec, made)
    with Server(spec, made) as server:
        try:
            seconds = uvloop.run(server.first_token(START_PATIENCE))
        except UserError as e:
            yield "start", str(e)
            return
        if "start" in scenarios:
            yield "start", {"first_token_s": seconds}
        if "idle" in scenarios:
            time.sleep(SETTLE)
            memory = server.memory()
            yield "idle_memory", {"private_mb": memory.private / 1e6, "shared_mb": memory.shared / 1e6}
        for scenario in LOADS:
            if scenario not in scenarios:
                continue
            try:
                server.check()
                work = loaded(spec, server.urls, scenario, zlib.crc32(f"{seed} {scenario}".encode()))
                yield scenario, uvloop.run(asyncio.wait_for(work, LOAD_PATIENCE))
            except TimeoutError:
                yield scenario, f"not done within {LOAD_PATIENCE:g} s"
                return  # it may still be at it
            except (UserError, RequestFailed) as e:
                yield scenario, str(e)
        if "memory" in scenarios and "decode-64" in scenarios:
            server.watch.sample()
            yield "memory", {"peak_mb": server.watch.peak / 1e6}
        if "idle" in scenarios:
            time.sleep(SETTLE)
            yield "idle", {"idle_core_percent": server.idle_core_percent(IDLE)}


# ---- the whole run ------------------------------------------------------------------------------------------------------


def own_scenarios(spec: Spec, chosen: list[str]) -> list[str]:
    """What of `chosen` is measured on this server. Those of TEs are for their own servers alone."""
    return [s for s in chosen if (s in spec.scenarios if spec.scenarios else s != "te")]


def skipped(spec: Spec) -> str:
    """Why a server can't be measured by this version; empty where it can."""
    if "--quantization" in spec.flags and "quantization" not in Config.__struct_fields__:
        return "this version has no --quantization"
    if spec.instances > len(os.sched_getaffinity(0)):
        return f"it needs {spec.instances} cores"
    return ""


def estimate(specs: list[Spec], chosen: list[str], rounds: int) -> float:
    """Seconds that a run takes, roughly, on two cores."""
    total = 0.0
    for spec in specs:
        own = own_scenarios(spec, chosen)
        share = 1.0 if "te" in own else sum(WEIGHTS.get(s, 0.0) for s in own)
        total += spec.start_seconds + 2 + share * spec.seconds
    return rounds * (total + 3)


def run_all(args: argparse.Namespace) -> int:
    specs = []
    for spec in SPECS:
        if spec.name in args.servers and own_scenarios(spec, args.scenarios):
            if why := skipped(spec):
                say(f"{spec.title}: left out: {why}")
            else:
                specs.append(spec)
    made = peers.ensure(args.peers, say, with_vllm=any(s.kind == "vllm" for s in specs))
    report = cpu_report.load(args.out)
    if report.machine and report.machine != machine():
        say(f"{args.out.name} is of another machine: begun anew")
        report = Report()
    session = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    begin(report, args, session, specs, made)
    minutes = estimate(specs, args.scenarios, args.rounds) / 60
    say(f"{len(specs)} servers, {args.rounds} rounds: about {minutes:.0f} minutes on two quiet cores")
    failed = 0
    for number in range(args.rounds):
        load = os.getloadavg()[0]
        if load > 1:
            say(f"the machine is busy (load average {load:.1f}): figures will be rough")
        report.rounds.append(Round(session, number, load, measured_peaks()))
        for spec in cpu_report.rotated(specs, number, args.rounds):
            seed = f"{session} {number} {spec.name}"
            try:
                with contextlib.closing(measured(spec, made, own_scenarios(spec, args.scenarios), seed)) as results:
                    for scenario, result in results:
                        failed += note(report, spec, Run(session, number, spec.name, scenario), result)
            except UserError as e:
                failed += note(report, spec, Run(session, number, spec.name, "start"), str(e))
            finally:
                keep_rounds(report)
                cpu_report.save(args.out, report)
    print(cpu_report.table(report))
    say(f"written to {args.out}" + (f"; {failed} measurements failed" if failed else ""))
    return int(bool(failed))


def note(report: Report, spec: Spec, run: Run, result: dict[str, float] | str) -> bool:
    """Put a result into the report and say it; whether it is a failure."""
    values, error = (result, "") if isinstance(result, dict) else ({}, result)
    report.runs = cpu_report.merge(report.runs, msgspec.structs.replace(run, values=values, error=error))
    text = error or ", ".join(f"{name} {cpu_report.number(v)}" for name, v in values.items())
    say(f"round {run.round}, {spec.title}, {run.scenario}: {text}")
    return bool(error)


def begin(report: Report, args: argparse.Namespace, session: str, specs: list[Spec], made: peers.Peers) -> None:
    report.what = __doc__.splitlines()[0].partition(": ")[2]
    report.date, report.machine, report.model = session[:10], machine(), peers.MODEL
    chosen = [] if args.servers == [s.name for s in SPECS] else ["--servers", *args.servers]
    chosen += [] if args.scenarios == list(SCENARIOS) else ["--scenarios", *args.scenarios]
    report.command = " ".join(["python -m bench.cpu", "--rounds", str(args.rounds), *chosen])
    report.shape, report.workloads = shape_of(made.models["q4_1"]), WORKLOADS
    report.servers |= {spec.name: described(spec, made) for spec in specs}
    report.servers = {s.name: report.servers[s.name] for s in SPECS if s.name in report.servers}


def keep_rounds(report: Report) -> None:
    """Forget rounds of earlier sessions that no figure stems from any more."""
    used = {(run.session, run.round) for run in report.runs}
    report.rounds = [r for r in report.rounds if (r.session, r.number) in used]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [s.name for s in SPECS]
    p.add_argument("--rounds", type=serve.natural, default=2, help="repetitions, each in another order (default: 2)")
    p.add_argument("--servers", nargs="+", choices=names, default=names, metavar="NAME", help=f"only these: {', '.join(names)}")
    p.add_argument(
        "--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME", help=f"only: {', '.join(SCENARIOS)}"
    )
    p.add_argument(
        "--peers", type=Path, default=peers.DEFAULT, metavar="DIR", help=f"where peers are made (default: {peers.DEFAULT})"
    )
    p.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="the result, merged into what is there")
    p.add_argument("--table", action="store_true", help="measure nothing: print the result as Markdown")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.table:
        print(cpu_report.table(cpu_report.load(args.out)))
        return 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that the server under test ends with us
    try:
        return run_all(args)
    except UserError as e:
        say(str(e))
        return 1
    except KeyboardInterrupt:
        say(f"interrupted; what was measured is in {args.out}")
        return 130


if __name__ == "__main__":
    sys.exit(main())
