"""Render every notebook as one self-contained HTML page below _docs: no request leaves a page, equations are MathML."""
import re
import shutil
import sys
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

HERE = Path(__file__).resolve().parent
EQUATION = re.compile(r'(?<!\\)\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)(?<!\\)\$(?![\w$])', re.S)
CODE = re.compile(r'(```.*?```|`[^`\n]+`)', re.S)


def with_mathml(
    markdown: str, # the source of one cell
) -> str:
    "Replace LaTeX between dollar signs by MathML, which browsers draw by themselves; code is left alone."
    def one(m): return convert(m[1] or m[2], display='block' if m[1] else 'inline').replace('\n', ' ')
    return ''.join(part if i % 2 else EQUATION.sub(one, part) for i, part in enumerate(CODE.split(markdown)))


def render(
    notebook: Path,
    page: Path, # .html
):
    "Render one notebook, with links to notebooks turned into links to pages."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [o for o in nb.cells if not re.match(r'#\|\s*(hide|default_exp)\b', o.source)]
    for cell in nb.cells:
        if cell.cell_type != 'markdown': continue
        cell.source = re.sub(r'(\]\((?!https?:)[^)\s]+)\.ipynb', r'\1.html', with_mathml(cell.source))
    exporter = HTMLExporter(require_js_url='', mathjax_url='', jquery_url='', mermaid_js_url='',
                            exclude_input_prompt=True, exclude_output_prompt=True)
    html, _ = exporter.from_notebook_node(nb, {'metadata': {'name': notebook.stem}})
    html = re.sub(r'<script[^>]*\bsrc="[^"]*"[^>]*>\s*</script>', '', html)
    html = re.sub(r'<script type="module">.*?</script>', '', html, flags=re.S)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html, encoding='utf-8')


def main(out=HERE.parent/'_docs'):
    notebooks = sorted(o for o in HERE.rglob('*.ipynb') if not any(p.startswith(('.', '_')) for p in o.relative_to(HERE).parts))
    shutil.rmtree(out, ignore_errors=True)
    for o in notebooks: render(o, (out/o.relative_to(HERE)).with_suffix('.html'))
    print(f'{len(notebooks)} pages in {out.relative_to(HERE.parent)}')


if __name__ == '__main__': sys.exit(main())
