"""Do 95 % intervals cover, and do tests reject at their level? Run: python tests/benchmarks/coverage.py --workers 2

Simulates test sets whose population value is known in closed form, by quadrature, or from a million samples, estimates each
metric with its interval as `predictions` does, and counts how often the interval holds the truth. Writes every finished cell
to reports/coverage/coverage.json and, started again, leaves out what is there.
"""
import argparse
import functools
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np  # noqa: E402
from scipy.integrate import quad  # noqa: E402
from scipy.special import expit  # noqa: E402
from scipy.stats import norm  # noqa: E402

from medcl_study.core import generator, write_json  # noqa: E402
from medcl_study.metrics import METRICS, auroc  # noqa: E402
from medcl_study.significance import delong, from_estimate, mcnemar, paired_permutation, permutation_test  # noqa: E402
from medcl_study.stats import estimate, paired_difference, resample  # noqa: E402

GAP, RANK, SPREAD = 1.5, 1.5, 1.5


@dataclass(frozen=True)
class Design:
    "A test set: how many patients with how many images, how alike these are, and how the classes fall."
    groups: int
    per: int = 1 # images of each
    correlation: float = 0. # of two images of a patient
    mix: str = 'drawn' # 'drawn': each patient's class is random; 'given': the counts are fixed; 'images': random per image
    rare: bool = False # a class of 10 %

    @property
    def name(self):
        words = [f'{self.groups}', f'× {self.per}' * (self.per > 1), 'rare' * self.rare, {'drawn': '', 'given': 'given', 'images': 'mixed'}[self.mix]]
        return ' '.join(o for o in words if o)


# ---- data whose truth is known: (rng, design) -> scores, targets, groups, sides (n, m) bool of the classes that count

def noise(rng, design, *shape):
    "Normal noise that the images of a patient share in part; its marginal distribution is standard normal."
    shared = np.repeat(rng.normal(size=(design.groups, *shape)), design.per, 0)
    return design.correlation**.5 * shared + (1 - design.correlation)**.5 * rng.normal(size=shared.shape)


def labels(rng, design, shares):
    if design.mix == 'images': return rng.choice(len(shares), design.groups * design.per, p=shares)
    if design.mix == 'drawn': own = rng.choice(len(shares), design.groups, p=shares)
    else: own = np.searchsorted(np.round(np.cumsum(shares) * design.groups), np.arange(design.groups), side='right')
    return np.repeat(own, design.per)


def shares_of(kind, design):
    if kind == 'binary': return np.array([.9, .1] if design.rare else [.7, .3])
    return np.array([.6, .3, .1] if design.rare else [.5, .3, .2])


def owners(design): return np.repeat(np.arange(design.groups), design.per)


def binary(rng, design):
    "One score, as the logits of an overconfident model: 1.5 times too large."
    shares = shares_of('binary', design)
    y = labels(rng, design, shares)
    logit = GAP * (noise(rng, design) + GAP * y) - GAP**2 / 2 + np.log(shares[1] / shares[0])
    return np.stack([0 * logit, 1.5 * logit], 1), y, owners(design), np.stack([y == 0, y == 1], 1)


def multiclass(rng, design):
    "Three scores, of which the target's is higher by GAP on average."
    y = labels(rng, design, shares_of('multiclass', design))
    return GAP * (noise(rng, design, 3) + GAP * np.eye(3)[y]), y, owners(design), y[:, None] == np.arange(3)


def ranks(rng, design):
    "Ranks of the best positive among 500, logarithmically normal; hits are rare in the rare design."
    rank = np.ceil(np.exp(RANK + 2 * design.rare + SPREAD * noise(rng, design))).clip(1, 500)
    return rank[:, None], np.tile([1, 500], (len(rank), 1)), owners(design), None


def masks(rng, design):
    "Lesions of very different size, missed in part; some images hold none, most of them in the rare design."
    size, found, extra, there = noise(rng, design, 4).T
    true = np.where(there > (1.04 if design.rare else -.84), np.ceil(np.exp(6 + .8 * size)), 0)
    common = np.floor(true * expit(1.2 + found))
    said = np.where(true > 0, common + np.ceil(true * expit(-1.5 + extra)), np.where(found > .5, np.ceil(np.exp(3 + extra)), 0))
    hd95 = np.where((true > 0) | (said > 0), np.where((true > 0) & (said > 0), np.exp(2 + .7 * extra - .3 * found), 90.5), 0)
    targets = np.stack([0 * true, true, 0 * true + 4096], 1).astype(int)
    return np.stack([common, said, hd95], 1), targets, owners(design), true[:, None] > 0


