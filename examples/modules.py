"""Torch modules for transfer.py: made by name, with the images that they expect."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), '.']
import data
from support.photographs import centre_view
from support.program import UserError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Net(NamedTuple):
    """A torch module and the images that it expects."""

    source: str  # the option that names it
    module: torch.nn.Module
    num_classes: int
    size: int  # of the images
    mean: list  # of RGB in 0 to 1
    std: list

    def __call__(self, images):
        """logits of uint8 images [B, H, W, 3]."""
        mean, std = ([255 * v for v in values] for values in (self.mean, self.std))
        x = data.normalize(images, mean, std)
        # In channels_last, oneDNN corrupts memory in narrow convolutions, see utils.conv2d.
        logits = self.module(x.contiguous() if x.device.type == 'cpu' else x)
        # Some nets add auxiliary logits or features.
        return logits[0] if isinstance(logits, tuple) else getattr(logits, 'logits', logits)

    @torch.inference_mode()
    def accuracy(self, val, size: int) -> float:
        """The test accuracy in per cent on photographs.Photographs."""
        self.module.eval()
        batches, right = torch.arange(len(val.labels)).split(100), 0
        for images, targets in val.batches(
            batches, lambda file, _, out: centre_view(file, size, out)
        ):
            right += int((self(images).argmax(1) == targets).sum())
        return 100 * right / len(val.labels)


def make_nets(opt, num_classes: int) -> tuple:
    """(student, teacher or None) with random values of --seed. Sets opt.image_size if it was not
    given: to the larger of the nets' own.

    The teacher changes neither the student's initial values nor what is drawn afterwards.
    """
    torch.manual_seed(opt.seed)
    student, teacher = make('--student', opt.student, num_classes, opt), None
    if opt.teacher:
        teacher = make('--teacher', opt.teacher, opt.teacher_classes or num_classes, opt)
    torch.manual_seed(opt.seed)
    opt.image_size = opt.image_size or max(net.size for net in (student, teacher) if net)
    return student, teacher


def make(option: str, net: str, num_classes: int, opt) -> Net:
    """The net timm:NAME or MODULE:FUNCTION with random weights; opt: --mean and --std. Raises
    UserError that begins with the option if there is no such net."""
    source, (package, _, name) = f'{option} {net}', net.partition(':')
    size, (mean, std) = 224, IMAGENET
    if not name:
        raise UserError(f'{source}: is neither timm:NAME nor MODULE:FUNCTION')
    try:
        if package == 'timm':
            module = import_module('timm').create_model(name, num_classes=num_classes)
            config = module.pretrained_cfg
            size, mean, std = config['input_size'][-1], config['mean'], config['std']
        else:
            module = import_from(package, name)(num_classes=num_classes)
        if package == 'torchvision.models':
            config = torchvision.models.get_model_weights(name).DEFAULT.transforms()
            size, mean, std = config.crop_size[0], config.mean, config.std
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as e:
        hint = '; pip install timm' if getattr(e, 'name', None) == 'timm' else ''
        raise UserError(f'{source}: {type(e).__name__}: {str(e)[:300]}{hint}') from e
    if not isinstance(module, torch.nn.Module):
        raise UserError(f'{source}: returns {type(module).__name__}, not a torch.nn.Module')
    return Net(source, module, num_classes, size, opt.mean or mean, opt.std or std)


def import_from(package: str, name: str):
    """The function of a module, which may be a file of the current folder. Raises ImportError if a
    file of this repository has that name."""
    module, own = import_module(package), f'{package}.py'
    if os.path.exists(own) and not os.path.samefile(own, module.__file__):
        raise ImportError(f'{own} has the name of {module.__file__}; rename yours')
    return getattr(module, name)
