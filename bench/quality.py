"""`python -m bench.quality`: what the fast kernels cost in quality, beside the float32 reference over the same stored weights.

    python -m bench.quality --data FOLDER [--cache FOLDER] [--json [FILE]] [--variant NAME=MODEL[,SETTING=VALUE...]]...

For each variant (a model file and settings) two things are measured, both against the reference torch operators in float32
on the same file, whose quantised weights they see dequantised and not rounded:

Perplexity of running English, in windows that share no context; a window's first token is not scored.

Agreement: the reference continues prompts greedily; the variant is given these texts and asked at every step which token it
holds likeliest (teacher forcing). Where it would choose another, the gap between the reference's own two likeliest tokens
tells how close the call was. Whole texts are compared too, with the variant left to run on its own.

FOLDER of --data holds prompts.jsonl, lines of {source, prompt}. Exit status 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.queue import cpu_model
from deepserve import LLM, RequestOutput, SamplingParams, UserError, __version__
from engine import capacity, weights
from engine.config import resolve
from engine.gguf import GGUF
from engine.native import cpu
from engine.quants import dequantize
from engine.tokenizer import Tokenizer
from engine.types import TokenLogprobs
from scale import pull

RESULTS = Path(__file__).parent / "results" / "quality.json"
MODEL = "smollm2-135m-instruct"
WINDOW = 1024  # tokens whose perplexity is measured together; the context of most published figures for small models
STEPS = 64  # tokens of a reference text
LONGEST_PROMPT = 512  # tokens: a prompt and its text fit a window, and reading prompts doesn't outweigh the texts
PASSAGE = 1500  # characters: prompts of this length and more hold an article or a chapter, in running English
PASSAGES = "t0"  # the source whose long prompts are prose; those of others hold programs
SEED = 0  # of the order in which passages and prompts are taken

QUANTISED_BAR = 0.01  # relative difference of perplexity, for activations, or keys and values, quantised to int8
BAR = 0.003  # for all else
UNQUANTISED = ("F32", "F16", "BF16")  # stored types whose agreement has a bar
AGREEMENT_BAR = 0.99  # share of steps
GAP_BAR = 0.1  # logits: with a larger gap between its two likeliest the reference was sure
# The flags that decide which kernels a processor gets.
X86_FLAGS = {"avx2", "fma", "avx_vnni", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"}
ARM_FLAGS = {"asimd", "asimddp", "bf16", "i8mm", "sve"}


# ---- figures (pure) -----------------------------------------------------------------------------------------------------


class Text(msgspec.Struct):
    """A prompt's ids, what the reference says next, and at each step the gap between its two likeliest, in logits."""

    prompt: list[int]
    ids: list[int]
    gaps: list[float]


class Agreement(msgspec.Struct):
    steps: int
    agreed: int
    share: float  # agreed / steps
    largest_gap: float  # logits, of the steps that don't agree; 0 where all do
    wide_gaps: list[float]  # those over GAP_BAR, largest first


class Row(msgspec.Struct):
    """One variant's figures. `error`: why there are none."""

    name: str
    model: str  # file name
    settings: dict[str, str]
    stored: str = ""  # type of most of the file's matrices
    weight_bytes: int = 0  # as served: tells whether quantised weights stay so
    perplexity: float | None = None
    reference_perplexity: float | None = None
    relative_difference: float | None = None
    bar: float = BAR
    agreement: Agreement | None = None
    equal_texts: int | None = None  # whole texts, free-running
    texts: int | None = None
    missed: list[str] = []  # bars, in words
    error: str = ""


def perplexity(logprobs: Iterable[float]) -> float:
    """exp of the mean negative log-probability (natural logs)."""
    values = list(logprobs)
    return math.exp(-math.fsum(values) / len(values))


def relative(value: float, reference: float) -> float:
    """How much larger `value` is than `reference`, as a share of the reference."""
    return value / reference - 1.0


def agreement(texts: Sequence[Text], choices: Sequence[Sequence[int]]) -> Agreement:
    """How often a variant's choice, given the text so far, is the reference's; `choices` has one id for each id of a text."""
    gaps = [
        gap
        for text, chosen in zip(texts, choices, strict=True)
        for want, got, gap in zip(text.ids, chosen, text.gaps, strict=True)
        if want != got
    ]
    steps = sum(len(text.ids) for text in texts)
    gaps.sort(reverse=True)
    agreed = steps - len(gaps)
    return Agreement(steps, agreed, agreed / steps, gaps[0] if gaps else 0.0, [gap for gap in gaps if gap > GAP_BAR])


