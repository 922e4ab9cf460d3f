"""train.py on the smallest toy world: it learns, repeats itself, fine-tunes, mixes right, and explains mistakes.

    python -m pytest tests/test_train.py
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from golden_weights import golden

import checkpoints
import data
import model as networks
import nsd
import recon
import train
from frozen import FrozenCLIP
from model import UserError

ROOT = Path(__file__).parents[1]
SMALL = "--hidden_dim=32 --prior_depth=1 --prior_dim_head=16".split()
SMALL_SIZES = {"hidden_dim": 32, "n_blocks": 4, "prior_depth": 1, "prior_dim_head": 16, "backbone": "released",
               "ridge": "linear", "prior": "target"}
FAST = "--teacher_views=1 --batch_size=8 --num_epochs=3".split()


def arguments(world, folder, *flags) -> list[str]:
    return [f"--data_path={world}", f"--train_logs={folder / 'train_logs'}", *FAST, *map(str, flags)]


def run(world, folder, *flags) -> dict:
    """name -> [(step, value), ..], as logged."""
    return train.main(arguments(world, folder, *flags))


def weights(folder, name, tag="last") -> dict:
    return checkpoints.load_checkpoint(folder / "train_logs" / name / f"{tag}.pth")["model_state_dict"]


@pytest.fixture(scope="module")
def pretrained(smoke_world, tmp_path_factory) -> Path:
    """A folder with train_logs/pretrained: everybody but subject 1, one pass of 14 trials a step."""
    folder = tmp_path_factory.mktemp("pretrained")
    run(smoke_world, folder, "--model_name=pretrained", "--multi_subject", "--batch_size=14", *SMALL)
    return folder


# ---- training

def test_it_learns_and_writes_the_official_files(smoke_world, tmp_path):
    history = run(smoke_world, tmp_path, "--model_name=a", "--num_epochs=40", "--max_lr=3e-3", "--mixup_pct=0",
                  "--val_sessions=1", *SMALL)
    for name, most in {"train/loss": .6, "train/prior": .6, "train/lowlevel": .9}.items():
        assert history[name][-1][1] < most * history[name][0][1], name
    folder = tmp_path / "train_logs" / "a"
    assert {"last.pth", "best.pth", "curves.png", "samples.png"} <= {path.name for path in folder.iterdir()}
    assert any("tfevents" in path.name for path in folder.iterdir())
    checkpoint = checkpoints.load_checkpoint(folder)
    assert set(checkpoint) >= {"epoch", "model_state_dict", "optimizer_state_dict", "lr_scheduler", "train_losses",
                               "test_losses", "lrs"}
    assert checkpoint["epoch"] == 39
    config = checkpoints.config_from_state_dict(checkpoint["model_state_dict"])
    assert (config["hidden_dim"], config["prior_depth"], config["num_voxels"]) == (32, 1, [60])
    networks.MindEye2(**config).load_state_dict(checkpoint["model_state_dict"])  # strict
    assert all(torch.isfinite(value).all() for value in checkpoint["model_state_dict"].values())


def test_one_seed_one_model(smoke_world, tmp_path):
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        run(smoke_world, tmp_path, f"--model_name={name}", f"--seed={seed}", *SMALL)
    a, b, c = (weights(tmp_path, name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["backbone.backbone_linear.weight"], c["backbone.backbone_linear.weight"])


def test_gradient_checkpointing_changes_no_weight(smoke_world, tmp_path, monkeypatch):
    calls, forward = [], networks.PriorLayer.forward
    monkeypatch.setattr(networks.PriorLayer, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    run(smoke_world, tmp_path, "--model_name=a", *SMALL)
    once = len(calls)
    run(smoke_world, tmp_path, "--model_name=b", "--gradient_checkpointing", *SMALL)
    a, b = (weights(tmp_path, name) for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a) and len(calls) > 2 * once


def test_checkpointed_layers_are_computed_twice(monkeypatch):
    calls, forward = [], networks.PriorLayer.forward
    monkeypatch.setattr(networks.PriorLayer, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    transformer = networks.PriorTransformer(32, 2, 16, 2)
    for transformer.checkpointing, times in ((False, 2), (True, 4)):
        calls.clear()
        transformer(torch.randn(1, 5, 32), 5).sum().backward()
        assert len(calls) == times


def test_gradients_are_gathered_over_batches(smoke_world, tmp_path, monkeypatch):
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: steps.append(1) or step(self, *args))
    run(smoke_world, tmp_path, "--model_name=a", "--num_epochs=13", *SMALL)
    batches = len(steps)
    run(smoke_world, tmp_path, "--model_name=b", "--num_epochs=13", "--gradient_accumulation=3", *SMALL)
    checkpoint = checkpoints.load_checkpoint(tmp_path / "train_logs/b")
    assert len(steps) - batches == len(checkpoint["train_losses"]) // 3 >= 13  # an epoch ends with a whole step
    schedule = checkpoint["lr_scheduler"]
    assert schedule["last_epoch"] == schedule["total_steps"] == len(steps) - batches  # it comes to its end


def test_targets_are_encoded_once(smoke_world, tmp_path, monkeypatch):
    run(smoke_world, tmp_path, "--model_name=a", *SMALL)
    encoded, tokens = [], FrozenCLIP.tokens

    def counted(self, images):
        encoded.append(len(images))
        return tokens(self, images)

    monkeypatch.setattr(FrozenCLIP, "tokens", counted)
    run(smoke_world, tmp_path, "--model_name=b", *SMALL)
    assert sum(encoded) <= 1  # one image, to learn the shape of the targets
    run(smoke_world, tmp_path, "--model_name=c", "--use_image_aug", *SMALL)
    assert sum(encoded) > 8  # recoloured images have no cached targets


@pytest.mark.parametrize("views", [0, 2])
def test_recoloured_images_are_what_all_frozen_networks_see(monkeypatch, views):
    """The cache has the teacher's features of the picture as it was."""
    monkeypatch.setattr(train.v2, "RandomApply", lambda *_: lambda image: 1 - image)
    monkeypatch.setattr(train, "encode_latents", lambda vae, images: images + 1)
    frozen = {"clip": SimpleNamespace(tokens=lambda images: images + 2), "vae": None, "teacher": lambda images: images}
    images, rows = torch.rand(2, 3, 4, 4), np.arange(2)
    targets = SimpleNamespace(frozen=frozen, images=images)
    part = SimpleNamespace(trials=SimpleNamespace(image=rows), voxels=torch.zeros(2, 5))
    args = SimpleNamespace(use_image_aug=True, blurry_recon=True, teacher_views=views)
    fetched = train.fetch(SimpleNamespace(train=[part]), targets, [rows], args)
    batch = train.encode(fetched, targets, torch.device("cpu"))
    assert torch.equal(batch["features"], 1 - images)
    assert torch.equal(batch["latents"], 2 - images) and torch.equal(batch["clip"], 3 - images)
    assert batch["features_aug"].shape == images.shape and not torch.equal(batch["features_aug"], 1 - images)


