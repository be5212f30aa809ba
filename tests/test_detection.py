"Boxes from maps: torchvision's own way as the oracle, what may change nothing, what is refused; phantoms at size (slow)."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from medcl_study.core import DataError
from medcl_study.data.images import pack
from medcl_study.data.pairs import Corpus, Region
from medcl_study.data.phantom import phantom_corpus
from medcl_study.data.twins import make_twin, read_set
from medcl_study.encoders.image import image_tower
from medcl_study.evaluation import detection as module
from medcl_study.evaluation.detection import Detector, Part, Schedule, chosen_maps, detection, predicted, whole
from medcl_study.evaluation.maps import Maps
from medcl_study.measures.boxes import average_precision
from medcl_study.predictions import Task, measure, read_predictions, write_predictions

pytestmark = pytest.mark.usefixtures('one_thread')
QUICK = Schedule(epochs=2, least=12, warm=4)
CLASSES = ('cardiomegaly', 'pneumothorax')
TASK = Task('boxes', 'detection', CLASSES, source='phantom')


def random_tower(name='cnn_small', size=64):
    torch.manual_seed(0)
    return image_tower(name, image_size=size, channels=1).eval()


@pytest.fixture(scope='module')
def tower(): return random_tower()


@pytest.fixture(scope='module')
def splits(): return {k: phantom_corpus('chest', n, split=k) for k, n in (('train', 24), ('valid', 12), ('test', 14))}


@pytest.fixture(scope='module')
def part(tower, splits): return Part.of(splits['test'], splits['test'], CLASSES, Maps(tower))


@pytest.fixture(scope='module')
def detector(part):
    "A detector that nobody trained, but that says something."
    torch.manual_seed(1)
    maps = part.store.maps
    model = Detector(maps.channels, maps.strides, 64, 2, np.array([20., 30.])).eval()
    torch.nn.init.normal_(model.net.head.classification_head.cls_logits.weight, std=.3)
    torch.nn.init.normal_(model.net.head.regression_head.bbox_reg.weight, std=.3)
    return model


class Closed:
    "An encoder that gives patches and has no tower to train."
    def encode_image(self, images, patches=False):
        each = F.avg_pool2d(images.float() / 255, 8).flatten(2).transpose(1, 2)
        return SimpleNamespace(global_=each.mean(1), pooled=each.mean(1), patches=each)


def boxes(rows): return [o.reshape(-1, 6) for o in rows]


def test_loss_and_boxes_are_torchvisions_own(detector, part):
    images = part.store.pixels(range(4))

    class Backbone(torch.nn.Module):
        out_channels = module.WIDTH
        def forward(self, x):
            maps = part.store.maps((x * 255).round().to(torch.uint8))
            return detector.net.backbone({str(o): maps[o] for o in detector.used})
    net = type(detector.net)(Backbone(), 2, anchor_generator=detector.net.anchor_generator, head=detector.net.head, nms_thresh=.5,
                             center_sampling_radius=1.5 / module.UNIT, score_thresh=module.LEAST_SCORE, topk_candidates=400)
    net.transform = GeneralizedRCNNTransform(64, 64, [0.], [1.], size_divisible=1)
    pixels, maps = list(images.float() / 255), part.store.batch(range(4))
    with torch.no_grad():
        for a, b in zip(net.eval()(pixels), detector(maps)):
            assert len(a['boxes']) and all(torch.allclose(a[k].float(), b[k].float(), atol=1e-4) for k in a)
        losses = net.train()(pixels, part.boxes(range(4)))
        assert torch.allclose(sum(losses.values()), detector.loss(maps, part.boxes(range(4))), rtol=1e-5)


def test_neither_batches_nor_order_change_a_box(detector, part):
    rows = np.arange(14)
    first = boxes(predicted(detector, part, rows))
    order = np.random.default_rng(0).permutation(14)
    for other in (boxes(predicted(detector, part, rows, batch_size=3)),
                  [boxes(predicted(detector, part, order, batch_size=5))[i] for i in np.argsort(order)]):
        for a, b in zip(first, other):
            assert a.shape == b.shape and len(a)
            assert np.abs(a[:, :2] - b[:, :2]).max() < 1e-4 and np.abs(a[:, 2:] - b[:, 2:]).max() <= 1 # of 10,000


