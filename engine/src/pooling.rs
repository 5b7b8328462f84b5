//! From the hidden states of a text to one vector.

use std::path::{Component, Path};

use serde::Deserialize;
use serde_json::Value;

use crate::load_error::LoadError;

/// Which hidden states make the vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolingMode {
    /// That of the last token, which is the one that has seen the whole text.
    Last,
    /// The mean over all tokens.
    Mean,
}

/// How a model's vectors are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pooling {
    /// Which hidden states.
    pub mode: PoolingMode,
    /// Scaled to length 1.
    pub normalize: bool,
    /// Whether the vectors may be cut short, as those of models trained for it (Kusupati et al., "Matryoshka Representation
    /// Learning", 2022).
    pub cut: Cut,
}

/// To which lengths vectors may be cut.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Cut {
    /// None.
    #[default]
    No,
    /// Any.
    Any,
    /// These.
    To(Vec<usize>),
}

impl Default for Pooling {
    /// For models that say nothing about it, such as those made to chat.
    fn default() -> Self {
        Self { mode: PoolingMode::Last, normalize: true, cut: Cut::No }
    }
}

impl Pooling {
    /// What `modules.json` and the files that it names say in a model's directory, as sentence-transformers writes them. The inner
    /// error says what this engine cannot do; the model may still generate.
    pub(crate) fn read(directory: &Path) -> Result<Result<Self, String>, LoadError> {
        #[derive(Deserialize)]
        struct Module {
            #[serde(default)]
            path: String,
            r#type: String,
        }
        let cut = Cut::of(&read_json(&directory.join("config.json"))?);
        let path = directory.join("modules.json");
        let Some(modules) = read_json(&path)? else { return Ok(Ok(Self { cut, ..Self::default() })) };
        let modules: Vec<Module> =
            serde_json::from_value(modules).map_err(|error| LoadError::invalid(&path, "modules", error.to_string()))?;
        let (mut mode, mut normalize) = (Ok(PoolingMode::Last), false);
        for module in modules {
            match module.r#type.rsplit('.').next().unwrap_or_default() {
                "Transformer" => {}
                "Normalize" => normalize = true,
                "Pooling" => {
                    // A downloaded list must not make us open files elsewhere.
                    let inside = Path::new(&module.path).components().all(|part| matches!(part, Component::Normal(_)));
                    if !inside {
                        return Err(LoadError::invalid(&path, "path", format!("\"{}\" leads out of the directory", module.path)));
                    }
                    let file = directory.join(&module.path).join("config.json");
                    mode = PoolingMode::of(&read_json(&file)?.unwrap_or_default());
                }
                other => return Ok(Err(format!("its vectors go through a module \"{other}\", which this engine does not have"))),
            }
        }
        Ok(mode.map(|mode| Self { mode, normalize, cut }))
    }

    /// Whether vectors of `width` numbers may be cut to `dimensions`.
    pub fn allows(&self, dimensions: usize, width: usize) -> bool {
        match &self.cut {
            _ if dimensions == width => true,
            Cut::No => false,
            Cut::Any => (1..width).contains(&dimensions),
            Cut::To(lengths) => lengths.contains(&dimensions) && dimensions < width,
        }
    }

    /// Cuts a pooled vector, then scales it to length 1 where the model does so.
    pub fn finish(&self, mut vector: Vec<f32>, dimensions: Option<usize>) -> Vec<f32> {
        vector.truncate(dimensions.unwrap_or(usize::MAX));
        if self.normalize {
            let length = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
            // As `torch.nn.functional.normalize`: a vector of zeros stays one.
            let scale = 1.0 / length.max(1e-12);
            vector.iter_mut().for_each(|x| *x = (f64::from(*x) * scale) as f32);
        }
        vector
    }
}

impl PoolingMode {
    /// From a `1_Pooling/config.json`: `pooling_mode_…: true`, or `pooling_mode: "…"` as newer versions write it.
    fn of(config: &Value) -> Result<Self, String> {
        let flags = config.as_object().into_iter().flatten();
        let flags = flags.filter(|(key, value)| key.starts_with("pooling_mode_") && **value == true);
        let mut modes: Vec<&str> = flags.map(|(key, _)| key.trim_start_matches("pooling_mode_")).collect();
        match config.get("pooling_mode") {
            Some(Value::String(mode)) => modes.push(mode),
            Some(Value::Array(list)) => modes.extend(list.iter().filter_map(Value::as_str)),
            _ => {}
        }
        match modes.as_slice() {
            ["lasttoken"] => Ok(Self::Last),
            ["mean" | "mean_tokens"] => Ok(Self::Mean),
            [] => Err("its pooling is not said".to_owned()),
            other => Err(format!("its pooling is \"{}\"; this engine pools by \"lasttoken\" or \"mean\"", other.join(" + "))),
        }
    }

    /// From GGUF's `pooling_type`.
    pub(crate) fn of_gguf(number: Option<u64>) -> Result<Self, String> {
        match number {
            None | Some(0 | 3) => Ok(Self::Last),
            Some(1) => Ok(Self::Mean),
            Some(other) => Err(format!("its pooling is number {other}; this engine pools by the last token (3) or the mean (1)")),
        }
    }
}

