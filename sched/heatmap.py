"""The heat map: for which requests a prefill and decode pair, or a semi pair, beats colocated TEs, and how sure that is. Pure.

The paper's map (ATC'25, 3.4): rows are prompt lengths, columns are decode length / prompt length, and a cell's value is

    JCT(colocated) / JCT(disaggregated) - 1        more than 0: disaggregated is quicker

of identical requests that come at a fixed rate, one map for each rate, the maps added up. Here a rate is a load: a part of what
the machine can do of such requests, so that one number means the same for short and for long ones. What was measured at some
points says something of their neighbours too: all values are taken for one smooth surface over log length, log ratio and load
(a Gaussian process), which also tells how uncertain each point still is, and so what to measure next (`next_cell`).

What the paper leaves open is decided so:

off the map     the nearest cell's value and confidence, halved for every bin (a factor of 2) that it is away
zero cells      a value that may as well have the other sign has a confidence near 0; whoever reads it lets the load decide
other models    `scaled`: what counts is for how many decode steps a prompt lasts, so the rows move by that
live traffic    `observe` notes how much longer requests took than alone, for each kind; where both kinds were seen in a cell,
                that joins what was measured, and replaces it in time
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from sched.costs import Costs

Kind = Literal["colocated", "disaggregated", "semi"]
SPLIT: tuple[Kind, ...] = ("disaggregated", "semi")  # what is compared with colocated

PREFILL = (128, 256, 512, 1024, 2048, 4096)  # tokens
RATIO = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # decode / prefill tokens; the paper's reach from 0 to 4
LOADS = (0.3, 0.6, 0.9)  # parts of what the machine can do of such requests

# The surface of log JCT ratios before anything is seen: most are within 1.4 of each other, and points two bins (a factor of 4)
# away from each other, or on the other end of the loads, have about 0.6 in common.
PRIOR = 0.35
REACH = (2.0, 2.0)  # bins, of prefill and ratio
REACH_LOAD = 0.6
# What two measurements of a point differ by, besides what their own requests' spread tells: 5 % of a JCT.
NOISE = 0.05
PLACES = 4096  # pairs of lengths whose cell is remembered
# Live traffic: requests of both kinds that a point needs before they are compared, and how many are remembered.
FEW, REMEMBERED = 5, 200
# ... what the comparison may be wrong by, since the kinds never get quite the same requests at quite the same load.
BIAS = 0.1
# ... for how many of them the measurements of such points lose half of their weight.
OUTDATES = 20
REFIT = 64  # requests observed until the surface is to be drawn anew, which takes some ten milliseconds
# Of a map that was made for another model, how much of its confidence is believed.
FOREIGN_TRUST = 0.5
# What a machine can do of some requests is counted with so many decodes at once on a TE; what it did, over so many seconds.
STREAMS = 8
LOAD_MEMORY = 30.0


class Measured(msgspec.Struct, array_like=True):
    """A point, and what measuring it gave: log(JCT colocated / JCT of `kind`)."""

    kind: Kind
    point: int
    log_ratio: float
    variance: float  # of `log_ratio`, noise included


class Live(msgspec.Struct, array_like=True):
    """How requests of a kind fared at a point: log(JCT / JCT alone), the older the less it counts."""

    kind: Kind
    point: int
    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, REMEMBERED)
        step = (value - self.mean) / self.count
        self.variance += (value - self.mean) * (value - self.mean - step) / self.count - self.variance / self.count
        self.mean += step


class MapData(msgspec.Struct):
    """What a map is made of, as it is stored."""

    prefill: tuple[float, ...] = PREFILL  # of the rows, each twice the one before
    ratio: tuple[float, ...] = RATIO  # of the columns, the same
    loads: tuple[float, ...] = LOADS  # rising
    kinds: tuple[Kind, ...] = SPLIT  # that were compared with colocated
    measured: list[Measured] = []
    live: list[Live] = []
    trust: float = 1.0


class Value(NamedTuple):
    value: float  # JCT(colocated) / JCT(kind) - 1
    confidence: float  # 0 to 1: 0 where either sign is as likely, 1 where the sign is certain


class Cell(NamedTuple):
    """What to measure: identical requests of such lengths at such a load."""

    point: int
    prefill: int
    decode: int
    load: float


NOTHING = Value(0.0, 0.0)


class HeatMap:
    """`data` with its surface. A point is a cell at one load: point = (row * columns + column) * loads + load."""

    def __init__(self, data: MapData | None = None):
        self.data = data if data is not None else MapData()
        self.rows, self.columns, self.loads = len(self.data.prefill), len(self.data.ratio), len(self.data.loads)
        self.points = self.rows * self.columns * self.loads
        self.live = {(one.kind, one.point): one for one in self.data.live}
        self.prior = self.covariance()
        self.within = self.prior[: self.loads, : self.loads]  # of one cell's points: the same for every cell
        self.place = lru_cache(PLACES)(self._place)  # a choice asks for the same ones again for each kind
        self.unseen = 0  # observations that the tables don't tell of
        self.tables: dict[Kind, list[Value]] = {}
        self.refit()

    # ---- what the scheduler asks ------------------------------------------------------------------------------------
    def value(self, prefill: int, decode: int, kind: Kind = "disaggregated") -> Value:
        """How much quicker than colocated TEs `kind` is for a request of so many tokens, over all loads."""
        table = self.tables.get(kind)
        if table is None or prefill < 1:
            return NOTHING
        cell, off = self.place(prefill, max(decode, 1))
        found = table[cell]
        if not off:
            return found
        decay = 0.5**off
        return Value(found.value * decay, found.confidence * decay)

    def _place(self, prefill: int, decode: int) -> tuple[int, float]:
        """The cell of such a request, and how many bins off the map the request is."""
        row, above = nearest(prefill / self.data.prefill[0], self.rows)
        column, beside = nearest(decode / prefill / self.data.ratio[0], self.columns)
        return row * self.columns + column, above + beside

    def observe(self, kind: Kind, prefill: int, decode: int, jct: float, alone: float, load: float) -> None:
        """A live request of `kind` took `jct` seconds, and would have taken `alone` on an idle colocated TE, as the costs have it
        and without what was cached. `load`: of the machine when it came, 0 to 1."""
        if prefill < 1 or min(jct, alone) <= 0:
            return
        cell, off = self.place(prefill, max(decode, 1))
        if off > 1:
            return
        at = min(range(self.loads), key=lambda i: abs(self.data.loads[i] - load))
        point = cell * self.loads + at
        one = self.live.get((kind, point))
        if one is None:
            one = self.live[kind, point] = Live(kind, point)
            self.data.live.append(one)
        one.add(math.log(jct / alone))
        self.unseen += 1

    @property
    def due(self) -> bool:
        """The tables should be drawn anew: by `refit`."""
        return self.unseen >= REFIT

    def snapshot(self) -> bytes:
        """What a map is made of, to be drawn elsewhere: `drawn`, then `adopt`."""
        self.unseen = 0
        return msgspec.msgpack.encode(self.data)

    @classmethod
    def drawn(cls, snapshot: bytes) -> HeatMap:
        return cls(msgspec.msgpack.decode(snapshot, type=MapData))

    def adopt(self, drawn: HeatMap) -> None:
        """The tables of a map that was drawn from a snapshot of this one."""
        self.tables = drawn.tables

    def scaled(self, steps_a_token: float, theirs: float) -> HeatMap:
        """This map for another model on the same machine: one whose prompts last for `steps_a_token` decode steps a token, where
        those of the model that was measured last for `theirs`. Its answers of equal length are in other columns then."""
        k = steps_a_token / theirs
        data = msgspec.structs.replace(
            self.data,
            prefill=tuple(p / k for p in self.data.prefill),
            ratio=tuple(r * k for r in self.data.ratio),
            live=[],  # seen on the other model: what was measured tells enough of it
            trust=FOREIGN_TRUST,
        )
        return HeatMap(data)

    # ---- what the profiler does -------------------------------------------------------------------------------------
    def cell(self, point: int) -> Cell:
        place, at = divmod(point, self.loads)
        row, column = divmod(place, self.columns)
        prefill = round(self.data.prefill[row])
        return Cell(point, prefill, max(2, round(prefill * self.data.ratio[column])), self.data.loads[at])

    def cells(self) -> list[Cell]:
        return [self.cell(point) for point in range(self.points)]

    def add(self, kind: Kind, point: int, log_ratio: float, variance: float) -> None:
        """A measurement; an earlier one of the same point is joined with it. Call `refit` when all kinds are in."""
        variance += NOISE**2
        for one in self.data.measured:
            if (one.kind, one.point) == (kind, point):
                one.log_ratio, one.variance = joined(one.log_ratio, one.variance, log_ratio, variance)
                return
        self.data.measured.append(Measured(kind, point, log_ratio, variance))

    # ---- the surface ------------------------------------------------------------------------------------------------
    def covariance(self) -> np.ndarray:
        """Of log ratios at every two points, before anything is seen: [points, points]."""
        row, column, at = np.unravel_index(np.arange(self.points), (self.rows, self.columns, self.loads))
        loads = np.asarray(self.data.loads)[at]
        far = sum(((x[:, None] - x[None, :]) / reach) ** 2 for x, reach in zip((row, column), REACH, strict=True))
        return PRIOR**2 * np.exp(-0.5 * (far + ((loads[:, None] - loads[None, :]) / REACH_LOAD) ** 2))

    def seen(self, kind: Kind) -> tuple[list[int], list[float], list[float]]:
        """Points with what is known of them, from measurements and live traffic: (points, log ratios, variances)."""
        compared: dict[int, tuple[float, float]] = {}
        outdated = np.ones(self.points)
        for (of, point), split in self.live.items():
            whole = self.live.get(("colocated", point))
            if of != kind or whole is None or min(split.count, whole.count) < FEW:
                continue
            variance = whole.variance / whole.count + split.variance / split.count + BIAS**2
            compared[point] = whole.mean - split.mean, variance
            outdated += min(split.count, whole.count) / OUTDATES * self.prior[point] / PRIOR**2
        known = {m.point: (m.log_ratio, m.variance * outdated[m.point]) for m in self.data.measured if m.kind == kind}
        for point, live in compared.items():
            known[point] = joined(*known[point], *live) if point in known else live
        return list(known), [v[0] for v in known.values()], [v[1] for v in known.values()]

    def surface(self, kind: Kind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log ratios at every point, after what was seen; and their covariance as two factors [points, seen], whose product is
        what was learnt: covariance = prior - gain @ towards.T."""
        points, ratios, variances = self.seen(kind)
        towards = self.prior[:, points]
        gain = np.linalg.solve(towards[points] + np.diag(variances), towards.T).T
        return gain @ np.asarray(ratios), gain, towards

    def refit(self) -> None:
        """Draw the tables that `value` reads anew."""
        self.unseen = 0
        cells = self.rows * self.columns
        for kind in self.data.kinds:
            mean, gain, towards = (part.reshape(cells, self.loads, -1) for part in self.surface(kind))
            ratios = np.exp(mean[:, :, 0])
            value = ratios.mean(1) - 1  # the maps of all loads added up, and divided by their number
            own = self.within - np.einsum("cis,cjs->cij", gain, towards)
            sd = np.sqrt(np.maximum(np.einsum("ci,cij,cj->c", ratios, own, ratios), 1e-12)) / self.loads
            self.tables[kind] = [
                Value(float(v), self.data.trust * math.erf(abs(v) / (math.sqrt(2) * s))) for v, s in zip(value, sd, strict=True)
            ]

    # ---- what the map shows -----------------------------------------------------------------------------------------
    def at_load(self, kind: Kind, load: int) -> list[float]:
        """The cells' values at one of the loads alone."""
        return [float(v) for v in np.exp(self.surface(kind)[0][load :: self.loads]) - 1]

    def same_sign(self, kind: Kind) -> float | None:
        """Of the cells that were measured at every load, the part with the same sign at all of them (the paper: over 80 %)."""
        signs: dict[int, list[bool]] = {}
        for one in self.data.measured:
            if one.kind == kind:
                signs.setdefault(one.point // self.loads, []).append(one.log_ratio > 0)
        whole = [own for own in signs.values() if len(own) == self.loads]
        return sum(len(set(own)) == 1 for own in whole) / len(whole) if whole else None


def nearest(times: float, bins: int) -> tuple[int, float]:
    """The bin of a length that is `times` that of the first one, each bin's twice the one before; and how many bins it is away
    from the first or last bin's edge, 0 within the map."""
    at = math.log2(times)
    best = round(at)
    if 0 <= best < bins:
        return best, 0.0
    best = 0 if best < 0 else bins - 1
    return best, max(0.0, abs(at - best) - 0.5)


def joined(a: float, variance_a: float, b: float, variance_b: float) -> tuple[float, float]:
    """Two estimates of one number as one, with its variance."""
    weight = variance_b / (variance_a + variance_b)
    return a * weight + b * (1 - weight), variance_a * weight


def work(costs: Costs, prefill: float, decode: float, cached: float = 0.0) -> float:
    """Seconds of a TE that a request takes where there is much to do: loads are parts of that."""
    kv = prefill + decode / 2
    return costs.prefill(prefill - cached, cached) + decode * costs.step(0.0, 0.0, STREAMS, STREAMS * kv) / STREAMS


def alone(costs: Costs, prefill: float, decode: float, cached: float = 0.0) -> float:
    """Seconds from a request's coming to its last token on a TE that has nothing else to do."""
    return costs.prefill(prefill - cached, cached) + decode * costs.step(0.0, 0.0, 1.0, prefill + decode / 2)


class Traffic:
    """Tells a map of the requests that end, and at which load they ran."""

    def __init__(self, heat: HeatMap):
        self.heat = heat
        self.seconds = 0.0  # of work done, fading
        self.at = -math.inf

    def ended(self, kind: Kind, prefill: int, cached: int, decode: int, jct: float, tes: int, costs: Costs, now: float) -> None:
        """A request of one sequence, begun and ended where `kind` says, came `jct` seconds ago; `tes` share the work."""
        self.seconds = self.seconds * math.exp((self.at - now) / LOAD_MEMORY) + work(costs, prefill, decode, cached)
        self.at = now
        load = self.seconds / (LOAD_MEMORY * tes)
        self.heat.observe(kind, prefill, decode, jct, alone(costs, prefill, decode, cached), load)


def next_cell(heat: HeatMap, seconds: Sequence[float], left: float) -> Cell | None:
    """What to measure next, in the `left` seconds: where a second tells most about cells whose sign is in doubt. None where
    nothing can be measured in that time. `seconds`: what each point would take; inf where it can't be measured."""
    cost = np.asarray(seconds, np.float64)
    fits = cost <= left
    if not fits.any():
        return None
    worth = np.zeros(heat.points)
    matters = np.isfinite(cost)
    for kind in heat.data.kinds:
        mean, gain, towards = heat.surface(kind)
        spread = heat.prior - gain @ towards.T
        own = np.diag(spread)
        doubt = matters * np.asarray([math.erfc(abs(m) / math.sqrt(2 * v)) for m, v in zip(mean, own, strict=True)])
        worth += doubt @ spread**2 / (own + NOISE**2)
    score = np.where(fits, worth / np.where(fits, cost, 1.0), -1.0)
    return heat.cell(int(score.argmax()))
