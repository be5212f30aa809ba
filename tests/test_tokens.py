"""Token losses against loops written from the formulas, numerical gradients, two processes, open_clip and POT."""
import dataclasses
import math

import pytest
import torch

from medcl_study.embeddings import Embeddings
from medcl_study.encoders import dual
from medcl_study.losses.contrast import info_nce
from medcl_study.losses.tokens import (attended, balanced_codes, filip, filip_unpaired, gloria, gloria_global,
                                       gloria_scores, mgca, mgca_prototypes, sparc, sparse_weights, token_similarities,
                                       within_pair_losses)

ACROSS = {'filip': filip, 'gloria': gloria, 'gloria_global': gloria_global}
LOSSES = {**ACROSS, 'filip_unpaired': filip_unpaired, 'sparc': sparc, 'mgca': mgca, 'mgca_prototypes': mgca_prototypes}
NEEDS = {'filip': 'patches, words, word_mask', 'filip_unpaired': 'patches, words, word_mask',
         'sparc': 'patches, words, word_mask', 'mgca': 'patches, words, word_mask',
         'gloria': 'regions, units, unit_mask', 'mgca_prototypes': 'image_scores, text_scores'}


def unit(*shape, g): return torch.nn.functional.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def batch(n=4, p=5, t=4, d=6, seed=0, scale=5.):
    "A batch whose texts have 1 to t words, with every extra that a token loss reads."
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.cat([torch.tensor([t, 1]), torch.randint(1, t + 1, (n,), generator=g)])[:n, None]
    words, units = unit(n, t, d, g=g) * mask[..., None], 2 * unit(n, t, d, g=g) * mask[..., None]
    extras = dict(regions=2 * unit(n, p, d, g=g), units=units, unit_mask=mask,
                  region_weight=torch.rand(n, p, generator=g, dtype=torch.float64),
                  unit_weight=torch.rand(n, t, generator=g, dtype=torch.float64) * mask,
                  image_scores=unit(n, 3, g=g), text_scores=unit(n, 3, g=g))
    return Embeddings(image=unit(n, d, g=g), text=unit(n, d, g=g), patches=unit(n, p, d, g=g), words=words,
                      word_mask=mask, scale=torch.tensor(scale, dtype=torch.float64), extras=extras)


def aligned(n=6, t=3, d=8):
    "Pairs that lie on an axis of their own, tokens and all, except that tokens differ a little within a pair."
    g = torch.Generator().manual_seed(1)
    axis = torch.eye(n, d, dtype=torch.float64)
    tokens = torch.nn.functional.normalize(axis[:, None] + .5 * unit(n, t, d, g=g), dim=-1)
    mask = torch.ones(n, t, dtype=torch.bool)
    scores = axis[:, :n]
    return Embeddings(image=axis, text=axis, patches=tokens, words=tokens, word_mask=mask, scale=torch.tensor(10.),
                      extras=dict(regions=3 * tokens, units=3 * tokens, unit_mask=mask, image_scores=scores,
                                  text_scores=scores))


IMAGE_SIDE = ('regions', 'region_weight', 'image_scores')


def with_images(e, order):
    "Give the texts other images."
    extras = {k: v[order] if k in IMAGE_SIDE else v for k, v in e.extras.items()}
    return dataclasses.replace(e, image=e.image[order], patches=e.patches[order], extras=extras)


def lengthened(e, value=0., by=2):
    "Append padded tokens to the texts."
    def longer(x, fill): return torch.cat([x, torch.full_like(x[:, :1], fill).expand(-1, by, *x.shape[2:])], 1)
    extras = {k: longer(v, value if v.is_floating_point() else False) if k.startswith('unit') else v
              for k, v in e.extras.items()}
    return dataclasses.replace(e, words=longer(e.words, value), word_mask=longer(e.word_mask, False), extras=extras)


def leaves(e):
    "Detach all floating tensors and ask for their gradients."
    new = e.map(lambda o: o.detach().clone().requires_grad_() if o.is_floating_point() else o)
    return dataclasses.replace(new, scale=e.scale.detach().clone().requires_grad_())