impl Cut {
    /// `matryoshka_dimensions` and `is_matryoshka` in a `config.json`.
    fn of(config: &Option<Value>) -> Self {
        let field = |key| config.as_ref().and_then(|config| config.get(key));
        let lengths = field("matryoshka_dimensions").and_then(Value::as_array);
        match lengths {
            Some(lengths) => Self::To(lengths.iter().filter_map(|n| usize::try_from(n.as_u64()?).ok()).collect()),
            None if field("is_matryoshka") == Some(&Value::Bool(true)) => Self::Any,
            None => Self::No,
        }
    }
}

fn read_json(path: &Path) -> Result<Option<Value>, LoadError> {
    match std::fs::read(path) {
        Ok(text) => {
            let value = serde_json::from_slice(&text);
            value.map(Some).map_err(|error| LoadError::invalid(path, "content", error.to_string()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(LoadError::io(path, error)),
    }
}

/// A text's vector while its chunks are computed.
#[derive(Debug)]
pub(crate) struct Accumulator {
    mode: PoolingMode,
    /// Positions seen so far, from the first on.
    seen: usize,
    sum: Vec<f64>,
}

impl Accumulator {
    pub(crate) fn new(mode: PoolingMode) -> Self {
        Self { mode, seen: 0, sum: Vec::new() }
    }

    /// Takes the hidden states `[rows, width]` of the positions from `start` on. A text that was preempted is computed again from an
    /// earlier position: what was seen before does not count twice.
    pub(crate) fn take(&mut self, start: usize, hidden: &[f32], width: usize) {
        self.sum.resize(width, 0.0);
        for (row, values) in hidden.chunks_exact(width).enumerate().skip(self.seen.saturating_sub(start)) {
            if self.mode == PoolingMode::Last {
                self.sum.fill(0.0);
            }
            self.sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(*value));
            self.seen = start + row + 1;
        }
    }

    /// The vector.
    pub(crate) fn pooled(&self) -> Vec<f32> {
        let divisor = if self.mode == PoolingMode::Mean { self.seen.max(1) as f64 } else { 1.0 };
        self.sum.iter().map(|sum| (sum / divisor) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn written(files: &[(&str, Value)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, value) in files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, value.to_string()).unwrap();
        }
        folder
    }

    #[test]
    fn modules_say_how_to_pool_and_whether_to_normalise() {
        let module = |kind: &str, path: &str| json!({"idx": 0, "name": "0", "path": path, "type": format!("sentence_transformers.models.{kind}")});
        let pooling = json!({"word_embedding_dimension": 8, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true});
        let folder = written(&[
            ("modules.json", json!([module("Transformer", ""), module("Pooling", "1_Pooling")])),
            ("1_Pooling/config.json", pooling),
        ]);
        let read = Pooling::read(folder.path()).unwrap().unwrap();
        assert_eq!(read, Pooling { mode: PoolingMode::Mean, normalize: false, cut: Cut::No });
        let folder = written(&[
            (
                "modules.json",
                json!([module("Transformer", ""), module("Pooling", "1_Pooling"), module("Normalize", "2_Normalize")]),
            ),
            ("1_Pooling/config.json", json!({"pooling_mode": "lasttoken"})),
            ("config.json", json!({"matryoshka_dimensions": [4, 8]})),
        ]);
        let read = Pooling::read(folder.path()).unwrap().unwrap();
        assert_eq!(read, Pooling { mode: PoolingMode::Last, normalize: true, cut: Cut::To(vec![4, 8]) });
        assert_eq!(Pooling::read(written(&[]).path()).unwrap(), Ok(Pooling::default()));
        let folder = written(&[
            ("modules.json", json!([module("Pooling", "p")])),
            ("p/config.json", json!({"pooling_mode_cls_token": true})),
        ]);
        assert!(Pooling::read(folder.path()).unwrap().unwrap_err().contains("cls_token"));
        let folder = written(&[("modules.json", json!([module("Dense", "2_Dense")]))]);
        assert!(Pooling::read(folder.path()).unwrap().unwrap_err().contains("Dense"));
        let folder = written(&[("modules.json", json!([module("Pooling", "../elsewhere")]))]);
        assert!(Pooling::read(folder.path()).is_err());
    }

    #[test]
    fn a_vector_is_cut_first_and_scaled_afterwards() {
        let pooling = Pooling { cut: Cut::Any, ..Pooling::default() };
        assert_eq!(pooling.finish(vec![3.0, 4.0, 12.0], Some(2)), [0.6, 0.8]);
        assert_eq!(pooling.finish(vec![0.0, 0.0], None), [0.0, 0.0]);
        assert!(pooling.allows(1, 3) && pooling.allows(3, 3) && !pooling.allows(0, 3) && !pooling.allows(4, 3));
        let some = Pooling { cut: Cut::To(vec![2]), ..Pooling::default() };
        assert!(some.allows(2, 3) && !some.allows(1, 3) && !Pooling::default().allows(2, 3));
    }

    #[test]
    fn chunks_and_repeated_positions_make_the_same_vector() {
        let hidden: Vec<f32> = (0..10).map(|n| n as f32).collect();
        for mode in [PoolingMode::Last, PoolingMode::Mean] {
            let mut whole = Accumulator::new(mode);
            whole.take(0, &hidden, 2);
            let mut parts = Accumulator::new(mode);
            parts.take(0, &hidden[..6], 2);
            // Preempted, and computed again from the second position on.
            parts.take(1, &hidden[2..8], 2);
            parts.take(4, &hidden[8..], 2);
            assert_eq!(parts.pooled(), whole.pooled());
            assert_eq!(whole.pooled(), if mode == PoolingMode::Mean { [4.0, 5.0] } else { [8.0, 9.0] });
        }
    }
}
