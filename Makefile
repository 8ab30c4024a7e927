# make demo · make test · make faults · make soak · make lint · make protos · make bench · make images · make manifests · make tutorials · make site
# Everything works from a bare clone: Python 3.11 and make are all that is needed.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# More options for pip, an index of CPU-only torch builds for instance.
PIP_OPTIONS ?=
OUT ?= $(if $(TOMOGRAM),$(basename $(notdir $(TOMOGRAM)))-out,demo-out)
TEST_PROCESSES ?= 2
# What suits the simulated scene: its complexes are 14 to 28 nm wide and there are three kinds of them.
DEMO_SETTINGS := --set particle_diameter_angstrom=190 --set threshold=1.5 --set clusters=4

.PHONY: setup demo test faults soak test-browser tutorials site manifests lint protos protos-check bench clean wheelhouse images test-images check-formats

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Cryofleet needs Python 3.11; name yours with: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt \
		-e ".[io,picking,alignment,learning,simulation,orchestrator,views,docs,dev]"
	touch $@

# Exit code 3 is a run that ended with items set aside: there is a report all the same.
# The main job, on a simulated tomogram or on TOMOGRAM=path.mrc; OPTIONS="--set voxel_size_angstrom=10" and the like.
ifdef TOMOGRAM
demo: $(READY)
	$(BIN)/cryofleet run discover --tomogram "$(TOMOGRAM)" --out "$(OUT)" $(OPTIONS) || test $$? -eq 3
else
demo: $(READY)
	$(BIN)/cryofleet run simulate-tomogram --set ctf_correction=wiener --out "$(OUT)/simulation"
	$(BIN)/cryofleet run discover --tomogram "$(OUT)/simulation/tomogram.mrc" \
		--set truth="$(OUT)/simulation/truth.parquet" $(DEMO_SETTINGS) --out "$(OUT)" $(OPTIONS) || test $$? -eq 3
endif
	@echo "Open $(OUT)/report.html. The platform is still up; stop it with: $(BIN)/cryofleet down"

# What checks the manifests of deploy/k8s: from Debian, or KUBECTL=... PROMTOOL=... of this machine. Elsewhere those
# tests are skipped, but in CI.
ifneq ($(or $(wildcard /usr/share/keyrings/debian-archive-keyring.gpg),$(KUBECTL),$(CI)),)
MANIFEST_TOOLS := $(VENV)/manifests/.ready
endif

$(VENV)/manifests/.ready: deploy/k8s/checks/install.sh deploy/k8s/checks/requirements.txt
	PIP_OPTIONS="$(PIP_OPTIONS)" KUBECTL="$(KUBECTL)" PROMTOOL="$(PROMTOOL)" sh deploy/k8s/checks/install.sh $(VENV)/manifests $(PYTHON)
	touch $@

manifests: $(READY) $(VENV)/manifests/.ready
	$(BIN)/python -m pytest tests/unit/deploy

# A file's tests stay in one process, so that what they share is made once; the long ones come first.
test: $(READY) $(MANIFEST_TOOLS)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# The faults whose tests wait long, which `make test` leaves out.
faults: $(READY)
	$(BIN)/python -m pytest -m long tests/faults

# Faults at random for at most 15 minutes (docs/faults.md): SEED repeats one, FAULTS and MINUTES change how many and how long.
soak: $(READY)
	SEED="$(SEED)" FAULTS="$(FAULTS)" MINUTES="$(MINUTES)" $(BIN)/python -m tests.faults.soak

# The page in a real browser: Debian's chromium, or CHROMIUM=... of this machine. Pictures of it go into SCREENSHOTS.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || echo /usr/bin/chromium)
SCREENSHOTS ?= build/screenshots

$(CHROMIUM):
	sh tests/browser/install.sh

test-browser: $(READY) $(CHROMIUM)
	CHROMIUM="$(CHROMIUM)" SCREENSHOTS="$(SCREENSHOTS)" $(BIN)/python -m pytest -m browser tests/browser

# Each notebook of docs/tutorials in a fresh kernel; NAMES="02 07" runs two.
TUTORIALS := $(VENV)/.tutorials

$(TUTORIALS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e ".[tutorials]"
	touch $@

tutorials: $(TUTORIALS)
	$(BIN)/python docs/tutorials/run.py $(NAMES)

# The documentation as a folder of pages, build/site/index.html, with the outputs that `make tutorials` left.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(READY) protos-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/baseline.binpb

protos: $(READY)
	PYTHON=$(BIN)/python ./protos/generate.sh

protos-check: $(READY)
	PYTHON=$(BIN)/python ./protos/generate.sh --check

bench: $(READY)
	$(BIN)/python -m benchmarks $(BENCH_OPTIONS)

# Images (docs/images.md). The wheelhouse is made by a PYTHON of the version that the images' base has.
IMAGES ?= io picking alignment learning simulation orchestrator viewer
WHEELHOUSE ?= build/wheelhouse
TORCH ?= cpu

wheelhouse:
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" PIP_OPTIONS="$(PIP_OPTIONS)" ./images/wheelhouse.sh "$(WHEELHOUSE)"

images:
	TORCH="$(TORCH)" WHEELHOUSE="$(WHEELHOUSE)" ./images/build.sh $(IMAGES)

# As root on Debian or Ubuntu; takes many minutes and some 20 GB under CRYOFLEET_IMAGES_FOLDER.
test-images: $(READY)
	IMAGES="$(IMAGES)" $(BIN)/python -m pytest -v tests/images/check_images.py

# Other programs read what we write, each in an environment of its own under .venv/formats, made when it is not there.
check-formats: $(READY)
	PIP_OPTIONS="$(PIP_OPTIONS)" $(BIN)/python -m pytest -v tests/formats/check_formats.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
