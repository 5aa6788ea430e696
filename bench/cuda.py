"""`python -m bench.cuda`: the cuda device on a real GPU, into `bench/results/cuda.json`.

What `doctor --selftest --device cuda` finds: every operator against its formula, the default model's greedy text against the
reference operators on cpu, rates of decode and prefill and their share of the bound, with date and command. `--device` runs the
same on another device, to see that this program works; then nothing is written unless --json names a file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.devices import KINDS
from engine.types import UserError
from scale import pull

RESULTS = Path(__file__).parent / "results" / "cuda.json"
MODEL = "smollm2-135m-instruct"


def say(text: str) -> None:
    print(f"bench cuda: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(KINDS), default="cuda")
    parser.add_argument("--model", default=MODEL, help="a model's name, folder or file (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"where the report goes (default for cuda: {RESULTS})")
    args = parser.parse_args(argv)
    from engine.devices import selftest  # torch takes seconds

    command = "python -m bench.cuda" + "".join(f" {a}" for a in (sys.argv[1:] if argv is None else argv))
    try:
        path = pull.pull(args.model, say) if args.model in pull.KNOWN else pull.resolve(args.model)
        to = args.json or (RESULTS if args.device == "cuda" else None)
        return selftest.main(args.device, path, "", to, command)
    except UserError as e:
        say(f"error: {e}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
