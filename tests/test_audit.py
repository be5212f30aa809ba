"""The audit: planted copies, leaks and repeated texts are found; nothing is found where nothing was planted; real images."""
import io
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medcl_study.core import DataError, generator
from medcl_study.data.audit import (
    KINDS, RADIUS, assert_disjoint, audit, fingerprints, flow, group_leaks, integrity, label_counts, near_codes, near_features,
    perceptual_codes, statistics)
from medcl_study.data.images import read_image
from medcl_study.data.pairs import Corpus, Question
from medcl_study.data.phantom import MODALITIES, phantom_corpus
from medcl_study.data.sets.questions import QUESTIONS, read_vqa_rad

SPLITS = ('train', 'valid', 'test')
EMPTY = {'text': '', 'labels': None, 'group': '', 'modality': '', 'split': 'train'}


def corpus_of(folder, files, name='planted', **columns):
    "A corpus of files: name → pixels or bytes."
    folder.mkdir(parents=True, exist_ok=True)
    for file, o in files.items():
        if isinstance(o, bytes): (folder/file).write_bytes(o)
        else: Image.fromarray(o.squeeze()).save(folder/file)
    names = list(files)
    return Corpus(pd.DataFrame({'id': names, 'image': names} | EMPTY | columns), name=name, root=folder)


def held(pixels, name='held', **columns):
    "A corpus of arrays."
    base = {'id': [f'{name}{i}' for i in range(len(pixels))], 'image': ''}
    return Corpus(pd.DataFrame(base | EMPTY | columns), name=name, pixels=pixels)


def copied(image, rng, quality=(50, 75, 90)):
    "The bytes of a resized and recompressed copy."
    size = [max(8, round(o * rng.choice([.5, .75, 1, 1.5]))) for o in image.shape[:2]]
    out = io.BytesIO()
    Image.fromarray(image.squeeze()).resize(size, Image.Resampling.BICUBIC).save(out, 'JPEG', quality=int(rng.choice(quality)))
    return out.getvalue()


def named(pairs): return {frozenset(o) for o in zip(pairs.id_a, pairs.id_b)}


# ---- planted copies are found, strangers are not

@pytest.mark.parametrize('modality', MODALITIES)
def test_planted_copies_are_found_in_every_modality(modality, tmp_path):
    images, rng = list(phantom_corpus(modality, 200, size=96, seed=3).images(np.arange(200))), generator('planted', modality)
    files = {f'{i}.png': o for i, o in enumerate(images)}
    chosen = rng.choice(200, 60, replace=False)
    for k, i in enumerate(chosen):
        files[f'{i}.png'] = exact = _png(images[i])
        if k < 15: files[f'file_{i}.png'] = exact
        elif k < 30: files[f'pixels_{i}.tif'] = images[i]
        else: files[f'near_{i}.jpg'] = copied(images[i], rng)
    corpus = corpus_of(tmp_path, files, split=['train'] * 200 + ['test'] * 60)
    found = audit(corpus)
    planted = {k: {frozenset((f'{i}.png', f)) for f in files if f.startswith(k) for i in [f.split('_')[1].split('.')[0]]}
               for k in ('file', 'pixels', 'near')}
    assert all(named(found.between(k)) == planted[k] for k in ('file', 'pixels')), 'exact recall is 1'
    near = named(found.between('perceptual'))
    assert len(near & planted['near']) >= .95 * len(planted['near'])
    missed = planted['near'] - near
    assert not near - planted['near'] and named(found.pairs) == set().union(*planted.values()) - missed, 'no false alarm'
    seen = found.seen.set_index('split')
    assert seen.certain.tolist() == [30, 30] and seen.pictures.tolist() == [200, 60]


def _png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(out, 'PNG')
    return out.getvalue()


def test_turned_copies_are_found_when_asked_for(tmp_path):
    images = phantom_corpus('histology', 40, size=96, seed=1).images(np.arange(40))
    turned = [np.rot90(o, k) if flip else np.rot90(o[:, ::-1], k) for o, (flip, k) in
              zip(images[:8], ((f, k) for f in (True, False) for k in range(4)))]
    copies = [read_image(copied(o, generator(i))) for i, o in enumerate(turned)]
    corpus = held([*images, *copies], split=['train'] * 40 + ['test'] * 8)
    assert named(audit(corpus, turned=True).between()) == {frozenset((f'held{i}', f'held{40 + i}')) for i in range(8)}
    assert len(audit(corpus).between()) == 1, 'only the one that was not turned'


