"The prediction table: what comes back from disk, what is refused, and that every number follows from the file."
import json
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as oracle

from medcl_study.core import DataError, OutputError
from medcl_study.predictions import (COLUMNS, LARGEST, Task, check_predictions, compare, concat_predictions, mean_over_runs,
                                     measure, metrics_of, prediction_rows, read_predictions, score, stacked, tasks_of,
                                     gather_predictions, write_predictions, write_study_predictions)

BINARY = Task('opacity', 'binary', ('normal', 'pneumonia'), modality='chest', citation='Doe et al.')
MULTI = Task('organs', 'multiclass', ('liver', 'lung', 'spleen'), prompt_set='ours', family='ct')
LABELS = Task('findings', 'multilabel', ('nodule', 'effusion', 'edema'), licence='CC BY 4.0')
PAIRS = Task('pairs', 'retrieval')
QUESTIONS = Task('questions', 'vqa', ('yes', 'no', 'left lung'))
REGIONS = Task('regions', 'segmentation', ('nodule', 'effusion'))
BOXES = Task('boxes', 'detection', ('nodule', 'foreign object'))


def rows(task, run='r', protocol='zeroshot', n=120, seed=0, gain=1., **more):
    "Simulated predictions of one task."
    rng = np.random.default_rng([seed, len(task.name)])
    noise = np.random.default_rng([seed, ord(run[-1]), len(protocol), more.get('draw', 0)])
    ids, groups, k = [f'{task.name}-{i:04d}' for i in range(n)], np.arange(n) // 2, len(task.classes)
    if task.kind == 'retrieval':
        return prediction_rows(task, ids, np.tile([2, n], (n, 1)), noise.integers(1, n, n), run=run, protocol=protocol,
                               groups=groups, **more)
    y = rng.random((n, k)) < .3 if task.kind == 'multilabel' else rng.integers(0, k, n)
    truth = y if y.ndim == 2 else np.eye(k)[y]
    return prediction_rows(task, ids, y, noise.normal(size=(n, k)) + gain * truth, run=run, protocol=protocol,
                           groups=groups, **more)


def everything(run='r', **kwargs): return concat_predictions([rows(t, run, **kwargs) for t in (BINARY, MULTI, LABELS, PAIRS)])


def test_file_round_trip_keeps_every_value_and_task(tmp_path):
    frame = everything()
    write_predictions(tmp_path/'a.parquet', frame)
    again = read_predictions(tmp_path/'a.parquet')
    assert list(again.columns) == list(COLUMNS)
    for column in COLUMNS[:7]: assert (again[column] == frame[column]).all()
    for column in ('target', 'scores'): assert all((a == b).all() for a, b in zip(again[column], frame[column]))
    assert tasks_of(again) == {t.name: t for t in (BINARY, MULTI, LABELS, PAIRS)}
    assert score(again) == score(frame)
    write_predictions(tmp_path/'b.parquet', again)
    assert (tmp_path/'a.parquet').read_bytes() == (tmp_path/'b.parquet').read_bytes()


def test_scores_are_rounded_when_made_so_that_the_file_gives_the_same_numbers():
    scores = np.stack([np.zeros(20), 1 + 1e-12 * np.arange(20)], 1)
    close = prediction_rows(BINARY, np.arange(20), np.arange(20) % 2, scores, protocol='p')
    assert measure(close).value == .5  # differences below float32 are ties before and after writing


def test_numbers_follow_from_the_file_without_torch_or_this_package(tmp_path):
    write_predictions(tmp_path/'a.parquet', everything())
    numbers = score(read_predictions(tmp_path/'a.parquet'))
    code = """
import sys, json, numpy as np, pandas as pd, pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score, balanced_accuracy_score
path = sys.argv[1]
frame, tasks = pd.read_parquet(path), json.loads(pq.read_schema(path).metadata[b'tasks'])
def part(name):
    rows = frame[frame.task == name]
    return np.stack(rows.scores).astype(float), np.stack(rows.target)
x, y = part('findings'); a = roc_auc_score(y, x)
x, y = part('opacity'); b = roc_auc_score(y[:, 0], x[:, 1] - x[:, 0])
x, y = part('organs'); c = balanced_accuracy_score(y[:, 0], x.argmax(1))
x, y = part('pairs'); d, e = (x[:, 0] <= 10).mean(), np.median(x[:, 0])
assert 'torch' not in sys.modules and 'medcl_study' not in sys.modules and tasks['findings']['classes'][2] == 'edema'
print(json.dumps([a, b, c, d, e]))
"""
    out = subprocess.run([sys.executable, '-c', code, str(tmp_path/'a.parquet')], capture_output=True, text=True, check=True)
    keys = ('findings/zeroshot/macro_auroc', 'opacity/zeroshot/auroc', 'organs/zeroshot/balanced_accuracy',
            'pairs/zeroshot/recall_at_10', 'pairs/zeroshot/median_rank')
    np.testing.assert_allclose([numbers[k]['value'] for k in keys], json.loads(out.stdout), atol=1e-12)


