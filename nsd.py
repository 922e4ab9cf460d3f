"""From raw NSD, or from any other experiment, to the official files; and a check of them, whoever made them.

`prepare` reads the Natural Scenes Dataset as it lies on S3 (s3://natural-scenes-dataset, after its terms were signed):

    nsddata_betas/ppdata/subj01/func1pt8mm/{betas}/betas_session01.hdf5   'betas' (750, Z, Y, X) int16, percent x 300;
                                                                          or .nii.gz (X, Y, Z, 750)
    nsddata/ppdata/subj01/func1pt8mm/roi/nsdgeneral.nii.gz                (X, Y, Z): 1 = a voxel to keep
    nsddata/ppdata/subj01/func1pt8mm/roi/prf-visualrois.nii.gz            (X, Y, Z): 1..7 = V1v V1d V2v V2d V3v V3d hV4
    nsddata/ppdata/subj01/behav/responses.tsv                             a line a trial, in order of time
    nsddata/experiments/nsd/nsd_stim_info_merged.csv                      which images all saw; or nsd_expdesign.mat
    nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5                          'imgBrick' (73000, 425, 425, 3) uint8

and writes what data.py describes: betas, tars, images, region masks, and shared1000.npy (73000,) bool. One session is
in memory at a time: 1.3 GB at the peak with 40 sessions of subject 1. `write_subject` is the same for your own scanner.

    python data.py prepare --nsd_path RAW --data_path nsd --subj 1      minutes; once, some more for the pictures
    python data.py check --data_path nsd                                what is missing, damaged or does not fit
"""

import argparse
import io
import shutil
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas
import torch
from tqdm import tqdm

import data
from arrays import load_array
from data import BEHAV_COLUMNS, BETA, IMAGE, SESSION
from files import replacing, replacing_folder
from model import UserError, run_main

SUBJECT, RUN, TRIAL, SHARED = (BEHAV_COLUMNS.index(name) for name in ("subject", "run", "trial", "shared1000"))
SPACE = "func1pt8mm"  # the paper's 1.8 mm grid
VERSIONS = ("betas_fithrf_GLMdenoise_RR", "betas_fithrf")
AREAS = {"V1": (1, 2), "V2": (3, 4), "V3": (5, 6), "V4": (7,)}  # values in prf-visualrois
HELD_OUT = 3  # NSD's first release kept each subject's last three sessions back: hence the old, smaller test set
SESSIONS = {1: 40, 2: 40, 3: 32, 4: 30, 5: 40, 6: 32, 7: 40, 8: 30}
TEST_TRIALS = {"new_test": {1: 3000, 2: 3000, 3: 2371, 4: 2188, 5: 3000, 6: 2371, 7: 3000, 8: 2188},
               "test": {1: 2770, 2: 2770, 3: 2113, 4: 1985, 5: 2770, 6: 2113, 7: 2770, 8: 1985}}
NSD_TRIALS, NSD_IMAGES, NSD_SHARED = 750, 73000, 1000
MEND = "delete it, then get it again (data.py download) or make it anew (data.py prepare --overwrite)"

# ---------------------------------------------------------------------------------------------------------------------
# Reading raw NSD


def raw_file(nsd_path, *names: str) -> Path:
    """The first of these files (paths inside NSD) that exists. Raises UserError with the command that fetches it."""
    for name in names:
        if (Path(nsd_path) / name).is_file():
            return Path(nsd_path) / name
    path = Path(nsd_path) / names[0]
    raise UserError(f"{path} is missing: fetch it with `aws s3 cp --no-sign-request "
                    f"s3://natural-scenes-dataset/{names[0]} {path}`, or name another --nsd_path.")


def unreadable(path: Path, reason) -> UserError:
    return UserError(f"{path} cannot be used ({data.brief(reason)}): fetch it again into --nsd_path.")


def read_volume(path: Path, shape: tuple | None = None) -> np.ndarray:
    """A NIfTI volume (X, Y, Z). Raises UserError if it is damaged or not of `shape`."""
    try:
        volume = np.asanyarray(nibabel.load(path).dataobj)  # (X, Y, Z)
    except Exception as error:  # a damaged file leads its reader into errors of any type
        raise unreadable(path, error) from None
    if volume.ndim != 3 or shape not in (None, volume.shape):
        raise unreadable(path, f"shape {volume.shape}, nsdgeneral's is {shape}")
    return volume


def read_shared1000(nsd_path) -> np.ndarray:
    """(images,) bool: the 1000 images that were shown to all eight subjects. They are the test set."""
    folder = "nsddata/experiments/nsd/"
    path = raw_file(nsd_path, folder + "nsd_stim_info_merged.csv", folder + "nsd_expdesign.mat")
    try:
        if path.suffix == ".csv":
            info = pandas.read_csv(path, usecols=["nsdId", "shared1000"]).sort_values("nsdId")
            if not np.array_equal(info["nsdId"], np.arange(len(info))):
                raise ValueError("nsdId does not count from 0")
            return info["shared1000"].to_numpy().astype(bool)  # (images,)
        from scipy.io import loadmat
        shared = np.zeros(NSD_IMAGES, bool)
        shared[loadmat(path, variable_names=["sharedix"])["sharedix"].ravel().astype(int) - 1] = True  # from 1
        return shared
    except Exception as error:
        raise unreadable(path, error) from None


