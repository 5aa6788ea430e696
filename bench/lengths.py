"""`python -m bench.lengths`: how well the lengths of a model's texts are told from their prompts.

    python -m bench.lengths --data FOLDER --texts FILE.jsonl [--json [FILE]] [--ship]

FOLDER holds prompts.jsonl, lines of {source, prompt}. The model answers them, every second one greedily and the others at
temperature 0.7, with 1024 tokens at most, and some twice: how unlike two answers to one prompt are is what nobody can tell. The
answers' lengths are in FILE, which `deepserve.py profile --lengths --history FILE` reads too; a run that was cut goes on there.

One prompt of five is kept aside, each in turn: the classifier is trained on the others, and nothing about it is decided by those
kept aside. Beside it stand what the newest texts of a key tell, with a prompt's source as its key, and the bucket that is
likeliest of all. `--ship` trains on everything,
without keys, and writes the classifier that DeepServe brings for its default model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from bench.queue import cpu_model
from deepserve import AsyncLLM, SamplingParams, UserError, __version__
from engine.config import Config
from engine.tokenizer import Tokenizer
from scale import pull
from sched import length_store, profile_store
from sched.files import write
from sched.predict import Lengths, Sample, Source, bucket_of, clues
from sched.predict_training import PART, Line, Told, apart, compared, judge, sample_of, table, train

RESULTS = Path(__file__).parent / "results" / "lengths.json"
MODEL = Config().model
TEMPERATURES = (0.0, 0.7)
MAX_TOKENS = 1024
LONGEST_PROMPT = 3000  # tokens: such a prompt and its text fit a context of 4096
STREAMS = 64
TWICE = 10  # one prompt of so many gets a second answer
SEED = 0  # of the order of prompts
FEWER = (250, 500, 1000, 2000)  # texts to learn from, for what more of them bring
PROMPT = 1000  # tokens of the prompt whose prediction is timed
TIMED = 2000  # predictions
SOURCES: tuple[Source, ...] = ("classifier", "key", "everybody")


class Answer(Line, kw_only=True):
    """A line of --texts."""

    number: int  # of the prompt in prompts.jsonl
    seed: int

    @property
    def name(self) -> tuple[int, float, int]:
        return self.number, self.temperature, self.seed


# ---- answers ------------------------------------------------------------------------------------------------------------


def wanted(prompts: int) -> list[tuple[int, float, int]]:
    """(prompt, temperature, seed) of every answer, in the order in which they are asked for."""
    order = list(range(prompts))
    random.Random(SEED).shuffle(order)
    found = []
    for at, number in enumerate(order):
        temperature = TEMPERATURES[at % len(TEMPERATURES)]
        found.append((number, temperature, 0))
        if temperature and at % TWICE == 1:
            found.append((number, temperature, 1))
    return found


def complete(prompts: Sequence[dict[str, str]], file: Path) -> None:
    """Have the model answer what isn't answered in `file` yet."""
    there = {line.name for line in answers(file)} if file.exists() else set()
    missing = [name for name in wanted(len(prompts)) if name not in there]
    if missing:
        note(f"{len(missing)} answers are missing in {file.name}")
        with open(file, "ab") as lines:
            asyncio.run(answer(prompts, missing, lines))


async def answer(prompts: Sequence[dict[str, str]], missing: Sequence[tuple[int, float, int]], lines: BinaryIO) -> None:
    done = 0
    async with AsyncLLM(MODEL, max_num_seqs=STREAMS, max_model_len=LONGEST_PROMPT + MAX_TOKENS) as engine:
        tokenizer = (await engine.model("")).tokenizer
        room = asyncio.Semaphore(STREAMS)

        async def one(number: int, temperature: float, seed: int) -> None:
            nonlocal done
            async with room:
                text = tokenizer.render([{"role": "user", "content": prompts[number]["prompt"]}])
                ids = tokenizer.encode(text, add_special=False)
                if len(ids) > LONGEST_PROMPT:
                    return
                params = SamplingParams(temperature=temperature, seed=seed, max_tokens=MAX_TOKENS)
                output = [output async for output in engine.generate(ids, params)][-1].outputs[0]
            line = Answer(
                number=number,
                seed=seed,
                ids=ids,
                length=len(output.token_ids),
                ended=output.finish_reason == "stop",
                temperature=temperature,
                max_tokens=MAX_TOKENS,
                key=prompts[number]["source"],
            )
            lines.write(msgspec.json.encode(line) + b"\n")
            done += 1
            if done % 200 == 0:
                lines.flush()
                note(f"{done} of {len(missing)}")

        async with asyncio.TaskGroup() as group:
            for name in missing:
                group.create_task(one(*name))


def answers(file: Path) -> list[Answer]:
    return [msgspec.json.decode(line, type=Answer) for line in file.read_bytes().splitlines()]


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# ---- figures ------------------------------------------------------------------------------------------------------------


def samples(lines: Sequence[Answer], ends: frozenset[int], keyed: bool) -> list[Sample]:
    """With the key among the features or without it; the key's own newest texts count in both."""
    return [sample_of(line, line.ids, ends, keyed) for line in lines]


def chance(lines: Sequence[Answer]) -> dict[str, float | int]:
    """How alike two answers to one prompt are: the bound of what can be told of sampled texts."""
    both: dict[int, list[int]] = defaultdict(list)
    for line in lines:
        if line.temperature:
            both[line.number].append(bucket_of(line.length))
    pairs = np.array([pair for pair in both.values() if len(pair) == 2])
    off = np.abs(pairs[:, 0] - pairs[:, 1])
    return {"prompts": len(pairs), "same_bucket": float((off == 0).mean()), "within_one": float((off <= 1).mean())}