def missed_bars(row: Row) -> list[str]:
    """The bars that a measured row misses, in words. Agreement has some where nothing is quantised."""
    missed = []
    if row.relative_difference is not None and abs(row.relative_difference) > row.bar:
        missed.append(f"perplexity {row.relative_difference:+.3%}, bar {row.bar:.1%}")
    if row.agreement is None or row.stored not in UNQUANTISED or row.settings.keys() & {"quantization", "kv_cache_dtype"}:
        return missed
    if row.agreement.share < AGREEMENT_BAR:
        missed.append(f"agreement {row.agreement.share:.2%}, bar {AGREEMENT_BAR:.0%}")
    if row.agreement.wide_gaps:
        missed.append(f"a gap of {row.agreement.largest_gap:.3f}, bar {GAP_BAR}")
    return missed


def windows(ids: Sequence[int], lead: Sequence[int], size: int, scored: int) -> list[list[int]]:
    """As many windows of `size` tokens, each begun by `lead`, as score at least `scored` tokens. Raises `UserError`."""
    own = size - len(lead)
    count = -(-scored // (size - 1))
    if len(ids) < count * own:
        raise UserError(f"the text has {len(ids)} tokens and {count * own} are wanted; give more --text, or fewer --tokens")
    return [[*lead, *ids[at : at + own]] for at in range(0, count * own, own)]


# ---- texts and prompts --------------------------------------------------------------------------------------------------


def records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. Raises `UserError`."""
    try:
        return [msgspec.json.decode(line, type=dict) for line in path.read_bytes().split(b"\n") if line.strip()]
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; --data names the folder of benchmark data, --text and --prompts files") from None
    except msgspec.DecodeError as e:
        raise UserError(f"{path}: not a file of JSON lines: {e}") from None


def column(path: Path, field: str) -> list[str]:
    """One text field of every line. Raises `UserError` where no line has it."""
    texts = [value for r in records(path) if isinstance(value := r.get(field), str) and value]
    if not texts:
        raise UserError(f'{path}: no line has a field "{field}" with text in it')
    return texts


def running_text(files: Sequence[Path]) -> str:
    """The texts of .txt files and of the `text` field of .jsonl files, one after another."""
    parts: list[str] = []
    for path in files:
        if path.suffix == ".jsonl":
            parts += column(path, "text")
            continue
        try:
            parts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--text {path}: {e.strerror if isinstance(e, OSError) else 'not UTF-8'}") from None
    return "\n\n".join(parts)


def passages(path: Path) -> str:
    """The long prose among the prompts, shuffled: tasks of one kind, often about one passage, stand together in the file."""
    found = [r["prompt"] for r in records(path) if r.get("source") == PASSAGES and len(r.get("prompt", "")) >= PASSAGE]
    if not found:
        raise UserError(f'{path}: no prompt of source "{PASSAGES}" has {PASSAGE} characters; give running English as --text')
    random.Random(SEED).shuffle(found)
    return "\n\n".join(found)


def text_windows(tokenizer: Tokenizer, text: str, scored: int) -> list[list[int]]:
    """Windows over a text, each begun as the model's own tokenizer begins a text (BOS, or nothing)."""
    lead = [i for i in tokenizer.encode("") if i == tokenizer.bos_id]
    return windows(tokenizer.encode(text, add_special=False), lead, WINDOW, scored)


def chat_prompts(tokenizer: Tokenizer, prompts: Sequence[str], count: int) -> list[list[int]]:
    """`count` of the prompts, of up to LONGEST_PROMPT tokens, in the model's chat form where it has one."""
    shuffled = list(prompts)
    random.Random(SEED).shuffle(shuffled)
    found: list[list[int]] = []
    for prompt in shuffled:
        if len(found) == count:
            return found
        try:
            text, special = tokenizer.render([{"role": "user", "content": prompt}]), False
        except UserError:  # no template
            text, special = prompt, True
        ids = tokenizer.encode(text, add_special=special)
        if len(ids) <= LONGEST_PROMPT:
            found.append(ids)
    if len(found) < count:
        raise UserError(f"{len(found)} prompts have up to {LONGEST_PROMPT} tokens and {count} are wanted; lower --num-prompts")
    return found


# ---- engines ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine(model: Path, settings: dict[str, str]) -> Iterator[LLM]:
    with LLM(model, max_model_len=WINDOW, **settings) as llm:
        yield llm


@contextlib.contextmanager
def reference_engine(model: Path) -> Iterator[LLM]:
    """The reference operators in float32, whatever the machine has."""
    before = os.environ.get(cpu.VARIABLE)
    os.environ[cpu.VARIABLE] = "reference"
    try:
        with engine(model, {"dtype": "float32"}) as llm:
            yield llm
    finally:
        os.environ.pop(cpu.VARIABLE)
        if before is not None:
            os.environ[cpu.VARIABLE] = before


def of_prompt(out: RequestOutput) -> list[TokenLogprobs]:
    """Log-probabilities of a prompt's tokens, but for the first one, which has none."""
    return [entry for entry in out.prompt_logprobs or [] if entry is not None]


def score(llm: LLM, texts: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of every token of every text, but for the first ones."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    return [entry.chosen for out in llm.generate(texts, params) for entry in of_prompt(out)]


def greedy(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[Text]:
    """STEPS tokens after each prompt, whatever they are: an answer that has ended goes on."""
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=2)
    return [
        Text(list(prompt), out.outputs[0].token_ids, [entry.top[0] - entry.top[1] for entry in out.outputs[0].logprobs or []])
        for prompt, out in zip(prompts, llm.generate(prompts, params), strict=True)
    ]


def forced_choices(llm: LLM, texts: Sequence[Text]) -> list[list[int]]:
    """What greedy decoding would choose at each step of each text, given the text before it."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    outs = llm.generate([text.prompt + text.ids for text in texts], params)
    return [[e.top_ids[0] for e in of_prompt(out)[-len(t.ids) :]] for t, out in zip(texts, outs, strict=True)]


# ---- variants -----------------------------------------------------------------------------------------------------------


class Variant(msgspec.Struct):
    name: str
    model: Path
    settings: dict[str, str]


def variant(text: str) -> Variant:
    """`NAME=MODEL[,SETTING=VALUE...]`. Raises `UserError`."""
    name, equals, rest = text.partition("=")
    model, *settings = rest.split(",")
    pairs = [s.partition("=") for s in settings]
    if not name or not equals or not model or not all(key and value for key, _, value in pairs):
        raise UserError(f"--variant {text}: write NAME=MODEL[,SETTING=VALUE...], as int8=./folder,quantization=int8")
    return Variant(name, pull.resolve(model), {key.replace("-", "_"): value for key, _, value in pairs})


def default_variants(folder: Path) -> list[Variant]:
    """The default model as it is, and as files that are made of it in `folder` unless they are there."""
    shipped = pull.resolve(MODEL)
    bf16, q8_0 = (converted(shipped, folder, kind) for kind in ("BF16", "Q8_0"))
    return [
        Variant("bf16", bf16, {"dtype": "bfloat16"}),
        Variant("q8_0", q8_0, {}),
        Variant("q4_1", shipped, {}),
        Variant("int8", bf16, {"quantization": "int8"}),
        Variant("kv_int8", bf16, {"dtype": "bfloat16", "kv_cache_dtype": "int8"}),
    ]


def converted(source: Path, folder: Path, kind: str) -> Path:
    """A GGUF file with `source`'s matrices as `kind` (BF16 or Q8_0), in `folder` unless it is there. Raises `UserError`."""
    target = folder / f"{source.name.split('.')[0]}.{kind}.gguf"
    if target.exists():
        return target
    try:
        import gguf
    except ImportError:
        raise UserError("the gguf package makes the BF16 and Q8_0 files: pip install -r requirements-test.txt") from None
    file = GGUF(source)  # the package's own reader takes seconds for a vocabulary
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, file.metadata["general.architecture"])
    for key, value in file.metadata.items():
        if key not in ("general.architecture", "general.file_type"):
            of = value[0] if isinstance(value, list) else None
            is_count = type(value) is int and value >= 0  # other readers insist on unsigned ones
            type_ = gguf.GGUFValueType.UINT32 if is_count else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, type_, None if of is None else gguf.GGUFValueType.get_type(of))
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    matrix = gguf.GGMLQuantizationType[kind]
    for name, info in file.tensors.items():
        values = np.empty(info.shape, np.float32)
        dequantize(file.raw(name), info.type, values)
        if values.ndim > 1:
            writer.add_tensor(name, gguf.quantize(values, matrix), raw_dtype=matrix)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)
    return target


