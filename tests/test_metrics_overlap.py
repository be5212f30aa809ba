"Overlap of masks against torchmetrics, scikit-learn and brute force."
import numpy as np
import pytest
import sklearn.metrics as oracle
import torch
from scipy.spatial.distance import cdist, directed_hausdorff
from torchmetrics.functional.segmentation import dice_score, hausdorff_distance

from medcl_study.measures.overlap import dice, dice_per_image, hausdorff_95, iou, overlap_row
from medcl_study.measures.weights import Undefined


def masks(seed, n=30, side=24):
    "True and predicted blobs; some of either are empty, some touch the border."
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((side, side))
    def blob(): return np.hypot(rows - rng.uniform(0, side), columns - rng.uniform(0, side)) < rng.uniform(-1, 9)
    true = np.stack([blob() for _ in range(n)])
    predicted = np.stack([o ^ (rng.random((side, side)) < .05) if rng.random() < .6 else blob() for o in true])
    return predicted, true


def table(predicted, true, classes):
    found = np.array([overlap_row(p, t) for p, t in zip(predicted, true)], float)
    return found, np.stack([classes, true.sum((1, 2)), np.full(len(true), true[0].size)], 1)


@pytest.mark.parametrize('seed', range(4))
def test_overlap_equals_scikit_learn_and_torchmetrics(seed):
    predicted, true = masks(seed)
    found, rows = table(predicted, true, np.zeros(30, int))
    assert dice(found, rows) == pytest.approx(oracle.f1_score(true.ravel(), predicted.ravel()), abs=1e-12)
    assert iou(found, rows) == pytest.approx(oracle.jaccard_score(true.ravel(), predicted.ravel()), abs=1e-12)
    each = dice_score(torch.tensor(predicted)[:, None].int(), torch.tensor(true)[:, None].int(), num_classes=1,
                      include_background=True).numpy().ravel()
    both_empty = ~predicted.any((1, 2)) & ~true.any((1, 2))
    assert dice_per_image(found, rows) == pytest.approx(np.where(both_empty, 1, np.nan_to_num(each)).mean(), abs=1e-6)


def test_classes_are_pooled_apart_and_absent_ones_left_out():
    predicted, true = masks(1)
    classes = np.arange(30) % 3
    true[classes == 2] = predicted[classes == 2] = False
    found, rows = table(predicted, true, classes)
    want = [oracle.f1_score(true[classes == c].ravel(), predicted[classes == c].ravel()) for c in (0, 1)]
    assert dice(found, rows) == pytest.approx(np.mean(want), abs=1e-12)
    with pytest.raises(Undefined, match='all 10 masks are empty'): dice(found[classes == 2], rows[classes == 2])


def brute_hd95(a, b, percentile=95):
    "Outline pixels by their four neighbours, all distances, the larger directed percentile (MONAI's convention)."
    def outline(mask):
        padded = np.pad(mask, 1)
        return np.array([(i, j) for i, j in zip(*np.nonzero(mask))
                         if not (padded[i, j + 1] and padded[i + 2, j + 1] and padded[i + 1, j] and padded[i + 1, j + 2])])
    distance = cdist(outline(a), outline(b))
    return max(np.percentile(distance.min(1), percentile), np.percentile(distance.min(0), percentile))


@pytest.mark.parametrize('seed', range(6))
def test_hausdorff_equals_brute_force(seed):
    predicted, true = masks(seed, n=12)
    for a, b in zip(predicted, true):
        if not (a.any() and b.any()): continue
        assert hausdorff_95(a, b) == pytest.approx(brute_hd95(a, b), abs=1e-9)
        assert hausdorff_95(a, b) == hausdorff_95(b, a)
        whole = hausdorff_95(a, b, percentile=100)
        assert whole == pytest.approx(brute_hd95(a, b, 100), abs=1e-9)
        def either(measure): return max(measure(np.argwhere(a), np.argwhere(b))[0], measure(np.argwhere(b), np.argwhere(a))[0])
        if not (a & b).any(): assert whole >= either(directed_hausdorff) - 1e-9
        theirs = hausdorff_distance(*(torch.tensor(o)[None, None].int() for o in (a, b)), num_classes=1,
                                    include_background=True, input_format='one-hot')
        assert whole == pytest.approx(float(theirs), abs=1e-4)


def test_empty_masks_have_a_distance():
    empty, full = np.zeros((30, 40), bool), np.ones((30, 40), bool)
    one = empty.copy(); one[3, 3] = True
    assert [hausdorff_95(*o) for o in ((empty, empty), (empty, one), (one, empty), (one, one))] == [0, 50, 50, 0]
    assert hausdorff_95(full, full) == 0 and overlap_row(full, one) == (1, 1200, hausdorff_95(one, full))
    with pytest.raises(ValueError, match='not compared'): overlap_row(empty, one[:, :5])


def test_weights_count_images():
    predicted, true = masks(3)
    found, rows = table(predicted, true, np.arange(30) % 2)
    counts = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), 50)
    for metric in (dice, iou, dice_per_image):
        again = [metric(found[o], rows[o]) for o in (np.repeat(np.arange(30), w) for w in counts)]
        np.testing.assert_allclose(metric(found, rows, weights=counts), again, atol=1e-12)
