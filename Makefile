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

# Much of it waits (for servers, and for time that must pass), so that more packages run
# at once than there are cores. What takes longest begins first. What only computes
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
	go test -race -shuffle=on -p=3 -parallel=4 -timeout=$(TEST_TIMEOUT) $(TESTFLAGS) ./test/proof ./test/e2e ./...

# Without the race detector every fault point and the whole year are tried.
.PHONY: test-all
test-all:
	@go test -shuffle=on -timeout=$(TEST_TIMEOUT) $(TESTFLAGS) ./backend/rotation ./backend/schedule

# RUN is a part of the scenarios (scripts, operators, kube), or one script; nothing is all.
E2E_KUBE := $(if $(RUN),$(filter kube,$(RUN)),kube)
E2E_VAULT := $(if $(filter kube,$(RUN)),,vault)
E2E_TESTS := $(if $(E2E_KUBE),,$(if $(filter scripts,$(RUN)),TestScripts,$(if $(filter operators,$(RUN)),TestOperators,TestScripts/$(RUN))))

.PHONY: e2e
e2e: needs-go needs-packages ## scenarios from end to end: scripts on a Vault that has everything, Kubernetes operators, clusters (RUN=scripts, operators or kube for a part, RUN=name for one script)
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && export HARMONYFLOW_VAULT && \
	$(if $(E2E_VAULT),HARMONYFLOW_VAULT_FULL=$$(scripts/ensure-vault-full.sh) && HARMONYFLOW_OPERATORS=$$(scripts/ensure-operators.sh) && \
	export HARMONYFLOW_VAULT_FULL HARMONYFLOW_OPERATORS &&) \
	$(if $(E2E_KUBE),HARMONYFLOW_KUBE=$$(scripts/ensure-kube.sh) && HARMONYFLOW_ESO=$$(scripts/ensure-eso.sh) && \
	export HARMONYFLOW_KUBE HARMONYFLOW_ESO &&) \
	figures=$$(mktemp -d) && touch "$$figures/0" && trap 'rm -rf "$$figures"' EXIT && \
	export SECRETS_FILE=$$figures/1 CONSUMERS_FILE=$$figures/2 && \
	CGO_ENABLED=1 go test -race -p=1 -count=1 -timeout=$(TEST_TIMEOUT) $(TESTFLAGS) \
		$(if $(E2E_TESTS),-run '$(E2E_TESTS)',-skip TestREADMEShowsTheDemo) \
		$(if $(E2E_VAULT),./test/e2e) $(if $(E2E_KUBE),./test/kube ./backend/consumer ./test/consumers ./scripts/demo) && \
	cat "$$figures"/*

.PHONY: needs-go
needs-go:
	@scripts/ensure-go.sh

.PHONY: needs-packages
needs-packages:
	@scripts/ensure-packages.sh $(TEST_PACKAGES)

.PHONY: fuzz
fuzz: needs-go ## every fuzz target for FUZZTIME (30s)
	@go test -list '^Fuzz' ./... | awk '/^Fuzz/ {f[++n]=$$1} /^ok/ {for (i=1;i<=n;i++) print $$2, f[i]; n=0}' | \
	while read -r package target; do go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) "$$package" </dev/null; done

.PHONY: model
model: ## check the state machine with spin
	@scripts/ensure-packages.sh spin gcc libc6-dev=/usr/include/stdlib.h
	@docs/model/check.sh

.PHONY: lint
lint: needs-go ## go vet, golangci-lint (gofumpt included), govulncheck, Prometheus's parser for deploy/monitoring
	go vet ./...
	@lint=$$(scripts/ensure-tool.sh github.com/golangci/golangci-lint/v2/cmd/golangci-lint $(GOLANGCI_LINT_VERSION)) && \
	echo golangci-lint run && "$$lint" run
	@scripts/vulncheck.sh $(GOVULNCHECK_VERSION)
	@GOFLAGS=-mod=readonly go -C test/tools/promtool run . $(CURDIR)/deploy/monitoring/alerts.yaml $(CURDIR)/deploy/monitoring/dashboard.json

.PHONY: fmt
fmt: needs-go ## gofumpt and import order
	@lint=$$(scripts/ensure-tool.sh github.com/golangci/golangci-lint/v2/cmd/golangci-lint $(GOLANGCI_LINT_VERSION)) && "$$lint" fmt

.PHONY: plugin
plugin: needs-go ## the plugin for this machine, into bin/
	$(GOBUILD) -o bin/$(PLUGIN) ./cmd/$(PLUGIN)

.PHONY: follower
follower: needs-go ## the command that follows rotations, into bin/
	$(GOBUILD) -o bin/harmonyflow ./cmd/harmonyflow

.PHONY: build
build: needs-go ## the plugin for linux and darwin on amd64 and arm64, into dist/, with SHA256SUMS
	@rm -rf dist && mkdir -p dist
	@for platform in $(PLATFORMS); do \
		out=dist/$(PLUGIN)_$(VERSION)_$${platform/\//_}; echo "$$out"; \
		GOOS=$${platform%/*} GOARCH=$${platform#*/} $(GOBUILD) -o "$$out" ./cmd/$(PLUGIN); \
	done
	@cd dist && if command -v sha256sum >/dev/null; then sha256sum *_*_*; else shasum -a 256 *_*_*; fi >SHA256SUMS

.PHONY: clean
clean: ## remove bin/ and dist/ (the builds in the user's cache stay)
	rm -rf bin dist
