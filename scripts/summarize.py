"""Print a table of the paper, or of the controls, from the logs of its runs: the paper's numbers
next to ours.

    python scripts/summarize.py table1 logs/epochs200 --save table1.md
    # held-out error against --beta
    python scripts/summarize.py beta logs/beta_epochs200 --save beta.svg

The rows are the runs in the list of the table's script, such as scripts/table1.sh. Ours is the
error of the last epoch: median and range over the seeds. The gain over the student alone is taken
seed by seed: its mean, and the 95 % interval of Student's t. Runs that were trained differently
from most runs of their row are left out and listed, and so are unfinished runs.
"""

import itertools
import os
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plot
from support import program
from support.files import check_file, write_text
from support.options import Parser, number
from support.program import UserError, check_reachable, listing
from table_list import is_chosen, read_script
from table_runs import (
    ENVIRONMENT,
    SCHEDULE,
    cost,
    differences,
    gain,
    hours,
    method,
    read_runs,
    schedule,
    seeds_of,
    split,
    value_of,
)

# What the paper's numbers are, if they are not single runs.
PUBLISHED = {
    'table1': "The paper's numbers are medians of 5 seeds.",
    'table2': "The paper's numbers are medians of 5 seeds.",
    'convergence': "The paper's numbers are read off the curves, about ±0.1; "
    "those of the last epoch are Table 1's. Runs of another schedule than the paper's 200 epochs "
    'have no means over its ranges of epochs.',
    'cifar100': "The published numbers are RepDistiller's, means of 5 runs. "
    'Its border, normalisation, initial batch norms and momentum at drops differ from ours.',
}


class Row(NamedTuple):
    label: str
    paper: float | None  # the paper's number in per cent
    stem: str  # the name of its runs without _seedN


class Section(NamedTuple):
    """Rows that are compared with the first of them, the student alone."""

    title: str
    rows: list
    top: int = 0  # 0: top-1, 1: top-5
    epochs: tuple = ()  # (first, last) of which the mean is taken; (): the last epoch


def read_lists():
    """{table: list} of the scripts that end in a table."""
    lists = map(read_script, sorted(Path(__file__).parent.glob('*.sh')))
    return {line.split()[1]: li for li in lists for line in li.last if line.startswith('summarize')}


LISTS = read_lists()

parser = Parser(__doc__)
add = parser.add_argument
add('table', metavar='TABLE', choices=list(LISTS), help=', '.join(LISTS))
add('logs', metavar='LOGS', help='folder of the runs: NAME_seedN/log.txt or NAME_seedN.txt')
seeds_help = 'seeds that each row should have; all that are finished in LOGS count'
add('--seeds', nargs='+', type=number(int, 0), metavar='N', help=seeds_help)
only_help = 'leave out rows whose runs match none of these (default: $ONLY, or all rows)'
add('--only', metavar='PATTERNS', help=only_help)
betas_help = 'beta: its values in the table (default: those that its runs have)'
add('--betas', nargs='+', type=number(above=0), metavar='B', help=betas_help)
save_help = 'also write the table, .md; or, with beta, a picture, .svg or .png'
add('--save', nargs='+', metavar='FILE', help=save_help)
equal_help = 'controls: only print how many epochs of the student take as long as EPOCHS of AT'
add('--equal_time', type=number(int, 0), metavar='EPOCHS', help=equal_help)


def main(argv=None):
    opt, _ = parser.parse(argv)
    logs = Path(opt.logs)
    if not os.path.isdir(logs):
        check_reachable(logs)
        raise UserError(f'{logs}: no such folder; give the one that holds the runs')
    suffixes = ['.md', '.svg', '.png'] if opt.table == 'beta' else ['.md']
    files = [Path(file) for file in opt.save or []]
    for file in files:
        if file.suffix not in suffixes:
            raise UserError(f'--save {file}: must end in {" or ".join(suffixes)}')
        check_file(file)
    for option, table in ('equal_time', 'controls'), ('betas', 'beta'):
        if getattr(opt, option) is not None and opt.table != table:
            raise UserError(f'--{option}: has no effect with {opt.table}, only with {table}')
    if opt.equal_time is not None:
        print(equal_time(logs, opt.equal_time))
        return
    table = Table(opt, logs)
    text = '\n\n'.join([table.markdown(), *table.notes()]) + '\n'
    print(text)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == '.md':
            write_text(file, text)
        else:
            plot.write_figure(file, draw_beta(table))
        print(f'wrote {file}')


