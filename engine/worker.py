"""The TE-shell: what a forked task executor does from its first line to its last.

warm -> load -> serve -> leave. The keeper forks this process with code imported and no device touched; `main` maps the
packed weights, builds the engine, answers a dummy request of its own, announces itself and serves until told to stop.
It ends with the control process, whatever killed that: a native thread watches it.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from engine import capacity, models, native, shmq, spmd, weights
from engine.batch import Batch
from engine.config import Config, has_tiers, ranks, seats
from engine.core import Core, Inbox
from engine.devices import ALONE, KVCache, Rank, kind, open_device
from engine.devices.kv_pool import KVPool
from engine.distflow import DistFlow
from engine.executor import Executor
from engine.handover import Outbound
from engine.rtc import RTC
from engine.rtc.tiers import Access, Tiers, measured
from engine.rtc.wire import Measured
from engine.types import (
    Failed,
    Finish,
    FromWorker,
    Handover,
    Load,
    Memory,
    Peer,
    Ready,
    Sample,
    SamplingParams,
    Start,
    Tokens,
    UserError,
    pack_ids,
)

log = logging.getLogger(__name__)

# Tokens of the prompt that the prefill's speed is first measured with: some 25 ms for the default model on two cores.
PROBE_TOKENS = 64
# That a leaving TE has to put blocks into files: within the two seconds that the control process waits for it.
LEAVING_SECONDS = 1.5


@dataclass(slots=True)
class Birth:
    """All that a TE is given when it is forked. Descriptors are owned by the new process."""

    te: int
    config: Config  # resolved
    model_config: dict[str, Any]
    manifest: weights.Manifest
    slabs: list[int]  # memfds of packed weights
    inbox: shmq.RingFds
    outbox: shmq.RingFds
    control: int  # pidfd of the control process
    threads: int
    forked_at: float  # CLOCK_MONOTONIC seconds, before the fork
    group: spmd.Group | None = None  # of a TE with several ranks
    rank: int = 0  # another than 0 has the master at the other end of its rings
    tiers: Access | None = None  # to the DRAM and SSD tiers, where there are any; of several ranks the master has it
    lender: Memory | None = None  # the KV pool to be used instead of an own one: the other worker's of a semi pair


def main(birth: Birth) -> int:
    """Run a TE; the process's exit status. Never raises: what goes wrong is told in a `Failed` message."""
    native.watch_process(birth.control)
    native.set_process_name(f"deepserve-te{birth.te}" + (f".{birth.rank}" if birth.rank else ""))
    if birth.group is not None:
        birth.group.bind(birth.rank)
    outbox = shmq.Sender(birth.outbox)
    encoder = msgspec.msgpack.Encoder()

    def tell(message: FromWorker) -> None:
        outbox.send(encoder.encode(message))
        outbox.flush_blocking(None)  # a control process that doesn't read is gone soon, and this one with it

    try:
        serve(birth, shmq.Receiver(birth.inbox), tell)
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


def serve(birth: Birth, ring: shmq.Receiver, tell: Callable[[FromWorker], None]) -> None:
    config = birth.config
    leader = spmd.Leader(birth.group) if birth.group is not None and not birth.rank else None
    follower = spmd.Follower(ring) if birth.rank else None
    inbox: Inbox = follower or ring
    steps: dict[str, float] = {}
    marked = birth.forked_at

    def mark(step: str) -> None:
        nonlocal marked
        now = time.monotonic()
        steps[step] = now - marked
        marked = now

    inbox.beat()
    rank = Rank(birth.rank, birth.group.ranks, birth.group.memory, birth.group.pool) if birth.group is not None else ALONE
    index = sum(ranks(config)[: birth.te]) + rank.index
    cores = capacity.cores_for(index, birth.threads, os.sched_getaffinity(0)) if config.pin_threads else None
    device = open_device(
        config.device, config.dtype, birth.threads, birth.manifest.format, cores, index, config.kv_cache_dtype, rank
    )
    model = models.build(birth.model_config, rank.index, rank.count)
    mark("te_pre_load")
    mapped = weights.map_slabs(birth.manifest, birth.slabs)
    tensors = {name: device.weight(parts) for name, parts in model.own(mapped).items()}
    assert config.max_model_len and config.block_size and config.max_num_batched_tokens, "the Config is not resolved"
    model.bind(device, tensors, config.max_model_len)
    mark("te_load")
    block_bytes = capacity.kv_bytes_per_token(model, config.dtype, config.kv_cache_dtype) * config.block_size
    kv_bytes = config.kv_cache_memory_bytes
    if kind(config.device).own_memory:
        kv_bytes = capacity.own_kv_bytes(config, model, device.free_bytes() * rank.count)
    assert kv_bytes, "the Config is not resolved"
    blocks = kv_bytes // block_bytes
    kv = device.kv_cache(model.layers, blocks, config.block_size, model.own_kv_heads, model.head_dim, birth.lender)
    lends = any(seat.lender == birth.te for seat in seats(config))
    # A pool that two workers use has one allocator, the decode worker; but its last block is for the other's dummy request.
    own_blocks = 0 if birth.lender is not None else blocks - lends
    # An accelerator's memory is taken at once: there recycling idle blocks early would spare nothing.
    reach = None if kind(config.device).own_memory else capacity.reach_of(blocks, block_bytes)
    batch = Batch(
        RTC(own_blocks, config.block_size, config.enable_prefix_caching, reach),
        max_seqs=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens,
        max_len=config.max_model_len,
        speculation=config.speculative_config,
    )
    batch.lends = lends
    executor = Executor(device, model, kv, batch.tables, config.block_size, config.max_num_batched_tokens)
    ready = Ready(
        te=birth.te,
        pid=os.getpid(),
        blocks=own_blocks,
        block_size=config.block_size,
        steps=steps,
        at=time.monotonic(),
        memory={"weights": birth.manifest.nbytes, "kv": kv.nbytes},
    )
    if follower is not None:
        # Before the first step: a rank that can't come so far says why, and nobody waits for it in the middle of one.
        tell(ready)
        tell = keep_quiet
    elif leader is not None:
        ready.memory["kv"] += sum(other.memory["kv"] for other in leader.gather())
    dummy_request(batch, executor, inbox, blocks - 1 if birth.lender is not None else None)
    mark("te_post_load")
    group = leader or follower
    core = Core(batch, executor, inbox, tell, agree=group.agree if group is not None else None)
    if has_tiers(config) and birth.lender is None:
        speed = prefill_speed(config, core)
        if birth.tiers is not None:
            open_tiers(birth.tiers, birth.te, config, core, speed)
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
    if leader is not None:
        leader.part()


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
    if kv.pool is None or kv.layout is None or birth.lender is not None or config.te == 1:
        return None
    assert config.block_size
    try:
        return Peer(birth.te, kv.pool.memory, kv.layout, config.block_size)
    except UserError as e:
        if config.pd:
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
