"""The TE's side of the slower tiers: its thread against a real pool behind a real socket, over memory that isn't a model's."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.rtc.pool import Dram, Files, Pool, geometry
from engine.rtc.ssd import file_name, fingerprint, scan
from engine.rtc.tiers import Access, Tiers, measured
from engine.rtc.wire import FILE, Event, Fetched, Found, Saved, ToPool
from engine.types import KVLayout, Memory, Peer, UserError

MODEL = fingerprint("a model")
# Two parts far apart and two units a block, so that a block is four runs of 64 bytes.
LAYOUT = KVLayout("rows-float32-4", 1, 0, 2, 4096, 32, 64, 8, 4, 16)
BLOCK, BLOCKS, TOKENS = 256, 16, 16
HERE = Peer(0, Memory(0, 0, 0, 8192), LAYOUT, TOKENS)
KEYS = [bytes([n]) * 16 for n in range(BLOCKS)]


class Host:
    """A keeper's end, on a thread, and the TEs' ends."""

    def __init__(self, slots: int = 0, folder: Path | None = None, file_bytes: int = 1 << 20):
        self.fd, self.slots, self.folder = -1, slots, folder
        dram = None
        if slots:
            _, nbytes = geometry(slots, BLOCK)
            self.fd = os.memfd_create("pool")
            os.ftruncate(self.fd, nbytes)
            dram = Dram(slots, lambda slot, generation: os.pwrite(self.fd, struct.pack("<Q", generation), slot * 8))
        files = Files(file_bytes, scan(folder)) if folder is not None else None
        self.pool = Pool(dram, BLOCK, files, lambda key: file_name(MODEL, key))
        self.lock = threading.Lock()
        self.now = 0.0
        self.ends: list[socket.socket] = []
        self.tes: list[TE] = []

    def serve(self, te: int, ours: socket.socket) -> None:
        decoder = msgspec.msgpack.Decoder(ToPool)
        with contextlib.suppress(OSError):
            while data := ours.recv(1 << 18):
                with self.lock:
                    self.now += 1.0
                    answer = self.pool.answer(te, decoder.decode(data), self.now)
                    self.pool.check()
                if answer is not None:
                    ours.send(msgspec.msgpack.encode(answer))
        with self.lock:
            self.pool.leave(te, self.now)

    def te(self) -> TE:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pool = os.dup(self.fd) if self.fd >= 0 else -1
        folder = str(self.folder) if self.folder is not None else ""
        access = Access(theirs.detach(), MODEL, pool, self.slots, BLOCK, folder)
        thread = threading.Thread(target=self.serve, args=(len(self.ends), ours))
        thread.start()
        self.ends.append(ours)
        self.tes.append(TE(access, thread))
        return self.tes[-1]

    def die(self) -> None:
        for end in self.ends:
            end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for te in self.tes:
            te.close()
        for end in self.ends:
            end.close()
        if self.fd >= 0:
            os.close(self.fd)


class TE:
    """A step loop's side of `Tiers`."""

    def __init__(self, access: Access, thread: threading.Thread):
        self.memory = np.random.default_rng(0).integers(0, 256, 8192, np.uint8)
        self.told = threading.Semaphore(0)
        self.tiers = Tiers(access, self.memory.data, HERE, self.told.release)
        self.thread = thread
        self.closed = False

    def until(self, kind: type[Event], enough: Callable[[list[Event]], bool] = bool) -> list[Event]:
        """Events up to enough of a kind."""
        events: list[Event] = []
        while not enough([e for e in events if isinstance(e, kind)]):
            assert self.told.acquire(timeout=10), f"no {kind.__name__}; there were {events}"
            events += self.tiers.take()
        return [e for e in events if isinstance(e, kind)]

    def block(self, number: int) -> bytes:
        return b"".join(self.memory[at : at + 128].tobytes() for at in (number * 128, 4096 + number * 128))

    def save(self, blocks: list[int], keys: list[bytes]) -> list[bool]:
        self.tiers.swap_out(blocks, keys, [0.0] * len(blocks))
        events = self.until(Saved, lambda saved: sum(len(e.blocks) for e in saved) == len(blocks))
        return [kept for e in events for kept in e.kept]

    def look_up(self, keys: list[bytes]) -> Found:
        self.tiers.look_up(7, keys)
        (found,) = self.until(Found)
        assert isinstance(found, Found) and found.name == 7
        return found

    def fetch(self, found: Found, blocks: list[int], first: int = 0) -> dict[str, int]:
        self.tiers.fetch(8, found, first, blocks)
        (fetched,) = self.until(Fetched)
        assert isinstance(fetched, Fetched) and fetched.name == 8
        return dict(fetched.blocks)

    def close(self, blocks: tuple[int, ...] = ()) -> None:
        if not self.closed:
            self.closed = True
            self.tiers.close(list(blocks), [KEYS[b] for b in blocks], [0.0] * len(blocks), 10.0)
            self.thread.join(10)


