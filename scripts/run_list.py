"""Run the list of a table script: train what is not finished yet, then print the table.

    bash scripts/table1.sh      # common.sh calls this program, with the list on stdin

common.sh documents the environment, table_list.py the list. The standard library is enough here,
as the environment is checked before anything is installed.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import program
from support.files import check_writable, lock_folder, write_text
from support.program import Stopped, UserError
from table_list import Plan, read_environment, read_list

# Downloads CIFAR once, before runs side by side would do so into the same files.
FETCH = (
    'import sys, data; from support.program import call_main; sys.argv[0] = "cifar.py"; '
    'sys.exit(call_main(lambda words: data.open_sets(*words), sys.argv[1:]))'
)


def main(argv):
    plan = Plan(read_list(sys.stdin.read()), read_environment(os.environ))
    if plan.env['DRY_RUN']:
        print_commands(plan)
    else:
        Runner(plan).go()


# ------------------------ the commands


def print_commands(plan):
    comment = '# the next --epochs is measured after the runs above; shown here for a ratio of 1.5'
    for run in plan.runs:
        if '$equal_time' in run.words and comment:
            print(comment)
            comment = ''
        words = run.with_equal_time(str(int(plan.env['EPOCHS']) * 3 // 2)).words
        print(shlex.join(['python', *plan.launcher(run), *words]))
    for words in last_commands(plan):
        print(shlex.join(['python', *words]))


def last_commands(plan):
    """The words of the commands for the end: the table, and pictures."""
    for line in plan.list.last:
        kind, first, *more = plan.fill_in(line, s='$s')
        if kind == 'summarize':
            words = ['scripts/summarize.py', first, plan.logs, '--seeds', *plan.seeds]
            yield [*words, '--save', f'{plan.logs}/{first}.md', *more]
        else:
            yield from curves(plan, first)


def curves(plan, file):
    """A picture for each seed, with the rows of the table that have a log."""
    for s in plan.seeds:
        rows = {}
        for line in plan.list.sections[0].rows:
            (folder,) = plan.fill_in(f'$LOGS/{line.name}', s=s)
            if plan.env['DRY_RUN'] or os.path.exists(f'{folder}/log.txt'):
                rows[line.row] = folder
        if rows:
            words = ['scripts/plot.py', '--paper_figure', *rows.values(), '--labels', *rows]
            yield [*words, '--save', file.replace('$s', s)]


# ------------------------ running


def list_gpus() -> list:
    """The GPUs that runs side by side are spread over."""
    if 'CUDA_VISIBLE_DEVICES' not in os.environ and shutil.which('nvidia-smi'):
        query = ['nvidia-smi', '--query-gpu=index', '--format=csv,noheader']
        return subprocess.run(query, check=False, capture_output=True, text=True).stdout.split()
    return os.environ.get('CUDA_VISIBLE_DEVICES', '').replace(',', ' ').split()


class Runner:
    """Runs a plan, JOBS runs side by side."""

    def __init__(self, plan: Plan):
        self.plan, self.env, self.logs = plan, plan.env, Path(plan.logs)
        self.slots, self.gpus = range(int(plan.env['JOBS'])), list_gpus()
        self.running = {}  # {slot: (Run, its process)}
        self.in_use = set()  # names of runs that another process trains

    def go(self):
        check_writable(self.logs, 'LOGS')
        self.plan.check_lengths()
        self.fetch_data()
        try:
            for stage in self.plan.stages:
                self.run_stage(stage)
        except Stopped as e:
            e.hint = 'the same command continues'
            raise
        finally:
            self.stop()
        for words in last_commands(self.plan):
            self.call(words)

    def fetch_data(self):
        dataset, root = self.plan.runs[0].option('--dataset'), self.env['DATAROOT']
        if dataset in ('CIFAR10', 'CIFAR100'):
            if not os.path.isdir(root):
                check_writable(root, 'DATAROOT')
                os.makedirs(root, exist_ok=True)
            if len(self.slots) > 1:
                self.call(['-c', FETCH, dataset, root])

    def call(self, words, **more):
        """Run a tool to its end and return what it wrote. Exits with its status if it fails."""
        command = [self.env['VENV_PYTHON'], *words]
        done = subprocess.run(command, check=False, text=True, **more)
        if done.returncode:
            sys.exit(done.returncode)
        return done.stdout

    def run_stage(self, runs):
        waiting = [self.measure(run) for run in runs]
        while waiting or self.running:
            for slot in self.slots:
                if slot in self.running and self.running[slot][1].poll() is not None:
                    run, process = self.running.pop(slot)
                    waiting += self.finish(run, process.returncode)
                while slot not in self.running and (run := self.next_run(waiting)):
                    waiting.remove(run)
                    if self.is_done(run):
                        print(f'== {run.name}: done', flush=True)
                    else:
                        print(f'== {run.name}', flush=True)
                        self.running[slot] = run, self.start(run, slot)
            time.sleep(0.1)

    def next_run(self, waiting):
        """The first run that no other process trains, None if there is none."""
        for run in waiting:
            if not self.is_in_use(run):
                return run
        return None

    def measure(self, run):
        """The run, with the length of equal time in its command, which is measured once."""
        if '$equal_time' not in run.words:
            return run
        file = self.logs / f'equal_time_to_{self.env["EPOCHS"]}'
        if not file.is_file() or not file.stat().st_size:
            words = ['scripts/summarize.py', 'controls', self.logs, '--equal_time']
            measured = self.call([*words, self.env['EPOCHS']], stdout=subprocess.PIPE)
            write_text(file, measured)
        return run.with_equal_time(file.read_text().strip())

    def is_in_use(self, run):
        """Whether another process trains the run, such as a script of another table."""
        try:
            os.close(lock_folder(self.logs / run.name))
        except BlockingIOError:
            if run.name not in self.in_use:
                print(f'== {run.name}: waiting for another process that trains it', flush=True)
            self.in_use.add(run.name)
            return True
        except OSError:  # there is no such folder yet
            return False
        return False

    def is_done(self, run):
        """Whether exactly this command has succeeded. Then the training script, which compares
        every option, need not be started."""
        folder = self.logs / run.name
        log, weights, done = (folder / name for name in ('log.txt', 'model.hkl', 'command.txt'))
        if run.is_test():
            weights, log = Path(run.option('--evaluate')), self.logs / f'{run.name}.txt'
            return starts_with(log, run.command()) and not is_newer(weights, log)
        # A kill between log and weights leaves older weights, which the run itself puts right.
        return (
            starts_with(done, run.command())
            and log.is_file()
            and weights.is_file()
            and not is_newer(log, weights)
        )

    def start(self, run, slot):
        words = [self.env['VENV_PYTHON'], *self.plan.launcher(run), *run.words]
        env, streams = dict(os.environ), {}
        self.logs.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as files:
            if run.is_test():
                out = files.enter_context(open(self.logs / f'{run.name}.txt.part', 'wb'))
                out.write(os.fsencode(f'{run.command()}\n'))
                out.flush()
                streams = {'stdout': out}
            elif len(self.slots) > 1:
                out = files.enter_context(open(self.logs / f'{run.name}.out', 'a'))
                streams = {'stdout': out, 'stderr': out}
                if len(self.gpus) > 1:
                    env['CUDA_VISIBLE_DEVICES'] = self.gpus[slot % len(self.gpus)]
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, env=env, **streams)

    def finish(self, run, status):
        """Note that a run has ended. Returns [run] if it must start again, as another process came
        first; raises UserError if it failed."""
        if status and self.is_in_use(run):
            return [run]
        if status:
            if len(self.slots) > 1 and not run.is_test():
                lines = (self.logs / f'{run.name}.out').read_text(errors='replace').splitlines()
                print(*lines[-3:], sep='\n', file=sys.stderr)
            status = status if status > 0 else 128 - status
            raise UserError(
                f'the run {run.name} failed, exit status {status} (see above); '
                'fix that and repeat the command',
                status,
            )
        if run.is_test():
            part = self.logs / f'{run.name}.txt.part'
            print(os.fsdecode(part.read_bytes()), end='', flush=True)
            part.replace(part.with_suffix(''))
        else:
            write_text(self.logs / run.name / 'command.txt', f'{run.command()}\n')
        return []

    def stop(self):
        """End the runs that are under way; each first finishes what it writes."""
        signals = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
        for _, process in self.running.values():
            process.terminate()
        for _, process in self.running.values():
            process.wait()
        for signum, handler in signals.items():
            signal.signal(signum, handler)


def starts_with(file, line) -> bool:
    """Whether it is the first line of the file."""
    return file.is_file() and os.fsdecode(file.read_bytes().split(b'\n')[0]) == line


def is_newer(a, b) -> bool:
    return a.stat().st_mtime_ns > b.stat().st_mtime_ns


if __name__ == '__main__':
    sys.argv[0] = sys.argv[1]  # errors name the table script
    sys.exit(program.call_main(main, sys.argv[2:]))
