"""data.images: every format, every refusal, and a cache that survives kills, rivals, and full disks."""
import hashlib
import inspect
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from medcl_study.core import DataError, OutputError, data_root
from medcl_study.data import images as module
from medcl_study.data.images import AUGMENTATIONS, MODES, augment, pack, read_image, resize, to_channels
from medcl_study.data.pairs import Corpus

RAMP = np.add.outer(np.arange(40), 3 * np.arange(60)).astype(np.uint8) # a smooth grey picture (40, 60)
COLOR = np.stack([RAMP, 255 - RAMP, RAMP // 2], -1)
PALETTE = Image.fromarray(COLOR).quantize(32)

TURNED = Image.Exif()
TURNED[0x0112] = 6 # turn clockwise


def saved(im, format, **options):
    f = io.BytesIO()
    im.save(f, format, **options)
    return f.getvalue()


# ---- pictures

EXACT = {
    'png grey': (saved(Image.fromarray(RAMP), 'PNG'), RAMP),
    'png rgb': (saved(Image.fromarray(COLOR), 'PNG'), COLOR),
    'png 1 bit': (saved(Image.fromarray(RAMP > 90), 'PNG'), (RAMP > 90) * np.uint8(255)),
    'png 16 bit': (saved(Image.fromarray(RAMP.astype(np.uint16) * 257), 'PNG'), RAMP),
    'png palette': (saved(PALETTE, 'PNG'), np.asarray(PALETTE.convert('RGB'))),
    'png grey palette': (saved(Image.fromarray(RAMP).convert('P'), 'PNG'), RAMP),
    'png half alpha': (saved(Image.merge('LA', (Image.fromarray(RAMP), Image.new('L', (60, 40), 51))), 'PNG'),
                       (RAMP.astype(int) * 51 + 127) // 255),
    'png opaque alpha': (saved(Image.fromarray(np.dstack([COLOR, np.full_like(RAMP, 255)])), 'PNG'), COLOR),
    'png no alpha at all': (saved(Image.fromarray(np.dstack([COLOR, np.zeros_like(RAMP)])), 'PNG'), COLOR * 0),
    'png transparent grey': (saved(Image.fromarray(RAMP), 'PNG', transparency=9), np.where(RAMP == 9, 0, RAMP)),
    'png transparent palette': (saved(PALETTE, 'PNG', transparency=9),
                                np.asarray(PALETTE.convert('RGB')) * (np.asarray(PALETTE) != 9)[..., None]),
    'png transparent grey palette': (saved(Image.fromarray(RAMP).convert('P'), 'PNG', transparency=9),
                                     np.where(RAMP == 9, 0, RAMP)),
    'gif first frame': (saved(Image.fromarray(RAMP), 'GIF', save_all=True, append_images=[Image.new('L', (60, 40), 9)] * 2), RAMP),
    'tiff grey': (saved(Image.fromarray(RAMP), 'TIFF', compression='tiff_lzw'), RAMP),
    'tiff first page': (saved(Image.fromarray(RAMP), 'TIFF', save_all=True, append_images=[Image.new('L', (9, 9))]), RAMP),
    'tiff 12 of 16 bit': (saved(Image.fromarray(np.round(RAMP * (4095 / 255)).astype(np.uint16)), 'TIFF'), RAMP),
    'tiff signed': (saved(Image.fromarray(RAMP.astype(np.int32) * 8 - 1024), 'TIFF'),
                    np.round((RAMP - RAMP.min()) * (255 / np.ptp(RAMP))).astype(int)),
    'tiff float': (saved(Image.fromarray(RAMP.astype(np.float32) / 7), 'TIFF'),
                   np.round((RAMP - RAMP.min()) * (255 / np.ptp(RAMP))).astype(int)),
    'bmp rgb': (saved(Image.fromarray(COLOR), 'BMP'), COLOR),
    'webp lossless': (saved(Image.fromarray(COLOR), 'WEBP', lossless=True), COLOR),
    'jpeg 2000': (saved(Image.fromarray(COLOR), 'JPEG2000'), COLOR),
    'rotated by exif': (saved(Image.fromarray(RAMP), 'PNG', exif=TURNED), np.rot90(RAMP, -1)),
}


@pytest.mark.parametrize('name', EXACT)
def test_lossless_pictures(name):
    raw, expected = EXACT[name]
    found = read_image(raw)
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (1 if name.startswith('tiff') else 0)


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK', 'YCbCr'])
def test_jpeg_modes(mode):
    im = Image.fromarray(COLOR)
    found = read_image(saved(im.convert(mode), 'JPEG', quality=95))
    expected = np.asarray(im.convert(mode).convert('L' if mode == 'L' else 'RGB')).astype(int)
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 3


@pytest.mark.parametrize('mode, format', [(m, f) for m in ('1', 'L', 'RGB') for f in ('PNG', 'GIF', 'TIFF', 'BMP')]
                         + [('L', 'JPEG'), ('CMYK', 'JPEG'), ('RGBA', 'PNG'), ('I;16', 'PNG')])
def test_one_pixel(mode, format):
    found = read_image(saved(Image.new(mode, (1, 1)), format))
    assert found.shape[:2] == (1, 1)
    for way in MODES: assert to_channels(resize(found, 8, mode=way), 3).shape == (8, 8, 3)


# ---- DICOM

def dicom(stored, **tags):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, '1.2.3', '1.2.4'
    ds = FileDataset('x', {}, file_meta=meta, preamble=b'\0' * 128)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, 'MONOCHROME2', int(stored.dtype.kind == 'i')
    ds.BitsAllocated = ds.BitsStored = 8 * stored.itemsize
    ds.HighBit, ds.PixelData = ds.BitsStored - 1, stored.tobytes()
    ds.Rows, ds.Columns = stored.shape[-2:]
    for k, v in tags.items(): setattr(ds, k, v)
    f = io.BytesIO()
    ds.save_as(f, enforce_file_format=True)
    return f.getvalue()


def by_the_standard(values, center, width):
    "PS3.3 C.11.2.1.2.1, LINEAR, one number at a time, output 0…1."
    def one(x):
        if x <= center - .5 - (width - 1) / 2: return 0.0
        if x > center - .5 + (width - 1) / 2: return 1.0
        return (x - (center - .5)) / (width - 1) + .5
    return np.vectorize(one)(values.astype(np.float64))


HOUNSFIELD = (RAMP.astype(np.int16) * 10 - 1000)


@pytest.mark.parametrize('tags', [{}, {'RescaleSlope': 1, 'RescaleIntercept': 0}, {'PhotometricInterpretation': 'MONOCHROME1'}])
def test_window_of_the_file(tags):
    expected = by_the_standard(HOUNSFIELD, 40, 400)
    if 'PhotometricInterpretation' in tags: expected = 1 - expected
    found = read_image(dicom(HOUNSFIELD, WindowCenter=[40, 900], WindowWidth=[400, 10], **tags))
    assert np.abs(found - 255 * expected).max() <= 0.51


def test_rescaled_unsigned_ct_and_given_window():
    stored = (HOUNSFIELD + 1024).astype(np.uint16)
    raw = dicom(stored, BitsStored=12, HighBit=11, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    assert np.abs(read_image(raw) - 255 * by_the_standard(HOUNSFIELD, 40, 400)).max() <= 0.51
    lung = np.clip((HOUNSFIELD - (-600.) + 750) / 1500, 0, 1) * 255
    assert np.abs(read_image(raw, window=(-600, 1500)) - lung).max() <= 0.51


def test_sigmoid_window():
    found = read_image(dicom(HOUNSFIELD, WindowCenter=0, WindowWidth=800, VOILUTFunction='SIGMOID'))
    assert np.abs(found - 255 / (1 + np.exp(-4 * HOUNSFIELD.astype(float) / 800))).max() <= 0.6


def test_lookup_table():
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 16], (np.arange(256)[::-1] * 257).astype(np.uint16).tobytes()
    table.add_new(0x00283006, 'OW', (np.arange(256)[::-1] * 257).astype('<u2').tobytes())
    assert (read_image(dicom(RAMP, VOILUTSequence=[table], WindowCenter=9, WindowWidth=9)) == 255 - RAMP).all()


def test_without_window_padding_is_ignored():
    stored = RAMP.astype(np.int16) + 100
    stored[0, 0] = -2000
    found = read_image(dicom(stored, PixelPaddingValue=-2000))
    assert found[0, 0] == 0 and found.max() == 255
    assert np.abs(found[1:] - (stored[1:] - stored[1:].min()) * (255 / np.ptp(stored[1:]))).max() < 2


def test_frames_and_colour():
    two = np.stack([RAMP, RAMP * 0])
    assert (read_image(dicom(two, NumberOfFrames=2)) > 0).any()
    raw = dicom(RAMP, SamplesPerPixel=3, PhotometricInterpretation='RGB', PlanarConfiguration=0, PixelData=COLOR.tobytes())
    assert (read_image(raw) == COLOR).all()


# Compressions that need a decoder outside Pillow and pydicom, and files whose pixels are damaged or missing.
UNREADABLE = {'without pixel data': ('reportsi', 'rtplan', 'rtstruct', 'test-SR', 'waveform_ecg', 'no_meta', 'UN_sequence',
                                     'nested_priv_SQ', 'priv_SQ', 'empty_charset_LEI', 'meta_missing_tsyntax', 'EndNoMeta'),
              'cannot be decoded': ('SC_rgb_jpeg_gdcm', 'JPEG2000-embedded', 'badVR', 'JPEGLS',
                                    'jls', 'jpeg_ls', 'JPEG-lossy', 'JPGExtended', 'MR_truncated', 'GDCMJ2K')}
SAMPLES = sorted((Path(pydicom.__file__).parent / 'data/test_files').glob('*.dcm'))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('path', SAMPLES, ids=lambda o: o.name)
def test_files_that_come_with_pydicom(path):
    try: found = read_image(path)
    except DataError as e:
        assert path.name in str(e)
        assert any(word in str(e) and any(o in path.name for o in names) for word, names in UNREADABLE.items()), str(e)
        if 'cannot be decoded' in str(e): assert 'pylibjpeg' in str(e)
    else: assert found.dtype == np.uint8 and found.size > 0 and found.ndim in (2, 3)


# ---- refusals

JPEG = saved(Image.fromarray(np.tile(COLOR, (5, 5, 1))), 'JPEG', quality=90)


def png_header(width, height):
    "A PNG that claims a size and has no pixels."
    raw = bytearray(saved(Image.new('1', (8, 8)), 'PNG'))
    raw[16:24] = width.to_bytes(4, 'big') + height.to_bytes(4, 'big')
    import zlib
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, 'big')
    return bytes(raw)


def no_pixels():
    ds = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    del ds.PixelData
    f = io.BytesIO()
    ds.save_as(f)
    return f.getvalue()


REFUSED = {'zero.png': (b'', 'zero bytes'), 'cut.jpg': (JPEG[:len(JPEG) // 2], 'truncated'),
           'head.jpg': (JPEG[:30], 'cannot be decoded|known format'),
           'bomb.png': (png_header(30_000, 30_000), 'bomb'), 'big.png': (png_header(10_000, 9_000), 'bomb'),
           'page.png': (b'<html>404</html>' * 20, 'known format'), 'report.dcm': (no_pixels(), 'without pixel data'),
           'cut.dcm': (dicom(RAMP)[:-500], 'cannot be decoded'), 'page.dcm': (b'<html>404</html>' * 20, 'without pixel data'),
           'bomb.dcm': (dicom(RAMP, Rows=30_000, Columns=30_000), 'bomb'),
           'script.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'known format')}


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning', 'ignore::UserWarning')
@pytest.mark.parametrize('name', REFUSED)
def test_refusals_name_file_and_remedy(name, tmp_path):
    raw, word = REFUSED[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=word) as e: read_image(tmp_path / name)
    assert str(e.value).startswith(str(tmp_path / name)) and e.value.remedy


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match='no such image file'): read_image(tmp_path / 'none.png')
    with pytest.raises(DataError, match='cannot be decoded'): read_image(tmp_path)


SEEDS = [JPEG, dicom(HOUNSFIELD, WindowCenter=1, WindowWidth=9)] + [
    EXACT[o][0] for o in ('png 16 bit', 'gif first frame', 'tiff grey', 'png palette')]


@pytest.mark.filterwarnings('ignore')
@settings(max_examples=200, deadline=None)
@given(raw=st.sampled_from(SEEDS), edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6), keep=st.floats(0.05, 1))
def test_damaged_bytes_give_an_image_or_a_data_error(raw, edits, keep):
    raw = bytearray(raw[:int(len(raw) * keep)])
    for where, value in edits: raw[int(where * (len(raw) - 1))] = value
    try: found = read_image(bytes(raw))
    except DataError: return
    assert found.dtype == np.uint8 and found.ndim in (2, 3)


# ---- resizing

@settings(max_examples=50, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), size=st.integers(1, 64), mode=st.sampled_from(MODES), deep=st.booleans())
def test_resize_keeps_type_and_constant_grey(h, w, size, mode, deep):
    image = np.full((h, w, 3) if deep else (h, w), 77, np.uint8)
    out = resize(image, size, mode=mode)
    assert out.shape == (size, size, *image.shape[2:]) and out.dtype == np.uint8
    assert set(np.unique(out)) <= {0, 77} and 77 in out
    if mode != 'pad': assert (out == 77).all()


def test_pad_keeps_proportions_and_crop_the_centre():
    wide = np.zeros((40, 80), np.uint8)
    wide[:, 20:60] = 200
    assert (resize(wide, 40, mode='crop') > 190).all()
    out = resize(wide, 80, mode='pad')
    assert (out[:20] == 0).all() and (out[60:] == 0).all() and out[40, 40] == 200


@pytest.mark.parametrize('factor, bound', [(1, 2.5), (2, 1.0)])
def test_reduced_decoding_stays_close(factor, bound):
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(60, 200, (64, 64, 3)), np.ones((16, 16, 1))).astype(np.uint8) # 1,024 px
    raw = saved(Image.fromarray(texture).resize((1024, 1024), Image.Resampling.BICUBIC), 'JPEG', quality=90)
    full, fast = read_image(raw), read_image(raw, at_least=factor * 224)
    assert fast.shape[0] < full.shape[0]
    assert np.abs(resize(fast, 224).astype(int) - resize(full, 224)).mean() < bound


# ---- the packed cache

def make_corpus(folder, n=60, side=48, copies=()):
    "Write `n` small JPEGs; `copies` are rows that repeat file 0."
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (side, side + i % 5, 3), dtype=np.uint8)).save(folder / f'{i}.jpg')
    return open_corpus(folder, [*range(n), *copies])


def open_corpus(folder, numbers):
    import pandas as pd
    from medcl_study.data.pairs import Corpus
    files = [f'{i}.jpg' for i in numbers]
    frame = pd.DataFrame({'id': [f'row{i}' for i in range(len(files))], 'image': files, 'text': 'Chest.', 'labels': [()] * len(files),
                          'group': '', 'split': '', 'modality': ''})
    return Corpus(frame, name='made', root=folder)


def contents(folder):
    return {o.name: hashlib.sha256(o.read_bytes()).hexdigest() for o in folder.iterdir() if not o.name.startswith('.')}


@pytest.fixture
def counted(monkeypatch):
    "Count decoded files."
    seen, read = [], module.read_image
    monkeypatch.setattr(module, 'read_image', lambda path, **o: (seen.append(str(path)), read(path, **o))[1])
    return seen


def test_cache_equals_decoding(tmp_path, counted):
    corpus = make_corpus(tmp_path / 'in', 30, copies=[0, 0])
    cache = pack(corpus, tmp_path / 'out', size=32, channels=3)
    assert len(counted) == 30 and cache.shape == (32, 32, 32, 3) and cache.images.shape[0] == 30
    for i in (0, 7, 31): assert (cache[i] == resize(read_image(corpus[i].image), 32)).all()
    rows = np.array([31, 4, 4, 0])
    batch = cache.batch(rows)
    assert type(batch) is np.ndarray and batch.flags.writeable and (batch == np.stack([cache[i] for i in rows])).all()
    assert (cache.select(rows).batch([1, 3]) == batch[[1, 3]]).all() and (cache.select(rows).rows == rows).all()
    assert (pack(corpus.select([5, 6]), tmp_path / 'out', size=32)[1] == cache[6]).all()


