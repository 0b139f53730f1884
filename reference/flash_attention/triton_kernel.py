"""FlashAttention as a GPU runs it: one program a block of queries, tiles in registers and SRAM.

The same loops as `forward` and `backward`, in Triton. The grid is (query blocks, B * H): programs
do not talk to each other, and each writes its own rows. Backward has two kernels, one that owns
keys (dK, dV) and one that owns queries (dQ), so that neither needs atomic additions.

exp2 stands for exp, since it is one instruction: scores carry a factor log2(e).

Runs on a GPU, or on a CPU in Triton's interpreter: set TRITON_INTERPRET=1 before importing.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, d head width.
Papers: FlashAttention-2, 2307.08691, alg. 1 and 2.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.flash_attention.forward import check_attention

HEAD_DIMS = (16, 32, 64, 128, 256)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(pointer, rows, num_rows, D: tl.constexpr):
    """Rows of a contiguous (num_rows, D) matrix, zeros below its end."""
    columns = tl.arange(0, D)
    return tl.load(
        pointer + rows[:, None] * D + columns[None, :], mask=rows[:, None] < num_rows, other=0.0
    )


@triton.jit
def _store(pointer, rows, num_rows, value, D: tl.constexpr):
    columns = tl.arange(0, D)
    where = pointer + rows[:, None] * D + columns[None, :]
    tl.store(where, value.to(pointer.dtype.element_ty), mask=rows[:, None] < num_rows)


@triton.jit
def _hide(scores, rows, columns, T, S, CAUSAL: tl.constexpr):
    """-inf for keys beyond the end and, with CAUSAL, for keys after the query."""
    seen = columns[None, :] < S
    if CAUSAL:
        seen = seen & (columns[None, :] <= rows[:, None] + S - T)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _forward_kernel(
    Q, K, V, OUT, LSE, scale, T, S, H, G,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_head = head // H * (H // G) + head % H // G
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _tile(Q + head * T * D, rows, T, D)
    if WIDE:
        q = q.to(tl.float32)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, D], tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, tl.maximum(0, (block + 1) * BLOCK_Q + S - T))
    for start in range(0, end, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        k = _tile(K + kv_head * S * D, columns, S, D)
        v = _tile(V + kv_head * S * D, columns, S, D)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        scores = _hide(scores, rows, columns, T, S, CAUSAL)
        new_m = tl.maximum(m, tl.max(scores, 1))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(scores - shift[:, None])
        factor = tl.exp2(m - shift)
        total = total * factor + tl.sum(p, 1)
        out = out * factor[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = new_m
    safe = tl.where(total == 0.0, 1.0, total)
    _store(OUT + head * T * D, rows, T, out / safe[:, None], D)
    lse = tl.where(total == 0.0, float("-inf"), m * LN_2 + tl.log(safe))
    tl.store(LSE + head * T + rows, lse, mask=rows < T)


@triton.jit
def _probabilities(q, k, lse, rows, columns, scale, T, S, CAUSAL: tl.constexpr):
    """P of a tile again, from the log-sum-exp."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
    scores = _hide(scores, rows, columns, T, S, CAUSAL)
    shift = tl.where(lse == float("-inf"), 0.0, lse * LOG2_E)
    return tl.exp2(scores - shift[:, None])


