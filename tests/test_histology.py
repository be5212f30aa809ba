"""Histology sets: readers on twins and on real tiles, what they refuse, and that no tile, slide or patient is split."""
import gzip
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from medcl_study.core import DataError
from medcl_study.data.images import read_image
from medcl_study.data.pairs import split_groups
from medcl_study.data.sets.base import read_table, write_table
from medcl_study.data.sets.histology import (
    BACH, BACH_TEST, HISTOLOGY, LC25000, NCT_CRC, PCAM, SICAP, group_tiles, near_duplicates, read_bach, read_lc25000, read_nck,
    read_pcam, read_sicap, tile_signature)

NAMES = list(HISTOLOGY)
PHOTOS = 'bach/ICIAR2018_BACH_Challenge/Photos'
LUNG = 'lc25000/lung_colon_image_set/lung_image_sets'
LISTS = 'lc25000/annotations/{}/UNI/resize_only/final_clusters.csv'
PATCHES = 'pcam/camelyonpatch_level_2_split_{}'
PARTITION = 'sicapv2/SICAPv2/partition/Test/{}.xlsx'


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "The twins of all sets, not to be changed."
    root = tmp_path_factory.mktemp('twins')
    for row in HISTOLOGY.values(): row.write_twin(root/row.folder, 64, 0)
    return root


@pytest.fixture
def root(written, tmp_path):
    "A copy of the twins, to be broken."
    return shutil.copytree(written, tmp_path/'twins')


def refuses(read, *parts):
    "Assert that reading fails with all these words in the message."
    with pytest.raises(DataError) as e: read()
    for part in parts: assert part in str(e.value), str(e.value)


def change(path, edit, **options):
    "Edit a table in its place."
    write_table(path, edit(read_table(path, [])), **options)


# ---- every set

@pytest.mark.parametrize('name', NAMES)
def test_labels_are_those_of_the_files(written, name):
    "Where a file lies, or what its table says, is what the corpus says: independently of the reader."
    row, corpus = HISTOLOGY[name], HISTOLOGY[name].read(written/HISTOLOGY[name].folder)
    if name == 'pcam': truth = [PCAM[int(h5py.File(written/f'{PATCHES.format(s)}_y.h5')['y'][int(i), 0, 0, 0])] for s, i in corpus.frame.id.str.split('/')]
    elif name == 'sicap':
        tables = pd.concat([pd.read_excel(written/PARTITION.format(o)) for o in ('Train', 'Test')]).set_index('image_name')
        truth = tables.loc[corpus.frame.id + '.jpg', list(SICAP)].idxmax(axis=1).map(SICAP).tolist()
    else: truth = [{**BACH, **NCT_CRC, **LC25000['colon'], **LC25000['lung']}[Path(o).parent.name] for o in corpus.frame.image]
    assert [o[0] for o in corpus.frame.labels] == truth and set(truth) == set(row.classes)


@pytest.mark.parametrize('name', NAMES)
def test_reading_again_gives_the_same_splits(written, name):
    row = HISTOLOGY[name]
    a, b = row.read(written/row.folder), row.read(str(written/row.folder))
    assert a.hash() == b.hash() and a.frame.equals(b.frame)


@pytest.mark.parametrize('name', [o for o in NAMES if o != 'pcam'])
def test_images_are_files_that_are_not_opened_to_read_the_set(root, name):
    row = HISTOLOGY[name]
    corpus = row.read(root/row.folder)
    assert all((root/row.folder/o).is_file() for o in corpus.frame.image)
    for o in corpus.frame.image: (root/row.folder/o).write_bytes(b'no picture')
    assert row.read(root/row.folder).frame.equals(corpus.frame)


@pytest.mark.parametrize('name', NAMES)
def test_absent_set(tmp_path, name):
    refuses(lambda: HISTOLOGY[name].read(tmp_path/'nowhere'), 'nowhere')
    refuses(lambda: HISTOLOGY[name].read(tmp_path), str(tmp_path))


@pytest.mark.parametrize(('name', 'archive'), [('bach', 'ICIAR2018_BACH_Challenge.zip'), ('lc25000_lung', 'LC25000.zip'),
                                               ('nck', 'NCT-CRC-HE-100K.zip'), ('sicap', 'SICAPv2.zip')])
