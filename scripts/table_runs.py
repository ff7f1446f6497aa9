"""The runs of a table: their logs, what keeps two of them from being compared, and their cost."""

import math
import os
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plot
import resnet
import utils
from support.devices import multiply_adds
from support.logs import read_log
from support.program import UserError
from support.weights import Net, image_shape, load_net

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom (Abramowitz & Stegun, table 26.10).
# Beyond, that of 30: a little too wide.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
# What a log says of a run's schedule. The numbers of two rows are compared only if these agree.
SCHEDULE = (
    'dataset',
    'epochs',
    'epoch_step',
    'lr',
    'lr_decay_ratio',
    'batch_size',
    'weight_decay',
    'randomcrop_pad',
    'train_crop',
    'image_size',
    'validate',
)
# What the log says besides, which does not keep numbers from being compared.
ENVIRONMENT = 'dtype', 'processes', 'torch'


class Run(NamedTuple):
    name: str
    seed: int | None
    records: list  # of its log, [] if there is none
    folder: Path | None  # with its weights
    damaged: bool = False  # whether its log holds something else

    def is_finished(self):
        """Whether its last epoch is done; True for a net that was only tested."""
        last = self.records[-1] if self.records else {}
        return 'evaluate' in last or bool(last) and last['epoch'] >= last['epochs']

    def state(self):
        if self.damaged:
            return 'its log is damaged'
        if not self.records:
            return 'no epoch done' if self.folder else 'missing'
        return f'epoch {self.records[-1]["epoch"]} of {self.records[-1]["epochs"]}'


def seeds_of(stems, logs) -> set:
    found = (re.fullmatch(r'(.*)_seed(\d+)(\.txt)?', p.name) for p in logs.iterdir())
    return {int(m[2]) for m in found if m and m[1] in stems}


def read_runs(stem, seeds, logs) -> list:
    """A Run for each seed, or the one of a net that was only tested, which has none."""
    tested = (logs / f'{stem}.txt').is_file()
    names = [(stem, None)] if tested else [(f'{stem}_seed{n}', n) for n in sorted(seeds)]
    runs = []
    for name, seed in names:
        folder, beside = logs / name, logs / f'{name}.txt'
        inside = folder / 'log.txt'
        log = beside if beside.is_file() and not inside.is_file() else inside
        records, damaged = [], False
        if log.is_file() and log.stat().st_size:
            try:
                records = read_log(log)
            except UserError:
                damaged = True
        if not all(map(is_record, records)):
            records, damaged = [], True
        runs.append(Run(name, seed, records, folder if folder.is_dir() else None, damaged))
    return runs


def is_record(record) -> bool:
    """Whether a log's record has an accuracy, and the numbers that go with it."""
    acc = record.get('test_acc')
    numbers = acc if isinstance(acc, list) and len(acc) == 2 else [acc]
    if 'evaluate' not in record:
        numbers = [*numbers, record.get('epoch'), record.get('epochs')]
    optional = 'n_parameters', 'multiply_adds', 'train_time', 'test_time'
    numbers = [*numbers, *(record[k] for k in optional if record.get(k) is not None)]
    return all(type(v) in (int, float) and math.isfinite(v) for v in numbers)


def schedule(record, keys=SCHEDULE) -> dict:
    """How a run was trained, as text: what the record says of `keys`."""
    special = {'lr': record.get('initial_lr'), 'dataset': data_of(record)}
    values = {key: special.get(key, record.get(key)) for key in keys}
    return {key: shown(value) for key, value in values.items() if value is not None}


def data_of(record):
    """The data set's name, and of a folder its own; None if the record has none."""
    if 'imagenetpath' in record:
        return Path(os.path.abspath(str(record['imagenetpath']))).name
    name = record.get('dataset')
    return f'folder {Path(str(record.get("dataroot"))).name}' if name == 'folder' else name


def method(record) -> dict:
    """The options of a run's method, as text: those that act, and are not the default."""
    names = ['finetune']
    if record.get('alpha'):
        names += ['alpha', 'temperature']
    if record.get('beta'):
        names += ['method', 'beta', 'beta_decay', 'at_groups', 'at_start']
        names += ['at_map', 'at_p'] if record.get('method', 'at') == 'at' else []
    groups = [0, 1, 2, 3] if 'imagenetpath' in record else [0, 1, 2]
    default = {'method': 'at', 'beta_decay': 'none', 'at_map': 'sum', 'at_p': 2, 'at_start': 1}
    default |= {'at_groups': groups, 'finetune': False}
    acting = [name for name in names if record.get(name, default.get(name)) != default.get(name)]
    return {name: shown(record[name]) for name in acting}


