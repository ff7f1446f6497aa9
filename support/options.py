"""The command line: parser, argument types, the options of both training scripts, names of runs."""

import argparse
import json
import math
import os
import re
import sys
import zlib

from support.program import UserError
from utils import scaled_steps

# ------------------------ parser


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and without abbreviations."""

    def __init__(self, description):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.color = False  # of Python 3.14; program.Output would escape the colors

    def error(self, message):
        raise UserError(message)

    def parse(self, argv) -> tuple[argparse.Namespace, set]:
        """(the options, the names of those that were given). Raises UserError for an empty value,
        which usually comes from an unset shell variable."""
        argv = sys.argv[1:] if argv is None else argv
        opt = self.parse_args(argv)
        for action in self._actions:
            # argparse of Python 3.11 takes a second '--' for an argument, with [] as its value.
            if action.nargs is None and not action.option_strings and vars(opt)[action.dest] == []:
                self.error(f'the following arguments are required: {action.metavar}')
        words = {arg.split('=')[0] for arg in argv}
        given = {a.dest for a in self._actions if words.intersection(a.option_strings)}
        for name, value in vars(opt).items():
            setattr(opt, name, _expand(value))
        for name in sorted(given):
            value = getattr(opt, name)
            if '' in (value if isinstance(value, list) else [value]):
                self.error(f'--{name}: its value is empty')
        return opt, given

    def takes(self, name: str, value) -> bool:
        """Whether --name can have this value, read from a log or a checkpoint."""
        action = next((a for a in self._actions if a.dest == name), None)
        if action is None:
            return False
        if value == action.default and type(value) is type(action.default):
            return True
        if action.nargs == 0:
            return type(value) is bool
        text = value if isinstance(value, str) else json.dumps(value)
        try:
            parsed = action.type(text) if action.type else text
        except argparse.ArgumentTypeError:
            return False
        same = type(parsed) is type(value) and parsed == value
        return same and (action.choices is None or value in action.choices)


def _expand(value):
    """Paths with ~ for the home folder: a shell leaves it in --save=~/run."""
    if isinstance(value, list):
        return [_expand(v) for v in value]
    is_path = isinstance(value, str) and value.startswith('~/')
    return os.path.expanduser(value) if is_path else value


# ------------------------ argument types


def number(kind=float, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite number with low <= number <= high and number > above."""
    bounds = {'at least': low, 'above': above, 'at most': high}
    bounds = ' and '.join(f'{word} {v}' for word, v in bounds.items() if math.isfinite(v))
    wanted = f'{"a whole number" if kind is int else "a number"}, {bounds}'.removesuffix(', ')
    limit = 2**31 if kind is int else math.inf

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (abs(value) < limit and low <= value <= high and value > above):
            below = f', below {limit}' if kind is int and abs(value) >= limit else ''
            raise argparse.ArgumentTypeError(f'must be {wanted}{below}, not {text[:40]!r}')
        return value

    return parse


def rising_epochs(text):
    """An argparse type: a JSON list of increasing positive integers."""
    try:
        epochs = json.loads(text)
    except (ValueError, RecursionError):
        epochs = None
    whole = isinstance(epochs, list) and all(type(e) is int and e > 0 for e in epochs)
    if not whole or sorted(set(epochs)) != epochs:
        raise argparse.ArgumentTypeError(
            f'must be a list of increasing epochs, such as [60,120,160], not {text!r}'
        )
    return epochs


def gpu_list(text):
    """An argparse type: GPU numbers, such as '0,1'."""
    if not re.fullmatch(r'\d+(,\d+)*', text):
        raise argparse.ArgumentTypeError(
            f'must be a list of GPU numbers, such as 0,1, not {text!r}'
        )
    return text


def group_list(n: int):
    """An argparse type: distinct groups of 0 to n - 1, '2,3' or '[3, 2]' -> [2, 3]."""

    def parse(text):
        inside = text.strip()
        if inside.startswith('[') and inside.endswith(']'):
            inside = inside[1:-1]
        groups = inside.replace(' ', '').split(',')
        if not set(groups) <= set(map(str, range(n))) or len(set(groups)) != len(groups):
            raise argparse.ArgumentTypeError(
                f'must be a list of different groups from 0 to {n - 1}, '
                f'such as {n - 2},{n - 1}, not {text[:40]!r}'
            )
        return sorted(int(g) for g in groups)

    return parse


# ------------------------ the options of both training scripts


def add_validate(add) -> None:
    """Add --validate to a group of options by its add_argument."""
    add(
        '--validate',
        default=0,
        type=number(int, 0),
        metavar='N',
        help='hold out N training images and report on them instead of the test set (default: 0)',
    )


def add_loss_options(add, paper_alpha: str) -> None:
    """Add --alpha, --temperature and --beta to a group of options by its add_argument.

    paper_alpha: what the paper says of --alpha.
    """
    add(
        '--alpha',
        type=number(low=0, high=1),
        help=f'weight of knowledge distillation, 0 to 1 (paper: {paper_alpha}; default: 0)',
    )
    add(
        '--temperature',
        default=4.0,
        type=number(above=0, high=1e6),
        help='softmax temperature for knowledge distillation (paper, default: 4)',
    )
    add(
        '--beta',
        type=number(low=0),
        help='weight of the transfer, see above '
        '(default: 1e+3 with a teacher and no --alpha, else 0)',
    )


