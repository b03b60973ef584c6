# Set-up and the two main commands. VENV=… puts the environment elsewhere; PYTHON=… chooses the interpreter (>= 3.11).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.sfm_fast_ready
# Python keeps its bytecode whatever the environment says: compiling torch and timm again at every start takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test soak lint bench claims predict gpu gpu-prepare static accuracy settings derivation readme clean

SOURCES = $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/*)

# Runs a command and prints a line every ten seconds until it ends, because pip is silent while it downloads or compiles a large file.
define with_signs_of_life
@seconds=0; while sleep 10 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do seconds=$$((seconds + 10)); echo "... $$seconds s"; done & \
life=$$!; $(1); code=$$?; kill $$life 2>/dev/null; exit $$code
endef

$(READY): pyproject.toml setup.py constraints.txt $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	@echo "Making the virtual environment $(VENV): some seconds."
	$(PYTHON) -m venv $(VENV)
	@echo "Downloading and installing torch and the build tools: some minutes, depending on the connection."
	$(call with_signs_of_life,$(BIN)/python -m pip install --progress-bar off --constraint constraints.txt setuptools ninja torch torchvision)
	@echo "Building the C++ extension (and the CUDA one where there is a CUDA compiler) and installing the other packages: a few minutes on 2 cores."
	$(call with_signs_of_life,$(BIN)/python -m pip install --progress-bar off --constraint constraints.txt --no-build-isolation --editable '.[test]')
	touch $@

demo: $(READY)  ## statistics, distillation, evaluation and cost on embedded data, one to two minutes on 2 cores
	$(BIN)/sfm-fast demo --out demo

test: $(READY)  ## all tests, one process per core
	$(BIN)/python -m pytest -n auto --dist loadfile

soak: $(READY)  ## the tests that take minutes each
	$(BIN)/python -m pytest -n auto --dist loadfile -m soak

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## time and memory of losses, image path and steps against torch and LGM, on a CPU: 12 minutes on 2 cores
	$(BIN)/sfm-fast bench --preset laptop --device cpu --out benchmarks/results/cpu

claims: $(READY)  ## the project's claims against LGM, as tests, with accuracy: 15 minutes on 2 cores
	$(BIN)/python -m pytest -q -s -m claims benchmarks/claims.py

PLAN = $(BIN)/sfm-fast plan --method sfm-anchored --backbone vit_base_patch14_dinov2 --image-size 224
predict: $(READY)  ## predict memory at ImageNet's sizes, in seconds
	$(PLAN) --num-classes 100 --lgm-views 10 --memory 1GB --json benchmarks/results/predicted/plan_100.json
	$(PLAN) --num-classes 1000 --lgm-views 3 --memory 4.2GB --json benchmarks/results/predicted/plan_1000.json
	$(PLAN) --num-classes 21841 --lgm-views 3 --memory 2GB --json benchmarks/results/predicted/plan_21841.json

gpu:  ## on a machine with an NVIDIA GPU: test, measure, sanitize, profile, in seven minutes (docs/gpu.md; PYTHON=… chooses the interpreter)
	PYTHON=$(PYTHON) scripts/gpu.sh

gpu-prepare: $(READY)  ## on a machine without one: build what `make gpu` needs, in .gpu
	$(BIN)/python benchmarks/gpu/prepare.py

static: $(READY)  ## rewrite the table of the compiled GPU kernels (tests compare with it)
	$(BIN)/python tests/static/table.py --update

accuracy: $(READY)  ## the accuracy table on full Fashion-MNIST, three backbones: resumable, prints what each cell will take; FULL=1: everything
	$(BIN)/python -m benchmarks.accuracy --data fashion-mnist --out benchmarks/results/cpu

settings: $(READY)  ## how the default settings were chosen, on held-out training images: resumable, an hour on 2 fast cores
	$(BIN)/python -m benchmarks.accuracy.settings --out benchmarks/results/cpu
	$(BIN)/python -m benchmarks.accuracy.targets --out benchmarks/results/cpu --figure docs/figures/targets.svg

derivation: $(READY)  ## LGM's gradient against the flow on full Fashion-MNIST: table and figure, some minutes
	$(BIN)/python -m benchmarks.derivation --data fashion-mnist --out benchmarks/results/cpu --figure docs/figures/derivation.svg

readme: $(READY)  ## the README's tables, from the committed results
	$(BIN)/python scripts/readme_tables.py

clean:
	rm -rf $(VENV) build demo sfm_fast/_C*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
