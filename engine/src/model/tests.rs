//! Experts in block formats on several devices: blocks are cut whole or not at all, and what the parts compute is what one device computes.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tidemill_kernels::blocks::quantize_row;
use tidemill_kernels::collective::Member;
use tidemill_kernels::random::uniform;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::{Format, KvDtype, Limits, SampleRow, SequenceSpan, StepBatch, StepOutput, WeightFormat};

use super::{Decoder, Model, TensorParallel, shard};
use crate::gguf::storage_number;
use crate::gguf::writer::Writer;
use crate::model_files::ModelFiles;

const LIMITS: Limits = Limits { max_tokens: 16, max_samples: 16, max_positions: 32 };
const HIDDEN: usize = 64;
/// Features of an expert: two blocks.
const WIDTH: usize = 64;
const EXPERTS: usize = 4;
const VOCABULARY: usize = 12;

fn values(seed: u64, count: usize) -> Vec<f32> {
    (0..count as u64).map(|i| (uniform(seed, i) - 0.5) as f32).collect()
}

/// Random rows of `k` in a format.
fn rows(seed: u64, rows: usize, k: usize, format: Format) -> Vec<u8> {
    let values = values(seed, rows * k);
    if format == Format::F32 {
        return values.iter().flat_map(|v| v.to_le_bytes()).collect();
    }
    let mut bytes = vec![0; rows * format.row_bytes(k).unwrap()];
    for (row, to) in values.chunks(k).zip(bytes.chunks_mut(format.row_bytes(k).unwrap())) {
        quantize_row(format, row, to).unwrap();
    }
    bytes
}

/// A Mixtral of one layer whose experts' matrices lie in a format.
fn mixtral(folder: &TempDir, format: Format) -> PathBuf {
    let names: Vec<String> = (0..VOCABULARY).map(|i| format!("{}", (b'a' + i as u8) as char)).collect();
    let mut writer = Writer::new()
        .text("general.architecture", "llama")
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 32)
        .u32("llama.embedding_length", HIDDEN as u32)
        .u32("llama.feed_forward_length", WIDTH as u32)
        .u32("llama.attention.head_count", 4)
        .u32("llama.attention.head_count_kv", 2)
        .u32("llama.expert_count", EXPERTS as u32)
        .u32("llama.expert_used_count", 2)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .texts("tokenizer.ggml.tokens", &names)
        .i32s("tokenizer.ggml.token_type", &[1; VOCABULARY])
        .texts::<&str>("tokenizer.ggml.merges", &[])
        .u32("tokenizer.ggml.eos_token_id", 0);
    for (name, width) in [("output_norm", HIDDEN), ("blk.0.attn_norm", HIDDEN), ("blk.0.ffn_norm", HIDDEN)] {
        writer = writer.f32_tensor(&format!("{name}.weight"), &[width as u64], &vec![1.0; width]);
    }
    let matrices = [
        ("token_embd", 1, VOCABULARY, HIDDEN, Format::F32),
        ("output", 1, VOCABULARY, HIDDEN, Format::F32),
        ("blk.0.attn_q", 1, HIDDEN, HIDDEN, Format::F32),
        ("blk.0.attn_k", 1, HIDDEN / 2, HIDDEN, Format::F32),
        ("blk.0.attn_v", 1, HIDDEN / 2, HIDDEN, Format::F32),
        ("blk.0.attn_output", 1, HIDDEN, HIDDEN, Format::F32),
        ("blk.0.ffn_gate_inp", 1, EXPERTS, HIDDEN, Format::F32),
        ("blk.0.ffn_gate_exps", EXPERTS, WIDTH, HIDDEN, format),
        ("blk.0.ffn_up_exps", EXPERTS, WIDTH, HIDDEN, format),
        ("blk.0.ffn_down_exps", EXPERTS, HIDDEN, WIDTH, format),
    ];
    for (seed, (name, experts, n, k, format)) in matrices.into_iter().enumerate() {
        let shape: Vec<u64> = [experts, n, k].into_iter().skip(usize::from(experts == 1)).map(|d| d as u64).collect();
        let data = rows(seed as u64, experts * n, k, format);
        writer = writer.tensor(&format!("{name}.weight"), &shape, storage_number(format), &data);
    }
    let path = folder.path().join(format!("{format:?}.gguf"));
    fs::write(&path, writer.bytes()).unwrap();
    path
}