def grounding(rng, design):
    y, (hit, contrast, overlap) = labels(rng, design, shares_of('multiclass', design)), noise(rng, design, 3).T
    scores = np.stack([hit > y * .5 - 1, 1 + .8 * contrast, expit(overlap - .5)], 1).astype(float)
    return scores, np.stack([y, 0 * y + 4, 0 * y + 49], 1), owners(design), y[:, None] == np.arange(3)


def vqa(rng, design):
    (right, sure), closed = noise(rng, design, 2).T, rng.random(design.groups * design.per) < .6
    said = np.where(right > -.6 + .8 * ~closed, 0, 1)
    return np.stack([said, expit(sure)], 1), np.stack([0 * said, closed], 1).astype(int), owners(design), None


def boxes(rng, design):
    "Lesions of one class, found with a score and a shift that share the patient; and false alarms."
    scores, targets = [], []
    for hit, shift, score, alarm in noise(rng, design, 4):
        true, said = [], []
        for _ in range(rng.poisson(1.3)):
            x, y, side = rng.integers(500, 7500), rng.integers(500, 7500), rng.integers(800, 1800)
            true += [0, x, y, x + side, y + side]
            if hit + rng.normal() > -1:
                move = int(side * .25 * abs(.6 * shift + .8 * rng.normal()))
                said += [0, expit(1 + score + rng.normal()), x + move, y, x + side + move, y + side]
        for _ in range(rng.poisson(np.exp(.6 * alarm - .5))):
            x, y = rng.integers(0, 8500, 2)
            said += [0, expit(-.5 + rng.normal()), x, y, x + 1200, y + 1200]
        targets.append(np.array(true, int)); scores.append(np.array(said, float))
    return scores, targets, owners(design), np.array([len(o) > 0 for o in targets])[:, None]


DATA = {o.__name__: o for o in (binary, multiclass, ranks, masks, grounding, vqa, boxes)}


# ---- truth

def closed_form(kind, metric, design):
    "The population value by formula or quadrature, where there is one; else None."
    if kind == 'ranks' and metric.startswith('recall_at_'):
        return norm.cdf((np.log(int(metric[10:])) - RANK - 2 * design.rare) / SPREAD)
    if kind == 'binary':
        prevalence = shares_of('binary', design)[1]
        def precision(t): return prevalence * norm.sf(t - GAP) / (prevalence * norm.sf(t - GAP) + (1 - prevalence) * norm.sf(t))
        if metric == 'auroc': return norm.cdf(GAP / 2**.5)
        if metric == 'auprc': return quad(lambda t: norm.pdf(t - GAP) * precision(t), -8, 10, limit=200)[0]
    if kind == 'multiclass':
        right = quad(lambda t: norm.pdf(t - GAP) * norm.cdf(t)**2, -8, 10)[0]
        shares = shares_of('multiclass', design)
        said = shares * right + (1 - shares) * (1 - right) / 2
        if metric in ('accuracy', 'balanced_accuracy'): return right
        if metric == 'macro_f1': return float(np.mean(2 * shares * right / (shares + said)))


@functools.cache
def truth(kind, metric, design):
    "The population value; from a million images, each of its own patient (boxes: 6,000), where there is no formula."
    known = closed_form(kind, metric, design)
    if known is not None: return float(known), 'closed form'
    scores, targets, *_ = crowd(kind, design.rare)
    return float(METRICS[metric].function(scores, targets)), f'{len(scores):,} images'


@functools.lru_cache(2)
def crowd(kind, rare):
    return DATA[kind](generator('truth', kind, rare), Design(6_000 if kind == 'boxes' else 1_000_000, mix='given', rare=rare))


# ---- coverage

def interval(metric, scores, targets, sides, draws, groups):
    "The estimate as `predictions` makes it."
    row = METRICS[metric]
    statistic = row.prepare(scores, targets) if row.prepare else lambda w: row.function(scores, targets, weights=w)
    bounded = row.bounds == (0, 1) and not (row.share or row.mean) and sides is not None
    trials = min(len(np.unique(groups[o])) for o in sides.T if o.any()) if bounded else None
    return estimate(statistic, draws, share=row.share, trials=trials, smooth=row.smooth, distance=row.floor is not None)


