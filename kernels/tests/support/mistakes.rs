//! Mistakes of a model file and of a scheduler.

use tidemill_kernels::*;

use super::backend::Backend;
use super::scenarios::plain_step;
use super::steps::greedy;
use super::{Noise, Weight};

/// Each mistake comes back from `finish` or `begin`, and leaves the backend usable.
pub fn come_back(ops: &mut dyn Backend) {
    let noise = &mut Noise::new(1);
    let table = ops.load_table(noise, 50, 32);
    let weight = ops.load_vector(&[1.0; 32]).unwrap();
    let [a, b] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, 32));
    let narrow = ops.alloc(Rows::Tokens, 16).unwrap();
    let sampled = ops.alloc(Rows::Samples, 32).unwrap();
    let weights: Vec<Weight> = (0..32).map(|_| Weight::random(noise, 8, 32, Format::F32, 1.0)).collect();
    let experts: Vec<_> = weights.iter().map(|w| vec![w.source()]).collect();
    let uneven = vec![experts[0].clone(), vec![weights[1].source(), weights[2].source()]];
    assert!(matches!(ops.load_experts(&uneven, WeightFormat::F32), Err(KernelError::Shape { op: "load_experts", .. })));
    let experts = ops.load_experts(&experts, WeightFormat::F32).unwrap();
    let logits = ops.alloc(Rows::Tokens, 32).unwrap();
    let routed = ops.alloc(Rows::Routed { each: 2 }, 8).unwrap();
    assert!(ops.alloc_routing(RoutingShape { experts: 2, each: 3 }).is_err());
    let routing = ops.alloc_routing(RoutingShape { experts: 32, each: 2 }).unwrap();
    let (qkv, attended) = (ops.alloc(Rows::Tokens, 24).unwrap(), ops.alloc(Rows::Tokens, 8).unwrap());
    let kv =
        ops.alloc_kv(KvSpec { layers: 1, blocks: 1, block_size: 32, kv_heads: 1, head_dim: 8, dtype: KvDtype::F32 }).unwrap();
    let step = plain_step(noise, 5, 50);
    let mut attempt = |op: &'static str, run: &dyn Fn(&mut dyn Backend)| {
        ops.begin(&step).unwrap();
        run(ops);
        // What follows a mistake must not hide it.
        ops.embedding(table, a);
        match ops.finish(&mut StepOutput::default()) {
            Err(KernelError::Shape { op: named, .. }) => assert_eq!(named, op),
            other => panic!("{op}: {other:?}"),
        }
        ops.begin(&step).unwrap();
        ops.embedding(table, a);
        ops.rms_norm(a, weight, 1e-5, b);
        ops.run();
        assert!(ops.read(b).unwrap().iter().all(|v| v.is_finite()));
    };
    attempt("embedding", &|ops| ops.embedding(table, narrow));
    attempt("embedding", &|ops| ops.embedding(Matrix(77), a));
    attempt("rms_norm", &|ops| ops.rms_norm(a, weight, 1e-5, a));
    attempt("rms_norm", &|ops| ops.rms_norm(a, weight, 1e-5, narrow));
    attempt("layer_norm", &|ops| ops.layer_norm(a, weight, 1e-5, narrow));
    attempt("clamp", &|ops| ops.clamp(Buf(99), 1.0));
    attempt("clamp", &|ops| ops.clamp(a, -1.0));
    attempt("rms_norm_add", &|ops| ops.rms_norm_add(a, weight, 1e-5, narrow));
    attempt("scale", &|ops| ops.scale(Buf(99), 2.0));
    attempt("soft_cap", &|ops| ops.soft_cap(a, 0.0));
    attempt("gelu_tanh_and_mul", &|ops| ops.gelu_tanh_and_mul(narrow, a));
    attempt("linear", &|ops| ops.linear(a, table, None, b, Store::Replace));
    attempt("linear", &|ops| ops.linear(a, table, None, sampled, Store::Replace));
    attempt("silu_and_mul", &|ops| ops.silu_and_mul(narrow, a));
    attempt("gelu", &|ops| ops.gelu(a, narrow));
    attempt("expert_linear", &|ops| ops.expert_linear(a, experts, routing, routed));
    attempt("combine", &|ops| ops.combine(routed, routing, a, Store::Add));
    attempt("route", &|ops| ops.route(narrow, true, routing));
    attempt("expert_linear", &|ops| {
        ops.embedding(table, logits);
        ops.route(logits, true, routing);
        ops.expert_linear(routed, experts, routing, b);
    });
    attempt("combine", &|ops| {
        ops.embedding(table, logits);
        ops.route(logits, true, routing);
        ops.combine(routed, routing, narrow, Store::Add);
    });
    attempt("gate_rows", &|ops| ops.gate_rows(narrow, a));
    attempt("gather", &|ops| ops.gather(sampled, a));
    attempt("sample", &|ops| ops.sample(sampled, 33));
    attempt("sample", &|ops| ops.sample(Buf(99), 33));
    let heads = HeadShape { heads: 1, kv_heads: 1, head_dim: 8 };
    attempt("rope_cache", &|ops| ops.rope_cache(a, heads, None, Rope(0), KvCache(0), 0));
    let spec = AttentionSpec { scale: 1.0, sliding_window: None, soft_cap: None, alibi: Some(weight) };
    attempt("paged_attention", &|ops| ops.paged_attention(qkv, heads, spec, kv, 0, attended));

    let mut wrong = step.clone();
    wrong.positions[2] = 77;
    assert!(matches!(ops.begin(&wrong), Err(KernelError::Shape { op: "begin", .. })));
    let mut wrong = step.clone();
    (wrong.slots[1], wrong.slots[4]) = (33, 33);
    assert!(matches!(ops.begin(&wrong), Err(KernelError::Shape { op: "begin", .. })));
    let mut wrong = step.clone();
    wrong.samples[0] = greedy(5);
    assert!(matches!(ops.begin(&wrong), Err(KernelError::Shape { op: "begin", .. })));
    assert!(matches!(ops.begin(&plain_step(noise, 71, 50)), Err(KernelError::Limit(_))));
    let spec = KvSpec { layers: 1 << 20, blocks: 1 << 30, block_size: 32, kv_heads: 64, head_dim: 128, dtype: KvDtype::F32 };
    assert!(matches!(ops.alloc_kv(spec), Err(KernelError::Memory { .. })));
    assert!(ops.alloc(Rows::Tokens, usize::MAX / 8).is_err());
}
