//! A bar for long work.

use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tidemill_rlhf::dataset::{Stage, Watch};

/// Does the work under a bar, and stops it at Ctrl-C.
pub async fn watched<T>(watch: &Arc<Watch>, work: impl Future<Output = T>) -> T {
    let bar = ProgressBar::new_spinner();
    let style = |template| ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let (counted, bytes, open) = (
        style("{msg:20} {wide_bar} {human_pos}/{human_len} {eta}"),
        style("{msg:20} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}"),
        style("{msg:20} {spinner} {human_pos}"),
    );
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => {
                bar.finish_and_clear();
                return done;
            }
            pressed = tokio::signal::ctrl_c() => if pressed.is_ok() { watch.stop() },
            () = tokio::time::sleep(Duration::from_millis(100)) => {
                let progress = watch.progress();
                bar.set_message(match progress.stage {
                    Stage::Waiting => "starting",
                    Stage::Feedback => "reading feedback",
                    Stage::Answers => "reading answers",
                    Stage::Reading => "reading",
                    Stage::Checking => "checking quality",
                    Stage::Writing => "writing",
                });
                match progress.total {
                    Some(total) => {
                        bar.set_style(if progress.stage == Stage::Reading { bytes.clone() } else { counted.clone() });
                        bar.set_length(total);
                    }
                    None => bar.set_style(open.clone()),
                }
                bar.set_position(progress.done);
            }
        }
    }
}
