//! Feedback and the texts it is about, from the store.

use std::collections::{BTreeSet, HashMap, HashSet};

use tidemill_store::records::{Kind, TargetKind};
use tidemill_store::{FeedbackFilter, MAX_PAGE, Order, Store, judged_answers, judged_tasks};
use uuid::Uuid;

use super::answer::{self, Gathered};
use super::error::DatasetError;
use super::query::Query;
use super::watch::{Stage, Watch};

/// Most feedback that one build holds in memory.
pub const MAX_FEEDBACK: usize = 1_000_000;
/// Ids asked for at once.
const PART: usize = 2000;

/// Everything that [`super::build`] needs for a query.
pub async fn gather(store: &Store, query: &Query, watch: &Watch) -> Result<Gathered, DatasetError> {
    let mut gathered = Gathered::default();
    let mut known: HashSet<Uuid> = HashSet::new();
    watch.enter(Stage::Feedback, None);
    let everything = FeedbackFilter { since: query.since, until: query.until, ..FeedbackFilter::default() };
    // A metric tells about an answer whenever it was reported, so the query's times do not bound it.
    let metrics = query.metrics.iter().map(|range| FeedbackFilter {
        kind: Some(Kind::Metric),
        metric: Some(range.name.clone()),
        withdrawn: Some(false),
        ..FeedbackFilter::default()
    });
    for (index, filter) in std::iter::once(everything).chain(metrics).enumerate() {
        let mut filter = FeedbackFilter { limit: Some(MAX_PAGE), order: Order::OldestFirst, ..filter };
        loop {
            watch.go_on()?;
            let page = store.list_feedback(&filter).await?;
            filter.after = page.items.last().map(|last| last.id);
            watch.add(page.items.len() as u64);
            for feedback in page.items {
                if (index > 0 || query.asks_for(&feedback)) && known.insert(feedback.id) {
                    gathered.feedback.push(feedback);
                }
            }
            if gathered.feedback.len() > MAX_FEEDBACK {
                return Err(DatasetError::TooMuch(MAX_FEEDBACK));
            }
            if !page.has_more {
                break;
            }
        }
    }

    let mut answers = BTreeSet::new();
    let mut tasks = BTreeSet::new();
    for feedback in gathered.feedback.iter().filter(|feedback| !feedback.withdrawn) {
        match feedback.target_kind {
            TargetKind::Completion => answers.extend(feedback.targets.iter().cloned()),
            TargetKind::Task => drop(tasks.insert(feedback.target.clone())),
            TargetKind::Conversation => {}
        }
    }
    watch.enter(Stage::Answers, Some((answers.len() + tasks.len()) as u64));
    let mut prompts = HashMap::new();
    let answers: Vec<String> = answers.into_iter().collect();
    for part in answers.chunks(PART) {
        watch.go_on()?;
        let found = judged_answers(store.database(), part).await?;
        gathered.targets.extend(found.into_iter().map(|judged| answer::target(judged, &mut prompts)));
        watch.add(part.len() as u64);
    }
    let tasks: Vec<String> = tasks.into_iter().collect();
    for part in tasks.chunks(PART) {
        watch.go_on()?;
        let found = judged_tasks(store.database(), part).await?;
        gathered.targets.extend(found.into_iter().flat_map(answer::task_targets));
        watch.add(part.len() as u64);
    }
    Ok(gathered)
}
