"""Returning conversations, more than the device's KV pool holds: each turn computed again, loaded from DRAM, or from SSD.

    python -m bench.rtc [--sessions 40] [--turns 6] [--model MODEL] [--folder DIR] [--out FILE]

Each session begins with a text of its own and grows by a message and a reply a turn, one request at a time, greedy; sessions take
turns, so that each comes back after all the others. The device pool holds a fifth of what they have in the end. Time to first
token is from the call to the first token in this process. With `ssd` the files are put out of the system's cache before each
round of turns (where the file system lets us), so that they are read from the disk; `ssd, cached` leaves them. After `ssd` the
engine is started anew on the same folder and every session asks once more. A disk slower than the prefill is seen in
`blocks_recomputed`: the rule then computes what it would take longer to read.

Texts of all runs must be equal: exit status 1 where they are not, or where a bar is missed (turns from the second on, median:
DRAM at most 0.4 of recompute, SSD at most 0.6; and hits after the restart).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from array import array
from pathlib import Path
from random import Random
from typing import Any

from deepserve import AsyncLLM, SamplingParams
from engine.rtc.ssd import SUFFIX

FIRST, MESSAGE, REPLY = 320, 40, 8  # tokens: a session's first prompt, each later message, each reply
BARS = {"dram": 0.4, "ssd": 0.6}
SHARE = 1 / 5  # of all sessions' blocks, that the device holds
COUNTERS = (
    "prefix_hits",
    "dram_hits",
    "ssd_hits",
    "blocks_loaded",
    "blocks_recomputed",
    "blocks_swapped",
    "blocks_lost",
    "blocks_torn",
)
SSD_COLD = "ssd"


def words(seed: int, count: int) -> list[int]:
    """Ids of no special token; any will do, since a prefill takes as long for one as for another."""
    rng = Random(seed)
    return [rng.randrange(1000, 40_000) for _ in range(count)]


def drop_from_cache(folder: Path, synced: set[str]) -> None:
    """Have the next read of each file come from the disk. A file must have reached it first."""
    for entry in os.scandir(folder):
        if entry.name.endswith(SUFFIX):
            fd = os.open(entry.path, os.O_RDONLY)
            if entry.name not in synced:
                os.fdatasync(fd)
                synced.add(entry.name)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


async def ask(engine: AsyncLLM, prompt: list[int]) -> tuple[float, list[int], int]:
    """Seconds to the first token, the reply, and how many prompt tokens were cached."""
    settings = SamplingParams(temperature=0.0, max_tokens=REPLY, ignore_eos=True)
    asked, first, reply, cached = time.perf_counter(), 0.0, array("i"), 0
    async for output in engine.generate(prompt, settings):
        first = first or time.perf_counter() - asked
        reply, cached = array("i", output.outputs[0].token_ids), output.num_cached_tokens
    return first, reply.tolist(), cached


async def converse(engine: AsyncLLM, histories: list[list[int]], turns: range, folder: Path | None) -> dict[str, Any]:
    """Every session's `turns`; `histories` grow. `folder`: of files that are to be read from the disk."""
    seconds: list[list[float]] = []
    texts, asked, cached, synced = [], 0, 0, set[str]()
    for turn in turns:
        if folder is not None and turn:
            await asyncio.to_thread(drop_from_cache, folder, synced)
        row = []
        for number, history in enumerate(histories):
            history += words(number * 1000 + turn, MESSAGE if turn else FIRST)
            took, reply, found = await ask(engine, history)
            row.append(took)
            texts.append(reply)
            asked += len(history) if turn else 0
            cached += found
            history += reply
        seconds.append(row)
    later = [took for turn, row in zip(turns, seconds, strict=True) for took in row if turn]
    loads = [te["load"] for te in engine.cluster.describe()]
    return {
        "ttft_ms_by_turn": [round(statistics.median(row) * 1e3, 1) for row in seconds],
        "ttft_ms": round(statistics.median(later) * 1e3, 1),
        "ttft_ms_p90": round(sorted(later)[int(len(later) * 0.9)] * 1e3, 1),
        "cached_share": round(cached / asked, 3),
        **{name: sum(load[name] for load in loads) for name in COUNTERS},
        "texts": texts,
    }


