"""Random streams, cancels, SIGKILLs and changes of role in every way to split prefill from decode: texts must not change.

    python -m bench.pd_soak [--runs 200] [--seed 0] [--modes te-2 1p1d ...] [--out FILE]

With a tiny random model. First all kinds of streams are asked of one TE that nobody disturbs. Then, five runs to a server, in
each mode in turn: some of the streams at random moments, of which some are left at a random moment, while processes of TEs are
killed and TEs get other roles. A stream that nobody left must have its whole text, one that was left the beginning of it. After
each run every TE must be back without a KV block in use, and with as many shared memories (memfds, open or mapped) as when the
server was new; after each server no process may be left. What each run does is drawn from its own seed, so that `--seed N
--runs 1` is run N again, up to the moments at which things happen to coincide. Exit status 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from bench.serve import natural
from sched.gateway.client import Client, RequestFailed
from tests import tiny
from tests.server import Server, family, wait_until

MODES: dict[str, tuple[str, ...]] = {
    "te-2": ("--te", "2"),
    "1p1d": ("--pd", "1p1d", "--kv-transfer", "layer"),
    "1p1d-request": ("--pd", "1p1d", "--kv-transfer", "request"),
    "2p1d": ("--pd", "2p1d"),
    "1p1d+1c": ("--pd", "1p1d+1c"),
    "semi": ("--pd", "semi"),
    "semi-slo": ("--pd", "semi", "--slo-ttft-ms", "60", "--slo-tpot-ms", "4"),  # hardly to be kept: shares change all the time
    "te-2-tp": ("--te", "2", "--tensor-parallel-size", "2"),
    "1p1d-tp": ("--pd", "1p1d", "--tensor-parallel-size", "2"),
    "1p1d-mixed": ("--pd", "1p1d", "--prefill-tensor-parallel-size", "1", "--tensor-parallel-size", "2"),
}
COMMON = ("--max-model-len", "1024", "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", "64M")
# A text takes some tenths of a second: kills and cancels meet it while it waits, is prefilled, moves and decodes.
SHAPE = {
    "num_hidden_layers": 12,
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 1024,
    "max_position_embeddings": 1024,
}
KINDS = 24  # of streams
SPAN = 0.5  # seconds in which everything begins
LEFT = 0.25  # seconds after which a stream is left, at most
A_SERVER = 5  # runs; a TE that dies again and again takes longer to come back
PATIENCE = 30.0  # seconds until all is as it was


class Kind(NamedTuple):
    """A request whose text is always the same."""

    prompt: str
    tokens: int
    temperature: float
    seed: int


class Asked(NamedTuple):
    kind: int
    at: float  # seconds after the run's begin
    left: float | None  # seconds after that


class Kill(NamedTuple):
    at: float
    which: float  # of the TEs' processes that live then, from 0 to 1


class Change(NamedTuple):
    """Of a TE's role. Impossible ones are refused, which is no fault."""

    at: float
    which: float
    role: str


class Plan(NamedTuple):
    asked: list[Asked]
    kills: list[Kill]
    changes: list[Change]


class Outcome(NamedTuple):
    completed: int
    left: int
    killed: int
    wrong: list[str]  # what is wrong, in words


def kinds() -> list[Kind]:
    """Prompts of 3 to 500 tokens, some of which begin alike; half of them sampled."""
    rng = random.Random(0)
    found = []
    for i in range(KINDS):
        head = "you all know how this begins, and so does the prefix cache: " * rng.randint(1, 3) if i % 3 == 0 else ""
        found.append(Kind(head + f"{i} " * rng.choice([1, 20, 60, 120]), rng.randint(4, 120), float(i % 2), i))
    return found


def make_plan(seed: int) -> Plan:
    rng = random.Random(seed)
    asked = [
        Asked(rng.randrange(KINDS), rng.uniform(0, SPAN), rng.uniform(0, LEFT) if rng.random() < 0.25 else None)
        for _ in range(rng.randint(3, 14))
    ]
    # A request is given up on when it has been on three TEs that died.
    kills = [Kill(rng.uniform(0, 1.5 * SPAN), rng.random()) for _ in range(rng.choice([0, 1, 1, 2]))]
    roles = ["prefill", "decode", "colocated"]
    changes = [Change(rng.uniform(0, 1.5 * SPAN), rng.random(), rng.choice(roles)) for _ in range(rng.choice([0, 1, 3, 6]))]
    return Plan(asked, kills, changes)


