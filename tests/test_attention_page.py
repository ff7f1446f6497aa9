"""scripts/attention_page.py: colours, and the place of every picture and text."""

import itertools
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from attention_samples import IMAGES, linear_net, net_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'scripts'))
import attention
import attention_page as page


def box_of(text):
    """(left, upper, right, lower) of a text, from the page's upper left corner."""
    box, H = text.get_window_extent(), text.figure.get_figheight() * text.figure.dpi
    return box.x0, H - box.y1, box.x1, H - box.y0


# ------------------------ colours


@pytest.mark.parametrize('grey', [0, 90, 200, 255])
def test_a_higher_value_is_brighter_on_a_uniform_image(grey):
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(8, 0)
    shown = page.overlay(np.full((8, 256, 3), grey, np.uint8), ramp)[0] / 255
    linear = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16  # CIE L* of sRGB
    assert np.diff(lightness).min() > -0.2, 'except rounding to bytes'
    assert np.diff(lightness[::8]).min() > 0.5
    assert lightness[-1] > lightness[0] + 60


def test_a_map_and_its_double_look_the_same():
    q = np.random.default_rng(0).uniform(size=(8, 8)).astype(np.float32)
    assert np.array_equal(page.overlay(IMAGES[0], q), page.overlay(IMAGES[0], 2 * q))


def test_one_pixel_of_a_gradient_does_not_darken_the_others():
    """Gradients are clipped at their 99th percentile, maps are not."""
    values = np.zeros((16, 16), np.float32)
    values[:, 8:], values[3, 12] = 1, 1000
    seen = page.Seen('net', {'': [values]}, values, '', 'black')
    ((drawn_map, gradient),) = page.picture_rows(np.full((16, 16, 3), 90, np.uint8), seen)
    right, left = (side.mean((0, 1)) for side in (gradient[8:, 8:], gradient[:, :8]))
    assert np.array_equal(gradient[3, 12], right) and right.mean() > left.mean() + 60
    assert drawn_map[3, 12].mean() > 60 + drawn_map[8:, 8:].mean()


# ------------------------ texts


def test_long_texts_in_a_picture_keep_their_ends():
    figure = page.new_page(200, 50)
    page.put_text(figure, 'a_very_long_name_of_an_image_0017.jpg', 50, 5, 100)
    (text,) = [t.get_text() for t in figure.texts]
    assert text.startswith('a_very') and text.endswith('17.jpg') and text.count('…') == 1


# ------------------------ layouts


def rows_of(labels, maps, gradient, names=('a', 'b')):
    """Rows of random nets and images."""
    nets = [net_of(linear_net(i)[0], label, ['a', 'b', 'c']) for i, label in enumerate(labels)]
    images = [cv2.resize(image, (32, 32), interpolation=cv2.INTER_NEAREST) for image in IMAGES[:2]]
    nets = [net._replace(f=lambda x, p, t, f=net.f: f(x[..., ::4, ::4], p, t)) for net in nets]
    return [
        page.Row(
            name,
            image,
            [attention.look(image, net, maps, gradient, name, ['a', 'b', 'c']) for net in nets],
        )
        for name, image in zip(names, itertools.cycle(images))
    ]


def place_of(picture, shown):
    """(row, column) of a picture in the page, pixel for pixel."""
    difference = cv2.matchTemplate(shown, picture, cv2.TM_SQDIFF)
    assert difference.min() <= 1e-6 * difference.max()
    return np.unravel_index(difference.argmin(), difference.shape)


def drawn(rows, layout, file):
    """(page, its pixels)."""
    figure = page.draw(rows, attention.LAYOUTS[layout])
    figure.savefig(file)
    return figure, cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)


