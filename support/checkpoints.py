"""Checkpoints inside an epoch, at signals too, and the sums that a resumed epoch starts from."""

import contextlib
import signal
import time

import torch
import torch.nn.functional as F

from support import photographs, ranks, runs
from support.program import Stopped, UserError

# Seconds. A signal to all processes of a job comes twice, as torchrun passes its own on.
SAME_SIGNAL = 2


class Checkpoints:
    """Checkpoints inside an epoch: every --checkpoint_minutes, and at the step after SIGUSR1, or
    after SIGTERM or SIGINT, which then end the run."""

    def __init__(self, run: runs.Run, params: dict, sets: photographs.Sets):
        self.run, self.params, self.sets = run, params, sets
        self.signals, self.last, self.inside = [], time.monotonic(), False
        self.asked = 0.0  # when the last signal came
        for signum in signal.SIGTERM, signal.SIGINT, signal.SIGUSR1:
            signal.signal(signum, self.ask)

    @contextlib.contextmanager
    def inside_epoch(self):
        """In this block a signal waits for the checkpoint of the current step; outside of it
        SIGTERM and SIGINT end the run at once."""
        self.inside, self.last = True, time.monotonic()
        yield
        self.inside = False
        for signum in set(self.signals) - {signal.SIGUSR1}:  # after the last step's checkpoint
            raise Stopped(signum)

    def ask(self, signum, frame) -> None:
        again = signum in self.signals and time.monotonic() - self.asked > SAME_SIGNAL
        if signum != signal.SIGUSR1 and (again or not self.inside):
            raise Stopped(signum)
        self.signals.append(signum)
        self.asked = time.monotonic()

    def due(self) -> bool:
        """Whether any rank wants a checkpoint. Call it on every rank."""
        minutes = (time.monotonic() - self.last) / 60
        due = bool(self.signals) or minutes > self.run.opt.checkpoint_minutes
        return bool(ranks.all_gather(torch.tensor([due], dtype=torch.uint8)).any())

    def write(self, step: int, sums: torch.Tensor, optimizer) -> None:
        """Write a checkpoint after that step, and end the run if a signal has asked for it. Call
        it on every rank; sums: this rank's."""
        run = self.run
        gathered = [row.tolist() for row in ranks.all_gather(sums)]
        run.facts['broken'] = photographs.broken_images(self.sets)
        checkpoint = run.make_checkpoint(self.params, optimizer, step, gathered)
        if not all(v.isfinite().all() for v in checkpoint['params'].values()):
            raise UserError(
                f'after step {step} the parameters are not finite; '
                f'what {run.opt.save} holds is kept. '
                'A lower --lr or --beta may help',
                status=1,
            )
        run.check_folder()
        if ranks.rank() == 0:
            runs.save_checkpoint(run.opt.save, checkpoint)
        run.progress = f'after step {step} of epoch {run.epoch + 1}'
        self.last = time.monotonic()
        own = max([s for s in self.signals if s != signal.SIGUSR1], default=0)
        self.signals.clear()
        signum = int(ranks.all_gather(torch.tensor([int(own)])).max())
        if signum:  # every rank stops here; the first one prints it
            ranks.end_all(Stopped(signum), status=128 + signum)


def resumed_sums(run: runs.Run, n: int) -> torch.Tensor:
    """This rank's sums of the n terms of the epoch until run.step, float64 [n]."""
    if not run.step:
        return torch.zeros(n, dtype=torch.double)
    sums = torch.tensor(run.checkpoint['sums'], dtype=torch.double)
    if len(sums) != ranks.world_size():  # the number of ranks has changed
        sums = F.pad(sums.sum(0, keepdim=True), (0, 0, 0, ranks.world_size() - 1))
    return sums[ranks.rank()]
