"""What can be told of an Ascend box from files alone: nothing is imported and no device is touched, so every process may ask."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

DRIVER = Path("/usr/local/Ascend/driver")
TOOLKITS = (Path("/usr/local/Ascend/ascend-toolkit/latest"), Path("/usr/local/Ascend/cann"))
ARCHITECTURES = ("aarch64", "x86_64")  # torch-npu has wheels for these


def driver() -> str:
    """The driver's version, "" where there is none."""
    return version_in(DRIVER / "version.info") if (DRIVER / "version.info").exists() else ""


def cann() -> Path | None:
    """Where CANN lies: ASCEND_HOME_PATH, which its set_env.sh sets, or a usual place."""
    named = os.environ.get("ASCEND_HOME_PATH")
    places = (Path(named), *TOOLKITS) if named else TOOLKITS
    return next((place for place in places if place.exists()), None)


def cann_version() -> str:
    """As the toolkit's own file says it, "" where it has none."""
    home = cann()
    if home is None:
        return ""
    files = [*sorted(home.glob("*/ascend_toolkit_install.info")), home / "version.cfg"]
    return next((v for v in map(version_in, files) if v), "")


def version_in(path: Path) -> str:
    """The first `version=` (or `Version=`) of a file, without the rest of its line."""
    try:
        found = re.search(r"(?im)^\s*\w*version\w*\s*=\s*\[?([^\s,\]:]+)", path.read_text(errors="replace"))
    except OSError:
        return ""
    return found[1] if found else "of unknown version"


def library_path_set() -> bool:
    """Whether the loader can find CANN's runtime: its set_env.sh was sourced."""
    return any((Path(p) / "libascendcl.so").exists() for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p)


def plugin() -> str:
    """torch-npu's version as installed, "" where it isn't. Looks its metadata up and imports nothing of it."""
    from importlib import metadata  # some 10 ms, and e-mail's parser in the memory of every TE

    try:
        return metadata.version("torch-npu")
    except metadata.PackageNotFoundError:
        return ""


def lacking() -> list[str]:
    """What is missing for --device npu, most basic first, each with what to do; empty where nothing is."""
    missing = []
    if platform.machine() not in ARCHITECTURES:
        missing.append(f"torch-npu has no wheel for {platform.machine()}; it has for {' and '.join(ARCHITECTURES)}")
    if not driver():
        missing.append(f"no driver at {DRIVER}; install the Ascend HDK's driver and firmware")
    if cann() is None:
        missing.append("CANN is missing; install Ascend-cann-toolkit and the kernels package of your NPU")
    elif not library_path_set():
        missing.append(f"CANN's libraries are not on LD_LIBRARY_PATH; source {cann()}/set_env.sh")
    if not plugin():
        missing.append("torch-npu is missing; ./run.sh setup installs it where driver and CANN are there")
    return missing
