"Image towers, text towers and the dual encoder: every promise against a reference written out by hand."
import contextlib
import dataclasses
import json
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medcl_study.core import DataError, write_tensors
from medcl_study.data.loaders import PairDataset, pair_loaders
from medcl_study.data.text import Tokenizer, minilm_folder
from medcl_study.encoders import text as text_module
from medcl_study.encoders.dual import MAX_SCALE, DualEncoder, EncoderConfig
from medcl_study.encoders.image import IMAGE_TOWERS, image_tower, random_keep
from medcl_study.encoders.text import TEXT_TOWERS, sentence_means, text_tower
from medcl_study.encoders.weights import read_weights, under
from medcl_study.losses.contrast import contrastive
from medcl_study.trainer import TrainConfig, train
from toy import StopAt

REPORTS = ['No effusion. The heart is enlarged.', 'Small left pleural effusion.', 'Clear lungs.', 'Heart size is normal. No nodule.',
           'A nodule. In the right upper zone. No effusion.', 'Normal.']
TOKENIZER = Tokenizer.train(REPORTS, vocab_size=100)
CONFIG = EncoderConfig('vit_tiny_p8', 'bert_tiny', image_size=32, channels=1, dim=12, vocab_size=TOKENIZER.vocab_size,
                       text_options=dict(hidden_size=32, intermediate_size=64))
needs_minilm = pytest.mark.skipif(minilm_folder() is None, reason='the extra `minilm` is not installed')


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return DualEncoder(dataclasses.replace(CONFIG, **changes), tokenizer=TOKENIZER)


def make_batch(n=len(REPORTS), views=1, channels=1, size=32, seed=0):
    tokens, generator = TOKENIZER(REPORTS[:n]), torch.Generator().manual_seed(seed)
    return {'images': torch.randint(256, (n, views, channels, size, size), dtype=torch.uint8, generator=generator),
            'tokens': torch.from_numpy(tokens.ids), 'token_mask': torch.from_numpy(tokens.mask),
            'sentence_index': torch.from_numpy(tokens.sentences), 'text_id': torch.arange(n)}


def learning(module): return sum(o.requires_grad for o in module.parameters())
def close(a, b, tolerance=1e-5): torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)


# Image towers

@pytest.mark.parametrize('name, options, size', [
    ('vit_tiny_patch16_224', dict(depth=2, embed_dim=48), 48),
    ('vit_base_patch16_siglip_224', dict(depth=2, embed_dim=48, num_heads=3), 32),
    ('deit_tiny_distilled_patch16_224', dict(depth=2, embed_dim=48), 32),
    ('vit_base_patch16_rope_reg1_gap_256', dict(depth=2, embed_dim=64, num_heads=2), 32),
    ('resnet10t', {}, 40), ('convnext_atto', dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), 64), ('mobilenetv3_small_050', {}, 33),
    ('swin_tiny_patch4_window7_224', dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)), 64),
    ('resnet50_clip', {}, 64), ('vit_tiny_p8', {}, 24),
    ('vit_stem_p8', dict(embed_dim=64), 24), ('cnn_small', {}, 48)])
def test_image_towers_of_any_family(name, options, size):
    tower = image_tower(name, image_size=size, options=options).eval()
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        x = tower.normalise(images)
        patches, pooled = tower(x)
        theirs = tower.net(x)
    rows, columns = tower.patch_grid
    assert patches.shape == (2, rows * columns, tower.width) and pooled.shape == (2, tower.width)
    close(pooled, theirs) # what timm's own classifier would see
    assert tower(x, patches=False)[0] is None
    parameters = [id(p) for group in tower.groups() for p in group]
    assert sorted(parameters) == sorted(map(id, tower.parameters())) and all(tower.groups())


def test_patches_live_in_the_space_of_the_pooled_vector():
    tower = image_tower('convnext_atto', image_size=64, options=dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))).eval()
    with torch.no_grad():
        flat = torch.full((1, 3, 64, 64), .3)
        tower.net.stages = nn.Identity() # the stem alone: every position of a flat image is the same
        tower.net.head.norm = type(tower.net.head.norm)(8)
        patches, pooled = tower(flat)
    close(patches, pooled[:, None].expand_as(patches))


def test_grid_is_row_major():
    tower = image_tower('vit_tiny_p8', image_size=32).eval()
    with torch.no_grad():
        x = torch.zeros(2, 3, 32, 32)
        x[1, :, 8:16, 24:32] = 1 # row 1, column 3 of four by four
        tokens = tower.net.patch_embed(x)
        assert (tokens[1] - tokens[0]).abs().sum(-1).argmax() == 1 * 4 + 3


@settings(max_examples=40, deadline=None)
@given(p=st.integers(1, 300), ratio=st.floats(0, .999), seed=st.integers(0, 99))
def test_kept_patches_are_a_sorted_random_subset(p, ratio, seed):
    torch.manual_seed(seed)
    keep = random_keep(5, p, ratio=ratio)
    assert keep.shape == (5, max(1, int(p * (1 - ratio))))
    assert all(len(set(row)) == len(row) and row == sorted(row) and 0 <= row[0] <= row[-1] < p for row in keep.tolist())


def test_every_patch_is_kept_equally_often():
    torch.manual_seed(0)
    counts = torch.bincount(random_keep(4000, 16, ratio=.75).flatten(), minlength=16)
    assert (counts - 1000).abs().max() < 5 * math.sqrt(4000 * .25 * .75)


