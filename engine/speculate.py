"""Drafts by prompt lookup (n-gram speculation): what followed the last time the text ended as it does now. Pure.

A draft is a guess that the engine verifies in the same step that reads it, so it may be wrong and costs only time. How
long drafts are follows how they fare (`next_length`): replaying recorded texts of SmolLM2-135M (copied text, summaries, small
talk), that stays within a tenth of the best fixed length for each, while a fixed length of 8 makes small talk in four streams
up to a sixth slower.
"""

from __future__ import annotations

import numpy as np

NOTHING = np.empty(0, np.int32)


def propose(ids: np.ndarray, known: int, n_min: int, n_max: int, count: int) -> np.ndarray:
    """`count` ids that may follow `ids[:known]` (int32), or none.

    Of the earlier places that end with the same ids as the text, at least `n_min`, those with the longest match count, up to
    `n_max`, and of them the latest. Where less than `count` ids follow it, the text is in a loop: its turn is repeated.
    The text is looked through once, by numpy: some 20 us for 8 000 ids."""
    if count < 1 or known <= n_min:
        return NOTHING
    ends = np.flatnonzero(ids[n_min - 1 : known - 1] == ids[known - 1]) + (n_min - 1)
    length = 1
    while length < n_max:
        longer = ends[ends >= length]
        longer = longer[ids[longer - length] == ids[known - 1 - length]]
        if not len(longer):
            break
        ends = longer
        length += 1
    if length < n_min or not len(ends):
        return NOTHING
    at = int(ends[-1]) + 1
    return ids[at : at + count].copy() if at + count <= known else np.resize(ids[at:known], count)


def agreeing(draft: np.ndarray, sampled: np.ndarray) -> int:
    """How many ids of a draft hold: those before the first that is not the one sampled in its place."""
    differ = np.flatnonzero(draft != sampled[: len(draft)])
    return int(differ[0]) if len(differ) else len(draft)


def next_length(held: int, drafted: int, most: int) -> int:
    """How long the draft after one of `drafted` ids, of which `held` were right, may be: as many as held; where all did,
    twice as many, up to `most`."""
    return min(2 * held, most) if held == drafted else held
