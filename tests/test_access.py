"""Getting data: downloads that are cut, changed or wrong, archives that are not to be trusted, and a command that never shows a traceback."""
import email.utils
import gzip
import hashlib
import io
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcl_study.core import DataError, OutputError, read_json
from medcl_study.data import access
from medcl_study.data.access import NEEDS, _download, describe, find_set, get, main, state_of, status, unpack
from medcl_study.data.corpora import read_corpus
from medcl_study.data.sets.base import Remote
from medcl_study.data.shards import verify_shards
from medcl_study.data.twins import DATA_SETS, make_twins, read_set

CONTENT = bytes(range(256)) * 500
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(scope='module')
def twins(tmp_path_factory):
    "A data root that holds the twin of every set."
    root = tmp_path_factory.mktemp('twins')
    make_twins(root, n=32)
    return root


@pytest.fixture
def root(twins, tmp_path):
    "The same, to be changed."
    return shutil.copytree(twins, tmp_path/'twins')


# ---- what is there

def test_every_set_says_what_its_folder_must_hold(): assert set(NEEDS) == set(DATA_SETS)


@pytest.fixture
def alone(twins, tmp_path, name):
    "A root that holds the folder of one set."
    shutil.copytree(twins/DATA_SETS[name].folder, tmp_path/DATA_SETS[name].folder)
    return tmp_path


@pytest.mark.parametrize('name', DATA_SETS)
def test_a_whole_twin_is_a_twin_and_without_its_mark_real(name, alone):
    root = alone
    assert state_of(name, root) == ('twin', '')
    (root/DATA_SETS[name].folder/'TWIN').unlink()
    assert state_of(name, root) == ('real', '')


@pytest.mark.parametrize('name', DATA_SETS)
def test_what_is_called_incomplete_cannot_be_read(name, alone):
    "The table of names agrees with the readers: without any of them the reader refuses, too."
    root, folder = alone, alone/DATA_SETS[name].folder
    for need in NEEDS[name]:
        held = {o for one in need.split('|') for o in folder.glob(one.rstrip('/'))}
        assert held, f'{need}: the twin has no such file'
        for o in held: o.rename(o.with_name(o.name + '.away'))
        state, lacking = state_of(name, root)
        assert state == ('missing' if folder.name == 'medmnist' else 'incomplete')
        if state == 'incomplete': assert lacking == 'lacks ' + need.replace('|', ' or ')
        with pytest.raises(DataError): read_set(name, root)
        for o in held: o.with_name(o.name + '.away').rename(o)


def test_the_alternatives_of_a_need(tmp_path):
    folder = tmp_path/'slake'
    (folder/'imgs').mkdir(parents=True)
    for o in ('train.json', 'test.json', 'validate.json'): (folder/o).write_text('[]')
    assert state_of('slake', tmp_path) == ('incomplete', 'lacks imgs/') # an empty folder
    (folder/'imgs'/'xmlab0').mkdir()
    assert state_of('slake', tmp_path) == ('real', '')
    (folder/'test.json').write_text('') # zero bytes
    assert state_of('slake', tmp_path) == ('incomplete', 'lacks test.json')


def test_numbered_files_are_all_there_or_not(tmp_path):
    (tmp_path/'path_vqa').mkdir()
    def put(o): (tmp_path/'path_vqa'/o).write_text('x')
    for o in ('validation-00000-of-00001-x', 'test-00000-of-00001-x', 'train-00001-of-00002-x'): put(f'{o}.parquet')
    assert state_of('path_vqa', tmp_path)[0] == 'incomplete'
    put('train-00000-of-00002-x.parquet')
    assert state_of('path_vqa', tmp_path) == ('real', '')


def test_nothing_there(tmp_path):
    assert set(status(None).state) == set(status(tmp_path).state) == set(status(tmp_path/'none').state) == {'missing'}
    (tmp_path/'bach').mkdir()
    (tmp_path/'bach'/'.lock').touch()
    assert state_of('bach', tmp_path)[0] == 'missing'


def test_the_first_set_of_a_folder_does_not_make_the_others_incomplete(root):
    (root/'lc25000'/'lung_colon_image_set'/'lung_image_sets').rename(root/'away')
    assert [state_of(o, root)[0] for o in ('lc25000_colon', 'lc25000_lung')] == ['twin', 'missing']


