"""Fast paths against the definitions they stand in for: values, gradients, what they keep, and where they give way."""
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medcl_study.embeddings import Embeddings
from medcl_study.losses.contrast import contrastive, info_nce
from medcl_study.losses.fast import (FAST, contrastive_tiled, faster, gloria_scores_fast, info_nce_tiled, sinkhorn_fast,
                                     token_similarities_fast)
from medcl_study.losses.tokens import gloria_scores, token_similarities
from medcl_study.losses.transport import sinkhorn

TOKENS = {'token_similarities': (token_similarities, token_similarities_fast), 'gloria_scores': (gloria_scores, gloria_scores_fast)}
BOTH = pytest.mark.parametrize('readable, fast', TOKENS.values(), ids=TOKENS)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape, **options): return torch.nn.functional.normalize(normal(*shape, **options), dim=-1)


def tokens(n=3, p=5, m=4, t=6, d=8, *, seed=0, dtype=torch.float64):
    "Patches, words and a mask with holes; the words under padding are large on purpose."
    mask = torch.rand(m, t, generator=torch.Generator().manual_seed(seed)) < .6
    words = unit(m, t, d, seed=seed + 1, dtype=dtype)
    return unit(n, p, d, seed=seed, dtype=dtype), torch.where(mask[..., None], words, 9.), mask


def outcome(function, *inputs, **options):
    "Outputs, then gradients at all floating inputs of a sum with fixed irregular weights."
    inputs = [o.detach().clone().requires_grad_() if o.is_floating_point() else o for o in inputs]
    found = function(*inputs, **options)
    found = found if isinstance(found, tuple) else (found,)
    sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype, device=o.device).view(o.shape).cos()).sum() for o in found).backward()
    return [o.detach() for o in found] + [o.grad for o in inputs if o.is_floating_point()]


def assert_same(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)


def kept(function, *inputs, **options):
    "Bytes that autograd keeps for the backward pass, each storage counted once, inputs left out."
    inputs = [o.detach().clone().requires_grad_() if o.is_floating_point() else o for o in inputs]
    mine, found = {o.untyped_storage().data_ptr() for o in inputs}, {}
    def keep(o):
        if o.untyped_storage().data_ptr() not in mine: found[o.untyped_storage().data_ptr()] = o
        return o
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda o: o): result = function(*inputs, **options)
    assert result is not None
    return sum(o.untyped_storage().nbytes() for o in found.values())


def by_image(found):
    "All score matrices with images as rows."
    return (found[0], found[1].T) if isinstance(found, tuple) else (found,)


def with_scale(function): return lambda image, text, scale, **options: function(image, text, scale=scale, **options)


# ---- InfoNCE

@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), d=st.integers(1, 6), scale=st.floats(0, 100), tile=st.integers(1, 24), seed=st.integers(0, 999))
def test_tiled_info_nce_equals_the_definition(n, d, scale, tile, seed):
    inputs = unit(n, d, seed=seed), unit(n, d, seed=seed + 1), torch.tensor(scale, dtype=torch.float64)
    found, expected = (outcome(with_scale(f), *inputs, **o) for f, o in ((info_nce_tiled, dict(tile=tile)), (info_nce, {})))
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize('n, scale', [(300, 14.3), (300, 100.), (64, 1.)])
def test_tiled_info_nce_in_single_precision(n, scale):
    inputs = unit(n, 64, dtype=torch.float32), unit(n, 64, seed=1, dtype=torch.float32), torch.tensor(scale)
    assert_same(outcome(with_scale(info_nce_tiled), *inputs, tile=100), outcome(with_scale(info_nce), *inputs))


def test_tiled_info_nce_gradcheck():
    inputs = [o.requires_grad_() for o in (unit(5, 4), unit(5, 4, seed=1), torch.tensor(7., dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda i, t, s: info_nce_tiled(i, t, scale=s, tile=2), inputs)


def test_tiled_info_nce_keeps_normalisers_alone():
    n, d = 128, 4
    inputs = unit(n, d, dtype=torch.float32), unit(n, d, seed=1, dtype=torch.float32), torch.tensor(9.)
    assert kept(with_scale(info_nce_tiled), *inputs, tile=32) <= 4 * (2 * n) < 4 * n * n <= kept(with_scale(info_nce), *inputs)


def test_tiled_info_nce_rises_when_a_pair_breaks():
    image = unit(16, 8)
    text = torch.nn.functional.normalize(image + .2 * unit(16, 8, seed=1), dim=-1)
    swapped = text[[1, 0, *range(2, 16)]]
    assert info_nce_tiled(image, swapped, scale=14.3, tile=5) > info_nce_tiled(image, text, scale=14.3, tile=5) + .1


def test_tiled_info_nce_refuses_other_shapes_and_second_derivatives():
    with pytest.raises(ValueError, match=r'as many texts as images, of one width, not \(4, 3\) and \(5, 3\)'):
        info_nce_tiled(unit(4, 3), unit(5, 3), scale=1.)
    image = unit(4, 3).requires_grad_()
    gradient, = torch.autograd.grad(info_nce_tiled(image, unit(4, 3, seed=1), scale=1.), image, create_graph=True)
    with pytest.raises(RuntimeError, match='does not require grad|once_differentiable'): gradient.sum().backward()


# ---- token similarities and word attention

@BOTH
@settings(max_examples=30, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 6)] * 4, st.integers(4, 8)), tile=st.sampled_from([None, 1, 2, 5]), seed=st.integers(0, 999))
def test_tokens_equal_the_definition(readable, fast, sizes, tile, seed):
    inputs = tokens(*sizes, seed=seed)
    assert_same(outcome(fast, *inputs, tile=tile), outcome(readable, *inputs), 1e-8)