def test_key_knows_contents_and_settings_only(tmp_path, counted):
    corpus = make_corpus(tmp_path / 'in', 5)
    first = pack(corpus, tmp_path / 'out', size=16).folder
    for other in (dict(size=17), dict(channels=1), dict(mode='crop'), dict(draft=1.0), dict(window=(0, 9))):
        assert pack(corpus, tmp_path / 'out', **{'size': 16} | other).folder != first
    counted.clear()
    (tmp_path / 'in').rename(tmp_path / 'moved')
    assert pack(open_corpus(tmp_path / 'moved', range(5)), tmp_path / 'out', size=16).folder == first and not counted
    Image.new('L', (48, 48)).save(tmp_path / 'moved/3.jpg')
    assert pack(open_corpus(tmp_path / 'moved', range(5)), tmp_path / 'out', size=16).folder != first


def test_known_files_are_not_read_again(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / 'in', 5)
    pack(corpus, tmp_path / 'out', size=16)
    hashed, real = [], module.content_hash
    def spy(*parts, **options):
        hashed.extend(o for o in parts if isinstance(o, Path))
        return real(*parts, **options)
    monkeypatch.setattr(module, 'content_hash', spy)
    pack(corpus, tmp_path / 'out', size=16)
    assert not hashed
    os.utime(tmp_path / 'in/2.jpg', (1, 1))
    pack(corpus, tmp_path / 'out', size=16)
    assert [o.name for o in hashed] == ['2.jpg']


