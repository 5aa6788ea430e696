from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.rtc import RTC, block_keys, root_key
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


def test_preserved_context_is_not_evicted():
    rtc = RTC(4, 2)
    blocks = rtc.alloc_blocks(2)
    assert blocks is not None
    with pytest.raises(ValueError, match="not committed"):
        rtc.preserve("ctx", blocks)
    commit_all(rtc, blocks, keys_of([1, 2, 3, 4], 2))
    rtc.preserve("ctx", blocks)
    rtc.free(blocks)
    assert rtc.alloc_blocks(3) is None
    match = rtc.match_by_id("ctx")
    assert match is not None and match.blocks == blocks
    rtc.forget("ctx")
    assert rtc.match_by_id("ctx") is None and rtc.alloc_blocks(4) is not None
    rtc.check()


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
    """Sequences with few distinct tokens (so prefixes meet) match, grow, commit, leave, are preserved and forgotten."""
    rng = random.Random(seed)
    rtc = RTC(blocks, size, reach=reach)
    live: list[tuple[list[int], list[int]]] = []  # (ids, blocks)
    for _ in range(60):
        action = rng.choice(["start", "start", "append", "leave", "preserve", "forget", "reset"])
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
            rtc.free(live.pop(rng.randrange(len(live)))[1])
        elif action == "preserve" and live:
            ids, held = rng.choice(live)
            rtc.preserve(rng.choice("ab"), held[: len(ids) // size])
        elif action == "forget":
            rtc.forget(rng.choice("ab"))
        elif action == "reset":
            rtc.reset()
        rtc.check()
    for _, held in live:
        rtc.free(held)
    rtc.forget("a")
    rtc.forget("b")
    rtc.check()
    assert rtc.used == 0
