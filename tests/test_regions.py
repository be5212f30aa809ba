"""Shapes of regions: pixels by their definition, run lengths there and back, bad texts refused, real masks unharmed."""
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from medcl_study.core import DataError, content_hash
from medcl_study.data.pairs import Corpus, Region
from medcl_study.data.regions import (
    Box, Ellipse, Polygon, Runs, bounds, encode_runs, native_size, raster, read_mask, resample)

MASKS = arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))
FRACTION = st.floats(0, 1, allow_nan=False)
FEW = settings(max_examples=25, deadline=None)


# ---- drawing, by the definition

def inside_polygon(x, y, points):
    "Count the edges to the left of a point."
    n = 0
    for (xa, ya), (xb, yb) in zip(points, points[1:] + points[:1]):
        if min(ya, yb) <= y < max(ya, yb): n += xa + (y - ya) * (xb - xa) / (yb - ya) <= x
    return n % 2 == 1


def by_definition(inside, height, width):
    return np.array([[inside((x + .5) / width, (y + .5) / height) for x in range(width)] for y in range(height)])


@FEW
@given(st.lists(st.tuples(FRACTION, FRACTION), min_size=3, max_size=6), st.integers(1, 9), st.integers(1, 9))
def test_polygon_has_the_pixels_whose_centre_is_inside(points, height, width):
    drawn = Polygon(tuple(points)).raster(height, width)
    expected = by_definition(lambda x, y: inside_polygon(x, y, points), height, width)
    edges = by_definition(lambda x, y: any(  # a centre on an edge may fall to either side by rounding
        min(ya, yb) <= y < max(ya, yb) and abs(xa + (y - ya) * (xb - xa) / (yb - ya) - x) < 1e-9
        for (xa, ya), (xb, yb) in zip(points, points[1:] + points[:1])), height, width)
    assert (drawn == expected)[~edges].all()


@FEW
@given(FRACTION, FRACTION, st.floats(.01, 1), st.floats(.01, 1), st.integers(1, 9), st.integers(1, 9))
def test_ellipse_and_box_have_the_pixels_whose_centre_is_inside(x, y, a, b, height, width):
    ellipse, box = Ellipse(x, y, a, b), Box(x, y, x + a, y + b)
    assert (ellipse.raster(height, width) == by_definition(lambda u, v: ((u - x)/a)**2 + ((v - y)/b)**2 <= 1, height, width)).all()
    assert (box.raster(height, width) == by_definition(lambda u, v: x <= u < x + a and y <= v < y + b, height, width)).all()


def test_x_is_the_column():
    for shape in (Box(.5, 0, 1, .5), Polygon(((.5, 0), (1, 0), (1, .5), (.5, .5)))):
        assert shape.raster(2, 4).astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
        assert shape.bounds == (.5, 0, 1, .5)


def test_a_shape_at_twice_the_size_covers_four_times_the_pixels():
    for shape in (Ellipse(.5, .5, .3, .2), Polygon(((.1, .1), (.9, .2), (.4, .8)))):
        assert abs(shape.raster(400, 300).sum() / shape.raster(200, 150).sum() - 4) < .05


# ---- masks

@FEW
@given(MASKS, st.integers(1, 4))
def test_resampling_to_a_multiple_repeats_pixels(mask, k):
    assert (resample(mask, mask.shape[0]*k, mask.shape[1]*k) == np.kron(mask, np.ones((k, k), bool)).astype(bool)).all()
    assert resample(mask, *mask.shape) is mask


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'I;16', 'RGB', 'RGBA', 'LA'])
def test_masks_of_every_mode_mark_what_is_not_zero(tmp_path, mode):
    mask = Ellipse(.4, .5, .2, .3).raster(10, 14)
    if mode in ('L', 'I;16'): im = Image.fromarray(mask.astype(np.uint8 if mode == 'L' else np.uint16))  # 0 and 1
    elif mode == 'P':
        im = Image.fromarray(mask.astype(np.uint8), 'P')
        im.putpalette([0, 0, 0, 128, 0, 0])
    else: im = Image.fromarray(mask).convert('L').convert(mode)
    im.save(tmp_path/'mask.png')
    assert (read_mask(tmp_path/'mask.png') == mask).all()


def test_unreadable_masks_are_named(tmp_path):
    (tmp_path/'mask.png').write_text('no picture')
    with pytest.raises(DataError, match='mask.png: not a readable mask'): read_mask(tmp_path/'mask.png')
    with pytest.raises(DataError, match='other.png: no such mask'): raster(tmp_path/'other.png', 4, 4)