def test_archive_that_was_not_extracted_is_named(tmp_path, name, archive):
    (tmp_path/archive).touch()
    refuses(lambda: HISTOLOGY[name].read(tmp_path), f'Extract {archive} in ')


@pytest.mark.parametrize(('name', 'inner'), [('bach', 'ICIAR2018_BACH_Challenge'), ('lc25000_lung', 'lung_colon_image_set'), ('sicap', 'SICAPv2')])
def test_archive_unpacked_without_its_own_folder(root, name, inner):
    row = HISTOLOGY[name]
    before = row.read(root/row.folder)
    for o in list((root/row.folder/inner).iterdir()): shutil.move(o, root/row.folder)
    after = row.read(root/row.folder)
    assert after.frame.drop(columns='image').equals(before.frame.drop(columns='image')) and all((after.root/o).is_file() for o in after.frame.image)


def test_expected_counts():
    assert {o: r.counts for o, r in HISTOLOGY.items()} == {
        'bach': {'train': 268, 'test': 132}, 'lc25000_colon': {}, 'lc25000_lung': {}, 'nck': {'train': 89434, 'test': 6333},
        'pcam': {'train': 262144, 'valid': 32768, 'test': 32768}, 'sicap': {'train': 9959, 'test': 2122}}


# ---- BACH

def official_bach(folder):
    "All 400 names, as empty files."
    rows = [(f'{p}{i:03d}.tif', c) for c, p in (('Normal', 'n'), ('Benign', 'b'), ('InSitu', 'is'), ('Invasive', 'iv')) for i in range(1, 101)]
    photos = folder/'ICIAR2018_BACH_Challenge'/'Photos'
    for name, code in rows:
        (photos/code).mkdir(parents=True, exist_ok=True)
        (photos/code/name).touch()
    (photos/'microscopy_ground_truth.csv').write_text('\n'.join(','.join(o) for o in rows))
    return folder


def test_bach_follows_the_published_list(tmp_path):
    "The list's indices count the files sorted by folder and name."
    corpus = read_bach(official_bach(tmp_path))
    held_out = np.zeros(400, bool)
    for a, b in ((41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368)): held_out[a:b] = True
    names = sorted(corpus.frame.image)
    split = dict(zip(corpus.frame.image, corpus.frame.split))
    assert [split[o] == 'test' for o in names] == held_out.tolist()
    assert Counter(corpus.frame.split) == HISTOLOGY['bach'].counts and corpus.source == 'real'
    assert Counter(corpus.split('test').frame.labels.str[0]) == dict(zip(BACH.values(), (48, 30, 31, 23)))
    assert sum(b - a + 1 for o in BACH_TEST.values() for a, b in o) == 132


@pytest.mark.parametrize(('line', 'words'), [
    ('b001.tif,benign', ("class is 'benign'", 'row 3', "'Benign' is meant")), ('b101.tif,Benign', ("'Benign/b101.tif' is not in Photos/", 'half extracted')),
    ('../../b001.tif,Benign', ('not inside Photos/',)), ('b001.tif', ('row 3', "class is ''")), ('b001.tif,Benign,p7', ('not a readable table', 'line 3'))])
def test_bach_bad_rows(root, line, words):
    path = root/PHOTOS/'microscopy_ground_truth.csv'
    lines = path.read_text().splitlines()
    path.write_text('\n'.join([*lines[:2], line, *lines[3:]]))
    refuses(lambda: read_bach(root/'bach'), 'microscopy_ground_truth.csv', *words)


def test_bach_name_outside_the_list_has_no_split(root):
    shutil.copy(root/PHOTOS/'Benign'/'b001.tif', root/PHOTOS/'Benign'/'b101.tif')
    with (root/PHOTOS/'microscopy_ground_truth.csv').open('a') as f: f.write('b101.tif,Benign\n')
    refuses(lambda: read_bach(root/'bach'), "'b101.tif' is none of the 400 photographs", 'row 65')


# ---- NCT-CRC

