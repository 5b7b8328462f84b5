//! Which part of a model one of several devices has (Shoeybi et al. 2019, "Megatron-LM").
//!
//! What reads the residual stream is cut by output features: q, k, v by heads, gate and up. What adds to it is cut by input features:
//! attention output and down; the ranks' results add up to the whole. Embedding and output are cut by tokens. Norms are on every rank. Where
//! there are more ranks than key-value heads, several ranks hold the same head.
//!
//! Every rank has a part of every expert, cut as a dense feed-forward part is. The router is whole on every rank: all have the same stream, bit
//! for bit, and compute the same way with it, so each sends the same rows to the same experts without a word.

use std::borrow::Cow;
use std::ops::Range;

use tidemill_kernels::{Format, MatrixSource, Place, Store};

use super::weight_names::{Part, Weight};
use crate::adapter::Projection;
use crate::load_error::LoadError;
use crate::model_config::{ExpertConfig, ModelConfig};
use crate::model_files::{ExpertPart, FileMatrix, Mixture, MixtureMatrix, ModelFiles};

/// More devices than one machine has.
const MOST: usize = 64;

/// A rank's part of a model.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    place: Place,
    /// Sizes of the part: heads, key-value heads and feed-forward width are the rank's own.
    local: ModelConfig,
    /// The rank's query heads, key-value heads, features of a feed-forward part (or of each expert, and of the shared one) and tokens, as the
    /// whole model counts them.
    heads: Range<usize>,
    kv_heads: Range<usize>,
    intermediate: Range<usize>,
    shared: Range<usize>,
    tokens: Range<usize>,
}

/// What a rank has of a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Cut {
    Whole,
    /// Output features.
    Rows(Range<usize>),
    /// Input features.
    Columns(Range<usize>),
    /// Output features that may lie beyond the last, where zeros are.
    Padded(Range<usize>),
}

/// What of a model cannot be shared out among so many devices.
fn misfit(config: &ModelConfig, ranks: usize) -> Option<(usize, &'static str)> {
    let &ModelConfig { heads, kv_heads, intermediate, experts, .. } = config;
    let each = if experts.is_some() { "features of each expert" } else { "feed-forward features" };
    let shared = experts.and_then(|experts| experts.shared).unwrap_or(0);
    let counts = [
        (heads, heads.is_multiple_of(ranks), "attention heads"),
        (kv_heads, kv_heads.is_multiple_of(ranks) || ranks.is_multiple_of(kv_heads), "key-value heads"),
        (intermediate, intermediate.is_multiple_of(ranks), each),
        (shared, shared.is_multiple_of(ranks), "features of the shared expert"),
    ];
    counts.into_iter().find(|(_, fits, _)| !fits).map(|(count, _, what)| (count, what))
}

/// Why a model cannot be shared out among so many devices.
fn refusal(config: &ModelConfig, ranks: usize) -> Option<String> {
    let (count, what) = misfit(config, ranks)?;
    let others: Vec<String> = degrees(config).iter().map(usize::to_string).collect();
    Some(format!("the model's {count} {what} cannot be shared out among {ranks} devices; take one of {}", others.join(", ")))
}

/// Numbers of devices that a model can be shared out among, ascending; 1 is the first.
pub(crate) fn degrees(config: &ModelConfig) -> Vec<usize> {
    (1..=MOST).filter(|ranks| misfit(config, *ranks).is_none()).collect()
}

/// Those of them by which no block of the files' formats is cut.
pub(crate) fn degrees_of(files: &ModelFiles) -> Result<Vec<usize>, LoadError> {
    let config = files.config();
    let mut degrees = degrees(config);
    let mut keep = |k: usize, format: Format| degrees.retain(|ranks| *ranks == 1 || format.row_bytes(k / ranks).is_some());
    for weight in config.weights() {
        if let Weight::Layer(_, Part::AttentionOutput | Part::Down) = weight {
            keep(config.shape_of(weight).1, files.need(weight)?.format);
        }
    }
    for layer in 0..config.layers {
        for which in config.mixtures() {
            if let Mixture::Expert(_, ExpertPart::Down) | Mixture::Shared(ExpertPart::Down) = which {
                let matrix = files.mixture(layer, which)?;
                keep(matrix.k, matrix.format);
            }
        }
    }
    Ok(degrees)
}

