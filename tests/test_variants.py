"""The flags that claims.py turns: another first layer, prior, mixing, fine-tuning, sampler, or other subjects.

    python -m pytest tests/test_variants.py
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_resume import Killed, same, stop_before
from test_train import SMALL, arguments, built, pretrained, run, weights  # noqa: F401  (pretrained: a fixture)

import checkpoints
import model as m
import recon
import train
from model import UserError

TINY = dict(num_voxels=[9, 7], hidden_dim=16, n_blocks=2, clip_seq_dim=4, clip_emb_dim=24, latent_size=8,
            prior_depth=2, prior_dim_head=12)


def load(folder, name):
    """The model of a run, strictly, and its configuration."""
    return checkpoints.load_model(folder / "train_logs" / name)


# ---- the first layer (Table 4)

def test_a_linear_first_layer_is_linear_and_an_mlp_is_not():
    torch.manual_seed(0)
    x = torch.randn(5, 7)
    for kind, is_linear in (("linear", True), ("mlp", False)):
        ridge = m.MindEye2(**TINY, ridge=kind).eval().ridge
        zero = ridge(torch.zeros(1, 7), 1)
        assert torch.allclose(ridge(3 * x, 1) - zero, 3 * (ridge(x, 1) - zero), atol=1e-4) == is_linear
    expected = F.gelu(F.layer_norm(ridge.linears[1](x), (16,)))  # MindEye1's: norm, GELU, and dropout in training
    assert torch.allclose(ridge(x, 1), expected, atol=1e-6)
    dropped = ridge.train()(x, 1) == 0
    assert .3 < dropped.float().mean() < .7
    with pytest.raises(ValueError, match="'linear' or 'mlp'"):
        m.MindEye2(**TINY, ridge="cubic")


def test_a_fine_tuning_keeps_the_kinds_of_its_pretraining(smoke_world, tmp_path):
    run(smoke_world, tmp_path, "--model_name=p", "--multi_subject", "--batch_size=14", "--num_epochs=1",
        "--ridge=mlp", "--prior=correction", "--no-blurry_recon", *SMALL)
    start = f"--multisubject_ckpt={tmp_path / 'train_logs/p'}"
    run(smoke_world, tmp_path, "--model_name=f", start, "--num_epochs=1", "--no-blurry_recon")
    model, config = load(tmp_path, "f")
    assert (config["ridge"], config["prior"], config["backbone"]) == ("mlp", "correction", "released")
    assert model.diffusion_prior.net.predicts == "correction" and len(model.ridge.bends) == 1
    for flag, other in (("ridge", "linear"), ("prior", "target")):
        with pytest.raises(UserError, match=f"was trained with --{flag}=.*, not {other}"):
            run(smoke_world, tmp_path, "--model_name=g", start, f"--{flag}={other}", "--no-blurry_recon")


# ---- what the prior predicts

def test_a_prior_of_corrections_adds_to_the_brain_tokens():
    torch.manual_seed(0)
    brain, noisy, times = torch.randn(3, 4, 24), torch.randn(3, 4, 24), torch.tensor([0, 50, 99])
    plain, other = (m.MindEye2(**TINY, prior=kind).diffusion_prior.net for kind in ("target", "correction"))
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(noisy, times, brain), plain(noisy, times, brain) + brain)
    keep = torch.tensor([True, False, True])  # a sample without a brain starts from the learned "nothing"
    start = torch.where(keep[:, None, None], brain, plain.null_brain_embeds)
    assert torch.equal(other(noisy, times, brain, keep, keep), plain(noisy, times, brain, keep, keep) + start)
    with pytest.raises(ValueError, match="'target' or 'correction'"):
        m.MindEye2(**TINY, prior="nothing")


# ---- MixCo as the original has it

def one_step(mixing: str) -> tuple[dict, SimpleNamespace, dict]:
    """The losses of one step of two subjects, of three samples each, what was mixed, and the batch."""
    args = SimpleNamespace(mixing=mixing, gather_negatives=False, use_prior=False, blurry_recon=True, clip_scale=1.,
                           blur_scale=1.)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    batch = {"voxels": [draw(3, 5), draw(3, 4)], "clip": draw(6, 2, 8), "latents": draw(6, 4, 8, 8),
             "features": draw(6, 4, 16), "features_aug": draw(6, 4, 16)}
    out = {"clip_voxels": draw(6, 2, 8), "blurry_latents": draw(6, 4, 8, 8), "blurry_features": draw(6, 4, 16)}
    accelerator = SimpleNamespace(num_processes=1, autocast=nullcontext)
    torch.manual_seed(3)
    _, mix = train.mix_subjects(batch["voxels"], mixing == "original")
    torch.manual_seed(3)
    losses = train.step_losses(args, accelerator, lambda voxels, clip: out, batch, True, None)
    return losses, mix, batch | out


def test_the_originals_mixing():
    """Its partners, of all subjects, are in the first one's part of the batch; and its latents are not mixed."""
    right, mix, _ = one_step("right")
    original, wrong, batch = one_step("original")
    assert sorted(mix.perm[3:].tolist()) == [3, 4, 5] and sorted(wrong.perm[3:].tolist()) == [0, 1, 2]
    assert torch.equal(mix.betas, wrong.betas) and (wrong.betas < 1).any()
    brain, image = (F.normalize(batch[name].flatten(1), dim=-1) for name in ("clip_voxels", "clip"))
    expected = m.mixco_nce(brain, image, .006, wrong.perm, wrong.betas, wrong.select, original=True)
    assert original["clip"].item() == pytest.approx(expected.item()) != right["clip"].item()
    unmixed = train.low_level(batch, batch, None)
    assert original["lowlevel"].item() == pytest.approx(unmixed.item()) != right["lowlevel"].item()
    assert right["lowlevel"].item() == pytest.approx(train.low_level(batch, batch, mix).item())


