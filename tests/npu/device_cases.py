"""What the npu device must do, over the stub: collected by the pytest that tests/test_devices_npu.py starts in the npu
environment, and by no other."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch_npu  # noqa: F401 - installs the dispatch mode

from engine.devices import npu as module
from engine.devices import torch_ops
from engine.devices.cpu import CpuDevice
from engine.devices.kv_pool import PAGE, KVPool
from engine.devices.npu import PADDING_BLOCKS, NpuDevice
from engine.devices.torch_device import BUCKETS, Cell
from engine.devices.torch_sampler import Sampler, device_uniform, in_order, logprobs, measure
from engine.distflow import DistFlow, Reach, Spans, block_spans, spans_between
from engine.sampler import keys, uniform
from engine.types import OutOfMemory, Peer, UserError
from tests import tiny
from tests.harness import Rig, rows, setup
from tests.npu import stub
from tests.npu.engine import ModelEngine
from tests.test_sampling import COLUMNS

KINDS = ("float32", "fused float32", "captured float32")


def npu(kind: str) -> NpuDevice:
    """A device of a dtype. "fused" float32 goes through the fused attention too, which on silicon takes 16 bits but has a
    reference for 32: tokens can be compared exactly. "captured" besides captures decode steps."""
    how, _, dtype = kind.rpartition(" ")
    device = NpuDevice(dtype, graphs=how != "eager")
    if how:
        device.fused, device.graphs = True, how == "captured"
    return device


def cell(value: torch.Tensor) -> Cell:
    made = Cell()
    made.set(value)
    return made


def there(array: np.ndarray | torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    x = torch.as_tensor(array)
    return x.to("npu:0", dtype or x.dtype)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model")


# ---- operators against the cpu device's -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_row_operators(dtype):
    device, count = npu(dtype), 7
    kind = device.dtype
    x, more, gain = (numbers(*shape, seed=i).to(kind) for i, shape in enumerate([(count, 32), (count, 32), (32,)]))
    weight, bias = numbers(48, 32, seed=3).to(kind), numbers(48, seed=4).to(kind)
    ids = torch.tensor([3, 3, 0, 8, 1], dtype=torch.int32)
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}[dtype]

    def close(found: Cell, expected: torch.Tensor) -> None:
        assert found.value.dtype == kind
        torch.testing.assert_close(found.value.cpu().float(), expected.float(), atol=tolerance, rtol=tolerance)

    def norm(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        torch_ops.rms_norm(out, x, gain.float(), 1e-5)
        return out

    out, residual = Cell(), cell(there(x))
    device.rms_norm(out, cell(there(x)), there(gain), 1e-5)
    close(out, norm(x))
    device.add_rms_norm(out, residual, cell(there(more)), there(gain), 1e-5)
    close(residual, x + more)
    close(out, norm(x + more))
    device.linear(out, cell(there(x)), there(weight))
    close(out, x.float() @ weight.float().T)
    device.linear(out, cell(there(x)), there(weight), there(bias))
    close(out, x.float() @ weight.float().T + bias.float())
    device.swiglu(out, cell(there(x)))
    gate, up = x.float().chunk(2, dim=1)
    close(out, torch.nn.functional.silu(gate) * up)
    device.embed(out, there(weight), there(ids))
    close(out, weight[ids])
    device.take_rows(out, cell(there(x)), there(ids.clamp(max=6)))
    close(out, x[ids.clamp(max=6)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_norm_and_rope_store(dtype):
    device, cpu = npu(dtype), CpuDevice(dtype, 1)
    heads, kv_heads, dim, count = 4, 2, 16, 5
    qkv = numbers(count, (heads + 2 * kv_heads) * dim).to(device.dtype)
    gains = numbers(dim, seed=1), numbers(dim, seed=2)
    angles = numbers(50, dim // 2, seed=3).numpy()
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    positions, slots = np.array([3, 49, 0, 7, 3], np.int32), np.array([11, 130, 300, 301, 5], np.int32)
    expected, cache = qkv.clone(), cpu.kv_cache(1, 3, 128, kv_heads, dim).layer(0)
    cpu.head_norm(expected, *gains, heads, kv_heads, 1e-5)
    at = torch.from_numpy(slots).long()
    cpu.rope_store(expected, torch.from_numpy(positions), cpu.constant(table), cache, at, heads, kv_heads)

    packed, ours = cell(there(qkv)), device.kv_cache(1, 3, 128, kv_heads, dim).layer(0)
    device.head_norm(packed, *(there(g, device.dtype) for g in gains), heads, kv_heads, 1e-5)
    device.rope_store(packed, there(positions), device.constant(table), ours, there(slots), heads, kv_heads)
    found = torch.cat([part.cpu().flatten(1) for part in packed.parts], dim=1)
    tolerance = 1e-5 if dtype == "float32" else 4e-2
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)
    for a, b in zip(ours, cache, strict=True):
        torch.testing.assert_close(a[:3].cpu().float(), b.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [0, 1, 6, 140])
@pytest.mark.parametrize("kind", ["float32", "fused float32", "bfloat16"])
def test_attention_over_pages(kind, window):
    """Prefill, chunks over a prefix and decodes in one step, keys in shuffled blocks."""
    device = npu(kind)
    cpu = CpuDevice("float32", 1)
    heads, kv_heads, dim = 6, 2, 16
    counts, ends = np.array([1, 30, 1, 4, 100, 1]), np.array([40, 30, 129, 200, 300, 1], np.int32)
    rng = np.random.default_rng(window)
    blocks = rng.permutation(18).astype(np.int32).reshape(6, 3)
    starts = np.append(0, np.cumsum(counts)).astype(np.int32)
    kv = tuple(numbers(18, 128, kv_heads, dim, seed=s).to(device.dtype) for s in (1, 2))
    qkv = numbers(int(counts.sum()), (heads + 2 * kv_heads) * dim, seed=3).to(device.dtype)
    expected = torch.empty(len(qkv), heads * dim)
    paging = torch_ops.Paging(starts, ends, blocks, {})
    plain = tuple(cache.float() for cache in kv)
    cpu.attention(expected, qkv.float(), plain, paging, heads, kv_heads, dim**-0.5, window)
    out = Cell()
    pages = None if device.fused else torch_ops.Paging(starts, ends, blocks, {}, there)
    attention = module.Attention(starts[1:].tolist(), ends.tolist(), there(blocks), pages)
    device.attention(out, cell(there(qkv)), tuple(map(there, kv)), attention, heads, kv_heads, dim**-0.5, window)
    tolerance = 1e-5 if "float32" in kind else 2e-2
    torch.testing.assert_close(out.value.cpu().float(), expected, atol=tolerance, rtol=tolerance)


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_the_noise_is_the_hosts_bit_for_bit():
    seeds = np.array([0, 1, 12345, 2**63, 2**64 - 1], np.uint64)
    for position in (0, 777, 2**31):
        words = keys(seeds, np.full(5, position))[:, None]
        halves = ((words & np.uint64(0xFFFFFFFF)).astype(np.int64), (words >> np.uint64(32)).astype(np.int64))
        found = device_uniform(*map(there, halves), 3000).cpu().numpy()
        assert np.array_equal(found, uniform(seeds, np.full(5, position), 3000))


@pytest.mark.parametrize("name", COLUMNS)
def test_choices_are_the_cpus(name):
    """Every kind of row, with penalties, bias and held stop ids on some."""
    host, device = Sampler(1000, 8), Sampler(1000, 8, "npu:0", torch.float32)
    setups = [
        setup(1, prompt=[1, 2, 3, 3], generated=[4, 4, 4, 9], bias={7: 3.0, 11: -5.0, 5000: 1.0}, counts=True),
        setup(4, stop_ids=[1, 2, 2000], bias={3: 9.0}),
        setup(5, prompt=[9, 8], generated=[], counts=True),
    ]
    for s in setups:
        host.set_up(s)
    for position in range(12):
        logits = numbers(6, 1000, seed=position) * 3
        r = rows(
            6,
            **COLUMNS[name],
            seed=np.arange(6) + 100,
            position=position,
            has_setup=[0, 1, 0, 0, 1, 1],
            hold_stop=[0, 0, 0, 0, 1, 0],
            presence=[0, 0.5, 0, 0, 0, -0.5],
            frequency=[0, 0.25, 0, 0, 0, 0.5],
            repetition=[1, 1.3, 1, 1, 1, 1],
        )
        asked = device.ask(r, there, setups if position == 0 else ())
        assert device.choose(there(logits), asked).cpu().tolist() == host.sample(logits, r).tolist()
        assert device.last.cpu().tolist() == host.last.tolist()
    assert torch.equal(device.output.cpu(), host.output) and torch.equal(device.prompt.cpu(), host.prompt)


def test_of_several_rows_of_a_slot_the_last_is_kept():
    """The rows that verify a draft."""
    device = Sampler(50, 8, "npu:0", torch.float32)
    logits = numbers(5, 50)
    ids = device.choose(there(logits), device.ask(rows(5, slot=[3, 3, 3, 1, 1]), there)).cpu()
    assert device.last.cpu()[[3, 1]].tolist() == ids[[2, 4]].tolist()


def test_logprobs_are_the_cpus():
    logits, ids = numbers(4, 300), torch.tensor([5, 7, 299, 0])
    found = in_order(*(t.cpu().numpy() for t in measure(there(logits), there(ids), 5)))
    expected = logprobs(logits, ids, 5)
    for name in ("rank", "top_ids"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.chosen, expected.chosen, atol=1e-6)
    np.testing.assert_allclose(found.top, expected.top, atol=1e-6)


# ---- whole steps ----------------------------------------------------------------------------------------------------


def talk(engine: ModelEngine, overlapped: bool = True) -> ModelEngine:
    """Prompts of many kinds, in two waves: long ones in chunks, samples that share a prompt, penalties, every sampling parameter,
    log-probabilities of output and prompt; the second wave finds prefixes cached and slots used before."""
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


def same(found: ModelEngine, expected: ModelEngine) -> None:
    assert found.texts == expected.texts and found.ends == expected.ends
    assert found.cached == expected.cached and max(expected.cached.values()) >= 256
    assert found.logprobs.keys() == expected.logprobs.keys() and len(expected.logprobs) == 2
    for seq, theirs in expected.logprobs.items():
        for a, b in zip(found.logprobs[seq], theirs, strict=True):
            assert a[1:] == b[1:] and abs(a[0] - b[0]) < 1e-3
    assert found.scores.keys() == expected.scores.keys()
    for seq, theirs in expected.scores.items():
        for a, b in zip(found.scores[seq], theirs, strict=True):
            assert a is b is None or (a.rank, a.top_ids) == (b.rank, b.top_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_cpus(kind, path, expected):
    engine = talk(ModelEngine(path, npu(kind)))
    same(engine, expected)
    assert bool(engine.device.captured) == (kind == "captured float32")
    engine.device.close()


def test_the_plain_loop_gives_the_same(path, expected):
    same(talk(ModelEngine(path, npu("captured float32")), overlapped=False), expected)


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_other_architectures(architecture, tmp_path):
    """Windows, biases, norms of heads, a tied head."""
    more = {
        "MistralForCausalLM": {"sliding_window": 21},
        "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1},
        "Qwen3ForCausalLM": {"head_dim": 32, "tie_word_embeddings": True, "attention_bias": True},
    }[architecture]
    path = tiny.make(tmp_path / "model", architecture, **more)
    cpu = Rig(path)
    texts = [cpu.greedy(list(range(40, 40 + n)), 10) for n in (3, 60)]
    for kind in ("float32", "captured float32"):
        rig = Rig(path, device=npu(kind), blocks=8)
        assert [rig.greedy(list(range(40, 40 + n)), 10) for n in (3, 60)] == texts


def test_sixteen_bits_are_close(path):
    """Nothing loses more than its rounding: mean and worst difference from float32. The bounds are those of docs/npu.md."""
    ids = np.random.default_rng(2).integers(0, tiny.VOCAB, 150).tolist()

    def logits(rig: Rig) -> np.ndarray:
        table = rig.table(150)
        return np.concatenate([rig.logits([(ids, 0, 140)], [table]), rig.logits([(ids, 140, 9)], [table]),
                               rig.logits([(ids, 149, 1)], [table])])  # fmt: skip

    exact = logits(Rig(path))
    for dtype, mean, worst in (("bfloat16", 0.1, 1.0), ("float16", 0.02, 0.2)):
        device = NpuDevice(dtype, graphs=False)
        difference = np.abs(logits(Rig(path, dtype=dtype, device=device, blocks=8)) - exact)
        assert difference.mean() < mean and difference.max() < worst, (dtype, difference.mean(), difference.max())


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_eight_bits_are_close(architecture, tmp_path):
    """W8A8 where activations are rounded a row at a time, W8A16 before an exponential."""
    path = tiny.make(tmp_path / "model", architecture)
    ids = np.random.default_rng(2).integers(0, tiny.VOCAB, 60).tolist()
    whole, rig = Rig(path), Rig(path, dtype="bfloat16", quantization="int8", device=NpuDevice("bfloat16", graphs=False), blocks=8)
    exact, found = (r.logits([(ids, 0, 60)], [r.table(60)]) for r in (whole, rig))
    difference = np.abs(found - exact)
    assert difference.mean() < 0.35 and np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.99, difference.mean()
    used = rig.model.stack[0]
    assert used.down.value.dtype == torch.int8 and used.down.value.shape == (96, 64)


# ---- what a step costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "eager bfloat16", "captured bfloat16"])
def test_no_step_waits_for_the_device(kind, path):
    """In the loop: one copy in, one copy out, and one wait for the event behind it; in no case a synchronisation."""
    engine = ModelEngine(path, npu(kind), dtype=kind.split()[-1])
    for task in range(4):
        sampling = {"temperature": 0.9 * (task % 2), "top_p": 0.9, "seed": task, "presence_penalty": 0.1}
        engine.start(task, [task, 5, 6], 30, **sampling)
    for _ in range(6):
        engine.step(overlapped=True)
    before = stub.counters()
    for _ in range(8):
        engine.step(overlapped=True)
    d = stub.counters() - before
    assert d.synchronisations == 0
    assert d.event_synchronisations == 8
    assert d.async_copies_to_host == 8
    if "captured" in kind:
        assert d.replays == 8 and d.updates == 8 * 2
    if engine.device.fused:  # plain attention sends its plans besides
        assert d.async_copies_to_device == 8
    engine.device.close()


def test_a_step_is_launched_while_the_one_before_it_runs(path):
    """`launch` returns although the device has a long queue; results come in any order."""
    rig = Rig(path, device=npu("captured float32"), blocks=8)
    want = Rig(path).greedy([1, 2, 3], 9)
    table = rig.table(20)
    pending = []
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


# ---- the cache as others reach it -----------------------------------------------------------------------------------


def test_the_cache_is_exported_whole(path):
    """Its bounds are multiples of 2 MiB wherever torch's allocator put it, and its blocks lie where its layout says."""
    device = npu("bfloat16")
    small = torch.ones(3 << 20, dtype=torch.uint8, device="npu:0")  # with the cache in one segment of the allocator
    cache = device.kv_cache(layers=3, blocks=5, block_size=128, kv_heads=2, head_dim=16)
    at = cache.pool.whole
    assert at.address % PAGE == at.nbytes % PAGE == 0 and at.address == cache.slab.data_ptr() and at.nbytes >= cache.nbytes
    assert not cache.shown and cache.pool.memory is cache.pool.memory and cache.shown
    cache.slab.copy_(torch.arange(cache.slab.numel()).view(cache.slab.shape) % 999)
    torch.npu.synchronize()
    found = npu("bfloat16").kv_cache(layers=3, blocks=2, block_size=128, kv_heads=2, head_dim=16)
    with contextlib.closing(DistFlow(at, 1)) as flow:
        here = Peer(1, cache.pool.memory, cache.layout, 128)
        target = KVPool(found.nbytes)
        flow._links[2] = Reach(2, target.view)
        spans = spans_between(here, Peer(2, target.memory, found.layout, 128), [4, 1], [0, 1], layers=range(1, 3))
        done = flow.transfer(*spans)
        assert done.wait(30) and done.error is None
    copied = torch.frombuffer(target.view, dtype=torch.bfloat16)[: found.slab.numel()].view(found.slab.shape)
    assert torch.equal(copied[1:, :, :2], cache.slab[1:, :, [4, 1]].cpu()) and not copied[0].any()
    assert small.all()
    with pytest.raises(ValueError, match="that has 5"):  # what lies behind them is for padding
        block_spans(cache.layout, 128, [5])


