"""Device choice, compilation, CUDA graphs, memory settings, and the cost of a net."""

import contextlib
import ctypes
import logging
import os
import platform
import re
import sys
import warnings
from pathlib import Path

import torch

from support.program import UserError


def choose_device(opt) -> tuple[torch.device, list]:
    """(device, device_ids for data_parallel) of --device, --cuda, --gpu_id and --ngpu.

    Also applies --nthread and --deterministic to torch. Raises UserError if a device is missing.
    """
    if opt.cuda and opt.device not in ('auto', 'cuda'):
        raise UserError(f'--cuda contradicts --device {opt.device}')
    if opt.gpu_id:
        os.environ['CUDA_VISIBLE_DEVICES'] = opt.gpu_id
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    default = 'cuda' if opt.cuda or n_gpus else 'cpu'
    name = default if opt.device == 'auto' else opt.device
    if opt.gpu_id and not n_gpus and (name == 'cuda' or opt.device == 'auto'):
        raise UserError(
            f'--gpu_id {opt.gpu_id}: no such CUDA device: use --device cpu to run on the CPU'
        )
    if name == 'cuda' and not n_gpus:
        raise UserError(
            '--device cuda: no CUDA device found: leave the option out to run on the CPU'
        )
    if name == 'mps' and not torch.backends.mps.is_available():
        raise UserError(
            '--device mps: no such device found: leave the option out to run on the CPU'
        )
    if opt.ngpu > max(1, n_gpus) or opt.ngpu > 1 and name != 'cuda':
        but = f', and --device is {name}' if n_gpus else ''
        raise UserError(f'--ngpu {opt.ngpu}: only {n_gpus} GPUs are available{but}')
    if opt.ngpu > 1 and opt.compile:
        raise UserError('--compile works on one device; leave it out with --ngpu above 1')
    if opt.nthread:
        torch.set_num_threads(opt.nthread)
    if opt.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not opt.deterministic
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32; bfloat16 is the fast way
    return torch.device(name), list(range(opt.ngpu)) if name == 'cuda' else [torch.device(name)]


def processor() -> str:
    """The processor's name and its instructions for vectors and matrices, for the log."""
    name, features = platform.processor() or platform.machine(), []
    with contextlib.suppress(OSError):
        cpuinfo = Path('/proc/cpuinfo').read_text()
        found = re.search('^model name\\s*: (.*)', cpuinfo, re.MULTILINE)
        name = found[1] if found else name
        words = set(cpuinfo.split())
        features = [feature for flag, feature in FEATURES.items() if flag in words]
    return f'{name} ({", ".join(features) or torch.backends.cpu.get_cpu_capability()})'


# The flags of Linux, and what they are called. bfloat16 is fast with one of the first two.
FEATURES = {
    'amx_bf16': 'AMX',
    'avx512_bf16': 'AVX-512 bfloat16',
    'avx512f': 'AVX-512',
    'avx2': 'AVX2',
}


def device_name(device: torch.device) -> str:
    """What trains: the GPU's name, or 'cpu' or 'mps'."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step; other C libraries are left alone.

    Otherwise glibc returns freed activations to the kernel, which zeroes the pages again in the
    next step: about 20 % of a CPU step.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def to_device(params: dict, device) -> dict:
    """Parameters on the device, with convolution weights in channels_last memory, which is
    faster."""

    def place(v):
        layout = torch.channels_last if v.dim() == 4 else torch.contiguous_format
        return v.detach().to(device, memory_format=layout).requires_grad_(v.requires_grad)

    return {k: place(v) for k, v in params.items()}


def compiler_works(device) -> bool:
    """Whether torch.compile can compile for the device. If not, print one line that says why."""
    # It warns about CUDA even for the CPU.
    logging.getLogger('torch.utils.cpp_extension').setLevel(logging.ERROR)
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(4096, device=device))
    except torch._dynamo.exc.TorchDynamoException as e:
        reason = ' '.join(str(e).split())[:200]
        warning = f'warning: no working compiler found; continuing without --compile ({reason})'
        print(warning, file=sys.stderr)
        return False
    return True


COMPILING = 'compiling the step: the first one takes a minute or two, less when run again'


def compiled(f, device):
    """f compiled for the device, or f itself if no compiler works here."""
    if not compiler_works(device):
        return f
    # On a GPU it advises to compute float32 in TF32.
    warnings.filterwarnings('ignore', 'TensorFloat32 tensor cores')
    # One graph for each batch shape, so that a resumed run runs the same graphs.
    return torch.compile(f, dynamic=False)


class Graphed:
    """step(*tensors) -> tensor on a GPU, replayed as a CUDA graph: the same kernels on the same
    memory, launched at once. A small net's step is hundreds of kernels, and Python takes longer to
    launch them than the GPU to run them.

    The first calls run normally, then one is captured. Inputs of another shape run normally too.
    Other tensors must keep their addresses. Python numbers (such as the learning rate) are frozen
    at capture. The graph owns a private memory pool, so other shapes need memory beside it.
    """

    WARM_UP = 3  # calls that compile and choose kernels and create the momentum
    stream = None  # shared by all calls, because backward runs on the stream of its forward

    def __init__(self, step):
        self.step, self.inputs, self.graph, self.calls = step, None, None, 0
        Graphed.stream = Graphed.stream or torch.cuda.Stream()

    def __call__(self, *inputs):
        if self.inputs is None:
            self.inputs = [v.clone() for v in inputs]
        if [v.shape for v in inputs] != [v.shape for v in self.inputs]:
            return self._run(inputs)
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self._run(inputs)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.output = self.step(*self.inputs)
        for kept, v in zip(self.inputs, inputs):
            kept.copy_(v)
        self.graph.replay()
        return self.output.clone()

    def _run(self, inputs):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output


def warn_of_slow_dtype(dtype: str, device) -> None:
    """Warn if --dtype bfloat16 is slow: a processor or GPU without instructions for it converts
    each number back and forth."""
    slow = False
    if device.type == 'cpu' and torch.backends.mkldnn.is_available():
        slow = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif device.type == 'cuda':
        slow = not torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == 'bfloat16' and slow:
        print(
            f'warning: --dtype bfloat16: this {"GPU" if device.type == "cuda" else "processor"} '
            'has no instructions for it; --dtype float is many times faster',
            file=sys.stderr,
        )


def multiply_adds(f, params: dict, size, device) -> int:
    """Multiply-adds of the convolutions and matrix products for one image (height, width)."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        f(torch.zeros(1, 3, *size, device=device), params, False)
    return counter.get_total_flops() // 2
