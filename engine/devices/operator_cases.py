"""The operators of a device on random numbers, run inside steps of the device itself, as a model would call them, against plain
formulas in float64. What `doctor --selftest` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from engine.devices import SamplingRows, StepInputs, StepOutput, StepView, open_device
from engine.devices.torch_device import Cell
from engine.devices.torch_sampler import Sampler
from engine.models import WeightPart

# Largest |found - expected| / (1 + |expected|). A product of 24 bits is off by a few units of the last place after a sum of a
# thousand; 16-bit results by their own rounding, several times over where an operator rounds in between.
TOLERANCE = {"float32": 3e-5, "float16": 5e-3, "bfloat16": 3e-2}
BOUNDS = {
    "choices": 0.02,  # sums of a row may differ in the last place, and with them a choice at a limit: one of 64
    "log-probabilities": 1e-5,  # made in float32, whatever the logits' dtype
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-5
VOCAB = 2000
# Heads, heads of K and V, head size: the default model's, and those of most models of 1 to 70 billion.
HEADS = ((9, 3, 64), (8, 2, 128))
# (queries, tokens in the cache) of the sequences of a step.
STEPS = {
    "prefill": [(70, 70)],
    "chunks": [(33, 200), (128, 128), (5, 300)],
    "mixed": [(1, 40), (30, 30), (1, 129), (4, 200), (100, 300), (1, 1)],
    "decode": [(1, 40), (1, 129), (1, 1), (1, 300), (1, 128)],
}
WINDOWS = (0, 1, 100)


Given = Callable[[str, np.ndarray], Any]
Found = tuple[str, str, float]  # operator, case, error


class Probe:
    """Runs operators of one device inside its own steps. Inputs come in as rows of a table that is looked up; what an operator
    leaves is read before the step ends."""

    def __init__(self, name: str, dtype: str, seed: int = 0):
        self.device: Any = open_device(name, dtype, torch.get_num_threads())
        self.dtype = DTYPES[dtype]
        self.rng = np.random.default_rng(seed)
        self.blocks = 64 * 16 // self.device.block_size + 8
        self.device.configure(vocab=VOCAB, slots=16, tokens=1024)
        self.device.kv_cache(1, self.blocks, self.device.block_size, 1, 16)  # a device looks at its cache before any step

    def random(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Normal values that the dtype can hold, as float32."""
        values = (scale * self.rng.standard_normal(shape)).astype(np.float32)
        return torch.from_numpy(values).to(self.dtype).float().numpy()

    def weight(self, values: np.ndarray, kind: str = "matrix") -> Any:
        stored = torch.from_numpy(values) if kind == "vector" else torch.from_numpy(values).to(self.dtype)
        dtype = str(stored.dtype).removeprefix("torch.")
        data = memoryview(stored.contiguous().view(torch.uint8).numpy().reshape(-1))
        return self.device.weight([WeightPart(data, dtype, values.shape, kind)])

    def step(self, lengths: Sequence[tuple[int, int]], sampling: SamplingRows | None = None) -> StepInputs:
        """A step with the last `count` of `end` tokens of each sequence, in shuffled blocks; token i has id i."""
        counts, ends = (np.array(column, np.int32) for column in zip(*lengths, strict=True))
        size = self.device.block_size
        needed = -(-ends // size)
        free = self.rng.permutation(int(needed.sum())).astype(np.int32)
        blocks = np.full((len(ends), int(needed.max())), -1, np.int32)
        for row, (many, last) in enumerate(zip(needed, np.cumsum(needed), strict=True)):
            blocks[row, :many] = free[last - many : last]
        q_start = np.append(0, np.cumsum(counts)).astype(np.int32)
        total = int(q_start[-1])
        owner = np.repeat(np.arange(len(ends)), counts)
        positions = (np.arange(total) - q_start[owner] + (ends - counts)[owner]).astype(np.int32)
        return StepInputs(
            ids=np.arange(total, dtype=np.int32),
            feed=np.full(total, -1, np.int32),
            positions=positions,
            kv_slots=blocks[owner, positions // size] * size + positions % size,
            q_start=q_start,
            kv_len=ends,
            blocks=blocks,
            rows=np.arange(0 if sampling is None else total, dtype=np.int32),
            sampling=sampling or sampling_rows(0),
            score_ids=np.empty(0, np.int32),
        )

    def run(self, step: StepInputs, body: Callable[[StepView, Given], Any]) -> StepOutput:
        """A step whose forward is `body(view, given)`; `given(name, rows)` is a buffer that holds rows, one for each token."""
        # A captured step could not be read: its shape is one that was never seen.
        getattr(self.device, "seen", set()).clear()

        def forward(device: Any, view: StepView) -> Any:
            def given(name: str, rows: np.ndarray) -> Any:
                out = device.buffer(name, view.tokens, rows.shape[1])
                device.embed(out, self.weight(rows, "embedding"), view.ids)
                return out

            return body(view, given)

        return self.device.launch(forward, step).result()


def values(x: Any, rows: int | None = None) -> np.ndarray:
    """The first `rows` of what a buffer or a cache holds, as float64."""
    if isinstance(x, Cell):
        x = x.value if x.parts is None else torch.cat([part.flatten(1) for part in x.parts], dim=1)
    return x[:rows].double().cpu().numpy() if x.device.type == "cpu" else x[:rows].float().cpu().double().numpy()


def sampling_rows(count: int, **columns: Any) -> SamplingRows:
    """Greedy rows, but for `columns`."""
    base = SamplingRows(
        slot=np.arange(count, dtype=np.int32),
        position=np.zeros(count, np.int64),
        seed=np.zeros(count, np.uint64),
        temperature=np.zeros(count, np.float32),
        top_k=np.zeros(count, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        presence=np.zeros(count, np.float32),
        frequency=np.zeros(count, np.float32),
        repetition=np.ones(count, np.float32),
        hold_stop=np.zeros(count, bool),
        has_setup=np.zeros(count, bool),
        logprobs=np.full(count, -1, np.int32),
    )
    for name, value in columns.items():
        getattr(base, name)[:] = value
    return base


def normed(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * gain


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Not a number, which is within no bound, where a result is not one."""
    return float((np.abs(found - expected) / (1 + np.abs(expected))).max(initial=0.0))


def worst(errors: Iterable[float]) -> float:
    return float(np.max(list(errors)))


def row_cases(probe: Probe) -> Iterator[Found]:
    """Operators that work row by row."""
    for rows, width in ((1, 576), (7, 1536), (70, 1024)):
        yield from row_case(probe, rows, width)


def row_case(probe: Probe, rows: int, width: int) -> Iterator[Found]:
    device = probe.device
    x, more, gain = probe.random(rows, width), probe.random(rows, width), probe.random(width)
    # As large as a model's, so that products are of the size of what goes in: a sum's rounding grows with what is summed.
    wide, bias = probe.random(width // 2 * 3, width, scale=width**-0.5), probe.random(width // 2 * 3)
    kept: dict[str, list[np.ndarray]] = {}

    def keep(name: str, *buffers: Any) -> None:
        kept[name] = [values(b, rows) for b in buffers]

    def body(view: StepView, given: Given) -> Any:
        here, vector = given("x", x), probe.weight(gain, "vector")
        keep("embed", here)
        out = device.buffer("out", view.tokens, width)
        device.rms_norm(out, here, vector, EPS)
        keep("rms_norm", out)
        residual = given("residual", more)
        device.add_rms_norm(out, residual, here, vector, EPS)
        keep("add_rms_norm", residual, out)
        product, matrix = device.buffer("product", view.tokens, len(wide)), probe.weight(wide)
        device.linear(product, here, matrix)
        keep("linear", product)
        device.linear(product, here, matrix, probe.weight(bias, "vector"))
        keep("linear, bias", product)
        half = device.buffer("half", view.tokens, width // 2)
        device.swiglu(half, here)
        keep("swiglu", half)
        taken = device.buffer("taken", view.sampled, width)
        device.take_rows(taken, here, view.rows)
        keep("take_rows", taken)
        return taken

    step = probe.step([(rows, rows)])
    picked = step.rows = probe.rng.integers(0, rows, rows).astype(np.int32)
    probe.run(step, body)
    exact = x.astype(np.float64)
    gate, up = np.split(exact, 2, axis=1)
    product = exact @ wide.astype(np.float64).T
    expected = {
        "embed": [exact],
        "rms_norm": [normed(exact, gain)],
        # What is normed is the sum as it was stored.
        "add_rms_norm": [exact + more, normed(kept["add_rms_norm"][0], gain)],
        "linear": [product],
        "linear, bias": [product + bias],
        "swiglu": [gate / (1 + np.exp(-gate)) * up],
        "take_rows": [exact[picked]],
    }
    for name, right in expected.items():
        yield name, f"[{rows}, {width}]", worst(error(f, e) for f, e in zip(kept[name], right, strict=True))


def head_cases(probe: Probe) -> Iterator[Found]:
    """Norms of heads, rotation and what is written to the cache."""
    for heads, kv_heads, dim in HEADS:
        yield from head_case(probe, heads, kv_heads, dim)


def head_case(probe: Probe, heads: int, kv_heads: int, dim: int) -> Iterator[Found]:
    device, case = probe.device, f"{heads} heads, {kv_heads} of K and V, of {dim}"
    step = probe.step(STEPS["mixed"])
    count = len(step.ids)
    packed = probe.random(count, (heads + 2 * kv_heads) * dim)
    gains = probe.random(dim), probe.random(dim)
    angles = probe.rng.standard_normal((512, dim // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    kv = device.kv_cache(1, probe.blocks, device.block_size, kv_heads, dim).layer(0)
    kept: list[np.ndarray] = []

    def body(view: StepView, given: Given) -> Any:
        qkv = given("qkv", packed)
        device.head_norm(qkv, *(probe.weight(g, "vector") for g in gains), heads, kv_heads, EPS)
        kept.append(values(qkv, count))
        device.rope_store(qkv, view.positions, device.constant(table), kv, view.kv_slots, heads, kv_heads)
        kept.append(values(qkv, count))
        return qkv

    probe.run(step, body)
    before, after = (x.reshape(count, -1, dim) for x in kept)
    q, k, v = np.split(packed.astype(np.float64).reshape(count, -1, dim), [heads, heads + kv_heads], axis=1)
    yield "head_norm", case, error(before, np.concatenate([normed(q, gains[0]), normed(k, gains[1]), v], axis=1))
    cos, sin = np.split(table.astype(np.float64)[step.positions][:, None], 2, axis=2)
    a, b = np.split(before[:, : heads + kv_heads], 2, axis=2)
    turned = np.concatenate([np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2), v], axis=1)
    yield "rope_store, rotation", case, error(after, turned)
    others = np.setdiff1d(np.arange(probe.blocks * device.block_size), step.kv_slots)
    for cache, right in zip(kv, (turned[:, heads : heads + kv_heads], v), strict=True):
        written = values(cache).reshape(-1, kv_heads, dim)
        stray = np.inf if written[others].any() else 0.0  # a slot of nobody's was written
        yield "rope_store, cache", case, worst([error(written[step.kv_slots], right), stray])


def attention_cases(probe: Probe) -> Iterator[Found]:
    for heads, kv_heads, dim in HEADS:
        for name in STEPS:
            for window in WINDOWS:
                yield attention_case(probe, name, heads, kv_heads, dim, window)


def attention_case(probe: Probe, name: str, heads: int, kv_heads: int, dim: int, window: int) -> Found:
    device, step = probe.device, probe.step(STEPS[name])
    count = len(step.ids)
    packed = probe.random(count, (heads + 2 * kv_heads) * dim)
    kv = device.kv_cache(1, probe.blocks, device.block_size, kv_heads, dim).layer(0)
    filled = [probe.random(probe.blocks * device.block_size, kv_heads, dim) for _ in kv]
    for cache, content in zip(kv, filled, strict=True):
        cache[: probe.blocks].copy_(torch.from_numpy(content).view(probe.blocks, device.block_size, kv_heads, dim))
    kept: list[np.ndarray] = []

    def body(view: StepView, given: Given) -> Any:
        out = device.buffer("attended", view.tokens, heads * dim)
        device.attention(out, given("qkv", packed), kv, view.attention, heads, kv_heads, dim**-0.5, window)
        kept.append(values(out, count))
        return out

    probe.run(step, body)
    queries = packed.astype(np.float64)[:, : heads * dim].reshape(count, heads, dim)
    expected = attended(step, queries, filled, device.block_size, window).reshape(count, -1)
    return "attention", f"{name}, {heads} heads of {dim}, window {window}", error(kept[0], expected)


def attended(step: StepInputs, queries: np.ndarray, kv: Sequence[np.ndarray], block_size: int, window: int) -> np.ndarray:
    """Attention by its formula, a sequence at a time."""
    out = np.empty_like(queries)
    group = queries.shape[1] // kv[0].shape[1]
    for s, end in enumerate(step.kv_len):
        first, last = step.q_start[s], step.q_start[s + 1]
        at = np.arange(end)
        slots = step.blocks[s, at // block_size] * block_size + at % block_size
        k, v = (cache[slots].astype(np.float64).repeat(group, axis=1) for cache in kv)
        own = step.positions[first:last, None]
        seen = (at <= own) & ((at > own - window) if window else True)
        scores = np.einsum("qhd,khd->hqk", queries[first:last], k) * queries.shape[2] ** -0.5
        scores = np.where(seen, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        out[first:last] = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v)
    return out


def sampled_cases(probe: Probe) -> Iterator[Found]:
    """The share of ids that are not the reference sampler's, and log-probabilities."""
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "temperature": {"temperature": 0.8},
        "top_k": {"temperature": 1.0, "top_k": 40},
        "top_p": {"temperature": 1.0, "top_p": 0.9},
        "all": {"temperature": 0.7, "top_k": 200, "top_p": 0.95, "min_p": 0.02},
    }
    for name, columns in kinds.items():
        wrong, off = zip(*(sampled_case(probe, columns, position) for position in range(4)), strict=True)
        yield "choices", name, float(np.mean(wrong))
        yield "log-probabilities", name, worst(off)


def sampled_case(probe: Probe, columns: dict[str, Any], position: int, count: int = 16) -> tuple[float, float]:
    logits = probe.random(count, VOCAB, scale=3.0)
    rows = sampling_rows(count, **columns, seed=np.arange(count) + 17, position=position, logprobs=3)
    found = probe.run(probe.step([(count, count)], rows), lambda view, given: given("logits", logits))
    expected = Sampler(VOCAB, count).sample(torch.from_numpy(logits), rows).numpy()
    assert found.logprobs is not None
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    off = error(found.logprobs.chosen, np.take_along_axis(exact, found.ids[:, None], 1)[:, 0])
    return float((found.ids != expected).mean()), off


# (part of the report, its cases)
CASES: tuple[tuple[str, Callable[[Probe], Iterator[Found]]], ...] = (
    ("operators", row_cases),
    ("operators", head_cases),
    ("operators", attention_cases),
    ("sampling", sampled_cases),
)
