"""What holds the repository together: fresh exports, one-way imports, clean notebooks, one version, a README that runs."""
import ast
import configparser
import filecmp
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/'medcl_study'
NOTEBOOKS = sorted(o for o in (ROOT/'nbs').rglob('*.ipynb') if not any(p.startswith(('.', '_')) for p in o.relative_to(ROOT).parts))
EXPERIMENTS = [o for o in NOTEBOOKS if o.parent.name == 'experiments']
MODULES = {'.'.join(o.relative_to(PACKAGE).with_suffix('').parts): o for o in sorted(PACKAGE.rglob('*.py'))
           if not o.name.startswith('_')}

# A module may import itself, what is named here, and everything below these names; nothing else of the package.
LAYERS = {
    'core': [],
    'embeddings': ['core'],
    'data': ['core', 'data'],
    'encoders': ['core', 'embeddings', 'data.text', 'encoders'],
    'losses': ['embeddings', 'losses'],
    'methods': ['losses'],
    'trainer': ['core', 'embeddings'],
    'loggers': ['core', 'embeddings', 'trainer'],
    'pretext': ['core', 'embeddings', 'data', 'encoders', 'losses', 'trainer'],
    'measures': ['measures'],
    'metrics': ['measures'],
    'stats': [],
    'significance': ['stats'],
    'across': ['core', 'metrics', 'stats', 'predictions'],
    'predictions': ['core', 'measures', 'metrics', 'stats'],
    'evaluation': ['core', 'embeddings', 'data', 'encoders', 'losses', 'measures', 'metrics', 'stats', 'predictions', 'evaluation'],
    'results': ['core', 'metrics', 'stats', 'predictions'],
    'pages': ['core'],
    'figures': [],
    'sections': ['core', 'metrics', 'stats', 'predictions', 'results', 'pages', 'figures'],
    'questions': ['core', 'metrics', 'stats', 'significance', 'predictions', 'results', 'pages', 'figures', 'sections'],
    'speed': ['core', 'embeddings', 'data', 'encoders', 'losses', 'methods'],
    'report': ['core', 'metrics', 'stats', 'predictions', 'results', 'pages', 'figures', 'sections', 'benchmark_sections'],
    'comparison_figures': ['figures'],
    'benchmark_sections': ['core', 'measures', 'metrics', 'stats', 'predictions', 'results', 'pages', 'figures', 'sections', 'significance', 'across',
                           'comparison_figures'],
    'settings': ['core', 'data', 'methods', 'predictions'],
    'pretraining': ['core', 'embeddings', 'data', 'encoders', 'losses', 'methods', 'trainer', 'loggers', 'pretext', 'settings'],
    'scoring': ['core', 'data', 'encoders', 'evaluation', 'metrics', 'predictions', 'settings'],
    'experiment': [''],
    'studies': [''],
    'cards': [''],
}
# Importing these must not load torch: they read tables and numbers, also on a machine without it.
TORCH_FREE = ['core', 'data.pairs', 'data.text', 'data.images', 'data.regions', 'data.reports', 'data.phantom', 'data.sets',
              'data.audit', 'data.corpora', 'data.tasks', 'data.twins', 'data.budgets', 'data.croissant', 'measures', 'metrics', 'stats', 'significance', 'across', 'predictions',
              'results', 'pages', 'figures', 'comparison_figures', 'benchmark_sections', 'sections', 'questions', 'report']
# What the purest layers may import from outside the standard library.
OUTSIDE = {'metrics': {'numpy', 'scipy'}, 'measures': {'numpy', 'scipy'}, 'stats': {'numpy', 'scipy'},
           'significance': {'numpy', 'scipy'}, 'losses': {'torch', 'numpy', 'scipy'},
           'embeddings': {'torch'}, 'methods': {'torch'}}


def under(name, parents):
    "Tell whether module `name` is one of `parents` or lies below one; '' is above everything."
    return any(not o or name == o or name.startswith(o + '.') for o in parents)