# ------------------------ rows


def sections_of(name: str) -> list:
    """The Sections of a table. A list with top-1 and top-5 errors gives two Sections for each of
    its own, and the list of the figure one for each range of epochs."""
    found = []
    for title, lines in LISTS[name].sections:
        papers = [line.paper or [None] for line in lines]
        if name == 'convergence':
            for i, (first, last) in enumerate(plot.STRETCHES):
                rows = [Row(v.row, plot.PAPER_MEANS[v.row][i], v.stem()) for v in lines]
                mean = f'mean of epochs {first}-{last}'
                found.append(Section(mean, rows, epochs=(first, last)))
        for top in range(max(map(len, papers))):
            rows = [Row(v.row, paper[top], v.stem()) for v, paper in zip(lines, papers)]
            suffix = f', top-{(1, 5)[top]}' if len(papers[0]) > 1 else ''
            found.append(Section(title + suffix, rows, top))
    return found


def expand(rows, logs, betas=None) -> list:
    """The rows, those with ${BETA} in their name once for each of `betas`, in rising order; betas
    None: those that any of these rows has."""
    found = {row.stem: betas_of(row.stem, logs) for row in rows if '${BETA}' in row.stem}
    betas = sorted(set(betas or itertools.chain(*found.values())))
    expanded = []
    for row in rows:
        if row.stem not in found:
            expanded.append(row)
            continue
        for beta in betas:
            stem = row.stem.replace('${BETA}', found[row.stem].get(beta, f'{beta:g}'))
            expanded.append(row._replace(label=f'{row.label}, beta {beta:g}', stem=stem))
    return expanded


def betas_of(stem, logs) -> dict:
    """{beta: as the name has it} of the runs whose name has a number in place of ${BETA}."""
    before, after = map(re.escape, stem.split('${BETA}'))
    pattern = re.compile(rf'{before}(\d+(?:\.\d*)?(?:e[+-]?\d+)?){after}_seed\d+(\.txt)?')
    written = [m[1] for m in (pattern.fullmatch(p.name) for p in logs.iterdir()) if m]
    return {float(text): text for text in written}


def equal_time(logs, epochs) -> int:
    """Epochs that the student alone trains in the time of `epochs` with AT, by the medians of the
    logs' train_time: of each seed that has both runs, and the median of these."""
    alone, at = [row.stem for row in sections_of('controls')[0].rows[:2]]

    def times(stem):
        runs = read_runs(stem, seeds_of({stem}, logs), logs)
        found = {r.seed: [v['train_time'] for v in r.records] for r in runs if r.is_finished()}
        return {seed: statistics.median(v) for seed, v in found.items()}

    with_at, without = times(at), times(alone)
    both = sorted(with_at.keys() & without.keys())
    if not both:
        raise UserError(f'{logs}: no seed has finished both {at}_seedN and {alone}_seedN')
    if not all(without[seed] for seed in both):
        raise UserError(f'{logs}: the runs {alone}_seedN have trained no epoch to measure')
    return round(epochs * statistics.median(with_at[seed] / without[seed] for seed in both))


# ------------------------ the table


