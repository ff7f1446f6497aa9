"""The folder of a run: checkpoint, log and weights, how a run resumes, and the lock.

The checkpoint is the truth; log.txt and model.hkl follow from it.
"""

import argparse
import contextlib
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from support import devices, logs, ranks
from support.files import check_writable, lock_folder, write_atomically, write_text
from support.options import continue_options, run_options
from support.program import Stopped, UserError, check_reachable
from support.readers import read_values
from support.weights import check_params, checksum, load_params, save_params


@dataclass
class Run:
    """A run of cifar.py or imagenet.py."""

    opt: argparse.Namespace  # complete
    checkpoint: dict | None  # what it continues from, None for a new run
    here: bool  # whether that checkpoint is the one in opt.save
    epoch: int = 0  # epochs done
    step: int = 0  # steps done of the next epoch
    log: list = field(default_factory=list)  # the lines of log.txt
    options: dict = field(default_factory=dict)  # as the log and the checkpoint hold them
    facts: dict = field(default_factory=dict)  # checksums that must not change, and more
    about: dict = field(default_factory=dict)  # what every log line says of the run
    curves: object = None  # a tensorboard writer
    progress: str = ''  # how far the last checkpoint is
    notes: list = field(default_factory=list)  # lines to print when training begins
    started: float = 0.0  # when the epoch began, on the monotonic clock
    clock: tuple | None = None  # (time, epochs done) from which on the speed is measured
    lock: int = -1  # a descriptor of the run folder

    def __post_init__(self):
        if self.checkpoint:
            self.epoch, self.step = self.checkpoint['epoch'], self.checkpoint['step']
            self.log = list(self.checkpoint['log'])
        self.options = run_options(self.opt)
        self.progress = f'after epoch {self.epoch} of {self.opt.epochs}'
        if self.step:
            self.progress = f'after step {self.step} of epoch {self.epoch + 1}'

    def check_facts(self, **checksums) -> None:
        """Keep the checksums of 'data' and 'teacher' in `facts`. Raises UserError if one differs
        from the checkpoint's."""
        self.facts = checksums | {'teacher_test_acc': None, 'folder': os.getcwd()}
        if not self.checkpoint:
            return
        old = self.checkpoint['facts']
        option = {
            'data': '--dataroot or --imagenetpath',
            'teacher': '--teacher_id or --teacher_params',
        }
        for name, value in checksums.items():
            if value != old.get(name):
                raise UserError(
                    f'--resume: the {name} of {option[name]} changed since this run started: '
                    'restore it, or choose a new --save folder'
                )
        self.facts |= {k: old[k] for k in ('teacher_test_acc', 'passed') if k in old}

    def restore(self, initial: dict, key: str = 'params') -> dict:
        """The checkpoint's tensors, with requires_grad as in `initial`, or `initial` of a new run.

        Raises UserError if names or shapes differ.
        """
        if not self.checkpoint:
            return initial
        try:
            restored = check_params(self.checkpoint[key], initial)
        except UserError as e:
            raise UserError(f'--resume: the run of {self.opt.save}: {e}') from e
        return {k: v.requires_grad_(initial[k].requires_grad) for k, v in restored.items()}

    def restore_optimizer(self, optimizer) -> None:
        """Load the checkpoint's momentum. Raises UserError if it is of another net."""
        if not self.checkpoint:
            return
        load_optimizer(optimizer, self.checkpoint)
        # After --epochs 0 the stored rate is not the one of epoch 1.
        for group in optimizer.param_groups:
            group['lr'] = utils.learning_rate(self.epoch + 1, self.opt)

    def describe(self, params: dict, classes: list, device, **more) -> None:
        """Set what every log line says of the run; params: those whose trained tensors count as
        the student's parameters."""
        self.about = {
            'teacher_test_acc': self.facts['teacher_test_acc'],
            'initial_lr': self.opt.lr,
            'n_parameters': sum(v.numel() for v in utils.trainable(params)),
            'num_classes': len(classes),
            'classes': classes,
            'data_crc32': self.facts['data'],
            'teacher_crc32': self.facts['teacher'] or None,
            **more,
            'machine': devices.processor(),
            'device_name': devices.device_name(device),
            'torch': torch.__version__,
        }

    def start_epoch(self) -> None:
        """Start the clock of an epoch, with the time of an interrupted part of it."""
        before = self.checkpoint['train_time'] if self.checkpoint and self.step else 0.0
        self.started = time.monotonic() - before

    def train_time(self) -> float:
        """The seconds of the epoch so far; 0 if none was started."""
        return time.monotonic() - self.started if self.started else 0.0

    def time_left(self, share: float) -> str:
        """'2:30:00 left' of the run, after that share of the epoch. The first call starts the clock
        and does not know."""
        done, now = self.epoch + share, time.monotonic()
        if self.clock is None:
            self.clock = now, done
        began, done_then = self.clock
        if done == done_then:
            return 'time left unknown'
        left = (now - began) / (done - done_then) * (self.opt.epochs - done)
        return f'{tqdm.format_interval(left)} left'

    def rates(self) -> str:
        """The learning rate and its drops within this run, for a line."""
        opt = self.opt
        drops = [str(step) for step in opt.epoch_step if step <= opt.epochs]
        where = f'the start of epoch{"s" * (len(drops) > 1)} {", ".join(drops)}'
        return f'lr {opt.lr:g}' + (f', times {opt.lr_decay_ratio:g} at {where}' if drops else '')

    def print_end(self) -> None:
        """Say where the weights are, and the commands that test and convert them."""
        save, program = shlex.quote(self.opt.save), shlex.quote(sys.argv[0])
        convert = shlex.quote(str(Path(sys.argv[0]).parent / 'scripts' / 'convert.py'))
        ranks.print_first(
            f'weights: {self.opt.save}/model.hkl. Test them: python {program} --evaluate {save}. '
            f'Convert them: python {convert} {save} net.onnx --normalize'
        )

    @contextlib.contextmanager
    def opened(self):
        """Hold the run folder: create and lock it, and make its files agree with the checkpoint.

        Adds to a signal's exception how to continue. Raises UserError as open_folder does.
        """
        opt = self.opt
        with contextlib.ExitStack() as stack:
            folder = open_folder(opt.save, self.checkpoint, self.here)
            self.lock = ranks.all_or_none(
                lambda: stack.enter_context(folder) if ranks.rank() == 0 else None
            )
            for note in self.notes:
                ranks.print_first(note)
            if opt.tensorboard and ranks.rank() == 0:
                self.curves = logs.open_curves(opt.save, self.log)
            try:
                yield
            except Stopped as e:
                alone = ' (without a path)' if isinstance(opt.resume, str) else ''
                alone = '' if self.here else alone
                e.hint = f'the same command with --resume{alone} continues {self.progress}'
                raise

    def make_checkpoint(self, params: dict, optimizer, step: int = 0, sums=()) -> dict:
        """What --resume needs, see CHECKPOINT_TYPES.

        params: those of all nets, named student.* and adapter.*; sums: see averages.Averages, a
        list for each rank.
        """
        return {
            'params': {k: v.detach() for k, v in utils.part(params, 'student').items()},
            'adapters': {k: v.detach() for k, v in utils.part(params, 'adapter').items()},
            'optimizer': optimizer.state_dict(),
            'epoch': self.epoch,
            'step': step,
            'sums': list(sums),
            'train_time': self.train_time() if step else 0.0,
            'options': self.options,
            'log': self.log,
            'facts': self.facts,
        }

    def check_folder(self) -> None:
        """Raise UserError if --save is no longer the folder that the run holds. Call it on every
        rank."""
        if ranks.rank() == 0:
            try:
                moved = not os.path.samestat(os.fstat(self.lock), os.stat(self.opt.save))
            except OSError:
                moved = True
        if ranks.broadcast(ranks.rank() == 0 and moved):
            ranks.end_all(
                UserError(
                    f'--save {self.opt.save}: was moved or replaced during training. '
                    'Nothing was written there. '
                    f'The moved folder holds the checkpoint {self.progress}'
                )
            )

    def end_epoch(self, stats: dict, times: dict, params: dict, optimizer) -> None:
        """Append an epoch to the log, write all files and print a line. Call it on every rank.

        stats, times: what the log line says of the epoch. Raises UserError, status 1, if the test
        loss is not finite.
        """
        epoch = self.epoch + 1 if self.opt.epochs else 0
        if not math.isfinite(stats['test_loss']):
            kept = f'what {self.opt.save} holds is kept'
            ranks.end_all(
                UserError(f'epoch {epoch}: the test loss is {stats["test_loss"]}; {kept}', status=1)
            )
        record = self.options | {'epoch': epoch} | stats | self.about | times
        self.epoch, self.step = epoch, 0
        self.log.append(logs.json_stats(record))
        passed = self.passes_teacher(stats['test_acc'])
        self.check_folder()
        if ranks.rank() == 0:
            save_run(self.opt.save, self.make_checkpoint(params, optimizer))
            if self.curves:
                logs.write_curves(self.curves, record)
        self.progress = f'after epoch {epoch} of {self.opt.epochs}'
        ranks.print_first(logs.epoch_line(record))
        if passed:
            ranks.print_first(f'warning: after epoch {epoch} {passed}', sys.stderr)

    def passes_teacher(self, acc) -> str:
        """What to say once, when the test accuracy first passes the teacher's; '' otherwise.

        Call it before the checkpoint is written, which records that it was printed.
        """
        acc = acc[0] if isinstance(acc, list) else acc
        teacher = self.facts['teacher_test_acc']
        if teacher is None or not self.opt.epochs or acc <= teacher or self.facts.get('passed'):
            return ''
        self.facts['passed'] = True
        return (
            f'the student ({acc:.2f} %) is better than its teacher ({teacher:.2f} %). A teacher '
            'should be better than its student: take a larger one, or train it longer'
        )


