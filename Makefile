# From nothing but Python >= 3.11 and make: each command sets up .venv by itself, once.
.DEFAULT_GOAL := help
.PHONY: help figures train evidence test notebooks handout lab lint clean

PROFILE = digits
TO = course
PY := .venv/bin/python

figures: .venv/ready
	@$(PY) -m faithkd.cli run --profile '$(PROFILE)' $(foreach s,$(SET),--set '$(s)') \
	    $(foreach n,$(ONLY),--only '$(n)') $(if $(RETRAIN),--retrain) $(if $(REMEASURE),--remeasure) \
	    $(if $(JOBS),--jobs '$(JOBS)') $(if $(CLUSTER),--cluster '$(CLUSTER)')

train: .venv/ready
	@$(PY) -m faithkd.cli train --profile '$(PROFILE)' $(foreach s,$(SET),--set '$(s)') $(if $(JOBS),--jobs '$(JOBS)')

evidence: .venv/ready
	@$(PY) -m faithkd.cli keep --profile '$(PROFILE)' --retrain $(if $(JOBS),--jobs '$(JOBS)') \
	    $(if $(CLUSTER),--cluster '$(CLUSTER)')

test: .venv/ready
	@sh .ci/checks

notebooks: .venv/ready
	@$(PY) -m faithkd.cli notebooks refresh $(ONLY)

handout: .venv/ready
	@$(PY) -m faithkd.cli handout '$(TO)' $(ONLY) $(if $(SOLUTIONS),--solutions)

lab: .venv/ready
	@$(PY) -m jupyter lab notebooks

lint: .venv/ready
	@$(PY) -m ruff check $(if $(FIX),--fix) . && $(PY) -m ruff format $(if $(FIX),,--check) .

# Made anew when the dependencies change; the marker is written last, so a killed installation starts again.
.venv/ready: pyproject.toml .ci/environment
	@sh .ci/environment

# Finished work in .store/ and runs/ stays.
clean:
	rm -rf .venv

help:
	@echo 'make figures [PROFILE=digits] [SET="train.epochs=2 data.test_images=100"] [ONLY="08 09"]'
	@echo '             [RETRAIN=1 | REMEASURE=1] [JOBS=4 | CLUSTER=tcp://127.0.0.1:8786]'
	@echo '    all tables and figures, to figures/PROFILE/; PROFILE is one of' $(sort $(basename $(notdir $(wildcard params/*.yaml))))
	@echo '    Networks and measurements are committed: one seed is measured anew and compared, with REMEASURE=1 everything.'
	@echo 'make evidence [PROFILE=digits] [JOBS=4]'
	@echo '    trains and measures all of a profile from nothing, to weights/ and measurements/; goes on where it was stopped.'
	@echo '    On two cores: digits half an hour, mnist 10 hours, fashion_mnist 7, cifar10 20.'
	@echo 'make train [PROFILE=digits] [SET=...] [JOBS=4]'
	@echo '    all networks of a profile that are not there yet, one on each core'
	@echo 'make lab          the notebooks in JupyterLab'
	@echo 'make test         lint, unit tests, notebooks, everything from an empty store, the browser'
	@echo 'make notebooks    execute the committed notebooks again after a change'
	@echo 'make handout [TO=course] [SOLUTIONS=1]  the notebooks for students: stubs in place of solutions'
	@echo 'make book         the notebooks as a book, to build/book/; make slides: three lectures, to build/slides/'
	@echo 'make lint [FIX=1] ruff over code and notebooks'
	@echo 'Each creates .venv first, once (about 6 GB with CUDA libraries; with TORCH=cpu about 1.5 GB).'

# The book and the lectures as HTML, from what is committed: no kernel, no network.
.PHONY: book slides
book: .venv/ready
	@$(PY) -m sphinx -q -W --keep-going -c book -d build/doctrees . build/book && echo build/book/index.html

slides: .venv/ready
	@$(PY) book/slides.py build/slides
