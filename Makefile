# make study            the study in size quick: phantoms → pretraining → benchmark → reports/quick
# make study SIZE=smoke smoke (minutes), quick, small, gpu, full
# make twins           miniatures of all data sets in their official layouts, read, validated and scored by a small encoder
# make test             every lesson of every notebook, then the fast tests
# make verify           everything, the slow proofs and coverage included; writes reports/verify.json
# make docs             the notebooks as offline HTML in _docs
# make clean            remove what was built; keeps .venv, reports and unfinished runs (work)
# Variables: SIZE, PYTHON (which interpreter makes .venv), CORES, TWINS (folder of the miniatures), EXTRAS.

SIZE ?= quick
PYTHON ?= python3
CORES ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
TWINS ?= work/twins-data
EXTRAS ?= workflow,minilm,clip,data,track,dev

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := study
.PHONY: study twins test verify docs clean install

# One thread per process: several times faster with one process per core, and the same digits on every machine.
export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# The stamp is named after the contents of what decides an installation, so a second call installs nothing.
KEY := $(shell (echo '$(EXTRAS)'; cat settings.ini setup.py pyproject.toml constraints.txt) | cksum | tr ' ' '-')
STAMP := .venv/installed-$(KEY)

install: $(STAMP)

$(STAMP):
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv: about three minutes and 7 GB.'
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	rm -f .venv/installed-*
	touch $@

study: $(STAMP)
	snakemake -s nbs/experiments/Snakefile --config study=$(SIZE) --cores $(CORES) --rerun-incomplete

twins: $(STAMP)
	medcl_data twin all --folder $(TWINS) --n 256
	medcl_data check all --root $(TWINS)
	MEDCL_DATA=$(TWINS) snakemake -s nbs/experiments/Snakefile --config study=twins --cores $(CORES) --rerun-incomplete

test: export HF_HUB_OFFLINE = 1
test: $(STAMP)
	nbdev-test --n-workers 2
	pytest -q -n 2 -m 'not slow and not gpu'

verify: export HF_HUB_OFFLINE = 1
verify: $(STAMP)
	python tests/verify.py

docs: $(STAMP)
	python nbs/docs.py

clean:
	rm -rf _docs build dist *.egg-info .coverage* .pytest_cache .hypothesis .snakemake
	find nbs medcl_study tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
