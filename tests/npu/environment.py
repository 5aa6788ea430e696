"""The npu tests' own virtual environment, and how a test runs something in it.

The plugin breaks a plain `import torch` where there is no CANN, so it never goes into the ordinary environment: it has one of
its own in .venv-npu, which sees the ordinary one's packages through a .pth file. Made at the first use, kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from tests.npu import stub
from tests.npu.stub import Faults, Unavailable

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / ".venv-npu"
REQUIREMENTS = ROOT / "requirements-npu.txt"
SITE = Path(__file__).resolve().parent / "site"


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    with open(ROOT / ".venv-npu.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def python() -> Path:
    """The interpreter of the environment, which is made where it is missing. Raises `Unavailable` with the reason."""
    reason = missing()
    if reason is not None:
        raise Unavailable(reason)
    return FOLDER / "bin" / "python"


@cache
def missing() -> str | None:
    """Makes the environment; why it can't be had, asked once a process."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    requirement = next(
        line.split("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch-npu")
    )
    version = requirement.split("==")[1]
    if torch.__version__.split("+")[0] != version:
        return f"{requirement} needs torch {version}, here is {torch.__version__}"
    packages = sysconfig.get_path("purelib")
    stamp, wanted = FOLDER / ".installed", f"{requirement} over {packages}"
    with one_at_a_time():
        if stamp.exists() and stamp.read_text() == wanted:
            return None
        venv.create(FOLDER, clear=True, symlinks=True)
        own = FOLDER / Path(packages).relative_to(sys.prefix)
        (own / "ordinary.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
        try:
            subprocess.run(
                [*pip, "--no-deps", "--target", own, requirement], capture_output=True, text=True, timeout=600, check=True
            )
        except subprocess.TimeoutExpired:
            return f"pip needs more than ten minutes for {requirement}"
        except subprocess.CalledProcessError as e:
            return f"pip can't install {requirement}: {(e.stderr.strip().splitlines() or ['it does not say why'])[-1]}"
        stamp.write_text(wanted)
    return None


def environment(faults: Faults | None = None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment variables under which a process of `python()` runs on the stub."""
    import torch

    folder = str(stub.build())
    paths = [folder, str(Path(torch.__file__).parent / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ACL_", "ASCEND_"))},
        "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
        "PYTHONPATH": f"{SITE}:{ROOT}",
        "ASCEND_HOME_PATH": folder,  # where the plugin looks for CANN
        "ASCEND_OPP_PATH": folder,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        # The plugin's own queue of launches would run beside ours: with 0 each call reaches the runtime when it is made.
        "TASK_QUEUE_ENABLE": "0",
        "OMP_NUM_THREADS": "1",
        "ACL_STUB": (faults or Faults()).environment(),
        **(extra or {}),
    }


def run(
    code: str | Sequence[str],
    faults: Faults | None = None,
    *,
    extra: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> str:
    """What `code` (or python with the arguments `code`) prints, run on the stub's devices; its warnings are errors. Fails
    with its output where it fails."""
    arguments = ["-W", "error::UserWarning", "-c", textwrap.dedent(code)] if isinstance(code, str) else list(code)
    done = subprocess.run(
        [python(), *arguments],
        env=environment(faults, extra),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout
