"""What the judges said, kept on disk: a second evaluation of the same pictures takes seconds.

    {evals}/features/{network}.json                      what the network is, and of which files
                    /seen/{network}-{hash}.pt            {feature: (n, F)} of the images seen, for all models
                    /{model}/{set}/{network}-{hash}.pt   the same of a model's pictures or captions
                    /{model}/{set}/{metric}-{hash}.pt    (n,) scores

The hash is of the network's files (place, size, time of change) and of the pictures themselves: what was kept of
another network in --cache_dir, or of other pictures, is never used. All of it may be deleted at any time.
"""

import argparse
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm

import frozen
from files import replacing, save
from model import UserError

VERSION = 1  # part of every hash: raise it when the code that makes features or scores changes
NO_NETWORKS = {"evals", "train_logs", "targets", "wds", "tables", ".git", ".venv"}  # may lie beside them, and hold none


def digest(*parts: object) -> str:
    return hashlib.sha1(json.dumps([VERSION, *parts], default=str).encode()).hexdigest()[:16]


def identified(items: Tensor | list[str]) -> SimpleNamespace:
    """Pictures or texts as .items, and their .hash, by which what networks say of them is kept."""
    content = items.contiguous().numpy() if isinstance(items, Tensor) else json.dumps(items).encode()
    return SimpleNamespace(items=items, hash=hashlib.sha1(content).hexdigest())


def file_stamp(path: Path) -> tuple:
    return (str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else (str(path),)


def folder_stamp(folder: str | Path, leave_out: Path) -> str:
    """A hash of the files in the networks' folder, four levels deep, so that any change shows; without leave_out."""
    entries = []
    for place, folders, files in os.walk(folder, followlinks=True):
        deep = len(Path(place).relative_to(folder).parts) >= 4
        folders[:] = [] if deep else sorted(name for name in folders if name not in NO_NETWORKS
                                            and Path(place, name).resolve() != leave_out.resolve())
        entries += [file_stamp(Path(place) / name) for name in sorted(files)]
    return digest(entries)


def kept(folder: Path, name: str, key: str, compute: Callable[[], object]) -> object:
    """compute(), or what an earlier call kept of it; what was kept under the same name and another key is deleted.

    Except in "seen": another model, of another subject, may need it.
    """
    path = folder / f"{name}-{key}.pt"
    if path.exists():
        try:
            return torch.load(path, weights_only=True, mmap=True)
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
            pass  # cut short: make it again
    value = compute()
    save(path, value)
    for old in folder.glob(f"{name}-*.pt"):
        if old != path and folder.name != "seen":
            old.unlink()
    return value


def encode_all(
    encode: Callable, items: Tensor | list[str], batch_size: int, device: str, label: str
) -> dict[str, Tensor]:
    """encode(a batch) -> {feature: (B, ..)}, for all batches: {feature: (n, ..)}, on the CPU. Raises UserError for NaN.

    Features of more than 16,384 numbers are kept as float16: 1000 pictures have .7 GB of AlexNet(2) in float32.
    """
    out = {}
    for first in tqdm(range(0, len(items), batch_size), desc=label, unit="batch", leave=False, delay=2):
        batch = items[first : first + batch_size]
        for feature, values in encode(batch.to(device) if isinstance(batch, Tensor) else batch).items():
            dtype = torch.half if values[0].numel() > 2**14 else torch.float
            out.setdefault(feature, []).append(values.to("cpu", dtype))
    out = {feature: torch.cat(parts) for feature, parts in out.items()}
    if not all(torch.isfinite(values).all() for values in out.values()):
        raise UserError(f"network {label} says NaN or more than float16 holds: replace its files in --cache_dir.")
    return out


@torch.no_grad()
def hear(args: argparse.Namespace, name: str, load: Callable, encode: Callable, sets: dict) -> SimpleNamespace:
    """What a network says of each of `sets` {label: identified pictures or texts}.

    load() -> a network with .description and .files, or raises Missing; encode(network, batch) -> {feature: (B, ..)}.
    Returns .features {label: {feature: (n, ..)}}, .description, and .key, a hash of the network's files. The network
    is loaded once, and not at all if nothing in --cache_dir changed and everything was kept.
    """
    name += "_antialias" if args.antialias else ""
    root, network = Path(args.evals) / "features", None
    note = root / f"{name}.json"
    known = json.loads(note.read_text()) if note.exists() else {}
    stamp = folder_stamp(args.cache_dir, leave_out=Path(args.evals))
    if known.get("stamp") != stamp:
        network = load()
        known = {"stamp": stamp, "description": network.description,
                 "key": digest(name, [file_stamp(Path(file)) for file in network.files])}
        with replacing(note) as temporary:
            temporary.write_text(json.dumps(known))

    def say(items: Tensor | list[str]) -> dict[str, Tensor]:
        nonlocal network
        network = network or load()
        return encode_all(partial(encode, network), items, args.batch_size, args.device, name)

    features = {label: kept(root / ("seen" if label == "seen" else f"{args.model_name}/{label}"), name,
                            digest(known["key"], part.hash), partial(say, part.items))
                for label, part in sets.items()}
    network = None
    frozen.free_memory()
    return SimpleNamespace(features=features, description=known["description"], key=known["key"])
