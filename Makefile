# The commands of this project. Each is enough on a new machine with Python 3.11, Java 17, gcc and make.

PYTHON ?= python3

BIN := .venv/bin
METADATA := setup.cfg setup.py
# Two installs at once would break the environment: `make -j demo test`, or two terminals.
LOCK := $(if $(shell command -v flock 2>/dev/null),flock .venv/.lock)
INSTALL = $(LOCK) $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

# Spark starts its workers with the `python3` of the PATH unless it is told otherwise.
export PYSPARK_PYTHON := $(CURDIR)/$(BIN)/python

.PHONY: help demo test test-docker test-jax test-torch support lint horovod bench fuzz chaos clean distclean check-machine
.DELETE_ON_ERROR:

help:
	@echo "make demo         train on the handwritten digits of scikit-learn, on 2 ranks; prints the held-out accuracy"
	@echo "make test         all tests"
	@echo "make test-docker  build the image, train in containers, kill one (minutes; starts a Docker engine: as root, on Debian)"
	@echo "make test-jax     the tests of Keras on JAX, in an environment of their own; 'make test-torch': on PyTorch"
	@echo "make support      run what trains on ranks everywhere that this machine can, and write the README's table of it"
	@echo "make lint         ruff, mypy, the import rule, the Dockerfiles"
	@echo "make horovod      build Horovod (minutes, once; the wheel is kept), so that its tests are not skipped"
	@echo "make bench        measure all-reduce, step time, start-up, memory, inference (minutes; quiet machine; root for the network)"
	@echo "make fuzz         a million random and mutated frames against the control channel (minutes; FRAMES=... SEED=...)"
	@echo "make chaos        disturb fits by more than thirty faults, three times each (an hour; as root, all of them)"
	@echo "make clean        remove caches and build products; 'make distclean' removes .venv as well"

demo: .venv/.demo
	TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/python examples/digits.py --master "local[2]" --num-ranks 2

test: .venv/.test
	$(BIN)/python -m pytest

test-docker: .venv/.test
	tests/cluster/with_engine.sh $(BIN)/python -m pytest tests/cluster/test_docker.py tests/cluster/test_docker_files.py

# In the environment of all tests JAX would make every import of Keras slower, and PyTorch is large. Name another build with
# `make test-torch KERAS_ON="torch==2.13.0+cpu"`, say.
test-jax test-torch: test-%: .venv-%/.created
	PYSPARK_PYTHON=$(CURDIR)/.venv-$*/bin/python .venv-$*/bin/python -m pytest tests/test_keras_backends.py -k $*

# What trains where: a table in the README. Docker, namespaces and Horovod are in it where this machine has them.
support: .venv/.test
	tests/cluster/with_engine.sh $(BIN)/python -m pytest -m support --junitxml .support.xml
	$(BIN)/python tests/support_table.py .support.xml

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.gpu examples/kubernetes/Dockerfile
	$(BIN)/python -m pytest --quiet tests/test_doors.py

horovod: .venv/.test
	$(LOCK) nice $(BIN)/allreduce-spark install-horovod

# A benchmark is a script tests/benchmarks/bench_*.py that prints what it measures.
bench: .venv/.test .venv-elephas/.created
	set -e; for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

FRAMES ?= 1000000
SEED ?= 0

fuzz: .venv/.test
	$(BIN)/python tests/rendezvous/fuzz_frames.py --frames $(FRAMES) --seed $(SEED)

# Not part of `make test`. Options such as `make chaos CHAOS="--faults kill-agent --repeats 1"`; --list names the faults.
chaos: .venv/.test
	$(BIN)/python tests/chaos/run.py $(CHAOS)

clean:
	rm -rf build dist *.egg-info .support.xml .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	rm -rf spark-warehouse metastore_db derby.log
	find allreduce_spark tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-elephas .venv-jax .venv-torch

# Said before anything is downloaded: what the machine itself lacks, and how to get it.
check-machine:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "There is no '$(PYTHON)' here: install Python 3.11, or name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@"$(PYTHON)" -m allreduce_spark.cli.main doctor --only python,java

# An environment without pip is what is left where Debian's python3-venv was missing: begin again.
.venv/.created: | check-machine
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@touch $@

.venv/.demo: $(METADATA) .venv/.created | check-machine
	$(INSTALL) ".[demo]"
	@touch $@

.venv/.test: $(METADATA) .venv/.created | check-machine
	$(INSTALL) ".[demo,test]"
	@touch $@

.venv-jax/.created .venv-torch/.created: .venv-%/.created: $(METADATA) | check-machine
	"$(PYTHON)" -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[spark,$*]" $(KERAS_ON) pytest pytest-timeout
	@touch $@

# The library to compare with, and the older versions that it pins: beside ours they could not be installed.
.venv-elephas/.created: | check-machine
	"$(PYTHON)" -m venv --clear .venv-elephas
	.venv-elephas/bin/python -m pip install --quiet --disable-pip-version-check --no-deps elephas==7.3.0
	.venv-elephas/bin/python -m pip install --quiet --disable-pip-version-check \
	  "tensorflow-cpu<2.20" "keras<3.11" "pyspark==3.5.5" "numpy<2" "h5py==3.11.0" "flask==2.3.3" pandas pyarrow setuptools
	@touch $@
