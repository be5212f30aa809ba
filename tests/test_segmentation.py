"Segmentation protocols against loops over pixels: what is learned, what is written, and what may not matter."
from collections import namedtuple
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from medcl_study.core import DataError, generator
from medcl_study.data.images import pack
from medcl_study.data.pairs import Corpus, Region
from medcl_study.data.phantom import phantom_corpus
from medcl_study.data.regions import Box
from medcl_study.data.sets.localized import LOCALIZED18
from medcl_study.data.twins import make_twin, read_set
from medcl_study.encoders.image import image_tower
from medcl_study.evaluation import segmentation as module
from medcl_study.evaluation.maps import MapStore, Maps, truth_masks
from medcl_study.evaluation.segmentation import (PROTOCOLS, LinearHead, Part, Schedule, UNetHead, dice_loss, judge, segmentation,
                                                 segmentation_loss)
from medcl_study.measures.overlap import hausdorff_95
from medcl_study.predictions import Task, compare, read_predictions, score, stacked, tasks_of, write_predictions

pytestmark = pytest.mark.usefixtures('one_thread')
CLASSES = ('bright', 'dark')
TASK = Task('toy_outlines', 'segmentation', CLASSES, source='phantom')
ONE = replace(TASK, classes=('bright',))
Encoded = namedtuple('Encoded', 'patches')


def corpus_of(n, seed, *, share=1, size=32, name='toy'):
    "Draw grey images in which a bright or a dark box lies on the grid of 4×4 pixels; every fourth image is empty."
    rng = generator('test segmentation', seed)
    images, regions = rng.integers(110, 140, (n, size, size)).astype(np.uint8), []
    for i in range(n):
        found = []
        for c, value in enumerate((230, 20)):
            if i % 4 == 3 or rng.random() < .3: continue
            x, y, w, h = *rng.integers(0, 5, 2), *rng.integers(2, 4, 2)
            y, x = (y, x) if c == 0 else (y + (5 - y) // 2, x)
            images[i, 4*y:4*(y+h), 4*x:4*(x+w)] = value
            found.append(Region(CLASSES[c], box=tuple(float(o) * 4 / size for o in (x, y, x + w, y + h))))
        regions.append(tuple(found))
    labels = [tuple(dict.fromkeys(r.label for r in o)) for o in regions]
    frame = pd.DataFrame({'id': [f'{name}{seed}-{i:03d}' for i in range(n)], 'image': '', 'text': '', 'labels': labels, 'split': '',
                          'group': [f'{name}{seed} patient {i // share}' for i in range(n)], 'modality': '', 'regions': regions})
    return Corpus(frame, name=name, classes=CLASSES, pixels=images, source='phantom')


class Grey:
    "Describes each patch of 4×4 pixels by its mean grey and that squared; or by a constant."
    def __init__(self, blind=False): self.blind, self.seen = blind, 0

    def encode_image(self, images, patches=False):
        self.seen += len(images)
        mean = torch.nn.functional.avg_pool2d(images.float() / 128 - 1, 4).flatten(1)
        each = torch.stack([mean, mean**2, torch.ones_like(mean)], 2)
        return Encoded(each * 0 + 1 if self.blind else each)


@pytest.fixture(scope='module')
def splits(): return {k: corpus_of(n, s) for s, (k, n) in enumerate({'train': 24, 'valid': 12, 'test': 20}.items())}


@pytest.fixture(scope='module')
def tower():
    torch.manual_seed(0)
    return image_tower('cnn_small', image_size=32, channels=1).eval()


@pytest.fixture
def short(monkeypatch):
    "Train U-Nets for 15 steps."
    for name, (head, schedule) in PROTOCOLS.items():
        if head == 'unet': monkeypatch.setitem(PROTOCOLS, name, (head, replace(schedule, epochs=1, least=15, warm=min(3, schedule.warm))))


def values(rows, metric='dice'):
    found = score(rows.assign(run='r'), resamples=50)
    return next(v['value'] for k, v in found.items() if k.endswith(f'/{metric}'))


def same(a, b, tolerance=0):
    a, b = (o.sort_values('id', ignore_index=True) for o in (a, b))
    assert a['id'].tolist() == b['id'].tolist()
    assert np.array_equal(stacked(a['target']), stacked(b['target']))
    assert np.abs(stacked(a['scores']) - stacked(b['scores']))[:, :2].max() <= tolerance
    return True


# --- the loss

def test_dice_loss_is_that_of_segmentation_models_pytorch():
    from segmentation_models_pytorch.losses import DiceLoss
    g = torch.Generator().manual_seed(0)
    for absent in (False, True):
        logits, truth = 3 * torch.randn(3, 4, 5, 6, generator=g), (torch.rand(3, 4, 5, 6, generator=g) < .3).float()
        if absent: truth[:, 1] = 0
        assert torch.allclose(dice_loss(logits, truth), DiceLoss('multilabel')(logits, truth), atol=1e-6)


def test_dice_loss_by_loops_and_its_gradient():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64, requires_grad=True)
    truth = torch.rand(2, 3, 4, 4, generator=g) < .4
    total = 0.
    for c in range(3):
        p, t = logits[:, c].sigmoid().flatten().tolist(), truth[:, c].flatten().tolist()
        total += 1 - 2 * sum(a for a, b in zip(p, t) if b) / (sum(p) + sum(t))
    assert dice_loss(logits, truth).item() == pytest.approx(total / 3)
    assert torch.autograd.gradcheck(lambda o: segmentation_loss(o, truth), logits)


