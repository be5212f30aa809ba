"""How long does an audit of 20,000 images take, and what does it find? Run: python tests/benchmarks/audit.py

Writes 224-pixel JPEGs of phantoms of all six modalities, 1 % of them as copies of others: half the same file under another
name, half resized and compressed again. Then audits them in two threads and reports seconds, memory, recall and false alarms.
"""
import argparse
import io
import json
import os
import resource
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from PIL import Image  # noqa: E402

from medcl_study.core import generator  # noqa: E402
from medcl_study.data.audit import audit, fingerprints  # noqa: E402
from medcl_study.data.pairs import Corpus  # noqa: E402
from medcl_study.data.phantom import MODALITIES, phantom_corpus  # noqa: E402


def jpeg(pixels, quality=90):
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(out, 'JPEG', quality=quality)
    return out.getvalue()


def copied(raw, rng):
    "Resize a picture to half to one and a half times its size, and compress it again."
    image = Image.open(io.BytesIO(raw))
    size = round(224 * rng.choice([.5, .75, 1, 1.5]))
    return jpeg(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)), int(rng.choice([50, 75, 90])))


def make_files(folder, n):
    "Write the files; return their table, with the name of the original in `copy_of`."
    copies, rng, rows = n // 100, generator('audit benchmark', n), []
    with ThreadPoolExecutor(2) as pool:
        for name, part in zip(MODALITIES, np.array_split(np.arange(n - copies), len(MODALITIES))):
            corpus = phantom_corpus(name, len(part), size=224, seed=0)
            for at in np.array_split(np.arange(len(part)), max(1, len(part) // 200)):
                for i, raw in zip(at, pool.map(jpeg, corpus.images(at))):
                    (folder/f'{name}_{i}.jpg').write_bytes(raw)
                    rows.append((f'{name}_{i}.jpg', '', ''))
    for k, i in enumerate(rng.choice(len(rows), copies, replace=False)):
        raw = (folder/rows[i][0]).read_bytes()
        (folder/f'copy_{k}.jpg').write_bytes(copied(raw, rng) if k % 2 else raw)
        rows.append((f'copy_{k}.jpg', rows[i][0], 'perceptual' if k % 2 else 'file'))
    frame = pd.DataFrame(rows, columns=['image', 'copy_of', 'kind'])
    return frame.assign(id=frame.image, text='', labels=None, group='', modality='', split=np.where(frame.copy_of == '', 'train', 'test'))


def score(frame, pairs):
    "Return recall per kind of copy, and the pairs that are no copies."
    planted = {frozenset(o): k for *o, k in frame[frame.copy_of != ''][['copy_of', 'image', 'kind']].itertuples(index=False)}
    found = {frozenset(o) for o in zip(pairs.id_a, pairs.id_b)}
    recall = {k: float(np.mean([o in found for o, kind in planted.items() if kind == k])) for k in ('file', 'perceptual')}
    return recall | {'false_alarms': len(found - set(planted))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('-n', type=int, default=20_000, help='images')
    parser.add_argument('--workers', type=int, default=2)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix='audit_'))
    try:
        frame = make_files(folder, args.n)
        corpus = Corpus(frame, name='benchmark', root=folder)
        marks = [time.perf_counter()]
        fingerprints(corpus, workers=args.workers)
        marks.append(time.perf_counter())
        found = audit(corpus, workers=args.workers)
        marks.append(time.perf_counter())
        seconds = dict(zip(('fingerprints', 'audit'), np.diff(marks).round(1).tolist()))
        print(json.dumps({'images': args.n, 'threads': args.workers, 'seconds': seconds, **score(frame, found.pairs),
                          'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
    finally: shutil.rmtree(folder)


if __name__ == '__main__': main()
