"""How many TEs of one model and role there should be (pure): up at once when requests wait, down slowly, and never to and fro.

Each look brings `Signals`, and `decide` answers with a target and a reason. What is carried from look to look is in `Memory`, a
value like the others. Three numbers are made of the signals, each a count of TEs:

    needed      what the load asks for: sequences against slots, the predicted wait, the KV cache, missed promises
    kept        the same with more room to spare, and what the throughput asks for: fewer must not even be considered
    target      what there is now, or `needed` where that is more, or after a calm time somewhat less, but never less than `kept`

Between `needed` and `kept` lies the hysteresis: a load that just fits stays where it is. `kept` counts by its peak over at least
a calm time, so noise that comes again within one doesn't lead down; and a step down that has to be taken back soon doubles the
calm time, so what comes at longer intervals leads up and down ever more rarely.

Seconds are of whatever clock `Signals.now` is read from. Nothing here starts or ends a TE: the caller brings up what is lacking,
and drains those that `leaving` names before it ends them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from engine.config import Role

# ---- when there are too few -----------------------------------------------------------------------------------------

# Of the slots (max_num_seqs) that may be taken before more TEs are asked for. A new one takes 0.1 to some seconds to come, in
# which the rest of the slots take what arrives.
FULL = 0.8
# Of the KV cache: beyond, sequences are soon swapped out or computed again, which costs more than another TE.
KV_FULL = 0.9
KV_AFTERWARDS = 0.75  # what is aimed at then
# Seconds that a new request may be expected to wait until its prompt is begun. About what a TE takes to come up from a running
# one: for a shorter wait it would come too late.
WAIT = 0.5
# Of the promises (SLOs) seen lately that may be missed: a P95 promise is kept when no more are.
MISSED = 0.05
# With fewer requests (or tokens) a share of them means nothing: one miss of 20 is what a promise allows.
MEANS_SOMETHING = 20
# Seconds over which misses are remembered. Longer than a burst of prompts, shorter than a person waits for things to get better.
MISS_MEMORY = 10.0
# Seconds from when the last ordered TE is there until misses count again: those who waited before it came miss their promise yet.
SETTLE = 3.0
# One look may multiply the TEs by so many. Enough for a tenfold jump in two looks; a wait predicted from one odd moment
# doesn't take the whole machine.
GROWTH = 4
# ... and so many times as many are needed at once for a look to be believed alone. Less must be seen twice in a row.
SURE = 2.0

# ---- when there are too many ----------------------------------------------------------------------------------------

ROOMY = 0.6  # of the slots that may be taken with fewer TEs
KV_ROOMY = 0.6
WAIT_NONE = 0.1  # seconds: with a longer wait all TEs are of use
MISSED_NONE = 0.01  # with more misses too
# Of the throughput that a TE was seen to have when requests waited (its capacity). The queue of a server that is busy for 0.7 of
# the time is 2.3 sequences long on average, at 0.9 it is 9.
BUSY = 0.7
# Seconds of calm before there may be fewer. Bringing a TE back costs a second; keeping it costs its memory only.
CALM = 30.0
# Seconds between two steps down: what a step has done to the wait shows by then.
COOL_DOWN = 10.0
# One step down takes this part of the TEs, and at least one.
STEP_DOWN = 0.25
# A step down was wrong if more TEs are wanted within so many calm times. The calm time is then doubled, up to PATIENCE_MOST times
# the usual; a step down that lasts halves it.
REGRET = 4
PATIENCE_MOST = 16
# Seconds over which the throughput is averaged: some arrivals even of a slow model.
RATE_MEMORY = 10.0
# Seconds over which a capacity that was seen fades: prompts get longer or shorter in the course of a day.
CAPACITY_MEMORY = 600.0
# Seconds of one TE that a capacity must have been seen in to count: a shorter look may fall between two first tokens.
CAPACITY_SEEN = 2.0


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """What is seen of one model's TEs of one role. Counts of the last look are what has happened since it."""

    now: float  # seconds
    ready: int
    starting: int
    queued: int  # sequences that wait for a slot, or are held because there is no TE
    running: int  # sequences that have one
    slots: int  # of one TE: max_num_seqs
    predicted_wait_s: float = 0.0  # of a request that comes now, until its prompt is begun
    kv_usage: float = 0.0  # 0 to 1: of the KV cache of the TEs that are ready, what running sequences hold
    ttft_misses: int = 0  # first tokens since the last look that came later than promised
    ttft_total: int = 0  # all first tokens since then, also where nothing is promised
    tpot_misses: int = 0  # tokens after the first
    tpot_total: int = 0
    idle_s: float = 0.0  # since the last request ended or came
    draining: int = 0  # TEs that are on their way out, counted in none of the above
    role: Role = "colocated"


