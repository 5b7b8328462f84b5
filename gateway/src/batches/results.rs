//! The two files that a batch writes: answers and errors. They only grow, and they are the one truth about which lines are done.

use crate::batches::line::{LineResult, Row, Tokens};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use tidemill_store::BatchProgress;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

/// Line numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LineSet(Vec<u64>);

impl LineSet {
    /// Adds a line; `false` when it was in already.
    pub fn insert(&mut self, line: usize) -> bool {
        let (word, bit) = (line / 64, 1 << (line % 64));
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        let Some(word) = self.0.get_mut(word) else { return false };
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Whether the line is in.
    pub fn contains(&self, line: usize) -> bool {
        self.0.get(line / 64).is_some_and(|word| word & (1 << (line % 64)) != 0)
    }
}

/// What the rows on the disk say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Lines that have a row.
    pub done: LineSet,
    /// Answered.
    pub completed: u64,
    /// Answered with an error.
    pub failed: u64,
    /// Of all answers.
    pub tokens: Tokens,
}

impl Tally {
    /// Counts a row, once per line.
    fn count(&mut self, row: Row) {
        if !self.done.insert(row.line) {
            return;
        }
        match row.result {
            LineResult::Completed => self.completed += 1,
            LineResult::Failed => self.failed += 1,
            LineResult::NeverRan => {}
        }
        self.tokens.add(row.tokens);
    }

    /// With the number of lines.
    pub fn progress(&self, total: u64) -> BatchProgress {
        BatchProgress { total, completed: self.completed, failed: self.failed }
    }
}

/// A row to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// What it says.
    pub row: Row,
    /// With its end of line.
    pub text: Vec<u8>,
}

/// Both files, open for more.
#[derive(Debug)]
pub struct Results {
    /// What is on the disk.
    pub tally: Tally,
    output: Sink,
    errors: Sink,
    waiting: Vec<Row>,
}

#[derive(Debug)]
struct Sink {
    path: PathBuf,
    file: File,
    bytes: u64,
    buffer: Vec<u8>,
}

impl Results {
    /// Opens the files as they are, without the row that a killed process may have left half-written at the end.
    pub async fn open(output: PathBuf, errors: PathBuf) -> io::Result<Self> {
        let read = move || {
            let mut tally = Tally::default();
            let bytes = (recover(&output, &mut tally)?, recover(&errors, &mut tally)?);
            Ok::<_, io::Error>((tally, (output, bytes.0), (errors, bytes.1)))
        };
        let (tally, output, errors) = tokio::task::spawn_blocking(read).await.map_err(io::Error::other)??;
        Ok(Self { tally, output: Sink::open(output).await?, errors: Sink::open(errors).await?, waiting: Vec::new() })
    }

    /// Takes a row, to be written with the next [`Results::write`].
    pub fn push(&mut self, written: &Written) {
        let sink = if written.row.result == LineResult::Completed { &mut self.output } else { &mut self.errors };
        sink.buffer.extend_from_slice(&written.text);
        self.waiting.push(written.row);
    }

    /// Puts the rows on the disk; only then do they count.
    pub async fn write(&mut self) -> io::Result<()> {
        self.output.write().await?;
        self.errors.write().await?;
        for row in self.waiting.drain(..) {
            self.tally.count(row);
        }
        Ok(())
    }

    /// Bytes of the answers and of the errors.
    pub fn bytes(&self) -> (u64, u64) {
        (self.output.bytes, self.errors.bytes)
    }

    /// Flushes everything, names included, and removes what is empty.
    pub async fn close(mut self) -> io::Result<()> {
        self.write().await?;
        for sink in [self.output, self.errors] {
            sink.file.sync_all().await?;
            if sink.bytes == 0 {
                tokio::fs::remove_file(&sink.path).await?;
            }
            if let Some(folder) = sink.path.parent() {
                File::open(folder).await?.sync_all().await?;
            }
        }
        Ok(())
    }
}

impl Sink {
    async fn open((path, bytes): (PathBuf, u64)) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(&path).await?;
        file.set_len(bytes).await?;
        Ok(Self { path, file, bytes, buffer: Vec::new() })
    }

    async fn write(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.file.write_all(&self.buffer).await?;
        self.file.flush().await?;
        self.file.sync_data().await?;
        self.bytes += self.buffer.len() as u64;
        self.buffer.clear();
        // One huge answer must not hold its room for the rest of the batch.
        self.buffer.shrink_to(1 << 20);
        Ok(())
    }
}

/// Counts the rows of a file and says how many bytes of it are whole rows.
fn recover(path: &Path, tally: &mut Tally) -> io::Result<u64> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let (mut reader, mut text, mut whole) = (BufReader::with_capacity(64 * 1024, file), Vec::new(), 0);
    loop {
        text.clear();
        let read = reader.read_until(b'\n', &mut text)?;
        let row = if text.last() == Some(&b'\n') { Row::parse(&text) } else { None };
        // What follows a damaged row was not on the disk for sure either, so those lines run again.
        let Some(row) = row else { return Ok(whole) };
        tally.count(row);
        whole += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batches::line::{answered, never_ran, row_id};
    use uuid::Uuid;

    fn row(line: usize, status: u16) -> Written {
        let text =
            answered(&row_id(Uuid::nil(), line), "c", status, "r", br#"{"usage":{"prompt_tokens":2,"completion_tokens":1}}"#);
        Written { row: Row::parse(&text).unwrap(), text }
    }

    #[tokio::test]
    async fn a_torn_row_is_cut_off_and_its_line_is_not_done() {
        let folder = tempfile::tempdir().unwrap();
        let (output, errors) = (folder.path().join("o"), folder.path().join("e"));
        let mut results = Results::open(output.clone(), errors.clone()).await.unwrap();
        for (line, status) in [(1, 200), (70, 200), (3, 400)] {
            results.push(&row(line, status));
        }
        assert_eq!(results.tally, Tally::default(), "nothing counts before it is on the disk");
        results.write().await.unwrap();
        let whole = (results.tally.clone(), results.bytes());
        assert_eq!((whole.0.completed, whole.0.failed), (2, 1));
        drop(results);
        let kept = std::fs::read(&output).unwrap();
        let next = row(5, 200).text;
        for torn in 1..next.len() {
            let mut bytes = kept.clone();
            bytes.extend_from_slice(&next[..torn]);
            std::fs::write(&output, bytes).unwrap();
            let results = Results::open(output.clone(), errors.clone()).await.unwrap();
            assert_eq!((results.tally.clone(), results.bytes()), whole);
            assert!(!results.tally.done.contains(5));
            assert_eq!(std::fs::read(&output).unwrap(), kept);
        }
    }

    #[tokio::test]
    async fn lines_that_never_ran_are_done_and_not_counted_and_empty_files_go() {
        let folder = tempfile::tempdir().unwrap();
        let (output, errors) = (folder.path().join("o"), folder.path().join("e"));
        let mut results = Results::open(output.clone(), errors.clone()).await.unwrap();
        let text = never_ran(&row_id(Uuid::nil(), 9), "c", "batch_expired", "late");
        results.push(&Written { row: Row::parse(&text).unwrap(), text });
        results.write().await.unwrap();
        assert!(results.tally.done.contains(9) && (results.tally.completed, results.tally.failed) == (0, 0));
        results.close().await.unwrap();
        assert!(!output.exists() && errors.exists());
    }
}
