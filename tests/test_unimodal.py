"""Terms on second views against loops written from the formulas, lightly, cut batches, and the heads that feed them."""
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rows
from medcl_study.embeddings import Embeddings
from medcl_study.encoders.views import Declip, TextQueue, ViewProjection, delete_words, mask_words
from medcl_study.losses import contrast, unimodal
from medcl_study.losses.contrast import contrastive
from medcl_study.losses.generative import masked_language
from medcl_study.losses.unimodal import (multi_view, negative_cosine, neighbour, nt_xent, shifted_contrast,
                                         shifted_pairs, simclr, simsiam, view_contrast)
from medcl_study.trainer import Autocast, MicroBatches, micro_batches

TERMS = [view_contrast, shifted_contrast, simclr, simsiam, multi_view, neighbour]
EXTRAS = {'view_projection': (2, 5), 'view_predicted': (2, 5), 'view_target': (2, 5), 'text_view': (4,),
          'neighbour_text': (4,)}


def unit(*shape, seed=0, dtype=torch.float64):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.nn.functional.normalize(x, dim=-1)


def toy(n=8, seed=0, scale=6.):
    extras = {name: unit(n, *shape, seed=seed + i) for i, (name, shape) in enumerate(EXTRAS.items(), 3)}
    return Embeddings(image=unit(n, 4, seed=seed), text=unit(n, 4, seed=seed + 1), views=unit(n, 4, seed=seed + 2),
                      scale=torch.tensor(scale, dtype=torch.float64), extras=extras)


def matched(n=8):
    "Embeddings in which everything that belongs together is nearly alike."
    x = unit(n, 4)
    near = lambda seed: torch.nn.functional.normalize(x + .1 * unit(n, 4, seed=seed), dim=-1)
    both = torch.stack([near(1), near(2)], 1)
    return Embeddings(image=x, text=near(3), views=near(4), scale=torch.tensor(10., dtype=torch.float64),
                      extras={'view_projection': both, 'view_predicted': both, 'view_target': both,
                              'text_view': near(5), 'neighbour_text': near(6)})


def dot(a, b): return sum(x * y for x, y in zip(a, b))


def cross_entropy_loop(queries, keys, targets, scale, skip=lambda i, j: False):
    "Average −log of the share that the right key has among those that are not skipped, one exponential at a time."
    total = 0.
    for i, (query, target) in enumerate(zip(queries, targets)):
        shares = [0. if skip(i, j) else math.exp(scale * dot(query, key)) for j, key in enumerate(keys)]
        total -= math.log(shares[target] / sum(shares))
    return total / len(queries)


def info_nce_loop(x, y, scale):
    order = range(len(x))
    return (cross_entropy_loop(x, y, order, scale) + cross_entropy_loop(y, x, order, scale)) / 2


def shifted_loop(e, micro):
    "Store the features as the released program did, then take the two halves for the two views."
    stored = [o for i, v in zip(e.image.chunk(micro), e.views.chunk(micro)) for o in (*i.tolist(), *v.tolist())]
    first, second, s = stored[:len(e)], stored[len(e):], e.scale.item()
    return (info_nce_loop(first, e.text.tolist(), s) + info_nce_loop(first, second, s)) / 2


def nt_xent_loop(views, temperature):
    flat = [o for pair in views.tolist() for o in pair]
    flat = [[x / math.sqrt(dot(o, o)) for x in o] for o in flat]
    partners = [i + 1 if i % 2 == 0 else i - 1 for i in range(len(flat))]
    return cross_entropy_loop(flat, flat, partners, 1 / temperature, skip=lambda i, j: i == j)


def negative_cosine_loop(predicted, target):
    cosine = lambda a, b: dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))
    pairs = zip(predicted.tolist(), target.tolist())
    return -sum(cosine(p1, z2) / 2 + cosine(p2, z1) / 2 for (p1, p2), (z1, z2) in pairs) / len(predicted)


