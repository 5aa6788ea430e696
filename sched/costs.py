"""What steps take: a model's cost on its TEs as few numbers, what follows for a new task, and how they are learnt. Pure.

A step of a TE takes

    p0 + p1 * prompt + p2 * prompt^2 + p3 * context * prompt      where it computes `prompt` tokens that follow `context` others
      or d0                                                       where it only decodes
    + d1 * sequences + d2 * kv                                    for the sequences that decode, and all KV tokens that they read

so that what prompts and decodes cost each other on one TE follows: a prompt holds every decode up for its whole time, and each of
its chunks takes longer by the decodes of that step. The numbers come from a profile (`fitted`), or from a few measurements at the
start (`rough`), and follow what is seen (`Learner`). Seconds and tokens everywhere. What a new task would take on each TE is told
from them in engine/native/outlook.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Final, NamedTuple

import msgspec
import numpy as np

from sched.view import Floats

# Until something is known of a model's requests: the mean lengths of chats.
PROMPT, ANSWER = 512.0, 256.0


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Costs of one model on TEs of one kind. No number is negative. engine/native/outlook.c has them in the same order."""

    p0: float = 0.0  # a step that computes prompts
    p1: float  # ... a token of it
    p2: float = 0.0  # ... each pair of tokens of one chunk
    p3: float = 0.0  # ... each pair of a token and one that came before the chunk; twice p2 where chunks cost nothing
    d0: float  # a step that only decodes
    d1: float = 0.0  # ... a sequence of it
    d2: float = 0.0  # ... a token of KV that it reads
    chunk: int = 2048  # prompt tokens that a step takes at most
    peer0: float = 0.0  # KV to another TE, beside what is hidden behind the prompt's own steps
    peer: float = 0.0  # ... a token
    tier0: float = 0.001  # KV from a slower tier
    dram: float = 0.0  # ... a token
    ssd: float = 0.0
    prompt: float = PROMPT  # tokens of a typical prompt: what is queued is taken for such
    found: float = 0.0  # ... of which caches have so many
    answer: float = ANSWER  # ... and answer: what is running ends after so many steps
    crowd: float = 0.0  # sequences a TE, in the mean of late

    # ---- an idle TE -------------------------------------------------------------------------------------------------
    def prefill(self, new: float, context: float = 0.0) -> float:
        """Seconds to compute `new` prompt tokens (1 or more) after `context` others, in as few equal chunks as there can be."""
        chunks = ceil(new / self.chunk)
        each = new / chunks
        return chunks * self.p0 + new * (self.p1 + (self.p2 - 0.5 * self.p3) * each + self.p3 * (context + 0.5 * new))

    def step(self, prompt: float, context: float, sequences: float, kv: float) -> float:
        """Seconds of one step."""
        begin = self.p0 + (self.p1 + self.p2 * prompt + self.p3 * context) * prompt if prompt else self.d0
        return begin + self.d1 * sequences + self.d2 * kv

    def transfer(self, tokens: float) -> float:
        """Seconds until KV of so many tokens is with another TE, once it is computed."""
        return self.peer0 + self.peer * tokens


# ---- where the numbers come from ----------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What a step did, and the seconds it took."""

    prompt: float  # tokens of prompts that it computed
    context: float  # tokens before them, in the mean
    sequences: float  # that decoded
    kv: float  # tokens of KV that those read
    seconds: float


NUMBERS: Final = ("p0", "p1", "p2", "p3", "d0", "d1", "d2")  # what steps tell


def parts(prompt: float, context: float, sequences: float, kv: float) -> list[float]:
    """How often each of NUMBERS is in a step."""
    computes = 1.0 if prompt else 0.0
    return [computes, prompt, prompt * prompt, context * prompt, 1.0 - computes, sequences, kv]


def rough(
    prefill_rate: float,
    step: float,
    *,
    chunk: int,
    kv_bytes: int,
    peer_rate: float = 0.0,
    dram_rate: float = 0.0,
    ssd_rate: float = 0.0,
    weights_bytes: int = 0,
) -> Costs:
    """Costs from what a TE tells when it is up: prompt tokens a second of a full step, seconds of a decode step of one sequence;
    bytes a second to another TE and from the tiers (0: there is none); bytes of KV a token, and of the weights. A decode step
    reads the weights once and each sequence's KV once; what a token's arithmetic adds is what it costs in a prompt."""
    token = 1.0 / prefill_rate
    read = step / max(weights_bytes, 1) if weights_bytes else 0.0  # seconds a byte, where reading is all that a step does
    return Costs(
        p0=0.0,
        p1=token,
        d0=max(step - token, 0.0),
        d1=min(token, step),
        d2=read * kv_bytes,
        chunk=chunk,
        peer=kv_bytes / peer_rate if peer_rate else 0.0,
        dram=kv_bytes / dram_rate if dram_rate else 0.0,
        ssd=kv_bytes / ssd_rate if ssd_rate else 0.0,
    )


def fitted(start: Costs, steps: Iterable[Step]) -> Costs:
    """`start` with the numbers that explain some steps best, relative errors squared and none negative; a number that the steps
    don't tell of stays as it is."""
    seen = [s for s in steps if s.seconds > 0]
    if not seen:
        return start
    rows = np.array([parts(s.prompt, s.context, s.sequences, s.kv) for s in seen])
    weight = 1.0 / np.array([s.seconds for s in seen])
    rows, target = rows * weight[:, None], np.ones(len(seen))
    scale = np.linalg.norm(rows, axis=0)
    told = [int(i) for i in np.flatnonzero(scale > 0)]
    best: tuple[float, Floats, list[int]] | None = None
    # Which of seven numbers are nought in the best explanation without negative ones: all sets of them can be tried.
    for mask in range(1, 1 << len(told)):
        used = [i for at, i in enumerate(told) if mask >> at & 1]
        answer, _, rank, _ = np.linalg.lstsq(rows[:, used] / scale[used], target, rcond=1e-6)
        if rank < len(used) or answer.min() < 0:
            continue
        error = float(np.sum((rows[:, used] @ (answer / scale[used]) - target) ** 2))
        if best is None or error < best[0] * (1 - 1e-9):
            best = error, answer / scale[used], used
    if best is None:
        return start
    numbers = {NUMBERS[i]: 0.0 for i in told} | dict(zip((NUMBERS[i] for i in best[2]), map(float, best[1]), strict=True))
    return msgspec.structs.replace(start, **numbers)