@pytest.mark.parametrize('name, options, prefix', [
    ('vit_tiny_p8', {}, 1),
    ('deit_tiny_distilled_patch16_224', dict(patch_size=8, depth=2, embed_dim=48), 2),
    ('vit_base_patch16_siglip_224', dict(patch_size=8, depth=2, embed_dim=48, num_heads=3), 0),
    ('vit_base_patch16_rope_reg1_gap_256', dict(patch_size=8, depth=2, embed_dim=64, num_heads=2), 1)])
def test_dropped_patches_never_enter_the_first_block(name, options, prefix):
    tower = image_tower(name, image_size=32, options=options).eval()
    seen = []
    tower.net.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].shape[1]))
    x, keep = torch.randn(3, 3, 32, 32), random_keep(3, 16, ratio=.75)
    with torch.no_grad():
        patches, pooled = tower(x, keep)
        assert seen == [prefix + 4] and patches.shape[1] == 4
        changed = x.clone()
        for image, kept in zip(changed, keep.tolist()): # repaint every patch that was dropped
            for j in set(range(16)) - set(kept): image[:, j // 4 * 8:j // 4 * 8 + 8, j % 4 * 8:j % 4 * 8 + 8] = 7.
        close(tower(changed, keep)[1], pooled)
        assert not torch.allclose(tower(changed)[1], tower(x)[1])
        close(tower(x, torch.arange(16).expand(3, -1))[0], tower(x)[0])
    assert tower.net.patch_drop.keep is None


def test_a_convolutional_stem_sees_the_image_and_the_blocks_only_the_kept_patches():
    tower = image_tower('vit_stem_p8', image_size=32, channels=1).eval()
    net, x, keep, seen = tower.net, torch.randn(2, 1, 32, 32), random_keep(2, 16, ratio=.5), []
    net.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        patches, pooled = tower(x, keep)
        tokens = net.patch_embed(x) + net.pos_embed
        tokens = net.blocks(torch.stack([tokens[i, keep[i]] for i in range(2)]))
    assert seen == [8, 8]
    close(pooled, net.fc_norm(tokens.mean(1)))
    close(patches, net.fc_norm(tokens))
    first = {k for k, p in net.named_parameters() if any(p is o for o in tower.groups()[0])}
    assert first == {k for k, _ in net.named_parameters() if k.startswith(('patch_embed', 'pos_embed'))}
    with pytest.raises(ValueError, match='patches of 8 pixels, not 36'): image_tower('vit_stem_p8', image_size=36)


def test_patches_are_dropped_after_the_positional_embedding():
    tower = image_tower('vit_tiny_p8', image_size=32).eval()
    net, x, keep = tower.net, torch.randn(2, 3, 32, 32), random_keep(2, 16, ratio=.6)
    with torch.no_grad():
        tokens = net.patch_embed(x) + net.pos_embed[:, 1:]
        first = (net.cls_token + net.pos_embed[:, :1]).expand(2, -1, -1)
        tokens = torch.stack([torch.cat([first[i], tokens[i, keep[i]]]) for i in range(2)])
        tokens = net.norm(net.blocks(net.norm_pre(tokens)))
        patches, pooled = tower(x, keep)
    close(patches, tokens[:, 1:])
    close(pooled, tokens[:, 0])


def test_other_networks_refuse_to_drop_patches():
    tower = image_tower('cnn_small', image_size=32)
    with pytest.raises(ValueError, match='ResNet cannot drop patches.*vision transformer'):
        tower(torch.zeros(1, 3, 32, 32), torch.zeros(1, 1).long())
    encoder = make(image_tower='cnn_small').ask(mask_ratio=.5)
    with pytest.raises(ValueError, match='cannot drop patches'): encoder(make_batch())
    assert encoder.eval()(make_batch()).image.shape == (6, 12) # not training: no mask


@pytest.mark.parametrize('channels, given', [(1, 1), (3, 3), (3, 1)])
def test_pixels_are_scaled_inside(channels, given):
    tower = image_tower('vit_tiny_p8', image_size=16, channels=channels)
    tower.mean.copy_(torch.linspace(.2, .6, channels))
    tower.std.copy_(torch.linspace(.1, .3, channels))
    images = torch.randint(256, (2, given, 16, 16), dtype=torch.uint8)
    expected = np.empty((2, channels, 16, 16), np.float32)
    for c in range(channels):
        expected[:, c] = (images[:, min(c, given - 1)].numpy() / 255 - float(tower.mean[c])) / float(tower.std[c])
    close(tower.normalise(images), torch.from_numpy(expected))


def test_images_that_do_not_fit_are_refused():
    tower = image_tower('vit_tiny_p8', image_size=16, channels=1)
    for images, message in ((torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 'images are 3 × 16 × 16, this tower expects 1 × 16 × 16'),
                            (torch.zeros(1, 1, 8, 16, dtype=torch.uint8), 'images are 1 × 8 × 16')):
        with pytest.raises(ValueError, match=message): tower.normalise(images)
    with pytest.raises(TypeError, match='float32, expected uint8'): tower.normalise(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="no image tower 'resnet_18'.*resnet18"): image_tower('resnet_18', image_size=32)


# Text towers

def loop_sentence_means(words, sentences):
    n, t, width = words.shape
    s = max(1, sentences.max() + 1)
    means, mask = np.zeros((n, s, width)), np.zeros((n, s), bool)
    for i in range(n):
        for j in range(s):
            members = [words[i, k] for k in range(t) if sentences[i, k] == j]
            if members: means[i, j], mask[i, j] = sum(members) / len(members), True
    return means, mask


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 4), t=st.integers(1, 9), most=st.integers(0, 4), seed=st.integers(0, 999))
def test_sentence_means_equal_a_loop(n, t, most, seed):
    rng = np.random.default_rng(seed)
    words, sentences = rng.normal(size=(n, t, 3)), rng.integers(-1, most, (n, t), endpoint=True)
    means, mask = sentence_means(torch.from_numpy(words), torch.from_numpy(sentences))
    expected, present = loop_sentence_means(words, sentences)
    np.testing.assert_allclose(means.numpy(), expected, atol=1e-12)
    np.testing.assert_array_equal(mask.numpy(), present)


