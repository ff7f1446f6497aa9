"""Running averages of an epoch, and the check that every term of the loss is finite."""

import math

import torch
from torchnet import meter

from support import ranks
from support.program import UserError


class Averages:
    """Averages over an epoch's images of the terms of the loss, which must all be finite.

    names   the terms, for the error
    epoch   1-based, and `folder` of the run, for the error
    step    steps of the epoch that an earlier process did, with the `sums` of their terms,
            float64 [terms], each weighted by its images

    Terms stay on the device until `update`, because reading them makes the device wait.
    """

    def __init__(self, names: list, epoch: int, folder, step: int = 0, sums=None):
        self.names, self.epoch, self.folder, self.step = names, epoch, folder, step
        self.sums = torch.zeros(len(names), dtype=torch.double) if sums is None else sums
        self.rows, self.images = [], []

    def add(self, terms: torch.Tensor, images: int) -> None:
        """The terms of one step, float32 [terms], means over that many images."""
        self.rows.append(terms)
        self.images.append(images)

    def update(self) -> torch.Tensor:
        """Read the terms added since the last call and return their means over these steps.

        Raises UserError, status 1, with the step and the terms that are not finite.
        """
        recent = torch.stack(self.rows).cpu()
        bad = (~recent.isfinite()).nonzero()[:, 0]
        if len(bad):
            row = zip(self.names, recent[bad[0]].tolist())
            terms = ', '.join(f'{name} {v}' for name, v in row if not math.isfinite(v))
            raise UserError(
                f'epoch {self.epoch}, step {self.step + int(bad[0]) + 1}: not finite: {terms}; '
                f'what {self.folder} holds is kept. '
                'A lower --lr or --beta may help',
                status=1,
            )
        for row, images in zip(recent.double(), self.images):
            self.sums += row * images
        self.step += len(self.rows)
        self.rows, self.images = [], []
        return recent.mean(0)

    def means(self, images: int) -> list[float]:
        """The average of each term over all images of the epoch, those of all ranks."""
        meters = [meter.AverageValueMeter() for _ in self.names]
        for m, total in zip(meters, ranks.all_gather(self.sums).sum(0).tolist()):
            m.add(total, images)
        return [float(m.value()[0]) for m in meters]
