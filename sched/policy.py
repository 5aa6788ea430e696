"""Where a task runs: pure functions of (task, TE snapshots) that give a reason with the choice."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Snapshot(msgspec.Struct, frozen=True):
    """What the scheduler knows of a TE that takes tasks."""

    te: int
    sequences: int  # given to it and not ended
    prompt_tokens: int  # of these, prompt tokens of sequences without a first token


class Choice(msgspec.Struct, frozen=True):
    te: int
    reason: str


# A queued prompt token weighs as much as this part of a running sequence: one sequence costs a token a step for its
# whole life, and some hundred prompt tokens take about as long as the steps between two arrivals.
TOKENS_A_SEQUENCE = 256


def least_loaded(snapshots: Sequence[Snapshot]) -> Choice | None:
    """The TE with the least to do, the lowest id among equals. None where there is no TE."""
    if not snapshots:
        return None
    best = min(snapshots, key=lambda s: (s.sequences + s.prompt_tokens / TOKENS_A_SEQUENCE, s.te))
    return Choice(best.te, f"least loaded of {len(snapshots)}: {best.sequences} sequences, {best.prompt_tokens} prompt tokens")
