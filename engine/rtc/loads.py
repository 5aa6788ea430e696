"""What a TE's sequences want of the slower tiers: lookups and fetches, from the wish to the answer. Pure; the step loop sends
what is due here to the tiers' thread (tiers.py) and brings its answers. Sequences and block numbers are the batch's."""

from __future__ import annotations

from engine.rtc.cost import Costs
from engine.rtc.wire import Fetched, Found
from engine.sequence import Sequence
from engine.types import Load

# A sequence that waits for room may lose the device's part of its prefix after the slower tiers were asked for the rest. They are
# asked once more; who loses it again is in a TE so full that computing is the least trouble.
MOST_LOOKUPS = 2


class Loads:
    def __init__(self) -> None:
        self.costs: Costs | None = None  # of slower tiers, where there are any
        self.tickets = 0  # of lookups and fetches
        self.lookups: list[tuple[int, list[bytes]]] = []  # (ticket, keys) to be sent
        self.asking: dict[int, Sequence] = {}  # by ticket
        self.fetches: list[tuple[int, Found, int, list[int]]] = []  # (ticket, what, first offer, into blocks) to be begun
        # By ticket: who waits, into which blocks, each with a reference more; and whether it then runs here.
        self.fetching: dict[int, tuple[Sequence, list[int], bool]] = {}
        self.unwanted: list[Found] = []  # to be released

    def ask(self, seq: Sequence, keys: list[bytes]) -> None:
        """Look these blocks up for a sequence; until the answer it waits."""
        seq.asked += 1
        seq.asking = True
        self.tickets += 1
        self.asking[self.tickets] = seq
        self.lookups.append((self.tickets, keys))

    def found(self, answer: Found) -> None:
        """What the slower tiers have of a sequence's prefix."""
        seq = self.asking.pop(answer.name)
        seq.asking = False
        if seq.ended:
            self.unwanted.append(answer)
        elif answer.offers:
            seq.found = answer

    def wanted(self, seq: Sequence, matched: int, load: Load) -> int | None:
        """How many blocks behind the `matched` that the device has are to be loaded, and not computed. None: what the lookup
        began after is no longer there, so it must be made again."""
        if seq.found is None or self.costs is None:  # nothing, or the tiers are gone since
            return 0
        first = matched - seq.asked_from
        if first < 0:
            return None if seq.asked < MOST_LOOKUPS else 0
        tiers = [offer.tier for offer in seq.found.offers[first:]]
        count = self.costs.blocks_to_load(tiers)
        load.blocks_loaded += count
        load.blocks_recomputed += len(tiers) - count
        return count

    def forget(self, seq: Sequence) -> None:
        """Nothing more of what was found for a sequence is wanted."""
        if seq.found is not None:
            self.unwanted.append(seq.found)
            seq.found = None

    def fetch(self, seq: Sequence, first: int, blocks: list[int], runs: bool) -> None:
        """Have what was found, from offer `first` on, copied into `blocks`."""
        assert seq.found is not None
        self.tickets += 1
        self.fetching[self.tickets] = (seq, blocks, runs)
        self.fetches.append((self.tickets, seq.found, first, blocks))
        seq.found = None

    def fetched(self, answer: Fetched) -> tuple[Sequence, list[int], bool]:
        """Who asked for this, into which blocks, and whether it runs here now."""
        for tier, many in answer.blocks.items():
            if many and self.costs is not None:
                self.costs.loaded(tier, many * self.costs.block_bytes, answer.seconds[tier])
        return self.fetching.pop(answer.name)
