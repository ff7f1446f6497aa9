"""Draw the learning curves of any number of runs, and print where they ended.

    python scripts/plot.py logs/resnet_16_2_teacher logs/at_16_1_16_2
    python scripts/plot.py a/log.txt b/log.txt --labels student "with AT" --save curves.svg
    # the paper's convergence figure
    python scripts/plot.py --paper_figure logs/student logs/at logs/factt

Reads logs of cifar.py, of imagenet.py and of the code published in 2018. Error is 100 - top-1
accuracy, in per cent; training error is on augmented images. The right panel zooms in on the end.

--paper_figure compares WRN-16-1 alone (student), with attention transfer (AT) and with the transfer
of full activations (F-ActT). Horizontal lines are means of the test error over four ranges of
epochs: 50-59, 61-99, 101-139 and 141-160 of 200, or the same shares of another number of epochs.
The paper's means were read off its curves, about ±0.1. They are drawn only for runs with the
paper's schedule. --labels say which curve a run is compared with: student, AT or F-ActT (default:
as its log says).
"""

import contextlib
import json
import math
import os
import sys
import textwrap
import warnings
from pathlib import Path

import matplotlib.pyplot as plt

plt.switch_backend('Agg')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import program
from support.files import check_file, write_atomically
from support.logs import read_log
from support.options import Parser
from support.program import UserError, printable

parser = Parser(__doc__)
add = parser.add_argument
add('logs', nargs='+', metavar='LOG', help='a run folder, or its log.txt')
add('--labels', nargs='+', metavar='NAME', help='a name for each LOG (default: from its path)')
add('--save', default='curves.png', metavar='FILE', help='.png or .svg (default: curves.png)')
add('--paper_figure', action='store_true', help="draw the paper's convergence figure instead")

# The paper's convergence figure: the epochs of each stretch, and the mean test error over them.
STRETCHES = [(50, 59), (61, 99), (101, 139), (141, 160)]
PAPER_EPOCHS, PAPER_STEPS = 200, [60, 120, 160]
PAPER_MEANS = {
    'student': (22.0, 12.5, 9.5, 8.7),
    'AT': (18.4, 11.5, 8.7, 8.0),
    'F-ActT': (20.4, 12.4, 9.3, 8.5),
}
# By Okabe and Ito: colour-blind readers can tell them apart.
COLOURS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000']
TRAINING = {'linewidth': 0.8, 'linestyle': '--', 'markersize': 3, 'markerfacecolor': 'white'}
TEST = {'linewidth': 1.6, 'markersize': 3}
OURS, PAPER = {'linewidth': 2}, {'linewidth': 1.6, 'linestyle': (0, (2, 1))}


def main(argv=None):
    opt, _ = parser.parse(argv)
    save = Path(opt.save)
    if save.suffix not in ('.png', '.svg'):
        raise UserError(f'--save {save}: must end in .png or .svg')
    check_file(save)
    files = [Path(log, 'log.txt') if os.path.isdir(log) else Path(log) for log in opt.logs]
    if opt.paper_figure and len(files) > (len(COLOURS) if opt.labels else len(PAPER_MEANS)):
        raise UserError(f'--paper_figure: {len(files)} logs; give at most 3, or 7 with --labels')
    if opt.labels and len(opt.labels) != len(files):
        raise UserError(f'--labels: {len(opt.labels)} names for {len(files)} logs')
    found = [read_run(file) for file in files]
    labels = opt.labels or (curves_of(found) if opt.paper_figure else names_of(files))
    for label, file, run in zip(labels, files, found):
        if labels.count(label) > 1:
            raise UserError(f'two of the logs are named {label!r}: name them with --labels')
        if opt.paper_figure and run['epochs'] != found[0]['epochs']:
            raise UserError(f'--paper_figure: {file} and {files[0]} differ in --epochs')
    runs = dict(zip(map(printable, labels), found))  # matplotlib takes UTF-8 alone
    print(figure_table(runs) if opt.paper_figure else table(runs))
    save.parent.mkdir(parents=True, exist_ok=True)
    write_figure(save, draw_paper_figure(runs) if opt.paper_figure else draw(runs))
    print(f'wrote {save}')


def write_figure(file, figure) -> None:
    """Write a figure with its legend, and close it. The same figure gives the same bytes."""
    plt.rcParams['svg.hashsalt'] = 'plot'
    style = {'format': file.suffix[1:], 'bbox_inches': 'tight', 'metadata': {'Date': None}}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from')  # it is drawn as a box
        write_atomically(file, lambda part: figure.savefig(part, **style))
    plt.close(figure)


# ------------------------ runs


