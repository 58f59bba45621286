#!/usr/bin/env bash
# Imports the workflows beside this file into a real n8n, runs each of them, and checks the results. n8n talks to qwen-go-proxy,
# and qwen-go-proxy to the stand-in for Qwen in e2e.
#
#	examples/n8n/check.sh [directory]
#
# It needs Go, Node 20 to 24, npm and curl. It installs n8n into the directory (~/.cache/qwen-go-proxy/n8n by default). That
# takes some minutes and 2.3 GB the first time; n8n stays there for the next run. N8N_VERSION selects another version.
set -euo pipefail
cd "$(dirname "$0")"

install=${1:-$HOME/.cache/qwen-go-proxy/n8n}
version=${N8N_VERSION:-2.8.4} # the newest that runs on Node 20
work=$(mktemp -d)
pids=()
failed=0

cleanup() {
  for pid in "${pids[@]}"; do
    kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true
  done
  rm -rf "$work"
}
trap cleanup EXIT

if [ "$(node -p 'require(process.argv[1]).version' "$install/node_modules/n8n/package.json" 2>/dev/null)" != "$version" ]; then
  echo "installing n8n $version into $install"
  mkdir -p "$install"
  # n8n takes xlsx from its vendor's own host. The version in the registry is good enough here.
  echo '{"private":true,"overrides":{"xlsx":"0.18.5"}}' >"$install/package.json"
  npm install --prefix "$install" --no-audit --no-fund --loglevel=error "n8n@$version"
fi

# free_port prints a port that nobody listens on.
free_port() {
  node -e 'const s = require("net").createServer().listen(0, "127.0.0.1", () => { console.log(s.address().port); s.close(); })'
}

n8n_port=$(free_port)
# n8n uses its own folder and calls nobody.
n8n=(env N8N_USER_FOLDER="$work" N8N_LISTEN_ADDRESS=127.0.0.1 N8N_PORT="$n8n_port" N8N_RUNNERS_BROKER_PORT="$(free_port)"
  N8N_RUNNERS_TASK_REQUEST_TIMEOUT=300 N8N_DIAGNOSTICS_ENABLED=false N8N_PERSONALIZATION_ENABLED=false
  N8N_VERSION_NOTIFICATIONS_ENABLED=false N8N_TEMPLATES_ENABLED=false N8N_HIRING_BANNER_ENABLED=false
  N8N_DYNAMIC_BANNERS_ENABLED=false NO_COLOR=1 node "$install/node_modules/n8n/bin/n8n")

# await FILE waits until a file is not empty.
await() {
  for _ in $(seq 100); do
    [ -s "$1" ] && return
    sleep 0.1
  done
  echo "$1 stays empty"
  exit 1
}

# proxy NAME VARIABLE=VALUE… starts a proxy whose log is NAME.log, and sets port to its port.
proxy() {
  local log=$work/$1.log
  : >"$log"
  env -i PATH="$PATH" SERVER_HOST=127.0.0.1 SERVER_PORT=0 QWEN_API_KEY=sk-test "${@:2}" "$work/qwen-go-proxy" 2>"$log" &
  pids+=($!)
  for _ in $(seq 300); do
    port=$(sed -n 's/.*"msg":"listening".*"address":"[^"]*:\([0-9]*\)".*/\1/p' "$log")
    [ -n "$port" ] && curl -fsS -o "$work/ready" "http://localhost:$port/health/ready" 2>/dev/null && return
    sleep 0.1
  done
  cat "$log"
  exit 1
}

# workflow FILE ID PORT [SED-EXPRESSION…] prepares a workflow for import, with the given id and the proxy's port.
workflow() {
  local expressions=() expression
  for expression in "s/^  \"id\": \"qwen[A-Za-z]*\",/  \"id\": \"$2\",/" "s/localhost:8080/localhost:$3/" "${@:4}"; do
    expressions+=(-e "$expression")
  done
  sed "${expressions[@]}" "$1" >"$work/workflows/$2.json"
}

# run ID executes a workflow from its manual trigger. result shows the outcome.
run() {
  "${n8n[@]}" execute --id="$1" --rawOutput >"$work/run" 2>&1 || true
}

