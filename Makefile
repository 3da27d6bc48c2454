# Everything a person types. `make` alone lists it.
PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
# ARGS, RUN, PROMPT, STEP, FORMAT, TASKS, DATA and PIP_ARGS are empty unless given.

VENV  := .venv
PY    := $(VENV)/bin/python
READY := $(VENV)/.installed
# One thread a process. Three test files run in parallel on two cores, since tests also wait: for links, servers, timeouts.
# Quick tests do not wait, so they have two workers: each takes seven seconds to import and to find the tests.
# A run ends when a worker dies: pytest-xdist would wait forever for the one that replaces it.
# Compiled modules are kept, or every rank and every program would compile the library and its tests again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart=0
# What test-fast omits: marks, and folders of tests
QUICK := not ranks and not slow and not smoke and not faults and not peers and not fake_cuda
ELSEWHERE := predict runs sweeps docs experiments

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: $(shell awk -F: '/^[a-z][a-z0-9-]*:/ { print $$1 }' $(firstword $(MAKEFILE_LIST)))

# Targets whose description begins with "seldom:" stand in the second list.
help:  ## show this list
	@echo "usage: make TARGET [CONFIG=$(CONFIG)] [RUN=runs/...] [ARGS=\"optim.lr=1e-3 ...\"]"; echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / && $$2 !~ /^seldom: / { printf "  %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo; echo "Seldom typed:"
	@awk -F ':.*## seldom: ' '/^[a-z0-9-]+:.*## seldom: / { printf "  %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo; echo "Targets that need the environment make it first ($(VENV); PYTHON=python3.12 picks another Python)."

setup: $(READY)  ## make .venv and install the project with its test tools, once
	@echo "setup: $(VENV) is ready"

# bin/pip is the last thing venv makes: without it, an interrupted start begins again.
$(READY): pyproject.toml constraints.txt
	@test -x $(VENV)/bin/pip || { \
	  command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) not found; scmoe needs Python 3.11 to 3.13" >&2; exit 1; }; \
	  $(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("setup: $(PYTHON) is Python %d.%d; scmoe needs 3.11 to 3.13 (make setup PYTHON=python3.12)" % v)' && \
	  $(PYTHON) -m venv --clear $(VENV); }
	@echo "setup: installing into $(VENV) (5 to 10 minutes the first time, without further lines: torch is large)" >&2
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt $(PIP_ARGS) -e ".[dev]"
	@$(PY) -m compileall -qq -j 0 $(VENV)/lib >/dev/null 2>&1 || true  # on all cores; pip compiles one file at a time
	@touch $@

train: $(READY)  ## train CONFIG, with ARGS as overrides
	@$(PY) -m scmoe train $(CONFIG) $(ARGS)

resume: $(READY)  ## resume RUN (the newest), or from STEP of it
	@$(PY) -m scmoe resume $(or $(RUN),runs/latest) $(if $(STEP),step=$(STEP)) $(ARGS)

generate: $(READY)  ## continue PROMPT="a text" with the model of RUN (default: the newest)
	@$(PY) -m scmoe generate $(or $(RUN),runs/latest) $(if $(PROMPT),--prompt '$(subst ','\'',$(PROMPT))') $(ARGS)

evaluate: $(READY)  ## score RUN (the newest): test split, perplexity, TASKS=piqa,... of lm-eval, or of the folder DATA
	@$(PY) -m scmoe evaluate $(or $(RUN),runs/latest) $(if $(TASKS),--tasks $(TASKS)) $(if $(DATA),--data $(DATA)) $(ARGS)

export: $(READY)  ## write the model of RUN (the newest): one safetensors file, or with FORMAT=hf a Hugging Face folder
	@$(PY) -m scmoe export $(or $(RUN),runs/latest) $(if $(FORMAT),--format $(FORMAT)) $(ARGS)

reproduce: $(READY)  ## seldom: all tables of the paper at SCALE (smoke, small or digits), in turn; can be stopped and continued
	@$(PY) -m experiments.table all --scale $(or $(SCALE),smoke) $(ARGS)

table: $(READY)  ## one TABLE (table3) at SCALE; finished runs are skipped, interrupted ones resumed
	@$(PY) -m experiments.table $(or $(TABLE),table3) --scale $(or $(SCALE),smoke) $(ARGS)

table3: $(READY)  ## seldom: the same as table TABLE=table3
	@$(PY) -m experiments.table table3 --scale $(or $(SCALE),smoke) $(ARGS)

runs: $(READY)  ## list runs: state, best loss, tokens/s, differences in their configs
	@$(PY) -m scmoe runs $(ARGS)

compare: $(READY)  ## draw the curves of RUNS="a b c" and show the differences in their configs
	@test -n "$(RUNS)" || { echo 'compare: RUNS is missing, such as RUNS="runs/a runs/b"; make runs lists them' >&2; exit 2; }
	@$(PY) -m scmoe compare $(RUNS) $(ARGS)

report: $(READY)  ## write one HTML page, report.html, of all runs, or of RUNS="runs/a results.json ..."
	@$(PY) -m scmoe report $(RUNS) $(ARGS)

sweep: $(READY)  ## run the W&B sweep file CONFIG=configs/sweep/lr.yaml: at W&B with a key, otherwise here
	@$(PY) -m scmoe sweep $(if $(filter file,$(origin CONFIG)),configs/sweep/lr.yaml,$(CONFIG)) $(ARGS)

list: $(READY)  ## list configs, models, data sets, architectures
	@$(PY) -m scmoe list $(ARGS)

check-data: $(READY)  ## read all data of CONFIG and name files that cannot be read
	@$(PY) -m scmoe check-data $(CONFIG) $(ARGS)

params: $(READY)  ## seldom: count the parameters of every preset and architecture, next to the paper's
	@$(PY) -m scmoe params $(ARGS)

estimate: $(READY)  ## what CONFIG costs on ARGS="ep=8 dp=2": FLOPs, bytes, memory; starts nothing; --counted counts a step
	@$(PY) -m scmoe estimate $(CONFIG) $(ARGS)

advise: $(READY)  ## would ScMoE pay for CONFIG on ARGS="cluster=8xA30-PCIe"? By simulation; starts nothing
	@$(PY) -m scmoe advise $(CONFIG) $(ARGS)

bench: $(READY)  ## time of the MoE layer over that of its dense products
	@$(PY) -m experiments.bench layer $(ARGS)

bench-overlap: $(READY)  ## seldom: how much each architecture hides; SHARES="0.52 0.35" of communication, LEVELS="block iteration"
	@for level in $(or $(LEVELS),block); do for share in $(or $(SHARES),0.52 0.35 0.15); do \
	  $(PY) -m experiments.bench overlap --level $$level --share $$share $(ARGS) || exit; done; done

bench-inference: $(READY)  ## seldom: prefill and decode of each architecture, at SHARES="0.52 0.15" of communication
	@for share in $(or $(SHARES),0.52 0.15); do $(PY) -m experiments.bench inference --share $$share $(ARGS) || exit; done

timeline: $(READY)  ## seldom: one pair's operators, measured and planned (Fig. 7), and Chrome traces
	@$(PY) -m experiments.bench timeline $(ARGS)

# Not after $(READY): it also runs from a plain checkout with the Python that has torch, where nothing can be installed.
gpu-check:  ## check everything on one GPU in nine minutes, into the folder OUT; ARGS="--device cpu --tiny" for a trial
	@$(or $(wildcard $(PY)),$(PYTHON)) -m experiments.bench gpu $(if $(OUT),--out $(OUT)) $(ARGS)

figures: $(READY)  ## draw the pictures of the docs and write the pages of results, from what is kept there
	@$(PY) -m experiments.figure 0 $(ARGS)

reports: $(READY)  ## seldom: measure what the docs' pictures show and docs/figures lacks; ARGS=--list shows the minutes
	@$(PY) -m docs.build.reports $(ARGS)

recording: $(READY)  ## seldom: run the quickstart once more and draw its terminal into the README's picture
	@$(PY) -m tests.terminal --from training docs/figures/train.svg make train

figure: figure$(or $(NUMBER),-none)  ## draw a figure of the paper, NUMBER=1, 4, 7, 8, 9, 10, 13 or 22; 8 and 13 are measured first

figure-none:
	@echo 'figure: NUMBER is missing, such as NUMBER=9' >&2; exit 2

figure1: $(READY)  ## seldom: Fig. 1, share of All-to-All in the time, from the reports that figure8 leaves in runs/figure8
	@$(PY) -m experiments.figure 1 runs/figure8 $(ARGS)

figure4: $(READY)  ## seldom: Fig. 4, a pair of blocks with the shortcut
	@$(PY) -m experiments.figure 4 $(ARGS)

figure7: $(READY)  ## seldom: Fig. 7, two timelines by the cost model; timeline measures all five
	@$(PY) -m experiments.figure 7 $(ARGS)

figure8: $(READY)  ## seldom: measure Fig. 8, three hardware scenarios on shaped links, and draw it; ARGS="--compute real"
	@for share in 0.52 0.42 0.11; do $(PY) -m experiments.bench overlap --share $$share --out runs/figure8 \
	  --rows top2 top2_pipelined top1 top1_pipelined shared_expert shared_expert_pipelined scmoe_pos2 scmoe_pos2_pipelined \
	  $(ARGS) || exit; done
	@$(PY) -m experiments.figure 8 runs/figure8

figure9: $(READY)  ## seldom: Fig. 9, gating over training, of RUN (the newest), trained with analysis.gating_every=N
	@$(PY) -m experiments.figure 9 $(or $(RUN),runs/latest) $(ARGS)

figure10: $(READY)  ## seldom: Fig. 10, similarity of representations, of RUN (the newest), with analysis.similarity_every=N
	@$(PY) -m experiments.figure 10 $(or $(RUN),runs/latest) $(ARGS)

figure13: $(READY)  ## seldom: measure Fig. 13, offloaded experts, and draw it; ARGS="--quick" for a trial
	@$(PY) -m experiments.figure 13 $(ARGS)

figure22: $(READY)  ## seldom: Appendix A.1, gradients by depth: five architectures are trained
	@$(PY) -m experiments.figure 22 $(ARGS)

test: $(READY)  ## run all tests, of the fault suite the representative ones
	@$(PYTEST) -m "not faults or representative" $(ARGS)

test-fast: $(READY)  ## run the quick tests of the model, its schedules, config and training, in about a minute
	@$(PYTEST) -n 2 -m "$(QUICK)" $(ELSEWHERE:%=--ignore=tests/%) $(ARGS)

test-dist: $(READY)  ## seldom: run the tests that start several processes
	@$(PYTEST) -m ranks $(ARGS)

test-faults: $(READY)  ## seldom: run the whole fault suite: kills, broken disks, damage, resuming, resharding
	@$(PYTEST) -m faults $(ARGS)

mutate: $(READY)  ## seldom: let mutmut change single lines of the core, or of CORE="scmoe.moe.router.*"
	@OMP_NUM_THREADS=1 $(PY) -m mutmut run $(if $(CORE),"$(CORE)")
	@$(PY) -m mutmut results

wheel-test: $(READY)  ## seldom: build the wheel, install it away from the checkout, and run verbs there
	@OMP_NUM_THREADS=1 $(PY) -m tests.wheel $(ARGS)

lint: $(READY)  ## check rules and format with ruff
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(READY)  ## let ruff fix what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

typecheck: $(READY)  ## seldom: check types with mypy
	@$(PY) -m mypy
	@$(PY) -m mypy -p docs.build

docs: $(READY)  ## build the documentation as a site into site/ and check its links; ARGS=serve shows it
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs $(or $(ARGS),build --strict)
	@$(if $(ARGS),,echo "docs: site/index.html is built")

# Types, docs and the wheel need one core each. The tests use both.
ci: lint  ## run lint, types, docs, the wheel's test and all tests: what a change must pass
	@{ $(MAKE) --no-print-directory typecheck && $(MAKE) --no-print-directory docs; } & checks=$$!; \
	  $(MAKE) --no-print-directory wheel-test; wheel=$$?; wait $$checks && exit $$wheel
	@$(MAKE) --no-print-directory test

clean:  ## remove caches and build leftovers (keeps .venv, runs/ and .cache/)
	@rm -rf build dist mutants *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './runs/*' -prune -exec rm -rf {} +
	@echo "clean: caches and build leftovers are gone"
	@echo "clean: kept $(VENV), runs/ and .cache/ (prepared data); rm -r them by hand"
