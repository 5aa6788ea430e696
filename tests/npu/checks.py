"""Checks that run inside the npu environment, on the stub's devices: `python -m tests.npu.checks NAME...` runs them in one
process and prints one JSON line for each. tests/test_npu_stub.py shows every check as a test of its own."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import torch_npu

from engine.devices.npu_reference import MASK_SIZE, REFERENCES
from tests.npu import stub

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[found.dtype]
    torch.testing.assert_close(found.cpu().float(), expected.float(), atol=tolerance, rtol=tolerance)


@contextmanager
def raises(kind: type[BaseException], words: str = "") -> Iterator[None]:
    try:
        yield
    except kind as e:
        assert words in str(e), e
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


def busy_stream() -> tuple[torch.npu.Stream, torch.npu.ExternalEvent]:
    """A stream that stands still until the event is recorded on another one."""
    stream, gate = torch.npu.Stream(), torch.npu.ExternalEvent()
    gate.record(stream)  # the plugin makes the event at its first record
    gate.reset(stream)
    stream.synchronize()  # a record elsewhere before the reset has run would be undone by it
    gate.wait(stream)
    return stream, gate


# ---- devices and memory -----------------------------------------------------------------------------------------------


def check_devices() -> None:
    assert torch.npu.is_available() and torch.npu.device_count() == 2
    assert torch.npu.get_device_properties(0).name == "Ascend910B3"
    assert torch.npu.mem_get_info(1)[1] == 4 << 30
    x = numbers(3)
    assert torch.equal(x.to("npu:0").to("npu:1").cpu(), x)
    with raises(RuntimeError):
        torch.npu.set_device(2)


def check_memory_is_accounted() -> None:
    torch.npu.empty_cache()
    before = torch.npu.mem_get_info()[0]
    x = torch.empty(64 << 20, dtype=torch.uint8, device="npu")
    assert torch.npu.memory_allocated() >= 64 << 20
    assert before - torch.npu.mem_get_info()[0] >= 64 << 20
    assert torch.npu.mem_get_info()[1] - torch.npu.mem_get_info()[0] == torch.npu.memory_reserved()
    del x
    gc.collect()
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] == before


def check_out_of_memory() -> None:
    """The device's whole memory."""
    held = torch.ones(2, device="npu")
    with raises(torch.OutOfMemoryError):
        torch.empty(8 << 30, dtype=torch.uint8, device="npu")
    assert (held + 1).sum().item() == 4


def fault_oom_after() -> None:
    """A limit that mem_get_info does not know of, as where another process takes the memory first."""
    assert torch.npu.mem_get_info()[0] > 1 << 30
    held = torch.zeros(16 << 20, dtype=torch.uint8, device="npu")
    with raises(torch.OutOfMemoryError):
        torch.zeros(32 << 20, dtype=torch.uint8, device="npu")
    assert held.sum().item() == 0


def check_copies() -> None:
    x = numbers(6, 8)
    y = x.to("npu")
    for part in (y, y[1:3], y[:, ::2], y.t(), y[3], y[:, 1]):
        on_host = part.cpu()
        assert on_host.shape == part.shape
    assert torch.equal(y[:, ::2].cpu(), x[:, ::2]) and torch.equal(y.t().cpu(), x.t())
    assert torch.equal(y.to(torch.bfloat16).cpu(), x.to(torch.bfloat16))
    into = torch.zeros(6, 8, dtype=torch.float16, device="npu")
    assert torch.equal(into.copy_(x).cpu(), x.half())
    into.t().copy_(x.t())
    assert torch.equal(into.cpu(), x.half())
    host = torch.zeros(8, 6).t()
    assert torch.equal(host.copy_(y), x)
    assert torch.equal(y.reshape(-1).cpu(), x.reshape(-1)) and torch.equal(y.t().contiguous().cpu(), x.t())
    assert torch.empty(0, 4, device="npu").cpu().shape == (0, 4)
    scalar = torch.tensor(2.5, device="npu")
    assert scalar.item() == 2.5 and (y * scalar).cpu().equal(x * 2.5)


