// The official OpenAI client for Node, as published, against the server that TIDEMILL_BASE_URL names.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'

import OpenAI, { APIUserAbortError, BadRequestError, NotFoundError, toFile } from 'openai'
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from 'openai/helpers/zod'
import { z } from 'zod'

import { baseURL, busy, model, until, untilIdle } from './server.mjs'

const client = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0, timeout: 240_000 })
const messages = [{ role: 'user', content: 'What is gravity?' }]
const request = { model, messages, temperature: 0, max_tokens: 16 }

const Colour = z.object({ name: z.enum(['red', 'green']), warm: z.boolean() })
const Place = z.object({ city: z.enum(['Emden', 'Husum']), unit: z.enum(['C', 'F']) })

describe('chat', () => {
  test('an answer and its usage', async () => {
    const { data, request_id } = await client.chat.completions.create(request).withResponse()
    assert.match(data.id, /^chatcmpl-/)
    assert.ok(data.choices[0].message.content)
    assert.equal(data.choices[0].finish_reason, 'length')
    assert.equal(data.usage.completion_tokens, 16)
    assert.equal(data.usage.total_tokens, data.usage.prompt_tokens + 16)
    assert.ok(request_id)
  })

  test('a stream says the same as the whole, with usage at its end', async () => {
    const whole = await client.chat.completions.create(request)
    const stream = await client.chat.completions.create({ ...request, stream: true, stream_options: { include_usage: true } })
    let text = ''
    let usage
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? ''
      usage = chunk.usage ?? usage
    }
    assert.equal(text, whole.choices[0].message.content)
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens)
    assert.equal(usage.prompt_tokens, whole.usage.prompt_tokens)
  })

  test('the stream helper gathers deltas and log-probabilities', async () => {
    const stream = client.chat.completions.stream({ ...request, logprobs: true, top_logprobs: 2 })
    const pieces = []
    stream.on('content.delta', ({ delta }) => pieces.push(delta))
    const final = await stream.finalChatCompletion()
    assert.equal(pieces.join(''), final.choices[0].message.content)
    assert.equal(final.choices[0].logprobs.content.length, 16)
    assert.ok(final.choices[0].logprobs.content.every((token) => token.top_logprobs.length === 2))
  })

  test('an aborted stream frees its place', async () => {
    const abort = new AbortController()
    const stream = await client.chat.completions.create(
      { ...request, max_tokens: 4000, ignore_eos: true, stream: true }, { signal: abort.signal })
    let seen = 0
    for await (const _ of stream) {
      if (++seen === 3) {
        assert.ok((await busy()) >= 1)
        abort.abort()
      }
    }
    await untilIdle()
  })

  test('an aborted request is the client’s own error, and frees its place', async () => {
    const abort = new AbortController()
    const answer = client.chat.completions.create({ ...request, max_tokens: 4000, ignore_eos: true }, { signal: abort.signal })
    const rejected = assert.rejects(answer, APIUserAbortError)
    await until(async () => (await busy()) > 0)
    abort.abort()
    await rejected
    await untilIdle()
  })

  test('stored chats are listed, changed and deleted', async () => {
    const made = await client.chat.completions.create({ ...request, store: true, metadata: { from: 'node' } })
    const listed = []
    for await (const kept of client.chat.completions.list({ metadata: { from: 'node' } })) listed.push(kept.id)
    assert.deepEqual(listed, [made.id])
    const changed = await client.chat.completions.update(made.id, { metadata: { from: 'elsewhere' } })
    assert.deepEqual(changed.metadata, { from: 'elsewhere' })
    assert.equal((await client.chat.completions.delete(made.id)).deleted, true)
    await assert.rejects(client.chat.completions.retrieve(made.id), NotFoundError)
  })
})

