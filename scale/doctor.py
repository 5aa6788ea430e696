"""`deepserve.py doctor`: what this machine has, what is missing, and the command that mends it. Imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from engine import capacity, native
from engine.native import cpu
from engine.types import UserError
from scale import pull


class Finding(msgspec.Struct):
    ok: bool
    what: str
    found: str
    mend: str = ""


def findings() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding(sys.version_info >= (3, 11), "python", version, "install Python 3.11 or newer")
    box = capacity.machine()
    yield Finding(True, "cpu", f"{platform.machine()}, {box.cores} cores usable, {instruction_sets()}")
    yield Finding(
        box.free_bytes > 2 << 30, "memory", f"{capacity.gib(box.free_bytes)} free", "the default model needs about 2 GiB"
    )
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    try:
        native.load()
        yield Finding(True, "native helper", f"built ({compiler or 'no compiler now'})")
    except UserError as e:
        yield Finding(False, "native helper", "missing", str(e))
    yield kernels()
    for package in ("torch", "numpy", "aiohttp", "uvloop", "msgspec", "orjson", "tokenizers", "jinja2"):
        yield library(package)
    for name in pull.KNOWN:
        there = pull.place(name).exists()
        yield Finding(True, f"model {name}", "pulled" if there else "not pulled yet: serve fetches it, or: ./run.sh pull " + name)
    driver = Path("/usr/local/Ascend/driver/version.info").exists()
    found = "driver found; this build serves on cpu only" if driver else "none found; this build serves on cpu only"
    yield Finding(True, "ascend npu", found)


def kernels() -> Finding:
    """Which compiled CPU kernels serve."""
    if os.environ.get(cpu.VARIABLE) == "reference":
        return Finding(True, "cpu kernels", f"off: {cpu.VARIABLE}=reference")
    try:
        return Finding(True, "cpu kernels", f"{cpu.choose()} (this machine also has: {', '.join(cpu.available())})")
    except UserError as e:
        return Finding(False, "cpu kernels", "none: the slower reference operators serve", str(e))


def library(package: str) -> Finding:
    """An installed package against the version in requirements.txt."""
    wanted = pinned().get(package, "")
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(False, package, "missing", "./run.sh setup")
    return Finding(found.split("+")[0] == wanted, package, found, f"requirements.txt has {wanted}: ./run.sh setup")


def pinned() -> dict[str, str]:
    """Package -> version in requirements.txt."""
    pairs = {}
    for line in (Path(__file__).resolve().parent.parent / "requirements.txt").read_text().splitlines():
        name, found, rest = line.partition("==")
        if found and not name.startswith("#"):
            pairs[name.strip()] = rest.split("#")[0].strip()
    return pairs


def instruction_sets() -> str:
    """The vector extensions of the first core that kernels care for."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return "no instruction-set flags to be read"
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve")
    return " ".join(f for f in known if f in flags) or "no vector extension that we know"


def main() -> int:
    """Print the findings; the exit status is 1 where something must be mended."""
    every = list(findings())
    for f in every:
        print(f"{'ok  ' if f.ok else 'MEND'} {f.what:28} {f.found}" + ("" if f.ok else f"\n     -> {f.mend}"))
    return 0 if all(f.ok for f in every) else 1
