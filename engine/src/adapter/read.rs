//! Adapters from folders.

use std::collections::BTreeMap;
use std::path::Path;

use super::config::Described;
use super::error::AdapterError;
use super::projection::Projection;
use super::{Adapter, CONFIG, Extra, Factor, PREFIX, Pair, TENSORS};
use crate::safetensors_file;

/// More than this is no configuration.
const MAX_CONFIG: u64 = 1 << 20;

/// The two factors of a matrix, as far as they were found.
type Found<'a> = BTreeMap<(usize, Projection), [Option<&'a str>; 2]>;

impl Adapter {
    /// Reads a folder that PEFT (or [`Adapter::write`]) saved. Whether it fits a model is for [`Adapter::check`] to say.
    pub fn read(folder: &Path) -> Result<Adapter, AdapterError> {
        let config_path = folder.join(CONFIG);
        let size = std::fs::metadata(&config_path).map_err(|error| missing(folder, &config_path, error))?.len();
        if size > MAX_CONFIG {
            return Err(AdapterError::config(&config_path, "content", format!("{size} bytes are no adapter's configuration")));
        }
        let text = std::fs::read(&config_path).map_err(|error| AdapterError::io("read", &config_path, error))?;
        let described = Described::parse(&config_path, &text)?;

        let tensors_path = folder.join(TENSORS);
        if !tensors_path.is_file() {
            let pickled = folder.join("adapter_model.bin").is_file();
            let detail = match pickled {
                true => format!("holds adapter_model.bin, which can run code when it is read; save the adapter as {TENSORS}"),
                false => format!("{TENSORS} is missing; fetch it from the same place as {CONFIG}"),
            };
            return Err(AdapterError::Folder { path: folder.to_owned(), detail });
        }
        let file = safetensors_file::open(&tensors_path)?;
        let mut found = Found::new();
        let mut names: Vec<&String> = file.tensors.keys().collect();
        names.sort_unstable();
        for name in names {
            let (module, factor) = split(name).ok_or_else(|| other(&tensors_path, name))?;
            let place = Projection::of_module(module).ok_or_else(|| other(&tensors_path, name))?;
            let known = &mut found.entry(place).or_default()[factor as usize];
            if known.replace(name).is_some() {
                return Err(AdapterError::tensor(name, "occurs twice, with and without \"model.\""));
            }
        }
        let mut pairs = Vec::with_capacity(found.len());
        for ((layer, projection), factors) in found {
            let module = projection.module(layer);
            let [Some(a), Some(b)] = factors else {
                let have = factors.into_iter().flatten().next().unwrap_or_default();
                return Err(AdapterError::tensor(have, "comes without the other factor; the file is incomplete"));
            };
            if !described.modules.include(layer, projection) {
                return Err(AdapterError::tensor(a, format!("is not among the modules that {CONFIG} names")));
            }
            let (rank, scale) = described.rank_and_scale(&module);
            let read = |name: &str, along: usize| {
                let tensor = file.tensor(name)?.ok_or_else(|| AdapterError::tensor(name, "is missing"))?;
                let &[rows, columns] = tensor.shape else {
                    return Err(AdapterError::tensor(name, format!("has the shape {:?}, not two dimensions", tensor.shape)));
                };
                if [rows, columns][along] != rank {
                    let detail = format!("has the shape [{rows}, {columns}], but {CONFIG} says rank {rank}");
                    return Err(AdapterError::tensor(name, detail));
                }
                Ok(tensor.to_f32()?)
            };
            pairs.push(Pair { layer, projection, rank, scale, a: read(a, 0)?, b: read(b, 1)? });
        }
        let Described { mut config, base, modules, fields, .. } = described;
        config.targets = Projection::every().filter(|p| pairs.iter().any(|pair| pair.projection == *p)).collect();
        Ok(Adapter { config, base, pairs, extra: Extra { fields, modules: Some(modules) } })
    }
}

/// `base_model.model.MODULE.lora_A.weight` to module and factor.
fn split(name: &str) -> Option<(&str, Factor)> {
    let inner = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let a = inner.strip_suffix(".lora_A").map(|module| (module, Factor::A));
    a.or_else(|| inner.strip_suffix(".lora_B").map(|module| (module, Factor::B)))
}

fn missing(folder: &Path, config: &Path, error: std::io::Error) -> AdapterError {
    if error.kind() != std::io::ErrorKind::NotFound {
        return AdapterError::io("read", config, error);
    }
    let detail = match folder.is_dir() {
        true => format!("holds no {CONFIG}; name the folder that PEFT's save_pretrained wrote"),
        false => "there is no such folder; the path is one of the machine that serves".to_owned(),
    };
    AdapterError::Folder { path: folder.to_owned(), detail }
}

fn other(path: &Path, name: &str) -> AdapterError {
    let known = Projection::every().map(Projection::name).collect::<Vec<_>>().join(", ");
    AdapterError::unsupported(path, name, "a tensor of this name", format!("adapted are {known} of the decoder's layers"))
}
