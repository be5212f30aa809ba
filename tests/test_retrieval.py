"Recall against other people's code, and ranks that do not depend on how the gallery is cut."
import numpy as np
import pytest
import torch

from medcl_study.evaluation.retrieval import best_ranks
from medcl_study.metrics import recall_at_k

KS = (1, 5, 10, 50)


def several_positives(seed, images=60, texts=150):
    "Similarities in which every image has one to many texts, and pairs are likelier than others to be near."
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(images), rng.integers(0, images, texts - images)])
    scores = rng.normal(size=(texts, images)) + 1.5 * (owner[:, None] == np.arange(images))
    return scores, owner


def ours(scores, owner):
    "Recall@k by our ranks in both directions: text → image, image → text."
    pairs, (texts, images) = np.stack([np.arange(len(owner)), owner], 1), scores.shape
    ranks = [best_ranks(lambda q, c: scores[q, c], pairs, queries=texts, candidates=images, chunk=17),
             best_ranks(lambda q, c: scores.T[q, c], pairs[:, ::-1], queries=images, candidates=texts, chunk=17)]
    return [[float(recall_at_k(r, np.zeros((len(r), 2)), k=k)) for k in KS] for r in ranks]


@pytest.mark.parametrize('seed', range(3))
def test_recall_equals_clip_benchmark(seed):
    module = pytest.importorskip('clip_benchmark.metrics.zeroshot_retrieval', reason='needs clip-benchmark: pip install --no-deps clip-benchmark')
    scores, owner = several_positives(seed)
    x, positive = torch.tensor(scores), torch.zeros(scores.shape, dtype=torch.bool)
    positive[torch.arange(len(owner)), torch.tensor(owner)] = True
    for found, s, p in zip(ours(scores, owner), (x, x.T), (positive, positive.T)):
        theirs = [(module.batchify(module.recall_at_k, s, p, 32, 'cpu', k=k) > 0).float().mean().item() for k in KS]
        assert found == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_recall_equals_a_sort(seed):
    scores, owner = several_positives(seed)
    for found, s, belongs in zip(ours(scores, owner), (scores, scores.T), (owner[:, None] == np.arange(60), (owner[:, None] == np.arange(60)).T)):
        order = np.argsort(-s, axis=1, kind='stable')
        hits = np.take_along_axis(belongs, order, 1)
        assert found == pytest.approx([hits[:, :k].any(1).mean() for k in KS], abs=1e-12)


def test_ties_never_help():
    "A constant score ranks the positive last; adding a constant or scaling changes no rank."
    scores, owner = several_positives(0)
    assert ours(np.zeros_like(scores), owner)[0][:3] == [0, 0, 0]
    assert ours(7 * scores + 3, owner) == ours(scores, owner)


def test_nan_is_refused():
    scores, owner = several_positives(0)
    scores[3, 4] = np.nan
    with pytest.raises(ValueError, match='NaN or infinite'): ours(scores, owner)
