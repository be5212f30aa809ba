"""Integrity and masked prediction: loops from the formulas, closed forms, heads on real towers, and two processes."""
import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from medcl_study.embeddings import Embeddings
from medcl_study.encoders.dual import DualEncoder, EncoderConfig
from medcl_study.encoders.heads import Step
from medcl_study.encoders.image import random_keep, take_patches
from medcl_study.encoders.masked import (Integrity, MaskedPrediction, cut_patches, hidden_patches, integrity_and_area,
                                         visibility, visible_area, within_images)
from medcl_study.losses.contrast import info_nce
from medcl_study.losses.masked import HALVES, integrity_contrastive, maco, masked_prediction
from medcl_study.trainer import Autocast, MicroBatches


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def unit(*shape, seed=0): return F.normalize(draw(*shape, seed=seed), dim=-1)


def batch(n=6, d=5, seed=0):
    "Noisy pairs, an integrity for each, and predictions of four hidden patches."
    image = unit(n, d, seed=seed)
    text = F.normalize(image + .4 * unit(n, d, seed=seed + 1), dim=-1)
    extras = {'integrity': draw(n, seed=seed + 2).exp(), 'predicted': draw(n, 4, 3, seed=seed + 3),
              'target': draw(n, 4, 3, seed=seed + 4)}
    return Embeddings(image=image, text=text, scale=torch.tensor(9., dtype=torch.float64), extras=extras)


def with_extras(e, **extras): return dataclasses.replace(e, extras=e.extras | extras)


# ---- the weighted contrast

def loops(e, half):
    "The four sums of MaCo, one exponential at a time."
    image, text, n = e.image.tolist(), e.text.tolist(), len(e)
    s, scale = e.extras['integrity'].tolist(), e.scale.item()
    z = [[scale * sum(a * b for a, b in zip(image[i], text[j])) for j in range(n)] for i in range(n)]
    def ce(row, i): return math.log(sum(math.exp(o) for o in row)) - row[i]
    total = 0.
    for logits in (z, [list(o) for o in zip(*z)]):
        if half != 'importance': total += sum(ce([s[i] * o for o in logits[i]], i) for i in range(n)) / n
        if half != 'temperature': total += sum(s[i] * ce(logits[i], i) for i in range(n)) / sum(s)
    return total / (4 if half == 'both' else 2)


@pytest.mark.parametrize('half', HALVES)
def test_equals_loops(half):
    assert integrity_contrastive(batch(), half=half).item() == pytest.approx(loops(batch(), half), rel=1e-10)


def test_maco_is_both_halves(): assert maco(batch()).item() == pytest.approx(loops(batch(), 'both'), rel=1e-10)


@pytest.mark.parametrize('s', [math.log(2), 1., 3.])
def test_constant_integrity_is_contrast_at_another_scale(s):
    e = with_extras(batch(), integrity=torch.full((6,), s, dtype=torch.float64))
    sharp, plain = info_nce(e.image, e.text, scale=9 * s).item(), info_nce(e.image, e.text, scale=9.).item()
    found = {half: integrity_contrastive(e, half=half).item() for half in HALVES}
    assert found == pytest.approx({'temperature': sharp, 'importance': plain, 'both': (sharp + plain) / 2}, rel=1e-10)


def test_gradient_of_the_halves():
    e = batch()
    inputs = e.image.requires_grad_(), e.text.requires_grad_(), e.extras['integrity'].requires_grad_()
    build = lambda image, text, s: dataclasses.replace(e, image=image, text=text, extras={'integrity': s})
    assert torch.autograd.gradcheck(lambda *o: integrity_contrastive(build(*o), half='temperature'), inputs)
    integrity_contrastive(e, half='importance').backward()
    assert e.extras['integrity'].grad is None and e.image.grad.norm() > 0
    fixed = e.extras['integrity'].detach()
    importance = lambda i, t: integrity_contrastive(build(i, t, fixed), half='importance')
    assert torch.autograd.gradcheck(importance, inputs[:2])


def test_integrity_learns_to_doubt():
    "A row whose own key is not the most similar on average asks for a smaller s, a row that is found for a larger one."
    e = with_extras(batch(), integrity=torch.ones(6, dtype=torch.float64))
    e = dataclasses.replace(e, text=e.text[[1, 0, 2, 3, 4, 5]])
    s = e.extras['integrity'].requires_grad_()
    integrity_contrastive(e).backward()
    assert (s.grad[:2] > 0).all() and (s.grad[2:] < 0).all()