@pytest.mark.parametrize('pooling', ['mean', 'cls', 'last'])
def test_padding_and_company_do_not_change_a_text(pooling):
    torch.manual_seed(0)
    tower = text_tower('bert_tiny', vocab_size=60, pooling=pooling).eval()
    lengths = torch.randint(1, 30, (70,)) # more than one part of 32
    mask = torch.arange(30) < lengths[:, None]
    tokens = torch.randint(5, 60, (70, 30)) * mask
    with torch.no_grad():
        words, pooled = tower(tokens, mask)
        wider, same = tower(nn.functional.pad(tokens, (0, 25)), nn.functional.pad(mask, (0, 25)))
        assert wider.shape == (70, 55, 128)
        close(same, pooled)
        close(wider[:, :30][mask], words[mask])
        for i in (0, 33, 69):
            alone = tower(tokens[i:i + 1, :lengths[i]], mask[i:i + 1, :lengths[i]])
            close(alone[1][0], pooled[i])
            close(alone[0][0], words[i, :lengths[i]])


def test_parts_by_length_have_the_gradient_of_the_whole():
    torch.manual_seed(0)
    tower = text_tower('bert_tiny', vocab_size=60)
    mask = torch.arange(12) < torch.randint(1, 12, (40, 1))
    tokens, weights = torch.randint(5, 60, (40, 12)) * mask, torch.randn(40, 128)
    (tower(tokens, mask)[1] * weights).sum().backward()
    ours = {k: p.grad.clone() for k, p in tower.named_parameters() if p.grad is not None}
    tower.zero_grad()
    hidden = tower.net(input_ids=tokens, attention_mask=mask).last_hidden_state
    means = torch.stack([o[m].mean(0) for o, m in zip(hidden, mask)])
    (means * weights).sum().backward()
    for k, p in tower.named_parameters():
        if p.grad is not None: close(ours[k], p.grad, 1e-4)


def test_attention_is_fused_and_no_parameter_is_idle():
    tower = text_tower('bert_tiny', vocab_size=60)
    assert tower.net.config._attn_implementation == 'sdpa'
    tower(torch.randint(5, 60, (3, 6)), torch.ones(3, 6, dtype=torch.bool))[1].square().sum().backward()
    assert [k for k, p in tower.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('options, blocks, pooling', [
    (dict(model_type='distilbert', dim=16, hidden_dim=32, n_heads=2, n_layers=3), 3, 'cls'),
    (dict(model_type='roberta', hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2), 2, 'cls'),
    (dict(model_type='clip_text_model', hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
          bos_token_id=1, eos_token_id=2, pad_token_id=0), 2, 'last'),
    (dict(model_type='gpt2', n_embd=16, n_head=2, n_layer=2, bos_token_id=1, eos_token_id=1), 2, 'last'),
    (dict(model_type='t5', d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2), 2, 'mean'),
    (dict(model_type='modernbert', hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
          bos_token_id=1, eos_token_id=2, pad_token_id=0, cls_token_id=3, sep_token_id=4), 2, 'mean')])
def test_text_towers_of_any_family(options, blocks, pooling, tmp_path):
    torch.manual_seed(0)
    tower = text_tower('any', options=options, vocab_size=60, pooling=pooling).eval()
    tokens, mask = torch.randint(5, 60, (2, 7)), torch.arange(7) < torch.tensor([[7], [4]])
    words, pooled = tower(tokens, mask)
    assert words.shape == (2, 7, tower.width) and pooled.shape == (2, tower.width)
    close(tower(tokens[1:, :4], mask[1:, :4])[1], pooled[1:], 1e-4)
    groups = tower.groups()
    assert len(groups) == 1 + blocks
    assert sorted(id(p) for g in groups for p in g) == sorted(map(id, tower.parameters()))
    assert tower.net.get_input_embeddings().weight is groups[0][0]
    write_tensors(tmp_path/'model.safetensors', tower.state_dict())
    json.dumps(tower.options)
    again = text_tower('any', options=tower.options, pooling=pooling, weights=tmp_path).eval()
    assert torch.equal(again(tokens, mask)[0], words)


def test_a_transformers_folder_is_a_tower(tmp_path):
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=60)
    theirs = BertModel(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens, mask = torch.randint(5, 60, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    for weights in ('hub', tmp_path):
        tower = text_tower(str(tmp_path), weights=weights).eval()
        assert tower.pooling == 'cls'
        close(tower(tokens, mask)[1], theirs(tokens, mask).last_hidden_state[:, 0])
    (tmp_path/'1_Pooling').mkdir()
    (tmp_path/'1_Pooling'/'config.json').write_text('{"pooling_mode_mean_tokens": true}')
    assert text_tower(str(tmp_path)).pooling == 'mean'
    assert str(tmp_path) not in json.dumps(tower.options)


def test_code_of_a_repository_is_never_run(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps({'model_type': 'evil', 'auto_map': {'AutoConfig': 'evil.Config', 'AutoModel': 'evil.M'}}))
    (tmp_path/'evil.py').write_text(f"open({str(tmp_path/'ran')!r}, 'w').close()\nclass Config: pass\n")
    with pytest.raises(DataError, match='no text tower'): text_tower(str(tmp_path), weights='hub')
    assert not (tmp_path/'ran').exists()


@needs_minilm
def test_minilm_is_the_packaged_model_and_minilm_2_its_first_two_layers():
    from transformers import BertModel
    tokenizer = Tokenizer.load('minilm')
    tokens = tokenizer(REPORTS)
    ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
    theirs = BertModel.from_pretrained(minilm_folder()).eval()
    with torch.no_grad():
        hidden = theirs(ids, mask, output_hidden_states=True).hidden_states
        for name, layer in (('minilm', 6), ('minilm_2', 2)):
            tower = text_tower(name, weights='hub').eval()
            words, pooled = tower(ids, mask)
            close(words[mask], hidden[layer][mask])
            close(pooled, torch.stack([h[m].mean(0) for h, m in zip(hidden[layer], mask)]))
            assert len(tower.groups()) == 1 + layer and tower.vocab_size == tokenizer.vocab_size


def test_weights_out_of_reach_are_named_with_a_remedy(monkeypatch, offline, tmp_path):
    monkeypatch.setattr(text_module, 'minilm_folder', lambda: None)
    with pytest.raises(DataError, match=r'all-MiniLM-L6-v2.*medcl_study\[minilm\]'): text_tower('minilm_2', weights='hub')
    with pytest.raises(DataError, match='no text tower.*hub name while online'): text_tower('nobody/nothing', weights='hub')
    with pytest.raises(DataError, match='nobody publishes weights'): text_tower('bert_tiny', weights='hub')
    with pytest.raises(DataError, match="weights of 'resnet10t'.*local file or folder"): image_tower('resnet10t', image_size=32, weights='hub')
    with pytest.raises(DataError, match='no such file'): image_tower('vit_tiny_p8', image_size=32, weights=tmp_path/'none.pt')


# Weights

@pytest.mark.parametrize('form', ['model.safetensors', 'net.pth', 'folder'])
def test_timm_checkpoints_load_with_classifier_channels_and_other_image_size(form, tmp_path):
    options = dict(depth=2, embed_dim=48, patch_size=8)
    source = timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=10, **options).eval()
    file = tmp_path/('pytorch_model.bin' if form == 'folder' else form)
    if file.suffix == '.safetensors': write_tensors(file, source.state_dict())
    else: torch.save({'state_dict': source.state_dict()}, file)
    weights = tmp_path if form == 'folder' else file
    tower = image_tower('vit_tiny_patch16_224', image_size=32, options=options, weights=weights).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): close(tower(x)[1], source.forward_head(source.forward_features(x), pre_logits=True))
    grey = image_tower('vit_tiny_patch16_224', image_size=64, channels=1, options=options, weights=weights)
    assert grey.patch_grid == (8, 8)
    close(grey.net.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True))


