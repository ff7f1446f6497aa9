"""support/averages.py: averages over images, and terms that are not finite."""

import pytest
import torch

from support.averages import Averages
from support.program import UserError

STEPS = [([1.0, 10.0], 4), ([4.0, 20.0], 2), ([0.1, 0.2], 3)]


def averages_of(steps, **before):
    averages = Averages(['loss', 'accuracy'], 3, 'logs/x', **before)
    for terms, images in steps:
        averages.add(torch.tensor(terms), images)
    return averages


def test_steps_weigh_by_their_images():
    averages = averages_of(STEPS[:2])
    assert averages.update().tolist() == [2.5, 15]  # over the recent steps
    averages.add(torch.tensor([4.0, 0.0]), 2)
    assert averages.update().tolist() == [4, 0] and averages.step == 3
    assert averages.means(8) == [(4 + 8 + 8) / 8, (40 + 40) / 8]


def test_a_resumed_epoch_has_the_averages_of_an_uninterrupted_one():
    whole, first = averages_of(STEPS), averages_of(STEPS[:2])
    whole.update(), first.update()
    rest = averages_of(STEPS[2:], step=first.step, sums=first.sums.clone())
    rest.update()
    assert rest.means(9) == whole.means(9) and rest.step == whole.step == 3


def test_a_term_that_is_not_finite_is_named_with_its_step():
    averages = averages_of([STEPS[0], ([1.0, float('nan')], 4)], step=5)
    with pytest.raises(
        UserError, match='epoch 3, step 7: not finite: accuracy nan; what logs/x'
    ) as e:
        averages.update()
    assert e.value.status == 1 and not averages.sums.any()
