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

    /// The file that is locked by whoever has the card.
    fn turn(&self, data: &Path) -> Option<PathBuf> {
        Some(data.join(format!("cuda-{}.turn", self.card()?)))
    }

    /// What a process is told that finds all else in its specification.
    pub fn turn_arguments(&self, data: &Path) -> Vec<OsString> {
        let Some(turn) = self.turn(data) else { return Vec::new() };
        // The data directory is where compiled kernels are kept; a file that somebody is editing has no say.
        let data = [OsString::from("--data"), data.into(), "--config".into(), "/dev/null".into()];
        [OsString::from("--turn"), turn.into()].into_iter().chain(data).collect()
    }

    /// What a process is told that knows no specification.
    pub fn arguments(&self, data: &Path) -> Vec<OsString> {
        let Some(turn) = self.turn(data) else { return Vec::new() };
        let mut told: Vec<OsString> = vec!["--turn".into(), turn.into(), "--device".into(), self.device.to_string().into()];
        told.extend(self.memory.into_iter().flat_map(|bytes| [OsString::from("--device-memory"), bytes.to_string().into()]));
        told
    }
}

/// Waits until nobody else has the card, and has it for as long as the file is open.
pub fn take_turn(turn: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(turn)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let _ = writeln!(io::stderr(), "another training or evaluation has the card ({}); waiting for it", turn.display());
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
        let nothing: [OsString; 0] = [];
        assert_eq!(
            (told("cpu", None).arguments(data), told("cpu", None).turn_arguments(data)),
            (nothing.to_vec(), nothing.to_vec())
        );
        let card = told("cuda:2", Some(7));
        assert_eq!(card.arguments(data), ["--turn", "/data/cuda-2.turn", "--device", "cuda:2", "--device-memory", "7"]);
        assert_eq!(card.turn_arguments(data), ["--turn", "/data/cuda-2.turn", "--data", "/data", "--config", "/dev/null"]);
        assert_eq!(card.share(), Some(CardShare { card: 2, bytes: 7 }));
        assert_eq!((told("cuda", None).card(), told("cuda", None).share()), (Some(0), None));
    }

    #[test]
    fn whoever_comes_second_waits_for_the_first_to_go() {
        let folder = tempfile::tempdir().unwrap();
        let turn = folder.path().join("cuda-0.turn");
        let first = take_turn(&turn).unwrap();
        let (done, second) = std::sync::mpsc::channel();
        let path = turn.clone();
        let waiting = std::thread::spawn(move || {
            let file = take_turn(&path).unwrap();
            done.send(()).unwrap();
            drop(file);
        });
        assert!(second.recv_timeout(std::time::Duration::from_millis(100)).is_err());
        drop(first);
        second.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
        waiting.join().unwrap();
        drop(take_turn(&turn).unwrap());
    }
}
