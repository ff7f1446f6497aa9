"""Measure the speed of the attention-transfer step, WRN-16-2 to WRN-16-1, data included. Compare it
with the loop published in 2018 and with an upper bound.

    python scripts/benchmark.py                          # all variants
    python scripts/benchmark.py --only a,d,e             # some of them
    python scripts/benchmark.py --profile --only c,d     # and where a compiled step spends its time
    python scripts/benchmark.py --decode                 # reading a folder of 50,000 small images
    python scripts/benchmark.py --input DIR              # decoding and cropping by imagenet.py

    a  the loop as published in 2018, float32, eager: see published_loop.py
    b  ours: cifar.train_epoch, float32, eager
    c  the same with --compile
    d  the same with --compile --dtype bfloat16
    e  the bound, in float32 and in bfloat16: only the convolutions and matrix products of b's step,
       recorded and replayed
    f  the same, but each output stays in memory until the backward pass, as training needs it

Each variant runs in its own process. They take turns, so a slow moment of the machine affects all
of them. Images are random; none is read from disk. Run nothing else on the machine.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import program

program.start(__name__)

import cv2
import numpy as np
import torch

import cifar
import data
import resnet
import step_parts
import utils
from images import decode_bgr, read_image
from support import devices, runs
from support.files import check_file, write_text
from support.options import Parser, number
from support.photographs import train_view
from support.program import UserError

# name: (what it is, dtype, whether it compiles)
VARIANTS = {
    'a': ('as published in 2018', 'float', False),
    'b': ('ours, eager', 'float', False),
    'c': ('ours, compiled', 'float', True),
    'd': ('ours, compiled', 'bfloat16', True),
    'e32': ('bound', 'float', False),
    'e16': ('bound', 'bfloat16', False),
    'f32': ('bound, outputs kept', 'float', False),
    'f16': ('bound, outputs kept', 'bfloat16', False),
}
TEACHER, STUDENT, BETA = (16, 2), (16, 1), 1e3


def variants(text):
    """An argparse type: 'a,e' -> ['a', 'e32', 'e16']."""
    names = text.split(',')
    if not set(names) <= {*VARIANTS, 'e', 'f'}:
        raise argparse.ArgumentTypeError(f'must be a list of a to f, such as a,e, not {text!r}')
    return list(dict.fromkeys(v for name in names for v in VARIANTS if name in (v, v[0])))


parser = Parser(__doc__)
add = parser.add_argument
add('--rounds', default=7, type=number(int, 1), help='turns; prints their median (default: 7)')
add('--steps', default=40, type=number(int, 1), help='steps per turn (default: 40)')
add('--batch_size', default=128, type=number(int, 1), help='images per step (paper, default: 128)')
add('--images', default=50000, type=number(int, 1), help='images in memory (CIFAR, default: 50000)')
add('--only', type=variants, metavar='LIST', help='some of a,b,c,d,e,f, such as a,e (default: all)')
add('--nthread', default=0, type=number(int, 0), help='CPU threads (default: 0, one per core)')
add(
    '--device',
    default='auto',
    choices=['auto', 'cpu', 'cuda', 'mps'],
    help='auto: cuda if there is one, else cpu (default: auto)',
)
add('--json', metavar='FILE', help='also write everything measured to FILE')
add('--profile', action='store_true', help='also print where the time of b, c and d goes')
add('--decode', action='store_true', help='instead: decode --images WebP files, as cifar.py does')
add('--input', metavar='DIR', help='instead: load the photographs in DIR as imagenet.py does')


# ------------------------ the variants


def cifar_options(opt, dtype):
    """The options of cifar.py for the step that is measured."""
    argv = (
        f'--teacher_id wrn_16_2 --beta {BETA} --alpha 0 --epoch_step [60,120,160] --dtype {dtype} '
        f'--batch_size {opt.batch_size} --nthread {opt.nthread} --device {opt.device}'
    )
    return cifar.parser.parse(argv.split())[0]


def random_set(n):
    """n images and labels, as large as CIFAR-10's."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (n,), generator=generator)
    return data.ImageSet(images, labels, [str(i) for i in range(10)])


def make_nets(device):
    """cifar.Nets of the student and the teacher, with random values."""
    torch.manual_seed(0)
    f_s, params_s = resnet.wrn(*STUDENT, 10)
    f_t, params_t = resnet.wrn(*TEACHER, 10)
    params_t = {k: v.detach() for k, v in params_t.items()}
    params = utils.flatten({'student': params_s, 'teacher': params_t})
    return cifar.Nets(f_s, f_t, devices.to_device(params, device))


