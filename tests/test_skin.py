"""Skin and breast: cut by patient, lesion and examination; codes by name, findings by image; on twins, malformed tables, real images."""
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medcl_study.core import DataError
from medcl_study.data.images import read_image
from medcl_study.data.pairs import split_groups
from medcl_study.data.sets.skin import (
    HAM10000, PAD_UFES_20, SKIN, VINDR_MAMMO, pad_ufes_20_twin, read_pad_ufes_20, read_skin_cancer, read_vindr_mammo, skin_cancer_twin,
    vindr_mammo_twin)
from medcl_study.data.text import PROMPTS, prompts_for

TABLE = {'pad_ufes_20': 'metadata.csv', 'skin_cancer': 'HAM10000_metadata.csv', 'vindr_mammo': 'finding_annotations.csv'}
GROUP = {'pad_ufes_20': 'patient_id', 'skin_cancer': 'lesion_id', 'vindr_mammo': 'study_id'}


@pytest.fixture(scope='module')
def twins(tmp_path_factory):
    root = tmp_path_factory.mktemp('twins')
    for o in SKIN.values(): o.write_twin(root/o.folder, 64, 0)
    return root


@pytest.fixture
def twin(request, twins, tmp_path):
    "A copy of one twin, to be damaged: its row, its folder and its table's path."
    o = SKIN[request.param]
    shutil.copytree(twins/o.folder, tmp_path/o.folder)
    return o, tmp_path/o.folder, tmp_path/o.folder/TABLE[o.name]


each = pytest.mark.parametrize('twin', SKIN, indirect=True)


def rewrite(path, change):
    "Change a table, cell by cell as it stands."
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    change(frame).to_csv(path, index=False)


# ---- what every set keeps

@pytest.mark.parametrize('name', SKIN)
def test_every_split_of_the_twin_holds_every_class_and_no_group_of_the_other(twins, name):
    o, corpus = SKIN[name], SKIN[name].read(twins/SKIN[name].folder)
    train, test = corpus.split('train'), corpus.split('test')
    assert len(train) + len(test) == len(corpus) == 64 and corpus.source == 'twin' and corpus.classes == o.classes
    assert not set(train.frame.id) & set(test.frame.id), "PAD-UFES-20's test once stood inside its training set"
    assert o.group and not set(train.frame.group) & set(test.frame.group) and corpus.frame.groupby('group').size().max() > 1
    assert train.targets().sum(0).all() and test.targets().sum(0).all()
    assert np.isclose(len(test) / 64, .2, atol=.06)


@each
def test_split_is_a_rule_not_a_draw(twin):
    "Seeded, the same in every process and for every order of the rows."
    o, folder, path = twin
    before = o.read(folder)
    rewrite(path, lambda f: f.sample(frac=1, random_state=3))
    np.random.seed(None)
    after = o.read(folder)
    assert dict(zip(before.frame.id, before.frame.split)) == dict(zip(after.frame.id, after.frame.split))
    assert dict(zip(before.frame.id, before.frame.labels)) == dict(zip(after.frame.id, after.frame.labels))
    assert o.read(folder).hash() == after.hash() != before.hash()


def test_split_rule_is_pinned():
    "What was published once must never be cut anew: a change of the random numbers below would show here."
    groups = [f'HAM_{i:07d}' for i in range(20)]
    part = split_groups(groups, fractions={'train': .8, 'test': .2}, seed=0)
    assert [g for g, p in zip(groups, part) if p == 'test'] == ['HAM_0000000', 'HAM_0000007', 'HAM_0000010', 'HAM_0000014']


@each
def test_extra_columns_are_accepted_and_renamed_ones_explained(twin):
    o, folder, path = twin
    rewrite(path, lambda f: f.assign(reader='me'))
    assert len(o.read(folder)) == 64
    column = GROUP[o.name]
    rewrite(path, lambda f: f.rename(columns={column: column.upper()}))
    with pytest.raises(DataError, match=f"no column '{column}'.*Rename '{column.upper()}' to '{column}'"): o.read(folder)
    rewrite(path, lambda f: f.drop(columns=column.upper()))
    with pytest.raises(DataError, match=f"no column '{column}'"): o.read(folder)


