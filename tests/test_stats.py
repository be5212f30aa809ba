"Resampling against explicit loops and scipy; intervals against closed forms; coverage by simulation (slow)."
import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from medcl_study.metrics import auroc, balanced_accuracy, macro_auroc
from medcl_study.stats import (Resamples, acceleration, bca_interval, estimate, mean_over_seeds, paired_difference,
                               percentile_interval, critical_difference, holm, replicate, resample, seed_variance, standard_error,
                               t_interval, wilson_interval)


def mean_of(x): return lambda w: w @ x / w.sum(-1)


def test_replicates_equal_a_loop_over_copied_rows():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 15, 60)
    y, x = rng.integers(0, 2, 60), rng.normal(size=60)
    draws = resample(groups, y, resamples=30, seed=4)
    fast = replicate(lambda w: auroc(x, y, weights=w), draws)
    names = np.unique(groups)
    for b in range(30):
        rows = np.concatenate([np.flatnonzero(groups == g) for g, c in zip(names, draws.counts[b]) for _ in range(c)])
        assert fast[b] == pytest.approx(auroc(x[rows], y[rows]), abs=1e-12)


def test_strata_keep_their_number_of_groups_and_rare_classes_claim_a_group():
    groups = np.repeat(np.arange(30), 2)
    labels = np.where(np.arange(60) % 2, 'common', 'common')
    labels[[0, 4, 8]] = 'rare'  # one image each of patients 0, 2 and 4, whose other image is common
    draws = resample(groups, labels, resamples=200)
    assert sorted(np.bincount(draws.stratum_of)) == [3, 27]
    assert (draws.counts[:, [0, 2, 4]].sum(1) == 3).all() and (draws.counts.sum(1) == 30).all()


def test_resamples_are_seeded_uniform_and_independent_of_row_order():
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 3))
    a, b, c = (resample(groups, seed=s) for s in (0, 0, 1))
    assert (a.counts == b.counts).all() and (a.counts != c.counts).any()
    assert a.counts.mean(0) == pytest.approx(np.ones(40), abs=.12)
    assert a.counts.var(0).mean() == pytest.approx(1 - 1 / 40, abs=.05)
    order = np.argsort(groups, kind='stable')
    assert (resample(groups[order]).weights() == a.weights()[:, order]).all()
    assert (resample(groups.astype(str)).counts.sum(1) == 40).all()


def test_bca_equals_scipy():
    x = np.random.default_rng(0).gamma(1., size=70)
    theirs = scipy_stats.bootstrap((x,), np.mean, method='BCa', n_resamples=3000, rng=np.random.default_rng(1))
    a = acceleration(mean_of(x), resample(np.arange(70)))
    ours = bca_interval(x.mean(), theirs.bootstrap_distribution, a)
    np.testing.assert_allclose(ours, theirs.confidence_interval, rtol=1e-9)


def test_bca_of_two_strata_equals_scipy():
    "The AUROC of an unclustered set is a two-sample statistic: scipy's two-sample acceleration is the oracle."
    rng = np.random.default_rng(2)
    neg, pos = rng.normal(size=60), rng.normal(size=40) + 1
    def area(p, n, axis=-1):
        return (np.expand_dims(p, -1) > np.expand_dims(n, -2)).mean((-1, -2))
    theirs = scipy_stats.bootstrap((pos, neg), area, method='BCa', n_resamples=2000, vectorized=True,
                                   rng=np.random.default_rng(1))
    x, y = np.r_[neg, pos], np.r_[np.zeros(60, int), np.ones(40, int)]
    draws = resample(np.arange(100), y)
    value = float(auroc(x, y))
    a = acceleration(lambda w: auroc(x, y, weights=w), draws)
    ours = bca_interval(value, theirs.bootstrap_distribution, a)
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=2e-3)
    own = estimate(lambda w: auroc(x, y, weights=w), draws)
    assert own.method == 'bca'
    np.testing.assert_allclose((own.low, own.high), theirs.confidence_interval, atol=.02)
    assert estimate(lambda w: auroc(x, y, weights=w), draws, trials=40).method == 't'


def test_block_jackknife_estimates_the_same_acceleration():
    x = np.random.default_rng(0).exponential(size=2000)
    draws = resample(np.arange(2000), resamples=2)
    full, blocks = (acceleration(mean_of(x), draws, blocks=o) for o in (2000, 400))
    assert full == pytest.approx(scipy_stats.skew(x) / 6 / np.sqrt(2000), rel=1e-3)
    assert blocks == pytest.approx(full, abs=.005)


