"""The compiled CPU backend over quantised weights: packing, rows of the matrix, and products with quantised activations."""

from collections.abc import Iterator

import numpy as np
import pytest

from engine import quants
from engine.gguf import BLOCKS
from engine.native import cpu

ISAS = cpu.available()
STORED = ("q4_0", "q4_1", "q8_0", "q4_k", "q6_k")  # as GGUF files have them
KINDS = (*STORED, "int8")
ACTIVATION_GROUP = {"q4_0": 32, "q4_1": 32, "q8_0": 32, "q4_k": 32, "q6_k": 16, "int8": 64}
FUSED = [isa for isa in ISAS if isa != "portable"]  # these have fused multiply-add


def aligned(nbytes: int, fill: int = 0) -> np.ndarray:
    raw = np.full(nbytes + 64, fill, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16(values: np.ndarray) -> np.ndarray:
    """uint16: float32 rounded to nearest even. No NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored_blocks(kind: str, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Random blocks of a GGML type, [n, blocks of a row]: all quants and small scales there are, moderate float16 scales."""
    layout, (columns, _) = quants.BLOCK_LAYOUT[kind.upper()], BLOCKS[kind.upper()]
    count = n * k // columns
    blocks = rng.integers(0, 256, (count, layout.itemsize), dtype=np.uint8).view(layout)[:, 0]
    for name in ("d", "m", "dmin"):
        if name in (layout.names or ()):
            blocks[name] = rng.uniform(-1, 1, count).astype(np.float16)
    return blocks.reshape(n, k // columns)


class Matrix:
    """Packed weights [n, k] and what they are as float32."""

    def __init__(self, kind: str, n: int, k: int, source: np.ndarray, *, is_float: bool = True):
        source = np.ascontiguousarray(source)
        self.kind, self.n, self.k = kind, n, k
        self.packed = aligned(cpu.packed_bytes(kind, n, k), 0xAA)
        cpu.pack(kind, self.packed.ctypes.data, source.ctypes.data, n, k, is_float=is_float)
        if kind == "int8":
            self.weights = embed(self, range(n))
        else:
            self.weights = np.empty((n, k), np.float32)
            quants.dequantize(source.view(np.uint8), kind.upper(), self.weights)


def random_matrix(kind: str, n: int, k: int, rng: np.random.Generator) -> Matrix:
    if kind == "int8":
        return Matrix(kind, n, k, rng.standard_normal((n, k)).astype(np.float32))
    return Matrix(kind, n, k, stored_blocks(kind, n, k, rng))


def embed(matrix: Matrix, ids: range | np.ndarray, isa: str | None = None) -> np.ndarray:
    """float32 [ids, k] from DS_EMBED; memory after the output is poisoned."""
    which = np.asarray(ids, np.int32)
    out = np.full(len(which) * matrix.k + 64, np.nan, np.float32)
    out[-64:] = 1234.5
    kind = cpu.WEIGHT_KINDS[matrix.kind]
    op = cpu.Op(kind=cpu.EMBED, out=out.ctypes.data, w=matrix.packed.ctypes.data, n=matrix.k, i=(kind, 0, 0, 0))
    team = cpu.Team(2, isa=isa)
    team.run((cpu.Op * 1)(op), cpu.Step(tokens=len(which), ids=which.ctypes.data))
    team.close()
    assert (out[-64:] == 1234.5).all()
    return out[:-64].reshape(len(which), matrix.k)


def linear(
    team: cpu.Team, x: np.ndarray, matrix: Matrix, bias: np.ndarray | None = None, *, stride: int = 0, fine: bool = False
) -> np.ndarray:
    """float32 [rows, n] from DS_LINEAR over rows `x` (bf16 bits), which are taken in 16 bits where `fine`, else in 8: equal bits
    whether members quantise them together or each for itself.

    The output and all around and between its rows is poisoned.
    """
    x = np.ascontiguousarray(x)
    (rows, k), width = x.shape, stride or matrix.n
    room = aligned(rows * -(-k // 64) * 64 * 4 + 64, 0xAA)  # DS_QUANT_BYTES, DS_QUANT_COLUMNS
    guarded = np.full(rows * width + 128, 1234.5, np.float32)
    out = guarded[64:-64].reshape(rows, width)
    out[:, : matrix.n] = np.nan
    op = cpu.Op(
        kind=cpu.LINEAR,
        out=out.ctypes.data,
        x=x.ctypes.data,
        w=matrix.packed.ctypes.data,
        b=None if bias is None else bias.ctypes.data,
        n=matrix.n,
        k=k,
        stride=stride,
        i=(cpu.WEIGHT_KINDS[matrix.kind], fine),
    )
    team.run((cpu.Op * 1)(op), cpu.Step(tokens=rows))
    alone = out[:, : matrix.n].copy()
    out[:, : matrix.n] = np.nan
    op.y = room.ctypes.data
    team.run((cpu.Op * 1)(op), cpu.Step(tokens=rows))
    assert np.array_equal(out[:, : matrix.n], alone, equal_nan=True) and (room[-64:] == 0xAA).all()
    assert (guarded[:64] == 1234.5).all() and (guarded[-64:] == 1234.5).all() and (out[:, matrix.n :] == 1234.5).all()
    return out[:, : matrix.n].copy()


def quantised(x: np.ndarray, group: int, fine: bool = False) -> np.ndarray:
    """float64: activations (bf16 bits) as the kernels take them: rounded to 255 levels of their group's largest magnitude.

    `fine`: what that leaves is rounded to as many levels again, each 1/254 of the first ones.
    """
    rows, k = x.shape
    padded = np.zeros((rows, -(-k // group) * group), np.float32)
    padded[:, :k] = widen(x)
    groups = padded.reshape(rows, -1, group)
    most = np.abs(groups).max(axis=2, keepdims=True)
    some = most >= np.float32(2.0**-100)
    inverse = np.where(some, np.float32(127) / np.where(some, most, np.float32(1)), np.float32(0))
    scale = np.where(some, most * (np.float32(1) / np.float32(127)), np.float32(0))
    whole = np.rint(groups * inverse)
    values = whole.astype(np.float64) * scale
    if fine:
        unit = scale * (np.float32(1) / np.float32(254))
        rest = (groups - scale * whole) * np.where(some, np.float32(1) / np.where(some, unit, np.float32(1)), np.float32(0))
        values += np.rint(np.clip(rest, -127, 127)).astype(np.float64) * unit
    return values.reshape(rows, -1)[:, :k]


def shapes(kind: str) -> list[tuple[int, int]]:
    if kind == "int8":
        return [(1, 1), (16, 64), (15, 3), (65, 33), (100, 127), (200, 96), (33, 130), (144, 62), (7, 577)]
    if kind in ("q4_k", "q6_k"):
        return [(1, 256), (16, 512), (65, 256), (200, 768), (33, 256)]
    return [(1, 32), (16, 32), (15, 64), (65, 96), (100, 160), (200, 96), (144, 64), (7, 576)]


# A kind of weights, and whether activations are taken in 16 bits; int8 has its own in 8 bits always.
PRODUCTS = [*((kind, False) for kind in KINDS), *((kind, True) for kind in STORED)]


@pytest.fixture(params=ISAS)
def team(request: pytest.FixtureRequest) -> Iterator[cpu.Team]:
    team = cpu.Team(2, isa=request.param)
    yield team
    team.close()


# ---- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_packing_writes_every_byte_and_none_beyond(kind: str) -> None:
    rng = np.random.default_rng(1)
    for n, k in shapes(kind):
        source = rng.standard_normal((n, k)).astype(np.float32) if kind == "int8" else stored_blocks(kind, n, k, rng)
        nbytes = cpu.packed_bytes(kind, n, k)
        assert nbytes % 64 == 0
        one, other = aligned(nbytes + 64, 0xAA), aligned(nbytes + 64, 0x55)
        for to in (one, other):
            cpu.pack(kind, to.ctypes.data, source.ctypes.data, n, k, is_float=True)
        assert np.array_equal(one[:nbytes], other[:nbytes])
        assert (one[nbytes:] == 0xAA).all()


@pytest.mark.parametrize("kind", KINDS)
def test_packing_by_ranges_and_from_an_odd_address(kind: str) -> None:
    rng = np.random.default_rng(2)
    n, k = 40, 256
    source = rng.standard_normal((n, k)).astype(np.float32) if kind == "int8" else stored_blocks(kind, n, k, rng)
    whole, parts = aligned(cpu.packed_bytes(kind, n, k)), aligned(cpu.packed_bytes(kind, n, k))
    cpu.pack(kind, whole.ctypes.data, source.ctypes.data, n, k, is_float=True)
    moved = np.frombuffer(b"x" + source.tobytes(), np.uint8)  # as inside a file
    for first, last in ((32, 40), (0, 16), (16, 32)):
        cpu.pack(kind, parts.ctypes.data, moved.ctypes.data + 1, n, k, is_float=True, first=first, last=last)
    assert np.array_equal(whole, parts)


@pytest.mark.parametrize("kind", STORED)
def test_a_matrix_that_ends_within_a_block_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"a matrix of 48 columns can't be {kind}: its blocks have"):
        cpu.pack(kind, 0, 0, 16, 48)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", STORED)
def test_what_a_file_stores_is_kept(kind: str, isa: str) -> None:
    """Rows of the packed matrix are, bit for bit, what the blocks say. All float16 scales: subnormal, infinite, not numbers."""
    rng = np.random.default_rng(3)
    for n, k in shapes(kind):
        blocks = stored_blocks(kind, n, k, rng)
        blocks["d"].reshape(-1)[::3] = rng.integers(0, 1 << 16, blocks["d"].size, dtype=np.uint16).view(np.float16)[::3]
        blocks["d"].reshape(-1)[::5] = np.float16(6e-8) * rng.integers(0, 900, blocks["d"].size).astype(np.float16)[::5]
        with np.errstate(invalid="ignore"):
            matrix = Matrix(kind, n, k, blocks)
        ids = rng.integers(0, n, 2 * n)
        got, want = embed(matrix, ids, isa), matrix.weights[ids]
        assert np.array_equal(np.isnan(got), np.isnan(want))
        assert np.array_equal(got[~np.isnan(want)].view(np.uint32), want[~np.isnan(want)].view(np.uint32))


@pytest.mark.parametrize("is_float", [True, False])
def test_int8_is_within_half_a_step(is_float: bool) -> None:
    rng = np.random.default_rng(4)
    n, k = 37, 200
    values = (rng.standard_normal((n, k)) * np.exp2(rng.integers(-24, 20, (n, 1)))).astype(np.float32)
    values[3] = 0
    values[4, 64:128] = 0
    values[5] = 1e-30
    if not is_float:
        values = widen(bf16(values))
    got = Matrix("int8", n, k, values if is_float else bf16(values), is_float=is_float).weights
    padded = np.zeros((n, 256), np.float32)
    padded[:, :k] = values
    least = np.abs(padded.reshape(n, 4, 64)).max(axis=2, keepdims=True) / np.float32(127)
    # The scale: the least float16 that is not below it. Float16 numbers are ordered as their bits.
    scale = least.astype(np.float16)
    scale = np.where(scale.astype(np.float32) < least, (scale.view(np.uint16) + 1).view(np.float16), scale).astype(np.float32)
    q = np.rint(padded.reshape(n, 4, 64) / np.where(scale == 0, 1, scale))
    assert np.abs(q).max() <= 127
    assert np.array_equal(got, (q * scale).reshape(n, 256)[:, :k])
    assert (np.abs(got - values) <= np.repeat(scale.reshape(n, 4), 64, axis=1)[:, :k] / 2).all()


def test_int8_of_what_no_scale_holds_is_not_finite() -> None:
    values = np.ones((4, 130), np.float32)
    values[0, 1], values[1, 70], values[2, 129] = np.nan, np.inf, -1e9
    got = Matrix("int8", 4, 130, values).weights
    finite = np.isfinite(got)
    assert not finite[0, :64].any() and not finite[1, 64:128].any() and not finite[2, 128:].any()
    assert finite[0, 64:].all() and finite[1, :64].all() and finite[2, :128].all() and finite[3].all()


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "fine"), PRODUCTS)
def test_linear_against_float64(team: cpu.Team, kind: str, fine: bool) -> None:
    rng = np.random.default_rng(5)
    for n, k in shapes(kind):
        matrix = random_matrix(kind, n, k, rng)
        for rows in (*range(1, 15), 31, 70):
            x = bf16(rng.standard_normal((rows, k)) * np.exp2(rng.integers(-3, 4, (rows, 1))))
            bias = rng.standard_normal(n).astype(np.float32) if rows % 2 else None
            out = linear(team, x, matrix, bias, stride=n + 5 if rows % 3 else 0, fine=fine)
            taken = quantised(x, ACTIVATION_GROUP[kind], fine)
            exact = taken @ matrix.weights.astype(np.float64).T
            size = np.abs(taken) @ np.abs(matrix.weights).astype(np.float64).T
            if bias is not None:
                exact += bias
                size += np.abs(bias)
            assert (np.abs(out - exact) <= size * 1e-5).all(), f"[{n}, {k}], {rows} rows"


@pytest.mark.parametrize("kind", KINDS)
def test_largest_integers_are_exact(team: cpu.Team, kind: str) -> None:
    """All weights and activations at the ends of their ranges: whatever is summed in 16 bits on the way must not overflow."""
    n, k = 32, 256
    for weight in (0, 255):  # of every byte of quants: 4-bit and 6-bit ones too are all zeros and all ones
        if kind == "int8":
            matrix = Matrix(kind, n, k, np.full((n, k), 127 if weight else -127, np.float32))
        else:
            blocks = stored_blocks(kind, n, k, np.random.default_rng(6))
            for name in ("qs", "ql", "qh"):
                if name in (blocks.dtype.names or ()):
                    blocks[name].view(np.uint8)[...] = weight
            if kind == "q8_0":
                blocks["qs"] = 127 if weight else -128
            matrix = Matrix(kind, n, k, blocks)
        for sign in (1, -1):
            x = bf16(np.full((3, k), sign * 127, np.float32))
            x[1, ::2] ^= 0x8000
            exact = widen(x).astype(np.float64) @ matrix.weights.astype(np.float64).T
            size = np.abs(widen(x)).astype(np.float64) @ np.abs(matrix.weights).astype(np.float64).T
            assert (np.abs(linear(team, x, matrix) - exact) <= size * 1e-6).all()


@pytest.mark.parametrize("kind", STORED)
def test_sixteen_bits_keep_what_eight_lose(team: cpu.Team, kind: str) -> None:
    """A bf16 has 8 significant bits: only what is far below its group's largest value is still rounded."""
    rng = np.random.default_rng(14)
    matrix = random_matrix(kind, 64, 512, rng)
    x = bf16(rng.standard_normal((10, 512)))
    exact = widen(x).astype(np.float64) @ matrix.weights.astype(np.float64).T
    error = [np.abs(linear(team, x, matrix, fine=fine) - exact).max() for fine in (False, True)]
    assert error[1] < error[0] / 50


@pytest.mark.parametrize(("kind", "fine"), PRODUCTS)
def test_instruction_sets_compute_the_same_bits(kind: str, fine: bool) -> None:
    rng = np.random.default_rng(7)
    teams = [cpu.Team(2, isa=isa) for isa in FUSED]
    for n, k in shapes(kind):
        matrix = random_matrix(kind, n, k, rng)
        x = bf16(rng.standard_normal((23, k)))
        outs = [linear(team, x, matrix, fine=fine).view(np.uint32) for team in teams]
        assert all(np.array_equal(out, outs[0]) for out in outs)
    for team in teams:
        team.close()


@pytest.mark.parametrize(("kind", "fine"), PRODUCTS)
def test_a_row_does_not_depend_on_its_batch(team: cpu.Team, kind: str, fine: bool) -> None:
    rng = np.random.default_rng(8)
    n, k = 203, 256
    matrix = random_matrix(kind, n, k, rng)
    bias = rng.standard_normal(n).astype(np.float32)
    x = bf16(rng.standard_normal((200, k)))
    alone = np.concatenate([linear(team, x[i : i + 1], matrix, bias, fine=fine) for i in range(len(x))]).view(np.uint32)
    single = cpu.Team(1, isa=team.isa)
    for rows in (*range(2, 26), 64, 95, 96, 97, 193, 200):
        first = int(rng.integers(0, len(x) - rows + 1))
        for some in (team, single):
            together = linear(some, x[first : first + rows], matrix, bias, fine=fine).view(np.uint32)
            assert np.array_equal(together, alone[first : first + rows]), f"{rows} rows"
    single.close()


@pytest.mark.parametrize(("kind", "fine"), PRODUCTS)
def test_rows_that_are_not_finite_stay_alone(team: cpu.Team, kind: str, fine: bool) -> None:
    rng = np.random.default_rng(9)
    n, k = 40, 512
    matrix = random_matrix(kind, n, k, rng)
    x = bf16(rng.standard_normal((9, k)))
    clean = linear(team, x, matrix, fine=fine)
    x[1, 3], x[4, k - 1], x[6] = 0x7F80, 0x7FC0, 0xFF80  # infinity, NaN, minus infinity all over
    out = linear(team, x, matrix, fine=fine)
    assert np.isnan(out[[1, 4, 6]]).all()
    kept = [0, 2, 3, 5, 7, 8]
    assert np.array_equal(out[kept], clean[kept])


@pytest.mark.parametrize(("kind", "fine"), PRODUCTS)
def test_activations_of_all_sizes(team: cpu.Team, kind: str, fine: bool) -> None:
    """Zero, the largest there are and the smallest: exact zero, large but finite, and zero where a scale has no room."""
    rng = np.random.default_rng(10)
    n, k = 20, 256
    matrix = random_matrix(kind, n, k, rng)
    x = np.zeros((5, k), np.uint16)
    x[1] = 0x8000  # minus zero
    x[2] = bf16(rng.choice([-1.0, 1.0], k) * 2.0**100)
    x[3] = rng.integers(0, 128, k)  # subnormal
    x[4] = bf16(rng.choice([-1.0, 1.0], k) * 2.0**-99)
    out = linear(team, x, matrix, fine=fine)
    assert (out[[0, 1, 3]] == 0).all()
    ordinary = linear(team, bf16(np.sign(widen(x[[2, 4]]))), matrix, fine=fine).astype(np.float64)
    assert np.allclose(out[2], ordinary[0] * 2.0**100, rtol=1e-5, atol=2.0**100 * 1e-3)
    assert np.allclose(out[4], ordinary[1] * 2.0**-99, rtol=1e-5, atol=2.0**-99 * 1e-3)


@pytest.mark.parametrize(("kind", "fine"), PRODUCTS)
def test_long_rows_that_fill_the_scratch(team: cpu.Team, kind: str, fine: bool) -> None:
    rng = np.random.default_rng(11)
    k, rows = 65536, 70
    matrix = random_matrix(kind, 16, k, rng)
    x = bf16(rng.standard_normal((rows, k)))
    together = linear(team, x, matrix, fine=fine)
    alone = np.concatenate([linear(team, x[i : i + 1], matrix, fine=fine) for i in (0, 40, 69)])
    assert np.array_equal(together[[0, 40, 69]], alone)


def test_parts_of_different_kinds_side_by_side(team: cpu.Team) -> None:
    """As q and k in one kind and v in another: operators that write columns of one buffer."""
    rng = np.random.default_rng(12)
    k, rows = 256, 7
    parts = [random_matrix("q4_k", 48, k, rng), random_matrix("q6_k", 20, k, rng), random_matrix("int8", 33, k, rng)]
    x = bf16(rng.standard_normal((rows, k)))
    width = sum(part.n for part in parts)
    out = np.full((rows, width), np.nan, np.float32)
    ops, at = [], 0
    for part in parts:
        to, w = out.ctypes.data + 4 * at, part.packed.ctypes.data
        ops.append(
            cpu.Op(kind=cpu.LINEAR, out=to, x=x.ctypes.data, w=w, n=part.n, k=k, stride=width, i=(cpu.WEIGHT_KINDS[part.kind],))
        )
        at += part.n
    team.run((cpu.Op * len(ops))(*ops), cpu.Step(tokens=rows))
    assert np.array_equal(out, np.concatenate([linear(team, x, part) for part in parts], axis=1))


def test_bfloat16_with_rows_apart(team: cpu.Team) -> None:
    rng = np.random.default_rng(13)
    n, k = 37, 66
    w = bf16(rng.standard_normal((n, k)))
    matrix = Matrix.__new__(Matrix)
    matrix.kind, matrix.n, matrix.k = "bfloat16", n, k
    matrix.packed = aligned(cpu.packed_bytes("bfloat16", n, k))
    cpu.pack("bfloat16", matrix.packed.ctypes.data, w.ctypes.data, n, k)
    for rows in (1, 5, 40):
        x = bf16(rng.standard_normal((rows, k)))
        assert np.array_equal(linear(team, x, matrix, stride=50), linear(team, x, matrix))
