"""scripts/convert.py: our files, torchvision's, folded ones and ONNX graphs have equal logits."""

import json
import sys
import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

import data
import nin
import resnet
from samples import AffineNet, fold, from_torchvision, make_run, refused
from support import files, logs, weights
from support.program import UserError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'scripts'))
import convert


def run(*argv):
    convert.main([str(a) for a in argv])
    return Path(argv[1])


@torch.no_grad()
def randomize(params):
    """Batch norms that do something: a fold or a graph that leaves one out has other logits."""
    for name, value in params.items():
        if 'bn' in name:
            value.uniform_(0.5, 1.5) if name.endswith(('weight', 'var')) else value.normal_(0, 0.3)


@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    """{kind: its file or run folder}, and {'net18', 'net50': torchvision's module with those
    values}."""
    folder = tmp_path_factory.mktemp('nets')
    torch.manual_seed(0)
    found = {'wrn': make_run(folder / 'wrn')}
    params = weights.load_params(found['wrn'] / 'model.hkl')
    randomize(params)
    weights.save_params(found['wrn'] / 'model.hkl', params)
    # Of ResNet-50 an eighth of the inner channels: the same names, a fifth of the time.
    for depth, narrow in (18, {}), (50, {'width_per_group': 8}):
        net = getattr(torchvision.models, f'resnet{depth}')(num_classes=7, **narrow).eval()
        ours = from_torchvision(net.state_dict())
        randomize(ours)
        for name, value in net.named_buffers():
            if name.endswith('num_batches_tracked'):
                value.fill_(7)
        found[f'net{depth}'], found[f'resnet{depth}'] = net, folder / f'resnet{depth}.pth'
        torch.save(net.state_dict(), found[f'resnet{depth}'])
        found[f'folded{depth}'] = folder / f'folded{depth}.hkl'
        weights.save_params(found[f'folded{depth}'], fold(ours))
    params = nin.nin(8, 7)[1]
    randomize(params)
    found['nin'] = folder / 'nin.hkl'
    weights.save_params(found['nin'], params)
    found['affine'] = folder / 'affine.hkl'
    weights.save_params(found['affine'], AffineNet((64, 64, 16, 24, 32)).p)
    return found


def logits(f, params, x):
    with torch.no_grad():
        return f(x, params, False)[0]


def assert_same(found, expected):
    assert found.shape == expected.shape and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


# ------------------------ our files and torchvision's


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('depth', [18, 50])
def test_torchvisions_file_to_ours_and_back_is_the_identity(nets, depth, suffix, tmp_path, capsys):
    ours = run(nets[f'resnet{depth}'], tmp_path / 'new' / 'net.hkl')
    back = run(ours, tmp_path / f'net.{suffix}')
    assert f'wrote {back}: resnet of depth {depth}' in capsys.readouterr().out
    read = safetensors.torch.load_file if suffix == 'safetensors' else torch.load
    state, expected = read(back), nets[f'net{depth}'].state_dict()
    assert state.keys() == expected.keys()
    if suffix == 'pth':
        assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and state[name].shape == value.shape, name
        counter = name.endswith('num_batches_tracked')
        assert torch.equal(state[name], torch.tensor(0) if counter else value), name
    nets[f'net{depth}'].load_state_dict(state)


@pytest.mark.parametrize('depth', [18, 50])
def test_ours_and_folded_have_torchvisions_logits(nets, depth, tmp_path):
    ours = run(nets[f'resnet{depth}'], tmp_path / 'ours.hkl')
    folded = run(ours, tmp_path / 'folded.hkl', '--fold')
    for file, layout in (ours, 'resnet'), (folded, 'folded'):
        f, params, _ = weights.load_net(file)
        assert resnet.layout(params) == layout
        for n in 1, 3:
            x = torch.randn(n, 3, 64, 48)
            with torch.no_grad():
                assert_same(logits(f, params, x), nets[f'net{depth}'](x))
    assert params.keys() == weights.load_params(nets[f'folded{depth}']).keys()


def test_fold_is_computed_in_float64(nets, tmp_path):
    folded = weights.load_params(run(nets['resnet50'], tmp_path / 'folded.hkl', '--fold'))
    expected = weights.load_params(nets['folded50'])
    assert folded.keys() == expected.keys()
    assert all(torch.equal(folded[k], v) for k, v in expected.items())