describe('errors', () => {
  test('a refusal is typed and names its parameter', async () => {
    await assert.rejects(client.chat.completions.create({ ...request, temperature: 3 }), (error) => {
      assert.ok(error instanceof BadRequestError)
      assert.equal(error.status, 400)
      assert.equal(error.type, 'invalid_request_error')
      assert.equal(error.param, 'temperature')
      assert.equal(error.code, 'decimal_above_max_value')
      assert.ok(error.requestID)
      return true
    })
  })

  test('a refused stream rejects before it begins', async () => {
    await assert.rejects(client.chat.completions.create({ ...request, stream: true, nope: 1 }), BadRequestError)
  })

  test('an unknown model', async () => {
    await assert.rejects(client.chat.completions.create({ ...request, model: 'gpt-9' }), (error) => {
      assert.ok(error instanceof NotFoundError)
      assert.equal(error.code, 'model_not_found')
      return true
    })
  })

  test('a busy server is tried again, after as long as it says', async () => {
    const narrow = process.env.TIDEMILL_NARROW_URL
    const held = []
    const one = new OpenAI({ baseURL: narrow, apiKey: 'none', maxRetries: 0 })
    // One runs, one waits: there is no third place.
    for (const count of [1, 2]) {
      const abort = new AbortController()
      held.push(abort)
      one.chat.completions.create({ ...request, max_tokens: 4000, ignore_eos: true }, { signal: abort.signal }).catch(() => {})
      await until(async () => (await busy(narrow)) === count)
    }
    const full = await one.chat.completions.create(request).then(() => assert.fail('there was a third place'), (error) => error)
    assert.equal(full.status, 503)
    assert.equal(full.code, 'queue_full')
    assert.ok(Number(full.headers.get('retry-after')) >= 1)
    const statuses = []
    const patient = new OpenAI({
      baseURL: narrow, apiKey: 'none', maxRetries: 20,
      fetch: async (...call) => {
        const response = await fetch(...call)
        statuses.push(response.status)
        if (response.status === 503) held.forEach((abort) => abort.abort())
        return response
      },
    })
    const answer = await patient.chat.completions.create(request)
    assert.ok(answer.choices[0].message.content)
    assert.equal(statuses[0], 503)
    assert.equal(statuses.at(-1), 200)
  })
})

describe('structured output', () => {
  test('zodResponseFormat: the answer is parsed', async () => {
    const answer = await client.chat.completions.parse({
      ...request, messages: [{ role: 'user', content: 'Describe red.' }], max_tokens: 300, response_format: zodResponseFormat(Colour, 'colour'),
    })
    assert.equal(answer.choices[0].finish_reason, 'stop')
    assert.deepEqual(Colour.parse(answer.choices[0].message.parsed), answer.choices[0].message.parsed)
  })

  test('zodResponseFormat in a stream', async () => {
    const stream = client.chat.completions.stream({ ...request, max_tokens: 300, response_format: zodResponseFormat(Colour, 'colour') })
    const final = await stream.finalChatCompletion()
    Colour.parse(final.choices[0].message.parsed)
  })
})

describe('tools', () => {
  const options = { ...request, messages: [{ role: 'user', content: 'What is the weather in Emden?' }], max_tokens: 200 }

  test('runTools calls a named function with what the schema allows', async () => {
    const calls = []
    const runner = client.chat.completions.runTools({
      ...options,
      tool_choice: { type: 'function', function: { name: 'weather' } },
      tools: [zodFunction({ name: 'weather', parameters: Place, function: (place) => (calls.push(place), 'rain') })],
    })
    await runner.done()
    assert.equal(calls.length, 1)
    Place.parse(calls[0])
  })

  test('runTools goes on with the results, streaming', async () => {
    const calls = []
    const runner = client.chat.completions.runTools({
      ...options, stream: true, parallel_tool_calls: false, tool_choice: 'required',
      tools: [zodFunction({ name: 'weather', parameters: Place, function: (place) => (calls.push(place), 'rain') })],
    }, { maxChatCompletions: 2 })
    await runner.done()
    assert.equal(calls.length, 2)
    calls.forEach((place) => Place.parse(place))
    const roles = runner.messages.map((message) => message.role)
    assert.deepEqual(roles, ['user', 'assistant', 'tool', 'assistant', 'tool'])
  })

  test('a streamed call adds up', async () => {
    const stream = client.chat.completions.stream({ ...options, tool_choice: 'required', parallel_tool_calls: false,
      tools: [zodFunction({ name: 'weather', parameters: Place })],
    })
    const pieces = []
    stream.on('tool_calls.function.arguments.delta', (event) => pieces[event.index] = (pieces[event.index] ?? '') + event.arguments_delta)
    const { message, finish_reason } = (await stream.finalChatCompletion()).choices[0]
    assert.equal(finish_reason, 'tool_calls')
    assert.deepEqual(message.tool_calls.map((call) => call.function.arguments), pieces)
    message.tool_calls.forEach((call) => Place.parse(call.function.parsed_arguments))
  })
})

