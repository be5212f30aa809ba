"""MedMNIST: twelve sets, one reader: on twins, on malformed files, and, where MEDCL_DATA has one, on a real file."""
import os
import pickle
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medcl_study.core import DataError
from medcl_study.data.images import pack
from medcl_study.data.sets.medmnist import MEDMNIST, medmnist_twin, read_medmnist, read_medmnist_set
from medcl_study.data.text import PROMPTS, prompts_for

SPLITS = ('train', 'val', 'test')


def write(path, labels, images=None, **more):
    "Write three equal splits."
    images = np.zeros((len(labels), 8, 8), np.uint8) if images is None else images
    np.savez_compressed(path, **{f'{s}_{k}': v for s in SPLITS for k, v in (('images', images), ('labels', labels))} | more)
    return path


@pytest.fixture(scope='module')
def twins(tmp_path_factory):
    folder = tmp_path_factory.mktemp('medmnist')
    for name in MEDMNIST: medmnist_twin(folder, 60, 0, name=name, size=64)
    return folder


# ---- the rows

@pytest.mark.parametrize('name', MEDMNIST)
def test_twin_reads_like_the_file(twins, name):
    o, corpus = MEDMNIST[name], read_medmnist_set(twins, name=name, size=64)
    assert corpus.source == 'twin' and corpus.classes == o.classes and len(corpus) == 60
    with np.load(twins/f'{name}_64.npz') as f: arrays = dict(f)
    stored = np.concatenate([arrays[f'{s}_images'] for s in SPLITS])
    assert all((corpus[i].image == stored[i]).all() for i in (0, 59, 29, 30, 44, 45)), 'pixels come as they are, untransformed'
    assert corpus.frame.split.value_counts().to_dict() == {'train': 30, 'valid': 15, 'test': 15} and corpus.frame.id.is_unique
    assert o.group == '' and set(corpus.frame.group) == {''}, 'no patient, lesion or scan is in the file'
    assert all(corpus.split(s).targets().sum(0).all() for s in ('train', 'valid', 'test'))


def test_twins_of_alike_sets_share_no_image(twins):
    names = ('organamnist', 'organcmnist', 'organsmnist', 'chestmnist', 'pneumoniamnist', 'breastmnist', 'octmnist', 'tissuemnist')
    seen = [image.tobytes() for o in names for image in read_medmnist_set(twins, name=o, size=64).pixels]
    assert len(set(seen)) == len(seen)


def test_twin_is_a_function_of_its_arguments(tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)): medmnist_twin(tmp_path/name, 24, seed, name='retinamnist', size=64)
    a, b, c = ((tmp_path/o/'retinamnist_64.npz').read_bytes() for o in 'abc')
    assert a == b != c


def test_positive_classes_are_the_ill_ones(twins):
    assert {n: o.classes[1] for n, o in MEDMNIST.items() if o.kind == 'binary'} == {'pneumoniamnist': 'pneumonia', 'breastmnist': 'malignant'}
    with np.load(twins/'breastmnist_64.npz') as f: numbers = np.concatenate([f[f'{s}_labels'] for s in SPLITS])[:, 0]
    assert (read_medmnist_set(twins, name='breastmnist', size=64).targets()[:, 1] == (numbers == 0)).all(), 'label 0 is malignant'


def test_grades_of_retinopathy_keep_their_order(twins):
    with np.load(twins/'retinamnist_64.npz') as f: grades = np.concatenate([f[f'{s}_labels'] for s in SPLITS])[:, 0]
    assert (read_medmnist_set(twins, name='retinamnist', size=64).targets().argmax(1) == grades).all()
    assert [o[:4] for o in MEDMNIST['retinamnist'].classes] == ['no a', 'mild', 'mode', 'seve', 'PDR,']


WORD = {'pathmnist': 'histolog', 'dermamnist': 'dermoscopy', 'octmnist': 'OCT', 'pneumoniamnist': 'chest', 'retinamnist': 'fundus',
        'breastmnist': 'breast ultrasound', 'bloodmnist': 'blood', 'tissuemnist': 'kidney', 'organamnist': 'CT', 'organcmnist': 'CT',
        'organsmnist': 'CT', 'chestmnist': 'chest'}


