"""The processes of one run: how long they wait for each other, and how they end when one dies or SIGTERM comes.

`accelerate launch` starts a stage once for each device. What they do together is said in the stages; here is only what
all of them share, no command of its own.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import torch
from accelerate import Accelerator, PartialState

from model import UserError

# How long processes wait for one: the first may encode 73,000 images, and NCCL's ten minutes would end the run. One
# that dies is noticed long before: by the connection, or by the launcher, which ends the others within 30 seconds.
PATIENCE = timedelta(hours=2)


def start() -> PartialState:
    """This process among those that `accelerate launch` started, if it did."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


@contextmanager
def naming_lost(state: Accelerator | PartialState, mend: str) -> Iterator[None]:
    """A process that died breaks the next exchange with it: say so, and `mend`, in place of gloo's or NCCL's traceback.
    """
    try:
        yield
    except RuntimeError as error:
        broken = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if state.num_processes == 1 or not broken:
            raise
        raise UserError("another process of this run has ended, so this one ends too: the launcher's report below "
                        f"tells which one and how, and {mend}") from error


@contextmanager
def noting_sigterm(run: SimpleNamespace) -> Iterator[None]:
    """SIGTERM, which slurm sends before it takes a machine away, sets run.stop instead of ending the process.

    Also while an error ends it: where a process died, the launcher sends SIGTERM to the others at about the time at
    which they find the connection broken, and would silence what they say of it. run.cpus: see `meet`.
    """
    run.stop, run.cpus = False, None
    if torch.distributed.is_initialized():
        try:
            run.cpus = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        except RuntimeError as error:
            raise UserError(f"the processes' CPUs cannot reach each other ({str(error).splitlines()[0]}): set "
                            "GLOO_SOCKET_IFNAME to the network between them, as `ip addr` names it (in one machine: "
                            "lo).") from error
    before = signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop", True))
    yield
    signal.signal(signal.SIGTERM, before)


def meet(run: SimpleNamespace) -> None:
    """Wait for all processes, from CPU to CPU; an error, for `naming_lost`, if one has died.

    Before all that reads a number which GPUs made together: a GPU that waits for a dead process waits until it is
    killed, and its CPU with it. Between CPUs, gloo finds the broken connection at once.
    """
    if run.cpus is not None:
        torch.distributed.barrier(run.cpus)


def asked_to_stop(accelerator: Accelerator, run: SimpleNamespace) -> bool:
    """Whether any process got SIGTERM.

    They ask each other after each step, and from CPU to CPU: by NCCL, CPUs would wait for their GPUs (see `meet`).
    """
    if accelerator.num_processes == 1:
        return run.stop
    stop = torch.tensor(float(run.stop))
    torch.distributed.all_reduce(stop, group=run.cpus)
    return stop.item() > 0


def end_of_sigterm(accelerator: Accelerator, run: SimpleNamespace) -> SystemExit:
    """What to raise after saving: the exit code by which slurm knows that the signal ended the process.

    All end together: where one has ended, the launcher gives the others, which may be writing still, 30 seconds.
    """
    meet(run)
    accelerator.end_training()
    return SystemExit(128 + signal.SIGTERM)
