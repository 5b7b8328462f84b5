//! Fine-tuning jobs: the list, and one with its curves.

use crate::console::html::{Html, all, tag};
use crate::console::part::{
    Mood, Part, block, chip, count, facts, figure, href, link, moment, nothing, pictures, said, table, thinned,
};
use crate::fine_tuning::own_names;
use crate::http::job_name;
use serde_json::Value;
use tidemill_rlhf::chart::significant;
use tidemill_rlhf::train::charts;
use tidemill_store::{FineTuningCheckpoint, FineTuningEvent, FineTuningJob, FineTuningState};

/// Messages that are shown, the newest.
const MESSAGES: usize = 50;

/// A job's page.
pub struct Shown {
    /// The job.
    pub job: FineTuningJob,
    /// Its events, the newest first.
    pub events: Vec<FineTuningEvent>,
    /// There are older ones.
    pub older: bool,
    /// Models of earlier epochs, the latest first.
    pub checkpoints: Vec<FineTuningCheckpoint>,
    /// The visitor may act.
    pub acts: bool,
    /// Microseconds since 1970.
    pub now: i64,
}

fn state_chip(state: FineTuningState) -> Html {
    chip(Mood::of_state(state.as_str()), &state.as_str().replace('_', " ")).into()
}

/// Steps done and all steps, with a bar.
fn progress(job: &FineTuningJob) -> Html {
    if job.steps == 0 {
        return Html::default();
    }
    let words = format!("{} of {} steps", count(job.step), count(job.steps));
    let bar = tag("progress").attr("max", job.steps.to_string()).attr("value", job.step.to_string()).attr("aria-label", &words);
    all([bar, tag("small").with(words)])
}

fn method(job: &FineTuningJob) -> String {
    job.draft.method["type"].as_str().unwrap_or("?").to_owned()
}

/// The list.
pub fn list(jobs: &[FineTuningJob], has_more: bool) -> Part {
    let row = |job: &FineTuningJob| {
        let name = job_name(job.draft.id);
        [
            link(&["trainings", &name], &name).into(),
            method(job).into(),
            (&job.draft.model).into(),
            state_chip(job.state),
            progress(job),
            job.fine_tuned_model.as_ref().map(Html::from).into(),
            moment(job.draft.created),
        ]
    };
    let list = match jobs {
        [] => nothing("No fine-tuning job yet: POST /v1/fine_tuning/jobs makes one."),
        _ => {
            let head = ["Job", "Method", "Model", "State", "Progress", "Became", "Made (UTC)"];
            tag("section").class("block card").with(table("Fine-tuning jobs", head, jobs.iter().map(row))).into()
        }
    };
    let more = if has_more { nothing("Older ones: GET /v1/fine_tuning/jobs.") } else { Html::default() };
    Part::new("Training", "Fine-tuning jobs: files that become adapters.", [list, more])
}

impl Shown {
    /// The page.
    pub fn part(&self) -> Part {
        let job = &self.job;
        let lead = format!("{} of {}", method(job), job.draft.model);
        Part::new(&job_name(job.draft.id), lead, [self.standing(), self.curves(), self.models(), self.messages()])
    }

    fn standing(&self) -> Html {
        let job = &self.job;
        let why = job.error.as_ref().map(|error| error["message"].as_str().unwrap_or_default().to_owned());
        let ends = job.estimated_finish.filter(|at| *at > self.now && !job.state.ended());
        let about = facts([
            ("State", state_chip(job.state)),
            ("Progress", progress(job)),
            ("Why it failed", why.into()),
            ("Became", job.fine_tuned_model.as_ref().map(|model| tag("code").with(model)).into()),
            ("Tokens computed", job.trained_tokens.map(count).into()),
            ("Made (UTC)", moment(job.draft.created)),
            ("Will be done (UTC)", ends.map(moment).into()),
            ("Ended (UTC)", job.finished.map(moment).into()),
            ("Seed", job.draft.seed.to_string().into()),
        ]);
        let method = serde_json::to_string_pretty(&job.draft.method).unwrap_or_default();
        let details = tag("details").attr("id", "method").with(tag("summary").with("Method"));
        let details = details.with(tag("pre").attr("tabindex", "0").with(method));
        block("Where it stands").attr("id", "standing").with(about).with(self.buttons()).with(details).into()
    }

