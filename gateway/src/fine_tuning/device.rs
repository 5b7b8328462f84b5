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

/// Where a training goes on that was told another place than trainings have now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// Where it was: a training goes on only on the kind of device that it began on.
    Stays,
    /// Where trainings are now.
    Follows,
    /// Where trainings are now, from its first step: what it began on is not there any more.
    BeginsAnew,
}

impl Move {
    /// Of a training that was to compute at `told`, where trainings are now at `now`; `is_there` says whether a card is.
    pub fn of(told: &TrainingDevice, begun: bool, now: &TrainingDevice, is_there: impl FnOnce(usize) -> bool) -> Self {
        match (told.card(), now.card()) {
            // Also from card to card: serving leaves memory on the one that is named now.
            _ if !begun => Self::Follows,
            (None, None) | (Some(_), Some(_)) => Self::Follows,
            (None, Some(_)) => Self::Stays,
            (Some(card), None) if is_there(card) => Self::Stays,
            (Some(_), None) => Self::BeginsAnew,
        }
    }
}

/// What a process is told that finds all else in its specification, its card, too.
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

    #[test]
    fn a_job_follows_todays_settings_as_far_as_what_it_has_learnt_goes_along() {
        let [cpu, first, second] = ["cpu", "cuda:0", "cuda:1"].map(|device| told(device, None));
        let lowered = told("cuda:0", Some(7));
        let gone = |_| false;
        for (was, begun, now, expected) in [
            (&cpu, false, &first, Move::Follows),
            (&first, false, &cpu, Move::Follows),
            (&first, true, &second, Move::Follows),
            (&first, true, &lowered, Move::Follows),
            (&cpu, true, &first, Move::Stays),
            (&first, true, &cpu, Move::BeginsAnew),
        ] {
            assert_eq!(Move::of(was, begun, now, gone), expected, "{was:?} {begun} {now:?}");
        }
        assert_eq!(Move::of(&first, true, &cpu, |card| card == 0), Move::Stays);
    }
}