def test_without_prior_and_blurry_head(smoke_world, tmp_path):
    history = run(smoke_world, tmp_path, "--model_name=a", "--no-use_prior", "--no-blurry_recon", "--backbone=mlp",
                  *SMALL)
    assert "test/loss_prior" not in history and 0 <= history["test/image_retrieval"][-1][1] <= 1
    checkpoint = checkpoints.load_checkpoint(tmp_path / "train_logs" / "a")
    assert checkpoint["config"] == SMALL_SIZES | {"backbone": "mlp"}
    assert not any(key.startswith(("diffusion_prior", "backbone.blin1")) for key in checkpoint["model_state_dict"])


# ---- fine-tuning

def built(world, folder, *flags):
    """The model that train.py starts from."""
    args = train.parse_args(arguments(world, folder, *flags))
    train.check_args(args)
    sets = train.load_data(args)
    targets = train.load_targets(args, Accelerator(), sets)
    return train.build_model(args, *train.choose_sizes(args), [part.voxels.shape[1] for part in sets.train], targets)


def test_fine_tuning_starts_from_the_pretrained_backbone_and_prior(smoke_world, pretrained):
    before = weights(pretrained, "pretrained")
    assert sum(key.startswith("ridge.linears") and key.endswith("weight") for key in before) == 7
    model = built(smoke_world, pretrained, f"--multisubject_ckpt={pretrained / 'train_logs/pretrained'}")
    own = model.state_dict()
    shared = [key for key in own if not key.startswith("ridge.")]
    assert shared and all(torch.equal(own[key], before[key]) for key in shared)
    assert own["ridge.linears.0.weight"].shape == (32, 60)  # subject 1's own 60 voxels, fresh weights
    assert not torch.equal(own["ridge.linears.0.bias"], before["ridge.linears.0.bias"])  # the original took it over


