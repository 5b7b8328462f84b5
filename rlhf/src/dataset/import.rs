//! Rows from files: JSONL in any of the forms of [`super::format`], Parquet, and Delta tables.
//!
//! A file is read one line or batch at a time, whatever its size. It is read once to find every bad line, and only then written.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use deltalake::DeltaTableError;
use deltalake::arrow::array::RecordBatchReader;
use deltalake::parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use serde::Serialize;
use serde_json::{Map, Value};

use super::Message;
use super::error::DatasetError;
use super::format::{self, BadLine};
use super::stored::{self, StoredRow};
use super::table::{BATCH, RowStream, Table};

/// Longest line that is read; a longer one is a bad line.
pub const MAX_LINE: usize = 16 << 20;
/// Bad lines that are told in full; all are counted.
pub const TOLD: usize = 100;

/// What to import.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Input {
    /// A line of JSON per row.
    Jsonl {
        /// Its path.
        path: PathBuf,
    },
    /// One file, or a folder of them in the order of their names.
    Parquet {
        /// Its path.
        path: PathBuf,
    },
    /// A table at a version.
    Delta {
        /// Path or URL.
        location: String,
        /// The newest when absent.
        version: Option<u64>,
    },
}

/// Lines that are no rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BadLines {
    /// How many there are.
    pub count: u64,
    /// The first of them.
    pub first: Vec<BadLine>,
}

impl BadLines {
    pub(crate) fn push(&mut self, bad: BadLine) {
        self.count += 1;
        if self.first.len() < TOLD {
            self.first.push(bad);
        }
    }
}

impl fmt::Display for BadLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for bad in &self.first {
            writeln!(f, "line {}: {}; {}", bad.line, bad.what, bad.fix)?;
        }
        let more = self.count - self.first.len() as u64;
        if more > 0 {
            writeln!(f, "and {more} more")?;
        }
        let lines = if self.count == 1 { "line is no row" } else { "lines are no rows" };
        write!(f, "{} {lines}", self.count)
    }
}

impl Input {
    /// What lies at a place: a Delta table, Parquet, or else lines of JSON.
    pub fn at(place: &str, version: Option<u64>) -> Result<Self, DatasetError> {
        if place.contains("://") {
            return Ok(Self::Delta { location: place.to_owned(), version });
        }
        let path = PathBuf::from(place);
        let wrong = |reason: &str| DatasetError::Unreadable { what: place.to_owned(), reason: reason.to_owned() };
        let found = std::fs::metadata(&path).map_err(|source| DatasetError::File { path: path.clone(), source })?;
        let is_parquet = |path: &Path| path.extension().is_some_and(|extension| extension == "parquet");
        let input = if path.join("_delta_log").is_dir() {
            return Ok(Self::Delta { location: place.to_owned(), version });
        } else if is_parquet(&path) || found.is_dir() && parquet_files(&path)?.iter().any(|file| is_parquet(file)) {
            Self::Parquet { path }
        } else if found.is_dir() {
            return Err(wrong("it is a folder without a Delta table or Parquet files; name a file"));
        } else {
            Self::Jsonl { path }
        };
        match version {
            Some(_) => Err(wrong("it is no Delta table, and only those have versions; leave the version out")),
            None => Ok(input),
        }
    }

    /// For the origin of rows: the last part of the path.
    pub fn name(&self) -> String {
        let last =
            |path: &Path| path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
        match self {
            Self::Jsonl { path } | Self::Parquet { path } => last(path),
            Self::Delta { location, version } => {
                let name = location.trim_end_matches('/').rsplit('/').next().unwrap_or(location);
                version.map_or_else(|| name.to_owned(), |version| format!("{name}@{version}"))
            }
        }
    }

    /// Bytes to read, where that is known before.
    pub fn bytes(&self) -> Option<u64> {
        match self {
            Self::Jsonl { path } => std::fs::metadata(path).ok().map(|found| found.len()),
            _ => None,
        }
    }

    /// Begins to read.
    pub async fn open(&self) -> Result<Reading, DatasetError> {
        let open = match self {
            Self::Jsonl { path } => Open::Jsonl { reader: BufReader::with_capacity(1 << 18, file(path)?), line: 0 },
            Self::Parquet { path } => {
                let mut files = if path.is_dir() { parquet_files(path)? } else { vec![path.clone()] };
                files.reverse();
                Open::Parquet { files, open: None, row: 0 }
            }
            Self::Delta { location, version } => {
                let table = Table::open(location, *version).await?;
                Open::Delta { rows: Box::new(table.rows().await?), row: 0 }
            }
        };
        Ok(Reading { name: self.name(), open })
    }
}

fn file(path: &Path) -> Result<File, DatasetError> {
    File::open(path).map_err(|source| DatasetError::File { path: path.to_owned(), source })
}

