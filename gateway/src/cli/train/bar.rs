//! How a training goes, for a person.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use tidemill_rlhf::job::{Estimate, FinetuningType, Finished, Job, Spec};
use tidemill_rlhf::train::{Outcome, Progress, Stage};

use super::{Audience, TrainCommandError};

/// A bar with loss and time left, and lines where something is worth keeping.
pub struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// Shows nothing yet.
    pub fn new() -> Self {
        let bar = ProgressBar::new(0);
        let template = "{prefix:9} {wide_bar} {human_pos}/{human_len}  {msg}";
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self { bar }
    }

    /// A line above the bar, also where there is no terminal to draw it on.
    fn line(&self, text: &str) {
        self.bar.suspend(|| {
            let _ = writeln!(std::io::stdout(), "{text}");
        });
    }

    /// What a dry run says.
    pub fn estimated(&self, spec: &Spec, estimate: &Estimate) {
        let Estimate { parameters, steps, step, preparation, training, peak_memory, device_memory, checkpoint } = estimate;
        self.line(&format!("base       {} ({})", spec.base.name, spec.base.path.display()));
        let what = match spec.finetuning_type {
            FinetuningType::Lora => "adapter  ",
            FinetuningType::Full => "model    ",
        };
        self.line(&format!("{what}  {:.1} M numbers are trained", *parameters as f64 / 1e6));
        self.line(&format!("steps      {steps}, {:.2} s each as measured on one", step.as_secs_f64()));
        let rounded = |time: &Duration| HumanDuration(Duration::from_secs(time.as_secs().max(1)));
        self.line(&format!("time       about {}, after {} of preparation", rounded(training), rounded(preparation)));
        let (step, saving) = (peak_memory >> 20, checkpoint >> 20);
        self.line(&format!(
            "memory     {step} MiB at the most in that step, and up to {saving} MiB more while a checkpoint is written"
        ));
        if *device_memory > 0 {
            self.line(&format!(
                "card       {} MiB of {}'s memory at the most, beside what its driver takes",
                device_memory >> 20,
                spec.device
            ));
        }
        self.line(&format!("disk       {saving} MiB for each checkpoint"));
    }
}

/// The numbers that a person looks at, where they are measured.
fn headline(progress: &Progress<'_>) -> String {
    let prefix = if progress.stage == Stage::Evaluating { "eval_" } else { "" };
    let shown = [("loss", "loss"), ("rewards/accuracies", "accuracy"), ("rewards/margins", "margin"), ("reward", "reward")];
    let found = shown.iter().filter_map(|(name, short)| {
        let value = progress.metrics.get(&format!("{prefix}{name}"))?;
        Some(format!("{short} {value:.4}"))
    });
    found.collect::<Vec<_>>().join("  ")
}

impl Audience for Bar {
    fn prepared(&mut self, job: &Job) {
        let prepared = job.prepared();
        self.line(&format!(
            "{} samples to learn ({} tokens), {} held out; {} steps",
            prepared.train, prepared.tokens, prepared.held_out, prepared.steps
        ));
        if prepared.truncated > 0 {
            self.line(&format!("{} cut to max_length", prepared.truncated));
        }
        if prepared.dropped_by_report > 0 {
            self.line(&format!("{} left out: the quality report drops them", prepared.dropped_by_report));
        }
        for (reason, rows) in &prepared.left_out {
            self.line(&format!("{rows} left out: {reason}"));
        }
    }

    fn preparing(&mut self, done: usize, all: usize) {
        self.bar.set_prefix("reference");
        self.bar.set_length(all as u64);
        self.bar.set_position(done as u64);
    }

    fn progress(&mut self, progress: &Progress<'_>) {
        self.bar.set_prefix("training");
        self.bar.set_length(progress.steps);
        self.bar.set_position(progress.step);
        let left = progress.remaining.map(|left| format!("  {} left", HumanDuration(left))).unwrap_or_default();
        self.bar.set_message(format!("{}{left}", headline(progress)));
        if progress.stage == Stage::Evaluating || self.bar.is_hidden() {
            let what = if progress.stage == Stage::Evaluating { "held out" } else { "step" };
            self.line(&format!("{what:9} {}/{}  {}", progress.step, progress.steps, headline(progress)));
        }
    }

    fn ended(&mut self, folder: &Path, outcome: &Outcome, finished: Option<&Finished>) {
        self.bar.finish_and_clear();
        match finished {
            Some(finished) => {
                let what = match finished.kind {
                    FinetuningType::Lora => "adapter",
                    FinetuningType::Full => "model  ",
                };
                self.line(&format!("{what}  {}", finished.folder.display()));
                self.line(&format!("report   {}", folder.join("report.html").display()));
                if let Some((step, metric)) = outcome.best {
                    self.line(&format!("best     {metric:.4} at step {step}"));
                }
            }
            None => self.line(&format!("stopped at step {}; the same command goes on from there", outcome.steps)),
        }
    }

    fn failed(&mut self, _: &TrainCommandError) {
        self.bar.finish_and_clear();
    }
}
