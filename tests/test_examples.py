"""examples/: transfer between any two torch modules, and the class names of image files."""

import argparse
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cifar
import data
import resnet
from programs import ROOT, run_script
from samples import make_photographs, make_run, refused, words
from support import logs, photographs, program, weights

sys.path[:0] = [str(ROOT / 'examples'), str(ROOT / 'scripts')]
import classify
import layers
import modules
import training
import transfer

import convert

CLASSES = ['beach', 'city', 'wood']
NETS = '''
import torch
from torch import nn

class Net(nn.Module):
    """Two convolutions, and layers with the maps of the second in other shapes."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.b = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.tokens, self.with_class, self.nhwc = nn.Identity(), nn.Identity(), nn.Identity()
        self.pair, self.unused, self.fc = Pair(), nn.ReLU(), nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = self.b(self.a(x))
        tokens = self.tokens(x.flatten(2).transpose(1, 2))
        self.with_class(torch.cat([tokens.mean(1, keepdim=True) + 9, tokens], 1))
        self.nhwc(x.permute(0, 2, 3, 1)), self.pair(x)
        return self.fc(x.relu().mean((2, 3)))

class Pair(nn.Module):
    def forward(self, x):
        return x, x

class Auxiliary(Net):
    def forward(self, x):
        return (super().forward(x), None) if self.training else super().forward(x)

class Named(Net):
    def forward(self, x):
        return {'out': super().forward(x)}

def small(num_classes):
    return Net(num_classes, 4)

def large(num_classes):
    return Net(num_classes, 8)

def auxiliary(num_classes):
    return Auxiliary(num_classes, 4)

def fixed():
    return Net(3, 4)

def named(num_classes):
    return Named(num_classes, 4)

def few(num_classes):
    return Net(2, 4)

def nothing(num_classes):
    return None
'''
TAUGHT = '--teacher nets:large --teacher_weights large.pth'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Photographs in set/, nets.py, and weights of its large net."""
    folder = tmp_path_factory.mktemp('examples')
    make_photographs(folder / 'set', CLASSES, train=6, val=2)
    (folder / 'nets.py').write_text(NETS)
    (folder / 'resnet.py').write_text(NETS)  # a name of this repository
    return folder


@pytest.fixture
def home(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # of '.' Python keeps the folder at its first import
    monkeypatch.delitem(sys.modules, 'nets', raising=False)
    (folder / 'student.pth').unlink(missing_ok=True)
    if not (folder / 'large.pth').exists():
        torch.manual_seed(1)
        torch.save(net('large').state_dict(), folder / 'large.pth')
        torch.save(net('small').state_dict(), folder / 'small.pth')
    return folder


def net(name, num_classes=3):
    """A net of nets.py."""
    return modules.import_from('nets', name)(num_classes)


def ran(capsys, *options):
    """What transfer.py prints, which must succeed."""
    Path('student.pth').unlink(missing_ok=True)
    argv = words('set --image_size 40 --epochs 1', *options)
    assert program.call_main(transfer.main, argv) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert not err, err
    return out


def last_loss(printed):
    pattern = r'loss ([\d.]+)(?: \(\d+% of it transfer\))?, test accuracy [\d.]+ %\n$'
    return float(re.search(pattern, printed)[1])


# ------------------------ the programs


@pytest.mark.parametrize('file', sorted((ROOT / 'examples').glob('*.py')), ids=lambda f: f.name)
def test_an_example_is_shorter_than_100_lines(file):
    assert len(file.read_text().splitlines()) < 100


@pytest.mark.parametrize('name', ['transfer', 'classify'])
def test_help_is_printed_in_any_folder(name, tmp_path):
    done = run_script(f'examples/{name}.py', '--help', cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ''
    assert f'python examples/{name}.py' in done.stdout and done.stdout.startswith('usage: ')


def test_both_run_as_programs_in_another_folder(home, tmp_path):
    options = words('set --image_size 40 --epochs 1 --student nets:small --layers b', TAUGHT)
    done = run_script('examples/transfer.py', *options, '--save', tmp_path / 's.pth', cwd=home)
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    net('small').load_state_dict(torch.load(tmp_path / 's.pth', weights_only=True))
    image = next((home / 'set/val/city').iterdir())
    done = run_script('examples/classify.py', make_run(tmp_path / 'run'), image, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    assert done.stdout.startswith(f'{image}: ') and done.stdout.count('%') == 3


# ------------------------ transfer.py


def reference_loss(student, teacher, pairs, beta, epoch=1):
    """Cross-entropy + beta * the attention losses of the pairs of layers, in training on all
    photographs at once, as that epoch crops them."""
    sets = photographs.scan_photographs('set', say=lambda _: None)[0]
    files = [file for files in sets.values() for file in files]
    targets = torch.arange(3).repeat_interleave(6)
    views = [photographs.train_view(file, 40, 0, epoch, i) for i, file in enumerate(files)]
    x = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean[:, None, None]) / std[:, None, None]

    def maps(module):
        a = module.a(x)
        b = module.b(a)
        return {'a': a, 'b': b, 'tokens': b, 'with_class': b, 'nhwc': b}

    of_student, of_teacher = maps(student.train()), maps(teacher.eval())
    loss = F.cross_entropy(student.fc(of_student['b'].relu().mean((2, 3))), targets)
    for layer, layer_t in pairs:
        q = [v.square().sum(1) for v in (of_student[layer], of_teacher[layer_t])]
        side = min(v.shape[1] for v in q)
        q = [F.normalize(F.adaptive_avg_pool2d(v, side).flatten(1)) for v in q]
        loss = loss + beta * (q[0] - q[1]).square().mean()
    return loss


@pytest.mark.parametrize(
    'pairs',
    [
        [('a', 'a'), ('b', 'b')],
        [('b', 'a'), ('a', 'b')],  # not in the order of the calls
        [('b', 'a'), ('b', 'b')],  # one layer twice
        [('b', 'tokens'), ('tokens', 'with_class'), ('nhwc', 'b'), ('a', 'nhwc')],
    ],
)
def test_the_loss_of_the_first_step_is_that_of_the_paper(pairs, home, capsys):
    named = ' '.join(a for a, _ in pairs), ' '.join(b for _, b in pairs)
    chosen = f'--layers {named[0]} --teacher_layers {named[1]} --beta 300'
    printed = ran(capsys, '--student nets:small', TAUGHT, chosen)
    torch.manual_seed(0)
    student, teacher = net('small'), net('large')
    teacher.load_state_dict(torch.load('large.pth', weights_only=True))
    expected = reference_loss(student, teacher, pairs, 300).item()
    assert last_loss(printed) == pytest.approx(expected, abs=2e-3) and expected > 2


def test_steps_are_sgd_with_momentum_and_a_rate_that_falls_as_a_cosine(home, capsys):
    """Each epoch is one step."""
    options = '--student nets:small --layers b --beta 300 --epochs 4 --lr 0.1'
    printed = ran(capsys, TAUGHT, options)
    torch.manual_seed(0)
    student, teacher = net('small'), net('large')
    teacher.load_state_dict(torch.load('large.pth', weights_only=True))
    params, losses = list(student.parameters()), []
    momentum = [torch.zeros_like(p) for p in params]
    for epoch in range(1, 5):
        loss = reference_loss(student, teacher, [('b', 'b')], 300, epoch)
        losses.append(loss.item())
        lr = 0.1 * (1 + math.cos(math.pi * (epoch - 1) / 4)) / 2
        with torch.no_grad():
            for p, v, g in zip(params, momentum, torch.autograd.grad(loss, params)):
                v.mul_(0.9).add_(g + 1e-4 * p)
                p.sub_(lr * v)
    found = [float(loss) for loss in re.findall(r'loss ([\d.]+)', printed)]
    assert found == pytest.approx(losses, abs=2e-3)


def test_the_student_is_saved_and_the_teacher_stays_as_it_was(home, capsys, monkeypatch):
    made, make = [], modules.make
    monkeypatch.setattr(modules, 'make', lambda *a: made.append(make(*a)) or made[-1])
    options = '--student nets:small --layers a b --epochs 3 --batch_size 7 --save new/of_large.pth'
    printed = ran(capsys, TAUGHT, options)
    first, *lines = printed.splitlines()
    assert re.fullmatch(r'teacher: test accuracy [\d.]+ %', first)
    assert [line.split(':')[0] for line in lines] == ['epoch 1', 'epoch 2', 'epoch 3']
    student, teacher = (net.module for net in made)
    saved = torch.load('new/of_large.pth', weights_only=True)
    again = net('small')
    again.load_state_dict(saved)
    assert all(torch.equal(v, saved[k]) for k, v in student.state_dict().items())
    assert saved['a.1.num_batches_tracked'] == 9, 'three epochs of 18 photographs by 7'
    before = torch.load('large.pth', weights_only=True)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_without_a_teacher_a_student_learns_alone(home, capsys):
    printed = ran(capsys, '--student nets:small')
    torch.manual_seed(0)
    expected = reference_loss(net('small'), net('large'), [], 0).item()
    assert last_loss(printed) == pytest.approx(expected, abs=2e-3)
    taught = ran(capsys, '--student nets:small', TAUGHT, '--layers b --beta 0')
    assert taught.splitlines()[1] == printed.strip().replace(',', ' (0% of it transfer),')


def test_a_net_with_auxiliary_logits_or_a_teacher_of_other_classes(home, capsys):
    torch.save(net('large', 7).state_dict(), 'seven.pth')
    seven = '--teacher nets:large --teacher_weights seven.pth --teacher_classes 7 --layers b'
    assert last_loss(ran(capsys, '--student nets:auxiliary', seven)) > 0


def test_list_prints_the_layers_that_have_maps(home, capsys):
    printed = ran(capsys, '--student nets:small --teacher nets:large --list')
    of_student, of_teacher = printed.split('--teacher nets:large: layers with maps')
    shapes = dict(line.split(maxsplit=1) for line in of_student.splitlines()[1:])
    assert shapes['a'] == shapes['a.2'] == '(2, 4, 20, 20)' and shapes['b'] == '(2, 8, 10, 10)'
    assert shapes['tokens'] == '(2, 100, 8)' and shapes['with_class'] == '(2, 101, 8)'
    assert not {'fc', 'pair', 'unused'} & shapes.keys()
    assert f'{"a":40} (2, 8, 20, 20)\n' in of_teacher


def test_tokens_and_nhwc_are_arranged_as_maps():
    x = torch.randn(2, 5, 7, 7)
    tokens = x.flatten(2).transpose(1, 2)
    for others in range(8):  # class tokens, distillation tokens, registers
        found = layers.as_maps(torch.cat([torch.randn(2, others, 5), tokens], 1))
        assert torch.equal(found, x)
    assert torch.equal(layers.as_maps(x), x)
    assert torch.equal(layers.as_maps(x.permute(0, 2, 3, 1)), x)
    assert layers.has_maps(x) and layers.has_maps(tokens)
    one_vector = torch.randn(2, 5), torch.randn(2, 5, 1, 1), torch.randn(2, 1, 5)
    windows, queries = torch.randn(8, 5, 7, 7), torch.randn(2, 3, 50, 16)
    for other in *one_vector, windows, queries, (x, x), None:
        assert not layers.has_maps(other)


def test_images_are_as_the_model_expects_them(home):
    opt = transfer.parser.parse_args(words('set --student x'))
    made = modules.make('--student', 'torchvision.models:squeezenet1_1', 3, opt)
    assert made.size == 224 and list(made.mean) == [0.485, 0.456, 0.406]
    own = words('set --student x --mean .5 .4 .3 --std .2 .2 .1')
    made = modules.make('--student', 'nets:small', 3, transfer.parser.parse_args(own))
    images = torch.full((1, 8, 8, 3), 51, dtype=torch.uint8)
    seen = []
    made.module.register_forward_pre_hook(lambda _, x: seen.extend(x))
    made(images)
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([-1.5, -1.0, -1.0]))


class RightInTesting(torch.nn.Module):
    """Answers class 1 in testing, and in training class 3, which has no images."""

    def forward(self, images):
        return F.one_hot(torch.full((len(images),), 3 if self.training else 1), 4).float()


def test_accuracy_is_that_of_the_net_in_testing(home):
    opt = transfer.parser.parse_args(words('set --student x --image_size 40'))
    val = photographs.open_sets(opt, torch.device('cpu'), 'DIR').val
    made = modules.Net('--student x', RightInTesting(), 4, 40, [0.5] * 3, [0.2] * 3)
    assert made.accuracy(val, 40) == pytest.approx(100 / 3)


def test_nets_of_torchvision(home, capsys):
    import torchvision

    teacher = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    torch.save(teacher.state_dict(), 'shuffle.pth')
    nets = '--student torchvision.models:squeezenet1_1 --layers features.5 --teacher_layers stage2'
    taught = '--teacher torchvision.models:shufflenet_v2_x0_5 --teacher_weights shuffle.pth'
    assert last_loss(ran(capsys, nets, taught, '--image_size 64')) > 0


def test_nets_of_timm(home, capsys):
    timm = pytest.importorskip('timm')
    opt = transfer.parser.parse_args(words('set --student x'))
    made = modules.make('--teacher', 'timm:test_vit', 3, opt)
    assert made.size == 160 and list(made.mean) == list(made.module.pretrained_cfg['mean'])
    torch.save(timm.create_model('test_vit', num_classes=3).state_dict(), 'vit.pth')
    taught = '--teacher timm:test_vit --teacher_weights vit.pth --layers layer2 layer3'
    options = f'--student timm:test_resnet {taught} --teacher_layers blocks.1 blocks.3'
    argv = words('set --epochs 1', options, '--save timm.pth')
    assert program.call_main(transfer.main, argv) == 0
    assert last_loss(capsys.readouterr().out) > 0
    error = refused(transfer.main, [*argv, '--image_size', '100', '--save', 'other.pth'], capsys)
    assert '--teacher timm:test_vit: fails on images of 100x100, see --image_size' in error


@pytest.mark.parametrize(
    'options, named',
    [
        ('--student nets:huge', "--student nets:huge: AttributeError: module 'nets' has no"),
        ('--student nobody:small', '--student nobody:small: ModuleNotFoundError'),
        ('--student nets', '--student nets: is neither timm:NAME nor MODULE:FUNCTION'),
        ('--student nets:fixed', "unexpected keyword argument 'num_classes'"),
        ('--student nets:nothing', 'returns NoneType, not a torch.nn.Module'),
        ('--student nets:named', '--student nets:named: returns dict, not (2, 3) logits'),
        ('--student nets:few', '--student nets:few: returns (2, 2), not (2, 3) logits'),
        ('--student resnet:small', 'resnet.py has the name of'),
        ('--student torchvision.models:resnet17', '--student torchvision.models:resnet17: '),
        (f'{TAUGHT} --layers c', '--student nets:small: has no layer c'),
        (f'{TAUGHT} --layers a --teacher_layers c', '--teacher nets:large: has no layer c'),
        (f'{TAUGHT} --layers fc', '--student nets:small: layer fc has no maps'),
        (f'{TAUGHT} --layers pair', 'layer pair has no maps'),
        (f'{TAUGHT} --layers unused', 'layer unused has no maps'),
        (f'{TAUGHT} --layers a b --teacher_layers b', '--teacher_layers: give as many layers'),
        ('--teacher_layers b', '--teacher_layers: give as many layers'),
        ('--layers b', '--teacher, --teacher_weights and --layers: give all three'),
        ('--teacher nets:large --layers b', 'give all three'),
        (TAUGHT, 'give all three'),
        ('--teacher nets:large --teacher_weights small.pth --layers b', 'does not fit the net'),
        (
            '--teacher nets:large --teacher_weights none.pth --layers b',
            '--teacher_weights none.pth',
        ),
        ('--teacher nets:large --teacher_weights nets.py --layers b', '--teacher_weights nets.py'),
        (f'{TAUGHT} --teacher_classes 4 --layers b', 'has 4 classes: is --teacher_classes right?'),
        ('--student timm2:x', "No module named 'timm2'"),
        ('--save set', '--save set: is a folder'),
        ('--save large.pth', '--save large.pth: already exists'),
        ('--save nets.py/student.pth', 'nets.py is not a folder'),
        ('--epochs 0', '--epochs'),
        ('--std .2 0 .2', '--std'),
        ('--image_size 7', '--image_size'),
    ],
)
def test_a_mistake_in_transfer_is_one_line_that_names_it(options, named, home, capsys):
    before = sorted(home.rglob('[!_]*'))
    argv = words('set --student nets:small --image_size 40 --epochs 1', options)
    assert named in refused(transfer.main, argv, capsys)
    assert sorted(home.rglob('[!_]*')) == before


def test_a_file_that_another_process_has_written_since_is_kept(home, monkeypatch, capsys):
    accuracy = modules.Net.accuracy

    def write_and_test(net, val, size):
        Path('student.pth').write_text('of another process')
        return accuracy(net, val, size)

    monkeypatch.setattr(modules.Net, 'accuracy', write_and_test)
    argv = words('set --student nets:small --image_size 40 --epochs 1')
    assert 'student.pth: already exists' in refused(transfer.main, argv, capsys)
    assert Path('student.pth').read_text() == 'of another process'


def test_a_teacher_of_other_classes_is_not_tested(home, capsys):
    torch.save(net('large', 7).state_dict(), 'seven.pth')
    options = '--student nets:small --teacher nets:large --layers b --teacher_weights'
    assert 'teacher: test accuracy' in ran(capsys, options, 'large.pth')
    assert 'teacher: test' not in ran(capsys, options, 'seven.pth --teacher_classes 7')


def test_transfer_is_a_single_process(home, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    argv = words('set --student nets:small')
    assert 'WORLD_SIZE=2: ' in refused(transfer.main, argv, capsys)


def test_nets_on_a_cpu_get_images_without_channels_last(home):
    """In channels_last, torch ends with a segmentation fault in some narrow nets."""
    seen = []
    net = modules.make('--student', 'nets:small', 3, argparse.Namespace(mean=None, std=None))
    net.module.a.register_forward_pre_hook(lambda module, x: seen.append(x[0].is_contiguous()))
    net(torch.zeros(2, 40, 40, 3, dtype=torch.uint8))
    assert seen == [True]


def test_photographs_that_are_missing_or_broken_are_named(home, capsys, tmp_path):
    error = refused(transfer.main, words(tmp_path, '--student nets:small'), capsys)
    assert f'DIR {tmp_path}: there is no folder {tmp_path}/train' in error
    make_photographs(tmp_path / 'set', CLASSES, train=3, val=2)
    (tmp_path / 'set/train/city/1.jpg').write_bytes(b'no image')
    argv = words(tmp_path / 'set', '--student nets:small --image_size 40 --epochs 1')
    assert 'city/1.jpg' in refused(transfer.main, argv, capsys)


def test_a_loss_that_is_not_finite_ends_in_one_line(home, capsys):
    argv = words('set --student nets:small --image_size 40 --epochs 9 --batch_size 6 --lr 1e9')
    assert program.call_main(transfer.main, argv) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'A lower --lr or --beta may help' in error


def test_a_stop_keeps_the_student_of_the_last_epoch(home, capsys, monkeypatch):
    """SIGINT in the second epoch."""
    Path('student.pth').unlink(missing_ok=True)
    batches = training.train_batches

    def stopped(train_set, epoch, opt):
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)
        yield from batches(train_set, epoch, opt)

    monkeypatch.setattr(transfer, 'train_batches', stopped)
    argv = words('set --student nets:small --image_size 40 --epochs 3')
    assert program.call_main(transfer.main, argv) == 128 + signal.SIGINT
    out, err = capsys.readouterr()
    assert out.count('epoch') == 1 and 'student.pth is the student after its last epoch' in err
    net('small').load_state_dict(torch.load('student.pth', weights_only=True))


# ------------------------ classify.py


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run folder of imagenet.py with a net for photographs of 40 pixels, and three photographs,
    of which one is grey."""
    folder = tmp_path_factory.mktemp('classify')
    torch.manual_seed(3)
    _, params = resnet.resnet(18, 0.25, 3)
    params = {k: v.detach() for k, v in params.items()}
    params['fc.weight'] *= 0.02
    (folder / 'run').mkdir()
    weights.save_params(folder / 'run/model.hkl', params)
    weights.save_params(folder / 'alone.hkl', params)
    weights.save_params(
        folder / 'headless.hkl', {k: v for k, v in params.items() if not k.startswith('fc.')}
    )
    record = {'depth': 18, 'width': 0.25, 'image_size': 40, 'classes': CLASSES, 'epoch': 1}
    (folder / 'run/log.txt').write_text(logs.json_stats(record) + '\n')
    for i, size in enumerate([(50, 60, 3), (90, 70, 3), (64, 64)]):
        image = np.random.default_rng(i).integers(0, 256, size, np.uint8)
        cv2.imwrite(str(folder / f'{i}.png'), image)
    return folder


