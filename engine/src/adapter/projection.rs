//! The matrices of a layer that can be adapted.

use crate::model::weight_names::Part;
use crate::model_config::ModelConfig;

/// A matrix of a decoder layer, under the names that PEFT and `transformers` use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// `self_attn.q_proj`
    Query,
    /// `self_attn.k_proj`
    Key,
    /// `self_attn.v_proj`
    Value,
    /// `self_attn.o_proj`
    AttentionOutput,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
    /// DBRX's `norm_attn_norm.attn.Wqkv`: query, key and value in one.
    DbrxQkv,
    /// DBRX's `norm_attn_norm.attn.out_proj`
    DbrxOutput,
    /// MPT's `attn.Wqkv`: query, key and value in one.
    MptQkv,
    /// MPT's `attn.out_proj`
    MptOutput,
    /// MPT's `ffn.up_proj`
    MptUp,
    /// MPT's `ffn.down_proj`
    MptDown,
}

impl Projection {
    /// What DBRX has in the place of the others. Its experts are adapted no more than those of other models.
    pub const DBRX: [Projection; 2] = [Projection::DbrxQkv, Projection::DbrxOutput];

    /// What MPT has in the place of the others.
    pub const MPT: [Projection; 4] = [Projection::MptQkv, Projection::MptOutput, Projection::MptUp, Projection::MptDown];

    /// All of a layer, in the order in which it uses them; DBRX and MPT have matrices of their own.
    pub const ALL: [Projection; 7] = [
        Projection::Query,
        Projection::Key,
        Projection::Value,
        Projection::AttentionOutput,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];

