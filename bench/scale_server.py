"""A server under `bench.scale`: started as a person would, asked over HTTP, and its processes seen through /proc.

Its processes are told apart by their names; memory is taken from each one's smaps, so that what several map counts once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from engine.types import UserError
from tests.server import Server, family, wait_until

MODEL = "smollm2-135m-instruct"
Kind = Literal["control", "keeper", "te", "pool", "other"]
# The kernel keeps 15 bytes of a name.
NAMES: dict[str, Kind] = {"deepserve-te": "te", "deepserve-warm": "pool", "deepserve-keepe": "keeper"}


class Options(msgspec.Struct, frozen=True):
    """What the command line says to every part."""

    rounds: int
    te: int  # that growth and respawn go up to
    quick: bool
    seed: int
    peers: Path


def say(text: str) -> None:
    print(f"bench scale: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def serving(*flags: str | Path) -> Iterator[Server]:
    """A server that is ready, and its end. Raises `UserError` where it doesn't get so far, or leaves a process behind."""
    try:
        with Server(*flags) as server:
            yield server.ready()
    except AssertionError as e:
        raise UserError(str(e)) from None


# ---- processes ----------------------------------------------------------------------------------------------------------


def processes(server: Server) -> dict[int, Kind]:
    """All of a server's, and what each is."""
    found: dict[int, Kind] = {}
    for pid in family(server.marker):
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            named: list[Kind] = [kind for start, kind in NAMES.items() if name.startswith(start)]
            found[pid] = "control" if pid == server.process.pid else named[0] if named else "other"
    return found


def wait_for_pool(server: Server, size: int) -> None:
    """Until so many warm processes wait: what there is while nothing is asked for."""
    wait_until(f"{size} warm processes", lambda: Counter(processes(server).values())["pool"] >= size)


# ---- memory -------------------------------------------------------------------------------------------------------------


class Mapped(NamedTuple):
    """One mapping of a process; bytes."""

    name: str
    inode: str
    rss: int
    pss: int
    private: int


def mappings(smaps: str) -> Iterator[Mapped]:
    """What /proc/PID/smaps says."""
    name, inode = "", ""
    sizes: dict[str, int] = {}
    for line in smaps.splitlines():
        field, _, rest = line.partition(" ")
        if field.endswith(":"):
            if field in ("Rss:", "Pss:", "Private_Clean:", "Private_Dirty:"):
                sizes[field] = int(rest.split()[0]) << 10
            continue
        if sizes:
            yield made(name, inode, sizes)
        head = line.split(None, 5)
        inode, name = head[4], head[5] if len(head) > 5 else ""
        sizes = {}
    if sizes:
        yield made(name, inode, sizes)


def made(name: str, inode: str, sizes: Mapping[str, int]) -> Mapped:
    return Mapped(name, inode, sizes["Rss:"], sizes["Pss:"], sizes["Private_Clean:"] + sizes["Private_Dirty:"])


def account(maps: Mapping[int, tuple[Kind, Sequence[Mapped]]], allocated: Mapping[str, int]) -> dict[str, Any]:
    """Where a server's memory is, in MB: what each TE has alone (without memfds), KV pools as far as they are committed, packed
    weights once, the other processes. `allocated`: bytes of memfds by inode, whether mapped or not."""
    alone = {pid: sum(m.private for m in found if not m.name.startswith("/memfd:")) for pid, (_, found) in maps.items()}
    shared: dict[str, dict[str, int]] = {"kv": {}, "weights": {}, "rest": {}}
    for _, found in maps.values():
        for m in found:
            if m.name.startswith("/memfd:"):
                of = next((what for what in ("kv", "weights") if m.name.startswith(f"/memfd:deepserve-{what}")), "rest")
                shared[of][m.inode] = max(shared[of].get(m.inode, 0), m.rss, allocated.get(m.inode, 0))
    by_kind: dict[Kind, list[int]] = {"te": [], "pool": [], "keeper": [], "control": [], "other": []}
    for pid, (kind, _) in maps.items():
        by_kind[kind].append(alone[pid])
    tes = by_kind["te"]
    kv = sum(shared["kv"].values())
    return {
        "te": len(tes),
        "te_private_mb": sum(tes) / 1e6,
        "te_private_most_mb": max(tes, default=0) / 1e6,
        "kv_committed_mb": kv / 1e6,
        "each_te_mb": (sum(tes) + kv) / 1e6 / max(1, len(tes)),
        "weights_once_mb": sum(shared["weights"].values()) / 1e6,
        "queues_and_rest_mb": sum(shared["rest"].values()) / 1e6,
        "pool": len(by_kind["pool"]),
        "pool_private_mb": sum(by_kind["pool"]) / 1e6,
        "keeper_private_mb": sum(by_kind["keeper"]) / 1e6,
        "control_private_mb": sum(by_kind["control"]) / 1e6,
        "pss_mb": sum(m.pss for _, found in maps.values() for m in found) / 1e6,
    }


def memory(server: Server) -> dict[str, Any]:
    """As `account` has it, now."""
    maps: dict[int, tuple[Kind, list[Mapped]]] = {}
    for pid, kind in processes(server).items():
        with contextlib.suppress(OSError):
            maps[pid] = kind, list(mappings(Path(f"/proc/{pid}/smaps").read_text()))
    return account(maps, memfds(maps))


def memfds(pids: Iterable[int]) -> dict[str, int]:
    """Memfds that these processes have open: bytes allocated, by inode."""
    found: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(fd).startswith("/memfd:"):
                        stat = os.stat(fd)
                        found[str(stat.st_ino)] = stat.st_blocks * 512
    return found


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class Held(NamedTuple):
    """Bytes of some processes, a page that n of all processes map counting 1/n."""

    pss: int
    anonymous: int  # of it: neither files nor shared memory


def pss(pids: Iterable[int]) -> Held:
    """A process that has ended counts nothing."""
    total = Counter[str]()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                field, _, rest = line.partition(":")
                total[field] += int(rest.split()[0]) << 10
    return Held(total["Pss"], total["Pss_Anon"])
