# make demo, make test: see the README. Everything else is for those who work on the collection.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/.collections
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg

.PHONY: setup demo demo-clean watched-demo test test-all gates molecule fep-hosts bench docs

setup:
	@.ci/setup

demo: setup
	ansible-playbook -i localhost, playbooks/demo.yml

demo-clean: setup
	ansible-playbook -i localhost, playbooks/demo_clean.yml

watched-demo: setup
	python tests/tools/watch_secrets.py --secrets /var/lib/hsm-tde-demo/secrets \
	    --look /var/lib/hsm-tde-demo --look /tmp --look /var/tmp --look /var/log --look $(HOME)/.ansible -- \
	    ansible-playbook -vvv -i localhost, playbooks/demo.yml

SCENARIOS ?= default mariadb pg_tde oracle packaged fep

molecule: setup
	@for scenario in $(SCENARIOS); do molecule test --scenario-name $$scenario || exit 1; done

SUITE ?= trixie

fep-hosts: setup
	@python tests/hosts/fep.py --suite $(SUITE)

test: setup
	@.ci/test

test-all: setup
	@.ci/test --all

gates: setup
	@.ci/gates

bench: setup
	@failed=0; for script in keys site pgbench; do python tests/bench/$$script.py || failed=1; done; exit $$failed

docs: setup
	python tests/tools/gen_error_codes.py
