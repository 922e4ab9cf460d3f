"""The networks of MindEye2, shared by every stage.

What is here, in reading order:

    errors             UserError, run_main                   one printed sentence instead of a traceback
    brain model        RidgeRegression, Backbone             voxels (B, V) -> CLIP-like tokens (B, 256, 1664)
    diffusion prior    NoiseScheduler ... DiffusionPrior     those tokens -> tokens that the image decoder understands
    MindEye2           the three together; its forward is the one call that DDP or DeepSpeed wraps
    losses             mixco, mixco_nce, soft_clip_loss, soft_contrastive_loss, cosine_anneal
    optimizer groups   parameter_groups

The networks that MindEye2 takes from others and never trains are in frozen.py; weights on the disk, in checkpoints.py.

Sources: Scotti et al. 2024, "MindEye2", arXiv 2403.11207 (section numbers below are its own); the public release
of its code, whose state-dict names are kept so that its checkpoints load with strict=True; DALL-E 2, arXiv
2204.06125 (the prior); Kim et al. 2020, arXiv 2010.08558 (MixCo).

Letters in the shape comments: B samples, V voxels, h hidden width, S tokens and D channels of an image embedding
(256 and 1664 for CLIP ViT-bigG/14), L side of a VAE latent (28 for 224 pixels), F = (L/4)^2 low-level positions,
N = 2 S + 1 tokens inside the prior, H heads of d channels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from files import is_disk_full

# ----------------------------------------------------------------------------------------------------------------------
# Errors that the user can mend

class UserError(Exception):
    """Something the user can mend; the text is one sentence: what is wrong, where, and which flag helps."""

def run_main(main: Callable[[], object]) -> None:
    """Run a script's `main()`; an error that the user can mend is printed as one sentence and exits with code 2.

    Covers UserError, a full GPU and a full disk. Anything else is a bug and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        sentence = str(error)
    except torch.cuda.OutOfMemoryError:
        sentence = ("the GPU ran out of memory: pass a smaller --batch_size, in training --gradient_checkpointing, or "
                    "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.")
    except Exception as error:
        if not is_disk_full(error):
            raise
        place = getattr(error, "filename", None)
        sentence = f"no space is left on the disk{f' for {place}' if place else ''}: free some, or name another folder."
    else:
        return
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Brain model: ridge (2.1), backbone and its two heads (2.2)

class WideLinear(nn.Linear):
    """A layer of many weights for few rows: its time goes to reading and writing them.

    Ridge and backbone_linear hold 88% of the weights that learn in pretraining. So they compute in the weights' own
    precision, whatever autocast says: that would write a copy of them at each step, and another of their gradients.
    A gradient is itself a product of few rows, which are smaller by far than what they make:
        exchanges_rows    several processes send each other rows in place of gradients
        rows              a list: nobody multiplies them here, the optimizer does so while it steps (adamw.py)
    """
    exchanges_rows = False
    rows: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:  # nothing to save, and --low_memory converts weights itself
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            plain = self.rows is None and not self.exchanges_rows
            return super().forward(x) if plain else _ByRows.apply(x, self.weight, self.bias, self)


class _ByRows(torch.autograd.Function):
    """A linear layer with `WideLinear`'s two ways to treat its weight's gradient, (O, R) @ (R, I).

    For the backbone's last layer that is 7 GB at each step, where 42 rows of both are 72 MB.
    """
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, layer: WideLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        (x, weight), rows, slope = ctx.saved_tensors, ctx.layer.rows, None
        inputs, grads = x, grad                                            # (B, I), (B, O)
        if ctx.layer.exchanges_rows:  # the mean over W processes, as DDP's is
            inputs, grads = gathered(x), gathered(grad / torch.distributed.get_world_size())  # (W * B, I), (W * B, O)
        if rows is None:
            slope = grads.T @ inputs                                       # (O, I)
        else:
            rows.append((grads, inputs))
        return grad @ weight if ctx.needs_input_grad[0] else None, slope, grads.sum(0), None


def gathered(x: Tensor) -> Tensor:
    """The rows (B, ..) of each of W processes, in their order: (W * B, ..), without a gradient."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format)
             for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class AdaptedLinear(nn.Linear):
    """A linear layer that stays as it is, and a correction of low rank that learns: W x + up (down x).

    LoRA (Hu et al. 2021, arXiv 2106.09685). `up` starts at 0, so the layer starts as the one it is made of.
    """
    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.down = nn.Parameter(torch.randn(rank, self.in_features) / math.sqrt(self.in_features))
        self.up = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(.., in) -> (.., out)."""
        return super().forward(x) + x @ self.down.T @ self.up.T


