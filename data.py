"""Readers and writers of the official MindEye2 files, epochs of trials, and the cache of frozen targets.

A subject looked at 9,000-10,000 photographs, each up to three times, in 30-40 sessions of 750 trials (one hour each).
What is read (N = NSD's number of the subject, 1..8; every size is taken from the file, none is assumed):

    wds/subj0N/train/{0,1,..}.tar          behav.npy       (1, 17)           a tar per session, 0.tar = session 1
    wds/subj0N/{test,new_test}/0.tar       behav.npy       (1, 17)           trials of the images all subjects share
    betas_all_subj0N_fp32_renorm.hdf5      'betas'         (all trials, V)   V = 12,682..17,907 voxels, z-scored
    coco_images_224_float16.hdf5           'images'        (73000, 3, H, H)  RGB in [0, 1], H = 224
    brain_region_masks.hdf5                'subj0N/{roi}'  (V,)              bool: nsd_general, V1..V4, higher_vis

A tar holds no brain and no picture, only two row numbers for each trial: column 0 of `behav` is the row of its image,
column 5 the row of its betas. `load_trials` reads them once, `load_voxels` the betas they name.

What comes out: `Trials` (row numbers), voxels (n, V), `epoch_batches` (which trials make a step), and `cache_targets`:
what the frozen networks say about each image. They never change, so each image is encoded once, to disk, and the
training loop holds none of them. This is the project's main speed-up over the original.

A betas row is one single-trial response (GLMsingle) in units of standard deviations: paper appendix A.2 z-scores each
voxel with the mean and deviation of the whole training set, before any cut to n sessions. That leaks a little of the
later sessions into the "1 hour" setting, as the paper admits; the files come that way.

    python data.py download --data_path nsd --subjects 1        the released files (hub.py)
    python data.py prepare --nsd_path RAW --subj 1              or make them from raw NSD (nsd.py)
    python data.py check --data_path nsd                        is all there, whole, and does it fit? (nsd.py)
"""

import argparse
import hashlib
import io
import os
import shutil
import sys
import tarfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import webdataset as wds
from braceexpand import braceexpand
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from files import naming_full_disk, replacing
from frozen import encode_latents
from model import UserError, run_main

BEHAV_COLUMNS = (
    "cocoidx", "subject", "session", "run", "trial", "global_trial", "time", "isold", "iscorrect", "rt", "changemind",
    "isoldcurrent", "iscorrectcurrent", "total1", "total2", "button", "shared1000",
)  # fmt: skip
IMAGE, SESSION, BETA = (BEHAV_COLUMNS.index(name) for name in ("cocoidx", "session", "global_trial"))  # 0, 2, 5

H5_FILES = {"betas": "betas_all_subj0{}_fp32_renorm.hdf5", "images": "coco_images_224_float16.hdf5",
            "masks": "brain_region_masks.hdf5"}  # fmt: skip


def session_tar(data_path, subject: int, split: str, number: int = 0) -> Path:
    return Path(data_path) / "wds" / f"subj0{subject}" / split / f"{number}.tar"


def data_folder() -> str:
    """Where to look if nobody says: here, if here are the official files, as in the original; else in the toy world."""
    return "." if Path("wds").is_dir() else "toy"


def h5_path(data_path, name: str, subject: int | None = None) -> Path:
    """Path of the HDF5 file named "betas" (of a subject), "images" or "masks"."""
    return Path(data_path) / H5_FILES[name].format(subject)


def brief(error: object) -> str:
    return str(error).partition("\n")[0][:150]


def open_h5(path: Path, name: str, kind: type = h5py.Dataset):
    """Open an HDF5 file for reading; returns (file, its member `name`). Raises UserError if either is missing."""
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: --data_path must name the folder of the official files.") from None
    except OSError as error:
        raise UserError(f"{path} is not a whole HDF5 file ({brief(error)}): get it again into --data_path.") from None
    member = file.get(name)  # None for a link to nowhere, too
    if not isinstance(member, kind):
        what = f"only {sorted(file)}" if member is None else f"it is a {type(member).__name__.lower()}"
        raise UserError(f"{path} has no '{name}', {what}: put the official file into --data_path.")
    return file, member


# ---------------------------------------------------------------------------------------------------------------------
# Trials: which image and which betas row belong together

@dataclass
class Trials:
    """The trials of one subject and one split, in file order; the i-th entries of all arrays are the same trial."""
    subject: int  # NSD's number, 1..8
    image: np.ndarray  # (n,) int64, row of coco_images_224_float16.hdf5
    beta: np.ndarray  # (n,) int64, row of betas_all_subj0N_fp32_renorm.hdf5
    session: np.ndarray  # (n,) int64, from 1

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: np.ndarray) -> "Trials":
        return Trials(self.subject, self.image[rows], self.beta[rows], self.session[rows])


def count_sessions(data_path, subject: int) -> int:
    """Number of training sessions on disk (0.tar, 1.tar, ..). Raises UserError if there is none, or a gap."""
    folder = session_tar(data_path, subject, "train").parent
    numbers = {int(path.stem) for path in folder.glob("*.tar") if path.stem.isdecimal()}
    for number in range(max(numbers, default=0) + 1):
        if number not in numbers:
            raise UserError(f"{folder}/{number}.tar is missing: check --data_path, or choose another --subj.")
    return len(numbers)