async def text_of(client: Client, kind: Kind, left: float | None = None) -> tuple[str, bool]:
    """The stream's text, and whether it came to its end; `left`: seconds after which nobody listens any more."""
    text = ""
    params = {"max_tokens": kind.tokens, "temperature": kind.temperature, "seed": kind.seed, "ignore_eos": True}
    try:
        async with asyncio.timeout(left):
            async for event in client.complete(kind.prompt, model="m", **params):
                text += event.text
    except TimeoutError:
        return text, False
    return text, True


async def references(url: str, wanted: Sequence[Kind]) -> list[str]:
    async with Client(url) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(text_of(client, kind)) for kind in wanted]
    return [task.result()[0] for task in tasks]


def workers(server: Server) -> list[int]:
    """Every process of every TE: with tensor parallelism some each."""
    found = []
    for pid in sorted(family(server.marker)):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith("deepserve-te"):
                found.append(pid)
    return found


async def play(server: Server, plan: Plan, wanted: Sequence[Kind], texts: Sequence[str]) -> Outcome:
    """One run, to the end of its last stream and kill."""
    wrong: list[str] = []
    ends: list[bool] = []

    async def stream(client: Client, asked: Asked) -> None:
        await asyncio.sleep(asked.at)
        try:
            text, ended = await text_of(client, wanted[asked.kind], asked.left)
        except RequestFailed as e:
            wrong.append(f"kind {asked.kind}: {e}")
            return
        ends.append(ended)
        want = texts[asked.kind]
        if text != want if ended else not want.startswith(text):
            wrong.append(f"kind {asked.kind}: {text!r} instead of {want!r}")

    async def kill(fault: Kill) -> int:
        await asyncio.sleep(fault.at)
        living = workers(server)
        if not living:
            return 0
        try:
            os.kill(living[int(fault.which * len(living))], signal.SIGKILL)
        except ProcessLookupError:  # it was about to end
            return 0
        return 1

    async def change(wanted: Change) -> None:
        await asyncio.sleep(wanted.at)
        table = await asyncio.to_thread(server.tes)
        te = table[int(wanted.which * len(table))]["id"]
        status, said = await asyncio.to_thread(server.post, f"/v1/admin/te/{te}/role", {"role": wanted.role})
        if status not in (200, 400):
            wrong.append(f"TE {te} to {wanted.role}: {status} {said}")

    async with Client(server.url) as client, asyncio.TaskGroup() as group:
        for role in plan.changes:
            group.create_task(change(role))
        for asked in plan.asked:
            group.create_task(stream(client, asked))
        kills = [group.create_task(kill(fault)) for fault in plan.kills]
    return Outcome(sum(ends), len(ends) - sum(ends), sum(k.result() for k in kills), wrong)


# ---- what must be as it was -----------------------------------------------------------------------------------------


def shared_memories(pids: set[int]) -> dict[int, str]:
    """Inode and name of every memfd that one of these processes has open or mapped."""
    found: dict[int, str] = {}
    for pid in pids:
        try:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    target = os.readlink(fd)
                    if target.startswith("/memfd:"):
                        found[fd.stat().st_ino] = target
                except OSError:
                    continue
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if "/memfd:" in line:
                    _, _, _, _, inode, name = line.split(maxsplit=5)
                    found[int(inode)] = name
        except OSError:
            continue
    return found


def by_name(memories: dict[int, str]) -> dict[str, int]:
    names = list(memories.values())
    return {name: names.count(name) for name in sorted(set(names))}


