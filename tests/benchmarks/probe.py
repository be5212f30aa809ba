"""How much faster are probes fitted than by scikit-learn, at no worse an objective? Run: python tests/benchmarks/probe.py

Fits the whole grid of penalties on 5,000 features of width 512 whose spectrum falls as in trained encoders: with noisy labels,
nearly separable, and fourteen findings at once. All ways are timed in turns, in shuffled order; medians are kept, by the clock and
in processor time, which other programs on the machine disturb less. Objectives are computed afterwards, in 64 bits, on the features
as they are; accuracies on 2,000 further rows. Writes reports/speed/records/probe.json, in which rows of other cases stay.
"""
import argparse
import os
import random
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_expit, logsumexp
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from medcl_study.core import device_name, environment, read_json, write_json
from medcl_study.evaluation.logistic import Axes, _descend, _Problems, logistic_path
from medcl_study.evaluation.probe import PENALTIES

RECORD = Path(__file__).parents[2]/'reports'/'speed'/'records'/'probe.json'
CASES = { # name → labels, share of wrong ones, sharpness of the others, least ratio of processor times
    'noisy labels': dict(classes=10, wrong=.2, sharp=2., bar=8),
    'nearly separable': dict(classes=10, wrong=0., sharp=8., bar=1),
    'fourteen findings': dict(classes=14, wrong=.1, sharp=2., many=True, bar=8, penalties=(1, .1, .01, .001)),
}


def features(*, classes, wrong, sharp, many=False, n=5000, further=2000, d=512, seed=0, **_):
    "Draw standardised features (n + further, d) with variances falling as j^-1.5, and their labels."
    rng = np.random.default_rng(seed)
    z, turn = rng.normal(size=(n + further, d)), np.linalg.qr(rng.normal(size=(d, d)))[0]
    logit = sharp * z[:, :64] @ rng.normal(size=(64, classes)) / 8 # weak directions count as much as strong ones
    if many: y = (logit - 2 + rng.logistic(size=logit.shape) > 0).astype(int) ^ (rng.random(logit.shape) < wrong / 2)
    else:
        y = (logit + .5 * rng.gumbel(size=logit.shape)).argmax(1)
        other = rng.random(n + further) < wrong
        y[other] = rng.integers(classes, size=other.sum())
    x = z * np.arange(1, d + 1)**-.75 @ turn
    x = (x - x[:n].mean(0)) / x[:n].std(0)
    return x[:n], y[:n], x[n:], y[n:]


def by_scikit_learn(x, y, penalties, warm):
    "Fit the grid by scikit-learn, one finding after the other; returns (weights, biases, steps) of each penalty."
    found = []
    for column in ([y] if y.ndim == 1 else y.T):
        model, fits = LogisticRegression(tol=1e-4, max_iter=10_000, warm_start=warm), []
        for penalty in penalties:
            model.set_params(C=1 / (penalty * len(x))).fit(x, column)
            fits.append((model.coef_.T.copy(), model.intercept_.copy(), int(model.n_iter_.max())))
        found.append(fits)
    return [(np.concatenate([o[0] for o in each], 1), np.concatenate([o[1] for o in each]), sum(o[2] for o in each))
            for each in zip(*found)]


def by_path(x, y, penalties, **options):
    return [(o.weight, o.bias, o.steps) for o in logistic_path(Axes.of(x), y, penalties, **options)]


def side_by_side(x, y, penalties):
    "Fit all penalties at once, reading the features once for ten: what was not built."
    axes, k = Axes.of(x), y.max() + 1
    truth = torch.from_numpy(np.eye(k, dtype=np.float32)[y])[:, None].expand(-1, len(penalties), -1)
    ridge = F.pad(torch.tensor(penalties)[:, None, None].expand(-1, 1, axes.z.shape[1] - 1), (0, 1)).float()
    problems, w = _Problems(axes, truth, True), torch.zeros(len(penalties), k, axes.z.shape[1])
    w, _, _, first = _descend(problems, w, ridge, 1e-8, 1000, True)
    w, _, _, second = _descend(problems, w.double(), ridge.double(), 1e-8, 1000, True)
    return [(*axes.back(o), first + second) for o in w]