def coverage(kind, metrics, design, *, repeats, resamples=500, images=False):
    "Measure how often the intervals of some metrics hold the truth; `images` resamples images as if each were a patient."
    start, kept, undefined = time.perf_counter(), {o: [] for o in metrics}, dict.fromkeys(metrics, 0)
    for r in range(repeats):
        scores, targets, groups, sides = DATA[kind](generator('coverage', kind, asdict(design), r), design)
        if images: groups = np.arange(len(groups))
        strata = targets if kind in ('binary', 'multiclass') else None
        draws = resample(groups, strata, resamples=resamples, seed=r)
        for metric in metrics:
            try: e = interval(metric, scores, targets, sides, draws, groups)
            except ValueError: undefined[metric] += 1
            else: kept[metric].append((e.value, e.low, e.high, e.method, e.cautions))
    return [cell(kind, metric, design, kept[metric], undefined[metric], resamples, images, time.perf_counter() - start)
            for metric in metrics]


def cell(kind, metric, design, kept, undefined, resamples, images, seconds):
    value, how = truth(kind, metric, Design(60, rare=design.rare))
    found, low, high = np.array([o[:3] for o in kept]).T
    covers = float(((low <= value) & (value <= high)).mean())
    methods = [o[3] for o in kept]
    return {'kind': kind, 'metric': metric, 'design': design.name, **asdict(design), 'resampled': 'images' if images else 'groups',
            'repeats': len(kept), 'undefined': undefined, 'resamples': resamples, 'truth': value, 'truth_from': how,
            'coverage': covers, 'margin': 1.96 * (max(covers * (1 - covers), .0475) / len(kept))**.5,
            'above': float((low > value).mean()), 'below': float((high < value).mean()), 'width': float((high - low).mean()),
            'bias': float(found.mean() - value), 'sd': float(found.std()), 'seconds': round(seconds, 1),
            'methods': {o: methods.count(o) / len(kept) for o in sorted(set(methods))},
            'cautioned': float(np.mean([bool(o[4]) for o in kept]))}


# ---- do tests reject as often as they say, if there is nothing to find?

def pair(rng, design):
    "Two models of one quality, that share half of their noise and each half of it among a patient's images."
    y = labels(rng, design, np.array([.6, .4]))
    shared, first, second = (noise(rng, design) for _ in range(3))
    scores = GAP * y + (np.stack([first, second]) + shared) / 2**.5
    return scores, y, owners(design)


def right(scores, y): return (scores > GAP / 2) == (y == 1)
def of_delong(scores, y, groups, seed): return delong(*scores, y, groups, clustered=True).p
def of_delong_images(scores, y, groups, seed): return delong(*scores, y).p
def of_mcnemar(scores, y, groups, seed): return mcnemar(*right(scores, y)).p
def of_permutation(scores, y, groups, seed): return paired_permutation(*right(scores, y), groups, resamples=499, seed=seed).p


def of_swapped_areas(scores, y, groups, seed):
    both = np.concatenate(scores)
    return permutation_test(lambda w: auroc(both, np.tile(y, 2), weights=w), groups, resamples=499, seed=seed)


def of_bootstrap(scores, y, groups, seed):
    ways = [lambda w, s=s: auroc(s, y, weights=w) for s in scores]
    return from_estimate(paired_difference(*ways, resample(groups, y, resamples=500, seed=seed))).p


_PLAIN, _CLUSTERED = Design(60), Design(60, 4, .5)
TESTS = {'DeLong': (of_delong, _PLAIN), 'DeLong, clustered': (of_delong, _CLUSTERED), 'McNemar': (of_mcnemar, _PLAIN),
         'McNemar, 200': (of_mcnemar, Design(200)), 'permutation': (of_permutation, _PLAIN),
         'permutation by patient': (of_permutation, _CLUSTERED), 'permutation of AUROC by patient': (of_swapped_areas, _CLUSTERED),
         'paired bootstrap': (of_bootstrap, _PLAIN), 'paired bootstrap by patient': (of_bootstrap, _CLUSTERED)}
IGNORANT = {'DeLong that ignores patients': (of_delong_images, _CLUSTERED), 'McNemar that ignores patients': (of_mcnemar, _CLUSTERED)}


def rejection(name, *, repeats):
    "Measure how often a test finds a difference between two models of one quality, at 5 %."
    (test, design), start = (TESTS | IGNORANT)[name], time.perf_counter()
    found = [test(*pair(generator('rejection', asdict(design), r), design), r) < .05 for r in range(repeats)]
    share = float(np.mean(found))
    return {'test': name, 'design': design.name, **asdict(design), 'repeats': repeats, 'rejected': share,
            'margin': 1.96 * (max(share * (1 - share), .0475) / repeats)**.5, 'seconds': round(time.perf_counter() - start, 1)}


