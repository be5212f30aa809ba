"""Sections of hospital reports: synthetic ones in every layout, real ones of Indiana, and an index that reads each file once."""
import textwrap
import time
import zipfile

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medcl_study.core import DataError, data_root
from medcl_study.data import reports
from medcl_study.data.reports import SECTIONS, image_text, read_reports, report_sections, section_table, usable_text

quick = settings(max_examples=60, deadline=None)
WORDINGS = {'examination': ('EXAMINATION', 'Examination', 'EXAM', 'TYPE OF EXAMINATION'),
            'indication': ('INDICATION', 'Indication', 'HISTORY', 'CLINICAL HISTORY', 'REASON FOR EXAM', 'IDICATION'),
            'technique': ('TECHNIQUE', 'Technique'),
            'comparison': ('COMPARISON', 'Comparison', 'COMPARISONS', 'REFERENCE EXAM', 'COMPARRISON'),
            'findings': ('FINDINGS', 'Findings', 'findings', 'CHEST, TWO VIEWS', 'PORTABLE CHEST RADIOGRAPH', 'FINDNINGS'),
            'impression': ('IMPRESSION', 'Impression', 'CONCLUSION', 'IMPRESSOIN', 'FINAL IMPRESSION'),
            'notification': ('NOTIFICATION', 'Notification')}
SENTENCES = ('The lungs are clear.', 'No pleural effusion or pneumothorax is seen.', 'Heart size is normal, as on ___.',
             '1. Nodule of 1.5 cm.', 'LUNGS: Clear.', 'Unchanged in comparison with the prior study: stable.',
             'There is no evidence of pneumonia at ___ a.m.')
RULE = ' ' + '_' * 78 + '\n'
PIECES = (*SENTENCES, 'FINDINGS:', 'Impression: ', 'WET READ: x', 'ADDENDUM', 'FINAL REPORT', RULE, '\n', '\n \n', ' - ', 'CHEST:',
          'study', 'Comparison', '\r', ':', '____', 'é')


def solid(text): return ''.join(text.split())


@st.composite
def hospital_reports(draw):
    "Make (report, {section: text}) in the manner of MIMIC-CXR."
    names = [o for o in WORDINGS if draw(st.booleans())]
    assume({'findings', 'impression'} & set(names))
    truth = {o: ' '.join(draw(st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=5))) for o in names}
    gap, end = draw(st.sampled_from(['\n \n', '\n', '\n\n\n'])), draw(st.sampled_from(['\n', '\r\n']))
    body = ''
    for name, text in truth.items():
        header = draw(st.sampled_from(WORDINGS[name])) + ':' + draw(st.sampled_from(['  ', ' \n \n ', '\n ']))
        body += ' ' + header + textwrap.fill(text, draw(st.sampled_from([40, 78])), subsequent_indent=' ', break_long_words=False) + gap
    before = draw(st.sampled_from(['', f' WET READ: ___ ___ 9:12 PM\n  IMPRESSION: Wrong.\n{RULE}',
                                   f' WET READ VERSION #1\n FINDINGS: Wrong.\n{RULE}',
                                   f'{"":33}FINAL ADDENDUM\n  Wrong.\n FINDINGS: Wrong.\n{RULE}']))
    after = draw(st.sampled_from(['', ' ADDENDUM:  Wrong.\n IMPRESSION: Wrong.\n']))
    title = f'{"":33}FINAL REPORT\n' if before or draw(st.booleans()) else ''
    return (before + title + body + after).replace('\n', end), truth


@quick
@given(hospital_reports())
def test_composed_reports_come_apart(pair):
    report, truth = pair
    parts = {k: ' '.join(v.split()) for k, v in report_sections(report).items() if k not in ('wet read', 'addendum')}
    assert parts == truth
    assert 'Wrong' not in image_text(report)


@quick
@given(hospital_reports())
def test_text_is_findings_then_impression(pair):
    report, truth = pair
    expected = ' '.join(truth[o] for o in ('findings', 'impression') if o in truth)
    assert ' '.join(image_text(report, least=1).split()) == expected
    assert ' '.join(image_text(report, keep=('impression',), least=1).split()) == truth.get('impression', '')


