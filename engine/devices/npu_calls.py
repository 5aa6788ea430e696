"""Calls of the npu device's operators on random numbers, for `doctor --selftest`: each is made on the device and through its
reference (`npu_reference`), and what both give is compared.

Arguments lie on the host here; `compare` brings them to the device. Imports no plugin: whoever compares has opened the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.devices.npu_reference import MASK_SIZE, REFERENCES

ND, FRACTAL_NZ = 2, 29
# Of 16-bit results: their own rounding and one before it. int8 values may fall to the other side of a half: 1 of 127.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 3e-5, torch.int8: 1.0}


class Nz(NamedTuple):
    """A matrix that is brought into the matrix unit's format first."""

    matrix: Tensor


@dataclass
class Call:
    operator: str
    case: str
    args: tuple[Any, ...]
    how: dict[str, Any] = field(default_factory=dict)
    changed: tuple[int, ...] = ()  # arguments that it writes to; they are compared, and not what it returns
    outputs: int = 1  # how many of what it returns are compared


def calls(seed: int = 0) -> Iterator[Call]:
    """Every operator that the device calls, in the dtypes and shapes that its documentation allows."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for rows, width in ((1, 576), (33, 2048)):
            x, more, gain = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype), random(width, dtype=dtype)
            case = f"{name} [{rows}, {width}]"
            yield Call("npu_rms_norm", case, (x, gain, 1e-5), outputs=2)
            yield Call("npu_add_rms_norm", case, (x, more, gain, 1e-5), outputs=3)
            yield Call("npu_swiglu", case, (x,))
        for heads, dim in ((9, 64), (32, 128)):
            x, turn = random(1, 21, heads, dim, dtype=dtype), random(1, 21, 1, dim // 2, dtype=torch.float32)
            tables = (torch.cat((t, t), -1).to(dtype) for t in (turn.cos(), turn.sin()))
            yield Call("npu_rotary_mul", f"{name} [21, {heads}, {dim}]", (x, *tables))
        places = torch.randperm(5 * 128, generator=generator)[:40].int()
        for heads, dim in ((3, 64), (8, 128)):
            k, v = random(40, heads, dim, dtype=dtype), random(40, heads, dim, dtype=dtype)
            caches = torch.zeros(5, 128, heads, dim, dtype=dtype), torch.zeros(5, 128, heads, dim, dtype=dtype)
            case = f"{name} [40, {heads}, {dim}]"
            yield Call("npu_scatter_pa_kv_cache", case, (k, v, *caches, places), {"cache_mode": "Norm"}, changed=(2, 3))
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for heads, kv_heads, dim in ((9, 3, 64), (8, 2, 128)):
            for step, lengths in (("prefill", [(70, 70)]), ("mixed", [(1, 40), (30, 200), (1, 129), (128, 300)])):
                for window in (0, 100):
                    yield attention(random, generator, dtype, (heads, kv_heads, dim), step, lengths, window)
        for rows, depth, width in ((1, 576, 960), (33, 1536, 576)):
            case = f"{name} [{rows}, {depth}] x [{depth}, {width}]"
            x = random(rows, depth, dtype=dtype)
            yield Call("npu_dynamic_quant", case, (x,), outputs=2)
            eight = torch.randint(-127, 128, (depth, width), dtype=torch.int8, generator=generator)
            scale = random(width, dtype=torch.float32).abs() / 127 / depth**0.5
            x8 = torch.randint(-127, 128, (rows, depth), dtype=torch.int8, generator=generator)
            how = {"pertoken_scale": random(rows, dtype=torch.float32).abs() / 40, "output_dtype": dtype}
            yield Call("npu_quant_matmul", case, (x8, Nz(eight), scale), how)
            yield Call("npu_weight_quant_batchmatmul", case, (x, Nz(eight), scale.to(dtype)))
        yield Call("npu_format_cast", name, (Nz(random(576, 960, dtype=dtype)), ND))
        yield Call("npu_top_k_top_p", name, tuple(top_k_top_p(random, dtype)))


def attention(
    random: Callable[..., Tensor],
    generator: torch.Generator,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    step: str,
    lengths: list[tuple[int, int]],
    window: int,
) -> Call:
    heads, kv_heads, dim = shape
    ends = torch.tensor([count for count, _ in lengths]).cumsum(0).tolist()
    keys, values = (random(16, 128, kv_heads * dim, dtype=dtype) for _ in "kv")
    table = torch.randperm(16, generator=generator)[: 3 * len(lengths)].int().view(len(lengths), 3)
    how = {
        "atten_mask": torch.ones((MASK_SIZE, MASK_SIZE), dtype=torch.bool).triu(1).to(torch.int8),
        "actual_seq_qlen": ends,
        "actual_seq_kvlen": [length for _, length in lengths],
        "block_table": table,
        "num_query_heads": heads,
        "num_key_value_heads": kv_heads,
        "softmax_scale": dim**-0.5,
        "input_layout": "TND",
        "sparse_mode": 4 if window else 3,
        "block_size": 128,
    }
    if window:
        how |= {"pre_tokens": window - 1, "next_tokens": 0}
    case = f"{str(dtype).removeprefix('torch.')} {step}, {heads} heads of {dim}, window {window}"
    return Call("npu_fused_infer_attention_score_v2", case, (random(ends[-1], heads, dim, dtype=dtype), keys, values), how)


def top_k_top_p(random: Callable[..., Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Logits, all different in each row: of equals at a limit either may stay."""
    steps = torch.linspace(-8, 8, 200)
    yield torch.stack([steps[random(200, dtype=torch.float32).argsort()] for _ in range(4)]).to(dtype)
    yield torch.tensor([0.3, 0.7, 0.95, 1.0], dtype=dtype)
    yield torch.tensor([1, 40, 100, 200], dtype=torch.int32)


