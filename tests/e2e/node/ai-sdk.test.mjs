// The Vercel AI SDK against the server that TIDEMILL_BASE_URL names: as an OpenAI-compatible server, and as OpenAI itself.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'

import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { APICallError, embed, embedMany, generateObject, generateText, isStepCount, Output, streamText, tool } from 'ai'
import { z } from 'zod'

import { baseURL, model, untilIdle } from './server.mjs'

const compatible = createOpenAICompatible({ name: 'tidemill', baseURL, apiKey: 'none', includeUsage: true, supportsStructuredOutputs: true })
const openai = createOpenAI({ baseURL, apiKey: 'none' })
const providers = { compatible: compatible(model), chat: openai.chat(model), responses: openai.responses(model) }
const common = { temperature: 0, maxRetries: 0 }
const prompt = 'What is gravity?'

const Colour = z.object({ name: z.enum(['red', 'green']), warm: z.boolean() })
const Place = z.object({ city: z.enum(['Emden', 'Husum']), unit: z.enum(['C', 'F']) })

for (const [name, languageModel] of Object.entries(providers)) {
  const options = { ...common, model: languageModel }

  describe(name, () => {
    test('text and usage', async () => {
      const { text, usage, finishReason, warnings } = await generateText({ ...options, prompt, maxOutputTokens: 16 })
      assert.ok(text)
      assert.equal(finishReason, 'length')
      assert.equal(usage.outputTokens, 16)
      assert.ok(usage.inputTokens > 0)
      assert.deepEqual(warnings ?? [], [])
    })

    test('a stream says the same as the whole', async () => {
      const whole = await generateText({ ...options, prompt, maxOutputTokens: 16 })
      const stream = streamText({ ...options, prompt, maxOutputTokens: 16, onError: ({ error }) => assert.fail(error) })
      let text = ''
      for await (const piece of stream.textStream) text += piece
      assert.equal(text, whole.text)
      assert.equal((await stream.usage).outputTokens, 16)
      assert.equal(await stream.finishReason, 'length')
    })

    test('an aborted stream frees its place', async () => {
      const abort = new AbortController()
      const stream = streamText({ ...options, prompt: 'Count from one to a thousand.', maxOutputTokens: 4000, abortSignal: abort.signal })
      let seen = 0
      for await (const _ of stream.textStream) {
        if (++seen === 2) abort.abort()
      }
      await untilIdle()
    })

    test('an object of the asked form, by both of its names', async () => {
      const { output } = await generateText({ ...options, prompt: 'Describe red.', maxOutputTokens: 300, output: Output.object({ schema: Colour }) })
      Colour.parse(output)
      const { object } = await generateObject({ ...options, prompt: 'Describe red.', maxOutputTokens: 300, schema: Colour })
      Colour.parse(object)
    })

    test('a streamed object grows', async () => {
      const stream = streamText({ ...options, prompt: 'Describe red.', maxOutputTokens: 300, output: Output.object({ schema: Colour }) })
      let last
      for await (const partial of stream.partialOutputStream) last = partial
      assert.deepEqual(last, Colour.parse(await stream.output))
    })

    test('one of several choices', async () => {
      const { output } = await generateText({ ...options, prompt: 'Is the sea wet?', maxOutputTokens: 100, output: Output.choice({ options: ['yes', 'no'] }) })
      assert.ok(['yes', 'no'].includes(output))
    })

    test('a named tool is called, and the answer goes on from its result', async () => {
      const calls = []
      const { steps } = await generateText({
        ...options, prompt: 'What is the weather in Emden?', maxOutputTokens: 80,
        tools: { weather: tool({ description: 'The weather', inputSchema: Place, execute: (place) => (calls.push(place), { sky: 'rain' }) }) },
        prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: 'tool', toolName: 'weather' } : 'none' }),
        stopWhen: isStepCount(2),
      })
      assert.equal(calls.length, 1)
      Place.parse(calls[0])
      assert.equal(steps[0].finishReason, 'tool-calls')
      assert.equal(steps.length, 2)
      assert.equal(steps[1].toolCalls.length, 0)
    })

    test('a required tool in a stream', async () => {
      const stream = streamText({
        ...options, prompt: 'What is the weather in Emden?', maxOutputTokens: 80, toolChoice: 'required',
        tools: { weather: tool({ description: 'The weather', inputSchema: Place }) }, onError: ({ error }) => assert.fail(error),
      })
      const calls = await stream.toolCalls
      assert.ok(calls.length >= 1)
      calls.forEach((call) => Place.parse(call.input))
    })

    test('a refusal is an APICallError that says why', async () => {
      await assert.rejects(generateText({ ...options, prompt, temperature: 3 }), (error) => {
        assert.ok(APICallError.isInstance(error))
        assert.equal(error.statusCode, 400)
        assert.equal(error.isRetryable, false)
        assert.match(error.message, /temperature/)
        return true
      })
    })
  })
}

test('completions', async () => {
  const { text } = await generateText({ ...common, model: compatible.completionModel(model), prompt: 'The tide mill', maxOutputTokens: 8 })
  assert.ok(text)
})

test('embeddings', async () => {
  for (const provider of [compatible, openai]) {
    const { embedding, usage } = await embed({ model: provider.embeddingModel(model), value: 'creek', maxRetries: 0 })
    assert.ok(embedding.length > 0 && usage.tokens > 0)
    const { embeddings } = await embedMany({ model: provider.embeddingModel(model), values: ['creek', 'sea'], maxRetries: 0 })
    assert.deepEqual(embeddings[0].length, embedding.length)
  }
})