def test_between_corpora_and_with_features(tmp_path):
    images = phantom_corpus('ct', 30, size=64, seed=2).images(np.arange(30))
    a = corpus_of(tmp_path/'a', {f'a{i}.png': o for i, o in enumerate(images[:20])}, name='pretraining')
    b = corpus_of(tmp_path/'b', {f'b{i}.png': o for i, o in enumerate(images[15:])}, name='task', split='test')
    found = audit(b, a)
    assert named(found.between('file')) == {frozenset((f'b{i}.png', f'a{15 + i}.png')) for i in range(5)}
    assert found.seen.set_index('corpus').certain.to_dict() == {'task': 5, 'pretraining': 5}
    assert found.seen.set_index('corpus').new.to_dict() == {'task': 10, 'pretraining': 15}
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(15, 16)), rng.normal(size=(20, 16))]
    features[1][3] = features[0][9] * 2 + 1e-3
    near = audit(b, a, features=features).between('embedding')
    assert named(near) == {frozenset(('b9.png', 'a3.png'))}
    with pytest.raises(ValueError, match='one array for each corpus'): audit(b, a, features=features[:1])
    with pytest.raises(DataError, match='have one name'): audit(a, a)
    with pytest.raises(DataError, match='the same file; 5 pairs'): assert_disjoint(b, a)
    assert_disjoint(b.select(np.arange(5, 15)), a, possible=True)


def test_rows_that_share_a_picture_are_one_picture(tmp_path):
    images = phantom_corpus('chest', 3, size=64).images(np.arange(3))
    corpus = corpus_of(tmp_path, {f'{i}.png': o for i, o in enumerate(images)})
    rows = corpus.select([0, 0, 1, 2, 2, 2])
    rows.frame['id'] = [f'row{i}' for i in range(6)]
    asked = ['What?', ' what?', 'What?', 'Where?', 'How?', 'Which?']
    rows.frame['questions'] = [(Question(o, 'x', 'open'),) for o in asked]
    found = audit(rows)
    assert set(found.pairs.kind) == {'question'} and named(found.pairs) == {frozenset(('row0', 'row1'))}
    rows.frame['split'] = ['train', 'test', 'train', 'test', 'test', 'train']
    found = audit(rows)
    assert found.seen.set_index('split').certain.to_dict() == {'train': 2, 'test': 2}
    assert found.seen.set_index('split').pictures.to_dict() == {'train': 3, 'test': 2}


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(SPLITS)), min_size=1, max_size=14))
@settings(max_examples=30, deadline=None)
def test_seen_and_leaks_count_what_a_loop_counts(rows):
    "Pictures drawn with repetition: every count against two loops."
    images = generator('loop').integers(0, 256, (6, 16, 16), dtype=np.uint8)
    corpus = held(np.stack([images[i] for i, _ in rows]), split=[s for _, s in rows])
    found = audit(corpus, radius=None)
    for s in {s for _, s in rows}:
        certain = sum(any(i == j and t != s for j, t in rows) for i, o in rows if o == s)
        assert found.seen.set_index('split').certain[s] == certain
        for t in {s for _, s in rows}:
            other = sum(any(i == j and o == t and a != b for b, (j, o) in enumerate(rows))
                        for a, (i, o) in enumerate(rows) if o == s)
            leak = found.leaks[(found.leaks.kind == 'pixels') & (found.leaks.split == s) & (found.leaks.in_split == t)]
            assert leak.matched.sum() == other
    assert len(found.pairs) == len(rows) - len({i for i, _ in rows}), 'each copy is paired with the first'


