"""Probes and neighbours against scikit-learn, loops, and everything that must not matter: batches, order, threads, company."""
import warnings
from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.special import expit, logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from medcl_study.core import DataError, generator
from medcl_study.data.budgets import DRAWS, budget_rows
from medcl_study.data.pairs import Corpus
from medcl_study.evaluation.features import FeatureStore, unit
from medcl_study.evaluation.logistic import Axes, logistic_path
from medcl_study.evaluation.neighbours import NEIGHBOURS, TIE, nearest_neighbours, neighbour_shares
from medcl_study.evaluation.probe import PENALTIES, RELEASED, fit_probe, fit_probes, linear_probe, linear_probes
from medcl_study.metrics import METRICS
from medcl_study.predictions import Task, score, stacked

pytestmark = pytest.mark.usefixtures('one_thread')
Encoded = namedtuple('Encoded', 'global_ pooled')
CLASSES = ('nodule', 'mass', 'edema')
ONE = Task('finding', 'multiclass', CLASSES, source='phantom')
MANY = Task('findings', 'multilabel', CLASSES, source='phantom')
READERS = {'probe': linear_probe, 'released': lambda *a, **k: linear_probe(*a, probe='released', **k), 'knn': nearest_neighbours}


class Passing:
    "Give the pixels around their mean, and normalised; count the rows."
    rows = 0

    def encode_image(self, images):
        self.rows += len(images)
        x = images.flatten(1).float() - 120
        return Encoded(torch.nn.functional.normalize(x, dim=1), x)


