"""The attention-transfer loop as published in 2018, rewritten from its description.

benchmark.py measures it. It is float32 and eager, with contiguous tensors. Images pass one by one
through torchvision in two loader workers, and every step reads its losses back.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data


class Images(torch.utils.data.Dataset):
    """Augmented images, one at a time: (float32 [3, 32, 32], label)."""

    def __init__(self, train_set: data.ImageSet):
        self.images, self.labels = train_set.images.numpy(), train_set.labels.tolist()
        mean, std = ([v / 255 for v in values] for values in (data.MEAN, data.STD))
        self.transform = T.Compose(
            [
                T.Pad(4, padding_mode='reflect'),
                T.RandomHorizontalFlip(),
                T.RandomCrop(32),
                T.ToTensor(),
                T.Normalize(mean, std),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def endless_batches(images: Images, batch_size, device):
    while True:
        yield from torch.utils.data.DataLoader(
            images,
            batch_size,
            shuffle=True,
            num_workers=2,
            multiprocessing_context='fork',
            pin_memory=device.type == 'cuda',
        )


def batch_norm(x, params, base, training):
    mean, var, weight, bias = (
        params[f'{base}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')
    )
    return F.relu(F.batch_norm(x, mean, var, weight, bias, training), inplace=True)


def block(x, params, base, training, stride):
    o1 = batch_norm(x, params, f'{base}.bn0', training)
    y = F.conv2d(o1, params[f'{base}.conv0'], stride=stride, padding=1)
    o2 = batch_norm(y, params, f'{base}.bn1', training)
    z = F.conv2d(o2, params[f'{base}.conv1'], padding=1)
    convdim = params.get(f'{base}.convdim')
    return z + (x if convdim is None else F.conv2d(o1, convdim, stride=stride))


def net(x, params, base, training):
    """(logits, groups) of a WRN-16."""
    x, groups = F.conv2d(x, params[f'{base}conv0'], padding=1), []
    for i in range(3):
        for j in range(2):
            stride = 2 if i > 0 and j == 0 else 1
            x = block(x, params, f'{base}group{i}.block{j}', training, stride)
        groups.append(x)
    o = F.avg_pool2d(batch_norm(x, params, f'{base}bn', training), 8).view(len(x), -1)
    return F.linear(o, params[f'{base}fc.weight'], params[f'{base}fc.bias']), groups


def attention(x):
    return F.normalize(x.pow(2).mean(1).view(len(x), -1))


def make_run(params: dict, train_set: data.ImageSet, batch_size: int, beta: float, device):
    """run(steps) of the loop. params: those of both nets, named student.* and teacher.*"""
    params = {k: v.detach().contiguous().requires_grad_(v.requires_grad) for k, v in params.items()}
    trainable = [v for v in params.values() if v.requires_grad]
    optimizer = torch.optim.SGD(trainable, 0.1, momentum=0.9, weight_decay=5e-4)
    batches = endless_batches(Images(train_set), batch_size, device)

    def run(steps):
        for _ in range(steps):
            x, targets = (v.to(device) for v in next(batches))
            logits, groups = net(x, params, 'student.', True)
            with torch.no_grad():
                _, teacher_groups = net(x, params, 'teacher.', False)
            at_losses = [
                (attention(s) - attention(t)).pow(2).mean() for s, t in zip(groups, teacher_groups)
            ]
            _ = [v.item() for v in at_losses]
            loss = F.cross_entropy(logits, targets) + beta * sum(at_losses)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            _ = loss.item(), logits.detach().topk(1)[1].cpu()

    return run
