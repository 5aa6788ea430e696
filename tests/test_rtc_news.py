"""What a TE tells of its KV blocks: a prompt tree that is fed with it knows what RTC knows, whatever steps, cancels, preemptions,
handovers and swap-outs did to the blocks."""

from __future__ import annotations

import random

import msgspec
import pytest

from engine.config import Speculation
from engine.core import NEWS_SECONDS
from engine.rtc import RTC, block_keys, root_key
from engine.rtc.news import News
from engine.rtc.ssd import HEADER_BYTES
from engine.types import BlockNews, FromWorker, Recount, Tokens, ToWorker, pack_ids
from sched.prompt_tree import PromptTree, keys_in
from tests.fake_device import Engine
from tests.test_handover import Control
from tests.test_rtc_batch import SlowTiers
from tests.test_rtc_tiers import BLOCK, KEYS, TE, Host


class Listener:
    """The control process's end of one engine's news."""

    def __init__(self, engine: Engine, te: int = 0):
        self.engine, self.te, self.tree = engine, te, PromptTree(engine.rtc.block_size)
        self.news: list[BlockNews] = []
        engine.core.news = News(engine.rtc, None)

    def tell(self, message: FromWorker) -> None:
        message = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=FromWorker)
        if isinstance(message, BlockNews):
            self.news.append(message)
            assert self.tree.hear(self.te, message)
            self.tree.check()

    def flush(self) -> None:
        """The loop goes to sleep."""
        self.engine.core.receive(idle=True)
        for message in self.engine.told:
            self.tell(message)
        self.engine.collect()

    def known(self) -> set[bytes]:
        return {key for shard in self.tree.shards for key, number in shard.items() if self.tree.masks[number]}


def work(engine: Engine, rng: random.Random, task: int) -> None:
    prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
    engine.start(task, prompt, rng.randrange(1, 20), n=rng.choice([1, 1, 2]))


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_tree_fed_with_news_knows_what_rtc_knows(seed, overlapped):
    rng = random.Random(seed)
    speculation = Speculation(num_speculative_tokens=3) if seed % 2 else None
    engine = Engine(blocks=24, max_seqs=4, max_tokens=16, speculation=speculation)
    heard = Listener(engine)
    for task in range(1, 120):
        work(engine, rng, task)
        for _ in range(rng.randrange(8)):
            engine.step(overlapped, heard.tell)
        if rng.random() < 0.3:
            engine.batch.abort(rng.randrange(1, task + 1), -1)
        if rng.random() < 0.2:
            heard.flush()
            assert heard.known() == set(engine.rtc.by_key)
    while engine.step(overlapped, heard.tell):
        pass
    heard.flush()
    assert heard.known() == set(engine.rtc.by_key) and engine.rtc.by_key
    assert engine.rtc.evictions and engine.batch.load.preemptions, "the walk was too tame"
    assert [news.number for news in heard.news] == list(range(1, len(heard.news) + 1))
    assert not any(set(keys_in(n.stored)) & set(keys_in(n.evicted)) for n in heard.news)
    engine.rtc.reset()
    heard.flush()
    assert not heard.known() and not engine.rtc.by_key


def test_news_is_told_seldom_while_steps_run_and_whole_before_sleep():
    now = [0.0]
    engine = Engine(blocks=32)
    engine.core.clock = lambda: now[0]
    heard = Listener(engine)
    engine.start(1, list(range(12)), 40)
    for _ in range(20):
        engine.step(tell=heard.tell)
        now[0] += NEWS_SECONDS / 5
    assert 3 <= len(heard.news) <= 5
    for _ in range(4):  # another block is full
        engine.step(tell=heard.tell)
    assert len(heard.news) <= 5 and heard.known() < set(engine.rtc.by_key)
    heard.flush()
    assert heard.known() == set(engine.rtc.by_key)
    count = len(heard.news)
    heard.flush()
    assert len(heard.news) == count, "nothing is new"


def test_a_te_tells_all_when_asked():
    engine = Engine(blocks=32)
    heard = Listener(engine)
    engine.start(1, list(range(20)), 4)
    engine.run()
    heard.flush()
    heard.tree = PromptTree(4)
    recount = msgspec.msgpack.decode(msgspec.msgpack.encode(Recount()), type=ToWorker)
    engine.core.obey(recount)
    heard.flush()
    assert heard.news[-1].whole and heard.known() == set(engine.rtc.by_key)
    engine.rtc.reset()
    engine.core.obey(recount)
    heard.flush()
    assert heard.news[-1].whole and not heard.known(), "also that it has nothing"


def test_who_begins_to_listen_late_is_told_all():
    engine = Engine(blocks=32)
    engine.start(1, list(range(20)), 4)
    engine.run()
    assert engine.rtc.news is None, "nobody listens, nothing is noted"
    heard = Listener(engine)
    heard.flush()
    assert heard.news[0].whole and heard.known() == set(engine.rtc.by_key)


def test_a_block_that_came_and_went_between_two_news_is_told_as_gone():
    rtc = RTC(2, 4)
    news = News(rtc, None)
    assert news.take() is None
    (block,) = rtc.alloc_blocks(1) or []
    rtc.commit(block, b"k" * 16, -1)
    rtc.free([block])
    rtc.reset()
    told = news.take()
    assert told is not None and (told.stored, told.evicted) == (b"", b"k" * 16)
    assert news.take() is None


def test_a_rank_that_is_not_the_master_is_asked_in_vain():
    engine = Engine()
    engine.core.obey(Recount())
    engine.core.receive(idle=True)
    assert engine.told == []