async def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    length = FIRST + (args.turns - 1) * MESSAGE + args.turns * REPLY
    async with AsyncLLM(args.model, max_model_len=1024, kv_cache_memory_bytes="64M") as probe:
        (te,) = probe.cluster.describe()
        block_bytes, block_size = te["memory_bytes"]["kv"] // te["kv_blocks"], probe.config.block_size or 16
    blocks = args.sessions * -(-length // block_size)
    settings: dict[str, Any] = {
        "max_model_len": (args.turns + 2) * (MESSAGE + REPLY) + FIRST,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": int(blocks * SHARE) * block_bytes,
    }
    room = 2 * blocks * block_bytes
    tiers: dict[str, dict[str, Any]] = {
        "recompute": {},
        "dram": {"kv_dram_bytes": room},
        SSD_COLD: {"kv_ssd_dir": str(folder / "cold"), "kv_ssd_bytes": room},
        "ssd, cached": {"kv_ssd_dir": str(folder / "warm"), "kv_ssd_bytes": room},
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, more in tiers.items():
        histories: list[list[int]] = [[] for _ in range(args.sessions)]
        disk = folder / "cold" if name == SSD_COLD else None
        async with AsyncLLM(args.model, **settings, **more) as engine:
            rows[name] = await converse(engine, histories, range(args.turns), disk)
        show(name, rows[name])
        if name == SSD_COLD:
            drop_from_cache(folder / "cold", set())
            async with AsyncLLM(args.model, **settings, **more) as engine:
                rows["ssd, after a restart"] = await converse(engine, histories, range(args.turns, args.turns + 1), None)
            show("ssd, after a restart", rows["ssd, after a restart"])
    texts = {name: rows[name].pop("texts") for name in list(rows)}
    base = rows["recompute"]["ttft_ms"]
    ratios = {name: round(row["ttft_ms"] / base, 3) for name, row in rows.items()}
    return {
        "command": "python -m bench.rtc",
        "model": args.model,
        "cores": len(os.sched_getaffinity(0)),
        "sessions": args.sessions,
        "turns": args.turns,
        "tokens": {"first": FIRST, "message": MESSAGE, "reply": REPLY, "a session in the end": length},
        "device_blocks": int(blocks * SHARE),
        "sessions_blocks": blocks,
        "block_bytes": block_bytes,
        "rows": rows,
        "ratio_to_recompute": ratios,
        "bars": BARS,
        "texts_equal": all(texts[name] == texts["recompute"] for name in tiers),
        "bars_met": all(ratios[name] <= bar for name, bar in BARS.items()) and rows["ssd, after a restart"]["ssd_hits"] > 0,
    }


def show(name: str, row: dict[str, Any]) -> None:
    print(
        f"{name:>22}: TTFT of later turns {row['ttft_ms']:6.1f} ms (p90 {row['ttft_ms_p90']:.1f}),"
        f" {row['cached_share']:.0%} of prompt tokens cached; tokens from DRAM {row['dram_hits']}, SSD {row['ssd_hits']};"
        f" blocks loaded {row['blocks_loaded']}, recomputed {row['blocks_recomputed']}, lost {row['blocks_lost']}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rtc", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=40)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the system's folder for such files)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rtc.json")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="deepserve-rtc-", dir=args.folder))
    try:
        report = asyncio.run(run(args, folder))
    finally:
        shutil.rmtree(folder)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"ratios to recompute: {report['ratio_to_recompute']}; texts {'equal' if report['texts_equal'] else 'DIFFER'}")
    return 0 if report["texts_equal"] and report["bars_met"] else 1


if __name__ == "__main__":
    sys.exit(main())
