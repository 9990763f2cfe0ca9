# Everything a developer or CI runs. `make` alone lists the targets.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train test test-interpreted test-native test-programs test-emulated test-all test-noise test-clients test-oldest check fuzz sanitize accuracy bench report gpu experiments

help:
	@echo "make setup     create $(VENV) and install fusedloss with what the other targets need"
	@echo "make train     train on CIFAR-10, or on scikit-learn's digits where it cannot be had (options: ARGS='--epochs 3 --loss torch')"
	@echo "make test      the test suite in four processes, of which two run at a time (options: ARGS='-k accuracy -x')"
	@echo "make test-all  the same with the whole sweep"
	@echo "make test-oldest  the same as make test with the oldest PyTorch that is supported, in .venv-oldest"
	@echo "make test-noise  the tests under Triton's interpreter, with twice the errors that a GPU's exp and division may have"
	@echo "make test-clients  transformers, timm, Lightning and torchvision with the fused loss; installs them into $(VENV)"
	@echo "make check     lint, format and type checks"
	@echo "make fuzz      100,000 random problems against float64, and 1,000 under the interpreter (options: N=5000 SEED=1)"
	@echo "make sanitize  random problems for the CPU kernel under AddressSanitizer and UBSan (options: ARGS=5000)"
	@echo "make report    what the kernels compile to on GPUs that are not here: runs/KERNELS.md (options: ARGS=--update)"
	@echo "make accuracy  hard cases against 50 digits, ours and PyTorch's: runs/ACCURACY.md (options: ARGS=--update)"
	@echo "make bench     time the loss on this machine against PyTorch's, on the GPU where there is one (options: ARGS=--quick)"
	@echo "make gpu       all that needs a GPU, in 9 minutes: tests, benchmarks, ncu, compute-sanitizer: benchmarks/RESULTS.md (options: ARGS='--only tune')"
	@echo "make experiments  mean or sum? measured anew, with plots: benchmarks/EXPERIMENTS.md (options: ARGS='--only scaling')"

# Remade when the metadata change; a virtual environment that is there and up to date costs nothing.
$(READY): pyproject.toml setup.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --quiet -e '.[test,train,dev]' $(VERSIONS)
	@touch $@

setup: $(READY)

train: $(READY)
	$(PY) benchmarks/train_cifar10.py $(ARGS)

# In four processes, two at a time: tests/parts.py says why.
test: $(READY)
	$(PY) tests/parts.py $(ARGS)

test-interpreted test-native test-programs test-emulated: test-%: $(READY)
	$(PY) tests/parts.py --part $* $(ARGS)

test-all: ARGS += --sweep
test-all: test

# No later numpy: Triton 3.5's interpreter does not run with it.
test-oldest:
	@$(MAKE) --no-print-directory test VENV=.venv-oldest VERSIONS="'torch==2.9.*' 'numpy<2.4'"

# Triton's interpreter with twice the errors that a GPU's exp and division may have: tests/noise.py.
test-noise: $(READY)
	$(PY) tests/parts.py --part interpreted --noise 2 $(ARGS)

test-clients: $(READY)
	$(PY) -m pip install --disable-pip-version-check --quiet -e '.[clients]'
	$(PY) -m pytest tests/test_clients.py $(ARGS)

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

SEED := $(or $(SEED),$(shell date +%s))
N    ?= 100000

fuzz: $(READY)
	@echo "make fuzz N=$(N) SEED=$(SEED)"
	FUSEDLOSS_FUZZ=$(N) $(PY) -m pytest tests/test_fuzz.py -m "not interpreter" --hypothesis-seed=$(SEED) $(ARGS)
	TRITON_INTERPRET=1 FUSEDLOSS_FUZZ=$(N) $(PY) -m pytest tests/test_fuzz.py -m interpreter --hypothesis-seed=$(SEED) $(ARGS)

# -O0: with optimisation GCC takes minutes to instrument the templates.
SANITIZE := -std=c++17 -O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-psabi
SANITIZED := $(patsubst kernels/cpu/%.cpp,build/sanitize/%.o,$(filter-out %/python.cpp,$(wildcard kernels/cpu/*.cpp)))

build/sanitize/%.o: kernels/cpu/%.cpp $(wildcard kernels/cpu/*.h)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -c $< -o $@

build/sanitize/fuzz: tests/fuzz_cpu_kernel.cpp $(SANITIZED)
	$(CXX) $(SANITIZE) $^ -o $@

sanitize: build/sanitize/fuzz
	./build/sanitize/fuzz $(or $(ARGS),1000)

report: $(READY)
	$(PY) benchmarks/kernel_report.py $(ARGS)

HAS_GPU = $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"

accuracy: $(READY)
	$(PY) benchmarks/accuracy.py $(ARGS)

bench: $(READY)
	$(PY) benchmarks/bench_cpu.py $(ARGS)
	$(PY) benchmarks/bench_linear.py $(ARGS)
	$(PY) benchmarks/slow_calls.py
	ATEN_CPU_CAPABILITY=avx2 FUSEDLOSS_CPU_ISA=avx2 $(PY) benchmarks/slow_calls.py
	$(PY) benchmarks/bench_vocab_parallel.py
	$(PY) benchmarks/host_overhead.py
	if $(HAS_GPU); then $(PY) benchmarks/gpu.py --only benchmarks; fi

gpu: $(READY)
	$(PY) benchmarks/gpu.py $(ARGS)

experiments: $(READY)
	$(PY) benchmarks/experiments.py $(ARGS)
