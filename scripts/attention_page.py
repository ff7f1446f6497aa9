"""The page that attention.py draws: images, maps in colour over them, and predictions."""

import itertools
import math
import textwrap
import warnings
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from support import photographs
from support.program import printable

# A character that the font lacks is drawn as a box.
warnings.filterwarnings('ignore', 'Glyph .* missing from')

# All lengths are in pixels.
SIDES = (128, 96, 64)  # the longer side of an image: the first that keeps the page within PAGE
PAGE = 2000
GAP, BREAK, LINE = 3, 18, 17  # between images, between nets or blocks, of a line of text
NAME, LABEL = 90, 146  # width for an image's name, and for a net's label beside its maps
MARGIN, DPI = 6, 110

# The colours of a prediction: right, wrong, cannot be judged.
GREEN, RED, GREY = '#1a7f37', '#b3261e', '#5f5f5f'


class Seen(NamedTuple):
    """What one net makes of one image."""

    label: str  # the net's
    maps: dict  # {mapping function, '' if there is only one: [float32 [h, w] of each group]}
    gradient: np.ndarray | None  # float32 [H, W]
    prediction: str  # a class, '' if its name is not known
    colour: str  # of the prediction


class Row(NamedTuple):
    """An image and what each net makes of it."""

    name: str  # the image's class or file
    image: np.ndarray  # uint8 [H, W, 3] RGB
    seen: list  # of Seen


def draw(rows, layout):
    """The page with these Rows: a Figure. layout: ByColumns or ByRows.

    Many images make several columns of blocks, so that the page is about as wide as high. If it
    exceeds PAGE, they are drawn smaller.
    """
    for side in SIDES:
        block = layout(rows, side)
        sizes = [page_size(block, n, math.ceil(len(rows) / n)) for n in range(1, len(rows) + 1)]
        size = min(sizes, key=max)
        if max(size) <= PAGE:
            break
    page, in_column = new_page(*size), math.ceil(len(rows) / (1 + sizes.index(size)))
    for i, row in enumerate(rows):
        x = i // in_column * (block.width + 3 * BREAK)
        y = block.top + i % in_column * (block.height + block.space)
        if i % in_column == 0:
            block.put_heads(page, x)
        block.put_row(page, row, x, y)
    return page


def page_size(block, columns, rows):
    """(width, height) of so many columns and rows of blocks."""
    width = columns * (block.width + 3 * BREAK) - 3 * BREAK
    return width, block.top + rows * (block.height + block.space) - block.space


# ------------------------ layouts of a block: one image and its maps


class ByColumns:
    """One row: the image, then the maps of each net, one column a group. A net's prediction stands
    below its maps."""

    def __init__(self, rows, side):
        self.cell = Cell(rows, side)
        self.nets = list(zip(*(row.seen for row in rows)))
        self.starts, self.spans, end = [], [], self.cell.first
        for seen in self.nets:
            columns = sum(map(len, head_rows(seen)))
            self.starts.append(end + BREAK)
            self.spans.append(columns * self.cell.step - GAP)
            end = self.starts[-1] + self.spans[-1]
        self.width, self.height, self.space = end, self.cell.height + LINE, LINE / 2
        self.heads_y = LINE if '' in rows[0].seen[0].maps else 2 * LINE
        self.top = self.heads_y + 2.25 * LINE

    def put_heads(self, page, x):
        self.cell.put_head(page, ('image', ''), x + self.cell.first / 2, self.heads_y)
        for start, span, seen in zip(self.starts, self.spans, self.nets):
            left = x + start
            put_text(page, seen[0].label, left + span / 2, 0, span, weight='bold')
            for (written, maps), heads in zip(seen[0].maps.items(), head_rows(seen)):
                width = len(maps) * self.cell.step - GAP
                put_text(page, written, left + width / 2, LINE, width)
                for head in heads:
                    self.cell.put_head(page, head, left + self.cell.width / 2, self.heads_y)
                    left += self.cell.step

    def put_row(self, page, row, x, y):
        self.cell.put_first(page, row, x, y)
        for start, span, seen in zip(self.starts, self.spans, row.seen):
            for i, picture in enumerate(itertools.chain(*picture_rows(row.image, seen))):
                self.cell.put(page, picture, x + start + i * self.cell.step, y)
            middle, below = x + start + span / 2, y + self.cell.height
            put_text(page, predicted(seen), middle, below, span, color=seen.colour)