def test_every_set_is_described(twins):
    for name, row in DATA_SETS.items():
        text = describe(name, twins)
        assert all(o in text for o in (row.title, row.licence, row.citation, row.split, row.steps, row.note, row.url, *row.prompt_sets))
        assert all(o.url in text and o.name in text for o in row.files) and 'state     twin' in text
    with pytest.raises(DataError, match="no data set 'pathmnits'. Perhaps 'pathmnist' is meant. Known are bach, "): describe('pathmnits')


def test_names_of_files_are_those_of_the_steps():
    for row in DATA_SETS.values():
        assert len({o.name for o in row.files}) == len(row.files)
        assert all(o.name.endswith(access.ARCHIVES) for o in row.files if o.unpack)
    with pytest.raises(ValueError, match='ends in no file name'): Remote('https://example.org/files/')


# ---- downloads

class Publisher(BaseHTTPRequestHandler):
    "A server whose manners the test decides."
    protocol_version = 'HTTP/1.1'
    files, asked = {}, []
    ranges, tag, cut, reset, length, page, status = True, '"1"', None, False, True, False, None
    MANNERS = {'ranges': True, 'tag': '"1"', 'cut': None, 'reset': False, 'length': True, 'page': False, 'status': None}

    def log_message(self, *_): pass
    def do_HEAD(self): self.do_GET(body=False)

    def do_GET(self, body=True):
        if body: type(self).asked.append((self.path, self.headers.get('Range'), self.headers.get('If-Range')))
        raw = self.files.get(self.path)
        if self.status or raw is None: return self.send_error(self.status or 404)
        start = self.start() if self.ranges else 0
        if start >= len(raw): return self.refuse(len(raw))
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(raw) - 1}/{len(raw)}')
        if self.length: self.send_header('Content-Length', str(len(raw) - start))
        if self.tag: self.send_header('ETag' if self.tag[0] in '"W' else 'Last-Modified', self.tag)
        if self.page: self.send_header('Content-Type', 'text/html; charset=utf-8')
        if not self.length or self.cut is not None: self.close_connection = True
        self.end_headers()
        if body: self.send(raw[start:][:self.cut])

    def start(self):
        span, condition = self.headers.get('Range'), self.headers.get('If-Range')
        return int(re.fullmatch(r'bytes=(\d+)-', span)[1]) if span and condition in (None, self.tag) else 0

    def refuse(self, total):
        self.send_response(416)
        self.send_header('Content-Range', f'bytes */{total}')
        self.send_header('Content-Length', '0')
        self.end_headers()

    def send(self, raw):
        self.wfile.write(raw)
        if self.reset: # the connection is torn down, not closed
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            self.connection.close()


@pytest.fixture(scope='module')
def server():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Publisher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.fixture
def publisher(server, monkeypatch):
    "The server with good manners and one file."
    for k, v in Publisher.MANNERS.items(): monkeypatch.setattr(Publisher, k, v)
    monkeypatch.setattr(Publisher, 'files', {'/a.bin': CONTENT})
    monkeypatch.setattr(Publisher, 'asked', [])
    return Publisher


@pytest.fixture
def remote(server): return Remote(f'{server}/a.bin', len(CONTENT), MD5)


def names(folder): return sorted(o.name for o in folder.iterdir())


def cut_once(publisher, remote, folder, at=70_000):
    publisher.cut = at
    with pytest.raises(DataError, match='connection broke.*Call again: the download goes on from there'): _download(remote, folder, say=str)
    publisher.cut = None
    return (folder/'a.bin.part').stat().st_size


def test_a_download(publisher, remote, tmp_path):
    lines = []
    _download(remote, tmp_path, say=lines.append)
    assert names(tmp_path) == ['a.bin'] and (tmp_path/'a.bin').read_bytes() == CONTENT and lines == ['  a.bin: 128 kB']


@pytest.mark.parametrize('tag', ['"1"', 'W/"1"', email.utils.formatdate(usegmt=True), ''])
def test_a_cut_download_goes_on(publisher, remote, tmp_path, tag):
    publisher.tag = tag
    assert cut_once(publisher, remote, tmp_path) == 70_000
    assert names(tmp_path) == ['a.bin.part', 'a.bin.part.json']
    _download(remote, tmp_path, say=str)
    assert names(tmp_path) == ['a.bin'] and (tmp_path/'a.bin').read_bytes() == CONTENT
    condition = None if tag.startswith('W/') else tag or None # a weak tag promises nothing about bytes
    assert publisher.asked[1] == ('/a.bin', 'bytes=70000-', condition)


