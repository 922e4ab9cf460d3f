"""recon.py on a micro world: one subject, 13 test images, networks of random weights in the real formats.

    python -m pytest tests/test_recon.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from golden_weights import golden  # noqa: E402

import data  # noqa: E402
import model as m  # noqa: E402
import recon  # noqa: E402

SUBJECT, V, S, D, SIDE = 2, 9, 4, 24, 32  # voxels, tokens, channels, pixels
REPEATS = [3, 1, 2, 3, 3, 1, 3, 2, 3, 3, 3, 1, 3]  # of each test image
IMAGES = np.array([4, 5, 7, 11, 12, 20, 21, 22, 30, 31, 33, 38, 39])  # their row numbers
FAST = ["--steps", "2", "--prior_steps", "3", "--guidance", "1"]


def make_data(folder: Path, voxels: int = V) -> None:
    """Test trials in random file order; the image file has 40 rows of noise."""
    rng = np.random.default_rng(0)
    seen = rng.permutation(np.repeat(IMAGES, REPEATS))
    table = np.full((len(seen), 17), -1.0)
    table[:, 0], table[:, 1], table[:, 2], table[:, 5] = seen, SUBJECT, 1, rng.permutation(len(seen))
    windows = data.behaviour_windows(table)
    data.write_session_tar(data.session_tar(folder, SUBJECT, "new_test"), table, *windows)
    data.write_betas(data.h5_path(folder, "betas", SUBJECT), rng.standard_normal((len(seen), voxels)))
    data.write_images(data.h5_path(folder, "images"), rng.random((40, 3, SIDE, SIDE)))


def make_networks(folder: Path) -> None:
    """clip/, unclip/, vae/: random, as small as the libraries allow."""
    torch.manual_seed(0)
    vision = {"image_size": SIDE, "patch_size": SIDE // 2, "layers": 1, "width": D, "head_width": 12}
    text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "clip").mkdir(parents=True)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "clip" / "open_clip_model.safetensors")
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, scaling_factor=0.5,
        block_out_channels=[8] * 3, norm_num_groups=4, layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    vae.save_pretrained(folder / "unclip" / "vae")
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=D,
        attention_head_dim=4, norm_num_groups=4,
        class_embed_type="projection", projection_class_embeddings_input_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(folder / "unclip" / "unet")
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.save_pretrained(folder / "unclip" / "scheduler")


def make_checkpoint(path: Path, num_voxels=(V,), **sizes) -> m.MindEye2:
    torch.manual_seed(1)
    sizes = {"hidden_dim": 16, "n_blocks": 2, "latent_size": SIDE // 4, "prior_depth": 1, "prior_dim_head": 12} | sizes
    model = m.MindEye2(list(num_voxels), clip_seq_dim=S, clip_emb_dim=D, **sizes)
    m.save_checkpoint(path, model)
    return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with data/ (networks included) and train_logs/micro/last.pth; `run` calls recon.main there."""
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data")
    make_networks(folder / "data")
    model = make_checkpoint(folder / "train_logs" / "micro" / "last.pth")

    def arguments(*more):
        places = ["--data_path", folder / "data", "--train_logs", folder / "train_logs", "--evals", folder / "evals"]
        return [str(word) for word in [*places, "--model_name", "micro", "--subj", SUBJECT, *FAST, *more]]

    return SimpleNamespace(folder=folder, model=model, arguments=arguments, run=lambda *a: recon.main(arguments(*a)))


def test_files_shapes_and_order(world):
    out = world.run()
    folder = world.folder / "evals" / "micro"
    names = ["all_blurryrecons.pt", "all_clipvoxels.pt", "all_recons.pt", "grid.png"]
    assert sorted(path.name for path in folder.iterdir()) == [f"micro_{name}" for name in names]
    read = {name: torch.load(folder / f"micro_all_{name}.pt") for name in ("recons", "blurryrecons", "clipvoxels")}
    assert all(torch.equal(value, out[name]) for name, value in read.items())
    for name in ("recons", "blurryrecons"):
        assert read[name].shape == (len(IMAGES), 3, SIDE, SIDE) and read[name].dtype == torch.float32
        assert 0 <= read[name].min() and read[name].max() <= 1 and read[name].std() > 0.01
    assert read["clipvoxels"].shape == (len(IMAGES), S, D) and read["clipvoxels"].dtype == torch.float16
    assert out["image_ids"].tolist() == IMAGES.tolist()
    # By hand: each single trial through the model, then the mean over the image's trials.
    trials = data.load_trials(world.folder / "data", SUBJECT, "new_test")
    voxels = data.load_voxels(world.folder / "data", trials)
    for k, image in enumerate(IMAGES):
        with torch.no_grad():
            rows = np.flatnonzero(trials.image == image)
            single = [world.model.embed(voxels[i : i + 1]).clip_voxels[0] for i in rows]
        assert len(single) == REPEATS[k]
        assert (torch.stack(single).mean(0) - read["clipvoxels"][k]).abs().max() < 2e-3  # float16


def test_embed_images_averages_every_output(world):
    voxels = torch.randn(6, V)
    positions = [np.array([4]), np.array([0, 5, 2]), np.array([3, 1])]
    with torch.no_grad():
        together = recon.embed_images(world.model, voxels, positions, 0)
        alone = vars(world.model.embed(voxels))
    for name in ("backbone", "clip_voxels", "blurry_latents"):
        expected = torch.stack([alone[name][torch.from_numpy(rows)].mean(0) for rows in positions])
        assert torch.allclose(together[name], expected, atol=1e-6)


