# Every target first makes .venv from requirements.txt, unless that was done and the file has not changed since.

# The Python that .venv is made with: make test PYTHON=python3.12
PYTHON ?= python3
# make -f /path/Makefile runs in the caller's folder. $(dir) would split a path at its spaces.
ROOT := $(shell dirname "$(strip $(MAKEFILE_LIST))")
IN_ROOT = @set -e; cd "$(ROOT)";
SHELL := bash

.PHONY: demo test lint bench report studio setup

demo: setup
	$(IN_ROOT) export PYTHON=.venv/bin/python; \
	bash hw2_1.sh outputs/p1 --overwrite; \
	$$PYTHON p1_ddpm/figures.py --out outputs/p1_figures; \
	bash hw2_2.sh; \
	$$PYTHON p2_ddim/evaluate.py outputs/p2 p2_ddim/examples/GT; \
	$$PYTHON p2_ddim/figures.py --only eta strips; \
	bash hw2_3.sh; \
	$$PYTHON p3_controlnet/figures.py --out outputs/p3_figures; \
	bash hw2_3_2024.sh; \
	$$PYTHON p3_personalization/figures.py; \
	echo "P1 digits:  $$PWD/outputs/p1"; \
	echo "P1 figures: $$PWD/outputs/p1_figures"; \
	echo "P2 faces:   $$PWD/outputs/p2"; \
	echo "P2 figures: $$PWD/outputs/p2_figures"; \
	echo "P3 circles: $$PWD/outputs/p3"; \
	echo "P3 figures: $$PWD/outputs/p3_figures"; \
	echo "P3 of 2024: $$PWD/outputs/p3_2024 and $$PWD/outputs/p3_2024_figures"

test: setup
	$(IN_ROOT) .venv/bin/python -m pytest --numprocesses auto

lint: setup
	$(IN_ROOT) .venv/bin/python -m ruff check .; .venv/bin/python -m ruff format --check .

bench: setup
	$(IN_ROOT) for problem in p1 p2 p3; do .venv/bin/python benchmarks/speed.py $$problem; done

# make report P1_WEIGHTS=... shows a student's own; the names are those of the flags of docs/report/make.py.
report: setup
	$(IN_ROOT) flags=(); \
	for name in P1_WEIGHTS P2_WEIGHTS P2_EXAMPLES P3_BASE P3_CONTROLNET P3_CONCEPTS P3_WORDS P3_CUSTOM P3_CLIP \
		P3_ZEROSHOT; do \
		if [ -n "$${!name}" ]; then flag=$${name,,}; flags+=("--$${flag//_/-}" "$${!name}"); fi; \
	done; \
	.venv/bin/python docs/report/make.py "$${flags[@]}"

# Gradio wants an older Pillow than requirements.txt has, so the studio gets an environment of its own, which sees
# whatever .venv has beside it. make studio ARGS="--port 8000" hands on arguments.
studio: setup
	$(IN_ROOT) \
	mark=.venv-studio/requirements.txt; \
	if ! [ -x .venv-studio/bin/python ] || ! cat requirements.txt studio/requirements.txt | cmp -s - $$mark; then \
		.venv/bin/python -m venv --clear .venv-studio; \
		path='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		.venv/bin/python -c "$$path" >"$$(.venv-studio/bin/python -c "$$path")/venv.pth"; \
		echo "Installing studio/requirements.txt into $$PWD/.venv-studio (once)"; \
		.venv-studio/bin/python -m pip install --quiet --disable-pip-version-check -r studio/requirements.txt; \
		cat requirements.txt studio/requirements.txt >$$mark; \
	fi; \
	exec .venv-studio/bin/python studio/app.py $(ARGS)

# The copy of requirements.txt in .venv is written last, so a set-up that failed is not taken for a whole one. What this
# recipe began and did not finish is begun anew; a .venv made by hand is only added to. The lock, held by the shell's
# file 9, makes a second make wait for the first.
setup:
	$(IN_ROOT) \
	whole() { [ -x .venv/bin/python ] && cmp -s requirements.txt .venv/requirements.txt; }; \
	if whole; then exit 0; fi; \
	exec 9>.venv.lock; \
	"$(PYTHON)" -c 'import fcntl, sys; fcntl.flock(9, fcntl.LOCK_EX); sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON): not a Python 3.11 or newer; name one with: make PYTHON=..." >&2; exit 2; }; \
	if whole; then exit 0; fi; \
	if [ ! -x .venv/bin/python ] || [ -e .venv.unfinished ]; then \
		touch .venv.unfinished; \
		"$(PYTHON)" -m venv --clear .venv; \
	fi; \
	echo "Installing requirements.txt into $$PWD/.venv (once, some minutes)"; \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt; \
	rm -f .venv.unfinished; \
	cp requirements.txt .venv/requirements.txt