def test_bad_images_are_named_or_left_out(tmp_path):
    corpus = make_corpus(tmp_path / 'in', 12)
    (tmp_path / 'in/3.jpg').write_bytes(JPEG[:200])
    (tmp_path / 'in/8.jpg').unlink()
    with pytest.raises(DataError, match=r"in/3\.jpg, row row3: .*on_bad='skip'"): pack(corpus, tmp_path / 'out', size=16)
    cache = pack(corpus, tmp_path / 'out', size=16, on_bad='skip')
    assert len(cache) == 10 and cache.report.row.tolist() == [3, 8] and cache.report.id.tolist() == ['row3', 'row8']
    assert cache.rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    for i, row in enumerate(cache.rows): assert (cache[i] == resize(read_image(corpus[row].image), 16)).all()
    with pytest.raises(DataError, match='row3'): pack(corpus, tmp_path / 'out', size=16)
    make_corpus(tmp_path / 'in', 12) # repaired
    assert len(pack(corpus, tmp_path / 'out', size=16)) == 12
    with pytest.raises(ValueError, match='on_bad'): pack(corpus, tmp_path / 'out', on_bad='ignore')


class Rendered:
    "A corpus that draws its images, as phantoms do."
    calls = 0

    def __len__(self): return 100
    def hash(self): return 'rendered-1'
    def __getitem__(self, i): raise AssertionError('rendered in bulk, not one by one')
    def images(self, rows):
        self.calls += 1
        return np.broadcast_to(np.asarray(rows, np.uint8)[:, None, None, None], (len(rows), 24, 24, 1))