def test_cut_at_every_stage(publisher, remote, tmp_path):
    for at in (0, 1, 50_000, 50_000): cut_once(publisher, remote, tmp_path, at=at)
    _download(remote, tmp_path, say=str)
    assert (tmp_path/'a.bin').read_bytes() == CONTENT
    assert [o[1] for o in publisher.asked] == [None, None, 'bytes=1-', 'bytes=50001-', 'bytes=100001-']


def test_a_connection_that_is_torn_down(publisher, remote, tmp_path):
    publisher.reset = True
    cut_once(publisher, remote, tmp_path)
    publisher.reset = False
    _download(remote, tmp_path, say=str)
    assert (tmp_path/'a.bin').read_bytes() == CONTENT


def test_a_server_that_knows_no_ranges_sends_everything_again(publisher, remote, tmp_path):
    publisher.ranges = False
    cut_once(publisher, remote, tmp_path)
    _download(remote, tmp_path, say=str)
    assert (tmp_path/'a.bin').read_bytes() == CONTENT and len(publisher.asked) == 2


@pytest.mark.parametrize('tag', ['"1"', ''])
def test_a_file_that_changed_meanwhile_is_never_mixed(publisher, remote, tmp_path, tag):
    publisher.tag = tag
    cut_once(publisher, remote, tmp_path)
    changed = CONTENT[::-1][:-7]
    publisher.tag, publisher.files = tag and '"2"', {'/a.bin': changed}
    _download(replace(remote, size=None, md5=''), tmp_path, say=str)
    assert (tmp_path/'a.bin').read_bytes() == changed


def test_a_file_that_shrank_meanwhile(publisher, remote, tmp_path):
    publisher.tag = ''
    cut_once(publisher, remote, tmp_path)
    publisher.files = {'/a.bin': b'short'} # 416, then the whole
    _download(replace(remote, size=None, md5=''), tmp_path, say=str)
    assert (tmp_path/'a.bin').read_bytes() == b'short'


def test_a_part_of_another_address_is_not_continued(publisher, remote, server, tmp_path):
    cut_once(publisher, remote, tmp_path)
    publisher.files = {'/other/a.bin': CONTENT}
    _download(replace(remote, url=f'{server}/other/a.bin'), tmp_path, say=str)
    assert publisher.asked[-1][1] is None and (tmp_path/'a.bin').read_bytes() == CONTENT


def test_killed_between_the_last_byte_and_the_name(publisher, remote, tmp_path):
    cut_once(publisher, remote, tmp_path)
    (tmp_path/'a.bin.part').write_bytes(CONTENT)
    _download(remote, tmp_path, say=str)
    assert names(tmp_path) == ['a.bin'] and len(publisher.asked) == 1


def test_a_server_that_tells_no_length(publisher, remote, tmp_path):
    publisher.length = False
    _download(replace(remote, size=None), tmp_path, say=str)
    assert (tmp_path/'a.bin').read_bytes() == CONTENT
    publisher.cut = 70_000 # looks whole; the checksum tells
    with pytest.raises(DataError, match=f'its md5 is .{{32}}, published is {MD5}'): _download(replace(remote, size=None), tmp_path, say=str)


def test_a_wrong_file_is_set_aside_and_named(publisher, remote, tmp_path):
    publisher.files = {'/a.bin': CONTENT[:-1] + b'x'}
    with pytest.raises(DataError, match=r'a\.bin\.wrong: its md5 is \w+, published is \w+; the file is set aside') as e:
        _download(remote, tmp_path, say=str)
    assert e.value.file == tmp_path/'a.bin.wrong' and names(tmp_path) == ['a.bin.wrong']
    publisher.files = {'/a.bin': CONTENT}
    _download(remote, tmp_path, say=str)
    assert names(tmp_path) == ['a.bin', 'a.bin.wrong']


def test_a_file_of_another_size_is_not_fetched(publisher, remote, tmp_path):
    with pytest.raises(DataError, match='the server has 128,000 bytes, published are 128,001'):
        _download(replace(remote, size=128_001), tmp_path, say=str)
    assert names(tmp_path) == []


def test_a_web_page_is_no_file(publisher, remote, tmp_path):
    publisher.page = True
    with pytest.raises(DataError, match='sends a web page instead of the file'): _download(remote, tmp_path, say=str)
    assert names(tmp_path) == []