def test_nck_leaves_background_out_but_wants_its_folder(root):
    corpus = read_nck(root/'nct_crc')
    assert len(corpus.classes) == 8 and not corpus.frame.id.str.startswith('BACK').any()
    assert corpus.frame.id.str.contains('-TCGA-').eq(corpus.frame.split == 'test').all()
    shutil.rmtree(root/'nct_crc'/'NCT-CRC-HE-100K'/'BACK')
    refuses(lambda: read_nck(root/'nct_crc'), 'NCT-CRC-HE-100K/BACK', 'no such folder')


@pytest.mark.parametrize('spoil', [lambda o: o.rename(o.with_name('Stroma')), lambda o: [p.unlink() for p in o.iterdir()]])
def test_nck_misspelt_or_empty_folder(root, spoil):
    spoil(root/'nct_crc'/'CRC-VAL-HE-7K'/'STR')
    refuses(lambda: read_nck(root/'nct_crc'), 'CRC-VAL-HE-7K/STR')


def test_nck_one_archive_never_stands_for_both(root):
    "Tiles of the test archive, laid where the training archive is looked for, are not read as training tiles."
    for o in list((root/'nct_crc'/'CRC-VAL-HE-7K').iterdir()): shutil.copytree(o, root/'nct_crc'/o.name)
    shutil.rmtree(root/'nct_crc'/'NCT-CRC-HE-100K')
    refuses(lambda: read_nck(root/'nct_crc'), 'NCT-CRC-HE-100K/ADI')


# ---- LC25000: the defect was a random, unseeded split by image

def turned(image, random):
    "One of the eight ways to lay a square image down, then a turn by up to 25 degrees without corners, as the set was made."
    image = image.transpose(random.choice(list(Image.Transpose)))
    angle, n = random.uniform(-25, 25), image.width
    side = n / (np.cos(np.radians(abs(angle))) + np.sin(np.radians(abs(angle))))
    edge = int(np.ceil((n - side) / 2))
    return image.rotate(angle, Image.Resampling.BICUBIC).crop((edge, edge, n - edge, n - edge)).resize((n, n), Image.Resampling.BICUBIC)


def plant(folder, sources, siblings, seed=0):
    "Write an official tree from source images by class folder; returns file name → number of the source."
    random, truth = np.random.default_rng(seed), {}
    for tissue, images in sources.items():
        numbers = iter(1 + random.permutation(len(images) * siblings))
        place = folder/'lung_colon_image_set'/f'{tissue.split("_")[0]}_image_sets'/tissue
        place.mkdir(parents=True)
        for k, image in enumerate(images):
            for _ in range(siblings):
                name = f'{tissue.replace("_", "")}{next(numbers)}'
                turned(image, random).save(place/f'{name}.jpeg', quality=90)
                truth[name] = f'{tissue} {k}'
    return truth


def assert_no_tile_is_split(corpus, truth):
    tile = corpus.frame.id.map(truth)
    assert tile.notna().all() and corpus.frame.split.groupby(tile).nunique().max() == 1
    assert {'train', 'test'} == set(corpus.frame.split)


def test_planted_siblings_stay_together(written, tmp_path):
    corpus = read_pcam(written/'pcam')
    images = [Image.fromarray(corpus[i].image) for i in range(36)]
    truth = plant(tmp_path, {o: images[12 * i:12 * i + 12] for i, o in enumerate(LC25000['lung'])}, siblings=5)
    with pytest.raises(DataError, match="no split 'train'"): read_lc25000(tmp_path, 'lung').split('train')
    assert group_tiles(tmp_path) == dict.fromkeys(LC25000['lung'], 12)
    grouped = read_lc25000(tmp_path, 'lung')
    assert_no_tile_is_split(grouped, truth)
    by_image = pd.Series(split_groups(grouped.frame.id, seed=0, fractions={'train': .8, 'test': .2}))
    assert by_image.groupby(grouped.frame.id.map(truth)).nunique().max() == 2, 'the test would not notice a split by image'


def test_grouping_is_repeatable_and_knows_no_order(written):
    corpus = read_lc25000(written/'lc25000', 'colon')
    signatures = np.stack([tile_signature(read_image(o.image)) for o in corpus])
    groups, order = near_duplicates(signatures), np.random.default_rng(0).permutation(len(corpus))
    again = near_duplicates(signatures[order])
    assert ((groups[order][:, None] == groups[order]) == (again[:, None] == again)).all()
    assert (near_duplicates(signatures) == groups).all() and near_duplicates(signatures[:1]).tolist() == [0]


