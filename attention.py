"""The prior's attention as Triton kernels: softmax(scale q k^T + bias) v, with the bias made inside.

PyTorch's fused attention takes a bias only as a whole matrix (H, N, M), and learns it only in its oldest kernel. But
T5's bias is 32 numbers a head, and all heads of the prior share keys and values. So the kernels below
    look the bias up by distance, and for most tiles only once: all of a tile's keys are far, or all are ahead;
    read keys and values as they are, without a copy for each head;
    learn the bias in a pass of its own, which sums over the batch first.
model.Attention calls them on a GPU in half precision. Its plain lines do the same; the tests compare.

    torch.ops.mindeye2.attend(q (B, N, H, D), k (B, M, D), v (B, M, D), table (H, far), scale) -> (B, N, H, D), lse

In model.Attention's letters, N is Q, M is N + 1, D is d filled up to a power of two; far is RelPosBias.max_distance.

The queries are the last N of M - 1 positions; key 0 is the null key. All contiguous; D a power of two from 16 on; table
float32: the bias at distance 0, 1, .., and from far - 1 on. lse (B, H, N) is the logarithm of each row's sum, which the
backward pass needs. The method is FlashAttention-2's (arXiv 2307.08691): S (BM, BN) are a tile's logits, P = exp(S -
lse), dS = P (dP - delta), delta = sum(dO O).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # queries and keys of a tile


@triton.jit
def _rows(pointer, rows, limit, STRIDE: tl.constexpr, D: tl.constexpr):
    """Rows (R, D) of a matrix, zeros after its `limit` rows."""
    here = pointer + rows[:, None] * STRIDE + tl.arange(0, D)[None, :]
    return tl.load(here, mask=rows[:, None] < limit, other=0.0)


@triton.jit
def _save(pointer, values, rows, limit, STRIDE: tl.constexpr, D: tl.constexpr):
    here = pointer + rows[:, None] * STRIDE + tl.arange(0, D)[None, :]
    tl.store(here, values.to(pointer.dtype.element_ty), mask=rows[:, None] < limit)


@triton.jit
def _distance(queries, keys, FAR: tl.constexpr):
    """(BM, BN): query - key, as positions. Keys ahead count as 0; from FAR - 1 on all is one."""
    return tl.minimum(tl.maximum(queries[:, None] - keys[None, :], 0), FAR - 1)


@triton.jit
def _bias(table, queries, keys, part: tl.constexpr, FAR: tl.constexpr):
    """One number for a tile whose keys are all far (part 0) or all ahead (2), else (BM, BN)."""
    if part == 0:
        bias = tl.load(table + FAR - 1)
    elif part == 1:
        bias = tl.load(table + _distance(queries, keys, FAR))
    else:
        bias = tl.load(table)
    return bias


@triton.jit
def _part(part: tl.constexpr, second, third, end):
    """Begin and end of one of three parts that follow each other from 0 on."""
    if part == 0:
        span = 0, second
    elif part == 1:
        span = second, third
    else:
        span = third, end
    return span


@triton.jit
def _logits(q, k, bias, keys, M, scale):
    """S (BM, BN) of one tile."""
    return tl.where(keys[None, :] < M, tl.dot(q, tl.trans(k)) * scale + bias, float("-inf"))


@triton.jit
def _slopes(q, k, v, d_out, lse, delta, bias, keys, M, scale):
    """P and dS (BM, BN) of one tile."""
    p = tl.exp(_logits(q, k, bias, keys, M, scale) - lse[:, None])
    return p, p * (tl.dot(d_out, tl.trans(v)) - delta[:, None])


@triton.jit
def _spans(first, M, BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr):
    """For queries from position `first` on: where tiles of near keys begin, and where those of keys ahead.

    Before and after, one number of the table holds for the whole tile.
    """
    ahead = tl.minimum(tl.cdiv(first + BM - 1, BN), tl.cdiv(M, BN)) * BN
    return tl.minimum(tl.maximum(first - FAR + 2, 0) // BN * BN, ahead), ahead


@triton.jit
def _forward(q, k, v, table, out, lse, N, M, scale, H: tl.constexpr, D: tl.constexpr,
             FAR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One program: BM queries of one head and sample, over all keys, with a running maximum and sum."""
    first, b, h = tl.program_id(0) * BM, tl.program_id(1) // H, tl.program_id(1) % H
    here, table = (b * N * H + h) * D, table + h * FAR
    rows, shift = first + tl.arange(0, BM), M - 1 - N  # query i is at position i + shift
    queries = _rows(q + here, rows, N, H * D, D)
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM, D], tl.float32)
    near, ahead = _spans(first + shift, M, BM, BN, FAR)
    for part in tl.static_range(3):
        begin, end = _part(part, near, ahead, M)
        for first_key in range(begin, end, BN):
            keys = first_key + tl.arange(0, BN)
            tile_k, tile_v = _rows(k + b * M * D, keys, M, D, D), _rows(v + b * M * D, keys, M, D, D)
            bias = _bias(table, rows + shift, keys, part, FAR)
            s = _logits(queries, tile_k, bias, keys, M, scale)
            higher = tl.maximum(top, tl.max(s, 1))
            p, shrink = tl.exp(s - higher[:, None]), tl.exp(top - higher)
            total = total * shrink + tl.sum(p, 1)
            mean = mean * shrink[:, None] + tl.dot(p.to(tile_v.dtype), tile_v)
            top = higher
    _save(out + here, mean / total[:, None], rows, N, H * D, D)
    tl.store(lse + tl.program_id(1) * N + rows, top + tl.log(total), mask=rows < N)


