"""What simulated users ask for, and when: made-up loads and recorded ones. Pure; the same seed gives the same requests.

A prompt is known by its length and by where its text comes from, not by its tokens: `spans` names a source for each part, and two
prompts have the same beginning as far as their spans are the same. That is all that prefix caches need. Requests come when they
come, whatever became of those before ("open loop"), so that all policies meet the same ones.

Sizes of the made-up loads, in tokens, are assumptions written down here; what was taken from where stands beside them.
"""

from __future__ import annotations

import bisect
import csv
import heapq
import itertools
import json
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np

from engine.types import UserError

# (source, end): tokens up to `end` that earlier spans don't have are those of `source`. A source is a text that doesn't change;
# one that comes after others is found after those only.
Spans = tuple[tuple[int, int], ...]


class Arrival(msgspec.Struct, frozen=True):
    """One request."""

    at: float  # seconds from the start of the trace
    prompt: int  # tokens
    output: int  # tokens that it will generate, the first one included
    spans: Spans = ()  # of the prompt; the last one goes on into the output. (): a text that is nobody else's
    key: str = ""  # who asks: an API key's name
    priority: int = 0  # smaller goes first


Trace = Iterator[Arrival]

# ---- when requests come ---------------------------------------------------------------------------------------------

# Arrivals of the bursty load come in clumps: the variance of a gap is that many times a Poisson process's of the same rate (the
# shape of the gamma distribution is its inverse). Assumed.
BURSTINESS = 4.0


def gaps(rng: np.random.Generator, rate: float, variance: float = 1.0) -> Iterator[float]:
    """Seconds between arrivals at `rate` a second: gamma distributed, exponential with `variance` 1."""
    shape = 1.0 / variance
    while True:
        yield from rng.gamma(shape, 1.0 / (rate * shape), 4096).tolist()


def around(rng: np.random.Generator, mean: float, sigma: float, least: int, most: int) -> Iterator[int]:
    """Lengths with a long tail: lognormal, `mean` before they are cut to `least` .. `most`."""
    mu = math.log(mean) - sigma * sigma / 2
    while True:
        yield from np.clip(rng.lognormal(mu, sigma, 4096), least, most).astype(int).tolist()


# ---- made-up loads --------------------------------------------------------------------------------------------------


def poisson(rate: float, seed: int, variance: float = 1.0) -> Trace:
    """Prompts that share nothing, of all lengths: chat, questions, documents. The means are those of Azure's 2023 conversation
    trace (1155 and 211 tokens), and so is about how they spread."""
    when, prompts, outputs = streams(seed, 3)
    sizes = zip(around(prompts, 1155, 1.0, 16, 8192), around(outputs, 211, 0.8, 2, 2048), strict=True)
    at = 0.0
    for gap, (prompt, output) in zip(gaps(when, rate, variance), sizes, strict=True):
        at += gap
        yield Arrival(at, prompt, output)


def gamma(rate: float, seed: int) -> Trace:
    """The same requests in bursts."""
    return poisson(rate, seed, BURSTINESS)


# A conversation: a system prompt that many have in common, and turns that each repeat all that was said before.
SYSTEMS = 64  # system prompts; the nth is used in proportion to 1/n
SYSTEM_TOKENS = 1024
TURNS = 5  # on average, at least one
ASKED, ANSWERED = 150, 250  # tokens a turn
READING, WRITING = 4.0, 11.0  # seconds from one turn to the next: that at least, and on average so many more
LONGEST = 8192  # tokens of a prompt: a conversation that would have more ends


