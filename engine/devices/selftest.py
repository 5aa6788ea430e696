"""`deepserve.py doctor --selftest --device NAME`: does a device compute what it should, and how fast. One report to attach.

First the device's operators on random numbers (`operator_cases`); on an npu the plugin's own operators too, beside their
references (`npu_calls`). Then the default model's greedy text beside that of the reference operators on cpu in float32, and
rates beside the bound that memory and matrix units give, both measured in the same run.

A check that fails, or that the device can't run, is a line of the report; the next one runs all the same.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from engine import capacity, devices, models, weights
from engine.devices import StepInputs, StepOutput, ascend, fork_check, npu_calls, open_device
from engine.devices.operator_cases import BOUNDS, CASES, DTYPES, TOLERANCE, Probe, sampling_rows
from engine.tokenizer import Tokenizer
from engine.types import Packing, UserError

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n",
    "Water boils at a lower temperature on a mountain because",
)
TEXT_TOKENS = 48
TIE = 1e-3  # nats between the reference's two likeliest: rounding may choose the other
# Mean difference of the log-probabilities of the reference's own text. In bfloat16 the default model's are off by 0.02 on cpu, on
# the operators and on the compiled kernels alike; float16 has three bits more.
LOGPROB_BOUND = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}

# Sequences at once, tokens of context: more where the device has memory of its own.
DECODES = {False: ((1, 128), (8, 128)), True: ((1, 512), (16, 512), (64, 512))}
WARM_STEPS, DECODE_STEPS, PREFILL_STEPS = 8, 32, 3
COPY_BYTES = {False: 128 << 20, True: 1 << 30}
MATRIX = {False: 2048, True: 8192}


class Check(msgspec.Struct):
    part: str  # operators | npu operators | sampling | text | forks | rates
    name: str
    case: str
    ok: bool
    found: str
    error: float = 0.0


class Figure(msgspec.Struct):
    name: str
    value: float
    unit: str
    note: str = ""


class Report(msgspec.Struct):
    device: str
    date: str
    command: str
    versions: dict[str, str]
    checks: list[Check] = []
    figures: list[Figure] = []
    notes: list[str] = []

    @property
    def failed(self) -> list[Check]:
        return [c for c in self.checks if not c.ok]


Tell = Callable[[str], None]


# ---- operators -------------------------------------------------------------------------------------------------------


def check_operators(name: str, report: Report, tell: Tell) -> None:
    for dtype in devices.kind(name).dtypes:
        probe = Probe(name, dtype)
        for part, cases in CASES:
            found: dict[str, list[Check]] = {}
            try:
                for operator, case, off in cases(probe):
                    bound = BOUNDS.get(operator, TOLERANCE[dtype])
                    check = Check(part, operator, f"{dtype}, {case}", off <= bound, f"{off:.1e}, at most {bound:.0e}", off)
                    found.setdefault(operator, []).append(check)
            except Exception as e:  # the device can't run what comes next
                group = cases.__name__
                found.setdefault(group, []).append(Check(part, group, dtype, False, told(e)))
            for checks in found.values():
                add_many(report, tell, dtype, checks)
        probe.device.close()


def check_npu_operators(operators: Callable[[str], Callable[..., Any]], where: torch.device, report: Report, tell: Tell) -> None:
    """The plugin's operators beside their references; `operators`: by name."""
    found: dict[str, list[Check]] = {}
    for call in npu_calls.calls():
        try:
            off, bound = npu_calls.compare(call, operators, where)
            check = Check("npu operators", call.operator, call.case, off <= bound, f"{off:.1e}, at most {bound:.0e}", off)
        except Exception as e:
            check = Check("npu operators", call.operator, call.case, False, told(e), float("inf"))
        found.setdefault(call.operator, []).append(check)
    for checks in found.values():
        add_many(report, tell, "", checks)


