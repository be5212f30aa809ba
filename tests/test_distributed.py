"""Two processes on half batches against one on the full batch; torchrun is started once for all checks."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rows
from medcl_study.losses.contrast import contrastive
from medcl_study.methods import METHODS
from medcl_study.trainer import average_gradients, train
from toy import CONFIG, Encoder, encoder_with_idle_parts, gradients, loaders, pairs

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "Run `toy.two_process_run` under torchrun and return what each rank found."
    folder = tmp_path_factory.mktemp('ranks')
    script = Path(__file__).with_name('toy.py')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', script, folder]
    env = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder/f'rank{r}.pt', weights_only=True) for r in range(2)]


def test_two_processes_ran(ranks): assert [o['world'] for o in ranks] == [2, 2]


def test_losses_average_to_that_of_the_full_batch(ranks):
    full = contrastive(Encoder()(pairs(32))).item()
    assert sum(o['loss'].item() for o in ranks) / 2 == pytest.approx(full, rel=1e-6)


@pytest.mark.parametrize('name', ['plain', 'accumulated'])
def test_gradients_equal_one_process(ranks, name):
    model = encoder_with_idle_parts()
    full = gradients(model, model, pairs(32))
    for found in (o[name] for o in ranks):
        assert found.keys() == full.keys()
        for k, expected in full.items():
            if expected is None: assert found[k] is None, f'{k} is frozen or unused and must have no gradient'
            else: assert (found[k] - expected).norm() <= 1e-5 * expected.norm(), k
        parts = [torch.cat([g.flatten() for g in o.values() if g is not None]) for o in (found, full)]
        assert (parts[0] - parts[1]).norm() <= 1e-5 * parts[1].norm()
    assert full['log_scale'].abs() > 0 and full['words.weight'] is None and full['idle.weight'] is None


def test_training_equals_one_process(ranks):
    "Same weights up to rounding, from the weights of rank 0, although rank 1 was built from another seed."
    model = Encoder(seed=0)
    history = train(model, contrastive, loaders(), CONFIG)
    for k, v in model.state_dict().items():
        assert torch.equal(ranks[0]['trained'][k], ranks[1]['trained'][k])
        torch.testing.assert_close(ranks[0]['trained'][k], v, rtol=1e-3, atol=1e-4)
    assert ranks[0]['history'] == ranks[1]['history']
    for found, expected in zip(ranks[0]['history'], history, strict=True):
        expected = {k: v for k, v in expected.items() if v is not None} # one row in three has a validation loss
        found = {k: v for k, v in found.items() if v is not None}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_an_interrupted_run_resumes_exactly(ranks):
    assert len({h for o in ranks for h in o['hashes']}) == 1


def test_fast_paths_equal_one_process(two_processes):
    "Whose scores, unlike those of global vectors, keep their fast path across ranks."
    names = 'filip', 'gloria', 'mlip'
    def half(rank): return {k: v.chunk(2)[rank] for k, v in rows.batch().items()}
    found = two_processes(lambda rank: [rows.gradients(o, half(rank), fast=True, reduce=average_gradients) for o in names])
    for name, *parts in zip(names, *found):
        loss, full = rows.gradients(name, rows.batch())
        assert sum(o.item() for o, _ in parts) / 2 == pytest.approx(loss.item(), rel=1e-5)
        for _, grads in parts: assert_same_gradients(grads, full)


def assert_same_gradients(found, full):
    assert {k for k, g in found.items() if g is None} == {k for k, g in full.items() if g is None}
    a, b = (torch.cat([g.flatten() for g in o.values() if g is not None]) for o in (found, full))
    assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize('name', METHODS)
def test_every_method_equals_one_process(ranks, name):
    "Also with texts of another length on each rank, further views and extra heads."
    if name == 'lovt_released': pytest.skip('the defect is that padding, which depends on the cut, is counted')
    loss, full = rows.gradients(name, rows.batch())
    parts = [o['rows'][name] for o in ranks]
    assert sum(o.item() for o, _ in parts) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for _, found in parts: assert_same_gradients(found, full)
