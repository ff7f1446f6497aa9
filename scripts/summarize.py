"""The tables of the paper, and of the controls, from the logs of the runs: the paper's numbers
beside ours.

    python scripts/summarize.py table1 logs/epochs200 --save table1.md
    # held-out error against --beta
    python scripts/summarize.py beta logs/beta_epochs200 --save beta.svg

TABLE is table1 to table5, convergence, cifar100, controls or beta, each made by the script of that
name. Ours is the last epoch's error, median and range over the seeds. The gain over the student
alone is taken seed by seed: its mean, and the 95 % interval of Student's t. What is missing is said
to be missing: no number stands for a run that has not finished.
"""

import itertools
import math
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plot
import resnet
import utils
from support import program
from support.devices import multiply_adds
from support.files import check_writable, write_text
from support.logs import read_log
from support.options import Parser, number
from support.program import UserError, listing
from support.weights import load_net

# ------------------------ the tables


class Section(NamedTuple):
    """Rows that are compared with the first of them, the student alone. A row: what it is, the
    paper's number in per cent (None where there is none), and the name of its runs without _seedN.
    A name with * stands for a row for each --beta.

    measure: 'error' or 'accuracy'. top: 0 of top-1, 1 of top-5. epochs: (first, last) of which the
    mean is taken, () for the last epoch alone."""

    title: str
    rows: list
    measure: str = 'error'
    top: int = 0
    epochs: tuple = ()


# Of the figure: what is compared, of which epochs, and the paper's student, AT and F-ActT.
CONVERGENCE = [
    (f'mean of epochs {first}-{last}', (first, last), *means)
    for (first, last), *means in zip(plot.STRETCHES, *plot.PAPER_MEANS.values())
]
CONVERGENCE.append(('last epoch', (), 8.77, 7.93, 8.51))


def pair(title, student, teacher, numbers, methods='student AT F-ActT KD AT+KD teacher', **more):
    """The Section of a student and its teacher; numbers: the paper's, in the order of `methods`."""
    prefix = {'AT': 'at', 'F-ActT': 'factt', 'KD': 'kd', 'AT+KD': 'at_kd'}
    nets = {'student': student, 'teacher': teacher}
    rows = [
        (m.replace('+', ' + '), number, nets.get(m) or f'{prefix[m]}_{student}_from_{teacher}')
        for m, number in zip(methods.split(), numbers)
    ]
    return Section(title, rows, **more)