def load_trials(data_path, subject: int, split: str = "train", sessions: Iterable[int] | None = None) -> Trials:
    """The trials of a subject, in file order.

    split     "train", "test" (the release's first test set) or "new_test" (the complete one, the default everywhere)
    sessions  numbers of training tars, from 0; None = all. The paper's 1-hour setting is [0] (A.2: the first in time).
    Raises UserError if a tar is missing, cut short or lacks its behav.npy, or if there are fewer sessions.
    """
    here = count_sessions(data_path, subject) if split == "train" else 1
    numbers = list(range(here) if sessions is None or split != "train" else sessions)
    if not numbers or min(numbers) < 0 or max(numbers) >= here:
        folder, wanted = session_tar(data_path, subject, split).parent, max(numbers, default=-1) + 1
        raise UserError(f"{folder} has {here} sessions, not {wanted}: set --num_sessions between 1 and {here}.")
    paths = [session_tar(data_path, subject, split, number) for number in numbers]
    bar = tqdm(paths, desc=f"trials of subject {subject}", delay=2, leave=False)  # shown only if it takes > 2 s
    tables = [read_behav(path) for path in bar]
    behav = np.concatenate(tables)  # (n, 17)
    _, first = np.unique(behav[:, BETA], return_index=True)
    if len(first) < len(behav):
        again = np.setdiff1d(np.arange(len(behav)), first)[0]
        path = paths[np.searchsorted(np.cumsum([len(table) for table in tables]), again, side="right")]
        raise UserError(f"{path}: betas row {behav[again, BETA]:.0f} belongs to an earlier trial, so a session or a "
                        "trial is there twice: get the tar again into --data_path.")
    return Trials(subject, *(behav[:, column].astype(np.int64) for column in (IMAGE, BETA, SESSION)))


def is_inside(name: str) -> bool:
    """Whether a tar's member would be unpacked into the folder in which one stands. We unpack none; others might."""
    return not name.startswith("/") and ".." not in name.split("/")


def read_behav(path: Path) -> np.ndarray:
    """The behav table (n, 17) float64 of one tar. Raises UserError naming the tar.

    In a webdataset, a sample's members share their names up to the first dot. That library would read all four of them
    and split the tars over DDP's processes: tarfile takes half the time.
    """
    again = "get it again into --data_path."
    if not path.is_file():
        raise UserError(f"{path} is missing: --data_path must name the folder that holds wds/.")
    table = {}  # sample: (17,), None until it is found
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isreg, tar):
                if not is_inside(member.name):
                    raise UserError(f"{path}: its member {member.name} lies outside of the folder: {again}")
                folder, _, file = member.name.rpartition("/")
                sample, _, kind = file.partition(".")
                row = table.setdefault((folder, sample), None)
                if kind != "behav.npy":
                    continue
                if row is not None:
                    raise ValueError(f"{member.name} is there twice")
                row = np.load(io.BytesIO(tar.extractfile(member).read())).reshape(len(BEHAV_COLUMNS))
                if row.dtype.kind not in "fiu":
                    raise ValueError(f"{member.name} of {row.dtype}")
                table[folder, sample] = row.astype(np.float64)
            tail = path.stat().st_size - tar.offset
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is cut short or damaged ({brief(error)}): {again}") from None
    # Python's tarfile ends quietly at a broken header or at zeros: what it leaves may be no more than tar's own end.
    if not table or tail % 512 or tail > 2 * tarfile.RECORDSIZE:
        raise UserError(f"{path} is cut short or damaged after {len(table)} trials: {again}")
    if without := [sample for (_, sample), row in table.items() if row is None]:
        raise UserError(f"{path}: {without[0]} has no behav.npy: {again}")
    if tail < 1024:  # an unclosed writer leaves this too, so it proves nothing
        warnings.warn(f"{path} lacks tar's end mark; if {len(table)} trials are too few, {again}", stacklevel=2)
    behav = np.stack(list(table.values()))  # (n, 17)
    rows = behav[:, [IMAGE, BETA, SESSION]]
    if not ((rows >= 0) & (rows < 2**31) & (rows % 1 == 0)).all():  # -1 = missing, harmless in the other columns only
        raise UserError(f"{path}: a trial without image, session or global_trial (columns 0, 2, 5 of behav): {again}")
    return behav