@each
def test_missing_images_are_named(twin):
    o, folder, path = twin
    images = sorted(p for p in folder.rglob('*') if p.suffix in ('.png', '.jpg', '.dicom'))
    images[0].unlink()
    with pytest.raises(DataError, match=f"row \\d+: '.*{images[0].name}'.*half") as e: o.read(folder)
    assert images[0].stem in path.read_text().splitlines()[e.value.row - 1], 'the row is that of the table'
    for p in images[1:]: p.unlink()
    with pytest.raises(DataError, match='half|no such folder'): o.read(folder)
    shutil.rmtree(images[0].parent)
    with pytest.raises(DataError): o.read(folder)


@each
def test_files_that_are_not_there_or_not_official(twin, tmp_path):
    o, folder, path = twin
    path.unlink()
    (folder/'index.jsonl').write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=f'{TABLE[o.name]}: no such file'): o.read(folder)
    path.write_bytes(b'')
    with pytest.raises(DataError, match='zero bytes'): o.read(folder)
    with pytest.raises(DataError, match='no such file'): o.read(tmp_path/'nowhere')


@pytest.mark.parametrize('write', [pad_ufes_20_twin, skin_cancer_twin, vindr_mammo_twin])
def test_twin_is_a_function_of_its_arguments(tmp_path, write):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)): write(tmp_path/name, 16, seed)
    a, b, c = ({p.relative_to(tmp_path/o).as_posix(): p.read_bytes() for p in (tmp_path/o).rglob('*') if p.is_file()} for o in 'abc')
    assert a == b
    assert not {v for k, v in a.items() if k.endswith(('.png', '.jpg', '.dicom'))} & set(c.values())


@pytest.mark.parametrize('name', SKIN)
def test_prompts_are_those_of_the_modality(name):
    "HAM10000 and PAD-UFES-20 were once asked about in words of histology."
    o, word = SKIN[name], {'vindr_mammo': 'mammogram'}.get(name, 'skin')
    for p in o.prompt_sets:
        assert any(word in t for t in PROMPTS[p].templates) and not any('histo' in t or 'patholog' in t for t in PROMPTS[p].templates)
        assert len({tuple(w) for w in prompts_for(o.classes, PROMPTS[p])}) == len(o.classes)
    if o.kind == 'multilabel': assert len(prompts_for(o.classes, PROMPTS[o.prompt_sets[0]], negative=True)) == 10


# ---- tables of cases

@pytest.mark.parametrize('read, code, names, twin', [(read_pad_ufes_20, 'diagnostic', PAD_UFES_20, 'pad_ufes_20'),
                                                     (read_skin_cancer, 'dx', HAM10000, 'skin_cancer')], indirect=['twin'])
def test_class_is_looked_up_by_code(twin, read, code, names):
    "Public loaders number HAM10000's seven differently: only the code says which is which."
    _, folder, path = twin
    corpus, frame = read(folder), pd.read_csv(path, dtype=str)
    assert corpus.frame.labels.tolist() == [(names[o],) for o in frame[code]]
    rewrite(path, lambda f: f.assign(**{code: f[code].str.lower() if code == 'diagnostic' else f[code].str.upper()}))
    with pytest.raises(DataError, match=f'row 2: {code} is .* none of'): read(folder)


@pytest.mark.parametrize('twin', ['pad_ufes_20', 'skin_cancer'], indirect=True)
@pytest.mark.parametrize('row, cells, message', [
    (3, {'group': ''}, "row 5: .* '' is empty"), (0, {'image': ''}, "row 2: .* '' is empty"), (6, {'image': 'first'}, 'row 8: .* occurs before'),
    (4, {'image': '../../secret.png'}, "row 6: '../../secret.png.* is in none of")])
def test_rows_that_do_not_fit_are_named(twin, row, cells, message):
    o, folder, path = twin
    columns = {'group': GROUP[o.name], 'image': {'pad_ufes_20': 'img_id', 'skin_cancer': 'image_id'}[o.name]}
    def change(frame):
        for k, v in cells.items(): frame.loc[row, columns[k]] = frame[columns[k]][0] if v == 'first' else v
        return frame
    rewrite(path, change)
    with pytest.raises(DataError, match=message): o.read(folder)