@pytest.mark.parametrize('name', MEDMNIST)
def test_prompts_are_those_of_the_modality(name):
    "Prompts looked up under a wrong key were ImageNet's, for all twelve sets."
    o = MEDMNIST[name]
    ours, released = (PROMPTS[p] for p in o.prompt_sets)
    assert any(WORD[name] in t for t in ours.templates)
    assert not any(t.startswith(('a photo of', 'a bad photo', 'itap')) for p in (ours, released) for t in p.templates)
    if name != 'pathmnist': assert not any('histo' in t or 'patholog' in t for p in (ours, released) for t in p.templates)
    words = [tuple(w) for w in prompts_for(o.classes, ours)]
    assert len(set(words)) == len(o.classes)
    if o.kind != 'multiclass': assert len({tuple(w) for w in prompts_for(o.classes, ours, negative=True)} - set(words)) == len(o.classes)


def test_rows_tell_where_files_lie_and_what_leaks():
    assert len({o.files[0].md5 for o in MEDMNIST.values()}) == 12
    assert all(o.files[0].url.endswith(f'/{n}_224.npz?download=1') and o.folder == 'medmnist' for n, o in MEDMNIST.items())
    assert {'DermaMNIST-C', 'DermaMNIST-E'} <= set(MEDMNIST['dermamnist'].note.replace(',', '').split())
    assert MEDMNIST['dermamnist'].licence == 'CC BY-NC 4.0' and sum(MEDMNIST['tissuemnist'].counts.values()) == 236386


# ---- images stay in the file

def test_memory_does_not_grow_with_the_file(tmp_path):
    write(tmp_path/'a.npz', np.zeros((600, 1), np.uint8), np.zeros((600, 224, 224), np.uint8))
    tracemalloc.start()
    corpus = read_medmnist(tmp_path/'a.npz', classes='ab', name='a')
    for i in range(len(corpus)): corpus.pixels[i]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 2**20 < np.prod(corpus.pixels.shape) / 10


def test_many_rows_are_indexed_in_two_seconds(tmp_path):
    write(tmp_path/'a.npz', np.arange(80_000)[:, None] % 2, np.zeros((80_000, 1, 1), np.uint8))
    start = time.process_time()
    assert len(read_medmnist(tmp_path/'a.npz', classes='ab', name='a')) == 240_000
    assert time.process_time() - start < 2


def test_images_are_selected_travel_and_hash(tmp_path, twins):
    images = read_medmnist_set(twins, name='bloodmnist', size=64).pixels
    some = images[np.array([59, 3, 31])]
    assert (some[0] == images[59]).all() and (pickle.loads(pickle.dumps(some))[2] == images[31]).all() and len(images[:7]) == 7
    assert images.hash() == read_medmnist_set(twins, name='bloodmnist', size=64).pixels.hash() != some.hash()
    with pytest.raises(IndexError): images[60]
    os.utime(shutil.copy(twins/'bloodmnist_64.npz', tmp_path), (0, 0)) # a copy of another day is the same file
    assert read_medmnist_set(tmp_path, name='bloodmnist', size=64).pixels.hash() == images.hash()


def test_lazy_and_held_images_pack_alike(twins, tmp_path):
    lazy = read_medmnist_set(twins, name='octmnist', size=64)
    o = MEDMNIST['octmnist']
    held = read_medmnist(twins/'octmnist_64.npz', classes=o.classes, name='octmnist', in_memory=True)
    a, b = (pack(c, tmp_path/n, size=32, channels=1) for n, c in (('lazy', lazy), ('held', held)))
    assert (a.batch(range(60)) == b.batch(range(60))).all() and (held.frame[['id', 'labels', 'split']] == lazy.frame[['id', 'labels', 'split']]).all().all()


# ---- files that do not fit

