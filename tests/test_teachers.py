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
def test_outputs_mean_the_classes_as_far_as_the_log_says(classes, capsys):
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


def without_head(net):
    return net._replace(params={k: v for k, v in net.params.items() if not k.startswith('fc.')})


def test_a_net_without_a_head_is_not_tested_and_refused_where_its_outputs_count(capsys):
    net = without_head(a_net())
    with pytest.raises(UserError, match=r'--evaluate x: the net has no head \(fc'):
        teachers.check_classes('--evaluate x', net, PETS)
    assert not teachers.can_be_tested('x', net, PETS)
    assert capsys.readouterr().out == 'teacher x: has no head: its accuracy is not tested\n'


# Of 400 images, three standard errors are 7.5 points at 50 %.
@pytest.mark.parametrize(
    'acc, expected, warning',
    [
        (57.5, None, 'not clearly above chance, 50.00 % for 2 classes'),
        (57.6, None, ''),
        (80.0, 88.0, 'far below its known 88.0 %'),
        (80.0, 87.0, ''),
        (90.0, 70.0, ''),
        (80.0, 'nonsense', ''),
        (80.0, float('nan'), ''),
    ],
)
def test_an_accuracy_that_a_sound_net_would_not_have_is_noticed(acc, expected, warning, capsys):
    teachers.warn_of_accuracy('teacher x', a_net(), acc, 400, expected)
    error = capsys.readouterr().err
    assert error.startswith(
        f'warning: teacher x has test accuracy {acc:.2f} %, {warning}' * bool(warning)
    )
    assert bool(error) == bool(warning)


@pytest.mark.parametrize('expected, ask', [(50.0, 'it has little to teach'), (None, 'check the')])
def test_the_weights_are_blamed_unless_the_accuracy_is_the_known_one(expected, ask, capsys):
    teachers.warn_of_accuracy('teacher x', a_net(), 50.0, 400, expected)
    assert f'for 2 classes: {ask}' in capsys.readouterr().err


def test_weights_that_score_less_than_is_known_are_blamed(capsys):
    teachers.warn_of_accuracy('teacher x', a_net(), 60.0, 400, 92.5)
    assert 'far below its known 92.5 %: check the weights file' in capsys.readouterr().err


def test_chance_is_known_more_exactly_for_many_classes(capsys):
    """At 1 % three standard errors of 400 images are 1.49 points."""
    for acc, warned in (2.48, True), (2.50, False):
        teachers.warn_of_accuracy('teacher x', a_net(100), acc, 400)
        assert bool(capsys.readouterr().err) == warned


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
