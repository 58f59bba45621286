// Tests the page /auth in a real browser, with e2e/standin in place of Qwen: approve, deny, both without JavaScript, and the
// pages of the other states. It needs Go and Chromium, and leaves screenshots in a temporary directory.
import assert from 'node:assert/strict'
import { execFileSync, spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { chromium } from 'playwright-core'

const temporary = mkdtempSync(join(tmpdir(), 'auth-page-'))
const shots = mkdtempSync(join(tmpdir(), 'auth-page-screenshots-'))
execFileSync('go', ['build', '-o', temporary + '/', '.', './e2e/standin'], { cwd: join(import.meta.dirname, '../..'), stdio: 'inherit' })

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? execFileSync('which', ['chromium'], { encoding: 'utf8' }).trim(),
  args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync'],
})

// run starts a program. It returns the first match of the pattern's group in the program's output, and a function that ends the
// program.
async function run(name, args, env, output, pattern) {
  const child = spawn(join(temporary, name), args, { cwd: temporary, env, stdio: ['ignore', 'pipe', 'pipe'] })
  const ended = new Promise(resolve => child.on('exit', resolve))
  child[output === 'stdout' ? 'stderr' : 'stdout'].resume()
  const found = await new Promise((resolve, reject) => {
    createInterface({ input: child[output] }).on('line', line => {
      const match = line.match(pattern)
      if (match) resolve(match[1])
    })
    ended.then(status => reject(new Error(`${name} ended with status ${status}`)))
  })
  return { found, end: () => (child.kill(), ended) }
}

// check runs one scenario in a new browser context with its own proxy. The stand-in approves a sign-in by itself after
// approveAfter ("0": never). If settings are given, the proxy runs with these and without a stand-in.
async function check(name, { approveAfter = '0', settings, ...options }, scenario) {
  const qwen = settings ? undefined : await run('standin', ['-approve-after', approveAfter, '-interval', '1s'], {}, 'stdout', /^(http.*)$/)
  const proxy = await run('qwen-go-proxy', [], {
    SERVER_HOST: '127.0.0.1', SERVER_PORT: '0', QWEN_DIR: mkdtempSync(join(temporary, 'qwen-')),
    ...settings ?? { QWEN_OAUTH_BASE_URL: qwen.found }
  }, 'stderr', /"msg":"listening".*"url":"([^"]+)"/)
  const origin = proxy.found
  const context = await browser.newContext(options)
  try {
    const faults = []
    const page = await context.newPage()
    page.on('console', m => faults.push(`console: ${m.text()}`)) // CSP violations too
    page.on('pageerror', e => faults.push(`error: ${e.message}`))
    page.on('request', r => new URL(r.url()).origin === origin || r.url() === 'data:,' || faults.push(`request to ${r.url()}`))
    await page.goto(origin + '/auth')
    await scenario(page, origin, faults)
    assert.deepEqual(faults, [])
    console.log(`ok   ${name}`)
  } finally {
    await context.close()
    await proxy.end()
    await qwen?.end()
  }
}

const heading = (page, text) => page.getByRole('heading', { level: 1, name: text, exact: true }).waitFor({ timeout: 20_000 })

// decide opens the link in a new tab and presses a button on the stand-in's page.
async function decide(page, button) {
  const code = await page.locator('.code').textContent()
  const opened = page.context().waitForEvent('page')
  await page.getByRole('link', { name: 'Open Qwen’s page in a new tab' }).click()
  const qwen = await opened
  await qwen.waitForLoadState()
  assert.equal(await qwen.locator('.code').textContent(), code)
  assert.equal(await qwen.evaluate(() => window.opener), null)
  if (button === 'Deny' || await qwen.getByRole('button').count() > 0) await qwen.getByRole('button', { name: button }).click()
  await qwen.getByText(button === 'Deny' ? 'Denied.' : 'Approved.').waitFor()
  await qwen.close()
}

async function chat(origin) {
  const answer = await fetch(origin + '/v1/chat/completions', { method: 'POST', body: '{"messages":[{"role":"user","content":"Hello"}]}' })
  assert.equal(answer.status, 200)
  assert.match((await answer.json()).choices[0].message.content, /You said: "Hello"/)
}

// wantContrast checks all visible text for the contrast of 4.5 that WCAG 2.2, 1.4.3, level AA, wants of small text.
async function wantContrast(page) {
  const low = await page.evaluate(() => {
    const parse = color => color.match(/[\d.]+/g).map(Number)
    const luminance = color => {
      const [r, g, b] = parse(color).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      return 0.2126 * r + 0.7152 * g + 0.0722 * b
    }
    const background = e => parse(getComputedStyle(e).backgroundColor)[3] === 0 ? background(e.parentElement) : getComputedStyle(e).backgroundColor
    return [...document.querySelectorAll('main *')].filter(e => e.innerText?.trim()).map(e => {
      const [dark, light] = [luminance(getComputedStyle(e).color), luminance(background(e))].sort((a, b) => a - b)
      return { text: e.innerText, ratio: (light + 0.05) / (dark + 0.05) }
    }).filter(({ ratio }) => !(ratio >= 4.5))
  })
  assert.deepEqual(low, [])
}

