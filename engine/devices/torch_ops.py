"""The operators of a transformer step in plain torch: they serve where nothing faster does, and are the oracle of what is.

Every function writes its output argument in place; shapes are [rows, width]. Sums that decide accuracy run in float32
whatever the activations' dtype. Norm gains and biases are float32 (`WeightSpec` kind "vector"). Knows neither models
nor the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

KV = tuple[Tensor, Tensor]  # keys and values of a layer: [blocks, block_size, kv_heads, head_dim]
Scratch = Callable[[str, int, int], Tensor]  # (name, rows, width) -> memory that keeps its contents until asked for again


def embed(out: Tensor, table: Tensor, ids: Tensor) -> None:
    """out[i] = table[ids[i]]"""
    torch.index_select(table, 0, ids, out=out)


def take_rows(out: Tensor, x: Tensor, rows: Tensor) -> None:
    """out[i] = x[rows[i]]"""
    torch.index_select(x, 0, rows, out=out)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """out = x / sqrt(mean(x**2) + eps) * weight, row by row, in float32"""
    out.copy_(F.rms_norm(x.float(), weight.shape, weight, eps))


def add_rms_norm(out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """residual += x, then out = rms_norm(residual); `out` may be `x`"""
    residual.add_(x)
    rms_norm(out, residual, weight, eps)


def linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, sensitive: bool = False) -> None:
    """out = x @ weight.T + bias; weight [N, K]. Nothing is rounded here, so `sensitive` changes nothing."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    elif bias.dtype == x.dtype:
        torch.addmm(bias, x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out=out)
        out.add_(bias)


def swiglu(out: Tensor, gate_up: Tensor) -> None:
    """out = silu(first half of gate_up's columns) * second half, in float32"""
    gate, up = gate_up.chunk(2, dim=1)
    torch.mul(F.silu(gate.float()), up, out=out)


def head_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, eps: float) -> None:
    """RMS norm of each query head and each key head of [q | k | v] rows, in place"""
    dim = len(q_weight)
    q = qkv[:, : heads * dim].unflatten(1, (heads, dim))
    k = qkv[:, heads * dim : (heads + kv_heads) * dim].unflatten(1, (kv_heads, dim))
    rms_norm(q, q, q_weight, eps)
    rms_norm(k, k, k_weight, eps)


# ---- rotary positions and the cache ---------------------------------------------------------------------------------