class RidgeRegression(nn.Module):
    """One linear layer per subject into a common space: the only part of the model that knows whose brain it is (2.1).

    It is "ridge" through the optimizer's weight decay. Layer i belongs to the i-th subject of the run. kind="mlp" bends
    its output as the first layer of MindEye1 does, which the paper compares with in Table 4.
    """
    def __init__(self, num_voxels: list[int], hidden_dim: int, kind: str = "linear") -> None:
        super().__init__()
        if kind not in ("linear", "mlp"):
            raise ValueError(f"ridge {kind!r} is not 'linear' or 'mlp'")
        self.linears = nn.ModuleList(WideLinear(voxels, hidden_dim) for voxels in num_voxels)
        self.bends = None
        if kind == "mlp":
            self.bends = nn.ModuleList(nn.Sequential(nn.LayerNorm(hidden_dim), nn.GELU(), nn.Dropout(0.5))
                                       for _ in num_voxels)

    def forward(self, voxels: Tensor, subject: int) -> Tensor:
        """(B, V) or (B, 1, V) z-scored voxels of one subject -> (B, h)."""
        x = self.linears[subject](voxels.flatten(1))  # (B, h)
        return x if self.bends is None else self.bends[subject](x)


def _mixer_block(width: int) -> nn.Sequential:
    """LayerNorm, then a two-layer perceptron: half of one MLP-Mixer step."""
    mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.15), nn.Linear(width, width))
    return nn.Sequential(nn.LayerNorm(width), mlp)


class Backbone(nn.Module):
    """Shared-space activity (B, h) -> tokens (B, S, D), retrieval tokens (B, S, D), blurry latents (B, 4, L, L) (2.2).

    kind="released" is what the published code computes, kind="mlp" the residual MLP that the paper describes; the
    parameters have the same names and shapes. seq_len > 1 (time points) is the only case where the mixer mixes.
    """
    def __init__(
        self, hidden_dim: int, n_blocks: int, clip_seq_dim: int, clip_emb_dim: int, latent_size: int = 28,
        blurry_recon: bool = True, kind: str = "released", seq_len: int = 1,
    ) -> None:
        super().__init__()
        if kind not in ("released", "mlp") or latent_size % 4:
            raise ValueError(f"backbone {kind!r} is not 'released' or 'mlp', or 4 does not divide {latent_size=}")
        self.kind, self.seq_len, self.grid = kind, seq_len, latent_size // 4
        self.token_shape = (clip_seq_dim, clip_emb_dim)
        self.mixer_blocks1 = nn.ModuleList(_mixer_block(hidden_dim) for _ in range(n_blocks))
        self.mixer_blocks2 = nn.ModuleList(_mixer_block(seq_len) for _ in range(n_blocks))
        self.backbone_linear = WideLinear(hidden_dim * seq_len, clip_seq_dim * clip_emb_dim)
        # The retrieval head: its tokens meet CLIP only through the contrastive loss, apart from the prior's regression.
        layers = [(nn.LayerNorm(clip_emb_dim), nn.GELU(), nn.Linear(clip_emb_dim, clip_emb_dim)) for _ in range(3)]
        self.clip_proj = nn.Sequential(*(part for layer in layers for part in layer))
        self.blurry_recon = blurry_recon
        if blurry_recon:
            self._build_blurry_head(hidden_dim * seq_len)
        # With seq_len 1 one half of the blocks cannot learn (see `_mix`). It is carried for the checkpoints' sake,
        # frozen, because DDP demands a gradient for every parameter that asks for one.
        if seq_len == 1:
            (self.mixer_blocks1 if kind == "released" else self.mixer_blocks2).requires_grad_(False)

    def _build_blurry_head(self, width: int) -> None:
        """The low-level head: a small VAE decoder, 4 times larger at its output, and a projector to the teacher."""
        self.blin1 = nn.Linear(width, 64 * self.grid**2)
        self.bdropout = nn.Dropout(0.3)
        self.bnorm = nn.GroupNorm(1, 64)
        self.bupsampler = Decoder(
            in_channels=64, out_channels=4, up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[32, 64, 128], layers_per_block=1,
        )
        self.b_maps_projector = nn.Sequential(
            nn.Conv2d(64, 512, 1, bias=False), nn.GroupNorm(1, 512), nn.ReLU(inplace=True),
            nn.Conv2d(512, 512, 1, bias=False), nn.GroupNorm(1, 512), nn.ReLU(inplace=True),
            nn.Conv2d(512, 512, 1),
        )

    def _mix(self, x: Tensor) -> Tensor:
        """(B, seq_len, h) -> (B, seq_len * h): the residual blocks, in the variant that applies."""
        if self.seq_len > 1:
            skip_tokens, skip_time = x, x.transpose(1, 2)
            for block1, block2 in zip(self.mixer_blocks1, self.mixer_blocks2, strict=True):
                skip_tokens = block1(x) + skip_tokens                        # (B, seq_len, h)
                skip_time = block2(skip_tokens.transpose(1, 2)) + skip_time  # (B, h, seq_len)
                x = skip_time.transpose(1, 2)
            return x.flatten(1)                                              # (B, seq_len * h)
        x = x.flatten(1)                                                     # (B, h)
        if self.kind == "mlp":
            for block in self.mixer_blocks1:
                x = x + block(x)
            return x                                                         # (B, h)
        # The released mixer normalises over ONE time point, which leaves only the LayerNorm's bias, and its second
        # residual bypasses block 1: each block adds one learned scalar (in training, dropout makes two of it). The
        # released backbone is thus linear in the voxels; a zero stands for the input that the blocks cannot see.
        for norm, (first, gelu, dropout, second) in self.mixer_blocks2:
            seen = gelu(first(norm(x.new_zeros(1))))                         # (1,)
            x = x + second(dropout(seen.expand(*x.shape, 1)))[..., 0]
        return x                                                             # (B, h)

    def forward(self, x: Tensor) -> SimpleNamespace:
        """x (B, h) or (B, seq_len, h) -> .backbone, .clip_voxels, .blurry_latents, .blurry_features (None if off)."""
        x = self._mix(x)                                                                  # (B, seq_len * h)
        tokens = self.backbone_linear(x).unflatten(1, self.token_shape)                   # (B, S, D)
        out = SimpleNamespace(backbone=tokens, clip_voxels=self.clip_proj(tokens))        # (B, S, D) each
        out.blurry_latents = out.blurry_features = None
        if self.blurry_recon:
            maps = self.bdropout(self.blin1(x))                                           # (B, 64 * F)
            maps = self.bnorm(maps.unflatten(1, (64, self.grid, self.grid)))              # (B, 64, L/4, L/4)
            out.blurry_latents = self.bupsampler(maps)                                    # (B, 4, L, L)
            out.blurry_features = self.b_maps_projector(maps).flatten(2).transpose(1, 2)  # (B, F, 512)
        return out


