"Maps of towers by one rule, and regions drawn where packing puts them, against loops over pixels."
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from medcl_study.core import DataError, generator
from medcl_study.data.images import pack, resize
from medcl_study.data.pairs import Corpus, Region
from medcl_study.data.phantom import phantom_corpus
from medcl_study.data.regions import Box, Ellipse, Polygon, Runs, encode_runs
from medcl_study.data.twins import make_twin, read_set
from medcl_study.encoders.dual import DualEncoder, EncoderConfig
from medcl_study.encoders.image import image_tower
from medcl_study.evaluation.features import FeatureStore
from medcl_study.evaluation.maps import (Maps, MapStore, feature_maps, frame_size, image_shape, placed, truth_boxes, truth_masks)

pytestmark = pytest.mark.usefixtures('one_thread')
Encoded = namedtuple('Encoded', 'patches')


def pixels(n=3, size=64, channels=3, seed=0):
    return torch.from_numpy(generator('maps', seed).integers(0, 256, (n, channels, size, size), np.uint8))


def corpus_of(regions, images=None, files=None, classes=('disc', 'other'), root=None):
    n = len(regions)
    frame = pd.DataFrame({'id': [f'i{i}' for i in range(n)], 'image': files or '', 'text': '', 'labels': [()] * n, 'group': '',
                          'split': '', 'modality': '', 'regions': regions})
    return Corpus(frame, name='toy', classes=classes, pixels=images, root=root)


@pytest.fixture(scope='module', params=['cnn_small', 'vit_tiny_p8', 'vit_stem_p8', 'resnet10t', 'convnext_atto', 'test_vit'])
def tower(request):
    torch.manual_seed(0)
    size = 160 if request.param == 'test_vit' else 64
    return image_tower(request.param, image_size=size, channels=3).eval()


def test_maps_shrink_and_their_strides_tell_how_much(tower):
    images = pixels(2, tower.image_size)
    maps = Maps(tower)
    found = maps(images)
    assert [o.shape[1] for o in found] == list(maps.channels) and len(found) >= 3
    assert [o.shape[-1] for o in found] == sorted({o.shape[-1] for o in found}, reverse=True)
    assert [tower.image_size / o.shape[-1] for o in found] == list(maps.strides)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, feature_maps(FeatureStore(tower), images)))


def test_the_last_map_is_what_the_tower_pools(tower):
    images = pixels(2, tower.image_size)
    last = Maps(tower).read(images)[-1]
    with torch.no_grad(): features = tower.net.forward_features(tower.normalise(images))
    if features.ndim == 4: assert torch.allclose(last, features, atol=1e-5)
    else:
        with torch.no_grad(): patches = tower(tower.normalise(images))[0]
        assert torch.equal(last.flatten(2).transpose(1, 2), patches)


def test_training_the_copy_leaves_the_encoder(tower):
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    maps = Maps(tower, trainable=True).train()
    assert maps.tower.training and not tower.training
    sum(o.square().mean() for o in maps(pixels(2, tower.image_size))).backward()
    torch.optim.SGD(maps.parameters(), 1.).step()
    assert any(not torch.equal(v, before[k]) for k, v in maps.tower.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())


def test_a_frozen_copy_never_trains(tower):
    tower.train()
    try:
        maps = Maps(tower).train()
        assert not any(o.training for o in maps.modules()) and not any(o.requires_grad for o in maps.parameters())
        assert all(not o.requires_grad for o in maps(pixels(2, tower.image_size))) and tower.training
    finally: tower.eval()


def test_batches_and_order_change_no_map(tower):
    images = pixels(4, tower.image_size)
    maps = Maps(tower)
    for whole, parts in zip(maps(images), zip(*[maps(o[None]) for o in images])):
        assert torch.allclose(whole, torch.cat(parts), atol=2e-4)
    for forth, back in zip(maps(images), maps(images.flip(0))): assert torch.allclose(forth.flip(0), back, atol=2e-4)


