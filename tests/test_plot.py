"""scripts/plot.py: the tables it prints, what is in its pictures and where, the paper's figure."""

import sys
import warnings
import xml.etree.ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import utils
from samples import make_run, picture, refused
from support import logs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'scripts'))
import plot


def make_log(folder, errors, epochs, epoch_step=(60, 120, 160)):
    """The log of a run with these test errors, an epoch each."""
    folder.mkdir()
    record = {'epochs': epochs, 'epoch_step': list(epoch_step), 'train_acc': 90.0}
    lines = [
        logs.json_stats(record | {'epoch': e, 'test_acc': 100 - float(v)})
        for e, v in enumerate(errors, 1)
    ]
    (folder / 'log.txt').write_text('\n'.join(lines) + '\n')
    return str(folder)


def make_runs(*all_errors, first=1):
    """Runs as draw takes them, with these test errors."""
    runs = {}
    for i, errors in enumerate(all_errors):
        epochs = list(range(first, first + len(errors)))
        train = [0.8 * e for e in errors] if first else [np.nan]
        runs[f'run{i}'] = {'epoch': epochs, 'test': list(errors), 'train': train}
        runs[f'run{i}'] |= {'epochs': epochs[-1], 'last': {}}
    return runs


@pytest.fixture
def drawn():
    """Lays a figure out, and closes it after the test."""
    figures = []

    def lay_out(figure):
        figures.append(figure)
        figure.canvas.draw()
        return figure

    yield lay_out
    for figure in figures:
        plot.plt.close(figure)


def falling(end, epochs=20):
    return np.linspace(60, end, epochs)


# ------------------------ tables and files


def test_plot_shows_the_runs_and_says_where_they_ended(tmp_path, capsys):
    runs = [make_run(tmp_path / 'teacher'), make_run(tmp_path / 'student', seed=1, epochs=2)]
    plot.main(
        [str(runs[0]), str(runs[1] / 'log.txt'), '--save', str(tmp_path / 'new' / 'curves.png')]
    )
    out = capsys.readouterr().out
    assert '| teacher |     77,850 |      3 |    51.00 % | 1:34 |' in out
    assert '| student |     77,850 |      2 |    53.00 % | 1:03 |' in out
    image = picture(tmp_path / 'new' / 'curves.png')
    colours = {tuple(c) for c in image.reshape(-1, 3)}
    assert {(180, 119, 31), (14, 127, 255)} <= colours  # the first two of tab10, in BGR


def test_plot_says_which_runs_are_not_finished(tmp_path, capsys):
    run = make_run(tmp_path / 'run')
    lines = (run / 'log.txt').read_text().splitlines(keepends=True)
    (run / 'log.txt').write_text(''.join(lines[:-1]))
    svg = tmp_path / 'a.svg'
    with matplotlib.rc_context({'svg.fonttype': 'none'}):
        plot.main([str(run), '--save', str(svg)])
    assert '| 2 of 3 |' in capsys.readouterr().out
    assert '% (epoch 2 of 3)' in svg.read_text()


def test_plot_writes_svg_the_same_each_time(tmp_path):
    run = make_run(tmp_path / 'run')
    for name in 'a.svg', 'b.svg':
        plot.main([str(run), '--labels', 'student & <friends>', '--save', str(tmp_path / name)])
    assert xml.etree.ElementTree.parse(tmp_path / 'a.svg').getroot().tag.endswith('svg')
    assert (tmp_path / 'a.svg').read_bytes() == (tmp_path / 'b.svg').read_bytes()


def test_plot_reads_published_logs_and_top5(tmp_path):
    published = tmp_path / 'log.txt'
    line = 'json_stats: {"epoch": %d, "test_acc": %s, "train_acc": NaN, '
    line += '"at_losses": [NaN, NaN], "train_time": 1.0}\n'
    published.write_text(
        'loading\n' + line % (1, '81.5') + line % (2, '[70.0, 90.0]') + 'json_stats: {"epo'
    )
    run = plot.read_run(published)
    assert run['test'] == [18.5, 30.0] and np.isnan(run['train']).all()
    plot.main([str(published), '--save', str(tmp_path / 'curves.png')])
    picture(tmp_path / 'curves.png')


def test_plot_skips_lines_without_epoch_or_test_acc(tmp_path):
    log = tmp_path / 'log.txt'
    log.write_text(
        'json_stats: {"epoch": 1, "test_acc": 80}\n'
        'json_stats: {"epoch": 2, "test_acc": null}\n'
        'json_stats: {"test_acc": 70}\n'
        'json_stats: {"epoch": 3, "test_acc": 90}\n'
    )
    run = plot.read_run(log)
    assert run['epoch'] == [1, 3] and run['test'] == [20, 10]