def test_module_does_not_import_torch():
    code = "import sys, medcl_study.predictions; assert not {'torch', 'sklearn', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)


def test_a_study_and_task_stay_below_two_mebibytes(tmp_path):
    wide = Task('chest14', 'multilabel', tuple('abcdefghijklmn'))
    frame = concat_predictions([rows(wide, f'run{i}', n=2000) for i in range(12)])
    write_predictions(tmp_path/'a.parquet', frame)
    assert len(frame) == 24_000 and (tmp_path/'a.parquet').stat().st_size < 2 * 2**20


def test_score_entries_are_what_a_record_holds():
    numbers = score(everything())
    assert {k.split('/')[0] for k in numbers} == {'opacity', 'organs', 'findings', 'pairs'}
    for key, entry in numbers.items():
        task, protocol, metric = key.split('/')
        assert entry['metric'] == metric and entry['n'] == 120 and entry['groups'] == 60
        assert entry['low'] <= entry['value'] <= entry['high']
        assert entry['primary'] == (metric == {'opacity': 'auroc', 'pairs': 'recall_at_10'}.get(task, 'macro_auroc'))
    json.dumps(numbers, allow_nan=False)
    assert 'pairs/zeroshot/recall_at_50' in numbers and 'pairs/zeroshot/recall_at_200' not in numbers
    assert metrics_of(PAIRS, [[1, 10]]) == ['recall_at_1', 'recall_at_5', 'median_rank']


def test_score_equals_scikit_learn_and_ignores_order_and_company():
    frame = everything()
    numbers = score(frame)
    y, x = stacked(rows(LABELS)['target']), stacked(rows(LABELS)['scores'])
    assert numbers['findings/zeroshot/macro_auroc']['value'] == pytest.approx(oracle.roc_auc_score(y, x), abs=1e-12)
    assert score(frame.sample(frac=1, random_state=0)) == numbers
    assert score(rows(LABELS)) == {k: v for k, v in numbers.items() if k.startswith('findings')}
    assert score(frame, seed=1) != numbers


