"""Sampling in torch, all rows of a step in one pass, by the rules in `engine/sampler.py`, on any torch device.

Owns what the slots remember between steps: the last id, counts for the penalties, biases and stop ids. Knows neither
models nor the cache.

It works in two halves, so that a device with a stream of its own is never waited for. `ask` looks at a step's columns on the
host: which rows draw, which have penalties, how far top-k and top-p must look. What the device needs of them it hands to
`upload`. `choose` and `measure` then queue operators alone: nothing in them asks the device for a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.devices import Logprobs, SamplingRows, SlotSetup
from engine.sampler import GREEDY_BELOW, MURMUR, keys, uniform

Upload = Callable[[np.ndarray], Tensor]  # a host array on the device, once the device has come so far

# Top-p looks for its nucleus among this many of the likeliest before it sorts the whole row: 0.2 ms instead of 1.5 (of 49 152).
CANDIDATES = 1024
# Rows drawn together. On cpu their float32 logits and weights (2 x 3 MB at 49 152 entries) should stay in cache; elsewhere each
# operator should have enough to do, and the noise of 64 rows of 151 936 entries takes 78 MB.
DRAWN_ROWS = {"cpu": 16}
DRAWN_ROWS_ELSEWHERE = 64


@dataclass(slots=True)
class Slot:
    """What a SlotSetup leaves to remember, but for the counts."""

    bias_ids: np.ndarray  # int64
    bias: np.ndarray  # float32
    stop_ids: np.ndarray  # int64
    counts: bool


class Counts(NamedTuple):
    """What a slot's tables of counts begin with."""

    slot: int
    ids: Tensor  # int64: of the output, each once
    times: Tensor  # int32
    prompt: Tensor  # int64: ids of the prompt, each once


class Penalties(NamedTuple):
    """Rows that have penalties."""

    rows: Tensor  # int64 [n]: among the step's
    slots: Tensor  # int64 [n]
    repetition: Tensor | None  # float32 [n, 1]; None: of no row
    frequency: Tensor  # float32 [n, 1]
    presence: Tensor  # float32 [n, 1]


class Race(NamedTuple):
    """Rows that draw together."""

    rows: Tensor | None  # int64 [n]: among the step's; None: all of them
    temperature: Tensor  # float32 [n, 1]
    seed: np.ndarray  # uint64 [n]
    position: np.ndarray  # int64 [n]
    key: tuple[Tensor, Tensor] | None  # int64 [n, 1]: low and high half of the noise's key, where the device makes the noise
    floor: Tensor | None  # float32 [n, 1]: ln(min_p); None: of no row
    top_k: Tensor | None  # int64 [n, 1], 0: all; None: of no row
    top_p: Tensor | None  # [n, 1], in the dtype that sums are made in; None: of no row
    candidates: int  # so many of the likeliest decide top-k and top-p
    exact: bool  # the nucleus is among them for certain


@dataclass(slots=True)
class Asked:
    """A step's sampling: what the host decided, and its arrays on the device."""

    rows: int
    greedy: bool  # some row is
    plain: bool  # no row's logits are changed first
    races: list[Race]
    counts: list[Counts]
    held: Tensor | None = None  # int64: places in the flat logits that are masked
    biased: tuple[Tensor, Tensor] | None = None  # (places, float32 biases)
    penalties: Penalties | None = None
    last: tuple[Tensor | None, Tensor] | None = None  # (rows whose id is its slot's last, None: all; the slots)