# ---- run lengths

@FEW
@given(MASKS)
def test_run_lengths_there_and_back(mask):
    runs = Runs(*mask.shape, (encode_runs(mask),))
    assert (runs.raster(*mask.shape) == mask).all()
    assert runs.bounds == bounds(mask) and native_size(runs) == mask.shape


@FEW
@given(arrays(bool, (5, 6)), arrays(bool, (5, 6)))
def test_texts_of_one_image_are_joined(a, b):
    assert (Runs(5, 6, (encode_runs(a), encode_runs(b))).raster(5, 6) == (a | b)).all()


def test_gaps_count_from_the_end_of_the_last_run_down_the_columns():
    mask, at = np.zeros(12, bool), 0
    for gap, length in ((1, 2), (3, 1)):  # as the challenge's own decoder walks
        at += gap
        mask[at:at + length] = True
        at += length
    assert (Runs(4, 3, ('1 2 3 1',)).raster(4, 3) == mask.reshape(3, 4).T).all()


@FEW
@given(st.text('0123456789 -.e', max_size=24))
def test_any_text_is_read_or_refused(text):
    try: runs = Runs(5, 4, (text,))
    except DataError: return
    drawn = runs.raster(5, 4)
    assert drawn.shape == (5, 4) and (text.strip() == '-1') == (not drawn.any())


@pytest.mark.parametrize('text, says', [('', 'hold an empty run'), ('3', 'not pairs'), ('1 x', 'not pairs'), ('1 0', 'empty run'),
                                        ('-2 1', 'step back'), ('0 21', 'end at pixel 21'), ('9 1 9 9', 'end at pixel 28'),
                                        ('99999999999999999999 1', 'not pairs'), ('9223372036854775807 9223372036854775807', 'end at')])
def test_texts_of_the_wrong_length_are_refused(text, says):
    with pytest.raises(DataError, match=says): Runs(5, 4, (text,))


# ---- regions in a corpus

def corpus_at(folder, mask):
    frame = pd.DataFrame({'id': ['a'], 'image': ['a.png'], 'text': '', 'labels': [('x',)], 'group': '', 'split': '', 'modality': '',
                          'regions': [(Region('x', mask=mask),)]})
    return Corpus(frame, name='c', classes=('x',), root=folder)


def test_files_of_masks_are_relative_to_the_corpus(tmp_path):
    mask = Ellipse(.5, .5, .3, .3).raster(8, 8)
    Image.fromarray(mask).save(tmp_path/'mask.png')
    corpus = corpus_at(tmp_path, 'mask.png')
    assert (corpus[0].regions[0].raster(8, 8) == mask).all()
    assert corpus.hash() == corpus_at(tmp_path/'elsewhere', 'mask.png').hash()


def test_the_hash_tells_shapes_apart():
    shapes = [Box(.1, .2, .3, .4), Ellipse(.1, .2, .3, .4), Polygon(((.1, .2), (.3, .4), (.5, .6))), Runs(2, 2, ('0 1',)), Runs(2, 2, ('0 2',))]
    assert len({corpus_at(Path(), o).hash() for o in shapes}) == len({content_hash(o) for o in shapes}) == len(shapes)


# ---- real masks

@pytest.mark.skipif(not os.environ.get('MEDCL_DATA'), reason='MEDCL_DATA is not set: no real masks')
@pytest.mark.parametrize('name', ['dsb2018_nuclei', 'covid_cxr'])
def test_real_masks(name):
    folder = Path(os.environ['MEDCL_DATA'])/name
    if not folder.is_dir(): pytest.skip(f'MEDCL_DATA holds no {name}')
    rows = [row for row in map(json.loads, (folder/'index.jsonl').read_text().splitlines()) if row.get('mask')][:40]
    assert len(rows) >= 20
    for row in rows:
        mask = read_mask(folder/row['mask'])
        text = encode_runs(mask)
        runs = Runs(*mask.shape, (text,))
        assert mask.any() and (runs.raster(*mask.shape) == mask).all() and runs.bounds == bounds(mask)
        assert abs(runs.raster(224, 224).mean() - mask.mean()) < .02
        with pytest.raises(DataError, match='not pairs|end at pixel'): Runs(mask.shape[0] - 60, mask.shape[1] - 60, (text + ' 99999 1',))
