"Ranks, tests, equivalence and robust summaries against scipy, scikit-posthocs, autorank, baycomp, statsmodels and loops."
import autorank
import baycomp
import numpy as np
import pandas as pd
import pytest
import scikit_posthocs
from autorank._util import _critical_distance, get_sorted_rank_groups
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from medcl_study.across import (aggregate, benchmark, cliques, equivalence, equivalences, friedman, improvement,
                                improvements, interquartile_mean, mean_ranks, nemenyi, pairwise, profile, profiles, redraw,
                                signed_rank, spread, variance_parts)
from medcl_study.core import DataError
from medcl_study.predictions import Task, concat_predictions, mean_over_runs, prediction_rows
from medcl_study.stats import critical_difference


def made(seed, n=14, k=5, digits=None, lift=.02):
    "Values of k methods on n tasks; rounded hard if there shall be ties."
    rng = np.random.default_rng(seed)
    values = rng.uniform(.6, .9, (n, 1)) + lift * np.arange(k) + .03 * rng.normal(size=(n, k))
    values = values if digits is None else values.round(digits)
    return pd.DataFrame(values, [f't{i}' for i in range(n)], [f'm{i}' for i in range(k)])


TABLES = [made(0), made(1, 6, 3, lift=0), made(2, 25, 8), made(3, 14, 5, 1), made(4, 9, 12, 1), made(5, 3, 3), made(6, 20, 4, lift=0)]


# ---- ranks, Friedman, Nemenyi

@pytest.mark.parametrize('blocks', TABLES)
def test_ranks_and_friedman_equal_scipy(blocks):
    theirs = scipy_stats.rankdata(-blocks.to_numpy(), axis=1).mean(0)
    np.testing.assert_allclose(mean_ranks(blocks)[blocks.columns], theirs, atol=1e-12)
    test, oracle = friedman(blocks), scipy_stats.friedmanchisquare(*blocks.to_numpy().T)
    assert (test.chi2, test.p_chi2) == pytest.approx((oracle.statistic, oracle.pvalue), abs=1e-9)
    n, k = blocks.shape
    f = (n - 1) * oracle.statistic / (n * (k - 1) - oracle.statistic)
    assert (test.f, test.p) == pytest.approx((f, scipy_stats.f.sf(f, k - 1, (k - 1) * (n - 1))), abs=1e-9)


@pytest.mark.parametrize('blocks', TABLES)
def test_nemenyi_equals_scikit_posthocs(blocks):
    np.testing.assert_allclose(nemenyi(blocks), scikit_posthocs.posthoc_nemenyi_friedman(blocks), atol=1e-6)


@pytest.mark.parametrize('blocks', [made(0), made(2, 25, 8), made(7, 40, 6)])
def test_ranks_critical_difference_and_cliques_equal_autorank(blocks):
    result = autorank.autorank(blocks, force_mode='nonparametric')
    ranks, reach = mean_ranks(blocks), critical_difference(blocks.shape[1], len(blocks))
    np.testing.assert_allclose(ranks[result.rankdf.index], result.rankdf['meanrank'], atol=1e-9)
    assert reach == pytest.approx(result.cd, abs=2e-3) and result.cd == _critical_distance(.05, blocks.shape[1], len(blocks))
    _, names, groups = get_sorted_rank_groups(result, reverse=False)
    assert set(map(frozenset, cliques(ranks, reach))) == {frozenset(names[a:b + 1]) for a, b in groups}


def test_nemenyi_and_critical_difference_agree():
    for blocks in TABLES:
        ranks, p, reach = mean_ranks(blocks), nemenyi(blocks), critical_difference(blocks.shape[1], len(blocks))
        for a in ranks.index:
            for b in ranks.index: assert (abs(ranks[a] - ranks[b]) > reach) == (p.loc[a, b] < .05)


def test_cliques_by_hand():
    ranks = pd.Series({'c': 3., 'a': 1., 'b': 2., 'e': 5.5, 'd': 3.2})
    assert cliques(ranks, 1.2) == [('a', 'b'), ('b', 'c', 'd')] and cliques(ranks, .1) == []
    assert cliques(ranks, 5) == [('a', 'b', 'c', 'd', 'e')] and cliques(pd.Series({'a': 1.5, 'b': 1.5}), 0) == [('a', 'b')]


