"""MIMIC-CXR and CheXpert: readers on their twins, what is left of the rows and why, and every malformed file named."""
import gzip
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcl_study.core import DataError, data_root
from medcl_study.data.images import read_image
from medcl_study.data.sets import chest
from medcl_study.data.sets.chest import (CHEST, COMPETITION, OBSERVATIONS, UNCERTAIN, chexpert_twin, five_by_two_hundred,
                                         mimic_cxr_jpg_twin, observed, read_chexpert, read_chexpert_5x200, read_mimic_5x200,
                                         read_mimic_cxr, read_mimic_cxr_labels)

MIMIC_READERS = (read_mimic_cxr, read_mimic_cxr_labels, read_mimic_5x200)
CHEXPERT_READERS = (read_chexpert, read_chexpert_5x200)


@pytest.fixture(scope='module')
def mimic(tmp_path_factory):
    mimic_cxr_jpg_twin(folder := tmp_path_factory.mktemp('mimic'), 96, 1)
    return folder


@pytest.fixture(scope='module')
def chexpert(tmp_path_factory):
    chexpert_twin(folder := tmp_path_factory.mktemp('chexpert'), 160, 1)
    return folder


@pytest.fixture()
def copied(mimic, chexpert, tmp_path):
    "Copies of both twins, to be spoilt."
    shutil.copytree(mimic, tmp_path/'mimic')
    shutil.copytree(chexpert, tmp_path/'chexpert')
    return tmp_path


def edit(path, change):
    "Change a table in place, or at one cell (row from 0, column, value)."
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if callable(change): frame = change(frame)
    else: frame.loc[change[0], change[1]] = change[2]
    frame.to_csv(path, index=False)


def table(folder, part): return pd.read_csv(folder/f'mimic-cxr-2.0.0-{part}.csv.gz', dtype=str, keep_default_na=False)


# ---- MIMIC-CXR

def test_pairs_hold_what_the_files_say(mimic):
    corpus, split = read_mimic_cxr(mimic, per_study=False, views='all', spare_5x200=False), table(mimic, 'split').set_index('dicom_id')
    assert corpus.source == 'twin' and set(corpus.frame.modality) == {'chest X-ray'}
    for i in range(0, len(corpus), 7):
        sample, row = corpus[i], split.loc[corpus.frame.id[i]]
        assert sample.group == 'p' + row.subject_id and sample.labels is None
        assert sample.split == {'validate': 'valid'}.get(row.split, row.split)
        assert sample.image == mimic/f'files/{sample.group[:3]}/{sample.group}/s{row.study_id}/{sample.id}.jpg'
        assert read_image(sample.image).shape[:2] == (64, 64)
        report = ' '.join(sample.image.parent.with_suffix('.txt').read_text().split())
        assert all(' '.join(o.split()) in report for o in sample.text.split('\n\n'))
        assert 'INDICATION' not in sample.text and 'COMPARISON' not in sample.text and 'Discussed' not in sample.text


def test_flow_counts_every_exclusion(mimic):
    corpus = read_mimic_cxr(mimic)
    flow = corpus.flow
    assert list(flow) == ['step', 'rows', 'groups'] and flow.rows.is_monotonic_decreasing and flow.groups.is_monotonic_decreasing
    assert flow.rows.iloc[0] == 96 == len(table(mimic, 'split')) and flow.rows.iloc[-1] == len(corpus)
    assert flow.groups.iloc[-1] == corpus.frame.group.nunique() and len(corpus.report) == flow.rows.iloc[-2] - flow.rows.iloc[-1] > 0
    assert not set(corpus.report.row) & set(corpus.frame.study) and all((mimic/o).exists() for o in corpus.report.file)
    assert all('IMPRESSION:  ___.' in (mimic/o).read_text() for o in corpus.report.file)
    assert corpus.split('train').flow is corpus.select([0, 1]).flow is flow


def test_views_and_studies(mimic):
    views = table(mimic, 'metadata').set_index('dicom_id').ViewPosition
    frontal, everything = (read_mimic_cxr(mimic, per_study=False, views=o, spare_5x200=False) for o in ('frontal', 'all'))
    assert set(views[frontal.frame.id]) == {'PA', 'AP'} and 'LATERAL' in set(views[everything.frame.id])
    single = read_mimic_cxr(mimic, views='all', spare_5x200=False)
    assert single.frame.study.is_unique and set(single.frame.study) == set(everything.frame.study)
    assert set(single.frame.view) == {'PA', 'AP'}  # a frontal image stands for the study where there is one
    with pytest.raises(ValueError, match="views is 'side'"): read_mimic_cxr(mimic, views='side')


