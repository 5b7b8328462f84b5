//! Fills queues behind the traffic.
//!
//! Every rule has a cursor in the store, `filled_until`. An answer's id is as old as its request, but its row comes when it ended, so
//! rows appear behind ids that have been read already. Hence two readings: one at once, from a cursor in memory, and one
//! [`SETTLED`] later, which moves the stored cursor. A queue takes each source once, so reading twice, after a restart or on two
//! gateways, adds nothing. Bounded: some pages per pass, [`GENERATING`] answers at a time, and a rule rests while
//! `max_open` pairs are open.

use super::generate::{self, Outcome};
use super::rule::{Admitted, From, Rule};
use crate::clock::now;
use crate::http::App;
use std::collections::HashMap;
use std::time::Duration;
use tidemill_store::label::{Draft, LabelError, Labels, NewDraft, NewTask, Queue};
use tidemill_store::records::{Inference, Kind};
use tidemill_store::{FeedbackFilter, InferenceFilter, Order, StoreError};
use uuid::Uuid;

/// Between two passes.
const PACE: Duration = Duration::from_secs(1);
/// After this time an answer's row is there or will never be, in microseconds.
const SETTLED: i64 = 600_000_000;
/// Rows per page, pages per pass.
const PAGE: usize = 200;
const PAGES: usize = 5;
/// Pairs that are being generated at once.
const GENERATING: u32 = 4;

#[derive(Debug, thiserror::Error)]
enum FillError {
    #[error("{0}")]
    Label(#[from] LabelError),
    #[error("{0}")]
    Store(#[from] StoreError),
}

/// Works until the server drains.
pub async fn keep_filling(app: App) {
    let labels = Labels::new(app.store.database());
    let mut heads: HashMap<Uuid, String> = HashMap::new();
    while !app.drain.is_draining() {
        if let Err(error) = pass(&app, &labels, &mut heads).await {
            tracing::warn!(%error, "queues are not filled at the moment; trying again");
            tokio::time::sleep(PACE * 5).await;
        }
        tokio::time::sleep(PACE).await;
    }
}

async fn pass(app: &App, labels: &Labels, heads: &mut HashMap<Uuid, String>) -> Result<(), FillError> {
    for queue in labels.list_queues().await?.into_iter().filter(|queue| queue.closed.is_none()) {
        let Ok(rule) = serde_json::from_value::<Rule>(queue.rule.clone()) else { continue };
        if rule.from != From::Traffic {
            continue;
        }
        if labels.is_full(queue.id, rule.max_open).await? {
            continue;
        }
        let head = heads.entry(queue.id).or_insert_with(|| queue.filled_until.clone());
        read(app, labels, &queue, &rule, head, None).await?;
        let mut tail = queue.filled_until.clone();
        read(app, labels, &queue, &rule, &mut tail, Some(now() - SETTLED)).await?;
        if tail != queue.filled_until {
            labels.advance(queue.id, &queue.filled_until, &tail).await?;
        }
    }
    complete_drafts(app, labels).await
}

/// Shows the rule what comes after `cursor` and was created before `until`, and moves the cursor.
async fn read(
    app: &App,
    labels: &Labels,
    queue: &Queue,
    rule: &Rule,
    cursor: &mut String,
    until: Option<i64>,
) -> Result<(), FillError> {
    for _ in 0..PAGES {
        let after = Uuid::parse_str(cursor).ok();
        let (answers, last, more) = if rule.low_thumb {
            disliked(app, after, until).await?
        } else {
            let filter =
                InferenceFilter { after, until, limit: Some(PAGE), order: Order::OldestFirst, ..InferenceFilter::default() };
            let page = app.store.list_inferences(&filter).await?;
            let last = page.items.last().map(|answer| answer.id);
            (page.items, last, page.has_more)
        };
        enter(labels, queue, rule, &answers).await?;
        match last {
            Some(last) => *cursor = last.to_string(),
            None => break,
        }
        if !more {
            break;
        }
    }
    Ok(())
}

/// Answers that got a thumb down; the cursor walks over the feedback.
async fn disliked(
    app: &App,
    after: Option<Uuid>,
    until: Option<i64>,
) -> Result<(Vec<Inference>, Option<Uuid>, bool), StoreError> {
    let filter = FeedbackFilter {
        kind: Some(Kind::Thumb),
        withdrawn: Some(false),
        after,
        until,
        limit: Some(PAGE),
        order: Order::OldestFirst,
        ..FeedbackFilter::default()
    };
    let page = app.store.list_feedback(&filter).await?;
    let last = page.items.last().map(|feedback| feedback.id);
    let mut answers = Vec::new();
    for feedback in page.items.iter().filter(|feedback| feedback.number == Some(0.0)) {
        let Ok(target) = Uuid::parse_str(&feedback.target) else { continue };
        answers.extend(app.store.inference(target).await?);
    }
    Ok((answers, last, page.has_more))
}

async fn enter(labels: &Labels, queue: &Queue, rule: &Rule, answers: &[Inference]) -> Result<(), LabelError> {
    let (mut pairs, mut drafts): (Vec<NewTask>, Vec<NewDraft>) = (Vec::new(), Vec::new());
    // Answers that we generated for a queue are no traffic.
    for answer in answers.iter().filter(|answer| !answer.metadata.contains_key("tidemill")) {
        match rule.admit(queue.id, answer) {
            Some(Admitted::Pair(pair)) => pairs.push(*pair),
            Some(Admitted::Draft(draft)) => drafts.push(*draft),
            None => {}
        }
    }
    if !pairs.is_empty() {
        labels.add_tasks(queue.id, &pairs, now()).await?;
    }
    if !drafts.is_empty() {
        labels.add_drafts(queue.id, &drafts, now()).await?;
    }
    Ok(())
}

/// Some of the drafts that wait, side by side.
async fn complete_drafts(app: &App, labels: &Labels) -> Result<(), FillError> {
    let drafts = labels.waiting_drafts(GENERATING).await?;
    let mut running = tokio::task::JoinSet::new();
    for draft in drafts {
        let (app, labels) = (app.clone(), labels.clone());
        running.spawn(async move { complete_draft(&app, &labels, &draft).await });
    }
    while let Some(done) = running.join_next().await {
        if let Ok(result) = done {
            result?;
        }
    }
    Ok(())
}

async fn complete_draft(app: &App, labels: &Labels, draft: &Draft) -> Result<(), LabelError> {
    match generate::complete(app, draft).await {
        Outcome::Task(task) => {
            // A verdict must find the answers that it is about.
            app.store.flush().await;
            labels.finish_draft(draft, &task, now()).await
        }
        Outcome::Never(why) => labels.fail_draft(draft.id, &why).await,
        Outcome::Later => Ok(()),
    }
}