def stored_type(model: Path) -> str:
    """The type of most of a checkpoint's matrices."""
    checkpoint = weights.open_checkpoint(model)
    types = [checkpoint.dtype(name) for name in checkpoint.names() if len(checkpoint.shape(name)) > 1]
    return max(sorted(set(types)), key=types.count)


# ---- the run ------------------------------------------------------------------------------------------------------------


class Reference(msgspec.Struct):
    """What float32 says of one model."""

    windows: list[list[int]]
    perplexity: float
    texts: list[Text]


def measure_reference(model: Path, text: str, prompts: Sequence[str], args: argparse.Namespace) -> Reference:
    """The reference's figures and texts: minutes of work, so they are taken from --cache where they are there."""
    tokenizer = Tokenizer.load(model)
    parts = text_windows(tokenizer, text, args.tokens)
    chats = chat_prompts(tokenizer, prompts, args.num_prompts)
    kept = args.cache and args.cache / f"reference-{reference_key(model, parts, chats)}.json"
    if kept and kept.exists():
        note(f"{model.name}: the float32 reference, from {kept.name}")
        return msgspec.json.decode(kept.read_bytes(), type=Reference)
    note(f"{model.name}: the float32 reference")
    with reference_engine(model) as llm:
        reference = Reference(parts, perplexity(score(llm, parts)), greedy(llm, chats))
    if kept:
        kept.write_bytes(msgspec.json.encode(reference))
    return reference