def test_images_of_one_study_share_their_positive(mimic):
    corpus = read_mimic_cxr(mimic, per_study=False, views='all')
    ids = pd.Series(corpus.text_ids())
    assert (ids.groupby(corpus.frame.study).nunique() == 1).all()
    assert Counter(Counter(corpus.frame.study).values())[2] > 5


def test_patients_stay_in_one_split_and_out_of_5x200(mimic):
    five = read_mimic_5x200(mimic)
    for corpus in (read_mimic_cxr(mimic), read_mimic_cxr(mimic, per_study=False, views='all'), read_mimic_cxr_labels(mimic)):
        assert (corpus.frame.groupby('group').split.nunique() == 1).all()
        assert not set(corpus.frame.group[corpus.frame.split != 'test']) & set(five.frame.group)
    drawn = five.frame.drawn_from != 'test'
    assert drawn.any() and set(five.frame.group[drawn]) <= set(read_mimic_cxr_labels(mimic, spare_5x200=False).frame.group)


def test_uncertain_and_unknown_studies(mimic, copied):
    ours = {o: read_mimic_cxr_labels(mimic, uncertain=o) for o in UNCERTAIN}
    lost = ours['ignore'].frame.labels.isna()
    assert lost.any() and all(len(o) == len(lost) and o.frame.labels.notna().all() for k, o in ours.items() if k != 'ignore')
    sums = {k: np.nansum(o.targets()) for k, o in ours.items()}
    assert sums['ones'] > sums['zeros'] >= sums['ignore'] and np.isnan(ours['ignore'].targets()[lost]).all()
    assert ours['ignore'].flow.rows.iloc[-1] == (~lost).sum()
    five = read_mimic_cxr_labels(mimic, classes=COMPETITION)
    assert five.classes == COMPETITION and five.frame.labels.isna().sum() <= lost.sum()
    other = read_mimic_cxr_labels(mimic, labeller='negbio')
    assert not other.frame.labels.equals(ours['ignore'].frame.labels)
    edit(copied/'mimic/mimic-cxr-2.0.0-chexpert.csv.gz', lambda o: o.iloc[1:])  # a study that the labeller does not know
    study = 's' + table(mimic, 'chexpert').study_id[0]
    less = read_mimic_cxr_labels(copied/'mimic', uncertain='zeros', spare_5x200=False).frame
    assert less.labels[less.study == study].isna().all() and less.labels[less.study != study].notna().all()


def test_labels_need_no_reports(copied):
    for o in (copied/'mimic').rglob('*.txt'): o.unlink()
    assert len(read_mimic_cxr_labels(copied/'mimic')) and len(read_mimic_5x200(copied/'mimic'))
    with pytest.raises(DataError, match=r's5\d+.txt: no such report'): read_mimic_cxr(copied/'mimic')


@pytest.mark.parametrize('packed', [False, True])
def test_reports_in_a_folder_or_archive_of_their_own(mimic, copied, packed):
    for o in sorted((copied/'mimic').rglob('s*.txt')):
        new = copied/'mimic/mimic-cxr-reports'/o.relative_to(copied/'mimic')
        new.parent.mkdir(parents=True, exist_ok=True)
        o.rename(new)
    if packed:
        shutil.make_archive(copied/'mimic/mimic-cxr-reports', 'zip', copied/'mimic', 'mimic-cxr-reports')
        shutil.rmtree(copied/'mimic/mimic-cxr-reports')
    assert read_mimic_cxr(copied/'mimic').frame.text.equals(read_mimic_cxr(mimic).frame.text)


def test_large_sets_keep_an_index_in_the_work_folder(mimic, tmp_path, monkeypatch):
    monkeypatch.setenv('MEDCL_WORK', str(tmp_path))
    read_mimic_cxr(mimic)
    assert not list(tmp_path.iterdir())  # a small set keeps nothing
    monkeypatch.setattr(chest, '_FEW', 10)
    first = read_mimic_cxr(mimic)
    assert list((tmp_path/'reports').rglob('*.reports.parquet'))
    monkeypatch.setattr('medcl_study.data.reports._fetch', lambda *_: pytest.fail('read a file again'))
    assert read_mimic_cxr(mimic).frame.equals(first.frame) and read_mimic_cxr(mimic).hash() == first.hash()