@pytest.mark.parametrize('code', [403, 404, 416, 500, 503])
def test_servers_that_refuse(publisher, remote, tmp_path, code):
    publisher.status = code
    with pytest.raises(DataError, match='another part of the file' if code == 416 else f'the server answers {code}'):
        _download(remote, tmp_path, say=str)
    assert names(tmp_path) == []


def test_nobody_answers(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    with pytest.raises(DataError, match='cannot be reached.*Check the network'):
        _download(Remote(f'http://127.0.0.1:{port}/a.bin'), tmp_path, say=str)


def test_a_full_disk_is_noticed_first(publisher, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: type('usage', (), {'free': 1000}))
    with pytest.raises(OutputError, match=r'needs 128 kB, free are 1.0 kB'): _download(remote, tmp_path, say=str)


def test_progress_of_a_large_file():
    lines = []
    got = access._write(io.BytesIO(), [b'x' * (1 << 20)] * 200, 0, 200 << 20, lines.append)
    assert got == 200 << 20 and lines == [f'    {o}0 %' for o in range(1, 11)]


# ---- archives

def zipped(path, members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as f:
        for name, raw in members.items(): f.writestr(name, raw)
    return path


def tarred(path, members, mode='w:gz', **about):
    with tarfile.open(path, mode) as f:
        for name, raw in members.items():
            o = tarfile.TarInfo(name)
            o.size = len(raw)
            for k, v in about.items(): setattr(o, k, v)
            f.addfile(o, io.BytesIO(raw))
    return path


MEMBERS = {'images/a.png': b'a' * 10, 'images/deep/b.png': b'b', 'table.csv': b'image\n'}


@pytest.mark.parametrize('name', ['o.zip', 'o.tar', 'o.tar.gz', 'o.tgz', 'o.tar.xz', 'o.tar.bz2'])
def test_archives_of_every_kind(tmp_path, name):
    path = tmp_path/name
    if name == 'o.zip': zipped(path, MEMBERS)
    else: tarred(path, MEMBERS, {'tar': 'w', 'gz': 'w:gz', 'tgz': 'w:gz', 'xz': 'w:xz', 'bz2': 'w:bz2'}[name.rpartition('.')[2]])
    assert unpack(path) == ['images', 'table.csv'] and names(tmp_path) == ['images', name, 'table.csv']
    assert all((tmp_path/k).read_bytes() == v for k, v in MEMBERS.items())


def test_one_packed_file(tmp_path):
    (tmp_path/'x.h5.gz').write_bytes(gzip.compress(CONTENT))
    assert unpack(tmp_path/'x.h5.gz') == ['x.h5'] and (tmp_path/'x.h5').read_bytes() == CONTENT


def test_archives_inside_an_archive_are_unpacked_where_they_lie(tmp_path):
    inner = zipped(tmp_path/'imgs_part_1.zip', {'imgs_part_1/PAT_1.png': b'x'}).read_bytes()
    assert unpack(zipped(tmp_path/'o.zip', {'images/imgs_part_1.zip': inner, 'metadata.csv': b'y'})) == ['images', 'metadata.csv']
    assert names(tmp_path/'images') == ['imgs_part_1'] and names(tmp_path/'images'/'imgs_part_1') == ['PAT_1.png']


def test_what_is_there_already_is_completed(tmp_path):
    (tmp_path/'images').mkdir()
    (tmp_path/'images'/'own.txt').write_text('mine')
    (tmp_path/'images'/'a.png').write_bytes(b'half')
    (tmp_path/'.o.zip.unpacking'/'rest').mkdir(parents=True) # of a killed call
    unpack(zipped(tmp_path/'o.zip', MEMBERS))
    assert names(tmp_path/'images') == ['a.png', 'deep', 'own.txt'] and (tmp_path/'images'/'a.png').read_bytes() == b'a' * 10
    assert names(tmp_path) == ['images', 'o.zip', 'table.csv']


ESCAPING = ['../x', '/x', 'a/../../x', 'C:/x', 'C:x', '..\\x', 'a\\..\\..\\x', '\\x', '..', 'a/..']


@pytest.mark.parametrize('name', ESCAPING)
@pytest.mark.parametrize('kind', ['zip', 'tar'])
def test_paths_that_escape_are_refused(tmp_path, name, kind):
    folder = tmp_path/'deep'/'folder'
    folder.mkdir(parents=True)
    path = (zipped if kind == 'zip' else tarred)(folder/f'o.{kind}' if kind == 'zip' else folder/'o.tar.gz', {'fine.txt': b'x', name: b'x'})
    with pytest.raises(DataError, match='would not lie inside the folder. Nothing was unpacked'): unpack(path)
    assert names(folder) == [path.name] and names(tmp_path) == ['deep'] and names(tmp_path/'deep') == ['folder']


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('./\\:aC~'), min_size=1, max_size=9))
def test_no_name_leads_out(name):
    from pathlib import Path
    folder = Path('/data/set')
    try: target = access._inside(name, folder, 'o.zip')
    except DataError: return
    assert folder in Path(os.path.normpath(target)).parents


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    path = tarred(tmp_path/'o.tar', {'images': b''}, 'w', type=kind, linkname='/etc')
    with pytest.raises(DataError, match="'images' is a link or a device"): unpack(path)
    assert names(tmp_path) == ['o.tar']


