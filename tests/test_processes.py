"""train.py in several processes on a CPU: they learn as one does, share the work, and end when one dies.

    python -m pytest tests/test_processes.py
"""

import json
import os
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from test_train import ROOT, SMALL, arguments, launch, run

import checkpoints
import data
import model as networks
import processes
import train
import unclip
from model import UserError

SIX_STEPS = ["--num_sessions=2", "--teacher_views=1", "--num_epochs=2", "--mixup_pct=.5", *SMALL]  # half with BiMixCo


@pytest.fixture
def cache(smoke_world, tmp_path) -> Path:
    """A --cache_dir with the networks and no targets yet."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("clip", "vae", "teacher"):
        (folder / name).symlink_to(smoke_world / name)
    return folder


def trained(world, cache, folder, *names) -> list[dict]:
    """For each of ranks.RUNS named: the checkpoint's losses and weights, and the record of each process."""
    done = launch(folder, ROOT / "tests/ranks.py", folder, ",".join(names), f"--data_path={world}",
                  f"--cache_dir={cache}", *SIX_STEPS)
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for name in names:
        checkpoint = checkpoints.load_checkpoint(folder / name)
        records = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name} ?.json"))]
        found.append({"losses": checkpoint["train_losses"], "weights": checkpoint["model_state_dict"],
                      "records": records})
    return found


def has_no_gradient(name: str) -> bool:
    """Biases that the next operation takes away again, so that their gradient is nothing but rounding.

    The last block's GroupNorm has as many groups as channels; a key's bias adds the same to all logits of a softmax.
    """
    return name.endswith(("to_k.bias", "conv1.bias", "conv2.bias", "conv_shortcut.bias")) and (
        "attentions" in name or "up_blocks.2" in name)


def test_several_processes_learn_as_one(smoke_world, cache, tmp_path):
    """Six steps of 8 trials: all losses and weights, of one process and of several that share each step's trials.

    With --gather_negatives ("two", "four") they equal one process as it is, without it ("apart") one whose contrastive
    losses are means over parts of its batch. What a step draws depends on the trial, not on the process (ranks.py).

    Sums in another order differ by rounding: 2e-7 of the loss. AdamW's first steps have the gradient's sign and the
    size of the learning rate (up to 3e-4), so where a gradient is near zero, rounding shows: up to 4e-6 in a weight,
    and up to six steps where it is nothing else. What the flag changes is a thousand times larger: 20% of the loss.
    """
    names = ["four", "one", "2 apart", "one of 2"]  # "two" and "4 apart" do so, too
    runs = dict(zip(names, trained(smoke_world, cache, tmp_path, *names), strict=True))
    encoded = [record["encoded"] for name in names for record in runs[name]["records"]]
    assert encoded[0] > 20 and max(encoded[1:]) <= 1  # one process fills the cache, others look at a sample
    for one, several in (("one", "four"), ("one of 2", "2 apart")):
        a, b = runs[one], runs[several]
        assert len(a["losses"]) == 6
        np.testing.assert_allclose(b["losses"], a["losses"], rtol=2e-6)
        for name, weight in a["weights"].items():
            most = 6 * 2 * 3e-4 if has_no_gradient(name) else 2e-5
            assert (b["weights"][name] - weight).abs().max() <= most, name
        trials = [record["trials"] for record in b["records"]]  # (processes, steps, trials)
        for step, together in enumerate(a["records"][0]["trials"]):
            shares = [own[step] for own in trials]
            assert sum(shares, []) == together and len(set(together)) == 8
        assert b["records"][0]["writes"] and not any(record["writes"] for record in b["records"][1:])