def compare(call: Call, operators: Callable[[str], Callable[..., Any]], where: torch.device) -> tuple[float, float]:
    """(error, bound) of a call: the largest |found - expected| / (1 + |expected|), over its bound for the outputs' dtypes.

    Raises what the operator raises, and ValueError where shapes or dtypes are not the reference's."""

    def there(x: Any) -> Any:
        if isinstance(x, Nz):
            return operators("npu_format_cast")(x.matrix.to(where), FRACTAL_NZ)
        return x.to(where, copy=True) if isinstance(x, Tensor) else x

    def here(x: Any) -> Any:
        return x.matrix if isinstance(x, Nz) else x.clone() if isinstance(x, Tensor) else x

    sides = []
    for operator, move in ((REFERENCES[call.operator], here), (operators(call.operator), there)):
        args, how = [move(a) for a in call.args], {key: move(value) for key, value in call.how.items()}
        result = operator(*args, **how)
        results = result if isinstance(result, (tuple, list)) else (result,)
        sides.append([args[i] for i in call.changed] or list(results[: call.outputs]))
    pairs = []
    for expected, found in zip(*sides, strict=True):
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise ValueError(
                f"gives {found.dtype} {list(found.shape)}; the reference gives {expected.dtype} {list(expected.shape)}"
            )
        pairs.append((difference(found.cpu(), expected), TOLERANCE[expected.dtype]))
    return max(pairs, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else torch.inf)


def difference(found: Tensor, expected: Tensor) -> float:
    """0 where there is nothing to compare; infinities must stand at the same places."""
    if not found.numel():
        return 0.0
    if not torch.equal(found.isinf(), expected.isinf()):
        return torch.inf
    finite = ~expected.isinf()
    a, b = found[finite].double(), expected[finite].double()
    scale = 1.0 if expected.dtype == torch.int8 else 1 + b.abs()
    return float(((a - b).abs() / scale).max()) if a.numel() else 0.0
