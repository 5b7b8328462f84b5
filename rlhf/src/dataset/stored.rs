//! A row as a table holds it.

use std::io::Write;

use deltalake::arrow::array::RecordBatch;
use deltalake::arrow::error::ArrowError;
use deltalake::arrow::json::{LineDelimitedWriter, ReaderBuilder};
use deltalake::kernel::{ArrayType, DataType, PrimitiveType, StructField, StructType};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::query::RowKind;
use super::{Example, Message, Origin, Position, Row};
use crate::quality::{Keep, Split};

/// A row with what the snapshot decided about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredRow {
    /// The row.
    #[serde(flatten)]
    pub row: Row,
    /// To train on, or to evaluate on.
    pub split: Split,
    /// What the quality report says about it; none when it was beyond the sample that the report looked at.
    pub verdict: Option<Keep>,
}

impl StoredRow {
    /// What it teaches.
    pub fn kind(&self) -> RowKind {
        match self.row.example {
            Example::Preference { .. } => RowKind::Preference,
            Example::Unpaired { .. } => RowKind::Unpaired,
            Example::Demonstration { .. } => RowKind::Demonstration,
        }
    }
}

/// One column per field; those of other kinds of rows are null.
#[derive(Serialize, Deserialize)]
struct Flat {
    id: String,
    kind: String,
    #[serde(default)]
    prompt: Vec<FlatMessage>,
    #[serde(default)]
    chosen: Option<Vec<FlatMessage>>,
    #[serde(default)]
    rejected: Option<Vec<FlatMessage>>,
    #[serde(default)]
    completion: Option<Vec<FlatMessage>>,
    #[serde(default)]
    label: Option<bool>,
    #[serde(default)]
    split: Option<Split>,
    #[serde(default)]
    verdict: Option<Keep>,
    #[serde(default)]
    source: String,
    #[serde(default, deserialize_with = "micros")]
    judged_at: Option<i64>,
    #[serde(default)]
    chosen_position: Option<Position>,
    #[serde(default)]
    inferences: Vec<String>,
    #[serde(default)]
    feedback: Vec<String>,
    #[serde(default)]
    raters: Vec<String>,
    #[serde(default)]
    users: Vec<String>,
    #[serde(default)]
    variants: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct FlatMessage {
    role: String,
    #[serde(default)]
    content: String,
    /// What else the message carries, as JSON: it has no fixed columns.
    #[serde(default)]
    extra: Option<String>,
}

/// Arrow writes times as text; our own lines hold microseconds.
fn micros<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(None),
        Value::Number(number) => Ok(number.as_i64()),
        Value::String(text) => {
            let time = chrono::DateTime::parse_from_rfc3339(&text).map_err(serde::de::Error::custom)?;
            Ok(Some(time.timestamp_micros()))
        }
        _ => Err(serde::de::Error::custom("'judged_at' is neither a time nor a number of microseconds")),
    }
}

/// The columns, all nullable, so that later ones can join them.
pub fn columns() -> Vec<StructField> {
    let text = || DataType::Primitive(PrimitiveType::String);
    let list = |element| DataType::Array(Box::new(ArrayType::new(element, true)));
    let message = || {
        let fields = ["role", "content", "extra"].map(|name| StructField::new(name, text(), true));
        DataType::Struct(Box::new(StructType::new_unchecked(fields)))
    };
    let column = |name: &str, kind| StructField::new(name, kind, true);
    vec![
        column("id", text()),
        column("kind", text()),
        column("prompt", list(message())),
        column("chosen", list(message())),
        column("rejected", list(message())),
        column("completion", list(message())),
        column("label", DataType::Primitive(PrimitiveType::Boolean)),
        column("split", text()),
        column("verdict", text()),
        column("source", text()),
        column("judged_at", DataType::Primitive(PrimitiveType::Timestamp)),
        column("chosen_position", text()),
        column("inferences", list(text())),
        column("feedback", list(text())),
        column("raters", list(text())),
        column("users", list(text())),
        column("variants", list(text())),
    ]
}

fn flat_messages(messages: &[Message]) -> Vec<FlatMessage> {
    messages
        .iter()
        .map(|message| FlatMessage {
            role: message.role.clone(),
            content: message.content.clone(),
            // A map with string keys is always JSON.
            extra: (!message.extra.is_empty()).then(|| serde_json::to_string(&message.extra).unwrap_or_default()),
        })
        .collect()
}

fn plain_messages(messages: Vec<FlatMessage>) -> Result<Vec<Message>, String> {
    messages
        .into_iter()
        .map(|message| {
            let extra: Map<String, Value> = match message.extra.as_deref() {
                None | Some("") => Map::new(),
                Some(json) => {
                    serde_json::from_str(json).map_err(|error| format!("a message's 'extra' is no JSON object ({error})"))?
                }
            };
            Ok(Message { role: message.role, content: message.content, extra })
        })
        .collect()
}

