"""Tests of model.py: parity with the original's recorded outputs, gradients, checkpoints, loaders.

Run: python -m pytest tests/test_model.py        (under a minute on two CPU cores, no downloads)
"""

import enum
import errno
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from golden_weights import error, golden, golden_json, load_golden  # noqa: E402

import checkpoints  # noqa: E402
import model as m  # noqa: E402

CONFIG = golden_json("config")
SEED = CONFIG["config"]["seed"]  # 1234
SMALL = {
    "num_voxels": [50, 37], "hidden_dim": 32, "n_blocks": 2, "clip_seq_dim": 8, "clip_emb_dim": 104, "prior_depth": 2,
}
TINY = {
    "num_voxels": [9, 7], "hidden_dim": 16, "n_blocks": 2, "clip_seq_dim": 4, "clip_emb_dim": 24, "latent_size": 8,
    "prior_depth": 2, "prior_dim_head": 12,
}


@pytest.fixture(scope="module")
def small() -> m.MindEye2:
    return load_golden(m.MindEye2(**SMALL), SEED)


# ----------------------------------------------------------------------------------------------------------------------
# Names, shapes, order
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [k for k in golden_json("state_dict_spec") if not k.startswith("_")])
def test_state_dict_and_groups_of_the_real_sizes(name):
    spec = golden_json("state_dict_spec")[name]
    size = spec["config"]
    with torch.device("meta"):
        model = m.MindEye2(size["nvox"], size["hidden"], size["n_blocks"], blurry_recon=size["blurry"])
    state = model.state_dict()
    assert list(state) == list(spec["state_dict"])
    for key, (shape, dtype) in spec["state_dict"].items():
        assert [list(state[key].shape), str(state[key].dtype)] == [shape, f"torch.{dtype}"]
    total = {True: 2_227_294_844, False: 816_319_768}[size["blurry"]]
    assert sum(p.numel() for p in model.parameters()) == total
    check_groups(model, next(v for k, v in spec.items() if "group" in k))
    config = checkpoints.config_from_state_dict(state)
    assert config["num_voxels"] == size["nvox"] and config["prior_depth"] == 6 and config["prior_dim_head"] == 52
    sizes = [config[k] for k in ("hidden_dim", "n_blocks", "clip_seq_dim", "clip_emb_dim")]
    assert sizes == [size["hidden"], 4, 256, 1664]
    assert config.get("latent_size") == (28 if size["blurry"] else None) and config["prior_timesteps"] == 100


def check_groups(model, expected):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = m.parameter_groups(model)
    assert [g["weight_decay"] for g in groups] == [g["weight_decay"] for g in expected] == [0.01, 0.01, 0, 0.01, 0]
    for ours, theirs in zip(groups, expected, strict=True):
        assert [names[id(p)] for p in ours["params"]] == theirs["names"]


def test_state_dict_and_groups_of_the_golden_size(small):
    assert {k: list(v.shape) for k, v in small.state_dict().items()} == CONFIG["state_dict"]
    assert list(small.state_dict()) == list(CONFIG["state_dict"])
    check_groups(small, CONFIG["adamw_param_groups"])  # frozen parameters are listed as the original lists them
    torch.optim.AdamW(m.parameter_groups(small))
    assert len(m.parameter_groups(m.MindEye2(**TINY, use_prior=False))) == 3


def test_constants(small):
    state = small.state_dict()
    for key, value in golden("constants").items():
        assert error(state[key], value) <= 1e-6 * max(1, value.abs().max().item()), key


# ----------------------------------------------------------------------------------------------------------------------
# Brain model
# ----------------------------------------------------------------------------------------------------------------------


def test_ridge(small):
    g = golden("ridge")
    for subject in range(2):
        x, y = g[f"x{subject}"], g[f"y{subject}"][:, 0]
        assert error(small.ridge(x, subject), y) < 1e-6
        assert error(small.ridge(x[:, 0], subject), y) < 1e-6


def test_backbone_with_blurry_head(small):
    g = golden("backbone_blurry")
    out = small.backbone(g["x"])
    assert error(out.backbone, g["backbone"]) < 1e-5
    assert error(out.clip_voxels, g["clip_voxels"]) < 1e-5
    assert error(out.blurry_latents, g["image_enc_pred"]) < 2e-5
    assert error(out.blurry_features, g["transformer_feats"]) < 1e-5


