# make demo | test | test-slow | soak | lint | gpu | gpu-record: each makes .venv first, from any Python >= 3.11 with pip.
# PYTHON=... names the interpreter to make it with.

READY := .venv/.installed
BIN := .venv/bin
# A test process per core, each with one thread: small models gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: demo test test-slow soak lint gpu gpu-record

demo: $(READY)
	$(BIN)/python scripts/train.py --config configs/demo.yaml --run.dir=runs/demo --run.auto_resume=true
	$(BIN)/python scripts/evaluate.py runs/demo --split test --yardsticks
	$(BIN)/python scripts/generate.py runs/demo --prompt "def " --length 600
	$(BIN)/python scripts/evaluate.py runs/demo --split test --adapt --streams 16 --stride 96 --precision bf16 --yardsticks

test: lint
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow || test $$? -eq 5  # 5: no test is slow

KILLS := 100
LATE_KILLS := 30

soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --kills $(KILLS) --late-kills $(LATE_KILLS)

# Within ten minutes and a quarter of an hour. GPU_PYTHON=... takes a Python that has torch, and makes no .venv.
GPU_PYTHON := $(BIN)/python

gpu gpu-record: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(READY))
	$(GPU_PYTHON) scripts/benchmarks/gpu.py $(patsubst gpu-%,%,$@)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Where python3 comes without ensurepip (Debian without python3-venv), the pip beside it installs into .venv.
$(READY): requirements.txt
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; python=; \
	done; \
	if [ -z "$$python" ]; then echo "error: Python >= 3.11 not found; name one: make PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "Installing requirements.txt into .venv ($$($$python --version)): 1.6 GB, minutes without a word"; \
	pip="$(BIN)/python -m pip"; \
	$$python -m venv .venv 2>/dev/null || \
	  { $$python -m venv --without-pip .venv && pip="$$python -m pip --python $(BIN)/python"; } && \
	$$pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