def check_the_mode_is_in_every_thread() -> None:
    found = []

    def work(device: int) -> None:
        torch.npu.set_device(device)
        x = torch.ones(3, device="npu")
        found.append((x.device.index, (x + 1).sum().item()))

    threads = [threading.Thread(target=work, args=(device,)) for device in (0, 1)]
    for thread in threads:
        thread.start()
        thread.join()
    assert found == [(0, 6.0), (1, 6.0)]


# ---- streams, events, waiting -----------------------------------------------------------------------------------------


def check_streams_run_in_order() -> None:
    """Behind a gate nothing runs; other streams do; a stream that waits for an event comes after it."""
    x = torch.zeros(4, device="npu")
    host = torch.zeros(4, pin_memory=True)
    stream, gate = busy_stream()
    done = torch.npu.Event()
    with torch.npu.stream(stream):
        x.add_(1)
        host.copy_(x, non_blocking=True)
        done.record()
    torch.npu.current_stream().wait_event(done)
    other = torch.npu.Stream()
    with torch.npu.stream(other):
        assert torch.ones(2, device="npu").sum().item() == 2
    y = x * 10  # waits for `done`
    assert not done.query() and host.sum() == 0
    with torch.npu.stream(other):
        gate.record()
    done.synchronize()
    assert done.query() and host.tolist() == [1.0] * 4 and y.cpu().tolist() == [10.0] * 4


def check_events_keep_time() -> None:
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    start.record()
    x = torch.ones(4, device="npu") + 1
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) >= 0 and x.sum().item() == 8


def check_waiting_is_counted() -> None:
    x, host = torch.ones(4, device="npu"), torch.empty(4, pin_memory=True)
    pageable, pinned = torch.ones(4), torch.ones(4).pin_memory()
    torch.npu.synchronize()

    def counted(work) -> stub.Counters:
        before = stub.counters()
        work()
        return stub.counters() - before

    assert counted(lambda: x + 1).synchronisations == 0
    assert counted(lambda: (x + 1).topk(2)).launches == 2
    found = counted(lambda: host.copy_(x, non_blocking=True))
    assert (found.synchronisations, found.async_copies_to_host) == (0, 1)
    found = counted(lambda: x.copy_(pinned, non_blocking=True))
    assert (found.synchronisations, found.async_copies_to_device) == (0, 1)
    assert counted(lambda: x.cpu()).synchronisations > 0
    assert counted(lambda: x[0].item()).synchronisations > 0
    assert counted(lambda: x.copy_(pageable)).synchronisations > 0
    assert counted(lambda: x.copy_(pageable, non_blocking=True)).synchronisations > 0
    assert counted(lambda: x.nonzero()).synchronisations > 0
    assert counted(torch.npu.synchronize).device_synchronisations == 1
    assert counted(torch.npu.current_stream().synchronize).stream_synchronisations == 1
    event = torch.npu.Event()
    event.record()
    found = counted(event.synchronize)
    assert (found.event_synchronisations, found.synchronisations) == (1, 0)


def fault_slow_copy() -> None:
    """An asynchronous copy takes its time, and other streams go on meanwhile."""
    x, host = torch.ones(4, device="npu"), torch.zeros(4, pin_memory=True)
    slow = torch.npu.Stream()
    torch.npu.synchronize()
    with torch.npu.stream(slow):
        host.copy_(x, non_blocking=True)
        arrived = torch.npu.Event()
        arrived.record()
    x.add_(0)
    mine = torch.npu.Event()
    mine.record()
    assert mine.query() and not arrived.query() and host.sum() == 0
    arrived.synchronize()
    assert host.tolist() == [1.0] * 4


def fault_copy_fails() -> None:
    x, host = torch.ones(4, device="npu"), torch.zeros(4, pin_memory=True)
    host.copy_(x, non_blocking=True)
    with raises(RuntimeError, "a copy of 16 bytes failed"):
        host.copy_(x, non_blocking=True)
    host.copy_(x, non_blocking=True)


def fault_device_lost() -> None:
    """All that needs it fails, and who waits for it wakes up."""
    x = torch.ones(4, device="npu")
    stream, _ = busy_stream()
    with torch.npu.stream(stream):
        x.add_(1)
        never = torch.npu.Event()
        never.record()
    thread = threading.Timer(0.05, stub.lose_device, (0,))
    thread.start()
    with raises(RuntimeError, "507010"):
        never.synchronize()
    thread.join()
    with raises(RuntimeError, "lost"):
        x + 1
    with raises(RuntimeError):
        torch.npu.synchronize()
    with raises(RuntimeError):
        x.cpu()
    torch.npu.set_device(1)
    assert torch.ones(2, device="npu:1").sum().item() == 2


