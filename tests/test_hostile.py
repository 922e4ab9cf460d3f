"""Damaged, foreign and malicious files, one a case: a sentence that names the file and what helps, and nothing written.

Each case gets its own copy of the smoke world, of a tiny model and of what it drew; files are shared by hard links, so
a damage never writes into a file, it puts another in its place.

    python -m pytest tests/test_hostile.py
"""

import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_nsd import VERSION, make_raw  # noqa: E402
from test_refine import UNET  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import judges  # noqa: E402
import model as m  # noqa: E402
import recon  # noqa: E402
import refine  # noqa: E402
import report  # noqa: E402
import train  # noqa: E402
import unclip  # noqa: E402

NAME = "tiny"
LAST, EVALS = f"logs/{NAME}/last.pth", f"evals/{NAME}/{NAME}"
SIZES = "--hidden_dim=16 --prior_depth=1 --prior_dim_head=16".split()
FAST = "--scheduler=dpm --steps=2 --guidance=1".split()


# ---- the world, and a copy of it

def make_shared(smoke_world: Path, folder: Path) -> None:
    """data/, raw/, logs/tiny and evals/tiny as the stages leave them."""
    shutil.copytree(smoke_world, folder / "data")
    make_raw(folder / "raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_samples", lambda *_: None)
        patch.setattr(train, "save_curves", lambda *_: None)
        train.main([*arguments(TRAIN, folder), *SIZES])
    recon.main(arguments([*RECON, "--prior_steps=2"], folder))
    pictures = torch.load(out(folder, "recons"), weights_only=True)
    torch.save(pictures, out(folder, "enhancedrecons"))
    scores = {"recons/pixcorr": torch.rand(len(pictures))}
    torch.save(scores, folder / f"evals/{NAME}/{NAME}_scores.pt")
    row = {"key": "recons/pixcorr", "pictures": "recons", "metric": "pixcorr", "title": "PixCorr", "group": "pixels",
           "value": .5, "low": .4, "high": .6, "better": "higher", "judge": "", "paper_40": .3, "paper_1": None}
    (folder / f"evals/{NAME}/{NAME}_metrics.json").write_text(json.dumps({"rows": [row]}))
    config = UNET | {"class_embed_type": "projection", "cross_attention_dim": 64, "addition_embed_type": None,
                     "projection_class_embeddings_input_dim": 16}
    (folder / "tiny.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def shared(smoke_world, tmp_path_factory):
    """`make_shared`'s folder; its files must never change."""
    folder = tmp_path_factory.mktemp("hostile")
    make_shared(smoke_world, folder)
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before


def out(folder: Path, name: str) -> Path:
    return folder / f"evals/{NAME}/{NAME}_all_{name}.pt"


def snapshot(folder: Path) -> dict[str, tuple]:
    """{every file and folder below: what changes with a file}."""
    found = {str(path.relative_to(folder)): (path.is_dir(), path.stat()) for path in folder.rglob("*")}
    return {name: () if is_folder else (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            for name, (is_folder, stat) in found.items()}


def arguments(words: list[str], folder: Path) -> list[str]:
    return [word.replace("{}", str(folder)) for word in words]


PLACES = ["--data_path={}/data", f"--model_name={NAME}"]
TRAIN = [*PLACES, "--train_logs={}/logs", "--num_epochs=1", "--batch_size=8", "--teacher_views=1", "--no-blurry_recon"]
RECON = [*PLACES, "--train_logs={}/logs", "--evals={}/evals", "--no-blurry_recon", *FAST]
REFINE = [*PLACES, "--evals={}/evals", "--steps=2"]
EVALUATE = [*PLACES, "--evals={}/evals", "--tables={}/tables", "--train_logs={}/logs"]
REPORT = EVALUATE
UNCLIP = ["--data_path={}/data", "--train_logs={}/logs", "--model_name=decoder", "--num_steps=1", "--batch_size=2",
          "--num_val=4", "--num_eval=0", *FAST]
TUNE = [*[word for word in TRAIN if "model_name" not in word], "--model_name=tuned",
        f"--multisubject_ckpt={{}}/{LAST}"]
RESUME = [*TRAIN, *SIZES, "--resume"]
COMPARE = ["--evals={}/evals", "--compare", NAME, NAME]
CHECK = ["check", "--data_path={}/data", "--subjects=1"]
PREPARE = ["prepare", "--nsd_path={}/raw", "--data_path={}/made"]


# ---- damages: each returns a function of the copy's folder

class Bomb:
    """Whoever unpickles it makes the file `ran`."""
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def content(place: str, what: bytes) -> Callable:
    return lambda folder: put(folder / place, what)


def empty(place: str) -> Callable:
    return content(place, b"")


def cut(place: str) -> Callable:
    return lambda folder: put(folder / place, (folder / place).read_bytes()[: (folder / place).stat().st_size // 2])


def nothing(folder: Path) -> None:
    """The file was never there."""


def gone(place: str) -> Callable:
    return lambda folder: (folder / place).unlink()


def is_folder(place: str) -> Callable:
    return lambda folder: ((folder / place).unlink(), (folder / place).mkdir())


def h5(place: str, name: str, value, **options) -> Callable:
    def damage(folder: Path) -> None:
        (folder / place).unlink()
        with h5py.File(folder / place, "w") as file:
            file.create_dataset(name, data=value, **options)
    return damage


def edit(place: str, change: Callable[[h5py.File], object]) -> Callable:
    """A changed copy of an HDF5 file."""
    def damage(folder: Path) -> None:
        put(folder / place, (folder / place).read_bytes())
        with h5py.File(folder / place, "r+") as file:
            change(file)
    return damage


def replaced(name: str, value: Callable) -> Callable:
    """For `edit`: another dataset in place of `name`, made of the old one's values."""
    def change(file: h5py.File) -> None:
        old = file[name][:]
        del file[name]
        file[name] = value(old)
    return change


def bad_checksum(name: str) -> Callable:
    """For `content`-like use: an HDF5 file whose data have a checksum and one flipped byte."""
    def damage(folder: Path) -> None:
        path = folder / name
        with h5py.File(path, "r") as file:
            key = next(iter(file))
            values = file[key][:]
        path.unlink()
        with h5py.File(path, "w") as file:
            rows = file.create_dataset(key, data=values, chunks=values.shape, fletcher32=True)
            start = rows.id.get_chunk_info(0).byte_offset
        raw = bytearray(path.read_bytes())
        raw[start + 8] ^= 255
        path.write_bytes(bytes(raw))
    return damage


def saved(place: str, value) -> Callable:
    """torch.save(value, or value(what is in the file), or a bomb where value is Bomb)."""
    def damage(folder: Path) -> None:
        path, made = folder / place, value
        if value is Bomb:
            made = {"model_state_dict": {"a": torch.ones(1)}, "more": [Bomb(folder / "ran")]}
        elif callable(value):
            made = value(torch.load(path, weights_only=False))
        path.unlink(missing_ok=True)
        torch.save(made, path)
    return damage


def pickled(place: str) -> Callable:
    """A plain pickle, as torch.save wrote before its zip files."""
    return lambda folder: put(folder / place, pickle.dumps(Bomb(folder / "ran"), protocol=2))


def changed(name: str, value) -> Callable:
    """For `saved`: a checkpoint with another value under `name`."""
    return lambda checkpoint: checkpoint | {name: value}


def weights(change: Callable[[dict], dict]) -> Callable:
    return lambda checkpoint: checkpoint | {"model_state_dict": change(checkpoint["model_state_dict"])}


def without(*names: str) -> Callable:
    return lambda kept: {name: value for name, value in kept.items() if name not in names}


def tar(place: str, change: Callable[[list], list]) -> Callable:
    """Another tar in place of this one, of change([(name, bytes), ..])."""
    def damage(folder: Path) -> None:
        path, members = folder / place, []
        if path.exists():
            with tarfile.open(path) as old:
                members = [(member.name, old.extractfile(member).read()) for member in old]
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as new:
            for name, what in change(members):
                header = tarfile.TarInfo(name)
                header.size = len(what)
                new.addfile(header, io.BytesIO(what))
    return damage


def npy(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def behav(change: Callable[[np.ndarray], np.ndarray]) -> Callable:
    """For `tar`: another first row of behav."""
    def first(members: list) -> list:
        at = next(i for i, (name, _) in enumerate(members) if name.endswith(".behav.npy"))
        name, old = members[at]
        return [*members[:at], (name, npy(change(np.load(io.BytesIO(old))))), *members[at + 1 :]]
    return first


def column(number: int, value: float) -> Callable:
    def change(row: np.ndarray) -> np.ndarray:
        row.reshape(-1)[number] = value
        return row
    return behav(change)


def renamed(old: str, new: str) -> Callable:
    return lambda members: [(name.replace(old, new), what) for name, what in members]


def copied(source: str, target: str) -> Callable:
    return lambda folder: put(folder / target, (folder / source).read_bytes())


def jpeg(side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def huge_png() -> bytes:
    """200,000 x 200,000 pixels, says its header."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(chunk) - 4) + chunk
                                          + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)


def pictures(*more: tuple[str, bytes]) -> Callable:
    """A tar of six pictures, and of more members."""
    return tar("shards/0.tar", lambda _: [*((f"{i}.jpg", jpeg()) for i in range(6)), *more])


def both(*damages: Callable) -> Callable:
    return lambda folder: [damage(folder) for damage in damages]


# ---- the table

class Case(NamedTuple):
    name: str
    stage: object
    argv: list[str]
    damage: Callable[[Path], object]
    words: tuple  # that the sentence must hold: the file, and a flag or a command that helps
    written: tuple = ()  # what may be new: the stage's own output of before the file was read


BETAS, IMAGES = "data/betas_all_subj01_fp32_renorm.hdf5", "data/coco_images_224_float16.hdf5"
MASKS, TAR, TEST = "data/brain_region_masks.hdf5", "data/wds/subj01/train/0.tar", "data/wds/subj01/new_test/0.tar"
SHARDS = [*UNCLIP, "--images={}/shards/0.tar", "--resolution=64", "--base={}/tiny.json", "--vae={}/data/vae"]
CASES = []


def add(stage, argv: list[str], file: str, helps: str, damages: dict[str, Callable], written: tuple = (),
        title: str = "") -> None:
    for name, damage in damages.items():
        name = f"{title or stage.__name__}: {Path(file).name} {name}"
        CASES.append(Case(name, stage, argv, damage, (file, helps), written))


def spoilt(place: str) -> dict[str, Callable]:
    """What can happen to any file."""
    return {"of 0 bytes": empty(place), "cut": cut(place), "of text": content(place, b"<html>404 not found</html>\n"),
            "as a folder": is_folder(place)}


BIG = np.ones((4, 60), np.float32)
add(train, TRAIN, BETAS, "--data_path", spoilt(BETAS) | {
    "missing": gone(BETAS),
    "without its key": h5(BETAS, "voxels", BIG),
    "of too few rows": h5(BETAS, "betas", BIG),
    "of one dimension": h5(BETAS, "betas", BIG[0]),
    "of three dimensions": h5(BETAS, "betas", BIG[None]),
    "of no voxels": h5(BETAS, "betas", np.ones((60, 0), np.float32)),
    "of integers": edit(BETAS, replaced("betas", lambda x: x.astype(np.int32))),
    "of strings": h5(BETAS, "betas", np.full((60, 60), b"1.5")),
    "of pairs": h5(BETAS, "betas", np.zeros((60, 60), [("a", "f4"), ("b", "f4")])),
    "with a group for its key": h5(BETAS, "betas/betas", BIG),
    "with a link to nowhere": edit(BETAS, lambda file: (file.pop("betas"), file.__setitem__(
        "betas", h5py.ExternalLink("/nowhere.hdf5", "betas")))),
    "of NaN": edit(BETAS, lambda file: file["betas"].__setitem__(slice(None), np.nan)),
    "of values beyond float16": edit(BETAS, lambda file: file["betas"].__setitem__(slice(None), 1e30)),
    "with a flipped bit": bad_checksum(BETAS),
})
add(train, TRAIN, IMAGES, "--data_path", spoilt(IMAGES) | {
    "missing": gone(IMAGES),
    "without its key": h5(IMAGES, "pictures", np.zeros((200, 3, 8, 8), np.float16)),
    "of bytes": h5(IMAGES, "images", np.zeros((200, 3, 64, 64), np.uint8)),
    "of channels last": h5(IMAGES, "images", np.zeros((200, 64, 64, 3), np.float16)),
    "of one dimension": h5(IMAGES, "images", np.zeros(200, np.float16)),
    "not square": h5(IMAGES, "images", np.zeros((200, 3, 64, 32), np.float16)),
    "of too few pictures": h5(IMAGES, "images", np.full((3, 3, 64, 64), .5, np.float16)),
    "of no pictures": h5(IMAGES, "images", np.zeros((0, 3, 64, 64), np.float16)),
    "with a group for its key": h5(IMAGES, "images/images", BIG),
    "of NaN": edit(IMAGES, lambda file: file["images"].__setitem__(slice(None), np.nan)),
    "of infinity": edit(IMAGES, lambda file: file["images"].__setitem__(slice(None), np.inf)),
    "with a flipped bit": bad_checksum(IMAGES),
})
add(train, TRAIN, TAR, "--data_path", spoilt(TAR) | {
    "of no members": tar(TAR, lambda members: []),
    "with ../ names": tar(TAR, renamed("sample", "../../sample")),
    "with absolute names": lambda folder: tar(TAR, renamed("sample", f"{folder.parent}/sample"))(folder),
    "with a member twice": tar(TAR, lambda members: [members[0], *members]),
    "without behav": tar(TAR, renamed(".behav.npy", ".behave.npy")),
    "with a behav of 16 columns": tar(TAR, behav(lambda row: row[..., :16])),
    "with a behav of strings": tar(TAR, behav(lambda row: row.astype("U9"))),
    "with a behav of complex numbers": tar(TAR, behav(lambda row: row.astype(complex))),
    "with a behav of objects": tar(TAR, lambda members: [
        (name, npy(np.array([Bomb(Path("ran"))] * 17, object))) for name, _ in members]),
    "with a behav of no bytes": tar(TAR, lambda members: [(name, b"") for name, _ in members]),
    "with image -1": tar(TAR, column(0, -1)),
    "with betas row -1": tar(TAR, column(5, -1)),
    "with session -1": tar(TAR, column(2, -1)),
    "with image NaN": tar(TAR, column(0, np.nan)),
    "with image 3.5": tar(TAR, column(0, 3.5)),
    "with image 1e300": tar(TAR, column(0, 1e300)),
    "with betas row 1e300": tar(TAR, column(5, 1e300)),
    "with a betas row twice": tar(TAR, lambda members: [*members, *renamed("sample0", "sample9")(members[:4])]),
})
add(train, TRAIN, BETAS, "--data_path", {"has no row for a trial": tar(TAR, column(5, 9999))})
add(train, TRAIN, IMAGES, "--data_path", {"has no image for a trial": tar(TAR, column(0, 9999))})
add(train, [*TRAIN, "--num_sessions=2"], "train/1.tar", "--data_path", {
    "is session 0 again": copied(TAR, TAR.replace("0.tar", "1.tar")),
})
add(train, [*TRAIN, "--num_sessions=2"], "wds/subj01/train", "--num_sessions", {
    "has a name of other digits": both(gone(TAR.replace("0.tar", "1.tar")), copied(TAR, TAR.replace("0.tar", "².tar"))),
})
add(train, TRAIN, "data/clip", "--cache_dir", {
    "of a config that is a list": content("data/clip/open_clip_config.json", b"[1, 2]"),
    "of an empty config": empty("data/clip/open_clip_config.json"),
    "of cut weights": cut("data/clip/open_clip_model.safetensors"),
    "of weights that run code": both(gone("data/clip/open_clip_model.safetensors"),
                                     saved("data/clip/open_clip_pytorch_model.bin", Bomb)),
})
for part in ("vae", "teacher"):
    file = next(path for path in ("diffusion_pytorch_model", "model") if (path == "model") == (part == "teacher"))
    old = {"vae": "diffusion_pytorch_model.bin", "teacher": "pytorch_model.bin"}[part]
    add(train, [*TRAIN, "--blurry_recon"], f"data/{part}", "--cache_dir", {
        "of an empty config": empty(f"data/{part}/config.json"),
        "of a config that is a list": content(f"data/{part}/config.json", b"[1, 2]"),
        "of cut weights": cut(f"data/{part}/{file}.safetensors"),
        "of weights that run code": both(gone(f"data/{part}/{file}.safetensors"), saved(f"data/{part}/{old}", Bomb)),
    })


def checkpoints(last: str) -> dict[str, Callable]:
    return spoilt(last) | {
        "that runs code": saved(last, Bomb),
        "that runs code, an old pickle": pickled(last),
        "of a list": saved(last, [1, 2]),
        "without weights": saved(last, {"epoch": 1}),
        "of weights in a list": saved(last, changed("model_state_dict", [1, 2])),
        "of weights that are no tensors": saved(last, weights(lambda state: dict.fromkeys(state, "1"))),
        "of another network": saved(last, weights(lambda state: {"conv.weight": torch.ones(3, 3)})),
        "without a layer": saved(last, weights(without("backbone.clip_proj.0.weight"))),
        "of a layer of another shape": saved(last, weights(
            lambda state: state | {"backbone.clip_proj.0.weight": torch.ones(5)})),
        "of a backbone of one dimension": saved(last, weights(
            lambda state: state | {"backbone.backbone_linear.weight": torch.ones(5)})),
        "of a head of no dimension": saved(last, weights(
            lambda state: state | {"backbone.clip_proj.8.bias": torch.tensor(1.)})),
        "of a head of no channels": saved(last, weights(
            lambda state: state | {"backbone.clip_proj.8.bias": torch.ones(0)})),
        "of NaN": saved(last, weights(lambda state: {name: x * torch.nan for name, x in state.items()})),
        "of an unknown backbone": saved(last, changed("config", {"backbone": "transformer"})),
        "of an unknown config": saved(last, changed("config", {"colour": "red"})),
        "of a config that is a list": saved(last, changed("config", [1])),
    }


add(train, TUNE, LAST, "--multisubject_ckpt", checkpoints(LAST) | {"missing": gone(LAST)}, title="train, from")
add(recon, RECON, LAST, "--model_name", checkpoints(LAST) | {
    "of two brains of that size": saved(LAST, weights(lambda state: state | {
        name.replace("linears.0", "linears.1"): x for name, x in state.items() if name.startswith("ridge")})),
})
add(train, RESUME, LAST, "--model_name", spoilt(LAST) | {
    "that runs code": saved(LAST, Bomb),
    "that runs code, an old pickle": pickled(LAST),
    "of a list": saved(LAST, [1, 2]),
    "without weights": saved(LAST, without("model_state_dict")),
    "without an optimizer": saved(LAST, without("optimizer_state_dict")),
    "of another network": saved(LAST, weights(lambda state: {"conv.weight": torch.ones(3, 3)})),
    "of an optimizer in a list": saved(LAST, changed("optimizer_state_dict", [1])),
    "of an optimizer without groups": saved(LAST, changed("optimizer_state_dict", {"state": {}, "param_groups": []})),
    "of flags in a list": saved(LAST, changed("flags", ["--seed=1"])),
    "of a step in words": saved(LAST, changed("step", "three")),
    "of a step before the first": saved(LAST, changed("step", -5)),
    "of losses in words": saved(LAST, changed("train_losses", ["high"])),
    "of a history in a list": saved(LAST, changed("history", [1, 2])),
    "of a schedule in a list": saved(LAST, changed("lr_scheduler", [1, 2])),
    "of fewer losses than steps": saved(LAST, changed("train_losses", [])),
}, title="train --resume")

add(recon, RECON, TEST, "--data_path", {
    "cut": cut(TEST), "with image -1": tar(TEST, column(0, -1)), "with a behav of strings": tar(
        TEST, behav(lambda row: row.astype("U9")))})
add(recon, RECON, BETAS, "--data_path", {"of one dimension": h5(BETAS, "betas", BIG[0]), "cut": cut(BETAS),
                                         "has no row for a trial": tar(TEST, column(5, 9999))})
add(recon, RECON, IMAGES, "--data_path", {"has no image for a trial": tar(TEST, column(0, 9999)),
                                          "of 0 bytes": empty(IMAGES)})
add(recon, [*RECON, "--stimulate", "V1"], MASKS, "--data_path", spoilt(MASKS) | {
    "missing": gone(MASKS),
    "without the subject": edit(MASKS, lambda file: file.pop("subj01")),
    "of another length": edit(MASKS, replaced("subj01/V1", lambda mask: mask[:-1])),
    "of two dimensions": edit(MASKS, replaced("subj01/V1", lambda mask: mask[None])),
    "of strings": edit(MASKS, replaced("subj01/V1", lambda mask: [b"yes"] * len(mask))),
    "of a group for a region": edit(MASKS, lambda file: (file.pop("subj01/V1"), file.create_group("subj01/V1"))),
    "of a dataset for the subject": edit(MASKS, lambda file: (file.pop("subj01"), file.__setitem__("subj01", [1]))),
})
add(recon, RECON, "data/unclip", "--unclip", {
    "of an empty config": empty("data/unclip/unet/config.json"),
    "of a config that is a list": content("data/unclip/unet/config.json", b"[1, 2]"),
    "of a scheduler that is a list": content("data/unclip/scheduler/scheduler_config.json", b"[1, 2]"),
})
add(recon, RECON, "data/bigG_to_L_epoch8.pth", "--cache_dir", {
    "that runs code": saved("data/bigG_to_L_epoch8.pth", Bomb), "cut": cut("data/bigG_to_L_epoch8.pth"),
    "of a list": saved("data/bigG_to_L_epoch8.pth", [1])}, (f"{EVALS}_parts",))
add(recon, RECON, "brain_00000.pt", "_parts", {"of an interrupted run, cut": lambda folder: interrupted(folder, cut),
    "of an interrupted run, that runs code": lambda folder: interrupted(folder, lambda place: saved(place, Bomb))},
    (f"{EVALS}_parts",))


def tensors(place: str) -> dict[str, Callable]:
    return {"of 0 bytes": empty(place), "cut": cut(place), "of text": content(place, b"<html>404</html>"),
            "that runs code": saved(place, Bomb), "that runs code, an old pickle": pickled(place),
            "of a list": saved(place, [1, 2]), "of a dictionary": saved(place, {"a": torch.ones(3)}),
            "of no dimension": saved(place, torch.tensor(1.)), "of no rows": saved(place, lambda x: x[:0]),
            "of too many rows": saved(place, lambda x: torch.cat((x, x))),
            "of complex numbers": saved(place, lambda x: x.float() + 1j),
            "of a sparse tensor": saved(place, lambda x: x.float().to_sparse()),
            "of a tensor without values": saved(place, lambda x: x.to("meta")),
            "of one number said to be many": saved(place, torch.ones(1).expand(12, 3, 10**6, 10**6))}  # 144 TB


RECONS, CAPTIONS = f"{EVALS}_all_recons.pt", f"{EVALS}_all_predcaptions.pt"
add(refine, REFINE, RECONS, "recon.py", tensors(RECONS) | {
    "of one channel": saved(RECONS, lambda x: x[:, :1]), "of no pixels": saved(RECONS, lambda x: x[..., :0]),
    "missing": gone(RECONS)})


def texts(place: str) -> dict[str, Callable]:
    return {"of 0 bytes": empty(place), "cut": cut(place), "that runs code": saved(place, Bomb),
            "that runs code, an old pickle": pickled(place), "of numbers": saved(place, torch.ones(12)),
            "of one text": saved(place, np.array("a cat")), "of a dictionary": saved(place, {"a": "cat"}),
            "of too few": saved(place, np.array(["a cat"])), "of objects": saved(place, np.array([1, None], object))}


add(refine, REFINE, CAPTIONS, "--prompt", texts(CAPTIONS) | {"missing": gone(CAPTIONS)})
add(refine, [*REFINE, "--prompt={}/own.txt"], "own.txt", "--prompt", {
    "of bytes that are no text": content("own.txt", b"\xff\xfe\x00\xd8" * 20),
    "of too few lines": content("own.txt", b"a"), "missing": nothing,
    "as a folder": lambda folder: (folder / "own.txt").mkdir()})
add(refine, REFINE, "data/sdxl", "--sdxl", {
    "of a config that is a list": content("data/sdxl/unet/config.json", b"[1, 2]"),
    "of an empty config": empty("data/sdxl/vae/config.json"),
    "of a scheduler of no class": content("data/sdxl/scheduler/scheduler_config.json", b'{"_class_name": "system"}'),
})
add(refine, [*REFINE, "--sdxl={}/one.safetensors"], "one.safetensors", "--sdxl", {
    "of 0 bytes": empty("one.safetensors"), "of a header of 10^18 bytes": content(
        "one.safetensors", struct.pack("<Q", 10**18) + b"{}"), "of no tensors": content(
        "one.safetensors", struct.pack("<Q", 2) + b"{}"), "missing": nothing})

add(evaluate, EVALUATE, RECONS, "recon.py", tensors(RECONS) | {
    "of one channel": saved(RECONS, lambda x: x[:, :1]), "of no pixels": saved(RECONS, lambda x: x[..., :0])})
add(evaluate, EVALUATE, f"{EVALS}_all_clipvoxels.pt", "recon.py", {
    "that runs code": saved(f"{EVALS}_all_clipvoxels.pt", Bomb), "cut": cut(f"{EVALS}_all_clipvoxels.pt"),
    "of pictures": saved(f"{EVALS}_all_clipvoxels.pt", torch.ones(12, 3, 8, 8)),
    "of no rows": saved(f"{EVALS}_all_clipvoxels.pt", lambda x: x[:0])})
add(evaluate, EVALUATE, f"{EVALS}_all_enhancedrecons.pt", "refine.py", {
    "that runs code": saved(f"{EVALS}_all_enhancedrecons.pt", Bomb),
    "of too few rows": saved(f"{EVALS}_all_enhancedrecons.pt", lambda x: x[:3])})
for stage, words in ((refine, REFINE), (evaluate, EVALUATE), (report, REPORT)):
    add(stage, words, RECONS, "--max_lr", {"of NaN": saved(RECONS, lambda x: x * torch.nan)})
add(evaluate, EVALUATE, CAPTIONS, "recon.py", texts(CAPTIONS))
add(evaluate, EVALUATE, MASKS, "--data_path", {
    "of another length": edit(MASKS, replaced("subj01/V1", lambda mask: mask[:-1])), "cut": cut(MASKS)})
add(evaluate, COMPARE, f"{EVALS}_scores.pt", "evaluate.py", {
    "that runs code": saved(f"{EVALS}_scores.pt", Bomb), "cut": cut(f"{EVALS}_scores.pt"),
    "of a list": saved(f"{EVALS}_scores.pt", [1]), "of a tensor": saved(f"{EVALS}_scores.pt", torch.ones(3)),
    "of words": saved(f"{EVALS}_scores.pt", {"recons/pixcorr": "high"}),
    "of no dimension": saved(f"{EVALS}_scores.pt", {"recons/pixcorr": torch.tensor(1.)})})

# A judge alone: `python judges.py` loads one after the other.
ONE_JUDGE = SimpleNamespace(__name__="judges", main=lambda argv: judges.load(*argv))


def too_wide(state: dict) -> dict:
    last = [name for name, x in state.items() if x.ndim == 4][-1]
    return state | {last: torch.cat((state[last], state[last]), 1)}


def weights_of(place: str) -> dict[str, Callable]:
    """What can happen to a file of torchvision's."""
    return spoilt(place) | {
        "that runs code": saved(place, Bomb), "that runs code, an old pickle": pickled(place),
        "of a list": saved(place, [1, 2]), "of a tensor": saved(place, torch.ones(3)),
        "of no layers": saved(place, {}), "of another network": saved(place, {"conv.weight": torch.ones(3, 3)}),
        "without a layer": saved(place, lambda state: dict(list(state.items())[2:])),
        "of layers of one dimension": saved(place, lambda state: {name: x.flatten() for name, x in state.items()}),
        "of a layer too wide": saved(place, too_wide),
        "of words": saved(place, lambda state: dict.fromkeys(state, "1"))}


for judge, file in (("alexnet", "alexnet-owt-7be5be79.pth"), ("swav", "swav_800ep_pretrain.pth.tar")):
    add(ONE_JUDGE, [judge, "{}/data"], f"data/{file}", "--cache_dir", weights_of(f"data/{file}"))
FID = "data/weights-inception-2015-12-05-6726825d.pth"
add(ONE_JUDGE, ["fid", "{}/data"], FID, "--cache_dir", {
    "of 0 bytes": empty(FID), "of text": content(FID, b"<html>404 not found</html>\n"),
    "that runs code": saved(FID, Bomb),
    "of a list": saved(FID, [1, 2]), "of another network": saved(FID, {"conv.weight": torch.ones(3, 3)})})
for judge, file in (("clip_b", "clip_B/open_clip_model"), ("sentence", "sentence/model")):
    folder, config = file.split("/")[0], {"clip_b": "open_clip_config.json", "sentence": "config.json"}[judge]
    old = {"clip_b": "open_clip_pytorch_model.bin", "sentence": "pytorch_model.bin"}[judge]
    add(ONE_JUDGE, [judge, "{}/data"], f"data/{folder}", "--cache_dir", {
        "of an empty config": empty(f"data/{folder}/{config}"),
        "of a config that is a list": content(f"data/{folder}/{config}", b"[1, 2]"),
        "of cut weights": cut(f"data/{file}.safetensors"), "of no weights": gone(f"data/{file}.safetensors"),
        "of a cut tokenizer": cut(f"data/{folder}/tokenizer.json"),
        "of weights that run code": both(gone(f"data/{file}.safetensors"), saved(f"data/{folder}/{old}", Bomb))})

JSON = f"{EVALS}_metrics.json"


def row(**change) -> bytes:
    whole = {"key": "recons/pixcorr", "pictures": "recons", "title": "PixCorr", "value": .5}
    return json.dumps({"rows": [whole | change]}).encode()


add(report, REPORT, JSON, "evaluate.py", {
    "of 0 bytes": empty(JSON), "cut": cut(JSON), "of bytes that are no text": content(JSON, b"\xff\xfe\xd8"),
    "of a list": content(JSON, b"[1]"), "of rows that are numbers": content(JSON, b'{"rows": [1, 2]}'),
    "of rows in a dictionary": content(JSON, b'{"rows": {"a": 1}}'),
    "of a value in words": content(JSON, row(value="<b>")), "of an interval in words": content(JSON, row(low="<b>")),
    "of unknown pictures": content(JSON, row(pictures="<b>")),
    "of a title that is a number": content(JSON, row(title=5)), "nested deep": content(JSON, b"[" * 10**5)})
add(report, REPORT, RECONS, "recon.py", tensors(RECONS) | {"of one channel": saved(RECONS, lambda x: x[:, :1])})
add(report, REPORT, CAPTIONS, "recon.py", texts(CAPTIONS))
add(report, REPORT, f"{EVALS}_scores.pt", "evaluate.py", {
    "that runs code": saved(f"{EVALS}_scores.pt", Bomb), "cut": cut(f"{EVALS}_scores.pt"),
    "of a list": saved(f"{EVALS}_scores.pt", [1]), "of words": saved(f"{EVALS}_scores.pt", {"recons/pixcorr": "high"}),
    "of no dimension": saved(f"{EVALS}_scores.pt", {"recons/pixcorr": torch.tensor(1.)})})
add(report, REPORT, LAST, "--train_logs", {
    "that runs code, an old pickle": pickled(LAST), "cut": cut(LAST), "of a list": saved(LAST, [1]),
    "of losses in words": saved(LAST, changed("train_losses", ["high"])),
    "of flags in a list": saved(LAST, changed("flags", [1]))})

add(unclip, SHARDS, "shards/0.tar", "--images", {
    "missing": nothing, "of 0 bytes": empty("shards/0.tar"), "of text": content("shards/0.tar", b"404" * 999),
    "cut": both(pictures(), cut("shards/0.tar")), "of no pictures": tar("shards/0.tar", lambda _: [("a.txt", b"a")]),
    "with ../ names": pictures(("../../7.jpg", jpeg())),
    "with a picture that is cut": pictures(("7.jpg", jpeg()[:1000])),
    "with a picture of 40,000 million pixels": pictures(("7.png", huge_png())),
}, ("data/targets",))
add(unclip, [*UNCLIP, "--images={}/shards/{000..0", "--resolution=64"], "shards", "--images", {
    "with braces that stay open": pictures()})
add(unclip, UNCLIP, IMAGES, "--data_path", {"cut": cut(IMAGES), "of one dimension": h5(IMAGES, "images", BIG[0])})
add(unclip, UNCLIP, "data/shared1000.npy", "data", {
    "of 0 bytes": empty("data/shared1000.npy"), "of objects": lambda folder: put(
        folder / "data/shared1000.npy", npy(np.array([Bomb(folder / "ran")], object))),
    "of numbers": content("data/shared1000.npy", npy(np.arange(200.))),
    "of too few rows": content("data/shared1000.npy", npy(np.ones(3, bool)))})
add(unclip, [*UNCLIP, "--base={}/base.json"], "base.json", "--base", {
    "of 0 bytes": empty("base.json"), "of a list": content("base.json", b"[]"),
    "of text": content("base.json", b"unet"), "missing": nothing, "of a UNet that cannot be": content(
        "base.json", b'{"class_embed_type": "projection", "cross_attention_dim": 64, "down_block_types": ["a"]}')})
add(unclip, [*UNCLIP, "--base={}/base.json"], "base", "--base", {
    "of another network": content("base.json", b'{"layers": 3}')})
add(unclip, UNCLIP, "data/sdxl", "--base", {
    "of cut weights": cut("data/sdxl/unet/diffusion_pytorch_model.safetensors"),
    "of weights that run code": both(gone("data/sdxl/unet/diffusion_pytorch_model.safetensors"),
                                     saved("data/sdxl/unet/diffusion_pytorch_model.bin", Bomb))})

for name, damages in (
    ("betas_all_subj01", {"of 0 bytes": empty(BETAS), "of one dimension": h5(BETAS, "betas", BIG[0]),
                                 "with a group for its key": h5(BETAS, "betas/betas", BIG),
                                 "with a flipped bit": bad_checksum(BETAS)}),
    ("coco_images", {"cut": cut(IMAGES), "of no pictures": h5(
        IMAGES, "images", np.zeros((0, 3, 64, 64), np.float16)), "with a flipped bit": bad_checksum(IMAGES)}),
    ("brain_region_masks", {"of 0 bytes": empty(MASKS), "of a group for a region": edit(
        MASKS, lambda file: (file.pop("subj01/V1"), file.create_group("subj01/V1")))}),
    ("0.tar", {"with ../ names": tar(TAR, renamed("sample", "../../sample")), "cut": cut(TAR),
                    "with a behav of strings": tar(TAR, behav(lambda row: row.astype("U9")))}),
    ("subj01: column 5", {"is session 0 again": copied(TAR, TAR.replace("0.tar", "1.tar"))}),
    ("all_captions.pt", {"that runs code": saved("data/evals/all_captions.pt", Bomb),
                             "of a number": saved("data/evals/all_captions.pt", torch.tensor(1.))}),
    ("shared1000.npy", {"of 0 bytes": empty("data/shared1000.npy")}),
):
    add(data, CHECK, f"{name}", "WRONG", damages, title="data.py check")

ROI, RAW = "raw/nsddata/ppdata/subj01/func1pt8mm/roi", "raw/nsddata/ppdata/subj01/behav/responses.tsv"
STIM = "raw/nsddata/experiments/nsd/nsd_stim_info_merged.csv"
add(data, PREPARE, RAW, "--nsd_path", spoilt(RAW) | {"of bytes that are no text": content(RAW, b"\xff\xfe\xd8" * 99)})
add(data, PREPARE, STIM, "--nsd_path", spoilt(STIM))
add(data, PREPARE, f"{ROI}/nsdgeneral.nii.gz", "--nsd_path", spoilt(f"{ROI}/nsdgeneral.nii.gz"))
SESSION = f"raw/nsddata_betas/ppdata/subj01/func1pt8mm/{VERSION}/betas_session01.hdf5"
add(data, PREPARE, SESSION, "--nsd_path", spoilt(SESSION) | {
    "without its key": h5(SESSION, "voxels", BIG), "with a group for its key": h5(SESSION, "betas/betas", BIG),
    "of another shape": h5(SESSION, "betas", BIG)}, ("made",))


def interrupted(folder: Path, damage: Callable) -> None:
    """recon.py, stopped after its first pass, whose file is then damaged."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recon.frozen, "load_captioner", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        recon.main(arguments(RECON, folder))
    damage(f"{EVALS}_parts/brain_00000.pt")(folder)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_one_sentence_and_nothing_written(case, shared, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(shared, folder, copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    case.damage(folder)
    before = snapshot(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        m.run_main(lambda: case.stage.main(arguments(case.argv, folder)))
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and "Traceback" not in said.err, said.err
    sentence = said.out + errors[0]  # data.py check prints a line for each thing that it looks at
    assert all(word in sentence for word in case.words), sentence
    after = snapshot(tmp_path)
    new = [name for name in after if after[name] != before.get(name)]
    assert before.keys() <= after.keys()
    assert [name for name in new if not name.startswith(tuple(f"copy/{place}" for place in case.written))] == []


ODD = ["<script>alert(1)</script>", "</figcaption><img src=x onerror=alert(1)>", "a\x00b\x1b[31m\x07", "half \ud800",
       "\u202ebackwards", "&amp; 'quoted' \"twice\"",
       "$x_ costs \\frac$", "a $5 ball", "\r\n\u2028", "", " ", "ü" * 3000]


def test_captions_are_shown_as_text(shared, tmp_path, monkeypatch):
    """HTML, control characters, half a surrogate pair, and what matplotlib would take for a formula."""
    folder = tmp_path / "copy"
    shutil.copytree(shared, folder, copy_function=os.link)
    saved(CAPTIONS, np.array(ODD))(folder)
    (out(folder, "enhancedrecons")).unlink()
    refine.main(arguments([*REFINE, "--guidance=1"], folder))
    assert (folder / f"{EVALS}_refined_grid.png").stat().st_size > 1000
    monkeypatch.setattr(report, "umap_points", lambda between: np.zeros((len(between), 2)))
    page = report.main(arguments(REPORT, folder)).read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&amp;amp; &#x27;quoted&#x27;" in page
    assert [c for c in set(page) if not c.isprintable() and c not in "\n\t"] == []


def test_the_printed_table_says_what_is_said(shared, tmp_path):
    from bench_hostile import ending  # here: it imports this file
    for case in (CASES[0], next(case for case in CASES if case.stage is data)):
        folder = tmp_path / case.stage.__name__
        shutil.copytree(shared, folder, copy_function=os.link)
        code, said = ending(case, folder)
        assert code == 2 and all(word in said for word in case.words) and str(tmp_path) not in said


def test_there_are_many_cases_and_no_two_alike():
    assert len({case.name for case in CASES}) == len(CASES) >= 60
