# make train: install, meta-train on the embedded data set, evaluate.   make test: install, run the tests.
# make faults: the long tests.   make chaos [SEED=0 MINUTES=10]: they, and a run under random faults; its report is in chaos/.
PYTHON ?= python3
METADIST := .venv/bin/metadist

.PHONY: train test faults chaos lint peers clean
train: .venv/installed
	$(METADIST) train quickstart

# Two processes for what needs no cluster; then what shares one, and what breaks its own.
test: .venv/installed
	.venv/bin/python -m pytest -n 2 --dist worksteal -m "not cluster and not own_cluster and not chaos"
	.venv/bin/python -m pytest -m "(cluster or own_cluster) and not chaos"

# The long forms of tests on clusters, most of them of the fault table.
faults: .venv/installed
	.venv/bin/python -m pytest -m chaos

# The long form of the fault table, then a soak under random faults, compared with a calm run. Both want root for hosts.
SEED ?= 0
MINUTES ?= 10
chaos: faults
	.venv/bin/python -m tests.faults.chaos --seed $(SEED) --minutes $(MINUTES) --out chaos

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# The libraries that some tests compare with. learn2learn's release ships C files of an old Cython: made anew here.
peers: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[peers]'
	.venv/bin/python -m venv .venv/learn2learn
	.venv/learn2learn/bin/python -m pip install --quiet 'cython<3' 'setuptools<81' wheel
	cd .venv/learn2learn && ../bin/python -m pip download --quiet --no-deps --no-binary :all: learn2learn==0.2.0
	cd .venv/learn2learn && tar -xzf learn2learn-0.2.0.tar.gz && rm -f learn2learn-0.2.0/learn2learn/data/*.c
	cd .venv/learn2learn/learn2learn-0.2.0 && ../bin/python setup.py --quiet build_ext bdist_wheel
	.venv/bin/python -m pip install --quiet --no-deps .venv/learn2learn/learn2learn-0.2.0/dist/*.whl

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; say make PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	@touch .venv/installed

clean:
	rm -rf .venv
