"""Sampling in torch, all rows of a step in one pass, by the rules in `engine/sampler.py`.

Owns what the slots remember between steps: the last id, counts for the penalties, biases and stop ids. Knows neither
models nor the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.devices import Logprobs, SamplingRows, SlotSetup
from engine.sampler import GREEDY_BELOW, uniform

# Top-p looks for its nucleus among this many of the likeliest before it sorts the whole row: 0.2 ms instead of 1.5 (of 49 152).
CANDIDATES = 1024
# Rows drawn together: their float32 logits and weights (2 x 3 MB at 49 152 entries) should stay in cache.
DRAWN_ROWS = 16


@dataclass(slots=True)
class Slot:
    """What a SlotSetup leaves to remember, but for the counts."""

    bias_ids: Tensor
    bias: Tensor
    stop_ids: Tensor
    counts: bool


class Sampler:
    def __init__(self, vocab: int, slots: int):
        self.vocab = vocab
        self.last = torch.zeros(slots, dtype=torch.int32)
        self.slots: dict[int, Slot] = {}
        # For slots with penalties, by slot. numpy's zeros are committed when first touched, so only slots that count take memory.
        self.output = torch.from_numpy(np.zeros((slots, vocab), np.int32))  # times an id occurs in the output
        self.prompt = torch.from_numpy(np.zeros((slots, vocab), bool))  # whether it occurs in the prompt

    def resolve(self, ids: Tensor, feed: Tensor) -> Tensor:
        """`ids`, but the slot's last sampled id where `feed` names a slot."""
        return torch.where(feed >= 0, self.last[feed.clamp(min=0)], ids)

    def set_up(self, setup: SlotSetup) -> None:
        """Remember what the new owner of a slot asks for. Ids beyond the vocabulary have no logit that could be changed."""
        known = setup.bias_ids < self.vocab
        self.slots[setup.slot] = Slot(
            bias_ids=torch.from_numpy(setup.bias_ids[known].astype(np.int64)),
            bias=torch.from_numpy(setup.bias[known].astype(np.float32)),
            stop_ids=torch.from_numpy(setup.stop_ids[setup.stop_ids < self.vocab].astype(np.int64)),
            counts=setup.counts,
        )
        if setup.counts:
            self.output[setup.slot] = torch.from_numpy(np.bincount(setup.generated, minlength=self.vocab))
            self.prompt[setup.slot] = torch.from_numpy(np.bincount(setup.prompt, minlength=self.vocab) > 0)

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """int64 ids, one for each of `rows`, remembered as their slots' last; `logits` [rows, vocabulary] stay as they are."""
        logits = self.processed(logits, rows)
        draws = rows.temperature >= GREEDY_BELOW
        if draws.any():
            ids = torch.empty(len(draws), dtype=torch.int64)
            if not draws.all():
                greedy = indices(np.flatnonzero(~draws))
                ids[greedy] = logits[greedy].argmax(-1)
            for part in np.split(np.flatnonzero(draws), range(DRAWN_ROWS, int(draws.sum()), DRAWN_ROWS)):
                ids[indices(part)] = draw(logits, rows, part)
        else:
            ids = logits.argmax(-1)  # the first of equals
        self.last[indices(rows.slot)] = ids.int()
        if counting := [i for i in np.flatnonzero(rows.has_setup).tolist() if self.slots[int(rows.slot[i])].counts]:
            self.output[indices(rows.slot[counting]), ids[counting]] += 1
        return ids

    def processed(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """float32 logits after stop ids, bias and penalties; a copy where any row asks for them."""
        asking = np.flatnonzero(rows.has_setup)
        if not len(asking):
            return logits.float()
        logits = logits.to(torch.float32, copy=True)
        owners = [self.slots[int(rows.slot[i])] for i in asking]
        held = [(i, s) for i, s in zip(asking, owners, strict=True) if rows.hold_stop[i]]
        if held:
            at = torch.cat([torch.full_like(s.stop_ids, int(i)) for i, s in held])
            logits[at, torch.cat([s.stop_ids for _, s in held])] = -torch.inf
        biased = [(i, s) for i, s in zip(asking, owners, strict=True) if len(s.bias)]
        if biased:
            at = torch.cat([torch.full_like(s.bias_ids, int(i)) for i, s in biased])
            ids, bias = torch.cat([s.bias_ids for _, s in biased]), torch.cat([s.bias for _, s in biased])
            logits.index_put_((at, ids), bias, accumulate=True)
        counting = np.array([i for i, s in zip(asking, owners, strict=True) if s.counts], np.int64)
        if len(counting):
            at, slots = indices(counting), indices(rows.slot[counting])
            logits[at] = self.penalised(logits[at], slots, rows, counting)
        return logits

    def penalised(self, logits: Tensor, slots: Tensor, rows: SamplingRows, at: np.ndarray) -> Tensor:
        times = self.output[slots]
        occurs = times > 0
        if (rows.repetition[at] != 1.0).any():
            by = column(rows.repetition[at])
            logits = torch.where(occurs | self.prompt[slots], torch.where(logits > 0, logits / by, logits * by), logits)
        return logits - column(rows.frequency[at]) * times - column(rows.presence[at]) * occurs


# ---- choosing by chance ---------------------------------------------------------------------------------------------


def draw(logits: Tensor, rows: SamplingRows, part: np.ndarray) -> Tensor:
    """Ids of the rows `part`, whose temperature is not zero."""
    x = logits[indices(part)].div_(column(rows.temperature[part]))
    peak = x.amax(-1, keepdim=True)
    weights = (x - peak).exp_()
    floor = peak + column(rows.min_p[part]).log_()  # -inf where min_p is 0
    if (rows.min_p[part] > 0).any():
        weights.masked_fill_(x < floor, 0.0)
    top_k = np.where(rows.top_k[part] < x.shape[1], rows.top_k[part], 0)
    top_p = rows.top_p[part]
    if (top_k > 0).any() or (top_p < 1).any():
        weights.masked_fill_(x < threshold(x, peak, weights, floor, top_k, top_p), 0.0)
    waiting = torch.from_numpy(uniform(rows.seed[part], rows.position[part], x.shape[1])).neg_().log1p_().neg_()
    return weights.div_(waiting).argmax(-1)


def threshold(
    x: Tensor,
    peak: Tensor,
    weights: Tensor,
    floor: Tensor,
    top_k: np.ndarray,
    top_p: np.ndarray,
    candidates: int = CANDIDATES,
) -> Tensor:
    """[n, 1]: the smallest of the logits `x` that top_k and top_p keep; `floor` is min_p's.

    `weights` are exp(x - peak), those that min_p drops already zero; those that top_k drops are zeroed here.
    """
    vocab = x.shape[1]
    many = int(top_k.max())
    if (top_p < 1).any():
        many = max(many, candidates)
    many = min(many, vocab)
    values = x.topk(many).values
    if (top_k > 0).any():
        k = torch.from_numpy(top_k.astype(np.int64))[:, None]
        kth = values.gather(1, k.clamp(min=1) - 1)
        floor = torch.where(k > 0, torch.maximum(floor, kth), floor)
        weights.masked_fill_(x < floor, 0.0)
    if (top_p < 1).any():
        p = column(top_p.astype(np.float64))
        left = values >= floor
        w = (values - peak).exp_().masked_fill_(~left, 0.0).double()
        wanted = p * weights.sum(-1, keepdim=True, dtype=torch.float64)
        kept = (left & (w.cumsum(-1) - w < wanted)).sum(-1, keepdim=True)
        nucleus = torch.where(p < 1, values.gather(1, (kept - 1).clamp_(min=0)), -torch.inf)
        # Where all candidates were kept and smaller logits are left, the nucleus goes on beyond: sort those rows whole.
        open_end = (kept == many) & (values[:, -1:] > floor) & (p < 1)
        bound = torch.maximum(floor, nucleus)
        if many < vocab and open_end.any():
            rest = np.flatnonzero(open_end.squeeze(1).numpy())
            at = indices(rest)
            bound[at] = threshold(x[at], peak[at], weights[at], floor[at], top_k[rest], top_p[rest], vocab)
        return bound
    return floor


# ---- log-probabilities ----------------------------------------------------------------------------------------------


def logprobs(logits: Tensor, ids: Tensor, top: int) -> Logprobs:
    """Raw log-probabilities of `ids`, their ranks and the `top` likeliest, row by row; equals go by id."""
    logits = logits.float()
    whole = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, ids[:, None])
    rank = (logits > chosen).sum(-1) + 1
    values, top_ids = logits.topk(top)
    by_id = top_ids.argsort(-1)
    by_value = values.gather(1, by_id).argsort(dim=-1, descending=True, stable=True)
    order = by_id.gather(1, by_value)
    return Logprobs(
        chosen=(chosen - whole).squeeze(1).numpy(),
        rank=rank.int().numpy(),
        top_ids=top_ids.gather(1, order).int().numpy(),
        top=(values - whole).gather(1, order).numpy(),
    )


def logprobs_where_asked(logits: Tensor, ids: Tensor, asked: np.ndarray) -> Logprobs | None:
    """`logprobs` of the rows whose `asked` (how many of the likeliest) is not negative; the other rows hold zeros."""
    rows = np.flatnonzero(asked >= 0)
    if not len(rows):
        return None
    at = indices(rows)
    some = logprobs(logits[at], ids[at], int(asked.max()))

    def spread(values: np.ndarray) -> np.ndarray:
        out = np.zeros((len(asked), *values.shape[1:]), values.dtype)
        out[rows] = values
        return out

    return Logprobs(spread(some.chosen), spread(some.rank), spread(some.top_ids), spread(some.top))


# ---- small conversions ----------------------------------------------------------------------------------------------


def indices(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def column(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))[:, None]
