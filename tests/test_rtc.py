from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.rtc import RTC, block_keys, root_key
from engine.rtc.order import Order
from engine.types import pack_ids


def keys_of(ids: list[int], size: int, salt: bytes = b"") -> list[bytes]:
    return list(block_keys(root_key(salt), pack_ids(ids), size))


def commit_all(rtc: RTC, blocks: list[int], keys: list[bytes]) -> None:
    for i, key in enumerate(keys):
        blocks[i] = rtc.commit(blocks[i], key, blocks[i - 1] if i else -1)


def test_keys_chain_and_salt():
    a, b = keys_of([1, 2, 3, 4, 5, 6, 7, 8, 9], 4), keys_of([1, 2, 3, 4, 5, 6, 7, 0], 4)
    assert len(a) == 2 and a[0] == b[0] and a[1] != b[1]
    assert keys_of([5, 6, 7, 8], 4)[0] != a[1], "a block's key must depend on what came before it"
    assert keys_of([1, 2, 3, 4], 4, b"tenant")[0] != a[0]
    assert list(block_keys(a[0], pack_ids([5, 6, 7, 8]), 4)) == a[1:]


def test_match_leaves_one_token_and_revives_freed_blocks():
    rtc = RTC(8, 4)
    ids = list(range(8))
    blocks = rtc.alloc_blocks(2)
    assert blocks is not None
    commit_all(rtc, blocks, keys_of(ids, 4))
    rtc.free(blocks)
    rtc.check()
    assert rtc.used == 0 and rtc.available == 8
    assert rtc.match_by_prefix_token(keys_of(ids, 4), 8).blocks == blocks[:1], "the last token must be computed to sample from it"
    assert rtc.match_by_prefix_token(keys_of(ids, 4), 9).blocks == blocks
    held = rtc.populate(rtc.match_by_prefix_token(keys_of(ids, 4), 9))
    assert rtc.query_populate(held) and rtc.used == 2
    rtc.check()


def test_alloc_is_all_or_nothing_and_evicts_children_first():
    rtc = RTC(4, 2)
    blocks = rtc.alloc_blocks(3)
    assert blocks is not None
    keys = keys_of([1, 2, 3, 4, 5, 6], 2)
    commit_all(rtc, blocks, keys)
    rtc.free(blocks)
    assert rtc.alloc_blocks(5) is None and rtc.available == 4
    taken = rtc.alloc_blocks(2)  # the free one and the last child
    assert taken is not None and rtc.evictions == 1
    assert rtc.match_by_prefix_token(keys, 99).blocks == blocks[:2]
    rtc.check()


def test_equal_content_committed_twice_is_one_block():
    rtc = RTC(8, 2)
    keys = keys_of([1, 2, 3, 4], 2)
    a, b = rtc.alloc_blocks(2), rtc.alloc_blocks(2)
    assert a is not None and b is not None
    commit_all(rtc, a, keys)
    commit_all(rtc, b, keys)
    assert a == b and rtc.used == 2
    rtc.check()
    rtc.free(a)
    rtc.free(b)
    rtc.check()
    assert rtc.used == 0


def fill(rtc: RTC, ids: list[int], until: float = 0.0) -> list[int]:
    """A prompt comes, is computed, and goes: its blocks, idle now."""
    keys = keys_of(ids, rtc.block_size)
    held = rtc.populate(rtc.match_by_prefix_token(keys, 10**6))
    held += rtc.alloc_blocks(len(keys) - len(held)) or []
    commit_all(rtc, held, keys)
    rtc.retain(held, until)
    rtc.free(held)
    rtc.check()
    return held


