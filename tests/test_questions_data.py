"""Question sets: their readers on twins in the official layouts, on broken files, and, with MEDCL_DATA, on the real VQA-RAD questions."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medcl_study.core import DataError
from medcl_study.data.images import pack, resize, to_channels
from medcl_study.data.pairs import Corpus, Question, normalise_text
from medcl_study.data.sets.questions import (
    QUESTIONS, answer_vocabulary, check_questions, read_path_vqa, read_slake, read_vqa_rad)

RAD = 'VQA_RAD Dataset Public.json'
READERS = {'vqa_rad': read_vqa_rad, 'path_vqa': read_path_vqa, 'slake': read_slake}


@pytest.fixture(scope='module')
def twins(tmp_path_factory):
    root = tmp_path_factory.mktemp('twins')
    for row in QUESTIONS.values(): row.write_twin(root/row.folder, 48, 0)
    return root


@pytest.fixture
def copy(twins, tmp_path):
    "A copy of the twins that a test may break."
    return Path(shutil.copytree(twins, tmp_path/'twins'))


def change(path, row, **values):
    "Change fields of one record of a JSON list; None removes the field."
    records = json.loads(path.read_text())
    records[row] = {k: v for k, v in (records[row] | values).items() if v is not None}
    path.write_text(json.dumps(records))


# ---- readers read what twins wrote

@pytest.mark.parametrize('name', QUESTIONS)
def test_reader_yields_what_the_files_hold(twins, name):
    corpus = READERS[name](twins/name)
    assert corpus.source == 'twin' and corpus.hash() == READERS[name](twins/name).hash()
    assert all(len(o.questions) == 1 and o.labels is None and o.text == '' for o in corpus)
    if name == 'path_vqa':
        files = [p for s in ('train', 'validation', 'test') for p in sorted((twins/name/'data').glob(f'{s}-*'))]
        rows = [o for p in files for o in pq.read_table(p).to_pylist()]
    else:
        tables = [RAD] if name == 'vqa_rad' else ['train.json', 'validation.json', 'test.json']
        rows = [o for t in tables for o in json.loads((twins/name/t).read_text()) if o.get('q_lang', 'en') == 'en']
    assert [(o['question'], o['answer']) for o in rows] == [(o.questions[0].question, o.questions[0].answer) for o in corpus]


def test_images_are_there_and_packed_once_each(twins, tmp_path):
    for name in ('vqa_rad', 'slake'):
        corpus = READERS[name](twins/name)
        assert all(o.image.exists() for o in corpus)
        assert len(pack(corpus, tmp_path/name, size=32).images) == corpus.frame.image.nunique() == 48


def test_parquet_images_survive_selection_and_pickling(twins):
    import pickle
    corpus = read_path_vqa(twins/'path_vqa')
    rows = np.array([7, 0, len(corpus) - 1])
    some = pickle.loads(pickle.dumps(corpus.select(rows)))
    assert all((some[k].image == corpus[int(i)].image).all() for k, i in enumerate(rows))
    assert corpus.select(rows).hash() != corpus.select(rows[::-1]).hash()
    per_image = [corpus[int(i)].image.tobytes() for i in corpus.frame.drop_duplicates('image').index]
    assert len(set(per_image)) == len(per_image) == 48


def test_a_picture_is_packed_once_however_many_questions_it_has(twins, tmp_path):
    corpus = read_path_vqa(twins/'path_vqa')
    cache = pack(corpus, tmp_path, size=32)
    assert len(cache) == len(corpus) > len(cache.images) == corpus.frame.image.nunique() == 48
    plain = to_channels(resize(corpus[5].image, 32, mode='pad'), 3)
    assert (cache[5] == plain).all()
    assert pack(corpus, tmp_path, size=32).folder == cache.folder


def test_identities_do_not_depend_on_when_a_file_was_written(twins, tmp_path):
    shutil.copytree(twins/'path_vqa', tmp_path/'path_vqa')
    for o in (tmp_path/'path_vqa'/'data').iterdir(): os.utime(o, (0, 0))
    first, copied = (read_path_vqa(o/'path_vqa') for o in (twins, tmp_path))
    assert first.hash() == copied.hash() and first.pixels.identities() == copied.pixels.identities()


def test_two_splits_of_vqa_rad(twins):
    ours, official = read_vqa_rad(twins/'vqa_rad'), read_vqa_rad(twins/'vqa_rad', split='official')
    assert ours.frame.groupby('image').split.nunique().max() == ours.frame.groupby('group').split.nunique().max() == 1
    assert (ours.frame.official == official.frame.split).all() and set(official.frame.split) == {'train', 'test'}
    assert official.frame.phrase_type[official.frame.split == 'test'].str.startswith('test_').all()
    assert official.frame.groupby('image').split.nunique().max() == 2, 'the known leak of the official split'
    assert ours.frame.group.nunique() == 47 and ours.frame.image.nunique() == 48, 'two images of one case share a group'
    with pytest.raises(ValueError, match='disjoint'): read_vqa_rad(twins/'vqa_rad', split='random')


def test_other_languages_are_left_out_by_name(twins):
    corpus = read_slake(twins/'slake')
    assert set(corpus.report.what) == {'question in another language (zh)'} and set(corpus.frame.language) == {'en'}
    assert len(read_slake(twins/'slake', languages=('zh',))) == len(corpus.report)


def test_slake_of_the_authors_own_archive(copy):
    (copy/'slake'/'validation.json').rename(copy/'slake'/'validate.json')
    assert len(read_slake(copy/'slake').split('valid'))


# ---- broken files are refused by name

@pytest.mark.parametrize('field, value, message', [
    ('question', '  ', 'the question is empty'), ('answer', ' . ', 'the answer is empty'), ('answer', None, 'answer is None, not text'),
    ('answer', ['yes'], "answer is \\['yes'\\], not text"), ('answer_type', 'CLOSSED', "Perhaps 'CLOSED' is meant"),
    ('answer_type', 'yes/no', "answer_type is 'yes/no', none of"), ('image_name', 'synpic1.jpg', "'synpic1.jpg' is not in"),
    ('image_name', '../synpic10000.jpg', 'is not inside')])
def test_broken_record_of_vqa_rad(copy, field, value, message):
    change(copy/'vqa_rad'/RAD, 4, **{field: value})
    with pytest.raises(DataError, match=message) as e: read_vqa_rad(copy/'vqa_rad')
    assert RAD in str(e.value) and ('row 5' in str(e.value) or '..' in value)


def test_numbers_and_extra_fields_are_accepted(copy):
    change(copy/'vqa_rad'/RAD, 4, answer=2, extra='x')
    assert read_vqa_rad(copy/'vqa_rad')[4].questions[0].answer == '2'


def test_space_after_closed_is_not_another_kind(copy):
    records = json.loads((copy/'vqa_rad'/RAD).read_text())
    assert sum(o['answer_type'] == 'CLOSED ' for o in records) == 2, 'the trap is in the twin'
    kinds = [o.questions[0].kind for o in read_vqa_rad(copy/'vqa_rad')]
    assert kinds == [o['answer_type'].strip().lower() for o in records]


def test_missing_and_renamed_columns(copy):
    path = copy/'vqa_rad'/RAD
    path.write_text(path.read_text().replace('"image_name"', '"imageName"'))
    with pytest.raises(DataError, match="Rename 'imageName' to 'image_name'"): read_vqa_rad(copy/'vqa_rad')
    path = copy/'slake'/'test.json'
    path.write_text(path.read_text().replace('"q_lang"', '"tongue"'))
    with pytest.raises(DataError, match="test.json: no column 'q_lang'"): read_slake(copy/'slake')
    path = next((copy/'path_vqa'/'data').glob('test-*'))
    pq.write_table(pq.read_table(path).rename_columns(['image', 'questions', 'answer']), path)
    with pytest.raises(DataError, match="Rename 'questions' to 'question'"): read_path_vqa(copy/'path_vqa')


def test_half_extracted_archives(copy):
    (copy/'vqa_rad'/'VQA_RAD Image Folder'/'synpic10007.jpg').unlink()
    with pytest.raises(DataError, match="'synpic10007.jpg' is not in"): read_vqa_rad(copy/'vqa_rad')
    shutil.rmtree(copy/'vqa_rad'/'VQA_RAD Image Folder')
    (copy/'vqa_rad'/'osfstorage.zip').touch()
    with pytest.raises(DataError, match='Extract osfstorage.zip'): read_vqa_rad(copy/'vqa_rad')
    (copy/'slake'/'imgs'/'xmlab3'/'source.jpg').unlink()
    with pytest.raises(DataError, match='xmlab3/source.jpg.* is not in imgs/'): read_slake(copy/'slake')
    next((copy/'path_vqa'/'data').glob('train-00000-*')).unlink()
    with pytest.raises(DataError, match=r'1 of 2 files train-\*.parquet'): read_path_vqa(copy/'path_vqa')
    with pytest.raises(DataError, match='no such folder'): read_path_vqa(copy/'nowhere')


def test_files_that_are_not_tables(copy):
    for text, message in (('{', 'not valid JSON'), ('{}', 'expected a list of'), ('[]', 'expected a list'), ('[1]', 'expected a list')):
        (copy/'slake'/'train.json').write_text(text)
        with pytest.raises(DataError, match=message): read_slake(copy/'slake')
    path = next((copy/'path_vqa'/'data').glob('test-*'))
    path.write_bytes(b'PAR1 and nothing more')
    with pytest.raises(DataError, match='not a readable Parquet file'): read_path_vqa(copy/'path_vqa')


def test_question_without_image(copy):
    path = next((copy/'path_vqa'/'data').glob('test-*'))
    rows = pq.read_table(path)
    images = rows['image'].to_pylist()
    images[3] = {'bytes': None, 'path': 'test_0003.jpg'}
    pq.write_table(rows.set_column(0, 'image', pa.array(images, rows.schema.field('image').type)), path, row_group_size=100)
    with pytest.raises(DataError, match='row 4 of group 1: a question without an image'): read_path_vqa(copy/'path_vqa')


def test_damaged_image_is_found_when_checked(copy):
    image = copy/'vqa_rad'/'VQA_RAD Image Folder'/'synpic10014.jpg'
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(DataError, match='synpic10014.jpg'): check_questions(read_vqa_rad(copy/'vqa_rad'))


# ---- every sample is read and validated

def small(**values):
    frame = pd.DataFrame({'id': ['a', 'b'], 'image': ['x', 'y'], 'text': '', 'labels': None, 'group': '', 'modality': ''})
    frame['split'] = ['train', 'test']
    frame['questions'] = [(Question('Is it?', 'Yes', 'closed'),), (Question('What?', 'it', 'open'),)]
    for k, v in values.items(): frame.at[1, k] = v
    return Corpus(frame, name='small', pixels=np.zeros((2, 8, 8), np.uint8))


@pytest.mark.parametrize('questions, message', [
    ((), 'an image without a question'), ((Question('', 'yes', 'closed'),), 'empty question or answer'),
    ((Question('Is it?', ' ', 'closed'),), 'empty question or answer'), ((Question('Is it?', 'yes', 'CLOSED'),), "unknown kind 'CLOSED'")])
def test_check_questions_refuses(questions, message):
    assert check_questions(small()).questions.tolist() == [1, 1]
    with pytest.raises(DataError, match=f'small, row b: {message}'): check_questions(small(questions=questions))


@given(st.lists(st.tuples(st.sampled_from(['train', 'valid', 'test']), st.sampled_from(['closed', 'open']),
                          st.text('aB1.; \té', max_size=6)), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_vocabulary_covers_what_training_holds(rows):
    frame = pd.DataFrame({'split': [o[0] for o in rows], 'questions': [(Question('?', o[2], o[1]),) for o in rows]})
    corpus = Corpus(frame, name='drawn')
    known = {normalise_text(a) for s, _, a in rows if s == 'train'}
    if not known:
        with pytest.raises(DataError, match='no answer occurs'): answer_vocabulary(corpus)
        return
    vocabulary = answer_vocabulary(corpus)
    assert set(vocabulary.answers) == known and len(vocabulary) == len(known)
    place = vocabulary.index([a for *_, a in rows])
    for o in vocabulary.coverage.itertuples():
        wanted = [i for i, (s, k, _) in enumerate(rows) if s == o.split and o.kind in (k, 'all')]
        assert o.questions == len(wanted) and o.covered == pytest.approx(np.mean(place[wanted] >= 0))


@given(row=st.integers(0, 30), field=st.sampled_from(['img_name', 'question', 'answer', 'q_lang', 'answer_type', 'qid']),
       value=st.one_of(st.none(), st.booleans(), st.floats(allow_nan=False), st.text(max_size=5), st.lists(st.integers(), max_size=2)))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_malformed_rows_are_read_or_refused_by_name(twins, tmp_path, row, field, value):
    "Whatever stands in a field, the reader yields well-formed questions or a DataError that names the file."
    if not (tmp_path/'imgs').exists(): (tmp_path/'imgs').symlink_to(twins/'slake'/'imgs')
    for split in ('train', 'validation', 'test'): shutil.copy(twins/'slake'/f'{split}.json', tmp_path)
    change(tmp_path/'train.json', row, **{field: value})
    try: corpus = read_slake(tmp_path)
    except DataError as e: assert str(tmp_path) in str(e) and e.what
    else: assert all(q.question and q.answer and q.kind in ('closed', 'open') for o in corpus for q in o.questions)


# ---- the real questions

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    "The real questions, put back into the official layout."
    source = Path(os.environ.get('MEDCL_DATA', 'nowhere'))/'vqa_rad'
    if not (source/'qa.jsonl').exists(): pytest.skip('MEDCL_DATA holds no vqa_rad/qa.jsonl')
    folder = tmp_path_factory.mktemp('real')/'vqa_rad'
    folder.mkdir()
    (folder/'VQA_RAD Image Folder').symlink_to(source/'images')
    organ = {o['id']: o['labels']['organ'] for o in map(json.loads, (source/'index.jsonl').open())}
    rows = [o | {'image_name': Path(o['image']).name, 'image_organ': organ[o['image_id']],
                 'image_case_url': f"https://medpix.nlm.nih.gov/case?id={o['group_id'].split(':')[1]}&index=0"}
            for o in map(json.loads, (source/'qa.jsonl').open())]
    (folder/RAD).write_text(json.dumps(rows))
    return folder


def test_real_vqa_rad_has_its_known_counts_and_leak(real):
    corpus = read_vqa_rad(real, split='official')
    assert corpus.source == 'real' and len(corpus) == 2248 and corpus.frame.image.nunique() == 314
    test, train = corpus.split('test'), corpus.split('train')
    assert (len(test), len(train)) == (451, 1797)
    assert pd.Series([o.questions[0].kind for o in test]).value_counts().to_dict() == {'closed': 272, 'open': 179}
    images = set(test.frame.image)
    assert len(images) == 203 and len(images & set(train.frame.image)) == 202


def test_real_vqa_rad_disjoint_split_is_pinned(real):
    corpus = read_vqa_rad(real)
    assert {o: len(corpus.split(o)) for o in ('train', 'valid', 'test')} == QUESTIONS['vqa_rad'].counts
    assert corpus.frame.groupby('image').split.nunique().max() == 1 and corpus.frame.group.nunique() == 313
    table = check_questions(corpus)
    assert table.questions.sum() == 2248
    covered = answer_vocabulary(corpus).coverage.set_index(['split', 'kind']).covered
    assert covered['test', 'closed'] > .9 > .5 > covered['test', 'open'], 'most open answers of the test were never seen in training'


def test_folder_in_another_layout_is_refused():
    source = Path(os.environ.get('MEDCL_DATA', 'nowhere'))/'vqa_rad'
    if not source.exists(): pytest.skip('MEDCL_DATA holds no vqa_rad')
    with pytest.raises(DataError, match='VQA_RAD Dataset Public.json: no such file'): read_vqa_rad(source)


# ---- size

def test_a_hundred_thousand_questions_are_indexed_quickly(twins, tmp_path):
    import time
    (tmp_path/'VQA_RAD Image Folder').symlink_to(twins/'vqa_rad'/'VQA_RAD Image Folder')
    rows = json.loads((twins/'vqa_rad'/RAD).read_text())
    (tmp_path/RAD).write_text(json.dumps([rows[i % len(rows)] | {'qid': str(i)} for i in range(100_000)]))
    begin = time.process_time()
    assert len(read_vqa_rad(tmp_path)) == 100_000
    assert time.process_time() - begin < 6, 'under 2 s on an idle core'