def test_at_most_100_boxes_best_first_inside_the_image(detector, part):
    for o in boxes(predicted(detector, part, np.arange(14))):
        assert 0 < len(o) <= 100 and (np.diff(o[:, 1]) <= 0).all() and o[:, 1].min() > module.LEAST_SCORE < .2
        assert (o[:, 2:] >= 0).all() and (o[:, 2:] <= 10_000).all() and (o[:, 4:] >= o[:, 2:4]).all()


def test_true_boxes_score_perfectly(part):
    "What is written as truth, said with certainty, has AP 1 at every threshold."
    targets = part.targets(range(14))
    said = [np.insert(o.reshape(-1, 5), 1, .9, axis=1).ravel() for o in targets]
    assert average_precision(said, targets)() == 1
    assert sum(map(len, part.truth)) > 3


def test_corners_are_whole_and_no_true_box_vanishes():
    corners = whole([(.5, .5, .50001, .7), (.99999, .99999, 1, 1), (0, .2, 1, .4)], 1)
    assert corners.tolist() == [[5000, 5000, 5001, 7000], [9999, 9999, 10_000, 10_000], [0, 2000, 10_000, 4000]]


@pytest.mark.parametrize('strides, sides, expected', [
    ((2, 4, 8, 16, 32), [2], [1, 2, 3]), ((4, 8, 16, 32), [24, 24], [1, 2, 3]), ((4, 8, 16, 32), [200], [3]),
    ((4, 16, 32), [10], [0]), ((16,), [10], [0]), ((3.5, 7, 14), [12], [0, 1, 2])])
def test_maps_follow_the_boxes(strides, sides, expected): assert chosen_maps(strides, sides) == expected


@pytest.mark.parametrize('finetune', [False, True])
def test_rows_of_the_protocol_by_seed_alone(tower, splits, finetune, tmp_path):
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    torch.manual_seed(5)
    first = detection(tower, TASK, splits, finetune=finetune, schedule=QUICK)
    drawn = torch.rand(3)
    torch.manual_seed(6)
    again = detection(tower, TASK, splits, finetune=finetune, schedule=QUICK)
    assert all(np.array_equal(a, b) for a, b in zip(first['scores'], again['scores']))
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3)) # the caller's random state is left alone
    assert all(torch.equal(before[k], v) for k, v in tower.state_dict().items()) and not tower.training
    assert set(first['protocol']) == {'detection_finetuned' if finetune else 'detection_frozen'} and len(first) == 14
    write_predictions(tmp_path/'rows.parquet', first)
    assert len(read_predictions(tmp_path/'rows.parquet')) == 14


def test_order_of_the_rows_changes_nothing(tower, splits):
    first = detection(tower, TASK, splits, schedule=QUICK)
    turned = {k: o.select(np.arange(len(o))[::-1]) for k, o in splits.items()}
    again = detection(tower, TASK, turned, schedule=QUICK).set_index('id').loc[first['id']]
    for a, b in zip(boxes(first['scores']), boxes(again['scores'])):
        assert a.shape == b.shape and (not len(a) or np.abs(a[:, 2:] - b[:, 2:]).max() <= 1)


def test_budgets_are_drawn_and_named(tower, splits):
    rows = detection(tower, TASK, splits, labels='0.5', draws=2, schedule=QUICK)
    assert set(rows['protocol']) == {'detection_frozen@0.5'} and set(rows['draw']) == {0, 1} and len(rows) == 28


def test_test_images_do_not_reach_the_training(tower, splits):
    "Fewer test images leave the boxes of the others as they are."
    whole, few = (detection(tower, TASK, splits | {'test': o}, schedule=QUICK) for o in (splits['test'], splits['test'].select([3, 4])))
    for a, b in zip(boxes(whole['scores'][3:5]), boxes(few['scores'])):
        assert a.shape == b.shape and (not len(a) or np.abs(a[:, 2:] - b[:, 2:]).max() <= 1)


@pytest.mark.parametrize('name', ['vit_tiny_p8', 'resnet10t'])
def test_other_towers(name, splits):
    for finetune in (False, True):
        assert len(detection(random_tower(name), TASK, splits, finetune=finetune, schedule=QUICK)) == 14


def test_a_closed_encoder_is_read_by_its_patches(splits):
    assert len(detection(Closed(), TASK, splits, schedule=QUICK)) == 14


def broken(regions):
    n = len(regions)
    frame = pd.DataFrame({'id': [f'film {i}' for i in range(n)], 'image': '', 'text': '', 'labels': [()] * n, 'group': '',
                          'split': '', 'modality': '', 'regions': regions})
    return Corpus(frame, name='broken', classes=CLASSES, pixels=np.zeros((n, 64, 64), np.uint8))


