# make demo   install, prepare, train, evaluate, export: the whole way, in nine minutes on two CPU cores
# make test   install with the test extra and run the whole suite
# make test-cluster   faults and kills, jobs under a real SLURM on this machine, two nodes in network namespaces; the last two need
#                     root and the packages slurmctld slurmd slurm-client munge iproute2

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := demo
# For a quicker or a longer demo: megabytes of text, recipe keys to override, and how the end task is fine-tuned.
DEMO_MEGABYTES ?= 24
DEMO_RECIPE ?=
DEMO_EVALUATE ?= --seeds 3 --epochs 3 --lr 1e-3

# Test files that run at the same time.
TEST_PROCESSES ?= 2

.PHONY: demo test test-cluster lint install install-test clean

demo: install
	$(BIN)/medley corpus --out $(DEMO)/corpus --max-megabytes $(DEMO_MEGABYTES)
	$(BIN)/medley prepare $(DEMO)/corpus/corpus.jsonl --out $(DEMO)/store --vocabulary 8192 --lowercase --overwrite
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --num_accelerators 2 \
		launch/train.py --ds_config configs/ds/cpu.json $(DEMO_RECIPE)
	$(BIN)/medley export $(DEMO)/run --overwrite
	$(BIN)/medley evaluate $(DEMO)/run/export --task $(DEMO)/corpus/task $(DEMO_EVALUATE)
	$(BIN)/medley evaluate $(DEMO)/run/export --task $(DEMO)/corpus/task $(DEMO_EVALUATE) --untrained
	$(BIN)/medley report $(DEMO)/run

test: install-test
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not cluster"

test-cluster: install-test
	$(BIN)/pytest -m cluster -rs tests/cluster

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/installed
install-test: $(VENV)/installed-test

# PyTorch first and pinned: anything that depends on "torch" would otherwise take the newest build.
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
