"""Weights on the disk: the official layout, DeepSpeed's folders, and what the mend is when a file is not right.

In   train_logs/{model_name}/last.pth   model_state_dict, and what a run needs to go on; written by train.py
                            /last/      the same by DeepSpeed, ZeRO stage 1 or 2
Out  a MindEye2 and its constructor arguments (`load_model`); every error is a UserError that names the file and a flag

The sizes of a model are read off its weights; what has no shape (--backbone, --prior) is in the checkpoint's "config".
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from files import is_disk_full, save
from model import MindEye2, UserError, constants


def save_checkpoint(path: str | Path, model: nn.Module, **extra: object) -> None:
    """Write model_state_dict and whatever is in `extra` (epoch, optimizer_state_dict, lr_scheduler, losses, lrs, ...).

    Written beside `path` and renamed, so that an interrupted run leaves the former file whole. Give
    config={"backbone": "mlp", "prior": "correction"} for these: nothing in the weights tells them.
    """
    state = getattr(model, "module", model).state_dict()
    save(path, {"model_state_dict": state, **extra})


@contextmanager
def reading(path: Path, flag: str, must_exist: bool = True) -> Iterator[None]:
    """Turn "not there" and "not readable" into a UserError that names the file and the flag."""
    if must_exist and not path.exists():
        raise UserError(f"{path} does not exist: put it there, or name another place with {flag}.")
    try:
        yield
    except Exception as error:  # a damaged file leads its reader into errors of any type
        if isinstance(error, UserError) or is_disk_full(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{path} cannot be read ({reason}): replace it, or name another with {flag}.") from error


class _TensorsOnly:
    """A pickle module for torch.load that builds tensors and replaces every other object by an empty shell."""
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if (module, name) in {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}:
                return super().find_class(module, name)
            known = {("collections", "OrderedDict"): OrderedDict, ("torch", "Size"): torch.Size}
            # A shell takes what the object would: arguments, a state, the items of a dictionary or list.
            filled_by = ("__init__", "__setstate__", "__setitem__", "append", "extend")
            shell = type(name, (), dict.fromkeys(filled_by, lambda self, *args, **kwargs: None))
            return known.get((module, name), shell)


def torch_load(path: Path, flag: str) -> dict:
    """Read a file of torch.save onto the CPU without running any code that it may hold; memory-mapped if possible."""
    with reading(path, flag):
        options = {"map_location": "cpu", "mmap": zipfile.is_zipfile(path)}
        try:
            return torch.load(path, weights_only=True, **options)
        except pickle.UnpicklingError:  # torch 2.1, which the original used, kept a function in OneCycleLR's state
            if not options["mmap"]:
                raise
            return torch.load(path, weights_only=False, pickle_module=_TensorsOnly, **options)


def _deepspeed_partitions(folder: Path, flag: str) -> list[list[Tensor]]:
    """What each rank of a DeepSpeed run kept of the float32 weights: per rank, one flat vector per parameter group.

    Empty without the ranks' files. Raises UserError when one is missing or damaged, or of ZeRO stage 3.
    """
    ranks, count = {}, 0
    for file in folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"):
        content = torch_load(file, flag)
        with reading(file, flag):
            kept = content["optimizer_state_dict"]
            if kept.get("zero_stage") == 3 or "single_partition_of_fp32_groups" not in kept:
                raise UserError(f"{file} is of ZeRO stage 3, only 1 and 2 can be read: name another with {flag}.")
            counts = kept["partition_count"]  # a list, one number per group, in some versions
            count = max(count, *counts) if isinstance(counts, list | tuple) else max(count, counts)
            ranks[int(re.search(r"rank_(\d+)", file.name)[1])] = kept["single_partition_of_fp32_groups"]
    for rank in range(count):
        if rank not in ranks:
            file = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            raise UserError(f"{file} does not exist: put all {count} ranks' files there, or name another with {flag}.")
    return [ranks[rank] for rank in range(count)]


def _join_partitions(groups: list[dict[str, torch.Size]], ranks: list[list[Tensor]]) -> dict[str, Tensor]:
    """The named float32 weights: each group's vector, cut in the order of its shapes. Raises ValueError."""
    state = {}
    if any(len(vectors) != len(groups) for vectors in ranks):
        raise ValueError(f"its {len(groups)} parameter groups are not those of the ranks' files")
    for i, shapes in enumerate(groups):
        flat = torch.cat([vectors[i] for vectors in ranks])  # (numbers of the group,)
        sizes = [math.prod(shape) for shape in shapes.values()]
        padding = len(flat) - sum(sizes)  # DeepSpeed fills up to a multiple of twice the ranks
        if not 0 <= padding < 2 * len(ranks):
            raise ValueError(f"its weights have {sum(sizes)} numbers in a group, the ranks' files {len(flat)}")
        weights = flat.split([*sizes, padding])[:-1]
        state |= {name: w.view(shape) for (name, shape), w in zip(shapes.items(), weights, strict=True)}
    return state


def _load_deepspeed(folder: Path, flag: str) -> dict:
    """A checkpoint folder of DeepSpeed's ZeRO, stage 1 or 2: {"model_state_dict": ...}, without DeepSpeed.

    The model's file holds half weights. The float32 ones that were trained lie in the ranks' files: per parameter
    group one vector, cut into as many pieces as there are ranks. Without those files the half weights are returned.
    Raises UserError when a file is missing, damaged, of stage 3, or when the sizes do not add up.
    """
    file = folder / "mp_rank_00_model_states.pt"
    if not file.exists() and any(folder.glob("zero_pp_rank_*_model_states.pt")):
        raise UserError(f"{folder} is of ZeRO stage 3, only 1 and 2 can be read: name another with {flag}.")
    content, ranks = torch_load(file, flag), _deepspeed_partitions(folder, flag)
    with reading(file, flag):
        state = dict(content["module"])
        if ranks:
            state |= _join_partitions(content["param_shapes"], ranks)
        state |= content.get("frozen_param_fragments") or {}
        # Of several names for one parameter, the vectors hold only one.
        state |= {alias: state[name] for alias, name in (content.get("shared_params") or {}).items()}
    return {"model_state_dict": state, "config": content.get("run", {}).get("config", {})}