TABLES = {
    'table1': [
        pair(title, student, teacher, errors)
        for title, student, teacher, *errors in (
            ('NIN-thin from NIN-wide', 'nin_96', 'nin_192', 9.38, 8.93, 9.05, 8.55, 8.33, 7.28),
            ('WRN-16-1 from WRN-16-2', 'wrn_16_1', 'wrn_16_2', 8.77, 7.93, 8.51, 7.41, 7.51, 6.31),
            ('WRN-16-1 from WRN-40-1', 'wrn_16_1', 'wrn_40_1', 8.77, 8.25, 8.62, 8.39, 8.01, 6.58),
            ('WRN-16-2 from WRN-40-2', 'wrn_16_2', 'wrn_40_2', 6.31, 5.85, 6.24, 6.08, 5.71, 5.23),
        )
    ],
    'table2': [
        Section(
            'WRN-16-1 from WRN-16-2, by map',
            [
                ('student, no map', 8.77, 'wrn_16_1'),
                ('sum |A|', 7.99, 'at_p1_wrn_16_1_from_wrn_16_2'),
                ('sum |A|^2', 7.93, 'at_wrn_16_1_from_wrn_16_2'),
                ('sum |A|^4', 8.09, 'at_p4_wrn_16_1_from_wrn_16_2'),
                ('max |A|', 8.08, 'at_max_wrn_16_1_from_wrn_16_2'),
            ],
        ),
        Section(
            'WRN-16-1 from WRN-16-2, sum |A|^2, by group',
            [
                ('student, no group', 8.77, 'wrn_16_1'),
                ('first group', 8.11, 'at_group0_wrn_16_1_from_wrn_16_2'),
                ('second group', 7.96, 'at_group1_wrn_16_1_from_wrn_16_2'),
                ('third group', 7.97, 'at_group2_wrn_16_1_from_wrn_16_2'),
                ('all three', 7.93, 'at_wrn_16_1_from_wrn_16_2'),
            ],
        ),
    ],
    'table3': [
        Section(
            'NIN-thin without batch norm',
            [
                ('baseline', 13.5, 'nin_96_no_bn'),
                ('min-l2', 12.5, 'minl2_nin_96_no_bn'),
                ('gradient-based AT', 12.1, 'grad_nin_96_no_bn_from_nin_192'),
                ('KD', 12.1, 'kd_nin_96_no_bn_from_nin_192'),
                ('symmetry norm', 11.8, 'sym_nin_96_no_bn'),
                ('activation-based AT', 11.2, 'at_nin_96_no_bn_from_nin_192_no_pool_relu'),
            ],
        )
    ],
    'table4': [
        Section(
            title,
            [
                ('student ResNet-18', student, f'{data}_resnet_18'),
                ('KD', kd, f'kd_{data}_resnet_18_from_resnet_34'),
                ('AT', at, f'at_{data}_resnet_18_from_resnet_34'),
                ('teacher ResNet-34', teacher, f'{data}_resnet_34'),
            ],
        )
        for title, data, student, kd, at, teacher in (
            ('CUB', 'cub', 28.5, 27.0, 27.0, 26.5),
            ('Scenes', 'scenes', 28.2, 28.1, 27.1, 26.0),
        )
    ],
    'table5': [
        Section(
            title,
            [
                ('student ResNet-18', student, 'resnet_18'),
                ('AT', at, 'at_resnet_18_from_resnet_34'),
                ('teacher ResNet-34', teacher, 'resnet_34'),
            ],
            top=top,
        )
        for title, top, student, at, teacher in (
            ('top-1', 0, 30.4, 29.3, 26.1),
            ('top-5', 1, 10.8, 10.0, 8.3),
        )
    ],
    'convergence': [
        Section(
            title,
            [
                ('student WRN-16-1', student, 'wrn_16_1'),
                ('AT', at, 'at_wrn_16_1_from_wrn_16_2'),
                ('F-ActT', factt, 'factt_wrn_16_1_from_wrn_16_2'),
            ],
            epochs=epochs,
        )
        for title, epochs, student, at, factt in CONVERGENCE
    ],
    'cifar100': [
        pair(title, student, 'wrn_40_2', found, 'student KD AT teacher', measure='accuracy')
        for title, student, *found in (
            ('WRN-16-2 from WRN-40-2', 'wrn_16_2', 73.26, 74.92, 74.08, 75.61),
            ('WRN-40-1 from WRN-40-2', 'wrn_40_1', 71.98, 73.54, 72.77, 75.61),
        )
    ],
    'controls': [
        Section(
            'WRN-16-1',
            [
                ('student', 8.77, 'wrn_16_1'),
                ('AT from WRN-16-2', 7.93, 'at_wrn_16_1_from_wrn_16_2'),
                ('AT from an untrained WRN-16-2', None, 'at_wrn_16_1_from_untrained_wrn_16_2'),
                ('AT from another WRN-16-1', None, 'at_wrn_16_1_from_wrn_16_1'),
                ('alone, for as long as with AT', None, 'wrn_16_1_equal_time'),
            ],
        )
    ],
    'beta': [
        Section(
            'WRN-16-1 from WRN-16-2, held-out training images',
            [
                ('student', None, 'wrn_16_1'),
                ('KD', None, 'kd_wrn_16_1_from_wrn_16_2'),
                ('AT', None, 'at_beta*_wrn_16_1_from_wrn_16_2'),
                ('AT + KD', None, 'at_kd_beta*_wrn_16_1_from_wrn_16_2'),
                ('teacher', None, 'wrn_16_2'),
            ],
        )
    ],
}
# What the paper's numbers are, where they are not single runs.
PUBLISHED = {
    'table1': "The paper's numbers are medians of 5 seeds.",
    'table2': "The paper's numbers are medians of 5 seeds.",
    'convergence': "The paper's numbers are read off the curves, about ±0.1; "
    "those of the last epoch are Table 1's.",
    'cifar100': 'The published numbers are those of RepDistiller, means of 5 runs, '
    'whose border, normalisation, initial batch norms and momentum at drops differ from ours.',
}

