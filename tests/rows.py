"""Every row of METHODS as a tiny encoder and a toy batch, with what is random made a function of the pair alone."""
import contextlib
import functools
from unittest import mock

import numpy as np
import torch

from medcl_study.core import seed_everything
from medcl_study.data.text import Tokenizer
from medcl_study.encoders.dual import DualEncoder, EncoderConfig
from medcl_study.methods import METHODS, find_method, method_loss
from medcl_study.trainer import MicroBatches

REPORTS = ['No effusion. The heart is enlarged.', 'Small left pleural effusion.', 'Nodule in the right upper lobe. No effusion.',
           'Clear lungs. The heart is normal. No nodule.', 'Large nodule. Clear lungs.', 'The heart is small.',
           'Right effusion. Left nodule.', 'No nodule. No effusion. The heart is large.']
SMALL = {'captioner': {'width': 16, 'queries': 4}, 'view_projection': {'hidden': 16, 'dim': 8}, 'declip': {'hidden': 16, 'queue': 4},
         'prototypes': {'count': 12}, 'local': {'hidden': 16}, 'masked_prediction': {'width': 16, 'depth': 1}}


@functools.cache
def tokenizer(): return Tokenizer.train(REPORTS, vocab_size=120)


def tokenized(texts): return text_part(tokenizer()(texts))


def text_part(tokens):
    "Make the text part of a batch."
    return {'tokens': torch.from_numpy(tokens.ids), 'token_mask': torch.from_numpy(tokens.mask),
            'sentence_index': torch.from_numpy(tokens.sentences)}


def batch(texts=REPORTS, *, size=32, seed=0):
    "Pair noise images in three views with texts."
    images = torch.randint(256, (len(texts), 3, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return {'images': images, **tokenized(texts)}


def encoder(method, *, size=32, seed=0, tok=None):
    "Build the row's encoder, tiny, asked and frozen as the row says."
    row, tok = find_method(method), tok or tokenizer()
    heads = {name: options | SMALL.get(name, {}) for name, options in row.heads.items()}
    for o in heads.values():
        if 'vocabulary' in o: o['vocabulary'] = np.arange(tok.vocab_size).tolist()
    seed_everything(seed)
    config = EncoderConfig('vit_tiny_p8', 'bert_tiny', image_size=size, channels=1, dim=16, vocab_size=tok.vocab_size,
                           image_head=row.projection, text_head=row.projection, scale_init=row.scale, bias_init=row.bias,
                           heads=heads or None)
    model = DualEncoder(config, tokenizer=tok)
    model.logit_scale.requires_grad_(row.learn_scale)
    groups = {'lock_image': model.image.groups(), 'lock_text': model.text.groups()[1:]}
    locks = {k: None if (v := getattr(row, k)) is None else min(v, len(groups[k])) for k in groups}
    return model.freeze(**locks).ask(**row.wishes)


def small_setting(texts, *, views=1, max_tokens=24):
    "Return an encoder without heads, a batch of as many noise images in one channel, and the ids that the texts use."
    torch.manual_seed(0)
    tok = Tokenizer.train(texts, vocab_size=200)
    model = DualEncoder(EncoderConfig('vit_tiny_p8', 'bert_tiny', image_size=32, channels=1, dim=16, max_tokens=max_tokens,
                                      vocab_size=tok.vocab_size), tokenizer=tok)
    images = torch.randint(256, (len(texts), views, 1, 32, 32), dtype=torch.uint8)
    data = {'images': images, **text_part(tok(texts, max_tokens=max_tokens))}
    return model, data, data['tokens'][data['token_mask']].unique().tolist()


@contextlib.contextmanager
def nothing_random():
    "Hide the same patches of every image, delete no word and hide every third, so that a pair's loss does not depend on draws."
    def keep(n, p, *, ratio, device=None): return torch.arange(0, p, round(1 / (1 - ratio)), device=device).expand(n, -1)
    def delete(tokens, mask, content, **_): return tokens, mask
    def hide(tokens, content, *, mask_id, **_):
        chosen = content & (torch.arange(tokens.shape[1]) % 3 == 1)
        return torch.where(chosen, mask_id, tokens), chosen
    def first(tokens, mask, index): return tokens, mask, index
    with (mock.patch('medcl_study.encoders.dual.random_keep', keep), mock.patch('medcl_study.encoders.dual.random_sentence', first),
          mock.patch('medcl_study.encoders.views.delete_words', delete), mock.patch('medcl_study.encoders.views.mask_words', hide)):
        yield


def still(model):
    "Let norms over the batch use what they have stored."
    for o in model.modules():
        if isinstance(o, torch.nn.modules.batchnorm._NormBase): o.eval()
    return model


def gradients(method, data, *, parts=1, reduce=None, fast=False):
    "Return (loss, gradient of each parameter by name) of one step of a row."
    model = still(encoder(method))
    with nothing_random():
        loss = method_loss(method, fast=fast)((MicroBatches(model, parts) if parts > 1 else model)(data))
        loss.backward()
    if reduce: reduce(model)
    return loss.detach(), {k: p.grad for k, p in model.named_parameters()}


def of_all_rows(data, **options):
    "Return {row: (loss, gradients)}."
    return {name: gradients(name, data, **options) for name in METHODS}
