"""What a TE and the keeper say to each other about the DRAM and SSD tiers, and what the TE's step loop is told of them.

Over a SOCK_SEQPACKET pair a TE asks, one message at a time, and waits for the answer where there is one. What comes about on the
TE's tier thread, or by the clock, is an `Event`: with several ranks the master's, which all take in before the same step."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from engine.rtc.cost import Costs, Tier

# Keys in one message: with their slots that is some 40 kB, well within a socket's buffer.
MOST_KEYS = 1024

# Instead of a slot:
FILE = -1  # in a file, or to be written to one
KNOWN = -2  # in the tier already: nothing to write
NOWHERE = -3  # there is no room: every slot is pinned or being written


class Msg(msgspec.Struct, tag=True, array_like=True, gc=False):
    pass


class Put(Msg):
    """Blocks that a TE would copy out. Answered by `Placed`."""

    keys: list[bytes]
    until: list[float]  # CLOCK_MONOTONIC seconds up to which each is to be kept
    leaving: bool = (
        False  # the TE has time to write files before it ends: nothing goes to DRAM, and DRAM's blocks go to files too
    )


class Stored(Msg):
    """The slots given for these keys are written."""

    keys: list[bytes]


class Match(Msg):
    """Which of these blocks, that follow each other, there are. Answered by `Matched`; those in DRAM are pinned until `Release`
    or the TE's death."""

    keys: list[bytes]


class Release(Msg):
    keys: list[bytes]


class Filed(Msg):
    """A block's file of so many bytes is there. Answered by `Unlink`."""

    key: bytes
    nbytes: int
    until: float


class Lost(Msg):
    """A block's file was not there, or torn, and is deleted."""

    key: bytes


ToPool = Put | Stored | Match | Release | Filed | Lost


class Fill(msgspec.Struct, array_like=True, gc=False):
    """How full the tiers of the box are, and what has left them since the last time that any TE was told."""

    dram_bytes: int = 0
    ssd_bytes: int = 0
    dram_evictions: int = 0  # blocks that left DRAM; also those that are in a file
    ssd_evictions: int = 0
    on_ssd: list[bytes] = []  # keys of blocks that are no longer in DRAM, but in a file
    gone: list[bytes] = []  # ... and that are nowhere any more


class Demoted(msgspec.Struct, array_like=True, gc=False):
    """A block to be written to a file out of its slot, which is pinned."""

    key: bytes
    slot: int
    generation: int
    until: float


class Placed(Msg):
    """For each key of a `Put` its slot and that slot's generation; and what is to go from DRAM to files."""

    slots: list[int]
    generations: list[int]
    demote: list[Demoted]
    fill: Fill


class Matched(Msg):
    """Slot and generation of each key of a `Match` up to the first that is nowhere."""

    slots: list[int]
    generations: list[int]
    fill: Fill


class Unlink(Msg):
    """Files that have to go, by name, oldest first."""

    names: list[str]
    fill: Fill


FromPool = Placed | Matched | Unlink


# ---- inside a TE ----------------------------------------------------------------------------------------------------


class Offer(NamedTuple):
    """Where a block can be had; slot FILE: in a file."""

    slot: int
    generation: int

    @property
    def tier(self) -> Tier:
        return "ssd" if self.slot == FILE else "dram"


class Found(Msg):
    """The answer to `look_up`: the first of the blocks asked for, up to one that is nowhere. Those in DRAM are pinned: `fetch` or
    `release` them all."""

    name: int
    keys: list[bytes]
    offers: list[Offer]


class Fetched(Msg):
    """The answer to `fetch`: so many of its blocks are there, the first ones, from each tier."""

    name: int
    blocks: dict[Tier, int]
    seconds: dict[Tier, float]


class Saved(Msg):
    """The answer to `swap_out`: the blocks are the step loop's again; `kept` are in a slower tier now."""

    blocks: list[int]
    kept: list[bool]


class Gone(Msg):
    """The keeper has died: there are no slower tiers any more."""


class Measured(Msg):
    """What the tiers and the prefill can do, as measured when the TE started: from now on they are used."""

    costs: Costs


class Stepped(Msg):
    """A step with so many tokens of prompts, of so many sequences, took so long."""

    prefill_tokens: int
    sequences: int
    seconds: float


Event = Found | Fetched | Saved | Gone | Measured | Stepped
