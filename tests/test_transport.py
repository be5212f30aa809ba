"""Optimal transport against POT and closed forms; its terms against loops, numerical gradients and two processes."""
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from medcl_study.embeddings import Embeddings
from medcl_study.losses.contrast import info_nce
from medcl_study.losses.tokens import token_similarities
from medcl_study.losses.transport import (matched_similarity, patch_sentence, patch_sentence_late,
                                          patch_sentence_within, sinkhorn, transport_similarity)

TERMS = {'between': patch_sentence, 'within': patch_sentence_within, 'late': patch_sentence_late}


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def unit(*shape, seed=0): return torch.nn.functional.normalize(draw(*shape, seed=seed), dim=-1)


def problem(b=3, p=7, s=4, seed=0):
    "Costs between 0 and 2, and random marginals."
    cost = 1 - unit(b, p, 5, seed=seed) @ unit(b, s, 5, seed=seed + 1).mT
    return cost, draw(b, p, seed=seed + 2).softmax(1), draw(b, s, seed=seed + 3).softmax(1)


def batch(n=6, p=5, d=8, counts=(3, 2, 1, 3, 0, 2), seed=0, dtype=torch.float64):
    "Pairs whose patches repeat what their sentences say; the fifth report is empty."
    mask = torch.arange(max(counts))[None] < torch.tensor(counts[:n])[:, None]
    topics = unit(n, max(counts), d, seed=seed)
    patches = topics[:, torch.arange(p) % max(counts)] + .3 * unit(n, p, d, seed=seed + 1)
    patches = torch.nn.functional.normalize(patches, dim=-1)
    return Embeddings(image=unit(n, d, seed=seed + 2).to(dtype), text=unit(n, d, seed=seed + 3).to(dtype),
                      scale=torch.tensor(10., dtype=dtype), patches=patches.to(dtype),
                      sentences=(topics * mask[..., None]).to(dtype), sentence_mask=mask)


# ---- the plan

@pytest.mark.parametrize('epsilon', [.05, .2, 1.])
def test_plan_equals_pot(epsilon):
    ot = pytest.importorskip('ot', reason='install POT to compare with it')
    cost, a, b = problem()
    ours = sinkhorn(cost, a, b, epsilon=epsilon, iterations=3000)
    for plan, *o in zip(ours, cost, a, b):
        c, row, column = (x.numpy() for x in o)
        theirs = ot.sinkhorn(row, column, c, epsilon, method='sinkhorn_log', numItermax=3000, stopThr=1e-12, warn=False)
        torch.testing.assert_close(plan, torch.from_numpy(theirs), atol=1e-7, rtol=1e-5)


def test_every_iteration_equals_pot():
    "After k iterations too: POT meets columns before rows, so it gets the transposed problem."
    ot = pytest.importorskip('ot', reason='install POT to compare with it')
    cost, a, b = problem(b=1)
    for k in (1, 2, 5):
        ours = sinkhorn(cost, a, b, epsilon=.1, iterations=k)[0]
        theirs = ot.sinkhorn(b[0].numpy(), a[0].numpy(), cost[0].T.numpy(), .1, method='sinkhorn_log', numItermax=k,
                             stopThr=0, warn=False)
        torch.testing.assert_close(ours, torch.from_numpy(theirs).T, atol=1e-12, rtol=1e-9)


def test_equals_plain_scaling():
    "The same iteration on exp(−C/ε) itself, one number at a time."
    cost, a, b = problem(b=1, p=4, s=3)
    kernel = [[math.exp(-c / .2) for c in row] for row in cost[0].tolist()]
    rows, columns = range(4), range(3)
    v = [1.] * 3
    for _ in range(20):
        u = [a[0, i].item() / sum(kernel[i][j] * v[j] for j in columns) for i in rows]
        v = [b[0, j].item() / sum(kernel[i][j] * u[i] for i in rows) for j in columns]
    expected = torch.tensor([[[u[i] * kernel[i][j] * v[j] for j in columns] for i in rows]], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(cost, a, b, epsilon=.2, iterations=20), expected)


