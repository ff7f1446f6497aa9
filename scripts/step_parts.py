"""What a training step consists of. benchmark.py prints it.

The bound of its speed is its convolutions and matrix products, recorded and replayed alone. The
profile is the share of its time for each kind of operation.
"""

import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.devices import Graphed

CONVOLUTIONS = ('aten.convolution', 'aten.convolution_backward')
PRODUCTS = ('aten.mm', 'aten.addmm')


# ------------------------ the bound


class Recorder(TorchDispatchMode):
    """Keeps the calls, with arguments, of convolutions and matrix products, both ways."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func.overloadpacket) in CONVOLUTIONS + PRODUCTS:
            kept = [v.detach() if torch.is_tensor(v) else v for v in args]
            self.calls.append((func, kept, kwargs or {}))
        return func(*args, **(kwargs or {}))


def record(run) -> list:
    """[(operator, args, kwargs)] of one eager step; run(steps) trains."""
    with Recorder() as recorder:
        run(1)
    return recorder.calls


def make_replay(calls: list, keep: bool = False):
    """run(steps) of only the recorded calls, each on the very tensors that the step gave it.

    keep: hold the output of a trained convolution until its backward call, as training must. It
    then takes fresh memory, which is not in the cache.
    """
    names = [name(call) for call in calls]
    ends = {weight(c): i for i, c in enumerate(calls) if names[i] == 'aten.convolution_backward'}
    # For each call, the one that still needs its output; None if no call does.
    needed = [
        ends.get(weight(c)) if keep and names[i] == 'aten.convolution' else None
        for i, c in enumerate(calls)
    ]

    @torch.no_grad()
    def replay():
        kept = {}
        for i, (func, args, kwargs) in enumerate(calls):
            output = func(*args, **kwargs)
            if needed[i] is not None:
                kept[needed[i]] = output
            kept.pop(i, None)
        return args[0]  # Graphed wants a tensor

    # Without a CUDA graph, a GPU would wait for Python.
    replay = Graphed(replay) if calls[0][1][0].is_cuda else replay

    def run(steps):
        for _ in range(steps):
            replay()

    return run


def name(call) -> str:
    """The operator of a recorded call, such as 'aten.convolution'."""
    return str(call[0].overloadpacket)


def weight(call) -> int:
    """The address of a convolution's weight, which its forward and backward calls share."""
    _, args, _ = call
    return args[2 if name(call) == 'aten.convolution_backward' else 1].data_ptr()


# ------------------------ the profile


def profile(run, steps: int, device: str) -> dict:
    """{group: share of the time} of `steps` steps, by the profiler.

    A compiled kernel is named after the operators that were fused into it.
    """
    shares = defaultdict(float)
    Activity = torch.profiler.ProfilerActivity
    activities = [Activity.CPU, Activity.CUDA] if device == 'cuda' else [Activity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        run(steps)
    for event in profiler.key_averages():
        if device != 'cuda':
            shares[group_of(event.key)] += event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            shares[group_of(event.key)] += event.self_device_time_total
    total = sum(shares.values())
    return {k: v / total for k, v in sorted(shares.items(), key=lambda item: -item[1])}


def group_of(name: str) -> str:
    """The group of an operator, a compiled kernel or a GPU kernel, by its name."""
    name = name.lower()

    def has(*words):
        return any(word in name for word in words)

    fused, operator = has('fused'), name.startswith('aten::')
    crops = fused and has('arange') and has('index')
    groups = {
        'data': crops or name in ('aten::index', 'aten::random_'),
        'compiled, backward': fused and has('backward', 'sgn'),
        'compiled, forward': fused,
        'convolutions': has('conv', 'wgrad', 'dgrad', 'fprop', 'implicit_gemm'),
        'matrix products': has('gemm') or name in ('aten::mm', 'aten::addmm'),
        'batch norm': has('batch_norm', 'batchnorm'),
        'optimizer': has('optimizer', '_foreach', 'multi_tensor'),
        'other pointwise and reductions': operator or has('elementwise', 'reduce'),
    }
    return next((group for group, belongs in groups.items() if belongs), 'rest (Python, launching)')
