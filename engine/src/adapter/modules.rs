//! Which modules of a model an adapter's configuration means: PEFT's rules for `target_modules`, `exclude_modules`,
//! `layers_to_transform` and the patterns of ranks and alphas.

use regex::{Regex, RegexBuilder};

use super::projection::Projection;

/// A list of names, or a regular expression.
#[derive(Clone, Debug)]
pub(super) enum Names {
    /// Full names, or ends of them after a dot.
    Listed(Vec<String>),
    /// Matches the whole name.
    Pattern(Regex),
    /// Every linear layer but the output.
    AllLinear,
}

/// The adapted modules.
#[derive(Clone, Debug)]
pub(super) struct Modules {
    pub targets: Names,
    pub excluded: Names,
    /// `None` is all.
    pub layers: Option<Vec<usize>>,
}

impl Names {
    pub fn none() -> Self {
        Names::Listed(Vec::new())
    }

    fn contain(&self, module: &str) -> bool {
        match self {
            Names::AllLinear => true,
            Names::Pattern(pattern) => pattern.is_match(module),
            Names::Listed(names) => names.iter().any(|name| ends_with(module, name)),
        }
    }
}

impl Modules {
    /// Whether the matrix is adapted.
    pub fn include(&self, layer: usize, projection: Projection) -> bool {
        let module = projection.module(layer);
        let chosen = self.layers.as_ref().is_none_or(|layers| layers.contains(&layer));
        let named = matches!(&self.targets, Names::Listed(names) if names.contains(&module));
        // A full name in the list counts in every layer (`peft.tuners.tuners_utils.check_target_module_exists`).
        (named || chosen) && self.targets.contain(&module) && !self.excluded.contain(&module)
    }
}

fn ends_with(module: &str, name: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|before| before.ends_with('.'))
}

/// Most bytes of a compiled pattern: far more than names of modules need, and no file can ask for all memory.
const MAX_COMPILED: usize = 1 << 18;

/// A regular expression that must match a whole name.
pub(super) fn whole(pattern: &str) -> Result<Regex, regex::Error> {
    compiled(&format!("^(?:{pattern})$"))
}

/// A key of `rank_pattern` or `alpha_pattern`: matches a name, or the end of it after a dot.
pub(super) fn ending(pattern: &str) -> Result<Regex, regex::Error> {
    compiled(&format!(r"^(?:.*\.)?(?:{pattern})$"))
}

fn compiled(pattern: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(pattern).size_limit(MAX_COMPILED).build()
}

/// The value of the first pattern that matches.
pub(super) fn first<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(targets: Names) -> Modules {
        Modules { targets, excluded: Names::none(), layers: None }
    }

    #[test]
    fn lists_name_ends_patterns_match_whole_names() {
        let listed = modules(Names::Listed(vec!["q_proj".into(), "mlp.up_proj".into(), "roj".into()]));
        let included = |modules: &Modules, layer| Projection::ALL.map(|projection| modules.include(layer, projection));
        assert_eq!(included(&listed, 7), [true, false, false, false, false, true, false]);
        let pattern = modules(Names::Pattern(whole(r".*\.layers\.(0|1)\..*(q|v)_proj|x").unwrap()));
        assert_eq!(included(&pattern, 1), [true, false, true, false, false, false, false]);
        assert_eq!(included(&pattern, 11), [false; 7]);
        assert_eq!(included(&modules(Names::AllLinear), 2), [true; 7]);
    }

    #[test]
    fn layers_and_exclusions_narrow_the_choice() {
        let mut some = modules(Names::Listed(vec!["q_proj".into(), "k_proj".into(), "model.layers.9.mlp.up_proj".into()]));
        some.layers = Some(vec![1, 3]);
        some.excluded = Names::Listed(vec!["3.self_attn.k_proj".into()]);
        assert!(some.include(1, Projection::Key) && some.include(3, Projection::Query));
        assert!(!some.include(2, Projection::Key) && !some.include(3, Projection::Key));
        assert!(some.include(9, Projection::Up));
    }

    #[test]
    fn the_first_pattern_that_ends_a_name_counts() {
        let patterns = [(ending(r"layers\.1\..*q_proj").unwrap(), 4), (ending("q_proj").unwrap(), 8)];
        assert_eq!(first(&patterns, "model.layers.1.self_attn.q_proj"), Some(4));
        assert_eq!(first(&patterns, "model.layers.11.self_attn.q_proj"), Some(8));
        assert_eq!(first(&patterns, "model.layers.1.self_attn.k_proj"), None);
        assert_eq!(first(&[(ending("proj").unwrap(), 1)], "model.layers.1.self_attn.k_proj"), None);
        let large = "(?:a{1000}){100}";
        assert!(whole(large).is_err() && ending(large).is_err());
        assert!(whole(r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj").is_ok());
    }
}
