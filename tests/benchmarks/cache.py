"""How much faster is an epoch from the packed cache than one that decodes? Run: python tests/benchmarks/cache.py

Writes 512-pixel JPEGs, then times, interleaved in shuffled order and by medians, (a) decoding and resizing to 224 pixels every
epoch, (b) the same with reduced decoding, and (c) reading shuffled batches of 64 from the packed cache. One thread each.
"""
import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from PIL import Image  # noqa: E402

from medcl_study.data.images import pack, read_image, resize, to_channels  # noqa: E402
from medcl_study.data.pairs import Corpus  # noqa: E402


def make_files(folder, n, channels):
    "Write `n` JPEGs of 512 pixels with the spectrum of natural images (amplitude falling as 1/frequency), and their table."
    rng, frequency = np.random.default_rng(0), np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.rfftfreq(512), indexing='ij'))
    for i in range(n):
        noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(channels, 512, 512))) / np.maximum(frequency, 1 / 512), axes=(-2, -1))
        pixels = np.clip(128 + 45 * noise / noise.std(), 0, 255).astype(np.uint8)
        Image.fromarray(pixels[0] if channels == 1 else np.moveaxis(pixels, 0, -1)).save(folder / f'{i}.jpg', quality=90)
    files = [f'{i}.jpg' for i in range(n)]
    frame = pd.DataFrame({'id': files, 'image': files, 'text': 'Chest.', 'labels': [()] * n, 'group': '', 'split': '', 'modality': ''})
    return Corpus(frame, name='benchmark', root=folder)


def epochs(corpus, cache, channels):
    "Return the three ways to go through the corpus once."
    paths, order = [o.image for o in corpus], np.random.default_rng(1).permutation(len(corpus))
    def decode(at_least): return lambda: [to_channels(resize(read_image(paths[i], at_least=at_least), 224), channels) for i in order]
    def packed():
        for rows in np.array_split(order, max(1, len(order) // 64)): cache.batch(rows)
    return {'decode': decode(None), 'decode, reduced scale': decode(224), 'packed cache': packed}


def measure(ways, repeats):
    "Time all ways `repeats` times in shuffled order; short ones are looped up to 0.2 s. Returns medians in seconds."
    seconds = {o: [] for o in ways}
    for name in random.Random(0).sample([*ways] * repeats, len(ways) * repeats):
        begin, loops = time.perf_counter(), 0
        while not loops or time.perf_counter() - begin < 0.2:
            ways[name]()
            loops += 1
        seconds[name].append((time.perf_counter() - begin) / loops)
    return {k: statistics.median(v) for k, v in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('-n', type=int, default=200, help='images')
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    for channels in (1, 3):
        with tempfile.TemporaryDirectory() as folder:
            corpus = make_files(Path(folder), args.n, channels)
            begin = time.perf_counter()
            cache = pack(corpus, Path(folder) / 'packed', size=224, channels=channels)
            built = time.perf_counter() - begin
            medians = measure(epochs(corpus, cache, channels), args.repeats)
        print(f'\n{"grey" if channels == 1 else "RGB"}, {args.n} images of 512 px to 224 px; packed once in {built:.1f} s')
        for name, s in medians.items(): print(f'  {name:22s} {args.n / s:12,.0f} images/s {medians["decode"] / s:10.1f} x')


if __name__ == '__main__': main()
