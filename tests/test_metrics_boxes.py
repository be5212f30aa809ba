"Average precision against pycocotools and faster-coco-eval, FROC against loops; weights are counts; refusals."
import contextlib
import io
import time

import numpy as np
import pytest
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from medcl_study.measures.boxes import (COCO_AT, FROC_AT, MAP_AT, average_precision, box_iou, froc, froc_curve,
                                        match_boxes, stacked_boxes)
from medcl_study.measures.weights import Undefined


def detector(seed, *, n=60, classes=2, ties=False, mean=1.5, stray=4):
    "Boxes and predictions near and far from them, as rows of whole numbers; some images hold nothing."
    rng = np.random.default_rng(seed)
    scores, targets = [], []
    for _ in range(n):
        corner = rng.integers(0, 6000, (rng.poisson(mean), 2))
        true = np.c_[rng.integers(0, classes, len(corner)), corner, corner + rng.integers(400, 4000, corner.shape)]
        near = np.repeat(true, rng.integers(0, 3, len(true)), 0)
        near = np.c_[near[:, :1], near[:, 1:3] + rng.integers(-400, 400, (len(near), 2)), near[:, 3:]]
        corner = rng.integers(0, 6000, (rng.poisson(stray), 2))
        far = np.c_[rng.integers(0, classes, len(corner)), corner, corner + rng.integers(400, 4000, corner.shape)]
        boxes = np.r_[near, far].astype(float)
        rank = rng.integers(0, 6, len(boxes)) / 8 if ties else rng.random(len(boxes))
        scores.append(np.c_[boxes[:, :1], rank, boxes[:, 1:]]); targets.append(true.astype(float))
    return scores, targets


def coco(scores, targets, thresholds, *, faster=False):
    "Mean AP over thresholds and classes as the reference computes it, without its limits on area and count."
    number = max([0, *(int(o[:, 0].max()) for o in [*scores, *targets] if len(o))]) + 1
    def box(o): return [o[-4], o[-3], o[-2] - o[-4], o[-1] - o[-3]]
    images = [{'id': i + 1, 'width': 10_000, 'height': 10_000} for i in range(len(targets))]
    truth = [{'image_id': i + 1, 'category_id': int(o[0]) + 1, 'bbox': box(o), 'area': float(np.prod(box(o)[2:])), 'iscrowd': 0}
             for i, boxes in enumerate(targets) for o in boxes]
    truth = [o | {'id': i + 1} for i, o in enumerate(truth)]
    found = [{'image_id': i + 1, 'category_id': int(o[0]) + 1, 'bbox': box(o), 'score': o[1]}
             for i, boxes in enumerate(scores) for o in boxes]
    with contextlib.redirect_stdout(io.StringIO()):
        data = {'images': images, 'annotations': truth, 'categories': [{'id': c + 1, 'name': str(c)} for c in range(number)],
                'info': {}}
        if faster: known = FasterCOCO(data)
        else:
            known = COCO(); known.dataset = data; known.createIndex()
        evaluated = (COCOeval_faster if faster else COCOeval)(known, known.loadRes(found), 'bbox')
        evaluated.params.iouThrs, evaluated.params.maxDets = np.asarray(thresholds), [1, 10, 1000]
        evaluated.params.areaRng, evaluated.params.areaRngLbl = [[0, 1e10]], ['all']
        evaluated.evaluate(); evaluated.accumulate()
    precision = np.asarray(evaluated.eval['precision'])[..., 0, -1]
    return precision[precision > -1].mean()


@pytest.mark.parametrize('faster', [False, True])
@pytest.mark.parametrize('thresholds', [MAP_AT, COCO_AT, [.5]], ids=['map', 'coco', '50'])
@pytest.mark.parametrize('seed', range(4))
def test_average_precision_equals_coco(seed, thresholds, faster):
    scores, targets = detector(seed, classes=1 + seed % 3)
    assert average_precision(scores, targets, thresholds=thresholds)() == pytest.approx(
        coco(scores, targets, thresholds, faster=faster), abs=1e-9)


