"""Checkpoints and packing, against files written by the safetensors library and the gguf package."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine import models, native
from engine.models import WeightPart, WeightSpec
from engine.native import cpu
from engine.types import Packing, Quantization, UserError
from engine.weights import (
    SLAB_ALIGN,
    TENSOR_ALIGN,
    Description,
    Manifest,
    describe,
    map_slabs,
    open_checkpoint,
    pack,
    packed_kind,
    packed_size,
    read_description,
    round_to_bfloat16,
)
from tests import tiny

CONFIG = {"architectures": ["LlamaForCausalLM"], "eos_token_id": 5, "tie_word_embeddings": True}


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(t: torch.Tensor) -> np.ndarray:
    return t.to(torch.bfloat16).view(torch.uint16).numpy()


def folder(path: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    return path


@pytest.fixture
def slab() -> Iterator[int]:
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_safetensors_in_each_type(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    t = tensor(300, 70, dtype=dtype)
    opened = open_checkpoint(folder(tmp_path, {"w": t, "v": t[0].clone()}))
    assert (opened.shape("w"), opened.dtype("w"), sorted(opened.names())) == ((300, 70), name, ["v", "w"])
    assert opened.nbytes == (300 * 70 + 70) * t.element_size()
    floats, halves, vector = np.empty((300, 70), np.float32), np.empty((120, 70), np.uint16), np.empty(70, np.float32)
    opened.read_into("w", floats)
    assert np.array_equal(floats, t.float().numpy())
    opened.read_into("w", halves, slice(50, 170))
    assert np.array_equal(halves, bits(t[50:170]))
    opened.read_into("v", vector)
    assert np.array_equal(vector, t[0].float().numpy())


def test_bfloat16_rounds_as_torch_does() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**32, 200_000, np.uint64).astype(np.uint32).view(np.float32)
    ties = ((rng.integers(0, 2**16, 2000, np.uint32) << 16) | 0x8000).view(np.float32)
    values = np.concatenate([values, ties, np.float32([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45])])
    want = torch.from_numpy(values.copy()).to(torch.bfloat16)
    out = np.empty(len(values), np.uint16)
    round_to_bfloat16(values, out)
    numbers = ~want.isnan().numpy()
    assert np.array_equal(out[numbers], want.view(torch.uint16).numpy()[numbers])
    assert torch.from_numpy(out).view(torch.bfloat16).isnan().numpy()[~numbers].all()


def test_sharded_folder_and_merged_eos(tmp_path: Path) -> None:
    a, b = tensor(4, 8, seed=1), tensor(2, 8, seed=2)
    save_file({"a": a}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": b}, tmp_path / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    opened = open_checkpoint(tmp_path)
    out = np.empty((2, 8), np.float32)
    opened.read_into("b", out)
    assert np.array_equal(out, b.numpy()) and set(opened.names()) == {"a", "b"}
    assert opened.config["eos_token_id"] == [5, 7]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: is named in .* but missing"):
        open_checkpoint(tmp_path)


def test_every_truncation_of_safetensors_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, {"w": tensor(4, 4)}) / "model.safetensors"
    whole = path.read_bytes()
    for size in range(0, len(whole), 5):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            open_checkpoint(tmp_path)


def test_folders_that_cannot_be_opened_say_what_would_work(tmp_path: Path) -> None:
    def says(text: str) -> None:
        with pytest.raises(UserError, match=text):
            open_checkpoint(tmp_path)

    says(r"has no config\.json")
    (tmp_path / "m.gguf").touch()
    says(r"holds m\.gguf: give that file")
    (tmp_path / "config.json").write_text("{")
    says(r"config\.json: not JSON")
    (tmp_path / "config.json").write_text("{}")
    says(r"has no \*\.safetensors")
    (tmp_path / "pytorch_model.bin").touch()
    says(r"only pytorch_model\.bin, .* convert it to safetensors")
    folder(tmp_path, {"w": torch.ones(2, dtype=torch.int8)})
    says(r"tensor w is I8, which can't be read; these can: F32, F16, BF16")
    folder(tmp_path, {"w": tensor(2)}, quantization_config={"quant_method": "gptq"})
    says("quantised by gptq")
    with pytest.raises(UserError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a model"):
        open_checkpoint(tmp_path / "config.json")


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What a GGUF converter does to q and k of a Llama."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, arch: str, q: np.ndarray, k: np.ndarray, bias: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.ones((9, 64), np.float32))
    quantised = gguf.quants.quantize(q, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_k.weight", k)
    writer.add_tensor("blk.0.attn_q.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_gguf_has_hugging_faces_names_and_row_order(tmp_path: Path, arch: str) -> None:
    q, k, bias = tensor(64, 64, seed=1).numpy(), tensor(32, 64, seed=2).numpy(), tensor(64, seed=3).numpy()
    stored = (interleave(q, 4), interleave(k, 2), interleave(bias, 4)) if arch == "llama" else (q, k, bias)
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", arch, *stored))
    prefix = "model.layers.0.self_attn"
    got_q, got_k, got_bias = np.empty((64, 64), np.float32), np.empty((32, 64), np.float32), np.empty(64, np.float32)
    opened.read_into(f"{prefix}.q_proj.weight", got_q)
    opened.read_into(f"{prefix}.k_proj.weight", got_k)
    opened.read_into(f"{prefix}.q_proj.bias", got_bias)
    assert np.abs(got_q - q).max() < 0.02 and np.array_equal(got_k, k) and np.array_equal(got_bias, bias)
    rows, halves = np.empty((10, 64), np.float32), np.empty((10, 64), np.uint16)
    opened.read_into(f"{prefix}.q_proj.weight", rows, slice(11, 21))
    assert np.array_equal(rows, got_q[11:21])
    opened.read_into(f"{prefix}.q_proj.weight", halves, slice(11, 21))
    assert np.array_equal(halves, bits(torch.from_numpy(rows)))
    assert opened.dtype(f"{prefix}.q_proj.weight") == "Q8_0"
    assert opened.config["num_key_value_heads"] == 2


def test_what_a_gguf_stores_quantised_is_packed_as_it_is(tmp_path: Path, slab: int, caplog: pytest.LogCaptureFixture) -> None:
    """Rows in Hugging Face's order, and a matrix of parts where its sources are stored differently."""
    q, k, bias = tensor(64, 64, seed=1).numpy(), tensor(32, 64, seed=2).numpy(), tensor(64, seed=3).numpy()
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", interleave(q, 4), interleave(k, 2), interleave(bias, 4)))
    prefix = "model.layers.0.self_attn"
    specs = [WeightSpec("qk", (96, 64), (f"{prefix}.q_proj.weight", f"{prefix}.k_proj.weight"))]
    want = np.empty((64, 64), np.float32)
    opened.read_into(f"{prefix}.q_proj.weight", want)

    def parts(quantization: Quantization) -> list[WeightPart]:
        return map_slabs(pack(opened, specs, Packing("bfloat16", "panels", quantization), slab), [slab])["qk"]

    first, second = parts("auto")
    assert (first.dtype, first.shape, second.dtype, second.shape) == ("q8_0", (64, 64), "bfloat16", (32, 64))
    ids, rows = np.arange(64, dtype=np.int32), np.empty((64, 64), np.float32)
    team = cpu.Team(1)
    at = np.frombuffer(first.data, np.uint8).ctypes.data
    op = cpu.Op(kind=cpu.EMBED, out=rows.ctypes.data, w=at, n=64, i=(cpu.WEIGHT_KINDS["q8_0"],))
    team.run((cpu.Op * 1)(op), cpu.Step(tokens=64, ids=ids.ctypes.data))
    team.close()
    assert np.array_equal(rows, want)
    assert [p.dtype for p in parts("int8")] == ["q8_0", "int8"]
    (whole,) = parts("none")
    assert (whole.dtype, whole.shape) == ("bfloat16", (96, 64))
    assert packed_kind("Q5_K", True, Packing("bfloat16", "panels")) == "int8", "no kernel of its own"
    assert packed_kind("F16", False, Packing("bfloat16", "panels", "int8")) == "bfloat16", "only looked up"


