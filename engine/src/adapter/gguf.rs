//! Adapters as llama.cpp reads them (`--lora FILE`).
//!
//! The format is what its `convert_lora_to_gguf.py` writes: metadata `general.type` "adapter", `adapter.type` "lora",
//! `adapter.lora.alpha`, and for each adapted tensor `NAME.lora_a` `[rank, in]` and `NAME.lora_b` `[out, rank]`, rows in the order of the
//! base's GGUF file. The scale of a pair is alpha / rank.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use tidemill_kernels::Format;

use super::error::AdapterError;
use super::{Adapter, Pair};
use crate::gguf::{Pairs, Planned, padding, storage_number};
use crate::model::weight_names::{Naming, Weight};
use crate::model_config::ModelConfig;

const ALIGNMENT: usize = 32;

impl Adapter {
    /// Writes the adapter of a model of these sizes to a new file, in f32: whole or not at all.
    pub fn write_gguf(&self, model: &ModelConfig, to: &Path) -> Result<(), AdapterError> {
        self.check(model)?;
        if to.exists() {
            let detail = "is there already; name a new file".to_owned();
            return Err(AdapterError::Folder { path: to.to_owned(), detail });
        }
        let name = to.file_name().unwrap_or_default().to_string_lossy();
        let parent = to.parent().filter(|parent| *parent != Path::new("")).unwrap_or_else(|| Path::new("."));
        let beside = parent.join(format!(".{name}.{}.part", std::process::id()));
        let bytes = self.gguf(model);
        let put = || -> std::io::Result<()> {
            fs::create_dir_all(parent)?;
            let mut file = File::create(&beside)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&beside, to)?;
            File::open(parent)?.sync_all()
        };
        put().map_err(|error| {
            fs::remove_file(&beside).ok();
            AdapterError::io("write", to, error)
        })
    }

    fn gguf(&self, model: &ModelConfig) -> Vec<u8> {
        // 0 means no scale at all to llama.cpp.
        let alpha = if self.config.alpha == 0.0 { 1.0 } else { self.config.alpha as f32 };
        let pairs = Pairs::default()
            .text("general.architecture", model.gguf_architecture())
            .text("general.type", "adapter")
            .text("general.name", &self.base)
            .text("adapter.type", "lora")
            .f32("adapter.lora.alpha", alpha);
        let mut tensors: Vec<(Planned, Vec<f32>)> = Vec::with_capacity(2 * self.pairs.len());
        for Pair { layer, projection, rank, scale, a, b } in &self.pairs {
            let weight = Weight::Layer(*layer, projection.part());
            let (out, input) = projection.shape(model);
            // The file has one alpha for all; where a pair has a scale of its own, its factors take the difference.
            let factor = scale * *rank as f32 / alpha;
            let factor = if (factor - 1.0).abs() < 1e-6 { 1.0 } else { factor };
            let mut placed = vec![0.0; b.len()];
            let order = model.gguf_row_order(weight, out);
            for (feature, row) in b.chunks_exact(*rank).enumerate() {
                let place = order.as_ref().map_or(feature, |order| order[feature] as usize);
                placed[place * rank..][..*rank].iter_mut().zip(row).for_each(|(place, value)| *place = factor * value);
            }
            let naming = Naming::of_gguf(model.family);
            for (letter, shape, values) in [("a", vec![*rank, input], a.clone()), ("b", vec![out, *rank], placed)] {
                let name = format!("{}.lora_{letter}", naming.name(weight));
                let planned = Planned { name, shape, storage: storage_number(Format::F32), len: 4 * values.len() };
                tensors.push((planned, values));
            }
        }
        let planned: Vec<Planned> = tensors.iter().map(|(planned, _)| planned.clone()).collect();
        let mut bytes = pairs.before_data(&planned, ALIGNMENT);
        for (planned, values) in tensors {
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            bytes.resize(bytes.len() + padding(planned.len, ALIGNMENT), 0);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Projection;
    use crate::gguf::Gguf;
    use crate::model_files::ModelFiles;

    /// Product `scale · B A` of a pair as llama.cpp computes it from the file, with its rows in the order of the base's GGUF file.
    fn product(file: &Gguf, name: &str, alpha: f32, input: usize) -> Vec<Vec<f32>> {
        let read = |letter: &str| file.file.tensor(&format!("{name}.lora_{letter}")).unwrap().unwrap();
        let (a, b) = (read("a"), read("b"));
        let rank = a.shape[0];
        assert_eq!((a.shape[1], b.shape[1]), (input, rank));
        let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
        let scale = alpha / rank as f32;
        let row = |row: &[f32]| (0..input).map(|k| scale * (0..rank).map(|r| row[r] * a[r * input + k]).sum::<f32>()).collect();
        b.chunks_exact(rank).map(row).collect()
    }

    #[test]
    fn what_llama_cpp_would_add_is_what_peft_adds() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/llama");
        let out = tempfile::tempdir().unwrap();
        // The base's own GGUF file says where each row lies.
        let files = ModelFiles::open(&folder.join("llama.gguf")).unwrap();
        for name in ["all", "some", "patterns"] {
            let adapter = Adapter::read(&folder.join("adapters").join(name)).unwrap();
            let to = out.path().join(format!("{name}.gguf"));
            adapter.write_gguf(files.config(), &to).unwrap();
            let file = Gguf::open(&to).unwrap();
            let text = |key: &str| file.text(key).unwrap().map(str::to_owned);
            assert_eq!(text("general.architecture").as_deref(), Some("llama"));
            assert_eq!((text("general.type").as_deref(), text("adapter.type").as_deref()), (Some("adapter"), Some("lora")));
            let alpha = file.number("adapter.lora.alpha").unwrap().unwrap() as f32;
            assert_eq!(file.file.tensors.len(), 2 * adapter.pairs.len());
            for Pair { layer, projection, rank, scale, a, b } in &adapter.pairs {
                let weight = Weight::Layer(*layer, projection.part());
                let (rows, input) = projection.shape(files.config());
                let got = product(&file, &Naming::Gguf.name(weight), alpha, input);
                let order = files.matrix(weight).unwrap().row_order;
                assert_eq!(order.is_some(), matches!(projection, Projection::Query | Projection::Key));
                for feature in 0..rows {
                    let place = order.as_ref().map_or(feature, |order| order[feature] as usize);
                    for k in 0..input {
                        let wanted = scale * (0..*rank).map(|r| b[feature * rank + r] * a[r * input + k]).sum::<f32>();
                        assert!((got[place][k] - wanted).abs() < 1e-5, "{name} {layer} {projection:?} {feature} {k}");
                    }
                }
            }
            assert!(adapter.write_gguf(files.config(), &to).unwrap_err().to_string().contains("is there already"));
        }
    }
}