def test_extreme_tables():
    flat = pd.DataFrame(np.full((5, 3), .5), columns=list('abc'))
    test = friedman(flat)
    assert (test.chi2, test.f, test.p) == (0, 0, 1) and (mean_ranks(flat) == 2).all()
    assert cliques(mean_ranks(flat), 0) == [('a', 'b', 'c')] and (nemenyi(flat) == 1).all().all()
    assert set(pairwise(flat)['verdict']) == {'cannot be significant'}  # no difference is left to have a sign
    clear = pd.DataFrame({'a': [2., 2], 'b': [1., 1]})  # two methods, two tasks
    test = friedman(clear)
    assert test.f == np.inf and test.p == pytest.approx(1 / 2) and test.chi2 == 2
    assert list(mean_ranks(clear)) == [1, 2]
    constant = made(0).assign(m0=.1)  # one method constant and worst
    assert mean_ranks(constant)['m0'] == 5
    noise = made(0).mean(axis=1)
    assert (mean_ranks(pd.DataFrame({'a': noise, 'b': noise * 3 / 3 + 1e-15})) == 1.5).all()  # rounding is no victory


def test_two_methods_make_friedman_the_sign_test():
    blocks = made(3, 20, 2)
    wins = (blocks['m1'] > blocks['m0']).sum()
    assert friedman(blocks).chi2 == pytest.approx((2 * wins - 20)**2 / 20)


@pytest.mark.parametrize('test', [mean_ranks, friedman, nemenyi, pairwise, equivalences])
def test_gaps_are_refused_by_name(test):
    for bad in (np.nan, np.inf):
        blocks = made(0)
        blocks.loc['t3', 'm2'] = bad
        with pytest.raises(DataError, match="method 'm2' has no value on 't3'"): test(blocks)
    with pytest.raises(DataError, match='1 methods on 14'): test(made(0)[['m0']])
    with pytest.raises(DataError, match='5 methods on 1 '): test(made(0)[:1])
    with pytest.raises(DataError, match="task 't0' occurs twice"): test(pd.concat([made(0)[:2], made(1, 5, 5)[:1]]))


# ---- pairs

@pytest.mark.parametrize('n', [2, 5, 8, 14, 25, 49])
def test_signed_rank_equals_scipy(n):
    for seed in range(5):
        d = np.random.default_rng(seed).normal(.3, 1, n)
        assert signed_rank(d).p == pytest.approx(scipy_stats.wilcoxon(d, method='exact').pvalue, abs=1e-12)


def test_signed_rank_with_ties_counts_all_signs():
    d = np.array([.1, .1, -.1, .2, .2, .3, 0, -.3, .4])
    size = scipy_stats.rankdata(abs(d[d != 0]))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    null, seen = np.abs(signs @ size), abs(np.sign(d[d != 0]) @ size)
    assert signed_rank(d).p == pytest.approx((null >= seen - 1e-9).mean()) and signed_rank(d).smallest == 2 / 2**8
    assert signed_rank([.3 - .2, .2 - .1]).p == signed_rank([.1, .1]).p
    back = signed_rank(-d)
    assert back.p == signed_rank(d).p and back.lean == -signed_rank(d).lean
    assert signed_rank([1]).p == 1 and signed_rank([]).p == 1


@pytest.mark.parametrize('blocks', TABLES)
def test_correction_of_pairs_equals_statsmodels(blocks):
    table = pairwise(blocks)
    np.testing.assert_allclose(table['p_holm'], multipletests(table['p'], method='holm')[1], atol=1e-12)
    k = blocks.shape[1]
    assert len(table) == k * (k - 1) // 2 and (table['smallest'] <= table['p_holm'] + 1e-12).all()
    for r in table.to_dict('records'):
        if r['verdict'] in ('better', 'worse'): assert r['p_holm'] <= .05 and (r['difference'] > 0) == (r['verdict'] == 'better')


def test_pairs_say_what_cannot_be_significant():
    eight = pairwise(made(0, 8, 8, lift=.5))  # perfectly ordered
    assert (eight['p'] == 2 / 2**8).all() and set(eight['verdict']) == {'cannot be significant'}
    fourteen = pairwise(made(0, 14, 8, lift=.5))
    assert set(fourteen['verdict']) == {'worse'} and len(fourteen) == 28
    against = pairwise(made(0, 8, 8, lift=.5), baseline='m0')
    assert set(against['verdict']) == {'cannot be significant'} and len(against) == 7
    assert set(pairwise(made(0, 8, 4, lift=.5), baseline='m0')['verdict']) == {'better'}
    with pytest.raises(DataError, match="no method 'x'"): pairwise(made(0), baseline='x')