def test_links_in_a_zip_are_refused(tmp_path):
    link = zipfile.ZipInfo('images')
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path/'o.zip', 'w') as f: f.writestr(link, '/etc')
    with pytest.raises(DataError, match="'images' is a link or a device"): unpack(tmp_path/'o.zip')
    assert names(tmp_path) == ['o.zip']


@pytest.mark.parametrize('name', ['o.zip', 'o.tar.gz', 'o.gz', 'nested.zip'])
def test_bombs_are_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr(access, 'BOMB_LEAST', 1 << 20)
    bomb, path = bytes(30 << 20), tmp_path/name
    if name == 'o.zip': zipped(path, {'a': bomb})
    elif name == 'o.gz': path.write_bytes(gzip.compress(bomb))
    elif name == 'o.tar.gz': tarred(path, {'a': bomb})
    else:
        inner = zipped(tmp_path/'inner.zip', {'a': bomb})
        zipped(path, {'inner.zip': inner.read_bytes()})
        inner.unlink()
    with pytest.raises(DataError, match='holds more than 100 times its size. Nothing was unpacked'): unpack(path)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize('name', ['o.zip', 'o.tar', 'o.tar.gz', 'o.gz', 'o.tar.xz'])
def test_damaged_archives(tmp_path, name):
    path = tmp_path/name
    path.write_bytes(b'no archive at all')
    with pytest.raises(DataError, match='not a readable archive.*download it again'): unpack(path)
    raw = {'o.zip': lambda: zipped(path, MEMBERS), 'o.tar': lambda: tarred(path, {'a': CONTENT}, 'w'), 'o.tar.gz': lambda: tarred(path, MEMBERS),
           'o.gz': lambda: path.write_bytes(gzip.compress(CONTENT)), 'o.tar.xz': lambda: tarred(path, MEMBERS, 'w:xz')}
    raw[name]()
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(DataError, match='not a readable archive'): unpack(path)
    assert names(tmp_path) == [name]


def test_what_is_no_archive_or_empty(tmp_path):
    with pytest.raises(DataError, match='not an archive. Expected one of .zip, '): unpack(tmp_path/'o.rar')
    with pytest.raises(DataError, match='an empty archive'): unpack(zipped(tmp_path/'o.zip', {}))
    assert names(tmp_path) == ['o.zip']


# ---- getting a set

@pytest.fixture
def offered(publisher, server, twins, tmp_path, monkeypatch):
    "SLAKE at the server: three tables, and an archive of the images."
    folder = twins/'slake'
    publisher.files = {f'/{o}.json': (folder/f'{o}.json').read_bytes() for o in ('train', 'validation', 'test')}
    images = {o.relative_to(folder).as_posix(): o.read_bytes() for o in sorted(folder.rglob('imgs/**/*')) if o.is_file()}
    publisher.files['/imgs.zip'] = zipped(tmp_path/'made.zip', images).read_bytes()
    def offer(o):
        raw = publisher.files[f'/{o.name}']
        return replace(o, url=f'{server}/{o.name}', md5=hashlib.md5(raw).hexdigest())
    row = DATA_SETS['slake']
    monkeypatch.setitem(DATA_SETS, 'slake', replace(row, files=tuple(offer(o) for o in row.files)))
    return tmp_path/'data'