def test_batches_of_all_processes_show_no_image_twice():
    trials = data.Trials(1, np.arange(24) // 2, np.arange(24), np.ones(24, int))

    def steps(**flags):
        ranks = [list(data.epoch_batches([trials], 4, 3, 0, 0, rank, 2, **flags)) for rank in range(2)]
        return [np.concatenate([chosen for rank in ranks for chosen in rank[step]]) for step in range(3)]
    assert all(len(set(trials.image[chosen])) == 8 for chosen in steps(together=True))
    assert not all(len(set(trials.image[chosen])) == 8 for chosen in steps())


def test_wide_layers_exchange_rows_and_leave_no_gradient_to_ddp(monkeypatch):
    """Two processes, of which this is the second: DDP is told to keep away, and the mean gradient is that of all rows.
    """
    sent, two = [], SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, source: sent.append((x.data_ptr(), source)))
    model = networks.MindEye2([5, 7], 6, 1, 2, 3, 4, use_prior=False)
    train.exchange_rows(SimpleNamespace(distributed_type=DistributedType.NO), model)
    assert not sent and not model.ridge.linears[0].exchanges_rows
    train.exchange_rows(two, model)
    wide = {name: p for name, p in model.named_parameters() if name.startswith(("ridge", "backbone.backbone_linear"))}
    assert {name for name, _ in model.named_parameters()} & set(model._ddp_params_and_buffers_to_ignore) == set(wide)
    assert sent == [(p.data_ptr(), 0) for p in wide.values()]  # all start from the first process's

    alone = networks.MindEye2([5], 6, 1, 2, 3, 4, use_prior=False)
    alone.freeze()  # --finetune=ridge: DDP refuses a model of which nothing is left to it
    train.exchange_rows(two, alone)
    assert not alone.ridge.linears[0].exchanges_rows and not hasattr(alone, "_ddp_params_and_buffers_to_ignore")

    x, others = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    grad, theirs = torch.randn(4, 6), torch.randn(4, 6)
    exchanged = iter([others, theirs / 2])
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather",
                        lambda parts, own: (parts[0].copy_(next(exchanged)), parts[1].copy_(own)))
    layer = model.ridge.linears[0]
    layer(x).backward(grad)
    torch.testing.assert_close(layer.weight.grad, (theirs.T @ others + grad.T @ x.detach()) / 2)
    torch.testing.assert_close(layer.bias.grad, (theirs.sum(0) + grad.sum(0)) / 2)
    torch.testing.assert_close(x.grad, grad @ layer.weight)


def test_who_makes_the_gradients_of_wide_layers(monkeypatch):
    """On a GPU the optimizer; not where the gradients themselves are asked for."""
    pytest.importorskip("triton")
    args = train.parse_args([])

    def optimizer(device="cuda", kind=DistributedType.NO, plugin=None, scaler=None, exchanges=False, frozen=False):
        model = networks.MindEye2([5], 6, 1, 2, 3, 4, use_prior=False)
        layers = [model.ridge.linears[0], model.backbone.backbone_linear]
        for layer in layers:
            layer.exchanges_rows = exchanges
        if frozen:
            model.freeze()
        accelerator = SimpleNamespace(device=torch.device(device), distributed_type=kind, scaler=scaler,
                                      state=SimpleNamespace(deepspeed_plugin=plugin))
        made = train.make_optimizer(args, accelerator, model)
        return type(made).__name__, [layer.rows for layer in layers]

    by_rows, plain = ("RowAdamW", [[], []]), ("AdamW", [None, None])
    assert optimizer() == optimizer(kind=DistributedType.MULTI_GPU, exchanges=True) == by_rows
    assert optimizer(frozen=True) == ("RowAdamW", [[], None])
    for how in ({"device": "cpu"}, {"kind": DistributedType.MULTI_GPU}, {"plugin": object()}, {"scaler": object()}):
        assert optimizer(**how) == plain
    monkeypatch.setattr(networks, "has_triton", lambda: False)
    assert optimizer() == plain


