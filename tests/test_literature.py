"""Captioned corpora: each reader on its twin and on every way its files can be wrong."""
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from medcl_study.core import DataError
from medcl_study.data.images import pack
from medcl_study.data.sets.literature import (
    LITERATURE, EmbeddedImages, pmc_oa_twin, quilt_1m_twin, read_deepeyenet, read_pmc_oa, read_quilt_1m, read_roco, read_roco_v2)

LAYOUTS = Path(__file__).parent/'layouts'


@pytest.fixture(scope='module')
def twins(tmp_path_factory):
    "Write each twin once; tests that break one write their own."
    root = tmp_path_factory.mktemp('literature')
    for o in LITERATURE.values(): o.write_twin(root/o.folder, 64, 0)
    return root


def write(name, folder, n=16, **options):
    LITERATURE[name].write_twin(folder, n, 0, **options)
    return folder


# ---- layouts cited from elsewhere

def test_records_quoted_in_the_layouts_are_read(tmp_path):
    "Rows as their publishers print them, with no twin involved."
    records = {o: json.loads((LAYOUTS/f'{o}.json').read_text()) for o in ('pmc_oa', 'roco', 'deepeyenet')}
    row = records['pmc_oa']['current']['tables']['pmc_oa.jsonl']['record']
    put(tmp_path/'a'/'images'/row['image'])
    (tmp_path/'a'/'pmc_oa.jsonl').write_text(json.dumps(row))
    sample = read_pmc_oa(tmp_path/'a')[0]
    assert (sample.group, sample.text) == ('PMC212319', row['caption']) and sample.image.is_file()
    row = records['roco']['tables']['train/radiologytraindata.csv']['record']
    for long, short in (('train', 'train'), ('validation', 'val'), ('test', 'test')):
        put(tmp_path/'b'/'all_data'/long/'radiology'/'images'/row['name'])
        pd.DataFrame([row]).to_csv(tmp_path/'b'/'all_data'/long/f'radiology{short}data.csv', index=False)
    assert [(o.group, o.split) for o in read_roco(tmp_path/'b')] == [('PMC4083729', o) for o in ('train', 'valid', 'test')]
    entries = records['deepeyenet']['json']['DeepEyeNet_*.json']
    for split in ('train', 'valid', 'test'):
        put(tmp_path/'c'/next(iter(entries[0])))
        (tmp_path/'c'/f'DeepEyeNet_{split}.json').write_text(json.dumps(entries))
    assert read_deepeyenet(tmp_path/'c')[0].text.splitlines()[1] == entries[0][next(iter(entries[0]))]['clinical-description']


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (8, 8)).save(path)


# ---- readers on twins

@pytest.mark.parametrize('name', LITERATURE)
def test_corpus_packs(twins, tmp_path, name):
    corpus = LITERATURE[name].read(twins/name)
    cache = pack(corpus, tmp_path, size=16)
    assert len(cache) == len(corpus) and cache.images[:].std() > 1
    held = pack(corpus.select([5, 1]), tmp_path, size=16)
    assert (held.batch([0, 1]) == cache.batch([5, 1])).all()


@pytest.mark.parametrize('name', LITERATURE)
def test_hash_names_the_data(twins, tmp_path, name):
    o = LITERATURE[name]
    o.write_twin(tmp_path/'other', 64, 1)
    first, again, other = (o.read(f).hash() for f in (twins/name, twins/name, tmp_path/'other'))
    assert first == again != other


def test_equal_captions_are_several_positives(twins):
    "The released evaluation knew one right answer per query although captions repeat."
    for name in ('roco', 'quilt_1m', 'deepeyenet'):
        test = LITERATURE[name].read(twins/name).split('test')
        ids = pd.Series(test.text_ids())
        assert (ids.groupby(ids).transform('size') > 1).mean() > .1, name


def test_current_release_of_pmc_oa_is_split_by_article_whatever_its_order(tmp_path):
    pmc_oa_twin(tmp_path, 64, release='current')
    first = read_pmc_oa(tmp_path).frame.set_index('id').split
    lines = (tmp_path/'pmc_oa.jsonl').read_text().splitlines()
    (tmp_path/'pmc_oa.jsonl').write_text('\n'.join(lines[::-1]))
    corpus = read_pmc_oa(tmp_path)
    assert corpus.frame.set_index('id').split.sort_index().equals(first.sort_index())
    assert corpus.frame.groupby('group').split.nunique().max() == 1
    for o in (tmp_path/'caption_T060_filtered_top4_sep_v0_subfigures').iterdir(): o.rename(tmp_path/o.name)
    (tmp_path/'caption_T060_filtered_top4_sep_v0_subfigures').rmdir()
    (tmp_path/'images.zip').touch()
    with pytest.raises(DataError, match='images: no such folder. Extract images.zip'): read_pmc_oa(tmp_path)