@pytest.mark.parametrize("seed", range(3))
def test_with_swap_out_and_prefetch_the_tree_knows_what_rtc_knows(seed):
    rng = random.Random(seed)
    engine = Engine(blocks=24, max_seqs=4, max_tokens=16)
    tiers = SlowTiers(engine, rng)
    heard = Listener(engine)
    for task in range(1, 100):
        work(engine, rng, task)
        for _ in range(rng.randrange(1, 8)):
            tiers.tick()
            engine.core.receive(idle=False)
            engine.step(tell=heard.tell)
    for _ in range(2000):
        tiers.tick()
        engine.core.receive(idle=False)
        if not engine.step(tell=heard.tell) and not tiers.queue:
            break
    heard.flush()
    assert heard.known() == set(engine.rtc.by_key) and engine.batch.load.populates


@pytest.mark.parametrize("how", ["layer", "request", "lent"])
def test_of_a_pair_each_te_tells_of_its_own_blocks(how):
    class Both(Control):
        def hear(self, te, message):
            heard[te].tell(message)
            super().hear(te, message)

    rng = random.Random(how)
    control = Both(how, rng)
    heard = [Listener(engine, te) for te, engine in enumerate(control.engines)]
    tree = heard[1].tree = heard[0].tree  # one tree of both
    for task in range(1, 9):
        control.start(task, [rng.randrange(3) for _ in range(rng.randrange(8, 30))], rng.randrange(1, 12))
    control.run(overlapped=False)
    keys = list(block_keys(root_key(b""), pack_ids(control.tasks[1]["prompt"]), 4))
    for listener in heard:
        listener.flush()
    match = tree.match(keys)
    found = dict(zip(match.tes.tolist(), match.blocks.tolist(), strict=True))
    there = {te: len(e.rtc.match_by_prefix_token(keys, 10**6).blocks) for te, e in enumerate(control.engines)}
    assert found == {te: blocks for te, blocks in there.items() if blocks} and there[1] == len(keys)
    assert (0 in found) == (how != "lent"), "who computes in another's pool has no blocks of its own"


def told(te: TE) -> dict[str, list[bytes]]:
    """What a TE's news says of the slower tiers."""
    news = te.news.take()
    return {} if news is None else {tier: keys_in(getattr(news, tier)) for tier in ("dram", "ssd", "gone") if getattr(news, tier)}


@pytest.fixture
def tes(request, tmp_path):
    """Two TEs before the same tiers: so many DRAM slots, so many bytes of files."""
    slots, file_bytes = request.param
    host = Host(slots, tmp_path if file_bytes else None, file_bytes)
    pair = [host.te(), host.te()]
    for te in pair:
        te.news = News(RTC(1, 16), te.tiers)
    yield pair
    host.close()


@pytest.mark.parametrize("tes", [(4, 0)], indirect=True)
def test_who_stores_in_dram_and_who_hears_that_it_left_tell(tes):
    one, two = tes
    one.save([0, 1, 2, 3], KEYS[:4])
    assert told(one) == {"dram": KEYS[:4]} and told(one) == {}
    two.save([4, 5], KEYS[4:6])
    assert told(two) == {"dram": KEYS[4:6], "gone": KEYS[:2]}, "the oldest made room"
    two.tiers.release(two.look_up([*KEYS[2:5], KEYS[9], KEYS[10]]))
    assert told(two) == {"dram": KEYS[2:5], "gone": [KEYS[9]]}, (
        "what a lookup finds mends what was missed; behind it none was sought"
    )
    one.save([4], KEYS[4:5])
    assert told(one) == {}, "it was there"


@pytest.mark.parametrize("tes", [(0, 3 * (HEADER_BYTES + BLOCK))], indirect=True)
def test_files_are_told_of_when_written_lost_and_removed(tes):
    one, two = tes
    assert one.save([0, 1, 2], KEYS[:3]) == [True] * 3
    assert told(one) == {"ssd": KEYS[:3]}
    one.save([3], KEYS[3:4])
    assert told(one) == {"ssd": KEYS[3:4], "gone": KEYS[:1]}, "one file too many"
    found = two.look_up(KEYS[1:4])
    assert told(two) == {"ssd": KEYS[1:4]}
    two.tiers.store.path(KEYS[2]).unlink()
    assert two.fetch(found, [7, 8, 9]) == {"dram": 0, "ssd": 1}
    assert told(two) == {"gone": KEYS[2:3]}


@pytest.mark.parametrize("tes", [(8, 1 << 20)], indirect=True)
def test_a_block_that_left_dram_for_a_file_is_told_of_as_such(tes):
    one, _ = tes
    tree = PromptTree(16)
    for at in range(0, 16, 2):
        one.save([at, at + 1], KEYS[at : at + 2])
        news = one.news.take()
        assert news is not None and tree.hear(0, news)
    one.tiers.release(one.look_up(KEYS))
    known = dict(tree.tiers)
    assert sorted(known.values()) == ["dram"] * 8 + ["ssd"] * 8
    news = one.news.take()
    assert news is not None and tree.hear(0, news)
    assert tree.tiers == known, "the lookup found each where it was told to be"
    assert tree.match(KEYS).tiers.tolist() == [[8, 8]]


def test_tokens_are_told_before_news():
    engine = Engine()
    heard = Listener(engine)
    order: list[type] = []

    def tell(message: FromWorker) -> None:
        order.append(type(message))
        heard.tell(message)

    engine.start(1, list(range(8)), 1)
    engine.step(tell=tell)
    assert order == [Tokens, BlockNews]
