"""scripts/resize_photographs.py: sizes, pixels against PIL, what is copied, stops and mistakes."""

import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from samples import make_photographs, refused
from support import photographs, program

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'scripts'))
import resize_photographs


@pytest.fixture
def photos(tmp_path):
    return make_photographs(tmp_path / 'photos', train=3, val=2)


def resized(*argv):
    resize_photographs.main([str(a) for a in argv])


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_the_shorter_side_has_the_pixels_and_the_folders_stay(photos, tmp_path):
    resized(photos, tmp_path / 'copy', '--side', 48)
    before = photographs.scan_photographs(photos)
    after = photographs.scan_photographs(tmp_path / 'copy')
    for originals, copies in zip(before, after):
        assert list(originals) == list(copies)
        for files, smaller in zip(originals.values(), copies.values()):
            assert [os.path.basename(f) for f in files] == [os.path.basename(f) for f in smaller]
            for file, copy in zip(files, smaller):
                w, h = Image.open(file).size
                scale = min(1, 48 / min(w, h))
                assert Image.open(copy).size == (round(w * scale), round(h * scale))


def test_the_pixels_are_those_of_pil(tmp_path):
    """A photograph that is not twice as large, so that the JPEG is not decoded at half its size."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (160, 120))
    for split in 'train', 'val':
        for name in 'a', 'b':
            (tmp_path / f'in/{split}/{name}').mkdir(parents=True)
            cv2.imwrite(str(tmp_path / f'in/{split}/{name}/x.png'), smooth)
    resized(tmp_path / 'in', tmp_path / 'out', '--side', 90, '--quality', 100)
    copy = np.asarray(Image.open(tmp_path / 'out/train/a/x.png.jpg').convert('RGB'), float)
    expected = Image.fromarray(smooth[..., ::-1]).resize((120, 90), Image.Resampling.BILINEAR)
    assert np.abs(copy - np.asarray(expected, float)).mean() < 1.5


def test_small_jpegs_are_copied_and_other_formats_become_jpegs(photos, tmp_path):
    png = photos / 'train/beach/small.png'
    cv2.imwrite(str(png), np.full((20, 30, 3), 200, np.uint8))
    resized(photos, tmp_path / 'copy', '--side', 4096)
    copies, originals = contents(tmp_path / 'copy'), contents(photos)
    for path, raw in originals.items():
        if path.suffix == '.jpg':
            assert copies[path] == raw
    assert Image.open(tmp_path / 'copy/train/beach/small.png.jpg').size == (30, 20)


def test_a_repeated_command_writes_what_is_missing(photos, tmp_path, capsys):
    resized(photos, tmp_path / 'copy', '--side', 48)
    whole = contents(tmp_path / 'copy')
    shutil.rmtree(tmp_path / 'copy/train/city')
    (tmp_path / 'copy/val/wood/0.jpg').unlink()
    resized(photos, tmp_path / 'copy', '--side', 48)
    assert contents(tmp_path / 'copy') == whole
    assert '15 photographs, 4 of them written now' in capsys.readouterr().out


def test_mistakes_are_reported_in_one_line_and_change_nothing(photos, tmp_path, capsys):
    main, copy = resize_photographs.main, tmp_path / 'copy'
    before = contents(photos)
    assert 'there is no folder' in refused(main, [tmp_path / 'none', copy], capsys)
    assert 'outside of IN' in refused(main, [photos, photos / 'train/smaller'], capsys)
    assert not copy.exists() and contents(photos) == before
    copy.mkdir()
    (copy / 'mine.txt').write_text('mine')
    assert 'is not empty' in refused(main, [photos, copy], capsys)
    assert contents(copy) == {Path('mine.txt'): b'mine'}
    (copy / 'mine.txt').unlink()
    resized(photos, copy, '--side', 48)
    started = 'was started with --side 48 --quality 95'
    for other in ['--side', 64], ['--side', 48, '--quality', 50]:
        assert started in refused(main, [photos, copy, *other], capsys)
    (photos / 'val/wood/1.jpg').write_bytes(b'\xff\xd8 no photograph')
    (copy / 'val/wood/1.jpg').unlink()
    status = program.call_main(main, [str(a) for a in (photos, copy, '--side', 48)])
    first, last = capsys.readouterr().err.splitlines()
    assert status == 2 and 'wood/1.jpg' in first and '1 broken photographs were left out' in last


def test_broken_photographs_do_not_stop_the_others(photos, tmp_path):
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    resized(photos, whole, '--side', 48)
    (photos / 'train/city/0.jpg').write_bytes(b'\xff\xd8 no photograph')
    assert program.call_main(resize_photographs.main, [str(photos), str(part), '--side', '48']) == 2
    expected = contents(whole)
    del expected[Path('train/city/0.jpg')]
    assert contents(part) == expected
