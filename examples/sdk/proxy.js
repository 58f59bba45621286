// Shared by the tests of all SDKs: qwen-go-proxy in front of the stand-in for Qwen, and the tests of errors.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import test, { after } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'

// run runs a program until the tests of the file have ended. It returns the first match of the pattern's group in the output.
async function run(name, args, env, output, pattern) {
  const program = spawn(join(import.meta.dirname, 'node_modules/.bin', name), args, { env, stdio: ['ignore', 'pipe', 'pipe'] })
  const ended = new Promise(resolve => program.on('exit', resolve))
  after(async () => {
    program.kill()
    assert.equal(await ended, 0)
  })
  return new Promise((resolve, reject) => {
    program.stdout.resume()
    program.stderr.resume()
    createInterface({ input: program[output] }).on('line', line => {
      const found = line.match(pattern)
      if (found) resolve(found[1])
    })
    ended.then(status => reject(new Error(`${name} ended with status ${status}`)))
  })
}

const qwen = await run('standin', ['-key', 'sk-test', '-approve-after', '1ms'], {}, 'stdout', /^(http:.*)/)
const directory = mkdtempSync(join(tmpdir(), 'sdk-tests-'))
after(() => rmSync(directory, { recursive: true }))

// Two ways to Qwen: with an API key, and with a sign-in, which approves itself.
const key = { QWEN_API_KEY: 'sk-test', API_BASE_URL: qwen + '/compatible-mode/v1' }
export const signIn = { QWEN_OAUTH_BASE_URL: qwen, QWEN_DIR: directory }

// start runs the proxy, by default with an API key, and without a rate limit.
export async function start(env = {}, credentials = key, command = 'serve') {
  const origin = await run('qwen-go-proxy', [command], { SERVER_HOST: '127.0.0.1', SERVER_PORT: '0', RATE_LIMIT_RPS: '0', ...credentials, ...env },
    'stderr', /"msg":"listening".*"url":"([^"]+)"/)
  while (!(await fetch(origin + '/health/ready')).ok) await sleep(100)
  return { origin, url: origin + '/v1' }
}

// requests returns the proxy's counts.
const requests = async ({ origin }) => (await (await fetch(origin + '/health/detailed')).json()).requests

// noOpenStreams waits until the proxy has no open stream. It fails after two seconds; a stream of `long` takes much longer.
export async function noOpenStreams({ origin }) {
  for (const end = Date.now() + 2000; ; await sleep(10)) {
    const open = (await requests({ origin })).open_streams
    if (open === 0) return
    assert.ok(Date.now() < end, `${open} streams are still open`)
  }
}

// The stand-in repeats the prompt, a word every 40 ms. This prompt is so long that the client leaves before the stream ends.
export const long = 'word '.repeat(500)

export const weather = {
  name: 'weather', description: 'The weather in a city.',
  schema: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'], additionalProperties: false },
}

export const pixel = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='

export const said = text => `This is qwen-go-proxy's stand-in for Qwen, not a model. You said: "${text}"`
export const thought = 'I repeat what the user said.'

const errors = [
  { name: 'a wrong key', env: { PROXY_API_KEYS: 'sk-proxy' }, key: 'sk-wrong', status: 401, message: /PROXY_API_KEYS/ },
  { name: 'an endpoint that is not there', path: '/nowhere', status: 404, message: /There is no/ },
  { name: 'a body too large', env: { MAX_BODY_BYTES: '2000' }, text: long, status: 413, message: /2000/ },
  {
    name: 'the rate limit', env: { RATE_LIMIT_RPS: '0.01', RATE_LIMIT_BURST: '1' }, spent: true, maxRetries: 0, // each retry would wait 100 s
    status: 429, message: /RATE_LIMIT_RPS/,
  },
  { name: 'Qwen breaking off before an answer', model: 'error-midstream', status: 502, message: /Qwen could not be reached/ },
  ...[400, 403, 404, 429, 500, 503].map(status => (
    { name: `${status} from Qwen`, model: `error-${status}`, status, message: new RegExp(`fails with status ${status}`) })),
]

// testErrors tests which exceptions the SDK raises. ask({ url, key, model, text, maxRetries }) asks for an answer without
// streaming; maxRetries is undefined for the SDK's default. read(error, status) checks the exception's class and returns
// { status, message, requestID }. tries is how often the SDK asks in all if a failure is temporary.
export function testErrors(ask, read, tries = 3) {
  for (const { name, env, key = 'any', path = '', model = 'qwen3-coder-plus', text = 'Hello', spent, maxRetries, status, message } of errors) {
    test(`error: ${name}`, async () => {
      const proxy = await start(env)
      if (spent) await fetch(proxy.url + '/models')
      const error = await ask({ url: proxy.url + path, key, model, text, maxRetries }).then(() => assert.fail('no error'), e => e)
      const got = read(error, status)
      assert.equal(got.status, status, error)
      assert.match(got.message, message)
      assert.match(got.requestID, /^[\w.-]{10,}$/)
      if (model === `error-${status}`) {
        assert.equal((await requests(proxy)).upstream_errors, status === 429 || status >= 500 ? tries : 1)
      }
    })
  }
}

// testRateLimit tests that ask({ origin, url }), at the SDK's default settings, gets its answer after the time in Retry-After.
// Until then the proxy refuses it at most `most` times: 1 if the SDK obeys Retry-After.
export function testRateLimit(ask, most = 1) {
  test('the rate limit passes', async () => {
    const proxy = await start({ RATE_LIMIT_RPS: '0.2', RATE_LIMIT_BURST: '1' })
    await fetch(proxy.url + '/models')
    await ask(proxy)
    const { rate_limited: limited } = await requests(proxy)
    assert.ok(1 <= limited && limited <= most, `${limited} requests were limited`)
  })
}
