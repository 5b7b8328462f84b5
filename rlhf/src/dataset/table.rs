//! Snapshots as versions of a Delta Lake table.
//!
//! Every snapshot replaces the whole content of the table in one commit, so that a reader at version `v` sees exactly snapshot `v`.
//! Version 0 is the empty table. Old files and log entries are kept for good: the table's properties tell other writers so.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path as FilePath;
use std::sync::Arc;

use bytes::Bytes;
use deltalake::arrow::datatypes::SchemaRef;
use deltalake::kernel::Action;
use deltalake::kernel::transaction::{CommitBuilder, CommitProperties};
use deltalake::parquet::arrow::arrow_reader::ArrowReaderOptions;
use deltalake::parquet::arrow::async_reader::{AsyncFileReader, ParquetRecordBatchStream, ParquetRecordBatchStreamBuilder};
use deltalake::parquet::basic::{Compression, ZstdLevel};
use deltalake::parquet::errors::ParquetError;
use deltalake::parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use deltalake::parquet::file::properties::WriterProperties;
use deltalake::protocol::{DeltaOperation, SaveMode};
use deltalake::writer::{DeltaWriter, RecordBatchWriter};
use deltalake::{DeltaTable, DeltaTableBuilder, DeltaTableError, ObjectStore, Path};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use serde_json::{Map, Value};

use super::error::DatasetError;
use super::stored::{self, StoredRow};

/// Rows per batch, written and read.
pub const BATCH: usize = 512;
/// Parquet files are closed at about this size.
const FILE_BYTES: u64 = 256 << 20;
/// Others may build the same dataset at the same moment; each of them gets a version of its own.
const COMMIT_ATTEMPTS: usize = 8;
/// "For good", in the words of a table property.
const FOREVER: &str = "interval 36500 days";

/// A dataset's table.
pub struct Table {
    delta: DeltaTable,
}

/// A snapshot being written; it becomes a version with [`Writing::commit`], or nothing.
pub struct Writing {
    table: Table,
    writer: RecordBatchWriter,
    schema: SchemaRef,
    waiting: Vec<StoredRow>,
}

/// `location` as the URL of a table: an address stays one, a path becomes one and its folder is made.
pub fn url(location: &str) -> Result<url::Url, DatasetError> {
    let wrong = |reason: String| DatasetError::Location { location: location.to_owned(), reason };
    if location.contains("://") {
        let url = url::Url::parse(location).map_err(|error| wrong(error.to_string()))?;
        return match url.scheme() {
            "file" | "memory" => Ok(url),
            "s3" | "s3a" if cfg!(feature = "s3") => Ok(url),
            "gs" if cfg!(feature = "gcs") => Ok(url),
            "az" | "azure" | "abfs" | "abfss" | "adl" if cfg!(feature = "azure") => Ok(url),
            scheme @ ("s3" | "s3a" | "gs" | "az" | "azure" | "abfs" | "abfss" | "adl") => Err(wrong(format!(
                "this tidemill was built without {scheme}:// storage; build it with the cargo feature s3, gcs or azure"
            ))),
            scheme => {
                Err(wrong(format!("{scheme}:// is no storage that holds Delta tables here; use a path, s3://, gs:// or az://")))
            }
        };
    }
    let path = std::path::absolute(FilePath::new(location)).map_err(|error| wrong(error.to_string()))?;
    url::Url::from_directory_path(&path).map_err(|()| wrong("it is not a path".to_owned()))
}

fn builder(location: &str) -> Result<DeltaTableBuilder, DatasetError> {
    // Credentials and endpoints come from the environment, in the names that the clouds' own tools use.
    Ok(DeltaTableBuilder::from_url(url(location)?)?.with_storage_options(HashMap::new()))
}

