"""Attention transfer on CIFAR: train a teacher, or a student that learns from one.

    python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2                      # a teacher
    python cifar.py --save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3     # attention transfer
    python cifar.py --save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9     # knowledge distillation
    python cifar.py --evaluate logs/at_16_1_16_2                                              # test a run, or a weights file

The student's loss is distillation(...) + beta * the sum over the groups of at_loss, in utils.py. The same command with --resume goes
on with a run that was stopped. --dtype bfloat16 --compile is the fast way on a recent CPU or GPU; without a network there are
--dataset folder and --dataset shapes.
"""

import os
import signal
import sys

# The imports take seconds; a signal in that time ends in one line as well.
# fmt: off
if __name__ == '__main__':
    for s in signal.SIGINT, signal.SIGTERM:
        signal.signal(s, lambda signum, _: (os.write(2, b'cifar.py: stopped before it began\n'), os._exit(128 + signum)))
# fmt: on

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchnet import meter
from tqdm import tqdm

import data
import resnet
import utils
from utils import UserError, number

PUBLISHED_EPOCHS, PUBLISHED_STEPS = 200, [60, 120, 160]

parser = utils.Parser(__doc__)
# fmt: off
add = parser.add_argument_group('net').add_argument
add('--depth', default=16, type=number(int, 1), help='layers of the net, 6n + 4 (paper: 16 and 40; default: 16)')
add('--width', default=1.0, type=number(above=0), help='factor of its channels, which are 16, 32, 64 (paper: 1 and 2; default: 1)')
add = parser.add_argument_group('data').add_argument
add('--dataset', default='CIFAR10', choices=['CIFAR10', 'CIFAR100', 'folder', 'shapes'], help='folder: DATAROOT/train/CLASS/* and DATAROOT/test/CLASS/*; shapes: drawn, needs no files (paper, and default: CIFAR10)')
add('--dataroot', default='.', help="folder of the data set's files (default: .)")
add('--validate', default=0, type=number(int, 0), metavar='N', help='hold N training images out and test on them instead of the test images, for choosing constants (default: 0)')
add('--randomcrop_pad', default=4, type=number(int, 0), help='pixels of reflected border around an image before the random crop (paper, and default: 4)')
add = parser.add_argument_group('teacher').add_argument
add('--teacher_id', default='', metavar='ID|DIR|FILE', help='the teacher: logs/ID, a run folder, or a weights file (default: none)')
add('--alpha', type=number(low=0, high=1), help='weight of knowledge distillation, 0 to 1 (paper: 0.9; default: 0)')
add('--temperature', default=4.0, type=number(above=0, high=1e6), help='of knowledge distillation: logits are divided by it (paper, and default: 4)')
add('--beta', type=number(low=0), help='weight of attention transfer (paper: 1e+3; default: 1e+3 with a teacher and no --alpha, else 0)')
utils.add_training_options(parser, batch_size=128, lr=0.1, epochs=PUBLISHED_EPOCHS, weight_decay=5e-4, epoch_step=PUBLISHED_STEPS, lr_decay_ratio=0.2)
# fmt: on


# ---------------------------------------------------------------- options


def complete(opt):
    """The options with what was left open filled in. Raises UserError where they contradict each other."""
    opt = argparse.Namespace(**vars(opt))
    resnet.check_wrn(opt.depth, opt.width)
    utils.complete_losses(opt, 'teacher_id')
    if opt.epoch_step is None:
        opt.epoch_step = utils.scaled_steps(PUBLISHED_STEPS, PUBLISHED_EPOCHS, opt.epochs)
    if not opt.save:
        opt.save = os.path.join('logs', run_name(opt))
    return opt


def run_name(opt):
    """Dataset, net, teacher, and whatever else is not as published: CIFAR10_wrn-16-1_resnet_16_2_teacher_beta1000_seed0."""
    root = f'-{Path(opt.dataroot).resolve().name}' if opt.dataset == 'folder' else ''
    parts = [
        opt.dataset + root,
        f'wrn-{opt.depth}-{opt.width:g}',
        utils.without_suffix(opt.teacher_id),
    ]
    said = {'dataset', 'depth', 'width', 'teacher_id'}
    return utils.run_name(parts, opt, parser, said, PUBLISHED_STEPS, PUBLISHED_EPOCHS)


# ---------------------------------------------------------------- teacher


def load_teacher(opt):
    """(f, params, records) of --teacher_id, which is logs/ID, a run folder or a weights file."""
    found = [
        path
        for path in (os.path.join('logs', opt.teacher_id), opt.teacher_id)
        if os.path.exists(path)
    ]
    if not found:
        raise UserError(
            f'--teacher_id {opt.teacher_id}: there is no logs/{opt.teacher_id}, and no such folder or file'
        )
    try:
        f, params, records = resnet.load_net(found[0])
    except UserError as e:
        raise UserError(f'--teacher_id {e}') from e
    if resnet.layout(params) != 'wrn':
        raise UserError(
            f'--teacher_id {opt.teacher_id}: is no Wide ResNet; nets for photographs teach in imagenet.py'
        )
    return f, params, records


