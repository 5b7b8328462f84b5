//! How long anybody waits for the database. A connection that the network has swallowed never answers, and neither does a statement
//! behind somebody's lock: every call of the store goes through here and ends in good time, with [`StoreError::Away`] if it must. What
//! it was about to write may arrive all the same.

use std::time::Duration;

use crate::error::StoreError;

/// How long a command or a read waits for the database.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// How long for what looks at much, or writes much.
const LONG_PATIENCE: Duration = Duration::from_secs(60);

/// An answer in good time, or [`StoreError::Away`].
pub(crate) async fn patiently<T, E: From<StoreError>>(work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    within(PATIENCE, work).await
}

/// The same for lists and bulk.
pub(crate) async fn at_length<T, E: From<StoreError>>(work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    within(LONG_PATIENCE, work).await
}

async fn within<T, E: From<StoreError>>(patience: Duration, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    tokio::time::timeout(patience, work).await.unwrap_or_else(|_| Err(StoreError::Away.into()))
}
