//! How much feedback there is, without reading it.

use sqlx::Row;

use crate::error::StoreError;
use crate::judgements::has_tag;
use crate::patience::at_length;
use crate::records::Kind;
use crate::statement::Select;
use crate::{Database, Store};

/// Which feedback is counted; empty lists and what is absent mean all. What is withdrawn never counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TallyFilter {
    /// Of these kinds; none counts nothing.
    pub kinds: Vec<Kind>,
    /// Created at or after, in microseconds since 1970.
    pub since: Option<i64>,
    /// Created before.
    pub until: Option<i64>,
    /// With any of these tags.
    pub tags: Vec<String>,
    /// With none of these.
    pub exclude_tags: Vec<String>,
    /// From any of these sources.
    pub sources: Vec<String>,
    /// By none of these people.
    pub exclude_authors: Vec<String>,
    /// About answers of any of these models; of a comparison, its first candidate.
    pub models: Vec<String>,
}

/// Feedback, and the people who gave it. Who gave no name is nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Judgements.
    pub judgements: u64,
    /// Different people.
    pub people: u64,
}

impl Store {
    /// Counts feedback.
    pub async fn tally(&self, filter: &TallyFilter) -> Result<Tally, StoreError> {
        if filter.kinds.is_empty() {
            return Ok(Tally::default());
        }
        at_length(count(self.database(), filter)).await
    }
}

async fn count(database: &Database, filter: &TallyFilter) -> Result<Tally, StoreError> {
    let mut select = Select::new("SELECT COUNT(*), COUNT(DISTINCT author) FROM feedback");
    select.plain("withdrawn = 0");
    let kinds: Vec<String> = filter.kinds.iter().map(|kind| kind.as_str().to_owned()).collect();
    select.any("kind = ?", &kinds);
    select.integer("created >= ?", filter.since);
    select.integer("created < ?", filter.until);
    let tag = has_tag(database.dialect());
    select.any(tag, &quoted(&filter.tags));
    for gone in quoted(&filter.exclude_tags) {
        select.text(&format!("NOT {tag}"), &gone);
    }
    select.any("source = ?", &filter.sources);
    for gone in &filter.exclude_authors {
        select.text("(author IS NULL OR author <> ?)", gone);
    }
    let model = "EXISTS (SELECT 1 FROM choices c JOIN inferences i ON i.id = c.inference_id WHERE c.id = feedback.target AND i.model = ?)";
    select.any(model, &filter.models);
    let row = select.query().fetch_one(database.read()).await?;
    let number = |index: usize| row.try_get::<i64, _>(index).map(i64::unsigned_abs);
    Ok(Tally { judgements: number(0)?, people: number(1)? })
}

/// As they stand in the JSON array of a row.
fn quoted(tags: &[String]) -> Vec<String> {
    tags.iter().map(crate::inferences::json).collect()
}
