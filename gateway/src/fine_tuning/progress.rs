//! What a training says while it runs: a JSON object per line, in a file that only grows.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use tidemill_store::{Heard, News};

/// Most that is taken over at once.
const PORTION: u64 = 1 << 20;
/// Where the last line is looked for.
const TAIL: u64 = 1 << 16;
/// Events with metrics of a whole training, about.
const TOLD_STEPS: u64 = 1000;

/// A line. Names beyond these are for other readers.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Line {
    event: String,
    step: u64,
    steps: u64,
    epoch: f64,
    tokens: u64,
    /// A number that is none is null.
    metrics: BTreeMap<String, Option<f64>>,
    remaining_s: Option<f64>,
    message: Option<String>,
    train: u64,
    held_out: u64,
    truncated: u64,
    left_out: Vec<LeftOut>,
}

/// Rows that the trainer cannot use, for one reason.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LeftOut {
    reason: String,
    rows: u64,
}

/// How a training ended, by its own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Last {
    /// The adapter is there.
    Finished,
    /// It went out in good order and can go on.
    Stopped,
    /// It cannot go on, for this reason.
    Failed(String),
}

/// The metrics' names as the API has them.
const NAMES: [(&str, &str); 5] = [
    ("loss", "train_loss"),
    ("mean_token_accuracy", "train_mean_token_accuracy"),
    ("eval_loss", "full_valid_loss"),
    ("eval_mean_token_accuracy", "full_valid_mean_token_accuracy"),
    ("num_tokens", "tokens"),
];

/// Metrics of a step in the form of the API, with those that it does not know under their own names.
pub fn metrics<'a>(step: u64, found: impl IntoIterator<Item = (&'a str, f64)>) -> Value {
    let mut metrics = Map::from_iter([("step".to_owned(), step.into())]);
    for (name, value) in found {
        let name = NAMES.iter().find(|(ours, _)| *ours == name).map_or(name, |(_, theirs)| theirs);
        metrics.insert(name.to_owned(), value.into());
    }
    Value::Object(metrics)
}

/// Metrics that an event has in the form of the API, under TRL's names.
pub fn own_names(metrics: &Value) -> Value {
    let own = |name: &String| NAMES.iter().find(|(_, theirs)| theirs == name).map_or(name.as_str(), |(ours, _)| ours).to_owned();
    let entries = metrics.as_object().into_iter().flatten();
    Value::Object(entries.map(|(name, value)| (own(name), value.clone())).collect())
}

/// What was said behind `before.read_bytes`, as far as it is whole lines; `None` when there is nothing new. `now` is in microseconds.
pub fn listen(path: &Path, before: &Heard, now: i64) -> io::Result<Option<Heard>> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    file.seek(SeekFrom::Start(before.read_bytes))?;
    let mut bytes = Vec::new();
    file.take(PORTION).read_to_end(&mut bytes)?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    // A line that is longer than a portion is none of ours.
    let whole = if whole == 0 && bytes.len() as u64 == PORTION { bytes.len() } else { whole };
    if whole == 0 {
        return Ok(None);
    }
    let mut heard = Heard { read_bytes: before.read_bytes + whole as u64, news: Vec::new(), ..before.clone() };
    for line in bytes[..whole].split(|byte| *byte == b'\n') {
        if let Ok(line) = serde_json::from_slice::<Line>(line) {
            take(&mut heard, &line, now);
        }
    }
    Ok(Some(heard))
}