@pytest.mark.parametrize('region, says', [
    (Region(CLASSES[0], box=(.2, .2, 1.01, .5)), 'does not lie inside'), (Region(CLASSES[0], box=(.5, .2, .3, .5)), 'does not lie'),
    (Region(CLASSES[0], box=(20, 20, 40, 50)), 'in pixels'), (Region('cat', box=(.2, .2, .5, .5)), "'cat', which is no class")])
def test_bad_regions_are_refused_by_name(tower, splits, region, says):
    with pytest.raises(DataError, match=says) as e: detection(tower, TASK, splits | {'test': broken([(), (region,)])})
    assert 'film 1' in str(e.value)


def test_what_cannot_be_trained_is_refused(tower, splits):
    with pytest.raises(DataError, match='no training row'): detection(tower, TASK, splits | {'train': broken([()] * 8)})
    with pytest.raises(DataError, match="no class 'cat'"): detection(tower, Task('t', 'detection', ('cat',)), splits)
    with pytest.raises(DataError, match='lacks the splits'): detection(tower, TASK, {'test': splits['test']})
    with pytest.raises(ValueError, match='expected detection'): detection(tower, Task('t', 'grounding', CLASSES), splits)
    with pytest.raises(DataError, match='no image tower'): detection(Closed(), TASK, splits, finetune=True, schedule=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['rsna_pneumonia', 'object_cxr'])
def test_twins(name, tower, tmp_path):
    "The detection entries of the localized suite on twins of 256 images, shares of the labels included."
    make_twin(name, tmp_path, 256)
    corpus = read_set(name, tmp_path)
    splits = {o: corpus.split(o) for o in ('train', 'valid', 'test')}
    images = {k: pack(o, tmp_path/'packed', size=64, channels=1, workers=1) for k, o in splits.items()}
    task = Task(f'{name}_detection', 'detection', corpus.classes, source='twin')
    for finetune in (False, True):
        for labels in ('', '0.1', '0.01') if name == 'rsna_pneumonia' else ('',):
            rows = detection(tower, task, splits, images=images, finetune=finetune, labels=labels, draws=1)
            print(rows['protocol'][0], {o: round(measure(rows, o).value, 3) for o in ('map', 'ap50', 'froc')})
            if not labels: assert measure(rows, 'ap50').value > .15
            assert len(rows) == len(splits['test'])


def clip_trained(tower, corpus, epochs=6, batch=64):
    "Train a tower beside a bag of words to tell which report belongs to which image."
    from sklearn.feature_extraction.text import CountVectorizer
    words = torch.from_numpy(CountVectorizer(binary=True, ngram_range=(1, 3), min_df=5).fit_transform(corpus.texts).toarray()).float()
    images = torch.from_numpy(corpus.images(slice(None))).permute(0, 3, 1, 2).contiguous()
    heads = torch.nn.ModuleList([torch.nn.Linear(tower.width, 64), torch.nn.Linear(words.shape[1], 64)])
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], 1e-3, weight_decay=.05)
    tower.train()
    for rows in (o for _ in range(epochs) for o in torch.randperm(len(words)).split(batch)):
        x = F.normalize(heads[0](tower(tower.normalise(images[rows]))[1]), dim=1)
        z = 10 * x @ F.normalize(heads[1](words[rows]), dim=1).T
        loss = (F.cross_entropy(z, torch.arange(len(z))) + F.cross_entropy(z.T, torch.arange(len(z)))) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tower.eval()


@pytest.mark.slow
def test_phantoms_reach_ap50():
    "All six findings, 1,200 training images: maps of a CLIP-trained and of a random tower, frozen; and the tower trained along."
    sizes = {'train': 1200, 'valid': 200, 'test': 300}
    splits = {k: phantom_corpus('chest', n, split=k) for k, n in sizes.items()}
    task = Task('phantom_boxes', 'detection', splits['train'].classes, source='phantom')
    towers = {'random': random_tower(), 'clip': clip_trained(random_tower(), phantom_corpus('chest', 2000, seed=1))}
    found = {k: measure(detection(o, task, splits), 'ap50') for k, o in towers.items()}
    found['clip, fine-tuned'] = measure(detection(towers['clip'], task, splits, finetune=True), 'ap50')
    for k, o in found.items(): print(f'{k}: AP50 {o.value:.3f} ({o.low:.3f} to {o.high:.3f})')
    assert found['clip, fine-tuned'].low > .3 and found['clip'].low > .3
