"From records and predictions to a page: the numbers, the warnings, the two formats, the pictures."
import base64
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest

from medcl_study import figures, results, sections, stats
from medcl_study.core import DataError, write_json
from medcl_study.pages import Page, Picture, Section, Table, to_html, to_markdown, write_page
from medcl_study.predictions import (Task, compare, concat_predictions, mean_over_runs, measure, prediction_rows,
                                     read_predictions, score, write_predictions)
from medcl_study.report import build_report, numbers, write_report
from medcl_study.results import (arms, difference, differences, disagreements, read_examples, read_study, recall_table,
                                 write_examples)

FINDINGS = Task('findings', 'multilabel', ('nodule', 'effusion <5 mm', 'edema'), prompt_set='ours/a', source='phantom')
OPACITY = Task('opacity', 'binary', ('normal', 'pneumonia'), source='phantom')
PAIRS = Task('pairs', 'retrieval', source='phantom')
N = 160


class Pretended:
    "A simulated study on a simulated test set; every value in it is made up."
    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.ids, self.groups = [f'i{i:03d}' for i in range(N)], np.arange(N) // 2
        self.many, self.one = self.rng.random((N, 3)) < .3, self.rng.integers(0, 2, N)
        self.common = self.rng.normal(size=(N, 3))

    def rows(self, task, gain, protocol='zeroshot', **more):
        if task is PAIRS:
            rank, counts = np.ceil(N * self.rng.random(N) ** (1 + 2 * gain)), np.tile([1, N], (N, 1))
            return prediction_rows(task, self.ids, counts, rank, protocol=protocol, groups=self.groups, **more)
        y = self.many if task is FINDINGS else self.one
        truth = y if y.ndim == 2 else np.eye(2)[y]
        noise = self.rng.normal(size=truth.shape) + (self.common[:, :truth.shape[1]] if gain else 0)
        return prediction_rows(task, self.ids, y, gain * truth + noise, protocol=protocol, groups=self.groups, **more)

    def run(self, folder, method, seed=0, gain=1., code='abc', tasks=(FINDINGS, OPACITY, PAIRS), history=True, **settings):
        "Write the record and predictions of one pretended run."
        run, frames = f'{method}-{seed}', []
        for task in tasks:
            if task is PAIRS: frames += [self.rows(task, gain, o, run=run) for o in ('image_to_text', 'text_to_image')]
            elif method == 'shortcuts': frames += [self.rows(task, g, o, run=run) for o, g in (('majority', 0), ('pixels', .2))]
            elif method == 'random_init': frames += [self.rows(task, 0, run=run, draw=o) for o in range(12)]
            else: frames += [self.rows(task, gain, run=run, prompt_set=task.prompt_set), self.rows(task, 2 * gain, 'probe', run=run)]
        frame = concat_predictions(frames)
        write_predictions(folder/f'predictions/{run}.parquet', frame)
        steps = [dict(step=10 * i, epoch=i, lr=1e-3, loss=4. - i * gain, valid_loss=3. if i else None, accuracy=.1 * i,
                      alignment=2. - .2 * i, uniformity=-1. - .1 * i, scale=14.) for i in range(4)]
        write_json(folder/f'records/{run}.json', dict(
            id=run, run=dict(method=method, seed=seed, epochs=3, train_pairs=100) | settings, source='phantom', seconds=61., peak_mb=800,
            device='a pretended CPU', code=code, revision='r1', data={}, versions={}, tasks=score(frame, resamples=300),
            history=steps if history and gain else []))
        return run


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder, pretend = tmp_path_factory.mktemp('reports')/'pretended', Pretended()
    for seed in (0, 1):
        for method, gain in (('flip', .9), ('clip', 1.), ('lock_text', .3)): pretend.run(folder, method, seed, gain)
    pretend.run(folder, 'shortcuts', tasks=(FINDINGS, OPACITY), gain=0)
    pretend.run(folder, 'random_init', tasks=(FINDINGS, OPACITY), gain=0)
    noise = pretend.rng.integers(0, 255, (3, 5, 16, 16, 3)).astype(np.uint8)
    write_examples(folder/'examples/clip-0.npz', credit='Noise, made in a test.',
                   gallery=dict(text=['a', 'b', 'c'], truth=noise[:, 0], found=noise[:, 1:], hits=np.eye(3, 4) > 0),
                   maps=dict(image=noise[:, 0, ..., 0], text=['a', 'b', 'c'], scores=pretend.rng.random((3, 4, 4)),
                             mask=np.arange(16)[None, :, None] + np.zeros((3, 1, 16)) < 5))
    return folder


