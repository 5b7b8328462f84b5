// Anthropic's official client for Node against the server that TIDEMILL_BASE_URL names.
import assert from 'node:assert/strict'
import { test } from 'node:test'

import Anthropic, { BadRequestError, NotFoundError } from '@anthropic-ai/sdk'
import { zodOutputFormat } from '@anthropic-ai/sdk/helpers/zod'
import { z } from 'zod'

import { baseURL, model, untilIdle } from './server.mjs'

const client = new Anthropic({ baseURL: baseURL.replace(/\/v1$/, ''), apiKey: 'none', maxRetries: 0 })
const request = { model, max_tokens: 16, temperature: 0, messages: [{ role: 'user', content: 'What is gravity?' }] }
const Place = z.object({ city: z.enum(['Emden', 'Husum']), unit: z.enum(['C', 'F']) })
const weather = { name: 'weather', description: 'The weather', input_schema: z.toJSONSchema(Place) }

test('the stream helper says the same as the whole message', async () => {
  const whole = await client.messages.create(request)
  assert.equal(whole.stop_reason, 'max_tokens')
  assert.equal(whole.usage.output_tokens, 16)
  const stream = client.messages.stream(request)
  let text = ''
  stream.on('text', (piece) => text += piece)
  const final = await stream.finalMessage()
  assert.equal(text, whole.content[0].text)
  assert.deepEqual(final.content.map((block) => block.text), [text])
})

test('an aborted stream frees its place', async () => {
  const stream = client.messages.stream({ ...request, messages: [{ role: 'user', content: 'Count from one to a thousand.' }], max_tokens: 4000 })
  let seen = 0
  await assert.rejects(async () => {
    for await (const event of stream) {
      if (event.type === 'content_block_delta' && ++seen === 2) stream.abort()
    }
    await stream.finalMessage()
  }, Anthropic.APIUserAbortError)
  await untilIdle()
})

test('a tool is used, whole and streamed, and its result is taken', async () => {
  const options = { ...request, max_tokens: 80, tools: [weather], tool_choice: { type: 'tool', name: 'weather' } }
  const message = await client.messages.create(options)
  assert.equal(message.stop_reason, 'tool_use')
  const [use] = message.content
  Place.parse(use.input)
  const streamed = await client.messages.stream(options).finalMessage()
  assert.deepEqual(streamed.content[0].input, use.input)
  const result = { type: 'tool_result', tool_use_id: use.id, content: 'rain' }
  const turns = [...request.messages, { role: 'assistant', content: message.content }, { role: 'user', content: [result] }]
  assert.ok((await client.messages.create({ ...request, messages: turns, tools: [weather], tool_choice: { type: 'none' } })).content[0].text)
})

test('an answer of the asked form is parsed', async () => {
  const message = await client.messages.parse({ ...request, max_tokens: 80, output_config: { format: zodOutputFormat(Place) } })
  Place.parse(message.parsed_output)
})

test('tokens are counted, and refusals typed', async () => {
  const { input_tokens } = await client.messages.countTokens({ model, messages: request.messages })
  assert.ok(input_tokens > 0)
  await assert.rejects(client.messages.create({ ...request, temperature: 3 }), BadRequestError)
  await assert.rejects(client.messages.create({ ...request, model: 'nobody/home' }), NotFoundError)
})
