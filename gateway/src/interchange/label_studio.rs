//! Label Studio: its project, labeling configuration and tasks. What its raters say is read in [`annotation`].
//!
//! A task's data hold the prompt, the two answers and our task id; its meta, which raters do not see, says which of our answers is
//! `answer1`. Names of the configuration and of the data are as in Label Studio's own template for pairwise comparison.

mod annotation;

pub use annotation::{Event, read_event, read_export};

use crate::interchange::{first_is_a, transcript};
use serde_json::{Value, json};
use tidemill_store::label::{Queue, Task};

/// For feedback and for ids of judgements.
pub const TOOL: &str = "label-studio";

/// The labeling configuration: two answers side by side, and one choice for what is no side. Texts are shown as they are, so that
/// markup in an answer does nothing.
pub const CONFIG: &str = r#"<View>
  <Header value="Which answer is better?"/>
  <Text name="prompt" value="$prompt"/>
  <Pairwise name="comparison" toName="answer1,answer2"/>
  <View style="display: grid; grid-template-columns: 1fr 1fr; gap: 1rem">
    <Text name="answer1" value="$answer1"/>
    <Text name="answer2" value="$answer2"/>
  </View>
  <Header size="6" value="Neither is better? Then select no answer above, and say:"/>
  <Choices name="verdict" toName="prompt" choice="single-radio" showInline="true">
    <Choice value="Tie" alias="tie" hotkey="3"/>
    <Choice value="Both bad" alias="both_bad" hotkey="4"/>
  </Choices>
  <TextArea name="comment" toName="prompt" rows="2" maxSubmissions="1" placeholder="Why? (optional)"/>
</View>
"#;

/// The body of `POST /api/projects`: configuration, guidelines and overlap of a queue.
pub fn project(queue: &Queue) -> Value {
    json!({
        // Label Studio takes 3 to 50 characters.
        "title": format!("Tidemill: {}", queue.name).chars().take(50).collect::<String>(),
        "description": "Pairs of answers from a Tidemill labeling queue",
        "label_config": CONFIG,
        "expert_instruction": instruction(&queue.guidelines),
        "show_instruction": !queue.guidelines.trim().is_empty(),
        "maximum_annotations": queue.overlap,
        "show_skip_button": true,
        "enable_empty_annotation": false,
    })
}

/// An element of the body of `POST /api/projects/{id}/import`.
pub fn task(queue: &Queue, task: &Task) -> Value {
    let a_first = first_is_a(task.id);
    let (answer1, answer2) = if a_first { (&task.answer_a, &task.answer_b) } else { (&task.answer_b, &task.answer_a) };
    json!({
        "data": {
            "prompt": transcript::text(&task.prompt),
            "answer1": answer1,
            "answer2": answer2,
            "tidemill_task": task.id,
        },
        "meta": {"tidemill": {"queue": queue.name, "answer1": if a_first { "a" } else { "b" }}},
    })
}

/// Guidelines as HTML: Label Studio shows instructions as such, ours are text.
fn instruction(guidelines: &str) -> String {
    if guidelines.trim().is_empty() {
        return String::new();
    }
    let escaped = guidelines.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<div style=\"white-space: pre-wrap\">{escaped}</div>")
}

#[cfg(test)]
mod tests;
