//! Where the trainings and evaluations of a server compute. A card is had by one of them at a time: each of the processes waits for its turn.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

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

/// The file in the data directory that is locked by whoever has the card; none for the processor.
pub fn turn_file(data: &Path, device: &Device) -> Option<PathBuf> {
    let card = one_card(device).ok().flatten()?;
    Some(data.join(format!("cuda-{card}.turn")))
}

/// Waits until nobody else has the card, and has it for as long as the file is open. `waits` is called where somebody has it.
pub fn take_turn(turn: &Path, waits: impl FnOnce()) -> io::Result<File> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(turn)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let _ = writeln!(io::stderr(), "another training or evaluation has the card ({}); waiting for it", turn.display());
            waits();
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => return Err(error),
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(device: &str, memory: Option<usize>) -> TrainingDevice {
        TrainingDevice { device: device.parse().unwrap(), memory }
    }

    #[test]
    fn the_processor_needs_no_turn_and_a_card_is_named_with_its_share() {
        let data = Path::new("/data");
        assert_eq!(told("cpu", None).arguments(data), [] as [OsString; 0]);
        let card = told("cuda:2", Some(7));
        assert_eq!(card.arguments(data), ["--turn", "/data", "--device", "cuda:2", "--device-memory", "7"]);
        assert_eq!(job_arguments(data), ["--turn", "/data", "--data", "/data", "--config", "/dev/null"]);
        let turns = ["cpu", "cuda", "cuda:2"].map(|device| turn_file(data, &device.parse().unwrap()));
        assert_eq!(turns, [None, Some("/data/cuda-0.turn".into()), Some("/data/cuda-2.turn".into())]);
        assert_eq!(card.share(), Some(CardShare { card: 2, bytes: 7 }));
        assert_eq!((told("cuda", None).card(), told("cuda", None).share()), (Some(0), None));
    }

    #[test]
    fn whoever_comes_second_waits_for_the_first_to_go() {
        let folder = tempfile::tempdir().unwrap();
        let turn = folder.path().join("cuda-0.turn");
        let nobody = || panic!("nobody else has it");
        let first = take_turn(&turn, nobody).unwrap();
        let (say, second) = std::sync::mpsc::channel();
        let path = turn.clone();
        let waiting = std::thread::spawn(move || {
            let file = take_turn(&path, || say.send("waits").unwrap()).unwrap();
            say.send("has it").unwrap();
            drop(file);
        });
        let minute = std::time::Duration::from_secs(60);
        assert_eq!(second.recv_timeout(minute), Ok("waits"));
        assert!(second.recv_timeout(std::time::Duration::from_millis(100)).is_err());
        drop(first);
        assert_eq!(second.recv_timeout(minute), Ok("has it"));
        waiting.join().unwrap();
        drop(take_turn(&turn, nobody).unwrap());
    }
}
