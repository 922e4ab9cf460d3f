"""What does one session say without a network? Ridge regression from voxels to tokens. A row of docs/measured.md.

Closed form, from subject 1's one session to the CLIP tokens of its pictures, less their mean: no other people, no
prior. Its strength is chosen on the next session, as train.py validates. It retrieves by the cosine of what differs
from the mean, and the shipped decoder draws its guess, from plain noise.

    python tests/bench_ridge.py --data_path toy        after `python toy.py`; 15 seconds
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
import frozen  # noqa: E402
import judges  # noqa: E402
import metrics  # noqa: E402
import recon  # noqa: E402


def load(world: str, split: str, tokens, sessions=None, without=()) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Voxels (n, V) and tokens (n, S * D) of subject 1's trials, and the image of each."""
    trials = data.load_trials(world, 1, split, sessions)
    trials = trials[~np.isin(trials.image, without)]
    rows, of_trial = np.unique(trials.image, return_inverse=True)
    return data.load_voxels(world, trials), tokens(rows)[of_trial], trials.image


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_path", default="toy", help="folder of the world")
    world = parser.parse_args().data_path
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, clip = data.Images(world), frozen.load_clip(world, "cpu")

    def tokens(rows) -> torch.Tensor:
        return clip.tokens(images[rows]).flatten(1)  # (n, S * D)

    x, y, known = load(world, "train", tokens, range(1))
    mean = y.mean(0)

    def guess(strength: float, brains: torch.Tensor) -> torch.Tensor:
        return brains @ (x.T @ torch.linalg.solve(x @ x.T + strength * torch.eye(len(x)), y - mean)) + mean

    val_x, val_y, _ = load(world, "train", tokens, range(1, 2), known)
    strength = min((30, 100, 300, 1000, 3000, 10000), key=lambda s: F.mse_loss(guess(s, val_x), val_y).item())
    test = data.load_trials(world, 1, "new_test")
    ids, positions = data.repeats(test)
    read, truth = guess(strength, data.average_repeats(data.load_voxels(world, test), positions)), tokens(ids)

    found = F.normalize(read - mean, dim=1) @ F.normalize(truth - mean, dim=1).T  # (brains, images)
    right = torch.arange(len(ids))
    image, brain = ((found.argmax(axis) == right).float().mean() for axis in (1, 0))
    unclip, judge = frozen.load_unclip(f"{world}/unclip", "cpu"), judges.load_vision("clip_l", world, "cpu")
    size = unclip.unet.config.sample_size
    drawn = torch.cat([recon.draw(unclip, part.unflatten(1, (clip.seq_dim, clip.emb_dim)),
                                  torch.randn(len(part), 4, size, size), steps=6, guidance=1, scheduler="dpm")
                       for part in read.split(50)])
    seen = images[ids]
    clip_l = metrics.two_way_identification(*(judge.features(x)["clip_l"] for x in (seen, drawn))).mean()
    print(f"| ridge regression, strength {strength}, {world} | {image:.3f} | {brain:.3f} | "
          f"{metrics.pixcorr(seen, drawn).mean():.3f} | {clip_l:.3f} |")


if __name__ == "__main__":
    main()