@pytest.mark.parametrize('half', HALVES)
def test_invariances_and_negatives(half):
    e, order = batch(), torch.tensor([4, 2, 0, 1, 5, 3])
    loss = integrity_contrastive(e, half=half)
    torch.testing.assert_close(integrity_contrastive(e.rows(order), half=half), loss)
    exchanged = dataclasses.replace(e, image=e.text, text=e.image)
    torch.testing.assert_close(integrity_contrastive(exchanged, half=half), loss)
    assert integrity_contrastive(dataclasses.replace(e, text=e.text[[1, 0, 2, 3, 4, 5]]), half=half) > loss + .1
    rounded = e.map(lambda o: o.to(torch.bfloat16).float())
    assert integrity_contrastive(rounded, half=half).item() == pytest.approx(loss.item(), abs=.03)


@pytest.mark.parametrize('s', [1e-6, 1e4])
def test_extreme_integrity_stays_finite(s):
    e = batch().map(torch.Tensor.float)
    e = with_extras(e, integrity=torch.full((6,), s).requires_grad_())
    loss = integrity_contrastive(e)
    loss.backward()
    assert loss.isfinite() and e.extras['integrity'].grad.isfinite().all()


def test_missing_heads_are_named():
    e = dataclasses.replace(batch(), extras={})
    for term, head in ((integrity_contrastive, 'Integrity'), (masked_prediction, 'MaskedPrediction')):
        with pytest.raises(ValueError, match=f'which the head {head} fills; there are: none'): term(e)
    with pytest.raises(ValueError, match="half 'all'"): integrity_contrastive(batch(), half='all')


# ---- masked prediction

def test_prediction_equals_loops():
    e = batch()
    predicted, target = e.extras['predicted'].tolist(), e.extras['target'].tolist()
    errors = [(p - t) ** 2 for a, b in zip(predicted, target) for u, v in zip(a, b) for p, t in zip(u, v)]
    assert masked_prediction(e).item() == pytest.approx(sum(errors) / len(errors), rel=1e-12)


def test_prediction_gradient_and_closed_forms():
    e = batch()
    assert masked_prediction(with_extras(e, predicted=e.extras['target'])) == 0
    nothing = with_extras(e, predicted=e.extras['predicted'][:, :0].requires_grad_(), target=e.extras['target'][:, :0])
    loss = masked_prediction(nothing)
    assert loss == 0 and loss.requires_grad
    predicted, target = e.extras['predicted'].requires_grad_(), e.extras['target'].requires_grad_()
    assert torch.autograd.gradcheck(lambda o: masked_prediction(with_extras(e, predicted=o)), predicted)
    masked_prediction(e).backward()
    assert target.grad is None
    near = target.detach() + .1 * predicted.detach()
    good, bad = (masked_prediction(with_extras(e, predicted=o)) for o in (near, near[[1, 0, 2, 3, 4, 5]]))
    assert bad > good + .1


# ---- heads

CONFIG = EncoderConfig('vit_tiny_p8', 'bert_tiny', image_size=32, channels=1, dim=16, vocab_size=50)


@pytest.fixture(params=['vit_tiny_p8', 'vit_stem_p8'])
def encoder(request):
    torch.manual_seed(0)
    return DualEncoder(dataclasses.replace(CONFIG, image_tower=request.param))


def images():
    g = torch.Generator().manual_seed(3)
    return torch.randint(256, (6, 1, 1, 32, 32), dtype=torch.uint8, generator=g)


def step_of(encoder, kept, images=images()):
    patches, pooled = encoder.image(encoder.image.normalise(images[:, 0]), kept)
    image = F.normalize(encoder.image_head(pooled), dim=-1)
    e = Embeddings(image=image, text=image, scale=encoder.scale, kept=kept)
    return Step(encoder, {'images': images}, e, patches)


@pytest.mark.parametrize('p, ratio', [(16, .5), (64, .75), (9, .1), (5, 0.)])
def test_hidden_and_visible_make_the_grid(p, ratio):
    kept = random_keep(7, p, ratio=ratio)
    hidden = hidden_patches(kept, p)
    assert hidden.shape == (7, p - kept.shape[1]) and (hidden.diff(dim=1) > 0).all()
    assert torch.cat([kept, hidden], 1).sort(1).values.equal(torch.arange(p).expand(7, p))
    assert visibility(kept, 7, p).sum(1).eq(kept.shape[1]).all()


