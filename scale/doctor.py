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
from engine.devices import ascend
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
    yield from npu()


def npu() -> Iterator[Finding]:
    """Architecture, driver, CANN, torch and torch-npu belong together. All is read from files: where one is missing, importing
    another may fail in ways that tell nothing."""
    driver, home, plugin = ascend.driver(), ascend.cann(), ascend.plugin()
    if not driver and home is None:
        if plugin:
            mend = "it is of no use here and breaks a plain `import torch`: pip uninstall torch-npu"
            yield Finding(False, "torch-npu", f"{plugin}, without driver and CANN", mend)
        else:
            yield Finding(True, "ascend npu", "none found: --device npu needs an Ascend driver and CANN")
        return
    machine, known = platform.machine(), " and ".join(ascend.ARCHITECTURES)
    yield Finding(machine in ascend.ARCHITECTURES, "npu architecture", machine, f"torch-npu has wheels for {known} only")
    yield Finding(
        bool(driver),
        "npu driver",
        driver or "missing",
        f"install the Ascend HDK's driver and firmware; they go to {ascend.DRIVER}",
    )
    mend = "install Ascend-cann-toolkit and the kernels package of your NPU, then source its set_env.sh"
    yield Finding(
        home is not None, "cann", f"{ascend.cann_version() or 'of unknown version'} in {home}" if home else "missing", mend
    )
    if home is not None:
        # Where each package put its script: beside `latest` in the toolkit, or in it.
        script = next((p for p in (home / "set_env.sh", home.parent / "set_env.sh") if p.exists()), home / "set_env.sh")
        there = ascend.library_path_set()
        yield Finding(there, "cann libraries", "on LD_LIBRARY_PATH" if there else "not on LD_LIBRARY_PATH", f"source {script}")
    wanted, torch = pinned("requirements-npu.txt")["torch-npu"], version("torch")
    mend = f"requirements-npu.txt has {wanted}: ./run.sh setup installs it where driver and CANN are there"
    yield Finding(plugin == wanted, "torch-npu", plugin or "missing", mend)
    if plugin:
        # A plugin of one torch fails in another with an undefined symbol or a wrong result.
        fits = torch.split("+")[0].rsplit(".", 1)[0] == plugin.rsplit(".post", 1)[0].rsplit(".", 1)[0]
        yield Finding(
            fits, "torch and torch-npu", f"{torch or 'no torch'} and {plugin}", "they must be of one version: ./run.sh setup"
        )
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    nodes = sorted(p.name for p in Path("/dev").glob("davinci[0-9]*"))
    found = f"{len(nodes)} device nodes" + (f", ASCEND_RT_VISIBLE_DEVICES={visible}" if visible is not None else "")
    mend = "the driver made no /dev/davinci*: `npu-smi info` says more; in a container pass them in with --device"
    yield Finding(bool(nodes), "npu devices", found, mend)


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
    wanted, found = pinned().get(package, ""), version(package)
    if not found:
        return Finding(False, package, "missing", "./run.sh setup")
    return Finding(found.split("+")[0] == wanted, package, found, f"requirements.txt has {wanted}: ./run.sh setup")


def version(package: str) -> str:
    """As installed; "" where it isn't."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def pinned(file: str = "requirements.txt") -> dict[str, str]:
    """Package -> version in a requirements file."""
    pairs = {}
    for line in (Path(__file__).resolve().parent.parent / file).read_text().splitlines():
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