def add_training_options(parser, batch_size, lr, weight_decay, published, lr_decay_ratio) -> None:
    """Add the options of both training scripts, with the paper's values as defaults.

    published: (drops, epochs) of the paper.
    """
    drops, epochs = published
    add = parser.add_argument_group('training').add_argument
    add(
        '--batch_size',
        default=batch_size,
        type=number(int, 1),
        help=f'images per step (paper, default: {batch_size})',
    )
    add(
        '--lr',
        default=lr,
        type=number(above=0),
        help=f'learning rate of SGD with momentum 0.9 (paper, default: {lr})',
    )
    add(
        '--epochs',
        default=epochs,
        type=number(int, 0, 1_000_000),
        help=f'passes over the training set; 0 saves the untrained net (paper, default: {epochs})',
    )
    add(
        '--epoch_step',
        type=rising_epochs,
        metavar='LIST',
        help=f'epochs at which the rate drops (default: {_plain(drops)} of {epochs}, scaled)',
    )
    add(
        '--lr_decay_ratio',
        default=lr_decay_ratio,
        type=number(above=0, high=1),
        help=f'factor of the learning rate at each drop (paper, default: {lr_decay_ratio})',
    )
    add(
        '--weight_decay',
        default=weight_decay,
        type=number(low=0),
        help=f'L2 decay of all trained parameters (paper, default: {weight_decay})',
    )
    add(
        '--dtype',
        default='float',
        choices=['float', 'bfloat16'],
        help='for convolutions and activations; the rest stays float32 (paper, default: float)',
    )
    add(
        '--seed',
        default=0,
        type=number(int, 0),
        help='seed of initial values, order and augmentation (default: 0)',
    )
    add = parser.add_argument_group('run').add_argument
    add(
        '--save',
        default='',
        metavar='DIR',
        help='run folder (default: logs/NAME, named after the options)',
    )
    add(
        '--resume',
        nargs='?',
        const=True,
        metavar='PATH',
        help='continue the run in --save, or start it; PATH: continue that run or checkpoint',
    )
    add(
        '--evaluate',
        metavar='PATH',
        help='test a run folder or a weights file (see docs/weights.md) and stop',
    )
    add(
        '--tensorboard',
        action=argparse.BooleanOptionalAction,
        default=False,
        help='also write tensorboard curves into --save',
    )
    add = parser.add_argument_group('machine').add_argument
    add(
        '--device',
        default='auto',
        choices=['auto', 'cpu', 'cuda', 'mps'],
        help='auto: cuda if there is one, else cpu; mps is untested (default: auto)',
    )
    add('--cuda', action='store_true', help='same as --device cuda')
    add(
        '--gpu_id',
        type=gpu_list,
        help='GPUs to use, such as 0,1 (default: CUDA_VISIBLE_DEVICES as it is)',
    )
    add(
        '--ngpu',
        default=1,
        type=number(int, 1),
        help='GPUs that share a batch; more than 1 is untested (default: 1)',
    )
    add(
        '--nthread',
        default=0,
        type=number(int, 0, 1024),
        help='CPU threads that decode and compute (default: 0, one per core)',
    )
    add(
        '--compile',
        action=argparse.BooleanOptionalAction,
        default=False,
        help='torch.compile the step: faster after the first one or two minutes; one device only',
    )
    add(
        '--deterministic',
        action='store_true',
        help='bit-identical runs on one GPU, but slower; runs on a CPU always are',
    )


def complete_losses(opt, teacher: str, beta_alone: bool = False) -> None:
    """Fill in --alpha and --beta. Raises UserError if they contradict each other.

    teacher     name of the option that names the teacher
    beta_alone  the loss that --beta weighs uses no teacher
    """
    given = getattr(opt, teacher)
    if given and opt.alpha is None and opt.beta is None and not beta_alone:
        opt.beta = 1e3
    opt.alpha, opt.beta = opt.alpha or 0.0, opt.beta or 0.0
    if given and not opt.alpha and beta_alone:
        raise UserError(
            f'--method {opt.method} needs no teacher: leave --{teacher} out, or give --alpha'
        )
    if given and not opt.alpha and not opt.beta:
        raise UserError(
            f'--alpha and --beta are both 0: the student would learn nothing from --{teacher}'
        )
    for name in ('alpha',) if beta_alone else ('alpha', 'beta'):
        if getattr(opt, name) and not given:
            raise UserError(f'--{name} {getattr(opt, name):g} needs a teacher: give --{teacher}')


# ------------------------ the options of a run


# Options that a resumed run may change: where and how long it runs, not what it computes.
MAY_DIFFER = {
    'skip_broken',
    'checkpoint_minutes',
    'check_images',
    'epochs',
    'nthread',
    'device',
    'cuda',
    'gpu_id',
    'ngpu',
    'compile',
    'tensorboard',
    'dataroot',
    'imagenetpath',
    'student_params',
}
TEACHERS = {'teacher_id', 'teacher_params'}  # may be another path, to the same contents
NOT_OPTIONS_OF_A_RUN = {'resume', 'evaluate'}