@BOTH
def test_tokens_in_single_precision(readable, fast):
    inputs = tokens(9, 25, 7, 12, 64, dtype=torch.float32)
    assert_same(outcome(fast, *inputs), outcome(readable, *inputs))


@BOTH
def test_tokens_gradcheck(readable, fast):
    patches, words, mask = tokens(2, 3, 3, 4, 3)
    assert torch.autograd.gradcheck(lambda p, w: fast(p, w, mask, tile=2), (patches.requires_grad_(), words.requires_grad_()))


@BOTH
def test_padding_is_never_read(readable, fast):
    patches, words, mask = tokens()
    wider = torch.cat([words, torch.full((4, 3, 8), 1e3, dtype=torch.float64)], 1), torch.cat([mask, torch.zeros(4, 3, dtype=bool)], 1)
    narrow, wide = outcome(fast, patches, words, mask), outcome(fast, patches, *wider)
    assert wide[-1][:, 6:].abs().max() == 0 == wide[-1][:, :6][~mask].abs().max()
    assert_same(wide[:-1] + [wide[-1][:, :6]], narrow, 1e-12)


@BOTH
def test_text_without_words_scores_zero_and_pulls_nobody(readable, fast):
    patches, words, mask = tokens()
    mask[1] = False
    def of_the_empty_text(*inputs): return tuple(o[:, 1] for o in by_image(fast(*inputs)))
    assert all(o.abs().max() == 0 for o in outcome(of_the_empty_text, patches, words, mask))
    everywhere = outcome(fast, patches, words, torch.zeros_like(mask))
    assert all(o.abs().max() == 0 for o in everywhere)


@BOTH
def test_order_of_images_and_texts_does_not_matter(readable, fast):
    patches, words, mask = tokens()
    images, texts = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    here, there = fast(patches, words, mask), fast(patches[images], words[texts], mask[texts])
    for a, b in zip(by_image(there), by_image(here), strict=True): torch.testing.assert_close(a, b[images][:, texts])


@BOTH
def test_half_precision_stays_close(readable, fast):
    patches, words, mask = tokens(4, 9, 4, 7, 32, dtype=torch.float32)
    exact, rounded = (fast(*(o.to(k) for o in (patches, words)), mask) for k in (torch.float32, torch.bfloat16))
    for a, b in zip(by_image(exact), by_image(rounded), strict=True):
        torch.testing.assert_close(b.float(), a, rtol=.05, atol=.02)


