"""RTC, the Relational Tensor Cache: who holds which KV block, by prefix and by id.

Calls carry the paper's names. This is the device tier: the blocks of one TE's own KV cache. State is soft: losing all of it costs
recomputation and never an answer. RTC knows block numbers, keys and reference counts; it never touches a tensor.

A block is in exactly one of three conditions:

    free        on the free list or never used so far, no key
    cached      reference count 0, has a key, waits in `idle` (oldest first) to be matched again or evicted
    referenced  reference count > 0; has a key once it is full and computed (`commit`)

Keyed blocks form the prefix tree: a block's parent is the block before it. A sequence that references a block references its
parents too, and `free` drops a sequence's blocks last to first, so a child always becomes idle before its parent: the oldest idle
block never has a cached child, and eviction takes leaves only without searching for them.

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
        self.by_id: dict[str, list[int]] = {}  # explicit contexts; each holds a reference on its blocks
        self.free_list: list[int] = []
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.evictions = 0

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
        """The blocks that `preserve` keeps under an explicit id."""
        blocks = self.by_id.get(name)
        return None if blocks is None else Match(list(blocks))

    def preserve(self, name: str, blocks: Seq[int]) -> None:
        """Keep keyed `blocks` (a prefix, first to last) under `name` until `forget`. Replaces what the name held."""
        for block in blocks:
            if self.keys[block] is None:
                raise ValueError(f"block {block} is not committed and can't be preserved")
        for block in blocks:
            self._reference(block)
        self.forget(name)
        self.by_id[name] = list(blocks)

    def forget(self, name: str) -> None:
        self.free(self.by_id.pop(name, []))

    # ---- populate: make a match usable ------------------------------------------------------------------------------
    def populate(self, match: Match) -> list[int]:
        """Pin a match's blocks for one sequence and return them. Device-tier blocks are usable at once."""
        for block in match.blocks:
            self._reference(block)
        return list(match.blocks)

    def query_populate(self, blocks: Seq[int]) -> bool:
        """Whether populated blocks can be read by the next step. In the device tier they always can."""
        return all(self.refs[b] > 0 for b in blocks)

    # ---- allocation -------------------------------------------------------------------------------------------------
    @property
    def available(self) -> int:
        """Blocks that could be allocated now, evicting idle ones."""
        return len(self.free_list) + self.blocks - self.touched + len(self.idle)

    @property
    def used(self) -> int:
        """Blocks that live sequences or preserved contexts reference."""
        return self.blocks - self.available

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
                    self.idle[block] = None

    def reset(self) -> None:
        """Forget every idle block."""
        while self.idle:
            self.free_list.append(self._evict())

    # ---- inside -----------------------------------------------------------------------------------------------------
    def _reference(self, block: int) -> None:
        if self.refs[block] == 0:
            del self.idle[block]
        self.refs[block] += 1

    def _take(self) -> int:
        if self.free_list:
            block = self.free_list.pop()
        elif self.touched < self.blocks and (self.touched < self.reach or not self.idle):
            block = self.touched
            self.touched += 1
        else:
            if self.touched < self.blocks:  # else the reach can't grow
                self._remember(next(iter(self.idle)))
            block = self._evict()
        self.refs[block] = 1
        return block

    def _remember(self, block: int) -> None:
        key = self.keys[block]
        assert key is not None
        self.ghosts[key] = None
        if len(self.ghosts) > self.blocks:
            self.ghosts.popitem(last=False)

    def _evict(self) -> int:
        block, _ = self.idle.popitem(last=False)
        key = self.keys[block]
        assert key is not None
        del self.by_key[key]
        self.keys[block] = None
        self.parents[block] = -1
        self.evictions += 1
        return block

    def check(self) -> None:
        """Verify every invariant; raises AssertionError. For tests: it visits every block."""
        free, idle = set(self.free_list), set(self.idle)
        assert len(free) == len(self.free_list), "a block is on the free list twice"
        assert all(block < self.touched for block in free | idle), "a block was given back before it was taken"
        assert len(self.ghosts) <= self.blocks, "more ghosts than blocks"
        free |= set(range(self.touched, self.blocks))
        assert not free & idle, "a block is both free and idle"
        for block in range(self.blocks):
            key, refs = self.keys[block], self.refs[block]
            assert (refs == 0) == (block in free or block in idle), f"block {block}: {refs} references"
            assert (block in free) <= (key is None), f"free block {block} has a key"
            assert (block in idle) <= (key is not None), f"idle block {block} has no key"
            if key is not None:
                assert self.by_key.get(key) == block, f"block {block} is not found by its key"
                parent = self.parents[block]
                if parent >= 0:
                    assert self.keys[parent] is not None, f"block {block}: its parent {parent} was evicted first"
                    assert self.refs[parent] >= 1 or refs == 0, f"block {block} is referenced, its parent {parent} not"
        assert len(self.by_key) == sum(k is not None for k in self.keys), "a key leads nowhere"
        position = {block: i for i, block in enumerate(self.idle)}
        for block in self.idle:
            parent = self.parents[block]
            if parent in position:
                assert position[block] < position[parent], f"idle parent {parent} would be evicted before {block}"
        for name, blocks in self.by_id.items():
            assert all(self.refs[b] > 0 for b in blocks), f"context {name} lost a block"
