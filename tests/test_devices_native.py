"""The cpu device on compiled kernels: close to the reference operators, and bit-equal to itself however the work is cut."""

from __future__ import annotations

import numpy as np
import pytest

from engine.capacity import kv_bytes_per_token
from engine.devices.cpu_native import ROTATION_ROWS, Rotation
from engine.models.rope import Rope
from tests import tiny
from tests.harness import Rig

VARIANTS = {
    "llama": {},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "head_dim": 32},
    "mistral_window": {"architecture": "MistralForCausalLM", "sliding_window": 24},
    "odd_sizes": {
        "hidden_size": 72,
        "head_dim": 24,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 100,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tiny.make(tmp_path_factory.mktemp(name), **fields) for name, fields in VARIANTS.items()}


def ids_of(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, count).tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_close_to_the_float32_reference(folders, name):
    """No further from float32 than torch's own operators in bfloat16 are, which round more often."""
    ids = ids_of(60, 1)
    rigs = Rig(folders[name], native=1), Rig(folders[name], dtype="bfloat16"), Rig(folders[name], dtype="float32")
    native, torch_bf16, want = (rig.logits([(ids, 0, 60)], [rig.table(60)]) for rig in rigs)

    def off(logits: np.ndarray) -> float:
        return float(np.sqrt(((logits - want) ** 2).mean()))

    assert 0 < off(native) < 1.05 * off(torch_bf16)


@pytest.mark.parametrize("kept", [{}, {"quantization": "int8"}, {"kv_dtype": "int8"}], ids=["bf16", "int8", "kv_int8"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_sequence_does_not_see_its_batch(folders, name, kept):
    """Bit-equal logits: alone and whole; chunked at random points beside others that come and go (up to 63); on one thread and
    on two."""
    rng = np.random.default_rng(7)
    texts = [ids_of(int(n), i) for i, n in enumerate(rng.integers(20, 70, 64 if name == "llama" else 9))]
    alone = []
    for text in texts:
        rig = Rig(folders[name], native=1, **kept)
        alone.append(rig.logits([(text, 0, len(text))], [rig.table(len(text))]))
    rig = Rig(folders[name], native=2, blocks=512, seed=3, **kept)
    tables = [rig.table(len(t)) for t in texts]
    done = [0] * len(texts)
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        parts, owners = [], []
        for i in rng.permutation(len(texts)):
            left = len(texts[i]) - done[i]
            count = int(min(left, rng.choice([0, 1, 1, 2, 5, 17, 33])))
            if count:
                parts.append((texts[i], done[i], count))
                owners.append(int(i))
        if not parts:
            continue
        logits = rig.logits(parts, [tables[i] for i in owners])
        at = 0
        for i, (_, start, count) in zip(owners, parts, strict=True):
            assert np.array_equal(logits[at : at + count], alone[i][start : start + count]), (i, start, count)
            at += count
            done[i] += count


@pytest.mark.parametrize("kept", [{"quantization": "int8"}, {"kv_dtype": "int8"}], ids=["weights", "kv"])
@pytest.mark.parametrize("name", VARIANTS)
def test_int8_is_near_bfloat16(folders, name, kept):
    ids = ids_of(60, 1)
    rigs = Rig(folders[name], native=1, **kept), Rig(folders[name], native=1), Rig(folders[name], dtype="float32")
    int8, bf16, want = (rig.logits([(ids, 0, 60)], [rig.table(60)]) for rig in rigs)
    spread = want.std()
    assert (
        not np.array_equal(int8, bf16) and np.sqrt(((int8 - want) ** 2).mean()) < 0.1 * spread
    )  # random weights amplify every rounding; an error of indexing gives more than 1


def test_greedy_text_on_both_devices(folders):
    """Where the reference's best two logits are not close, the choices agree: random tiny models leave few close calls."""
    prompt = ids_of(12, 5)
    native, reference = Rig(folders["llama"], native=2), Rig(folders["llama"], dtype="float32")
    text = native.greedy(prompt, 40)
    table = reference.table(60)
    logits = reference.logits([(prompt + text, 0, len(prompt) + 40)], [table])[len(prompt) - 1 : -1]
    order = np.sort(logits, axis=1)
    clear = order[:, -1] - order[:, -2] > 0.05 * np.abs(logits).max()
    assert clear.sum() > 10 and (logits.argmax(1) == np.array(text))[clear].all()


def test_a_cache_takes_what_capacity_counts(folders):
    rigs = {kind: Rig(folders["odd_sizes"], native=1, blocks=40, kv_dtype=kind) for kind in ("auto", "bfloat16", "int8")}
    for kind, rig in rigs.items():
        assert rig.kv.nbytes == len(rig.kv.pool.view) == 40 * 16 * kv_bytes_per_token(rig.model, "bfloat16", kind)
    assert rigs["bfloat16"].kv.nbytes == rigs["auto"].kv.nbytes == rigs["int8"].kv.nbytes * 48 // 26


def test_rows_of_a_rope_table_come_when_a_step_comes_so_far():
    table = Rope({"rope_theta": 1e5}, 16, 512).table(300)
    rotation, every = Rotation(table), table.rows(0, 300)
    for length, done in ((1, ROTATION_ROWS), (ROTATION_ROWS, ROTATION_ROWS), (ROTATION_ROWS + 1, 2 * ROTATION_ROWS), (300, 300)):
        assert rotation.reaching(length) == rotation.rows.ctypes.data
        assert (rotation.rows[:done] == every[:done]).all() and not rotation.rows[done:].any()