def fault_device_lost_after() -> None:
    x = torch.zeros(1, device="npu")
    with raises(RuntimeError, "lost"):
        for _ in range(100):
            x.add_(1)


def check_a_failing_operator() -> None:
    """Its error comes out at the launch where it ran at once, and where the stream is waited for otherwise; both work on."""
    cache = torch.zeros(2, 128, 1, 16, device="npu")
    token, twice = torch.ones(2, 1, 16, device="npu"), torch.tensor([3, 3], device="npu")

    def fails() -> None:
        torch_npu.npu_scatter_pa_kv_cache(token, token, cache, cache.clone(), twice, cache_mode="Norm")
        torch.npu.synchronize()

    with raises((ValueError, RuntimeError), "slots are not unique"):
        fails()
    stream, gate = busy_stream()
    with torch.npu.stream(stream):
        torch_npu.npu_scatter_pa_kv_cache(token, token, cache, cache.clone(), twice, cache_mode="Norm")
    gate.record()
    with raises(RuntimeError, "slots are not unique"):
        stream.synchronize()
    assert torch.ones(2, device="npu").sum().item() == 2


def check_what_a_device_refuses() -> None:
    x = torch.ones(2, 2, device="npu")
    with raises(RuntimeError, "on the host"):
        x + torch.ones(2, 2)
    with raises(RuntimeError, "on the host"):
        x[torch.tensor([0])]
    with raises(RuntimeError, "npu:1"):
        x + torch.ones(2, 2, device="npu:1")
    with raises(RuntimeError, "float64"):
        x.double()
    with raises(RuntimeError, "float64"):
        torch.zeros(2, dtype=torch.float64, device="npu")
    with raises(RuntimeError):
        torch.add(x, x, out=torch.empty(3, device="npu"))
    with raises(NotImplementedError, "no reference"):
        torch_npu.npu_geglu(x)


# ---- graphs -----------------------------------------------------------------------------------------------------------


def check_a_graph_computes_when_replayed() -> None:
    x = torch.ones(4, device="npu")
    kept = torch.full((4,), -1.0, device="npu")
    host = torch.zeros(4, pin_memory=True)
    graph = torch.npu.NPUGraph()
    before = stub.counters()
    with torch.npu.graph(graph):
        y = x * 2 + 1
        kept.copy_(y)
        x.add_(1)
        host.copy_(kept, non_blocking=True)
    assert kept.cpu().tolist() == [-1.0] * 4 and x.cpu().tolist() == [1.0] * 4, "a capture computes nothing"
    for count in range(3):
        graph.replay()
        torch.npu.current_stream().synchronize()
        assert y.cpu().tolist() == host.tolist() == [2.0 * (count + 1) + 1] * 4
    assert (stub.counters() - before).replays == 3
    assert x.cpu().tolist() == [4.0] * 4
    x.copy_(torch.zeros(4))
    graph.replay()
    assert kept.cpu().tolist() == [1.0] * 4
    del graph


def check_a_capture_on_two_streams() -> None:
    x, side = torch.ones(4, device="npu"), torch.npu.Stream()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = x + 1
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            z = y * 3
        torch.npu.current_stream().wait_stream(side)
        out = z + y
    graph.replay()
    assert out.cpu().tolist() == [8.0] * 4


def check_a_capture_refuses_to_wait() -> None:
    x = torch.ones(4, device="npu")
    for wait in (torch.npu.synchronize, x.cpu, x.sum().item, x.nonzero):
        graph = torch.npu.NPUGraph()
        with raises(RuntimeError), torch.npu.graph(graph):
            wait()
    assert (x + 1).sum().item() == 8


