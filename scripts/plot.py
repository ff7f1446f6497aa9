"""Test and training error of any number of runs: a picture of the curves, and a table of where they
ended.

    python scripts/plot.py logs/resnet_16_2_teacher logs/at_16_1_16_2
    python scripts/plot.py a/log.txt b/log.txt --labels student "with AT" --save curves.svg
    # the paper's convergence figure
    python scripts/plot.py --paper_figure logs/student logs/at logs/factt

Reads log.txt as cifar.py and imagenet.py write it, and as the code published in 2018 did. Solid
lines are the test error, thin dashed ones the error on the augmented training images, both
100 - accuracy (top-1), in per cent.

--paper_figure is of WRN-16-1 alone, with attention transfer, and with the transfer of full
activations. Horizontal lines are means of the test error over stretches of the schedule: epochs
50-59, 61-99, 101-139 and 141-160 of 200, the same shares of another number of epochs. If the
schedule is the paper's, dashed lines show what was read off the paper's curves, about ±0.1.
--labels say which of these a run is compared with: student, AT or F-ActT (default: as the logs
say, or in that order).
"""

import contextlib
import json
import math
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import program
from support.files import check_writable, write_atomically
from support.logs import read_log
from support.options import Parser
from support.program import UserError

parser = Parser(__doc__)
add = parser.add_argument
add('logs', nargs='+', metavar='LOG', help='a run folder, or its log.txt')
add(
    '--labels',
    nargs='+',
    metavar='NAME',
    help='a name for each LOG (default: the part of its path in which they differ)',
)
add(
    '--save',
    default='curves.png',
    metavar='FILE',
    help='the picture, .png or .svg (default: curves.png)',
)
add(
    '--paper_figure',
    action='store_true',
    help="draw the paper's convergence figure and print the means of its error",
)

# The paper's convergence figure: the epochs of each stretch, and the mean test error over them, in
# per cent.
STRETCHES = [(50, 59), (61, 99), (101, 139), (141, 160)]
PAPER_EPOCHS, PAPER_STEPS = 200, [60, 120, 160]
PAPER_MEANS = {
    'student': (22.0, 12.5, 9.5, 8.7),
    'AT': (18.4, 11.5, 8.7, 8.0),
    'F-ActT': (20.4, 12.4, 9.3, 8.5),
}
# Okabe and Ito's, told apart by all.
COLOURS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000']
BAND = {'color': 'black', 'alpha': 0.05, 'linewidth': 0}
OURS, THEIRS = {'linewidth': 2}, {'linewidth': 1.6, 'linestyle': (0, (2, 1))}


def main(argv=None):
    opt, _ = parser.parse(argv)
    save = Path(opt.save)
    if save.suffix not in ('.png', '.svg'):
        raise UserError(f'--save {save}: must end in .png or .svg')
    check_writable(save.parent)
    files = [Path(log) / 'log.txt' if Path(log).is_dir() else Path(log) for log in opt.logs]
    if opt.paper_figure and len(files) > (len(COLOURS) if opt.labels else len(PAPER_MEANS)):
        raise UserError(
            f'--paper_figure: is of at most {len(PAPER_MEANS)} runs; '
            f'give --labels, and it is of up to {len(COLOURS)}'
        )
    if opt.labels and len(opt.labels) != len(files):
        raise UserError(f'--labels: {len(opt.labels)} names for {len(files)} logs')
    found = [read_run(file) for file in files]
    named = curves_of(found) if opt.paper_figure else names_of(files)
    labels = opt.labels or named
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(
                f'--labels: {label!r} names two of the logs; give each a name of its own'
            )
    runs = dict(zip(labels, found))
    if opt.paper_figure:
        check_schedules(files, runs)
    print(figure_table(runs) if opt.paper_figure else table(runs))
    save.parent.mkdir(parents=True, exist_ok=True)
    figure = draw_paper_figure(runs) if opt.paper_figure else draw(runs)
    write_figure(save, figure)
    print(f'wrote {save}')


def write_figure(file, figure) -> None:
    """Writes and closes it; the same figure gives the same bytes."""
    matplotlib.rcParams['svg.hashsalt'] = 'plot'
    metadata = {'Date': None} if file.suffix == '.svg' else None
    write_atomically(
        file, lambda part: figure.savefig(part, format=file.suffix[1:], metadata=metadata)
    )
    plt.close(figure)


def names_of(files):
    """The runs' folders, or the names of logs that lie in one folder, without the part of the path
    that all have."""
    paths = [os.path.abspath(f.parent if f.name == 'log.txt' else f.with_suffix('')) for f in files]
    common = os.path.commonpath({os.path.dirname(p) for p in paths})
    return [os.path.relpath(p, common) for p in paths]


