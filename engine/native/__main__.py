"""`python -m engine.native`: build what is compiled unless it is there, with a line for each. The helper is needed;
without the CPU kernels (a C++ compiler is missing, say) the reference operators serve."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine import native
from engine.native import cpu
from engine.types import UserError


def ensure(what: str, find: Callable[[], Path | None], build: Callable[[], Path]) -> bool:
    """Whether it is there now."""
    if path := find():
        print(f"{what}: up to date ({path})", flush=True)
        return True
    begin = time.monotonic()
    try:
        path = build()
    except UserError as e:
        print(f"{what}: {e}", file=sys.stderr)
        return False
    print(f"{what}: built in {time.monotonic() - begin:.1f} s ({path})", flush=True)
    return True


def main() -> int:
    if not ensure("native helper", native.find, native.build):
        return 1
    if not ensure("CPU kernels", cpu.find, cpu.build):
        print("CPU kernels: going on without them, on the slower reference operators", file=sys.stderr)
    return 0


sys.exit(main())
