"""Convert nets between our files, torchvision's and ONNX. The logits stay the same.

    # torchvision's weights, downloaded once: a teacher for imagenet.py
    python scripts/convert.py resnet34 resnet-34.hkl
    # for torchvision's resnet18, or as .safetensors
    python scripts/convert.py logs/resnet_18 resnet18.pth
    # batch norms folded into the convolutions
    python scripts/convert.py resnet18.pth folded.hkl --fold
    # photographs -> logits
    python scripts/convert.py logs/resnet_18 net.onnx --normalize

IN is a run folder or a weights file of any net (see docs/weights.md). If there is no
such path, it is a model of torchvision: resnet18, resnet34, resnet50, resnet101, resnet152 or
wide_resnet50_2. Its first weights (IMAGENET1K_V1) are downloaded.

The suffix of OUT gives the format, always in float32:
    .hkl                 our names
    .pth, .safetensors   torchvision's names for a resnet; our names for wrn, nin, folded and affine
    .onnx                `images` [batch, 3, H, W], RGB -> `logits` [batch, classes]

--fold gives the layout of the released ResNet-18, ResNet-34 and WRN-50-2. A resnet in .onnx is
always folded. Converting to torchvision's layout and back changes only num_batches_tracked, which
becomes 0.

--normalize uses the statistics of the training: CIFAR's for wrn and nin, ImageNet's for the others.
--image_size defaults to that of a run, as its log has it, else 32 for wrn and nin, 224 for the
others.
"""

import http.client
import io
import json
import os
import re
import sys
import warnings
from pathlib import Path

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import resnet
from support import names, program
from support.files import check_file, write_atomically
from support.logs import class_names
from support.options import Parser, number
from support.program import UserError
from support.weights import check_net, exists, image_shape, load_net, normalisation, save_params

FORMATS = ('.hkl', '.pth', '.safetensors', '.onnx')
MODELS = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'wide_resnet50_2')

parser = Parser(__doc__)
add = parser.add_argument
add('source', metavar='IN', help='run folder, weights file, or a model of torchvision')
add('out', metavar='OUT', help='.hkl, .pth, .safetensors or .onnx file, see above')
add(
    '--fold',
    action='store_true',
    help='fold the batch norms of a resnet into its convolutions, in float64',
)
add(
    '--normalize',
    action='store_true',
    help='.onnx: take uint8 images, normalize them in the graph (default: normalized float32)',
)
add(
    '--image_size',
    type=number(int, 8, 4096),
    metavar='N',
    help='.onnx: image height and width (default: see above)',
)
add('--force', action='store_true', help='overwrite OUT')


def main(argv=None):
    opt, given = parser.parse(argv)
    out = Path(opt.out)
    check_out(out, opt.force, given)
    net = load_net(opt.source if exists(opt.source) else fetch(opt.source))
    f, params, records = net
    # A graph is folded in any case: traced by torch 2.6, the padding of a resnet is a tensor, which
    # its convolutions refuse.
    if opt.fold or out.suffix == '.onnx' and resnet.layout(params) == 'resnet':
        f, params = check_net(fold(params, opt.source), f'{opt.source}, folded')
    kind, (depth, width, num_classes) = resnet.layout(params), resnet.net_shape(params)
    shown = 'resnet with folded batch norms' if kind == 'folded' else kind
    what = f'{shown} of depth {depth}, width {width:g}, {num_classes or "no"} classes'
    file = io.BytesIO()
    if out.suffix == '.onnx':
        if num_classes is None:
            raise UserError(f'IN {opt.source}: the net has no head (fc.*), so no logits for {out}')
        side = opt.image_size
        H, W = (side, side) if side else image_shape(f'IN {opt.source}', net)
        properties = {'layout': kind}
        if classes := class_names(records):
            properties['classes'] = json.dumps(classes)
        scale = normalisation(params) if opt.normalize else None
        export(f, params, (H, W), scale, file, properties)
        dtype = 'uint8' if opt.normalize else 'normalised float32'
        what += f', images [batch, 3, {H}, {W}] in {dtype}, cropped and resized by the caller'
    elif out.suffix != '.hkl':
        # Clones: of tensors that share memory torch.save writes all of it, and safetensors refuses
        # them.
        params = {k: v.clone() for k, v in params.items()}
        params = names.to_torchvision(params) if kind == 'resnet' else params
        what += f', {"names of torchvision" if kind == "resnet" else "our names"}'
        if kind == 'resnet' and width != 1 and (depth, width) != (50, 2):
            what += ' (torchvision has no model of this width)'
        if out.suffix == '.pth':
            torch.save(params, file)
        else:
            file.write(safetensors.torch.save(params, {'format': 'pt'}))
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == '.hkl':
        save_params(out, params)
    else:
        write_atomically(out, lambda temporary: temporary.write_bytes(file.getbuffer()))
    print(f'wrote {out}: {what}')


