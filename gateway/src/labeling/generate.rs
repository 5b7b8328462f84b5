//! Fresh answers for pairs, at a priority below everyone who waits for one.

use crate::clock::now;
use crate::http::App;
use crate::http::error::ApiError;
use crate::openai::chat::ChatRequest;
use crate::openai::collected::{Collected, Flow};
use crate::recording::{Draft as Record, Level, Recorder, to_json};
use crate::upstream::LocalModel;
use hyper::StatusCode;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidemill_engine::{FinishReason, RequestId, Tenant};
use tidemill_store::label::{Draft, NewTask};
use tidemill_store::records::{Inference, Status};
use uuid::Uuid;

/// Requests of people have 0 unless they say otherwise; lower runs first.
const PRIORITY: i32 = crate::http::tier::BATCH_PRIORITY;
/// Longest answer.
const MAX_TOKENS: usize = 1024;
/// Models whose own default is lower are asked with this temperature.
const LEAST_TEMPERATURE: f32 = 0.7;
/// Seeds tried before a pair whose answers are always the same is given up.
const ATTEMPTS: u32 = 3;

/// When it was found out, in microseconds since 1970, and whom an answer is about.
type Whose = (i64, Option<String>);

/// What became of a draft.
pub enum Outcome {
    /// It is a task now.
    Task(Box<NewTask>),
    /// It never will be; why.
    Never(String),
    /// Not now: the engine is busy, loading, or on its way out.
    Later,
}

/// Generates what a draft lacks.
pub async fn complete(app: &App, draft: &Draft) -> Outcome {
    if !app.store.has_room() {
        return Outcome::Later;
    }
    let wanted = if draft.answer.is_some() { 1 } else { 2 };
    for _ in 0..ATTEMPTS {
        // Before the question: what is made of an answer that is erased meanwhile is as old as that, and not kept.
        let created = now();
        let user_key = match &draft.answer {
            // The fresh answer is about the same person: erasure must find it.
            Some((_, candidate)) => match app.store.inference(*candidate).await {
                Ok(Some(first)) => first.user_key,
                Ok(None) => return Outcome::Never("its first answer is no longer stored".into()),
                Err(_) => return Outcome::Later,
            },
            None => None,
        };
        let made = match answers(app, draft, wanted, (created, user_key)).await {
            Ok(Some(made)) => made,
            Ok(None) => return Outcome::Later,
            Err(error) if error.status == StatusCode::SERVICE_UNAVAILABLE => return Outcome::Later,
            Err(error) => return Outcome::Never(error.message),
        };
        let both: Vec<(String, Uuid)> = draft.answer.iter().cloned().chain(made).collect();
        if let [(answer_a, candidate_a), (answer_b, candidate_b)] = &both[..]
            && answer_a != answer_b
        {
            return Outcome::Task(Box::new(NewTask {
                source: draft.source.clone(),
                prompt: draft.prompt.clone(),
                answer_a: answer_a.clone(),
                answer_b: answer_b.clone(),
                candidate_a: Some(*candidate_a),
                candidate_b: Some(*candidate_b),
                gold: None,
            }));
        }
    }
    Outcome::Never(format!("the model gave no two different whole answers in {ATTEMPTS} attempts"))
}

/// `n` answers that ended by themselves, or were cut at the limit; fewer when some are empty. `None` when the server is leaving.
async fn answers(app: &App, draft: &Draft, n: usize, whose: Whose) -> Result<Option<Vec<(String, Uuid)>>, ApiError> {
    let model = app.registry.find_local(draft.model.as_deref())?;
    let (request, record) = prepare(app, &model, draft, n, whose)?;
    let ids = record.choice_ids.clone();
    let mut recorder = Recorder::new(app.store.clone(), Level::Full, Instant::now(), vec![record], None);
    let mut events = model.submit(vec![request])?;
    let mut collected = Collected::new(1, n, false);
    loop {
        // Nobody waits for this answer: a server that leaves does not stay for it.
        let next = tokio::time::timeout(Duration::from_millis(250), events.next()).await;
        if app.drain.is_draining() {
            return Ok(None);
        }
        let Ok(event) = next else { continue };
        let Some((prompt, event)) = event else { return Ok(None) };
        recorder.see(prompt, &event);
        if collected.event(prompt, event)? == Flow::End {
            break;
        }
    }
    let choices = collected.prompts.into_iter().flat_map(|prompt| prompt.choices).zip(ids);
    let whole = choices.filter(|(choice, _)| choice.finish != Some(FinishReason::Cancelled) && !choice.text.trim().is_empty());
    Ok(Some(whole.map(|(choice, id)| (choice.text, id)).collect()))
}

fn prepare(
    app: &App,
    model: &Arc<LocalModel>,
    draft: &Draft,
    n: usize,
    (created, user_key): Whose,
) -> Result<(tidemill_engine::Request, Record), ApiError> {
    let ids: Vec<Uuid> = (0..n).map(|_| app.store.issue_id()).collect();
    let id = ids.first().copied().unwrap_or_else(Uuid::now_v7);
    let mut body = json!({"model": model.name(), "messages": draft.prompt, "n": n, "seed": seed(id)});
    // Answers that hardly differ waste the time of whoever compares them.
    if model.defaults().temperature.is_some_and(|temperature| temperature < LEAST_TEMPERATURE)
        && let Some(body) = body.as_object_mut()
    {
        body.insert("temperature".into(), json!(LEAST_TEMPERATURE));
    }
    let mut chat = ChatRequest::parse(&body)?;
    model.check_choices(n, "n")?;
    let (prompt_text, prompt) = model.chat_tokens(&chat.prompt, &chat.offered_tools())?;
    model.check_fit(prompt.len(), None, "messages")?;
    chat.generation.max_tokens = Some(MAX_TOKENS.min(model.context().saturating_sub(prompt.len())));
    let sampling = chat.generation.sampling(model.defaults(), None);
    let inference = Inference {
        id,
        created,
        endpoint: "chat".into(),
        model: model.base().to_owned(),
        adapter: model.adapter().map_or(0, |adapter| adapter.generation().0),
        variant: model.variant(),
        conversation: None,
        key_id: None,
        user_key,
        status: Status::Ok,
        compare: n > 1,
        prompt_tokens: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
        cached_tokens: 0,
        output_tokens: 0,
        first_token_us: None,
        duration_us: 0,
        config_hash: model.fingerprint().to_owned(),
        metadata: Map::from_iter([("tidemill".to_owned(), Value::from(format!("labeling:{}", draft.queue_id)))]),
        params: Some(to_json(&sampling)),
        messages: Some(draft.prompt.clone()),
        prompt_text: Some(prompt_text),
        prompt_ids: prompt.clone(),
        exposure: None,
        choices: Vec::new(),
    };
    let request = tidemill_engine::Request {
        id: RequestId(id.as_u128()),
        prompt,
        sampling,
        priority: PRIORITY,
        cache_salt: None,
        adapter: model.adapter().cloned(),
        tenant: Tenant::default(),
        deadline: None,
    };
    Ok((request, Record { inference, choice_ids: ids, candidates: n, prompt_only: false, format: None }))
}

/// Every attempt has an id of its own, and by it another seed.
fn seed(id: Uuid) -> i64 {
    (id.as_u64_pair().1 >> 1).cast_signed()
}