def reference_key(model: Path, parts: list[list[int]], chats: list[list[int]]) -> str:
    """Changes with the model's files, what is asked of them, and torch. New reference operators need an empty folder."""
    files = sorted(model.iterdir()) if model.is_dir() else [model]
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    asked = (stamps, parts, chats, STEPS, importlib.metadata.version("torch"))
    return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()[:16]


def measure(v: Variant, reference: Reference) -> Row:
    """One variant beside its reference."""
    with engine(v.model, v.settings) as llm:
        assert llm.engine is not None
        row = new_row(v)
        row.weight_bytes = llm.engine.cluster.describe()[0]["memory_bytes"]["weights"]
        row.perplexity = perplexity(score(llm, reference.windows))
        row.agreement = agreement(reference.texts, forced_choices(llm, reference.texts))
        texts = greedy(llm, [text.prompt for text in reference.texts])
    row.reference_perplexity = reference.perplexity
    row.relative_difference = relative(row.perplexity, reference.perplexity)
    row.equal_texts = sum(a.ids == b.ids for a, b in zip(texts, reference.texts, strict=True))
    row.texts = len(texts)
    row.missed = missed_bars(row)
    return row


def new_row(v: Variant, error: str = "") -> Row:
    bar = QUANTISED_BAR if "int8" in (v.settings.get("quantization"), v.settings.get("kv_cache_dtype")) else BAR
    return Row(v.name, v.model.name, v.settings, stored=stored_type(v.model), bar=bar, error=error)


def unknown_setting(v: Variant) -> str:
    """What this build says against a variant's settings; "" where it takes them."""
    try:
        resolve(dict(v.settings))
    except UserError as e:
        return str(e).removeprefix("command line: ")
    return ""


def measure_all(variants: Sequence[Variant], text: str, prompts: Sequence[str], args: argparse.Namespace) -> Iterator[Row]:
    """Every variant's row; a model's reference is measured once, before its first variant."""
    references: dict[Path, Reference] = {}
    for v in variants:
        if why := unknown_setting(v):
            yield new_row(v, f"not in this build: {why}")
            continue
        if v.model not in references:
            references[v.model] = measure_reference(v.model, text, prompts, args)
        note(f"{v.model.name}: {v.name}")
        try:
            yield measure(v, references[v.model])
        except UserError as e:
            row = new_row(v, str(e))
            row.missed = ["it could not be measured"]
            yield row


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


HEADER = (
    f"{'variant':<8} {'stored':<6} {'weights':>8} {'perplexity':>10} {'float32':>8} {'differs':>8} {'bar':>5}"
    f" {'agrees':>7} {'largest gap':>11} {'same texts':>10}  verdict"
)


