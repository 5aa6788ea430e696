"""The TE-shell: what a forked task executor does from its first line to its last.

warm -> load -> serve -> leave. The keeper forks this process with code imported and no device touched; `main` maps the
packed weights, builds the engine, answers a dummy request of its own, announces itself and serves until told to stop.
It ends with the control process, whatever killed that: a native thread watches it.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from engine import capacity, models, native, shmq, weights
from engine.batch import Batch
from engine.config import Config
from engine.core import Core
from engine.devices import kind, open_device
from engine.executor import Executor
from engine.rtc import RTC
from engine.types import Failed, Finish, FromWorker, Load, Ready, Sample, SamplingParams, Start, Tokens, UserError, pack_ids


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


def main(birth: Birth) -> int:
    """Run a TE; the process's exit status. Never raises: what goes wrong is told in a `Failed` message."""
    native.watch_process(birth.control)
    native.set_process_name(f"deepserve-te{birth.te}")
    outbox = shmq.Sender(birth.outbox)
    encoder = msgspec.msgpack.Encoder()

    def tell(message: FromWorker) -> None:
        outbox.send(encoder.encode(message))
        outbox.flush_blocking(None)  # a control process that doesn't read is gone soon, and this one with it

    try:
        serve(birth, shmq.Receiver(birth.inbox), tell)
    except UserError as e:
        tell(Failed(str(e), e.param))
        return 2
    except Exception as e:
        traceback.print_exc()
        tell(Failed(f"{type(e).__name__}: {e}"))
        return 1
    return 0


def serve(birth: Birth, inbox: shmq.Receiver, tell: Callable[[FromWorker], None]) -> None:
    config = birth.config
    steps: dict[str, float] = {}
    marked = birth.forked_at

    def mark(step: str) -> None:
        nonlocal marked
        now = time.monotonic()
        steps[step] = now - marked
        marked = now

    inbox.beat()
    cores = capacity.cores_for(birth.te, birth.threads, os.sched_getaffinity(0)) if config.pin_threads else None
    device = open_device(
        config.device, config.dtype, birth.threads, birth.manifest.format, cores, birth.te, config.kv_cache_dtype
    )
    model = models.build(birth.model_config)
    mark("te_pre_load")
    mapped = weights.map_slabs(birth.manifest, birth.slabs)
    tensors = {name: device.weight(parts) for name, parts in mapped.items()}
    assert config.max_model_len and config.block_size and config.max_num_batched_tokens, "the Config is not resolved"
    model.bind(device, tensors, config.max_model_len)
    mark("te_load")
    block_bytes = capacity.kv_bytes_per_token(model, config.dtype, config.kv_cache_dtype) * config.block_size
    kv_bytes = config.kv_cache_memory_bytes
    if kind(config.device).own_memory:
        kv_bytes = capacity.own_kv_bytes(config, model, device.free_bytes())
    assert kv_bytes, "the Config is not resolved"
    blocks = kv_bytes // block_bytes
    kv = device.kv_cache(model.layers, blocks, config.block_size, model.kv_heads, model.head_dim)
    reach = capacity.reach_of(blocks, block_bytes) if kv.lazy else None
    batch = Batch(
        RTC(blocks, config.block_size, config.enable_prefix_caching, reach),
        max_seqs=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens,
        max_len=config.max_model_len,
        speculation=config.speculative_config,
    )
    executor = Executor(device, model, kv, batch.tables, config.block_size, config.max_num_batched_tokens)
    dummy_request(batch, executor, inbox)
    mark("te_post_load")
    tell(
        Ready(
            te=birth.te,
            pid=os.getpid(),
            blocks=blocks,
            block_size=config.block_size,
            steps=steps,
            at=time.monotonic(),
            memory={"weights": birth.manifest.nbytes, "kv": kv.nbytes},
        )
    )
    Core(batch, executor, inbox, tell).run(config.async_scheduling)
    device.close()


def dummy_request(batch: Batch, executor: Executor, inbox: shmq.Receiver) -> None:
    """Compute one token and sample the next, so that the first caller doesn't pay for first-use costs and a broken engine is
    never announced. Leaves no trace in the cache or the counters."""
    told: list[FromWorker] = []
    greedy = SamplingParams(temperature=0.0, max_tokens=1)
    batch.start(Start(task=0, prompt=pack_ids([0]), samples=[Sample(0, b"", 0)], params=greedy, max_tokens=1, stop_ids=[]))
    Core(batch, executor, inbox, told.append).step()
    if not any(isinstance(m, Tokens) and m.finish == [Finish.LENGTH] for m in told):
        raise RuntimeError(f"the engine did not answer its dummy request: {told}")
    batch.load = Load(blocks_total=batch.rtc.blocks)
    batch.begin_report()
