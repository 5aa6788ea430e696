"""Where a task runs: Algorithm 1 of the paper, and the same terms as one comparison in predicted milliseconds. Pure.

A task is an `Ask`; what is known of the TEs is a `View` (columns), a prompt tree, a heat map and the costs of steps. `choose`
gives a `Choice` with its reason, or None where nothing can take the task now. The server and the simulator call the same
function.

    paper    the paper's order (ATC'25, Algorithm 1): the heat map picks the type of TE; among those, where the load is balanced,
             the longest reusable prefix picks the TE, else the least load does
    cost     every TE, and pair, for what it would cost: the wait for its turn, loading or computing the prompt, bringing it to
             the other TE, decoding, what all that costs the tasks that run there, and what was promised and would be missed

What the paper's order can't do, `cost` does: it leaves a type of TE that is overloaded, and counts a prefix wherever it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import msgspec
import numpy as np

from sched.costs import Costs, Reuse, reuse
from sched.view import Floats, Slots, View, Way

Order = Literal["paper", "cost"]
# "colocated": one TE. "pair": a prefill TE and a decode TE. "semi": two workers of one device, in one KV pool. "prompt": one TE
# of whatever type that computes prompts, for a task that is little more than a prompt.
Kind = Literal["colocated", "pair", "semi", "prompt"]
Split = Literal["disaggregated", "semi"]  # what the heat map compares with colocated

# A value of the heat map, times its confidence, that is taken for nought: the load decides then.
UNDECIDED = 0.02
# The exponent of the heat map's ratio of completion times in predicted ones. Only a half: much of what it measured, that prompts
# hold up the decodes beside them, is predicted for the case at hand.
HEAT = 0.5
# What isn't predicted for each task to come. A second of waiting costs so many seconds more, and a second of computing prompts,
# for each sequence that a TE has in the mean, little where little runs: what is computed once more than it need be is missing to
# everybody. And who comes while a queue lasts stands behind all that is in it: a queue at which a TE is busy for 3/4 of the time
# lasts 4 times as long as what is in it now. Found by simulation (docs/scheduling.md): with less of the first two a full cluster
# loses its prefixes, with more the pairs idle while colocated TEs fill up. Twice or half of any makes little difference.
WAIT, WORK, QUEUE = 0.2, 2.0, 4.0
# What a second costs by which a promise is missed, besides itself.
MISSED = 1.0
# Predictions that differ by less than this part of the time to the first token are equal: the TE that was given nothing for
# longest is taken, so that prompts spread over all caches. No choice is predicted to cost more than the best one by more.
TOLERANCE = 0.02

# ---- what is asked and answered -----------------------------------------------------------------------------------------


class Length(Protocol):
    """Tokens that an answer will have: sched.predict's `Predicted`."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def confidence(self) -> float: ...


class Match(Protocol):
    """What there is of a prompt: sched.prompt_tree's."""

    @property
    def tes(self) -> Slots: ...
    @property
    def blocks(self) -> Slots: ...
    @property
    def tiers(self) -> Slots: ...


class Tree(Protocol):
    @property
    def block_size(self) -> int: ...
    def match(self, keys: Sequence[bytes]) -> Match: ...


class Heat(Protocol):
    def value(self, prefill: int, decode: int, kind: Split) -> tuple[float, float]: ...


