"""Zero-shot classification: logits of the model's own temperature, single templates, and what the test set may not lend."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.special import expit, softmax

from medcl_study.core import DataError, generator
from medcl_study.data.text import PromptSet, Tokenizer
from medcl_study.encoders.dual import DualEncoder, EncoderConfig
from medcl_study.evaluation.features import FeatureStore, SCORERS
from medcl_study.evaluation.zeroshot import TRANSDUCTIVE, inverse_temperature, transductive, zero_shot
from medcl_study.metrics import METRICS
from medcl_study.predictions import Task, prediction_rows, score, stacked
from test_evaluation import LATE, MANY, ONE, PROMPTS, Toy, corpus_of

TWO = Task('pair', 'binary', ('nodule', 'mass'), source='phantom')
each_scorer = pytest.mark.parametrize('scorer', [SCORERS['cosine'], LATE], ids=['cosine', 'late'])


def scaled(value, seed=0):
    encoder = Toy(seed, noise=.2)
    encoder.scale = value
    return encoder


def dual(scale):
    corpus = corpus_of(24, one=True)
    corpus.pixels = np.repeat(np.repeat(corpus.pixels, 11, 1), 11, 2)[:, :32, :32]
    tokenizer = Tokenizer.train(list(corpus.frame['text']), vocab_size=120, max_tokens=24)
    torch.manual_seed(0)
    config = EncoderConfig(image_tower='vit_tiny_p8', text_tower='bert_tiny', image_size=32, channels=1, dim=16, max_tokens=24,
                           vocab_size=tokenizer.vocab_size, scale_init=scale)
    return DualEncoder(config, tokenizer=tokenizer), corpus


@each_scorer
@pytest.mark.parametrize('task', [MANY, ONE], ids=['multilabel', 'multiclass'])
def test_scale_stretches_scores_and_changes_no_rank(scorer, task):
    corpus = corpus_of(120, one=task is ONE)
    plain = zero_shot(scaled(1.), corpus, task, PROMPTS, scorer=scorer)
    targets = stacked(plain['target']).astype(int)
    targets = targets if task is MANY else targets[:, 0]
    for scale in (4., torch.tensor(14.2857), torch.nn.Parameter(torch.tensor(100.))):
        found = zero_shot(scaled(scale), corpus, task, PROMPTS, scorer=scorer)
        np.testing.assert_allclose(stacked(found['scores']), inverse_temperature(scaled(scale)) * stacked(plain['scores']), rtol=1e-6, atol=1e-5)
        for name in ('macro_auroc', 'macro_auprc') + (('accuracy', 'macro_f1') if task is ONE else ()):
            a, b = (METRICS[name].function(stacked(o['scores']), targets) for o in (plain, found))
            # the toy's late similarities tie up to rounding, and rounding may part what ties
            np.testing.assert_allclose(a, b, atol=1e-12 if scorer is not LATE else 1e-3)


@pytest.mark.parametrize('scale', [1 / .07, 60.])
def test_probabilities_are_the_model_s_own(scale):
    encoder, corpus = dual(scale)
    prompts = PromptSet(('{c}',), ('no {c}',))
    assert abs(inverse_temperature(FeatureStore(encoder)) - scale) < 1e-3
    with torch.no_grad():
        image = encoder.encode_image(corpus.pixels[:, None]).global_
        text, absent = (encoder.encode_text([o + c for c in ONE.classes]).global_ for o in ('', 'no '))
        logits, negative = (encoder.scale * image @ o.T for o in (text, absent))
    found = stacked(zero_shot(encoder, corpus, ONE, prompts)['scores'])
    np.testing.assert_allclose(softmax(found, 1), torch.softmax(logits, 1), atol=1e-5)
    found = stacked(zero_shot(encoder, corpus, MANY, prompts)['scores'])
    np.testing.assert_allclose(expit(found), torch.softmax(torch.stack([negative, logits]), 0)[1], atol=1e-5)


@pytest.mark.parametrize('scale', [0., -1., float('nan'), float('inf')])
def test_impossible_scales(scale):
    with pytest.raises(DataError, match='expected a positive number'): zero_shot(scaled(scale), corpus_of(5), MANY, PROMPTS)


@each_scorer
@pytest.mark.parametrize('prompts', [PROMPTS, PromptSet(PROMPTS.templates, ('no {c}',)), PromptSet(PROMPTS.templates),
                                     PromptSet(PROMPTS.templates, PROMPTS.negatives, opposites={'mass': 'normal'})])
def test_each_template_is_a_prompt_set_of_its_own(scorer, prompts):
    corpus, encoder = corpus_of(30), scaled(5.)
    rows = zero_shot(encoder, corpus, MANY, prompts, prompt_set='p', scorer=scorer, each_template=True)
    assert list(rows['prompt_set'].unique()) == ['p', 'p#0', 'p#1'] and len(rows) == 90
    whole = zero_shot(encoder, corpus, MANY, prompts, prompt_set='p', scorer=scorer)
    np.testing.assert_array_equal(stacked(rows['scores'])[:30], stacked(whole['scores']))
    for i in range(2):
        pairs = len(prompts.negatives) == 2
        single = PromptSet(prompts.templates[i:i + 1], prompts.negatives[i:i + 1] if pairs else prompts.negatives,
                           opposites=prompts.opposites)
        alone = zero_shot(encoder, corpus, MANY, single, scorer=scorer)
        np.testing.assert_allclose(stacked(rows['scores'])[30 * (i + 1):30 * (i + 2)], stacked(alone['scores']), atol=1e-6)


def test_templates_cost_no_second_encoding(tmp_path):
    encoder = scaled(1.)
    zero_shot(encoder, corpus_of(40), MANY, PROMPTS)
    once, encoder.rows = encoder.rows, 0
    zero_shot(encoder, corpus_of(40), MANY, PROMPTS, each_template=True)
    assert encoder.rows == once


def test_single_templates_are_scored_under_their_own_keys():
    rows = zero_shot(Toy(), corpus_of(60), MANY, PROMPTS, prompt_set='p', each_template=True).assign(run='r')
    assert {'findings/zeroshot/macro_auroc/p', 'findings/zeroshot/macro_auroc/p#0', 'findings/zeroshot/macro_auroc/p#1'} \
        <= set(score(rows, resamples=50))


# What the test set may not lend

def rows_of(scores, targets, task):
    return prediction_rows(task, [f'{i:03d}' for i in range(len(scores))], targets, scores, protocol='zeroshot')


def f1(called, y): return 2 * (called & y).sum() / max(called.sum() + y.sum(), 1)
def right(called, y): return (called == y).mean()


scores_and_truth = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(scores_and_truth)
def test_thresholds_are_the_best_of_all_cuts(pairs):
    scores, y = np.array([o for o, _ in pairs], float), np.array([o for _, o in pairs])
    for rule, value in (('best_f1', f1), ('best_accuracy', right)):
        margin = TRANSDUCTIVE[rule](scores, y.astype(int))
        assert np.isfinite(margin).all() and not (margin == 0).any()
        np.testing.assert_allclose(margin - scores, (margin - scores)[0])
        every = [value(scores > o, y) for o in np.arange(-4.5, 5)]
        assert value(margin > 0, y) == pytest.approx(max(every))


@pytest.mark.parametrize('rule', TRANSDUCTIVE)
@pytest.mark.parametrize('kind', ['binary', 'multilabel'])
def test_no_auroc_moves(rule, kind):
    rng = generator('transductive', kind)
    task = TWO if kind == 'binary' else MANY
    y = rng.integers(2, size=(80, 1 if kind == 'binary' else 4))
    rows = rows_of(rng.normal(size=(80, len(task.classes))) + y, y, task)
    before = rows.copy()
    moved = transductive(rows, rule)
    for name in ('auroc', 'auprc') if kind == 'binary' else ('macro_auroc', 'macro_auprc'):
        a, b = (METRICS[name].function(stacked(o['scores']), y[:, 0] if kind == 'binary' else y) for o in (rows, moved))
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert set(moved['protocol']) == {f'zeroshot_transductive_{rule}'} and moved.attrs['tasks'] == rows.attrs['tasks']
    np.testing.assert_array_equal(stacked(rows['scores']), stacked(before['scores']))


def test_standardised_rows_depend_on_their_company_and_honest_ones_do_not():
    encoder, corpus = scaled(7.), corpus_of(90)
    whole, part = (zero_shot(encoder, o, MANY, PROMPTS) for o in (corpus, corpus.select(range(20))))
    np.testing.assert_allclose(stacked(part['scores']), stacked(whole['scores'])[:20], atol=1e-5)
    a, b = (stacked(transductive(o, 'standardised')['scores']) for o in (whole, part))
    np.testing.assert_allclose(a.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(a.std(0), 1, atol=1e-5)
    assert np.abs(a[:20] - b).max() > .05


def test_what_transductive_refuses():
    rows = zero_shot(Toy(), corpus_of(20, one=True), ONE, PROMPTS, prompt_set='p', each_template=True)
    with pytest.raises(DataError, match='found several'): transductive(rows, 'standardised')
    rows = zero_shot(Toy(), corpus_of(20, one=True), ONE, PROMPTS)
    assert stacked(transductive(rows, 'standardised')['scores']).shape == (20, 4)
    with pytest.raises(ValueError, match='takes the largest of 4'): transductive(rows, 'best_f1')
    with pytest.raises(ValueError, match='known are'): transductive(rows, 'best')


def test_zero_shot_alone_never_says_transductive():
    assert set(zero_shot(Toy(), corpus_of(20), MANY, PROMPTS)['protocol']) == {'zeroshot'}