def test_fine_tuning_takes_the_sizes_of_the_pretrained_model(smoke_world, pretrained):
    run(smoke_world, pretrained, "--model_name=tuned", f"--multisubject_ckpt={pretrained / 'train_logs/pretrained'}")
    config = checkpoints.config_from_state_dict(weights(pretrained, "tuned"))
    assert (config["hidden_dim"], config["prior_depth"], config["prior_dim_head"]) == (32, 1, 16)


# ---- one step

def test_partners_stay_within_their_subject():
    torch.manual_seed(0)
    voxels = [torch.randn(5, 7), torch.randn(4, 3), torch.randn(6, 9)]
    mixed, mix = train.mix_subjects(voxels)
    assert len(mix.perm) == len(mix.betas) == len(mix.select) == 15
    start = 0
    for x, out in zip(voxels, mixed, strict=True):
        own = slice(start, start + len(x))
        assert sorted(mix.perm[own].tolist()) == list(range(start, start + len(x)))  # the original: always from 0
        share = mix.betas[own, None]
        torch.testing.assert_close(out, share * x + (1 - share) * x[mix.perm[own] - start])
        start += len(x)
    assert mix.select.any() and (mix.betas[~mix.select] == 1).all()


TWO = SimpleNamespace(perm=torch.tensor([1, 0]), betas=torch.tensor([.75, 1.]), select=torch.tensor([True, True]))


def test_contrast_by_hand():
    tokens = torch.eye(2).reshape(2, 1, 2)  # two samples, one token: each brain equals its own image exactly
    # Wrong by 1 / .006 for the quarter that belongs to the partner; once in each direction, mean of two samples.
    assert train.contrast(tokens, tokens, TWO, None).item() == pytest.approx(.25 / .006 / 2, rel=1e-5)
    p = 1 / (1 + math.exp(-10))  # SoftCLIP at temperature .1: the entropy of softmax([10, 0])
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert train.contrast(tokens, tokens, None, .1).item() == pytest.approx(entropy, rel=1e-3)
    assert train.contrast(5 * tokens, tokens, None, .1).item() == pytest.approx(entropy, rel=1e-3)  # length is ignored


def test_a_mixed_brain_should_show_mixed_latents():
    latents = torch.tensor([1., 3.]).reshape(2, 1, 1, 1).expand(2, 4, 8, 8)
    features = torch.eye(2).reshape(2, 1, 2)
    batch = {"latents": latents, "features": features, "features_aug": features}
    out = {"blurry_latents": torch.zeros(2, 4, 8, 8), "blurry_features": features}
    p = 1 / (1 + math.exp(-5))
    entropy = .1 * (-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert train.low_level(out, batch, None).item() == pytest.approx((1 + 3) / 2 + entropy, rel=1e-4)
    assert train.low_level(out, batch, TWO).item() == pytest.approx((.75 + .75 + 3) / 2 + entropy, rel=1e-4)


@pytest.mark.parametrize("epochs, steps", [(40, 20), (150, 12)])
def test_learning_rates_are_the_originals(epochs, steps):
    g = golden("schedules")
    for kind, values in {"cycle": ("onecycle", ("lr", "beta1")), "linear": ("linear", ("lr",))}.items():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        scheduler = train.lr_schedule(optimizer, kind, 3e-4, epochs, steps)
        seen = {"lr": [], "beta1": []}
        for _ in range(epochs * steps):
            seen["lr"].append(optimizer.param_groups[0]["lr"])
            seen["beta1"].append(optimizer.param_groups[0]["betas"][0])
            optimizer.step()
            scheduler.step()
        for value in values[1]:
            expected = g[f"{values[0]}_{epochs}x{steps}_{value}"].double().numpy()
            np.testing.assert_allclose(seen[value], expected, rtol=1e-4, err_msg=f"{kind} {value}")


@pytest.mark.parametrize("epochs, steps", [(1, 1), (1, 2), (2, 1), (3, 1), (150, 1)])
def test_the_shortest_runs_have_learning_rates(epochs, steps):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = train.lr_schedule(optimizer, "cycle", 3e-4, epochs, steps)
    for _ in range(epochs * steps):
        assert 0 < optimizer.param_groups[0]["lr"] <= 3.01e-4
        optimizer.step()
        scheduler.step()


def test_retrieval_is_named_for_what_is_searched():
    """Brains at 25 and 40 degrees, their images at 0 and 40: the first brain is nearer to the second image."""

    def angles(*degrees):
        return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])

    model = SimpleNamespace(eval=lambda: None, train=lambda: None, diffusion_prior=None,
                            parameters=lambda: iter([torch.zeros(1)]))
    model.embed = lambda voxels, subject: SimpleNamespace(
        backbone=voxels[:, None], clip_voxels=voxels[:, None], blurry_latents=None)  # (B, 1, 2)
    trials = data.Trials(1, np.array([7, 3]), np.arange(2), np.ones(2, int))  # file order: image 7, then image 3
    part = SimpleNamespace(trials=trials, voxels=angles(40, 25).half())
    tokens = torch.zeros(8, 1, 2)
    tokens[[3, 7], 0] = angles(0, 40)
    scores = train.test(model, part, SimpleNamespace(clip=tokens), torch.device("cpu"))
    assert scores["image_retrieval"] == .5 and scores["brain_retrieval"] == 1
    assert scores["reciprocal_rank"] == pytest.approx((1 / 2 + 1) / 2)