@pytest.mark.parametrize("extra", [[], ["--guidance", "3", "--scheduler", "dpm"]])
def test_a_picture_does_not_depend_on_its_batch(world, extra):
    one, five = (world.run("--batch_size", size, "--num_images", 6, *extra) for size in (1, 5))
    other = world.run("--num_images", 6, "--seed", 1, *extra)
    for name in ("recons", "blurryrecons", "clipvoxels"):
        assert len(one[name]) == 6 and torch.allclose(one[name], five[name], atol=1e-3)
    assert (one["recons"] - other["recons"]).abs().max() > 0.01
    assert torch.allclose(five["blurryrecons"], other["blurryrecons"], atol=1e-5)  # made without noise


def test_a_run_without_blurry_pictures_leaves_no_old_ones(world):
    world.run("--num_images", 2)
    out = world.run("--num_images", 2, "--no-blurry_recon")
    assert "blurryrecons" not in out and not list(world.folder.glob("evals/micro/*blurry*"))


def test_multi_subject_checkpoint_uses_the_ridge_that_fits(world):
    model = make_checkpoint(world.folder / "train_logs" / "micro" / "many.pth", (7, V, 12))
    trials = data.load_trials(world.folder / "data", SUBJECT, "new_test")
    first = torch.from_numpy(np.flatnonzero(trials.image == IMAGES[0]))
    with torch.no_grad():
        expected = model.embed(data.load_voxels(world.folder / "data", trials)[first], 1).clip_voxels.mean(0)
    out = world.run("--num_images", 1, "--tag", "many")
    assert (out["clipvoxels"][0] - expected).abs().max() < 2e-3


def test_large_pictures_are_saved_at_256():
    x = torch.rand(1, 3, 768, 768)
    y = recon.resized(x, 256)
    assert torch.allclose(y, x[..., 1::3, 1::3], atol=1e-6)  # without antialiasing: the middle of each 3 x 3
    assert torch.equal(recon.resized(y, 256), y)


# ---- the decoder against the original's sampler


@pytest.mark.parametrize("steps", [38, 25, 50])
def test_euler_levels_are_the_originals(steps):
    g = golden("unclip_sampler")
    saved = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule = recon.make_schedule(saved, "euler", steps, "cpu")
    assert (schedule.sigmas - g[f"sigmas{steps}"]).abs().max() < 1e-4
    if f"timesteps{steps}" in g:
        assert schedule.timesteps.tolist() == g[f"timesteps{steps}"].tolist()


def test_draw_with_guidance_equals_the_originals_loop():
    """The original's 38 steps at guidance 5, recorded with a formula in place of the UNet; the VAE is the identity."""
    g = golden("unclip_sampler")

    def unet(x, t, prompt, class_labels):
        mean = 0.2 * prompt.mean((1, 2)) + 0.2 * g["fake_vector"].mean()
        eps = 0.5 * torch.einsum("bchw,cd->bdhw", x, g["fake_W"]) + 0.5 * x.tanh() + 0.1 * torch.sin(t.float() / 100)
        return SimpleNamespace(sample=eps + mean[:, None, None, None])

    unet.dtype, unet.config = torch.float32, SimpleNamespace(projection_class_embeddings_input_dim=16)
    vae = SimpleNamespace(decode=lambda z: SimpleNamespace(sample=z))
    vae.config = SimpleNamespace(scaling_factor=1, block_out_channels=[1] * 4)
    saved = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    unclip = SimpleNamespace(unet=unet, vae=vae, scheduler=saved, output_scale=1 / 200, output_shift=0.5)
    out = recon.draw(unclip, g["fake_crossattn_c"], g["fake_x0"], g["fake_crossattn_uc"])
    assert ((out - 0.5) * 200 - g["fake_out"]).abs().max() < 1e-3  # values have a deviation of 11


# ---- mistakes


@pytest.mark.parametrize("words, sentence", [
    (["--model_name", "nobody"], r"nobody.last\.pth.*does not exist.*--model_name"),
    (["--tag", "early"], r"early\.pth.*does not exist"),
    (["--subj", "5"], r"subj05.*--data_path"),
    (["--hidden_dim", "4096"], r"hidden_dim 16, not 4096.*--hidden_dim"),
    (["--n_blocks", "4"], r"n_blocks 2, not 4"),
    (["--unclip", "nowhere"], r"nowhere.*does not exist"),
    (["--prior_steps", "101"], r"--prior_steps"),
    (["--steps", "1000"], r"--steps must be below 1000"),
    (["--batch_size", "0"], r"--batch_size must be at least 1"),
    (["--tag", "wrong"], r"brains of 8 voxels, of which exactly one must be subject 2's 9.*--subj"),
    (["--tag", "twins"], r"brains of 9, 9 voxels"),
    (["--tag", "plain"], r"no low-level head: pass --no-blurry_recon"),
    (["--tag", "blind"], r"no diffusion prior"),
])  # fmt: skip
def test_mistakes_are_one_sentence_and_write_nothing(world, tmp_path, capsys, words, sentence):
    folder, tag = world.folder / "train_logs" / "micro", words[1]
    variants = {"wrong": {"num_voxels": (8,)}, "twins": {"num_voxels": (V, V)}, "plain": {"blurry_recon": False},
                "blind": {"use_prior": False}}  # fmt: skip
    if tag in variants:
        make_checkpoint(folder / f"{tag}.pth", **variants[tag])
    with pytest.raises(SystemExit) as stop:
        m.run_main(lambda: world.run("--evals", tmp_path / "evals", *words))
    assert stop.value.code == 2 and not (tmp_path / "evals").exists()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and error.endswith(".")
    with pytest.raises(m.UserError, match=sentence):
        world.run("--evals", tmp_path / "evals", *words)


def test_as_a_script(world, tmp_path):
    command = [sys.executable, recon.__file__, *world.arguments("--evals", tmp_path / "evals", "--hidden_dim", 5)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr and not (tmp_path / "evals").exists()
