"""support/devices.py: warnings, and what a net costs."""

import platform
import re
import types
from pathlib import Path

import pytest
import torch

import resnet
from support import devices


@pytest.mark.skipif(
    platform.system() != 'Linux' or platform.machine() != 'x86_64', reason='reads /proc/cpuinfo'
)
def test_bfloat16_is_warned_of_where_the_processor_is_slow_at_it(capsys):
    flags = set(
        re.search(r'^flags\s*:(.*)', Path('/proc/cpuinfo').read_text(), re.MULTILINE)[1].split()
    )
    cpu = torch.device('cpu')
    devices.warn_of_slow_dtype('float', cpu)
    assert capsys.readouterr().err == ''
    devices.warn_of_slow_dtype('bfloat16', cpu)
    warned = '--dtype float' in capsys.readouterr().err
    assert warned != ({'avx512bw', 'avx512vl', 'avx512dq'} <= flags)


@pytest.mark.parametrize('supported', [True, False])
def test_the_warning_of_bfloat16_goes_by_what_the_processor_has(monkeypatch, capsys, supported):
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: True)
    operators = types.SimpleNamespace(_is_mkldnn_bf16_supported=lambda: supported)
    monkeypatch.setattr(torch.ops, 'mkldnn', operators)
    devices.warn_of_slow_dtype('bfloat16', torch.device('cpu'))
    assert capsys.readouterr().err.count('\n') == (not supported)


@pytest.mark.parametrize('supported', [True, False])
def test_a_gpu_that_emulates_bfloat16_is_warned_of(monkeypatch, capsys, supported):
    def is_supported(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_supported)
    devices.warn_of_slow_dtype('float', torch.device('cuda'))
    assert capsys.readouterr().err == ''
    devices.warn_of_slow_dtype('bfloat16', torch.device('cuda'))
    assert ('this GPU has no instructions for it' in capsys.readouterr().err) == (not supported)


def test_multiply_adds_are_those_of_convolutions_and_the_linear_layer():
    f, params = resnet.wrn(10, 1, 10)
    # per output position: in * out * k * k
    by_hand = 32 * 32 * (3 * 16 * 9 + 2 * 16 * 16 * 9)
    by_hand += (
        16 * 16 * (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32)
        + 8 * 8 * (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64)
        + 640
    )
    assert devices.multiply_adds(f, params, (32, 32), 'cpu') == by_hand


def test_float32_convolutions_do_not_use_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    opt = types.SimpleNamespace(cuda=False, device='cpu', gpu_id=None, ngpu=1, nthread=0)
    opt.compile = opt.deterministic = False
    assert devices.choose_device(opt)[0].type == 'cpu'
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_each_size_of_a_batch_has_a_graph_of_its_own(monkeypatch):
    """So a resumed run runs the same graphs, whichever size it meets first."""
    shapes, compile = [], torch.compile

    def record(graph, inputs):
        shapes.append([tuple(v.shape) if torch.is_tensor(v) else v for v in inputs])
        return graph.forward

    monkeypatch.setattr(devices, 'compiler_works', lambda device: True)
    monkeypatch.setattr(torch, 'compile', lambda f, **more: compile(f, backend=record, **more))
    double = devices.compiled(lambda x: 2 * x, torch.device('cpu'))
    for n in 8, 5, 8, 3:
        assert double(torch.ones(n, 2)).sum() == 4 * n
    assert shapes == [[(8, 2)], [(5, 2)], [(3, 2)]]