fn take(heard: &mut Heard, line: &Line, now: i64) {
    let found = || line.metrics.iter().filter_map(|(name, value)| Some((name.as_str(), (*value)?)));
    match line.event.as_str() {
        "progress" => {
            heard.steps = if line.steps > 0 { line.steps } else { heard.steps };
            heard.tokens = Some(line.tokens.max(heard.tokens.unwrap_or(0)));
            let remaining = line.remaining_s.filter(|seconds| (0.0..1e9).contains(seconds));
            heard.estimated_finish = remaining.map(|seconds| now + (seconds * 1e6) as i64);
            // After a restart, steps behind the last checkpoint are taken again, with the same numbers.
            if line.step > heard.step {
                heard.step = line.step;
                let every = heard.steps.div_ceil(TOLD_STEPS).max(1);
                if line.step.is_multiple_of(every) || line.step == heard.steps {
                    let loss = line.metrics.get("loss").copied().flatten();
                    let loss = loss.map_or_else(String::new, |loss| format!(": training loss={loss:.4}"));
                    let mut data = metrics(line.step, found());
                    data["total_steps"] = heard.steps.into();
                    data["epoch"] = json!(line.epoch);
                    heard.news.push(News::metrics(format!("Step {}/{}{loss}", line.step, heard.steps), data));
                }
            }
        }
        // Evaluations behind the last checkpoint are made again, too.
        "evaluated" if line.step > heard.evaluated => {
            heard.evaluated = line.step;
            let loss = line.metrics.get("eval_loss").copied().flatten();
            let loss = loss.map_or_else(String::new, |loss| format!(": full validation loss={loss:.4}"));
            heard.news.push(News::metrics(format!("Step {}/{}{loss}", line.step, heard.steps), metrics(line.step, found())));
        }
        "waits" => heard.news.push(News::info("Another training or evaluation has the card; the training waits for it.")),
        "waited" => heard.news.push(News::info("The training has the card now.")),
        // Said again by every process, and told once: before the first step.
        "prepared" if heard.tokens.is_none() => {
            heard.steps = line.steps;
            heard.tokens = Some(0);
            let held_out = if line.held_out > 0 { format!("; to measure on: {}", line.held_out) } else { String::new() };
            heard.news.push(News::info(format!("Examples to learn: {}{held_out}; steps: {}.", line.train, line.steps)));
            if line.truncated > 0 {
                heard.news.push(News::warn(format!(
                    "Examples that are longer than what is trained on, and were cut: {}.",
                    line.truncated
                )));
            }
            let left_out =
                line.left_out.iter().map(|LeftOut { reason, rows }| format!("Examples left out: {rows}, because {reason}."));
            heard.news.extend(left_out.map(News::warn));
        }
        _ => {}
    }
}

/// Where a training is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Latest {
    /// Steps taken.
    pub step: u64,
    /// All steps.
    pub steps: u64,
    /// Epochs done.
    pub epoch: f64,
    /// Tokens computed.
    pub tokens: u64,
    /// The last of each, under TRL's names.
    pub metrics: BTreeMap<String, f64>,
}

/// Where the training is, by the last that it said.
pub fn latest(path: &Path) -> io::Result<Latest> {
    let mut latest = Latest::default();
    for line in tail(path)?.split(|byte| *byte == b'\n') {
        let Ok(line) = serde_json::from_slice::<Line>(line) else { continue };
        if matches!(line.event.as_str(), "progress" | "evaluated") {
            (latest.step, latest.steps, latest.epoch, latest.tokens) = (line.step, line.steps, line.epoch, line.tokens);
            latest.metrics.extend(line.metrics.into_iter().filter_map(|(name, value)| Some((name, value?))));
        }
    }
    Ok(latest)
}

/// The end of a file; empty when there is none.
fn tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(bytes),
        file => file?,
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whether the last that was said behind the first `before` bytes is that the training waits for its card.
pub fn waits(path: &Path, before: u64) -> io::Result<bool> {
    let last = last_line(&tail(path)?).is_some_and(|line| line.event == "waits");
    Ok(last && std::fs::metadata(path)?.len() > before)
}

fn last_line(bytes: &[u8]) -> Option<Line> {
    let line = bytes.strip_suffix(b"\n")?.rsplit(|byte| *byte == b'\n').next()?;
    serde_json::from_slice(line).ok()
}

/// How the training ended that said this last; `None` when it did not say.
pub fn last(path: &Path) -> io::Result<Option<Last>> {
    Ok(last_line(&tail(path)?).and_then(|line| match line.event.as_str() {
        "finished" => Some(Last::Finished),
        "stopped" => Some(Last::Stopped),
        "failed" => Some(Last::Failed(line.message.unwrap_or_else(|| "the training failed without a reason".to_owned()))),
        _ => None,
    }))
}

