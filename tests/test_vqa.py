"""Answering questions: what a head sees and what it does not, what its answers depend on, and that seeing pays where it should.

    pytest -m slow -s tests/test_vqa.py     a CLIP encoder trained for three minutes beats the same head without the image
"""
import dataclasses
import json
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from medcl_study.core import DataError, generator
from medcl_study.data.images import pack
from medcl_study.data.pairs import Corpus, Question, with_valid
from medcl_study.data.phantom import phantom_corpus
from medcl_study.data.sets.questions import QUESTIONS, read_vqa_rad
from medcl_study.evaluation import vqa as module
from medcl_study.evaluation.features import FeatureStore
from medcl_study.evaluation.vqa import (
    SIDES, AnswerHead, HeadConfig, answer_logits, answer_questions, answer_table, answer_task, answers_of, asked, attention_maps,
    fit_head, gain_over, question_features, question_parts)
from medcl_study.predictions import Task, measure, read_predictions, stacked, write_predictions
from rows import small_setting

pytestmark = pytest.mark.usefixtures('one_thread')
COLOURS, CORNERS = ('black', 'red', 'green'), ('upper left', 'upper right', 'lower left', 'lower right')
QUICK = HeadConfig(width=32, epochs=8, lr=5e-3, batch_size=32)
Encoded = namedtuple('Encoded', 'patches words word_mask', defaults=(None,) * 3)


class Toy:
    "Four patches, each the one-hot code of its grey; a word is a random vector of its own plus those of its question."
    def __init__(self): self.seen = []

    def encode_image(self, images, patches=False):
        self.seen.append(len(images))
        code = torch.nn.functional.one_hot((images[:, 0].flatten(1) / 80).long(), 4).float()
        return Encoded(patches=code)

    def encode_text(self, texts, words=False):
        found = [torch.stack([torch.from_numpy(generator(w).normal(size=16)).float() for w in o.split()]) for o in texts]
        each = torch.nn.utils.rnn.pad_sequence([o + o.sum(0) for o in found], batch_first=True)
        return Encoded(words=each, word_mask=each.abs().sum(2) > 0)


def corpus_of(name, n, *, split='', one_row_each=False):
    "Make n pictures of two by two greys, with a question for each corner and one that needs no picture."
    rng = generator('vqa', name)
    grey = rng.integers(3, size=(n, 4))
    asked = [(*(Question(f'what is {c}', COLOURS[g], 'open') for c, g in zip(CORNERS, o)),
              Question('is this a picture', 'yes', 'closed'), Question('is it red', 'yes' if 1 in o else 'no', 'closed')) for o in grey]
    pixels = (grey * 80).astype(np.uint8).reshape(n, 2, 2)
    frame = pd.DataFrame({'id': [f'{name}{i:03d}' for i in range(n)], 'image': '', 'text': '', 'labels': None, 'split': split,
                          'group': [f'{name} patient {i // 2}' for i in range(n)], 'modality': '', 'questions': asked})
    if not one_row_each: return Corpus(frame, name=name, pixels=pixels)
    rows = [(i, k) for i in range(n) for k in range(6)]
    each = frame.iloc[[i for i, _ in rows]].reset_index(drop=True)
    each = each.assign(image=each.id, id=[f'{each.id[j]}#{k}' for j, (_, k) in enumerate(rows)],
                       questions=[(asked[i][k],) for i, k in rows])
    return Corpus(each, name=name, pixels=pixels[[i for i, _ in rows]])


@pytest.fixture(scope='module')
def splits(): return {'train': corpus_of('train', 60), 'valid': corpus_of('valid', 12), 'test': corpus_of('test', 40)}


@pytest.fixture(scope='module')
def parts(splits): return question_parts(Toy(), answer_task('toy', splits), splits)


@pytest.fixture(scope='module')
def rows(splits): return answer_questions(Toy(), 'toy', splits, config=QUICK)


# ---- what is asked

def test_rows_of_one_question_and_rows_of_many_are_one_table():
    many, each = asked(corpus_of('x', 5)), asked(corpus_of('x', 5, one_row_each=True))
    pd.testing.assert_frame_equal(many.drop(columns='row'), each.drop(columns='row'))
    assert len(many) == 30 and many.id.is_unique and many.group.nunique() == 3
    assert many.row.tolist() == np.repeat(np.arange(5), 6).tolist() and each.row.tolist() == list(range(30))


