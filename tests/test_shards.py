"""Shards: the bytes of a corpus in tar files, and one order of them for any number of workers, ranks and interruptions."""
import gc
import json
import multiprocessing
import os
import pickle
import signal
import tarfile
import time
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip('webdataset', reason='webdataset is not installed: pip install medcl_study[data]')

from medcl_study.core import DataError, Locked, OutputError, lock, seed_everything
from medcl_study.data import shards
from medcl_study.data.corpora import CORPORA, mixture, read_corpus
from medcl_study.data.images import pack
from medcl_study.data.loaders import BatchOrder, PairDataset, pair_loaders
from medcl_study.data.sets.sample import sample_pairs
from medcl_study.data.shards import ShardOrder, ShardStream, pack_shards, read_index, verify_shards, write_shards
from medcl_study.data.text import Tokenizer
from medcl_study.encoders.dual import DualEncoder, EncoderConfig
from medcl_study.methods import method_loss
from medcl_study.trainer import TrainConfig, train


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('shards')
    for o in ('roco', 'roco_v2', 'manifest'): CORPORA[o].write_twin(root/o, 64, 0)
    return root


@pytest.fixture(scope='module')
def mix(root): return mixture({'roco': 2, 'roco_v2': 1, 'manifest': 1}, root=root)


@pytest.fixture(scope='module')
def folder(mix, root):
    "Shards of the mixture in the order of its table."
    write_shards(mix, root/'plain', count=20, seed=None)
    return root/'plain'


@pytest.fixture(scope='module')
def tokenizer(mix): return Tokenizer.train(list(mix.frame.text), vocab_size=300)


def open_stream(folder, tokenizer, split='train', **options):
    return ShardStream(folder, split, **dict(tokenizer=tokenizer, max_tokens=48, size=32, together=3) | options)


