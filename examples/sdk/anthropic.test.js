// Anthropic's SDK, at its default settings, on /v1/messages.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import Anthropic from '@anthropic-ai/sdk'
import { zodOutputFormat } from '@anthropic-ai/sdk/helpers/zod'
import { z } from 'zod'
import { long, noOpenStreams, pixel, said, signIn, start, testErrors, testRateLimit, thought, weather } from './proxy.js'

const proxy = await start()
const connect = ({ origin }, options) => new Anthropic({ baseURL: origin, apiKey: 'any', ...options })
const anthropic = connect(proxy)
const question = { model: 'qwen3-coder-plus', max_tokens: 2048, messages: [{ role: 'user', content: 'Hello' }] }
const { schema: input_schema, ...named } = weather

// both asks with and without streaming.
const both = async request => [await anthropic.messages.create(request), await anthropic.messages.stream(request).finalMessage()]

describe('anthropic', { concurrency: true }, () => {
  test('models', async () => {
    const ids = []
    for await (const { id } of anthropic.models.list()) ids.push(id)
    assert.ok(ids.includes(question.model), ids)
    assert.equal((await anthropic.models.retrieve(question.model)).id, question.model)
  })

  test('text', async () => {
    for (const { content, stop_reason, usage } of await both({ ...question, system: 'Be brief.' })) {
      assert.deepEqual(content.map(({ type, text }) => ({ type, text })), [{ type: 'text', text: said('Hello') }])
      assert.equal(stop_reason, 'end_turn')
      assert.ok(usage.input_tokens === 3 && usage.output_tokens > 5, usage)
    }
  })

  test('the ends of an answer', async () => {
    for (const { stop_reason } of await both({ ...question, max_tokens: 2 })) assert.equal(stop_reason, 'max_tokens')
    for (const { stop_reason, stop_sequence } of await both({ ...question, stop_sequences: [' for Qwen'] })) {
      assert.deepEqual([stop_reason, stop_sequence], ['stop_sequence', ' for Qwen'])
    }
  })

  test('tools', async () => {
    const request = { ...question, tools: [{ ...named, input_schema }] }
    for (const { content, stop_reason } of await both(request)) {
      const [{ type, id, name, input }] = content
      assert.deepEqual([type, name, input, stop_reason], ['tool_use', 'weather', { city: 'Hello' }, 'tool_use'])
      const result = { role: 'user', content: [{ type: 'tool_result', tool_use_id: id, content: 'rain' }] }
      const messages = [...question.messages, { role: 'assistant', content }, result]
      for (const { content: [{ text }] } of await both({ ...request, messages })) assert.match(text, /The tool answered: "rain"/)
    }
  })

  test('thinking', async () => {
    for (const { content: [thinking, { text }] } of await both({ ...question, thinking: { type: 'enabled', budget_tokens: 1024 } })) {
      assert.deepEqual([thinking.type, thinking.thinking, text], ['thinking', thought, said('Hello')])
      assert.ok(thinking.signature)
    }
  })

  test('images', async () => {
    const content = [{ type: 'text', text: 'Hello' }, { type: 'image', source: { type: 'base64', media_type: 'image/png', data: pixel } }]
    for (const { content: [{ text }] } of await both({ ...question, messages: [{ role: 'user', content }] })) {
      assert.equal(text, said('Hello') + ' Images sent along: 1.')
    }
  })

  test('structured output', async () => {
    const message = await anthropic.messages.parse({ ...question, output_config: { format: zodOutputFormat(z.object({ city: z.string() })) } })
    assert.deepEqual(message.parsed_output, { city: 'Hello' })
  })

  test('counting tokens', async () => {
    const { input_tokens } = await anthropic.messages.countTokens({ model: question.model, messages: question.messages })
    assert.equal(input_tokens, 1)
  })

  test('abort', async () => {
    const proxy = await start()
    const stream = await connect(proxy).messages.create({ ...question, messages: [{ role: 'user', content: long }], stream: true })
    let events = 0
    for await (const _ of stream) if (++events === 8) stream.controller.abort()
    assert.ok(events < 100, `${events} events`) // events that had already arrived still count
    await noOpenStreams(proxy)
  })

  test('error: Qwen breaking off in mid-stream', async () => {
    const stream = await anthropic.messages.create({ ...question, model: 'error-midstream', stream: true })
    await assert.rejects(async () => { for await (const _ of stream); }, error => {
      assert.ok(error instanceof Anthropic.APIError, error)
      assert.match(error.message, /broke in the middle/)
      return true
    })
  })

  testRateLimit(proxy => connect(proxy).messages.create(question))

  const classes = {
    400: Anthropic.BadRequestError, 401: Anthropic.AuthenticationError, 403: Anthropic.PermissionDeniedError, 404: Anthropic.NotFoundError,
    429: Anthropic.RateLimitError, 500: Anthropic.InternalServerError, 502: Anthropic.InternalServerError, 503: Anthropic.InternalServerError,
  }
  testErrors(
    ({ url, key, model, text, maxRetries }) => new Anthropic({ baseURL: url.replace('/v1', ''), apiKey: key, maxRetries })
      .messages.create({ ...question, model, messages: [{ role: 'user', content: text }] }),
    (error, status) => {
      assert.ok(error instanceof (classes[status] ?? Anthropic.APIError), error)
      return error
    })

  test('error: after a sign-in there are no messages', async () => {
    const anthropic = connect(await start({}, signIn))
    await assert.rejects(anthropic.messages.create(question), error => error instanceof Anthropic.NotFoundError && /QWEN_API_KEY/.test(error.message))
  })
})
