//! What the tensors of a decoder are called in each container.

use crate::model_config::Family;

/// A tensor of a decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Weight {
    /// `[vocabulary, hidden]`
    Embedding,
    /// `[hidden]`
    FinalNorm,
    /// `[vocabulary, hidden]`
    Output,
    /// A part of a layer.
    Layer(usize, Part),
}

/// A tensor of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// `[hidden]`
    AttentionNorm,
    /// `[heads * head_dim, hidden]`
    Query,
    /// `[kv_heads * head_dim, hidden]`
    Key,
    /// `[kv_heads * head_dim, hidden]`
    Value,
    /// `[heads * head_dim]`
    QueryBias,
    /// `[kv_heads * head_dim]`
    KeyBias,
    /// `[kv_heads * head_dim]`
    ValueBias,
    /// `[head_dim]`
    QueryNorm,
    /// `[head_dim]`
    KeyNorm,
    /// `[hidden, heads * head_dim]`
    AttentionOutput,
    /// `[hidden]`
    AttentionOutputBias,
    /// `[hidden]`: of Gemma, what attention gives is normed before it is added.
    PostAttentionNorm,
    /// `[hidden]`
    FeedForwardNorm,
    /// `[intermediate, hidden]`
    Gate,
    /// `[intermediate, hidden]`
    Up,
    /// `[hidden, intermediate]`
    Down,
    /// `[intermediate]`
    GateBias,
    /// `[intermediate]`
    UpBias,
    /// `[hidden]`
    DownBias,
    /// `[hidden]`: of Gemma, what the feed-forward part gives is normed before it is added.
    PostFeedForwardNorm,
}

impl Weight {
    /// Whether a norm multiplies with it.
    pub(crate) fn is_norm(self) -> bool {
        match self {
            Weight::FinalNorm => true,
            Weight::Embedding | Weight::Output => false,
            Weight::Layer(_, part) => matches!(
                part,
                Part::AttentionNorm
                    | Part::QueryNorm
                    | Part::KeyNorm
                    | Part::PostAttentionNorm
                    | Part::FeedForwardNorm
                    | Part::PostFeedForwardNorm
            ),
        }
    }
}

/// Whose names a file uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    /// `model.layers.0.self_attn.q_proj.weight`
    HuggingFace,
    /// `layers.0.self_attn.q_proj.weight`, as a model is saved that was trained to embed.
    HuggingFaceBare,
    /// As Hugging Face's, but for the norms of a layer; the tensors of the decoder begin with a stem's name.
    Gemma(Stem),
    /// `transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight`, as DBRX's publisher has them. Query, key and value are rows of one matrix.
    Dbrx,
    /// `transformer.blocks.0.attn.Wqkv.weight`, as MPT's publisher has them. Query, key and value are rows of one matrix.
    Mpt,
    /// `blk.0.attn_q.weight`
    Gguf,
    /// `blk.0.attn_qkv.weight`, DBRX in GGUF.
    GgufDbrx,
    /// `blk.0.attn_qkv.weight` and everybody's other names, MPT in GGUF.
    GgufMpt,
}

/// Where in a publisher's files a Gemma decoder lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stem {
    /// `model.`: a decoder alone.
    Model,
    /// Nothing: a decoder without its head.
    Bare,
    /// `language_model.model.`: beside a part that sees images.
    LanguageModel,
    /// `model.language_model.`: the same as transformers 5 holds it.
    ModelLanguageModel,
}

impl Stem {
    const ALL: [Stem; 4] = [Stem::Model, Stem::Bare, Stem::LanguageModel, Stem::ModelLanguageModel];

    const fn name(self) -> &'static str {
        match self {
            Stem::Model => "model.",
            Stem::Bare => "",
            Stem::LanguageModel => "language_model.model.",
            Stem::ModelLanguageModel => "model.language_model.",
        }
    }

    /// The one of files with these tensors.
    fn of<'a>(tensors: impl Iterator<Item = &'a String>) -> Self {
        let names: Vec<&String> = tensors.collect();
        let is_there = |stem: &Stem| names.contains(&&Naming::Gemma(*stem).name(Weight::Embedding));
        Stem::ALL.into_iter().find(is_there).unwrap_or(Stem::Model)
    }
}