def rotation(cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The step's rows of the rope table, as `rope_store` wants them: cos [T, 1, 1, half] and (-sin, sin) [T, 1, 2, half]."""
    cos, sin = torch.index_select(cos_sin, 0, positions).chunk(2, dim=1)
    return cos[:, None, None, :], torch.stack((-sin, sin), dim=1)[:, None]


def rope_store(qkv: Tensor, turn: tuple[Tensor, Tensor], kv: KV, kv_slots: Tensor, heads: int, kv_heads: int) -> None:
    """Rotate the query and key heads of [q | k | v] rows in place, and write k and v to the cache at `kv_slots` (int64).

    With (a, b) the halves of a head: a' = a cos - b sin, b' = b cos + a sin.
    """
    cos, sin = turn
    half = cos.shape[-1]
    dim = 2 * half
    q_width, kv_width = heads * dim, kv_heads * dim
    pairs = qkv[:, : q_width + kv_width].unflatten(1, (heads + kv_heads, 2, half))
    exact = pairs.float()  # `pairs` itself where activations are float32
    swapped = exact.flip(2)
    exact.mul_(cos).addcmul_(swapped, sin)
    if exact is not pairs:
        pairs.copy_(exact)
    keys, values = kv
    keys.view(-1, kv_width).index_copy_(0, kv_slots, qkv[:, q_width : q_width + kv_width])
    values.view(-1, kv_width).index_copy_(0, kv_slots, qkv[:, q_width + kv_width :])


# ---- attention over the paged cache ---------------------------------------------------------------------------------
# A step's queries are cut into tiles: consecutive queries of one sequence, padded to one of WIDTHS. Tiles of one width
# that look back about equally far (number of blocks within a factor of two) go through attention together, as many as
# GATHER_BYTES of K and V allow. So the Python loop runs over kinds of tiles and amounts of memory, never over sequences,
# and padding keys at most doubles the work.

WIDTHS = (1, 4, 16, 64)
# What one gather of K and V may take, unless a single tile takes more. It bounds memory; speed is the same from 4 MB up
# (64 sequences of 256 tokens, SmolLM2-135M), and below that the loop shows.
GATHER_BYTES = 8 << 20


@dataclass(slots=True)
class Tiles:
    """A batch of equally wide tiles: rows `start` to `stop` of the padded queries, and what they look at."""

    start: int
    stop: int
    width: int
    count: int
    blocks: Tensor  # int32 [count * blocks of the longest]
    mask: Tensor  # float32 [count, 1, width, keys]


@dataclass(slots=True)
class Plan:
    """How a step's queries go through attention, in every layer with the same window."""

    rows: Tensor | None  # int64: query row of each padded query; None: they are the step's rows as they stand
    places: Tensor | None  # int64 [T]: the padded query that is row i
    batches: list[Tiles]


@dataclass(slots=True)
class Paging:
    """What attention needs to know of a step, as host arrays; plans are made once a step and kept here."""

    q_start: np.ndarray
    kv_len: np.ndarray
    blocks: np.ndarray
    plans: dict[int, Plan]  # by window
    upload: Callable[[np.ndarray], Tensor] = torch.from_numpy  # a plan's arrays go where the cache is
    widths: tuple[int, ...] = WIDTHS
    gather_bytes: int = field(default_factory=lambda: GATHER_BYTES)

    def plan(self, window: int, block_size: int, token_bytes: int) -> Plan:
        if window not in self.plans:
            self.plans[window] = make_plan(self, window, block_size, token_bytes)
        return self.plans[window]


def make_plan(step: Paging, window: int, block_size: int, token_bytes: int) -> Plan:
    """Cut a step into tiles and batches of tiles; numpy over tiles, Python over batches."""
    counts = np.diff(step.q_start)
    width_of = np.array(step.widths)[np.minimum(np.searchsorted(step.widths, counts), len(step.widths) - 1)]
    tiles_of = -(-counts // width_of)
    seq = np.repeat(np.arange(len(counts)), tiles_of)
    width = width_of[seq]
    first = (np.arange(len(seq)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)) * width  # query within its sequence
    valid = np.minimum(width, counts[seq] - first)
    last = step.kv_len[seq] - counts[seq] + first + valid - 1  # position of the tile's last query
    # The first query of a tile sees the oldest key.
    oldest = np.maximum(last - valid + 2 - window, 0) if window else np.zeros_like(last)
    first_block = oldest // block_size
    many = last // block_size + 1 - first_block

    order = np.lexsort((many, width))
    kind = width * 64 + np.frexp(many)[1]  # equal for equal widths and equal powers of two
    bounds = np.flatnonzero(np.diff(kind[order])) + 1
    rows: list[np.ndarray] = []
    real: list[np.ndarray] = []
    batches: list[Tiles] = []
    start = 0
    for group in np.split(order, bounds):
        longest, wide = int(many[group[-1]]), int(width[group[0]])
        fit = max(1, step.gather_bytes // (longest * block_size * token_bytes))
        for at in range(0, len(group), fit):
            part = group[at : at + fit]
            longest = int(many[part[-1]])
            columns = np.minimum(np.arange(longest), many[part, None] - 1) + first_block[part, None]
            blocks = step.blocks[seq[part, None], columns]
            # Queries of a tile stand last first, so a row's mask is that of the row above moved by one key: a view with
            # overlapping rows over one short vector. `reach` is the last query's own key, counted in gathered keys.
            reach = (last[part] - first_block[part] * block_size)[:, None]
            keys = longest * block_size
            j = np.arange(keys + wide - 1)
            seen = (j <= reach) & (j > reach - window) if window else j <= reach
            vector = step.upload(np.where(seen, np.float32(0), np.float32(-np.inf)))
            mask = vector.as_strided((len(part), 1, wide, keys), (vector.shape[1], 0, 1, 1), vector.storage_offset())
            stop = start + len(part) * wide
            batches.append(Tiles(start, stop, wide, len(part), step.upload(blocks.reshape(-1)), mask))
            # Padding repeats the tile's first query; what comes of it is not looked at.
            back = valid[part, None] - 1 - np.arange(wide)
            rows.append((step.q_start[seq[part], None] + first[part, None] + np.maximum(back, 0)).reshape(-1))
            real.append((back >= 0).reshape(-1))
            start = stop
    picked = np.concatenate(rows).astype(np.int64)
    total = int(step.q_start[-1])
    if start == total and np.array_equal(picked, np.arange(total)):
        return Plan(None, None, batches)
    places = np.empty(total, np.int64)
    found = np.flatnonzero(np.concatenate(real))
    places[picked[found]] = found
    return Plan(step.upload(picked), step.upload(places), batches)


def attention(
    out: Tensor,
    qkv: Tensor,
    kv: KV,
    plan: Plan,
    heads: int,
    kv_heads: int,
    scale: float,
    scratch: Scratch,
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> None:
    """out[i] = softmax(q[i] . k * scale) v over the keys that query i sees; queries share the K and V of their head group."""
    keys, values = kv
    dim = keys.shape[-1]
    queries = qkv[:, : heads * dim]
    padded = out
    if plan.rows is not None:
        q = scratch("attention.queries", len(plan.rows), heads * dim)
        queries = torch.index_select(queries, 0, plan.rows, out=q)
        padded = scratch("attention.out", len(plan.rows), heads * dim)
    for t in plan.batches:
        k = gather(keys, t, scratch, "attention.keys")
        v = gather(values, t, scratch, "attention.values")
        q, o = queries[t.start : t.stop], padded[t.start : t.stop]
        if t.width == 1:  # the queries that share a key head stand as rows of one small matrix
            shape = (t.count, kv_heads, heads // kv_heads, dim)
            o.view(shape).copy_(attend(q.view(shape), k, v, t.mask, scale=scale))
        else:
            shape = (t.count, t.width, heads, dim)
            q = q.view(shape).transpose(1, 2)
            attended = attend(q, k, v, t.mask, scale=scale, enable_gqa=True)
            o.view(shape).copy_(attended.transpose(1, 2))
    if plan.places is not None:
        torch.index_select(padded, 0, plan.places, out=out)


def gather(cache: Tensor, tiles: Tiles, scratch: Scratch, name: str) -> Tensor:
    """The blocks that `tiles` look at, one after another: [tiles, kv_heads, keys, head_dim]."""
    found = scratch(name, len(tiles.blocks), cache[0].numel()).view(-1, *cache.shape[1:])
    torch.index_select(cache, 0, tiles.blocks, out=found)
    return found.view(tiles.count, -1, *cache.shape[2:]).transpose(1, 2)