def equal(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k


def listing(folder): return {o.name: (o.stat().st_size, o.read_bytes()) for o in sorted(folder.glob('*.tar'))}


# ---- what is written

def test_files_go_in_as_they_are(mix, folder):
    index, part = read_index(folder), mix.split('train')
    with tarfile.open(folder/index['shards'][0]['file']) as tar:
        names = tar.getnames()
        assert names[:3] == ['000000000.json', '000000000.png', '000000000.txt']  # the manifest's images are PNG files
        for i in (0, 7, 19):
            assert tar.extractfile(f'{i:09d}.png').read() == part[i].image.read_bytes()
            assert tar.extractfile(f'{i:09d}.txt').read().decode() == part[i].text
            about = json.load(tar.extractfile(f'{i:09d}.json'))
            assert (about['id'], about['group'], about['split'], about['corpus']) == tuple(part.frame.loc[i, ['id', 'group', 'split', 'corpus']])
            assert tuple(about['labels']) == part[i].labels and about['source'] == 'twin'
    assert {o['split']: 0 for o in index['shards']}.keys() == set(mix.frame.split)
    assert verify_shards(folder) == len(mix)


def test_bytes_are_a_function_of_corpus_and_settings(mix, tmp_path):
    part = mix.split('valid')
    for name, seed in (('a', 0), ('b', 0), ('c', 1)): write_shards(part, tmp_path/name, count=10, seed=seed)
    assert listing(tmp_path/'a') == listing(tmp_path/'b') != listing(tmp_path/'c')
    ids = {o: sorted(ShardStream(tmp_path/o, 'valid', tokenizer=None, max_tokens=8).table().id) for o in 'ac'}
    assert ids['a'] == ids['c'] == sorted(part.frame.id)
    stamp = (tmp_path/'a'/'index.json').stat().st_mtime_ns
    write_shards(part, tmp_path/'a', count=10, seed=0)
    assert (tmp_path/'a'/'index.json').stat().st_mtime_ns == stamp


def test_shards_close_at_their_count_and_size(mix, tmp_path):
    part = mix.split('train')
    index = write_shards(part, tmp_path/'count', count=50)
    assert [o['pairs'] for o in index['shards']][:-1] == [50] * (len(part) // 50)
    index = write_shards(part, tmp_path/'size', size=30_000)
    assert all(20_000 < o['bytes'] < 120_000 for o in index['shards'][:-1]) and sum(o['pairs'] for o in index['shards']) == len(part)


def test_named_corpus(root, monkeypatch, tmp_path):
    monkeypatch.setenv('MEDCL_WORK', str(tmp_path))
    folder, index = pack_shards('roco', root=root, count=32)
    assert folder == tmp_path/'shards'/'roco' and verify_shards(folder) == 64 and index['name'] == 'roco'
    with pytest.raises(DataError, match="no corpus 'rocco'"): pack_shards('rocco', root=root)


# ---- what interrupts it

def test_killed_writer_goes_on_where_it_stopped(mix, tmp_path):
    part = mix.split('train')
    whole = write_shards(part, tmp_path/'whole', count=5)
    child = multiprocessing.get_context('fork').Process(target=write_slowly, args=(part, tmp_path/'killed'))
    child.start()
    start = time.monotonic()
    while not (tmp_path/'killed'/'train-000004.tar').exists() and time.monotonic() - start < 60: time.sleep(.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    first = tmp_path/'killed'/'train-000001.tar'
    stamp = first.stat().st_mtime_ns
    (tmp_path/'killed'/'.train-000007.tar.abc.tmp').write_bytes(b'torn')
    with pytest.raises(DataError, match='unfinished. Call write_shards again'): read_index(tmp_path/'killed')
    assert write_shards(part, tmp_path/'killed', count=5) == whole
    assert listing(tmp_path/'killed') == listing(tmp_path/'whole') and first.stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob('killed/.*.tmp')) and not (tmp_path/'killed'/'unfinished.json').exists()


def write_slowly(corpus, folder):
    plain = shards._record
    shards._record = lambda *args, **kwargs: (time.sleep(.01), plain(*args, **kwargs))[1]
    write_shards(corpus, folder, count=5, workers=1)


def test_one_writer_at_a_time_one_corpus_per_folder(mix, folder, tmp_path):
    with lock(tmp_path/'held'), pytest.raises(Locked): write_shards(mix, tmp_path/'held')
    with pytest.raises(DataError, match=r'other settings \(settings differ\)'): write_shards(mix, folder, count=21, seed=None)
    with pytest.raises(DataError, match='another corpus'): write_shards(mix.split('test'), folder, count=20, seed=None)
    (tmp_path/'file').touch()
    with pytest.raises(OutputError): write_shards(mix, tmp_path/'file'/'below')
    with pytest.raises(DataError, match='corpus is empty'): write_shards(mix.select([]), tmp_path/'none')
    with pytest.raises(ValueError, match="'raise' or 'skip'"): write_shards(mix, tmp_path/'none', on_bad='ignore')


@pytest.mark.parametrize('harm, words', [('cut', 'cannot be decoded'), ('empty', 'zero bytes'), ('gone', 'cannot be read')])
def test_broken_images_are_found_while_writing(tmp_path, harm, words):
    CORPORA['roco'].write_twin(tmp_path/'roco', 64, 0)
    corpus = read_corpus('roco', root=tmp_path)
    path = corpus.split('train')[3].image
    {'cut': lambda: path.write_bytes(path.read_bytes()[:300]), 'empty': lambda: path.write_bytes(b''), 'gone': path.unlink}[harm]()
    with pytest.raises(DataError, match=f'{path.name}, row train.*{words}.*on_bad'): write_shards(corpus, tmp_path/'out', count=4)
    index = write_shards(corpus, tmp_path/'skip', count=4, on_bad='skip')
    assert [o['id'] for o in index['left_out']] == [corpus.split('train')[3].id] and words in index['left_out'][0]['what']
    assert verify_shards(tmp_path/'skip') == 63 and {o['pairs'] for o in index['shards'] if o['split'] == 'train'} == {4, 3}
    assert len(ShardStream(tmp_path/'skip', tokenizer=None, max_tokens=8).table()) == 31


# ---- order

@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), together=st.integers(1, 5), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_order_is_a_local_permutation(sizes, together, seed, epoch):
    order = ShardOrder(sizes, 1, seed=seed, together=together)
    rows = order.rows(epoch)[:, 0]
    assert sorted(rows) == list(range(sum(sizes)))
    shard = np.repeat(np.arange(len(sizes)), sizes)[rows]
    change = [set(shard[:i]) & set(shard[i:]) for i in range(len(shard) + 1)]
    assert max(map(len, change)) <= together  # no more than these shards are begun and not ended
    plain = ShardOrder(sizes, 1, shuffle=False, together=together)
    assert (plain.rows(epoch) == BatchOrder(sum(sizes), 1, shuffle=False).rows(epoch)).all()


def test_epochs_and_seeds_differ():
    rows = [ShardOrder([10] * 8, 16, seed=s).rows(e).tolist() for s, e in ((0, 0), (0, 1), (1, 0))]
    assert rows[0] != rows[1] != rows[2] != rows[0]


# ---- streaming

@pytest.mark.parametrize('split', ['train', 'valid', 'test'])
def test_batches_equal_those_of_a_packed_cache(mix, folder, tokenizer, root, split):
    "Files, Parquet images and repeated rows, two views: the same bytes as from the cache of the same corpus."
    part, options = mix.split(split), dict(augmentation='crop', views=('strong',), seed=7)
    stream = open_stream(folder, tokenizer, split, **options)
    packed = PairDataset(pack(part, root/'packed', size=32), tokenizer(list(part.frame.text), max_tokens=48), part.text_ids(), **options)
    assert len(stream) == len(packed) and stream.table().id.tolist() == part.frame.id.tolist()
    for epoch in (0, 3):
        rows = np.random.default_rng(epoch).permutation(len(part))[:24]
        equal(stream[epoch, rows], packed[epoch, rows])


@pytest.mark.parametrize('workers', [1, 2, 3])
def test_same_batches_at_any_number_of_workers(folder, tokenizer, workers):
    stream, valid = open_stream(folder, tokenizer, augmentation='crop'), open_stream(folder, tokenizer, 'valid')
    for epoch in (0, 2):
        runs = []
        for n in (0, workers):
            loader = pair_loaders(stream, valid, batch_size=16, seed=4, workers=n).train
            loader.set_position(epoch)
            runs.append(list(loader))
        assert len(runs[0]) == len(stream) // 16
        for a, b in zip(*runs, strict=True): equal(a, b)


@pytest.mark.parametrize('workers', [0, 3])
def test_ranks_cut_the_same_global_batches(folder, tokenizer, workers):
    stream, valid = open_stream(folder, tokenizer), open_stream(folder, tokenizer, 'valid')
    whole = list(pair_loaders(stream, valid, batch_size=12, seed=4).train)
    parts = [list(pair_loaders(stream, valid, batch_size=12, seed=4, workers=workers, rank=r, world=3).train) for r in range(3)]
    for batch, *mine in zip(whole, *parts, strict=True):
        for k in ('index', 'text_id', 'images'): assert torch.equal(torch.cat([o[k] for o in mine]), batch[k])


def test_an_epoch_is_entered_in_the_middle(folder, tokenizer):
    stream, valid = open_stream(folder, tokenizer), open_stream(folder, tokenizer, 'valid')
    loader = pair_loaders(stream, valid, batch_size=16, seed=1, workers=2).train
    loader.set_position(5)
    whole = list(loader)
    loader.set_position(5, 4)
    for a, b in zip(whole[4:], loader, strict=True): equal(a, b)


def test_few_files_are_open_and_workers_open_their_own(folder, tokenizer):
    stream = open_stream(folder, tokenizer, together=2)
    for key in stream.order(8, seed=0):
        stream[key]
        assert len(stream._open) <= 4
    again = pickle.loads(pickle.dumps(stream))
    assert not again._open and again.hash() == stream.hash()
    equal(again[0, np.array([5, 50])], stream[0, np.array([5, 50])])


def test_training_on_a_stream_is_training_on_the_cache(mix, tokenizer, root, one_thread):
    "One method, three epochs, the same weights from either source when the order is the same."
    part = mix.split('train')
    write_shards(part, root/'one', count=1000, seed=None)
    stream = open_stream(root/'one', tokenizer, channels=1)
    packed = PairDataset(pack(part, root/'packed', size=32, channels=1), tokenizer(list(part.frame.text), max_tokens=48), part.text_ids())
    packed.order = stream.order
    weights = []
    for data in (stream, packed):
        seed_everything(0)
        encoder = DualEncoder(EncoderConfig('vit_tiny_p8', 'bert_tiny', image_size=32, channels=1, dim=16, max_tokens=48,
                                            vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)
        history = train(encoder, method_loss('clip'), pair_loaders(data, data, batch_size=32, seed=3), TrainConfig(epochs=2, batch_size=32))
        weights.append(torch.cat([o.detach().flatten() for o in encoder.parameters()]))
    assert torch.equal(*weights) and len(history) > 0


def test_memory_does_not_grow_with_epochs(folder, tokenizer):
    stream = open_stream(folder, tokenizer, 'test', together=1)
    loader, held = pair_loaders(stream, stream, batch_size=16, seed=1).train, []
    tracemalloc.start()
    for epoch in range(7):
        loader.set_position(epoch)
        for _ in loader: pass
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[-1] - held[2] < 100_000, held


# ---- what can happen to shards

def copy(folder, to):
    to.mkdir()
    for o in folder.iterdir(): (to/o.name).write_bytes(o.read_bytes())
    return to


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[1500] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize('harm, opens, words', [
    (lambda o: o.unlink(), False, 'no such shard. Copy it again'), (lambda o: o.write_bytes(o.read_bytes()[:-1]), False, 'the index says'),
    (flip, True, 'differs from its checksum'), (lambda o: o.write_bytes(bytes(o.stat().st_size)), True, 'differs from its checksum')])
def test_damaged_shards(folder, tokenizer, tmp_path, harm, opens, words):
    other = copy(folder, tmp_path/'copy')
    harm(other/'train-000002.tar')
    with pytest.raises(DataError, match=f'train-000002.tar: .*{words}'): verify_shards(other)
    if opens: assert open_stream(other, tokenizer)
    else:
        with pytest.raises(DataError, match=words): open_stream(other, tokenizer)


def test_a_shard_of_the_right_length_that_is_none(folder, tokenizer, tmp_path):
    other = copy(folder, tmp_path/'copy')
    (other/'train-000000.tar').write_bytes(b'x' * (other/'train-000000.tar').stat().st_size)
    with pytest.raises(DataError, match='train-000000.tar: not a readable shard'): open_stream(other, tokenizer)[0, np.array([0])]
    index = json.loads((other/'index.json').read_text())
    for o in index['shards']: o['pairs'] += o['file'] == 'train-000001.tar'
    (other/'index.json').write_text(json.dumps(index))
    with pytest.raises(DataError, match='train-000001.tar: 20 entries; the index says 21'): open_stream(other, tokenizer)[0, np.array([25])]


def test_folders_that_hold_no_shards(folder, tokenizer, tmp_path):
    with pytest.raises(DataError, match='no such file'): open_stream(tmp_path, tokenizer)
    (tmp_path/'index.json').write_text('{"format": 9}')
    with pytest.raises(DataError, match='an index of format 9; expected 1'): open_stream(tmp_path, tokenizer)
    with pytest.raises(DataError, match="no split 'dev'; there are .'test', 'train', 'valid'"): open_stream(folder, tokenizer, 'dev')


def test_other_readers_of_webdataset_agree(folder, mix):
    import webdataset
    urls = [str(folder/o['file']) for o in read_index(folder)['shards'] if o['split'] == 'test']
    texts = [o['txt'].decode() for o in webdataset.WebDataset(urls, shardshuffle=False)]
    assert texts == mix.split('test').frame.text.tolist()


# ---- real files

@pytest.mark.skipif(not os.environ.get('MEDCL_DATA'), reason='MEDCL_DATA is not set: no real files')
def test_real_pairs_stream_as_they_pack(tmp_path):
    if (corpus := sample_pairs()).source != 'real': pytest.skip('MEDCL_DATA holds a twin')
    index = write_shards(corpus, tmp_path/'shards', count=500)
    assert verify_shards(tmp_path/'shards') == 2593 and not index['left_out'] and len(index['shards']) == 7
    tokenizer = Tokenizer.train(list(corpus.frame.text), vocab_size=2000)
    stream = open_stream(tmp_path/'shards', tokenizer, size=64)
    place = pd.Series(range(len(corpus)), index=corpus.frame.id)
    rows = np.arange(0, len(stream), 40)
    part = corpus.select(place[stream.table().id.iloc[rows]].to_numpy())
    packed = pack(part, tmp_path/'packed', size=64)
    batch = stream[0, rows]
    assert (batch['images'][:, 0].permute(0, 2, 3, 1).numpy() == packed.batch(np.arange(len(part)))).all()
    assert batch['text_id'].tolist() == part.text_ids().tolist()
    loaders = [pair_loaders(stream, stream, batch_size=64, seed=1, workers=w).train for w in (0, 2)]
    for o in loaders: o.set_position(1, len(o) - 3)
    for a, b in zip(*loaders, strict=True): equal(a, b)
