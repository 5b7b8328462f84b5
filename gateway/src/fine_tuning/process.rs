//! A process that works in a folder of its own, such as the one that trains in a job's.
//!
//! It inherits a locked file as its standard input, so the lock lives exactly as long as the process does, whatever happens to the
//! server: whoever finds it taken knows that somebody trains there, and two never do. What the process says goes to files, not pipes, so
//! that it can go on while there is no server, and the next one listens where the last one stopped. Of the server's environment, which may
//! hold the keys of other servers and the database's password, it gets what any program needs and nothing else.

use crate::fine_tuning::TrainingPriority;
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};

/// The locked file, which holds the process's number.
pub const LOCK: &str = "process";
/// What the process says.
pub const SAID: &str = "progress.jsonl";
/// Its log.
pub const LOG: &str = "log.txt";

/// What it gets of the environment. Two say how the driver numbers cards: a number must mean the same one there.
const KEPT: [&str; 8] =
    ["PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "RUST_BACKTRACE", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"];

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

    /// Starts `program train --job FOLDER --priority WORD` and `more`; `None` when somebody is at work there.
    pub fn start(program: &Path, folder: &Path, priority: TrainingPriority, more: &[OsString]) -> io::Result<Option<Self>> {
        let mut command = Self::command(program);
        command.args(["train", "--job"]).arg(folder).args(["--priority", priority.as_str()]).args(more);
        Self::run(command, folder)
    }

    /// A command that gets of the environment what every process needs, and no secret.
    pub fn command(program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().envs(KEPT.iter().filter_map(|name| Some((*name, std::env::var_os(name)?))));
        command
    }

    /// Starts any command with its work in a folder; `None` when somebody is at work there.
    pub fn run(mut command: Command, folder: &Path) -> io::Result<Option<Self>> {
        let Some(lock) = take(folder, true)? else { return Ok(None) };
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
        sign(&lock, child.id())?;
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

/// Writes this process's number into the locked file of `folder`, if that is its standard input: the server that started it may have been
/// killed before it did, and the next one must know whom to tell.
pub fn sign_in(folder: &Path) -> io::Result<()> {
    sign_if_locked(&File::from(io::stdin().as_fd().try_clone_to_owned()?), folder, std::process::id())
}

fn sign_if_locked(input: &File, folder: &Path, number: u32) -> io::Result<()> {
    let (input_is, lock_is) = (input.metadata()?, std::fs::metadata(folder.join(LOCK)));
    let same = lock_is.is_ok_and(|lock| (lock.dev(), lock.ino()) == (input_is.dev(), input_is.ino()));
    if same { sign(input, number) } else { Ok(()) }
}

/// At the beginning, wherever the other one of the two who share the file is.
fn sign(lock: &File, number: u32) -> io::Result<()> {
    lock.write_all_at(number.to_string().as_bytes(), 0)
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
        let mut first = Process::start(&program, folder.path(), TrainingPriority::Low, &[]).unwrap().unwrap();
        assert!(Process::start(&program, folder.path(), TrainingPriority::Low, &[]).unwrap().is_none());
        // As the next server sees it.
        let mut left = Process::left(folder.path()).unwrap().unwrap();
        assert!(left.ended().unwrap().is_none());
        left.ask();
        assert!(!end(&mut first).unwrap().success());
        assert_eq!(end(&mut left), None);
        assert!(Process::left(folder.path()).unwrap().is_none());
    }

    #[test]
    fn it_gets_no_secret_of_the_servers_environment() {
        let folder = tempfile::tempdir().unwrap();
        // Set by whoever runs the tests, as a database's address would be.
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
        let program = program(folder.path(), "env > \"$3/environment\"");
        let mut process = Process::start(&program, folder.path(), TrainingPriority::Low, &[]).unwrap().unwrap();
        assert!(end(&mut process).unwrap().success());
        let text = std::fs::read_to_string(folder.path().join("environment")).unwrap();
        // What a shell sets by itself.
        let known = |name: &str| KEPT.contains(&name) || ["PWD", "OLDPWD", "SHLVL", "_"].contains(&name);
        let names: Vec<&str> = text.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
        assert!(names.contains(&"PATH") && names.iter().all(|name| known(name)), "{text}");
    }

    #[test]
    fn it_signs_the_file_that_it_was_given_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let sign = |folder: &Path| sign_if_locked(&open(folder, true).unwrap(), folder, 4711);
        sign(folder.path()).unwrap();
        let left = Process { folder: folder.path().to_owned(), own: None };
        assert_eq!(left.pid(), Pid::from_raw(4711));
        let other = tempfile::NamedTempFile::new().unwrap();
        sign_if_locked(other.as_file(), folder.path(), 1).unwrap();
        sign_if_locked(other.as_file(), &folder.path().join("nowhere"), 1).unwrap();
        assert_eq!((left.pid(), other.as_file().metadata().unwrap().len()), (Pid::from_raw(4711), 0));
    }

    #[test]
    fn what_it_says_is_kept_behind_half_a_line() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(SAID), "{\"event\":").unwrap();
        let program = program(folder.path(), "echo \"$1 $2 $3 $4 $5\"; echo why >&2; exit 3");
        let mut process = Process::start(&program, folder.path(), TrainingPriority::Low, &[]).unwrap().unwrap();
        assert_eq!(end(&mut process).unwrap().code(), Some(3));
        let said = std::fs::read_to_string(folder.path().join(SAID)).unwrap();
        assert_eq!(said, format!("{{\"event\":\ntrain --job {} --priority low\n", folder.path().display()));
        assert_eq!(std::fs::read_to_string(folder.path().join(LOG)).unwrap(), "why\n");
    }
}
