// Calls the proxy from web pages in a real browser, with fetch and with the openai package: from pages that are allowed to call
// it, and from pages that are not. A small stand-in counts the requests that reach Qwen. It needs Go and Chromium.
import assert from 'node:assert/strict'
import { execFileSync, spawn } from 'node:child_process'
import { createReadStream, existsSync, mkdtempSync, rmSync } from 'node:fs'
import { createServer } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { chromium } from 'playwright-core'

const temporary = mkdtempSync(join(tmpdir(), 'browser-check-'))
const program = join(temporary, 'qwen-go-proxy')
execFileSync('go', ['build', '-o', program, '.'], { cwd: join(import.meta.dirname, '../..'), stdio: 'inherit' })

// serve starts a server and returns its port.
const servers = []
async function serve(handler) {
  const server = createServer(handler)
  servers.push(server)
  await new Promise(resolve => server.listen(0, '127.0.0.1', resolve))
  return server.address().port
}

// qwen stands in for Qwen and notes the requests. It answers with a stream of four words. For the prompt "refuse" it answers with
// an error. For "without end" the stream does not end, and qwen counts the clients that left it.
const qwen = { asked: [], left: 0 }
const words = ['One', ' two', ' three', ' four']
const qwenPort = await serve(async (request, response) => {
  let body = ''
  for await (const chunk of request) body += chunk
  qwen.asked.push(`${request.method} ${request.url}`)
  if (request.method === 'GET') return response.writeHead(200, { 'content-type': 'application/json' }).end('{"object":"list","data":[{"id":"qwen3-coder-plus","object":"model","created":0,"owned_by":"qwen"}]}')
  const prompt = JSON.parse(body).messages[0].content
  if (prompt === 'refuse') {
    response.writeHead(400, { 'content-type': 'application/json', 'x-request-id': 'from-qwen' })
    return response.end('{"error":{"message":"Qwen refuses this.","type":"invalid_request_error","param":"messages","code":"refused"},"request_id":"from-qwen"}')
  }
  response.writeHead(200, { 'content-type': 'text/event-stream;charset=UTF-8', 'x-request-id': 'from-qwen' })
  response.on('close', () => response.writableFinished || qwen.left++)
  const chunk = (delta, finish_reason) => ({ id: 'chatcmpl-1', object: 'chat.completion.chunk', created: 0, model: 'qwen3-coder-plus', choices: [{ index: 0, delta, finish_reason }] })
  const send = data => response.write(`data: ${JSON.stringify(data)}\n\n`)
  for (const content of words) {
    send(chunk({ content }, null))
    await sleep(100)
  }
  if (prompt === 'without end') return
  send(chunk({}, 'stop'))
  response.end('data: [DONE]\n\n')
})

// pages serves an empty page and the ES modules of the openai package. The browser finds it under every host name.
const pages = (request, response) => {
  const { pathname } = new URL(request.url, 'http://localhost')
  const file = join(import.meta.dirname, 'node_modules', pathname)
  if (pathname === '/') response.writeHead(200, { 'content-type': 'text/html' }).end('<!doctype html><title>A page</title>')
  else if (/^\/openai\/.*\.m?js$/.test(pathname) && existsSync(file)) createReadStream(file).pipe(response.writeHead(200, { 'content-type': 'text/javascript' }))
  else response.writeHead(404).end()
}
const [pagesPort, otherPort, publicPort] = await Promise.all([serve(pages), serve(pages), serve(pages)])
const app = `http://app.example:${pagesPort}`

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? execFileSync('which', ['chromium'], { encoding: 'utf8' }).trim(),
  args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync',
    // Chromium treats pages from the last port as pages from the internet.
    '--host-resolver-rules=MAP *.example 127.0.0.1', `--ip-address-space-overrides=127.0.0.1:${publicPort}=public`],
})

