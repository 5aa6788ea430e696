"""Speculation by prompt lookup, on beside off, on texts that the answer repeats in part.

    python -m bench.speculation [--rounds 5] [--model MODEL] [--config JSON] [--out FILE]

Workloads: summarise each text of `speculation.txt`, and copy it with small corrections (both repeat phrases of the text);
and, as the case that gains least, answer a question without a text. 128 greedy tokens each, one stream and four. Two
engines live side by side and take turns, so that both meet the machine in the same state. Prompts are computed anew each
time (no prefix cache). `decode` counts from a stream's first token to its last; `whole` has the prompt in it. The texts of both
engines must be equal: exit status 1 where they are not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path

from deepserve import AsyncLLM, SamplingParams

TOKENS = 128
STREAMS = (1, 4)
TEXTS = (Path(__file__).parent / "speculation.txt").read_text().split("\n---\n")
WORKLOADS = {
    "summarise": [f"Summarise the following text, with names and numbers as they are in it.\n\n{text}" for text in TEXTS],
    "edit": [f"Repeat the following text word for word and correct only its mistakes.\n\n{text}" for text in TEXTS],
    "chat": [
        "Why is the sky blue?",
        "Write a short story about a lighthouse keeper who is afraid of the sea.",
        "Give me a plan for a week of vegetarian dinners.",
        "Explain to a child how a bicycle stays upright.",
    ],
}


async def stream(engine: AsyncLLM, prompt: str) -> tuple[list[int], float, float, float]:
    """Output ids, and when it was asked, had its first token and its last (seconds)."""
    asked, first, last = time.perf_counter(), 0.0, 0.0
    ids: list[int] = []
    settings = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    async for output in engine.chat([{"role": "user", "content": prompt}], settings):
        first = first or time.perf_counter()
        last, ids = time.perf_counter(), list(output.outputs[0].token_ids)
    return ids, asked, first, last


async def measure(engine: AsyncLLM, prompts: list[str], streams: int) -> dict:
    """All prompts, `streams` at a time."""
    decode, whole, texts = [], [], []
    for at in range(0, len(prompts), streams):
        done = await asyncio.gather(*(stream(engine, p) for p in prompts[at : at + streams]))
        texts += [ids for ids, *_ in done]
        decode.append(max(d[3] for d in done) - max(d[2] for d in done))
        whole.append(max(d[3] for d in done) - min(d[1] for d in done))
    return {"decode": len(prompts) * (TOKENS - 1) / sum(decode), "whole": len(prompts) * TOKENS / sum(whole), "texts": texts}


def counters(engine: AsyncLLM) -> tuple[int, int, int]:
    """Drafts, drafted tokens, accepted tokens so far."""
    assert engine.cluster is not None
    loads = [te.load for te in engine.cluster.table.values()]
    return sum(x.drafts for x in loads), sum(x.draft_tokens for x in loads), sum(x.accepted_tokens for x in loads)


async def compare(off: AsyncLLM, on: AsyncLLM, rounds: int) -> list[dict]:
    rows = []
    for name, prompts in WORKLOADS.items():
        for streams in STREAMS:
            taken: dict[AsyncLLM, list[dict]] = {off: [], on: []}
            before = counters(on)
            for turn in range(rounds + 1):
                for engine in (off, on) if turn % 2 else (on, off):
                    taken[engine].append(await measure(engine, prompts, streams))
            drafts, drafted, accepted = (b - a for a, b in zip(before, counters(on), strict=True))
            texts = [round_["texts"] for round_ in taken[off] + taken[on]]
            row: dict = {"workload": name, "streams": streams, "equal": all(t == texts[0] for t in texts)}
            for kind in ("decode", "whole"):
                # the first round warms up
                a, b = ([r[kind] for r in taken[engine][1:]] for engine in (off, on))
                row[kind] = {
                    "off_tok_s": round(statistics.median(a), 1),
                    "on_tok_s": round(statistics.median(b), 1),
                    "gain": round(statistics.median(y / x for x, y in zip(a, b, strict=True)), 3),
                    "spread_of_gain": [round(f(y / x for x, y in zip(a, b, strict=True)), 3) for f in (min, max)],
                }
            tokens = (rounds + 1) * len(prompts) * TOKENS
            row["drafts_per_token"] = round(drafts / tokens, 3)
            row["drafted"], row["accepted"] = drafted, accepted
            row["acceptance"] = round(accepted / max(1, drafted), 3)
            row["accepted_share_of_output"] = round(accepted / tokens, 3)
            rows.append(row)
            show(row)
    return rows


def show(row: dict) -> None:
    decode, whole = row["decode"], row["whole"]
    print(
        f"{row['workload']:>10} {row['streams']:>2} streams: decode {decode['off_tok_s']:6.1f} -> {decode['on_tok_s']:6.1f} tok/s"
        f" ({decode['gain']:.2f}x, {decode['spread_of_gain'][0]:.2f} to {decode['spread_of_gain'][1]:.2f}),"
        f" whole {whole['off_tok_s']:6.1f} -> {whole['on_tok_s']:6.1f} ({whole['gain']:.2f}x);"
        f" {row['acceptance']:.0%} of drafted ids accepted, {row['accepted_share_of_output']:.0%} of the output;"
        f" texts {'equal' if row['equal'] else 'DIFFER'}",
        flush=True,
    )


async def run(model: str, config: str, rounds: int) -> dict:
    settings = {"max_model_len": 1024, "enable_prefix_caching": False, "kv_cache_memory_bytes": "512M"}
    async with AsyncLLM(model, **settings) as off, AsyncLLM(model, speculative_config=config, **settings) as on:
        speculation = on.config.speculative_config
        assert speculation is not None
        rows = await compare(off, on, rounds)
    return {
        "command": "python -m bench.speculation",
        "model": model,
        "cores": len(os.sched_getaffinity(0)),
        "speculative_config": {name: getattr(speculation, name) for name in speculation.__struct_fields__},
        "output_tokens": TOKENS,
        "rounds": rounds,
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--config", default='{"method": "ngram"}', help="speculative_config of the engine that speculates")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speculation.json")
    args = parser.parse_args(argv)
    report = asyncio.run(run(args.model, args.config, args.rounds))
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["equal"] for row in report["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
