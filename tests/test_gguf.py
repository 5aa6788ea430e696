"""GGUF: header, metadata, directory, block formats and the model's config, against the `gguf` package."""

import random
import struct
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest

from engine.gguf import BLOCKS, GGUF, hf_config, hf_tensor_names, llama3_factors
from engine.quants import CHUNK, dequantize
from engine.types import UserError
from tests.assets import default_model

# ---- block formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_dequantize_agrees_with_the_gguf_package(name: str) -> None:
    weights, nbytes = BLOCKS[name]
    rng = np.random.default_rng(1)
    count = 2 * CHUNK // weights + 3  # several chunks and a part of one
    raw = rng.integers(0, 256, (count, nbytes), np.uint8)
    out = np.full((count, weights), -1, np.float32)
    with np.errstate(all="ignore"):  # random scales include infinities and NaNs
        dequantize(raw, name, out)
        want = oracle.quants.dequantize(raw, oracle.GGMLQuantizationType[name])
    assert np.array_equal(out, want.reshape(out.shape), equal_nan=True)


def test_dequantize_reads_rows_by_range() -> None:
    raw = np.random.default_rng(2).integers(0, 120, (8, 3 * 20), np.uint8)  # eight rows of three Q4_1 blocks
    whole, part = np.empty((8, 96), np.float32), np.empty((3, 96), np.float32)
    dequantize(raw, "Q4_1", whole)
    dequantize(raw[4:7], "Q4_1", part)
    assert np.array_equal(whole[4:7], part)


# ---- the file -------------------------------------------------------------------------------------------------------


def write(path: Path, arch: str = "llama", tensors: dict[str, np.ndarray] | None = None, **keys: object) -> Path:
    """A GGUF file by the gguf package's writer; `keys` are metadata, with __ or a plain dot for a dot."""
    writer = oracle.GGUFWriter(path, arch)
    for key, value in keys.items():
        name = key.replace("__", ".")
        kind = oracle.GGUFValueType.get_type(value)
        sub = oracle.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
        writer.add_key_value(name, value, kind, sub_type=sub)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_gguf_package_wrote(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write(
        tmp_path / "a.gguf",
        tensors={"x": rows, "y": rows.astype(np.float16)},
        a__int=-5,
        a__float=0.5,
        a__bool=True,
        a__text="größe",
        a__strings=["", "▁a", "b" * 300],
        a__ints=[1, 2, 3],
        a__floats=[0.5, 0.25],
    )
    file = GGUF(path)
    meta = file.metadata
    assert meta["general.architecture"] == "llama"
    assert (meta["a.int"], meta["a.float"], meta["a.bool"], meta["a.text"]) == (-5, 0.5, True, "größe")
    assert meta["a.strings"] == ["", "▁a", "b" * 300]
    assert (meta["a.ints"], meta["a.floats"]) == ([1, 2, 3], [0.5, 0.25])
    assert (file.tensors["x"].type, file.tensors["x"].shape, file.tensors["x"].nbytes) == ("F32", (2, 3), 24)
    assert np.array_equal(file.raw("x").view(np.float32), rows.reshape(-1))
    assert np.array_equal(file.raw("y").view(np.float16), rows.reshape(-1))
    assert not file.raw("x").flags.writeable


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.gguf", tensors={"x": np.ones((4, 8), np.float32)}, a__s=["p", "q"]).read_bytes()
    GGUF(tmp_path / "a.gguf")
    torn = tmp_path / "torn.gguf"
    end = len(whole) - 1
    for size in [*range(0, end, 7), end]:
        torn.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"torn\.gguf"):
            GGUF(torn)


def test_a_damaged_header_never_raises_anything_else(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.gguf", tensors={"x": np.ones((4, 8), np.float32)}, a__s=["p", "q"], a__i=[1, 2]).read_bytes()
    dice, bad = random.Random(3), tmp_path / "bad.gguf"
    for _ in range(400):
        data = bytearray(whole)
        data[dice.randrange(4, len(whole) - 128)] = dice.randrange(256)
        bad.write_bytes(data)
        try:
            GGUF(bad)
        except UserError as e:
            assert "bad.gguf" in str(e)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "of version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
        (b"GGUF", "too short"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, head: bytes, says: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(head)
    with pytest.raises(UserError, match=says):
        GGUF(path)


def test_unreadable_tensor_types_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tensors={"blk.0.x": np.ones((2, 4), np.int32)})
    with pytest.raises(UserError, match=r"blk\.0\.x has GGML type number 26, .* Q4_K"):
        GGUF(path)


# ---- in Hugging Face terms ------------------------------------------------------------------------------------------


def model_keys(arch: str, **more: object) -> dict[str, object]:
    keys = {
        "block_count": 2,
        "context_length": 4096,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 500000.0,
    }
    return {f"{arch}.{key}": value for key, value in (keys | more).items()}


def model_file(path: Path, arch: str = "llama", tensors: dict[str, np.ndarray] | None = None, **more: object) -> GGUF:
    tensors = {"token_embd.weight": np.zeros((40, 64), np.float32)} | (tensors or {})
    return GGUF(write(path / "m.gguf", arch, tensors, **model_keys(arch, **more)))


def test_config_of_a_llama(tmp_path: Path) -> None:
    config = hf_config(model_file(tmp_path))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]) == (64, 2, 96)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 16)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (40, 4096)
    assert (config["rms_norm_eps"], config["rope_theta"], config["rope_scaling"]) == (1e-6, 500000.0, None)
    assert config["tie_word_embeddings"] and not config["attention_bias"] and config["sliding_window"] is None