// check opens a page of the origin and runs one scenario in it. The scenario has its own proxy with the given environment.
async function check(name, origin, env, scenario) {
  qwen.asked = []
  qwen.left = 0
  const proxy = spawn(program, [], {
    env: { SERVER_HOST: '127.0.0.1', SERVER_PORT: '0', RATE_LIMIT_RPS: '0', QWEN_API_KEY: 'sk-stand-in', API_BASE_URL: `http://127.0.0.1:${qwenPort}/v1`, ...env },
    stdio: ['ignore', 'ignore', 'pipe'],
  })
  const ended = new Promise(resolve => proxy.on('exit', resolve))
  const context = await browser.newContext()
  try {
    const log = [] // what the proxy answered, as "POST /v1/chat/completions 200"
    const base = await new Promise((resolve, reject) => {
      createInterface({ input: proxy.stderr }).on('line', line => {
        if (!line.startsWith('{')) return
        const { msg, url, method, path, status } = JSON.parse(line)
        if (msg === 'listening') resolve(url)
        if (status) log.push(`${method} ${path} ${status}`)
      })
      ended.then(status => reject(new Error(`the proxy ended with status ${status}`)))
    })
    const page = await context.newPage()
    await page.goto(origin)
    await scenario(page, base, log, context)
    console.log(`ok   ${name}`)
  } finally {
    await context.close()
    proxy.kill()
    await ended
  }
}

// until waits for a condition outside the page.
async function until(what, condition) {
  for (let i = 0; i < 100; i++) {
    if (condition()) return
    await sleep(50)
  }
  assert.fail(`not within 5 s: ${what}`)
}

// streamByFetch runs in the page.
const streamByFetch = async ([base, headers]) => {
  const answer = await fetch(base + '/v1/chat/completions', {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers },
    body: JSON.stringify({ stream: true, messages: [{ role: 'user', content: 'Hello' }] }),
  })
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
  let text = '', reads = 0
  for (let part; !(part = await reader.read()).done; reads++) text += part.value
  return { status: answer.status, headers: Object.fromEntries(answer.headers), text, reads }
}

// byPackage runs in the page. It streams a chat with the openai package and returns what an application sees.
const byPackage = async ([base, options, prompt, abortAfter, more]) => {
  const { default: OpenAI } = await import('/openai/index.mjs')
  const client = new OpenAI({ baseURL: base + '/v1', apiKey: 'a-key', dangerouslyAllowBrowser: true, ...options })
  try {
    const { data: stream, request_id } = await client.chat.completions.create(
      { model: 'qwen3-coder-plus', stream: true, messages: [{ role: 'user', content: prompt }], ...more }).withResponse()
    let text = '', chunks = 0
    for await (const chunk of stream) {
      text += chunk.choices[0].delta.content ?? ''
      if (++chunks === abortAfter) stream.controller.abort()
    }
    return { text, requestID: request_id }
  } catch (e) {
    return { error: e.constructor.name, status: e.status, message: e.message, code: e.code, type: e.type, requestID: e.requestID, retryAfter: e.headers?.get('retry-after') }
  }
}

const chat = '/v1/chat/completions'
const requestID = /^[A-Za-z0-9._-]{1,128}$/

// wantServed checks that the page can use the proxy in all ways.
async function wantServed(page, base) {
  const { status, text } = await page.evaluate(streamByFetch, [base, {}])
  assert.equal(status, 200)
  assert.match(text, /data: \[DONE\]\n\n$/)
  assert.equal((await page.evaluate(byPackage, [base, {}, 'Hello'])).text, words.join(''))
}