def test_a_layer_is_there_before_its_step_is_over(path):
    """Another thread may wait for a layer of a prefill, once others have been told of the cache."""
    rig = Rig(path, device=npu("float32"), blocks=4)
    table, ids = rig.table(20), list(range(20))
    step = rig.inputs([(ids, 0, 20)], [table], [])
    unseen = rig.launch(step)
    assert rig.kv.pool.memory and not unseen.layers
    later, aside = torch.npu.ExternalEvent(), torch.npu.Stream()
    later.record(aside)
    later.reset(aside)

    def forward(device, view):
        logits = rig.model.forward(device, view, rig.kv)
        later.wait(torch.npu.current_stream())
        return logits

    launched = rig.device.launch(forward, step)
    assert len(launched.layers) == rig.model.layers
    with ThreadPoolExecutor(1) as other:
        for layer in range(rig.model.layers):
            other.submit(launched.wait_layer, layer).result(30)
        assert not launched.frame.event.query()
        held = launched.frame
        later.record(aside)
        launched.result()
        for _ in range(4):  # the frame is another step's by now
            rig.launch(step)
        assert held.launched is not launched
        other.submit(launched.wait_layer, 0).result(30)
        one = rig.inputs([([*ids, 1], 20, 1)], [table], [])
        assert not rig.launch(one).layers, "a decode is not carried while it is computed"
        failed = rig.device.launch(lambda device, view: 1 / 0, step)
        with pytest.raises(ZeroDivisionError):
            other.submit(failed.wait_layer, 0).result(30)
    rig.device.close()