def corpus_of(name, n, *, several=False, signal=50, width=10):
    rng = generator('test probe', name, several)
    y = rng.random((n, 3)) < .4 if several else np.eye(3, dtype=bool)[rng.integers(3, size=n)]
    x = 120 + 30 * rng.normal(size=(n, width))
    x[:, :3] += signal * y
    frame = pd.DataFrame({'id': [f'{name}{i}' for i in range(n)], 'image': '', 'text': '', 'split': name, 'modality': '',
                          'group': [f'{name} patient {i // 2}' for i in range(n)],
                          'labels': [tuple(np.array(CLASSES)[o]) for o in y]})
    return Corpus(frame, name=name, classes=CLASSES, pixels=x.clip(0, 255).astype(np.uint8).reshape(n, 2, width // 2))


def splits_of(several=False, **options):
    return {o: corpus_of(o, n, several=several, **options) for o, n in (('train', 240), ('valid', 90), ('test', 110))}


def scores(frame): return stacked(frame.sort_values(['draw', 'id'])['scores'])


# The solver

def objective(x, y, fit):
    "Compute the objective from its formula, in float64, row by row."
    z = x @ fit.weight + fit.bias
    if y.ndim == 1: loss = np.mean([logsumexp(row) - row[c] for row, c in zip(z, y)])
    else: loss = np.mean([sum(np.logaddexp(0, (1 - 2 * c) * v) for v, c in zip(row, each)) for row, each in zip(z, y)])
    return loss + fit.penalty / 2 * (fit.weight**2).sum()


def exact(x, y, penalty):
    "Return scikit-learn's minimum, run to the end."
    columns, values = [y] if y.ndim == 1 else y.T, []
    for column in columns:
        model = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=100_000).fit(x, column)
        loss = -model.predict_log_proba(x)[np.arange(len(x)), column].mean()
        values.append(loss + penalty / 2 * (model.coef_**2).sum())
    return sum(values)


@settings(max_examples=25, deadline=None)
@given(st.integers(6, 120), st.integers(1, 40), st.integers(3, 5), st.sampled_from([3, .1, .001]), st.booleans(), st.integers(0, 99))
def test_minimum_is_the_minimum(n, d, classes, penalty, many, seed):
    "Few rows and many, features that repeat each other, one that never changes, steep spectra."
    rng = generator('solver', seed, n, d)
    x = rng.normal(size=(n, d)) * np.logspace(0, -2, d) + rng.normal(size=d)
    x = np.concatenate([x, x[:, :1], np.full((n, 1), 3.)], 1)
    y = np.arange(n) % classes if not many else np.stack([np.arange(n) % 2, rng.permutation(n) % 3 == 0], 1).astype(int)
    fit = next(logistic_path(Axes.of(x), y, [penalty]))
    assert fit.converged
    assert fit.objective.sum() == pytest.approx(objective(x, y, fit), rel=1e-6)
    assert objective(x, y, fit) <= exact(x, y, penalty) * (1 + 1e-6)


def test_stated_error_is_about_the_error():
    rng = generator('error')
    x = rng.normal(size=(400, 60)) * np.arange(1, 61)**-.75
    y = (x[:, :4] + .3 * rng.normal(size=(400, 4))).argmax(1)
    axes, low = Axes.of(x), exact(x, y, .001)
    for steps in (1, 2, 4):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            fit = next(logistic_path(axes, y, [.001], steps=steps))
        true = fit.objective[0] / low - 1
        assert not fit.converged and 'penalty 0.001 stopped after' in str(heard[0].message)
        assert true / 5 < fit.error[0] < true * 5


@pytest.mark.parametrize('case', ['separable', 'huge', 'tiny', 'shifted'])
def test_hard_features_end_and_say_how(case):
    rng = generator('hard')
    y = np.arange(300) % 3
    x = rng.normal(size=(300, 20)) + 4 * np.eye(20)[y]
    x = {'separable': x + 20 * np.eye(20)[y], 'huge': 1e6 * x, 'tiny': 1e-6 * x, 'shifted': x + 1e4}[case]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        fits = list(logistic_path(Axes.of(x), y, (1, 1e-2, 1e-4, 1e-6)))
    said = [str(o.message) for o in heard]
    assert len(said) == sum(not o.converged for o in fits)
    assert all(f'penalty {o.penalty:g} ' in ' '.join(said) for o in fits if not o.converged)
    assert all(o.converged for o in fits) or case == 'huge'
    assert all(o.steps < 2000 and np.isfinite(o.weight).all() for o in fits)
    assert all(a.objective[0] >= b.objective[0] for a, b in zip(fits, fits[1:]))


def test_walk_does_not_depend_on_where_it_began():
    rng = generator('walk')
    x, y = rng.normal(size=(200, 30)), rng.integers(3, size=200)
    axes = Axes.of(x)
    for fit in logistic_path(axes, y, PENALTIES):
        alone = next(logistic_path(axes, y, [fit.penalty]))
        np.testing.assert_allclose(fit.objective, alone.objective, rtol=1e-7)
    for order in ((.1, .1, .01), (.001, 1), (.1, .01, .1, .001)):
        for fit in logistic_path(axes, y, order):
            np.testing.assert_allclose(fit.objective, next(logistic_path(axes, y, [fit.penalty])).objective, rtol=1e-7)


def test_no_labels_that_vary_and_collapsed_features():
    rng = generator('collapsed')
    x, y = rng.normal(size=(50, 6)), np.arange(50) % 2
    never = fit_probe(x, np.zeros((50, 2), int), x, np.zeros((50, 2), int), classes=2)
    np.testing.assert_allclose(expit(never.scores(x)), .5 / 51)
    same = fit_probe(np.ones((50, 6)), y, np.ones((9, 6)), y[:9], classes=2)
    np.testing.assert_allclose(np.exp(same.scores(x)), .5, atol=1e-6)
    with pytest.raises(DataError, match='row 3: a feature is NaN or infinite'):
        fit_probe(np.where(np.arange(50)[:, None] == 2, np.inf, x), y, x, y, classes=2)


# Many tasks on the same features

def test_tasks_do_not_hear_of_each_other():
    rng = generator('company')
    x, x_valid = rng.normal(size=(300, 25)), rng.normal(size=(120, 25))
    three, three_valid = ((o[:, :3] + rng.normal(size=(len(o), 3))).argmax(1) for o in (x, x_valid))
    many, many_valid = ((o[:, :14] + 3 * rng.normal(size=(len(o), 14)) > 2).astype(int) for o in (x, x_valid))
    ys, ys_valid = [three, *many.T, many], [three_valid, *many_valid.T, many_valid]
    sizes = [3, *[2] * 14, 14]
    together = fit_probes(x, ys, x_valid, ys_valid, classes=sizes)
    for o, y, y_valid, k in zip(together, ys, ys_valid, sizes):
        alone = fit_probe(x, y, x_valid, y_valid, classes=k)
        assert (o.penalty, [p for p, _ in o.path]) == (alone.penalty, [p for p, _ in alone.path])
        np.testing.assert_allclose(o.scores(x_valid), alone.scores(x_valid), atol=5e-3)
    assert len({o.penalty for o in together}) > 1


def test_features_are_extracted_once_for_tasks_and_draws():
    splits, encoder = splits_of(several=True), Passing()
    tasks = [Task(o, 'multilabel', (o,), source='phantom') for o in CLASSES] + [MANY]
    frame = linear_probes(encoder, tasks, splits, labels='0.2')
    assert encoder.rows == 240 + 90 + 110
    assert frame.groupby(['task', 'draw']).size().eq(110).all() and frame['draw'].nunique() == DRAWS
    alone = linear_probe(Passing(), tasks[1], splits, labels='0.2')
    np.testing.assert_allclose(scores(frame[frame['task'] == 'mass']), scores(alone), atol=5e-3)


# Few labels

@pytest.mark.parametrize('reader', READERS.values(), ids=READERS)
@pytest.mark.parametrize('labels', ['0.1', '4shot'])
def test_budget_is_what_is_left_after_cutting_by_hand(reader, labels):
    splits = splits_of()
    frame = reader(Passing(), ONE, splits, labels=labels, draws=3)
    assert frame['protocol'].unique().tolist() == [f'{frame["protocol"][0].split("@")[0]}@{labels}']
    for draw, rows in frame.groupby('draw'):
        cut = {o: splits[o].select(budget_rows(splits[o], labels, draw=draw)) for o in ('train', 'valid')}
        np.testing.assert_array_equal(scores(rows), scores(reader(Passing(), ONE, splits | cut)))
    spread = [scores(rows) for _, rows in frame.groupby('draw')]
    assert np.abs(spread[0] - spread[1]).max() > .01
    np.testing.assert_array_equal(scores(reader(Passing(), ONE, splits, labels=labels, draws=2)), np.concatenate(spread[:2]))


def test_more_labels_help_and_no_labels_more_than_there_are():
    splits = splits_of(signal=40)
    value = {o: score(linear_probe(Passing(), ONE, splits, labels=o).assign(run='r'), resamples=50) for o in ('1shot', '16shot')}
    low, high = (value[o][f'finding/probe@{o}/macro_auroc']['value'] for o in value)
    assert low < high - .03
    whole = linear_probe(Passing(), ONE, splits, labels='1')
    assert whole['protocol'][0] == 'probe'
    np.testing.assert_array_equal(scores(whole), scores(linear_probe(Passing(), ONE, splits)))
    with pytest.raises(DataError, match='no budget of labels'): linear_probe(Passing(), ONE, splits, labels='some')


# The released recipe

@pytest.mark.parametrize('task', [ONE, MANY], ids=['exclusive', 'several'])
def test_released_recipe_is_its_loop(task):
    splits = splits_of(several=task is MANY)
    found = scores(linear_probe(Passing(), task, {o: splits[o] for o in ('train', 'test')}, probe='released'))
    x, test = (torch.tensor(unit(splits[o].pixels.reshape(-1, 10) - 120.)).float() for o in ('train', 'test'))
    y = torch.tensor(splits['train'].targets())
    with torch.random.fork_rng():
        torch.manual_seed(RELEASED['seed'])
        layer = torch.nn.Linear(10, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=.1, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40 * 4)
        loss = torch.nn.BCEWithLogitsLoss() if task is MANY else torch.nn.CrossEntropyLoss()
        for epoch in range(40):
            for rows in torch.randperm(240).split(64):
                optimizer.zero_grad()
                loss(layer(x[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0, abs=1e-9)
    with torch.no_grad(): want = layer(test) if task is MANY else layer(test).log_softmax(1)
    order = np.argsort(splits['test'].frame['id'].to_numpy())
    np.testing.assert_allclose(found, want.numpy()[order], atol=1e-3)


# Neighbours

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_neighbours_equal_loops(data):
    "Points of a small lattice, so that most cosines tie; any block, any order."
    n, m = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    point = st.tuples(*[st.integers(-1, 1)] * 3).filter(any)
    x, queries = (np.array(data.draw(st.lists(point, min_size=o, max_size=o)), float) for o in (n, m))
    y = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    k, temperature = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([None, .07, 1.]))
    want = np.zeros((m, 3))
    for q, query in enumerate(queries):
        cosine = [float(o @ query / np.linalg.norm(o) / np.linalg.norm(query)) for o in x]
        edge = sorted(cosine)[::-1][min(k, n) - 1]
        near, tied = [i for i in range(n) if cosine[i] > edge + TIE], [i for i in range(n) if abs(cosine[i] - edge) <= TIE]
        for i in near + tied:
            seat = 1 if i in near else (min(k, n) - len(near)) / len(tied)
            want[q, y[i]] += seat * (np.exp(cosine[i] / temperature) if temperature else 1)
    options = dict(neighbours=(k,), temperature=temperature)
    found = neighbour_shares(x, np.eye(3)[y], queries, **options, chunk=data.draw(st.integers(1, 5)))[0]
    np.testing.assert_allclose(found, want / want.sum(1, keepdims=True), atol=1e-9)
    order = np.array(data.draw(st.permutations(range(n))))
    np.testing.assert_allclose(neighbour_shares(x[order], np.eye(3)[y[order]], queries, **options)[0], found, atol=1e-9)


def test_neighbours_are_scikit_learns():
    rng = generator('oracle', 1)
    x, y, queries = rng.normal(size=(250, 12)), (rng.random((250, 4)) < .3).astype(int), rng.normal(size=(60, 12))
    for k, share in zip((1, 5, 20), neighbour_shares(x, y, queries, neighbours=(1, 5, 20), temperature=None)):
        oracle = KNeighborsClassifier(k, metric='cosine', algorithm='brute').fit(x, y).predict_proba(queries)
        np.testing.assert_allclose(share, np.stack([o[:, 1] for o in oracle], 1), atol=1e-9)
        weighted = KNeighborsClassifier(k, metric='cosine', algorithm='brute', weights=lambda d: np.exp((1 - d) / .07))
        want = np.stack([o[:, 1] for o in weighted.fit(x, y).predict_proba(queries)], 1)
        np.testing.assert_allclose(neighbour_shares(x, y, queries, neighbours=(k,))[0], want, atol=1e-9)


def test_neighbours_of_the_collapsed_and_of_few():
    splits = splits_of()
    class Same(Passing):
        def encode_image(self, images): return torch.ones(len(images), 4)
    often = np.bincount(splits['train'].targets().argmax(1)) / 240
    found = np.exp(scores(nearest_neighbours(Same(), ONE, splits)))
    np.testing.assert_allclose(found, np.tile(often, (110, 1)), atol=5e-3)
    few = {**splits, 'train': splits['train'].select(range(3))}
    assert np.isfinite(scores(nearest_neighbours(Passing(), ONE, few))).all() and 3 < NEIGHBOURS[1]
    with pytest.raises(DataError, match='no training row'): neighbour_shares(np.zeros((0, 3)), np.zeros((0, 2)), np.ones((1, 3)))


def test_geometry_that_no_line_separates():
    "A probe is at chance on a ring of alternating classes; neighbours are not."
    rng = generator('ring')
    def ring(n):
        angle = 2 * np.pi * rng.random(n)
        return np.stack([np.cos(angle), np.sin(angle)], 1), (angle * 5 / np.pi).astype(int) % 2
    (x, y), (x_test, y_test) = ring(400), ring(300)
    probe = fit_probe(x, y, x_test, y_test, classes=2).scores(x_test)
    votes = neighbour_shares(x, np.eye(2)[y], x_test, neighbours=(5,))[0]
    assert METRICS['auroc'].function(votes, y_test) > .95 > .6 > METRICS['auroc'].function(probe, y_test)


# What no score may depend on

@pytest.mark.parametrize('task', [ONE, MANY], ids=['exclusive', 'several'])
@pytest.mark.parametrize('reader', READERS.values(), ids=READERS)
def test_scores_ignore_batches_order_and_threads(reader, task, tmp_path):
    splits = splits_of(several=task is MANY)
    want = reader(FeatureStore(Passing()), task, splits)
    assert np.isfinite(scores(want)).all()
    for batch_size, chunk in ((1, 1024), (7, 50)):
        store = FeatureStore(Passing(), batch_size=batch_size, chunk=chunk)
        np.testing.assert_allclose(scores(reader(store, task, splits)), scores(want), atol=1e-3)
    order = generator('order').permutation(110)
    mixed = reader(Passing(), task, splits | {'test': splits['test'].select(order)})
    np.testing.assert_allclose(scores(mixed), scores(want), atol=1e-6)
    half = reader(Passing(), task, splits | {'test': splits['test'].select(range(55))})
    np.testing.assert_allclose(stacked(half['scores']), stacked(want['scores'])[:55], atol=1e-6)
    torch.set_num_threads(2)
    np.testing.assert_allclose(scores(reader(Passing(), task, splits)), scores(want), atol=1e-3)
    torch.set_num_threads(1)
    if reader is READERS['released']: return # whose batches follow the order of its rows
    turned = splits | {'train': splits['train'].select(generator('train').permutation(240))}
    np.testing.assert_allclose(scores(reader(Passing(), task, turned)), scores(want), atol=5e-3)


@pytest.mark.parametrize('reader', READERS.values(), ids=READERS)
def test_shuffled_labels_are_chance(reader):
    splits = splits_of()
    truth = splits['train'].frame
    shuffled = truth.assign(labels=truth['labels'].to_numpy()[generator('shuffle').permutation(240)])
    train = Corpus(shuffled, name='train', classes=CLASSES, pixels=splits['train'].pixels)
    area = METRICS['macro_auroc'].function
    good, bad = (reader(Passing(), ONE, o) for o in (splits, splits | {'train': train}))
    right, luck = (area(stacked(o['scores']), stacked(o['target'])[:, 0]) for o in (good, bad))
    assert right > .85 and abs(luck - .5) < .15


def test_unknown_probe():
    with pytest.raises(ValueError, match="no probe 'best'"): linear_probe(Passing(), ONE, splits_of(), probe='best')
