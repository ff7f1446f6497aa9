"""Attention transfer on CIFAR: train a teacher, or a student that learns from one.

    # a teacher
    python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2
    # attention transfer, knowledge distillation, another transfer
    python cifar.py --save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3
    python cifar.py --save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9
    python cifar.py --save logs/f --teacher_id resnet_16_2_teacher --beta 1e+3 --method factt
    # test a run, or a weights file
    python cifar.py --evaluate logs/at_16_1_16_2

The student's loss is distillation(...) + beta * the sum over the groups of at_loss, or what
--method puts in its place; each is a function of utils.py. The same command with --resume goes on
with a run that was stopped. --dtype bfloat16 --compile is the fast way on a GPU, or a CPU with
instructions for it; without a network there are --dataset folder and --dataset shapes.
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

import data
import nin
import resnet
import utils
from utils import UserError, number

PUBLISHED_EPOCHS, PUBLISHED_STEPS = 200, [60, 120, 160]
METHODS = {
    'at': 'attention maps',
    'factt': 'full activations',
    'grad': 'gradients by the input',
    'sym': 'symmetry of that gradient, no teacher',
    'minl2': 'square of that gradient, no teacher',
}
WITHOUT_TEACHER = ('sym', 'minl2')
BY_GRADIENT = ('grad', *WITHOUT_TEACHER)

parser = utils.Parser(__doc__)
# fmt: off
add = parser.add_argument_group('net').add_argument
add('--net', default='wrn', choices=['wrn', 'nin'], help='wrn: Wide ResNet; nin: network in network (default: wrn)')
add('--depth', type=number(int, 1), help='layers of a Wide ResNet, 6n + 4 (paper: 16 and 40; default: 16)')
add('--width', type=number(above=0), help='factor of its channels, which are 16, 32, 64 (paper: 1 and 2; default: 1); of a NIN their number (default: 96, the thin one; wide: 192)')
add('--no_bn', action='store_true', help='NIN without batch norm, and without ReLU before pooling: the student of Table 3')
add('--no_pool_relu', action='store_true', help='NIN whose groups end in a convolution, without batch norm and ReLU before pooling: the teacher of Table 3')
add = parser.add_argument_group('data').add_argument
add('--dataset', default='CIFAR10', choices=['CIFAR10', 'CIFAR100', 'folder', 'shapes'], help='folder: DATAROOT/train/CLASS/* and DATAROOT/test/CLASS/* (or val); shapes: drawn, needs no files (paper, and default: CIFAR10)')
add('--dataroot', default='.', help="folder of the data set's files (default: .)")
add('--validate', default=0, type=number(int, 0), metavar='N', help='hold N training images out and test on them instead of the test images, for choosing constants (default: 0)')
add('--randomcrop_pad', default=4, type=number(int, 0), help='pixels of reflected border around an image before the random crop (paper, and default: 4)')
add = parser.add_argument_group('teacher').add_argument
add('--teacher_id', default='', metavar='ID|DIR|FILE', help='the teacher: logs/ID, a run folder, or a weights file (default: none)')
add('--alpha', type=number(low=0, high=1), help='weight of knowledge distillation, 0 to 1 (paper: 0.9; default: 0)')
add('--temperature', default=4.0, type=number(above=0, high=1e6), help='of knowledge distillation: logits are divided by it (paper, and default: 4)')
add('--beta', type=number(low=0), help='weight of what --method transfers (paper: 1e+3 for at; default: 1e+3 for at with a teacher and no --alpha, else 0)')
add('--beta_decay', default='none', choices=['none', 'linear', 'cosine', 'step'], help='how --beta goes to zero by the last of several epochs; step: at those of --epoch_step (paper: it decays for AT with KD, and for factt; default: none)')
add('--method', default='at', choices=METHODS, help=f'what --beta weighs: {"; ".join(f"{k}: {v}" for k, v in METHODS.items())} (default: at)')
add('--at_map', default='sum', choices=['sum', 'max'], help='a map is the sum, or the largest, over the channels of |activation|^p (paper, and default: sum)')
add('--at_p', default=2.0, type=number(above=0, high=64), help='that p (paper: 1, 2 and 4; default: 2)')
add('--at_groups', default=[0, 1, 2], type=utils.group_list(3), metavar='LIST', help='groups that at and factt transfer, such as 2 or 0,1 (paper, and default: 0,1,2)')
utils.add_training_options(parser, batch_size=128, lr=0.1, epochs=PUBLISHED_EPOCHS, weight_decay=5e-4, epoch_step=PUBLISHED_STEPS, lr_decay_ratio=0.2)
# fmt: on


# ------------------------ options


def complete(opt):
    """The options, with what was left open. Raises UserError if they contradict each other."""
    opt = argparse.Namespace(**vars(opt))
    depth, width, check = {
        'wrn': (16, 1.0, resnet.check_wrn),
        'nin': (nin.DEPTH, 96.0, nin.check_nin),
    }[opt.net]
    opt.depth, opt.width = opt.depth or depth, opt.width or width
    check(opt.depth, opt.width)
    for name in 'no_bn', 'no_pool_relu':
        if getattr(opt, name) and opt.net != 'nin':
            raise UserError(f'--{name}: is for --net nin')
    if opt.epoch_step is None:
        opt.epoch_step = utils.scaled_steps(PUBLISHED_STEPS, PUBLISHED_EPOCHS, opt.epochs)
    if opt.method != 'at' and not opt.beta:
        raise UserError(f'--method {opt.method}: give its weight, --beta')
    utils.complete_losses(opt, 'teacher_id', opt.method in WITHOUT_TEACHER)
    check_transfer(opt)
    if not opt.save:
        opt.save = os.path.join('logs', run_name(opt))
    return opt


def check_transfer(opt):
    """Raises UserError if an option of the transfer would have no effect."""
    if opt.beta_decay != 'none' and not opt.beta:
        raise UserError(f'--beta_decay {opt.beta_decay}: there is no --beta to decay')
    drops = any(1 < step <= opt.epochs for step in opt.epoch_step)
    if opt.beta_decay == 'step' and opt.epochs and not drops:
        raise UserError('--beta_decay step: --epoch_step has no epoch of this run after the first')
    for name in 'at_map', 'at_p', 'at_groups':
        if getattr(opt, name) == parser.get_default(name):
            continue
        if opt.method in BY_GRADIENT or (opt.method == 'factt' and name != 'at_groups'):
            raise UserError(f'--{name}: has no effect with --method {opt.method}')
        if not opt.teacher_id:
            raise UserError(f'--{name}: has no effect without a teacher, --teacher_id')


def run_name(opt):
    """Dataset, net, teacher, and whatever else is not as published:
    CIFAR10_wrn-16-1_resnet_16_2_teacher_beta1000_seed0."""
    root = f'-{Path(opt.dataroot).resolve().name}' if opt.dataset == 'folder' else ''
    parts = [opt.dataset + root, net_name(opt), utils.without_suffix(opt.teacher_id)]
    said = {'dataset', 'net', 'depth', 'width', 'teacher_id'}
    return utils.run_name(parts, opt, parser, said, PUBLISHED_STEPS, PUBLISHED_EPOCHS)


def net_name(opt):
    return f'nin-{opt.width:g}' if opt.net == 'nin' else f'wrn-{opt.depth}-{opt.width:g}'


# ------------------------ nets and data


def load_teacher(opt):
    """(f, params, records of its log) of --teacher_id: logs/ID, a run folder or a weights file."""
    path = os.path.join('logs', opt.teacher_id)
    path = path if os.path.exists(path) else opt.teacher_id
    if not os.path.exists(path):
        raise UserError(
            f'--teacher_id {opt.teacher_id}: no such run folder or weights file, here or in logs/'
        )
    try:
        f, params, records = resnet.load_net(path)
    except UserError as e:
        raise UserError(f'--teacher_id {e}') from e
    if resnet.layout(params) not in ('wrn', 'nin'):
        raise UserError(
            f'--teacher_id {opt.teacher_id}: is no net for small images; nets for photographs teach in imagenet.py'
        )
    return f, params, records


def new_student(opt, num_classes, f_teacher, params_t):
    """(f, params, adapters) with the initial values of --seed."""
    # With the same seed, a student of its teacher's shape would draw the teacher's initial values.
    twin = bool(params_t) and resnet.same_shape(params_t, opt.depth, opt.width)
    teacher = twin and utils.checksum(params_t.values())
    torch.manual_seed(data.seed_of(opt.seed, 'initial values', opt.depth, opt.width, teacher))
    bn, pool_relu = not opt.no_bn, not opt.no_pool_relu
    f, params = resnet.new_net(opt.net, opt.depth, opt.width, num_classes, bn, pool_relu)
    return f, params, make_adapters(params, params_t, f, f_teacher, opt)


def make_adapters(params_s, params_t, f_student, f_teacher, opt):
    """The 1x1 convolutions of --method factt, from the student's channels to the teacher's where
    these differ: {'group0': [C', C, 1, 1]}."""
    if opt.method != 'factt':
        return {}
    x, adapters = torch.zeros(1, 3, 32, 32), {}
    (_, g_s), (_, g_t) = f_student(x, params_s, False), f_teacher(x, params_t, False)
    for i in opt.at_groups:
        ni, no = g_s[i].shape[1], g_t[i].shape[1]
        if ni != no:
            adapters[f'group{i}'] = utils.conv_params(ni, no).requires_grad_()
    return adapters


def load_sets(load, opt):
    """(training set, test set); with --validate both are parts of the training images."""
    train_set, test_set = load()
    return data.hold_out(train_set, opt.validate) if opt.validate else (train_set, test_set)


def prepare(opt, device, checkpoint):
    """(f_student, f_teacher, params, train_set, test_set, facts), all on the device.

    `params` holds both nets and the adapters, named student.*, teacher.* and adapter.*; the values
    of student and adapters are the initial ones, or the checkpoint's. `facts` is what a resumed run
    must find unchanged."""
    f_teacher, params_t, records = load_teacher(opt) if opt.teacher_id else (None, {}, [])
    classes, load = data.open_sets(opt.dataset, opt.dataroot, opt.nthread)
    if opt.alpha or opt.method == 'grad':
        option = '--alpha' if opt.alpha else '--method grad'
        option = f'--teacher_id {opt.teacher_id} with {option}'
        utils.check_classes(option, params_t, records, classes)
    f_student, params_s, adapters = new_student(opt, len(classes), f_teacher, params_t)
    train_set, test_set = load_sets(load, opt)
    H, W = train_set.images.shape[1:3]
    if opt.randomcrop_pad >= min(H, W):
        raise UserError(
            f'--randomcrop_pad {opt.randomcrop_pad}: must be smaller than the images, {W}x{H} here'
        )
    sets = [train_set.images, train_set.labels, test_set.images, test_set.labels]
    facts = {
        'data': utils.checksum(sets),
        'teacher': utils.checksum(params_t.values()),
        'teacher_test_acc': None,
    }
    if checkpoint:
        utils.check_facts(facts, checkpoint)
        source = f'--resume: the run of {opt.save}'
        params_s = utils.check_params(checkpoint['params'], params_s, source)
        adapters = utils.check_params(checkpoint['adapters'], adapters, source)
        for own in params_s, adapters:
            utils.set_requires_grad_except_bn_(own)

    train_set, test_set = train_set.to(device), test_set.to(device)
    nets = {'student': params_s, 'teacher': params_t, 'adapter': adapters}
    nets = {name: utils.to_device(p, device) for name, p in nets.items()}
    if checkpoint:
        facts['teacher_test_acc'] = checkpoint['facts'].get('teacher_test_acc')
    elif f_teacher:
        facts['teacher_test_acc'] = test_teacher(f_teacher, nets['teacher'], records, test_set, opt)
    return f_student, f_teacher, utils.flatten(nets), train_set, test_set, facts


# ------------------------ loss


def make_loss(f_student, f_teacher, opt, device_ids):
    """loss(images, index, draws, targets, params, beta) -> (loss, float32 [terms]), the terms as
    term_names lists them; beta, a 0-dim tensor, is that of the epoch."""
    transfer = by_gradient if opt.method in BY_GRADIENT else by_activations

    def f(inputs, params, training):
        x, targets = inputs
        x = utils.cast(data.normalize(x), opt.dtype)

        def student(x):
            return f_student(x, params, training, 'student.')

        def teacher(x):
            return f_teacher(x, params, False, 'teacher.')

        return transfer(student, teacher if f_teacher else None, x, targets, params, opt)

    def loss(images, index, draws, targets, params, beta):
        x = data.augment(images, index, draws, opt.randomcrop_pad)
        y_s, y_t, losses = utils.data_parallel(f, (x, targets), params, True, device_ids)
        loss = task = utils.distillation(y_s, y_t, targets, opt.temperature, opt.alpha)
        if opt.beta:
            loss = task + beta * sum(losses)
        accuracy = 100 * (y_s.detach().argmax(1) == targets).float().mean()
        return loss, torch.stack([loss, task, *losses, accuracy]).detach()

    return loss


def by_activations(student, teacher, x, targets, params, opt):
    """--method at and factt: (logits of both nets, a loss for each of --at_groups), from
    activations."""
    y_s, g_s = student(x)
    if teacher is None:
        return y_s, None, []
    with torch.no_grad():
        y_t, g_t = teacher(x)
    if opt.method == 'factt':
        adapters = {i: params.get(f'adapter.group{i}') for i in opt.at_groups}
        return y_s, y_t, [utils.factt_loss(g_s[i], g_t[i], adapters[i]) for i in opt.at_groups]
    return y_s, y_t, [utils.at_loss(g_s[i], g_t[i], opt.at_p, opt.at_map) for i in opt.at_groups]


def by_gradient(student, teacher, x, targets, params, opt):
    """--method grad, sym and minl2: (logits of both nets, [the loss]), from the gradient of the
    cross-entropy by the input."""
    y_t = None
    if opt.method == 'grad':
        y_t, _, J_t = utils.input_gradient(teacher, x, targets)
    elif teacher:
        with torch.no_grad():
            y_t, _ = teacher(x)
    y_s, _, J_s = utils.input_gradient(student, x, targets, create_graph=True)
    if opt.method == 'grad':
        return y_s, y_t, [utils.gradient_loss(J_s, J_t)]
    if opt.method == 'minl2':
        return y_s, y_t, [utils.min_l2_loss(J_s)]
    _, _, J_flipped = utils.input_gradient(student, x.flip(3), targets, create_graph=True)
    return y_s, y_t, [utils.symmetry_loss(J_s, J_flipped)]


def term_names(opt):
    losses = [f'at_loss of group {i}' for i in opt.at_groups] if opt.teacher_id else []
    if opt.method in BY_GRADIENT:
        losses = [f'--method {opt.method}']
    return ['loss', 'distillation', *losses, 'accuracy']


# ------------------------ training and testing


def make_step(loss_of, train_set, params, optimizer, opt):
    """step(index, draws, beta) -> float32 [terms]: one step of SGD on images[index]."""
    images, labels, _ = train_set

    def step(index, draws, beta):
        loss, terms = loss_of(images, index, draws, labels[index], params, beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return terms

    return utils.Graphed(step) if opt.compile and images.is_cuda else step


def train_epoch(epoch, step_of, train_set, opt):
    """One pass over the training set: {train_loss, train_acc, at_losses}, means over samples.

    Raises UserError, status 1, if a term of the loss is not finite; it looks every 20 steps, as
    a look stops the device.
    """
    n, device = len(train_set.labels), train_set.labels.device
    order = data.epoch_order(n, opt.seed, epoch)
    draws = data.crop_and_flip(n, opt.seed, epoch, opt.randomcrop_pad)[order]
    batches, draws = (v.to(device).split(opt.batch_size) for v in (order, draws))
    beta = torch.tensor(utils.epoch_beta(epoch, opt), device=device)
    rows, looked = [], 0
    with data.progress(n, f'epoch {epoch}/{opt.epochs}') as bar:
        for step, (index, drawn) in enumerate(zip(batches, draws), 1):
            rows.append(step_of(index, drawn, beta))
            bar.update(len(index))
            if step % 20 == 0 or step == len(batches):
                recent = torch.stack(rows[looked:]).cpu()
                utils.check_finite(recent, term_names(opt), epoch, looked, opt.save)
                means = recent.mean(0)
                bar.set_postfix_str(f'loss {means[0]:.3f}, accuracy {means[-1]:.1f} %')
                looked = step

    sizes = torch.tensor([len(index) for index in batches], dtype=torch.double)
    meters = [meter.AverageValueMeter() for _ in rows[0]]
    for m, column in zip(meters, torch.stack(rows).cpu().double().unbind(1)):
        m.add(float(column @ sizes), n)
    train_loss, _, *at_losses, train_acc = (float(m.value()[0]) for m in meters)
    return {'train_loss': train_loss, 'train_acc': train_acc, 'at_losses': at_losses}


@torch.inference_mode()
def test(f, params, test_set):
    """(test_loss, test_acc) of a net in float32: mean cross-entropy, top-1 accuracy in per cent."""
    images, labels, _ = test_set
    losses, correct = [], 0
    size = 1000 if images.is_cuda else 250  # what a GPU has enough of, and a CPU's cache holds
    for x, targets in zip(images.split(size), labels.split(size)):
        logits, _ = f(data.normalize(x), params, False)
        losses.append(F.cross_entropy(logits, targets, reduction='sum'))
        correct += (logits.argmax(1) == targets).sum()
    total_loss = float(torch.stack(losses).cpu().double().sum())
    return total_loss / len(labels), 100 * int(correct) / len(labels)


def test_teacher(f, params, records, test_set, opt):
    """The teacher's test accuracy in per cent, None if its classes are others. Warns if its own log
    says otherwise: a broken teacher teaches nothing, and shows nowhere else."""
    if not utils.same_classes(params, records, test_set.classes):
        print(f'teacher {opt.teacher_id}: has other classes, so that its accuracy is not tested')
        return None
    acc = test(f, params, test_set)[1]
    print(f'teacher {opt.teacher_id}: test accuracy {acc:.2f} %')
    logged = records[-1].get('test_acc') if records else None
    told = isinstance(logged, (int, float)) and math.isfinite(logged)
    comparable = told and records[0].get('validate', 0) == opt.validate
    if comparable and not acc - 0.1 <= logged <= acc + 0.1:
        source = records[-1].get('dataset', 'its data')
        source = records[-1].get('dataroot', source) if source == 'folder' else source
        print(
            f'warning: teacher {opt.teacher_id} has test accuracy {acc:.2f} %, but its own log says {str(logged)[:6]} % '
            f'on {source}: are these its weights, and is this its data?',
            file=sys.stderr,
        )
    return acc


def train(opt, loss_of, f, params, optimizer, train_set, test_set, facts, checkpoint, advice):
    """The epochs, from the checkpoint's on; after each the run folder is written, and a line is
    printed. advice: what makes a stopped run go on."""
    done, log = (checkpoint['epoch'], list(checkpoint['log'])) if checkpoint else (0, [])
    params_s, adapters = (utils.part(params, name) for name in ('student', 'adapter'))
    about = {
        'teacher_test_acc': facts['teacher_test_acc'],
        'initial_lr': opt.lr,
        'n_parameters': sum(v.numel() for v in utils.trainable(params_s)),
        'num_classes': len(train_set.classes),
        'classes': train_set.classes,
        'torch': torch.__version__,
    }
    print(
        f'{net_name(opt).upper()}: {about["n_parameters"]:,} parameters; '
        f'{len(train_set.labels):,} images of {len(train_set.classes)} classes; '
        f'lr {opt.lr:g}, times {opt.lr_decay_ratio:g} from epochs {opt.epoch_step} on'
    )
    curves = utils.open_curves(opt.save, log) if opt.tensorboard else None
    # What a signal makes utils.call_main print.
    main.hint = f'{advice} after epoch {done} of {opt.epochs}'

    step_of = make_step(loss_of, train_set, params, optimizer, opt)
    epochs = range(done + 1, opt.epochs + 1)
    if not opt.epochs and not log:  # only tests and writes the untrained net
        epochs = [0]
    for epoch in epochs:
        stats, train_time = {'train_loss': None, 'train_acc': None, 'at_losses': []}, 0.0
        if epoch in opt.epoch_step:  # a new optimizer: momentum restarts at a drop, as published
            optimizer = utils.make_optimizer(params, opt, epoch)
            step_of = make_step(loss_of, train_set, params, optimizer, opt)
        if epoch:
            start = time.time()
            stats = train_epoch(epoch, step_of, train_set, opt)
            train_time = time.time() - start

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
            'epoch_beta': utils.epoch_beta(max(epoch, 1), opt),
        }
        times = {'train_time': train_time, 'test_time': time.time() - start}
        record = utils.run_options(opt) | {'epoch': epoch} | stats | about | times
        log.append(utils.json_stats(record))
        state = params_s, optimizer, opt, epoch, log, facts
        utils.save_run(opt.save, utils.make_checkpoint(*state, adapters=adapters))
        main.hint = f'{advice} after epoch {epoch} of {opt.epochs}'
        print(utils.epoch_line(record), flush=True)
        if curves:
            utils.write_curves(curves, record)


# ------------------------ main


def evaluate(opt, given):
    """--evaluate: prints one json_stats line. The data set is that of the run folder's log where no
    option names one."""
    device, _ = utils.choose_device(opt)
    try:
        f, params, records = resnet.load_net(opt.evaluate)
    except UserError as e:
        raise UserError(f'--evaluate {e}') from e
    if resnet.layout(params) not in ('wrn', 'nin'):
        raise UserError(
            f'--evaluate {opt.evaluate}: is a net for photographs; imagenet.py tests it'
        )
    for name in {'dataset', 'dataroot', 'validate'} - given:
        if records and name in records[0]:
            if not parser.takes(name, records[0][name]):
                raise UserError(
                    f'--evaluate {opt.evaluate}: its log has {name} {str(records[0][name])[:60]!r}; give --{name}'
                )
            setattr(opt, name, records[0][name])
    if opt.dataset == 'folder' and 'dataroot' not in given:
        others = 'another set, --dataset'
        utils.check_logged_folder(f'--evaluate {opt.evaluate}', 'images', opt.dataroot, others)
    classes, load = data.open_sets(opt.dataset, opt.dataroot, opt.nthread)
    utils.check_classes(f'--evaluate {opt.evaluate}', params, records, classes)
    _, test_set = load_sets(load, opt)
    test_set, params = test_set.to(device), utils.to_device(params, device)
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
        'validate': opt.validate,
        'test_acc': test_acc,
        'test_loss': test_loss,
        'n_parameters': sum(v.numel() for k, v in params.items() if not utils.is_statistic(k)),
        'multiply_adds': utils.multiply_adds(f, params, test_set.images.shape[1:3], device),
        'images_per_second': len(test_set.labels) / seconds,
        'test_time': seconds,
    }
    print(utils.json_stats(record))


def main(argv=None):
    opt, given = parser.parse(argv)
    if opt.evaluate:
        return evaluate(opt, given)

    checkpoint, folder = utils.find_checkpoint(opt, given, parser, complete)
    opt = complete(opt)
    device, device_ids = utils.choose_device(opt)
    utils.keep_freed_memory()
    here, finished = utils.begin(opt, given, checkpoint, folder)
    if finished:
        return

    f_student, f_teacher, params, train_set, test_set, facts = prepare(opt, device, checkpoint)
    loss_of = make_loss(f_student, f_teacher, opt, device_ids)
    utils.warn_of_slow_dtype(opt.dtype, device)
    if opt.compile and opt.method in BY_GRADIENT:
        print(
            f'--compile: --method {opt.method} differentiates twice, which is not compiled; going on without'
        )
        opt.compile = False
    loss_of = utils.compiled(loss_of, opt, device)
    optimizer = utils.make_optimizer(params, opt, epoch=1)
    if checkpoint:
        utils.load_optimizer(optimizer, checkpoint)
    with utils.open_folder(opt.save, checkpoint, here):
        run = loss_of, f_student, params, optimizer, train_set, test_set
        train(opt, *run, facts, checkpoint, utils.resume_advice(opt, here))


if __name__ == '__main__':
    sys.exit(utils.call_main(main))
