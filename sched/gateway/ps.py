"""What a server runs, as tables for a terminal: its TEs and models, from what /v1/admin/te and /v1/admin/scale answer. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LEAST = 6  # characters that a cell of words keeps, however narrow the terminal is

# A title that begins with > is of numbers, which stand on the right and are never cut.
TES = ("TE", "MODEL", "ROLE", "STATE", "WEIGHTS BY", ">PID", ">RUN", ">WAIT", ">KV %", ">PRIVATE MB", ">WEIGHTS MB", ">SINCE")
MODELS = ("MODEL", "STATE", ">TE", ">HELD", ">WEIGHTS MB", ">IDLE", "WHY")


def picture(tes: Sequence[dict[str, Any]], scale: dict[str, Any], now: float, width: int) -> str:
    """Both tables and a line of totals, at most `width` characters wide where that can be. `now`: Unix seconds."""
    return "\n".join(
        [
            *table(MODELS, [model_row(model) for model in scale["models"]], width),
            "",
            *table(TES, [te_row(te, now) for te in tes], width),
            "",
            totals(scale),
        ]
    )


def te_row(te: dict[str, Any], now: float) -> list[str]:
    load, memory = te["load"], te["memory_bytes"]
    state = f"{te['state']}: {te['step']}" if te["step"] else "draining" if te["draining"] else te["state"]
    return [
        str(te["id"]),
        te["model"],
        te["role"],
        state,
        te["path"] or "-",
        str(te["pid"] or "-"),
        str(load["running"]),
        str(load["waiting"]),
        f"{100 * load['blocks_used'] / te['kv_blocks']:.0f}" if te["kv_blocks"] else "-",
        megabytes(te["private_bytes"] if te["pid"] else None),
        megabytes(memory.get("weights")),
        span(now - te["since"]),
    ]


def model_row(model: dict[str, Any]) -> list[str]:
    return [
        model["id"],
        model["state"],
        f"{model['te_ready']}/{sum(model['te_wanted'].values())}",
        str(model["held"]),
        megabytes(model["weights_bytes"]),
        span(model["idle_s"]),
        model["reason"] or "",
    ]


def totals(scale: dict[str, Any]) -> str:
    up, kept = (f"{size(what['used_bytes'])} of {size(what['budget_bytes'])}" for what in (scale["memory"], scale["dram"]))
    return f"Models that are up: {up}. Packed weights of others: {kept}. Warm processes wanted: {scale['pool']['wanted']}."


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def megabytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.0f}"


def span(seconds: float) -> str:
    """A time that a person takes in at a glance; clocks of two machines may differ."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The rows under their titles. Where they are wider than `width`, the widest columns of words are cut."""
    numbers = [title.startswith(">") for title in titles]
    cells = [[title.removeprefix(">") for title in titles], *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        longest = max((i for i, number in enumerate(numbers) if not number), key=lambda i: widths[i])
        if widths[longest] <= LEAST:
            break
        widths[longest] -= 1

    def shown(cell: str, width: int, number: bool) -> str:
        return cell.rjust(width) if number else (cell if len(cell) <= width else cell[: width - 1] + "…").ljust(width)

    return ["  ".join(map(shown, row, widths, numbers)).rstrip() for row in cells]
