//! Where the trainings and evaluations of a server compute.

use std::ffi::OsString;
use std::path::Path;

use tidemill_engine::{CardShare, Device};
use tidemill_rlhf::workplace::one_card;

/// The processor, or a card with the part of its memory that is theirs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrainingDevice {
    /// `cpu` or one card.
    pub device: Device,
    /// Bytes of the card's memory; without it, what is free when one of them begins.
    pub memory: Option<usize>,
}

impl TrainingDevice {
    /// The number of its card.
    pub fn card(&self) -> Option<usize> {
        one_card(&self.device).ok().flatten()
    }

    /// What serving leaves to them.
    pub fn share(&self) -> Option<CardShare> {
        Some(CardShare { card: self.card()?, bytes: self.memory? })
    }

    /// What a process is told that knows no specification.
    pub fn arguments(&self, data: &Path) -> Vec<OsString> {
        if self.card().is_none() {
            return Vec::new();
        }
        let mut told: Vec<OsString> = vec!["--turn".into(), data.into(), "--device".into(), self.device.to_string().into()];
        told.extend(self.memory.into_iter().flat_map(|bytes| [OsString::from("--device-memory"), bytes.to_string().into()]));
        told
    }
}

/// What a process is told that finds all else in its specification, its card, too: a job keeps the device that it was made with.
pub fn job_arguments(data: &Path) -> Vec<OsString> {
    // The data directory is where compiled kernels are kept, too; a file that somebody is editing has no say.
    ["--turn".into(), data.into(), "--data".into(), data.into(), "--config".into(), "/dev/null".into()].into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(device: &str, memory: Option<usize>) -> TrainingDevice {
        TrainingDevice { device: device.parse().unwrap(), memory }
    }

    #[test]
    fn a_card_is_named_with_its_share_and_the_processor_not_at_all() {
        let data = Path::new("/data");
        assert_eq!(told("cpu", None).arguments(data), [] as [OsString; 0]);
        let card = told("cuda:2", Some(7));
        assert_eq!(card.arguments(data), ["--turn", "/data", "--device", "cuda:2", "--device-memory", "7"]);
        assert_eq!(job_arguments(data), ["--turn", "/data", "--data", "/data", "--config", "/dev/null"]);
        assert_eq!(card.share(), Some(CardShare { card: 2, bytes: 7 }));
        assert_eq!((told("cuda", None).card(), told("cuda", None).share()), (Some(0), None));
    }
}