def test_names_of_runs_are_where_their_folders_differ():
    assert plot.names_of([Path('logs/a/seed0/log.txt'), Path('logs/b/seed0/log.txt')]) == [
        'a/seed0',
        'b/seed0',
    ]
    assert plot.names_of([Path('/x/logs/teacher/log.txt')]) == ['teacher']


def test_plot_takes_any_label_and_logs_in_one_folder(tmp_path):
    log = make_run(tmp_path / 'run') / 'log.txt'
    logs = [tmp_path / name for name in ('_hidden.txt', 'a$^$b.txt')]
    for other in logs:
        other.write_bytes(log.read_bytes())
    logs.append(log)
    names = plot.names_of(logs)
    assert names == ['_hidden', 'a$^$b', 'run']
    figure = plot.draw({name: plot.read_run(log) for name, log in zip(names, logs)})
    legend = [t.get_text().replace('\\', '') for t in figure.legends[0].get_texts()]
    assert [text.split(':')[0] for text in legend] == names
    plot.write_figure(tmp_path / 'x.svg', figure)


def test_labels_that_no_font_has_give_no_warning(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name)) for name in 'abc']
    labels = ['注意力迁移', '_$x^', 'a long name ' * 30]
    for name in 'x.png', 'x.svg':
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            plot.main([*runs, '--labels', *labels, '--save', str(tmp_path / name)])
    picture(tmp_path / 'x.png')
    assert not capsys.readouterr().err


def test_plot_refuses_in_one_line(tmp_path, capsys):
    run = make_run(tmp_path / 'run')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'log.txt').touch()
    (tmp_path / 'other.txt').write_text('json_stats: {"loss": 1}\n')
    save = ['--save', tmp_path / 'x.png']
    assert 'No such file' in refused(plot.main, [tmp_path / 'missing', *save], capsys)
    assert 'no complete' in refused(plot.main, [tmp_path / 'empty', *save], capsys)
    assert 'test_acc' in refused(plot.main, [tmp_path / 'other.txt', *save], capsys)
    assert '.svg' in refused(plot.main, [run, '--save', tmp_path / 'x.gif'], capsys)
    assert '--labels' in refused(plot.main, [run, '--labels', 'a', 'b', *save], capsys)
    assert 'two of the logs' in refused(plot.main, [run, run, *save], capsys)
    assert 'LOG' in refused(plot.main, [], capsys)
    assert not (tmp_path / 'x.png').exists()


# ------------------------ what is where in the pictures


def check_legends(figure, file):
    """No legend covers a panel or another legend, and the written picture shows all of them."""
    legends = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
    places = [legend.get_window_extent() for legend in legends]
    for i, place in enumerate(places):
        others = [axes.get_window_extent() for axes in figure.axes] + places[:i]
        assert not any(place.overlaps(other) for other in others)
    plot.write_figure(file, figure)
    height, width = picture(file).shape[:2]
    assert width >= max(p.x1 for p in places) - min(p.x0 for p in places)
    assert height >= max(p.y1 for p in places) - min(p.y0 for p in places)


@pytest.mark.parametrize('n, epochs', [(1, 1), (3, 20), (12, 200), (30, 30)])
def test_legends_cover_no_curve(n, epochs, drawn, tmp_path):
    runs = make_runs(*(falling(8 + i / 4, epochs) for i in range(n)))
    figure = drawn(plot.draw(runs))
    assert len(figure.legends[0].get_texts()) == n
    check_legends(figure, tmp_path / 'x.png')


def test_long_labels_widen_no_panel_and_leave_the_picture_readable(drawn, tmp_path):
    runs = make_runs(falling(8), falling(9))
    figure = drawn(plot.draw(dict(zip(['long_name_' * 40, 'with spaces ' * 40], runs.values()))))
    check_legends(figure, tmp_path / 'x.png')
    short = drawn(plot.draw(runs))
    for a, b in zip(figure.axes, short.axes):
        assert np.allclose(a.get_window_extent().bounds, b.get_window_extent().bounds, atol=1)
    assert picture(tmp_path / 'x.png').shape[1] < 1600