# ---- practical equivalence

@pytest.mark.parametrize('seed, rope', [(0, .01), (1, .03), (2, 0), (3, .05)])
def test_equivalence_equals_baycomp(seed, rope):
    blocks = made(seed, 14, 2, lift=.015)
    x, y = blocks['m0'].to_numpy(), blocks['m1'].to_numpy()
    ours = equivalence(x - y, rope=rope)
    theirs = baycomp.SignedRankTest.probs(x, y, rope, nsamples=20_000, random_state=1)
    theirs = theirs if rope else (theirs[0], 0, theirs[1])
    np.testing.assert_allclose(ours, theirs, atol=.015)
    assert sum(ours) == pytest.approx(1)


def test_equivalence_equals_autorank():
    blocks = made(4, 14, 3)
    result = autorank.autorank(blocks, approach='bayesian', rope=.02, rope_mode='absolute', force_mode='nonparametric', nsamples=20_000,
                               random_state=0)
    names = list(result.rankdf.index)
    for other in names[1:]:
        better, same, worse = equivalence(blocks[names[0]] - blocks[other], rope=.02)
        assert (better, same) == pytest.approx(tuple(result.rankdf.loc[other, ['p_smaller', 'p_equal']].astype(float)), abs=.015)


def test_equivalence_by_a_loop():
    z, rope = np.array([.03, -.01, .02]), .01
    full, rng = np.r_[0, z], np.random.default_rng(7)
    wins = np.zeros(3)
    for w in rng.dirichlet([.5, 1, 1, 1], 4000):
        mass = np.zeros(3)
        for i in range(4):
            for j in range(4):
                mean = (full[i] + full[j]) / 2
                mass[0 if mean > rope + 1e-9 else 2 if mean < -rope - 1e-9 else 1] += w[i] * w[j]
        wins[mass.argmax()] += 1
    np.testing.assert_allclose(equivalence(z, rope=rope + 1e-6), wins / 4000, atol=.03)  # past the border, which counts half


def test_equivalence_is_antisymmetric_seeded_and_shares_ties():
    d = made(0, 12, 2)['m0'] - made(0, 12, 2)['m1']
    assert equivalence(d) == equivalence(d) and equivalence(d)[::-1] == pytest.approx(equivalence(-d), abs=1e-12)
    assert equivalence([0, 0], rope=0) == (.5, 0, .5) and equivalence([0, 0]) == (0, 1, 0)
    assert equivalence(np.full(10, .5))[0] > .99
    table = equivalences(made(0), baseline='m0', samples=500)
    assert len(table) == 4 and np.allclose(table[['better', 'equivalent', 'worse']].sum(axis=1), 1)


# ---- benchmark, families, robust summaries

def trainings(seed=0, tasks=6, methods=('a', 'b'), seeds=3, b=50):
    rng = np.random.default_rng(seed)
    return pd.DataFrame([dict(task=f't{t}', method=m, seed=s, value=(v := rng.random()), replicates=v + .01 * rng.normal(size=b))
                         for t in range(tasks) for m in methods for s in range(seeds)])


def test_families_are_averaged_first():
    table, families = trainings(), {'t0': 'f', 't1': 'f', 't2': 'f'}
    bench = benchmark(table, families=families)
    blocks = bench.blocks()
    assert list(blocks.index) == ['f', 't3', 't4', 't5'] and list(bench.blocks('task').index) == [f't{i}' for i in range(6)]
    for m in 'ab':
        part = table[(table['method'] == m) & table['task'].isin(families)]
        assert blocks.loc['f', m] == pytest.approx(part['value'].mean())
        first = part[part['seed'] == 1]
        folded = bench.by_family()
        assert folded.values[m][1, 0] == pytest.approx(first['value'].mean())
        np.testing.assert_allclose(folded.replicates[m][1, 0], np.mean(list(first['replicates']), 0))
    with pytest.raises(ValueError, match="'family' or 'task'"): bench.blocks('familie')