def multiturn(rate: float, seed: int) -> Trace:
    """Conversations with shared system prompts. Those that began before the trace go on in it, so that its first prompts are as
    long as its last ones (and found in no cache)."""
    rng, asking, answering, breaks = streams(seed, 4)
    asked, answered = around(asking, ASKED, 0.8, 8, 2048), around(answering, ANSWERED, 0.7, 2, 1024)
    popular = list(itertools.accumulate(1.0 / n for n in range(1, SYSTEMS + 1)))
    writing, begins = gaps(breaks, 1.0 / WRITING), gaps(rng, rate / TURNS)
    names = itertools.count(SYSTEMS)

    def some_system() -> int:
        return bisect.bisect_left(popular, rng.random() * popular[-1])

    # (when the next turn comes, conversation, system prompt, tokens so far)
    turns: list[tuple[float, int, int, int]] = []
    going_on = 1.0 - 1.0 / TURNS
    for said in range(1, 12 * TURNS):  # turns; of a thousand conversations fewer than one is longer
        for _ in range(rng.poisson(rate / TURNS * going_on**said * (READING + WRITING))):
            tokens = SYSTEM_TOKENS + sum(next(asked) + next(answered) for _ in range(said))
            # What is left of a pause that has begun: it is being read, or written.
            reading = rng.random() * (READING + WRITING) < READING
            left = READING * rng.random() * reading + next(writing)
            turns.append((left, next(names), some_system(), tokens))
    heapq.heapify(turns)
    at = 0.0
    while True:
        at += next(begins)
        heapq.heappush(turns, (at, next(names), some_system(), SYSTEM_TOKENS))
        while turns[0][0] <= at:
            when, who, system, tokens = heapq.heappop(turns)
            prompt, output = tokens + next(asked), next(answered)
            if prompt > LONGEST:
                continue
            yield Arrival(when, prompt, output, ((system, SYSTEM_TOKENS), (who, 2 * LONGEST)))
            if rng.random() < going_on:
                heapq.heappush(turns, (when + READING + next(writing), who, system, prompt + output))


# Code completion, the paper's load (about 2K tokens in, 200 out): an editor that sends what is before the cursor. Means are the
# paper's; how far lengths spread (the second numbers: of their logarithms) is assumed: a line or a function, a file or its head.
CODE_PROMPT, CODE_OUTPUT = (2048, 0.8), (200, 1.0)
COMPLETIONS = 12  # a session, on average
CODE_PAUSE = 8.0  # seconds between two of them
KEPT = 3.0, 1.0  # of a prompt, the part before the place that was edited since: a beta distribution, its mean 0.75


def code(rate: float, seed: int) -> Trace:
    """Sessions in an editor: each prompt repeats the one before up to where it was edited. Some began before the trace."""
    rng, sizes, results, breaks = streams(seed, 4)
    prompts, outputs = around(sizes, *CODE_PROMPT, 64, 8192), around(results, *CODE_OUTPUT, 4, 2048)
    pauses, begins = gaps(breaks, 1.0 / CODE_PAUSE), gaps(rng, rate / COMPLETIONS)
    # (when the next completion is asked for, session, tokens of its prompts, spans of the one before)
    going_on = 1.0 - 1.0 / COMPLETIONS
    begun = rng.poisson(rate * going_on * CODE_PAUSE)
    sessions: list[tuple[float, int, int, Spans]] = [(next(pauses), n, next(prompts), ()) for n in range(begun)]
    heapq.heapify(sessions)
    source = itertools.count()
    at = 0.0
    for number in itertools.count(begun):
        at += next(begins)
        heapq.heappush(sessions, (at, number, next(prompts), ()))
        while sessions[0][0] <= at:
            when, who, prompt, spans = heapq.heappop(sessions)
            spans = edited(spans, int(prompt * rng.beta(*KEPT)), next(source))
            yield Arrival(when, prompt, next(outputs), spans)
            if rng.random() < going_on:
                heapq.heappush(sessions, (when + next(pauses), who, prompt, spans))


def edited(spans: Spans, place: int, source: int) -> Spans:
    """The text is another one from token `place` on."""
    kept = [(s, min(end, place)) for (_, begin), (s, end) in itertools.pairwise(((0, 0), *spans)) if begin < place]
    return (*kept, (source, 1 << 30))


def completion(rate: float, seed: int) -> Trace:
    """The paper's load without what its prompts have in common, of which it says nothing: 2K in, 200 out, Poisson."""
    when, sizes, results = streams(seed, 3)
    prompts, outputs = around(sizes, *CODE_PROMPT, 64, 8192), around(results, *CODE_OUTPUT, 4, 2048)
    at = 0.0
    for gap, prompt, output in zip(gaps(when, rate), prompts, outputs, strict=True):
        at += gap
        yield Arrival(at, prompt, output)


MADE_UP: dict[str, Callable[[float, int], Trace]] = {
    "poisson": poisson,
    "gamma": gamma,
    "multiturn": multiturn,
    "code": code,
    "completion": completion,
}