def test_towers_start_from_a_dual_encoder_with_its_pixel_statistics(tmp_path):
    first = make()
    first.image.mean.fill_(.3)
    first.save(tmp_path)
    second = DualEncoder(dataclasses.replace(CONFIG, dim=20, image_head='mlp'), image_weights=tmp_path, text_weights=tmp_path)
    for name in ('image', 'text'):
        for a, b in zip(getattr(first, name).parameters(), getattr(second, name).parameters()): assert torch.equal(a, b)
    assert second.image.mean.tolist() == first.image.mean.tolist()


def test_prefixes_and_code_in_pickles(tmp_path):
    assert under({'image.net.a': 1, 'text.b': 2}, 'image.net.', 'net.') == {'a': 1}
    assert under({'a': 1}, 'image.net.') == {'a': 1}
    class Runs:
        def __reduce__(self): return open, (str(tmp_path/'ran'), 'w')
    torch.save({'a': Runs()}, tmp_path/'evil.bin')
    with pytest.raises(DataError, match='evil.bin: not a torch file of plain tensors'): read_weights(tmp_path/'evil.bin')
    assert not (tmp_path/'ran').exists()


# The dual encoder: what is asked for

def test_only_what_is_asked_for_is_computed():
    encoder, batch = make(), make_batch(views=2)
    calls = {'image': 0, 'image_head': 0, 'text': 0, 'text_head': 0}
    for name in calls:
        getattr(encoder, name).register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    e = encoder(batch)
    assert calls == {'image': 1, 'image_head': 1, 'text': 1, 'text_head': 1}
    assert all(getattr(e, o) is None for o in ('patches', 'kept', 'words', 'word_mask', 'sentences', 'sentence_mask', 'views', 'bias'))
    e = encoder.ask(patches=True, words=True, sentences=True)(batch)
    assert calls == {'image': 2, 'image_head': 3, 'text': 2, 'text_head': 4} and e.views is None
    del batch['sentence_index'], batch['text_id']
    assert encoder.ask()(batch).text_id is None
    with pytest.raises(TypeError, match='mask_rate'): encoder.ask(mask_rate=.5)


def test_every_vector_has_unit_length_or_is_masked():
    encoder, batch = make(image_head='mlp', text_head='bias', bias_init=-10.), make_batch(views=2)
    e = encoder.ask(views=2, patches=True, words=True, sentences=True)(batch)
    for name in ('image', 'text', 'views', 'patches'): close(getattr(e, name).norm(dim=-1), torch.ones(getattr(e, name).shape[:-1]))
    for name, mask in (('words', e.word_mask), ('sentences', e.sentence_mask)): close(getattr(e, name).norm(dim=-1), mask.float())
    assert e.bias.item() == -10 and e.text_id is batch['text_id']
    assert e.sentence_mask.sum(1).tolist() == [2, 1, 1, 2, 3, 1]