def test_plain_tables_and_extra_columns_are_read(mimic, copied):
    for part in ('split', 'metadata', 'chexpert'):
        path = copied/f'mimic/mimic-cxr-2.0.0-{part}.csv.gz'
        path.with_suffix('').write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
        edit(path.with_suffix(''), lambda o: o.assign(remark='x'))
    assert read_mimic_cxr(copied/'mimic').hash() == read_mimic_cxr(mimic).hash()


@pytest.mark.parametrize('part, change, message', [
    ('split', lambda o: o.rename(columns={'dicom_id': 'DICOM ID'}), "Rename 'DICOM ID' to 'dicom_id'"),
    ('split', lambda o: o.drop(columns='split'), "no column 'split'"),
    ('split', (3, 'split', 'val'), "row 5: split is 'val', none of"),
    ('split', (3, 'dicom_id', '../../../etc/passwd'), "row 5: dicom_id is '../../../etc/passwd'"),
    ('split', (2, 'subject_id', '99'), "row 4: subject_id is '99'"),
    ('split', (2, 'study_id', 's50000000'), "row 4: study_id is 's50000000'"),
    ('split', lambda o: pd.concat([o, o.iloc[:1]]), 'row 98: dicom_id .* occurs before'),
    ('split', (0, 'split', 'test'), r"group 'p1\d+' stands in the splits \['test', 'train'\]"),
    ('metadata', lambda o: o.iloc[1:], r'row 2: dicom_id .* is not in mimic-cxr-2.0.0-metadata.csv'),
    ('metadata', lambda o: o.rename(columns={'ViewPosition': 'View_Position'}), "Rename 'View_Position' to 'ViewPosition'"),
    ('chexpert', lambda o: o.rename(columns={'Pleural Effusion': 'Effusion'}), "no column 'Pleural Effusion'"),
    ('chexpert', (4, 'Edema', '2.0'), "row 6: Edema is '2.0'; expected 1.0, 0.0, -1.0 or nothing"),
    ('chexpert', (4, 'Edema', 'yes'), "row 6: Edema is 'yes'"),
])
def test_bad_tables_of_mimic_are_named(copied, part, change, message):
    path = copied/f'mimic/mimic-cxr-2.0.0-{part}.csv.gz'
    edit(path, change)
    for read in MIMIC_READERS:
        with pytest.raises(DataError, match=message) as e: read(copied/'mimic')
        assert path.name.removesuffix('.gz') in str(e.value)


def test_half_extracted_mimic_is_named(copied):
    corpus = read_mimic_cxr_labels(copied/'mimic')
    image = copied/'mimic'/corpus.frame.image[3]
    image.unlink()
    with pytest.raises(DataError, match=f'{image.name}: no such image.*by half'): read_mimic_cxr_labels(copied/'mimic')
    shutil.rmtree(image.parents[1])
    with pytest.raises(DataError, match='no such'): read_mimic_cxr_labels(copied/'mimic')
    (copied/'mimic/mimic-cxr-2.0.0-metadata.csv.gz').write_bytes((copied/'mimic/mimic-cxr-2.0.0-metadata.csv.gz').read_bytes()[:200])
    with pytest.raises(DataError, match='not a readable table'): read_mimic_cxr_labels(copied/'mimic')


def test_large_sets_are_looked_over_by_patient(copied, monkeypatch):
    monkeypatch.setattr(chest, '_FEW', 10)
    corpus = read_mimic_cxr_labels(copied/'mimic')
    patient = (copied/'mimic'/corpus.frame.image[3]).parents[1]
    shutil.rmtree(patient)
    with pytest.raises(DataError, match=f'{patient.name}: no such image'): read_mimic_cxr_labels(copied/'mimic')


# ---- CheXpert

def test_chexpert_holds_what_the_files_say(chexpert):
    corpus = read_chexpert(chexpert, views='all', uncertain='zeros', spare_5x200=False)
    assert len(corpus) == 160 and {'train', 'valid', 'test'} == set(corpus.frame.split)
    for part, splits in (('train', ('train', 'valid')), ('valid', ('test',))):
        rows = pd.read_csv(chexpert/f'CheXpert-v1.0-small/{part}.csv').set_index('Path')
        ours = corpus.frame[corpus.frame.split.isin(splits)].set_index('image')
        assert set(ours.index) == set(rows.index)
        for path, labels in ours.labels.items(): assert set(labels) == {o for o in OBSERVATIONS if rows.loc[path, o] == 1}
    assert (corpus.frame.groupby('group').split.nunique() == 1).all() and corpus.frame.id.str.match(r'(train|valid)/patient\d{5}/').all()