# ----------------------------------------------------------------------------------------------------------------------
# Diffusion prior (2.2): a transformer that turns noise into image tokens, given brain tokens

class NoiseScheduler(nn.Module):
    """The cosine noise schedule as 13 tables of length T, computed in float64 and kept in float32.

    x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise. p2_loss_weight is all ones and unused.
    """
    def __init__(self, timesteps: int = 100) -> None:
        super().__init__()
        time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2  # s = .008 keeps the first step from being nil
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
        alphas = 1 - betas
        bar = alphas.cumprod(0)
        before = F.pad(bar[:-1], (1, 0), value=1.0)
        variance = betas * (1 - before) / (1 - bar)
        tables = {
            "betas": betas,
            "alphas_cumprod": bar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - bar).log(),
            "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * before.sqrt() / (1 - bar),
            "posterior_mean_coef2": (1 - before) * alphas.sqrt() / (1 - bar),
            "p2_loss_weight": torch.ones_like(betas),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float())


class LayerNorm(nn.Module):
    """LayerNorm with a gain `g` and no bias; eps is 1e-5 for float32 input and 1e-3 for half input."""
    def __init__(self, dim: int, stable: bool = False) -> None:
        super().__init__()
        self.stable = stable
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        if self.stable:  # the divisor is the largest value, not the largest size: a negative one flips the token's sign
            x = x / x.amax(-1, keepdim=True).detach()
        return F.layer_norm(x.float(), self.g.shape, self.g.float(), None, eps)


class RotaryEmbedding(nn.Module):
    """Rotary positions on the first 32 channels of each head; the frequencies are constants that checkpoints hold."""
    def __init__(self, dim: int) -> None:
        super().__init__()
        frequencies = 10000 ** -(torch.arange(0, dim, 2).float() / dim)
        self.freqs = nn.Parameter(frequencies, requires_grad=False)

    def forward(self, n: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles of positions 0..n-1, each (n, dim)."""
        angles = torch.arange(n, device=self.freqs.device)[:, None] * self.freqs.float()  # (n, dim / 2)
        angles = angles.repeat_interleave(2, -1)                                          # (n, dim)
        return angles.cos(), angles.sin()


def constants(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Noise tables and rotary frequencies of MindEye2's state dict, made anew in float32: they follow from their sizes.

    Half precision is too coarse for them: in bfloat16, two of 100 noise levels round to no noise, and positions near
    500 turn .1 radian too far.
    """
    exact = {}
    for name, value in state.items():
        table = name.removeprefix("diffusion_prior.noise_scheduler.")
        if table != name:
            exact[name] = NoiseScheduler(len(value)).get_buffer(table)
        elif name.endswith("rotary_emb.freqs"):
            exact[name] = RotaryEmbedding(2 * len(value)).freqs.data
    return exact


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighbouring channels (2i, 2i + 1) of x (..., n, d) by its position's angle."""
    cos, sin = rotation
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    quarter = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)  # the pairs, turned by 90 degrees
    return torch.cat((turned * cos + quarter * sin, rest), -1)