def imports(module, top_level=False):
    "Yield (inside the package?, dotted name) of everything that `module` imports, lazy imports included unless `top_level`."
    tree = ast.parse(MODULES[module].read_text(encoding='utf-8'))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import): yield from (internal(o.name) for o in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(module.split('.')[:-node.level]) if node.level else ''
            name = '.'.join(o for o in (base, node.module) if o)
            yield from (found for o in node.names for found in [from_import(node.level, name, o.name)])


def internal(name):
    return (True, name.removeprefix('medcl_study').removeprefix('.')) if name.split('.')[0] == 'medcl_study' else (False, name)


def from_import(level, name, member):
    inside, name = (True, name) if level else internal(name)
    deeper = f'{name}.{member}'.removeprefix('.')
    return (inside, deeper if inside and deeper in MODULES else name)


# ---- the package is what the notebooks export

def default_exp(notebook):
    "Return the module that `notebook` exports to, or None."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    found = [m[1] for c in cells for m in re.finditer(r'^#\|\s*default_exp\s+(\S+)', ''.join(c['source']), re.M)]
    return found[0] if found else None


@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the notebooks, exported and cleaned anew."
    copy = tmp_path_factory.mktemp('fresh')
    shutil.copytree(ROOT/'nbs', copy/'nbs', ignore=shutil.ignore_patterns('.*'))
    for name in ('pyproject.toml', 'settings.ini', 'README.md'): shutil.copy(ROOT/name, copy)
    (copy/'medcl_study').mkdir()
    shutil.copy(PACKAGE/'__init__.py', copy/'medcl_study')
    run = 'from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; nbdev_export(); nbdev_clean()'
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', run], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy


def test_package_equals_fresh_export(fresh):
    ours, theirs = ({str(o.relative_to(folder)) for o in folder.rglob('*.py')} for folder in (PACKAGE, fresh/'medcl_study'))
    optional = {'_modidx.py'}  # an index for documentation hosts: it may be left out, but not go stale
    assert ours - theirs - optional == set(), 'modules whose notebook is gone: delete them'
    assert theirs - ours - optional == set(), 'modules never exported: run nbdev-export'
    stale = filecmp.cmpfiles(PACKAGE, fresh/'medcl_study', ours & theirs, shallow=False)[1]
    assert stale == [], 'package and notebooks differ: run nbdev-export'


def test_one_notebook_per_module():
    exported = [default_exp(o) for o in NOTEBOOKS if o not in EXPERIMENTS]
    exported = [o for o in exported if o]
    assert sorted(exported) == sorted(MODULES)
    assert [o for o in EXPERIMENTS if default_exp(o)] == [], 'experiment notebooks export nothing'


def test_notebooks_of_a_layer_are_numbered_apart():
    names = [o.name for o in NOTEBOOKS if default_exp(o)]
    assert all(re.match(r'\d\d[a-z]?_[a-z0-9_]+\.ipynb$', o) for o in names), names
    assert len({o.partition('_')[0] for o in names}) == len(names), 'two notebooks share a number'


# ---- imports run in one direction

def test_layers_cover_every_module():
    assert [o for o in MODULES if not under(o, LAYERS)] == []


@pytest.mark.parametrize('module', MODULES)
def test_imports_in_design_direction(module):
    layer = next((o for o in LAYERS if under(module, [o])), None)
    assert layer, 'give the module a layer in LAYERS, as in the design'
    inside = {name for ours, name in imports(module) if ours and name != module}
    assert [o for o in sorted(inside) if not under(o, LAYERS[layer])] == [], f'{layer} may import only {LAYERS[layer]}'
    allowed = next((v for k, v in OUTSIDE.items() if under(module, [k])), None)
    outside = {name.split('.')[0] for ours, name in imports(module) if not ours} - set(sys.stdlib_module_names)
    assert allowed is None or outside <= allowed, f'{layer} may import only {allowed} from outside'


def test_no_import_cycles():
    todo = {module: {name for ours, name in imports(module) if ours and name in MODULES} - {module} for module in MODULES}
    while free := [o for o, needs in todo.items() if not needs & set(todo)]:
        for o in free: del todo[o]
    assert todo == {}, 'these modules import each other in a circle'


def test_no_star_imports():
    stars = [f'{module}:{node.lineno}' for module, path in MODULES.items() for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.ImportFrom) and any(o.name == '*' for o in node.names)]
    assert stars == []


# ---- every module stands alone

# In a process that has imported none of the package: import one module, then look for names that its functions use and
# nobody defines (an export cell that leans on a cell that is not exported passes in its notebook and fails here).
ALONE = '''
import builtins, dis, importlib, sys, types

def codes(code):
    yield code
    for o in code.co_consts:
        if isinstance(o, types.CodeType): yield from codes(o)

def alone(name):
    assert not [o for o in sys.modules if o.split('.')[0] == 'medcl_study']
    module = importlib.import_module(f'medcl_study.{name}')
    code = compile(open(module.__file__, encoding='utf-8').read(), module.__file__, 'exec')
    used = {i.argval for c in codes(code) for i in dis.get_instructions(c) if i.opname == 'LOAD_GLOBAL'}
    unknown = sorted(used - set(vars(module)) - set(vars(builtins)))
    assert not unknown, f'{name} uses names that it does not define: {unknown}'
    missing = [o for o in module.__all__ if not hasattr(module, o)]
    assert not missing, f'{name} promises {missing} in __all__'
    assert module.__doc__, f'{name} has no promise line'
'''


