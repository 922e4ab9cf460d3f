"""recon.py on a micro world: one subject, 13 test images, networks of random weights in the real formats.

    python -m pytest tests/test_recon.py
"""

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import GitConfig, GitForCausalLM, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from golden_weights import golden  # noqa: E402

import checkpoints  # noqa: E402
import data  # noqa: E402
import frozen  # noqa: E402
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
    masks = {"V1": np.arange(voxels) < 3, "V2": np.arange(voxels) == 5, "nsd_general": np.ones(voxels, bool)}
    data.write_region_masks(data.h5_path(folder, "masks"), {SUBJECT: masks})


def make_networks(folder: Path) -> None:
    """clip/, unclip/, vae/, git/ and its converter: random, as small as the libraries allow."""
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
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 32, "patch_size": 16}
    words = ["<pad>", "<start>", "<end>", *"abcdefghij"]
    git = GitForCausalLM(GitConfig(
        vision_config=vision, vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=1.0))
    git.save_pretrained(folder / "git")
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", bos_token="<start>",
                            eos_token="<end>").save_pretrained(folder / "git")
    converter = frozen.CLIPConverter(S, S + 1, D, 8)
    torch.save({"model_state_dict": converter.state_dict()}, folder / "bigG_to_L_epoch8.pth")


def make_checkpoint(path: Path, num_voxels=(V,), **sizes) -> m.MindEye2:
    torch.manual_seed(1)
    sizes = {"hidden_dim": 16, "n_blocks": 2, "latent_size": SIDE // 4, "prior_depth": 1, "prior_dim_head": 12} | sizes
    model = m.MindEye2(list(num_voxels), clip_seq_dim=S, clip_emb_dim=D, **sizes)
    checkpoints.save_checkpoint(path, model)
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
    names = ["backbones", "blurryrecons", "clipvoxels", "predcaptions", "prior_out", "recons"]
    assert sorted(p.name for p in folder.iterdir()) == [*(f"micro_all_{name}.pt" for name in names), "micro_grid.png"]
    read = {name: torch.load(folder / f"micro_all_{name}.pt", weights_only=False) for name in names}
    captions = read.pop("predcaptions")
    assert all(torch.equal(value, out[name]) for name, value in read.items())
    assert isinstance(captions, np.ndarray) and captions.dtype.kind == "U" and captions.shape == (len(IMAGES),)
    assert (captions == out["predcaptions"]).all() and len(set(captions)) > 1
    captioner = frozen.load_captioner(world.folder / "data", "cpu")
    assert captioner.caption(read["prior_out"].float()) == captions.tolist()
    for name in ("recons", "blurryrecons"):
        assert read[name].shape == (len(IMAGES), 3, SIDE, SIDE) and read[name].dtype == torch.float32
        assert 0 <= read[name].min() and read[name].max() <= 1 and read[name].std() > 0.01
    for name in ("clipvoxels", "backbones", "prior_out"):
        assert read[name].shape == (len(IMAGES), S, D) and read[name].dtype == torch.float16
    assert out["image_ids"].tolist() == IMAGES.tolist()
    # By hand: each single trial through the model, then the mean over the image's trials.
    trials = data.load_trials(world.folder / "data", SUBJECT, "new_test")
    voxels = data.load_voxels(world.folder / "data", trials)
    for k, image in enumerate(IMAGES):
        with torch.no_grad():
            rows = np.flatnonzero(trials.image == image)
            single = [world.model.embed(voxels[i : i + 1]) for i in rows]
        assert len(single) == REPEATS[k]
        for name, ours in (("clip_voxels", "clipvoxels"), ("backbone", "backbones")):
            mean = torch.stack([getattr(out, name)[0] for out in single]).mean(0)
            assert (mean - read[ours][k]).abs().max() < 4e-3  # float16


def test_embed_images_averages_every_output(world):
    voxels = torch.randn(6, V)
    positions = [np.array([4]), np.array([0, 5, 2]), np.array([3, 1])]
    with torch.no_grad():
        together = data.embed_images(world.model, voxels, positions, 0)
        alone = vars(world.model.embed(voxels))
    for name in ("backbone", "clip_voxels", "blurry_latents"):
        expected = torch.stack([alone[name][torch.from_numpy(rows)].mean(0) for rows in positions])
        assert torch.allclose(together[name], expected, atol=1e-6)
    for chunk, parts in ((1, (positions[:1], positions[1:2], positions[2:])), (6, (positions[:2], positions[2:]))):
        pieces = data.embed_images(world.model, voxels, positions, 0, chunk)
        each = [data.embed_images(world.model, voxels, part, 0) for part in parts]
        for name, values in pieces.items():
            assert torch.equal(values, torch.cat([out[name] for out in each]))


@pytest.mark.parametrize("extra", [[], ["--guidance", "3", "--scheduler", "dpm"]])
def test_a_picture_does_not_depend_on_its_batch(world, extra):
    one, eight = (world.run("--batch_size", size, "--num_images", 9, *extra) for size in (1, 8))
    other = world.run("--num_images", 9, "--seed", 1, *extra)
    for name in ("recons", "blurryrecons", "clipvoxels"):
        assert len(one[name]) == 9 and torch.allclose(one[name], eight[name], atol=1e-4, rtol=1e-3)
    assert (one["recons"] - other["recons"]).abs().max() > 0.01
    assert torch.allclose(eight["blurryrecons"], other["blurryrecons"], atol=1e-5)  # made without noise


def test_a_run_without_blurry_pictures_leaves_no_old_ones(world):
    world.run("--num_images", 2)
    out = world.run("--num_images", 2, "--no-blurry_recon")
    assert "blurryrecons" not in out and not list(world.folder.glob("evals/micro/*blurry*"))
    assert list(world.folder.glob("evals/micro/*predcaptions*"))
    out = world.run("--num_images", 2, "--no-captions")
    assert "predcaptions" not in out and not list(world.folder.glob("evals/micro/*predcaptions*"))


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
    y = data.resized(x, 256)
    assert torch.allclose(y, x[..., 1::3, 1::3], atol=1e-6)  # without antialiasing: the middle of each 3 x 3
    assert torch.equal(data.resized(y, 256), y)


# ---- many batches, many samples, many regions


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("where", ["embed_images", "draw"])
def test_a_killed_run_goes_on_and_ends_the_same(world, tmp_path, monkeypatch, where):
    words = ["--evals", tmp_path, "--batch_size", 3]
    world.run(*words)
    whole, calls, original = files(tmp_path / "micro"), [], getattr(recon, where)

    def killed_at_the_third(*args, **kwargs):
        calls.append(where)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    for name in whole:
        (tmp_path / "micro" / name).unlink()
    monkeypatch.setattr(recon, where, killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        world.run(*words)
    assert not list((tmp_path / "micro").glob("*all*"))  # nothing that could be taken for a result
    world.run(*words)
    assert len(calls) == 3 + 3  # 13 images are 5 batches: two were done, the third again, then two more
    assert files(tmp_path / "micro") == whole


def test_a_killed_run_with_other_flags_is_not_gone_on_with(world, tmp_path, monkeypatch):
    whole = world.run("--evals", tmp_path, "--batch_size", 3, "--seed", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(frozen, "load_captioner", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        world.run("--evals", tmp_path, "--batch_size", 3, "--seed", 1)
    again = world.run("--evals", tmp_path, "--batch_size", 3, "--seed", 2)
    assert torch.equal(whole["prior_out"], again["prior_out"]) and torch.equal(whole["recons"], again["recons"])


def test_a_killed_run_with_another_decoder_is_not_gone_on_with(world, tmp_path, monkeypatch):
    decoder = tmp_path / "unclip"
    shutil.copytree(world.folder / "data/unclip", decoder)
    flags = ["--evals", tmp_path, "--batch_size", 3, "--unclip", decoder]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(frozen, "decode_latents", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # recons are done
        world.run(*flags)
    index = decoder / "model_index.json"
    index.write_text('{"output_scale": 0, "output_shift": 0.25}')
    stale = tmp_path / "micro/micro_all_enhancedrecons.pt"
    stale.write_text("refined from other pictures")
    assert (world.run(*flags)["recons"] == .25).all() and not stale.exists()
    assert stale.with_suffix(".old.pt").read_text() == "refined from other pictures"  # perhaps the release's


def test_the_sample_nearest_to_the_brain_is_kept(world, monkeypatch):
    """--n_samples 3: of three pictures, drawn one by one here, the one whose CLIP tokens fit the brain's best."""
    out, original, each = world.run("--n_samples", 3), recon.batch_noise, []
    for sample in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(recon, "batch_noise", lambda ids, seed, shapes, stream, device, sample=sample:
                          original(ids, seed, shapes, stream and stream + sample, device))
            each.append(world.run()["recons"])
    assert torch.equal(each[0], world.run()["recons"])
    clip = frozen.load_clip(world.folder / "data", "cpu")
    brain = F.normalize(out["clipvoxels"].flatten(1).float(), dim=1)
    scores = torch.stack([(F.normalize(clip.tokens(x).flatten(1), dim=1) * brain).sum(1) for x in each])  # (3, n)
    best = scores.argmax(0)
    assert len(set(best.tolist())) > 1
    for k in range(len(IMAGES)):
        assert torch.equal(out["recons"][k], each[best[k]][k])


def test_stimuli_are_ones_inside_a_region(world, monkeypatch):
    given, original = [], recon.embed_images
    monkeypatch.setattr(recon, "embed_images", lambda model, voxels, *more: given.append(voxels) or
                        original(model, voxels, *more))
    out = world.run("--stimulate", "V1", "V1+V2", "--evals", world.folder / "stimuli")
    assert given[0].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0]]
    assert out["recons"].shape == (2 * recon.DRAWS, 3, SIDE, SIDE) and len(out["predcaptions"]) == 2 * recon.DRAWS
    assert torch.equal(out["backbones"][0], out["backbones"][2]) and not torch.equal(out["recons"][0], out["recons"][2])
    names = {path.name for path in (world.folder / "stimuli" / "micro").iterdir()}
    assert "micro_stimuli_grid.png" in names and not any(name.startswith("micro_all") for name in names)
    with pytest.raises(m.UserError, match="no region V9: choose --stimulate from V1, V2, nsd_general"):
        world.run("--stimulate", "V9")


def test_low_memory_is_as_good_as_bfloat16(world):
    one, other = (world.run("--num_images", 3, "--guidance", 2, *extra) for extra in ([], ["--low_memory"]))
    for name in ("prior_out", "recons", "clipvoxels"):
        difference = (one[name].float() - other[name].float()).abs().max()
        assert 0 < difference < 0.05 * one[name].float().abs().max()
    model = recon.halve(make_checkpoint(world.folder / "train_logs" / "micro" / "half.pth"))
    assert model.diffusion_prior.noise_scheduler.betas.dtype == torch.float32
    assert model.backbone.backbone_linear.weight.dtype == torch.bfloat16


# ---- the decoder against the original's sampler

NOISE_LEVELS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("steps", [38, 25, 50])
def test_noise_levels_are_the_originals(steps):
    g = golden("unclip_sampler")
    timesteps, sigmas = recon.noise_levels(diffusers.EulerDiscreteScheduler(**NOISE_LEVELS), steps)
    assert (sigmas - g[f"sigmas{steps}"]).abs().max() < 1e-4
    if f"timesteps{steps}" in g:
        assert timesteps.tolist() == g[f"timesteps{steps}"].tolist()


@pytest.mark.parametrize("one_by_one", [False, True])
def test_draw_with_guidance_equals_the_originals_loop(one_by_one):
    """The original's 38 steps at guidance 5, recorded with a formula in place of the UNet; the VAE is the identity."""
    g = golden("unclip_sampler")

    def unet(x, t, prompt, class_labels):
        mean = 0.2 * prompt.mean((1, 2)) + 0.2 * g["fake_vector"].mean()
        eps = 0.5 * torch.einsum("bchw,cd->bdhw", x, g["fake_W"]) + 0.5 * x.tanh() + 0.1 * torch.sin(t.float() / 100)
        return SimpleNamespace(sample=eps + mean[:, None, None, None])

    unet.dtype, unet.config = torch.float32, SimpleNamespace(projection_class_embeddings_input_dim=16)
    vae = SimpleNamespace(dtype=torch.float32, decode=lambda z: SimpleNamespace(sample=z))
    vae.config = SimpleNamespace(scaling_factor=1, block_out_channels=[1] * 4)
    saved = diffusers.DDPMScheduler(**NOISE_LEVELS)
    unclip = SimpleNamespace(unet=unet, vae=vae, scheduler=saved, output_scale=1 / 200, output_shift=0.5)
    out = recon.draw(unclip, g["fake_crossattn_c"], g["fake_x0"], g["fake_crossattn_uc"], one_by_one=one_by_one)
    assert ((out - 0.5) * 200 - g["fake_out"]).abs().max() < 1e-3  # values have a deviation of 11


def test_a_whole_picture_equals_the_originals():
    """From its first random number to the picture, with formulas for UNet and VAE; every fourth pixel is recorded."""
    g = golden("unclip_recon_fake_engine")

    def unet(x, t, prompt, class_labels):
        eps = 0.3 * x.tanh() + 0.01 * torch.sin(t.float() / 50)
        return SimpleNamespace(sample=eps + 0.1 * (prompt.mean((1, 2)) + class_labels.mean(1))[:, None, None, None])

    unet.dtype, unet.config = torch.float32, SimpleNamespace(projection_class_embeddings_input_dim=1024)
    vae = SimpleNamespace(dtype=torch.float32, decode=lambda z: SimpleNamespace(sample=z[:, :3] * 0.05))
    vae.config = SimpleNamespace(scaling_factor=0.13025, block_out_channels=[1] * 4)
    saved = diffusers.EulerDiscreteScheduler(**NOISE_LEVELS)
    unclip = SimpleNamespace(unet=unet, vae=vae, scheduler=saved, output_scale=0.8, output_shift=0.2)
    sigma = recon.noise_levels(saved, 38)[1][0].item()
    start = recon.start_latents(g["z"], g["noise"], g["offset"], sigma)
    with pytest.MonkeyPatch.context() as patch:  # the recorded vector is any
        patch.setattr(frozen, "unclip_vector", lambda *_: g["vector"])
        out = recon.draw(unclip, g["tokens"], start, g["uncond_tokens"])
    assert (out - g["out"]).abs().max() < 1e-4 and 0.01 < out.mean() < 0.99


def test_noise_is_drawn_on_the_cpu_whatever_the_default_device():
    shapes = [(2, 3), ()]
    with torch.device("meta"):  # where nothing can be drawn
        inside = recon.batch_noise(np.arange(2), 1, shapes, 0, "cpu")
    for one, two in zip(inside, recon.batch_noise(np.arange(2), 1, shapes, 0, "cpu"), strict=True):
        assert torch.equal(one, two)


def test_velocity_is_as_good_as_noise():
    """A UNet that tells the velocity and one that tells the noise of the same picture end at that picture."""
    picture = torch.randn(2, 4, 4, 4)
    ends = []
    for kind in ("epsilon", "v_prediction"):
        saved = diffusers.DDPMScheduler(**NOISE_LEVELS, prediction_type=kind)

        def predict(x, t, saved=saved, kind=kind):
            kept = saved.alphas_cumprod[t].double()
            noise = (x - kept.sqrt() * picture) / (1 - kept).sqrt()
            return noise if kind == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * picture

        ends += [solve(predict, torch.randn(2, 4, 4, 4).double(), saved, 8) for solve in (recon.euler, recon.dpm)]
    assert all((end - picture).abs().max() < 1e-3 for end in ends)


# ---- mistakes


@pytest.mark.parametrize("words, sentence", [
    (["--model_name", "nobody"], r"nobody.last\.pth.*does not exist.*--model_name"),
    (["--tag", "early"], r"early\.pth.*does not exist"),
    (["--subj", "5"], r"subj05.*--data_path"),
    (["--hidden_dim", "4096"], r"hidden_dim 16, not 4096.*--hidden_dim"),
    (["--n_blocks", "4"], r"n_blocks 2, not 4"),
    (["--unclip", "nowhere"], r"nowhere.*does not exist"),
    (["--n_samples", "0"], r"--n_samples must be at least 1"),
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


@pytest.mark.parametrize("name, sentence", [
    ("vae", "vae does not exist, nor does .*sd_image_var_autoenc.pth.*--no-blurry_recon"),
    ("bigG_to_L_epoch8.pth", "bigG_to_L_epoch8.pth does not exist.*--no-captions"),
])
def test_missing_networks_are_noticed_before_the_work(world, tmp_path, name, sentence):
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in (world.folder / "data").iterdir():
        if path.name != name:
            (cache / path.name).symlink_to(path)
    with pytest.raises(m.UserError, match=sentence):
        world.run("--cache_dir", cache, "--evals", tmp_path / "evals")
    assert not (tmp_path / "evals").exists()
    world.run("--cache_dir", cache, "--evals", tmp_path / "evals", "--num_images", 1,
              "--no-blurry_recon" if name == "vae" else "--no-captions")


def test_as_a_script(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recon.py", *world.arguments("--evals", tmp_path / "evals", "--hidden_dim", 5)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(recon.__file__, run_name="__main__")
    assert stop.value.code == 2 and capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "evals").exists()
