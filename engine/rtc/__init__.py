"""RTC, the Relational Tensor Cache: who holds which KV block, by prefix and by id.

Calls carry the paper's names. This module is the device tier, the blocks of one TE's own KV cache. The slower tiers are beside
it: pool.py (their index, in the keeper), loads.py (what sequences want of them), tiers.py (their copies, in the TE), ssd.py (the
files), cost.py (load or recompute), news.py (what the control process is told of all that).
State is soft: losing all of it costs recomputation and never an answer. RTC knows block numbers, keys and reference counts; it
never touches a tensor.

A block is in exactly one of four conditions:

    free        on the free list or never used so far, no key
    cached      reference count 0, has a key, waits in `idle` to be matched again or evicted
    copied      as cached, but being copied to a slower tier: it can be matched, and not be evicted until that is through
    referenced  reference count > 0; has a key once it is full and computed (`commit`); it may be being copied too

Keyed blocks form the prefix tree: a block's parent is the block before it. A sequence that references a block references its
parents too, and `free` drops a sequence's blocks last to first, so a child always becomes idle before its parent; and what a
request asks to be kept holds for all of its prefix (`retain`). So the idle block with the least priority never has a cached
child, and eviction takes leaves only without searching for them.

Idle blocks go by last use; `cache_ttl`, a session or an explicit context raise a block's priority for a while (order.py). The
time is `now`, which messages bring, so that every rank of a TE evicts the same block.

Where memory is committed as blocks are first written, a block that was never used costs page faults, and memory that something
else on the box could have, while most idle blocks are never asked for again. So the first `reach` blocks are recycled, oldest
idle one first, before another is touched. What that costs is seen in `ghosts`, the keys of evicted blocks: a prompt that would
have matched so many more makes the reach as much longer, up to all blocks there are. Live sequences get what they need,
whatever the reach.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from engine.rtc.keys import block_keys, root_key
from engine.rtc.order import Order, Place

__all__ = ["RTC", "Match", "block_keys", "root_key"]


@dataclass(slots=True, frozen=True)
class Match:
    """Blocks that hold the KV of a prompt's first `len(blocks) * block_size` tokens. Not pinned until `populate`."""

    blocks: list[int]


