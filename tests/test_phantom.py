"""Phantoms: pure functions of their index, true to their reports and masks, and neither toy nor trick.

    pytest -m 'not slow' tests/test_phantom.py  the contracts, and the shortcuts that need no training
    pytest -m slow -s tests/test_phantom.py     all shortcuts and a small CNN, 4,000 images a modality, as a table
"""
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from medcl_study.data.pairs import Corpus
from medcl_study.data.phantom import MODALITIES, phantom_corpus
from medcl_study.data.phantoms.drawing import Draws, ellipse, stamps
from medcl_study.data.phantoms.wording import _NEGATIVE, _POSITIVE, only, scene_of
from medcl_study.data.text import prompts_for, split_sentences

each = pytest.mark.parametrize('modality', MODALITIES)
CHANCE = .5


def auroc(target, score):
    "Probability that a positive scores above a negative, from ranks; ties count half."
    ranks, positive = rankdata(score), int(target.sum())
    return (ranks[target > 0].sum() - positive*(positive + 1)/2)/(positive*(len(target) - positive))


def macro(targets, scores): return float(np.mean([auroc(targets[:, j], scores[:, j]) for j in range(targets.shape[1])]))


# ---- pure functions of (modality, seed, split, index, knobs)

@pytest.mark.parametrize('modality', [*MODALITIES, 'mixed'])
def test_a_pair_does_not_depend_on_its_batch(modality):
    corpus = phantom_corpus(modality, 70, size=40)
    images, masks = corpus.images(slice(None)), corpus.masks(slice(None))
    some = [63, 2, 2, 17]
    assert (corpus.images(some) == images[some]).all() and (corpus.masks(some) == masks[some]).all()
    other = phantom_corpus(modality, 90, size=40).select([63, 5])
    assert (other[0].image == images[63].squeeze()).all()
    assert other[0].text == corpus.texts[63] and other[0].id == corpus.frame.id[63]
    assert other[0].questions == corpus[63].questions and (other.targets() == corpus.targets()[[63, 5]]).all()
    assert (phantom_corpus(modality, 70, size=40).images(some) == images[some]).all()


def test_a_pair_depends_on_seed_split_and_knobs():
    base = phantom_corpus('chest', 40)
    def images(**kwargs): return phantom_corpus('chest', 40, **kwargs).images(slice(None))
    changes = (({'seed': 1}, 1), ({'split': 'test'}, 1), ({'noise': .5}, 1), ({'findings_per_image': 3.}, .7))
    for change, share in changes:
        assert (images(**change) != base.images(slice(None))).any((1, 2, 3)).mean() >= share, change
        assert phantom_corpus('chest', 40, **change).hash() != base.hash()
    for change in ({'wording': 0.}, {'incompleteness': .9}):
        assert (images(**change) == base.images(slice(None))).all()
        assert phantom_corpus('chest', 40, **change).texts != base.texts
    assert phantom_corpus('chest', 40).hash() == base.hash()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8), st.text(max_size=8), st.integers(0, 10**18))
def test_numbers_belong_to_key_row_and_name(rows, name, key):
    draws = Draws(key, rows, rows)
    for i, row in enumerate(rows):
        assert (Draws(key, [row], [row]).uniform(name, count=3) == draws.uniform(name, count=3)[i]).all()
    assert ((draws.uniform(name, 2, 5, count=50) >= 2) & (draws.uniform(name, 2, 5, count=50) < 5)).all()
    assert (draws.uniform(name, count=9) != Draws(key + 1, rows, rows).uniform(name, count=9)).any()
    assert (draws.uniform(name, count=9) != draws.uniform(name + 'x', count=9)).any()


def test_size_shows_the_same_patient_more_finely():
    small, large = (phantom_corpus('chest', 24, size=o, noise=0.).images(slice(None))[..., 0].astype(float)
                    for o in (56, 224))
    coarse = large.reshape(24, 56, 4, 56, 4).mean((2, 4))
    matched = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, coarse)]
    swapped = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, coarse[1:])]
    assert min(matched) > .97 > np.median(swapped)


