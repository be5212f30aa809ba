"Pretrained pairs of Hugging Face and open_clip: same outputs in, through and out again (random tiny models)."
import string

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (AutoTokenizer, BertConfig, CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerFast,
                          SiglipConfig, SiglipModel)

from medcl_study.core import DataError, read_json, write_json
from medcl_study.encoders.checkpoints import PretrainedEncoder, load_checkpoint, load_encoder

TEXTS = ['no pleural effusion', 'Small left-sided effusion, no nodule.', 'a', 'chest radiograph with ' + 'nodule '*30]
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
TEXT = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)


def images(size=32):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, size, size), dtype=np.uint8))


def byte_letters():
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    return list(bytes_to_unicode().values())


def clip_tokenizer():
    letters = byte_letters()
    merges = [('n', 'o</w>'), ('e', 'f'), ('n', 'o'), ('no', 'd')]
    names = ['<|pad|>', *letters, *(o + '</w>' for o in letters), *(a + b for a, b in merges), '<|startoftext|>', '<|endoftext|>']
    return CLIPTokenizer(vocab={o: i for i, o in enumerate(names)}, merges=merges, pad_token='<|endoftext|>', model_max_length=16)


def word_tokenizer():
    "Words without special tokens in front, one end token behind, padded to a fixed length: SigLIP's habits."
    from tokenizers import Tokenizer as Backend, models, normalizers, pre_tokenizers, processors
    words = ['<pad>', '</s>', '<unk>', *sorted({w for o in TEXTS for w in o.lower().split()}), *string.ascii_lowercase]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token='<unk>'))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token='<pad>', eos_token='</s>', unk_token='<unk>',
                                   model_max_length=16)


def scramble(model):
    "Move every weight away from its initial value, so that nothing passes because it is zero or one."
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05*torch.randn_like(p))
    return model.eval()


