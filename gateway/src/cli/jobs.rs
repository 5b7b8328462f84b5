//! `tidemill jobs`

use std::io::Write;

use clap::Subcommand;
use tidemill_store::{FineTuningEvent, FineTuningJob, FineTunings, Viewer};
use uuid::Uuid;

use crate::cli::store_args::{StoreArgs, StoreCommandError};
use crate::cli::{COMMAND_LINE, when};
use crate::fine_tuning::Wish;
use crate::http::{file_name, job_name};

/// Fine-tuning jobs. A running server follows what is changed here within a second or two.
#[derive(Debug, clap::Args)]
pub struct JobsArgs {
    #[command(subcommand)]
    command: JobsCommand,
}

#[derive(Debug, Subcommand)]
enum JobsCommand {
    /// List the jobs, the newest first
    List {
        /// Most that are shown
        #[arg(long, value_name = "N", default_value_t = 20)]
        limit: usize,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Show a job and what happened to it
    Show {
        #[command(flatten)]
        job: JobArgs,
        /// Most events that are shown
        #[arg(long, value_name = "N", default_value_t = 20)]
        events: usize,
    },
    /// End a job without a model
    Cancel(JobArgs),
    /// Have a job keep what it has learnt and stand still
    Pause(JobArgs),
    /// Have a paused job go on
    Resume(JobArgs),
}

#[derive(Debug, clap::Args)]
struct JobArgs {
    /// Its id, such as ftjob-…
    id: String,
    #[command(flatten)]
    store: StoreArgs,
}

/// Runs the command.
pub fn run(args: &JobsArgs) -> Result<(), StoreCommandError> {
    match &args.command {
        JobsCommand::List { limit, store } => {
            let limit = (*limit).clamp(1, 1000);
            let jobs = store.with(|store| async move {
                Ok(FineTunings::new(store.database()).list(&Viewer::Anyone, &[], None, limit).await?.items)
            })?;
            say(&format!("{:42}  {:16}  {:16}  {:>13}  {:20}  made", "id", "created", "state", "step", "model"));
            jobs.iter().for_each(|job| say(&line(job)));
        }
        JobsCommand::Show { job, events } => {
            let (id, limit) = (job.id()?, (*events).clamp(1, 1000));
            let (found, events) = job.store.with(|store| async move {
                let rows = FineTunings::new(store.database());
                let found = rows.find(id, &Viewer::Anyone).await?.ok_or_else(|| unknown(id))?;
                Ok((found, rows.events(id, None, limit).await?.items))
            })?;
            say(&described(&found, &events));
        }
        JobsCommand::Cancel(job) => follow(job, Wish::Cancel)?,
        JobsCommand::Pause(job) => follow(job, Wish::Pause)?,
        JobsCommand::Resume(job) => follow(job, Wish::Resume)?,
    }
    Ok(())
}

impl JobArgs {
    fn id(&self) -> Result<Uuid, StoreCommandError> {
        let bare = self.id.strip_prefix("ftjob-").unwrap_or(&self.id);
        let message = || format!("`{}` is no id of a job; `tidemill jobs list` shows them", self.id);
        Uuid::try_parse(bare).map_err(|_| StoreCommandError::Usage(message()))
    }
}

fn unknown(id: Uuid) -> StoreCommandError {
    StoreCommandError::Usage(format!("there is no job `{}`; `tidemill jobs list` shows them", job_name(id)))
}

fn follow(job: &JobArgs, wish: Wish) -> Result<(), StoreCommandError> {
    let id = job.id()?;
    let state = job.store.with(|store| async move {
        let written = wish.write(&store, id, COMMAND_LINE).await?;
        let state = FineTunings::new(store.database()).state(id).await?.ok_or_else(|| unknown(id))?;
        match wish.refusal(state).filter(|_| !written) {
            Some(why) => Err(StoreCommandError::Usage(why)),
            None => Ok(state),
        }
    })?;
    say(&format!("{} is {}", job_name(id), state.as_str()));
    Ok(())
}

fn line(job: &FineTuningJob) -> String {
    let step = if job.steps > 0 { format!("{}/{}", job.step, job.steps) } else { String::new() };
    let (id, created, state) = (job_name(job.draft.id), when(job.draft.created), job.state.as_str());
    let made = job.fine_tuned_model.as_deref().unwrap_or_default();
    format!("{id:42}  {created:16}  {state:16}  {step:>13}  {:20}  {made}", job.draft.model).trim_end().to_owned()
}

/// A job in lines; its events the oldest first, as they happened.
fn described(job: &FineTuningJob, events: &[FineTuningEvent]) -> String {
    let draft = &job.draft;
    let mut lines = vec![
        format!("job         {}", job_name(draft.id)),
        format!("state       {}", job.state.as_str()),
        format!("model       {}", draft.model),
        format!("method      {}", draft.method),
        format!("files       {}", file_name(draft.training_file)),
        format!("created     {}", when(draft.created)),
    ];
    if let Some(file) = draft.validation_file {
        lines.push(format!("validation  {}", file_name(file)));
    }
    if job.steps > 0 {
        lines.push(format!("step        {} of {}", job.step, job.steps));
    }
    let times = [("done by", job.estimated_finish), ("ended", job.finished)];
    lines.extend(times.into_iter().filter_map(|(what, at)| at.map(|at| format!("{what:10}  {}", when(at)))));
    lines.extend(job.fine_tuned_model.as_ref().map(|made| format!("made        {made}")));
    let error = job.error.as_ref().and_then(|error| error["message"].as_str());
    lines.extend(error.map(|error| format!("error       {error}")));
    lines.push(String::new());
    lines.extend(
        events.iter().rev().map(|event| format!("{}  {:5}  {}", when(event.created), event.news.level, event.news.message)),
    );
    lines.join("\n")
}

fn say(text: &str) {
    // A closed standard output is no reason to fail: the work is done.
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tidemill_store::{FineTuningDraft, FineTuningState, News};

    #[test]
    fn a_job_is_shown_with_what_happened_in_its_order() {
        let draft = FineTuningDraft {
            id: Uuid::nil(),
            created: 0,
            key_id: None,
            model: "m".into(),
            base: "m".into(),
            method: json!({"type": "dpo"}),
            suffix: None,
            seed: 1,
            training_file: Uuid::nil(),
            validation_file: None,
            metadata: None,
            result_file: Uuid::nil(),
            place: String::new(),
        };
        let job = FineTuningJob {
            draft,
            state: FineTuningState::Failed,
            error: Some(json!({"message": "Line 3: no."})),
            fine_tuned_model: None,
            served: false,
            has_result: false,
            finished: Some(60_000_000),
            estimated_finish: None,
            trained_tokens: None,
            step: 2,
            steps: 4,
            read_bytes: 0,
            attempts: 0,
            evaluated: 0,
        };
        let event = |number, text: &str| FineTuningEvent { number, created: 0, news: News::info(text) };
        let text = described(&job, &[event(2, "second"), event(1, "first")]);
        assert!(text.contains("step        2 of 4\nended       1970-01-01 00:01\nerror       Line 3: no.\n"), "{text}");
        assert!(text.ends_with("info   first\n1970-01-01 00:00  info   second"), "{text}");
        assert!(line(&job).ends_with("2/4  m"), "{}", line(&job));
    }
}