@pytest.mark.parametrize('content', [True, False])
def test_integrity_starts_at_ln_2_and_follows_its_sample(encoder, content):
    head, kept = Integrity(encoder, content=content), random_keep(6, 16, ratio=.5)
    torch.testing.assert_close(head(step_of(encoder, kept))['integrity'], torch.full((6,), math.log(2)))
    torch.nn.init.normal_(head.estimate[-1].weight)
    s, order = head(step_of(encoder, kept))['integrity'], torch.tensor([3, 1, 5, 0, 2, 4])
    assert (s > 0).all() and s.std() > 0
    permuted = head(step_of(encoder, kept[order], images()[order]))['integrity']
    torch.testing.assert_close(permuted, s[order], rtol=1e-4, atol=1e-5)
    same = head(step_of(encoder, kept, images().flip(0)))['integrity']
    assert same.equal(s) is not content # positions alone do not see the images


def test_integrity_does_not_reach_the_tower(encoder):
    head = Integrity(encoder)
    torch.nn.init.normal_(head.estimate[-1].weight)
    head(step_of(encoder, random_keep(6, 16, ratio=.5)))['integrity'].sum().backward()
    assert all(o.grad is None for o in encoder.image.parameters())
    assert all(o.grad.norm() > 0 for o in head.parameters())


def test_integrity_ignores_what_is_hidden(encoder):
    head, kept = Integrity(encoder), random_keep(6, 16, ratio=.5)
    torch.nn.init.normal_(head.estimate[-1].weight)
    seen = visibility(kept, 6, 16).view(6, 1, 1, 4, 4).repeat_interleave(8, 3).repeat_interleave(8, 4).bool()
    if encoder.config.image_tower == 'vit_stem_p8': pytest.skip('a convolutional stem looks over the edge of a patch')
    other = torch.where(seen, images(), 255 - images())
    s = [head(step_of(encoder, kept, o))['integrity'] for o in (other, images())]
    torch.testing.assert_close(*s)