// wantRefused checks that the page gets nothing from the proxy, whatever it sends, and that no request of the page reaches Qwen.
async function wantRefused(page, base, log) {
  const outcomes = await page.evaluate(async base => {
    const url = base + '/v1/chat/completions', body = '{"messages":[{"role":"user","content":"Spend"}]}'
    const blob = new Blob([body], { type: 'text/plain' })
    const attempts = {
      json: () => fetch(url, { method: 'POST', headers: { 'content-type': 'application/json' }, body }),
      key: () => fetch(url, { method: 'POST', headers: { authorization: 'Bearer a-key' }, body }),
      text: () => fetch(url, { method: 'POST', headers: { 'content-type': 'text/plain' }, body }),
      'no-cors text': () => fetch(url, { method: 'POST', mode: 'no-cors', body }),
      'no-cors form': () => fetch(url, { method: 'POST', mode: 'no-cors', body: new URLSearchParams({ [body]: '' }) }),
      'no-cors multipart': () => fetch(url, { method: 'POST', mode: 'no-cors', body: new FormData() }),
      'no-cors blob': () => fetch(base + '/v1/embeddings', { method: 'POST', mode: 'no-cors', body: blob }),
      models: () => fetch(base + '/v1/models'),
      health: () => fetch(base + '/health/detailed'),
    }
    const outcomes = {}
    for (const [name, attempt] of Object.entries(attempts)) {
      outcomes[name] = await attempt().then(async answer => `${answer.type} ${answer.status} ${await answer.text()}`, e => e.message)
    }
    outcomes.beacon = navigator.sendBeacon(url, blob)
    // A form whose body is JSON: the = between the field's name and its value is inside a JSON string.
    for (const enctype of ['text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data']) {
      const frame = document.body.appendChild(document.createElement('iframe'))
      frame.name = enctype
      const form = document.body.appendChild(document.createElement('form'))
      Object.assign(form, { action: url, method: 'post', enctype, target: enctype })
      const field = form.appendChild(document.createElement('input'))
      field.name = '{"messages":[{"role":"user","content":"'
      field.value = '"}]}'
      form.submit()
    }
    return outcomes
  }, base)
  const failed = 'Failed to fetch', opaque = 'opaque 0 '
  assert.deepEqual(outcomes, { json: failed, key: failed, text: failed, 'no-cors text': opaque, 'no-cors form': opaque,
    'no-cors multipart': opaque, 'no-cors blob': opaque, models: failed, health: failed, beacon: true })
  // The proxy's log shows that it got all requests and refused them: two preflights, and nine requests without one.
  const refused = line => /^(POST|OPTIONS) .* 403$/.test(line)
  await until('the forms and the beacon are refused', () => log.filter(refused).length === 11)
  assert.deepEqual(log.filter(line => !refused(line) && !line.includes('favicon')), ['GET /v1/models 200', 'GET /health/detailed 200']) // answered, but the browser keeps the answers from the page
  assert.deepEqual(qwen.asked.filter(line => !line.startsWith('GET ')), [])
}