def read_responses(path: Path, subject: int, shared: np.ndarray, sessions: int | None = None) -> tuple[np.ndarray, int]:
    """The behav table (trials, 17) float64 of responses.tsv, in order of time; and how many sessions the file holds.

    As in the release: image from 0, global_trial = row of the betas, from 0 through all sessions; time in whole days
    since the first session's midnight; -1 where NSD has NaN (no button was pressed).
    """
    names = {name: {"cocoidx": "73KID"}.get(name, name.upper()) for name in BEHAV_COLUMNS}
    wanted = [column for name, column in names.items() if name not in ("global_trial", "shared1000")]
    try:
        frame = pandas.read_csv(path, sep="\t", usecols=wanted, dtype=np.float64)[wanted]
    except Exception as error:
        raise unreadable(path, error) from None
    told = frame[["73KID", "SUBJECT", "SESSION", "RUN", "TRIAL"]].to_numpy()
    session, image = frame["SESSION"].to_numpy(), frame["73KID"].to_numpy() - 1
    here = int(session.max()) if np.isfinite(told).all() and len(told) else 0
    if not here or not np.array_equal(np.unique(session), np.arange(1, here + 1)) or (np.diff(session) < 0).any():
        raise unreadable(path, "not a line for each trial of sessions 1, 2, .. in their order")
    counts = np.bincount(session.astype(int))[1:]  # (sessions,)
    if len(set(counts)) > 1 or (len(shared) == NSD_IMAGES and len(frame) != NSD_TRIALS * SESSIONS[subject]):
        raise unreadable(path, f"{len(frame)} lines; session {here} has {counts[-1]}, the first {counts[0]}")
    if (frame["SUBJECT"] != subject).any() or image.min() < 0 or image.max() >= len(shared):
        raise unreadable(path, f"not subject {subject} or 73KID outside 1..{len(shared)}")
    table = np.stack([frame[names[name]] if names[name] in frame else np.zeros(len(frame)) for name in BEHAV_COLUMNS],
                     axis=1)  # (trials, 17)
    table[:, IMAGE], table[:, BETA] = image, np.arange(len(frame))
    table[:, SHARED] = shared[image.astype(int)]
    time = BEHAV_COLUMNS.index("time")
    table[:, time] = np.trunc(table[:, time])
    table[np.isnan(table)] = -1
    count = here if sessions is None else sessions
    if not 1 <= count <= here:
        raise UserError(f"{path} has {here} sessions, not {sessions}: set --sessions between 1 and {here}.")
    return table[session <= count], here


def read_session(path: Path, mask: np.ndarray, trials: int) -> np.ndarray:
    """Betas of one session, (trials, V) float32 in percent, voxels in the mask's C order over (X, Y, Z), as released.

    HDF5 is read plane by plane, for its chunks hold one voxel each, and only the planes' part around the mask; a NIfTI
    file, 25 trials at a time. So the whole volume of 1.1 GB is never in memory.
    """
    x, y, z = np.nonzero(mask)
    betas = np.empty((trials, len(x)), np.float32)  # (trials, V)
    try:
        if path.suffix == ".hdf5":
            with h5py.File(path, "r") as file:
                volume = file["betas"]  # (trials, Z, Y, X)
                if volume.shape != (trials, *mask.shape[::-1]):
                    raise ValueError(f"shape {volume.shape}, not {(trials, *mask.shape[::-1])}")
                x0, y0 = x.min(), y.min()
                for plane in np.unique(z):
                    here = z == plane
                    part = volume[:, plane, y0 : y.max() + 1, x0 : x.max() + 1]  # (trials, y, x)
                    betas[:, here] = part[:, y[here] - y0, x[here] - x0]
        else:
            volume = nibabel.load(path, keep_file_open=True).dataobj  # (X, Y, Z, trials)
            if volume.shape != (*mask.shape, trials):
                raise ValueError(f"shape {volume.shape}, not {(*mask.shape, trials)}")
            for first in range(0, trials, 25):
                part = np.asanyarray(volume[..., first : first + 25])  # (X, Y, Z, 25)
                betas[first : first + 25] = part[mask].T
    except Exception as error:
        raise unreadable(path, error) from None
    if not np.isfinite(betas).all():
        raise unreadable(path, "NaN or infinite betas")
    return betas / 300