class RelPosBias(nn.Module):
    """T5's relative-position bias: one learned number per head and distance bucket, shared by all layers."""
    def __init__(self, heads: int, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def _look_up(self, distance: Tensor) -> Tensor:
        """Distances (..) >= 0 -> (.., H)."""
        near = self.num_buckets // 2  # 16 buckets of one step each, then 16 of growing width up to max_distance
        far = torch.log(distance.clamp(min=1) / near) / math.log(self.max_distance / near) * (self.num_buckets - near)
        buckets = torch.where(distance < near, distance, (near + far.long()).clamp(max=self.num_buckets - 1))
        return self.relative_attention_bias(buckets)

    def table(self) -> Tensor:
        """(H, max_distance): the bias at each distance; from the last on it is one number."""
        distance = torch.arange(self.max_distance, device=self.relative_attention_bias.weight.device)
        return self._look_up(distance).T.contiguous()                                            # (H, max_distance)

    def forward(self, n: int) -> Tensor:
        """The bias (H, n, n + 1) that is added to the attention logits; column 0 is the null key."""
        # The null key shifts every key by one column, which the original ignores: key c - 1 gets the distance of c.
        # Keys ahead of the query all count as distance 0 (causal buckets, although attention is not causal).
        device = self.relative_attention_bias.weight.device
        distance = torch.arange(n, device=device)[:, None] - torch.arange(n + 1, device=device)  # (n, n + 1)
        return self._look_up(distance.clamp(min=0)).permute(2, 0, 1).contiguous()                # (H, n, n + 1)


@cache
def has_triton() -> bool:
    """Are there our kernels? They need Triton, which PyTorch brings for Linux."""
    try:
        import attention  # noqa: F401  here: a CPU needs none; it makes itself known to PyTorch as mindeye2::attend
    except ImportError:
        return False
    return True


def fused(device: torch.device) -> bool:
    """Whether the prior's attention runs as our Triton kernels: on a GPU, in half precision (attention.py)."""
    return device.type == "cuda" and torch.is_autocast_enabled("cuda") and has_triton()


class Attention(nn.Module):
    """Cosine-similarity attention with one key/value head for all query heads (multi-query) and one null key."""
    def __init__(self, dim: int, dim_head: int, heads: int, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.norm = LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.rotary_emb = rotary_emb  # the same module in every layer, so checkpoints list `freqs` once per layer
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim, bias=False), LayerNorm(dim))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], bias: Tensor, last: int | None = None) -> Tensor:
        """x (B, N, D), rotation from RotaryEmbedding, bias (1, H, N, N + 1) or RelPosBias.table -> (B, N, D).

        With `last`, only the last Q = `last` tokens look at all: -> (B, Q, D).
        """
        last = last or x.shape[1]
        x = self.norm(x)                                                                       # (B, N, D)
        q = self.to_q(x[:, -last:]).unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2)  # (B, H, Q, d)
        k, v = self.to_kv(x)[:, None].chunk(2, -1)                                             # (B, 1, N, d) each
        q, k = _rotate(q, [table[-last:] for table in rotation]), _rotate(k, rotation)
        null_k, null_v = self.null_kv[:, None, None, None].expand(-1, len(x), 1, 1, -1)        # (B, 1, 1, d) each
        k, v = torch.cat((null_k, k), 2), torch.cat((null_v, v), 2)                            # (B, 1, N + 1, d)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)  # so a logit is 16 times a cosine
        if bias.ndim == 2:  # a table: our Triton kernels (`fused`)
            half = torch.get_autocast_dtype(q.device.type)
            spare = max(16, 1 << (self.dim_head - 1).bit_length()) - self.dim_head             # to a power of two
            q, k, v = (F.pad(t.to(half), (0, spare)).contiguous() for t in (q.transpose(1, 2), k[:, 0], v[:, 0]))
            out = torch.ops.mindeye2.attend(q, k, v, bias, 16.0)[0][..., : self.dim_head]      # (B, Q, H, d)
            return self.to_out(out.flatten(2))                                                 # (B, Q, D)
        # Fused kernels want a head size that is a multiple of 8; zeros change neither the dot products nor the rest.
        q, k, v = (F.pad(t, (0, -self.dim_head % 8)) for t in (q, k, v))
        k, v = k.expand(-1, self.heads, -1, -1), v.expand(-1, self.heads, -1, -1)              # (B, H, N + 1, d)
        bias = bias[..., -last:, :].to(q.dtype)                                                # (1, H, Q, N + 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=16.0)              # (B, H, Q, d)
        return self.to_out(out[..., : self.dim_head].transpose(1, 2).flatten(2))               # (B, Q, D)


class SwiGLU(nn.Module):
    """(..., 2 n) -> (..., n): the first half, gated by the second."""
    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, -1)
        return x * F.silu(gate)


class PriorLayer(nn.Sequential):
    """Attention (child 0) and feed-forward network (child 1), each inside a residual connection."""
    def __init__(self, dim: int, dim_head: int, heads: int, rotary_emb: RotaryEmbedding) -> None:
        up, down = nn.Linear(dim, 8 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        unused = nn.Identity(), nn.Identity()  # an optional norm and a dropout of the original: they keep `down` at 5
        feed_forward = nn.Sequential(LayerNorm(dim), up, SwiGLU(), *unused, down)
        super().__init__(Attention(dim, dim_head, heads, rotary_emb), feed_forward)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], bias: Tensor, last: int) -> Tensor:
        attention, feed_forward = self
        x = x[:, -last:] + attention(x, rotation, bias, last)  # (B, Q, D)
        return x + feed_forward(x)                             # (B, Q, D)