def gradients(e):
    "Collect the gradients of `leaves` by name; zeros where there is none."
    found = {k: getattr(e, k) for k in ('image', 'text', 'patches', 'words')} | e.extras | {'scale': e.scale}
    return {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in found.items() if v.is_floating_point()}


# loops, one number at a time

def dot(a, b): return sum(x * y for x, y in zip(a, b))
def length(a): return math.sqrt(dot(a, a))
def cosine(a, b): return dot(a, b) / (length(a) * length(b))
def softmax(x): return [math.exp(o) / sum(map(math.exp, x)) for o in x]
def mean(x): return sum(x) / len(x)
def average(weights, rows): return [dot(weights, column) for column in zip(*rows)]


def cross_entropy_both(logits):
    "Return the row and the column cross entropies of a square table, averaged over the diagonal."
    def rows(table): return mean([-math.log(softmax(row)[i]) for i, row in enumerate(table)])
    return rows(logits), rows([*zip(*logits)])


def lists(e):
    "Turn patches and real words of each sample into lists."
    return e.patches.tolist(), [w[m].tolist() for w, m in zip(e.words, e.word_mask)]


def filip_by_loops(e):
    patches, words = lists(e)
    s, n = e.scale.item(), len(patches)
    i2t = [[s * mean([max(dot(v, w) for w in words[j]) for v in patches[i]]) for j in range(n)] for i in range(n)]
    t2i = [[s * mean([max(dot(v, w) for v in patches[j]) for w in words[i]]) for j in range(n)] for i in range(n)]
    return (cross_entropy_both(i2t)[0] + cross_entropy_both(t2i)[0]) / 2


def filip_unpaired_by_loops(e):
    patches, words, s, n = e.patches.tolist(), e.words.tolist(), e.scale.item(), len(e)
    real = [[r for r, o in enumerate(m) if o] for m in e.word_mask.tolist()]
    own = [[[dot(v, w) for v in patches[b]] for w in words[b]] for b in range(n)] # own[b][r][k]: matched pairs
    t2i = [[s * mean([max(own[b][r]) for r in real[a]]) for b in range(n)] for a in range(n)]
    i2t = [[s * mean([max(own[b][r][k] for r in real[a]) for k in range(len(patches[b]))]) for b in range(n)]
           for a in range(n)]
    return (cross_entropy_both(i2t)[0] + cross_entropy_both(t2i)[0]) / 2


def gloria_score_by_loops(regions, words):
    shares = [softmax([dot(v, w) for w in words]) for v in regions]
    total = 0.
    for j, w in enumerate(words):
        context = average(softmax([4 * share[j] for share in shares]), regions)
        total += math.exp(5 * cosine(context, w))
    return math.log(total)


def gloria_by_loops(e):
    regions = e.extras['regions'].tolist()
    units = [u[m].tolist() for u, m in zip(e.extras['units'], e.extras['unit_mask'])]
    return sum(cross_entropy_both([[10 * gloria_score_by_loops(v, w) for w in units] for v in regions]))


def sparc_by_loops(e):
    s, losses = e.scale.item(), []
    for patches, words in zip(*lists(e)):
        groups = []
        for w in words:
            raw = [dot(v, w) for v in patches]
            scaled = [(o - min(raw)) / (max(raw) - min(raw)) for o in raw]
            kept = [o if o >= 1 / len(patches) else 0. for o in scaled]
            groups.append(average([o / sum(kept) for o in kept], patches))
        losses.append(mean(cross_entropy_both([[s * cosine(w, c) for c in groups] for w in words])))
    return mean(losses)


def quantile(values, q):
    values, at = sorted(values), q * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def mgca_by_loops(e):
    def side(own, other, weight):
        seen = [average(softmax([10 * dot(q, k) for k in other]), other) for q in own]
        table = [[10 * cosine(q, o) for o in seen] for q in own]
        columns = [*zip(*table)]
        clipped = [min(max(w, quantile(weight, .1)), quantile(weight, .9)) for w in weight]
        return sum(w / sum(clipped) * -(math.log(softmax(table[j])[j]) + math.log(softmax(columns[j])[j])) / 2
                   for j, w in enumerate(clipped))
    patches, words = lists(e)
    word_weight = [w[m].tolist() for w, m in zip(e.extras['unit_weight'], e.word_mask)]
    patch_weight = e.extras['region_weight'].tolist()
    return mean([side(w, v, a) + side(v, w, b) for v, w, a, b in zip(patches, words, word_weight, patch_weight)])


