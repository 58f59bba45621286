// The official OpenAI SDK, at its default settings: the newest major version and the one before it.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import OpenAI6 from 'openai-6'
import * as helpers6 from 'openai-6/helpers/zod'
import OpenAI7 from 'openai-7'
import * as helpers7 from 'openai-7/helpers/zod'
import { z } from 'zod'
import { long, noOpenStreams, pixel, said, signIn, start, testErrors, testRateLimit, thought, weather } from './proxy.js'

const proxy = await start()
const model = 'qwen3-coder-plus'
const messages = [{ role: 'user', content: 'Hello' }]
const { schema: parameters, ...named } = weather
const tools = [{ type: 'function', function: { ...named, parameters } }]
const City = z.object({ city: z.string() })

const suite = (name, OpenAI, { zodResponseFormat, zodTextFormat }) => describe(name, { concurrency: true }, () => {
  const openai = new OpenAI({ baseURL: proxy.url, apiKey: 'any' })

  test('models', async () => {
    const ids = []
    for await (const { id } of openai.models.list()) ids.push(id)
    assert.ok(ids.includes(model), ids)
    assert.equal((await openai.models.retrieve(model)).id, model)
    await assert.rejects(openai.models.retrieve('nowhere'), OpenAI.NotFoundError)
  })

  test('chat', async () => {
    const { data, request_id, response } = await openai.chat.completions.create({ model, messages }).withResponse()
    assert.equal(data.choices[0].message.content, said('Hello'))
    assert.equal(data.usage.total_tokens, data.usage.prompt_tokens + data.usage.completion_tokens)
    assert.equal(request_id, response.headers.get('x-request-id'))
  })

  test('chat, streaming', async () => {
    const stream = openai.chat.completions.stream({ model, messages, stream_options: { include_usage: true } })
    let chunks = 0
    for await (const _ of stream) chunks++
    assert.ok(chunks > 5)
    const completion = await stream.finalChatCompletion()
    assert.equal(completion.choices[0].message.content, said('Hello'))
    assert.ok(completion.usage.completion_tokens > 5)
  })

  for (const stream of [false, true]) {
    test(`tools${stream ? ', streaming' : ''}`, async () => {
      const run = openai.chat.completions.runTools({
        model, messages, stream,
        tools: [{ type: 'function', function: { ...named, parameters, parse: JSON.parse, function: ({ city }) => `rain in ${city}` } }],
      })
      const content = await run.finalContent()
      assert.match(content, /The tool answered: "rain in Hello"/)
    })
  }

  test('reasoning', async () => {
    const thinking = { model, messages, enable_thinking: true }
    const { message } = (await openai.chat.completions.create(thinking)).choices[0]
    assert.equal(message.reasoning_content, thought)
    const whole = { reasoning: '', content: '' }
    for await (const { choices: [{ delta }] } of await openai.chat.completions.create({ ...thinking, stream: true })) {
      whole.reasoning += delta.reasoning_content ?? ''
      whole.content += delta.content ?? ''
    }
    assert.deepEqual(whole, { reasoning: thought, content: said('Hello') })
  })

  test('images', async () => {
    const content = [{ type: 'text', text: 'Hello' }, { type: 'image_url', image_url: { url: `data:image/png;base64,${pixel}` } }]
    const { choices: [{ message }] } = await openai.chat.completions.create({ model, messages: [{ role: 'user', content }] })
    assert.equal(message.content, said('Hello') + ' Images sent along: 1.')
  })

  test('structured output', async () => {
    const request = { model, messages, response_format: zodResponseFormat(City, 'city') }
    const whole = await openai.chat.completions.parse(request)
    const streamed = await openai.chat.completions.stream(request).finalChatCompletion()
    for (const { choices: [{ message }] } of [whole, streamed]) assert.deepEqual(message.parsed, { city: 'Hello' })
  })

  test('embeddings, as base64 and as numbers', async () => {
    const input = ['Hello', 'there']
    const base64 = await openai.embeddings.create({ model: 'text-embedding-v4', input }) // the SDK asks for base64 and decodes it
    const float = await openai.embeddings.create({ model: 'text-embedding-v4', input, encoding_format: 'float' })
    for (const i of [0, 1]) {
      const got = Float32Array.from(base64.data[i].embedding)
      assert.ok(Math.abs(got.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-5)
      assert.deepEqual(got, Float32Array.from(float.data[i].embedding))
    }
  })

  test('text completions', async () => {
    const whole = await openai.completions.create({ model, prompt: 'Hello' })
    assert.equal(whole.choices[0].text, said('Hello'))
    let text = ''
    for await (const chunk of await openai.completions.create({ model, prompt: 'Hello', stream: true })) text += chunk.choices[0].text
    assert.equal(text, said('Hello'))
  })

  test('responses', async () => {
    const whole = await openai.responses.create({ model, input: 'Hello', instructions: 'Be brief.' })
    assert.equal(whole.output_text, said('Hello'))
    const stream = openai.responses.stream({ model, input: 'Hello', enable_thinking: true })
    const types = []
    for await (const { type } of stream) if (type !== types.at(-1)) types.push(type)
    assert.deepEqual(types, [
      'created', 'in_progress',
      'output_item.added', 'reasoning_summary_part.added', 'reasoning_summary_text.delta', 'reasoning_summary_text.done',
      'reasoning_summary_part.done', 'output_item.done',
      'output_item.added', 'content_part.added', 'output_text.delta', 'output_text.done', 'content_part.done', 'output_item.done',
      'completed',
    ].map(type => 'response.' + type))
    const final = await stream.finalResponse()
    assert.equal(final.output_text, said('Hello'))
    assert.equal(final.output[0].summary[0].text, thought)
    const parsed = await openai.responses.parse({ model, input: 'Hello', text: { format: zodTextFormat(City, 'city') } })
    assert.deepEqual(parsed.output_parsed, { city: 'Hello' })
  })

  test('responses with images', async () => {
    const content = [{ type: 'input_text', text: 'Hello' }, { type: 'input_image', image_url: `data:image/png;base64,${pixel}`, detail: 'auto' }]
    const { output_text } = await openai.responses.create({ model, input: [{ role: 'user', content }] })
    assert.equal(output_text, said('Hello') + ' Images sent along: 1.')
  })

  for (const stream of [false, true]) {
    test(`responses with tools${stream ? ', streaming' : ''}`, async () => {
      const request = { model, input: messages, tools: [{ type: 'function', ...named, parameters, strict: true }] }
      const ask = request => stream ? openai.responses.stream(request).finalResponse() : openai.responses.create(request)
      const { output: [call] } = await ask(request)
      assert.deepEqual([call.type, call.name, call.arguments], ['function_call', 'weather', '{"city":"Hello"}'])
      const output = { type: 'function_call_output', call_id: call.call_id, output: 'rain' }
      const { output_text } = await ask({ ...request, input: [...messages, call, output] })
      assert.match(output_text, /The tool answered: "rain"/)
    })
  }

  const streams = {
    chat: (openai, model, text) => openai.chat.completions.create({ model, messages: [{ role: 'user', content: text }], stream: true }),
    completion: (openai, model, text) => openai.completions.create({ model, prompt: text, stream: true }),
    response: (openai, model, text) => openai.responses.create({ model, input: text, stream: true }),
  }
  for (const [name, open] of Object.entries(streams)) {
    test(`abort: ${name}`, async () => {
      const proxy = await start()
      const stream = await open(new OpenAI({ baseURL: proxy.url, apiKey: 'any' }), model, long)
      let chunks = 0
      for await (const _ of stream) if (++chunks === 8) stream.controller.abort()
      assert.ok(chunks < 100, `${chunks} chunks`) // chunks that had already arrived still count
      await noOpenStreams(proxy)
    })

    test(`error: Qwen breaking off in mid-stream: ${name}`, async () => {
      const stream = await open(openai, 'error-midstream', 'Hello')
      await assert.rejects(async () => { for await (const _ of stream); }, error => {
        assert.ok(error instanceof OpenAI.APIError, error)
        assert.match(error.message, /broke in the middle/)
        assert.match(error.requestID, /^[\w.-]{10,}$/)
        return true
      })
    })
  }

  testRateLimit(({ url }) => new OpenAI({ baseURL: url, apiKey: 'any' }).chat.completions.create({ model, messages }))

  test('error: a bad request', async () => {
    await assert.rejects(openai.chat.completions.create({ model, messages: 'Hello' }), error => {
      assert.ok(error instanceof OpenAI.BadRequestError)
      assert.deepEqual([error.param, error.code, error.type], ['messages', 'invalid_type', 'invalid_request_error'])
      return true
    })
  })

  const classes = {
    400: OpenAI.BadRequestError, 401: OpenAI.AuthenticationError, 403: OpenAI.PermissionDeniedError, 404: OpenAI.NotFoundError,
    429: OpenAI.RateLimitError, 500: OpenAI.InternalServerError, 502: OpenAI.InternalServerError, 503: OpenAI.InternalServerError,
  }
  testErrors(
    ({ url, key, model, text, maxRetries }) => new OpenAI({ baseURL: url, apiKey: key, maxRetries })
      .chat.completions.create({ model, messages: [{ role: 'user', content: text }] }),
    (error, status) => {
      assert.ok(error instanceof (classes[status] ?? OpenAI.APIError), error)
      return error
    })

  test('after a sign-in', async () => {
    const proxy = await start({}, signIn)
    const openai = new OpenAI({ baseURL: proxy.url, apiKey: 'any' })
    assert.equal((await openai.chat.completions.create({ model, messages })).choices[0].message.content, said('Hello'))
    const stream = await openai.responses.stream({ model, input: 'Hello' }).finalResponse()
    assert.equal(stream.output_text, said('Hello'))
  })
})

suite('openai 6', OpenAI6, helpers6)
suite('openai 7', OpenAI7, helpers7)
