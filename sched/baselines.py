"""What Algorithm 1 is compared with in simulations: the usual ways to pick a TE. The server has none of them. Pure.

All of them go by units: a colocated TE, or a prefill TE with whichever decode TE, or a semi pair.
"""

from __future__ import annotations

from random import Random

import numpy as np

from sched.policy import Ask, Choice, Tree
from sched.view import Floats, Slots, View, Way

UNITS: tuple[Way, ...] = ("colocated", "prefill", "semi")
# A queued prompt token weighs as much as this part of a sequence: some hundred prompt tokens take about as long as the steps
# between two arrivals.
TOKENS_A_SEQUENCE = 256


def units(view: View) -> Slots:
    """Slots of the TEs that prompts can be given to; prefill TEs only while there is one that decodes."""
    ways = [way for way in UNITS if way != "prefill" or len(view.candidates("decode"))]
    return np.concatenate([view.candidates(way) for way in ways])


def burden(view: View, slots: Slots) -> Floats:
    """What TEs have to do, in sequences."""
    return view.sequences[slots] + view.queued_tokens[slots] / TOKENS_A_SEQUENCE


def choice(view: View, slot: int, decode: int, why: str) -> Choice:
    """`decode`: the slot of the decode TE for a unit that is a prefill TE."""
    number = int(view.te[slot])
    if view.lender[slot] >= 0:
        return Choice(number, int(view.te[view.lender[slot]]), why, "semi")
    if slot in view.candidates("prefill"):
        return Choice(number, int(view.te[decode]), why, "pair")
    return Choice(number, number, why)


class RoundRobin:
    """One after the other; the decode TEs of pairs too, by themselves."""

    def __init__(self) -> None:
        self.turn = self.decode_turn = 0

    def __call__(self, ask: Ask, view: View, tree: Tree) -> Choice | None:
        slots = units(view)
        if not len(slots):
            return None
        self.turn += 1
        slot, decodes = int(slots[self.turn % len(slots)]), view.candidates("decode")
        found = choice(view, slot, int(decodes[self.decode_turn % len(decodes)]) if len(decodes) else -1, "next in turn")
        self.decode_turn += found.kind == "pair"
        return found


class Chance:
    """Any, as likely as another."""

    def __init__(self, seed: int):
        self.rng = Random(seed)

    def __call__(self, ask: Ask, view: View, tree: Tree) -> Choice | None:
        slots = units(view)
        if not len(slots):
            return None
        decodes = view.candidates("decode")
        decode = int(decodes[self.rng.randrange(len(decodes))]) if len(decodes) else -1
        return choice(view, int(slots[self.rng.randrange(len(slots))]), decode, "by chance")


def least_loaded(ask: Ask, view: View, tree: Tree) -> Choice | None:
    """The unit with the least to do."""
    return least(view, units(view), "least loaded")


def prefix_only(ask: Ask, view: View, tree: Tree) -> Choice | None:
    """The unit that has most of the prompt; of several the one with the least to do."""
    slots = units(view)
    keys = ask.keys[: (ask.prompt_tokens - 1) // tree.block_size]
    if keys and len(slots):
        had = np.zeros(len(view.te))
        found = tree.match(keys)
        had[view.slots_of(found.tes)] = found.blocks
        owners = np.where(view.lender[slots] >= 0, view.lender[slots], slots)  # of the KV that a unit computes in
        slots = slots[had[owners] == had[owners].max()]
    return least(view, slots, "longest prefix")


def least(view: View, slots: Slots, why: str) -> Choice | None:
    if not len(slots):
        return None
    decodes = view.candidates("decode")
    decode = int(decodes[burden(view, decodes).argmin()]) if len(decodes) else -1
    loads = burden(view, slots)
    # A unit's load is that of its TEs together.
    lent = view.lender[slots] >= 0
    loads = loads + np.where(lent, burden(view, np.where(lent, view.lender[slots], slots)), 0.0)
    if decode >= 0:
        loads = loads + np.where(np.isin(slots, view.candidates("prefill")), burden(view, np.array([decode])), 0.0)
    return choice(view, int(slots[loads.argmin()]), decode, why)