@pytest.mark.parametrize('kind', ['wrn', 'nin', 'folded50', 'affine'])
def test_what_torchvision_does_not_have_keeps_our_names(nets, kind, tmp_path, capsys):
    _, expected, _ = weights.load_net(nets[kind])
    for name in 'net.pth', 'net.safetensors':
        _, params, _ = weights.load_net(run(nets[kind], tmp_path / name))
        assert 'our names' in capsys.readouterr().out
        assert params.keys() == expected.keys()
        assert all(torch.equal(params[k], v) for k, v in expected.items())


def test_tensors_that_share_memory_are_written_each_by_itself(nets, tmp_path):
    state = torch.load(nets['resnet50'])
    state['layer1.0.bn2.bias'] = state['layer1.0.bn1.bias']
    torch.save(state, tmp_path / 'tied.pth')
    back = safetensors.torch.load_file(run(tmp_path / 'tied.pth', tmp_path / 'net.safetensors'))
    assert torch.equal(back['layer1.0.bn2.bias'], state['layer1.0.bn1.bias'])


# ------------------------ ONNX


def session(file):
    """The graph in onnxruntime: a function of images."""
    import onnxruntime

    found = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    assert [o.name for o in found.get_outputs()] == ['logits']
    return found, lambda images: torch.from_numpy(found.run(None, {'images': images.numpy()})[0])


@pytest.fixture
def onnx():
    import onnx

    return onnx


@pytest.mark.parametrize(
    'kind, size',
    [('wrn', None), ('wrn', 20), ('nin', None), ('resnet18', None), ('affine', 56)]
    + [('resnet50', 40), ('folded18', 40), ('folded50', 40)],
)
def test_onnx_has_the_nets_logits(nets, kind, size, tmp_path, onnx):
    file = run(nets[kind], tmp_path / 'net.onnx', *(['--image_size', size] if size else []))
    assert list(tmp_path.iterdir()) == [file]
    found, graph = session(file)
    side = size or (32 if kind in ('wrn', 'nin') else 224)
    (images,) = found.get_inputs()
    assert (images.name, images.type) == ('images', 'tensor(float)')
    assert images.shape == ['batch', 3, side, side]
    f, params, _ = weights.load_net(nets[kind])
    for n in 1, 3:
        x = torch.randn(n, 3, side, side)
        assert_same(graph(x), logits(f, params, x))


@pytest.mark.parametrize('fold', [(), ('--fold',)], ids=['', 'fold'])
def test_onnx_is_torchvisions_model_without_its_batch_norms(nets, fold, tmp_path, onnx):
    file = run(nets['resnet50'], tmp_path / 'net.onnx', '--image_size', 64, *fold)
    nodes = {node.op_type for node in onnx.load(file).graph.node}
    assert 'Conv' in nodes and 'BatchNormalization' not in nodes
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert_same(session(file)[1](x), nets['net50'](x))


@pytest.mark.parametrize('kind', ['wrn', 'nin', 'resnet18', 'affine'])
def test_onnx_normalizes_as_in_training(nets, kind, tmp_path, onnx):
    file = run(nets[kind], tmp_path / 'net.onnx', '--normalize', '--image_size', 32)
    found, graph = session(file)
    assert found.get_inputs()[0].type == 'tensor(uint8)'
    # Channels of different brightness: to swap them, or their mean, would show.
    levels = torch.tensor([60, 128, 250])
    images = (torch.rand(3, 32, 32, 3) * levels).byte()
    small = kind in ('wrn', 'nin')
    scale = (data.MEAN, data.STD) if small else (data.IMAGENET_MEAN, data.IMAGENET_STD)
    f, params, _ = weights.load_net(nets[kind])
    expected = logits(f, params, data.normalize(images, *scale))
    assert_same(graph(images.permute(0, 3, 1, 2).contiguous()), expected)


def test_onnx_of_a_run_has_its_classes_and_its_size(nets, tmp_path, onnx, capsys):
    model = onnx.load(run(nets['wrn'], tmp_path / 'net.onnx'))
    metadata = {p.key: p.value for p in model.metadata_props}
    assert metadata == {'layout': 'wrn', 'classes': json.dumps(data.SHAPES)}
    folder = tmp_path / 'run'
    folder.mkdir()
    weights.save_params(folder / 'model.hkl', resnet.resnet(18, 0.125, 2)[1])
    record = {'depth': 18, 'width': 0.125, 'image_size': 48, 'classes': ['cat', 'dog']}
    files.write_text(folder / 'log.txt', f'{logs.json_stats(record)}\n')
    found, _ = session(run(folder, tmp_path / 'small.onnx'))
    assert found.get_inputs()[0].shape == ['batch', 3, 48, 48]
    metadata = found.get_modelmeta().custom_metadata_map
    assert metadata == {'layout': 'folded', 'classes': '["cat", "dog"]'}
    files.write_text(folder / 'log.txt', f'{logs.json_stats(record | {"image_size": "x"})}\n')
    assert '--image_size' in refused(convert.main, [folder, tmp_path / 'odd.onnx'], capsys)