class ByRows:
    """The image, and beside it one row for each net and mapping function, one column a group. A
    net's label stands beside its first row, and its prediction below the label."""

    def __init__(self, rows, side):
        self.cell = Cell(rows, side)
        every = [seen for row in rows for seen in row.seen]
        self.heads = head_rows(every)[0]
        self.start = self.cell.first + LABEL + BREAK
        self.width = self.start + len(self.heads) * self.cell.step - GAP
        lines = max(len(lines) for seen in every for lines in text_rows(seen))
        self.row_height, maps = max(self.cell.height, lines * LINE), len(every[0].maps)
        self.apart = GAP if maps == 1 else BREAK  # between nets
        net = maps * (self.row_height + GAP) - GAP
        nets = len(rows[0].seen) * (net + self.apart) - self.apart
        self.height, self.space = max(nets, self.cell.height + LINE), BREAK
        self.top = 2.25 * LINE

    def put_heads(self, page, x):
        self.cell.put_head(page, ('image', ''), x + self.cell.first / 2, 0)
        for i, head in enumerate(self.heads):
            middle = x + self.start + i * self.cell.step + self.cell.width / 2
            self.cell.put_head(page, head, middle, 0)

    def put_row(self, page, row, x, y):
        self.cell.put_first(page, row, x, y)
        for seen in row.seen:
            for lines, pictures in zip(text_rows(seen), picture_rows(row.image, seen)):
                self.put_lines(page, lines, x + self.start - 3 * GAP, y + self.row_height / 2)
                for i, picture in enumerate(pictures):
                    upper = y + (self.row_height - self.cell.height) / 2
                    self.cell.put(page, picture, x + self.start + i * self.cell.step, upper)
                y += self.row_height + GAP
            y += self.apart - GAP

    def put_lines(self, page, lines, right, middle):
        for i, (text, style) in enumerate(lines):
            y = middle + (i - len(lines) / 2) * LINE
            put_text(page, text, right, y, LABEL, ha='right', **style)


# ------------------------ what stands in a block, one list for each mapping function


def head_rows(every):
    """[[('group 0', size of its maps, '' if they differ), ...]] of Seens of one or more nets."""
    rows = []
    for written in every[0].maps:
        maps = [seen.maps[written] for seen in every]
        shapes = [
            {m.shape for m in group if m is not None} for group in itertools.zip_longest(*maps)
        ]
        sizes = [f'{w}×{h}' if not others else '' for (h, w), *others in shapes]
        rows.append([(f'group {i}', size) for i, size in enumerate(sizes)])
    if any(seen.gradient is not None for seen in every):
        rows[0].append(('gradient', ''))
    return rows


def picture_rows(image, seen):
    """[[map of group 0 over the image, ...]], with the gradient at the end of the first list."""
    rows = [[overlay(image, m) for m in maps] for maps in seen.maps.values()]
    if seen.gradient is not None:
        rows[0].append(overlay(image, seen.gradient, highest=99))
    return rows


def text_rows(seen):
    """[[(text, style), ...]]: the net's label and its prediction, then the mapping function."""
    rows = [[(written, {})] if written else [] for written in seen.maps]
    label = textwrap.wrap(seen.label, 15, max_lines=3, placeholder='…')
    lines = [(line, {'weight': 'bold'}) for line in label]
    if seen.prediction:
        lines.append((predicted(seen), {'color': seen.colour}))
    return [lines + rows[0], *rows[1:]]


