"""The heat map for a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator

from bench.canvas import GREY, Canvas, Colour
from sched.heatmap import HeatMap, Kind

# Beyond such a value a cell has its full colour, or all of its block: disaggregation is twice as quick, or half.
FULL = 1.0
SURE = 0.5  # with less confidence the sign is in doubt
BLOCKS = "░▒▓█"
COLOURS: dict[bool, Colour] = {True: (33, 102, 172), False: (178, 24, 43)}  # split wins, colocated wins
TITLES: dict[Kind, str] = {"disaggregated": "prefill and decode pair", "semi": "semi pair"}


def strength(value: float) -> float:
    """0 to 1: alike for twice as quick and for half as quick."""
    return min(1.0, (value if value >= 0 else -value / (1 + value)) / FULL)


def fraction(ratio: float) -> str:
    """A ratio as people write it: 1/4, 1, 2."""
    return f"{ratio:.3g}" if ratio >= 1 else f"1/{1 / ratio:.3g}"


def measured_cells(heat: HeatMap, kind: Kind) -> set[int]:
    """The cells measured at one load at least."""
    return {one.point // heat.loads for one in heat.data.measured if one.kind == kind}


def terminal(heat: HeatMap, kind: Kind) -> Iterator[str]:
    """Lines of text. The longest prompts are on top, as in the paper."""
    known = measured_cells(heat, kind)
    yield f"JCT colocated / JCT {kind} - 1, in percent: + the {TITLES[kind]} is quicker, - colocated is"
    yield f"{'prompt':>8} | decode tokens / prompt tokens"
    yield f"{'tokens':>8} | " + "".join(f"{fraction(r):>9}" for r in heat.data.ratio)
    for row in reversed(range(heat.rows)):
        cells = []
        for column in range(heat.columns):
            place = row * heat.columns + column
            value, confidence = heat.tables[kind][place]
            block = BLOCKS[min(3, int(strength(value) * 4))] if confidence >= SURE else "?"
            number = f"{round(100 * value):+d}"
            cells.append(f"{block + (number if place in known else f'({number})'):>9}")
        yield f"{heat.data.prefill[row]:>8.0f} | " + "".join(cells)
    yield "? the sign is in doubt: there the load decides. (n): not measured, concluded from other cells."
    if (same := heat.same_sign(kind)) is not None:
        yield f"Of the cells measured at every rate, {same:.0%} have the same sign at all of them."


CELL_WIDTH, CELL_HEIGHT, LEFT, TOP, BOTTOM = 84, 52, 110, 74, 64


def draw(heat: HeatMap, title: str) -> bytes:
    """The maps beside each other, as a PNG file."""
    width = LEFT + heat.columns * CELL_WIDTH + 24
    canvas = Canvas(width * len(heat.data.kinds), TOP + heat.rows * CELL_HEIGHT + BOTTOM)
    canvas.text(12, 10, title)
    for i, kind in enumerate(heat.data.kinds):
        draw_one(canvas, heat, kind, i * width + LEFT)
    return canvas.png()


def draw_one(canvas: Canvas, heat: HeatMap, kind: Kind, left: int) -> None:
    known = measured_cells(heat, kind)
    canvas.text(left, 34, f"JCT colocated / {kind} - 1, percent; blue: {TITLES[kind]} wins", size=1)
    canvas.text(left, 48, "pale number: in doubt; (n): concluded from other cells", GREY, size=1)
    for row in range(heat.rows):
        y = TOP + (heat.rows - 1 - row) * CELL_HEIGHT
        canvas.text(left - 10, y + 18, f"{heat.data.prefill[row]:.0f}", align=1)
        for column in range(heat.columns):
            place, x = row * heat.columns + column, left + column * CELL_WIDTH
            value, confidence = heat.tables[kind][place]
            colour = faded(COLOURS[value >= 0], strength(value) * max(confidence, 0.15))
            canvas.box(x, y, CELL_WIDTH - 2, CELL_HEIGHT - 2, colour)
            number = f"{round(100 * value):+d}" if place in known else f"({round(100 * value):+d})"
            ink = GREY if confidence < SURE else (255, 255, 255) if sum(colour) < 380 else (0, 0, 0)
            canvas.text(x + CELL_WIDTH // 2, y + 18, number, ink, align=0.5)
    bottom = TOP + heat.rows * CELL_HEIGHT
    for column, ratio in enumerate(heat.data.ratio):
        canvas.text(left + column * CELL_WIDTH + CELL_WIDTH // 2, bottom + 8, fraction(ratio), align=0.5)
    canvas.text(left, bottom + 32, "decode / prompt tokens", align=0)
    canvas.text(left - 10, TOP - 22, "prompt", align=1)


def faded(colour: Colour, much: float) -> Colour:
    """`much` 0: white, 1: the colour itself."""
    r, g, b = (round(255 + (part - 255) * much) for part in colour)
    return r, g, b
