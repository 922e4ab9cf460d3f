"""AdamW for layers of many weights and few rows, whose gradients are never written.

The gradient of a linear layer is a product of its rows: gradients^T @ inputs, (M, R) @ (R, N). For the backbone's last
layer it is 7 GB, which the backward pass writes and AdamW reads once, where both factors are 72 MB. And AdamW's time
goes to reading and writing. So model.WideLinear keeps the factors, and the kernel below multiplies them tile by tile,
just where it changes the weights of the tile: 24 bytes a weight in place of 32, and no memory for gradients.

    RowAdamW(groups, layers, lr=3e-4)    as torch.optim.AdamW, with the same state: checkpoints fit both. From now on a
                                         layer's backward pass appends (gradients (R, M), inputs (R, N)) to layer.rows

AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101. On a GPU only; train.make_optimizer chooses.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

TILE = 64  # side of a tile, and the rows multiplied at a time


@triton.jit
def _step(weight, mean, square, gradients, inputs, corrections, R, M, N, lr, decay, beta1, beta2, eps,
          T: tl.constexpr):
    """One program: a tile (T, T) of weight (M, N) and of both running means; gradients (M, R), inputs (N, R).

    corrections (2,): how much of the first mean, and of the second one's root, is there by this step (both began at 0).
    R is a multiple of T, and what is multiplied lies side by side in memory, as tensor cores want it.
    """
    across = tl.cdiv(N, T)
    outs = tl.program_id(0) // across * T + tl.arange(0, T)[:, None]
    ins = tl.program_id(0) % across * T + tl.arange(0, T)[:, None]
    outs64 = outs.to(tl.int64)  # 1.7 billion weights are near what 32 bits count
    slope = tl.zeros([T, T], tl.float32)
    for first in range(0, R, T):
        rows = first + tl.arange(0, T)[None, :]
        left = tl.load(gradients + outs64 * R + rows, outs < M, other=0.0)  # (T, T)
        right = tl.load(inputs + ins * R + rows, ins < N, other=0.0)        # (T, T)
        slope += tl.dot(left, tl.trans(right))
    here, inside = outs64 * N + tl.trans(ins), (outs < M) & (tl.trans(ins) < N)
    w, m, s = tl.load(weight + here, inside), tl.load(mean + here, inside), tl.load(square + here, inside)
    # AdamW itself: running means of the gradient and of its square, decay, a step of their quotient.
    m += (slope - m) * (1 - beta1)
    s += (slope * slope - s) * (1 - beta2)
    first_part, second_part = tl.load(corrections), tl.load(corrections + 1)
    w = w * decay - lr / first_part * m / (tl.sqrt(s) / second_part + eps)
    tl.store(weight + here, w, inside)
    tl.store(mean + here, m, inside)
    tl.store(square + here, s, inside)


def _columns(rows: list[Tensor]) -> Tensor:
    """Several (.., N) -> (N, R), R rows in all and then zeros up to a whole tile."""
    rows = torch.cat(rows)
    return F.pad(rows.T, (0, -len(rows) % TILE)).contiguous()


class RowAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, which takes the weights' gradients of `layers` from their rows (see the top of the file)."""
    def __init__(self, groups: list[dict], layers: list[nn.Linear], **options) -> None:
        super().__init__(groups, **options)
        self.layers = layers
        for layer in layers:
            layer.rows = []

    @torch.no_grad()
    def step(self, closure=None):
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        for layer in self.layers:
            if layer.rows:
                gradients, inputs = map(_columns, zip(*layer.rows, strict=True))  # (M, R), (N, R)
                self._step_weight(layer.weight, gradients, inputs, group_of[layer.weight])
        return super().step(closure)

    def _step_weight(self, weight: Tensor, gradients: Tensor, inputs: Tensor, group: dict) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        step = state["step"].to(weight.device, torch.float64)  # a CPU's checkpoint has it there
        corrections = torch.stack((1 - beta1**step, (1 - beta2**step).sqrt())).float()
        (m, n), decay = weight.shape, 1 - group["lr"] * group["weight_decay"]
        _step[triton.cdiv(m, TILE) * triton.cdiv(n, TILE),](
            weight, state["exp_avg"], state["exp_avg_sq"], gradients, inputs, corrections, inputs.shape[1], m, n,
            group["lr"], decay, beta1, beta2, group["eps"], TILE, num_warps=4, num_stages=1)  # see attention._options

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for layer in self.layers:
            layer.rows.clear()
