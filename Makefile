# Every target needs Go, git and make, and apt where a Debian package is missing.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

MODULE := github.com/harmonyflow/vault-plugin-secrets-harmonyflow
PLUGIN := vault-plugin-secrets-harmonyflow
# Vault takes only semantic versions: the tag that is checked out, or this.
VERSION ?= $(or $(shell git describe --tags --exact-match --match 'v[0-9]*' 2>/dev/null),v0.1.0-dev)
LDFLAGS := -s -w -X $(MODULE)/backend/buildinfo.Version=$(VERSION)
GOBUILD := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "$(LDFLAGS)"
PLATFORMS := linux/amd64 linux/arm64 darwin/amd64 darwin/arm64

GOLANGCI_LINT_VERSION := v2.15.0
GOVULNCHECK_VERSION := v1.9.0

# What tests start: Redis, PostgreSQL and RabbitMQ themselves, and a C compiler for the race detector.
TEST_PACKAGES := redis-server postgresql rabbitmq-server gcc libc6-dev=/usr/include/stdlib.h
TEST_TIMEOUT ?= 30m
COMPAT_TIMEOUT ?= 5h
TESTFLAGS ?=
FUZZTIME ?= 30s

.PHONY: help
help: ## show this
	@echo "usage: make TARGET"; echo; \
	grep -hE '^[a-z][a-z0-9-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
	while IFS=$$'\t' read -r target what; do printf '  %-9s %s\n' "$$target" "$$what"; done

.PHONY: demo
demo: needs-go ## watch a real Vault rotate a real Redis, in half a minute
	@scripts/ensure-packages.sh redis-server || true
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && export HARMONYFLOW_VAULT && go run ./scripts/demo

.PHONY: demo-k8s
demo-k8s: needs-go ## watch a rotation reach the pods of a real Kubernetes, and go back where they crash, in two minutes
	@scripts/ensure-packages.sh redis-server
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && HARMONYFLOW_KUBE=$$(scripts/ensure-kube.sh) && \
	HARMONYFLOW_ESO=$$(scripts/ensure-eso.sh) && export HARMONYFLOW_VAULT HARMONYFLOW_KUBE HARMONYFLOW_ESO && \
	go run ./scripts/demo -k8s

.PHONY: dev
dev: needs-go ## the same servers, left running to play with
	@scripts/ensure-packages.sh redis-server || true
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && export HARMONYFLOW_VAULT && \
	go build -o bin/demo ./scripts/demo && exec bin/demo -dev

