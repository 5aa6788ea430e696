"""The global prompt tree against a dictionary of sets, told of by TEs whose news is lost, doubled and overtaken."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from engine.types import BlockNews
from sched.prompt_tree import AGES, SHARDS, Match, PromptTree, bits_of


def chain(*texts: int) -> list[bytes]:
    """Keys of a prompt, a block for each of `texts`."""
    keys, parent = [], b""
    for text in texts:
        parent = hashlib.blake2b(text.to_bytes(4, "little"), key=parent, digest_size=16).digest()
        keys.append(parent)
    return keys


def found(match: Match) -> dict[int, int]:
    return dict(zip(match.tes.tolist(), match.blocks.tolist(), strict=True))


def prefix(have: set[bytes], keys: list[bytes]) -> int:
    return next((i for i, key in enumerate(keys) if key not in have), len(keys))


def holders(tree: PromptTree, key: bytes) -> set[int]:
    """The TEs that the tree thinks have a block."""
    mask = tree.masks[tree.shards[key[0]].get(key, 0)]
    return {te for te, bit in tree.bits.items() if mask >> bit & 1}


def test_each_te_is_found_with_its_own_part_of_a_prompt():
    tree, keys = PromptTree(16), chain(1, 2, 3, 4, 5)
    assert found(tree.match(keys)) == {} and found(tree.match([])) == {}
    tree.stored(700, keys)
    tree.stored(3, keys[:2])
    tree.stored(5, chain(1, 2, 3, 9))
    assert found(tree.match(keys)) == {700: 5, 3: 2, 5: 3}
    assert found(tree.match(keys[:2])) == {700: 2, 3: 2, 5: 2}
    assert found(tree.match(chain(1, 2, 3, 9, 9))) == {700: 3, 3: 2, 5: 4}
    assert found(tree.match(chain(2, 2))) == {}
    tree.evicted(700, keys[3:])
    tree.evicted(9, keys)
    tree.check()
    assert found(tree.match(keys)) == {700: 3, 3: 2, 5: 3} and tree.size == 4
    tree.gone(5)
    tree.gone(5)
    assert found(tree.match(keys)) == {700: 3, 3: 2}
    tree.stored(8, keys)
    tree.check()
    assert found(tree.match(keys)) == {700: 3, 3: 2, 8: 5}, "its bit was another TE's"


def test_what_follows_in_the_tiers_is_counted_for_each_te():
    tree, keys = PromptTree(16), chain(1, 2, 3, 4, 5, 6)
    tree.stored(1, keys[:1])
    tree.stored(2, keys[:3])
    tree.stored(3, keys[:4])
    tree.moved(keys[1:3], "dram")
    tree.moved(keys[4:6], "ssd")
    tree.moved(keys[5:6], "dram")
    match = tree.match(keys)
    rows = dict(zip(match.tes.tolist(), match.tiers[:-1].tolist(), strict=True))
    assert rows == {1: [2, 0], 2: [0, 0], 3: [1, 1]} and match.tiers[-1].tolist() == [0, 0]
    tree.moved(keys[:1], "ssd")
    tree.moved(keys[3:4], "ssd")
    match = tree.match(keys)
    rows = dict(zip(match.tes.tolist(), match.tiers[:-1].tolist(), strict=True))
    assert rows == {1: [3, 2], 2: [1, 2], 3: [1, 1]} and match.tiers[-1].tolist() == [3, 3]
    tree.moved(keys[4:5], None)
    assert tree.match(keys).tiers.tolist() == [[2, 1], [0, 1], [0, 0], [2, 2]]
    assert tree.match(chain(7, 8)).tiers.tolist() == [[0, 0]]
    tree.tiers_gone()
    assert not tree.match(keys).tiers.any()


class TE:
    """Blocks of random prompts, in an order in which no parent goes before its child; and the news of them."""

    def __init__(self, te: int, rng: random.Random):
        self.te, self.rng = te, rng
        self.have: dict[bytes, list[bytes]] = {}  # with the keys before it
        self.told: set[bytes] = set()
        self.number = 0

    def work(self) -> None:
        keys = prompt(self.rng)
        self.have |= {key: keys[:i] for i, key in enumerate(keys)}
        for _ in range(self.rng.randrange(12)):
            parents = {key for before in self.have.values() for key in before}
            if leaves := [key for key in self.have if key not in parents]:
                del self.have[self.rng.choice(leaves)]

    def news(self, whole: bool = False) -> BlockNews:
        self.number += 1
        have = set(self.have)
        stored, evicted = (have, set()) if whole else (have - self.told, self.told - have)
        self.told = have
        return BlockNews(self.number, b"".join(stored), b"".join(evicted), whole=whole)


def prompt(rng: random.Random) -> list[bytes]:
    """A text of a few families, so that TEs share beginnings."""
    return chain(*(rng.randrange(2 if i < 3 else 3) for i in range(rng.randrange(1, 9))))


@pytest.mark.parametrize("seed", range(8))
def test_a_random_walk_without_loss_is_exact(seed):
    rng = random.Random(seed)
    tree, tes, born = PromptTree(16), {n: TE(n, rng) for n in range(6)}, 6
    for _ in range(250):
        te = rng.choice(list(tes.values()))
        if rng.random() < 0.05:
            tree.gone(te.te)
            del tes[te.te]
            tes[born] = TE(born, rng)
            born += 1
            continue
        te.work()
        assert tree.hear(te.te, te.news(whole=rng.random() < 0.1))
        tree.check()
        keys = prompt(rng)
        matched = tree.match(keys)
        assert found(matched) == {n: length for n, te in tes.items() if (length := prefix(te.told, keys))}
        tree.check()
    assert tree.size <= SHARDS + len({key for te in tes.values() for key in te.told}), "what died is forgotten by and by"


@pytest.mark.parametrize("seed", range(8))
def test_lost_doubled_and_overtaken_news_is_mended_when_the_te_tells_all(seed):
    rng = random.Random(seed)
    tree, tes = PromptTree(16), {n: TE(n, rng) for n in range(5)}
    late: list[tuple[int, BlockNews]] = []

    def arrive(number: int, news: BlockNews) -> None:
        if not tree.hear(number, news) and number in tes and rng.random() < 0.5:  # what asks for all may be lost too
            late.append((number, tes[number].news(whole=True)))

    for step in range(300):
        te = rng.choice(list(tes.values()))
        te.work()
        late.append((te.te, te.news()))
        while late and rng.random() < 0.7:
            number, news = late[-1] if rng.random() < 0.2 else late.pop(rng.randrange(len(late)))
            if rng.random() > 0.15:
                arrive(number, news)
        if step % 100 == 99:
            del tes[te.te]
            tree.gone(te.te)
            late = [(number, news) for number, news in late if number != te.te]
        tree.check()
        keys = prompt(rng)
        for number, length in found(tree.match(keys)).items():
            assert number in holders(tree, keys[0]) and number in holders(tree, keys[length - 1])
            assert length == len(keys) or number not in holders(tree, keys[length])
    assert len(tes) == 2
    for te in tes.values():
        if not tree.hear(te.te, te.news()):
            assert tree.hear(te.te, te.news(whole=True))
    for keys in [prompt(rng) for _ in range(50)]:
        assert found(tree.match(keys)) == {n: length for n, te in tes.items() if (length := prefix(te.told, keys))}
    tree.check()


def test_a_te_that_lacks_a_block_in_the_middle_counts_up_to_that():
    tree, keys = PromptTree(16), chain(1, 2, 3, 4)
    tree.stored(2, keys)
    tree.stored(5, keys[:2])
    tree.stored(1, [keys[0], keys[2]])
    assert found(tree.match(keys)) == {1: 1, 5: 2, 2: 4}


def test_news_of_a_te_that_is_gone_brings_it_back_only_with_all_that_it_has():
    tree, keys = PromptTree(16), chain(1, 2)
    assert tree.hear(1, BlockNews(1, b"".join(keys)))
    tree.gone(1)
    assert not tree.hear(1, BlockNews(2, keys[0])) and found(tree.match(keys)) == {}
    assert tree.hear(1, BlockNews(3, keys[0], whole=True)) and found(tree.match(keys)) == {1: 1}
    assert tree.hear(1, BlockNews(2, keys[1])) and found(tree.match(keys)) == {1: 1}, "overtaken"


def test_the_least_recently_matched_is_forgotten_first():
    limit = 64
    tree, used = PromptTree(16, limit), chain(*range(1000, 1006))
    tree.stored(1, used)
    for text in range(100):
        tree.stored(2, chain(text, text, text))
        assert found(tree.match(used)) == {1: 6}, "asked for all the time"
        assert found(tree.match(chain(text, text, text))) == {2: 3}
        assert tree.size <= limit
        tree.check()
    assert found(tree.match(chain(0, 0, 0))) == {}
    kept = sum(bool(found(tree.match(chain(text, text, text)))) for text in range(100))
    assert kept * 3 >= limit - len(used) - 2 * limit // AGES, "no more is forgotten than must be"
    tree.stored(3, chain(*range(2 * limit)))
    tree.check()
    tree.moved(chain(*range(2 * limit)), "dram")
    tree.check()


def test_a_dead_tes_keys_are_forgotten_by_and_by():
    tree = PromptTree(16)
    for text in range(200):
        tree.stored(1, chain(text))
    tree.stored(2, chain(7))
    tree.gone(1)
    assert tree.size == 200 and found(tree.match(chain(7))) == {2: 1} and found(tree.match(chain(8))) == {}
    for _ in range(SHARDS):
        tree.stored(2, [])
    tree.check()
    assert tree.size == 1


def test_a_long_prompt_is_not_looked_at_block_by_block():
    class Counted(list):
        looks = 0

        def __getitem__(self, at):
            self.looks += not isinstance(at, slice)
            return super().__getitem__(at)

    tree, keys = PromptTree(16), chain(*range(2000))
    for te in range(100):
        tree.stored(te, keys[:5])
    tree.stored(7, keys[:1900])
    counted = Counted(keys)
    match = tree.match(counted)
    assert found(match) == dict.fromkeys(range(100), 5) | {7: 1900}
    assert counted.looks < 40


def test_bits():
    assert bits_of(0).tolist() == [] and bits_of(1 << 1000 | 5).tolist() == [0, 2, 1000]
    assert bits_of(6).dtype == np.int64