def codes_by_loops(scores):
    "Sinkhorn as released: exponentiate, then rows to 1/K and columns to 1/B, three times (prototypes are rows)."
    q = [[math.exp(o / .05) for o in row] for row in zip(*scores)]
    total = sum(map(sum, q))
    q = [[o / total for o in row] for row in q]
    for _ in range(3):
        q = [[o / sum(row) / len(q) for o in row] for row in q]
        columns = [sum(c) for c in zip(*q)]
        q = [[o / c / len(columns) for o, c in zip(row, columns)] for row in q]
    return [[o / sum(c) for o in c] for c in zip(*q)]


def mgca_prototypes_by_loops(e):
    def cost(known, predicted):
        return mean([-sum(q * math.log(p) for q, p in zip(code, softmax([o / .2 for o in row])))
                     for code, row in zip(codes_by_loops(known), predicted)])
    image, text = e.extras['image_scores'].tolist(), e.extras['text_scores'].tolist()
    return (cost(image, text) + cost(text, image)) / 2


LOOPS = {'filip': filip_by_loops, 'filip_unpaired': filip_unpaired_by_loops, 'gloria': gloria_by_loops,
         'sparc': sparc_by_loops, 'mgca': mgca_by_loops, 'mgca_prototypes': mgca_prototypes_by_loops}


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', LOOPS)
def test_equals_loops(name, seed):
    e = batch(n=3 + seed, p=4 + seed, t=5, d=4, seed=seed, scale=3. + 5 * seed)
    assert LOSSES[name](e).item() == pytest.approx(LOOPS[name](e), rel=1e-9)


# gradients

FIELDS = {'filip': ('patches', 'words'), 'filip_unpaired': ('patches', 'words'), 'sparc': ('patches', 'words'),
          'mgca': ('patches', 'words'), 'gloria': ('regions', 'units'), 'gloria_global': ('image', 'text')}


@pytest.mark.parametrize('name', FIELDS)
def test_gradcheck(name):
    e = batch(n=3, p=3, t=3, d=3, scale=2.)
    def loss(a, b, scale):
        fields = dict(zip(FIELDS[name], (a, b)))
        extras = e.extras | {k: v for k, v in fields.items() if k in e.extras}
        return LOSSES[name](dataclasses.replace(e, **{k: v for k, v in fields.items() if k not in extras},
                                                scale=scale, extras=extras))
    inputs = [e.extras[k] if k in e.extras else getattr(e, k) for k in FIELDS[name]] + [e.scale]
    assert torch.autograd.gradcheck(loss, [o.clone().requires_grad_() for o in inputs])


def test_prototype_codes_are_targets_without_gradient():
    e = leaves(batch())
    mgca_prototypes(e).backward()
    for own, other in (('image_scores', 'text_scores'), ('text_scores', 'image_scores')):
        by_hand = (e.extras[own] / .2).softmax(1) - balanced_codes(e.extras[other])
        torch.testing.assert_close(e.extras[own].grad, by_hand / (2 * len(e) * .2))


def test_weights_carry_no_gradient():
    e = leaves(batch())
    mgca(e).backward()
    assert e.extras['unit_weight'].grad is None and e.extras['region_weight'].grad is None
    assert e.patches.grad.abs().max() > 0 and e.words.grad.abs().max() > 0


# what must not matter, and what must