def settled(server: Server, memories: dict[str, int]) -> str:
    """ "" once every TE is back, no block is in use and the shared memories are those of a new server; else what is not so."""

    def amiss() -> str:
        status, health = server.get("/health")
        if status != 200:
            return f"/health says {status}: {health}"
        loads = {te["id"]: te["load"] for te in server.tes()}
        if any(load["running"] or load["waiting"] for load in loads.values()):
            return f"sequences that nobody wants: {loads}"
        if any(load["blocks_used"] for load in loads.values()):
            return f"KV blocks in use: {loads}"
        now = by_name(shared_memories(family(server.marker)))
        return f"shared memories {now}, at first {memories}" if now != memories else ""

    try:
        wait_until("all is as it was", lambda: not amiss(), PATIENCE)
    except AssertionError:
        return amiss()
    return ""


# ---- many runs ------------------------------------------------------------------------------------------------------


def counted(server: Server) -> dict[str, int]:
    """What the server has counted: tasks started again, and those moved between TEs."""
    metrics = server.get("/metrics")[1]
    found = {name: re.search(rf"task_{name}_total\{{.*?\}} (\S+)", metrics) for name in ("replays", "moves")}
    return {name: int(float(match[1])) if match else 0 for name, match in found.items()}


def soak(
    model: Path, wanted: Sequence[Kind], texts: Sequence[str], mode: str, seeds: Sequence[int]
) -> tuple[list[Outcome], dict[str, int]]:
    """Runs with these seeds on one server, and what that has `counted`."""
    outcomes: list[Outcome] = []
    with Server(model, "--served-model-name", "m", *COMMON, *MODES[mode]) as server:
        server.ready()
        new = by_name(shared_memories(family(server.marker)))
        for seed in seeds:
            outcome = asyncio.run(play(server, make_plan(seed), wanted, texts))
            if complaint := settled(server, new):
                outcome.wrong.append(complaint)
            outcomes.append(outcome)
            if complaint:
                break  # it would come up again after each of the others
        return outcomes, counted(server)


def prepare(folder: Path) -> tuple[Path, list[Kind], list[str]]:
    """A tiny model, and the kinds of streams with the texts that it gives undisturbed."""
    model, wanted = tiny.make(folder / "m", **SHAPE), kinds()
    with Server(model, "--served-model-name", "m", *COMMON, "--te", "1") as server:
        server.ready()
        return model, wanted, asyncio.run(references(server.url, wanted))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pd_soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=natural, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each has the next one")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pd_soak.json")
    args = parser.parse_args(argv)
    rows: dict[str, dict[str, int]] = {
        mode: dict.fromkeys(("runs", "completed", "left", "killed", "replays", "moves", "wrong"), 0) for mode in args.modes
    }
    complaints: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model, wanted, texts = prepare(Path(folder))
        for group, members in groupby(range(args.seed, args.seed + args.runs), lambda seed: seed // A_SERVER):
            seeds = list(members)
            mode = args.modes[group % len(args.modes)]
            row = rows[mode]
            try:
                outcomes, events = soak(model, wanted, texts, mode, seeds)
            except AssertionError as e:  # the server ended, or left processes behind
                outcomes, events = [Outcome(0, 0, 0, [str(e)])], {}
            for name, count in events.items():
                row[name] += count
            for seed, outcome in zip(seeds, outcomes, strict=False):
                row["runs"] += 1
                row["completed"] += outcome.completed
                row["left"] += outcome.left
                row["killed"] += outcome.killed
                row["wrong"] += bool(outcome.wrong)
                for what in outcome.wrong:
                    complaints.append(f"{mode}, seed {seed}: {what}")
                    print(complaints[-1], flush=True)
            done = sum(r["runs"] for r in rows.values())
            print(f"{mode}: {row}; {done} runs, {time.monotonic() - began:.0f} s", flush=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m bench.pd_soak --runs {args.runs} --seed {args.seed}",
        "runs": sum(row["runs"] for row in rows.values()),
        "wrong_runs": sum(row["wrong"] for row in rows.values()),
        "modes": rows,
        "complaints": complaints,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['runs']} runs, {result['wrong_runs']} wrong; written to {args.out}")
    return int(bool(complaints) or result["runs"] < args.runs)


if __name__ == "__main__":
    sys.exit(main())