    /// The name as people write it in `target_modules`: `q_proj`.
    pub const fn name(self) -> &'static str {
        match self {
            Projection::Query => "q_proj",
            Projection::Key => "k_proj",
            Projection::Value => "v_proj",
            Projection::AttentionOutput => "o_proj",
            Projection::Gate => "gate_proj",
            Projection::Up | Projection::MptUp => "up_proj",
            Projection::Down | Projection::MptDown => "down_proj",
            Projection::DbrxQkv | Projection::MptQkv => "Wqkv",
            Projection::DbrxOutput | Projection::MptOutput => "out_proj",
        }
    }

    /// The layer's tensor that it adapts; of those of query, key and value in one, that of the first rows.
    pub const fn part(self) -> Part {
        match self {
            Projection::Query | Projection::DbrxQkv | Projection::MptQkv => Part::Query,
            Projection::Key => Part::Key,
            Projection::Value => Part::Value,
            Projection::AttentionOutput | Projection::DbrxOutput | Projection::MptOutput => Part::AttentionOutput,
            Projection::Gate => Part::Gate,
            Projection::Up | Projection::MptUp => Part::Up,
            Projection::Down | Projection::MptDown => Part::Down,
        }
    }

    /// The part of the layer it belongs to.
    const fn parent(self) -> &'static str {
        match self {
            Projection::Query | Projection::Key | Projection::Value | Projection::AttentionOutput => "self_attn",
            Projection::Gate | Projection::Up | Projection::Down => "mlp",
            Projection::DbrxQkv | Projection::DbrxOutput => "norm_attn_norm.attn",
            Projection::MptQkv | Projection::MptOutput => "attn",
            Projection::MptUp | Projection::MptDown => "ffn",
        }
    }

    /// What may stand in front of the layers: a decoder beside a part that sees images has a longer path.
    const fn stems(self) -> &'static [&'static str] {
        match self {
            Projection::DbrxQkv | Projection::DbrxOutput => &["transformer."],
            _ if self.is_of_mpt() => &["transformer."],
            _ => &["model.language_model.", "language_model.model.", "model."],
        }
    }

    /// Where a model has its layers.
    const fn layers(self) -> (&'static str, &'static str) {
        match self {
            _ if self.is_of_mpt() => ("transformer.", "blocks."),
            Projection::DbrxQkv | Projection::DbrxOutput => ("transformer.", "blocks."),
            _ => ("model.", "layers."),
        }
    }

    /// Whether it is one of MPT's.
    pub const fn is_of_mpt(self) -> bool {
        matches!(self, Projection::MptQkv | Projection::MptOutput | Projection::MptUp | Projection::MptDown)
    }

    /// Whether query, key and value are rows of the matrix.
    pub const fn joins_qkv(self) -> bool {
        matches!(self, Projection::DbrxQkv | Projection::MptQkv)
    }

    /// Those of every model.
    pub fn every() -> impl Iterator<Item = Projection> {
        Projection::ALL.into_iter().chain(Projection::DBRX).chain(Projection::MPT)
    }

    /// The module's full name: `model.layers.3.self_attn.q_proj`.
    pub fn module(self, layer: usize) -> String {
        let (model, layers) = self.layers();
        format!("{model}{layers}{layer}.{}.{}", self.parent(), self.name())
    }

    /// The layer and matrix that a full name means, with or without the `model.` in front; that of a decoder beside a part that sees images, too.
    pub fn of_module(module: &str) -> Option<(usize, Projection)> {
        let (path, name) = module.rsplit_once('.')?;
        // Several models have matrices of one name, each in a part of its own.
        Projection::every().filter(|projection| projection.name() == name).find_map(|projection| {
            let bare = projection.stems().iter().find_map(|stem| path.strip_prefix(stem)).unwrap_or(path);
            let inside = bare.strip_prefix(projection.layers().1)?;
            let layer = inside.strip_suffix(projection.parent())?.strip_suffix('.')?;
            // "007" and "+7" parse as numbers but name nothing.
            let number: usize = layer.parse().ok()?;
            (number.to_string() == layer).then_some((number, projection))
        })
    }

    /// The matrix called `name`, as in [`Projection::name`].
    pub fn named(name: &str) -> Option<Projection> {
        Projection::ALL.into_iter().find(|projection| projection.name() == name)
    }

    /// `(output features, input features)` in a model.
    pub fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let &ModelConfig { hidden, intermediate, heads, kv_heads, head_dim, .. } = config;
        match self {
            Projection::Query => (heads * head_dim, hidden),
            Projection::Key | Projection::Value => (kv_heads * head_dim, hidden),
            Projection::DbrxQkv | Projection::MptQkv => ((heads + 2 * kv_heads) * head_dim, hidden),
            Projection::AttentionOutput | Projection::DbrxOutput | Projection::MptOutput => (hidden, heads * head_dim),
            Projection::Gate | Projection::Up | Projection::MptUp => (intermediate, hidden),
            Projection::Down | Projection::MptDown => (hidden, intermediate),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_matrices() {
        for projection in Projection::every() {
            let module = projection.module(12);
            assert_eq!(Projection::of_module(&module), Some((12, projection)));
            let bare = module.trim_start_matches("model.").trim_start_matches("transformer.");
            assert_eq!(Projection::of_module(bare), Some((12, projection)));
        }
        for stem in ["model.language_model", "language_model.model"] {
            assert_eq!(Projection::of_module(&format!("{stem}.layers.3.mlp.up_proj")), Some((3, Projection::Up)));
        }
        assert_eq!(Projection::DbrxQkv.module(3), "transformer.blocks.3.norm_attn_norm.attn.Wqkv");
        assert_eq!(Projection::MptUp.module(3), "transformer.blocks.3.ffn.up_proj");
        for other in [
            "lm_head",
            "model.embed_tokens",
            "model.layers.x.mlp.up_proj",
            "model.layers.01.mlp.up_proj",
            "model.layers.1.mlp.q_proj",
            "model.layers.1.self_attn.q_norm",
            "model.layers.1.mlp.experts.0.up_proj",
            "vision.layers.1.mlp.up_proj",
            "model.vision_tower.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.Wqkv",
            "transformer.blocks.1.ffn.router.layer",
            "transformer.blocks.1.norm_attn_norm.attn.q_proj",
            "transformer.blocks.1.mlp.up_proj",
            "model.layers.1.ffn.up_proj",
        ] {
            assert_eq!(Projection::of_module(other), None, "{other}");
        }
    }
}