def streams(seed: int, count: int) -> list[np.random.Generator]:
    """Independent sources of chance: drawing more of one thing changes nothing of the others."""
    return [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(count)]


# ---- recorded loads -------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Arrival]:
    """A recorded trace, by time, the first request at 0. Raises `UserError`.

    JSONL, a request a line: {"at": seconds, "prompt": tokens, "output": tokens, "key": "name", "priority": 0}, of which the last
    two may be left out. Mooncake's fields are known too ("timestamp" in milliseconds, "input_length", "output_length", "hash_ids"
    of 512 tokens each), and Azure's CSV."""
    try:
        with path.open(newline="") as file:
            found = azure(path, file) if path.suffix == ".csv" else lines(path, file)
    except OSError as e:
        raise UserError(f"--trace {path}: {e.strerror}", "trace") from None
    except UnicodeDecodeError as e:
        raise UserError(f"--trace {path}: it is no text in UTF-8 ({e.reason})", "trace") from None
    if not found:
        raise UserError(f"--trace {path}: no requests in it", "trace")
    found.sort(key=lambda a: a.at)
    start = found[0].at
    return [msgspec.structs.replace(a, at=a.at - start) for a in found]


def lines(path: Path, file: Iterator[str]) -> list[Arrival]:
    found = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(mooncake(row) if "input_length" in row else plain(row))
        except (ValueError, KeyError, TypeError) as e:
            said = f"no {e}" if isinstance(e, KeyError) else str(e)
            example = '{"at": 0.5, "prompt": 2048, "output": 200}'
            raise UserError(f"--trace {path}, line {number}: {said}; a line is such as {example}", "trace") from None
    return found


def plain(row: dict[str, object]) -> Arrival:
    arrival = msgspec.convert(row, Arrival, strict=False)
    if not 0 <= arrival.at < math.inf or arrival.prompt < 1 or arrival.output < 1:
        raise ValueError('"at" must be 0 or more, "prompt" and "output" 1 or more')
    return arrival


MOONCAKE_BLOCK = 512  # tokens of each of its hash ids


def mooncake(row: dict[str, object]) -> Arrival:
    ids = msgspec.convert(row["hash_ids"], list[int])
    if min(ids, default=0) < 0:
        raise ValueError('"hash_ids" must be 0 or more')
    return Arrival(
        at=msgspec.convert(row["timestamp"], float, strict=False) / 1e3,
        prompt=max(1, msgspec.convert(row["input_length"], int)),
        output=max(1, msgspec.convert(row["output_length"], int)),
        spans=tuple((id, (n + 1) * MOONCAKE_BLOCK) for n, id in enumerate(ids)),
    )


def azure(path: Path, file: Iterator[str]) -> list[Arrival]:
    found = []
    for number, row in enumerate(csv.DictReader(file), 2):
        try:
            stamp = datetime.fromisoformat(row["TIMESTAMP"][:26])
            found.append(Arrival(stamp.timestamp(), max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))))
        except (ValueError, KeyError, TypeError) as e:
            wanted = "TIMESTAMP, ContextTokens, GeneratedTokens"
            raise UserError(f"--trace {path}, line {number}: {e!r}; the columns are {wanted}", "trace") from None
    return found


def at_rate(arrivals: list[Arrival], rate: float) -> list[Arrival]:
    """The same requests, faster or slower: `rate` a second on average."""
    length = arrivals[-1].at
    if length <= 0:
        raise UserError("--rate: all requests of the trace come at once, there is no rate to change; leave it out", "rate")
    scale = len(arrivals) / rate / length
    return [msgspec.structs.replace(a, at=a.at * scale) for a in arrivals]


# ---- keys -----------------------------------------------------------------------------------------------------------


def keys_of(spans: Spans, tokens: int, block: int) -> list[bytes]:
    """Keys of the full blocks in the first `tokens` tokens of a text. A key stands for all that comes before it too, as in RTC: a
    block that is of several sources is known by the last of them, which is found after those only."""
    keys: list[bytes] = []
    count = tokens // block
    for source, end in spans:
        head = source.to_bytes(8, "little")
        upto = min(count, end // block if (source, end) != spans[-1] else count)
        keys += [head + n.to_bytes(8, "little") for n in range(len(keys), upto)]
        if len(keys) >= count:
            break
    return keys