@pytest.fixture
def host(request, tmp_path):
    slots, files = getattr(request, "param", (8, False))
    made = Host(slots, tmp_path if files else None)
    yield made
    made.close()


@pytest.mark.parametrize("host", [(8, False), (0, True), (2, True)], indirect=True, ids=["dram", "ssd", "both"])
def test_what_one_te_swaps_out_another_reads(host):
    one, two = host.te(), host.te()
    wanted = [one.block(b) for b in (3, 1, 4, 9)]
    assert one.save([3, 1, 4, 9], KEYS[:4]).count(True) >= 2
    found = two.look_up(KEYS[:6])
    two.memory[:] = 0
    counts = two.fetch(found, [5, 6, 7, 8][: len(found.offers)])
    assert sum(counts.values()) == len(found.offers) == (4 if host.slots != 2 else len(found.offers))
    for block, bytes_ in zip([5, 6, 7, 8], wanted[: len(found.offers)], strict=False):
        assert two.block(block) == bytes_
    untouched = [b for b in range(BLOCKS) if b not in (5, 6, 7, 8)]
    assert not any(any(two.block(b)) for b in untouched), "a fetch writes its own blocks alone"
    assert not one.tiers.gone and two.tiers.torn == 0
    assert two.tiers.fill.dram_bytes + two.tiers.fill.ssd_bytes > 0


@pytest.mark.parametrize("host", [(8, True)], indirect=True)
def test_both_tiers_together_hold_more_than_dram(host):
    te = host.te()
    for at in range(0, 16, 2):
        assert te.save([at, at + 1], KEYS[at : at + 2]) == [True, True]
    found = te.look_up(KEYS)
    tiers = [offer.tier for offer in found.offers]
    assert len(tiers) == 16 and tiers.count("dram") == 8 and tiers[-8:] == ["dram"] * 8
    wanted = [te.block(b) for b in range(16)]
    te.memory[:] = 0
    assert te.fetch(found, list(range(16))) == {"dram": 8, "ssd": 8}
    assert [te.block(b) for b in range(16)] == wanted
    te.look_up([bytes(16)])  # the release is through
    assert host.pool.dram is not None and not any(block.pins for block in host.pool.dram.blocks.values())


def test_a_part_is_fetched_and_all_is_released(host):
    te = host.te()
    te.save([0, 1, 2, 3], KEYS[:4])
    found = te.look_up(KEYS[:4])
    last = te.block(2)
    assert te.fetch(found, [9], first=2) == {"dram": 1, "ssd": 0} and te.block(9) == last
    te.tiers.release(te.look_up(KEYS[:4]))
    te.look_up([KEYS[9]])  # what was released before is done once this is answered
    assert host.pool.dram is not None and len(host.pool.dram.idle) == 4


def test_a_slot_that_passed_to_another_block_is_refused(host):
    te = host.te()
    te.save([0, 1, 2], KEYS[:3])
    found = te.look_up(KEYS[:3])
    os.pwrite(host.fd, struct.pack("<Q", 99), found.offers[1].slot * 8)  # as if the keeper had taken the pins for dead
    assert te.fetch(found, [4, 5, 6]) == {"dram": 1, "ssd": 0}
    assert te.tiers.torn == 1


def test_nothing_is_found_before_it_is_stored_nor_after_a_gap(host):
    te = host.te()
    assert te.look_up(KEYS[:3]).offers == []
    te.save([0, 2], [KEYS[0], KEYS[2]])
    assert len(te.look_up(KEYS[:3]).offers) == 1