@triton.jit
def _backward_q(q, k, v, table, d_out, lse, delta, dq, N, M, scale, H: tl.constexpr,
                D: tl.constexpr, FAR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One program: dq of BM queries of one head and sample."""
    first, b, h = tl.program_id(0) * BM, tl.program_id(1) // H, tl.program_id(1) % H
    here, line, table = (b * N * H + h) * D, tl.program_id(1) * N, table + h * FAR
    rows, shift = first + tl.arange(0, BM), M - 1 - N
    queries, d_outs = _rows(q + here, rows, N, H * D, D), _rows(d_out + here, rows, N, H * D, D)
    row_lse = tl.load(lse + line + rows, mask=rows < N, other=float("inf"))
    row_delta = tl.load(delta + line + rows, mask=rows < N, other=0.0)
    total = tl.zeros([BM, D], tl.float32)
    near, ahead = _spans(first + shift, M, BM, BN, FAR)
    for part in tl.static_range(3):
        begin, end = _part(part, near, ahead, M)
        for first_key in range(begin, end, BN):
            keys = first_key + tl.arange(0, BN)
            tile_k, tile_v = _rows(k + b * M * D, keys, M, D, D), _rows(v + b * M * D, keys, M, D, D)
            bias = _bias(table, rows + shift, keys, part, FAR)
            _, ds = _slopes(queries, tile_k, tile_v, d_outs, row_lse, row_delta, bias, keys, M, scale)
            total += tl.dot(ds.to(tile_k.dtype), tile_k)
    _save(dq + here, total * scale, rows, N, H * D, D)


@triton.jit
def _backward_kv(q, k, v, table, d_out, lse, delta, dk, dv, N, M, scale, HEADS: tl.constexpr, H: tl.constexpr,
                 D: tl.constexpr, FAR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One program: dk and dv of BN keys of one sample, over all queries of HEADS heads."""
    first_key, b, group = tl.program_id(0) * BN, tl.program_id(1), tl.program_id(2)
    keys = first_key + tl.arange(0, BN)
    tile_k, tile_v = _rows(k + b * M * D, keys, M, D, D), _rows(v + b * M * D, keys, M, D, D)
    total_k, total_v = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    shift, end_of_queries = M - 1 - N, tl.cdiv(N, BM) * BM
    # Queries in order, so _bias's parts run backwards: before `near` the keys are ahead; from `far` on, all are far.
    near = tl.minimum(tl.maximum(first_key + 1 - shift, 0) // BM * BM, end_of_queries)
    far = tl.minimum(tl.cdiv(tl.maximum(first_key + BN + FAR - 2 - shift, 0), BM) * BM, end_of_queries)
    far = tl.maximum(far, near)
    for h in range(group * HEADS, group * HEADS + HEADS):
        here, line, row = (b * N * H + h) * D, (b * H + h) * N, table + h * FAR
        for part in tl.static_range(3):
            begin, end = _part(part, near, far, N)
            for first in range(begin, end, BM):
                rows = first + tl.arange(0, BM)
                queries, d_outs = _rows(q + here, rows, N, H * D, D), _rows(d_out + here, rows, N, H * D, D)
                row_lse = tl.load(lse + line + rows, mask=rows < N, other=float("inf"))
                row_delta = tl.load(delta + line + rows, mask=rows < N, other=0.0)
                bias = _bias(row, rows + shift, keys, 2 - part, FAR)
                p, ds = _slopes(queries, tile_k, tile_v, d_outs, row_lse, row_delta, bias, keys, M, scale)
                total_v += tl.dot(tl.trans(p.to(d_outs.dtype)), d_outs)
                total_k += tl.dot(tl.trans(ds.to(queries.dtype)), queries)
    there = (group * tl.num_programs(1) + b) * M * D
    _save(dk + there, total_k * scale, keys, M, D, D)
    _save(dv + there, total_v, keys, M, D, D)


@triton.jit
def _backward_table(q, k, v, table, d_out, lse, delta, d_table, B, N, M, scale, H: tl.constexpr,
                    D: tl.constexpr, FAR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One program: what a tile of one head, summed over the batch, adds to the head's row of the table.

    Tiles of keys ahead are left out: a row of dS sums to 0, so what they add to distance 0 follows from the others.
    """
    first, first_key, h = tl.program_id(0) * BM, tl.program_id(1) * BN, tl.program_id(2)
    shift = M - 1 - N
    near, ahead = _spans(first + shift, M, BM, BN, FAR)
    if first_key >= ahead:
        return
    rows, keys = first + tl.arange(0, BM), first_key + tl.arange(0, BN)
    bias = _bias(table + h * FAR, rows + shift, keys, 1, FAR)
    total = tl.zeros([BM, BN], tl.float32)
    for b in range(B):
        here, line = (b * N * H + h) * D, (b * H + h) * N
        queries, d_outs = _rows(q + here, rows, N, H * D, D), _rows(d_out + here, rows, N, H * D, D)
        tile_k, tile_v = _rows(k + b * M * D, keys, M, D, D), _rows(v + b * M * D, keys, M, D, D)
        row_lse = tl.load(lse + line + rows, mask=rows < N, other=float("inf"))
        row_delta = tl.load(delta + line + rows, mask=rows < N, other=0.0)
        _, ds = _slopes(queries, tile_k, tile_v, d_outs, row_lse, row_delta, bias, keys, M, scale)
        total += ds
    if first_key < near:
        tl.atomic_add(d_table + h * FAR + FAR - 1, tl.sum(total))
    else:
        tl.atomic_add(d_table + h * FAR + _distance(rows + shift, keys, FAR), total)


def _options(q: Tensor, table: Tensor, registers: int) -> dict:
    # No staged loads, few registers: the more programs a GPU holds at once, the better they hide each other's waiting.
    return {"H": q.shape[2], "D": q.shape[3], "FAR": table.shape[1], "BM": TILE, "BN": TILE, "num_warps": 4,
            "num_stages": 1, "maxnreg": registers}


@torch.library.custom_op("mindeye2::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, n, heads, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty(batch, heads, n, dtype=torch.float32)
    _forward[triton.cdiv(n, TILE), batch * heads](
        q, k, v, table, out, lse, n, k.shape[1], scale, **_options(q, table, 128))
    return out, lse


@_attend.register_fake
def _(q, k, v, table, scale):
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("mindeye2::attend_backward", mutates_args=())
def _attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, out: Tensor, lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, n, heads, _), m = q.shape, k.shape[1]
    together = math.gcd(heads, 4)  # heads a program of _backward_kv: more programs, but more sums to add up
    delta = (d_out.float() * out.float()).sum(-1).transpose(1, 2).contiguous()  # (B, H, N)
    given, numbers = (q, k, v, table, d_out, lse, delta), (n, m, scale)
    rows, columns = triton.cdiv(n, TILE), triton.cdiv(m, TILE)
    dq, d_table = torch.empty_like(q), torch.zeros_like(table)
    dk, dv = (k.new_empty(heads // together, *k.shape, dtype=torch.float32) for _ in range(2))
    small, large = _options(q, table, 128), _options(q, table, 168)
    _backward_q[rows, batch * heads](*given, dq, *numbers, **small)
    _backward_kv[columns, batch, heads // together](*given, dk, dv, *numbers, HEADS=together, **large)
    _backward_table[rows, columns, heads](*given, d_table, batch, *numbers, **large)
    d_table[:, 0] -= d_table.sum(1)
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype), d_table


@_attend_backward.register_fake
def _(d_out, q, k, v, table, out, lse, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(table)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.scale = inputs[4]


def _backward(ctx, d_out, _):
    return *_attend_backward(d_out.contiguous(), *ctx.saved_tensors, ctx.scale), None


_attend.register_autograd(_backward, setup_context=_setup)