class PriorTransformer(nn.Module):
    """The layers, with positions computed once for all of them, then a norm and a linear output."""
    def __init__(self, dim: int, depth: int, dim_head: int, heads: int) -> None:
        super().__init__()
        self.checkpointing = False  # in training, compute activations twice instead of keeping them
        self.rel_pos_bias = RelPosBias(heads)
        rotary_emb = RotaryEmbedding(min(32, dim_head))
        self.layers = nn.ModuleList(PriorLayer(dim, dim_head, heads, rotary_emb) for _ in range(depth))
        self.norm = LayerNorm(dim, stable=True)
        self.project_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, last: int) -> Tensor:
        """(B, N, D) -> the last tokens (B, last, D): nobody asks for the others, so the last layer leaves them out."""
        # A GPU in half precision makes the bias inside of the attention (attention.py).
        bias = self.rel_pos_bias.table() if fused(x.device) else self.rel_pos_bias(x.shape[1])[None]
        rotation = self.layers[0][0].rotary_emb(x.shape[1])  # (N, 32) twice
        for layer in self.layers:
            keep = last if layer is self.layers[-1] else x.shape[1]
            if self.checkpointing and self.training:  # nothing in a layer is random: no state of random numbers to keep
                x = checkpoint(layer, x, rotation, bias, keep, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rotation, bias, keep)           # (B, N or last, D)
        return self.project_out(self.norm(x))                # (B, last, D)


class SinusoidalTime(nn.Module):
    """(B,) timesteps -> (B, dim): sines, then cosines, of dim / 2 frequencies from 1 down to 1/10000."""
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.half = dim // 2

    def forward(self, times: Tensor) -> Tensor:
        steps = torch.arange(self.half, device=times.device)
        angles = times[:, None].float() * torch.exp(steps * -(math.log(10000) / (self.half - 1)))  # (B, dim / 2)
        return torch.cat((angles.sin(), angles.cos()), -1)                                         # (B, dim)