def told(error: Exception) -> str:
    """Without the plugin's stack traces."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def add_many(report: Report, tell: Tell, case: str, checks: list[Check]) -> None:
    """Checks of one operator, told in one line: the worst of them."""
    report.checks += checks
    shown = max(checks, key=lambda c: (not c.ok, c.error))
    many = f"{len(checks)} cases" if len(checks) > 1 else "1 case"
    tell(f"{'ok  ' if shown.ok else 'FAIL'} {shown.name:36} {case:10} {many:10} {shown.found}")


def add(report: Report, tell: Tell, part: str, name: str, case: str, ok: bool, found: str) -> None:
    report.checks.append(Check(part, name, case, ok, found))
    tell(f"{'ok  ' if ok else 'FAIL'} {name:18} {case:46} {found}")


# ---- a model ---------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Tokens of a sequence to compute: those of `ids`, or one that the slot's last id is fed to."""

    slot: int
    start: int
    ids: Sequence[int] | None


class Loaded:
    """A model on a device, and sequences by slot, each in blocks of its own."""

    def __init__(self, path: Path, device: Any, packing: Packing, step_tokens: int, sequences: int, length: int):
        self.device, self.step_tokens = device, step_tokens
        checkpoint = weights.open_checkpoint(path)
        self.model: Any = models.build(checkpoint.config)
        fd = os.memfd_create("weights")
        self.manifest = weights.pack(checkpoint, self.model.weights(), packing, fd)
        mapped = weights.map_slabs(self.manifest, [fd])
        os.close(fd)
        self.model.bind(device, {name: device.weight(parts) for name, parts in mapped.items()}, length)
        size = device.block_size
        each = -(-length // size)
        self.tables = np.random.default_rng(0).permutation(sequences * each).astype(np.int32).reshape(sequences, each)
        self.kv = device.kv_cache(self.model.layers, sequences * each, size, self.model.kv_heads, self.model.head_dim)
        device.configure(vocab=self.model.vocab, slots=sequences, tokens=max(step_tokens, sequences))

    def launch(self, parts: Sequence[Part], top: int = -1, scored: Sequence[int] = ()) -> Any:
        """A step that samples after each part; `scored`: ids whose log-probabilities are asked at the ends of the one part."""
        size = self.device.block_size
        counts = np.array([1 if p.ids is None else len(p.ids) for p in parts], np.int32)
        starts = np.array([p.start for p in parts], np.int32)
        slots = np.array([p.slot for p in parts], np.int32)
        q_start = np.append(0, np.cumsum(counts)).astype(np.int32)
        owner = np.repeat(np.arange(len(parts)), counts)
        positions = (np.arange(q_start[-1]) - q_start[owner] + starts[owner]).astype(np.int32)
        ends = starts + counts
        blocks = np.ascontiguousarray(self.tables[slots][:, : -(-int(ends.max()) // size)])
        feed = np.concatenate([[p.slot] if p.ids is None else [-1] * len(p.ids) for p in parts]).astype(np.int32)
        last = q_start[1:] - 1
        score_rows = np.arange(q_start[-1] - len(scored), q_start[-1], dtype=np.int32)
        step = StepInputs(
            ids=np.concatenate([[0] if p.ids is None else p.ids for p in parts]).astype(np.int32),
            feed=feed,
            positions=positions,
            kv_slots=(blocks[owner, positions // size] * size + positions % size).astype(np.int32),
            q_start=q_start,
            kv_len=ends.astype(np.int32),
            blocks=blocks,
            rows=np.concatenate([last, score_rows]).astype(np.int32),
            sampling=sampling_rows(len(parts), slot=slots, position=ends, logprobs=top),
            score_ids=np.array(scored, np.int32),
        )
        return self.device.launch(lambda device, view: self.model.forward(device, view, self.kv), step)

    def prefill(self, slot: int, ids: Sequence[int], top: int = -1) -> StepOutput:
        """The prompt, in as many steps as it needs; what the last one answers."""
        pending = [
            self.launch([Part(slot, at, ids[at : at + self.step_tokens])], top) for at in range(0, len(ids), self.step_tokens)
        ]
        return [p.result() for p in pending][-1]

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> tuple[list[list[int]], list[list[float]]]:
        """Texts of `count` ids, and at each id how far the likeliest was from the next. Two steps are on their way at once."""
        first: list[StepOutput] = [self.prefill(slot, prompt, top=2) for slot, prompt in enumerate(prompts)]
        steps: list[StepOutput] = []
        pending: list[Any] = []
        for done in range(1, count):
            pending.append(self.launch([Part(s, len(p) + done - 1, None) for s, p in enumerate(prompts)], top=2))
            if len(pending) > 1:
                steps.append(pending.pop(0).result())
        steps += [p.result() for p in pending]
        texts, gaps = [], []
        for s in range(len(prompts)):
            rows = [(first[s], 0), *((step, s) for step in steps)]
            texts.append([int(o.ids[row]) for o, row in rows])
            gaps.append([float(o.logprobs.top[row, 0] - o.logprobs.top[row, 1]) for o, row in rows if o.logprobs is not None])
        return texts, gaps

    def scores(self, prompt: Sequence[int], text: Sequence[int]) -> np.ndarray:
        """Log-probabilities of the ids of `text` after `prompt`; both fit a step."""
        ids = [*prompt, *text]
        scores = self.launch([Part(0, 0, ids[:-1])], scored=text).result().scores
        assert scores is not None
        return scores.chosen


def check_text(name: str, path: Path, report: Report, tell: Tell) -> None:
    tokenizer = Tokenizer.load(path)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    threads = torch.get_num_threads()
    length = max(map(len, prompts)) + TEXT_TOKENS

    def loaded(name: str, packing: Packing) -> Loaded:
        device = open_device(name, packing.dtype, threads, packing.format)
        return Loaded(path, device, packing, devices.kind(name).step_tokens, len(prompts), length)

    reference = loaded("cpu", Packing("float32", "rows", "none"))
    texts, gaps = reference.greedy(prompts, TEXT_TOKENS)
    exact = [reference.scores(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    reference.device.close()
    for packing in packings(name):
        case = f"{packing.dtype}, " + ("compiled kernels" if packing.format == "panels" else "operators")
        try:
            ours = loaded(name, packing)
            found, _ = ours.greedy(prompts, TEXT_TOKENS)
            if packing.dtype == "float32":
                for text, right, gap, words in zip(found, texts, gaps, PROMPTS, strict=True):
                    same = sum(np.cumprod(np.equal(text, right)))
                    tie = same < len(right) and gap[same] < TIE
                    add(
                        report,
                        tell,
                        "text",
                        "greedy text",
                        f"{case}, {words[:20]!r}",
                        bool(same == len(right) or tie),
                        f"{same} of {len(right)} tokens are the reference's" + (", then a tie" if tie else ""),
                    )
            pairs = list(zip(prompts, texts, strict=True))
            off = np.concatenate([np.abs(ours.scores(*pair) - e) for pair, e in zip(pairs, exact, strict=True)])
            agree = np.concatenate([np.equal(a, b) for a, b in zip(found, texts, strict=True)]).mean()
            bound = LOGPROB_BOUND[packing.dtype]
            said = f"off by {off.mean():.4f} nats (mean), {off.max():.3f} (worst); at most {bound} (mean)"
            add(report, tell, "text", "log-probabilities", case, bool(off.mean() <= bound), said)
            report.figures.append(Figure(f"greedy ids equal, {case}", round(float(agree), 3), "of all, free running"))
            ours.device.close()
        except Exception as e:
            add(report, tell, "text", "greedy text", case, False, told(e))


def check_forks(name: str, path: Path, report: Report, tell: Tell) -> None:
    try:
        for case, ok, found, rate in fork_check.looked_at(name, path, packings(name)[0]):
            add(report, tell, "forks", "weights", case, ok, found)
            figure(report, tell, f"weights {case.split()[0]}", rate, "GB/s", case)
    except Exception as e:
        add(report, tell, "forks", "weights", "", False, told(e))


def packings(name: str) -> list[Packing]:
    """How a device can be given its weights."""
    if devices.kind(name).own_memory:
        return [Packing(dtype, "rows", "none") for dtype in devices.kind(name).dtypes]
    compiled = [Packing("bfloat16", "panels", "auto")] if capacity.has_compiled_kernels() else []
    return [Packing("bfloat16", "rows", "none"), *compiled]


# ---- rates -----------------------------------------------------------------------------------------------------------


def best_seconds(run: Callable[[], Any], wait: Callable[[], None], tries: int = 5) -> float:
    times = []
    for _ in range(tries + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure_peaks(device: Any, own: bool, dtype: str, report: Report, tell: Tell) -> tuple[float, float]:
    """Bytes read a second and operations a second, the best of some tries."""
    where = getattr(device, "where", torch.device("cpu"))
    wait = device.api.synchronize if own else lambda: None
    copied, read = measure_memory(where, own, wait, report, tell)
    side = MATRIX[own]
    a, b = (torch.ones((side, side), dtype=DTYPES[dtype], device=where) for _ in "ab")
    done = 2 * side**3 / best_seconds(lambda: torch.mm(a, b), wait)
    figure(report, tell, f"matrix product, {dtype}", done / 1e12, "T operations/s", f"[{side}, {side}], torch's own")
    return max(copied, read), done


def measure_memory(where: torch.device, own: bool, wait: Callable[[], None], report: Report, tell: Tell) -> tuple[float, float]:
    """Bytes a second of a copy, reads and writes counted, and of a sum, which reads alone."""
    size = COPY_BYTES[own]
    source = torch.ones(size // 4, dtype=torch.float32, device=where)
    target = torch.empty_like(source)
    copied = 2 * size / best_seconds(lambda: target.copy_(source), wait)
    read = size / best_seconds(source.sum, wait)
    figure(report, tell, "memory, copy", copied / 1e9, "GB/s", "read and written")
    figure(report, tell, "memory, read", read / 1e9, "GB/s", "a sum")
    if own:
        pinned = torch.empty(size // 4, dtype=torch.float32, pin_memory=True)
        to_device = size / best_seconds(lambda: target.copy_(pinned, non_blocking=True), wait)
        to_host = size / best_seconds(lambda: pinned.copy_(source, non_blocking=True), wait)
        figure(report, tell, "host to device", to_device / 1e9, "GB/s", "pinned")
        figure(report, tell, "device to host", to_host / 1e9, "GB/s", "pinned")
    return copied, read


def figure(report: Report, tell: Tell, name: str, value: float, unit: str, note: str = "") -> None:
    report.figures.append(Figure(name, float(f"{value:.4g}"), unit, note))
    tell(f"     {name:34} {value:12.4g} {unit:16} {note}")


def measure_rates(name: str, path: Path, report: Report, tell: Tell) -> None:
    """Decode and prefill of the default model as it is served by default, and their share of the bound: bytes of weights and
    cache over the memory's rate, operations over the matrix units'."""
    own = devices.kind(name).own_memory
    packing = packings(name)[0] if own else packings(name)[-1]
    device = open_device(name, packing.dtype, torch.get_num_threads(), packing.format)
    reading, computing = measure_peaks(device, own, packing.dtype, report, tell)
    step_tokens = devices.kind(name).step_tokens
    most, context = (max(column) for column in zip(*DECODES[own], strict=True))
    length = context + WARM_STEPS + DECODE_STEPS + 1
    model = Loaded(path, device, packing, step_tokens, most, length)
    rng = np.random.default_rng(1)
    shape = model.model
    per_token = 2 * sum(int(np.prod(e.shape)) for e in model.manifest.entries if e.kind == "matrix")
    prompts = [Part(slot, 0, rng.integers(0, shape.vocab, context).tolist()) for slot in range(min(most, step_tokens // context))]
    tokens = len(prompts) * context
    model.launch(prompts).result()
    start = time.perf_counter()
    for _ in range(PREFILL_STEPS):
        model.launch(prompts).result()
    seconds = (time.perf_counter() - start) / PREFILL_STEPS
    share = tokens * per_token / computing / seconds
    note = f"{len(prompts)} prompts of {context} tokens in a step; {share:.0%} of the rate of torch's matrix product"
    figure(report, tell, f"prefill, {packing.dtype}", tokens / seconds, "tokens/s", note)
    kv_bytes = capacity.kv_bytes_per_token(shape, packing.dtype)
    # A lookup reads a few rows of the embedding; where it is the head's matrix too, all of it.
    tied = not any(e.name == "lm_head" for e in model.manifest.entries)
    read = sum(e.nbytes for e in model.manifest.entries if tied or e.kind != "embedding")
    for count, context in DECODES[own]:
        for slot in range(count):
            model.prefill(slot, rng.integers(0, shape.vocab, context).tolist())
        seconds = decode_seconds(model, count, context)
        share = (read + count * context * kv_bytes) / reading / seconds
        note = f"{count} at once, {context} tokens of context; {share:.0%} of the memory's rate"
        figure(report, tell, f"decode, {packing.dtype}", count / seconds, "tokens/s", note)
    device.close()


def decode_seconds(model: Loaded, count: int, context: int) -> float:
    """Of a step, each launched while the one before it runs; captures, if any, are over."""
    pending: list[Any] = []
    for done in range(WARM_STEPS + DECODE_STEPS):
        if done == WARM_STEPS:
            while pending:
                pending.pop(0).result()
            start = time.perf_counter()
        pending.append(model.launch([Part(slot, context + done, None) for slot in range(count)]))
        if len(pending) > 1:
            pending.pop(0).result()
    pending.pop(0).result()
    return (time.perf_counter() - start) / DECODE_STEPS


# ---- the report ------------------------------------------------------------------------------------------------------


def versions(name: str) -> dict[str, str]:
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or ""),
        "ascend driver": ascend.driver(),
        "cann": ascend.cann_version(),
        "torch-npu": ascend.plugin(),
    }
    return {key: value for key, value in found.items() if value}


def run(name: str, path: Path | None, why_not: str, command: str, tell: Tell) -> Report:
    """Everything, in order; `path`: the default model, or None and why it isn't there. Raises `UserError` where the device can't
    be opened."""
    report = Report(
        device=name,
        date=time.strftime("%Y-%m-%d"),
        command=command,
        versions=versions(name),
    )
    kind = devices.kind(name)
    opened: Any = open_device(name, kind.dtypes[0], torch.get_num_threads())
    if kind.own_memory:
        report.versions["device"] = opened.api.get_device_name(opened.where)
        report.versions["device memory free"] = capacity.gib(opened.free_bytes())
    opened.close()
    for key, value in report.versions.items():
        tell(f"     {key:24} {value}")
    tell(f"\noperators, against formulas in float64: largest |found - expected| / (1 + |expected|)  [{name}]")
    check_operators(name, report, tell)
    if name == "npu":
        tell("\ntorch_npu's operators, against their references")
        check_npu_operators(lambda operator: getattr(torch.ops.npu, operator), opened.where, report, tell)
    if path is None:
        report.notes.append(f"text and rates were not run: {why_not}")
    else:
        tell(f"\ngreedy text of {path.name}, against the reference operators on cpu in float32")
        check_text(name, path, report, tell)
        if kind.own_memory:
            tell("\nweights in slabs, and taken by another process")
            check_forks(name, path, report, tell)
        tell("\nrates")
        try:
            measure_rates(name, path, report, tell)
        except Exception as e:
            add(report, tell, "rates", "rates", "", False, told(e))
    return report


def main(name: str, path: Path | None, why_not: str, to: Path | None, command: str) -> int:
    """Print the report, and write it to `to`; the exit status is 1 where a check failed. Raises `UserError`."""
    report = run(name, path, why_not, command, lambda line: print(line, flush=True))
    for note in report.notes:
        print(f"\nnote: {note}")
    failed = report.failed
    print(f"\n{len(report.checks)} checks, {len(failed)} failed" + (":" if failed else ""))
    for check in failed:
        print(f"FAIL {check.name}: {check.case}: {check.found}")
    if to is not None:
        try:
            to.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
        except OSError as e:
            raise UserError(f"--json {to}: {e.strerror}", "json") from None
        print(f"written to {to}", file=sys.stderr)
    return 1 if failed else 0