impl Shard {
    /// The part of the device at `place`, or what does not divide and what would.
    pub fn new(config: &ModelConfig, place: Place) -> Result<Self, String> {
        let Place { rank, ranks } = place;
        if ranks > 1
            && let Some(why) = refusal(config, ranks)
        {
            return Err(why);
        }
        let part = |count: usize| count / ranks * rank..count / ranks * (rank + 1);
        let kv_heads = match config.kv_heads.is_multiple_of(ranks) {
            true => part(config.kv_heads),
            // Several ranks have one head.
            false => rank * config.kv_heads / ranks..rank * config.kv_heads / ranks + 1,
        };
        let each = config.vocabulary.div_ceil(ranks);
        let (heads, intermediate, tokens) = (part(config.heads), part(config.intermediate), rank * each..(rank + 1) * each);
        let shared = part(config.experts.and_then(|experts| experts.shared).unwrap_or(0));
        let local = ModelConfig {
            heads: heads.len(),
            kv_heads: kv_heads.len(),
            intermediate: intermediate.len(),
            experts: config.experts.map(|e| ExpertConfig { shared: e.shared.map(|_| shared.len()), ..e }),
            ..config.clone()
        };
        Ok(Self { place, local, heads, kv_heads, intermediate, shared, tokens })
    }

    /// Which rank's it is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The sizes of the part.
    pub fn local(&self) -> &ModelConfig {
        &self.local
    }

    /// The part's query heads, as the whole model counts them.
    pub fn heads(&self) -> Range<usize> {
        self.heads.clone()
    }

    /// The first token of the part of embedding and output.
    pub fn first_token(&self) -> usize {
        self.tokens.start
    }

    /// Tokens of that part, those included that no model has.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Whether it is the rank that adds biases to the residual stream, and samples.
    pub fn leads(&self) -> bool {
        self.place.rank == 0
    }

    /// What becomes of the residual stream when a part of a result comes to it: it is whole on the first rank, and on the others nothing but
    /// that part, so that the sum over all ranks is the stream and what came to it.
    pub fn residual(&self) -> Store {
        if self.leads() { Store::Add } else { Store::Replace }
    }

    fn cut(&self, weight: Weight) -> Cut {
        if self.place.is_alone() {
            return Cut::Whole;
        }
        let of_heads = |heads: &Range<usize>| heads.start * self.local.head_dim..heads.end * self.local.head_dim;
        match weight {
            Weight::Embedding | Weight::Output => Cut::Padded(self.tokens.clone()),
            Weight::FinalNorm => Cut::Whole,
            Weight::Layer(_, part) => match part {
                Part::Query | Part::QueryBias => Cut::Rows(of_heads(&self.heads)),
                Part::Key | Part::Value | Part::KeyBias | Part::ValueBias => Cut::Rows(of_heads(&self.kv_heads)),
                Part::Gate | Part::Up | Part::GateBias | Part::UpBias => Cut::Rows(self.intermediate.clone()),
                Part::AttentionOutput => Cut::Columns(of_heads(&self.heads)),
                Part::Down => Cut::Columns(self.intermediate.clone()),
                Part::AttentionNorm
                | Part::PostAttentionNorm
                | Part::FeedForwardNorm
                | Part::PostFeedForwardNorm
                | Part::QueryNorm
                | Part::KeyNorm
                | Part::AttentionOutputBias
                | Part::DownBias => Cut::Whole,
            },
        }
    }

    fn cut_mixture(&self, which: Mixture) -> Cut {
        let (part, features) = match which {
            // What decides where tokens go, and how much of the shared expert they get, is the same on all ranks.
            Mixture::Router | Mixture::SharedGate => return Cut::Whole,
            Mixture::Expert(_, part) => (part, &self.intermediate),
            Mixture::Shared(part) => (part, &self.shared),
        };
        match part {
            _ if self.place.is_alone() => Cut::Whole,
            ExpertPart::Gate | ExpertPart::Up => Cut::Rows(features.clone()),
            ExpertPart::Down => Cut::Columns(features.clone()),
        }
    }

