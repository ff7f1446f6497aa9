"""support/names.py: nets in the files of other programs, by their own classes where they are at
hand."""

import argparse
import copy
import pathlib
import re
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from samples import from_torchvision, make_run, randn
from support import program, weights
from support.program import UserError


class NarrowResNet(ResNet):
    """torchvision's ResNet-18 with an eighth of its channels behind the stem, for 3 classes."""

    def __init__(self, seed=0, blocks=(2, 2, 2, 2)):
        torch.manual_seed(seed)
        super().__init__(BasicBlock, blocks)
        self.fc = nn.Linear(64, 3)
        randomize(self)

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def randomize(net):
    """Draw the parameters and statistics of all batch norms."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1), nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
    return net


@pytest.fixture
def net():
    return NarrowResNet()


@pytest.fixture
def other():
    return NarrowResNet(seed=1)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(program, 'printed', set())
    return tmp_path / 'net.pth'


def named(prefix, state):
    return OrderedDict((f'{prefix}{k}', v) for k, v in state.items())


def a_vector(name='mask'):
    return {name: torch.ones(3)}


def assert_loads(source, net):
    """The file holds this net of torchvision or timm, tensor for tensor and as a function."""
    f, params, records = weights.load_net(source)
    expected = from_torchvision(net.state_dict())
    assert params.keys() == expected.keys() and records == []
    assert all(torch.equal(params[k], v) for k, v in expected.items())
    x = randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = copy.deepcopy(net).eval()(x)
    torch.testing.assert_close(f(x, params, False)[0], logits, rtol=1e-4, atol=1e-4)


def refusal(source):
    with pytest.raises(UserError) as e:
        weights.load_net(source)
    file = re.sub(r'(?<=\.pth):.*', '', str(source), flags=re.DOTALL)
    assert str(e.value).startswith(file)
    return str(e.value).removeprefix(file)


# ------------------------ what other programs write


ARGS = argparse.Namespace(model='resnet18', lr=0.1, output_dir=pathlib.PurePosixPath('runs'))


class HistoryBuffer:
    """As in the message hub of mmengine."""

    def __init__(self):
        self.values, self.methods = np.arange(3.0), {'mean': np.mean}


def backbone_and_head(state, prefix=''):
    """As mmpretrain names the parameters of a classifier."""
    at = {k: 'head.' if k.startswith('fc.') else 'backbone.' for k in state}
    return {f'{prefix}{at[k]}{k}': v for k, v in state.items()}


FILES = {
    'a state dict': lambda s: s,
    'pytorch/examples': lambda s: {
        'epoch': 90,
        'arch': 'resnet18',
        'state_dict': named('module.', s),
        'best_acc1': torch.tensor([69.5]),
        'scheduler': {'last_epoch': 90},
    },
    'torchvision': lambda s: {'model': s, 'lr_scheduler': {}, 'epoch': 89, 'args': ARGS},
    'torchdistill': lambda s: {'model': s, 'lr_scheduler': {}, 'best_value': 69.5, 'args': ARGS},
    'mmpretrain': lambda s: {
        'meta': {'dataset_meta': {'classes': ['a', 'b', 'c']}, 'seed': np.int64(3)},
        'state_dict': backbone_and_head(s),
        'message_hub': {'log_scalars': OrderedDict({'train/loss': HistoryBuffer()})},
    },
    'mmrazor': lambda s: {'state_dict': backbone_and_head(s, 'architecture.')},
    'RepDistiller': lambda s: {'epoch': 240, 'model': s, 'best_acc': torch.tensor(69.5)},
    'mdistiller': lambda s: {'epoch': 240, 'model': named('module.', s), 'best_acc': 69.5},
    'a tutorial': lambda s: {'model_state_dict': s, 'loss': np.float32(0.5)},
    'kuangliu': lambda s: {'net': named('module.', s), 'acc': 95.1, 'epoch': 199},
    'DeepSpeed': lambda s: {'module': s, 'ds_config': {}},
    'FSDP': lambda s: named('_fsdp_wrapped_module.', s),
    'a student alone': lambda s: {'params': named('student.', s)},
    'prefixes': lambda s: {'weights': named('model.module.net.', s)},
    'dicts in lists': lambda s: [{'nets': (defaultdict(list, s), 3)}],
    'a criterion': lambda s: {'state_dict': named('model.', s) | a_vector('criterion.weight')},
    'an optimizer': lambda s: {
        'model': s,
        'optimizer': {'state': {0: {'momentum_buffer': torch.ones(3)}}, 'param_groups': [{}]},
        'other_optimizer': {'state': {k: {'exp_avg': v} for k, v in s.items()}},
    },
}


@pytest.mark.parametrize('content', FILES.values(), ids=FILES)
def test_files_of_other_programs_load(content, net, file):
    torch.save(content(net.state_dict()), file)
    assert_loads(file, net)


@pytest.mark.parametrize('name', ['a.pth.tar', 'a.th', 'a.CKPT', 'pytorch_model.bin', 'a'])
def test_the_suffix_does_not_matter(name, net, file):
    torch.save({'state_dict': net.state_dict()}, file.with_name(name))
    assert_loads(file.with_name(name), net)


def test_wrapped_names_in_safetensors_and_hkl_load(net, file):
    state = named('model.module.', net.state_dict())
    safetensors.torch.save_file(state, file)
    assert_loads(file, net)
    weights.save_params(file, state)
    assert_loads(file, net)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_precision_load_as_float32(dtype, net, file):
    net.to(dtype)
    torch.save(net.state_dict(), file)
    assert_loads(file, net.float())


def compiled_inside(net):
    net.layer2, net.fc = torch.compile(net.layer2), torch.compile(net.fc)
    return net


def counted(net):
    """As thop.profile leaves a net."""
    for module in net.modules():
        module.register_buffer('total_ops', torch.zeros(1, dtype=torch.float64))
        module.register_buffer('total_params', torch.zeros(1, dtype=torch.float64))
    return net


def distributed(net):
    group = torch.distributed
    group.init_process_group('gloo', store=group.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(net)
    finally:
        group.destroy_process_group()


WRAPPERS = {
    'DataParallel': nn.DataParallel,
    'DDP': distributed,
    'compile': torch.compile,
    'compile in DataParallel': lambda net: nn.DataParallel(torch.compile(net)),
    'compiled submodules': compiled_inside,
    'averaged': AveragedModel,
    'thop': counted,
}


@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_nets_load(wrap, net, file):
    torch.save(wrap(copy.deepcopy(net)).state_dict(), file)
    assert_loads(file, net)


def test_checkpoints_of_timm_load(other, tmp_path, file, capsys):
    pytest.importorskip('timm')
    from timm.models.resnet import BasicBlock, ResNet
    from timm.utils import CheckpointSaver, ModelEmaV3

    torch.manual_seed(0)
    net = randomize(ResNet(BasicBlock, (2, 2, 2, 2), 3, channels=(8, 16, 32, 64)))
    average = ModelEmaV3(net)
    randomize(net)
    saver = CheckpointSaver(
        net,
        torch.optim.SGD(net.parameters(), 0.1),
        args=ARGS,
        model_ema=average,
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(3, metric=69.5)
    file = tmp_path / 'model_best.pth.tar'
    assert_loads(file, net)
    assert 'took state_dict; left out state_dict_ema' in capsys.readouterr().err
    assert_loads(f'{file}:state_dict_ema', average.module)
    assert weights.stated_accuracy(file) == 69.5


@pytest.mark.parametrize('attribute', ['model', 'net', 'student'])
def test_checkpoints_of_lightning_load(attribute, net, file):
    lightning = pytest.importorskip('lightning')

    class Module(lightning.LightningModule):
        def __init__(self, lr, name):
            super().__init__()
            self.save_hyperparameters()
            setattr(self, name, net)
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))

    trainer = lightning.Trainer(
        accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.strategy.connect(Module(0.1, attribute))
    trainer.save_checkpoint(file)
    assert f'{attribute}.fc.weight' in torch.load(file, weights_only=False)['state_dict']
    assert_loads(file, net)


# ------------------------ several nets in a file


def average_of(net):
    average = AveragedModel(net)
    average.update_parameters(net)
    return average.state_dict()


AVERAGES = {
    'torchvision': (lambda s, a: {'model': s, 'model_ema': a}, 'model', 'model_ema'),
    'timm': (lambda s, a: {'state_dict_ema': a, 'state_dict': s}, 'state_dict', 'state_dict_ema'),
    'ema': (lambda s, a: {'ema': {'shadow': a}, 'net': named('module.', s)}, 'net', 'ema.shadow'),
    'capitals': (lambda s, a: {'ModelEMA': a, 'model': s}, 'model', 'ModelEMA'),
    'mmengine': (
        lambda s, a: {
            'state_dict': backbone_and_head(s),
            'ema_state_dict': backbone_and_head(a, 'module.') | {'steps': torch.tensor(3)},
        },
        'state_dict.backbone',
        'ema_state_dict.backbone',
    ),
    'names': (
        lambda s, a: {'state_dict': named('model.', s) | named('model_ema.', a)},
        'state_dict.model',
        'state_dict.model_ema',
    ),
    'names of mmpretrain': (
        lambda s, a: {'state_dict': backbone_and_head(s) | backbone_and_head(a, 'ema.')},
        'state_dict.backbone',
        'state_dict.ema.backbone',
    ),
    'names without a prefix': (lambda s, a: s | named('ema.', a), '', 'ema'),
}


@pytest.mark.parametrize('case', AVERAGES.values(), ids=AVERAGES)
def test_the_weights_are_taken_and_their_average_is_left_out(case, net, other, file, capsys):
    content, raw, average = case
    state = other.state_dict() if average.endswith('backbone') else average_of(other)
    torch.save(content(net.state_dict(), state), file)
    assert_loads(file, net)
    line = capsys.readouterr().err
    assert line.count('\n') == 1 and line.startswith(f'{file}: ')
    assert f'left out {average}\n' in line and (f'took {raw}; ' in line or not raw)


@pytest.mark.parametrize('content, raw, average', AVERAGES.values(), ids=AVERAGES)
def test_an_average_is_taken_if_it_is_alone_or_named(content, raw, average, net, other, file):
    state = other.state_dict() if average.endswith('backbone') else average_of(other)
    key = average.removesuffix('.backbone')
    torch.save(content(net.state_dict(), state), file)
    assert_loads(f'{file}:{key}', other)
    torch.save({key.replace('.', '_'): state}, file)
    assert_loads(file, other)


SEVERAL = {
    'dicts': (lambda s, t: {'net_a': s, 'b': {'net': t}, 'epoch': 3}, 'net_a', 'b.net'),
    'names': (
        lambda s, t: {'state_dict': named('a.', s) | named('b.net.', t)},
        'state_dict.a',
        'state_dict.b.net',
    ),
    'a list': (lambda s, t: [s, t], '0', '1'),
    'names with wrappers': (
        lambda s, t: named('module.encoder_q.', s) | named('module.encoder_k.', t) | a_vector('q'),
        'encoder_q',
        'module.encoder_k',
    ),
    "mdistiller's distiller": (
        lambda s, t: {'model': named('module.student.', s) | named('module.teacher.', t)},
        'model.student',
        'model.module.teacher.',
    ),
    "Lightning's distiller": (
        lambda s, t: {'state_dict': named('student.', s) | named('teacher.', t)},
        'state_dict.student',
        'state_dict.teacher',
    ),
    'DINO': (
        lambda s, t: {'student': named('module.backbone.', s), 'teacher': named('backbone.', t)},
        'student.backbone',
        'teacher',
    ),
    'averages': (lambda s, t: {'ema': s, 'model_ema': t}, 'ema', 'model_ema'),
}


@pytest.mark.parametrize('content, first, second', SEVERAL.values(), ids=SEVERAL)
def test_of_several_nets_one_is_chosen_by_key(content, first, second, net, other, file):
    torch.save(content(net.state_dict(), other.state_dict()), file)
    message = refusal(file)
    second_label = second.replace('module.', '').rstrip('.')
    assert f'holds several nets ({first}, {second_label}' in message
    assert message.endswith(f'choose one by FILE:KEY, such as FILE:{first}')
    assert_loads(f'{file}:{first}', net)
    assert_loads(f'{file}:{second}', other)


def test_several_nets_inside_the_chosen_part_are_listed_with_its_key(net, other, file):
    torch.save({'a': {'b': net.state_dict(), 'c': other.state_dict()}, 'd': {}}, file)
    assert 'several nets (a.b, a.c): choose one by FILE:KEY' in refusal(f'{file}:a')
    assert_loads(f'{file}:a.c', other)


def test_a_net_beside_others_without_a_key_has_the_rest_named(net, other, file):
    torch.save(net.state_dict() | {'more': other.state_dict()}, file)
    assert 'several nets ((top level), more): choose one by FILE:KEY, such as FILE:more' in refusal(
        file
    )


def test_the_published_codes_student_is_taken_from_beside_its_teacher(net, other, file, capsys):
    both = named('student.', net.state_dict()) | named('teacher.', other.state_dict())
    torch.save({'params': both, 'optimizer': {}, 'epoch': 3}, file)
    assert_loads(file, net)
    line = f'{file}: took params.student; left out params.teacher\n'
    assert capsys.readouterr().err == line
    assert_loads(f'{file}:params.teacher', other)
    torch.save({'params': both | a_vector()}, file)
    assert '1 unknown entries besides' in refusal(file) and 'mask' in refusal(file)


def test_a_key_of_a_runs_weights_does_not_get_the_runs_log(net, tmp_path):
    file = make_run(tmp_path / 'run') / 'model.pt7'
    _, student, records = weights.load_net(file.parent)
    both = named('student.', student) | named('teacher.', net.state_dict())
    torch.save({'params': both}, file)
    (file.parent / 'model.hkl').unlink()
    assert weights.load_net(file).records == records != []
    assert_loads(f'{file}:params.teacher', net)


def test_one_net_under_two_keys_is_one(net, file):
    state = net.state_dict()
    torch.save({'model': state, 'best': state}, file)
    assert_loads(file, net)


def test_an_existing_path_wins_over_a_key(net, other, file):
    torch.save({'a': net.state_dict()}, file)
    torch.save(other.state_dict(), f'{file}:a')
    assert_loads(f'{file}:a', other)


@pytest.mark.parametrize('key', ['nope', 'model.nope', 'epoch', 'mod', 'model.layer', '0'])
def test_an_unknown_key_lists_the_keys(key, net, file):
    torch.save({'model': net.state_dict(), 'epoch': 3}, file)
    has = 'conv1.weight, bn1.weight' if key.startswith('model.') else 'model, epoch'
    message = refusal(f'{file}:{key}')
    assert f"has no part '{key}' of tensors; it has {has}" in message
    torch.save([torch.ones(2)], file)
    assert 'it has 0' in refusal(f'{file}:nope')


def test_a_key_of_a_missing_file_or_of_a_folder_is_refused(tmp_path):
    for source in f'{tmp_path}/no.pth:model', f'{tmp_path}:model':
        assert 'no such run folder or weights file' in refusal(source)


# ------------------------ what is printed


@pytest.mark.parametrize(
    'content, line',
    [
        (lambda s: s, ''),
        (lambda s: {'a': {'b': named('c.', s)}}, 'took a.b.c'),
        (lambda s: named('module._orig_mod.', s), 'removed _orig_mod, module from the names'),
        (
            lambda s: {'model': named('module.', s)},
            'took model; removed module from the names',
        ),
    ],
)
def test_one_line_says_what_was_unwrapped(content, line, net, file, capsys):
    torch.save(content(net.state_dict()), file)
    weights.load_net(file)
    weights.load_net(file)
    assert capsys.readouterr().err == (f'{file}: {line}\n' if line else '')


def test_control_characters_of_a_file_are_escaped(net, other, file, capsys):
    bad = 'a\x1b[31m\u202e\nb'
    state = net.state_dict()
    torch.save({bad: state}, file)
    weights.load_net(file)
    messages = [capsys.readouterr().err.rstrip('\n'), refusal(f'{file}:{bad}.x')]
    several = {bad: state, 'b': other.state_dict()}
    for content in several, state | a_vector(bad), {bad: {}}, {bad: 1}, {bad: several}:
        torch.save(content, file)
        messages += [refusal(file), refusal(f'{file}:{bad}x')]
    torch.save({'state_dict': named('model.', state) | a_vector(bad)}, file)
    messages.append(refusal(file))
    for message in messages:
        assert r'\x1b[31m\u202e' in message and re.search(r'[\x00-\x1f\u202e]', message) is None


# ------------------------ what is not understood


@pytest.mark.parametrize('name', ['mask', 'loss.weight', 'layer1.0.se.weight', 'criterion'])
@pytest.mark.parametrize('prefix', ['', 'net.'])
def test_an_unknown_name_is_an_error(prefix, name, net, file):
    torch.save({'model': named(prefix, net.state_dict() | a_vector(name))}, file)
    assert name in refusal(file)


def test_an_unknown_name_beside_the_net_is_an_error_until_the_net_is_named(net, file):
    torch.save({'model': named('net.', net.state_dict()) | a_vector('loss.weight')}, file)
    message = refusal(file)
    assert '(loss.weight)' in message and message.endswith('give FILE:model.net')
    assert_loads(f'{file}:model.net', net)


def test_a_name_with_and_without_a_wrapper_is_an_error(net, file):
    torch.save(net.state_dict() | named('module.', net.state_dict()), file)
    assert "two parameters 'conv1.weight'" in refusal(file)


@pytest.mark.parametrize('value', [None, 3, 'text', [torch.ones(3)], {}])
def test_an_entry_that_is_no_tensor_is_an_error(value, net, file):
    torch.save(net.state_dict() | {'bn1.bias': value}, file)
    assert "'bn1.bias' is" in refusal(file)


def test_a_file_with_loops_and_repeats_is_refused(file):
    loop = {}
    loop['model'] = [loop]
    for content in loop, {'model': loop}, [[[a_vector('layer1.0.conv1.weight')] * 900] * 900] * 900:
        torch.save(content, file)
        refusal(file)


def test_a_file_without_a_net_in_its_usual_places_lists_its_keys(file):
    torch.save({'a': {'b': {'w': torch.ones(2)}}, 'c': {'w': torch.ones(2)}, 'epoch': 3}, file)
    weights.load_params(f'{file}:a.b')
    torch.save({'a': {'b': 3}, 'c': {'d': [torch.ones(2)]}}, file)
    assert 'its keys: a, c. Choose a dict of tensors with FILE:KEY' in refusal(file)


def resnet_of_cifar(blocks):
    """The state dict of a ResNet of three groups for 32x32 images."""
    net = NarrowResNet(blocks=(*blocks, 1))
    net.conv1 = nn.Conv2d(3, 64, 3, bias=False)
    return {k: v for k, v in net.state_dict().items() if not k.startswith('layer4')}


def vgg(prefix):
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    return named(prefix, layers.state_dict()) | {f'{prefix}classifier.weight': torch.ones(3, 8)}


def resnext():
    net = ResNet(Bottleneck, [3, 4, 6, 3], 3, groups=2, width_per_group=4)
    return net.state_dict()


UNKNOWN = {
    'resnet8x4': (lambda: resnet_of_cifar((1, 1, 1)), 'conv1.weight, bn1.weight'),
    'ResNet-20': (lambda: resnet_of_cifar((3, 3, 3)), 'conv1.weight, bn1.weight'),
    'ResNeXt': (resnext, r'layer\d\.\d\.conv2\.weight has shape'),
    'VGG': (lambda: vgg('block0.'), r'block0\.0\.bias'),
    'VGG in a module': (lambda: vgg('model.features.'), r'model\.features\.0\.bias'),
    "timm's resnet18d": (
        lambda: named('', NarrowResNet().state_dict()) | a_vector('conv1.0.weight'),
        r'conv1\.0\.weight',
    ),
    "kuangliu's ResNet-18": (
        lambda: {k.replace('down', 'sh'): v for k, v in NarrowResNet().state_dict().items()},
        r'layer1\.0\.shsample\.0\.weight',
    ),
    'a block is missing': (
        lambda: {k: v for k, v in NarrowResNet().state_dict().items() if 'layer2.0' not in k},
        'layer2 lacks blocks',
    ),
    'a WRN of two groups': (
        lambda: {k: v for k, v in WideResNet(10, 1).state_dict().items() if 'block3' not in k},
        r'block1\.layer\.0\.bn1\.weight',
    ),
    'a WRN with another block': (
        lambda: WideResNet(10, 1).state_dict() | a_vector('block2.layer.0.bn3.weight'),
        r'block2\.layer\.0\.bn3\.weight',
    ),
    'a WRN without a norm': (
        lambda: {k: v for k, v in WideResNet(10, 1).state_dict().items() if k != 'bn1.bias'},
        r'missing \(bn1\.bias\)',
    ),
}


@pytest.mark.parametrize('state, named_by', UNKNOWN.values(), ids=UNKNOWN)
def test_other_nets_are_refused_by_the_names_of_the_file(state, named_by, file):
    state = state()
    for content in state, {'trained': state}:
        torch.save(content, file)
        message = refusal(file)
        assert re.search(named_by, message) and 'examples/' in message
        assert not re.search(r'\bgroup\d|\bconv0|\bbn0|\bbn\.|convdim', message)


# ------------------------ without a head


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.encoder.'])
def test_a_net_without_a_head_loads(prefix, net, file):
    state = {k: v for k, v in net.state_dict().items() if not k.startswith('fc.')}
    torch.save({'state_dict': named(prefix, state)}, file)
    f, params, _ = weights.load_net(file)
    assert params.keys() == from_torchvision(state).keys()
    logits, groups = f(randn(2, 3, 64, 64), params, False)
    assert logits is None and [g.shape[1] for g in groups] == [8, 16, 32, 64]


# ------------------------ Wide ResNets of RepDistiller and mdistiller


class WideBlock(nn.Module):
    """Pre-activation block. The shortcut's convolution follows the first ReLU."""

    def __init__(self, ni, no, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(ni), nn.Conv2d(ni, no, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(no), nn.Conv2d(no, no, 3, 1, 1, bias=False)
        self.convShortcut = None if ni == no else nn.Conv2d(ni, no, 1, stride, bias=False)

    def forward(self, x):
        o = self.bn1(x).relu()
        y = self.conv2(self.bn2(self.conv1(o)).relu())
        return y + (x if self.convShortcut is None else self.convShortcut(o))


class WideGroup(nn.Module):
    def __init__(self, ni, no, stride, n):
        super().__init__()
        blocks = [WideBlock(no if i else ni, no, 1 if i else stride) for i in range(n)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, depth, width, num_classes=5):
        super().__init__()
        n, widths = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = WideGroup(widths[0], widths[1], 1, n)
        self.block2 = WideGroup(widths[1], widths[2], 2, n)
        self.block3 = WideGroup(widths[2], widths[3], 2, n)
        self.bn1, self.fc = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], num_classes)

    def forward(self, x):
        g0 = self.block1(self.conv1(x))
        g1 = self.block2(g0)
        g2 = self.block3(g1)
        o = F.avg_pool2d(self.bn1(g2).relu(), 8)
        return self.fc(o.flatten(1)), (g0, g1, g2)


