"""Evaluation against loops, closed forms, ties, permutations and kills: what a number may depend on, and what not."""
import itertools
import os
import signal
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medcl_study.core import DataError, generator
from medcl_study.data.pairs import Corpus
from medcl_study.data.text import PromptSet
from medcl_study.evaluation.baselines import SHORTCUTS, shortcut_views, shortcuts, untrained
from medcl_study.evaluation.features import FeatureStore, Scorer, SCORERS, encoder_hash, labelled, pixel_reader
from medcl_study.evaluation.probe import PENALTIES, fit_probe, linear_probe, probe_rows
from medcl_study.evaluation.retrieval import TIE, best_ranks, retrieval
from medcl_study.evaluation.zeroshot import class_scores, zero_shot
from medcl_study.metrics import METRICS, chance_recall
from medcl_study.predictions import Task, concat_predictions, read_predictions, score, stacked, write_predictions

Encoded = namedtuple('Encoded', 'global_ pooled patches words word_mask')
WORDS = ('nodule', 'mass', 'effusion', 'edema', 'fracture', 'hernia', 'normal', 'scar', 'tube')
PROMPTS = PromptSet(('image of {c}', 'scan: {c}'), ('no {c} on image', 'no {c} on scan'))


class Toy(torch.nn.Module):
    "Word j of a text and pixel j of a 3×3 image are coordinate j; one patch per pixel, one word vector per word."
    def __init__(self, seed=0, noise=0.):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.mix = torch.nn.Parameter(torch.eye(9) + noise * torch.randn(9, 9, generator=g))
        self.rows = 0

    def _encoded(self, each, mask=None):
        self.rows += len(each)
        pooled = each.sum(1)
        vectors = torch.nn.functional.normalize(each @ self.mix, dim=-1)
        return Encoded(torch.nn.functional.normalize(pooled @ self.mix, dim=-1), pooled, vectors, vectors, mask)

    def encode_image(self, images, patches=False):
        return self._encoded(torch.diag_embed(images.flatten(1).float() / 127.5 - 1))

    def encode_text(self, texts, words=False):
        found = [[WORDS.index(o) for o in WORDS if o in t.lower()] or [0] for t in texts]
        each = torch.zeros(len(texts), max(map(len, found)), 9)
        for i, (t, row) in enumerate(zip(texts, found)): each[i, range(len(row)), row] = 1. - 2. * t.startswith('no ')
        return self._encoded(each, each.abs().sum(-1) > 0)


def corpus_of(n, *, name='toy', noise=.4, classes=WORDS[:4], one=False, share=1):
    "Make n pairs whose images show the findings that the text names; `share` images stand for each patient."
    rng = generator('test evaluation', name, n)
    present = rng.random((n, 9)) < .3
    if one: present[:, :len(classes)] = np.eye(len(classes), dtype=bool)[rng.integers(len(classes), size=n)]
    x = (present - .5 + noise * rng.normal(size=present.shape)).clip(-1, 1)
    frame = pd.DataFrame({'id': [f'{name}{i}' for i in range(n)], 'image': '', 'split': name, 'modality': '',
                          'text': [' and '.join(np.array(WORDS)[o]) or 'normal' for o in present],
                          'group': [f'{name} patient {i // share}' for i in range(n)],
                          'labels': [tuple(np.array(classes)[o[:len(classes)]]) for o in present]})
    return Corpus(frame, name=name, classes=classes, pixels=((x + 1) * 127.5).round().astype(np.uint8).reshape(n, 3, 3))


MANY = Task('findings', 'multilabel', WORDS[:4], source='phantom')
ONE = Task('finding', 'multiclass', WORDS[:4], source='phantom')
PAIRS = Task('pairs', 'retrieval', source='phantom')


def by_id(frame): return {(o.protocol, o.id): (*o.target, *o.scores) for o in frame.itertuples()}


def assert_same(a, b, tolerance=1e-6):
    a, b = by_id(a), by_id(b)
    assert a.keys() == b.keys()
    np.testing.assert_allclose([a[o] for o in a], [b[o] for o in a], atol=tolerance, rtol=0)


# Features

def test_features_do_not_depend_on_batch_chunk_or_order():
    corpus, order = corpus_of(50), generator('order').permutation(50)
    plain = FeatureStore(Toy(noise=.3)).images(corpus)
    for batch_size, chunk in itertools.product((1, 7, 64), (5, 1024)):
        store = FeatureStore(Toy(noise=.3), batch_size=batch_size, chunk=chunk)
        for name in plain: np.testing.assert_allclose(store.images(corpus)[name], plain[name], atol=1e-6)
        np.testing.assert_allclose(store.images(corpus.select(order))['pooled'], plain['pooled'][order], atol=1e-6)
        texts = list(corpus.frame.text)
        moved = store.texts([texts[i] for i in order])['global_']
        np.testing.assert_array_equal(store.texts(texts)['global_'][order], moved)