def test_smaller_is_better_turns_the_sign():
    table = trainings()
    bench = benchmark(table, smaller_is_better=('t0',))
    assert (bench.blocks('task').loc['t0'] == -benchmark(table).blocks('task').loc['t0']).all()
    assert np.allclose(bench.replicates['a'][:, 0], -benchmark(table).replicates['a'][:, 0])
    with pytest.raises(DataError, match="family 'f' holds metrics"):
        benchmark(table, families={'t0': 'f', 't1': 'f'}, smaller_is_better=('t0',))


def test_benchmark_refuses_holes():
    table = trainings()
    with pytest.raises(DataError, match="method 'b' has no value on 't4'"):
        benchmark(table[(table['task'] != 't4') | (table['method'] != 'b')])
    with pytest.raises(DataError, match="method 'a' has 2 trainings on 't2' and 3 on 't5'"):
        benchmark(table[(table['task'] != 't2') | (table['method'] != 'a') | (table['seed'] > 0)])
    with pytest.raises(DataError, match="method 'a' has a value on 't0' that is NaN"):
        benchmark(table.assign(value=table['value'].where(table.index != 0)))
    single = table[table['seed'] == 0]
    with pytest.raises(DataError, match='one training and no replicates'): aggregate(benchmark(single.drop(columns='replicates')))
    assert len(aggregate(benchmark(single), by='task', resamples=50)) == 2


def test_undefined_resamples_are_drawn_again():
    table = trainings()
    table.at[0, 'replicates'] = np.r_[np.nan, table.at[0, 'replicates'][1:-1], np.nan]
    found = benchmark(table).replicates['a'][0, 0]
    assert np.isfinite(found).all() and found[0] == found[1] and found[-1] == found[-2]


def test_interquartile_mean_equals_scipy():
    x = np.random.default_rng(0).random((7, 3, 9))
    np.testing.assert_allclose(interquartile_mean(x), [scipy_stats.trim_mean(o.ravel(), .25) for o in x], atol=1e-12)


def test_improvement_is_the_mann_whitney_share():
    rng = np.random.default_rng(0)
    x, y = rng.random((4, 6)).round(1), rng.random((3, 6)).round(1)
    shares = [scipy_stats.mannwhitneyu(x[:, t], y[:, t]).statistic / 12 for t in range(6)]
    assert improvement(x, y) == pytest.approx(np.mean(shares)) and improvement(x, y) + improvement(y, x) == pytest.approx(1)
    assert improvement(x, x) == .5


def test_profile_is_a_share_of_results():
    x = np.random.default_rng(0).random((4, 6))
    np.testing.assert_allclose(profile(x, [.2, .7, 2]), [np.mean([v > t for v in x.ravel()]) for t in (.2, .7, 2)])
    curves = profiles(benchmark(trainings()), np.linspace(0, 1, 21), by='task', resamples=200)
    for _, part in curves.groupby('method'):
        assert part['value'].is_monotonic_decreasing and (part['low'] <= part['value']).all() and (part['value'] <= part['high']).all()


def test_redraw_stays_in_its_block_and_shares_patients():
    bench = benchmark(trainings().drop(columns='replicates'))
    drawn = redraw(bench, resamples=300, seed=1)
    for m, o in drawn.items():
        for t in range(6): assert set(o[:, :, t].ravel()) == set(bench.values[m][:, t])
    assert (redraw(bench, resamples=300, seed=1)['a'] == drawn['a']).all()
    assert (redraw(bench, resamples=300, seed=2)['a'] != drawn['a']).any() and (drawn['a'] != drawn['b']).any()
    shared = np.random.default_rng(0).normal(size=50)
    table = trainings(seeds=1)
    table = table.assign(replicates=[v + shared for v in table['value']])
    gaps = improvements(benchmark(table), by='task', resamples=50)
    assert gaps['low'].item() == gaps['high'].item() == gaps['value'].item()  # the same patients in both: nothing varies


def test_bootstrap_standard_error_of_a_mean():
    "Of S values per block: the textbook standard error times sqrt(1 − 1/S)."
    table = trainings(tasks=8, methods=('a', 'b'), seeds=10).drop(columns='replicates')
    bench = benchmark(table)
    draws = redraw(bench, resamples=20_000)['a'].mean((-1, -2))
    assert draws.std() == pytest.approx(np.sqrt((bench.values['a'].var(0) / 10).mean() / 8), rel=.03)


