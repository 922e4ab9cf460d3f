"""GNet, the encoding model behind brain correlation (paper Table 3): picture -> the voxels that it should evoke.

Show a reconstruction to a model of the brain. If the voxels that it predicts are like those that were measured, the
reconstruction holds what the person saw, whether it pleases us or not. GNet (St-Yves et al. 2023, "GNet8j") learned
from all eight subjects of NSD at once:

    trunk      of all subjects: eight convolutions, whose features come in 25 x 25 and in 13 x 13 places
    readout    of a voxel: where it looks (a softmax over the places), then what it likes (a weight a feature)

    in    {cache_dir}/gnet_multisubject.pt     1.2 GB, Hugging Face dataset pscotti/mindeyev2; a dictionary, of which
          best_params.enc                      the trunk's state dict is read
          best_params.fwrfs[subject]           and rf0 (V, 25, 25), rf1 (V, 13, 13), w (V, 512), b (V,): V as in betas
    out   load_gnet(..).predict                pictures (B, 3, H, W) in [0, 1] -> voxels (B, V), z-scored as the betas

Written without the released file: names and shapes are those of the code that wrote it, and add up to its 1.2 GB.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import torch_load
from judges import Missing
from model import UserError

FILE = "gnet_multisubject.pt"
SIDE = 227  # pixels, AlexNet's; the trunk's first two layers have AlexNet's shape
IMAGES, VOXELS = 16, 2048  # at once: 64 MB of features
WIDTHS = {  # the weights that tell the trunk's widths, and the release's
    "pre.conv1.0.weight": 64, "pre.conv2.0.weight": 192, "enc.conv3.weight": 128, "enc.conv4a.conv1.weight": 256,
    "enc.conv6b.conv1.weight": 64,
}


def prepare(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, 227, 227): 8 bits, cut off as by the original, then resized by LANCZOS."""
    pixels = (images.float().clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    resized = [Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS) for picture in pixels]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float().div_(255)      # (B, 3, 227, 227)


def signed_log(x: Tensor) -> Tensor:
    """log(1 + |x|) tanh(x): tames large features, keeps their sign."""
    return torch.log1p(x.abs()) * torch.tanh(x)


class Block(nn.Module):
    """BatchNorm, 3 x 3 convolution, ReLU: (B, narrow, S, S) -> (B, wide, S, S)."""
    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(narrow), nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv1(self.bn1(x)))


