//! Time per step outside the model: scheduling, writing the batch, text and events. The model here answers at once.
//!
//! `cargo bench -p tidemill-engine --bench step_overhead`

#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

use std::time::Instant;
use tidemill_engine::model::Model;
use tidemill_engine::{
    Engine, EngineOptions, Event, Frontend, GenerationDefaults, Request, RequestId, SamplingParams, ServedModel, Tenant,
    Tokenizer,
};
use tidemill_kernels::{KernelError, KvDtype, MemoryUse, Sampled, StepBatch, StepOutput};

struct Instantly;

impl Model for Instantly {
    fn vocabulary(&self) -> usize {
        256
    }
    fn kv_block_bytes(&self, _block_size: usize, _dtype: KvDtype) -> usize {
        1
    }
    fn alloc_kv(&mut self, _blocks: usize, _block_size: usize, _dtype: KvDtype) -> Result<(), KernelError> {
        Ok(())
    }
    fn forward(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<(), KernelError> {
        out.samples.clear();
        out.samples.extend(
            batch
                .samples
                .iter()
                .map(|sample| Sampled { token: ((sample.row * 31 + sample.counter as u32 * 7) % 26) + 97, ..Sampled::default() }),
        );
        Ok(())
    }
    fn memory(&self) -> MemoryUse {
        MemoryUse::default()
    }
    fn describe(&self) -> String {
        "answers at once".into()
    }
}

/// One token per byte, from a `tokenizer.json` made here.
fn tokenizer() -> Result<Tokenizer, Box<dyn std::error::Error>> {
    let vocabulary: serde_json::Map<String, serde_json::Value> =
        (0..256u32).map(|id| (printable(id as u8).to_string(), id.into())).collect();
    let level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let model = serde_json::json!({"type": "BPE", "vocab": vocabulary, "merges": []});
    let file = tempfile::NamedTempFile::new()?;
    let text =
        serde_json::json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model});
    std::fs::write(file.path(), text.to_string())?;
    Ok(Tokenizer::from_json(file.path(), &serde_json::Value::Null)?)
}

/// GPT-2's printable stand-in for a byte.
fn printable(byte: u8) -> char {
    let own = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if own(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !own(*b)).count() as u32;
    char::from_u32(256 + before).unwrap_or('?')
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("{:>9} {:>8} {:>10} {:>12}", "sequences", "context", "steps", "µs per step");
    for (sequences, context, stops) in
        [(1, 128, false), (8, 128, false), (32, 128, false), (32, 128, true), (32, 4000, false), (64, 128, false)]
    {
        let frontend = Frontend {
            tokenizer: tokenizer()?,
            chat_template: None,
            generation_defaults: GenerationDefaults::default(),
            end_of_turn: vec![0],
            pooling: Ok(tidemill_engine::Pooling::default()),
        };
        let served = ServedModel { model: Box::new(Instantly), frontend, context: 8192, description: String::new() };
        let options = EngineOptions { kv_memory: Some(20_000), ..EngineOptions::new("bench") };
        let engine = Engine::with_model(served, options)?;
        let sampling = SamplingParams {
            max_tokens: Some(2000),
            ignore_eos: true,
            stop: if stops { vec!["\n\nUser:".into(), "###".into()] } else { Vec::new() },
            ..Default::default()
        };
        let clients: Vec<_> = (0..sequences)
            .map(|i| {
                let request = Request {
                    id: RequestId(i),
                    prompt: (0..context).map(|p| (p * 13 + i as u32) % 200).collect(),
                    sampling: sampling.clone(),
                    priority: 0,
                    cache_salt: None,
                    adapter: None,
                    tenant: Tenant::default(),
                    deadline: None,
                };
                engine.submit(request)
            })
            .collect::<Result<_, _>>()?;
        let start = Instant::now();
        let reader = std::thread::spawn(move || {
            let mut open = clients;
            while !open.is_empty() {
                open.retain(|client| !client.drain().any(|event| matches!(event, Event::Done(_))));
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        });
        reader.join().map_err(|_| "a reader panicked")?;
        let (stats, wall) = (engine.stats(), start.elapsed());
        let per_step = stats.overhead.as_secs_f64() * 1e6 / stats.steps as f64;
        let name = if stops { "with stop strings" } else { "" };
        println!(
            "{sequences:>9} {context:>8} {:>10} {per_step:>12.1} {name} ({:.0} ms in all)",
            stats.steps,
            wall.as_secs_f64() * 1e3
        );
    }
    Ok(())
}
