"""Attention transfer on CIFAR: train a teacher, or a student that learns from one.

    python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2                      # a teacher
    python cifar.py --save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3     # attention transfer
    python cifar.py --save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9     # knowledge distillation
    python cifar.py --evaluate logs/at_16_1_16_2                                              # test a run, or a weights file

The student's loss is distillation(...) + beta * the sum over the groups of at_loss, in utils.py. The same command with --resume goes
on with a run that was stopped. --dtype bfloat16 --compile is the fast way on a recent CPU or GPU; without a network there are
--dataset folder and --dataset shapes.
"""

import argparse
import math
import sys
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
parser.add_argument('--depth', default=16, type=number(int, 1), help='depth of the net, 6n + 4 (paper: 16, 40; default: 16)')
parser.add_argument('--width', default=1.0, type=number(above=0), help='factor of its channels 16, 32, 64 (paper: 1, 2; default: 1)')
parser.add_argument('--dataset', default='CIFAR10', choices=['CIFAR10', 'CIFAR100', 'folder', 'shapes'], help='folder: DATAROOT/train/CLASS/* and DATAROOT/test/CLASS/*; shapes: drawn, needs no files (paper: CIFAR10)')
parser.add_argument('--dataroot', default='.', help="folder of the data set's files (default: .)")
parser.add_argument('--validate', default=0, type=number(int, 0), metavar='N', help='hold N training images out and test on them instead, for choosing constants (default: 0)')
parser.add_argument('--randomcrop_pad', default=4, type=number(int, 0), help='reflected border of the random crop, in pixels (paper: 4)')
parser.add_argument('--teacher_id', default='', metavar='ID|DIR|FILE', help='the teacher: logs/ID, a run folder, or a weights file (default: none)')
parser.add_argument('--alpha', type=number(low=0, high=1), help='weight of knowledge distillation, 0 to 1 (paper: 0.9; default: 0)')
parser.add_argument('--temperature', default=4.0, type=number(above=0), help='temperature of knowledge distillation (paper: 4)')
parser.add_argument('--beta', type=number(low=0), help='weight of attention transfer (paper: 1e+3; default: 1e+3 with a teacher and no --alpha, else 0)')
utils.add_training_options(parser, batch_size=128, lr=0.1, epochs=PUBLISHED_EPOCHS, weight_decay=5e-4, epoch_step=PUBLISHED_STEPS, lr_decay_ratio=0.2)
# fmt: on


# ---------------------------------------------------------------- options


def complete(opt):
    """The options with what was left open filled in. Raises UserError where they contradict each other."""
    opt = argparse.Namespace(**vars(opt))
    if opt.teacher_id:
        if opt.alpha is None and opt.beta is None:
            opt.beta = 1e3
            print('a teacher, and neither --alpha nor --beta: training with --beta 1e+3')
        if not opt.alpha and not opt.beta:
            raise UserError(
                '--alpha and --beta are both 0: nothing would be learned from --teacher_id'
            )
    elif opt.alpha or opt.beta:
        name = 'alpha' if opt.alpha else 'beta'
        raise UserError(f'--{name} {getattr(opt, name):g} needs a teacher: give --teacher_id')
    opt.alpha, opt.beta = opt.alpha or 0.0, opt.beta or 0.0
    if opt.epoch_step is None:
        opt.epoch_step = utils.scaled_steps(PUBLISHED_STEPS, PUBLISHED_EPOCHS, opt.epochs)
    if not opt.save:
        opt.save = str(Path('logs') / run_name(opt))
    return opt


def run_name(opt):
    """Dataset, net, teacher, and whatever else is not as published: CIFAR10_wrn-16-1_resnet_16_2_teacher_beta1000_seed0."""
    said = [
        'dataset',
        'depth',
        'width',
        'teacher_id',
        'alpha',
        'beta',
        'seed',
        'save',
        'epoch_step',
        *utils.MAY_DIFFER,
    ]
    parts = [
        opt.dataset,
        f'wrn-{opt.depth}-{opt.width:g}',
        *filter(None, [Path(opt.teacher_id).stem]),
    ]
    parts += [f'{name}{getattr(opt, name):g}' for name in ('alpha', 'beta') if getattr(opt, name)]
    parts += [f'epochs{opt.epochs}'] if opt.epochs != PUBLISHED_EPOCHS else []
    if opt.epoch_step != utils.scaled_steps(PUBLISHED_STEPS, PUBLISHED_EPOCHS, opt.epochs):
        parts.append('step' + '-'.join(map(str, opt.epoch_step)))
    parts += [
        f'{name}{value}'
        for name, value in sorted(utils.run_options(opt).items())
        if name not in said and value != parser.get_default(name)
    ]
    return '_'.join([*parts, f'seed{opt.seed}'])


