"""Encoders of known quality: every protocol ranks them right, intervals are honest, equal encoders are not told apart."""
import numpy as np
import pytest
from scipy.stats import binom

from medcl_study.core import DataError
from medcl_study.data.phantom import MODALITIES, phantom_corpus
from medcl_study.evaluation.features import FeatureStore
from medcl_study.evaluation.grounding import grounding
from medcl_study.evaluation.known_answer import COMMON, Oracle, Truth, true_auroc
from medcl_study.evaluation.neighbours import nearest_neighbours
from medcl_study.evaluation.probe import linear_probe
from medcl_study.evaluation.retrieval import retrieval
from medcl_study.evaluation.zeroshot import zero_shot
from medcl_study.predictions import Task, compare, mean_over_runs, measure

pytestmark = pytest.mark.usefixtures('one_thread')
GRADES = {'excellent': (.6, 0.), 'good': (1., .02), 'fair': (1.7, .05), 'poor': (3., .1), 'blind': (30., .5)}
PROMPTS = MODALITIES['chest'].prompts


@pytest.fixture(scope='module')
def splits(): return {o: phantom_corpus('chest', n, split=o) for o, n in (('train', 160), ('valid', 60), ('test', 200))}


@pytest.fixture(scope='module')
def truth(splits): return Truth.of(list(splits.values()))


@pytest.fixture(scope='module')
def pixels(splits): return {k: o.images(slice(None)) for k, o in splits.items()}


@pytest.fixture(scope='module')
def protocols(splits, pixels):
    test, classes = splits['test'], splits['test'].classes
    many, pairs = Task('chest', 'multilabel', classes, source='phantom'), Task('pairs', 'retrieval')
    def way(o, protocol):
        rows = retrieval(o, test, pairs, images=pixels['test'])
        return rows[rows['protocol'] == protocol]
    return {'zeroshot': lambda o: zero_shot(o, test, many, PROMPTS, images=pixels['test']),
            'probe': lambda o: linear_probe(o, many, splits, images=pixels),
            'knn': lambda o: nearest_neighbours(o, many, splits, images=pixels),
            'probe@4shot': lambda o: linear_probe(o, many, splits, images=pixels, labels='4shot', draws=3),
            'image_to_text': lambda o: way(o, 'image_to_text'), 'text_to_image': lambda o: way(o, 'text_to_image'),
            'grounding': lambda o: grounding(o, test, Task('pointed', 'grounding', classes), images=pixels['test'])}


NAMES = ('zeroshot', 'probe', 'knn', 'probe@4shot', 'image_to_text', 'text_to_image', 'grounding')


def draws_of(frame): return [frame[frame['draw'] == o] for o in frame['draw'].unique()]


@pytest.mark.parametrize('name', NAMES)
def test_ranks_grades_right(name, truth, protocols):
    found = [draws_of(protocols[name](FeatureStore(Oracle(truth, noise=noise, wrong=wrong, seed=i))))
             for i, (noise, wrong) in enumerate(GRADES.values())]
    values = [measure(o[0], resamples=300).value if len(o) == 1 else mean_over_runs(o, resamples=300).value for o in found]
    assert (np.diff(values) < 0).all(), values
    for better, worse in zip(found, found[2:]):  # two grades apart, no interval of a difference holds zero
        if len(better) > 1: low = mean_over_runs(better, minus=worse, resamples=300).low
        else: low = compare(better[0], worse[0], resamples=300)['low']
        assert low > 0 or worse is found[-1] and name in ('knn', 'probe@4shot')


def test_auroc_in_closed_form(truth, protocols):
    for noise, wrong in GRADES.values():
        values = [measure(protocols['zeroshot'](Oracle(truth, noise=noise, wrong=wrong, seed=100 + o)), resamples=20).value for o in range(25)]
        assert abs(np.mean(values) - true_auroc(noise, wrong)) < 4 * np.std(values, ddof=1) / 5 + 1e-3


def told_apart(predict, truth, times, resamples):
    "Count comparisons of equal oracles whose interval excludes zero, and intervals that hold the true AUROC."
    apart = held = 0
    for i in range(times):
        a, b = (predict(Oracle(truth, noise=1.7, wrong=.05, seed=5000 + 2 * i + o)) for o in range(2))
        d, e = compare(a, b, resamples=resamples), measure(a, resamples=resamples)
        apart += d['low'] > 0 or d['high'] < 0
        held += e.low <= true_auroc(1.7, .05) <= e.high
    return apart, held