def test_without_the_keeper_everything_is_recomputed(host, caplog):
    te = host.te()
    te.save([0, 1], KEYS[:2])
    found = te.look_up(KEYS[:2])
    host.die()
    assert te.look_up(KEYS[:2]).offers == [] and te.tiers.gone
    assert te.fetch(found, [4, 5]) == {"dram": 0, "ssd": 0}
    assert te.save([0, 1], KEYS[:2]) == [False, False]
    te.tiers.release(found)
    te.look_up(KEYS)
    assert caplog.text.count("event=kv_pool_lost") == 1, "told once"


def test_a_swap_out_that_finds_the_keeper_gone_between_two_blocks_stops(host):
    te = host.te()
    swapping = te.tiers._swap_out([0, 1, 2], KEYS[:3], [0.0] * 3)
    next(swapping)  # the slots are given, and one block is copied
    host.die()
    assert te.look_up(KEYS[:1]).offers == [] and te.tiers.gone
    assert list(swapping) == [] and te.tiers.take()[-1] == Saved([0, 1, 2], [True, False, False])


@pytest.mark.parametrize("host", [(0, True)], indirect=True)
def test_torn_and_missing_files_are_recomputed_and_forgotten(host, caplog):
    te = host.te()
    te.save([0, 1, 2], KEYS[:3])
    path = host.folder / file_name(MODEL, KEYS[1])
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    assert te.fetch(te.look_up(KEYS[:3]), [4, 5, 6]) == {"dram": 0, "ssd": 1}
    assert te.tiers.torn == 1 and not path.exists() and "event=torn_kv_file" in caplog.text
    assert len(te.look_up(KEYS[:3]).offers) == 1
    (host.folder / file_name(MODEL, KEYS[0])).unlink()
    assert te.fetch(te.look_up(KEYS[:3]), [4]) == {"dram": 0, "ssd": 0}
    assert te.look_up(KEYS[:3]).offers == [] and te.tiers.torn == 1


@pytest.mark.parametrize("host", [(0, True)], indirect=True)
def test_files_beyond_the_limit_are_deleted(host):
    assert host.pool.files is not None
    host.pool.files.limit = 3 * (BLOCK + 128)
    te = host.te()
    assert te.save(list(range(6)), KEYS[:6]) == [True] * 6
    assert sorted(p.name for p in host.folder.iterdir()) == sorted(file_name(MODEL, key) for key in KEYS[3:6])
    assert te.tiers.fill.ssd_evictions == 3


@pytest.mark.parametrize("host", [(0, True)], indirect=True)
def test_a_disk_that_takes_no_file_is_told_once(host, caplog, monkeypatch):
    te = host.te()
    monkeypatch.setattr(te.tiers.store, "folder", host.folder / "absent")
    assert te.save([0, 1], KEYS[:2]) == [False, False]
    assert te.tiers.failed_writes == 2 and caplog.text.count("event=kv_file_not_written") == 1


@pytest.mark.parametrize("host", [(6, True)], indirect=True)
def test_a_te_that_leaves_puts_everything_into_files(host):
    te = host.te()
    te.save([0, 1, 2], KEYS[:3])
    te.close((5, 6))
    names = {file_name(MODEL, KEYS[b]) for b in (0, 1, 2, 5, 6)}
    assert {p.name for p in host.folder.iterdir()} == names
    later = Host(0, host.folder)
    other = later.te()
    assert [offer.slot for offer in other.look_up(KEYS[:4]).offers] == [FILE] * 3
    later.close()


def test_a_bug_on_the_thread_reaches_the_step_loop(host):
    te = host.te()
    te.tiers._hurry(lambda: 1 // 0)
    assert te.told.acquire(timeout=10)
    with pytest.raises(ZeroDivisionError):
        te.tiers.take()
    te.tiers.failure = None


def test_constants_are_measured(tmp_path):
    costs = measured(Access(-1, MODEL, 0, 8, BLOCK, str(tmp_path)), TOKENS, 1000.0)
    assert costs.bandwidth["dram"] > 0 and costs.bandwidth["ssd"] > 0 and costs.prefill == 1000.0
    with pytest.raises(UserError, match="--kv-ssd-dir"):
        measured(Access(-1, MODEL, -1, 0, BLOCK, str(tmp_path / "absent")), TOKENS, 1000.0)