    /// What a person may want now.
    fn buttons(&self) -> Html {
        let acts: &[(&str, &str)] = match self.job.state {
            _ if !self.acts => &[],
            FineTuningState::Running | FineTuningState::Queued => &[("pause", "Pause"), ("cancel", "Cancel")],
            FineTuningState::ValidatingFiles => &[("cancel", "Cancel")],
            FineTuningState::Paused => &[("resume", "Resume"), ("cancel", "Cancel")],
            FineTuningState::Succeeded | FineTuningState::Failed | FineTuningState::Cancelled => &[],
        };
        let name = job_name(self.job.draft.id);
        let button = |(act, words): &(&str, &str)| {
            let place = href("/v1/fine_tuning/jobs", &[&name, act]);
            let button = tag("button").class("plain").attr("type", "button").attr("id", format!("act-{act}"));
            let button = button.attr("data-post", place).attr("data-body", "").with(*words);
            if *act == "cancel" { button.attr("data-sure", "The training ends without a model. This is final.") } else { button }
        };
        match acts {
            [] => Html::default(),
            _ => {
                tag("div").class("row").attr("role", "group").attr("aria-label", "Acts").with_all(acts.iter().map(button)).into()
            }
        }
    }

    fn curves(&self) -> Html {
        let lines: Vec<Value> = self.events.iter().rev().filter_map(|event| event.news.metrics.as_ref()).map(own_names).collect();
        let note = if self.older { "By step; the beginning is in the job's result file only" } else { "By step" };
        let mut charts = charts(&lines);
        for line in charts.iter_mut().flat_map(|chart| &mut chart.lines) {
            line.points = thinned(std::mem::take(&mut line.points));
        }
        let figures = charts.iter().enumerate().filter_map(|(place, chart)| figure(&format!("curve-{place}"), chart, note));
        let figures = pictures(figures);
        if figures.is_empty() { block("Curves").with(nothing("Nothing was measured yet.")).into() } else { figures }
    }

    fn models(&self) -> Html {
        let row = |checkpoint: &FineTuningCheckpoint| {
            let metrics = checkpoint.metrics.as_object().into_iter().flatten();
            let words = metrics.filter(|(name, _)| *name != "step").map(|(name, value)| {
                let value = value.as_f64().map_or_else(|| value.to_string(), significant);
                format!("{name} {value}")
            });
            let words = words.collect::<Vec<_>>().join(" · ");
            [tag("code").with(&checkpoint.model).into(), count(checkpoint.step).into(), words.into(), moment(checkpoint.created)]
        };
        match self.checkpoints.as_slice() {
            [] => Html::default(),
            found => {
                let head = ["Model", "After step", "Measured", "Made (UTC)"];
                block("Models of its epochs").with(table("Models of its epochs", head, found.iter().map(row))).into()
            }
        }
    }