@pytest.fixture(scope='module')
def study(folder): return read_study(folder)


@pytest.fixture(scope='module')
def table(study): return results.results(study, resamples=400)


@pytest.fixture(scope='module')
def page(study): return build_report(study, resamples=400)


def cell(table, arm, task='findings', protocol='zeroshot'):
    (row,) = table[(table['arm'] == arm) & (table['task'] == task) & (table['protocol'] == protocol)].to_dict('records')
    return row


# ---- results

def test_means_equal_predictions_and_record(folder, table, study):
    for arm in ('clip', 'lock_text'):
        frames = []
        for seed in (0, 1):
            frame = read_predictions(folder/f'predictions/{arm}-{seed}.parquet')
            frames.append(frame[(frame['task'] == 'findings') & (frame['protocol'] == 'zeroshot')])
        row, alone = cell(table, arm), mean_over_runs(frames, resamples=400)
        stored = [study.records[f'{arm}-{s}']['tasks']['findings/zeroshot/macro_auroc']['value'] for s in (0, 1)]
        assert row['value'] == pytest.approx(np.mean(stored)) == pytest.approx(alone.value)
        assert row['sampling_sd'] == pytest.approx(alone.sampling_sd)
        assert row['singles'] == pytest.approx(stored) and row['low'] < row['value'] < row['high']


def test_seed_variance_is_pooled_over_trained_arms(table):
    variances = []
    for arm in ('clip', 'flip', 'lock_text'):
        parts = cell(table, arm)['parts']
        variances.append(stats.seed_variance([o.estimate.value for o in parts], np.stack([o.estimate.replicates for o in parts])))
        assert cell(table, arm)['training'] == pytest.approx((np.mean(variances), 3)) or arm != 'lock_text'
    assert cell(table, 'untrained')['training'] is None and len(cell(table, 'untrained')['singles']) == 12


def test_shortcuts_are_rows_and_count_once(folder, tmp_path):
    pretend = Pretended(1)
    for method in ('clip', 'flip'):
        run = pretend.run(tmp_path, method, tasks=(FINDINGS,))
        both = concat_predictions([read_predictions(tmp_path/f'predictions/{run}.parquet'),
                                   pretend.rows(FINDINGS, .1, 'pixels', run=run)])
        write_predictions(tmp_path/f'predictions/{run}.parquet', both)
    found = results.results(read_study(tmp_path), resamples=100)
    assert (found['arm'] == 'pixels').sum() == 1 and len(cell(found, 'pixels', protocol='pixels')['singles']) == 1


def test_one_training_has_the_interval_of_measure(tmp_path):
    run = Pretended().run(tmp_path, 'clip', tasks=(FINDINGS,))
    frame = read_predictions(tmp_path/f'predictions/{run}.parquet')
    alone, row = measure(frame[frame['protocol'] == 'probe'], resamples=300), results.results(read_study(tmp_path), resamples=300)
    assert (alone.value, alone.low, alone.high) == tuple(cell(row, 'clip', protocol='probe')[o] for o in ('value', 'low', 'high'))


def test_differences_are_paired_by_seed(table, folder):
    gaps = differences(table, 'clip')
    assert set(gaps['arm']) == {'flip', 'lock_text'} and len(gaps) == 2 * 6
    worse = cell(gaps, 'lock_text', protocol='probe')
    assert worse['high'] < 0
    a, b = cell(table, 'lock_text', protocol='probe'), cell(table, 'clip', protocol='probe')
    assert worse['singles'] == pytest.approx(np.subtract(a['singles'], b['singles']))
    back = difference(b, a)
    assert (back['value'], back['low'], back['high']) == pytest.approx((-worse['value'], -worse['high'], -worse['low']))
    shortcut = cell(table, 'pixels', protocol='pixels')
    assert difference(b, shortcut)['value'] == pytest.approx(b['value'] - shortcut['value'])


