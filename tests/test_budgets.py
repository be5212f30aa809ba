"""Label budgets: nested, whole, random, complete, the same whatever the order, and said in one spelling."""
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from medcl_study.core import DataError, generator
from medcl_study.data.budgets import DRAWS, SHOTS, budget_rows, budget_splits, parse_labels, protocol_name
from medcl_study.data.pairs import Corpus

CLASSES = ('a', 'b', 'c')
FEW = settings(max_examples=60, deadline=None)


def corpus_of(labels, groups=None, order=None):
    n = len(labels)
    frame = pd.DataFrame({'id': [f'i{i:05d}' for i in range(n)], 'image': '', 'text': '', 'modality': '', 'split': 'train',
                          'labels': pd.Series(labels, dtype=object), 'group': groups or [''] * n})
    return Corpus(frame if order is None else frame.iloc[order], name='made up', classes=CLASSES)


def ids(corpus, labels, **kwargs): return set(corpus.frame.id[budget_rows(corpus, labels, **kwargs)])


@st.composite
def corpora(draw):
    "Rows with any labels, some unlabelled, in groups of any size."
    rows = draw(st.lists(st.tuples(st.one_of(st.none(), st.sets(st.sampled_from(CLASSES))), st.integers(0, 12)),
                         min_size=1, max_size=50))
    return [None if o is None else tuple(sorted(o)) for o, _ in rows], [f'p{g}' if g else '' for _, g in rows]


@FEW
@given(corpora(), st.integers(0, 4))
def test_shares_are_nested_whole_and_complete(rows, draw):
    labels, groups = rows
    corpus, before = corpus_of(labels, groups), set()
    kinds = [set(o) or {'none'} for o in labels if o is not None]
    for share in ('0.001', '0.05', '0.3', '0.31', '0.9', '1'):
        kept = budget_rows(corpus, share, draw=draw)
        assert len(kept) and (np.diff(kept) > 0).all() and before <= set(kept)
        before = set(kept)
        inside = set(corpus.frame.group[kept]) - {''}
        assert {i for i, g in enumerate(groups) if g in inside} <= before
        found = [set(labels[i]) or {'none'} for i in kept if labels[i] is not None]
        assert set().union(*found) == set().union(*kinds)
    assert before == set(range(len(labels)))


@FEW
@given(corpora(), st.integers(0, 4), st.sampled_from(('0.2', '0.5', '1shot', '3shot')), st.randoms(use_true_random=False))
def test_draws_do_not_depend_on_the_order_of_rows(rows, draw, budget, random):
    if budget.endswith('shot') and all(o is None for o in rows[0]): return
    order = list(range(len(rows[0])))
    random.shuffle(order)
    assert ids(corpus_of(*rows), budget, draw=draw) == ids(corpus_of(*rows, order), budget, draw=draw)


@FEW
@given(corpora(), st.integers(0, 4))
def test_shots_per_class_as_by_hand(rows, draw):
    labels, groups = rows
    if all(o is None for o in labels): return
    corpus, before = corpus_of(labels, groups), set()
    for shots in SHOTS:
        kept = set(budget_rows(corpus, f'{shots}shot', draw=draw))
        assert before <= kept and not [i for i in kept if labels[i] is None]
        before = kept
        for kind in (*CLASSES, None):
            have = {i for i, o in enumerate(labels) if o is not None and (kind in o if kind else not o)}
            assert len(have & kept) >= min(shots, len(have))
            names = {i: groups[i] or i for i in have}
            assert len({names[i] for i in have & kept}) >= min(shots, len(set(names.values())))


@pytest.mark.parametrize('shots', SHOTS)
def test_exclusive_classes_get_exactly_their_shots(shots):
    corpus = corpus_of([(CLASSES[i % 3],) for i in range(90)])
    for draw in range(DRAWS):
        kept = budget_rows(corpus, f'{shots}shot', draw=draw)
        assert np.bincount(kept % 3).tolist() == [shots] * 3


