//! What people want of a loop: the API and the command line change its row, and the server that runs it follows.

use crate::flywheel::{change, row_of, standing_of};
use tidemill_rlhf::flywheel::{Wish, WishError, wish as wished};
use tidemill_store::{Actor, LoopRefusal, Loops, StoreError};

/// Times that a wish is written where the loop moves meanwhile.
const TRIES: usize = 20;

/// Why a wish is not followed.
#[derive(Debug, thiserror::Error)]
pub enum WishRefusal {
    /// The database is away, slow or broken.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No such loop.
    #[error(
        "there is no loop '{0}'; `[loop.NAME]` in tidemill.toml makes one, `tidemill loop status` shows those that there are"
    )]
    Unknown(String),
    /// It is not configured.
    #[error(
        "the loop '{0}' is not in the configuration; put `[loop.{0}]` back into tidemill.toml, or say with --config where it is"
    )]
    Gone(String),
    /// Not where it stands.
    #[error(transparent)]
    Wish(#[from] WishError),
    /// It moves too fast.
    #[error("the loop is changing; look at it again")]
    Changing,
}

/// Writes a wish down. `configured`: the loop has a policy.
pub async fn follow(rows: &Loops, name: &str, configured: bool, wish: Wish, by: &Actor, now: i64) -> Result<(), WishRefusal> {
    if !configured {
        let known = rows.find(name).await?.is_some();
        match (known, wish) {
            (false, _) => return Err(WishRefusal::Unknown(name.to_owned())),
            (true, Wish::Run) => return Err(WishRefusal::Gone(name.to_owned())),
            (true, Wish::Pause | Wish::Resume) => {}
        }
    }
    for _ in 0..TRIES {
        let row = row_of(rows, name, now).await?;
        let Some((next, note)) = wished(&standing_of(&row)?, wish, by, now)? else { return Ok(()) };
        match rows.advance(&row, &change(&next, &note, by.clone())).await {
            Ok(_) => return Ok(()),
            Err(LoopRefusal::Changed) => {}
            Err(LoopRefusal::Store(error)) => return Err(error.into()),
        }
    }
    Err(WishRefusal::Changing)
}
