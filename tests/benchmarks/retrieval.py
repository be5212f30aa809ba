"""How long does retrieval over 50,000 x 50,000 take, and in how much memory? Run: python tests/benchmarks/retrieval.py

Ranks all texts for each image and all images for each text, exactly, through `evaluation.retrieval.retrieval`; an encoder that knows
its vectors stands in for a trained one, so that what is measured is the retrieval. Reports seconds and the peak of the whole process,
and writes reports/speed/records/retrieval.json.
"""
import argparse
import os
import resource
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '2')

import numpy as np  # noqa: E402
import torch  # noqa: E402

from medcl_study.core import environment, generator, write_json  # noqa: E402
from medcl_study.data.pairs import Corpus  # noqa: E402
from medcl_study.encoders.dual import Encoded  # noqa: E402
from medcl_study.evaluation.retrieval import retrieval  # noqa: E402
from medcl_study.predictions import Task, stacked  # noqa: E402

RECORD = Path(__file__).resolve().parents[2]/'reports'/'speed'/'records'/'retrieval.json'


class Known:
    "An encoder that looks its vectors up: a pair shares a direction, under noise."
    def __init__(self, n, width):
        shared, rng = generator('retrieval benchmark', 0).normal(size=(n, width)), generator('retrieval benchmark', 1)
        self.image, self.text = (torch.tensor(shared + 2.5 * rng.normal(size=shared.shape), dtype=torch.float32) for _ in range(2))

    def encode_image(self, images): return self._take(self.image, images.numpy().reshape(len(images), 4).view(np.int32)[:, 0])
    def encode_text(self, texts): return self._take(self.text, [int(o.removeprefix('Report ')) for o in texts])
    def _take(self, vectors, rows): return Encoded(torch.nn.functional.normalize(vectors[rows], dim=1), vectors[rows])


def corpus_of(n):
    import pandas as pd
    names = [f'{i}' for i in range(n)]
    frame = pd.DataFrame({'id': names, 'image': '', 'text': [f'Report {i}' for i in range(n)], 'labels': None, 'group': names, 'split': 'test',
                          'modality': ''})
    pixels = np.arange(n, dtype=np.int32).view(np.uint8).reshape(n, 1, 1, 4)
    return Corpus(frame, name='retrieval', pixels=pixels), pixels


def measure(n, width):
    corpus, pixels = corpus_of(n)
    encoder, task = Known(n, width), Task('retrieval', 'retrieval')
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    rows = retrieval(encoder, corpus, task, images=pixels)
    seconds = time.perf_counter() - started
    first = stacked(rows['scores'])[:, 0] == 1
    return {'pairs': n, 'width': width, 'seconds': round(seconds, 1), 'peak_mb': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            'peak_mb_before': round(before / 1024), 'recall_at_1': float(first.mean()), 'rows': len(rows)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', type=int, default=50_000)
    parser.add_argument('--width', type=int, default=256)
    parser.add_argument('--out', type=Path, default=RECORD)
    given = parser.parse_args()
    found = measure(given.pairs, given.width)
    write_json(given.out, {'format': 'medcl_study.retrieval_speed/1', **found, 'threads': torch.get_num_threads(), 'environment': environment()})
    print(found)


if __name__ == '__main__': main()