def test_rare_classes_and_undefined_metrics_are_named():
    y = np.zeros((60, 3), int); y[:20, 0] = y[:4, 1] = y[:30, 2] = 1
    x = np.random.default_rng(0).normal(size=(60, 3))
    frame = prediction_rows(LABELS, [f'{i}' for i in range(60)], y, x, protocol='probe', run='r')
    assert score(frame)['findings/probe/macro_auroc']['left_out'] == ['effusion']
    assert 'only 15 independent groups' in score(frame.assign(group=(np.arange(60) // 4).astype(str)))[
        'findings/probe/macro_auroc']['cautions']
    one_class = prediction_rows(BINARY, list('abcdef'), np.zeros(6, int), x[:6, :2], protocol='probe', run='r')
    with pytest.warns(UserWarning) as seen: numbers = score(one_class)
    assert 'opacity/probe/auroc is left out: all targets are of one class' in [str(o.message) for o in seen]
    assert {o['metric'] for o in numbers.values()} == {'accuracy', 'ece', 'brier', 'aurc', 'selective_accuracy'}


def test_prompt_sets_and_draws_are_variants():
    frames = [rows(MULTI, prompt_set='ours'), rows(MULTI, prompt_set='released', gain=.5)]
    frames += [rows(MULTI, protocol='fewshot', draw=d) for d in range(4)]
    numbers = score(concat_predictions(frames))
    assert 'organs/zeroshot/macro_auroc' in numbers and 'organs/zeroshot/macro_auroc/released' in numbers
    few = numbers['organs/fewshot/macro_auroc']
    single = [measure(f).value for f in frames[2:]]
    assert few['draws'] == 4 and few['value'] == pytest.approx(np.mean(single))
    assert few['low'] < min(few['value'], few['high'])


def test_compare_is_paired_antisymmetric_and_checks_the_samples():
    a, b = rows(LABELS, 'a'), rows(LABELS, 'b', gain=1.5)
    d, back = compare(a, b), compare(b, a)
    assert d['value'] == pytest.approx(measure(a).value - measure(b).value)
    assert (d['value'], d['low'], d['high']) == pytest.approx((-back['value'], -back['high'], -back['low']), abs=1e-9)
    assert d['first'] == measure(a).value and d['n'] == 120 and d['groups'] == 60
    shuffled = compare(a.sample(frac=1, random_state=1), b.sample(frac=1, random_state=2))
    assert shuffled == d
    assert compare(a, b, 'macro_auprc')['metric'] == 'macro_auprc'
    with pytest.raises(DataError, match="1 samples are in only one of two tables, e.g. 'findings-0119'"): compare(a, b[:-1])
    other = b.copy(); other.at[5, 'target'] = 1 - other.at[5, 'target']
    with pytest.raises(DataError, match="targets of sample 'findings-0005' differ"): compare(a, other)
    with pytest.raises(DataError, match="groups of sample 'findings-0000' differ"): compare(a, b.assign(group='x'))
    with pytest.raises(DataError, match="found several .'protocol'"): compare(concat_predictions([a, rows(LABELS, 'a', 'probe')]), b)


def test_mean_over_runs_and_its_paired_difference():
    a, b = ([rows(LABELS, f'{m}{s}', gain=g) for s in range(3)] for m, g in (('a', 1.), ('b', 1.6)))
    mean = mean_over_runs(a)
    assert mean.seeds == 3 and mean.value == pytest.approx(np.mean([measure(o).value for o in a]))
    gap = mean_over_runs(b, minus=a)
    assert gap.value == pytest.approx(mean_over_runs(b).value - mean.value) and gap.low > 0
    zero = mean_over_runs(a, minus=a)
    assert zero.value == zero.low == zero.high == 0
    with pytest.raises(ValueError, match='one table per table'): mean_over_runs(a, minus=b[:2])


def setting(column, row, value):
    def change(frame):
        values = list(frame[column])
        values[row] = value
        new = frame.assign(**{column: pd.Series(values, dtype=object)})
        new.attrs = frame.attrs
        return new
    return change


@pytest.mark.parametrize('change, message', [
    (lambda f: f.drop(columns='group'), r"lacks the columns \['group'\]"),
    (lambda f: f.assign(prob=1), r"has unknown columns \['prob'\]"),
    (lambda f: f[:0], 'without rows'),
    (lambda f: f.assign(id='same'), 'row 2: a second row for the same sample'),
    (setting('id', 3, ''), 'row 4: empty id'),
    (setting('group', 3, ''), 'row 4: empty group'),
    (setting('scores', 7, np.array([1, np.nan, 0], np.float32)), "row 8: a score is NaN or infinite .*'organs-0007'"),
    (setting('scores', 7, np.array([1, 0], np.float32)), 'row 8: scores must hold 3 numbers'),
    (setting('target', 7, np.array([3], np.int32)), 'row 8: expected a target between 0 and 2'),
    (setting('target', 7, np.array([-1], np.int32)), 'row 8: expected a target between 0 and 2'),
    (setting('target', 7, np.array([0, 1], np.int32)), 'row 8: target must hold 1 numbers'),
    (setting('target', 7, 1), 'row 8: target must hold 1 numbers'),
    (lambda f: f.assign(task='unheard'), r"does not say what the tasks \['unheard'\] are"),
])
def test_bad_tables_are_refused_by_row(change, message, tmp_path):
    bad = change(rows(MULTI, n=20))
    for f in (check_predictions, lambda o: write_predictions(tmp_path/'x.parquet', o)):
        with pytest.raises(DataError, match=message): f(bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('target, rank', [([0, 5], 1), ([1, 5], 6), ([1, 5], 0), ([6, 5], 1)])
def test_impossible_ranks_are_refused(target, rank):
    with pytest.raises(DataError, match='row 1: expected rank'): prediction_rows(PAIRS, ['q'], [target], [rank], protocol='t')


def test_bad_arguments_are_refused():
    with pytest.raises(DataError, match='2 ids but 3 scores'): prediction_rows(BINARY, ['a', 'b'], [0, 1], np.ones((3, 2)), protocol='p')
    with pytest.raises(DataError, match='2 ids but 1 groups'):
        prediction_rows(BINARY, ['a', 'b'], [0, 1], np.ones((2, 2)), protocol='p', groups=['g'])
    with pytest.raises(DataError, match='not whole numbers'):
        prediction_rows(LABELS, ['a'], [[0, np.nan, 1]], np.ones((1, 3)), protocol='p')
    for wrong in (dict(name='a/b', kind='binary', classes=('x', 'y')), dict(name='a', kind='ordinal'), dict(name='a', kind='multiclass', classes=('x', 'y')),
                  dict(name='a', kind='binary', classes=('x', 'x')), dict(name='a', kind='retrieval', classes=('x',))):
        with pytest.raises(ValueError): Task(**wrong)


def test_two_definitions_of_a_task_do_not_mix():
    other = Task('organs', 'multiclass', ('lung', 'liver', 'spleen'))
    with pytest.raises(DataError, match="define the task 'organs' differently"): concat_predictions([rows(MULTI), rows(other, 'r2')])


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match='gone.parquet: no such file'): read_predictions(tmp_path/'gone.parquet')
    (tmp_path/'cut.parquet').write_bytes(b'PAR1 and no more')
    with pytest.raises(DataError, match='cut.parquet: not a readable Parquet file'): read_predictions(tmp_path/'cut.parquet')
    pd.DataFrame({'a': [1]}).to_parquet(tmp_path/'other.parquet')
    with pytest.raises(DataError, match='other.parquet: prediction table lacks'): read_predictions(tmp_path/'other.parquet')


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_predictions(tmp_path/'a.parquet', rows(MULTI))
    before = (tmp_path/'a.parquet').read_bytes()
    with pytest.raises(DataError): write_predictions(tmp_path/'a.parquet', rows(MULTI).assign(id='same'))
    assert (tmp_path/'a.parquet').read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    (tmp_path/'file').write_text('')
    with pytest.raises(OutputError, match='file'): write_predictions(tmp_path/'file'/'a.parquet', rows(MULTI))


def test_no_warning_in_normal_use():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        score(everything())


def local_rows(task, run='r', n=60, seed=0, **more):
    "Simulated predictions of the kinds whose rows are no class scores."
    rng = np.random.default_rng([seed, ord(run[-1])])
    truth = np.random.default_rng(seed)
    ids, groups = [f'{task.name}-{i:03d}' for i in range(n)], np.arange(n) // 2
    if task.kind == 'vqa': y, x = truth.integers([-1, 0], [3, 2], (n, 2)), np.stack([rng.integers(0, 3, n), rng.random(n)], 1)
    elif task.kind == 'segmentation':
        true = truth.integers(0, 200, n) * (truth.random(n) < .8)
        y, common = np.stack([np.arange(n) % 2, true, np.full(n, 1024)], 1), rng.integers(0, true + 1)
        x = np.stack([common, o := common + rng.integers(0, 99, n), np.where(true + o > 0, rng.integers(0, 30, n), 0)], 1)
    else:
        y, x = [], []
        for i in range(n):
            corner = truth.integers(0, 5000, (i % 3, 2))
            y.append(np.c_[truth.integers(0, 2, len(corner)), corner, corner + 3000])
            near = np.c_[y[-1][:, 0], rng.random(len(corner)), y[-1][:, 1:] + rng.integers(0, 900)]
            x.append(np.r_[near, [[0, rng.random() / 2, 10, 10, 4000, 400]]][i % 7 == 0:])
    return prediction_rows(task, ids, y, x, run=run, protocol='probe', groups=groups, **more)


@pytest.mark.parametrize('task', [QUESTIONS, REGIONS, BOXES], ids=lambda o: o.kind)
def test_local_kinds_come_back_from_disk_are_scored_and_compared(task, tmp_path):
    frame = local_rows(task)
    write_predictions(tmp_path/'a.parquet', frame)
    again = read_predictions(tmp_path/'a.parquet')
    for column in ('target', 'scores'): assert all((a == b).all() for a, b in zip(again[column], frame[column]))
    numbers = score(again)
    assert numbers == score(frame.sample(frac=1, random_state=1))
    want = {'vqa': {'vqa_accuracy', 'closed_accuracy', 'open_accuracy'}, 'segmentation': {'dice', 'dice_per_image', 'iou', 'hd95'},
            'detection': {'map', 'ap50', 'map_coco', 'froc'}}[task.kind]
    assert {o['metric'] for o in numbers.values()} == want and task.metric in want
    for o in numbers.values(): assert o['low'] <= o['value'] <= o['high'] and np.isfinite([o['low'], o['high']]).all()
    json.dumps(numbers, allow_nan=False)
    other = local_rows(task, 's')
    gap, back = compare(frame, other), compare(other, frame)
    assert (gap['value'], gap['low']) == pytest.approx((-back['value'], -back['high']), abs=1e-9)
    assert mean_over_runs([frame, other]).value == pytest.approx((gap['first'] + gap['second']) / 2)
    with pytest.raises(DataError, match="1 samples are in only one"): compare(frame, other[:-1])
    with pytest.raises(DataError, match="targets of sample '.*' differ"): compare(frame, local_rows(task, 's', seed=1))


def test_shares_of_closed_questions_rest_on_closed_questions():
    frame = local_rows(QUESTIONS)
    closed = stacked(frame['target'])[:, 1] == 1
    entry = score(frame)['questions/probe/closed_accuracy']
    assert entry['n'] == closed.sum() and entry['groups'] == frame['group'][closed].nunique()
    open_ones = frame[~closed]; open_ones.attrs = frame.attrs
    assert {o['metric'] for o in score(open_ones).values()} == {'vqa_accuracy', 'open_accuracy'}
    right = frame.assign(scores=[np.array([max(t[0], 0), 1], np.float32) for t in frame['target']]); right.attrs = frame.attrs
    entry = score(right)['questions/probe/closed_accuracy']  # Wilson: some doubt remains even where all are right
    assert entry['low'] < entry['value'] <= entry['high']


def test_absent_classes_of_regions_and_boxes_are_named():
    one_class = local_rows(BOXES)
    kept = [t[:5] * [0, 1, 1, 1, 1] if len(t) else t for t in one_class['target']]
    one_class = one_class.assign(target=pd.Series(kept, dtype=object)); one_class.attrs = local_rows(BOXES).attrs
    assert score(one_class)['boxes/probe/map']['left_out'] == ['foreign object']


def answer(**more): return dict(target=[0, 1], scores=[2, .5]) | more
def region(**more): return dict(target=[1, 20, 100], scores=[10, 30, 2.5]) | more
def box(**more): return dict(target=[0, 1, 1, 5, 5], scores=[1, .5, 0, 0, 9, 9]) | more


@pytest.mark.parametrize('task, row, message', [
    (QUESTIONS, answer(target=[3, 1]), 'row 1: expected an answer between −1 and 2'),
    (QUESTIONS, answer(target=[-2, 1]), 'expected an answer'), (QUESTIONS, answer(target=[0, 2]), 'closed as 0 or 1'),
    (QUESTIONS, answer(scores=[1.5, .5]), 'a chosen answer between 0 and 2'), (QUESTIONS, answer(scores=[-1, .5]), 'a chosen answer'),
    (QUESTIONS, answer(scores=[1, 1.1]), 'and its probability'), (QUESTIONS, answer(scores=[1]), 'scores must hold 2 numbers'),
    (QUESTIONS, answer(scores=[1, np.nan]), 'row 1: a score is NaN or infinite'),
    (REGIONS, region(target=[2, 20, 100]), 'row 1: expected a class between 0 and 1'),
    (REGIONS, region(target=[1, 101, 100]), 'true and predicted pixels'), (REGIONS, region(scores=[21, 30, 0]), 'pixels in common'),
    (REGIONS, region(scores=[10, 9, 0]), 'pixels in common'), (REGIONS, region(scores=[10, 101, 0]), 'pixels in common'),
    (REGIONS, region(scores=[1.5, 30, 0]), 'whole numbers'), (REGIONS, region(scores=[10, 30, -1]), 'HD95 ≥ 0'),
    (REGIONS, region(target=[0, 0, 100], scores=[0, 0, 3]), '0 where both masks are empty'),
    (REGIONS, region(target=[0, 90, 100], scores=[10, 90, 3]), 'pixels in common'),
    (REGIONS, region(scores=[10, 30, np.inf]), 'a score is NaN or infinite'), (REGIONS, region(target=[1, 20]), 'target must hold 3'),
    (BOXES, box(target=[0, 1, 1, 5]), 'row 1: target must hold 5 numbers per true box'),
    (BOXES, box(scores=[1, .5, 0, 0, 9]), 'scores must hold 6 numbers per predicted box'),
    (BOXES, box(target=[2, 1, 1, 5, 5]), 'expected true boxes of a class between 0 and 1'), (BOXES, box(target=[0, 5, 1, 5, 5]), 'x0 < x1'),
    (BOXES, box(target=[0, 1, 1, 5, 10001]), 'y1 ≤ 10,000'), (BOXES, box(scores=[.5, .5, 0, 0, 9, 9]), 'expected predicted boxes'),
    (BOXES, box(scores=[0, .5, 9, 0, 1, 9]), 'expected predicted boxes'), (BOXES, box(scores=[0, .5, 0, 0, .5, 9]), 'whole'),
    (BOXES, box(scores=[0, np.nan, 0, 0, 9, 9]), 'a predicted box holds NaN'), (BOXES, box(scores=[0, .5, 0, 0, 9, 9] * 101), 'more than 100'),
])
def test_impossible_answers_regions_and_boxes_are_refused(task, row, message):
    with pytest.raises(DataError, match=message): prediction_rows(task, ['q'], [row['target']], [row['scores']], protocol='t')


def test_possible_ones_pass():
    for task, row in ((QUESTIONS, answer()), (QUESTIONS, answer(target=[-1, 0])), (REGIONS, region()),
                      (REGIONS, region(target=[0, 0, 100], scores=[0, 0, 0])), (BOXES, box()), (BOXES, box(target=[], scores=[])),
                      (BOXES, box(scores=[])), (BOXES, box(scores=[0, .5, 3, 3, 3, 3]))):
        assert len(prediction_rows(task, ['q'], [row['target']], [row['scores']], protocol='t')) == 1


def test_a_task_names_a_metric_of_its_kind():
    assert Task('a', 'segmentation', ('x',), metric='iou').metric == 'iou'
    for kind, metric in (('segmentation', 'auroc'), ('binary', 'no such')):
        with pytest.raises(ValueError, match='is no metric of a'): Task('a', kind, ('x', 'y'), metric=metric)


# ---- a study's files

def by_key(frame): return frame.sort_values(['task', 'run', 'protocol', 'prompt_set', 'draw', 'id'], ignore_index=True)


def same(a, b):
    pd.testing.assert_frame_equal(by_key(a), by_key(b), check_dtype=False)
    assert a.attrs == b.attrs


def test_gathering_merges_runs_into_a_file_per_task_and_can_be_repeated(tmp_path):
    for i in range(3): write_predictions(tmp_path/f'run{i}.parquet', everything(f'run{i}'))
    write_predictions(tmp_path/'older'/'boxes.parquet', local_rows(BOXES, 'run0'))
    before = read_predictions(tmp_path)
    assert [o.name for o in gather_predictions(tmp_path)] == [f'{o}.parquet' for o in ('boxes', 'findings', 'opacity', 'organs', 'pairs')]
    assert not list(tmp_path.glob('run*')) and not list((tmp_path/'older').iterdir())
    same(read_predictions(tmp_path), before)
    again = {o.name: o.read_bytes() for o in tmp_path.glob('*.parquet')}
    gather_predictions(tmp_path)
    assert {o.name: o.read_bytes() for o in tmp_path.glob('*.parquet')} == again
    assert set(read_predictions(tmp_path/'findings.parquet')['run']) == {'run0', 'run1', 'run2'}


def test_a_run_made_again_replaces_its_rows(tmp_path):
    for run in ('r1', 'r2'): write_predictions(tmp_path/f'{run}.parquet', rows(LABELS, run))
    gather_predictions(tmp_path)
    newer = concat_predictions([rows(LABELS, 'r2', gain=3.), rows(LABELS, 'r3')])
    write_predictions(tmp_path/'r2.parquet', newer)
    gather_predictions(tmp_path)
    same(read_predictions(tmp_path), concat_predictions([rows(LABELS, 'r1'), newer]))


def test_files_stay_small_and_come_back_whole(tmp_path):
    wide = Task('wide', 'multilabel', tuple('abcdefghijklmn'))
    frame = concat_predictions([rows(wide, f'run{i}', 'probe', n=2000, draw=d) for i in range(8) for d in range(5)])
    files = write_study_predictions(tmp_path, frame)
    assert len(files) > 1 and all(o.stat().st_size <= LARGEST for o in files)
    assert [set(read_predictions(o)['draw']) for o in files] == [{0, 1}, {2}, {3, 4}]
    same(read_predictions(tmp_path), frame)
    less = frame[frame['draw'] == 0]; less.attrs = frame.attrs
    assert [o.name for o in write_study_predictions(tmp_path, less)] == ['wide.parquet']
    assert [o.name for o in tmp_path.rglob('*.parquet')] == ['wide.parquet']
    one = rows(wide, n=50)
    assert len(write_study_predictions(tmp_path/'tiny', one, largest=3500)) > 1  # one model, cut between samples
    same(read_predictions(tmp_path/'tiny'), one)


def test_names_that_begin_alike_are_kept_apart(tmp_path):
    longer = Task('organs.1', 'multiclass', ('liver', 'lung', 'spleen'))
    write_study_predictions(tmp_path, concat_predictions([rows(longer), rows(LABELS)]))
    write_study_predictions(tmp_path, rows(MULTI))
    assert {o.name for o in tmp_path.iterdir()} == {'organs.parquet', 'organs.1.parquet', 'findings.parquet'}


def test_an_empty_folder_and_doubled_rows_are_refused(tmp_path):
    for f in (read_predictions, gather_predictions):
        with pytest.raises(DataError, match='no predictions'): f(tmp_path)
    for name in 'ab': write_predictions(tmp_path/f'{name}.parquet', rows(MULTI))
    for f in (read_predictions, gather_predictions):
        with pytest.raises(DataError, match='a second row for the same sample'): f(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


# ---- what is refused when two tables are held against each other

def test_tables_of_two_tasks_or_with_missing_or_doubled_rows_are_not_compared():
    a, b = rows(LABELS, 'a'), rows(LABELS, 'b')
    other = prediction_rows(Task('others', 'multilabel', ('nodule', 'effusion', 'edema')), b['id'], stacked(b['target']),
                            stacked(b['scores']), protocol='zeroshot', groups=b['group'])
    twice = pd.concat([b, b[3:4]], ignore_index=True); twice.attrs = b.attrs
    nan = setting('scores', 7, np.array([1, np.nan, 0], np.float32))(b)
    for f in (compare, lambda *o: mean_over_runs(o), lambda one, two: mean_over_runs([one], minus=[two])):
        with pytest.raises(DataError, match="task 'findings' is held against 'others'"): f(a, other)
        with pytest.raises(DataError, match="1 samples are in only one of two tables"): f(a, b[:-1])
        with pytest.raises(DataError, match="row 121: a second row for the same sample .*'findings-0003'"): f(a, twice)
        with pytest.raises(ValueError, match='NaN or infinite, first in row 8'): f(a, nan)
    with pytest.raises(DataError, match='a second row'): measure(twice)
    with pytest.raises(DataError, match='row 8: a score is NaN'): score(nan)


def test_draws_average_with_both_spreads_and_must_hold_the_same_samples(capfd):
    frames = [rows(MULTI, protocol='fewshot', draw=d, gain=1 + .3 * d) for d in range(5)]
    entry = score(concat_predictions(frames))['organs/fewshot/macro_auroc']
    assert entry['draws'] == 5 and entry['sampling_sd'] > 0 and entry['draw_sd'] > 0
    assert entry['value'] == pytest.approx(np.mean([measure(o).value for o in frames]))
    few = score(concat_predictions([local_rows(BOXES, draw=d) for d in range(3)]), resamples=200)
    assert few['boxes/probe/map']['draws'] == 3 and few['boxes/probe/map']['draw_sd'] == pytest.approx(0, abs=1e-9)
    with pytest.raises(DataError, match='1 samples are in only one'): score(concat_predictions([frames[0], frames[1][:-1]]))
    assert capfd.readouterr() == ('', '')


@pytest.mark.slow
def test_thousand_images_of_boxes_or_masks_are_scored_in_seconds():
    for task in (BOXES, REGIONS):
        start = time.perf_counter()
        measure(local_rows(task, n=1000))
        assert time.perf_counter() - start < 20, 'matching and counting should not be repeated per resample'
