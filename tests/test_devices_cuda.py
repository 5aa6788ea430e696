"""The cuda device. Its logic runs on torch's cpu device here: tokens must be those of the reference cpu device, in both forms of
attention, eager and "captured" by something that plays a graph. What only a GPU can show is skipped without one."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import devices, weight_slabs
from engine.devices import cuda, open_device, torch_device, torch_ops
from engine.devices.cpu import CpuDevice
from engine.devices.cuda import WIDTHS, Attention, Captured, CudaDevice, open_cuda
from engine.devices.torch_device import BUCKETS, Cell
from engine.distflow import block_spans
from engine.native import checksum, ipc
from engine.types import DeviceMemory, UserError
from tests import fork_source, tiny
from tests.harness import Rig, rows, setup
from tests.npu.engine import BLOCK, ModelEngine

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Done:
    """An event of a device whose work is over when a call returns."""

    waits = 0

    def record(self) -> None: ...

    def synchronize(self) -> None:
        Done.waits += 1


HOST = SimpleNamespace(
    Event=Done,
    set_device=lambda where: None,
    device_count=lambda: 2,
    synchronize=lambda: None,
    empty_cache=lambda: None,
)


class PlayedGraph:
    """What a graph does: compute again from the memory that was there at its capture, into the memory that its outputs had."""

    def __init__(self, device: PlayedDevice, forward, described):
        self.device, self.forward, self.described = device, forward, described
        self.logits = self.compute().clone()
        self.replays = 0

    def compute(self) -> torch.Tensor:
        self.device.turns.clear()
        view = self.described.view
        view.attention = Attention(blocks=view.attention.blocks, kv_len=view.attention.kv_len)
        return super(CudaDevice, self.device).compute(self.forward, self.described[:3])

    def replay(self) -> None:
        self.replays += 1
        self.logits.copy_(self.compute())


class PlayedDevice(CudaDevice):
    def capture(self, forward, described) -> Captured:
        graph = PlayedGraph(self, forward, described)
        return Captured(graph, graph.logits)


def device(kind: str, where: str = "cpu", block_size: int = 16) -> CudaDevice:
    """`kind`: "captured float32", say, or "eager bfloat16"."""
    how, dtype = kind.split()
    opened = open_cuda(dtype, 0) if where == "cuda" else PlayedDevice(dtype, torch.device("cpu"), api=HOST)
    opened.graphs, opened.block_size = how == "captured", block_size
    return opened


PLACES = ["cpu", pytest.param("cuda", marks=GPU)]
KINDS = ("eager float32", "captured float32")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def cell(value: torch.Tensor) -> Cell:
    made = Cell()
    made.set(value)
    return made


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model")


# ---- operators against the cpu device's -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_row_operators(dtype, where):
    ours, count = device(f"eager {dtype}", where), 7
    kind = ours.dtype
    x, more, gain = (numbers(*shape, seed=i).to(kind) for i, shape in enumerate([(count, 32), (count, 32), (32,)]))
    weight, bias = numbers(48, 32, seed=3).to(kind), numbers(48, seed=4).to(kind)
    ids = torch.tensor([3, 3, 0, 8, 1], dtype=torch.int32)
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}[dtype]

    def there(x: torch.Tensor) -> torch.Tensor:
        return x.to(ours.where)

    def close(found: Cell, expected: torch.Tensor) -> None:
        assert found.value.dtype == kind
        torch.testing.assert_close(found.value.cpu().float(), expected.float(), atol=tolerance, rtol=tolerance)

    def norm(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        torch_ops.rms_norm(out, x, gain.float(), 1e-5)
        return out

    out, residual = Cell(), cell(there(x))
    ours.rms_norm(out, cell(there(x)), there(gain), 1e-5)
    close(out, norm(x))
    ours.add_rms_norm(out, residual, cell(there(more)), there(gain), 1e-5)
    close(residual, x + more)
    close(out, norm(x + more))
    ours.linear(out, cell(there(x)), there(weight))
    close(out, x.float() @ weight.float().T)
    ours.linear(out, cell(there(x)), there(weight), there(bias))
    close(out, x.float() @ weight.float().T + bias.float())
    ours.swiglu(out, cell(there(x)))
    gate, up = x.float().chunk(2, dim=1)
    close(out, torch.nn.functional.silu(gate) * up)
    ours.embed(out, there(weight), there(ids))
    close(out, weight[ids])
    ours.take_rows(out, cell(there(x)), there(ids.clamp(max=6)))
    close(out, x[ids.clamp(max=6)])


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_norm_and_rope_store(dtype, where):
    ours, cpu = device(f"eager {dtype}", where), CpuDevice(dtype, 1)
    heads, kv_heads, dim, count = 4, 2, 16, 5
    qkv = numbers(count, (heads + 2 * kv_heads) * dim).to(ours.dtype)
    gains = numbers(dim, seed=1), numbers(dim, seed=2)
    angles = numbers(50, dim // 2, seed=3).numpy()
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    positions, slots = np.array([3, 49, 0, 7, 3], np.int32), np.array([11, 30, 47, 0, 5], np.int32)
    expected, cache = qkv.clone(), cpu.kv_cache(1, 3, 16, kv_heads, dim).layer(0)
    cpu.head_norm(expected, *gains, heads, kv_heads, 1e-5)
    at = torch.from_numpy(slots).long()
    cpu.rope_store(expected, torch.from_numpy(positions), cpu.constant(table), cache, at, heads, kv_heads)

    packed, kv = cell(qkv.to(ours.where)), ours.kv_cache(1, 3, 16, kv_heads, dim).layer(0)
    ours.head_norm(packed, *(g.to(ours.where, ours.dtype) for g in gains), heads, kv_heads, 1e-5)
    ours.rope_store(packed, ours.constant(positions), ours.constant(table), kv, ours.constant(slots), heads, kv_heads)
    found = torch.cat([part.flatten(1) for part in packed.parts], dim=1)
    tolerance = 1e-5 if dtype == "float32" else 4e-2
    torch.testing.assert_close(found.cpu().float(), expected.float(), atol=tolerance, rtol=tolerance)
    for a, b in zip(kv, cache, strict=True):
        torch.testing.assert_close(a[:3].cpu().float(), b.float(), atol=tolerance, rtol=tolerance)
        assert not a[3].any(), "the block that is nobody's was written"


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("window", [0, 1, 6, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["tiles", "decode"])
def test_attention_over_pages(form, dtype, window, where, monkeypatch):
    """Prefill, chunks over a prefix and decodes in one step; decodes alone, padded to a shape."""
    monkeypatch.setattr(cuda, "GATHER_BYTES", 20_000)
    ours, cpu = device(f"eager {dtype}", where), CpuDevice("float32", 1)
    heads, kv_heads, dim = 6, 2, 16
    counts, ends = np.array([1, 30, 1, 4, 300, 1]), np.array([40, 30, 129, 200, 330, 1], np.int32)
    if form == "decode":
        counts = np.ones(6, int)
    blocks = np.random.default_rng(window).permutation(6 * 21).astype(np.int32).reshape(6, 21)
    starts = np.append(0, np.cumsum(counts)).astype(np.int32)
    kv = tuple(numbers(6 * 21, 16, kv_heads, dim, seed=s).to(ours.dtype) for s in (1, 2))
    qkv = numbers(int(counts.sum()), (heads + 2 * kv_heads) * dim, seed=3).to(ours.dtype)
    expected = torch.empty(len(qkv), heads * dim)
    plain = tuple(cache.float() for cache in kv)
    paging = torch_ops.Paging(starts, ends, blocks, {})
    cpu.attention(expected, qkv.float(), plain, paging, heads, kv_heads, dim**-0.5, window)
    if form == "decode":
        attention = Attention(blocks=ours.constant(blocks), kv_len=ours.constant(ends))
    else:
        frame = SimpleNamespace(add_apart=ours.constant)
        attention = ours.paging(SimpleNamespace(q_start=starts, kv_len=ends, blocks=blocks), frame)
    out = Cell()
    there = tuple(cache.to(ours.where) for cache in kv)
    ours.attention(out, cell(qkv.to(ours.where)), there, attention, heads, kv_heads, dim**-0.5, window)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(out.value.cpu().float(), expected, atol=tolerance, rtol=tolerance)


# ---- whole steps --------------------------------------------------------------------------------------------------------


def talk(engine: ModelEngine, overlapped: bool = True) -> ModelEngine:
    """Prompts of many kinds in two waves; the second finds prefixes cached and slots used before."""
    rng = np.random.default_rng(5)
    long = rng.integers(0, 256, 300).tolist()
    engine.start(1, long, 8)
    engine.start(2, rng.integers(0, 256, 9).tolist(), 14, temperature=0.8, seed=3, logprobs=4)
    engine.start(3, rng.integers(0, 256, 60).tolist(), 10, n=3, temperature=1.2, top_p=0.9, top_k=40, seed=11)
    engine.run(overlapped)
    engine.start(4, [*long[:290], 1, 2, 3], 12, temperature=0.7, min_p=0.02, seed=1, presence_penalty=0.4)
    engine.start(5, long[:200], 12, frequency_penalty=0.6, repetition_penalty=1.2, temperature=0.0)
    engine.start(6, rng.integers(0, 256, 30).tolist(), 6, prompt_logprobs=2, temperature=0.0, logprobs=0)
    engine.start(7, [5, 6], 20, temperature=0.0, min_tokens=4, logit_bias={70: 4.0}, stop=[70])
    engine.run(overlapped)
    return engine


@pytest.fixture(scope="session")
def expected(path):
    return talk(ModelEngine(path))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_cpus(kind, overlapped, where, path, expected):
    engine = talk(ModelEngine(path, device(kind, where, BLOCK)), overlapped)
    assert engine.texts == expected.texts and engine.ends == expected.ends
    assert engine.cached == expected.cached and max(engine.cached.values()) >= 256
    assert engine.logprobs.keys() == expected.logprobs.keys() and len(expected.logprobs) == 2
    for seq, theirs in expected.logprobs.items():
        for a, b in zip(engine.logprobs[seq], theirs, strict=True):
            assert a[1:] == b[1:] and abs(a[0] - b[0]) < 1e-3
    for seq, theirs in expected.scores.items():
        for a, b in zip(engine.scores[seq], theirs, strict=True):
            assert a is b is None or (a.rank, a.top_ids) == (b.rank, b.top_ids)
    captured = engine.device.captured
    assert bool(captured) == (kind == "captured float32")
    engine.device.close()


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_other_architectures(architecture, where, tmp_path):
    """Windows, biases, norms of heads, a tied head."""
    more = {
        "MistralForCausalLM": {"sliding_window": 21},
        "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1},
        "Qwen3ForCausalLM": {"head_dim": 32, "tie_word_embeddings": True, "attention_bias": True},
    }[architecture]
    model = tiny.make(tmp_path / "model", architecture, **more)
    cpu = Rig(model)
    prompts = [list(range(40, 40 + n)) for n in (3, 60)]
    texts = [cpu.greedy(prompt, 12) for prompt in prompts]
    for kind in KINDS:
        rig = Rig(model, device=device(kind, where))
        assert [rig.greedy(prompt, 12) for prompt in prompts] == texts


@pytest.mark.parametrize("where", PLACES)
def test_sixteen_bits_are_close(where, path):
    """Nothing loses more than its rounding."""
    ids = np.random.default_rng(2).integers(0, tiny.VOCAB, 150).tolist()

    def logits(rig: Rig) -> np.ndarray:
        table = rig.table(150)
        parts = [(0, 140), (140, 9), (149, 1)]
        return np.concatenate([rig.logits([(ids, start, count)], [table])[:count] for start, count in parts])

    exact = logits(Rig(path))
    for dtype, mean, worst in (("bfloat16", 0.1, 1.0), ("float16", 0.02, 0.2)):
        found = logits(Rig(path, dtype=dtype, device=device(f"captured {dtype}", where)))
        difference = np.abs(found - exact)
        assert difference.mean() < mean and difference.max() < worst, (dtype, difference.mean(), difference.max())


# ---- what a step costs, and its shapes ------------------------------------------------------------------------------------


def decode(rig: Rig, count: int, length: int = 5):
    """A decode step of `count` sequences."""
    ids = list(range(length))
    step = rig.inputs([(ids, length - 1, 1)] * count, [rig.table(length) for _ in range(count)], [])
    step.rows = np.arange(count, dtype=np.int32)
    step.sampling = rows(count, position=length)
    return step


def test_shapes(path):
    """Decode steps are padded to a bucket; any other step, and one that would gather too much, is not."""
    ours = device("captured float32")
    rig = Rig(path, device=ours)
    assert ours.shape_of(decode(rig, 1)) == (1, WIDTHS[0]) and ours.shape_of(decode(rig, 5)) == (6, WIDTHS[0])
    assert ours.shape_of(rig.inputs([([1, 2, 3], 0, 3)], [rig.table(3)])) is None
    wide = decode(rig, 3)
    wide.blocks = np.zeros((3, WIDTHS[0] + 1), np.int32)
    assert ours.shape_of(wide) == (4, WIDTHS[1])
    wide.blocks = np.zeros((3, WIDTHS[-1] + 1), np.int32)
    assert ours.shape_of(wide) is None
    assert all(b / a <= 2 for a, b in pairwise(BUCKETS))
    cuda_limit = cuda.CAPTURED_BYTES // (4 * WIDTHS[0])
    ours.cache.block_bytes = cuda_limit + 1
    assert ours.shape_of(decode(rig, 4)) is None and ours.shape_of(decode(rig, 1)) is not None


def test_a_padded_step_touches_nobodys_blocks(path):
    """Table entries past a sequence's end may be anything; padding writes to the last block alone."""
    ours = device("captured float32")
    rig = Rig(path, device=ours)
    step = decode(rig, 3, 20)
    step.blocks = np.pad(step.blocks, ((0, 0), (0, 2)), constant_values=-1)
    padded = ours.padded(step, (4, 16))
    assert padded.blocks.min() >= 0 and padded.blocks.max() == ours.cache.blocks == len(ours.cache.slab[0, 0]) - 1
    assert padded.kv_slots[3] // 16 == ours.cache.blocks and padded.kv_len[3] == 1 and padded.feed[3] == -1
    rig.launch(step).result()
    touched = {int(slot) // 16 for slot in step.kv_slots}
    written = ours.cache.slab[0, 0].flatten(1).any(1).nonzero().flatten().tolist()
    assert set(written) == touched | {ours.cache.blocks}


def test_a_shape_is_captured_when_it_is_used_again(path):
    ours = device("captured float32")
    rig = Rig(path, device=ours)
    rig.greedy([1, 2, 3], 2)  # a prefill and a decode
    assert not ours.captured and ours.seen == {(1, WIDTHS[0])}
    rig.greedy([1, 2, 3], 4)
    assert list(ours.captured) == [(1, WIDTHS[0])] and ours.captured[1, WIDTHS[0]].graph.replays == 3


def test_steps_are_launched_ahead(path):
    """Each fed, on the device, the id that the one before samples; results come in any order, with one wait each."""
    rig = Rig(path, device=device("captured float32"))
    want = Rig(path).greedy([1, 2, 3], 9)
    table = rig.table(20)
    before, pending = Done.waits, []
    for done in range(9):
        ids = [1, 2, 3] + [0] * done
        start = 0 if done == 0 else len(ids) - 1
        step = rig.inputs([(ids, start, len(ids) - start)], [table], [])
        if done:
            step.feed = np.array([0], np.int32)
        step.rows = np.array([len(step.ids) - 1], np.int32)
        step.sampling = rows(1, position=len(ids))
        pending.append(rig.launch(step))
    assert [int(p.result().ids[0]) for p in reversed(pending)] == want[::-1]
    assert Done.waits - before == 9


def test_blocks_lie_where_the_layout_says():
    cache = device("eager bfloat16").kv_cache(layers=3, blocks=5, block_size=16, kv_heads=2, head_dim=8)
    cache.slab.copy_(torch.arange(cache.slab.numel()).view(cache.slab.shape) % 999)
    offsets, lengths = block_spans(cache.layout, 16, [4, 1], layers=range(1, 3))
    assert cache.pool.whole == ("cuda", 0, cache.slab.data_ptr(), cache.nbytes)
    flat = cache.slab.view(-1).view(torch.uint8)
    found = torch.cat([flat[o : o + n] for o, n in zip(offsets.tolist(), lengths.tolist(), strict=True)])
    assert torch.equal(found.view(torch.bfloat16), cache.slab[1:, :, [4, 1]].reshape(-1))


def test_a_layer_can_be_waited_for_where_others_reach_the_cache(path):
    rig = Rig(path, device=device("captured float32"))
    step = rig.inputs([([1, 2, 3], 0, 3)], [rig.table(4)], [2])
    assert not rig.launch(step).layers
    rig.kv.pool.exported = DeviceMemory(1, "cuda", 0, b"", rig.kv.nbytes)
    launched, before = rig.launch(step), Done.waits
    assert len(launched.layers) == rig.model.layers
    launched.wait_layer(1)
    assert Done.waits == before + 1
    launched.result()
    launched.wait_layer(0)
    assert Done.waits == before + 2, "what is over isn't waited for"
    assert not rig.launch(decode(rig, 2)).layers


class Apart(TorchDispatchMode):
    """Host and device tensors meet in copies alone, and no copy comes back. A meta tensor has no values, so that whatever would
    ask the device for one raises by itself."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        places = {x.device.type for x in tensors}
        if func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy):
            Apart.copies += 1
        else:
            assert len(places) < 2, f"{func} of tensors on {places}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["eager bfloat16", "captured bfloat16", "captured float32"])
def test_a_step_is_described_on_the_host_and_computed_on_the_device(kind, path, monkeypatch):
    """Nothing in a step, sampling included, asks the device for a value or mixes the two."""
    how, dtype = kind.split()
    ours = CudaDevice(dtype, torch.device("meta"), graphs=how == "captured", api=HOST)
    ours.pinned = False
    answers = []
    monkeypatch.setattr(torch_device.Frame, "receive", lambda self, tensors: answers.append([t.device.type for t in tensors]))
    monkeypatch.setattr(torch_device.Launched, "collect", lambda self: None)
    rig = Rig(path, dtype=dtype, device=ours)
    ids = list(range(30))
    mixed = rig.inputs([(ids, 0, 30), (ids, 5, 20), (ids, 9, 1)], [rig.table(30) for _ in range(3)], [29, 49])
    steps = [mixed, decode(rig, 3, 9)]
    columns = {"temperature": [0, 0.8, 1.0], "top_k": [0, 0, 5], "top_p": [1, 0.9, 1], "min_p": [0, 0, 0.1], "logprobs": 2}
    steps[1].sampling = rows(3, **columns, presence=[0.5, 0, 0], repetition=[1.2, 1, 1], has_setup=[1, 1, 0], hold_stop=[0, 1, 0])
    steps[1].setups = [setup(0, prompt=[1, 2], generated=[3], bias={4: 1.0}, counts=True), setup(1, stop_ids=[7])]
    with Apart():
        for step in steps:
            error = rig.launch(step).error
            if error is not None:
                raise error
    assert answers and all(places == ["meta"] * len(places) for places in answers) and Apart.copies


@GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_by_cuda_ipc(path, dtype):
    """NPU-fork on GPUs: weights of another process, from the same GPU's memory, and from another GPU's where there are two."""
    packed = fork_source.Packed(path, dtype)
    plain = Rig(path, dtype=dtype, device=open_cuda(dtype, 0)).greedy([3, 1, 4, 1, 5], 12)
    with fork_source.started("cuda", path, dtype) as source:
        for index in range(min(2, torch.cuda.device_count())):
            ours = open_cuda(dtype, index)
            loaded = weight_slabs.load(ours, packed.model.own, [source.offer], None)
            assert loaded.slabs.mapped == (index == 0) and loaded.path == "fork"
            assert Rig(path, dtype=dtype, device=ours, tensors=loaded.tensors).greedy([3, 1, 4, 1, 5], 12) == plain
            if index == 0:
                assert "another TE uses these weights" in source.ask("close")
            loaded.slabs.close()
        assert source.ask("close") == "closed"


@GPU
def test_slabs_of_a_gpu_summed_up_and_copied():
    """Checksums are those of the bytes, and a copy within the GPU is whole; some are longer than a batch."""
    torch.cuda.init()
    data = torch.randint(0, 256, (40 << 20,), dtype=torch.uint8)
    ours = open_cuda("float32", 0)
    slab, other = (ipc.allocate("cuda", 0, len(data)) for _ in range(2))
    ours.tensor_at(slab.address, torch.uint8, len(data)).copy_(data)
    torch.cuda.synchronize()
    ipc.copy(other, slab, 0, len(data))
    ranges = [(0, 100), (100, 17 << 20), (5, 40 << 20 >> 1), (len(data) - 1, 1)]
    expected = [checksum(data[at : at + count].numpy()) for at, count in ranges]
    assert ipc.checksums(slab, *zip(*ranges, strict=True)) == ipc.checksums(other, *zip(*ranges, strict=True)) == expected
    ipc.free(slab)
    ipc.free(other)


@GPU
def test_no_step_waits_for_the_gpu(path):
    """torch raises where a call would wait for the device; only `result` may."""
    engine = ModelEngine(path, device("captured bfloat16", "cuda", BLOCK), dtype="bfloat16")
    for task in range(4):
        engine.start(task, list(range(task, 40 + task)), 60, temperature=0.9 * (task % 2), top_p=0.9, seed=task)
    for _ in range(8):
        engine.step(overlapped=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            engine.step(overlapped=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.run()


# ---- what goes wrong ----------------------------------------------------------------------------------------------------


def test_a_dtype_it_does_not_have():
    with pytest.raises(UserError, match="bfloat16"):
        CudaDevice("int4", torch.device("cpu"), api=HOST)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    with pytest.raises(UserError, match=r"--device cuda: torch .* is built without CUDA; .* --torch-index") as e:
        open_device("cuda", "bfloat16", 1)
    assert e.value.param == "device"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match="nvidia-smi"):
        open_device("cuda", "bfloat16", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--te 2 or less") as e:
        open_device("cuda", "bfloat16", 1, index=2)
    assert e.value.param == "te"


def test_what_is_known_of_it_without_torch():
    kind = devices.kind("cuda")
    assert kind.own_memory and kind.block_size == CudaDevice.block_size == 16
    assert set(kind.dtypes) == set(cuda.DTYPES)
    assert devices.auto_dtype("cuda", True)[0] == "bfloat16" and devices.weight_format("cuda", "bfloat16", True) == "rows"
    assert "leave it out" in devices.int8_needs("cuda", "bfloat16", True)


def test_an_error_comes_out_of_the_pending_and_later_steps_run(path):
    rig = Rig(path, device=device("captured float32"))
    step = rig.inputs([([1, 2, 3], 0, 3)], [rig.table(4)], [2])
    bad = rig.device.launch(lambda device, view: 1 / 0, step)
    good = rig.launch(step)
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert good.result().scores is not None