def ours(opt, dtype, compiled):
    """run(steps): cifar.train_epoch on that many batches, prepared as in cifar.main."""
    devices.keep_freed_memory()
    options = cifar_options(opt, dtype)
    device, device_ids = devices.choose_device(options)
    nets = make_nets(device)
    loss_of = cifar.make_loss(nets, options, device_ids)
    step_loss = devices.compiled(loss_of, device) if compiled else loss_of
    graphed = step_loss is not loss_of and device.type == 'cuda'
    optimizer = utils.make_optimizer(nets.params, options, epoch=1)
    train_set = random_set(opt.images).to(device)
    step = cifar.make_step(step_loss, train_set, optimizer, graphed)

    def run(steps):
        n = steps * options.batch_size
        part = train_set._replace(images=train_set.images[:n], labels=train_set.labels[:n])
        cifar.train_epoch(step, part, runs.Run(options, None, here=False))

    return run


def published(opt, dtype, compiled):
    """run(steps) of the loop of 2018."""
    import published_loop  # here, because torchvision would count as memory of the others

    device, _ = devices.choose_device(cifar_options(opt, dtype))
    params, train_set = make_nets(device).params, random_set(opt.images)
    return published_loop.make_run(params, train_set, opt.batch_size, BETA, device)


def bound(opt, dtype, compiled, keep=False):
    """run(steps) of the convolutions and matrix products of one step of ours; keep: as variant f
    keeps their outputs."""
    return step_parts.make_replay(step_parts.record(ours(opt, dtype, compiled=False)), keep)


# ------------------------ a process for each


def worker(name, opt, pipe, log):
    """Make a variant, then answer each number of steps with the seconds that they took.

    What it prints (progress, messages of the profiler and of CUDA) goes to the file `log`.
    """
    with open(log, 'w') as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    _, dtype, compiled = VARIANTS[name]
    if compiled and opt.profile:
        torch._inductor.config.cpp.enable_kernel_profile = True  # names kernels in the profile
    kept_bound = functools.partial(bound, keep=True)
    build = {'a': published, 'e': bound, 'f': kept_bound}.get(name[0], ours)
    run = build(opt, dtype, compiled)
    cuda = torch.cuda.is_available() and opt.device in ('auto', 'cuda')

    while (message := pipe.recv()) != 'stop':
        if message == 'profile':
            pipe.send(step_parts.profile(run, opt.steps, 'cuda' if cuda else 'cpu'))
            continue
        start = time.perf_counter()
        run(message)
        if cuda:
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == 'darwin' else 1024
    pipe.send((peak, torch.cuda.max_memory_allocated() if cuda else 0))


def tree_memory(pid):
    """Bytes of a process and its descendants, shared pages counted once; 0 for those that end
    meanwhile."""
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
    """A worker process, which prints to the file `log`.

    Its memory is read only in turns that are not timed, because reading it slows the process down.
    """

    def __init__(self, name, opt, log):
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=worker, args=(name, opt, other, log))
        self.process.start()
        other.close()
        self.log, self.times, self.peak = log, [], 0

    def ask(self, message, watched=False):
        try:
            self.pipe.send(message)
            while watched and not self.pipe.poll(0.05):
                self.peak = max(self.peak, tree_memory(self.process.pid))
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            print(self.log.read_text(), end='', file=sys.stderr)
            raise UserError('a variant ended early; its error is above', status=1) from None

    def stop(self):
        alone, self.gpu_peak = self.ask('stop')
        # Without /proc: the process without its loader workers.
        self.peak = self.peak or alone
        self.process.join()