@pytest.mark.parametrize("name, seq_len", [("noblurry", 1), ("noclip", 1), ("seqlen3", 3)])
def test_backbone_variants(name, seq_len):
    g = golden(f"backbone_{name}")
    backbone = m.Backbone(32, 2, 8, 104, blurry_recon=False, seq_len=seq_len)
    out = load_golden(backbone, int(g["weight_seed"]), "backbone.")(g["x"])
    assert error(out.backbone, g["backbone"]) < 1e-5
    assert out.blurry_latents is None and out.blurry_features is None
    if name != "noclip":  # there the original skips the head and returns [0.]
        assert error(out.clip_voxels, g["clip_voxels"]) < 1e-5


def test_backbone_gradients(small):
    x = golden("backbone_grad_x")["x"].requires_grad_()
    small.zero_grad()
    loss = sum(out.square().mean() for out in vars(small.backbone(x)).values())
    loss.backward()
    expected = golden_json("backbone_grads")
    assert abs(loss.item() - expected["loss"]) < 1e-5
    assert error(x.grad, golden("backbone_grad_x")["grad_x"]) < 1e-6
    for name, p in small.backbone.named_parameters():
        norm = 0 if p.grad is None else p.grad.norm().item()  # frozen: the original's are rounding noise, below 1e-5
        assert norm == pytest.approx(expected["grad_norm"][name], rel=1e-4, abs=1e-5), name


def test_the_released_backbone_is_linear_and_mlp_is_not():
    for kind, linear in (("released", True), ("mlp", False)):
        net = m.Backbone(16, 2, 4, 24, blurry_recon=False, kind=kind).eval()
        a, b = torch.randn(2, 5, 16)
        middle = net((a + b) / 2).backbone
        assert ((middle - (net(a).backbone + net(b).backbone) / 2).abs().max() < 1e-5) == linear


