"""The cpu device on compiled kernels: the model's forward is recorded once as a program and each step is one native call.

Recording runs the same `forward` as every device; a buffer is a fixed address here, and what changes from step to step
(row counts, ids, positions, block tables) goes in a struct beside the program. Weights are bfloat16 in the layout the
kernels read, activations that a matrix product reads are bfloat16, everything else float32. On one instruction set a
sequence's logits depend on that sequence alone, bit for bit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from engine.devices import ALONE, Forward, Rank, StepInputs, StepOutput, StepView
from engine.devices.kv_pool import KVPool, Part
from engine.devices.native_sampler import Answer, NativeSampler, Sampling
from engine.models import WeightPart
from engine.models.rope import Table
from engine.native import cpu
from engine.types import KVLayout, Memory, UserError

QUANT_BYTES, QUANT_COLUMNS = 4, 64  # native/cpu/cpu.h
MEETING_BYTES = mmap.PAGESIZE  # of the ranks' memory, before the buffers: a ds_meeting
ROTATION_ROWS = 128  # computed at once: some 20 us for heads of 64
LARGEST_VOCABULARY = (4 << 20) // 12  # native/cpu/sample.inc.h: three rows of logits fit a thread's scratch


class Rows(IntEnum):
    """What a buffer has a row for; native/cpu/cpu.h: ds_op.sampled."""

    TOKENS = 0
    SAMPLED = 1


@dataclass(slots=True, frozen=True)
class Weight:
    """A packed matrix, in one part or several one under another, or a float32 vector."""

    parts: Sequence[WeightPart]  # keep the memory

    @property
    def address(self) -> int:
        """Of a weight in one part."""
        (part,) = self.parts
        return address_of(part.data)


@dataclass(slots=True)
class Buffer:
    """A named scratch, in up to two forms: operators that feed a matrix product write `half`, all others `full`."""

    name: str
    rows: Rows
    width: int
    full: int = 0  # address of float32 [rows, width]; 0: not used so far
    half: int = 0  # address of bfloat16 [rows, width]
    shared: bool = False  # lies in the ranks' memory

    @property
    def stride(self) -> int:
        return self.width


@dataclass(slots=True, frozen=True)
class Shard:
    """Columns of a buffer that the ranks share: those that this one writes."""

    whole: Buffer
    first: int
    width: int

    @property
    def rows(self) -> Rows:
        return self.whole.rows

    @property
    def stride(self) -> int:
        return self.whole.width


class Rotation:
    """A rope table whose rows are computed when a step first comes so far: those that no text reaches take neither time nor
    memory."""

    def __init__(self, table: Table):
        self.table = table
        self.memory = mmap.mmap(-1, table.length * table.width * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.rows = np.frombuffer(self.memory, np.float32).reshape(table.length, table.width)
        self.address = pointer(self.rows)
        self.done = 0  # rows that are there

    def reaching(self, length: int) -> int:
        """Its address, with the first `length` rows there. No step that runs reads what is added."""
        if length > self.done:
            upto = min(-(-length // ROTATION_ROWS) * ROTATION_ROWS, self.table.length)
            self.rows[self.done : upto] = self.table.rows(self.done, upto)
            self.done = upto
        return self.address


class LayerKV(NamedTuple):
    """One layer's caches."""

    kind: int  # of cpu.KV_KINDS
    keys: int  # address
    values: int
    stride: int  # words of 16 bits from one group of tokens to the next


