"""Attention transfer between any two torch modules, on a folder of photographs.

    # the layers of two nets
    python examples/transfer.py ~/photos --student timm:resnet18 --teacher timm:resnet34 --list
    # a teacher is trained as a student without a teacher
    python examples/transfer.py ~/photos --student timm:resnet34 --save teacher.pth
    # a student learns from it
    python examples/transfer.py ~/photos --student timm:resnet18 --teacher timm:resnet34 \\
        --teacher_weights teacher.pth --layers layer3 layer4

NET is timm:NAME or MODULE:FUNCTION, called with num_classes=N, such as torchvision.models:resnet18.
MODULE may be your own file in the current folder.
"""

import torch
import torch.nn.functional as F
from layers import print_layers, watch
from modules import make_nets  # finds the repository
from training import finish, load, save, stoppable, train_batches

import utils
from support import photographs, program
from support.averages import Averages
from support.files import check_new_file
from support.options import Parser, number
from support.program import UserError

parser = Parser(__doc__)
parser.set_defaults(validate=0, skip_broken=False, nthread=0)
add = parser.add_argument
add('imagenetpath', metavar='DIR', help='photographs: DIR/train/CLASS/*, DIR/val/CLASS/* (or test)')
add('--student', required=True, metavar='NET', help='net to train')
add('--teacher', metavar='NET', help='net to learn from (default: none)')
add('--teacher_weights', metavar='FILE', help="the teacher's weights, a state_dict")
add('--teacher_classes', type=number(int, 1), help='number of its classes (default: as the images)')
add('--layers', nargs='+', metavar='L', help='layers of the student whose maps are to match')
add('--teacher_layers', nargs='+', metavar='L', help='of the teacher (default: as --layers)')
add('--list', action='store_true', help='print the layers that have maps, and stop')
add('--beta', default=1e3, type=number(low=0), help='weight of the transfer (default: 1e+3)')
add('--image_size', type=number(int, 8, 1024), help="side of images (default: the nets' own)")
add('--mean', nargs=3, type=number(), help="RGB, 0 to 1, for both nets (default: each net's)")
add('--std', nargs=3, type=number(above=0), help='as --mean')
add('--epochs', default=40, type=number(int, 1), help='passes over the images (default: 40)')
add('--batch_size', default=64, type=number(int, 2), help='images per step (default: 64)')
add('--lr', default=0.05, type=number(above=0), help='of SGD; falls as a cosine (default: 0.05)')
add('--seed', default=0, type=number(int, 0), help='of initial values and crops (default: 0)')
add('--save', default='student.pth', metavar='FILE', help='new state_dict (default: student.pth)')


def main(argv=None):
    program.expect_one_process(argv)
    opt, _ = parser.parse(argv)
    layers, layers_t = opt.layers or [], opt.teacher_layers or opt.layers or []
    if not (opt.list or bool(opt.teacher) == bool(opt.teacher_weights) == bool(layers)):
        raise UserError('--teacher, --teacher_weights and --layers: give all three or none')
    if len(layers_t) != len(layers):
        raise UserError('--teacher_layers: give as many layers as --layers')
    check_new_file(opt.save)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    sets = photographs.open_sets(opt, device, 'DIR')
    student, teacher = make_nets(opt, len(sets.val.classes))
    if opt.list:
        return print_layers(opt.image_size, student, teacher)
    maps = watch(student, layers, opt.image_size)
    if teacher:
        load(teacher, '--teacher_weights', opt.teacher_weights)
        maps_t = watch(teacher, layers_t, opt.image_size)
        teacher.module.eval().requires_grad_(False).to(device)
        if teacher.num_classes == student.num_classes:
            print(f'teacher: test accuracy {teacher.accuracy(sets.val, opt.image_size):.2f} %')
    student.module.to(device)
    optimizer = torch.optim.SGD(student.module.parameters(), opt.lr, 0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, opt.epochs)
    with stoppable(opt.save):
        for epoch in range(1, opt.epochs + 1):
            student.module.train()
            averages = Averages(['loss', 'transfer'], epoch, opt.save)
            for images, targets in train_batches(sets.train, epoch, opt):
                transfer = torch.zeros((), device=device)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
                    loss = F.cross_entropy(student(images), targets)
                    if teacher:
                        teacher(images)
                        transfer = opt.beta * sum(map(utils.at_loss, maps(), maps_t()))
                loss = loss + transfer
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                averages.add(torch.stack([loss, transfer]).detach(), len(images))
            schedule.step()
            loss, transfer = finish(averages)
            text = f'{loss:.3f}' + (f' ({transfer / loss:.0%} of it transfer)' if teacher else '')
            accuracy = student.accuracy(sets.val, opt.image_size)
            print(f'epoch {epoch}: loss {text}, test accuracy {accuracy:.2f} %', flush=True)
            save(student, opt.save, first=epoch == 1)


if __name__ == '__main__':
    raise SystemExit(program.call_main(main))
