"""Print the classes that a trained net predicts for image files, with probabilities.

    python examples/classify.py logs/scenes_at_18 photo1.jpg photo2.jpg
    python examples/classify.py net.onnx photo.jpg

NET is a run folder, a weights file, or an ONNX file that scripts/convert.py wrote with --normalize.
Photographs are resized and cropped as imagenet.py tests them. For a net of cifar.py the whole image
is resized.
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import resnet
from support import program
from support.logs import class_names
from support.options import Parser, number
from support.photographs import centre_view
from support.program import UserError, open_regular, printable
from support.weights import image_shape, load_net, normalisation

parser = Parser(__doc__)
add = parser.add_argument
add('net', metavar='NET', help='run folder, weights file, or ONNX file')
add('images', nargs='+', metavar='IMAGE', help='image files')
add('--top', default=3, type=number(int, 1), metavar='N', help='classes to print (default: 3)')
add('--image_size', type=number(int, 8, 1024), help='side of the crops (default: as in training)')


def open_net(opt):
    """(logits of uint8 images [B, H, W, 3], layout, (H, W), class names) of NET."""
    net = load_net(opt.net)
    f, params, records = net
    if resnet.num_classes(params) is None:
        raise UserError(f'NET {opt.net}: has no head (fc.*), so it knows no classes')

    def logits(images):
        images = data.normalize(torch.from_numpy(images), *normalisation(params))
        return f(images, params, False)[0]

    shape = None if opt.image_size else image_shape(f'NET {opt.net}', net)
    return logits, resnet.layout(params), shape, class_names(records)


def open_onnx(opt):
    """The same of an ONNX file."""
    try:
        import onnxruntime

        with open_regular(opt.net) as file:  # onnxruntime takes no path that is not UTF-8
            model = file.read()
        session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    except Exception as e:  # the classes of its errors are not documented
        reason = getattr(e, 'strerror', None) or str(e)[:300]
        raise UserError(f'NET {opt.net}: {reason}') from e
    images, properties = session.get_inputs()[0], session.get_modelmeta().custom_metadata_map
    shape = tuple(images.shape[2:])
    if images.type != 'tensor(uint8)':
        raise UserError(f'NET {opt.net}: takes {images.type}; convert it with --normalize')
    if opt.image_size and set(shape) != {opt.image_size}:
        raise UserError(f'--image_size {opt.image_size}: {opt.net} takes only {shape}')

    def logits(images):
        return torch.from_numpy(session.run(None, {'images': images.transpose(0, 3, 1, 2)})[0])

    classes = json.loads(properties.get('classes', '[]'))
    return logits, properties.get('layout'), shape, classes


def view(file, layout, shape):
    """uint8 [H, W, 3] RGB."""
    if layout in resnet.SMALL:
        return cv2.resize(data.decode(file), shape[::-1], interpolation=cv2.INTER_AREA)
    return centre_view(file, shape[0])


def main(argv=None):
    opt, _ = parser.parse(argv)
    onnx = Path(opt.net).suffix.lower() == '.onnx'
    logits, layout, shape, classes = (open_onnx if onnx else open_net)(opt)
    shape = (opt.image_size, opt.image_size) if opt.image_size else shape
    for file in opt.images:
        with torch.inference_mode():
            p = logits(np.stack([view(file, layout, shape)])).softmax(1)[0]
        best = p.topk(min(opt.top, len(p)))
        names = [classes[i] if classes else f'class {i}' for i in best.indices.tolist()]
        found = ', '.join(f'{name} {100 * v:.1f} %' for name, v in zip(names, best.values.tolist()))
        print(printable(f'{file}: {found}'))


if __name__ == '__main__':
    sys.exit(program.call_main(main))
