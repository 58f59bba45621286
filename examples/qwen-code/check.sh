#!/usr/bin/env bash
# Runs qwen-go-proxy beside the real token manager of Qwen Code on one directory, against a stand-in for Qwen: two
# minutes. It needs Go, Node and npm. QWEN_CODE_TOKEN_LIFE (35s at least) and QWEN_CODE_DURATION change how long.
set -euo pipefail
cd "$(dirname "$0")/../.."

version=${QWEN_CODE_VERSION:-0.24.4}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
npm pack --silent --pack-destination "$dir" "@qwen-code/qwen-code@$version" >/dev/null
tar -xzf "$dir"/*.tgz -C "$dir"
QWEN_CODE_DIR=$dir/package go test -count=1 -timeout 30m -run '^TestBesideQwenCode$' -v ./e2e