@pytest.mark.parametrize('scores, targets', [
    ([[[0, .5, 0, 0, 10, 10]]], [[[0, 0, 0, 10, 10]]]),  # one image, one hit
    ([[[0, .5, 0, 0, 10, 10]]], [[[0, 20, 20, 30, 30]]]),  # one image, one miss
    ([[[0, .9, 0, 0, 10, 10], [0, .8, 0, 0, 10, 10]]], [[[0, 0, 0, 10, 10]]]),  # found twice
    ([[[0, .9, 0, 0, 10, 10]]], [[[0, 0, 0, 10, 10], [0, 0, 0, 10, 10]]]),  # two equal true boxes
    ([[[0, .9, 0, 0, 10, 5]]], [[[0, 0, 0, 10, 10]]]),  # IoU exactly at a threshold
    ([[[1, .9, 0, 0, 10, 10], [0, .3, 0, 0, 10, 10]]], [[[0, 0, 0, 10, 10]]]),  # a class that is never true
    ([[[0, .9, 0, 0, 10, 10]], np.zeros((0, 6))], [[[0, 0, 0, 10, 10]], [[1, 0, 0, 9, 9]]]),  # a class never predicted
    ([[[0, .9, 5, 5, 5, 5], [0, .8, 0, 0, 10, 10]]], [[[0, 0, 0, 10, 10]]]),  # a predicted box without area
])
def test_average_precision_equals_coco_in_odd_cases(scores, targets):
    scores, targets = ([np.array(o, float) for o in side] for side in (scores, targets))
    assert average_precision(scores, targets)() == pytest.approx(coco(scores, targets, MAP_AT), abs=1e-9)


def test_matching_equals_the_loop():
    rng = np.random.default_rng(0)
    for _ in range(60):
        overlap = rng.integers(0, 11, (rng.integers(1, 9), rng.integers(1, 6))) / 10
        for t, row in zip((.3, .5, .7), match_boxes(overlap, np.array([.3, .5, .7]))):
            free, hits = set(range(overlap.shape[1])), []
            for one in overlap:
                fits = [j for j in free if one[j] >= t]
                hits.append(bool(fits))
                if fits: free.remove(max(fits, key=lambda j: (one[j], j)))
            assert row.tolist() == hits


def froc_loop(scores, targets, allowed):
    "Try every threshold on every image, class by class."
    classes, n = sorted({int(o[0]) for boxes in targets for o in boxes}), len(targets)
    values = []
    for c in classes:
        total = sum(o[0] == c for boxes in targets for o in boxes)
        best = np.zeros(len(allowed))
        for s in {o[1] for boxes in scores for o in boxes if o[0] == c}:
            found = wrong = 0
            for predicted, true in zip(scores, targets):
                centres = [((o[2] + o[4]) / 2, (o[3] + o[5]) / 2) for o in predicted if o[0] == c and o[1] >= s]
                true = [o for o in true if o[0] == c]
                def inside(p, o): return o[1] <= p[0] <= o[3] and o[2] <= p[1] <= o[4]
                found += sum(any(inside(p, o) for p in centres) for o in true)
                wrong += sum(not any(inside(p, o) for o in true) for p in centres)
            best = np.where(wrong <= np.array(allowed) * n, np.maximum(best, found / total), best)
        values.append(best)
    return np.mean(values, 0)


@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('seed', range(3))
def test_froc_equals_the_loop(seed, ties):
    scores, targets = detector(seed, n=25, ties=ties)
    np.testing.assert_allclose(froc_curve(scores, targets)(), froc_loop(scores, targets, FROC_AT), atol=1e-12)
    assert froc(scores, targets)() == pytest.approx(froc_loop(scores, targets, FROC_AT).mean(), abs=1e-12)


