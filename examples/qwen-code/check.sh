#!/usr/bin/env bash
# Runs qwen-go-proxy and the real token manager of Qwen Code in one directory for two minutes, against a stand-in for Qwen.
# It needs Go, Node 20 and npm. QWEN_CODE_DURATION (2m) sets the time, QWEN_CODE_TOKEN_LIFE (1m, at least 35s) a token's life.
set -euo pipefail
cd "$(dirname "$0")/../.."

version=${QWEN_CODE_VERSION:-0.24.4}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
npm pack --silent --pack-destination "$dir" "@qwen-code/qwen-code@$version" >/dev/null
tar -xzf "$dir"/*.tgz -C "$dir"
QWEN_CODE_DIR=$dir/package go test -count=1 -timeout 30m -run '^TestBesideQwenCode$' -v ./e2e