impl Naming {
    /// What a folder of safetensors of a family uses that has nothing beside the decoder.
    pub fn of_publisher(family: Family) -> Self {
        match family {
            Family::Dbrx => Naming::Dbrx,
            Family::Mpt => Naming::Mpt,
            Family::Gemma2 | Family::Gemma3 => Naming::Gemma(Stem::Model),
            _ => Naming::HuggingFace,
        }
    }

    /// What GGUF files of a family use.
    pub fn of_gguf(family: Family) -> Self {
        match family {
            Family::Dbrx => Naming::GgufDbrx,
            Family::Mpt => Naming::GgufMpt,
            _ => Naming::Gguf,
        }
    }

    /// Whether it is GGUF's.
    pub fn is_gguf(self) -> bool {
        matches!(self, Naming::Gguf | Naming::GgufDbrx | Naming::GgufMpt)
    }

    /// Whether query, key and value are rows of one matrix.
    pub fn joins_qkv(self) -> bool {
        matches!(self, Naming::Dbrx | Naming::GgufDbrx | Naming::Mpt | Naming::GgufMpt)
    }

    /// What Hugging Face's files of a family with these tensors use.
    pub fn of<'a>(family: Family, mut tensors: impl Iterator<Item = &'a String>) -> Self {
        match Self::of_publisher(family) {
            Naming::Gemma(_) => return Naming::Gemma(Stem::of(tensors)),
            Naming::HuggingFace => {}
            own => return own,
        }
        let bare = Naming::HuggingFaceBare.name(Weight::Embedding);
        if tensors.any(|name| *name == bare) { Naming::HuggingFaceBare } else { Naming::HuggingFace }
    }

    /// The name of `weight`.
    pub fn name(self, weight: Weight) -> String {
        match (self, weight) {
            (Naming::HuggingFace, Weight::Embedding) => "model.embed_tokens.weight".to_owned(),
            (Naming::HuggingFace, Weight::FinalNorm) => "model.norm.weight".to_owned(),
            (Naming::HuggingFaceBare, Weight::Embedding) => "embed_tokens.weight".to_owned(),
            (Naming::HuggingFaceBare, Weight::FinalNorm) => "norm.weight".to_owned(),
            (Naming::Gemma(stem), Weight::Embedding) => format!("{}embed_tokens.weight", stem.name()),
            (Naming::Gemma(stem), Weight::FinalNorm) => format!("{}norm.weight", stem.name()),
            (Naming::Gemma(Stem::LanguageModel), Weight::Output) => "language_model.lm_head.weight".to_owned(),
            (Naming::Dbrx | Naming::Mpt, Weight::Embedding) => "transformer.wte.weight".to_owned(),
            (Naming::Dbrx | Naming::Mpt, Weight::FinalNorm) => "transformer.norm_f.weight".to_owned(),
            (Naming::HuggingFace | Naming::HuggingFaceBare | Naming::Gemma(_) | Naming::Dbrx | Naming::Mpt, Weight::Output) => {
                "lm_head.weight".to_owned()
            }
            (Naming::Gguf | Naming::GgufDbrx | Naming::GgufMpt, Weight::Embedding) => "token_embd.weight".to_owned(),
            (Naming::Gguf | Naming::GgufDbrx | Naming::GgufMpt, Weight::FinalNorm) => "output_norm.weight".to_owned(),
            (Naming::Gguf | Naming::GgufDbrx | Naming::GgufMpt, Weight::Output) => "output.weight".to_owned(),
            (_, Weight::Layer(layer, part)) => {
                let (hugging_face, gguf) = part.names();
                let mut name = self.layer(layer);
                name.push_str(match self {
                    Naming::HuggingFace | Naming::HuggingFaceBare => hugging_face,
                    Naming::Gemma(_) if part == Part::FeedForwardNorm => "pre_feedforward_layernorm.weight",
                    Naming::Gemma(_) => hugging_face,
                    Naming::Gguf => gguf,
                    Naming::Dbrx => part.dbrx_names().map_or(hugging_face, |names| names.0),
                    Naming::GgufDbrx => part.dbrx_names().map_or(gguf, |names| names.1),
                    Naming::Mpt => part.mpt_names().map_or(hugging_face, |names| names.0),
                    Naming::GgufMpt => part.mpt_names().map_or(gguf, |names| names.1),
                });
                name
            }
        }
    }

    /// What stands before the names of a layer's tensors.
    pub fn layer(self, layer: usize) -> String {
        match self {
            Naming::HuggingFace => format!("model.layers.{layer}."),
            Naming::HuggingFaceBare => format!("layers.{layer}."),
            Naming::Gemma(stem) => format!("{}layers.{layer}.", stem.name()),
            Naming::Dbrx | Naming::Mpt => format!("transformer.blocks.{layer}."),
            Naming::Gguf | Naming::GgufDbrx | Naming::GgufMpt => format!("blk.{layer}."),
        }
    }
}