def load_checkpoint(path: str | Path, flag: str = "--model_name") -> dict:
    """Read a checkpoint: a `last.pth` file or the folder train_logs/NAME that holds it; half tensors become float32.

    In place of last.pth there may be `last/`, a folder of DeepSpeed's (`_load_deepspeed`), which `path` may also name
    itself. Raises UserError, which names `flag`, when it is missing, truncated, or no checkpoint.
    """
    path = Path(path)
    if not any(path.glob("*_states.pt")) and (path.is_dir() or not path.suffix):
        path = path / "last.pth"
    folder = path if path.is_dir() else path.with_suffix("")
    deepspeed = not path.is_file() and folder.is_dir()
    checkpoint = _load_deepspeed(folder, flag) if deepspeed else torch_load(path, flag)
    if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint (it has no model_state_dict): name another with {flag}.")
    with reading(path, flag, must_exist=False):
        state = checkpoint["model_state_dict"]
        full = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        halves = {k: v for k, v in state.items() if v.dtype in (torch.float16, torch.bfloat16)}
        checkpoint["model_state_dict"] = full | constants(halves)
    return checkpoint


def load_model(path: str | Path, flag: str = "--model_name") -> tuple[MindEye2, dict]:
    """A checkpoint's model and its constructor arguments. Raises UserError unless it is a whole and finite MindEye2."""
    checkpoint = load_checkpoint(path, flag)
    with reading(Path(path), flag, must_exist=False):
        state = checkpoint["model_state_dict"]
        config = config_from_state_dict(state) | checkpoint.get("config", {})
        with torch.device("meta"):  # 2 billion first values, soon overwritten, would take half a minute
            model = MindEye2(**config)
        model.load_state_dict(state, assign=True)
        if not all(math.isfinite(x.sum()) for x in state.values()):  # one pass, and no copy of a weight of 7 GB
            raise ValueError("NaN or infinite weights")
    return model, config


def config_from_state_dict(state: dict[str, Tensor]) -> dict:
    """The constructor arguments of MindEye2, read off the shapes of its state dict.

    The kind of backbone, and what the prior predicts, have no shape: `load_model` takes them from the checkpoint's
    "config". Raises KeyError for another network.
    """
    def count(prefix: str, suffix: str) -> int:
        return sum(name.startswith(prefix) and name.endswith(suffix) for name in state)

    ridge, prior = "ridge.linears.", "diffusion_prior.net.causal_transformer.layers."
    emb_dim = len(state["backbone.clip_proj.8.bias"])
    config = {
        "num_voxels": [state[f"{ridge}{i}.weight"].shape[1] for i in range(count(ridge, ".weight"))],
        "hidden_dim": state["backbone.backbone_linear.weight"].shape[1],
        "n_blocks": count("backbone.mixer_blocks1.", ".1.3.weight"),
        "clip_seq_dim": len(state["backbone.backbone_linear.bias"]) // emb_dim,
        "clip_emb_dim": emb_dim,
        "blurry_recon": "backbone.blin1.bias" in state,
        "use_prior": "diffusion_prior.net.learned_query" in state,
        "backbone": "released",
        "ridge": "mlp" if "ridge.bends.0.0.weight" in state else "linear",
        "prior": "target",
        "lora_rank": len(state.get("backbone.backbone_linear.down", ())),
    }
    if config["blurry_recon"]:
        config["latent_size"] = 4 * math.isqrt(len(state["backbone.blin1.bias"]) // 64)
    if config["use_prior"]:
        config["prior_depth"] = count(prior, ".0.null_kv")
        config["prior_dim_head"] = state[prior + "0.0.null_kv"].shape[1]
        config["prior_timesteps"] = len(state["diffusion_prior.noise_scheduler.betas"])
    return config


def load_pretrained(model: MindEye2, state: dict[str, Tensor]) -> None:
    """The fine-tuning start (2.1): backbone and prior of a multi-subject model, a fresh ridge for the new subject.

    All of the ridge is left alone; the original kept the weight but took over another subject's bias. Heads that
    only the pretrained model has are dropped. Raises UserError when the sizes differ or a head is missing.
    """
    own, theirs = config_from_state_dict(model.state_dict()), config_from_state_dict(state)
    if theirs["lora_rank"]:
        raise UserError("the pretrained model was itself fine-tuned with low-rank adapters: start from the one that it "
                        "started from.")
    for name, value in own.items():
        if name in ("num_voxels", "backbone", "prior") or theirs.get(name) == value or value is False:
            continue
        if value is True:
            raise UserError(f"the pretrained model has no {name} part, this one does: pass --no-{name}.")
        mend = f"--{name} {theirs[name]}"
        if name in ("clip_seq_dim", "clip_emb_dim", "latent_size"):
            mend = "the --cache_dir that holds its CLIP and VAE"
        raise UserError(f"the pretrained model has {name} {theirs[name]}, this one {value}: pass {mend}.")
    for part in ("backbone", "diffusion_prior"):
        module = getattr(model, part)
        if module is not None:
            module.load_state_dict({name: state[f"{part}.{name}"] for name in module.state_dict()})