@pytest.mark.parametrize("backbone", ["released", "mlp"])
@pytest.mark.parametrize("blurry", [True, False])
@pytest.mark.parametrize("prior", [True, False])
def test_every_trainable_parameter_gets_a_gradient_as_ddp_demands(backbone, blurry, prior):
    model = m.MindEye2(**TINY, backbone=backbone, blurry_recon=blurry, use_prior=prior)
    out = model([torch.randn(3, 9), torch.randn(2, 7)], torch.randn(5, 4, 24))
    keys = ["backbone", "clip_voxels"] + ["blurry_latents", "blurry_features"] * blurry
    assert list(out) == keys + ["loss_prior", "prior_prediction"] * prior
    shapes = {"backbone": (5, 4, 24), "clip_voxels": (5, 4, 24), "blurry_latents": (5, 4, 8, 8),
              "blurry_features": (5, 4, 512), "loss_prior": (), "prior_prediction": (5, 4, 24)}
    assert all(value.shape == shapes[key] for key, value in out.items())
    sum(value.sum() for value in out.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = "mixer_blocks1" if backbone == "released" else "mixer_blocks2"
    assert all(frozen in n or "rotary" in n for n, p in model.named_parameters() if not p.requires_grad)
    assert (model.diffusion_prior is None) == (not prior)


def test_bfloat16_autocast():
    model, target = m.MindEye2(**TINY), torch.randn(4, 4, 24)
    voxels = [torch.randn(2, 9), torch.randn(2, 7)]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(voxels, target)
        unit = F.normalize(out["clip_voxels"].flatten(1), dim=-1)
        contrast = m.soft_clip_loss(unit, F.normalize(target.flatten(1), dim=-1), 0.004)
        assert model.diffusion_prior.sample(out["backbone"].detach(), 5).isfinite().all()
    assert contrast.dtype == out["loss_prior"].dtype == torch.float32
    (contrast + out["loss_prior"]).backward()
    assert model.ridge.linears[0].weight.grad.abs().sum() > 0


def test_tie_positions():
    model = m.MindEye2(**TINY)
    before = model.backbone.backbone_linear.bias.detach().clone()
    model.tie_positions(2.0, torch.Generator().manual_seed(0))
    query = model.diffusion_prior.net.learned_query
    assert torch.equal(query, 2 * torch.randn(4, 24, generator=torch.Generator().manual_seed(0)))
    assert error(model.backbone.backbone_linear.bias.view(4, 24), before.view(4, 24) + query) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Prior
# ----------------------------------------------------------------------------------------------------------------------


def test_prior_network_and_its_parts(small):
    g, net = golden("prior_network"), small.diffusion_prior.net
    args = (g["image_embed"], g["times"], g["text_embed"])
    none = torch.zeros(3, dtype=torch.bool)
    assert error(net(*args), g["out_keep_all"]) < 1e-5
    assert error(net(*args, ~none, ~none), g["out_keep_all"]) < 1e-5
    assert error(net(*args, none, none), g["out_drop_all"]) < 1e-5
    assert error(net(*args, g["brain_keep_mask"], g["image_keep_mask"]), g["out_drop_half"]) < 1e-5
    blind = net(*args, none, none)
    assert error(blind + 3 * (net(*args) - blind), g["out_cond_scale3"]) < 3e-5
    transformer = net.causal_transformer
    assert error(net.to_time_embeds(g["times"])[:, None], g["time_embed"]) < 1e-5
    bias = transformer.rel_pos_bias(17)
    assert error(bias, g["attn_bias"]) == 0
    attention, feed_forward = transformer.layers[0]
    out = attention(g["tokens"], transformer.layers[0][0].rotary_emb(17), bias)
    assert error(out, g["layer0_attn_out"]) < 1e-5
    assert error(transformer.norm(g["stable_norm_in"]), g["stable_norm_out"]) < 1e-5
    assert error(attention.norm(g["stable_norm_in"]), g["norm0_out"]) < 1e-5
    assert error(feed_forward(g["tokens"] + out), g["layer0_ff_out"]) < 1e-5


def test_the_bias_is_its_table_by_distance(small):
    bias = small.diffusion_prior.net.causal_transformer.rel_pos_bias
    n = 300
    distance = (torch.arange(n)[:, None] - torch.arange(n + 1)).clamp(0, bias.max_distance - 1)
    assert torch.equal(bias(n), bias.table()[:, distance])
    assert torch.equal(bias.table()[:, 113], bias.table()[:, -1])  # from 113 on it is one number
    assert not torch.equal(bias.table()[:, 112], bias.table()[:, -1])


def interpreted(script: str) -> str:
    """What a script prints whose GPU kernels are run by Triton's interpreter, on the CPU."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", script, str(Path(m.__file__).parent)], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


FUSED = """
import sys, torch
sys.path[:0] = sys.argv[1:]
import attention, model
torch.get_autocast_dtype = lambda device: torch.float32  # Triton's interpreter has no half precision
torch.manual_seed(0)
transformer, x = model.PriorTransformer(24, 2, 12, 2), torch.randn(2, 200, 24)
results = []
for fused in (False, True):
    model.fused = lambda device: fused
    transformer.zero_grad()
    out = transformer(x, 90)
    out.square().sum().backward()
    results.append([out.detach()] + [p.grad.clone() for p in transformer.parameters() if p.requires_grad])
for one, two in zip(*results, strict=True):
    assert (one - two).abs().max() < 1e-4 * one.abs().max(), (one, two)
print(len(results[0]), "tensors agree")
"""


def test_fused_attention_is_the_plain_one_with_its_gradients():
    """A tile with near, far and ahead keys, odd lengths, padded channels."""
    assert "tensors agree" in interpreted(FUSED)


ROWS = """
import copy, sys, torch
sys.path[:0] = sys.argv[1:]
import adamw, model
torch.manual_seed(0)
by_rows = torch.nn.Sequential(model.WideLinear(70, 90), torch.nn.GELU(), model.WideLinear(90, 65))
plain = copy.deepcopy(by_rows)
groups = lambda net: [{"params": list(net[0].parameters()), "weight_decay": .1}, {"params": list(net[2].parameters())}]
one, two = adamw.RowAdamW(groups(by_rows), [by_rows[0], by_rows[2]], lr=.01), torch.optim.AdamW(groups(plain), lr=.01)
for step in range(6):
    for rows in (37, 91)[: 1 + step % 2]:  # an odd number of rows, then two batches that fill two tiles
        x, target = torch.randn(rows, 70), torch.randn(rows, 65)
        for net in (by_rows, plain):
            (net(x) - target).square().mean().backward()
    assert by_rows[0].weight.grad is None and len(by_rows[0].rows) == 1 + step % 2
    for optimizer in (one, two):
        for group in optimizer.param_groups:  # as the schedule changes them
            group["lr"], group["betas"] = .01 / (1 + step), (.95 - .02 * step, .999)
        optimizer.step()
        optimizer.zero_grad()
    assert not by_rows[0].rows
    if step == 3:  # a checkpoint of each goes on as the other
        states = one.state_dict(), two.state_dict()
        two.load_state_dict(states[0]), one.load_state_dict(states[1])
for p, q in zip(by_rows.parameters(), plain.parameters(), strict=True):
    assert (p - q).abs().max() < 2e-6, (p - q).abs().max()
    for name, value in two.state[q].items():
        assert (one.state[p][name] - value).abs().max() < 1e-6 * value.abs().max(), name
print("the same weights")
"""


def test_adamw_by_rows_is_adamw():
    assert "the same weights" in interpreted(ROWS)


def test_what_is_compiled(monkeypatch):
    """Each layer of the prior and the retrieval head, which is all PyTorch's own (`Module.compile` may pass over it).
    """
    graphs, real = [], torch.compile

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=backend))
    model = m.MindEye2(**TINY)
    model.compile_blocks()
    model([torch.randn(3, 9), torch.randn(3, 7)], torch.randn(6, 4, 24))
    assert len(graphs) == TINY["prior_depth"] + 1
    assert graphs[0].count(F.gelu) == 3


def test_layernorm_eps_depends_on_the_dtype():
    g = golden("layernorm_half")
    norm = m.LayerNorm(104)
    for x, out in (("x", "out_fp32"), ("x_half", "out_half")):
        # the half golden divides in half precision, ours in float32
        assert error(norm(g[x]).float(), g[out]) < (1e-5 if x == "x" else 5e-3)
    tiny = torch.randn(4, 104) * 0.03  # where the choice of eps shows
    assert norm(tiny).std() > 0.98 > 0.75 > norm(tiny.half()).std()


def test_prior_loss_and_gradients(small):
    g, prior = golden("prior_p_losses"), small.diffusion_prior
    small.zero_grad()
    keep = (g["brain_keep_mask"], g["image_keep_mask"])
    loss, prediction = prior.loss(g["text_embed"], g["image_embed"], g["times"], g["noise"], keep)
    assert abs(loss.item() - g["loss"].item()) < 1e-5 and error(prediction, g["pred"]) < 1e-5
    loss.backward()
    for name, p in prior.named_parameters():
        expected = golden_json("prior_p_losses_grad_norms")[name]
        norm = None if p.grad is None else p.grad.norm().item()
        assert norm == (None if expected is None else pytest.approx(expected, rel=1e-4)), name


def test_prior_draws_in_the_original_order(small):
    g = golden("prior_forward_seeded")
    torch.manual_seed(int(g["torch_manual_seed"]))
    loss, prediction = small.diffusion_prior.loss(g["text_embed"], g["image_embed"])
    assert abs(loss.item() - g["loss"].item()) < 1e-5 and error(prediction, g["pred"]) < 1e-5


@pytest.mark.parametrize("name, steps", [("ddim20", 20), ("ddim20_cond3", 20), ("ddim50", 50), ("ddpm100", 100)])
def test_samplers(small, name, steps):
    g, prior = golden(f"sample_{name}"), small.diffusion_prior
    seen = []
    hook = prior.net.register_forward_pre_hook(lambda _, args: seen.append((args[0].clone(), int(args[1][0]))))
    out = prior.sample(g["text_embed"], steps, g["initial_noise"], g["step_noise"], guidance=float(g["cond_scale"]))
    hook.remove()
    seen = seen[:: 2 if name.endswith("cond3") else 1]
    assert [t for _, t in seen] == g["net_times"].tolist()
    for x, key in ((seen[1][0], "x_after_1"), (seen[2][0], "x_after_2"), (seen[-1][0], "x_last_in"), (out, "out")):
        assert error(x, g[key]) < 1e-4, key


def test_sampler_draws_what_is_not_given(small):
    g, prior = golden("sample_ddim20"), small.diffusion_prior
    a, b = (prior.sample(g["text_embed"], 20, generator=torch.Generator().manual_seed(s)) for s in (3, 3))
    drawn = torch.Generator().manual_seed(3)
    noise = torch.randn(g["text_embed"].shape, generator=drawn)
    steps = torch.stack([torch.randn(noise.shape, generator=drawn) for _ in range(18)])
    assert torch.equal(a, b) and torch.equal(a, prior.sample(g["text_embed"], 20, noise, steps))
    with pytest.raises(ValueError, match="2..100"):
        prior.sample(g["text_embed"], 101)


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


def test_losses():
    g = golden("losses")
    preds, targs = g["preds"], g["targs"]
    for temp in (0.125, 0.006, 0.004):
        assert error(m.soft_clip_loss(preds, targs, temp), g[f"soft_clip_t{temp}"]) < 1e-5
    mix = (g["perm"], g["betas"], g["select"])
    for temp in (0.006, 0.1):
        assert error(m.mixco_nce(preds, targs, temp, *mix), g[f"mixco_nce_t{temp}"]) < 1e-5
    fixed = (g["perm_fixed_point"], g["betas"], g["select"])
    expected = g["mixco_nce_fixed_point_t0.1"]
    assert error(m.mixco_nce(preds, targs, 0.1, *fixed, original=True), expected) < 1e-5
    assert abs(m.mixco_nce(preds, targs, 0.1, *fixed) - expected) > 0.01  # ours keeps the target's mass at 1
    concat = g["perm_two_subjects_concat"]
    offset = concat + torch.tensor([0, 0, 0, 0, 4, 4, 4, 4])
    for perm, key in ((concat, "original"), (offset, "offset")):
        nce = m.mixco_nce(preds, targs, 0.1, perm, g["betas"], g["select"], original=True)
        assert error(nce, g[f"mixco_nce_two_subjects_{key}_t0.1"]) < 1e-5
    for temp in (0.2, 0.125):
        loss = m.soft_contrastive_loss(g["student"], g["teacher"], g["teacher_aug"], temp)
        assert error(loss, g[f"soft_cont_t{temp}"]) < 1e-5


def test_mixco_nce_with_the_identity_is_plain_contrast():
    preds, targs = F.normalize(torch.randn(2, 6, 5), dim=-1)
    rows, logits = torch.arange(6), preds @ targs.T / 0.1
    plain = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    assert error(m.mixco_nce(preds, targs, 0.1, rows, torch.rand(6), torch.rand(6) < 0.5), plain) < 1e-6


def test_mixco():
    g = golden("mixco")
    voxels = g["voxels_in"].clone()
    out, perm, betas, select = m.mixco(voxels, perm=g["perm"], betas=g["betas_in"], select=g["select"])
    assert error(out, g["voxels_out"]) < 1e-6 and torch.equal(betas, g["betas_out"])
    assert torch.equal(voxels, g["voxels_in"])  # not in place
    torch.manual_seed(int(g["torch_manual_seed"]))
    out, perm, betas, select = m.mixco(voxels)
    assert torch.equal(perm, g["seeded_perm"]) and torch.equal(select, g["seeded_select"])
    assert error(betas, g["seeded_betas"]) < 1e-6 and error(out, g["seeded_voxels_out"]) < 1e-6
    half = m.mixco(g["half_in"], perm=g["half_perm"], betas=g["half_betas"], select=g["half_select"])[0]
    assert half.dtype == torch.float16 and error(half, g["half_voxels_out"]) < 2e-3


def test_cosine_anneal():
    g = golden("schedules")
    for steps in (101, 150, 7):
        assert error(m.cosine_anneal(0.004, 0.0075, steps), g[f"cosine_anneal_0.004_0.0075_{steps}"]) < 1e-7
    assert m.cosine_anneal(0.004, 0.0075, 1).tolist() == pytest.approx([0.004])


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and errors
# ----------------------------------------------------------------------------------------------------------------------


def test_checkpoint_round_trip(tmp_path):
    model = m.MindEye2(**TINY, backbone="mlp")
    folder = tmp_path / "train_logs" / "name"
    checkpoints.save_checkpoint(folder / "last.pth", model, epoch=3, train_losses=[1.5], config={"backbone": "mlp"})
    assert [f.name for f in folder.iterdir()] == ["last.pth"]
    for path in (folder, folder / "last.pth"):
        checkpoint = checkpoints.load_checkpoint(path)
        state = checkpoint["model_state_dict"]
        config = checkpoints.config_from_state_dict(state) | checkpoint["config"]
        assert config == TINY | {"backbone": "mlp", "blurry_recon": True, "use_prior": True, "prior_timesteps": 100,
                                 "ridge": "linear", "prior": "target", "lora_rank": 0}
        again = m.MindEye2(**config)
        again.load_state_dict(state, strict=True)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        assert checkpoint["epoch"] == 3 and checkpoint["train_losses"] == [1.5]
    constants = {name: value for name, value in model.state_dict().items() if "noise_" in name or "freqs" in name}
    assert len(constants) == 13 + TINY["prior_depth"]
    checkpoints.save_checkpoint(tmp_path / "half.pth", model.half())
    state = checkpoints.load_checkpoint(tmp_path / "half.pth")["model_state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], value) for name, value in constants.items())


def harmful() -> None:
    raise AssertionError("a checkpoint ran code")


class Harmful:
    def __reduce__(self):
        return harmful, ()


def test_checkpoint_with_foreign_objects_is_read_and_not_run(tmp_path):
    model = m.MindEye2(**TINY, use_prior=False)
    scheduler = {"anneal_func": torch.optim.lr_scheduler.OneCycleLR._annealing_cos, "more": Harmful()}
    checkpoints.save_checkpoint(tmp_path / "last.pth", model, lr_scheduler=scheduler, epoch=7)
    checkpoint = checkpoints.load_checkpoint(tmp_path)
    assert checkpoint["epoch"] == 7
    model.load_state_dict(checkpoint["model_state_dict"], strict=True)


def test_a_failed_save_keeps_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    checkpoints.save_checkpoint(path, nn.Linear(2, 2), epoch=1)

    def full_disk(*args, **kwargs):
        args[1].write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        checkpoints.save_checkpoint(path, nn.Linear(2, 2), epoch=2)
    assert [f.name for f in tmp_path.iterdir()] == ["last.pth"] and checkpoints.load_checkpoint(path)["epoch"] == 1


def test_unreadable_checkpoints_are_user_errors(tmp_path):
    with pytest.raises(m.UserError, match=r"nobody/last.pth does not exist.*--model_name"):
        checkpoints.load_checkpoint(tmp_path / "nobody")
    checkpoints.save_checkpoint(tmp_path / "last.pth", m.MindEye2(**TINY))
    whole = (tmp_path / "last.pth").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint at all"):
        (tmp_path / "last.pth").write_bytes(content)
        with pytest.raises(m.UserError, match=r"last.pth cannot be read.*--model_name"):
            checkpoints.load_checkpoint(tmp_path)
    torch.save({"weights": 1}, tmp_path / "last.pth")
    with pytest.raises(m.UserError, match="no model_state_dict"):
        checkpoints.load_checkpoint(tmp_path)
    torch.save({"model_state_dict": {}}, tmp_path / "last.pth")
    with pytest.raises(m.UserError, match=r"cannot be read \(KeyError: 'backbone.*--model_name"):
        checkpoints.load_model(tmp_path)


UNEVEN = TINY | {"hidden_dim": 15}  # its ridge has 270 numbers, which two ranks cannot share without padding


def write_deepspeed(folder: Path, model: nn.Module, world: int = 2, **changes: object) -> None:
    """A folder as DeepSpeed's ZeRO stage 2 leaves it; `changes` replace entries of each rank's optimizer state."""
    folder.mkdir(parents=True)
    parameters, every_name = dict(model.named_parameters()), dict(model.named_parameters(remove_duplicate=False))
    frozen = {name: p.detach() for name, p in parameters.items() if not p.requires_grad}
    trained = [name for name in parameters if name not in frozen]
    groups = [[n for n in trained if "ridge" in n], [n for n in trained if "ridge" not in n]]
    first_name = {id(p): name for name, p in reversed(parameters.items())}
    # Pickles of DeepSpeed hold objects of its own classes, which are not installed where the file is read.
    with pytest.MonkeyPatch.context() as patch:
        bases = {"LossScaler": (), "Settings": (dict,), "Record": (list,)}
        fake = {name: type(name, base, {"__module__": "deepspeed_fake"}) for name, base in bases.items()}
        stage = enum.IntEnum("ZeroStageEnum", {"gradients": 2}, module="deepspeed_fake")
        patch.setitem(sys.modules, "deepspeed_fake", SimpleNamespace(**fake, ZeroStageEnum=stage))
        scaler = fake["LossScaler"]()
        scaler.cur_scale = 65536
        torch.save({
            "module": {name: value.half() for name, value in model.state_dict().items()},
            "param_shapes": [OrderedDict((n, parameters[n].shape) for n in group) for group in groups],
            "frozen_param_fragments": frozen, "shared_params": {
                name: first_name[id(p)] for name, p in every_name.items() if name not in parameters
            }, "ds_config": fake["Settings"](fp16=True), "record": fake["Record"]([1, 2]),
        }, folder / "mp_rank_00_model_states.pt")
        flat = [torch.cat([parameters[n].detach().flatten() for n in group]) for group in groups]
        # The first group ends with padding, the second without, as newer versions leave it out.
        flat[0] = F.pad(flat[0], (0, -len(flat[0]) % (2 * world)), value=7.0)
        for rank in range(world):
            partitions = [vector.chunk(world)[rank].clone() for vector in flat]
            torch.save({"optimizer_state_dict": {
                "loss_scaler": scaler, "zero_stage": stage.gradients, "partition_count": [world, world],
                "single_partition_of_fp32_groups": partitions,
            } | changes}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def test_deepspeed_folder_gives_the_trained_float32_weights(tmp_path):
    model, folder = m.MindEye2(**UNEVEN), tmp_path / "train_logs" / "name"
    write_deepspeed(folder / "last", model, world=2)
    assert "deepspeed_fake" not in sys.modules
    for path in (folder, folder / "last.pth", folder / "last"):
        state = checkpoints.load_checkpoint(path)["model_state_dict"]
        assert list(state) == list(model.state_dict())
        for name, value in model.state_dict().items():
            assert state[name].dtype == torch.float32 and torch.equal(state[name], value), name
    read, config = checkpoints.load_model(folder)
    checkpoints.save_checkpoint(folder / "last.pth", read, config=config)  # README.md's line
    shutil.rmtree(folder / "last")
    again = checkpoints.load_model(folder)[0].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.items())
    write_deepspeed(folder / "last", model, world=2)
    checkpoints.save_checkpoint(folder / "last.pth", model, epoch=5)  # a file goes before the folder
    for path in (folder, folder / "last.pth"):
        assert checkpoints.load_checkpoint(path)["epoch"] == 5


def test_deepspeed_ranks_are_put_in_the_order_of_their_numbers(tmp_path):
    model = m.MindEye2(**UNEVEN, use_prior=False)
    write_deepspeed(tmp_path / "last", model, world=11, partition_count=11)  # by name, rank 10 comes before rank 2
    state = checkpoints.load_checkpoint(tmp_path)["model_state_dict"]
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())


def test_deepspeed_folder_without_ranks_gives_the_half_weights(tmp_path):
    model = m.MindEye2(**UNEVEN)
    write_deepspeed(tmp_path / "last", model, world=1)
    (tmp_path / "last" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    state = checkpoints.load_checkpoint(tmp_path)["model_state_dict"]
    for name, p in model.named_parameters():
        assert torch.equal(state[name], p if not p.requires_grad else p.half().float())


def test_unreadable_deepspeed_folders_are_user_errors(tmp_path):
    model = m.MindEye2(**UNEVEN, use_prior=False)
    folder, rank1 = tmp_path / "last", tmp_path / "last" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    write_deepspeed(folder, model)
    whole = rank1.read_bytes()
    rank1.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(m.UserError, match=r"rank_1_mp_rank_00_optim_states.pt cannot be read.*--model_name"):
        checkpoints.load_checkpoint(tmp_path)
    rank1.unlink()
    with pytest.raises(m.UserError, match=r"rank_1_mp_rank_00_optim_states.pt does not exist.*--multisubject_ckpt"):
        checkpoints.load_checkpoint(folder, "--multisubject_ckpt")
    rank1.write_bytes(whole)
    (folder / "mp_rank_00_model_states.pt").rename(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(m.UserError, match=r"last is of ZeRO stage 3.*--model_name"):
        checkpoints.load_checkpoint(tmp_path)
    (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    for path in (tmp_path, folder, tmp_path / "last.pth"):
        with pytest.raises(m.UserError, match=r"last/mp_rank_00_model_states.pt does not exist.*--model_name"):
            checkpoints.load_checkpoint(path)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"zero_stage": 3}, r"optim_states.pt is of ZeRO stage 3.*--model_name"),
        ({"single_partition_of_fp32_groups": [torch.ones(3)]}, "model_states.pt cannot be read.*2 parameter groups"),
        ({"single_partition_of_fp32_groups": [torch.ones(3)] * 2}, "cannot be read.*270 numbers.*files 6"),
        ({"single_partition_of_fp32_groups": [torch.ones(9999)] * 2}, "cannot be read.*270 numbers.*files 19998"),
    ],
)
def test_deepspeed_files_that_do_not_fit_are_user_errors(tmp_path, changes, text):
    write_deepspeed(tmp_path / "last", m.MindEye2(**UNEVEN, use_prior=False), **changes)
    with pytest.raises(m.UserError, match=text):
        checkpoints.load_checkpoint(tmp_path)


def test_load_pretrained_leaves_the_ridge_alone():
    many, one = m.MindEye2(**TINY), m.MindEye2(**TINY | {"num_voxels": [11]})
    ridge = {k: v.clone() for k, v in one.ridge.state_dict().items()}
    checkpoints.load_pretrained(one, many.state_dict())
    assert all(torch.equal(v, ridge[k]) for k, v in one.ridge.state_dict().items())
    for part in ("backbone", "diffusion_prior"):
        theirs = getattr(many, part).state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in getattr(one, part).state_dict().items())
    lean = m.MindEye2(**TINY, blurry_recon=False, use_prior=False)  # a model with fewer heads may start from it too
    checkpoints.load_pretrained(lean, many.state_dict())
    assert torch.equal(lean.backbone.backbone_linear.weight, many.backbone.backbone_linear.weight)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"hidden_dim": 12}, "has hidden_dim 16, this one 12: pass --hidden_dim 16"),
        ({"n_blocks": 3}, "has n_blocks 2, this one 3: pass --n_blocks 2"),
        ({"clip_seq_dim": 9}, "has clip_seq_dim 4, this one 9: pass the --cache_dir that holds its CLIP and VAE"),
        ({"prior_depth": 1}, "has prior_depth 2, this one 1: pass --prior_depth 2"),
    ],
)
def test_load_pretrained_names_what_differs(change, text):
    with pytest.raises(m.UserError, match=text):
        checkpoints.load_pretrained(m.MindEye2(**TINY | change), m.MindEye2(**TINY).state_dict())


def test_load_pretrained_names_missing_heads():
    lean = m.MindEye2(**TINY, blurry_recon=False, use_prior=False).state_dict()
    with pytest.raises(m.UserError, match="no blurry_recon part.*--no-blurry_recon"):
        checkpoints.load_pretrained(m.MindEye2(**TINY), lean)
    with pytest.raises(m.UserError, match="no use_prior part.*--no-use_prior"):
        checkpoints.load_pretrained(m.MindEye2(**TINY, blurry_recon=False), lean)


@pytest.mark.parametrize(
    "raised, text",
    [
        (m.UserError("it is missing."), "error: it is missing."),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "--batch_size"),
        (OSError(errno.ENOSPC, "No space left", "/x/last.pth"), "no space is left on the disk for /x/last.pth"),
    ],
)
def test_run_main_prints_one_sentence(capsys, raised, text):
    def main():
        raise raised

    with pytest.raises(SystemExit) as stop:
        m.run_main(main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and text in printed and printed.count("\n") == 1


def test_run_main_lets_bugs_through():
    for bug in (ValueError("x"), OSError(errno.EACCES, "denied")):

        def main(bug=bug):
            raise bug

        with pytest.raises(type(bug)):
            m.run_main(main)
    m.run_main(lambda: None)
