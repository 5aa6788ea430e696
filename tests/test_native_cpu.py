"""The compiled CPU backend's library: its build, the packing of weights, the matrix kernel and the team of threads."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from ctypes import addressof
from pathlib import Path

import numpy as np
import pytest

from engine import native
from engine.native import cpu
from engine.types import UserError

ISAS = cpu.available()


def bf16(values: np.ndarray) -> np.ndarray:
    """uint16: float32 rounded to nearest even. No NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def aligned(count: int, dtype: type) -> np.ndarray:
    raw = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * np.dtype(dtype).itemsize].view(dtype)


def pack(bits: np.ndarray) -> np.ndarray:
    n, k = bits.shape
    bits = np.ascontiguousarray(bits)
    packed = aligned(cpu.packed_bytes("bfloat16", n, k) // 2, np.uint16)
    cpu.pack("bfloat16", packed.ctypes.data, bits.ctypes.data, n, k)
    return packed


def linear_op(out: np.ndarray, x: np.ndarray, packed: np.ndarray, n: int, k: int, bias: np.ndarray | None = None) -> cpu.Op:
    return cpu.Op(
        kind=cpu.LINEAR,
        out=out.ctypes.data,
        x=x.ctypes.data,
        w=packed.ctypes.data,
        b=None if bias is None else bias.ctypes.data,
        n=n,
        k=k,
    )


def linear(team: cpu.Team, x: np.ndarray, packed: np.ndarray, n: int, bias: np.ndarray | None = None) -> np.ndarray:
    """One operator over rows `x` (bf16 bits). Memory around the output, and the output before, are poisoned."""
    rows, k = x.shape
    guarded = np.full(rows * n + 128, np.nan, np.float32)
    guarded[:64] = guarded[-64:] = 1234.5
    out = guarded[64:-64]
    x = np.ascontiguousarray(x)
    team.run((cpu.Op * 1)(linear_op(out, x, packed, n, k, bias)), cpu.Step(tokens=rows))
    assert (guarded[:64] == 1234.5).all() and (guarded[-64:] == 1234.5).all()
    return out.reshape(rows, n)


@pytest.fixture(params=ISAS)
def team(request: pytest.FixtureRequest) -> Iterator[cpu.Team]:
    team = cpu.Team(2, isa=request.param)
    yield team
    team.close()


# ---- building and choosing -------------------------------------------------------------------------------------------


def test_portable_is_always_there_and_last() -> None:
    assert ISAS[-1] == "portable"
    assert set(ISAS) <= set(cpu.ISA_FLAGS)


def test_the_best_is_chosen_unless_the_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSERVE_CPU_ISA", raising=False)
    assert cpu.choose() == ISAS[0]
    monkeypatch.setenv("DEEPSERVE_CPU_ISA", "portable")
    assert cpu.choose() == "portable"


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSERVE_CPU_ISA", "sse9")
    with pytest.raises(UserError, match=r"DEEPSERVE_CPU_ISA=sse9: there is no such instruction set; use one of .*portable"):
        cpu.choose()
    monkeypatch.setattr(cpu, "available", lambda: ["portable"])
    monkeypatch.setenv("DEEPSERVE_CPU_ISA", "amx")
    with pytest.raises(UserError, match="this machine doesn't have it; use one of portable"):
        cpu.choose()


def test_no_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"no C\+\+ compiler .* apt install g\+\+"):
        cpu.build()


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no luck today >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native, "HERE", tmp_path)
    with pytest.raises(UserError, match="no luck today"):
        cpu.build()
    assert list((tmp_path / "build").iterdir()) == []


def test_structs_are_as_long_as_in_c() -> None:
    """The offsets that C gives cpu.h's structs on 64-bit machines."""
    assert (ctypes.sizeof(cpu.Op), cpu.Op.n.offset, cpu.Op.f.offset) == (112, 48, 104)
    assert (ctypes.sizeof(cpu.Step), cpu.Step.ids.offset, cpu.Step.cos_sin.offset) == (104, 24, 96)


# ---- packing ---------------------------------------------------------------------------------------------------------