def test_a_store_gives_the_same_maps_whether_it_remembers_or_not(tower):
    source = pixels(5, tower.image_size).permute(0, 2, 3, 1).numpy()
    maps = Maps(tower)
    kept, made = MapStore(maps, source, batch_size=2), MapStore(maps, source, limit=0)
    assert kept.keeps and not made.keeps and not MapStore(Maps(tower, trainable=True), source).keeps
    rows = [4, 0, 0, 3]
    for a, b in zip(kept.batch(rows), made.batch(rows)): assert torch.allclose(a, b, atol=2e-4)
    last, = MapStore(maps, source, last=True).batch(rows)
    assert torch.allclose(last, maps.read(made.pixels(rows))[-1], atol=2e-4)


def test_a_dual_encoder_lends_its_tower_and_one_channel_is_repeated():
    encoder = DualEncoder(EncoderConfig(image_tower='vit_tiny_p8', text_tower='bert_tiny', vocab_size=50))
    grey = pixels(2, channels=1)
    for a, b in zip(feature_maps(encoder, grey), feature_maps(encoder.image, grey.expand(-1, 3, -1, -1))): assert torch.equal(a, b)


class Foreign(torch.nn.Module):
    "Gives each 16×16 block of pixels its mean and a constant."
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)

    def encode_image(self, images, patches=False):
        assert not self.training
        mean = torch.nn.functional.avg_pool2d(images[:, :1].float(), 16).flatten(1)
        return Encoded(torch.stack([mean, torch.ones_like(mean)], 2) if patches else None)


def test_an_encoder_of_somebody_else_is_asked_for_its_patches():
    encoder, images = Foreign(), pixels(2)
    maps = Maps(encoder.train(), images)
    found = maps(images)
    assert encoder.training and maps.strides == (4, 8, 16, 32) and maps.channels == (2,) * 4 and not list(maps.parameters())
    assert torch.allclose(found[2][:, 0], torch.nn.functional.avg_pool2d(images[:, :1].float(), 16)[:, 0])
    with pytest.raises(DataError, match='Foreign has no image tower that could learn'): Maps(encoder, images, trainable=True)
    with pytest.raises(TypeError, match='pass an example image'): Maps(encoder)
    encoder.encode_image = lambda images: torch.zeros(len(images), 4)
    with pytest.raises(DataError, match="gives no 'patches'"): Maps(encoder, images)


@pytest.mark.parametrize('height, width', [(70, 88), (88, 70), (1, 300), (64, 64), (41, 40), (513, 767)])
@pytest.mark.parametrize('size', [64, 33])
def test_images_lie_where_placed_says(height, width, size):
    top, left, h, w = placed(height, width, size)
    want = np.zeros((size, size), bool)
    want[top:top + h, left:left + w] = True
    assert np.array_equal(resize(np.full((height, width), 255, np.uint8), size) > 0, want)


@pytest.mark.parametrize('name, mode, exif', [('a.png', 'L', 0), ('a.jpg', 'RGB', 0), ('b.jpg', 'L', 6), ('c.jpg', 'L', 3),
                                             ('a.tif', 'I;16', 0)])
def test_headers_tell_the_size_that_reading_gives(tmp_path, name, mode, exif):
    from medcl_study.data.images import read_image
    image = Image.new(mode, (50, 30))
    tags = image.getexif()
    if exif: tags[274] = exif
    image.save(tmp_path/name, **({'exif': tags} if exif else {}))
    assert image_shape(tmp_path/name) == read_image(tmp_path/name).shape[:2] == ((50, 30) if exif == 6 else (30, 50))


def test_unreadable_headers_are_named(tmp_path):
    with pytest.raises(DataError, match='a.png: no such image file'): image_shape(tmp_path/'a.png')
    for name in ('b.png', 'b.dcm'):
        (tmp_path/name).write_bytes(b'nothing to see here')
        with pytest.raises(DataError, match=f'{name}: its header does not tell the size'): image_shape(tmp_path/name)