# What a log tells of how a run was trained. The options that make a row what it is are told row by
# row, see method_of.
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
    'dtype',
    'processes',
    'torch',
)

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom (Abramowitz & Stegun, table 26.10).
# Beyond, that of 30: a little too wide.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

parser = Parser(__doc__)
add = parser.add_argument
add('table', metavar='TABLE', choices=list(TABLES), help=', '.join(TABLES))
add(
    'logs',
    metavar='LOGS',
    help='the folder of the runs: LOGS/NAME_seedN/log.txt, or LOGS/NAME_seedN.txt',
)
add(
    '--seeds',
    nargs='+',
    type=number(int, 0),
    metavar='N',
    help='seeds of the table (default: those that its runs have)',
)
add(
    '--betas',
    nargs='+',
    type=number(above=0),
    metavar='B',
    help='beta: its values in the table (default: those that its runs have)',
)
add(
    '--save',
    nargs='+',
    metavar='FILE',
    help='also write the table, .md; or, with beta, a picture, .svg or .png',
)
add(
    '--equal_time',
    type=number(int, 0),
    metavar='EPOCHS',
    help='controls: print only how long the student alone trains in the time of EPOCHS of AT',
)


def main(argv=None):
    opt, _ = parser.parse(argv)
    logs = Path(opt.logs)
    if not logs.is_dir():
        raise UserError(f'{logs}: no such folder; give the one that holds the runs')
    suffixes = ['.md', '.svg', '.png'] if opt.table == 'beta' else ['.md']
    files = [Path(file) for file in opt.save or []]
    for file in files:
        if file.suffix not in suffixes:
            raise UserError(f'--save {file}: must end in {" or ".join(suffixes)}')
        check_writable(file.parent)
    if opt.equal_time is not None:
        if opt.table != 'controls':
            raise UserError('--equal_time: goes with controls')
        print(equal_time(logs, opt.equal_time))
        return
    if opt.betas and opt.table != 'beta':
        raise UserError('--betas: goes with beta')
    sections = [s._replace(rows=expand(s.rows, logs, opt.betas)) for s in TABLES[opt.table]]
    stems = {stem for section in sections for _, _, stem in section.rows}
    # Not those of the student alone, which may be there for other tables.
    compared = {stem for section in sections for _, _, stem in section.rows[1:]}
    seeds = opt.seeds or seeds_of(compared, logs) or seeds_of(stems, logs)
    runs = {row[2]: read_runs(row[2], seeds, logs) for s in sections for row in s.rows}
    text = '\n\n'.join([table(sections, runs), *notes(opt.table, sections, runs, logs)]) + '\n'
    print(text)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == '.md':
            write_text(file, text)
        else:
            plot.write_figure(file, draw_beta(runs, sections[0]))
        print(f'wrote {file}')


# ------------------------ runs


class Run(NamedTuple):
    name: str
    seed: int | None
    records: list  # of its log, [] where there is none
    folder: Path | None  # with its weights
    damaged: bool = False  # what its log holds is no record of ours

    def finished(self):
        """Whether its last epoch is done; so it is of a net that was only tested."""
        last = self.records[-1] if self.records else {}
        return 'evaluate' in last or bool(last) and last['epoch'] >= last['epochs']

    def state(self):
        if self.damaged:
            return 'its log is damaged'
        if not self.records:
            return 'no epoch done' if self.folder else 'missing'
        return f'epoch {self.records[-1]["epoch"]} of {self.records[-1]["epochs"]}'


