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
	while IFS=$$'\t' read -r target what; do printf '  %-8s %s\n' "$$target" "$$what"; done

.PHONY: demo
demo: needs-go ## watch a real Vault rotate a real Redis, in half a minute
	@scripts/ensure-packages.sh redis-server || true
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && export HARMONYFLOW_VAULT && go run ./scripts/demo

.PHONY: dev
dev: needs-go ## the same servers, left running to play with
	@scripts/ensure-packages.sh redis-server || true
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && export HARMONYFLOW_VAULT && \
	go build -o bin/demo ./scripts/demo && exec bin/demo -dev

.PHONY: test
test: needs-go needs-packages ## all tests: unit, fault injection, real Redis, real PostgreSQL, real Vault
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && export HARMONYFLOW_VAULT CGO_ENABLED=1 && \
	FAULT_POINTS_FILE=$$(mktemp) YEAR_FILE=$$(mktemp) SECRETS_FILE=$$(mktemp) && export FAULT_POINTS_FILE YEAR_FILE SECRETS_FILE && \
	trap 'rm -f "$$FAULT_POINTS_FILE" "$$YEAR_FILE" "$$SECRETS_FILE"' EXIT && \
	packages=$$(go list ./... | grep -v '/test/proof$$') && \
	go test -race -shuffle=on -timeout=$(TEST_TIMEOUT) $(TESTFLAGS) $$packages && \
	go test -shuffle=on -timeout=$(TEST_TIMEOUT) $(TESTFLAGS) ./backend/rotation ./backend/schedule && \
	cat "$$FAULT_POINTS_FILE" "$$YEAR_FILE" "$$SECRETS_FILE" && \
	go test -race -shuffle=on -timeout=$(TEST_TIMEOUT) $(TESTFLAGS) -v ./test/proof

.PHONY: e2e
e2e: needs-go needs-packages ## the scripted scenarios of test/e2e/testdata, with a Vault that has everything (RUN=name for one), and Kubernetes operators (RUN=operators), and clusters, with deliveries to them (RUN=kube)
	@HARMONYFLOW_VAULT=$$(scripts/ensure-vault.sh) && HARMONYFLOW_VAULT_FULL=$$(scripts/ensure-vault-full.sh) && \
	HARMONYFLOW_OPERATORS=$$(scripts/ensure-operators.sh) && export HARMONYFLOW_VAULT HARMONYFLOW_VAULT_FULL HARMONYFLOW_OPERATORS && \
	HARMONYFLOW_KUBE=$$(scripts/ensure-kube.sh) && HARMONYFLOW_ESO=$$(scripts/ensure-eso.sh) && export HARMONYFLOW_KUBE HARMONYFLOW_ESO && \
	CGO_ENABLED=1 go test -race -p=1 -count=1 -timeout=$(TEST_TIMEOUT) $(TESTFLAGS) \
		-run '$(if $(filter operators,$(RUN)),TestOperators,$(if $(filter kube,$(RUN)),TestKube|TestCluster|TestConsumers,TestScripts/$(RUN)$(if $(RUN),,|TestOperators|TestKube|TestCluster|TestConsumers)))' \
		$(if $(filter kube,$(RUN)),,./test/e2e) $(if $(filter-out kube,$(RUN)),,./test/kube ./backend/consumer ./test/consumers)

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
lint: needs-go ## go vet, golangci-lint (gofumpt included), govulncheck
	go vet ./...
	@lint=$$(scripts/ensure-tool.sh github.com/golangci/golangci-lint/v2/cmd/golangci-lint $(GOLANGCI_LINT_VERSION)) && \
	echo golangci-lint run && "$$lint" run
	@scripts/vulncheck.sh $(GOVULNCHECK_VERSION)

.PHONY: fmt
fmt: needs-go ## gofumpt and import order
	@lint=$$(scripts/ensure-tool.sh github.com/golangci/golangci-lint/v2/cmd/golangci-lint $(GOLANGCI_LINT_VERSION)) && "$$lint" fmt

.PHONY: plugin
plugin: needs-go ## the plugin for this machine, into bin/
	$(GOBUILD) -o bin/$(PLUGIN) ./cmd/$(PLUGIN)

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