describe('responses', () => {
  const options = { model, temperature: 0, max_output_tokens: 32 }

  test('one goes on from another', async () => {
    const first = await client.responses.create({ ...options, input: 'Name a sea.' })
    assert.ok(first.output_text)
    const second = await client.responses.create({ ...options, input: 'Another?', previous_response_id: first.id })
    assert.equal(second.previous_response_id, first.id)
    assert.ok(second.usage.input_tokens > first.usage.input_tokens)
    await client.responses.delete(first.id)
    await assert.rejects(client.responses.retrieve(first.id), NotFoundError)
  })

  test('the stream helper gathers what the events say', async () => {
    const stream = client.responses.stream({ ...options, input: 'Name a sea.' })
    let text = ''
    stream.on('response.output_text.delta', (event) => text += event.delta)
    const final = await stream.finalResponse()
    assert.equal(final.output_text, text)
  })

  test('zodTextFormat and zodResponsesFunction', async () => {
    const made = await client.responses.parse({ ...options, max_output_tokens: 300, input: 'Describe red.', text: { format: zodTextFormat(Colour, 'colour') } })
    Colour.parse(made.output_parsed)
    const called = await client.responses.parse({
      ...options, max_output_tokens: 200, input: 'The weather in Emden?', tool_choice: 'required', parallel_tool_calls: false,
      tools: [zodResponsesFunction({ name: 'weather', parameters: Place })],
    })
    Place.parse(called.output.find((item) => item.type === 'function_call').parsed_arguments)
  })
})

describe('the rest', () => {
  test('models', async () => {
    const listed = []
    for await (const found of client.models.list()) listed.push(found.id)
    assert.deepEqual(listed, [model])
    assert.equal((await client.models.retrieve(model)).object, 'model')
  })

  test('completions', async () => {
    const answer = await client.completions.create({ model, prompt: 'The tide mill', max_tokens: 8, temperature: 0 })
    assert.equal(answer.usage.completion_tokens, 8)
    let text = ''
    for await (const chunk of await client.completions.create({ model, prompt: 'The tide mill', max_tokens: 8, temperature: 0, stream: true }))
      text += chunk.choices[0].text
    assert.equal(text, answer.choices[0].text)
  })

  test('embeddings, as base64 and as numbers', async () => {
    const one = await client.embeddings.create({ model, input: ['creek', 'sea'] })
    const other = await client.embeddings.create({ model, input: ['creek', 'sea'], encoding_format: 'float' })
    assert.equal(one.data.length, 2)
    assert.deepEqual(one.data.map((item) => Array.from(item.embedding, Math.fround)), other.data.map((item) => Array.from(item.embedding, Math.fround)))
  })

  test('files and batches', async () => {
    const line = { custom_id: 'a', method: 'POST', url: '/v1/chat/completions', body: request }
    const file = await client.files.create({ file: await toFile(Buffer.from(JSON.stringify(line) + '\n'), 'in.jsonl'), purpose: 'batch' })
    let batch = await client.batches.create({ input_file_id: file.id, endpoint: '/v1/chat/completions', completion_window: '24h' })
    while (!['completed', 'failed', 'expired', 'cancelled'].includes(batch.status)) {
      await new Promise((done) => setTimeout(done, 100))
      batch = await client.batches.retrieve(batch.id)
    }
    assert.equal(batch.status, 'completed')
    const [row] = (await (await client.files.content(batch.output_file_id)).text()).trim().split('\n').map((text) => JSON.parse(text))
    assert.equal(row.custom_id, 'a')
    assert.ok(row.response.body.choices[0].message.content)
  })
})