def test_one_training_each_is_compared_directly(tmp_path):
    pretend = Pretended()
    for method in ('clip', 'flip'): pretend.run(tmp_path, method, tasks=(FINDINGS,))
    found = results.results(read_study(tmp_path))
    gap = cell(differences(found, 'clip'), 'flip')
    frames = [o['parts'][0].frame for o in (cell(found, 'flip'), cell(found, 'clip'))]
    assert {k: gap[k] for k in ('value', 'low', 'high')} == {k: v for k, v in compare(*frames).items() if k in ('value', 'low', 'high')}


def test_recall_curve_is_monotone_and_meets_the_table(table):
    curves = recall_table(table, resamples=200)
    assert set(curves['row']) == {'clip', 'flip', 'lock_text', 'chance'}
    for (_, row), part in curves.groupby(['panel', 'row']):
        assert part.sort_values('k')['value'].is_monotonic_increasing
        if row == 'clip':
            at_ten = part[part['k'] == 10]['value'].item()
            direction = 'image_to_text' if 'image → text' in part['panel'].iloc[0] else 'text_to_image'
            assert at_ten == pytest.approx(cell(table, 'clip', 'pairs', direction)['value'])
    assert curves[curves['row'] == 'chance']['value'].iloc[0] == pytest.approx(1 / N)


def test_arms_are_named_by_what_differs():
    def record(**run): return {'run': dict(method='clip', seed=0, epochs=3, text_init='hub') | run}
    named = arms({'a': record(), 'b': record(seed=1), 'c': record(text_init='random'), 'd': record(method='flip'),
                  'e': record(method='random_init', text_init='random', epochs=9), 'f': record(epochs=0), 'g': record(method='shortcuts')})
    assert [named[o].name for o in 'abcdefg'] == ['clip text_init=hub', 'clip text_init=hub', 'clip text_init=random', 'flip',
                                                  'untrained', 'untrained', 'shortcuts']
    assert named['c'].method == 'clip' and named['e'].method == named['g'].method == ''


# ---- warnings before numbers

def test_mixed_code_is_announced_first(tmp_path):
    pretend = Pretended()
    for seed, code in ((0, 'abc'), (1, 'def')): pretend.run(tmp_path, 'clip', seed, code=code, tasks=(FINDINGS,))
    page = build_report(read_study(tmp_path), resamples=50)
    assert any('2 versions of the code' in o and '`abc` (1 run)' in o for o in page.notes)
    for text in (to_html(page), to_markdown(page)): assert text.index('2 versions of the code') < text.index('In short')


def test_clean_study_has_no_warning(page): assert page.notes == ()


def test_forged_record_is_found(study, table):
    record = study.records['clip-0']
    key = 'findings/zeroshot/macro_auroc'
    forged = record | {'tasks': record['tasks'] | {key: record['tasks'][key] | {'value': .99}}}
    changed = results.Study(study.name, study.records | {'clip-0': forged}, study.predictions, {}, {})
    (line,) = disagreements(changed, table)
    assert 'clip-0' in line and '0.99' in line and key in line


def test_missing_parts_are_named(folder, tmp_path):
    pretend = Pretended()
    for method in ('clip', 'flip', 'filip'): pretend.run(tmp_path, method, tasks=(FINDINGS,))
    (tmp_path/'records/flip-0.json').unlink()
    (tmp_path/'predictions/filip-0.parquet').unlink()
    notes = read_study(tmp_path).notes
    assert any('without a record' in o and 'flip-0' in o for o in notes)
    assert any('without predictions' in o and 'filip-0' in o for o in notes)
    with pytest.raises(DataError, match='no records'): read_study(tmp_path/'nothing')
    for o in (tmp_path/'predictions').iterdir(): o.unlink()
    with pytest.raises(DataError, match='no predictions'): read_study(tmp_path)


def test_runs_on_another_test_set_are_left_out_and_named(tmp_path):
    pretend = Pretended()
    for seed in (0, 1): pretend.run(tmp_path, 'clip', seed, tasks=(FINDINGS,))
    pretend.ids = [f'other{i}' for i in range(N)]
    pretend.run(tmp_path, 'flip', tasks=(FINDINGS,))
    page = build_report(read_study(tmp_path), resamples=50)
    assert any('other samples' in o and 'flip-0' in o for o in page.notes) and 'flip' not in page.lead.replace('`flip-0`', '')


# ---- the page

