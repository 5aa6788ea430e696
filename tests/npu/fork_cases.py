"""NPU-fork over the stub: collected by the pytest that tests/test_weight_slabs.py starts in the npu environment, and by no other.

A source's process holds a tiny model on NPU 0; this one takes its weights, on NPU 0 or 1."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_npu

from deepserve import AsyncLLM, SamplingParams
from engine import weight_slabs
from engine.devices.npu import NpuDevice
from engine.types import OutOfMemory, Quantization, UserError
from tests import tiny
from tests.fork_source import Packed, Source, started
from tests.harness import Rig
from tests.npu import stub
from tests.npu.pd_cases import until
from tests.npu.stub import Faults

WAYS = {"keys": {"ACL_STUB": Faults(no_mappings=1).environment()}, "mappings": {"ACL_STUB": Faults().environment()}}
KINDS: list[tuple[str, Quantization]] = [("float32", "auto"), ("bfloat16", "auto"), ("float16", "int8")]


@pytest.fixture(scope="session")
def path(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny", "Qwen2ForCausalLM")  # it has biases too


@pytest.fixture(scope="session")
def source_of(path) -> Iterator[Callable[..., Source]]:
    """One source for each kind of model and way to export, for all tests that leave it as it is."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def source_of(dtype: str = "bfloat16", quantization: Quantization = "auto", way: str = "mappings") -> Source:
            return stack.enter_context(started("npu", path, dtype, quantization, environment=WAYS[way]))

        yield source_of


@pytest.fixture(params=WAYS)
def source(source_of, request) -> Source:
    return source_of(way=request.param)


def taken(source: Source, dtype: str = "bfloat16", index: int = 0) -> tuple[NpuDevice, weight_slabs.Loaded]:
    device = NpuDevice(dtype, index, graphs=False)
    return device, weight_slabs.take(device, source.offer)


def logits(path: Path, device: NpuDevice, tensors=None, quantization: Quantization = "auto") -> np.ndarray:
    """Of a prompt, and of the 12 ids that follow, one at a time."""
    dtype = str(device.dtype).removeprefix("torch.")
    rig = Rig(path, dtype=dtype, device=device, blocks=4, quantization=quantization, tensors=tensors)
    ids, table = [3, 1, 4, 1, 5, 9, 2, 6], rig.table(30)
    found = [rig.logits([(ids, 0, len(ids))], [table], [len(ids) - 1])]
    for _ in range(12):
        ids.append(int(found[-1].argmax()))
        found.append(rig.logits([(ids, len(ids) - 1, 1)], [table], [0]))
    return np.concatenate(found)


@pytest.mark.parametrize(("dtype", "quantization"), KINDS)
@pytest.mark.parametrize("index", [0, 1])
def test_the_texts_of_a_forked_te_are_those_of_a_loaded_one(path, source_of, dtype, quantization, index):
    """Of one whose weights are torch's own tensors, made one by one; of one whose slabs were filled; of one that took these."""
    plain = logits(path, NpuDevice(dtype, index, graphs=False), quantization=quantization)
    packed = Packed(path, dtype, quantization)
    device = NpuDevice(dtype, index, graphs=False)
    filled = weight_slabs.fill(device, packed.model.own(packed.parts))
    assert np.array_equal(logits(path, device, filled.tensors, quantization), plain)
    filled.slabs.close()
    device, loaded = taken(source_of(dtype, quantization), dtype, index)
    assert loaded.slabs.mapped == (index == 0) and (loaded.path, loaded.source) == ("fork", 7)
    assert np.array_equal(logits(path, device, loaded.tensors, quantization), plain)
    loaded.slabs.close()