@quick
@given(st.lists(st.sampled_from(PIECES), max_size=25).map(' '.join) | st.text(max_size=80))
def test_any_text_is_sectioned_without_loss(text):
    "Nothing is invented, and without anything like a header nothing is lost."
    parts = report_sections(text)
    assert all(o.strip() for o in parts.values())
    assert len(solid(''.join(parts.values()))) <= len(solid(text))
    plain = not any(o in text for o in (':', 'Comparison', 'FINAL', 'ADDENDUM', 'WET', 'PFI', 'PROV', '_' * 20, ' - ', 'study'))
    if plain and len(text.splitlines()) < 2: assert solid(''.join(parts.values())) == solid(text)
    assert image_text(text) == '' or set(parts) & {'findings', 'impression'}


@pytest.mark.parametrize('report, expected', [
    ('', {}),
    ('The lungs are clear.', {'body': 'The lungs are clear.'}),
    ('CHEST, PA LATERAL:\n\n INDICATION:  Cough.\n \n IMPRESSION:  Normal.', {'indication': 'Cough.', 'impression': 'Normal.'}),
    ('INDICATION: Cough.\n \n Clear lungs.\n \n Normal heart.', {'indication': 'Cough.', 'unheaded': 'Clear lungs.\n \n Normal heart.'}),
    ('FINDINGS: A.\n IMPRESSION: B.\n FINDINGS: C.', {'findings': 'A.\n\nC.', 'impression': 'B.'}),
    ('FINDINGS AND IMPRESSION: A.', {'findings': 'A.'}),
    ('FINDINGS: Compared with the study of ___,\n comparison\n shows no change. COMPARISON: None.',
     {'findings': 'Compared with the study of ___,\n comparison\n shows no change.', 'comparison': 'None.'}),
    ('FINDINGS: The impression: a nodule. OTHER FINDINGS: none', {'findings': 'The impression: a nodule. OTHER\n\nnone'}),
    ('FINDINGS: Clear. Comparison: none. Normal.', {'findings': 'Clear. Comparison: none. Normal.'}),
    ('Findings: Clear. Comparison: none.', {'findings': 'Clear.', 'comparison': 'none.'}),
    ('FINDINGS: DEPRESSION: none. HEART: large.', {'findings': 'DEPRESSION: none. HEART: large.'}),
    ('PROVISIONAL FINDINGS IMPRESSION (PFI): Wet.\n FINAL REPORT\n IMPRESSION: Dry.', {'wet read': 'Wet.', 'impression': 'Dry.'}),
    ('IMPRESSION: A.\n Addendum: B.', {'impression': 'A.', 'addendum': 'B.'}),
    ('IMPRESSION: See the wet read above. An addendum will follow.', {'impression': 'See the wet read above. An addendum will follow.'}),
])
def test_known_shapes(report, expected): assert report_sections(report) == expected


@pytest.mark.parametrize('report', ['', 'INDICATION: Cough.', 'IMPRESSION: ___.', 'IMPRESSION: Normal chest.', 'FINDINGS:\n IMPRESSION:',
                                    'WET READ: The lungs are clear.', 'ADDENDUM: IMPRESSION: The lungs are clear.', 'The lungs are clear.'])
def test_reports_without_a_usable_section(report): assert image_text(report) == ''


def test_underscores_are_folded_and_words_counted():
    assert image_text('IMPRESSION: Seen by ______ on __ at 3 p.m.') == 'Seen by ___ on ___ at 3 p.m.'
    assert image_text('IMPRESSION: ___ two ___ words', least=2) and not image_text('IMPRESSION: ___ two ___ words')
    table = section_table(['IMPRESSION: one two three', 'FINDINGS: one two\nIMPRESSION: three'])
    assert usable_text(table).tolist() == ['one two three', 'one two\n\nthree'] and set(SECTIONS) <= set(table)


@pytest.mark.parametrize('unit', ['x ', 'FINDINGS: x ', 'A: ', '\n \n', 'LUNGS:', 'a b c d e ', '_' * 30 + '\n', 'WET READ ', ' -  '])
def test_sectioning_takes_linear_time(unit):
    text = (unit * 100_000)[:100_000]
    begin = time.process_time()
    report_sections(text)
    assert time.process_time() - begin < 10