def hf_clip(folder, act='quick_gelu'):
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    config = CLIPConfig(vision_config=VISION | dict(hidden_act=act), projection_dim=20,
                        text_config=TEXT | dict(hidden_act=act, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                                                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model = scramble(CLIPModel(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder/'preprocessor_config.json', dict(image_mean=[.4, .5, .6], image_std=[.2, .3, .25], size={'shortest_edge': 32}))
    return model


def hf_siglip(folder):
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = SiglipConfig(vision_config=VISION, text_config=TEXT | dict(
        vocab_size=len(tokenizer), projection_size=32, bos_token_id=1, eos_token_id=1, pad_token_id=0))
    model = scramble(SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(np.log(117.3))
        model.logit_bias.fill_(-12.9)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def hf_outputs(folder):
    "What the source library makes of the folder, with its own tokenizer."
    kind = read_json(folder/'config.json')['model_type']
    model = {'clip': CLIPModel, 'siglip': SiglipModel}[kind].from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding='max_length', truncation=True, max_length=16, return_tensors='pt')
    mask = {'attention_mask': tokens['attention_mask']} if kind == 'clip' else {}
    mean, std = ((.4, .5, .6), (.2, .3, .25)) if kind == 'clip' else ((.5,)*3, (.5,)*3)
    pixels = (images()/255 - torch.tensor(mean).view(3, 1, 1))/torch.tensor(std).view(3, 1, 1)
    out = model(input_ids=tokens['input_ids'], pixel_values=pixels, **mask)
    return out.image_embeds, out.text_embeds, out.logits_per_image


@torch.no_grad()
def our_outputs(encoder):
    image, text = encoder.encode_image(images(encoder.config.image_size)).global_, encoder.encode_text(TEXTS).global_
    logits = encoder.scale*image @ text.T
    return image, text, logits if encoder.bias is None else logits + encoder.bias


def same(a, b):
    for x, y in zip(a, b, strict=True): torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


HF = {'clip': hf_clip, 'siglip': hf_siglip}


@pytest.mark.parametrize('kind', HF)
def test_hugging_face(kind, tmp_path):
    "Loaded, saved, loaded, exported, and read by transformers: always the same outputs."
    HF[kind](tmp_path/'source')
    expected = hf_outputs(tmp_path/'source')
    state = torch.get_rng_state()
    encoder = load_checkpoint(tmp_path/'source')
    assert torch.equal(state, torch.get_rng_state())
    same(our_outputs(encoder), expected)
    encoder.save(tmp_path/'saved')
    again = load_encoder(tmp_path/'saved')
    assert isinstance(again, PretrainedEncoder)
    assert all(torch.equal(a, b) for a, b in zip(our_outputs(again), our_outputs(encoder)))
    again.export(tmp_path/'exported')
    same(hf_outputs(tmp_path/'exported'), expected)
    same(our_outputs(load_checkpoint(tmp_path/'exported')), expected)
    for name, text in encoder.checkpoint.files.items(): assert (tmp_path/'exported'/name).read_text() == text


def batch(encoder):
    tokens = encoder.tokenizer(TEXTS[:3], max_tokens=encoder.config.max_tokens)
    return {'images': images(encoder.config.image_size)[:, None], 'tokens': torch.from_numpy(tokens.ids),
            'token_mask': torch.from_numpy(tokens.mask), 'sentence_index': torch.from_numpy(tokens.sentences)}


def loss_of(e):
    logits = e.scale*e.image @ e.text.T + (0 if e.bias is None else e.bias)
    return F.cross_entropy(logits, torch.arange(len(logits)))


def check_training(encoder):
    "One step moves towers, projections and scale; masking and locking do what they say."
    encoder.train()
    data = batch(encoder)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-3)
    before = loss_of(encoder(data))
    before.backward()
    missing = [k for k, p in encoder.named_parameters() if p.grad is None or (not p.grad.any() and k != 'bias')]
    unused = ('pooler', 'k_proj.bias', 'in_proj_bias')  # the key's bias cancels in the softmax
    assert not [k for k in missing if not k.endswith(unused)], missing
    optimizer.step()
    assert loss_of(encoder(data)) < before
    full = encoder.ask(patches=True, words=True, sentences=True, mask_ratio=.5 if encoder.image.drops_patches else 0)(data)
    rows, columns = encoder.image.patch_grid
    assert full.patches.shape[1] == (rows*columns//2 if encoder.image.drops_patches else rows*columns)
    assert full.words.shape[:2] == full.word_mask.shape == data['tokens'].shape and full.sentences.shape[0] == 3
    encoder.ask()
    for k, some in ((0, False), (1, True)):
        encoder.freeze(lock_image=k, lock_text=0)
        learning = any(p.requires_grad for o in (encoder.image, encoder.image_head) for p in o.parameters())
        assert learning == some and not any(p.requires_grad for o in (encoder.text, encoder.text_head) for p in o.parameters())


@pytest.mark.parametrize('kind', HF)
def test_hugging_face_trains(kind, tmp_path):
    HF[kind](tmp_path)
    check_training(load_checkpoint(tmp_path))


def test_padding_is_part_of_siglip(tmp_path):
    "A text alone and the same text beside a long one give the same vector, and the padding is seen."
    hf_siglip(tmp_path)
    encoder = load_checkpoint(tmp_path)
    alone, beside = encoder.encode_text(['a']).global_, encoder.encode_text(['a', TEXTS[3]]).global_[:1]
    torch.testing.assert_close(alone, beside)
    encoder.text.pad_id = 2
    assert not torch.allclose(encoder.encode_text(['a']).global_, alone, atol=1e-3)


def test_scale_of_siglip_is_not_cut(tmp_path):
    hf_siglip(tmp_path)
    encoder = load_checkpoint(tmp_path)
    encoder.clamp_()
    assert abs(encoder.scale.item() - 117.3) < .01 and abs(encoder.bias.item() + 12.9) < 1e-4


def test_wrong_activation_is_refused(tmp_path):
    "QuickGELU weights with a GELU configuration: by request, in a saved folder, and in an exported one."
    hf_clip(tmp_path/'source')
    encoder = load_checkpoint(tmp_path/'source', activation='quick_gelu')
    assert encoder.checkpoint.activation == {'image': 'quick_gelu', 'text': 'quick_gelu'}
    with pytest.raises(DataError, match='trained with gelu, this configuration builds quick_gelu'):
        load_checkpoint(tmp_path/'source', activation='gelu')
    encoder.save(tmp_path/'saved')
    encoder.export(tmp_path/'exported')
    for file, inner in ((tmp_path/'saved'/'config.json', ('checkpoint', 'model')), (tmp_path/'exported'/'config.json', ())):
        config = part = read_json(file)
        for key in inner: part = part[key]
        part['vision_config']['hidden_act'] = 'gelu'
        write_json(file, config)
        with pytest.raises(DataError, match='image weights were trained with quick_gelu, this configuration builds gelu'):
            (load_encoder if inner else load_checkpoint)(file.parent)


def test_refusals(tmp_path):
    with pytest.raises(DataError, match='no such folder'): load_checkpoint(f'local-dir:{tmp_path}/none')
    (tmp_path/'bert').mkdir()
    write_json(tmp_path/'bert'/'config.json', {'model_type': 'bert', 'auto_map': {'AutoModel': 'evil.Model'}})
    with pytest.raises(DataError, match="model_type is 'bert'. Expected clip or siglip"): load_checkpoint(tmp_path/'bert')
    hf_clip(tmp_path/'clip')
    config = read_json(tmp_path/'clip'/'config.json')
    config['vision_config']['hidden_size'] = 48
    write_json(tmp_path/'clip'/'config.json', config)
    with pytest.raises(DataError, match='is missing or of another shape'): load_checkpoint(tmp_path/'clip')
    with pytest.raises(DataError, match='not a saved pretrained pair'): PretrainedEncoder.load(tmp_path/'clip')


# ---- open_clip

def open_clip_folder(folder, **changes):
    "A random open_clip model in its own folder format, and its outputs."
    open_clip = pytest.importorskip('open_clip', reason='needs the extra `clip` (open_clip)')
    config = {'embed_dim': 20, 'quick_gelu': True,
              'vision_cfg': dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8),
              'text_cfg': dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=2)}
    for key, value in changes.items(): config[key] = config[key] | value if isinstance(value, dict) else value
    folder.mkdir(parents=True)
    if name := config['text_cfg'].get('hf_model_name'):
        write_json(folder/'text'/'config.json', name)
        config['text_cfg']['hf_model_name'] = str(folder/'text')
        word_tokenizer().save_pretrained(folder)
    write_json(folder/'open_clip_config.json', {'model_cfg': config, 'preprocess_cfg': dict(
        mean=[.4, .5, .6], std=[.2, .3, .25], resize_mode='squash', interpolation='bicubic')})
    torch.manual_seed(0)
    model = open_clip.create_model(f'local-dir:{folder}', pretrained_text=False)
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in scramble(model).state_dict().items()}, folder/'open_clip_model.safetensors')
    return folder