@pytest.mark.parametrize('depth', [10, 16, 40])
@pytest.mark.parametrize('width', [1, 2])
def test_wide_resnets_of_repdistiller_and_mdistiller_load(width, depth, file, capsys):
    torch.manual_seed(depth)
    net = randomize(WideResNet(depth, width)).eval()
    state = net.state_dict()
    assert ('block1.layer.0.convShortcut.weight' in state) == (width > 1)
    torch.save({'epoch': 240, 'model': state, 'best_acc': 75.5}, file)
    f, params, _ = weights.load_net(file)
    x = randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, expected_groups = net(x)
        logits, groups = f(x, params, False)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for g, e in zip(groups, expected_groups, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
    assert weights.stated_accuracy(file) == 75.5
    assert "CIFAR-100's mean and std" in capsys.readouterr().err


# ------------------------ stated accuracies


@pytest.mark.parametrize(
    'content, accuracy',
    [
        ({'best_acc1': 69.5}, 69.5),
        ({'acc': 95}, 95),
        ({'best_acc': 0.695}, 69.5),
        ({'best_acc1': torch.tensor([69.5])}, 69.5),
        ({'best_acc1': torch.tensor(69.5, dtype=torch.float64)}, 69.5),
        ({'best_acc1': np.float64(69.5)}, 69.5),
        ({'best_acc': np.float32(0.5)}, 50),
        ({'best_value': 0.5}, None),  # it may be a loss
        ({'metric': 0.7}, None),
        ({'metric': 69.5, 'epoch': 3}, 69.5),
        ({'epoch': 3}, None),
        ({'acc': float('nan')}, None),
        ({'acc': -3.0}, None),
        ({'acc': 1e9}, None),
        ({'acc': 10**400}, None),
        ({'acc': 0}, None),
        ({'acc': True}, None),
        ({'acc': 'high'}, None),
        ({'acc': [95.0]}, None),
        ({'acc': torch.ones(2)}, None),
        ({'acc': torch.tensor(float('nan'))}, None),
        ({'acc': None}, None),
        ([95.0], None),
    ],
)
def test_the_stated_accuracy_is_read_in_per_cent(content, accuracy, net, file):
    torch.save(content, file)
    assert weights.stated_accuracy(file) == pytest.approx(accuracy)
    assert weights.stated_accuracy(f'{file}:a.key') == pytest.approx(accuracy)
