//! A model that serves two sequences in all ways at once.

use tidemill_kernels::*;

use super::Noise;
use super::decoder::{Decoder, DecoderShape, DecoderWeights};
use super::steps::{BLOCK, Sequence, append};

pub const LIMITS: Limits = Limits { max_tokens: 48, max_samples: 8, max_positions: 128 };
const VOCABULARY: usize = 67;

/// A model with places for its blocks in the machine's memory.
pub fn decoder<O: Ops>(ops: O) -> Decoder<O> {
    let shape = DecoderShape {
        experts: None,
        layers: 1,
        hidden: 64,
        heads: HeadShape { heads: 2, kv_heads: 1, head_dim: 64 },
        ffn: 64,
        vocabulary: VOCABULARY,
        qk_norm: false,
        qkv_bias: false,
        spec: AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None, alibi: None },
    };
    let weights = DecoderWeights::random(3, shape, Format::Bf16, Format::Bf16);
    let mut decoder = Decoder::new(ops, &weights, WeightFormat::Auto, 12, KvDtype::Bf16);
    let kv = decoder.kv;
    decoder.ops.alloc_swap(kv, 4).unwrap();
    decoder
}

/// Two prompts of which one is so long that a library multiplies, then decoding, one step ahead where `ahead`; an adapter comes and the first
/// sequence's blocks move through the machine's memory on the way. Stops at the first error.
pub fn serve<O: Ops>(decoder: &mut Decoder<O>, ahead: bool) -> Result<Vec<Vec<Sampled>>, KernelError> {
    let noise = &mut Noise::new(9);
    let mut list: Vec<Sequence> = [30usize, 4]
        .iter()
        .enumerate()
        .map(|(i, &len)| Sequence {
            tokens: (0..len).map(|_| noise.below(VOCABULARY) as u32).collect(),
            table: vec![2 * i as u32, 2 * i as u32 + 1],
            computed: 0,
        })
        .collect();
    let (mut all, mut out, mut under_way) = (Vec::new(), StepOutput::default(), 0);
    for step in 0..9 {
        let mut batch = StepBatch::default();
        if step == 5 {
            batch.saved = vec![(list[0].table[0], 3), (list[0].table[1], 1)];
            list[0].table = vec![9, 8];
            batch.restored = vec![(3, 9), (1, 8)];
        }
        for (i, sequence) in list.iter_mut().enumerate() {
            let known = sequence.tokens.len();
            if sequence.computed == known {
                batch.carried.push((batch.tokens.len() as u32, i as u32));
                sequence.tokens.push(0);
            }
            let rows = sequence.tokens.len() - sequence.computed;
            append(&mut batch, sequence, rows);
            sequence.tokens.truncate(known);
            batch.samples.push(SampleRow { top_n: Some(2), ..SampleRow::greedy(batch.tokens.len() as u32 - 1) });
        }
        if step == 4 {
            decoder.try_load_adapter(&mut Noise::new(5), 0, 4)?;
        }
        if step >= 4 {
            batch.adapters = vec![0, NO_ADAPTER];
        }
        assert!(list.iter().all(|s| s.computed <= 2 * BLOCK));
        decoder.submit(&batch)?;
        under_way += 1;
        if ahead && under_way < 2 {
            continue;
        }
        under_way -= 1;
        decoder.ops.collect(&mut out)?;
        list.iter_mut().zip(&out.samples).for_each(|(sequence, sampled)| sequence.tokens.push(sampled.token));
        all.push(out.samples.clone());
    }
    while under_way > 0 {
        under_way -= 1;
        decoder.ops.collect(&mut out)?;
        all.push(out.samples.clone());
    }
    Ok(all)
}
