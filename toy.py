"""Build the toy world, a small NSD with eight synthetic people, and run every stage of MindEye2 on it.

Scenes -> brains -> files in the official formats (data.py) beside tiny frozen networks (toy_networks/), then the
paper's claim as an experiment: a model pretrained on seven people, then shown one session of the eighth, against one
that has only that session, and one that has all of them. No stage knows that this is a toy: each reads a folder.

    python toy.py                  # 12 minutes on 2 cores; toy/results.json, toy/headline.png, report.html
    python toy.py --seed 0 1 2     # two more worlds, brains and sets of models: how far does chance carry the table?
    python toy.py --claims         # the paper's other claims, in smaller worlds, 40 minutes: claims.py
    python toy.py --smoke          # everything at its smallest, for tests
    python toy.py --train_frozen   # train the frozen networks anew first (toy_networks.py)

What decides whether the experiment can show anything, found by trying (numbers in README.md):
* Data must be the limit, not steps. A model from scratch that trains for a fifth of its time looks hopeless; trained
  out, it is less bad. So every model trains until its retrieval is flat on validation.
* CLIP's tokens must be made of what people see: a prior learns first what explains most of their variance, and what
  explains 1 % it never learns. Here colour and shape make a fifth each (toy_networks.py), and pretraining finds 7 to
  11 times the pictures.
* Voxels must be many and noisy, the code behind them small and not linear in the picture: of few pictures, one can
  learn who mixes the code how, but not what the code means. The less linear, the larger the gap, and the worse all
  pictures (tanh(.3 x) in `image_code` draws better and narrows the gap). More noise does not widen it.
"""
import argparse
import hashlib
import json
import math
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import files
import gnet
import nsd
from model import UserError

NETWORKS = Path(__file__).with_name("toy_networks")  # the shipped weights, made by toy_networks.py

# ----------------------------------------------------------------------------------------------------------------------
# Scenes: what the people look at
# ----------------------------------------------------------------------------------------------------------------------
SHAPES = ("ball", "box", "cone", "star", "heart", "cross", "ring", "diamond")
COLOURS = {"red": (.90, .10, .13), "orange": (.97, .55, .08), "yellow": (.98, .90, .20), "green": (.08, .62, .20),
           "blue": (.12, .30, .92), "purple": (.56, .16, .74), "white": (.97, .97, .97), "pink": (.98, .58, .76)}
SIZES = {"small": .17, "large": .27}  # radius, in picture widths
GROUNDS = {"grass": (.34, .68, .22), "sand": (.90, .78, .50), "snow": (.88, .92, .97), "water": (.10, .36, .56),
           "mud": (.42, .29, .22)}
SKIES = {"by day": ((.22, .50, .95), (.80, .91, 1.0)), "at sunset": ((.42, .20, .52), (1.0, .62, .30)),
         "at night": ((.03, .03, .14), (.13, .15, .34)), "in fog": ((.62, .65, .68), (.84, .85, .85))}


@dataclass
class Scenes:
    """What is in each of n pictures. Objects are ordered left to right; a missing second object has count 1."""
    count: torch.Tensor  # (n,) 1 or 2
    shape: torch.Tensor  # (n, 2) index into SHAPES
    colour: torch.Tensor  # (n, 2) index into COLOURS
    size: torch.Tensor  # (n, 2) index into SIZES
    place: torch.Tensor  # (n, 2, 2) centre (x, y) in [0, 1], y down
    ground: torch.Tensor  # (n,)
    sky: torch.Tensor  # (n,)
    horizon: torch.Tensor  # (n,) in [0, 1], from the top

    def captions(self) -> list[str]:
        """One sentence a scene: "a small purple cone and a large green star on grass at night"."""
        colours, sizes, grounds, skies = map(list, (COLOURS, SIZES, GROUNDS, SKIES))
        sentences = []
        for i in range(len(self.count)):
            things = [f"a {sizes[self.size[i, k]]} {colours[self.colour[i, k]]} {SHAPES[self.shape[i, k]]}"
                      for k in range(int(self.count[i]))]
            sentences.append(f"{' and '.join(things)} on {grounds[self.ground[i]]} {skies[self.sky[i]]}")
        return sentences


