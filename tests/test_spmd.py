"""Several ranks on one model. On the compiled kernels they give the bits that one rank gives, whatever the weights are stored as.

Ranks are processes, but nothing they share is: here they live in one, each with its own device and team."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine import models, shmq, spmd
from engine.capacity import Machine, process_bytes, resolve, threads_for
from engine.config import Config, most_processes
from engine.devices import Rank
from engine.devices.cpu_native import NativeKVCache
from engine.distflow import block_spans, packed_block, pair, spans_between
from engine.models import WeightPart, bounds, take_rows
from engine.native import cpu
from engine.rtc.cost import Costs
from engine.rtc.wire import FILE, Fetched, Found, Gone, Measured, Offer, Saved, Stepped
from engine.types import Failed, Peer, UserError
from tests import tiny
from tests.harness import Rig
from tests.server import ROOT

FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4}  # heads that four ranks can share


@contextmanager
def ranks_of(path: Path, count: int, **settings: Any) -> Iterator[list[Rig]]:
    group = spmd.create(count)
    rigs = [Rig(path, native=1, rank=Rank(i, count, group.memory, group.pool), **settings) for i in range(count)]
    try:
        yield rigs
    finally:
        for rig in rigs:
            rig.close()
        group.close()


def all_at_once(rigs: list[Rig], work) -> list[Any]:
    with ThreadPoolExecutor(len(rigs)) as pool:
        return list(pool.map(work, rigs))


def conversation(rig: Rig) -> list[np.ndarray]:
    """Logits of a prompt in chunks beside another's decode, and of a step of many rows."""
    rng = np.random.default_rng(3)
    one, two = rng.integers(0, 256, 90).tolist(), rng.integers(0, 256, 40).tolist()
    tables = [rig.table(len(one)), rig.table(len(two))]
    found = [rig.logits([(one, 0, 33)], tables[:1])]
    found.append(rig.logits([(one, 33, 50), (two, 0, 39)], tables))
    found += [rig.logits([(one, at, 1), (two, 39, 1)], tables) for at in (83, 84)]
    found.append(rig.logits([(one, 85, 5)], tables[:1], want=[4]))
    return found


@pytest.mark.parametrize(
    ("count", "shape", "settings"),
    [
        (2, {}, {}),
        (2, {"tie_word_embeddings": True}, {"quantization": "int8"}),
        (2, {}, {"kv_dtype": "int8"}),
        (2, {"architecture": "Qwen2ForCausalLM"}, {}),
        (2, {"architecture": "Qwen3ForCausalLM", "tie_word_embeddings": True}, {}),
        (4, FOUR, {}),
        (4, FOUR | {"intermediate_size": 208, "hidden_size": 128}, {"quantization": "int8"}),
        (3, {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 80}, {}),
    ],
    ids=["two", "tied int8", "int8 cache", "qwen2", "qwen3", "four", "four int8, unequal shares", "three, unequal shares"],
)
def test_ranks_give_the_bits_of_one(tmp_path, count, shape, settings):
    path = tiny.make(tmp_path / "tiny", **shape)
    alone = Rig(path, native=2, **settings)
    expected = conversation(alone)
    alone.close()
    with ranks_of(path, count, **settings) as rigs:
        for found in all_at_once(rigs, conversation):
            for ours, theirs in zip(found, expected, strict=True):
                assert np.array_equal(ours, theirs)


# ---- shares of packed tensors ----------------------------------------------------------------------------------------


def test_bounds_are_whole_units_and_all_columns():
    assert bounds(576, 16, 3) == [0, 192, 384, 576]
    assert bounds(259, 16, 2) == [0, 128, 259] and bounds(208, 16, 4) == [0, 48, 96, 144, 208]


@pytest.mark.parametrize("kind", cpu.WEIGHT_KINDS)
def test_rows_of_panels_are_those_bytes(kind):
    """Of two parts one under another, as q and k and then v."""
    k, rng = 512, np.random.default_rng(0)
    sizes = (96, 40)
    parts = []
    for n in sizes:
        data = rng.integers(0, 256, cpu.packed_bytes(kind, n, k), np.uint8).data
        parts.append(WeightPart(data, kind, (n, k), "matrix", "panels"))
    cuts = [(0, 32), (32, 96), (96, 112), (112, 136)]
    taken = [take_rows(parts, [cut]) for cut in cuts]
    assert [[part.shape for part in share] for share in taken] == [[(32, k)], [(64, k)], [(16, k)], [(24, k)]]
    whole = b"".join(bytes(part.data) for part in parts)
    assert b"".join(bytes(part.data) for share in taken for part in share) == whole
    assert [part.shape[0] for part in take_rows(parts, [(80, 112)])] == [16, 16], "a range over both parts"
    assert take_rows(parts, [(32, 32)]) == []


