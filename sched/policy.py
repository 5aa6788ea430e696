"""Where a task runs: Algorithm 1 of the paper, and the same terms as one comparison in predicted milliseconds. Pure.

A task is an `Ask`; what is known of the TEs is a `View` (columns), a prompt tree, a heat map and the costs of steps. `choose`
gives a `Choice` with its reason, or None where nothing can take the task now. The server and the simulator call the same
function. Here is what is compared, and in which order; what a task would take on one TE is told in engine/native/outlook.c, since
a thousand of them are looked at within some microseconds.

    paper    the paper's order (ATC'25, Algorithm 1): the heat map picks the type of TE; among those, where the load is balanced,
             the longest reusable prefix picks the TE, else the least load does
    cost     every TE, and pair, for what it would cost: the wait for its turn, loading or computing the prompt, bringing it to
             the other TE, decoding, what all that costs the tasks that run there, and what was promised and would be missed

What the paper's order can't do, `cost` does: it leaves a type of TE that is overloaded, and counts a prefix wherever it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Structure, addressof, byref, c_double, c_int64, c_void_p
from math import inf
from typing import Final, Literal, NamedTuple, Protocol

import msgspec
import numpy as np

from engine import native
from sched.costs import Costs
from sched.view import Slots, View, Way, memory

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


class Expected(NamedTuple):
    """A length that somebody knows."""

    mean: float
    low: float
    high: float
    confidence: float


class Match(Protocol):
    """What there is of a prompt: sched.prompt_tree's. Integers of 64 bits, side by side."""

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


Pick = Callable[[Ask, View, Tree], Choice | None]  # whatever chooses


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
    loads = outlook.loads(part)
    if is_load_balanced(loads, outlook.whole):
        slot, load = locality_aware(outlook, part, loads)
        saved = loads.saved
        how = f"load balanced, longest prefix saves {1e3 * saved:.0f} ms" if saved else "load balanced, no prefix"
    else:
        slot, load = load_aware(outlook, part)
        how = "load not balanced"
    return slot, load, f"{how}: TE {outlook.view.te[slot]} with {1e3 * load:.0f} ms to do"


def is_load_balanced(loads: Loads, whole: float) -> bool:
    """The paper doesn't say when. Here: the busiest TE has not so much more to do than the mean that the longest prefix, which
    saves computing the `whole` prompt, would be too dear there."""
    return loads.most - loads.mean <= whole


def locality_aware(outlook: Outlook, part: Way, loads: Loads) -> tuple[int, float]:
    """The paper's `locality_aware`: of those that save most seconds by what they have of the prompt the slot of the least load,
    and that load."""
    return outlook.least_load(part, loads.saved)


def load_aware(outlook: Outlook, part: Way) -> tuple[int, float]:
    """The paper's `load_aware`: the slot of the least load, and that load."""
    return outlook.least_load(part, -inf)


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
    best = outlook.best(kind, outlook.view.candidates(kind), quicker, tolerance=TOLERANCE)
    return Place(kind, best.slot, outlook.decodes(kind, best.slot), best.cost)


def best_pair(outlook: Outlook, quicker: float) -> Place:
    """The prefill TE and the decode TE that cost least together. Their costs add up, so each half is picked by itself. Only a
    missed promise is of both: where the best halves miss it, those that are best with its price on all of the time are looked at
    too."""
    slo, prefills, decodes = outlook.ask.ttft_slo, outlook.view.candidates("prefill"), outlook.view.candidates("decode")
    best: Place | None = None
    for price in (0.0, MISSED):
        one = outlook.best("prefill", prefills, quicker, price, tolerance=TOLERANCE / 2)
        other = outlook.best("decode", decodes, quicker, price, near=TOLERANCE / 2 * one.least_first)
        late = max(0.0, one.first + other.first - slo) if slo is not None else 0.0
        cost = one.cost + other.cost + MISSED * late
        if best is None or cost < best.cost:
            best = Place("pair", one.slot, other.slot, cost)
        if not late:
            break
    assert best is not None
    return best


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

# What a TE may be to a task: a way to run it, or the one that goes on with it. By outlook.c's numbers.
Part = Way | Literal["heir"]
PARTS: Final = {part: number for number, part in enumerate(("colocated", "prefill", "decode", "semi", "prompt", "heir"))}


# The structures are outlook.c's, which tells what is in them.
class Task(Structure):
    _fields_ = (
        ("view", c_void_p),
        *((name, c_double) for name in Costs.__struct_fields__),
        *((name, c_double) for name in ("tokens", "length", "ttft_slo", "tpot_slo", "block", "home_tokens")),
        ("home", c_int64),
        *((name, c_double) for name in ("wait", "work", "queue", "missed")),
        *((name, c_double) for name in ("whole", "queued", "stall", "step", "longer", "arrivals")),
    )
    whole: float


class Prediction(Structure):
    _fields_ = tuple((name, c_double) for name in ("load", "compute", "cached", "tpot", "wait", "own", "first", "rest"))
    load: float
    compute: float
    cached: float
    tpot: float
    wait: float
    own: float
    first: float
    rest: float