def draw_scenes(n: int, seed: int) -> Scenes:
    """n random scenes, the same for the same (n, seed)."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda options, *shape: torch.randint(0, len(options), shape, generator=g)  # noqa: E731
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(shape, generator=g)  # noqa: E731
    count = 1 + (torch.rand(n, generator=g) < .3).long()
    x = torch.stack([torch.where(count == 1, uniform(.2, .8, n), uniform(.18, .34, n)), uniform(.66, .82, n)], 1)
    y = uniform(.36, .72, n, 2)
    return Scenes(count, pick(SHAPES, n, 2), pick(COLOURS, n, 2), pick(SIZES, n, 2), torch.stack([x, y], -1),
                  pick(GROUNDS, n), pick(SKIES, n), uniform(.42, .66, n))


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance to a shape's outline in units of its radius: negative inside. x to the right, y up, centre (0, 0)."""
    ax, ay, r = x.abs(), y.abs(), torch.hypot(x, y)
    if shape == "ball":
        return r - .88
    if shape == "box":
        return torch.maximum(ax, ay) - .76
    if shape == "cone":
        return torch.maximum(.894 * ax + .447 * y - .42, -y - .78)
    if shape == "star":  # fold the plane onto a tenth of it: one straight edge from an outer to an inner corner
        angle = torch.remainder(torch.atan2(x, y), 2 * math.pi / 5)
        angle = torch.minimum(angle, 2 * math.pi / 5 - angle)
        inner = .45 * math.cos(math.pi / 5), .45 * math.sin(math.pi / 5)
        nx, ny = inner[1], 1.05 - inner[0]
        return ((r * angle.cos() - 1.05) * nx + r * angle.sin() * ny) / math.hypot(nx, ny)
    if shape == "heart":  # a square on its tip with a half disc on each upper side
        y = y + .12
        return torch.minimum((ax + y.abs() - .78) / math.sqrt(2), torch.hypot(ax - .39, y - .39) - .5515)
    if shape == "cross":
        return torch.minimum(torch.maximum(ax - .92, ay - .32), torch.maximum(ax - .32, ay - .92))
    if shape == "ring":
        return (r - .64).abs() - .26
    return (1.45 * ax + ay - 1) / 1.76  # diamond


