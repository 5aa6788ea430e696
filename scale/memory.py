"""What processes and the box hold in memory, as the kernel counts it: how it is verified that something was freed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec


class Used(msgspec.Struct):
    """Bytes that some processes hold."""

    private: int = 0  # theirs alone
    kv: int = 0  # of KV pools that are shared memory, as far as they are committed
    weights: int = 0  # of packed weights, mapped by however many


def used_by(pids: Iterable[int]) -> Used:
    """What these processes hold; those that are gone hold nothing. Reads a page or two of text for each: off the event loop."""
    used = Used()
    pools: dict[str, int] = {}  # by inode: mapped by several, a pool is there once
    slabs: dict[str, int] = {}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
        except OSError:
            continue
        inode = name = ""
        for line in lines:
            field, _, rest = line.partition(" ")
            if not field.endswith(":"):
                *_, inode, name = (*line.split(None, 5)[:5], line.split(None, 5)[5] if len(line.split(None, 5)) > 5 else "")
            elif field in ("Private_Clean:", "Private_Dirty:"):
                if not name.startswith("/memfd:deepserve-"):
                    used.private += int(rest.split()[0]) << 10
            elif field == "Rss:":
                nbytes = int(rest.split()[0]) << 10
                if name.startswith("/memfd:deepserve-kv"):
                    pools[inode] = max(pools.get(inode, 0), nbytes)
                elif name.startswith("/memfd:deepserve-weights"):
                    slabs[inode] = max(slabs.get(inode, 0), nbytes)
    used.kv, used.weights = sum(pools.values()), sum(slabs.values())
    return used


def available() -> int:
    """Bytes that the box has free for processes (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