def repeats(trials: Trials) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct images, ascending (n_images,), and for each the positions in `trials` of its 1..3 repetitions."""
    images, inverse, counts = np.unique(trials.image, return_inverse=True, return_counts=True)
    by_image = np.argsort(inverse, kind="stable")  # (n,) positions, grouped by image, in file order within an image
    return images, np.split(by_image, np.cumsum(counts)[:-1])


def average_repeats(values, positions: list[np.ndarray]):
    """Mean of values (n, ..) over each image's repetitions -> (n_images, ..), numpy or torch as given.

    The paper tests on such averages (A.2). Of two repetitions the original takes one twice, which weighs them 2:1;
    here each counts once. Subjects 1, 2, 5, 7, who finished all sessions, have three of each and do not differ.
    """
    if isinstance(values, torch.Tensor):
        return torch.stack([values[torch.as_tensor(p)].float().mean(0) for p in positions]).to(values.dtype)
    return np.stack([np.mean(values[p], axis=0) for p in positions])


@torch.no_grad()
def embed_images(model, voxels: torch.Tensor, positions: list[np.ndarray], subject: int = 0,
                 chunk: int = 256) -> dict[str, torch.Tensor]:
    """What a brain says of n images: voxels (trials, V) and, for each image, the rows of its repetitions.

    Returns {"backbone": (n, S, D), "clip_voxels": (n, S, D), "blurry_latents": (n, 4, L, L)} on the CPU. The outputs
    are averaged, not the voxels (A.2): the model was trained on single trials, never on their calmer average.
    """
    device, outputs = next(model.parameters()).device, {}
    images = max(1, chunk // max(map(len, positions)))
    for part in (positions[i : i + images] for i in range(0, len(positions), images)):
        rows = np.concatenate(part)
        groups = np.split(np.arange(len(rows)), np.cumsum([len(p) for p in part])[:-1])
        for name, values in vars(model.embed(voxels[rows].to(device).float(), subject)).items():
            if values is not None and name != "blurry_features":  # three repetitions: a third to bring to the CPU
                outputs.setdefault(name, []).append(average_repeats(values.float(), groups).cpu())
    return {name: torch.cat(parts) for name, parts in outputs.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Voxels and images

MISMATCH = "--data_path mixes files that do not belong together, get them again."

def open_betas(data_path, subject: int):
    """(file, its betas (all trials, V)). Raises UserError."""
    path = h5_path(data_path, "betas", subject)
    file, betas = open_h5(path, "betas")
    if betas.ndim != 2 or betas.dtype.kind != "f" or not betas.shape[1]:
        raise UserError(f"{path}: 'betas' is {betas.dtype} {betas.shape}, not float32 (trials, V): put MindEye2's own "
                        "file into --data_path.")
    return file, betas


def num_voxels(data_path, subject: int) -> int:
    file, betas = open_betas(data_path, subject)
    with file:
        return betas.shape[1]


def load_voxels(data_path, trials: Trials, block: int = 512) -> torch.Tensor:
    """Betas of the trials, (n, V) float32 in trial order. All of NSD's subject 1 are 1.7 GB.

    Reads the file in blocks of rows from top to bottom and skips blocks without a wanted row: HDF5 is slow for
    scattered rows, and takes no row twice. Raises UserError for rows outside the file, and for voxels that are NaN or
    more than half precision, in which training keeps them, can hold.
    """
    path = h5_path(data_path, "betas", trials.subject)
    file, betas = open_betas(data_path, trials.subject)
    with file:
        n_rows, n_voxels = betas.shape
        if len(trials) and not 0 <= trials.beta.min() <= trials.beta.max() < n_rows:
            raise UserError(f"{path} has {n_rows} rows, but its tars name row {trials.beta.max()}: {MISMATCH}")
        voxels = np.empty((len(trials), n_voxels), np.float32)  # (n, V)
        order = np.argsort(trials.beta, kind="stable")
        cuts = np.searchsorted(trials.beta[order], np.arange(0, n_rows + block, block))
        broken = []
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            if first == last:
                continue
            where = order[first:last]  # trials whose row lies in this block
            rows = trials.beta[where]
            try:
                part = betas[rows[0] : rows[-1] + 1][rows - rows[0]]  # (rows of this block, V)
            except OSError as error:
                raise UserError(f"{path} is damaged ({brief(error)}): get it again into --data_path.") from None
            fine = (np.abs(part) <= np.finfo(np.float16).max).all(axis=1)  # not of NaN
            broken += rows[~fine].tolist()
            voxels[where[fine]] = part[fine]
    if broken:
        raise UserError(f"{path}: {len(set(broken))} rows with NaN or voxels beyond 65504, the first is row "
                        f"{broken[0]}: replace the file in --data_path.")
    return torch.from_numpy(voxels)


def resized(images: torch.Tensor, size: int, antialias: bool = False) -> torch.Tensor:
    """(n, 3, H, W) -> (n, 3, size, size) float32, bilinear.

    The paper's torchvision (0.16) did not antialias tensors; today's does unless told not to. It matters where a
    picture shrinks (256 -> 224: values in [0, 1] move by up to .025), not where it grows.
    """
    return F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=antialias)


class Images:
    """The image file: images[[5, 2, 5]] -> (3, 3, H, W) float32 in [0, 1], read when asked for, in that order.

    data_path is its folder, or the file itself. With `resize`, pictures come at that size.
    """
    def __init__(self, data_path, resize: int | None = None):
        self.path, self._pid, self.resize = Path(data_path), None, resize
        if self.path.suffix not in (".hdf5", ".h5"):
            self.path = h5_path(data_path, "images")
        images = self._open()
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.dtype.kind != "f":
            raise UserError(f"{self.path}: 'images' is {images.dtype} {images.shape}, not float (n, 3, H, H): put "
                            "MindEye2's own file into --data_path.")  # fmt: skip
        if resize == images.shape[-1]:
            self.resize = None

    def _open(self):
        if self._pid != os.getpid():  # HDF5 handles do not survive a fork: each process opens the file for itself
            self._file, self._images = open_h5(self.path, "images")
            self._pid = os.getpid()
        return self._images

    def __len__(self) -> int:
        return self._open().shape[0]

    @property
    def size(self) -> int:
        return self._open().shape[2]

    def fingerprint(self) -> str:
        """Short hash of shape, file size and eight pictures: enough to tell one image file from another."""
        digest = hashlib.sha1(f"{self._open().shape} {self.path.stat().st_size}".encode())
        for row in np.linspace(0, len(self) - 1, 8).astype(int):
            digest.update(self._read(row).tobytes())
        return digest.hexdigest()[:12] + (f"_{self.resize}" if self.resize else "")

    def _read(self, rows) -> np.ndarray:
        """Pictures as they are stored; HDF5 wants ascending, distinct rows. Raises UserError for damaged ones."""
        try:
            pictures = self._open()[rows]
        except OSError as error:
            raise UserError(f"{self.path} is damaged ({brief(error)}): get it again into --data_path.") from None
        if not np.isfinite(pictures).all():
            raise UserError(f"{self.path}: NaN or infinite pixels within rows {np.min(rows)}..{np.max(rows)}: replace "
                            "the file in --data_path.")
        return pictures

    def numbers(self, indices) -> torch.Tensor:
        """(B, 4): a picture's height and width, and the top and left of a crop: here always all of it."""
        return torch.tensor([[self.size, self.size, 0, 0]]).expand(len(indices), -1)

    def __getitem__(self, indices) -> torch.Tensor:
        images = self._open()
        rows, inverse = np.unique(np.atleast_1d(np.asarray(indices, np.int64)), return_inverse=True)
        if len(rows) and not 0 <= rows[0] <= rows[-1] < len(images):
            raise UserError(f"{self.path} has {len(images)} images, but the tars name image {rows[-1]}: {MISMATCH}")
        pictures = torch.from_numpy(self._read(rows)).float()  # (distinct, 3, H, W)
        if self.resize:
            pictures = resized(pictures, self.resize)
        return pictures[torch.from_numpy(inverse)]  # (B, 3, H, W)