def test_legends_of_the_paper_figure_cover_no_curve(drawn, tmp_path):
    runs = dict(zip(plot.PAPER_MEANS, make_runs(*(falling(8 + i, 200) for i in range(3))).values()))
    figure = drawn(plot.draw_paper_figure(runs))
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts[:2] == ['test error', 'training error'] and "the paper's mean" in texts
    check_legends(figure, tmp_path / 'x.png')


def test_training_curves_are_in_the_legend(drawn):
    figure = drawn(plot.draw(make_runs(falling(8), falling(9))))
    axes = figure.axes[0]
    handles, texts = axes.get_legend().legend_handles, axes.get_legend().get_texts()
    styles = {text.get_text(): handle.get_linestyle() for handle, text in zip(handles, texts)}
    drawn_as = {tuple(line.get_ydata()): line.get_linestyle() for line in axes.lines}
    assert styles == {'test error': '-', 'training error': '--'}
    assert drawn_as[tuple(falling(8))] == '-' and drawn_as[tuple(0.8 * falling(8))] == '--'


@pytest.mark.parametrize('epoch, error', [(1, 60.0), (0, 90.0)])
def test_a_run_of_one_epoch_has_one_tick_and_a_visible_point(epoch, error, drawn, tmp_path):
    figure = drawn(plot.draw(make_runs([error], first=epoch)))
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert [t for t in axes.get_xticks() if low <= t <= high] == [epoch]
    assert (low, high) == (epoch - 0.5, epoch + 0.5)
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > error
    x, y = axes.transData.transform((epoch, error)).round().astype(int)
    pixels = np.asarray(figure.canvas.buffer_rgba())
    assert pixels[-1 - y, x, :3].tolist() == [31, 119, 180]  # the first of tab10
    plot.write_figure(tmp_path / 'x.png', figure)


@pytest.mark.parametrize('epochs, ticks', [(2, [1, 2]), (3, [1, 2, 3])])
def test_short_runs_have_one_panel_with_whole_epochs(epochs, ticks, drawn):
    (axes,) = drawn(plot.draw(make_runs(falling(8, epochs)))).axes
    low, high = axes.get_xlim()
    assert [t for t in axes.get_xticks() if low <= t <= high] == ticks


def last_heights(figure, runs):
    """The heights in pixels of the runs' last test errors in the zoomed panel."""
    axes = figure.axes[1]
    points = [(run['epoch'][-1], run['test'][-1]) for run in runs.values()]
    return [
        y if axes.get_window_extent().contains(x, y) else None
        for x, y in axes.transData.transform(points)
    ]


@pytest.mark.parametrize('epochs', [4, 20, 200])
def test_half_a_point_at_the_end_is_visible(epochs, drawn):
    runs = make_runs(falling(8.0, epochs), falling(8.5, epochs))
    low, high = last_heights(drawn(plot.draw(runs)), runs)
    assert high - low >= 10


def test_a_failed_run_does_not_flatten_the_others(drawn):
    runs = make_runs(falling(8.0), falling(8.5), np.full(20, 90.0))
    low, high, failed = last_heights(drawn(plot.draw(runs)), runs)
    assert high - low >= 10 and failed is None


def test_the_zoom_shows_where_runs_of_different_length_end(drawn):
    runs = make_runs(falling(8.0, 200), falling(12.0, 10), falling(7.0, 120))
    assert None not in last_heights(drawn(plot.draw(runs)), runs)


# ------------------------ the paper's convergence figure


def test_stretches_of_the_paper_and_their_shares_of_other_schedules():
    paper = plot.stretches(200)
    assert [(e[0], e[-1], len(e)) for e in paper] == [
        (50, 59, 10),
        (61, 99, 39),
        (101, 139, 39),
        (141, 160, 20),
    ]
    assert plot.stretches(10) == [[3], [4, 5], [6, 7], [8]]
    assert plot.stretches(1) == plot.stretches(0) == [[]] * 4
    # No stretch before a drop of the rate reaches over it.
    for epochs in range(10, 401):
        drop = utils.scaled_steps([60], 200, epochs)[0]
        assert all(e < drop for e in plot.stretches(epochs)[0])