def log_of(name, logs):
    """The log of a run: that in its folder, or a copy of it that bears its name."""
    inside, beside = logs / name / 'log.txt', logs / f'{name}.txt'
    return beside if beside.is_file() and not inside.is_file() else inside


def seeds_of(stems, logs) -> list:
    found = (re.fullmatch(r'(.*)_seed(\d+)(\.txt)?', p.name) for p in logs.iterdir())
    return sorted({int(m[2]) for m in found if m and m[1] in stems})


def expand(rows, logs, betas=None) -> list:
    """The rows with one for each of `betas` in place of those whose name holds a *, in rising
    order; betas None: those that any of these rows has."""
    found = {stem: betas_of(stem, logs) for _, _, stem in rows if '*' in stem}
    betas = sorted(set(betas or itertools.chain(*found.values())))
    expanded = []
    for label, paper, stem in rows:
        if '*' not in stem:
            expanded.append((label, paper, stem))
            continue
        for beta in betas:
            name = stem.replace('*', found[stem].get(beta, f'{beta:g}'))
            expanded.append((f'{label}, beta {beta:g}', paper, name))
    return expanded


def betas_of(stem, logs) -> dict:
    """{beta: as the name has it} of the runs whose name has a number in place of the *."""
    number_of = r'(\d+(?:\.\d*)?(?:e[+-]?\d+)?)'
    pattern = re.compile(re.escape(stem).replace(re.escape('*'), number_of) + r'_seed\d+(\.txt)?')
    written = [m[1] for m in (pattern.fullmatch(p.name) for p in logs.iterdir()) if m]
    return {float(text): text for text in written}


def read_runs(stem, seeds, logs) -> list:
    """A Run for each seed, or the one of a net that was only tested, which has none."""
    tested = logs / f'{stem}.txt'
    names = [(stem, None)] if tested.is_file() else [(f'{stem}_seed{n}', n) for n in seeds]
    runs = []
    for name, seed in names:
        log, folder = log_of(name, logs), logs / name
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
    """Whether a log's record tells an accuracy, and of what."""
    acc = record.get('test_acc')
    numbers = acc if isinstance(acc, list) and len(acc) == 2 else [acc]
    if 'evaluate' not in record:
        numbers = [*numbers, record.get('epoch'), record.get('epochs')]
    costs = [record[k] for k in ('n_parameters', 'multiply_adds') if record.get(k) is not None]
    times = [record['train_time']] if 'train_time' in record else []
    return all(type(v) in (int, float) and math.isfinite(v) for v in numbers + costs + times)


def value_of(run, section):
    """The number of a finished run in per cent, None where it is of another schedule than the
    section's epochs, or lacks one of them."""

    def measured(record):
        acc = record['test_acc']
        acc = acc[section.top] if isinstance(acc, list) else acc
        return acc if section.measure == 'accuracy' else 100 - acc

    if not section.epochs:
        return measured(run.records[-1])
    first, last = section.epochs
    values = [measured(r) for r in run.records if first <= r['epoch'] <= last]
    whole = len(values) == last - first + 1
    return statistics.mean(values) if whole and has_paper_schedule(run) else None


def has_paper_schedule(run) -> bool:
    last = run.records[-1]
    return last['epochs'] == plot.PAPER_EPOCHS and plot.epoch_steps(last) == plot.PAPER_STEPS


def values_of(runs, section) -> dict:
    """{seed: number} of those runs that have one; none where the runs of a row are not alike."""
    if differing(runs):
        return {}
    values = {run.seed: value_of(run, section) for run in runs if run.finished()}
    return {seed: v for seed, v in values.items() if v is not None}


def differing(runs) -> list:
    """In what the finished runs of one row differ that makes them no seeds of one experiment."""
    records = [run.records[-1] for run in runs if run.finished()]
    values = {
        'epochs': {r.get('epochs') for r in records},
        'dataset': {data_of(r) for r in records},
        'validate': {r.get('validate') for r in records},
    }
    return [name for name, found in values.items() if len(found) > 1]