@pytest.mark.parametrize('operation', list(Image.Transpose))
def test_signature_of_a_turned_image(written, operation):
    "The eight ways to lay an image down change a signature by less than the resampling of rings does."
    image = Image.fromarray(read_pcam(written/'pcam')[0].image)
    a, b = (tile_signature(np.asarray(o)) for o in (image, image.transpose(operation)))
    assert ((a - b)**2).mean() < 1e-4 * (a**2).mean()


def test_either_list_keeps_images_together(root):
    "A pair that LC25000-clean puts apart and our own list joins ends up in one split, and the other way round."
    clean = read_lc25000(root/'lc25000', 'lung').frame
    group_tiles(root/'lc25000')
    assert read_lc25000(root/'lc25000', 'lung').frame.groupby(clean.group).split.nunique().max() == 1
    change(root/LISTS.format('lung_n'), lambda o: o.assign(cluster_label=np.arange(len(o))))
    both = read_lc25000(root/'lc25000', 'lung').frame
    assert both.groupby(clean.group).group.nunique().max() == 1
    change(root/LISTS.format('lung_n'), lambda o: o.assign(cluster_label='0'))
    assert read_lc25000(root/'lc25000', 'lung').frame.query("group.str.startswith('lung_n ')").group.nunique() == 1


def test_lc25000_without_groups_is_for_zero_shot_only(root):
    shutil.rmtree(root/'lc25000'/'annotations')
    corpus = read_lc25000(root/'lc25000', 'colon')
    assert set(corpus.frame.split) == {'test'} and (corpus.frame.group == '').all() and len(corpus) == 64


def test_lc25000_one_class_without_groups(root):
    (root/LISTS.format('lung_n')).unlink()
    refuses(lambda: read_lc25000(root/'lc25000', 'lung'), 'tiles of lung_n are not grouped', 'group_tiles')
    assert len(read_lc25000(root/'lc25000', 'colon')) == 64


@pytest.mark.parametrize(('edit', 'words'), [
    (lambda o: o.rename(columns={'cluster_label': 'cluster'}), ("no column 'cluster_label'", "Rename 'cluster' to 'cluster_label'")),
    (lambda o: o.iloc[1:], ('is not listed', 'group_tiles')), (lambda o: pd.concat([o, o.iloc[:1]]), ('is listed twice', 'row 24')),
    (lambda o: o.assign(img_path=o.img_path.where(o.index != 2, './LC25000/lung_n/lungn5001.jpeg')), ('row 4', "'lungn5001.jpeg' is not in lung_n/"))])
def test_lc25000_bad_lists(root, edit, words):
    change(root/LISTS.format('lung_n'), edit)
    refuses(lambda: read_lc25000(root/'lc25000', 'lung'), 'lung_n', *words)


def test_group_tiles_refuses_what_is_no_image(root):
    image = next((root/LUNG/'lung_n').iterdir())
    image.write_bytes(image.read_bytes()[:200])
    refuses(lambda: group_tiles(root/'lc25000'), image.name)


# ---- PCam

def test_pcam_reads_images_one_by_one_and_in_a_worker(written):
    corpus = read_pcam(written/'pcam')
    with h5py.File(written/f'{PATCHES.format("valid")}_x.h5') as f: x = f['x'][()]
    valid = pickle.loads(pickle.dumps(corpus.split('valid').pixels))
    assert len(valid) == len(x) and all((valid[i] == x[i]).all() for i in (0, 3, len(x) - 1, -2))
    assert corpus.frame.groupby('group').split.nunique().max() == 1


def test_pcam_packed_in_gz(root):
    path = root/f'{PATCHES.format("test")}_x.h5'
    path.with_name(path.name + '.gz').write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    refuses(lambda: read_pcam(root/'pcam'), 'no such file', f'Extract {path.name}.gz in pcam/')


def rewrite(path, key, array):
    path.unlink()
    with h5py.File(path, 'w') as f: f[key] = array


@pytest.mark.parametrize(('key', 'array', 'words'), [
    ('images', np.zeros((16, 96, 96, 3), np.uint8), ("no array 'x'", 'images')), ('x', np.zeros((16, 96, 96, 3)), ('float64', 'expected uint8')),
    ('x', np.zeros((15, 96, 96, 3), np.uint8), ('16 rows for 15 images',))])