@pytest.mark.parametrize("plugin, groups", [(None, 5), (object(), 1)])
def test_deepspeed_gets_no_group_of_frozen_weights(plugin, groups):
    """It makes one tensor of what learns in each, and raises where that is nothing. Without it, they keep their place.
    """
    model = networks.MindEye2([5], 6, 1, 2, 3, 4, prior_depth=1, prior_dim_head=2)
    model.freeze()  # all but the ridge
    accelerator = SimpleNamespace(device=torch.device("cpu"), distributed_type=DistributedType.NO, scaler=None,
                                  state=SimpleNamespace(deepspeed_plugin=plugin))
    assert len(train.make_optimizer(train.parse_args([]), accelerator, model).param_groups) == groups


def test_a_bad_loss_of_another_process_stops_all():
    """Else the first process would save weights that a gradient of the second has spoilt."""
    trials, losses = data.Trials(3, np.arange(10, 16), np.arange(6), np.ones(6, int)), torch.tensor([5., 7.])
    two = SimpleNamespace(num_processes=2, gather=lambda own: torch.cat((own, losses)), scaler=None)
    run = SimpleNamespace(steps=3, losses=[9.], fresh=[torch.tensor(1.), torch.tensor(2.)],
                          batches=lambda epoch, process: iter([[np.array([3 * process + step])] for step in range(3)]),
                          sets=SimpleNamespace(train=[SimpleNamespace(trials=trials)]))
    args = train.parse_args([])
    train.gather_losses(args, two, run)
    assert run.losses == [9, 3, 4.5] and not run.fresh
    run.losses, run.fresh, losses[1] = [9.], [torch.tensor(1.), torch.tensor(2.)], torch.nan
    with pytest.raises(UserError, match=r"nan in epoch 0, step 2 \(image rows of subject 3: 15\)"):
        train.gather_losses(args, two, run)


