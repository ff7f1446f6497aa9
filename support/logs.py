"""log.txt: one json_stats line an epoch, what is printed of it, and its curves for tensorboard."""

import json
import os
from pathlib import Path

from support.program import UserError


def json_stats(record: dict) -> str:
    """A line of log.txt: strict JSON."""
    return f'json_stats: {json.dumps(record, allow_nan=False)}'


def read_log(path) -> list[dict]:
    """The records of a log.txt, ours or the published code's (which holds NaN).

    A last line that was cut off is left out. Raises UserError if no line is complete.
    """
    path = Path(path)
    try:
        lines = path.read_text(errors='replace').splitlines()
    except OSError as e:
        raise UserError(f'{path}: {e.strerror}') from e
    records = []
    for line in lines:
        _, found, text = line.partition('json_stats: ')
        try:
            record = json.loads(text) if found else None
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    if not records:
        raise UserError(
            f'{path}: no complete json_stats line; '
            'the run may have stopped before its first epoch ended'
        )
    return records


def class_names(records: list) -> list:
    """The class names in a log, [] if it has none."""
    names = records[0].get('classes') if records else None
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else []


def check_logged_folder(source: str, what: str, folder, others: str) -> None:
    """Raise UserError unless the folder exists that a run's log names for its images.

    source: the option that names the run; what: the images; others: what may be given in place of
    --dataroot.
    """
    if not os.path.isdir(folder):
        raise UserError(
            f'{source}: its {what}, {folder}, are missing: '
            f'give their folder with --dataroot, or {others}'
        )


def epoch_line(record: dict) -> str:
    """The printed line of a log record."""

    def accuracy(acc):  # top-1, or [top-1, top-5]
        if not isinstance(acc, list):
            return f'{acc:.2f} %'
        top5 = f' (top-5 {acc[1]:.2f} %)' if record['num_classes'] > 5 else ''  # else 100 %
        return f'{acc[0]:.2f} %{top5}'

    parts = [f'epoch {record["epoch"]}/{record["epochs"]}: lr {record["lr"]:.2g}']
    if record['train_loss'] is not None:
        parts.append(f'train loss {record["train_loss"]:.3f} acc {accuracy(record["train_acc"])}')
    parts.append(f'test loss {record["test_loss"]:.3f} acc {accuracy(record["test_acc"])}')
    if record['at_losses'] and record['beta']:
        losses = ' '.join(f'{v:.2e}' for v in record['at_losses'])
        parts.append(f'{record.get("method", "at")} {losses}')
        if record['epoch'] <= 3:  # to judge --beta
            share = record['epoch_beta'] * sum(record['at_losses']) / record['train_loss']
            parts.append(f'transfer {100 * share:.0f} % of the loss')
    if broken := record.get('broken_images'):
        parts.append(f'broken images: {broken}')
    return ', '.join([*parts, f'{record["train_time"]:.1f} + {record["test_time"]:.1f} s'])


def check_curves(folder) -> None:
    """Raise UserError if tensorboard cannot write into the run folder."""
    try:
        str(folder).encode()
    except UnicodeError as e:
        raise UserError(f'--tensorboard: cannot write into {folder}: its name is not UTF-8') from e


def open_curves(folder, log: list):
    """A tensorboard writer in the run folder, which first writes the log's lines again and hides
    the curves of earlier files."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, purge_step=0)
    for line in log:
        write_curves(writer, json.loads(line.removeprefix('json_stats: ')))
    return writer


def write_curves(writer, record: dict) -> None:
    """Add one log record to the tensorboard curves."""
    for name in 'train_loss', 'train_acc', 'test_loss', 'test_acc', 'lr':
        value = record[name][0] if isinstance(record[name], list) else record[name]
        if value is not None:
            writer.add_scalar(name, value, record['epoch'])
    method = record.get('method', 'at')
    groups = record.get('at_groups', range(len(record['at_losses'])))
    names = [f'{method}_loss/group{g}' for g in groups]
    if len(record['at_losses']) != len(groups):
        names = [f'{method}_loss']
    for name, value in zip(names, record['at_losses']):
        writer.add_scalar(name, value, record['epoch'])
    writer.flush()