def unlike(alone, runs) -> list:
    """In what a row's data is not that of the student alone, so that its gain means nothing."""
    return [name for name in differing([*alone, *runs]) if name != 'epochs']


def equal_time(logs, epochs) -> int:
    """Epochs that WRN-16-1 alone trains in the time of `epochs` with AT, by the medians of the
    logs' train_time: of each seed that has both runs, and the median of these."""

    def times(stem):
        runs = read_runs(stem, seeds_of({stem}, logs), logs)
        found = {r.seed: [v['train_time'] for v in r.records] for r in runs if r.finished()}
        return {seed: statistics.median(v) for seed, v in found.items()}

    at, alone = 'at_wrn_16_1_from_wrn_16_2', 'wrn_16_1'
    with_at, without = times(at), times(alone)
    both = sorted(with_at.keys() & without.keys())
    if not both:
        raise UserError(f'{logs}: no seed has finished both {at}_seedN and {alone}_seedN')
    if not all(without[seed] for seed in both):
        raise UserError(f'{logs}: the runs {alone}_seedN have trained no epoch to measure')
    return round(epochs * statistics.median(with_at[seed] / without[seed] for seed in both))


# ------------------------ numbers


def gain(alone: dict, values: dict, measure: str):
    """(mean difference, half the width of its 95 % interval, n) of the seeds that both have;
    positive where `values` are better. The interval is Student's t for pairs, None of a single one.
    None where there is no pair."""
    sign = 1 if measure == 'accuracy' else -1
    both = sorted(values.keys() & alone.keys(), key=str)
    differences, n = [sign * (values[seed] - alone[seed]) for seed in both], len(both)
    if n == 0:
        return None
    mean = statistics.mean(differences)
    if n == 1:
        return mean, None, n
    t = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1]
    return mean, t * statistics.stdev(differences) / math.sqrt(n), n


def cost(runs) -> tuple:
    """(parameters, multiply-adds of one image), of the first finished run, None where that cannot
    be told. They are those of its weights; of a log alone, of the net that it tells."""
    for run in runs:
        last = run.records[-1] if run.finished() else {}
        if 'evaluate' in last:
            return last.get('n_parameters'), last.get('multiply_adds')
        if last:
            try:
                f, params = net_of(run, last)
            except UserError as e:  # its errors are known all the same
                print(f'warning: {e}', file=sys.stderr)
                return last.get('n_parameters'), None
            if f is None:
                return last.get('n_parameters'), None
            trained = sum(v.numel() for k, v in params.items() if not utils.is_statistic(k))
            size = [last.get('image_size', 32)] * 2
            device = next(iter(params.values())).device
            return trained, multiply_adds(f, params, size, device)
    return None, None


def net_of(run, record):
    """(f, params) of a run, by its weights; by its log the net without values; (None, None) where
    that does not tell it."""
    if run.folder and (run.folder / 'model.hkl').is_file():
        return load_net(run.folder)[:2]
    if not {'depth', 'width', 'num_classes'} <= record.keys():
        return None, None
    kind = record.get('net', 'resnet' if 'imagenetpath' in record else 'wrn')
    bn, pool_relu = not record.get('no_bn'), not record.get('no_pool_relu')
    shape = [record[k] for k in ('depth', 'width', 'num_classes')]
    with torch.device('meta'):
        return resnet.new_net(kind, *shape, bn, pool_relu)


# ------------------------ the table


def table(sections, runs) -> str:
    """As Markdown, a line a row."""
    measure = sections[0].measure
    numbers = ['published' if measure == 'accuracy' else 'paper', f'here: {measure}, %']
    head = ['parameters', 'multiply-adds', *numbers, 'range', 'n', 'gain over the student']
    costs = {stem: cost(of_stem) for stem, of_stem in runs.items()}
    lines = []
    for section in sections:
        lines.append([f'**{section.title}**', *[''] * len(head)])
        alone = values_of(runs[section.rows[0][2]], section)
        for i, (label, paper, stem) in enumerate(section.rows):
            values = values_of(runs[stem], section)
            of_a_method = i > 0 and not label.startswith('teacher')
            comparable = of_a_method and not unlike(runs[section.rows[0][2]], runs[stem])
            found = gain(alone, values, measure) if comparable else None
            row = [label, *costs_shown(*costs[stem]), shown(paper), *median_shown(values)]
            lines.append([*row, gain_shown(found, len(values))])
    return plot.markdown([['', *head], *lines])


