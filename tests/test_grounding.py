"Grounding against loops over pixels: what counts as a hit, what is left out, and which chance belongs to it."
import itertools
import warnings
from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
import torch

from medcl_study.core import DataError, content_hash, generator
from medcl_study.data.pairs import Corpus, Region, Sample
from medcl_study.evaluation import grounding as module
from medcl_study.evaluation.features import FeatureStore
from medcl_study.evaluation.grounding import (THRESHOLDS, by_finding, contrast_to_noise, grounding, highest, hit_patches,
                                              mean_iou, patch_cover, patch_grid, phrases_of, similarity_maps)
from medcl_study.metrics import METRICS, Undefined, chance_pointing, macro_pointing
from medcl_study.predictions import (Task, compare, concat_predictions, mean_over_runs, measure, metrics_of, prediction_rows,
                                     read_predictions, score, stacked, write_predictions)

FINDINGS = ('nodule', 'mass', 'effusion')
TASK = Task('toy_grounding', 'grounding', FINDINGS, source='phantom')
Encoded = namedtuple('Encoded', 'global_ patches words word_mask')


class Regions(Corpus):
    "Pixels and regions in memory."
    def __init__(self, samples):
        frame = pd.DataFrame({'id': [o.id for o in samples], 'image': '', 'text': [o.text for o in samples], 'split': '',
                              'labels': [o.labels for o in samples], 'group': [o.group for o in samples], 'modality': ''})
        super().__init__(frame, name='toy', classes=FINDINGS, pixels=np.stack([o.image for o in samples]))
        self.samples = samples

    def __getitem__(self, i):
        if not 0 <= i < len(self): raise IndexError(i)
        return self.samples[i]

    def select(self, index): return Regions([self.samples[i] for i in index])

    def hash(self):
        masks = [o.mask if isinstance(o.mask, np.ndarray) else str(o.mask) for s in self.samples for o in s.regions]
        return content_hash(super().hash(), masks, [(o.label, o.sentence) for s in self.samples for o in s.regions])


def blob(size, y, x, side):
    mask = np.zeros((size, size), bool)
    mask[y:y + side, x:x + side] = True
    return mask


