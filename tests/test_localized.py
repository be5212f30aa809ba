"""Localized sets: readers on twins and on malformed files, places true to the pixel, splits by patient, fractions that are no prefixes."""
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medcl_study.core import DataError
from medcl_study.data.images import read_image, resize
from medcl_study.data.pairs import Corpus, Region, split_groups
from medcl_study.data.regions import Ellipse, Polygon, Runs, bounds, read_mask
from medcl_study.data.sets import localized
from medcl_study.data.sets.base import twin_samples
from medcl_study.data.sets.localized import LOCALIZED, LOCALIZED18, check_regions, fraction, read_nih_boxes, read_object_cxr
from medcl_study.data.text import split_sentences

TABLE = {'rsna_pneumonia': 'stage_2_train_labels.csv', 'siim_pneumothorax': 'train-rle.csv', 'nih_boxes': 'BBox_List_2017.csv',
         'object_cxr': 'train.csv', 'ms_cxr': 'MS_CXR_Local_Alignment_v1.1.0.csv'}
FEW = settings(max_examples=25, deadline=None)


@pytest.fixture(scope='session')
def twins(tmp_path_factory):
    home = tmp_path_factory.mktemp('localized')
    for row in LOCALIZED.values(): row.write_twin(home/row.folder, 64, 0)
    return home


@pytest.fixture(scope='session')
def corpora(twins): return {name: row.read(twins/row.folder) for name, row in LOCALIZED.items()}


@pytest.fixture
def copy(twins, tmp_path):
    "Copy a twin, to be damaged; files are linked, so that replacing one harms no other."
    def make(name):
        folder = LOCALIZED[name].folder
        return Path(shutil.copytree(twins/folder, tmp_path/folder, copy_function=os.link))
    return make


def rewrite(path, change):
    "Replace a table by a changed one: `change` gets the lines of the file, split at the first comma."
    lines = path.read_text().splitlines()
    path.unlink()
    path.write_text('\n'.join(change(lines)) + '\n')


def read(name, folder): return LOCALIZED[name].read(folder)


# ---- twins

@pytest.mark.parametrize('name', LOCALIZED)
def test_every_split_has_every_class_and_no_group_is_torn(corpora, name):
    corpus, row = corpora[name], LOCALIZED[name]
    assert corpus.source == 'twin' and corpus.classes == row.classes and len(corpus) == 64 and corpus.frame.id.is_unique
    for split in ('train', 'valid', 'test'): assert (corpus.split(split).targets().sum(0) > 0).all()
    assert corpus.frame.groupby('group').split.nunique().max() == 1
    if row.group: assert corpus.frame.group.nunique() < len(corpus)  # a group is more than an image


@pytest.mark.parametrize('name', LOCALIZED)
def test_every_region_of_a_twin_is_where_it_should_be(corpora, name):
    checked = check_regions(corpora[name])
    assert len(checked) == corpora[name].frame.regions.map(len).sum() and checked.share.between(1e-4, .5).all()


@pytest.mark.parametrize('name', LOCALIZED)
def test_seeds_and_sizes_of_a_twin(tmp_path, name):
    for seed, n in ((1, 40), (2, 40)): LOCALIZED[name].write_twin(tmp_path/str(seed), n, seed)
    one, two = (LOCALIZED[name].read(tmp_path/str(seed)) for seed in (1, 2))
    assert len(one) == len(two) == 40 and one.hash() != two.hash()