class Sampler:
    """`wide`: the dtype of top-p's sums."""

    def __init__(self, vocab: int, slots: int, where: str | torch.device = "cpu", wide: torch.dtype = torch.float64):
        self.vocab = vocab
        self.where = torch.device(where)
        self.wide = wide
        self.on_host = self.where.type == "cpu"
        self.together = DRAWN_ROWS.get(self.where.type, DRAWN_ROWS_ELSEWHERE)
        self.last = torch.zeros(slots, dtype=torch.int32, device=self.where)
        self.slots: dict[int, Slot] = {}
        # For slots with penalties, by slot. numpy's zeros are committed when first touched, so only slots that count take memory.
        if self.on_host:
            self.output = torch.from_numpy(np.zeros((slots, vocab), np.int32))  # times an id occurs in the output
            self.prompt = torch.from_numpy(np.zeros((slots, vocab), bool))  # whether it occurs in the prompt
        else:
            self.output = torch.zeros((slots, vocab), dtype=torch.int32, device=self.where)
            self.prompt = torch.zeros((slots, vocab), dtype=torch.bool, device=self.where)

    def resolve(self, ids: Tensor, feed: Tensor) -> Tensor:
        """`ids`, but the slot's last sampled id where `feed` names a slot."""
        return torch.where(feed >= 0, torch.index_select(self.last, 0, feed.clamp(min=0)), ids)

    # ---- on the host ------------------------------------------------------------------------------------------------
    def remember(self, setup: SlotSetup, upload: Upload) -> list[Counts]:
        """Keep what the new owner of a slot asks for. Ids beyond the vocabulary have no logit that could be changed."""
        known = setup.bias_ids < self.vocab
        self.slots[setup.slot] = Slot(
            bias_ids=setup.bias_ids[known].astype(np.int64),
            bias=setup.bias[known].astype(np.float32),
            stop_ids=setup.stop_ids[setup.stop_ids < self.vocab].astype(np.int64),
            counts=setup.counts,
        )
        if not setup.counts:
            return []
        ids, times = np.unique(setup.generated, return_counts=True)
        prompt = np.unique(setup.prompt).astype(np.int64)
        return [Counts(setup.slot, upload(ids.astype(np.int64)), upload(times.astype(np.int32)), upload(prompt))]

    def ask(self, rows: SamplingRows, upload: Upload, setups: Sequence[SlotSetup] = ()) -> Asked:
        """What `choose` needs for `rows`, after `setups` have changed the owners of slots."""
        counts = [c for setup in setups for c in self.remember(setup, upload)]
        draws = rows.temperature >= GREEDY_BELOW
        parts = np.split(np.flatnonzero(draws), range(self.together, int(draws.sum()), self.together)) if draws.any() else []
        asked = Asked(
            rows=len(draws),
            greedy=not draws.all(),
            plain=not rows.has_setup.any(),
            races=[self.race(rows, part, upload) for part in parts],
            counts=counts,
        )
        if len(draws):
            asked.last = self.lasts(rows.slot, upload)
        if asked.plain:
            return asked
        asking = np.flatnonzero(rows.has_setup)
        owners = [self.slots[int(rows.slot[i])] for i in asking]
        held = [i * self.vocab + s.stop_ids for i, s in zip(asking, owners, strict=True) if rows.hold_stop[i]]
        if held:
            asked.held = upload(np.concatenate(held))
        biased = [(i * self.vocab + s.bias_ids, s.bias) for i, s in zip(asking, owners, strict=True) if len(s.bias)]
        if biased:
            asked.biased = upload(np.concatenate([b[0] for b in biased])), upload(np.concatenate([b[1] for b in biased]))
        at = np.array([i for i, s in zip(asking, owners, strict=True) if s.counts], np.int64)
        if len(at):
            repetition = rows.repetition[at]
            asked.penalties = Penalties(
                rows=upload(at),
                slots=upload(rows.slot[at].astype(np.int64)),
                repetition=upload(repetition[:, None]) if (repetition != 1.0).any() else None,
                frequency=upload(rows.frequency[at][:, None]),
                presence=upload(rows.presence[at][:, None]),
            )
        return asked

    def lasts(self, slots: np.ndarray, upload: Upload) -> tuple[Tensor | None, Tensor]:
        """Where each row's id is kept; of several rows of one slot (drafts) the last one's."""
        _, back = np.unique(slots[::-1], return_index=True)
        if len(back) == len(slots):
            return None, upload(slots.astype(np.int64))
        rows = np.sort(len(slots) - 1 - back)
        return upload(rows.astype(np.int64)), upload(slots[rows].astype(np.int64))

    def race(self, rows: SamplingRows, part: np.ndarray, upload: Upload) -> Race:
        """The rows `part`, whose temperature is not zero."""
        min_p, top_p = rows.min_p[part], rows.top_p[part]
        top_k = np.where(rows.top_k[part] < self.vocab, rows.top_k[part], 0)
        floor = None
        if (min_p > 0).any():
            with np.errstate(divide="ignore"):
                floor = upload(np.log(min_p.astype(np.float32))[:, None])  # -inf where min_p is 0
        many = int(top_k.max())
        nucleus = (top_p < 1).any()
        exact = not nucleus or bool((top_k[top_p < 1] > 0).all())
        if nucleus and not exact:
            # Whether the candidates hold the nucleus, only the device could say. Asking it would hold up the steps to come, so
            # but for cpu the whole row is sorted.
            many = max(many, CANDIDATES if self.on_host else self.vocab)
            exact = many >= self.vocab
        key = None
        if not self.on_host:
            words = keys(rows.seed[part], rows.position[part])[:, None]
            low, high = words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)
            key = upload(low.astype(np.int64)), upload(high.astype(np.int64))
        return Race(
            rows=None if len(part) == len(rows.slot) else upload(part.astype(np.int64)),
            temperature=upload(rows.temperature[part][:, None]),
            seed=rows.seed[part],
            position=rows.position[part],
            key=key,
            floor=floor,
            top_k=upload(top_k.astype(np.int64)[:, None]) if (top_k > 0).any() else None,
            top_p=upload(top_p.astype(np.float64 if self.wide == torch.float64 else np.float32)[:, None]) if nucleus else None,
            candidates=min(many, self.vocab),
            exact=exact,
        )

    # ---- on the device ----------------------------------------------------------------------------------------------
    def set_up(self, setup: SlotSetup) -> None:
        """Both halves of a setup, on cpu."""
        self.fill(self.remember(setup, torch.from_numpy))

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """Both halves of sampling, on cpu: int64 ids, one for each of `rows`."""
        return self.choose(logits, self.ask(rows, torch.from_numpy))

    def fill(self, counts: Sequence[Counts]) -> None:
        for c in counts:
            self.output[c.slot].zero_().index_copy_(0, c.ids, c.times)
            self.prompt[c.slot].zero_().index_fill_(0, c.prompt, True)

    def choose(self, logits: Tensor, asked: Asked) -> Tensor:
        """int64 ids, one a row, remembered as their slots' last; `logits` [rows, vocabulary] stay as they are."""
        self.fill(asked.counts)
        if not asked.plain:
            logits = self.processed(logits, asked)
        none = torch.empty(asked.rows, dtype=torch.int64, device=logits.device)
        ids = logits.argmax(-1) if asked.greedy else none  # the first of equals
        for race in asked.races:
            if race.rows is None:
                ids = self.draw(logits, race)
            else:
                ids.index_copy_(0, race.rows, self.draw(torch.index_select(logits, 0, race.rows), race))
        if asked.last is not None:
            rows, slots = asked.last
            self.last.index_copy_(0, slots, (ids if rows is None else torch.index_select(ids, 0, rows)).int())
        if asked.penalties is not None:
            _, slots, *_ = asked.penalties
            places = slots * self.vocab + torch.index_select(ids, 0, asked.penalties.rows)
            self.output.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        return ids

    def processed(self, logits: Tensor, asked: Asked) -> Tensor:
        """A float32 copy of the logits after stop ids, bias and penalties."""
        logits = logits.to(torch.float32, copy=True)
        if asked.held is not None:
            logits.view(-1).index_fill_(0, asked.held, -torch.inf)
        if asked.biased is not None:
            logits.view(-1).index_add_(0, *asked.biased)
        if asked.penalties is not None:
            at = asked.penalties.rows
            logits.index_copy_(0, at, self.penalised(torch.index_select(logits, 0, at), asked.penalties))
        return logits

    def penalised(self, logits: Tensor, penalties: Penalties) -> Tensor:
        times = torch.index_select(self.output, 0, penalties.slots)
        occurs = times > 0
        by = penalties.repetition
        if by is not None:
            seen = occurs | torch.index_select(self.prompt, 0, penalties.slots)
            logits = torch.where(seen, torch.where(logits > 0, logits / by, logits * by), logits)
        return logits - penalties.frequency * times - penalties.presence * occurs

    def draw(self, logits: Tensor, race: Race) -> Tensor:
        """Ids of a race's rows; `logits` are theirs."""
        x = logits.float() / race.temperature
        peak = x.amax(-1, keepdim=True)
        weights = (x - peak).exp_()
        floor = torch.full_like(peak, -torch.inf)
        if race.floor is not None:
            floor = peak + race.floor
            weights.masked_fill_(x < floor, 0.0)
        if race.top_k is not None or race.top_p is not None:
            weights.masked_fill_(x < threshold(x, peak, weights, floor, race.top_k, race.top_p, race.candidates, race.exact), 0.0)
        if race.key is None:
            u = torch.from_numpy(uniform(race.seed, race.position, self.vocab))
        else:
            u = device_uniform(*race.key, self.vocab)
        return weights.div_(u.neg_().log1p_().neg_()).argmax(-1)