    /// The rank's part of a matrix. Of what was cut by input features, the part's rows are copied out; the rest of the file is not read.
    ///
    /// Errors: input features that are cut inside a block of a block format.
    pub fn matrix<'a>(&self, weight: Weight, whole: FileMatrix<'a>) -> Result<MatrixShard<'a>, String> {
        self.part(self.cut(weight), whole)
    }

    /// The rank's part of a matrix of a layer's experts; as [`Shard::matrix`].
    pub fn mixture<'a>(&self, which: Mixture, whole: MixtureMatrix<'a>) -> Result<MatrixShard<'a>, String> {
        let cut = self.cut_mixture(which);
        if let Some(whole) = whole.by_rows() {
            return self.part(cut, whole);
        }
        let columns = if let Cut::Columns(columns) = cut { columns } else { 0..whole.k };
        let (k, data) = (columns.len(), Cow::Owned(whole.turned(columns)));
        let MixtureMatrix { n, format, .. } = whole;
        Ok(MatrixShard { n, k, format, data, row_order: None, zeros: Vec::new(), file_bytes: whole.bytes() as u64 })
    }

    fn part<'a>(&self, cut: Cut, whole: FileMatrix<'a>) -> Result<MatrixShard<'a>, String> {
        let FileMatrix { n, k, format, data, row_order } = whole;
        let (row_bytes, file_bytes) = (data.len() / n.max(1), data.len() as u64);
        match cut {
            Cut::Whole => Ok(MatrixShard { n, k, format, data: Cow::Borrowed(data), row_order, zeros: Vec::new(), file_bytes }),
            Cut::Rows(rows) => {
                // Rows are reordered inside their heads only.
                let row_order = row_order.map(|order| order[rows.clone()].iter().map(|row| row - rows.start as u32).collect());
                let data = Cow::Borrowed(&data[rows.start * row_bytes..rows.end * row_bytes]);
                Ok(MatrixShard { n: rows.len(), k, format, data, row_order, zeros: Vec::new(), file_bytes })
            }
            Cut::Padded(rows) => {
                let (first, last) = (rows.start.min(n), rows.end.min(n));
                let zeros = vec![0; (rows.len() - (last - first)) * row_bytes];
                let data = Cow::Borrowed(&data[first * row_bytes..last * row_bytes]);
                Ok(MatrixShard { n: last - first, k, format, data, row_order: None, zeros, file_bytes })
            }
            Cut::Columns(columns) => {
                let (first, width) = (format.row_bytes(columns.start), format.row_bytes(columns.len()));
                let (Some(first), Some(width)) = (first, width) else { return Err(self.cuts_blocks(k, format)) };
                let mut part = Vec::with_capacity(n * width);
                data.chunks_exact(row_bytes.max(1)).for_each(|row| part.extend_from_slice(&row[first..first + width]));
                Ok(MatrixShard { n, k: columns.len(), format, data: Cow::Owned(part), row_order, zeros: Vec::new(), file_bytes })
            }
        }
    }

    fn cuts_blocks(&self, k: usize, format: Format) -> String {
        let (ranks, block) = (self.place.ranks, format.block_len());
        let whole: Vec<String> =
            (1..=MOST).filter(|ranks| k.is_multiple_of(ranks * block)).map(|ranks| ranks.to_string()).collect();
        format!(
            "its {k} input features in blocks of {block} ({format:?}) cannot be shared out among {ranks} devices; take one of {}, or a \
             file of another format",
            whole.join(", ")
        )
    }

    /// The rank's part of a vector.
    pub fn vector(&self, weight: Weight, whole: Vec<f32>) -> Vec<f32> {
        match self.cut(weight) {
            Cut::Rows(rows) | Cut::Columns(rows) | Cut::Padded(rows) => {
                whole.into_iter().skip(rows.start).take(rows.len()).collect()
            }
            Cut::Whole => whole,
        }
    }

    /// The rank's parts of an adapter's factors `a [rank, in]` and `b [out, rank]`, with the part's output and input features.
    pub fn factors<'a>(&self, projection: Projection, rank: usize, a: &'a [f32], b: &'a [f32]) -> FactorShards<'a> {
        let (n, k) = projection.shape(&self.local);
        let (a, b) = match self.cut(Weight::Layer(0, projection.part())) {
            Cut::Rows(rows) => (Cow::Borrowed(a), Cow::Borrowed(&b[rows.start * rank..rows.end * rank])),
            Cut::Columns(columns) => {
                let width = a.len() / rank.max(1);
                let rows = a.chunks_exact(width.max(1));
                (rows.flat_map(|row| &row[columns.clone()]).copied().collect(), Cow::Borrowed(b))
            }
            Cut::Whole | Cut::Padded(_) => (Cow::Borrowed(a), Cow::Borrowed(b)),
        };
        FactorShards { n, k, a, b }
    }
}

/// A rank's part of an adapter's factors.
pub(crate) struct FactorShards<'a> {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// `[rank, k]`
    pub a: Cow<'a, [f32]>,
    /// `[n, rank]`
    pub b: Cow<'a, [f32]>,
}

/// A rank's part of a matrix, as it lies in a file or was copied out of it.
#[derive(Debug)]
pub(crate) struct MatrixShard<'a> {
    n: usize,
    k: usize,
    format: Format,
    data: Cow<'a, [u8]>,
    row_order: Option<Vec<u32>>,
    /// Rows of zeros behind it.
    zeros: Vec<u8>,
    /// Of the whole matrix.
    file_bytes: u64,
}