@pytest.mark.parametrize('height, width', [(90, 60), (60, 90), (64, 64), (200, 150)])
def test_a_mask_lands_on_its_object_and_a_box_around_it(height, width, tmp_path):
    rng = generator('land', height, width)
    for trial in range(4):
        rx, ry = rng.uniform(.08, .2, 2)
        disc = Ellipse(*rng.uniform(.25, .75, 2), rx, ry)
        mask = disc.raster(height, width)
        Image.fromarray(mask).save(tmp_path/'mask.png')
        around = [(disc.x + rx * np.cos(a), disc.y + ry * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 60)]
        kinds = disc, Polygon(tuple(around)), Runs(height, width, (encode_runs(mask),)), mask, tmp_path/'mask.png'
        image = np.where(mask, 255, 0).astype(np.uint8)
        corpus = corpus_of([(Region('disc', mask=o),) for o in kinds], np.stack([image] * len(kinds)))
        seen = resize(image, 64) > 127
        for drawn in truth_masks(corpus, 64, ['disc'])[:, 0]: assert (drawn ^ seen).sum() <= .15 * seen.sum()
        for (box,) in truth_boxes(corpus, 64, ['disc']):
            (y0, y1), (x0, x1) = (np.flatnonzero(seen.any(o))[[0, -1]] for o in (1, 0))
            assert np.abs(box[1:] * 64 - (x0, y0, x1 + 1, y1 + 1)).max() <= 1.5 and box[0] == 0


def test_boxes_are_filled_pixel_by_pixel():
    box, (height, width), size = (.1, .2, .6, .9), (50, 80), 40
    corpus = corpus_of([(Region('other', box=box),)], np.zeros((1, height, width), np.uint8))
    top, left, h, w = placed(height, width, size)
    want = np.zeros((size, size), bool)
    for y in range(h):
        for x in range(w): want[top + y, left + x] = box[0] <= (x + .5) / w < box[2] and box[1] <= (y + .5) / h < box[3]
    drawn = truth_masks(corpus, size, ('disc', 'other'))
    assert np.array_equal(drawn[0, 1], want) and not drawn[0, 0].any()
    (found,) = truth_boxes(corpus, size, ('disc', 'other'))
    assert found[0] == pytest.approx([1, (left + .1 * w) / size, (top + .2 * h) / size, (left + .6 * w) / size, (top + .9 * h) / size])


def test_regions_of_a_class_add_up_and_rows_are_drawn_alone():
    two = (Region('disc', box=(0, 0, .5, .5)), Region('disc', box=(.5, .5, 1, 1)), Region('other', box=(0, .5, .5, 1)))
    corpus = corpus_of([two, (), two[:1]], np.zeros((3, 20, 20), np.uint8))
    drawn = truth_masks(corpus, 20, ('other', 'disc'))
    assert drawn.sum((2, 3)).tolist() == [[100, 200], [0, 0], [0, 100]]
    assert np.array_equal(truth_masks(corpus, 20, ('other', 'disc'), rows=[2, 0]), drawn[[2, 0]])
    assert [o[:, 0].tolist() for o in truth_boxes(corpus, 20, ('other', 'disc'))] == [[1, 1, 0], [], [1]]
    assert truth_masks(corpus, 20, ('other',)).sum() == 100 # regions of a class that is not asked for are not drawn