@pytest.mark.parametrize('labels, images, message', [
    (np.array([[0], [2]]), None, r'row 2: train_labels do not fit the 2 classes'),
    (np.array([[0], [-1]]), None, r'row 2: train_labels do not fit'),
    (np.array([[0.], [.5]]), None, 'do not fit the 2 classes'),
    (np.array([[0, 1, 1], [0, 0, 0]]), None, 'do not fit the 2 classes'),
    (np.array([0, 1]), None, r'do not fit; expected \(n, 1\)'),
    (np.array([[0]]), np.zeros((2, 8, 8), np.uint8), 'do not fit; expected'),
    (np.array([[0], [0]]), np.zeros((2, 8, 8), np.float32), 'float32'),
    (np.array([[0], [0]]), np.zeros((2, 64), np.uint8), 'expected uint8'),
    (np.array([[0], ['a']], object), None, 'train_labels.* cannot be read'),
])
def test_arrays_that_do_not_fit_are_refused(tmp_path, labels, images, message):
    with pytest.raises(DataError, match=message): read_medmnist(write(tmp_path/'a.npz', labels, images), classes='ab', name='a')


def test_files_that_are_not_there_or_half_there(tmp_path, twins):
    with pytest.raises(DataError, match='pathmnist_224.npz: no such file'): MEDMNIST['pathmnist'].read(tmp_path)
    whole = (twins/'pathmnist_64.npz').read_bytes()
    (tmp_path/'pathmnist_224.npz').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(DataError, match='not a readable .npz file.*Download it again'): MEDMNIST['pathmnist'].read(tmp_path)
    (tmp_path/'pathmnist_224.npz').write_bytes(b'')
    with pytest.raises(DataError, match='zero bytes'): MEDMNIST['pathmnist'].read(tmp_path)
    (tmp_path/'pathmnist_224.npz').write_bytes(whole)
    with pytest.raises(DataError, match='images of 64 x 64 pixels; expected 224 x 224'): MEDMNIST['pathmnist'].read(tmp_path)


@pytest.mark.parametrize('key', [f'{s}_{k}' for s in SPLITS for k in ('images', 'labels')])
def test_missing_array_is_named(tmp_path, key):
    arrays = dict(np.load(write(tmp_path/'a.npz', np.array([[0], [1]]))))
    np.savez(tmp_path/'b.npz', **{k: v for k, v in arrays.items() if k != key}, extra=np.zeros(3))
    with pytest.raises(DataError, match=f"no array '{key}'; there are .*extra"): read_medmnist(tmp_path/'b.npz', classes='ab', name='b')


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(-2, 5), min_size=1, max_size=4), min_size=1, max_size=6))
def test_any_labels_are_read_or_refused(tmp_path, rows):
    "Whatever the numbers: each label is the class of its number, or the first row that has none is named."
    labels = np.array([(o * 4)[:len(rows[0])] for o in rows])
    path, names = write(tmp_path/'a.npz', labels), ('a', 'b', 'c')
    several = labels.shape[1] > 1
    fits = labels.shape[1] in (1, 3) and ((labels >= 0) & (labels <= (1 if several else 2))).all()
    if not fits:
        with pytest.raises(DataError, match='train_labels do not fit the 3 classes'): read_medmnist(path, classes=names, name='a')
        return
    wanted = labels if several else np.eye(3)[labels[:, 0]]
    assert (read_medmnist(path, classes=names, name='a').targets() == np.tile(wanted, (3, 1))).all()
    turned = read_medmnist(path, classes=names, numbering=names[::-1], name='a').targets()
    assert (turned == np.tile(wanted, (3, 1))[:, ::-1]).all()


# ---- a real file

@pytest.mark.skipif(not os.environ.get('MEDCL_DATA'), reason='MEDCL_DATA is not set: no real file is here')
def test_real_file_of_another_size(tmp_path):
    found = sorted(Path(os.environ['MEDCL_DATA']).glob('pneumoniamnist/pneumoniamnist*.npz'))
    if not found: pytest.skip('MEDCL_DATA holds no PneumoniaMNIST file of 28 pixels')
    (tmp_path/'pneumoniamnist.npz').symlink_to(found[0])
    corpus = read_medmnist_set(tmp_path, name='pneumoniamnist', size=28)
    assert corpus.source == 'real' and corpus.frame.split.value_counts().to_dict() == MEDMNIST['pneumoniamnist'].counts
    with np.load(found[0]) as f: images, labels = f['test_images'], f['test_labels'][:, 0]
    assert (corpus.split('test').targets()[:, 1] == labels).all() and 0 < labels.mean() < 1
    first = len(corpus) - len(images)
    assert all((corpus.pixels[first + i] == images[i]).all() for i in range(0, len(images), 50)) and images.std() > 10