def test_token_features_are_padded_to_the_longest_text():
    texts = ['nodule', 'nodule and mass and effusion', 'edema and hernia', 'mass']
    outputs = ('words', 'word_mask')
    for batch_size, chunk in ((1, 1), (2, 3), (4, 10)):
        found = FeatureStore(Toy(), batch_size=batch_size, chunk=chunk).texts(texts, outputs)
        assert found['words'].shape == (4, 3, 9) and found['word_mask'].dtype == bool
        assert found['word_mask'].sum(1).tolist() == [1, 3, 2, 1]
        assert not found['words'][~found['word_mask']].any()


def test_cache_is_never_stale(tmp_path):
    corpus, encoder = corpus_of(20), Toy()

    def cost(*, corpus=corpus, outputs=('global_',)):
        "Count the rows that had to be encoded."
        encoder.rows = 0
        FeatureStore(encoder, tmp_path, chunk=8).images(corpus, outputs)
        return encoder.rows
    assert (cost(), cost()) == (20, 0)
    with torch.no_grad(): encoder.mix[3, 4] += 1e-6
    assert cost() == 20
    with torch.no_grad(): encoder.mix[3, 4] -= 1e-6
    assert cost(outputs=('global_', 'pooled')) == 20
    other = corpus.pixels.copy()
    other[7, 1, 1] ^= 1
    assert cost(corpus=Corpus(corpus.frame, name='toy', classes=corpus.classes, pixels=other)) == 20
    assert cost(corpus=corpus.select(np.arange(19, -1, -1))) == 20
    encoder.register_buffer('mean', torch.zeros(1), persistent=False)
    assert cost() == 20
    encoder.mean += 1
    assert cost() == 20
    encoder.extra = torch.nn.GELU()
    assert cost() == 20
    assert cost() == 0


def test_cache_serves_two_encoders_side_by_side(tmp_path):
    corpus, encoders = corpus_of(20), [Toy(seed, .3) for seed in range(2)]
    want = [FeatureStore(o).images(corpus)['global_'] for o in encoders]
    assert np.abs(want[0] - want[1]).max() > .01
    for _ in range(2):
        for encoder, features in zip(encoders, want):
            np.testing.assert_array_equal(FeatureStore(encoder, tmp_path).images(corpus)['global_'], features)


def test_sources_without_a_hash_are_hashed_by_their_pixels(tmp_path):
    class Cache:
        def __init__(self, pixels): self.pixels = pixels
        def __len__(self): return len(self.pixels)
        def batch(self, rows): return self.pixels[rows][..., None]
    encoder, pixels = Toy(), corpus_of(300).pixels.copy()

    def cost():
        encoder.rows = 0
        FeatureStore(encoder, tmp_path).images(Cache(pixels))
        return encoder.rows
    assert (cost(), cost()) == (300, 0)
    pixels[299, 2, 2] ^= 1
    assert cost() == 300


def test_two_writers_write_the_same(tmp_path):
    corpus = corpus_of(200)
    want = FeatureStore(Toy(noise=.3)).images(corpus)['global_']
    def encode(i): return FeatureStore(Toy(noise=.3), tmp_path, chunk=7, batch_size=7).images(corpus)['global_']
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(encode, range(4)): np.testing.assert_allclose(found, want, atol=1e-6)
    assert not list(tmp_path.rglob('*.tmp'))


def test_damaged_chunk_is_named(tmp_path):
    store = FeatureStore(Toy(), tmp_path, chunk=8)
    store.images(corpus_of(20))
    path = sorted(tmp_path.rglob('*.safetensors'))[1]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=path.name): store.images(corpus_of(20))
    path.write_bytes((path.parent/'0000016-0000020.safetensors').read_bytes())
    with pytest.raises(DataError, match=f'{path.name}: expected 8 rows.*Delete'): store.images(corpus_of(20))
    path.unlink()
    want = FeatureStore(Toy()).images(corpus_of(20))['global_']
    np.testing.assert_array_equal(store.images(corpus_of(20))['global_'], want)


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from test_evaluation import FeatureStore, MANY, PROMPTS, Toy, corpus_of, zero_shot
encode = Toy.encode_image
def slowly(self, images):
    print('chunk', flush=True)
    time.sleep(.25)
    return encode(self, images)
