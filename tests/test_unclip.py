"""unclip.py on a micro world: 40 pictures of noise, a CLIP and an SDXL of random weights, as small as can be.

    python -m pytest tests/test_unclip.py
"""

import argparse
import csv
import io
import json
import os
import runpy
import signal
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_recon import D, make_data, make_networks  # noqa: E402
from test_refine import UNET, make_sdxl  # noqa: E402

import data  # noqa: E402
import frozen  # noqa: E402
import judges  # noqa: E402
import metrics  # noqa: E402
import model as m  # noqa: E402
import recon  # noqa: E402
import unclip  # noqa: E402

FAST = ["--steps=2", "--guidance=1", "--resolution=16", "--draw_size=16", "--batch_size=4", "--num_val=8",
        "--num_eval=0", "--warmup=2", "--max_lr=1e-3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Images, CLIP and sdxl/ of random weights."""
    folder = tmp_path_factory.mktemp("unclip")
    make_data(folder)
    make_networks(folder)
    make_sdxl(folder / "sdxl")
    return folder


def run(world: Path, logs: Path, *flags: str) -> dict:
    return unclip.main([f"--data_path={world}", f"--train_logs={logs}", *FAST, *flags])


def weights(logs: Path, name: str = "decoder") -> dict[str, torch.Tensor]:
    return load_file(logs / name / "unclip/unet/diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------------------
# Conversion

@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET).eval()


def say(unet: UNet2DConditionModel, tokens: torch.Tensor, **conditions) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(x, torch.tensor([700, 20]), tokens, **conditions).sample


@pytest.mark.parametrize("how, equal", [("size", True), ("first", False), ("random", False)])
def test_converted_unet_starts_as_its_base_with_an_empty_text(base, how, equal):
    words = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([[480, 640, 3, 0], [64, 64, 0, 0]])
    numbers = torch.cat((sizes, torch.full((2, 2), 8 * UNET["sample_size"])), 1).float()
    before = say(base, words, added_cond_kwargs={"text_embeds": torch.zeros(2, 12), "time_ids": numbers})
    converted = unclip.convert(base, 32, "cut", how)  # as many channels as words: all of to_k and to_v is kept
    after = say(converted, words, class_labels=frozen.size_vector(sizes, 4 * UNET["addition_time_embed_dim"]))
    assert ((before - after).abs().max() < 1e-5) == equal


def test_what_is_kept_and_what_is_new(base):
    old = base.state_dict()
    for how in ("random", "zero", "cut"):
        new = unclip.convert(base, 48, how, "size").state_dict()
        for name, weight in new.items():
            if "attn2.to_k" in name or "attn2.to_v" in name:
                assert weight.shape == (old[name].shape[0], 48)
                assert torch.equal(weight[:, :32], old[name]) == (how == "cut")
                assert (weight[:, 32:].abs().max() > 0) == (how != "zero" or "to_k" in name)
            elif "class_embedding.linear_1" not in name:
                assert torch.equal(weight, old[name.replace("class_embedding", "add_embedding")])
    assert not any(name.startswith("add_embedding") for name in new)


def test_zero_is_told_nothing_and_random_is(base):
    tokens = torch.randn(2, 2, 4, 48)
    vector = {"class_labels": torch.zeros(2, 16)}
    for how, deaf in (("zero", True), ("random", False)):
        converted = unclip.convert(base, 48, how, "size").eval()
        assert torch.equal(say(converted, tokens[0], **vector), say(converted, tokens[1], **vector)) == deaf


def test_first_takes_the_columns_of_the_pooled_text(base):
    weight = unclip.convert(base, 48, "random", "first").class_embedding.linear_1.weight
    assert torch.equal(weight, base.add_embedding.linear_1.weight[:, :16])


def test_a_decoder_is_taken_as_it_is(base):
    decoder = unclip.convert(base, 48, "random", "size")
    assert unclip.convert(decoder, 48, "random", "size") is decoder
    with pytest.raises(m.UserError, match="reads tokens of 48 channels, CLIP makes 24"):
        unclip.convert(decoder, 24, "random", "size")
    with pytest.raises(m.UserError, match="neither an SDXL nor a decoder"):
        unclip.token_config(dict(base.config) | {"addition_embed_type": None}, 24)


# ---------------------------------------------------------------------------------------------------------------------
# The loss

ALPHAS = torch.linspace(.9991, .0047, 1000)


def shown(count: int = 64, t: int | None = None, prediction: str = "epsilon", **options):
    args = argparse.Namespace(**{"offset_noise": 0, "token_noise": 0, "blind": 0, "min_snr": None} | options)
    args.prediction = prediction
    g = torch.Generator().manual_seed(3)
    batch = {"latents": torch.randn(count, 4, 8, 8, generator=g), "tokens": torch.randn(count, 4, D, generator=g),
             "numbers": torch.tensor([[64, 64, 0, 0]]).expand(count, -1)}
    times = None if t is None else torch.full((count,), t)
    mean = batch["tokens"].mean(0)
    return unclip.prepare(batch, ALPHAS, args, 16, torch.Generator().manual_seed(4), mean, times), batch


def test_noise_is_added_by_the_schedule_and_is_the_target():
    step, batch = shown(t=500)
    a = ALPHAS[500]
    assert torch.allclose(step.x, a.sqrt() * batch["latents"] + (1 - a).sqrt() * step.target)
    velocity = shown(t=500, prediction="v_prediction")[0]
    assert torch.equal(velocity.x, step.x)
    assert torch.allclose(velocity.target, a.sqrt() * step.target - (1 - a).sqrt() * batch["latents"])
    assert torch.equal(step.vector[0], frozen.unclip_vector(16, 64)[0])
    assert len(shown(512)[0].t.unique()) > 300  # drawn anew for each picture


def test_offset_noise_is_one_number_a_picture():
    plain, offset = shown(t=9)[0].target, shown(t=9, offset_noise=.5)[0].target
    shift = offset - plain
    assert torch.allclose(shift, shift[:, :1, :1, :1].expand_as(shift), atol=1e-5)
    assert .35 < shift[:, 0, 0, 0].std() < .65


def test_min_snr_weighs_as_its_paper():
    for t in (3, 900):
        snr = ALPHAS[t] / (1 - ALPHAS[t])
        for prediction, divisor in (("epsilon", snr), ("v_prediction", snr + 1)):
            weight = shown(t=t, prediction=prediction, min_snr=5.)[0].weight
            assert torch.allclose(weight, min(snr, torch.tensor(5.)) / divisor)
    assert (shown()[0].weight == 1).all()


def test_blind_and_imperfect_tokens():
    assert torch.equal(shown()[0].tokens, shown()[1]["tokens"])
    blind = (shown(256, blind=.25)[0].tokens != shown(256)[1]["tokens"]).flatten(1).any(1)
    assert .15 < blind.float().mean() < .35
    moved, tokens = (x.flatten(1) - x.flatten(1).mean(0) for x in (shown(256, token_noise=.7)[0].tokens,
                                                                  shown(256)[1]["tokens"]))
    assert .4 < ((moved - tokens).norm(dim=1) < .2).float().mean() < .6
    likeness = torch.nn.functional.cosine_similarity(moved[:, None], tokens[None], dim=-1)  # (256, 256)
    own, other = likeness.diagonal().clone(), likeness.fill_diagonal_(0).max(1).values
    assert own.min() > .5 and other.max() > .5  # what it was moved towards is another picture's, not noise


def test_loss_is_the_weighted_mean_square():
    step = shown(8, min_snr=5.)[0]
    class Silent(torch.nn.Linear):
        def forward(self, x, t, tokens, class_labels, return_dict):
            return (torch.zeros_like(x),)

    loss = unclip.decoder_loss(Silent(1, 1), step)
    assert torch.isclose(loss, (step.weight * step.target.square().mean((1, 2, 3))).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Order, learning rate, average

def test_each_epoch_shows_each_picture_once_whatever_the_processes():
    args = argparse.Namespace(batch_size=3, num_steps=8, seed=1)
    rows = np.arange(100, 124)
    parts = [list(unclip.batches(rows, args, 0, rank, 2)) for rank in range(2)]
    epochs = [np.sort(np.concatenate([part[k] for part in parts for k in steps])) for steps in (range(4), range(4, 8))]
    assert all(np.array_equal(epoch, rows) for epoch in epochs)
    assert not np.array_equal(parts[0][0], parts[0][4])
    later = list(unclip.batches(rows, args, 5, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(later, parts[1][5:], strict=True))
    few = list(unclip.batches(np.arange(2), argparse.Namespace(batch_size=3, num_steps=2, seed=1), 0, 0, 1))
    assert [len(batch) for batch in few] == [3, 3]


def test_learning_rate_rises_stays_and_falls():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
    args = argparse.Namespace(max_lr=2., warmup=4, num_steps=100, decay=.5)
    rates = [unclip.set_lr(optimizer, step, args) for step in (0, 3, 40, 75, 99)]
    assert rates == pytest.approx([.5, 2, 2, 1, .04])
    assert optimizer.param_groups[0]["lr"] == rates[-1]
    args.decay = 0.
    assert unclip.set_lr(optimizer, 99, args) == 2


def test_average_follows_and_is_used_only_inside():
    layer = torch.nn.Linear(2, 2)
    average = [torch.zeros_like(p) for p in layer.parameters()]
    now = layer.weight.detach().clone()
    unclip.follow(average, list(layer.parameters()), 10**6, .9)
    assert torch.allclose(average[0], .1 * now)
    with unclip.averaged(layer, list(layer.parameters()), average):
        assert torch.allclose(layer.weight, .1 * now) and not layer.training
    assert torch.equal(layer.weight, now) and layer.training
    unclip.follow(average, list(layer.parameters()), 0, .9)  # a young one: 9/10 of the way
    assert torch.allclose(average[0], .91 * now)


def test_an_average_of_another_precision_leaves_the_weights_their_hooks():
    """By which DDP exchanges gradients: it hangs them on the node that adds up a weight's gradient."""
    layer = torch.nn.Linear(2, 2).bfloat16()
    own, called = layer.weight, []
    node = own.expand_as(own).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: called.append(1))
    with unclip.averaged(layer, list(layer.parameters()), [torch.ones(2, 2), torch.zeros(2)]):
        assert layer.weight.dtype == torch.float32 and layer.weight.sum() == 4 and not layer.weight.requires_grad
    assert layer.weight is own and own.dtype == torch.bfloat16
    own.sum().backward()
    assert called == [1]


# ---------------------------------------------------------------------------------------------------------------------
# Tars of pictures

def write_tar(path: Path, pictures: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in pictures.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    """Red to the right, green downwards."""
    x, y = np.meshgrid(np.arange(width) * 255 // width, np.arange(height) * 255 // height)
    file = io.BytesIO()
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def write_tars(folder: Path, count: int = 24) -> str:
    for k in range(2):
        files = {f"{i:03d}.{kind}": picture(40 + i, 32, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind])
                 for i, kind in zip(range(count // 2), ["jpg", "png", "webp"] * count, strict=False)}
        write_tar(folder / f"{k}.tar", files | {"000.txt": b"a caption"})
    return f"{folder}/{{0..1}}.tar"


def test_tars_give_the_middle_square_and_what_was_cut(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": picture(64, 32), "a.txt": b"text"})
    write_tar(tmp_path / "1.tar", {"b.webp": picture(16, 16, "WEBP"), "c.jpg": picture(32, 128, "JPEG")})
    images = data.TarImages(f"{tmp_path}/{{0..1}}.tar", 16)
    assert len(images) == 3
    assert images.numbers([2, 0, 1]).tolist() == [[128, 32, 24, 0], [32, 64, 0, 8], [16, 16, 0, 0]]
    pictures = images[[0, 2]]
    assert pictures.shape == (2, 3, 16, 16) and pictures.max() <= 1
    red, green = pictures[0, 0].mean(), pictures[1, 1].mean()
    assert abs(red - .5) < .03 and abs(green - .5) < .03  # the middle of the long side ..
    assert pictures[0, 0, 8, 0] > .2 and pictures[0, 0, 8, -1] < .8  # .. and only that
    assert images.fingerprint() != data.TarImages(f"{tmp_path}/0.tar", 16).fingerprint()


def test_broken_tars(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": picture(64, 32), "b.png": picture(64, 32)})
    whole = (tmp_path / "0.tar").read_bytes()
    for name, content, words in (("cut", whole[:700], "cut short or damaged"), ("none", None, "does not exist"),
                                 ("torn", whole[:1024] + b"x" * 20000, "cut short or damaged")):
        if content:
            (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(m.UserError, match=f"{name}.tar (is )?{words}"):
            data.TarImages(tmp_path / f"{name}.tar", 16)
    write_tar(tmp_path / "text.tar", {"a.txt": b"text"})
    with pytest.raises(m.UserError, match="holds no picture"):
        data.TarImages(tmp_path / "text.tar", 16)
    write_tar(tmp_path / "half.tar", {"a.png": picture(64, 32), "b.png": b"no picture", "c.png": picture(64, 32)[:90]})
    with pytest.warns(UserWarning, match="1 files"):
        images = data.TarImages(tmp_path / "half.tar", 16)
    assert len(images) == 2
    with pytest.raises(m.UserError, match="half.tar: the picture at byte .* is damaged"):
        images[[1]]


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

def test_a_run_writes_a_decoder_that_recon_draws_with(world, tmp_path):
    result = run(world, tmp_path, "--num_steps=24", "--ckpt_interval=12", "--num_eval=8", "--max_lr=3e-3", "--ema=.5")
    folder = tmp_path / "decoder"
    assert [step for step, _ in result["history"]["val/loss"]] == [12, 24]
    assert result["history"]["val/loss"][1][1] < result["history"]["val/loss"][0][1]
    assert {"samples.png", "curves.png", "table9.csv", "state", "unclip"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("*.building")) and [p.name for p in (folder / "state").iterdir()] == ["step_00000024"]
    log = EventAccumulator(str(folder), {"images": 0}).Reload()
    assert len(log.Images("seen and drawn")) == 2 and [x.step for x in log.Scalars("val/loss")] == [12, 24]
    decoder, clip = frozen.load_unclip(folder / "unclip", "cpu"), frozen.load_clip(world, "cpu")
    assert (decoder.output_scale, decoder.unet.config.sample_size) == (.5, 2)
    tokens = clip.tokens(data.Images(world)[[0, 1]])
    assert recon.draw(decoder, tokens, torch.randn(2, 4, 2, 2), steps=2, guidance=1).shape == (2, 3, 16, 16)
    rows = {row["metric"]: row for row in csv.DictReader(open(folder / "table9.csv"))}
    assert set(rows) == {"pixcorr", "ssim"} == set(result["table"])  # no judge is there
    assert rows["pixcorr"]["paper"] == "0.676" and float(rows["pixcorr"]["yours"]) == pytest.approx(
        result["table"]["pixcorr"], abs=1e-6)


SIX_STEPS = ["--num_steps=6", "--ckpt_interval=2", "--token_noise=.5", "--blind=.1"]


@pytest.fixture(scope="module")
def never_killed(world, tmp_path_factory) -> tuple[Path, dict]:
    logs = tmp_path_factory.mktemp("whole")
    return logs, run(world, logs, *SIX_STEPS)["history"]


def state(logs: Path) -> dict[str, torch.Tensor]:
    return load_file(logs / "decoder/state/step_00000006/model.safetensors")


def test_killed_and_run_again_gives_the_same_weights(world, tmp_path, never_killed, monkeypatch):
    flags = SIX_STEPS
    whole, history = never_killed
    step = unclip.train_step
    def killed(args, accelerator, run, batch, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(args, accelerator, run, batch, number)
    monkeypatch.setattr(unclip, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path, *flags)
    before = weights(tmp_path)
    torch.manual_seed(77)  # whatever the new process's own random numbers are
    resumed = []
    monkeypatch.setattr(unclip, "train_step", lambda *x: (resumed.append(x[-1]), step(*x))[1])
    again = run(world, tmp_path, *flags)
    assert resumed == [4, 5]
    assert same(weights(whole), weights(tmp_path)) and not same(before, weights(tmp_path))
    assert same(state(whole), state(tmp_path)) and again["history"] == history


@pytest.mark.parametrize("at, saved", [(2, 3), (3, 4)])  # between two reports, and where there is one
def test_sigterm_saves_at_once(world, tmp_path, never_killed, monkeypatch, at, saved):
    whole, history = never_killed
    seen, step = [], unclip.train_step
    def terminated(*given):
        seen.append(given[-1])
        if len(seen) == at + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)
    monkeypatch.setattr(unclip, "train_step", terminated)
    with pytest.raises(SystemExit) as ended:
        run(world, tmp_path, *SIX_STEPS)
    assert ended.value.code == 143 and seen == list(range(at + 1))
    assert [path.name for path in (tmp_path / "decoder/state").iterdir()] == [f"step_{saved:08d}"]
    assert run(world, tmp_path, *SIX_STEPS)["history"] == history and seen == [*range(6)]
    assert same(weights(whole), weights(tmp_path)) and same(state(whole), state(tmp_path))


def test_going_on_with_other_flags_is_refused(world, tmp_path):
    run(world, tmp_path, "--num_steps=2")
    with pytest.raises(m.UserError, match="is of a run with --batch_size=4, not 2: pass that"):
        run(world, tmp_path, "--num_steps=2", "--batch_size=2")
    progress = tmp_path / "decoder/state/step_00000002/progress.json"
    said = progress.read_text()
    progress.write_text(said.replace('"num_processes": 1', '"num_processes": 2'))
    with pytest.raises(m.UserError, match="is of a run with --num_processes=2, not 1"):
        run(world, tmp_path, "--num_steps=2")
    progress.write_text(said)
    longer = run(world, tmp_path, "--num_steps=3")  # the rate is constant: the same run, only longer
    assert [step for step, _ in longer["history"]["val/loss"]] == [2, 3]


def test_without_a_cache_on_tars(world, tmp_path):
    pattern = write_tars(tmp_path)
    before = set((world / "targets").glob("*")) if (world / "targets").exists() else set()
    flags = ["--num_steps=2", f"--images={pattern}"]
    computed = run(world, tmp_path / "a", *flags, "--no-cache")
    assert before == (set((world / "targets").glob("*")) if (world / "targets").exists() else set())
    cached = run(world, tmp_path / "b", *flags)
    a, b = (result["history"]["train/loss"][0][1] for result in (computed, cached))
    assert a == pytest.approx(b, rel=1e-2)  # the cache is in half precision


def test_washed_out_or_plain_tokens(world, tmp_path):
    run(world, tmp_path, "--num_steps=1", "--model_name=pale")
    run(world, tmp_path, "--num_steps=1", "--model_name=plain", "--no-washed_out")
    assert not same(weights(tmp_path, "pale"), weights(tmp_path, "plain"))
    scales = [json.loads((tmp_path / name / "unclip/model_index.json").read_text())["output_scale"]
              for name in ("pale", "plain")]
    assert scales == [.5, .8]


def test_only_cross_attention_learns(world, tmp_path):
    run(world, tmp_path, "--num_steps=0", "--model_name=before")
    run(world, tmp_path, "--num_steps=3", "--ema=0", "--train=cross_attention", "--model_name=after")
    before, after = weights(tmp_path, "before"), weights(tmp_path, "after")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("attn2" in name or name.startswith("class_embedding") for name in changed)
    assert any("to_k" in name for name in changed)


def test_gradient_checkpointing_changes_no_weight(world, tmp_path, monkeypatch):
    calls, forward = [], ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, *given, **more: (
        calls.append(1) if self.training else None, forward(self, *given, **more))[1])  # the VAE's are not in training
    run(world, tmp_path, "--num_steps=2", "--model_name=plain")
    once = len(calls)
    run(world, tmp_path, "--num_steps=2", "--model_name=twice", "--gradient_checkpointing")
    a, b = weights(tmp_path, "plain"), weights(tmp_path, "twice")
    assert all((a[key].float() - b[key].float()).abs().max() < 1e-3 for key in a) and len(calls) > 2 * once


def test_random_weights_from_a_config(world, tmp_path):
    config = world / "sdxl/unet/config.json"
    result = run(world, tmp_path, "--num_steps=1", f"--base={config}", f"--vae={world / 'vae'}",
                 "--prediction=v_prediction")
    assert result["history"]["val/loss"]
    scheduler = json.loads((tmp_path / "decoder/unclip/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert json.loads((tmp_path / "decoder/unclip/unet/config.json").read_text())["cross_attention_dim"] == D
    again = run(world, tmp_path, "--num_steps=0", f"--base={tmp_path / 'decoder/unclip'}", "--model_name=same")
    assert again["history"] == {} and same(weights(tmp_path), weights(tmp_path, "same"))


def test_shared_images_are_held_out(tmp_path):
    folder = tmp_path / "nsd"
    make_data(folder)
    np.save(folder / "shared1000.npy", np.isin(np.arange(40), [3, 9, 12]))
    args = argparse.Namespace(images=str(data.h5_path(folder, "images")), resolution=16, num_val=1000)
    pictures = unclip.load_pictures(args)
    assert pictures.val.tolist() == [3, 9, 12] and len(pictures.train) == 37
    assert not set(pictures.val) & set(pictures.train)
    assert pictures.images[[5]].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("flags, words", [
    (["--base=nowhere"], "nowhere"),
    (["--images=nowhere/{0..1}.tar"], "nowhere/0.tar does not exist"),
    (["--images=nowhere.hdf5"], "nowhere.hdf5 does not exist"),
    (["--num_val=40"], "too few to learn from"),
    (["--resolution=20"], "--resolution must be a multiple of 16"),
    (["--weights=bfloat16"], "add --optimizer=adamw8bit"),
    (["--ema=1"], "--ema must be"),
    (["--graph"], "--graph needs an NVIDIA GPU"),
    (["--seed=-1"], "--seed must be at least 0"),
    (["--batch_size=0"], "--batch_size must be at least 1"),
    (["--max_lr=1e30", "--warmup=0", "--ema=0"], "lower --max_lr"),
])
def test_mistakes(world, tmp_path, flags, words):
    with pytest.raises(m.UserError, match=words.replace("{", r"\{")):
        run(world, tmp_path, "--num_steps=3", "--ckpt_interval=3", *flags)
    assert not (tmp_path / "decoder/unclip").exists()


@pytest.mark.parametrize("graph", [True, False])
def test_graph_is_as_this_run_has_it_not_as_the_one_before(tmp_path, graph):
    """AdamW keeps it among what it saves, and torch does not record a step without it."""
    weight = torch.nn.Parameter(torch.ones(2))
    before, now = (torch.optim.AdamW([weight], capturable=value) for value in (not graph, graph))
    args, run_so_far = SimpleNamespace(optimizer="adamw", graph=graph), SimpleNamespace(optimizer=now, average=None)
    (tmp_path / "progress.json").write_text('{"step": 3, "history": {}, "losses": []}')
    accelerator = SimpleNamespace(load_state=lambda folder: now.load_state_dict(before.state_dict()), device="cpu")
    unclip.load_state(args, tmp_path, accelerator, run_so_far)
    assert run_so_far.step == 3 and now.param_groups[0]["capturable"] is graph


def test_a_decoder_in_training_is_not_replaced_by_its_base(world, tmp_path):
    run(world, tmp_path, "--num_steps=1")
    trained = weights(tmp_path)
    with pytest.raises(m.UserError, match="decoder holds a decoder in training, .*--num_steps=0"):
        run(world, tmp_path, "--num_steps=0")
    assert same(weights(tmp_path), trained)


def test_table9_scales_as_its_tokens_ask(world, tmp_path, monkeypatch):
    """Plain tokens: what the VAE draws in [-1, 1] is [0, 1] in the picture, whatever recon.py is to do of pale ones."""
    scales, drawn = [], recon.draw
    monkeypatch.setattr(recon, "draw", lambda unclip, *rest: (
        scales.append((unclip.output_scale, unclip.output_shift)), drawn(unclip, *rest))[1])
    run(world, tmp_path, "--num_steps=1", "--no-washed_out", "--num_eval=4")
    assert len(scales) >= 2 and set(scales) == {(.5, .5)}


def test_config_without_vae(world, tmp_path):
    with pytest.raises(m.UserError, match="brings no VAE: name a folder with --vae"):
        run(world, tmp_path, f"--base={world / 'sdxl/unet/config.json'}")


def test_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unclip.py", "--data_path=nowhere"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(unclip.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "nowhere" in said


# ---------------------------------------------------------------------------------------------------------------------
# Table 9

def test_frechet_distance(monkeypatch):
    class Means(torch.nn.Module):
        def forward(self, pictures):
            return pictures.float().mean((2, 3)) / 255

    monkeypatch.setattr(judges, "load_fid", lambda *_: SimpleNamespace(network=Means(), description="means"))
    # One of several processes: to wait for the others, which judge nothing, would be an error here.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    g = torch.Generator().manual_seed(0)
    seen = torch.randint(0, 200, (400, 3, 8, 8), generator=g, dtype=torch.uint8)
    args = argparse.Namespace(cache_dir="")
    assert unclip.frechet_distance(seen, seen, args, "cpu")[0] == pytest.approx(0, abs=1e-6)
    distance = unclip.frechet_distance(seen, seen + 51, args, "cpu")[0]  # .2 in each of three means, equal covariances
    assert distance == pytest.approx(3 * .2**2, abs=1e-4)


def test_table_of_the_paper_has_rows_that_are_known():
    assert set(unclip.PAPER) == {"fid", *metrics.PICTURES}