def names_of(files) -> list:
    """The runs' folders, or log files of other names, without the path that they share."""
    paths = [os.path.abspath(f.parent if f.name == 'log.txt' else f.with_suffix('')) for f in files]
    common = os.path.commonpath({os.path.dirname(p) for p in paths})
    return [os.path.relpath(p, common) for p in paths]


def read_run(file) -> dict:
    """What a log says. Lists: epoch, and the errors test and train. Numbers: epochs of the schedule
    and time in seconds, nan if unknown. Also `last`, the last record."""
    records = [r for r in read_log(file) if first(r.get('epoch')) + first(r.get('test_acc')) >= 0]
    if not records:
        raise UserError(f'{file}: no line has both epoch and test_acc')
    last, epochs = records[-1], records[-1].get('epochs')
    return {
        'epoch': [first(r['epoch']) for r in records],
        'test': [100 - first(r['test_acc']) for r in records],
        'train': [100 - first(r.get('train_acc')) for r in records],
        'epochs': epochs if type(epochs) is int and 0 < epochs <= 1e6 else first(last['epoch']),
        'time': sum(first(r.get('train_time')) + first(r.get('test_time')) for r in records),
        'last': last,
    }


def first(value) -> float:
    """A number, or top-1 of [top-1, top-5]; nan for anything else."""
    value = value[0] if isinstance(value, list) and value else value
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e15 else math.nan


def epoch_steps(record: dict):
    """epoch_step of a log record, a list. The published code wrote it as text."""
    value = record.get('epoch_step')
    with contextlib.suppress(ValueError):
        value = json.loads(value) if isinstance(value, str) else value
    return value


def table(runs) -> str:
    """A Markdown table: net, parameters, epochs, test error of the last epoch, time."""
    rows = [['net', 'parameters', 'epochs', 'test error', 'time']]
    for label, run in runs.items():
        n = run['last'].get('n_parameters')
        parameters = f'{n:,}' if isinstance(n, int) else '?'
        error = f'{run["test"][-1]:.2f} %'
        rows.append([label, parameters, epochs_done(run), error, clock(run['time'])])
    return markdown(rows)


def epochs_done(run) -> str:
    """'200', or '181 of 200' for a run that is not finished."""
    last, epochs = run['epoch'][-1], run['epochs']
    return f'{last:g} of {epochs:g}' if last < epochs else f'{last:g}'


def clock(seconds) -> str:
    if math.isnan(seconds):
        return '?'
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