def curves_of(runs) -> list:
    """Which of the paper's curves each run is of, as its log tells; where that does not tell them
    apart, in the paper's order."""
    told = [run['curve'] for run in runs]
    whole = all(told) and len(set(told)) == len(told)
    return told if whole else list(PAPER_MEANS)[: len(runs)]


def curve_of(record):
    """The curve of the paper's figure that a run is of, None where it is of none."""
    if 'depth' not in record or record.get('alpha'):
        return None
    if not record.get('teacher_id'):
        return 'student'
    return {'at': 'AT', 'factt': 'F-ActT'}.get(record.get('method', 'at'))


def read_run(file) -> dict:
    """{epoch, test, train, n_parameters, time, epochs, epoch_step, curve} of a log: lists over its
    epochs but for the number of parameters and the seconds in all, which are None where the log
    does not tell, the schedule (epochs: where it is not told, those of the log), and curve_of."""
    records = read_log(file)
    run = {
        'epoch': [first(r.get('epoch')) for r in records],
        'test': [100 - first(r.get('test_acc')) for r in records],
        'train': [100 - first(r.get('train_acc')) for r in records],
    }
    shown = [r for r in zip(run['epoch'], run['test']) if not any(map(math.isnan, r))]
    if not shown:
        raise UserError(f'{file}: no line of it tells epoch and test_acc')
    times = [first(r.get('train_time')) + first(r.get('test_time')) for r in records]
    n_parameters, epochs = (records[-1].get(k) for k in ('n_parameters', 'epochs'))
    return run | {
        'epochs': epochs if type(epochs) is int and 0 < epochs <= 1_000_000 else shown[-1][0],
        'epoch_step': epoch_steps(records[-1]),
        'curve': curve_of(records[-1]),
        'n_parameters': n_parameters if isinstance(n_parameters, int) else None,
        'time': sum(times) if not math.isnan(sum(times)) else None,
    }


def epoch_steps(record: dict):
    """A log record's epoch_step, a list; the published code wrote it as text."""
    value = record.get('epoch_step')
    with contextlib.suppress(ValueError):
        value = json.loads(value) if isinstance(value, str) else value
    return value


def first(value) -> float:
    """A number, or top-1 of [top-1, top-5]; nan for what is neither."""
    value = value[0] if isinstance(value, list) and value else value
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e15 else math.nan


def table(runs) -> str:
    """A line a run, as Markdown: net, parameters, epochs, test error of the last epoch, time."""
    rows = [['net', 'parameters', 'epochs', 'test error', 'time']]
    for label, run in runs.items():
        parameters = '?' if run['n_parameters'] is None else f'{run["n_parameters"]:,}'
        error = f'{run["test"][-1]:.2f} %'
        rows.append([label, parameters, epochs_done(run), error, clock(run['time'])])
    return markdown(rows)


def epochs_done(run) -> str:
    """'200', or '181 of 200' of a run that is not finished."""
    last, epochs = run['epoch'][-1], run['epochs']
    return f'{last:g} of {epochs:g}' if last < epochs else f'{last:g}'


def markdown(rows: list) -> str:
    """A table of Markdown from lists of strings, the first of them the heads; aligned, all columns
    but the first to the right."""
    rows = [[cell.replace('|', r'\|') for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        ' | '.join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    rule = '|'.join('-' * (w + 1) + (':' if i else '-') for i, w in enumerate(widths))
    head, *others = (f' {line} ' for line in lines)
    return '\n'.join(f'|{line}|' for line in (head, rule, *others))


def clock(seconds) -> str:
    if seconds is None:
        return '?'
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


def draw(runs):
    """The curves of any number of runs, and in the legend where they ended."""
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout='constrained')
    colours = plt.get_cmap('tab10').colors
    if len(runs) > 10:
        colours = plt.get_cmap('turbo')([i / len(runs) for i in range(len(runs))])
    draw_curves(axes, runs, colours)
    axes.set_title('Test error (solid) and training error (dashed)')
    # Handles are given, as a label that begins with _ would be left out.
    axes.legend(
        handles=axes.lines[1::2],
        title='test error after the last epoch',
        fontsize=9 if len(runs) <= 10 else 6,
        framealpha=0.9,
    )
    return figure


def draw_curves(axes, runs, colours, alpha=1.0):
    """Training error, then test error, of each run in its colour."""
    few = max(len(run['epoch']) for run in runs.values()) <= 30
    dashed = {'linewidth': 0.8, 'linestyle': '--', 'alpha': 0.7 * alpha}
    solid = {'linewidth': 0.4 + 1.4 * alpha, 'alpha': alpha, 'markersize': 3}
    solid['marker'] = 'o' if few else None
    for colour, (label, run) in zip(colours, runs.items()):
        unfinished = f' (epoch {epochs_done(run)})' if run['epoch'][-1] < run['epochs'] else ''
        label = f'{label}: {run["test"][-1]:.2f} %{unfinished}'.replace('$', r'\$')
        axes.plot(run['epoch'], run['train'], color=colour, **dashed)
        axes.plot(run['epoch'], run['test'], color=colour, label=label, **solid)
    axes.set(xlabel='epoch', ylabel='error, %')
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)