def find_checkpoint(opt, given):
    """(the checkpoint that --resume goes on from, its folder), or (None, None). Options that were not given become those of its run."""
    if not opt.resume:
        return None, None
    if opt.resume is True:
        folder = source = Path(opt.save or complete(opt).save)
        if not utils.holds_run(folder):
            return None, None
    else:
        source = Path(opt.resume)
        folder = source if source.is_dir() else source.parent
        opt.save = opt.save or str(folder)
    checkpoint = utils.load_checkpoint(source)
    utils.continue_options(opt, given, checkpoint)
    return checkpoint, folder.resolve()


# ---------------------------------------------------------------- nets


def load_net(source):
    """(f, params, records) of a weights file, whose names tell the net, or of a run folder, whose log does; a bare file
    has no records. Folders of the published code (log.txt and model.pt7) are run folders too."""
    source, records = Path(source), []
    weights = source
    if source.is_dir():
        records = utils.read_log(source / 'log.txt')
        weights = source / ('model.hkl' if (source / 'model.hkl').exists() else 'model.pt7')
        if not weights.exists():
            raise UserError(f'{source}: has neither model.hkl nor model.pt7')
    params = utils.load_params(weights)
    try:
        depth, width, num_classes = resnet.wrn_shape(params)
        if records:
            depth, width = records[0].get('depth'), records[0].get('width')
            if not all(type(v) in (int, float) for v in (depth, width)):
                raise UserError(
                    f'the first line of {source / "log.txt"} does not tell depth and width'
                )
        f, expected = resnet.wrn(depth, width, num_classes)
    except UserError as e:
        raise UserError(f'{weights}: {e}') from e
    return f, utils.check_params(params, expected, weights), records


def load_teacher(opt, classes):
    """(f, params, records) of --teacher_id. With --alpha its classes must be ours; its maps have none."""
    found = [p for p in (Path('logs') / opt.teacher_id, Path(opt.teacher_id)) if p.exists()]
    if not found:
        raise UserError(
            f'--teacher_id {opt.teacher_id}: there is no logs/{opt.teacher_id}, and no such folder or file'
        )
    f, params, records = load_net(found[0])
    if opt.alpha and not same_classes(params, records, classes):
        raise UserError(
            f'--teacher_id {opt.teacher_id}: --alpha needs a teacher of the same classes; it has {len(params["fc.bias"])} '
            f'({utils.listing(class_names(records))}), the data {len(classes)} ({utils.listing(classes)})'
        )
    return f, params, records


def class_names(records):
    names = records[0].get('classes') if records else None
    return names if isinstance(names, list) else []


def same_classes(params, records, classes):
    """Whether a net's outputs mean `classes`, as far as its log tells."""
    return len(params['fc.bias']) == len(classes) and class_names(records) in ([], classes)