def corpus_of(n, *, share=1, size=16, name='toy'):
    "Make n images of 4×4 patches whose grey says which finding lies where; each finding has a sentence of its own."
    rng, samples = generator('test grounding', name, n), []
    for i in range(n):
        image, regions, sentences = np.zeros((16, 16), np.uint8), [], ['The lungs are clear.']
        for c in rng.permutation(3)[:rng.integers(1, 4)]:
            y, x = rng.integers(0, 4, 2) * 4
            free = image[y:y + 4, x:x + 4] == 0
            if not free.all(): continue
            image[y:y + 4, x:x + 4] = 80 * (c + 1)
            sentences.append(f'There is a {FINDINGS[c]}.')
            regions.append(Region(FINDINGS[c], len(sentences) - 1, mask=blob(size, *np.array([y, x, 4]) * size // 16)))
        samples.append(Sample(f'{name}{i}', image, ' '.join(sentences), tuple(sentences), (), tuple(regions),
                              group=f'patient {i // share}'))
    return Regions(samples)


class Toy(torch.nn.Module):
    "A patch is the one-hot code of its grey, a word that of the finding it names; noise and constants blur patches."
    def __init__(self, *, noise=0., constant=False, seed=0, dim=6):
        super().__init__()
        self.noise, self.constant, self.dim = noise, constant, dim
        self.mix = torch.nn.Parameter(torch.eye(dim))

    def encode_image(self, images, patches=False):
        each = images.float()[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).amax((3, 4)).flatten(1)
        code = torch.nn.functional.one_hot((each / 80).long(), self.dim).float()
        if self.constant: code = torch.ones_like(code)
        if self.noise:
            seeds = [int(o.long().flatten() @ torch.arange(o.numel())) for o in images]
            luck = [generator('toy', o).normal(size=code.shape[1:]) for o in seeds]
            code = (1 - self.noise) * code + self.noise * torch.tensor(np.stack(luck)).float()
        return Encoded(code.mean(1) @ self.mix, code @ self.mix if patches else None, None, None)

    def encode_text(self, texts, words=False):
        split = [t.rstrip('.').split() for t in texts]
        each = torch.zeros(len(texts), max(map(len, split)), self.dim)
        mask = torch.zeros(each.shape[:2], dtype=torch.bool)
        for i, tokens in enumerate(split):
            for t, word in enumerate(tokens):
                each[i, t, 1 + FINDINGS.index(word) if word in FINDINGS else 5] = 1
                mask[i, t] = True
        named = each.amax(1) * torch.tensor([0, 1, 1, 1, 0, 0.])
        return Encoded(named @ self.mix, None, each @ self.mix, mask)


def pixels_of(values, shape):
    "Give each pixel the value of its patch, on a square grid that divides the shape."
    side = int(len(values)**.5)
    return np.kron(values.reshape(side, side), np.ones((shape[0] // side, shape[1] // side)))


# Masks on the grid

@pytest.mark.parametrize('shape, grid', [((16, 16), (4, 4)), ((12, 20), (3, 5)), ((10, 14), (4, 3)), ((3, 3), (8, 8)), ((7, 7), (7, 7))])
def test_cover_equals_a_loop_over_fine_pixels(shape, grid):
    mask = generator('cover', *shape).random(shape) < .4
    fine = np.kron(mask, np.ones(grid)) # every pixel cut into as many pieces as there are patches: pieces fill patches
    rows = fine.shape[0] // grid[0], fine.shape[1] // grid[1]
    want = [fine[i * rows[0]:(i + 1) * rows[0], j * rows[1]:(j + 1) * rows[1]].mean()
            for i, j in itertools.product(*map(range, grid))]
    np.testing.assert_allclose(patch_cover(mask, grid), want, atol=1e-12)


@pytest.mark.parametrize('tolerance', [0, .1, .25, .5, .75, 1, 2])
@pytest.mark.parametrize('shape, grid', [((16, 16), (4, 4)), ((15, 15), (5, 5)), ((10, 14), (4, 3)), ((64, 64), (8, 8))])
def test_hit_patches_equal_a_loop_over_the_pixels_near_each_centre(shape, grid, tolerance):
    rng = generator('hits', *shape)
    for mask in (rng.random(shape) < .05, blob(min(shape), 2, 3, 4)[:shape[0], :shape[1]]):
        mask = np.pad(mask, [(0, a - b) for a, b in zip(shape, mask.shape)])
        want = []
        for i, j in itertools.product(*map(range, grid)):
            near = []
            for k, size, count in zip((i, j), shape, grid):
                side = size / count
                centre, half = (k + .5) * side, max(tolerance * side, .5)
                near.append([o for o in range(size) if o + 1 > centre - half + 1e-9 and o < centre + half - 1e-9])
            want.append(mask[np.ix_(*near)].any())
        phrase = module.Phrase(0, 'a#0', 'nodule', 'x', mask)
        np.testing.assert_array_equal(hit_patches([phrase], grid, tolerance=tolerance)[0], want)


def test_default_tolerance_leaves_no_finding_out_of_reach_and_zero_asks_for_the_centre():
    dots = [module.Phrase(0, 'a#0', 'nodule', 'x', blob(64, y, x, 1)) for y, x in itertools.product(range(0, 64, 3), repeat=2)]
    np.testing.assert_array_equal(hit_patches(dots, (8, 8)).sum(1), 1)
    centre = hit_patches(dots, (8, 8), tolerance=0)
    at = np.array([np.argwhere(o.mask)[0] % 8 for o in dots])
    np.testing.assert_array_equal(centre.any(1), np.isin(at, (3, 4)).all(1))


def test_the_same_mask_at_another_resolution_gives_the_same_rows():
    coarse, fine, patch = (grounding(Toy(noise=.3), corpus_of(40, size=o), TASK) for o in (16, 64, 4))
    for other in (fine, patch):
        for column in ('id', 'group'): assert (coarse[column] == other[column]).all()
        np.testing.assert_array_equal(stacked(coarse['target']), stacked(other['target']))
        np.testing.assert_allclose(stacked(coarse['scores']), stacked(other['scores']), atol=1e-5)


# Scores of a map

def test_scores_equal_a_loop_over_pixels():
    rng = generator('scores')
    masks = [rng.random((24, 24)) < p for p in (.02, .3, .9)] + [blob(24, 5, 2, 9)]
    maps, cover = rng.normal(size=(4, 36)) / 3, np.stack([patch_cover(o, (6, 6)) for o in masks])
    for k, mask in enumerate(masks):
        pixel = pixels_of(maps[k], (24, 24))
        inside, outside = [], []
        for y, x in np.ndindex(24, 24): (inside if mask[y, x] else outside).append(pixel[y, x])
        cnr = (np.mean(inside) - np.mean(outside)) / (np.var(inside) + np.var(outside))**.5
        iou = []
        for t in THRESHOLDS:
            both = sum(o > t for o in inside)
            iou.append(both / (len(inside) + sum(o > t for o in outside)))
        assert contrast_to_noise(maps, cover)[k] == pytest.approx(cnr, abs=1e-10)
        assert mean_iou(maps, cover)[k] == pytest.approx(np.mean(iou), abs=1e-12)
        assert mean_iou(maps, cover, thresholds=[-9])[k] == pytest.approx(mask.mean(), abs=1e-12)


def test_cnr_has_a_sign_ignores_scale_and_shift_and_is_0_for_a_flat_map():
    rng = generator('cnr')
    maps, cover = rng.normal(size=(5, 16)), rng.random((5, 16))
    cnr = contrast_to_noise(maps, cover)
    np.testing.assert_allclose(contrast_to_noise(-maps, cover), -cnr)
    np.testing.assert_allclose(contrast_to_noise(3 * maps + 2, cover), cnr)
    np.testing.assert_allclose(contrast_to_noise(maps, 1 - cover), -cnr)
    assert np.abs(contrast_to_noise(np.full((5, 16), .7) + 1e-9 * maps, cover)).max() < 1e-5
    assert np.isfinite(contrast_to_noise(np.eye(4)[:1], np.eye(4)[:1])).all()


def test_ties_go_to_the_first_patch():
    assert highest([[0, 1, 1], [1, 1, 1], [0, .5, .5 + 1e-8], [0, .5, .6]]).tolist() == [1, 0, 1, 2]
    assert highest([[0, .5, .5 + 1e-8]], tie=0).tolist() == [2]
    corpus = corpus_of(60)
    near, hits = hit_patches(phrases_of(corpus)[0], (4, 4)), grounding(Toy(constant=True), corpus, TASK)
    np.testing.assert_array_equal(stacked(hits['scores'])[:, 0], near[:, 0])


# Phrases

def sample(regions, sentences=('One.', 'Two.'), **more):
    return Sample('s', np.zeros((16, 16), np.uint8), ' '.join(sentences), sentences, (), tuple(regions), group='p', **more)


def test_instances_of_one_finding_in_one_sentence_are_one_mask():
    left, right, below = blob(16, 0, 0, 4), blob(16, 0, 12, 4), blob(16, 12, 0, 4)
    (first, second, third), left_out = phrases_of(Regions([sample([
        Region('mass', 1, mask=below), Region('nodule', 0, mask=left), Region('nodule', 0, mask=right),
        Region('nodule', 1, mask=below)])]))
    assert [o.id for o in (first, second, third)] == ['s#0', 's#1', 's#3'] and left_out == {}
    assert (second.mask == (left | right)).all() and second.sentence == 'One.' and third.sentence == 'Two.'
    assert hit_patches([second], (4, 4))[0].nonzero()[0].tolist() == [0, 3]


def test_what_cannot_be_judged_is_left_out_and_counted():
    corpus = Regions([sample([Region('mass', 1, mask=np.zeros((16, 16), bool)), Region('mass', -1, mask=blob(16, 0, 0, 4)),
                              Region('nodule', 0, mask=np.ones((16, 16), bool)), Region('effusion', 0),
                              Region('effusion', 1, box=(0, 0, 1, 1)), Region('mass', 0, mask=blob(16, 4, 4, 4))])])
    phrases, left_out = phrases_of(corpus)
    assert [o.id for o in phrases] == ['s#5']
    assert left_out == {'empty mask': 1, 'no sentence': 1, 'mask of the whole image': 2, 'neither mask nor box': 1}
    with pytest.warns(UserWarning, match='4 regions cannot be judged .1 with empty mask'):
        assert list(grounding(Toy(), corpus, TASK)['id']) == ['s#5']


def test_reports_that_pass_over_a_finding_are_no_reason_to_warn():
    corpus = Regions([sample([Region('mass', -1, mask=blob(16, 0, 0, 4)), Region('mass', 0, mask=blob(16, 4, 4, 4))])])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(grounding(Toy(), corpus, TASK)) == 1


def test_corpora_without_regions_are_refused():
    with pytest.raises(DataError, match=r"toy: no sentence has a region of \['nodule', 'mass', 'effusion'\]\. Grounding needs"):
        grounding(Toy(), Regions([sample([])]), TASK)
    with pytest.raises(DataError, match='1 with no sentence'):
        grounding(Toy(), Regions([sample([Region('mass', -1, mask=blob(16, 0, 0, 4))])]), TASK)
    only = Task('other', 'grounding', ('hernia',))
    with pytest.raises(DataError, match='hernia'): grounding(Toy(), corpus_of(5), only)
    with pytest.raises(DataError, match='3 images for 5 samples'): grounding(Toy(), corpus_of(5), TASK, images=corpus_of(3).pixels)


def test_findings_outside_the_task_are_not_asked_for():
    corpus = corpus_of(40)
    all_rows, some = (grounding(Toy(), corpus, o) for o in (TASK, Task('one', 'grounding', ('mass',))))
    index = stacked(all_rows['target'])[:, 0]
    assert set(some['id']) == set(all_rows['id'][index == 1]) and (stacked(some['target'])[:, 0] == 0).all()


def test_phrases_are_read_once_per_content(monkeypatch):
    corpus, twin = corpus_of(6, name='once'), corpus_of(6, name='once')
    first = phrases_of(corpus)[0]
    monkeypatch.setattr(Regions, '__getitem__', lambda *_: pytest.fail('read again'))
    assert phrases_of(twin)[0] is first


# Maps

def test_maps_equal_a_loop_in_both_units():
    corpus, encoder = corpus_of(12), Toy(noise=.3)
    phrases = phrases_of(corpus)[0]
    for unit, chunk in itertools.product(('sentence', 'words'), (1, 5, 256)):
        maps, grid = similarity_maps(encoder, corpus, phrases, unit=unit, chunk=chunk)
        assert grid == (4, 4) and maps.shape == (len(phrases), 16)
        for o, found in zip(phrases, maps):
            patches = encoder.encode_image(torch.tensor(corpus.pixels[o.row])[None, None], patches=True).patches[0]
            text = encoder.encode_text([o.sentence], words=True)
            against = text.global_ if unit == 'sentence' else text.words[0, text.word_mask[0]]
            for p in range(16):
                want = np.mean([torch.cosine_similarity(patches[p], w, dim=0).item() for w in against])
                assert found[p] == pytest.approx(want, abs=1e-5)


def test_words_judge_a_method_that_has_only_words():
    corpus = corpus_of(60)

    class Late(Toy):
        def encode_text(self, texts, words=False):
            found = super().encode_text(texts, words)
            return found._replace(global_=torch.ones_like(found.global_))
    whole, words = (grounding(Late(), corpus, TASK, unit=o) for o in ('sentence', 'words'))
    assert measure(words, resamples=50).value == 1 > measure(whole, resamples=50).value
    with pytest.raises(ValueError, match="no unit 'late': known are sentence, words"): grounding(Late(), corpus, TASK, unit='late')


def test_grid_is_the_towers_or_a_square():
    assert patch_grid(Toy(), 49) == (7, 7)
    tower = Toy()
    tower.image = namedtuple('Tower', 'patch_grid')((2, 8))
    assert patch_grid(tower, 16) == (2, 8)
    with pytest.raises(DataError, match='15 patches do not make 3 rows of 3'): patch_grid(Toy(), 15)
    with pytest.raises(DataError, match='12 patches do not make 2 rows of 8'): patch_grid(tower, 12)


def test_patches_are_not_written_to_disk_and_texts_are(tmp_path):
    corpus = corpus_of(8)
    stored = grounding(FeatureStore(Toy(), tmp_path), corpus, TASK)
    assert stacked(stored['scores']).tolist() == stacked(grounding(Toy(), corpus, TASK)['scores']).tolist()
    assert {o.name.partition('-')[0] for o in tmp_path.iterdir()} == {'text'}


# Rows and their numbers

def test_perfect_maps_hit_broken_ones_do_not_and_noise_meets_chance():
    corpus = corpus_of(300)
    perfect, noise = (grounding(o, corpus, TASK) for o in (Toy(), Toy(noise=1.)))
    numbers = score(perfect.assign(run='r'), resamples=200)
    assert numbers['toy_grounding/grounding/pointing']['value'] == 1
    assert numbers['toy_grounding/grounding/macro_pointing']['value'] == 1
    samples = corpus.samples
    swapped = Regions([Sample(**{**vars(o), 'image': p.image}) for o, p in zip(samples, samples[1:] + samples[:1])])
    chance = METRICS['pointing'].chance(stacked(perfect['target']), 3)
    sd = (chance * (1 - chance) / len(perfect))**.5
    assert abs(measure(noise, resamples=50).value - chance) < 4 * sd
    assert measure(grounding(Toy(), swapped, TASK), resamples=50).value < .3


def test_chance_equals_the_area_that_hits_by_simulation():
    phrases = phrases_of(corpus_of(50))[0]
    for tolerance in (.5, 1):
        rows = grounding(Toy(), corpus_of(50), TASK, tolerance=tolerance)
        chance = METRICS['pointing'].chance(stacked(rows['target']), 3)
        near = hit_patches(phrases, (4, 4), tolerance=tolerance)
        drawn = generator('draw').integers(0, 16, (len(near), 4000))
        assert np.take_along_axis(near, drawn, 1).mean() == pytest.approx(chance, abs=.005)
        if tolerance == .5: assert chance == pytest.approx(np.mean([o.mask.mean() for o in phrases]), abs=1e-12)
    by_hand = np.mean([np.mean([t[1] / t[2] for t in rows['target'] if t[0] == c]) for c in range(3)])
    assert chance_pointing(stacked(rows['target']), least=5) == pytest.approx(by_hand)


def test_groups_are_patients_and_rows_do_not_depend_on_order():
    corpus = corpus_of(40, share=4)
    rows = grounding(Toy(noise=.4), corpus, TASK)
    groups = {o.id: o.group for o in corpus.samples}
    assert [groups[o.partition('#')[0]] for o in rows['id']] == list(rows['group']) and rows['group'].nunique() == 10
    assert score(rows.assign(run='r'), resamples=50)['toy_grounding/grounding/pointing']['groups'] == 10
    moved = grounding(Toy(noise=.4), corpus.select(generator('order').permutation(40)), TASK, chunk=7)
    a, b = (o.sort_values('id') for o in (rows, moved))
    assert list(a['id']) == list(b['id']) and list(a['group']) == list(b['group'])
    np.testing.assert_allclose(stacked(a['scores']), stacked(b['scores']), atol=1e-5)
    lone = grounding(Toy(), Regions([Sample(**{**vars(o), 'group': ''}) for o in corpus.samples]), TASK)
    assert list(lone['group']) == [o.partition('#')[0] for o in lone['id']]


def test_numbers_follow_from_the_file(tmp_path):
    rows = grounding(Toy(noise=.5), corpus_of(80, share=2), TASK).assign(run='r')
    write_predictions(tmp_path/'a.parquet', rows)
    again = read_predictions(tmp_path/'a.parquet')
    numbers, x, y = score(again, resamples=200), stacked(again['scores']), stacked(again['target'])
    assert numbers == score(rows, resamples=200)
    assert {k.rpartition('/')[2]: v['primary'] for k, v in numbers.items()} == {
        'pointing': True, 'macro_pointing': False, 'cnr': False, 'miou': False}
    values = {k.rpartition('/')[2]: v for k, v in numbers.items()}
    for name, column in (('pointing', 0), ('cnr', 1), ('miou', 2)): assert values[name]['value'] == pytest.approx(x[:, column].mean())
    assert values['macro_pointing']['value'] == pytest.approx(np.mean([x[y[:, 0] == c, 0].mean() for c in range(3)]))
    assert values['cnr']['chance'] == 0 and values['miou']['chance'] is None
    assert all(o['low'] <= o['value'] <= o['high'] for o in values.values())
    assert metrics_of(TASK, y) == ['pointing', 'macro_pointing', 'cnr', 'miou']


def test_draws_and_seeds_keep_a_negative_cnr_within_its_interval():
    flipped = [grounding(Toy(noise=.3 + s / 50), corpus_of(60), TASK).assign(run=f'r{s}') for s in range(3)]
    for o in flipped: o['scores'] = [s * np.float32([1, -1, 1]) for s in o['scores']]
    mean = mean_over_runs(flipped, 'cnr', resamples=100)
    assert mean.low < mean.value < mean.high < 0
    draws = concat_predictions([o.assign(run='r', draw=s) for s, o in enumerate(flipped)])
    entry = score(draws, resamples=100)['toy_grounding/grounding/cnr']
    assert entry['draws'] == 3 and entry['low'] < entry['value'] < entry['high'] < 0


def test_two_models_are_compared_on_the_same_regions():
    good, bad = (grounding(Toy(noise=o), corpus_of(80), TASK).assign(run=f'r{o}') for o in (.2, .9))
    gap = compare(good, bad, resamples=200)
    assert gap['metric'] == 'pointing' and gap['value'] > 0 and gap['low'] > 0
    wider = grounding(Toy(noise=.2), corpus_of(80), TASK, tolerance=1).assign(run='w')
    with pytest.raises(DataError, match='targets of sample'): compare(good, wider, resamples=50)


def test_findings_one_by_one():
    rows = grounding(Toy(noise=.5), corpus_of(80), TASK).assign(run='r')
    table, x, y = by_finding(rows), stacked(rows['scores']), stacked(rows['target'])
    assert list(table.index) == list(FINDINGS) and table['regions'].sum() == len(rows)
    for c, name in enumerate(FINDINGS):
        mine = y[:, 0] == c
        want = [mine.sum(), x[mine, 0].mean(), (y[mine, 1] / y[mine, 2]).mean(), x[mine, 1].mean(), x[mine, 2].mean()]
        assert table.loc[name].tolist() == pytest.approx(want)
    with pytest.raises(DataError, match="several .'run'"): by_finding(concat_predictions([rows, rows.assign(run='s')]))


def test_rare_findings_leave_the_mean_over_findings():
    y = np.array([[0, 1, 16]] * 20 + [[1, 2, 16]] * 9 + [[2, 4, 16]] * 3)
    x = np.stack([np.arange(32) % 2, np.zeros(32), np.zeros(32)], 1)
    rows = prediction_rows(TASK, [f'i{i}#0' for i in range(32)], y, x, protocol='grounding', run='r')
    entry = score(rows, resamples=100)['toy_grounding/grounding/macro_pointing']
    assert entry['left_out'] == ['effusion'] and entry['value'] == pytest.approx((.5 + 4 / 9) / 2)
    assert entry['chance'] == pytest.approx((1 / 16 + 2 / 16) / 2)
    with pytest.raises(Undefined): macro_pointing(x[:4], y[:4])


@pytest.mark.parametrize('name', ['pointing', 'macro_pointing', 'cnr', 'miou'])
def test_a_weight_is_a_count(name):
    rng = generator('weights')
    y = np.stack([rng.integers(0, 3, 90), np.full(90, 2), np.full(90, 16)], 1)
    x, w = np.stack([rng.integers(0, 2, 90), rng.normal(size=90), rng.random(90)], 1), rng.integers(0, 4, 90)
    rows, metric = np.repeat(np.arange(90), w), METRICS[name].function
    both = metric(x, y, weights=np.stack([w, np.ones(90)]))
    assert both.tolist() == pytest.approx([float(metric(x[rows], y[rows])), float(metric(x, y))])


@pytest.mark.parametrize('target, scores', [([3, 1, 16], [1, 0, 0]), ([0, 17, 16], [1, 0, 0]), ([0, 0, 16], [1, 0, 0]),
                                            ([0, 1, 16], [.5, 0, 0]), ([0, 1, 16], [1, 0, 1.5]), ([-1, 1, 16], [1, 0, 0])])
def test_impossible_rows_are_refused(target, scores):
    with pytest.raises(DataError, match='row 1: expected a finding between 0 and 2'):
        prediction_rows(TASK, ['a#0'], [target], [scores], protocol='grounding')
    with pytest.raises(DataError, match='scores must hold 3 numbers'):
        prediction_rows(TASK, ['a#0'], [[0, 1, 16]], [[1, 0]], protocol='grounding')
    with pytest.raises(ValueError, match='0 classes'): Task('a', 'grounding')
