"""Read the list of a table script, and make its commands.

A list is between <<'RUNS' and RUNS. It has a line for each run, with $s for the seed:

    NAME | ROW | PAPER | COMMAND

    NAME      folder of the run in LOGS
    ROW       label of its row in the table, - if it is a student alone or a teacher
    PAPER     the paper's number for it, - if there is none; with top-5: 30.4/10.8
    COMMAND   what a person would type. --save, --dataroot, --resume and EXTRA are added. A run
              whose command names an empty variable is left out.

and lines of other kinds:

    == TITLE | STUDENT | TEACHER    the runs below are rows of this section of the table, between
                                    the student alone and the teacher (- for none)
    wait                            the runs below start after those above
    NAME = WORDS                    $NAME stands for these words in the lines below
    summarize TABLE WORDS...        call scripts/summarize.py at the end
    curves FILE                     draw the curves of all rows at the end, one picture a seed
"""

import fnmatch
import itertools
import os
import re
import shlex
import string
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.program import UserError

PATHS = 'LOGS', 'DATAROOT', 'CUB', 'SCENES', 'IMAGENET', 'STUDENT_PARAMS', 'TEACHER_PARAMS'

# ------------------------ the list


class Line(NamedTuple):
    """A run of a list, for all seeds."""

    name: str  # with $s for the seed
    row: str
    paper: list  # the paper's numbers, [] if there is none
    command: str

    def stem(self):
        return self.name.removesuffix('_seed$s')


class Section(NamedTuple):
    title: str
    rows: list  # Lines in the order of the table, the student alone first


class List(NamedTuple):
    stages: list  # of Lines; a stage starts when the one before it is finished
    sections: list
    words: dict  # what a $NAME of the list stands for
    last: list  # commands for the end


def read_list(text: str) -> List:
    stages, heads, words, last = [[]], [], {}, []
    for line in filter(None, map(str.strip, text.splitlines())):
        fields = [field.strip() for field in line.removeprefix('==').split(' | ')]
        if line.startswith('#'):
            continue
        if line == 'wait':
            stages.append([])
        elif line.startswith('=='):
            heads.append((fields, []))
        elif len(fields) == 4:
            name, row, paper, command = fields
            numbers = [] if paper == '-' else [float(v) for v in paper.split('/')]
            stages[-1].append(Line(name, row, numbers, command))
            if heads and row != '-':
                heads[-1][1].append(stages[-1][-1])
        elif match := re.fullmatch(r'(\w+) = (.*)', line):
            words[match[1]] = match[2]
        else:
            last.append(line)
    by_stem = {line.stem(): line for line in itertools.chain(*stages)}
    sections = []
    for (title, student, teacher), rows in heads:
        first = [by_stem[student]._replace(row='student')] if student != '-' else []
        last_row = [by_stem[teacher]._replace(row='teacher')] if teacher != '-' else []
        sections.append(Section(title, [*first, *rows, *last_row]))
    return List(stages, sections, words, last)


def read_script(path) -> List:
    """The list in a script; an empty one if it has none."""
    _, _, rest = Path(path).read_text().partition("<<'RUNS'\n")
    return read_list(rest.partition('\nRUNS\n')[0])


def is_chosen(name: str, only: str) -> bool:
    """Whether ONLY has the run."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in only.split() or ['*'])


# ------------------------ the environment


def read_environment(given) -> dict:
    """The variables of common.sh, checked. Paths are as seen from the repository root.

    given: the environment; CALLER in it is the folder that relative paths start from.
    """
    env = {'JOBS': '1', 'NPROC': '1', 'SEEDS': '0', 'EXTRA': '', 'ONLY': '', 'DRY_RUN': ''}
    env |= {k: v for k, v in given.items() if v}
    for name in PATHS:
        path = env.get(name, '')
        if path and name != 'LOGS':
            path = os.path.join(given['CALLER'], path)
        env[name] = path.removeprefix(f'{os.getcwd()}/')
    for name in 'JOBS', 'NPROC':
        if not re.fullmatch('[1-9][0-9]*', env[name]):
            raise UserError(f'{name}={env[name]}: must be a whole number of at least 1')
    seeds = list(dict.fromkeys(env['SEEDS'].split()))
    if not seeds or not all(re.fullmatch('0|[1-9][0-9]*', seed) for seed in seeds):
        raise UserError(f'SEEDS={env["SEEDS"]}: must be whole numbers, such as SEEDS="0 1 2"')
    return env | {'SEEDS': ' '.join(seeds)}


# ------------------------ what is to be run


class Run(NamedTuple):
    """A run of one seed, or the test of a net (imagenet.py --evaluate)."""

    name: str
    words: list  # the command without the interpreter

    def option(self, *names):
        """The command's value of the last of these options, '' if it has none."""
        values = [value for name, value in itertools.pairwise(self.words) if name in names]
        return values[-1] if values else ''

    def command(self):
        """The line of command.txt."""
        return shlex.join(self.words)

    def is_test(self):
        return '--evaluate' in self.words

    def with_equal_time(self, epochs):
        """The run with that length in its command if it is the one of equal time."""
        return self._replace(words=[epochs if w == '$equal_time' else w for w in self.words])