def render(scenes: Scenes, size: int = 64, device: str = "cpu", chunk: int = 2048) -> torch.Tensor:
    """Pictures of the scenes, uint8 (n, 3, size, size): sky, ground, then each object with its shadow and rim."""
    palette = {name: torch.tensor(list(table.values()), device=device)
               for name, table in (("colour", COLOURS), ("ground", GROUNDS), ("sky", SKIES))}
    radii = torch.tensor(list(SIZES.values()), device=device)
    grid = (torch.arange(size, device=device) + .5) / size
    py, px = torch.meshgrid(grid, grid, indexing="ij")
    pictures = []
    parts = torch.arange(len(scenes.count)).split(chunk)
    for part in tqdm(parts, desc="scenes", leave=False, disable=len(parts) < 3):
        s = Scenes(*[getattr(scenes, f.name)[part].to(device) for f in fields(Scenes)])
        wide = lambda t: t.reshape(-1, 1, 1)  # noqa: E731  broadcast a number a scene over its pixels
        sky, horizon = palette["sky"][s.sky], wide(s.horizon)  # (b, 2, 3)
        blend = (py / horizon).clamp(0, 1)[:, None]  # (b, 1, size, size)
        image = sky[:, 0, :, None, None] * (1 - blend) + sky[:, 1, :, None, None] * blend  # (b, 3, size, size)
        # The sky lights the ground: at night a field is dark, at sunset warm.
        light = (.35 + .65 * sky.mean(1))[:, :, None, None]
        depth = (1 - .35 * ((py - horizon) / (1 - horizon)).clamp(0, 1))[:, None]
        ground = palette["ground"][s.ground][:, :, None, None] * light * depth
        image = torch.lerp(image, ground, ((py - horizon) * size).add(.5).clamp(0, 1)[:, None])
        for k in range(2):
            radius, cx, cy = wide(radii[s.size[:, k]]), wide(s.place[:, k, 0]), wide(s.place[:, k, 1])
            x, y = (px - cx) / radius, (cy - py) / radius  # (b, size, size)
            distance = torch.empty_like(x)
            for i, name in enumerate(SHAPES):
                rows = s.shape[:, k] == i
                distance[rows] = signed_distance(name, x[rows], y[rows])
            present = wide((s.count > k).float())
            shadow = torch.exp(-((x / .8) ** 2 + ((y + .95) / .22) ** 2)) * .45 * present
            cover = (.5 - distance * radius * size).clamp(0, 1) * present
            rim = .72 + .28 * (-distance * 7).clamp(0, 1)  # darker towards the outline
            shade = (rim * (1 + .14 * y))[:, None]
            colour = (palette["colour"][s.colour[:, k]][:, :, None, None] * shade).clamp(0, 1)
            image = torch.lerp(image * (1 - shadow)[:, None], colour, cover[:, None])
        pictures.append((image.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(pictures)


# ----------------------------------------------------------------------------------------------------------------------
# Brains: voxels (trials, V) of one person looking at scenes
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class World:
    """Sizes of the world. NSD: 40 sessions of 750 trials, 1000 shared and 9000 own images, 12,682-17,907 voxels."""
    sessions: tuple = (25, 25, 20, 19, 25, 20, 25, 19)  # 5/8 of NSD's 40, 40, 32, 30, 40, 32, 40, 30
    trials: int = 120  # in a session
    shared: int = 300  # images seen by all, three times each: the test set
    voxels: tuple = (4717, 4283, 4567, 3945, 3911, 5372, 3804, 4315)  # 3/10 of NSD's
    noise: float = 1.0  # standard deviation of a trial's noise; the signal's is 1
    low: int = 12  # dimensions of the code of the early areas
    high: int = 28  # and of the higher areas


SMOKE = World(sessions=(2, 2, 2, 2, 2, 2, 2, 2), trials=30, shared=12, voxels=(60, 52, 55, 50, 49, 66, 47, 54))
AREAS = {"V1": .18, "V2": .15, "V3": .13, "V4": .10, "higher_vis": .44}  # share of the voxels
LOW_SHARE = {"V1": 1.0, "V2": .9, "V3": .75, "V4": .5, "higher_vis": .1}  # how much of an area's signal is low-level


def image_code(scenes: Scenes, images: torch.Tensor, world: World, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What all people's brains compute alike from a picture: low (n, world.low) and high (n, world.high), whitened.

    Low: the picture blurred to 8 x 8 colours. High: what each of the two objects is, its colour, size and place.
    Both are squeezed through a random layer with a tanh: no linear map from brain to picture is exact.
    """
    # Few dimensions, each in many voxels: a session then says much about a person's mixture, if one knows the code.
    # Knowing it (which pictures go with which code, not linearly) is what pretraining brings.
    g = torch.Generator().manual_seed(seed)
    blurred = F.avg_pool2d(images.float() / 255, images.shape[-1] // 8).flatten(1)  # (n, 192)
    palette = [torch.tensor(list(table.values())) for table in (COLOURS, GROUNDS)]
    kinds = F.normalize(torch.randn(len(SHAPES), 4, generator=g), dim=1)  # eight shapes as points in 4 dimensions
    known = [palette[1][scenes.ground] * 2, F.one_hot(scenes.sky, len(SKIES)) * .7]
    for k in range(2):
        seen = (scenes.count > k).float()[:, None]
        place = (scenes.place[:, k] - torch.tensor([.5, .54])) * 6
        known += [kinds[scenes.shape[:, k]] * 2 * seen, (palette[0][scenes.colour[:, k]] - .5) * 3 * seen,
                  place * seen, (scenes.size[:, k, None] * 2 - 1) * seen, seen]
    codes = []
    for features, width in ((blurred, world.low), (torch.cat(known, 1).float(), world.high)):
        features = features - features.mean(0)
        basis = torch.linalg.svd(features[:4000], full_matrices=False)
        scores = features @ basis.Vh[:width].T / (basis.S[:width] / math.sqrt(min(len(features), 4000))).sqrt()
        mixed = torch.tanh(scores / scores.std() @ torch.randn(width, width, generator=g) / math.sqrt(width))
        mixed = mixed - mixed.mean(0)
        values, vectors = torch.linalg.eigh(mixed.T @ mixed / len(mixed))
        codes.append(mixed @ (vectors / values.clamp(min=1e-6).sqrt()))  # (n, width), unit covariance
    return tuple(codes)


def area_masks(num_voxels: int) -> dict[str, np.ndarray]:
    """Region masks (V,) in the release's layout: early areas first, then the rest of nsdgeneral."""
    edges = np.round(np.cumsum([0, *AREAS.values()]) / sum(AREAS.values()) * num_voxels).astype(int)
    masks = {"nsd_general": np.ones(num_voxels, bool)}
    for name, start, end in zip(AREAS, edges[:-1], edges[1:], strict=True):
        masks[name] = (np.arange(num_voxels) >= start) & (np.arange(num_voxels) < end)
    return masks


def brain(codes: tuple, rows: np.ndarray, world: World, subject: int, seed: int) -> np.ndarray:
    """Voxels (trials, V) of a subject seeing images `rows`: a mixture of the code that is this person's own + noise."""
    g = torch.Generator().manual_seed(seed * 100 + subject)
    num_voxels = world.voxels[subject - 1]
    low_share = torch.zeros(num_voxels)
    for name, mask in area_masks(num_voxels).items():
        low_share[torch.from_numpy(mask)] = LOW_SHARE.get(name, 0)
    signal = torch.zeros(len(rows), num_voxels)
    for code, share in zip(codes, (low_share, 1 - low_share), strict=True):
        mixture = torch.randn(code.shape[1], num_voxels, generator=g) / math.sqrt(code.shape[1])  # (width, V)
        signal += code[rows] @ (mixture * share.sqrt())  # (trials, V)
    noise = world.noise * torch.empty(num_voxels).uniform_(.7, 1.3, generator=g)
    return (signal + noise * torch.randn(signal.shape, generator=g)).numpy()


def behaviour(world: World, subject: int, own: np.ndarray, seed: int) -> np.ndarray:
    """The subject's experiment, one row a trial (n, 17): each image up to three times, within some two sessions."""
    rng = np.random.default_rng([seed, subject])
    total = max(world.sessions) * world.trials  # the whole plan; some people came to fewer sessions
    images = np.concatenate([np.repeat(np.arange(world.shared), 3), own])[:total]
    first = rng.random(images.max() + 1)[images]  # when an image comes for the first time; soon after, it comes again
    again = rng.exponential(1 / max(world.sessions), total)
    images = images[np.argsort(first + again)][: world.sessions[subject - 1] * world.trials]
    n = len(images)
    table = np.full((n, len(data.BEHAV_COLUMNS)), -1.0)
    session, trial = np.divmod(np.arange(n), world.trials)
    last_session, old = {}, np.zeros((n, 2))  # old: seen before, and before in this session
    for i, image in enumerate(images):
        old[i] = image in last_session, last_session.get(image) == session[i]
        last_session[image] = session[i]
    correct = (rng.random((n, 2)) < .85).astype(float)
    columns = dict(cocoidx=images, subject=subject, session=session + 1, run=trial * 12 // world.trials + 1,
                   trial=trial + 1, global_trial=np.arange(n), time=session + trial * 4 / 86400, isold=old[:, 0],
                   iscorrect=correct[:, 0], rt=rng.gamma(8, 110, n), changemind=0, isoldcurrent=old[:, 1],
                   iscorrectcurrent=correct[:, 1], total1=1, total2=0,
                   button=1 + (old[:, 0] == correct[:, 0]), shared1000=images < world.shared)
    for name, values in columns.items():
        table[:, data.BEHAV_COLUMNS.index(name)] = values
    return table


# ----------------------------------------------------------------------------------------------------------------------
# Files: the official names and layouts
# ----------------------------------------------------------------------------------------------------------------------
def shipped_networks() -> dict[str, str]:
    """{file: its SHA-256} of toy_networks/."""
    lines = (NETWORKS / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def copy_networks(path: Path) -> None:
    """The shipped frozen networks -> `path`, each file checked against SHA256SUMS."""
    for name, digest in shipped_networks().items():
        if not (NETWORKS / name).is_file() or hashlib.sha256((NETWORKS / name).read_bytes()).hexdigest() != digest:
            raise UserError(f"{NETWORKS / name} is not the file that was shipped: restore it with `git checkout "
                            "toy_networks`, or train all anew with `python toy.py --train_frozen`.")
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(NETWORKS / name, path / name)
    for place in ("vae", "sdxl/vae"):  # of the low-level head and of the refiner: in the real system two other ones
        shutil.copytree(path / "unclip/vae", path / place)


def write_subject(path: Path, table: np.ndarray, voxels: np.ndarray, world: World, subject: int) -> None:
    """Betas of all trials; tars of the trials: one a session for training, and the shared images' for testing."""
    shared = table[:, data.BEHAV_COLUMNS.index("shared1000")] > 0
    session = table[:, data.SESSION].astype(int) - 1
    train = voxels[~shared]
    voxels = (voxels - train.mean(0)) / train.std(0)  # paper A.2: z-scored by the training trials
    data.write_betas(data.h5_path(path, "betas", subject), voxels)
    early = session < max(world.sessions) * 37 // 40  # of the 37-session release, whose test set is "test"
    nsd.write_trials(path, subject, table, shared, shared & early)


GNET_WIDTHS = (8, 24, 16, 32, 8)  # of the encoding model's trunk: an eighth of the release's


def fit_encoding_model(path: Path, seed: int, num_images: int = 400, ridge: float = 30.0) -> None:
    """gnet_multisubject.pt as in the release (paper Table 3): picture -> voxels, fitted to these eight brains.

    The trunk is random and stays so: of its features, ridge regression on up to num_images pictures of a person's
    training trials makes the readout. These voxels see the whole picture alike; real ones look at a place each.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = gnet.Trunk(*GNET_WIDTHS).eval().requires_grad_(False)
        for layer in trunk.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
    trunk.mu.fill_(.5)
    everywhere = [torch.full((places, 1), 1 / places) for places in (25 * 25, 13 * 13)]
    images, readouts = data.Images(path), {}
    for subject in tqdm(range(1, 9), desc="toy world: encoding model"):
        trials = data.load_trials(path, subject)
        ids, positions = data.repeats(trials)
        voxels = data.average_repeats(data.load_voxels(path, trials), positions[:num_images])  # (n, V)
        pictures = images[ids[:num_images]].split(64)
        x = torch.cat([gnet.pool(trunk(gnet.prepare(chunk)), everywhere)[..., 0] for chunk in pictures])  # (n, 64)
        mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
        x = (x - mean) / std
        w = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ (voxels - voxels.mean(0)))  # (64, V)
        w, flat = w / std[:, None], torch.zeros(()).expand  # (a flat field takes no space in the file)
        num_voxels = voxels.shape[1]
        readouts[subject] = {"rf0": flat(num_voxels, 25, 25), "rf1": flat(num_voxels, 13, 13),
                             "w": w.T, "b": voxels.mean(0) - mean @ w}
    files.save(path / gnet.FILE, {"best_params": {"enc": trunk.state_dict(), "fwrfs": readouts}})


def build_world(path: Path, world: World | None = None, seed: int = 0, rebuild: bool = False) -> None:
    """Write the whole folder under a temporary name, then rename it. What is there already is kept.

    path      the folder of the dataset, as the stages' --data_path
    rebuild   write it anew where it is there
    Raises UserError if a shipped network is not the one that was shipped, or if what would be replaced is no toy.
    """
    world = world or World()
    if path.exists() and not rebuild:
        return
    if path.exists() and not all((path / name).exists() for name in shipped_networks()):
        raise UserError(f"{path} is no toy world, and --rebuild would replace it: name another with --data_path.")
    with files.replacing_folder(path) as building:
        write_world(building, world, seed)


def write_world(path: Path, world: World, seed: int) -> None:
    """All files of the world, into an empty folder."""
    copy_networks(path)
    # Image 0.. are the shared ones; then each subject's own, seen one to three times in turn.
    own_trials = max(world.sessions) * world.trials - 3 * world.shared
    repeats = np.resize([3, 2, 1], own_trials)
    num_own = int(np.searchsorted(np.cumsum(repeats), own_trials)) + 1
    scenes = draw_scenes(world.shared + 8 * num_own, seed)
    images = render(scenes)  # (n, 3, 64, 64)
    data.write_images(data.h5_path(path, "images"), images.numpy().astype(np.float16) / 255)
    codes = image_code(scenes, images, world, seed)
    for subject in tqdm(range(1, 9), desc="toy world: eight brains"):
        own = np.repeat(world.shared + (subject - 1) * num_own + np.arange(num_own), repeats[:num_own])
        table = behaviour(world, subject, own, seed)
        voxels = brain(codes, table[:, data.IMAGE].astype(int), world, subject, seed)
        write_subject(path, table, voxels, world, subject)
    masks = {s: area_masks(v) for s, v in enumerate(world.voxels, 1)}
    data.write_region_masks(data.h5_path(path, "masks"), masks)
    np.save(path / "shared1000.npy", np.arange(len(images)) < world.shared)
    evals = path / "evals"
    evals.mkdir()
    captions = scenes.captions()[: world.shared]
    files.save(evals / "all_images.pt", images[: world.shared].float() / 255)
    files.save(evals / "all_captions.pt", np.array(captions))
    files.save(evals / "all_git_generated_captions.pt", np.array(captions))
    fit_encoding_model(path, seed)


# ----------------------------------------------------------------------------------------------------------------------
# The headline (paper Fig. 1, Table 1): what is pretraining on seven others worth?
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Recipe:
    """Flags of the stages. Each model trains until its validation curve is flat (train_logs/*/curves.png): a baseline
    that is cut short makes pretraining look better than it is."""
    sizes: str = "--hidden_dim=256 --prior_depth=3 --prior_dim_head=16 --teacher_views=1"
    pretrain: str = "--batch_size=70 --num_epochs=42 --ckpt_interval=14"
    session: str = "--batch_size=24 --ckpt_interval=25 --num_sessions=1 --val_sessions=1"
    from_scratch: str = "--tie_positions --max_lr=2.5e-3 --num_epochs=200"
    fine_tune: str = "--max_lr=1e-3 --num_epochs=200"  # longer or faster, it forgets: the prior gets worse
    everything: str = "--batch_size=24 --num_epochs=13 --ckpt_interval=4 --num_sessions=24 --val_sessions=1"
    draw: str = "--batch_size=50 --scheduler=dpm --steps=6 --guidance=1"  # from true tokens as good as 38 Euler steps
    refine: str = "--batch_size=50"
    decoder: str = ("--num_steps=120 --batch_size=64 --max_lr=1e-3 --warmup=20 --ema=.98 --ckpt_interval=40 "
                    "--num_eval=60 --scheduler=dpm --steps=6 --guidance=1")


SMOKE_RECIPE = Recipe(
    sizes="--hidden_dim=32 --prior_depth=1 --prior_dim_head=16 --teacher_views=1",
    pretrain="--batch_size=14 --num_epochs=1",
    session="--batch_size=8 --num_epochs=2 --num_sessions=1 --val_sessions=1",
    everything="--batch_size=8 --num_epochs=2 --num_sessions=1 --val_sessions=1",
    draw="--scheduler=dpm --steps=2 --guidance=1 --prior_steps=5",
    refine="--steps=4",
    decoder="--num_steps=2 --batch_size=4 --num_val=4 --num_eval=4 --scheduler=dpm --steps=2 --guidance=1")
METRICS = {"retrieval/image": "image retr.", "retrieval/brain": "brain retr.", "recons/pixcorr": "PixCorr",
           "recons/clip_l": "two-way CLIP", "blurryrecons/pixcorr": "blurry PixCorr",
           "enhancedrecons/ssim": "refined SSIM"}
REPORTED = "toy_1session_pretrained"  # the model whose report is written: the paper's claim


def run_stage(stage, flags: str) -> dict:
    """Print the command, then run the stage's main() here: in a process of its own it would import for ten seconds."""
    print(f"\n$ python {stage.__name__}.py {flags}", flush=True)
    return stage.main(flags.split())


def seed_tag(seed: int) -> str:
    return f"_seed{seed}" if seed else ""


def headline(path: Path, seed: int, logs: Path, evals: Path, recipe: Recipe, rebuild: bool = False) -> list[dict]:
    """Pretrain, train three models of subject 1, draw and score what they read; one dict of numbers a model."""
    import evaluate
    import recon
    import refine
    import train
    tag = seed_tag(seed)
    pretrained = f"toy_pretrained{tag}"
    data_flags = f"--data_path={path} --subj=1"
    train_flags = f"{data_flags} --train_logs={logs} --seed={seed} {recipe.sizes}"
    models = {
        pretrained: f"--multi_subject {recipe.from_scratch} {recipe.pretrain}",
        f"toy_1session_scratch{tag}": f"{recipe.from_scratch} {recipe.session}",
        f"toy_1session_pretrained{tag}": f"--multisubject_ckpt={logs / pretrained} {recipe.fine_tune} {recipe.session}",
        f"toy_allsessions_scratch{tag}": f"{recipe.from_scratch} {recipe.everything}",
    }
    results = []
    for name, flags in models.items():
        if rebuild:
            shutil.rmtree(logs / name, ignore_errors=True)
        if not (logs / name / "samples.png").exists():  # the last file that a training writes
            run_stage(train, f"--model_name={name} {train_flags} {flags}")
        if name == pretrained:
            continue
        scores = evals / name / f"{name}_metrics.json"
        if not scores.exists():
            run_stage(recon, f"--model_name={name} {data_flags} --train_logs={logs} --evals={evals} "
                             f"--seed={seed} {recipe.draw}")
            run_stage(refine, f"--model_name={name} {data_flags} --evals={evals} --seed={seed} {recipe.refine}")
            report = "" if name == REPORTED + tag else " --no-report"
            run_stage(evaluate, f"--model_name={name} {data_flags} --evals={evals} --tables={evals / 'tables'} "
                                f"--train_logs={logs}{report}")
        values = {row["key"]: row["value"] for row in json.loads(scores.read_text())["rows"]}
        results.append({"model": name.removeprefix("toy_").removesuffix(tag), "seed": seed,
                        **{key: values[key] for key in METRICS}})
    return results


def decoder(path: Path, seed: int, logs: Path, recipe: Recipe, rebuild: bool = False) -> None:
    """How the paper's decoder came to be (2.4): the toy's SDXL, which draws what a text says, learns to read tokens.

    The pictures of the headline are drawn by the shipped decoder, made by the same script in longer (toy_networks.py).
    """
    import unclip
    name = f"toy_decoder{seed_tag(seed)}"
    if rebuild:
        shutil.rmtree(logs / name, ignore_errors=True)
    if not (logs / name / "table9.csv").exists():
        run_stage(unclip, f"--model_name={name} --data_path={path} --train_logs={logs} {recipe.decoder}")


def print_table(results: list[dict]) -> None:
    """Rows: models, one line a seed; in Markdown, for the README."""
    print(f"\n| {'model':<19} | seed | " + " | ".join(METRICS.values()) + " |")
    print(f"|{'-' * 21}|-----:|" + "|".join("-" * (len(title) + 1) + ":" for title in METRICS.values()) + "|")
    for row in sorted(results, key=lambda r: (r["model"], r["seed"])):
        numbers = " | ".join(f"{row[key]:>{len(title)}.3f}" for key, title in METRICS.items())
        print(f"| {row['model']:<19} | {row['seed']:>4} | {numbers} |")


def save_headline(path: Path, evals: Path, tag: str, columns: int = 12) -> None:
    """headline.png: seen, blurry, and what the three models read, for the first test images."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    def load(name: str, kind: str) -> torch.Tensor:
        return torch.load(evals / (name + tag) / f"{name}{tag}_all_{kind}.pt", weights_only=True)

    rows = {"seen": torch.load(path / "evals/all_images.pt", weights_only=True),
            "blurry\n(pretrained,\n1 session)": load("toy_1session_pretrained", "blurryrecons"),
            "scratch,\n1 session": load("toy_1session_scratch", "recons"),
            "pretrained,\n1 session": load("toy_1session_pretrained", "recons"),
            "the same,\nrefined": load("toy_1session_pretrained", "enhancedrecons"),
            "scratch,\nall sessions": load("toy_allsessions_scratch", "recons")}
    columns = min(columns, *(len(pictures) for pictures in rows.values()))
    figure, axes = plt.subplots(len(rows), columns, figsize=(columns + 1.2, len(rows)), squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].text(-.12, .5, name, transform=line[0].transAxes, ha="right", va="center", size=9)
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.axis("off")
    figure.subplots_adjust(left=1.2 / (columns + 1.2), right=.995, top=.995, bottom=.005, wspace=.04, hspace=.04)
    figure.savefig(path / "headline.png", dpi=100)
    plt.close(figure)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Build the toy world and run every stage of MindEye2 on it.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data_path", help="folder of the world; none: toy (--smoke: toy-smoke); more seeds: toy_seed1 ..")
    p.add_argument("--claims", nargs="*", metavar="NAME",
                   help="instead, test the paper's claims of these names, or all of them, in worlds of their own in "
                        "claims/ (or --data_path): claims.py lists them")
    p.add_argument("--jobs", type=int, help="with --claims, models to train at the same time; none: one a core")
    p.add_argument("--seed", type=int, nargs="+",
                   help="decides scenes, brains, noise and first weights; several: a world and rows each; none: 0, "
                        "with --claims 0 1 2")
    p.add_argument("--smoke", action="store_true", help="all at its smallest, for tests; its numbers say nothing")
    p.add_argument("--rebuild", action="store_true", help="start over: world, models and pictures")
    p.add_argument("--train_frozen", action="store_true", help="train the shipped networks anew, into toy_networks/")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict] | dict:
    args = parse_args(argv)
    if args.seed and (min(args.seed) < 0 or len(set(args.seed)) < len(args.seed)):
        raise UserError(f"--seed {' '.join(map(str, args.seed))} must name different numbers, none below 0.")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}.")
    if args.data_path and not Path(args.data_path).name:
        raise UserError(f"--data_path={args.data_path} has no name of its own: give the folder one, such as toy.")
    if args.claims is not None:
        import claims
        base = Path(args.data_path or ("claims-smoke" if args.smoke else "claims"))
        return claims.main(args.claims, args.seed or [0, 1, 2], base, args.smoke, args.jobs, args.rebuild)
    args.seed = args.seed or [0]
    start = time.time()
    if args.train_frozen:
        import toy_networks
        toy_networks.train_all(NETWORKS, seed=args.seed[0])
    base = Path(args.data_path or ("toy-smoke" if args.smoke else "toy"))
    world, recipe = (SMOKE, SMOKE_RECIPE) if args.smoke else (World(), Recipe())
    results = []
    for seed in args.seed:
        path = base.with_name(base.name + seed_tag(seed))
        logs, evals = (path / "train_logs", path / "evals") if args.smoke else (Path("train_logs"), path / "evals")
        build_world(path, world, seed, args.rebuild)
        results += headline(path, seed, logs, evals, recipe, args.rebuild)
        tag = seed_tag(seed)
        save_headline(path, evals, tag)
    first = base.with_name(base.name + seed_tag(args.seed[0]))
    decoder(first, args.seed[0], first / "train_logs" if args.smoke else Path("train_logs"), recipe, args.rebuild)
    (first / "results.json").write_text(json.dumps(results, indent=1))
    print_table(results)
    print(f"\n{(time.time() - start) / 60:.1f} minutes. The table: {first / 'results.json'}, the picture: "
          f"{first / 'headline.png'}, curves: {logs}/*/curves.png\n"
          f"The report of the pretrained model's one session: {evals / (REPORTED + tag) / 'report.html'}")
    return results


if __name__ == "__main__":
    from model import run_main
    run_main(main)