def measure(opt, folder):
    """{name: Variant} after all rounds, and {name: profile}. What the variants print goes to files
    in `folder`."""
    running, profiles = {}, {}
    try:
        for name in opt.only:
            print(f'starting {name}: {VARIANTS[name][0]}, {VARIANTS[name][1]}', file=sys.stderr)
            running[name] = Variant(name, opt, folder / f'{name}.txt')
            start = time.perf_counter()
            running[name].ask(opt.steps, watched=True)  # starts and compiles
            running[name].start_time = time.perf_counter() - start
            # More turns, until the CUDA graph is captured.
            for _ in range(1 + devices.Graphed.WARM_UP // opt.steps):
                running[name].ask(opt.steps, watched=True)
        for i in range(opt.rounds):
            for name in opt.only[:: -1 if i % 2 else 1]:
                time.sleep(0.1)  # the threads of the last variant go to sleep
                running[name].times.append(running[name].ask(opt.steps))
            print(f'round {i + 1} of {opt.rounds}', file=sys.stderr)
        if opt.profile:
            profiles = {name: running[name].ask('profile') for name in opt.only if name in 'bcd'}
        for variant in running.values():
            variant.stop()
    finally:
        for variant in running.values():
            variant.process.kill()
    return running, profiles


# ------------------------ the table


def machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    versions = f'torch {torch.__version__}; {time.strftime("%Y-%m-%d")}'
    return f'{devices.processor()}, {data.cores()} cores, {gpu}; {versions}'


def table(opt, running):
    """The rows, as --json writes them."""
    images = opt.steps * opt.batch_size
    speed = {name: images / statistics.median(v.times) for name, v in running.items()}
    rows = []
    for name, v in running.items():
        what, dtype, _ = VARIANTS[name]
        limits = [speed.get(bound + ('16' if dtype == 'bfloat16' else '32')) for bound in 'ef']
        shares = [speed[name] / limit if limit else None for limit in limits]
        row = {
            'variant': name,
            'what': what,
            'dtype': dtype,
            'images_per_second': speed[name],
            'slowest': images / max(v.times),
            'fastest': images / min(v.times),
            'share_of_bound': shares[0],
            'share_of_kept_bound': shares[1],
            'ratio_to_a': speed[name] / speed['a'] if 'a' in speed else None,
            'peak_memory': v.peak,
            'gpu_peak_memory': v.gpu_peak,
            'start_time': v.start_time,
        }
        rows.append(row)
    return rows


def print_table(rows):
    print(
        f'{"":4}{"":21}{"dtype":10}{"img/s":>8}{"slowest-fastest":>17}{"of e":>7}{"of f":>7}'
        f'{"to a":>7}{"peak GB":>9}{"GPU GB":>8}{"start s":>9}'
    )
    for r in rows:
        shares = [r['share_of_bound'], r['share_of_kept_bound']]
        shares = [f'{share:.0%}' if share else '-' for share in shares]
        ratio = f'{r["ratio_to_a"]:.2f}' if r['ratio_to_a'] else '-'
        span = f'{r["slowest"]:.0f}-{r["fastest"]:.0f}'
        print(
            f'{r["variant"]:4}{r["what"]:21}{r["dtype"]:10}{r["images_per_second"]:8.0f}{span:>17}'
            f'{shares[0]:>7}{shares[1]:>7}{ratio:>7}{r["peak_memory"] / 1e9:9.2f}'
            f'{r["gpu_peak_memory"] / 1e9:8.2f}{r["start_time"]:9.1f}'
        )


# ------------------------ reading images


def decode(opt):
    """Print the seconds to decode that many small WebP files of noise from the disk cache."""
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
    """Print photographs per second on one core, read from the disk cache: decoding alone, ours,
    and torchvision's transforms."""
    import torchvision.transforms as T
    from PIL import Image

    files = sorted(str(f) for f in Path(opt.input).rglob('*') if f.is_file())
    if not files:
        raise UserError(f'--input {opt.input}: no such folder, or it holds no photographs')
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    crop = T.RandomResizedCrop(224), T.RandomHorizontalFlip(), T.ToTensor()
    theirs = T.Compose([*crop, T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    out = np.empty((224, 224, 3), np.uint8)

    def decode_alone(turn, i, file):
        decode_bgr(file, read_image(file))

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


def main(argv=None):
    opt, _ = parser.parse(argv)
    opt.only = opt.only or list(VARIANTS)
    if not (opt.decode or opt.input) and opt.steps * opt.batch_size > opt.images:
        needed = f'--steps times --batch_size, {opt.steps * opt.batch_size}'
        raise UserError(f'--images {opt.images}: must be at least {needed}')
    if opt.json:
        check_file(opt.json, '--json')
    device, _ = devices.choose_device(cifar_options(opt, 'float'))
    print(machine())
    if opt.decode or opt.input:
        return decode(opt) if opt.decode else input_pipeline(opt)
    if {'c', 'd'} & set(opt.only) and not devices.compiler_works(device):
        opt.only = [name for name in opt.only if name not in 'cd']
    # An empty cache, to count the memory of compiling in every run.
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', os.path.join(folder, 'cache'))
        running, profiles = measure(opt, Path(folder))
    rows = table(opt, running)
    print(f'batch {opt.batch_size}, medians of {opt.rounds} rounds of {opt.steps} steps')
    print_table(rows)
    for name, shares in profiles.items():
        print(f'{name} by profile:', ', '.join(f'{g} {share:.1%}' for g, share in shares.items()))
    if opt.json:
        record = {'machine': machine(), 'options': vars(opt), 'rows': rows, 'profiles': profiles}
        record['times'] = {name: v.times for name, v in running.items()}
        write_text(opt.json, json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(program.call_main(main))