class Reader(HTMLParser):
    "Collect what a test asks of a page."
    def __init__(self):
        super().__init__()
        self.links, self.ids, self.images, self.tags, self.open = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [attrs[o] for o in ('href', 'src', 'srcset', 'action') if o in attrs]
        if 'id' in attrs: self.ids.append(attrs['id'])
        if tag == 'img': self.images.append(attrs)
        if tag not in ('img', 'meta', 'br', 'link'): self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f'</{tag}> closes another element'


def test_html_is_one_file_that_asks_for_nothing(page):
    text, reader = to_html(page), Reader()
    reader.feed(text)
    assert reader.open == [] and not {'script', 'link', 'iframe', 'object'} & set(reader.tags)
    inner = [o[1:] for o in reader.links if o.startswith('#')]
    assert sorted(inner) == sorted(set(reader.ids)) and len(inner) == len(page.sections)
    assert all(o.startswith(('#', 'data:image/png;base64,')) for o in reader.links)
    assert not re.search(r'url\(|@import|https?://', text)
    assert reader.tags.count('h1') == 1 and len(reader.images) >= 8 and '@media print' in text
    for image in reader.images:
        assert image['alt'] and 100 < int(image['width']) < 1000
        assert base64.b64decode(image['src'].split(',')[1]).startswith(b'\x89PNG')
    assert 'effusion <5' not in text


def test_markdown_has_its_figures_beside_it(page, tmp_path):
    files = write_page(page, tmp_path)
    text = (tmp_path/'report.md').read_text()
    links = re.findall(r'!\[[^\]]+\]\(([^)]+)\)', text)
    assert len(links) >= 8 and all((tmp_path/o).read_bytes().startswith(b'\x89PNG') for o in links)
    assert {tmp_path/o for o in links} == {o for o in files if o.suffix == '.png'}
    titles = [o.removeprefix('## ') for o in text.splitlines() if o.startswith('## ')]
    anchors = re.findall(r'\]\(#([^)]+)\)', text)
    assert anchors == [re.sub(r'[^\w\- ]', '', o.lower()).replace(' ', '-') for o in titles]
    for block in re.findall(r'(?:^\|.*\n)+', text, re.M):
        assert len({len(re.findall(r'(?<!\\)\|', o)) for o in block.splitlines()}) == 1


def test_every_picture_says_what_ran_where(page):
    pictures = [b for s in page.sections for b in s.blocks if isinstance(b, Picture)]
    assert {o.name for o in pictures} >= {'zeroshot-auroc', 'probe-auroc', 'retrieval', 'differences-auroc', 'chance', 'training',
                                          'gallery', 'maps', 'differences-recall-at-10'}
    for o in pictures: assert 'phantom' in o.caption and 'a pretended CPU' in o.caption and re.search('[Ss]eed', o.caption)
    assert sum(len(o.png) for o in pictures) < 2e6


def test_prose_quotes_what_was_computed(page, study):
    table = results.results(study, resamples=400)
    (short,) = next(s for s in page.sections if s.title == 'In short').blocks
    row = cell(table, 'clip')
    assert any(sections.in_words(row) in o and '`clip` is **above** the best shortcut' in o for o in short)
    gaps = differences(table, 'clip')
    up, down = (gaps['low'] > 0).sum(), (gaps['high'] < 0).sum()
    assert any(f'of 12 differences to `clip`, {up} wholly above zero, {down} wholly below' in o for o in short)
    recall = cell(table, 'clip', 'pairs', 'image_to_text')
    assert any(f'{recall["value"] / recall["chance"]:.1f} times chance' in o for o in short)
    assert any('12 random starts' in o for o in short)
    text = to_markdown(page)
    for arm in ('clip', 'flip', 'lock_text', 'untrained', 'pixels'):
        protocol = 'pixels' if arm == 'pixels' else 'zeroshot'
        assert sections.in_words(cell(table, arm, protocol=protocol)) in text


def test_untrained_probe_is_a_baseline_but_not_chance(tmp_path):
    pretend = Pretended()
    pretend.run(tmp_path, 'clip', tasks=(FINDINGS,))
    run = pretend.run(tmp_path, 'random_init', tasks=(FINDINGS,), gain=0)
    frames = [read_predictions(tmp_path/f'predictions/{run}.parquet')]
    frames += [pretend.rows(FINDINGS, .4, 'probe', run=run, draw=o) for o in range(6)]
    write_predictions(tmp_path/f'predictions/{run}.parquet', concat_predictions(frames))
    page = build_report(read_study(tmp_path), resamples=50)
    alt = next(b.alt for s in page.sections if s.title.startswith('Chance') for b in s.blocks)
    assert alt.count('untrained') == 1