def test_rendered_corpora_are_drawn_in_bulk(tmp_path):
    corpus = Rendered()
    cache = pack(corpus, tmp_path, size=16, channels=3)
    assert (cache.batch(range(100))[:, 5, 5, 2] == np.arange(100)).all() and corpus.calls == 1
    pack(corpus, tmp_path, size=16, channels=3)
    assert corpus.calls == 1


def test_arrays_are_packed(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 20, 20, 3), dtype=np.uint8)
    frame = open_corpus(tmp_path, range(4)).frame.assign(image='')
    cache = pack(Corpus(frame, name='held', pixels=pixels), tmp_path, size=20)
    assert (cache.batch(range(4)) == pixels).all()
    pixels[2] = 0
    assert pack(Corpus(frame, name='held', pixels=pixels), tmp_path, size=20).folder != cache.folder


def test_pickled_cache_carries_no_pixels(tmp_path):
    cache = pack(make_corpus(tmp_path / 'in', 20), tmp_path / 'out', size=32)
    cache.batch([0])
    raw = pickle.dumps(cache)
    assert len(raw) < 4000 and (pickle.loads(raw).batch([3, 1]) == cache.batch([3, 1])).all()


def test_damaged_cache_and_bad_folder(tmp_path):
    corpus = make_corpus(tmp_path / 'in', 4)
    cache = pack(corpus, tmp_path / 'out', size=16)
    (cache.folder / 'images.npy').write_bytes(b'rubbish')
    with pytest.raises(DataError, match='Delete the folder'): pack(corpus, tmp_path / 'out', size=16).batch([0])
    (tmp_path / 'file').touch()
    with pytest.raises(OutputError, match='cannot write'): pack(corpus, tmp_path / 'file/out', size=16)
    with pytest.raises(DataError, match='corpus is empty'): pack(corpus.select([]), tmp_path / 'out')


