"""Work that may take longer than the event loop can be held: a millisecond."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")

INLINE = 8192  # characters tokenised on the loop: about a millisecond; a thread costs a tenth of that


async def off_loop(size: int, work: Callable[[], R]) -> R:
    """`work()` on a text of `size` characters: here where it is short, else in a thread."""
    return work() if size <= INLINE else await asyncio.to_thread(work)
