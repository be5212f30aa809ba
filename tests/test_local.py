"""Local losses against loops written from the formulas, numerical gradients, padding, two processes; and their heads."""
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize, pad

from medcl_study.embeddings import Embeddings
from medcl_study.encoders.dual import DualEncoder, EncoderConfig
from medcl_study.encoders.heads import Step
from medcl_study.encoders.local import AttentionPool, CrossAttention, LocalHeads, TrueNorm, pool_sentences
from medcl_study.losses.contrast import info_nce
from medcl_study.losses.local import (FORMS, LOCAL_PRESETS, TARGETS, Local, grid_positions, grid_targets, local_contrast,
                                      local_loss, local_statistics, log_potential, per_sample_uniformity, soft_alignment,
                                      soft_targets)
from medcl_study.losses.lovt import lovt, lovt_floor, lovt_released, weighted_contrastive

LENGTHS = 3, 1, 0, 2, 3
PADDED = 'units', 'unit_attended', 'unit_features', 'unit_mask', 'unit_weight'


def batch(lengths=LENGTHS, p=4, d=5, seed=0, dtype=torch.float64, u=None):
    "Random local vectors of pairs whose reports have these many units; what is padded holds noise."
    g = torch.Generator().manual_seed(seed)
    n, u = len(lengths), u or max(1, *lengths)
    def draw(*shape): return torch.randn(*shape, d, generator=g, dtype=torch.float64).to(dtype)
    extras = {o: draw(n, p) for o in ('regions', 'region_attended', 'region_features')}
    extras |= {o: draw(n, u) for o in ('units', 'unit_attended', 'unit_features')}
    mask = torch.arange(u)[None] < torch.tensor(lengths)[:, None]
    extras |= {'unit_mask': mask, 'region_weight': torch.rand(n, p, generator=g, dtype=torch.float64).to(dtype),
               'unit_weight': (torch.rand(n, u, generator=g, dtype=torch.float64) * mask).to(dtype)}
    image, text = (normalize(draw(n), dim=-1) for _ in range(2))
    return Embeddings(image, text, torch.tensor(10., dtype=dtype), extras=extras)


def with_extras(e, **extras): return dataclasses.replace(e, extras=e.extras | extras)


def dot(x, y): return sum(a * b for a, b in zip(x, y))
def unit(x): return [a / math.sqrt(dot(x, x)) for a in x]
def distance(x, y): return sum((a - b) ** 2 for a, b in zip(x, y))
def one_hot(n): return [[float(k == l) for l in range(n)] for k in range(n)]
def mean(values): return sum(values) / len(values) if values else 0.