def test_sentences_are_the_projected_means_of_their_tokens():
    encoder, batch = make().eval(), make_batch()
    e = encoder.ask(sentences=True)(batch)
    words = encoder.text(batch['tokens'], batch['token_mask'])[0].detach().numpy()
    means, _ = loop_sentence_means(words, batch['sentence_index'].numpy())
    projected = means @ encoder.text_head.weight.detach().numpy().T
    projected /= np.maximum(np.linalg.norm(projected, axis=-1, keepdims=True), 1e-12)
    np.testing.assert_allclose(e.sentences.detach().numpy(), projected, atol=1e-5)


def test_padding_does_not_change_embeddings():
    encoder, batch = make().eval().ask(words=True, sentences=True), make_batch()
    pad = lambda x, value: nn.functional.pad(x, (0, 9), value=value)
    padded = batch | {'tokens': pad(batch['tokens'], 0), 'token_mask': pad(batch['token_mask'], False),
                      'sentence_index': pad(batch['sentence_index'], -1)}
    a, b = encoder(batch), encoder(padded)
    t = batch['tokens'].shape[1]
    close(a.text, b.text)
    close(a.sentences, b.sentences)
    close(a.words, b.words[:, :t])
    assert b.words.shape[1] == t + 9 and not b.words[:, t:].any()


def test_masks_are_fresh_seeded_and_only_for_training():
    encoder, batch = make().ask(mask_ratio=.5, patches=True), make_batch()
    def kept(seed=None):
        if seed is not None: torch.manual_seed(seed)
        return encoder(batch).kept
    a, b = kept(1), kept()
    assert a.shape == (6, 8) and (a != b).any() and torch.equal(a, kept(1))
    assert len({tuple(row) for row in a.tolist()}) > 1 # a subset per image, not per batch
    torch.manual_seed(1)
    assert encoder(batch).patches.shape == (6, 8, 12)
    plain = encoder.eval()(batch)
    assert plain.kept is None and plain.patches.shape == (6, 16, 12)
    assert torch.equal(plain.image, encoder.ask()(batch).image)
    state = torch.get_rng_state()
    assert torch.equal(encoder.train().ask(mask_ratio=0.)(batch).image, plain.image)
    assert torch.equal(state, torch.get_rng_state()) # no draw where nothing is masked


def test_kept_names_the_patches_that_were_seen():
    encoder, batch = make().ask(mask_ratio=.75), make_batch()
    torch.manual_seed(3)
    e = encoder(batch)
    x = encoder.image.normalise(batch['images'][:, 0])
    expected = nn.functional.normalize(encoder.image_head(encoder.image(x, e.kept)[1]), dim=-1)
    close(e.image, expected)


@pytest.mark.parametrize('wishes', [dict(), dict(mask_ratio=.5, view_mask_ratio=.5), dict(view_mask_ratio=.5), dict(patches=True)])
def test_second_view(wishes):
    encoder, batch = make().ask(views=2, **wishes), make_batch(views=2)
    tokens = []
    encoder.image.net.blocks[0].register_forward_pre_hook(lambda block, inputs: tokens.append(inputs[0].shape[1]))
    assert encoder(batch).views.shape == (6, 12)
    both = {0: 17, .5: 9}[wishes.get('mask_ratio', 0)], {0: 17, .5: 9}[wishes.get('view_mask_ratio', 0)]
    assert tokens == list(both)
    e = encoder.eval()(batch)
    swapped = encoder.ask(views=2)(batch | {'images': batch['images'].flip(1)})
    close(e.views, swapped.image)
    close(e.image, swapped.views)
    with pytest.raises(ValueError, match='2 views are asked for, but the batch holds 1'): encoder(make_batch())


def test_scale_is_clamped_in_use_and_in_store():
    encoder = make()
    close(encoder.scale, torch.tensor(1 / 0.07))
    for stored, used, kept in ((9., MAX_SCALE, math.log(MAX_SCALE)), (-3., 1., 0.), (2., math.exp(2), 2.)):
        with torch.no_grad(): encoder.logit_scale.fill_(stored)
        assert encoder.scale.item() == pytest.approx(used, rel=1e-5)
        encoder.clamp_()
        assert encoder.logit_scale.item() == pytest.approx(kept, abs=1e-6)
    assert encoder.logit_scale.requires_grad and encoder(make_batch()).scale.requires_grad


# The dual encoder: freezing

def test_number_of_trainable_tensors_for_every_k():
    encoder = make()
    per_block, embeddings, norm = 12, 4, 2 # vit_tiny_p8: three blocks
    for k, expected in {0: 0, 1: per_block + norm, 2: 2 * per_block + norm, 3: 3 * per_block + norm, 4: 3 * per_block + norm + embeddings,
                        None: 3 * per_block + norm + embeddings}.items():
        assert learning(encoder.freeze(lock_image=k).image) == expected
        assert learning(encoder.image_head) == 1 and learning(encoder.text) == len(list(encoder.text.parameters()))
    for k, expected in {0: 0, 1: 16, 2: 32, None: 37}.items(): # bert_tiny: two blocks, five tensors of embeddings
        assert learning(encoder.freeze(lock_text=k).text) == expected
        assert learning(encoder.text_head) == 1 and encoder.logit_scale.requires_grad
    encoder.freeze()
    assert all(o.requires_grad for o in encoder.parameters())
    for wrong, message in ((dict(lock_image=5), 'last 5 of 4 groups'), (dict(lock_text=3), 'expected 0 to 2'), (dict(lock_text=-1), 'last -1')):
        with pytest.raises(ValueError, match=message): encoder.freeze(**wrong)