fn shared_out(path: &Path, ranks: usize) -> Result<TensorParallel, String> {
    let members = Member::group(ranks);
    let abort = members[0].abort_handle();
    let rank = |member| ("a rank".to_owned(), Box::new(Reference::of_group(LIMITS, member)) as Box<dyn tidemill_kernels::Ops>);
    let ranks = members.into_iter().map(rank).collect();
    let files = ModelFiles::open(path).unwrap();
    TensorParallel::load(&files, ranks, abort, WeightFormat::Auto, &mut |_, _| {}).map_err(|error| error.to_string())
}

/// The log-probabilities of all tokens after each of a prompt's.
fn log_probabilities(mut model: impl Model) -> Vec<Vec<(u32, f32)>> {
    model.alloc_kv(1, 32, KvDtype::F32).unwrap();
    let tokens: Vec<u32> = (0..VOCABULARY as u32).collect();
    let rows = tokens.len() as u32;
    let every = |row| SampleRow { score: Some(0), top_n: Some(rows), ..SampleRow::greedy(row) };
    let batch = StepBatch {
        positions: (0..rows).collect(),
        slots: (0..i64::from(rows)).collect(),
        sequences: vec![SequenceSpan { first_row: 0, rows, context_len: rows, first_block: 0 }],
        blocks: vec![0],
        samples: (0..rows).map(every).collect(),
        tokens,
        ..StepBatch::default()
    };
    let mut out = StepOutput::default();
    model.forward(&batch, &mut out).unwrap();
    let by_token = |mut top: Vec<(u32, f32)>| {
        top.sort_by_key(|(token, _)| *token);
        top
    };
    out.samples.into_iter().map(|sampled| by_token(sampled.top)).collect()
}

#[test]
fn experts_in_whole_blocks_are_shared_out_and_others_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (format, degrees) in [(Format::F32, vec![1, 2, 4]), (Format::Q8_0, vec![1, 2]), (Format::Q4_0, vec![1, 2])] {
        let path = mixtral(&folder, format);
        let files = ModelFiles::open(&path).unwrap();
        assert_eq!(shard::degrees_of(&files).unwrap(), degrees, "{format:?}");
        let alone = Decoder::load(&files, Box::new(Reference::new(LIMITS)), WeightFormat::Auto, &mut |_, _| {}).unwrap();
        let want = log_probabilities(alone);
        for ranks in degrees {
            let got = log_probabilities(shared_out(&path, ranks).unwrap());
            for ((token, got), (wanted, want)) in got.iter().flatten().zip(want.iter().flatten()) {
                assert!(token == wanted && (got - want).abs() < 1e-4, "{format:?} on {ranks}: {got} {want}");
            }
        }
        if format != Format::F32 {
            let why = shared_out(&path, 4).err().unwrap();
            let parts = ["blk.0.ffn_down_exps.weight", "64 input features", &format!("({format:?})"), "take one of 1, 2,"];
            assert!(parts.iter().all(|part| why.contains(part)), "{why}");
        }
    }
}

#[test]
fn experts_count_in_what_a_card_must_hold() {
    let folder = tempfile::tempdir().unwrap();
    let files = ModelFiles::open(&mixtral(&folder, Format::F32)).unwrap();
    assert_eq!(files.packed_bytes(WeightFormat::F32).unwrap(), 4 * files.parameters());
    assert_eq!(files.packed_bytes(WeightFormat::Bf16).unwrap(), 2 * files.parameters());
    let quantised = ModelFiles::open(&mixtral(&folder, Format::Q4_0)).unwrap();
    let experts = (3 * EXPERTS * HIDDEN * WIDTH) as u64;
    let rest = 4 * (quantised.parameters() - experts);
    assert_eq!(quantised.packed_bytes(WeightFormat::Auto).unwrap(), rest + experts * 5 / 8);
}
