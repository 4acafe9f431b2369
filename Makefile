# Everything for a fresh machine with make and Python 3.11 or newer; `make` alone lists the targets.
# Options of a program go into ARGS, such as `make demo ARGS=--once` or `make test ARGS=tests/test_policy.py`.

PYTHON ?= python3
RUN := .venv/bin/python -m
PIP := $(RUN) pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo up down status test-alert test hours clients torture fleet bench lint wheel docs pictures pins clean

help:
	@echo 'make demo    try it: everything on this machine, a sandbox instead of KIS, nothing to configure'
	@echo 'make up      start the Prefect server, the deployments and a worker with your credentials'
	@echo 'make status  what of it runs, and how the tokens are'
	@echo 'make down    stop it'
	@echo 'make test-alert  send a test message to Slack, and say whether it took it'
	@echo 'make test    the tests'
	@echo 'make hours   what needs no process of its own, with the clock moved to six moments'
	@echo 'make clients mojito2 and python-kis on one token, 32 processes of each'
	@echo 'make torture every fault at every step: kills, failing calls, bad files, clocks, planted bugs (up to an hour)'
	@echo 'make bench   how fast it is, beside other clients: installs them into .bench, takes a quarter of an hour'
	@echo 'make fleet   two machines that share a PostgreSQL store: eight bots, two workers, one of them killed'
	@echo 'make lint    linters, formatter, packages that fit each other, type checker, direction of imports'
	@echo 'make wheel   build what a bot elsewhere installs, the library and the command, into dist/'
	@echo 'make docs    write what the pages show of alerts anew, from the code'
	@echo 'make pictures  take the pictures in docs/images anew, with Chromium, from a system started for it'
	@echo 'make pins    renew constraints.txt with the newest versions that pyproject.toml allows'
	@echo 'make clean   remove what make, the tests and the tools have built here'

demo: .venv/.flows
	@$(RUN) flows.stack demo $(ARGS)

up status test-alert: .venv/.flows
	@$(RUN) flows.stack $@

# What runs must be stoppable even if what the new version needs cannot be installed.
down:
	@$(MAKE) --silent .venv/.flows || true
	@$(RUN) flows.stack $@

test: .venv/.dev
	@$(RUN) pytest $(ARGS)

# KRX's session, New York's, a Saturday, a holiday (Chuseok), New Year's Eve, the night when New York's clocks go back.
MOMENTS := 2026-11-24T02:00Z 2026-11-24T15:00Z 2026-11-28T03:00Z 2026-09-25T02:00Z 2026-12-31T14:55Z 2026-11-01T05:30Z

hours: .venv/.dev
	@for moment in $(MOMENTS); do echo "At $$moment:"; $(RUN) pytest --at=$$moment -q -rfE $(ARGS) || exit 1; done

# The same as in `test`, with as many processes as a big bot has.
clients: .venv/.dev
	@TOKENCORE_CLIENTS=all $(RUN) pytest tests/test_clients.py $(ARGS)

torture: .venv/.dev
	@TORTURE=1 $(RUN) pytest $(or $(ARGS),\
		tests/test_faults.py tests/test_fleet.py tests/test_model.py tests/test_planted.py tests/test_secrets.py)

# Beside other clients, which are installed for nothing else; tokencore as a user has it, not as a checkout.
bench: .venv/.dev .bench/.clients
	@.bench/bin/python -m pip install --quiet --quiet --no-deps --force-reinstall . && rm -rf build
	@failed=0; for program in cached_token processes stampede files week; do \
		.bench/bin/python benchmarks/$$program.py || failed=1; done; \
	for program in auth fleet metrics prefect_run; do .venv/bin/python benchmarks/$$program.py || failed=1; done; exit $$failed

.bench/.clients: benchmarks/requirements.txt pyproject.toml constraints.txt
	@echo 'Installing into .bench (half a minute) ...'
	@$(PYTHON) -m venv --clear .bench
	@.bench/bin/python -m pip install --quiet --quiet --disable-pip-version-check 'pip>=25'
	@.bench/bin/python -m pip install --quiet --quiet --constraint constraints.txt . -r benchmarks/requirements.txt
	@touch $@

# Needs a server's programs, as in Debian's package postgresql; takes three minutes, and ends with a table.
fleet: .venv/.dev
	@TOKENCORE_FLEET=1 $(RUN) pytest --numprocesses=0 tests/test_fleet_flows.py $(ARGS)

lint: .venv/.dev
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) bandit --quiet --configfile pyproject.toml --recursive tokencore flows
	@$(RUN) pip check
	@$(RUN) mypy
	@$(RUN) mypy --platform darwin --cache-dir .mypy_cache/darwin tokencore flows
	@$(RUN) mypy --platform win32 --cache-dir .mypy_cache/win32 tokencore
	@.venv/bin/lint-imports --no-cache

# A virtual environment knows the absolute path of this folder: one that was moved or copied here is made anew.
ifneq ($(shell cat .venv/.place 2>/dev/null),$(CURDIR))
.PHONY: .venv/.flows
CLEAR := --clear
endif

# Byte-code is compiled here, once, by all cores: where PYTHONDONTWRITEBYTECODE is set (images, servers), each of Prefect's
# processes would otherwise compile all of it again, which doubles every start. A pip older than 25 would write commands
# that import `re` before anything else, which costs a cached `tokencore get` 5 ms of 13. A package may hold a file for a
# newer Python that this one cannot compile: it is not imported either.
.venv/.flows: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed; name one, such as: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }
	@echo 'Installing into .venv (about a minute) ...'
	@$(PYTHON) -m venv $(CLEAR) .venv
	@$(PIP) 'pip>=25'
	@$(PIP) --no-compile --editable '.[flows]'
	@$(RUN) compileall -qq -j 0 .venv/lib tokencore flows || true
	@printf '%s\n' "$(CURDIR)" > .venv/.place
	@touch $@

.venv/.dev: .venv/.flows
	@echo 'Installing what the tests and linters need ...'
	@$(PIP) --editable '.[flows,dev]'
	@touch $@

wheel: .venv/.flows
	@rm -rf dist
	@$(RUN) pip wheel --quiet --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@rm -rf build && ls dist/*

docs: .venv/.flows
	@.venv/bin/python docs/alerts.py

pictures: .venv/.dev
	@.venv/bin/python docs/pictures.py

# Two interpreters, because Prefect takes another library for dates from Python 3.13 on; and async-timeout by name,
# because only the Python 3.11 of some systems (Debian 12) is so old that redis needs it.
pins:
	@set -e; new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; touch "$$new/pins"; \
	for python in python3.11 python3.13; do \
		$$python -m venv "$$new/$$python"; \
		"$$new/$$python/bin/python" -m pip install --quiet --quiet --constraint "$$new/pins" '.[flows,dev]' async-timeout; \
		"$$new/$$python/bin/python" -m pip freeze --exclude tokencore >> "$$new/pins"; \
	done; \
	{ grep '^#' constraints.txt; sort --ignore-case --unique "$$new/pins"; } > "$$new/constraints.txt"; \
	cp "$$new/constraints.txt" constraints.txt

clean:
	@rm -rf .venv .bench build dist ./*.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