# Of what was learnt, how much is kept from one step to the next: after 200 steps an old regime counts a third.
KEEP = 0.995
# What a new Learner thinks its start may be wrong by, as a part of each number.
DOUBT = 1.0
# Learnt numbers stay within this factor of those at the start: what is farther off is noise of another kind (a machine that
# slept, a step that was stopped), and a policy that believed it would send everything elsewhere.
BOUND = 16.0
# A step's relative error is taken for at most this.
OUTLIER = 3.0
# Weight of a new request's lengths, and of a TE's newest step, in their moving means.
LENGTH_WEIGHT, SLOW_WEIGHT = 0.02, 0.1
SLOWEST = 8.0  # a TE's steps take at most so many times what the costs say, and at least one part in so many
ALIKE = 1.5  # TEs whose paces differ from the mean by less than this factor are equally quick: steps vary by as much
PACE_MEMORY = 10.0  # seconds without a step after which a TE is taken for as quick as the others


class Learner:
    """`costs` as steps show them: recursive least squares on relative errors, which forgets and is bounded."""

    def __init__(self, start: Costs):
        self.costs = start
        self.requests = 0  # that have ended
        numbers = np.array([getattr(start, name) for name in NUMBERS])
        # A number that is nought at the start could become anything: it is given the scale at which it matters in a full step.
        whole = max(start.prefill(float(start.chunk)), start.d0)
        often = np.array(parts(start.chunk, start.chunk, 1.0, start.chunk))
        often[4] = 1.0
        self.scale = np.where(numbers > 0, numbers, whole / often / BOUND)
        self.low, self.high = np.where(numbers > 0, 1.0 / BOUND, 0.0), np.full(len(numbers), BOUND)
        self.theta = np.where(numbers > 0, 1.0, 0.0)
        self.doubt = np.eye(len(numbers)) * DOUBT**2

    def learn(self, step: Step) -> float:
        """A step was seen. How many times longer it took than was predicted, within bounds: what its TE's `slow` may follow."""
        predicted = self.costs.step(step.prompt, step.context, step.sequences, step.kv)
        if step.seconds <= 0 or predicted <= 0:
            return 1.0
        row = np.array(parts(step.prompt, step.context, step.sequences, step.kv)) * self.scale / step.seconds
        error = float(np.clip(1.0 - row @ self.theta, -OUTLIER, OUTLIER))
        towards = self.doubt @ row
        gain = towards / (KEEP + row @ towards)
        self.theta = np.clip(self.theta + gain * error, self.low, self.high)
        doubt = (self.doubt - np.outer(gain, towards)) / KEEP
        # What no step tells of must not become more doubtful than it was at first.
        excess = np.sqrt(np.maximum(np.diag(doubt) / DOUBT**2, 1.0))
        self.doubt = doubt / np.outer(excess, excess)
        numbers = dict(zip(NUMBERS, map(float, self.theta * self.scale), strict=True))
        self.costs = msgspec.structs.replace(self.costs, **numbers)
        return min(max(step.seconds / predicted, 1 / SLOWEST), SLOWEST)

    def ended(self, prompt: int, answer: int, found: int, crowd: float) -> None:
        """A request with so many tokens has ended; of its prompt so many were found in a cache. `crowd`: the view's, now."""
        self.requests += 1
        mean, weight = self.costs, max(LENGTH_WEIGHT, 1 / (self.requests + 1))  # the first guess counts as one
        self.costs = msgspec.structs.replace(
            mean,
            prompt=mean.prompt + weight * (max(prompt, 1) - mean.prompt),
            found=mean.found + weight * (found - mean.found),
            answer=mean.answer + weight * (max(answer, 1) - mean.answer),
            crowd=mean.crowd + weight * (crowd - mean.crowd),
        )


class Paces:
    """How much slower than the others each TE is. What slows all of them down alike is in the costs already, or soon will be; and
    a TE without work shows nothing, so what it showed last doesn't keep work from it for good."""

    def __init__(self) -> None:
        self.paces: dict[int, float] = {}  # TE -> how many times what the costs say its steps took, in the moving mean
        self.heard: dict[int, float] = {}  # ... and when its last one was; seconds of any clock

    def hear(self, te: int, times: float, now: float) -> None:
        """A step took so many times what the costs say."""
        usual = sum(self.paces.values()) / len(self.paces) if self.paces else times
        before = self.paces.get(te, usual)
        self.paces[te], self.heard[te] = before + SLOW_WEIGHT * (times - before), now

    def forget(self, te: int) -> None:
        self.paces.pop(te, None)
        self.heard.pop(te, None)

    def slow(self, now: float) -> dict[int, float]:
        """How many times longer than the mean of those that had steps of late each of them takes. The others: like the mean."""
        for te in [te for te, at in self.heard.items() if now - at > PACE_MEMORY]:
            self.forget(te)
        mean = sum(self.paces.values()) / max(len(self.paces), 1)
        found = {te: pace / mean for te, pace in self.paces.items()}
        return {te: 1.0 if 1 / ALIKE < slow < ALIKE else slow for te, slow in found.items()}
