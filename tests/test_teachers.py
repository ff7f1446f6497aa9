"""support/teachers.py: classes of nets, initial values beside a teacher's, --evaluate's line."""

import argparse

import pytest
import torch

import resnet
from support import teachers, weights
from support.program import UserError
from utils import is_statistic

PETS = ['cat', 'dog']


def a_net(num_classes=2, classes=None):
    """A WRN-10-1 as from a file, whose log has these classes."""
    torch.manual_seed(0)
    f, params = resnet.wrn(10, 1, num_classes)
    records = [{'classes': classes}] if classes else []
    return weights.Net(f, {k: v.detach() for k, v in params.items()}, records)


@pytest.mark.parametrize('classes', [None, PETS, 2])
def test_outputs_mean_the_classes_as_far_as_the_log_tells(classes, capsys):
    net = a_net(classes=classes)
    assert teachers.same_classes(net.params, net.records, PETS)
    teachers.check_classes('--evaluate x', net, PETS)
    assert teachers.can_be_tested('x', net, PETS) and capsys.readouterr().out == ''


@pytest.mark.parametrize('num_classes, classes', [(3, None), (2, ['dog', 'cat']), (2, ['a', 'b'])])
def test_other_classes_are_named(num_classes, classes, capsys):
    net = a_net(num_classes, classes)
    with pytest.raises(
        UserError, match=rf'--evaluate x.* {num_classes} classes.*\(cat, dog\)'
    ) as e:
        teachers.check_classes('--evaluate x', net, PETS)
    assert ', '.join(classes or PETS) in str(e.value)
    assert not teachers.can_be_tested('x', net, PETS)
    assert 'other classes' in capsys.readouterr().out


def test_a_student_of_its_teachers_shape_draws_other_initial_values():
    def drawn(teacher=None, **options):
        opt = argparse.Namespace(**{'seed': 0, 'depth': 10, 'width': 1.0} | options)
        teachers.seed_initial_values(opt, teacher)
        return float(torch.rand(1))

    teacher = a_net()
    other = weights.Net(teacher.f, {k: v + 1 for k, v in teacher.params.items()}, [])
    draws = [drawn(), drawn(teacher), drawn(other), drawn(seed=1), drawn(depth=16)]
    assert len(set(draws)) == len(draws)
    assert drawn(teacher) == draws[1] and drawn(teacher, depth=16) == draws[4]


def test_an_evaluation_is_one_line_of_the_net_and_its_speed(capsys):
    net = a_net()
    tested = {'test_loss': 1.5, 'test_acc': 60.0}
    teachers.print_evaluation('x', net, (32, 32), tested, images=100, seconds=4.0)
    line = capsys.readouterr().out
    trained = sum(v.numel() for k, v in net.params.items() if not is_statistic(k))
    assert line.count('\n') == 1 and f'"n_parameters": {trained}' in line
    assert '"images_per_second": 25.0, "test_time": 4.0' in line
    with pytest.raises(UserError, match='--evaluate x: the test loss is nan') as e:
        nan = tested | {'test_loss': float('nan')}
        teachers.print_evaluation('x', net, (32, 32), nan, images=100, seconds=4.0)
    assert e.value.status == 1
