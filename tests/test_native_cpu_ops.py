"""The compiled operators other than the matrix product, against plain numpy in float64, for every instruction set.

Outputs are poisoned before each run, sizes are odd, and what one row gets must be the same bits in any company.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.native import cpu

ISAS = cpu.available()
CASES = range(6)


@pytest.fixture(scope="module", params=ISAS)
def team(request: pytest.FixtureRequest) -> Iterator[cpu.Team]:
    made = cpu.Team(2, isa=request.param)
    yield made
    made.close()


def bf16(values: np.ndarray) -> np.ndarray:
    """uint16: float32 rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def near_bf16(found: np.ndarray, expected: np.ndarray) -> None:
    """bf16 bits against float64: half a unit in the last place of 8 bits, and what float32 sums add."""
    np.testing.assert_allclose(widen(found), expected, rtol=2**-8 * 1.02, atol=1e-6 * max(1.0, np.abs(expected).max()))


def run(team: cpu.Team, kind: int, step: dict[str, object], **op: object) -> None:
    """One operator; arrays are handed over by address and must be what the caller holds."""
    made, description = cpu.Op(kind=kind), cpu.Step()
    for target, values in ((made, op), (description, step)):
        for name, value in values.items():
            if name in ("i", "f"):
                getattr(target, name)[: len(value)] = value
            else:
                if isinstance(value, np.ndarray):
                    assert value.flags.c_contiguous
                    value = value.ctypes.data
                setattr(target, name, value)
    team.run((cpu.Op * 1)(made), description)


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_embed_and_take_rows(team, case):
    rng = np.random.default_rng(case)
    vocab, n, count = rng.integers(1, 100), rng.integers(1, 90), rng.integers(1, 70)
    table = bf16(floats(rng, vocab, n))
    packed = np.zeros(cpu.packed_bytes("bfloat16", vocab, n) // 2, np.uint16)
    cpu.pack("bfloat16", packed.ctypes.data, table.ctypes.data, int(vocab), int(n))
    ids = rng.integers(0, vocab, count).astype(np.int32)
    out = np.full((count, n), np.nan, np.float32)
    run(team, cpu.EMBED, {"tokens": count, "ids": ids}, out=out, w=packed, n=n)
    assert (out == widen(table)[ids]).all()
    feed, last = rng.integers(-1, 5, count).astype(np.int32), rng.integers(0, vocab, 5).astype(np.int32)
    run(team, cpu.EMBED, {"tokens": count, "ids": ids, "feed": feed, "last": last}, out=out, w=packed, n=n)
    assert (out == widen(table)[np.where(feed < 0, ids, last[feed])]).all()
    rows = rng.integers(0, count, rng.integers(1, 40)).astype(np.int32)
    taken = np.full((len(rows), n), np.nan, np.float32)
    run(team, cpu.TAKE_ROWS, {"tokens": count, "sampled": len(rows), "rows": rows}, sampled=1, out=taken, x=out, n=n)
    assert (taken == out[rows]).all()


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("added", [False, True])
def test_rms_norm(team, case, added):
    rng = np.random.default_rng(case)
    rows, n = int(rng.integers(1, 60)), int(rng.choice([1, 7, 16, 63, 576, 1001]))
    x, y, weight = floats(rng, rows, n) * 30, floats(rng, rows, n), floats(rng, n)
    summed = x + y if added else x.copy()
    out = np.full((rows, n), 0x7FC1, np.uint16)
    one = {"sampled": 1, "n": n, "w": weight, "f": [1e-5]}
    step = {"tokens": rows + 5, "sampled": rows}
    alone, alone_out = x.copy(), np.full((rows, n), 0x7FC1, np.uint16)
    run(team, cpu.RMS_NORM, step, out=out, x=x, y=y if added else None, **one)
    assert (x == summed).all()
    near_bf16(out, rms(summed, weight, 1e-5))
    for r in range(0, rows, 7):
        a, b, c = alone_out[r : r + 1], alone[r : r + 1], y[r : r + 1] if added else None
        run(team, cpu.RMS_NORM, {"sampled": 1}, out=a, x=b, y=c, **one)
        assert (a == out[r]).all() and (b == x[r]).all()


@pytest.mark.parametrize("case", CASES)
def test_head_norm(team, case):
    rng = np.random.default_rng(case)
    kv_heads, dim = int(rng.integers(1, 5)), int(rng.choice([8, 16, 40, 64, 80, 128]))
    heads, rows = kv_heads * int(rng.integers(1, 4)), int(rng.integers(1, 30))
    x, wq, wk = floats(rng, rows, heads + 2 * kv_heads, dim), floats(rng, dim), floats(rng, dim)
    expected = x.astype(np.float64)
    expected[:, :heads] = rms(x[:, :heads], wq, 1e-6)
    expected[:, heads : heads + kv_heads] = rms(x[:, heads : heads + kv_heads], wk, 1e-6)
    run(team, cpu.HEAD_NORM, {"tokens": rows}, x=x, w=wq, y=wk, i=[heads, kv_heads, dim], f=[1e-6])
    np.testing.assert_allclose(x, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_swiglu(team, case):
    rng = np.random.default_rng(case)
    rows, n = int(rng.integers(1, 40)), int(rng.choice([1, 15, 100, 512, 1025, 1536]))
    x = floats(rng, rows, 2 * n) * 10
    edges = np.array([-1e30, -88.0, -90.0, -200.0, 0.0, -0.0, 88.7, 200.0, 1e30], np.float32)[:n]
    x[0, : len(edges)] = edges
    out = np.full((rows, n), 0x7FC1, np.uint16)
    run(team, cpu.SWIGLU, {"tokens": rows}, out=out, x=x, n=n)
    gate, up = x[:, :n].astype(np.float64), x[:, n:].astype(np.float64)
    with np.errstate(over="ignore"):
        near_bf16(out, gate / (1 + np.exp(-gate)) * up)
    last = np.full((1, n), 0x7FC1, np.uint16)
    run(team, cpu.SWIGLU, {"tokens": 1}, out=last, x=x[-1:], n=n)
    assert (last == out[-1]).all()


def test_what_is_not_a_number_stays_so(team):
    x = np.ones((1, 64), np.float32)
    x[0, 3] = np.nan
    out = np.zeros((1, 32), np.uint16)
    run(team, cpu.SWIGLU, {"tokens": 1}, out=out, x=x, n=32)
    assert np.flatnonzero(np.isnan(widen(out)[0])).tolist() == [3]
    out = np.zeros((1, 64), np.uint16)
    run(team, cpu.RMS_NORM, {"tokens": 1}, out=out, x=x, w=np.ones(64, np.float32), n=64, f=[1e-5])
    assert np.isnan(widen(out)).all()


# ---- rotary positions, the cache and attention ----------------------------------------------------------------------


@dataclass
class Model:
    """Random q, k, v for a few sequences, and a poisoned cache for them."""

    heads: int
    kv_heads: int
    dim: int
    block_size: int
    lengths: list[int]
    window: int = 0
    kind: str = "bfloat16"  # of cpu.KV_KINDS
    seed: int = 0
    qkv: list[np.ndarray] = field(default_factory=list)  # of each sequence: [length, (H + 2 Hk) * D]

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.width = (self.heads + 2 * self.kv_heads) * self.dim
        self.qkv = [floats(self.rng, n, self.width) * 1.5 for n in self.lengths]
        many = max(self.lengths) + 1
        angle = self.rng.uniform(0, 6.28, (many, self.dim // 2))
        self.cos_sin = np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
        per = [-(-n // self.block_size) for n in self.lengths]
        order = self.rng.permutation(sum(per) + 3).astype(np.int32)
        self.tables = np.full((len(per), max(per)), 2**30, np.int32)  # would crash if it were read
        for s, n in enumerate(per):
            self.tables[s, :n] = order[sum(per[:s]) :][:n]
        groups = (sum(per) + 3) * self.block_size // 16
        # Of two layers side by side in each group the second is this one.
        self.stride = self.kv_heads * cpu.kv_run(self.kind, self.dim)  # two layers' words of 16 bits
        self.memory = np.full((groups, self.stride), 0x7FC1, np.uint16)  # nan, as bytes too large for what we store as int8
        layer = self.memory[:, self.stride // 2 :]
        if self.kind == "int8":
            heads = layer.view(np.int8).reshape(groups, self.kv_heads, -1)
            half = 16 * self.dim
            keys, values = heads[:, :, :half], heads[:, :, half : 2 * half]
            scales = layer.reshape(groups, self.kv_heads, -1)[:, :, half:]
            self.scales = scales.reshape(groups, self.kv_heads, 2, 16)
        else:
            keys, values = np.split(layer.reshape(groups, 2 * self.kv_heads, -1), 2, 1)
        self.keys = keys.reshape(groups, self.kv_heads, self.dim // 2, 16, 2)
        self.values = values.reshape(groups, self.kv_heads, 8, self.dim, 2)
        assert np.shares_memory(self.keys, self.memory) and np.shares_memory(self.values, self.memory)

    def slots(self, s: int) -> np.ndarray:
        at = np.arange(self.lengths[s])
        return self.tables[s, at // self.block_size] * self.block_size + at % self.block_size

    def stored(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a sequence as the cache holds them, bf16 bits or integers: [length, Hk, D]."""
        keys = self.keys.transpose(0, 3, 1, 2, 4).reshape(-1, self.kv_heads, self.dim)
        values = self.values.transpose(0, 2, 4, 1, 3).reshape(-1, self.kv_heads, self.dim)
        return keys[self.slots(s)], values[self.slots(s)]

    def meant(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a sequence as numbers, float64 [length, Hk, D]."""
        keys, values = self.stored(s)
        if self.kind == "bfloat16":
            return widen(keys).astype(np.float64), widen(values).astype(np.float64)
        scales = widen(np.ascontiguousarray(self.scales.transpose(2, 0, 3, 1))).astype(np.float64)
        k, v = scales.reshape(2, -1, self.kv_heads, 1)[:, self.slots(s)]
        return keys * k, values * v

    def run(self, team: cpu.Team, parts: list[tuple[int, int, int]]) -> list[np.ndarray]:
        """Rope, store and attend for `parts` (sequence, first, count) in one step: bf16 bits [count, H * D] of each."""
        slots, positions = [], []
        for s, first, count in parts:
            at = np.arange(first, first + count)
            positions.append(at)
            slots.append(self.tables[s, at // self.block_size] * self.block_size + at % self.block_size)
        x = np.concatenate([self.qkv[s][first : first + count] for s, first, count in parts])
        step: dict[str, object] = {
            "tokens": len(x),
            "sequences": len(parts),
            "block_size": self.block_size,
            "table_width": self.tables.shape[1],
            "positions": np.concatenate(positions).astype(np.int32),
            "kv_slots": np.concatenate(slots).astype(np.int32),
            "q_start": np.cumsum([0] + [count for _, _, count in parts]).astype(np.int32),
            "kv_len": np.array([first + count for _, first, count in parts], np.int32),
            "blocks": np.ascontiguousarray(self.tables[[s for s, _, _ in parts]]),
            "cos_sin": self.cos_sin,
        }
        out = np.full((len(x), self.heads * self.dim), 0x7FC1, np.uint16)
        shape = {
            "x": x,
            "y": self.keys.ctypes.data,
            "b": self.values.ctypes.data if self.kind == "bfloat16" else 0,
            "n": self.stride,
            "k": cpu.KV_KINDS[self.kind],
            "i": [self.heads, self.kv_heads, self.dim, self.window],
        }
        run(team, cpu.ROPE_STORE, step, **shape)
        self.rotated = x
        run(team, cpu.ATTENTION, step, out=out, f=[self.dim**-0.5], **shape)
        return np.split(out, step["q_start"][1:-1])

    def turned(self, s: int) -> np.ndarray:
        """[length, H + 2 Hk, D] of a sequence after rope, float64."""
        x = self.qkv[s].reshape(-1, self.heads + 2 * self.kv_heads, self.dim).astype(np.float64)
        half, n = self.dim // 2, self.heads + self.kv_heads
        cos, sin = (c[: len(x), None, :].astype(np.float64) for c in np.split(self.cos_sin, 2, 1))
        a, b = x[:, :n, :half].copy(), x[:, :n, half:].copy()
        x[:, :n, :half], x[:, :n, half:] = a * cos - b * sin, b * cos + a * sin
        return x

    def expected(self, s: int, halves: bool) -> np.ndarray:
        """[length, H * D] in float64, from what a whole run left: rotated queries (`halves`: in bf16), and the cache."""
        x = np.split(self.rotated, np.cumsum(self.lengths)[:-1])[s].reshape(self.lengths[s], -1, self.dim)
        n, h = len(x), self.heads
        at = np.arange(n)
        k, v = (np.repeat(c, h // self.kv_heads, 1) for c in self.meant(s))
        q = x[:, :h] * (np.float32(self.dim**-0.5) * np.float32(np.log2(np.e)))
        scores = np.einsum("qhd,khd->hqk", (widen(bf16(q)) if halves else q).astype(np.float64), k) * np.log(2)
        seen = at[None] <= at[:, None]
        if self.window:
            seen &= at[None] > at[:, None] - self.window
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v).reshape(n, -1)


# These multiply pairs of bf16, but for those of an int8 cache: queries and weights are rounded, each by up to a 2^-9th.
HALVES = ("avx512bf16", "amx")
MODELS = [
    Model(9, 3, 64, 16, [70, 1, 200, 33]),
    Model(4, 4, 16, 16, [3, 65, 129], window=5),
    Model(6, 2, 80, 48, [100, 64, 63], window=70),
    Model(3, 1, 8, 128, [130, 2]),
    Model(8, 1, 96, 32, [40, 66], window=1),
    Model(14, 2, 128, 16, [66, 10, 5], window=64),
    Model(60, 1, 32, 16, [70]),
    Model(5, 5, 40, 16, [20, 90]),
]


EACH_MODEL = pytest.mark.parametrize(
    "model", MODELS, ids=lambda m: f"{m.heads}-{m.kv_heads}-{m.dim}-bs{m.block_size}-w{m.window}"
)
EACH_KIND = pytest.mark.parametrize("kind", cpu.KV_KINDS)


def fresh(model: Model, kind: str) -> Model:
    return Model(model.heads, model.kv_heads, model.dim, model.block_size, model.lengths, model.window, kind)


@EACH_MODEL
def test_rope_store_and_attention(team, model):
    model = fresh(model, "bfloat16")
    sequences = range(len(model.lengths))
    outs = model.run(team, [(s, 0, model.lengths[s]) for s in sequences])
    start = 0
    for s in sequences:
        n, turned = model.lengths[s], model.turned(s)
        found = model.rotated[start : start + n].reshape(turned.shape)
        start += n
        np.testing.assert_allclose(found, turned, rtol=1e-6, atol=2e-6)
        h, hk = model.heads, model.kv_heads
        keys, values = model.stored(s)
        assert (keys == bf16(found[:, h : h + hk])).all()
        assert (values == bf16(found[:, h + hk :])).all()
        halves = team.isa in HALVES
        atol = np.abs(widen(values)).max() * 2**-9 if halves else 2e-5
        np.testing.assert_allclose(widen(outs[s]), model.expected(s, halves), rtol=2**-8 * 1.02, atol=atol)
    written = sum(model.lengths) * model.kv_heads * model.dim
    assert (model.keys != 0x7FC1).sum() == (model.values != 0x7FC1).sum() == (model.memory != 0x7FC1).sum() / 2 == written, (
        "a slot that is nobody's was written"
    )


def random_models() -> list[Model]:
    rng = np.random.default_rng(5)
    models = []
    for _ in range(12):
        kv_heads, dim, window = int(rng.integers(1, 5)), 2 * int(rng.integers(1, 70)), int(rng.choice([0, 0, 3, 64, 100]))
        lengths = rng.integers(1, 180, rng.integers(1, 6)).tolist()
        models.append(Model(kv_heads * int(rng.integers(1, 6)), kv_heads, dim, int(rng.choice([16, 32, 80])), lengths, window))
    return models


@pytest.mark.parametrize("model", MODELS + random_models(), ids=lambda m: f"{m.heads}-{m.kv_heads}-{m.dim}-w{m.window}")
def test_a_cache_of_integers(team, model):
    """Attention over what the cache holds, and what the cache holds beside the keys and values themselves."""
    model = fresh(model, "int8")
    sequences, h, hk = range(len(model.lengths)), model.heads, model.kv_heads
    outs = model.run(team, [(s, 0, model.lengths[s]) for s in sequences])
    found = np.split(model.rotated.reshape(-1, h + 2 * hk, model.dim), np.cumsum(model.lengths)[:-1])
    for s in sequences:
        np.testing.assert_allclose(found[s], model.turned(s), rtol=1e-6, atol=2e-6)
        for want, got in zip((found[s][:, h : h + hk], found[s][:, h + hk :]), model.meant(s), strict=True):
            step = np.abs(want).max(-1, keepdims=True) / 127 * (1 + 2**-7)  # a scale is rounded up to a bf16
            assert (np.abs(got - want) <= step * 0.501).all()
        # Queries and weights have 16 bits: a 2^-16th of the largest is lost of each.
        atol = 4e-4 * np.abs(model.meant(s)[1]).max()
        np.testing.assert_allclose(widen(outs[s]), model.expected(s, False), rtol=2**-8 * 1.02, atol=atol)
    # Slots that are nobody's, and the other layer's memory, are as they were.
    free = np.setdiff1d(np.arange(len(model.memory) * 16), np.concatenate([model.slots(s) for s in sequences]))
    keys = model.keys.transpose(0, 3, 1, 2, 4).reshape(-1, hk * model.dim)[free]
    values = model.values.transpose(0, 2, 4, 1, 3).reshape(-1, hk * model.dim)[free]
    assert (keys.view(np.uint16) == 0x7FC1).all() and (values == np.where(free % 2, 0x7F, -0x3F)[:, None]).all()
    assert (model.scales.transpose(0, 3, 1, 2).reshape(-1, 2 * hk)[free] == 0x7FC1).all()
    assert (model.memory[:, : model.stride // 2] == 0x7FC1).all()


@EACH_KIND
@EACH_MODEL
def test_attention_is_the_same_bits_in_any_company(team, model, kind):
    whole = fresh(model, kind).run(team, [(s, 0, n) for s, n in enumerate(model.lengths)])
    rng = np.random.default_rng(1)
    for trial in range(3):
        other = fresh(model, kind)
        done = [0] * len(model.lengths)
        while any(d < n for d, n in zip(done, model.lengths, strict=True)):
            parts = []
            for s in rng.permutation(len(done)):
                left = model.lengths[s] - done[s]
                count = min(left, int(rng.integers(0, 60)) if trial else 1) if left else 0
                if count:
                    parts.append((int(s), done[s], count))
                    done[s] += count
            if parts:
                for (s, first, count), out in zip(parts, other.run(team, parts), strict=True):
                    assert (out == whole[s][first : first + count]).all(), (s, first, count)


@EACH_KIND
def test_many_sequences_of_one_token(team, kind):
    """The form in which a unit takes all heads of a sequence."""
    lengths = [int(n) for n in np.random.default_rng(3).integers(1, 150, 20)]
    model = Model(6, 3, 64, 16, lengths, kind=kind)
    whole = model.run(team, [(s, 0, n) for s, n in enumerate(lengths)])
    last = model.run(team, [(s, n - 1, 1) for s, n in enumerate(lengths)])
    for s, n in enumerate(lengths):
        assert (last[s][0] == whole[s][n - 1]).all()


def test_very_large_scores(team):
    model = Model(2, 1, 64, 16, [100])
    model.qkv[0][:, :192] *= 100
    out = model.run(team, [(0, 0, 100)])[0]
    np.testing.assert_allclose(widen(out), model.expected(0, team.isa in HALVES), rtol=2**-8 * 1.02, atol=5e-3)


def test_very_large_scores_of_integers(team):
    """The largest of them decides, whatever the scales: tiles of nothing but faint weights, and tiny and huge values."""
    for size in (1e-38, 1e-20, 1e20):
        model = Model(2, 1, 64, 16, [300], kind="int8")
        model.qkv[0][:, :192] *= 30
        model.qkv[0][:, 192:] *= np.float32(size)
        out = model.run(team, [(0, 0, 300)])[0]
        atol = 5e-3 * np.abs(model.meant(0)[1]).max() + 1e-28
        np.testing.assert_allclose(widen(out), model.expected(0, False), rtol=2**-8 * 1.02, atol=atol)


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_shows_through_integers(team, part, wrong):
    model = Model(2, 1, 32, 16, [150], kind="int8")
    model.qkv[0][100, {"query": 40, "key": 70, "value": 101}[part]] = wrong
    out = widen(np.concatenate([model.run(team, [(0, t, 1)])[0] for t in range(150)]))
    bad = ~np.isfinite(out.reshape(150, 2, 32)).all(2)
    assert not bad[:100].any() and (bad.sum() == 1 and bad[100, 1] if part == "query" else bad[100:].all())
