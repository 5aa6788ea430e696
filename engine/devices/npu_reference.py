"""What each torch_npu operator that the npu device uses computes, in plain torch: its documentation as code.

Names, parameters and defaults are those of the plugin's schemas (`torch.ops.npu.*` of torch-npu 2.13), and what the
documentation forbids raises ValueError. The tests run the device through these on a machine without an NPU, and
`doctor --selftest` compares the real operators with them. Knows neither the plugin nor the device.

Wider than the documentation in two points, both for tests with small models on the host: attention takes float32 (the
operator: float16 and bfloat16) and every head size (with layout TND the documentation names 128 and 192 only).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MASK_SIZE = 2048  # side of the triangular mask of attention's sparse modes 3 and 4
UNLIMITED = 2147483647
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# How an `int?` parameter names a dtype: torch's own numbers.
DTYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


def need(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(message)


def need_contiguous(operator: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        need(x is None or x.is_contiguous(), f"{operator}: {name} must be contiguous")


def need_unset(operator: str, **values: Any) -> None:
    """Parameters of other uses of an operator, of which no reference is written."""
    for name, value in values.items():
        if value not in (None, 0):
            raise NotImplementedError(f"{operator}: there is no reference for {name}")


def dtype_of(number: int | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if number is None or isinstance(number, torch.dtype):
        return number or default
    return DTYPES[number]


# ---- rows -----------------------------------------------------------------------------------------------------------


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(input / rms(input) * gamma, 1 / rms): over the trailing dimensions that gamma has; float32 inside."""
    need(input.dtype in FLOATS and gamma.dtype in (input.dtype, torch.float32), "npu_rms_norm: dtypes")
    need(input.shape[input.dim() - gamma.dim() :] == gamma.shape, "npu_rms_norm: gamma has the trailing dimensions of input")
    over = tuple(range(-gamma.dim(), 0))
    wide = input.float()
    rstd = torch.rsqrt(wide.pow(2).mean(over, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """(rms norm of the sum, 1 / rms, the sum x1 + x2)."""
    need(x1.dtype == x2.dtype and x1.shape == x2.shape, "npu_add_rms_norm: x1 and x2 are alike")
    need(gamma.dtype == x1.dtype, "npu_add_rms_norm: gamma has the dtype of x1")
    total = x1 + x2
    normed, rstd = npu_rms_norm(total, gamma, epsilon)
    return normed, rstd, total


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half, along `dim`."""
    need(input.dtype in FLOATS and input.shape[dim] % 2 == 0, "npu_swiglu: a float tensor with two halves")
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    """input * r1 + turned(input) * r2: r1 holds cosines, r2 sines, for the whole head dimension (both halves alike in mode
    `half`); four dimensions, broadcast over heads."""
    need_unset("npu_rotary_mul", rotate=rotate)
    need(input.dim() == r1.dim() == r2.dim() == 4, "npu_rotary_mul: input, r1 and r2 have four dimensions")
    need(input.dtype in FLOATS and input.dtype == r1.dtype == r2.dtype, "npu_rotary_mul: one float dtype")
    size = input.shape[-1]
    need(size % 2 == 0 and size < 896, "npu_rotary_mul: the head size is even and smaller than 896")
    need(r1.shape == r2.shape and r1.shape[-1] == size, "npu_rotary_mul: r1 and r2 have the whole head size")
    wide = input.float()
    if rotary_mode == "half":
        first, second = wide.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    else:
        need(rotary_mode == "interleave", "npu_rotary_mul: rotary_mode is half or interleave")
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1).flatten(-2)
    return (wide * r1.float() + turned * r2.float()).to(input.dtype)


def npu_apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """Both turned as by `npu_rotary_mul`, in place and returned."""
    need(layout in ("BSND", "TND") and rotary_mode == "half", "npu_apply_rotary_pos_emb: layout BSND or TND, mode half")
    need(query.shape[-1] == key.shape[-1] and query.shape[-1] in (64, 128), "npu_apply_rotary_pos_emb: head size 64 or 128")
    need(query.numel() > 0 and key.numel() > 0, "npu_apply_rotary_pos_emb: no empty tensor")
    for x in (query, key):
        wide = [t.unsqueeze(0) if layout == "TND" else t for t in (x, cos, sin)]
        turned = npu_rotary_mul(*wide)
        x.copy_(turned.squeeze(0) if layout == "TND" else turned)
    return query, key


# ---- the KV cache and attention ---------------------------------------------------------------------------------------


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Token t of key and value [T, heads, size] goes to place slot_mapping[t] of the caches [blocks, block_size, heads, size]."""
    name = "npu_scatter_pa_kv_cache"
    need_unset(name, compress_lens=compress_lens, compress_seq_offsets=compress_seq_offsets, seq_lens=seq_lens)
    if cache_mode not in (None, "Norm"):
        raise NotImplementedError(f"{name}: there is no reference for cache_mode {cache_mode}")
    need(key.dim() == value.dim() == 3 and key_cache.dim() == value_cache.dim() == 4, f"{name}: dimensions")
    need(key.dtype == value.dtype == key_cache.dtype == value_cache.dtype, f"{name}: one dtype")
    need(slot_mapping.dtype in (torch.int32, torch.int64) and slot_mapping.shape == key.shape[:1], f"{name}: slot_mapping")
    need_contiguous(name, key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping)
    slots = slot_mapping.long()
    for x, cache in ((key, key_cache), (value, value_cache)):
        need(x.shape[1:] == cache.shape[2:], f"{name}: a token has the cache's heads and size")
        places = cache.view(-1, *cache.shape[2:])
        need(bool(((slots >= 0) & (slots < len(places))).all()), f"{name}: a slot is outside the cache")
        need(len(slots.unique()) == len(slots), f"{name}: slots are not unique")
        places[slots] = x


def attend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_ends: Sequence[int] | None,
    kv_lens: Sequence[int] | None,
    mask: Tensor | None,
    table: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    pre_tokens: int,
    next_tokens: int,
    layout: str,
    sparse_mode: int,
    block_size: int,
    wants_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of layout TND: query [T, heads, size]; q_ends: where the tokens of each sequence end in T; keys and values in
    pages (`table` [sequences, blocks]: whole lengths in kv_lens) or side by side like the queries (ends in kv_lens).

    Without a mask every query sees every key (mode 0); mode 3: those up to its own place, counted from the right ends of both;
    mode 4: of those places from `pre_tokens` before to `next_tokens` after its own, both included."""
    if layout != "TND":
        raise NotImplementedError(f"{name}: there is no reference for layout {layout}")
    kv_heads = kv_heads or heads
    need(query.dtype in FLOATS and query.dtype == key.dtype == value.dtype, f"{name}: query, key and value have one float dtype")
    need(query.dim() == 3 and query.shape[1] == heads, f"{name}: query is [T, heads, size]")
    need(heads % kv_heads == 0 and heads // kv_heads <= 64, f"{name}: up to 64 heads share one of key and value")
    size = query.shape[2]
    if q_ends is None or kv_lens is None:
        raise ValueError(f"{name}: layout TND needs both lengths")
    need(len(q_ends) == len(kv_lens) <= 4096, f"{name}: as many lengths of queries as of keys, 4096 at most")
    starts = [0, *q_ends[:-1]]
    need(all(a <= b for a, b in zip(starts, q_ends, strict=True)), f"{name}: the ends of the queries fall")
    need(q_ends[-1] == len(query), f"{name}: the last end is {q_ends[-1]}, there are {len(query)} queries")
    need_contiguous(name, query=query, key=key, value=value, atten_mask=mask, block_table=table)
    if sparse_mode in (3, 4):
        need(mask is not None and mask.shape[-2:] == (MASK_SIZE, MASK_SIZE), f"{name}: modes 3 and 4 need the 2048 x 2048 mask")
        assert mask is not None
        need(mask.dtype in (torch.bool, torch.int8, torch.uint8), f"{name}: the mask is bool, int8 or uint8")
        ones = int(mask.sum()), int(mask[..., 0, 1:].sum()), int(mask[..., 1:, 0].sum())
        triangle = (MASK_SIZE * (MASK_SIZE - 1) // 2, MASK_SIZE - 1, 0)
        need(ones == triangle, f"{name}: the mask has ones above its diagonal and nowhere else")
    else:
        need(sparse_mode == 0 and mask is None, f"{name}: with layout TND mode 0 has no mask, 3 and 4 have one")

    if table is not None:
        shaped = table.dtype == torch.int32 and table.dim() == 2 and len(table) == len(q_ends)
        need(shaped, f"{name}: block_table is int32 [sequences, blocks]")
        unit = 128 if max(b - a for a, b in zip(starts, q_ends, strict=True)) > 1 else 16
        fits = unit <= block_size <= 512 and block_size % unit == 0
        need(fits, f"{name}: block_size {block_size}; a multiple of 128 up to 512, for single queries of 16")
        need(table.shape[1] * block_size >= max(kv_lens), f"{name}: block_table is too narrow for the longest sequence")
        pages = []
        for cache in (key, value):
            if cache.dim() == 4:  # [blocks, heads, block size, size]
                need(cache.shape[1:] == (kv_heads, block_size, size), f"{name}: caches are [blocks, heads, block_size, size]")
                pages.append(cache.transpose(1, 2))
            else:
                need(cache.shape[1:] == (block_size, kv_heads * size), f"{name}: caches are [blocks, block_size, heads * size]")
                pages.append(cache.view(len(cache), block_size, kv_heads, size))

    out = torch.zeros_like(query)
    lse = torch.full((len(query), heads, 1), torch.inf)
    for s, (first, end) in enumerate(zip(starts, q_ends, strict=True)):
        count = end - first
        if table is not None:
            length = kv_lens[s]
            blocks = table[s, : -(-length // block_size)].long()
            need(bool(((blocks >= 0) & (blocks < len(key))).all()), f"{name}: block_table names a block that is not there")
            keys, values = (p[blocks].flatten(0, 1)[:length] for p in pages)
        else:
            begin = kv_lens[s - 1] if s else 0
            length = kv_lens[s] - begin
            keys, values = key[begin : begin + length], value[begin : begin + length]
        if not count or not length:
            continue
        need(sparse_mode == 0 or count <= length, f"{name}: sequence {s} has {count} queries and {length} keys")
        q = query[first:end].float().transpose(0, 1)
        k, v = (x.float().transpose(0, 1).repeat_interleave(heads // kv_heads, 0) for x in (keys, values))
        scores = q @ k.transpose(1, 2) * scale
        if sparse_mode:
            before, after = (pre_tokens, next_tokens) if sparse_mode == 4 else (UNLIMITED, 0)
            own = torch.arange(count)[:, None] + (length - count)
            at = torch.arange(length)
            scores = scores.masked_fill((at < own - before) | (at > own + after), -torch.inf)
        out[first:end] = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
        lse[first:end, :, 0] = scores.logsumexp(-1).T
    return out, lse if wants_lse else torch.empty(0)


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    query_padding_size: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    key_shared_prefix: Tensor | None = None,
    value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: Sequence[int] | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_rope_antiquant_scale: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = UNLIMITED,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
) -> tuple[Tensor, Tensor]:
    """(attention [T, heads, size], log of the sum of exponentials float32 [T, heads, 1] or, not asked, [0]): see `attend`."""
    need_unset(
        "npu_fused_infer_attention_score",
        pse_shift=pse_shift,
        dequant_scale1=dequant_scale1,
        quant_scale1=quant_scale1,
        dequant_scale2=dequant_scale2,
        quant_scale2=quant_scale2,
        quant_offset2=quant_offset2,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        key_antiquant_scale=key_antiquant_scale,
        key_antiquant_offset=key_antiquant_offset,
        value_antiquant_scale=value_antiquant_scale,
        value_antiquant_offset=value_antiquant_offset,
        query_padding_size=query_padding_size,
        kv_padding_size=kv_padding_size,
        key_shared_prefix=key_shared_prefix,
        value_shared_prefix=value_shared_prefix,
        actual_shared_prefix_len=actual_shared_prefix_len,
        query_rope=query_rope,
        key_rope=key_rope,
        key_rope_antiquant_scale=key_rope_antiquant_scale,
        antiquant_mode=antiquant_mode,
        key_antiquant_mode=key_antiquant_mode,
        value_antiquant_mode=value_antiquant_mode,
    )
    return attend(
        "npu_fused_infer_attention_score",
        query,
        key,
        value,
        actual_seq_lengths,
        actual_seq_lengths_kv,
        atten_mask,
        block_table,
        num_heads,
        num_key_value_heads,
        scale,
        pre_tokens,
        next_tokens,
        input_layout,
        sparse_mode,
        block_size,
        softmax_lse_flag,
    )


def npu_fused_infer_attention_score_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    dequant_scale_query: Tensor | None = None,
    dequant_scale_key: Tensor | None = None,
    dequant_offset_key: Tensor | None = None,
    dequant_scale_value: Tensor | None = None,
    dequant_offset_value: Tensor | None = None,
    dequant_scale_key_rope: Tensor | None = None,
    quant_scale_out: Tensor | None = None,
    quant_offset_out: Tensor | None = None,
    quant_scale_p: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = UNLIMITED,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    query_quant_mode: int = 0,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    query_dtype: int | None = None,
    key_dtype: int | None = None,
    value_dtype: int | None = None,
    query_rope_dtype: int | None = None,
    key_rope_dtype: int | None = None,
    key_shared_prefix_dtype: int | None = None,
    value_shared_prefix_dtype: int | None = None,
    dequant_scale_query_dtype: int | None = None,
    dequant_scale_key_dtype: int | None = None,
    dequant_scale_value_dtype: int | None = None,
    dequant_scale_key_rope_dtype: int | None = None,
    out_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`npu_fused_infer_attention_score` under newer names."""
    need_unset(
        "npu_fused_infer_attention_score_v2",
        query_rope=query_rope,
        key_rope=key_rope,
        pse_shift=pse_shift,
        dequant_scale_query=dequant_scale_query,
        dequant_scale_key=dequant_scale_key,
        dequant_offset_key=dequant_offset_key,
        dequant_scale_value=dequant_scale_value,
        dequant_offset_value=dequant_offset_value,
        dequant_scale_key_rope=dequant_scale_key_rope,
        quant_scale_out=quant_scale_out,
        quant_offset_out=quant_offset_out,
        quant_scale_p=quant_scale_p,
        learnable_sink=learnable_sink,
        query_quant_mode=query_quant_mode,
        key_quant_mode=key_quant_mode,
        value_quant_mode=value_quant_mode,
        query_dtype=query_dtype,
        key_dtype=key_dtype,
        value_dtype=value_dtype,
        query_rope_dtype=query_rope_dtype,
        key_rope_dtype=key_rope_dtype,
        key_shared_prefix_dtype=key_shared_prefix_dtype,
        value_shared_prefix_dtype=value_shared_prefix_dtype,
        dequant_scale_query_dtype=dequant_scale_query_dtype,
        dequant_scale_key_dtype=dequant_scale_key_dtype,
        dequant_scale_value_dtype=dequant_scale_value_dtype,
        dequant_scale_key_rope_dtype=dequant_scale_key_rope_dtype,
        out_dtype=out_dtype,
    )
    return attend(
        "npu_fused_infer_attention_score_v2",
        query,
        key,
        value,
        actual_seq_qlen,
        actual_seq_kvlen,
        atten_mask,
        block_table,
        num_query_heads,
        num_key_value_heads,
        softmax_scale,
        pre_tokens,
        next_tokens,
        input_layout,
        sparse_mode,
        block_size,
        return_softmax_lse,
    )


def attention_workspace(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """Scratch memory for any lengths up to those given. How much is the operator's own affair: here a token amount."""
    return torch.empty(query.numel(), dtype=torch.uint8, device=query.device)


def attention_outputs(query: Tensor, value: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """Empty outputs of attention with layout TND."""
    asked = how.get("softmax_lse_flag") or how.get("return_softmax_lse")
    lse = torch.empty((*query.shape[:2], 1) if asked else 0, dtype=torch.float32, device=query.device)
    return torch.empty_like(query), lse


# ---- quantised matrices -----------------------------------------------------------------------------------------------


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(int8, float32 scale of each row): scale = largest magnitude / 127."""
    need_unset("npu_dynamic_quant", group_index=group_index, dst_type_max=dst_type_max)
    need(input.dtype in (torch.float16, torch.bfloat16) and input.dim() > 1, "npu_dynamic_quant: float16 or bfloat16 rows")
    if quant_mode != "pertoken" or dtype_of(dst_type, torch.int8) != torch.int8:
        raise NotImplementedError("npu_dynamic_quant: there is a reference for int8 by token alone")
    wide = input.float()
    if smooth_scales is not None:
        need(smooth_scales.dtype == input.dtype and smooth_scales.shape == input.shape[-1:], "npu_dynamic_quant: smooth_scales")
        wide = wide * smooth_scales.float()
    scale = wide.abs().amax(-1) / 127
    return (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().to(torch.int8), scale


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | torch.dtype | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """int8 [M, K] @ int8 [K, N], times the scales of columns and rows: output_dtype [M, N]. A bias of int32 is added to the
    sums, one of floats to the scaled result."""
    name = "npu_quant_matmul"
    need_unset(
        name,
        offset=offset,
        x1_dtype=x1_dtype,
        x2_dtype=x2_dtype,
        pertoken_scale_dtype=pertoken_scale_dtype,
        scale_dtype=scale_dtype,
        group_sizes=group_sizes,
        y_scale=y_scale,
    )
    dtype = dtype_of(output_dtype, torch.int8)
    if dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(f"{name}: there is a reference for float16 and bfloat16 outputs alone")
    need(x1.dtype == x2.dtype == torch.int8, f"{name}: int8 matrices")
    need(x1.dim() == x2.dim() == 2 and x1.shape[1] == x2.shape[0], f"{name}: [M, K] and [K, N]")
    need(x1.numel() > 0 and x2.numel() > 0, f"{name}: no empty matrix")
    need(scale.dtype in (torch.float32, torch.bfloat16), f"{name}: scale is float32 or bfloat16")
    need(scale.shape in ((1,), x2.shape[1:]), f"{name}: scale is [N]")
    need(dtype == torch.bfloat16 or scale.dtype == torch.float32, f"{name}: a float16 result takes a float32 scale")
    sums = x1.double() @ x2.double()  # exact: 127 * 127 * 65535 is far below 2**53
    if bias is not None and bias.dtype == torch.int32:
        sums += bias
    out = sums.float() * scale.float()
    if pertoken_scale is not None:
        rows = pertoken_scale.dtype == torch.float32 and pertoken_scale.shape == x1.shape[:1]
        need(rows, f"{name}: pertoken_scale is float32 [M]")
        out *= pertoken_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        need(pertoken_scale is not None or bias.dtype in (torch.bfloat16, torch.float32), f"{name}: bias")
        out += bias.float()
    return out.to(dtype)


def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """x [M, K] @ ((weight int8 [K, N] + offset) * scale) + bias; scales of columns, or of groups of rows in each column."""
    name = "npu_weight_quant_batchmatmul"
    need_unset(name, quant_scale=quant_scale, quant_offset=quant_offset, weight_dtype=weight_dtype)
    need(x.dtype in (torch.float16, torch.bfloat16) and weight.dtype == torch.int8, f"{name}: x float16 or bfloat16, weight int8")
    need(x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0], f"{name}: [M, K] and [K, N]")
    need(antiquant_scale.dtype == x.dtype, f"{name}: antiquant_scale has the dtype of x")
    need(antiquant_offset is None or antiquant_offset.dtype == x.dtype, f"{name}: antiquant_offset has the dtype of x")
    depth, width = weight.shape
    group = antiquant_group_size or depth
    need(antiquant_group_size == 0 or (group % 32 == 0 and 32 <= group < depth), f"{name}: a group is a multiple of 32 below K")

    def spread(x: Tensor) -> Tensor:
        rows = x.float().reshape(-1, x.shape[-1])
        need(len(rows) == -(-depth // group) and rows.shape[1] in (1, width), f"{name}: scales are [groups, N]")
        return rows.repeat_interleave(group, 0)[:depth]

    wide = weight.float()
    if antiquant_offset is not None:
        wide = wide + spread(antiquant_offset)
    out = x.float() @ (wide * spread(antiquant_scale))
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
        need(bias.dtype == wanted, f"{name}: bias is {wanted} for x of {x.dtype}")
        out = out + bias.float()
    return out.to(x.dtype)


def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The same values in another memory layout (2: ND, 29: FRACTAL_NZ), which only the device's operators can see."""
    need_unset("npu_format_cast", customize_dtype=customize_dtype, input_dtype=input_dtype)
    need(acl_format in (2, 29), f"npu_format_cast: format {acl_format}; ND is 2, FRACTAL_NZ 29")
    need(acl_format == 2 or input.dim() >= 2, "npu_format_cast: FRACTAL_NZ is for matrices")
    return input.clone()


# ---- sampling ---------------------------------------------------------------------------------------------------------


def npu_top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    """[rows, vocabulary] with -inf wherever a logit is smaller than the row's k-th, and where the probabilities up to it, added
    up from the smallest, are not more than 1 - p; the likeliest always stays."""
    name = "npu_top_k_top_p"
    need(logits.dim() == 2 and logits.dtype in FLOATS, f"{name}: logits are float rows")
    need(p is not None or k is not None, f"{name}: p and k can't both be None")
    values, order = logits.sort(dim=-1, stable=True)
    width = logits.shape[1]
    if k is not None:
        need(k.dtype == torch.int32 and k.shape == logits.shape[:1], f"{name}: k is int32, one for each row")
        need(bool(((k >= 1) & (k <= min(1024, width))).all()), f"{name}: k is 1 to 1024 and at most the vocabulary")
        kth = values.gather(1, (width - k.long())[:, None])
        values = values.masked_fill(values < kth, -torch.inf)
    if p is not None:
        need(p.dtype == logits.dtype and p.shape == logits.shape[:1], f"{name}: p has the dtype of the logits, one for each row")
        need(bool(((p >= 0) & (p <= 1)).all()), f"{name}: p is 0 to 1")
        dropped = values.float().softmax(-1).cumsum(-1) <= 1 - p.float()[:, None]
        dropped[:, -1] = False
        values = values.masked_fill(dropped, -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, values)


REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_rms_norm": npu_rms_norm,
    "npu_add_rms_norm": npu_add_rms_norm,
    "npu_swiglu": npu_swiglu,
    "npu_rotary_mul": npu_rotary_mul,
    "npu_apply_rotary_pos_emb": npu_apply_rotary_pos_emb,
    "npu_scatter_pa_kv_cache": npu_scatter_pa_kv_cache,
    "npu_fused_infer_attention_score": npu_fused_infer_attention_score,
    "npu_fused_infer_attention_score_v2": npu_fused_infer_attention_score_v2,
    "_npu_fused_infer_attention_score_get_max_workspace": attention_workspace,
    "_npu_fused_infer_attention_score_v2_get_max_workspace": attention_workspace,
    "_npu_fused_infer_attention_score_infer_output": attention_outputs,
    "_npu_fused_infer_attention_score_v2_infer_output": attention_outputs,
    "npu_dynamic_quant": npu_dynamic_quant,
    "npu_quant_matmul": npu_quant_matmul,
    "npu_weight_quant_batchmatmul": npu_weight_quant_batchmatmul,
    "npu_format_cast": npu_format_cast,
    "npu_top_k_top_p": npu_top_k_top_p,
}