def by_loops(term, e):
    image, text, view, s = e.image.tolist(), e.text.tolist(), e.views.tolist(), e.scale.item()
    other, near = e.extras['text_view'].tolist(), e.extras['neighbour_text'].tolist()
    return {view_contrast: lambda: info_nce_loop(image, view, s),
            shifted_contrast: lambda: shifted_loop(e, 4),
            simclr: lambda: nt_xent_loop(e.extras['view_projection'], .1),
            simsiam: lambda: negative_cosine_loop(e.extras['view_predicted'], e.extras['view_target']),
            multi_view: lambda: (info_nce_loop(view, text, s) + info_nce_loop(image, other, s)
                                 + info_nce_loop(view, other, s)) / 3,
            neighbour: lambda: sum(cross_entropy_loop(o, near, range(len(e)), s) for o in (image, view)) / 2}[term]()


@pytest.mark.parametrize('term', TERMS)
@settings(max_examples=10, deadline=None)
@given(n=st.sampled_from([4, 8, 12]), scale=st.floats(0, 30), seed=st.integers(0, 1000))
def test_equals_loops(term, n, scale, seed):
    e = toy(n, seed, scale)
    assert term(e).item() == pytest.approx(by_loops(term, e), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize('term', TERMS)
def test_gradcheck(term):
    e = toy(4)
    names = list(e.extras)
    free = [o.clone().requires_grad_() for o in (e.image, e.text, e.views, e.scale)]
    extras = [o.clone().requires_grad_(k not in ('view_target', 'neighbour_text')) for k, o in e.extras.items()]

    def loss(image, text, views, scale, *extras):
        return term(Embeddings(image, text, scale, views=views, extras=dict(zip(names, extras))))
    assert torch.autograd.gradcheck(loss, (*free, *extras))


@pytest.mark.parametrize('term, name', [(simsiam, 'view_target'), (neighbour, 'neighbour_text')])
def test_targets_get_no_gradient(term, name):
    e = toy()
    for k in e.extras: e.extras[k].requires_grad_()
    e.image.requires_grad_()
    term(e).backward()
    assert e.extras[name].grad is None


@pytest.mark.parametrize('term', [o for o in TERMS if o is not shifted_contrast])
def test_order_of_the_batch_does_not_matter(term):
    e, order = toy(), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert term(e.rows(order)).item() == pytest.approx(term(e).item(), rel=1e-12)


@pytest.mark.parametrize('term, broken', [
    (view_contrast, 'views'), (multi_view, 'views'), (multi_view, 'text_view'), (neighbour, 'neighbour_text'),
    (simsiam, 'view_target'), (simclr, 'view_projection')])
def test_breaking_a_pair_raises_the_loss(term, broken):
    e = matched()
    for i in range(7):
        order = list(range(8))
        order[i], order[i + 1] = order[i + 1], order[i]
        if broken == 'views': worse = dataclasses.replace(e, views=e.views[order])
        elif broken == 'view_projection': # one of the two views only
            z = e.extras[broken]
            worse = dataclasses.replace(e, extras=e.extras | {broken: torch.stack([z[:, 0], z[order, 1]], 1)})
        else: worse = dataclasses.replace(e, extras=e.extras | {broken: e.extras[broken][order]})
        assert term(worse) > term(e)


@pytest.mark.parametrize('term', TERMS)
@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_average_to_the_full_batch(term, ranks, monkeypatch):
    "Values and gradients; a stand-in for `gather` finds the full tensor that the rank's rows were cut from."
    e = toy()
    leaves = [e.image, e.text, e.views, *e.extras.values()]
    for o in leaves: o.requires_grad_()
    full = term(e)
    expected = torch.autograd.grad(full, leaves, allow_unused=True)
    total = 0.
    for r in range(ranks):
        mine = slice(r * 8 // ranks, (r + 1) * 8 // ranks)
        whole = lambda x: next(o for o in leaves if o.shape[1:] == x.shape[1:] and torch.equal(o[mine], x))
        for module in (contrast, unimodal):
            monkeypatch.setattr(module, 'rank', lambda: r)
            monkeypatch.setattr(module, 'gather', lambda x: whole(x) if x.requires_grad else whole(x).detach())
        total = total + term(e.rows(mine)) / ranks
    assert total.item() == pytest.approx(full.item(), rel=1e-12)
    for found, grad in zip(torch.autograd.grad(total, leaves, allow_unused=True), expected):
        assert (found is None) == (grad is None)
        if grad is not None: torch.testing.assert_close(found, grad)


@pytest.mark.parametrize('term', TERMS)
def test_half_precision_embeddings_stay_close(term):
    e = toy(scale=50.)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = e.map(lambda o: o.to(dtype).float())
        rounded = dataclasses.replace(rounded, scale=e.scale.float())
        assert torch.isfinite(term(rounded)) and term(rounded).item() == pytest.approx(term(e).item(), rel=.03, abs=.03)


@pytest.mark.parametrize('n, d, seed', [(4, 3, 0), (16, 8, 1)])
def test_simclr_equals_lightly(n, d, seed):
    theirs = pytest.importorskip('lightly.loss.ntx_ent_loss', reason='install lightly to compare with it')
    z = unit(n, 2, d, seed=seed).requires_grad_()
    a, b = nt_xent(z, z, temperature=.1), theirs.NTXentLoss(temperature=.1)(z[:, 0], z[:, 1])
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(o, z)[0] for o in (a, b)))