def test_rows_of_rows():
    """Row-major matrices and vectors are copied together; int8 rows keep their scales."""
    values = np.arange(40, dtype=np.float32)
    (taken,) = take_rows([WeightPart(values.data.cast("B"), "float32", (40,), "vector")], [(2, 5), (30, 32)])
    assert taken.shape == (5,) and np.frombuffer(taken.data, np.float32).tolist() == [2, 3, 4, 30, 31]
    rows, scales = np.arange(30, dtype=np.int8).reshape(10, 3), np.arange(10, dtype=np.float32)
    data = memoryview(rows.tobytes() + bytes(2) + scales.tobytes())
    (taken,) = take_rows([WeightPart(data, "int8", (10, 3))], [(1, 2), (4, 8)])
    assert taken.shape == (5, 3) and len(taken.data) == 16 + 20
    assert np.frombuffer(taken.data[:15], np.int8).reshape(5, 3).tolist() == rows[[1, 4, 5, 6, 7]].tolist()
    assert np.frombuffer(taken.data[-20:], np.float32).tolist() == [1, 4, 5, 6, 7]


# ---- messages --------------------------------------------------------------------------------------------------------


def test_every_rank_takes_in_what_the_master_did_turn_by_turn():
    group = spmd.create(3)
    turns: list[spmd.Turn] = [
        ([b"a", b"b"], [], [Measured(Costs(16, 4096, 1 / 3, {"dram": 1e10 / 3})), Stepped(64, 3, 0.1)], 0),
        ([], [], [Found(3, [b"k" * 16], [Offer(FILE, 0)]), Gone()], 5),
        ([b"c" * 3_000_000], [(1, None), (2, "TE 5 has ended")], [], 6),
        ([b""], [], [Fetched(4, {"dram": 1, "ssd": 0}, {"dram": 1e-3, "ssd": 0.0}), Saved([1, 2], [True, False])], 2**32 - 1),
    ]
    leader = spmd.Leader(group)
    followers = [spmd.Follower(shmq.Receiver(ring)) for ring in group.down]
    with ThreadPoolExecutor(3) as pool:
        led = pool.submit(lambda: [leader.agree(turn) for turn in turns])
        followed = [pool.submit(lambda f=follower: [f.agree(([], [], [], turn[3])) for turn in turns]) for follower in followers]
        assert [f.result() for f in (led, *followed)] == [turns] * 3
    assert not followers[0].wait(0.0)
    leader.agree(([], [], [], 7))
    with pytest.raises(RuntimeError, match="other ids"):
        followers[1].agree(([], [], [], 8))
    group.close()


def test_a_rank_that_cannot_start_says_why_through_the_master():
    group = spmd.create(2)
    leader = spmd.Leader(group)
    rank = shmq.Sender(group.up[0])
    rank.send(msgspec.msgpack.encode(Failed("no room; --max-model-len 5 would fit", "max_model_len")))
    with pytest.raises(UserError, match="--max-model-len 5") as e:
        leader.gather()
    assert e.value.param == "max_model_len"
    group.close()


# ---- keys and values between TEs of other numbers of ranks --------------------------------------------------------------