def test_loss_rises_when_truth_is_swapped_and_no_order_matters():
    truth = torch.zeros(4, 2, 8, 8)
    for i in range(4): truth[i, i % 2, i:i + 3, 2:6] = 1
    logits = 6 * truth - 3
    good = segmentation_loss(logits, truth)
    assert segmentation_loss(logits, truth.roll(1, 0)) > good + .5
    assert torch.allclose(segmentation_loss(logits[[2, 0, 3, 1]].flip(1), truth[[2, 0, 3, 1]].flip(1)), good)


# --- heads

@pytest.mark.parametrize('strides', [(2, 4, 8, 16, 32), (4, 8, 16, 32), (3.5, 7, 14, 28), (4, 8), (8,), (1, 2, 4, 8, 16, 32)])
def test_a_unet_takes_any_pyramid(strides):
    torch.manual_seed(0)
    channels = tuple(3 + i for i in range(len(strides)))
    maps = [torch.randn(2, c, *[-int(-56 // o)] * 2) for c, o in zip(channels, strides)]
    head = UNetHead(channels, strides, torch.tensor([.1, .2, .3]), width=4).eval()
    logits = head(maps, 56)
    assert logits.shape == (2, 3, 56, 56)
    for i, one in enumerate(maps): # every level matters
        changed = [o + 5 * torch.randn(o.shape, generator=torch.Generator().manual_seed(i)) if j == i else o for j, o in enumerate(maps)]
        assert not torch.allclose(head(changed, 56), logits)
    assert torch.allclose(torch.cat([head([o[i:i + 1] for o in maps], 56) for i in (0, 1)]), logits, atol=1e-5)


def test_default_widths_are_those_of_segmentation_models_pytorch():
    head = UNetHead((64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32), torch.tensor([.1]))
    assert [o.conv1[0].out_channels for o in head.decoder.blocks] == [256, 128, 64, 32, 16]


def test_a_linear_head_is_one_weight_vector_per_class():
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 4, 4, generator=g)
    mean, std = torch.randn(5, generator=g), torch.rand(5, generator=g) + .5
    head = LinearHead(mean, std, torch.tensor([.25, .5]))
    assert torch.allclose(head([maps], 8).sigmoid().mean((0, 2, 3)), torch.tensor([.25, .5]))
    with torch.no_grad(): head.score.weight.copy_(torch.randn(2, 5, 1, 1, generator=g))
    for i, c, y, x in np.ndindex(2, 2, 4, 4):
        want = (head.score.bias[c] + (head.score.weight[c, :, 0, 0] * (maps[i, :, y, x] - mean) / std).sum()).item()
        assert head([maps], 4)[i, c, y, x].item() == pytest.approx(want, abs=1e-5)


# --- judging

def test_judging_pools_pixels_per_class(splits):
    corpus = splits['test']
    maps = Maps(Grey(), torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    part = Part.of(corpus, corpus, CLASSES, maps, True)
    truth = truth_masks(corpus, 32, CLASSES)
    assert np.array_equal(part.masks(np.arange(20)).numpy(), truth)
    rows = np.array([3, 0, 5, 6])
    assert torch.allclose(part.share(rows), torch.tensor(truth[rows].mean((0, 2, 3)), dtype=torch.float32))
    head = LinearHead(torch.zeros(3), torch.ones(3), torch.tensor([.3, .3]))
    with torch.no_grad(): head.score.weight[0, 0], head.score.bias[0] = 10, -3
    hit = np.concatenate([(part.logits(head, rows) > 0).numpy()])
    want = np.mean([2 * (hit[:, c] & truth[rows, c]).sum() / (hit[:, c].sum() + truth[rows, c].sum()) for c in (0, 1)])
    found = judge(part, head, rows)
    assert found[0] == pytest.approx(want, abs=1e-6) and judge(part, head, rows[::-1].copy()) == pytest.approx(found)
    assert judge(part, head, np.array([3, 7]))[0] == 0 and judge(part, head, np.array([3, 7]))[1] > -10 # no pixel: the loss decides


# --- the protocol

def test_a_linear_head_finds_what_the_maps_say_and_nothing_where_they_are_blind(splits):
    good, blind = segmentation(Grey(), TASK, splits), segmentation(Grey(blind=True), TASK, splits)
    assert values(good) > .8 and values(blind) < .4
    gap = compare(good.assign(run='a'), blind.assign(run='b'), resamples=200)
    assert gap['metric'] == 'dice' and gap['low'] > .3


def test_rows_hold_the_pixels_of_each_image_and_class(splits, tmp_path):
    rows = segmentation(Grey(), TASK, splits)
    test, truth = splits['test'], truth_masks(splits['test'], 32, CLASSES)
    assert rows['protocol'].unique().tolist() == ['segmentation_linear'] and len(rows) == 40 and set(rows['draw']) == {0}
    assert rows['id'].tolist() == [f'{o}#{c}' for o in test.frame.id for c in CLASSES]
    assert rows['group'].tolist() == [o for o in test.frame.group for _ in CLASSES]
    target, scores = stacked(rows['target']), stacked(rows['scores'])
    assert np.array_equal(target, [(c, truth[i, c].sum(), 32 * 32) for i in range(20) for c in (0, 1)])
    assert (scores[:, 0] <= np.minimum(target[:, 1], scores[:, 1])).all()
    empty = (target[:, 1] > 0) != (scores[:, 1] > 0)
    assert np.allclose(scores[empty, 2], np.hypot(32, 32)) and (scores[(target[:, 1] == 0) & (scores[:, 1] == 0), 2] == 0).all()
    write_predictions(tmp_path/'p.parquet', rows)
    assert same(read_predictions(tmp_path/'p.parquet'), rows) and tasks_of(rows)['toy_outlines'].kind == 'segmentation'
    assert set(segmentation(Grey(), ONE, splits)['id']) == set(test.frame.id) # one class: the id of the image


def test_scores_follow_from_the_outlines(splits, monkeypatch):
    seen = []
    monkeypatch.setattr(module, 'overlap_row', lambda a, b: (seen.append((a, b)), module_row(a, b))[1])
    rows = segmentation(Grey(), ONE, splits)
    for (drawn, true), got in zip(seen, rows['scores']):
        assert got[:2].tolist() == [(drawn & true).sum(), drawn.sum()] and got[2] == pytest.approx(hausdorff_95(drawn, true))
    drawn, true = (np.stack(o) for o in zip(*seen))
    assert values(rows) == pytest.approx(2 * (drawn & true).sum() / (drawn.sum() + true.sum()))
    each = [2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else 1 for a, b in seen]
    assert values(rows, 'dice_per_image') == pytest.approx(np.mean(each))


def module_row(a, b):
    from medcl_study.measures.overlap import overlap_row
    return overlap_row(a, b)


@pytest.mark.parametrize('head', ['linear', 'unet'])
def test_neither_order_nor_the_way_maps_are_kept_matters(splits, head, tower, monkeypatch, short):
    encoder = Grey() if head == 'linear' else tower
    few = {k: o.select(np.arange(8)) for k, o in splits.items()}
    want = segmentation(encoder, ONE, few, head=head)
    rng = generator('order')
    assert same(segmentation(encoder, ONE, {k: o.select(rng.permutation(len(o))) for k, o in few.items()}, head=head), want)
    monkeypatch.setattr(module, 'MapStore', partial(MapStore, limit=0))
    assert same(segmentation(encoder, ONE, few, head=head), want, tolerance=0 if head == 'linear' else 60)


def test_a_run_repeats_itself_and_leaves_the_random_numbers_alone(splits, tower, short):
    few, state = {k: o.select(np.arange(8)) for k, o in splits.items()}, torch.get_rng_state()
    first = segmentation(tower, ONE, few, head='unet')
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert same(segmentation(tower, ONE, few, head='unet'), first)


def test_test_images_decide_nothing(splits):
    whole = segmentation(Grey(), TASK, splits).set_index('id')
    part = segmentation(Grey(), TASK, splits | {'test': splits['test'].select([3, 11, 4])}).set_index('id')
    for name in ('target', 'scores'): assert np.array_equal(stacked(whole.loc[part.index, name]), stacked(part[name]))


def test_pixels_may_lie_in_a_packed_cache(splits, tmp_path):
    images = {k: pack(o, tmp_path, size=32, channels=1) for k, o in splits.items()}
    assert same(segmentation(Grey(), ONE, splits, images=images), segmentation(Grey(), ONE, splits))


def test_images_are_read_once_by_a_frozen_encoder(splits):
    encoder = Grey()
    segmentation(encoder, TASK, splits)
    assert encoder.seen == 24 + 12 + 20 + 1 # and one to learn the shapes


@pytest.mark.parametrize('finetune', [False, True])
def test_a_unet_learns_and_the_encoder_stays_as_it_was(splits, tower, finetune, monkeypatch):
    for name, (kind, o) in PROTOCOLS.items(): monkeypatch.setitem(PROTOCOLS, name, (kind, replace(o, least=60, epochs=1)))
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    rows = segmentation(tower, ONE, splits, head='unet', finetune=finetune)
    assert rows['protocol'].iloc[0] == ('segmentation_finetuned' if finetune else 'segmentation_frozen')
    assert values(rows) > .6
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items()) and not tower.training
    assert all(o.grad is None and o.requires_grad for o in tower.parameters())


def test_the_tower_learns_only_where_it_is_fine_tuned(splits, tower, monkeypatch, short):
    moved = []
    def spy(head, train, valid, rows, schedule, **more):
        before = [o.clone() for o in train.store.maps.parameters()]
        found = train_head(head, train, valid, rows, schedule, **more)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, train.store.maps.parameters())))
        return found
    train_head = module.train_head
    monkeypatch.setattr(module, 'train_head', spy)
    few = {k: o.select(np.arange(8)) for k, o in splits.items()}
    segmentation(tower, ONE, few, head='unet', finetune=True)
    assert moved == [False, True] # the head alone, then both


