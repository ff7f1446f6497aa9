"""Kills a training run at random moments, resumes it each time, and compares it with a run that was left alone.

    python scripts/kill.py --kills 50                              # float32, eager, on drawn shapes
    python scripts/kill.py --kills 10 --options "--dtype bfloat16 --compile"
    python scripts/kill.py --full_disk                             # on a small tmpfs that fills up; needs root, Linux

Says how many kills it took and whether model.hkl and every line of log.txt, measured times aside, are the same; exit status 1 if not.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils
from utils import UserError, number

parser = utils.Parser(__doc__)
parser.add_argument(
    '--kills', default=50, type=number(int, 1), help='how often to kill (default: 50)'
)
parser.add_argument(
    '--seed', default=0, type=number(int, 0), help='of the random moments (default: 0)'
)
parser.add_argument('--options', default='', help='further options of cifar.py, in one string')
parser.add_argument('--full_disk', action='store_true', help='fill the disk instead of killing')


def main(argv=None):
    opt, _ = parser.parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        (full_disk if opt.full_disk else kill_and_compare)(Path(folder), opt)


def command(save, epochs, options):
    net = [
        '--dataset',
        'shapes',
        '--depth',
        '10',
        '--width',
        '0.25',
        '--batch_size',
        '512',
        '--epochs',
        str(epochs),
    ]
    return [
        sys.executable,
        str(ROOT / 'cifar.py'),
        *net,
        '--save',
        str(save),
        '--resume',
        *options.split(),
    ]


def kill_and_compare(folder, opt):
    # A run must outlive the kills: each falls into the start or into one of the next few epochs.
    whole, killed, rng = folder / 'whole', folder / 'killed', random.Random(opt.seed)
    began = time.time()
    subprocess.run(command(folder / 'try', 1, opt.options), check=True, stdout=subprocess.DEVNULL)
    start = time.time() - began
    epochs, kills, progress = 6 * opt.kills, 0, []
    subprocess.run(command(whole, epochs, opt.options), check=True, stdout=subprocess.DEVNULL)
    while kills < opt.kills:
        run = subprocess.Popen(command(killed, epochs, opt.options), stdout=subprocess.DEVNULL)
        try:
            if run.wait(rng.uniform(0.3, 1.5) * start):
                raise UserError(
                    f'a resumed run failed by itself, status {run.returncode}', status=1
                )
            break  # finished
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
            log = killed / 'log.txt'
            progress.append(len(log.read_text().splitlines()) if log.exists() else 0)
    subprocess.run(command(killed, epochs, opt.options), check=True, stdout=subprocess.DEVNULL)
    same = (whole / 'model.hkl').read_bytes() == (killed / 'model.hkl').read_bytes() and lines(
        whole
    ) == lines(killed)
    print(
        f'{kills} kills over {epochs} epochs, after epochs {progress}: {"the same bits" if same else "DIFFERENT"}'
    )
    if not same:
        raise UserError('the resumed run differs from the one left alone', status=1)


def lines(run):
    return [
        {k: v for k, v in r.items() if 'time' not in k and k != 'save'}
        for r in utils.read_log(run / 'log.txt')
    ]


def full_disk(folder, opt):
    disk = folder / 'disk'
    disk.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(disk)], check=True)
    try:
        run = disk / 'run'
        subprocess.run(command(run, 1, opt.options), check=True, stdout=subprocess.DEVNULL)
        (disk / 'ballast').write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 4096)))
        before = {f.name: f.read_bytes() for f in run.iterdir()}
        failed = subprocess.run(
            command(run, 3, opt.options), check=False, capture_output=True, text=True
        )
        kept = before == {f.name: f.read_bytes() for f in run.iterdir()}
        print(
            f'full: exit status {failed.returncode}, {failed.stderr.strip()!r}; the run folder is {"kept" if kept else "CHANGED"}'
        )
        os.unlink(disk / 'ballast')
        subprocess.run(command(run, 3, opt.options), check=True, stdout=subprocess.DEVNULL)
        same_start = [r['test_loss'] for r in utils.read_log(run / 'log.txt')]
        print(f'with room again: {len(same_start)} epochs done')
        if failed.returncode != 1 or not kept or len(same_start) != 3:
            raise UserError('a full disk lost something', status=1)
    finally:
        subprocess.run(['umount', str(disk)], check=True)


if __name__ == '__main__':
    sys.exit(utils.call_main(main))
