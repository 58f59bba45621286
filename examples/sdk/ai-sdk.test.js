// The Vercel AI SDK: the newest major version and the one before it, each with its provider for OpenAI-compatible servers and with
// its provider for OpenAI, which uses the Responses API by default.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import * as ai6 from 'ai-6'
import { createOpenAI as createOpenAI6 } from 'ai-6-openai'
import { createOpenAICompatible as createOpenAICompatible6 } from 'ai-6-openai-compatible'
import * as ai7 from 'ai-7'
import { createOpenAI as createOpenAI7 } from 'ai-7-openai'
import { createOpenAICompatible as createOpenAICompatible7 } from 'ai-7-openai-compatible'
import { long, noOpenStreams, pixel, said, start, testErrors, testRateLimit, thought, weather } from './proxy.js'

const proxy = await start()
const prompt = 'Hello'
const id = 'qwen3-coder-plus'

const suite = (name, ai, createOpenAI, createOpenAICompatible) => describe(name, { concurrency: true }, () => {
  const { APICallError, Output, RetryError, embedMany, generateText, jsonSchema, stepCountIs, streamText, tool } = ai

  // providers are the ways to a model. Some have embeddings and text completions too.
  const compatible = ({ url }, apiKey = 'any') => createOpenAICompatible({
    name: 'qwen', baseURL: url, apiKey, includeUsage: true, supportsStructuredOutputs: true,
  })
  const official = ({ url }, apiKey = 'any') => createOpenAI({ baseURL: url, apiKey })
  const providers = {
    'openai-compatible': {
      chat: (proxy, id, key) => compatible(proxy, key)(id),
      embedding: compatible(proxy).embeddingModel('text-embedding-v4'),
      completion: compatible(proxy).completionModel(id),
    },
    'openai, chat': {
      chat: (proxy, id, key) => official(proxy, key).chat(id),
      embedding: official(proxy).embeddingModel('text-embedding-v4'),
      completion: official(proxy).completion(id),
    },
    'openai, responses': { chat: (proxy, id, key) => official(proxy, key)(id) },
  }

  for (const [name, { chat, embedding, completion }] of Object.entries(providers)) {
    describe(name, { concurrency: true }, () => {
      const model = chat(proxy, id)
      // both asks with and without streaming
      const both = async options => [await generateText({ model, ...options }), streamText({ model, ...options })]

      test('text', async () => {
        for (const answer of await both({ prompt })) {
          assert.equal(await answer.text, said('Hello'))
          assert.equal(await answer.finishReason, 'stop')
          assert.ok((await answer.usage).outputTokens > 5)
        }
      })

      test('tools', async () => {
        const { description, schema } = weather
        const rain = tool({ description, inputSchema: jsonSchema(schema), execute: ({ city }) => `rain in ${city}` })
        for (const answer of await both({ prompt, tools: { weather: rain }, stopWhen: stepCountIs(2) })) {
          assert.match(await answer.text, /The tool answered: "rain in Hello"/)
          assert.equal((await answer.steps).length, 2)
        }
      })

      test('images', async () => {
        const content = [{ type: 'text', text: 'Hello' }, { type: 'image', image: Buffer.from(pixel, 'base64') }]
        for (const answer of await both({ messages: [{ role: 'user', content }] })) {
          assert.equal(await answer.text, said('Hello') + ' Images sent along: 1.')
        }
      })

      test('structured output', async () => {
        for (const answer of await both({ prompt, output: Output.object({ schema: jsonSchema(weather.schema) }) })) {
          assert.deepEqual(await answer.output, { city: 'Hello' })
        }
      })

      if (name === 'openai-compatible') {
        test('reasoning', async () => {
          for (const answer of await both({ prompt, providerOptions: { qwen: { enable_thinking: true } } })) {
            assert.equal(await answer.reasoningText, thought)
            assert.equal(await answer.text, said('Hello'))
          }
        })
      }

      if (embedding) {
        test('embeddings', async () => {
          const { embeddings } = await embedMany({ model: embedding, values: ['Hello', 'there'] })
          assert.deepEqual(embeddings.map(e => e.length), [64, 64])
        })
      }

      if (completion) {
        test('text completions', async () => {
          for (const answer of await both({ model: completion, prompt })) assert.ok((await answer.text).includes('Hello'))
        })
      }

      test('abort', async () => {
        const proxy = await start()
        const abort = new AbortController()
        let words = 0
        const parts = []
        for await (const { type } of streamText({ model: chat(proxy, id), prompt: long, abortSignal: abort.signal }).fullStream) {
          parts.push(type)
          if (type === 'text-delta' && ++words === 5) abort.abort()
        }
        assert.equal(parts.at(-1), 'abort')
        await noOpenStreams(proxy)
      })

      test('error: Qwen breaking off in mid-stream', async () => {
        const parts = []
        await assert.rejects(async () => {
          for await (const part of streamText({ model: chat(proxy, 'error-midstream'), prompt, onError: () => {} }).fullStream) parts.push(part)
        }, APICallError.isInstance) // the connection is cut
        assert.equal(parts.filter(part => part.type === 'text-delta').map(part => part.text).join(''), 'This is')
        const { error } = parts.find(part => part.type === 'error') // the proxy's error event
        assert.match(error.message ?? error, /broke in the middle/)
      })

      testRateLimit(proxy => generateText({ model: chat(proxy, id), prompt }))

      testErrors(
        ({ url, key, model, text, maxRetries }) => generateText({ model: chat({ url }, model, key), prompt: text, maxRetries }),
        (error, status) => {
          if (RetryError.isInstance(error)) error = error.lastError
          assert.ok(APICallError.isInstance(error), error)
          assert.equal(error.isRetryable, status === 429 || status >= 500)
          return { status: error.statusCode, message: error.message, requestID: error.responseHeaders['x-request-id'] }
        })
    })
  }
})

suite('ai 6', ai6, createOpenAI6, createOpenAICompatible6)
suite('ai 7', ai7, createOpenAI7, createOpenAICompatible7)
