"""Print how far the attention maps of nets are from their teacher's, over all test images.

    python scripts/agreement.py --weights logs/teacher logs/student logs/at
    python scripts/agreement.py --weights logs/teacher logs/at --maps max --save table.md
    # another data set
    python scripts/agreement.py --weights TEACHER STUDENT --dataset folder --dataroot DIR

The first of --weights is the teacher. Each number is the squared distance of a net's normalised map
from the teacher's, averaged over the test images: utils.at_loss times the number of map elements.
It lies in 0 .. 2, whatever the size of the map.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import data
import plot
import utils
from attention_nets import (
    IMAGE_SIZES,
    MAPS,
    MAPS_HELP,
    add_net_options,
    find_source,
    load_nets,
    side_of,
)
from support import photographs, program
from support.files import check_file, write_text
from support.options import Parser, number
from support.program import UserError
from support.teachers import check_classes, same_classes

parser = Parser(__doc__)
add = parser.add_argument
add_net_options(add)
add(
    '--image_size',
    type=number(int, *IMAGE_SIZES),
    help="side of the crops of photographs (default: the run's, or 224)",
)
add('--maps', default='sum2', choices=list(MAPS), help=MAPS_HELP)
add('--save', metavar='FILE', help='file for the table, .md (default: none)')


class Batches(NamedTuple):
    """All test images, in order."""

    batches: Iterable  # of (uint8 [B, H, W, 3], labels int64 [B])
    n: int  # number of images


def main(argv=None):
    opt, _ = parser.parse(argv)
    check_options(opt)
    nets = load_nets(opt)
    teacher, students = nets[0], nets[1:]
    check_kinds(opt.weights, nets)
    source = find_source(opt, teacher)
    classes, load = open_images(opt, teacher, source)
    for weights, net in zip(opt.weights[1:], students):
        check_classes(f'--weights {weights}', net, classes)
    if not same_classes(teacher.params, teacher.records, classes):
        print(
            f'warning: --weights {opt.weights[0]}: '
            f'the teacher was trained on other classes than {source.name()} has',
            file=sys.stderr,
        )
    images, (written, arguments) = load(), MAPS[opt.maps]
    with data.Progress(images.n, 'comparing') as bar:
        distances = measure(images.batches, teacher, students, arguments, bar.update)
    text = (
        'Squared distance between the attention maps of each net and its teacher, '
        f'{teacher.label}: mean over the {images.n:,} test images of {source.name()}. '
        f'A map is {written} over the channels, L2-normalised. '
        '0: equal maps; 2: maps without overlap.\n\n'
        f'{plot.markdown(table(students, distances))}\n'
    )
    print(text, end='')
    if opt.save:
        Path(opt.save).parent.mkdir(parents=True, exist_ok=True)
        write_text(opt.save, text)
        print(f'wrote {opt.save}')


def check_options(opt):
    """Raise UserError if there is nothing to compare, or --save cannot be written."""
    if len(opt.weights) < 2:
        raise UserError('--weights: give a teacher and at least one other net')
    if opt.save:
        if Path(opt.save).suffix != '.md':
            raise UserError(f'--save {opt.save}: must end in .md')
        check_file(opt.save)


def check_kinds(weights, nets):
    """Raise UserError if a net has another number of groups than the teacher."""
    for path, net in zip(weights, nets):
        if net.is_small() != nets[0].is_small():
            kinds = {True: 'small images, with 3 groups', False: 'photographs, with 4 groups'}
            raise UserError(
                f'--weights: {weights[0]} is a net for {kinds[nets[0].is_small()]}, '
                f'{path} one for {kinds[net.is_small()]}'
            )


# ------------------------ test images


def open_images(opt, net, source):
    """(class names, load), where load() -> Batches. Decodes nothing yet.

    A net for photographs sees the centre of a folder's images, as imagenet.py tests.
    """
    if source.is_folder() and not net.is_small():
        folder, side = source.scan(), side_of(opt, net)
        return list(folder), lambda: load_photographs(folder, side)
    classes, load = data.open_sets(source.dataset, source.root)
    return classes, lambda: split(load()[1])


def split(test, size=250):
    """Batches of a data.ImageSet."""
    return Batches(zip(test.images.split(size), test.labels.split(size)), len(test.labels))


def load_photographs(folder, side, size=50):
    """Batches of the centres of photographs, decoded when they are needed."""
    opt = Namespace(image_size=side, nthread=0, skip_broken=False)
    images = photographs.Photographs(folder, opt, torch.device('cpu'))
    n = len(images.labels)

    def view(file, i, out):
        return photographs.centre_view(file, side, out)

    return Batches(images.batches(torch.arange(n).split(size), view), n)


# ------------------------ distances


@torch.inference_mode()
def measure(batches, teacher, students, arguments, progress=lambda n: None):
    """For each student float64 [2, 1 + groups]. Row 0 is of the images that it answers rightly, row
    1 of the others: their number, then for each group the sum over them of the squared distance

        ||at(student) - at(teacher)||^2 = at_loss * (number of map elements)

    of the two normalised maps. It lies in 0 .. 2, as no element of a map is negative. Maps of
    unequal size are pooled as in utils.at_loss; `arguments` are its p and map.
    """
    sums = [0.0] * len(students)
    for images, labels in batches:
        _, wanted = teacher.logits_and_groups(images)
        for k, student in enumerate(students):
            logits, groups = student.logits_and_groups(images)
            right = logits.argmax(1) == labels
            parts = [sum_of(groups, wanted, chosen, arguments) for chosen in (right, ~right)]
            sums[k] = sums[k] + torch.stack(parts)
        progress(len(labels))
    return sums


def sum_of(groups, wanted, chosen, arguments):
    """A row of `measure`, of the `chosen` images, bool [B]: float64 [1 + groups]."""
    n = int(chosen.sum())
    if n == 0:
        return torch.zeros(1 + len(groups), dtype=torch.double)
    sums = []
    for x, y in zip(groups, wanted):
        elements = min(x.shape[2], y.shape[2]) * min(x.shape[3], y.shape[3])
        sums.append(n * elements * float(utils.at_loss(x[chosen], y[chosen], **arguments)))
    return torch.tensor([n, *sums], dtype=torch.double)


def table(students, distances):
    """The rows of the table, the heads first. Each net has three: all images, those that it answers
    rightly, and those that it answers wrongly."""
    groups = len(distances[0][0]) - 1
    rows = [['net', 'its answers', 'images', *(f'group {g}' for g in range(groups))]]
    for student, sums in zip(students, distances):
        right, wrong = sums.tolist()
        every = {'all': sums.sum(0).tolist(), 'right': right, 'wrong': wrong}
        for answers, (n, *totals) in every.items():
            means = [f'{total / n:.4f}' if n else '—' for total in totals]
            rows.append([student.label if answers == 'all' else '', answers, f'{n:,.0f}', *means])
    return rows


if __name__ == '__main__':
    sys.exit(program.call_main(main))
