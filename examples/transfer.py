"""Attention transfer between any two torch modules, on a folder of photographs.

    # the layers of a net
    python examples/transfer.py ~/photos --student torchvision.models:resnet18 --list
    # a student learns from a teacher that was trained before
    python examples/transfer.py ~/photos --student torchvision.models:resnet18 \\
        --teacher timm:resnet34 --teacher_weights teacher.pth --layers layer3 layer4

NET is timm:NAME or MODULE:FUNCTION, called with num_classes=N. MODULE may be a file of yours here.
"""

import sys

import torch
import torch.nn.functional as F
from layers import print_layers, watch
from modules import make, save  # puts the repository on the path

import data
import utils
from support import photographs, program
from support.files import check_file
from support.options import Parser, number
from support.program import UserError
from support.weights import load_into

parser = Parser(__doc__)
parser.set_defaults(validate=0, skip_broken=False, nthread=0)
add = parser.add_argument
add('imagenetpath', metavar='DIR', help='photographs: DIR/train/CLASS/*, DIR/val/CLASS/* (or test)')
add('--student', required=True, metavar='NET', help='net to train')
add('--teacher', metavar='NET', help='net to learn from (default: none)')
add('--teacher_weights', metavar='FILE', help='its weights, a state_dict')
add('--teacher_classes', type=number(int, 1), help='its classes (default: as the images have)')
add('--layers', nargs='+', metavar='L', help='layers of the student whose maps are to match')
add('--teacher_layers', nargs='+', metavar='L', help='of the teacher (default: as --layers)')
add('--list', action='store_true', help='print the layers of the student and stop')
add('--beta', default=1e3, type=number(low=0), help='weight of the transfer (default: 1e+3)')
add('--image_size', type=number(int, 33, 1024), help="side of images (default: the student's)")
add('--mean', nargs=3, type=number(), help="of RGB in 0 to 1 (default: each net's own)")
add('--std', nargs=3, type=number(above=0), help="as --mean (default: each net's own)")
add('--epochs', default=40, type=number(int, 1), help='passes over the images (default: 40)')
add('--batch_size', default=64, type=number(int, 2), help='images per step (default: 64)')
add('--lr', default=0.05, type=number(above=0), help='rate of SGD, falls to 0 (default: 0.05)')
add('--save', default='student.pth', metavar='FILE', help='state_dict (default: student.pth)')


def main(argv=None):
    opt, _ = parser.parse(argv)
    layers, layers_t = opt.layers or [], opt.teacher_layers or opt.layers or []
    if not bool(opt.teacher) == bool(opt.teacher_weights) == bool(layers):
        raise UserError('--teacher, --teacher_weights and --layers: give all three or none')
    if len(layers_t) != len(layers):
        raise UserError('--teacher_layers: give as many layers as --layers')
    check_file(opt.save)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    sets = photographs.open_sets(opt, device)
    torch.manual_seed(0)
    student = make('--student', opt.student, len(sets.val.classes), opt)
    opt.image_size = opt.image_size or student.size
    if opt.list:
        return print_layers(student, opt.image_size)
    watched = watch(student, layers, opt.image_size)
    if opt.teacher:
        teacher = make('--teacher', opt.teacher, opt.teacher_classes or len(sets.val.classes), opt)
        load_into(teacher.module, opt.teacher_weights)
        watched_t = watch(teacher, layers_t, opt.image_size)
        teacher.module.eval().requires_grad_(False).to(device)
    student.module.to(device)
    optimizer = torch.optim.SGD(student.module.parameters(), opt.lr, 0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, opt.epochs)

    def view(file, i, out):
        return photographs.train_view(file, opt.image_size, 0, epoch, i, out)

    for epoch in range(1, opt.epochs + 1):
        student.module.train()
        order = data.epoch_order(len(sets.train.labels), 0, epoch)
        batches = [b for b in order.split(opt.batch_size) if len(b) > 1]  # batch norm needs two
        for images, targets in sets.train.batches(batches, view):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
                loss = F.cross_entropy(student(images), targets)
                if opt.teacher:
                    teacher(images)
                    ats = map(utils.at_loss, watched.maps(), watched_t.maps())
                    loss = loss + opt.beta * sum(ats)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if not loss.isfinite():
            raise UserError(f'epoch {epoch}: the loss is {loss}; try a lower --lr', status=1)
        accuracy = student.accuracy(sets.val, opt.image_size)
        print(f'epoch {epoch}: loss {loss:.3f}, test accuracy {accuracy:.2f} %', flush=True)
    save(student, opt.save)


if __name__ == '__main__':
    sys.exit(program.call_main(main))