def test_quilt_reads_subsets_and_keeps_captions_of_an_image_together(twins):
    corpus = read_quilt_1m(twins/'quilt_1m')
    assert set(corpus.frame.subset) == {'openpath', 'pubmed', 'quilt', 'laion'}
    assert corpus.frame.groupby('image').group.nunique().max() == 1 and corpus.frame.image.duplicated().any()
    assert corpus.frame.groupby('group').image.nunique().max() == 2  # the two frames of a video


@pytest.mark.parametrize('name, stem', [('PMC5015013_Fig1.jpg', 'PMC5015013'), ('Dx0wC-_I9hI_image_bfd3ea1b.jpg', 'Dx0wC-_I9hI'),
                                        ('1003310218.png', '1003310218.png')])
def test_quilt_groups(tmp_path, name, stem):
    put(tmp_path/'quilt_1m'/name)
    for part in ('train', 'val'):
        pd.DataFrame({'image_path': [name], 'caption': ['Glands.'], 'roi_text': ''}).to_csv(tmp_path/f'quilt_1m_{part}.csv', index=False)
    assert set(read_quilt_1m(tmp_path).frame.group) == {stem}


def test_embedded_images_cross_files_and_row_groups(tmp_path):
    import io
    import pickle
    def cell(v):
        buffer = io.BytesIO()
        Image.new('L', (4, 4), v).save(buffer, 'PNG')
        return {'bytes': buffer.getvalue(), 'path': None}
    for f, values in enumerate(([0, 1, 2, 3, 4], [5, 6, 7])):
        pq.write_table(pa.Table.from_pylist([{'image': cell(v)} for v in values]), tmp_path/f'{f}.parquet', row_group_size=2)
    images = EmbeddedImages([tmp_path/'0.parquet', tmp_path/'1.parquet'])
    assert [int(images[i][0, 0]) for i in (7, 0, 4, 5, 3)] == [7, 0, 4, 5, 3] and len(images) == 8
    some = pickle.loads(pickle.dumps(images[np.array([6, 2])]))
    assert [int(some[i][0, 0]) for i in (0, 1)] == [6, 2] and some.hash() != images.hash()
    pq.write_table(pa.Table.from_pylist([{'image': cell(5)}, {'image': {'bytes': b'GIF89a', 'path': 'x'}}]), tmp_path/'1.parquet')
    with pytest.raises(DataError, match='1.parquet, row 2'): EmbeddedImages([tmp_path/'0.parquet', tmp_path/'1.parquet'])[6]


def test_a_hundred_thousand_rows_in_two_seconds(tmp_path):
    names = [f'PMC{i}_Fig1_1.jpg' for i in range(2000)]
    for o in names: put(tmp_path/'images'/o) if o == names[0] else (tmp_path/'images'/o).hardlink_to(tmp_path/'images'/names[0])
    rows = [{'image': names[i % 2000], 'caption': f'Axial image number {i}, with an arrow at the lesion.'} for i in range(100_000)]
    (tmp_path/'pmc_oa.jsonl').write_text(''.join(json.dumps(o) + '\n' for o in rows))
    table = pd.DataFrame(rows).rename(columns={'image': 'image_path'}).assign(subset='quilt', split='train')
    table.to_csv(tmp_path/'quilt_1M_lookup.csv')
    (tmp_path/'quilt_1m').symlink_to(tmp_path/'images')
    for read in (read_pmc_oa, read_quilt_1m):
        taken = []
        for _ in range(2):  # time of this process: other work on the machine is none of ours
            start = time.process_time()
            assert len(read(tmp_path)) == 100_000
            taken.append(time.process_time() - start)
            if taken[-1] < 2: break
        assert min(taken) < 2, taken


# ---- files that are wrong

def test_dead_links_are_listed_and_half_an_archive_is_refused(tmp_path):
    write('roco', tmp_path, 240)
    images = sorted((tmp_path/'train'/'radiology'/'images').iterdir())
    images[0].unlink()
    corpus = read_roco(tmp_path)
    assert len(corpus) == 239 and corpus.report.what.tolist() == [f"image file 'train/radiology/images/{images[0].name}' does not exist"]
    assert corpus.report.iloc[0][['file', 'row']].tolist() == ['train/radiologytraindata.csv', 2]
    for o in images[1:50]: o.unlink()
    with pytest.raises(DataError, match='50 of 240 listed images are missing, the first is .*' + images[0].name): read_roco(tmp_path)


@pytest.mark.parametrize('name', ['pmc_oa', 'quilt_1m', 'roco', 'roco_v2', 'deepeyenet'])
def test_empty_folder_says_what_belongs_there(tmp_path, name):
    with pytest.raises(DataError, match='no such f'): LITERATURE[name].read(tmp_path)


@pytest.mark.parametrize('name, file, old, new', [
    ('pmc_oa', 'valid.jsonl', 'caption', 'captions'), ('quilt_1m', 'quilt_1M_lookup.csv', 'image_path', 'image_paths'),
    ('roco', 'test/radiologytestdata.csv', 'name', 'names')])
def test_renamed_column_is_named_with_the_mapping(tmp_path, name, file, old, new):
    path = write(name, tmp_path)/file
    path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"') if file.endswith('l') else
                    path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=f'no column {old!r}.*Rename {new!r} to {old!r}'): LITERATURE[name].read(tmp_path)