# ------------------------ start


def begin(opt, given: set, parser, complete) -> Run | None:
    """The run of these options, new or resumed; None if it is finished.

    complete(opt, given): fills in what was left open, --save too. Raises UserError if --resume
    finds no sound checkpoint, options differ from it, or --save holds another run.
    """
    opt, checkpoint, folder = find_checkpoint(opt, given, parser, complete)
    opt = complete(opt, given)
    here = checkpoint is not None and os.path.realpath(folder) == os.path.realpath(opt.save)
    if holds_run(opt.save) and not here:
        raise UserError(
            f'--save {opt.save}: already holds a run: add --resume to continue it, '
            'or choose another folder'
        )
    if here and checkpoint['epoch'] >= opt.epochs:
        with open_folder(opt.save, checkpoint):
            print(f'{opt.save}: already trained for {checkpoint["epoch"]} epochs: nothing to do')
        return None
    check_writable(opt.save)  # a finished run may lie on a read-only disk
    if opt.tensorboard:
        logs.check_curves(opt.save)
    run = Run(opt, checkpoint, here)
    run.notes.append(f'run folder: {opt.save}')
    if checkpoint:
        run.notes.append(f'resuming {run.progress}')
    if opt.beta and not checkpoint and 'beta' not in given:
        run.notes.append('no --alpha or --beta given: using --beta 1000')
    return run


