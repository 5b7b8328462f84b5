//! Engines without a server: a program that takes a load as one JSON line and answers with raw timings.
//!
//! The percentiles are computed here, from the same definitions as for HTTP servers.

use crate::chunk::Usage;
use crate::client::Exchange;
use crate::measurement::Measurement;
use crate::prompts::Prompts;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout};

/// The pipes of a harness.
pub struct Harness {
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

#[derive(Serialize)]
struct Task {
    streams: usize,
    max_tokens: u64,
    warmup: Vec<String>,
    prompts: Vec<String>,
}

#[derive(Deserialize)]
struct Answer {
    error: Option<String>,
    version: Option<String>,
    wall_s: Option<f64>,
    #[serde(default)]
    requests: Vec<RawRequest>,
}

#[derive(Deserialize)]
struct RawRequest {
    error: Option<String>,
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    #[serde(default)]
    ttft_ms: f64,
    #[serde(default)]
    gaps_ms: Vec<f64>,
}

impl Harness {
    /// Speaks over the pipes of a process that was just started.
    pub fn new((input, output): (ChildStdin, ChildStdout)) -> Self {
        Self { input, output: BufReader::new(output).lines() }
    }

    /// Waits for the line that says it is ready; gives the version.
    pub async fn ready(&mut self) -> Result<String, String> {
        let answer = self.answer().await?;
        Ok(answer.version.unwrap_or_default())
    }

    /// One load: the same prompts, in the same order, as an HTTP server gets.
    pub async fn load(
        &mut self,
        prompts: &Prompts,
        streams: usize,
        requests: u64,
        warmup: u64,
        max_tokens: u64,
    ) -> Result<Measurement, String> {
        let task = Task {
            streams,
            max_tokens,
            warmup: (0..warmup).map(|index| prompts.warmup(index)).collect(),
            prompts: (0..requests).map(|index| prompts.get(index)).collect(),
        };
        let mut line = serde_json::to_vec(&task).map_err(|error| error.to_string())?;
        line.push(b'\n');
        self.input.write_all(&line).await.map_err(|error| format!("its input: {error}"))?;
        self.input.flush().await.map_err(|error| format!("its input: {error}"))?;
        let answer = self.answer().await?;
        let wall = answer.wall_s.ok_or("its answer lacks `wall_s`")?;
        let exchanges: Vec<Exchange> = answer.requests.into_iter().map(RawRequest::into_exchange).collect();
        let cut_short = (exchanges.len() as u64) < requests;
        Ok(Measurement::of(streams, max_tokens, seconds(wall), &exchanges, cut_short))
    }

    /// The next line that is an object; libraries print other things in between.
    async fn answer(&mut self) -> Result<Answer, String> {
        loop {
            let line = self.output.next_line().await.map_err(|error| format!("its output: {error}"))?;
            let line = line.ok_or("its output ended")?;
            if line.starts_with('{') {
                let answer: Answer = serde_json::from_str(&line).map_err(|error| format!("its answer: {error}"))?;
                return answer.error.clone().map_or(Ok(answer), Err);
            }
        }
    }
}

impl RawRequest {
    fn into_exchange(self) -> Exchange {
        if self.error.is_some() {
            return Exchange { error: self.error, ..Exchange::default() };
        }
        Exchange {
            first: Some(seconds(self.ttft_ms / 1e3)),
            chunks: self.gaps_ms.len() as u64 + 1,
            gaps: self.gaps_ms.into_iter().map(|gap| seconds(gap / 1e3)).collect(),
            usage: Some(Usage { prompt_tokens: self.prompt_tokens, completion_tokens: self.completion_tokens }),
            error: None,
        }
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompts::Prefix;
    use std::process::Stdio;

    fn harness(script: &str) -> (tokio::process::Child, Harness) {
        let mut child = tokio::process::Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let pipes = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        (child, Harness::new(pipes))
    }

    #[tokio::test]
    async fn raw_timings_become_a_measurement_and_noise_is_skipped() {
        let (_child, mut harness) = harness(
            r#"echo loading; echo '{"ready": true, "version": "1.2"}'; read task; echo "$task" | grep -q '"streams":2' || exit 1
               echo warning
               echo '{"wall_s": 2.0, "requests": [{"prompt_tokens": 9, "completion_tokens": 3, "ttft_ms": 5.0, "gaps_ms": [1, 2.0]}, {"error": "boom"}]}'"#,
        );
        assert_eq!(harness.ready().await.unwrap(), "1.2");
        let sum = harness.load(&Prompts::new(1, Prefix::Cold, 8, 0), 2, 2, 1, 3).await.unwrap();
        assert_eq!((sum.completed, sum.failed, sum.output_tok_s, sum.cut_short), (1, 1, 1.5, false));
        assert_eq!(sum.ttft_ms.unwrap().p50.round(), 5.0);
    }

    #[tokio::test]
    async fn an_error_line_and_an_early_end_are_told() {
        let (_child, mut first) = harness(r#"echo '{"error": "no model"}'"#);
        assert_eq!(first.ready().await.unwrap_err(), "no model");
        assert_eq!(first.ready().await.unwrap_err(), "its output ended");
    }
}
