"""imagenet.py against a plain loop over the recipe, with torchvision's crops and torch's SGD, on
one process and on two ranks."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF

import data
import resnet
from samples import random_resnet, records_of, weights_of
from support import photographs, weights
from test_imagenet import command
from utils import is_statistic

SIZE, BATCH, EPOCHS, DROPS, SEED, BETA, LR = 64, 24, 3, (2, 3), 5, 20.0, 0.005


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """29 photographs: the last batch has 5, of which two ranks get 3 and 2."""
    home = tmp_path_factory.mktemp('recipe')
    # So large that crops are never enlarged, where PIL's pixels differ by more, and no JPEGs, which
    # imagenet.py may decode at half their size.
    rng = np.random.default_rng(0)
    for split, n in ('train', 10), ('val', 2):
        for c, name in enumerate(['beach', 'city', 'wood']):
            (home / split / name).mkdir(parents=True)
            for i in range(n - (split == 'train' and c == 1)):
                small = rng.integers(0, 256, (7, 9, 3), np.uint8)
                small[..., c] |= 128
                size = rng.integers(300, 400, 2).tolist()
                Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(
                    home / split / name / f'{i}.png'
                )
    # A teacher with batch norm, whose running statistics are not those of these images.
    weights.save_params(home / 'teacher.hkl', random_resnet(18, 0.5, 3))
    torch.manual_seed(0)
    _, params = resnet.resnet(18, 0.125, 3)
    # A ReLU that a rounding error flips would change the gradient by a hundredth: keep them open.
    for name in params:
        if re.search(r'bn\w*\.bias', name):
            params[name].data += 4
    weights.save_params(home / 'start.hkl', params)
    return home


def crop(file, epoch, index):
    """float32 [3, SIZE, SIZE] normalised: RandomResizedCrop and flip as torchvision describes them,
    with the draws of the photograph.

    The pixels are imagenet.py's, once they agree with torchvision's to a grey level: the training
    would amplify the rest.
    """
    u = data.uniforms(23, SEED, epoch, index)
    image = Image.open(file).convert('RGB')
    width, height = image.size
    for i in range(10):
        area = width * height * (0.08 + 0.92 * u[2 * i])
        ratio = (3 / 4) * (16 / 9) ** u[2 * i + 1]
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            break
    top, left = int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1))
    image = TF.resized_crop(image, top, left, h, w, [SIZE, SIZE], antialias=True)
    image = TF.hflip(image) if u[22] < 0.5 else image
    pixels = photographs.train_view(file, SIZE, SEED, epoch, index)
    assert np.abs(np.asarray(image, float) - pixels).mean() < 1
    return TF.normalize(TF.to_tensor(pixels), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def centre(file):
    pixels = photographs.centre_view(file, SIZE)
    return TF.normalize(TF.to_tensor(pixels), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def attention_map(x):
    return F.normalize(x.square().mean(1).flatten(1))


def loss_of(x, targets, f, params, f_t, params_t):
    logits, groups = f(x, params, True)
    with torch.no_grad():
        _, groups_t = f_t(x, params_t, False)
    pairs = zip(groups, groups_t)
    ats = [(attention_map(s) - attention_map(t)).square().mean() for s, t in pairs]
    return F.cross_entropy(logits, targets) + BETA * sum(ats)


def plain_loop(home, ranks):
    """(parameters, mean loss of each epoch) after the recipe.

    Each rank normalises its part of a batch, every ranks-th image, by its own statistics. The
    gradient is that of the mean over the batch. The running statistics are those of the first rank.
    """
    f_t, params_t, _ = weights.load_net(home / 'teacher.hkl')
    f, params, _ = weights.load_net(home / 'start.hkl')
    trained = [v.requires_grad_() for k, v in params.items() if not is_statistic(k)]
    folder = photographs.scan_photographs(home)[0]
    files = [(file, c) for c, group in enumerate(folder.values()) for file in group]
    assert len(files) == 29
    losses, rate = [], LR
    optimizer = torch.optim.SGD(trained, rate, 0.9, weight_decay=1e-4)
    for epoch in range(1, EPOCHS + 1):
        if epoch in DROPS:
            rate *= 0.5
            optimizer = torch.optim.SGD(trained, rate, 0.9, weight_decay=1e-4)
        total = 0.0
        for batch in data.epoch_order(len(files), SEED, epoch).split(BATCH):
            loss = 0.0
            for rank in range(ranks):
                part = batch[rank::ranks].tolist()
                x = torch.stack([crop(files[i][0], epoch, i) for i in part])
                targets = torch.tensor([files[i][1] for i in part])
                own = params
                if rank:
                    own = {k: v.clone() if is_statistic(k) else v for k, v in params.items()}
                own_loss = loss_of(x, targets, f, own, f_t, params_t)
                loss = loss + own_loss * len(part) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(files))
    return params, losses


@pytest.mark.usefixtures('forked_scripts')
def test_imagenet_follows_the_recipe(home):
    for ranks in 1, 2:
        follows_the_recipe(home, ranks)


def follows_the_recipe(home, ranks):
    save = home / f'logs/{ranks}'
    options = f'--image_size {SIZE} --batch_size {BATCH} --epochs {EPOCHS} --seed {SEED} --lr {LR} '
    options += '--lr_decay_ratio 0.5'
    options += f' --epoch_step [{DROPS[0]},{DROPS[1]}] --width 0.125 --student_params start.hkl'
    options += f' --teacher_params teacher.hkl --beta {BETA} --save {save}'
    done = command(home, '--imagenetpath .', options, processes=ranks)
    assert done.returncode == 0, done.stderr
    expected, losses = plain_loop(home, ranks)
    assert [r['train_loss'] for r in records_of(save)] == pytest.approx(losses, rel=1e-4)
    # Both ranks must test with the statistics of the first.
    folder = photographs.scan_photographs(home)[1]
    tested = [(centre(file), c) for c, group in enumerate(folder.values()) for file in group]
    x, targets = torch.stack([x for x, _ in tested]), torch.tensor([c for _, c in tested])
    f = weights.load_net(home / 'start.hkl').f
    test_loss = F.cross_entropy(f(x, expected, False)[0], targets).item()
    assert records_of(save)[-1]['test_loss'] == pytest.approx(test_loss, rel=1e-4)
    before, found = weights.load_params(home / 'start.hkl'), weights_of(save)
    trained = [k for k in expected if not is_statistic(k)]
    gap = sum((found[k] - expected[k].detach()).square().sum() for k in trained)
    moved = sum((expected[k].detach() - before[k]).square().sum() for k in trained)
    assert gap.sqrt() < 1e-3 * moved.sqrt()
    for name in expected.keys() - set(trained):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