# ------------------------ refusals


def test_an_existing_file_is_replaced_only_by_force(nets, tmp_path, capsys):
    out = tmp_path / 'net.hkl'
    out.write_text('old')
    assert '--force' in refused(convert.main, [nets['wrn'], out], capsys)
    assert out.read_text() == 'old'
    run(nets['wrn'], out, '--force')
    weights.load_net(out)
    # A net may be replaced by itself, folded.
    again = run(nets['resnet50'], tmp_path / 'self.hkl')
    run(again, again, '--fold', '--force')
    assert resnet.layout(weights.load_params(again)) == 'folded'


def test_mistakes_are_one_line_and_write_nothing(nets, tmp_path, capsys, monkeypatch):
    (tmp_path / 'folder.hkl').mkdir()
    (tmp_path / 'damaged.pth').write_bytes(b'no weights')
    before = sorted(tmp_path.rglob('*'))
    hkl, onnx = tmp_path / 'out.hkl', tmp_path / 'out.onnx'

    def no(*argv):
        return refused(convert.main, argv, capsys)

    assert '.onnx' in no(nets['wrn'], tmp_path / 'out.tflite')
    assert 'folder' in no(nets['wrn'], tmp_path / 'folder.hkl', '--force')
    assert 'not a folder' in no(nets['wrn'], tmp_path / 'damaged.pth' / 'out.hkl')
    assert '--normalize' in no(nets['wrn'], hkl, '--normalize')
    assert '--image_size' in no(nets['wrn'], hkl, '--image_size', 32)
    assert '--image_size' in no(nets['wrn'], onnx, '--image_size', 0)
    for kind in 'wrn', 'nin', 'folded50', 'affine':
        error = no(nets[kind], hkl, '--fold')
        assert '--fold' in error and str(nets[kind]) in error
    assert 'damaged.pth' in no(tmp_path / 'damaged.pth', hkl)
    assert 'wide_resnet50_2' in no('resnet35', hkl)
    assert 'OUT' in no(nets['wrn'])
    monkeypatch.setitem(sys.modules, 'onnx', None)  # as if it were not installed
    assert 'pip install onnx' in no(nets['wrn'], onnx)
    assert sorted(tmp_path.rglob('*')) == before


def test_a_net_too_large_for_onnx_is_refused():
    with pytest.raises(UserError, match='2 GiB'):
        convert.export(None, {'conv0': torch.empty(2**29, device='meta')}, 32, None, None, {})


# ------------------------ torchvision's weights by name


def test_without_network_one_line_says_where_the_weights_are(tmp_path, capsys, monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError('no network')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(torch.hub, 'urlopen', urlopen)
    error = refused(convert.main, ['resnet34', tmp_path / 'net.hkl'], capsys)
    assert 'no network' in error and 'https://' in error and 'resnet34-' in error
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_torchvisions_weights_are_fetched_once_and_checked(nets, tmp_path, monkeypatch):
    asked = []

    def download(url, file, crc, progress):
        asked.append(url)
        assert len(crc) == 8 and f'-{crc}.pth' in url
        Path(file).write_bytes(nets['resnet50'].read_bytes())

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    for name in 'a.hkl', 'b.hkl':
        params = weights.load_params(run('resnet50', tmp_path / name))
    assert asked == [torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url]
    expected = weights.load_params(nets['resnet50'])
    assert all(torch.equal(params[k], v) for k, v in expected.items())
    # torchvision finds the same file, and every name is a model of its own.
    assert torchvision.models.ResNet50_Weights.IMAGENET1K_V1.get_state_dict().keys()
    assert all(torchvision.models.get_model_weights(m).IMAGENET1K_V1 for m in convert.MODELS)


def test_a_net_without_a_head_becomes_weights_and_no_graph(nets, tmp_path, capsys):
    params = weights.load_params(nets['resnet18'])
    headless = {k: v for k, v in params.items() if not k.startswith('fc.')}
    weights.save_params(tmp_path / 'headless.hkl', headless)
    out = run(tmp_path / 'headless.hkl', tmp_path / 'headless.pth')
    found = weights.load_params(out)
    assert found.keys() == headless.keys()
    assert all(torch.equal(found[k], v) for k, v in headless.items())
    error = refused(convert.main, [tmp_path / 'headless.hkl', tmp_path / 'net.onnx'], capsys)
    assert 'has no head' in error and not (tmp_path / 'net.onnx').exists()