def line(r: Row) -> str:
    if r.perplexity is None or r.agreement is None:
        return f"{r.name:<8} {r.stored:<6} {r.error}"
    return (
        f"{r.name:<8} {r.stored:<6} {r.weight_bytes / 1e6:>5.0f} MB {r.perplexity:>10.4f} {r.reference_perplexity:>8.4f}"
        f" {r.relative_difference:>+8.3%} {r.bar:>5.1%} {r.agreement.share:>7.2%} {r.agreement.largest_gap:>11.3f}"
        f" {f'{r.equal_texts}/{r.texts}':>10}  {'; '.join(r.missed) or 'good'}"
    )


def machine() -> dict[str, Any]:
    found: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            found |= (X86_FLAGS | ARM_FLAGS) & set(line.split())
    return {
        "cpu": cpu_model(),
        "cpu_flags": sorted(found),
        "instruction_set": cpu.choose(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"deepserve": __version__} | {name: importlib.metadata.version(name) for name in ("torch", "numpy")},
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.quality", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--data", type=Path, metavar="FOLDER", help="benchmark data: prompts.jsonl, lines of {source, prompt}")
    p.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="running English instead of --data's: .txt or .jsonl {text}"
    )
    p.add_argument("--prompts", type=Path, metavar="FILE", help="prompts instead of --data's: .jsonl {prompt}")
    p.add_argument("--tokens", type=int, default=20_000, help="tokens scored at least (default: %(default)s)")
    p.add_argument("--num-prompts", type=int, default=100, help="texts for agreement (default: %(default)s)")
    p.add_argument(
        "--variant",
        action="append",
        metavar="NAME=MODEL[,SETTING=VALUE...]",
        help="what to measure, settings as `serve` has them; repeat it (default: forms of the default model)",
    )
    p.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keeps model files that are made, and what the reference says (default: nothing is kept)",
    )
    p.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, metavar="FILE", help="write the figures too (default: %(const)s)"
    )
    return p


def inputs(args: argparse.Namespace) -> tuple[str, list[str], dict[str, Any]]:
    """(running English, prompts, what they are). Raises `UserError` where there is none."""
    file: Path | None = args.prompts or (args.data and args.data / "prompts.jsonl")
    if file is None or (args.data is None and args.text is None):
        raise UserError("there is no text: give the folder of benchmark data as --data FOLDER, or both --text and --prompts FILE")
    if args.text:
        text, names = running_text(args.text), [path.name for path in args.text]
    else:
        text, names = passages(args.data / "prompts.jsonl"), [f"prompts.jsonl, passages of source {PASSAGES}"]
    return text, column(file, "prompt"), {"text": names, "prompts": file.name}


def run(args: argparse.Namespace, folder: Path, command: str) -> int:
    text, prompts, sources = inputs(args)
    if not capacity.has_compiled_kernels():
        raise UserError(f"no compiled kernels to measure: `deepserve.py doctor` says why (perhaps {cpu.VARIABLE} forbids them)")
    folder.mkdir(parents=True, exist_ok=True)
    variants = [variant(v) for v in args.variant] if args.variant else default_variants(folder)
    print(HEADER, flush=True)
    rows = []
    for row in measure_all(variants, text, prompts, args):
        rows.append(row)
        print(line(row), flush=True)
    if args.json:
        report = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": command,
            **machine(),
            **sources,
            "window": WINDOW,
            "tokens_scored": -(-args.tokens // (WINDOW - 1)) * (WINDOW - 1),
            "steps_a_text": STEPS,
            "reference": "torch operators, float32, the stored weights dequantised",
            "results": [rounded(msgspec.to_builtins(row)) for row in rows],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {args.json}", file=sys.stderr)
    return int(any(row.missed for row in rows))


def rounded(value: Any) -> Any:
    """Floats to six places: below that is the reference's own noise."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # Where this machine has its files is nobody's business who reads the result.
    words = [Path(word).name if "/" in word and "=" not in word else word for word in (sys.argv[1:] if argv is None else argv)]
    command = shlex.join(["python", "-m", "bench.quality", *words])
    try:
        with tempfile.TemporaryDirectory(prefix="deepserve-quality-") as made:
            return run(args, args.cache or Path(made), command)
    except UserError as e:
        print(f"bench quality: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
