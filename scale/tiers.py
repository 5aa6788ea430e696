"""The keeper's end of the DRAM and SSD tiers: the pool's memory, the index, and a socket to each TE.

One `TierHost` for each packed model. The pool's memory is one memfd, committed as slots are first written; it goes when the
keeper and the TEs that map it have gone. Nothing here reads or writes a block or a file: TEs do.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import selectors
import socket
import struct
import time
from pathlib import Path
from typing import Any

import msgspec

from engine import capacity, models
from engine.config import Config
from engine.native import cpu
from engine.rtc import ssd
from engine.rtc.pool import Dram, Files, Pool, geometry
from engine.rtc.tiers import Access
from engine.rtc.wire import ToPool
from engine.types import UserError
from engine.weights import Manifest

MAX_MESSAGE = 1 << 18  # bytes: a Put of `wire.MOST_KEYS` keys is a tenth of it


class TierHost:
    """The slower tiers of one packed model on this box."""

    def __init__(self, selector: selectors.BaseSelector, model_config: dict[str, Any], manifest: Manifest, config: Config):
        """`config` is resolved. Raises `UserError` where the SSD tier's folder can't be used."""
        assert config.block_size
        self.selector = selector
        self.sockets: dict[int, socket.socket] = {}  # TE -> our end
        model = models.build(model_config)
        each = capacity.kv_bytes_per_token(model, config.dtype, config.kv_cache_dtype) * config.block_size
        self.folder = config.kv_ssd_dir and str(Path(config.kv_ssd_dir).expanduser().resolve())
        facts = (manifest.format, config.dtype, config.kv_cache_dtype, config.block_size, cpu.choose())
        self.model = ssd.fingerprint(*facts, [(e.name, e.dtype, e.shape, e.checksum) for e in manifest.entries])
        self.each = each
        self.fd, self.slots, dram, files = -1, config.kv_dram_bytes // each, None, None
        self.generations: mmap.mmap | None = None
        self.leaving = False  # with the last TE
        if self.slots:
            first, nbytes = geometry(self.slots, each)
            try:
                self.fd = os.memfd_create("deepserve-kv-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.ftruncate(self.fd, nbytes)
                # A TE that maps it must never find it shorter: that would kill it with SIGBUS.
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
                self.generations = generations = mmap.mmap(self.fd, first)
            except (OSError, ValueError, OverflowError) as e:
                raise UserError(
                    f"--kv-dram-bytes {config.kv_dram_bytes}: can't be mapped ({e}); use less", "kv_dram_bytes"
                ) from None
            dram = Dram(self.slots, lambda slot, generation: struct.pack_into("<Q", generations, slot * 8, generation))
        if self.folder:
            ssd.prepare(Path(self.folder))
            files = Files(config.kv_ssd_bytes, ssd.scan(Path(self.folder)), time.monotonic())
        self.pool = Pool(dram, each, files, lambda key: ssd.file_name(self.model, key))
        self.decoder = msgspec.msgpack.Decoder(ToPool)
        self.encoder = msgspec.msgpack.Encoder()

    def open(self, te: int) -> Access:
        """What a TE that is forked next is to be given. The caller closes its copy of the socket after the fork."""
        self.close(te)  # its predecessor's
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.sockets[te] = ours
        self.selector.register(ours, selectors.EVENT_READ, lambda: self.receive(te, ours))
        return Access(theirs.detach(), self.model, self.fd, self.slots, self.each, self.folder)

    def receive(self, te: int, ours: socket.socket) -> None:
        """Answer a TE, or see that it has gone."""
        try:
            data = ours.recv(MAX_MESSAGE)
            if data:
                answer = self.pool.answer(te, self.decoder.decode(data), time.monotonic())
                if answer is not None:
                    # It asks one thing at a time, so there is always room for the answer.
                    ours.send(self.encoder.encode(answer))
                return
        except OSError:
            pass
        if self.sockets.get(te) is ours:
            self.close(te)

    def close(self, te: int) -> None:
        """The TE has ended, and its pins with it."""
        ours = self.sockets.pop(te, None)
        if ours is not None:
            self.selector.unregister(ours)
            ours.close()
            self.pool.leave(te, time.monotonic())
            if self.leaving and not self.sockets:
                self.end()

    def leave(self) -> None:
        """The model is forgotten: let the DRAM tier go, once no TE has it. Files stay."""
        self.leaving = True
        if not self.sockets:
            self.end()

    def end(self) -> None:
        if self.generations is not None:
            self.generations.close()
            os.close(self.fd)
