"""Twins lie on disk as the real sets do: every file, column, type and array shape is compared with a cited description."""
import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from medcl_study.data.twins import DATA_SETS, make_twin

LAYOUTS = {o.stem: json.loads(o.read_text(encoding='utf-8')) for o in sorted(Path(__file__).with_name('layouts').glob('*.json'))}
# A release that lies on disk in another way is a layout of its own inside the file, named as the twin's `release` is.
VARIANTS = [(folder, key) for folder, o in LAYOUTS.items() for key in ('', *(k for k, v in o.items() if isinstance(v, dict) and 'tree' in v))]


@pytest.fixture(scope='module', params=VARIANTS, ids=['/'.join(o).rstrip('/') for o in VARIANTS])
def written(request, tmp_path_factory):
    "What one layout says, and the folder that the twins of all its sets were written to."
    folder, release = request.param
    root, rows = tmp_path_factory.mktemp('layouts'), {k: o for k, o in DATA_SETS.items() if o.folder == folder}
    if release:
        for o in rows.values(): o.write_twin(root/folder, 48, 0, release=release)
    else:
        for k in {o.write_twin: k for k, o in rows.items()}.values(): make_twin(k, root, 48)
    return (LAYOUTS[folder][release] if release else LAYOUTS[folder]), root/folder


def test_every_set_is_described():
    assert set(LAYOUTS) == {o.folder for o in DATA_SETS.values()}
    assert [k for k, o in LAYOUTS.items() if not o['cited'] or not o['tree']] == []


def test_tree(written):
    layout, folder = written
    files = {o for o in folder.rglob('*') if o.is_file() and o.name != 'TWIN'}
    named = {o: {p for p in folder.glob(o) if p.is_file()} for o in layout['tree']}
    assert [o for o, found in named.items() if not found] == [], 'described, but never written'
    assert sorted(o.relative_to(folder).as_posix() for o in files - set().union(*named.values())) == [], 'written, but not described'


# ---- tables

def records(path): # → column names, rows of cells
    "Read a table with its names as they stand in the file."
    plain, text = path.name.removesuffix('.gz'), lambda: (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8')
    if plain.endswith('.csv'):
        with text() as f: head, *rows = csv.reader(f)
    elif plain.endswith('.xlsx'):
        import openpyxl
        head, *rows = openpyxl.load_workbook(path).active.iter_rows(values_only=True)
    elif plain.endswith('.parquet'):
        import pyarrow.parquet as pq
        table = pq.read_table(path)
        head, rows = table.column_names, [list(o.values()) for o in table.to_pylist()]
    else:
        with text() as f: found = [json.loads(o) for o in f] if plain.endswith('.jsonl') else json.load(f)
        head, rows = list(found[0]), [list(o.values()) for o in found if list(o) == list(found[0])]
        assert len(rows) == len(found), f'{path.name}: not all objects have the same keys'
    return list(head), rows


def kind(value):
    "Name what a cell holds; a number may be written as text."
    if isinstance(value, dict): return f'object of {sorted(value)}'
    if not isinstance(value, str): return type(value).__name__
    if value.strip() in ('True', 'False'): return 'text: truth'
    for name, of in (('integer', int), ('number', float)):
        try: return f'text: {name}' if of(value) is not None else ''
        except ValueError: pass
    return 'text'


def test_tables(written):
    layout, folder = written
    named = {p for o in layout.get('tables', {}) for p in folder.glob(o)}
    found = {o for end in ('.csv', '.csv.gz', '.xlsx', '.parquet', '.jsonl') for o in folder.rglob(f'*{end}')}
    assert {o.name for o in found - named} <= {'microscopy_ground_truth.csv'}, 'tables whose columns nobody described' # it names none
    for pattern, about in layout.get('tables', {}).items():
        paths = sorted(folder.glob(pattern))
        assert paths, pattern
        for path in paths:
            head, rows = records(path)
            order = sorted if '.json' in path.suffix else list # an object's names have none
            assert order(head) == order(about['columns']), path.name
            for column, example in about.get('record', {}).items():
                held = {kind(o) for r in rows if (o := r[head.index(column)]) not in ('', None)}
                alike = kind(example) in held if isinstance(example, str) else held == {kind(example)}
                assert example in ('', None) or alike, f'{path.name}: {column} is {held}, unlike {example!r}'


def test_entries(written):
    "Lists of {path: texts}, which are no tables."
    layout, folder = written
    for pattern, (example,) in layout.get('json', {}).items():
        paths, keys = sorted(folder.glob(pattern)), set(*example.values())
        entries = [o for path in paths for o in json.loads(path.read_text(encoding='utf-8'))]
        assert entries and all(len(o) == 1 and set(*o.values()) == keys for o in entries)
        assert all((folder/path).is_file() and all(isinstance(v, str) for v in texts.values()) for o in entries for path, texts in o.items())


# ---- arrays

def arrays(path): # → key → array
    if path.suffix == '.npz': return dict(np.load(path))
    import h5py
    with h5py.File(path) as f: return {k: v[()] for k, v in f.items()}


def test_arrays(written):
    layout, folder = written
    for name, about in layout.get('arrays', {}).items():
        found = arrays(folder/name)
        assert set(found) == set(about), name
        for key, (dtype, shape) in about.items():
            assert found[key].dtype == dtype and len(found[key].shape) == len(shape), (name, key)
            assert all(b is None or a == b for a, b in zip(found[key].shape, shape)), (name, key, found[key].shape)
