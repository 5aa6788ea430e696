"""DistFlow: what is copied where, between processes and layouts, and every way in which a transfer ends."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.devices.kv_pool import KVPool
from engine.distflow import Completion, DistFlow, Spans, block_spans, check_exchange, slices
from engine.native import checksum
from engine.types import KVLayout, Memory, Peer, UserError

MIB = 1 << 20
OWN, OTHER, THIRD = 1, 2, 3
TOKENS = 16  # of a unit


def panels(heads: int = 3, blocks: int = 12, layers: int = 4, run: int = 64) -> KVLayout:
    """As the compiled cpu device has it: a unit's layers side by side; blocks of two units."""
    each = heads * 2 * run
    return KVLayout("panels", layers, each, 2, each // 2, 2 * blocks, layers * each, TOKENS, heads, run)


def rows(blocks: int = 12, layers: int = 4, run: int = 192) -> KVLayout:
    """As the reference has it: layer by layer, keys and values apart."""
    return KVLayout("rows", layers, 2 * blocks * run, 2, blocks * run, blocks, run, 2 * TOKENS, 1, run)


LAYOUTS = {"panels": panels, "rows": rows}


def size(layout: KVLayout) -> int:
    return layout.units * layout.layers * layout.parts * layout.heads * layout.head_bytes


def spans(te: int, *runs: tuple[int, int]) -> Spans:
    offsets, lengths = np.array(runs, np.int64).reshape(-1, 2).T
    return Spans(te, offsets, lengths)


def blocks_of(te: int, layout: KVLayout, blocks: Any, **which: Any) -> Spans:
    return Spans(te, *block_spans(layout, 2 * TOKENS, blocks, **which))


def cells(memory: Any, layout: KVLayout) -> np.ndarray:
    """A pool as [unit, layer, part, head, byte], by the layout's definition alone."""
    strides = (layout.unit_stride, layout.layer_stride, layout.part_stride, layout.head_bytes, 1)
    shape = (layout.units, layout.layers, layout.parts, layout.heads, layout.head_bytes)
    return np.lib.stride_tricks.as_strided(np.frombuffer(memory, np.uint8), shape, strides)


def noise(memory: Any, seed: int) -> np.ndarray:
    view = np.frombuffer(memory, np.uint8)
    view[:] = np.random.default_rng(seed).integers(0, 256, len(view), np.uint8)
    return view


def peer_of(te: int, pool: KVPool, layout: KVLayout | None = None) -> Peer:
    return Peer(te, pool.memory, layout or panels(), 2 * TOKENS)


@contextlib.contextmanager
def flow(pool: KVPool | None, *peers: Peer) -> Iterator[DistFlow]:
    with contextlib.closing(DistFlow(pool.view if pool else None, OWN)) as made:
        made.link_cluster(peers)
        yield made


def finished(completion: Completion) -> Completion:
    assert completion.wait(30)
    return completion


class Other:
    """Another process that holds a pool, filled by `noise(seed)`."""

    def __init__(self, te: int, layout: KVLayout, nbytes: int, seed: int):
        ours, theirs = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(theirs[1])
                pool = KVPool(nbytes)
                noise(pool.view, seed)
                os.write(ours[1], msgspec.msgpack.encode(pool.memory))
                while os.read(theirs[0], 1):
                    os.write(ours[1], checksum(pool.view).to_bytes(8, "little"))
            finally:
                os._exit(0)
        os.close(ours[1])
        os.close(theirs[0])
        self._answers, self._questions = ours[0], theirs[1]
        self.peer = Peer(te, msgspec.msgpack.decode(os.read(ours[0], 1000), type=Memory), layout, 2 * TOKENS)

    def checksum(self) -> int:
        """Of its pool, as it sees it."""
        os.write(self._questions, b"?")
        return int.from_bytes(os.read(self._answers, 8), "little")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        os.close(self._questions)
        os.close(self._answers)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def other(te: int = OTHER, layout: KVLayout | None = None, nbytes: int = 2 * MIB, seed: int = 2) -> Iterator[Other]:
    process = Other(te, layout or panels(), nbytes, seed)
    try:
        yield process
    finally:
        process.close()


# ---- what is copied ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("layers", [None, range(1), range(2, 4)])
def test_blocks_to_and_from_another_process(name, layers):
    """Random tables both ways, pools of different numbers of blocks; what the other process sees is what an oracle says."""
    rng = np.random.default_rng(7)
    mine, theirs = LAYOUTS[name](blocks=12), LAYOUTS[name](blocks=20)
    units = 2 if name == "panels" else 1
    with other(layout=theirs, nbytes=size(theirs)) as process:
        pool = KVPool(size(mine))
        own = noise(pool.view, 1).copy()
        far = noise(bytearray(size(theirs)), 2)
        with flow(pool, process.peer) as distflow:
            for push in (True, False, True):
                here, there = rng.permutation(12)[:7], rng.permutation(20)[:7]
                local, remote = blocks_of(OWN, mine, here, layers=layers), blocks_of(OTHER, theirs, there, layers=layers)
                src, dst = (local, remote) if push else (remote, local)
                completion = finished(distflow.transfer(src, dst))
                assert completion.error is None and completion.nbytes == src.nbytes > 0
                a, b = cells(own, mine), cells(far, theirs)
                which = slice(None) if layers is None else slice(layers.start, layers.stop)
                for i, j in zip(here, there, strict=True):
                    x, y = (np.s_[k * units : (k + 1) * units, which] for k in (i, j))
                    if push:
                        b[y] = a[x]
                    else:
                        a[x] = b[y]
        assert bytes(own) == bytes(pool.view)
        assert process.checksum() == checksum(far)


def test_between_two_peers_and_within_one_memory():
    """A TE with no memory of its own may copy between others, and a TE between its own blocks."""
    with other(OTHER, seed=2) as second, other(THIRD, seed=3) as third, flow(None, second.peer, third.peer) as distflow:
        finished(distflow.transfer(spans(OTHER, (100, 50)), spans(THIRD, (7, 50))))
        expected = noise(bytearray(2 * MIB), 3)
        expected[7:57] = noise(bytearray(2 * MIB), 2)[100:150]
        assert third.checksum() == checksum(expected)
    pool = KVPool(2 * MIB)
    noise(pool.view, 1)
    before = bytes(pool.view)
    with flow(pool) as distflow:
        finished(distflow.transfer(spans(OWN, (0, 1000)), spans(OWN, (10, 1000))))  # also where they overlap
    assert bytes(pool.view[10:1010]) == before[:1000]


def test_a_pool_whose_lender_is_gone_is_no_lack_of_memory():
    """A worker of a semi pair is brought up again after that, but not where the settings are wrong."""
    with pytest.raises(UserError, match="is gone") as raised:
        KVPool(2 * MIB, Memory(1 << 22, 3, 1, 2 * MIB))
    assert raised.value.param is None


@pytest.mark.parametrize(("source_ranks", "target_ranks"), [(1, 3), (3, 1), (2, 3), (3, 2), (1, 2), (2, 2)])
def test_re_slicing_between_ranks(source_ranks, target_ranks):
    """Six heads, split among ranks with a pool each, end up where another number of ranks has them."""
    heads = 6
    whole = noise(bytearray(size(panels(heads))), 9)
    blocks, landed = [5, 0, 11], [2, 3, 7]
    layouts = {n: panels(heads // n) for n in (source_ranks, target_ranks)}
    sources = [KVPool(size(layouts[source_ranks])) for _ in range(source_ranks)]
    targets = [KVPool(size(layouts[target_ranks])) for _ in range(target_ranks)]
    for rank, pool in enumerate(sources):
        each = heads // source_ranks
        cells(pool.view, layouts[source_ranks])[:] = cells(whole, panels(heads))[:, :, :, rank * each : (rank + 1) * each]
    check_exchange(layouts[source_ranks], layouts[target_ranks])
    peers = [peer_of(10 + rank, pool) for rank, pool in enumerate(sources)]
    peers += [peer_of(20 + rank, pool) for rank, pool in enumerate(targets)]
    with flow(None, *peers) as distflow:
        moves = [
            distflow.transfer(
                blocks_of(10 + piece.source_rank, layouts[source_ranks], blocks, heads=piece.source),
                blocks_of(20 + piece.target_rank, layouts[target_ranks], landed, heads=piece.target),
            )
            for piece in slices(heads, source_ranks, target_ranks)
        ]
        assert [finished(move).error for move in moves] == [None] * len(moves)
    found = np.concatenate([cells(pool.view, layouts[target_ranks]) for pool in targets], axis=3)
    for i, j in zip(blocks, landed, strict=True):
        assert (found[2 * j : 2 * j + 2] == cells(whole, panels(heads))[2 * i : 2 * i + 2]).all()
    untouched = [unit for unit in range(24) if unit // 2 not in landed]
    assert not found[untouched].any()


def test_slices_cover_every_head_once():
    assert [tuple(s) for s in slices(6, 2, 3)] == [
        (0, range(0, 2), 0, range(0, 2)),
        (0, range(2, 3), 1, range(0, 1)),
        (1, range(0, 1), 1, range(1, 2)),
        (1, range(1, 3), 2, range(0, 2)),
    ]
    with pytest.raises(ValueError, match="6 heads can't be split among 4"):
        list(slices(6, 4, 1))


@st.composite
def cut(draw, total: int) -> list[int]:
    """Lengths, some of them 0, of `total` bytes."""
    ends = sorted(draw(st.lists(st.integers(0, total), max_size=8)))
    return np.diff([0, *ends, total]).tolist()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_spans_cut_differently(shared_flow, data):
    distflow, view = shared_flow
    total = data.draw(st.integers(0, 5000))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    noise(view, 4)

    def lay(te: int, lengths: list[int], base: int) -> tuple[Spans, np.ndarray]:
        """Spans in shuffled places with gaps, and the address of each byte in order."""
        order = rng.permutation(len(lengths))
        offsets = np.zeros(len(lengths), np.int64)
        at = base
        for i in order:
            at += int(rng.integers(0, 20))
            offsets[i] = at
            at += lengths[i]
        where = [offsets[i] + np.arange(n) for i, n in enumerate(lengths)]
        return Spans(te, offsets, np.array(lengths, np.int64)), np.concatenate(where).astype(int)

    src, read = lay(OWN, data.draw(cut(total)), 0)
    dst, written = lay(OWN, data.draw(cut(total)), MIB)
    expected = np.frombuffer(view, np.uint8).copy()
    expected[written] = expected[read]
    completion = finished(distflow.transfer(src, dst))
    assert completion.error is None and completion.nbytes == total
    assert (np.frombuffer(view, np.uint8) == expected).all()


@pytest.fixture(scope="module")
def shared_flow():
    pool = KVPool(2 * MIB)
    with flow(pool) as distflow:
        yield distflow, pool.view


def test_neighbours_are_one_span():
    offsets, lengths = block_spans(panels(), 2 * TOKENS, [3, 4, 5, 9])
    block = 2 * panels().unit_stride
    assert offsets.tolist() == [3 * block, 9 * block] and lengths.tolist() == [3 * block, block]
    offsets, lengths = block_spans(panels(), 2 * TOKENS, [3], layers=range(1, 2))
    assert lengths.tolist() == [panels().layer_stride] * 2, "keys and values of a unit's layer side by side"
    offsets, lengths = block_spans(rows(), 2 * TOKENS, [3, 4], layers=range(1, 2))
    assert lengths.tolist() == [2 * 192] * 2
    assert [len(a) for a in block_spans(panels(), 2 * TOKENS, [])] == [0, 0]


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("src", "dst", "why"),
    [
        ([(0, 10)], [(0, 11)], "10 bytes"),
        ([(0, 10)], [], "10 bytes"),
        ([(-1, 10)], [(0, 10)], "negative"),
        ([(0, -10), (0, 20)], [(0, 10)], "negative"),
        ([(2 * MIB - 9, 10)], [(0, 10)], "outside"),
        ([(0, 10)], [(2 * MIB - 9, 10)], "outside"),
        ([(2**63 - 1, 10)], [(0, 10)], "outside"),
        ([(0, 2**62)], [(0, 2**62)], "outside"),
        ([(0, 10), (2**62, 10)], [(0, 20)], "outside"),
    ],
)
def test_spans_that_do_not_fit(shared_flow, src, dst, why):
    distflow, view = shared_flow
    before = checksum(view)
    with pytest.raises(ValueError, match=why):
        distflow.transfer(spans(OWN, *src), spans(OWN, *dst))
    assert checksum(view) == before


def test_spans_of_unequal_columns(shared_flow):
    distflow, _ = shared_flow
    with pytest.raises(ValueError, match=r"\(2,\) offsets and \(1,\) lengths"):
        distflow.transfer(Spans(OWN, np.array([0, 1]), np.array([1])), spans(OWN, (0, 1)))


def test_read_only_memory_is_not_written(shared_flow):
    with contextlib.closing(DistFlow(memoryview(b"x" * 100), OWN)) as distflow, pytest.raises(ValueError, match="read-only"):
        distflow.transfer(spans(OWN, (0, 1)), spans(OWN, (1, 1)))


@pytest.mark.parametrize(
    ("which", "why"),
    [
        ({"blocks": [0, 12]}, "blocks 0 to 12"),
        ({"blocks": [-1]}, "a pool that has 12"),
        ({"blocks": [0], "layers": range(4, 5)}, "layers"),
        ({"blocks": [0], "heads": range(2, 4)}, "heads"),
    ],
)
def test_blocks_that_a_pool_does_not_have(which, why):
    with pytest.raises(ValueError, match=why):
        block_spans(panels(), 2 * TOKENS, **which)


def test_layouts_that_can_not_exchange():
    check_exchange(panels(3), panels(1, blocks=5))
    for changed in ({"format": "int8"}, {"layers": 5}, {"head_bytes": 128}, {"unit_tokens": 8}):
        with pytest.raises(UserError, match=next(iter(changed))):
            check_exchange(panels(), msgspec.structs.replace(panels(), **changed))
    with pytest.raises(UserError, match="nested"):
        check_exchange(msgspec.structs.replace(panels(), layer_stride=1 << 30), panels())


# ---- links -------------------------------------------------------------------------------------------------------------


def test_memory_that_is_not_what_was_told():
    pool = KVPool(2 * MIB)
    wrong = msgspec.structs.replace(pool.memory, inode=pool.memory.inode + 1)
    with contextlib.closing(DistFlow(None, OWN)) as distflow:
        for memory in (wrong, msgspec.structs.replace(pool.memory, nbytes=4 * MIB)):
            with pytest.raises(UserError, match="TE 2"):
                distflow.link_cluster([Peer(OTHER, memory, panels(), 2 * TOKENS)])
        fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 2 * MIB)
        unsealed = Memory(os.getpid(), fd, os.fstat(fd).st_ino, 2 * MIB)
        with pytest.raises(UserError, match="F_SEAL_SHRINK"):
            distflow.link_cluster([peer_of(THIRD, pool), Peer(OTHER, unsealed, panels(), 2 * TOKENS)])
        os.close(fd)
        with pytest.raises(KeyError):
            distflow.peer(THIRD)  # all or none
        with pytest.raises(ValueError, match="itself"):
            distflow.link_cluster([peer_of(OWN, pool)])


def test_a_process_that_is_gone_can_not_be_linked():
    with other() as process:
        pass
    with contextlib.closing(DistFlow(None, OWN)) as distflow, pytest.raises(UserError, match="TE 2"):
        distflow.link_cluster([process.peer])


def test_a_peer_that_dies_is_an_error_and_its_memory_stays_mapped():
    pool = KVPool(2 * MIB)
    with other() as process, flow(pool, process.peer) as distflow:
        died = threading.Event()

        def die() -> None:
            process.kill()
            died.set()

        dies = distflow.transfer(spans(OWN, (0, MIB)), spans(OTHER, (0, MIB)), after=die)
        later = distflow.transfer(spans(OTHER, (0, MIB)), spans(OWN, (0, MIB)))
        for completion in (dies, later):
            assert finished(completion).error == "TE 2 has ended" and not completion.cancelled
        assert died.is_set()


def test_a_te_comes_back_with_other_memory():
    pool = KVPool(2 * MIB)
    with other(seed=2) as first, other(seed=3) as again, flow(pool, first.peer) as distflow:
        gate = threading.Event()
        old = distflow.transfer(spans(OTHER, (0, 9)), spans(OWN, (0, 9)), after=lambda: assert_set(gate))
        distflow.link_cluster([first.peer])  # known already: nothing happens
        distflow.link_cluster([again.peer])
        gate.set()
        assert finished(old).error == "TE 2 was unlinked"
        assert distflow.peer(OTHER) == again.peer
        assert finished(distflow.transfer(spans(OTHER, (0, 9)), spans(OWN, (0, 9)))).error is None
        assert bytes(pool.view[:9]) == bytes(noise(bytearray(2 * MIB), 3)[:9])
        distflow.unlink(OTHER)
        distflow.unlink(OTHER)
        assert finished(distflow.transfer(spans(OTHER, (0, 9)), spans(OWN, (0, 9)))).error == "TE 2 is not linked"


def test_nothing_stays_open():
    pool = KVPool(2 * MIB)
    open_now = len(os.listdir("/proc/self/fd"))
    mapped_now = Path("/proc/self/maps").read_text().count("deepserve-kv")
    for _ in range(3):
        with other() as process, flow(pool, process.peer) as distflow:
            finished(distflow.transfer(spans(OTHER, (0, 9)), spans(OWN, (0, 9))))
    assert len(os.listdir("/proc/self/fd")) == open_now
    assert Path("/proc/self/maps").read_text().count("deepserve-kv") == mapped_now


# ---- ends --------------------------------------------------------------------------------------------------------------


def assert_set(event: threading.Event) -> None:
    assert event.wait(30)


@pytest.fixture
def stuck() -> Iterator[tuple[DistFlow, threading.Event, Completion]]:
    """A DistFlow whose thread is in the gate of a first transfer until the event is set."""
    pool, gate, inside = KVPool(8 * MIB), threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert_set(gate)

    with flow(pool) as distflow:
        first = distflow.transfer(spans(OWN, (0, MIB)), spans(OWN, (MIB, MIB)), after=wait)
        assert_set(inside)
        yield distflow, gate, first
        gate.set()


def test_in_order_on_one_thread(stuck):
    distflow, gate, first = stuck
    ended: list[tuple[int, str]] = []
    gates: list[int] = []
    completions = [
        distflow.transfer(
            spans(OWN, (0, 8)),
            spans(OWN, (MIB, 8)),
            after=lambda i=i: gates.append(i),
            on_done=lambda c, i=i: ended.append((i, threading.current_thread().name, c.done())),
        )
        for i in range(5)
    ]
    assert not any(c.done() for c in [first, *completions]) and not completions[-1].wait(0)
    gate.set()
    for completion in completions:
        finished(completion)
    distflow.close()
    assert gates == list(range(5)) and ended == [(i, "distflow", True) for i in range(5)]


def test_cancelled_before_it_begins(stuck):
    distflow, gate, first = stuck
    waiting = distflow.transfer(spans(OWN, (0, 8)), spans(OWN, (MIB, 8)), after=lambda: pytest.fail("its gate was asked"))
    waiting.cancel()
    first.cancel()  # while its gate waits
    gate.set()
    for completion in (first, waiting):
        assert finished(completion).cancelled and completion.error == "cancelled" and completion.nbytes == 0
    after = finished(distflow.transfer(spans(OWN, (0, 8)), spans(OWN, (MIB, 8))))
    assert after.error is None
    after.cancel()  # too late: it was through
    assert not after.cancelled and after.error is None


def test_stopped_in_the_middle():
    """`unlink`, `cancel` and `close` while the native copy runs: a part is copied, and nothing more after it is done."""
    runs = 40_000  # of the same MiB: as many as would take long
    src, dst = (Spans(te, np.zeros(runs, np.int64), np.full(runs, MIB)) for te in (OTHER, OWN))
    pool = KVPool(2 * MIB)
    ways = {
        "cancelled": lambda d, c: c.cancel(),
        "TE 2 was unlinked": lambda d, c: d.unlink(OTHER),
        "DistFlow was closed": lambda d, c: d.close(),
    }
    for error, stop in ways.items():
        with other() as process, flow(pool, process.peer) as distflow:
            pool.view[:8] = bytes(8)
            completion = distflow.transfer(src, dst)
            while bytes(pool.view[:8]) == bytes(8):  # the copy has begun
                assert not completion.wait(0.001)
            stop(distflow, completion)
            assert finished(completion).error == error
            assert 0 < completion.nbytes < runs * MIB and completion.seconds > 0


def test_timeouts(stuck):
    """In the queue, in the gate, and in the copy itself."""
    distflow, gate, first = stuck
    queued = distflow.transfer(spans(OWN, (0, 8)), spans(OWN, (MIB, 8)), timeout=0)
    gate.set()
    assert finished(first).error is None
    assert finished(queued).error == "timed out" and queued.nbytes == 0
    runs = 40_000
    src, dst = (Spans(OWN, np.full(runs, at), np.full(runs, MIB)) for at in (0, MIB))
    copying = distflow.transfer(src, dst, timeout=0.05)
    assert finished(copying).error == "timed out" and copying.nbytes < runs * MIB
    assert finished(distflow.transfer(spans(OWN, (0, 8)), spans(OWN, (MIB, 8)), timeout=1e6)).error is None


def test_a_gate_that_raises(stuck):
    distflow, gate, _ = stuck

    def fail() -> None:
        raise RuntimeError("layer 7 was never computed")

    failed = distflow.transfer(spans(OWN, (0, 8)), spans(OWN, (MIB, 8)), after=fail)
    good = distflow.transfer(spans(OWN, (0, 8)), spans(OWN, (MIB, 8)))
    gate.set()
    assert "layer 7 was never computed" in str(finished(failed).error) and failed.nbytes == 0
    assert finished(good).error is None


def test_on_done_that_raises_is_logged_and_ends_nothing_else(stuck, caplog):
    distflow, gate, _ = stuck
    bad = distflow.transfer(spans(OWN, (0, 8)), spans(OWN, (MIB, 8)), on_done=lambda c: 1 // 0)
    good = distflow.transfer(spans(OWN, (0, 8)), spans(OWN, (MIB, 8)))
    gate.set()
    assert finished(bad).error is None and finished(good).error is None
    assert "ZeroDivisionError" in caplog.text


def test_closed(stuck):
    distflow, gate, first = stuck
    waiting = distflow.transfer(spans(OWN, (0, 8)), spans(OWN, (MIB, 8)))
    closing = threading.Thread(target=distflow.close)
    closing.start()
    while not first.stop[0]:  # `close` has come so far
        closing.join(0.001)
    gate.set()
    closing.join()
    assert first.error == waiting.error == "DistFlow was closed"
    distflow.close()
    with pytest.raises(RuntimeError, match="closed"):
        distflow.transfer(spans(OWN, (0, 8)), spans(OWN, (MIB, 8)))


def test_no_thread_before_the_first_transfer():
    before = threading.active_count()
    with flow(KVPool(2 * MIB)) as distflow:
        assert threading.active_count() == before
        finished(distflow.transfer(spans(OWN), spans(OWN)))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