def test_the_rate_is_chosen_on_validation_rows(splits, monkeypatch):
    def at(*rates):
        monkeypatch.setitem(PROTOCOLS, 'segmentation_linear', ('linear', Schedule(rates, 20, 100)))
        return segmentation(Grey(), ONE, splits)
    good = at(.1)
    assert not np.array_equal(stacked(good['scores']), stacked(at(1e-6)['scores']))
    assert same(at(1e-6, .1), good) and same(at(.1, 1e-6), good)


# --- budgets and splits

def test_budgets_are_drawn_five_times_and_named(splits):
    rows = segmentation(Grey(), ONE, splits, labels='0.25')
    assert rows['protocol'].unique().tolist() == ['segmentation_linear@0.25'] and sorted(set(rows['draw'])) == [0, 1, 2, 3, 4]
    assert len({tuple(np.concatenate(list(o))) for _, o in rows.groupby('draw')['scores']}) > 1
    assert set(segmentation(Grey(), ONE, splits, labels='2shot', draws=1)['protocol']) == {'segmentation_linear@2shot'}
    assert same(segmentation(Grey(), ONE, splits, labels='1'), segmentation(Grey(), ONE, splits))


def test_a_smaller_budget_lies_inside_a_larger_one(splits):
    maps = Maps(Grey(), torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    parts = {k: Part.of(o, o, CLASSES, maps, True) for k, o in splits.items()}
    for draw in range(3):
        small, large, whole = (module.chosen_rows(parts, splits, o, draw, 0) for o in ('0.2', '0.6', ''))
        for k in ('train', 'valid'): assert set(small[k]) <= set(large[k]) <= set(whole[k]) and len(small[k]) < len(large[k])


def test_validation_rows_are_whole_groups_of_the_training_rows_where_there_are_none(splits):
    train = corpus_of(30, 5, share=3)
    maps = Maps(Grey(), torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    part = Part.of(train, train, CLASSES, maps, True)
    rows = module.chosen_rows({'train': part, 'valid': part}, {'train': train, 'test': splits['test']}, '', 0, 0)
    apart = [set(part.groups[rows[k]]) for k in ('train', 'valid')]
    assert not apart[0] & apart[1] and len(rows['train']) + len(rows['valid']) == 30 and len(rows['valid']) >= 3
    assert values(segmentation(Grey(), TASK, {'train': train, 'test': splits['test']})) > .7


def test_many_validation_rows_are_looked_at_in_part(splits, monkeypatch):
    monkeypatch.setattr(module, 'MOST_VALID', 5)
    maps = Maps(Grey(), torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    parts = {k: Part.of(o, o, CLASSES, maps, True) for k, o in splits.items()}
    assert len(set(module.chosen_rows(parts, splits, '', 0, 0)['valid'])) == 5


def test_bad_input_is_refused_by_name(splits):
    def run(**more): return segmentation(Grey(), more.pop('task', ONE), splits | more.pop('splits', {}), **more)
    with pytest.raises(ValueError, match="head='forest' with finetune=False"): run(head='forest')
    with pytest.raises(ValueError, match="head='linear' with finetune=True"): run(finetune=True)
    with pytest.raises(DataError, match='Grey has no image tower that could learn'): run(head='unet', finetune=True)
    with pytest.raises(DataError, match="there is no class 'tooth'"): run(task=replace(TASK, classes=('tooth',)))
    with pytest.raises(DataError, match=r'lacks the splits \[.test.\]'): segmentation(Grey(), ONE, {'train': splits['train']})
    clear = splits['train'].select([3, 7, 11, 15])
    with pytest.raises(DataError, match='toy: no training row of draw 0 has a region of'): run(splits={'train': clear})
    with pytest.raises(DataError, match="stands in the splits 'train' and 'test'"): run(splits={'test': splits['train']})
    with pytest.raises(DataError, match='20 images for 24 samples'): run(images={k: splits['test'] for k in splits})
    with pytest.raises(DataError, match='there is no budget of labels'): run(labels='some')
    frame = splits['train'].frame.copy()
    frame.at[0, 'regions'] = (Region('bright', mask=np.ones((30, 32), bool)),)
    other = Corpus(frame, name='toy', classes=CLASSES, pixels=splits['train'].pixels)
    with pytest.raises(DataError, match="row toy0-000: the mask of 'bright' was made for 32 x 30 pixels"): run(splits={'train': other})


def test_every_segmentation_entry_of_the_localized_tasks_has_a_protocol():
    assert {o.split('/')[1] for o in LOCALIZED18 if '/segmentation' in o} == set(PROTOCOLS)


# --- slow: twins, and a known answer

TWINS = sorted({o.split('/')[0] for o in LOCALIZED18})


@pytest.mark.slow
@pytest.mark.parametrize('name', TWINS)
def test_twins_run_with_every_budget(name, tmp_path):
    make_twin(name, tmp_path, 256)
    corpus = read_set(name, tmp_path)
    splits = {k: corpus.split(k) for k in ('train', 'valid', 'test')}
    images = {k: pack(o, tmp_path/'packed', size=64) for k, o in splits.items()}
    torch.manual_seed(0)
    tower, task = image_tower('vit_stem_p8', image_size=64).eval(), Task(name, 'segmentation', corpus.classes, source='twin')
    for labels in ('0.01', '0.1', ''):
        rows = segmentation(tower, task, splits, images=images, labels=labels)
        assert len(rows) == len(splits['test']) * len(corpus.classes) * (5 if labels else 1)
        assert 0 <= values(rows) <= 1
    if f'{name}/segmentation_frozen/1' in LOCALIZED18:
        assert values(segmentation(tower, task, splits, images=images, head='unet')) > .3


@pytest.mark.slow
def test_a_trained_encoder_outlines_better_than_an_untrained_one():
    "300 steps on the labels of 800 phantoms, which never say where; then one weight vector per finding."
    def tower():
        torch.manual_seed(0)
        return image_tower('vit_stem_p8', image_size=64, channels=1)
    trained, corpus = tower(), phantom_corpus('chest', 800, seed=9)
    images, labels = torch.from_numpy(corpus.images(range(800)).transpose(0, 3, 1, 2)), torch.from_numpy(corpus.targets())
    head = torch.nn.Linear(trained.width, labels.shape[1])
    optimizer = torch.optim.AdamW([*trained.parameters(), *head.parameters()], 2e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=300)
    for _ in range(300):
        rows = torch.randint(0, 800, (32,))
        logits = head(trained(trained.normalise(images[rows]), patches=False)[1])
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[rows]).backward()
        optimizer.step()
        cycle.step()
    task = Task('phantom_outlines', 'segmentation', ('pleural effusion', 'pneumothorax'), source='phantom')
    splits = {k: phantom_corpus('chest', n, seed=s, split=k) for k, n, s in (('train', 120, 1), ('valid', 40, 2), ('test', 80, 3))}
    good, bad = (segmentation(o.eval(), task, splits).assign(run=k) for k, o in (('trained', trained), ('untrained', tower())))
    gap = compare(good, bad, resamples=1000)
    assert gap['low'] > 0, gap