@pytest.mark.parametrize('micro, text, view', [(1, 1., 1.), (2, .5, 0.), (4, .25, 0.), (8, .125, 0.)])
def test_shifted_pairs_share_right(micro, text, view):
    first, second = shifted_pairs(64, micro)
    right = torch.arange(64)
    assert (first % 64 == right).double().mean() == text and (first % 64 == second % 64).double().mean() == view
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(128)), 'every row is used once'


def test_shifted_contrast_is_wrong_where_contrast_is_right():
    e = dataclasses.replace(matched(), scale=torch.tensor(50., dtype=torch.float64))
    right = contrastive(e) / 2 + view_contrast(e) / 2
    assert shifted_contrast(e, micro=1).item() == pytest.approx(right.item(), rel=1e-12)
    assert right < math.log(8) < shifted_contrast(e)
    with pytest.raises(ValueError, match='3 equal micro-batches'): shifted_contrast(e, micro=3)


@pytest.mark.parametrize('n', [2, 8, 64])
def test_chance(n):
    same = unit(1, 4).expand(n, 4)
    e = Embeddings(same, same, torch.tensor(14.3), views=same,
                   extras={'view_projection': same[:, None].expand(n, 2, 4), 'text_view': same, 'neighbour_text': same})
    for term in (view_contrast, multi_view, neighbour): assert term(e).item() == pytest.approx(math.log(n))
    assert simclr(e).item() == pytest.approx(math.log(2 * n - 1))


@pytest.mark.parametrize('term', TERMS)
def test_what_is_missing_is_named(term):
    e = toy()
    bare = Embeddings(e.image, e.text, e.scale)
    with pytest.raises(ValueError, match="views=2|the head \\w+ fills"): term(bare)


# ---- heads

@pytest.fixture(scope='module')
def setting():
    "A small encoder, and eight pairs with three views."
    return rows.small_setting([f'small nodule in the {a} {b} lobe. no {c}.' for a in ('left', 'right')
                               for b in ('upper', 'lower') for c in ('effusion', 'cardiomegaly')], views=3)


@pytest.fixture
def declip(setting):
    encoder, batch, vocabulary = setting
    encoder.heads['declip'] = Declip(encoder, vocabulary, hidden=32, queue=16)
    yield encoder.train().ask(), batch
    del encoder.heads['declip']
    encoder.ask()


def test_declip_fills_what_its_terms_read(declip):
    encoder, batch = declip
    e = encoder(batch)
    for term in (simsiam, multi_view, neighbour, masked_language): assert torch.isfinite(term(e))
    assert neighbour(e).item() == pytest.approx(math.log(8)), 'the queue is empty'
    assert (e.extras['text_view'].norm(dim=-1) - 1).abs().max() < 1e-5
    sum(term(e) for term in (simsiam, multi_view, masked_language)).backward()
    idle = [k for k, p in encoder.named_parameters() if p.grad is None]
    assert idle == [], 'every parameter learns'
    encoder.zero_grad()


def test_declip_queue_follows_the_global_batch(declip):
    encoder, batch = declip
    first, second = encoder(batch), encoder(batch)
    encoder.follow(first)
    assert (encoder(batch).extras['neighbour_text'] == 0).all()
    encoder.follow(second)
    queue = encoder.heads['declip'].queue
    torch.testing.assert_close(queue.texts, torch.cat([first.text, second.text]).detach())
    torch.testing.assert_close(encoder(batch).extras['neighbour_text'], first.text.detach(), rtol=1e-4, atol=1e-5)


