"A simulated study with a known order and known ties: the sections must recover both, and say what they leave out."
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from medcl_study import benchmark_sections as sections
from medcl_study.comparison_figures import difference_map, rank_diagram, reliability_diagram, small_png
from medcl_study.core import write_json
from medcl_study.metrics import METRICS
from medcl_study.pages import Page, Picture, Table, to_html, to_markdown
from medcl_study.predictions import Task, concat_predictions, measure, prediction_rows, write_predictions
from medcl_study.results import differences, read_study, results

GAINS = {'best': 1.9, 'clip': 1.2, 'twin': 1.2, 'worst': .5}
N = 120
IDS, GROUPS = [f's{i:03d}' for i in range(N)], np.arange(N) // 2


def task(i):
    classes = ('no', 'yes') if i % 2 else ('a', 'b', 'c')
    return Task(f'task_{i:02d}', 'binary' if i % 2 else 'multilabel', classes, family='shared' if i < 3 else '', source='phantom')


def rows_of(i, method, seed, run, protocol='zeroshot', gain=None):
    shared, own = np.random.default_rng([i, 0]), np.random.default_rng([i, list(GAINS).index(method) + 1, seed])
    gain = GAINS[method] if gain is None else gain
    k = 1 if i % 2 else 3
    y, common = shared.random((N, k)) < .45, shared.normal(size=(N, k))
    x = gain * (y - .5) + .7 * common + .3 * own.normal(size=(N, k))
    y, x = (y[:, 0].astype(int), np.c_[-x, x]) if i % 2 else (y.astype(int), x)
    return prediction_rows(task(i), IDS, y, x, protocol=protocol, run=run, groups=GROUPS)


def write_run(folder, method, seed, frames):
    run = f'{method}-{seed}'
    write_predictions(folder/f'predictions/{run}.parquet', concat_predictions(frames))
    write_json(folder/f'records/{run}.json', dict(id=run, run=dict(method=method, seed=seed, epochs=3), source='phantom', code='abc',
                                                  device='a pretended CPU', seconds=1., peak_mb=1, revision='r', data={}, versions={}, tasks={}))


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp('reports')/'pretended'
    for method in GAINS:
        for seed in range(2): write_run(folder, method, seed, [rows_of(i, method, seed, f'{method}-{seed}') for i in range(12)])
    return read_study(folder)


@pytest.fixture(scope='module')
def table(study): return results(study, resamples=200)


@pytest.fixture(scope='module')
def gaps(table): return differences(table, 'clip')


def pictures(found): return {b.name: b for s in found for b in s.blocks if isinstance(b, Picture)}
def tables(found): return [b for s in found for b in s.blocks if isinstance(b, Table)]


# ---- across tasks

def test_known_order_and_known_tie_are_recovered(study, table):
    found = sections.across_tasks(study, table, 'clip', resamples=200)
    drawn = pictures(found)
    assert set(drawn) == {'ranks-zero-shot-family', 'ranks-zero-shot-task', 'profiles', 'improvement'}
    ranks = {k: float(v) for k, v in (o.split() for o in drawn['ranks-zero-shot-family'].alt.split('; '))}
    assert ranks['best'] == 1 and ranks['worst'] == 4 and abs(ranks['clip'] - ranks['twin']) < 1
    (frame,) = [o.frame.set_index('arm') for o in tables(found)]
    assert frame.loc['`best`', 'Wilcoxon'].startswith('**better**') and frame.loc['`worst`', 'Wilcoxon'].startswith('**worse**')
    assert frame.loc['`twin`', 'Wilcoxon'].startswith('cannot tell') and 'would be seen' in frame.loc['`twin`', 'Wilcoxon']
    three = {m: [float(v) for v in frame.loc[f'`{m}`', 'better / same / worse'].split(' / ')] for m in ('best', 'twin', 'worst')}
    assert three['best'][0] > .99 and three['worst'][2] > .99 and max(three['twin'][0], three['twin'][2]) < .95
    assert '`best` has the best mean rank, 1.00 of 4' in found[0].blocks[1] and '10 families (12 tasks)' in found[0].blocks[1]


def test_few_families_are_said_to_decide_nothing(study, table):
    few = table[table['task'].isin([f'task_{i:02d}' for i in range(2, 7)])]
    (frame,) = [o.frame.set_index('arm') for o in tables(sections.across_tasks(study, few, 'clip', resamples=50))]
    assert all('cannot be significant\nsmallest possible p = 0.1' in frame.loc[f'`{m}`', 'Wilcoxon'] for m in ('best', 'twin', 'worst'))


def test_one_family_is_ranked_by_task(study, table):
    found = sections.across_tasks(study, table[table['task'].isin(['task_00', 'task_01', 'task_02'])], 'clip', resamples=50)
    assert set(pictures(found)) == {'ranks-zero-shot-task', 'profiles', 'improvement'} and '3 tasks (3 tasks)' in found[0].blocks[1]