def rejections(names, *, repeats): return [rejection(o, repeats=repeats) for o in names]


# ---- what is run

PLAIN, LARGE, CLUSTERED = Design(60), Design(200), Design(60, 4, .5)
MIXED, RARE, RARE_CLUSTERED, GIVEN = (Design(60, 4, .5, 'images'), Design(200, rare=True), Design(100, 3, .5, rare=True),
                                      Design(60, mix='given'))
FEW = [Design(20), Design(40), Design(20, 4, .5), Design(60, mix='given', rare=True)]
HEADLINE = {'binary': ('auroc', 'auprc'), 'multiclass': ('accuracy', 'balanced_accuracy', 'macro_f1'),
            'ranks': ('recall_at_5',), 'masks': ('dice', 'dice_per_image')}
ALL = {'binary': [PLAIN, LARGE, CLUSTERED, MIXED, RARE, RARE_CLUSTERED, GIVEN], 'ranks': [PLAIN, LARGE, CLUSTERED, RARE],
       'masks': [PLAIN, LARGE, CLUSTERED, RARE]}
ALL['multiclass'] = ALL['binary']
OTHER_KINDS = {'grounding': 'grounding', 'vqa': 'vqa', 'ranks': 'retrieval', 'masks': 'segmentation', 'binary': 'binary',
               'multiclass': 'multiclass', 'boxes': 'detection'}


def others(kind):
    "The metrics of a kind that are no headline; Recall@k for the smallest and a large k."
    names = [name for name, row in METRICS.items() if OTHER_KINDS[kind] in row.kinds and name not in HEADLINE.get(kind, ())]
    names = [o for o in names if not (kind == 'binary' and o in METRICS and 'multiclass' in METRICS[o].kinds and o in HEADLINE['multiclass'])]
    return tuple(o for o in names if o != 'accuracy_at_5' and (not o.startswith('recall_at_') or o in ('recall_at_1', 'recall_at_50')))


def units(scale=1.):
    "What is measured, the important first: (function, arguments, settings)."
    def times(repeats): return max(20, round(scale * repeats))
    todo = [(coverage, (k, HEADLINE[k], d), {'repeats': times(2000 if d.groups * d.per == 60 else 1000)})
            for k in HEADLINE for d in ALL[k]]
    todo += [(coverage, (k, HEADLINE[k], CLUSTERED), {'repeats': times(400), 'images': True}) for k in HEADLINE]
    few = [(k, d) for k in HEADLINE for d in FEW if k in ('binary', 'multiclass') or d.mix == 'drawn']
    todo += [(coverage, (k, HEADLINE[k], d), {'repeats': times(500)}) for k, d in few]
    todo += [(rejections, ((o,),), {'repeats': times(1000)}) for o in TESTS | IGNORANT]
    for kind in OTHER_KINDS:
        if not others(kind): continue
        repeats = 100 if kind == 'boxes' else 400 if kind in ('grounding', 'vqa', 'ranks') else 300
        todo += [(coverage, (kind, others(kind), d), {'repeats': times(repeats)}) for d in (PLAIN, CLUSTERED, Design(20))]
    return todo


def key(function, args, settings):
    design = [o.name if isinstance(o, Design) else list(o) if isinstance(o, tuple) else o for o in args]
    return json.dumps([function.__name__, *design, settings])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--scale', type=float, default=1., help='times the number of repetitions')
    parser.add_argument('--only', default='', help='units whose key holds this')
    parser.add_argument('--file', type=Path, default=Path('reports/coverage/coverage.json'))
    args = parser.parse_args()
    done = json.loads(args.file.read_text()) if args.file.exists() else {}
    todo = {key(*o): o for o in units(args.scale)}
    with ProcessPoolExecutor(args.workers) as pool:
        running = {pool.submit(function, *values, **settings): name for name, (function, values, settings) in todo.items()
                   if name not in done and args.only in name}
        for future in as_completed(running):
            done[running[future]] = future.result()
            write_json(args.file, done)
            for o in future.result(): print(o.get('metric', o.get('test')), o['design'], round(o.get('coverage', o.get('rejected')), 3), f"{o['seconds']} s", flush=True)


if __name__ == '__main__': main()
