// `qwen-go-proxy demo` with OpenAI's SDK.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import OpenAI6 from 'openai-6'
import OpenAI7 from 'openai-7'
import { said, start, weather } from './proxy.js'

const { url } = await start({}, {}, 'demo')
const question = { model: 'qwen3-coder-plus', messages: [{ role: 'user', content: 'Hello' }] }

const suite = (name, OpenAI) => describe(name, () => {
  const openai = new OpenAI({ baseURL: url, apiKey: 'any', maxRetries: 0 })

  test('chat', async () => {
    const { choices, usage } = await openai.chat.completions.create(question)
    assert.equal(choices[0].message.content, said('Hello'))
    assert.ok(usage.total_tokens > 5)
  })

  test('chat, streaming', async () => {
    const completion = await openai.chat.completions.stream({ ...question, stream_options: { include_usage: true } }).finalChatCompletion()
    assert.equal(completion.choices[0].message.content, said('Hello'))
    assert.ok(completion.usage.total_tokens > 5)
  })

  for (const stream of [false, true]) {
    test(`a tool call${stream ? ', streaming' : ''}`, async () => {
      const { schema: parameters, ...named } = weather
      const call = { ...named, parameters, parse: JSON.parse, function: ({ city }) => `rain in ${city}` }
      const answer = await openai.chat.completions.runTools({ ...question, stream, tools: [{ type: 'function', function: call }] }).finalContent()
      assert.match(answer, /The tool answered: "rain in Hello"/)
    })
  }

  test('models that fail', async () => {
    await assert.rejects(openai.chat.completions.create({ ...question, model: 'error-500' }), OpenAI.InternalServerError)
    const stream = await openai.chat.completions.create({ ...question, model: 'error-midstream', stream: true })
    await assert.rejects(async () => { for await (const _ of stream); }, /broke in the middle/)
  })

  test('what the demo lacks', async () => {
    await assert.rejects(openai.embeddings.create({ model: 'text-embedding-v4', input: 'Hello' }), OpenAI.NotFoundError)
    await assert.rejects(openai.responses.create({ model: 'qwen3-coder-plus', input: 'Hello' }), OpenAI.NotFoundError)
  })
})

suite('openai 6', OpenAI6)
suite('openai 7', OpenAI7)
