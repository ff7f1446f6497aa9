"""Test and training error of any number of runs: a picture of the curves, and a table of where they ended.

    python scripts/plot.py logs/resnet_16_2_teacher logs/at_16_1_16_2                  # run folders
    python scripts/plot.py a/log.txt b/log.txt --labels student "with AT" --save curves.svg

Reads log.txt as cifar.py and imagenet.py write it, and as the code published in 2018 did. Solid lines are the test error,
thin dashed ones the error on the augmented training images, both 100 - accuracy (top-1), in per cent.
"""

import math
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from utils import UserError

parser = utils.Parser(__doc__)
# fmt: off
parser.add_argument('logs', nargs='+', metavar='LOG', help='a run folder, or its log.txt')
parser.add_argument('--labels', nargs='+', metavar='NAME', help="a name for each LOG (default: its folder's or its own, as far as they differ)")
parser.add_argument('--save', default='curves.png', metavar='FILE', help='the picture, .png or .svg (default: curves.png)')
# fmt: on


def main(argv=None):
    opt, _ = parser.parse(argv)
    save = Path(opt.save)
    if save.suffix not in ('.png', '.svg'):
        raise UserError(f'--save {save}: must end in .png or .svg')
    utils.check_writable(save.parent)
    files = [Path(log) / 'log.txt' if Path(log).is_dir() else Path(log) for log in opt.logs]
    labels = opt.labels or names_of(files)
    if len(labels) != len(files):
        raise UserError(f'--labels: {len(labels)} names for {len(files)} logs')
    runs = {}
    for label, file in zip(labels, files):
        if label in runs:
            raise UserError(
                f'--labels: {label!r} names two of the logs; give each a name of its own'
            )
        runs[label] = read_run(file)
    print(table(runs))
    save.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(runs)
    matplotlib.rcParams['svg.hashsalt'] = 'plot'  # the same logs give the same bytes
    metadata = {'Date': None} if save.suffix == '.svg' else None
    utils.write_atomically(
        save, lambda file: figure.savefig(file, format=save.suffix[1:], metadata=metadata)
    )
    plt.close(figure)
    print(f'wrote {save}')


def names_of(files):
    """The runs' folders, or the names of logs that lie in one folder, without the part of the path that all have."""
    paths = [os.path.abspath(f.parent if f.name == 'log.txt' else f.with_suffix('')) for f in files]
    common = os.path.commonpath({os.path.dirname(p) for p in paths})
    return [os.path.relpath(p, common) for p in paths]


def read_run(file) -> dict:
    """{epoch, test, train, n_parameters, time} of a log: lists over its epochs but for the number of parameters and the
    seconds in all, which are None where the log does not tell."""
    records = utils.read_log(file)
    run = {
        'epoch': [first(r.get('epoch')) for r in records],
        'test': [100 - first(r.get('test_acc')) for r in records],
        'train': [100 - first(r.get('train_acc')) for r in records],
    }
    shown = [r for r in zip(run['epoch'], run['test']) if not any(map(math.isnan, r))]
    if not shown:
        raise UserError(f'{file}: no line of it tells epoch and test_acc')
    times = [first(r.get('train_time')) + first(r.get('test_time')) for r in records]
    n_parameters = records[-1].get('n_parameters')
    return run | {
        'n_parameters': n_parameters if isinstance(n_parameters, int) else None,
        'time': sum(times) if not math.isnan(sum(times)) else None,
    }


def first(value) -> float:
    """A number, or top-1 of [top-1, top-5]; nan for what is neither."""
    value = value[0] if isinstance(value, list) and value else value
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e15 else math.nan


def table(runs) -> str:
    """A line a run, as Markdown: net, parameters, epochs, test error of the last epoch, time."""
    rows = [['net', 'parameters', 'epochs', 'test error', 'time']]
    for label, run in runs.items():
        parameters = '?' if run['n_parameters'] is None else f'{run["n_parameters"]:,}'
        rows.append(
            [
                label,
                parameters,
                f'{run["epoch"][-1]:g}',
                f'{run["test"][-1]:.2f} %',
                clock(run['time']),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        ' | '.join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    rule = '|'.join('-' * (w + 1) + (':' if i else '-') for i, w in enumerate(widths))
    return (
        '\n'.join(f'| {line} |' for line in lines[:1])
        + f'\n|{rule}|\n'
        + '\n'.join(f'| {line} |' for line in lines[1:])
    )


def clock(seconds) -> str:
    if seconds is None:
        return '?'
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


def draw(runs):
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout='constrained')
    colours = (
        plt.get_cmap('tab10').colors
        if len(runs) <= 10
        else plt.get_cmap('turbo')([i / len(runs) for i in range(len(runs))])
    )
    few = max(len(run['epoch']) for run in runs.values()) <= 30
    for colour, (label, run) in zip(colours, runs.items()):
        axes.plot(
            run['epoch'], run['train'], color=colour, linewidth=0.8, linestyle='--', alpha=0.7
        )
        axes.plot(
            run['epoch'],
            run['test'],
            color=colour,
            linewidth=1.8,
            marker='o' if few else None,
            markersize=3,
            label=f'{label}: {run["test"][-1]:.2f} %'.replace('$', r'\$'),
        )
    axes.set(
        xlabel='epoch', ylabel='error, %', title='Test error (solid) and training error (dashed)'
    )
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
    # Handles are given, as a label that begins with _ would be left out.
    axes.legend(
        handles=axes.lines[1::2],
        title='test error after the last epoch',
        fontsize=9 if len(runs) <= 10 else 6,
        framealpha=0.9,
    )
    return figure


if __name__ == '__main__':
    sys.exit(utils.call_main(main))