def test_pcam_bad_images(root, key, array, words):
    rewrite(root/f'{PATCHES.format("valid")}_x.h5', key, array)
    refuses(lambda: read_pcam(root/'pcam'), 'split_valid', *words)


def test_pcam_bad_label_table_and_slide(root):
    y, meta = root/f'{PATCHES.format("valid")}_y.h5', root/f'{PATCHES.format("valid")}_meta.csv'
    good = h5py.File(y)['y'][()]
    rewrite(y, 'y', np.where(np.arange(16).reshape(-1, 1, 1, 1) == 3, 2, good))
    refuses(lambda: read_pcam(root/'pcam'), 'y is 2', 'row 4')
    rewrite(y, 'y', 1 - good)
    refuses(lambda: read_pcam(root/'pcam'), 'belongs to another split')
    rewrite(y, 'y', good)
    change(meta, lambda o: o.assign(note='more columns are fine'))
    before = read_pcam(root/'pcam')
    change(meta, lambda o: o.assign(wsi=o.wsi.where(o.index > 0, before.frame.group[0])))
    refuses(lambda: read_pcam(root/'pcam'), f'group {before.frame.group[0]!r} stands in the splits')
    change(meta, lambda o: o.rename(columns={'wsi': 'WSI_'}))
    refuses(lambda: read_pcam(root/'pcam'), "Rename 'WSI_' to 'wsi'")
    y.write_bytes(b'not HDF5')
    refuses(lambda: read_pcam(root/'pcam'), 'not a readable HDF5 file')


# ---- SICAPv2

