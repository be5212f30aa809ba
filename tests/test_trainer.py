"""The training loop: exactness of accumulation, decay, precision, the record, and of resuming after SIGKILL."""
import dataclasses
import json
import math
import multiprocessing
import signal
import warnings

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Callback
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medcl_study.core import DataError, OutputError, seed_everything
from medcl_study.embeddings import Embeddings
from medcl_study.losses.contrast import contrastive
from medcl_study.trainer import Autocast, MicroBatches, TrainConfig, decay_groups, micro_batches, train, warmup_cosine
from toy import CONFIG, Encoder, gradients, killed_run, loaders, pairs, weights_hash

pytestmark = pytest.mark.usefixtures('one_thread') # sums are split differently between two threads; bits are compared here


def vector(grads): return torch.cat([g.flatten() for g in grads.values()])


# Accumulation

@pytest.mark.parametrize('parts', [2, 3, 8, 32])
def test_micro_batches_keep_all_negatives(parts):
    model, batch = Encoder(), pairs(32)
    full = gradients(model, model, batch)
    found = gradients(model, MicroBatches(model, parts), batch)
    assert (vector(found) - vector(full)).norm() <= 1e-5 * vector(full).norm()
    assert found['log_scale'].item() == pytest.approx(full['log_scale'].item(), rel=1e-4)


def test_plain_accumulation_does_not():
    model, batch = Encoder(), pairs(32)
    full = vector(gradients(model, model, batch))
    plain = sum(vector(gradients(model, model, o)) for o in micro_batches(batch, 4)) / 4
    assert (plain - full).norm() > .05 * full.norm()


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_second_pass_repeats_masks_dropout_and_precision(dtype):
    model, batch = Encoder(dropout=.3, mask_ratio=.5), pairs(32)
    inner = Autocast(model, dtype) if dtype else model
    seed_everything(1)
    expected = gradients(model, lambda b: Embeddings.cat([inner(o) for o in micro_batches(b, 4)]), batch)
    seed_everything(1)
    found = gradients(model, MicroBatches(inner, 4), batch)
    assert torch.equal(vector(found), vector(expected))


def test_running_statistics_move_once():
    batch, moved = pairs(32), []
    for recompute in (False, True):
        model = Encoder(norm=nn.BatchNorm1d)
        def kept(batch): return Embeddings.cat([model(o) for o in micro_batches(batch, 4)])
        gradients(model, MicroBatches(model, 4) if recompute else kept, batch)
        moved.append({k: v for k, v in model.state_dict().items() if 'running' in k or 'tracked' in k})
    assert moved[0]['image_norm.num_batches_tracked'] == 4
    for k in moved[0]: torch.testing.assert_close(moved[1][k], moved[0][k], rtol=0, atol=0)


def test_micro_batches_cover_the_batch():
    parts = micro_batches(pairs(10), 4)
    assert [len(o['images']) for o in parts] == [3, 3, 2, 2]
    assert torch.equal(torch.cat([o['tokens'] for o in parts]), pairs(10)['tokens'])


# Optimizer and schedule

