"""The Ascend NPU: fused operators of torch_npu on one stream, decode steps captured as graphs. No other file imports torch_npu.

A matrix stands on the device in its own format, KV blocks hold 128 tokens, which is what the fused attention reads best, and
the whole cache is one slab. Activations are bfloat16 or float16. In float32 everything runs too, attention through torch's
plain operators over gathered blocks, since the fused one takes 16 bits: for comparing texts, not for speed.

Pure decode steps are captured by `NPUGraph`, padded to the next of `BUCKETS`: the first step of a bucket runs operator by
operator, the next two are captured and take turns, so that nothing is captured before it is of use. The lengths that fused
attention takes from the host are patched into the captured tasks at each replay, on a stream of their own, while the other
graph may still run: a graph is never patched before its own last step is known to be over.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from engine.devices import Form, Forward, StepInputs, StepView, torch_ops
from engine.devices.kv_pool import PAGE, DevicePool
from engine.devices.torch_device import (
    BUCKETS,
    STORED,
    Cell,
    Frame,
    Launched,
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
BLOCK_SIZE = 128
ND = 2  # row-major (ACL_FORMAT_ND)
FRACTAL_NZ = 29  # the matrix unit's own layout: tiles of 16 x 16 (ACL_FORMAT_FRACTAL_NZ)
MASK_SIZE = 2048  # the causal mask that the fused attention wants, whatever the lengths
CAUSAL, BAND = 3, 4  # its sparse modes: aligned at the last token of queries and keys; the same with a window
# Entries of a captured step's block tables: growing texts pass from one to the next (2048 tokens, 16 384, 131 072).
WIDTHS = (16, 128, 1024)
# Blocks at the end of the cache that belong to nobody: each padding row writes its key to a slot of its own there.
PADDING_BLOCKS = -(-BUCKETS[-1] // BLOCK_SIZE)


@dataclass(slots=True)
class Matrix:
    """A weight that is multiplied with: [N, K] as stored, or int8 [K, N] with a scale for each of its N columns."""

    value: Tensor
    scale: Tensor | None = None  # float32 [N]
    scale16: Tensor | None = None  # ... in the activations' dtype


@dataclass(slots=True)
class Attention:
    """What the fused attention is told of a step."""

    q_ends: list[int]  # where each sequence's queries end, among the step's
    kv_len: list[int]
    blocks: Tensor  # int32 [sequences, width]
    pages: torch_ops.Paging | None  # for plain attention (float32)


class Described(NamedTuple):
    """A step's inputs, sent; `key` where it is a decode step that a graph may compute."""

    ids: Tensor
    feed: Tensor
    view: StepView
    key: tuple[int, int] | None  # (sequences, width of the block tables), both padded
    captured: bool  # its inputs are padded, to capture it or replay it


class Task(NamedTuple):
    """One attention in a captured graph: how it is called anew with other lengths."""

    handle: Any
    arrived: Any  # ExternalEvent that the graph waits for there
    query: Tensor
    keys: Tensor
    values: Tensor
    options: dict[str, Any]  # but for the lengths
    workspace: Tensor
    out: list[Tensor]


@dataclass(slots=True)
class Captured:
    """A decode step as a graph. It reads its inputs where `Frame.add` puts them and leaves its logits in `logits`."""

    graph: Any
    logits: Tensor
    tasks: list[Task]
    cells: dict[str, Cell]  # what its operators gave: their memory is the graph's
    newest: Launched | None = None  # the step that it last computed