def shown(value):
    return '' if value is None else f'{value:.2f}'


def costs_shown(parameters, multiply_adds):
    return (
        '' if parameters is None else f'{parameters:,}',
        '' if multiply_adds is None else f'{multiply_adds / 1e6:,.1f}M',
    )


def median_shown(values):
    if not values:
        return '—', '', ''
    low, high = min(values.values()), max(values.values())
    spread = f'{low:.2f}–{high:.2f}' if len(values) > 1 else ''
    return f'{statistics.median(values.values()):.2f}', spread, str(len(values))


def gain_shown(found, runs):
    """A gain, with the number of its pairs where that is not the row's number of runs."""
    if found is None:
        return ''
    mean, half, n = found
    mean = round(mean, 2) + 0.0  # no -0.00
    spread = '' if half is None else f' ± {half:.2f}'
    pairs = '' if n == runs == 1 else f' (n = {n})'
    return f'{mean:+.2f}{spread}{pairs}'


def notes(name, sections, runs, logs) -> list:
    """What stands beneath a table: what its numbers are, how the runs were trained, and what is
    missing."""
    every = [run for of_stem in runs.values() for run in of_stem]
    finished = [run for run in every if run.finished() and 'epoch' in run.records[-1]]
    of = 'the mean over the epochs of each section' if name == 'convergence' else 'the last epoch'
    caption = (
        f'{logs}: {of}, median over n seeds. Gain: mean over the seeds of the points won over the '
        'student alone of the same seed, the first row, ± the 95 % interval. '
    )
    parts = [(caption + PUBLISHED.get(name, '')).strip()]
    if name == 'convergence' and not all(map(has_paper_schedule, finished)):
        parts.append(
            "Runs of another schedule than the paper's 200 epochs "
            'have no means over its stretches of epochs.'
        )
    if finished:
        parts.append(bullets('Trained with:', schedules(finished)))
        parts.append(bullets('By method:', methods(runs)))
    odd = {stem: differing(of_stem) for stem, of_stem in runs.items()}
    firsts = {stem: s.rows[0][2] for s in sections for _, _, stem in s.rows[1:]}
    far = {stem: unlike(runs[first], runs[stem]) for stem, first in firsts.items()}
    if lines := [f'{stem}: of another {" and ".join(v)}' for stem, v in far.items() if v]:
        parts.append(
            bullets('Not trained and tested as the student alone is, so without a gain:', lines)
        )
    if lines := [f'{stem}: its runs differ in {" and ".join(v)}' for stem, v in odd.items() if v]:
        parts.append(bullets('Not comparable, and left out above:', lines))
    if lines := missing(runs):
        parts.append(bullets('Not finished, and left out above:', lines))
    if not every:
        parts.append(f'No run of this table is in {logs}.')
    return parts


def bullets(title, lines) -> str:
    return '\n'.join([title, '', *(f'- {line}' for line in lines)])


def told(value):
    return f'{value:g}' if isinstance(value, float) else str(value).replace(', ', ',')


def schedules(runs) -> list:
    """A line for what all runs have in common, and one for each option that some have otherwise."""
    common, different = [], []
    for key in SCHEDULE:
        having = {}
        for run in runs:
            record = run.records[-1]
            special = {'lr': record.get('initial_lr'), 'dataset': data_of(record)}
            value = special[key] if key in special else record.get(key)
            if value is not None:
                having.setdefault(told(value), []).append(run.name)
        if len(having) == 1:
            common.append(f'{key} {next(iter(having))}')
        elif having:
            most = max(having, key=lambda v: len(having[v]))
            rest = [f'{v} ({listing(names, 8)})' for v, names in having.items() if v != most]
            different.append(
                f'runs differ in {key}: {"; ".join([f"{most} ({len(having[most])} runs)", *rest])}'
            )
    return [', '.join(common), *different]