def test_copies_go_on_while_a_step_is_captured(path):
    """DistFlow's thread uses the device whenever it likes."""
    device = npu("captured float32")
    rig = Rig(path, device=device, blocks=8)
    offsets, lengths = block_spans(rig.kv.layout, 128, [0])
    errors, over = [], threading.Event()

    def copy(flow: DistFlow) -> None:
        while not over.is_set():
            done = flow.transfer(Spans(1, offsets, lengths), Spans(1, offsets, lengths))
            assert done.wait(30)
            errors.append(done.error)

    with contextlib.closing(DistFlow(rig.kv.pool.whole, 1)) as flow:
        busy = threading.Thread(target=copy, args=(flow,))
        busy.start()
        rig.greedy([1, 2, 3], 12)
        over.set()
        busy.join()
    assert device.captured and errors and not any(errors), errors


# ---- graphs ---------------------------------------------------------------------------------------------------------


def test_padding_never_touches_a_block_of_somebody(path):
    """Three sequences in a graph of four: keys and values in the cache are those of eager steps, block for block."""
    slabs = {}
    for kind in ("eager float32", "captured float32"):
        engine = ModelEngine(path, npu(kind))
        for task in range(3):
            engine.start(task, [*range(120), task], 12, temperature=0.0)
        engine.run()
        if "captured" in kind:
            assert (4, 16) in engine.device.captured
        cache = engine.rig.kv
        assert cache.slab.shape[2] == cache.blocks + PADDING_BLOCKS
        slabs[kind] = cache.slab[:, :, : cache.blocks].cpu()
    first, second = slabs.values()
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_a_bucket_is_captured_when_it_is_used_again(path):
    device = npu("captured float32")
    rig = Rig(path, device=device, blocks=8)
    assert BUCKETS[-1] <= PADDING_BLOCKS * rig.block_size
    before = stub.counters()
    rig.greedy([1, 2, 3], 2)  # a prefill and a decode: eager
    assert not device.captured and (stub.counters() - before).replays == 0
    for replays in (1, 2, 3):
        rig.greedy([1, 2, 3], 2)
        assert list(device.captured) == [(1, 16)] and (stub.counters() - before).replays == replays
    assert len(device.captured[1, 16]) == 2


