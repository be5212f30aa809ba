"""What earlier code of this field got wrong, asked of every data set at once.

Asked elsewhere, of what it concerns: 'No Finding' as class 0 (test_skin), a sigmoid that saturates (test_metrics), scores that depend on
the batch (test_evaluation), repeated texts as wrong answers (test_evaluation, test_literature), swapped axes of boxes (test_localized).
"""
import random
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from medcl_study.core import DataError
from medcl_study.data.corpora import mixture
from medcl_study.data.images import pack, read_image, resize, to_channels
from medcl_study.data.sets.localized import fraction
from medcl_study.data.tasks import CLASSIFICATION
from medcl_study.data.text import PROMPTS
from medcl_study.data.twins import DATA_SETS, make_twin, read_set
from medcl_study.encoders.image import image_tower
from medcl_study.metrics import accuracy, balanced_accuracy

CLASSIFIED = [k for k, o in DATA_SETS.items() if o.kind in CLASSIFICATION]
each = pytest.mark.parametrize('name', DATA_SETS)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('defects')
    for k in {o.write_twin: k for k, o in DATA_SETS.items()}.values(): make_twin(k, root, 24 if DATA_SETS[k].folder == 'medmnist' else 64)
    return root


@pytest.fixture(scope='module')
def corpora(root): return {k: read_set(k, root) for k in DATA_SETS}


# ---- splits

@each
def test_nothing_stands_in_two_splits(corpora, name):
    "Four fifths of PAD-UFES-20's test images were trained on; HAM10000 and LC25000 were cut by image."
    frame = corpora[name].frame
    assert frame.id.is_unique
    assert frame[frame.group != ''].groupby('group').split.nunique().max() in (1, np.nan) or (frame.group == '').all()
    if corpora[name].pixels is None: assert frame.groupby('image').split.nunique().max() == 1


@each
def test_splits_are_no_draw(root, corpora, name):
    "Splits that were drawn when a set was read could not be had again."
    np.random.seed(None)
    random.seed()
    again = read_set(name, root)
    assert again.frame[['id', 'split', 'group']].equals(corpora[name].frame[['id', 'split', 'group']]) and again.hash() == corpora[name].hash()


# ---- a part of a set is drawn, not cut off

@pytest.mark.parametrize('name', [k for k in CLASSIFIED if not k.endswith('5x200') and DATA_SETS[k].folder != 'medmnist'])
def test_few_labels_are_no_prefix(corpora, name):
    train = corpora[name].split('train').frame.id.tolist()
    kept = [set(fraction(corpora[name], .5, draw).split('train').frame.id) for draw in range(5)]
    parts = [o for o in kept if len(o) < len(train)] # every class keeps a row, so a small twin may be kept whole
    assert not any(o == set(train[:len(o)]) for o in parts) and (len(set(map(frozenset, kept))) > 1)


def test_capped_corpora_are_no_prefix(corpora):
    names = {'pmc_oa': 1, 'roco': 1}
    mix = mixture(names, corpora={k: corpora[k] for k in names}, caps=dict.fromkeys(names, 12)).frame
    for k in names:
        kept = mix.id[(mix.corpus == k) & (mix.split == 'train')].str.removeprefix(f'{k}/').tolist()
        train = corpora[k].split('train').frame.id.tolist()
        assert 0 < len(kept) <= 12 and set(kept) < set(train) and set(kept) != set(train[:len(kept)])


# ---- pixels are scaled once, by the tower

@each
def test_pixels_are_scaled_once(corpora, name, tmp_path):
    "A transform that was applied twice fed towers images of another contrast."
    corpus = corpora[name].select([0])
    image = corpus[0].image if isinstance(corpus[0].image, np.ndarray) else read_image(corpus[0].image)
    batch = pack(corpus, tmp_path, size=32, draft=0).batch([0])
    assert image.dtype == batch.dtype == np.uint8 and image.max() > 1
    assert (batch[0] == to_channels(resize(image, 32, mode='pad'), 3)).all()


def test_scaled_pixels_are_refused():
    tower, images = image_tower('vit_tiny_p8', image_size=16, channels=3), torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
    with pytest.raises(TypeError, match='float32, expected uint8'): tower.normalise(tower.normalise(images))


# ---- words of the modality

