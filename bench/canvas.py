"""A picture of rectangles, lines and words, written as PNG: what the few pictures here need, in place of a plotting library."""

from __future__ import annotations

import struct
import zlib

import numpy as np

Colour = tuple[int, int, int]
BLACK, GREY, WHITE = (0, 0, 0), (128, 128, 128), (255, 255, 255)

# The usual 5 x 7 letters, of " " to "~": five columns each, the lowest bit on top.
GLYPHS = bytes.fromhex(
    "0000000000 00005f0000 0007000700 147f147f14 242a7f2a12 2313086462 3649562050 0008070300 001c224100 0041221c00 2a1c7f1c2a"
    "08083e0808 0080703000 0808080808 0000606000 2010080402 3e5149453e 00427f4000 7249494946 2141494d33 1814127f10 2745454539"
    "3c4a494931 4121110907 3649494936 464949291e 0000140000 0040340000 0008142241 1414141414 0041221408 0201590906 3e415d594e"
    "7c1211127c 7f49494936 3e41414122 7f4141413e 7f49494941 7f09090901 3e41415173 7f0808087f 00417f4100 2040413f01 7f08142241"
    "7f40404040 7f021c027f 7f0408107f 3e4141413e 7f09090906 3e4151215e 7f09192946 2649494932 03017f0103 3f4040403f 1f2040201f"
    "3f4038403f 6314081463 0304780403 6159494d43 007f414141 0204081020 004141417f 0402010204 4040404040 0003070800 2054547840"
    "7f28444438 3844444428 384444287f 3854545418 00087e0902 18a4a49c78 7f08040478 00447d4000 2040403d00 7f10284400 00417f4000"
    "7c04780478 7c08040478 3844444438 fc18242418 18242418fc 7c08040408 4854545424 04043f4424 3c4040207c 1c2040201c 3c4030403c"
    "4428102844 4c9090907c 4464544c44 0008364100 0000770000 0041360800 0201020402"
)
COLUMNS, ADVANCE, HEIGHT = 5, 6, 8


def letters(text: str) -> np.ndarray:
    """Which points are ink: [8, 6 * letters]. What isn't in the font becomes "?"."""
    ink = np.zeros((HEIGHT, ADVANCE * len(text)), bool)
    for i, letter in enumerate(text):
        at = (ord(letter) - 32 if " " <= letter <= "~" else ord("?") - 32) * COLUMNS
        columns = np.frombuffer(GLYPHS[at : at + COLUMNS], np.uint8)
        ink[:, ADVANCE * i : ADVANCE * i + COLUMNS] = (columns[None, :] >> np.arange(HEIGHT)[:, None]) & 1
    return ink


class Canvas:
    """`pixels`: [height, width, 3], from the upper left corner. What lies outside isn't drawn."""

    def __init__(self, width: int, height: int):
        self.pixels = np.full((height, width, 3), 255, np.uint8)

    def box(self, x: int, y: int, width: int, height: int, colour: Colour) -> None:
        self.pixels[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)] = colour

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, thick: int = 2) -> None:
        for t in np.linspace(0, 1, int(max(abs(x1 - x0), abs(y1 - y0))) + 1):
            self.box(round(x0 + t * (x1 - x0)), round(y0 + t * (y1 - y0)), thick, thick, colour)

    def text(self, x: int, y: int, text: str, colour: Colour = BLACK, size: int = 2, align: float = 0.0) -> None:
        """`align`: 0 begins at x, 0.5 is centred on it, 1 ends there. Letters are 5 x 7 points of `size` pixels."""
        ink = letters(text).repeat(size, 0).repeat(size, 1)
        left = x - round(align * ink.shape[1])
        cut = ink[max(0, -y) : max(0, self.pixels.shape[0] - y), max(0, -left) : max(0, self.pixels.shape[1] - left)]
        y, left = max(y, 0), max(left, 0)
        self.pixels[y : y + cut.shape[0], left : left + cut.shape[1]][cut] = colour

    def png(self) -> bytes:
        """The file: a header, the rows (each after a byte that says "as it is") compressed, an end."""
        height, width, _ = self.pixels.shape
        rows = np.concatenate([np.zeros((height, 1), np.uint8), self.pixels.reshape(height, width * 3)], 1).tobytes()
        parts = (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows, 9)),
            (b"IEND", b""),
        )
        chunks = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts)
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
