# make setup | demo | lab | notebooks | docs | test | test-slow | stress | cluster-test | lint | bench | bench-training | clean
# Needs Python 3.11 or newer, make and git; every target sets up what it needs in .venv.

PY := .venv/bin/python
READY := .venv/.ready
EXTRAS := compare,demo,docs,medical,notebooks,service,train,test,lint

.PHONY: help setup demo lab notebooks docs test test-slow stress cluster-test lint bench bench-training clean
.DEFAULT_GOAL := help

help:
	@echo 'make setup      install everything into .venv and prepare the embedded model'
	@echo 'make demo       open the page: upload a picture, ask, read the answer'
	@echo 'make lab        JupyterLab with the notebooks'
	@echo 'make notebooks  execute every notebook in place, offline'
	@echo 'make docs       build the documentation into build/site; a warning is an error'
	@echo 'make test       the tests that need no network and no accelerator'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make stress     damaged pictures, nonsense and crowds for the service: about half an hour'
	@echo 'make cluster-test  install Ray, and run all tests of what goes beyond one machine'
	@echo 'make lint       style, types, direction of imports, spelling'
	@echo 'make bench      time to the first word, the engine against transformers, second questions over HTTP'
	@echo 'make bench-training  steps per second with and without what is computed only once'
	@echo 'make clean      remove .venv and what was built'

setup: $(READY)

# Anew when a requirement changes. The stamp is set last, so that a set-up that was cut short goes on where it stopped.
$(READY): pyproject.toml constraints.txt
	@python=; for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3.14 python3 python; do \
	  if "$$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo 'No Python 3.11 or newer with venv found: install one, or run make PYTHON=/path/to/python' >&2; exit 1; fi; \
	echo "Setting up .venv with $$python (PyTorch is large: the first time takes some minutes)"; \
	[ -x $(PY) ] || "$$python" -m venv .venv
	@$(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@echo 'Preparing the embedded model'
	@.venv/bin/multimodal pull
	@touch $@

demo: $(READY)
	@$(PY) -m demo.app

lab: $(READY)
	@.venv/bin/jupyter lab --notebook-dir=notebooks

notebooks: $(READY)
	@$(PY) -m notebooks.execute

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo 'Open build/site/index.html'

test: $(READY)
	@$(PY) -m pytest -n 2 --dist loadfile

test-slow: $(READY)
	@$(PY) -m pytest -m slow

stress: $(READY)
	@STRESS_PICTURES=2000 STRESS_REQUESTS=5000 STRESS_CLIENTS=200 STRESS_SECONDS=60 \
	  $(PY) -m pytest -s tests/service/test_stress.py

cluster-test: $(READY)
	@$(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS),cluster]'
	@$(PY) -m pytest tests/cluster tests/store -m ''

bench: $(READY)
	@$(PY) -m benchmarks.startup
	@$(PY) -m benchmarks.engine
	@$(PY) -m benchmarks.service

bench-training: $(READY)
	@$(PY) -m benchmarks.prefix
	@$(PY) -m benchmarks.stages

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	.venv/bin/codespell $$(git ls-files --cached --others --exclude-standard -- '*.py' '*.md' '*.toml' '*.txt' Makefile .ci)
	@echo 'No path of one machine and no host of a package registry may be in the tree'
	@! git grep -nIE --untracked '/(work|root|farm)/|/opt/[w]heels|(pypi|pythonhosted|npmjs|debian)\.(org|com|io)'

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