@pytest.mark.parametrize('twin', ['pad_ufes_20', 'skin_cancer'], indirect=True)
def test_images_may_lie_flat(twin):
    o, folder, _ = twin
    before, flat = o.read(folder), folder/{'pad_ufes_20': 'images', 'skin_cancer': ''}[o.name]
    for p in sorted(folder.rglob('*.png')) + sorted(folder.rglob('*.jpg')): p.rename(flat/p.name)
    after = o.read(folder)
    assert all(after[i].image.exists() for i in (0, 63)) and (before.frame.split == after.frame.split).all()


@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    "A folder in HAM10000's layout with nine empty images."
    folder = tmp_path_factory.mktemp('ham')
    for i in range(9): (folder/f'ISIC_{i}.jpg').touch()
    return folder


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 11), st.sampled_from(['mel', 'nv', 'Mel', '']), st.sampled_from(['a', 'b', 'c', ''])), min_size=1, max_size=9))
def test_any_table_is_read_or_refused(cases, rows):
    "Every row is kept, or the table is refused with a row; no lesion is ever torn."
    frame = pd.DataFrame(rows, columns=['image_id', 'dx', 'lesion_id']).assign(image_id=lambda f: 'ISIC_' + f.image_id.astype(str))
    frame.to_csv(cases/'HAM10000_metadata.csv', index=False)
    fits = frame.dx.isin(HAM10000).all() and frame.lesion_id.all() and not frame.image_id.duplicated().any() and \
        all((cases/f'{o}.jpg').exists() for o in frame.image_id)
    if not fits:
        with pytest.raises(DataError, match=r'HAM10000_metadata.csv, row \d+: '): read_skin_cancer(cases)
        return
    corpus = read_skin_cancer(cases)
    assert corpus.frame.id.tolist() == frame.image_id.tolist() and corpus.frame.groupby('group').split.nunique().max() == 1


# ---- findings

def mammo(folder, rows):
    "Write a table of (study, image, findings, split) with empty images."
    frame = pd.DataFrame(rows, columns=['study_id', 'image_id', 'finding_categories', 'split'])
    for row in frame.itertuples():
        (folder/'images'/row.study_id).mkdir(parents=True, exist_ok=True)
        (folder/'images'/row.study_id/f'{row.image_id}.dicom').touch()
    frame.to_csv(folder/'finding_annotations.csv', index=False)
    return folder


def test_no_finding_is_no_class(tmp_path):
    "It once became class 0, a mass, by an argmax over zeros."
    corpus = read_vindr_mammo(mammo(tmp_path, [
        ('s', 'a', "['No Finding']", 'training'), ('s', 'b', "['Mass']", 'training'), ('t', 'c', "['No Finding']", 'test')]))
    assert corpus.frame.labels.tolist() == [(), ('Mass',), ()] and 'No Finding' not in corpus.classes and len(corpus.classes) == 10
    assert corpus.targets().sum(1).tolist() == [0, 1, 0] and corpus.targets()[1].argmax() == 0


def test_findings_of_an_image_are_one_row(tmp_path):
    corpus = read_vindr_mammo(mammo(tmp_path, [
        ('s', 'a', "['Mass']", 'training'), ('t', 'b', "['Asymmetry']", 'test'), ('s', 'a', "['Suspicious Calcification', 'Mass']", 'training'),
        ('s', 'a', "['Nipple Retraction']", 'training')]))
    assert corpus.frame.id.tolist() == ['a', 'b'] and corpus.frame.split.tolist() == ['train', 'test']
    assert corpus.frame.labels.tolist() == [('Mass', 'Suspicious Calcification', 'Nipple Retraction'), ('Asymmetry',)]


