#!/usr/bin/env bash
# Runs coding agents against `qwen-go-proxy demo`. Codex and Claude Code need more than chat: they run against qwen-go-proxy
# with an API key for the stand-in in e2e. Each agent gets a prompt. The stand-in answers with a streamed tool call, the agent
# sends the tool's result, and the stand-in answers that. Telemetry and updates of the agents are off.
#
# The script needs Go, curl, npm and Node 22. It installs the agents into the given directory and prints a line for each. To
# run only some agents, name them after the directory.
set -uo pipefail

usage="usage: $0 directory [qwen-code|opencode|cline|continue|codex|claude-code]..."
dir=${1:?$usage}
shift
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$(dirname "$0")/../.." || exit 1

agents=("$@")
[ $# -gt 0 ] || agents=(qwen-code opencode cline continue codex claude-code)
declare -A packages=(
  [qwen-code]=@qwen-code/qwen-code@0.24.4 [opencode]=opencode-ai@1.18.33 [cline]=cline@3.0.65
  [continue]=@continuedev/cli@1.5.47 [codex]=@openai/codex@0.169.0 [claude-code]=@anthropic-ai/claude-code@2.1.330
)
for agent in "${agents[@]}"; do
  [ -n "${packages[$agent]:-}" ] || { echo "$usage" >&2; exit 2; }
done

run=$(mktemp -d)
pids=()
stop() {
  [ ${#pids[@]} = 0 ] || { kill "${pids[@]}"; wait "${pids[@]}"; }
  pids=()
}
trap 'stop; rm -rf "$run"' EXIT
trap 'exit 1' INT TERM

# start COMMAND [VARIABLE=VALUE]... runs the proxy and sets url.
start() {
  env "${@:2}" SERVER_HOST=127.0.0.1 SERVER_PORT=0 "$run/qwen-go-proxy" "$1" 2>"$run/proxy.log" &
  pids+=($!)
  url=
  for _ in $(seq 200); do
    url=$(sed -n 's/.*"msg":"listening".*"url":"\([^"]*\)".*/\1/p' "$run/proxy.log")
    [ -n "$url" ] && curl -fsS "$url/health/ready" >/dev/null 2>&1 && return # the demo's sign-in approves itself
    sleep 0.1
  done
  echo "the proxy is not ready: $(tail -n 1 "$run/proxy.log")" >&2
  exit 1
}

# start_with_key runs the proxy with an API key for the stand-in in e2e, which has /responses and /messages too.
start_with_key() {
  rm -f "$run/standin.url"
  "$run/standin" -key sk-test >"$run/standin.url" &
  pids+=($!)
  for _ in $(seq 100); do
    [ -s "$run/standin.url" ] && break
    sleep 0.1
  done
  start serve QWEN_API_KEY=sk-test API_BASE_URL="$(cat "$run/standin.url")/compatible-mode/v1"
}

# in_home [NAME=value]... COMMAND runs a command for at most five minutes, in its own home and working directory. Its
# environment is PATH, HOME and the given variables.
in_home() {
  (cd "$home/work" && exec timeout -k 5 300 env -i PATH="$PATH" HOME="$home" "$@" </dev/null >"$home/out" 2>&1)
}

# The recipes. The stand-in calls an agent's first tool, which may be a shell, with the prompt as its arguments.

qwen-code() {
  mkdir "$home/.qwen"
  cat >"$home/.qwen/settings.json" <<EOF
{
  "general": { "enableAutoUpdate": false },
  "privacy": { "usageStatisticsEnabled": false },
  "telemetry": { "enabled": false }
}
EOF
  in_home OPENAI_BASE_URL="$url/v1" OPENAI_API_KEY=any OPENAI_MODEL=qwen3-coder-plus "$bin/qwen" "$1"
}

opencode() {
  mkdir -p "$home/.config/opencode"
  cat >"$home/.config/opencode/opencode.json" <<EOF
{
  "\$schema": "https://opencode.ai/config.json",
  "autoupdate": false,
  "share": "disabled",
  "model": "qwen/qwen3-coder-plus",
  "provider": {
    "qwen": {
      "npm": "@ai-sdk/openai-compatible",
      "name": "Qwen",
      "options": { "baseURL": "$url/v1", "apiKey": "any" },
      "models": { "qwen3-coder-plus": {} }
    }
  }
}
EOF
  in_home OPENCODE_DISABLE_MODELS_FETCH=1 "$bin/opencode" run "$1"
}

cline() {
  in_home CLINE_NO_AUTO_UPDATE=1 "$bin/cline" auth -p openai-compatible -k any -b "$url/v1" -m qwen3-coder-plus || return
  in_home CLINE_NO_AUTO_UPDATE=1 "$bin/cline" --auto-approve false "$1"
}

continue_() {
  mkdir "$home/.continue"
  cat >"$home/.continue/config.yaml" <<EOF
name: Qwen
version: 0.0.1
schema: v1
models:
  - name: Qwen3 Coder Plus
    provider: openai
    model: qwen3-coder-plus
    apiBase: $url/v1
    apiKey: any
EOF
  in_home CONTINUE_TELEMETRY_ENABLED=0 "$bin/cn" --config "$home/.continue/config.yaml" -p "$1"
}

codex() {
  mkdir "$home/.codex"
  cat >"$home/.codex/config.toml" <<EOF
model = "qwen3-coder-plus"
model_provider = "qwen"
check_for_update_on_startup = false

[model_providers.qwen]
name = "Qwen"
base_url = "$url/v1"
env_key = "QWEN_PROXY_KEY"
wire_api = "responses"

[analytics]
enabled = false
EOF
  in_home QWEN_PROXY_KEY=any "$bin/codex" exec --skip-git-repo-check "$1"
}

claude-code() {
  in_home ANTHROPIC_BASE_URL="$url" ANTHROPIC_AUTH_TOKEN=any ANTHROPIC_MODEL=qwen3-coder-plus \
    ANTHROPIC_DEFAULT_HAIKU_MODEL=qwen3-coder-flash CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 "$bin/claude" -p --tools Read -- "$1"
}

go build -o "$run/" . ./e2e/standin || exit 1
failed=0
for agent in "${agents[@]}"; do
  bin=$dir/$agent/node_modules/.bin home=$run/$agent
  mkdir -p "$home/work" "$dir/$agent"
  name=${packages[$agent]%@*} version=${packages[$agent]##*@}
  grep -qs "\"version\": \"$version\"" "$dir/$agent/node_modules/$name/package.json" ||
    npm install --prefix "$dir/$agent" --no-audit --no-fund --silent "$name@$version" >"$home/out" 2>&1 || {
    echo "FAIL $agent: ${packages[$agent]} can't be installed"
    cat "$home/out"
    failed=1
    continue
  }
  case $agent in
    codex | claude-code) start_with_key ;;
    *) start demo ;;
  esac
  run_agent=$agent
  [ "$agent" != continue ] || run_agent=continue_ # continue is a word of the shell
  began=$SECONDS
  "$run_agent" 'Say hello'
  status=$?
  for pid in $(pgrep -f -- "$home/"); do kill "$pid" 2>/dev/null; done # Cline leaves a daemon
  calls=$(grep -c '"msg":"request".*"method":"POST".*"status":200' "$run/proxy.log")
  if [ $status = 0 ] && grep -q 'stand-in for Qwen, not a model. The tool answered:' "$home/out" && [ "$calls" -ge 2 ]; then
    echo "ok   $agent: ${packages[$agent]}, $calls calls, $((SECONDS - began)) s"
  else
    echo "FAIL $agent: ${packages[$agent]}, status $status, $calls calls, $((SECONDS - began)) s"
    cat "$home/out"
    grep '"msg":"request"' "$run/proxy.log" | tail -n 5
    failed=1
  fi
  stop
done
exit $failed