class Table:
    """The sections of a table and the runs of their rows."""

    def __init__(self, opt, logs: Path):
        self.name, self.logs = opt.table, logs
        self.measure = 'accuracy' if opt.table == 'cifar100' else 'error'
        self.middle = statistics.mean if opt.table == 'cifar100' else statistics.median
        sections = [
            s._replace(rows=expand(s.rows, logs, opt.betas)) for s in sections_of(opt.table)
        ]
        stems = [row.stem for section in sections for row in section.rows]
        # Not the student alone, of which other tables may have more seeds.
        compared = {row.stem for section in sections for row in section.rows[1:]}
        seeds = seeds_of(compared, logs) | set(opt.seeds or []) or seeds_of(stems, logs)
        self.runs = {stem: read_runs(stem, seeds, logs) for stem in stems}
        parts = {stem: split(runs) for stem, runs in self.runs.items()}
        self.kept = {stem: kept for stem, (kept, _) in parts.items()}
        self.dropped = {stem: lines for stem, (_, lines) in parts.items()}  # a line for each run
        only = opt.only or os.environ.get('ONLY', '')
        names = {s: [run.name for run in self.runs[s]] or [f'{s}_seed0'] for s in stems}
        self.rows = [s for s in names if any(is_chosen(name, only) for name in names[s])]
        self.sections = [s for s in sections if any(row.stem in self.rows for row in s.rows)]
        if not self.sections:
            raise UserError(f'--only {only}: no run of {opt.table} has such a name')

    def values(self, row, section) -> dict:
        """{seed: number in per cent} of a row's runs."""
        found = {run.seed: value_of(run, section, self.measure) for run in self.kept[row.stem]}
        return {seed: value for seed, value in found.items() if value is not None}

    def strangers(self, row, section) -> list:
        """(seed, what differs) of the row's runs that were not trained as the student alone was."""
        alone = {run.seed: run for run in self.kept[section.rows[0].stem]}
        # A student of the controls trains longer on purpose.
        allowed = {'epochs', 'epoch_step'} if self.name == 'controls' else set()
        pairs = [(run, alone[run.seed]) for run in self.kept[row.stem] if run.seed in alone]
        found = [(run.seed, differences(run, other, methods=False)) for run, other in pairs]
        return [(seed, names) for seed, names in found if set(names) - allowed]

    def gain(self, row, section):
        """As `gain`, between runs of one schedule."""
        if row == section.rows[0] or row.label == 'teacher':
            return None
        apart = [seed for seed, _ in self.strangers(row, section)]
        values = {s: v for s, v in self.values(row, section).items() if s not in apart}
        return gain(self.values(section.rows[0], section), values, self.measure)

    def markdown(self) -> str:
        """A line for each row."""
        published = 'published' if self.name == 'cifar100' else 'paper'
        here = f'here: {self.measure}, %'
        head = ['', 'parameters', 'multiply-adds', published, here, 'range', 'n']
        head += ['gain over the student', 'hours']
        costs = {stem: cost(self.kept[stem]) for stem in self.rows}
        lines = [head]
        for section in self.sections:
            lines.append([f'**{section.title}**', *[''] * (len(head) - 1)])
            for row in section.rows:
                if row.stem in self.rows:
                    lines.append(self.line(row, section, *costs[row.stem]))
        return plot.markdown(lines)

    def line(self, row, section, parameters, multiply_adds):
        values = self.values(row, section)
        time = hours(self.kept[row.stem])
        low, high = min(values.values(), default=0), max(values.values(), default=0)
        return [
            row.label,
            '' if parameters is None else f'{parameters:,}',
            '' if multiply_adds is None else f'{multiply_adds / 1e6:,.1f}M',
            '' if row.paper is None else f'{row.paper:.2f}',
            f'{self.middle(values.values()):.2f}' if values else '—',
            f'{low:.2f}–{high:.2f}' if len(values) > 1 else '',
            str(len(values)) if values else '',
            format_gain(self.gain(row, section), len(values)),
            '' if time is None else f'{time:.1f}' if time >= 1 else f'{time:.2g}',
        ]

    # ------------------------ notes below it

    def notes(self) -> list:
        mean = 'the mean over the epochs of each section'
        of = mean if self.name == 'convergence' else 'the last epoch'
        middle = 'mean' if self.name == 'cifar100' else 'median'
        caption = (
            f'{self.logs}: {of}, {middle} over n seeds. Gain: points better than the student alone '
            '(first row) with the same seed, mean over the seeds ± the 95 % interval. '
        )
        lists = {
            'Trained with:': self.schedules(),
            'By method:': self.methods(),
            'No gain, because the student alone was trained differently:': self.without_gain(),
            'Left out above, because most runs of the row differ:': self.left_out(),
            'Not finished, and left out above:': self.unfinished(),
        }
        found = [(caption + PUBLISHED.get(self.name, '')).strip()]
        for title, lines in lists.items():
            if lines:
                found.append('\n'.join([title, '', *(f'- {line}' for line in lines)]))
        return found

    def trained(self):
        runs = [run for stem in self.rows for run in self.kept[stem]]
        return [run for run in runs if 'epoch' in run.records[-1]]

    def schedules(self) -> list:
        """A line for what all runs have in common, and one for each option that differs."""
        common, different = [], []
        for key in (*SCHEDULE, *ENVIRONMENT):
            having = {}
            for run in self.trained():
                if value := schedule(run.records[-1], [key]).get(key):
                    having.setdefault(value, []).append(run.name)
            most = max(having, key=lambda v: len(having[v]), default=None)
            rest = [f'{v} ({listing(names, 8)})' for v, names in having.items() if v != most]
            if rest:
                most = f'{most} ({len(having[most])} runs)'
                different.append(f'runs differ in {key}: {"; ".join([most, *rest])}')
            elif having:
                common.append(f'{key} {most}')
        return [', '.join(common), *different] if common else different

    def methods(self) -> list:
        """A line for each method, with the rows that were trained by it."""
        lines = {}
        for run in self.trained():
            options = ', '.join(f'{k} {v}' for k, v in method(run.records[-1]).items())
            stem = run.name.rpartition('_seed')[0]
            lines.setdefault(options or 'labels alone', {})[stem] = None
        return [f'{options}: {", ".join(stems)}' for options, stems in lines.items()]

    def without_gain(self) -> list:
        lines = {}
        for section in self.sections:
            for row in section.rows[1:]:
                for seed, names in self.strangers(row, section):
                    lines[f'{row.stem}_seed{seed}: differs in {" and ".join(names)}'] = None
        return list(lines)

    def left_out(self) -> list:
        return [line for stem in self.rows for line in self.dropped[stem]]

    def unfinished(self) -> list:
        """A line for each row that lacks a run, with how far its unfinished ones are."""
        lines = []
        for stem in self.rows:
            lacking = {}
            for run in self.runs[stem]:
                if not run.is_finished():
                    lacking.setdefault(run.state(), []).append(str(run.seed))
            for state, seeds in lacking.items():
                lines.append(f'{stem}: {state} (seed{"s" * (len(seeds) > 1)} {", ".join(seeds)})')
        return lines


