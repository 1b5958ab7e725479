# Every target makes its own virtual environment first; nothing but Python ≥ 3.11 and make is needed.

# The oldest supported Python is what `make test` uses where there is one, and the newest what `make test-newest` uses.
PYTHONS := python3.11 python3 python3.12 python3.13 python3.14
PYENV := $(wildcard $(shell command -v pyenv >/dev/null 2>&1 && pyenv root)/versions/3.1*/bin/python)
WORKS = sys.exit(sys.version_info < (3, $(1)))
PYTHON ?= $(shell for p in $(PYTHONS); do $$p -c 'import sys; $(call WORKS,11)' 2>/dev/null && echo $$p && break; done)
NEWEST ?= $(shell for p in $(PYTHONS) $(PYENV); do \
	$$p -c 'import sys; print("%04d" % sys.version_info[1], sys.argv[1]); $(call WORKS,12)' $$p 2>/dev/null; \
	done | sort | tail -n 1 | cut -d' ' -f2)
VENV ?= .venv
RUN := $(VENV)/bin

.PHONY: demo demo-vision test test-newest lint verify bench bench-peer bench-gpu

demo: $(VENV)/ready
	$(RUN)/moejax train configs/demo.py
	$(RUN)/moejax generate runs/demo "def "
	$(RUN)/moejax report runs/demo

demo-vision: $(VENV)/ready
	$(RUN)/moejax train configs/vision_demo.py
	$(RUN)/python launch/transcribe.py runs/vision_demo runs/pictures/test.jsonl --count 200
	$(RUN)/moejax report runs/vision_demo

test: $(VENV)/ready
	$(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-newest:
	@test -n "$(NEWEST)" || { echo "make test-newest needs a Python of 3.12 or newer on the PATH"; exit 2; }
	$(MAKE) test PYTHON="$(NEWEST)" VENV=.venv-newest

lint: $(VENV)/ready
	$(RUN)/ruff check .

verify: $(VENV)/ready
	$(RUN)/moejax verify configs/demo.py

bench: $(VENV)/ready
	$(RUN)/python tests/bench/moe_layer.py
	$(RUN)/python tests/bench/compile_time.py
	$(RUN)/python tests/bench/startup.py
	$(RUN)/python tests/bench/pipeline.py
	$(RUN)/python tests/bench/checkpoint.py
	$(RUN)/python tests/bench/published.py
	$(RUN)/python tests/bench/vision.py
	$(RUN)/python tests/bench/layouts.py

bench-peer: $(VENV)/ready
	$(RUN)/python tests/bench/peers.py

bench-gpu: $(VENV)/ready
	$(RUN)/python tests/bench/gpu.py

$(VENV)/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "moejax needs Python 3.11 or newer on the PATH; set PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
