//! Adapters to folders.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::{render, scale};
use super::error::AdapterError;
use super::modules::Names;
use super::projection::Projection;
use super::{Adapter, CONFIG, Factor, Pair, TENSORS, tensor_name};

impl Adapter {
    /// Writes the folder as PEFT would: whole or not at all, also when the machine loses power. Equal contents give equal bytes.
    /// A folder that is there already is left alone when it holds the same bytes, and is an error otherwise: adapters do not change.
    pub fn write(&self, folder: &Path) -> Result<(), AdapterError> {
        let files = [(CONFIG, self.config_file()), (TENSORS, self.tensors_file()?)];
        if folder.exists() {
            return same(folder, &files);
        }
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let parent = folder.parent().filter(|parent| *parent != Path::new("")).unwrap_or_else(|| Path::new("."));
        let beside = parent.join(format!(".{name}.{}.part", std::process::id()));
        let put = || -> std::io::Result<()> {
            fs::create_dir_all(parent)?;
            if beside.exists() {
                fs::remove_dir_all(&beside)?;
            }
            fs::create_dir(&beside)?;
            for (name, bytes) in &files {
                let mut file = File::create(beside.join(name))?;
                file.write_all(bytes)?;
                file.sync_all()?;
            }
            File::open(&beside)?.sync_all()?;
            fs::rename(&beside, folder)?;
            File::open(parent)?.sync_all()
        };
        match put() {
            Ok(()) => Ok(()),
            Err(error) => {
                // What is left over is removed when the same process tries again.
                fs::remove_dir_all(&beside).ok();
                // Another writer may have been faster.
                if folder.exists() { same(folder, &files) } else { Err(AdapterError::io("write", folder, error)) }
            }
        }
    }

    fn config_file(&self) -> Vec<u8> {
        let config = &self.config;
        let (mut ranks, mut alphas) = (Map::new(), Map::new());
        for pair in &self.pairs {
            let module = pair.projection.module(pair.layer);
            if pair.rank != config.r {
                ranks.insert(module.clone(), json!(pair.rank));
            }
            if pair.scale != scale(config.alpha, pair.rank, config.rslora) {
                let rank = pair.rank as f64;
                alphas.insert(module, json!(f64::from(pair.scale) * if config.rslora { rank.sqrt() } else { rank }));
            }
        }
        let (targets, layers) = self.targets();
        render(config, &self.base, targets, layers.as_deref(), ranks, alphas, &self.extra.fields)
    }

    /// `target_modules` and `layers_to_transform`: short names where every layer has the same matrices, else full ones.
    fn targets(&self) -> (Vec<String>, Option<Vec<usize>>) {
        let pairs: BTreeSet<(usize, Projection)> = self.pairs.iter().map(|pair| (pair.layer, pair.projection)).collect();
        let all = || -> Vec<usize> { (0..=pairs.last().map_or(0, |last| last.0)).collect() };
        // A pattern or a list of full names may leave out the model's last layers, and the pairs do not tell how many there are.
        let partial = |names: &Names| match names {
            Names::Pattern(_) => true,
            Names::Listed(names) => names.iter().any(|name| name.contains("layers.") || name.contains("blocks.")),
            Names::AllLinear => false,
        };
        let partial = self.extra.modules.as_ref().is_some_and(|modules| partial(&modules.targets));
        let explicit = if partial { Some(all()) } else { self.config.layers.clone() };
        let layers: Vec<usize> = explicit.clone().unwrap_or_else(all);
        let regular: BTreeSet<(usize, Projection)> =
            layers.iter().flat_map(|layer| self.config.targets.iter().map(|projection| (*layer, *projection))).collect();
        if regular != pairs {
            return (pairs.into_iter().map(|(layer, projection)| projection.module(layer)).collect(), None);
        }
        let mut names: Vec<String> = self.config.targets.iter().map(|target| target.name().to_owned()).collect();
        names.sort_unstable();
        names.dedup();
        (names, explicit)
    }

    /// The safetensors file: f32, names ascending.
    fn tensors_file(&self) -> Result<Vec<u8>, AdapterError> {
        let mut tensors: Vec<(String, [usize; 2], &[f32])> = Vec::with_capacity(2 * self.pairs.len());
        for Pair { layer, projection, rank, a, b, .. } in &self.pairs {
            for (factor, values) in [(Factor::A, a), (Factor::B, b)] {
                let name = tensor_name(*layer, *projection, factor);
                let Some(other) = values.len().checked_div(*rank).filter(|other| other * rank == values.len()) else {
                    return Err(AdapterError::tensor(name, format!("{} numbers are not whole rows of {rank}", values.len())));
                };
                let shape = if factor == Factor::A { [*rank, other] } else { [other, *rank] };
                tensors.push((name, shape, values));
            }
        }
        tensors.sort_by(|one, two| one.0.cmp(&two.0));
        if let Some(twice) = tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(AdapterError::tensor(&twice[0].0, "occurs twice"));
        }
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        let mut end = 0;
        for (name, shape, values) in &tensors {
            let begin = end;
            end += values.len() * 4;
            header.insert(name.clone(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [begin, end] }));
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        // The format wants the data aligned.
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut bytes = Vec::with_capacity(8 + header.len() + end);
        bytes.extend_from_slice(&(header.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&header);
        bytes.extend(tensors.iter().flat_map(|(_, _, values)| values.iter()).flat_map(|value| value.to_le_bytes()));
        Ok(bytes)
    }
}

/// An existing folder is fine when it holds these very bytes.
fn same(folder: &Path, files: &[(&str, Vec<u8>)]) -> Result<(), AdapterError> {
    let equal = files.iter().all(|(name, bytes)| fs::read(folder.join(name)).is_ok_and(|there| there == *bytes));
    if equal {
        return Ok(());
    }
    let detail = "is there already and holds something else; name a new folder".to_owned();
    Err(AdapterError::Folder { path: folder.to_owned(), detail })
}
