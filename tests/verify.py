"""Everything that can be proved on this machine, slow proofs and kills included, as one record: reports/verify.json.

    make verify
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from medcl_study.core import environment, write_json

ROOT = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def run(*command, env=None):
    "Run a command in the repository and return (exit code, output); failures are printed."
    done = subprocess.run(command, cwd=ROOT, env=os.environ | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode: print('$', *command, '\n', done.stdout[-8000:], flush=True)
    return done.returncode, done.stdout


def notebooks():
    "Execute every library notebook as it stands."
    code, _ = run('nbdev-test', '--n-workers', str(CORES))
    return code == 0


def lessons(covered):
    "Run each notebook's lessons against the package; return {notebook: held?}."
    files = sorted(o for o in (ROOT/'nbs').glob('*.ipynb') if not o.name.startswith(('.', '_')))
    def one(o): return o.name, run('coverage', 'run', 'tests/lessons.py', str(o), env=covered)[0] == 0
    with ThreadPoolExecutor(CORES) as pool: return dict(pool.map(one, files))


def tests(covered, junit):
    "Run every test, those marked slow and gpu included; return counts, reasons for skips and the slowest five."
    code, _ = run('coverage', 'run', '-m', 'pytest', '-q', '-n', str(CORES), f'--junitxml={junit}', env=covered)
    cases = ElementTree.parse(junit).getroot().findall('.//testcase')
    def name(o): return f"{o.get('classname').split('.')[-1]}::{o.get('name')}"
    failed = [name(o) for o in cases if o.find('failure') is not None or o.find('error') is not None]
    skipped = {name(o): o.find('skipped').get('message') for o in cases if o.find('skipped') is not None}
    slowest = sorted(cases, key=lambda o: -float(o.get('time')))[:5]
    return {'exit': code, 'passed': len(cases) - len(failed) - len(skipped), 'failed': failed, 'skipped': skipped,
            'slowest': {name(o): round(float(o.get('time')), 1) for o in slowest}}


def coverage(covered, folder):
    "Join the measurements of all processes; return per cent of statements run, by module and in all."
    run('coverage', 'combine', '-q', env=covered)
    run('coverage', 'json', '-q', '-o', str(folder/'coverage.json'), env=covered)
    found = json.loads((folder/'coverage.json').read_text())
    modules = {Path(k).with_suffix('').as_posix(): round(v['summary']['percent_covered'], 1) for k, v in found['files'].items()
               if v['summary']['num_statements']}
    return {'total': round(found['totals']['percent_covered'], 1), 'modules': modules}


def main():
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        covered = {'COVERAGE_FILE': f'{name}/coverage'}
        record = {'notebooks': notebooks(), 'lessons': lessons(covered), 'tests': tests(covered, Path(name)/'junit.xml'),
                  'coverage': coverage(covered, Path(name))}
    record |= {'environment': environment(), 'seconds': round(time.monotonic() - start)}
    write_json(ROOT/'reports'/'verify.json', record)
    result, held = record['tests'], sum(record['lessons'].values())
    print(f"lessons of {held} of {len(record['lessons'])} notebooks hold; {record['coverage']['total']} % of statements covered")
    for test, reason in result['skipped'].items(): print(f'skipped {test}: {reason}')
    print(f"{result['passed']} passed, {len(result['failed'])} failed, {len(result['skipped'])} skipped")
    return not (record['notebooks'] and held == len(record['lessons']) and result['exit'] == 0)


if __name__ == '__main__': sys.exit(main())