def test_clip_has_fourteen_groups_and_half_of_them_are_blocks_six_to_eleven():
    encoder = make(image_tower='vit_base_patch16_clip_quickgelu_224', channels=3, pretrained_heads=True,
                   image_options=dict(embed_dim=24, num_heads=2))
    assert len(encoder.image.groups()) + 1 == 14
    encoder.freeze(lock_image=7)
    names = {k for k, p in encoder.named_parameters() if p.requires_grad and k.startswith('image')}
    assert {k.split('.')[3] for k in names if '.blocks.' in k} == {'6', '7', '8', '9', '10', '11'}
    assert {k for k in names if '.blocks.' not in k} == {'image.net.norm.weight', 'image.net.norm.bias', 'image_head.weight'}
    first = [k for k, p in encoder.image.net.named_parameters() if any(p is o for o in encoder.image.groups()[0])]
    assert first == ['cls_token', 'pos_embed', 'patch_embed.proj.weight', 'norm_pre.weight', 'norm_pre.bias']
    encoder.freeze(lock_image=14)
    assert all(o.requires_grad for o in encoder.parameters())


def test_a_pretrained_projection_freezes_with_its_tower_and_a_fresh_one_never_does():
    for pretrained in (True, False):
        encoder = make(pretrained_heads=pretrained)
        encoder.freeze(lock_image=0, lock_text=0)
        assert learning(encoder.image_head) == learning(encoder.text_head) == (not pretrained)
        encoder.freeze(lock_image=1, lock_text=1)
        assert learning(encoder.image_head) == learning(encoder.text_head) == 1
        assert learning(encoder.image) == (0 if pretrained else 14) and learning(encoder.text) == 16


@pytest.mark.parametrize('tower', ['vit_tiny_p8', 'resnet10t']) # resnet10t has batch norms
@pytest.mark.parametrize('k', [0, 1])
def test_frozen_parts_do_not_move(tower, k):
    encoder = make(image_tower=tower, channels=3, dropout=.3).freeze(lock_image=k, lock_text=k).train()
    before = {name: o.clone() for name, o in encoder.state_dict().items()}
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=.01, weight_decay=.5)
    for _ in range(2):
        optimizer.zero_grad()
        e = encoder(make_batch(channels=3))
        (e.image * e.text.roll(1, 0)).sum().mul(e.scale).backward()
        optimizer.step()
    assert all(p.grad is None for name, p in encoder.named_parameters() if name in frozen)
    moved = {name for name, o in encoder.state_dict().items() if not torch.equal(o, before[name])}
    assert not moved & frozen and 'image_head.weight' in moved
    if k == 0: assert not any(o.startswith(('image.', 'text.')) for o in moved) # batch statistics neither
    else: assert any(o.startswith('image.net') for o in moved) and any(o.startswith('text.net') for o in moved)


def test_frozen_parts_record_no_graph_and_drop_nothing():
    encoder, batch = make(dropout=.5).freeze(lock_image=1, lock_text=1).train(), make_batch()
    graphs = {}
    for name, module in (('image', encoder.image.net.blocks), ('text', encoder.text.net.encoder.layer)):
        for i, block in enumerate(module):
            block.register_forward_hook(lambda m, _, out, key=(name, i): graphs.__setitem__(key, (out[0] if isinstance(out, tuple) else out).requires_grad))
    encoder(batch)
    assert graphs == {('image', 0): False, ('image', 1): False, ('image', 2): True, ('text', 0): False, ('text', 1): True}
    assert not encoder.text.net.embeddings.dropout.training and encoder.text.net.encoder.layer[1].training
    encoder.freeze(lock_text=0)
    assert torch.equal(encoder(batch).text, encoder(batch).text) # all dropout is silent
    encoder.freeze()
    assert not torch.equal(encoder(batch).text, encoder(batch).text) and encoder.eval().train().text.training


class Pictures:
    "Images of some pairs, and how often they are read."
    def __init__(self, n, seed=0):
        self.reads = 0
        self.pixels = torch.randint(256, (n, 32, 32, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).numpy()
    def __len__(self): return len(self.pixels)
    def batch(self, rows):
        self.reads += 1
        return self.pixels[rows]


def trained(n=24, epochs=3, *, remember, accumulation=1, precision='fp32', ask={}, locks={}, stop=None, folder=None, rank=0, world=1, **changes):
    "Train a tiny encoder on pairs that are few enough to return; gives weights, losses, and how often each tower was asked."
    texts = [f'{a} {b}' for a in REPORTS for b in REPORTS][:n]
    data = PairDataset(Pictures(n), TOKENIZER(texts, max_tokens=32), np.arange(n))
    encoder, asked = make(**changes).ask(**ask).freeze(**locks), {'image': 0, 'text': 0}
    for name in asked: getattr(encoder, name).register_forward_hook(lambda *_, name=name: asked.update({name: asked[name] + 1}))
    if remember: encoder.remember(images=data.images, tokens=data.tokens)
    config = TrainConfig(epochs=epochs, batch_size=8, lr=1e-3, accumulation=accumulation, precision=precision, log_every=1)
    callbacks = [StopAt(stop)] if stop else []
    loaders = pair_loaders(data, data, batch_size=8, rank=rank, world=world)
    with contextlib.suppress(KeyboardInterrupt) if stop else contextlib.nullcontext():
        history = train(encoder, contrastive, loaders, config, folder=folder, callbacks=callbacks)
    if stop: return
    return encoder.state_dict(), [o['loss'] for o in history] + [o['valid_loss'] for o in history if o['valid_loss']], asked


@pytest.mark.parametrize('options', [
    dict(locks={'lock_image': 0}), dict(locks={'lock_text': 0}), dict(locks={'lock_image': 0}, accumulation=2),
    dict(locks={'lock_image': 0, 'lock_text': 0}, ask={'patches': True, 'words': True, 'sentences': True}, n=20),
    dict(locks={'lock_image': 0}, image_tower='resnet10t', channels=3), dict(locks={'lock_text': 0}, dropout=.3, accumulation=3),
    dict(locks={'lock_image': 0, 'lock_text': 0}, precision='bf16'),
], ids=str)
def test_remembered_towers_train_alike(options):
    locked = [o.removeprefix('lock_') for o in options['locks']]
    (a, losses, often), (b, found, asked) = (trained(remember=o, **options) for o in (False, True))
    exact = options.get('precision') != 'bf16'
    assert found == pytest.approx(losses, rel=1e-6 if exact else 1e-2)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-5 if exact else 5e-3) # Adam divides by small gradients
    validations = 3 * (3 if options.get('n', 24) == 24 else 2)
    for name in often: assert asked[name] == (1 + validations if name in locked else often[name])