try {
  await check('approve in a new tab, and chat', {}, async (page, origin) => {
    await heading(page, 'Sign in to Qwen')
    assert.match(await page.locator('.code').textContent(), /^[A-Z]{4}-[A-Z]{4}$/)
    await decide(page, 'Approve')
    await heading(page, 'Signed in')
    assert.match(await page.title(), /^Signed in/)
    assert.equal(await page.getByText(origin + '/v1', { exact: true }).count(), 1)
    assert.equal(new URL(page.url()).pathname, '/auth') // the same page, without a reload
    await chat(origin)
  })

  await check('deny, and start again', { approveAfter: '10s' }, async page => {
    const code = await page.locator('.code').textContent()
    await decide(page, 'Deny')
    await heading(page, 'Sign-in denied')
    assert.equal(await page.evaluate(() => document.activeElement.tagName), 'H1') // it was on the link, which is no longer there
    await page.keyboard.press('Tab')
    assert.equal(await page.evaluate(() => document.activeElement.textContent), 'Start again')
    await page.keyboard.press('Enter')
    await heading(page, 'Sign in to Qwen')
    assert.notEqual(await page.locator('.code').textContent(), code)
    await page.getByText(/^14:5[0-8] left$/).waitFor() // it counts down
    await heading(page, 'Signed in') // the stand-in approves
  })

  await check('the proxy goes away and comes back', { approveAfter: '8s' }, async (page, origin, faults) => {
    const link = page.getByRole('link', { name: 'Open Qwen’s page in a new tab' })
    await page.route('**/auth?watch', route => route.abort())
    await page.getByText('The proxy does not answer.').waitFor()
    assert.equal(await page.locator('main').innerText(), `qwen-go-proxy on ${new URL(origin).host}\n\nSign in to Qwen\n\nThe proxy does not answer. This page keeps trying.`)
    await page.screenshot({ path: join(shots, 'offline.png') })
    await page.unroute('**/auth?watch')
    await link.waitFor()
    await heading(page, 'Signed in')
    await page.getByText('The proxy does not answer.').waitFor({ state: 'hidden' })
    for (const fault of faults.splice(0)) assert.match(fault, /ERR_FAILED/)
  })

  for (const [name, withClipboard] of [['copy the link', true], ['copy the link without a clipboard API', false]]) {
    await check(name, { permissions: ['clipboard-read', 'clipboard-write'] }, async page => {
      if (!withClipboard) await page.evaluate(() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not here')) })
      await page.getByRole('button', { name: 'Copy link' }).click()
      await page.getByText('Link copied').waitFor({ state: 'attached' })
      const href = await page.getByRole('link', { name: 'Open Qwen’s page in a new tab' }).getAttribute('href')
      assert.equal(await page.evaluate(() => navigator.clipboard.readText()), href)
      await page.waitForTimeout(2500) // a poll changes nothing
      assert.equal(await page.evaluate(() => document.activeElement.textContent), 'Copy link')
    })
  }

  await check('a link as long as Qwen’s, on a wide screen', { viewport: { width: 1280, height: 800 } }, async page => {
    const parts = await page.locator('#link span').evaluateAll(spans => spans.map(s => ({ text: s.textContent, lines: s.getClientRects().length })))
    assert.deepEqual(parts.map(p => p.text.replace(/[A-Z]{4}-[A-Z]{4}/, 'CODE')).slice(1), ['?user_code=CODE', '&client=qwen-code'])
    assert.deepEqual(parts.map(p => p.lines), [1, 1, 1])
    assert.deepEqual(await page.locator('#link span').evaluateAll(spans => spans.map(s => s.clientHeight < 30)), [true, true, true])
  })

  await check('an API key', { settings: { QWEN_API_KEY: 'sk-never-used' } }, async page => {
    await heading(page, 'No sign-in needed')
    assert.equal(await page.locator('.good').count(), 0)
    await page.screenshot({ path: join(shots, 'api-key.png') })
  })

  await check('Qwen can’t be reached', { settings: { QWEN_OAUTH_BASE_URL: 'http://127.0.0.1:1' } }, async page => {
    await heading(page, 'Waiting for Qwen')
    assert.equal(await page.getByRole('link').count(), 0)
    assert.doesNotMatch(await page.locator('main').innerText(), /try again/i)
    await page.screenshot({ path: join(shots, 'starting.png') })
  })

  await check('without JavaScript', { javaScriptEnabled: false }, async (page, origin) => {
    assert.equal(await page.getByRole('button', { name: 'Copy link' }).isVisible(), false)
    await decide(page, 'Approve')
    await heading(page, 'Signed in')
    await chat(origin)
  })

  await check('without JavaScript: deny, and start again', { javaScriptEnabled: false }, async page => {
    await decide(page, 'Deny')
    await heading(page, 'Sign-in denied')
    await page.getByRole('link', { name: 'Start again' }).click()
    await heading(page, 'Sign in to Qwen')
  })

  for (const colorScheme of ['light', 'dark']) {
    for (const viewport of [{ width: 360, height: 740 }, { width: 1280, height: 800 }]) {
      const name = `${colorScheme}, ${viewport.width}x${viewport.height}`
      await check(name, { colorScheme, viewport }, async page => {
        const shoot = async state => {
          await wantContrast(page)
          assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), viewport.width) // nothing sticks out
          await page.screenshot({ path: join(shots, `${state}-${colorScheme}-${viewport.width}x${viewport.height}.png`) })
        }
        await heading(page, 'Sign in to Qwen')
        await shoot('pending')
        await decide(page, 'Deny')
        await heading(page, 'Sign-in denied')
        await shoot('denied')
        await page.getByRole('link', { name: 'Start again' }).click()
        await decide(page, 'Approve')
        await heading(page, 'Signed in')
        await shoot('signed-in')
      })
    }
  }
} finally {
  await browser.close()
  rmSync(temporary, { recursive: true })
  console.log(`screenshots: ${shots}`)
}
