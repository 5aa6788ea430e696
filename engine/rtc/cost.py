"""Load or recompute: the rule that sched-enqueue asks when a prompt's blocks lie in a slower tier (paper, 2.2). Pure.

Both sides are straight lines: a load costs a tier's fixed time and its bytes at the tier's bandwidth, a prefill its tokens at the
prefill's speed. The constants are measured when the TE starts and follow what its live loads and steps take. The choice is about
time alone: on whichever side a block comes, its bytes are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Tier = Literal["dram", "ssd"]

# Of a new measurement in the running mean. Steps and loads vary by some 10 %; after ten of them an old regime is forgotten.
WEIGHT = 0.2
# Steps of fewer prefill tokens, or with more decodes than prefill tokens, say little about the prefill's speed.
LEAST_PREFILL = 32
# Seconds that any load takes beside its bytes: the tier's thread and the step loop must each wake up. A few tenths of that on an
# idle machine, more where a step holds the cores.
FIXED_SECONDS = 0.001


@dataclass(slots=True)
class Costs:
    """What this TE's tiers and its prefill can do."""

    block_tokens: int
    block_bytes: int
    prefill: float  # tokens a second
    bandwidth: dict[Tier, float] = field(default_factory=dict)  # bytes a second

    def blocks_to_load(self, tiers: Sequence[Tier]) -> int:
        """How many of the blocks in `tiers`, which follow each other in a prompt, to load; the rest is computed."""
        best, best_seconds = 0, self.recompute_seconds(len(tiers))
        loading = FIXED_SECONDS
        for count, tier in enumerate(tiers, 1):
            loading += self.block_bytes / self.bandwidth[tier]
            seconds = loading + self.recompute_seconds(len(tiers) - count)
            if seconds <= best_seconds:
                best, best_seconds = count, seconds
        return best

    def recompute_seconds(self, blocks: int) -> float:
        return blocks * self.block_tokens / self.prefill

    def loaded(self, tier: Tier, nbytes: int, seconds: float) -> None:
        """A load of so many bytes took so long."""
        self.bandwidth[tier] += WEIGHT * (nbytes / max(seconds, 1e-9) - self.bandwidth[tier])

    def stepped(self, prefill_tokens: int, other_tokens: int, seconds: float) -> None:
        """A step that computed prompts took so long."""
        if prefill_tokens >= max(LEAST_PREFILL, other_tokens) and seconds > 0:
            self.prefill += WEIGHT * (prefill_tokens / seconds - self.prefill)
