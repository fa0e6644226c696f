PYTHON ?= python3
VENV := .venv
DTYPE ?= float32
export HF_HUB_OFFLINE ?= 1

.PHONY: help install demo base gpt2 figures test stress lint clean

help:
	@sed -n 's/^\([a-z0-9]*\):.*## /make \1\t/p' Makefile

install: $(VENV)/runtime  ## the packages, in .venv: 1.6 GB

demo: $(VENV)/runtime  ## compress, train, export and score a small GPT-2 on the documentation of Python, and show the result
	$(VENV)/bin/python -m experiments.prepare_pydocs
	$(VENV)/bin/python train.py config/demo_base.py
	$(VENV)/bin/python -m experiments.compare config/compare_demo.py
	$(VENV)/bin/python kron_to_gpt.py out/demo/whole_model_by_budget/seed_1337/best.pt out/demo/small --compressed=True \
	  --perplexities=out/demo/whole_model_by_budget/seed_1337/after.json
	@echo "to play with it beside the dense model, trained as long:" \
	  "$(VENV)/bin/python play.py out/demo/dense_trained_further_128_512_1/seed_1337/best.pt out/demo/small"

base: $(VENV)/runtime  ## train a GPT-2 on the Python source here: an hour; with DTYPE=bfloat16, on CPUs that have it, less
	$(VENV)/bin/python -m experiments.prepare_pysource
	$(VENV)/bin/python train.py config/base.py --dtype=$(DTYPE)

gpt2: $(VENV)/runtime  ## compress GPT-2 in several ways and score each: needs a network, and hours without a GPU
	HF_HUB_OFFLINE=0 $(VENV)/bin/python -m experiments.gpt2

figures: $(VENV)/runtime  ## the runs, pictures and tables of docs/report.md
	$(VENV)/bin/python -m experiments.figures

test: $(VENV)/dev  ## the tests
	$(VENV)/bin/python -m pytest -rs

stress: $(VENV)/dev  ## kills, full disks and damaged files
	$(VENV)/bin/python -m pytest -m slow -s

lint: $(VENV)/dev  ## the linter
	$(VENV)/bin/ruff check .

# torch first: what follows then finds the version that is pinned here
$(VENV)/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("KronyGPT needs Python 3.11 or later: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/runtime
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

clean:  ## remove what the demo made
	rm -rf out/demo data/pydocs