def test_pictures_come_back_as_they_were_drawn(corpora):
    for name, times in (('rsna_pneumonia', 16), ('siim_pneumothorax', 16), ('nih_boxes', 16)):
        kinds = {'rsna_pneumonia': (4, 0, 4, 2), 'siim_pneumothorax': (3, 0), 'nih_boxes': tuple(localized._NIH_TWIN)}[name]
        corpus = corpora[name]
        order = corpus.frame.sort_values('image').index if name == 'nih_boxes' else corpus.frame.index
        turn = corpus.frame.loc[order].groupby('split').cumcount()
        samples = twin_samples('chest', [kinds[o % len(kinds)] for o in turn], name=name, seed=0)
        for i in (0, 1, 30, 63):
            pixels, given = read_image(corpus[order[i]].image), samples[i].image.astype(float)
            if name != 'nih_boxes': given = (given - given.min()) / np.ptp(given) * 255  # a DICOM file without window is stretched
            assert pixels.shape == (1024, 1024)
            assert np.abs(pixels[8::times, 8::times] - given).max() <= (0 if name == 'nih_boxes' else 6)
            for region in corpus[order[i]].regions:  # the drawn place is the phantom's own
                true = np.logical_or.reduce([o.mask for o in samples[i].regions])
                drawn = region.raster(64, 64)
                assert (drawn & true).sum() >= 4
                if region.mask is not None: assert (drawn == true).all()


def test_dicom_files_have_the_tags_of_the_challenges(corpora):
    for name in ('rsna_pneumonia', 'siim_pneumothorax'):
        sample = corpora[name][0]
        ds = pydicom.dcmread(sample.image)
        assert (ds.Rows, ds.Columns, ds.PhotometricInterpretation, ds.Modality) == (1024, 1024, 'MONOCHROME2', 'CR')
        assert ds.file_meta.TransferSyntaxUID == pydicom.uid.JPEGBaseline8Bit
        assert sample.id == (ds.PatientID if name == 'rsna_pneumonia' else ds.SOPInstanceUID)


# ---- bad files, for all

@pytest.mark.parametrize('name', TABLE)
def test_a_renamed_column_is_recognised(copy, name):
    folder = copy(name)
    header = (folder/TABLE[name]).read_text().splitlines()[0].split(',')
    index = 0 if name != 'nih_boxes' else 1
    rewrite(folder/TABLE[name], lambda lines: [','.join([*header[:index], header[index] + 's', *header[index + 1:]]), *lines[1:]])
    with pytest.raises(DataError, match=f"Rename '{header[index]}s' to '{header[index]}'"): read(name, folder)


@pytest.mark.parametrize('name', [o for o in TABLE if o != 'nih_boxes'])
def test_more_columns_do_no_harm(copy, corpora, name):
    folder = copy(name)
    rewrite(folder/TABLE[name], lambda lines: [lines[0] + ',note', *(o + ',seen' for o in lines[1:])])
    assert read(name, folder).hash() == corpora[name].hash()


@pytest.mark.parametrize('name', LOCALIZED)
def test_a_half_extracted_archive_names_what_is_missing(copy, corpora, name):
    folder, gone = copy(name), corpora[name].frame.image[5]
    (folder/gone).unlink()
    with pytest.raises(DataError) as e: read(name, folder)
    assert Path(gone).stem in str(e.value) and re.search('extract|Download|Extract', str(e.value))


@pytest.mark.parametrize('name', LOCALIZED)
def test_another_layout_is_told_what_is_missing(tmp_path, name):
    (tmp_path/'index.jsonl').write_text('{}\n')
    (tmp_path/'images').mkdir()
    with pytest.raises(DataError, match='no such file|no such folder'): read(name, tmp_path)


@pytest.mark.parametrize('name', TABLE)
def test_a_table_that_is_none(copy, name):
    folder = copy(name)
    (folder/TABLE[name]).unlink()
    (folder/TABLE[name]).write_bytes(b'\xff\xfe\x00PK')
    with pytest.raises(DataError, match=TABLE[name]): read(name, folder)


# ---- bad rows