# result EXPRESSION evaluates JavaScript. In it, out(node) returns the items that a node of the last run put out.
result() {
  node -e '
    const text = require("fs").readFileSync(process.argv[1], "utf8");
    const { resultData } = JSON.parse(text.slice(text.search(/^\{/m), text.lastIndexOf("\n}") + 2)).data;
    const out = (node) => (resultData.runData[node]?.at(-1).data?.main.flat() ?? []).map((item) => item.json);
    const got = eval(process.argv[2]);
    console.log(typeof got === "string" ? got : JSON.stringify(got));
  ' "$work/run" "$1" 2>/dev/null || head -c 2000 "$work/run"
}

# check NAME GOT WANT compares the two and prints the result.
check() {
  if [ "$2" = "$3" ]; then
    echo "ok      $1: $2"
  else
    failed=1
    printf 'FAILED  %s\n  got:  %s\n  want: %s\n' "$1" "$2" "$3"
  fi
}

(cd ../.. && go build -o "$work/" . ./e2e/standin)
mkdir "$work/workflows"
intro="This is qwen-go-proxy's stand-in for Qwen, not a model."

"$work/standin" -key sk-test >"$work/standin.url" &
pids+=($!)
await "$work/standin.url"
api=$(cat "$work/standin.url")/compatible-mode/v1
proxy plain API_BASE_URL="$api"
plain=$port
proxy limited API_BASE_URL="$api" RATE_LIMIT_RPS=0.25 RATE_LIMIT_BURST=1 # a request every four seconds
limited=$port
node -e '
  const s = require("http").createServer((_, res) => res.writeHead(404).end("404 page not found"));
  s.listen(0, "127.0.0.1", () => console.log(s.address().port));
' >"$work/lacking.port" &
pids+=($!)
await "$work/lacking.port"
proxy lacking API_BASE_URL="http://localhost:$(cat "$work/lacking.port")" # has no /responses
lacking=$port

workflow 1-first-request.json first "$plain"
# Here, the caller chooses the model. The stand-in's model error-502 fails.
workflow 2-webhook-chatbot.json chat "$limited" "s/model: 'qwen3-coder-plus'/model: \$json.body.model ?? 'qwen3-coder-plus'/"
workflow 3-content-moderation.json moderation "$plain"
# The stand-in can't judge a text. With a schema that allows one verdict only, it gives this verdict.
workflow 3-content-moderation.json verdicts "$plain" "s/type: 'json_object'/type: 'json_schema', json_schema: { name: 'verdict', \
schema: { type: 'object', required: ['verdict'], properties: { verdict: { enum: [\$itemIndex ? 'block' : 'allow'] } } } }/"
workflow 4-llm-chain.json chain "$plain"
workflow 4-llm-chain.json chain-responses "$plain" '/"responsesApiEnabled": false,/d' # it is on by default
workflow 4-llm-chain.json chain-lacking "$lacking" '/"responsesApiEnabled": false,/d' 's/"qwenGoProxy"/"lacking"/'
workflow 5-agent-with-tool.json agent "$plain"
workflow 5-agent-with-tool.json agent-responses "$plain" '/"responsesApiEnabled": false,/d'

echo 'importing credentials and workflows'
# import runs an import command of n8n. It checks the output, because a failed import exits with status 0 too.
import() {
  "${n8n[@]}" "$@" >"$work/import.log" 2>&1
  grep -q '^Successfully imported' "$work/import.log" || { cat "$work/import.log"; exit 1; }
}
import import:workflow --separate --input="$work/workflows"
sed "s/localhost:8080/localhost:$plain/" credentials.json >"$work/credentials.json"
import import:credentials --input="$work/credentials.json"
sed -e "s/localhost:8080/localhost:$lacking/" -e 's/"qwenGoProxy"/"lacking"/' credentials.json >"$work/credentials.json"
import import:credentials --input="$work/credentials.json"
"${n8n[@]}" publish:workflow --id=chat >"$work/publish.log" 2>&1

hello="$intro You said: \"Say hello to n8n.\""
order="$intro The tool answered: \"[{\"response\":\"Order 4711 left our warehouse yesterday.\"}]\""

run first
check '1-first-request' "$(result 'out("Answer")[0].answer')" "$hello"
run moderation
check '3-content-moderation, no verdict' "$(result '["Publish", "Withhold", "Ask a person"].map((node) => out(node).length)')" '[0,0,2]'
run verdicts
check '3-content-moderation, a verdict each' "$(result '["Publish", "Withhold", "Ask a person"].map((node) => out(node).length)')" '[1,1,0]'
run chain
check '4-llm-chain' "$(result 'out("Basic LLM Chain")[0].text')" "$hello"
run chain-responses
check '4-llm-chain, Use Responses API on' "$(result 'out("Basic LLM Chain")[0].text')" "$hello"
run chain-lacking
check '4-llm-chain, Use Responses API on where Qwen has none' "$(result 'resultData.error.description')" \
  'The API behind the proxy has no /responses. Use /v1/chat/completions; in n8n'\''s OpenAI nodes turn off "Use Responses API".'
run agent
check '5-agent-with-tool' "$(result 'out("AI Agent")[0].output')" "$order"
run agent-responses
check '5-agent-with-tool, Use Responses API on' "$(result 'out("AI Agent")[0].output')" "$order"

"${n8n[@]}" start >"$work/n8n.log" 2>&1 &
pids+=($!)
# say BODY posts to the chatbot, and prints its answer.
say() {
  curl -sS -m 60 -H 'Content-Type: application/json' -d "$1" "http://localhost:$n8n_port/webhook/qwen-chat"
}
for _ in $(seq 600); do
  grep -q 'Activated workflow' "$work/n8n.log" && break
  sleep 0.5
done
check '2-webhook-chatbot' "$(say '{"message":"Hello"}')" "{\"reply\":\"$intro You said: \\\"Hello\\\"\"}"
check '2-webhook-chatbot, retried after 429' "$(say '{"message":"Hello again"}')" "{\"reply\":\"$intro You said: \\\"Hello again\\\"\"}"
check '2-webhook-chatbot, the log has the 429' "$(grep -c '"status":429' "$work/limited.log")" 1
failure=$(say '{"message":"Hello","model":"error-502"}') || true
check '2-webhook-chatbot, Qwen fails' "$failure" '{"error":"The model error-502 fails with status 502."}'
# n8n's error contains the whole request. The caller must not see the key.
check '2-webhook-chatbot, the failure shows no key' "$(grep -ci -e bearer -e authorization <<<"$failure")" 0

exit "$failed"