Toy.encode_image = slowly
zero_shot(FeatureStore(Toy(), {folder!r}, chunk=16), corpus_of(160), MANY, PROMPTS)
"""


def test_killed_evaluation_resumes_and_agrees(tmp_path):
    code = SLOW.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=env) as process:
        for _ in range(4): assert process.stdout.readline() == 'chunk\n'
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob('image-*/*.safetensors'))) == 3
    encoder, fresh = Toy(), Toy()
    resumed = zero_shot(FeatureStore(encoder, tmp_path, chunk=16), corpus_of(160), MANY, PROMPTS)
    undisturbed = zero_shot(FeatureStore(fresh, chunk=16), corpus_of(160), MANY, PROMPTS)
    assert encoder.rows == fresh.rows - 3 * 16
    assert_same(resumed, undisturbed, 0)


def test_encoder_keeps_its_modes_even_after_an_error():
    encoder = Toy().train()
    encoder.frozen = torch.nn.Dropout().eval()
    with pytest.raises(DataError, match='sentences'): FeatureStore(encoder).images(corpus_of(4), ('sentences',))
    FeatureStore(encoder).images(corpus_of(4))
    assert encoder.training and not encoder.frozen.training and encoder.mix.requires_grad and torch.is_grad_enabled()


def test_pixels_come_from_caches_renderers_and_arrays():
    class Cache:
        def batch(self, rows): return np.full((len(rows), 4, 4, 3), 9, np.uint8)

    class Renderer:
        def images(self, rows): return np.asarray(rows, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    assert pixel_reader(Cache())(range(3)).shape == (3, 4, 4, 3)
    assert pixel_reader(Renderer())(range(2, 4))[:, 0, 0, 0].tolist() == [2, 3]
    for bad in (np.zeros((2, 3, 3), np.float32), np.zeros((3, 3), np.uint8), object()):
        with pytest.raises(DataError, match='holds no uint8 pixels'): pixel_reader(bad)


def test_encoder_hash_needs_something_to_hash(tmp_path):
    class Bare:
        def encode_image(self, images): return images.flatten(1).float()
    assert FeatureStore(Bare()).images(corpus_of(5))['pooled'].shape == (5, 9)
    with pytest.raises(TypeError, match='Bare is no torch module'): FeatureStore(Bare(), tmp_path).images(corpus_of(5))
    Bare.hash = lambda self: 'abc'
    assert encoder_hash(Bare()) == 'abc'
    assert FeatureStore(Bare(), tmp_path).images(corpus_of(5))['global_'].shape == (5, 9)


# Zero-shot

def late(image, text):
    "Average the mean over words of the best patch and the mean over patches of the best word, as FILIP does."
    s = np.einsum('npd,mtd->nmpt', image['patches'].astype(np.float64), text['words'].astype(np.float64))
    mask = text['word_mask'][None, :, None, :]
    to_text = np.where(mask, s, -np.inf).max(3).mean(2)
    return (to_text + np.where(mask[:, :, 0], s.max(2), 0).sum(2) / mask[:, :, 0].sum(2)) / 2


LATE = Scorer(('patches',), ('words', 'word_mask'), late)


def by_loops(encoder, corpus, texts_of_class, scorer):
    "Score every image with every class, one pair at a time."
    out = np.zeros((len(corpus), len(texts_of_class)))
    for i, c in itertools.product(range(len(corpus)), range(len(texts_of_class))):
        image = encoder.encode_image(torch.from_numpy(corpus.pixels[i][None, None]))
        texts = [encoder.encode_text([o]) for o in texts_of_class[c]]
        if scorer is LATE: out[i, c] = np.mean([late_pair(image.patches[0], o.words[0]) for o in texts])
        else:
            mean = torch.stack([o.global_[0] for o in texts]).mean(0)
            out[i, c] = float(image.global_[0] @ mean / mean.norm())
    return out


def late_pair(patches, words):
    s = [[float(p @ w) for w in words] for p in patches]
    return (np.mean([max(row) for row in s]) + np.mean([max(row[j] for row in s) for j in range(len(words))])) / 2


@pytest.mark.parametrize('scorer', [SCORERS['cosine'], LATE], ids=['cosine', 'late'])
def test_zero_shot_equals_loops(scorer):
    encoder, corpus = Toy(noise=.2), corpus_of(12)
    with torch.no_grad():
        positive = by_loops(encoder, corpus, [[f'image of {o}', f'{o} by a tube'] for o in WORDS[:4]], scorer)
        negative = by_loops(encoder, corpus, [[f'no {o} on image', f'no {o} by a tube'] for o in WORDS[:4]], scorer)
    prompts = PromptSet(('image of {c}', '{c} by a tube'), ('no {c} on image', 'no {c} by a tube'))
    found = zero_shot(encoder, corpus, MANY, prompts, scorer=scorer)
    np.testing.assert_allclose(stacked(found['scores']), positive - negative, atol=1e-6)
    alone = zero_shot(encoder, corpus, MANY, PromptSet(prompts.templates), scorer=scorer)
    np.testing.assert_allclose(stacked(alone['scores']), positive, atol=1e-6)
    one = zero_shot(encoder, corpus_of(12, one=True), ONE, PROMPTS, scorer=scorer)
    assert stacked(one['scores']).shape == (12, 4) and stacked(one['target']).shape == (12, 1)


@pytest.mark.parametrize('scorer', [SCORERS['cosine'], LATE], ids=['cosine', 'late'])
def test_zero_shot_is_a_function_of_the_image(scorer):
    "Neither batch, block, order, company nor the order of templates changes a score."
    encoder, corpus = Toy(noise=.2), corpus_of(90)
    whole = zero_shot(encoder, corpus, MANY, PROMPTS, scorer=scorer)
    rows = generator('some').permutation(90)[:30]
    part = zero_shot(FeatureStore(encoder, batch_size=1), corpus.select(rows), MANY, PROMPTS, scorer=scorer)
    np.testing.assert_allclose(stacked(part['scores']), stacked(whole['scores'])[rows], atol=1e-6)
    turned = PromptSet(PROMPTS.templates[::-1], PROMPTS.negatives[::-1])
    assert_same(zero_shot(encoder, corpus, MANY, turned, scorer=scorer), whole)
    store = FeatureStore(encoder)
    image, text = store.images(corpus, scorer.image), store.texts(list(WORDS), scorer.text)
    blocks = [class_scores(image, text, [0, 1, 2, 3, 4, 4, 4, 5, 6], scorer=scorer, chunk=o) for o in (1, 13, 90, 1000)]
    for block in blocks[1:]: np.testing.assert_allclose(block, blocks[0], atol=1e-12)


def test_zero_shot_auroc_survives_monotone_maps_and_a_perfect_model_is_perfect():
    corpus = corpus_of(300, noise=0)
    frame = zero_shot(Toy(), corpus, MANY, PROMPTS)
    scores, targets = stacked(frame['scores']), stacked(frame['target'])
    auroc = METRICS['macro_auroc'].function
    assert auroc(scores, targets) > .99
    for f in (np.exp, lambda s: s**3, lambda s: 100 * s - 7): assert auroc(f(scores), targets) == auroc(scores, targets)
    assert auroc(-scores, targets) == pytest.approx(1 - auroc(scores, targets))
    one = corpus_of(300, noise=0, one=True)
    frame = zero_shot(Toy(), one, ONE, PROMPTS)
    assert METRICS['balanced_accuracy'].function(stacked(frame['scores']), stacked(frame['target'])[:, 0]) == 1


def test_a_constant_model_scores_chance_everywhere(tmp_path):
    class Constant(Toy):
        def encode_image(self, images): return super().encode_image(torch.full_like(images, 200))
    one = corpus_of(300, one=True)
    frame = zero_shot(Constant(), one, ONE, PROMPTS)
    numbers = score(frame.assign(run='r'), resamples=200)
    assert numbers['finding/zeroshot/macro_auroc']['value'] == .5
    assert numbers['finding/zeroshot/balanced_accuracy']['value'] == pytest.approx(1 / 4)
    found = score(retrieval(Constant(), one, PAIRS).assign(run='r'), resamples=200)
    assert found['pairs/text_to_image/recall_at_10']['value'] < .1
    assert found['pairs/text_to_image/median_rank']['value'] > 250


def test_binary_zero_shot_reads_the_positive_class():
    corpus = corpus_of(200, noise=.3, classes=('mass', 'nodule'), one=True)
    tasks = [Task('t', 'binary', o) for o in (('mass', 'nodule'), ('nodule', 'mass'))]
    one, other = (zero_shot(Toy(), corpus, o, PROMPTS) for o in tasks)
    np.testing.assert_array_equal(stacked(one['scores']), stacked(other['scores'])[:, ::-1])
    np.testing.assert_array_equal(stacked(one['target']), 1 - stacked(other['target']))
    auroc = METRICS['auroc'].function
    area = [auroc(stacked(o['scores']), stacked(o['target'])) for o in (one, other)]
    assert area[0] == pytest.approx(area[1])


def test_unlabelled_rows_are_left_out_and_named_rows_refused():
    corpus = corpus_of(10, one=True)
    labels = list(corpus.frame['labels'])
    labels[4] = None
    some = Corpus(corpus.frame.assign(labels=labels), name='some', classes=corpus.classes, pixels=corpus.pixels)
    assert list(zero_shot(Toy(), some, ONE, PROMPTS)['id']) == [f'toy{i}' for i in range(10) if i != 4]
    none = Corpus(corpus.frame.assign(labels=[None] * 10), name='none', classes=corpus.classes, pixels=corpus.pixels)
    with pytest.raises(DataError, match='none: no row is labelled'): zero_shot(Toy(), none, ONE, PROMPTS)
    labels[2] = ()
    bad = Corpus(corpus.frame.assign(labels=labels), name='bad', classes=corpus.classes, pixels=corpus.pixels)
    with pytest.raises(DataError, match=r'bad, row toy2: 0 of the classes .* exactly one \(1 such rows'):
        labelled(bad, ONE)


# Probe

def rows_of(n, d, classes, name, signal=1.):
    rng = generator('test probe', name)
    y = rng.integers(classes, size=n)
    x = rng.normal(size=(n, d)) * np.logspace(0, 3, d)
    x[:, :classes] += signal * np.eye(classes)[y] * np.logspace(0, 3, d)[:classes]
    return x, y


@pytest.mark.parametrize('classes', [2, 4])
@pytest.mark.parametrize('penalty', [.3, .003])
def test_probe_is_scikit_learns(classes, penalty):
    (x, y), (x_test, y_test) = rows_of(300, 20, classes, 'train'), rows_of(100, 20, classes, 'test')
    probe = fit_probe(x, y, x_test, y_test, classes=classes, penalties=(penalty,))
    exact = LogisticRegression(C=1 / (penalty * 300), tol=1e-9, max_iter=10_000)
    oracle = make_pipeline(StandardScaler(), exact).fit(x, y)
    np.testing.assert_allclose(np.exp(probe.scores(x_test)), oracle.predict_proba(x_test), atol=5e-3)
    assert probe.loss(x_test, y_test) == pytest.approx(log_loss(y_test, oracle.predict_proba(x_test)), rel=5e-3)
    many = np.eye(classes, dtype=int)[y]
    probe = fit_probe(x, many, x_test, np.eye(classes, dtype=int)[y_test], classes=classes, penalties=(penalty,))
    for c in range(classes):
        want = oracle.fit(x, many[:, c]).decision_function(x_test)
        np.testing.assert_allclose(probe.scores(x_test)[:, c], want, atol=.05)
    losses = [log_loss(np.eye(classes)[y_test][:, c], expit(probe.scores(x_test)[:, c])) for c in range(classes)]
    assert probe.loss(x_test, np.eye(classes, dtype=int)[y_test]) == pytest.approx(sum(losses))


@pytest.mark.parametrize('multilabel', [False, True])
def test_walk_chooses_what_an_exhaustive_search_chooses(multilabel):
    (x, y), (x_valid, y_valid) = rows_of(200, 30, 3, 'train', .8), rows_of(150, 30, 3, 'valid', .8)
    if multilabel: y, y_valid = np.eye(3, dtype=int)[y], np.eye(3, dtype=int)[y_valid]
    probe = fit_probe(x, y, x_valid, y_valid, classes=3)
    losses = [fit_probe(x, y, x_valid, y_valid, classes=3, penalties=(o,)).loss(x_valid, y_valid) for o in PENALTIES]
    assert probe.penalty == PENALTIES[int(np.argmin(losses))]
    assert probe.loss(x_valid, y_valid) == min(o for _, o in probe.path)
    np.testing.assert_allclose([o for _, o in probe.path], losses[:len(probe.path)], rtol=5e-3)


def test_probe_reads_no_test_row_and_ignores_row_order():
    splits = {o: corpus_of(n, name=o, one=True, share=2) for o, n in (('train', 200), ('valid', 80), ('test', 90))}
    whole = linear_probe(Toy(), ONE, splits)
    half = linear_probe(Toy(), ONE, splits | {'test': splits['test'].select(np.arange(45))})
    np.testing.assert_allclose(stacked(half['scores']), stacked(whole['scores'])[:45], atol=1e-6)
    mixed = splits | {'train': splits['train'].select(generator('mix').permutation(200))}
    np.testing.assert_allclose(stacked(linear_probe(Toy(), ONE, mixed)['scores']), stacked(whole['scores']), atol=2e-2)
    again = linear_probe(Toy(), ONE, splits)
    np.testing.assert_array_equal(stacked(again['scores']), stacked(whole['scores']))


def test_validation_rows_split_off_share_no_patient():
    splits = {o: corpus_of(n, name=o, one=True, share=7) for o, n in (('train', 210), ('test', 60))}
    seen = set()
    for seed in range(5):
        rows = probe_rows(ONE, splits, lambda split, corpus: corpus.pixels.reshape(len(corpus), -1), seed=seed)
        assert not set(rows['train'].groups) & set(rows['valid'].groups)
        assert sorted([*rows['train'].ids, *rows['valid'].ids]) == sorted(splits['train'].frame['id'])
        assert .1 < len(rows['valid'].y) / 210 < .3
        seen.add(tuple(sorted(rows['valid'].ids)))
    assert len(seen) == 5
    with pytest.raises(DataError, match="stands in the splits 'train' and 'test'"):
        linear_probe(Toy(), ONE, {'train': splits['train'], 'test': splits['train']})


def test_probe_multilabel_beats_chance_and_reads_what_it_is_told():
    splits = {o: corpus_of(n, name=o) for o, n in (('train', 250), ('valid', 100), ('test', 150))}
    frame = linear_probe(Toy(), MANY, splits, output='global_')
    assert METRICS['macro_auroc'].function(stacked(frame['scores']), stacked(frame['target'])) > .8
    assert np.abs(stacked(frame['scores']) - stacked(linear_probe(Toy(), MANY, splits)['scores'])).max() > .01


# Retrieval

def rank_by_sorting(scores, positives):
    "Rank by sorting candidates, wrong ones first among equals: the definition, without any counting."
    ranks = []
    for q in range(len(scores)):
        right = {c for a, c in positives if a == q}
        order = sorted(range(scores.shape[1]), key=lambda c: (-scores[q, c], c in right))
        ranks.append(1 + sum(c not in right for c in order[:min(order.index(c) for c in right)]))
    return ranks


def ranks(scores, positives, **kwargs):
    n, m = scores.shape
    return best_ranks(lambda q, c: scores[q, c], positives, queries=n, candidates=m, **kwargs).tolist()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_ranks_equal_sorting(data):
    "Few distinct scores, so that most of them tie; any number of positives; any block size; any order."
    q, c = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    flat = st.lists(st.sampled_from([-.5, 0., .25, .5]), min_size=q * c, max_size=q * c)
    scores = np.array(data.draw(flat)).reshape(q, c)
    positives = [(i, j) for i in range(q) for j in data.draw(st.sets(st.integers(0, c - 1), min_size=1))]
    want = rank_by_sorting(scores, positives)
    assert ranks(scores, positives, chunk=data.draw(st.integers(1, 10))) == want
    order = np.array(data.draw(st.permutations(range(c))))
    moved = [(i, int(np.argsort(order)[j])) for i, j in positives]
    assert ranks(scores[:, order], moved[::-1]) == want
    assert max(want) <= c


def test_known_matrices():
    eye, first = np.eye(5), [(i, i) for i in range(5)]
    assert ranks(eye, first) == [1] * 5
    assert ranks(-eye, first) == [5] * 5
    assert ranks(np.zeros((5, 5)), first) == [5] * 5
    assert ranks(np.roll(eye, 1, 1) * 2 + eye, first) == [2] * 5
    both = first + [(i, (i + 1) % 5) for i in range(5)]
    assert ranks(np.roll(eye, 1, 1) * 2 + eye, both) == [1] * 5
    assert ranks(np.zeros((5, 5)), both) == [4] * 5
    near = np.array([[.5, .5 + TIE / 2, .5 - TIE / 2, .5 - 2 * TIE, .5 + 2 * TIE]])
    assert ranks(near, [(0, 0)]) == [4]
    with pytest.raises(ValueError, match='2 queries have no positive, first query 1'):
        ranks(eye, [(0, 0), (2, 1), (4, 4)])
    with pytest.raises(ValueError, match='queries 4–4, candidates 2–3: a score is NaN'):
        ranks(np.where(np.arange(25).reshape(5, 5) == 23, np.nan, eye), first, chunk=2)


def test_random_scores_give_chance_and_the_last_recall_is_one():
    n, m = 600, 50
    found = np.array([ranks(generator('luck', i).random((n, m)), [(q, q % m) for q in range(n)]) for i in range(5)])
    for k in (1, 5, 10, 25):
        assert (found <= k).mean() == pytest.approx(k / m, abs=4 * (k / m * (1 - k / m) / found.size)**.5)
    assert (found <= m).all()
    positives = [(q, c) for q in range(n) for c in range(1 + q % 4)]
    target = np.stack([np.bincount([q for q, _ in positives]), np.full(n, m)], 1)
    luck = np.array([ranks(generator('luck', 'several', i).random((n, m)), positives) for i in range(5)])
    for k in (1, 5, 10, 25): assert (luck <= k).mean() == pytest.approx(chance_recall(target, k), abs=.03)


def test_memory_does_not_grow_with_the_gallery():
    def peak(candidates):
        positives = [(q, q * 7 % candidates) for q in range(64)]
        score = lambda q, c: np.sin(np.arange(q.start, q.stop)[:, None] * 1.7 + np.arange(c.start, c.stop))
        tracemalloc.start()
        best_ranks(score, positives, queries=64, candidates=candidates, chunk=64)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size
    peak(64)
    assert peak(64 * 200) < 1.2 * peak(64 * 10)


@pytest.mark.parametrize('scorer', [SCORERS['cosine'], LATE], ids=['cosine', 'late'])
def test_retrieval_equals_loops(scorer):
    encoder, corpus = Toy(noise=.2), corpus_of(60)
    texts = list(dict.fromkeys(corpus.frame['text']))
    assert len(texts) < 60
    with torch.no_grad(): scores = by_loops(encoder, corpus, [[o] for o in texts], scorer)
    scores = scores.round(5)
    own = [(i, texts.index(o)) for i, o in enumerate(corpus.frame['text'])]
    found = by_id(retrieval(encoder, corpus, PAIRS, scorer=scorer, chunk=17))
    for i, rank in enumerate(rank_by_sorting(scores, own)):
        assert found['image_to_text', f'toy{i}'] == (1, len(texts), rank)
    for j, rank in enumerate(rank_by_sorting(scores.T, [(b, a) for a, b in own])):
        first = list(corpus.frame['text']).index(texts[j])
        assert found['text_to_image', f'toy{first}'] == (sum(b == j for _, b in own), 60, rank)


def test_retrieval_ignores_order_batch_and_block(tmp_path):
    encoder, corpus = Toy(noise=.2), corpus_of(150)
    want = retrieval(encoder, corpus, PAIRS)
    single, kept = FeatureStore(encoder, batch_size=1), FeatureStore(encoder, tmp_path, chunk=11)
    for store, chunk in ((single, 1024), (kept, 7), (encoder, 64)):
        assert_same(retrieval(store, corpus, PAIRS, chunk=chunk), want, 0)
    order = generator('order').permutation(150)
    mixed = retrieval(encoder, corpus.select(order), PAIRS)
    images = lambda frame: by_id(frame[frame['protocol'] == 'image_to_text'])
    assert images(mixed) == images(want)
    texts = lambda frame: sorted((*o.target, *o.scores) for o in frame.itertuples() if o.protocol == 'text_to_image')
    assert texts(mixed) == texts(want)


def test_same_text_and_same_file_are_one():
    frame = pd.DataFrame({'id': list('abcd'), 'image': [f'{i}.png' for i in (1, 1, 2, 3)], 'labels': [None] * 4,
                          'split': '', 'text': ['Nodule.', 'mass', ' nodule', 'edema'], 'group': '', 'modality': ''})
    pixels = np.full((4, 3, 3), 127, np.uint8)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 3)): pixels[i].flat[j] = 250
    found = by_id(retrieval(Toy(), Corpus(frame, name='files', root=Path('.')), PAIRS, images=pixels))
    assert {k: v[:2] for k, v in found.items()} == {
        ('image_to_text', 'a'): (2, 3), ('image_to_text', 'c'): (1, 3), ('image_to_text', 'd'): (1, 3),
        ('text_to_image', 'a'): (2, 3), ('text_to_image', 'b'): (1, 3), ('text_to_image', 'd'): (1, 3)}
    assert {v[2] for v in found.values()} == {1}


# Baselines, and numbers from the file alone

def test_shortcuts_are_reproducible_and_blind_ones_are_chance():
    splits = {o: corpus_of(n, name=o, one=True) for o, n in (('train', 200), ('valid', 80), ('test', 400))}
    frame = shortcuts(ONE, splits)
    assert list(dict.fromkeys(frame['protocol'])) == list(SHORTCUTS)
    assert_same(frame, shortcuts(ONE, splits), 0)
    parts = {k: v for k, v in frame.groupby('protocol')}
    majority = stacked(parts['majority']['scores'])
    share = splits['train'].targets().mean(0)
    np.testing.assert_allclose(majority, np.tile(share, (400, 1)), atol=1e-6)
    assert METRICS['macro_auroc'].function(majority, stacked(parts['majority']['target'])[:, 0]) == .5
    luck = [shortcuts(ONE, splits, names=['chance'], seed=o) for o in range(20)]
    areas = [METRICS['macro_auroc'].function(stacked(o['scores']), stacked(o['target'])[:, 0]) for o in luck]
    assert abs(np.mean(areas) - .5) < 4 * np.std(areas, ddof=1) / 20**.5 and len(set(areas)) == 20
    several = {o: corpus_of(n, name=o) for o, n in (('train', 200), ('valid', 50), ('test', 90))}
    many = shortcuts(MANY, several)
    assert stacked(many['scores']).shape == (4 * 90, 4)
    share = several['train'].targets().mean(0)
    np.testing.assert_allclose(stacked(many['scores'])[90:180], np.tile(share, (90, 1)), atol=1e-6)


def test_shortcut_views_do_not_depend_on_blocks():
    pixels = generator('views').integers(0, 256, (50, 40, 30, 3)).astype(np.uint8)
    whole = shortcut_views(pixels)
    for name, o in shortcut_views(pixels, chunk=7).items(): np.testing.assert_allclose(o, whole[name], rtol=1e-5)
    np.testing.assert_allclose(whole['mean_colour'], pixels.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(shortcut_views(pixels[:, :24, :24], side=24)['pixels'],
                               (pixels[:, :24, :24] @ np.array([.299, .587, .114])).reshape(50, -1), rtol=1e-4)


def test_random_initialisations_average_to_chance():
    class Random(Toy):
        def __init__(self, seed):
            super().__init__()
            self.mix = torch.nn.Parameter(torch.randn(9, 9))
            self.read = torch.nn.Parameter(torch.randn(9, 9))
        def encode_text(self, texts):
            found = super().encode_text(texts)
            return found._replace(global_=torch.nn.functional.normalize(found.pooled @ self.read, dim=-1))
    corpus = corpus_of(200)
    before = torch.get_rng_state()
    frame = untrained(Random, lambda o: zero_shot(o, corpus, MANY, PROMPTS), draws=30)
    assert torch.equal(before, torch.get_rng_state())
    auroc = METRICS['macro_auroc'].function
    areas = np.array([auroc(stacked(o['scores']), stacked(o['target'])) for _, o in frame.groupby('draw')])
    assert abs(areas.mean() - .5) < 3 * areas.std(ddof=1) / 30**.5
    assert areas.std() > .03
    torch.manual_seed(99)
    pd.testing.assert_frame_equal(frame[frame['draw'] < 3].reset_index(drop=True),
                                  untrained(Random, lambda o: zero_shot(o, corpus, MANY, PROMPTS), draws=3))


def test_every_number_comes_from_the_file(tmp_path):
    splits = {o: corpus_of(n, name=o) for o, n in (('train', 150), ('valid', 60), ('test', 100))}
    frames = [zero_shot(Toy(), splits['test'], MANY, PROMPTS, prompt_set='toy'), linear_probe(Toy(), MANY, splits),
              retrieval(Toy(), splits['test'], PAIRS), shortcuts(MANY, splits)]
    frame = concat_predictions(frames).assign(run='r')
    write_predictions(tmp_path/'p.parquet', frame)
    numbers = score(read_predictions(tmp_path/'p.parquet'), resamples=200)
    for key in ('findings/zeroshot/macro_auroc/toy', 'findings/probe/macro_auroc', 'pairs/image_to_text/recall_at_10'):
        entry = numbers[key]
        assert entry['low'] <= entry['value'] <= entry['high'] and entry['low'] > entry['chance']
    assert numbers['findings/majority/macro_auroc']['value'] == .5
    assert {o.split('/')[1] for o in numbers} == {'zeroshot', 'probe', 'image_to_text', 'text_to_image', *SHORTCUTS}


def test_dual_encoder_passes_through_every_protocol(tmp_path):
    from medcl_study.data.text import Tokenizer
    from medcl_study.encoders.dual import DualEncoder, EncoderConfig
    small = corpus_of(40)
    pixels = np.repeat(np.repeat(small.pixels, 11, 1), 11, 2)[:, :32, :32]
    big = Corpus(small.frame, name='big', classes=small.classes, pixels=pixels)
    tokenizer = Tokenizer.train(list(small.frame['text']), vocab_size=120, max_tokens=24)
    torch.manual_seed(0)
    config = EncoderConfig(image_tower='vit_tiny_p8', text_tower='bert_tiny', image_size=32, channels=1, dim=16,
                           vocab_size=tokenizer.vocab_size, max_tokens=24)
    encoder = DualEncoder(config, tokenizer=tokenizer).train()
    store = FeatureStore(encoder, tmp_path, batch_size=16, chunk=16)
    first, again = ([zero_shot(store, big, MANY, PROMPTS), retrieval(store, big, PAIRS),
                     zero_shot(store, big, MANY, PROMPTS, scorer=LATE)] for _ in range(2))
    for a, b in zip(first, again): assert_same(a, b, 0)
    assert encoder.training and np.abs(stacked(first[0]['scores']) - stacked(first[2]['scores'])).max() > 1e-3
    splits = {o: Corpus(big.frame.assign(group=o), name=o, classes=big.classes, pixels=pixels)
              for o in ('train', 'valid', 'test')}
    assert stacked(linear_probe(store, MANY, splits)['scores']).shape == (40, 4)
