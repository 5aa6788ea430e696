"""Whether a request is taken in, and when a refused caller should come again. Pure.

What refuses: a key's own limits (`Quota`), a queue that is full, and a promise or a deadline that can't be kept, where the caller
would rather hear that at once (`out_of_reach`). Each says why, and after how many seconds it would be otherwise.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

# Bounds on Retry-After (seconds): less than one invites a hammering client, more than two minutes is a guess about another day.
SOONEST, LATEST = 1.0, 120.0
MINUTE = 60.0

Cause = Literal["rpm", "tpm", "tpm_never", "ttft", "tpot", "deadline"]


class Refusal(msgspec.Struct, frozen=True):
    """Why a request is not taken in."""

    cause: Cause
    message: str  # to a person
    retry_after: float  # seconds; infinite where waiting doesn't help


# ---- the queue ------------------------------------------------------------------------------------------------------


def queue_is_full(outstanding: int, new: int, te: int, max_num_seqs: int, max_queued: int) -> bool:
    """Whether `new` sequences would exceed what the TEs run at once plus the queue's bound. An idle server takes any
    one request."""
    return outstanding > 0 and outstanding + new > te * max_num_seqs + max_queued


def retry_after(waiting: int, finished_per_second: float) -> float:
    """Seconds until the sequences now waiting will have left, at the rate at which sequences have been ending."""
    if finished_per_second <= 0:
        return 5.0  # nothing has ended yet: no rate to go by
    return bounded(waiting / finished_per_second)


def bounded(seconds: float) -> float:
    return min(LATEST, max(SOONEST, seconds))


# ---- a key's limits -------------------------------------------------------------------------------------------------


CRUMBS = 1e-6  # of a unit: what came back in many small parts adds up to whole ones


class Bucket:
    """So many units a minute: a minute's worth is there at first, and what was taken comes back at a steady rate.

    What turns out to have cost more than was taken is owed: until it has come back, nothing can be taken."""

    __slots__ = ("at", "level", "size")

    def __init__(self, size: float, now: float):
        """`size`: units a minute, and the most there ever are. `now`: seconds, of any clock that never goes back."""
        self.size, self.level, self.at = size, size, now

    def fill(self, now: float) -> None:
        self.level = min(self.size, self.level + max(0.0, now - self.at) * self.size / MINUTE)
        self.at = max(self.at, now)

    def left(self, now: float) -> int:
        """Whole units that can be taken now; never fewer than none."""
        self.fill(now)
        return max(0, math.floor(self.level + CRUMBS))

    def wait(self, units: float, now: float) -> float:
        """Seconds until so many can be taken: 0 where they are there, infinite where there never are so many."""
        self.fill(now)
        if units > self.size:
            return math.inf
        lacking = units - self.level
        return lacking * MINUTE / self.size if lacking > CRUMBS else 0.0

    def until_full(self, now: float) -> float:
        """Seconds until it is as if nothing had been taken."""
        self.fill(now)
        return (self.size - self.level) * MINUTE / self.size

    def take(self, units: float, now: float) -> None:
        """Fewer than none are given back."""
        self.fill(now)
        self.level = min(self.size, self.level - units)


# Tokens that a request is expected to bring before the key has had any answer: a chat's usual length.
FIRST_GUESS = 256.0
# Each answer moves the guess this part of the way.
LEARNING = 0.1


class Claim(msgspec.Struct, frozen=True):
    """What was taken for one request."""

    prompt: int
    output: int  # expected

    @property
    def tokens(self) -> int:
        return self.prompt + self.output


class Quota:
    """Requests and tokens a minute of one key. Tokens are those of the prompts, cached or not, and of the outputs; a request
    takes what it is expected to need, and the difference is settled when it has ended."""

    def __init__(self, rpm: int | None, tpm: int | None, now: float):
        self.requests = None if rpm is None else Bucket(rpm, now)
        self.tokens = None if tpm is None else Bucket(tpm, now)
        self.usual = FIRST_GUESS  # tokens of an output, lately

    def claim(self, prompt: int, most: int | None, choices: int, now: float) -> Claim | Refusal:
        """Take what a request needs: `prompt` tokens in all, and for each of its choices an output, of at most `most` tokens
        where the caller says so. Takes nothing where it is refused."""
        output = math.ceil(min(self.usual, most) if most is not None else self.usual) * choices
        if self.requests is not None and (wait := self.requests.wait(1, now)):
            said = f"this key may make {self.requests.size:g} requests a minute; the next in {wait:.1f} s"
            return Refusal("rpm", said, wait)
        if self.tokens is not None:
            size = int(self.tokens.size)
            if prompt > size:
                said = f"the prompt has {prompt} tokens, and this key may use {size} a minute: send less, or have its tpm raised"
                return Refusal("tpm_never", said, math.inf)
            output = min(output, size - prompt)  # what it needs beyond that is owed
            if wait := self.tokens.wait(prompt + output, now):
                said = f"this key may use {size} tokens a minute and this request needs some {prompt + output}; {wait:.1f} s more"
                return Refusal("tpm", said, wait)
        if self.requests is not None:
            self.requests.take(1, now)
        if self.tokens is not None:
            self.tokens.take(prompt + output, now)
        return Claim(prompt, output)

    def settle(self, claim: Claim, output: int, choices: int, now: float) -> None:
        """A request has ended, after so many tokens of output."""
        if self.tokens is not None:
            self.tokens.take(output - claim.output, now)
        self.usual += LEARNING * (output / choices - self.usual)

    def undo(self, claim: Claim, now: float) -> None:
        """A request was not served after all."""
        if self.requests is not None:
            self.requests.take(-1, now)
        if self.tokens is not None:
            self.tokens.take(-claim.tokens, now)


# ---- promises -------------------------------------------------------------------------------------------------------


class Targets(msgspec.Struct, frozen=True):
    """What a request is promised, or its caller wants: milliseconds, None where nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    left_ms: float | None = None  # until its deadline


def out_of_reach(
    targets: Targets, ttft_ms: float, tpot_ms: float, running: int = 0, finished_per_second: float = 0.0
) -> Refusal | None:
    """The refusal of a request that would come too late, from what is predicted for it where it would run.

    A first token comes sooner when others' prompts have been computed, which takes as long as it takes. Tokens follow each other
    faster when some of the `running` sequences have ended: about as many as the prediction is above the target."""
    if targets.left_ms is not None and ttft_ms > targets.left_ms:
        said = f"its first token is predicted in {ttft_ms:.0f} ms, after the deadline in {max(0.0, targets.left_ms):.0f} ms"
        return Refusal("deadline", said, bounded((ttft_ms - targets.left_ms) / 1e3))
    if targets.ttft_ms is not None and ttft_ms > targets.ttft_ms:
        said = f"its first token is predicted in {ttft_ms:.0f} ms, and wanted within {targets.ttft_ms:.0f} ms"
        return Refusal("ttft", said, bounded((ttft_ms - targets.ttft_ms) / 1e3))
    if targets.tpot_ms is not None and tpot_ms > targets.tpot_ms:
        said = f"{tpot_ms:.0f} ms a token are predicted, and {targets.tpot_ms:.0f} ms wanted"
        too_many = math.ceil(running * (1 - targets.tpot_ms / tpot_ms))
        return Refusal("tpot", said, retry_after(too_many, finished_per_second))
    return None