@given(st.integers(0, 255), st.integers(2, 40), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_hamming_search_equals_all_pairs(radius, n, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**63, (n, 4), dtype=np.uint64)
    codes[n // 2:] = codes[:n - n // 2] ^ (np.uint64(1) << rng.integers(0, 64, (n - n // 2, 4), dtype=np.uint64)) # near ones too
    distance = np.bitwise_count(codes[:, None] ^ codes[None]).sum(-1, dtype=int)
    wanted = {(i, j, distance[i, j]) for i in range(n) for j in range(i + 1, n) if distance[i, j] <= radius}
    assert set(zip(*near_codes(codes, radius))) == wanted


def test_searches_are_exact_across_blocks_and_bounded():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**63, (3000, 4), dtype=np.uint64)
    codes[2999], codes[1500] = codes[0], codes[1]
    assert set(zip(*near_codes(codes, 20)[:2])) == {(0, 2999), (1, 1500)}
    features = rng.normal(size=(3000, 32))
    features[2999], features[1500] = features[0] * 3, features[1] / 3
    assert set(zip(*near_features(features, .99)[:2])) == {(0, 2999), (1, 1500)}
    assert len(near_codes(codes[:1], 5)[0]) == len(near_features(features[:0], .5)[0]) == 0
    with pytest.raises(DataError, match='more than 100 pairs within 200 bits. Choose a'): near_codes(codes, 200, limit=100)
    with pytest.raises(DataError, match='Raise `cosine`'): near_features(features, -1, limit=100)


def test_codes_are_the_signs_of_the_cosine_transform():
    from scipy.fft import dctn
    thumbs = generator('thumbs').integers(0, 256, (5, 32, 32), dtype=np.uint8)
    signs = dctn(thumbs.astype(float), axes=(1, 2))[:, :16, :16].reshape(5, -1)[:, 1:] > 0
    wanted = np.array([[np.sum(a != b) for b in signs] for a in signs])
    codes = perceptual_codes(thumbs)
    assert (np.bitwise_count(codes[:, None] ^ codes[None]).sum(-1) == wanted).all()


def test_pictures_without_contrast_are_not_taken_for_each_other():
    flat = [np.full((16, 16), v, np.uint8) for v in (0, 1, 128, 255)]
    found = audit(held([*flat, flat[0]]))
    assert found.pairs[['kind', 'id_a', 'id_b']].values.tolist() == [['pixels', 'held0', 'held4']]


# ---- what cannot be read, and formats

def test_unreadable_pictures_are_listed_and_count_as_neither(tmp_path):
    good = phantom_corpus('ct', 2, size=32).images(np.arange(2))
    corpus = corpus_of(tmp_path, {'a.png': good[0], 'b.png': b'', 'c.png': b'no picture', 'd.png': good[1]})
    corpus.frame.loc[3, 'image'] = 'gone.png'
    found = audit(corpus)
    assert found.unread.id.tolist() == ['b.png', 'c.png', 'd.png'] and found.unread.what.str.len().min() > 5
    assert found.seen[['pictures', 'unread', 'new']].values.tolist() == [[4, 3, 1]] and found.pairs.empty


def test_fingerprints_of_files_arrays_and_rendered_corpora(tmp_path):
    phantom = phantom_corpus('fundus', 5, size=48, seed=1)
    images = phantom.images(np.arange(5))
    of_files = fingerprints(corpus_of(tmp_path, {f'{i}.png': o for i, o in enumerate(images)}))
    of_arrays, rendered = fingerprints(held(images)), fingerprints(phantom)
    assert of_files.pixels == of_arrays.pixels == rendered.pixels and len(set(of_files.pixels)) == 5
    assert (of_files.thumbs == rendered.thumbs).all() and all(of_files.file) and not any(rendered.file)
    chunked = fingerprints(held(images), chunk=2, workers=1)
    assert chunked.pixels == of_arrays.pixels and (chunked.thumbs == of_arrays.thumbs).all()


# ---- groups, texts, flow, statistics, integrity

def planted():
    frame = pd.DataFrame({'split': ['train', 'train', 'valid', 'test'], 'group': ['p1', 'p2', 'p2', 'p3'],
                          'labels': [('a',), (), None, ('a', 'b')], 'text': ['No finding.', 'Mass', '', 'no  finding']})
    corpus = held(generator('planted').integers(0, 256, (4, 16, 16), dtype=np.uint8), **frame)
    corpus.classes = ('a', 'b')
    return corpus


def test_groups_texts_and_labels():
    corpus = planted()
    found = audit(corpus)
    assert group_leaks(corpus).values.tolist() == [['p2', 'train, valid', 2]] and len(found.groups) == 1
    texts = found.pairs[found.pairs.kind == 'text']
    assert named(texts) == {frozenset(('held0', 'held3'))} and texts['where'].tolist() == ['between splits']
    assert label_counts(corpus).values.tolist() == [['a', 1, 0, 1], ['b', 0, 0, 1]]
    table = statistics(corpus).set_index('split')
    assert table.loc['train', ['rows', 'groups', 'labelled', 'texts', 'words']].tolist() == [2, 2, 2, 2, 1.5]
    with pytest.raises(DataError, match="group 'p2' stands in the splits train, valid"): assert_disjoint(corpus)


def test_flow_follows_every_row():
    corpus = planted()
    assert flow(corpus).rows.tolist() == [4, 4, 2, 1, 1]
    faults = [('t.csv', 2, "label 'x' is not known"), ('t.csv', 2, 'caption is empty'), ('t.csv', 7, "label 'y' is not known"),
              ('u.csv', 7, 'caption is empty')]
    corpus.report = pd.DataFrame(faults, columns=['file', 'row', 'what'])
    assert flow(corpus)[['step', 'rows']].values.tolist() == [
        ['read', 7], ['left out: label … is not known', 2], ['left out: caption is empty', 1], ['used', 4],
        ['used: train', 2], ['used: valid', 1], ['used: test', 1]]
    corpus.flow = pd.DataFrame({'step': ['images', 'frontal'], 'rows': [9, 4], 'groups': [5, 3]}) # as the readers of reports count
    assert flow(corpus).values.tolist()[:3] == [['images', 9, 5], ['frontal', 4, 3], ['used', 4, 3]]


def test_integrity_says_which_count_is_off():
    class Row: counts = {'train': 2, 'valid': 1, 'test': 3, 'extra': 1}
    corpus = planted()
    table = integrity(corpus, Row)
    assert table[~table.ok][['split', 'found', 'expected']].values.tolist() == [['test', '1', '3'], ['extra', '0', '1']]
    said = table.set_index(['split', 'what']).found
    assert said['train', 'first label'] == 'a' and said['train', 'last label'] == 'none'
    assert said['valid', 'first label'] == 'unlabelled'
    assert said['', 'hash'] == corpus.hash()
    corpus.source = 'twin'
    assert integrity(corpus, Row).ok.all() and (integrity(corpus, Row).expected == '').all()


@pytest.mark.parametrize('name', QUESTIONS)
def test_audit_of_the_question_twins(name, tmp_path):
    row = QUESTIONS[name]
    row.write_twin(tmp_path, 24, 0)
    corpus = row.read(tmp_path)
    found = audit(corpus)
    assert found.between('file', 'pixels', 'perceptual').empty and found.groups.empty and integrity(corpus, row).ok.all()
    assert found.statistics.questions.sum() == len(corpus)
    assert_disjoint(corpus)
    if name == 'vqa_rad':
        leaking = audit(read_vqa_rad(tmp_path, split='official'))
        assert leaking.seen.certain.min() > 0 and len(leaking.groups)


def test_report_shows_every_table_and_no_text():
    text = audit(planted()).to_markdown(rows=2)
    for o in ('Seen', 'Leaks', 'Pairs', 'Groups', 'Flow', 'Statistics', 'Labels', 'Unread', *KINDS): assert o in text
    assert 'finding' not in text.lower() and 'more rows' in text


# ---- real images

@pytest.fixture(scope='module')
def data():
    root = Path(os.environ.get('MEDCL_DATA', 'nowhere'))
    if not (root/'busi'/'index.jsonl').exists(): pytest.skip('MEDCL_DATA does not hold the sample')
    return root


@pytest.mark.parametrize('name', ['busi', 'ham10000', 'lc25000_lung', 'vqa_rad', 'hannover_cxr', 'medpix2'])
def test_copies_of_real_images_are_found(data, name, tmp_path):
    files, rng = sorted((data/name/'images').iterdir())[:150], generator('real copies', name)
    images = {f'{i}.jpg': o.read_bytes() for i, o in enumerate(files)}
    images |= {f'copy{i}.jpg': copied(read_image(o), rng) for i, o in enumerate(files)}
    corpus = corpus_of(tmp_path, images, split=['train'] * len(files) + ['test'] * len(files))
    near = named(audit(corpus).between('perceptual'))
    planted = {frozenset((f'{i}.jpg', f'copy{i}.jpg')) for i in range(len(files))}
    assert len(near & planted) >= .95 * len(planted)


def test_real_sample_holds_its_known_neighbours(data):
    from medcl_study.data.sets.sample import sample_corpus
    busi = sample_corpus('sample_busi', root=data)
    pairs = audit(busi).between('perceptual')
    assert frozenset(('busi/benign_209', 'busi/benign_275')) in named(pairs), 'frames of one lesion, under two names'
    assert pairs.distance.max() <= RADIUS and len(pairs) < 60
    tiles = audit(sample_corpus('sample_lc25000_lung', root=data), turned=True)
    assert tiles.between('file', 'pixels', 'perceptual').empty, 'one tile per group: the turned copies were removed'
