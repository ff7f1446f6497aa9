"""images.py against PIL: headers, sizes, what is complete, what is refused."""

import errno
import io
import os
import re
import signal
import socket
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

import data
import images
from images import BrokenImage
from support import program
from support.program import UserError


def picture(h=24, w=32, seed=0):
    """A smooth picture, like a photograph: uint8 [h, w, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC))


def saved(image, kind, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def encoded(suffix, image):
    """Bytes of a format that PIL cannot write."""
    return cv2.imencode(suffix, image)[1].tobytes()


def with_chunk(png, name, body):
    """The PNG with one chunk more, after its header."""
    crc = zlib.crc32(name + body).to_bytes(4, 'big')
    return png[:33] + len(body).to_bytes(4, 'big') + name + body + crc + png[33:]


@pytest.fixture(autouse=True)
def no_hanging():
    """A file that is waited for fails the test."""
    signal.alarm(60)
    yield
    signal.alarm(0)


# ------------------------ sizes

EXIF = Image.Exif()
EXIF[0x0112] = 6
FORMATS = {
    'jpeg': lambda im: saved(im, 'JPEG'),
    'jpeg, progressive': lambda im: saved(im, 'JPEG', progressive=True),
    'jpeg, turned': lambda im: saved(im, 'JPEG', exif=EXIF),
    'jpeg, grey': lambda im: saved(im[..., 0].copy(), 'JPEG'),
    'png': lambda im: saved(im, 'PNG'),
    'webp': lambda im: saved(im, 'WEBP'),
    'webp, lossless': lambda im: saved(im, 'WEBP', lossless=True),
    'webp, extended': lambda im: saved(im, 'WEBP', exif=EXIF),
    'bmp': lambda im: saved(im, 'BMP'),
    'tiff': lambda im: saved(im, 'TIFF'),
    'tiff, packed': lambda im: saved(im, 'TIFF', compression='tiff_lzw'),
    'tiff, big': lambda im: saved(im, 'TIFF', big_tiff=True),
    'gif': lambda im: saved(im, 'GIF'),
    'ppm': lambda im: saved(im, 'PPM'),
    'pgm': lambda im: saved(im[..., 0].copy(), 'PPM'),
    'ppm, comments': lambda im: b'P6 # of\n#\n %d#w\n%d 255\n' % im.shape[1::-1] + im.tobytes(),
    'jp2': lambda im: saved(im, 'JPEG2000'),
    'j2k': lambda im: saved(im, 'JPEG2000', no_jp2=True),
    'avif': lambda im: saved(im, 'AVIF'),
    'pam': lambda im: (
        b'P7\n# a\nWIDTH %d\nHEIGHT %d\nDEPTH 3\nMAXVAL 255\n' % im.shape[1::-1]
        + b'TUPLTYPE RGB\nENDHDR\n'
        + im.tobytes()
    ),
    'sun': lambda im: encoded('.sr', im),
    'radiance': lambda im: encoded('.hdr', (im / 255).astype(np.float32)),
}


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('size', [(24, 32), (61, 7), (300, 517)])
def test_the_size_is_that_in_the_header(kind, size):
    raw = FORMATS[kind](picture(*size))
    assert images.image_size(raw) == size[::-1]
    for n in range(min(len(raw), 300)):  # a header that is cut off is no crash
        images.image_size(raw[:n]), images.float_kind(raw[:n])


@pytest.mark.parametrize('kind', FORMATS)
def test_an_image_is_known_by_its_first_bytes(kind, tmp_path):
    (tmp_path / 'a').write_bytes(FORMATS[kind](picture()))
    assert images.begins_as_image(tmp_path / 'a')


@pytest.mark.parametrize(
    'raw',
    [b'', b'BMW, Audi, Opel and so on, for ever', b'P', b'P6', b'P1 is a street', b'GIF', b'RIFF']
    + [b'II Corinthians', b'MMXX', b'x,y\n1,2\n', b'<?xml?>', b'PK\3\4', b'\xd0\xcf\x11\xe0'],
)
def test_text_and_other_files_are_no_images(raw, tmp_path):
    (tmp_path / 'a').write_bytes(raw)
    assert not images.begins_as_image(tmp_path / 'a')


@pytest.mark.parametrize('order', ['II', 'MM'])
@pytest.mark.parametrize('big', [False, True])
def test_tags_of_tiffs_of_both_orders(order, big):
    """Written by hand: width as SHORT, height as LONG, and SampleFormat of three samples, which
    does not fit into the entry."""
    e = '<' if order == 'II' else '>'
    entry, word = (e + 'HHQ', 'Q') if big else (e + 'HHI', 'I')
    head = struct.pack(e + 'HHHQ', 43, 8, 0, 16) if big else struct.pack(e + 'HI', 42, 8)
    size = 20 if big else 12
    start = 2 + len(head)
    outside = start + (8 if big else 2) + 3 * size
    width = struct.pack(entry + 'H', 256, 3, 1, 300).ljust(size, b'\0')
    height = struct.pack(entry + 'I', 257, 4, 1, 70_000).ljust(size, b'\0')
    samples = [3, 3, 3] if not big else [3] * 5
    kind = struct.pack(entry + word, 339, 3, len(samples), outside)
    raw = order.encode() + head + struct.pack(e + ('Q' if big else 'H'), 3)
    raw += width + height + kind + struct.pack(f'{e}{len(samples)}H', *samples)
    assert images.tiff_tags(raw) == {256: 300, 257: 70_000, 339: 3}
    assert images.image_size(raw) == (300, 70_000) and images.float_kind(raw) == 'TIFF'


def patched(raw, old, new):
    assert raw.count(old) >= 1
    return raw.replace(old, new, 1)


def too_large():
    """{name: header of an image of 25000 x 25000 pixels}"""
    im, h, w = picture(300, 517), 300, 517
    side = 25_000
    pair = struct.pack('>II', w, h)
    many = struct.pack('>II', side, side)
    yield 'a.png', patched(saved(im, 'PNG'), pair, many)
    frame, large = struct.pack('>BHH', 8, h, w), struct.pack('>BHH', 8, side, side)
    yield 'a.jpg', patched(saved(im, 'JPEG'), frame, large)
    little = struct.pack('<ii', w, h)
    yield 'a.bmp', patched(saved(im, 'BMP'), little, struct.pack('<ii', side, -side))
    screen = struct.pack('<HH', w, h)
    yield 'a.gif', patched(saved(im, 'GIF'), screen, struct.pack('<HH', side, side))
    yield 'a.ppm', b'P6\n25000 25000\n255\n'
    canvas = struct.pack('<I', w - 1)[:3] + struct.pack('<I', h - 1)[:3]
    larger = 2 * struct.pack('<I', side - 1)[:3]
    yield 'a.webp', patched(saved(im, 'WEBP', exif=EXIF), canvas, larger)
    tiff = saved(im, 'TIFF')
    for tag, old in (256, w), (257, h):
        for kind, code in (3, 'H'), (4, 'I'):
            entry = struct.pack('<HHI' + code, tag, kind, 1, old)
            tiff = tiff.replace(entry, struct.pack('<HHI' + code, tag, kind, 1, side))
    yield 'a.tiff', tiff


@pytest.mark.parametrize('name, raw', list(too_large()))
def test_an_image_of_625_megapixels_is_not_decoded(name, raw, tmp_path, monkeypatch):
    file = tmp_path / name
    file.write_bytes(raw)
    monkeypatch.setattr(cv2, 'imdecode', lambda *_: pytest.fail('decoded'))
    with pytest.raises(BrokenImage, match='25000x25000 pixels: at most 200 megapixels'):
        data.decode(file)


def test_as_many_pixels_as_allowed_are_decoded(tmp_path, monkeypatch):
    (tmp_path / 'a.png').write_bytes(saved(picture(20, 30), 'PNG'))
    monkeypatch.setattr(images, 'MOST_PIXELS', 600)
    assert data.decode(tmp_path / 'a.png').shape == (20, 30, 3)
    monkeypatch.setattr(images, 'MOST_PIXELS', 599)
    with pytest.raises(BrokenImage, match='30x20 pixels'):
        data.decode(tmp_path / 'a.png')
    assert images.image_size(saved(np.zeros((1, 1), np.uint8), 'PNG')) == (1, 1)


def test_a_file_of_many_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / 'a.jpg', 'wb') as file:
        file.truncate(1 << 40)  # takes no space on the disk
    with pytest.raises(BrokenImage, match='at most 2 GB'):
        data.decode(tmp_path / 'a.jpg')


# ------------------------ not regular files


def test_pipes_sockets_devices_and_folders_are_broken_images_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    os.mkfifo('pipe.jpg')
    os.mkdir('folder.jpg')
    os.symlink('pipe.jpg', 'link.jpg')
    os.symlink('/dev/zero', 'device.jpg')
    with socket.socket(socket.AF_UNIX) as s:
        s.bind('socket.jpg')
        names = 'pipe.jpg', 'folder.jpg', 'link.jpg', 'device.jpg', 'socket.jpg'
        descriptors = len(os.listdir('/proc/self/fd'))
        for name in names:
            with pytest.raises(BrokenImage, match=f'{name}: cannot be read: '):
                data.decode(tmp_path / name)
        assert len(os.listdir('/proc/self/fd')) == descriptors


def test_what_cannot_be_opened_is_a_broken_image(tmp_path):
    os.symlink('nowhere', tmp_path / 'dangling.jpg')
    os.symlink('loop.jpg', tmp_path / 'loop.jpg')
    names = 'dangling.jpg', 'loop.jpg', 'missing.jpg', 'n' * 300 + '.jpg'
    for name in names:
        with pytest.raises(BrokenImage) as e:
            data.decode(tmp_path / name)
        assert name in str(e.value) and e.value.status == 2


@pytest.mark.parametrize('code', [errno.EACCES, errno.EPERM])
def test_a_file_that_may_not_be_read_is_a_broken_image(code, tmp_path, monkeypatch):
    refuse(monkeypatch, code)
    with pytest.raises(BrokenImage, match='a.jpg: cannot be read: '):
        data.decode(tmp_path / 'a.jpg')


@pytest.mark.parametrize('code', [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE])
def test_a_failing_disk_is_no_broken_image(code, tmp_path, monkeypatch):
    refuse(monkeypatch, code)
    with pytest.raises(UserError) as e:
        data.decode(tmp_path / 'a.jpg')
    assert not isinstance(e.value, BrokenImage) and e.value.status == 1
    assert os.strerror(code) in str(e.value) and 'a.jpg' in str(e.value)


def refuse(monkeypatch, code):
    def fail(file, *_):
        raise OSError(code, os.strerror(code), file)

    monkeypatch.setattr(os, 'open', fail)


def test_a_folder_that_vanished_is_no_broken_image(tmp_path):
    for name in 'gone/a.jpg', 'gone/too/a.jpg':
        with pytest.raises(UserError, match='its folder is gone') as e:
            data.decode(tmp_path / name)
        assert not isinstance(e.value, BrokenImage) and e.value.status == 1


# ------------------------ JPEGs without an end


def jpegs():
    noisy = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    smooth = picture(40, 48)
    yield 'smooth', saved(smooth, 'JPEG')
    yield 'noisy', saved(noisy, 'JPEG', quality=100, subsampling=0)
    yield 'grey', saved(smooth[..., 0].copy(), 'JPEG')
    yield 'restarts', saved(smooth, 'JPEG', restart_marker_blocks=1)
    yield 'restarts of rows', saved(noisy, 'JPEG', restart_marker_rows=1)
    yield 'flat', saved(np.full((40, 48, 3), 90, np.uint8), 'JPEG', optimize=True)


@pytest.mark.parametrize('kind, raw', list(jpegs()))
def test_a_jpeg_without_an_end_marker_is_complete_if_all_pixels_are_there(kind, raw, tmp_path):
    """PIL agrees: with an end marker put behind, it decodes the same pixels."""
    file = tmp_path / 'a.jpg'
    file.write_bytes(raw)
    whole = data.decode(file)
    with data.quiet_decoders():
        complete = [n for n in range(2, len(raw)) if not data.is_cut_off(raw[:n])]
    assert complete[-2:] == [len(raw) - 2, len(raw) - 1]
    assert complete[0] >= len(raw) - 3  # the last byte before the marker may be padding
    for n in complete:
        file.write_bytes(raw[:n])
        np.testing.assert_array_equal(data.decode(file), whole)
        theirs = Image.open(io.BytesIO(raw[:n].removesuffix(b'\xff') + b'\xff\xd9'))
        np.testing.assert_array_equal(np.asarray(theirs), np.asarray(Image.open(io.BytesIO(raw))))


def test_a_progressive_jpeg_without_an_end_marker_may_lack_a_scan():
    raw = saved(picture(40, 48), 'JPEG', progressive=True)
    scans = [found.start() for found in re.finditer(b'\xff\xda', raw)]
    assert len(scans) > 2
    assert all(data.is_cut_off(raw[:n]) for n in (*scans, len(raw) - 2))


def test_a_baseline_jpeg_of_one_scan_a_colour_may_lack_a_colour():
    """The scan of a grey JPEG, in a frame of three colours."""
    raw = saved(picture(40, 48)[..., 0].copy(), 'JPEG')
    frame = raw.index(b'\xff\xc0')
    three = b'\xff\xc0\0\x11' + raw[frame + 4 : frame + 9] + b'\3\1\x11\0\2\x11\0\3\x11\0'
    assert data.is_cut_off((raw[:frame] + three + raw[frame + 13 :])[:-2])


def test_the_end_of_usual_jpegs_costs_no_decoding(monkeypatch):
    monkeypatch.setattr(cv2, 'imdecode', lambda *_: pytest.fail('decoded'))
    raw = saved(picture(), 'JPEG')
    assert not data.is_cut_off(raw) and not data.is_cut_off(raw + b'\0' * 9)


# ------------------------ depth


@pytest.fixture
def warned(monkeypatch):
    monkeypatch.setattr(program, 'printed', set())


def deep_png(values, bits=None):
    raw = encoded('.png', values)
    channels = 1 if values.ndim == 2 else values.shape[2]
    return raw if bits is None else with_chunk(raw, b'sBIT', bytes([bits] * channels))


@pytest.mark.parametrize('grey', [False, True])
@pytest.mark.parametrize('bits', [9, 10, 12, 14])
def test_a_16_bit_png_is_scaled_by_its_significant_bits(bits, grey, tmp_path, capfd, warned):
    image = picture()[..., 0].copy() if grey else picture()
    low = np.random.default_rng(0).integers(0, 1 << (bits - 8), image.shape)
    values = (image.astype(int) << (bits - 8)) + low
    rgb = values if grey else values[..., ::-1]
    (tmp_path / 'a.png').write_bytes(deep_png(rgb.astype(np.uint16), bits))
    expected = np.dstack([image] * 3) if grey else image
    np.testing.assert_array_equal(data.decode(tmp_path / 'a.png'), expected)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('bits', [None, 12, 16])
def test_a_16_bit_png_with_16_bits_of_content_keeps_its_high_bytes(bits, tmp_path, capfd, warned):
    values = np.random.default_rng(0).integers(0, 65536, (9, 8, 3)).astype(np.uint16)
    (tmp_path / 'a.png').write_bytes(raw := deep_png(values, bits))
    ours = data.decode(tmp_path / 'a.png')
    np.testing.assert_array_equal(ours, values[..., ::-1] >> 8)
    plain = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(ours, plain[..., ::-1])
    assert capfd.readouterr().err == ''


def test_a_16_bit_png_of_12_bits_without_the_chunk_is_warned_about_once(tmp_path, capfd, warned):
    for name in 'a.png', 'b.png':
        (tmp_path / name).write_bytes(deep_png(picture().astype(np.uint16) << 4))
        assert data.decode(tmp_path / name).max() < 16
    data.decode_all([tmp_path / 'a.png', tmp_path / 'b.png'])
    said = capfd.readouterr().err
    assert said.count('\n') == 1 and 'a.png' in said and 'sBIT' in said


@pytest.mark.parametrize('largest', [1000, 4095, 65535])
def test_a_pgm_is_scaled_by_its_largest_value(largest, tmp_path):
    values = np.linspace(0, largest, 256).round().astype('>u2').reshape(16, 16)
    (tmp_path / 'a.pgm').write_bytes(b'P5\n16 16\n%d\n' % largest + values.tobytes())
    ours = data.decode(tmp_path / 'a.pgm')[..., 0].astype(int)
    assert np.abs(ours - np.arange(256).reshape(16, 16)).max() <= 1


@pytest.mark.parametrize('order', ['<f4', '>f4'])
def test_a_float_tiff_is_refused_by_name(order, tmp_path):
    image = Image.fromarray((picture()[..., 0] / 255).astype(np.float32))
    image.save(tmp_path / 'a.tiff')
    if order == '>f4':
        tags = {256: 2, 257: 1, 258: 32, 259: 1, 262: 1, 273: 122, 277: 1, 278: 1, 279: 8, 339: 3}
        entries = b''.join(struct.pack('>HHII', *(t, 4, 1, v)) for t, v in tags.items())
        raw = b'MM\0*\0\0\0\x08' + struct.pack('>H', len(tags)) + entries + bytes(12)
        (tmp_path / 'a.tiff').write_bytes(raw)
    with pytest.raises(BrokenImage, match='float TIFF'):
        data.decode(tmp_path / 'a.tiff')


def test_a_float_map_is_refused_by_name(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.pfm'), (picture() / 255).astype(np.float32))
    with pytest.raises(BrokenImage, match='float PFM'):
        data.decode(tmp_path / 'a.pfm')


def test_a_png_of_nothing_is_a_broken_image(tmp_path):
    for raw in b'\x89PNG\r\n\x1a\n\0\0\0\0IEND', b'\xff\xd8\xff\xd9', b'BM', b'II*\0', b'P6 1':
        (tmp_path / 'a.png').write_bytes(raw)
        with pytest.raises(BrokenImage), data.quiet_decoders():
            data.decode(tmp_path / 'a.png')