# ---- whom to pretrain on (Table 10)

def test_pretraining_on_some_subjects(smoke_world, tmp_path):
    model = built(smoke_world, tmp_path, "--multi_subject", "--pretrain_on", 2, 5, 7, *SMALL)
    assert [layer.in_features for layer in model.ridge.linears] == [52, 49, 47]  # conftest's world: toy.SMOKE
    for flags in (["--multi_subject", "--pretrain_on", 1, 2], ["--pretrain_on", 2]):
        with pytest.raises(UserError, match="--pretrain_on .* --multi_subject .* --subj=1"):
            run(smoke_world, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


# ---- fine-tuning a part

def part(state: dict, *prefixes: str) -> dict:
    return {name: x for name, x in state.items() if name.startswith(prefixes)}


def test_fine_tuning_the_ridge_alone(smoke_world, pretrained):  # noqa: F811
    start = pretrained / "train_logs/pretrained"
    flags = [f"--multisubject_ckpt={start}", "--max_lr=1e-2"]
    run(smoke_world, pretrained, "--model_name=ridge", "--finetune=ridge", *flags)
    run(smoke_world, pretrained, "--model_name=all", *flags)
    before = weights(pretrained, "pretrained")
    ridge, everything = (part(weights(pretrained, name), "backbone", "diffusion_prior") for name in ("ridge", "all"))
    assert all(torch.equal(x, before[name]) for name, x in ridge.items())
    assert not torch.equal(everything["backbone.backbone_linear.weight"], before["backbone.backbone_linear.weight"])
    first = built(smoke_world, pretrained, *flags).ridge.linears[0]
    assert not torch.allclose(weights(pretrained, "ridge")["ridge.linears.0.weight"], first.weight, atol=1e-2)


def test_low_rank_fine_tuning(smoke_world, pretrained, tmp_path):  # noqa: F811
    """Only the ridge and the corrections learn; a killed run goes on exactly; other stages load it, strictly."""
    start = f"--multisubject_ckpt={pretrained / 'train_logs/pretrained'}"
    flags = [start, "--finetune=lora", "--lora_rank=3", "--max_lr=1e-2", "--ckpt_interval=1", "--resume"]
    run(smoke_world, tmp_path, "--model_name=lora", *flags)
    state, before = weights(tmp_path, "lora"), weights(pretrained, "pretrained")
    kept = part(before, "backbone", "diffusion_prior")
    assert all(torch.equal(x, state[name]) for name, x in kept.items())
    new = sorted(name for name in part(state, "backbone", "diffusion_prior") if name not in kept)
    places = ["backbone.backbone_linear", *(f"diffusion_prior.net.causal_transformer.{name}" for name in (
        "layers.0.0.to_q", "layers.0.0.to_kv", "layers.0.0.to_out.0", "layers.0.1.1", "layers.0.1.5", "project_out"))]
    assert new == sorted(f"{place}.{half}" for place in places for half in ("down", "up"))
    assert all(state[name].abs().max() > 0 for name in new)

    def killed():
        raise Killed
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_before(patch, len(checkpoints.load_checkpoint(tmp_path / "train_logs/lora")["train_losses"]) - 1, killed)
        run(smoke_world, tmp_path, "--model_name=cut", *flags)
    run(smoke_world, tmp_path, "--model_name=cut", *flags)
    assert same(weights(tmp_path, "cut"), state)

    model, config = load(tmp_path, "lora")
    assert config["lora_rank"] == 3
    args = recon.parse([f"--train_logs={tmp_path / 'train_logs'}", "--model_name=lora"])
    model, ridge = recon.load_model(args, 60)
    x = torch.randn(2, 60)
    shared = model.ridge(x, ridge)
    linear = model.backbone.backbone_linear
    whole = F.linear(shared + sum(block(torch.zeros(2, 32, 1))[..., 0] for block in model.backbone.mixer_blocks2),
                     linear.weight + linear.up @ linear.down, linear.bias)
    torch.testing.assert_close(model.embed(x).backbone.flatten(1), whole, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="itself fine-tuned with low-rank adapters"):
        run(smoke_world, tmp_path, "--model_name=again", f"--multisubject_ckpt={tmp_path / 'train_logs/lora'}")
    with pytest.raises(UserError, match="--finetune=lora .* --multisubject_ckpt"):
        run(smoke_world, tmp_path, "--model_name=again", "--finetune=lora")


def test_a_frozen_wide_weight_is_left_alone():
    """An optimizer that takes wide weights in pieces has no gradient to share for them."""
    wide, small = torch.nn.Parameter(torch.ones(7, 4), requires_grad=False), torch.nn.Parameter(torch.ones(2))
    optimizer = train.in_pieces(torch.optim.AdamW, [{"params": [wide, small]}], most=12, lr=.1)
    small.sum().backward()
    optimizer.step()
    assert (wide == 1).all() and (small < 1).all()


def test_an_adapted_layer_starts_as_it_was():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(6, 4), torch.randn(5, 6)
    adapted = m.AdaptedLinear(linear, 2)
    assert torch.equal(adapted(x), linear(x)) and adapted.weight is linear.weight


# ---- which weights are the best without a contrastive loss

def test_without_the_contrastive_loss_the_prior_chooses_the_best(smoke_world, tmp_path):
    history = run(smoke_world, tmp_path, "--model_name=a", "--clip_scale=0", "--val_sessions=1", "--no-blurry_recon",
                  "--ckpt_interval=1", *SMALL)
    best = checkpoints.load_checkpoint(tmp_path / "train_logs/a/best.pth")
    step, value = min(history["val/loss_prior"], key=lambda point: point[1])
    assert best["step"] == step
    assert checkpoints.load_checkpoint(tmp_path / "train_logs/a")["best"] == -value


def test_of_equal_validations_the_later_is_the_best(smoke_world, tmp_path, monkeypatch):
    plain = train.test
    monkeypatch.setattr(train, "test", lambda *given: plain(*given) | {"reciprocal_rank": .5})
    run(smoke_world, tmp_path, "--model_name=a", "--val_sessions=1", "--no-blurry_recon", "--ckpt_interval=1", *SMALL)
    best, last = (checkpoints.load_checkpoint(tmp_path / f"train_logs/a/{name}.pth") for name in ("best", "last"))
    assert best["step"] == last["step"] and last["best"] == .5


# ---- how the prior is sampled

def test_samplers_by_name():
    prior = m.MindEye2(**TINY).eval().diffusion_prior
    brain, calls = torch.randn(2, 4, 24), []
    prior.net.register_forward_pre_hook(lambda _, given: calls.append(int(given[1][0])))
    samples = {}
    for method, steps in ((None, 100), ("ddpm", 100), ("ddim", 100), ("ddim", 5)):
        calls.clear()
        samples[method, steps] = prior.sample(brain, steps, generator=torch.Generator().manual_seed(0), method=method)
        assert len(calls) == (steps if method != "ddim" else steps - 1)
    assert calls == [79, 59, 39, 19]
    assert torch.equal(samples[None, 100], samples["ddpm", 100])
    assert not torch.allclose(samples["ddim", 100], samples["ddpm", 100], atol=1e-3)
    with pytest.raises(ValueError, match="2..100"):
        prior.sample(brain, 20, method="ddpm")


def test_recon_takes_the_sampler_by_name(smoke_world, pretrained):  # noqa: F811
    run(smoke_world, pretrained, "--model_name=s", "--num_epochs=1", *SMALL)
    flags = [f"--data_path={smoke_world}", f"--train_logs={pretrained / 'train_logs'}", "--model_name=s",
             f"--evals={pretrained / 'evals'}", "--scheduler=dpm", "--steps=1", "--guidance=1", "--num_images=2",
             "--no-captions", "--no-blurry_recon"]
    with pytest.raises(UserError, match="--prior_sampler=ddpm takes all 100 steps"):
        recon.main([*flags, "--prior_sampler=ddpm"])
    ddim, ddpm = (recon.main([*flags, "--prior_steps=100", f"--prior_sampler={name}"])["prior_out"]
                  for name in ("ddim", "ddpm"))
    assert torch.equal(ddpm, recon.main([*flags, "--prior_steps=100"])["prior_out"])
    assert not torch.allclose(ddim.float(), ddpm.float(), atol=1e-2)


def test_flags_have_the_papers_recipe_as_default(smoke_world, tmp_path):
    args = train.parse_args(arguments(smoke_world, tmp_path))
    assert (args.ridge, args.prior, args.mixing, args.finetune, args.pretrain_on) == (None, None, "right", "all", None)
    sizes, _ = train.choose_sizes(args)
    assert (sizes["ridge"], sizes["prior"]) == ("linear", "target")
