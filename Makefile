# Everything that one does with the book. A machine with Python >= 3.10 is enough: each target sets up .venv when it has to.
#   PYTHON=python3.12   the Python to make .venv with        SCALE=book   sizes for `make book`: quick | book | paper
#   OUT=folder          where `make book` writes             NB=nbs/03_rfm.ipynb   notebooks for `make outputs`
#   ARGS="-k site"      more arguments for pytest
SCALE ?= quick
OUT ?= agop_book_out
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# in the order of the book, the index last: it shows what the others recorded
BOOK := $(shell sed -n 's|^ *- \(.*\.ipynb\)$$|nbs/\1|p' nbs/sidebar.yml)
NB ?= $(filter-out nbs/index.ipynb,$(BOOK)) nbs/index.ipynb
CANDIDATES := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10 python)

.DEFAULT_GOAL := help
.PHONY: help book test test-device site export outputs clean
.NOTPARALLEL:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r target text; do printf '  make %-11s %s\n' "$$target" "$$text"; done

# A failed installation leaves no stamp, so the next call tries again.
$(STAMP): settings.ini setup.py
	@rm -f $@; found=; new='import sys; sys.exit(sys.version_info < (3, 10))'; \
	if ! $(BIN)/python -c "import pip; $$new" 2>/dev/null; then \
	  for python in $(CANDIDATES); do \
	    if "$$python" -c "$$new" 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "No Python >= 3.10 among: $(CANDIDATES). Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$("$$found" --version)"; rm -rf $(VENV); \
	  "$$found" -m venv $(VENV) || { echo "$$found cannot make virtual environments: install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }; \
	fi
	@echo "Installing the book and its tools in $(VENV) (once; minutes, most of it torch)"
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

book: $(STAMP)  ## run every lesson, make every figure, the report page and the site
	$(BIN)/agop-book reproduce --scale $(SCALE) --out "$(OUT)"
	@$(BIN)/python docs/build.py
	@echo; echo "Figures and records: $(OUT)/"; ls -1 "$(OUT)"/*.html | sed 's/^/Report page: /'; echo "Site: _site/index.html"

test: $(STAMP)  ## style, fresh exports, every notebook alone, pytest, the site with warnings as errors
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -ra -n 2 --dist worksteal --durations=5 tests $(ARGS)

test-device: $(STAMP)  ## every notebook and family of networks on an emulated GPU (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -ra -n 2 --dist worksteal tests/device_all.py $(ARGS)

site: $(STAMP)  ## the offline site, in _site/
	@$(BIN)/python docs/build.py
	@echo "Site: _site/index.html"

export: $(STAMP)  ## notebooks -> agop_book/, clean metadata, addresses, CONTRIBUTING.md (after an edit)
	$(BIN)/python docs/address.py
	$(BIN)/python docs/contributing.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

outputs: $(STAMP)  ## execute notebooks at book scale: the stored outputs and nbs/records/
	$(BIN)/nbdev_export
	@set -e; for nb in $(NB); do echo "== $$nb"; \
	  AGOP_BOOK_SCALE=book AGOP_BOOK_OUT="$(CURDIR)/nbs/records" $(BIN)/jupyter nbconvert \
	    --to notebook --execute --inplace --ExecutePreprocessor.timeout=-1 --log-level WARN "$$nb"; done
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

clean:  ## remove what can be made again (not .venv, not the figures in agop_book_out/)
	rm -rf _proc _site _docs build dist .pytest_cache .hypothesis .ruff_cache *.egg-info
	find agop_book docs tests nbs -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
