"""The weights behind tests/golden: every tensor follows from its key, its shape and a seed.

The arrays in tests/golden were made by running the original MindEye2 code with these weights, so the weights
themselves need no storing. numpy's legacy generator is frozen for good, so they are the same everywhere.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
EMBEDDINGS = ("learned_query", "null_brain_embeds", "null_image_embed", "null_kv", "relative_attention_bias.weight")


def golden(name: str) -> dict[str, torch.Tensor]:
    """All arrays of tests/golden/NAME.npz as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file}


def golden_json(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_tensor(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Normal numbers seeded by the key: matrices have variance 1 / fan-in, embeddings .25, gains lie near 1."""
    x = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(tuple(shape))
    if key.endswith(EMBEDDINGS):
        x = x * 0.5
    elif len(shape) > 1:
        x = x / np.sqrt(np.prod(shape[1:]))
    else:
        x = 0.1 * x + (not key.endswith(".bias"))
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def load_golden(module: torch.nn.Module, seed: int, prefix: str = "") -> torch.nn.Module:
    """Give a module its golden weights, in eval mode; the noise schedule and rotary frequencies stay its own."""
    state = module.state_dict()
    for key, value in state.items():
        if "noise_scheduler." not in key and not key.endswith("rotary_emb.freqs"):
            state[key] = golden_tensor(prefix + key, value.shape, seed)
    module.load_state_dict(state, strict=True)
    return module.eval()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two tensors of the same shape."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item()
