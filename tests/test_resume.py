"""train.py --resume: a run that was killed ends with the same weights, bit for bit, as one that never was."""

import os
import signal
from pathlib import Path

import pytest
import torch
from test_train import SMALL, run, weights

import checkpoints
import train
from model import UserError

# Three epochs; BiMixCo in the first, SoftCLIP after.
FLAGS = ["--model_name=a", "--num_epochs=3", "--mixup_pct=.4", "--ckpt_interval=1", "--val_sessions=1", "--resume",
         "--batch_size=3", *SMALL]


class Killed(BaseException):
    """Nothing in train.py catches it, as nothing catches SIGKILL."""


def stop_before(monkeypatch, step: int, how) -> None:
    """Call how() in place of that step, counted from 0, of the run."""
    plain, losses = train.train_epoch, train.step_losses

    def epoch(args, accelerator, run, *rest):
        monkeypatch.setattr(train, "step_losses", lambda *x: how() if run.step == step else losses(*x))
        return plain(args, accelerator, run, *rest)
    monkeypatch.setattr(train, "train_epoch", epoch)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def never_killed(smoke_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(smoke_world, folder, *FLAGS)


def steps_an_epoch(folder: Path) -> int:
    return len(checkpoints.load_checkpoint(folder / "train_logs/a")["train_losses"]) // 3


def test_killed_three_times(smoke_world, tmp_path, never_killed):
    def killed():
        raise Killed
    folder, history = never_killed
    steps = steps_an_epoch(folder)
    assert steps >= 2
    for step in (steps - 1, steps + 1, 2 * steps):  # before the first checkpoint, within an epoch, right after one
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            stop_before(patch, step, killed)
            run(smoke_world, tmp_path, *FLAGS)
    assert run(smoke_world, tmp_path, *FLAGS) == history
    assert same(weights(tmp_path, "a"), weights(folder, "a")) and same(weights(tmp_path, "a", "best"),
                                                                      weights(folder, "a", "best"))
    one, two = (checkpoints.load_checkpoint(place / "train_logs/a") for place in (tmp_path, folder))
    assert one["train_losses"] == two["train_losses"] and one["lrs"] == two["lrs"]


@pytest.mark.parametrize("past", [1, -1])  # within an epoch, and at its end: its test is not left out
def test_sigterm_saves_at_once(smoke_world, tmp_path, never_killed, monkeypatch, past):
    folder, history = never_killed
    step, losses = steps_an_epoch(folder) + past, train.step_losses

    def terminated(*given):
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(1)
        return losses(*given)
    seen = []
    monkeypatch.setattr(train, "step_losses", terminated)
    with pytest.raises(SystemExit) as ended:
        run(smoke_world, tmp_path, *FLAGS)
    assert ended.value.code == 143 and len(seen) == step + 1
    assert checkpoints.load_checkpoint(tmp_path / "train_logs/a")["step"] == step + 1
    assert run(smoke_world, tmp_path, *FLAGS) == history
    assert same(weights(tmp_path, "a"), weights(folder, "a")) and len(seen) == 3 * steps_an_epoch(folder)


def test_fp16_overflow_follows_the_loss_scaler_also_after_a_kill(smoke_world, tmp_path, monkeypatch):
    """PyTorch's own scaler, on float32 (accelerate gives a CPU neither it nor half precision): its first scale, 1e38,
    is too large for any gradient. That step changes no weight, and the schedule does not count it.
    """
    start, adamw, stepped = train.start_accelerator, torch.optim.AdamW.step, []

    def fp16(*given):
        accelerator = start(*given)
        accelerator.scaler = torch.amp.GradScaler("cpu", 1e38, backoff_factor=1e-34, growth_interval=2)
        return accelerator

    def killed():
        raise Killed
    monkeypatch.setattr(train, "start_accelerator", fp16)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *x: stepped.append(1) or adamw(self, *x))
    run(smoke_world, tmp_path / "whole", *FLAGS)
    whole = checkpoints.load_checkpoint(tmp_path / "whole/train_logs/a")
    count = whole["step"]
    assert len(stepped) == whole["lr_scheduler"]["last_epoch"] == count - 1 == len(whole["train_losses"]) - 1
    assert whole["scaler"]["scale"] == pytest.approx(1e4 * 2 ** ((count - 1) // 2))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_before(patch, count - 1, killed)
        run(smoke_world, tmp_path, *FLAGS)
    run(smoke_world, tmp_path, *FLAGS)
    again = checkpoints.load_checkpoint(tmp_path / "train_logs/a")
    assert same(again["model_state_dict"], whole["model_state_dict"]) and again["scaler"] == whole["scaler"]


def test_gradients_that_no_scale_makes_finite_stop_it(smoke_world, tmp_path, monkeypatch):
    """A finite loss whose gradient is NaN: each step would be skipped for ever."""
    start, losses = train.start_accelerator, train.step_losses

    def fp16(*given):
        accelerator = start(*given)
        accelerator.scaler = torch.amp.GradScaler("cpu", 2e-4)
        return accelerator

    def spoilt(*given):
        out = losses(*given)
        return out | {"clip": out["clip"] + (0 * out["clip"]).sqrt()}
    monkeypatch.setattr(train, "start_accelerator", fp16)
    monkeypatch.setattr(train, "step_losses", spoilt)
    with pytest.raises(UserError, match="loss scaler came down to .*e-05 by epoch 0.*--max_lr"):
        run(smoke_world, tmp_path, *FLAGS)
    assert not (tmp_path / "train_logs/a/last.pth").exists()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="--optimizer_bits=8 does not know"):
        run(smoke_world, tmp_path, "--optimizer_bits=8")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="--optimizer_bits=8 cuts weights"):
        run(smoke_world, tmp_path, "--optimizer_bits=8")


