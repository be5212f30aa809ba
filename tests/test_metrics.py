"Every metric against scikit-learn or an explicit loop; invariances; refusals."
import math
import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import retrieval_hit_rate

from medcl_study.metrics import (METRICS, Undefined, accuracy, auprc, auroc, balanced_accuracy, chance_recall, class_auroc,
                                 enough_positives, macro_auprc, macro_auroc, macro_f1, median_rank, one_hot, recall_at_k)


def multiclass(seed, n=120, k=4, ties=False):
    "Scores with some signal, and targets that hold every class at least five times."
    rng = np.random.default_rng(seed)
    y = np.r_[np.repeat(np.arange(k), 5), rng.choice(k, n - 5 * k, p=np.arange(1, k + 1) / (k * (k + 1) / 2))]
    x = rng.normal(size=(n, k)) + np.eye(k)[y]
    return (np.round(x) if ties else x), y, rng.integers(0, 4, n).astype(float)


seeds = st.integers(0, 2**31)


@given(seeds, st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_decisions_equal_scikit_learn(seed, ties, weighted):
    x, y, w = multiclass(seed, ties=ties)
    w = w if weighted else None
    said = x.argmax(1)
    present = np.unique(y if w is None else y[w > 0])
    assert accuracy(x, y, weights=w) == pytest.approx(oracle.accuracy_score(y, said, sample_weight=w), abs=1e-12)
    recalls = oracle.recall_score(y, said, sample_weight=w, average=None, labels=present, zero_division=0)
    assert balanced_accuracy(x, y, weights=w) == pytest.approx(recalls.mean(), abs=1e-12)
    f1 = oracle.f1_score(y, said, sample_weight=w, average=None, labels=np.arange(4), zero_division=np.nan)
    assert macro_f1(x, y, weights=w) == pytest.approx(np.nanmean(f1), abs=1e-12)


@given(seeds, st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_order_metrics_equal_scikit_learn(seed, ties, weighted):
    x, y, w = multiclass(seed, ties=ties)
    w = w + 1 if weighted else None
    truth = np.eye(4)[y]
    areas = [oracle.roc_auc_score(truth[:, c], x[:, c], sample_weight=w) for c in range(4)]
    precisions = [oracle.average_precision_score(truth[:, c], x[:, c], sample_weight=w) for c in range(4)]
    np.testing.assert_allclose(class_auroc(x, y, weights=w), areas, atol=1e-12)
    assert macro_auroc(x, y, weights=w) == pytest.approx(np.mean(areas), abs=1e-12)
    assert macro_auprc(x, y, weights=w) == pytest.approx(np.mean(precisions), abs=1e-12)
    assert auroc(x[:, 1], truth[:, 1], weights=w) == pytest.approx(areas[1], abs=1e-12)
    assert auprc(x[:, 1], truth[:, 1], weights=w) == pytest.approx(precisions[1], abs=1e-12)


def test_auroc_equals_the_double_loop():
    x, y, w = multiclass(1, ties=True)
    positive, s, top, bottom = y == 2, x[:, 2], 0., 0.
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive):
            top += w[i] * w[j] * ((s[i] > s[j]) + .5 * (s[i] == s[j]))
            bottom += w[i] * w[j]
    assert auroc(s, positive.astype(int), weights=w) == pytest.approx(top / bottom, abs=1e-12)


def test_multilabel_equals_scikit_learn():
    rng = np.random.default_rng(0)
    y = rng.random((200, 5)) < [.5, .3, .2, .1, .1]
    x = rng.normal(size=y.shape) + y
    assert macro_auroc(x, y) == pytest.approx(oracle.roc_auc_score(y, x, average='macro'), abs=1e-12)
    assert macro_auprc(x, y) == pytest.approx(oracle.average_precision_score(y, x, average='macro'), abs=1e-12)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_a_weight_is_a_count(seed):
    x, y, w = multiclass(seed)
    rows = np.repeat(np.arange(len(y)), w.astype(int))
    ranks = np.random.default_rng(seed).integers(1, 30, len(y)).astype(float)
    counts = np.tile([1, 30], (len(y), 1))
    cases = [(METRICS[o].function, x, y) for o in ('accuracy', 'macro_auroc', 'macro_auprc')]
    cases += [(METRICS[o].function, ranks, counts) for o in ('recall_at_5', 'median_rank')]
    for metric, scores, targets in cases:
        once = metric(scores, targets, weights=np.stack([w, np.ones_like(w), w]))
        plain = metric(scores[rows], targets[rows], **({'least': 1} if metric in (macro_auroc, macro_auprc) else {}))
        assert once[0] == pytest.approx(plain, abs=1e-12) and once[2] == once[0]
        assert once[1] == pytest.approx(metric(scores, targets), abs=1e-12)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_order_of_samples_and_monotone_maps_do_not_matter(seed):
    x, y, _ = multiclass(seed)
    p = np.random.default_rng(seed).permutation(len(y))
    for metric in (accuracy, balanced_accuracy, macro_f1, macro_auroc, macro_auprc):
        assert metric(x[p], y[p]) == pytest.approx(metric(x, y), abs=1e-12)
    for f in (np.arctan, lambda o: o**3, lambda o: 1e4 * o - 3):
        assert macro_auroc(f(x), y) == macro_auroc(x, y)
        assert macro_auprc(f(x), y) == macro_auprc(x, y)
        assert accuracy(f(x), y) == accuracy(x, y)


@pytest.mark.parametrize('case', ['constant scores', 'a class absent', 'single sample', 'ties', 'one right answer'])
def test_odd_cases_equal_scikit_learn(case):
    x, y, _ = multiclass(3, ties=case == 'ties')
    if case == 'constant scores': x = np.tile(x[:1], (len(x), 1))
    if case == 'a class absent': y = np.where(y == 3, 0, y)
    if case == 'single sample': x, y = x[:1], y[:1]
    if case == 'one right answer': x = -np.eye(4)[y]; x[7] *= -1
    said, present = x.argmax(1), np.unique(y)
    assert accuracy(x, y) == pytest.approx(oracle.accuracy_score(y, said), abs=1e-12)
    if case == 'single sample':
        for metric in (balanced_accuracy, macro_f1, macro_auroc, macro_auprc):
            with pytest.raises(Undefined, match='n = 1'): metric(x, y)
        return
    assert balanced_accuracy(x, y) == pytest.approx(oracle.balanced_accuracy_score(y, said), abs=1e-12)
    f1 = oracle.f1_score(y, said, average=None, labels=present, zero_division=0)
    assert macro_f1(x, y) == pytest.approx(f1.mean(), abs=1e-12)
    areas = [oracle.roc_auc_score(y == c, x[:, c]) for c in present]
    assert macro_auroc(x, y) == pytest.approx(np.mean(areas), abs=1e-12)
    assert macro_auprc(x, y) == pytest.approx(np.mean([oracle.average_precision_score(y == c, x[:, c]) for c in present]), abs=1e-12)


def test_recall_equals_torchmetrics_on_similarities():
    "From a matrix of similarities with several positives per query to ranks, and from ranks to hits."
    rng = np.random.default_rng(0)
    similarity, relevant = rng.normal(size=(60, 40)), rng.random((60, 40)) < .06
    relevant[~relevant.any(1), 0] = True
    best = np.where(relevant, similarity, -np.inf).max(1, keepdims=True)
    ranks = 1 + (~relevant & (similarity >= best)).sum(1, keepdims=True)
    counts = np.stack([relevant.sum(1), np.full(60, 40)], 1)
    for k in (1, 5, 10):
        hits = [float(retrieval_hit_rate(torch.tensor(s), torch.tensor(r), top_k=k)) for s, r in zip(similarity, relevant)]
        assert recall_at_k(ranks, counts, k=k) == pytest.approx(np.mean(hits), abs=1e-6)


def test_large_logits_keep_their_order():
    "A sigmoid of 100 · cosine saturates and gave AUROC .5 in released code; raw scores do not."
    rng = np.random.default_rng(0)
    y = rng.random(300) < .5
    x = (1000 + 100 * rng.normal(size=300) + 100 * y).astype(np.float32)
    assert auroc(x, y.astype(int)) == pytest.approx(oracle.roc_auc_score(y, x), abs=1e-12) and auroc(x, y.astype(int)) > .7


def test_rare_classes_are_left_out():
    y = np.r_[np.zeros(50, int), np.ones(30, int), np.full(4, 2)]
    x = np.random.default_rng(0).normal(size=(84, 3)) + np.eye(3)[y]
    assert enough_positives(y, 3).tolist() == [True, True, False]
    assert np.isnan(class_auroc(x, y)[2]) and np.isfinite(class_auroc(x, y)[:2]).all()
    assert macro_auroc(x, y) == pytest.approx(np.mean([oracle.roc_auc_score(y == c, x[:, c]) for c in (0, 1)]))
    assert macro_auroc(x, y, least=4) == pytest.approx(
        np.mean([oracle.roc_auc_score(y == c, x[:, c]) for c in (0, 1, 2)]))
    with pytest.raises(ValueError, match='no class has 5 positives'): macro_auroc(x[-4:], y[-4:])


@pytest.mark.parametrize('k', [2, 3, 7])
def test_constant_predictor_has_balanced_accuracy_one_over_k(k):
    y = np.repeat(np.arange(k), 5 + 10 * np.arange(k))
    for c in range(k):
        constant = np.tile(np.eye(k)[c], (len(y), 1))
        assert balanced_accuracy(constant, y) == pytest.approx(1 / k)
        if k == 2: assert auroc(constant, y) == .5


def test_a_resample_without_a_class_leaves_that_class_out():
    x, y, _ = multiclass(3)
    w = np.stack([np.ones(len(y)), (y != 3).astype(float), (y == 3).astype(float)])
    values = macro_auroc(x, y, weights=w)
    areas = [oracle.roc_auc_score(y[y != 3] == c, x[y != 3, c]) for c in range(3)]
    assert values[1] == pytest.approx(np.mean(areas)) and np.isnan(values[2])
    assert balanced_accuracy(x, y, weights=w)[2] == pytest.approx((x.argmax(1) == y)[y == 3].mean())


def test_recall_and_median_rank_equal_loops():
    rng = np.random.default_rng(0)
    ranks, counts = rng.integers(1, 101, 77).astype(float), np.tile([1, 100], (77, 1))
    for k in (1, 5, 10, 50):
        assert recall_at_k(ranks, counts, k=k) == pytest.approx(sum(r <= k for r in ranks) / 77)
    assert median_rank(ranks, counts) == np.median(ranks)
    assert median_rank(ranks[:76], counts[:76]) == np.median(ranks[:76])
    with pytest.raises(ValueError, match='count from 1'): median_rank(ranks - 1, counts)


@given(st.integers(1, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_chance_recall_equals_binomials(candidates, data):
    positives, k = data.draw(st.integers(1, candidates)), data.draw(st.integers(1, candidates + 5))
    exact = 1 - math.comb(candidates - positives, min(k, candidates)) / math.comb(candidates, min(k, candidates))
    assert chance_recall([[positives, candidates]], k) == pytest.approx(exact, abs=1e-9)


def example(kind, *, n=120, seed=0):
    "Scores with some signal and targets of a kind of task."
    rng = np.random.default_rng(seed)
    if kind in ('binary', 'multiclass'):
        y = rng.permutation(np.arange(n) % (2 if kind == 'binary' else 6))
        return rng.normal(size=(n, y.max() + 1)) + np.eye(y.max() + 1)[y], y
    if kind == 'multilabel':
        y = rng.random((n, 4)) < .3
        return rng.normal(size=y.shape) + y, y.astype(int)
    if kind == 'retrieval': return rng.integers(1, 300, (n, 1)).astype(float), np.tile([2, 300], (n, 1))
    if kind == 'grounding':
        y = np.stack([np.arange(n) % 3, np.full(n, 5), np.full(n, 49)], 1)
        return np.stack([rng.integers(0, 2, n), rng.normal(size=n), rng.random(n)], 1), y
    if kind == 'vqa': return np.stack([rng.integers(0, 4, n), rng.random(n)], 1), rng.integers([-1, 0], [4, 2], (n, 2))
    if kind == 'segmentation':
        common, more, missed = rng.integers(0, 90, (3, n)) * (rng.random((3, n)) < .7)
        y = np.stack([np.arange(n) % 2, common + missed, np.full(n, 1024)], 1)
        return np.stack([common, common + more, rng.random(n) * 9 * (common + more + missed > 0)], 1), y
    return boxes(rng, n)


def boxes(rng, n):
    scores, targets = [], []
    for _ in range(n):
        corner = rng.integers(0, 7000, (rng.integers(0, 4), 2))
        true = np.c_[rng.integers(0, 2, len(corner)), corner, corner + 2000]
        near = np.c_[true[:, 0], rng.random(len(true)), true[:, 1:] + rng.integers(0, 900, (len(true), 1))]
        stray = np.c_[rng.integers(0, 2, 3), rng.random(3), rng.integers(0, 500, (3, 2)), rng.integers(500, 9000, (3, 2))]
        scores.append(np.r_[near, stray]); targets.append(true)
    return scores, targets


def taken(rows, which): return [rows[i] for i in which] if isinstance(rows, list) else rows[which]


every_row = pytest.mark.parametrize('name, kind', [(name, kind) for name, row in METRICS.items() for kind in row.kinds])


@every_row
def test_every_metric_ignores_order_and_counts_weights(name, kind):
    "Weights of many resamples at once equal one call each and equal rows written out; groups are drawn as one."
    row, (x, y), rng = METRICS[name], example(kind), np.random.default_rng(5)
    shuffled = rng.permutation(120)
    assert row.function(taken(x, shuffled), taken(y, shuffled)) == pytest.approx(row.function(x, y), abs=1e-12)
    group = np.arange(120) // 3
    counts = rng.multinomial(40, np.full(40, 1 / 40), 12)[:, group]
    at_once = row.statistic(x, y)(counts)
    assert at_once.shape == (12,) and row.statistic(x, y)(None) == pytest.approx(row.function(x, y), abs=1e-12)
    for w, value in zip(counts, at_once):
        members = np.concatenate([np.flatnonzero(group == g) for g in group[::3] for _ in range(w[3 * g])])
        assert value == pytest.approx(row.function(x, y, weights=w), abs=1e-12)
        more = {'least': 1} if row.macro else {}  # which classes are frequent enough is a matter of the whole set
        assert value == pytest.approx(row.function(taken(x, members), taken(y, members), **more), abs=1e-12)
        assert row.function(x, y, weights=w * 2.5) == pytest.approx(value, abs=1e-9)


@every_row
def test_every_metric_stays_within_its_bounds_and_chance_is_a_number_or_nothing(name, kind):
    row, (x, y) = METRICS[name], example(kind)
    values = row.statistic(x, y)(np.random.default_rng(0).multinomial(120, np.full(120, 1 / 120), 50))
    assert (values >= row.bounds[0]).all() and (values <= row.bounds[1]).all()
    chance = row.chance(y, {'binary': 2, 'multiclass': 6, 'multilabel': 4}.get(kind, 4))
    assert chance is None or row.bounds[0] <= chance <= row.bounds[1]


@every_row
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_not_a_number_is_refused(name, kind, bad):
    x, y = example(kind)
    METRICS[name].function(x, y)
    x[3][0] = bad
    with pytest.raises(ValueError, match='first in row 4'): METRICS[name].function(x, y)


@every_row
def test_unequal_lengths_are_refused(name, kind):
    x, y = example(kind)
    with pytest.raises(ValueError, match='do not match'): METRICS[name].function(x, y[:-1])
    with pytest.raises(ValueError, match='do not match'): METRICS[name].function(x, y, weights=np.ones(7))


def test_shapes_and_targets_are_checked():
    x, y, _ = multiclass(0)
    with pytest.raises(ValueError, match='do not match'): accuracy(x, y[:-1])
    with pytest.raises(ValueError, match='do not match'): accuracy(x, y, weights=np.ones(3))
    with pytest.raises(ValueError, match='not 4 classes'): macro_auroc(x, y + 1)
    with pytest.raises(ValueError, match='of one class'): auroc(x[:, 0], np.ones(len(x), int))
    assert one_hot(np.array([[1, 0]]), 2).tolist() == [[True, False]]


def test_chance_holds_for_a_random_order():
    rng, reps = np.random.default_rng(1), 400
    y = rng.choice(3, 300, p=[.6, .3, .1])
    for name in ('macro_auroc', 'macro_auprc', 'balanced_accuracy'):
        values = [METRICS[name].function(rng.normal(size=(300, 3)), y) for _ in range(reps)]
        assert np.mean(values) == pytest.approx(METRICS[name].chance(y, 3), abs=.012)
    counts = np.repeat([[1, 40], [4, 40]], 100, axis=0)
    ranks = np.stack([[rng.permutation(40)[:p].min() + 1 for p, _ in counts] for _ in range(40)])
    assert np.mean([median_rank(r, counts) for r in ranks]) == pytest.approx(METRICS['median_rank'].chance(counts, 0), abs=1.2)


def test_metrics_and_stats_need_numpy_and_scipy_only():
    heavy = "{'torch', 'pandas', 'sklearn', 'matplotlib', 'fastai'}"
    code = f'import sys, medcl_study.metrics, medcl_study.stats; assert not {heavy} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)