def test_each_picture_and_each_wording_is_encoded_once(splits):
    encoder, task = Toy(), answer_task('toy', splits)
    found = question_features(encoder, corpus_of('test', 40, one_row_each=True), task)
    assert sum(encoder.seen) == 40 == len(found.patches) and len(found.first) == 6 and len(found) == 240
    assert found.patches.dtype == found.words.dtype == torch.float16
    same = question_features(Toy(), splits['test'], task)
    assert all(torch.equal(getattr(found, o), getattr(same, o)) for o in ('target', 'image', 'text', 'patches', 'words'))


def test_a_batch_gives_each_question_its_own_picture_and_words(parts):
    test, encoder = parts['test'], Toy()
    rows = torch.from_numpy(generator(1).permutation(len(test))[:25])
    patches, image, words, mask = test.batch(rows)
    assert len(patches) == len(set(test.image[rows].tolist()))
    grey = corpus_of('test', 40).pixels.reshape(40, 4)
    for k, i in enumerate(rows):
        q = test.table.iloc[int(i)]
        assert patches[image[k]].argmax(1).tolist() == (grey[q.row] // 80).tolist()
        own = encoder.encode_text([q.question]).words[0]
        assert mask[k].sum() == len(own) and torch.allclose(words[k][mask[k]], own, atol=.01)
        assert not words[k][~mask[k]].any()


def test_long_grids_are_averaged_two_by_two():
    x = np.arange(14 * 14, dtype=np.float32).reshape(1, 14, 14, 1)
    found = module._coarser(x.reshape(1, 196, 1)).reshape(7, 7)
    assert found.shape == (7, 7) and found[0, 0] == x[0, :2, :2].mean() and found[6, 3] == x[0, 12:, 6:8].mean()
    for p in (1, 64, 100, 49, 197, 225): assert module._coarser(np.ones((2, p, 3))).shape == (2, p, 3)
    assert module._coarser(np.ones((2, 576, 3))).shape == (2, 36, 3)


def test_answers_are_those_of_training_and_coverage_counts_the_others(splits):
    odd = corpus_of('odd', 10)
    odd.frame['questions'] = [(Question('what is this', ' Red. ' if i % 2 else 'violet', 'open'),) for i in range(10)]
    task = answer_task('toy', splits | {'test': odd}, licence='none')
    assert set(task.classes) == {*COLOURS, 'yes', 'no'} and task.licence == 'none' and task.source == 'real'
    table = answers_of(splits | {'test': odd}).coverage.set_index(['split', 'kind']).covered
    assert table['train', 'all'] == 1 and table['test', 'all'] == table['test', 'open'] == .5
    rows = answer_questions(Toy(), task, splits | {'test': odd}, config=dataclasses.replace(QUICK, epochs=1))
    assert (answer_table(rows).coverage == .5).all()
    true = stacked(rows.target)[:, 0]
    assert set(true) == {-1, task.classes.index('red')} and (answer_table(rows).accuracy <= .5).all()


# ---- the head

@pytest.mark.parametrize('sides', SIDES.values(), ids=list(SIDES))
def test_a_head_depends_on_what_it_is_shown_and_on_nothing_else(parts, sides):
    torch.manual_seed(0)
    head = AnswerHead(parts['train'], 5, sides=sides).eval()
    patches, image, words, mask = parts['test'].batch(torch.arange(30))
    with torch.no_grad():
        plain = head(patches, image, words, mask)[0]
        other_image = head(patches.roll(1, 0), image, words, mask)[0]
        other_words = head(patches, image, words.roll(1, 0) * mask[..., None], mask)[0]
        padding = head(patches, image, torch.nn.functional.pad(words, (0, 0, 0, 3), value=7.), torch.nn.functional.pad(mask, (0, 3)))[0]
    assert torch.equal(plain, other_image) == ('image' not in sides)
    assert torch.equal(plain, other_words) == ('question' not in sides)
    assert torch.allclose(plain, padding, atol=1e-5)


def test_all_three_heads_have_the_same_parameters(parts):
    shapes = [{k: v.shape for k, v in AnswerHead(parts['train'], 5, sides=o).state_dict().items()} for o in SIDES.values()]
    assert shapes[0] == shapes[1] == shapes[2]


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 300))
def test_the_batch_size_changes_no_answer(parts, size):
    torch.manual_seed(0)
    head = AnswerHead(parts['train'], 5)
    assert torch.allclose(answer_logits(head, parts['test'], batch_size=size), answer_logits(head, parts['test']), atol=1e-5)