    fn messages(&self) -> Html {
        let told = self.events.iter().filter(|event| event.news.metrics.is_none()).take(MESSAGES);
        let row = |event: &FineTuningEvent| {
            let mood = match event.news.level {
                "error" => Mood::Bad,
                "warn" => Mood::Warn,
                _ => Mood::Plain,
            };
            [moment(event.created), chip(mood, event.news.level).into(), said(&event.news.message)]
        };
        block("What happened").with(table("What happened", ["When (UTC)", "Level", "What"], told.map(row))).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tidemill_store::{FineTuningDraft, News};
    use uuid::Uuid;

    const EVIL: &str = "<script>alert(1)</script>";

    fn job(state: FineTuningState) -> FineTuningJob {
        FineTuningJob {
            draft: FineTuningDraft {
                id: Uuid::from_u128(9),
                created: 0,
                key_id: None,
                model: EVIL.into(),
                base: EVIL.into(),
                method: json!({"type": "dpo", "note": EVIL}),
                suffix: None,
                seed: 4,
                training_file: Uuid::nil(),
                validation_file: None,
                metadata: None,
                result_file: Uuid::nil(),
                place: String::new(),
            },
            state,
            error: Some(json!({"message": EVIL})),
            fine_tuned_model: Some(EVIL.into()),
            served: true,
            has_result: false,
            finished: None,
            estimated_finish: None,
            trained_tokens: Some(12_345),
            step: 2,
            steps: 8,
            read_bytes: 0,
            attempts: 0,
            evaluated: 0,
        }
    }

    fn shown(state: FineTuningState, acts: bool) -> Shown {
        let metrics =
            |step: u64, name: &str, value: f64| News::metrics("", json!({"step": step, (name): value, "total_steps": 8}));
        let news = [
            News::error(EVIL),
            metrics(2, "full_valid_loss", 0.5),
            metrics(2, "train_loss", 0.25),
            metrics(1, "train_loss", 0.75),
            metrics(1, "rewards/accuracies", 0.625),
        ];
        let event = |(at, news): (usize, News)| FineTuningEvent { number: 9 - at as u64, created: 0, news };
        let checkpoint =
            FineTuningCheckpoint { step: 2, created: 0, model: EVIL.into(), metrics: json!({"step": 2, "full_valid_loss": 0.5}) };
        let events = news.into_iter().enumerate().map(event).collect();
        Shown { job: job(state), events, older: false, checkpoints: vec![checkpoint], acts, now: 0 }
    }

    #[test]
    fn a_job_has_curves_of_what_was_measured_in_training_and_held_out() {
        let text = shown(FineTuningState::Running, true).part().document();
        assert_eq!(text.matches("<svg").count(), 2, "{text}");
        assert!(text.contains("<td>full_valid_loss 0.5</td>"), "{text}");
        assert!(text.contains("<h3>Loss</h3>") && text.contains("<h3>Share of comparisons won</h3>"));
        assert!(text.contains("<td>2</td><td>held-out</td><td>0.5</td>") && text.contains("<td>training</td><td>0.75</td>"));
        assert!(text.contains("2 of 8 steps") && text.contains("12\u{202f}345") && !text.contains("<script"));
        assert!(text.contains("/v1/fine_tuning/jobs/ftjob-00000000-0000-0000-0000-000000000009/pause"));
    }

    #[test]
    fn a_long_training_has_curves_of_as_many_points_as_a_picture_shows() {
        let mut page = shown(FineTuningState::Running, true);
        let event = |step: u64| FineTuningEvent {
            number: step,
            created: 0,
            news: News::metrics("", json!({"step": step, "train_loss": 0.5})),
        };
        page.events = (1..=3000).rev().map(event).collect();
        page.older = true;
        let text = page.part().document();
        let curve = text.split("class=\"curve c0\" d=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(curve.split('L').count(), 375, "every eighth, the last among them");
        assert!(text.contains("<td>3000</td>") && text.contains("the beginning is in the job&#39;s result file"));
    }

    #[test]
    fn what_may_be_done_depends_on_the_state_and_on_who_looks() {
        for (state, acts, expected) in [
            (FineTuningState::Paused, true, &["act-resume", "act-cancel"][..]),
            (FineTuningState::ValidatingFiles, true, &["act-cancel"]),
            (FineTuningState::Succeeded, true, &[]),
            (FineTuningState::Running, false, &[]),
        ] {
            let text = shown(state, acts).part().document();
            let found: Vec<&str> =
                text.split("id=\"").filter(|rest| rest.starts_with("act-")).map(|rest| rest.split('"').next().unwrap()).collect();
            assert_eq!(found, expected, "{state:?}");
        }
    }

    #[test]
    fn the_list_links_to_each() {
        let text = list(&[job(FineTuningState::Failed)], true).document();
        assert!(text.contains("/console/trainings/ftjob-00000000-0000-0000-0000-000000000009") && !text.contains("<script"));
        assert!(text.contains(">failed</span>") && text.contains("Older ones"));
        assert!(list(&[], false).document().contains("No fine-tuning job yet"));
    }
}