def test_draws_of_labels_are_one_part_per_training(tmp_path):
    "Five draws under each of two seeds: two parts, each the mean of its draws, paired by seed."
    pretend = Pretended()
    for method, gain in (('clip', .5), ('flip', 1.)):
        for seed in (0, 1):
            run = pretend.run(tmp_path, method, seed=seed, gain=gain, tasks=(FINDINGS,))
            frames = [read_predictions(tmp_path/f'predictions/{run}.parquet')]
            frames += [pretend.rows(FINDINGS, gain, 'probe@0.01', run=run, draw=o) for o in range(5)]
            write_predictions(tmp_path/f'predictions/{run}.parquet', concat_predictions(frames))
    table = results.results(read_study(tmp_path), resamples=100)
    few = table[table['protocol'] == 'probe@0.01']
    assert [(len(o), {p.draws for p in o}) for o in few['parts']] == [(2, {5})] * 2
    frame = read_predictions(tmp_path/'predictions/clip-1.parquet')
    rows = [frame[(frame['protocol'] == 'probe@0.01') & (frame['draw'] == o)] for o in range(5)]
    for o in rows: o.attrs = frame.attrs
    clip = few[few['arm'] == 'clip'].iloc[0]
    assert clip['parts'][1].estimate.value == pytest.approx(np.mean([measure(o, resamples=2).value for o in rows]))
    gap = differences(few, 'clip').iloc[0]
    assert gap['low'] > 0 and len(gap['singles']) == 2


def test_the_same_study_gives_the_same_bytes(folder, tmp_path):
    first = {o: o.read_bytes() for o in write_report(folder, resamples=100)}
    second = {o: o.read_bytes() for o in write_report(folder, resamples=100)}
    assert first == second and {o.name for o in first} >= {'report.html', 'report.md', 'numbers.csv'}


def test_numbers_list_every_metric_of_every_record(study):
    frame = numbers(study)
    assert len(frame) == sum(len(o['tasks']) for o in study.records.values())
    row = frame[(frame['run'] == 'clip-1') & (frame['task'] == 'pairs') & (frame['metric'] == 'median_rank')].iloc[0]
    assert row['value'] == study.records['clip-1']['tasks'][f'pairs/{row["protocol"]}/median_rank']['value']


def test_other_prompts_get_a_table(tmp_path):
    pretend = Pretended()
    run = pretend.run(tmp_path, 'clip', tasks=(FINDINGS,))
    frame = concat_predictions([read_predictions(tmp_path/f'predictions/{run}.parquet'),
                                pretend.rows(FINDINGS, .5, run=run, prompt_set='released/v1')])
    write_predictions(tmp_path/f'predictions/{run}.parquet', frame)
    study = read_study(tmp_path)
    study.records[run]['tasks'] = score(frame, resamples=50)
    (section,) = sections.prompts(study, 'clip')
    assert section.blocks[0].frame['prompts'].tolist() == ['`own`', '`released/v1`']
    assert len(cell(results.results(study, resamples=50), 'clip')['singles']) == 1


@pytest.mark.parametrize('tasks', [(FINDINGS,), (PAIRS,)])
@pytest.mark.parametrize('methods', [('clip',), ('flip', 'lock_text')])
def test_reports_of_part_of_a_study(tmp_path, tasks, methods):
    pretend = Pretended()
    for method in methods: pretend.run(tmp_path, method, tasks=tasks, history=False)
    page = build_report(read_study(tmp_path), resamples=50)
    titles = [o.title for o in page.sections]
    assert titles[0] == 'In short' and re.search('chance', page.sections[0].blocks[0][0])
    assert ('Retrieval: how far down the list?' in titles) == (tasks == (PAIRS,)) and 'Training' not in titles
    assert any('Differences to `flip`' in o for o in titles) == (len(methods) == 2)
    to_html(page), to_markdown(page)