def read_masks(nsd_path, subject: int, version: str, min_ncsnr: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The voxels to keep (X, Y, Z) bool, and of these {region: (V,) bool}: nsd_general, V1..V4 and the rest."""
    roi = f"nsddata/ppdata/subj0{subject}/{SPACE}/roi"
    general = read_volume(raw_file(nsd_path, f"{roi}/nsdgeneral.nii.gz"))
    keep = general > 0  # (X, Y, Z); -1 and 0: not in the region
    if min_ncsnr > 0:
        ncsnr = f"ppdata/subj0{subject}/{SPACE}/{version}/ncsnr.nii.gz"
        keep &= read_volume(raw_file(nsd_path, f"nsddata_betas/{ncsnr}", f"nsddata/{ncsnr}"), keep.shape) >= min_ncsnr
    if not keep.any():
        raise UserError(f"no voxel of subject {subject}'s nsdgeneral.nii.gz is left: lower --min_ncsnr.")
    areas = read_volume(raw_file(nsd_path, f"{roi}/prf-visualrois.nii.gz"), keep.shape)[keep]  # (V,)
    masks = {"nsd_general": np.ones(len(areas), bool)}
    masks |= {area: np.isin(areas, values) for area, values in AREAS.items()}
    return keep, masks | {"higher_vis": ~np.any([masks[area] for area in AREAS], axis=0)}


def zscored(betas: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, int]:
    """(betas - mean) / deviation over the trials `train`, each voxel; and how many voxels are constant there.

    Those (outside the scanned slab in this session) are only shifted to 0: a deviation of 0 cannot be divided by.
    """
    seen = betas[train]  # (n, V)
    if not len(seen):
        raise UserError("a session has no training trial, so nothing can z-score it: set --zscore all.")
    constant = (seen == seen[0]).all(axis=0)  # (V,)
    mean, std = seen.mean(axis=0, dtype=np.float64), seen.std(axis=0, dtype=np.float64)
    return ((betas - mean) / np.where(constant, 1, std)).astype(np.float32), int(constant.sum())


def shrunk(images: torch.Tensor, size: int) -> np.ndarray:
    """(n, 3, H, W) uint8, or float in [0, 1] -> (n, 3, size, size) float16 in [0, 1].

    Bilinear with antialiasing: each new pixel is a mean of all old ones beneath it. How the release shrank 425 to 224
    pixels is not known: its pictures may differ from these by a few grey levels.
    """
    images = images / 255 if images.dtype == torch.uint8 else images.float()
    if images.shape[-2:] != (size, size):
        images = data.resized(images, size, antialias=True)
    return images.clamp(0, 1).half().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_rows(path, name: str, shape: tuple, dtype, blocks: Iterable[np.ndarray]):
    """An HDF5 file as data.write_array's, but filled block by block: what does not fit in memory can be written."""
    row_bytes = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
    chunk = min(max(1, 2**18 // row_bytes), shape[0])
    with replacing(path) as temporary:
        free = shutil.disk_usage(temporary.parent).free
        if shape[0] * row_bytes > free:  # while it writes, HDF5 would end the process
            raise UserError(f"{path} needs {shape[0] * row_bytes:,} bytes, the disk has {free:,} free: put --data_path "
                            "on a larger one.")
        with h5py.File(temporary, "w") as file:
            rows = file.create_dataset(name, shape, dtype, chunks=(chunk, *shape[1:]), track_times=False)
            first = 0
            for block in blocks:
                rows[first : first + len(block)] = block
                first += len(block)
            assert first == shape[0]


def write_trials(data_path, subject: int, table: np.ndarray, test: np.ndarray, old_test: np.ndarray):
    """All tars of a subject: table (n, 17), test and old_test (n,) bool; the other trials are for training.

    The k-th session that has training trials becomes train/k.tar. As released, past_behav and future_behav stop at the
    session's edge, not at a run's. The folder appears when it is complete.
    """
    past, future, olds = data.behaviour_windows(table)
    splits = {("train", k): ~test & (table[:, SESSION] == session)
              for k, session in enumerate(np.unique(table[~test, SESSION]))}
    splits |= {("new_test", 0): test, ("test", 0): old_test}
    final = data.session_tar(data_path, subject, "train").parents[1]
    start = 0
    with replacing_folder(final) as building:
        for (split, number), rows in splits.items():
            start = 0 if number == 0 else start  # the release counts samples on through the sessions
            if rows.any():
                tar = building / split / f"{number}.tar"
                data.write_session_tar(tar, table[rows], past[rows], future[rows], olds[rows], start)
            start += int(rows.sum())


def merge_masks(data_path, subject: int, masks: dict[str, np.ndarray]):
    """Put a subject's masks {region: (V,) bool} beside the others' in brain_region_masks.hdf5."""
    path = data.h5_path(data_path, "masks")
    with data.new_h5(path) as file:
        if path.exists():
            with h5py.File(path, "r") as old:
                for other in set(old) - {f"subj0{subject}"}:
                    old.copy(other, file)
        for region, mask in masks.items():
            file.create_dataset(f"subj0{subject}/{region}", data=np.asarray(mask, bool), track_times=False)


def load_shared(data_path) -> np.ndarray | None:
    """shared1000.npy (images,) bool, or None. Raises UserError if it is damaged."""
    path = Path(data_path) / "shared1000.npy"
    try:
        shared = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): {MEND}.") from None
    if shared.ndim != 1 or shared.dtype != bool:
        raise UserError(f"{path} is {shared.dtype} {shared.shape}, not bool (images,): {MEND}.")
    return shared


def save_shared(data_path, shared: np.ndarray):
    with replacing(Path(data_path) / "shared1000.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, shared)


def refuse_existing(data_path, subject: int, remedy: str):
    path = data.h5_path(data_path, "betas", subject)
    if path.exists():
        raise UserError(f"{path} is there already: {remedy}.")


def write_pictures(nsd_path, data_path, count: int, size: int = 224, block: int = 64):
    """coco_images_224_float16.hdf5 from NSD's pictures, once (22 GB). Raises UserError if too short a one is there."""
    path = data.h5_path(data_path, "images")
    if path.exists():
        if len(data.Images(data_path)) < count:
            raise UserError(f"{path} has fewer than NSD's {count} images: delete it, then it is made anew.")
        return
    source = raw_file(nsd_path, "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5")
    try:
        with h5py.File(source, "r") as file:
            brick = file["imgBrick"]  # (images, 425, 425, 3) uint8
            if len(brick) != count or brick.shape[3:] != (3,):
                raise ValueError(f"shape {brick.shape}, not ({count}, H, W, 3)")

            def blocks() -> Iterator[np.ndarray]:
                with tqdm(total=count, desc=f"pictures to {size} pixels", unit="image") as bar:
                    for first in range(0, count, block):
                        pixels = torch.from_numpy(brick[first : first + block]).permute(0, 3, 1, 2)
                        yield shrunk(pixels, size)  # (block, 3, size, size)
                        bar.update(len(pixels))

            write_rows(path, "images", (count, 3, size, size), np.float16, blocks())
    except (KeyError, ValueError) as error:
        raise unreadable(source, error) from None
    except OSError as error:
        if error.errno is not None:  # a full disk, say; HDF5's own errors about a damaged file have no number
            raise
        raise unreadable(source, error) from None


def prepare(nsd_path, data_path, subject: int, version: str = VERSIONS[0], zscore: str = "train",
            min_ncsnr: float = 0, sessions: int | None = None, overwrite: bool = False) -> dict[str, int]:
    """Raw NSD of one subject -> the official files; returns counts. Raises UserError if a raw file is missing or bad.

    zscore  "train": mean and deviation of each voxel over the session's training trials; "all": over all its trials.
            The release's notebook does the latter, although its comment and paper A.2 leave the test trials out.
            A.2 names the whole training set; that it is done by session is the notebook's.
    All raw files are looked for first. The betas, which tell that a subject is complete, get their name last.
    """
    if not overwrite:
        refuse_existing(data_path, subject, "pass --overwrite to make it anew, or another --data_path")
    shared = read_shared1000(nsd_path)  # (images,)
    table, total = read_responses(raw_file(nsd_path, f"nsddata/ppdata/subj0{subject}/behav/responses.tsv"), subject,
                                  shared, sessions)
    keep, masks = read_masks(nsd_path, subject, version, min_ncsnr)
    stem = f"nsddata_betas/ppdata/subj0{subject}/{SPACE}/{version}/betas_session"
    files = {int(s): raw_file(nsd_path, f"{stem}{int(s):02d}.hdf5", f"{stem}{int(s):02d}.nii.gz")
             for s in np.unique(table[:, SESSION])}
    before = load_shared(data_path)
    if before is not None and not np.array_equal(before[: len(shared)], shared):
        raise UserError(f"{data_path}/shared1000.npy names other test images than {nsd_path}: set another --data_path.")

    write_pictures(nsd_path, data_path, len(shared))
    if before is None:
        save_shared(data_path, shared)
    merge_masks(data_path, subject, masks)
    test = table[:, SHARED] > 0  # (n,)
    counts = {"trials": len(table), "voxels": int(keep.sum()), "constant": 0}

    def blocks() -> Iterator[np.ndarray]:
        for session, path in tqdm(files.items(), desc=f"betas of subject {subject}", unit="session"):
            here = table[:, SESSION] == session
            betas = read_session(path, keep, int(here.sum()))  # (750, V)
            betas, constant = zscored(betas, ~test[here] if zscore == "train" else np.ones(len(betas), bool))
            counts["constant"] += constant
            yield betas
        old_test = test & (table[:, SESSION] <= max(1, total - HELD_OUT))
        counts.update(train=int((~test).sum()), new_test=int(test.sum()), test=int(old_test.sum()))
        write_trials(data_path, subject, table, test, old_test)  # here: just before the betas get their name

    write_rows(data.h5_path(data_path, "betas", subject), "betas", (len(table), counts["voxels"]), np.float32, blocks())
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Another dataset


def append_pictures(data_path, images: torch.Tensor, size: int) -> int:
    """Put pictures (n, 3, H, W) behind those of the images file, or begin it; returns the row of the first new one.

    A whole new file is written and takes the old one's place: for NSD's 22 GB that takes a minute, but nothing can
    break.
    """
    path, known = data.h5_path(data_path, "images"), 0
    if path.exists():
        old = data.Images(data_path)
        known, size = len(old), old.size

    def blocks(chunk: int = 64) -> Iterator[np.ndarray]:
        for first in tqdm(range(0, known, chunk), desc="pictures of others", delay=2, leave=False):
            yield old[np.arange(first, min(first + chunk, known))].half().numpy()  # (chunk, 3, size, size)
        for first in range(0, len(images), chunk):
            yield shrunk(images[first : first + chunk], size)  # (chunk, 3, size, size)

    write_rows(path, "images", (known + len(images), 3, size, size), np.float16, blocks())
    return known


def mistake(voxels, images, row, session, test, count: int, shared) -> str:
    """What is wrong with write_subject's arrays, or ""; shared (count,) bool: others' test pictures, or None."""
    if not voxels.size:
        return f"voxels {voxels.shape} hold nothing"
    if voxels.ndim != 2 or not len(voxels) == len(row) == len(session) == len(test):
        return f"voxels {voxels.shape} do not have a row for each of {len(row)}, {len(session)}, {len(test)} trials"
    if not np.isfinite(voxels).all():
        return "voxels hold NaN or infinity"
    if images is not None and (images.ndim != 4 or images.shape[1] != 3):
        return f"pictures are {tuple(images.shape)}, not (n, 3, H, W)"
    if images is not None and images.dtype != torch.uint8 and not (images.amin() >= 0 and images.amax() <= 1):
        return "pictures are neither uint8 nor within [0, 1]"
    if row.min() < 0 or row.max() >= count:
        return f"image_of_trial names picture {row[(row < 0) | (row >= count)][0]}, there are {count}"
    if session[0] < 1 or (np.diff(session) < 0).any():
        return "trials are not in order of session, from 1"
    if test.all() or not test.any():
        return "trials are all for training, or all for testing"
    if np.isin(row[test], row[~test]).any():
        return "pictures for training are for testing too"
    if shared is not None and (shared[row] != test).any():
        return "test pictures are others' training pictures, or the reverse (shared1000.npy has the test pictures)"
    return ""


def write_subject(data_path, subject: int, voxels, images, image_of_trial, session, is_test, size: int = 224):
    """Turn one person's scans into the official files, so that train.py, recon.py and the others can read them.

    voxels          (trials, V) one response a trial, in order of time, in any unit; no NaN. Drifts between sessions
                    are yours to remove. Here, each voxel is z-scored over the training trials (paper A.2).
    images          (n, 3, H, W) uint8, or float in [0, 1], resized to the folder's size (or `size`) and added to its
                    images file; None: the pictures are there already
    image_of_trial  (trials,) row of `images`; if that is None, of the images file
    session         (trials,) from 1, never falling;  is_test (trials,) bool: trials of pictures kept for testing
    Raises UserError if lengths do not fit, if a picture is both for training and for testing (by anyone in the
    folder), or if the subject is there already.
    """
    voxels = np.asarray(voxels, np.float32)  # (n, V)
    row, session, test = np.asarray(image_of_trial, int), np.asarray(session, int), np.asarray(is_test, bool)  # (n,)
    images = None if images is None else torch.as_tensor(images)
    known = len(data.Images(data_path)) if data.h5_path(data_path, "images").exists() else 0
    shared, before = np.zeros(known + (0 if images is None else len(images)), bool), load_shared(data_path)
    if before is not None:
        shared[: len(before[:known])] = before[:known]
    refuse_existing(data_path, subject, "choose another number, or delete it")
    bad = mistake(voxels, images, row, session, test, known if images is None else len(images),
                  shared if images is None and before is not None else None)
    if bad:
        raise UserError(f"subject {subject}'s {bad}: mend what write_subject is given.")

    voxels, _ = zscored(voxels, ~test)
    if images is not None:
        row = row + append_pictures(data_path, images, size)
    shared[row[test]] = True
    save_shared(data_path, shared)
    table, order = np.full((len(row), len(BEHAV_COLUMNS)), -1.0), np.arange(len(row))  # (n, 17), (n,)
    trial = order - np.searchsorted(session, session)  # from 0 in each session
    for column, values in ((IMAGE, row), (SUBJECT, subject), (SESSION, session), (RUN, 1), (TRIAL, trial + 1),
                           (BETA, order), (SHARED, test)):
        table[:, column] = values
    merge_masks(data_path, subject, {"nsd_general": np.ones(voxels.shape[1], bool)})
    write_trials(data_path, subject, table, test, test)
    data.write_betas(data.h5_path(data_path, "betas", subject), voxels)


# ---------------------------------------------------------------------------------------------------------------------
# Checking: each function yields (what was looked at, what is wrong with it and what mends it; "" = nothing)

Findings = Iterator[tuple[str, str]]


def problem(bad: bool, text: str) -> str:
    return f"{text}: {MEND}" if bad else ""


def check_images(data_path, samples: int = 64) -> Findings:
    """Is the images file whole, of NSD's size and type, and are some of its pictures readable and within [0, 1]?"""
    path = data.h5_path(data_path, "images")
    try:
        images = data.Images(data_path)
        size = tuple(images._open().shape)
    except UserError as error:
        yield path.name, str(error)
        return
    what = f"{path.name}: {size[0]} pictures of {size[2]} x {size[3]} pixels"
    odd = size[0] >= NSD_IMAGES and size[2] != 224
    yield what, problem(odd or not size[0], "there are none, or they are not 224 pixels wide")
    yield f"{path.name}: type", problem(images._open().dtype != np.float16, f"{images._open().dtype}, not float16")
    rows = np.unique(np.linspace(0, len(images) - 1, samples).astype(int))
    lows, highs = [], []
    for row in rows:
        try:
            picture = images[row]
        except UserError as error:  # damaged there, or NaN
            yield f"{path.name}: row {row}", str(error)
            return
        lows.append(float(picture.amin()))
        highs.append(float(picture.amax()))
    lows, highs = np.array(lows), np.array(highs)
    what = f"{path.name}: values of {len(rows)} pictures"
    if lows.min() < 0 or highs.max() > 1:
        yield what, problem(True, f"from {lows.min():g} to {highs.max():g}, not within [0, 1]")
    else:  # rows that were never written read as zeros
        blank = rows[lows == highs]
        yield what, problem(len(blank) > 1, f"{len(blank)} are of one colour, the first is row {[*blank, 0][0]}")


def check_shared(data_path, images: int | None) -> tuple[np.ndarray | None, tuple[str, str]]:
    """The (images,) bool of test images, None if it is no good; and what was found."""
    try:
        shared = load_shared(data_path)
    except UserError as error:
        return None, ("shared1000.npy", str(error))
    if shared is None:
        return None, ("shared1000.npy: not there, as after the original's download; column 16 of the tars says it", "")
    if images not in (None, len(shared)):
        return None, ("shared1000.npy", problem(True, f"has {len(shared)} rows for {images} images"))
    count = int(shared[:NSD_IMAGES].sum())
    odd = count != NSD_SHARED if len(shared) >= NSD_IMAGES else count == 0
    return shared, (f"shared1000.npy: {count} test images", problem(odd, f"not NSD's {NSD_SHARED}, or none at all"))


def check_masks(data_path, subject: int, voxels: int | None, nsd: bool) -> Findings:
    """Are the regions there, none of them empty, and each as long as the betas are wide?"""
    path = data.h5_path(data_path, "masks")
    try:
        masks = data.load_region_masks(data_path, subject)
    except UserError as error:
        yield f"{path.name}: subject {subject}", str(error)
        return
    wanted = ["nsd_general", *AREAS, "higher_vis"] if nsd or len(masks) > 1 else ["nsd_general"]
    absent = [region for region in wanted if region not in masks]
    lengths = {region: mask.shape for region, mask in masks.items() if voxels and mask.shape != (voxels,)}
    empty = [region for region, mask in masks.items() if not mask.any()]
    bad = problem(bool(absent), f"no region {', '.join(absent)}")
    bad = bad or problem(bool(lengths), f"{lengths} do not fit the {voxels} voxels of the betas")
    yield f"{path.name}: subject {subject}, {', '.join(masks)}", bad or problem(bool(empty), f"no voxel in {empty}")


def check_betas(data_path, subject: int, block: int = 512) -> tuple[tuple | None, list[tuple[str, str]]]:
    """Shape (or None if there is nothing to read), and findings: every value is read once, a block at a time."""
    path = data.h5_path(data_path, "betas", subject)
    try:
        file, betas = data.open_h5(path, "betas")
    except UserError as error:
        return None, [(path.name, str(error))]
    with file:
        if betas.ndim != 2 or betas.dtype.kind != "f":
            return None, [(path.name, problem(True, f"{betas.dtype} {betas.shape}, not float32 (trials, V)"))]
        (n, voxels), dtype = betas.shape, betas.dtype
        total, squares, broken, blank = 0.0, 0.0, [], []
        try:
            for first in tqdm(range(0, n, block), desc=f"betas of subject {subject}", delay=2, leave=False):
                part = betas[first : first + block].astype(np.float64)  # (block, V)
                finite = np.isfinite(part).all(axis=1)
                broken += (first + np.flatnonzero(~finite)).tolist()
                blank += (first + np.flatnonzero(~part.any(axis=1))).tolist()
                total, squares = total + part[finite].sum(), squares + (part[finite] ** 2).sum()
        except OSError as error:
            return None, [(path.name, problem(True, f"damaged ({str(error)[:80]})"))]
    mean = total / max(1, n * voxels)
    std = np.sqrt(max(0, squares / max(1, n * voxels) - mean**2))
    odd = not (abs(mean) < .2 and .5 < std < 2)
    return (n, voxels), [
        (f"{path.name}: {n} x {voxels}", problem(not n * voxels, "empty")),
        (f"{path.name}: type", problem(dtype.itemsize > 4, f"{dtype}, not float32")),
        (f"{path.name}: finite", problem(bool(broken), f"NaN in {len(broken)} rows, the first is {[*broken, 0][0]}")),
        (f"{path.name}: written", problem(bool(blank), f"{len(blank)} rows of zeros, the first is {[*blank, 0][0]}")),
        (f"{path.name}: z-scored", problem(odd, f"mean {mean:.2f} and deviation {std:.2f} are not 0 and 1")),
    ]


def check_tar(data_path, subject: int, split: str, number: int) -> tuple[np.ndarray | None, str]:
    """The tar's behav (n, 17) and what is wrong with it. Of its other members, the first trial's are looked at."""
    path = data.session_tar(data_path, subject, split, number)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*lacks tar's end mark")
            behav = data.read_behav(path)
    except (UserError, UserWarning) as error:
        return None, str(error)
    shapes = {"past_behav.npy": (15, 17), "future_behav.npy": (15, 17), "olds_behav.npy": (3, 17)}
    with tarfile.open(path) as tar:
        first = tar.next().name.partition(".")[0]
        members = {}
        for name in shapes:
            try:
                members[name] = np.load(io.BytesIO(tar.extractfile(f"{first}.{name}").read()))
            except Exception:
                return behav, problem(True, f"{first} has no {name}")
    for name, shape in shapes.items():
        if members[name].shape != shape:
            return behav, problem(True, f"{first}.{name} is {members[name].shape}, not {shape}")
    olds = members["olds_behav.npy"]
    others = set(olds[olds[:, BETA] >= 0, IMAGE]) - {behav[0, IMAGE]}
    return behav, problem(bool(others), f"{first}.olds_behav.npy holds trials of another image than its own")


def check_trials(data_path, subject: int, rows: int | None, images: int | None, shared, nsd: bool) -> Findings:
    """The tars, and whether what they name exists, once each, in order, and apart from each other."""
    name, tables = f"wds/subj0{subject}", {}
    try:
        numbers = range(data.count_sessions(data_path, subject))
    except UserError as error:
        yield f"{name}/train", str(error)
        return
    wrong = False
    for split, number in [*(("train", k) for k in numbers), ("new_test", 0), ("test", 0)]:
        behav, bad = check_tar(data_path, subject, split, number)
        if behav is not None:
            tables[split] = np.concatenate([tables[split], behav]) if split in tables else behav
        wrong = wrong or behav is None
        if bad or split != "train":
            yield f"{name}/{split}/{number}.tar", bad
    if wrong:
        return  # what follows would accuse whole files
    train, new, old = (tables[split] for split in ("train", "new_test", "test"))
    everything = np.concatenate([train, new])  # (n, 17)
    yield f"{name}/train: {len(numbers)} tars, {len(train)} trials", ""
    yield from check_columns(name, subject, train, new, old, len(numbers))
    beta = everything[:, BETA].astype(int)
    if rows is not None:
        outside = beta[beta >= rows]
        yield f"{name}: rows of betas", problem(len(outside) > 0, f"row {[*outside, 0][0]} is named, there are {rows}")
        unused = rows - len(np.unique(beta[beta < rows]))
        yield f"{name}: a trial for each row of betas", problem(unused > 0, f"{unused} rows have no trial")
    if images is not None:
        outside = everything[everything[:, IMAGE] >= images, IMAGE].astype(int)
        yield f"{name}: images", problem(len(outside) > 0, f"image {[*outside, 0][0]} is named, there are {images}")
        if shared is not None and not len(outside):
            other = shared[everything[:, IMAGE].astype(int)] != (everything[:, SHARED] > 0)
            yield f"{name}: shared1000.npy", problem(other.any(), f"{other.sum()} trials say otherwise in column 16")
    if nsd:
        yield from check_counts(name, subject, rows, len(numbers), new, old)


def check_columns(name: str, subject: int, train: np.ndarray, new: np.ndarray, old: np.ndarray,
                  tars: int) -> Findings:
    """Subject, session, betas row, order and split of the trials (n, 17) of all tars: do they agree?"""
    everything = np.concatenate([train, new])  # (n, 17)
    other = (everything[:, SUBJECT] != subject).sum()
    yield f"{name}: column 1, the subject", problem(other > 0, f"{other} trials of another subject")
    jumbled = (np.diff(train[:, SESSION]) < 0).any() or len(np.unique(train[:, SESSION])) != tars
    yield f"{name}: column 2, the session", problem(jumbled, "not one session a tar, in their order")
    beta, count = np.unique(everything[:, BETA], return_counts=True)
    twice = beta[count > 1].astype(int)
    yield f"{name}: column 5, global_trial", problem(len(twice) > 0, f"row {[*twice, 0][0]} of the betas belongs to "
                                                                     f"{count.max()} trials")
    by_time = np.lexsort(everything[:, [TRIAL, RUN, SESSION]].T)  # the last key counts most
    swapped = int((np.diff(everything[by_time, BETA]) <= 0).sum())
    yield f"{name}: order of trials", problem(swapped > 0, f"global_trial falls {swapped} times where session, run and "
                                                           "trial rise")
    both = np.intersect1d(train[:, IMAGE], new[:, IMAGE])
    flags = (train[:, SHARED] > 0).sum() + (new[:, SHARED] <= 0).sum()
    bad = problem(len(both) > 0, f"{len(both)} images are in train and in new_test")
    yield f"{name}: train and test apart", bad or problem(flags > 0, f"{flags} trials with a wrong column 16")
    rows = {tuple(row) for row in new[:, [IMAGE, BETA]]}
    strange = sum(tuple(row) not in rows for row in old[:, [IMAGE, BETA]])
    yield f"{name}: test within new_test", problem(strange > 0, f"{strange} trials of test are not in new_test")


def check_counts(name: str, subject: int, rows: int | None, tars: int, new: np.ndarray, old: np.ndarray) -> Findings:
    """NSD only: the released numbers of sessions and trials."""
    trials = NSD_TRIALS * SESSIONS[subject]
    yield f"{name}: {tars} sessions", problem(tars != SESSIONS[subject], f"NSD has {SESSIONS[subject]}")
    if rows is not None:
        yield f"{name}: {rows} rows of betas", problem(rows != trials, f"NSD has {trials}")
    for split, table in (("new_test", new), ("test", old)):
        wanted = TEST_TRIALS[split][subject]
        yield f"{name}: {len(table)} trials in {split}", problem(len(table) != wanted, f"the release has {wanted}")


def check_pairing(data_path, subject: int) -> Findings:
    """Do a test image's repetitions look alike in the voxels? If not, images and betas are not of the same trials."""
    what = f"subject {subject}: images and betas of the same trials"
    try:
        trials = data.load_trials(data_path, subject, "new_test")
        voxels = data.load_voxels(data_path, trials).numpy()  # (n, V)
    except UserError:
        return  # said already
    groups = [rows for rows in data.repeats(trials)[1] if len(rows) > 1]
    if len(groups) < 8:
        return  # nothing to tell
    voxels -= voxels.mean(axis=1, keepdims=True)
    voxels /= np.linalg.norm(voxels, axis=1, keepdims=True).clip(1e-9)
    first, again = np.array([rows[:2] for rows in groups]).T  # (images,)
    same = (voxels[first] * voxels[again]).sum(axis=1)
    other = (voxels[first] * voxels[np.roll(again, 1)]).sum(axis=1)
    score = (same.mean() - other.mean()) / np.sqrt((same.var() + other.var()) / len(same)).clip(1e-9)
    text = f"repetitions of an image correlate by {same.mean():.3f}, trials of different images by {other.mean():.3f}"
    yield f"{what} ({text})", problem(score < 3, "no more alike than chance, so rows are shifted or shuffled")


def check_evals(data_path, nsd: bool) -> Findings:
    """The test images and captions that evaluations compare with: optional, but if there, then equally many."""
    counts, mend = {}, "delete it and do without, or get it again (data.py download)"
    for name in ("all_images.pt", "all_captions.pt", "all_git_generated_captions.pt"):
        path = Path(data_path) / "evals" / name
        if not path.exists():
            continue
        try:
            if name == "all_images.pt":  # up to 600 MB: only mapped
                counts[name] = len(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
            else:
                counts[name] = len(load_array(path, mend))
        except Exception as error:
            yield f"evals/{name}", f"unreadable ({data.brief(error)}): {mend}"
    wanted = NSD_SHARED if nsd else max(counts.values(), default=0)
    for name, count in counts.items():
        yield f"evals/{name}: {count}", f"there should be {wanted}: {mend}" if count != wanted else ""


def check_subject(data_path, subject: int, images: int | None, shared: np.ndarray | None) -> Findings:
    """Betas, masks and tars of one person; if each is good, whether rows and images belong together."""
    nsd = bool(images and images >= NSD_IMAGES and subject in SESSIONS)
    shape, findings = check_betas(data_path, subject)
    yield from findings
    rows, voxels = shape or (None, None)
    yield from check_masks(data_path, subject, voxels, nsd)
    good = shape is not None
    for what, bad in check_trials(data_path, subject, rows, images, shared, nsd):
        good = good and not bad
        yield what, bad
    if good:
        yield from check_pairing(data_path, subject)


def check(data_path, subjects: Iterable[int] | None = None) -> list[tuple[str, str]]:
    """Print a line for each thing looked at; returns those that are wrong, as (what, what is wrong and what mends it).

    For a folder of NSD's size (73,000 images), the numbers of sessions and trials must be the release's; any other
    is only held against itself. Raises UserError if there is no subject at all.
    """
    data_path = Path(data_path)
    if subjects is None:
        names = [path.name for pattern in ("betas_all_subj0*_fp32_renorm.hdf5", "wds/subj0*")
                 for path in data_path.glob(pattern)]
        found = (name.partition("subj0")[2].partition("_")[0] for name in names)
        subjects = sorted({int(number) for number in found if number.isdigit()})
    if not subjects:
        raise UserError(f"{data_path} has no subject (no betas_all_subj01_fp32_renorm.hdf5 ..): set --data_path.")
    wrong = []

    def say(findings: Iterable[tuple[str, str]]):
        for what, bad in findings:
            tqdm.write(f"WRONG  {what}: {bad}" if bad else f"ok     {what}")
            wrong.extend([(what, bad)] if bad else [])

    say(check_images(data_path))
    try:
        images = len(data.Images(data_path))
    except UserError:
        images = None
    shared, finding = check_shared(data_path, images)
    say([finding])
    say(check_evals(data_path, (images or 0) >= NSD_IMAGES))
    for subject in subjects:
        say(check_subject(data_path, subject, images, shared))
    say((str(path.relative_to(data_path)), "left by a killed run: delete it, unless something is writing it now")
        for path in sorted([*data_path.glob("*.tmp"), *data_path.glob("wds/*.building")]))
    return wrong


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def add_commands(commands):
    """Add `prepare` and `check` to an argparse subparsers object; args.command then runs what was chosen."""
    p = commands.add_parser("prepare", help="raw NSD -> the official files",
                            description="Raw NSD of one subject -> the official files.",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--nsd_path", required=True, help="folder that holds nsddata/, nsddata_betas/ and nsddata_stimuli/")
    p.add_argument("--data_path", default="nsd", help="folder to write to; what others wrote there stays")
    p.add_argument("--subj", type=int, default=1, choices=SESSIONS, help="NSD's subject; 1, 2, 5 and 7 in the paper")
    p.add_argument("--betas", default=VERSIONS[0], choices=VERSIONS,
                   help="how NSD estimated the responses: the first is GLMsingle with all its steps (the paper says "
                        "GLMsingle), the second leaves denoising out (the release's notebook)")
    p.add_argument("--zscore", default="train", choices=("train", "all"),
                   help="trials whose mean and deviation each voxel of a session is scaled by: train = those for "
                        "training only (the paper's, but all sessions at once); all = the test trials too, the "
                        "release's notebook")
    p.add_argument("--min_ncsnr", type=float, default=0,
                   help="drop voxels below this ratio of signal to noise; 0: keep all of nsdgeneral, as the paper did "
                        "(15,724 of subject 1)")
    p.add_argument("--sessions", type=int, help="only this many sessions, from the first; none: all of responses.tsv")
    p.add_argument("--overwrite", action="store_true", help="make this subject's files anew if they are there")
    p.set_defaults(command=prepare_command)
    p = commands.add_parser("check", help="look for missing, damaged and mixed-up files",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data_path", default="nsd", help="folder of the official files")
    p.add_argument("--subjects", type=int, nargs="+", help="numbers of the subjects; none: all that are there")
    p.set_defaults(command=check_command)


def prepare_command(args: argparse.Namespace):
    counts = prepare(args.nsd_path, args.data_path, args.subj, args.betas, args.zscore, args.min_ncsnr, args.sessions,
                     args.overwrite)
    print(f"Subject {args.subj}: {counts['trials']:,} trials of {counts['voxels']:,} voxels: {counts['train']:,} to "
          f"train, {counts['new_test']:,} in new_test, {counts['test']:,} in test. {counts['constant']:,} times a "
          "voxel was constant through a session, and became 0.\n"
          f"Now: python data.py check --data_path {args.data_path} --subjects {args.subj}")


def check_command(args: argparse.Namespace):
    if wrong := check(args.data_path, args.subjects):
        raise UserError(f"{len(wrong)} things are wrong in {args.data_path}: the lines marked WRONG say what helps.")
    print(f"{args.data_path} is as it should be.")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    args = parser.parse_args(argv)
    return args.command(args)


if __name__ == "__main__":
    run_main(main)
