# `make` lists the targets.
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null)
COMMIT  := $(shell git rev-parse HEAD 2>/dev/null)
# The commit's time, not the clock's: the same commit built twice is the same file.
DATE    := $(shell TZ=UTC git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ 2>/dev/null)
LDFLAGS := -s -w -X main.buildVersion=$(VERSION) -X main.buildCommit=$(COMMIT) -X main.buildDate=$(DATE)
GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'

# The platforms of a release, as in .goreleaser.yaml.
PLATFORMS := linux-amd64 linux-arm64 linux-arm darwin-amd64 darwin-arm64 windows-amd64.exe windows-arm64.exe \
	freebsd-amd64 freebsd-arm64 openbsd-amd64 openbsd-arm64

# How long the soak runs. The test takes up to two minutes more.
SOAK         ?= 10m
SOAK_TIMEOUT ?= 30m

# Flags for the bench, such as -quick.
BENCH ?=

# The release workflow uses the same version.
GORELEASER := github.com/goreleaser/goreleaser/v2@v2.16.0
IMAGE      ?= qwen-go-proxy

.PHONY: help build build-all test test-coverage soak bench fmt lint clean \
	docker-build docker-run release-dry-run release-check install-goreleaser

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build the static binary ./qwen-go-proxy
	$(GOBUILD) -o qwen-go-proxy .

build-all: $(PLATFORMS:%=dist/qwen-go-proxy-%) ## build the binaries of all platforms into dist/

# FORCE makes these targets run every time: go knows better than make what is out of date.
dist/qwen-go-proxy-%: FORCE
	GOOS=$(word 1,$(subst -, ,$*)) GOARCH=$(basename $(word 2,$(subst -, ,$*))) GOARM=7 $(GOBUILD) -o $@ .

FORCE:

test: ## run the tests
	go test ./...

test-coverage: ## run the tests and show their coverage
	go test -coverprofile=coverage.out ./...
	@go tool cover -func=coverage.out | tail -n 1

soak: ## run the program amid faults for SOAK (10m), and check every outcome
	QWEN_SOAK=$(SOAK) go test -count=1 -timeout $(SOAK_TIMEOUT) -run '^TestSoak$$' -v ./e2e

bench: ## compare with other proxies (Linux); BENCH=-quick takes a minute, BENCH=-h lists the flags
	cd bench && go run . $(BENCH)

fmt: ## format the code
	gofmt -w .

lint: ## check format, vet and staticcheck
	@test -z "$$(gofmt -l .)" || { gofmt -l .; exit 1; }
	go vet ./...
	go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...

clean: ## remove what the other targets made
	rm -rf qwen-go-proxy qwen-go-proxy.exe dist coverage.out

docker-build: ## build the image IMAGE (qwen-go-proxy)
	docker build --build-arg VERSION=$(VERSION) --build-arg COMMIT=$(COMMIT) --build-arg DATE=$(DATE) -t $(IMAGE) .

docker-run: ## run the image on 127.0.0.1:8080, with .env if there is one
	docker run --rm -it -p 127.0.0.1:8080:8080 -v qwen-go-proxy:/data $(if $(wildcard .env),--env-file .env) $(IMAGE)

release-dry-run: ## make the archives and checksums of a release in dist/; publish nothing
	go run $(GORELEASER) release --snapshot --clean --skip=docker,sbom

release-check: ## check .goreleaser.yaml
	go run $(GORELEASER) check

install-goreleaser: ## install the GoReleaser that the two targets above run
	go install $(GORELEASER)
