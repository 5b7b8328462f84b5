//! From SIGTERM to the last byte.

use crate::cli::serve::ServeError;
use crate::http::App;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// After the engines cancelled what was left, streams get this long to say so.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Exit status of a process that was told twice.
const TOLD_TWICE: i32 = 130;

/// Why the server leaves.
pub enum Ended {
    /// It was asked to.
    Signal,
    /// There is nothing to serve.
    LoadFailed(ServeError),
}

/// Resolves when no answer is being sent any more: after SIGTERM or SIGINT and the time that running answers get, or after a failed
/// load. A second signal ends the process at once.
pub async fn leave_in_good_order(app: &App, failure: oneshot::Receiver<ServeError>, limit: Duration) -> Ended {
    let told = async {
        if let Err(error) = wait_for_signal().await {
            tracing::error!(%error, "cannot listen for signals; only a kill will end this process");
            std::future::pending::<()>().await;
        }
    };
    let failed = async {
        match failure.await {
            Ok(error) => error,
            // The loader ended well: nothing will ever fail there.
            Err(_) => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        () = told => Ended::Signal,
        // Another model may be answering already: its streams end as they do on a signal.
        error = failed => Ended::LoadFailed(error),
    };
    app.drain.start();
    tracing::info!(in_flight = app.drain.in_flight(), limit_s = limit.as_secs_f64(), "leaving: finishing what is running");
    tokio::spawn(async {
        if wait_for_signal().await.is_ok() {
            tracing::warn!("told twice: leaving at once");
            std::process::exit(TOLD_TWICE);
        }
    });
    for model in app.registry.local() {
        let engine = model.engine().clone();
        tokio::task::spawn_blocking(move || engine.drain(limit));
    }
    let remote = app.drain.clone();
    tokio::spawn(async move {
        tokio::time::sleep(limit).await;
        remote.cut_off();
    });
    if !app.drain.wait(limit + LAST_WORDS).await {
        tracing::warn!(in_flight = app.drain.in_flight(), "some answers were cut off");
    }
    if matches!(ended, Ended::Signal) {
        tracing::info!("left in good order");
    }
    ended
}

async fn wait_for_signal() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