# ---------------------------------------------------------------- training and testing


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
    device, n = images.device, len(labels)
    order = data.epoch_order(n, opt.seed, epoch)
    draws = data.crop_and_flip(n, opt.seed, epoch, opt.randomcrop_pad)[order].to(device)
    order = order.to(device)
    steps = order.split(opt.batch_size)
    rows = []

    def look():
        window = torch.stack(rows[looked:]).cpu()
        bad = (~window.isfinite()).nonzero()
        if len(bad):
            step, term = bad[0].tolist()
            name = term_names(window.shape[1] - 3)[
                term if term else int(bad[bad[:, 0] == step][-1, 1])
            ]
            raise UserError(
                f'epoch {epoch}, step {looked + step + 1} of {len(steps)}: {name} is {window[step, term]}; the checkpoint of the last '
                f'whole epoch, if there is one, is kept in {opt.save}. A lower --lr or --beta may help',
                status=1,
            )
        bar.set_postfix_str(
            f'loss {window[:, 0].mean():.3f}, accuracy {window[:, -1].mean():.1f} %'
        )
        return len(rows)

    looked = 0
    description = f'epoch {epoch}/{opt.epochs}'
    with tqdm(
        total=n, desc=description, unit=' images', leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        for index, drawn in zip(steps, draws.split(opt.batch_size)):
            loss, terms = loss_of(images, index, drawn, labels[index], params)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rows.append(terms)
            bar.update(len(index))
            if len(rows) - looked == 20 or len(rows) == len(steps):
                looked = look()

    sizes = [len(index) for index in steps]
    meters = [meter.AverageValueMeter() for _ in rows[0]]
    for m, column in zip(meters, torch.stack(rows).cpu().double().unbind(1)):
        m.add(float(column @ torch.tensor(sizes, dtype=torch.double)), n)
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
    return float(torch.stack(losses).cpu().double().sum()) / len(labels), 100 * int(correct) / len(
        labels
    )


def test_teacher(f, params, records, test_set, opt):
    """The teacher's accuracy on the test set in per cent, None where its classes are others. Warns where its own log says otherwise:
    a broken teacher teaches nothing, and shows nowhere else."""
    if not same_classes(params, records, test_set.classes):
        print(f'teacher {opt.teacher_id}: has other classes, so that its accuracy is not tested')
        return None
    acc = test(f, params, test_set)[1]
    print(f'teacher {opt.teacher_id}: test accuracy {acc:.2f} %')
    logged = records[-1].get('test_acc') if records else None
    comparable = isinstance(logged, (int, float)) and records[0].get('validate', 0) == opt.validate
    if comparable and not abs(acc - logged) <= 0.1:
        print(
            f'warning: teacher {opt.teacher_id} has test accuracy {acc:.2f} %, but its own log says {logged:.2f} % '
            f'on {records[-1].get("dataset", "its data")}: are these its weights, and is this its data?',
            file=sys.stderr,
        )
    return acc


def make_optimizer(params, opt, lr):
    return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=opt.weight_decay)


def learning_rate(epoch, opt):
    return opt.lr * opt.lr_decay_ratio ** sum(step <= epoch for step in opt.epoch_step)


# ---------------------------------------------------------------- main


def main(argv=None):
    opt, given = parser.parse(argv)
    if opt.evaluate:
        return evaluate(opt, given)

    checkpoint, folder = find_checkpoint(opt, given)
    opt = complete(opt)
    device, device_ids = utils.choose_device(opt)
    utils.keep_freed_memory()
    print(f'run folder: {opt.save}')
    here = folder == Path(opt.save).resolve()
    if checkpoint and checkpoint['epoch'] >= opt.epochs and here:
        utils.agree(opt.save, checkpoint)
        print(f'finished: {checkpoint["epoch"]} epochs are done')
        return
    if utils.holds_run(opt.save) and not here:
        raise UserError(
            f'--save {opt.save}: holds a run already; go on with it by --resume, or choose another folder'
        )
    utils.check_writable(opt.save)

    classes, load = data.open_sets(opt.dataset, opt.dataroot, opt.nthread)
    f_teacher, params_t, records = load_teacher(opt, classes) if opt.teacher_id else (None, {}, [])
    # A student of its teacher's shape draws from another stream than that teacher did with this seed.
    twin = bool(params_t) and resnet.wrn_shape(params_t)[:2] == (opt.depth, opt.width)
    torch.manual_seed(data.seed_of(opt.seed, 'initial values', opt.depth, opt.width, twin))
    f_student, params_s = resnet.wrn(opt.depth, opt.width, len(classes))
    if checkpoint:
        params_s = utils.check_params(checkpoint['params'], params_s, f'--resume {opt.save}')
        utils.set_requires_grad_except_bn_(params_s)

    train_set, test_set = load()
    if opt.validate:
        train_set, test_set = data.hold_out(train_set, opt.validate)
    if not opt.randomcrop_pad < min(train_set.images.shape[1:3]):
        raise UserError(
            f'--randomcrop_pad {opt.randomcrop_pad}: must be smaller than the images, {train_set.images.shape[2]}x{train_set.images.shape[1]} here'
        )
    facts = {
        'data': utils.crc([train_set.images, train_set.labels, test_set.images, test_set.labels]),
        'teacher': utils.crc(params_t.values()),
    }
    if checkpoint:
        utils.check_facts(facts, checkpoint)
    train_set, test_set = (utils.to_device(s, device) for s in (train_set, test_set))
    params_t = utils.to_device(params_t, device)
    params = {f'student.{k}': v for k, v in utils.to_device(params_s, device).items()}
    params |= {f'teacher.{k}': v for k, v in params_t.items()}

    if checkpoint:
        facts['teacher_test_acc'] = checkpoint['facts'].get('teacher_test_acc')
    else:
        facts['teacher_test_acc'] = (
            test_teacher(f_teacher, params_t, records, test_set, opt) if f_teacher else None
        )
    loss_of = make_loss(f_student, f_teacher, opt, device_ids)
    if opt.compile and utils.compiler_works(device):
        # Each batch shape by itself, so that a resumed run runs the same graphs.
        loss_of = torch.compile(loss_of, dynamic=False)
    with utils.open_folder(opt.save):
        if checkpoint:
            (utils.agree if here else utils.save_run)(opt.save, checkpoint)
        train(opt, loss_of, f_student, params, train_set, test_set, facts, checkpoint)


