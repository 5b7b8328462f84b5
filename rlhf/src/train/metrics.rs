//! What is measured between two lines of the log, and the log.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};

/// Sums under TRL's names, each with its weight.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics(BTreeMap<String, (f64, f64)>);

/// The same as bits, since JSON's decimals do not come back exactly.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Bits(BTreeMap<String, [u64; 2]>);

impl Metrics {
    /// Adds `sum` of `weight` values.
    pub fn add(&mut self, name: &str, sum: f64, weight: f64) {
        let entry = self.0.entry(name.to_owned()).or_default();
        *entry = (entry.0 + sum, entry.1 + weight);
    }

    /// Adds values.
    pub fn extend(&mut self, name: &str, values: &[f64]) {
        self.add(name, values.iter().sum(), values.len() as f64);
    }

    /// Adds all of another's.
    pub fn merge(&mut self, other: &Self) {
        other.0.iter().for_each(|(name, (sum, weight))| self.add(name, *sum, *weight));
    }

    /// The means, by name. Where chosen and rejected were not measured in pairs, the margin is that of the means.
    pub fn means(&self) -> BTreeMap<String, f64> {
        let mut means: BTreeMap<String, f64> = self
            .0
            .iter()
            .filter(|(_, (_, weight))| *weight > 0.0)
            .map(|(name, (sum, weight))| (name.clone(), sum / weight))
            .collect();
        if let (Some(chosen), Some(rejected)) = (means.get("rewards/chosen"), means.get("rewards/rejected")) {
            let margin = chosen - rejected;
            means.entry("rewards/margins".to_owned()).or_insert(margin);
        }
        means
    }

    pub(super) fn bits(&self) -> Bits {
        Bits(self.0.iter().map(|(name, (sum, weight))| (name.clone(), [sum.to_bits(), weight.to_bits()])).collect())
    }
}

impl From<&Bits> for Metrics {
    fn from(bits: &Bits) -> Self {
        Self(bits.0.iter().map(|(name, [sum, weight])| (name.clone(), (f64::from_bits(*sum), f64::from_bits(*weight)))).collect())
    }
}

/// A line of the log: `step`, `epoch` and metrics, in this order. No time of day: the same training writes the same bytes.
pub fn line(step: u64, epoch: f64, metrics: &BTreeMap<String, f64>) -> Value {
    let number = |value: f64| Number::from_f64(value).map_or(Value::Null, Value::Number);
    let mut line = Map::new();
    line.insert("step".to_owned(), step.into());
    line.insert("epoch".to_owned(), number(epoch));
    line.extend(metrics.iter().map(|(name, value)| (name.clone(), number(*value))));
    Value::Object(line)
}

/// `metrics.jsonl`: a line of JSON per logged step and per evaluation.
pub(super) struct Log {
    file: File,
    bytes: u64,
}

impl Log {
    /// Opens the log and forgets what came after its first `bytes` bytes.
    pub(super) fn open(path: &Path, bytes: u64) -> io::Result<Self> {
        let mut file = OpenOptions::new().create(true).write(true).truncate(false).open(path)?;
        file.set_len(bytes)?;
        file.seek(SeekFrom::Start(bytes))?;
        Ok(Self { file, bytes })
    }

    pub(super) fn append(&mut self, line: &Value) -> io::Result<()> {
        let text = format!("{line}\n");
        self.bytes += text.len() as u64;
        self.file.write_all(text.as_bytes())
    }

    /// Waits until everything is on the disk; returns how much that is.
    pub(super) fn sync(&mut self) -> io::Result<u64> {
        self.file.sync_all()?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_weighted_and_survive_as_bits() {
        let mut metrics = Metrics::default();
        metrics.extend("rewards/chosen", &[0.1, 0.2]);
        metrics.extend("rewards/chosen", &[0.7]);
        metrics.extend("rewards/rejected", &[-0.3]);
        metrics.extend("rewards/accuracies", &[]);
        let means = metrics.means();
        assert!((means["rewards/chosen"] - 1.0 / 3.0).abs() < 1e-15);
        assert!((means["rewards/margins"] - (1.0 / 3.0 + 0.3)).abs() < 1e-15);
        assert!(!means.contains_key("rewards/accuracies"));
        let json = serde_json::to_string(&metrics.bits()).unwrap();
        assert_eq!(Metrics::from(&serde_json::from_str::<Bits>(&json).unwrap()), metrics);
    }

    #[test]
    fn a_log_that_is_opened_again_forgets_what_was_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = Log::open(&path, 0).unwrap();
        log.append(&line(1, 0.5, &[("loss".to_owned(), 0.25)].into())).unwrap();
        let kept = log.sync().unwrap();
        log.append(&line(2, 1.0, &[("loss".to_owned(), f64::NAN)].into())).unwrap();
        let mut log = Log::open(&path, kept).unwrap();
        log.append(&line(2, 1.0, &BTreeMap::new())).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":1,\"epoch\":0.5,\"loss\":0.25}\n{\"step\":2,\"epoch\":1.0}\n");
    }
}
