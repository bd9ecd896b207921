# make demo     install and run the main job in one process, no servers      (TASK=mnist with FEDMQ_DATA set)
# make test     install what the tests need - servers too - and run them all
# make check    what CI runs: lint, types, tests
# make bench    the tables of the README
#
# make up       start the servers of docker-compose.yml; make up DEMO=1 with workers; make down stops them, data stay
# make secrets  make the secrets that are missing, renew certificates that end soon; `make up` does it too
# make renew    the same, and restart what serves with them
# make roll     restart the aggregators one after the other: updates go on being applied
# make device NAME=phone   enrol a device and put its file here: phone.toml, mode 0600; make rotate NAME=phone a new one
# make password            of Grafana's login admin

PYTHON ?= python3
TASK ?= digits
BIN := .venv/bin
VENV := .venv/installed

COMPOSE := $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

.PHONY: demo test check lint bench servers clean up down secrets renew roll device rotate password

demo: $(VENV)
	$(BIN)/fedmq demo --task $(TASK)

test: $(VENV) servers
	$(BIN)/python -m pytest

check: lint test

lint: $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV) servers
	$(BIN)/fedmq bench

up:
	$(if $(DEMO),COMPOSE_PROFILES=demo) $(COMPOSE) up -d --build

down:
	COMPOSE_PROFILES=demo,port443,tools $(COMPOSE) down

secrets:
	$(COMPOSE) run --rm secrets

renew: secrets
	$(COMPOSE) restart rabbitmq redis evaluator exporter redis-exporter prometheus grafana
	@bash ops/docker/roll $(COMPOSE)
	@bash ops/docker/renew-workers $(COMPOSE)

roll:
	@bash ops/docker/roll $(COMPOSE)

device:
	@test -n "$(NAME)" || { echo "make device NAME=..."; exit 2; }
	@test ! -e "$(NAME).toml" || { echo "$(NAME).toml exists: move it away first"; exit 2; }
	@(umask 077; $(COMPOSE) run --rm -T operator fedmq devices enroll $(NAME) --out - >$(NAME).toml || { rm -f $(NAME).toml; exit 1; })
	@echo "$(NAME).toml is all that the device needs: bring it there by a safe way, then remove it here"

rotate:
	@test -n "$(NAME)" || { echo "make rotate NAME=..."; exit 2; }
	@(umask 077; $(COMPOSE) run --rm -T operator fedmq devices rotate $(NAME) --out - >$(NAME).toml.new && mv $(NAME).toml.new $(NAME).toml || { rm -f $(NAME).toml.new; exit 1; })
	@echo "$(NAME).toml is new, the old one is of no use any more: bring it to the device by a safe way, then remove it here"

password:
	@$(COMPOSE) exec -T grafana cat /run/fedmq/admin_password; echo

servers:
	@bash ops/install_servers.sh

$(VENV): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FedMQ needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(VENV)

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