@pytest.mark.parametrize('hits, n', [(0, 10), (1, 30), (15, 30), (99, 100), (100, 100)])
def test_wilson_equals_statsmodels(hits, n):
    np.testing.assert_allclose(wilson_interval(hits / n, n), proportion_confint(hits, n, method='wilson'), atol=1e-12)


def test_t_interval_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(0).normal(size=12)
    exact = scipy_stats.t.interval(.95, 11, x.mean(), x.std(ddof=1) / np.sqrt(12))
    np.testing.assert_allclose(t_interval(x.mean(), x.std(ddof=1) / np.sqrt(12), 11), exact, rtol=1e-9)
    low, high = t_interval(.99, .02, 7, odds=True)
    assert 0 < low < .99 < high < 1


def test_standard_error_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(0).normal(size=12)
    draws = resample(np.arange(12), resamples=20_000)
    error, freedom, skew = standard_error(mean_of(x), draws, replicate(mean_of(x), draws))
    assert error == pytest.approx(x.std(ddof=1) / np.sqrt(12), rel=.02) and freedom == pytest.approx(11)
    assert skew == pytest.approx(scipy_stats.skew(x) / 6 / np.sqrt(12), abs=1e-9)
    heavy = x**9  # one value makes up most of the mean: hardly twelve
    assert standard_error(mean_of(heavy), draws, replicate(mean_of(heavy), draws))[1] < 7


def test_standard_error_of_two_means_has_welchs_degrees_of_freedom():
    rng = np.random.default_rng(1)
    x, y = np.r_[rng.uniform(size=30), 3 * rng.uniform(size=8)], np.repeat([0, 1], [30, 8])
    def gap(w): return (w * (y == 1)) @ x / (w @ (y == 1)) - (w * (y == 0)) @ x / (w @ (y == 0))
    draws = resample(np.arange(38), y, resamples=20_000)
    error, freedom, _ = standard_error(gap, draws, replicate(gap, draws))
    welch = scipy_stats.ttest_ind(x[y == 1], x[y == 0], equal_var=False)
    assert error == pytest.approx(float(gap(np.ones((1, 38)))[0]) / welch.statistic, rel=.02)
    assert freedom == pytest.approx(welch.df, rel=1e-6)


def test_standard_error_counts_the_mix_of_classes():
    "All of class 0 right, none of class 1: within classes nothing varies, and the share of right ones is binomial."
    y, right = np.repeat([0, 1], [70, 30]), np.repeat([1., 0.], [70, 30])
    right[0] = 0
    draws = resample(np.arange(100), y, resamples=20_000)
    error = standard_error(mean_of(right), draws, replicate(mean_of(right), draws))[0]
    assert error == pytest.approx(np.sqrt(.69 * .31 / 100), rel=.05)


def test_a_class_without_errors_widens_the_interval():
    y = np.repeat([0, 1, 2], [40, 40, 6])
    right = np.r_[np.arange(80) % 4 > 0, np.ones(6)].astype(float)
    def balanced(w): return np.mean([(w * (y == c)) @ right / (w @ (y == c)) for c in range(3)], 0)
    draws = resample(np.arange(86), y)
    e = estimate(balanced, draws, trials=6)
    assert e.error > 1.15 * e.replicates.std() and e.method == 't'