# ---- packing --------------------------------------------------------------------------------------------------------

SPECS = [
    WeightSpec("embed", (9, 16), ("embed",), "embedding"),
    WeightSpec("qkv", (40, 16), ("q", "k", "v")),
    WeightSpec("norm", (16,), ("norm",), "vector"),
]


def parts() -> dict[str, torch.Tensor]:
    sizes = {"embed": (9, 16), "q": (24, 16), "k": (8, 16), "v": (8, 16), "norm": (16,)}
    return {name: tensor(*shape, seed=i) for i, (name, shape) in enumerate(sizes.items())}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pack_and_map(tmp_path: Path, slab: int, dtype: str) -> None:
    tensors = parts()
    opened = open_checkpoint(folder(tmp_path, tensors))
    packed = pack(opened, SPECS, Packing(dtype), slab)
    manifest = msgspec.msgpack.decode(msgspec.msgpack.encode(packed), type=Manifest)
    assert manifest == packed
    assert [e.name for e in manifest.entries] == ["embed", "qkv", "norm"]
    assert manifest.nbytes == sum(manifest.slabs) == os.fstat(slab).st_size
    assert manifest.nbytes % SLAB_ALIGN == 0 and manifest.nbytes == packed_size(opened, SPECS, Packing(dtype))
    views = map_slabs(manifest, [slab])
    end = 0
    for entry in manifest.entries:
        (part,) = views[entry.name]
        view = part.data
        assert view.readonly and view.nbytes == entry.nbytes and entry.offset % TENSOR_ALIGN == 0 and entry.offset >= end
        assert native.checksum(view) == entry.checksum and entry.format == "rows"
        end = entry.offset + entry.nbytes
    assert [e.dtype for e in manifest.entries] == [dtype, dtype, "float32"]
    qkv = torch.cat([tensors["q"], tensors["k"], tensors["v"]])
    want = qkv.numpy() if dtype == "float32" else bits(qkv)
    assert np.array_equal(np.frombuffer(views["qkv"][0].data, want.dtype).reshape(40, 16), want)
    assert np.array_equal(np.frombuffer(views["norm"][0].data, np.float32), tensors["norm"].numpy())