@settings(max_examples=20, deadline=None)
@given(p=st.integers(1, 9), s=st.integers(1, 6), seed=st.integers(0, 1000))
def test_marginals(p, s, seed):
    cost, a, b = problem(2, p, s, seed)
    plan = sinkhorn(cost, a, b, epsilon=.1, iterations=500)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(2), a, atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(1), b, atol=1e-12, rtol=0)
    if s == 1: torch.testing.assert_close(plan[..., 0], a)


def test_limits_of_epsilon():
    cost, a, b = problem(b=1, p=4, s=4)
    torch.testing.assert_close(sinkhorn(cost, a, b, epsilon=1e4), a[:, :, None] * b[:, None], atol=1e-5, rtol=1e-3)
    uniform = torch.full((1, 4), .25, dtype=torch.float64)
    best = torch.zeros(4, 4, dtype=torch.float64)
    best[linear_sum_assignment(cost[0].numpy())] = .25
    sharp = sinkhorn(cost, uniform, uniform, epsilon=2e-3, iterations=5000)
    torch.testing.assert_close(sharp[0], best, atol=1e-3, rtol=0)


def test_single_precision_survives_a_tiny_epsilon():
    cost, a, b = (o.float() for o in problem())
    plan = sinkhorn(cost, a, b, epsilon=1e-4, iterations=200)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(1), b, atol=1e-5, rtol=0)


@pytest.mark.parametrize('gradient', [True, False])
def test_padding_is_invisible(gradient):
    cost, a, b = problem()
    wide = torch.nn.functional.pad(cost, (0, 3, 0, 2), value=-5.).requires_grad_()
    pad = torch.nn.functional.pad
    plan = sinkhorn(wide, pad(a, (0, 2)), pad(b, (0, 3)), gradient=gradient)
    torch.testing.assert_close(plan[:, :7, :4].detach(), sinkhorn(cost, a, b))
    assert plan[:, 7:].count_nonzero() == 0 and plan[..., 4:].count_nonzero() == 0
    (plan * wide).sum().backward()
    assert wide.grad.isfinite().all()
    assert wide.grad[:, 7:].count_nonzero() == 0 and wide.grad[..., 4:].count_nonzero() == 0


@pytest.mark.parametrize('gradient', [True, False])
def test_no_mass_is_no_plan(gradient):
    cost, a, b = problem()
    cost.requires_grad_()
    plan = sinkhorn(cost, a, b * torch.tensor([1., 0., 1.]).double()[:, None], gradient=gradient)
    assert plan[1].count_nonzero() == 0 and plan[0].sum() > .99
    (plan * cost).sum().backward()
    assert cost.grad.isfinite().all() and cost.grad[1].count_nonzero() == 0


def test_gradient_through_the_plan():
    cost, a, b = problem(b=2, p=3, s=2)
    b[1, 1], b[1, 0] = 0, 1
    solve = lambda c: sinkhorn(c, a, b, epsilon=.3, iterations=4, gradient=True)
    assert torch.autograd.gradcheck(solve, cost.requires_grad_())
    assert not sinkhorn(cost, a, b).requires_grad


def test_a_constant_plan_is_the_gradient_of_the_regularised_cost():
    "Envelope theorem: d(⟨P,C⟩ − εH(P))/dC = P at convergence, though P itself moves with C."
    cost, a, b = problem(b=1, p=3, s=3)
    def value(c):
        plan = sinkhorn(c, a, b, epsilon=.3, iterations=400, gradient=True)
        return (plan * c + .3 * plan * plan.log()).sum()
    value(cost.requires_grad_()).backward()
    torch.testing.assert_close(cost.grad, sinkhorn(cost.detach(), a, b, epsilon=.3, iterations=400), atol=1e-9, rtol=0)


def test_epsilon_must_be_positive():
    with pytest.raises(ValueError, match='expected more than 0'): sinkhorn(*problem(), epsilon=0.)