# ---- mistakes: one sentence that names the file and the flag, and no run folder

def without_betas(world):
    data.h5_path(world, "betas", 1).unlink()
    return "betas_all_subj01_fp32_renorm.hdf5", "--data_path"


def without_tars(world):
    shutil.rmtree(world / "wds" / "subj01")
    return "subj01", "--data_path"


def cut_tar(world):
    tar = data.session_tar(world, 1, "train", 0)
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 3])
    return str(tar), "--data_path"


def nan_betas(world):
    trials = data.load_trials(world, 1, "train", [0])
    with h5py.File(data.h5_path(world, "betas", 1), "r+") as file:
        file["betas"][trials.beta[0], 5] = np.nan
    return "betas_all_subj01_fp32_renorm.hdf5", f"row {trials.beta[0]}", "--data_path"


def without_clip(world):
    (world / "clip").unlink()
    (world / "clip").mkdir()
    return str(world / "clip"), "--cache_dir"


@pytest.mark.parametrize("damage", [without_betas, without_tars, cut_tar, nan_betas, without_clip])
def test_damaged_files(world_copy, tmp_path, damage):
    words = damage(world_copy)
    with pytest.raises(UserError) as error:
        run(world_copy, tmp_path, "--model_name=a", *SMALL)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "train_logs").exists()


@pytest.mark.parametrize("flags, words", [
    (["--data_path=nowhere"], ["nowhere", "--data_path"]),
    (["--num_sessions=9"], ["--num_sessions", "2"]),
    (["--num_epochs=0"], ["--num_epochs"]),
    (["--teacher_views=-1"], ["--teacher_views"]),
    (["--mixup_pct=33"], ["--mixup_pct=33", "0..1"]),
    (["--prior_depth=0"], ["--prior_depth=0", "at least 1"]),
    (["--prior_dim_head=7"], ["--prior_dim_head=7", "even"]),
    (["--val_sessions=-1"], ["--val_sessions=-1", "at least 0"]),
    (["--num_sessions=2", "--val_sessions=1"], ["has 2 sessions", "--val_sessions=1"]),
    (["--multi_subject", "--val_sessions=2"], ["has 2 sessions", "--val_sessions=2"]),
    (["--seed=-1"], ["--seed=-1", "at least 0"]),
    (["--multi_subject", "--batch_size=6"], ["--batch_size=6", "7 subjects"]),
    (["--tie_positions", "--multisubject_ckpt={}"], ["--tie_positions", "first weights"]),
    (["--wandb_log"], ["pip install wandb"]),
    (["--multi_subject", "--multisubject_ckpt={}"], ["--multisubject_ckpt", "--no-multi_subject"]),
    (["--multisubject_ckpt={}", "--hidden_dim=48"], ["train_logs/pretrained", "--hidden_dim=32", "48"]),
    (["--multisubject_ckpt=nowhere/x"], ["nowhere/x", "--multisubject_ckpt"]),
])  # fmt: skip
def test_wrong_flags(smoke_world, pretrained, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(train, "is_wandb_available", lambda: False)
    flags = [flag.format(pretrained / "train_logs/pretrained") for flag in flags]
    with pytest.raises(UserError) as error:
        run(smoke_world, tmp_path, "--model_name=a", *flags)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "train_logs").exists()