# ------------------------ the convergence figure of the paper


def check_schedules(files, runs):
    """Raises UserError if the stretches of two runs would not be the same epochs."""
    (first_file, *others), (first_run, *other_runs) = files, runs.values()
    for file, run in zip(others, other_runs):
        if run['epochs'] != first_run['epochs']:
            raise UserError(
                f'--paper_figure: {first_file} is of {first_run["epochs"]:g} epochs, '
                f'{file} of {run["epochs"]:g}; give runs of one schedule'
            )


def stretch(window, epochs):
    """The epochs, counted from 1, whose middle lies in a stretch of the paper's 200 once `epochs`
    are spread over them; none where too few are."""
    first, last = window
    middles = ((e, (e - 0.5) * PAPER_EPOCHS / epochs) for e in range(1, int(epochs) + 1))
    return [e for e, middle in middles if first - 1 < middle < last]


def means(run):
    """The mean test error over each stretch, nan where the run has not all of its epochs."""
    errors = dict(zip(run['epoch'], run['test']))
    found = []
    for window in STRETCHES:
        values = [errors.get(e, math.nan) for e in stretch(window, run['epochs'])]
        found.append(sum(values) / len(values) if values else math.nan)
    return found


def paper_means(label, run):
    """The paper's means for the run of that label; none where its schedule is not the paper's."""
    as_published = run['epochs'] == PAPER_EPOCHS and run['epoch_step'] in (None, PAPER_STEPS)
    return PAPER_MEANS.get(label, ()) if as_published else ()


def figure_table(runs) -> str:
    """A line a run, and one for the paper's numbers if they apply, as Markdown: means of the test
    error in per cent over the stretches."""
    epochs = next(iter(runs.values()))['epochs']
    heads = [span(stretch(window, epochs)) for window in STRETCHES]
    rows = [['test error, %, mean over epochs', *heads]]
    for label, run in runs.items():
        rows.append([label, *map(percent, means(run))])
        if paper := paper_means(label, run):
            rows.append([f'{label}, paper', *map(percent, paper)])
    return markdown(rows)


def span(epochs):
    return f'{epochs[0]}-{epochs[-1]}' if len(epochs) > 1 else f'{epochs[0]}' if epochs else 'none'


def percent(value):
    return '—' if math.isnan(value) else f'{value:.2f}'


def draw_paper_figure(runs):
    """The curves, with the means over each stretch as horizontal lines: ours solid, the paper's
    dashed."""
    figure, axes = plt.subplots(figsize=(9, 6), dpi=120, layout='constrained')
    draw_curves(axes, runs, COLOURS, alpha=0.45)
    curves = axes.lines[1::2]
    kinds = [Line2D([], [], color='0.3', label='mean over the stretch, ours', **OURS)]
    for colour, (label, run) in zip(COLOURS, runs.items()):
        draw_means(axes, means(run), run['epochs'], color=colour, **OURS)
        draw_means(axes, paper_means(label, run), PAPER_EPOCHS, color=colour, **THEIRS)
    if any(paper_means(label, run) for label, run in runs.items()):
        kinds.append(Line2D([], [], color='0.3', label="the paper's", **THEIRS))
    for window in STRETCHES:
        if epochs := stretch(window, next(iter(runs.values()))['epochs']):
            axes.axvspan(epochs[0] - 0.5, epochs[-1] + 0.5, **BAND)
    kinds.append(Patch(label='the stretches', **BAND))
    # The first epochs' errors would leave no room for the differences.
    heights = [v for label, run in runs.items() for v in (*means(run), *paper_means(label, run))]
    if highest := max((v for v in heights if not math.isnan(v)), default=0):
        axes.set_ylim(0, 1.6 * highest)
    axes.set_title('Test error (solid) and training error (dashed)')
    axes.legend(
        handles=[*curves, *kinds],
        title='test error after the last epoch',
        fontsize=9,
        framealpha=0.9,
    )
    return figure


def draw_means(axes, values, epochs, **style):
    """A horizontal line for each stretch of so many epochs at its value."""
    for window, value in zip(STRETCHES, values):
        found = stretch(window, epochs)
        if found and not math.isnan(value):
            axes.hlines(value, found[0] - 0.5, found[-1] + 0.5, **style)


if __name__ == '__main__':
    sys.exit(program.call_main(main))
