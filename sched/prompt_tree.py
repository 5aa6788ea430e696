"""The global prompt tree of one model: which TE has which KV block of a prompt, as far as TEs have told (`BlockNews`). Pure.

Blocks go by the keys that RTC gives them (engine/rtc/keys.py). A key is a hash over all that comes before it, so the tree's shape
is in the keys and need not be kept: a TE that has a block has what comes before that too, since it evicts leaves only. One tree
serves all types of TEs; whoever wants those of one type picks them from a match. DRAM and SSD are the box's, so their blocks are
anybody's.

What is known may be old: a match is a prediction, and wrong at the cost of time alone. It is exact for what has been told without
loss. Where news was lost (`hear` says so), a match's end is a block that the TE is thought to have before one that it isn't.

Memory: a key, and the number of the set of TEs that have its block. There are few different sets, since whole stretches of text
are shared by the same TEs. So a TE's death changes sets and no keys, and of a long prompt only those keys are looked up between
which the set changes. Keys lie in many small dictionaries, which are cleaned one after the other, lest one call takes long.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.rtc.cost import Tier
from engine.rtc.keys import KEY_BYTES
from engine.types import BlockNews

Ints = NDArray[np.int64]

MOST_BLOCKS = 1 << 21  # keys, some 250 MB: what a thousand TEs have, of 2000 blocks each that nobody shares
SHARDS = 256  # by a key's first byte
# What was least recently stored or matched is forgotten by such a part of the limit at a time. That a prompt was matched is noted
# once in so many of those parts, since it takes a look at each of its keys.
AGES, NOTED = 8, 4
NOBODY = 0  # number of the empty set


class Match(NamedTuple):
    """What there is of a prompt."""

    tes: Ints  # numbers of the TEs that have its first block on the device
    blocks: Ints  # of each: so many of the first blocks
    # (DRAM, SSD): so many blocks that follow those are there; a row for each of `tes`, and one for every TE that isn't in it.
    tiers: Ints


class PromptTree:
    def __init__(self, block_size: int, limit: int = MOST_BLOCKS):
        """`block_size`: tokens, for those who count in them. `limit`: keys that are known at most, of the devices' blocks and of
        the tiers' each."""
        self.block_size = block_size
        self.limit = limit
        self.shards: list[dict[bytes, int]] = [{} for _ in range(SHARDS)]  # key -> number of the set of TEs that have it
        self.size = 0  # keys
        self.tiers: dict[bytes, Tier] = {}  # the fastest tier that has it
        self.heard: dict[int, int] = {}  # TE -> number of the last news without a gap before it
        # Sets of TEs, by number; there may be two of equal content. Keys of an empty one are forgotten by and by.
        self.masks: list[int] = [0]  # a bit for each TE
        self.ages: list[int] = [0]  # when its keys were stored or matched last
        self.counts: list[int] = [0]  # keys
        self.members: list[Ints | None] = [None]  # the mask's bits, where they were needed
        self.numbers: dict[tuple[int, int], int] = {}  # (mask, age) -> number
        self.spare: list[int] = []  # numbers without a key
        self.bits: dict[int, int] = {}  # TE -> its bit
        self.free_bits: list[int] = []  # heap
        self.tes: Ints = np.zeros(8, np.int64)  # by bit
        self.lengths: Ints = np.zeros(8, np.int64)  # by bit: room to work in
        self.age = 1
        self.fresh = 0  # keys that came in this age
        self.unclean = 0  # shards that may have keys of empty sets
        self.next = 0  # shard to be cleaned

    # ---- what TEs tell ----------------------------------------------------------------------------------------------
    def hear(self, te: int, news: BlockNews) -> bool:
        """Take in what a TE tells. False: what it told before is missing, and it should tell all that it has."""
        last = self.heard.get(te, 0)
        if news.number <= last:
            return True  # said twice, or overtaken by all that it has
        whole = news.whole or news.number == last + 1
        if news.whole:
            self.gone(te)
        if whole:
            self.heard[te] = news.number
        if whole or te in self.bits:  # else it is one that has died, or its first news will come with the rest
            self.stored(te, keys_in(news.stored))
            self.evicted(te, keys_in(news.evicted))
        self.moved(keys_in(news.dram), "dram")
        self.moved(keys_in(news.ssd), "ssd")
        self.moved(keys_in(news.gone), None)
        return whole

    def stored(self, te: int, keys: Iterable[bytes]) -> None:
        """A TE has these blocks on its device."""
        bit, masks, before = 1 << self._bit(te), self.masks, self.size
        self._change(keys, lambda number: self._number(masks[number] | bit, self.age))
        self.fresh += self.size - before
        if self.fresh >= max(1, self.limit // AGES):
            self.age += 1
            self.fresh = 0
        while self.size > self.limit:
            if not self.unclean:
                self._forget_oldest()
            self._clean()
        if self.unclean:
            self._clean()

    def evicted(self, te: int, keys: Iterable[bytes]) -> None:
        """A TE no longer has these blocks on its device."""
        if te in self.bits:
            others, masks, ages = ~(1 << self.bits[te]), self.masks, self.ages
            self._change(keys, lambda number: self._number(masks[number] & others, ages[number]))

    def moved(self, keys: Iterable[bytes], tier: Tier | None) -> None:
        """These blocks are in a tier of the box, and in no faster one; None: in none any more."""
        for key in keys:
            if tier is None:
                self.tiers.pop(key, None)
            else:
                self.tiers[key] = tier
        if len(self.tiers) > self.limit:  # those first told of
            for key in list(islice(self.tiers, max(len(self.tiers) - self.limit, self.limit // AGES))):
                del self.tiers[key]

    def gone(self, te: int) -> None:
        """A TE is there no more, with all that it had on its device."""
        self.heard.pop(te, None)
        bit = self.bits.pop(te, None)
        if bit is None:
            return
        for number, mask in enumerate(self.masks):
            if mask >> bit & 1:
                self._set(number, mask ^ 1 << bit)
        heapq.heappush(self.free_bits, bit)

    def tiers_gone(self) -> None:
        """The box's DRAM and SSD tiers are not there any more."""
        self.tiers.clear()

    # ---- what the scheduler asks ------------------------------------------------------------------------------------
    def match(self, keys: Seq[bytes]) -> Match:
        """What each TE has of the prompt whose full blocks have `keys`. RTC leaves at least one token to compute: a prompt that
        ends with a block is to be asked for without that."""
        runs = self._runs(keys)
        tes = blocks = np.zeros(0, np.int64)
        if runs:
            (end, first), *others = runs
            alive, members = self.masks[first], self._members(first)
            self.lengths.fill(end)
            for end, number in others:
                alive &= self.masks[number]
                if not alive:
                    break
                self.lengths[self._members(number) if alive == self.masks[number] else bits_of(alive)] = end
            tes, blocks = self.tes[members], self.lengths[members]
        tiers = np.zeros((len(tes) + 1, 2), np.int64)
        if self.tiers:
            ends = [0, *(end for end, _ in runs)]
            behind = np.array(self._behind(keys, ends), np.int64)
            tiers[:-1] = behind[np.searchsorted(ends, blocks)]
            tiers[-1] = behind[0]
        return Match(tes, blocks, tiers)

    def check(self) -> None:
        """Verify every invariant; raises AssertionError. For tests."""
        counts = [0] * len(self.masks)
        for first, shard in enumerate(self.shards):
            for key, number in shard.items():
                assert key[0] == first and number != NOBODY
                counts[number] += 1
        assert counts == self.counts and sum(counts) == self.size <= self.limit and len(self.tiers) <= self.limit
        assert sorted(self.spare) == [n for n, count in enumerate(counts) if not count and n != NOBODY], "a number is lost"
        assert all(self.masks[n] == mask and self.ages[n] == age for (mask, age), n in self.numbers.items())
        assert all(mask >> (max(self.bits.values(), default=-1) + 1) == 0 for mask in self.masks)
        bits = sorted([*self.bits.values(), *self.free_bits])
        assert bits == list(range(len(bits))), "a bit is lost or owned twice"
        assert all(self.tes[bit] == te for te, bit in self.bits.items())
        dirty = any(count and not mask for count, mask in zip(counts, self.masks, strict=True))
        assert not dirty or self.unclean, "nobody will forget the keys of an empty set"

    # ---- inside: keys -----------------------------------------------------------------------------------------------
    def _change(self, keys: Iterable[bytes], to: Callable[[int], int]) -> None:
        """Put each key from the set with a number into that with the number `to` of it."""
        shards, counts = self.shards, self.counts
        steps: dict[int, int] = {}
        for key in keys:
            shard = shards[key[0]]
            old = shard.get(key, NOBODY)
            new = steps.get(old, -1)
            if new < 0:
                new = steps[old] = to(old)
            if new == old:
                continue
            if old:
                counts[old] -= 1
            else:
                self.size += 1
            if new:
                counts[new] += 1
                shard[key] = new
            else:
                del shard[key]
                self.size -= 1
        for old in steps:
            if old and not counts[old]:
                self._set(old, 0)
                self.spare.append(old)

    def _clean(self) -> None:
        """Forget the keys of empty sets in the next shard."""
        masks, shard = self.masks, self.shards[self.next]
        self._change([key for key, number in shard.items() if not masks[number]], lambda _: NOBODY)
        self.next = (self.next + 1) % SHARDS
        self.unclean -= 1

    def _forget_oldest(self) -> None:
        """Empty the sets that nothing was stored in or matched with for longest."""
        oldest = min(age for age, count in zip(self.ages, self.counts, strict=True) if count)
        for number, age in enumerate(self.ages):
            if age == oldest and self.counts[number]:
                self._set(number, 0)
        self.age = max(self.age, oldest + 1)

    # ---- inside: sets -----------------------------------------------------------------------------------------------
    def _number(self, mask: int, age: int) -> int:
        """The number of a set of TEs. Somebody puts a key in it at once."""
        if not mask:
            return NOBODY
        number = self.numbers.get((mask, age))
        if number is None:
            if self.spare:
                number = self.spare.pop()
            else:
                number = len(self.masks)
                self.masks.append(0)
                self.ages.append(0)
                self.counts.append(0)
                self.members.append(None)
            self.masks[number], self.ages[number] = mask, age
            self.numbers[mask, age] = number
        return number

    def _set(self, number: int, mask: int) -> None:
        """Another content for a set: all its keys go along."""
        was = self.masks[number], self.ages[number]
        if self.numbers.get(was) == number:
            del self.numbers[was]
        self.masks[number], self.members[number] = mask, None
        if mask:
            self.numbers.setdefault((mask, self.ages[number]), number)
        elif self.counts[number]:
            self.unclean = SHARDS

    def _members(self, number: int) -> Ints:
        found = self.members[number]
        if found is None:
            found = self.members[number] = bits_of(self.masks[number])
        return found

    def _bit(self, te: int) -> int:
        bit = self.bits.get(te)
        if bit is None:
            bit = heapq.heappop(self.free_bits) if self.free_bits else len(self.bits)
            if bit == len(self.tes):
                self.tes = np.concatenate((self.tes, np.zeros(bit, np.int64)))
                self.lengths = np.zeros(2 * bit, np.int64)
            self.bits[te] = bit
            self.tes[bit] = te
        return bit

    # ---- inside: matching -------------------------------------------------------------------------------------------
    def _runs(self, keys: Seq[bytes]) -> list[tuple[int, int]]:
        """(end, number of the set) of each stretch of blocks from the first on that the same TEs have; numbers aren't NOBODY.

        Where the sets at two blocks are the same it is so between them too."""
        shards, masks = self.shards, self.masks

        def at(block: int) -> int:
            key = keys[block]
            number = shards[key[0]].get(key, NOBODY)
            return number if masks[number] else NOBODY

        runs: list[tuple[int, int]] = []
        here = at(0) if keys else NOBODY
        if here == NOBODY:
            return runs
        begin = low = 0
        bounds = [(len(keys) - 1, at(len(keys) - 1))]  # what is looked at next is before the last of them
        while bounds and here != NOBODY:
            high, there = bounds[-1]
            if there == here:
                low = high
                bounds.pop()
            elif high - low == 1:
                runs.append((high, self._used(keys, begin, high, here)))
                begin = low = high
                here = there
                bounds.pop()
            else:
                middle = (low + high) // 2
                bounds.append((middle, at(middle)))
        if here != NOBODY:
            runs.append((len(keys), self._used(keys, begin, len(keys), here)))
        return runs

    def _used(self, keys: Seq[bytes], begin: int, end: int, number: int) -> int:
        """A stretch of a prompt was matched: the set that its keys are in from now on."""
        if self.age - self.ages[number] < NOTED:
            return number
        masks, mask = self.masks, self.masks[number]
        self._change(keys[begin:end], lambda old: self._number(masks[old], self.age))
        return self.numbers[mask, self.age]

    def _behind(self, keys: Seq[bytes], ends: list[int]) -> list[tuple[int, int]]:
        """For each block of `ends`, which ascend: how many from it on are in DRAM and how many on SSD, up to the first that isn't
        in either."""
        out: list[tuple[int, int]] = []
        start = stop = -1
        in_dram = [0]  # of the blocks from `start` to any up to `stop`
        for end in ends:
            if end >= stop:
                start = stop = end
                in_dram = [0]
                while stop < len(keys) and (tier := self.tiers.get(keys[stop])) is not None:
                    in_dram.append(in_dram[-1] + (tier == "dram"))
                    stop += 1
            dram = in_dram[-1] - in_dram[end - start]
            out.append((dram, stop - end - dram))
        return out


def keys_in(packed: bytes) -> list[bytes]:
    """The keys that lie one behind the other in `packed`."""
    return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]


def bits_of(mask: int) -> Ints:
    """The numbers of the bits that are set, ascending."""
    raw = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(raw, bitorder="little"))