impl Table {
    /// Opens the table, or makes it.
    pub async fn open_or_create(location: &str, name: &str) -> Result<Self, DatasetError> {
        if !location.contains("://") {
            tokio::fs::create_dir_all(location).await.map_err(|source| DatasetError::File { path: location.into(), source })?;
        }
        let mut delta = builder(location)?.build()?;
        match delta.load().await {
            Ok(()) => return Ok(Self { delta }),
            Err(DeltaTableError::NotATable(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let created = delta
            .create()
            // Without retries: one inside would make the table again as version 1 when somebody else was first.
            .with_commit_properties(CommitProperties::default().with_max_retries(0))
            .with_table_name(name)
            .with_columns(stored::columns())
            .with_configuration(
                [
                    ("delta.logRetentionDuration", FOREVER),
                    ("delta.deletedFileRetentionDuration", FOREVER),
                    ("delta.enableExpiredLogCleanup", "false"),
                    // Statistics of texts would copy their beginnings into the log.
                    ("delta.dataSkippingNumIndexedCols", "2"),
                ]
                .map(|(key, value)| (key.to_owned(), Some(value.to_owned()))),
            )
            .await;
        match created {
            Ok(delta) => Ok(Self { delta }),
            // Somebody else was first.
            Err(error) => {
                let mut delta = builder(location)?.build()?;
                match delta.load().await {
                    Ok(()) => Ok(Self { delta }),
                    Err(_) => Err(error.into()),
                }
            }
        }
    }

    /// Opens the table as it was at a version; the newest when none is given.
    pub async fn open(location: &str, version: Option<u64>) -> Result<Self, DatasetError> {
        let mut builder = builder(location)?;
        if let Some(version) = version {
            builder = builder.with_version(version);
        }
        let delta = builder.load().await.map_err(|error| match error {
            DeltaTableError::NotATable(_) => {
                DatasetError::Location { location: location.to_owned(), reason: "there is no Delta table".to_owned() }
            }
            error => error.into(),
        })?;
        Ok(Self { delta })
    }

    /// The version that is open.
    pub fn version(&self) -> u64 {
        self.delta.version().unwrap_or_default()
    }

    /// Starts a snapshot.
    pub fn write(self) -> Result<Writing, DatasetError> {
        let level = ZstdLevel::try_new(3).map_err(DeltaTableError::from)?;
        let properties = WriterProperties::builder().set_compression(Compression::ZSTD(level)).build();
        let writer =
            RecordBatchWriter::for_table(&self.delta)?.with_writer_properties(properties).with_target_file_size(FILE_BYTES);
        let schema = writer.arrow_schema();
        Ok(Writing { table: self, writer, schema, waiting: Vec::new() })
    }

    /// The rows of the version, in the order in which they were written, as far as the files' names keep it.
    pub async fn rows(&self) -> Result<RowStream, DatasetError> {
        let mut files = Vec::new();
        for file in self.delta.snapshot()?.log_data().iter() {
            if file.deletion_vector_descriptor().is_some() {
                return Err(DatasetError::Unreadable {
                    what: self.delta.table_url().to_string(),
                    reason: "it has deletion vectors; rewrite it with OPTIMIZE or REORG TABLE … APPLY (PURGE) first".to_owned(),
                });
            }
            files.push((file.object_store_path(), file.size()));
        }
        if !self.delta.snapshot()?.metadata().partition_columns().is_empty() {
            return Err(DatasetError::Unreadable {
                what: self.delta.table_url().to_string(),
                reason: "it is partitioned; export it to Parquet or JSONL with its columns in the files first".to_owned(),
            });
        }
        files.sort();
        files.reverse();
        Ok(RowStream { store: self.delta.object_store(), files, open: None })
    }

    /// Writes a file beside the table's data, under a name that no Delta reader looks at.
    pub async fn put_beside(&self, name: &str, bytes: Vec<u8>) -> Result<(), DatasetError> {
        let path = Path::from(format!("_reports/{name}"));
        self.delta.object_store().put_opts(&path, bytes.into(), Default::default()).await.map_err(DeltaTableError::from)?;
        Ok(())
    }

    /// Reads such a file.
    pub async fn get_beside(&self, name: &str) -> Result<Vec<u8>, DatasetError> {
        let path = Path::from(format!("_reports/{name}"));
        let found = self.delta.object_store().get_opts(&path, Default::default()).await.map_err(DeltaTableError::from)?;
        Ok(found.bytes().await.map_err(DeltaTableError::from)?.to_vec())
    }
}

impl Writing {
    /// Adds a row; batches go to storage as they fill.
    pub async fn add(&mut self, row: StoredRow) -> Result<(), DatasetError> {
        self.waiting.push(row);
        if self.waiting.len() >= BATCH { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), DatasetError> {
        let rows = std::mem::take(&mut self.waiting);
        if !rows.is_empty() {
            let schema = self.schema.clone();
            let encoded = tokio::task::spawn_blocking(move || stored::to_batch(&rows, schema)).await;
            // It ends without a result only when the runtime is going down.
            let batch = encoded.map_err(|_| DatasetError::Interrupted)?.map_err(DeltaTableError::from)?;
            self.writer.write(batch).await?;
        }
        Ok(())
    }

    /// Makes the rows the table's next version and returns the table at it.
    pub async fn commit(mut self, metadata: Map<String, Value>) -> Result<Table, DatasetError> {
        self.flush().await?;
        let adds: Vec<Action> = self.writer.flush().await?.into_iter().map(Action::Add).collect();
        let mut delta = self.table.delta;
        let mut attempt = 1;
        loop {
            let snapshot = delta.snapshot()?;
            // What is there now goes, so that the version holds these rows and no others.
            let removes: Vec<Action> = snapshot.log_data().iter().map(|file| Action::Remove(file.remove_action(true))).collect();
            let operation = DeltaOperation::Write { mode: SaveMode::Overwrite, partition_by: None, predicate: None };
            // Without retries: one inside would keep the removals of an older version and let its successor's rows stay.
            let properties = CommitProperties::default()
                .with_metadata(metadata.clone())
                .with_max_retries(0)
                .with_cleanup_expired_logs(Some(false));
            let committed = CommitBuilder::from(properties)
                .with_actions(adds.iter().cloned().chain(removes).collect())
                .build(Some(snapshot), delta.log_store(), operation)
                .await;
            match committed {
                Ok(done) => {
                    let version = done.version();
                    delta.load_version(version).await?;
                    return Ok(Table { delta });
                }
                Err(error) => {
                    let before = delta.version();
                    delta.load().await?;
                    if attempt == COMMIT_ATTEMPTS || delta.version() == before {
                        return Err(error.into());
                    }
                    attempt += 1;
                }
            }
        }
    }
}

/// A Parquet file in the table's storage, read in the ranges that are needed.
struct StoredFile {
    store: Arc<dyn ObjectStore>,
    path: Path,
    size: u64,
}

impl AsyncFileReader for StoredFile {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        Box::pin(async move {
            let found = self.get_byte_ranges(vec![range]).await?;
            found.into_iter().next().ok_or_else(|| ParquetError::EOF("the storage gave no bytes".to_owned()))
        })
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        Box::pin(async move {
            self.store.get_ranges(&self.path, &ranges).await.map_err(|error| ParquetError::External(Box::new(error)))
        })
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        Box::pin(async move {
            let size = self.size;
            let reader = ParquetMetaDataReader::new().with_arrow_reader_options(options);
            Ok(Arc::new(reader.load_and_finish(self, size).await?))
        })
    }
}

/// Batches of a version, file after file.
pub struct RowStream {
    store: Arc<dyn ObjectStore>,
    files: Vec<(Path, i64)>,
    open: Option<ParquetRecordBatchStream<StoredFile>>,
}

impl RowStream {
    /// The next rows as JSON objects, whatever the columns are; none at the end.
    pub async fn next_objects(&mut self) -> Result<Option<Vec<Map<String, Value>>>, DatasetError> {
        loop {
            if let Some(open) = &mut self.open {
                match open.next().await {
                    Some(batch) => {
                        let batch = batch.map_err(DeltaTableError::from)?;
                        return Ok(Some(stored::to_json(&batch).map_err(DeltaTableError::from)?));
                    }
                    None => self.open = None,
                }
            }
            let Some((path, size)) = self.files.pop() else { return Ok(None) };
            let reader = StoredFile { store: self.store.clone(), path, size: size.unsigned_abs() };
            let stream =
                ParquetRecordBatchStreamBuilder::new(reader).await.map_err(DeltaTableError::from)?.with_batch_size(BATCH);
            self.open = Some(stream.build().map_err(DeltaTableError::from)?);
        }
    }

    /// The next rows of a snapshot of ours.
    pub async fn next_rows(&mut self) -> Result<Option<Vec<StoredRow>>, DatasetError> {
        let Some(objects) = self.next_objects().await? else { return Ok(None) };
        let rows = objects.into_iter().map(stored::from_object).collect::<Result<_, _>>();
        rows.map(Some).map_err(|reason| DatasetError::Unreadable { what: "the table".to_owned(), reason })
    }
}