def timed(lengths: Lengths, vocabulary: int, ends: frozenset[int]) -> dict[str, float]:
    """Microseconds of processor time from a prompt's ids to the prediction."""
    rng = np.random.default_rng(SEED)
    params = SamplingParams(temperature=0.7, max_tokens=MAX_TOKENS)
    took = []
    for _ in range(TIMED):
        ids = rng.integers(vocabulary, size=PROMPT).tolist()
        began = time.thread_time()
        lengths.told_by("classifier", clues(ids, params, "somebody", 4096, ends))
        took.append((time.thread_time() - began) * 1e6)
    return {"prompt_tokens": PROMPT, "median_us": float(np.median(took)), "p99_us": float(np.quantile(took, 0.99))}


def mean(found: Sequence[Told]) -> Told:
    """Of several parts' texts, each part by the texts that it has."""
    texts = [one.texts for one in found]
    fields = [name for name in Told.__struct_fields__ if name != "texts"]
    return Told(texts=sum(texts), **{f: float(np.average([getattr(one, f) for one in found], weights=texts)) for f in fields})


def measure(lines: Sequence[Answer], tokenizer: Tokenizer) -> dict[str, Any]:
    ends = tokenizer.eos_ids
    told: dict[str, list[Told]] = defaultdict(list)
    parts: dict[str, dict[str, list[Told]]] = defaultdict(lambda: defaultdict(list))
    fewer: dict[int, list[Told]] = defaultdict(list)
    seconds = []
    for fold in range(PART):
        seen, unseen = apart(samples(lines, ends, False), 1, fold)
        note(f"part {fold + 1} of {PART}: training on {len(seen)} texts")
        began = time.perf_counter()
        classifier, _ = train(seen, MODEL)
        seconds.append(time.perf_counter() - began)
        for name, one in compared(classifier, seen, unseen).items():
            told[name].append(one)
        with_keys = apart(samples(lines, ends, True), 1, fold)
        told["with key"].append(compared(train(with_keys[0], MODEL)[0], *with_keys)["classifier"])
        lengths = Lengths(classifier)
        for sample in seen:
            lengths.learn(sample)
        split = {key: [s for s in unseen if s.key == key] for key in sorted({line.key for line in lines})}
        for temperature in TEMPERATURES:
            some = [line for line in lines if line.temperature == temperature]
            split[f"temperature {temperature:g}"] = apart(samples(some, ends, False), 1, fold)[1]
        for name, part in split.items():
            for source in SOURCES if part else ():
                parts[name][source].append(judge(lengths, source, part))
        for count in FEWER:
            if count < len(seen):
                fewer[count].append(judge(Lengths(train(seen[:count], MODEL)[0]), "classifier", unseen))
    pooled = {name: mean(one) for name, one in told.items()}
    print(table(pooled))
    return {
        "texts": len(lines),
        "prompts": len({line.number for line in lines}),
        "parts_kept_aside_in_turn": PART,
        "training_s": float(np.mean(seconds)),
        "classifier_bytes": len(msgspec.msgpack.encode(classifier)),
        "lengths": {
            "mean": float(np.mean([line.length for line in lines])),
            "buckets": np.bincount([bucket_of(line.length) for line in lines]).tolist(),
            "cut": sum(not line.ended for line in lines),
        },
        "told": {name: msgspec.to_builtins(one) for name, one in pooled.items()},
        "parts": {
            name: {source: msgspec.to_builtins(mean(one)) for source, one in sources.items()} for name, sources in parts.items()
        },
        "fewer": [{"learnt_from": count, **msgspec.to_builtins(mean(one))} for count, one in fewer.items()],
        "two_answers": chance(lines),
        "time": timed(lengths, tokenizer.vocab_size, ends),
    }


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.lengths", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--data", type=Path, metavar="FOLDER", help="benchmark data: prompts.jsonl, lines of {source, prompt}")
    p.add_argument("--texts", type=Path, required=True, metavar="FILE", help="answers and their lengths; what is missing is made")
    p.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, metavar="FILE", help="write the figures too (default: %(const)s)"
    )
    p.add_argument("--ship", action="store_true", help="write the classifier that DeepServe brings, too")
    return p


def run(args: argparse.Namespace) -> int:
    if args.data is not None:
        try:
            prompts = [json.loads(line) for line in (args.data / "prompts.jsonl").read_text().splitlines()]
        except OSError as e:
            raise UserError(f"--data {args.data}: {e.strerror}; it is the folder that holds prompts.jsonl") from None
        complete(prompts, args.texts)
    elif not args.texts.exists():
        raise UserError(f"--texts {args.texts} isn't there; give prompts as --data FOLDER and it is made")
    path = pull.resolve(MODEL)
    tokenizer = Tokenizer.load(path)
    lines = answers(args.texts)
    figures = measure(lines, tokenizer)
    if args.json:
        report = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": "python -m bench.lengths --data FOLDER --texts FILE --json",
            "deepserve": __version__,
            "cpu": cpu_model(),
            "model": MODEL,
            "temperatures": list(TEMPERATURES),
            "max_tokens": MAX_TOKENS,
            **rounded(figures),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.ship:
        everything = [Answer(**{**msgspec.structs.asdict(line), "key": ""}) for line in lines]
        classifier, _ = train(samples(everything, tokenizer.eos_ids, False), MODEL)
        file = length_store.BROUGHT / length_store.classifier_path(profile_store.fingerprint(path)).name
        write(file, msgspec.msgpack.encode(classifier))
        note(f"{file.name}: {file.stat().st_size} bytes")
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parser().parse_args(argv))
    except UserError as e:
        print(f"bench lengths: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