def test_a_stamp_is_the_shape_it_stands_for():
    "Stamped discs equal the distance formula evaluated on the whole grid."
    rng, size = np.random.default_rng(0), 48
    x, y, r = (rng.uniform(*o, (3, 6)).astype(np.float32) for o in ((-1.2, 1.2), (-1.2, 1.2), (.02, .3)))
    t = (np.arange(size, dtype=np.float32) + .5)*2/size - 1
    whole = np.zeros((3, size, size))
    for i in range(3):
        for j in range(6):
            d = np.hypot(t[None] - x[i, j], t[:, None] - y[i, j]) - r[i, j]
            whole[i] = np.maximum(whole[i], np.clip(.5 - d*size/2, 0, 1))
    assert np.abs(stamps(size, x, y, r) - whole).max() < 1e-4
    assert ellipse(np.float64(.3), np.float64(0), 0, 0, .3, .1, 0.) == pytest.approx(0)


# ---- the corpus contract

@each
def test_corpus_contract(modality):
    corpus, row = phantom_corpus(modality, 60, split='valid'), MODALITIES[modality]
    assert isinstance(corpus, Corpus) and corpus.source == 'phantom'
    assert len(row.findings) >= 5 and corpus.classes == row.classes
    assert corpus.images([0]).shape == (1, 64, 64, row.channels) and corpus.images([0]).dtype == np.uint8
    assert list(corpus.frame.columns) == ['id', 'image', 'text', 'labels', 'group', 'split', 'modality']
    assert corpus.frame.id.is_unique
    assert set(corpus.frame.split) == {'valid'} and set(corpus.frame.modality) == {modality}
    assert (Corpus.targets(corpus) == corpus.targets()).all()
    assert (Corpus(corpus.frame, name='plain', classes=corpus.classes).text_ids() == corpus.text_ids()).all()
    for sample in (corpus[0], corpus[-1]):
        assert sample.text == ' '.join(sample.sentences) and sample.split == 'valid' and sample.modality == modality
        assert sample.image.shape == ((64, 64) if row.channels == 1 else (64, 64, 3))
        assert {o.label for o in sample.regions} == set(sample.labels)
    assert prompts_for(corpus.classes, row.prompts) != prompts_for(corpus.classes, row.prompts, negative=True)
    with pytest.raises(IndexError): corpus[60]
    assert corpus.split('valid') is corpus


def test_no_patient_is_in_two_splits_or_modalities():
    corpora = [phantom_corpus('mixed', 400, split=o, seed=3) for o in ('train', 'valid', 'test')]
    groups = [set(o.frame.group) for o in corpora]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert all(o.frame.groupby('group').modality.nunique().max() == 1 for o in corpora)
    sizes = corpora[0].frame.groupby('group').size()
    assert sizes.min() == 1 and sizes.max() >= 3


def test_mixing_joins_classes_of_the_same_name():
    corpus = phantom_corpus('mixed', 500)
    shared = [c for c in corpus.classes if sum(c in o.classes for o in MODALITIES.values()) > 1]
    assert shared == ['ascites'] and len(corpus.classes) == sum(len(o.classes) for o in MODALITIES.values()) - 1
    for modality, row in MODALITIES.items():
        foreign = [j for j, c in enumerate(corpus.classes) if c not in row.classes]
        assert not corpus.targets()[(corpus.frame.modality == modality).to_numpy()][:, foreign].any()


def test_nothing_of_torch_is_loaded():
    code = "import sys, medcl_study.data.phantom; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# ---- findings

@each
def test_prevalence_and_independence(modality):
    targets = phantom_corpus(modality, 6000).targets()
    assert (np.abs(targets.mean(0) - .25) < .03).all()
    correlation = np.corrcoef(targets.T) - np.eye(targets.shape[1])
    assert np.abs(correlation).max() < .06
    dense = phantom_corpus(modality, 2000, findings_per_image=3.).targets()
    assert abs(dense.sum(1).mean() - 3) < .15