@pytest.mark.parametrize('ties', [False, True])
def test_weights_count_images(ties):
    scores, targets = detector(7, ties=ties)
    rng = np.random.default_rng(1)
    counts = rng.multinomial(60, np.full(60, 1 / 60), 20)
    for measure in (average_precision, froc):
        values = measure(scores, targets)(counts)
        for w, value in zip(counts, values):
            rows = np.repeat(np.arange(60), w)
            again = measure([scores[i] for i in rows], [targets[i] for i in rows])()
            assert value == pytest.approx(again, abs=1e-12)


def test_equal_scores_do_not_depend_on_the_order_of_images_or_boxes():
    scores, targets = detector(3, ties=True)
    order = np.random.default_rng(0).permutation(60)
    for measure in (average_precision, froc):
        assert measure([scores[i] for i in order], [targets[i] for i in order])() == pytest.approx(
            measure(scores, targets)(), abs=1e-12)


def test_monotone_maps_of_scores_and_stretched_axes_change_nothing():
    scores, targets = detector(4)
    mapped = [np.c_[o[:, :1], np.exp(5 * o[:, 1]), o[:, 2:] * [1, 3, 1, 3]] for o in scores]
    stretched = [o * [1, 1, 3, 1, 3] for o in targets]
    for measure in (average_precision, froc):
        assert measure(mapped, stretched)() == pytest.approx(measure(scores, targets)(), abs=1e-12)


def test_a_perfect_detector_has_one_and_an_empty_one_zero():
    _, targets = detector(0)
    perfect = [np.c_[o[:, :1], np.ones(len(o)), o[:, 1:]] for o in targets]
    nothing = [np.zeros((0, 6))] * len(targets)
    for measure in (average_precision, froc):
        assert measure(perfect, targets)() == pytest.approx(1)
        assert measure(nothing, targets)() == 0
        assert measure([o.ravel() for o in perfect], [o.ravel() for o in targets])() == pytest.approx(1)


def test_a_resample_without_boxes_has_no_value():
    scores, targets = detector(0)
    without = np.array([float(len(o) == 0) for o in targets])
    for measure in (average_precision, froc): assert np.isnan(measure(scores, targets)(without))


def test_bad_boxes_are_refused():
    scores, targets = detector(0, n=5)
    broken = [o.copy() for o in scores]; broken[2] = np.array([[0, np.nan, 0, 0, 1, 1]])
    for measure in (average_precision, froc):
        with pytest.raises(ValueError, match='first in row 3'): measure(broken, targets)
        with pytest.raises(ValueError, match='do not match'): measure(scores[:-1], targets)
        with pytest.raises(Undefined, match='none of the 5 images has a box'): measure(scores, [[]] * 5)
        with pytest.raises(ValueError, match='do not match'): measure(scores, targets)(np.ones(4))
    with pytest.raises(ValueError, match='row 2 holds 4 numbers'): stacked_boxes([[], [1, 2, 3, 4]], 5)


def test_iou_equals_the_loop():
    rng = np.random.default_rng(0)
    a, b = (np.concatenate([o := rng.integers(0, 9, (12, 2)), o + rng.integers(0, 6, (12, 2))], 1).astype(float) for _ in 'ab')
    for i, p in enumerate(a):
        for j, q in enumerate(b):
            common = max(0, min(p[2], q[2]) - max(p[0], q[0])) * max(0, min(p[3], q[3]) - max(p[1], q[1]))
            union = np.prod(p[2:] - p[:2]) + np.prod(q[2:] - q[:2]) - common
            assert box_iou(a, b)[i, j] == pytest.approx(common / union if union else 0)


def test_two_thousand_resamples_of_a_thousand_images_take_seconds():
    scores, targets = detector(0, n=1000, classes=1, stray=60)
    counts = np.random.default_rng(0).multinomial(1000, np.full(1000, 1e-3), 2000).astype(float)
    start = time.perf_counter()
    value = average_precision(scores, targets)
    for i in range(0, 2000, 500): value(counts[i:i + 500])
    froc(scores, targets)(counts)
    assert time.perf_counter() - start < 30, 'a loop over resamples would take minutes'