class Bounds(msgspec.Struct, frozen=True):
    min_te: int
    max_te: int
    keep_alive: float | None  # seconds without a request until there are min_te only; None: never fewer than one


class Memory(msgspec.Struct, frozen=True):
    """What the next look must know. `Memory()` is that of a model that was never looked at."""

    target: int = -1  # -1: nothing is decided
    asked: int = -1  # what a person asked for last, -1: nothing. The bounds reach as far
    now: float = -math.inf  # of the last look
    ready: int = 0  # TEs then
    short: bool = False  # more were needed then, but not so many that one look was enough
    went_up: float = -math.inf
    went_down: float = -math.inf
    settled: float = -math.inf  # since when all that were ordered are there
    ttft: tuple[float, float] = (0.0, 0.0)  # promises missed and seen, fading
    tpot: tuple[float, float] = (0.0, 0.0)
    rate: float = 0.0  # first tokens a second; of decode TEs: tokens
    # What was done while there was more to do than the TEs could, and the seconds of one TE it took; fading.
    overloaded: tuple[float, float] = (0.0, 0.0)
    # The peak of `kept` in this calm time, in the one before, and when this one began.
    peak: int = 0
    peak_before: int = 0
    calm_began: float = -math.inf
    patience: float = 1.0  # calm times as long as CALM is times this

    @property
    def missed(self) -> float:
        """The part of the promises lately seen that was missed, of the one of the two that is kept less."""
        return max(missed / total if total >= MEANS_SOMETHING else 0.0 for missed, total in (self.ttft, self.tpot))

    @property
    def capacity(self) -> float:
        """The throughput that one TE was seen to have when it had more to do; 0: not seen."""
        done, seconds = self.overloaded
        return done / seconds if seconds >= CAPACITY_SEEN else 0.0


class Decision(msgspec.Struct, frozen=True):
    target: int
    reason: str
    memory: Memory


# ---- the decision ---------------------------------------------------------------------------------------------------