def shown(value) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value).replace(', ', ',')


def differences(a: Run, b: Run, methods=True) -> list:
    """The options that keep two runs from being compared. Without methods: those of the schedule,
    which the runs of two rows share."""
    a, b = a.records[-1], b.records[-1]
    x, y = schedule(a), schedule(b)
    names = [key for key in x if x[key] != y.get(key, x[key])]
    if methods:
        x, y = method(a), method(b)
        names += [key for key in x | y if x.get(key) != y.get(key)]
    return names


def split(runs) -> tuple:
    """(the finished runs that are seeds of one experiment: those of more than half, if they are
    alike; a line for each other one)."""
    done = [run for run in runs if run.is_finished()]
    groups = [[b for b in done if not differences(a, b)] for a in done]
    kept = max(groups, key=len, default=[])
    kept = kept if 2 * len(kept) > len(done) else []
    lines = []
    for run in done:
        if run not in kept:
            other = next(b for b in kept or done if differences(run, b))
            names = differences(run, other)
            lines.append(
                f'{run.name}: {describe(run, names)}; {other.name}: {describe(other, names)}'
            )
    return kept, lines


def describe(run, names) -> str:
    values = schedule(run.records[-1]) | method(run.records[-1])
    return ', '.join(f'{name} {values.get(name, "default")}' for name in names)


# ------------------------ numbers


def value_of(run, section, measure):
    """The number of a finished run in per cent; None if it has not the epochs of the Section."""

    def measured(record):
        acc = record['test_acc']
        acc = acc[section.top] if isinstance(acc, list) else acc
        return acc if measure == 'accuracy' else 100 - acc

    last = run.records[-1]
    if not section.epochs:
        return measured(last)
    first, end = section.epochs
    values = [measured(r) for r in run.records if first <= r['epoch'] <= end]
    as_published = (
        last['epochs'] == plot.PAPER_EPOCHS and plot.epoch_steps(last) == plot.PAPER_STEPS
    )
    return statistics.mean(values) if as_published and len(values) == end - first + 1 else None


def gain(alone: dict, values: dict, measure: str):
    """(mean difference, half the width of its 95 % interval, n) of the seeds that both have;
    positive if `values` are better. The interval is Student's t for pairs, None of a single one.
    None if there is no pair."""
    sign = 1 if measure == 'accuracy' else -1
    both = sorted(values.keys() & alone.keys(), key=str)
    pairs, n = [sign * (values[seed] - alone[seed]) for seed in both], len(both)
    if n == 0:
        return None
    if n == 1:
        return pairs[0], None, n
    t = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1]
    return statistics.mean(pairs), t * statistics.stdev(pairs) / math.sqrt(n), n


# ------------------------ what a run takes


def hours(runs):
    """The median time of the runs, None if their logs do not tell."""
    times = [
        sum(r.get('train_time', 0) + r.get('test_time', 0) for r in run.records) / 3600
        for run in runs
        if 'train_time' in run.records[-1]
    ]
    return statistics.median(times) if times else None


def cost(runs) -> tuple:
    """(parameters, multiply-adds of one image) of the first run, by its weights, or else by the net
    that its log tells; None if neither is known."""
    if not runs:
        return None, None
    run, last = runs[0], runs[0].records[-1]
    if 'evaluate' in last:
        return last.get('n_parameters'), last.get('multiply_adds')
    try:
        f, params = net_of(run, last)
        size = f and image_shape(run.name, Net(f, params, [last]))
    except UserError as e:  # its errors are known all the same
        print(f'warning: {e}', file=sys.stderr)
        f, params = None, None
    if f is None:
        return last.get('n_parameters'), None
    trained = sum(v.numel() for k, v in params.items() if not utils.is_statistic(k))
    return trained, multiply_adds(f, params, size, next(iter(params.values())).device)


def net_of(run, record):
    """(f, params) of a run, by its weights; by its log the net without values; (None, None) if that
    does not tell it."""
    if run.folder and (run.folder / 'model.hkl').is_file():
        return load_net(run.folder)[:2]
    if not {'depth', 'width', 'num_classes'} <= record.keys():
        return None, None
    kind = record.get('net', 'resnet' if 'imagenetpath' in record else 'wrn')
    shape = [record[k] for k in ('depth', 'width', 'num_classes')]
    with torch.device('meta'):
        return resnet.new_net(kind, *shape, not record.get('no_bn'), not record.get('no_pool_relu'))
