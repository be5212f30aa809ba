"Paired tests against statsmodels, scipy and loops written from the formulas; refusals; levels by simulation."
import numpy as np
import pytest
from benchmarks import coverage as simulation
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_paired

from medcl_study.metrics import auroc
from medcl_study.significance import (delong, delong_covariance, equivalence_p, from_estimate, half_widths, holm_by_family,
                                      mcnemar, paired_permutation, permutation_test, power_at, smallest_difference, verdict)
from medcl_study.stats import paired_difference, resample


def components(score, targets):
    "Areas of single positives and single negatives, by a double loop; a tie counts half."
    plus, minus = score[targets == 1], score[targets == 0]
    above = np.array([[float(a > b) + .5 * float(a == b) for b in minus] for a in plus])
    return above.mean(1), above.mean(0), above.mean()


def delong_by_loops(scores, targets):
    v10, v01, areas = zip(*(components(s, targets) for s in scores))
    return np.array(areas), np.cov(v10) / len(v10[0]) + np.cov(v01) / len(v01[0])


def cases():
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat([0, 1], [23, 17]))
    yield 'random', rng.normal(size=(2, 40)) + y, y
    yield 'ties', rng.integers(0, 4, (2, 40)) + y, y
    yield 'one is constant', np.stack([rng.normal(size=40), np.ones(40)]), y
    yield 'opposite', np.stack([y + rng.normal(size=40), -y + rng.normal(size=40)]), y
    yield 'two positives', rng.normal(size=(2, 12)), np.repeat([0, 1], [10, 2])
    yield 'huge and tiny', np.stack([1e300 * rng.normal(size=40), 1e-300 * rng.normal(size=40)]), y


@pytest.mark.parametrize('name, scores, targets', cases())
def test_delong_equals_loops(name, scores, targets):
    areas, covariance = delong_covariance(scores, targets)
    expected, theirs = delong_by_loops(scores, targets)
    np.testing.assert_allclose(areas, expected, atol=1e-12)
    np.testing.assert_allclose(covariance, theirs, atol=1e-12)
    found = delong(*scores, targets)
    z = (expected[0] - expected[1]) / np.sqrt(theirs[0, 0] + theirs[1, 1] - 2 * theirs[0, 1])
    assert found.p == pytest.approx(2 * scipy_stats.norm.sf(abs(z)), abs=1e-9)
    back = delong(*scores[::-1], targets)
    assert (back.value, back.low, back.high, back.p) == pytest.approx((-found.value, -found.high, -found.low, found.p))


def test_delong_of_clusters_equals_loops_and_the_plain_one():
    rng = np.random.default_rng(1)
    groups, y = rng.permutation(np.repeat(np.arange(20), 3)), rng.integers(0, 2, 60)
    scores = rng.normal(size=(2, 60)) + rng.normal(size=20)[groups] + y
    areas, covariance = delong_covariance(scores, y, groups, clustered=True)
    expected = np.zeros((2, 2))
    v10, v01, theta = zip(*(components(s, y) for s in scores))
    m, n = int(y.sum()), int((1 - y).sum())
    holds = [(sum(groups[y == 1] == g), sum(groups[y == 0] == g)) for g in range(20)]
    i10, i01 = sum(a > 0 for a, _ in holds), sum(b > 0 for _, b in holds)
    for r in range(2):
        for s in range(2):
            for g, (a, b) in enumerate(holds):
                xr, xs = (v10[o][groups[y == 1] == g].sum() - a * theta[o] for o in (r, s))
                yr, ys = (v01[o][groups[y == 0] == g].sum() - b * theta[o] for o in (r, s))
                expected[r, s] += i10 / (i10 - 1) * xr * xs / m**2 + i01 / (i01 - 1) * yr * ys / n**2
                expected[r, s] += 20 / 19 * (xr * ys + yr * xs) / (m * n)
    np.testing.assert_allclose(covariance, expected, atol=1e-12)
    alone = delong_covariance(scores, y, np.arange(60), clustered=True)
    np.testing.assert_allclose(alone[1], delong_covariance(scores, y)[1], atol=1e-12)