def python(code):
    "Run `code` in a clean interpreter, from a folder that holds no package."
    done = subprocess.run([sys.executable, '-c', ALONE + code], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize('module', [o for o in MODULES if under(o, TORCH_FREE)])
def test_imports_alone_without_torch(module):
    python(f'''
alone({module!r})
heavy = sorted({{'torch', 'transformers', 'timm', 'fastai'}} & set(sys.modules))
assert not heavy, f'importing {module} loads {{heavy}}'
''')


def test_imports_alone_with_torch():
    "One fresh process per module, forked from a parent that holds other people's libraries and nothing of ours."
    modules = [o for o in MODULES if not under(o, TORCH_FREE)]
    outside = {name for o in modules for ours, name in imports(o, top_level=True) if not ours and name}
    python(f'''
import os, traceback
for o in {sorted(outside)!r}: importlib.import_module(o)
failed = []
for name in {modules!r}:
    child = os.fork()
    if child == 0:
        try: alone(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]: failed.append(name)
assert not failed, failed
''')


# ---- notebooks read well

@pytest.fixture(params=NOTEBOOKS, ids=[o.relative_to(ROOT/'nbs').as_posix() for o in NOTEBOOKS])
def notebook(request): return request.param


def cells(notebook): return json.loads(notebook.read_text(encoding='utf-8'))['cells']


def outputs(notebook):
    "Yield every stored output of `notebook`, with the text it shows (joined) and its images in base64."
    for cell in cells(notebook):
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            texts = [output.get('text', ''), *(v for k, v in data.items() if k.startswith(('text/', 'image/svg')))]
            yield output, '\n'.join(''.join(o) for o in texts), {k: ''.join(v) for k, v in data.items() if k.startswith('image/')}


def test_notebook_is_clean(notebook, fresh):
    assert notebook.read_text() == (fresh/notebook.relative_to(ROOT)).read_text(), 'run nbdev-clean'


def test_notebook_opens_with_title_and_promise(notebook):
    first = cells(notebook)[0]
    assert first['cell_type'] == 'markdown' and re.match(r'# \S.*\n\n> \S.*', ''.join(first['source'])), \
        'the first cell is "# title", an empty line, "> one-line promise"'


@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=[o.name for o in EXPERIMENTS])
def test_experiment_keeps_its_parameters_cell(notebook):
    tagged = [c for c in cells(notebook) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and tagged[0]['cell_type'] == 'code', 'papermill needs one code cell tagged `parameters`'
    assert (notebook.parent/'.notest').exists()


PERSONAL = re.compile(r'/(home|Users)/\w|/(root|tmp)/|/private/var/|[A-Z]:\\\\?Users|ipykernel_\d|' + re.escape(str(ROOT)))
MOVING = re.compile(r'\d+%\s*\||it/s\]|widget-view|<progress|\d+ms/step|\bWall time\b')


def test_notebook_outputs_are_fit_to_store(notebook):
    for output, text, images in outputs(notebook):
        assert output['output_type'] != 'error', output.get('evalue')
        assert output.get('name') != 'stderr', f'a warning or log is stored: {text[:200]}'
        assert not any('widget' in o for o in output.get('data', {})), 'widget state is stored'
        assert not (found := PERSONAL.search(text)), f'a path of one machine is stored: {text[max(0, found.start() - 50):][:150]}'
        assert not (found := MOVING.search(text)), f'a progress bar or timing is stored: {text[max(0, found.start() - 50):][:150]}'
        for kind, data in images.items():
            size = len(data) if 'svg' in kind else len(data) * 3 // 4
            assert size <= 60_000, f'a stored figure has {size:,} bytes; draw it smaller (at most about 50 KB)'


def test_sources_name_no_machine():
    sources = [''.join(c['source']) for o in NOTEBOOKS for c in cells(o)] + [o.read_text() for o in MODULES.values()]
    sources += [o.read_text() for o in [ROOT/'README.md', ROOT/'Makefile', ROOT/'nbs'/'experiments'/'Snakefile', ROOT/'.ci'/'run']]
    assert [o.group() for text in sources for o in re.finditer(r'/(home|Users|work)/\w+|/(root)/\w*', text)] == []


@pytest.mark.parametrize('module', MODULES)
def test_code_stays_readable(module):
    text = MODULES[module].read_text(encoding='utf-8')
    long = [f'{i}: {len(line)}' for i, line in enumerate(text.splitlines(), 1)
            if len(line) > 140 and not line.startswith(('__all__', '"""')) and 'http' not in line]
    assert long == [], 'lines of over 140 columns (aim at 120)'
    functions = (o for o in ast.walk(ast.parse(text)) if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef)))
    assert [f'{o.name}: {n} lines' for o in functions if (n := o.end_lineno - o.lineno + 1) > 60] == []