def test_equal_encoders_are_told_apart_about_once_in_twenty(truth, protocols):
    apart, held = told_apart(protocols['zeroshot'], truth, 80, 300)
    assert binom.sf(apart - 1, 80, .06) > .003 and binom.cdf(held, 80, .94) > .003, (apart, held)


def test_noise_is_what_was_asked_for(splits, truth, pixels):
    a, b, again = (Oracle(truth, noise=2., seed=o) for o in (0, 1, 0))
    np.testing.assert_array_equal(a.vectors, again.vectors)
    noise = a.vectors - Oracle(truth, noise=0., seed=0).vectors
    assert abs(noise.std() - 2) < .02 and abs(noise.mean()) < .05
    other = b.vectors - Oracle(truth, noise=0., seed=1).vectors
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < .03
    flipped = Oracle(truth, noise=0., wrong=.2).vectors @ a.basis[1:7].T
    assert abs((np.sign(flipped) != truth.findings).mean() - .2) < .03
    np.testing.assert_allclose(a.basis @ a.basis.T, np.eye(len(a.basis)), atol=1e-12)
    assert abs(np.linalg.norm(a.vectors, axis=1).mean() / COMMON - 1) < .05


def test_features_are_a_function_of_pixels_and_words(splits, truth, pixels):
    store, order = FeatureStore(Oracle(truth, noise=1.), batch_size=7), np.random.default_rng(0).permutation(200)
    whole = store.images(pixels['test'], ('global_', 'patches'))
    for k, o in store.images(splits['test'].select(order), ('global_', 'patches')).items(): np.testing.assert_array_equal(o, whole[k][order])
    words = store.texts(['Is there edema?', 'Is there a nodule here?'], ('global_', 'words', 'word_mask'))
    assert words['word_mask'].sum(1).tolist() == [3, 5] and not words['global_'].any()
    np.testing.assert_allclose(words['words'][0, :2], words['words'][1, :2])
    with pytest.raises(KeyError): store.images(pixels['test'] // 2)


def test_prompts_and_reports_say_what_is_true(splits, truth):
    oracle = Oracle(truth, noise=0.)
    yes, no = oracle.encode_text(['findings of nodule.', 'no nodule.']).global_
    np.testing.assert_allclose(yes, -no)
    report = oracle.encode_text(splits['test'].texts[:50]).pooled.numpy() @ oracle.basis[1:7].T
    np.testing.assert_allclose(report, 2 * splits['test'].targets()[:50] - 1, atol=1e-5)


def test_only_phantoms_of_one_modality(splits):
    with pytest.raises(DataError, match='one modality'): Truth.of([splits['test'], phantom_corpus('ct', 3)])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['zeroshot', 'image_to_text', 'text_to_image', 'grounding'])
def test_equal_encoders_in_every_protocol(name, truth, protocols):
    times = 300 if name == 'zeroshot' else 150
    apart = 0
    for i in range(times):
        a, b = (protocols[name](Oracle(truth, noise=1.7, wrong=.05, seed=9000 + 2 * i + o)) for o in range(2))
        d = compare(a, b, resamples=500)
        apart += d['low'] > 0 or d['high'] < 0
    assert .015 < apart / times < .1, apart / times


@pytest.mark.slow
@pytest.mark.parametrize('name', ['segmentation_linear', 'vqa'])
def test_dense_protocols_and_questions_rank_right(name, splits, truth, pixels):
    from medcl_study.evaluation.segmentation import segmentation
    from medcl_study.evaluation.vqa import answer_questions
    predict = {'segmentation_linear': lambda o: segmentation(o, Task('outlined', 'segmentation', splits['test'].classes), splits, images=pixels),
               'vqa': lambda o: answer_questions(o, 'asked', splits, images=pixels, protocols=('vqa',))}[name]
    found = [predict(FeatureStore(Oracle(truth, noise=noise, wrong=wrong, seed=i)))
             for i, (noise, wrong) in enumerate((GRADES['excellent'], GRADES['poor'], GRADES['blind']))]
    assert (np.diff([measure(o, resamples=300).value for o in found]) < 0).all()
    assert compare(found[0], found[2], resamples=300)['low'] > 0