impl MatrixShard<'_> {
    /// Storage format of the file.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes of the file that it was cut from.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// For kernels: to be stacked.
    pub fn sources(&self) -> impl Iterator<Item = MatrixSource<'_>> {
        let &Self { n, k, format, .. } = self;
        let own = MatrixSource { n, k, format, data: &self.data, row_order: self.row_order.as_deref() };
        let row_bytes = format.row_bytes(k).unwrap_or(1).max(1);
        // Zeros are zeros in every format.
        let padding = MatrixSource { n: self.zeros.len() / row_bytes, k, format, data: &self.zeros, row_order: None };
        [own, padding].into_iter().filter(|source| source.n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_config::{Family, RopeScaling};

    fn config(heads: usize, kv_heads: usize, intermediate: usize, vocabulary: usize) -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            hidden: 8,
            intermediate,
            layers: 1,
            heads,
            kv_heads,
            head_dim: 2,
            vocabulary,
            max_positions: 16,
            rms_eps: 1e-5,
            layer_norm: false,
            clip_qkv: None,
            alibi: None,
            softmax_scale: None,
            gated: true,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            sliding_window: None,
            experts: None,
            tied_embeddings: false,
            qkv_bias: true,
            output_bias: true,
            mlp_bias: true,
            qk_norm: false,
            gemma: None,
        }
    }

    /// With experts, one of them every token's.
    fn mixture(intermediate: usize, shared: usize) -> ModelConfig {
        let experts = ExpertConfig { count: 3, each: 2, normalised: true, shared: Some(shared) };
        ModelConfig { family: Family::Qwen2Moe, experts: Some(experts), mlp_bias: false, ..config(8, 4, intermediate, 11) }
    }

    fn shards(config: &ModelConfig, ranks: usize) -> Vec<Shard> {
        (0..ranks).map(|rank| Shard::new(config, Place { rank, ranks }).unwrap()).collect()
    }

    const fn at(part: Part) -> Weight {
        Weight::Layer(0, part)
    }

    /// Parts of one shape, which together are all of the numbers of a matrix, and zeros where there are more.
    fn assert_whole(shards: &[Shard], (n, k): (usize, usize), cut: impl Fn(&Shard) -> Cut) {
        let data: Vec<u8> = (0..n * k).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let whole = || FileMatrix { n, k, format: Format::F32, data: &data, row_order: None };
        let parts: Vec<(usize, usize, Vec<u8>)> = shards
            .iter()
            .map(|shard| {
                let part = shard.part(cut(shard), whole()).unwrap();
                assert_eq!(part.file_bytes(), data.len() as u64);
                let sources: Vec<_> = part.sources().collect();
                (sources.iter().map(|s| s.n).sum(), sources[0].k, sources.iter().flat_map(|s| s.data).copied().collect())
            })
            .collect();
        let joined: Vec<u8> = match cut(&shards[0]) {
            Cut::Whole => parts[0].2.clone(),
            Cut::Rows(_) | Cut::Padded(_) => parts.iter().flat_map(|(.., data)| data).copied().collect(),
            Cut::Columns(_) => (0..n)
                .flat_map(|row| parts.iter().flat_map(move |(_, k, data)| &data[row * k * 4..(row + 1) * k * 4]))
                .copied()
                .collect(),
        };
        assert_eq!(joined[..data.len()], data);
        assert!(joined[data.len()..].iter().all(|byte| *byte == 0));
        assert!(parts.iter().all(|part| (part.0, part.1) == (parts[0].0, parts[0].1)), "ranks have parts of one shape");
    }

    #[test]
    fn the_parts_of_all_ranks_are_the_whole() {
        let config = config(8, 4, 12, 11);
        for ranks in [1, 2, 4] {
            let shards = shards(&config, ranks);
            for weight in config.weights() {
                println!("{weight:?} of {ranks}");
                assert_whole(&shards, config.shape_of(weight), |shard| shard.cut(weight));
            }
        }
    }

    #[test]
    fn every_rank_has_a_part_of_every_expert_and_the_whole_router() {
        let config = mixture(12, 20);
        for ranks in [1, 2, 4] {
            let shards = shards(&config, ranks);
            let local = shards[0].local();
            assert_eq!((local.intermediate, local.experts.unwrap().shared), (12 / ranks, Some(20 / ranks)));
            let all = config.mixtures();
            assert_eq!(all.len(), 1 + 3 * 3 + 3 + 1);
            for which in all {
                println!("{which:?} of {ranks}");
                let (width, whole) = match which {
                    Mixture::Router => (3, true),
                    Mixture::SharedGate => (1, true),
                    Mixture::Expert(..) => (12, false),
                    Mixture::Shared(_) => (20, false),
                };
                let down = matches!(which, Mixture::Expert(_, ExpertPart::Down) | Mixture::Shared(ExpertPart::Down));
                let shape = if down { (config.hidden, width) } else { (width, config.hidden) };
                assert_whole(&shards, shape, |shard| shard.cut_mixture(which));
                assert_eq!(shards[0].cut_mixture(which) == Cut::Whole, whole || ranks == 1);
            }
        }
    }

    #[test]
    fn more_ranks_than_key_value_heads_share_heads() {
        let config = config(8, 2, 8, 8);
        let shards = shards(&config, 4);
        assert_eq!(shards.iter().map(|s| s.kv_heads.clone()).collect::<Vec<_>>(), [0..1, 0..1, 1..2, 1..2]);
        // The head that a rank has is the one that its query heads read.
        for shard in &shards {
            assert!(shard.heads.clone().all(|head| shard.kv_heads.contains(&(head / 4))), "{shard:?}");
        }
    }

    #[test]
    fn a_reordered_head_stays_reordered() {
        let config = config(4, 4, 8, 8);
        let order = vec![1, 0, 3, 2, 5, 4, 7, 6];
        let data: Vec<u8> = (0..8 * 8).collect();
        let whole = FileMatrix { n: 8, k: 2, format: Format::F32, data: &data, row_order: Some(order) };
        let part = shards(&config, 2)[1].matrix(at(Part::Query), whole).unwrap();
        let source = part.sources().next().unwrap();
        assert_eq!((source.n, source.row_order, source.data[0]), (4, Some(&[1, 0, 3, 2][..]), 32));
    }

    #[test]
    fn what_does_not_divide_is_named_with_what_would() {
        let refused = |config: &ModelConfig, ranks| Shard::new(config, Place { rank: 0, ranks }).unwrap_err();
        let smol = config(9, 3, 1536, 49_152);
        let text = refused(&smol, 2);
        assert!(text.contains("9 attention heads") && text.contains("2 devices") && text.ends_with("1, 3"), "{text}");
        assert!(refused(&config(8, 8, 10, 8), 4).contains("10 feed-forward features"));
        assert!(refused(&config(12, 3, 12, 8), 2).contains("3 key-value heads"));
        assert_eq!(degrees(&config(32, 8, 14_336, 128_256)), [1, 2, 4, 8, 16, 32]);
        let text = refused(&mixture(12, 20), 8);
        assert!(text.contains("12 features of each expert") && text.ends_with("1, 2, 4"), "{text}");
        assert!(refused(&mixture(16, 20), 8).contains("20 features of the shared expert"));
        assert_eq!(degrees(&mixture(16, 24)), [1, 2, 4, 8]);
    }

    #[test]
    fn a_block_is_not_cut() {
        let config = config(4, 4, 96, 8);
        let data = vec![0; 8 * Format::Q4_0.row_bytes(96).unwrap()];
        let whole = || FileMatrix { n: 8, k: 96, format: Format::Q4_0, data: &data, row_order: None };
        let text = shards(&config, 2)[0].matrix(at(Part::Down), whole()).unwrap_err();
        assert!(text.contains("96 input features") && text.contains("blocks of 32") && text.contains("one of 1, 3,"), "{text}");
        let of_experts = shards(&mixture(96, 96), 2);
        let text = of_experts[0].part(of_experts[0].cut_mixture(Mixture::Expert(1, ExpertPart::Down)), whole()).unwrap_err();
        assert!(text.contains("96 input features") && text.contains("(Q4_0)"), "{text}");
        let config = ModelConfig { heads: 3, kv_heads: 3, ..config };
        let third = shards(&config, 3);
        assert_eq!(third[2].matrix(at(Part::Down), whole()).unwrap().k, 32);
    }

    #[test]
    fn factors_are_cut_as_their_matrices_are() {
        let config = config(4, 2, 8, 8);
        let shards = shards(&config, 2);
        let a: Vec<f32> = (0..16).map(|v| v as f32).collect();
        let down = shards[1].factors(Projection::Down, 2, &a, &[9.0; 16]);
        assert_eq!((down.n, down.k, &down.a[..], down.b.len()), (8, 4, &[4.0, 5.0, 6.0, 7.0, 12.0, 13.0, 14.0, 15.0][..], 16));
        let key = shards[1].factors(Projection::Key, 2, &a, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        assert_eq!((key.n, key.k, key.a.len(), &key.b[..]), (2, 8, 16, &[4.0, 5.0, 6.0, 7.0][..]));
    }
}