# Much of it waits (for servers, and for time that must pass), so that as many packages run
# at once as there are cores, and four tests in each. What takes longest begins first. What only computes
# comes after it: servers that have to wait for a core are slow ones to the engine.
.PHONY: test
test: needs-go needs-packages ## all tests: unit, fault injection, real Redis, PostgreSQL, RabbitMQ and Vault
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && export HARMONYFLOW_VAULT && \
	figures=$$(mktemp -d) && touch "$$figures/0" && trap 'rm -rf "$$figures"' EXIT && \
	export FAULT_POINTS_FILE=$$figures/1 YEAR_FILE=$$figures/2 SECRETS_FILE=$$figures/3 PROOF_FILE=$$figures/4 && \
	$(MAKE) --no-print-directory test-race test-all && cat "$$figures"/*

.PHONY: test-race
test-race:
	@FAULT_POINTS_FILE="" CGO_ENABLED=1 \
	go test -race -shuffle=on -p=2 -parallel=4 -timeout=$(TEST_TIMEOUT) $(TESTFLAGS) ./test/proof ./test/e2e ./...

# Without the race detector every fault point and the whole year are tried, and what
# fuzzing begins with.
.PHONY: test-all
test-all:
	@go test -shuffle=on -timeout=$(TEST_TIMEOUT) $(TESTFLAGS) ./backend/rotation ./backend/schedule
	@go test -run '^(Fuzz|TestStored)' -timeout=$(TEST_TIMEOUT) .

# RUN is a part of the scenarios (scripts, operators, kube, ha, tofu), or one script; nothing is all but tofu.
E2E_KUBE := $(if $(RUN),$(filter kube,$(RUN)),kube)
E2E_TOFU := $(filter tofu,$(RUN))
E2E_HA := $(if $(RUN),$(filter ha,$(RUN)),ha)
E2E_VAULT := $(if $(filter kube tofu ha,$(RUN)),,vault)
E2E_TESTS := $(if $(RUN),$(if $(filter scripts,$(RUN)),TestScripts,$(if $(filter operators,$(RUN)),TestOperators,$(if $(filter tofu,$(RUN)),TestTofu,$(if $(filter kube ha,$(RUN)),,TestScripts/$(RUN))))))

.PHONY: e2e
e2e: needs-go needs-packages ## scenarios from end to end: scripts on a Vault that has everything, Kubernetes operators, clusters, failing Vault nodes (RUN=scripts, operators, kube or ha for a part, RUN=tofu for OpenTofu, which is no part of it, RUN=name for one script)
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && export HARMONYFLOW_VAULT && \
	$(if $(E2E_VAULT),HARMONYFLOW_VAULT_FULL=$$(scripts/ensure-vault-full.sh) && HARMONYFLOW_OPERATORS=$$(scripts/ensure-operators.sh) && \
	export HARMONYFLOW_VAULT_FULL HARMONYFLOW_OPERATORS &&) \
	$(if $(E2E_KUBE),HARMONYFLOW_KUBE=$$(scripts/ensure-kube.sh) && HARMONYFLOW_ESO=$$(scripts/ensure-eso.sh) && \
	export HARMONYFLOW_KUBE HARMONYFLOW_ESO &&) \
	$(if $(E2E_TOFU),HARMONYFLOW_TOFU=$$(scripts/ensure-tofu.sh) && export HARMONYFLOW_TOFU &&) \
	figures=$$(mktemp -d) && touch "$$figures/0" && trap 'rm -rf "$$figures"' EXIT && \
	export SECRETS_FILE=$$figures/1 CONSUMERS_FILE=$$figures/2 HA_FILE=$$figures/3 SOAK_EVENTS=10 && \
	CGO_ENABLED=1 go test -race -p=1 -count=1 -timeout=$(TEST_TIMEOUT) $(TESTFLAGS) \
		$(if $(E2E_TESTS),-run '$(E2E_TESTS)',-skip TestREADMEShowsTheDemo) \
		$(if $(E2E_VAULT)$(E2E_TOFU),./test/e2e) $(if $(E2E_KUBE),./test/kube ./backend/consumer ./test/consumers ./scripts/demo) $(if $(E2E_HA),./test/ha) && \
	cat "$$figures"/*

# How much of which script is played: the same seed is the same events.
SOAK_EVENTS ?= 120
SOAK_MINUTES ?= 60
SOAK_SEED ?=

.PHONY: soak
soak: needs-go needs-packages ## Vault nodes that fail while everything rotates: SOAK_EVENTS (120) events, or SOAK_MINUTES (60) of them; SOAK_SEED plays a script again
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && export HARMONYFLOW_VAULT && \
	SOAK_EVENTS=$(SOAK_EVENTS) SOAK_MINUTES=$(SOAK_MINUTES) SOAK_SEED=$(SOAK_SEED) \
	go test -v -count=1 -timeout=$$(($(SOAK_MINUTES) + 30))m -run '^TestHighAvailability$$' $(TESTFLAGS) ./test/ha

.PHONY: needs-go
needs-go:
	@scripts/ensure-go.sh

.PHONY: needs-packages
needs-packages:
	@scripts/ensure-packages.sh $(TEST_PACKAGES)

# BENCH is a part of the benchmarks; nothing is all. SMALL=1 shows that they work, and
# changes no document.
BENCH_ALL := $(if $(BENCH),$(BENCH),reads rotations scale restarts latency)
BENCH_FULL := $(filter rotations latency,$(BENCH_ALL))
BENCH_KUBE := $(filter restarts,$(BENCH_ALL))

.PHONY: bench
bench: needs-go needs-packages ## benchmarks beside Vault's own engines, into docs/benchmarks.md (BENCH=reads, rotations, scale, restarts or latency for a part; SMALL=1 shows that they work)
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && HARMONYFLOW_KV=$$(scripts/ensure-bench.sh kv) && HARMONYFLOW_PLOT=$$(scripts/ensure-bench.sh plot) && \
	export HARMONYFLOW_VAULT HARMONYFLOW_KV HARMONYFLOW_PLOT && \
	$(if $(BENCH_FULL),HARMONYFLOW_VAULT_FULL=$$(scripts/ensure-vault-full.sh) && export HARMONYFLOW_VAULT_FULL &&) \
	$(if $(BENCH_KUBE),HARMONYFLOW_KUBE=$$(scripts/ensure-kube.sh) && HARMONYFLOW_ESO=$$(scripts/ensure-eso.sh) && export HARMONYFLOW_KUBE HARMONYFLOW_ESO &&) \
	go run ./test/bench $(if $(BENCH),-only $(BENCH)) $(if $(SMALL),-small,-document docs/benchmarks.md)

# CELL is a part of the matrix, by what the names of its cells hold; nothing is all.
CELL ?=

.PHONY: compat
compat: needs-go ## the life of a secret on each Vault, sdk and kind of Redis of a matrix, into docs/compatibility.md (CELL=sdk-0.17 or ACL for a part)
	@scripts/ensure-packages.sh redis-server
	@COMPAT=1 go test -v -count=1 -timeout=$(COMPAT_TIMEOUT) -run '^TestMatrix$$$(if $(CELL),/$(CELL))' $(TESTFLAGS) ./test/compat

.PHONY: faults
faults: needs-go ## what faults at each operation do to Vault's database engine, into docs/faults.md
	@scripts/ensure-packages.sh redis-server
	@GOFLAGS=-mod=readonly go -C test/tools/database run -tags minimal . -document $(CURDIR)/docs/faults.md

# FUZZ is a part of the targets, by their names.
FUZZ ?= .

.PHONY: fuzz
fuzz: needs-go ## every fuzz target for FUZZTIME (30s), and how often each was executed (FUZZ=name for a part)
	@scripts/fuzz.sh "$(FUZZTIME)" "$(FUZZ)"

.PHONY: model
model: ## check the state machine with spin
	@scripts/ensure-packages.sh spin gcc libc6-dev=/usr/include/stdlib.h
	@docs/model/check.sh

.PHONY: lint
lint: needs-go ## go vet, golangci-lint (gofumpt included), govulncheck, Prometheus's parser for deploy/monitoring, BuildKit's for deploy/image
	go vet ./...
	@lint=$$(scripts/ensure-tool.sh github.com/golangci/golangci-lint/v2/cmd/golangci-lint $(GOLANGCI_LINT_VERSION)) && \
	echo golangci-lint run && "$$lint" run
	@scripts/vulncheck.sh $(GOVULNCHECK_VERSION)
	@GOFLAGS=-mod=readonly go -C test/tools/promtool run . $(CURDIR)/deploy/monitoring/alerts.yaml $(CURDIR)/deploy/monitoring/dashboard.json
	@GOFLAGS=-mod=readonly go -C test/tools/dockerfile run . $(CURDIR)/deploy/image/Dockerfile

.PHONY: docs
docs: needs-go ## what is generated in docs/: the API and the state machine
	@go test -count=1 -run '^(TestReference|TestStateMachine)$$' . -update

.PHONY: fmt
fmt: needs-go ## gofumpt and import order
	@lint=$$(scripts/ensure-tool.sh github.com/golangci/golangci-lint/v2/cmd/golangci-lint $(GOLANGCI_LINT_VERSION)) && "$$lint" fmt

.PHONY: plugin
plugin: needs-go ## the plugin for this machine, into bin/
	$(GOBUILD) -o bin/$(PLUGIN) ./cmd/$(PLUGIN)

.PHONY: follower
follower: needs-go ## the command that follows rotations, into bin/
	$(GOBUILD) -o bin/harmonyflow ./cmd/harmonyflow

.PHONY: release
release: needs-go ## archives for linux and darwin on amd64 and arm64, into dist/, with SHA256SUMS and SBOMs; of what is committed: the same commit gives the same bytes
	@go run ./scripts/release -version "$(VERSION)" -platforms "$(PLATFORMS)"

.PHONY: clean
clean: ## remove bin/ and dist/ (the builds in the user's cache stay)
	rm -rf bin dist