def data_of(record) -> str:
    """The data set's name, and of a folder its own."""
    if 'imagenetpath' in record:
        return Path(str(record['imagenetpath'])).name
    name = str(record.get('dataset'))
    return f'folder {Path(str(record.get("dataroot"))).name}' if name == 'folder' else name


def method_of(record) -> str:
    """The options of a run's method, by its log: those that act, and are not the usual ones."""
    names = ['finetune']
    if record.get('alpha'):
        names += ['alpha', 'temperature']
    if record.get('beta'):
        names += ['method', 'beta', 'beta_decay', 'at_groups', 'at_start']
        names += ['at_map', 'at_p'] if record.get('method', 'at') == 'at' else []
    groups = [0, 1, 2, 3] if 'imagenetpath' in record else [0, 1, 2]
    usual = {'method': 'at', 'beta_decay': 'none', 'at_map': 'sum', 'at_p': 2, 'at_start': 1}
    usual |= {'at_groups': groups, 'finetune': False}
    acting = [name for name in names if record.get(name, usual.get(name)) != usual.get(name)]
    return ', '.join(f'{name} {told(record[name])}' for name in acting) or 'labels alone'


def methods(runs) -> list:
    """A line for each method, with the rows that were trained by it; where one row has several,
    with their runs."""
    lines = {}
    for stem, of_stem in runs.items():
        done = [run for run in of_stem if run.finished() and 'epoch' in run.records[-1]]
        found = {run.name: method_of(run.records[-1]) for run in done}
        for name, method in found.items():
            row = stem if len(set(found.values())) == 1 else name
            lines.setdefault(method, {})[row] = None
    return [f'{method}: {", ".join(rows)}' for method, rows in lines.items()]


def missing(runs) -> list:
    """A line for each row that lacks a run, with how far its unfinished ones are."""
    lines = []
    for stem, of_stem in runs.items():
        lacking = {}
        for run in of_stem:
            if not run.finished():
                lacking.setdefault(run.state(), []).append(str(run.seed))
        for state, seeds in lacking.items():
            lines.append(f'{stem}: {state} (seed{"s" * (len(seeds) > 1)} {", ".join(seeds)})')
    return lines


# ------------------------ error against beta


def draw_beta(runs, section):
    """Held-out error against --beta, one curve for AT and one for AT + KD; KD and the student alone
    as lines. Points are medians, bars ranges over seeds."""
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout='constrained')
    colours = {'student': '#555555', 'KD': '#009e73', 'AT': '#0072b2', 'AT + KD': '#d55e00'}
    curves, drawn = {}, False
    for label, _, stem in section.rows:
        values = values_of(runs[stem], section)
        if not values:
            continue
        if ', beta ' in label:
            method, beta = label.split(', beta ')
            curves.setdefault(method, []).append((float(beta), *spread(values)))
        elif label in colours:
            middle = statistics.median(values.values())
            axes.axhline(middle, color=colours[label], linestyle='--', linewidth=1.3, label=label)
        drawn = True
    if not drawn:
        raise UserError('beta: no finished run to draw')
    for method, points in curves.items():
        beta, middle, below, above = zip(*points)
        style = {'marker': 'o', 'markersize': 4, 'capsize': 2, 'linewidth': 1.8}
        axes.errorbar(beta, middle, [below, above], color=colours[method], label=method, **style)
    axes.set_xscale('log')
    axes.set(xlabel='beta', ylabel='error on held-out training images, %')
    axes.set_title('WRN-16-1 from WRN-16-2')
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(framealpha=0.9)
    return figure


def spread(values):
    middle = statistics.median(values.values())
    return middle, middle - min(values.values()), max(values.values()) - middle


if __name__ == '__main__':
    sys.exit(program.call_main(main))