# ---- choosing by chance ---------------------------------------------------------------------------------------------


def device_uniform(low: Tensor, high: Tensor, vocab: int) -> Tensor:
    """`engine.sampler.uniform` where the key's halves are [n, 1] on a device: the same words, so the same numbers.

    In int64, of which every device has exact sums, products and bits. 32-bit words are kept in the low half, and nothing
    overflows, so it doesn't matter what a device does where something would."""
    x = torch.arange(vocab, device=low.device) + low
    x &= 0xFFFFFFFF
    scramble(x)
    x ^= high
    scramble(x)
    return x.float().add_(0.5).mul_(2.0**-32)


def scramble(x: Tensor) -> None:
    """`engine.sampler.scramble` on words in int64, in place. The multipliers stand for themselves less 2**32, which is the same
    modulo 2**32 and keeps the product within 63 bits."""
    x ^= x >> 16
    x *= int(MURMUR[0]) - (1 << 32)
    x &= 0xFFFFFFFF
    x ^= x >> 13
    x *= int(MURMUR[1]) - (1 << 32)
    x &= 0xFFFFFFFF
    x ^= x >> 16


def threshold(
    x: Tensor,
    peak: Tensor,
    weights: Tensor,
    floor: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    many: int,
    exact: bool,
) -> Tensor:
    """[n, 1]: the smallest of the logits `x` that top_k and top_p keep; `floor` is min_p's.

    `weights` are exp(x - peak), those that min_p drops already zero; those that top_k drops are zeroed here. `many` of the
    likeliest are looked at; `exact`: the nucleus is among them, so that nothing must be asked of the device.
    """
    vocab = x.shape[1]
    values = x.topk(many).values if many < vocab else x.sort(-1, descending=True).values
    if top_k is not None:
        kth = values.gather(1, top_k.clamp(min=1) - 1)
        floor = torch.where(top_k > 0, torch.maximum(floor, kth), floor)
        weights.masked_fill_(x < floor, 0.0)
    if top_p is None:
        return floor
    left = values >= floor
    w = (values - peak).exp_().masked_fill_(~left, 0.0).to(top_p.dtype)
    wanted = top_p * weights.sum(-1, keepdim=True, dtype=top_p.dtype)
    kept = (left & (w.cumsum(-1) - w < wanted)).sum(-1, keepdim=True)
    nucleus = torch.where(top_p < 1, values.gather(1, (kept - 1).clamp_(min=0)), -torch.inf)
    bound = torch.maximum(floor, nucleus)
    if not exact:
        # Where all candidates were kept and smaller logits are left, the nucleus goes on beyond: sort those rows whole.
        open_end = (kept == many) & (values[:, -1:] > floor) & (top_p < 1)
        at = open_end.squeeze(1).nonzero().squeeze(1)
        if len(at):
            k = None if top_k is None else top_k[at]
            bound[at] = threshold(x[at], peak[at], weights[at], floor[at], k, top_p[at], vocab, True)
    return bound