def find_checkpoint(opt, given: set, parser, complete) -> tuple:
    """(options, checkpoint, its folder) that --resume continues from; (opt, None, None) without.

    Options that were not given become those of the checkpoint.
    """
    if not opt.resume:
        return opt, None, None
    save = opt.save
    if opt.resume is True:
        folder = source = Path(save or complete(opt, given).save)
        if not holds_run(folder):
            return opt, None, None
    else:
        source = folder = Path(opt.resume)
        if source.name == 'checkpoint.pt' and not os.path.isdir(source):
            folder = source.parent
        if not save and os.path.isfile(folder):
            raise UserError(f'--resume {source}: give --save, the folder to continue in')
    checkpoint = load_checkpoint(source)
    opt = continue_options(opt, given, checkpoint['options'], parser)
    opt.save = save or str(folder)
    return opt, checkpoint, folder


def holds_run(folder) -> bool:
    """Whether a folder holds a run, ours or the published code's."""
    names = ('log.txt', 'checkpoint.pt', 'model.hkl', 'model.pt7')
    return any(os.path.lexists(Path(folder) / name) for name in names)


# ------------------------ folder


@contextlib.contextmanager
def open_folder(folder, checkpoint: dict | None, here: bool = True):
    """Create the run folder, lock it, remove half-written files, and make its files agree with the
    checkpoint.

    checkpoint: what the run continues from, None for a new run; here: it was read from this
    folder. Raises UserError if the folder has changed since, another process trains in it, or it
    cannot be created.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    except BlockingIOError as e:
        raise UserError(f'--save {folder}: another process is training in it') from e
    except OSError as e:
        raise UserError(f'--save {folder}: cannot be created or opened: {e.strerror}') from e
    try:
        now = load_checkpoint(folder) if holds_run(folder) else None
        expected = checkpoint if here else None
        before, after = ((c['epoch'], c['step']) if c else None for c in (expected, now))
        if before != after:
            raise UserError(
                f'--save {folder}: another process has trained in it since: '
                'add --resume to continue its run'
            )
        for half in Path(folder).glob('.*.part'):
            with contextlib.suppress(OSError):  # a finished run may lie on a read-only disk
                half.unlink()
        if checkpoint:
            if not here:
                save_checkpoint(folder, checkpoint)
            sync_folder(folder, checkpoint)
        yield lock
    finally:
        os.close(lock)


def save_run(folder, checkpoint: dict) -> None:
    """Write checkpoint.pt, then log.txt and model.hkl, which follow from it."""
    save_checkpoint(folder, checkpoint)
    write_text(Path(folder) / 'log.txt', log_text(checkpoint))
    save_params(Path(folder) / 'model.hkl', checkpoint['params'])


def save_checkpoint(folder, checkpoint: dict) -> None:
    """Write checkpoint.pt alone, as inside an epoch."""
    path = Path(folder) / 'checkpoint.pt'
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def log_text(checkpoint: dict) -> str:
    return ''.join(line + '\n' for line in checkpoint['log'])


def sync_folder(folder, checkpoint: dict) -> None:
    """Make log.txt and model.hkl agree with the checkpoint: a kill can leave them behind.

    Files that agree are not touched. Inside an epoch model.hkl stays that of the epoch before.
    """
    log, model = Path(folder) / 'log.txt', Path(folder) / 'model.hkl'
    try:
        written = log.read_bytes()
    except OSError:  # missing, or of another user
        written = b''
    if written != log_text(checkpoint).encode():
        write_text(log, log_text(checkpoint))
    if checkpoint['step']:
        return
    wanted = checksum(v for _, v in sorted(checkpoint['params'].items()))
    try:
        same = model.is_file() and checksum(load_params(model).values()) == wanted
    except UserError:
        same = False
    if not same:
        save_params(model, checkpoint['params'])


# ------------------------ checkpoint.pt

CHECKPOINT_TYPES = {
    'params': dict,  # of the net itself, as in model.hkl
    'adapters': dict,  # other trained tensors
    'optimizer': dict,
    'epoch': int,  # epochs done
    'step': int,  # steps done of the next epoch
    'sums': list,  # of that epoch's terms so far
    'train_time': float,  # seconds of that epoch so far
    'options': dict,
    'log': list,  # the lines of log.txt
    'facts': dict,  # checksums of data and teacher, the teacher's accuracy, broken images
}


def load_checkpoint(path) -> dict:
    """checkpoint.pt of a run folder, or that file. Raises UserError if it is damaged."""
    path = Path(path)
    path = path / 'checkpoint.pt' if os.path.isdir(path) else path
    check_reachable(path, '--resume:')
    if not os.path.exists(path):
        raise UserError(f'--resume: {path}: no such file; --resume needs checkpoint.pt')
    try:
        checkpoint = read_values(path)
    except UserError as e:
        raise UserError(f'--resume: {e}. Restore it, or choose a new --save folder') from e
    if isinstance(checkpoint, dict):
        checkpoint.setdefault('adapters', {})  # the first runs had none
        checkpoint.setdefault('train_time', 0.0)  # nor this
    for key, kind in CHECKPOINT_TYPES.items():
        if not isinstance(checkpoint, dict) or type(checkpoint.get(key)) is not kind:
            raise UserError(
                f'--resume: {path}: not a checkpoint of this program '
                f'({key!r} is missing or damaged)'
            )
    lines = checkpoint['log']
    sound = {
        'params': all(map(torch.is_tensor, checkpoint['params'].values())),
        'adapters': all(map(torch.is_tensor, checkpoint['adapters'].values())),
        'log': all(isinstance(v, str) and v.startswith('json_stats: ') for v in lines),
        'epoch': checkpoint['epoch'] >= 0,
        'step': checkpoint['step'] >= 0,
        'sums': all(isinstance(v, list) for v in checkpoint['sums']),
    }
    for key, well in sound.items():
        if not well:
            raise UserError(f'--resume: {path}: its {key!r} is damaged')
    return checkpoint


def load_optimizer(optimizer, checkpoint: dict) -> None:
    """Load the checkpoint's optimizer state. Raises UserError if it is of another net."""
    try:
        optimizer.load_state_dict(checkpoint['optimizer'])
        for p, state in optimizer.state.items():
            if any(v is not None and v.shape != p.shape for v in state.values()):
                raise ValueError('momentum of another shape')
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'--resume: the optimizer state does not fit the net ({e})') from e
