//! The task that writes answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::{Shared, committed, is_closing};
use crate::commit::{self, Trouble};
use crate::inferences::size_of;
use crate::journal::Refused;
use crate::journal::frame::frame_answer;
use crate::records::Inference;

/// Most answers in one transaction.
const BATCH: usize = 256;
/// And most bytes of them: feedback waits behind this transaction.
const BATCH_BYTES: usize = 4 << 20;

pub(super) enum Message {
    /// With its size.
    Answer(Box<Inference>, usize),
    Flush(oneshot::Sender<()>),
}

pub(super) async fn write(shared: Arc<Shared>, mut inbox: mpsc::Receiver<Message>, mut closing: watch::Receiver<bool>) {
    let mut messages = Vec::new();
    loop {
        tokio::select! {
            biased;
            // What is in the queue is still received.
            () = is_closing(&mut closing), if !inbox.is_closed() => inbox.close(),
            received = inbox.recv_many(&mut messages, BATCH) => if received == 0 { return },
        }
        let (mut rows, mut bytes, mut flushes) = (Vec::new(), 0, Vec::new());
        for message in messages.drain(..) {
            match message {
                Message::Answer(answer, size) => {
                    bytes += size;
                    rows.push(*answer);
                }
                Message::Flush(done) => flushes.push(done),
            }
        }
        for part in parts(&rows) {
            save(&shared, part, &closing).await;
        }
        let depth = shared.queued.fetch_sub(rows.len(), Ordering::Relaxed) - rows.len();
        shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        metrics::gauge!("tidemill:store_queue_depth").set(depth as f64);
        for done in flushes {
            done.send(()).ok();
        }
    }
}

/// Cuts a list so that no part but one of a single answer is larger than a transaction should be.
pub(super) fn parts(rows: &[Inference]) -> impl Iterator<Item = &[Inference]> {
    let mut rest = rows;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fitting = rest.iter().take(BATCH).take_while(|row| {
            bytes += size_of(row);
            bytes <= BATCH_BYTES
        });
        let (part, behind) = rest.split_at(fitting.count().max(1).min(rest.len()));
        rest = behind;
        (!part.is_empty()).then_some(part)
    })
}

/// Into the database or the spill log. When both are shut it waits: the queue fills up, and the gateway turns new requests away.
async fn save(shared: &Arc<Shared>, rows: &[Inference], closing: &watch::Receiver<bool>) {
    loop {
        if !shared.away.load(Ordering::Relaxed) {
            match store(shared, rows).await {
                Ok(()) => return,
                Err(why) => shared.went_away(&why),
            }
        }
        match spill(shared, rows).await {
            Ok(()) => return,
            Err(Refused::Full) => {}
            Err(Refused::Io(error)) => tracing::error!(%error, "answers could not be written to the spill log"),
        }
        if *closing.borrow() {
            metrics::counter!("tidemill:store_dropped_records_total").increment(rows.len() as u64);
            tracing::error!(
                answers = rows.len(),
                "answers are lost: the database is away, the spill log is full, and the server ends"
            );
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// One transaction; if the database refuses some of the records, one for each, and those are logged. `Err`: the database is away.
pub(super) async fn store(shared: &Shared, rows: &[Inference]) -> Result<(), String> {
    let start = Instant::now();
    match commit::answers(&shared.database, &shared.ids, rows).await {
        Ok(()) => {
            committed("answers", rows.len(), start.elapsed());
            Ok(())
        }
        Err(Trouble::Away(why)) => Err(why),
        Err(Trouble::Refused(error)) if rows.len() == 1 => {
            metrics::counter!("tidemill:store_dropped_records_total").increment(1);
            tracing::error!(%error, id = %rows[0].id, "the database refuses an answer; it is not recorded");
            Ok(())
        }
        Err(Trouble::Refused(_)) => {
            for row in rows.chunks(1) {
                Box::pin(store(shared, row)).await?;
            }
            Ok(())
        }
    }
}

async fn spill(shared: &Arc<Shared>, rows: &[Inference]) -> Result<(), Refused> {
    let frames: Vec<u8> = rows.iter().flat_map(frame_answer).collect();
    let segment = shared.journal.append(&frames)?;
    shared.spilled(rows.len() as u64);
    shared.wake.notify_one();
    // A failed flush changes nothing here: the bytes are where they are, and a second copy would not be safer.
    tokio::task::spawn_blocking(move || segment.sync()).await.ok();
    Ok(())
}