BAD = [  # set, number of the row as an editor shows it, cells by column, what is said
    ('rsna_pneumonia', 2, {'x': '900', 'width': '200'}, 'row 2: the box .* leaves the image of 1024 x 1024 pixels. Are the axes swapped'),
    ('rsna_pneumonia', 2, {'height': '0'}, 'row 2: the box .* is empty'),
    ('rsna_pneumonia', 2, {'y': 'low'}, 'row 2: the box .* is not four numbers'),
    ('rsna_pneumonia', 2, {'Target': '0'}, 'row 2: Target is 0, but a box is given'),
    ('rsna_pneumonia', 2, {'Target': '2'}, "row 2: Target is '2', none of"),
    ('rsna_pneumonia', 2, dict.fromkeys(('x', 'y', 'width', 'height'), ''), 'row 2: Target is 1, but no box is given'),
    ('rsna_pneumonia', 2, dict.fromkeys(('x', 'y', 'width', 'height'), '') | {'Target': '0'}, 'does not agree with its boxes'),
    ('siim_pneumothorax', 2, {' EncodedPixels': '5 3 2'}, "row 2: run lengths '5 3 2' are not pairs"),
    ('siim_pneumothorax', 2, {' EncodedPixels': '5 1048576'}, 'row 2: run lengths .* but the image has 1,048,576'),
    ('nih_boxes', 2, {'Finding Label': 'Atelektasis'}, "row 2: .*Perhaps 'Atelectasis' is meant"),
    ('nih_boxes', 2, {'h]': '2000'}, 'row 2: the box .* leaves the image of 1024 x 1024'),
    ('nih_boxes', 2, {'Image Index': '00099999_000.png'}, 'row 00099999_000.png: .* its patient is unknown'),
    ('object_cxr', 2, {'annotation': '0 1 2 3'}, "row 2: annotation '0 1 2 3' does not hold pairs"),
    ('object_cxr', 2, {'annotation': '3 1 2 3 4'}, 'row 2: annotation .* is neither 0'),
    ('object_cxr', 2, {'annotation': '2 1 2 3 4'}, 'row 2: annotation .* is neither 0'),
    ('object_cxr', 2, {'annotation': '0 9 9 3 4'}, 'row 2: annotation .* is empty: x2 and y2 must be larger'),
    ('object_cxr', 2, {'annotation': '1 2 50 6 90'}, 'row 2: annotation .* leaves the image of 96 x 72 pixels. Are the axes swapped'),
    ('ms_cxr', 3, {'category_name': 'pneumonia'}, "row 3: category_name is 'pneumonia', .*Perhaps 'Pneumonia' is meant"),
    ('ms_cxr', 3, {'split': 'dev'}, "row 3: split is 'dev'"),
    ('ms_cxr', 3, {'label_text': ' . '}, 'row 3: label_text has no words'),
    ('ms_cxr', 3, {'path': 'files/../../secret/p10.jpg'}, 'row 3: path .* is not of the form'),
    ('ms_cxr', 3, {'image_width': ''}, 'row 3: image_width and image_height'),
    ('ms_cxr', 3, {'w': '60', 'x': '60'}, 'row 3: the box .* leaves the image of 68 x 80'),
]


@pytest.mark.parametrize('name, row, cells, says', BAD)
def test_bad_rows_are_named(copy, name, row, cells, says):
    folder = copy(name)
    path = folder/TABLE[name]
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column, value in cells.items(): table.loc[row - 2, column] = value
    path.unlink()
    table.to_csv(path, index=False)
    with pytest.raises(DataError, match=says): read(name, folder)


def test_less_than_a_pixel_over_the_border_is_clipped(copy):
    folder = copy('rsna_pneumonia')
    path = folder/TABLE['rsna_pneumonia']
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[0, ['x', 'y', 'width', 'height']] = ['-0.9', '1000', '100', '24.9']
    path.unlink()
    table.to_csv(path, index=False)
    box = read('rsna_pneumonia', folder)[0].regions[0].box
    assert np.allclose(box, (0, 1000/1024, 99.1/1024, 1))