def test_bad_regions_are_refused_by_name():
    zeros = np.zeros((1, 30, 20), np.uint8)
    def drawn(region, classes=('disc', 'other'), asked=('disc',)):
        return truth_masks(corpus_of([(region,)], zeros, classes=classes), 16, asked)
    with pytest.raises(DataError, match='toy, row i0: the mask of .disc. was made for 30 x 20 pixels, the image has 20 x 30'):
        drawn(Region('disc', mask=np.ones((20, 30), bool)))
    with pytest.raises(DataError, match='was made for 20 x 31'): drawn(Region('disc', mask=Runs(31, 20, ('0 5',))))
    with pytest.raises(DataError, match="there is no class 'disk'"): drawn(Region('disc', box=(0, 0, 1, 1)), asked=('disk',))
    with pytest.raises(DataError, match="row i0: a region of 'disk', which is no class"): drawn(Region('disk', box=(0, 0, 1, 1)))
    with pytest.raises(DataError, match="a region of '', which is no class"): drawn(Region('', box=(0, 0, 1, 1)))
    with pytest.raises(DataError, match='neither mask nor box'): drawn(Region('disc'))
    with pytest.raises(DataError, match='no such mask'): drawn(Region('disc', mask=Path('/nowhere/mask.png')))
    assert drawn(Region('', box=(0, 0, 1, 1)), classes=('disc',)).any()


def test_nothing_vanishes_but_what_is_empty():
    corpus = corpus_of([(Region('disc', mask=Ellipse(.99, .99, .001, .001)),), (Region('disc', mask=np.zeros((30, 20), bool)),)],
                       np.zeros((2, 30, 20), np.uint8))
    assert truth_masks(corpus, 8, ['disc']).sum((1, 2, 3)).tolist() == [1, 0]
    assert [len(o) for o in truth_boxes(corpus, 8, ['disc'])] == [1, 0]


def test_phantoms_are_drawn_as_they_render_themselves():
    corpus = phantom_corpus('chest', 30, seed=2)
    stated = np.array([[any(r.label == c for r in o.regions) for c in corpus.classes] for o in corpus])
    assert np.array_equal(truth_masks(corpus, 64, corpus.classes), corpus.masks(np.arange(30)) & stated[..., None, None])


@pytest.mark.parametrize('name', ['rsna_pneumonia', 'siim_pneumothorax', 'covid_rural', 'object_cxr', 'nih_boxes'])
def test_twins_have_bright_objects_where_their_truth_is(name, tmp_path):
    make_twin(name, tmp_path, 24)
    corpus = read_set(name, tmp_path)
    packed = pack(corpus, tmp_path/'packed', size=64)
    assert frame_size(packed, corpus) == 64
    masks, boxes = truth_masks(corpus, 64, corpus.classes), truth_boxes(corpus, 64, corpus.classes)
    labels = corpus.targets()
    for i, drawn in enumerate(masks):
        assert set(boxes[i][:, 0]) == set(np.flatnonzero(drawn.any((1, 2)))) == set(np.flatnonzero(labels[i] == 1))
        for c, x0, y0, x1, y1 in boxes[i]: # a box holds its mask up to a pixel
            top, left = max(0, int(y0 * 64) - 1), max(0, int(x0 * 64) - 1)
            bottom, right = int(np.ceil(y1 * 64)) + 1, int(np.ceil(x1 * 64)) + 1
            assert drawn[int(c)][top:bottom, left:right].any()
    inside = packed.batch(range(len(corpus)))[masks.any(1)].mean()
    assert inside > 0 # the letterbox's margin is black, and no truth lies in it
    empty = ~packed.batch(range(len(corpus))).any((0, 3))
    assert not masks[:, :, empty].any()


def test_frames_that_are_no_letterbox_are_refused(tmp_path):
    corpus = corpus_of([(), ()], np.zeros((2, 30, 20), np.uint8))
    with pytest.raises(DataError, match="mode 'stretch'"): frame_size(pack(corpus, tmp_path, size=16, mode='stretch'), corpus)
    with pytest.raises(DataError, match='20 x 30 pixels, expected squares'): frame_size(corpus, corpus)
    assert frame_size(pack(corpus, tmp_path, size=16).select([1]), corpus) == 16