def test_chexpert_test_rows_lose_nothing_to_doubt(chexpert):
    corpus = read_chexpert(chexpert)
    assert corpus.split('test').frame.labels.notna().all() and corpus.frame.labels.isna().any()
    assert set(corpus.frame.side) == {'frontal'} and set(corpus.split('test').frame.image.str.split('/').str[1]) == {'valid'}
    five = read_chexpert_5x200(chexpert)
    assert not set(five.frame.group) & set(corpus.frame.group) and set(five.frame.image.str.split('/').str[1]) == {'train'}
    assert corpus.flow.rows.iloc[0] == 160 and corpus.flow.rows.iloc[-1] == corpus.frame.labels.notna().sum()


@pytest.mark.parametrize('change, message', [
    (lambda o: o.rename(columns={'Path': 'path'}), "Rename 'path' to 'Path'"),
    (lambda o: o.drop(columns='Edema'), "no column 'Edema'"),
    ((5, 'Path', 'CheXpert-v1.0-small/train/../../etc/passwd'),
     "row 7: Path is 'CheXpert-v1.0-small/train/../../etc/passwd'; expected the like"),
    ((5, 'Path', 'train/patient00001/study1/view1_frontal.jpg'), 'row 7: Path is'),
    ((0, 'Frontal/Lateral', 'Lateral'), "row 2: Frontal/Lateral is 'Lateral', which its Path denies"),
    ((5, 'Cardiomegaly', '3'), "row 7: Cardiomegaly is '3'; expected"),
    (lambda o: pd.concat([o, o.iloc[:1]]), 'occurs before'),
])
def test_bad_tables_of_chexpert_are_named(copied, change, message):
    edit(copied/'chexpert/CheXpert-v1.0-small/train.csv', change)
    for read in CHEXPERT_READERS:
        with pytest.raises(DataError, match=message): read(copied/'chexpert')


def test_half_extracted_chexpert_is_named(copied):
    corpus = read_chexpert(copied/'chexpert')
    (copied/'chexpert'/corpus.frame.image[0]).unlink()
    with pytest.raises(DataError, match='no such image.*by half'): read_chexpert(copied/'chexpert')
    shutil.rmtree(copied/'chexpert/CheXpert-v1.0-small/valid')
    with pytest.raises(DataError, match='no such'): read_chexpert(copied/'chexpert')
    (copied/'chexpert/CheXpert-v1.0-small/valid.csv').unlink()
    (copied/'chexpert/CheXpert-v1.0-small/archive.zip').touch()
    with pytest.raises(DataError, match='valid.csv: no such file. Extract archive.zip'): read_chexpert(copied/'chexpert')


@pytest.mark.parametrize('read', [*MIMIC_READERS, *CHEXPERT_READERS])
def test_a_folder_of_something_else_is_refused(read, tmp_path):
    (tmp_path/'index.jsonl').write_text('{}\n')
    with pytest.raises(DataError, match='no such file'): read(tmp_path)
    with pytest.raises(DataError, match='no such file'): read(tmp_path/'missing')


# ---- five classes of two hundred

