//! What people want of a job: the API and the command line change its row, and the server that runs it follows.

use serde_json::json;
use tidemill_store::{Actor, FineTuningState as State, FineTunings, News, Store, StoreError};
use uuid::Uuid;

use crate::http::job_name;

/// What somebody wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// End it without a model.
    Cancel,
    /// Keep what it has learnt and stand still.
    Pause,
    /// Go on.
    Resume,
}

impl Wish {
    /// The verb.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
        }
    }

    /// States in which it means something, and the one that it leads to.
    fn way(self) -> (&'static [State], State, News) {
        match self {
            Self::Cancel => (&State::OPEN, State::Cancelled, News::info("The job was cancelled.")),
            Self::Pause => (
                &[State::Queued, State::Running],
                State::Paused,
                News::info("The job was paused; resume it to go on from where it is."),
            ),
            Self::Resume => (&[State::Paused], State::Queued, News::info("The job was resumed and waits for its turn.")),
        }
    }

    /// Why a job in this state cannot follow; `None` when it is as wished already.
    pub fn refusal(self, state: State) -> Option<String> {
        let done = match self {
            Self::Cancel => state == State::Cancelled,
            Self::Pause => state == State::Paused,
            Self::Resume => matches!(state, State::Queued | State::Running),
        };
        let (verb, word) = (self.as_str(), state.as_str());
        match state {
            _ if done => None,
            State::ValidatingFiles => Some(format!("Cannot {verb} a job whose files are still looked through; wait a moment.")),
            _ if state.ended() => Some(format!("Cannot {verb} a job with status '{word}': it has ended.")),
            _ => Some(format!("Cannot {verb} a job with status '{word}'.")),
        }
    }

    /// Writes down that somebody wants it; `false` when the job is in no state for it.
    pub async fn write(self, store: &Store, id: Uuid, by: impl Into<Actor>) -> Result<bool, StoreError> {
        let (from, to, news) = self.way();
        let act = store.act(by, format!("fine_tuning.{}", self.as_str())).to(job_name(id)).with(json!({"state": to.as_str()}));
        FineTunings::new(store.database()).enter(id, from, to, &[news], act).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_already_is_fine_and_what_has_ended_stays() {
        for (wish, state, fine) in [
            (Wish::Cancel, State::Cancelled, true),
            (Wish::Cancel, State::Succeeded, false),
            (Wish::Pause, State::Paused, true),
            (Wish::Pause, State::ValidatingFiles, false),
            (Wish::Pause, State::Failed, false),
            (Wish::Resume, State::Running, true),
            (Wish::Resume, State::Cancelled, false),
        ] {
            assert_eq!(wish.refusal(state).is_none(), fine, "{wish:?} {state:?}");
        }
    }
}