def test_one_task_or_one_arm_is_silent(study, table, gaps):
    one = table[table['task'] == 'task_05']
    both = pd.concat([one, one.assign(protocol='probe')])  # one task, asked in two ways
    for part in (one, both): assert sections.benchmark_sections(study, part, gaps[gaps['task'] == 'task_05'], 'clip') == []
    assert sections.across_tasks(study, table[table['arm'] == 'clip'], 'clip') == []
    assert sections.across_tasks(study, table.assign(method=''), 'clip') == []


def test_incomplete_arms_are_left_out_and_named(study, table):
    short = table[(table['arm'] != 'worst') | (table['task'] != 'task_07')]
    (o,) = sections.comparisons(study, short, 'clip')
    assert set(o.plain.values) == {'clip', 'best', 'twin'} and o.notes == (
        '`worst` is left out of the comparison: it was not scored on task_07.',)
    extra = table[(table['arm'] != 'clip') | (table['task'] != 'task_07')]
    (o,) = sections.comparisons(study, extra, 'clip')
    assert 'task_07' not in o.plain.tasks and 'Not compared, since `clip` was not scored there: task_07.' in o.notes
    def lose(row): return [p for p in row['parts'] if p.seed == 0] if (row['arm'], row['task']) == ('twin', 'task_03') else row['parts']
    (o,) = sections.comparisons(study, table.assign(parts=[lose(r) for r in table.to_dict('records')]), 'clip')
    assert len(o.plain.values['twin']) == 1 and len(o.plain.values['clip']) == 2  # the seed that all tasks have


def test_values_are_means_over_seeds_and_corrected_for_chance(study, table):
    (o,) = sections.comparisons(study, table, 'clip')
    row = table[(table['arm'] == 'best') & (table['task'] == 'task_04')].iloc[0]
    assert o.plain.blocks('task').loc['task_04', 'best'] == pytest.approx(row['value'])
    assert o.corrected.blocks('task').loc['task_04', 'best'] == pytest.approx((row['value'] - .5) / .5)
    family = table[(table['arm'] == 'best') & table['task'].isin(['task_00', 'task_01', 'task_02'])]['value'].mean()
    assert o.plain.blocks().loc['shared', 'best'] == pytest.approx(family) and list(o.plain.blocks().columns)[0] == 'clip'


# ---- task by task

def test_every_value_and_every_difference_is_there(study, table, gaps):
    found = sections.task_by_task(study, table, gaps, 'clip')
    values, gap = tables(found)[1].frame.set_index('task'), tables(found)[0].frame.set_index('task')
    assert values.shape == (12, 4) and gap.shape == (12, 3)
    assert list(values.index) == list(gap.index) and [o for o in values.index if o in ('`task_00`', '`task_01`', '`task_02`')] == [
        '`task_00`', '`task_01`', '`task_02`']
    for r in gaps.to_dict('records'):
        cell = gap.loc[f'`{r["task"]}`', f'`{r["arm"]}`']
        told = r['low'] > 0 or r['high'] < 0
        assert cell.startswith('**') == told and ('would be seen' in cell) != told
    told = ((gaps['low'] > 0) | (gaps['high'] < 0)).sum()
    assert f'({told} of {len(gaps)}; about 2 would by chance alone' in pictures(found)['map-zeroshot'].caption


# ---- calibration

def test_confidences_and_bins(study, table):
    row = table[(table['arm'] == 'clip') & (table['task'] == 'task_00')].iloc[0]
    seen = sections.confidences(row['parts'][0].frame)
    assert len(seen) == 3 * N and seen['group'].nunique() == N // 2
    assert ((seen['probability'] > .5) == (seen['right'] == 1)).to_numpy().tolist() == (seen['error'] == 0).tolist()
    bins = sections.reliability_bins(seen)
    assert bins['count'].sum() == 3 * N and (bins['low'] <= bins['observed']).all() and (bins['observed'] <= bins['high']).all()
    curve = sections.risk_at_coverage(seen, resamples=50)
    assert curve['value'].iloc[-1] == pytest.approx(seen['error'].mean()) and curve['coverage'].iloc[-1] == 1


def test_risk_by_a_loop():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(certainty=rng.random(50), error=rng.integers(0, 2, 50), group=np.arange(50)))
    curve, order = sections.risk_at_coverage(table, points=10, resamples=20), table.sort_values('certainty', ascending=False)
    assert curve['value'].tolist() == pytest.approx([order['error'].iloc[:5 * k].mean() for k in range(1, 11)])


