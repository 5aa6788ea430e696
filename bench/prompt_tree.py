"""`python -m bench.prompt_tree`: what the global prompt tree costs: bytes a block, time to match a prompt and to take news in.

Made up: TEs that hold conversations. Every conversation begins with one of a few system prompts, which all TEs hold; what follows
is on one TE, or on more where it was moved or computed twice. A block is a key that some TE holds; keys are random, since the
tree never looks into them. Times are of the processor, so that what else the machine does counts little. Memory is what
tracemalloc counts after the blocks were told of, the keys' own bytes included; its last row is where all dictionaries have just
grown.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
import tracemalloc
from pathlib import Path
from random import Random

from bench.queue import cpu_model
from engine.types import BlockNews
from sched.prompt_tree import PromptTree

RESULTS = Path(__file__).parent / "results" / "prompt_tree.json"
MILLION = 10**6
SYSTEM_PROMPTS, SYSTEM_BLOCKS = 8, 32
CONVERSATION = 96  # blocks
ASKED = 128  # blocks of a prompt that is matched: 2048 tokens in blocks of 16
MATCHES = 2000  # of each measurement
# (TEs, TEs that hold a conversation at most, blocks) that memory is measured with. The last: each of 256 dictionaries has grown
# at 5461 keys.
WORLDS = ((1, 1, MILLION), (1000, 1, MILLION), (1000, 3, MILLION), (1000, 3, 256 * 5600))


class World:
    """TEs and what they hold: conversations until there are so many blocks."""

    def __init__(self, rng: Random, tes: int, blocks: int, holders: int):
        """`holders`: TEs that hold a conversation, at most."""
        self.rng = rng
        self.tes = tes
        shared = min(SYSTEM_PROMPTS, blocks // SYSTEM_BLOCKS)
        self.systems = [self.keys(SYSTEM_BLOCKS) for _ in range(shared)]
        count = max(1, (blocks - shared * SYSTEM_BLOCKS) // CONVERSATION)
        self.seeds = [rng.getrandbits(64) for _ in range(count)]  # keys are made when needed: memory is to be the tree's
        self.where = [rng.sample(range(tes), rng.randint(1, min(holders, tes))) for _ in range(count)]
        self.numbers = dict.fromkeys(range(tes), 0)

    def keys(self, blocks: int) -> bytes:
        return self.rng.randbytes(16 * blocks)

    def conversation(self, number: int) -> bytes:
        return Random(self.seeds[number]).randbytes(16 * CONVERSATION)

    def tell(self, tree: PromptTree, te: int, stored: bytes = b"", evicted: bytes = b"") -> float:
        """Seconds that it took to take the news in."""
        self.numbers[te] += 1
        news = BlockNews(self.numbers[te], stored, evicted)
        began = time.thread_time()
        assert tree.hear(te, news)
        return time.thread_time() - began

    def fill(self, tree: PromptTree) -> tuple[float, float, int]:
        """Tell of everything: seconds for all, seconds of the longest call, blocks times their TEs."""
        took, longest, told = 0.0, 0.0, 0
        for te in range(self.tes):
            for system in self.systems:
                seconds = self.tell(tree, te, system)
                took, longest, told = took + seconds, max(longest, seconds), told + len(system) // 16
        for number, where in enumerate(self.where):
            for te in where:
                seconds = self.tell(tree, te, self.conversation(number))
                took, longest, told = took + seconds, max(longest, seconds), told + CONVERSATION
        return took, longest, told

    def prompt(self) -> list[bytes]:
        """The next turn of a conversation: what there is of it, and something new."""
        number = self.rng.randrange(len(self.seeds))
        system = self.systems[number % len(self.systems)] if self.systems else b""
        known = self.conversation(number)[: 16 * self.rng.randrange(CONVERSATION + 1)]
        packed = (system + known)[: 16 * (ASKED - 1)]
        packed += self.keys(ASKED - len(packed) // 16)
        return [packed[at : at + 16] for at in range(0, len(packed), 16)]


def memory(seed: int, tes: int, blocks: int, holders: int) -> dict[str, float]:
    world = World(Random(seed), tes, blocks, holders)
    gc.collect()
    tracemalloc.start()
    tree = PromptTree(16)
    _, _, told = world.fill(tree)
    for _ in range(MATCHES):
        tree.match(world.prompt())  # which leaves something behind too
    gc.collect()
    nbytes = tracemalloc.get_traced_memory()[0] - sum(sys.getsizeof(number) for number in world.numbers.values())
    tracemalloc.stop()
    sets = len(tree.masks) - len(tree.spare) - 1
    return {
        "tes": tes,
        "most_tes_of_a_conversation": holders,
        "blocks": tree.size,
        "blocks_of_all_tes": told,
        "sets": sets,
        "bytes_a_block": round(nbytes / tree.size, 1),
    }


def speed(seed: int, tes: int, blocks: int, holders: int) -> dict[str, float]:
    world = World(Random(seed), tes, blocks, holders)
    tree = PromptTree(16)
    took, longest, told = world.fill(tree)
    times = []
    hits = 0
    for _ in range(MATCHES):
        prompt = world.prompt()
        began = time.thread_time()
        match = tree.match(prompt)
        times.append(time.thread_time() - began)
        hits += int(match.blocks.max(initial=0))
    percentiles = statistics.quantiles(times, n=100)
    evicting = sum(world.tell(tree, world.where[n][0], evicted=world.conversation(n)) for n in range(min(500, len(world.where))))
    began = time.thread_time()
    tree.gone(0)
    gone = time.thread_time() - began
    return {
        "tes": tes,
        "blocks": tree.size,
        "most_tes_of_a_conversation": holders,
        "match_p50_us": round(percentiles[49] * 1e6, 1),
        "match_p99_us": round(percentiles[98] * 1e6, 1),
        "blocks_found": round(hits / MATCHES, 1),
        "stored_us_a_block": round(took / told * 1e6, 2),
        "evicted_us_a_block": round(evicting / (min(500, len(world.where)) * CONVERSATION) * 1e6, 2),
        "longest_news_ms": round(longest * 1e3, 2),
        "te_gone_ms": round(gone * 1e3, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prompt_tree", description="The global prompt tree")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up conversations (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    options = parser.parse_args()

    memories = [memory(options.seed, tes, blocks, holders) for tes, holders, blocks in WORLDS]
    print(f"{'TEs':>5} {'blocks':>9} {'of all TEs':>11} {'sets':>7} {'bytes a block':>14}")
    for row in memories:
        print(f"{row['tes']:>5} {row['blocks']:>9,} {row['blocks_of_all_tes']:>11,} {row['sets']:>7,} {row['bytes_a_block']:>14}")
    speeds = [speed(options.seed, tes, blocks, 3) for blocks in (10**4, 10**5, MILLION) for tes in (1, 10, 100, 1000)]
    print(
        f"{'TEs':>5} {'blocks':>9} {'match p50':>12} {'p99':>10} {'stored':>13} {'evicted':>13}"
        f" {'longest news':>13} {'TE gone':>10}"
    )
    for row in speeds:
        print(
            f"{row['tes']:>5} {row['blocks']:>9,} {row['match_p50_us']:>9} us {row['match_p99_us']:>7} us"
            f" {row['stored_us_a_block']:>6} us/bl. {row['evicted_us_a_block']:>5} us/bl."
            f" {row['longest_news_ms']:>10} ms {row['te_gone_ms']:>7} ms"
        )
    report = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", "-m", "bench.prompt_tree", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "what": f"prompts of {ASKED} blocks; conversations of {CONVERSATION} blocks behind {SYSTEM_PROMPTS} system prompts of"
        f" {SYSTEM_BLOCKS} blocks that all TEs hold; a block is a key that some TE holds",
        "memory": memories,
        "speed": speeds,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