def test_another_share_is_captured_anew(path, monkeypatch):
    device = npu("captured float32")
    rig = Rig(path, device=device, blocks=16)
    want = rig.greedy([1, 2, 3], 5)
    assert device.captured
    device.set_share(40)
    limits = torch.npu.get_stream_limit(torch.npu.current_stream())
    assert limits == {"cube_core_num": 9, "vector_core_num": 9}  # of 24
    assert not device.captured and rig.greedy([1, 2, 3], 5) == want and device.captured

    def absent(*_: object) -> None:
        raise RuntimeError("Failed to find function aclrtSetStreamResLimit\n[ERROR] more")

    device.set_share(100)
    monkeypatch.setattr(torch.npu, "set_stream_limit", absent)
    with pytest.raises(UserError, match=r"60 percent of the NPU: .*limit a stream's cores \(Failed to find .*Limit\); it takes"):
        device.set_share(60)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="--te 2 or less") as e:
        NpuDevice("bfloat16", 2)
    assert e.value.param == "te"
    with pytest.raises(UserError, match="bfloat16"):
        NpuDevice("int4")


def test_each_te_has_its_own_device():
    assert NpuDevice("bfloat16", 1).where == torch.device("npu", 1)
    NpuDevice("bfloat16", 0)


def test_a_cache_that_does_not_fit_names_the_flag_and_what_would():
    device = npu("bfloat16")
    with pytest.raises(OutOfMemory, match="--kv-cache-memory-bytes") as e:
        device.kv_cache(layers=100, blocks=1 << 20, block_size=128, kv_heads=8, head_dim=128)
    assert e.value.param == "kv_cache_memory_bytes"


