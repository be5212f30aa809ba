"""Fine-tuning: the given encoder stays as it is, seeds decide, budgets hold, cost is bounded, closed models are refused."""
import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from medcl_study.core import DataError, generator
from medcl_study.data.budgets import DRAWS, budget_splits
from medcl_study.data.pairs import Corpus
from medcl_study.data.phantom import phantom_corpus
from medcl_study.encoders.adapters import as_encoder
from medcl_study.encoders.dual import DualEncoder, EncoderConfig
from medcl_study.evaluation.features import FeatureStore, encoder_hash
from medcl_study.evaluation.finetune import Classifier, FinetuneConfig, Labelled, finetune, fit_classifier, trainable_tower
from medcl_study.evaluation.probe import linear_probe
from medcl_study.predictions import Task, measure, stacked

pytestmark = pytest.mark.usefixtures('one_thread')
QUICK = FinetuneConfig(passes=200, epochs=(2, 4))


def encoder(tower='vit_tiny_p8', size=32, seed=0):
    torch.manual_seed(seed)
    return DualEncoder(EncoderConfig(image_tower=tower, text_tower='bert_tiny', image_size=size, channels=1, dim=16, vocab_size=50))


def splits_of(n=60, classes=('a', 'b', 'c'), several=False, size=32):
    "Make images with a bright square where the class is."
    out = {}
    for split, m in (('train', n), ('valid', n // 2), ('test', n // 2)):
        rng = generator('test finetune', split)
        y = rng.random((m, 3)) < .4 if several else np.eye(3, dtype=bool)[np.arange(m) % 3]
        x = rng.integers(60, 140, (m, size, size)).astype(np.uint8)
        for i, c in zip(*y.nonzero()): x[i, 8:20, 2 + 10 * c:8 + 10 * c] += 60
        frame = pd.DataFrame({'id': [f'{split}{i}' for i in range(m)], 'image': '', 'text': '', 'modality': '', 'split': split,
                              'group': [f'{split} patient {i // 2}' for i in range(m)],
                              'labels': [tuple(np.array(classes)[o]) for o in y]})
        out[split] = Corpus(frame, name=split, classes=classes, pixels=x)
    return out


ONE, MANY = Task('one', 'multiclass', ('a', 'b', 'c')), Task('many', 'multilabel', ('a', 'b', 'c'))


def scores(frame): return stacked(frame['scores'])


@pytest.mark.parametrize('tower', ['vit_tiny_p8', 'cnn_small'])
@pytest.mark.parametrize('task', [ONE, MANY], ids=['one', 'many'])
def test_the_given_encoder_is_untouched(tower, task):
    given, splits = encoder(tower).freeze(lock_image=0).train(), splits_of(several=task is MANY)
    given.logit_scale.grad = torch.ones(())
    before, modes = encoder_hash(given), [o.training for o in given.modules()]
    learns, random = [o.requires_grad for o in given.parameters()], torch.get_rng_state()
    rows = finetune(FeatureStore(given), task, splits, config=QUICK)
    assert encoder_hash(given) == before and [o.training for o in given.modules()] == modes
    assert [o.requires_grad for o in given.parameters()] == learns and torch.equal(torch.get_rng_state(), random)
    assert all(o.grad is None for k, o in given.named_parameters() if k != 'logit_scale')
    assert scores(rows).shape == (30, 3) and set(rows['protocol']) == {'finetuned'}
    if task is ONE: np.testing.assert_allclose(np.exp(scores(rows)).sum(1), 1, atol=1e-5)


def test_a_locked_tower_learns_in_full():
    given, splits = encoder().freeze(lock_image=0), splits_of()
    module, _ = trainable_tower(given, torch.from_numpy(splits['train'].pixels[:1, None]))
    assert all(o.requires_grad for o in module.parameters()) and not any(o.requires_grad for o in given.image.parameters())


def test_seeds_decide():
    splits = splits_of()
    a, b, c = (finetune(encoder(), ONE, splits, seed=o, config=QUICK) for o in (0, 0, 1))
    np.testing.assert_array_equal(scores(a), scores(b))
    assert np.abs(scores(a) - scores(c)).max() > 1e-4
    draws = finetune(encoder(), ONE, splits, draws=2, config=QUICK)
    np.testing.assert_array_equal(scores(draws[draws['draw'] == 0]), scores(a))
    assert np.abs(scores(draws[draws['draw'] == 1]) - scores(a)).max() > 1e-4


def test_it_learns_what_is_there_and_no_more():
    splits = splits_of(120, several=True)
    assert measure(finetune(encoder(), MANY, splits, config=FinetuneConfig(passes=2000))).value > .95
    blind = {k: Corpus(o.frame, name=k, classes=o.classes, pixels=generator(k).integers(0, 256, o.pixels.shape).astype(np.uint8))
             for k, o in splits.items()}
    found = measure(finetune(encoder(), MANY, blind, config=FinetuneConfig(passes=1000)))
    assert found.low < .5 < found.high


def test_budgets_are_the_same_as_everywhere():
    splits, config = splits_of(), FinetuneConfig(passes=20, epochs=(1, 1))
    seen = []
    class Spy(Corpus):
        def images(self, rows):
            seen.append((self.frame.split[0], tuple(self.frame.id[rows])))
            return self.pixels[rows]
        def select(self, index):
            out = super().select(index)
            return Spy(out.frame, name=out.name, classes=out.classes, pixels=out.pixels)
    spies = {k: Spy(o.frame, name=k, classes=o.classes, pixels=o.pixels) for k, o in splits.items()}
    rows = finetune(encoder(), ONE, spies, labels='2shot', config=config)
    assert set(rows['protocol']) == {'finetuned@2shot'} and rows['draw'].nunique() == DRAWS and len(rows) == 30 * DRAWS
    read = {split: {i for s, o in seen if s == split for i in o} for split in splits}
    for split in ('train', 'valid'):
        kept = [set(budget_splits(splits, None, '2shot', draw=o)[0][split].frame.id) for o in range(DRAWS)]
        assert read[split] == set().union(*kept) and all(len(o) == 6 for o in kept)
    assert read['test'] == set(splits['test'].frame.id)


def test_nothing_is_chosen_on_test_rows():
    splits = splits_of()
    whole = finetune(encoder(), ONE, splits, config=QUICK)
    some = finetune(encoder(), ONE, splits | {'test': splits['test'].select(range(7))}, config=QUICK)
    np.testing.assert_allclose(scores(some), scores(whole)[:7], atol=1e-5)
    lied = splits['test'].frame.assign(labels=[(('a', 'b', 'c')[(i + 1) % 3],) for i in range(30)])
    lie = Corpus(lied, name='test', classes=('a', 'b', 'c'), pixels=splits['test'].pixels)
    np.testing.assert_array_equal(scores(finetune(encoder(), ONE, splits | {'test': lie}, config=QUICK)), scores(whole))


def test_validation_rows_come_from_whole_groups_where_there_are_none():
    splits = {k: o for k, o in splits_of().items() if k != 'valid'}
    assert len(finetune(encoder(), ONE, splits, config=QUICK)) == 30
    same = {**splits, 'train': Corpus(splits['train'].frame.assign(group='one'), name='train', classes=('a', 'b', 'c'),
                                      pixels=splits['train'].pixels)}
    with pytest.raises(DataError, match='too few training groups'): finetune(encoder(), ONE, same, config=QUICK)


def test_packed_images_are_read_by_row():
    splits = splits_of()
    class Cache:
        def __init__(self, pixels): self.pixels = pixels
        def __len__(self): return len(self.pixels)
        def batch(self, rows): return self.pixels[rows][..., None]
        def select(self, rows): return Cache(self.pixels[rows])
    bare = {k: Corpus(o.frame, name=k, classes=o.classes) for k, o in splits.items()}
    images = {k: Cache(o.pixels) for k, o in splits.items()}
    for labels in ('', '4shot'):
        a = finetune(encoder(), ONE, splits, labels=labels, draws=1, config=QUICK)
        b = finetune(encoder(), ONE, bare, images=images, labels=labels, draws=1, config=QUICK)
        np.testing.assert_array_equal(scores(a), scores(b))


def test_best_epoch_is_kept():
    splits, config = splits_of(), FinetuneConfig(passes=600, lr=.05, head_lr=.5, epochs=(12, 12), patience=20)
    parts = {k: Labelled(lambda rows, o=o: torch.from_numpy(o.pixels[rows][:, None]), torch.from_numpy(o.targets().argmax(1)),
                         torch.device('cpu')) for k, o in splits.items()}
    tower, forward = trainable_tower(encoder(), parts['train'].read(np.arange(1)))
    model = fit_classifier(tower, forward, parts['train'], parts['valid'], classes=3, config=config)
    loss = nn.functional.cross_entropy(parts['valid'].outputs(model.eval()), parts['valid'].y)
    assert float(loss) == pytest.approx(min(model.history), abs=1e-6) and len(model.history) == 12


def test_rates_fall_towards_the_pixels():
    tower, forward = trainable_tower(encoder(), torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    groups = Classifier(tower, forward, torch.zeros(96), torch.ones(96), 3).rates(config := FinetuneConfig())
    rates = [o['lr'] for o in groups]
    assert rates == sorted(rates, reverse=True) and rates[0] == config.head_lr
    assert min(rates) == pytest.approx(config.lr * config.layer_decay ** (len(tower.groups()) - 1))
    assert sum(p.numel() for o in groups for p in o['params']) == sum(p.numel() for p in tower.parameters()) + 96 * 3 + 3
    assert all((o['weight_decay'] > 0) == all(p.ndim > 1 for p in o['params']) for o in groups)


def test_batch_norms_keep_their_statistics():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        def encode_image(self, images): return self.net(images.float() / 255)
    rows = finetune(Net(), ONE, splits_of(12), labels='1shot', draws=1, config=QUICK)
    assert np.isfinite(scores(rows)).all()
    tower, forward = trainable_tower(Net(), torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    model = Classifier(tower, forward, torch.zeros(4), torch.ones(4), 3).train()
    assert model.training and not tower.net[1].training


def test_foreign_models():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(1024 * 3, 8)
        def encode_image(self, images): return self.net(images.expand(-1, 3, -1, -1).float().flatten(1) / 255)
        def encode_text(self, texts): return torch.zeros(len(texts), 8)
    adapted, splits = as_encoder(Bare()), splits_of()
    before = adapted.model.net.weight.clone()
    rows = finetune(adapted, ONE, splits, config=QUICK)
    assert torch.equal(adapted.model.net.weight, before) and np.abs(scores(rows)).max() > 0
    class Closed(Bare):
        @torch.no_grad()
        def encode_image(self, images): return super().encode_image(images)
    for bad, says in ((Closed(), 'no gradient reaches the weights of Closed'), (object(), 'no torch module')):
        with pytest.raises(TypeError, match=says): finetune(bad, ONE, splits, config=QUICK)


def test_a_diverging_run_ends_with_finite_scores():
    wild = FinetuneConfig(passes=200, lr=1e3, head_lr=1e3, epochs=(3, 3))
    assert np.isfinite(scores(finetune(encoder(), ONE, splits_of(), config=wild))).all()


@pytest.mark.slow
def test_a_twin_takes_less_than_half_a_minute():
    splits = {o: phantom_corpus('chest', n, split=o) for o, n in (('train', 160), ('valid', 48), ('test', 48))}
    task = Task('chest', 'multilabel', splits['train'].classes, source='phantom')
    start, given = time.process_time(), encoder('vit_small_p8', 64)
    rows = finetune(given, task, splits)
    assert time.process_time() - start < 30 and len(rows) == 48
    assert measure(rows).value > measure(linear_probe(given, task, splits)).value - .1