@settings(max_examples=50, deadline=None)
@given(total=st.integers(1, 300), share=st.floats(0, .99))
def test_schedule_rises_then_falls(total, share):
    warmup = round(share * total)
    factors = [warmup_cosine(i, total, warmup) for i in range(total)]
    assert all(0 < o <= 1 for o in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_decay_is_decoupled_scheduled_and_spares_vectors():
    "Without a gradient a matrix shrinks by the product of (1 − lr·decay), and nothing else moves."
    model, config = Encoder(), dataclasses.replace(CONFIG, weight_decay=.5, warmup=.25)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, lambda e: 0 * contrastive(e), loaders(), config)
    total = 6 * config.epochs
    shrunk = math.prod(1 - config.lr * warmup_cosine(i, total, total // 4) * .5 for i in range(total))
    assert shrunk < .95
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, before[k] * (shrunk if v.ndim > 1 else 1.), msg=k)


def test_groups_hold_each_trainable_parameter_once():
    model = Encoder(norm=nn.BatchNorm1d)
    model.words.requires_grad_(False)
    model.plane = nn.LayerNorm((3, 4)) # a norm whose weight is a matrix still does not decay
    decayed, exempt = (g['params'] for g in decay_groups(model, .1))
    assert sorted(map(id, decayed + exempt)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(p is not model.plane.weight for p in decayed) and any(p is model.plane.weight for p in exempt)
    assert all(p.ndim > 1 for p in decayed)


def test_frozen_parts_stay_bit_for_bit():
    model = Encoder()
    model.words.requires_grad_(False)
    before = model.words.weight.clone()
    train(model, contrastive, loaders(), CONFIG)
    assert torch.equal(model.words.weight, before) and model.words.weight.grad is None


class GradientNorms(Callback):
    order = 90
    def before_fit(self): self.norms = []
    def before_step(self):
        self.norms.append(nn.utils.get_total_norm([p.grad for p in self.learn.model.parameters()]).item())


def test_gradients_are_clipped():
    norms = {}
    for clip in (None, .05):
        watch = GradientNorms()
        config = dataclasses.replace(CONFIG, clip_norm=clip, epochs=1)
        train(Encoder(), contrastive, loaders(), config, callbacks=[watch])
        norms[clip] = watch.norms
    assert max(norms[.05]) <= .05 * 1.001 and min(norms[None]) > .05


def test_temperature_is_clamped():
    model = Encoder()
    with torch.no_grad(): model.log_scale.fill_(math.log(100))
    model.log_scale.register_hook(lambda grad: -torch.ones_like(grad)) # always asks for more
    train(model, contrastive, loaders(), dataclasses.replace(CONFIG, lr=.5, epochs=1))
    assert model.log_scale.exp().item() == pytest.approx(100)


# Precision

HALF = [dict(precision='bf16'), dict(precision='fp16'), dict(precision='bf16', accumulation=4)]


@pytest.mark.parametrize('change', HALF)
def test_half_precision_learns_alike(change):
    config = dataclasses.replace(CONFIG, clip_norm=None, epochs=6)
    exact = train(Encoder(), contrastive, loaders(), config)
    rough = train(Encoder(), contrastive, loaders(), dataclasses.replace(config, **change))
    assert exact[-1]['valid_loss'] < exact[2]['valid_loss'] - .2
    assert rough[-1]['valid_loss'] == pytest.approx(exact[-1]['valid_loss'], abs=.1)
    assert rough != exact and not torch.is_autocast_enabled('cpu')


def test_overflow_leaves_a_step_out():
    class Scales(Callback):
        order = 90
        def before_fit(self): self.weights = []
        def after_step(self): self.weights.append(weights_hash(self.learn.checkpoint.weights))
    model, watch, config = Encoder(), Scales(), dataclasses.replace(CONFIG, precision='fp16', epochs=1)
    calls = iter(range(100))
    def loss(e): return contrastive(e) * (1e38 if next(calls) == 2 else 1.)
    train(model, loss, DataLoaders(loaders().train), config, callbacks=[watch])
    unchanged = [a == b for a, b in zip(watch.weights, watch.weights[1:])]
    assert unchanged == [False, True, False, False, False]


# Determinism and resuming

def test_same_run_twice_is_the_same_and_another_seed_is_not():
    runs = []
    for seed in (0, 0, 1):
        model = Encoder(dropout=.2, mask_ratio=.5)
        runs.append((train(model, contrastive, loaders(), dataclasses.replace(CONFIG, seed=seed)), weights_hash(model)))
    assert runs[0] == runs[1] != runs[2]


KILLS = [(3, 'backward'), (6, 'batch'), (6, 'validation'), (10, 'saving'), (11, 'batch'), (18, 'saving'),
         (24, 'validation')] # six steps are one epoch


def run_in_process(context, *args):
    process = context.Process(target=killed_run, args=args)
    process.start()
    process.join()
    return process.exitcode


def test_killed_runs_end_like_an_undisturbed_one(tmp_path):
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch._dynamo', 'medcl_study.trainer', 'medcl_study.methods']) # imported once
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    whole.mkdir(), killed.mkdir()
    assert run_in_process(context, whole) == 0
    for step, place in KILLS:
        assert run_in_process(context, killed, step, place) == -signal.SIGKILL, (step, place)
        if (killed/'history.jsonl').exists(): [json.loads(o) for o in (killed/'history.jsonl').read_text().splitlines()]
    assert run_in_process(context, killed) == 0
    expected, found = (json.loads((o/'result.json').read_text()) for o in (whole, killed))
    assert found == expected
    assert (killed/'history.jsonl').read_text() == (whole/'history.jsonl').read_text()
    assert run_in_process(context, killed) == 0 # a finished run is loaded, not trained again
    assert json.loads((killed/'result.json').read_text()) == expected


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1)
    train(Encoder(), contrastive, loaders(), config, folder=tmp_path)
    with pytest.raises(DataError, match=r'checkpoint.pt: .*another run: lr was 0.01 and is 0.02.*Use another folder'):
        train(Encoder(), contrastive, loaders(), dataclasses.replace(config, lr=.02), folder=tmp_path)
    with pytest.raises(DataError, match='parameters was'):
        train(Encoder(width=8), contrastive, loaders(), config, folder=tmp_path)
    train(Encoder(), contrastive, loaders(), dataclasses.replace(config, save_every=5), folder=tmp_path)
    (tmp_path/'checkpoint.pt').write_bytes(b'half a file')
    with pytest.raises(DataError, match='not a readable checkpoint'):
        train(Encoder(), contrastive, loaders(), config, folder=tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path/'file').write_text('not a folder')
    with pytest.raises(OutputError, match='file/'):
        train(Encoder(), contrastive, loaders(), dataclasses.replace(CONFIG, epochs=1), folder=tmp_path/'file'/'run')


# The record

def test_history_rows():
    history = train(Encoder(), contrastive, loaders(), CONFIG)
    assert [o['step'] for o in history] == list(range(2, 25, 2))
    assert [o['step'] for o in history if o['valid_loss'] is not None] == [6, 12, 18, 24]
    names = 'step epoch lr loss valid_loss alignment uniformity gap rank accuracy scale'
    assert set(history[0]) == set(names.split())
    assert all(0 <= o['alignment'] <= 4 and o['uniformity'] <= 0 and 0 <= o['accuracy'] <= 1 for o in history)


def test_validation_loss_is_the_mean_over_validation_rows():
    model = Encoder()
    history = train(model, contrastive, loaders(), dataclasses.replace(CONFIG, epochs=1))
    with torch.no_grad(): values = [contrastive(model.eval()(o)).item() for o in loaders().valid]
    assert history[-1]['valid_loss'] == pytest.approx(sum(values) / len(values), rel=1e-6)


def test_validation_is_optional():
    history = train(Encoder(), contrastive, DataLoaders(loaders().train), CONFIG)
    assert len(history) == 12 and all(o['valid_loss'] is None for o in history)


def test_equal_texts_count_as_found():
    from medcl_study.trainer import diagnostics
    image = torch.eye(4)
    text = torch.eye(4)[[1, 0, 2, 3]] # the first two texts are swapped
    e = Embeddings(image=image, text=text, scale=torch.tensor(1.))
    assert diagnostics(e)['accuracy'] == .5
    assert diagnostics(dataclasses.replace(e, text_id=torch.tensor([7, 7, 1, 2])))['accuracy'] == 1.


class Blind(Encoder):
    "Gives every pair the same embedding."
    def forward(self, batch): return super().forward(batch).map(lambda o: 0 * o + torch.eye(16)[0])


def test_a_run_that_does_not_learn_is_reported_once():
    with pytest.warns(UserWarning, match=r'still ln 32 = 3.466 .* not learning') as caught:
        train(Blind(), contrastive, loaders(), CONFIG)
    assert sum('not learning' in str(o.message) for o in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        train(Encoder(), contrastive, loaders(), CONFIG)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    calls = iter(range(100))
    def loss(e): return contrastive(e) * (math.inf if next(calls) == 3 else 1.)
    with pytest.raises(FloatingPointError, match='the loss is inf at step 4 of epoch 0'):
        train(Encoder(), loss, loaders(), dataclasses.replace(CONFIG, log_every=5), folder=tmp_path) # found on saving
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 2


def test_batch_size_must_agree():
    with pytest.raises(ValueError, match='gives 32 pairs per step, but TrainConfig.batch_size is 64'):
        train(Encoder(), contrastive, loaders(), TrainConfig(batch_size=64))
    with pytest.raises(ValueError, match='no full batch of 32 pairs'):
        train(Encoder(), contrastive, loaders(n=16), CONFIG)


def test_progress_bar_only_on_request(capsys):
    train(Encoder(), contrastive, loaders(), dataclasses.replace(CONFIG, epochs=1))
    assert capsys.readouterr().out == ''
    train(Encoder(), contrastive, loaders(), dataclasses.replace(CONFIG, epochs=1), progress=True)
    assert 'loss' in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('change', [{}, *HALF])
def test_gpu_trains_like_cpu(change):
    config = dataclasses.replace(CONFIG, clip_norm=None, epochs=6)
    on_cpu = train(Encoder(), contrastive, loaders(), config)
    on_gpu = train(Encoder().cuda(), contrastive, loaders(), dataclasses.replace(config, **change))
    assert on_gpu[-1]['valid_loss'] == pytest.approx(on_cpu[-1]['valid_loss'], abs=.1)