@pytest.fixture
def photos(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return [f'{i}.png' for i in range(3)]


def classified(capsys, *argv):
    """{file: {class: probability in per cent}} as classify.py prints them."""
    assert program.call_main(classify.main, [str(a) for a in argv]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    sizeless = argv[0] == 'alone.hkl' and '--image_size' not in argv
    said = f'NET {argv[0]}: has no image size: taking 224; see --image_size\n'
    assert err == said * sizeless
    found = {}
    for line in out.splitlines():
        file, _, named = line.partition(': ')
        found[file] = {n: float(p) for n, p in re.findall(r'([\w ]+) ([\d.]+) %(?:, |$)', named)}
    return found


def test_a_run_folder_gives_names_and_probabilities(photos, capsys):
    found = classified(capsys, 'run', *photos)
    f, params, _ = weights.load_net('run')
    for file in photos:
        x = torch.from_numpy(photographs.centre_view(file, 40)).permute(2, 0, 1)[None] / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (x - mean[:, None, None]) / std[:, None, None]
        p = (100 * f(x, params, False)[0].softmax(1)[0]).tolist()
        assert found[file] == pytest.approx(dict(zip(CLASSES, p)), abs=0.06)
        assert list(found[file].values()) == sorted(found[file].values(), reverse=True)
    assert len({max(v.values()) for v in found.values()}) == 3
    first = classified(capsys, 'run', photos[0], '--top', 1)[photos[0]]
    assert first == dict([max(found[photos[0]].items(), key=lambda item: item[1])])
    assert classified(capsys, 'run/model.hkl', *photos) == found


def test_a_weights_file_alone_has_no_names_and_no_size(photos, capsys):
    expected = classified(capsys, 'run', *photos)
    found = classified(capsys, 'alone.hkl', *photos, '--image_size', 40)
    for file in photos:
        named = {f'class {CLASSES.index(name)}': p for name, p in expected[file].items()}
        assert found[file] == named
    assert classified(capsys, 'alone.hkl', photos[0]) != found


def test_an_onnx_file_gives_what_its_run_folder_gives(photos, capsys):
    pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    for argv in (['net.onnx', '--normalize'], ['plain.onnx']):
        assert program.call_main(convert.main, ['run', *argv, '--force']) == 0
    assert program.call_main(convert.main, ['alone.hkl', 'big.onnx', '--normalize', '--force']) == 0
    capsys.readouterr()
    expected = classified(capsys, 'run', *photos)
    found = classified(capsys, 'net.onnx', *photos, '--image_size', 40)
    for file in photos:
        assert found[file] == pytest.approx(expected[file], abs=0.11)
    assert 'class 0' in classified(capsys, 'big.onnx', photos[0])[photos[0]]
    assert 'convert it with --normalize' in refused(classify.main, ['plain.onnx', *photos], capsys)
    error = refused(classify.main, ['net.onnx', *photos, '--image_size', 64], capsys)
    assert '--image_size 64: net.onnx takes only (40, 40)' in error


def test_a_net_of_cifar_sees_the_whole_image_at_its_size(tmp_path, photos, capsys):
    run = make_run(tmp_path / 'run')
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    big = cv2.resize(image, (96, 64), interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(tmp_path / 'small.png'), image), cv2.imwrite(str(tmp_path / 'big.png'), big)
    files = [str(tmp_path / name) for name in ('small.png', 'big.png')]
    small, big = classified(capsys, run, *files, '--top', 10).values()
    assert small == pytest.approx(big, abs=0.11) and len(small) == 10 and 'star' in small


def test_a_net_of_cifar_sees_images_of_the_shape_that_it_was_trained_on(tmp_path, capsys):
    """Not square, as a folder or as an ONNX file."""
    pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    set_, run = tmp_path / 'set', str(tmp_path / 'run')
    for i, name in enumerate(
        f'{s}/{c}/{n}.png' for s in ('train', 'test') for c in 'ab' for n in 'xy'
    ):
        (set_ / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)
        cv2.imwrite(str(set_ / name), noise)
    options = f'--dataset folder --dataroot {set_} --depth 10 --batch_size 2 --epochs 1 --nthread 1'
    assert program.call_main(cifar.main, words(options, '--save', run)) == 0
    f, params, records = weights.load_net(run)
    assert records[0]['image_shape'] == [48, 64]
    image = data.decode(set_ / 'test/a/x.png')
    with torch.inference_mode():
        logits, _ = f(data.normalize(torch.from_numpy(image)[None]), params, False)
    expected = 100 * logits.softmax(1)[0]
    assert program.call_main(convert.main, [run, f'{run}.onnx', '--normalize']) == 0
    assert 'images [batch, 3, 48, 64] in uint8' in capsys.readouterr().out
    for net in run, f'{run}.onnx':
        (found,) = classified(capsys, net, str(set_ / 'test/a/x.png')).values()
        assert [found['a'], found['b']] == pytest.approx(expected.tolist(), abs=0.11)
    # A run that older code began has no shape in its first lines.
    log = Path(run) / 'log.txt'
    last = json.loads(log.read_text().removeprefix('json_stats: '))
    first = {k: v for k, v in last.items() if k != 'image_shape'}
    log.write_text(f'{logs.json_stats(first)}\n{logs.json_stats(last)}\n')
    assert weights.image_shape('', weights.load_net(run)) == (48, 64)
    # A size that is given counts in any case.
    log.write_text(logs.json_stats(last | {'image_shape': 'x'}) + '\n')
    assert 'invalid image size, x' in refused(classify.main, [run, 'a.png'], capsys)
    assert classified(capsys, run, str(set_ / 'test/a/x.png'), '--image_size', 48)


def test_pixels_of_a_smaller_image_are_means(tmp_path):
    """Of 3 rows and 2 columns each, in the order RGB."""
    image = np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    expected = image[..., ::-1].reshape(32, 3, 32, 2, 3).mean((1, 3))
    found = classify.view(str(tmp_path / 'a.png'), 'wrn', (32, 32))
    assert np.abs(found - expected).max() <= 0.51


@pytest.mark.parametrize(
    'net, image, named',
    [
        ('run', 'none.png', 'none.png'),
        ('run', 'broken.png', 'broken.png'),
        ('run', 'run', 'run'),
        ('headless.hkl', '0.png', 'NET headless.hkl: has no head'),
        ('nobody', '0.png', 'nobody: no such run folder or weights file'),
        ('0.png', '0.png', '0.png'),
        ('broken.onnx', '0.png', 'NET broken.onnx: '),
        ('none.onnx', '0.png', 'NET none.onnx: '),
    ],
)
def test_a_mistake_in_classify_is_one_line_that_names_it(net, image, named, photos, capsys):
    for name in 'broken.png', 'broken.onnx':
        with open(name, 'wb') as file:
            file.write(b'broken')
    assert named in refused(classify.main, [net, image], capsys)
