"""Speed and memory of the attention-transfer step, WRN-16-2 to WRN-16-1, data included, beside the
loop of 2018 and the bound.

    python scripts/benchmark.py                          # all six
    python scripts/benchmark.py --only a,d,e             # some of them
    python scripts/benchmark.py --profile --only c,d     # and where a compiled step spends its time
    python scripts/benchmark.py --decode                 # reading a folder of 50,000 small images
    python scripts/benchmark.py --input DIR              # decoding and cropping by imagenet.py
    python scripts/benchmark.py --memory --imagenetpath DIR     # of imagenet.py, after each epoch

    a  the loop as published in 2018: float32, contiguous tensors, eager; images pass one by one
       through torchvision in two loader workers; every step reads its losses back
    b  ours: cifar.train_epoch, float32, eager
    c  the same with --compile
    d  the same with --compile --dtype bfloat16
    e  the bound, in float32 and in bfloat16: the convolutions and matrix products of b's step and
       of its bfloat16 twin, recorded and played back with nothing between them

Each runs in a process of its own and they take turns, so that a machine that slows down slows all
of them. Images are random: none is read from disk. Run it with nothing else on the machine.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cifar
import data
import resnet
import utils
from support import program
from support.devices import Graphed, choose_device, compiler_works, keep_freed_memory, to_device
from support.files import check_writable, write_text
from support.options import Parser, number
from support.photographs import scan_photographs, train_view
from support.program import UserError
from support.weights import save_params

# name: (what it is, dtype, whether it compiles)
VARIANTS = {
    'a': ('as published in 2018', 'float', False),
    'b': ('ours, eager', 'float', False),
    'c': ('ours, compiled', 'float', True),
    'd': ('ours, compiled', 'bfloat16', True),
    'e32': ('bound', 'float', False),
    'e16': ('bound', 'bfloat16', False),
}
TEACHER, STUDENT, BETA = (16, 2), (16, 1), 1e3
CONVOLUTIONS = ('aten.convolution', 'aten.convolution_backward')
PRODUCTS = ('aten.mm', 'aten.addmm')
PHOTOGRAPHS = '--depth 18 --width 0.25 --image_size 112 --beta 1e+3'  # of --memory


def variants(text):
    """An argparse type: 'a,e' -> ['a', 'e32', 'e16']."""
    chosen = [v for name in text.split(',') for v in VARIANTS if name in (v, v[0])]
    if not all(name in {*VARIANTS, 'e'} for name in text.split(',')):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a list of {", ".join(VARIANTS)} (e: both bounds)'
        )
    return list(dict.fromkeys(chosen))


parser = Parser(__doc__)
add = parser.add_argument
add(
    '--rounds',
    default=7,
    type=number(int, 1),
    help='turns of each variant; their median is printed (default: 7)',
)
add('--steps', default=40, type=number(int, 1), help='steps per turn (default: 40)')
add(
    '--batch_size',
    default=128,
    type=number(int, 1),
    help='images per step (paper, default: 128)',
)
add(
    '--images',
    default=50000,
    type=number(int, 1),
    help='images in memory, or to decode (CIFAR, default: 50000)',
)
add(
    '--only',
    default=list(VARIANTS),
    type=variants,
    metavar='LIST',
    help='of a,b,c,d,e, such as a,e (default: all)',
)
add(
    '--nthread',
    default=0,
    type=number(int, 0),
    help='CPU threads of each variant (default: 0, one per core)',
)
add(
    '--device',
    default='auto',
    choices=['auto', 'cpu', 'cuda', 'mps'],
    help='auto: cuda if there is one, else cpu (default: auto)',
)
add('--json', metavar='FILE', help='also write everything measured to FILE')
add('--profile', action='store_true', help='also print where the time of b, c and d goes')
add(
    '--decode',
    action='store_true',
    help='instead: decode --images WebP files of 32x32 pixels, as --dataset folder does',
)
add(
    '--input',
    metavar='DIR',
    help='instead: the input pipeline of imagenet.py on the photographs in DIR, on one core',
)
add(
    '--memory',
    action='store_true',
    help='instead: resident memory of imagenet.py with AT, after each epoch; Linux only',
)
add(
    '--imagenetpath',
    metavar='DIR',
    help='for --memory: the photographs DIR/{train,val}/CLASS/*',
)
add(
    '--epochs',
    default=20,
    type=number(int, 20),
    help='for --memory: epochs to watch, at least 20 (default: 20)',
)
add('--options', default='', help='for --memory: more options of imagenet.py, in one string')


# ------------------------ ours


def cifar_options(opt, dtype):
    """The options of cifar.py for the step that is measured."""
    argv = (
        f'--teacher_id wrn_16_2 --beta {BETA} --alpha 0 --epoch_step [60,120,160] --dtype {dtype} '
        f'--batch_size {opt.batch_size} --nthread {opt.nthread} --device {opt.device}'
    )
    return cifar.parser.parse(argv.split())[0]


def random_set(n):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (n,), generator=generator)
    return data.ImageSet(images, labels, [str(i) for i in range(10)])


def make_nets(device):
    """cifar.Nets of the student and the teacher, with random values."""
    torch.manual_seed(0)
    params, functions = {}, []
    for base, (depth, width) in ('student.', STUDENT), ('teacher.', TEACHER):
        f, p = resnet.wrn(depth, width, 10)
        functions.append(f)
        params |= {base + k: v for k, v in to_device(p, device).items()}
    params = {k: v.detach() if k.startswith('teacher.') else v for k, v in params.items()}
    return cifar.Nets(*functions, params)


def ours(opt, dtype, compiled):
    """run(steps): cifar.train_epoch on so many batches of the set."""
    keep_freed_memory()
    options = cifar_options(opt, dtype)
    device, device_ids = choose_device(options)
    nets = make_nets(device)
    loss_of = cifar.make_loss(nets, options, device_ids)
    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False)
    optimizer = utils.make_optimizer(nets.params, options, epoch=1)
    whole = random_set(opt.images).to(device)
    step = cifar.make_step(loss_of, whole, optimizer, compiled and device.type == 'cuda')

    def run(steps):
        n = steps * options.batch_size
        part = data.ImageSet(whole.images[:n], whole.labels[:n], whole.classes)
        cifar.train_epoch(1, step, part, options)

    return run


# ------------------------ the loop of 2018


def published(opt, dtype, compiled):
    """run(steps) of the published training loop, rewritten from its description."""
    import torchvision.transforms as T
    from PIL import Image

    device, _ = choose_device(cifar_options(opt, dtype))
    params = make_nets(device).params
    params = {k: v.detach().contiguous().requires_grad_(v.requires_grad) for k, v in params.items()}
    trainable = [v for v in params.values() if v.requires_grad]
    optimizer = torch.optim.SGD(trainable, 0.1, momentum=0.9, weight_decay=5e-4)
    images, labels, _ = random_set(opt.images)
    images, labels = images.numpy(), labels.tolist()
    mean, std = ([v / 255 for v in values] for values in (data.MEAN, data.STD))
    transform = T.Compose(
        [
            T.Pad(4, padding_mode='reflect'),
            T.RandomHorizontalFlip(),
            T.RandomCrop(32),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
    )

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(labels)

        def __getitem__(self, i):
            return transform(Image.fromarray(images[i])), labels[i]

    def batch_norm(x, base, training):
        mean, var, weight, bias = (
            params[f'{base}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training), inplace=True)

    def block(x, base, training, stride):
        o1 = batch_norm(x, f'{base}.bn0', training)
        y = F.conv2d(o1, params[f'{base}.conv0'], stride=stride, padding=1)
        z = F.conv2d(batch_norm(y, f'{base}.bn1', training), params[f'{base}.conv1'], padding=1)
        convdim = params.get(f'{base}.convdim')
        return z + (x if convdim is None else F.conv2d(o1, convdim, stride=stride))

    def net(x, base, training):
        x, groups = F.conv2d(x, params[f'{base}conv0'], padding=1), []
        for i in range(3):
            for j in range(2):
                x = block(x, f'{base}group{i}.block{j}', training, 2 if i > 0 and j == 0 else 1)
            groups.append(x)
        o = F.avg_pool2d(batch_norm(x, f'{base}bn', training), 8).view(len(x), -1)
        return F.linear(o, params[f'{base}fc.weight'], params[f'{base}fc.bias']), groups

    def attention(x):
        return F.normalize(x.pow(2).mean(1).view(len(x), -1))

    def batches():
        while True:
            yield from torch.utils.data.DataLoader(
                Images(),
                opt.batch_size,
                shuffle=True,
                num_workers=2,
                multiprocessing_context='fork',
                pin_memory=device.type == 'cuda',
            )

    batch = batches()

    def run(steps):
        for _ in range(steps):
            x, targets = (v.to(device) for v in next(batch))
            logits, groups = net(x, 'student.', True)
            with torch.no_grad():
                _, teacher_groups = net(x, 'teacher.', False)
            at_losses = [
                (attention(s) - attention(t)).pow(2).mean() for s, t in zip(groups, teacher_groups)
            ]
            _ = [v.item() for v in at_losses]
            loss = F.cross_entropy(logits, targets) + BETA * sum(at_losses)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            _ = loss.item(), logits.detach().topk(1)[1].cpu()

    return run


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


def record_step(opt, dtype):
    """The calls of one eager step of ours, as Recorder keeps them."""
    with Recorder() as recorder:
        ours(opt, dtype, compiled=False)(1)
    return recorder.calls


def bound(opt, dtype, compiled):
    """run(steps) of nothing but the calls of one step of ours, each on the very tensors that the
    step gave it."""
    calls = record_step(opt, dtype)

    @torch.no_grad()
    def play():
        for func, args, kwargs in calls:
            func(*args, **kwargs)
        return args[0]  # Graphed wants a tensor

    # Else a GPU would wait for Python.
    play = Graphed(play) if calls[0][1][0].is_cuda else play

    def run(steps):
        for _ in range(steps):
            play()

    return run


def flops(opt, dtype='float'):
    """Floating-point operations of a step's convolutions and matrix products."""
    run = bound(opt, dtype, False)
    with FlopCounterMode(display=False) as counter:
        run(1)
    return counter.get_total_flops()


