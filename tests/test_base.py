"""What all readers of data sets share: tables, listed files, labels, images inside files."""
import os
import shutil

import numpy as np
import pandas as pd
import pytest

from medcl_study.core import DataError
from medcl_study.data.sets.base import StoredImages, check_files, check_labels, read_hdf5, read_table, sampled_hash


@pytest.fixture(params=['.csv', '.csv.gz', '.parquet'])
def wide(request, tmp_path):
    "A table of three columns."
    path = tmp_path/f'wide{request.param}'
    frame = pd.DataFrame({'caption': ['a', 'b'], 'notes': ['long', 'longer'], 'image': ['1.png', '2.png']})
    frame.to_parquet(path) if request.param == '.parquet' else frame.to_csv(path, index=False)
    return path


def test_some_columns_are_read_alone(wide):
    assert list(read_table(wide, ['caption', 'image'])) == ['caption', 'notes', 'image']
    some = read_table(wide, ['caption', 'image'], only=True)
    assert sorted(some) == ['caption', 'image'] and some.image.tolist() == ['1.png', '2.png']


@pytest.mark.parametrize('only', [False, True])
def test_a_renamed_column_is_suggested(wide, only):
    with pytest.raises(DataError, match="no column 'Image'.*caption.*notes.*Rename 'image' to 'Image'"):
        read_table(wide, ['caption', 'Image'], only=only)


@pytest.mark.parametrize('only', [False, True])
def test_a_table_cut_short_is_refused(tmp_path, only):
    pd.DataFrame({'a': range(9)}).to_parquet(path := tmp_path/'a.parquet')
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match='a.parquet.*not a readable table.*Download it again'): read_table(path, ['a'], only=only)


@pytest.mark.parametrize('value, meant', [('MELANOMA', 'Melanoma'), ('melonoma', 'Melanoma'), ('Nevi', 'nevus')])
def test_a_misspelt_label_is_recognised_in_any_case(value, meant):
    with pytest.raises(DataError, match=f"t.csv, row 3.*dx is '{value}'.*Perhaps '{meant}' is meant"):
        check_labels(['nevus', value], ['Melanoma', 'nevus'], path='t.csv', column='dx')


def test_listed_files_stay_inside(tmp_path):
    (tmp_path/'images').mkdir()
    for name in ('../a.png', '/x/a.png', 'images/../../a.png'):
        with pytest.raises(DataError, match='which is not inside images/'): check_files([name], tmp_path/'images', path='t.csv')
    with pytest.raises(DataError, match=r"row 2.*'a.png' is not in images/ \(2 of 2 listed files are missing\).*half extracted"):
        check_files(['a.png', 'b.png'], tmp_path/'images', path='t.csv')


def test_a_file_is_known_by_its_content(tmp_path):
    raw = np.random.default_rng(0).bytes(5 << 20)
    (tmp_path/'a').write_bytes(raw)
    os.utime(shutil.copy(tmp_path/'a', tmp_path/'b'), (0, 0))
    (tmp_path/'c').write_bytes(raw[:-1] + b'?')
    (tmp_path/'d').write_bytes(raw + b'?')
    known = [sampled_hash(tmp_path/o) for o in 'abcd']
    assert known[0] == known[1] and len(set(known)) == 3


def test_hdf5_images_have_one_identity_per_row(tmp_path):
    h5py = pytest.importorskip('h5py')
    for name, begin in (('a', 0), ('b', 1)):
        with h5py.File(tmp_path/f'{name}.h5', 'w') as f: f['x'] = np.arange(begin, begin + 48, dtype=np.uint8).reshape(3, 4, 4)
    a, b = (StoredImages(tmp_path/f'{o}.h5', 'x') for o in 'ab')
    assert len({*a.identities(), *b.identities()}) == 6 and a[np.array([2, 2])].identities() == [a.identities()[2]] * 2
    with pytest.raises(DataError, match="no array 'y'; there are \\['x'\\]"): read_hdf5(tmp_path/'a.h5', 'y')