class Trunk(nn.Module):
    """Features of pictures. Voxels see `read` channels of a wide layer; its others only feed the next one."""
    def __init__(self, first: int, second: int, third: int, wide: int, read: int) -> None:
        super().__init__()
        self.read = read
        self.mu = nn.Parameter(torch.zeros(1, 3, 1, 1))  # mean colour of the pictures
        self.pre = nn.ModuleDict({
            "conv1": nn.Sequential(nn.Conv2d(3, first, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            "conv2": nn.Sequential(nn.Conv2d(first, second, 5, padding=2), nn.ReLU()),
        })
        self.enc = nn.ModuleDict({"bn1": nn.BatchNorm2d(second), "conv3": nn.Conv2d(second, third, 3)})
        self.enc["conv4a"] = Block(third, wide)
        for name in ("conv4b", "conv5a", "conv5b", "conv6a"):
            self.enc[name] = Block(wide, wide)
        self.enc["conv6b"] = Block(wide, read)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, 227, 227) -> features of 25 * 25 and of 13 * 13 places: [(B, 256, 625), (B, 256, 169)]."""
        x = self.pre["conv2"](self.pre["conv1"](images - self.mu))          # (B, 192, 27, 27)
        c3 = F.relu(self.enc["conv3"](self.enc["bn1"](x)))                  # (B, 128, 25, 25)
        c4a = self.enc["conv4a"](c3)                                        # (B, 256, 25, 25)
        c4b = self.enc["conv4b"](c4a)
        c5a = self.enc["conv5a"](F.max_pool2d(c4b, 3, stride=2, padding=1)) # (B, 256, 13, 13)
        c5b = self.enc["conv5b"](c5a)
        c6a = self.enc["conv6a"](c5b)
        c6b = self.enc["conv6b"](c6a)                                       # (B, 64, 13, 13)
        c4a, c4b, c5a, c5b, c6a = (c[:, :self.read] for c in (c4a, c4b, c5a, c5b, c6a))  # (B, 64, ..) each
        groups = torch.cat([c3, c4a, c4b], 1), torch.cat([c5a, c5b, c6a, c6b], 1)        # 256 channels each
        return [signed_log(group.flatten(2)) for group in groups]


def pool(features: list[Tensor], fields: list[Tensor]) -> Tensor:
    """What V voxels see: features [(B, F0, P), (B, F1, Q)], averaged by fields [(P, V), (Q, V)] -> (B, F0 + F1, V)."""
    return signed_log(torch.cat([x @ field for x, field in zip(features, fields, strict=True)], 1))


@torch.no_grad()
def predict(trunk: Trunk, fields: list[Tensor], w: Tensor, b: Tensor, images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] -> voxels (B, V) on the CPU; w (F, V), b (V,), fields as in `pool`.

    For the 15,724 voxels of NSD's subject 1, a quarter of a second a picture on one core.
    """
    voxels = []
    for chunk in tqdm(images.split(IMAGES), desc="predicted voxels", delay=2, leave=False):  # shown if it takes > 2 s
        features = trunk(prepare(chunk).to(b.device))
        blocks = zip(*(x.split(VOXELS, 1) for x in (*fields, w)), strict=True)
        sums = [torch.einsum("bfv,fv->bv", pool(features, some_fields), some_w) for *some_fields, some_w in blocks]
        voxels.append((torch.cat(sums, 1) + b).cpu())  # (16, V)
    return torch.cat(voxels)  # (B, V)


# ---------------------------------------------------------------------------------------------------------------------
# The file

def _misfit(file: Path, reason: str) -> UserError:
    """The error of a file that is readable, but of another network."""
    return UserError(f"{file} is not the released encoding model ({reason}): replace it, or name another folder with "
                     "--cache_dir.")


def _rows(value: object, otherwise: int) -> int:
    return len(value) if isinstance(value, Tensor) and value.ndim else otherwise


def _match(state: dict, shapes: dict[str, tuple], part: str, file: Path) -> None:
    """Raise UserError naming the first key of a part of the file that is missing, of another shape, or too many."""
    for key, shape in shapes.items():
        if not isinstance(state.get(key), Tensor):
            raise _misfit(file, f"{part}.{key} is missing")
        if tuple(state[key].shape) != shape:
            raise _misfit(file, f"{part}.{key} has shape {tuple(state[key].shape)}, not {shape}")
    for key in state:
        if key not in shapes:
            raise _misfit(file, f"{part}.{key} is unknown")


def load_gnet(cache_dir: str | Path, subject: int, device: str | torch.device) -> SimpleNamespace:
    """The encoding model of one subject: predict (of pictures, see above), description and files.

    Raises judges.Missing without the file; UserError when it is damaged, of another network or without the subject.
    """
    file = Path(cache_dir) / FILE
    if not file.exists():
        raise Missing(f"{file} does not exist: put {FILE} of the Hugging Face dataset pscotti/mindeyev2 there.")
    content = torch_load(file, "--cache_dir")  # its numpy arrays (masks, scores of the training) are left out
    best = content.get("best_params") if isinstance(content, dict) else None
    for part in ("enc", "fwrfs"):
        if not isinstance(best, dict) or not isinstance(best.get(part), dict):
            raise _misfit(file, f"best_params.{part} is missing")
    enc, fwrfs = best["enc"], best["fwrfs"]
    if subject not in fwrfs:
        raise UserError(f"{file} knows subjects {', '.join(map(str, fwrfs))}, not {subject}: name one of them with "
                        "--subj, or another folder with --cache_dir.")
    readout = fwrfs[subject]

    widths = [_rows(enc.get(key), width) for key, width in WIDTHS.items()]
    trunk, voxels = Trunk(*widths), _rows(readout.get("b"), 1)
    num_features = widths[2] + 6 * widths[4]  # 512: all of conv3's channels, and `read` of each of the six after it
    _match(enc, {key: tuple(x.shape) for key, x in trunk.state_dict().items()}, "best_params.enc", file)
    shapes = {"b": (voxels,), "w": (voxels, num_features), "rf0": (voxels, 25, 25), "rf1": (voxels, 13, 13)}
    _match(readout, shapes, f"best_params.fwrfs[{subject}]", file)

    trunk.load_state_dict(enc)
    trunk = trunk.to(device).eval().requires_grad_(False)
    b, w, *fields = (readout[key].to(device).float() for key in shapes)
    fields = [field.flatten(1).softmax(1).T for field in fields]  # (625, V), (169, V)
    published = widths == list(WIDTHS.values())
    description = "GNet" if published else f"stand-in for GNet, {num_features} features instead of 512"
    return SimpleNamespace(predict=partial(predict, trunk, fields, w.T, b), description=description, files=[file])
