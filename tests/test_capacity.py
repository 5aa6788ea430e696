from __future__ import annotations

from dataclasses import dataclass

import pytest

from engine.capacity import PROCESS_BYTES, Machine, cores_for, kv_bytes_per_token, machine, resolve, threads_for
from engine.config import Config
from engine.types import OutOfMemory, UserError

GIB = 1 << 30


@dataclass
class Shape:
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    hidden: int = 576
    intermediate: int = 1536
    vocab: int = 49152
    max_len: int = 8192


def test_automatic_values_are_resolved_with_their_reasons():
    config, why = resolve(Config(), Shape(), GIB // 2, Machine(20 * GIB, 2))
    assert (config.device, config.dtype, config.block_size, config.max_model_len) == ("cpu", "float32", 16, 8192)
    assert (
        config.kv_cache_memory_bytes == 4 * GIB // (46080 * 16) * (46080 * 16) and kv_bytes_per_token(Shape(), "float32") == 46080
    )
    assert set(why) == {"device", "dtype", "block_size", "max_num_batched_tokens", "max_model_len", "kv_cache_memory_bytes"}
    assert config.max_num_batched_tokens == 256
    assert resolve(Config(max_num_seqs=300), Shape(), GIB // 2, Machine(20 * GIB, 2))[0].max_num_batched_tokens == 300


def test_a_small_machine_gets_a_shorter_context_and_says_so():
    config, why = resolve(Config(), Shape(), GIB // 2, Machine(GIB + PROCESS_BYTES - (300 << 20), 2))
    assert config.max_model_len is not None and config.max_model_len < 8192
    assert why["max_model_len"] == "what the KV cache holds"
    again, _ = resolve(
        Config(max_model_len=config.max_model_len), Shape(), GIB // 2, Machine(GIB + PROCESS_BYTES - (300 << 20), 2)
    )
    assert again.max_model_len == config.max_model_len


def fitting(error: OutOfMemory, flag: str) -> int:
    """The value an error message says would fit."""
    return int(str(error).split(f"{flag} ")[-1].split()[0])


def test_out_of_memory_names_the_flag_and_a_value_that_fits():
    box = Machine(2 * GIB, 2)
    with pytest.raises(OutOfMemory) as e:
        resolve(Config(max_model_len=8192, kv_cache_memory_bytes=64 << 20), Shape(), GIB // 2, box)
    assert e.value.param == "max_model_len"
    length = fitting(e.value, "--max-model-len")
    resolve(Config(max_model_len=length, kv_cache_memory_bytes=64 << 20), Shape(), GIB // 2, box)

    with pytest.raises(OutOfMemory) as e:
        resolve(Config(kv_cache_memory_bytes=8 * GIB), Shape(), GIB // 2, box)
    assert e.value.param == "kv_cache_memory_bytes"
    resolve(Config(kv_cache_memory_bytes=fitting(e.value, "--kv-cache-memory-bytes")), Shape(), GIB // 2, box)

    with pytest.raises(OutOfMemory, match="--dtype bfloat16"):
        resolve(Config(), Shape(), 3 * GIB, box)
    with pytest.raises(OutOfMemory, match="no single KV block"):
        resolve(Config(kv_cache_memory_bytes=1000), Shape(), GIB // 2, box)


def test_impossible_settings_are_refused():
    box = Machine(8 * GIB, 2)
    with pytest.raises(UserError, match="8192 positions"):
        resolve(Config(max_model_len=9000), Shape(), GIB, box)
    with pytest.raises(UserError, match="--max-num-batched-tokens 64 or more"):
        resolve(Config(max_num_batched_tokens=32), Shape(), GIB, box)
    with pytest.raises(UserError, match="compiled cpu kernels"):
        resolve(Config(tensor_parallel_size=3), Shape(), GIB, box)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"te": 4, "max_te": 2}, "--max-te 2 is less"),
        ({"min_te": 3}, "raise --max-te"),
        ({"min_te": 0}, "--keep-alive"),
        ({"pd": "semi", "te": 2, "max_te": 4}, "isn't scaled"),
        ({"slo_ttft_ms": 100.0}, "--max-te"),
    ],
)
def test_numbers_of_tes_that_contradict_each_other_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        resolve(Config(**settings), Shape(), GIB, Machine(8 * GIB, 2, compiled=True))


def test_kv_memory_is_divided_among_all_tes_there_may_be_and_all_models():
    one, _ = resolve(Config(), Shape(), GIB, Machine(20 * GIB, 2, compiled=True))
    scaled, _ = resolve(Config(max_te=8), Shape(), GIB, Machine(20 * GIB, 2, compiled=True))
    shared, _ = resolve(Config(), Shape(), GIB, Machine(20 * GIB, 2, compiled=True, models=8))
    sizes = [c.kv_cache_memory_bytes for c in (one, scaled, shared)]
    assert sizes[0] > 3 * max(sizes[1:]) and 8 * max(sizes[1:]) <= 20 * GIB


def test_threads_are_divided_among_tes():
    assert [threads_for(4, processes) for processes in (0, 1, 2, 3, 9)] == [4, 4, 2, 1, 1]


def test_this_machine_can_be_read():
    box = machine()
    assert box.cores >= 1 and 0 < box.free_bytes < 1 << 50


def test_what_only_the_compiled_kernels_do():
    compiled, reference = Machine(20 * GIB, 2, compiled=True), Machine(20 * GIB, 2)
    for box, settings, names in (
        (reference, {"quantization": "int8"}, "--quantization int8 needs"),
        (compiled, {"quantization": "int8", "dtype": "float32"}, "--quantization int8 needs"),
        (reference, {"pin_threads": True}, "--pin-threads"),
        (compiled, {"block_size": 24}, "multiple of 16"),
        (reference, {"kv_cache_dtype": "int8"}, "--kv-cache-dtype int8 needs the compiled cpu kernels"),
        (compiled, {"kv_cache_dtype": "int8", "dtype": "float32"}, "--dtype float32 can't"),
        (compiled, {"kv_cache_dtype": "bfloat16", "dtype": "float32"}, "--kv-cache-dtype bfloat16 needs --dtype bfloat16"),
    ):
        with pytest.raises(UserError, match=names):
            resolve(Config(**settings), Shape(), GIB // 2, box)
    resolve(Config(block_size=24), Shape(), GIB // 2, reference)
    resolve(Config(block_size=48, quantization="int8", pin_threads=True), Shape(), GIB // 2, compiled)


def test_integers_take_half_the_kv_memory():
    compiled, shape = Machine(20 * GIB, 2, compiled=True), Shape()
    assert [kv_bytes_per_token(shape, "bfloat16", kind) for kind in ("auto", "bfloat16", "int8")] == [23040, 23040, 11880]
    limits = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
    lengths = {
        kind: resolve(Config(kv_cache_dtype=kind, **limits), shape, GIB // 2, compiled)[0].max_model_len
        for kind in ("auto", "bfloat16", "int8")
    }
    assert lengths == {"auto": 2912, "bfloat16": 2912, "int8": 5648}
    with pytest.raises(UserError) as e:
        resolve(Config(kv_cache_dtype="int8"), shape, GIB // 2, Machine(20 * GIB, 2))
    assert e.value.param == "kv_cache_dtype"


def test_tes_take_turns_around_the_cores():
    assert [cores_for(te, 2, {0, 1, 4, 5}) for te in range(3)] == [[0, 1], [4, 5], [0, 1]]
    assert cores_for(1, 3, {2, 7}) == [7, 2, 7]