@pytest.mark.parametrize('layout', ['rows', 'columns'])
@pytest.mark.parametrize('maps', [['sum2'], ['sum1', 'max']])
def test_picture_holds_every_map_and_no_text_is_cut_off_or_in_another(layout, maps, tmp_path):
    labels = ['teacher', 'a student of that teacher with a name far too long for its place' * 3]
    rows = rows_of(labels, maps, True, ['a', 'b' * 80])
    figure, shown = drawn(rows, layout, tmp_path / 'x.png')
    H, W = shown.shape[:2]
    side = page.Cell(rows, 128).fit(rows[0].image).shape[0]
    places = set()
    for row in rows:
        pictures = [row.image]
        for seen in row.seen:
            pictures += itertools.chain(*page.picture_rows(row.image, seen))
        assert len(pictures) == 1 + 2 * (2 * len(maps) + 1)
        places |= {place_of(picture.repeat(4, 0).repeat(4, 1), shown) for picture in pictures}
    assert len(places) == 2 * len(pictures)

    texts = [t for t in figure.texts if t.get_text()]
    boxes = [box_of(t) for t in texts]
    assert all(0 <= x0 and 0 <= y0 and x1 <= W and y1 <= H for x0, y0, x1, y1 in boxes)
    for i, a in enumerate(boxes):
        assert all(apart(a, b, 2) for b in boxes[:i]), texts[i]
        assert all(apart(a, (x, y, x + side, y + side)) for y, x in places), texts[i]
    heads = {t.get_text() for t in texts}
    assert {'image', 'gradient', 'group 0', 'group 1', '8×8'} <= heads
    assert len(maps) == 1 or {'sum |A|', 'max |A|'} <= heads


@pytest.mark.parametrize('layout', ['rows', 'columns'])
@pytest.mark.parametrize('maps', [['sum2'], ['sum1', 'max']])
def test_a_prediction_stands_below_its_own_net(layout, maps, tmp_path):
    rows = []
    for row in rows_of(['teacher', 'student'], maps, False):
        seen = [s._replace(prediction=f'{s.label}-{row.name}') for s in row.seen]
        rows.append(row._replace(seen=seen))
    figure, shown = drawn(rows, layout, tmp_path / 'x.png')
    boxes = {t.get_text(): box_of(t) for t in figure.texts}
    labels = [(t.get_text(), box_of(t)) for t in figure.texts if t.get_weight() == 'bold']
    for image, seen in [(row.image, seen) for row in rows for seen in row.seen]:
        pictures = [p.repeat(4, 0).repeat(4, 1) for p in page.picture_rows(image, seen)[0]]
        corners = [place_of(picture, shown) for picture in pictures]
        (upper, left), (_, last) = corners[0], corners[-1]
        x0, y0, x1, y1 = boxes[f'→ {seen.prediction}']
        if layout == 'columns':
            assert left <= x0 and x1 <= last + 128 + (len(maps) - 1) * 2 * (128 + page.GAP)
            assert 0 <= y0 - (upper + 128) < page.LINE / 2
        else:
            assert upper <= y0 and y1 <= upper + 128 and x1 <= left
            own = [box for text, box in labels if text == seen.label and upper < box[1] < y0]
            assert len(own) == 1 and y0 - own[0][3] < page.LINE


@pytest.mark.parametrize('layout', ['rows', 'columns'])
@pytest.mark.parametrize(('n', 'side'), [(2, 128), (50, 64)])
def test_many_images_make_a_page_that_can_be_read(layout, n, side, tmp_path):
    names = [f'airplane {i}' for i in range(n)]
    rows = rows_of(['teacher', 'student'], ['sum2'], False, names)
    figure, shown = drawn(rows, layout, tmp_path / 'x.png')
    assert max(shown.shape) <= page.PAGE + 2 * page.MARGIN
    assert {image.get_array().shape[:2] for image in figure.images} == {(side, side)}
    texts = [t.get_text() for t in figure.texts]
    assert set(names) <= set(texts) and not any('…' in text for text in texts)
    # Each column of images has its heads.
    columns = len({t.get_position()[0] for t in figure.texts if t.get_text() in names})
    assert texts.count('image') == columns and (columns > 1) == (n > 2)


def test_the_largest_page_is_not_a_strip():
    rows = rows_of([f'net {i}' for i in range(5)], ['sum2'], True, list(map(str, range(100))))
    for layout in attention.LAYOUTS.values():
        size = page.draw(rows, layout).get_size_inches() * page.DPI
        assert max(size) < 5000 and max(size) < 2 * min(size)


def apart(a, b, slack=0):
    """Whether two boxes overlap by no more than `slack` pixels a side."""
    return (
        a[2] - slack <= b[0] + slack
        or b[2] - slack <= a[0] + slack
        or a[3] - slack <= b[1] + slack
        or b[3] - slack <= a[1] + slack
    )
