# `make` lists what there is.
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null)
COMMIT  := $(shell git rev-parse HEAD 2>/dev/null)
DATE    := $(shell date -u +%Y-%m-%dT%H:%M:%SZ)
LDFLAGS := -s -w -X main.buildVersion=$(VERSION) -X main.buildCommit=$(COMMIT) -X main.buildDate=$(DATE)

# How long the soak lasts; the rest of the test takes up to two minutes more.
SOAK         ?= 10m
SOAK_TIMEOUT ?= 30m

# Flags for the comparison, such as -quick.
BENCH ?=

.PHONY: help build test soak bench fmt lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build the static binary ./qwen-go-proxy
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o qwen-go-proxy .

test: ## run the tests
	go test ./...

soak: ## run the program amid faults for SOAK (10m), and check every outcome
	QWEN_SOAK=$(SOAK) go test -count=1 -timeout $(SOAK_TIMEOUT) -run '^TestSoak$$' -v .

bench: ## compare with other proxies, on Linux; BENCH=-quick takes a minute, BENCH=-h tells more
	cd bench && go run . $(BENCH)

fmt: ## format the code
	gofmt -w .

lint: ## check format, vet and staticcheck
	@test -z "$$(gofmt -l .)" || { gofmt -l .; exit 1; }
	go vet ./...
	go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...

clean: ## remove what build made
	rm -f qwen-go-proxy