@pytest.mark.parametrize('lock', ['lock_image', 'lock_text'])
def test_an_interrupted_run_remembers_the_same(lock, tmp_path, one_thread):
    undisturbed = trained(remember=True, locks={lock: 0})
    trained(remember=True, locks={lock: 0}, stop=5, folder=tmp_path)
    assert (tmp_path/'checkpoint.pt').exists()
    resumed = trained(remember=True, locks={lock: 0}, folder=tmp_path)
    assert resumed[1] == undisturbed[1] and all(torch.equal(o, undisturbed[0][k]) for k, o in resumed[0].items())


@pytest.mark.parametrize('lock', ['lock_image', 'lock_text'])
def test_two_processes_remember_like_one(lock, two_processes):
    "Every process holds all rows, since another epoch gives it others."
    one = trained(remember=True, locks={lock: 0})
    ranks = two_processes(lambda r: trained(remember=True, locks={lock: 0}, rank=r, world=2))
    for weights, losses, asked in ranks:
        assert losses == pytest.approx(one[1], rel=1e-4) and asked[lock.removeprefix('lock_')] == one[2][lock.removeprefix('lock_')]
        for k in weights: close(weights[k], one[0][k], 1e-4)


def test_images_alone_are_remembered_to_the_bit():
    (a, losses, _), (b, found, _) = (trained(remember=o, locks={'lock_image': 0}) for o in (False, True))
    assert found == losses and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('options', [dict(locks={'lock_image': 1, 'lock_text': 1}), dict(), dict(locks={'lock_image': 0}, ask={'mask_ratio': .5}),
                                     dict(locks={'lock_text': 0}, ask={'one_sentence': True})], ids=str)
def test_what_is_trained_masked_or_drawn_is_not_remembered(options):
    (a, losses, often), (b, found, asked) = (trained(remember=o, **options) for o in (False, True))
    assert found == losses and asked == often and all(torch.equal(a[k], b[k]) for k in a)


def test_memory_ends_with_what_it_rests_on(tmp_path):
    encoder, pictures = make().freeze(lock_image=0), Pictures(6)
    tokens, batch = TOKENIZER(REPORTS), make_batch() | {'index': torch.arange(6)}
    encoder.save(tmp_path)
    for end in (lambda: encoder.ask(words=True), lambda: encoder.freeze(lock_image=0), lambda: encoder.load_weights(tmp_path)):
        encoder.remember(images=pictures, tokens=tokens)(batch)
        assert set(encoder.sources) == set(encoder.memory) == {'image'}
        end()
        assert not encoder.sources and not encoder.memory
    assert pictures.reads == 3 and 'memory' not in str(list(encoder.state_dict()))
    encoder.remember(images=pictures)({k: v for k, v in batch.items() if k != 'index'}) # no row numbers: nothing to look up
    assert not encoder.memory


def test_heads_see_the_sentence_that_was_drawn():
    "A head on words gets the tokens, masks and sentences of the text that the tower has read."
    encoder, batch, seen = make(), make_batch(), []
    encoder.add_heads({'local': {'text': 'words', 'hidden': 8}})
    encoder.heads['local'].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    e = encoder.ask(one_sentence=True).train()(batch)
    step = seen.pop()
    assert step.words.shape[:2] == step.word_mask.shape == step.batch['sentence_index'].shape
    assert torch.equal(e.word_mask, step.word_mask) and (step.word_mask.sum(1) < batch['token_mask'].sum(1)).any()
    for index, mask in zip(step.batch['sentence_index'], step.word_mask): assert len(index[index >= 0].unique()) == 1 and mask[index >= 0].all()
    assert torch.equal(e.extras['unit_mask'], step.word_mask & (step.batch['sentence_index'] >= 0))
    encoder.eval()(batch)
    assert torch.equal(seen[0].word_mask, batch['token_mask'])


def test_only_what_a_head_follows_is_gathered(monkeypatch):
    encoder, gathered = make(), []
    encoder.add_heads({'masked_prediction': {'width': 16, 'depth': 1}, 'declip': {'vocabulary': list(range(50)), 'hidden': 16, 'queue': 4}})
    encoder.ask(mask_ratio=.5)
    e = encoder(make_batch(views=2))
    for name in ('gather', 'gather_padded'): monkeypatch.setattr(f'medcl_study.encoders.dual.{name}', lambda x: gathered.append(x.shape) or x)
    encoder.follow(e)
    assert gathered == [e.text.shape] and encoder.heads['declip'].queue.seen == len(e)


# The dual encoder: evaluation, save and load