class Ask(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A task that wants a place."""

    prompt_tokens: int
    answer: Length
    keys: Sequence[bytes] = ()  # of the prompt's full blocks
    ttft_slo: float | None = None  # seconds from now on that are promised until its first token
    tpot_slo: float | None = None  # ... and from each token to the next
    home: int = -1  # the TE that has the explicit context that the prompt begins with
    home_tokens: int = 0  # ... and that context's length
    together: bool = False  # one TE is to do all of it, since it is little more than a prompt


class Choice(msgspec.Struct, frozen=True):
    """`prefill` computes the prompt, `decode` the rest: one TE, or two, by their numbers."""

    prefill: int
    decode: int
    reason: str
    kind: Kind = "colocated"
    predicted_ttft_ms: float = 0.0
    predicted_tpot_ms: float = 0.0
    cached_tokens: int = 0  # of the prompt: need not be computed


class Place(NamedTuple):
    """A choice by slots, and why."""

    kind: Kind
    prefill: int
    decode: int
    cost: float  # seconds, of what its order goes by
    why: str = ""


def choose(ask: Ask, view: View, tree: Tree, heat: Heat, costs: Costs, order: Order) -> Choice | None:
    """The TE, or the two, that `ask` is given to. None where nothing can take it now."""
    kinds = there(view, ask.together)
    if not kinds:
        return None
    outlook = Outlook(ask, view, tree, costs)
    place = dist_sched(outlook, heat, kinds) if order == "paper" else cheapest(outlook, heat, kinds)
    return outlook.choice(place)


def there(view: View, together: bool) -> list[Kind]:
    """The kinds of places that can take a task."""
    if together:
        return ["prompt"] if len(view.candidates("prompt")) else []
    kinds: list[Kind] = ["colocated"] if len(view.candidates("colocated")) else []
    if len(view.candidates("prefill")) and len(view.candidates("decode")):
        kinds.append("pair")
    if len(view.candidates("semi")):
        kinds.append("semi")
    return kinds


# ---- Algorithm 1 --------------------------------------------------------------------------------------------------------


def dist_sched(outlook: Outlook, heat: Heat, kinds: list[Kind]) -> Place:
    """The paper's `dist_sched`. It doesn't say how the halves of a pair are picked: here, each like a TE."""
    kinds, why = pd_aware(outlook.ask, heat, kinds)
    places = [narrow(outlook, kind) for kind in kinds]
    # Between types the paper has the heat map. Where that is undecided, what one has of the prompt counts too.
    place = min(places, key=lambda p: p.cost + outlook.until_there(p)) if len(places) > 1 else places[0]
    return place._replace(why=f"{why}; {place.why}")


def pd_aware(ask: Ask, heat: Heat, kinds: list[Kind]) -> tuple[list[Kind], str]:
    """The paper's `PD_aware`: the type of TE, by the heat map. Several where that is undecided."""
    if len(kinds) == 1:
        return kinds, f"{kinds[0]}: nothing else takes tasks"
    gains = {kind: gain(ask, heat, kind) for kind in kinds if kind != "colocated"}
    best = max(gains, key=lambda kind: gains[kind])
    said = f"heat map {gains[best]:+.2f} at {ask.prompt_tokens} + {ask.answer.mean:.0f} tokens"
    if gains[best] > UNDECIDED:
        return [best], f"{best}: {said}"
    if gains[best] < -UNDECIDED and "colocated" in kinds:
        return ["colocated"], f"colocated: {said}"
    return kinds, f"load decides: {said}"


def narrow(outlook: Outlook, kind: Kind) -> Place:
    """The rest of the paper's `dist_sched`: the balance test, then locality or load, within one type."""
    if kind == "pair":
        (prefill, one, why), (decode, other, and_why) = narrowed(outlook, "prefill"), narrowed(outlook, "decode")
        return Place(kind, prefill, decode, one + other, f"{why}; {and_why}")
    slot, load, why = narrowed(outlook, kind)
    return Place(kind, slot, outlook.decodes(kind, slot), load, why)


def narrowed(outlook: Outlook, part: Way) -> tuple[int, float, str]:
    """(slot, load, why) of the TE for a part of the task."""
    slots, loads = outlook.view.candidates(part), outlook.load(part)
    if is_load_balanced(loads, outlook.whole):
        slots, loads, saved = locality_aware(slots, loads, outlook.saved(part))
        how = f"load balanced, longest prefix saves {1e3 * saved:.0f} ms" if saved else "load balanced, no prefix"
    else:
        how = "load not balanced"
    at = load_aware(loads, outlook.view.last, slots)
    slot, load = int(slots[at]), float(loads[at])
    return slot, load, f"{how}: TE {outlook.view.te[slot]} with {1e3 * load:.0f} ms to do"


def is_load_balanced(loads: Floats, whole: float) -> bool:
    """The paper doesn't say when. Here: the busiest TE has not so much more to do than the mean that the longest prefix, which
    saves computing the `whole` prompt, would be too dear there."""
    return bool(loads.max() - loads.mean() <= whole)


def locality_aware(slots: Slots, loads: Floats, saved: Floats) -> tuple[Slots, Floats, float]:
    """The paper's `locality_aware`: those that save most seconds by what they have of the prompt; with their loads."""
    most = saved.max()
    best = saved == most
    return slots[best], loads[best], float(most)


def load_aware(loads: Floats, last: Floats, slots: Slots) -> int:
    """The paper's `load_aware`: the index of the least load."""
    return longest_waiting(loads, 0.0, last, slots)


# ---- the same terms as one comparison -----------------------------------------------------------------------------------


def cheapest(outlook: Outlook, heat: Heat, kinds: list[Kind]) -> Place:
    """The place with the least predicted cost."""
    gains = [0.0 if kind == "colocated" or len(kinds) == 1 else gain(outlook.ask, heat, kind) for kind in kinds]
    places = [offer(outlook, kind, 1.0 - (1.0 + one) ** -HEAT) for kind, one in zip(kinds, gains, strict=True)]
    places.sort(key=lambda p: p.cost)
    said = [f"{p.kind} {1e3 * p.cost:.0f} ms" for p in places]
    return places[0]._replace(why=f"least cost: {', '.join(said)}")


def offer(outlook: Outlook, kind: Kind, quicker: float) -> Place:
    """The best place of a kind. `quicker`: the part of the time on the TEs that the heat map takes off."""
    if kind == "pair":
        return best_pair(outlook, quicker)
    slots, last = outlook.view.candidates(kind), outlook.view.last
    costs, first = outlook.cost(kind, quicker)
    if outlook.ask.ttft_slo is not None:
        costs = costs + MISSED * np.maximum(first - outlook.ask.ttft_slo, 0.0)
    at = longest_waiting(costs, TOLERANCE * least(first), last, slots)
    slot = int(slots[at])
    return Place(kind, slot, outlook.decodes(kind, slot), float(costs[at]))


def best_pair(outlook: Outlook, quicker: float) -> Place:
    """The prefill TE and the decode TE that cost least together. Their costs add up, so each half is picked by itself. Only a
    missed promise is of both: where the best halves miss it, those that are best with its price on all of the time are looked at
    too."""
    view, slo = outlook.view, outlook.ask.ttft_slo
    prefills, decodes = view.candidates("prefill"), view.candidates("decode")
    (a, first), (b, reserved) = outlook.cost("prefill", quicker), outlook.cost("decode", quicker)
    best: Place | None = None
    for price in (0.0, MISSED):
        near = TOLERANCE / 2 * least(first)
        i = longest_waiting(a + price * first if price else a, near, view.last, prefills)
        j = longest_waiting(b + price * reserved if price else b, near, view.last, decodes)
        late = max(0.0, float(first[i] + reserved[j]) - slo) if slo is not None else 0.0
        cost = float(a[i] + b[j]) + MISSED * late
        if best is None or cost < best.cost:
            best = Place("pair", int(prefills[i]), int(decodes[j]), cost)
        if not late:
            break
    assert best is not None
    return best


def longest_waiting(values: Floats, near: float, last: Floats, slots: Slots) -> int:
    """The index of the least value, to within `near`: of several the TE that was given nothing for longest, then the lowest
    slot."""
    close = (values <= least(values) + near).nonzero()[0]
    return int(close[last[slots[close]].argmin()]) if len(close) > 1 else int(close[0])


def least(values: Floats) -> float:
    return float(values[values.argmin()])  # several times as quick as `min`


def gain(ask: Ask, heat: Heat, kind: Kind) -> float:
    """JCT(colocated) / JCT(kind) - 1 as far as the heat map is believed. An answer's length that is not sure counts as a short
    and a long one too."""
    split: Split = "semi" if kind == "semi" else "disaggregated"

    def at(answer: float) -> float:
        value, confidence = heat.value(ask.prompt_tokens, round(answer), split)
        return value * confidence

    answer = ask.answer
    if answer.confidence >= 1.0 or answer.low == answer.high:
        return at(answer.mean)
    return answer.confidence * at(answer.mean) + (1.0 - answer.confidence) * (at(answer.low) + at(answer.high)) / 2


# ---- what each TE would make of the task --------------------------------------------------------------------------------


class Outlook:
    """Predictions for one task on each TE: columns of seconds and tokens, by slot."""

    def __init__(self, ask: Ask, view: View, tree: Tree, costs: Costs):
        tokens = ask.prompt_tokens
        self.ask, self.view, self.costs = ask, view, costs
        self.whole = costs.prefill(float(tokens))  # seconds to compute the prompt where nothing of it is there
        self.load_seconds, self.compute, self.cached = self.had(tree)
        busy = costs.predict_busy(view)
        self.tpot = costs.predict_tpot(view, tokens, busy)
        self.wait = costs.predict_wait(view, tokens, busy, self.tpot)
        self.own = costs.predict_prefill(view, self.compute, tokens - self.cached, busy)
        self.first = self.wait + self.load_seconds + self.own  # until the first token
        self.rest = max(ask.answer.mean - 1.0, 0.0) * self.tpot  # until the last one

    @cached_property
    def asked(self) -> Floats:
        """What the prompt costs all tasks. Those that were there before wait while it is computed: those before it in the queue
        are decoding by then."""
        waits = (WAIT * self.costs.crowd) * self.wait
        return self.first + waits + self.held_up(self.view.sequences, self.wait) * self.own

    @cached_property
    def after(self) -> Floats:
        """... and the rest of the answer: each step of those that are there is longer by one more sequence."""
        ask, view, costs, answer = self.ask, self.view, self.costs, max(self.ask.answer.mean, 1.0)
        longer = min(answer, costs.answer) * (costs.d1 + costs.d2 * ask.prompt_tokens)
        after: Floats = self.rest + longer * view.sequences * view.slow
        if ask.tpot_slo is not None:
            after = after + MISSED * (answer - 1.0) * np.maximum(self.tpot - ask.tpot_slo, 0.0)
        return after

    def held_up(self, sequences: Floats, wait: Floats) -> Floats:
        """How many other tasks each second of computing the prompt delays, where so many are and it waits so long."""
        return sequences + WORK * self.costs.crowd + (QUEUE * self.costs.arrivals) * wait

    def had(self, tree: Tree) -> Reuse:
        """What of the prompt needs no computing, on each TE."""
        ask, view, room = self.ask, self.view, len(self.view.te)
        # One place more than there are slots: -1, the slot of TEs that are gone, is that.
        load, compute, cached = np.zeros(room + 1), np.full(room + 1, self.whole), np.zeros(room + 1)
        keys = ask.keys[: (ask.prompt_tokens - 1) // tree.block_size]  # one token is always computed
        if keys:
            found = tree.match(keys)
            slots, held = view.slots_of(found.tes), found.blocks * float(tree.block_size)
            if found.tiers.any():
                behind = found.tiers * float(tree.block_size)
                held = np.append(held, 0.0)  # the last row: everybody else
                on = reuse(self.costs, ask.prompt_tokens, held, behind[:, 0], behind[:, 1])
                for column, each in zip((load, compute, cached), on, strict=True):
                    column[:] = each[-1]
                    column[slots] = each[:-1]
            elif len(slots) > len(keys):  # there are fewer lengths that a prefix can have
                lengths = np.arange(len(keys) + 1) * float(tree.block_size)
                compute[slots] = self.costs.prefill(ask.prompt_tokens - lengths, lengths).take(found.blocks)
                cached[slots] = held
            elif len(slots):
                compute[slots], cached[slots] = self.costs.prefill(ask.prompt_tokens - held, held), held
        home, held_there = view.slots.get(ask.home, -1), float(min(ask.home_tokens, ask.prompt_tokens - 1))
        if home >= 0 and held_there > cached[home]:
            load[home], cached[home] = 0.0, held_there
            compute[home] = self.costs.prefill(ask.prompt_tokens - held_there, held_there)
        return Reuse(load[:-1], compute[:-1], cached[:-1])

    def decodes(self, kind: Kind, slot: int) -> int:
        """The slot of the TE that decodes what this one computes, where that isn't a choice of its own."""
        return int(self.view.lender[slot]) if kind == "semi" else slot

    def load(self, part: Way) -> Floats:
        """What the candidates have to do before they are through with the task, but for its prompt: what the paper calls load."""
        slots = self.view.candidates(part)
        if part in ("prefill", "prompt"):
            return self.wait.take(slots)
        decodes = self.view.lender.take(slots) if part == "semi" else slots
        load = self.wait.take(decodes) + self.rest.take(decodes)
        return load + self.wait.take(slots) if part == "semi" else load

    def until_there(self, place: Place) -> float:
        """Seconds from the prompt's turn until its KV is where it is decoded."""
        holder = place.decode if place.kind == "semi" else place.prefill
        brought = self.costs.transfer(self.ask.prompt_tokens - float(self.cached[place.decode])) if place.kind == "pair" else 0.0
        return float(self.load_seconds[holder] + self.compute[holder]) + brought

    def saved(self, part: Way) -> Floats:
        """Seconds that the candidates save by what they have of the prompt."""
        slots = self.view.candidates(part)
        if part == "semi":
            slots = self.view.lender.take(slots)
        return self.whole - self.compute.take(slots) - self.load_seconds.take(slots)

    def cost(self, part: Way, quicker: float) -> tuple[Floats, Floats]:
        """(what it costs all tasks together, seconds of that until the first token) with each of the candidates."""
        slots = self.view.candidates(part)
        if part == "colocated":
            return self.asked.take(slots) + self.after.take(slots), self.first.take(slots)
        if part == "prompt":
            return self.asked.take(slots), self.first.take(slots)
        if part == "prefill":
            return self.asked.take(slots) - quicker * self.own.take(slots), self.first.take(slots)
        if part == "decode":
            # All of it is brought but what is there already.
            spared = (1.0 - quicker) * self.costs.peer
            brought = (1.0 - quicker) * self.costs.transfer(float(self.ask.prompt_tokens))
            wait = self.wait.take(slots)
            told = self.after.take(slots) + (1.0 + WAIT * self.costs.crowd) * wait + brought
            return told - quicker * self.rest.take(slots) - spared * self.cached.take(slots), wait
        owners = self.view.lender[slots]
        own, wait = self.compute.take(owners) * self.view.slow.take(slots), self.wait.take(slots) + self.wait.take(owners)
        first = wait + self.load_seconds.take(owners) + own
        asked = first + (WAIT * self.costs.crowd) * wait + self.held_up(self.view.sequences.take(owners), wait) * own
        return asked + self.after.take(owners) - quicker * (own + self.rest.take(owners)), first

    def choice(self, place: Place) -> Choice:
        kind, prefill, decode, _, why = place
        te, holder, first = self.view.te, prefill, float(self.first[prefill])
        if kind == "pair":
            first += float(self.wait[decode])
        elif kind == "semi":
            holder = decode
            own = self.compute[decode] * self.view.slow[prefill]
            first = float(self.wait[prefill] + self.wait[decode] + self.load_seconds[decode] + own)
        tpot, cached = float(self.tpot[decode]), int(self.cached[holder])
        why = f"TE {te[decode]}: {why}" if prefill == decode else f"TEs {te[prefill]} and {te[decode]}: {why}"
        if cached:
            why += f"; {cached} of {self.ask.prompt_tokens} prompt tokens are there"
        return Choice(int(te[prefill]), int(te[decode]), why, kind, 1e3 * first, 1e3 * tpot, cached)


# ---- sequences that leave a TE ------------------------------------------------------------------------------------------


def heir(ask: Ask, view: View, tree: Tree, costs: Costs, leaving: int) -> Choice | None:
    """The TE that goes on with a sequence that leaves TE `leaving`, where it costs least. In `ask`, `prompt_tokens` are all that
    it has and `answer` what is to come."""
    slots = np.concatenate((view.candidates("decode"), view.candidates("colocated")))
    slots = slots[view.te[slots] != leaving]
    if not len(slots):
        return None
    outlook = Outlook(ask, view, tree, costs)
    brought = costs.transfer(ask.prompt_tokens - outlook.cached[slots])
    values = outlook.after[slots] + outlook.wait[slots] + brought
    at = longest_waiting(values, 0.0, view.last, slots)
    te, tpot = int(view.te[slots[at]]), 1e3 * float(outlook.tpot[slots[at]])
    return Choice(leaving, te, f"moved from TE {leaving}: least cost, {1e3 * values[at]:.0f} ms", predicted_tpot_ms=tpot)