def test_micro_batches_replay_the_same_words(declip):
    "The recomputed gradient equals that of the same micro-batches kept in memory."
    encoder, batch = declip
    def gradients(model):
        encoder.zero_grad()
        torch.manual_seed(3)
        e = model(batch)
        (contrastive(e) + multi_view(e) + simsiam(e) + masked_language(e)).backward()
        return {k: p.grad.clone() for k, p in encoder.named_parameters()}
    kept = gradients(lambda batch: Embeddings.cat([encoder(o) for o in micro_batches(batch, 2)]))
    for k, grad in gradients(MicroBatches(encoder, 2)).items():
        torch.testing.assert_close(grad, kept[k], rtol=1e-4, atol=1e-6, msg=k)


def test_declip_in_half_precision(declip):
    encoder, batch = declip
    losses = []
    for model in (encoder, Autocast(encoder, torch.bfloat16)):
        torch.manual_seed(0)
        e = model(batch)
        assert all(o.dtype in (torch.float32, torch.bool) for o in e.extras.values())
        losses.append(torch.stack([term(e) for term in (simsiam, multi_view, neighbour, masked_language)]))
    torch.testing.assert_close(losses[1], losses[0], rtol=.05, atol=.05)


def test_slip_head_is_unaware_of_the_batch(setting):
    encoder, batch, _ = setting
    encoder.heads['slip'] = ViewProjection(encoder, hidden=32, dim=8)
    encoder.eval().ask()
    whole, part = (encoder({k: v[:n] for k, v in batch.items()}).extras['view_projection'] for n in (8, 3))
    torch.testing.assert_close(part, whole[:3], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='3 views'): encoder(batch | {'images': batch['images'][:, :2]})
    del encoder.heads['slip']
    encoder.ask()


@settings(max_examples=30, deadline=None)
@given(probability=st.floats(0, 1), seed=st.integers(0, 1000))
def test_deleting_words_keeps_order_ends_and_something(probability, seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (5,), generator=g)
    tokens = torch.arange(1, 9).expand(5, 8).clone()
    mask = torch.arange(8) < lengths[:, None]
    content = mask & (torch.arange(8) > 0) & (torch.arange(8) < lengths[:, None] - 1)
    torch.manual_seed(seed)
    ids, left = delete_words(tokens, mask, content, probability=probability)
    for i, n in enumerate(lengths.tolist()):
        kept = ids[i, left[i]].tolist()
        assert kept == sorted(set(kept)) and {1, n} < set(kept) <= set(range(1, n + 1))
        assert left[i].tolist() == [True] * len(kept) + [False] * (8 - len(kept))


def test_mask_words_rates():
    torch.manual_seed(0)
    tokens = torch.full((200, 500), 7)
    read, chosen = mask_words(tokens, tokens > 0, mask_id=1, vocabulary=torch.tensor([7, 8, 9, 10]))
    assert chosen.double().mean().item() == pytest.approx(.15, abs=.005)
    shares = torch.stack([(read[chosen] == o).double().mean() for o in (1, 7, 8)])
    torch.testing.assert_close(shares, torch.tensor([.8, .125, .025], dtype=torch.float64), atol=.01, rtol=0)
    assert (read[~chosen] == 7).all()


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 7), batches=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_queue_holds_the_latest(size, batches):
    queue, rows = TextQueue(size, 3), unit(sum(batches), 3, dtype=torch.float32)
    for part in rows.split(batches): queue.add(part)
    latest = rows[-size:]
    if len(rows) < size: assert (queue.nearest(rows) == 0).all()
    else: assert sorted(queue.texts.tolist()) == sorted(latest.tolist()) and torch.equal(queue.nearest(latest), latest)


def test_negative_cosine_reads_the_other_view():
    predicted, target = unit(4, 2, 3).requires_grad_(), unit(4, 2, 3, seed=1)
    negative_cosine(predicted, target).backward()
    by_hand = target.flip(1) - (predicted * target.flip(1)).sum(-1, keepdim=True) * predicted
    torch.testing.assert_close(predicted.grad, -by_hand.detach() / 8)


def test_mask_token_is_required(setting):
    encoder, _, vocabulary = setting
    tokenizer, encoder.tokenizer = encoder.tokenizer, None
    try:
        with pytest.raises(ValueError, match='mask token'): Declip(encoder, vocabulary)
    finally: encoder.tokenizer = tokenizer