try {
  await check('fetch streams, and reads the headers', app, { CORS_ALLOWED_ORIGINS: app, RATE_LIMIT_RPS: '10' }, async (page, base, log) => {
    const { status, headers, text, reads } = await page.evaluate(streamByFetch, [base, { authorization: 'Bearer a-key', 'x-request-id': 'mine-1' }])
    assert.equal(status, 200)
    assert.equal(text.match(/^data: \{/gm).length, words.length + 1)
    assert.match(text, /data: \[DONE\]\n\n$/)
    assert.ok(reads >= words.length, `${words.length} words, 100 ms apart, came in ${reads} reads`)
    assert.equal(headers['x-request-id'], 'mine-1')
    assert.equal(headers['x-upstream-request-id'], 'from-qwen')
    assert.equal(headers['x-ratelimit-limit'], '10')
    assert.equal(headers['x-ratelimit-remaining'], '19')
    assert.match(headers['x-ratelimit-reset'], /^\d{10}$/)
    assert.deepEqual(qwen.asked, [`POST ${chat}`])
    await until('the preflight and the call are in the log', () => log.length === 2)
    assert.deepEqual(log, [`OPTIONS ${chat} 204`, `POST ${chat} 200`])
  })

  await check('the openai package: a key, a stream, models', app, { CORS_ALLOWED_ORIGINS: app, PROXY_API_KEYS: 'a-key' }, async (page, base) => {
    const { text, requestID: id } = await page.evaluate(byPackage, [base, {}, 'Hello'])
    assert.equal(text, words.join(''))
    assert.match(id, requestID)
    assert.deepEqual(await page.evaluate(async base => {
      const { default: OpenAI } = await import('/openai/index.mjs')
      const client = new OpenAI({ baseURL: base + '/v1', apiKey: 'a-key', dangerouslyAllowBrowser: true })
      return (await client.models.retrieve('qwen3-coder-plus')).id
    }, base), 'qwen3-coder-plus')
    const refused = await page.evaluate(byPackage, [base, { apiKey: 'another' }, 'Hello'])
    assert.equal(refused.error, 'AuthenticationError')
    assert.match(refused.message, /PROXY_API_KEYS/)
  })

  await check('the openai package: errors with message and request id', app, { CORS_ALLOWED_ORIGINS: app }, async (page, base) => {
    const { requestID: id, ...ours } = await page.evaluate(byPackage, [base, { maxRetries: 0, defaultHeaders: { 'x-request-id': 'mine-2' } }, 'Hello', 0, { stream: 'yes' }])
    assert.deepEqual(ours, { error: 'BadRequestError', status: 400, message: '400 "stream" must be true or false.', code: 'invalid_type', type: 'invalid_request_error', retryAfter: null })
    assert.equal(id, 'mine-2')
    assert.deepEqual(qwen.asked, [])
    const { requestID: its, ...qwens } = await page.evaluate(byPackage, [base, { maxRetries: 0 }, 'refuse'])
    assert.deepEqual(qwens, { error: 'BadRequestError', status: 400, message: '400 Qwen refuses this.', code: 'refused', type: 'invalid_request_error', retryAfter: null })
    assert.match(its, requestID)
  })

  await check('the openai package: a limit, and waiting as long as it says', app, { CORS_ALLOWED_ORIGINS: app, RATE_LIMIT_RPS: '0.5', RATE_LIMIT_BURST: '1' }, async (page, base, log) => {
    await page.evaluate(byPackage, [base, {}, 'Hello'])
    const { message, requestID: id, ...limited } = await page.evaluate(byPackage, [base, { maxRetries: 0 }, 'Hello'])
    assert.deepEqual(limited, { error: 'RateLimitError', status: 429, code: 'rate_limit_exceeded', type: 'rate_limit_error', retryAfter: '2' })
    assert.match(message, /RATE_LIMIT_RPS/)
    assert.match(id, requestID)
    const before = Date.now()
    assert.equal((await page.evaluate(byPackage, [base, { maxRetries: 1 }, 'Hello'])).text, words.join('')) // the package reads Retry-After
    assert.ok(Date.now() - before > 1000)
    assert.deepEqual(qwen.asked, Array(2).fill(`POST ${chat}`))
  })

  await check('aborting a stream ends it at Qwen too', app, { CORS_ALLOWED_ORIGINS: app }, async (page, base) => {
    assert.equal((await page.evaluate(byPackage, [base, {}, 'without end', 2])).text, words.slice(0, 2).join(''))
    await until('the stream by the package is left', () => qwen.left === 1)
    await page.evaluate(async base => {
      const abort = new AbortController()
      const answer = await fetch(base + '/v1/chat/completions', { method: 'POST', signal: abort.signal, body: '{"stream":true,"messages":[{"role":"user","content":"without end"}]}' })
      await answer.body.getReader().read()
      abort.abort()
    }, base)
    await until('the stream by fetch is left', () => qwen.left === 2)
    page.evaluate(byPackage, [base, {}, 'without end']).catch(() => {}) // the page goes away
    await until('the third stream has begun', () => qwen.asked.length === 3)
    await page.goto('about:blank')
    await until('the stream of the page that went is left', () => qwen.left === 3)
  })

  await check('a page of another origin gets nothing', `http://other.example:${pagesPort}`, { CORS_ALLOWED_ORIGINS: app }, wantRefused)
  await check('nor one of another port', `http://app.example:${otherPort}`, { CORS_ALLOWED_ORIGINS: app }, wantRefused)
  await check('nor one of this machine, where others are named', `http://localhost:${pagesPort}`, { CORS_ALLOWED_ORIGINS: app }, wantRefused)
  await check('by default a page of this machine may', `http://localhost:${pagesPort}`, {}, wantServed)
  await check('and so by address', `http://127.0.0.1:${pagesPort}`, {}, wantServed)
  await check('by default a page of another name may not', app, {}, wantRefused)

  await check('a page whose own name is pointed at the proxy gets nothing', 'about:blank', {}, async (page, base, log) => {
    const rebound = base.replace('127.0.0.1', 'rebound.example')
    assert.equal((await page.goto(rebound + '/v1/models')).status(), 403)
    const { status, text } = await page.evaluate(streamByFetch, [rebound, {}])
    assert.equal(status, 403)
    assert.match(text, /host_not_allowed/)
    assert.deepEqual(qwen.asked, [])
  })

  // A page from the internet may call this machine if the user allows it. The browser asks the user for secure pages only.
  await check('a page from the internet that its user lets call this machine', `http://localhost:${publicPort}`, {}, async (page, base, log, context) => {
    await context.grantPermissions(['local-network-access'])
    await wantServed(page, base)
  })
} finally {
  await browser.close()
  for (const server of servers) {
    server.close()
    server.closeAllConnections()
  }
  rmSync(temporary, { recursive: true })
}