def test_extra_columns_are_kept(tmp_path):
    path = write('roco', tmp_path)/'train'/'radiologytraindata.csv'
    pd.read_csv(path).assign(keywords='ct').to_csv(path, index=False)
    assert len(read_roco(tmp_path)) == 16
    path = write('pmc_oa', tmp_path/'p')/'train.jsonl'
    path.write_text(''.join(json.dumps(json.loads(o) | {'score': 1}) + '\n' for o in path.read_text().splitlines()))
    assert 'score' in read_pmc_oa(tmp_path/'p').frame


def test_label_outside_the_known_ones(tmp_path):
    path = write('quilt_1m', tmp_path)/'quilt_1M_lookup.csv'
    frame = pd.read_csv(path, index_col=0)
    frame.assign(split=frame.split.replace('val', 'valid')).to_csv(path)
    with pytest.raises(DataError, match="row 11: split is 'valid'.*'val' is meant"): read_quilt_1m(tmp_path)


@pytest.mark.parametrize('image', ['../../secret.png', '/etc/passwd', 'a/../../b.jpg', 'C:/x.jpg'])
def test_paths_stay_inside(tmp_path, image):
    write('deepeyenet', tmp_path)
    path = tmp_path/'DeepEyeNet_train.json'
    path.write_text(json.dumps([*json.loads(path.read_text()), {image: {'keywords': 'a', 'clinical-description': 'b'}}]))
    with pytest.raises(DataError, match='train.json, row 9: image path .* is not inside'): read_deepeyenet(tmp_path)


@pytest.mark.parametrize('entry, words', [
    ([], 'not a path'), ({'a.jpg': 'text'}, 'not a path'), ({'a.jpg': {'keywords': 'x'}}, r"has the keys \['keywords'\]"), ({}, 'not a path'),
    ({'a.jpg': {'keywords': None, 'clinical-description': 'x'}}, 'has the keys'),
    ({'a.jpg': {'keywords': 'x', 'clinical-description': 'y'}, 'b.jpg': {}}, 'expected')])
def test_deepeyenet_entries(tmp_path, entry, words):
    path = write('deepeyenet', tmp_path)/'DeepEyeNet_test.json'
    path.write_text(json.dumps([entry]))
    with pytest.raises(DataError, match='DeepEyeNet_test.json, row 1.*' + words): read_deepeyenet(tmp_path)
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match='row 1'): read_deepeyenet(tmp_path)
    path.write_text('[{"a": ')
    with pytest.raises(DataError, match='not valid JSON'): read_deepeyenet(tmp_path)


def test_parquet_parts_must_be_complete(tmp_path):
    data = write('roco_v2', tmp_path)/'data'
    (data/'train-00000-of-00001.parquet').rename(data/'train-00000-of-00002.parquet')
    with pytest.raises(DataError, match='train-00001-of-00002.parquet: no such file'): read_roco_v2(tmp_path)
    table = pq.read_table(data/'train-00000-of-00002.parquet')
    (data/'train-00000-of-00002.parquet').unlink()
    pq.write_table(table.drop_columns('image'), data/'train-00000-of-00001.parquet')
    with pytest.raises(DataError, match="no column 'image'"): read_roco_v2(tmp_path)
    (data/'train-00000-of-00001.parquet').write_bytes(b'PAR1 and then nothing')
    with pytest.raises(DataError, match='not a readable table'): read_roco_v2(tmp_path)


def test_sample_folders_of_another_layout_are_refused(tmp_path):
    (tmp_path/'index.jsonl').write_text('{"image": "a.png", "text": "x"}')
    for o in LITERATURE.values():
        with pytest.raises(DataError): o.read(tmp_path)


@settings(max_examples=40, deadline=None)
@example(row={'image': '0/', 'caption': 'A nodule.'}, cut=0)
@given(row=st.fixed_dictionaries({}, optional={
    'image': st.one_of(st.none(), st.text(max_size=12), st.sampled_from(['PMC1_Fig1_1.jpg', '..', 'x\0y', '../a'])),
    'caption': st.one_of(st.none(), st.text(max_size=20), st.integers(), st.lists(st.text(max_size=3), max_size=2))}), cut=st.integers(0, 30))
def test_malformed_rows_raise_data_errors_only(tmp_path_factory, row, cut):
    folder = tmp_path_factory.mktemp('row')
    put(folder/'images'/'PMC1_Fig1_1.jpg')
    good = {'image': 'PMC1_Fig1_1.jpg', 'caption': 'A nodule.'}
    line = json.dumps(row)
    (folder/'pmc_oa.jsonl').write_text('\n'.join([json.dumps(good)] * 150 + [line[:-cut] if cut < len(line) and cut % 3 else line]))
    try: corpus = read_pmc_oa(folder)
    except DataError as e: assert 'pmc_oa.jsonl' in str(e) and len(str(e)) < 2000
    else: assert len(corpus) + len(corpus.report) in (150, 151) and (corpus.frame.text.str.strip() != '').all()