@FEW
@given(st.dictionaries(st.sampled_from(['x', 'y', 'width', 'height']), st.one_of(
    st.floats().map(str), st.integers(-9, 2000).map(str), st.text(max_size=4)), min_size=1))
def test_any_cells_make_a_box_inside_or_are_refused(cells):
    frame = pd.DataFrame([{'x': '10', 'y': '20', 'width': '30', 'height': '40'} | cells])
    try: (box,) = localized._boxes(frame, ('x', 'y', 'width', 'height'), (1024, 1024), path='t.csv')
    except DataError as e: assert e.row == 2
    else: assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1


@FEW
@given(st.one_of(st.text('012 .;-e5', min_size=1, max_size=20).filter(str.strip), st.builds(
    lambda kind, numbers: f'{kind} ' + ' '.join(map(str, numbers)), st.integers(0, 3), st.lists(st.integers(-3, 60), max_size=9))))
def test_any_annotation_makes_a_region_inside_or_is_refused(text):
    try: region = localized._object(text, 40, 30)
    except DataError: return
    x0, y0, x1, y1 = region.box
    assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 and region.raster(30, 40).shape == (30, 40)


# ---- RSNA

def test_without_the_mapping_patients_are_not_guessed(copy):
    folder = copy('rsna_pneumonia')
    (folder/'pneumonia-challenge-dataset-mappings_2018.json').unlink()
    with pytest.raises(DataError, match='which images show the same patient. Download https://s3.amazonaws.com'): read('rsna_pneumonia', folder)
    (folder/'pneumonia-challenge-dataset-mappings_2018.json').write_text('{"a": 1}')
    with pytest.raises(DataError, match='subset_img_id'): read('rsna_pneumonia', folder)


def test_boxes_never_pass_for_masks(corpora):
    for name in ('rsna_pneumonia', 'nih_boxes'):
        assert 'filled boxes' in LOCALIZED[name].note
        assert {o.mask for regions in corpora[name].frame.regions for o in regions} == {None}
        region = next(o for regions in corpora[name].frame.regions for o in regions)
        x0, y0, x1, y1 = (round(o * 1024) for o in region.box)
        drawn = region.raster(1024, 1024)
        assert drawn.sum() == (x1 - x0) * (y1 - y0) and drawn[y0:y1, x0:x1].all()


@pytest.mark.parametrize('n, fractions, name, splits', [
    (12_047, localized._SHARES, 'siim_pneumothorax', ('train', 'valid', 'test')),
    (8_000, {'train': .8, 'valid': .2}, 'object_cxr', ('train', 'valid'))])
def test_counts_of_the_releases_follow_from_the_rule(n, fractions, name, splits):
    found = pd.Series(split_groups([f'{i:05d}' for i in range(n)], fractions=fractions)).value_counts()
    assert {o: found[o] for o in splits} == {o: LOCALIZED[name].counts[o] for o in splits}


# ---- SIIM

def test_the_space_before_the_column_may_be_missing(copy, corpora):
    folder = copy('siim_pneumothorax')
    rewrite(folder/'train-rle.csv', lambda lines: [o.replace(', ', ',') for o in lines])
    assert read('siim_pneumothorax', folder).hash() == corpora['siim_pneumothorax'].hash()


def test_a_mask_of_another_size_is_found(copy):
    folder = copy('siim_pneumothorax')
    corpus = read('siim_pneumothorax', folder)
    sample = next(o for o in corpus if o.regions)
    ds = pydicom.dcmread(sample.image)
    ds.decompress()
    ds.Rows = ds.Columns = 512
    ds.PixelData = resize(read_image(sample.image), 512).tobytes()
    sample.image.unlink()
    ds.save_as(sample.image)
    with pytest.raises(DataError, match=f'row {sample.id}: .*made for 1024 x 1024 pixels, the image has 512 x 512'): check_regions(corpus)


