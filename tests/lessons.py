"""Run the lessons of one notebook against the committed package instead of the notebook's own export cells.

nbdev-test executes everything in one namespace, so an exported function may lean on a name that is not exported.
Here the package is imported, export cells are skipped, and the other cells run on what the package offers;
under coverage this also counts which lines of the package the lessons prove.

    python tests/lessons.py nbs/00_core.ipynb
"""
import importlib
import json
import os
import re
import sys
from pathlib import Path

import matplotlib

DIRECTIVE = re.compile(r'^#\|\s*(\w+)[:\s]*(\S*)', re.M)


def lessons(notebook):
    "Return (name of the module, sources of the cells to run)."
    sources = [''.join(o['source']) for o in json.loads(notebook.read_text(encoding='utf-8'))['cells'] if o['cell_type'] == 'code']
    marked = [(source, dict(DIRECTIVE.findall(source))) for source in sources]
    module = next((o['default_exp'] for _, o in marked if 'default_exp' in o), None)
    skipped = {'default_exp', 'export', 'exports', 'exporti'}
    return module, [source for source, o in marked if not skipped & set(o) and o.get('eval') != 'false']


def main(path):
    notebook = Path(path).resolve()
    module, sources = lessons(notebook)
    names = dict(vars(importlib.import_module(f'medcl_study.{module}'))) if module else {}
    names |= {'__name__': '__main__', 'display': lambda *_, **__: None}
    matplotlib.use('agg')
    os.chdir(notebook.parent)
    for number, source in enumerate(sources, 1): exec(compile(source, f'<{notebook.name}, lesson {number}>', 'exec'), names)
    print(f'{notebook.name}: {len(sources)} lessons hold')


if __name__ == '__main__': main(sys.argv[1])