# ---- several processes

SCRIPT = textwrap.dedent('''
    import json, time
    from pathlib import Path
    from medcl_study.data import images as module
    module.CHUNK_BYTES = 5 * 32 * 32 * 3
    read, seen = module.read_image, []
    def slow(path, **o):
        seen.append(path)
        time.sleep({pause})
        return read(path, **o)
    module.read_image = slow
    {after_imports}
    print('ready', flush=True)
    try: cache = module.pack(open_corpus(Path({source!r}), range({n})), {out!r}, size={size}, workers=1)
    except Exception as e: print(json.dumps(dict(error=type(e).__name__, message=str(e), decoded=len(seen))))
    else: print(json.dumps(dict(folder=str(cache.folder), decoded=len(seen))))
''')


def start(tmp_path, out, *, n=60, pause=0.0, size=32, before='', after_imports=''):
    code = before + inspect.getsource(open_corpus) + SCRIPT.format(
        source=str(tmp_path / 'in'), out=str(tmp_path / out), n=n, pause=pause, size=size, after_imports=after_imports)
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)


def result(process):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def wait_for_chunks(folder, number):
    "Wait until the journal holds `number` finished chunks."
    for _ in range(1200):
        journal = next(iter(folder.glob('*/journal.jsonl')), None)
        if journal and journal.read_text().count('\n') >= number: return journal
        time.sleep(0.02)
    raise AssertionError('the build never got that far')


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('packed')
    make_corpus(folder / 'in')
    return folder, contents(Path(result(start(folder, 'plain'))['folder']))


def test_killed_build_goes_on_where_it_stopped(undisturbed):
    "SIGKILL in the middle, twice: finished chunks are not decoded again, and the bytes are those of an undisturbed build."
    folder, expected = undisturbed
    for chunks in (3, 7):
        process = start(folder, 'killed', pause=0.02)
        journal = wait_for_chunks(folder / 'killed', chunks)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        finished = journal.read_text().count('\n')
        assert chunks <= finished < 12 and not (journal.parent / 'meta.json').exists()
        with journal.open('a') as f: f.write('{"chunk": 11, "ba') # a line torn by the kill
    last = result(start(folder, 'killed'))
    assert last['decoded'] == 60 - 5 * finished
    assert contents(Path(last['folder'])) == expected


def test_two_writers_make_one_cache(undisturbed):
    folder, expected = undisturbed
    results = [result(o) for o in [start(folder, 'both', pause=0.01) for _ in range(2)]]
    assert results[0]['folder'] == results[1]['folder']
    assert sum(o['decoded'] for o in results) == 60, 'each image was decoded once, by one of the two'
    assert contents(Path(results[0]['folder'])) == expected


def test_second_writer_takes_over_from_a_killed_one(undisturbed):
    folder, expected = undisturbed
    first = start(folder, 'heir', pause=0.02)
    wait_for_chunks(folder / 'heir', 3)
    second = start(folder, 'heir')
    second.stdout.readline()
    time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    heir = result(second)
    assert heir['decoded'] <= 45
    assert contents(Path(heir['folder'])) == expected