def test_an_error_comes_out_of_the_pending_and_later_steps_run(path):
    rig = Rig(path, device=npu("float32"), blocks=8)
    step = rig.inputs([([1, 2, 3], 0, 3)], [rig.table(4)], [2])
    bad = rig.device.launch(lambda device, view: 1 / 0, step)
    good = rig.launch(step)
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert good.result().scores is not None


def test_no_operator_falls_back_to_the_host(path):
    """Each one that a step calls has a kernel in the plugin, by itself or as its variant with outputs; for one that hasn't, the
    plugin would copy its operands to the host and wait."""
    called: set[str] = set()

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.name())
            return func(*args, **(kwargs or {}))

    for kind in ("float32", "captured bfloat16"):
        engine = ModelEngine(path, npu(kind), dtype=kind.split()[-1])
        with Listen():
            talk(engine)
    has = torch._C._dispatch_has_kernel_for_dispatch_key

    def native(name: str) -> bool:
        base = name.split(".")[0].removesuffix("_")
        return any(
            has(variant, "PrivateUse1")
            for variant in (name, f"{base}.out", f"{base}.dim_out", base)
            if torch._C._dispatch_has_kernel(variant)
        )

    missing = {
        name
        for name in called
        if not native(name) and not has(name, "CompositeImplicitAutograd") and not has(name, "CompositeExplicitAutograd")
    }
    assert len(called) > 40 and not missing, missing