def check_out(out, force, given):
    """Raise UserError if OUT cannot be written, or an option does not fit it: before a net is
    downloaded or read."""
    if out.suffix not in FORMATS:
        raise UserError(f'OUT {out}: its name must end in {", ".join(FORMATS)}')
    for name in sorted(given & {'normalize', 'image_size'}):
        if out.suffix != '.onnx':
            raise UserError(f'--{name}: has no effect unless OUT ends in .onnx, not {out}')
    check_file(out, 'OUT')
    if os.path.lexists(out) and not force:
        raise UserError(f'OUT {out}: already exists; give --force to overwrite it')
    if out.suffix == '.onnx':
        try:
            import onnx  # noqa: F401
        except ImportError as e:
            raise UserError(f'OUT {out}: needs a package ({e}): pip install onnx') from e


def fetch(name) -> Path:
    """The file of torchvision's first weights of that model, fetched to where torchvision itself
    looks for it."""
    if name not in MODELS:
        raise UserError(
            f'IN {name}: no such run folder or weights file, nor one of {", ".join(MODELS)}'
        )
    from torchvision.models import get_model_weights

    url = get_model_weights(name).IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir(), 'checkpoints', Path(url).name)
    if not file.exists():
        print(f'fetching {url} to {file}', flush=True)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            crc = re.search(r'-([0-9a-f]+)\.', file.name)[1]
            torch.hub.download_url_to_file(url, str(file), crc, progress=sys.stderr.isatty())
        # RuntimeError: what came has another hash.
        except (OSError, http.client.HTTPException, RuntimeError) as e:
            raise UserError(
                f'IN {name}: cannot fetch {url} ({e}); download it elsewhere, and give the file'
            ) from e
    return file


def fold(params, source) -> dict:
    """The layout `folded` of a resnet: in testing a batch norm is
    scale * x + (bias - scale * mean), and its convolution takes that in."""
    kind = resnet.layout(params)
    if kind != 'resnet':
        why = 'it has no batch norms'
        if kind == 'wrn':
            why = (
                'its bn0 and bn follow sums, not convolutions, so they cannot be folded, '
                'and no layout has only bn1 folded'
            )
        if kind == 'nin':
            why = 'folded, its names would be those of a NIN without ReLU before pooling'
        raise UserError(f'--fold: {source} is a net of the layout {kind}: {why}')
    folded = {}
    for name, weight in params.items():
        if 'conv' not in name:
            continue
        gain, bias, mean, var = (
            params[f'{name.replace("conv", "bn")}.{k}'].double()
            for k in ('weight', 'bias', 'running_mean', 'running_var')
        )
        scale = gain / (var + 1e-5).sqrt()
        base = name.replace('convdim', 'conv_dim')
        folded[f'{base}.weight'] = (weight.double() * scale.view(-1, 1, 1, 1)).float()
        folded[f'{base}.bias'] = (bias - scale * mean).float()
    return folded | {k: v for k, v in params.items() if k.startswith('fc.')}


class Graph(torch.nn.Module):
    """images -> logits of a net. Its parameters are buffers, or they would be constants among the
    nodes of the graph."""

    def __init__(self, f, params, scale):
        super().__init__()
        self.f, self.names = f, list(params)
        self.scale = scale and [torch.tensor(v).view(3, 1, 1) for v in scale]
        for name, value in params.items():
            self.register_buffer(name.replace('.', '/'), value)

    def forward(self, images):
        if self.scale:
            images = (images.float() - self.scale[0]) / self.scale[1]
        params = {name: getattr(self, name.replace('.', '/')) for name in self.names}
        return self.f(images, params, False)[0]


def export(f, params, shape, scale, file, properties) -> None:
    """Write the net as ONNX, for any number of images of that (height, width).

    scale: (mean, std) of the images, which are then uint8; properties: {name: text}, the metadata.
    """
    if sum(v.nbytes for v in params.values()) > 2**31 - 2**24:
        raise UserError('OUT: ONNX holds at most 2 GiB, and this net has more; write .safetensors')
    images = torch.zeros(1, 3, *shape, dtype=torch.uint8 if scale else torch.float32)
    options = {'input_names': ['images'], 'output_names': ['logits'], 'opset_version': 17}
    options['dynamic_axes'] = {'images': {0: 'batch'}, 'logits': {0: 'batch'}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        # The newer exporter (dynamo) needs onnxscript beside onnx, and puts the parameters into a
        # second file.
        torch.onnx.export(Graph(f, params, scale).eval(), (images,), file, dynamo=False, **options)
    import onnx

    model = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(model, properties)
    file.seek(0), file.truncate()
    file.write(model.SerializeToString())


if __name__ == '__main__':
    sys.exit(program.call_main(main))
