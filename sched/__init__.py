"""What runs in the one asyncio process: gateway, job state machine, scheduling, cluster. No torch, no tensors, no blocking.

`sched` is also the name of a standard-library module. With this folder first on the path, names this package doesn't have are
looked up in that module, so that a host program which uses `sched.scheduler` keeps working.
"""

import importlib.util
import os
import sysconfig
from typing import Any

_standard: Any = None


def __getattr__(name: str) -> Any:
    global _standard
    if name.startswith("__"):
        raise AttributeError(name)
    if _standard is None:
        path = os.path.join(sysconfig.get_path("stdlib"), "sched.py")
        spec = importlib.util.spec_from_file_location("_standard_sched", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _standard = module
    try:
        return getattr(_standard, name)
    except AttributeError:
        raise AttributeError(f"module 'sched' has no attribute {name!r}") from None