def test_dicom_without_its_tags_is_named(copy):
    folder = copy('siim_pneumothorax')
    corpus = read('siim_pneumothorax', folder)
    ds = pydicom.dcmread(corpus[0].image)
    del ds.Rows
    corpus[0].image.unlink()
    ds.save_as(corpus[0].image)
    with pytest.raises(DataError, match='without pixel data'): check_regions(corpus)


# ---- NIH

def nih(folder, boxes, entries):
    "Write a tiny release by hand: boxes as lines, entries as (image, finding, patient)."
    (folder/'images').mkdir(parents=True)
    (folder/'BBox_List_2017.csv').write_text('Image Index,Finding Label,Bbox [x,y,w,h],,,\n' + ''.join(f'{o}\n' for o in boxes))
    (folder/'Data_Entry_2017_v2020.csv').write_text('Image Index,Finding Labels,Patient ID\n' + ''.join(','.join(o) + '\n' for o in entries))
    (folder/'test_list.txt').write_text(''.join(o[0] + '\n' for o in entries))
    for o in entries: (folder/'images'/o[0]).touch()
    return read_nih_boxes(folder)


def test_nih_reads_rows_with_and_without_empty_ends(tmp_path):
    corpus = nih(tmp_path, ['00000001_000.png,Mass,225.5,547.0,86.75,79.25', '00000001_000.png,Nodule,1,2,3,4,,,'],
                 [('00000001_000.png', 'Mass|Nodule', '1'), ('00000002_000.png', 'No Finding', '2'), ('00000003_000.png', 'Edema', '3')])
    assert corpus.frame.id.tolist() == ['00000001_000.png', '00000002_000.png'] and corpus.frame.labels[0] == ('mass', 'nodule')
    assert corpus[0].regions[0] == Region('mass', box=(225.5/1024, 547/1024, 312.25/1024, 626.25/1024))
    assert corpus.frame.image[0] == 'images/00000001_000.png' and corpus.root == tmp_path


def test_boxed_and_clean_images_of_a_patient_stay_together(tmp_path):
    entries = [(f'{i:08d}_{j:03d}.png', ('Mass', 'No Finding')[j], str(i)) for i in range(1, 61) for j in (0, 1)]
    corpus = nih(tmp_path, [f'{o[0]},Mass,1,2,30,40' for o in entries if o[1] == 'Mass'], entries)
    assert len(corpus) == 120 and corpus.frame.groupby('group').split.nunique().max() == 1


def test_a_hundred_clean_images_are_the_same_whatever_the_order(tmp_path):
    entries = [('00000000_000.png', 'Mass', '0')] + [(f'{i:08d}_000.png', 'No Finding', str(i)) for i in range(1, 400)]
    one = nih(tmp_path/'one', ['00000000_000.png,Mass,1,2,30,40'], entries)
    two = nih(tmp_path/'two', ['00000000_000.png,Mass,1,2,30,40'], entries[::-1])
    assert len(one) == 101 and one.hash() == two.hash()
    assert sorted(one.frame.id[1:]) != [o[0] for o in entries[1:101]]  # not the first ones


# ---- Object-CXR

def test_objects_lie_where_the_release_says(tmp_path):
    "A rectangle, an ellipse and a polygon in an image 40 wide and 20 high: x first, axes not swapped, ellipses not filled to boxes."
    for part, text in (('train', '0 30 2 38 7;1 20 4 28 16;2 2 2 12 2 2 12'), ('dev', '')):
        (tmp_path/part).mkdir()
        Image.new('L', (40, 20)).save(tmp_path/part/'1.jpg')
        (tmp_path/f'{part}.csv').write_text(f'image_name,annotation\n1.jpg,{text}\n')
    corpus = read_object_cxr(tmp_path)
    rectangle, ellipse, polygon = corpus[0].regions
    expected = np.zeros((20, 40), bool)
    expected[2:7, 30:38] = True
    assert rectangle.mask is None and (rectangle.raster(20, 40) == expected).all()
    assert isinstance(ellipse.mask, Ellipse) and ellipse.mask.bounds == pytest.approx(ellipse.box) and ellipse.box == (20/40, 4/20, 28/40, 16/20)
    drawn = ellipse.raster(20, 40)
    assert not drawn[4, 20] and drawn[10, 24] and abs(drawn.sum() - np.pi*4*6) < 5
    assert isinstance(polygon.mask, Polygon) and polygon.box == (2/40, 2/20, 12/40, 12/20)
    drawn = polygon.raster(20, 40)
    assert drawn[2, 10] and not drawn[10, 10] and drawn[10, 2] and not drawn[2, 12]  # a triangle with its right angle upper left
    assert corpus.frame.labels.tolist() == [('foreign object',), ()] and corpus.frame.split[1] == 'test'