def test_paper_figure_prints_and_draws_means_over_the_ranges(tmp_path, capsys):
    errors = np.random.default_rng(0).uniform(5, 30, (3, 200))
    runs = [make_log(tmp_path / f'run{i}', e, 200) for i, e in enumerate(errors)]
    save = tmp_path / 'figure.svg'
    plot.main(['--paper_figure', *runs, '--save', str(save)])
    lines = [
        [c.strip() for c in line.strip('|').split('|')]
        for line in capsys.readouterr().out.splitlines()
    ]
    expected = [
        [f'{e[a - 1 : b].mean():.2f}' for a, b in ((50, 59), (61, 99), (101, 139), (141, 160))]
        for e in errors
    ]
    assert lines[0][1:] == ['50-59', '61-99', '101-139', '141-160']
    assert lines[2] == ['student', *expected[0]]
    assert lines[3] == ['student, paper', '22.00', '12.50', '9.50', '8.70']
    assert lines[4] == ['AT', *expected[1]] and lines[6] == ['F-ActT', *expected[2]]
    first = save.read_bytes()
    plot.main(['--paper_figure', *runs, '--save', str(save)])
    assert save.read_bytes() == first

    figure = plot.draw_paper_figure({'AT': plot.read_run(Path(runs[1]) / 'log.txt')})
    curves, drawn = figure.axes[0].lines[:2], figure.axes[0].lines[2:]
    assert [len(line.get_xdata()) for line in curves] == [200, 200]
    assert len(drawn) == 8 and len({line.get_color() for line in drawn}) == 1
    ours, theirs = drawn[::2], drawn[1::2]
    assert [f'{line.get_ydata()[0]:.2f}' for line in ours] == expected[1]
    assert [line.get_ydata()[0] for line in theirs] == [18.4, 11.5, 8.7, 8.0]
    for a, b, (start, end) in zip(ours, theirs, plot.STRETCHES):
        assert list(a.get_xdata()) == list(b.get_xdata()) == [start - 0.5, end + 0.5]
    for line in drawn:
        assert line.get_ydata()[0] == line.get_ydata()[1]
    assert {line.get_linestyle() for line in ours} == {'-'}
    assert {line.get_linestyle() for line in theirs} == {'--'}
    plot.plt.close(figure)


def test_paper_figure_knows_its_curves_by_their_logs(tmp_path, capsys):
    files = []
    for name, more in ('f', {'method': 'factt', 'teacher_id': 't'}), ('s', {'teacher_id': ''}):
        make_log(tmp_path / name, np.ones(200), 200)
        records = logs.read_log(tmp_path / name / 'log.txt')
        lines = [logs.json_stats(r | {'depth': 16} | more) for r in records]
        (tmp_path / name / 'log.txt').write_text('\n'.join(lines))
        files.append(str(tmp_path / name))
    plot.main(['--paper_figure', *files, '--save', str(tmp_path / 'figure.png')])
    names = [line.split('|')[1].strip() for line in capsys.readouterr().out.splitlines()[2:6]]
    assert names == ['F-ActT', 'F-ActT, paper', 'student', 'student, paper']


def test_paper_numbers_stand_only_beside_its_own_schedule_and_finished_stretches(tmp_path, capsys):
    def said(errors, *arguments, label='student'):
        run = make_log(tmp_path / str(len(list(tmp_path.iterdir()))), errors, *arguments)
        plot.main(
            ['--paper_figure', run, '--labels', label, '--save', str(tmp_path / 'figure.png')]
        )
        return capsys.readouterr().out.splitlines()

    def names_paper(lines):
        return any(', paper' in line for line in lines)

    errors = np.linspace(50, 10, 200)
    assert names_paper(said(errors, 200))
    assert not names_paper(said(errors, 200, label='WRN-16-1'))
    assert not names_paper(said(errors, 200, [100, 150]))
    short = said(np.linspace(50, 10, 10), 10)
    assert not names_paper(short) and [c.strip() for c in short[0].split('|')][2:4] == ['3', '4-5']
    early = said(errors[:120], 200)
    assert [c.strip() for c in early[2].split('|')][4:6] == ['—', '—'] and '—' not in early[3]


def test_paper_figure_refuses_in_one_line(tmp_path, capsys):
    runs = [make_log(tmp_path / f'run{n}', np.ones(n), n) for n in (10, 20)]
    save = ['--save', tmp_path / 'x.png']
    assert 'run20' in refused(plot.main, ['--paper_figure', *runs, *save], capsys)
    assert 'at most 3' in refused(plot.main, ['--paper_figure', *runs[:1] * 4, *save], capsys)
    assert not (tmp_path / 'x.png').exists()


def test_paper_figure_of_one_epoch_names_no_mean_of_the_paper(drawn):
    figure = drawn(plot.draw_paper_figure({'student': make_runs([60.0])['run0']}))
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts[:2] == ['test error', 'training error'] and "the paper's mean" not in texts