# ---- similarities

def test_similarity_equals_loops():
    e = batch()
    found = transport_similarity(e.patches, e.sentences, e.sentence_mask, chunk=4)
    for i in range(6):
        for j in range(6):
            s = int(e.sentence_mask[j].sum())
            if s == 0:
                assert found[i, j] == 0
                continue
            cosines = e.patches[i] @ e.sentences[j, :s].T
            plan = sinkhorn(1 - cosines[None], cosines.new_full((1, 5), 1 / 5), cosines.new_full((1, s), 1 / s))[0]
            assert found[i, j].item() == pytest.approx(sum((plan * cosines).flatten().tolist()), rel=1e-10)
    torch.testing.assert_close(matched_similarity(e.patches, e.sentences, e.sentence_mask), found.diag())


def test_late_similarity_equals_loops():
    e = batch()
    i2t, t2i = token_similarities(e.patches, e.sentences, e.sentence_mask)
    for i in range(6):
        for j in range(6):
            s = int(e.sentence_mask[j].sum())
            cosines = (e.patches[i] @ e.sentences[j, :s].T).tolist()
            assert i2t[i, j].item() == pytest.approx(sum(max(row) for row in cosines) / 5 if s else 0)
            assert t2i[j, i].item() == pytest.approx(sum(max(column) for column in zip(*cosines)) / s if s else 0)


def test_weights_are_masses():
    e = batch()
    weight = draw(6, 5, seed=9).exp()
    for scale in (1., 7.):
        found = transport_similarity(e.patches, e.sentences, e.sentence_mask, weight=scale * weight)
        expected = ((weight / weight.sum(1, keepdim=True))[..., None] * e.patches).sum(1) @ e.sentences[2, 0]
        torch.testing.assert_close(found[:, 2], expected) # one sentence takes all the mass


# ---- terms

def loops(e, logits, temperature=.1):
    "InfoNCE between pairs with a sentence, one exponential at a time."
    real = [i for i in range(len(e)) if e.sentence_mask[i].any()]
    i2t, t2i = ([[o / temperature for o in row] for row in m.tolist()] for m in logits) # rows: images, reports
    total = 0.
    for i in real:
        total -= math.log(math.exp(i2t[i][i]) / sum(math.exp(i2t[i][j]) for j in real))
        total -= math.log(math.exp(t2i[i][i]) / sum(math.exp(t2i[i][j]) for j in real))
    return total / (2 * len(real))


def test_terms_equal_loops():
    e = batch()
    score = transport_similarity(e.patches, e.sentences, e.sentence_mask)
    assert patch_sentence(e).item() == pytest.approx(loops(e, (score, score.T)), rel=1e-10)
    late = token_similarities(e.patches, e.sentences, e.sentence_mask)
    assert patch_sentence_late(e).item() == pytest.approx(loops(e, late), rel=1e-10)
    diagonal = score.diag().tolist()
    for least, rows in {2: (0, 1, 3, 5), 1: (0, 1, 2, 3, 5)}.items():
        expected = -sum(diagonal[i] for i in rows) / len(rows)
        assert patch_sentence_within(e, least=least).item() == pytest.approx(expected, rel=1e-10)


def test_one_patch_and_one_sentence_is_clip():
    e = batch(counts=(1, 1, 1, 1, 1, 1), p=1)
    expected = info_nce(e.patches[:, 0], e.sentences[:, 0], scale=10.).item()
    for term in (patch_sentence, patch_sentence_late):
        assert term(e).item() == pytest.approx(expected, rel=1e-10)
        assert term(e, temperature=None).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize('name', TERMS)
def test_invariances(name):
    e, term = batch(), TERMS[name]
    loss = term(e).item()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    patches = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    wide = dataclasses.replace(e, sentences=torch.nn.functional.pad(e.sentences, (0, 0, 0, 2)),
                               sentence_mask=torch.nn.functional.pad(e.sentence_mask, (0, 2)))
    moved = dataclasses.replace(e, patches=e.patches[:, patches], sentences=e.sentences.flip(1),
                                sentence_mask=e.sentence_mask.flip(1))
    for other in (e.rows(order), wide, moved, e.rows([0, 1, 2, 3, 5])):
        assert term(other).item() == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize('name', TERMS)