fn parquet_files(folder: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let wrong = |source| DatasetError::File { path: folder.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(wrong)? {
        let path = entry.map_err(wrong)?.path();
        if path.extension().is_some_and(|extension| extension == "parquet") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// An input that is being read.
pub struct Reading {
    name: String,
    open: Open,
}

enum Open {
    Jsonl { reader: BufReader<File>, line: u64 },
    Parquet { files: Vec<PathBuf>, open: Option<ParquetRecordBatchReader>, row: u64 },
    Delta { rows: Box<RowStream>, row: u64 },
}

/// Some rows, and bytes that they took in the file where that counts.
#[derive(Default)]
pub struct Portion {
    /// Rows and bad lines, in order.
    pub rows: Vec<Result<StoredRow, BadLine>>,
    /// Bytes read.
    pub bytes: u64,
}

impl Reading {
    /// The next few rows; none at the end.
    pub async fn next(&mut self) -> Result<Option<Portion>, DatasetError> {
        let name = &self.name;
        let row = |line: u64, object: Map<String, Value>| {
            format::parse(object, &format!("{name}:{line}")).map_err(|(what, fix)| BadLine { line, what, fix })
        };
        let batch = |objects: Vec<Map<String, Value>>, first: &mut u64| {
            let rows = objects.into_iter().map(|object| {
                *first += 1;
                row(*first, object)
            });
            Portion { rows: rows.collect(), bytes: 0 }
        };
        match &mut self.open {
            Open::Delta { rows, row } => Ok(rows.next_objects().await?.map(|objects| batch(objects, row))),
            Open::Parquet { files, open, row } => loop {
                if let Some(reader) = open {
                    match reader.next() {
                        Some(read) => {
                            let read = read.map_err(DeltaTableError::from)?;
                            let objects = stored::to_json(&read).map_err(DeltaTableError::from)?;
                            return Ok(Some(batch(objects, row)));
                        }
                        None => *open = None,
                    }
                }
                let Some(path) = files.pop() else { return Ok(None) };
                let unreadable = |error: deltalake::parquet::errors::ParquetError| DatasetError::Unreadable {
                    what: path.display().to_string(),
                    reason: format!("it is no Parquet file ({error})"),
                };
                let builder = ParquetRecordBatchReaderBuilder::try_new(file(&path)?).map_err(unreadable)?;
                let reader = builder.with_batch_size(BATCH).build().map_err(unreadable)?;
                tracing::debug!(path = %path.display(), columns = reader.schema().fields().len(), "reading");
                *open = Some(reader);
            },
            Open::Jsonl { reader, line } => {
                let mut portion = Portion::default();
                let mut text = Vec::new();
                // By bytes too: five hundred of the longest lines are gigabytes.
                while portion.rows.len() < BATCH && portion.bytes < MAX_LINE as u64 {
                    let wrong = |source| DatasetError::File { path: PathBuf::from(name), source };
                    let (bytes, whole) = next_line(reader, &mut text).map_err(wrong)?;
                    if bytes == 0 {
                        break;
                    }
                    *line += 1;
                    portion.bytes += bytes;
                    let blank = text.iter().all(u8::is_ascii_whitespace);
                    let bad = |what: String, fix: &str| Err(BadLine { line: *line, what, fix: fix.to_owned() });
                    if !whole {
                        portion.rows.push(bad(format!("it is longer than {} MiB", MAX_LINE >> 20), "split it, or leave it out"));
                    } else if !blank {
                        let text = text.trim_ascii_end();
                        let text = if *line == 1 { text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(text) } else { text };
                        portion.rows.push(match serde_json::from_slice::<Value>(text) {
                            Ok(Value::Object(object)) => row(*line, object),
                            Ok(_) => bad("it is no JSON object".to_owned(), "write one {…} per line"),
                            Err(error) => {
                                // Its own line number is always 1.
                                let why = error.to_string().replace("line 1 ", "");
                                bad(format!("it is no JSON ({why})"), "write one whole {…} per line, in UTF-8")
                            }
                        });
                    }
                }
                Ok((portion.bytes > 0).then_some(portion))
            }
        }
    }
}

/// Reads a line into `text`. Returns its bytes (0 at the end), and whether it fitted: of one that did not, nothing is kept.
fn next_line(reader: &mut impl BufRead, text: &mut Vec<u8>) -> std::io::Result<(u64, bool)> {
    text.clear();
    let mut bytes = reader.by_ref().take(MAX_LINE as u64 + 1).read_until(b'\n', text)? as u64;
    if text.len() <= MAX_LINE || text.ends_with(b"\n") {
        return Ok((bytes, true));
    }
    text.clear();
    bytes += reader.skip_until(b'\n')? as u64;
    Ok((bytes, false))
}

/// The prompts of evaluations: of each line its `prompt`, or its `messages` up to the last that is not the assistant's.
pub async fn prompts(input: &Input) -> Result<Vec<Vec<Message>>, DatasetError> {
    let Input::Jsonl { path } = input else { return Ok(Vec::new()) };
    let mut reader = BufReader::new(file(path)?);
    let (mut prompts, mut bad, mut text, mut line) = (Vec::new(), BadLines::default(), Vec::new(), 0);
    loop {
        let (bytes, whole) =
            next_line(&mut reader, &mut text).map_err(|source| DatasetError::File { path: path.clone(), source })?;
        if bytes == 0 {
            break;
        }
        line += 1;
        if whole && text.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match serde_json::from_slice::<Value>(&text).ok().and_then(|object| format::prompt_of(&object)) {
            Some(prompt) => prompts.push(prompt),
            None => bad.push(BadLine {
                line,
                what: "it has no prompt".to_owned(),
                fix: "write {\"prompt\": …} with a string or messages, or {\"messages\": […]}".to_owned(),
            }),
        }
    }
    if bad.count > 0 { Err(DatasetError::Lines(bad)) } else { Ok(prompts) }
}