def test_a_context_is_kept_with_priority_and_not_pinned():
    rtc = RTC(4, 2)
    keys = keys_of([1, 2, 3, 4], 2)
    kept = fill(rtc, [1, 2, 3, 4])
    rtc.preserve("ctx", keys, until=100.0)
    rtc.now = 10.0
    fill(rtc, [5, 6, 7, 8])
    rtc.now = 20.0
    fill(rtc, [9, 9, 9, 8])
    match = rtc.match_by_id("ctx")
    assert match is not None and match.blocks == kept, "what was used after it went first"
    taken = rtc.alloc_blocks(4)
    assert taken is not None, "live sequences get all"
    match = rtc.match_by_id("ctx")
    assert match is not None and match.blocks == [] and rtc.match_by_id("other") is None
    rtc.free(taken)
    rtc.now = 101.0
    rtc.preserve("new", keys, until=200.0)
    assert rtc.match_by_id("ctx") is None, "its time is over"
    rtc.check()


def test_a_forgotten_context_goes_by_its_use_but_for_what_others_keep():
    rtc = RTC(6, 2)
    fill(rtc, [1, 2, 3, 4])
    rtc.preserve("ctx", keys_of([1, 2, 3, 4], 2), until=100.0)
    rtc.now = 1.0
    branch = fill(rtc, [1, 2, 7, 7], until=50.0)
    rtc.forget("ctx")
    rtc.forget("ctx")
    rtc.check()
    assert [rtc.until[b] for b in branch] == [50.0, 50.0], "another request's text goes on from its first block"
    rtc.now = 2.0
    fill(rtc, [5, 6, 7, 8])
    rtc.now = 3.0
    assert len(rtc.alloc_blocks(2) or []) == 2  # one was free
    assert not rtc.match_by_prefix_token(keys_of([1, 2, 3, 4], 2), 99).blocks[1:], "its last block was the oldest"
    assert rtc.match_by_prefix_token(keys_of([1, 2, 7, 7], 2), 99).blocks == branch


def test_retention_outlives_later_use_and_decays():
    rtc = RTC(4, 2)
    kept = fill(rtc, [1, 2, 3, 4], until=30.0)
    rtc.now = 20.0
    fill(rtc, [5, 6])
    rtc.now = 21.0
    fill(rtc, [7, 8])
    rtc.now = 22.0
    fill(rtc, [9, 9])
    assert rtc.match_by_prefix_token(keys_of([1, 2, 3, 4], 2), 99).blocks == kept[:1], "8 s are left of it: as if used 14 s ago"
    rtc.now = 31.0
    fill(rtc, [6, 6])
    assert rtc.match_by_prefix_token(keys_of([1, 2, 3, 4], 2), 99).blocks == [], "it is the oldest now"


def test_blocks_that_are_copied_can_be_matched_and_not_evicted():
    rtc = RTC(4, 2)
    rtc.unsaved = Order()
    first, second = fill(rtc, [1, 2, 3, 4]), fill(rtc, [5, 6, 7, 8])
    assert rtc.spare == 0
    copied = rtc.copy(3)
    assert copied == [first[1], first[0], second[1]], "in the order in which they would be evicted"
    rtc.check()
    assert rtc.available == 1 and rtc.used == 0 and rtc.alloc_blocks(2) is None
    held = rtc.populate(rtc.match_by_prefix_token(keys_of([1, 2, 3, 4], 2), 99))
    assert held == first
    rtc.check()
    rtc.copy_done(copied)
    rtc.check()
    assert rtc.spare == 1, "the copied one that nobody uses"
    taken = rtc.alloc_blocks(2)
    assert taken == [second[1], second[0]] and rtc.losses == 1, "its place is what it was before the copy"
    rtc.free(held)
    rtc.check()
    assert rtc.copy(9) == [first[1], first[0]], "used again: offered again, last"


def test_freeing_too_often_is_refused():
    rtc = RTC(2, 2)
    blocks = rtc.alloc_blocks(1)
    assert blocks is not None
    rtc.free(blocks)
    with pytest.raises(ValueError, match="more often"):
        rtc.free(blocks)


def test_off_means_off():
    rtc = RTC(4, 2, prefix_caching=False)
    blocks = rtc.alloc_blocks(1)
    assert blocks is not None
    keys = keys_of([1, 2], 2)
    commit_all(rtc, blocks, keys)
    assert rtc.match_by_prefix_token(keys, 99).blocks == []