def markdown(rows: list) -> str:
    """A Markdown table from lists of strings, heads first. Columns after the first align right."""
    rows = [[cell.replace('|', r'\|') for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = '|'.join('-' * (w + 1) + (':' if i else '-') for i, w in enumerate(widths))
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join([lines[0], f'|{rule}|', *lines[1:]])


# ------------------------ learning curves


def draw(runs):
    """All epochs, and beside them the last ones if there are more than 3."""
    colours = plt.get_cmap('tab10').colors
    if len(runs) > 10:
        colours = plt.get_cmap('turbo')([i / len(runs) for i in range(len(runs))])
    widths = [3, 2] if max(len(run['epoch']) for run in runs.values()) > 3 else [3]
    shape = {'figsize': (2.2 * sum(widths), 5.6), 'width_ratios': widths, 'squeeze': False}
    figure, (panels,) = plt.subplots(1, len(widths), **shape, dpi=120, layout='constrained')
    draw_curves(panels[0], runs, colours)
    for axes in panels[1:]:
        draw_curves(axes, runs, colours, only_test=True)
        zoom_in(axes, runs.values())
    add_legends(panels[0], runs, colours)
    return figure


def draw_curves(axes, runs, colours, alpha=1.0, only_test=False):
    """Training error, then test error, of each run in its colour."""
    for colour, run in zip(colours, runs.values()):
        style = {'color': colour, 'alpha': alpha, 'marker': 'o' if len(run['epoch']) <= 30 else ''}
        if not only_test:
            axes.plot(run['epoch'], run['train'], **style, **TRAINING)
        axes.plot(run['epoch'], run['test'], **style, **TEST)
    epochs = [epoch for run in runs.values() for epoch in run['epoch']]
    axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=0)
    axes.set(xlabel='epoch', ylabel='error, %', xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)


def zoom_in(axes, runs):
    """Show the last fifth of each run, at least its last 3 epochs."""
    lengths = [max(3, len(run['epoch']) // 5) for run in runs]
    errors = [error for run, n in zip(runs, lengths) for error in run['test'][-n:]]
    # A run that failed must not flatten the others.
    low, high = min(errors), min(max(errors), min(errors) + 25)
    margin = max(0.25, 0.05 * (high - low))
    axes.set_xlim(left=min(run['epoch'][-n:][0] for run, n in zip(runs, lengths)) - 0.5)
    axes.set(title='test error at the end', ylim=(max(0, low - margin), high + margin))


def add_legends(axes, runs, colours, others=()):
    """The kinds of lines above the panel; below it the runs, for which the picture grows."""
    kinds = ('test error', TEST), ('training error', TRAINING), *others
    handles = [plt.Line2D([], [], color='0.3', label=name, **style) for name, style in kinds]
    style = {'frameon': False, 'fontsize': 9, 'borderaxespad': 0}
    axes.legend(handles=handles, loc='lower left', bbox_to_anchor=(0, 1.02), ncols=4, **style)
    handles = []
    for colour, (label, run) in zip(colours, runs.items()):
        text = f'{label}: {run["test"][-1]:.2f} %'
        if run['epoch'][-1] < run['epochs']:
            text += f' (epoch {epochs_done(run)})'
        text = textwrap.fill(text, 100).replace('$', r'\$')
        handles.append(plt.Line2D([], [], color=colour, linewidth=3, label=text))
    longest = max(len(line) for handle in handles for line in handle.get_label().splitlines())
    style |= {'ncols': max(1, 120 // (longest + 8)), 'title': 'test error after the last epoch'}
    place = {'loc': 'upper left', 'bbox_to_anchor': (0, 0), 'alignment': 'left'}
    axes.figure.legend(handles=handles, **place, **style)


# ------------------------ the paper's convergence figure


def curves_of(runs) -> list:
    """The curve of the paper's figure for each run: from the logs, or else in the paper's order."""
    curves = []
    for last in (run['last'] for run in runs):
        method = last.get('method', 'at') if last.get('teacher_id') else None
        curve = {None: 'student', 'at': 'AT', 'factt': 'F-ActT'}.get(method)
        curves.append(curve if 'depth' in last and not last.get('alpha') else None)
    return curves if len({*curves} - {None}) == len(runs) else list(PAPER_MEANS)[: len(runs)]


def stretches(epochs) -> list:
    """The epochs whose middles lie in each stretch, if `epochs` are spread over the paper's 200."""
    middles = {e: (e - 0.5) * PAPER_EPOCHS / epochs for e in range(1, int(epochs) + 1)}
    return [[e for e in middles if start - 1 < middles[e] < end] for start, end in STRETCHES]


def means(runs) -> list:
    """(name, means over the stretches, line style) of each run, and of the paper if label and
    schedule are the same. A mean is nan if the run lacks some of its epochs."""
    lines = []
    for colour, (label, run) in zip(COLOURS, runs.items()):
        errors = dict(zip(run['epoch'], run['test']))
        values = [[errors.get(e, math.nan) for e in part] for part in stretches(run['epochs'])]
        ours = [sum(v) / len(v) if v else math.nan for v in values]
        lines.append((label, ours, {'color': colour, **OURS}))
        steps = epoch_steps(run['last'])
        if run['epochs'] == PAPER_EPOCHS and steps in (None, PAPER_STEPS) and label in PAPER_MEANS:
            lines.append((f'{label}, paper', PAPER_MEANS[label], {'color': colour, **PAPER}))
    return lines


def figure_table(runs) -> str:
    """A Markdown table of the means."""
    parts = stretches(next(iter(runs.values()))['epochs'])
    spans = ['-'.join(map(str, sorted({*part[:1], *part[-1:]}))) or 'none' for part in parts]
    rows = [['test error, %, mean over epochs', *spans]]
    for name, values, _ in means(runs):
        rows.append([name, *('—' if math.isnan(v) else f'{v:.2f}' for v in values)])
    return markdown(rows)


def draw_paper_figure(runs):
    """The curves, and the means over each stretch as lines: ours solid, the paper's dashed."""
    figure, axes = plt.subplots(figsize=(9, 6), dpi=120, layout='constrained')
    draw_curves(axes, runs, COLOURS, alpha=0.45)
    lines = means(runs)
    for i, part in enumerate(stretches(next(iter(runs.values()))['epochs'])):
        if part:
            ends = part[0] - 0.5, part[-1] + 0.5
            axes.axvspan(*ends, color='black', alpha=0.05, linewidth=0)
            for _, values, style in lines:
                axes.plot(ends, [values[i]] * 2, **style)
    # The first epochs' errors would leave no room for the differences.
    if heights := [v for _, values, _ in lines for v in values if v > 0]:
        axes.set_ylim(0, 1.3 * max(heights))
    kinds = [('mean over a range of epochs (grey)', OURS), ("the paper's mean", PAPER)]
    add_legends(axes, runs, COLOURS, kinds if len(lines) > len(runs) else kinds[:1])
    return figure


if __name__ == '__main__':
    sys.exit(program.call_main(main))