def test_one_of_several_equal_matches_receives_the_gradient():
    "The definition shares it; the sums agree, so that equal words are moved by as much together."
    patches, words, mask = unit(2, 3, 4), unit(1, 1, 4, seed=1).expand(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    found, expected = outcome(token_similarities_fast, patches, words, mask), outcome(token_similarities, patches, words, mask)
    assert_same([*found[:2], found[3].sum(1)], [*expected[:2], expected[3].sum(1)], 1e-12)


def test_what_tokens_keep():
    n, p, t, d = 12, 49, 16, 8
    patches, words, mask = unit(n, p, d, dtype=torch.float32), unit(n, t, d, dtype=torch.float32), torch.ones(n, t, dtype=bool)
    winners, inputs = 2 * n * n * (p + t), 4 * n * (p + t) * d
    assert kept(token_similarities_fast, patches, words, mask) <= winners + 3 * inputs
    assert kept(token_similarities, patches, words, mask) >= 4 * n * n * p * t > 4 * (winners + 3 * inputs)
    patches, words = unit(n, p, 256, dtype=torch.float32), unit(n, t, 256, dtype=torch.float32)
    all_at_once, by_three = (kept(gloria_scores_fast, patches, words, mask, tile=k) for k in (None, 3))
    assert 3 * by_three < all_at_once < kept(gloria_scores, patches, words, mask) / 2


# ---- transport

def problems(b=4, p=7, s=5, *, dtype=torch.float64):
    cost, mask = 1 - unit(b, p, 8, dtype=dtype) @ unit(b, s, 8, seed=1, dtype=dtype).mT, torch.arange(s) < torch.tensor([s, 2, 1, 0])[:, None]
    mass = normal(b, p, seed=2, dtype=dtype).exp() * (torch.arange(p) != 3)
    return cost, mass / mass.sum(1, keepdim=True), mask.to(dtype) / mask.sum(1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('epsilon', [.03, .05, .1, 1.])
@pytest.mark.parametrize('iterations', [1, 5, 50])
def test_plans_equal_the_log_domain(dtype, epsilon, iterations):
    inputs = problems(dtype=dtype)
    options = dict(epsilon=epsilon, iterations=iterations)
    difference = (sinkhorn_fast(*inputs, **options) - sinkhorn(*(o.double() for o in inputs), **options)).abs().max()
    assert difference < (1e-5 if dtype == torch.float32 else 1e-12)


def test_plans_up_to_the_edge_of_the_range():
    "At the largest exponent that the kernel form accepts in single precision, against double precision in the log domain."
    cost, a, b = problems(b=4, p=40, s=12, dtype=torch.float32)
    cost, b = cost * 2 / (cost.amax((1, 2), True) - cost.amin((1, 2), True)), torch.full_like(b, 1 / 12)
    plan, limit = sinkhorn_fast(cost, a, b, epsilon=2 / 66., iterations=200), sinkhorn(cost.double(), a.double(), b.double(), epsilon=2 / 66., iterations=200)
    assert (plan - limit).abs().max() < 1e-5
    assert not torch.equal(plan, sinkhorn(cost, a, b, epsilon=2 / 66., iterations=200)), 'the kernel form was not used'


def test_small_epsilon_gives_way_to_the_log_domain():
    inputs = problems(dtype=torch.float32)
    plan = sinkhorn_fast(*inputs, epsilon=.002)
    assert plan.isfinite().all() and torch.equal(plan, sinkhorn(*inputs, epsilon=.002))
    with pytest.raises(ValueError, match='expected more than 0'): sinkhorn_fast(*inputs, epsilon=0)


def test_padding_costs_do_not_matter():
    cost, a, b = problems()
    padding = ~((a > 0)[:, :, None] & (b > 0)[:, None])
    for value in (-1e6, 1e6): torch.testing.assert_close(sinkhorn_fast(cost.masked_fill(padding, value), a, b), sinkhorn_fast(cost, a, b))
    assert sinkhorn_fast(cost, a, b)[padding].abs().max() == 0


def test_gradient_through_the_iterations():
    cost, a, b = problems()
    options = dict(iterations=9, gradient=True)
    assert_same(outcome(lambda c: sinkhorn_fast(c, a, b, **options), cost), outcome(lambda c: sinkhorn(c, a, b, **options), cost), 1e-9)
    assert torch.autograd.gradcheck(lambda c: sinkhorn_fast(c, a, b, epsilon=.2, **options), cost.requires_grad_())
    assert not sinkhorn_fast(cost, a, b).requires_grad


def test_plans_equal_pot():
    ot = pytest.importorskip('ot', reason='install POT to compare with it')
    cost, a, b = problems(b=1, p=6)
    for c, row, column in zip(*(o[:1] for o in (cost, a, b))):
        theirs = ot.sinkhorn(row[row > 0], column, c[row > 0], .05, numItermax=2000, stopThr=0, warn=False)
        assert (sinkhorn_fast(c[None], row[None], column[None], iterations=2000)[0][row > 0] - theirs).abs().max() < 1e-9


# ---- the switch

def test_every_fast_path_takes_what_its_definition_takes():
    import inspect
    for readable, fast in FAST.items():
        ours, theirs = (inspect.signature(o).parameters for o in (fast, readable))
        assert list(theirs) == [o for o in ours if o != 'tile'], readable.__name__
        assert all(ours[k].default == o.default and ours[k].kind == o.kind for k, o in theirs.items()), readable.__name__


def test_faster_replaces_defaults():
    def term(e, *, similarities=token_similarities, temperature=.1): return similarities, temperature
    assert faster(term)(None) == (token_similarities_fast, .1)
    assert faster(functools.partial(term, temperature=.2))(None) == (token_similarities_fast, .2)
    assert faster(contrastive) is contrastive_tiled and faster(info_nce) is info_nce_tiled
    def plain(e): return e
    assert faster(plain) is plain


def test_contrastive_tiled_in_one_process():
    e = Embeddings(image=unit(9, 4), text=unit(9, 4, seed=1), scale=torch.tensor(14.3, dtype=torch.float64))
    torch.testing.assert_close(contrastive_tiled(e), contrastive(e))


# ---- accelerators

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an accelerator')
def test_same_on_an_accelerator():
    on = lambda inputs: [o.cuda() for o in inputs]
    pairs = unit(300, 64, dtype=torch.float32), unit(300, 64, seed=1, dtype=torch.float32), torch.tensor(14.3)
    assert_same(outcome(with_scale(info_nce_tiled), *on(pairs), tile=100), outcome(with_scale(info_nce), *on(pairs)))
    inputs = on(tokens(9, 25, 7, 12, 64, dtype=torch.float32))
    for readable, fast in TOKENS.values():
        for tile in (None, 2): assert_same(outcome(fast, *inputs, tile=tile), outcome(readable, *inputs))
    inputs = on(problems(dtype=torch.float32))
    assert (sinkhorn_fast(*inputs) - sinkhorn(*inputs)).abs().max() < 1e-5