def test_breaking_a_pair_raises_the_loss(name):
    e = batch()
    swapped = torch.tensor([3, 1, 2, 0, 4, 5])
    broken = dataclasses.replace(e, sentences=e.sentences[swapped], sentence_mask=e.sentence_mask[swapped])
    assert TERMS[name](broken) > TERMS[name](e) + .1


@pytest.mark.parametrize('name', TERMS)
def test_gradient(name):
    "Numerical gradients; the plan's own movement is part of them only where the gradient goes through it."
    e = batch(n=3, p=3, d=4, counts=(2, 0, 2))
    options = {} if name == 'late' else dict(gradient=True, epsilon=.3, iterations=4)
    def loss(patches, sentences):
        real = sentences * e.sentence_mask[..., None]
        return TERMS[name](dataclasses.replace(e, patches=patches, sentences=real), **options)
    assert torch.autograd.gradcheck(loss, (e.patches.requires_grad_(), e.sentences.requires_grad_()))


@pytest.mark.parametrize('name', TERMS)
def test_reports_without_sentences(name):
    "Nothing at all gives 0 with a graph; one empty report gets no gradient and no NaN reaches the others."
    e = batch(n=3, counts=(0, 0, 1))
    none = dataclasses.replace(e, sentence_mask=torch.zeros_like(e.sentence_mask), patches=e.patches.requires_grad_())
    loss = TERMS[name](none)
    loss.backward()
    assert loss == 0 and none.patches.grad.count_nonzero() == 0
    e = batch()
    e.patches.requires_grad_(), e.sentences.requires_grad_()
    TERMS[name](e).backward()
    assert e.patches.grad.isfinite().all() and e.sentences.grad.isfinite().all()
    assert e.patches.grad[4].count_nonzero() == 0 and e.sentences.grad[4].count_nonzero() == 0
    assert e.patches.grad[0].norm() > 0 and e.sentences.grad[0].norm() > 0


@pytest.mark.parametrize('name', TERMS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_close_in_half_precision(name, dtype):
    "Embeddings rounded to 16 bits, as the trainer hands them over in float32."
    e = batch(dtype=torch.float32)
    rounded = e.map(lambda o: o.to(dtype).float() if o.is_floating_point() else o)
    assert TERMS[name](rounded).item() == pytest.approx(TERMS[name](e).item(), abs=.02)


# ---- several processes

def value_and_gradients(rows):
    "Compute each term and its gradients at the rows that a rank holds."
    found = {}
    for name, term in TERMS.items():
        e = batch().rows(rows)
        keep = max(1, int(e.sentence_mask.sum(1).max())) # as an encoder pads: to the longest report of the rank
        e.sentences, e.sentence_mask = e.sentences[:, :keep], e.sentence_mask[:, :keep]
        e.patches.requires_grad_(), e.sentences.requires_grad_()
        loss = term(e)
        loss.backward()
        found[name] = loss.detach(), e.patches.grad, e.sentences.grad
    return found


def test_two_processes_equal_one(two_processes):
    "The mean over ranks of loss and gradient is that of the global batch, with unlike paddings and an empty report."
    ranks = two_processes(lambda r: value_and_gradients(torch.tensor([[0, 3, 4], [1, 2, 5]][r])))
    full = value_and_gradients(torch.tensor([0, 3, 4, 1, 2, 5]))
    for name in TERMS:
        (one, *first), (two, *second), (both, *whole) = (o[name] for o in (*ranks, full))
        torch.testing.assert_close((one + two) / 2, both)
        for a, b, c in zip(first, second, whole):
            for half, part in ((a, c[:3]), (b, c[3:])): torch.testing.assert_close(half / 2, part[:, :half.shape[1]])