def test_encoding_does_not_depend_on_chunks_or_order():
    encoder = make()
    images = make_batch()['images'][:, 0]
    whole = encoder.encode_image(images, patches=True)
    parts = encoder.encode_image(images.numpy(), patches=True, batch_size=4)
    for name in ('global_', 'pooled', 'patches'): close(getattr(whole, name), getattr(parts, name))
    texts = encoder.encode_text(REPORTS, words=True, sentences=True)
    backwards = encoder.encode_text(REPORTS[::-1], words=True, sentences=True, batch_size=1)
    for name in ('global_', 'pooled', 'words', 'sentences'): close(getattr(texts, name), getattr(backwards, name).flip(0))
    assert torch.equal(texts.word_mask, backwards.word_mask.flip(0)) and encoder.training
    assert not texts.global_.requires_grad and whole.global_.shape == (6, 12)
    e = encoder.eval().ask(words=True)(make_batch())
    close(texts.words, e.words)
    with pytest.raises(ValueError, match='no texts'): encoder.encode_text([])
    with pytest.raises(ValueError, match='no images'): encoder.encode_image(images[:0])


def test_long_texts_are_cut_to_the_settings():
    encoder = make(max_tokens=8)
    assert encoder.encode_text(['effusion ' * 50], words=True).words.shape == (1, 8, 12)
    with pytest.raises(ValueError, match='max_tokens 600: bert_tiny reads at most 512'): make(max_tokens=600)
    with pytest.raises(ValueError, match='tokens, bert_tiny knows only 50'): make(vocab_size=50)


@pytest.mark.parametrize('changes', [dict(), dict(image_tower='resnet10t', channels=3, image_head='mlp', text_head='bias', bias_init=-10.),
                                     dict(dim=96, image_head='none', pooling='cls', image_options=dict(depth=1))])
def test_saved_encoders_give_identical_outputs(changes, tmp_path):
    encoder, batch = make(**changes), make_batch()
    encoder(batch) # moves batch statistics
    with torch.no_grad(): encoder.logit_scale.add_(.5)
    encoder.eval().save(tmp_path)
    again = DualEncoder.load(tmp_path)
    assert not again.training and again.config == encoder.config
    for e in (encoder, again): e.ask(patches=True, words=True, sentences=True)
    a, b = encoder(batch), again(batch)
    for name in ('image', 'text', 'patches', 'words', 'sentences', 'scale'): assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(encoder.encode_text(REPORTS).global_, again.encode_text(REPORTS).global_)
    assert torch.equal(encoder.encode_image(batch['images'][:, 0]).pooled, again.encode_image(batch['images'][:, 0]).pooled)


def test_loading_needs_no_hub_and_leaves_the_generator_alone(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(text_module, 'minilm_folder', lambda: None)
    small = TEXT_TOWERS['minilm_2']['options'] | dict(hidden_size=24, intermediate_size=32, num_attention_heads=2)
    make(text_tower='minilm_2', text_options=small).save(tmp_path)
    state = torch.get_rng_state()
    assert DualEncoder.load(tmp_path).config.text_tower == 'minilm_2'
    assert torch.equal(state, torch.get_rng_state())


def test_another_architecture_is_refused_by_file_tensor_and_shapes(tmp_path):
    make(dim=12).save(tmp_path/'a')
    other = make(dim=20)
    before = other.image_head.weight.clone()
    with pytest.raises(DataError) as e: other.load_weights(tmp_path/'a')
    for part in (str(tmp_path/'a'), "'image_head.weight'", '(12, 96)', '(20, 96)', 'another architecture'): assert part in str(e.value)
    assert torch.equal(before, other.image_head.weight)
    make(image_options=dict(depth=2)).save(tmp_path/'b')
    with pytest.raises(DataError, match=r"'image.net.blocks.2.*' is absent in the file, expected \(96,\)"): make().load_weights(tmp_path/'b')
    make().save(tmp_path/'c')
    with pytest.raises(DataError, match=r"is \(96,\) in the file, expected absent"): make(image_options=dict(depth=2)).load_weights(tmp_path/'c')
    settings_file = tmp_path/'c'/'config.json'
    saved = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps(saved | {'encoder': saved['encoder'] | {'dim': 16}}))
    with pytest.raises(DataError, match=r"\(12, 96\) in the file, expected \(16, 96\)"): DualEncoder.load(tmp_path/'c')
    settings_file.write_text(json.dumps(saved | {'encoder': saved['encoder'] | {'depth': 16}}))
    with pytest.raises(DataError, match='not the settings of a dual encoder'): DualEncoder.load(tmp_path/'c')
    with pytest.raises(DataError, match='no such file'): DualEncoder.load(tmp_path/'nowhere')


def test_settings_are_strict_and_names_are_checked():
    with pytest.raises(TypeError, match='image_towr'): EncoderConfig(image_towr='vit_tiny_p8')
    with pytest.raises(ValueError, match="head 'conv': expected one of linear, bias, mlp, none"): make(image_head='conv')
    with pytest.raises(ValueError, match="head 'none' needs a tower of the joint width 12, this one has 96"): make(image_head='none')
    with pytest.raises(ValueError, match='has no tokenizer'): DualEncoder(CONFIG).encode_text(['x'])
    assert set(IMAGE_TOWERS) >= {'vit_small_p8', 'vit_tiny_p8', 'vit_stem_p8', 'cnn_small'} and set(TEXT_TOWERS) == {'minilm', 'minilm_2', 'bert_tiny'}
    assert image_tower('vit_small_p8', image_size=64).width == 192


def test_the_small_networks_learn_a_toy_problem():
    encoder, batch = make(), make_batch()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        e = encoder(batch)
        logits, targets = e.scale * e.image @ e.text.T, torch.arange(6)
        loss = (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T, targets)) / 2
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        encoder.clamp_()
    assert abs(losses[0] - math.log(6)) < 1.5 and losses[-1] < .2, losses