def test_rare_classes_are_named(tmp_path):
    pretend = Pretended()
    pretend.many[:, 1] = np.arange(N) < 3
    pretend.run(tmp_path, 'clip', tasks=(FINDINGS,))
    page = build_report(read_study(tmp_path), resamples=50)
    (section,) = [o for o in page.sections if o.title.startswith('Left out')]
    assert section.blocks[1] == ['`findings`: effusion <5 mm.'] and '&lt;5 mm' in to_html(page)


def test_report_runs_without_torch(folder):
    code = f'''
import sys
class NoTorch:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in ('torch', 'timm', 'transformers', 'fastai'): raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, NoTorch())
from medcl_study.report import write_report
write_report({str(folder)!r}, resamples=50)
'''
    subprocess.run([sys.executable, '-c', code], check=True)


# ---- examples

def test_examples_come_back_and_are_checked(tmp_path):
    images = np.arange(2 * 3 * 8 * 8, dtype=np.uint8).reshape(2, 3, 8, 8)
    gallery = dict(text=['ein Satz', 'ß'], truth=images[:, 0], found=images, hits=np.ones((2, 3), bool))
    write_examples(tmp_path/'a.npz', credit='me', gallery=gallery)
    again = read_examples(tmp_path/'a.npz')
    assert again['credit'] == 'me' and 'maps' not in again and again['gallery']['text'].tolist() == ['ein Satz', 'ß']
    assert all((again['gallery'][k] == np.asarray(v)).all() for k, v in gallery.items())
    with pytest.raises(DataError, match='gallery must hold'): write_examples(tmp_path/'b.npz', credit='', gallery={'text': []})
    with pytest.raises(DataError, match='differ in length'):
        write_examples(tmp_path/'b.npz', credit='', gallery=gallery | {'text': ['a']})
    with pytest.raises(DataError, match='objects'):
        write_examples(tmp_path/'b.npz', credit='', gallery=gallery | {'text': np.array([None, 'a'], object)})
    assert not (tmp_path/'b.npz').exists()
    (tmp_path/'c.npz').write_bytes(b'not a zip')
    with pytest.raises(DataError, match='c.npz'): read_examples(tmp_path/'c.npz')


# ---- figures

def test_colours_are_stable_and_apart():
    assert figures.colour('clip') == '#0072B2' and figures.colour('made_up') == figures.colour('made_up') != figures.GREY
    from matplotlib.colors import to_rgb
    main = [to_rgb(figures.colour(o)) for o in ('clip', 'flip', 'lock_image', 'lock_text', '')]
    apart = [np.abs(np.subtract(a, b)).sum() for i, a in enumerate(main) for b in main[:i]]
    assert min(apart) > .3


def test_figures_leave_global_style_alone(table):
    before = dict(matplotlib.rcParams)
    first = figures.png(figures.interval_panels(sections._panels(table[table['task'] == 'findings']), xlabel='AUROC'))
    assert dict(matplotlib.rcParams) == before and first.startswith(b'\x89PNG')


def test_interval_panels_show_every_row_and_value(table):
    rows = sections._panels(sections.in_order(table[(table['task'] == 'findings') & (table['protocol'] == 'zeroshot')], 'clip'))
    figure = figures.interval_panels(rows, xlabel='AUROC')
    (ax,) = figure.axes
    assert [o.get_text() for o in ax.get_yticklabels()] == rows['row'].tolist()[::-1]
    drawn = np.concatenate([o.get_xdata() for o in ax.lines])
    for r in rows.to_dict('records'):
        for value in (r['value'], r['low'], r['high'], *r['singles'][:2]): assert np.isclose(drawn, value).any()


def test_page_refuses_two_pictures_of_one_name():
    picture = Picture('a', figures.png(figures.chance_strips(pd.DataFrame([dict(
        row='x', value=.5, low=.4, high=.6, reference=.5, singles=[.4, .6])]), xlabel='')), 'c', 'alt')
    with pytest.raises(ValueError, match='share a name'): write_page(Page('t', 'l', (), [Section('s', [picture] * 2)]), 'nowhere')


def test_markup_in_data_stays_text():
    page = Page('<b>', 'a & b', ('x < y',), [Section('<i>', ['<script>alert(1)</script>', ['`<u>`'],
                                                            Table(pd.DataFrame({'<td>': ['<img src=x>', 'a|b']}))])])
    text = to_html(page)
    assert not re.search(r'<(b|i|u|script|img)[ >]', text)
    assert '<script>' not in to_markdown(page) and 'a\\|b' in to_markdown(page)