impl Part {
    /// All that a layer can have.
    pub(crate) const ALL: [Part; 20] = [
        Part::AttentionNorm,
        Part::Query,
        Part::Key,
        Part::Value,
        Part::QueryBias,
        Part::KeyBias,
        Part::ValueBias,
        Part::QueryNorm,
        Part::KeyNorm,
        Part::AttentionOutput,
        Part::AttentionOutputBias,
        Part::PostAttentionNorm,
        Part::FeedForwardNorm,
        Part::Gate,
        Part::Up,
        Part::Down,
        Part::GateBias,
        Part::UpBias,
        Part::DownBias,
        Part::PostFeedForwardNorm,
    ];

    /// What DBRX calls it otherwise than everybody: in its publisher's files, and in GGUF.
    const fn dbrx_names(self) -> Option<(&'static str, &'static str)> {
        Some(match self {
            Part::AttentionNorm => ("norm_attn_norm.norm_1.weight", "attn_norm.weight"),
            Part::Query | Part::Key | Part::Value => ("norm_attn_norm.attn.Wqkv.weight", "attn_qkv.weight"),
            Part::AttentionOutput => ("norm_attn_norm.attn.out_proj.weight", "attn_output.weight"),
            Part::FeedForwardNorm => ("norm_attn_norm.norm_2.weight", "attn_output_norm.weight"),
            _ => return None,
        })
    }

    /// What MPT calls it otherwise than everybody: in its publisher's files, and in GGUF.
    const fn mpt_names(self) -> Option<(&'static str, &'static str)> {
        Some(match self {
            Part::AttentionNorm => ("norm_1.weight", "attn_norm.weight"),
            Part::Query | Part::Key | Part::Value => ("attn.Wqkv.weight", "attn_qkv.weight"),
            Part::AttentionOutput => ("attn.out_proj.weight", "attn_output.weight"),
            Part::FeedForwardNorm => ("norm_2.weight", "ffn_norm.weight"),
            Part::Up => ("ffn.up_proj.weight", "ffn_up.weight"),
            Part::Down => ("ffn.down_proj.weight", "ffn_down.weight"),
            _ => return None,
        })
    }

    const fn names(self) -> (&'static str, &'static str) {
        match self {
            Part::AttentionNorm => ("input_layernorm.weight", "attn_norm.weight"),
            Part::Query => ("self_attn.q_proj.weight", "attn_q.weight"),
            Part::Key => ("self_attn.k_proj.weight", "attn_k.weight"),
            Part::Value => ("self_attn.v_proj.weight", "attn_v.weight"),
            Part::QueryBias => ("self_attn.q_proj.bias", "attn_q.bias"),
            Part::KeyBias => ("self_attn.k_proj.bias", "attn_k.bias"),
            Part::ValueBias => ("self_attn.v_proj.bias", "attn_v.bias"),
            Part::QueryNorm => ("self_attn.q_norm.weight", "attn_q_norm.weight"),
            Part::KeyNorm => ("self_attn.k_norm.weight", "attn_k_norm.weight"),
            Part::AttentionOutput => ("self_attn.o_proj.weight", "attn_output.weight"),
            Part::AttentionOutputBias => ("self_attn.o_proj.bias", "attn_output.bias"),
            // Of Gemma; the others have one norm there, before the feed-forward part, which they call so, too.
            Part::PostAttentionNorm => ("post_attention_layernorm.weight", "post_attention_norm.weight"),
            Part::FeedForwardNorm => ("post_attention_layernorm.weight", "ffn_norm.weight"),
            Part::PostFeedForwardNorm => ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
            Part::Gate => ("mlp.gate_proj.weight", "ffn_gate.weight"),
            Part::Up => ("mlp.up_proj.weight", "ffn_up.weight"),
            Part::Down => ("mlp.down_proj.weight", "ffn_down.weight"),
            Part::GateBias => ("mlp.gate_proj.bias", "ffn_gate.bias"),
            Part::UpBias => ("mlp.up_proj.bias", "ffn_up.bias"),
            Part::DownBias => ("mlp.down_proj.bias", "ffn_down.bias"),
        }
    }
}
