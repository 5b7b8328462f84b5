//! The task that brings the spill log into the database.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;

use super::{Shared, answers, is_closing};
use crate::commit::{self, Trouble};
use crate::journal::frame::Entry;
use crate::records::{Feedback, Inference};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);

pub(super) async fn run(shared: Arc<Shared>, mut closing: watch::Receiver<bool>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let waiting = !shared.journal.is_empty() || shared.away.load(Ordering::Relaxed);
        let work = async {
            if !waiting {
                shared.wake.notified().await;
                return;
            }
            match replay(&shared).await {
                Ok(()) => pause = FIRST_PAUSE,
                Err(trouble) => {
                    tracing::debug!(%trouble, "the spill log cannot be replayed yet");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LAST_PAUSE);
                }
            }
        };
        tokio::select! {
            // Half a segment may be in the database then; the next start writes it again, and what is there stays as it is.
            () = is_closing(&mut closing) => return,
            () = work => {}
        }
    }
}

/// Writes everything that waits. When it ends well the database is back and the log was empty at some moment.
pub(super) async fn replay(shared: &Shared) -> Result<(), Trouble> {
    let _one_at_a_time = shared.replaying.lock().await;
    let result = replay_segments(shared).await;
    match &result {
        Ok(()) => shared.is_back(),
        Err(Trouble::Away(why)) => shared.went_away(why),
        Err(Trouble::Refused(_)) => {}
    }
    result
}

async fn replay_segments(shared: &Shared) -> Result<(), Trouble> {
    commit::ping(&shared.database).await?;
    while let Some(number) = shared.journal.oldest() {
        let journal = shared.journal.clone();
        let contents = match tokio::task::spawn_blocking(move || journal.read(number)).await {
            Ok(Ok(contents)) => contents,
            Ok(Err(error)) => return Err(Trouble::Away(error.to_string())),
            Err(error) => return Err(Trouble::Away(error.to_string())),
        };
        let (mut rows, mut judgements): (Vec<Inference>, Vec<Feedback>) = (Vec::new(), Vec::new());
        let records = contents.entries.len() as u64;
        for entry in contents.entries {
            match entry {
                Entry::Answer(answer) => rows.push(*answer),
                Entry::Feedback(feedback) => judgements.push(*feedback),
            }
        }
        for part in answers::parts(&rows) {
            answers::store(shared, part).await.map_err(Trouble::Away)?;
            // From here on new records go to the database again.
            shared.is_back();
        }
        for part in judgements.chunks(512) {
            save_feedback(shared, &part.iter().collect::<Vec<_>>()).await?;
            shared.is_back();
        }
        if contents.damaged > 0 {
            tracing::error!(
                segment = number,
                places = contents.damaged,
                "a segment of the spill log is damaged; the rest of it was written, and it is kept as spill/{number:016x}.damaged: \
                 check the disk, and delete the file when you have no use for it"
            );
        }
        shared.journal.remove(number, contents.damaged > 0).map_err(|error| Trouble::Away(error.to_string()))?;
        metrics::counter!("tidemill:store_replayed_records_total").increment(records);
        metrics::gauge!("tidemill:store_spill_bytes").set(shared.journal.bytes() as f64);
    }
    Ok(())
}

async fn save_feedback(shared: &Shared, rows: &[&Feedback]) -> Result<(), Trouble> {
    match commit::feedback(&shared.database, &shared.ids, rows).await.map(drop) {
        Err(Trouble::Refused(error)) if rows.len() == 1 => {
            metrics::counter!("tidemill:store_dropped_records_total").increment(1);
            tracing::error!(%error, id = %rows[0].id, "the database refuses a feedback; it is not recorded");
            Ok(())
        }
        Err(Trouble::Refused(_)) => {
            for row in rows.chunks(1) {
                Box::pin(save_feedback(shared, row)).await?;
            }
            Ok(())
        }
        other => other,
    }
}