def test_getting_a_set(offered, publisher, twins):
    lines = []
    assert get('slake', offered, say=lines.append) and state_of('slake', offered) == ('real', '')
    text = '\n'.join(lines)
    assert text.index('licence   CC BY 4.0') < text.index('size ') < text.index('unpacking') and '4 files from 127.0.0.1' in text
    assert len(read_set('slake', offered)) == len(read_set('slake', twins)) and read_set('slake', offered).source == 'real'
    assert read_json(offered/'slake'/'DOWNLOADS.json')['imgs.zip'] == ['imgs']
    asked = len(publisher.asked)
    assert get('slake', offered, say=lines.append) and len(publisher.asked) == asked and lines[-1].startswith('slake is there')


def test_terms_are_said_before_the_first_byte_is_asked_for(offered, publisher):
    seen = []
    def say(line): seen.append((len(publisher.asked), line))
    get('slake', offered, say=say)
    assert all(n == 0 for n, line in seen[:6]) and 'licence' in seen[1][1] and 'size' in seen[3][1]


def test_a_set_that_is_cut_again_and_again(offered, publisher):
    publisher.cut, calls = 30_000, 0
    while state_of('slake', offered)[0] != 'real' and calls < 30:
        calls += 1
        try: get('slake', offered, say=str)
        except DataError as e: assert 'connection broke' in str(e) and state_of('slake', offered)[0] == 'incomplete'
    assert 3 < calls < 30 and len(read_set('slake', offered))


def test_only_what_is_lacking_is_fetched(offered, publisher):
    get('slake', offered, say=str)
    (offered/'slake'/'imgs.zip').unlink() # may be deleted
    (offered/'slake'/'test.json').unlink()
    publisher.asked.clear()
    assert get('slake', offered, say=str) and [o[0] for o in publisher.asked] == ['/test.json']


def test_deleted_images_are_unpacked_again(offered, publisher):
    get('slake', offered, say=str)
    shutil.rmtree(offered/'slake'/'imgs')
    publisher.asked.clear()
    assert get('slake', offered, say=str) and publisher.asked == []


def test_unpacking_that_was_killed_is_done_again(offered):
    get('slake', offered, say=str)
    (offered/'slake'/'.imgs.zip.unpacking').mkdir()
    assert state_of('slake', offered) == ('incomplete', '.imgs.zip.unpacking was cut')
    assert get('slake', offered, say=str) and state_of('slake', offered) == ('real', '')


def test_files_placed_by_hand_are_used_if_they_are_right(offered, publisher):
    (offered/'slake').mkdir(parents=True)
    (offered/'slake'/'imgs.zip').write_bytes(publisher.files['/imgs.zip'])
    (offered/'slake'/'train.json').write_bytes(b'[]')
    with pytest.raises(DataError, match=r'train\.json: its md5 is .*Move it away'): get('slake', offered, say=str)
    assert (offered/'slake'/'train.json').read_bytes() == b'[]'
    (offered/'slake'/'train.json').unlink()
    assert get('slake', offered, say=str) and '/imgs.zip' not in [o[0] for o in publisher.asked]


def test_nothing_real_is_put_into_a_twin(twins):
    with pytest.raises(DataError, match='this folder holds a twin'): get('slake', twins, say=str)


@pytest.mark.parametrize('name', [k for k, o in DATA_SETS.items() if not o.files])
def test_gated_sets_print_their_steps_and_make_no_folder(name, tmp_path, capsys):
    assert main(['get', name, '--root', str(tmp_path)]) == 1 and names(tmp_path) == []
    out, row = capsys.readouterr().out, DATA_SETS[name]
    assert row.steps in out and row.licence in out and row.url in out and 'no file to be downloaded from here' in out


def test_of_a_gated_set_only_the_open_file_is_fetched(publisher, server, tmp_path, monkeypatch):
    row = DATA_SETS['rsna_pneumonia']
    publisher.files = {f'/{row.files[0].name}': b'{}'}
    monkeypatch.setitem(DATA_SETS, row.name, replace(row, files=(replace(row.files[0], url=f'{server}/{row.files[0].name}'),)))
    lines = []
    assert not get('rsna_pneumonia', tmp_path, say=lines.append)
    assert row.steps in lines[-1] and 'lacks stage_2_train_labels.csv' in lines[-1] and (tmp_path/row.folder/row.files[0].name).exists()


# ---- the command

def said(capsys, *arguments):
    "Run the command: exit code, what it printed, what it complained."
    code = main([str(o) for o in arguments])
    return code, *capsys.readouterr()