def test_idle_blocks_are_recycled_until_one_of_them_is_missed():
    rtc = RTC(8, 2, reach=2)
    first, second = keys_of([1, 2, 3, 4], 2), keys_of([5, 6, 7, 8], 2)

    def run(keys: list[bytes]) -> int:
        """A prompt comes and goes; returns how many of its blocks were cached."""
        held = rtc.populate(rtc.match_by_prefix_token(keys, 99))
        found = len(held)
        held += rtc.alloc_blocks(len(keys) - found) or []
        commit_all(rtc, held, keys)
        rtc.free(held)
        rtc.check()
        return found

    assert run(first) == 0 and run(second) == 0
    assert rtc.touched == 2 and rtc.evictions == 2, "the second prompt took the first one's blocks"
    assert run(first) == 0
    assert rtc.reach == 4 and rtc.touched == 4, "two blocks were missed, and no other is lost for them"
    assert run(second) == 2 and run(first) == 2
    live = rtc.alloc_blocks(8)
    assert live is not None and rtc.touched == 8, "live sequences may use all"
    rtc.free(live)
    rtc.check()


def test_reset_leaves_nothing_to_be_missed():
    rtc = RTC(4, 2, reach=1)
    blocks = rtc.alloc_blocks(1)
    assert blocks is not None
    keys = keys_of([1, 2], 2)
    commit_all(rtc, blocks, keys)
    rtc.free(blocks)
    rtc.reset()
    assert not rtc.match_by_prefix_token(keys, 99).blocks and rtc.reach == 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.integers(1, 24), size=st.integers(1, 4), reach=st.integers(0, 24))
def test_random_walk_keeps_every_invariant(seed, blocks, size, reach):
    """Sequences with few distinct tokens (so prefixes meet) match, grow, commit, leave, are kept, copied and forgotten."""
    rng = random.Random(seed)
    rtc = RTC(blocks, size, reach=reach)
    rtc.unsaved = Order() if rng.random() < 0.7 else None
    live: list[tuple[list[int], list[int]]] = []  # (ids, blocks)
    copied: list[int] = []
    for _ in range(60):
        rtc.now += rng.choice([0, 0, 1, 5])
        action = rng.choice(["start", "start", "append", "leave", "leave", "preserve", "forget", "reset", "copy", "copied"])
        if action == "start":
            ids = [rng.randrange(2) for _ in range(rng.randrange(1, 4 * size + 1))]
            keys = keys_of(ids, size)
            held = rtc.populate(rtc.match_by_prefix_token(keys, len(ids)))
            more = rtc.alloc_blocks(-(-len(ids) // size) - len(held))
            if more is None:
                rtc.free(held)
            else:
                held += more
                commit_all(rtc, held, keys)
                live.append((ids, held))
        elif action == "append" and live:
            ids, held = rng.choice(live)
            block = rtc.append_block()
            if block is not None:
                held.append(block)
        elif action == "leave" and live:
            ids, held = live.pop(rng.randrange(len(live)))
            rtc.retain(held[: len(ids) // size], rtc.now + rng.choice([0, 3, 20]))
            rtc.free(held)
        elif action == "preserve" and live:
            ids, held = rng.choice(live)
            rtc.preserve(rng.choice("ab"), keys_of(ids, size), rtc.now + rng.choice([1, 10]))
        elif action == "copy":
            copied += rtc.copy(rng.randrange(4))
        elif action == "copied":
            rtc.copy_done(copied)
            copied = []
        elif action == "forget":
            rtc.forget(rng.choice("ab"))
        elif action == "reset":
            rtc.reset()
        rtc.check()
    for _, held in live:
        rtc.free(held)
    rtc.copy_done(copied)
    rtc.forget("a")
    rtc.forget("b")
    rtc.check()
    assert rtc.used == 0