def decide(signals: Signals, bounds: Bounds, memory: Memory) -> Decision:
    """How many TEs there should be from now on, those that start included."""
    s, there = signals, signals.ready + signals.starting
    if memory.asked >= 0:
        bounds = Bounds(min(bounds.min_te, memory.asked), max(bounds.max_te, memory.asked), bounds.keep_alive)
    base = clamp(memory.target if memory.target >= 0 else there, bounds)
    if memory.target < 0:
        memory = msgspec.structs.replace(memory, peak=base, calm_began=s.now)
    seen = watch(s, base, memory)

    def answer(target: int, reason: str, after: Memory) -> Decision:
        return Decision(target, reason, msgspec.structs.replace(after, target=target))

    if base == 0 and s.queued == 0:
        return answer(0, "asleep, and nobody asks", seen)
    idle = not (s.queued or s.running)
    if idle and bounds.keep_alive is not None and s.idle_s >= bounds.keep_alive:
        if base <= bounds.min_te:
            return answer(base, f"idle for {s.idle_s:.0f} s, at its least", seen)
        why = f"{base} to {bounds.min_te}: no request for {s.idle_s:.0f} s (keep-alive is {bounds.keep_alive:g} s)"
        return answer(bounds.min_te, why, msgspec.structs.replace(seen, short=False))

    kept, use = keeps(s, base, seen)
    if s.now - seen.calm_began >= CALM * seen.patience:
        seen = msgspec.structs.replace(seen, peak_before=seen.peak, peak=0, calm_began=s.now)
    seen = msgspec.structs.replace(seen, peak=max(seen.peak, kept))
    needed, why = needs(s, base, seen)
    up = clamp(min(needed, GROWTH * max(base, 1)), bounds)
    if up > base:
        if base == 0 or needed >= SURE * base or memory.short:
            return answer(up, f"{base} to {up}: {why}", went_up(seen, s.now, up))
        return answer(base, f"{base}, perhaps {up}: {why}", msgspec.structs.replace(seen, short=True))

    seen = msgspec.structs.replace(seen, short=False)
    if needed > base:
        return answer(base, f"{base}, the most there may be: {why}", seen)
    least = max(bounds.min_te, 1)  # only keep-alive leads to none
    lower = max(seen.peak, seen.peak_before, base - max(1, int(base * STEP_DOWN)), least)
    if kept >= base or base <= least:
        return answer(base, f"{base}: {use}", seen)
    if lower >= base:
        return answer(base, f"{base}: {kept} would do now, not all of the time", seen)
    if s.draining:
        return answer(base, f"{base}: {lower} would do, when those that drain are gone", seen)
    if s.now - seen.went_down < COOL_DOWN:
        return answer(base, f"{base}: {lower} would do, a step down was taken {s.now - seen.went_down:.0f} s ago", seen)
    why = f"{base} to {lower}: no more were of use in {CALM * seen.patience:.0f} s"
    return answer(lower, why, went_down(seen, s.now))


def told(memory: Memory, target: int, now: float) -> Memory:
    """A person has asked for `target` TEs: it stays so for a calm time at least, unless more are needed. The bounds are wider
    from then on, where they have to be."""
    after = went_up(memory, now, target)
    return msgspec.structs.replace(after, target=target, asked=target, patience=memory.patience)


def clamp(count: int, bounds: Bounds) -> int:
    return max(bounds.min_te, min(count, bounds.max_te))


# ---- what the signals ask for ---------------------------------------------------------------------------------------