def test_teacher(f, params, records, test_set, opt):
    """The teacher's accuracy on the test set in per cent, None where its classes are others. Warns where its own log says otherwise:
    a broken teacher teaches nothing, and shows nowhere else."""
    if not utils.same_classes(params, records, test_set.classes):
        print(f'teacher {opt.teacher_id}: has other classes, so that its accuracy is not tested')
        return None
    acc = test(f, params, test_set)[1]
    print(f'teacher {opt.teacher_id}: test accuracy {acc:.2f} %')
    logged = records[-1].get('test_acc') if records else None
    comparable = isinstance(logged, (int, float)) and records[0].get('validate', 0) == opt.validate
    if comparable and not acc - 0.1 <= logged <= acc + 0.1:
        print(
            f'warning: teacher {opt.teacher_id} has test accuracy {acc:.2f} %, but its own log says {str(logged)[:6]} % '
            f'on {records[-1].get("dataset", "its data")}: are these its weights, and is this its data?',
            file=sys.stderr,
        )
    return acc


# ---------------------------------------------------------------- loss and training


def make_loss(f_student, f_teacher, opt, device_ids):
    """loss(images, index, draws, targets, params) -> (loss, float32 [terms]), the terms as term_names lists them."""
    dtype = {'float': torch.float32, 'bfloat16': torch.bfloat16}[opt.dtype]

    def f(x, params, training):
        x = data.normalize(x).to(dtype)
        y_s, g_s = f_student(x, params, training, 'student.')
        if f_teacher is None:
            return y_s, None, []
        with torch.no_grad():
            y_t, g_t = f_teacher(x, params, False, 'teacher.')
        return y_s, y_t, [utils.at_loss(s, t) for s, t in zip(g_s, g_t)]

    def loss(images, index, draws, targets, params):
        x = data.augment(images, index, draws, opt.randomcrop_pad)
        y_s, y_t, at_losses = utils.data_parallel(f, x, params, True, device_ids)
        loss = task = utils.distillation(y_s, y_t, targets, opt.temperature, opt.alpha)
        if opt.beta:
            loss = task + opt.beta * sum(at_losses)
        accuracy = 100 * (y_s.detach().argmax(1) == targets).float().mean()
        return loss, torch.stack([loss, task, *at_losses, accuracy]).detach()

    return loss


def term_names(groups):
    return ['loss', 'distillation', *(f'at_loss of group {i}' for i in range(groups)), 'accuracy']