# ------------------------ where the time goes


def profile(run, steps, device):
    """{group: share of the time} of `steps` steps, by the profiler; a compiled kernel is named by
    what was fused into it."""
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


def group_of(name):
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


# ------------------------ a process for each


def worker(name, opt, pipe):
    """Makes a variant, says so, then runs as many steps as it is told, answering with the seconds
    they took."""
    _, dtype, compiled = VARIANTS[name]
    if compiled and opt.profile:
        # Kernels appear in the profile by name.
        torch._inductor.config.cpp.enable_kernel_profile = True
    build = published if name == 'a' else bound if name[0] == 'e' else ours
    run = build(opt, dtype, compiled)
    cuda = torch.cuda.is_available() and opt.device in ('auto', 'cuda')

    def timed(steps):
        start = time.perf_counter()
        run(steps)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    while (message := pipe.recv()) != 'stop':
        if message == 'profile':
            pipe.send(profile(run, opt.steps, 'cuda' if cuda else 'cpu'))
        else:
            pipe.send(timed(message))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == 'darwin' else 1024
    pipe.send((peak, torch.cuda.max_memory_allocated() if cuda else 0))


def tree_memory(pid):
    """Bytes of a process and all below it, shared pages counted once. Processes end while one
    looks: they count 0."""
    parents = {}
    for entry in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(')')[2].split()[1])
    tree, total = {pid}, 0
    while more := {p for p, parent in parents.items() if parent in tree} - tree:
        tree |= more
    for p in tree:
        with contextlib.suppress(OSError):
            lines = Path(f'/proc/{p}/smaps_rollup').read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith('Pss:'))
    return total


