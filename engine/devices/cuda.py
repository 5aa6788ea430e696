"""NVIDIA GPUs, plainly: torch's own operators on one stream, decode steps captured as CUDA graphs.

Attention is torch's scaled dot product over gathered blocks, in two forms. Where the host knows the lengths, a step is cut into
tiles that look back about equally far, as on cpu. Decode steps small enough that the host would be the slower one have shapes of
their own instead: sequences and block tables padded to the next bucket, lengths read on the device. The first step of a
shape runs operator by operator, the second is captured, all later ones are one replay. Large decode steps stay with the
tiles: padding would cost the GPU more than launching costs the host.

float32 means float32 here (no TF32), so that texts can be compared with the cpu's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.devices import Form, Forward, StepInputs, StepView, torch_ops
from engine.devices.kv_pool import DevicePool
from engine.devices.torch_device import (
    STORED,
    Cell,
    Frame,
    SlabKVCache,
    StreamDevice,
    common_bytes,
    decode_shape,
    padded,
    told_of_memory,
)
from engine.models import WeightPart
from engine.native.ipc import DeviceRange
from engine.types import Memory, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCK_SIZE = 16
# Queries of a tile, and what one gather of K and V may take: wider and more than on cpu, since every tile and every gather costs
# launches, and the memory is there.
TILE_WIDTHS = (1, 4, 16, 64, 256)
GATHER_BYTES = 64 << 20
# Entries of a captured step's block tables: texts of up to 256 tokens, 512 and so on to 16 384.
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
# Steps whose padded K and V take more than this in a layer are not captured. Gathered and read they are three times as many bytes
# to move: some 60 us of a large GPU's memory, about what launching a layer's operators one by one costs the host.
CAPTURED_BYTES = 64 << 20
MPS_SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


@dataclass(slots=True)
class Attention:
    """Block tables and lengths, on the host (`pages`) or, padded to a captured shape, on the device."""

    pages: torch_ops.Paging | None = None
    blocks: Tensor | None = None  # int32 [sequences, width]
    kv_len: Tensor | None = None  # int32 [sequences]
    masks: dict[int, Tensor] = field(default_factory=dict)  # by window: [sequences, 1, 1, keys]


class Described(NamedTuple):
    """A step's inputs on their way; `shape` where it is a decode step that a graph may compute."""

    ids: Tensor
    feed: Tensor
    view: StepView
    shape: tuple[int, int] | None  # (sequences, width of the block tables)


class Captured(NamedTuple):
    """A decode step as a graph. It reads its inputs where `Frame.add` puts them."""

    graph: Any
    logits: Tensor


def open_cuda(dtype: str, index: int) -> CudaDevice:
    """The GPU numbered `index` of those this process may see. Raises `UserError` where there is none."""
    count = torch.cuda.device_count()
    if not count:
        why = (
            "no GPU can be seen; ask `nvidia-smi`, or use --device cpu"
            if torch.version.cuda
            else f"torch {torch.__version__} is built without CUDA; remove .venv, then ./run.sh setup --torch-index URL"
            " with the URL of a CUDA build from pytorch.org"
        )
        raise UserError(f"--device cuda: {why}", "device")
    if index >= count:
        raise UserError(
            f"--device cuda: TE {index} needs GPU {index} and {count} can be seen; use --te {count} or less,"
            " with --pd no more TEs in all",
            "te",
        )
    torch.cuda.set_device(index)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return CudaDevice(dtype, torch.device("cuda", index))


