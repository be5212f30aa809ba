"""Losses on words against loops and full logits; the captioner is causal, blind to padding, and writes what it saw."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rows
from medcl_study.embeddings import Embeddings
from medcl_study.encoders.captioner import AttentionalPooler, Captioner, WordPrediction, generate
from medcl_study.losses.contrast import contrastive
from medcl_study.losses.generative import captioning, masked_language, token_nll
from medcl_study.trainer import Autocast, MicroBatches

TERMS = {captioning: 'caption', masked_language: 'mlm'}


def toy(n=4, t=6, words=7, seed=0):
    "Logits, true words and a mask; no row needs to have a True."
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, t, words, generator=g, dtype=torch.float64)
    return logits, torch.randint(words, (n, t), generator=g), torch.rand(n, t, generator=g) < .6


def true_logprob(logits, words): return logits.log_softmax(-1).gather(2, words[..., None])[..., 0]


def embeddings(kind, logprob, mask):
    x = torch.nn.functional.normalize(torch.randn(len(mask), 4, generator=torch.Generator().manual_seed(9)), dim=-1)
    return Embeddings(x, x, torch.tensor(10.), extras={f'{kind}_logprob': logprob, f'{kind}_mask': mask})


def by_loops(logits, words, mask):
    "Sum −log of each counting word's share of the exponentials, and divide by how many count."
    total, count = 0., 0
    for scores, targets, counts in zip(logits.tolist(), words.tolist(), mask.tolist()):
        for row, word, here in zip(scores, targets, counts):
            if here: total, count = total - math.log(math.exp(row[word]) / sum(map(math.exp, row))), count + 1
    return total / max(1, count)


@pytest.mark.parametrize('term', TERMS)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 6), t=st.integers(1, 7), seed=st.integers(0, 1000))
def test_equals_loops_and_cross_entropy(term, n, t, seed):
    logits, words, mask = toy(n, t, seed=seed)
    loss = term(embeddings(TERMS[term], true_logprob(logits, words), mask))
    assert loss.item() == pytest.approx(by_loops(logits, words, mask), rel=1e-10, abs=1e-12)
    if mask.any(): torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[mask], words[mask]))


def test_equals_open_clip():
    "CoCaLoss takes full logits (n, t, words), and ignores the id of the padding."
    open_clip_loss = pytest.importorskip('open_clip.loss', reason='install the extra `clip` to compare with open_clip')
    logits, words, mask = toy()
    words = torch.where(mask, words.clamp(min=1), 0)
    e = embeddings('caption', true_logprob(logits, words), mask)
    theirs = open_clip_loss.CoCaLoss(caption_loss_weight=2., clip_loss_weight=1., pad_id=0)
    clip, caption = theirs(e.image, e.text, logits, words, e.scale)
    torch.testing.assert_close(2 * captioning(e), caption)
    torch.testing.assert_close(contrastive(e), clip)


@pytest.mark.parametrize('term', TERMS)
def test_gradcheck_and_no_gradient_at_padding(term):
    logits, words, mask = toy(2, 3)
    mask[0, 0], mask[1, 2] = True, False
    logits.requires_grad_()
    loss = lambda logits: term(embeddings(TERMS[term], true_logprob(logits, words), mask))
    assert torch.autograd.gradcheck(loss, logits)
    grad, = torch.autograd.grad(loss(logits), logits)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).all()


@pytest.mark.parametrize('term', TERMS)
def test_permutation_padding_and_nothing(term):
    logits, words, mask = toy()
    logprob, kind = true_logprob(logits, words), TERMS[term]
    loss, order = term(embeddings(kind, logprob, mask)), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(term(embeddings(kind, logprob[order], mask[order])), loss)
    pad = lambda x, value: torch.nn.functional.pad(x, (0, 3), value=value)
    torch.testing.assert_close(term(embeddings(kind, pad(logprob, -1e9), pad(mask, False))), loss)
    logprob.requires_grad_()
    nothing = term(embeddings(kind, logprob, mask & False))
    nothing.backward()
    assert nothing == 0 and (logprob.grad == 0).all()


@pytest.mark.parametrize('term', TERMS)
def test_a_less_likely_word_costs(term):
    logits, words, mask = toy()
    logprob = true_logprob(logits, words)
    worse = logprob.clone()
    i, j = mask.nonzero()[0]
    worse[i, j] -= 1
    rise = term(embeddings(TERMS[term], worse, mask)) - term(embeddings(TERMS[term], logprob, mask))
    assert rise.item() == pytest.approx(1 / mask.sum().item())


@pytest.mark.parametrize('term', TERMS)
def test_what_is_missing_is_named(term):
    e = embeddings('other', *[torch.ones(4, 2, dtype=torch.bool)] * 2)
    with pytest.raises(ValueError, match=f"extras\\['{TERMS[term]}_logprob'\\], which the head"): term(e)


def test_half_precision_stays_close():
    logits, words, mask = toy()
    exact = token_nll(true_logprob(logits, words), mask).item()
    for dtype in (torch.bfloat16, torch.float16):
        assert token_nll(true_logprob(logits.to(dtype).float(), words), mask).item() == pytest.approx(exact, abs=.02)


# ---- heads

@pytest.fixture(scope='module')
def setting():
    "A small encoder with a captioner, and eight pairs."
    texts = [f'{a} nodule in the {b} {c} lobe.' for a in ('small', 'large') for b in ('left', 'right')
             for c in ('upper', 'lower')]
    encoder, batch, vocabulary = rows.small_setting(texts, max_tokens=16)
    encoder.heads['captioner'] = Captioner(encoder, vocabulary, width=32)
    return encoder.ask(), batch, vocabulary


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), t=st.integers(1, 6))
def test_word_prediction_equals_full_softmax(seed, t):
    torch.manual_seed(seed)
    vocabulary = [1, 2, 5, 6, 9]
    words = WordPrediction(vocabulary, 4, 12).double()
    states, tokens = torch.randn(3, t, 4, dtype=torch.float64), torch.randint(12, (3, t))
    logprob, counts = words(states, tokens, torch.rand(3, t) < .7)
    full = words.score(states).log_softmax(-1)
    for i in range(3):
        for j in range(t):
            expected = full[i, j, vocabulary.index(tokens[i, j])].item() if counts[i, j] else 0
            assert logprob[i, j].item() == pytest.approx(expected)
    assert not (counts & ~torch.isin(tokens, torch.tensor(vocabulary))).any()


@pytest.mark.parametrize('vocabulary', [[], [3, 2], [2, 2], [-1, 3], [5, 12]])
def test_bad_vocabularies_are_refused(vocabulary):
    with pytest.raises(ValueError, match='from 0 to 11 in ascending order'): WordPrediction(vocabulary, 4, 12)


def test_pooler_ignores_order_of_patches():
    torch.manual_seed(0)
    pooler, patches = AttentionalPooler(6, 8, heads=2, queries=3).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(pooler(patches[:, [3, 1, 4, 0, 2]]), pooler(patches))


def test_captioner_counts_each_true_token_once(setting):
    encoder, batch, _ = setting
    e = encoder(batch)
    expected = batch['token_mask'].clone()
    expected[:, 0] = False # nothing precedes it
    assert torch.equal(e.extras['caption_mask'], expected)
    encoder.zero_grad()
    captioning(e).backward()
    assert all(p.grad is not None for p in encoder.heads.parameters())
    assert all(p.grad is None for p in encoder.text.parameters()), 'captions must not train the text tower'
    encoder.zero_grad()


@pytest.mark.parametrize('j', [1, 4, 7])
def test_captioner_is_causal(setting, j):
    encoder, batch, vocabulary = setting
    tokens = batch['tokens'].clone()
    tokens[:, j] = vocabulary[7]
    changed = tokens[:, j] != batch['tokens'][:, j]
    before, after = (encoder(o).extras['caption_logprob'][changed] for o in (batch, batch | {'tokens': tokens}))
    torch.testing.assert_close(after[:, :j], before[:, :j])
    assert (after[:, j + 1:] - before[:, j + 1:]).abs().max() > 1e-4


def test_captioner_ignores_padding_and_what_is_in_it(setting):
    encoder, batch, vocabulary = setting
    loss = captioning(encoder(batch))
    wider = {k: torch.nn.functional.pad(batch[k], (0, 3)) for k in ('tokens', 'token_mask')}
    wider['sentence_index'] = torch.nn.functional.pad(batch['sentence_index'], (0, 3), value=-1)
    wider['tokens'] = torch.where(wider['token_mask'], wider['tokens'], vocabulary[5])
    torch.testing.assert_close(captioning(encoder(batch | wider)), loss)


def test_captioner_in_micro_batches_of_other_lengths(setting):
    encoder, batch, _ = setting
    batch = batch | {'token_mask': batch['token_mask'].clone()}
    batch['token_mask'][:4, 5:] = False
    def gradients(model):
        encoder.zero_grad()
        captioning(model(batch)).backward()
        return {k: p.grad.clone() for k, p in encoder.named_parameters() if p.grad is not None}
    full, cut = gradients(encoder), gradients(MicroBatches(encoder, 3))
    assert full.keys() == cut.keys()
    for k in full: torch.testing.assert_close(cut[k], full[k], rtol=1e-3, atol=1e-6, msg=k)


def test_captioner_in_half_precision(setting):
    encoder, batch, _ = setting
    exact, found = (captioning(model(batch)) for model in (encoder, Autocast(encoder, torch.bfloat16)))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=.02)


def test_captioner_refuses_longer_texts(setting):
    encoder, batch, _ = setting
    captioner, tokens = encoder.heads['captioner'], torch.zeros(1, 17, dtype=torch.int64)
    with pytest.raises(ValueError, match='17 tokens, but this captioner has 16'):
        captioner.states(tokens, torch.zeros(1, 4, 32))


def test_captioner_writes_what_it_saw(setting):
    "After overfitting, every image gets its own text back; before, none does."
    encoder, batch, vocabulary = setting
    torch.manual_seed(0)
    captioner = Captioner(encoder, vocabulary, width=32)
    encoder.heads['captioner'] = captioner
    images, texts = batch['images'][:, 0], [encoder.tokenizer.decode(o) for o in batch['tokens']]
    assert not set(generate(encoder, captioner, images)) & set(texts)
    parameters = [*encoder.image.parameters(), *captioner.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0)
    for _ in range(120):
        optimizer.zero_grad()
        captioning(encoder(batch)).backward()
        optimizer.step()
    assert generate(encoder, captioner, images) == texts
    order = [*range(1, 8), 0]
    assert generate(encoder, captioner, images[order]) == [texts[i] for i in order]
    wrong = captioning(encoder(batch | {'images': batch['images'][order]}))
    assert wrong > 10 * captioning(encoder(batch))


def test_writing_needs_a_tokenizer(setting):
    encoder, batch, _ = setting
    tokenizer, encoder.tokenizer = encoder.tokenizer, None
    try:
        with pytest.raises(ValueError, match='needs a tokenizer'):
            generate(encoder, encoder.heads['captioner'], batch['images'][:, 0])
    finally: encoder.tokenizer = tokenizer
