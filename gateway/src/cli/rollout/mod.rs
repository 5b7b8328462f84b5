//! `tidemill rollout`

mod server;
mod status;

use crate::rollout::hash::{HashVersion, bucket};
use crate::rollout::statistics::{Outcome, Plan, Question, plan};
use clap::Subcommand;
use std::io::Write;

/// Compare variants on the traffic.
#[derive(Debug, clap::Args)]
pub struct RolloutArgs {
    #[command(subcommand)]
    command: RolloutCommand,
}

#[derive(Debug, Subcommand)]
enum RolloutCommand {
    /// Start a rollout: one that a file describes, or a canary of one variant.
    Start(Box<server::StartArgs>),
    /// Show where a rollout stands, what was measured and what was decided.
    Status(server::StatusArgs),
    /// List the rollouts that run.
    List(server::ListArgs),
    /// Leave the shares as they are; guardrails are watched.
    Pause(server::OneArgs),
    /// Go on with a paused rollout.
    Resume(server::OneArgs),
    /// Say yes to what a rollout waits for.
    Approve(server::OneArgs),
    /// Give a treatment all the traffic, whatever the numbers say.
    Promote(server::PromoteArgs),
    /// Give the control all the traffic, now; of a promotion, what was served before it.
    Rollback(server::OneArgs),
    /// Print the bucket from 0 to 1 that a value falls into: GrowthBook's hash, so that anyone can check an assignment.
    Bucket {
        /// NAME:in says whether a unit takes part in the rollout NAME, NAME:arm which arm it gets
        seed: String,
        /// The user, conversation or request
        value: String,
        /// 2, or 1 for old data and layers
        #[arg(long, value_name = "1|2", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=2))]
        hash_version: u8,
    },
    /// Print how much traffic and time it takes to find a change.
    Plan(PlanArgs),
}

#[derive(Debug, clap::Args)]
struct PlanArgs {
    /// What the control gives now: a share such as 0.2, or a mean when --deviation is there
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    baseline: f64,
    /// Smallest change worth finding, relative to the baseline: 0.1 is a tenth more
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    effect: f64,
    /// Standard deviation of one observation: the baseline is a mean
    #[arg(long, value_name = "NUMBER")]
    deviation: Option<f64>,
    /// Chance to find the change
    #[arg(long, value_name = "SHARE", default_value_t = 0.8)]
    power: f64,
    /// Chance to find one that is not there
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    alpha: f64,
    /// The treatment's share of the observations
    #[arg(long, value_name = "SHARE", default_value_t = 0.5)]
    share: f64,
    /// Observations a day, of both arms
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    traffic: Option<u64>,
}

impl PlanArgs {
    fn question(&self) -> Question {
        let outcome = match self.deviation {
            None => Outcome::Share { baseline: self.baseline },
            Some(deviation) => Outcome::Mean { baseline: self.baseline, deviation },
        };
        Question { outcome, effect: self.effect, power: self.power, alpha: self.alpha, share: self.share }
    }
}

/// Runs the command.
pub fn run(args: &RolloutArgs) -> Result<(), String> {
    match &args.command {
        RolloutCommand::Start(args) => server::start(args)?,
        RolloutCommand::Status(args) => server::show(args)?,
        RolloutCommand::List(args) => server::list(args)?,
        RolloutCommand::Pause(args) => server::act(args, "pause")?,
        RolloutCommand::Resume(args) => server::act(args, "resume")?,
        RolloutCommand::Approve(args) => server::act(args, "approve")?,
        RolloutCommand::Promote(args) => server::promote(args)?,
        RolloutCommand::Rollback(args) => server::act(args, "rollback")?,
        RolloutCommand::Bucket { seed, value, hash_version } => {
            let version = if *hash_version == 1 { HashVersion::V1 } else { HashVersion::V2 };
            say(&bucket(seed, value, version).to_string());
        }
        RolloutCommand::Plan(args) => {
            let question = args.question();
            if let Some((flag, expected)) = question.refusal() {
                return Err(format!("--{flag}: expected {expected}"));
            }
            let sizes = plan(&question).ok_or("--effect: so small a change is found by no traffic; give a larger one")?;
            say(&table(&question, &sizes, args.traffic));
        }
    }
    Ok(())
}

fn table(question: &Question, sizes: &Plan, traffic: Option<u64>) -> String {
    let baseline = match question.outcome {
        Outcome::Share { baseline } | Outcome::Mean { baseline, .. } => baseline,
    };
    let row = |name: &str, count: u64, meaning: &str| {
        let days = traffic.map_or_else(String::new, |traffic| format!("{:>9.1} days", count as f64 / traffic as f64));
        format!("\n{name:<14}{count:>12}{days}  {meaning}")
    };
    format!(
        "{baseline} to {}, found with {} %; found where there is nothing with {} %{}{}{}\n\nSet tuning = {} in the rollout.",
        // Without the digits that only the arithmetic made.
        (baseline * (1.0 + question.effect) * 1e9).round() / 1e9,
        100.0 * question.power,
        100.0 * question.alpha,
        row("one look", sizes.fixed, "when all observations are there"),
        row("expected", sizes.expected, "looking all the time, on average"),
        row("at the latest", sizes.sequential, "looking all the time, with the asked power"),
        sizes.tuning
    )
}

fn say(text: &str) {
    // A closed standard output is no reason to fail: the work is done.
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(baseline: f64, effect: f64) -> PlanArgs {
        PlanArgs { baseline, effect, deviation: None, power: 0.8, alpha: 0.05, share: 0.5, traffic: Some(2000) }
    }

    #[test]
    fn a_plan_says_sizes_and_days() {
        let question = args(0.5, 0.5).question();
        let text = table(&Question { power: 0.9, ..question }, &plan(&Question { power: 0.9, ..question }).unwrap(), Some(77));
        assert!(text.contains("0.5 to 0.75, found with 90 %"), "{text}");
        assert!(text.contains("one look               154      2.0 days"), "{text}");
        assert!(!table(&question, &plan(&question).unwrap(), None).contains("days"));
    }

    #[test]
    fn a_question_that_cannot_be_answered_names_the_flag() {
        let refused = |args| run(&RolloutArgs { command: RolloutCommand::Plan(args) }).unwrap_err();
        assert!(refused(args(1.5, 0.1)).starts_with("--baseline"));
        assert!(refused(args(0.5, 2.0)).starts_with("--effect"));
        assert!(refused(args(0.5, 1e-12)).starts_with("--effect"));
        assert!(refused(PlanArgs { deviation: Some(-1.0), ..args(5.0, 0.1) }).starts_with("--deviation"));
    }
}