class Variant:
    """A worker process. Its memory is looked at only in turns that are not timed, as looking holds
    the process up."""

    def __init__(self, name, opt):
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=worker, args=(name, opt, other))
        self.process.start()
        other.close()
        self.times, self.peak = [], 0

    def ask(self, message, watched=False):
        self.pipe.send(message)
        while watched and not self.pipe.poll(0.05):
            self.peak = max(self.peak, tree_memory(self.process.pid))
        return self.pipe.recv()

    def stop(self):
        alone, self.gpu_peak = self.ask('stop')
        # Where there is no /proc: the process without its loader workers.
        self.peak = self.peak or alone
        self.process.join()


def measure(opt):
    """{name: Variant} after all rounds, and {name: profile}."""
    running, profiles = {}, {}
    try:
        for name in opt.only:
            print(f'starting {name}: {VARIANTS[name][0]}, {VARIANTS[name][1]}', file=sys.stderr)
            running[name] = Variant(name, opt)
            start = time.perf_counter()
            running[name].ask(opt.steps, watched=True)  # starts and compiles
            running[name].start_time = time.perf_counter() - start
            # Until nothing is recorded any more, either.
            for _ in range(1 + Graphed.WARM_UP // opt.steps):
                running[name].ask(opt.steps, watched=True)
        for i in range(opt.rounds):
            for name in opt.only[:: -1 if i % 2 else 1]:
                time.sleep(0.1)  # the threads of the one before go to sleep
                running[name].times.append(running[name].ask(opt.steps))
            print(f'round {i + 1} of {opt.rounds}', file=sys.stderr)
        if opt.profile:
            profiles = {name: running[name].ask('profile') for name in opt.only if name in 'bcd'}
        for variant in running.values():
            variant.stop()
    except (EOFError, ConnectionError):
        raise UserError('a variant ended early; its error is above', status=1) from None
    finally:
        for variant in running.values():
            variant.process.kill()
    return running, profiles


# ------------------------ the table


def machine():
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        named = re.search(r'^model name\s*: (.*)', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
        cpu = named[1] if named else cpu
    # Processors of one name may differ tenfold in what they compute in a cycle.
    cpu += f' ({torch.backends.cpu.get_cpu_capability()})'
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    versions = f'torch {torch.__version__}; {time.strftime("%Y-%m-%d")}'
    return f'{cpu}, {os.cpu_count()} cores, {gpu}; {versions}'


def table(opt, running):
    """The rows as dicts: what is printed and written by --json."""
    images = opt.steps * opt.batch_size
    speed = {name: images / statistics.median(v.times) for name, v in running.items()}
    rows = []
    for name, v in running.items():
        what, dtype, _ = VARIANTS[name]
        limit = speed.get('e16' if dtype == 'bfloat16' else 'e32')
        rows.append(
            {
                'variant': name,
                'what': what,
                'dtype': dtype,
                'images_per_second': speed[name],
                'slowest': images / max(v.times),
                'fastest': images / min(v.times),
                'share_of_bound': speed[name] / limit if limit else None,
                'ratio_to_a': speed[name] / speed['a'] if 'a' in speed else None,
                'peak_memory': v.peak,
                'gpu_peak_memory': v.gpu_peak,
                'start_time': v.start_time,
            }
        )
    return rows


def decode(opt):
    """Seconds to decode so many small WebP files of noise, once they are in the disk cache."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f'{i}.webp' for i in range(opt.images)]
        for file in files:
            smooth = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (32, 32))
            cv2.imwrite(str(file), smooth, [cv2.IMWRITE_WEBP_QUALITY, 101])  # lossless
        start = time.perf_counter()
        data.decode_all(files, opt.nthread)
        print(f'{opt.images} WebP files of 32x32 decoded in {time.perf_counter() - start:.1f} s')


def input_pipeline(opt):
    """Photographs a second on one core, from files in the disk cache: ours, torchvision's
    ImageFolder transforms, decoding alone."""
    from PIL import Image
    from torchvision import transforms

    files = sorted(str(f) for f in Path(opt.input).rglob('*') if f.is_file())
    if not files:
        raise UserError(f'--input {opt.input}: no such folder, or it holds no photographs')
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    out = np.empty((224, 224, 3), np.uint8)

    def decode_alone(turn, i, file):
        data.decode_bgr(file, data.read_image(file))

    def ours(turn, i, file):
        train_view(file, 224, 0, turn, i, out)

    def torchvisions(turn, i, file):
        theirs(Image.open(file).convert('RGB'))

    seconds = {f: [] for f in (decode_alone, ours, torchvisions)}
    for turn in range(opt.rounds + 1):
        for f, times in seconds.items():
            start = time.process_time()
            for i, file in enumerate(files):
                f(turn, i, file)
            times.append(time.process_time() - start)
    rates = {f: len(files) / statistics.median(times[1:]) for f, times in seconds.items()}
    for f, rate in rates.items():
        print(
            f'{f.__name__:14}{rate:7.0f} img/s a core, '
            f'{rate / rates[torchvisions]:.2f} times torchvision, '
            f'{rate / rates[decode_alone]:.0%} of decoding alone'
        )


# ------------------------ memory over epochs


def memory(opt):
    """Resident memory of imagenet.py, a student with attention transfer from a ResNet-34, at the
    end of each epoch, and whether it grows. Returns the bytes of each."""
    train, _ = scan_photographs(opt.imagenetpath)
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / 'teacher.hkl'
        torch.manual_seed(0)
        save_params(teacher, resnet.resnet(34, 0.25, len(train))[1])
        # One epoch more, so that the process is still there when the last one is looked at.
        words = (
            f'{PHOTOGRAPHS} --epochs {opt.epochs + 1} --batch_size {opt.batch_size} '
            f'--nthread {opt.nthread} --device {opt.device}'
        )
        words = [*words.split(), '--imagenetpath', opt.imagenetpath, *opt.options.split()]
        words += ['--teacher_params', str(teacher), '--save', str(Path(folder) / 'run')]
        sizes = watch([sys.executable, str(ROOT / 'imagenet.py'), *words], opt.epochs)
    early, middle, late = (v / 1e6 for v in medians(sizes))
    print(
        f'medians of five epochs: {early:.1f} MB from the third on, '
        f'{middle:.1f} MB from the middle on, {late:.1f} MB at the end; '
        f'{late - middle:+.1f} MB in the second half: '
        f'it {"grows" if grows(sizes) else "does not grow"}'
    )
    return sizes


def watch(words, epochs):
    """[bytes] that the process of a training command holds after each of its first epochs; then it
    is killed."""
    sizes = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        try:
            while len(sizes) < epochs and (line := run.stdout.readline()):
                if line.startswith('epoch '):
                    sizes.append(resident(run.pid))
                    print(f'epoch {len(sizes):<4}{sizes[-1] / 1e6:8.1f} MB', flush=True)
        finally:
            run.kill()
    if len(sizes) < epochs:
        raise UserError('imagenet.py ended early; its error is above', status=1)
    return sizes


def resident(pid):
    """Bytes of memory that a process holds, VmRSS; 0 of one that has ended."""
    lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith('VmRSS:')]
    return sum(sizes)


def grows(sizes):
    """Whether memory is more than 0.5 % larger at the end than in the middle: freed memory is kept,
    and now and then a step finds it in pieces and takes more, so that a run has its full size only
    after some epochs."""
    _, middle, late = medians(sizes)
    return late > 1.005 * middle


def medians(sizes):
    """Medians of `sizes` [epochs] over the third to seventh epoch, the first five of the second
    half, and the last five."""
    half = len(sizes) // 2
    parts = sizes[2:7], sizes[half : half + 5], sizes[-5:]
    return [statistics.median(part) for part in parts]


def main(argv=None):
    opt, _ = parser.parse(argv)
    if not (opt.decode or opt.input) and opt.steps * opt.batch_size > opt.images:
        turn = f'{opt.steps} steps (--steps) of {opt.batch_size} (--batch_size)'
        raise UserError(f'--images {opt.images}: a turn takes more, {turn}')
    if opt.memory and not opt.imagenetpath:
        raise UserError('--memory: give the photographs to train on, --imagenetpath')
    if opt.memory and not os.path.isdir('/proc/self'):
        raise UserError('--memory: there is no /proc on this system to read it from')
    if opt.json:
        check_writable(Path(opt.json).absolute().parent, '--json')
    device, _ = choose_device(cifar_options(opt, 'float'))
    print(machine())
    if opt.decode or opt.input:
        return decode(opt) if opt.decode else input_pipeline(opt)
    if opt.memory:
        record = {'machine': machine(), 'options': vars(opt), 'resident_bytes': memory(opt)}
        if opt.json:
            write_text(opt.json, json.dumps(record, indent=1) + '\n')
        return None
    if {'c', 'd'} & set(opt.only) and not compiler_works(device):
        opt.only = [name for name in opt.only if name not in 'cd']
    # An empty cache, so that the memory of compiling is always counted.
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', cache)
        running, profiles = measure(opt)
    rows = table(opt, running)
    print(f'batch {opt.batch_size}, medians of {opt.rounds} rounds of {opt.steps} steps')
    print(
        f'{"":4}{"":21}{"dtype":10}{"img/s":>8}{"slowest-fastest":>17}{"of bound":>10}'
        f'{"to a":>7}{"peak GB":>9}{"GPU GB":>8}{"start s":>9}'
    )
    for r in rows:
        share = f'{r["share_of_bound"]:.0%}' if r['share_of_bound'] else '-'
        ratio = f'{r["ratio_to_a"]:.2f}' if r['ratio_to_a'] else '-'
        span = f'{r["slowest"]:.0f}-{r["fastest"]:.0f}'
        print(
            f'{r["variant"]:4}{r["what"]:21}{r["dtype"]:10}{r["images_per_second"]:8.0f}{span:>17}{share:>10}{ratio:>7}'
            f'{r["peak_memory"] / 1e9:9.2f}{r["gpu_peak_memory"] / 1e9:8.2f}{r["start_time"]:9.1f}'
        )
    for name, shares in profiles.items():
        print(f'{name} by profile:', ', '.join(f'{g} {share:.1%}' for g, share in shares.items()))
    if opt.json:
        record = {'machine': machine(), 'options': vars(opt), 'rows': rows, 'profiles': profiles}
        record['times'] = {name: v.times for name, v in running.items()}
        write_text(opt.json, json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(program.call_main(main))
