"""`python -m bench.scale`: how TEs come and go, measured as a person would: over HTTP, and in /proc.

    growth      from 1, 8 and 32 TEs to 64, each of which has answered a request; without each fast path in turn; memory
    zero        from nothing to a first token: asleep, no process, cold; llama.cpp's and vLLM's starts beside it
    burst       the load of one TE jumps tenfold: how long until its promise is kept again, with scaling and without
    models      eight models where there is memory for three
    respawn     64 TEs of which one is killed every 0.3 s under load: texts, descriptors, memory
    simulation  clusters of NPUs: the summary of bench.scale_simulation

Each part's result goes into `bench/results/scale.json` as soon as it is there; parts that this run leaves out keep what an
earlier one found. The exit status is 1 where a part could not be measured, or lost requests. `--table`
prints the file as Markdown. Client, server and all TEs share the cores of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from bench import peers, scale_burst, scale_growth, scale_models, scale_respawn, scale_simulated, scale_zero, serve
from bench.cpu import machine
from bench.scale_figures import finite
from bench.scale_server import MODEL, Options, say
from engine.types import UserError

OUT = Path(__file__).parent / "results" / "scale.json"
PARTS: dict[str, ModuleType] = {
    "growth": scale_growth,
    "zero": scale_zero,
    "burst": scale_burst,
    "models": scale_models,
    "respawn": scale_respawn,
    "simulation": scale_simulated,
}
QUICK_TE = 8
BUSY = 1.0  # load average: up to that is what the benchmark itself leaves behind


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}


def save(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(finite(report), indent=1) + "\n")
    part.replace(path)


def run(args: argparse.Namespace) -> int:
    report = load(args.out)
    if report.get("machine") != machine():
        report = {"what": __doc__.splitlines()[0].partition(": ")[2], "machine": machine(), "model": MODEL, "parts": {}}
    options = Options(1 if args.quick else args.rounds, QUICK_TE if args.quick else args.te, args.quick, args.seed, args.peers)
    command = f"python -m bench.scale --parts {{}} --rounds {options.rounds} --te {options.te} --seed {options.seed}"
    failed = 0
    for name in args.parts:
        if (busy := os.getloadavg()[0]) > BUSY:
            say(f"the machine is busy (load average {busy:.1f}): figures will be rough")
        began = time.monotonic()
        say(f"part {name}")
        about = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": command.format(name) + " --quick" * args.quick,
            "load_average_before": busy,
        }
        try:
            found = PARTS[name].measure(options)
        except UserError as e:
            say(f"{name}: {e}")
            found = {"error": str(e)}
        failed += bool(found.keys() & {"error", "verdict"})
        report["parts"][name] = about | {"took_s": time.monotonic() - began} | found
        report["parts"] = {known: report["parts"][known] for known in PARTS if known in report["parts"]}
        save(args.out, report)
    print(table(load(args.out)))
    say(f"written to {args.out}" + (f"; {failed} parts failed" if failed else ""))
    return int(bool(failed))


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    if not report:
        return "Nothing is measured yet: python -m bench.scale"
    facts = report["machine"]
    lines = [f"{facts['cores']} cores of {facts['cpu']} ({facts['flags']}), {facts['memory_gb']} GB, {report['model']}."]
    for name, found in report["parts"].items():
        busy = found["load_average_before"]
        note = f" The machine was busy: load average {busy:.1f} before it." if busy > BUSY else ""
        lines += ["", f"## {name}", "", f"{found['date'][:10]}, `{found['command']}`, {found['took_s']:.0f} s.{note}", ""]
        lines += [f"Failed: {found['error']}"] if "error" in found else PARTS[name].table(found)
        lines += ["", f"Not as it should be: {found['verdict']}."] if "verdict" in found else []
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(PARTS)
    p.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=f"only these: {', '.join(names)}")
    p.add_argument("--rounds", type=serve.natural, default=2, help="repetitions of growth (default: 2)")
    p.add_argument("--te", type=serve.natural, default=64, help="TEs to grow to, and to kill (default: 64)")
    p.add_argument("--seed", type=int, default=0, help="of arrivals, popularity and who is killed (default: 0)")
    p.add_argument("--quick", action="store_true", help=f"a short try: {QUICK_TE} TEs, seconds instead of minutes, no peers")
    p.add_argument("--peers", type=Path, default=peers.DEFAULT, metavar="DIR", help=f"where they are (default: {peers.DEFAULT})")
    p.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="the result, merged into what is there")
    p.add_argument("--table", action="store_true", help="measure nothing: print the result as Markdown")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.table:
        print(table(load(args.out)))
        return 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that the server under test ends with us
    try:
        return run(args)
    except KeyboardInterrupt:
        say(f"interrupted; parts that were through are in {args.out}")
        return 130


if __name__ == "__main__":
    sys.exit(main())