WORDS = { # modality → words that only its prompts may hold
    'histology': r'histo|patholog|H&E|slide',
    'chest': r'chest|x-ray|radiograph|mammogra',
    'skin': r'derm|skin|photograph of|mole',
    'blood': r'blood',
    'eye': r'fundus|retina|coherence|\boct\b',
    'CT': r'\bCT\b',
}
OF = {'histology': 'histology', 'X-ray': 'chest', 'mammography': 'chest', 'dermoscopy': 'skin', 'clinical photograph': 'skin', 'blood': 'blood',
      'fundus': 'eye', 'OCT': 'eye', 'CT': 'CT'}


@pytest.mark.parametrize('name', [k for k, o in DATA_SETS.items() if o.prompt_sets])
def test_prompts_speak_of_the_modality(name):
    "Dermatoscopy was asked about in words of histology, and twelve sets as if they were holiday photographs."
    row = DATA_SETS[name]
    own = next((v for k, v in OF.items() if k.lower() in row.modality.lower()), None)
    templates = [t for t in (*PROMPTS[row.prompt_sets[0]].templates, *PROMPTS[row.prompt_sets[0]].negatives)]
    assert own is None or any(re.search(WORDS[own], t) for t in templates)
    foreign = {k: t for k, v in WORDS.items() if k != own for t in templates if re.search(v, t)}
    assert not {k: t for k, t in foreign.items() if (own, k) != ('eye', 'skin')}, 'a fundus photograph is a photograph'
    assert not [t for p in row.prompt_sets for t in PROMPTS[p].templates if t.startswith(('a photo of', 'a bad photo', 'itap'))]


# ---- a decision belongs to one image

@pytest.mark.parametrize('low, high', [(-1, 1), (.1, .3), (-.2, -.1), (-100, 100)])
def test_binary_decisions_do_not_depend_on_the_batch(low, high):
    "Scores within 0 and 1 were taken as they are, others went through a sigmoid: one negative score changed every decision."
    rng = np.random.default_rng(0)
    scores, targets = rng.uniform(low, high, (200, 2)), np.arange(200) % 2
    whole = accuracy(scores, targets)
    for size in (1, 7, 50):
        parts = np.split(np.arange(200), np.arange(size, 200, size))
        assert sum(accuracy(scores[o], targets[o]) * len(o) for o in parts) == pytest.approx(whole * 200)
    order = rng.permutation(200)
    assert balanced_accuracy(scores[order], targets[order]) == balanced_accuracy(scores, targets)


# ---- files that are not as they were published

LISTED = sorted({o.folder: k for k, o in DATA_SETS.items() if o.folder not in ('medmnist', 'pcam', 'path_vqa', 'roco_v2')}.values())


@pytest.mark.parametrize('name', LISTED)
def test_half_of_an_archive_is_refused(root, tmp_path, name):
    "Images missing from the middle of a set never made it smaller in silence."
    folder = shutil.copytree(root/DATA_SETS[name].folder, tmp_path/DATA_SETS[name].folder)
    images = sorted(o for o in folder.rglob('*') if o.suffix in ('.jpg', '.jpeg', '.png', '.tif', '.dcm', '.dicom') and 'mask' not in str(o))
    for o in images[::2]: o.unlink()
    with pytest.raises(DataError): read_set(name, tmp_path)


@each
def test_a_column_more_changes_nothing(root, corpora, tmp_path, name):
    shutil.copytree(root/DATA_SETS[name].folder, tmp_path/DATA_SETS[name].folder)
    for path in (o for o in tmp_path.rglob('*.csv') if o.name != 'microscopy_ground_truth.csv'): # which has no names
        lines = path.read_text(encoding='utf-8-sig').splitlines()
        pd.read_csv(path, dtype=str, keep_default_na=False).assign(reviewer='x').to_csv(path, index=False)
        header = path.read_text().split('\n', 1)
        path.write_text(f'{lines[0]},reviewer\n{header[1]}') # names that pandas changes are put back
    for path in tmp_path.rglob('*.xlsx'): pd.read_excel(path, dtype=object).assign(reviewer='x').to_excel(path, index=False)
    columns = ['id', 'split', 'group', 'labels', 'text']
    assert read_set(name, tmp_path).frame[columns].equals(corpora[name].frame[columns])