@each
def test_every_finding_has_its_mask_and_no_other_does(modality):
    corpus = phantom_corpus(modality, 300, seed=1)
    area, present = corpus.masks(slice(None)).sum((2, 3)), corpus.targets() > 0
    assert not area[~present].any()
    assert (area[present] > 0).all() and (area[present] < 12).mean() < .08
    for i in range(20):
        for region in corpus[i].regions:
            rows, columns = np.nonzero(region.mask)
            assert region.box == (columns.min()/64, rows.min()/64, (columns.max() + 1)/64, (rows.max() + 1)/64)


@each
def test_a_mask_is_where_the_picture_changes(modality):
    "Drawn with and without one finding, from the same numbers, most of the change lies in its mask."
    row, n = MODALITIES[modality], 48
    draws = Draws('change', range(n), range(n))
    for j, finding in enumerate(row.findings):
        truth, none = (only(row, o, n, place=j % len(finding.places), extent=.6) for o in (finding.name, None))
        scene = scene_of(row, draws, truth, 64, 0.)
        change = row.draw(scene) - row.draw(scene_of(row, draws, none, 64, 0.))
        change = np.abs(change if change.ndim == 3 else change.mean(1))
        mask = scene.masks[finding.name][1]
        assert change[mask].mean() > .04, f'{finding.name} cannot be seen'
        assert change[mask].mean() > 5*change[~mask].mean(), f'{finding.name} changes the picture outside its mask'


def place_hits(corpus, sides, order=slice(None)):
    "Share of masks whose centre lies on the side that the report names, along each axis; `order` breaks the pairs."
    masks, hits = corpus.masks(slice(None))[order], []
    for i, row in enumerate(corpus._told):
        for c, j in row[1].items():
            if j < 0 or not (mask := masks[i, corpus.classes.index(c)]).any(): continue
            centre = [o.mean()/corpus.size*2 - 1 for o in np.nonzero(mask)]
            said = [o for word, o in sides.items() if re.search(rf'\b{word}\b', row[0][j].lower())]
            hits += [centre[axis]*sign > 0 for axis, sign in said]
    return np.mean(hits), len(hits)


ON_SCREEN = {'upper': (0, -1), 'lower': (0, 1), 'left': (1, -1), 'right': (1, 1)}  # axis and sign


@pytest.mark.parametrize('modality, sides', [
    ('chest', {'right': (1, -1), 'left': (1, 1)}), ('histology', ON_SCREEN), ('dermoscopy', ON_SCREEN),
    ('fundus', {'superior': (0, -1), 'inferior': (0, 1)})], ids=['chest', 'histology', 'dermoscopy', 'fundus'])
def test_reports_name_the_place_that_the_mask_has(modality, sides):
    corpus = phantom_corpus(modality, 400, seed=2)
    share, count = place_hits(corpus, sides)
    assert count > 150 and share > .97
    broken, _ = place_hits(corpus, sides, np.roll(np.arange(400), 4))
    assert broken < .75, 'the test would not notice a mask of another image'


# ---- reports

def pattern(template):
    "A regular expression for what a template can become."
    text = re.sub(r'\\\{\w+\\\}', '.*', re.escape(' '.join(template.split())))
    return re.compile(text.replace(r'\ .*', '.*'), re.I)


@each
def test_the_named_sentence_states_the_finding(modality):
    corpus, row = phantom_corpus(modality, 800), MODALITIES[modality]
    for sentences, present, _ in corpus._told:
        for c, j in present.items():
            finding = row.findings[row.classes.index(c)]
            if j < 0: continue
            general = any(pattern(o).fullmatch(sentences[j]) for o in _POSITIVE)
            named = any(o.lower() in sentences[j].lower() for o in (finding.name, *finding.also))
            assert general and named or any(pattern(o).fullmatch(sentences[j]) for o in finding.says), (c, sentences[j])
        stated = [j for j in present.values() if j >= 0]
        assert len(set(stated)) == len(stated)