def test_aggregate_covers():
    "The interval of the mean over fixed blocks covers with eight trainings; 200 repetitions."
    hits = 0
    for s in range(200):
        rng = np.random.default_rng(s)
        rows = [dict(task=t, method=m, seed=i, value=.5 + .05 * t + .1 * rng.normal()) for t in range(6) for m in 'ab' for i in range(8)]
        found = aggregate(benchmark(pd.DataFrame(rows)), lambda x: x.mean((-1, -2)), resamples=300).set_index('method').loc['a']
        hits += found['low'] <= .625 <= found['high']
    assert hits / 200 >= .88


# ---- three standard deviations

def test_variance_parts_equal_statsmodels_anova():
    "Without sampling noise the components are those of the two-way analysis of variance."
    import statsmodels.api as sm
    from statsmodels.formula.api import ols
    y = np.random.default_rng(0).normal(size=(4, 5)) + np.arange(4)[:, None] + 2 * np.arange(5)
    long = pd.DataFrame([dict(s=s, p=p, y=y[s, p]) for s in range(4) for p in range(5)])
    square = sm.stats.anova_lm(ols('y ~ C(s) + C(p)', long).fit())
    square = square['sum_sq'] / square['df']
    found = variance_parts(y, y[..., None] + np.zeros(30))
    assert found['rest'] == pytest.approx(square['Residual']) and found['sampling'] == pytest.approx(0)
    assert found['seed'] == pytest.approx((square['C(s)'] - square['Residual']) / 5)
    assert found['prompt'] == pytest.approx((square['C(p)'] - square['Residual']) / 4)


def test_variance_parts_with_one_prompt_are_those_of_stats():
    rng = np.random.default_rng(0)
    values = rng.random((3, 1))
    replicates = values[..., None] + .1 * rng.normal(size=(3, 1, 200))
    from medcl_study.stats import seed_variance
    found = variance_parts(values, replicates)
    assert found['seed'] == pytest.approx(seed_variance(values[:, 0], replicates[:, 0])) and np.isnan(found['prompt'])
    assert np.isnan(variance_parts(values[:1], replicates[:1])['seed']) and np.isnan(found['rest'])


@pytest.mark.parametrize('sd', [(.02, 0, 0, 0), (.02, .03, 0, 0), (.01, 0, .04, 0), (.03, .02, .02, .02)])
def test_variance_parts_recover_what_was_simulated(sd):
    found = []
    for i in range(150):
        rng = np.random.default_rng(i)
        truth = sd[1] * rng.normal(size=(3, 1)) + sd[2] * rng.normal(size=4) + sd[3] * rng.normal(size=(3, 4))
        values = truth + sd[0] * (.8 * rng.normal() + .6 * rng.normal(size=(3, 4)))
        found.append(variance_parts(values, values[..., None] + sd[0] * (.8 * rng.normal(size=100) + .6 * rng.normal(size=(3, 4, 100)))))
    mean = pd.DataFrame(found).mean()
    np.testing.assert_allclose(mean[['sampling', 'seed', 'prompt', 'rest']], np.square(sd), atol=2.5e-4)


def test_spread_of_prediction_tables():
    rng, task = np.random.default_rng(0), Task('opacity', 'binary', ('no', 'yes'))
    ids, y = [f'i{i}' for i in range(200)], rng.integers(0, 2, 200)
    def rows(run, prompt):
        x = y + rng.normal(size=200)
        return prediction_rows(task, ids, y, np.stack([-x, x], 1), protocol='zeroshot', run=run, prompt_set=prompt)
    frames = [rows(f'r{s}', p) for s in range(3) for p in ('a', 'b')]
    found = spread(concat_predictions(frames), resamples=200)
    assert found.values.shape == (3, 2) and list(found.values.columns) == ['a', 'b']
    alone = spread(concat_predictions(frames[::2]), resamples=200)
    assert alone.seed_sd == pytest.approx(mean_over_runs(frames[::2], resamples=200).seed_sd) and np.isnan(alone.prompt_sd)
    with pytest.raises(DataError, match="run 'r2' was not scored with the prompts 'b'"): spread(concat_predictions(frames[:5]))