@pytest.mark.parametrize('target, width', [('features', None), ('pixels', 64)])
def test_prediction_of_the_hidden_patches(encoder, target, width):
    head, kept = MaskedPrediction(encoder, target=target, width=32, depth=1), random_keep(6, 16, ratio=.75)
    extras = head(step_of(encoder, kept))
    assert extras['predicted'].shape == extras['target'].shape == (6, 12, width or encoder.image.width)
    torch.testing.assert_close(extras['target'].mean(-1), torch.zeros(6, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(extras['target'].var(-1, unbiased=False), torch.ones(6, 12), atol=1e-3, rtol=0)
    full = encoder.image(encoder.image.normalise(images()[:, 0]))[0] if target == 'features' else \
        cut_patches(encoder.image.normalise(images()[:, 0]), (4, 4))
    expected = F.layer_norm(take_patches(full, hidden_patches(kept, 16)), full.shape[-1:], eps=1e-6)
    torch.testing.assert_close(extras['target'], expected, atol=1e-4, rtol=1e-4) # a new teacher is the tower
    step = step_of(encoder, kept)
    step.embeddings.extras = head(step)
    masked_prediction(step.embeddings).backward()
    assert encoder.image.groups()[1][0].grad is not None and all(o.grad.norm() > 0 for o in head.decoder.parameters())
    assert head.teacher is None or all(o.grad is None for o in head.teacher.parameters())


def test_decoder_puts_tokens_at_their_places(encoder):
    "Predictions do not depend on the order in which the visible patches are listed."
    head, kept = MaskedPrediction(encoder, width=32, depth=1), random_keep(6, 16, ratio=.5)
    step, order = step_of(encoder, kept), torch.randperm(8)
    torch.testing.assert_close(head.decoder(step.patches[:, order], kept[:, order]), head.decoder(step.patches, kept),
                               atol=1e-5, rtol=1e-4)


def test_teacher_follows_slowly_and_saves(encoder):
    head = MaskedPrediction(encoder, momentum=.9)
    old = copy.deepcopy(head.teacher.state_dict())
    with torch.no_grad():
        for o in encoder.image.parameters(): o.add_(torch.randn_like(o))
    head.after_step(encoder, {})
    for k, new in head.teacher.state_dict().items():
        torch.testing.assert_close(new, .9 * old[k] + .1 * encoder.image.state_dict()[k], atol=1e-5, rtol=1e-5)
    assert not any(o.requires_grad for o in head.teacher.parameters()) and not head.train().teacher.training
    again = MaskedPrediction(encoder, momentum=.9)
    again.load_state_dict(head.state_dict())
    kept = random_keep(6, 16, ratio=.5)
    step = step_of(encoder, kept)
    for a, b in zip(again(step).values(), head(step).values()): torch.testing.assert_close(a, b)


def test_micro_batches_equal_the_whole(encoder):
    "Both heads see one sample at a time, so that accumulation changes nothing."
    kept = random_keep(6, 16, ratio=.5)
    for head in (Integrity(encoder), MaskedPrediction(encoder, width=32, depth=1)):
        whole = head(step_of(encoder, kept))
        parts = [head(step_of(encoder, kept[i:i + 2], images()[i:i + 2])) for i in (0, 2, 4)]
        for name in whole:
            torch.testing.assert_close(torch.cat([o[name] for o in parts]), whole[name], atol=1e-5, rtol=1e-4)


def test_without_masks():
    encoder = DualEncoder(CONFIG)
    torch.testing.assert_close(Integrity(encoder)(step_of(encoder, None))['integrity'], torch.full((6,), math.log(2)))
    head, step = MaskedPrediction(encoder), step_of(encoder, None)
    with pytest.raises(ValueError, match='expected a mask_ratio above 0'): head(step)
    step.embeddings.extras = head.eval()(step)
    assert masked_prediction(step.embeddings) == 0


def test_towers_that_keep_the_grid_are_refused():
    cnn = DualEncoder(dataclasses.replace(CONFIG, image_tower='cnn_small', image_size=64))
    for head in (Integrity, MaskedPrediction):
        with pytest.raises(ValueError, match=f'{head.__name__} needs an image tower that drops patches'): head(cnn)
    encoder = DualEncoder(CONFIG)
    with pytest.raises(ValueError, match="expected 'features' or 'pixels'"): MaskedPrediction(encoder, target='words')
    with pytest.raises(ValueError, match='momentum 1.5'): MaskedPrediction(encoder, momentum=1.5)


# ---- in an encoder

@pytest.fixture
def with_heads():
    "An encoder with both heads, and a batch for it."
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, heads={'integrity': {}, 'masked_prediction': {'width': 32, 'depth': 1}})
    tokens = torch.randint(5, 50, (6, 8), generator=torch.Generator().manual_seed(4))
    return DualEncoder(config).ask(mask_ratio=.5), {'images': images(), 'tokens': tokens, 'token_mask': tokens > 0}


def objective(e): return integrity_contrastive(e) + .05 * masked_prediction(e)


def gradients(encoder, forward, batch):
    encoder.zero_grad()
    torch.manual_seed(1)
    loss = objective(forward(batch))
    loss.backward()
    return loss.detach(), {k: o.grad.clone() for k, o in encoder.named_parameters() if o.grad is not None}


def test_accumulation_equals_the_whole_batch(with_heads):
    "Also with an estimator that has left its constant; every part learns but the teacher."
    encoder, batch = with_heads
    torch.nn.init.normal_(encoder.heads['integrity'].estimate[-1].weight, std=.1)
    loss, whole = gradients(encoder, encoder, batch)
    again, parts = gradients(encoder, MicroBatches(encoder, 3), batch)
    torch.testing.assert_close(again, loss)
    assert parts.keys() == whole.keys()
    for k, v in whole.items(): torch.testing.assert_close(parts[k], v, atol=1e-5, rtol=1e-3)
    assert not any('teacher' in k for k in whole) and {k for k, o in encoder.named_parameters() if o.requires_grad} == set(whole)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(with_heads, dtype):
    encoder, batch = with_heads
    found = []
    for forward in (encoder, Autocast(encoder, dtype)):
        torch.manual_seed(1)
        found.append(objective(forward(batch)).item())
    assert found[1] == pytest.approx(found[0], abs=.05)


def test_saved_and_loaded(with_heads, tmp_path):
    encoder, batch = with_heads
    e = encoder(batch)
    with torch.no_grad():
        for o in encoder.image.parameters(): o.add_(.1)
    encoder.follow(e)
    encoder.save(tmp_path)
    again = DualEncoder.load(tmp_path).train().ask(mask_ratio=.5)
    for name, v in encoder.state_dict().items(): assert torch.equal(again.state_dict()[name], v), name
    losses = []
    for o in (encoder, again):
        torch.manual_seed(2)
        losses.append(objective(o(batch)))
    assert torch.equal(*losses)


# ---- the truth to compare with

def test_visible_area_counts_pixels():
    masks = draw(3, 2, 8, 12, seed=5) > .5
    kept = random_keep(3, 6, ratio=.5)
    found = visible_area(masks, kept, (2, 3))
    for i in range(3):
        for c in range(2):
            corners = [(4 * (k // 3), 4 * (k % 3)) for k in kept[i].tolist()]
            seen = sum(masks[i, c, y:y + 4, x:x + 4].sum().item() for y, x in corners)
            assert found[i, c].item() == pytest.approx(seen / masks[i, c].sum().item(), rel=1e-6)
    assert visible_area(masks, None, (2, 3)).eq(1).all() and visible_area(masks & False, kept, (2, 3)).isnan().all()
    with pytest.raises(ValueError, match='expected multiples of the grid'): visible_area(masks, kept, (3, 2))


def test_integrity_and_area_share_their_masks():
    encoder = DualEncoder(CONFIG).eval()
    class Counts(torch.nn.Module):
        def forward(self, step): return {'integrity': visibility(step.kept, 6, 16)[:, :8].sum(1)}
    upper = torch.zeros(6, 32, 32, dtype=torch.bool)
    upper[:, :16] = True
    s, area = integrity_and_area(encoder, Counts(), images()[:, 0], upper, draws=5)
    assert s.shape == area.shape == (5, 6) and area.std() > 0
    torch.testing.assert_close(s / 8, area)
    torch.manual_seed(1)
    whole = integrity_and_area(encoder, Counts(), images()[:, 0], upper, draws=5)
    torch.manual_seed(1)
    class One(torch.nn.Module):
        def forward(self, step): return {'integrity': visibility(step.kept, len(step.kept), 16)[:, :8].sum(1)}
    cut = integrity_and_area(encoder, One(), images()[:, 0], upper, draws=5, batch_size=4)
    for a, b in zip(whole, cut): torch.testing.assert_close(a, b)


def test_within_images_equals_scipy_and_says_where_nothing_can_be_ranked():
    s, area = draw(8, 5, seed=1).numpy(), draw(8, 5, seed=2).round(decimals=1).numpy()
    area[:, 3], area[:, 4], s[:, 2] = .5, float('nan'), 1.
    found = within_images(s, area)
    assert found[:2] == pytest.approx([spearmanr(s[:, i], area[:, i]).statistic for i in range(2)], abs=1e-12)
    assert found[2] == 0 and math.isnan(found[3]) and math.isnan(found[4])
    assert within_images(3 * s - 7, area)[:2] == pytest.approx(found[:2]) and within_images(-s, area)[0] == pytest.approx(-found[0])


# ---- several processes

TERMS = {half: partial(integrity_contrastive, half=half) for half in HALVES} | {'prediction': masked_prediction}


def value_and_gradients(rows):
    found = {}
    for name, term in TERMS.items():
        e = batch().rows(rows)
        leaves = [e.image, e.text, e.extras['integrity'], e.extras['predicted']]
        for o in leaves: o.requires_grad_()
        loss = term(e)
        loss.backward()
        found[name] = loss.detach(), *(torch.zeros_like(o) if o.grad is None else o.grad for o in leaves)
    return found


def test_two_processes_equal_one(two_processes):
    "Each holds half of the pairs."
    ranks = two_processes(lambda r: value_and_gradients(slice(3 * r, 3 * r + 3)))
    full = value_and_gradients(slice(0, 6))
    for name in TERMS:
        (one, *first), (two, *second), (both, *whole) = (o[name] for o in (*ranks, full))
        torch.testing.assert_close((one + two) / 2, both)
        for a, b, c in zip(first, second, whole): torch.testing.assert_close(torch.cat([a, b]) / 2, c)