def test_a_wide_box_is_not_a_tall_one(corpora):
    "Earlier code stored heights as widths."
    for sample in corpora['object_cxr']:
        for region in sample.regions:
            h, w = read_image(sample.image).shape
            drawn = region.raster(h, w)
            rows, columns = drawn.any(1).sum(), drawn.any(0).sum()
            x0, y0, x1, y1 = region.box
            assert abs(columns - (x1 - x0) * w) <= 1 and abs(rows - (y1 - y0) * h) <= 1


# ---- COVID rural

def test_covid_masks_of_another_size_are_refused(copy):
    folder = copy('covid_rural')
    path = sorted((folder/'covid_rural_annot'/'pngs_masks').iterdir())[3]
    path.unlink()
    Image.new('L', (70, 88)).save(path)
    with pytest.raises(DataError, match=f'{path.name}: the mask has 70 x 88 pixels, its film 88 x 70'): read('covid_rural', folder)


def test_covid_names_without_a_patient_are_refused(copy):
    folder = copy('covid_rural')
    for kind, suffix in (('pngs_masks', 'png'), ('jpgs', 'jpg')):
        path = sorted((folder/'covid_rural_annot'/kind).iterdir())[0]
        path.rename(path.with_name(f'A-16406490.{suffix}'))
    with pytest.raises(DataError, match="'A-16406490.png' does not name a patient"): read('covid_rural', folder)


def test_covid_split_is_the_published_one(corpora):
    frame = corpora['covid_rural'].frame
    assert (len(localized._COVID_VALID), len(localized._COVID_TEST)) == (23, 18)
    for number, split in ((16406490, 'valid'), (16424076, 'valid'), (16406505, 'test'), (16424111, 'test')):
        found = set(frame.split[frame.group == f'COVID-19-AR-{number}'])
        assert found <= {split}
    assert set(frame.split[~frame.group.str.removeprefix('COVID-19-AR-').astype(int).isin(
        localized._COVID_VALID + localized._COVID_TEST)]) == {'train'}


def test_empty_masks_are_images_without_the_finding(corpora):
    corpus = corpora['covid_rural']
    for i in range(12):
        mask = read_mask(corpus.root/'covid_rural_annot'/'pngs_masks'/f'{corpus.frame.id[i]}.png')
        assert corpus.frame.labels[i] == (('opacity',) if mask.any() else ())
        if mask.any(): assert corpus[i].regions[0].box == bounds(mask) and (corpus[i].regions[0].raster(*mask.shape) == mask).all()


# ---- MS-CXR

WORDS = ['small', 'Left', 'effusion.', '5.2 cm', 'approx. 2', 'No', '1.', '(base.)', 'grown?', 'base,', 'Dr. B', 'new:', 'left;', 'T10.\n']


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.lists(st.sampled_from(WORDS), max_size=6).map(' '.join), st.text('ab. ;:1)\nA!?-', max_size=30)), max_size=3))
def test_a_phrase_is_one_sentence_also_among_others(texts):
    phrases = [o for o in map(localized._phrase, texts) if o]
    assert split_sentences('\n\n'.join(phrases)) == phrases and all(split_sentences(o) == [o] for o in phrases)