def train_epoch(epoch, loss_of, train_set, params, optimizer, opt):
    """One pass over the training set. Returns {train_loss, train_acc, at_losses}, means over samples.

    Raises UserError, status 1, where a term of the loss is not finite; it looks every 20 steps, as a look stops the device.
    """
    images, labels, _ = train_set
    n = len(labels)
    order = data.epoch_order(n, opt.seed, epoch)
    draws = data.crop_and_flip(n, opt.seed, epoch, opt.randomcrop_pad)[order]
    batches, draws = (v.to(images.device).split(opt.batch_size) for v in (order, draws))
    rows, looked = [], 0
    bar = tqdm(
        total=n,
        desc=f'epoch {epoch}/{opt.epochs}',
        unit=' images',
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        for step, (index, drawn) in enumerate(zip(batches, draws), 1):
            loss, terms = loss_of(images, index, drawn, labels[index], params)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rows.append(terms)
            bar.update(len(index))
            if step % 20 == 0 or step == len(batches):
                recent = torch.stack(rows[looked:]).cpu()
                utils.check_finite(recent, term_names(len(terms) - 3), epoch, looked, opt.save)
                bar.set_postfix_str(
                    f'loss {recent[:, 0].mean():.3f}, accuracy {recent[:, -1].mean():.1f} %'
                )
                looked = step

    sizes = torch.tensor([len(index) for index in batches], dtype=torch.double)
    meters = [meter.AverageValueMeter() for _ in terms]
    for m, column in zip(meters, torch.stack(rows).cpu().double().unbind(1)):
        m.add(float(column @ sizes), n)
    train_loss, _, *at_losses, train_acc = (float(m.value()[0]) for m in meters)
    return {'train_loss': train_loss, 'train_acc': train_acc, 'at_losses': at_losses}


@torch.inference_mode()
def test(f, params, test_set, base=''):
    """Mean cross-entropy and top-1 accuracy in per cent of a net in float32: (test_loss, test_acc)."""
    images, labels, _ = test_set
    losses, correct = [], 0
    for x, targets in zip(images.split(250), labels.split(250)):
        logits, _ = f(data.normalize(x), params, False, base)
        losses.append(F.cross_entropy(logits, targets, reduction='sum'))
        correct += (logits.argmax(1) == targets).sum()
    total_loss = float(torch.stack(losses).cpu().double().sum())
    return total_loss / len(labels), 100 * int(correct) / len(labels)


# ---------------------------------------------------------------- main


def main(argv=None):
    opt, given = parser.parse(argv)
    if opt.evaluate:
        return evaluate(opt, given)

    checkpoint, folder = utils.find_checkpoint(opt, given, parser, lambda opt: complete(opt).save)
    by_default = opt.teacher_id and opt.alpha is None and opt.beta is None
    opt = complete(opt)
    device, device_ids = utils.choose_device(opt)
    utils.keep_freed_memory()
    here, finished = utils.check_folder(opt, checkpoint, folder)
    if finished:
        return

    print(f'run folder: {opt.save}')
    if by_default:
        print('a teacher, and neither --alpha nor --beta: training with --beta 1e+3')
    f_student, f_teacher, params, train_set, test_set, facts = prepare(opt, device, checkpoint)
    loss_of = make_loss(f_student, f_teacher, opt, device_ids)
    if opt.compile and utils.compiler_works(device):
        # Each batch shape by itself, so that a resumed run runs the same graphs.
        loss_of = torch.compile(loss_of, dynamic=False)
    optimizer = utils.make_optimizer(
        trainable(params), opt, checkpoint['epoch'] if checkpoint else 1
    )
    if checkpoint:
        utils.load_optimizer(optimizer, checkpoint)
    with utils.open_folder(opt.save, checkpoint if here else None):
        if checkpoint:
            if not here:
                utils.save_checkpoint(opt.save, checkpoint)
            utils.agree(opt.save, checkpoint)
        how = utils.go_on(opt, here)
        run = loss_of, f_student, params, optimizer, train_set, test_set
        train(opt, *run, facts, checkpoint, how)


def trainable(params):
    return [v for v in params.values() if v.requires_grad]


def prepare(opt, device, checkpoint):
    """(f_student, f_teacher, params, train_set, test_set, facts), all on the device: `params` of both nets, with prefixes student. and
    teacher., and as facts what a continuation must find unchanged. Initial values are those of the seed, or of the checkpoint."""
    f_teacher, params_t, records = load_teacher(opt) if opt.teacher_id else (None, {}, [])
    classes, load = data.open_sets(opt.dataset, opt.dataroot, opt.nthread)
    if opt.alpha:
        utils.check_classes(
            f'--teacher_id {opt.teacher_id} with --alpha', params_t, records, classes
        )
    # A student of its teacher's shape would draw that teacher's own initial values from the same seed.
    twin = bool(params_t) and resnet.same_shape(params_t, opt.depth, opt.width)
    torch.manual_seed(
        data.seed_of(
            opt.seed, 'initial values', opt.depth, opt.width, twin and utils.crc(params_t.values())
        )
    )
    f_student, params_s = resnet.wrn(opt.depth, opt.width, len(classes))
    if checkpoint:
        params_s = utils.check_params(checkpoint['params'], params_s, f'--resume {opt.resume}')
        utils.set_requires_grad_except_bn_(params_s)

    train_set, test_set = load()
    if opt.validate:
        train_set, test_set = data.hold_out(train_set, opt.validate)
    H, W = train_set.images.shape[1:3]
    if opt.randomcrop_pad >= min(H, W):
        raise UserError(
            f'--randomcrop_pad {opt.randomcrop_pad}: must be smaller than the images, {W}x{H} here'
        )
    facts = {
        'data': utils.crc([train_set.images, train_set.labels, test_set.images, test_set.labels]),
        'teacher': utils.crc(params_t.values()),
        'teacher_test_acc': None,
    }
    if checkpoint:
        utils.check_facts(facts, checkpoint)

    train_set, test_set = (utils.to_device(s, device) for s in (train_set, test_set))
    params_s, params_t = (utils.to_device(p, device) for p in (params_s, params_t))
    if checkpoint:
        facts['teacher_test_acc'] = checkpoint['facts'].get('teacher_test_acc')
    elif f_teacher:
        facts['teacher_test_acc'] = test_teacher(f_teacher, params_t, records, test_set, opt)
    params = {f'student.{k}': v for k, v in params_s.items()} | {
        f'teacher.{k}': v for k, v in params_t.items()
    }
    return f_student, f_teacher, params, train_set, test_set, facts


def train(opt, loss_of, f, params, optimizer, train_set, test_set, facts, checkpoint, how):
    """The epochs, from the checkpoint's on; after each the run folder is written, and a line. how: what makes the run go on."""
    done, log = (checkpoint['epoch'], list(checkpoint['log'])) if checkpoint else (0, [])
    params_s = {
        k.removeprefix('student.'): v for k, v in params.items() if k.startswith('student.')
    }
    about = {
        'teacher_test_acc': facts['teacher_test_acc'],
        'initial_lr': opt.lr,
        'n_parameters': sum(v.numel() for v in trainable(params)),
        'num_classes': len(train_set.classes),
        'classes': train_set.classes,
        'torch': torch.__version__,
    }
    print(
        f'WRN-{opt.depth}-{opt.width:g}: {about["n_parameters"]:,} parameters; '
        f'{len(train_set.labels):,} images of {len(train_set.classes)} classes; '
        f'lr {opt.lr:g}, times {opt.lr_decay_ratio:g} from epochs {opt.epoch_step} on'
    )
    curves = utils.open_curves(opt.save, log) if opt.tensorboard else None
    main.hint = f'{how} after epoch {done} of {opt.epochs}'

    def end_epoch(epoch, stats, train_time):
        start = time.time()
        test_loss, test_acc = test(f, params_s, test_set)
        if not math.isfinite(test_loss):
            raise UserError(
                f'epoch {epoch}: the test loss is {test_loss}; {opt.save} is kept as after the epoch before',
                status=1,
            )
        stats |= {
            'test_loss': test_loss,
            'test_acc': test_acc,
            'lr': utils.learning_rate(max(epoch, 1), opt),
        }
        times = {'train_time': train_time, 'test_time': time.time() - start}
        record = utils.run_options(opt) | {'epoch': epoch} | stats | about | times
        log.append(utils.json_stats(record))
        checkpoint = utils.make_checkpoint(params_s, optimizer, opt, epoch, log, facts)
        utils.save_run(opt.save, checkpoint)
        main.hint = f'{how} after epoch {epoch} of {opt.epochs}'
        print(utils.epoch_line(record), flush=True)
        if curves:
            utils.write_curves(curves, record)

    if opt.epochs == 0 and not log:
        end_epoch(0, {'train_loss': None, 'train_acc': None, 'at_losses': []}, 0.0)
    for epoch in range(done + 1, opt.epochs + 1):
        if epoch in opt.epoch_step:  # a new optimizer: momentum restarts at a drop, as published
            optimizer = utils.make_optimizer(trainable(params), opt, epoch)
        start = time.time()
        stats = train_epoch(epoch, loss_of, train_set, params, optimizer, opt)
        end_epoch(epoch, stats, time.time() - start)


def evaluate(opt, given):
    """--evaluate: prints one json_stats line. The data set is that of the run folder's log where no option names one."""
    device, _ = utils.choose_device(opt)
    # The model.hkl of a run folder stands for the run, whose log tells the data set.
    source = Path(opt.evaluate)
    whole = source.name in ('model.hkl', 'model.pt7') and os.path.exists(source.parent / 'log.txt')
    try:
        f, params, records = resnet.load_net(source.parent if whole else source)
    except UserError as e:
        raise UserError(f'--evaluate {e}') from e
    for name in {'dataset', 'dataroot', 'validate'} - given:
        if records and name in records[0]:
            if not parser.takes(name, records[0][name]):
                raise UserError(
                    f'--evaluate {opt.evaluate}: its log has {name} {str(records[0][name])[:60]!r}; give --{name}'
                )
            setattr(opt, name, records[0][name])
    classes, load = data.open_sets(opt.dataset, opt.dataroot, opt.nthread)
    utils.check_classes(f'--evaluate {opt.evaluate}', params, records, classes)
    train_set, test_set = load()
    if opt.validate:
        test_set = data.hold_out(train_set, opt.validate)[1]
    test_set, params = utils.to_device(test_set, device), utils.to_device(params, device)
    start = time.time()
    test_loss, test_acc = test(f, params, test_set)
    seconds = time.time() - start
    if not math.isfinite(test_loss):
        raise UserError(
            f'--evaluate {opt.evaluate}: the test loss is {test_loss} (accuracy {test_acc:.2f} %)',
            status=1,
        )
    record = {
        'evaluate': opt.evaluate,
        'dataset': opt.dataset,
        'test_acc': test_acc,
        'test_loss': test_loss,
        'n_parameters': sum(v.numel() for k, v in params.items() if not utils.is_statistic(k)),
        'multiply_adds': utils.multiply_adds(f, params, test_set.images.shape[1:3], device),
        'images_per_second': len(test_set.labels) / seconds,
        'test_time': seconds,
    }
    print(utils.json_stats(record))


if __name__ == '__main__':
    sys.exit(utils.call_main(main))
