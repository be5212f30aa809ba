"""A run as users meet it: killed and resumed, twice the same, refused where it cannot be right, and started by papermill."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medcl_study.core import DataError, Locked, code_hash, lock, read_json
from medcl_study.encoders.masked import visible_area
from medcl_study.experiment import finished, integrity_check, run
from medcl_study.pretraining import make_encoder, pretrain
from medcl_study.scoring import evaluation_set
from medcl_study.settings import Run, make_run, overrides, pair_part, run_id, work_folder
from medcl_study.studies import STUDIES, study_runs, unavailable

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(image_tower='vit_tiny_p8', text_tower='bert_tiny', text_init='random', image_init='random', dim=16, max_tokens=48,
            train_pairs=160, valid_pairs=32, test_pairs=300, epochs=3, batch_size=32, stream=False)
SCRIPT = 'import json, sys; from medcl_study.experiment import run; from medcl_study.settings import make_run; run(make_run(json.loads(sys.argv[1])), reports=sys.argv[2])'


def start(folder, settings=TINY):
    "Start a run in a process of its own."
    env = os.environ | {'MEDCL_WORK': str(folder/'work'), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', SCRIPT, json.dumps(settings), str(folder/'reports')], env=env)


def same(record):
    "What two records of one run must share."
    return {k: v for k, v in record.items() if k not in ('seconds', 'peak_mb')} | {'trained': record['trained'] | {'seconds': 0}}


def only_record(folder):
    found = list((folder/'reports'/'records').glob('*.json'))
    assert len(found) == 1
    return read_json(found[0])


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed')
    assert start(folder).wait(300) == 0
    return only_record(folder)


PHASES = { # what is on disk while a phase is under way
    'cache': lambda work: any(not (o/'meta.json').exists() for o in (work/'packed').glob('[0-9a-f]*') if o.is_dir()),
    'training': lambda work: any((work/'encoders').glob('*/checkpoint.pt')) and not any((work/'encoders').glob('*/trained.json')),
    'evaluation': lambda work: any((work/'runs').glob('*/features/*/*.safetensors')),
}


@pytest.mark.parametrize('phase', PHASES)
def test_killed_run_resumes_to_the_same_record(phase, tmp_path, undisturbed):
    process, begun = start(tmp_path), time.monotonic()
    while process.poll() is None and not PHASES[phase](tmp_path/'work') and time.monotonic() - begun < 200: time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f'the run ended before its {phase} could be interrupted'
    assert not list((tmp_path/'reports').rglob('*.json')), 'a killed run must leave no record'
    assert start(tmp_path).wait(300) == 0
    assert same(only_record(tmp_path)) == same(undisturbed)


def test_second_writer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDCL_WORK', str(tmp_path/'work'))
    settings = make_run(TINY)
    with lock(work_folder()/'runs'/f'{run_id(settings)}-{code_hash()}'):
        with pytest.raises(Locked, match='is being written by process'): run(settings, reports=tmp_path/'reports')


def test_record_of_other_code_does_not_count(tmp_path, undisturbed):
    name = undisturbed['id']
    for folder, text in (('records', json.dumps(undisturbed | {'code': 'another'})), ('predictions', '')):
        path = tmp_path/folder/f"{name}.{'json' if text else 'parquet'}"
        path.parent.mkdir()
        path.write_text(text)
    assert finished(tmp_path, name) is None
    (tmp_path/'records'/f'{name}.json').write_text(json.dumps(undisturbed))
    assert finished(tmp_path, name) == undisturbed


@pytest.mark.parametrize('study', STUDIES)
def test_every_study_lists_distinct_runs_that_survive_json(study):
    runs = study_runs(study)
    assert len(set(runs)) == len(runs)
    for one in runs: assert make_run(json.loads(json.dumps(overrides(one)))) == one


ASKED = {'ablations/transfer': {'image_init', 'text_init'}} # what a study asks about, besides methods


def test_rows_of_a_study_differ_only_in_what_it_asks():
    "Methods and seeds; in ablations also each row's own learning rate, which baselines do not have."
    for study in STUDIES:
        free = {'method', 'seed'} | ASKED.get(study, set()) | ({'lr'} if study.startswith('ablations/') else set())
        rows = [{k: v for k, v in vars(o).items() if k not in free} for o in study_runs(study)]
        assert all(o == rows[0] for o in rows), study


def test_a_method_has_one_learning_rate_in_a_study():
    for study in set(STUDIES) - {'ablations/tuning'}:
        rates = {}
        for o in study_runs(study): rates.setdefault(o.method, set()).add(o.lr)
        assert all(len(o) == 1 for o in rates.values()), study


def test_papermill_names_an_unknown_override(tmp_path):
    out = papermill(tmp_path, {'overrides': {'metod': 'flip'}})
    assert out.returncode and "unknown override 'metod'; did you mean 'method'?" in out.stderr


def test_papermill_names_an_unknown_parameter(tmp_path):
    out = papermill(tmp_path, {'method': 'flip'})
    assert out.returncode and "unknown parameters ['method']" in out.stderr


def papermill(folder, parameters):
    return subprocess.run([sys.executable, '-m', 'papermill', 'nbs/experiments/run.ipynb', str(folder/'out.ipynb'), '-k', 'python3',
                           '--no-progress-bar', '-y', json.dumps(parameters)], cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize('given, message', [
    (dict(tasks=['phantom/zero']), 'set/protocol'), (dict(method='filipp'), 'no method'), (dict(epochs=1.5), 'epochs must be int'),
    (dict(stream=1), 'stream must be bool'), (dict(seeds=1), "did you mean 'seed'")])
def test_wrong_settings_are_named(given, message):
    with pytest.raises((ValueError, TypeError), match=message): make_run(given)


def test_id_ignores_what_changes_no_result():
    assert run_id(Run(workers=3)) == run_id(Run())
    assert len({run_id(o) for o in (Run(), Run(seed=1), Run(method='flip'), Run(lr=1e-4))}) == 4


@pytest.mark.parametrize('given, remembered', [({}, {'images': True, 'tokens': True}), ({'augmentation': 'crop'}, {'images': False, 'tokens': True}),
                                               ({'stream': True}, {})])
def test_only_a_finite_set_of_pairs_is_remembered_and_augmented_images_are_not(given, remembered, tmp_path, monkeypatch):
    monkeypatch.setenv('MEDCL_WORK', str(tmp_path))
    monkeypatch.setattr('medcl_study.pretraining.train', lambda *args, **more: [])
    settings, found = make_run(TINY | {'method': 'lock_image'} | given), {}
    encoder = make_encoder(settings)
    monkeypatch.setattr(encoder, 'remember', lambda **named: found.update({k: v is not None for k, v in named.items()}))
    pretrain(settings, encoder, tmp_path)
    assert found == remembered


def test_integrity_is_held_against_the_truth(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDCL_WORK', str(tmp_path))
    settings = make_run(TINY | {'method': 'maco', 'test_pairs': 60})
    encoder = make_encoder(settings).eval()
    untrained = integrity_check(settings, encoder)
    assert untrained['value'] == 0 and not untrained['works'] and untrained['sd_within'] == 0
    masks = pair_part(settings, 'test').corpus.masks(slice(None)).any(1)

    class Truth(torch.nn.Module):
        def forward(self, step): return {'integrity': visible_area(masks, step.kept, encoder.image.patch_grid).nan_to_num()}
    encoder.heads['integrity'] = Truth()
    found = integrity_check(settings, encoder)
    assert found['value'] == pytest.approx(1) and found['works'] and found['n'] == masks.any((1, 2)).sum()
    assert integrity_check(make_run(TINY), make_encoder(make_run(TINY))) == {}


@pytest.fixture(scope='module')
def twins(tmp_path_factory):
    from medcl_study.data.twins import make_twins
    folder = tmp_path_factory.mktemp('twins')
    make_twins(folder, ['bach', 'chexpert', 'roco', 'pmc_oa', 'deepeyenet'], n=64)
    return folder


def test_published_sets_are_scored_and_mixtures_trained_on(twins, tmp_path, monkeypatch):
    monkeypatch.setenv('MEDCL_DATA', str(twins))
    monkeypatch.setenv('MEDCL_WORK', str(tmp_path/'work'))
    tasks = ['bach/zeroshot', 'bach/probe', 'deepeyenet/retrieval', 'pairs/retrieval']
    settings = make_run(TINY | {'data': '2*roco+pmc_oa:20', 'tasks': tasks, 'epochs': 1, 'channels': 3, 'batch_size': 16})
    record = run(settings, reports=tmp_path/'reports')
    assert record['source'] == 'twin', 'never a silent substitution'
    scored = {o.partition('/')[0] for o in record['tasks']}
    assert scored == {'bach', 'deepeyenet', 'pmc_oa+2*roco_retrieval'}
    assert run_id(settings) != run_id(make_run(vars(settings) | {'data': 'roco+pmc_oa:20'}))


def test_a_set_that_is_not_there_says_where_it_is_to_be_had(twins, tmp_path, monkeypatch):
    monkeypatch.setenv('MEDCL_DATA', str(twins))
    with pytest.raises(DataError, match='pcam'): run(make_run(TINY | {'tasks': ['pcam/probe']}), reports=tmp_path)
    monkeypatch.delenv('MEDCL_DATA')
    assert 'MEDCL_DATA' in unavailable(make_run(TINY | {'tasks': ['bach/probe']}))


def test_unlabelled_rows_are_not_scored(twins, tmp_path, monkeypatch):
    monkeypatch.setenv('MEDCL_DATA', str(twins))
    monkeypatch.setenv('MEDCL_WORK', str(tmp_path))
    part = evaluation_set('chexpert/probe', make_run(TINY)).part('test')
    assert len(part.corpus) == len(part.images) and not part.corpus.frame.labels.isna().any()


def test_training_from_shards_is_training_from_the_corpus(twins, tmp_path, monkeypatch):
    from medcl_study.data.shards import pack_shards
    monkeypatch.setenv('MEDCL_DATA', str(twins))
    monkeypatch.setenv('MEDCL_WORK', str(tmp_path))
    pack_shards('roco')
    settings = make_run(TINY | {'data': 'shards/roco', 'tasks': ['bach/zeroshot'], 'epochs': 1, 'channels': 3, 'batch_size': 8})
    record = run(settings, reports=tmp_path/'reports')
    assert record['source'] == 'twin' and record['history']
    with pytest.raises(ValueError, match='not scored'): pair_part(settings, 'test')
    with pytest.raises(DataError): run_id(make_run(vars(settings) | {'data': 'shards/nothing'}))