class NpuDevice(StreamDevice):
    name = "npu"
    block_size = BLOCK_SIZE

    def __init__(self, dtype: str, index: int = 0, graphs: bool = True):
        """Touches the device: once in a process, and never before a fork. Raises `UserError` where there is none."""
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype}: the npu device has {', '.join(DTYPES)}", "dtype")
        count = torch.npu.device_count()
        if index >= count:
            visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
            told = f" (ASCEND_RT_VISIBLE_DEVICES={visible})" if visible else ""
            raise UserError(
                f"--device npu: TE {index} needs NPU {index} and {count} can be seen{told}; use --te {max(count, 1)} or less,"
                " with --pd no more TEs in all"
                if count
                else f"--device npu: no NPU can be seen{told}; ask `npu-smi info`, or use --device cpu",
                "te" if count else "device",
            )
        torch.npu.set_device(index)
        torch.npu.matmul.allow_hf32 = False  # float32 means float32: it is there to be compared with
        torch.npu.config.allow_internal_format = True  # else the plugin leaves matrices in rows, with a warning
        super().__init__(torch.npu, torch.device("npu", index), DTYPES[dtype], torch.float32)
        self.fused = self.dtype != torch.float32
        self.graphs = graphs and self.fused
        self.mask = torch.ones((MASK_SIZE, MASK_SIZE), dtype=torch.bool).triu(1).to(torch.int8).to(self.where)
        self.nz_sizes: dict[tuple[tuple[int, ...], torch.dtype], int] = {}  # bytes of matrices in the matrix unit's format
        self.seen: set[tuple[int, int]] = set()  # keys of decode steps that ran
        self.captured: dict[tuple[int, int], list[Captured]] = {}  # two, the next to be used first
        self.capturing: list[Task] | None = None
        self.arrivals: list[Any] = []  # events for the graph that is being captured, one for each attention
        self.pool: Any = None  # memory that all graphs share: one runs at a time
        self.updates: Any = None  # the stream that patches captured tasks
        self.frame: Frame | None = None  # of the step being launched

    # ---- memory -----------------------------------------------------------------------------------------------------
    def forms(self, part: WeightPart) -> list[Form]:
        """Matrices go into the matrix unit's format; vectors take the activations' dtype, as the operators want them; of an
        embedding rows are looked up."""
        own = str(self.dtype).removeprefix("torch.")
        if part.dtype == "int8":
            rows, columns = part.shape
            matrix = Form("matrix", "int8", (columns, rows), "nz", self.nz_bytes((columns, rows), torch.int8))
            scale16 = Form("scale16", own, (rows,), "rows", rows * self.dtype.itemsize)
            return [matrix, Form("scale", "float32", (rows,), "rows", 4 * rows), scale16]
        dtype = own if part.kind == "vector" else part.dtype
        if part.kind == "matrix" and self.fused:
            return [Form(part.kind, dtype, part.shape, "nz", self.nz_bytes(part.shape, STORED[dtype]))]
        return [Form(part.kind, dtype, part.shape, "rows", prod(part.shape) * STORED[dtype].itemsize)]

    def nz_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Tiles are whole. How many bytes that is the plugin says, by making such a tensor: layers repeat the few shapes."""
        key = shape, dtype
        if key not in self.nz_sizes:
            self.nz_sizes[key] = self.shell(shape, dtype, FRACTAL_NZ).untyped_storage().nbytes()
        return self.nz_sizes[key]

    def shell(self, shape: tuple[int, ...], dtype: torch.dtype, acl_format: int) -> Tensor:
        return torch_npu.empty_with_format(shape, dtype=dtype, device=self.where, acl_format=acl_format)

    def converted(self, part: WeightPart, raw: Tensor) -> list[Tensor]:
        if part.dtype == "int8":
            rows, columns = part.shape
            value = raw[: rows * columns].view(torch.int8).view(rows, columns)
            scale = raw[-4 * rows :].view(torch.float32)
            return [torch_npu.npu_format_cast(value.t().contiguous(), FRACTAL_NZ), scale, scale.to(self.dtype)]
        value = raw.view(STORED[part.dtype]).view(part.shape)
        if part.kind == "matrix" and self.fused:
            return [torch_npu.npu_format_cast(value, FRACTAL_NZ)]
        return [value.to(self.dtype) if part.kind == "vector" else value]

    def assembled(self, forms: Sequence[Form], tensors: Sequence[Tensor]) -> Tensor | Matrix:
        return Matrix(*tensors) if forms[0].kind == "matrix" else tensors[0]

    def bytes_of(self, tensor: Tensor, form: Form) -> Tensor:
        """A cast made a tensor of its own: all of its memory, tiles and what fills them up, is what counts."""
        if form.format != "nz":
            return super().bytes_of(tensor, form)
        assert tensor.untyped_storage().nbytes() == form.nbytes, (form, torch_npu.get_npu_format(tensor))
        return self.tensor_at(tensor.data_ptr(), torch.uint8, form.nbytes)

    def over(self, form: Form, address: int) -> Tensor:
        """Operators ask a tensor's storage for its format and shape: each gets one that the plugin made for it, which is then
        told where it lies; what it had goes. (`npu_change_data_ptr` would do that for floats, and refuses int8.)"""
        tensor = self.shell(form.shape, STORED[form.dtype], FRACTAL_NZ if form.format == "nz" else ND)
        there = self.tensor_at(address, torch.uint8, form.nbytes)
        tensor.untyped_storage()._swap_data_ptr_(there.untyped_storage())
        return tensor

    def kv_cache(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, lender: Memory | None = None
    ) -> SlabKVCache:
        if lender is not None:
            raise UserError("--pd semi: two workers share a KV pool on --device cpu so far", "pd")
        shape = (layers, 2, blocks + PADDING_BLOCKS, block_size, kv_heads, head_dim)
        nbytes = int(np.prod(shape)) * self.dtype.itemsize
        span = -(-nbytes // PAGE) * PAGE  # exported whole; torch's allocator promises no such alignment
        free = max(self.free_bytes() - 2 * PAGE, 0)
        each = nbytes // shape[2]
        with told_of_memory(
            f"--kv-cache-memory-bytes: a KV cache of {nbytes} bytes does not fit the {free} bytes that the NPU has free;"
            f" {max(free // each - PADDING_BLOCKS, 0) * each} would",
            "kv_cache_memory_bytes",
        ):
            memory = torch.empty((span + PAGE) // self.dtype.itemsize, dtype=self.dtype, device=self.where)
            memory = memory[-memory.data_ptr() % PAGE // self.dtype.itemsize :]
            # Zeros: attention multiplies what a masked key holds by a weight of 0, and 0 times a leftover NaN is NaN.
            slab = memory[: nbytes // self.dtype.itemsize].view(shape).zero_()
        at = DeviceRange(self.name, self.where.index, memory.data_ptr(), span)
        self.cache = SlabKVCache(slab, blocks, DevicePool(at) if self.rank.count == 1 else None)
        return self.cache

    # ---- steps ------------------------------------------------------------------------------------------------------
    def set_share(self, percent: int) -> None:
        """Of the cores that operators of this stream are divided among. A captured step keeps the cores it was captured with: the
        next of each shape is captured anew."""
        has = torch.npu.get_device_properties(self.where)
        cube, vector = (max(1, cores * percent // 100) for cores in (has.cube_core_num, has.vector_core_num))
        try:
            torch.npu.set_stream_limit(torch.npu.current_stream(), cube, vector)
        except RuntimeError as e:
            raise UserError(
                f"a share of {percent} percent of the NPU: its CANN can't limit a stream's cores"
                f" ({str(e).splitlines()[0]}); it takes a newer one, or no shares"
            ) from None
        self.close()  # waits for launched steps: no graph may go while it runs
        self.captured.clear()

    def describe(self, step: StepInputs, frame: Frame) -> Described:
        self.frame = frame
        key = self.key(step) if self.graphs else None
        if key is not None and key not in self.seen:
            self.seen.add(key)
            return Described(*super().describe(step, frame), key, False)
        if key is None:
            return Described(*super().describe(step, frame), None, False)
        return Described(*super().describe(self.padded(step, key), frame), key, True)

    def key(self, step: StepInputs) -> tuple[int, int] | None:
        """The shape under which a decode step is captured; None for any other step."""
        key = decode_shape(step, WIDTHS)
        return key if key is not None and common_bytes(key) <= len(self.inlet) else None

    def padded(self, step: StepInputs, key: tuple[int, int]) -> StepInputs:
        """Each row of padding writes to a slot of its own: the operator wants them unique."""
        assert self.cache is not None
        first = self.cache.blocks * self.cache.block_size
        return padded(step, key, self.cache.blocks, np.arange(first, first + key[0] - len(step.ids), dtype=np.int32))

    def paging(self, step: StepInputs, frame: Frame) -> Attention:
        pages = None
        if not self.fused:
            pages = torch_ops.Paging(step.q_start, step.kv_len, step.blocks, {}, frame.add_apart)
        # The fused operator looks at whole tables: entries past a sequence's end must at least be blocks.
        blocks = frame.add(np.maximum(step.blocks, 0))
        return Attention(step.q_start[1:].tolist(), step.kv_len.tolist(), blocks, pages)

    def compute(self, forward: Forward, described: Described) -> Tensor:
        if not described.captured:
            return super().compute(forward, described[:3])
        assert described.key is not None
        pair = self.captured.setdefault(described.key, [])
        captured = pair.pop(0) if len(pair) == 2 else self.capture(forward, described)
        pair.append(captured)
        self.replay(captured, described.view.attention)
        return captured.logits

    # ---- graphs -----------------------------------------------------------------------------------------------------
    def capture(self, forward: Forward, described: Described) -> Captured:
        """Record a decode step. Nothing of it is computed; capturing waits for the device, twice for each key in all."""
        if self.pool is None:
            self.pool = torch.npu.graph_pool_handle()
            self.updates = torch.npu.Stream()
        assert self.cache is not None
        self.arrivals = [self.arrival() for _ in self.cache.layers]
        graph = torch.npu.NPUGraph()
        cells, self.cells = self.cells, {}  # what eager steps name must not keep, nor be kept by, the graph's memory
        self.capturing = []
        try:
            # DistFlow's thread may go on using the NPU meanwhile.
            with torch.npu.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                logits = super().compute(forward, described[:3])
            return Captured(graph, logits, self.capturing, self.cells)
        finally:
            self.capturing, self.cells = None, cells

    def arrival(self) -> Any:
        """An event for a graph to wait for. It is recorded once before: in torch-npu 2.13 it comes to exist by that, and a wait
        before is left out."""
        event = torch.npu.ExternalEvent()
        event.record(self.updates)
        event.reset(self.updates)
        return event

    def replay(self, captured: Captured, attention: Attention) -> None:
        """Queue a captured step with the lengths of `attention`; the graph waits, at each of its tasks, for the patch."""
        if captured.newest is not None:
            captured.newest.collect()  # of the step before the last one: its ids have long been asked for
        assert self.frame is not None
        captured.newest = self.frame.launched
        captured.graph.replay()
        with torch.npu.stream(self.updates):
            for task in captured.tasks:
                torch.npu.graph_task_update_begin(self.updates, task.handle)
                call_attention(task, attention)
                torch.npu.graph_task_update_end(self.updates)
                task.arrived.record(self.updates)

    def captured_attention(self, query: Tensor, keys: Tensor, values: Tensor, attention: Attention, options: dict) -> Tensor:
        """Attention inside a capture: a group of tasks that `replay` can call anew."""
        assert self.capturing is not None
        stream = torch.npu.current_stream()
        lengths = {"actual_seq_qlen": attention.q_ends, "actual_seq_kvlen": attention.kv_len}
        workspace = torch_npu._npu_fused_infer_attention_score_v2_get_max_workspace(query, keys, values, **lengths, **options)
        shaped = {name: options[name] for name in ("input_layout", "block_table", "num_query_heads", "num_key_value_heads")}
        out = list(torch_npu._npu_fused_infer_attention_score_v2_infer_output(query, values, **shaped))
        arrived = self.arrivals.pop()
        arrived.wait(stream)
        arrived.reset(stream)
        task = Task(None, arrived, query, keys, values, options, workspace, out)
        torch.npu.graph_task_group_begin(stream)
        call_attention(task, attention)
        handle = torch.npu.graph_task_group_end(stream)
        self.capturing.append(task._replace(handle=handle))
        return out[0]

    # ---- operators --------------------------------------------------------------------------------------------------
    def rms_norm(self, out: Cell, x: Cell, weight: Tensor, eps: float) -> None:
        out.set(torch_npu.npu_rms_norm(x.value, weight, eps)[0])

    def add_rms_norm(self, out: Cell, residual: Cell, x: Cell, weight: Tensor, eps: float) -> None:
        normed, _, total = torch_npu.npu_add_rms_norm(residual.value, x.value, weight, eps)
        out.set(normed)
        residual.set(total)

    def linear(self, out: Cell, x: Cell, weight: Tensor | Matrix, bias: Tensor | None = None, sensitive: bool = False) -> None:
        """A quantised matrix meets activations in 8 bits, rounded a row at a time as they come; where that is `sensitive`, in
        their own 16 bits."""
        if not isinstance(weight, Matrix):
            out.set(F.linear(x.value, weight, bias))
        elif weight.scale is None:
            out.set(F.linear(x.value, weight.value, bias))
        else:
            if sensitive:
                product = torch_npu.npu_weight_quant_batchmatmul(x.value, weight.value, weight.scale16)
            else:
                rounded, scale = torch_npu.npu_dynamic_quant(x.value)
                product = torch_npu.npu_quant_matmul(
                    rounded, weight.value, weight.scale, pertoken_scale=scale, output_dtype=self.dtype
                )
            # The two want biases in different types, neither of them the activations': it is added here.
            out.set(product if bias is None else product + bias)

    def head_norm(self, qkv: Cell, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, eps: float) -> None:
        q, k, v = self.heads(qkv, heads, kv_heads)
        qkv.parts = torch_npu.npu_rms_norm(q, q_weight, eps)[0], torch_npu.npu_rms_norm(k, k_weight, eps)[0], v

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
        """What comes of q stands beside the packed rows (`Cell.parts`), where attention takes it from."""
        turn = self.turns.get(id(cos_sin))
        if turn is None:
            cos, sin = torch.index_select(cos_sin, 0, positions).to(self.dtype).chunk(2, dim=1)
            turn = self.turns[id(cos_sin)] = tuple(torch.cat((t, t), dim=1)[None, :, None, :] for t in (cos, sin))
        q, k, v = self.heads(qkv, heads, kv_heads)
        q, k = (torch_npu.npu_rotary_mul(x[None], *turn)[0] for x in (q, k))
        qkv.parts = q, k, v
        torch_npu.npu_scatter_pa_kv_cache(k, v, *kv, kv_slots, cache_mode="Norm")
        self.stored()

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
        query = self.heads(qkv, heads, kv_heads)[0]
        rows = len(query)
        if attention.pages is not None:
            out.set(self.plain_attention(query.view(rows, -1), kv, attention.pages, heads, kv_heads, scale, window))
            return
        keys, values = (cache.flatten(2) for cache in kv)
        options: dict[str, Any] = {
            "atten_mask": self.mask,
            "block_table": attention.blocks,
            "num_query_heads": heads,
            "num_key_value_heads": kv_heads,
            "softmax_scale": scale,
            "input_layout": "TND",
            "sparse_mode": BAND if window else CAUSAL,
            "block_size": keys.shape[1],
        }
        if window:
            options |= {"pre_tokens": window - 1, "next_tokens": 0}
        if self.capturing is not None:
            out.set(self.captured_attention(query, keys, values, attention, options).view(rows, -1))
            return
        attended, _ = torch_npu.npu_fused_infer_attention_score_v2(
            query, keys, values, actual_seq_qlen=attention.q_ends, actual_seq_kvlen=attention.kv_len, **options
        )
        out.set(attended.view(rows, -1))

    def plain_attention(
        self, query: Tensor, kv: torch_ops.KV, pages: torch_ops.Paging, heads: int, kv_heads: int, scale: float, window: int
    ) -> Tensor:
        keys = kv[0]

        def scratch(name: str, rows: int, width: int) -> Tensor:
            return torch.empty((rows, width), dtype=self.dtype, device=self.where)

        plan = pages.plan(window, keys.shape[1], 2 * keys[0, 0].numel() * keys.element_size())
        out = torch.empty_like(query)
        torch_ops.attention(out, query, kv, plan, heads, kv_heads, scale, scratch, softmax_attention)
        return out

    def swiglu(self, out: Cell, gate_up: Cell) -> None:
        out.set(torch_npu.npu_swiglu(gate_up.value))


def call_attention(task: Task, attention: Attention) -> None:
    """Attention into memory that is there, with the lengths of `attention`."""
    torch_npu.npu_fused_infer_attention_score_v2.out(
        task.query,
        task.keys,
        task.values,
        actual_seq_qlen=attention.q_ends,
        actual_seq_kvlen=attention.kv_len,
        **task.options,
        workspace=task.workspace,
        out=task.out,
    )


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, enable_gqa: bool = False) -> Tensor:
    """Scaled dot-product attention spelt out: [n, heads, width, dim] over [n, kv_heads, keys, dim]."""
    count, heads, width, dim = q.shape
    grouped = q.reshape(count, k.shape[1], -1, dim) if enable_gqa else q
    scores = torch.matmul(grouped, k.transpose(2, 3)).mul_(scale)
    by_query = scores.view(count, -1, width, scores.shape[-1]) + mask if enable_gqa else scores + mask
    weights = by_query.softmax(-1).view(scores.shape)
    return torch.matmul(weights, v).view(count, heads, width, -1)