class RTC:
    def __init__(self, blocks: int, block_size: int, prefix_caching: bool = True, reach: int | None = None):
        """`reach`: blocks that are put to use before idle ones are recycled; None: all, as where memory is committed anyway."""
        self.blocks = blocks
        self.reach = blocks if reach is None else min(reach, blocks)
        self.touched = 0  # blocks from this number on were never used
        self.ghosts: OrderedDict[bytes, None] = OrderedDict()  # keys of evicted blocks, oldest first
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.refs = [0] * blocks
        self.keys: list[bytes | None] = [None] * blocks
        self.parents = [-1] * blocks  # the block before, for keyed blocks; -1: first of a prompt
        self.by_key: dict[bytes, int] = {}
        self.by_id: dict[str, tuple[list[bytes], float]] = {}  # explicit contexts: keys, and until when
        self.free_list: list[int] = []
        self.now = 0.0  # seconds of the clock that `until` is of; grows with messages
        self.until = [0.0] * blocks  # ... up to which a keyed block is to be kept
        self.idle: Order[int] = Order()
        self.unsaved: Order[int] | None = None  # idle blocks that no slower tier has been offered; None: there is none
        self.copied: dict[int, Place | None] = {}  # blocks being copied -> their place in `idle`; None: referenced
        self.evictions = 0
        self.losses = 0  # of these, blocks that no slower tier was offered
        # Keys that came (True) or went since somebody looked last (news.py); None: nobody does.
        self.news: dict[bytes, bool] | None = None

    # ---- matching ---------------------------------------------------------------------------------------------------
    def match_by_prefix_token(self, keys: Seq[bytes], tokens: int) -> Match:
        """The longest cached prefix of a prompt of `tokens` tokens whose full blocks have `keys`.

        One token at least stays uncached, so that prefill has a row to sample from."""
        found: list[int] = []
        if self.prefix_caching:
            keys = keys[: (tokens - 1) // self.block_size]
            for key in keys:
                block = self.by_key.get(key)
                if block is None:
                    break
                found.append(block)
            for key in keys[len(found) :]:
                if key not in self.ghosts:
                    break
                del self.ghosts[key]  # counted once
                self.reach = min(self.reach + 1, self.blocks)
        return Match(found)

    def match_by_id(self, name: str) -> Match | None:
        """The blocks that are here of the explicit context `name`, from its first on; None where it isn't known."""
        found = self.by_id.get(name)
        return None if found is None else self.match_by_prefix_token(found[0], len(found[0]) * self.block_size + 1)

    def preserve(self, name: str, keys: Seq[bytes], until: float) -> None:
        """Know the prefix with these block keys as `name`, and keep its blocks with priority, until then or `forget`."""
        self.by_id = {n: (k, t) for n, (k, t) in self.by_id.items() if t > self.now}
        self.by_id[name] = (list(keys), until)
        self.retain([self.by_key[key] for key in keys if key in self.by_key], until)

    def forget(self, name: str) -> None:
        """A context is deleted: its blocks go by their use, but for what other requests asked to be kept after them."""
        keys, until = self.by_id.pop(name, ([], 0.0))
        held = {self.by_key[key]: 0.0 for key in keys if key in self.by_key}
        for block, parent in enumerate(self.parents):
            if parent in held and block not in held:
                held[parent] = max(held[parent], self.until[block])
        least = 0.0
        for block in reversed(held):
            least = max(least, held[block])
            if self.until[block] <= until:
                self.until[block] = min(least, self.until[block])
                self._refresh(block)
            least = max(least, self.until[block])

    def retain(self, blocks: Seq[int], until: float) -> None:
        """Keep these blocks, a prefix from its first block on, with priority until then."""
        for block in reversed(blocks):
            if until > self.until[block]:
                self.until[block] = until
                self._refresh(block)

    def holds(self, key: bytes) -> bool:
        """Whether a block is findable under `key`."""
        return key in self.by_key

    # ---- populate: make a match usable ------------------------------------------------------------------------------
    def populate(self, match: Match) -> list[int]:
        """Pin a match's blocks for one sequence and return them. Device-tier blocks are usable at once."""
        for block in match.blocks:
            self._reference(block)
        return list(match.blocks)

    def query_populate(self, blocks: Seq[int]) -> bool:
        """Whether populated blocks can be read by the next step. In the device tier they always can."""
        return all(self.refs[b] > 0 for b in blocks)

    def hold(self, blocks: Seq[int]) -> None:
        """One more reference on blocks that have one, while a slower tier is copied into them: whoever ends meanwhile does not
        give them away."""
        for block in blocks:
            self.refs[block] += 1

    # ---- allocation -------------------------------------------------------------------------------------------------
    @property
    def available(self) -> int:
        """Blocks that could be allocated now, evicting idle ones."""
        return len(self.free_list) + self.blocks - self.touched + len(self.idle)

    @property
    def used(self) -> int:
        """Blocks that live sequences reference."""
        return self.blocks - self.available - sum(place is not None for place in self.copied.values())

    def alloc_blocks(self, count: int) -> list[int] | None:
        """`count` private blocks, or None (and nothing taken) where there are not so many."""
        if count > self.available:
            return None
        return [self._take() for _ in range(count)]

    def append_block(self) -> int | None:
        """One more private block, or None."""
        return self._take() if self.available else None

    def commit(self, block: int, key: bytes, parent: int) -> int:
        """`block` is full and computed: make it findable under `key`, after `parent` (-1: a prompt's first).

        Returns the block to use from now on: another one where equal content was committed before, in which case the caller's
        reference moves there and `block` is freed."""
        if not self.prefix_caching:
            return block
        known = self.by_key.get(key)
        if known is None:
            self.by_key[key] = block
            self.keys[block] = key
            self.parents[block] = parent
            if self.news is not None:
                self.news[key] = True
            return block
        if known != block:
            self._reference(known)
            self.free([block])
        return known

    def free(self, blocks: Seq[int]) -> None:
        """Drop one reference on each; `blocks` in prompt order."""
        for block in reversed(blocks):
            refs = self.refs[block] - 1
            if refs < 0:
                raise ValueError(f"block {block} is freed more often than it was referenced")
            self.refs[block] = refs
            if refs == 0:
                if self.keys[block] is None:
                    self.free_list.append(block)
                else:
                    self._rest(block)

    def reset(self) -> None:
        """Forget every idle block that isn't being copied."""
        while self.idle:
            self.free_list.append(self._evict())

    # ---- copy: background swap-out ----------------------------------------------------------------------------------
    @property
    def spare(self) -> int:
        """Blocks that could be taken without losing one that no slower tier has been offered."""
        unsaved = len(self.unsaved) if self.unsaved is not None else 0
        return len(self.free_list) + max(0, self.reach - self.touched) + len(self.idle) - unsaved

    def copy(self, count: int) -> list[int]:
        """Up to `count` idle blocks, those that would be evicted first, to be copied to a slower tier. They stay as they are
        until `copy_done`."""
        out: list[int] = []
        while self.unsaved and len(out) < count:
            block = self.unsaved.pop(self.now)
            self.copied[block] = self.idle.take(block)
            out.append(block)
        return out

    def copy_done(self, blocks: Seq[int]) -> None:
        """These blocks are no longer read by a copy. Whether they were kept makes no difference here: what a tier refused once it
        would refuse again."""
        for block in blocks:
            place = self.copied.pop(block)
            if place is None:
                continue
            if self.keys[block] is None:
                self.free_list.append(block)
            else:
                self.idle.put_back(block, place, self.now)

    # ---- inside -----------------------------------------------------------------------------------------------------
    def _reference(self, block: int) -> None:
        if self.refs[block] == 0:
            if block in self.copied:
                self.copied[block] = None
            else:
                self.idle.discard(block)
                if self.unsaved is not None:
                    self.unsaved.discard(block)
        self.refs[block] += 1

    def _rest(self, block: int) -> None:
        """A keyed block has lost its last reference."""
        self.idle.add(block, self.now, self.until[block])
        if block in self.copied:
            self.copied[block] = self.idle.take(block)
        elif self.unsaved is not None:
            self.unsaved.add(block, self.now, self.until[block])

    def _refresh(self, block: int) -> None:
        """A keyed block's time of retention has changed."""
        if block in self.idle:
            self.idle.keep(block, self.until[block], self.now)
        elif (place := self.copied.get(block)) is not None:
            self.copied[block] = (place[0], self.until[block], place[2])
        if self.unsaved is not None and block in self.unsaved:
            self.unsaved.keep(block, self.until[block], self.now)

    def _take(self) -> int:
        if self.free_list:
            block = self.free_list.pop()
        elif self.touched < self.blocks and (self.touched < self.reach or not self.idle):
            block = self.touched
            self.touched += 1
        else:
            if self.touched < self.blocks:  # else the reach can't grow
                self._remember()
            block = self._evict()
        self.refs[block] = 1
        return block

    def _remember(self) -> None:
        block = self.idle.first(self.now)
        key = self.keys[block] if block is not None else None
        assert key is not None
        self.ghosts[key] = None
        if len(self.ghosts) > self.blocks:
            self.ghosts.popitem(last=False)

    def _evict(self) -> int:
        block = self.idle.pop(self.now)
        self._drop_key(block)
        self.evictions += 1
        if self.unsaved is not None and block in self.unsaved:
            self.unsaved.discard(block)
            self.losses += 1
        return block

    def _drop_key(self, block: int) -> None:
        """Nobody finds the block any more, nor what came after it and is only here because it is being copied."""
        key = self.keys[block]
        assert key is not None
        del self.by_key[key]
        if self.news is not None:
            self.news[key] = False
        self.keys[block] = None
        self.parents[block] = -1
        self.until[block] = 0.0
        for child in [child for child in self.copied if self.parents[child] == block]:
            self._drop_key(child)

    def check(self) -> None:
        """Verify every invariant; raises AssertionError. For tests: it visits every block."""
        free, idle = set(self.free_list), set(self.idle)
        assert len(free) == len(self.free_list), "a block is on the free list twice"
        assert all(block < self.touched for block in free | idle), "a block was given back before it was taken"
        assert len(self.ghosts) <= self.blocks, "more ghosts than blocks"
        free |= set(range(self.touched, self.blocks))
        assert not free & idle, "a block is both free and idle"
        assert all((place is None) == (self.refs[block] > 0) for block, place in self.copied.items())
        assert not idle & set(self.copied), "a block that is being copied could be evicted"
        assert self.unsaved is None or set(self.unsaved) <= idle
        waiting = idle | {block for block, place in self.copied.items() if place is not None}
        for block in range(self.blocks):
            key, refs = self.keys[block], self.refs[block]
            assert (refs == 0) == (block in free or block in waiting), f"block {block}: {refs} references"
            assert (block in free) <= (key is None), f"free block {block} has a key"
            assert (block in idle) <= (key is not None), f"idle block {block} has no key"
            if key is not None:
                assert self.by_key.get(key) == block, f"block {block} is not found by its key"
                parent = self.parents[block]
                if parent >= 0:
                    assert self.keys[parent] is not None, f"block {block}: its parent {parent} was evicted first"
                    assert self.refs[parent] >= 1 or refs == 0, f"block {block} is referenced, its parent {parent} not"
                    assert self.until[parent] >= self.until[block], f"block {block} is kept longer than its parent {parent}"
        assert len(self.by_key) == sum(k is not None for k in self.keys), "a key leads nowhere"
        order = {block: self.idle.priority(block, self.now) for block in self.idle}
        for block in self.idle:
            parent = self.parents[block]
            if parent in order:
                assert order[block] < order[parent], f"idle parent {parent} would be evicted before {block}"
