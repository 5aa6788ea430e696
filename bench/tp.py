"""One stream on a TE of 1, 2, 3 or 4 ranks: what tensor parallelism costs where it brings no cores.

    python -m bench.tp [--rounds 7] [--out FILE]

A random model of 30 layers (hidden size 512, 8 query and 4 KV heads, bfloat16) with a prompt of about a thousand tokens, and the
default model with one of about 240; 100 tokens each, greedy. The cores of the machine are divided among the ranks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sched.gateway.client import Client
from tests import tiny
from tests.assets import default_model
from tests.server import Server

SHAPE = {
    "num_hidden_layers": 30,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
}
TOKENS = 100
PROMPT = "hello there you " * 60


async def stream(url: str) -> tuple[float, float]:
    """Seconds to the first token, and for each one after it."""
    began = time.monotonic()
    async with Client(url) as client:
        params = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
        times = [event.at async for event in client.complete(PROMPT, model="m", **params)]
    return times[0] - began, (times[-1] - times[0]) / (TOKENS - 1)


def measure(name: str, model: Path, counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """All settings side by side, a stream of each in turn: so a disturbance of the machine meets each of them."""
    with contextlib.ExitStack() as stack:
        servers = []
        for ranks in counts:
            settings = ("--max-model-len", "2048", "--no-enable-prefix-caching", "--tensor-parallel-size", str(ranks))
            servers.append(stack.enter_context(Server(model, "--served-model-name", "m", *settings)).ready())
        turns = [[asyncio.run(stream(server.url)) for server in servers] for _ in range(1 + rounds)][1:]
    rows = []
    for ranks, found in zip(counts, zip(*turns, strict=True), strict=True):
        first, each = (statistics.median(column) * 1000 for column in zip(*found, strict=True))
        rows.append({"model": name, "ranks": ranks, "first_token_ms": round(first, 1), "each_token_ms": round(each, 2)})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="streams of each setting; the median counts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tp.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure("random", tiny.make(Path(folder) / "m", **SHAPE), (1, 2, 4), args.rounds)
    rows += measure("default", default_model(), (1, 3), args.rounds)
    for row in rows:
        print(row)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m bench.tp " + " ".join(sys.argv[1:] if argv is None else argv),
        "cores": len(os.sched_getaffinity(0)),
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