def test_shares_are_as_large_as_they_say():
    corpus = corpus_of([(CLASSES[i % 3],) for i in range(10_000)], [f'p{i // 2}' for i in range(10_000)])
    for share in (.01, .1, .5):
        for draw in range(DRAWS): assert abs(len(budget_rows(corpus, str(share), draw=draw)) - share * 10_000) <= 8


def test_a_rare_class_does_not_blow_up_a_share():
    corpus = corpus_of([('b',) if i == 777 else ('a',) if i % 2 else () for i in range(1000)])
    for draw in range(DRAWS):
        kept = budget_rows(corpus, '0.01', draw=draw)
        assert 777 in kept and len(kept) <= 13


def test_draws_are_spread_over_the_rows():
    corpus = corpus_of([(CLASSES[i % 3],) for i in range(600)])
    for budget, size in (('0.1', 60), ('4shot', 12)):
        found = [budget_rows(corpus, budget, draw=o) for o in range(200)]
        assert all(abs(len(o) - size) <= 3 for o in found)
        counts = np.bincount(np.concatenate(found), minlength=600)
        expected = 200 * size / 600
        assert counts.max() < expected + 6 * expected**.5 and abs(counts[:100].mean() - expected) < .15 * expected
    assert ids(corpus, '0.1', draw=0) != ids(corpus, '0.1', draw=0, seed=1)
    assert ids(corpus, '1shot', draw=0) != ids(corpus, '1shot', draw=0, seed=1)


@pytest.mark.parametrize('bad', ['few', '0', '-0.1', '1.01', 'nan', 'inf', '0shot', '1.5shot', '4 shot', '4shots'])
def test_what_is_no_budget(bad):
    for call in (lambda: parse_labels(bad), lambda: protocol_name('probe', bad), lambda: budget_rows(corpus_of([()]), bad, draw=0)):
        with pytest.raises(DataError): call()


def test_one_spelling():
    assert {protocol_name('p', o) for o in ('0.01', '.01', '1e-2', '0.010')} == {'p@0.01'}
    assert {protocol_name('p', o) for o in ('', '1', '1.0')} == {'p'}
    assert protocol_name('p', '16shot') == 'p@16shot' and protocol_name('p', '0.001') == 'p@0.001'


def test_splits_and_images_are_cut_together():
    def part(name): return Corpus(corpus_of([(CLASSES[i % 3],) for i in range(60)]).frame.assign(split=name), name=name,
                                  classes=CLASSES, pixels=generator(name).integers(256, size=(60, 2, 2)).astype(np.uint8))
    splits = {o: part(o) for o in ('train', 'valid', 'test')}
    images = {k: o.pixels for k, o in splits.items()}
    few, shown = budget_splits(splits, images, '2shot', draw=1)
    assert {k: len(o) for k, o in few.items()} == {'train': 6, 'valid': 6, 'test': 60}
    for k, o in few.items(): np.testing.assert_array_equal(shown[k], o.pixels)
    assert budget_splits(splits, None, '2shot', draw=1)[1] is None
    assert budget_splits(splits, images, '1', draw=1) == (splits, images)


def test_unlabelled_rows():
    with pytest.raises(DataError, match='no row is labelled'): budget_rows(corpus_of([None] * 5), '1shot', draw=0)
    assert len(budget_rows(corpus_of([None] * 100), '0.1', draw=0)) == 10
    assert not len(budget_rows(corpus_of([]), '0.1', draw=0))


def test_a_hundred_thousand_rows_take_no_time():
    corpus = corpus_of([(CLASSES[i % 3],) for i in range(100_000)], [f'p{i // 3}' for i in range(100_000)])
    start = time.process_time()
    for budget in ('0.01', '16shot'): budget_rows(corpus, budget, draw=0)
    assert time.process_time() - start < 6