def attention_case(lengths: list[int], counts: list[int], dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, size: int = 16):
    """(query, key cache, value cache, arguments of the first version, what it should give): pages of 128 in shuffled order."""
    width = max(-(-n // 128) for n in lengths) + 1
    blocks = 2 + sum(-(-n // 128) for n in lengths)
    order = iter(torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist())
    table = torch.full((len(lengths), width), -1, dtype=torch.int32)
    for row, n in zip(table, lengths, strict=True):
        for i in range(-(-n // 128)):
            row[i] = next(order)
    query = numbers(sum(counts), heads, size, dtype=dtype)
    keys, values = (numbers(blocks, 128, kv_heads, size, dtype=dtype, seed=s) for s in (2, 3))
    mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8).triu(1)
    ends = torch.tensor(counts).cumsum(0).tolist()
    arguments = {
        "atten_mask": mask,
        "actual_seq_lengths": ends,
        "actual_seq_lengths_kv": lengths,
        "block_table": table,
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": size**-0.5,
        "input_layout": "TND",
        "sparse_mode": 3,
        "block_size": 128,
    }
    return query, keys, values, arguments


def attention_expected(query, keys, values, arguments, window: int | None = None) -> torch.Tensor:
    """The same by gathered pages and torch's own attention, one sequence at a time."""
    parts, first = [], 0
    lengths, table = arguments["actual_seq_lengths_kv"], arguments["block_table"].long()
    for s, (end, length) in enumerate(zip(arguments["actual_seq_lengths"], lengths, strict=True)):
        count, pages = end - first, table[s, : -(-length // 128)]
        k, v = (x[pages].reshape(-1, *x.shape[2:])[:length].float().transpose(0, 1) for x in (keys, values))
        seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        if window is not None:
            seen &= torch.ones(count, length, dtype=torch.bool).triu(length - count - window + 1)
        q = query[first:end].float().transpose(0, 1)
        parts.append(F.scaled_dot_product_attention(q, k, v, seen, scale=arguments["scale"], enable_gqa=True).transpose(0, 1))
        first = end
    return torch.cat(parts)


def on_device(query, keys, values, arguments):
    moved = {name: x.npu() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    return query.npu(), keys.flatten(2).npu(), values.flatten(2).npu(), moved


def check_task_groups_take_new_lengths() -> None:
    """A captured attention computes with the lengths of the last update, in either order of update and replay."""
    counts, lengths = [1, 1], [130, 200]
    query, keys, values, arguments = attention_case(lengths, counts, torch.float32)
    q, k, v, how = on_device(query, keys, values, arguments)
    out = [torch.empty_like(q), torch.empty(0, device="npu")]
    workspace = torch_npu._npu_fused_infer_attention_score_get_max_workspace(q, k, v, **how)
    graph, updates, ready = torch.npu.NPUGraph(), torch.npu.Stream(), torch.npu.ExternalEvent()
    ready.record(updates)
    ready.reset(updates)
    operator = torch_npu.npu_fused_infer_attention_score.out
    with torch.npu.graph(graph):
        stream = torch.npu.current_stream()
        scaled = q * 1.0
        ready.wait(stream)
        ready.reset(stream)
        torch.npu.graph_task_group_begin(stream)
        operator(scaled, k, v, **how, workspace=workspace, out=out)
        group = torch.npu.graph_task_group_end(stream)
        doubled = out[0] * 2

    def update(lengths: list[int]) -> None:
        with torch.npu.stream(updates):
            torch.npu.graph_task_update_begin(updates, group)
            operator(scaled, k, v, **{**how, "actual_seq_lengths_kv": lengths}, workspace=workspace, out=out)
            torch.npu.graph_task_update_end(updates)
            ready.record(updates)

    for turn in range(4):
        lengths = [130 - turn, 200 + turn]
        steps = [graph.replay, lambda lengths=lengths: update(lengths)]
        for step in steps if turn % 2 else reversed(steps):
            step()
        torch.npu.synchronize()
        expected = attention_expected(query, keys, values, {**arguments, "actual_seq_lengths_kv": lengths})
        close(doubled, 2 * expected)
    with raises(RuntimeError), torch.npu.stream(updates):
        torch.npu.graph_task_update_begin(updates, group)
        torch.npu.graph_task_update_end(updates)  # the group has an operator that was not given anew


# ---- operators: through the plugin's schemas and meta kernels, against formulas -------------------------------------------


def check_schemas_of_the_references() -> None:
    """Same names, kinds and defaults as the plugin's schemas."""
    import inspect

    for name, reference in REFERENCES.items():
        if name.startswith("_"):
            continue
        schema = getattr(torch.ops.npu, name).default._schema
        parameters = inspect.signature(reference).parameters.values()
        ours = [(p.name, p.kind == p.KEYWORD_ONLY, p.default) for p in parameters]
        theirs = [
            (a.name, a.kwarg_only, a.default_value if a.has_default_value() else inspect.Parameter.empty)
            for a in schema.arguments
        ]
        assert ours == theirs, f"{name}: {ours} against {theirs}"


def check_rows() -> None:
    for dtype in FLOATS:
        x, more, gain = numbers(5, 32, dtype=dtype), numbers(5, 32, dtype=dtype, seed=1), numbers(32, dtype=dtype, seed=2)
        y, rstd = torch_npu.npu_rms_norm(x.npu(), gain.npu(), 1e-5)
        close(y, F.rms_norm(x.float(), (32,), gain.float(), 1e-5))
        close(rstd, (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt())
        y, _, total = torch_npu.npu_add_rms_norm(x.npu(), more.npu(), gain.npu(), 1e-5)
        assert torch.equal(total.cpu(), x + more)
        close(y, F.rms_norm((x + more).float(), (32,), gain.float(), 1e-5))
        close(torch_npu.npu_swiglu(x.npu()), F.silu(x[:, :16].float()) * x[:, 16:].float())
    with raises(RuntimeError):
        torch_npu.npu_rms_norm(x.npu(), gain.npu(), eps=1e-5)  # not what the schema calls it


def check_rope() -> None:
    for dtype in FLOATS:
        x = numbers(1, 7, 3, 64, dtype=dtype)
        angles = torch.arange(7)[:, None] / 10000 ** (torch.arange(32) / 32)
        turn = torch.polar(torch.ones_like(angles), angles)
        both = torch.cat((angles, angles), -1)[None, :, None]
        cos, sin = both.cos().to(dtype), both.sin().to(dtype)
        pairs = torch.complex(x[..., :32].float(), x[..., 32:].float()) * turn[None, :, None]
        expected = torch.cat((pairs.real, pairs.imag), -1)
        close(torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu()), expected)
        q, k = torch_npu.npu_apply_rotary_pos_emb(x.npu(), x[:, :, :1].contiguous().npu(), cos.npu(), sin.npu())
        close(q, expected)
        close(k, expected[:, :, :1])
        pairs = torch.view_as_complex(x.float().unflatten(-1, (32, 2))) * turn[None, :, None]
        cos, sin = (f(angles).repeat_interleave(2, -1)[None, :, None].to(dtype) for f in (torch.cos, torch.sin))
        close(torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu(), "interleave"), torch.view_as_real(pairs).flatten(-2))


def check_torchs_own_operators() -> None:
    """What a sampler and a model do beside the fused ones: as on the host, in and out of inference mode."""
    rows, last, flags = numbers(4, 9), torch.tensor([3, 2, 0, 5]), torch.tensor([True, False, True, False])

    def all_of(x: torch.Tensor, ids: torch.Tensor, flag: torch.Tensor) -> list[torch.Tensor]:
        y = x.clone()
        y[ids[:2], ids[2:]] = 3
        y.index_put_((ids - ids, ids), x[:, 0], accumulate=True)
        y[:, 2].add_(1)
        return [
            y,
            x.softmax(-1).cumsum(-1),
            *x.topk(3),
            *x.sort(dim=-1, stable=True),
            x.argmax(-1).int(),
            torch.where(flag[:, None], x, -x).exp_(),
            x.masked_fill(flag[:, None], -torch.inf).logsumexp(-1),
            x.gather(1, ids[:, None]),
            x[flag],
            x.index_select(0, ids.clamp(max=3)),
            torch.cat((x[:2], x[2:].flip(0))),
            F.linear(x, x[:2], x[0, :2]),
            torch.mm(x, x.t(), out=torch.empty(4, 4, device=x.device)),
            F.embedding(ids.clamp(max=3), x),
            torch.full_like(x, 2).mul(torch.arange(9, device=x.device)),
            x.view(2, 2, 9).transpose(0, 1).reshape(4, 9),
            x[:, 2:5].contiguous(),
            x.t().to(torch.bfloat16).float(),
        ]

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected = all_of(rows, last, flags)
            found = all_of(rows.npu(), last.npu(), flags.npu())
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert a.device.type == "npu" and torch.equal(a.cpu(), b), i
    assert "npu:0" in repr(rows.npu())


def check_kv_scatter() -> None:
    key, value = numbers(5, 2, 16), numbers(5, 2, 16, seed=1)
    slab = torch.zeros(2, 3, 128, 2, 16, device="npu")
    for kind in (torch.int32, torch.int64):
        slots = torch.tensor([7, 300, 128, 0, 383], dtype=kind)
        torch_npu.npu_scatter_pa_kv_cache(key.npu(), value.npu(), slab[0], slab[1], slots.npu(), cache_mode="Norm")
        flat = slab.cpu().view(2, -1, 2, 16)
        assert torch.equal(flat[0, slots.long()], key) and torch.equal(flat[1, slots.long()], value)
        assert flat.abs().sum(-1).count_nonzero() == 2 * 5 * 2, "nothing else was written"
        slab.zero_()
    qkv = torch.zeros(5, 96, device="npu")
    with raises((ValueError, RuntimeError), "contiguous"):
        strided = qkv[:, 32:64].unflatten(-1, (2, 16))
        torch_npu.npu_scatter_pa_kv_cache(strided, strided, slab[0], slab[1], slots.npu(), cache_mode="Norm")
        torch.npu.synchronize()


def check_attention() -> None:
    """Prompts, chunks over a prefix and single queries in one call; both versions, both cache layouts, a window."""
    for dtype in FLOATS:
        case = attention_case([6, 190, 300, 128], [6, 5, 1, 128], dtype)
        expected = attention_expected(*case)
        q, k, v, how = on_device(*case)
        out, lse = torch_npu.npu_fused_infer_attention_score(q, k, v, **how)
        close(out, expected)
        assert lse.shape == (0,)
        heads_first = [x.transpose(1, 2).contiguous().npu() for x in case[1:3]]
        out, lse = torch_npu.npu_fused_infer_attention_score(q, *heads_first, **how, softmax_lse_flag=True)
        close(out, expected)
        assert lse.shape == (140, 4, 1)
        newer = {
            "actual_seq_lengths": "actual_seq_qlen",
            "actual_seq_lengths_kv": "actual_seq_kvlen",
            "num_heads": "num_query_heads",
            "scale": "softmax_scale",
        }
        renamed = {newer.get(name, name): x for name, x in how.items()}
        close(torch_npu.npu_fused_infer_attention_score_v2(q, k, v, **renamed)[0], expected)
        banded = {**how, "sparse_mode": 4, "pre_tokens": 39, "next_tokens": 0}
        out = torch_npu.npu_fused_infer_attention_score(q, k, v, **banded)[0]
        close(out, attention_expected(*case, window=40))
    with raises(RuntimeError):
        torch_npu.npu_fused_infer_attention_score(q, k, v, **how, window=3)


def check_attention_sums() -> None:
    """The log-sum-exp is of the scaled scores: two halves of the keys can be merged by it."""
    query, keys, values, how = attention_case([256], [1], torch.float32)
    whole = attention_expected(query, keys, values, how)
    q, k, v, moved = on_device(query, keys, values, how)
    parts = []
    for half in (0, 1):
        some = {**moved, "atten_mask": None, "sparse_mode": 0, "actual_seq_lengths_kv": [128], "softmax_lse_flag": True}
        some["block_table"] = moved["block_table"][:, half : half + 1].contiguous()
        parts.append([x.cpu() for x in torch_npu.npu_fused_infer_attention_score(q, k, v, **some)])
    share = torch.stack([lse for _, lse in parts]).softmax(0)
    close(share[0] * parts[0][0] + share[1] * parts[1][0], whole)


def check_quantised_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (64, 24), dtype=torch.int8, generator=generator)  # [K, N]
    scale = torch.rand(24, generator=generator) / 100
    for dtype in (torch.bfloat16, torch.float16):
        x = numbers(5, 64, dtype=dtype)
        x[3] = 0
        levels, rows = torch_npu.npu_dynamic_quant(x.npu())
        assert levels.dtype == torch.int8 and rows.shape == (5,)
        error = (levels.cpu().float() * rows.cpu()[:, None] - x.float()).abs()
        assert (error <= rows.cpu()[:, None] * 0.5001).all() and levels[3].cpu().count_nonzero() == 0
        assert (levels.cpu().abs().amax(-1)[[0, 1, 2, 4]] == 127).all()
        y = torch_npu.npu_quant_matmul(levels, weight.npu(), scale.npu(), pertoken_scale=rows, output_dtype=dtype)
        assert y.dtype == dtype
        close(y, (levels.cpu().double() @ weight.double() * rows.cpu()[:, None] * scale).float())
        half = scale.to(dtype)
        y = torch_npu.npu_weight_quant_batchmatmul(x.npu(), weight.npu(), half.npu())
        close(y, x.float() @ (weight.float() * half.float()))
        stored = weight.t().contiguous().npu()  # [N, K], as weights lie; the operator takes the transposed view
        assert torch.equal(torch_npu.npu_weight_quant_batchmatmul(x.npu(), stored.t(), half.npu()).cpu(), y.cpu())
        again = torch_npu.npu_quant_matmul(levels, stored.t(), scale.npu(), pertoken_scale=rows, output_dtype=dtype)
        close(again, (levels.cpu().double() @ weight.double() * rows.cpu()[:, None] * scale).float())
    nz = torch_npu.npu_format_cast(weight.npu(), 29)
    assert torch.equal(torch_npu.npu_format_cast(nz, 2).cpu(), weight)
    with raises((ValueError, RuntimeError), "float16 or bfloat16"):
        torch_npu.npu_dynamic_quant(torch.ones(2, 4, device="npu"))
        torch.npu.synchronize()


def check_top_k_top_p() -> None:
    logits = numbers(6, 50)
    k = torch.tensor([1, 5, 50, 10, 3, 20], dtype=torch.int32)
    p = torch.tensor([1.0, 0.9, 0.5, 0.0, 0.7, 0.99])
    found = torch_npu.npu_top_k_top_p(logits.npu(), p.npu(), k.npu()).cpu()
    for row, kept in enumerate(found > -math.inf):
        values, order = logits[row].sort(descending=True)
        probabilities = values[: k[row]].softmax(-1)
        count = int((probabilities.cumsum(-1) - probabilities < p[row]).sum()) if p[row] > 0 else 1
        assert set(kept.nonzero().flatten().tolist()) == set(order[:count].tolist()), row
        assert torch.equal(found[row][kept], logits[row][kept])


# ---- across processes -------------------------------------------------------------------------------------------------


def borrow(inbox, outbox) -> None:
    x = inbox.get()
    outbox.put((x + 1).sum().item())
    x.fill_(7)
    torch.npu.synchronize()
    outbox.put("written")
    inbox.get()


def check_tensors_of_another_process() -> None:
    """The other process computes on the same memory."""
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    other = context.Process(target=borrow, args=(inbox, outbox))
    other.start()
    x = torch.arange(8.0).npu()
    inbox.put(x)
    assert outbox.get(timeout=60) == 36
    assert outbox.get(timeout=60) == "written"
    assert x.cpu().tolist() == [7.0] * 8
    inbox.put(None)
    other.join(30)
    assert other.exitcode == 0


def fault_refused_export() -> None:
    x = torch.ones(4, device="npu")
    with raises(RuntimeError):
        torch.multiprocessing.reductions.reduce_tensor(x)
    assert x.sum().item() == 4


def fork_before_the_device_is_touched() -> None:
    """A keeper that has imported the plugin may fork a process that uses the device. (Runs before anything else.)"""
    assert not torch.npu.is_initialized()
    child = os.fork()
    if child == 0:
        try:
            torch.npu.set_device(1)
            assert (torch.ones(3, device="npu") + 1).sum().item() == 6
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main(names: list[str]) -> None:
    for name in names:
        started, error = time.perf_counter(), None
        try:
            if not name.startswith("fork"):
                torch.npu.set_device(0)
            globals()[name]()
        except BaseException:
            error = traceback.format_exc()
        print(json.dumps({"name": name, "error": error, "seconds": round(time.perf_counter() - started, 3)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
