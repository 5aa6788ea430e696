"""The SSD tier's file format: one file a KV block, self-describing and checksummed. Knows no index and no TE.

    bytes 0 to 128    header, little-endian: see HEADER
    bytes 128 on      payload: the block's bytes in the order of `distflow.block_spans`

A file is written under another name and renamed, so that a crash leaves none half written; what the disk loses or bends all the
same is found by the checksums. The name holds model and key, so that a folder may be shared by servers of several models: what
another model wrote is never asked for, and goes by age like all files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import time
from pathlib import Path

import msgspec
import numpy as np

from engine import native
from engine.rtc.keys import KEY_BYTES
from engine.types import KVLayout, UserError

MAGIC = b"DSKVBLK\0"
VERSION = 1
# magic, version, header bytes, model's fingerprint, key, layout's hash, block size (tokens), layers, heads, parts, payload bytes,
# XXH64 of the payload; the header's last 8 bytes are the XXH64 of those before them.
HEADER = struct.Struct("<8s2I16s16s16s4IQQ")
HEADER_BYTES = 128
SUFFIX = ".kv"
DRAFT = ".tmp"
FINGERPRINT_BYTES = 16


class Torn(Exception):
    """A file that isn't a whole block of ours; the text says why."""


def fingerprint(*facts: object) -> bytes:
    """Of all that decides what a token's KV bytes are: weights, precision, instruction set."""
    return hashlib.blake2b(msgspec.msgpack.encode(facts), digest_size=FINGERPRINT_BYTES, person=b"deepserve-ssd").digest()


def file_name(model: bytes, key: bytes) -> str:
    """The file of block `key` of the model with this fingerprint."""
    return f"{model.hex()}-{key.hex()}{SUFFIX}"


def prepare(folder: Path) -> None:
    """Have a folder that can be written, without what a crashed writer left. Raises `UserError`."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in it was made of people's texts
        for entry in os.scandir(folder):
            if entry.name.endswith(DRAFT) and SUFFIX in entry.name:
                os.unlink(entry.path)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as e:
        raise UserError(f"--kv-ssd-dir {folder}: {e.strerror}; name a folder that can be written", "kv_ssd_dir") from None


def scan(folder: Path) -> list[tuple[str, int, float]]:
    """(name, bytes, age in seconds) of every block's file: names and sizes alone, nothing is read."""
    now, found = time.time(), []
    for entry in os.scandir(folder):
        if entry.name.endswith(SUFFIX):
            with contextlib.suppress(FileNotFoundError):  # another server's
                status = entry.stat()
                found.append((entry.name, status.st_size, max(0.0, now - status.st_mtime)))
    return found


class Store:
    """Writes and reads the blocks of one model in one folder."""

    def __init__(self, folder: Path, model: bytes, layout: KVLayout, block_size: int, nbytes: int):
        """`nbytes`: of a block's payload."""
        self.folder = folder
        self.model = model
        self.nbytes = nbytes
        # Strides say where blocks lie in one TE's memory, not what is in them.
        same = (layout.format, layout.unit_tokens, layout.head_bytes)
        self.shape = (block_size, layout.layers, layout.heads, layout.parts)
        self.layout = hashlib.blake2b(msgspec.msgpack.encode(same), digest_size=16).digest()
        self.buffer = bytearray(HEADER_BYTES + nbytes)
        self.payload = memoryview(self.buffer)[HEADER_BYTES:]

    def path(self, key: bytes) -> Path:
        return self.folder / file_name(self.model, key)

    def write(self, key: bytes) -> int:
        """Put `payload` into the file of `key`; the file's bytes. Raises `OSError`."""
        self.buffer[:HEADER_BYTES] = self.header(key)
        path = self.path(key)
        draft = path.with_name(f"{path.name}.{os.getpid()}{DRAFT}")  # another TE may be writing the same block
        try:
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                written = os.write(fd, self.buffer)
            finally:
                os.close(fd)
            if written != len(self.buffer):
                raise OSError(28, "No space left on device")
            os.replace(draft, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
        return written

    def header(self, key: bytes) -> bytes:
        fields = (MAGIC, VERSION, HEADER_BYTES, self.model, key, self.layout, *self.shape, self.nbytes)
        packed = HEADER.pack(*fields, native.checksum(self.payload)).ljust(HEADER_BYTES - 8, b"\0")
        return packed + native.checksum(packed).to_bytes(8, "little")

    def read(self, key: bytes) -> None:
        """Fill `payload` from the file of `key`. Raises `Torn`, or `FileNotFoundError` where there is none."""
        try:
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                size, count = os.fstat(fd).st_size, os.readv(fd, [self.buffer])
            finally:
                os.close(fd)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise Torn(f"can't be read: {e.strerror}") from None
        if count < HEADER_BYTES or self.buffer[:8] != MAGIC:
            raise Torn("it is no KV block")
        head = bytes(self.buffer[:HEADER_BYTES])
        if native.checksum(head[:-8]) != int.from_bytes(head[-8:], "little"):
            raise Torn("its header's checksum is wrong")
        _, version, _, model, found, layout, *shape, nbytes, checksum = HEADER.unpack_from(head)
        if version != VERSION:
            raise Torn(f"it is of version {version}, this is {VERSION}")
        if model != self.model or found != key:
            raise Torn("it is of another model or another text")
        if layout != self.layout or tuple(shape) != self.shape or nbytes != self.nbytes:
            raise Torn("its blocks are laid out differently")
        if size != HEADER_BYTES + nbytes or count != size:
            raise Torn(f"it has {size} bytes and not {HEADER_BYTES + nbytes}")
        if native.checksum(self.payload) != checksum:
            raise Torn("its checksum is wrong")

    def delete(self, key: bytes) -> None:
        self.unlink(file_name(self.model, key))

    def unlink(self, name: str) -> None:
        """Delete a file by its name; it may be gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.folder / name)


def read_speed(folder: Path, nbytes: int) -> float:
    """Bytes a second that a file of `nbytes` is read at, past the system's cache where the file system lets us. Raises
    `OSError`."""
    path = folder / f"speed-{os.getpid()}{SUFFIX}{DRAFT}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.unlink(path)
        os.write(fd, np.random.default_rng(0).bytes(nbytes))
        os.fsync(fd)
        os.posix_fadvise(fd, 0, nbytes, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        os.pread(fd, nbytes, 0)
        return nbytes / max(1e-9, time.perf_counter() - started)
    finally:
        os.close(fd)


assert HEADER.size <= HEADER_BYTES - 8 and KEY_BYTES == 16