def denials(corpus, row):
    "Yield (report's index, denied finding's index), reading the text alone."
    openings = sorted({o.partition('{n}')[0] for o in _NEGATIVE}, key=len, reverse=True)
    names = {w.lower(): j for j, f in enumerate(row.findings) for w in (f.name, *f.also)}
    fixed = {*(f.normal for f in row.findings), *row.normals, *(o for _, *texts in row.extras.values() for o in texts)}
    for i, sentences in enumerate(corpus.sentences):
        for text in sentences:
            opening = next((o for o in openings if text.lower().startswith(o)), None)
            if opening is None or text in fixed: continue
            listed = text[len(opening):].lower().removesuffix(' seen.').rstrip('.')
            for name in re.split(r', | or ', listed): yield i, names[name]


@each
def test_what_is_denied_is_absent(modality):
    corpus = phantom_corpus(modality, 800)
    found = list(denials(corpus, MODALITIES[modality]))
    targets = corpus.targets()
    assert len(found) > 1000 and not any(targets[i, j] for i, j in found)


@each
def test_reports_read_as_reports(modality):
    corpus = phantom_corpus(modality, 2000)
    counts = np.array([len(o) for o in corpus.sentences])
    assert counts.min() >= 3 and (counts <= 5).mean() > .95
    assert len(set(corpus.texts)) > 1900
    for sentences in corpus.sentences:
        assert all(o[0].isupper() or o[0].isdigit() for o in sentences) and all(o.endswith('.') for o in sentences)
        text = ' '.join(sentences)
        assert split_sentences(text) == sentences and '  ' not in text and '{' not in text and ' .' not in text
    plain = phantom_corpus(modality, 2000, wording=0.)
    assert len(set(plain.texts)) < len(set(corpus.texts))
    silent = phantom_corpus(modality, 100, incompleteness=1.)
    assert not any(j >= 0 for _, present, _ in silent._told for j in present.values())


@each
def test_questions_are_answered_truly(modality):
    corpus, row = phantom_corpus(modality, 300), MODALITIES[modality]
    yes = no = 0
    for labels, (_, _, questions) in zip(corpus.frame.labels, corpus._told):
        assert {o.kind for o in questions} == {'open', 'closed'}
        for o in questions:
            if o.kind == 'closed': yes, no = yes + (o.answer == 'yes'), no + (o.answer == 'no')
            asked = re.fullmatch(r'(?:Is|Are) there (?:an? )?(.*)\?', o.question)
            if asked: assert (asked[1] in labels) == (o.answer == 'yes')
            if o.question.startswith('Which findings'): assert o.answer == (', '.join(labels) or 'none')
            if o.question.startswith('Where'): assert any(o.answer in f.places for f in row.findings)
    assert .35 < yes/(yes + no) < .65


@each
def test_mention_does_not_tell_presence(modality):
    "Whether a finding is named at all, denials included, predicts it at most at 0.70, and more than chance allows."
    corpus, row = phantom_corpus(modality, 4000), MODALITIES[modality]
    texts, targets = [o.lower() for o in corpus.texts], corpus.targets()
    named = np.array([[any(w.lower() in o for w in (f.name, *f.also)) for f in row.findings] for o in texts], float)
    assert CHANCE < macro(targets, named) <= .70


# ---- neither toy nor trick

def at_size(images, size):
    "Average images (n, h, w, c) down to (n, size, size, c), each cell over the area that it covers."
    h = images.shape[1]
    edges, t = np.linspace(0, h, size + 1), np.arange(h)
    cover = np.clip(np.minimum(edges[1:, None], t + 1) - np.maximum(edges[:-1, None], t), 0, 1)
    cover = (cover*size/h).astype(np.float32)
    return np.einsum('ih,nhwc,jw->nijc', cover, images.astype(np.float32), cover, optimize=True)