def test_sicap_ignores_the_cribriform_mark_and_groups_slides_by_patient(root):
    before = read_sicap(root/'sicapv2')
    change(root/PARTITION.format('Train'), lambda o: o.assign(G4C=1, more='x'))
    assert read_sicap(root/'sicapv2').frame.equals(before.frame)
    change(root/'sicapv2/SICAPv2/wsi_labels.xlsx', lambda o: o.assign(patient_id=o.patient_id // 100))
    refuses(lambda: read_sicap(root/'sicapv2'), "group 'patient 0' stands in the splits ['test', 'train']")


@pytest.mark.parametrize(('edit', 'words'), [
    (lambda o: o.rename(columns={'image_name': 'Image name'}), ("Rename 'Image name' to 'image_name'",)),
    (lambda o: o.drop(columns='G5'), ("no column 'G5'",)), (lambda o: o.assign(G3=o.G3.where(o.index != 5, 'x')), ('row 7',)),
    (lambda o: o.assign(image_name=o.image_name.where(o.index != 1, '16B9_Block_Region_1.jpg')), ('row 3', 'is not in images/')),
    (lambda o: o.assign(image_name=o.image_name.where(o.index != 1, '../../wsi_labels.xlsx')), ('not inside images/',))])
def test_sicap_bad_tables(root, edit, words):
    change(root/PARTITION.format('Test'), edit)
    refuses(lambda: read_sicap(root/'sicapv2'), 'Test.xlsx', *words)


def test_sicap_slide_without_patient(root):
    change(root/'sicapv2/SICAPv2/wsi_labels.xlsx', lambda o: o.iloc[1:])
    refuses(lambda: read_sicap(root/'sicapv2'), 'is not in wsi_labels.xlsx', 'row 2')


@pytest.fixture(scope='module')
def sicap_copy(written, tmp_path_factory): return shutil.copytree(written/'sicapv2', tmp_path_factory.mktemp('sicap')/'sicapv2')


@settings(max_examples=20, deadline=None)
@given(row=st.integers(0, 15), marks=st.lists(st.sampled_from([0, 1, 1.0, 2, -1, None, '1', 'yes', .5, True]), min_size=4, max_size=4))
def test_sicap_row_has_exactly_one_grade_or_is_named(sicap_copy, row, marks):
    path = sicap_copy/'SICAPv2/partition/Test/Test.xlsx'
    kept = path.read_bytes()
    change(path, lambda o: o.assign(**{k: o[k].where(o.index != row, m) for k, m in zip(SICAP, marks)}))
    numbers = [{'1': 1, 'yes': None, None: None}.get(o, o) for o in marks]
    try:
        if None not in numbers and sorted(numbers) == [0, 0, 0, 1]:
            assert read_sicap(sicap_copy).split('test').frame.labels[row] == (list(SICAP.values())[numbers.index(1)],)
        else: refuses(lambda: read_sicap(sicap_copy), 'Test.xlsx', f'row {row + 2}', 'expected one 1 and three 0')
    finally: path.write_bytes(kept)


@settings(max_examples=30, deadline=None)
@given(row=st.integers(0, 63), text=st.text(st.characters(codec='utf-8', exclude_characters='\r\n\0"'), max_size=12), column=st.integers(0, 1))
def test_bach_any_cell_is_right_or_refused_by_row(written, tmp_path_factory, row, text, column):
    folder = tmp_path_factory.mktemp('bach')
    photos = folder/'ICIAR2018_BACH_Challenge'/'Photos'
    photos.mkdir(parents=True)
    for o in BACH: (photos/o).symlink_to(written/PHOTOS/o)
    rows = [o.split(',') for o in (written/PHOTOS/'microscopy_ground_truth.csv').read_text().splitlines()]
    right, rows[row][column] = rows[row][column], text
    (photos/'microscopy_ground_truth.csv').write_text('\n'.join(','.join(o) for o in rows), encoding='utf-8')
    if text == right: assert len(read_bach(folder)) == 64
    else: refuses(lambda: read_bach(folder), 'microscopy_ground_truth.csv')


# ---- real tiles

real = pytest.mark.skipif(not os.environ.get('MEDCL_DATA'), reason='MEDCL_DATA is not set: real tiles are not here')


def real_tiles():
    folder = Path(os.environ['MEDCL_DATA'])/'lc25000_lung'
    if not (folder/'images').is_dir() or (folder.parent/'TWIN').exists(): pytest.skip('MEDCL_DATA holds no real tiles of LC25000')
    return folder


@real
def test_real_sample_in_another_layout_is_refused_plainly():
    folder = real_tiles()
    refuses(lambda: read_lc25000(folder, 'lung'), 'lung_n: no such folder')
    refuses(lambda: group_tiles(folder), 'no colon_image_sets and no lung_image_sets')


@real
def test_real_tiles_are_grouped_as_planted(tmp_path):
    images = sorted((real_tiles()/'images').iterdir())
    sources = {o: [Image.open(p).convert('RGB') for p in images if p.name.startswith(o.replace('_', ''))][:15] for o in LC25000['lung']}
    truth = plant(tmp_path, sources, siblings=8)
    assert group_tiles(tmp_path) == dict.fromkeys(LC25000['lung'], 15)
    corpus = read_lc25000(tmp_path, 'lung')
    assert len(corpus) == 360 and corpus.source == 'real'
    assert_no_tile_is_split(corpus, truth)


@real
def test_real_tiles_that_a_published_list_keeps_apart(tmp_path):
    "lungn151 and lungn265 show one tile; whoever lists them as two is overruled by the grouping."
    names = ['lungn151', 'lungn265', 'lungn1', 'lungn2', 'lungn3', 'lungn4']
    for tissue, ours in (('lung_n', names), ('lung_aca', ['lungaca1', 'lungaca10']), ('lung_scc', ['lungscc1', 'lungscc10'])):
        folder = tmp_path/LUNG.removeprefix('lc25000/')/tissue
        folder.mkdir(parents=True)
        held = [o for o in ours if (real_tiles()/'images'/f'{o}.jpg').exists()]
        for o in held: (folder/f'{o}.jpeg').symlink_to(real_tiles()/'images'/f'{o}.jpg')
        write_table(tmp_path/LISTS.format(tissue).removeprefix('lc25000/'), pd.DataFrame(
            {'cluster_label': range(len(held)), 'img_path': [f'./LC25000/{tissue}/{o}.jpeg' for o in held]}))
    assert read_lc25000(tmp_path, 'lung').frame.group.is_unique
    group_tiles(tmp_path)
    groups = read_lc25000(tmp_path, 'lung').frame.set_index('id').group
    assert groups['lungn151'] == groups['lungn265'] and groups.duplicated().sum() == 1
