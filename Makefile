# Two commands matter: `make lab` (students) and `make test` (authors). `make help` lists the rest.
# Each makes .venv on its first run; needs python3 >= 3.11 with venv, git and make.

PYTHON ?= python3
VENV   ?= .venv
NB     ?=
FORCE  ?=
LAB    ?=
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
MODEL  := .cache/smollm2-135m/model.safetensors
ORACLES := .cache/oracles/torchao/__init__.py
JOBS   := 2
FLAGS  := $(if $(FORCE),--force)

step = @printf '\n== %s\n' "$(1)"

.PHONY: help lab test lint types layers exercises-check notebooks-check tests shapes \
        notebooks-test model oracles notebooks exercises slides slides-check handouts site \
        site-check bench clean

help:
	@printf '%s\n' \
	  'make lab         open the course in JupyterLab; LAB="--no-browser --port 9999"' \
	  'make test        all checks of the course itself, as in CI' \
	  'make model       fetch SmolLM2-135M (90 MB, once)' \
	  'make oracles     fetch torchao, Megatron and DeepSpeed (once), which some tests compare with' \
	  'make exercises   solutions/ -> exercises/; FORCE=1 replaces edited ones, with a backup' \
	  'make notebooks   notebooks/src/ -> notebooks/; NB="01_normalization ..." FORCE=1' \
	  'make slides      notebooks/ -> slides/; NB="..."' \
	  'make handouts    slides as PDF, where Chromium is; NB="..."' \
	  'make slides-check   every slide in a browser: nothing cut off, overlapping or tiny' \
	  'make site        notebooks/, docs/ and the API -> site/, offline' \
	  'make site-check  every page in a browser, at desk and phone width' \
	  'make bench       reference beside production code: time and memory' \
	  'make clean       remove caches and slides; .venv, the model and your work stay'

$(READY): pyproject.toml constraints.txt
	$(call step,Installing into $(VENV) (some minutes the first time))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(MODEL): | $(READY)
	$(call step,Fetching SmolLM2-135M)
	$(BIN)/python -m tools.fetch_model

# Production libraries that only tests compare with; in .venv torchao would slow each import of
# transformers. Those of tools.fetch_oracles need not be had everywhere: tests then skip, and say so.
$(ORACLES): | $(READY)
	$(call step,Fetching torchao)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target .cache/oracles torchao==0.18.0

model: $(MODEL)
oracles: $(ORACLES)
	-@$(BIN)/python -m tools.fetch_oracles

# Without a network the course still opens; chapters that need the model then say so.
lab: $(READY)
	@test -f $(MODEL) || $(MAKE) --no-print-directory model || true
	$(BIN)/jupyter lab $(LAB) notebooks/00_start_here.ipynb

test: lint types layers exercises-check notebooks-check tests shapes notebooks-test
	$(call step,All checks passed)

lint: $(READY)
	$(call step,Style: ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(call step,Types: mypy)
	$(BIN)/mypy

layers: $(READY)
	$(call step,Architecture: import-linter)
	$(BIN)/lint-imports

exercises-check: $(READY)
	$(call step,Exercises in step with solutions)
	$(BIN)/python -m tools.build_exercises --check

notebooks-check: $(READY)
	$(call step,Notebooks in step with their sources)
	$(BIN)/python -m tools.check_notebooks

# A test that fails among many is run again by itself, and that counts: forked ranks have been seen to
# stop, once in some thousand runs, in processes that had run much else before. Both runs are shown.
AGAIN = printf '\n== %s\n' "Again, alone: what has failed" && \
  $(BIN)/python -m pytest -q --last-failed --last-failed-no-failures none

tests: export OMP_NUM_THREADS := 1
tests: export HF_HUB_OFFLINE := 1
tests: $(READY) $(MODEL) oracles
	$(call step,Tests)
	$(BIN)/python -m pytest tests -q -n $(JOBS) --dist worksteal || ($(AGAIN) tests)

# An int is a float to it, as PEP 484 has it.
CHECKER := beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

# Left out: refusals, which the checker would make first; Triton, which compiles plain functions; the
# simulated machine, whose source lines and random streams the checker disturbs; what is slow.
SHAPES = -m "not slow" -k "not rejects and not triton" --ignore=tests/reference/parallel/ranks \
  --jaxtyping-packages='reference,$(CHECKER)'
shapes: export OMP_NUM_THREADS := 1
shapes: export HF_HUB_OFFLINE := 1
shapes: $(READY) $(MODEL) $(ORACLES)
	$(call step,Tests of the reference again: shapes and types of every call checked)
	$(BIN)/python -m pytest tests/reference -q -n $(JOBS) --dist worksteal $(SHAPES) || \
	  ($(AGAIN) tests/reference $(SHAPES))

# Only nbval's own options apply, and an empty IPython profile: no settings of the user's.
notebooks-test: export OMP_NUM_THREADS := 1
notebooks-test: export HF_HUB_OFFLINE := 1
notebooks-test: export IPYTHONDIR := $(CURDIR)/build/ipython
notebooks-test: $(READY) $(MODEL)
	$(call step,Notebooks executed again: the same outputs)
	@mkdir -p build/ipython/profile_default
	@echo 'c.IPKernelApp.log_level = 40' > build/ipython/profile_default/ipython_kernel_config.py
	$(BIN)/python -m pytest -o addopts= --nbval --nbval-current-env --nbval-cell-timeout 300 \
	  --nbval-sanitize-with tools/nbval.cfg -q -n $(JOBS) --dist loadfile notebooks/*.ipynb

exercises: $(READY)
	$(BIN)/python -m tools.build_exercises $(FLAGS)

notebooks: $(READY) $(MODEL)
	$(BIN)/python -m tools.build_notebooks $(FLAGS) $(NB)

slides: $(READY)
	$(BIN)/python -m tools.build_slides $(NB)

handouts: slides
	$(BIN)/python -m tools.build_handouts $(NB)

slides-check: slides
	$(BIN)/python -m tools.check_slides $(NB)

site: $(READY)
	$(BIN)/python -m tools.build_site

site-check: site
	$(BIN)/python -m tools.check_site

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf build slides site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