def pool_of(ranks: int, kind: str, te: int) -> tuple[Peer, np.ndarray]:
    """A TE of 4 heads and 6 blocks: how others see its pools, and their bytes."""
    group = spmd.create(ranks)
    caches = [NativeKVCache(3, 6, 32, 4 // ranks, 16, kind, rank=Rank(i, ranks, group.memory, group.pool)) for i in range(ranks)]
    group.close()
    assert {cache.pool.memory.inode for cache in caches} == {caches[0].pool.memory.inode}
    memory = np.frombuffer(caches[0].pool.whole, np.uint8)
    return Peer(te, caches[0].pool.memory, caches[0].layout, 32), memory


def packed(peer: Peer, memory: np.ndarray, block: int) -> bytes:
    """A block as it is kept in slower tiers."""
    runs = pair(*spans_between(peer, packed_block(peer), [block], [0]))
    out = np.zeros(runs.nbytes, np.uint8)
    for at, to, length in zip(runs.source, runs.target, runs.lengths, strict=True):
        out[to : to + length] = memory[at : at + length]
    return out.tobytes()


@pytest.mark.parametrize("kind", cpu.KV_KINDS)
def test_heads_find_their_place_in_pools_of_other_ranks(kind):
    """From one rank to 2, on to 4, back to 2 and to one: every byte of every head, in other blocks."""
    rng = np.random.default_rng(0)
    pools = [pool_of(ranks, kind, te) for te, ranks in enumerate((1, 2, 4, 2, 1))]
    blocks = [rng.permutation(6)[:4].tolist() for _ in pools]
    pools[0][1][:] = rng.integers(0, 256, len(pools[0][1]), np.uint8)
    for (here, source), (there, target), first, second in zip(pools, pools[1:], blocks, blocks[1:], strict=False):
        for layers in (None,) if kind == "int8" else (range(1), range(1, 3)):
            spans = spans_between(here, there, first, second, layers=layers)
            runs = pair(*spans)
            for at, to, length in zip(runs.source, runs.target, runs.lengths, strict=True):
                target[to : to + length] = source[at : at + length]
    kept = [[packed(*pool, block) for block in wanted] for pool, wanted in zip(pools, blocks, strict=True)]
    assert all(rows == kept[0] for rows in kept), "a block in a slower tier is the same whatever the ranks"
    begin, end = pools[0], pools[-1]
    for old, new in zip(blocks[0], blocks[-1], strict=True):
        (at, length), (to, _) = (block_spans(p.layout, 32, [b]) for (p, _), b in ((begin, old), (end, new)))
        assert np.array_equal(begin[1][at[0] : at[0] + length[0]], end[1][to[0] : to[0] + length[0]])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "shape", "says"),
    [
        (2, {}, r"--tensor-parallel-size 2: the model has 9 query heads and 3 KV heads, .* use 1 or 3$"),
        (9, {}, "has 3 KV heads, which 9 ranks can't share equally; use 1 or 3"),
        (2, {"heads": 4, "kv_heads": 2, "head_dim": 8}, "a rank's 8 rows of keys are no multiple of the 16 .* use 1$"),
        (2, {"heads": 4, "kv_heads": 2, "intermediate": 100}, "intermediate size of 100 is no multiple of 16; use 1"),
        (4, {"heads": 4, "kv_heads": 4, "hidden": 48}, "hidden size of 48 is too small for 4 ranks; use 1 or 2"),
        (3, {"dtype": "float32"}, "--dtype bfloat16; --dtype float32 can't"),
    ],
)
def test_a_number_of_ranks_that_cannot_share_the_model_is_refused(tmp_path, ranks, shape, says):
    dtype = shape.pop("dtype", "bfloat16")
    names = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "hidden": "hidden_size"}
    fields = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536, "hidden_size": 576}
    fields |= {names.get(name, name): value for name, value in shape.items() if name != "intermediate"}
    fields |= {"intermediate_size": shape["intermediate"]} if "intermediate" in shape else {}
    model = models.build(tiny.config(**fields))
    box = Machine(8 << 30, 6, compiled=True)
    with pytest.raises(UserError, match=says) as e:
        resolve(Config(device="cpu", dtype=dtype, tensor_parallel_size=ranks), model, 1 << 28, box)
    assert e.value.param == "tensor_parallel_size"


def test_cores_and_memory_are_divided_among_ranks():
    model = models.build(tiny.config(num_attention_heads=9, num_key_value_heads=3, head_dim=64, intermediate_size=1536))
    box = Machine(8 << 30, 6, compiled=True)
    config, _ = resolve(Config(device="cpu", tensor_parallel_size=3), model, 1 << 28, box)
    assert threads_for(box.cores, most_processes(config)) == 2
    with pytest.raises(UserError, match="a process"):
        small = Machine((1 << 28) + 3 * process_bytes(panels=True), 6, compiled=True)
        resolve(Config(device="cpu", tensor_parallel_size=3), model, 1 << 28, small)


# ---- collectives of accelerators, by gloo on torch's cpu device ---------------------------------------------------------

RANK = """
import os, sys
import numpy as np, torch
from engine.devices import Rank
from engine.devices.cpu_native import NativeKVCache
from engine.distflow import block_spans, pair, spans_between
from tests.harness import Rig
from tests.test_devices_cuda import device
from tests.test_spmd import conversation
path, meeting, out, index, kind = sys.argv[1:]
torch.set_num_threads(1)
opened = device(kind)
opened.api.mem_get_info = lambda where: (1000 + int(index), 0)
rank = Rank(int(index), 2, os.open(meeting, os.O_RDWR), -1)
opened.join(rank, "gloo")
assert opened.free_bytes() == 1000
rig = Rig(path, device=opened, rank=rank, dtype=kind.split()[1])
found = conversation(rig)
np.savez(out, *found, ids=np.array(rig.greedy([5, 6, 7], 12)))
rig.close()
torch.distributed.destroy_process_group()
"""


def test_ranks_of_a_torch_device_gather_what_one_computes(tmp_path):
    from tests.test_devices_cuda import device

    path = tiny.make(tmp_path / "tiny", num_key_value_heads=2, intermediate_size=104)
    alone = Rig(path, device=device("captured float32"))
    expected, text = conversation(alone), alone.greedy([5, 6, 7], 12)
    alone.close()
    meeting = tmp_path / "meeting"
    meeting.touch()
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    commands = [
        [sys.executable, "-c", RANK, str(path), str(meeting), str(tmp_path / f"{i}.npz"), str(i), "captured float32"]
        for i in (0, 1)
    ]
    running = [subprocess.Popen(c, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    said = [process.communicate(timeout=100)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    for i in (0, 1):
        with np.load(tmp_path / f"{i}.npz") as found:
            assert found["ids"].tolist() == text
            for j, theirs in enumerate(expected):
                np.testing.assert_allclose(found[f"arr_{j}"], theirs, rtol=1e-4, atol=1e-5)