def population(n, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({'id': [f'{i:05d}' for i in range(n)], 'group': [f'g{i // 3}' for i in range(n)],
                          'split': rng.choice(['train', 'valid', 'test'], n)})
    return frame, rng.choice([0, 1, -1], (n, 14), p=[.8, .15, .05]).astype(np.int8)


def test_two_hundred_of_each_come_from_a_large_set():
    frame, values = population(30_000)
    at = five_by_two_hundred(frame, values)
    five = values[at][:, [OBSERVATIONS.index(o) for o in COMPETITION]]
    assert ((five == 1).sum(1) == 1).all() and (five >= 0).all() and (five.sum(0) == 200).all()
    drawn = frame.iloc[at].assign(label=five.argmax(1))
    assert not drawn.duplicated(['label', 'group']).any() and (drawn.split == 'test').all()
    assert set(at) != set(five_by_two_hundred(frame, values, seed=1)) and list(at) == list(five_by_two_hundred(frame, values))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_draw_does_not_depend_on_the_order_of_rows(seed):
    frame, values = population(900, seed)
    order = np.random.default_rng(seed).permutation(900)
    moved = frame.iloc[order].iloc[five_by_two_hundred(frame.iloc[order], values[order], each=5, seed=seed)]
    assert set(moved.id) == set(frame.iloc[five_by_two_hundred(frame, values, each=5, seed=seed)].id)


def test_no_image_alone_is_an_error():
    frame, values = population(300)
    values[:, OBSERVATIONS.index('Edema')] = 0
    with pytest.raises(DataError, match='fewer than 2 patients have Edema alone'): five_by_two_hundred(frame, values)


@pytest.mark.parametrize('read', [read_mimic_5x200, read_chexpert_5x200])
def test_5x200_of_a_twin_is_balanced(read, mimic, chexpert):
    corpus = read(mimic if read is read_mimic_5x200 else chexpert)
    counts = Counter(corpus.frame.labels)
    assert set(counts) == {(o,) for o in COMPETITION} and len(set(counts.values())) == 1 and set(corpus.frame.split) == {'test'}
    assert corpus.targets().sum(1).tolist() == [1] * len(corpus)


# ---- labels

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0, 1, -1]), min_size=14, max_size=14), min_size=1, max_size=8), st.sampled_from(list(UNCERTAIN)),
       st.lists(st.sampled_from(OBSERVATIONS), min_size=1, max_size=14, unique=True))
def test_labels_equal_a_loop(rows, policy, classes):
    expected = []
    for row in rows:
        cells = {o: row[OBSERVATIONS.index(o)] for o in classes}
        if policy == 'ignore' and -1 in cells.values(): expected.append(None)
        else: expected.append(tuple(o for o, v in cells.items() if v == 1 or (v == -1 and o in (UNCERTAIN[policy] or ()))))
    assert observed(np.array(rows, np.int8), classes, policy).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet='01-.x ', max_size=5))
def test_any_other_cell_is_named(cell):
    frame = pd.DataFrame({o: ['1.0', ''] for o in OBSERVATIONS})
    frame.loc[1, 'Fracture'] = cell
    if cell in chest._CELLS: assert chest._values(frame, 'x.csv')[1, OBSERVATIONS.index('Fracture')] == chest._CELLS[cell]
    else:
        with pytest.raises(DataError, match='x.csv, row 3: Fracture is'): chest._values(frame, 'x.csv')


def test_unknown_options_are_refused(mimic, chexpert):
    with pytest.raises(ValueError, match='uncertain is'): read_mimic_cxr_labels(mimic, uncertain='maybe')
    with pytest.raises(ValueError, match='unknown classes'): read_chexpert(chexpert, classes=('Edema', 'Oedema'))
    with pytest.raises(ValueError, match='labeller is'): read_mimic_cxr_labels(mimic, labeller='chexbert')
    with pytest.raises(ValueError, match='unknown sections'): read_mimic_cxr(mimic, keep=('indication',))
    with pytest.raises(ValueError, match='views is'): read_chexpert(chexpert, views='left')


# ---- the rows

@pytest.mark.parametrize('name', CHEST)
def test_row(name, mimic, chexpert):
    row = CHEST[name]
    corpus = row.read(mimic if row.folder == 'mimic_cxr_jpg' else chexpert)
    assert corpus.name == name and corpus.classes == row.classes and row.family in ('mimic_cxr', 'chexpert')
    assert row.group == 'patient' and row.steps and row.licence and row.citation and row.note
    assert corpus.frame.id.is_unique and isinstance(corpus.flow, pd.DataFrame)


def test_a_twin_says_so_and_the_real_thing_does_not(mimic, copied):
    (copied/'mimic/TWIN').unlink()
    assert read_mimic_cxr(copied/'mimic').source == 'real'
    assert read_mimic_cxr(copied/'mimic').frame.equals(read_mimic_cxr(mimic).frame)


@pytest.mark.parametrize('name', CHEST)
def test_real_files(name):
    "Where the real release lies below MEDCL_DATA, its counts are those of the row."
    try: folder = data_root()/CHEST[name].folder
    except DataError as e: pytest.skip(f'real files are not here: {e}')
    if not folder.is_dir() or (folder/'TWIN').exists(): pytest.skip(f'real files are not here: no {folder.name}/ below MEDCL_DATA')
    corpus = CHEST[name].read(folder)
    assert CHEST[name].counts.items() <= Counter(corpus.frame.split).items()
    assert Path(corpus[0].image).exists()