def run_options(opt) -> dict:
    """The options that the log and the checkpoint hold."""
    return {k: v for k, v in vars(opt).items() if k not in NOT_OPTIONS_OF_A_RUN}


def continue_options(opt, given: set, old: dict, parser) -> argparse.Namespace:
    """`opt` with the value of the old run, `old`, for every option that was not given.

    An option that `old` lacks has the value it had before it existed. Raises UserError with the
    name of an option that was given and differs, but may not.
    """
    # Older runs did what today's defaults say, with one exception.
    before = {k: parser.get_default(k) for k in run_options(opt)} | {'train_crop': 'resized'}
    if ('imagenetpath' in old) != hasattr(opt, 'imagenetpath'):
        program = 'imagenet.py' if 'imagenetpath' in old else 'cifar.py'
        raise UserError(f'--resume: this is a run of {program}: continue it with that')
    old = before | old
    if not old['epochs']:  # nothing was trained: the drops are those of the length wanted now
        del old['epoch_step']
    old = {k: v for k, v in old.items() if k != 'save' and hasattr(opt, k)}
    for name, value in old.items():
        if not parser.takes(name, value):
            raise UserError(
                f'--resume: the checkpoint has an impossible --{name} {_plain(value)[:60]}: '
                'it is damaged'
            )
        may_differ = name in MAY_DIFFER or name in TEACHERS and value and getattr(opt, name)
        if name in given and getattr(opt, name) != value and not may_differ:
            raise UserError(
                f'--resume: --{name} {_plain(getattr(opt, name))} differs from the run, '
                f'which has {_plain(value) or "none"}: '
                'leave it out, or start a new run in another --save'
            )
    changed = 'epochs' in given and old['epochs'] not in (0, opt.epochs)
    if changed and old.get('beta_decay', 'none') != 'none':
        raise UserError(
            f'--epochs {opt.epochs}: beta decays over the {old["epochs"]} epochs of this run, '
            'which cannot change: leave --epochs out, or start a new run in another --save'
        )
    if changed and 'epoch_step' not in given:
        print(
            f'--epochs changed from {old["epochs"]} to {opt.epochs}: '
            f'the rate still drops at {_plain(old["epoch_step"])}'
        )
    kept = set(given)
    devices = {'device', 'cuda', 'gpu_id', 'ngpu'}
    if given & devices:  # any device option given now overrides all of the old run
        kept |= devices
    return argparse.Namespace(**vars(opt) | {k: v for k, v in old.items() if k not in kept})


def logged_options(opt, given: set, source: str, record: dict, parser, names: set):
    """`opt` with a run's own values, from its log record, for those of `names` that were not given.

    For --evaluate. A folder of whoever trained the net is used only if it exists here. Raises
    UserError if the record has a value that the option cannot have.
    """
    logged = {name: record[name] for name in names - given if name in record}
    for name, value in logged.items():
        if not parser.takes(name, value):
            raise UserError(
                f'--evaluate {source}: its log has an invalid {name}, {str(value)[:60]!r}: '
                f'give --{name}'
            )
    for name in 'dataroot', 'imagenetpath':
        if name in logged and not os.path.isdir(logged[name]):
            del logged[name]
    return argparse.Namespace(**vars(opt) | logged)


def _plain(value):
    return str(value).replace(' ', '')


def run_name(parts: list, named: set, opt, parser, published: tuple[list, int]) -> str:
    """The name of a run's folder: `parts`, then every option that matters and is not as published.

    named: options that `parts` already names; published: (drops, epochs) of the paper.
    """
    defaults = {'alpha': 0, 'beta': 0, 'epoch_step': scaled_steps(*published, opt.epochs)}
    of_no_matter = MAY_DIFFER - {'epochs', 'student_params'} | NOT_OPTIONS_OF_A_RUN
    named = named | {'seed', 'save'} | of_no_matter
    parts = [part for part in parts if part]
    for name in sorted(vars(opt).keys() - named):
        value = getattr(opt, name)
        if value == defaults.get(name, parser.get_default(name)):
            continue
        if isinstance(value, list):
            value = '-'.join(map(str, value))
        elif isinstance(value, float):
            value = f'{value:g}'
        parts.append(name if value is True else f'{name}{value}')
    name = '_'.join([*parts, f'seed{opt.seed}']).replace('/', '-')
    raw = name.encode(errors='surrogateescape')  # a disk counts bytes
    if len(raw) <= 200:
        return name
    return f'{raw[:190].decode(errors="ignore")}_{zlib.crc32(raw):08x}'


def without_suffix(path: str) -> str:
    """A path of weights or of a run folder without logs/ and without the suffix."""
    suffix = r'\.(hkl|pth(\.tar)?|pt7?|th|ckpt|bin|safetensors)(?=$|:)'
    return re.sub(rf'^logs/|{suffix}', '', path).strip('./').replace(':', '-')
