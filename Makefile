# Every target that needs Python packages first installs them into $(VENV), unless they are there.
#   make test VENV=/path/to/venv      use (or create) another virtual environment
#   make test PYTHON=python3.12       create it with another Python
#   DETECTRON2=<pip spec> make test   install that Detectron2 (see moco_d2/install_detectron2.py)
#   make test CONSTRAINTS=/dev/null   keep the versions already in VENV (a torch for your driver, say)

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
DEMO_OUTPUT ?= output/demo
SAMPLE_OUTPUT ?= output/sample-backbone
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := "$(BIN)/python" -m pip --disable-pip-version-check
# The stamp names the checkout it was written for: an environment that two checkouts share is set up again for each.
STAMP := $(VENV)/.moco_d2-installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-full proof sample-backbone test test-slow lint docs format doctor clean

help: ## Show this list
	@echo "usage: make TARGET [VENV=.venv] [PYTHON=python3] [CONSTRAINTS=constraints.txt]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 14

demo: $(STAMP) ## The whole pipeline on sample pictures: pretrain, convert, detect, evaluate (minutes on a CPU)
	"$(BIN)/moco-d2" demo --output "$(DEMO_OUTPUT)"

demo-full: $(STAMP) ## The demo with a full-width ResNet-50 (much longer; a GPU helps)
	"$(BIN)/moco-d2" demo --full --output "$(DEMO_OUTPUT)-full"

# Without CIFAR=, torchvision downloads the pictures. A second call continues the run in OUTPUT.
proof: $(STAMP) ## The MoCo authors' CIFAR-10 demo beside their curve (CIFAR= WIDTH=0.25 EPOCHS=12 OUTPUT=)
	"$(BIN)/python" -m benchmarks proof $(if $(CIFAR),--pictures "$(CIFAR)") $(if $(WIDTH),--width "$(WIDTH)") \
	    $(if $(EPOCHS),--epochs "$(EPOCHS)") $(if $(OUTPUT),--output "$(OUTPUT)")

# A second call continues the run. moco_d2/samples/backbone.pth is such a file; its checksum is in catalog.yaml.
sample-backbone: $(STAMP) ## Pretrain moco-d2://sample, a small backbone, on drawn pictures (an hour on a CPU)
	DETECTRON2_DATASETS="$(SAMPLE_OUTPUT)/datasets" "$(BIN)/moco-d2" samples "$(SAMPLE_OUTPUT)/datasets"
	DETECTRON2_DATASETS="$(SAMPLE_OUTPUT)/datasets" OMP_NUM_THREADS=1 "$(BIN)/moco-d2" pretrain --resume \
	    --config-file quick_schedules/moco_v2_R18_sample OUTPUT_DIR "$(SAMPLE_OUTPUT)/pretrain"
	"$(BIN)/moco-d2" convert "$(SAMPLE_OUTPUT)/pretrain/backbone.pth" "$(SAMPLE_OUTPUT)/sample.pth"

# One thread and one process a core: three times as fast on 2 cores as one process with two threads.
test: $(STAMP) ## The tests (PYTEST_ARGS="tests/layers -n 0 -x" goes to pytest)
	OMP_NUM_THREADS=1 CONSTRAINTS="$(CONSTRAINTS)" \
	    "$(BIN)/python" -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

# This -m replaces the one of pyproject.toml.
test-slow: $(STAMP) ## The tests that take minutes each: twenty kills, elastic restart, long loops
	OMP_NUM_THREADS=1 CONSTRAINTS="$(CONSTRAINTS)" "$(BIN)/python" -m pytest -q -m slow $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, mypy, import-linter and codespell
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"
	"$(BIN)/codespell"

# A warning, such as a broken link, is an error; all are shown.
docs: $(STAMP) ## The documentation site, in site/ (open site/index.html)
	"$(BIN)/python" -m sphinx --quiet --fresh-env --fail-on-warning --keep-going -c docs . site

format: $(STAMP) ## Let ruff format the code and fix what it can
	"$(BIN)/ruff" format .
	"$(BIN)/ruff" check --fix .

doctor: $(STAMP) ## What is installed, what works, which datasets are found
	"$(BIN)/moco-d2" doctor

install: $(STAMP) ## Only create the environment and install

clean: ## Remove the default environment, caches and build leftovers (not your outputs)
	rm -rf .venv build dist site docs/api *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "moco_d2 needs Python 3.10 or later; $(PYTHON) is: $$("$(PYTHON)" --version 2>&1)" >&2; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@# A half-made environment would look complete to the next call. A folder that existed before is not removed.
	@test -e "$(VENV)" || fresh=yes; "$(PYTHON)" -m venv "$(VENV)" || { test -z "$$fresh" || rm -rf "$(VENV)"; \
	    echo "no virtual environment could be made (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

ifneq ($(shell cat "$(STAMP)" 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

# setuptools and wheel come first, without build isolation, so that source packages are built with the tested versions.
# opencv-python needs the system's libGL, which servers and containers often lack. It is then replaced by the headless
# build of the same version, which only lacks windows.
$(STAMP): setup.py pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c "$(CONSTRAINTS)" setuptools wheel
	@echo "installing into $(VENV); torch with its libraries is about 5 GB, some minutes the first time"
	$(PIP) install --no-build-isolation -c "$(CONSTRAINTS)" -e ".[dev]"
	@"$(BIN)/python" -c "import cv2" 2>/dev/null || { \
	    echo "opencv-python does not load here (libGL?); taking opencv-python-headless"; \
	    version=$$("$(BIN)/python" -c "from importlib.metadata import version; print(version('opencv-python'))"); \
	    $(PIP) install --quiet --no-deps --force-reinstall "opencv-python-headless==$$version"; }
	"$(BIN)/python" -m moco_d2.install_detectron2
	@printf '%s' "$(CURDIR)" > "$(STAMP)"
