"""How many phantoms and reports a second? Run: python tests/benchmarks/phantoms.py [--processes 2]

Renders batches of 64 in each process (one thread each), and writes reports, by modality and mixed. Rates are of all processes
together: `wall` by the clock, `cpu` per second of processor time, which other programs on the machine disturb less.
"""
import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np  # noqa: E402

from medcl_study.data.phantom import MODALITIES, phantom_corpus  # noqa: E402


def spent(job):
    "Return (seconds by the clock, processor seconds) that a job takes, its first batch left out."
    modality, size, count, seed = job
    corpus = phantom_corpus(modality, count + 64, size=size or 64, seed=seed)
    if size: corpus.images(np.arange(64))
    wall, cpu = time.perf_counter(), time.process_time()
    if size:
        for start in range(64, count + 64, 64): corpus.images(np.arange(start, min(start + 64, count + 64)))
    else: len(corpus.texts)
    return time.perf_counter() - wall, time.process_time() - cpu


def rates(pool, processes, modality, size, count):
    "Measure one row of the table."
    times = list(pool.map(spent, [(modality, size, count, seed) for seed in range(processes)]))
    wall, cpu = max(o for o, _ in times), np.mean([o for _, o in times])
    what = f'images of {size} px' if size else 'reports'
    print(f'{modality:12}{what:18}{processes*count/wall:10,.0f} wall /s{processes*count/cpu:10,.0f} cpu /s')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--all', action='store_true', help='every modality by itself, too')
    options = parser.parse_args()
    with ProcessPoolExecutor(options.processes) as pool:
        for modality in (*(MODALITIES if options.all else ()), 'mixed'):
            for size, count in ((64, 1024), (224, 192), (0, 5000)): rates(pool, options.processes, modality, size, count)


if __name__ == '__main__': main()
