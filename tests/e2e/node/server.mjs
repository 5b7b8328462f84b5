// Where the server is, and whether it works.
import assert from 'node:assert/strict'

export const baseURL = process.env.TIDEMILL_BASE_URL
export const model = process.env.TIDEMILL_MODEL

/** Requests that run or wait. */
export async function busy(url = baseURL) {
  const text = await (await fetch(new URL('/metrics', url))).text()
  const samples = [...text.matchAll(/^tidemill:num_requests_(?:running|waiting)(?:\{.*\})? (\S+)$/gm)]
  assert.ok(samples.length >= 2, text)
  return samples.reduce((sum, sample) => sum + Number(sample[1]), 0)
}

export async function until(holds) {
  const deadline = Date.now() + 60_000
  while (!(await holds())) {
    assert.ok(Date.now() < deadline, `still not: ${holds}`)
    await new Promise((done) => setTimeout(done, 20))
  }
}

/** A request that was called off gives its place back. */
export const untilIdle = () => until(async () => (await busy()) === 0)
