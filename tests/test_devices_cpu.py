"""The cpu device: operators against numpy, paged attention against a plain loop, memory, the order of steps."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from engine.devices import open_device, torch_ops
from engine.devices.cpu import CpuDevice
from engine.models import WeightPart
from engine.types import OutOfMemory, UserError
from tests import tiny
from tests.harness import Rig, rows, setup

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def device():
    device = CpuDevice("float32", 1)
    yield device
    device.close()


# ---- operators ------------------------------------------------------------------------------------------------------


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def normed(x: np.ndarray, weight: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + eps) * weight


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    """Equal to what the tensor's dtype can hold."""
    tolerance = 1e-5 if found.dtype == torch.float32 else 2e-2
    np.testing.assert_allclose(found.float().numpy(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_row_operators(dtype, count):
    device = CpuDevice(dtype, 1)
    kind = device.dtype

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(kind)

    def values(x: torch.Tensor) -> np.ndarray:
        return x.float().numpy()

    x, more, gain = tensor(numbers(count, 24)), tensor(numbers(count, 24, seed=1)), torch.from_numpy(numbers(24, seed=2))
    out = device.buffer("out", count, 24)
    device.rms_norm(out, x, gain, 1e-5)
    close(out, normed(values(x), gain.numpy()))
    residual, total = x.clone(), values(x + more)
    device.add_rms_norm(out, residual, more, gain, 1e-5)
    close(residual, total)
    close(out, normed(total, gain.numpy()))

    weight, bias = tensor(numbers(10, 24, seed=3)), torch.from_numpy(numbers(10, seed=4))
    wide = device.buffer("wide", count, 10)
    device.linear(wide, x, weight)
    close(wide, values(x) @ values(weight).T)
    device.linear(wide, x, weight, bias)
    close(wide, values(x) @ values(weight).T + bias.numpy())

    half = device.buffer("half", count, 12)
    device.swiglu(half, x)
    gate, up = np.split(values(x), 2, axis=1)
    close(half, gate / (1 + np.exp(-gate)) * up)

    table, ids = tensor(numbers(9, 24, seed=5)), torch.randint(0, 9, (count,), dtype=torch.int32)
    device.embed(out, table, ids)
    assert torch.equal(out, table[ids])
    picked = device.buffer("picked", 2 * count, 24)
    twice = torch.arange(count, dtype=torch.int32).repeat(2)
    device.take_rows(picked, x, twice)
    assert torch.equal(picked, torch.cat([x, x]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_norm_and_rope_store(dtype):
    device = CpuDevice(dtype, 1)
    heads, kv_heads, dim, count = 4, 2, 8, 5
    qkv = torch.from_numpy(numbers(count, (heads + 2 * kv_heads) * dim)).to(device.dtype)
    before = qkv.float().numpy().reshape(count, -1, dim).copy()
    q_gain, k_gain = torch.from_numpy(numbers(dim, seed=1)), torch.from_numpy(numbers(dim, seed=2))
    device.head_norm(qkv, q_gain, k_gain, heads, kv_heads, 1e-5)
    expected = before.copy()
    expected[:, :heads] = normed(before[:, :heads], q_gain.numpy())
    expected[:, heads : heads + kv_heads] = normed(before[:, heads : heads + kv_heads], k_gain.numpy())
    close(qkv.view(count, -1, dim), expected)

    before = qkv.float().numpy().reshape(count, -1, dim).copy()
    angles = numbers(50, dim // 2, seed=3)
    positions, slots = np.array([3, 49, 0, 7, 3], np.int32), np.array([11, 2, 30, 31, 5])
    kv = device.kv_cache(1, 8, 4, kv_heads, dim).layer(0)
    table = device.constant(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    device.rope_store(qkv, torch.from_numpy(positions), table, kv, torch.from_numpy(slots), heads, kv_heads)
    a, b = before[..., : dim // 2], before[..., dim // 2 :]
    cos, sin = np.cos(angles)[positions][:, None], np.sin(angles)[positions][:, None]
    rotated = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)
    rotated[:, heads + kv_heads :] = before[:, heads + kv_heads :]
    close(qkv.view(count, -1, dim), rotated)
    for cache, first in zip(kv, (heads, heads + kv_heads), strict=True):
        flat = cache.reshape(-1, kv_heads, dim)
        close(flat[slots], rotated[:, first : first + kv_heads])
        rest = np.setdiff1d(np.arange(32), slots)
        assert not flat[rest].any(), "a slot that is not this step's was written"


# ---- attention ------------------------------------------------------------------------------------------------------


class Scene:
    """Sequences with K and V in a shuffled paged cache, and a step over the last tokens of each."""

    def __init__(
        self, lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, block_size: int, seed: int, dtype: torch.dtype
    ):
        rng = np.random.default_rng(seed)
        counts, ends = np.array([c for c, _ in lengths]), np.array([e for _, e in lengths])
        wide = -(-int(ends.max()) // block_size)
        blocks = rng.permutation(len(lengths) * wide).astype(np.int32).reshape(len(lengths), wide)
        keys, values = (
            torch.from_numpy(rng.standard_normal((blocks.size, block_size, kv_heads, dim)).astype(np.float32)) for _ in "kv"
        )
        self.kv = keys.to(dtype), values.to(dtype)
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.counts, self.ends, self.blocks = counts, ends, blocks.copy()
        total = int(counts.sum())
        self.qkv = torch.from_numpy(rng.standard_normal((total, (heads + 2 * kv_heads) * dim)).astype(np.float32)).to(dtype)
        table = blocks.copy()
        for row, end in enumerate(ends):  # nothing past a sequence's end may be read
            table[row, -(-int(end) // block_size) :] = -1
        self.paging = torch_ops.Paging(np.append(0, np.cumsum(counts)).astype(np.int32), ends.astype(np.int32), table, {})

    def run(self, device: CpuDevice, window: int) -> torch.Tensor:
        out = device.buffer("out", len(self.qkv), self.heads * self.dim)
        out.fill_(float("nan"))
        device.attention(out, self.qkv, self.kv, self.paging, self.heads, self.kv_heads, self.dim**-0.5, window)
        return out

    def expected(self, window: int) -> np.ndarray:
        """Query by query, head by head."""
        out, row = [], 0
        keys, values = (cache.float().numpy() for cache in self.kv)
        queries = self.qkv.float().numpy()[:, : self.heads * self.dim].reshape(-1, self.heads, self.dim)
        for s, (count, end) in enumerate(zip(self.counts, self.ends, strict=True)):
            k = keys[self.blocks[s]].reshape(-1, self.kv_heads, self.dim)
            v = values[self.blocks[s]].reshape(-1, self.kv_heads, self.dim)
            for position in range(end - count, end):
                seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
                heads = []
                for h in range(self.heads):
                    g = h // (self.heads // self.kv_heads)
                    scores = k[seen, g] @ queries[row, h] * self.dim**-0.5
                    p = np.exp(scores - scores.max())
                    heads.append(p @ v[seen, g] / p.sum())
                out.append(np.concatenate(heads))
                row += 1
        return np.array(out)


SCENES = {
    "one decode": [(1, 1)],
    "decodes": [(1, 9), (1, 9), (1, 12), (1, 10)],
    "decodes of every length": [(1, n) for n in (1, 70, 3, 33, 130, 8, 2, 64, 65)],
    "one prefill": [(40, 40)],
    "prefill of several tiles": [(150, 150)],
    "chunks": [(2, 50), (3, 3), (5, 90), (17, 40), (66, 131), (64, 64), (65, 200)],
    "mixed": [(1, 40), (30, 30), (1, 7), (4, 100), (1, 129), (100, 180), (1, 1)],
}


@pytest.mark.parametrize("window", [0, 1, 6, 70])
@pytest.mark.parametrize("name", SCENES)
def test_attention(name, window, device):
    scene = Scene(SCENES[name], 6, 2, 8, 4, 1, torch.float32)
    close(scene.run(device, window), scene.expected(window))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"), [(4, 4, 16, 16), (4, 1, 8, 1), (9, 3, 64, 16), (14, 2, 32, 5)]
)
def test_attention_shapes(heads, kv_heads, dim, block_size, device):
    scene = Scene(SCENES["mixed"], heads, kv_heads, dim, block_size, 2, torch.float32)
    close(scene.run(device, 0), scene.expected(0))
    close(scene.run(device, 9), scene.expected(9))  # a second window in the same step, as in Qwen2


def test_attention_in_bfloat16():
    scene = Scene(SCENES["mixed"], 4, 2, 16, 4, 3, torch.bfloat16)
    close(scene.run(CpuDevice("bfloat16", 1), 0), scene.expected(0))


def test_attention_within_little_memory(device):
    """However little a gather may take, the answer is the same, down to a tile at a time."""
    scene = Scene(SCENES["mixed"] + SCENES["chunks"], 6, 2, 8, 4, 4, torch.float32)
    expected = scene.expected(0)
    for limit in (1, 5000, 50_000):
        scene.paging.gather_bytes = limit
        scene.paging.plans.clear()
        close(scene.run(device, 0), expected)
        plan = scene.paging.plans[0]
        assert all(t.count == 1 or len(t.blocks) * 4 * 2 * 2 * 8 * 4 <= limit for t in plan.batches)


def test_attention_never_loops_over_sequences():
    """64 decodes of about one length go through in one batch, and as they stand."""
    paging = torch_ops.Paging(np.arange(65, dtype=np.int32), np.full(64, 100, np.int32), np.zeros((64, 7), np.int32), {})
    plan = paging.plan(0, 16, 64)
    assert len(plan.batches) == 1 and plan.rows is None
    lengths = np.random.default_rng(0).integers(1, 2000, 64).astype(np.int32)
    paging = torch_ops.Paging(np.arange(65, dtype=np.int32), lengths, np.zeros((64, 125), np.int32), {})
    assert len(paging.plan(0, 16, 1).batches) <= 8


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "stored"), [("float32", np.float32), ("bfloat16", np.uint16)])
def test_a_weight_is_a_view_of_read_only_memory(device, dtype, stored):
    """No copy, no warning, and the memory stays as long as the tensor."""
    fd = os.memfd_create("slab")
    os.ftruncate(fd, 8192)
    writer = np.frombuffer(mmap.mmap(fd, 8192), stored)
    mapping = mmap.mmap(fd, 8192, prot=mmap.PROT_READ)
    gone = weakref.ref(mapping)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight = device.weight([WeightPart(memoryview(mapping)[4096 : 4096 + 24 * writer.itemsize], dtype, (4, 6))])
    del mapping
    assert weight.shape == (4, 6) and weight.dtype == getattr(torch, dtype) and not weight.any()
    writer[4096 // writer.itemsize + 7] = 1 if dtype == "float32" else 0x3F80
    assert weight[1, 1] == 1.0 and gone() is not None
    del weight
    assert gone() is None, "the mapping outlives every tensor on it"
    os.close(fd)


def test_the_kv_cache_can_be_mapped_by_others_and_costs_nothing_until_used(device):
    blocks = 1 << 14
    cache = device.kv_cache(layers=3, blocks=blocks, block_size=16, kv_heads=2, head_dim=64)
    assert cache.nbytes == os.fstat(cache.pool.fd).st_size == 3 * 2 * blocks * 16 * 2 * 64 * 4
    assert os.fstat(cache.pool.fd).st_blocks == 0
    keys, values = cache.layer(1)
    assert keys.shape == values.shape == (blocks, 16, 2, 64)
    values[5, 3, 1] = 7.0
    assert 0 < os.fstat(cache.pool.fd).st_blocks * 512 < 1 << 20
    seen = device.kv_cache(3, blocks, 16, 2, 64, lender=cache.pool.memory)
    assert (seen.layer(1)[1][5, 3, 1] == 7.0).all() and not seen.layer(1)[0][5].any()
    at = seen.layout
    block = at.layer_stride + at.part_stride + 5 * at.unit_stride
    raw = np.frombuffer(seen.pool.view, np.float32)[block // 4 : (block + at.heads * at.head_bytes) // 4]
    assert (raw.reshape(16, 2, 64)[3, 1] == 7.0).all() and raw.sum() == 7.0 * 64
    gone = msgspec.structs.replace(cache.pool.memory, inode=1)
    with pytest.raises(UserError, match="is gone: its descriptor"):
        device.kv_cache(3, blocks, 16, 2, 64, lender=gone)


def test_a_kv_cache_that_cant_be_mapped_names_the_flag(device):
    with pytest.raises(OutOfMemory, match="--kv-cache-memory-bytes") as e:
        device.kv_cache(layers=1000, blocks=1 << 40, block_size=16, kv_heads=8, head_dim=128)
    assert e.value.param == "kv_cache_memory_bytes"


def test_buffers_are_the_same_memory_by_name(device):
    first = device.buffer("a", 3, 5)
    assert first.shape == (3, 5) and first.dtype == torch.float32
    assert device.buffer("a", 2, 5).data_ptr() == first.data_ptr()
    assert device.buffer("b", 3, 5).data_ptr() != first.data_ptr()
    assert device.buffer("a", 30, 5).shape == (30, 5)
    assert device.buffer("a", 0, 5).shape == (0, 5)


def test_an_unknown_dtype_or_device_is_refused():
    with pytest.raises(UserError, match="float32 and bfloat16"):
        CpuDevice("float16", 1)
    with pytest.raises(UserError, match="--device tpu"):
        open_device("tpu", "float32", 1)


# ---- steps ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tiny.make(tmp_path / "model"))
    yield rig
    rig.close()


def test_steps_launched_ahead_feed_each_other(rig):
    """All steps of two texts launched at once, each fed the ids the one before samples on the device, give the plain texts."""
    prompts = [[10, 20, 30, 40, 50], [99] * 11]
    expected = [rig.greedy(prompt, 6) for prompt in prompts]
    tables = [rig.table(len(p) + 6) for p in prompts]
    lengths = np.array([5, 11])
    step = rig.inputs([(p, 0, len(p)) for p in prompts], tables, [])
    step.rows = lengths.cumsum().astype(np.int32) - 1
    step.sampling = rows(2, slot=[7, 3], position=lengths)
    pending = [rig.launch(step)]
    for more in range(5):
        ids = [[0] * int(n + more + 1) for n in lengths]
        step = rig.inputs([(i, len(i) - 1, 1) for i in ids], tables, [])
        step.feed = np.array([7, 3], np.int32)
        step.rows = np.arange(2, dtype=np.int32)
        step.sampling = rows(2, slot=[7, 3], position=lengths + more + 1)
        pending.append(rig.launch(step))
    out = np.stack([p.result().ids for p in pending])
    assert out[:, 0].tolist() == expected[0] and out[:, 1].tolist() == expected[1]


def test_sampled_and_scored_rows_of_one_step(rig):
    ids = list(range(40, 60))
    table = rig.table(20)
    logits = rig.logits([(ids, 0, 20)], [table])
    step = rig.inputs([(ids, 0, 20)], [table], [])
    step.rows = np.array([19, 3, 4], np.int32)
    step.score_ids, step.score_top = np.array([44, 45], np.int32), 2
    step.sampling = rows(1, position=20, logprobs=3, has_setup=True)
    best = int(logits[19].argmax())
    step.setups = [setup(0, bias={best: -100.0})]
    out = rig.launch(step).result()
    raw = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert out.ids.tolist() == [int(np.argsort(-logits[19])[1])]
    assert out.logprobs is not None and out.scores is not None
    assert out.logprobs.rank.tolist() == [2] and out.logprobs.top_ids[0, 0] == best
    np.testing.assert_allclose(out.logprobs.chosen, raw[19, out.ids], atol=1e-4)
    np.testing.assert_allclose(out.scores.chosen, [raw[3, 44], raw[4, 45]], atol=1e-4)
    assert out.scores.top.shape == (2, 2)


def test_a_step_without_sampled_rows(rig):
    """A chunk in the middle of a prompt."""
    step = rig.inputs([([1, 2, 3], 0, 3)], [rig.table(3)], [])
    out = rig.launch(step).result()
    assert len(out.ids) == 0 and out.logprobs is None and out.scores is None


def test_an_error_comes_out_of_the_pending_and_later_steps_run(rig):
    table = rig.table(4)
    step = rig.inputs([([1, 2, 3], 0, 3)], [table], [2])
    bad = rig.device.launch(lambda device, view: 1 / 0, step)
    good = rig.launch(step)
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert good.result().scores is not None


def test_steps_run_on_one_thread_with_its_own_settings(rig):
    seen = []

    def forward(device, view):
        seen.append((threading.current_thread().name, torch.get_num_threads(), torch.is_inference_mode_enabled()))
        return rig.model.forward(device, view, rig.kv)

    before = torch.get_num_threads()
    step = rig.inputs([([1, 2], 0, 2)], [rig.table(2)], [1])
    for pending in [rig.device.launch(forward, step) for _ in range(3)]:
        pending.result()
    assert len(set(seen)) == 1 and seen[0][1:] == (1, True) and seen[0][0] != threading.current_thread().name
    assert torch.get_num_threads() == before or before == 1


def test_a_device_made_before_a_fork_serves_after_it():
    """Nothing at construction starts a thread; and the OpenMP library is told not to spin."""
    code = """
import os
import numpy as np
from engine.devices.cpu import CpuDevice
from tests.harness import rows
assert os.environ["GOMP_SPINCOUNT"] == "2000"
threads = os.listdir("/proc/self/task")  # importing numpy may have started some
device = CpuDevice("float32", 2)
device.configure(vocab=10, slots=2, tokens=16)
assert os.listdir("/proc/self/task") == threads
if os.fork() == 0:
    import torch
    from engine.devices import StepInputs
    one = np.zeros(1, np.int32)
    step = StepInputs(one, one - 1, one, one, np.array([0, 1], np.int32), one + 1, one[None], one, rows(1), one[:0])
    weight = torch.rand(512, 512)
    os._exit(0 if device.launch(lambda d, view: (weight @ weight)[:1, :10], step).result().ids[0] < 10 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, env=environment)