@torch.no_grad()
def open_clip_outputs(folder):
    import open_clip
    model = open_clip.create_model(f'local-dir:{folder}', require_pretrained=True).eval()
    tokens = open_clip.get_tokenizer(f'local-dir:{folder}')(TEXTS)
    seen = model.visual.preprocess_cfg
    size = seen['size'] if isinstance(seen['size'], int) else seen['size'][0]
    pixels = (images(size)/255 - torch.tensor(seen['mean']).view(3, 1, 1))/torch.tensor(seen['std']).view(3, 1, 1)
    image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    logits = model.logit_scale.exp()*image @ text.T
    return image, text, logits if model.logit_bias is None else logits + model.logit_bias


BERT = BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                  max_position_embeddings=16, pad_token_id=0).to_dict()
OPEN_CLIP = {
    'openai': {},
    'custom_text': {'custom_text': True, 'quick_gelu': False, 'vision_cfg': dict(pool_type='avg', final_ln_after_pool=True)},
    'siglip': {'init_logit_bias': -10., 'custom_text': True, 'quick_gelu': False, 'text_cfg': dict(
        no_causal_mask=True, pool_type='last', proj_bias=True)},
    'timm_classifier': {'custom_text': True, 'quick_gelu': False, 'vision_cfg': dict(
        timm_model_name='test_vit', timm_pool='token', timm_proj='', image_size=160)},
    'timm_cnn': {'custom_text': True, 'quick_gelu': False, 'vision_cfg': dict(
        timm_model_name='test_resnet', timm_pool='avg', timm_proj='mlp', image_size=160)},
    'biomedclip': {'custom_text': True, 'quick_gelu': False, 'text_cfg': dict(
        hf_model_name=BERT, hf_tokenizer_name='words', hf_proj_type='mlp', hf_pooler_type='cls_last_hidden_state_pooler'),
        'vision_cfg': dict(timm_model_name='test_vit', timm_pool='', timm_proj='linear', image_size=160)},
}