def test_boxes_of_a_phrase_share_its_sentence(copy):
    folder = copy('ms_cxr')
    path = folder/TABLE['ms_cxr']
    table = pd.read_csv(path, dtype=str)
    first = table.dicom_id == table.dicom_id[0]
    rows = [table.iloc[0].to_dict() | {'label_text': text, 'x': x, 'w': '5'} for text, x in (
        ('Small left effusion. It has grown.', '3'), ('opacity at the right base', '20'), ('opacity at the right base', '40'))]
    path.unlink()
    pd.concat([pd.DataFrame(rows), table[~first]]).to_csv(path, index=False)
    sample = read('ms_cxr', folder)[0]
    assert sample.sentences == ('Small left effusion; It has grown', 'opacity at the right base')
    assert [o.sentence for o in sample.regions] == [0, 1, 1]


def test_images_may_lie_in_mimic_cxr_jpg(copy, corpora):
    folder = copy('ms_cxr')
    (folder/'files').rename(folder.parent/'files')
    with pytest.raises(DataError, match='mimic_cxr_jpg'): read('ms_cxr', folder)
    (folder.parent/'mimic_cxr_jpg').mkdir()
    (folder.parent/'files').rename(folder.parent/'mimic_cxr_jpg'/'files')
    corpus = read('ms_cxr', folder)
    assert corpus.hash() == corpora['ms_cxr'].hash() and corpus[0].image.exists()


def test_a_patient_in_two_official_splits_is_refused(copy):
    folder = copy('ms_cxr')
    path = folder/TABLE['ms_cxr']
    table = pd.read_csv(path, dtype=str)
    patient = table.path.str.extract(r'/(p\d{8})/')[0]
    several = table.index[patient == patient[table.groupby(patient).dicom_id.transform('nunique') > 1].iloc[0]]
    table.loc[several[0], 'split'] = 'test' if table.split[several[-1]] != 'test' else 'train'
    path.unlink()
    table.to_csv(path, index=False)
    with pytest.raises(DataError, match='stands in the splits'): read('ms_cxr', folder)


# ---- fractions and tasks

def made_up(groups, labels=None, order=None):
    n = len(groups)
    frame = pd.DataFrame({'id': [f'i{i:05d}' for i in range(n)], 'image': '', 'text': '', 'labels': labels or [('a',)] * n,
                          'group': groups, 'split': 'train', 'modality': ''})
    frame = pd.concat([frame, frame.tail(5).assign(id=lambda o: 'test' + o.id, group='held out', split='test')])
    return Corpus(frame if order is None else frame.iloc[order], name='made up', classes=('a', 'b'))


def test_fractions_have_the_published_sizes():
    corpus = made_up([f'p{i:05d}' for i in range(16_010)])
    sizes = {share: len(fraction(corpus, share, 0).split('train')) for share in (.01, .1, 1)}
    assert sizes == {.01: 160, .1: 1601, 1: 16_010}


def test_fractions_are_random_nested_and_differ_by_draw():
    corpus = made_up([f'p{i:05d}' for i in range(3000)])
    kept = {(share, draw): set(fraction(corpus, share, draw).split('train').frame.id) for share in (.01, .1, .5) for draw in range(3)}
    first = set(corpus.frame.id[:300])
    for draw in range(3):
        assert kept[.01, draw] < kept[.1, draw] < kept[.5, draw]
        assert len(kept[.1, draw] & first) < 60  # a prefix would share 300, chance 30
    assert len(kept[.1, 0] & kept[.1, 1]) < 60
    assert kept[.1, 0] == set(fraction(corpus, .1, 0).split('train').frame.id) != set(fraction(corpus, .1, 0, seed=1).split('train').frame.id)


