# make demo: compress, train, export and score a small GPT-2 on Python's documentation, and show the result
# make figures: the runs, pictures and tables of docs/report.md
# make test: the tests      make stress: kills, faults and long fuzzing      make lint: the linter
# make clean: remove what these made, but for .venv

PYTHON ?= python3
VENV := .venv
export HF_HUB_OFFLINE ?= 1

.PHONY: demo figures test stress lint clean

demo: $(VENV)/runtime
	$(VENV)/bin/python -m experiments.prepare_pydocs
	$(VENV)/bin/python train.py config/demo_base.py
	$(VENV)/bin/python -m experiments.compare config/compare_demo.py
	$(VENV)/bin/python kron_to_gpt.py out/demo/all_matrices_ranks_by_loss/seed_1337/best.pt out/demo/small --compressed=True \
	  --perplexities=out/demo/all_matrices_ranks_by_loss/seed_1337/after.json
	@echo "to play with both: $(VENV)/bin/python play.py out/demo/base/best.pt out/demo/small"

figures: $(VENV)/runtime
	$(VENV)/bin/python -m experiments.figures

test: $(VENV)/dev
	$(VENV)/bin/python -m pytest

stress: $(VENV)/dev
	$(VENV)/bin/python -m pytest -m slow -s

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .

# torch first: what follows then finds the version that is pinned here
$(VENV)/runtime: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/runtime
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf out/demo data/pydocs
