//! A process that works in a folder of its own, such as the one that trains in a job's.
//!
//! It inherits a locked file as its standard input, so the lock lives exactly as long as the process does, whatever happens to the
//! server: whoever finds it taken knows that somebody trains there, and two never do. What the process says goes to files, not pipes, so
//! that it can go on while there is no server, and the next one listens where the last one stopped.

use crate::fine_tuning::TrainingPriority;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};

/// The locked file, which holds the process's number.
const LOCK: &str = "process";
/// What the process says.
pub const SAID: &str = "progress.jsonl";
/// Its log.
pub const LOG: &str = "log.txt";

/// A process at work in a folder.
#[derive(Debug)]
pub struct Process {
    folder: PathBuf,
    own: Option<Child>,
}

fn open(folder: &Path, create: bool) -> io::Result<File> {
    OpenOptions::new().create(create).truncate(false).read(true).write(true).open(folder.join(LOCK))
}

/// The lock, unless somebody has it.
fn take(folder: &Path, create: bool) -> io::Result<Option<File>> {
    let file = open(folder, create)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

impl Process {
    /// The process that an earlier server left at work in this folder.
    pub fn left(folder: &Path) -> io::Result<Option<Self>> {
        match take(folder, false) {
            Ok(None) => Ok(Some(Self { folder: folder.to_owned(), own: None })),
            Ok(Some(_)) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Starts `program train --job FOLDER --priority WORD`; `None` when somebody is at work there.
    pub fn start(program: &Path, folder: &Path, priority: TrainingPriority) -> io::Result<Option<Self>> {
        let mut command = Command::new(program);
        command.args(["train", "--job"]).arg(folder).args(["--priority", priority.as_str()]);
        Self::run(command, folder)
    }

    /// Starts any command with its work in a folder; `None` when somebody is at work there.
    pub fn run(mut command: Command, folder: &Path) -> io::Result<Option<Self>> {
        let Some(mut lock) = take(folder, true)? else { return Ok(None) };
        let append = |name: &str| OpenOptions::new().create(true).append(true).read(true).open(folder.join(name));
        let mut said = append(SAID)?;
        end_line(&mut said)?;
        // Whoever reads it now must not find the number of the process before.
        lock.set_len(0)?;
        let child = command
            .stdin(lock.try_clone()?)
            .stdout(said)
            .stderr(append(LOG)?)
            // What is typed at the server's terminal is for the server, which tells its processes itself.
            .process_group(0)
            .spawn()?;
        lock.seek(SeekFrom::Start(0))?;
        write!(lock, "{}", child.id())?;
        Ok(Some(Self { folder: folder.to_owned(), own: Some(child) }))
    }

    /// Whether it is gone, and how it ended where it was started here.
    pub fn ended(&mut self) -> io::Result<Option<Option<ExitStatus>>> {
        match &mut self.own {
            Some(child) => Ok(child.try_wait()?.map(Some)),
            None => match take(&self.folder, false) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some(None)),
                taken => Ok(taken?.map(|_| None)),
            },
        }
    }

    /// Asks it to keep a checkpoint and stop.
    pub fn ask(&self) {
        self.signal(Signal::TERM);
    }

    /// Ends it at once.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        let Some(pid) = self.pid() else { return };
        // It may have ended by itself.
        if let Err(error) = kill_process(pid, signal) {
            tracing::debug!(%error, ?signal, "a process could not be signalled");
        }
    }

    fn pid(&self) -> Option<Pid> {
        let number = match &self.own {
            Some(child) => i32::try_from(child.id()).ok(),
            None => {
                let mut text = String::new();
                open(&self.folder, false).and_then(|mut file| file.read_to_string(&mut text)).ok()?;
                text.trim().parse().ok()
            }
        };
        number.filter(|number| *number > 1).and_then(Pid::from_raw)
    }
}

/// A process that was killed may have left half a line.
fn end_line(file: &mut File) -> io::Result<()> {
    if file.seek(SeekFrom::End(0))? == 0 {
        return Ok(());
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    if last != *b"\n" {
        file.write_all(b"\n")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fine_tuning::stand_in::program;
    use std::time::{Duration, Instant};

    fn end(process: &mut Process) -> Option<ExitStatus> {
        let begin = Instant::now();
        loop {
            if let Some(status) = process.ended().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn nobody_trains_where_somebody_does_even_when_the_server_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Process::left(&folder.path().join("nowhere")).unwrap().is_none());
        let program = program(folder.path(), "exec sleep 600");
        let mut first = Process::start(&program, folder.path(), TrainingPriority::Low).unwrap().unwrap();
        assert!(Process::start(&program, folder.path(), TrainingPriority::Low).unwrap().is_none());
        // As the next server sees it.
        let mut left = Process::left(folder.path()).unwrap().unwrap();
        assert!(left.ended().unwrap().is_none());
        left.ask();
        assert!(!end(&mut first).unwrap().success());
        assert_eq!(end(&mut left), None);
        assert!(Process::left(folder.path()).unwrap().is_none());
    }

    #[test]
    fn what_it_says_is_kept_behind_half_a_line() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(SAID), "{\"event\":").unwrap();
        let program = program(folder.path(), "echo \"$1 $2 $3 $4 $5\"; echo why >&2; exit 3");
        let mut process = Process::start(&program, folder.path(), TrainingPriority::Low).unwrap().unwrap();
        assert_eq!(end(&mut process).unwrap().code(), Some(3));
        let said = std::fs::read_to_string(folder.path().join(SAID)).unwrap();
        assert_eq!(said, format!("{{\"event\":\ntrain --job {} --priority low\n", folder.path().display()));
        assert_eq!(std::fs::read_to_string(folder.path().join(LOG)).unwrap(), "why\n");
    }
}