def predicted(seen):
    return f'→ {seen.prediction}' if seen.prediction else ''


# ------------------------ pictures and texts, at pixels from the page's upper left corner


class Cell:
    """The space of an image or a map. All are of one size."""

    def __init__(self, rows, side):
        self.side = side
        shapes = [self.fit(row.image).shape for row in rows]
        self.width = max(side * 2 // 3, *(w for _, w, _ in shapes))  # heads stand above them
        self.height = max(h for h, _, _ in shapes)
        self.step, self.first = self.width + GAP, max(self.width, NAME)

    def fit(self, image):
        """The image, shrunk to the cell, or enlarged a whole number of times: the pixels that the
        net saw stay squares."""
        image = shrink(image, self.side)
        scale = max(1, self.side // max(image.shape[:2]))
        return image.repeat(scale, 0).repeat(scale, 1)

    def put(self, page, image, x, y):
        """Draw an image in the middle of the cell at (x, y)."""
        image = self.fit(image)
        h, w = image.shape[:2]
        left, upper = round(x + (self.width - w) / 2), round(y + (self.height - h) / 2)
        H = round(page.get_figheight() * page.dpi)
        # Pixel by pixel, because other functions of matplotlib would blur it.
        page.figimage(image, MARGIN + left, H - MARGIN - upper - h, origin='upper')

    def put_first(self, page, row, x, y):
        """Draw the image itself, with its name below."""
        self.put(page, row.image, x + (self.first - self.width) / 2, y)
        put_text(page, row.name, x + self.first / 2, y + self.height, self.first)

    def put_head(self, page, head, x, y):
        """Write two lines above a column."""
        for i, line in enumerate(head):
            put_text(page, line, x, y + i * LINE, self.step)


def new_page(width, height):
    """An empty figure of so many pixels, with a margin around them."""
    page = Figure([round(side + 2 * MARGIN) / DPI for side in (width, height)], DPI)
    FigureCanvasAgg(page)
    return page


def put_text(page, text, x, y, width, ha='center', **style):
    """Write one line of text, its upper end at y. If it is wider than `width`, its middle is cut
    out, because file names differ at their ends."""
    text = printable(text)  # a name may have bytes that matplotlib refuses
    W, H = page.get_size_inches() * page.dpi
    place = [(MARGIN + x) / W, 1 - (MARGIN + y + LINE / 2) / H]
    style |= {'va': 'center_baseline', 'ha': ha, 'fontsize': 8.5, 'parse_math': False}
    shown = page.text(*place, text, **style)
    kept = len(text)
    while kept > 1 and shown.get_window_extent().width > width:
        kept -= 1
        shown.set_text(f'{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}')


def shrink(image, longest):
    """uint8 [H, W, 3], resized if its longer side exceeds `longest`; 8 pixels are the least."""
    H, W = image.shape[:2]
    if max(H, W) <= longest:
        return image
    size = tuple(max(8, round(side * longest / max(H, W))) for side in (H, W))
    return photographs.resize(image, size)


def overlay(image, attention, highest=100):
    """A map, enlarged, in colour over the grey image: uint8 [H, W, 3] RGB.

    image uint8 [H, W, 3] RGB; attention float32 [h, w], drawn from dark (low) to bright (high).
    Values above the percentile `highest` are all the brightest.
    """
    H, W = image.shape[:2]
    attention = np.minimum(attention, np.percentile(attention, highest))
    if attention.shape != (H, W):
        attention = cv2.resize(attention, (W, H), interpolation=cv2.INTER_CUBIC)
    attention = (attention - attention.min()) / max(float(np.ptp(attention)), 1e-30)
    colours = cv2.applyColorMap(np.uint8(255 * attention), cv2.COLORMAP_INFERNO)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2BGR)
    return cv2.cvtColor(cv2.addWeighted(grey, 0.3, colours, 0.7, 0), cv2.COLOR_BGR2RGB)