# ---- log-probabilities ----------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Raw log-probabilities on the device; the likeliest in whatever order equals came."""

    chosen: Tensor  # float32 [n]
    rank: Tensor  # int32 [n]
    top_ids: Tensor  # int32 [n, K]
    top: Tensor  # float32 [n, K]


def measure(logits: Tensor, ids: Tensor, top: int) -> Measured:
    """Raw log-probabilities of the int64 `ids`, their ranks and the `top` likeliest, row by row."""
    logits = logits.float()
    whole = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, ids[:, None])
    rank = (logits > chosen).sum(-1) + 1
    values, top_ids = logits.topk(top)
    return Measured((chosen - whole).squeeze(1), rank.int(), top_ids.int(), values - whole)


def in_order(chosen: np.ndarray, rank: np.ndarray, top_ids: np.ndarray, top: np.ndarray) -> Logprobs:
    """What `measure` found, likeliest first; equals go by id."""
    order = np.lexsort((top_ids, -top), axis=-1)
    return Logprobs(chosen, rank, np.take_along_axis(top_ids, order, 1), np.take_along_axis(top, order, 1))


def logprobs(logits: Tensor, ids: Tensor, top: int) -> Logprobs:
    """Both halves, on cpu."""
    return in_order(*(t.numpy() for t in measure(logits, ids, top)))


def logprobs_where_asked(logits: Tensor, ids: Tensor, asked: np.ndarray) -> Logprobs | None:
    """`logprobs` of the rows whose `asked` (how many of the likeliest) is not negative; the other rows hold zeros."""
    rows = np.flatnonzero(asked >= 0)
    if not len(rows):
        return None
    at = torch.from_numpy(rows)
    return spread(logprobs(logits[at], ids[at], int(asked.max())), rows, len(asked))


def spread(some: Logprobs, rows: np.ndarray, count: int) -> Logprobs:
    """`some`, of the given rows, among `count` rows; the others hold zeros."""

    def over(values: np.ndarray) -> np.ndarray:
        out = np.zeros((count, *values.shape[1:]), values.dtype)
        out[rows] = values
        return out

    return Logprobs(over(some.chosen), over(some.rank), over(some.top_ids), over(some.top))