def blurred(p, form, threshold, decay):
    "Target of each region of a square grid, from the definition."
    size, rows = math.isqrt(p), []
    for k in range(p):
        apart = [math.hypot(k // size - l // size, k % size - l % size) / math.hypot(size, size) for l in range(p)]
        row = [1. if form == 'point' and k == l else math.exp(-decay * a) if form == 'exp' and a <= threshold + 1e-9
               else float(form == 'flat' and a <= threshold + 1e-9) for l, a in enumerate(apart)]
        rows.append([o / sum(row) for o in row])
    return rows


def sample_of(e, i, side):
    "Unit vectors z, z′, y and the weights of one side of one sample, without padding, as lists."
    names = ('regions', 'region_attended', 'region_features', 'region_weight') if side == 'image' else \
            ('units', 'unit_attended', 'unit_features', 'unit_weight')
    real = e.extras['unit_mask'][i].tolist() if side == 'text' else [True] * e.extras['regions'].shape[1]
    z, attended, y = ([unit(o) for o, keep in zip(e.extras[name][i].tolist(), real) if keep] for name in names[:3])
    weight = [o for o, keep in zip(e.extras[names[3]][i].tolist(), real) if keep]
    return {'z': z, 'attended': attended, 'y': y}, [o / sum(weight) for o in weight]


def lovt_by_loops(e, temperature=.3):
    total = 0.
    for side in ('image', 'text'):
        found = []
        for i in range(len(e)):
            if not e.extras['unit_mask'][i].any(): continue
            vectors, weight = sample_of(e, i, side)
            n = len(weight)
            p = blurred(n, 'exp', .5, 1.) if side == 'image' else one_hot(n)
            value = 0.
            for a, b in ((vectors['z'], vectors['attended']), (vectors['attended'], vectors['z'])):
                for k in range(n):
                    logits = [dot(a[k], b[l]) / temperature for l in range(n)]
                    value += weight[k] / 2 * (math.log(sum(map(math.exp, logits))) - sum(p[k][l] * logits[l] for l in range(n)))
            found.append(value)
        total += .75 * mean(found)
    return total


def potential_by_loops(a, b, weight, t, diagonal, log_at):
    "The log mean potential of one sample, None if no pair counts."
    rows = [[math.exp(-t * distance(x, y)) for l, y in enumerate(b) if diagonal == 'in' or k != l]
            for k, x in enumerate(a)]
    if not any(rows): return None
    if log_at == 'sample': return math.log(mean([o for row in rows for o in row]))
    return sum(w * math.log(mean(row)) for w, row in zip(weight, rows))


def dist_by_loops(e, side, o):
    diagonal, log_at = o.diagonal or FORMS[o.dist_form][0], o.log_at or FORMS[o.dist_form][1]
    found = {0: [], 1: []}
    for i in range(len(e)):
        vectors, weight = sample_of(e, i, side)
        if o.weights == 'uniform': weight = [1 / len(weight) for _ in weight]
        told = e.extras['unit_mask'][i].any()
        if o.dist_form == 'cross':
            if not told: continue
            for j, (a, b) in enumerate((('z', 'attended'), ('attended', 'z'))):
                found[j].append(potential_by_loops(vectors[a], vectors[b], weight, o.t, diagonal, log_at))
        elif o.where == 'attended' and not told: continue
        elif o.dist_form == 'across':
            others = [x for j in range(len(e)) if j != i and (o.where != 'attended' or e.extras['unit_mask'][j].any())
                      for x in sample_of(e, j, side)[0][o.where]]
            found[0].append(potential_by_loops(vectors[o.where], others, weight, o.t, 'in', log_at) if weight else None)
        elif len(weight) > 1:
            found[0].append(potential_by_loops(vectors[o.where], vectors[o.where], weight, o.t, diagonal, log_at))
    means = [mean([x for x in found[j] if x is not None]) for j in (0, 1)]
    return sum(means) / 2 if o.dist_form == 'cross' else means[0]


def align_by_loops(e, side, o):
    found = []
    for i in range(len(e)):
        if not e.extras['unit_mask'][i].any(): continue
        vectors, weight = sample_of(e, i, side)
        if o.weights == 'uniform': weight = [1 / len(weight) for _ in weight]
        n, z, attended = len(weight), vectors['z'], vectors['attended']
        p = blurred(n, o.align_form, o.threshold, o.decay) if side == 'image' else one_hot(n)
        found.append(sum(weight[k] * p[k][l] * o.align_t * (distance(z[k], attended[l]) + distance(attended[k], z[l])) / 2
                         for k in range(n) for l in range(n)))
    return mean(found)


def local_by_loops(e, o):
    sides = {'none': (), 'image': ('image',), 'text': ('text',), 'both': ('image', 'text')}
    return (o.align_weight * sum(align_by_loops(e, side, o) for side in sides[o.align_side]) +
            o.dist_weight * sum(dist_by_loops(e, side, o) for side in sides[o.dist_side]))


REPORTS = st.lists(st.integers(0, 4), min_size=2, max_size=5)


@settings(max_examples=20, deadline=None)
@given(lengths=REPORTS, size=st.integers(1, 3), seed=st.integers(0, 1000))
def test_lovt_equals_loops(lengths, size, seed):
    e = batch(lengths, p=size ** 2, seed=seed)
    assert lovt(e).item() == pytest.approx(lovt_by_loops(e), rel=1e-10, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(lengths=REPORTS, size=st.integers(1, 3), seed=st.integers(0, 1000), align_form=st.sampled_from(TARGETS),
       dist_form=st.sampled_from(tuple(FORMS)), diagonal=st.sampled_from((None, 'in', 'out')), t=st.sampled_from((.5, 2., 4.)),
       log_at=st.sampled_from((None, 'sample', 'anchor')), where=st.sampled_from(('z', 'y', 'attended')),
       weights=st.sampled_from(('attention', 'uniform')), threshold=st.sampled_from((0., .3, .5)))
def test_family_equals_loops(lengths, size, seed, **options):
    if options['dist_form'] == 'cross': options['where'] = 'z'
    options = Local(align_side='both', dist_side='both', **options)
    e = batch(lengths, p=size ** 2, seed=seed)
    assert local_loss(e, options).item() == pytest.approx(local_by_loops(e, options), rel=1e-9, abs=1e-10)


@pytest.mark.parametrize('name', LOCAL_PRESETS)
def test_presets_equal_loops(name):
    e = batch()
    assert local_loss(e, name).item() == pytest.approx(local_by_loops(e, LOCAL_PRESETS[name]), rel=1e-10, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 50), d=st.integers(2, 64), temperature=st.floats(.05, 2), seed=st.integers(0, 1000))
def test_contrast_is_alignment_plus_potential(n, d, temperature, seed):
    g, t = torch.Generator().manual_seed(seed), 1 / (2 * temperature)
    a, b = (normalize(torch.randn(1, n, d, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    p = torch.rand(n, n, generator=g, dtype=torch.float64).softmax(-1)
    whole, everyone = local_contrast(a, b, p, temperature=temperature), torch.ones(1, n, n, dtype=torch.bool)
    parts = soft_alignment(a, b, p, t=t) + log_potential(a, b, everyone, t=t) + math.log(n)
    assert (whole - parts).abs().max() < 1e-10
    mu = p @ b
    of_reference = ((a - mu).square().sum(-1) + 1 - mu.square().sum(-1)) * t - 1 / temperature + \
                   (a @ b.mT / temperature).logsumexp(-1)
    assert (whole - of_reference).abs().max() < 1e-10
    kernel = log_potential(a, a, everyone, t=t) + math.log(n) + 1 / temperature
    assert ((a @ a.mT / temperature).logsumexp(-1) - kernel).abs().max() < 1e-10


@pytest.mark.parametrize('n, inside, outside', [(2, -.693, -8.), (49, -3.299, -4.083), (196, -3.774, -4.021)])
def test_uniformity_of_simplex_and_noise(n, inside, outside):
    corners = (torch.eye(n, dtype=torch.float64) - 1 / n)[None]
    assert per_sample_uniformity(corners, diagonal='out')[0].item() == pytest.approx(outside, abs=6e-4)
    assert per_sample_uniformity(corners, diagonal='in')[0].item() == pytest.approx(inside, abs=6e-4)
    if n > 2:
        noise = torch.randn(1, n, 8192, generator=torch.Generator().manual_seed(0))
        assert per_sample_uniformity(noise)[0].item() == pytest.approx(-4., abs=.02)


@settings(max_examples=20, deadline=None)
@given(k=st.integers(2, 9), t=st.sampled_from((.5, 1., 2., 4.)), seed=st.integers(0, 1000))
def test_uniformity_properties(k, t, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, k, 6, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    value = per_sample_uniformity(x, t=t)[0]
    for other in (x @ turn, x[:, torch.randperm(k, generator=g)], 3 * x):
        torch.testing.assert_close(per_sample_uniformity(other, t=t)[0], value)
    assert (value >= per_sample_uniformity(x, t=t, log_at='anchor')[0] - 1e-12).all()
    assert (value <= 1e-12).all() and (value >= -4 * t - 1e-12).all()
    inside = per_sample_uniformity(x, t=t, diagonal='in')[0]
    torch.testing.assert_close(inside, ((1 + (k - 1) * value.exp()) / k).log())
    collapsed = x[:, :1].expand(-1, k, -1)
    for diagonal in ('in', 'out'):
        torch.testing.assert_close(per_sample_uniformity(collapsed, t=t, diagonal=diagonal)[0], torch.zeros_like(value))


def test_one_vector_has_no_uniformity():
    x = torch.randn(3, 1, 4, dtype=torch.float64, requires_grad=True)
    for diagonal in ('in', 'out'):
        values, valid = per_sample_uniformity(x, diagonal=diagonal)
        assert not valid.any() and not values.any()
        assert not torch.autograd.grad(values.sum(), x)[0].any()


@pytest.mark.parametrize('rows, columns', [(7, 7), (8, 8), (3, 5), (1, 4)])
def test_soft_targets(rows, columns):
    for form in TARGETS:
        p = grid_targets(rows, columns, form)
        torch.testing.assert_close(p.sum(1), torch.ones(rows * columns))
        torch.testing.assert_close(grid_targets(rows, columns, form, threshold=0.), torch.eye(rows * columns))
    flat, near = grid_targets(rows, columns, 'flat') > 0, grid_targets(rows, columns) > 0
    assert torch.equal(flat, near) and torch.equal(near, near.T), 'neighbourhood is symmetric, also on the threshold'
    torch.testing.assert_close(grid_targets(rows, columns, 'exp', decay=0.), grid_targets(rows, columns, 'flat'))
    kept = torch.tensor([0, 2, 3])
    some = soft_targets(grid_positions(rows, columns)[kept])
    part = grid_targets(rows, columns)[kept][:, kept]
    torch.testing.assert_close(some, part / part.sum(1, keepdim=True))


def test_blur_needs_to_know_where_regions_are():
    e = batch(p=6)
    with pytest.raises(ValueError, match='6 regions are not a full square grid'): lovt(e)
    placed = with_extras(e, region_position=grid_positions(2, 3).expand(5, -1, -1))
    assert lovt(placed).isfinite() and local_loss(e, 'lovt_point').isfinite()
    masked = dataclasses.replace(batch(p=4), kept=torch.arange(4).expand(5, -1))
    with pytest.raises(ValueError, match='region_position'): lovt(masked)


TERMS = {name: lambda e, name=name: local_loss(e, name) for name in LOCAL_PRESETS if name != 'global'} | {
    'across': lambda e: local_loss(e, Local(dist_side='both', dist_form='across')), 'lovt_loss': lovt}


def leaves(e): return {k: v.requires_grad_() for k, v in e.extras.items() if v.ndim == 3}


def gradients(term, e):
    given = leaves(e)
    return dict(zip(given, torch.autograd.grad(term(e), list(given.values()), allow_unused=True)))


@pytest.mark.parametrize('name', TERMS)
def test_order_padding_and_empty_reports(name):
    e, term = batch(), TERMS[name]
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(term(e.rows(order)), term(e))
    noise = {k: torch.cat([e.extras[k], 9 * torch.randn(5, 2, 5, dtype=torch.float64)], 1) for k in PADDED[:3]}
    longer = with_extras(e, **noise, **{k: pad(e.extras[k], (0, 2)) for k in PADDED[3:]})
    torch.testing.assert_close(term(longer), term(e))
    short, long = gradients(term, e), gradients(term, longer)
    for k, v in short.items():
        if v is None: continue
        torch.testing.assert_close(long[k][:, :v.shape[1]], v)
        assert v.isfinite().all() and not long[k][:, v.shape[1]:].any(), f'{k}: padding has a gradient'
        if k.startswith('unit'): assert not v[2].any(), f'{k}: an empty report has a gradient'


@pytest.mark.parametrize('name', TERMS)
@pytest.mark.parametrize('lengths, p', [((0, 0), 4), ((1, 1), 4), ((2, 3), 1), ((0, 1), 1)])
def test_degenerate_batches_are_finite(name, lengths, p):
    e = batch(lengths, p=p)
    assert TERMS[name](e).isfinite()
    for k, v in gradients(TERMS[name], e).items(): assert v is None or v.isfinite().all(), k


@pytest.mark.parametrize('name', [o for o in TERMS if 'gauss_only' not in o and o != 'across'])
def test_breaking_partners_raises_the_loss(name):
    e = batch((4, 4, 4), p=9, d=32)
    near = lambda x: x + .1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    matched = with_extras(e, region_attended=near(e.extras['regions']), unit_attended=near(e.extras['units']))
    for axis in (0, 1):
        broken = with_extras(matched, **{k: matched.extras[k].roll(1, axis) for k in ('region_attended', 'unit_attended')})
        assert TERMS[name](broken) > TERMS[name](matched) + .05


@pytest.mark.parametrize('name', TERMS)
def test_gradcheck(name):
    e = batch((2, 1, 0), p=4, d=3)
    given = {k: v for k, v in leaves(e).items()}
    def term(*values): return TERMS[name](with_extras(e, **dict(zip(given, values))))
    assert torch.autograd.gradcheck(term, tuple(given.values()))


@pytest.mark.parametrize('name', TERMS)
def test_low_precision_inputs(name):
    e, exact = batch(dtype=torch.float32, d=32), TERMS[name](batch(d=32))
    for dtype in (torch.bfloat16, torch.float16):
        rounded = with_extras(e, **{k: v.to(dtype).float() for k, v in e.extras.items() if v.is_floating_point()})
        assert TERMS[name](rounded).item() == pytest.approx(exact.item(), abs=.03)
    huge = with_extras(e, **{k: 1e4 * v for k, v in e.extras.items() if v.ndim == 3})
    torch.testing.assert_close(TERMS[name](huge), TERMS[name](e), rtol=1e-4, atol=1e-5)


def test_weights_carry_no_gradient():
    e = batch()
    weights = [e.extras[k].requires_grad_() for k in ('region_weight', 'unit_weight')]
    leaves(e)
    assert torch.autograd.grad(lovt(e) + local_loss(e, 'lovt'), weights, allow_unused=True) == (None, None)


@pytest.mark.parametrize('stop, still', [('attended', 'unit_attended'), ('own', 'units'), ('none', None)])
def test_stop_gradient(stop, still):
    found = gradients(lambda e: local_loss(e, Local(align_side='text', stop_grad=stop)), batch())
    moved = {k for k, v in found.items() if v is not None and v.any()}
    assert moved == {'units', 'unit_attended'} - {still}


def test_one_sentence_silences_half_of_lovt():
    g = torch.Generator().manual_seed(0)
    regions = normalize(torch.randn(1, 49, 8, generator=g, dtype=torch.float64), dim=-1).requires_grad_()
    same = normalize(torch.randn(1, 1, 8, generator=g, dtype=torch.float64), dim=-1).expand(1, 49, 8)
    p = soft_targets(grid_positions(7, 7).double())
    forth, back = local_contrast(regions, same, p), local_contrast(same, regions, p)
    assert (forth - math.log(49)).abs().max() < 1e-12
    assert torch.autograd.grad(forth.sum(), regions)[0].abs().max() < 1e-12
    assert torch.autograd.grad(back.sum(), regions)[0].abs().max() > 1e-4


def test_lovt_is_its_preset_plus_constants():
    e = batch()
    told = torch.tensor([o for o in LENGTHS if o], dtype=torch.float64)
    constants = .75 * (math.log(4) + told.log().mean())
    assert lovt(e).item() == pytest.approx((local_loss(e, 'lovt') + constants).item(), abs=1e-10)
    ours, preset = gradients(lovt, e), gradients(TERMS['lovt'], e)
    for k in ('regions', 'units', 'region_attended', 'unit_attended'): torch.testing.assert_close(ours[k], preset[k])


def test_released_control():
    e = batch((3, 1, 2))
    with pytest.raises(ValueError, match='padded=True'): lovt_released(e)
    control = with_extras(e, padded_length=torch.full((3,), 3))
    torch.testing.assert_close(lovt_released(control), lovt(e))


@settings(max_examples=25, deadline=None)
@given(lengths=REPORTS, size=st.integers(1, 4), seed=st.integers(0, 1000))
def test_lovt_is_never_below_its_floor(lengths, size, seed):
    "Also where the softmax is as near to the blur as descent brings it."
    e = batch([o + 1 for o in lengths], p=size ** 2, seed=seed)
    assert lovt(e) >= lovt_floor(e) - 1e-12


def test_options_are_checked():
    for wrong in (dict(align_side='report'), dict(dist_form='gaussian'), dict(where='x'), dict(stop_grad='both'),
                  dict(weights='w')):
        with pytest.raises(ValueError, match='expected one of'): Local(**wrong)
    with pytest.raises(ValueError, match='no meaning'): Local(dist_form='cross', where='attended')
    with pytest.raises(ValueError, match="extras\\['region_attended'\\], which the head LocalHeads\\(attention='learned'\\) fills"):
        extras = {k: v for k, v in batch().extras.items() if k != 'region_attended'}
        lovt(dataclasses.replace(batch(), extras=extras))


def test_weighted_contrastive():
    e = batch()
    torch.testing.assert_close(weighted_contrastive(e, image_to_text=.5), info_nce(e.image, e.text, scale=10.))
    logits, rows = 10 * e.image @ e.text.T, range(5)
    by_hand = -sum(.75 * logits.log_softmax(1)[i, i] + .25 * logits.log_softmax(0)[i, i] for i in rows) / 5
    torch.testing.assert_close(weighted_contrastive(e), by_hand)
    pooled = with_extras(e, image_pooled=e.text, text_pooled=e.image)
    torch.testing.assert_close(weighted_contrastive(pooled, pooled=True, image_to_text=.25), by_hand)
    with pytest.raises(ValueError, match='pool=True'): weighted_contrastive(e, pooled=True)
    assert torch.autograd.gradcheck(lambda i, t: weighted_contrastive(dataclasses.replace(e, image=i, text=t)),
                                    (e.image.requires_grad_(), e.text.requires_grad_()))


def test_statistics():
    found = local_statistics(batch((1, 1, 2, 2)))
    assert found['one_sentence'] == .5 and 0 <= found['image_variance_between'] <= 1
    assert all(math.isfinite(o) for o in found.values())
    e = batch((2, 2))
    same = with_extras(e, region_attended=e.extras['regions'], unit_attended=-e.extras['units'])
    assert local_statistics(same)['image_rmse'] == pytest.approx(0., abs=1e-7)
    assert local_statistics(same)['text_rmse'] == pytest.approx(2.)


# ---- ranks and micro-batches

ACROSS_RANKS = TERMS | {'weighted_contrastive': weighted_contrastive}


def halves(): return batch((3, 1, 4, 2), u=4, seed=1), batch((0, 2, 1, 0), seed=2) # padded to 4 and to 2


def losses_and_gradients(e, share):
    "The value of each term, and the gradient of its mean over ranks."
    found = {}
    for name, term in ACROSS_RANKS.items():
        given = leaves(e) | {'image': e.image.requires_grad_(), 'text': e.text.requires_grad_()}
        value = term(e)
        grads = torch.autograd.grad(value * share, list(given.values()), allow_unused=True)
        found[name] = value.detach(), {k: v for k, v in zip(given, grads) if v is not None}
    return found


def test_micro_batches_concatenate():
    first, second = halves()
    whole = Embeddings.cat([first, second])
    assert whole.extras['units'].shape[1] == 4
    for name, term in TERMS.items():
        again = term(Embeddings.cat([whole.rows(slice(0, 3)), whole.rows(slice(3, 8))]))
        torch.testing.assert_close(again, term(whole), msg=name)


def test_two_processes_equal_one(two_processes):
    ranks = two_processes(lambda r: losses_and_gradients(halves()[r], .5))
    full = losses_and_gradients(Embeddings.cat(list(halves())), 1.)
    for name, (value, grads) in full.items():
        torch.testing.assert_close((ranks[0][name][0] + ranks[1][name][0]) / 2, value, msg=name)
        for k, v in grads.items():
            for rank, rows in ((ranks[0][name][1], v[:4]), (ranks[1][name][1], v[4:])):
                if k not in rank: assert not rows.any(), (name, k)
                else: torch.testing.assert_close(rank[k], rows[:, :rank[k].shape[1]], msg=f'{name} {k}')


# ---- heads

def encoder(image_tower='vit_tiny_p8', **options):
    torch.manual_seed(0)
    config = EncoderConfig(image_tower=image_tower, text_tower='bert_tiny', image_size=32, channels=1, dim=16, vocab_size=50)
    model = DualEncoder(config)
    model.heads['local'] = LocalHeads(model, **options)
    return model.ask()


def pairs(lengths=((3, 2), (4,), (), (1, 2, 2)), t=12):
    "Uint8 images and token ids of reports whose sentences have these many tokens, between [CLS] and [SEP]."
    g = torch.Generator().manual_seed(0)
    index = torch.full((len(lengths), t), -1)
    mask = torch.zeros(len(lengths), t, dtype=torch.bool)
    for i, sentences in enumerate(lengths):
        tokens = [s for s, k in enumerate(sentences) for _ in range(k)]
        index[i, 1:1 + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[i, :2 + len(tokens)] = True
    tokens = torch.randint(1, 50, (len(lengths), 64), generator=g)[:, :t] * mask
    images = torch.randint(0, 256, (len(lengths), 1, 1, 32, 32), generator=g, dtype=torch.uint8)
    return {'images': images, 'tokens': tokens, 'token_mask': mask, 'sentence_index': index}


LOVT = dict(kind='mlp', hidden=32, norm='batch', attention='learned', pool=True, features=True)


FREE = dict(attention='free', pool=True, features=True, sentence_pooling='mean')


@pytest.mark.parametrize('tower, options', [('vit_tiny_p8', LOVT), ('cnn_small', LOVT), ('vit_tiny_p8', FREE),
                                            ('vit_tiny_p8', LOVT | dict(text='words'))])
def test_gradient_reaches_both_towers(tower, options):
    model = encoder(tower, **options).train()
    e = model(pairs())
    p = math.prod(model.image.patch_grid)
    assert e.extras['regions'].shape == (4, p, 16) and e.extras['region_position'].shape == (4, p, 2)
    torch.testing.assert_close(e.extras['region_position'][0], grid_positions(*model.image.patch_grid))
    for term in (lovt, lambda e: local_loss(e, 'y_gauss'), lambda e: weighted_contrastive(e, pooled=True)):
        for tower in (model.image, model.text):
            grads = torch.autograd.grad(term(e), list(tower.parameters()), allow_unused=True, retain_graph=True)
            grads = [o for o in grads if o is not None]
            assert all(o.isfinite().all() for o in grads) and sum(o.abs().sum() for o in grads) > 0


def test_dropped_patches_keep_their_places():
    model = encoder(attention='free', pool=True).train().ask(mask_ratio=.5)
    e = model(pairs())
    assert e.extras['regions'].shape[1] == 8 and lovt(e).isfinite()
    torch.testing.assert_close(e.extras['region_position'], grid_positions(4, 4)[e.kept])


def test_regions_keep_spatial_order():
    "Changing one corner of the image changes that corner's region most, in a convolutional tower as well."
    for tower in ('vit_tiny_p8', 'cnn_small'):
        model, data = encoder(tower).eval(), pairs()
        before = model(data).extras['regions']
        data['images'][:, :, :, -8:, -8:] = 255
        moved = (model(data).extras['regions'] - before).norm(dim=-1).mean(0)
        assert moved.argmax() == len(moved) - 1, tower


@pytest.mark.parametrize('norm', ['batch', 'layer'])
def test_heads_ignore_padding(norm):
    for training in (True, False):
        model = encoder(**LOVT | dict(norm=norm)).train(training)
        short, long = model(pairs(t=10)), model(pairs(t=16))
        for k, v in short.extras.items():
            torch.testing.assert_close(long.extras[k][:, :v.shape[1]], v, rtol=1e-4, atol=1e-5, msg=k)
        data = pairs()
        data['tokens'][~data['token_mask']] = 7
        for k, v in model(data).extras.items(): torch.testing.assert_close(v, short.extras[k], rtol=1e-4, atol=1e-5, msg=k)
        more = pairs(((3, 2), (4,), (), (1, 2, 2)), t=12)
        assert not model(more).extras['units'][2].any()


def report_alone_and_in_company(training, **options):
    "Units, weights and partners of one report: with its own padding, and padded to the twelve slots of a longer one."
    torch.manual_seed(0)
    model = encoder(**options)
    head, g = model.heads['local'].train(training), torch.Generator().manual_seed(3)
    patches, words = torch.randn(2, 16, model.image.width, generator=g), torch.randn(2, 12, model.text.width, generator=g) + 1
    found = []
    for slots in (3, 12):
        sentences, mask = words[:, :slots].clone(), torch.arange(slots)[None].repeat(2, 1) < 3
        sentences[~mask] = 0
        head._units = lambda step, given=(sentences, mask): given
        found.append(head(Step(model, {}, Embeddings(torch.zeros(2, 16), torch.zeros(2, 16), None), patches=patches)))
    return found


@pytest.mark.parametrize('padded', [False, True])
def test_only_the_control_lets_padding_leak(padded):
    options = LOVT | dict(padded=padded)
    alone, company = report_alone_and_in_company(True, **options)
    moved = {k: (alone[k] - company[k][:, :alone[k].shape[1]]).abs().max().item()
             for k in ('units', 'unit_weight', 'region_attended', 'unit_attended')}
    if padded: assert min(moved.values()) > 1e-3, moved
    else: assert max(moved.values()) < 1e-5, moved
    assert ('padded_length' in alone) == padded
    alone, company = report_alone_and_in_company(False, **options)
    moved = (alone['unit_weight'] - company['unit_weight'][:, :3]).abs().max().item()
    assert (moved > 1e-3) == padded, 'the query of the released pooling leaks in evaluation, too'


def test_layer_norm_does_not_care_how_a_batch_is_cut():
    for norm, same in (('layer', True), ('batch', False)):
        model, data = encoder(**LOVT | dict(norm=norm)).train(), pairs()
        whole = model(data).extras
        parts = Embeddings.cat([model({k: v[rows] for k, v in data.items()}) for rows in (slice(0, 2), slice(2, 4))]).extras
        moved = max((whole[k] - parts[k]).abs().max().item() for k in ('regions', 'units', 'region_attended', 'unit_attended'))
        assert (moved < 1e-4) == same, (norm, moved)


def test_sentences_from_tokens_by_loops():
    g = torch.Generator().manual_seed(0)
    words, index = torch.randn(4, 9, 3, generator=g, dtype=torch.float64), torch.randint(-1, 3, (4, 9), generator=g)
    for how, reduce in (('max', lambda o: o.amax(0)), ('mean', lambda o: o.mean(0))):
        found, mask = pool_sentences(words, index, how)
        for i in range(4):
            for s in range(3):
                rows = words[i, index[i] == s]
                assert mask[i, s] == bool(len(rows))
                torch.testing.assert_close(found[i, s], reduce(rows) if len(rows) else torch.zeros(3, dtype=torch.float64))
        assert torch.autograd.gradcheck(lambda o: pool_sentences(o, index, how)[0], words.requires_grad_())


def test_attention_by_loops():
    torch.manual_seed(0)
    attention = CrossAttention(4, norm='none').double()
    regions, units = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 4, 4, dtype=torch.float64)
    mask = torch.arange(4)[None] < torch.tensor([4, 1, 2])[:, None]
    seen, said = attention(regions, units, mask)
    for i in range(3):
        real = units[i, mask[i]]
        score = attention.query(regions[i]) @ attention.query(real).T / math.sqrt(4)
        for k in range(5):
            share = [math.exp(o) for o in score[k].tolist()]
            partner = sum(a / sum(share) * attention.value(o) for a, o in zip(share, real))
            torch.testing.assert_close(seen[i, k], attention.output(partner))
        torch.testing.assert_close(said[i, :len(real)], attention.output(score.T.softmax(1) @ attention.value(regions[i])))
    assert torch.autograd.gradcheck(lambda r, u: attention(r, u, mask), (regions.requires_grad_(), units.requires_grad_()))


def test_pool_by_loops():
    torch.manual_seed(0)
    pool = AttentionPool(6, heads=3).double()
    x, mask = torch.randn(3, 4, 6, dtype=torch.float64), torch.arange(4)[None] < torch.tensor([4, 2, 0])[:, None]
    pooled, weight = pool(x, mask)
    for i in range(2):
        real = x[i, mask[i]]
        query, found, share = pool.query(real.mean(0)), [], 0
        for h in range(3):
            part = slice(2 * h, 2 * h + 2)
            attention = (pool.key(real)[:, part] @ query[part] / math.sqrt(2)).softmax(0)
            found.append(attention @ pool.value(real)[:, part])
            share = share + attention / 3
        torch.testing.assert_close(pooled[i], pool.output(torch.cat(found)))
        torch.testing.assert_close(weight[i, :len(real)], share)
    assert not pooled[2].any() and not weight[2].any()
    assert torch.autograd.gradcheck(lambda o: pool(o, mask), x.requires_grad_())


def test_true_norm_matches_batch_norm_on_the_real_rows():
    torch.manual_seed(0)
    norm, plain = TrueNorm(3, 'batch'), torch.nn.BatchNorm1d(3)
    x, mask = torch.randn(6, 5, 3), torch.rand(6, 5) < .6
    torch.testing.assert_close(norm(x, mask)[mask], plain(x[mask]))
    torch.testing.assert_close(norm.norm.running_var, plain.running_var)
    norm.eval(), plain.eval()
    torch.testing.assert_close(norm(x, mask)[mask], plain(x[mask]))
    for none in (torch.zeros_like(mask), torch.zeros_like(mask).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(True))):
        assert norm.train()(x, none).isfinite().all()


def test_heads_name_what_is_wrong():
    model = encoder()
    for wrong, says in ((dict(text='tokens'), 'words or sentences'), (dict(attention='yes'), 'learned, free or None'),
                        (dict(kind='conv'), 'linear or mlp'), (dict(kind='mlp', norm='group'), 'layer, batch, none'),
                        (dict(sentence_pooling='sum'), 'max or mean'), (dict(pool=True, pool_heads=7), 'do not divide the width')):
        with pytest.raises(ValueError, match=says): LocalHeads(model, **wrong)
    with pytest.raises(ValueError, match='sentence_index'):
        model({k: v for k, v in pairs().items() if k != 'sentence_index'})
