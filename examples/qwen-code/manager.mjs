// Runs one process of Qwen Code's own token manager beside qwen-go-proxy. Until stdin ends, it asks the manager for credentials
// again and again, uses them for a request, and prints the outcome as JSON lines.
//
//   QWEN_CODE_DIR  the unpacked package of Qwen Code
//   QWEN_HOME      the directory of oauth_creds.json, which Qwen Code obeys
//   OAUTH_URL      stands in for Qwen's OAuth server

import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const { QWEN_CODE_DIR, OAUTH_URL } = process.env;

// The chunk's name changes with each version. This finds the chunk by the name of the lock file in it.
const chunks = join(QWEN_CODE_DIR, "chunks");
const chunk = readdirSync(chunks)
  .filter((name) => name.endsWith(".js"))
  .find((name) => readFileSync(join(chunks, name), "utf8").includes('"oauth_creds.lock"'));
if (!chunk) throw new Error(`no chunk in ${chunks} knows oauth_creds.lock`);
const { SharedTokenManager, QwenOAuth2Client } = await import(pathToFileURL(join(chunks, chunk)));

const realFetch = globalThis.fetch;
globalThis.fetch = (url, options) => realFetch(String(url).replace("https://chat.qwen.ai", OAUTH_URL), options);

const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");
const manager = SharedTokenManager.getInstance();
const client = new QwenOAuth2Client();
let stopped = false;
process.stdin.on("end", () => (stopped = true)).resume();

let last;
while (!stopped) {
  try {
    const credentials = await manager.getValidCredentials(client);
    if (credentials.access_token !== last) {
      last = credentials.access_token;
      say({ event: "token", expires: new Date(credentials.expiry_date) });
    }
    const answer = await realFetch(`${credentials.resource_url}/v1/chat/completions`, {
      method: "POST",
      headers: { Authorization: `Bearer ${credentials.access_token}` },
      body: '{"messages":[{"role":"user","content":"Hello"}]}',
    });
    await answer.arrayBuffer();
    if (answer.ok) say({ event: "served" });
    else say({ event: "error", error: `the API answered ${answer.status}` });
  } catch (error) {
    say({ event: "error", error: `${error.type ?? error.name}: ${error.message}` });
  }
  await new Promise((resolve) => setTimeout(resolve, 200 + 200 * Math.random()));
}
process.exit(0);