def expanded(pattern) -> list[Path]:
    """"shards/{000..099}.tar" -> a hundred paths. Raises UserError."""
    try:
        return [Path(path) for path in braceexpand(str(pattern))]
    except ValueError as error:
        raise UserError(f"{pattern} cannot be expanded ({error}): close its braces, or name others with --images."
                        ) from None


class TarImages:
    """Pictures in webdataset tars, "shards/{000..099}.tar": what `Images` is for one file of pictures.

    Each picture's shorter side becomes `size` pixels, and the middle square is kept: images[[5, 2]] -> (2, 3, size,
    size). The tars are read once for where each picture lies, so that any can be had in any order.
    """
    SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

    def __init__(self, pattern: str, size: int):
        self.paths, self.size = expanded(pattern), size
        found, unreadable = [], []
        for number, path in enumerate(tqdm(self.paths, desc="reading tars", delay=2, leave=False)):
            for member, picture_size in self._scan(path):
                (found if picture_size else unreadable).append((number, member.offset_data, member.size, picture_size))
        if not found:
            raise UserError(f"{pattern} holds no picture ({', '.join(self.SUFFIXES)}): name other tars with --images.")
        if unreadable:
            warnings.warn(f"{len(unreadable)} files in {pattern} are no pictures and are left out", stacklevel=2)
        self._place = np.array([entry[:3] for entry in found])  # (n, 3): tar, first byte, bytes
        self._sizes = np.array([entry[3] for entry in found])  # (n, 2): width, height

    def _scan(self, path: Path) -> Iterator[tuple[tarfile.TarInfo, tuple[int, int] | None]]:
        """Each picture of a tar, and its width and height, or None if it is none. Raises UserError naming the tar."""
        again = "get it again, or name others with --images."
        if not path.is_file():
            raise UserError(f"{path} does not exist: name tars that do with --images.")
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    if not is_inside(member.name):
                        raise UserError(f"{path}: its member {member.name} lies outside of the folder: {again}")
                    if member.isfile() and member.name.lower().endswith(self.SUFFIXES):
                        try:
                            yield member, Image.open(tar.extractfile(member)).size
                        except UnidentifiedImageError:
                            yield member, None
                        except Image.DecompressionBombError as error:  # some bytes that would fill the memory
                            raise UserError(f"{path}: {member.name} is too large ({brief(error)}): {again}") from None
                tail = path.stat().st_size - tar.offset
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"{path} is cut short or damaged ({brief(error)}): {again}") from None
        if tail % 512 or tail > 2 * tarfile.RECORDSIZE:  # Python's tarfile ends quietly at a broken header
            raise UserError(f"{path} is cut short or damaged: {again}")

    def __len__(self) -> int:
        return len(self._place)

    def fingerprint(self) -> str:
        """Short hash of the tars' sizes, where the pictures lie, and this size."""
        digest = hashlib.sha1(str([path.stat().st_size for path in self.paths]).encode())
        digest.update(self._place.tobytes())
        return f"{digest.hexdigest()[:12]}_{self.size}"

    def numbers(self, indices) -> torch.Tensor:
        """(B, 4): height and width before resizing, and the top and left of the crop after (SDXL's conditioning)."""
        sizes = torch.from_numpy(self._sizes[np.asarray(indices)][:, ::-1].copy())  # (B, 2): height, width
        return torch.cat((sizes, (self._shrunk(sizes) - self.size) // 2), 1)  # (B, 4)

    def _shrunk(self, sizes: torch.Tensor) -> torch.Tensor:
        """Height and width (B, 2) -> the same with the shorter one at self.size."""
        return (sizes * self.size / sizes.min(1, keepdim=True).values).round().long()

    def _read(self, row: int) -> np.ndarray:
        number, start, length = self._place[row]
        with open(self.paths[number], "rb") as file:
            file.seek(start)
            content = file.read(length)
        numbers = self.numbers([row])
        (height, width), (top, left) = self._shrunk(numbers[:, :2])[0].tolist(), numbers[0, 2:].tolist()
        try:
            picture = Image.open(io.BytesIO(content)).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways to say it
            raise UserError(f"{self.paths[number]}: the picture at byte {start} is damaged ({error}): take it out, or "
                            "name other tars with --images.") from None  # fmt: skip
        return np.asarray(picture.crop((left, top, left + self.size, top + self.size)))  # (size, size, 3)

    def __getitem__(self, indices) -> torch.Tensor:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            pictures = list(pool.map(self._read, np.atleast_1d(indices)))
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255  # (B, 3, size, size)


def load_region_masks(data_path, subject: int, voxels: int | None = None) -> dict[str, np.ndarray]:
    """{region: (V,) bool} of one subject's voxels. Raises UserError, also if there are not `voxels` of them."""
    path = h5_path(data_path, "masks")
    file, group = open_h5(path, f"subj0{subject}", h5py.Group)
    masks = {}
    with file:
        for region in group:
            mask = open_mask(group, region)
            if mask is None or voxels not in (None, len(mask)):
                size = "not (V,) of numbers" if mask is None else f"of {len(mask)} voxels, the betas have {voxels}"
                raise UserError(f"{path}: subj0{subject}/{region} is {size}: get the file again into --data_path.")
            masks[region] = mask
    return masks


def open_mask(group: h5py.Group, region: str) -> np.ndarray | None:
    """(V,) bool; None if there is no such thing, or it cannot be read."""
    member = group.get(region)
    if not isinstance(member, h5py.Dataset) or member.ndim != 1 or member.dtype.kind not in "biuf":
        return None
    try:
        return member[:].astype(bool)
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Epochs

def steps_per_epoch(trials_list: list[Trials], batch_size: int, world: int = 1) -> int:
    """Steps of one epoch; batch_size = trials a step and process, over all subjects.

    As in the original: trials of the subject with the most, over the trials of a step. So a pretraining epoch shows a
    seventh of everybody's trials. (The original counts 750 a session; the training tars hold 27,000 of the 30,000.)
    """
    return max(1, max(map(len, trials_list)) // (batch_size * world))


def epoch_batches(
    trials_list: list[Trials], batch_size: int, steps: int, seed: int, epoch: int, rank: int = 0, world: int = 1,
    together: bool = False,
) -> Iterator[list[np.ndarray]]:
    """Yield `steps` batches: for each subject, `batch_size` positions in its Trials (here of each, not of all).

    Trials are permuted anew by (seed, epoch, subject); every process works out the whole schedule and takes its part,
    so no trial is seen by two. A subject with too few trials goes on with a fresh permutation. No batch shows an image
    twice, as far as that can be avoided: `separate_twins`. With `together`, nor do the batches of all processes at
    one step, which are then those of one process with world * batch_size.
    """
    schedules = []
    for trials in trials_list:
        rng = np.random.default_rng([seed, epoch, trials.subject])
        needed = steps * world * batch_size
        rounds = -(-needed // len(trials))
        order = np.concatenate([rng.permutation(len(trials)) for _ in range(rounds)])[:needed]  # (steps*world*B,)
        width = world * batch_size if together else batch_size
        order = separate_twins(order.reshape(-1, width), trials.image, rng)  # (steps*world, B), or (steps, world*B)
        schedules.append(order.reshape(steps, world, batch_size))  # (steps, world, B)
    for step in range(steps):
        yield [schedule[step, rank] for schedule in schedules]


def separate_twins(order: np.ndarray, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Swap trials between the batches (rows) of order (batches, B) until no batch shows an image twice.

    The contrastive loss takes every other image of the batch as a negative: a second trial of the same image would be
    pushed away from its own target. The original drops such batches; a swap keeps every trial in the epoch. Images
    are compared within a subject: those seen by several subjects are all in the test set.
    """
    order, width = order.copy(), order.shape[1]
    shown = image[order]  # (batches, B)
    if len(np.unique(image)) < width:
        return order  # cannot be avoided
    for _ in range(3):  # once is nearly always enough; a swap that has no place now may have one later
        ranked = np.argsort(shown, axis=1, kind="stable")  # (batches, B)
        sorted_images = np.take_along_axis(shown, ranked, axis=1)
        batches, places = np.nonzero(sorted_images[:, 1:] == sorted_images[:, :-1])
        for batch, slot in zip(batches, ranked[batches, places + 1], strict=True):
            twin = shown[batch, slot]
            if (shown[batch] == twin).sum() < 2:
                continue  # an earlier swap took the other one away
            fits = ~np.isin(shown, shown[batch]) & (shown != twin).all(axis=1, keepdims=True)  # (batches, B)
            if not fits.any():
                continue
            other, place = divmod(int(rng.choice(np.flatnonzero(fits))), width)
            for table in (order, shown):
                table[batch, slot], table[other, place] = table[other, place], table[batch, slot]
    return order


def pinned(batch: dict) -> dict:
    """A dict of tensors, or of lists of them, in page-locked memory: a GPU copies from it while it computes."""
    return {name: [x.pin_memory() for x in value] if isinstance(value, list) else value.pin_memory()
            for name, value in batch.items()}


def prefetch(items: Iterable, device: torch.device, n: int = 2, pin: bool = False) -> Iterator:
    """Yield the items; for a GPU, up to n prepared (and pinned) ahead by a thread, whose errors are raised here.

    A CPU gets them one by one: its cores are busy, and another thread made the toy's training 1.6 times as slow.
    """
    if device.type == "cpu":
        yield from items
        return
    items, end = iter(items), object()

    def prepare():
        item = next(items, end)
        return pinned(item) if pin and item is not end else item

    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(prepare) for _ in range(n))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(prepare))
            yield item


# ---------------------------------------------------------------------------------------------------------------------
# Targets: the frozen networks' outputs, computed once per image

TARGETS_VERSION = 2  # part of every cache's key: raise it when the code that computes targets changes its output
FILL = "run train.py with this --cache_dir, it computes what is missing."
FLUSH_BATCHES = 16  # a killed build loses at most this many batches


def network_fingerprint(module: torch.nn.Module) -> str:
    """Short hash of a network: name, shape and 16 values of each tensor, so that a 10 GB network takes a moment.

    Values are hashed in half precision: a float32 and a float16 copy of the same weights share their cache.
    """
    digest = hashlib.sha1(type(module).__name__.encode())
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            flat = tensor.detach().flatten()
            values = flat[:: max(1, len(flat) // 16)][:16].cpu().half()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:12]


def check_disk(folder: Path, needed: int, what: str = "Targets need", flag: str = "--cache_dir"):
    free = shutil.disk_usage(folder).free
    if needed > free:  # to be told before hours of work, not after
        raise UserError(f"{what} {needed:,} bytes, {folder} has {free:,} free: put {flag} on a larger disk.")


def put_rows(path: Path, mapped: np.memmap, rows: np.ndarray, values: np.ndarray):
    """Put values (B, ..) into the rows (B,) of the file that is `mapped` for reading."""
    with naming_full_disk(path), open(path, "r+b") as file:
        for row, value in zip(rows, values, strict=True):
            file.seek(mapped.offset + int(row) * value.nbytes)
            file.write(value.tobytes())


class TargetCache:
    """One network's output for the images: cache[[5, 2, 5]] -> (3, *shape) float16, as stored.

    A memory-mapped float16 array with a row for every image of the image file (rows never written take no disk), and
    beside it one bool per row: done or not. The maps are only read: writing into one whose disk is full kills the
    process (SIGBUS), writing into the file raises an error. encode(images (B, 3, H, W), rows (B,)) -> (B, *shape)
    may be None where the cache is only read. `fingerprint` must tell networks and image files apart: it is part of
    the file name, so another network's leftover is never used. One process fills; others see rows once they are done.
    """
    def __init__(self, folder, name: str, encode: Callable | None, shape: tuple[int, ...], fingerprint: str):
        self.name, self.encode, self.shape = name, encode, tuple(shape)
        self.path = Path(folder) / f"{name}_{fingerprint}.npy"
        self.done_path = self.path.with_suffix(".done.npy")
        self._targets = self._done = self._place = None
        self.row_bytes = 2 * int(np.prod(self.shape))

    def _open(self):
        try:
            self._targets = np.load(self.path, mmap_mode="r")  # (images, *shape)
            self._done = np.load(self.done_path, mmap_mode="r")  # (images,)
            if self._targets.shape != (len(self._done), *self.shape):
                raise ValueError(f"shape {self._targets.shape}")
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing: {FILL}") from None
        except (ValueError, EOFError) as error:
            raise UserError(f"{self.path} is damaged ({error}): delete it, then {FILL}") from None

    def _create(self, rows: int):
        self.done_path.unlink(missing_ok=True)  # first: a done row must never refer to targets that are gone
        for path, dtype, shape in ((self.path, np.float16, (rows, *self.shape)), (self.done_path, bool, (rows,))):
            with replacing(path) as temporary:
                np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape).flush()

    def missing(self, indices) -> np.ndarray:
        """The distinct images of `indices` without targets, ascending."""
        rows = np.unique(np.asarray(indices, np.int64))
        if not (self.path.exists() and self.done_path.exists()):
            return rows
        self._open()
        return rows[~self._done[rows]]

    @torch.no_grad()
    def fill(self, images: Images, indices, batch_size: int = 64, device="cpu"):
        """Compute the missing targets of these images. Raises UserError if the disk is too small or a target is NaN."""
        rows = self.missing(indices)
        if not len(rows):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_disk(self.path.parent, len(rows) * self.row_bytes)
        if not (self.path.exists() and self.done_path.exists()):
            self._create(len(images))
        self._open()
        batches, device = np.split(rows, range(batch_size, len(rows), batch_size)), torch.device(device)
        pictures = prefetch(({"images": images[batch]} for batch in batches), device, pin=True)
        pending = []  # batches computed but not yet noted as done
        try:
            with tqdm(total=len(rows), desc=f"{self.name} targets", unit="image") as bar, ThreadPoolExecutor(1) as pool:
                writing = pool.submit(int)  # nothing yet
                for batch, shown in zip(batches, pictures, strict=True):
                    targets = self.encode(shown["images"].to(device, non_blocking=True), batch).half()  # (B, *shape)
                    targets = targets.to("cpu", non_blocking=True)
                    copied = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
                    writing.result()  # by now the GPU has the next batch to work on
                    writing = pool.submit(self._write, batch, targets, copied, pending)
                    bar.update(len(batch))
                writing.result()
        finally:
            self._mark_done(pending)

    def _write(self, batch: np.ndarray, targets: torch.Tensor, copied: torch.cuda.Event | None, pending: list):
        if copied:
            copied.synchronize()
        if not torch.isfinite(targets).all():
            raise UserError(f"Network '{self.name}' gives NaN or more than float16 holds in image rows "
                            f"{batch[0]}..{batch[-1]}: check its weights in --cache_dir.")  # fmt: skip
        put_rows(self.path, self._targets, batch, targets.numpy())
        pending.append(batch)
        if len(pending) == FLUSH_BATCHES:
            self._mark_done(pending)

    def to_memory(self, indices):
        """Read these images' targets once, in the file's order, and answer from memory from then on."""
        rows = np.unique(np.asarray(indices, np.int64))
        self[rows[:1]]  # all there and whole?
        needed, free = len(rows) * self.row_bytes, psutil.virtual_memory().available
        if needed > free:
            raise UserError(f"{self.path} takes {needed:,} bytes of memory, {free:,} are free: leave out --in_memory.")
        self._targets = self._targets[rows]  # (rows, *shape)
        self._place = np.full(len(self._done), len(rows))
        self._place[rows] = np.arange(len(rows))

    def _announce(self, rows: np.ndarray):
        """Ask for all rows at once: one by one, a disk would answer each page of 4 kB in its turn."""
        if hasattr(os, "posix_fadvise"):  # Linux
            file = os.open(self.path, os.O_RDONLY)
            for row in rows:
                first = self._targets.offset + int(row) * self.row_bytes
                for start in range(first, first + self.row_bytes, 2**17):  # more at once may be cut short
                    os.posix_fadvise(file, start, min(2**17, first + self.row_bytes - start), os.POSIX_FADV_WILLNEED)
            os.close(file)

    def _mark_done(self, pending: list[np.ndarray]):
        with open(self.path, "r+b") as file:
            os.fsync(file.fileno())  # targets reach the disk before the note that they did
        for batch in pending:
            put_rows(self.done_path, self._done, batch, np.ones(len(batch), bool))
        pending.clear()

    def __getitem__(self, indices) -> torch.Tensor:
        rows = np.atleast_1d(np.asarray(indices, np.int64))
        if self._targets is None or not self._done[rows].all():
            self._open()
        if not self._done[rows].all():
            raise UserError(f"{self.path} has no target of image {rows[~self._done[rows]][0]} yet: {FILL}")
        if self._place is not None:
            rows = self._place[rows]
        else:
            self._announce(rows)
        targets = torch.empty(len(rows), *self.shape, dtype=torch.float16, device="cpu",  # whatever the default is
                              pin_memory=torch.cuda.is_initialized())
        for target, row in zip(targets.numpy(), rows, strict=True):  # at once, all would be copied twice
            target[...] = self._targets[row]
        return targets  # (B, *shape)


def turned_hue(images: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Colours (B, 3, H, W) moved along the colour wheel by turn (B, 1, 1), 1 being once around."""
    red, green, blue = images.unbind(1)  # (B, H, W) each
    most, chroma = images.amax(1), images.amax(1) - images.amin(1)
    slope = chroma.clamp(min=1e-6)
    sixth = torch.where(most == red, (green - blue) / slope, torch.where(  # where on the wheel, in sixths
        most == green, (blue - red) / slope + 2, (red - green) / slope + 4)) + 6 * turn
    places = [(sixth + start) % 6 for start in (5, 3, 1)]  # of red, green, blue: how far from where each is full
    return torch.stack([most - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in places], 1)


def cropped(images: torch.Tensor, share: float, across: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A square of `share` of each image's area, resized to the whole; across, down (B,) in [0, 1] say where."""
    side = share**.5
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, 0, 2], theta[:, 1, 2] = (1 - side) * (2 * across - 1), (1 - side) * (2 * down - 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def augmented(images: torch.Tensor, rows, view: int) -> torch.Tensor:
    """View `view` of images (B, 3, H, W): 0 = as they are, others with colours changed and a tenth of the area cut off.

    The teacher of the low-level head compares an image with a changed copy of itself (the original's blur_augs). Each
    (image, view) has its own numbers, so a cache does not depend on the order in which it was filled. The batch is
    changed at once: one by one, as torchvision does it, a GPU waits longer for this than for the teacher.
    """
    if view == 0:
        return images
    draws = np.stack([np.random.default_rng([int(row), view]).random(9, np.float32) for row in rows])
    draws = torch.from_numpy(draws).to(images.device)  # (B, 9)
    recolour, bright, contrast, colour, hue, pale, solar, across, down = draws.unbind(1)  # each evenly in [0, 1]

    def wide(values: torch.Tensor) -> torch.Tensor:
        return values[:, None, None, None]  # (B, 1, 1, 1)

    def grey(x: torch.Tensor) -> torch.Tensor:
        return (x * x.new_tensor([.299, .587, .114])[:, None, None]).sum(1, keepdim=True)  # (B, 1, H, W)

    x = (images * wide(.6 + .8 * bright)).clamp(0, 1)
    x = torch.lerp(grey(x).mean((2, 3), keepdim=True), x, wide(.6 + .8 * contrast)).clamp(0, 1)
    x = torch.lerp(grey(x), x, wide(.8 + .4 * colour)).clamp(0, 1)
    x = torch.where(wide(recolour < .8), turned_hue(x, .2 * hue[:, None, None] - .1), images)
    x = torch.where(wide(pale < .1), grey(x), x)
    x = torch.where(wide(solar < .1) & (x >= .5), 1 - x, x)  # kornia, used by the original, varies the .5 by .1
    return cropped(x, .9, across, down)  # (B, 3, H, W)


@torch.no_grad()
def cache_targets(
    images: "Images | TarImages", cache_dir, indices, networks: dict, views: int = 2, device="cpu", folder=None,
    batch_size: int = 64,
) -> dict[str, TargetCache]:
    """Make sure that every image of `indices` has its targets; returns the caches by the networks' names.

    networks  some of "clip" (tokens), "vae" (latents), "teacher" (features of the image and of `views` changed copies)
    folder    where the caches lie, {cache_dir}/targets unless given
    The original draws a new changed copy at each step, by the teacher in the loop; our loop chooses one of `views`.
    With several processes, rank 0 calls this first while the others wait; they then find nothing missing.
    """
    encoders = {
        "clip": lambda network, images, rows: network.tokens(images),  # (B, S, D)
        "vae": lambda network, images, rows: encode_latents(network, images),  # (B, 4, L, L)
        "teacher": lambda network, images, rows: torch.stack(
            [network(augmented(images, rows, view)) for view in range(views + 1)], dim=1),  # (B, views+1, F, 512)
    }  # fmt: skip
    folder = Path(folder or Path(cache_dir) / "targets")
    folder.mkdir(parents=True, exist_ok=True)
    sample = np.max(indices, keepdims=True)  # the highest row: also checks that the image file has it
    caches = {}
    for name, network in networks.items():
        encode = partial(encoders[name], network.to(device).eval())
        shape = tuple(encode(images[sample].to(device), sample).shape[1:])
        key = f"{network_fingerprint(network)} {images.fingerprint()} {shape} {TARGETS_VERSION}"
        caches[name] = TargetCache(folder, name, encode, shape, hashlib.sha1(key.encode()).hexdigest()[:12])
    check_disk(folder, sum(len(cache.missing(indices)) * cache.row_bytes for cache in caches.values()))
    for cache in caches.values():
        cache.fill(images, indices, batch_size, device)
        cache.encode = None  # else the network would stay in memory as long as its cache
    return caches


# ---------------------------------------------------------------------------------------------------------------------
# Writers of the same formats, for the toy world and for your own subject

@contextmanager
def new_h5(path) -> Iterator[h5py.File]:
    """An HDF5 file to fill, in memory until it is whole: where a disk is full, HDF5 ends the process (SIGSEGV)."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        yield file
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def write_session_tar(path, behav, past, future, olds, start: int = 0):
    """One tar: behav (n, 17), past and future (n, 15, 17), olds (n, 3, 17), -1 = missing; keys count on from start."""
    tables = {"behav": behav[:, None], "past_behav": past, "future_behav": future, "olds_behav": olds}
    with replacing(path) as temporary, wds.TarWriter(str(temporary.absolute()), mtime=0) as tar:  # no clock in the file
        for i in range(len(behav)):
            members = {f"{name}.npy": np.asarray(table[i], np.float64) for name, table in tables.items()}
            tar.write({"__key__": f"sample{start + i:09d}", **members})


def behaviour_windows(table: np.ndarray, window: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """past (n, window, 17), future (n, window, 17), olds (n, 3, 17) of a subject's whole behav table (n, 17).

    past and future are the trials just before and after in the same session, nearest first, as released; olds the
    image's other trials in any session, in order of time. All are padded with -1 at the end (MindEye2 reads none of
    them). Rows may come in any order; test trials must be among them.
    """
    n, width = table.shape
    past, future = (np.full((n, window, width), -1.0) for _ in range(2))  # (n, window, 17)
    olds = np.full((n, 3, width), -1.0)  # (n, 3, 17)
    by_time = np.argsort(table[:, BETA], kind="stable")
    for session in np.unique(table[:, SESSION]):
        rows = by_time[table[by_time, SESSION] == session]
        for k, row in enumerate(rows):
            before, after = rows[max(0, k - window) : k], rows[k + 1 : k + 1 + window]
            past[row, : len(before)] = table[before][::-1]
            future[row, : len(after)] = table[after]
    _, group, counts = np.unique(table[by_time, IMAGE], return_inverse=True, return_counts=True)
    for rows in np.split(by_time[np.argsort(group, kind="stable")], np.cumsum(counts)[:-1]):
        for row in rows:
            others = rows[rows != row][:3]
            olds[row, : len(others)] = table[others]
    return past, future, olds


def write_array(name: str, dtype, path, array):
    with new_h5(path) as file:
        array = np.asarray(array, dtype)
        rows = max(1, 2**18 // max(1, array[:1].nbytes))  # chunks of whole rows, some 256 kB: a row is what gets read
        file.create_dataset(name, data=array, chunks=(min(rows, len(array)), *array.shape[1:]), track_times=False)


write_betas = partial(write_array, "betas", np.float32)  # (path, betas (all trials, V)), numpy or torch
write_images = partial(write_array, "images", np.float16)  # (path, images (n, 3, H, W) in [0, 1]), numpy or torch


def write_region_masks(path, masks: dict[int, dict[str, np.ndarray]]):
    """masks {subject: {region: (V,) bool}}."""
    with new_h5(path) as file:
        for subject, regions in masks.items():
            for region, mask in regions.items():
                file.create_dataset(f"subj0{subject}/{region}", data=np.asarray(mask, bool), track_times=False)


def main(argv: list[str] | None = None) -> object:
    """`python data.py download` is hub.py's, `prepare` and `check` are nsd.py's: they bring and judge the files."""
    import hub  # here: both import this file
    import nsd
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("data.py", description="Get, make or check the files of NSD.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("download", add_help=False, help="the released files, models and networks")
    nsd.add_commands(commands)
    if argv[:1] == ["download"]:
        return hub.main(argv)
    args = parser.parse_args(argv)
    return args.command(args)


if __name__ == "__main__":
    run_main(main)