def format_gain(found, runs) -> str:
    """A gain, with the number of its pairs if that is not the row's number of runs."""
    if found is None:
        return ''
    mean, half, n = found
    spread = '' if half is None else f' ± {half:.2f}'
    pairs = '' if n == runs == 1 else f' (n = {n})'
    return f'{round(mean, 2) + 0.0:+.2f}{spread}{pairs}'  # 0.0: no -0.00


# ------------------------ error against beta


def draw_beta(table: Table):
    """Held-out error against --beta, one curve for AT and one for AT + KD; KD and the student alone
    as lines. Points are medians, bars ranges over seeds."""
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout='constrained')
    colours = {'student': '#555555', 'KD': '#009e73', 'AT': '#0072b2', 'AT + KD': '#d55e00'}
    curves = {}
    for row in table.sections[0].rows:
        label, _, beta = row.label.partition(', beta ')
        values = table.values(row, table.sections[0]).values()
        if values and label in colours:
            middle = statistics.median(values)
            spread = middle - min(values), max(values) - middle
            curves.setdefault(label, []).append((float(beta or 0), middle, *spread))
    if not curves:
        raise UserError('beta: no finished run to draw')
    for label, points in curves.items():
        style = {'color': colours[label], 'label': label}
        beta, middle, below, above = zip(*points)
        if beta == (0,):
            axes.axhline(middle[0], linestyle='--', linewidth=1.3, **style)
        else:
            style |= {'marker': 'o', 'markersize': 4, 'capsize': 2, 'linewidth': 1.8}
            axes.errorbar(beta, middle, [below, above], **style)
    axes.set_xscale('log')
    axes.set(xlabel='beta', ylabel='error on held-out training images, %')
    axes.set_title(table.sections[0].title.partition(',')[0])
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(framealpha=0.9)
    return figure


if __name__ == '__main__':
    sys.exit(program.call_main(main))
