"""The public sample: its readers on a twin, and, where MEDCL_DATA names the real one, its known sizes and traps."""
import hashlib
import json
import os
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medcl_study.core import DataError
from medcl_study.data.pairs import ManifestError
from medcl_study.data.sets.sample import (
    SAMPLE_SETS, read_medmnist, sample_corpus, sample_manifest, sample_pairs, sample_prompts, write_sample_twin)
from medcl_study.data.text import prompts_for
from medcl_study.predictions import Task

IMAGE_SETS = [name for name, o in SAMPLE_SETS.items() if o.label]


@pytest.fixture(scope='module')
def twin(tmp_path_factory): return write_sample_twin(tmp_path_factory.mktemp('sample')/'twin', rows=48)


def digest(folder):
    return {o.relative_to(folder).as_posix(): hashlib.sha256(o.read_bytes()).hexdigest() for o in folder.rglob('*') if o.is_file()}


# ---- the twin

def test_twin_is_a_function_of_its_arguments(tmp_path):
    a, b, c = (digest(write_sample_twin(tmp_path/name, rows=8, seed=seed)) for name, seed in (('a', 0), ('b', 0), ('c', 1)))
    images = [o for o in a if o.endswith('.jpg')]
    jsons = [o for o in a if o.endswith(('.json', '.jsonl')) or o == 'TWIN']
    assert a.keys() == b.keys() == c.keys() and len(images) == 64
    assert all(a[o] == b[o] for o in images + jsons)
    assert all(a[o] != c[o] for o in images)


def test_twin_is_never_laid_over_the_real_sample(twin, tmp_path):
    write_sample_twin(twin, rows=48)  # over itself is fine
    (tmp_path/'pretrain_pairs.jsonl').write_text('{}')
    with pytest.raises(DataError, match='holds the real sample'): write_sample_twin(tmp_path)
    assert [o.name for o in tmp_path.iterdir()] == ['pretrain_pairs.jsonl']


@pytest.mark.parametrize('name', SAMPLE_SETS)
def test_every_split_of_the_twin_holds_every_class(twin, name):
    corpus, o = sample_corpus(name, root=twin), SAMPLE_SETS[name]
    assert corpus.source == 'twin' and set(corpus.frame.split) == {'train', 'valid', 'test'}
    for split in ('train', 'valid', 'test'):
        targets = corpus.split(split).targets()
        assert (targets.sum(0) > 0).all() if o.kind != 'multilabel' else targets.sum() > 0


# ---- the sets

@pytest.mark.parametrize('name', SAMPLE_SETS)
def test_table_row_makes_a_task_with_prompts(name):
    o = SAMPLE_SETS[name]
    task = Task(name=name, source='twin', **o.task_fields())
    assert task.classes == o.classes and task.prompt_set == next(iter(sample_prompts(name)))
    for prompt_set in sample_prompts(name).values():
        prompts = prompts_for(o.classes, prompt_set)
        assert len(prompts) == len(o.classes) and all(p for each in prompts for p in each)
    if o.kind == 'binary' or o.kind == 'multilabel':
        assert all(len(set(p)) == len(p) for p in prompts_for(o.classes, next(iter(sample_prompts(name).values()))))


def test_corpus_yields_what_the_files_hold(twin):
    corpus = sample_corpus('sample_medpix_region', root=twin)
    rows = [json.loads(o) for o in (twin/'medpix2'/'index.jsonl').read_text().splitlines()]
    for i in (0, 7, 47):
        sample = corpus[i]
        assert sample.id == rows[i]['id'] and sample.labels == (rows[i]['labels']['location_category'],)
        assert sample.image == twin/'medpix2'/rows[i]['image'] and sample.image.exists()
        assert (corpus.classes[corpus.targets()[i].argmax()],) == sample.labels


def test_missing_image_is_named_or_skipped_and_counted(tmp_path):
    twin = write_sample_twin(tmp_path/'twin', rows=8)
    (twin/'busi'/'images'/'0002.jpg').unlink()
    with pytest.raises(ManifestError, match='row 3: .*0002.jpg'): sample_corpus('sample_busi', root=twin)
    corpus = sample_corpus('sample_busi', root=twin, on_bad='skip')
    assert len(corpus) == 7 and corpus.report.row.tolist() == [3]


def test_unknown_class_in_the_index_is_refused(tmp_path):
    twin = write_sample_twin(tmp_path/'twin', rows=8)
    path = twin/'ham10000'/'index.jsonl'
    path.write_text(path.read_text().replace('"akiec"', '"AKIEC"'))
    with pytest.raises(ManifestError, match="label 'AKIEC' is not in the class list"): sample_corpus('sample_ham10000', root=twin)


def test_sample_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(DataError, match='no such manifest'): sample_corpus('sample_busi', root=tmp_path)
    with pytest.raises(DataError, match='no such file'): sample_corpus('sample_pneumoniamnist', root=tmp_path)
    monkeypatch.delenv('MEDCL_DATA', raising=False)
    with pytest.raises(DataError, match='MEDCL_DATA'): sample_corpus('sample_busi')


# ---- MedMNIST's layout

def medmnist(path, labels, images=None, **more):
    "Write three equal splits of 28-pixel images with these labels."
    images = np.zeros((len(labels), 28, 28), np.uint8) if images is None else images
    np.savez(path, **{f'{s}_{k}': v for s in ('train', 'val', 'test') for k, v in (('images', images), ('labels', labels))} | more)
    return path


