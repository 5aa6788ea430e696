"""The TE-shell: what a forked task executor does from its first line to its last.

warm -> load -> serve -> leave. The process has its code imported (scale/warm.py) and is nobody yet; its Birth makes it the master
or a rank of a TE. `main` maps the packed weights, builds the engine, answers a dummy request of its own, announces itself and
serves until told to stop. What the weights lie in stays open here, so that the next TE can take them from this one.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import cast

import msgspec

from engine import capacity, models, native, shmq, spmd, weight_slabs, weights
from engine.batch import Batch
from engine.config import Config, Seat, has_tiers
from engine.core import Core, Inbox
from engine.devices import ALONE, KVCache, Rank, SlabDevice, kind, open_device
from engine.devices.kv_pool import KVPool, shown
from engine.distflow import DistFlow
from engine.executor import Executor
from engine.handover import Outbound
from engine.rtc import RTC
from engine.rtc.news import News
from engine.rtc.tiers import Access, Tiers, measured
from engine.rtc.wire import Measured
from engine.types import (
    Failed,
    Finish,
    FromWorker,
    Handover,
    Load,
    LoadPath,
    Memory,
    Peer,
    Ready,
    Sample,
    SamplingParams,
    Start,
    Tokens,
    UserError,
    WeightSource,
    pack_ids,
)

log = logging.getLogger(__name__)

# Tokens of the prompt that the prefill's speed is first measured with: some 25 ms for the default model on two cores.
PROBE_TOKENS = 64
# That a leaving TE has to put blocks into files: within the two seconds that the control process waits for it.
LEAVING_SECONDS = 1.5


class Birth(msgspec.Struct, array_like=True):
    """All that a process is told to be a TE, or a rank of one. Its descriptors travel beside it (`Handles`)."""

    te: int
    config: Config  # resolved
    threads: int
    seat: Seat
    ranks: int
    rank: int  # another than 0 has the master at the other end of its rings
    index: int  # of this rank, among the cores or devices of the box
    reachable: bool  # other TEs may use its KV pool
    lends: bool  # ... and one computes in it
    lender: Memory | None  # the KV pool to be used instead of an own one: the other worker's of a semi pair
    began: float  # CLOCK_MONOTONIC seconds, when the keeper set about it
    slabs: int  # of packed weights, whose descriptors come with this
    path: LoadPath  # how the slabs came
    source: int  # with "fork": the TE whose they are
    sources: list[WeightSource]  # running TEs of the same device to ask first, where this process alone can reach their memory
    fell: list[str]  # what the keeper has tried, and why it failed
    tiers: Access | None  # to the DRAM and SSD tiers, where there are any; of several ranks the master has it


BIRTH = msgspec.msgpack.Decoder(Birth)  # made where TEs are forked from: that takes 2 ms


@dataclass(slots=True)
class Handles:
    """The descriptors of a Birth. They belong to the new process."""

    inbox: shmq.RingFds
    outbox: shmq.RingFds
    description: int  # memfd: weights.Description
    slabs: list[int]  # memfds
    group: list[int]  # spmd.Group.numbers, of a TE with several ranks
    ranks: list[int]  # pidfds of the other ranks: the master has them
    tiers: list[int]  # Access.socket, Access.pool where there are any

    def numbers(self) -> list[int]:
        rings = [*self.inbox.numbers(), *self.outbox.numbers()]
        return [*rings, self.description, *self.slabs, *self.ranks, *self.tiers, *self.group]


def received(birth: Birth, numbers: list[int]) -> Handles:
    """What `Handles.numbers` was, by the numbers that the descriptors have here."""
    left = iter(numbers)

    def take(count: int) -> list[int]:
        return list(islice(left, count))

    inbox, outbox = shmq.RingFds(*take(3)), shmq.RingFds(*take(3))
    (description,) = take(1)
    slabs = take(birth.slabs)
    ranks = take(0 if birth.rank else birth.ranks - 1)
    tiers = take(0 if birth.tiers is None else 1 + (birth.tiers.pool >= 0))
    if birth.tiers is not None:
        birth.tiers.socket, birth.tiers.pool = (*tiers, -1)[:2]
    return Handles(inbox, outbox, description, slabs, list(left), ranks, tiers)


def main(birth: Birth, handles: Handles) -> int:
    """Run a TE in a process that already ends with the control process; the exit status. Never raises: what goes wrong is told in
    a `Failed` message."""
    native.set_process_name(f"deepserve-te{birth.te}" + (f".{birth.rank}" if birth.rank else ""))
    group = None
    if birth.ranks > 1:
        group = spmd.received(birth.ranks, birth.rank, handles.group)
        for other in (group.leash[0],) if birth.rank else handles.ranks:
            native.watch_process(other)  # no rank outlives another
            os.close(other)
    inbox, outbox = shmq.Receiver(handles.inbox), shmq.Sender(handles.outbox)
    handles.inbox.close()
    handles.outbox.close()
    encoder = msgspec.msgpack.Encoder()

    def tell(message: FromWorker) -> None:
        outbox.send(encoder.encode(message))
        outbox.flush_blocking(None)  # a control process that doesn't read is gone soon, and this one with it

    try:
        serve(birth, handles, group, inbox, tell)
    except UserError as e:
        tell(Failed(str(e), e.param))
        if birth.rank:
            signal.pause()  # the master says it to the control process and leaves, and with it this one
        return 2
    except Exception as e:
        traceback.print_exc()
        tell(Failed(f"{type(e).__name__}: {e}"))
        return 1
    if birth.rank:
        outbox.send(spmd.DONE)
        outbox.flush_blocking(None)
        signal.pause()
    return 0


def serve(
    birth: Birth, handles: Handles, group: spmd.Group | None, ring: shmq.Receiver, tell: Callable[[FromWorker], None]
) -> None:
    config = birth.config
    leader = None
    if group is not None and not birth.rank:
        leader = spmd.Leader(group)
        for queue in (*group.down, *group.up):
            queue.close()
    follower = spmd.Follower(ring) if birth.rank else None
    inbox: Inbox = follower or ring
    steps: dict[str, float] = {}
    marked = birth.began

    def mark(step: str) -> None:
        nonlocal marked
        now = time.monotonic()
        steps[step] = now - marked
        marked = now

    inbox.beat()
    rank = Rank(birth.rank, group.ranks, group.memory, group.pool) if group is not None else ALONE
    description = weights.read_description(handles.description)
    manifest = description.manifest
    cores = capacity.cores_for(birth.index, birth.threads, os.sched_getaffinity(0)) if config.pin_threads else None
    device = open_device(
        config.device, config.dtype, birth.threads, manifest.format, cores, birth.index, config.kv_cache_dtype, rank
    )
    model = models.build(description.config, rank.index, rank.count)
    mark("te_pre_load")
    own_memory, path, fell = kind(config.device).own_memory, birth.path, birth.fell
    held: weight_slabs.Loaded | None = None
    source: WeightSource | None
    if own_memory:
        packed = weights.map_slabs(manifest, handles.slabs) if handles.slabs else None
        held = weight_slabs.load(cast(SlabDevice, device), model.own, birth.sources, packed)
        tensors, fell = held.tensors, [*fell, *held.fell]
        path = held.path if path == "fork" else path
        source = offered(held, birth, description)
    else:
        mapped = weights.map_slabs(manifest, handles.slabs, copy="fork" in config.scale_without)
        tensors = {name: device.weight(parts) for name, parts in model.own(mapped).items()}
        source = WeightSource(birth.te, shown(handles.description), [shown(slab) for slab in handles.slabs])
    assert config.max_model_len and config.block_size and config.max_num_batched_tokens, "the Config is not resolved"
    model.bind(device, tensors, config.max_model_len)
    mark("te_load")
    block_bytes = capacity.kv_bytes_per_token(model, config.dtype, config.kv_cache_dtype) * config.block_size
    kv_bytes = config.kv_cache_memory_bytes
    if own_memory:
        kv_bytes = capacity.own_kv_bytes(config, model, device.free_bytes() * rank.count)
    assert kv_bytes, "the Config is not resolved"
    blocks = kv_bytes // block_bytes
    kv = device.kv_cache(model.layers, blocks, config.block_size, model.own_kv_heads, model.head_dim, birth.lender)
    if "lazy-kv" in config.scale_without:
        kv.commit(blocks)
    # A pool that two workers use has one allocator, the decode worker; but its last block is for the other's dummy request.
    own_blocks = 0 if birth.lender is not None else blocks - birth.lends
    # An accelerator's memory is taken at once: there recycling idle blocks early would spare nothing.
    reach = None if own_memory else capacity.reach_of(blocks, block_bytes)
    batch = Batch(
        RTC(own_blocks, config.block_size, config.enable_prefix_caching, reach),
        max_seqs=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens,
        max_len=config.max_model_len,
        speculation=config.speculative_config,
    )
    batch.lends = birth.lends
    executor = Executor(device, model, kv, batch.tables, config.block_size, config.max_num_batched_tokens)
    ready = Ready(
        te=birth.te,
        pid=os.getpid(),
        blocks=own_blocks,
        block_size=config.block_size,
        steps=steps,
        at=time.monotonic(),
        memory={"weights": manifest.nbytes if held is None else held.placed.nbytes, "kv": kv.nbytes},
        weights=source,
        path=path,
        source=birth.source if held is None else held.source,
        mapped=held is not None and held.slabs.mapped,
        fell=fell,
    )
    if follower is not None:
        # Before the first step: a rank that can't come so far says why, and nobody waits for it in the middle of one.
        tell(ready)
        tell = keep_quiet
    elif leader is not None:
        others = leader.gather()
        ready.memory["kv"] += sum(other.memory["kv"] for other in others)
        ready.ranks = [other.pid for other in others]
    dummy_request(batch, executor, inbox, blocks - 1 if birth.lender is not None else None)
    mark("te_post_load")
    end = leader or follower
    core = Core(batch, executor, inbox, tell, agree=end.agree if end is not None else None)
    if has_tiers(config) and birth.lender is None:
        speed = prefill_speed(config, core)
        if birth.tiers is not None:
            open_tiers(birth.tiers, birth.te, config, core, speed)
    if config.enable_prefix_caching and follower is None and birth.lender is None:
        core.news = News(batch.rtc, core.tiers)
    ready.pool = to_be_shown(birth, kv)
    if ready.pool is not None and kv.pool is not None:
        flow = DistFlow(kv.pool.whole, birth.te) if follower is None else None
        core.outbound = Outbound(flow, ready.pool, core.follow)
    ready.at = time.monotonic()
    tell(ready)
    core.run(config.async_scheduling)
    if core.tiers is not None:
        left = batch.rtc.copy(blocks)
        core.tiers.close(left, [batch.rtc.keys[b] or b"" for b in left], [batch.rtc.until[b] for b in left], LEAVING_SECONDS)
    if core.outbound is not None:
        core.outbound.end()
    device.close()
    if held is not None and held.slabs.mapped:
        held.slabs.close()  # before their owner's: the runtime wants that order
    if leader is not None:
        leader.part()


def offered(held: weight_slabs.Loaded, birth: Birth, description: weights.Description) -> WeightSource | None:
    """What other TEs can take weights by that lie on a device. None where they can't: it is another TE's memory, one of several
    ranks has only its part of them, or the runtime refuses."""
    try:
        return weight_slabs.export(held, birth.te, description) if birth.ranks == 1 else None
    except OSError as e:
        log.warning("event=weights_not_shown te=%d why=%s", birth.te, e)
        return None


def prefill_speed(config: Config, core: Core) -> float:
    """Tokens a second, of a prompt that all ranks compute. Leaves no trace in the cache."""
    assert config.block_size and config.max_model_len and config.max_num_batched_tokens
    most = min(config.max_model_len, core.batch.rtc.blocks * config.block_size) - 1
    tokens = max(1, min(PROBE_TOKENS, config.max_num_batched_tokens, most))
    began = time.monotonic()
    dummy_request(core.batch, core.executor, core.inbox, None, tokens)
    seconds = time.monotonic() - began
    core.batch.rtc.reset()
    return tokens / seconds


def to_be_shown(birth: Birth, kv: KVCache) -> Peer | None:
    """What other TEs, if there are any, are told of the KV cache. None also where they can't reach it; that raises `UserError`
    where --pd needs it."""
    config = birth.config
    if kv.pool is None or kv.layout is None or birth.lender is not None or not birth.reachable:
        return None
    assert config.block_size
    try:
        return Peer(birth.te, kv.pool.memory, kv.layout, config.block_size)
    except UserError as e:
        if birth.seat.role in ("prefill", "decode"):
            raise UserError(f"--pd {config.pd}: {e}; leave it out", "pd") from None
        log.warning("event=kv_cache_not_shown te=%d why=%s", birth.te, e)
        return None


def open_tiers(access: Access, te: int, config: Config, core: Core, speed: float) -> None:
    """Have the DRAM and SSD tiers used, by a rule whose constants are measured now; `speed`: tokens of a prompt a second."""
    kv = core.executor.kv
    assert config.block_size
    assert isinstance(kv.pool, KVPool) and kv.layout is not None, "capacity.resolve lets no other device through"
    core.events.append(Measured(measured(access, config.block_size, speed)))
    here = Peer(te, kv.pool.memory, kv.layout, config.block_size)
    core.tiers = Tiers(access, kv.pool.whole, here, core.inbox.rouse)


def keep_quiet(message: FromWorker) -> None:
    """What happens on a rank happens on the master too, which tells of it."""


def dummy_request(batch: Batch, executor: Executor, inbox: Inbox, lent: int | None, tokens: int = 1) -> None:
    """Compute so many tokens and sample the next, so that the first caller doesn't pay for first-use costs and a broken engine is
    never announced. Leaves no trace in the cache or the counters. `lent`: the block to compute in, where none are our own."""
    told: list[FromWorker] = []
    greedy = SamplingParams(temperature=0.0, max_tokens=1)
    handover = None if lent is None else Handover(-1, pack_ids([lent]), 0, "lent")
    samples = [Sample(0, b"", 0)]
    batch.start(Start(0, pack_ids([0] * tokens), samples, greedy, max_tokens=1, stop_ids=[], handover=handover))
    Core(batch, executor, inbox, told.append).step()
    if not any(isinstance(m, Tokens) and m.finish == [Finish.LENGTH] for m in told):
        raise RuntimeError(f"the engine did not answer its dummy request: {told}")
    batch.load = Load(blocks_total=batch.rtc.blocks)