class Best(Structure):
    _fields_ = (
        *((name, c_double) for name in ("quicker", "price", "tolerance", "near")),
        ("slot", c_int64),
        *((name, c_double) for name in ("cost", "first", "least_first")),
    )
    slot: int
    cost: float
    first: float
    least_first: float


class Loads(Structure):
    _fields_ = (("mean", c_double), ("most", c_double), ("saved", c_double))
    mean: float
    most: float
    saved: float


class Outlook:
    """Predictions for one task on each TE: good until the next one of the same view."""

    def __init__(self, ask: Ask, view: View, tree: Tree, costs: Costs):
        self.ask, self.view, self.costs, self.native = ask, view, costs, native.load()
        self.task = Task(
            addressof(view.columns),
            *msgspec.structs.astuple(costs),
            ask.prompt_tokens,
            ask.answer.mean,
            inf if ask.ttft_slo is None else ask.ttft_slo,
            inf if ask.tpot_slo is None else ask.tpot_slo,
            tree.block_size,
            min(ask.home_tokens, ask.prompt_tokens - 1),
            view.slots.get(ask.home, -1),
            WAIT,
            WORK,
            QUEUE,
            MISSED,
        )
        self.about = byref(self.task)
        found = tree.match(ask.keys[: (ask.prompt_tokens - 1) // tree.block_size])  # one token is always computed
        self.native.outlook(self.about, memory(found.tes), memory(found.blocks), memory(found.tiers), len(found.tes))
        self.whole = self.task.whole  # seconds to compute the prompt where nothing of it is there

    def on(self, slot: int) -> Prediction:
        """What one TE would make of it."""
        prediction = Prediction()
        self.native.predict(self.about, slot, byref(prediction))
        return prediction

    def best(
        self, part: Part, slots: Slots, quicker: float = 0.0, price: float = 0.0, tolerance: float = 0.0, near: float = 0.0
    ) -> Best:
        """The TE of `slots` with the least cost, to within `near` seconds and `tolerance` times the least time to the first
        token: of several the one that was given nothing for longest, then the first. `quicker`: the part of the time on the TEs
        that the heat map takes off. `price`: what a second until the first token costs more."""
        best = Best(quicker, price, tolerance, near)
        self.native.best(self.about, PARTS[part], memory(slots), len(slots), byref(best))
        return best

    def loads(self, part: Way) -> Loads:
        """Seconds that the candidates have to do before they are through with the task, but for its prompt: what the paper calls
        load. And the most seconds that one of them saves by what it has of the prompt."""
        slots, loads = self.view.candidates(part), Loads()
        self.native.loads(self.about, PARTS[part], memory(slots), len(slots), byref(loads))
        return loads

    def least_load(self, part: Way, saved: float) -> tuple[int, float]:
        """The slot with the least load, of those that save so many seconds, after `loads`; and that load."""
        slots, load = self.view.candidates(part), c_double()
        slot = self.native.least_load(self.about, PARTS[part], memory(slots), len(slots), saved, byref(load))
        return slot, load.value

    def decodes(self, kind: Kind, slot: int) -> int:
        """The slot of the TE that decodes what this one computes, where that isn't a choice of its own."""
        return int(self.view.lender[slot]) if kind == "semi" else slot

    def until_there(self, place: Place) -> float:
        """Seconds from the prompt's turn until its KV is where it is decoded."""
        holder, decode = self.on(place.decode if place.kind == "semi" else place.prefill), self.on(place.decode)
        brought = self.costs.transfer(self.ask.prompt_tokens - decode.cached) if place.kind == "pair" else 0.0
        return holder.load + holder.compute + brought

    def choice(self, place: Place) -> Choice:
        kind, prefill, decode, _, why = place
        te, one = self.view.te, self.on(prefill)
        other = self.on(decode) if prefill != decode else one
        first, cached = one.first, int(one.cached)
        if kind == "pair":
            first += other.wait
        elif kind == "semi":
            cached = int(other.cached)
            first = one.wait + other.wait + other.load + other.compute * float(self.view.slow[prefill])
        why = f"TE {te[decode]}: {why}" if prefill == decode else f"TEs {te[prefill]} and {te[decode]}: {why}"
        if cached:
            why += f"; {cached} of {self.ask.prompt_tokens} prompt tokens are there"
        return Choice(int(te[prefill]), int(te[decode]), why, kind, 1e3 * first, 1e3 * other.tpot, cached)


# ---- sequences that leave a TE ------------------------------------------------------------------------------------------


def heir(ask: Ask, view: View, tree: Tree, costs: Costs, leaving: int) -> Choice | None:
    """The TE that goes on with a sequence that leaves TE `leaving`, where it costs least. In `ask`, `prompt_tokens` are all that
    it has and `answer` what is to come."""
    slots = np.concatenate((view.candidates("decode"), view.candidates("colocated")))
    slots = slots[view.te[slots] != leaving]
    if not len(slots):
        return None
    outlook = Outlook(ask, view, tree, costs)
    best = outlook.best("heir", slots)
    te, tpot = int(view.te[best.slot]), 1e3 * outlook.on(best.slot).tpot
    return Choice(leaving, te, f"moved from TE {leaving}: least cost, {1e3 * best.cost:.0f} ms", predicted_tpot_ms=tpot)