def test_attention_belongs_to_words_and_sums_to_one(parts):
    torch.manual_seed(0)
    maps = attention_maps(AnswerHead(parts['train'], 5), parts['test'])
    assert [o.shape for o in maps] == [(len(q.split()), 4) for q in parts['test'].table.question]
    assert all(np.allclose(o.sum(1), 1, atol=1e-5) for o in maps)


def test_features_of_any_size_and_scale_give_the_same_head(parts):
    torch.manual_seed(0)
    scaled = {k: dataclasses.replace(v, patches=v.patches * 8 + 3, words=v.words * 4 - 1) for k, v in parts.items()}
    heads = []
    for o in (parts, scaled):
        torch.manual_seed(0)
        heads.append(AnswerHead(o['train'], 5))
    assert torch.allclose(answer_logits(heads[0], parts['test']), answer_logits(heads[1], scaled['test']), atol=.05)


def test_a_dead_unit_is_not_blown_up(parts):
    dead = dataclasses.replace(parts['train'], patches=torch.cat([parts['train'].patches, torch.full((60, 4, 1), 3.)], 2).half())
    assert torch.isfinite(answer_logits(AnswerHead(dead, 5), dead)).all() and AnswerHead(dead, 5).patch_scale[-1] == 1


# ---- training

def test_seeing_pays_and_the_interval_says_so(rows):
    table = answer_table(rows).set_index('protocol')
    assert table.accuracy['vqa'] > .9
    assert table.accuracy['vqa_question_only'] < .7 and table.accuracy['vqa_image_only'] < .6
    assert gain_over(rows)['low'] > .2 and gain_over(rows, 'vqa_image_only')['low'] > .2
    assert gain_over(rows, metric='open_accuracy')['low'] > .2
    assert gain_over(rows)['groups'] == 20 # patients of two pictures, not pictures and not questions


def test_an_encoder_that_is_blind_gains_nothing(splits):
    class Blind(Toy):
        def encode_image(self, images, patches=False): return Encoded(patches=torch.zeros(len(images), 4, 4))
    rows = answer_questions(Blind(), 'toy', splits, protocols=['vqa', 'vqa_question_only'], config=dataclasses.replace(QUICK, epochs=3))
    assert gain_over(rows)['low'] <= 0


def test_predictions_say_what_the_metrics_say(rows, tmp_path):
    table = answer_table(rows).set_index('protocol')
    for protocol, part in rows.groupby('protocol', sort=False):
        part = part.copy()
        part.attrs = rows.attrs
        for metric, column in (('vqa_accuracy', 'accuracy'), ('closed_accuracy', 'closed'), ('open_accuracy', 'open')):
            assert measure(part, metric, resamples=50).value == pytest.approx(table[column][protocol])
    write_predictions(tmp_path/'rows.parquet', rows)
    assert len(read_predictions(tmp_path/'rows.parquet')) == len(rows) == 3 * 240
    chance = stacked(rows.scores)[:, 1]
    assert (chance >= 1 / 5 - 1e-6).all() and (chance <= 1).all()


def test_order_of_pictures_and_questions_changes_no_digit(splits):
    short = dataclasses.replace(QUICK, epochs=2)
    turned = {k: v.select(generator(k).permutation(len(v))) for k, v in splits.items()}
    for o in turned.values(): o.frame['questions'] = list(o.frame.questions)
    a, b = (answer_questions(Toy(), 'toy', o, protocols=['vqa'], config=short) for o in (splits, turned))
    pd.testing.assert_frame_equal(a, b)


def test_seeds_and_draws(splits):
    short = dataclasses.replace(QUICK, epochs=1)
    def run(**kwargs): return answer_questions(Toy(), 'toy', splits, protocols=['vqa'], config=short, **kwargs)
    two, one, other = run(draws=2), run(), run(seed=1)
    assert sorted(two.draw.unique()) == [0, 1]
    assert np.array_equal(stacked(two[two.draw == 0].scores), stacked(one.scores))
    assert not np.array_equal(stacked(two[two.draw == 1].scores), stacked(one.scores))
    assert not np.array_equal(stacked(other.scores), stacked(one.scores))


