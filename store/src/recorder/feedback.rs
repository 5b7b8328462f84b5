//! The task that writes feedback.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot, watch};

use super::{Shared, committed, is_closing};
use crate::commit::{self, Trouble};
use crate::error::{Full, StoreError};
use crate::journal::Refused;
use crate::journal::frame::frame_feedback;
use crate::judgements::Acknowledged;
use crate::records::Feedback;

/// Most requests in one transaction.
const BATCH: usize = 512;
/// And most rows, unless one request alone has more: a transaction that takes too long looks like a database that is away.
const ROWS: usize = 2048;

pub(super) struct Sent {
    pub(super) feedback: Vec<Feedback>,
    pub(super) answer: oneshot::Sender<Result<Vec<Acknowledged>, StoreError>>,
}

pub(super) async fn write(shared: Arc<Shared>, mut inbox: mpsc::Receiver<Sent>, mut closing: watch::Receiver<bool>) {
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            biased;
            () = is_closing(&mut closing), if !inbox.is_closed() => inbox.close(),
            received = inbox.recv_many(&mut batch, BATCH) => if received == 0 { return },
        }
        let sizes: Vec<usize> = batch.iter().map(|sent: &Sent| sent.feedback.len()).collect();
        for requests in transactions(&sizes) {
            let part = batch.drain(..requests).collect();
            save(&shared, part).await;
        }
    }
}

/// How many requests, of so many rows each, go into each transaction.
fn transactions(rows: &[usize]) -> Vec<usize> {
    let mut transactions: Vec<usize> = Vec::new();
    let mut filled = 0;
    for &rows in rows {
        match transactions.last_mut() {
            Some(requests) if filled + rows <= ROWS => {
                *requests += 1;
                filled += rows;
            }
            _ => {
                transactions.push(1);
                filled = rows;
            }
        }
    }
    transactions
}

/// One transaction for all that has gathered while the last one was written.
async fn save(shared: &Arc<Shared>, batch: Vec<Sent>) {
    if shared.away.load(Ordering::Relaxed) {
        return spill(shared, batch).await;
    }
    let start = Instant::now();
    let rows: Vec<&Feedback> = batch.iter().flat_map(|sent| &sent.feedback).collect();
    match commit::feedback(&shared.database, &shared.ids, &rows).await {
        Ok(acknowledged) => {
            committed("feedback", rows.len(), start.elapsed());
            let mut acknowledged = acknowledged.into_iter();
            for Sent { feedback, answer } in batch {
                answer.send(Ok(acknowledged.by_ref().take(feedback.len()).collect())).ok();
            }
        }
        Err(Trouble::Away(why)) => {
            shared.went_away(&why);
            spill(shared, batch).await;
        }
        // One sender's records must not fail those of another.
        Err(Trouble::Refused(error)) => match <[Sent; 1]>::try_from(batch) {
            Ok([one]) => drop(one.answer.send(Err(StoreError::Database(error)))),
            Err(batch) => {
                for one in batch {
                    Box::pin(save(shared, vec![one])).await;
                }
            }
        },
    }
}

/// Accepts into the spill log, on the disk, what needs no answer from the database.
async fn spill(shared: &Arc<Shared>, batch: Vec<Sent>) {
    let (keyed, plain): (Vec<Sent>, Vec<Sent>) =
        batch.into_iter().partition(|sent| sent.feedback.iter().any(|feedback| feedback.idempotency_key.is_some()));
    for sent in keyed {
        sent.answer.send(Err(StoreError::Away)).ok();
    }
    if plain.is_empty() {
        return;
    }
    let records = plain.iter().map(|sent| sent.feedback.len() as u64).sum();
    let frames: Vec<u8> = plain.iter().flat_map(|sent| &sent.feedback).flat_map(frame_feedback).collect();
    let result = match shared.journal.append(&frames) {
        Ok(segment) => {
            shared.spilled(records);
            shared.wake.notify_one();
            match tokio::task::spawn_blocking(move || segment.sync()).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(format!("the spill log cannot be flushed: {error}")),
                Err(error) => Err(error.to_string()),
            }
        }
        Err(Refused::Full) => {
            for sent in plain {
                sent.answer.send(Err(StoreError::Full(Full))).ok();
            }
            return;
        }
        Err(Refused::Io(error)) => Err(error.to_string()),
    };
    if let Err(error) = &result {
        tracing::error!(error, "feedback could not be written to the spill log");
    }
    for Sent { feedback, answer } in plain {
        let acknowledged = feedback.iter().map(|row| Acknowledged { id: row.id, duplicate: false }).collect();
        answer.send(result.as_ref().map(|()| acknowledged).map_err(|_| StoreError::Away)).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_has_as_many_requests_as_fit_and_at_least_one() {
        assert_eq!(transactions(&[]), Vec::<usize>::new());
        assert_eq!(transactions(&[1; 512]), [512]);
        assert_eq!(transactions(&[1000; 5]), [2, 2, 1]);
        assert_eq!(transactions(&[1, 5000, 1, 0, 2047, 1]), [1, 1, 3, 1]);
    }
}