class TimeMLP(nn.Module):
    """(B, dim) -> (B, dim) through two hidden layers of 2 dim."""
    def __init__(self, dim: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU())
        second = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.SiLU())
        self.net = nn.Sequential(first, second, nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PriorNetwork(nn.Module):
    """Predicts the clean image tokens from noisy ones, the time and the brain tokens (2.2).

    It reads [S brain tokens | 1 time token | S noisy image tokens + learned positions] and keeps the last S.
    predicts="target" makes of those the clean tokens, as the paper does; "correction" adds them to the brain tokens: a
    linear map from brain to image then needs no layer of the transformer, which learns what is missing.
    """
    def __init__(self, num_tokens: int, dim: int, depth: int, dim_head: int, predicts: str = "target") -> None:
        super().__init__()
        if predicts not in ("target", "correction"):
            raise ValueError(f"prior {predicts!r} is not 'target' or 'correction'")
        self.num_tokens, self.predicts = num_tokens, predicts
        self.learned_query = nn.Parameter(torch.randn(num_tokens, dim) * dim**-0.5)
        self.null_brain_embeds = nn.Parameter(torch.randn(num_tokens, dim))
        self.null_image_embed = nn.Parameter(torch.randn(num_tokens, dim))
        self.to_time_embeds = nn.Sequential(nn.Sequential(SinusoidalTime(dim), TimeMLP(dim)))
        self.causal_transformer = PriorTransformer(dim, depth, dim_head, heads=max(1, dim // dim_head))

    def forward(
        self, noisy: Tensor, times: Tensor, brain: Tensor,
        brain_keep: Tensor | None = None, image_keep: Tensor | None = None,
    ) -> Tensor:
        """noisy (B, S, D), times (B,) integers, brain (B, S, D) -> clean tokens (B, S, D).

        A sample whose keep mask (B,) is False has that input replaced by a learned "nothing" embedding.
        """
        if brain_keep is not None:
            brain = torch.where(brain_keep[:, None, None], brain, self.null_brain_embeds)  # (B, S, D)
        if image_keep is not None:
            noisy = torch.where(image_keep[:, None, None], noisy, self.null_image_embed)   # (B, S, D)
        time = self.to_time_embeds(times)[:, None]                                         # (B, 1, D)
        x = torch.cat((brain, time, noisy + self.learned_query), 1)                        # (B, 2 S + 1, D)
        out = self.causal_transformer(x, self.num_tokens)                                  # (B, S, D)
        return brain + out if self.predicts == "correction" else out


class DiffusionPrior(nn.Module):
    """Trains and samples the prior network (2.2): brain tokens (B, S, D) -> image tokens (B, S, D).

    The targets are CLIP's raw tokens, neither normalised nor rescaled.
    """
    def __init__(
        self, num_tokens: int, dim: int, depth: int, dim_head: int, timesteps: int, predicts: str = "target",
    ) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.noise_scheduler = NoiseScheduler(timesteps)
        self.net = PriorNetwork(num_tokens, dim, depth, dim_head, predicts)

    def loss(
        self, backbone: Tensor, clip_target: Tensor, timesteps: Tensor | None = None, noise: Tensor | None = None,
        keep: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Denoising loss: backbone and clip_target (B, S, D) -> the mean squared error (), the prediction (B, S, D).

        timesteps (B,) in 0..T-1, noise (B, S, D), keep = (brain, image) boolean masks (B,); what is None is drawn.
        """
        target, table, device = clip_target.float(), self.noise_scheduler, clip_target.device
        # The draws come in the original's order. Each input is dropped for a fifth of the samples, in evaluation too:
        # dropping the brain allows guidance, dropping the image forces the network to use the brain.
        if timesteps is None:
            timesteps = torch.randint(0, self.timesteps, (len(target),), device=device)
        if noise is None:
            noise = torch.randn_like(target)
        if keep is None:
            keep = tuple(torch.rand(len(target), device=device) < 0.8 for _ in range(2))
        signal_scale = table.sqrt_alphas_cumprod[timesteps, None, None]           # (B, 1, 1)
        noise_scale = table.sqrt_one_minus_alphas_cumprod[timesteps, None, None]  # (B, 1, 1)
        noisy = signal_scale * target + noise_scale * noise                       # (B, S, D)
        prediction = self.net(noisy, timesteps, backbone, *keep).float()          # (B, S, D)
        return F.mse_loss(prediction, target), prediction

    def _predict(self, x: Tensor, step: int, backbone: Tensor, guidance: float) -> Tensor:
        """Clean tokens (B, S, D) foreseen at one step; guidance > 1 moves away from what is foreseen without inputs."""
        times = torch.full((len(x),), step, device=x.device)            # (B,)
        prediction = self.net(x, times, backbone).float()               # (B, S, D)
        if guidance == 1.0:
            return prediction
        nothing = torch.zeros_like(times, dtype=torch.bool)
        blind = self.net(x, times, backbone, nothing, nothing).float()  # (B, S, D)
        return blind + (prediction - blind) * guidance

    @torch.no_grad()
    def sample(
        self, backbone: Tensor, timesteps: int = 20, noise: Tensor | None = None, step_noise: Tensor | None = None,
        guidance: float = 1.0, generator: torch.Generator | None = None, method: str | None = None,
    ) -> Tensor:
        """Draw image tokens (B, S, D) for brain tokens (B, S, D).

        method "ddim" calls the network once less than timesteps, 2..T (20 -> 19 calls, 18 draws); "ddpm" takes all T
        steps (T calls, T draws); None is the original's choice: DDPM for T, DDIM for fewer. noise (B, S, D) starts it,
        step_noise (draws, B, S, D) is added on the way; what is None is drawn from `generator`. Raises ValueError.
        """
        if not 2 <= timesteps <= self.timesteps or method == "ddpm" and timesteps != self.timesteps:
            raise ValueError(f"timesteps must lie in 2..{self.timesteps}, all of them for DDPM, not {timesteps}")
        source = backbone.device if generator is None else generator.device

        def randn() -> Tensor:
            return torch.randn(backbone.shape, generator=generator, device=source).to(backbone.device)

        draw = randn if step_noise is None else iter(step_noise).__next__
        method = method or ("ddpm" if timesteps == self.timesteps else "ddim")
        sampler = self._ddpm if method == "ddpm" else self._ddim
        return sampler(randn() if noise is None else noise.float(), backbone, timesteps, guidance, draw)

    def _ddpm(self, x: Tensor, backbone: Tensor, timesteps: int, guidance: float, draw: Callable[[], Tensor]) -> Tensor:
        """Every step: the mean of x_{t-1} given x_t and the foreseen x_0, plus noise of the posterior's variance."""
        table = self.noise_scheduler
        for t in reversed(range(timesteps)):
            clean = self._predict(x, t, backbone, guidance)  # (B, S, D)
            mean = table.posterior_mean_coef1[t] * clean + table.posterior_mean_coef2[t] * x
            # A draw is made at t = 0 as well, and unused, to keep the original's sequence of random numbers.
            x = mean + (t > 0) * (0.5 * table.posterior_log_variance_clipped[t]).exp() * draw()
        return x

    def _ddim(self, x: Tensor, backbone: Tensor, timesteps: int, guidance: float, draw: Callable[[], Tensor]) -> Tensor:
        """Jumps t -> s over a grid (94, 89, ..., 4, -1 for 20 of 100) with eta = 1; s = -1 returns the foreseen x_0.

        The signal level is read one step early, from alphas_cumprod_prev, while the noise in x_t is solved for with
        the tables of t: the released models were sampled so.
        """
        table = self.noise_scheduler
        grid = torch.linspace(-1, self.timesteps, timesteps + 1)[:-1].int().tolist()[::-1]
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            clean = self._predict(x, t, backbone, guidance)                                  # (B, S, D)
            if s < 0:
                break
            noise = (table.sqrt_recip_alphas_cumprod[t] * x - clean) / table.sqrt_recipm1_alphas_cumprod[t]
            now, then = table.alphas_cumprod_prev[t], table.alphas_cumprod_prev[s]
            fresh = ((1 - now / then) * (1 - then) / (1 - now)).sqrt()  # eta = 1: as much new noise as DDPM adds
            x = then.sqrt() * clean + (1 - then - fresh**2).sqrt() * noise + fresh * draw()  # (B, S, D)
        return clean


# ----------------------------------------------------------------------------------------------------------------------
# The whole model

class MindEye2(nn.Module):
    """ridge + backbone + diffusion_prior (None without a prior); every size is a constructor argument.

    The defaults are subject 1 of the paper: 2.23 billion parameters.
    """
    def __init__(
        self, num_voxels: list[int], hidden_dim: int = 4096, n_blocks: int = 4, clip_seq_dim: int = 256,
        clip_emb_dim: int = 1664, latent_size: int = 28, blurry_recon: bool = True, use_prior: bool = True,
        backbone: str = "released", prior_depth: int = 6, prior_dim_head: int = 52, prior_timesteps: int = 100,
        ridge: str = "linear", prior: str = "target", lora_rank: int = 0,
    ) -> None:
        super().__init__()
        self.ridge = RidgeRegression(num_voxels, hidden_dim, ridge)
        self.backbone = Backbone(hidden_dim, n_blocks, clip_seq_dim, clip_emb_dim, latent_size, blurry_recon, backbone)
        prior_sizes = clip_seq_dim, clip_emb_dim, prior_depth, prior_dim_head, prior_timesteps
        self.diffusion_prior = DiffusionPrior(*prior_sizes, prior) if use_prior else None
        if lora_rank:
            self.adapt(lora_rank)

    def embed(self, voxels: Tensor, subject: int = 0) -> SimpleNamespace:
        """Voxels (B, V) or (B, 1, V) of one subject (its index in the ridge) -> the backbone's four outputs.

        .backbone (B, S, D), .clip_voxels (B, S, D), .blurry_latents (B, 4, L, L), .blurry_features (B, F, 512); the
        last two are None without the blurry head.
        """
        return self.backbone(self.ridge(voxels, subject))

    def forward(self, voxels: list[Tensor], clip_target: Tensor | None = None) -> dict[str, Tensor]:
        """The training pass: one tensor (b_s, V_s) per subject, B = sum of b_s; clip_target (B, S, D).

        Returns those that exist of backbone, clip_voxels, blurry_latents, blurry_features (shapes as in `embed`),
        loss_prior () and prior_prediction (B, S, D). DDP and DeepSpeed see only this call, so it does everything.
        """
        shared = torch.cat([self.ridge(x, subject) for subject, x in enumerate(voxels)])  # (B, h)
        out = {name: value for name, value in vars(self.backbone(shared)).items() if value is not None}
        if self.diffusion_prior is not None and clip_target is not None:
            out["loss_prior"], out["prior_prediction"] = self.diffusion_prior.loss(out["backbone"], clip_target)
        return out

    def freeze(self) -> None:
        """Let nothing learn but the ridge: what is new about a subject is then one linear map (2.1)."""
        for part in (self.backbone, self.diffusion_prior):
            if part is not None:
                part.requires_grad_(False)

    def adapt(self, rank: int) -> None:
        """Freeze all but the ridge, and give backbone_linear and the prior's linear layers corrections that learn."""
        self.freeze()
        layers = [(self.backbone, "backbone_linear", self.backbone.backbone_linear)]
        if self.diffusion_prior is not None:
            layers += [(parent, name, child) for parent in self.diffusion_prior.net.causal_transformer.modules()
                       for name, child in parent.named_children() if isinstance(child, nn.Linear)]
        for parent, name, linear in layers:
            setattr(parent, name, AdaptedLinear(linear, rank))

    def compile_blocks(self) -> None:
        """torch.compile what most of a step's time goes to, by pieces: the whole would take minutes."""
        layers = self.diffusion_prior.net.causal_transformer.layers if self.diffusion_prior is not None else ()
        for block in (*layers, self.backbone.clip_proj):
            # Not block.compile(): PyTorch 2.11 ignores it for a module whose class is its own, as clip_proj's is.
            block.forward = torch.compile(block.forward)

    @torch.no_grad()
    def tie_positions(self, std: float = 1.0, generator: torch.Generator | None = None) -> None:
        """Start with brain token i and image token i marked by the same random vector, of that std per channel.

        The prior has to find out that brain token i belongs to image token i. With the small default positions
        attention cannot tell, and for thousands of steps it ignores the brain. One table (S, D) becomes
        learned_query and is added to backbone_linear.bias: a change of initial values, not of structure.
        """
        if self.diffusion_prior is None:
            return
        query, bias = self.diffusion_prior.net.learned_query, self.backbone.backbone_linear.bias
        table = std * torch.randn(query.shape, generator=generator).to(query)  # (S, D)
        query.copy_(table)
        bias.add_(table.flatten())


# ----------------------------------------------------------------------------------------------------------------------
# Losses and MixCo (2.2); in float32 (a GPU: TF32), whatever autocast says: a temperature of .004 makes large logits

@torch.no_grad()
def mixco(
    voxels: Tensor, beta: float = 0.15, s_thresh: float = 0.5, perm: Tensor | None = None,
    betas: Tensor | None = None, select: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mix each selected sample with another one: betas v_i + (1 - betas) v_perm(i).

    voxels (B, ...) of ONE subject, untouched. Returns the mixed voxels (B, ...), perm (B,), betas (B,) in [0, 1] and
    1 where nothing was mixed, select (B,) boolean. Whatever is not given is drawn, in this order.
    """
    count, device = len(voxels), voxels.device
    perm = torch.randperm(count) if perm is None else perm
    betas = torch.distributions.Beta(beta, beta).sample([count]) if betas is None else betas
    select = torch.rand(count) <= s_thresh if select is None else select
    perm, select = (x.to(device, non_blocking=True) for x in (perm, select))  # a step should not wait for the GPU
    betas = betas.to(device, voxels.dtype, non_blocking=True)
    betas = torch.where(select, betas, torch.ones_like(betas))  # (B,)
    weight = betas.view(-1, *[1] * (voxels.ndim - 1))           # (B, 1, ...)
    return voxels * weight + voxels[perm] * (1 - weight), perm, betas, select


def _logits(a: Tensor, b: Tensor, temp: float) -> Tensor:
    """(B, E) and (B', E), unit length -> their cosines over the temperature (B, B'), in float32."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().T / temp


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -sum targets * log softmax(logits): cross-entropy with soft targets."""
    return -(logits.log_softmax(-1) * targets).sum(-1).mean()


def mixco_nce(
    preds: Tensor, targs: Tensor, temp: float, perm: Tensor, betas: Tensor, select: Tensor, original: bool = False,
) -> Tensor:
    """BiMixCo: a mixed sample must be found beta near its own image and 1 - beta near its partner's.

    preds, targs (B, E) of unit length; perm, betas, select (B,) from `mixco`, with perm already counted over the
    whole batch when several subjects are concatenated. Both directions, averaged; returns a scalar.
    """
    rows = torch.arange(len(preds), device=preds.device)
    betas = torch.where(select, betas.float(), 1.0)  # (B,)
    targets = torch.diag(betas)                      # (B, B)
    # Where perm(i) = i the two masses belong on the same image and add up to 1. The original overwrote the first with
    # the second (original=True), and such samples were taught the weight 1 - beta.
    if original:
        targets[rows, perm] = 1 - betas
    else:
        targets[rows, perm] += 1 - betas
    logits = _logits(preds, targs, temp)             # (B, B)
    return (_cross_entropy(logits, targets) + _cross_entropy(logits.T, targets.T)) / 2


def soft_clip_loss(preds: Tensor, targs: Tensor, temp: float) -> Tensor:
    """SoftCLIP: the targets are how much the images resemble each other, softmax(targs targs^T / temp).

    preds, targs (B, E) of unit length; both directions, averaged; returns a scalar.
    """
    targets = _logits(targs, targs, temp).softmax(-1)  # (B, B)
    logits = _logits(preds, targs, temp)               # (B, B)
    return (_cross_entropy(logits, targets) + _cross_entropy(logits.T, targets)) / 2


def soft_contrastive_loss(student: Tensor, teacher: Tensor, teacher_aug: Tensor, temp: float) -> Tensor:
    """SoftCLIP for the low-level features: brain against augmented image as image against augmented image.

    All (B * F, E) of unit length; both directions, averaged; returns a scalar.
    """
    targets = _logits(teacher, teacher_aug, temp)  # (B * F, B * F)
    logits = _logits(student, teacher_aug, temp)   # (B * F, B * F)
    forward = _cross_entropy(logits, targets.softmax(-1))
    return (forward + _cross_entropy(logits.T, targets.T.softmax(-1))) / 2


def cosine_anneal(start: float, end: float, steps: int) -> Tensor:
    """(steps,) values from start to end along half a cosine: the temperatures of the SoftCLIP phase."""
    return end + (start - end) / 2 * (1 + torch.cos(math.pi * torch.arange(steps) / max(steps - 1, 1)))


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer groups

def parameter_groups(model: nn.Module, weight_decay: float = 1e-2) -> list[dict]:
    """AdamW groups in the original's order: ridge | backbone decayed, not | prior decayed, not.

    Parameters named *bias* are not decayed, except in the ridge; gains of norms are, by the original's rule.
    Frozen parameters keep their place, so that optimizer states stay interchangeable; AdamW skips them.
    """
    model = getattr(model, "module", model)
    groups = [{"params": list(model.ridge.parameters()), "weight_decay": weight_decay}]
    for part in (model.backbone, model.diffusion_prior):
        if part is None:
            continue
        named = list(part.named_parameters())
        groups.append({"params": [p for name, p in named if "bias" not in name], "weight_decay": weight_decay})
        groups.append({"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0})
    return groups