def test_real_reports_of_indiana_come_apart():
    "The columns of Indiana's reports, laid out as MIMIC-CXR lays out its own, are found again."
    try: path = data_root()/'text_only/indiana_reports.csv'
    except DataError as e: pytest.skip(f'real reports are not here: {e}')
    if not path.exists(): pytest.skip('real reports are not here: no indiana_reports.csv below MEDCL_DATA')
    rows = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict('records')
    names = ('indication', 'comparison', 'findings', 'impression')
    wrong, lost = 0, 0
    for row in rows:
        truth = {o: ' '.join(row[o].replace('XXXX', '___').split()) for o in names if row[o].strip()}
        fill = lambda o: textwrap.fill(o, 76, subsequent_indent=' ', break_long_words=False, break_on_hyphens=False)
        report = f' WET READ: ___\n IMPRESSION: Wrong.\n{RULE}{"":33}FINAL REPORT\n'
        report += ''.join(f' {k.upper()}:  {fill(v)}\n \n' for k, v in truth.items())
        found = {k: ' '.join(v.split()) for k, v in report_sections(report).items() if k != 'wet read'}
        if {'findings', 'impression'} & set(truth): wrong += found != truth
        lost += bool(truth.get('impression', '').replace('_', '').count(' ') > 2 and not image_text(report))
    assert len(rows) > 3800 and wrong / len(rows) < .01 and lost == 0, (wrong, lost)


# ---- the index

@pytest.fixture()
def tree(tmp_path):
    "Thirty reports in three parts: (folder, paths)."
    paths = [f'files/p1{i % 3}/p1{i % 3}{i:06d}/s5{i:07d}.txt' for i in range(30)]
    for i, o in enumerate(paths):
        (tmp_path/'set'/o).parent.mkdir(parents=True)
        (tmp_path/'set'/o).write_text(f' FINDINGS:  Report number {i} is read.\n')
    return tmp_path/'set', paths


def numbers(table): return table['findings'].str.extract(r'(\d+)')[0].astype(int).tolist()


def test_index_gives_the_order_asked_and_repeats(tree, tmp_path):
    root, paths = tree
    asked = [7, 7, 0, 29, 3]
    for _ in range(2): assert numbers(read_reports([paths[i] for i in asked], root, index=tmp_path/'index')) == asked
    assert numbers(read_reports(paths, root, index=tmp_path/'index')) == list(range(30))  # those that lacked are added
    assert numbers(read_reports(paths, root)) == list(range(30))


def test_interrupted_read_goes_on_with_the_next_part(tree, tmp_path, monkeypatch):
    root, paths = tree
    fetch, parts = reports._fetch, []
    def failing(asked, *rest):
        if len(parts) == 2: raise KeyboardInterrupt
        parts.append(asked)
        return fetch(asked, *rest)
    monkeypatch.setattr(reports, '_fetch', failing)
    with pytest.raises(KeyboardInterrupt): read_reports(paths, root, index=tmp_path/'index')
    read = []
    monkeypatch.setattr(reports, '_fetch', lambda asked, *rest: (read.extend(asked), fetch(asked, *rest))[1])
    assert numbers(read_reports(paths, root, index=tmp_path/'index')) == list(range(30))
    assert len(read) == 10 and not set(read) & {o for part in parts for o in part}


def test_changed_rules_section_again_without_files(tree, tmp_path, monkeypatch):
    root, paths = tree
    read_reports(paths, root, index=tmp_path/'index')
    monkeypatch.setattr(reports, '_parser', lambda: 'other')
    monkeypatch.setattr(reports, '_from_folder', lambda *_: pytest.fail('read a file again'))
    assert numbers(read_reports(paths, root, index=tmp_path/'index')) == list(range(30))


def test_reports_in_their_archive_and_paths_that_leave_it(tree, tmp_path):
    root, paths = tree
    for prefix in ('', 'mimic-cxr-reports/'):
        with zipfile.ZipFile(tmp_path/'r.zip', 'w') as z:
            for o in paths: z.write(root/o, prefix + o)
            z.writestr('../../files/p10/p10000000/s50000099.txt', 'FINDINGS: Outside of it all.')
        assert numbers(read_reports(paths, tmp_path/'r.zip')) == list(range(30))
    assert not (tmp_path.parent/'files').exists()
    with pytest.raises(DataError, match='s59.txt: no such report'): read_reports(['files/p10/p1/s59.txt'], tmp_path/'r.zip')
    (tmp_path/'r.zip').write_bytes(b'PK\x03\x04 half')
    with pytest.raises(DataError, match='not a readable .zip'): read_reports(paths, tmp_path/'r.zip')


def test_absent_report_is_named(tree):
    root, paths = tree
    (root/paths[4]).unlink()
    with pytest.raises(DataError, match=f'{paths[4]}: no such report.*Extract'): read_reports(paths, root)


def test_bytes_that_are_no_text_are_read(tree):
    root, paths = tree
    (root/paths[0]).write_bytes(b' FINDINGS:  Report number 0 \xff\xfe is r\xe9ad.\n')
    assert numbers(read_reports(paths[:1], root)) == [0]