@triton.jit
def _dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, scale, T, S, H, G,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_kv_heads = H // G
    first = kv_head // num_kv_heads * H + kv_head % num_kv_heads * G
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k, v = _tile(K + kv_head * S * D, columns, S, D), _tile(V + kv_head * S * D, columns, S, D)
    if WIDE:
        k, v = k.to(tl.float32), v.to(tl.float32)
    dk, dv = tl.zeros([BLOCK_K, D], tl.float32), tl.zeros([BLOCK_K, D], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, block * BLOCK_K - (S - T)) // BLOCK_Q * BLOCK_Q
    for g in range(0, G):
        head = first + g
        for start in range(begin, T, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            q, do = _tile(Q + head * T * D, rows, T, D), _tile(DO + head * T * D, rows, T, D)
            if WIDE:
                q, do = q.to(tl.float32), do.to(tl.float32)
            lse = tl.load(LSE + head * T + rows, mask=rows < T, other=float("-inf"))
            delta = tl.load(DELTA + head * T + rows, mask=rows < T, other=0.0)
            p = _probabilities(q, k, lse, rows, columns, scale, T, S, CAUSAL)
            p = tl.where(rows[:, None] < T, p, 0.0)
            dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
    _store(DK + kv_head * S * D, columns, S, dk * scale, D)
    _store(DV + kv_head * S * D, columns, S, dv, D)


@triton.jit
def _dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, scale, T, S, H, G,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_head = head // H * (H // G) + head % H // G
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q, do = _tile(Q + head * T * D, rows, T, D), _tile(DO + head * T * D, rows, T, D)
    if WIDE:
        q, do = q.to(tl.float32), do.to(tl.float32)
    lse = tl.load(LSE + head * T + rows, mask=rows < T, other=float("-inf"))
    delta = tl.load(DELTA + head * T + rows, mask=rows < T, other=0.0)
    dq = tl.zeros([BLOCK_Q, D], tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, tl.maximum(0, (block + 1) * BLOCK_Q + S - T))
    for start in range(0, end, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        k, v = _tile(K + kv_head * S * D, columns, S, D), _tile(V + kv_head * S * D, columns, S, D)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        p = _probabilities(q, k, lse, rows, columns, scale, T, S, CAUSAL)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    _store(DQ + head * T * D, rows, T, dq * scale, D)


class TritonFlashAttention(torch.autograd.Function):
    """The three kernels under autograd; keeps q, k, v, the output and the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, block_q: int, block_k: int
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (batch, num_heads, num_queries, d), num_keys = q.shape, k.shape[2]
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        sizes = (1 / math.sqrt(d), num_queries, num_keys, num_heads, num_heads // k.shape[1])
        options = dict(
            D=d, BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=is_causal, WIDE=q.device.type == "cpu"
        )
        grid = (triton.cdiv(num_queries, block_q), batch * num_heads)
        _forward_kernel[grid](q, k, v, out, lse, *sizes, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sizes, ctx.options = sizes, options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        delta = (grad.float() * out.float()).sum(-1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        inputs = (q, k, v, grad, lse, delta)
        grid = (triton.cdiv(k.shape[2], ctx.options["BLOCK_K"]), k.shape[0] * k.shape[1])
        _dkdv_kernel[grid](*inputs, dk, dv, *ctx.sizes, **ctx.options)
        grid = (triton.cdiv(q.shape[2], ctx.options["BLOCK_Q"]), q.shape[0] * q.shape[1])
        _dq_kernel[grid](*inputs, dq, *ctx.sizes, **ctx.options)
        return dq, dk, dv, None, None, None


def triton_flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    block_q: int = 64,
    block_k: int = 64,
) -> Tensor:
    """Exact attention: (B, H, T, d) queries, (B, K, S, d) keys and values; differentiable.

    float32, float16 or bfloat16; d one of 16, 32, 64, 128, 256; block sizes powers of two from 16.
    Causal masks are aligned at the bottom right. A query that sees no key gets zeros.

    Raises: ValueError for shapes, widths or blocks that do not fit, TypeError for other dtypes.
    """
    check_attention(q, k, v)
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"q: expected float32, float16 or bfloat16, got {q.dtype}")
    if q.shape[3] not in HEAD_DIMS or v.shape[3] != q.shape[3]:
        raise ValueError(
            f"q, v: expected one head width out of {HEAD_DIMS}, got {q.shape[3]} and {v.shape[3]}"
        )
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name}: expected a power of two from 16 on, got {size}")
    return TritonFlashAttention.apply(q, k, v, is_causal, block_q, block_k)
