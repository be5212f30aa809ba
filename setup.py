from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
meta = config['DEFAULT']
extras = {key.removesuffix('_requirements'): value.split() for key, value in meta.items() if key.endswith('_requirements')}

setup(
    name=meta['lib_name'], version=meta['version'], description=meta['description'], keywords=meta['keywords'].split(),
    author=meta['author'], author_email=meta['author_email'], license='Apache-2.0', license_files=['LICENSE'],
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    python_requires=f">={meta['min_python']}", packages=find_packages(include=['medcl_study', 'medcl_study.*']),
    install_requires=meta['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': meta.get('console_scripts', '').split()},
)