class NativeKVCache:
    """K and V of a kind of `cpu.KV_KINDS`, in the kernels' layout, a block's layers side by side."""

    def __init__(
        self,
        layers: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        kind: str = "bfloat16",
        lender: Memory | None = None,
        rank: Rank = ALONE,
    ):
        run = cpu.kv_run(kind, head_dim)
        each = kv_heads * run  # bytes of a group in one layer
        groups = blocks * block_size // cpu.KV_GROUP
        self.nbytes = groups * layers * each
        part = Part(rank.pool, rank.index, rank.count) if rank.count > 1 else None
        self.pool = KVPool(self.nbytes, lender, part)
        self.block_bytes = self.nbytes // blocks
        parts = 2 if kind == "bfloat16" else 1  # with int8 a head's keys and values are one run
        self.layout = KVLayout(
            format=f"panels-{kind}-{head_dim}",
            layers=layers,
            layer_stride=each,
            parts=parts,
            part_stride=each // 2,
            units=groups,
            unit_stride=layers * each,
            unit_tokens=cpu.KV_GROUP,
            heads=kv_heads,
            head_bytes=run // parts,
            ranks=rank.count,
            rank_stride=self.pool.stride,
        )
        base, number = address_of(self.pool.view), cpu.KV_KINDS[kind]
        keys = [base + i * each for i in range(layers)]
        self._layers = [LayerKV(number, at, at + each // 2 if kind == "bfloat16" else 0, layers * each // 2) for at in keys]

    def layer(self, index: int) -> LayerKV:
        return self._layers[index]

    def commit(self, blocks: int) -> None:
        self.pool.commit(blocks * self.block_bytes)


@dataclass(slots=True)
class Frame:
    """What one launched step needs of its own: the program with its sampling structs, and what they point to. Two take
    turns, so that a step can be described while the one before it runs."""

    ops: Any  # the program as a C array
    sampled: Sampling
    scored: Sampling
    step: cpu.Step | None = None
    ticket: int = -1  # of the newest step launched from it
    kept: tuple[Any, ...] = ()


@dataclass(slots=True)
class Launched:
    """A step in the team's queue."""

    team: cpu.Team
    ticket: int
    sampled: Answer
    scored: Answer
    stores: Sequence[int]  # number of each layer's operator that writes its keys and values

    def result(self) -> StepOutput:
        self.team.wait(self.ticket)
        return StepOutput(self.sampled.ids, self.sampled.logprobs, self.scored.logprobs)

    def wait_layer(self, layer: int) -> None:
        self.team.wait_operator(self.ticket, self.stores[layer])


class NativeCpuDevice:
    name = "cpu"
    block_size = 16

    def __init__(self, threads: int, cores: Sequence[int] | None = None, kv_dtype: str = "auto", rank: Rank = ALONE):
        self.threads = threads
        self.cores = cores
        self.rank = rank
        self.shared_end = MEETING_BYTES  # of what is taken of the ranks' memory
        self.kv_kind = "int8" if kv_dtype == "int8" else "bfloat16"
        self.memory: dict[str, mmap.mmap] = {}
        self.buffers: dict[tuple[str, Rows], Buffer] = {}
        self.program: list[cpu.Op] | None = None
        self.frames: list[Frame] = []  # the next to be used first
        self.logits = 0  # address
        self.stores: list[int] = []
        self.cos_sin: Rotation | None = None
        self.team: cpu.Team | None = None
        self.share = 100  # percent

    # ---- memory -----------------------------------------------------------------------------------------------------
    def weight(self, parts: Sequence[WeightPart]) -> Weight:
        return Weight(parts)

    def rope_table(self, table: Table) -> Rotation:
        return Rotation(table)

    def kv_cache(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, lender: Memory | None = None
    ) -> NativeKVCache:
        assert block_size % cpu.KV_GROUP == 0, "capacity.resolve lets no other through"
        self.kv_block = block_size
        return NativeKVCache(layers, blocks, block_size, kv_heads, head_dim, self.kv_kind, lender, self.rank)

    def configure(self, *, vocab: int, slots: int, tokens: int) -> None:
        if vocab > LARGEST_VOCABULARY:
            raise UserError(
                f"--model: a vocabulary of {vocab} is more than the compiled sampler's {LARGEST_VOCABULARY}; use --dtype float32",
                "dtype",
            )
        self.most = {Rows.TOKENS: tokens, Rows.SAMPLED: tokens}
        self.sampler = NativeSampler(vocab, slots)

    def buffer(self, name: str, rows: Rows, width: int) -> Buffer:
        return self.buffers.setdefault((name, rows), Buffer(name, rows, width))

    def full(self, b: Buffer | Shard) -> int:
        if isinstance(b, Shard):
            return self.full(b.whole) + 4 * b.first
        if not b.full:
            b.full = self.room(b, "full", 4)
        return b.full

    def half(self, b: Buffer | Shard) -> int:
        if isinstance(b, Shard):
            return self.half(b.whole) + 2 * b.first
        if not b.half:
            b.half = self.room(b, "half", 2)
        return b.half

    def room(self, b: Buffer, form: str, item: int) -> int:
        name, nbytes = f"{b.name}.{form}", self.most[b.rows] * b.width * item
        return self.shared(name, nbytes) if b.shared else self.scratch(name, nbytes)

    def scratch(self, name: str, nbytes: int) -> int:
        """Anonymous memory, committed as rows are first written: most steps write few of the rows there is room for."""
        self.memory[name] = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return address_of(self.memory[name])

    def shared(self, name: str, nbytes: int) -> int:
        """The same for a buffer that every rank maps: all record the same program, so each finds it in the same place."""
        offset, end = self.shared_end, -(-(self.shared_end + nbytes + 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        # Written behind the buffer's end, a byte makes the file long enough: whoever comes later doesn't shorten it.
        os.pwrite(self.rank.memory, b"\0", end - 1)
        self.memory[name] = mmap.mmap(self.rank.memory, end - offset, offset=offset)
        self.shared_end = end
        return address_of(self.memory[name])

    def shard(self, out: Buffer, bounds: Sequence[int]) -> Buffer | Shard:
        if self.rank.count == 1:
            return out
        out.shared = True
        first, last = bounds[self.rank.index : self.rank.index + 2]
        return Shard(out, first, last - first)

    # ---- execution --------------------------------------------------------------------------------------------------
    def set_share(self, percent: int) -> None:
        """Of the time of its threads: fewer of them work, and these rest between operators. A step that runs is slowed too."""
        self.share = percent
        if self.team is not None:
            self.team.share(percent)

    def launch(self, forward: Forward, step: StepInputs) -> Launched:
        if self.program is None:
            self.record(forward)
        assert self.cos_sin is not None and self.team is not None
        frame, other = self.frames
        self.frames = [other, frame]
        if frame.ticket >= 0:
            self.team.wait(frame.ticket)
        if step.setups and other.ticket >= 0:
            self.team.wait(other.ticket)  # it may sample in a slot that now gets another owner
        sampler = self.sampler
        for setup in step.setups:
            sampler.set_up(setup)
        sampled = sampler.ask(frame.sampled, step.sampling)
        scored = sampler.ask_scores(frame.scored, step.score_ids, step.score_top)
        frame.ops[-1].x = self.logits + len(step.sampling.slot) * sampler.vocab * 4  # scored rows come after sampled ones
        blocks = np.ascontiguousarray(step.blocks)
        frame.kept = (step, blocks, sampled, scored)
        frame.step = cpu.Step(
            tokens=len(step.ids),
            sequences=len(step.kv_len),
            sampled=len(step.rows),
            block_size=self.kv_block,
            table_width=blocks.shape[1],
            ids=pointer(step.ids),
            positions=pointer(step.positions),
            kv_slots=pointer(step.kv_slots),
            feed=pointer(step.feed),
            last=pointer(sampler.last),
            q_start=pointer(step.q_start),
            kv_len=pointer(step.kv_len),
            blocks=pointer(blocks),
            rows=pointer(step.rows),
            cos_sin=self.cos_sin.reaching(int(step.kv_len.max())),
        )
        frame.ticket = self.team.launch(frame.ops, frame.step)
        return Launched(self.team, frame.ticket, sampled, scored, self.stores)

    def record(self, forward: Forward) -> None:
        """Run `forward` once over names instead of numbers."""
        self.program = []
        logits = forward(self, StepView(Rows.TOKENS, Rows.SAMPLED, None, None, None, None, None))
        assert isinstance(logits, Buffer)
        self.logits = self.full(logits)
        for _ in range(2):
            sampled, scored = Sampling(), Sampling()
            last = [
                cpu.Op(kind=kind, sampled=Rows.SAMPLED, x=self.logits, w=ctypes.addressof(struct), n=logits.width)
                for kind, struct in ((cpu.SAMPLE, sampled), (cpu.SCORE, scored))
            ]
            self.frames.append(Frame((cpu.Op * (len(self.program) + 2))(*self.program, *last), sampled, scored))
        self.team = cpu.Team(self.threads, self.cores)
        self.team.share(self.share)

    def close(self) -> None:
        """Wait for launched steps and end the threads."""
        if self.team is None:
            return
        for frame in self.frames:
            if frame.ticket >= 0:
                self.team.wait(frame.ticket)
        self.team.close()
        self.team = None

    # ---- operators: each appends itself to the program ------------------------------------------------------------------
    def add(self, kind: int, rows: Rows, **fields: Any) -> None:
        assert self.program is not None
        self.program.append(cpu.Op(kind, rows, **fields))

    def embed(self, out: Buffer, table: Weight, ids: None) -> None:
        kind = cpu.WEIGHT_KINDS[table.parts[0].dtype]
        self.add(cpu.EMBED, out.rows, out=self.full(out), w=table.address, n=out.width, i=(kind,))

    def rms_norm(self, out: Buffer, x: Buffer, weight: Weight, eps: float) -> None:
        self.norm(out, x, 0, weight, eps)

    def add_rms_norm(self, out: Buffer, residual: Buffer, x: Buffer, weight: Weight, eps: float) -> None:
        self.norm(out, residual, self.full(x), weight, eps)

    def norm(self, out: Buffer, x: Buffer, added: int, weight: Weight, eps: float) -> None:
        self.add(cpu.RMS_NORM, out.rows, out=self.half(out), x=self.full(x), y=added, w=weight.address, n=out.width, f=(eps,))

    def all_gather(self, out: Buffer, shard: Buffer | Shard) -> None:
        """Nothing is copied: each rank has written its columns where all read them."""
        if self.rank.count == 1:
            return
        assert self.program is not None
        if self.stores and all(op.kind != cpu.MEET for op in self.program[self.stores[-1] :]):
            self.stores[-1] = len(self.program)  # that the other ranks have written the layer's too shows where they meet
        if "meeting" not in self.memory:
            self.memory["meeting"] = mmap.mmap(self.rank.memory, MEETING_BYTES)
        self.add(cpu.MEET, out.rows, x=address_of(self.memory["meeting"]), n=self.rank.count)

    def linear(self, out: Buffer | Shard, x: Buffer, weight: Weight, bias: Weight | None = None, sensitive: bool = False) -> None:
        to, added = self.full(out), bias.address if bias is not None else 0
        for part in weight.parts:
            n, k = part.shape
            i = (cpu.WEIGHT_KINDS[part.dtype], sensitive)
            y = 0 if part.dtype == "bfloat16" else self.quantised(k)
            w = address_of(part.data)
            self.add(cpu.LINEAR, out.rows, out=to, x=self.half(x), y=y, w=w, b=added, n=n, k=k, stride=out.stride, i=i)
            to += 4 * n
            added += 4 * n if added else 0

    def quantised(self, k: int) -> int:
        """Room for quantised activations of k columns; one matrix product at a time uses it."""
        name = f"quantised.{k}"
        if name not in self.memory:
            return self.scratch(name, max(self.most.values()) * -(-k // QUANT_COLUMNS) * QUANT_COLUMNS * QUANT_BYTES)
        return address_of(self.memory[name])

    def head_norm(self, qkv: Buffer, q_weight: Weight, k_weight: Weight, heads: int, kv_heads: int, eps: float) -> None:
        dim = qkv.width // (heads + 2 * kv_heads)
        i = (heads, kv_heads, dim)
        self.add(cpu.HEAD_NORM, qkv.rows, x=self.full(qkv), w=q_weight.address, y=k_weight.address, i=i, f=(eps,))

    def rope_store(
        self, qkv: Buffer, positions: None, cos_sin: Rotation, kv: LayerKV, kv_slots: None, heads: int, kv_heads: int
    ) -> None:
        assert self.cos_sin is None or self.cos_sin is cos_sin, "one rope table a model"
        self.cos_sin = cos_sin
        assert self.program is not None
        self.stores.append(len(self.program))
        dim = qkv.width // (heads + 2 * kv_heads)
        self.add(cpu.ROPE_STORE, qkv.rows, x=self.full(qkv), i=(heads, kv_heads, dim), **self.cache(kv))

    def attention(
        self, out: Buffer | Shard, qkv: Buffer, kv: LayerKV, attention: None, heads: int, kv_heads: int, scale: float, window: int
    ) -> None:
        dim = qkv.width // (heads + 2 * kv_heads)
        i = (heads, kv_heads, dim, window)
        self.fetch_on_the_way()
        to = self.half(out)
        self.add(cpu.ATTENTION, out.rows, out=to, x=self.full(qkv), stride=out.stride, i=i, f=(scale,), **self.cache(kv))

    @staticmethod
    def cache(kv: LayerKV) -> dict[str, int]:
        return {"y": kv.keys, "b": kv.values, "n": kv.stride, "k": kv.kind}

    def fetch_on_the_way(self) -> None:
        """The attention that is added next has its keys and values asked for by the matrix products since the one before it, by
        the tiles they have."""
        assert self.program is not None
        linears: list[tuple[int, cpu.Op]] = []
        for n in range(len(self.program) - 1, -1, -1):
            op = self.program[n]
            if op.kind == cpu.ATTENTION:
                break
            if op.kind == cpu.LINEAR:
                linears.insert(0, (n, op))
        total, before = sum(op.n for _, op in linears), 0
        for n, op in linears:
            op.i[2] = len(self.program) - n
            op.f[0], op.f[1] = before / total, (before + op.n) / total
            before += op.n

    def swiglu(self, out: Buffer | Shard, gate_up: Buffer) -> None:
        self.add(cpu.SWIGLU, out.rows, out=self.half(out), x=self.full(gate_up), n=out.width, stride=out.stride)

    def take_rows(self, out: Buffer, x: Buffer, rows: None) -> None:
        self.add(cpu.TAKE_ROWS, out.rows, out=self.full(out), x=self.full(x), n=out.width)


def address_of(memory: Any) -> int:
    return pointer(np.frombuffer(memory, np.uint8))


def pointer(array: np.ndarray) -> int:
    """As `array.ctypes.data`, in a quarter of the time: a step has a dozen, a program's recording some hundreds."""
    address: int = array.__array_interface__["data"][0]
    return address
