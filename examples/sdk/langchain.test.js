// LangChain's OpenAI integration. By default it retries a failure for more than a minute, so the tests of errors turn that off.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { HumanMessage, ToolMessage } from '@langchain/core/messages'
import { tool } from '@langchain/core/tools'
import { ChatOpenAI, OpenAI, OpenAIEmbeddings } from '@langchain/openai'
import { long, noOpenStreams, pixel, said, start, testErrors, testRateLimit, thought, weather } from './proxy.js'

const proxy = await start()
const options = { model: 'qwen3-coder-plus', apiKey: 'any', configuration: { baseURL: proxy.url } }

// streamed returns the chunks of a stream as one message.
async function streamed(stream) {
  let whole
  for await (const chunk of await stream) whole = whole ? whole.concat(chunk) : chunk
  return whole
}

for (const useResponsesApi of [false, true]) {
  describe(useResponsesApi ? 'responses' : 'chat', { concurrency: true }, () => {
    const chat = more => new ChatOpenAI({ ...options, useResponsesApi, ...more })
    const both = async (model, input) => [await model.invoke(input), await streamed(model.stream(input))]

    test('text', async () => {
      for (const { text, usage_metadata } of await both(chat(), 'Hello')) {
        assert.equal(text, said('Hello'))
        assert.ok(usage_metadata.output_tokens > 5)
      }
    })

    test('tools', async () => {
      const rain = tool(({ city }) => `rain in ${city}`, weather)
      const model = chat().bindTools([rain])
      const question = new HumanMessage('Hello')
      for (const answer of await both(model, [question])) {
        assert.deepEqual(answer.tool_calls.map(({ name, args }) => ({ name, args })), [{ name: 'weather', args: { city: 'Hello' } }])
        const result = await rain.invoke(answer.tool_calls[0])
        assert.ok(result instanceof ToolMessage)
        for (const { text } of await both(model, [question, answer, result])) assert.match(text, /The tool answered: "rain in Hello"/)
      }
    })

    test('reasoning', async () => {
      const model = chat({ modelKwargs: { enable_thinking: true } })
      for (const { text, additional_kwargs: { reasoning_content, reasoning } } of await both(model, 'Hello')) {
        assert.equal(text, said('Hello'))
        assert.equal(useResponsesApi ? reasoning.summary.map(s => s.text).join('') : reasoning_content, thought)
      }
    })

    test('images', async () => {
      const content = [{ type: 'text', text: 'Hello' }, { type: 'image_url', image_url: { url: `data:image/png;base64,${pixel}` } }]
      for (const { text } of await both(chat(), [new HumanMessage({ content })])) assert.equal(text, said('Hello') + ' Images sent along: 1.')
    })

    test('structured output', async () => {
      const model = chat().withStructuredOutput(weather.schema, { name: 'city', method: 'jsonSchema' })
      assert.deepEqual(await model.invoke('Hello'), { city: 'Hello' })
    })

    test('abort', async () => {
      const proxy = await start()
      const abort = new AbortController()
      let chunks = 0
      await assert.rejects(async () => {
        const stream = await chat({ configuration: { baseURL: proxy.url } }).stream(long, { signal: abort.signal })
        for await (const _ of stream) if (++chunks === 8) abort.abort()
      }, /abort/i)
      await noOpenStreams(proxy)
    })

    test('error: Qwen breaking off in mid-stream', async () => {
      await assert.rejects(streamed(chat({ model: 'error-midstream', maxRetries: 0 }).stream('Hello')), /broke in the middle/)
    })

    testRateLimit(({ url }) => chat({ configuration: { baseURL: url } }).invoke('Hello'), 4)

    const codes = { 401: 'MODEL_AUTHENTICATION', 404: 'MODEL_NOT_FOUND', 429: 'MODEL_RATE_LIMIT' }
    testErrors(
      ({ url, key, model, text }) => chat({ model, apiKey: key, configuration: { baseURL: url }, maxRetries: 0 }).invoke(text),
      (error, status) => {
        assert.equal(error.lc_error_code, codes[status])
        return error
      }, 1)
  })
}

test('embeddings', async () => {
  const embeddings = await new OpenAIEmbeddings({ ...options, model: 'text-embedding-v4' }).embedDocuments(['Hello', 'there'])
  assert.deepEqual(embeddings.map(e => e.length), [64, 64])
})

test('text completions', async () => {
  const model = new OpenAI(options)
  assert.equal(await model.invoke('Hello'), said('Hello'))
  assert.equal(await streamed(model.stream('Hello')), said('Hello'))
})