@FEW
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.floats(.001, 1), st.integers(0, 3), st.randoms(use_true_random=False))
def test_fractions_keep_groups_whole_whatever_the_order(groups, share, draw, random):
    groups = [f'p{o}' for o in groups]
    order = list(range(len(groups) + min(5, len(groups))))
    random.shuffle(order)
    kept = fraction(made_up(groups), share, draw).frame
    assert set(kept.id) == set(fraction(made_up(groups, order=order), share, draw).frame.id)
    inside = set(kept.group[kept.split == 'train'])
    assert inside and len(kept[kept.split == 'train']) == sum(o in inside for o in groups)
    assert (kept.split == 'test').sum() == min(5, len(groups))


def test_small_fractions_hold_every_class_once():
    labels = [('b',) if i == 777 else () if i % 2 else ('a',) for i in range(1000)]
    corpus = made_up([f'p{i}' for i in range(1000)], labels)
    kept = fraction(corpus, .001, 0).split('train')
    assert (kept.targets().sum(0) > 0).all() and len(kept) < 1000


def test_unknown_groups_are_rows():
    assert len(fraction(made_up([''] * 100), .1, 0).split('train')) == 10


@pytest.mark.parametrize('share', [0, -1, 1.01, float('nan')])
def test_impossible_fractions(share):
    with pytest.raises(ValueError, match='share is'): fraction(made_up(['a']), share, 0)


def test_eighteen_tasks():
    parts = [o.split('/') for o in LOCALIZED18]
    assert len(set(LOCALIZED18)) == 18
    count = pd.Series([o[0] for o in parts]).value_counts().to_dict()
    assert count == {'rsna_pneumonia': 9, 'covid_rural': 3, 'siim_pneumothorax': 2, 'object_cxr': 3, 'nih_boxes': 1}
    assert {o[1] for o in parts} == {'detection_finetuned', 'detection_frozen', 'segmentation_linear', 'segmentation_finetuned',
                                     'segmentation_frozen'}


# ---- speed and real images

def test_a_hundred_thousand_boxes_take_no_time():
    n = 100_000
    frame = pd.DataFrame({'x': ['10.5'] * n, 'y': ['20'] * n, 'w': ['30'] * n, 'h': ['40'] * n})
    start = time.process_time()
    boxes = localized._boxes(frame, tuple('xywh'), (1024, 1024), path='t.csv')
    corpus = made_up([f'p{i // 3}' for i in range(n)])
    fraction(corpus, .1, 0)
    assert len(boxes) == n and time.process_time() - start < 4


@pytest.mark.skipif(not os.environ.get('MEDCL_DATA'), reason='MEDCL_DATA is not set: no real images')
@pytest.mark.parametrize('name', ['dsb2018_nuclei', 'covid_cxr'])
def test_regions_of_real_images(name):
    folder = Path(os.environ['MEDCL_DATA'])/name
    if not folder.is_dir(): pytest.skip(f'MEDCL_DATA holds no {name}')
    rows = [row for row in map(json.loads, (folder/'index.jsonl').read_text().splitlines()) if row.get('mask')][:30]
    boxes = [bounds(read_mask(folder/row['mask'])) for row in rows]
    frame = pd.DataFrame({'id': [row['id'] for row in rows], 'image': [row['image'] for row in rows], 'text': '', 'labels': [('x',)] * len(rows),
                          'group': [row['group_id'] for row in rows], 'split': 'train', 'modality': '',
                          'regions': [(Region('x', mask=row['mask'], box=box),) for row, box in zip(rows, boxes)]})
    corpus = Corpus(frame, name=name, classes=('x',), root=folder)
    checked = check_regions(corpus)
    assert len(checked) == len(rows) and set(checked.drawn) == {'mask'} and (checked.share > 0).all()
    corpus.frame.at[0, 'regions'] = (Region('x', mask=Runs(31, 33, ('0 5',))),)
    with pytest.raises(DataError, match=f'row {frame.id[0]}: .*made for 33 x 31 pixels'): check_regions(corpus.select([0]))
