"""Whether a request is taken in, and when a refused caller should come again. Pure."""

from __future__ import annotations

# Bounds on Retry-After (seconds): less than one invites a hammering client, more than two minutes is a guess about another day.
SOONEST, LATEST = 1.0, 120.0


def queue_is_full(outstanding: int, new: int, te: int, max_num_seqs: int, max_queued: int) -> bool:
    """Whether `new` sequences would exceed what the TEs run at once plus the queue's bound. An idle server takes any
    one request."""
    return outstanding > 0 and outstanding + new > te * max_num_seqs + max_queued


def retry_after(waiting: int, finished_per_second: float) -> float:
    """Seconds until the sequences now waiting will have left, at the rate at which sequences have been ending."""
    if finished_per_second <= 0:
        return 5.0  # nothing has ended yet: no rate to go by
    return min(LATEST, max(SOONEST, waiting / finished_per_second))