@pytest.mark.parametrize('name', LOSSES)
def test_order_of_samples_does_not_matter(name):
    e = batch(n=6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(LOSSES[name](e.rows(order)), LOSSES[name](e))


@pytest.mark.parametrize('name', LOSSES)
def test_order_of_tokens_does_not_matter(name):
    e = batch(p=5, t=4)
    whole = dataclasses.replace(e, word_mask=torch.ones_like(e.word_mask), words=batch(seed=1).words + .01)
    whole.extras['unit_mask'] = whole.word_mask
    turned = whole.map(lambda o: o.flip(1) if o.shape[1:2] in ((5,), (4,)) else o)
    torch.testing.assert_close(LOSSES[name](turned), LOSSES[name](whole))


@pytest.mark.parametrize('value', [0., 7.])
@pytest.mark.parametrize('name', LOSSES)
def test_padding_changes_neither_value_nor_gradient(name, value):
    "Whatever the tower left at padded positions."
    short, long = leaves(batch()), leaves(lengthened(batch(), value))
    a, b = LOSSES[name](short), LOSSES[name](long)
    a.backward(), b.backward()
    torch.testing.assert_close(a, b)
    padded = gradients(long)
    for k, expected in gradients(short).items():
        found = padded[k]
        if found.shape != expected.shape:
            assert not found[:, expected.shape[1]:].any(), k
            found = found[:, :expected.shape[1]]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('name', sorted(LOSSES.keys() - {'filip_unpaired'}))
def test_a_broken_pair_costs(name):
    e = aligned()
    if name in ('sparc', 'mgca'): # they see one pair at a time: the wrong image must lack what the words name
        e = batch(n=6, p=4, t=4, d=16)
        e = dataclasses.replace(e, words=e.patches, word_mask=torch.ones(6, 4, dtype=torch.bool), extras={})
    broken = with_images(e, [1, 0, *range(2, 6)])
    assert LOSSES[name](broken) > LOSSES[name](e) + .1


def test_the_control_has_no_negatives():
    e = aligned()
    bases = torch.linalg.qr(torch.randn(6, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    turned = dataclasses.replace(e, patches=e.patches @ bases, words=e.words @ bases)
    torch.testing.assert_close(filip_unpaired(turned), filip_unpaired(e))
    assert (filip(turned) - filip(e)).abs() > .01
    assert filip_unpaired(e).item() == pytest.approx(math.log(6)) # every token has a perfect match: nothing to learn
    assert filip(e) < math.log(6) - 1


@pytest.mark.parametrize('name', LOSSES)
def test_bfloat16_embeddings_upcast_stay_close(name):
    e = batch(n=8, p=16, t=6, d=32).map(lambda o: o.float() if o.is_floating_point() else o)
    e = dataclasses.replace(e, scale=e.scale.float())
    rounded = e.map(lambda o: o.bfloat16().float() if o.is_floating_point() else o)
    assert LOSSES[name](rounded).item() == pytest.approx(LOSSES[name](e).item(), rel=.03)


# empty texts

def emptied(e, rows):
    mask = e.word_mask.clone()
    mask[rows] = False
    extras = e.extras | {'unit_mask': mask, 'units': e.extras['units'] * mask[..., None]}
    return dataclasses.replace(e, word_mask=mask, words=e.words * mask[..., None], extras=extras)


@pytest.mark.parametrize('name', ['filip', 'filip_unpaired', 'gloria', 'sparc', 'mgca'])
def test_texts_without_words_take_no_part(name):
    e = leaves(emptied(batch(n=5), [1, 3]))
    loss = LOSSES[name](e)
    torch.testing.assert_close(loss, LOSSES[name](e.rows([0, 2, 4])))
    loss.backward()
    for k, v in gradients(e).items():
        assert v.isfinite().all(), k
        if v.ndim: assert not v[[1, 3]].any(), k


@pytest.mark.parametrize('name', ['filip', 'filip_unpaired', 'gloria', 'sparc', 'mgca'])
def test_a_batch_without_words_is_zero_with_a_graph(name):
    e = leaves(emptied(batch(), slice(None)))
    loss = LOSSES[name](e)
    loss.backward()
    assert loss.item() == 0
    assert all(not v.any() for v in gradients(e).values())


def test_flat_similarities_and_single_words_stay_finite():
    e = leaves(dataclasses.replace(batch(), patches=batch().patches[:, :1].expand(-1, 5, -1)))
    sparc(e).backward()
    assert all(v.isfinite().all() for v in gradients(e).values())
    weights = sparse_weights(e.patches, e.words)
    torch.testing.assert_close(weights, torch.full_like(weights, .2))
    one = torch.tensor([[True, False, False, False]]).expand(4, -1)
    for loss in (sparc, mgca):
        assert loss(dataclasses.replace(batch(), word_mask=one)).isfinite()
    assert sparc(dataclasses.replace(batch(), word_mask=one)).item() == 0


# missing and wrong inputs

@pytest.mark.parametrize('name', NEEDS)
def test_missing_inputs_are_named(name):
    e = batch()
    bare = Embeddings(image=e.image, text=e.text, scale=e.scale)
    remedy = {'gloria': 'LocalHeads', 'mgca_prototypes': 'Prototypes'}.get(name, r'Request\(patches=True\), Request')
    with pytest.raises(ValueError, match=f'^{name} needs {NEEDS[name]}, .* ask for .*{remedy}'):
        LOSSES[name](bare)


def test_what_does_not_fit_is_refused():
    e = batch()
    with pytest.raises(ValueError, match='one weight per token'):
        mgca(dataclasses.replace(e, extras={'unit_weight': torch.ones(4, 3)}))
    with pytest.raises(ValueError, match='same prototypes'):
        mgca_prototypes(dataclasses.replace(e, extras=e.extras | {'text_scores': torch.ones(4, 2)}))
    for wrong in (e.words[..., :3], e.words[:, :2], e.words[0]):
        with pytest.raises(ValueError, match='expected image tokens'):
            token_similarities(e.patches, wrong, e.word_mask)
    with pytest.raises(ValueError, match='expected a bool mask'):
        gloria_scores(e.patches, e.words, e.word_mask.long())


# micro-batches and ranks

def parts(e):
    "Cut a batch in two, each padded to its own longest text only."
    def cut(o):
        t = int(o.word_mask.sum(1).max())
        extras = {k: v[:, :t] if k.startswith('unit') else v for k, v in o.extras.items()}
        return dataclasses.replace(o, words=o.words[:, :t], word_mask=o.word_mask[:, :t], extras=extras)
    return [cut(e.rows(slice(0, 3))), cut(e.rows(slice(3, 6)))]


def uneven():
    "Six texts, the last three shorter than the first."
    e = batch(n=6, t=5)
    mask = e.word_mask & (torch.arange(5) < torch.tensor([5, 5, 5, 2, 2, 2])[:, None])
    extras = e.extras | {'unit_mask': mask} | {k: e.extras[k] * mask.view(6, 5, *[1] * (e.extras[k].ndim - 2))
                                                for k in ('units', 'unit_weight')}
    return dataclasses.replace(e, word_mask=mask, words=e.words * mask[..., None], extras=extras)


@pytest.mark.parametrize('name', LOSSES)
def test_micro_batches_equal_one_batch(name):
    first, second = parts(uneven())
    assert first.words.shape[1] != second.words.shape[1]
    torch.testing.assert_close(LOSSES[name](Embeddings.cat([first, second])), LOSSES[name](uneven()))


def of_half(rank):
    "Compute every loss and its gradients on this rank's half."
    found = {}
    for name, loss in LOSSES.items():
        e = leaves(parts(uneven())[rank])
        value = loss(e)
        value.backward()
        found[name] = value.item(), gradients(e)
        half = parts(uneven())[rank]
        found[name] += (loss(emptied(half, slice(None)) if rank else half).item(),)
    return found


@pytest.fixture(scope='module')
def ranks(two_processes): return two_processes(of_half)


@pytest.mark.parametrize('name', LOSSES)
def test_two_processes_equal_one(ranks, name):
    "Values average to that of the full batch; so do gradients, each rank holding its rows' share times the ranks."
    e = leaves(uneven())
    loss = LOSSES[name](e)
    loss.backward()
    assert sum(o[name][0] for o in ranks) / 2 == pytest.approx(loss.item(), rel=1e-9)
    full = gradients(e)
    for k, expected in full.items():
        found = [o[name][1][k] for o in ranks]
        if not expected.ndim:
            torch.testing.assert_close(sum(found) / 2, expected)
            continue
        for rows, part in zip((slice(0, 3), slice(3, 6)), found):
            t = part.shape[1]
            torch.testing.assert_close(part / 2, expected[rows, :t])
            assert not expected[rows, t:].any()


@pytest.mark.parametrize('name', ['filip', 'filip_unpaired', 'gloria', 'sparc', 'mgca'])
def test_a_rank_without_words_does_not_bias_the_mean(ranks, name):
    expected = LOSSES[name](emptied(uneven(), slice(3, 6))).item()
    assert sum(o[name][2] for o in ranks) / 2 == pytest.approx(expected, rel=1e-9)


# known members and oracles

def test_single_tokens_equal_open_clip():
    open_clip_loss = pytest.importorskip('open_clip.loss', reason='install the extra `clip` to compare with open_clip')
    e = batch(n=7)
    one_word = torch.ones(7, 1, dtype=torch.bool)
    one = dataclasses.replace(e, patches=e.image[:, None], words=e.text[:, None], word_mask=one_word)
    torch.testing.assert_close(filip(one), open_clip_loss.ClipLoss()(e.image, e.text, e.scale))
    torch.testing.assert_close(gloria_global(e), 2 * open_clip_loss.ClipLoss()(e.image, e.text, 10.))


def test_modalities_swap_when_nothing_is_padded():
    e = aligned()
    i2t, t2i = token_similarities(e.patches, e.words[:, :2], e.word_mask[:, :2])
    j2t, t2j = token_similarities(e.words[:, :2], e.patches, e.word_mask)
    torch.testing.assert_close(i2t, t2j)
    torch.testing.assert_close(t2i, j2t)


def test_within_pair_losses_are_info_nce():
    e = batch()
    losses = within_pair_losses(e.words, e.extras['units'] / 2, e.word_mask, scale=4.)
    for row, a, b, m in zip(losses, e.words, e.extras['units'] / 2, e.word_mask):
        torch.testing.assert_close(row.sum() / m.sum(), info_nce(a[m], b[m], scale=4.))
        assert not row[~m].any()


def test_attention_is_that_of_torch():
    e = batch()
    found = torch.nn.functional.scaled_dot_product_attention(
        e.patches, e.words, e.words, attn_mask=e.word_mask[:, None].expand(-1, 5, -1), scale=10.)
    torch.testing.assert_close(attended(e.patches, e.words, e.word_mask), torch.nn.functional.normalize(found, dim=-1))


def test_balanced_codes_are_the_plan_of_pot():
    ot = pytest.importorskip('ot')
    scores = batch(n=6).extras['image_scores']
    a, b = torch.full((6,), 1 / 6, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)
    plan = ot.sinkhorn(a, b, -scores, reg=.5, numItermax=5000, stopThr=1e-14)
    torch.testing.assert_close(balanced_codes(scores, epsilon=.5, iterations=500), 6 * plan, rtol=1e-6, atol=1e-9)


def test_pair_scores_do_not_depend_on_the_batch():
    e = batch(n=5)
    all_pairs = gloria_scores(e.extras['regions'], e.extras['units'], e.word_mask)
    for i in range(5):
        t = int(e.word_mask[i].sum())
        alone = gloria_scores(e.extras['regions'][i:i + 1], e.extras['units'][i:i + 1, :t], e.word_mask[i:i + 1, :t])
        torch.testing.assert_close(alone[0, 0], all_pairs[i, i])


# the head

def test_prototypes_train_save_and_load_with_the_encoder(tmp_path):
    config = dual.EncoderConfig(image_tower='vit_tiny_p8', image_size=16, text_tower='bert_tiny', vocab_size=40, dim=8,
                                max_tokens=6, heads={'prototypes': {'count': 7, 'still_steps': 1}})
    torch.manual_seed(0)
    encoder = dual.DualEncoder(config)
    data = {'images': torch.randint(0, 256, (4, 1, 3, 16, 16), dtype=torch.uint8),
            'tokens': torch.randint(4, 40, (4, 6)), 'token_mask': torch.ones(4, 6, dtype=torch.bool)}
    e = encoder(data)
    mgca_prototypes(e).backward()
    head = encoder.heads['prototypes']
    assert e.extras['image_scores'].shape == (4, 7) and head.weight.grad is None
    assert encoder.image_head.weight.grad.any() and encoder.text_head.weight.grad.any()
    head.after_step(encoder, e.extras)
    mgca_prototypes(encoder(data)).backward()
    assert head.weight.grad.any() and head.steps == 1
    encoder.eval().save(tmp_path)
    again = dual.DualEncoder.load(tmp_path)
    torch.testing.assert_close(again(data).extras, encoder(data).extras)
    assert again.heads['prototypes'].steps == 1