def test_calibration_table_holds_means_over_families(study, table):
    found = sections.calibration(study, table, 'clip', resamples=50)
    assert set(pictures(found)) == {'reliability-zeroshot', 'risk-zeroshot'}
    (frame,) = [o.frame.set_index('arm') for o in tables(found)]
    assert list(frame.columns) == [METRICS['ece'].label, f'{METRICS["ece"].label} by luck', METRICS['brier'].label]
    part = table[table['arm'] == 'best']
    means = [np.mean([measure(o.frame, 'brier', resamples=2).value for o in r['parts']]) for r in part.to_dict('records')]
    by_family = pd.Series(means).groupby(['shared' if t in ('task_00', 'task_01', 'task_02') else t for t in part['task']]).mean()
    assert frame.loc['`best`', METRICS['brier'].label].startswith(f'{by_family.mean():.3f}')


def test_answers_and_retrieval_have_sections(tmp_path):
    rng = np.random.default_rng(0)
    asked = [Task(f'questions_{i}', 'vqa', ('yes', 'no', 'lung')) for i in range(2)]
    pairs = [Task(f'pairs_{i}', 'retrieval') for i in range(2)]
    target = np.c_[rng.integers(0, 3, N), rng.integers(0, 2, N)]
    for j, method in enumerate(('clip', 'best')):
        frames = []
        for t in asked:
            said = np.where(rng.random(N) < .6 + .2 * j, target[:, 0], 0)
            frames.append(prediction_rows(t, IDS, target, np.c_[said, rng.uniform(.4, 1, N)], protocol='vqa', run=f'{method}-0', groups=GROUPS))
        frames += [prediction_rows(t, IDS, np.tile([1, N], (N, 1)), np.ceil(N * rng.random(N)**(2 + j)), protocol='image_to_text',
                                   run=f'{method}-0', groups=GROUPS) for t in pairs]
        write_run(tmp_path, method, 0, frames)
    study = read_study(tmp_path)
    table = results(study, resamples=60)
    found = sections.benchmark_sections(study, table, differences(table, 'clip'), 'clip', resamples=60)
    assert {'ranks-questions-family', 'ranks-image-to-text-family', 'ranks-all-protocols-family', 'map-vqa', 'map-image_to_text',
            'reliability-vqa'} <= set(pictures(found))
    to_html(Page('a', '', (), found))


# ---- the page and the figures

def test_all_sections_make_one_page(study, table, gaps):
    found = sections.benchmark_sections(study, table, gaps, 'clip', resamples=100)
    assert [o.title.partition(':')[0] for o in found] == ['Across tasks', 'Task by task', 'Calibration']
    page = Page('a', '', (), found)
    assert to_html(page).count('<img') == len(pictures(found)) and to_markdown(page)
    for o in pictures(found).values():
        assert o.png.startswith(b'\x89PNG') and len(o.png) < 50_000 and 'a pretended CPU' in o.caption and o.alt
    again = sections.across_tasks(study, table, 'clip', resamples=100)
    assert {k: v.png for k, v in pictures(again).items()}.items() <= {k: v.png for k, v in pictures(found).items()}.items()


@pytest.mark.parametrize('k', [2, 5, 8, 12])
def test_no_label_of_a_rank_diagram_hides_another(k):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        ranks = np.full(k, (k + 1) / 2) if seed == 0 else rng.uniform(1, k, k).round(seed)
        rows = pd.DataFrame(dict(row=[f'a_method_{i}' for i in range(k)], method='', rank=ranks))
        figure = rank_diagram(rows, [tuple(rows['row'])], rng.uniform(.5, 14), note='9 families')
        boxes = [o.get_window_extent(FigureCanvasAgg(figure).get_renderer()) for o in figure.axes[0].texts]
        assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_bars_of_a_rank_diagram_join_exactly_the_cliques():
    rows = pd.DataFrame(dict(row=list('abcd'), method='', rank=[1., 1.8, 2.9, 4.]))
    figure = rank_diagram(rows, [('a', 'b'), ('b', 'c')], 1.2)
    bars = [o for o in figure.axes[0].lines if o.get_linewidth() == 3.2]
    assert len(bars) == 2 and len({o.get_ydata()[0] for o in bars}) == 2


def test_map_frames_what_excludes_zero():
    gaps = pd.DataFrame([dict(task='t', row='a', value=.1, low=.05, high=.2), dict(task='t', row='b', value=.1, low=-.05, high=.2)])
    figure = difference_map(gaps, pd.Series({'t': .8}), baseline='clip')
    assert [(o.get_text(), o.get_fontweight()) for o in figure.axes[0].texts] == [('0.800', 'normal'), ('+10.0', 'bold'), ('+10.0', 'normal')]


def test_missing_methods_leave_a_gap_in_reliability():
    bins = pd.DataFrame([dict(panel=p, row=r, method=r, predicted=.5, observed=.5, low=.4, high=.6, count=9)
                         for p, r in (('x', 'a'), ('x', 'b'), ('y', 'a'))])
    assert len(small_png(reliability_diagram(bins))) > 1000