/// The log of metrics as comma-separated values, a line for each step; columns that no line has are absent.
pub fn csv(log: &str) -> String {
    let mut steps: BTreeMap<u64, BTreeMap<String, f64>> = BTreeMap::new();
    for line in log.lines() {
        let Ok(line) = serde_json::from_str::<Map<String, Value>>(line) else { continue };
        let Some(step) = line.get("step").and_then(Value::as_u64) else { continue };
        let row = steps.entry(step).or_default();
        let found =
            line.iter().filter(|(name, _)| *name != "step").filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?)));
        if let Value::Object(named) = metrics(step, found) {
            row.extend(named.into_iter().filter_map(|(name, value)| Some((name, value.as_f64()?))));
        }
    }
    let first = ["step", "train_loss", "full_valid_loss"];
    let has = |name: &str| steps.values().any(|row| row.contains_key(name));
    let mut columns: Vec<&str> = first.into_iter().filter(|name| has(name)).collect();
    let others: std::collections::BTreeSet<&str> = steps.values().flat_map(BTreeMap::keys).map(String::as_str).collect();
    columns.extend(others.into_iter().filter(|name| !first.contains(name)));
    let mut text = columns.join(",") + "\n";
    for row in steps.values() {
        let cells: Vec<String> = columns.iter().map(|name| row.get(*name).map_or_else(String::new, f64::to_string)).collect();
        text += &(cells.join(",") + "\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn step(step: u64, loss: f64) -> String {
        json!({"event": "progress", "step": step, "steps": 4, "tokens": step * 10, "metrics": {"loss": loss, "bad": null}, "remaining_s": 2.0})
            .to_string()
            + "\n"
    }

    #[test]
    fn steps_are_told_once_and_half_a_line_waits() {
        let left_out = json!([{"reason": "too odd", "rows": 2}]);
        let prepared = json!({"event": "prepared", "train": 8, "steps": 4, "left_out": left_out}).to_string() + "\n";
        let whole = prepared.clone() + &step(1, 0.5) + &step(2, 0.25);
        let file = said(&(whole.clone() + "{\"event\":"));
        let heard = listen(file.path(), &Heard::default(), 7).unwrap().unwrap();
        assert_eq!((heard.read_bytes, heard.step, heard.steps, heard.tokens), (whole.len() as u64, 2, 4, Some(20)));
        assert_eq!(heard.estimated_finish, Some(2_000_007));
        let told: Vec<_> = heard.news.iter().map(|news| (news.level, news.message.as_str())).collect();
        let expected = [
            ("info", "Examples to learn: 8; steps: 4."),
            ("warn", "Examples left out: 2, because too odd."),
            ("info", "Step 1/4: training loss=0.5000"),
            ("info", "Step 2/4: training loss=0.2500"),
        ];
        assert_eq!(told, expected);
        assert_eq!(heard.news[3].metrics.as_ref().unwrap()["train_loss"], 0.25);
        assert_eq!(listen(file.path(), &heard, 7).unwrap(), None);
        // A process that was killed after step 2 and goes on after step 1.
        std::fs::write(file.path(), whole + "\n" + &prepared + &step(2, 0.25) + &step(3, 0.125)).unwrap();
        let again = listen(file.path(), &heard, 7).unwrap().unwrap();
        assert_eq!(again.news.iter().map(|news| news.message.as_str()).collect::<Vec<_>>(), ["Step 3/4: training loss=0.1250"]);
        assert_eq!(listen(Path::new("/nowhere"), &heard, 7).unwrap(), None);
    }

    #[test]
    fn who_waits_for_the_card_says_so_until_it_has_it() {
        let file = said("{\"event\":\"waits\"}\n");
        let heard = listen(file.path(), &Heard::default(), 0).unwrap().unwrap();
        assert!(matches!(&heard.news[..], [waits] if waits.message.ends_with("waits for it.")), "{:?}", heard.news);
        assert_eq!((heard.tokens, last(file.path()).unwrap(), waits(file.path(), 0).unwrap()), (None, None, true));
        // An earlier process, which was ended while it waited.
        assert!(!waits(file.path(), heard.read_bytes).unwrap());
        std::fs::write(file.path(), "{\"event\":\"waits\"}\n{\"event\":\"waited\"}\n").unwrap();
        let heard = listen(file.path(), &heard, 0).unwrap().unwrap();
        assert!(matches!(&heard.news[..], [has] if has.message == "The training has the card now."), "{:?}", heard.news);
        assert!(!waits(file.path(), 0).unwrap());
    }

    #[test]
    fn an_evaluation_is_told_once_however_often_it_is_made() {
        let evaluated = |step: u64| {
            let metrics = json!({"eval_loss": 0.5});
            json!({"event": "evaluated", "step": step, "steps": 4, "metrics": metrics}).to_string() + "\n"
        };
        // Killed after the evaluation of its last step and before the checkpoint; the next process takes that step again.
        let until_killed = step(3, 0.5) + &evaluated(3) + &step(4, 0.25) + &evaluated(4);
        let file = said(&until_killed);
        let heard = listen(file.path(), &Heard::default(), 0).unwrap().unwrap();
        let told = |heard: &Heard| -> Vec<String> { heard.news.iter().map(|news| news.message.clone()).collect() };
        let validation = "Step 4/4: full validation loss=0.5000";
        assert_eq!((told(&heard).len(), told(&heard)[3].as_str(), heard.evaluated), (4, validation, 4));
        std::fs::write(file.path(), until_killed.clone() + "\n" + &step(4, 0.25) + &evaluated(4)).unwrap();
        let again = listen(file.path(), &heard, 0).unwrap().unwrap();
        assert_eq!((told(&again), again.evaluated), (Vec::new(), 4));
        // Killed between a step and its evaluation: the next process' is the first.
        let file = said(&(step(3, 0.5) + &evaluated(3) + &step(4, 0.25) + "\n" + &step(4, 0.25) + &evaluated(4)));
        let heard = listen(file.path(), &Heard::default(), 0).unwrap().unwrap();
        assert_eq!((told(&heard).len(), told(&heard)[3].as_str()), (4, validation));
    }

    #[test]
    fn a_long_training_tells_about_a_thousand_steps() {
        let line = |step: u64| json!({"event": "progress", "step": step, "steps": 5001}).to_string() + "\n";
        let text: String = (1..=5001).map(line).collect();
        let heard = listen(said(&text).path(), &Heard::default(), 0).unwrap().unwrap();
        assert_eq!((heard.step, heard.news.len()), (5001, 834));
    }

    #[test]
    fn the_last_line_says_how_it_ended() {
        let last = |text: &str| last(said(text).path()).unwrap();
        assert_eq!(last(&(step(1, 0.5) + "{\"event\":\"finished\"}\n")), Some(Last::Finished));
        assert_eq!(last("{\"event\":\"stopped\"}\n"), Some(Last::Stopped));
        assert_eq!(last("{\"event\":\"failed\",\"message\":\"why\"}\n"), Some(Last::Failed("why".into())));
        assert_eq!(last(&("{\"event\":\"stopped\"}\n".to_owned() + &step(1, 0.5))), None);
        assert_eq!(last("{\"event\":\"finished\"}\n{\"ev"), None);
        assert_eq!(last(""), None);
    }

    #[test]
    fn metrics_become_a_table() {
        let log = "{\"step\":1,\"epoch\":0.5,\"loss\":2}\n{\"step\":2,\"epoch\":1,\"loss\":1.5}\n{\"step\":2,\"epoch\":1,\"eval_loss\":1.25}\nhalf";
        assert_eq!(csv(log), "step,train_loss,full_valid_loss,epoch\n1,2,,0.5\n2,1.5,1.25,1\n");
        assert_eq!(csv(""), "\n");
    }
}
