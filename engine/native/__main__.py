"""`python -m engine.native`: build the compiled helper unless it is there, and say so in one line."""

import sys
import time

from engine import native
from engine.types import UserError


def main() -> int:
    if path := native.find():
        print(f"native helper: up to date ({path})")
        return 0
    begin = time.monotonic()
    try:
        path = native.build()
    except UserError as e:
        print(f"native helper: {e}", file=sys.stderr)
        return 1
    print(f"native helper: built in {time.monotonic() - begin:.1f} s ({path})")
    return 0


sys.exit(main())