def test_status(twins, capsys, monkeypatch):
    code, out, err = said(capsys, 'status', '--root', twins)
    assert code == 0 and not err and len(out.splitlines()) == len(DATA_SETS) + 1
    assert all(re.search(rf'^{name} +twin +{row.access} ', out, re.M) for name, row in DATA_SETS.items())
    monkeypatch.setenv('MEDCL_DATA', str(twins))
    assert said(capsys, 'status')[1] == out
    assert describe('pcam', twins) in said(capsys, 'status', 'pcam')[1]


def test_without_a_data_root(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv('MEDCL_DATA', raising=False)
    code, out, err = said(capsys, 'status')
    assert code == 0 and 'missing' in out and 'MEDCL_DATA is not set. Set MEDCL_DATA to the folder' in err and '--root FOLDER' in err
    for command in ('get', 'check', 'audit', 'pack'):
        code, out, err = said(capsys, command, 'slake')
        assert code == 2 and 'MEDCL_DATA is not set' in err and not out
    monkeypatch.setenv('MEDCL_DATA', str(tmp_path/'none'))
    assert 'MEDCL_DATA names no folder' in said(capsys, 'check', 'all')[2]


def test_twin(capsys, tmp_path):
    code, out, _ = said(capsys, 'twin', 'breastmnist', '--folder', tmp_path, '--n', 20, '--seed', 3)
    assert code == 0 and state_of('breastmnist', tmp_path)[0] == 'twin' and len(read_set('breastmnist', tmp_path)) == 20
    assert read_json(tmp_path/'medmnist'/'TWIN')['seed'] == 3
    (tmp_path/'slake').mkdir()
    (tmp_path/'slake'/'mine.txt').touch()
    assert 'holds data that is not a twin' in said(capsys, 'twin', 'slake', '--folder', tmp_path)[2]
    assert 'Perhaps' in said(capsys, 'twin', 'slaek', '--folder', tmp_path)[2]
    assert 'Ask for more images' in said(capsys, 'twin', 'lc25000_lung', '--folder', tmp_path, '--n', 2)[2]


def test_check_goes_on_after_a_broken_set(root, capsys):
    code, out, _ = said(capsys, 'check', 'all', '--root', root)
    assert code == 0 and f'{len(DATA_SETS)} looked at, 0 broken, 0 missing' in out
    next(iter((root/'bach').rglob('*.tif'))).write_bytes(b'no picture')
    shutil.rmtree(root/'vqa_rad')
    (root/'slake'/'test.json').write_text('{')
    code, out, _ = said(capsys, 'check', 'all', '--root', root)
    assert code == 1 and f'{len(DATA_SETS) - 1} looked at, 2 broken, 1 missing' in out
    assert re.findall(r'^(\S+) +BROKEN', out, re.M) == ['bach', 'slake'] and 'Traceback' not in out
    code, out, _ = said(capsys, 'check', 'vqa_rad', '--root', root)
    assert code == 1 and 'no such f' in out


def test_check_says_when_numbers_are_not_the_published_ones(root, capsys):
    (root/'slake'/'TWIN').unlink()
    code, out, _ = said(capsys, 'check', 'slake', '--root', root)
    assert code == 0 and 'not as published: train' in out


def test_check_reports_what_nobody_expected(capsys, tmp_path, monkeypatch):
    def read(folder): raise ZeroDivisionError('a mistake of ours')
    monkeypatch.setitem(DATA_SETS, 'slake', replace(DATA_SETS['slake'], read=read))
    code, out, _ = said(capsys, 'check', 'slake', '--root', tmp_path)
    assert code == 1 and "ZeroDivisionError('a mistake of ours')" in out


def test_audit(twins, capsys, tmp_path):
    code, out, _ = said(capsys, 'audit', 'slake', 'vqa_rad', '--root', twins, '--out', tmp_path/'audit.md')
    text = (tmp_path/'audit.md').read_text(encoding='utf-8')
    assert code == 0 and 'audit.md' in out and '# Audit' in text and '## Integrity of slake' in text and '## Integrity of vqa_rad' in text
    code, out, _ = said(capsys, 'audit', 'breastmnist', '--root', twins)
    assert code == 0 and '## Integrity of breastmnist' in out
    assert said(capsys, 'audit', 'breastmnist', 'nothing', '--root', twins)[0] == 2


def test_pack(twins, capsys, tmp_path):
    code, out, _ = said(capsys, 'pack', 'roco', '--folder', tmp_path/'shards', '--root', twins)
    assert code == 0 and verify_shards(tmp_path/'shards') == len(read_corpus('roco', root=twins)) and '0 left out' in out
    assert said(capsys, 'pack', 'nothing', '--root', twins)[0] == 2


def test_group_tiles(root, capsys):
    shutil.rmtree(root/'lc25000'/'annotations')
    code, out, _ = said(capsys, 'group-tiles', '--root', root)
    assert code == 0 and sorted(re.findall(r'^(\w+) +\d+ tiles', out, re.M)) == ['colon_aca', 'colon_n', 'lung_aca', 'lung_n', 'lung_scc']
    assert {'train', 'test'} <= set(read_set('lc25000_lung', root).frame.split)


def test_describe(capsys, tmp_path):
    (tmp_path/'one.png').write_bytes(b'x')
    (tmp_path/'pairs.csv').write_text('image,text\none.png,No finding.\n')
    about = ['--name', 'one', '--description', 'One pair.', '--licence', 'CC0-1.0', '--url', 'https://example.org']
    code, out, _ = said(capsys, 'describe', tmp_path/'pairs.csv', *about)
    assert code == 0 and read_json(out.strip())['recordSet'][0]['description'].startswith('1 image')
    assert said(capsys, 'describe', tmp_path/'nothing.csv', *about)[0] == 2


@pytest.mark.parametrize('command', ['', *access._COMMANDS])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as e: main([*command.split(), '--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0 and (not command or f'Example: medcl_data {command}' in out)


@pytest.mark.parametrize('arguments', [[], ['nothing'], ['get'], ['twin', 'all'], ['twin', 'all', '--folder', 'x', '--n', 'many']])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as e: main(arguments)
    assert e.value.code == 2 and 'usage: medcl_data' in capsys.readouterr().err


def test_stopping_by_hand(capsys, monkeypatch, tmp_path):
    def stop(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(access, 'get', stop)
    code, _, err = said(capsys, 'get', 'slake', '--root', tmp_path)
    assert code == 130 and 'The same command goes on from here' in err


def test_as_a_module(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, '-m', 'medcl_study.data.access', *arguments], capture_output=True, text=True, cwd=tmp_path)
    done = run('status', 'slaek', '--root', '.')
    assert done.returncode == 2 and done.stderr.startswith("medcl_data: no data set 'slaek'. Perhaps 'slake' is meant") and not done.stdout
    done = run('get', 'mimic_cxr', '--root', '.')
    assert done.returncode == 1 and 'PhysioNet' in done.stdout and not done.stderr


def test_who_reads_only_the_first_lines_is_not_told_of_a_broken_pipe(tmp_path):
    command = f'{sys.executable} -u -m medcl_study.data.access status --root {tmp_path} | head -1'
    done = subprocess.run(['bash', '-c', f'{command}; exit ${{PIPESTATUS[0]}}'], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith('set ') and not done.stderr


def test_sizes_that_nobody_tells(publisher, offered):
    publisher.length = False
    lines = []
    get('slake', offered, say=lines.append)
    assert lines[3] == '  size      unknown, in 4 files from 127.0.0.1'
    assert access._terms(replace(DATA_SETS['slake'], files=(replace(DATA_SETS['slake'].files[0], size=10), *DATA_SETS['slake'].files[1:])),
                         offered, 5)[3] == '  size      10 bytes in 4 files from 127.0.0.1; the size of 3 is unknown'


def test_finding_a_set_costs_no_torch():
    code = 'import sys, medcl_study.data.access; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
    assert find_set('slake') is DATA_SETS['slake']


# ---- real files

SAMPLE = os.environ.get('MEDCL_DATA', '')


@pytest.mark.skipif(not os.path.exists(f'{SAMPLE}/pretrain_pairs.jsonl'), reason='MEDCL_DATA does not name the public sample')
def test_folders_of_the_sample_are_not_taken_for_official_ones(capsys):
    assert {o: state_of(o, SAMPLE) for o in ('skin_cancer', 'vqa_rad')} == {
        'skin_cancer': ('incomplete', 'lacks HAM10000_metadata.csv'), 'vqa_rad': ('incomplete', 'lacks VQA_RAD Dataset Public.json')}
    code, out, _ = said(capsys, 'check', 'vqa_rad')
    assert code == 1 and 'no such file' in out and 'Traceback' not in out