class Plan:
    """The runs of a list in one environment. Raises UserError if the two do not fit."""

    def __init__(self, runs: List, env: dict):
        self.list, self.env, self.logs = runs, env, env['LOGS']
        self.seeds = env['SEEDS'].split()
        self.stages = [self.expand(lines) for lines in runs.stages]
        self.runs = list(itertools.chain(*self.stages))
        if not self.runs:
            raise UserError(
                f'ONLY={env["ONLY"]}: matches no run; '
                'DRY_RUN=1 without ONLY prints all commands, with the names after --save'
            )
        self.check_teachers()
        if env['JOBS'] != '1' and any(self.launcher(run) for run in self.runs):
            raise UserError(
                f'NPROC={env["NPROC"]} with JOBS={env["JOBS"]}: set only one of them. '
                'NPROC splits a run over several GPUs, JOBS trains several runs at a time'
            )

    def expand(self, lines):
        """The Runs of a stage that ONLY has, seed by seed; lines with ${BETA} for each of BETAS."""
        runs = {}
        for s in self.seeds:
            for varied, group in itertools.groupby(lines, lambda line: '${BETA}' in line.name):
                group = list(group)
                for beta in self.env['BETAS'].split() if varied else ['']:
                    for line in group:
                        for seed in s, *self.next_seed(line, s):
                            run = self.make_run(line, s=seed, next=str(int(seed) + 1), BETA=beta)
                            runs.setdefault(run.name, run)
        return [r for r in runs.values() if r.words and is_chosen(r.name, self.env['ONLY'])]

    def next_seed(self, line, s):
        """[s + 1] if a student of seed s learns from this run's next seed, and SEEDS lacks that."""
        following, wanted = str(int(s) + 1), f'/{line.name.replace("$s", "$next")} '
        used = any(wanted in other.command for stage in self.list.stages for other in stage)
        return [following] if used and following not in self.seeds else []

    def fill_in(self, text, **variables):
        """The words of a line of the list, with its variables filled in."""
        values = dict.fromkeys(PATHS, '') | self.env | variables
        words = []
        for word in shlex.split(text):
            if word[0] == '$' and word[1:] in self.list.words:
                words += self.fill_in(self.list.words[word[1:]], **variables)
            elif word == '$BETAS':
                words += self.env['BETAS'].split()
            else:
                words.append(string.Template(word).substitute(values))
        return words

    def make_run(self, line, **variables):
        (name,) = self.fill_in(line.name, **variables)
        # The length of equal time is known once the runs that it is measured on are done.
        script, *words = self.fill_in(line.command, **variables, equal_time='$equal_time')
        extra = self.env['EXTRA'].split()
        if '' in words:  # a variable that is not given
            return Run(name, [])
        if '--evaluate' in words:
            return Run(name, [script, *words, *extra])
        save = ['--save', f'{self.logs}/{name}']
        return Run(name, [script, *save, *self.add_dataroot(words), '--resume', *extra])

    def add_dataroot(self, words):
        """The words with --dataroot after --dataset; a DATAROOT with train/ is used as it is."""
        if '--dataset' not in words:
            return words
        i, root = words.index('--dataset') + 1, self.env['DATAROOT']
        dataset = words[i]
        if os.path.isdir(f'{root}/train'):
            n = len([entry for entry in os.scandir(f'{root}/train') if entry.is_dir()])
            if dataset == 'CIFAR100' and n != 100:
                raise UserError(
                    f'DATAROOT={root}: has {n} folders in train, not the 100 classes of CIFAR-100'
                )
            dataset = 'folder'
        return [*words[:i], dataset, '--dataroot', root, *words[i + 1 :]]

    def check_teachers(self):
        """Raise UserError if a teacher is neither in LOGS nor trained by an earlier run."""
        folders = set()
        for run in self.runs:
            teacher = run.option('--teacher_id', '--teacher_params')
            ours = teacher.startswith(f'{self.logs}/') and teacher not in folders
            if ours and not os.path.exists(teacher):
                raise UserError(
                    f'ONLY={self.env["ONLY"]}: has {run.name}, but not its teacher, '
                    f'{os.path.basename(teacher)}, which is not in {self.logs} either; '
                    'add it to ONLY'
                )
            folders.add(run.option('--save'))

    def check_lengths(self):
        """Raise UserError if LOGS holds a run of another length, which would keep its schedule."""
        for run in self.runs:
            epochs, log = run.option('--epochs'), Path(self.logs, run.name, 'log.txt')
            if '--epochs' in self.env['EXTRA'] or epochs == '$equal_time' or not log.is_file():
                continue
            old = re.findall(r'"epochs": (\d+)', log.read_text(errors='replace'))
            if old and old[-1] != epochs:
                raise UserError(
                    f'LOGS={self.logs}: holds {run.name} of {old[-1]} epochs, not {epochs}: '
                    'choose another folder'
                )

    def launcher(self, run):
        """The words between interpreter and command: torchrun for several processes in a run."""
        n = self.env['NPROC']
        if n == '1' or run.words[0] != 'imagenet.py':
            return []
        return ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', n]