class CudaDevice(StreamDevice):
    name = "cuda"
    block_size = BLOCK_SIZE

    def __init__(self, dtype: str, where: torch.device, graphs: bool = True, api: Any = torch.cuda):
        """`where` and `api` can be the host and what stands for torch.cuda there: everything but the graphs runs on it."""
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype}: the cuda device has {', '.join(DTYPES)}", "dtype")
        super().__init__(api, where, DTYPES[dtype], torch.float64)
        self.graphs = graphs
        self.seen: set[tuple[int, int]] = set()  # shapes of decode steps that ran
        self.captured: dict[tuple[int, int], Captured] = {}
        self.pool: Any = None  # memory that all graphs share: one runs at a time

    # ---- memory -----------------------------------------------------------------------------------------------------
    def forms(self, part: WeightPart) -> list[Form]:
        """Vectors take the activations' dtype."""
        dtype = str(self.dtype).removeprefix("torch.") if part.kind == "vector" else part.dtype
        return [Form(part.kind, dtype, part.shape, "rows", prod(part.shape) * STORED[dtype].itemsize)]

    def converted(self, part: WeightPart, raw: Tensor) -> list[Tensor]:
        value = raw.view(STORED[part.dtype]).view(part.shape)
        return [value.to(self.dtype) if part.kind == "vector" else value]

    def kv_cache(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, lender: Memory | None = None
    ) -> SlabKVCache:
        if lender is not None:
            raise UserError("--pd semi: two workers share a KV pool on --device cpu so far", "pd")
        # One block more, which is nobody's: padding writes there.
        shape = (layers, 2, blocks + 1, block_size, kv_heads, head_dim)
        nbytes = int(np.prod(shape)) * self.dtype.itemsize
        with told_of_memory(
            f"--kv-cache-memory-bytes: a KV cache of {nbytes} bytes does not fit what the GPU has free; use less",
            "kv_cache_memory_bytes",
        ):
            # Zeros: attention multiplies what a masked key holds by a weight of 0, and 0 times a leftover NaN is NaN.
            slab = torch.zeros(shape, dtype=self.dtype, device=self.where)
        at = DeviceRange(self.name, self.where.index or 0, slab.data_ptr(), nbytes)
        self.cache = SlabKVCache(slab, blocks, DevicePool(at) if self.rank.count == 1 else None)
        return self.cache

    def table_width(self) -> int:
        return WIDTHS[-1]

    # ---- steps ------------------------------------------------------------------------------------------------------
    def set_share(self, percent: int) -> None:
        """MPS gives a process its part of the GPU when it starts and never another, so this only tells whether it has that."""
        given = os.environ.get(MPS_SHARE, "100")
        if given != str(percent):
            raise UserError(
                f"a share of {percent} percent of the GPU: this TE started with {given}, and a living process can't get another;"
                f" start it with {MPS_SHARE}={percent}, under nvidia-cuda-mps-control"
            )
        if percent < 100 and not (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control").exists():
            raise UserError(
                f"a share of {percent} percent of the GPU needs MPS, and its daemon isn't there: start nvidia-cuda-mps-control -d"
            )

    def describe(self, step: StepInputs, frame: Frame) -> Described:
        shape = self.shape_of(step) if self.graphs else None
        if shape is None:
            return Described(*super().describe(step, frame), None)
        step = self.padded(step, shape)
        ids, feed, view = super().describe(step, frame)
        view.attention = Attention(blocks=frame.add(step.blocks), kv_len=frame.add(step.kv_len))
        return Described(ids, feed, view, shape)

    def shape_of(self, step: StepInputs) -> tuple[int, int] | None:
        """What a decode step is padded to; None for any other step, and for a large one."""
        assert self.cache is not None
        shape = decode_shape(step, WIDTHS)
        if shape is None or shape[0] * shape[1] * self.cache.block_bytes > CAPTURED_BYTES:
            return None
        return shape if common_bytes(shape) <= len(self.inlet) else None

    def padded(self, step: StepInputs, shape: tuple[int, int]) -> StepInputs:
        assert self.cache is not None
        spare = self.cache.blocks
        return padded(step, shape, spare, np.full(shape[0] - len(step.ids), spare * self.cache.block_size, np.int32))

    def paging(self, step: StepInputs, frame: Frame) -> Attention:
        limits = {"widths": TILE_WIDTHS, "gather_bytes": GATHER_BYTES}
        return Attention(torch_ops.Paging(step.q_start, step.kv_len, step.blocks, {}, frame.add_apart, **limits))

    def compute(self, forward: Forward, described: Described) -> Tensor:
        shape = described.shape
        if shape is None:
            return super().compute(forward, described[:3])
        captured = self.captured.get(shape)
        if captured is None:
            if shape not in self.seen:
                # Operators load their code at first use, which a capture doesn't allow; and what isn't used again costs nothing.
                self.seen.add(shape)
                return super().compute(forward, described[:3])
            captured = self.captured[shape] = self.capture(forward, described)
        captured.graph.replay()
        return captured.logits

    def capture(self, forward: Forward, described: Described) -> Captured:
        """Record a decode step. Nothing of it is computed; capturing waits for the device, once for each shape."""
        graph = torch.cuda.CUDAGraph()
        cells, self.cells = self.cells, {}  # what eager steps name must not keep the graph's memory
        try:
            # Other threads may go on using the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                logits = super().compute(forward, described[:3])
        finally:
            self.cells = cells
            self.turns.clear()
        self.pool = graph.pool()
        return Captured(graph, logits)

    # ---- operators --------------------------------------------------------------------------------------------------
    def rms_norm(self, out: Cell, x: Cell, weight: Tensor, eps: float) -> None:
        out.set(F.rms_norm(x.value, weight.shape, weight, eps))

    def add_rms_norm(self, out: Cell, residual: Cell, x: Cell, weight: Tensor, eps: float) -> None:
        total = residual.value + x.value
        residual.set(total)
        out.set(F.rms_norm(total, weight.shape, weight, eps))

    def linear(self, out: Cell, x: Cell, weight: Tensor, bias: Tensor | None = None, sensitive: bool = False) -> None:
        """Nothing is rounded here, so `sensitive` changes nothing."""
        out.set(F.linear(x.value, weight, bias))

    def head_norm(self, qkv: Cell, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, eps: float) -> None:
        packed, dim = qkv.value, len(q_weight)
        q, k, v = packed.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        q, k = (
            F.rms_norm(x.unflatten(1, (-1, dim)), (dim,), weight, eps).flatten(1) for x, weight in ((q, q_weight), (k, k_weight))
        )
        qkv.set(torch.cat((q, k, v), dim=1))

    def rope_store(
        self,
        qkv: Cell,
        positions: Tensor,
        cos_sin: Tensor,
        kv: tuple[Tensor, Tensor],
        kv_slots: Tensor,
        heads: int,
        kv_heads: int,
    ) -> None:
        turn = self.turns.get(id(cos_sin))
        if turn is None:
            cos, sin = torch.index_select(cos_sin, 0, positions)[:, None].chunk(2, dim=2)
            turn = self.turns[id(cos_sin)] = cos, sin, kv_slots.long()
        cos, sin, slots = turn
        keys, values = (cache.flatten(0, 1) for cache in kv)
        packed, dim = qkv.value, keys.shape[2]
        a, b = packed[:, : (heads + kv_heads) * dim].unflatten(1, (-1, dim)).chunk(2, dim=2)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=2).to(self.dtype)  # float32 before: the table's dtype
        v = packed[:, (heads + kv_heads) * dim :].unflatten(1, (-1, dim))
        keys.index_copy_(0, slots, turned[:, heads:])
        values.index_copy_(0, slots, v)
        self.stored()
        qkv.parts = turned[:, :heads], turned[:, heads:], v  # where attention takes the queries from

    def attention(
        self,
        out: Cell,
        qkv: Cell,
        kv: tuple[Tensor, Tensor],
        attention: Attention,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int,
    ) -> None:
        query = self.heads(qkv, heads, kv_heads)[0].flatten(1)
        if attention.pages is None:
            out.set(self.decode_attention(query, kv, attention, scale, window))
            return
        keys = kv[0]

        def scratch(name: str, rows: int, width: int) -> Tensor:
            return torch.empty((rows, width), dtype=self.dtype, device=self.where)

        plan = attention.pages.plan(window, keys.shape[1], 2 * keys[0, 0].numel() * keys.element_size())
        attended = torch.empty_like(query)
        torch_ops.attention(attended, query, kv, plan, heads, kv_heads, scale, scratch, tile_attention)
        out.set(attended)

    def decode_attention(
        self, query: Tensor, kv: tuple[Tensor, Tensor], attention: Attention, scale: float, window: int
    ) -> Tensor:
        """One query a sequence, over its whole padded table."""
        assert attention.blocks is not None and attention.kv_len is not None
        keys, values = kv
        rows, width = attention.blocks.shape
        _, block_size, kv_heads, dim = keys.shape
        mask = attention.masks.get(window)
        if mask is None:
            ends = attention.kv_len[:, None]
            at = torch.arange(width * block_size, dtype=torch.int32, device=self.where)
            hidden = (at >= ends) | (at < ends - window) if window else at >= ends
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.where).masked_fill_(hidden, -torch.inf)
            mask = attention.masks[window] = mask[:, None, None]
        blocks = attention.blocks.view(-1)
        k, v = (
            torch.index_select(cache, 0, blocks).view(rows, width * block_size, kv_heads, dim).transpose(1, 2)
            for cache in (keys, values)
        )
        # The queries that share a key head stand as rows of one small matrix.
        q = query.view(rows, kv_heads, -1, dim)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).reshape(rows, -1)

    def swiglu(self, out: Cell, gate_up: Cell) -> None:
        gate, up = gate_up.value.chunk(2, dim=1)
        out.set(F.silu(gate) * up)


def tile_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, enable_gqa: bool = False) -> Tensor:
    """[n, heads, width, dim] over [n, kv_heads, keys, dim]. torch's fast kernels know masks and they know grouped queries, but
    not both: the queries that share a key head stand one under another instead."""
    mask = mask.to(q.dtype)
    if not enable_gqa:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    width, kv_heads = q.shape[2], k.shape[1]
    group = q.shape[1] // kv_heads
    rows = q.unflatten(1, (kv_heads, group)).flatten(2, 3)
    attended = F.scaled_dot_product_attention(rows, k, v, mask.repeat(1, 1, group, 1), scale=scale)
    return attended.unflatten(2, (group, width)).flatten(1, 2)