def test_a_handful_of_patients_that_hardly_count_does_not_widen_the_interval():
    "Patients with images of several classes are of the rarest class; the three left over are all right, and few."
    rng = np.random.default_rng(0)
    y = np.r_[np.tile([0, 1], 57), np.zeros(6, int)]
    right = np.r_[rng.random(114) < .8, np.ones(6)].astype(float)
    e = estimate(mean_of(right), resample(np.arange(120) // 2, y), share=True)
    assert e.error < 1.2 * e.replicates.std()


def test_extremes_do_not_collapse():
    ones = np.ones(40)
    assert percentile_interval(replicate(mean_of(ones), resample(np.arange(40)))) == (1, 1)
    e = estimate(mean_of(ones), resample(np.arange(40) // 2), share=True)
    assert e.method == 'wilson' and (e.low, e.high) == pytest.approx(wilson_interval(1, 20))
    x, y = np.arange(40.), (np.arange(40) > 30).astype(int)
    e = estimate(lambda w: auroc(x, y, weights=w), resample(np.arange(40), y), trials=9)
    assert e.value == 1 and e.method == 'wilson' and e.low == pytest.approx(wilson_interval(1, 9)[0])


def test_effective_size_of_a_clustered_share():
    "Ten identical images per patient carry no more than one: Wilson on 300 rows uses about 30 trials."
    hits = np.repeat((np.arange(30) < 2).astype(float), 10)
    e = estimate(mean_of(hits), resample(np.repeat(np.arange(30), 10)), share=True)
    assert e.method == 'wilson'
    np.testing.assert_allclose((e.low, e.high), wilson_interval(2 / 30, 30), atol=.02)


def test_cautions_name_what_is_small():
    x, y = np.random.default_rng(0).normal(size=30), (np.arange(30) < 6).astype(int)
    e = estimate(lambda w: auroc(x, y, weights=w), resample(np.arange(30) // 2, y), trials=3)
    assert e.cautions == ('only 15 independent groups', 'the scarcest class has only 3 groups') and e.method == 't'
    few = np.zeros((30, 2), bool); few[:5, 0] = few[::2, 1] = True
    s = np.random.default_rng(1).normal(size=(30, 2))
    e = estimate(lambda w: macro_auroc(s, few, weights=w), resample(np.r_[np.zeros(5, int), np.arange(1, 26)]))
    assert not any('lack a class' in o for o in e.cautions)  # a class that is missing leaves the average, which stays
    e = estimate(lambda w: auroc(x, few[:, 0].astype(int), weights=w), resample(np.r_[np.zeros(5, int), np.arange(1, 26)]))
    assert any('36% of the resamples' in o or '37%' in o or '35%' in o for o in e.cautions)
    with pytest.raises(ValueError, match='not defined on the data'):
        estimate(lambda w: np.full(len(w), np.nan), resample(np.arange(9)))


def test_difference_is_paired_antisymmetric_and_narrower():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 150)
    a = rng.normal(size=150) + y
    b = a + .3 * rng.normal(size=150)
    fa, fb = (lambda w, s=s: auroc(s, y, weights=w) for s in (a, b))
    draws = resample(np.arange(150), y)
    d, back = paired_difference(fa, fb, draws), paired_difference(fb, fa, draws)
    assert (d.value, d.low, d.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-9)
    unpaired = np.hypot(*(replicate(f, draws).std() for f in (fa, fb)))
    assert d.replicates.std() < .7 * unpaired
    assert paired_difference(fa, fa, draws).cautions == ('no resample tells the two apart',)


def test_mean_over_seeds_has_two_parts():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=1000) * .02
    alike = mean_over_seeds([.7, .7, .7], .7 + np.tile(shared, (3, 1)), groups=100)
    assert alike.seed_sd == pytest.approx(0, abs=1e-9) and alike.sampling_sd == pytest.approx(shared.std())
    assert alike.high - alike.low == pytest.approx(2 * scipy_stats.t.ppf(.975, 99) * shared.std())
    values = np.array([.6, .7, .8])
    apart = mean_over_seeds(values, values[:, None] + shared, groups=100)
    assert apart.seed_sd == pytest.approx(.1) and apart.sampling_sd == pytest.approx(shared.std())
    assert apart.high - apart.low > 4 * (alike.high - alike.low)
    capped = mean_over_seeds([.9, .99], np.array([[.9], [.99]]) + shared, groups=100, bounds=(0, 1))
    assert capped.high == 1
    assert seed_variance(values, values[:, None] + shared) == pytest.approx(.01)
    pooled = mean_over_seeds([.7, .7, .7], .7 + np.tile(shared, (3, 1)), groups=100, training=(.01, 8))
    assert pooled.seed_sd == pytest.approx(.1) and pooled.high - pooled.low == pytest.approx(apart.high - apart.low, rel=.6)
    negative = mean_over_seeds([.7, .7, .7], .7 + np.tile(shared, (3, 1)), groups=100, training=(-.01, 8))
    assert (negative.low, negative.high) == pytest.approx((alike.low, alike.high))
    assert mean_over_seeds([.7], (.7 + shared)[None], groups=100, training=(.01, 8)).seed_sd == pytest.approx(.1)
    one = mean_over_seeds([.7], (.7 + shared)[None], groups=100)
    assert one.seeds == 1 and np.isnan(one.seed_sd)


@pytest.mark.parametrize('n, differences', [(14, {3: .89, 5: 1.63, 8: 2.81, 10: 3.62}), (19, {3: .76, 5: 1.40, 8: 2.41, 10: 3.11}),
                                            (20, {3: .74, 5: 1.36, 8: 2.35, 10: 3.03}), (25, {3: .66, 5: 1.22, 8: 2.10, 10: 2.71})])
def test_critical_differences_are_the_published_ones(n, differences):
    for k, expected in differences.items(): assert critical_difference(k, n) == pytest.approx(expected, abs=.0051)


def test_critical_difference_divides_by_the_root_of_two():
    demsar = {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}
    for k, q in demsar.items(): assert critical_difference(k, 6) == pytest.approx(q * np.sqrt(k * (k + 1) / 36), abs=2e-3)
    assert critical_difference(8, 25, level=.9) < critical_difference(8, 25)
    with pytest.raises(ValueError, match='1 methods on 25 tasks'): critical_difference(1, 25)


def test_holm_equals_statsmodels():
    rng = np.random.default_rng(0)
    for p in ([.03], [.01, .01, .9], [0, 1, .5, .5], *(rng.beta(.3, 1, m) for m in (2, 5, 40))):
        np.testing.assert_allclose(holm(p), multipletests(p, method='holm')[1], rtol=0, atol=1e-12)
    for bad in ([.1, np.nan], [1.2], [-.1]):
        with pytest.raises(ValueError, match='not between 0 and 1'): holm(bad)


# Coverage: the share of repetitions whose 95 % interval holds the truth. 300 repetitions: standard error .0126.

def clustered(rng, patients, per, prevalence, gap, shared):
    groups = np.repeat(np.arange(patients), per)
    y = (np.arange(patients) < prevalence * patients).astype(int)[groups]
    return rng.normal(size=len(groups)) + shared * rng.normal(size=patients)[groups] + gap * y, y, groups


@pytest.mark.slow
@pytest.mark.parametrize('patients, per, prevalence, gap, shared, least', [
    (200, 1, .3, 1., 0., .92), (80, 3, .4, 1., 1., .91), (60, 1, .3, 1., 0., .91), (40, 1, .25, 2., 0., .91),
    (200, 1, .1, 2.5, 0., .87), (150, 4, .5, 2., 2., .91)])
def test_auroc_interval_covers(patients, per, prevalence, gap, shared, least):
    truth, hits = scipy_stats.norm.cdf(gap / np.sqrt(2 * (1 + shared**2))), 0
    for s in range(300):
        x, y, g = clustered(np.random.default_rng([s, 1]), patients, per, prevalence, gap, shared)
        trials = int(min(prevalence, 1 - prevalence) * patients)
        e = estimate(lambda w: auroc(x, y, weights=w), resample(g, y, resamples=800), trials=trials)
        hits += e.low <= truth <= e.high
    assert least <= hits / 300 <= .99


@pytest.mark.slow
@pytest.mark.parametrize('patients, per, p, correlation', [
    (100, 1, .98, 0), (200, 1, .5, 0), (60, 4, .9, .3), (60, 4, .98, .3), (100, 3, .03, .2), (300, 1, .01, 0)])
def test_share_interval_covers(patients, per, p, correlation):
    hits = 0
    for s in range(300):
        rng, c = np.random.default_rng([s, 2]), 1 / correlation - 1 if correlation else None
        chance = rng.beta(p * c, (1 - p) * c, patients) if correlation else np.full(patients, p)
        groups = np.repeat(np.arange(patients), per)
        right = (rng.random(len(groups)) < chance[groups]).astype(float)
        e = estimate(mean_of(right), resample(groups, resamples=800), share=True)
        hits += e.low <= p <= e.high
    assert .92 <= hits / 300 <= .995


@pytest.mark.slow
@pytest.mark.parametrize('sizes, gap', [((50, 50, 50), 1.), ((40, 40, 6), 2.5), ((30, 30, 30, 8), 1.)])
def test_balanced_accuracy_interval_covers(sizes, gap):
    k, y, big = len(sizes), np.repeat(np.arange(len(sizes)), sizes), np.repeat(np.arange(len(sizes)), 40_000)
    truth = float(balanced_accuracy(np.random.default_rng(0).normal(size=(len(big), k)) + gap * np.eye(k)[big], big))
    hits = 0
    for s in range(300):
        x = np.random.default_rng([s, 3]).normal(size=(len(y), k)) + gap * np.eye(k)[y]
        e = estimate(lambda w: balanced_accuracy(x, y, weights=w), resample(np.arange(len(y)), y, resamples=800),
                     trials=min(sizes))
        hits += e.low <= truth <= e.high
    assert .91 <= hits / 300


@pytest.mark.slow
@pytest.mark.parametrize('patients', [25, 150])
def test_difference_interval_covers(patients):
    hits = 0
    for s in range(300):
        rng = np.random.default_rng([s, 4])
        x, y, g = clustered(rng, patients, 2, .4, 1., .5)
        better = x + .4 * y + .5 * rng.normal(size=len(y))
        truth = (scipy_stats.norm.cdf(1.4 / np.sqrt(2 * 1.5)) - scipy_stats.norm.cdf(1 / np.sqrt(2 * 1.25)))
        e = paired_difference(lambda w: auroc(better, y, weights=w), lambda w: auroc(x, y, weights=w),
                              resample(g, y, resamples=800), trials=int(.4 * patients))
        hits += e.low <= truth <= e.high
    assert .91 <= hits / 300 <= .99


@pytest.mark.slow
@pytest.mark.parametrize('seeds', [2, 3, 5])
@pytest.mark.parametrize('seed_sd', [0, .02, .1])
def test_mean_over_seeds_covers(seeds, seed_sd):
    "Values = truth + training + sample difficulty shared by all seeds + noise of each seed on each sample."
    hits = 0
    for s in range(300):
        rng = np.random.default_rng([s, 5])
        x = .7 + seed_sd * rng.normal(size=(seeds, 1)) + .4 * rng.normal(size=200) + .3 * rng.normal(size=(seeds, 200))
        draws = resample(np.arange(200), resamples=400)
        m = mean_over_seeds(x.mean(1), [replicate(mean_of(o), draws) for o in x], groups=200)
        hits += m.low <= .7 <= m.high
    assert (.85 if seeds == 2 else .9) <= hits / 300 <= .99  # two seeds hardly know their spread


@pytest.mark.slow
@pytest.mark.parametrize('seeds', [2, 3])
@pytest.mark.parametrize('seed_sd', [.02, .1])
def test_pooled_seed_variance_covers_better(seeds, seed_sd):
    "Four methods trained alike share one seed variance; so do their differences, with twice that variance."
    mean, gap = [], []
    for s in range(200):
        rng = np.random.default_rng([s, 6])
        difficulty, draws, arms = .4 * rng.normal(size=200), resample(np.arange(200), resamples=300), []
        for _ in range(4):
            x = .7 + seed_sd * rng.normal(size=(seeds, 1)) + difficulty + .3 * rng.normal(size=(seeds, 200))
            arms.append((x.mean(1), np.stack([replicate(mean_of(o), draws) for o in x])))
        variance, freedom = np.mean([seed_variance(*o) for o in arms]), 4 * (seeds - 1)
        for values, replicates in arms:
            m = mean_over_seeds(values, replicates, groups=200, training=(variance, freedom))
            mean.append(m.low <= .7 <= m.high)
            if values is arms[0][0]: continue
            m = mean_over_seeds(values - arms[0][0], replicates - arms[0][1], groups=200, training=(2 * variance, freedom))
            gap.append(m.low <= 0 <= m.high)
    assert np.mean(mean) >= .91 and np.mean(gap) >= .90


@pytest.mark.slow
def test_mean_of_random_starts_covers_chance():
    hits = 0
    for s in range(200):
        rng = np.random.default_rng([s, 7])
        y, groups = rng.integers(0, 3, 120), np.arange(120) // 2
        draws, starts = resample(groups, y, resamples=300), rng.normal(size=(20, 120, 3))
        replicates = [replicate(lambda w: macro_auroc(x, y, weights=w), draws) for x in starts]
        m = mean_over_seeds([float(macro_auroc(x, y)) for x in starts], replicates, groups=60)
        hits += m.low <= .5 <= m.high
    assert .91 <= hits / 200 <= .99