def test_config_of_the_other_families(tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": np.zeros(64, np.float32), "output.weight": np.zeros((40, 64), np.float32)}
    qwen2 = hf_config(model_file(tmp_path, "qwen2", bias))
    assert (qwen2["architectures"], qwen2["attention_bias"]) == (["Qwen2ForCausalLM"], True)
    assert not qwen2["tie_word_embeddings"]
    qwen3 = hf_config(model_file(tmp_path, "qwen3", **{"attention.key_length": 32}))
    assert (qwen3["architectures"], qwen3["head_dim"]) == (["Qwen3ForCausalLM"], 32)
    mistral = hf_config(model_file(tmp_path, "llama", **{"attention.sliding_window": 128}))
    assert (mistral["architectures"], mistral["sliding_window"]) == (["MistralForCausalLM"], 128)


def test_rope_scaling(tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    assert hf_config(model_file(tmp_path, **linear))["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1024}
    want = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert hf_config(model_file(tmp_path, **yarn))["rope_scaling"] == want
    with pytest.raises(UserError, match="'su' is not supported"):
        hf_config(model_file(tmp_path, **{"rope.scaling.type": "su", "rope.scaling.factor": 4.0}))


def test_rope_factors_become_llama3s_numbers_or_stay_factors(tmp_path: Path) -> None:
    # The published formula, written out another way: wavelengths against the original context.
    inv = 500000.0 ** -(np.arange(8) / 8)
    wave = 2 * np.pi / inv
    smooth = (8192 / wave - 1) / (4 - 1)
    scaled = np.where(wave > 8192, inv / 32, np.where(wave < 8192 / 4, inv, (1 - smooth) * inv / 32 + smooth * inv))
    factors = (inv / scaled).astype(np.float32)
    config = hf_config(model_file(tmp_path, tensors={"rope_freqs.weight": factors}))
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    other = hf_config(model_file(tmp_path, tensors={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}))["rope_scaling"]
    assert other["rope_type"] == "longrope" and other["attention_factor"] == 1.0
    assert other["short_factor"] == other["long_factor"] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_llama3_factors_match_the_formula_at_its_edges() -> None:
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = llama3_factors(500000.0, 64, **numbers)
    assert factors[0] == 1.0 and factors[-1] == 8.0 and factors == sorted(factors)


@pytest.mark.parametrize(
    ("arch", "more", "says"),
    [
        ("gemma", {}, "'gemma' is not supported; these are: llama"),
        ("llama", {"expert_count": 8}, "mixture of 8 experts"),
        ("llama", {"rope.dimension_count": 8}, "rope over 8 of 16 dimensions"),
        ("llama", {"attention.head_count": [4, 2]}, "differs from layer to layer"),
        ("llama", {"feed_forward_length": None}, r"llama\.feed_forward_length is missing"),
    ],
)
def test_models_that_cannot_be_served_say_why(tmp_path: Path, arch: str, more: dict[str, object], says: str) -> None:
    keys = {key: value for key, value in model_keys(arch, **more).items() if value is not None}
    path = write(tmp_path / "m.gguf", arch, {"token_embd.weight": np.zeros((40, 64), np.float32)}, **keys)
    with pytest.raises(UserError, match=says):
        hf_config(GGUF(path))


def test_tensor_names(tmp_path: Path) -> None:
    x = np.zeros((2, 32), np.float32)
    file = model_file(tmp_path, tensors={"blk.1.attn_q.weight": x, "blk.0.attn_k_norm.weight": x, "blk.0.attn_v.bias": x})
    names = hf_tensor_names(file)
    assert names["model.layers.1.self_attn.q_proj.weight"] == "blk.1.attn_q.weight"
    assert names["model.layers.0.self_attn.k_norm.weight"] == "blk.0.attn_k_norm.weight"
    assert names["model.layers.0.self_attn.v_proj.bias"] == "blk.0.attn_v.bias"
    assert names["model.embed_tokens.weight"] == "token_embd.weight"
    strange = model_file(tmp_path, tensors={"blk.0.attn_sinks.weight": x})
    with pytest.raises(UserError, match=r"blk\.0\.attn_sinks\.weight belongs to no model"):
        hf_tensor_names(strange)


def test_the_default_model() -> None:
    file = GGUF(default_model())
    config = hf_config(file)
    assert len(file.tensors) == 272 and {t.type for t in file.tensors.values()} == {"Q4_1", "Q8_0", "F32"}
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert (config["rms_norm_eps"], config["rope_theta"], config["eos_token_id"]) == (1e-5, 100000.0, 2)
    assert len(hf_tensor_names(file)) == 272
    raw, out = file.raw("blk.3.ffn_up.weight"), np.empty((1536, 576), np.float32)
    dequantize(raw, "Q4_1", out)
    want = oracle.quants.dequantize(raw.reshape(1536, -1), oracle.GGMLQuantizationType.Q4_1)
    assert np.array_equal(out, want)