def test_the_folder_that_one_is_in_is_read_if_it_has_data(tmp_path, monkeypatch):
    """As by the original, whose README's command names no --data_path; the toy world would be trained on instead."""
    (tmp_path / "wds").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="wds/subj02/train/0.tar is missing"):
        train.main(["--multi_subject", "--subj=1"])
    assert recon.parse([]).data_path == "." and not (tmp_path / "toy").exists()


def test_another_gradient_accumulation_of_the_launcher_is_refused(smoke_world, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")  # as a DeepSpeed config sets it
    with pytest.raises(UserError, match="gradient_accumulation_steps=1, not 3: .*--config_file"):
        run(smoke_world, tmp_path, "--gradient_accumulation=3", *SMALL)


def test_each_picture_is_recoloured_for_itself():
    class Eye(SimpleNamespace):
        def tokens(self, images):
            return images
    images = torch.rand(1, 3, 8, 8).expand(64, -1, -1, -1)
    torch.manual_seed(0)
    seen = train.encode({"voxels": [], "images": images}, SimpleNamespace(frozen={"clip": Eye()}), "cpu")["clip"]
    changed = (seen - images).flatten(1).abs().amax(1) > 1e-6
    assert 8 <= changed.sum() <= 32 and len(seen[changed].unique(dim=0)) == changed.sum()  # .3 of them, each its way


# ---- as a user starts it

def launch(folder, *command, **changed) -> subprocess.CompletedProcess:
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"} | changed
    return subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=300)


def test_exit_code(tmp_path):
    done = launch(tmp_path, ROOT / "train.py", "--data_path=nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("error: nowhere") and "--data_path" in sentence
    assert not any(tmp_path.iterdir())


def test_deepspeed(smoke_world, tmp_path):
    """ZeRO-2 as in configs/, but on the CPU: trains, tests, and writes what recon.py reads; killed, it goes on."""
    pytest.importorskip("deepspeed")
    own = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "0"}  # with 1, accelerate would leave DeepSpeed out
    config = tmp_path / "zero2.yaml"
    text = (ROOT / "configs/deepspeed_zero2.yaml").read_text()
    config.write_text(text.replace("num_processes: 8", "num_processes: 1"))
    killed = tmp_path / "killed.py"
    killed.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
epoch = train.train_epoch
def cut(args, accelerator, run, *more):
    return os.kill(os.getpid(), signal.SIGKILL) if run.step == 2 * run.steps else epoch(args, accelerator, run, *more)