def test_without_the_flag_it_starts_over_and_a_finished_run_is_left_alone(smoke_world, tmp_path, monkeypatch):
    flags, steps, losses = ["--model_name=a", "--num_epochs=1", *SMALL], [], train.step_losses
    monkeypatch.setattr(train, "step_losses", lambda *given: steps.append(1) or losses(*given))
    first = run(smoke_world, tmp_path, *flags)
    count = len(steps)
    assert run(smoke_world, tmp_path, *flags, "--resume") == first and len(steps) == count
    (tmp_path / "train_logs/a").rename(tmp_path / "train_logs/b")
    assert run(smoke_world, tmp_path, *flags, "--model_name=b", "--resume") == first and len(steps) == count
    run(smoke_world, tmp_path, *flags)
    assert len(steps) == 2 * count


@pytest.mark.parametrize("flag, named", [("--batch_size=7", "--batch_size=8"), ("--seed=1", "--seed=42"),
                                         ("--num_epochs=2", "--num_epochs=1")])
def test_another_run_is_not_gone_on_with(smoke_world, tmp_path, flag, named):
    run(smoke_world, tmp_path, "--model_name=a", "--num_epochs=1", *SMALL)
    with pytest.raises(UserError, match=f"last.pth is of a run with {named}"):
        run(smoke_world, tmp_path, "--model_name=a", "--num_epochs=1", flag, "--resume", *SMALL)


def test_another_network_is_not_gone_on_with(smoke_world, tmp_path):
    """Both backbones have weights of the same names and shapes: only the checkpoint's config can tell."""
    run(smoke_world, tmp_path, "--model_name=a", "--num_epochs=1", "--backbone=mlp", *SMALL)
    with pytest.raises(UserError, match="last.pth is of a run with --backbone=mlp, not released"):
        run(smoke_world, tmp_path, "--model_name=a", "--num_epochs=1", "--resume", *SMALL)
    with pytest.raises(UserError, match="last.pth is of a run with --hidden_dim=32, not 48"):
        run(smoke_world, tmp_path, "--model_name=a", "--num_epochs=1", "--resume", "--backbone=mlp", *SMALL,
            "--hidden_dim=48")


def test_a_run_with_deepspeed_is_not_started_over_without(smoke_world, tmp_path):
    folder = tmp_path / "train_logs/a/last"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="last is of a run with DeepSpeed: launch it so again, or leave --resume out"):
        run(smoke_world, tmp_path, "--model_name=a", "--resume", *SMALL)
    assert [path.name for path in folder.parent.iterdir() if "tfevents" not in path.name] == ["last"]


def test_flags_are_named_as_one_types_them():
    assert [train.spelled("a", x) for x in (2, True, False, None, [2, 5])] == [
        "--a=2", "--a", "--no-a", "no --a", "--a 2 5"]


def test_a_bad_loss_names_its_trials(smoke_world, tmp_path, monkeypatch):
    chosen, losses = [], train.step_losses

    def bad(args, accelerator, model, batch, *rest):
        out = losses(args, accelerator, model, batch, *rest)
        return out | {"clip": out["clip"] * (float("nan") if len(chosen) >= 2 else 1)}
    fetch = train.fetch
    monkeypatch.setattr(train, "step_losses", bad)
    monkeypatch.setattr(train, "fetch", lambda sets, targets, picked, args: (
        chosen.append(sets.train[0].trials.image[picked[0]]), fetch(sets, targets, picked, args))[1])
    with pytest.raises(UserError) as error:
        run(smoke_world, tmp_path, "--model_name=a", "--num_epochs=2", "--batch_size=3", *SMALL)
    assert f"subject 1: {', '.join(map(str, chosen[1]))})" in str(error.value), error.value
    assert "epoch 0, step 1" in str(error.value) and not (tmp_path / "train_logs/a/last.pth").exists()
