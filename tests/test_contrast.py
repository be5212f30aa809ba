"""InfoNCE against a loop written from the formula, numerical gradients, and open_clip."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medcl_study.embeddings import Embeddings
from medcl_study.losses.contrast import contrastive, info_nce, matching_loss, sigmoid, sigmoid_loss


def unit(*shape, seed=0, dtype=torch.float64):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.nn.functional.normalize(x, dim=-1)


def by_loops(image, text, scale):
    "Sum −log of the share that the right pair has in its row, and in its column, one exponential at a time."
    image, text, n, total = image.tolist(), text.tolist(), len(image), 0.
    score = lambda i, j: math.exp(scale * sum(a * b for a, b in zip(image[i], text[j])))
    for i in range(n):
        total -= math.log(score(i, i) / sum(score(i, j) for j in range(n))) / (2 * n)
        total -= math.log(score(i, i) / sum(score(j, i) for j in range(n))) / (2 * n)
    return total


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 7), d=st.integers(1, 5), scale=st.floats(0, 30), seed=st.integers(0, 1000))
def test_equals_loops(n, d, scale, seed):
    image, text = unit(n, d, seed=seed), unit(n, d, seed=seed + 1)
    expected = pytest.approx(by_loops(image, text, scale), rel=1e-10, abs=1e-12)
    assert info_nce(image, text, scale=scale).item() == expected


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 16), scale=st.floats(0, 100), seed=st.integers(0, 1000))
def test_invariances(n, scale, seed):
    image, text = unit(n, 6, seed=seed), unit(n, 6, seed=seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    loss = info_nce(image, text, scale=scale).item()
    for a, b in ((image[order], text[order]), (image @ rotation, text @ rotation), (text, image)):
        assert info_nce(a, b, scale=scale).item() == pytest.approx(loss, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize('n', [1, 2, 8, 512])
@pytest.mark.parametrize('scale', [0., 14.3, 100.])
def test_constant_similarity_costs_ln_n(n, scale):
    same = unit(1, 4).expand(n, 4)
    assert info_nce(same, same, scale=scale).item() == pytest.approx(math.log(n), abs=1e-12)


@pytest.mark.parametrize('n, scale', [(2, 1.), (8, 14.3), (32, 100.)])
def test_aligned_orthogonal_pairs(n, scale):
    axes = torch.eye(n, dtype=torch.float64)
    assert info_nce(axes, axes, scale=scale).item() == pytest.approx(math.log1p((n - 1) * math.exp(-scale)), rel=1e-9)


def test_breaking_a_pair_raises_the_loss():
    image = unit(16, 8)
    text = torch.nn.functional.normalize(image + .2 * unit(16, 8, seed=1), dim=-1)
    good = info_nce(image, text, scale=14.3)
    for i in range(15):
        order = list(range(16))
        order[i], order[i + 1] = order[i + 1], order[i]
        assert info_nce(image, text[order], scale=14.3) > good


def test_gradcheck_with_scale():
    image, text = unit(5, 4).requires_grad_(), unit(5, 4, seed=1).requires_grad_()
    scale = torch.tensor(7., dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, t, s: info_nce(i, t, scale=s), (image, text, scale))


def test_gradient_at_the_logits():
    "d loss / d logits is (row softmax + column softmax − 2·identity) / 2n, pulled back to images by the texts."
    image, text, n = unit(6, 4).requires_grad_(), unit(6, 4, seed=1), 6
    info_nce(image, text, scale=9.).backward()
    logits = 9. * image.detach() @ text.T
    at_logits = (logits.softmax(1) + logits.softmax(0) - 2 * torch.eye(n, dtype=torch.float64)) / (2 * n)
    torch.testing.assert_close(image.grad, 9. * at_logits @ text)


@pytest.mark.parametrize('ranks', [1, 2, 4])
def test_ranks_average_to_the_full_batch(ranks):
    image, text = unit(8, 4), unit(8, 4, seed=1)
    n, total = 8 // ranks, 0.
    for s in range(0, 8, n):
        total += matching_loss(image[s:s + n], text, scale=5., start=s) / 2
        total += matching_loss(text[s:s + n], image, scale=5., start=s) / 2
    assert (total / ranks).item() == pytest.approx(info_nce(image, text, scale=5.).item(), rel=1e-12)


def test_equals_open_clip():
    open_clip_loss = pytest.importorskip('open_clip.loss', reason='install the extra `clip` to compare with open_clip')
    ours = [unit(12, 16).float(), unit(12, 16, seed=1).float(), torch.tensor(14.3)]
    for o in ours: o.requires_grad_()
    theirs = [o.detach().clone().requires_grad_() for o in ours]
    a, b = info_nce(ours[0], ours[1], scale=ours[2]), open_clip_loss.ClipLoss()(*theirs)
    a.backward(), b.backward()
    torch.testing.assert_close(a, b)
    for x, y in zip(ours, theirs): torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-7)


def test_missing_keys_are_refused():
    with pytest.raises(ValueError, match='4 queries starting at key 2 need 6 keys, but there are 5'):
        matching_loss(unit(4, 3), unit(5, 3), scale=1., start=2)


def sigmoid_by_loops(image, text, scale, bias):
    "Sum −log σ(±logit) over all combinations, per image."
    image, text, total = image.tolist(), text.tolist(), 0.
    for i, u in enumerate(image):
        for j, v in enumerate(text):
            logit = scale * sum(a * b for a, b in zip(u, v)) + bias
            total += math.log1p(math.exp(-logit if i == j else logit))
    return total / len(image)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), scale=st.floats(0, 30), bias=st.floats(-12, 2), seed=st.integers(0, 1000))
def test_sigmoid_equals_loops(n, scale, bias, seed):
    image, text = unit(n, 5, seed=seed), unit(n, 5, seed=seed + 1)
    expected = sigmoid_by_loops(image, text, scale, bias)
    assert sigmoid_loss(image, text, scale=scale, bias=bias).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_sigmoid_has_the_gradient_of_its_value():
    image, text = unit(3, 4).requires_grad_(), unit(3, 4, seed=1).requires_grad_()
    scale, bias = (torch.tensor(o, dtype=torch.float64, requires_grad=True) for o in (5., -2.))
    assert torch.autograd.gradcheck(lambda i, t, s, b: sigmoid_loss(i, t, scale=s, bias=b), (image, text, scale, bias))


def test_sigmoid_agrees_with_open_clip():
    open_clip = pytest.importorskip('open_clip', reason='pip install medcl_study[clip]')
    image, text, scale, bias = unit(16, 8), unit(16, 8, seed=1), torch.tensor(10.), torch.tensor(-10.)
    theirs = open_clip.loss.SigLipLoss()(image.float(), text.float(), scale, bias)
    ours = sigmoid(Embeddings(image=image.float(), text=text.float(), scale=scale, bias=bias))
    torch.testing.assert_close(ours, theirs)
