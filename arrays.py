"""Tensors and texts that one stage wrote for another, or the release holds: read, and never trusted.

A file of torch.save is a pickle, a program that says how to build its content; PyTorch's reader of weights builds
tensors, numbers, strings and lists of them, and refuses all else. Here, numpy's arrays of strings are allowed as well.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import UserError


def is_whole(x: Tensor) -> bool:
    """Whether a file's tensor is dense, real, and has all of its numbers in the file: one repeated fills any memory."""
    plain = x.device.type == "cpu" and x.layout == torch.strided and not x.is_complex() and not x.is_quantized
    return plain and x.numel() * x.element_size() <= x.untyped_storage().nbytes()


def load_array(path: Path, mend: str) -> Tensor | np.ndarray | list | dict:
    """What a file of torch.save holds: a tensor, strings as a list or numpy array (the original's), or a dict of these.

    Only these are built: whatever else a file may ask to run is refused. Raises UserError, whose end is `mend`.
    """
    core = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    allowed = [np.ndarray, np.dtype, np.str_, type(np.dtype("U1")), type(np.dtype("O"))]
    for name in ("_reconstruct", "scalar"):  # numpy 2 renamed the module that files name
        allowed += [(getattr(core, name), f"numpy.{module}.multiarray.{name}") for module in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file leads its reader into errors of any type
        raise UserError(f"{path} cannot be read ({type(error).__name__}): {mend}") from None
    for x in content.values() if isinstance(content, dict) else [content]:
        if isinstance(x, Tensor) and not is_whole(x):
            raise UserError(f"{path} cannot be read (a tensor that is sparse, complex, or without its numbers): {mend}")
    return content


def load_texts(path: Path, mend: str) -> list[str]:
    """The strings of a file of torch.save. Raises UserError, whose end is `mend`."""
    texts = load_array(path, mend)
    texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path} does not hold an array or a list of texts: {mend}")
    return [text.encode("utf-8", "replace").decode() for text in texts]  # no halves of a character; not numpy's str


def load_scores(path: Path, mend: str) -> dict[str, Tensor]:
    """{model}_scores.pt: {row: (n,)}. Raises UserError, whose end is `mend`."""
    scores = load_array(path, mend)
    if not isinstance(scores, dict) or not all(isinstance(x, Tensor) and x.ndim == 1 for x in scores.values()):
        raise UserError(f"{path} does not hold a number for each image and row: {mend}")
    return scores