def test_gradients_are_exchanged_once_a_step_of_the_optimizer(smoke_world, tmp_path, monkeypatch):
    """DDP decides in forward whether the next backward exchanges gradients: so forward must be where it is told not to.
    """
    alone, seen, losses = [], [], train.step_losses

    @contextmanager
    def no_sync(self, model):
        alone.append(1)
        yield
        alone.pop()
    monkeypatch.setattr(Accelerator, "no_sync", no_sync)
    monkeypatch.setattr(train, "step_losses", lambda *given: seen.append(len(alone)) or losses(*given))
    run(smoke_world, tmp_path, "--num_epochs=1", "--batch_size=3", "--gradient_accumulation=2", "--no-ckpt_saving",
        *SMALL)
    assert seen == [1, 0] * (len(seen) // 2) and seen


# ---- a process dies

DYING = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import model, train
step, folder, rank = train.step_losses, sys.argv[1], os.environ["RANK"]
open(folder + "/pid" + rank, "w").write(str(os.getpid()))

def losses(args, accelerator, *rest):
    global left
    left -= 1
    if not left and rank == "1":
        open(folder + "/died", "w").write(str(time.time()))
        os.kill(os.getpid(), getattr(signal, os.environ["SENT"]))
    return step(args, accelerator, *rest)

left, train.step_losses = 3, losses
model.run_main(lambda: train.main(sys.argv[2:]))
"""


def send_second(sent: str, world: Path, folder: Path, monkeypatch) -> subprocess.CompletedProcess:
    """Train in two processes, of which the second gets a signal at its third step. (accelerate launch starts so, too.)
    """
    script = folder / "dying.py"
    script.write_text(DYING)
    monkeypatch.setenv("SENT", sent)
    return launch(folder, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, folder,
                  *arguments(world, folder, "--model_name=a", "--num_epochs=9", "--batch_size=4", *SMALL))


def test_when_one_process_is_asked_to_stop_both_save_and_end(smoke_world, tmp_path, monkeypatch):
    done = send_second("SIGTERM", smoke_world, tmp_path, monkeypatch)
    assert "exitcode  : 143" in done.stderr, done.stderr[-2000:]
    assert checkpoints.load_checkpoint(tmp_path / "train_logs/a")["step"] == 3


def test_when_one_process_is_killed_the_others_end(smoke_world, tmp_path, monkeypatch):
    """The broken connection is an error of the next exchange, which is named; the launcher reports who died of what."""
    done = send_second("SIGKILL", smoke_world, tmp_path, monkeypatch)
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    assert done.returncode == 1 and "Signal 9 (SIGKILL) received" in done.stderr, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "another process of this run has ended" in said[0] and "--resume" in said[0], done.stderr
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("stage", [train, unclip])
def test_processes_meet_before_their_gpus_wait_for_a_lost_one(stage, monkeypatch):
    """Else a CPU waits for its GPU, whose exchange with the lost one never ends, and cannot say a word."""
    def broken(group):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed")
    monkeypatch.setattr(torch.distributed, "barrier", broken)
    two, only_cpus = SimpleNamespace(num_processes=2), SimpleNamespace(cpus="gloo")  # no loss can be looked at
    def at_the_end(*_):
        raise processes.end_of_sigterm(None, only_cpus)
    for exchange in (stage.report, at_the_end):
        with pytest.raises(UserError, match="another process"), processes.naming_lost(two, "--resume."):
            exchange(SimpleNamespace(), two, only_cpus)


def test_sigterm_does_not_silence_an_error():
    """The launcher sends it to all when one has died: while the others are about to say so."""
    run, before = SimpleNamespace(), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError), processes.noting_sigterm(run):
            raise RuntimeError("gloo: connection closed")
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop
    finally:
        signal.signal(signal.SIGTERM, before)


def test_cpus_that_cannot_connect(monkeypatch):
    def refuse(**_):
        raise RuntimeError("Gloo connectFullMesh failed\nat pair.cc")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "new_group", refuse)
    two = SimpleNamespace(num_processes=2)
    with pytest.raises(UserError, match=r"\(Gloo connectFullMesh failed\): set GLOO_SOCKET_IFNAME"):
        with processes.naming_lost(two, "--resume."), processes.noting_sigterm(SimpleNamespace()):
            pass


def test_other_errors_keep_their_traceback():
    two = SimpleNamespace(num_processes=2)
    with pytest.raises(RuntimeError, match="shapes"), processes.naming_lost(two, "--resume."):
        raise RuntimeError("shapes do not fit")
    for error in (RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed"),
                  torch.distributed.DistBackendError("NCCL")):
        with pytest.raises(UserError, match="another process"), processes.naming_lost(two, "--resume."):
            raise error


def test_processes_wait_for_the_first_longer_than_it_encodes(monkeypatch):
    given = {}
    monkeypatch.setattr(train, "Accelerator", lambda **options: given.update(options) or SimpleNamespace(**options))
    train.start_accelerator(train.parse_args([]))
    assert given["kwargs_handlers"][0].timeout.total_seconds() >= 3600


# ---- to study

def test_detect_anomaly_names_the_operation(smoke_world, tmp_path, monkeypatch):
    losses = train.step_losses

    def spoilt(*given):
        out = losses(*given)
        return out | {"clip": out["clip"] + (0 * out["clip"]).sqrt()}  # a finite loss, whose gradient is 0 * infinity
    monkeypatch.setattr(train, "step_losses", spoilt)
    flags = ["--num_epochs=1", "--batch_size=3", "--no-ckpt_saving", *SMALL]
    try:
        with pytest.raises(RuntimeError, match="MulBackward0' returned nan"), pytest.warns(match="in spoilt"):
            run(smoke_world, tmp_path, "--detect_anomaly", *flags)
        with pytest.raises(UserError, match="The loss became nan in epoch 0, step 1"):
            run(smoke_world, tmp_path, *flags)
        assert not torch.is_anomaly_enabled()
    finally:
        torch.autograd.set_detect_anomaly(False)