def test_medmnist_reads_grey_colour_and_several_labels(tmp_path):
    corpus = read_medmnist(medmnist(tmp_path/'a.npz', np.array([[2], [0]])), classes='abc', name='a')
    assert corpus.frame.labels.tolist() == [('c',), ('a',)] * 3 and corpus[0].image.shape == (28, 28)
    assert corpus.frame.split.tolist() == ['train'] * 2 + ['valid'] * 2 + ['test'] * 2
    colour = np.arange(2 * 28 * 28 * 3, dtype=np.uint8).reshape(2, 28, 28, 3)
    corpus = read_medmnist(medmnist(tmp_path/'b.npz', np.array([[1, 0, 1], [0, 0, 0]]), colour), classes='abc', name='b')
    assert corpus.frame.labels.tolist() == [('a', 'c'), ()] * 3 and (corpus[1].image == colour[1]).all()
    assert corpus.targets()[:2].tolist() == [[1, 0, 1], [0, 0, 0]] and corpus.frame.id.is_unique


@pytest.mark.parametrize('labels, images, message', [
    (np.array([[3], [0]]), None, r'row 1: train_labels do not fit the 3 classes'),
    (np.array([[0, 2, 0], [0, 0, 0]]), None, r'row 1: train_labels do not fit'),
    (np.array([[0, 1], [0, 0]]), None, 'do not fit the 3 classes'),
    (np.array([[0]]), np.zeros((2, 28, 28), np.uint8), 'do not fit; expected'),
    (np.array([[0], [0]]), np.zeros((2, 28, 28), np.float32), 'float32'),
])
def test_medmnist_that_does_not_fit_is_refused(tmp_path, labels, images, message):
    with pytest.raises(DataError, match=message): read_medmnist(medmnist(tmp_path/'a.npz', labels, images), classes='abc', name='a')


def test_medmnist_that_is_no_npz_is_refused(tmp_path):
    (tmp_path/'a.npz').write_bytes(b'PK\x03\x04 not an archive')
    with pytest.raises(DataError, match='not a readable .npz'): read_medmnist(tmp_path/'a.npz', classes='ab', name='a')
    np.savez(tmp_path/'b.npz', train_images=np.zeros((1, 28, 28), np.uint8))
    with pytest.raises(DataError, match="no array 'train_labels'"): read_medmnist(tmp_path/'b.npz', classes='ab', name='a')


# ---- pairs and manifest

def test_vqa_rad_cases_leave_the_pairs_on_demand(twin):
    kept, fewer = sample_pairs(root=twin), sample_pairs(root=twin, drop_vqa_rad_cases=True)
    near = set(kept.frame.id[kept.frame.vqarad_neighbour_case])
    assert near and set(kept.frame.id) - set(fewer.frame.id) == near
    assert kept.hash() != fewer.hash()


def test_manifest_tells_no_caption(twin, tmp_path):
    for suffix in ('.csv', '.parquet'):
        frame = sample_manifest(tmp_path/f'manifest{suffix}', root=twin)
        assert list(frame) == ['id', 'split', 'uses', 'source', 'sha256', 'licence', 'tier'] and frame.id.is_unique
        texts = set(sample_pairs(root=twin).frame.text)
        assert not texts & set(frame.astype(str).to_numpy().ravel())
    assert pd.read_csv(tmp_path/'manifest.csv').equals(pd.read_parquet(tmp_path/'manifest.parquet'))
    with pytest.raises(ValueError, match='manifest.txt'): sample_manifest(tmp_path/'manifest.txt', root=twin)


# ---- the real sample

real = pytest.mark.skipif(not os.environ.get('MEDCL_DATA'), reason='MEDCL_DATA is not set: the sample of real images is not here')
SIZES = {'sample_busi': (478, 71, 139), 'sample_ham10000': (448, 64, 128), 'sample_lc25000_lung': (516, 75, 149),
         'sample_nih_cxr64': (680, 108, 211), 'sample_pneumoniamnist': (4708, 524, 624), 'sample_pocus_us': (273, 46, 83),
         'sample_medpix_region': (1618, 190, 198), 'sample_medpix_modality': (1618, 190, 198)}


@real
@pytest.mark.parametrize('name', SAMPLE_SETS)
def test_real_set(name):
    corpus = sample_corpus(name)
    if corpus.source == 'twin': pytest.skip('MEDCL_DATA names a twin')
    sizes = Counter(corpus.frame.split)
    assert tuple(sizes[o] for o in ('train', 'valid', 'test')) == SIZES[name]
    assert corpus.frame.groupby('group').split.nunique().max() == 1
    targets = corpus.targets()
    assert np.isfinite(targets).all() and (targets.sum(0) > 0).all()
    if SAMPLE_SETS[name].kind != 'multilabel': assert (targets.sum(1) == 1).all()
    for i in range(0, len(corpus), max(1, len(corpus) // 7)):
        image = corpus[i].image
        if not isinstance(image, np.ndarray): image = np.asarray(Image.open(image))
        assert image.dtype == np.uint8 and image.std() > 1


@real
def test_real_pairs_and_manifest(tmp_path):
    pairs = sample_pairs()
    if pairs.source == 'twin': pytest.skip('MEDCL_DATA names a twin')
    assert Counter(pairs.frame.split) == {'train': 2018, 'valid': 257, 'test': 318}
    assert len(sample_pairs(drop_vqa_rad_cases=True)) == len(pairs) - 286
    trained = pairs.split('train').frame
    for name in IMAGE_SETS:
        test = sample_corpus(name).split('test').frame
        groups = {f'{SAMPLE_SETS[name].folder}|{o}' for o in test.group}
        assert not set(test.id) & set(trained.id) and not groups & set(trained.group)
    frame = sample_manifest(tmp_path/'manifest.parquet')
    assert set(pairs.frame.id) <= set(frame.id) and frame.sha256.is_unique
    assert frame.source.str.contains('@').all() and (tmp_path/'manifest.parquet').stat().st_size < 2**20