# ---- one version, one set of dependencies

def settings():
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def requirements():
    return [Requirement(o) for key, value in settings().items() if key.endswith('requirements') for o in value.split()]


def pins():
    lines = [o for o in (ROOT/'constraints.txt').read_text().splitlines() if o and not o.startswith('#')]
    assert all(re.fullmatch(r'[\w.-]+==[\w.+!-]+', o) for o in lines), 'constraints.txt holds exact versions from the index only'
    return {canonicalize_name(name): version for name, version in (o.split('==') for o in lines)}


def test_one_version_everywhere():
    import medcl_study
    version = settings()['version']
    assert Path(medcl_study.__file__).parent == PACKAGE, 'another copy of the package is installed: make install'
    assert medcl_study.__version__ == version
    assert importlib.metadata.version('medcl_study') == version, 'the installed package is another one: make install'
    assert re.search(r'^version: (.*)$', (ROOT/'CITATION.cff').read_text(), re.M)[1] == version


def test_metadata_live_in_settings_alone():
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert set(project) == {'name', 'dynamic'} and project['name'] == settings()['lib_name']


def test_constraints_pin_every_requirement():
    pinned = pins()
    assert [str(o) for o in requirements() if canonicalize_name(o.name) not in pinned] == []
    assert [f'{o}: {v}' for o in requirements() if not o.specifier.contains(v := pinned[canonicalize_name(o.name)])] == []
    assert {'torch', 'torchvision'} <= set(pinned)


def test_every_outside_import_is_a_requirement():
    "No module leans on a package that only happens to be installed."
    owners = importlib.metadata.packages_distributions()
    named = {canonicalize_name(o.name) for o in requirements()}
    used = {(module, name.split('.')[0]) for module in MODULES for ours, name in imports(module) if not ours}
    used = {(module, name) for module, name in used if name not in sys.stdlib_module_names}
    assert [o for o in sorted(used) if not {canonicalize_name(d) for d in owners.get(o[1], [])} & named] == []


def test_console_scripts_exist():
    for script in settings().get('console_scripts', '').split():
        module, name = script.split('=')[1].split(':')
        tree = ast.parse(MODULES[module.removeprefix('medcl_study.')].read_text())
        assert name in {o.name for o in tree.body if isinstance(o, ast.FunctionDef)}, f'{script} points nowhere'


@pytest.mark.slow
def test_wheel_installs_and_imports(tmp_path):
    "Outside of the repository, from the wheel alone (its requirements are those installed here)."
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, ROOT], check=True)
    wheel = next(tmp_path.glob('medcl_study-*.whl'))
    subprocess.run([*pip, 'install', '--no-deps', '--target', tmp_path/'site', wheel], check=True)
    assert {o.name for o in (tmp_path/'site').iterdir()} == {'medcl_study', 'bin', wheel.name.replace('-py3-none-any.whl', '.dist-info')}
    code = f"import importlib, medcl_study\nfor o in {list(MODULES)}: importlib.import_module(f'medcl_study.{{o}}')\nprint(medcl_study.__file__)"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(tmp_path/'site')})
    assert done.stdout.startswith(str(tmp_path/'site')), done.stderr[-2000:]


# ---- the README keeps its word

README = (ROOT/'README.md').read_text(encoding='utf-8')


def test_readme_example_runs(tmp_path):
    blocks = re.findall(r'^```python\n(.*?)^```', README, re.S | re.M)
    assert blocks, 'the README shows no ```python example'
    for block in blocks:
        done = subprocess.run([sys.executable, '-c', block], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f'{block}\n{done.stderr[-3000:]}'


def test_readme_points_at_what_exists():
    paths = re.findall(r'\]\((?!https?:|#|mailto:)([^)\s#]+)', README) + re.findall(r'(?:src|href)="(?!https?:|#)([^"#]+)"', README)
    paths += re.findall(r'\bnbs/[\w./-]+\.ipynb', README)
    assert [o for o in paths if not (ROOT/o).exists()] == []
    targets = set(re.findall(r'^([a-z]+):', (ROOT/'Makefile').read_text(), re.M))
    assert {o for o in re.findall(r'\bmake ([a-z]+)', README)} <= targets
