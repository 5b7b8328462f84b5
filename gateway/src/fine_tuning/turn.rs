//! Who has a card: one training or evaluation of a server at a time. Each of the processes waits for its turn, and a server that starts has
//! the turns of its own cards back from those that an earlier one left.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tidemill_engine::Device;
use tidemill_rlhf::workplace::one_card;

/// How long a process that has a card which serving wants may take for its step and its checkpoint, before it is killed.
const LEAVING: Duration = Duration::from_secs(20);
/// It is looked at this often.
const POLL: Duration = Duration::from_millis(20);

/// The file in the data directory that is locked by whoever has the card; none for the processor.
pub fn turn_file(data: &Path, device: &Device) -> Option<PathBuf> {
    let card = one_card(device).ok().flatten()?;
    Some(data.join(format!("cuda-{card}.turn")))
}

fn open(turn: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).read(true).write(true).open(turn)
}

/// Waits until nobody else has the card, and has it for as long as the file is open. `waits` is called where somebody has it.
pub fn take_turn(turn: &Path, waits: impl FnOnce()) -> io::Result<File> {
    let file = open(turn)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let _ = writeln!(io::stderr(), "another training or evaluation has the card ({}); waiting for it", turn.display());
            waits();
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => return Err(error),
    }
    sign(&file)?;
    Ok(file)
}

/// Whose turn it is: the number of this process, for a server that wants the card back.
fn sign(turn: &File) -> io::Result<()> {
    turn.set_len(0)?;
    turn.write_all_at(std::process::id().to_string().as_bytes(), 0)
}

/// Who signed last.
fn signed(turn: &File) -> io::Result<Option<Pid>> {
    let mut text = [0; 16];
    let read = turn.read_at(&mut text, 0)?;
    let number = std::str::from_utf8(&text[..read]).ok().and_then(|text| text.parse::<i32>().ok());
    Ok(number.filter(|number| *number > 1).and_then(Pid::from_raw))
}

/// Whether a process other than this one has the file open. A number may be of another machine's, or container's, process.
fn has_open(process: Pid, turn: &File) -> bool {
    let own = process.as_raw_nonzero().get().cast_unsigned() == std::process::id();
    let Ok(turn) = turn.metadata() else { return false };
    let files = std::fs::read_dir(format!("/proc/{}/fd", process.as_raw_nonzero()));
    let is_turn = |file: std::fs::Metadata| (file.dev(), file.ino()) == (turn.dev(), turn.ino());
    !own && files
        .is_ok_and(|mut files| files.any(|file| file.is_ok_and(|file| std::fs::metadata(file.path()).is_ok_and(is_turn))))
}

/// The turns of all cards that `serving` may be on, for as long as the files are open. Whoever an earlier server left at work there is told
/// to keep a checkpoint and stop: what it holds would be missing once as memory that is not free, and once more as what is left to trainings.
/// Those who wait find the card taken, and nobody begins to fill it while models are loaded and caches are sized.
pub fn take_back(data: &Path, serving: &Device) -> io::Result<Vec<File>> {
    let mut turns = Vec::new();
    for entry in std::fs::read_dir(data)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let card = name.and_then(|name| name.strip_prefix("cuda-")?.strip_suffix(".turn")?.parse().ok());
        if card.is_some_and(|card| serving.may_be(card)) {
            turns.push(take_from(&path, LEAVING)?);
        }
    }
    Ok(turns)
}

/// Takes the turn from whoever has it, and from those who wait and come before; each may take `patience` to go.
fn take_from(turn: &Path, patience: Duration) -> io::Result<File> {
    let file = open(turn)?;
    let mut told: Option<(Option<Pid>, Instant)> = None;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // Who has just got it signs in a moment.
        let holder = signed(&file)?.filter(|holder| has_open(*holder, &file));
        let signal = match told {
            Some((before, since)) if before == holder => (since.elapsed() >= patience).then_some(Signal::KILL),
            _ => Some(Signal::TERM),
        };
        if let Some(signal) = signal {
            match holder {
                Some(process) => {
                    tracing::warn!(
                        turn = %turn.display(), process = process.as_raw_nonzero(), ?signal,
                        "a training or an evaluation that an earlier server left has a card of this one's models; it is to end first, and goes on later"
                    );
                    // It may have ended by itself.
                    if let Err(error) = kill_process(process, signal) {
                        tracing::debug!(%error, ?signal, "a process could not be signalled");
                    }
                }
                None => tracing::warn!(
                    turn = %turn.display(),
                    "somebody has a card of this one's models whom it does not see (of another container, or of an older version); waiting"
                ),
            }
            told = Some((holder, Instant::now()));
        }
        sleep(POLL);
    }
    sign(&file)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, Stdio};

    #[test]
    fn the_processor_needs_no_turn() {
        let turns = ["cpu", "cuda", "cuda:2"].map(|device| turn_file(Path::new("/data"), &device.parse().unwrap()));
        assert_eq!(turns, [None, Some("/data/cuda-0.turn".into()), Some("/data/cuda-2.turn".into())]);
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

    /// A process of shell that has the card's turn, as a training that an earlier server left has it.
    fn holder(turn: &Path, script: &str) -> Child {
        let file = open(turn).unwrap();
        file.try_lock().unwrap();
        let mut shell = Command::new("/bin/sh");
        let mut child = shell.args(["-c", script]).stdin(file.try_clone().unwrap()).stdout(Stdio::piped()).spawn().unwrap();
        // Its first line says that it is ready.
        child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        file.set_len(0).unwrap();
        file.write_all_at(child.id().to_string().as_bytes(), 0).unwrap();
        child
    }

    #[test]
    fn a_server_has_the_turns_of_its_cards_back_from_whoever_was_left_and_of_no_others() {
        let data = tempfile::tempdir().unwrap();
        let turn = |card: usize| data.path().join(format!("cuda-{card}.turn"));
        assert_eq!(take_back(data.path(), &Device::Auto).unwrap().len(), 0);
        let [mut first, mut other] = [0, 1].map(|card| holder(&turn(card), "echo; exec sleep 600"));
        std::fs::write(data.path().join("cuda-x.turn"), "").unwrap();
        assert_eq!(take_back(data.path(), &Device::Cpu).unwrap().len(), 0);
        let waiting = open(&turn(0)).unwrap();
        let had = take_back(data.path(), &"cuda:0".parse().unwrap()).unwrap();
        assert_eq!(first.wait().unwrap().signal(), Some(15));
        assert!(had.len() == 1 && matches!(waiting.try_lock(), Err(TryLockError::WouldBlock)));
        assert!(other.try_wait().unwrap().is_none());
        drop(had);
        waiting.try_lock().unwrap();
        drop(waiting);
        drop(take_back(data.path(), &"cuda".parse().unwrap()).unwrap());
        assert_eq!(other.wait().unwrap().signal(), Some(15));
    }

    #[test]
    fn who_does_not_go_in_time_is_killed() {
        let data = tempfile::tempdir().unwrap();
        let turn = data.path().join("cuda-0.turn");
        let mut deaf = holder(&turn, "trap '' TERM; echo; while :; do sleep 1 < /dev/null; done");
        drop(take_from(&turn, Duration::from_millis(200)).unwrap());
        assert_eq!(deaf.wait().unwrap().signal(), Some(9));
        assert_eq!(signed(&open(&turn).unwrap()).unwrap(), Pid::from_raw(std::process::id().cast_signed()));
    }
}