def test_delong_refuses_what_it_cannot_compare():
    y, x = np.repeat([0, 1], 10), np.arange(20.)
    for args, words in (((x, x, np.zeros(20, int)), '0 positives and 20 negatives'), ((x, x[:-1], y), 'inhomogeneous|match'),
                        ((x[:1], x[:1], y[:1]), '0 positives and 1 negatives'), ((np.r_[np.nan, x[1:]], x, y), 'NaN or infinite'),
                        ((x, x, y + 1), 'must be 0 or 1'), ((x, x, y, np.arange(20) // 2), 'paired bootstrap'),
                        ((x, np.ones(20), y), 'variance of 0')):
        with pytest.raises(ValueError, match=words): delong(*args)
    same = delong(x, x, y)
    assert same.p == 1 and same.low == same.high == 0


@pytest.mark.parametrize('b, c', [(0, 0), (0, 1), (1, 0), (5, 5), (3, 9), (24, 0), (12, 12), (13, 12), (40, 18), (300, 1)])
def test_mcnemar_equals_statsmodels(b, c):
    first, second = np.repeat([1, 1, 0, 0], [50, b, c, 20]), np.repeat([1, 0, 1, 0], [50, b, c, 20])
    theirs = their_mcnemar([[50, b], [c, 20]], exact=b + c < 25, correction=False).pvalue
    found = mcnemar(first.astype(bool), second.astype(bool))
    assert found.p == pytest.approx(min(1, theirs), abs=1e-12) and found.value == pytest.approx((b - c) / (70 + b + c))
    assert found.low <= found.value <= found.high


def test_mcnemar_refuses_repeated_groups_and_what_is_no_hit():
    for args, words in ((([1, 0], [1, 0], [3, 3]), 'group that occurs before'), (([1, .5], [1, 0]), 'must be 1 and 0'),
                        (([1, np.nan], [1, 0]), 'must be 1 and 0'), (([1, 0], [1]), 'one length'), (([], []), 'one length')):
        with pytest.raises(ValueError, match=words): mcnemar(*args)


def test_paired_permutation_equals_scipy():
    rng = np.random.default_rng(0)
    for x in (rng.normal(size=9) + .4, np.round(rng.normal(size=10)), np.r_[np.zeros(7), 1., 2.]):
        def mean(a, b, axis=-1): return (a - b).mean(axis)
        theirs = scipy_stats.permutation_test((x, np.zeros_like(x)), mean, permutation_type='samples', n_resamples=np.inf)
        assert paired_permutation(x, np.zeros_like(x)).p == pytest.approx(theirs.pvalue, abs=1e-9)
    x = rng.normal(size=60) + .25
    theirs = scipy_stats.permutation_test((x, 0 * x), mean, permutation_type='samples', n_resamples=20_000, rng=rng)
    assert paired_permutation(x, 0 * x).p == pytest.approx(theirs.pvalue, abs=.012)


def test_permutation_flips_whole_groups():
    "Ten copies of each of eight patients tell as much as one."
    x = np.random.default_rng(2).normal(size=8) + .6
    assert paired_permutation(np.repeat(x, 10), np.zeros(80), np.repeat(np.arange(8), 10)).p == paired_permutation(x, np.zeros(8)).p
    assert paired_permutation(np.repeat(x, 10), np.zeros(80)).p < .01


def test_permutation_of_a_metric_equals_a_loop_over_swaps():
    rng = np.random.default_rng(3)
    y, groups = np.repeat([0, 1, 0, 1], 5), np.arange(20) // 2
    a, b = rng.normal(size=20) + y, rng.normal(size=20)
    gaps = []
    for swap in range(2**10):
        flip = (swap >> groups & 1).astype(bool)
        gaps.append(auroc(np.where(flip, b, a), y) - auroc(np.where(flip, a, b), y))
    expected = np.mean(np.abs(gaps) >= abs(gaps[0]) - 1e-12)
    found = permutation_test(lambda w: auroc(np.r_[a, b], np.r_[y, y], weights=w), groups)
    assert found == pytest.approx(expected, abs=1e-12)
    monte_carlo = permutation_test(lambda w: auroc(np.r_[a, b], np.r_[y, y], weights=w), groups, resamples=1000)
    assert monte_carlo == pytest.approx(expected, abs=.05) and monte_carlo >= 1 / 1001
    sure = permutation_test(lambda w: w @ np.r_[np.ones(40), np.zeros(40)], np.arange(40), resamples=99)
    assert sure == 1 / 100


def test_permutation_refuses_nan_and_single_groups():
    for args, words in ((([1., np.nan], [0, 0]), '1 of 2'), (([1.], [0]), 'nothing to swap'), (([1., 2], [0, 0], [1, 1]), 'nothing to swap'),
                        (([1., 2], [0, 0], [1]), 'do not match')):
        with pytest.raises(ValueError, match=words): paired_permutation(*args)
    with pytest.raises(ValueError, match='not defined after some swaps'):
        permutation_test(lambda w: w.sum(1) * np.nan, np.arange(9))


def test_holm_within_families_equals_statsmodels():
    rng = np.random.default_rng(0)
    p, family = rng.beta(.3, 1, 60), rng.integers(0, 5, 60)
    found = holm_by_family(p, family)
    for f in range(5):
        np.testing.assert_allclose(found[family == f], multipletests(p[family == f], method='holm')[1], atol=1e-12)
    with pytest.raises(ValueError, match='do not match'): holm_by_family([.1], ['a', 'b'])
    with pytest.raises(ValueError, match='not between 0 and 1'): holm_by_family([.1, np.nan], ['a', 'a'])


def test_equivalence_equals_statsmodels():
    rng = np.random.default_rng(4)
    for shift in (0, .1, .5):
        x, y = rng.normal(size=(2, 40))
        gaps = x + shift - y
        theirs = ttost_paired(x + shift, y, -.4, .4)[0]
        error = gaps.std(ddof=1) / np.sqrt(40)
        assert equivalence_p(gaps.mean(), error, .4, freedom=39) == pytest.approx(theirs, abs=1e-9)
    assert equivalence_p(.1, 0, .2) == 0 and equivalence_p(.2, 0, .2) == 1
    with pytest.raises(ValueError, match='margin of 0'): equivalence_p(0, 1, 0)
    assert [verdict(v, .01, .02) for v in (0, .05, -.05)] == ['equivalent', 'first', 'second']
    assert verdict(.01, .02, .02) == 'undecided'


def test_power_is_what_a_simulation_finds():
    smallest = smallest_difference(.1)
    assert smallest == pytest.approx(.28016, abs=1e-4) and power_at(smallest, .1) == pytest.approx(.8, abs=1e-4)
    seen = smallest + .1 * np.random.default_rng(0).normal(size=200_000)
    assert np.mean(np.abs(seen) > 1.96 * .1) == pytest.approx(.8, abs=.005)
    small = smallest_difference(1 / np.sqrt(12), freedom=11)  # 12 pairs of standard deviation 1
    x = small + np.random.default_rng(1).normal(size=(100_000, 12))
    found = np.abs(x.mean(1) / x.std(1, ddof=1) * np.sqrt(12)) > scipy_stats.t.ppf(.975, 11)
    assert found.mean() == pytest.approx(.8, abs=.02)


def test_design_table_is_wilsons():
    for n, row in half_widths([100, 400, 1000]).items():
        for p in (.5, .9):
            low, high = proportion_confint(p * n, n, method='wilson')
            assert row[f'± at {p:g}'] == pytest.approx(50 * (high - low), abs=1e-9)
    published = {100: (9.6, 6.0), 156: (7.8, 4.8), 400: (4.9, 3.0), 451: (4.6, 2.8), 624: (3.9, 2.4), 1000: (3.1, 1.8),
                 2122: (2.1, 1.3), 6333: (1.2, .8)}
    for n, row in half_widths(published).items():
        assert (row['± at 0.5'], row['± at 0.9']) == pytest.approx(published[n], abs=.11)


def test_bootstrap_comparison_and_its_sentence():
    rng = np.random.default_rng(5)
    y = rng.integers(0, 2, 200)
    a, b = rng.normal(size=(2, 200)) + y
    e = paired_difference(lambda w: auroc(a, y, weights=w), lambda w: auroc(b, y, weights=w), resample(np.arange(200), y))
    found, theirs = from_estimate(e), delong(a, b, y)
    assert found.p == pytest.approx(theirs.p, abs=.05) and found.smallest == pytest.approx(theirs.smallest, rel=.1)
    assert 'in 80 % of cases' in found.sentence()
    assert 'second is larger' in delong(b, b + 3 * y, y).sentence()
    alike = from_estimate(paired_difference(lambda w: auroc(a, y, weights=w), lambda w: auroc(a, y, weights=w), resample(np.arange(200), y)))
    assert alike.p == 1 and alike.smallest == 0


# Levels and coverage. The whole study is `python tests/benchmarks/coverage.py`; here is a part of it.

def within(cells, low, high):
    for o in cells: assert low <= o['coverage'] <= high, (o['metric'], o['design'], o['coverage'], o['above'], o['below'])


@pytest.mark.parametrize('kind', ['masks', 'ranks'])
def test_intervals_cover(kind):
    "100 repetitions: an interval that covers 95 % is outside of these bounds once in a thousand times."
    within(simulation.coverage(kind, simulation.HEADLINE[kind][:1], simulation.PLAIN, repeats=100, resamples=200), .87, 1)


def test_intervals_that_ignore_patients_do_not_cover():
    plain, naive = (simulation.coverage('ranks', ('recall_at_5',), simulation.CLUSTERED, repeats=150, resamples=200, images=o)[0]
                    for o in (False, True))
    assert naive['coverage'] < .89 < plain['coverage']


@pytest.mark.slow
@pytest.mark.parametrize('design', [simulation.PLAIN, simulation.CLUSTERED, simulation.RARE_CLUSTERED], ids=lambda o: o.name)
@pytest.mark.parametrize('kind', list(simulation.HEADLINE))
def test_headline_intervals_cover(kind, design):
    "500 repetitions: ± 2.6 points at three standard errors."
    if kind in ('binary', 'multiclass') or not design.rare:
        within(simulation.coverage(kind, simulation.HEADLINE[kind], design, repeats=500), .92, .99)


QUICK = ('DeLong', 'DeLong, clustered', 'McNemar', 'permutation')


def keeps_its_level(test, repeats):
    found = simulation.rejection(test, repeats=repeats)
    assert found['rejected'] <= .05 + 3.3 * (.05 * .95 / repeats)**.5, found


@pytest.mark.parametrize('test', QUICK)
def test_tests_keep_their_level(test): keeps_its_level(test, 200)


@pytest.mark.slow
@pytest.mark.parametrize('test', [o for o in simulation.TESTS if o not in QUICK])
def test_slow_tests_keep_their_level(test): keeps_its_level(test, 300)


@pytest.mark.slow
@pytest.mark.parametrize('test', list(simulation.IGNORANT))
def test_tests_that_ignore_patients_do_not(test):
    "Rejected more often than at the nominal level, by more than two standard errors."
    assert simulation.rejection(test, repeats=600)['rejected'] > .05 + 2 * (.05 * .95 / 600)**.5