def needs(s: Signals, base: int, memory: Memory) -> tuple[int, str]:
    """TEs that the load asks for, and why. Grows with each signal, and 0 where there is no load."""
    asked = [(0, "nothing asks for more")]
    sequences = s.queued + s.running
    asked.append(
        (math.ceil(sequences / (FULL * s.slots)), f"{sequences} sequences, {s.queued} of them waiting, on {s.slots} slots a TE")
    )
    if s.queued:
        asked.append((1, f"{s.queued} sequences wait"))
    if s.ready and s.predicted_wait_s > WAIT:
        # What waits is worked off in proportion to the TEs.
        asked.append(
            (math.ceil(s.ready * min(s.predicted_wait_s / WAIT, 1e6)), f"a request would wait for {s.predicted_wait_s:.2g} s")
        )
    if s.kv_usage > KV_FULL:
        asked.append((math.ceil(s.ready * s.kv_usage / KV_AFTERWARDS), f"{s.kv_usage:.0%} of the KV cache in use"))
    if memory.missed > MISSED:
        asked.append((base + max(1, base // 2), f"{memory.missed:.0%} of promises missed"))
    return max(asked, key=lambda a: a[0])


def keeps(s: Signals, base: int, memory: Memory) -> tuple[int, str]:
    """TEs that are of use, and what for."""
    asked = [(0, "nothing to do")]
    sequences = s.queued + s.running
    asked.append((math.ceil(sequences / (ROOMY * s.slots)), f"{sequences} sequences on {s.slots} slots a TE"))
    asked.append((math.ceil(s.ready * s.kv_usage / KV_ROOMY), f"{s.kv_usage:.0%} of the KV cache in use"))
    if memory.capacity:
        load = math.ceil(memory.rate / (BUSY * memory.capacity))
        asked.append((min(load, base), f"{memory.rate:.3g} a second, and a TE was seen to do {memory.capacity:.3g}"))
    waits = sequences > s.slots * s.ready or s.predicted_wait_s > WAIT_NONE
    if waits or memory.missed > MISSED_NONE:
        asked.append((base, "requests wait" if waits else f"{memory.missed:.1%} of promises missed"))
    return max(asked, key=lambda a: a[0])


def watch(s: Signals, base: int, memory: Memory) -> Memory:
    """The memory with what this look shows: misses, throughput, capacity."""
    passed = max(0.0, s.now - memory.now)
    settled = memory.settled
    if s.starting or s.ready < base:
        settled = math.inf
    elif settled == math.inf:
        settled = s.now
    # Prefill TEs are judged by first tokens, decode TEs by the others; what does both, by both.
    ttft, tpot = (0.0, 0.0), (0.0, 0.0)
    if s.now - settled >= SETTLE:
        fade = math.exp(-passed / MISS_MEMORY)
        if s.role != "decode":
            ttft = (memory.ttft[0] * fade + s.ttft_misses, memory.ttft[1] * fade + s.ttft_total)
        if s.role != "prefill":
            tpot = (memory.tpot[0] * fade + s.tpot_misses, memory.tpot[1] * fade + s.tpot_total)
    seen = msgspec.structs.replace(memory, now=s.now, ready=s.ready, settled=settled, ttft=ttft, tpot=tpot)
    if not 0 < passed < math.inf:
        return seen
    work = s.tpot_total if s.role == "decode" else s.ttft_total
    fade = math.exp(-passed / RATE_MEMORY)
    rate = memory.rate * fade + work / passed * (1 - fade)
    fade = math.exp(-passed / CAPACITY_MEMORY)
    done, seconds = memory.overloaded[0] * fade, memory.overloaded[1] * fade
    full = s.queued > 0 and s.running >= s.slots * s.ready
    worked = min(s.ready, memory.ready)  # who is new has had no time to
    if worked and (full or s.predicted_wait_s > WAIT or seen.missed > MISSED):
        done, seconds = done + work, seconds + worked * passed
    return msgspec.structs.replace(seen, rate=rate, overloaded=(done, seconds))


# ---- what is remembered of a change ---------------------------------------------------------------------------------


def went_up(memory: Memory, now: float, target: int) -> Memory:
    patience = memory.patience
    if now - memory.went_down < REGRET * CALM * patience:
        patience = min(PATIENCE_MOST, 2 * patience)
    return msgspec.structs.replace(
        memory,
        short=False,
        went_up=now,
        went_down=-math.inf,  # taken back once, it is not counted again
        settled=math.inf,
        ttft=(0.0, 0.0),
        tpot=(0.0, 0.0),
        peak=max(memory.peak, target),
        calm_began=now,
        patience=patience,
    )


def went_down(memory: Memory, now: float) -> Memory:
    lasted = now - max(memory.went_up, memory.went_down) > REGRET * CALM * memory.patience
    patience = max(1.0, memory.patience / 2) if lasted else memory.patience
    return msgspec.structs.replace(memory, short=False, went_down=now, ttft=(0.0, 0.0), tpot=(0.0, 0.0), patience=patience)


# ---- who goes -------------------------------------------------------------------------------------------------------


class Resident(msgspec.Struct, frozen=True):
    """A TE that could be drained."""

    te: int
    sequences: int  # that it has to finish, or others to take over
    lends_to: tuple[int, ...] = ()  # TEs that compute in its memory: they can't outlive it


def leaving(residents: Sequence[Resident], count: int) -> list[int]:
    """The `count` TEs to drain: those with the least to do, the youngest among equals, and none that lends memory to one that
    stays. Fewer where that leaves no others."""
    gone: list[int] = []
    while len(gone) < count:
        able = [r for r in residents if r.te not in gone and all(borrower in gone for borrower in r.lends_to)]
        if not able:
            break
        gone.append(min(able, key=lambda r: (r.sequences, -r.te)).te)
    return gone