def test_matrices_lie_in_the_slabs_in_the_matrix_units_format(source):
    _, loaded = taken(source, index=1)
    entries = weight_slabs.by_name(loaded.placed)
    (memory,) = loaded.slabs.ranges
    assert memory.address % weight_slabs.SLAB_ALIGN == memory.nbytes % weight_slabs.SLAB_ALIGN == 0
    assert {e.format for e in loaded.placed.entries} == {"nz", "rows"}
    for name, tensor in loaded.tensors.items():
        (entry,) = entries[name]
        value = tensor.value if entry.kind == "matrix" else tensor
        assert value.data_ptr() == memory.address + entry.offset and entry.offset % weight_slabs.ALIGN == 0
        assert (tuple(value.shape), str(value.dtype)) == (entry.shape, f"torch.{entry.dtype}")
        assert torch_npu.get_npu_format(value) == (29 if entry.format == "nz" else 2)
        assert value.untyped_storage().nbytes() == entry.nbytes
    matrix = next(e for e in loaded.placed.entries if e.format == "nz")
    tiles = np.prod([-(-n // 16) * 16 for n in matrix.shape])
    assert matrix.nbytes == 2 * tiles, "whole tiles of 16 by 16"
    loaded.slabs.close()


def test_the_same_device_maps_and_another_copies_once(source):
    before = stub.counters()
    _, copied = taken(source, index=1)
    done = stub.counters() - before
    assert done.async_copies_on_device == len(copied.slabs.ranges) == 1
    placed = copied.placed
    assert all(e.checksum for e in placed.entries)
    copied.slabs.close()
    device = NpuDevice("bfloat16", graphs=False)
    memory, before = torch.npu.memory_allocated(0), stub.counters()
    mapped = weight_slabs.take(device, source.offer)
    assert (stub.counters() - before).async_copies_on_device == 0
    assert torch.npu.memory_allocated(0) == memory, "torch has no copy either"
    assert mapped.placed == placed and list(weight_slabs.sums(mapped.slabs, placed)) == [e.checksum for e in placed.entries]
    assert weight_slabs.export(mapped, 8, Packed.__new__(Packed)) is None, "what is mapped is another's to offer"
    mapped.slabs.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_source_frees_nothing_that_is_mapped(path, way):
    """The importer closes first, then the exporter; the other way round neither we nor the runtime let it."""
    with started("npu", path, "bfloat16", environment=WAYS[way]) as source:
        _, loaded = taken(source)
        assert "another TE uses these weights" in source.ask("close")
        loaded.slabs.close()
        assert source.ask("close") == "closed"
        with pytest.raises(UserError, match="is gone"):
            taken(source)


def test_one_copy_is_the_source_of_the_next(path, source_of):
    """A tree: who has a copy offers it, also when the first one is gone."""
    plain = logits(path, NpuDevice("bfloat16", graphs=False))
    with started("npu", path, "bfloat16") as first:
        second = started("npu", path, "bfloat16", index=1, offer=first.offer)
        made = second.__enter__()
        first.kill()
    assert (made.offer.te, made.offer.slabs[0].device) == (8, 1)
    for index in (0, 1):
        device, loaded = taken(made, index=index)
        assert loaded.slabs.mapped == (index == 1)
        assert np.array_equal(logits(path, device, loaded.tensors), plain)
        loaded.slabs.close()
    second.__exit__(None, None, None)


def test_what_was_spoilt_is_not_taken(path):
    packed = Packed(path, "bfloat16")
    with started("npu", path, "bfloat16") as source:
        assert source.ask("layers.1.down") == "spoilt"
        device = NpuDevice("bfloat16", 1, graphs=False)
        free = torch.npu.mem_get_info(1)[0]
        with pytest.raises(UserError, match=r"layers.1.down has checksum \w{16} here, and \w{16} there"):
            weight_slabs.take(device, source.offer)
        assert torch.npu.mem_get_info(1)[0] == free, "the copy is freed"
        loaded = weight_slabs.load(device, packed.model.own, [source.offer], packed.parts)
        assert loaded.path == "dram" and len(loaded.fell) == 1 and "TE 7" in loaded.fell[0]
        loaded.slabs.close()


def test_a_source_that_dies_half_way(path, source_of, monkeypatch):
    """Killed while its slab is being copied: the next source is taken, and with none left the packed weights; without those it is
    an error that tells of both."""
    packed = Packed(path, "bfloat16")
    device = NpuDevice("bfloat16", 1, graphs=False)
    monkeypatch.setattr(weight_slabs, "PIECE", 64 << 10)
    plain, gone = weight_slabs.ipc.copy, []

    def dying(source: Source):
        def copy(to, far, at, nbytes) -> None:
            plain(to, far, at, nbytes)
            if at:
                source.kill()

        return copy

    def killed(others, host) -> weight_slabs.Loaded:
        with started("npu", path, "bfloat16") as source:
            gone.append(source)
            monkeypatch.setattr(weight_slabs.ipc, "copy", dying(source))
            return weight_slabs.load(device, packed.model.own, [source.offer, *others], host)

    loaded = killed([source_of().offer], packed.parts)
    assert (loaded.path, loaded.source, loaded.slabs.mapped) == ("fork", 7, False)
    assert "its process ended when 131072 of a slab's" in loaded.fell[0]
    loaded.slabs.close()
    with pytest.raises(UserError, match=r"ended when .*; and no packed weights are in memory") as e:
        killed([], None)
    monkeypatch.setattr(weight_slabs.ipc, "copy", plain)
    assert "TE 7" in str(e.value)
    dead = gone[0].offer
    loaded = weight_slabs.load(device, packed.model.own, [dead], packed.parts)
    assert loaded.path == "dram" and "TE 7" in loaded.fell[0]
    loaded.slabs.close()


def test_other_settings_are_not_taken(source):
    for dtype in ("float16", "float32"):
        with pytest.raises(UserError, match="other settings; give both the same --dtype"):
            taken(source, dtype)


def test_weights_that_dont_fit(path, monkeypatch):
    monkeypatch.setattr(weight_slabs, "SLAB_ALIGN", 8 << 30)  # of the 4 GiB that the stub's devices have
    packed = Packed(path, "bfloat16")
    with pytest.raises(OutOfMemory, match=r"--model: its weights, .* don't fit the device's memory .*out of memory") as e:
        weight_slabs.fill(NpuDevice("bfloat16", graphs=False), packed.model.own(packed.parts))
    assert e.value.param == "model"


SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "max_num_batched_tokens": 96, "max_num_seqs": 4}


async def text(llm: AsyncLLM) -> list[int]:
    kind = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    return [output async for output in llm.generate("There was a miller", kind)][-1].outputs[0].token_ids


def test_a_server_scales_by_forks(path):
    """A second TE takes the first one's weights to its own NPU; the first is killed, and comes back with the second one's."""

    async def run() -> None:
        async with AsyncLLM(path, device="cpu", **SETTINGS) as llm:
            expected = await text(llm)
        async with AsyncLLM(path, device="npu", te=1, max_te=2, **SETTINGS) as llm:
            assert await text(llm) == expected
            await llm.scale("", 2, None)
            os.kill(llm.cluster.describe()[0]["pid"], signal.SIGKILL)
            await until(lambda: len(llm.cluster.climbs) == 3 and all(te["state"] == "ready" for te in llm.cluster.describe()))
            climbs = [(climb["te"], climb["path"], climb["source"], climb["fell"]) for climb in llm.scale_state()["climbs"]]
            assert climbs == [(0, "disk", None, []), (1, "fork", 0, []), (0, "fork", 1, [])]
            assert await asyncio.gather(*(text(llm) for _ in range(4))) == [expected] * 4

    asyncio.run(run())


def test_a_server_whose_runtime_exports_nothing(path, monkeypatch):
    """TEs come up with the packed weights then."""
    monkeypatch.setenv("ACL_STUB", Faults(refuse_export=1).environment())  # of the processes started from now on

    async def run() -> None:
        async with AsyncLLM(path, device="npu", te=1, max_te=2, **SETTINGS) as llm:
            expected = await text(llm)
            await llm.scale("", 2, None)
            assert [(climb["path"], climb["source"]) for climb in llm.scale_state()["climbs"]] == [("disk", None), ("dram", None)]
            assert await asyncio.gather(*(text(llm) for _ in range(4))) == [expected] * 4

    asyncio.run(run())