def test_training_leaves_the_random_state_alone(parts):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit_head(parts['train'], parts['valid'], 5, config=dataclasses.replace(QUICK, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_is_cut_by_group_where_there_is_none(splits):
    found = question_parts(Toy(), answer_task('toy', splits), {k: splits[k] for k in ('train', 'test')})
    train, valid = (set(found[o].table.group) for o in ('train', 'valid'))
    assert train and valid and not train & valid and len(found['train']) + len(found['valid']) == 360


def test_test_answers_decide_nothing(splits, rows):
    wrong = corpus_of('test', 40)
    wrong.frame['questions'] = [tuple(dataclasses.replace(q, answer='red') for q in o) for o in wrong.frame.questions]
    found = answer_questions(Toy(), 'toy', splits | {'test': wrong}, protocols=['vqa'], config=QUICK)
    assert np.array_equal(stacked(found.scores), stacked(rows[rows.protocol == 'vqa'].scores))


def test_pixels_may_come_from_elsewhere(splits, rows):
    bare = {k: Corpus(v.frame, name=v.name) for k, v in splits.items()}
    found = answer_questions(Toy(), 'toy', bare, images={k: v.pixels for k, v in splits.items()}, protocols=['vqa'], config=QUICK)
    assert np.array_equal(stacked(found.scores), stacked(rows[rows.protocol == 'vqa'].scores))
    with pytest.raises(DataError, match='39 images for 40 samples'):
        answer_questions(Toy(), 'toy', bare, images={k: v.pixels[:39] if k == 'test' else v.pixels for k, v in splits.items()})


def test_features_are_kept(splits, tmp_path):
    class Known(Toy):
        def hash(self): return 'toy'
    task, encoders = answer_task('toy', splits), [Known(), Known()]
    a, b = (question_features(FeatureStore(o, tmp_path), splits['test'], task) for o in encoders)
    assert encoders[0].seen and not encoders[1].seen and torch.equal(a.patches, b.patches) and torch.equal(a.words, b.words)


# ---- what is refused

def with_question(corpus, **fields):
    frame = corpus.frame.copy()
    first = dataclasses.replace(frame.questions[0][0], **fields)
    frame['questions'] = [(first, *o[1:]) if i == 0 else o for i, o in enumerate(frame.questions)]
    return Corpus(frame, name='bad', pixels=corpus.pixels)


@pytest.mark.parametrize('fields, message', [
    ({'answer': ' .'}, 'a question without an answer'), ({'question': ''}, 'a question without words'), ({'kind': ''}, "kind is ''")])
def test_broken_questions_are_named(splits, fields, message):
    with pytest.raises(DataError, match=message) as e:
        answer_questions(Toy(), 'toy', splits | {'train': with_question(splits['train'], **fields)})
    assert 'bad' in str(e.value) and 'train000#0' in str(e.value)


def test_splits_and_tasks_that_cannot_be(splits):
    task = answer_task('toy', splits)
    def fails(message, task=task, **change):
        parts = {k: v for k, v in (splits | change).items() if v is not None}
        with pytest.raises(DataError, match=message): answer_questions(Toy(), task, parts)
    fails(r"lacks the splits \['test'\]", test=None)
    fails("there is no split 'train'", task='toy', train=None)
    fails(r"unknown splits \['dev'\]", dev=splits['valid'])
    fails('stands in the splits train and valid', valid=splits['train'])
    fails('of kind .multilabel.', task=Task('toy', 'multilabel', ('red',)))
    fails('no training question has one of the 2 answers', task=Task('toy', 'vqa', ('violet', 'blue')))
    fails('there is no question', test=Corpus(splits['test'].frame.drop(columns='questions'), name='captions'))
    none = splits['train'].frame.assign(questions=[() for _ in range(60)])
    fails('there is no question', task='toy', train=Corpus(none, name='none', pixels=splits['train'].pixels))
    fails('no question with a known answer', valid=only(splits['valid'], 'violet'))
    one = splits['train'].frame.assign(group='one patient')
    fails('no question with a known answer', train=Corpus(one, name='one', pixels=splits['train'].pixels), valid=None)
    with pytest.raises(DataError, match='no answer occurs 1000 times'): answer_task('toy', splits, least=1000)
    with pytest.raises(DataError, match='no rows of protocol'):
        gain_over(answer_questions(Toy(), 'toy', splits, protocols=['vqa'], config=dataclasses.replace(QUICK, epochs=1)))


def only(corpus, answer):
    "Ask one question, always answered alike."
    frame = corpus.frame.assign(questions=[(Question('what is this', answer, 'open'),)] * len(corpus))
    return Corpus(frame, name='only', pixels=corpus.pixels)


# ---- sets

@pytest.mark.parametrize('name', QUESTIONS)
def test_twins_are_answered_in_seconds(name, tmp_path):
    QUESTIONS[name].write_twin(tmp_path/name, 24, 0)
    corpus = with_valid(QUESTIONS[name].read(tmp_path/name), .1)
    splits = {o: corpus.split(o) for o in ('train', 'valid', 'test')}
    images = {o: pack(part, tmp_path/'packed', size=32, channels=1) for o, part in splits.items()}
    encoder = small_setting(asked(splits['train']).question.tolist())[0]
    rows = answer_questions(encoder, name, splits, images=images, config=dataclasses.replace(QUICK, epochs=2))
    assert len(rows) == 3 * len(splits['test']) and set(rows.id) == set(splits['test'].frame.id)
    assert set(rows.group) == set(splits['test'].frame.group)
    table = answer_table(rows)
    covered = answers_of(splits).coverage.query("split == 'test' and kind == 'all'").covered.item()
    assert np.allclose(table.coverage, covered) and (table.accuracy <= covered).all()


REAL = Path(os.environ.get('MEDCL_DATA', ''))/'vqa_rad'


def real_vqa_rad(split):
    "Read the public sample's copy of VQA-RAD: its questions, by our split or the official one."
    qa = pd.DataFrame([json.loads(o) for o in (REAL/'qa.jsonl').read_text().splitlines()])
    asked = [(Question(q.strip(), str(a).strip(), k.strip().lower()),) for q, a, k in zip(qa.question, qa.answer, qa.answer_type)]
    frame = pd.DataFrame({'id': qa.qid.astype(str), 'image': qa.image, 'text': '', 'labels': None, 'group': qa.group_id,
                          'split': qa.split_official if split == 'official' else qa.split, 'modality': '', 'questions': asked})
    return with_valid(Corpus(frame, name='vqa_rad', root=REAL), .1)


@pytest.mark.skipif(not (REAL/'qa.jsonl').exists(), reason='MEDCL_DATA holds no VQA-RAD (vqa_rad/qa.jsonl)')
@pytest.mark.parametrize('split', ['disjoint', 'official'])
def test_real_vqa_rad(split, tmp_path):
    corpus = real_vqa_rad(split)
    splits = {o: corpus.split(o) for o in ('train', 'valid', 'test')}
    assert not set(splits['train'].frame.image) & set(splits['valid'].frame.image)
    shared = set(splits['train'].frame.image) & set(splits['test'].frame.image)
    assert bool(shared) == (split == 'official')
    images = {o: pack(part, tmp_path/'packed', size=32, channels=1) for o, part in splits.items()}
    encoder = small_setting(asked(splits['train']).question.tolist())[0]
    config = dataclasses.replace(QUICK, epochs=3)
    rows = answer_questions(encoder, 'vqa_rad', splits, images=images, protocols=['vqa_question_only'], config=config)
    table = answer_table(rows).iloc[0]
    assert table.questions == len(splits['test']) and .5 < table.coverage < 1
    assert 0 < table.accuracy <= table.coverage
    print(table.to_dict())


# ---- a trained encoder

def clip_on_phantoms(folder, *, pairs=2000, epochs=4):
    "Train CLIP on chest phantoms, briefly."
    from medcl_study.pretraining import make_encoder, pretrain
    from medcl_study.settings import make_run
    run = make_run(train_pairs=pairs, valid_pairs=128, epochs=epochs, image_init='random', text_tower='bert_tiny', text_init='random')
    encoder = make_encoder(run)
    pretrain(run, encoder, folder)
    return encoder.eval()


@pytest.mark.slow
def test_a_trained_encoder_beats_its_question_only_head(tmp_path):
    encoder = clip_on_phantoms(tmp_path/'run')
    splits = {o: phantom_corpus('chest', n, split=o) for o, n in (('train', 400), ('valid', 100), ('test', 200))}
    rows = answer_questions(FeatureStore(encoder), 'phantom_vqa', splits)
    gain = gain_over(rows)
    print(answer_table(rows).round(3).to_string(), gain, sep='\n')
    assert gain['low'] > 0
