"""The SSD tier's files: what is written is read back, and what isn't a whole block of ours is refused."""

from __future__ import annotations

import os
import struct

import pytest

from engine import native
from engine.rtc import ssd
from engine.rtc.ssd import HEADER_BYTES, Store, Torn, file_name, fingerprint
from engine.types import KVLayout, UserError

MODEL, KEY = fingerprint("model", 1), bytes(range(16))
LAYOUT = KVLayout("panels-bfloat16-16", 2, 1024, 2, 512, 8, 2048, 16, 4, 128)
PAYLOAD = bytes(n % 251 for n in range(2048))


def store(folder, model=MODEL, layout=LAYOUT, block_size=16) -> Store:
    return Store(folder, model, layout, block_size, len(PAYLOAD))


@pytest.fixture
def written(tmp_path):
    one = store(tmp_path)
    one.payload[:] = PAYLOAD
    assert one.write(KEY) == HEADER_BYTES + len(PAYLOAD)
    return one.path(KEY)


def test_a_block_is_read_back_by_another_process_of_the_same_model(tmp_path, written):
    assert written.name == file_name(MODEL, KEY) and [p.name for p in tmp_path.iterdir()] == [written.name]
    other = store(tmp_path)
    other.read(KEY)
    assert bytes(other.payload) == PAYLOAD
    (found,) = ssd.scan(tmp_path)
    assert found[:2] == (written.name, HEADER_BYTES + len(PAYLOAD)) and found[2] < 60


def test_the_header_says_what_the_file_is(written):
    magic, version, length = struct.unpack_from("<8s2I", written.read_bytes())
    assert (magic, version, length) == (b"DSKVBLK\0", 1, HEADER_BYTES)
    data = written.read_bytes()
    assert data[16:32] == MODEL and data[32:48] == KEY and data[HEADER_BYTES:] == PAYLOAD
    assert int.from_bytes(data[HEADER_BYTES - 8 : HEADER_BYTES], "little") == native.checksum(data[: HEADER_BYTES - 8])


@pytest.mark.parametrize("at", [0, 9, 20, 40, 60, 75, 100, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 2047])
def test_any_changed_byte_is_found(tmp_path, written, at):
    data = bytearray(written.read_bytes())
    data[at] ^= 1
    written.write_bytes(data)
    with pytest.raises(Torn):
        store(tmp_path).read(KEY)


@pytest.mark.parametrize("length", [0, 5, HEADER_BYTES, HEADER_BYTES + 100, HEADER_BYTES + 2047, HEADER_BYTES + 2049])
def test_any_other_length_is_found(tmp_path, written, length):
    written.write_bytes((written.read_bytes() + b"x")[:length])
    with pytest.raises(Torn):
        store(tmp_path).read(KEY)


def test_files_of_others_are_refused(tmp_path, written):
    other_key, other_model = bytes(16), fingerprint("model", 2)
    os.rename(written, written.with_name(file_name(MODEL, other_key)))
    with pytest.raises(Torn, match="another model or another text"):
        store(tmp_path).read(other_key)
    os.rename(written.with_name(file_name(MODEL, other_key)), written.with_name(file_name(other_model, KEY)))
    with pytest.raises(Torn, match="another model"):
        store(tmp_path, other_model).read(KEY)
    with pytest.raises(FileNotFoundError):
        store(tmp_path).read(KEY)


def test_another_layout_is_refused(tmp_path, written):
    for layout in (
        KVLayout("panels-int8-16", *LAYOUT.__reduce__()[1][1:]),
        KVLayout("panels-bfloat16-16", 1, 1024, 4, 512, 8, 2048, 16, 4, 128),
    ):
        with pytest.raises(Torn, match="laid out differently"):
            store(tmp_path, layout=layout).read(KEY)
    moved = KVLayout("panels-bfloat16-16", 2, 999, 2, 512, 77, 4096, 16, 4, 128)
    store(tmp_path, layout=moved).read(KEY)  # strides are of one TE's memory


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    one = store(tmp_path)
    monkeypatch.setattr(os, "write", lambda fd, data: 7)
    with pytest.raises(OSError, match="No space left"):
        one.write(KEY)
    assert list(tmp_path.iterdir()) == []
    one.delete(KEY)


def test_a_folder_is_made_and_drafts_of_the_dead_are_cleared(tmp_path):
    folder = tmp_path / "a" / "b"
    ssd.prepare(folder)
    (folder / "x.kv.123.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_bytes(b"somebody's")
    ssd.prepare(folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"] and ssd.scan(folder) == []
    with pytest.raises(UserError, match="--kv-ssd-dir"):
        ssd.prepare(folder / "notes.txt")


def test_speed_leaves_nothing(tmp_path):
    assert ssd.read_speed(tmp_path, 1 << 16) > 0
    assert list(tmp_path.iterdir()) == []