@pytest.mark.parametrize('rows, message', [
    ([('s', 'a', "['Mas']", 'test')], "row 2: finding_categories is 'Mas', none of .*Perhaps 'Mass' is meant"),
    ([('s', 'a', "['Mass']", 'test'), ('s', 'b', 'Mass', 'test')], "row 3: finding_categories is 'Mass'; expected a list"),
    ([('s', 'a', '[]', 'test')], r"row 2: finding_categories is '\[\]'; expected a list"),
    ([('s', 'a', "['Mass'", 'test')], 'row 2: .* expected a list'),
    ([('s', 'a', "__import__('os').getcwd()", 'test')], 'row 2: .* expected a list'),
    ([('s', 'a', "['Mass']", 'val')], "row 2: split is 'val', none of"),
    ([('s', 'a', "['Mass']", 'test'), ('s', 'a', "['Asymmetry']", 'training')], 'row 3: image a has two values of split'),
    ([('s', 'a', "['Mass']", 'test'), ('t', 'a', "['Mass']", 'test')], 'row 3: image a has two values of study_id'),
    ([('s', 'a', "['Mass']", 'test'), ('s', 'b', "['Mass']", 'training')], "group 's' stands in the splits"),
])
def test_findings_that_do_not_fit_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message): read_vindr_mammo(mammo(tmp_path, rows))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.sampled_from((*VINDR_MAMMO, 'No Finding')), min_size=1, max_size=3)), min_size=1, max_size=12))
def test_any_findings_become_their_union(tmp_path, rows):
    shutil.rmtree(tmp_path/'images', ignore_errors=True)
    corpus = read_vindr_mammo(mammo(tmp_path, [(f's{i // 2}', f'i{i}', str(names), 'test' if i > 3 else 'training') for i, names in rows]))
    wanted = {}
    for i, names in rows: wanted.setdefault(f'i{i}', set()).update(set(names) - {'No Finding'})
    assert {o.id: set(o.labels) for o in corpus.frame.itertuples()} == wanted and list(corpus.frame.id) == list(wanted)
    assert (corpus.targets().sum(1) == [len(o) for o in wanted.values()]).all()


def test_mammograms_read_alike_whichever_way_grey_runs(twins):
    corpus = read_vindr_mammo(twins/'vindr_mammo')
    kinds = [pydicom.dcmread(corpus[i].image).PhotometricInterpretation for i in range(6)]
    assert set(kinds) == {'MONOCHROME1', 'MONOCHROME2'}
    corners = [read_image(corpus[i].image)[:6, :6].mean() for i in range(6)]
    assert max(corners) < 128, 'air is dark in all of them'


def test_mammogram_with_missing_tags(twins, tmp_path):
    path = read_vindr_mammo(twins/'vindr_mammo')[0].image
    for name in ('WindowCenter', 'Rows'):
        ds = pydicom.dcmread(path)
        delattr(ds, name)
        ds.save_as(tmp_path/f'{name}.dicom')
    assert read_image(tmp_path/'WindowCenter.dicom').shape == (64, 64)
    with pytest.raises(DataError, match='Rows.dicom: '): read_image(tmp_path/'Rows.dicom')


def test_twenty_thousand_mammograms_are_indexed_in_two_seconds(tmp_path):
    rows = [(f's{i // 400}', f'i{i}', "['Mass']" if i % 9 == 0 else "['No Finding']", 'test' if i >= 16000 else 'training') for i in range(20_000)]
    mammo(tmp_path, rows)
    start = time.process_time()
    assert len(read_vindr_mammo(tmp_path)) == 20_000
    assert time.process_time() - start < 2


# ---- real images

@pytest.mark.skipif(not os.environ.get('MEDCL_DATA'), reason='MEDCL_DATA is not set: no real image is here')
def test_real_images_in_the_official_tree(tmp_path):
    "The public sample's lesions, each with one image, put where HAM10000 would have them."
    found = Path(os.environ['MEDCL_DATA'])/'ham10000'
    if not (found/'index.jsonl').exists(): pytest.skip('MEDCL_DATA does not hold the public sample')
    with pytest.raises(DataError, match='HAM10000_metadata.csv: no such file'): read_skin_cancer(found)
    rows = [json.loads(o) for o in (found/'index.jsonl').read_text().splitlines()]
    table = pd.DataFrame({'lesion_id': [o['group_id'].removeprefix('lesion:') for o in rows], 'image_id': [Path(o['image']).stem for o in rows],
                          'dx': [o['labels']['dx'] for o in rows], 'age': [o.get('age') for o in rows]})
    table.to_csv(tmp_path/'HAM10000_metadata.csv', index=False)
    for i, o in enumerate(rows):
        part = tmp_path/f'HAM10000_images_part_{1 + i % 2}'
        part.mkdir(exist_ok=True)
        (part/Path(o['image']).name).symlink_to(found/o['image'])
    corpus = read_skin_cancer(tmp_path)
    assert corpus.source == 'real' and len(corpus) == len(rows) == 640
    assert corpus.frame.split.value_counts().to_dict() == {'train': 512, 'test': 128}
    assert all(corpus.split(s).targets().sum(0).all() for s in ('train', 'test'))
    assert all(read_image(corpus[i].image).ndim == 3 for i in range(0, 640, 80))