def test_what_does_not_fit_is_named(tmp_path: Path, slab: int) -> None:
    tensors = parts()
    del tensors["norm"]
    with pytest.raises(UserError, match="has no tensor norm"):
        pack(open_checkpoint(folder(tmp_path, tensors)), SPECS, Packing("float32"), slab)
    tensors = parts() | {"k": tensor(4, 16)}
    with pytest.raises(UserError, match=r"q \+ k \+ v has shape \[24, 16\] \+ \[4, 16\] \+ \[8, 16\]; .* asks for \[40, 16\]"):
        pack(open_checkpoint(folder(tmp_path, tensors)), SPECS, Packing("float32"), slab)


def test_unused_tensors_are_reported(tmp_path: Path, slab: int, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"lm_head.weight": tensor(9, 16), "model.layers.0.self_attn.rotary_emb.inv_freq": tensor(4)}
    with caplog.at_level(logging.WARNING):
        pack(open_checkpoint(folder(tmp_path, parts() | extra)), SPECS, Packing("float32"), slab)
    assert not caplog.records  # a repeated tied embedding and rope tables are no surprise
    with caplog.at_level(logging.WARNING):
        pack(open_checkpoint(folder(tmp_path, parts() | {"odd": tensor(3)})), SPECS, Packing("float32"), slab)
    assert "unused_tensors" in caplog.text and "tensors=odd" in caplog.text


# ---- rows for accelerators ------------------------------------------------------------------------------------------


def test_float16_rows(tmp_path: Path, slab: int) -> None:
    """Rounded as torch does; what is too large becomes the largest."""
    w = tensor(300, 70) * 3
    w[0, 0], w[1, 1] = 1e6, -1e6
    opened = open_checkpoint(folder(tmp_path, {"w": w.bfloat16()}))
    manifest = pack(opened, [WeightSpec("w", (300, 70), ("w",))], Packing("float16"), slab)
    (part,) = map_slabs(manifest, [slab])["w"]
    found = np.frombuffer(part.data, np.float16).reshape(part.shape)
    expected = w.bfloat16().float().clamp(-65504, 65504).half().numpy()
    assert part.dtype == "float16" and np.array_equal(found, expected)


def test_int8_rows_have_a_scale_each(tmp_path: Path, slab: int) -> None:
    """Matrices alone: what is looked up and vectors keep their precision. A row of zeros stays one."""
    tensors = {"a": tensor(300, 71), "b": tensor(33, 71, seed=1), "e": tensor(50, 71, seed=2), "v": tensor(71, seed=3)}
    tensors["a"][7] = 0
    specs = [
        WeightSpec("m", (333, 71), ("a", "b")),
        WeightSpec("e", (50, 71), ("e",), "embedding"),
        WeightSpec("v", (71,), ("v",), "vector"),
    ]
    opened = open_checkpoint(folder(tmp_path, tensors))
    packing = Packing("bfloat16", "rows", "int8")
    manifest = pack(opened, specs, packing, slab)
    assert manifest.nbytes == packed_size(opened, specs, packing)
    parts = {name: part for name, (part,) in map_slabs(manifest, [slab]).items()}
    assert {name: (p.dtype, p.kind) for name, p in parts.items()} == {
        "m": ("int8", "matrix"),
        "e": ("bfloat16", "embedding"),
        "v": ("float32", "vector"),
    }
    data = parts["m"].data
    values = np.frombuffer(data[: 333 * 71], np.int8).reshape(333, 71)
    scales = np.frombuffer(data[-4 * 333 :], np.float32)
    whole = torch.cat([tensors["a"], tensors["b"]]).numpy()
    np.testing.assert_allclose(scales, np.abs(whole).max(1) / 127, rtol=1e-6)
    assert np.array_equal(np.abs(values.astype(int)).max(1), np.where(scales > 0, 127, 0))
    assert (np.abs(values * scales[:, None] - whole) <= scales[:, None] * 0.5001).all()


def test_a_description_and_private_copies_of_slabs(tmp_path):
    """What is packed, read back in another process's way: mapped, and copied."""
    checkpoint = open_checkpoint(tiny.make(tmp_path / "m"))
    specs = models.build(checkpoint.config).weights()
    slab, described = os.memfd_create("slab"), os.memfd_create("description")
    told: list[tuple[int, int]] = []
    manifest = pack(checkpoint, specs, Packing("float32"), slab, lambda done, total: told.append((done, total)))
    assert told[-1] == (sum(e.nbytes for e in manifest.entries),) * 2
    describe(described, Description(checkpoint.config, manifest))
    assert read_description(described) == Description(checkpoint.config, manifest)
    mapped, copied = map_slabs(manifest, [slab]), map_slabs(manifest, [slab], copy=True)
    os.pwrite(slab, bytes(manifest.nbytes), 0)
    for entry in manifest.entries:
        (part,), (own,) = mapped[entry.name], copied[entry.name]
        assert native.checksum(own.data) == entry.checksum and own.data.readonly and not any(part.data), entry.name
    for fd in (slab, described):
        os.close(fd)