def objective(x, y, weight, bias, penalty):
    z = x @ weight + bias
    loss = (logsumexp(z, 1) - z[np.arange(len(y)), y]) if y.ndim == 1 else -log_expit(np.where(y, z, -z)).sum(1)
    return float(loss.mean() + penalty / 2 * (weight**2).sum())


def accuracy(x, y, weight, bias):
    z = x @ weight + bias
    return float((z.argmax(1) == y).mean() if y.ndim == 1 else ((z > 0) == y).mean())


def timed(ways, repeats):
    "Call all ways `repeats` times in shuffled order; returns what each gave, and medians of seconds by the clock and of the processor."
    samples, found = {o: [] for o in ways}, {}
    for name in random.Random(0).sample([*ways] * repeats, len(ways) * repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        found[name] = ways[name]()
        samples[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return found, {k: dict(zip(('wall', 'cpu'), map(statistics.median, zip(*o)))) for k, o in samples.items()}


def measure(name, case, repeats):
    "Compare the ways of one case."
    penalties = case.get('penalties', PENALTIES)
    x, y, x_test, y_test = features(**case)
    ways = {'ours': lambda: by_path(x, y, penalties), 'scikit-learn': lambda: by_scikit_learn(x, y, penalties, False),
            'scikit-learn, warm start': lambda: by_scikit_learn(x, y, penalties, True)}
    if y.ndim == 1: ways |= {'ours, not preconditioned': lambda: by_path(x, y, penalties, precondition=False),
                             'ours, side by side': lambda: side_by_side(x, y, penalties)}
    ways['ours']() # threads and libraries awake
    found, seconds = timed(ways, repeats)
    at = {k: [objective(x, y, w, b, o) for (w, b, _), o in zip(v, penalties)] for k, v in found.items()}
    right = {k: [accuracy(x_test, y_test, w, b) for w, b, _ in v] for k, v in found.items()}
    peers = [o for o in ways if o.startswith('scikit')]
    excess = max(a / b - 1 for o in peers for a, b in zip(at['ours'], at[o]))
    ratio = min(seconds[o]['cpu'] for o in peers) / seconds['ours']['cpu']
    differ = max(abs(a - b) for a, b in zip(right['ours'], right['scikit-learn']))
    return {'case': name, 'sizes': case | {'n': len(x), 'd': x.shape[1], 'penalties': penalties}, 'repeats': repeats,
            'threads': torch.get_num_threads(), 'load': os.getloadavg()[1], 'seconds': seconds, 'cpu_ratio': ratio,
            'wall_ratio': min(seconds[o]['wall'] for o in peers) / seconds['ours']['wall'],
            'steps': {k: [o[2] for o in v] for k, v in found.items()}, 'objective': at, 'accuracy': right,
            'excess_objective': excess, 'accuracy_difference': differ,
            'met': {'faster': ratio >= case['bar'], 'no worse objective': excess <= 1e-9, 'same accuracy': differ <= .002}}


def keep(path, row):
    "Write a row beside those of other cases on this machine."
    about = {'format': 'medcl_study.probe_speed/1', 'environment': environment(), 'kind': 'cpu', 'device': device_name()}
    old = read_json(path) if path.exists() else about | {'rows': []}
    machine = lambda o: o['device'].rpartition(',')[0] # without its threads, which each row tells
    rows = [o for o in old['rows'] if o['case'] != row['case']] if machine(old) == machine(about) else []
    write_json(path, about | {'rows': sorted([*rows, row], key=lambda o: [*CASES].index(o['case']))})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--cases', nargs='+', default=[*CASES], choices=CASES)
    parser.add_argument('--out', type=Path, default=RECORD)
    options = parser.parse_args()
    warnings.simplefilter('error') # a fit that does not converge is no fit
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        for name in options.cases:
            row = measure(name, CASES[name], options.repeats)
            keep(options.out, row)
            print(f'{name}: {row["cpu_ratio"]:.1f}× in processor time, {row["wall_ratio"]:.1f}× by the clock; objective above '
                  f'scikit-learn\'s by {row["excess_objective"]:.1e} at most; accuracy differs by {100 * row["accuracy_difference"]:.2f} '
                  f'points at most; {row["met"]}', flush=True)
            for k, o in row['seconds'].items(): print(f'  {k:28}{o["cpu"]:8.2f} s processor{o["wall"]:8.2f} s  steps {row["steps"][k]}')


if __name__ == '__main__': main()