def test_full_disk_is_an_output_error_and_work_is_kept(undisturbed):
    "A limit on file size stands for the full disk: refused while reserving, and nothing is left that looks complete."
    folder, expected = undisturbed
    before = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n'
    failed = result(start(folder, 'full', before=before))
    assert failed['error'] == 'OutputError' and 'cannot write' in failed['message'] and failed['decoded'] == 0
    assert not list((folder / 'full').glob('*/meta.json')) and not list((folder / 'full').glob('*/images.npy'))
    assert contents(Path(result(start(folder, 'full'))['folder'])) == expected


def test_read_only_folder():
    "A finished cache is used where nothing can be written; a new one is refused. (Root may write anywhere, so it becomes nobody.)"
    folder = Path(tempfile.mkdtemp())
    make_corpus(folder / 'in', 12)
    cache = Path(result(start(folder, 'out', n=12))['folder'])
    for o in (folder, folder / 'in'): o.chmod(0o755)
    for o in (cache, folder / 'out'): o.chmod(0o555)
    nobody = 'import os, pyarrow.parquet; os.geteuid() or os.setuid(65534)'
    assert result(start(folder, 'out', n=12, after_imports=nobody)) == {'folder': str(cache), 'decoded': 0}
    failed = result(start(folder, 'out', n=12, size=33, after_imports=nobody))
    assert failed['error'] == 'OutputError' and 'cannot write' in failed['message']
    for o in (folder / 'out', cache): o.chmod(0o755)
    shutil.rmtree(folder)


# ---- augmentation

torch = pytest.importorskip('torch')
HALVES = torch.zeros(64, 1, 48, 48, dtype=torch.uint8)
HALVES[..., :24] = 200


@pytest.mark.parametrize('kind', AUGMENTATIONS)
@pytest.mark.parametrize('channels', [1, 3])
def test_augmentation_depends_on_seed_epoch_and_index_alone(kind, channels):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (6, channels, 32, 32), dtype=np.uint8))
    torch.manual_seed(0)
    a = augment(images, seed=3, epoch=2, index=range(6), kind=kind)
    torch.manual_seed(1)
    np.random.seed(1)
    b = augment(images.flip(0), seed=3, epoch=2, index=range(5, -1, -1), kind=kind).flip(0)
    assert torch.equal(a, b) and a.dtype == torch.uint8 and a.shape == images.shape
    if kind == 'none': assert torch.equal(a, images)
    else:
        for other in (dict(seed=4, epoch=2), dict(seed=3, epoch=3)):
            assert not torch.equal(a, augment(images, index=range(6), kind=kind, **other))
        alike = augment(images[:1].expand(6, -1, -1, -1), seed=3, epoch=2, index=range(6), kind=kind)
        assert len({bytes(o.numpy()) for o in alike}) > 3, 'each index has its own change'


@pytest.mark.parametrize('kind', [o for o in AUGMENTATIONS if not AUGMENTATIONS[o].flips])
def test_left_stays_left(kind):
    out = augment(HALVES, seed=0, epoch=0, index=range(64), kind=kind).float()
    assert (out[..., :24].mean((1, 2, 3)) > out[..., 24:].mean((1, 2, 3))).all()


def test_tissue_is_mirrored_half_of_the_time():
    out = augment(HALVES, seed=0, epoch=0, index=range(64), kind='tissue').float()
    share = (out[..., :24].mean((1, 2, 3)) > out[..., 24:].mean((1, 2, 3))).float().mean()
    assert 0.3 < share < 0.7


# ---- real images

def test_real_images():
    "Every tenth image of the real sample is read, at the size its index says."
    try: root = data_root()
    except DataError as e: pytest.skip(f'real images are not here: {e}')
    rows = [(o.parent / r['image'], r) for o in sorted(root.glob('*/index.jsonl')) for r in map(json.loads, o.open())][::10]
    if not rows: pytest.skip('real images are not here: no index.jsonl below MEDCL_DATA')
    for path, row in rows:
        found = read_image(path)
        assert found.shape[:2] == (row['height'], row['width']), path
        assert found.std() > 1, path
