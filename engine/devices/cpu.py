"""The cpu device: the reference operators at once, on one worker thread. Owns the memory of a step and of the KV cache.

Nothing at construction starts a thread, so a process may still be forked; the first launch does. The worker runs, in
launch order, whole steps: forward pass and sampling.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

# Read by the OpenMP library when torch loads it. Its threads wait for each other after each operator, by default by
# spinning for milliseconds: with another process on the same cores a step then takes 30 times as long. This many turns
# bridge the gap to the next operator and no more.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch
from torch import Tensor

from engine.devices import Forward, StepInputs, StepOutput, StepView, torch_ops
from engine.devices.kv_pool import KVPool
from engine.devices.torch_device import over, rows_layout
from engine.devices.torch_sampler import Sampler, logprobs, logprobs_where_asked
from engine.models import WeightPart
from engine.models.rope import Table
from engine.types import Memory, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True, frozen=True)
class Launched:
    """A step in the worker's queue."""

    future: Future[StepOutput]

    def result(self) -> StepOutput:
        return self.future.result()

    def wait_layer(self, layer: int) -> None:
        self.future.result()


class CpuDevice:
    name = "cpu"
    block_size = 16

    def __init__(self, dtype: str, threads: int):
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype}: the cpu device has {' and '.join(DTYPES)}", "dtype")
        self.dtype = DTYPES[dtype]
        self.threads = threads
        self.share = 100  # percent
        self.sampler: Sampler | None = None
        self._memory: dict[str, Tensor] = {}
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}  # this step's rows of each rope table
        self._worker: ThreadPoolExecutor | None = None

    # ---- memory -----------------------------------------------------------------------------------------------------
    def weight(self, parts: Sequence[WeightPart]) -> Tensor:
        (part,) = parts  # row-major matrices are of one dtype
        return over(part.data, DTYPES[part.dtype]).view(*part.shape)

    def constant(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array))

    def rope_table(self, table: Table) -> Tensor:
        return self.constant(table.rows(0, table.length))

    def kv_cache(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, lender: Memory | None = None
    ) -> CpuKVCache:
        return CpuKVCache((layers, 2, blocks, block_size, kv_heads, head_dim), self.dtype, lender)

    def configure(self, *, vocab: int, slots: int, tokens: int) -> None:
        self.sampler = Sampler(vocab, slots)

    def buffer(self, name: str, rows: int, width: int) -> Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.numel() < rows * width:
            memory = self._memory[name] = torch.empty(rows * width, dtype=self.dtype)
        return memory[: rows * width].view(rows, width)

    # ---- execution --------------------------------------------------------------------------------------------------
    def set_share(self, percent: int) -> None:
        """In whole threads, of which one is left at least, from the next step on."""
        self.share = percent
        if self._worker is not None:
            self._worker.submit(self.take_share)

    def take_share(self) -> None:
        """The number of threads is a setting of the thread that computes: this runs there."""
        torch.set_num_threads(max(1, self.threads * self.share // 100))

    def launch(self, forward: Forward, step: StepInputs) -> Launched:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "cpu-device", self.take_share)
        return Launched(self._worker.submit(self.run, forward, step))

    @torch.inference_mode()
    def run(self, forward: Forward, step: StepInputs) -> StepOutput:
        """One step from ids to ids."""
        sampler = self.sampler
        assert sampler is not None, "configure() comes before the first launch"
        for setup in step.setups:
            sampler.set_up(setup)
        self._turns.clear()
        view = StepView(
            tokens=len(step.ids),
            sampled=len(step.rows),
            ids=sampler.resolve(torch.from_numpy(step.ids), torch.from_numpy(step.feed)),
            positions=torch.from_numpy(step.positions),
            kv_slots=torch.from_numpy(step.kv_slots).long(),
            rows=torch.from_numpy(step.rows),
            attention=torch_ops.Paging(step.q_start, step.kv_len, step.blocks, {}),
        )
        logits = forward(self, view)
        sampled = len(step.sampling.slot)
        out = StepOutput(np.empty(0, np.int32))
        if sampled:
            ids = sampler.sample(logits[:sampled], step.sampling)
            out.ids = ids.int().numpy()
            out.logprobs = logprobs_where_asked(logits[:sampled], ids, step.sampling.logprobs)
        if len(step.score_ids):
            out.scores = logprobs(logits[sampled:], torch.from_numpy(step.score_ids).long(), step.score_top)
        return out

    def close(self) -> None:
        """Wait for launched steps and end the worker thread."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    # ---- operators --------------------------------------------------------------------------------------------------
    embed = staticmethod(torch_ops.embed)
    rms_norm = staticmethod(torch_ops.rms_norm)
    add_rms_norm = staticmethod(torch_ops.add_rms_norm)
    linear = staticmethod(torch_ops.linear)
    head_norm = staticmethod(torch_ops.head_norm)
    swiglu = staticmethod(torch_ops.swiglu)
    take_rows = staticmethod(torch_ops.take_rows)

    def shard(self, out: Tensor, bounds: Sequence[int]) -> Tensor:
        return out  # the reference operators have one rank

    def all_gather(self, out: Tensor, shard: Tensor) -> None:
        """One rank has it all."""

    def rope_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        kv: torch_ops.KV,
        kv_slots: Tensor,
        heads: int,
        kv_heads: int,
    ) -> None:
        turn = self._turns.get(id(cos_sin))
        if turn is None:
            turn = self._turns[id(cos_sin)] = torch_ops.rotation(cos_sin, positions)
        torch_ops.rope_store(qkv, turn, kv, kv_slots, heads, kv_heads)

    def attention(
        self,
        out: Tensor,
        qkv: Tensor,
        kv: torch_ops.KV,
        attention: torch_ops.Paging,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int,
    ) -> None:
        keys = kv[0]
        token_bytes = 2 * keys[0, 0].numel() * keys.element_size()
        plan = attention.plan(window, keys.shape[1], token_bytes)
        torch_ops.attention(out, qkv, kv, plan, heads, kv_heads, scale, self.buffer)


class CpuKVCache:
    """K and V of every layer, in a pool that another process can map: [layers, 2, blocks, block_size, kv_heads, head_dim]."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, lender: Memory | None = None):
        self.layout = rows_layout(shape, dtype, shape[2])
        self.nbytes = self.layout.layers * self.layout.layer_stride
        self.pool = KVPool(self.nbytes, lender)
        slab = over(np.frombuffer(self.pool.view, np.uint8), dtype).view(shape)
        self._layers = [(keys, values) for keys, values in slab]

    def commit(self, blocks: int) -> None:
        """A block's layers lie far apart here: their pages come when touched."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._layers[index]