@pytest.mark.parametrize('kind', OPEN_CLIP)
def test_open_clip(kind, tmp_path):
    "Loaded, saved, loaded, exported, and read by open_clip: always the same outputs; then one step of training."
    source = open_clip_folder(tmp_path/'source', **OPEN_CLIP[kind])
    expected = open_clip_outputs(source)
    encoder = load_checkpoint(f'local-dir:{source}')
    same(our_outputs(encoder), expected)
    assert encoder.checkpoint.resize == 'stretch'
    encoder.save(tmp_path/'saved')
    again = load_encoder(tmp_path/'saved')
    assert all(torch.equal(a, b) for a, b in zip(our_outputs(again), our_outputs(encoder)))
    again.export(tmp_path/'exported')
    same(open_clip_outputs(tmp_path/'exported'), expected)
    check_training(again)


@pytest.mark.parametrize('vision, message', [
    (dict(layers=[1, 1, 1, 1], width=16), 'ModifiedResNet in this form is not supported'),
    (dict(attentional_pool=True, attn_pooler_heads=2), 'VisionTransformer in this form is not supported'),
    (dict(timm_model_name='resnet10t', timm_pool='abs_attn', timm_proj='', image_size=224), 'TimmModel in this form is not supported')])
def test_unsupported_towers_are_named(vision, message, tmp_path):
    source = open_clip_folder(tmp_path/'source', vision_cfg=vision, custom_text=True)
    with pytest.raises(DataError, match=message): load_checkpoint(source)


def test_open_clip_refusals(tmp_path):
    source = open_clip_folder(tmp_path/'source')
    config = read_json(source/'open_clip_config.json')
    write_json(source/'open_clip_config.json', config | {'model_cfg': config['model_cfg'] | {'embed_dim': 24}})
    with pytest.raises(DataError, match='do not fit'): load_checkpoint(source)
    write_json(source/'open_clip_config.json', config | {'model_cfg': config['model_cfg'] | {'multimodal_cfg': {}}})
    with pytest.raises(DataError, match='CoCa checkpoints are not supported'): load_checkpoint(source)
    write_json(source/'open_clip_config.json', config)
    (source/'open_clip_model.safetensors').unlink()
    with pytest.raises(DataError, match='no weights. Expected one of open_clip_model.safetensors'): load_checkpoint(source)


def test_open_clip_activation(tmp_path):
    "The flag quick_gelu and the weights must agree."
    source = open_clip_folder(tmp_path/'source')
    encoder = load_checkpoint(source)
    assert encoder.checkpoint.activation == {'image': 'quick_gelu', 'text': 'quick_gelu'}
    encoder.export(tmp_path/'exported')
    config = read_json(tmp_path/'exported'/'open_clip_config.json')
    config['model_cfg']['quick_gelu'] = False
    write_json(tmp_path/'exported'/'open_clip_config.json', config)
    with pytest.raises(DataError, match='trained with quick_gelu, this configuration builds gelu'): load_checkpoint(tmp_path/'exported')


def test_open_clip_tokenizer(tmp_path):
    "open_clip's own tokenizer and ours give the same ids, but for what stands in the padding."
    source = open_clip_folder(tmp_path/'source')
    import open_clip
    ours, theirs = load_checkpoint(source).tokenizer, open_clip.get_tokenizer(f'local-dir:{source}')
    texts = TEXTS + ['Cardiomegaly (CTR 0.55); no pneumothorax.', "The patient's lungs are clear!", 'naïve  Überweisung 3.5 cm']
    tokens = ours(texts, pad_to=16)
    assert (np.where(tokens.mask, tokens.ids, 0) == theirs(texts).numpy()).all()