def linear(train, targets, test, strength=1e-3):
    "Scores of one logistic regression per class on standardised features."
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    scale = StandardScaler().fit(train)
    train, test = scale.transform(train), scale.transform(test)
    fits = [LogisticRegression(C=strength, max_iter=300).fit(train, o) for o in targets.T]
    return np.stack([o.decision_function(test) for o in fits], 1)


@each
def test_mean_colour_is_not_enough(modality):
    train, test = phantom_corpus(modality, 1000, size=32), phantom_corpus(modality, 1000, size=32, split='test')
    scores = linear(train.images(slice(None)).mean((1, 2)), train.targets(), test.images(slice(None)).mean((1, 2)), 1.)
    assert macro(test.targets(), scores) <= .62  # the bound of .60, and what a thousand images allow to chance


def cnn(train, targets, test, epochs=12, batch=64, lr=3e-3):
    "Scores of a CNN of 100,000 parameters, trained in about a minute and a half on one core."
    import torch
    from torch import nn
    torch.manual_seed(0)
    layers, width = [], train.shape[3]
    for k, out in enumerate((32, 48, 64, 96)):
        layers += [nn.Conv2d(width, out, 3 if k else 5, 1 if k else 2, 1 if k else 2, bias=False), nn.BatchNorm2d(out),
                   nn.ReLU(), nn.MaxPool2d(2) if k in (1, 2) else nn.Identity()]
        width = out
    body, head = nn.Sequential(*layers).to(memory_format=torch.channels_last), nn.Linear(2*width, targets.shape[1])
    def score(images):
        x = (torch.from_numpy(images).permute(0, 3, 1, 2).float()/255 - .5)/.25
        x = body(x.contiguous(memory_format=torch.channels_last))
        return head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
    parameters = [*body.parameters(), *head.parameters()]
    assert sum(o.numel() for o in parameters) < 101_000
    optimizer, steps = torch.optim.AdamW(parameters, lr, weight_decay=.02), epochs*(len(train)//batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    whole = len(train)//batch*batch
    order = np.stack([np.random.default_rng(e).permutation(len(train))[:whole] for e in range(epochs)])
    for rows in order.reshape(-1, batch):
        loss = nn.functional.binary_cross_entropy_with_logits(score(train[rows]), torch.from_numpy(targets[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    body.eval()
    with torch.no_grad(): return torch.cat([score(o) for o in np.array_split(test, 8)]).numpy()


@pytest.mark.slow
@each
def test_neither_toy_nor_trick(modality, capsys):
    "Shortcuts fail and a small CNN succeeds, on 4,000 training and 2,000 test images of 64 pixels."
    import torch
    torch.set_num_threads(1)
    train, test = phantom_corpus(modality, 4000), phantom_corpus(modality, 2000, split='test')
    pixels, targets, held, truth = train.images(slice(None)), train.targets(), test.images(slice(None)), test.targets()
    small = [at_size(o, 24).reshape(len(o), -1) for o in (pixels, held)]
    scores = {'majority': np.tile(targets.mean(0), (len(truth), 1)),
              'mean colour': linear(pixels.mean((1, 2)), targets, held.mean((1, 2)), 1.),
              'pixels 24x24': linear(small[0], targets, small[1]), 'cnn': cnn(pixels, targets, held)}
    result = {k: [auroc(truth[:, j], v[:, j]) for j in range(truth.shape[1])] for k, v in scores.items()}
    with capsys.disabled():
        print(f'\n{modality}: ' + ', '.join(f'{k} {np.mean(v):.3f}' for k, v in result.items()))
        for j, c in enumerate(test.classes):
            print(f'    {c:24}' + '  '.join(f'{k} {v[j]:.3f}' for k, v in result.items()))
    assert np.mean(result['majority']) == CHANCE and np.mean(result['mean colour']) <= .60
    assert np.mean(result['pixels 24x24']) <= .75 and np.mean(result['cnn']) >= .90