def train(opt, loss_of, f_student, params, train_set, test_set, facts, checkpoint):
    """The epochs, from the checkpoint's on; after each the run folder is written, and a line."""
    params_s = {
        k.removeprefix('student.'): v for k, v in params.items() if k.startswith('student.')
    }
    trainable = [v for v in params_s.values() if v.requires_grad]
    n_parameters = sum(v.numel() for v in trainable)
    print(
        f'WRN-{opt.depth}-{opt.width:g}: {n_parameters:,} parameters; {len(train_set.labels):,} images of {len(train_set.classes)} classes'
    )

    epoch, log = 0, []
    optimizer = make_optimizer(trainable, opt, learning_rate(1, opt))
    main.hint = 'nothing is saved yet; the same command with --resume starts it again'
    if checkpoint:
        epoch, log = checkpoint['epoch'], list(checkpoint['log'])
        utils.load_optimizer(optimizer, checkpoint)
        main.hint = f'the same command with --resume goes on after epoch {epoch} of {opt.epochs}'
    curves = utils.tensorboard_writer(opt.save, epoch) if opt.tensorboard else None

    def end_epoch(stats, train_time):
        start = time.time()
        test_loss, test_acc = test(f_student, params_s, test_set)
        if not math.isfinite(test_loss):
            raise UserError(
                f'epoch {epoch}: the test loss is {test_loss}; {opt.save} is kept as after the epoch before',
                status=1,
            )
        record = utils.run_options(opt) | {
            'epoch': epoch,
            **stats,
            'test_loss': test_loss,
            'test_acc': test_acc,
            'teacher_test_acc': facts['teacher_test_acc'],
            'lr': learning_rate(max(epoch, 1), opt),
            'n_parameters': n_parameters,
            'num_classes': len(train_set.classes),
            'classes': train_set.classes,
            'torch': torch.__version__,
            'train_time': train_time,
            'test_time': time.time() - start,
        }
        log.append(utils.json_stats(record))
        checkpoint = {
            'params': {k: v.detach() for k, v in params_s.items()},
            'optimizer': optimizer.state_dict(),
            'epoch': epoch,
            'step': 0,
            'options': utils.run_options(opt),
            'log': log,
            'facts': facts,
            'random': {'torch': torch.get_rng_state()},
        }
        utils.save_run(opt.save, checkpoint)
        main.hint = f'the same command with --resume goes on after epoch {epoch} of {opt.epochs}'
        print(utils.epoch_line(record), flush=True)
        if curves:
            utils.write_curves(curves, record)

    if opt.epochs == 0:
        end_epoch({'train_loss': None, 'train_acc': None, 'at_losses': []}, 0.0)
    while epoch < opt.epochs:
        epoch += 1
        if epoch in opt.epoch_step:  # a new optimizer: momentum restarts at a drop, as published
            optimizer = make_optimizer(trainable, opt, learning_rate(epoch, opt))
        start = time.time()
        stats = train_epoch(epoch, loss_of, train_set, params, optimizer, opt)
        end_epoch(stats, time.time() - start)


def evaluate(opt, given):
    """--evaluate: prints one json_stats line. The data set is that of the run folder's log where no option names one."""
    device, _ = utils.choose_device(opt)
    f, params, records = load_net(opt.evaluate)
    for name in {'dataset', 'dataroot', 'validate'} - given:
        if records and name in records[0]:
            setattr(opt, name, records[0][name])
    classes, load = data.open_sets(opt.dataset, opt.dataroot, opt.nthread)
    if not same_classes(params, records, classes):
        raise UserError(
            f'--evaluate {opt.evaluate}: has {len(params["fc.bias"])} classes, the data {len(classes)} ({utils.listing(classes)})'
        )
    train_set, test_set = load()
    if opt.validate:
        test_set = data.hold_out(train_set, opt.validate)[1]
    test_set, params = utils.to_device(test_set, device), utils.to_device(params, device)
    start = time.time()
    test_loss, test_acc = test(f, params, test_set)
    seconds = time.time() - start
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
