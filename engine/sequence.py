"""A sequence, one sample of a task while it lives in this TE, and its share of a step. What a sequence counts:

known      ids we have: the prompt and what was generated
flying     1 while a launched step is going to sample for it
drafted    ids that step takes on trust after the known ones, to verify them
done       tokens whose KV is written, or will be by launched steps
committed  full blocks that are in RTC's prefix tree

0 .. done .. known + flying      the next step computes from `done`; reaching the end, it samples one more
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from engine.devices import Logprobs
from engine.rtc.wire import Found
from engine.speculate import NOTHING
from engine.types import Handover, SamplingParams, TokenLogprobs

# Prompt log-probabilities need logits of every prompt row: at 49 152 entries of 4 bytes, 128 rows are 25 MB.
SCORED_CHUNK = 128


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a task while it lives in this TE."""

    id: int
    params: SamplingParams
    ids: np.ndarray  # int32, room for prompt and output
    prompt: int  # tokens of the caller's prompt
    known: int
    begun: int  # what was known when it arrived
    limit: int  # ends when known reaches it
    stop_ids: frozenset[int]
    seed: int
    order: tuple[int, int]  # (priority, arrival): smaller goes first
    key: bytes  # root of its prefix keys
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as computed
    leader: Sequence | None = None  # sibling whose prefill this one waits for, to share its blocks
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    flying: int = 0
    drafted: int = 0
    trust: int = 0  # how long its next draft may be
    committed: int = 0
    cached: int = -1  # prompt tokens found cached at first admission; -1: not admitted yet
    started: float = 0.0
    epoch: int = 0  # grows when the sequence loses its blocks; a launched step of an older epoch computed nothing to keep
    ended: bool = False
    setup_sent: bool = False  # the device's sampling state for this slot is this sequence's
    expected: bool = False  # its KV is being brought from elsewhere: it has slot and blocks and is in no plan
    handover: Handover | None = None  # where it goes on, after its first token here or (moving) as soon as no step has it
    moving: bool = False
    gone: bool = False  # it was told that it has been handed over
    pushed: bool = False  # what was computed before its first step here is on its way too
    sent: bool = False  # DistFlow was given something of it
    torn: str = ""  # why a part of it isn't where it was to go; set by DistFlow's thread
    scores: list[TokenLogprobs | None] | None = None
    asked: int = 0  # how often the slower tiers were looked up for it
    asked_from: int = 0  # the block that the newest lookup began with
    asking: bool = False  # that lookup isn't answered
    found: Found | None = None  # what it found, pinned there
    dram: int = 0  # of `cached`, tokens loaded from there
    ssd: int = 0
    until: float = 0.0  # its blocks are to be kept with priority up to then; seconds, of Start.at's clock
    context: str = ""  # the explicit context to keep its prompt as

    @property
    def target(self) -> int:
        return self.known + self.flying

    @property
    def lent(self) -> bool:
        """Its blocks are another TE's, which shares its pool: this one computes in them and neither allocates nor frees."""
        return self.handover is not None and self.handover.how == "lent"

    @property
    def stays(self) -> int:
        """How many ids it has when it leaves this TE at the latest."""
        return self.limit if self.handover is None or self.moving else min(self.limit, self.begun + 1)


@dataclass(slots=True)
class Work:
    """A sequence's share of one step: tokens `start` to `start + count`; `sample` where that reaches the end.

    The last of the tokens may be a draft (int32 ids); then one more is sampled after each."""

    seq: Sequence
    start: int
    count: int
    sample: bool
    epoch: int
    draft: np.ndarray = field(default_factory=lambda: NOTHING)


Plan = list[Work]


def leader_is_through(leader: Sequence) -> bool:
    """The leader's prompt is computed (and so committed), or it left."""
    return leader.ended or leader.known > leader.prompt


def decodes(seq: Sequence) -> bool:
    """The next step computes one token of it and samples the next."""
    return seq.slot >= 0 and seq.target - seq.done == 1 and seq.target < seq.stays and seq.scores is None


def counts_ids(params: SamplingParams) -> bool:
    """Whether the device counts a sequence's ids for penalties. It counts whatever it samples, so a rejected draft would be
    counted too: such a sequence doesn't speculate."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def share(prefills: Iterable[Sequence], budget: int) -> list[tuple[Sequence, int]]:
    """Split a token budget over prefills. Of equal priority the shortest go first, so that the median prompt waits least; the one
    that came first is sure of a quarter, so that a long one, or one of low priority, moves on too."""
    want = [(s, min(s.target - s.done, SCORED_CHUNK) if s.scores is not None else s.target - s.done) for s in prefills]
    if not want:
        return []
    out = [0] * len(want)
    first = min(range(len(want)), key=lambda i: want[i][0].order[1])
    out[first] = min(want[first][1], -(-budget // 4))
    budget -= out[first]
    for i in sorted(range(len(want)), key=lambda i: (want[i][0].order[0], want[i][1])):
        more = min(want[i][1] - out[i], budget)
        out[i] += more
        budget -= more
    return [(s, count) for (s, _), count in zip(want, out, strict=True) if count > 0]


def scored_rows(work: Work) -> int:
    """Rows of a chunk whose next token is in the prompt."""
    return max(0, min(work.start + work.count, work.seq.prompt - 1) - work.start)


def token_logprobs(values: Logprobs, row: int, top: int) -> TokenLogprobs:
    return TokenLogprobs(
        float(values.chosen[row]), int(values.rank[row]), values.top_ids[row, :top].tolist(), values.top[row, :top].tolist()
    )