train.train_epoch = cut
train.main(sys.argv[1:])
""")
    flags = ["--backbone=mlp", "--ckpt_interval=1", *FAST, *SMALL]
    for script, name, code in ((ROOT / "train.py", "whole", 0), (killed, "cut", 1), (ROOT / "train.py", "cut", 0)):
        done = launch(tmp_path, "-m", "accelerate.commands.launch", "--config_file", config, script,
                      f"--data_path={smoke_world}", f"--model_name={name}", "--resume", *flags, **own)
        assert done.returncode == code, done.stderr[-2000:]
    whole, cut = (checkpoints.load_checkpoint(tmp_path / "train_logs" / name) for name in ("whole", "cut"))
    assert whole["config"] == SMALL_SIZES | {"backbone": "mlp"}
    assert all(torch.equal(x, cut["model_state_dict"][name]) for name, x in whole["model_state_dict"].items())
    saved = checkpoints.torch_load(tmp_path / "train_logs/whole/last/mp_rank_00_model_states.pt", "")["module"]
    exact = networks.constants(networks.MindEye2([5], **SMALL_SIZES).state_dict())
    assert exact.keys() < saved.keys() and all(torch.equal(x, saved[name]) for name, x in exact.items())
    assert saved["backbone.backbone_linear.weight"].dtype == torch.bfloat16
    assert sorted(path.name for path in (tmp_path / "train_logs/cut").iterdir() if "tfevents" not in path.name) == [
        "curves.png", "last", "samples.png", "zero_to_fp32.py", "zero_to_torch.py"]  # the last two are DeepSpeed's


def test_accelerate_launch(smoke_world, tmp_path):
    done = launch(tmp_path, "-m", "accelerate.commands.launch", "--config_file", ROOT / "configs/cpu.yaml",
                  ROOT / "train.py", f"--data_path={smoke_world}", "--model_name=a", *FAST, *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights(tmp_path, "a")


# ---- another dataset (README)

def test_a_ninth_person_from_scans_to_pictures(world_copy, pretrained, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 40, 40, generator=generator)
    image_of_trial = torch.arange(24) // 2  # each picture twice; the last four are kept for testing
    voxels = torch.randn(24, 33, generator=generator)
    nsd.write_subject(world_copy, 9, voxels, images, image_of_trial, np.ones(24, int), image_of_trial >= 8)
    run(world_copy, tmp_path, "--model_name=mine", "--subj=9", "--num_epochs=1",
        f"--multisubject_ckpt={pretrained / 'train_logs/pretrained'}")
    assert weights(tmp_path, "mine")["ridge.linears.0.weight"].shape == (32, 33)
    drawn = recon.main([f"--data_path={world_copy}", f"--train_logs={tmp_path / 'train_logs'}", "--model_name=mine",
                        f"--evals={tmp_path / 'evals'}", "--subj=9", "--scheduler=dpm", "--steps=2", "--guidance=1"])
    assert drawn["recons"].shape == (4, 3, 64, 64) and len(drawn["predcaptions"]) == 4


def test_a_weight_in_pieces_learns_as_the_whole():
    torch.manual_seed(0)
    wide, small = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((7, 4), (2, 3)))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (wide, small)]
    plain = torch.optim.AdamW([{"params": twins, "weight_decay": .1}], lr=.1)
    cut = train.in_pieces(torch.optim.AdamW, [{"params": [wide, small], "weight_decay": .1}], most=12, lr=.1)
    assert [len(p) for p in cut.param_groups[0]["params"]] == [3, 3, 1, 2]
    for _ in range(3):
        for optimizer, (one, two) in ((plain, twins), (cut, (wide, small))):
            (one.square().sum() + (two - 1).square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(wide, twins[0]) and torch.equal(small, twins[1]) and wide.grad is None


def test_targets_in_memory_are_those_of_the_disk(smoke_world, tmp_path, monkeypatch):
    disk = run(smoke_world, tmp_path, "--model_name=a", "--num_epochs=1", *SMALL)
    read, load = [], data.TargetCache.to_memory
    monkeypatch.setattr(data.TargetCache, "to_memory", lambda cache, rows: read.append(cache.name) or load(cache, rows))
    assert run(smoke_world, tmp_path, "--model_name=b", "--num_epochs=1", "--in_memory", *SMALL) == disk
    assert read == ["clip", "vae", "teacher"]
    monkeypatch.setattr(data.psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    with pytest.raises(UserError, match="takes .* bytes of memory, 1 are free: leave out --in_memory"):
        run(smoke_world, tmp_path, "--model_name=b", "--num_epochs=1", "--in_memory", *SMALL)


def test_without_cached_views_each_step_has_a_new_one(smoke_world, tmp_path, monkeypatch):
    seen, low_level = [], train.low_level
    monkeypatch.setattr(train, "low_level", lambda out, batch, *rest: (
        seen.append((batch["features"], batch["features_aug"])), low_level(out, batch, *rest))[1])
    run(smoke_world, tmp_path, "--num_epochs=3", "--teacher_views=0", *SMALL)
    assert len(seen) >= 3 and all(plain.shape == changed.shape for plain, changed in seen)
    ratios = [((changed - plain).norm() / plain.norm()).item() for plain, changed in seen]
    assert all(0.01 < ratio < 2 for ratio in ratios) and len(set(ratios)) == len(ratios)


def test_the_prior_is_tested_by_few_images_at_a_time(monkeypatch):
    tokens, clip, sizes = torch.randn(70, 2, 3), torch.randn(70, 2, 3), []

    def loss(backbone, target, **_):
        sizes.append(len(target))
        return torch.nn.functional.mse_loss(backbone, target), None
    model = torch.nn.Linear(1, 1)
    model.diffusion_prior = SimpleNamespace(loss=loss)
    monkeypatch.setattr(data, "repeats", lambda _: (np.arange(70), [np.array([i]) for i in range(70)]))
    monkeypatch.setattr(data, "embed_images", lambda *_: {"backbone": tokens, "clip_voxels": tokens})
    part, targets = SimpleNamespace(trials=None, voxels=None), SimpleNamespace(clip=clip)
    found = train.test(model, part, targets, torch.device("cpu"))["loss_prior"]
    assert sizes == [32, 32, 6] and found == pytest.approx((tokens - clip).square().mean().item(), rel=1e-5)