impl Flat {
    fn new(stored: &StoredRow) -> Self {
        let StoredRow { row, split, verdict } = stored;
        let (mut chosen, mut rejected, mut completion, mut label) = (None, None, None, None);
        match &row.example {
            Example::Preference { chosen: better, rejected: worse, .. } => {
                (chosen, rejected) = (Some(flat_messages(better)), Some(flat_messages(worse)));
            }
            Example::Unpaired { completion: answer, label: good, .. } => {
                (completion, label) = (Some(flat_messages(answer)), Some(*good));
            }
            Example::Demonstration { completion: answer, .. } => {
                completion = Some(flat_messages(answer));
            }
        }
        let origin = row.origin.clone();
        Self {
            id: row.id.clone(),
            kind: stored.kind().as_str().to_owned(),
            prompt: flat_messages(row.example.prompt()),
            chosen,
            rejected,
            completion,
            label,
            split: Some(*split),
            verdict: *verdict,
            source: origin.source,
            judged_at: (origin.judged_at != 0).then_some(origin.judged_at),
            chosen_position: origin.chosen_position,
            inferences: origin.inferences,
            feedback: origin.feedback,
            raters: origin.raters,
            users: origin.users,
            variants: origin.variants,
        }
    }

    fn stored(self) -> Result<StoredRow, String> {
        let prompt = plain_messages(self.prompt)?;
        let need = |messages: Option<Vec<FlatMessage>>, column: &str| {
            plain_messages(messages.ok_or_else(|| format!("a {} row has no '{column}'", self.kind))?)
        };
        let example = match self.kind.as_str() {
            "preference" => {
                Example::Preference { prompt, chosen: need(self.chosen, "chosen")?, rejected: need(self.rejected, "rejected")? }
            }
            "unpaired" => Example::Unpaired {
                prompt,
                completion: need(self.completion, "completion")?,
                label: self.label.ok_or("an unpaired row has no 'label'")?,
            },
            "demonstration" => Example::Demonstration { prompt, completion: need(self.completion, "completion")? },
            other => return Err(format!("kind '{other}' is none of preference, unpaired, demonstration")),
        };
        let origin = Origin {
            inferences: self.inferences,
            feedback: self.feedback,
            raters: self.raters,
            users: self.users,
            variants: self.variants,
            source: self.source,
            chosen_position: self.chosen_position,
            judged_at: self.judged_at.unwrap_or_default(),
        };
        let row = Row { id: self.id, example, origin };
        Ok(StoredRow { row, split: self.split.unwrap_or(Split::Train), verdict: self.verdict })
    }
}

/// Rows as one batch under the table's schema.
pub fn to_batch(rows: &[StoredRow], schema: deltalake::arrow::datatypes::SchemaRef) -> Result<RecordBatch, ArrowError> {
    let flat: Vec<Flat> = rows.iter().map(Flat::new).collect();
    let mut decoder = ReaderBuilder::new(schema.clone()).with_batch_size(rows.len().max(1)).build_decoder()?;
    decoder.serialize(&flat)?;
    Ok(decoder.flush()?.unwrap_or_else(|| RecordBatch::new_empty(schema)))
}

/// Any batch as JSON objects, one per row, without nulls.
pub fn to_json(batch: &RecordBatch) -> Result<Vec<Map<String, Value>>, ArrowError> {
    let mut lines = LineDelimitedWriter::new(Vec::new());
    lines.write(batch)?;
    lines.finish()?;
    let mut bytes = lines.into_inner();
    bytes.flush().map_err(|error| ArrowError::IoError(error.to_string(), error))?;
    serde_json::Deserializer::from_slice(&bytes)
        .into_iter()
        .collect::<Result<_, _>>()
        .map_err(|error| ArrowError::JsonError(error.to_string()))
}

/// Rows of a batch that [`to_batch`] made. The text says what is not as it should be.
pub fn from_batch(batch: &RecordBatch) -> Result<Vec<StoredRow>, String> {
    let objects = to_json(batch).map_err(|error| error.to_string())?;
    objects.into_iter().map(from_object).collect()
}

/// A row as a JSON object with the table's columns.
pub fn to_object(stored: &StoredRow) -> Map<String, Value> {
    // Strings, numbers and lists of them are always JSON.
    match serde_json::to_value(Flat::new(stored)) {
        Ok(Value::Object(mut object)) => {
            object.retain(|_, value| !value.is_null());
            object
        }
        _ => Map::new(),
    }
}

/// The row of such an object.
pub fn from_object(object: Map<String, Value>) -> Result<StoredRow, String> {
    let flat: Flat = serde_json::from_value(Value::Object(object)).map_err(|error| error.to_string())?;
    flat.stored()
}