def packed_by_hand(bits: np.ndarray) -> np.ndarray:
    n, k = bits.shape
    whole = np.zeros((-(-n // 16) * 16, -(-k // 2) * 2), np.uint16)
    whole[:n, :k] = bits
    return whole.reshape(-1, 16, whole.shape[1] // 2, 2).transpose(0, 2, 1, 3).reshape(-1)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 2), (16, 32), (17, 33), (48, 576), (5, 31), (100, 70)])
def test_pack(n: int, k: int) -> None:
    rng = np.random.default_rng(n * 1000 + k)
    bits = rng.integers(0, 1 << 16, (n, k), dtype=np.uint16)
    assert pack(bits).size * 2 == cpu.packed_bytes("bfloat16", n, k)
    assert np.array_equal(pack(bits), packed_by_hand(bits))


def test_pack_rounds_float32_to_nearest_even() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((33, 45)).astype(np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF800000, 0x00000001, 0x80008000], np.uint32).view(np.float32)
    values[0, :6] = ties
    packed = np.full(cpu.packed_bytes("bfloat16", 33, 45) // 2, 0xFFFF, np.uint16)
    cpu.pack("bfloat16", packed.ctypes.data, values.ctypes.data, 33, 45, is_float=True)
    assert np.array_equal(packed, packed_by_hand(bf16(values)))


def test_pack_keeps_nan() -> None:
    values = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)  # signalling; all ones
    packed = np.zeros(cpu.packed_bytes("bfloat16", 1, 2) // 2, np.uint16)
    cpu.pack("bfloat16", packed.ctypes.data, values.ctypes.data, 1, 2, is_float=True)
    assert np.isnan(widen(packed[:2])).all()


def test_pack_by_ranges_and_from_an_odd_address() -> None:
    rng = np.random.default_rng(2)
    n, k = 40, 21
    bits = rng.integers(0, 1 << 16, (n, k), dtype=np.uint16)
    moved = np.frombuffer(b"x" + bits.tobytes(), np.uint8)  # as inside a file
    packed = np.full(cpu.packed_bytes("bfloat16", n, k) // 2, 0xFFFF, np.uint16)
    for first, last in ((32, 40), (0, 16), (16, 32)):
        cpu.pack("bfloat16", packed.ctypes.data, moved.ctypes.data + 1, n, k, first=first, last=last)
    assert np.array_equal(packed, packed_by_hand(bits))


# ---- the matrix kernel -----------------------------------------------------------------------------------------------

SHAPES = [(1, 1), (16, 2), (15, 3), (64, 32), (65, 33), (100, 31), (200, 96), (33, 130), (16 * 9, 62), (7, 577)]
ROWS = [1, 2, 3, 5, 6, 7, 15, 16, 17, 31, 33, 48, 70]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_against_float64(team: cpu.Team, n: int, k: int) -> None:
    rng = np.random.default_rng(n * 1000 + k)
    w = bf16(rng.standard_normal((n, k)))
    packed = pack(w)
    for rows in ROWS:
        x = bf16(rng.standard_normal((rows, k)))
        bias = rng.standard_normal(n).astype(np.float32) if rows % 2 else None
        exact = widen(x).astype(np.float64) @ widen(w).astype(np.float64).T
        size = np.abs(widen(x)).astype(np.float64) @ np.abs(widen(w)).astype(np.float64).T
        if bias is not None:
            exact += bias
            size += np.abs(bias)
        out = linear(team, x, packed, n, bias)
        # Every float32 addition may be off by half a last place of what has been summed so far.
        assert (np.abs(out - exact) <= size * (k + 2) * 2.0**-24).all(), f"{rows} rows"


def test_a_row_does_not_depend_on_its_batch(team: cpu.Team) -> None:
    rng = np.random.default_rng(3)
    for n, k in ((208, 96), (75, 131)):
        packed = pack(bf16(rng.standard_normal((n, k))))
        bias = rng.standard_normal(n).astype(np.float32)
        x = bf16(rng.standard_normal((230, k)))
        alone = np.concatenate([linear(team, x[i : i + 1], packed, n, bias) for i in range(len(x))])
        for rows in (*range(2, 40), 64, 95, 96, 97, 112, 113, 192, 193, 230):
            first = int(rng.integers(0, len(x) - rows + 1))
            together = linear(team, x[first : first + rows], packed, n, bias)
            assert np.array_equal(together.view(np.uint32), alone[first : first + rows].view(np.uint32)), f"{rows} rows"


def test_the_number_of_threads_does_not_show(team: cpu.Team) -> None:
    rng = np.random.default_rng(4)
    n, k = 1000, 64
    packed = pack(bf16(rng.standard_normal((n, k))))
    single = cpu.Team(1, isa=team.isa)
    for rows in (1, 9, 130):
        x = bf16(rng.standard_normal((rows, k)))
        assert np.array_equal(linear(team, x, packed, n), linear(single, x, packed, n))
    single.close()


def test_what_lies_beside_a_row_is_not_read_into_it(team: cpu.Team) -> None:
    """With an odd K, the pair that holds a row's last value must not take the next row's first: 0 x NaN is NaN."""
    rng = np.random.default_rng(5)
    for k in (3, 31, 33, 65):
        packed = pack(bf16(rng.standard_normal((20, k))))
        x = bf16(rng.standard_normal((40, k)))
        clean = linear(team, x[::2], packed, 20)
        x[1::2] = 0x7FC0  # NaN
        assert np.array_equal(linear(team, x, packed, 20)[::2], clean)


def test_infinite_weights_stay_in_their_row(team: cpu.Team) -> None:
    """Blocks lie one after another: where K is no multiple of a tile, the next block's weights are not taken."""
    rng = np.random.default_rng(6)
    w = bf16(rng.standard_normal((64, 34)))
    w[16:] = 0x7F80
    for rows in (1, 20):
        x = bf16(np.abs(rng.standard_normal((rows, 34))))
        out = linear(team, x, pack(w), 64)
        assert np.isfinite(out[:, :16]).all() and np.isinf(out[:, 16:]).all()


def test_wide_rows_that_fill_the_scratch(team: cpu.Team) -> None:
    """K so long that fewer rows fit a panel than it would have; this is the longest there may be."""
    rng = np.random.default_rng(7)
    k, rows = 65536, 70
    w, x = bf16(rng.standard_normal((16, k))), bf16(rng.standard_normal((rows, k)))
    packed = pack(w)
    together = linear(team, x, packed, 16)
    assert np.array_equal(together[[0, 40, 69]], np.concatenate([linear(team, x[i : i + 1], packed, 16) for i in (0, 40, 69)]))
    assert np.allclose(together, widen(x) @ widen(w).T, rtol=0, atol=0.2)


def test_sampled_rows_and_no_rows(team: cpu.Team) -> None:
    x = bf16(np.ones((8, 4), np.float32))
    packed = pack(bf16(np.ones((5, 4), np.float32)))
    out = np.full((8, 5), np.nan, np.float32)
    op = linear_op(out, x, packed, 5, 4)
    op.sampled = 1
    team.run((cpu.Op * 1)(op), cpu.Step(tokens=8, sampled=0))
    assert np.isnan(out).all()
    team.run((cpu.Op * 1)(op), cpu.Step(tokens=8, sampled=3))
    assert (out[:3] == 4).all() and np.isnan(out[3:]).all()


# ---- the team --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_operators_run_in_order_thousands_of_times(threads: int) -> None:
    """Each of 40 operators doubles what the one before has written, by way of a cast that the test does with shared memory:
    out of one is x of the next (float32 powers of two, read as bf16 pairs: the upper half is the number, the lower zero)."""
    team = cpu.Team(threads, isa="portable")
    count, n = 40, 32
    buffers = aligned((count + 1) * n, np.float32).reshape(count + 1, n)
    double = np.zeros((n, 2 * n), np.float32)
    double[np.arange(n), 2 * np.arange(n) + 1] = 2  # the odd half of each float is its upper one
    packed = pack(bf16(double))
    ops = (cpu.Op * count)()
    for i in range(count):
        ops[i] = linear_op(buffers[i + 1], buffers[i], packed, n, 2 * n)
    step = cpu.Step(tokens=1)
    for run in range(1000):
        buffers[0] = 2.0 ** (run % 7)
        buffers[1:] = 0
        team.run(ops, step)
        assert (buffers[count] == 2.0 ** (run % 7 + count)).all()
    team.close()


def test_launched_programs_wait_for_their_turn() -> None:
    """More than the queue holds, each starting from what the one before left; then out of order waits."""
    team = cpu.Team(2)
    n, many = 32, 40
    buffers = aligned((many + 1) * n, np.float32).reshape(many + 1, n)
    double = np.zeros((n, 2 * n), np.float32)
    double[np.arange(n), 2 * np.arange(n) + 1] = 2  # the odd half of each float is its upper one
    packed, step = pack(bf16(double)), cpu.Step(tokens=1)
    programs = [(cpu.Op * 1)(linear_op(buffers[i + 1], buffers[i], packed, n, 2 * n)) for i in range(many)]
    for _ in range(50):
        buffers[0], buffers[1:] = 1, 0
        tickets = [team.launch(program, step) for program in programs]
        team.wait(tickets[7])
        assert (buffers[8] == 2.0**8).all()
        team.wait(tickets[-1])
        team.wait(tickets[3])
        assert (buffers[many] == 2.0**many).all()
    team.close()


def test_no_wake_up_is_lost() -> None:
    """Runs at every distance from the moment at which idle threads go to sleep."""
    team = cpu.Team(3)
    x, packed = bf16(np.ones((1, 2), np.float32)), pack(bf16(np.ones((16, 2), np.float32)))
    out = np.zeros(16, np.float32)
    ops, step = (cpu.Op * 2)(*[linear_op(out, x, packed, 16, 2)] * 2), cpu.Step(tokens=1)
    done = threading.Event()

    def body() -> None:
        for i in range(3000):
            team.run(ops, step)
            stop = time.perf_counter_ns() + i % 100 * 1000
            while time.perf_counter_ns() < stop:
                pass
        done.set()

    threading.Thread(target=body, daemon=True).start()
    assert done.wait(60)
    team.close()


def test_an_idle_team_takes_no_processor_time() -> None:
    team = cpu.Team(4)
    x, packed = bf16(np.ones((1, 2), np.float32)), pack(bf16(np.ones((16, 2), np.float32)))
    out = np.zeros(16, np.float32)
    ops = (cpu.Op * 1)(linear_op(out, x, packed, 16, 2))
    team.run(ops, cpu.Step(tokens=1))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1  # spinning, three threads would take up to 0.9 s
    out[:] = 0
    team.run(ops, cpu.Step(tokens=1))
    assert (out == 2).all()
    team.close()


def test_threads_end_with_the_team() -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = threads()
    team = cpu.Team(4, cores=[min(os.sched_getaffinity(0))] * 4)
    assert threads() == before + 4
    team.close()
    team.close()
    assert threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        team.run((cpu.Op * 1)(), cpu.Step())


def test_two_teams_at_once() -> None:
    rng = np.random.default_rng(8)
    x, packed = bf16(rng.standard_normal((20, 64))), pack(bf16(rng.standard_normal((256, 64))))
    teams = [cpu.Team(2) for _ in range(2)]
    expected = linear(teams[0], x, packed, 256)
    same: list[bool] = []

    def body(team: cpu.Team) -> None:
        same.append(all(np.array_equal(linear(team, x, packed, 256), expected) for _ in range(200)))

    workers = [threading.Thread(target=body, args=(team,)) for team in teams]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert same == [True, True]
    for team in teams:
        team.close()


def test_a_forked_child_is_told_and_can_make_its_own() -> None:
    team = cpu.Team(2)
    x, packed = bf16(np.ones((1, 2), np.float32)), pack(bf16(np.ones((16, 2), np.float32)))
    out = np.zeros(16, np.float32)
    ops = (cpu.Op * 1)(linear_op(out, x, packed, 16, 2))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            try:
                team.run(ops, cpu.Step(tokens=1))
            except RuntimeError:
                code = 2
            team.close()  # lets go of the parent's without waiting for threads that aren't there
            own = cpu.Team(2)
            own.run(ops, cpu.Step(tokens=1))
            own.close()
            code = 0 if code == 2 and (out == 2).all() else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (out == 0).all()
    team.close()


def test_an_unknown_operator_runs_nothing() -> None:
    team = cpu.Team(2)
    with pytest.raises(ValueError, match="unknown kind"):
        team.run((cpu.Op * 1)(cpu.Op(kind=len(cpu.KINDS))), cpu.Step(tokens=1))
    with pytest.raises(ValueError, match="65536 columns"):
        team.run((cpu.Op * 1)(cpu.Op(kind=cpu.LINEAR, n=1, k=65537)), cpu.Step(tokens=1))
    team.close()


def test_addresses_are_those_of_the_structs() -> None:
    """What a recorder relies on: an element of an array of operators is changed in place."""
    ops = (cpu.Op * 2)()
    ops[1].n = 7
    assert addressof(ops[1]) == addressof(ops) + ctypes.sizeof(cpu.Op)
    assert ops[1].n == 7
