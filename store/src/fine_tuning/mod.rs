//! Fine-tuning jobs, what happened to them, and the models that came out.
//!
//! A job's state is the only truth about what should happen to it: whoever changes the row (the API, the command line, the server that
//! runs it) says in which states it may be for that, so that of two who disagree the first one wins. What a training says is taken over
//! with the place up to which it was read, in one transaction: nothing is told twice, and nothing is lost.

mod job;

use serde_json::Value;
use sqlx::any::{AnyArguments, AnyRow};
use sqlx::query::Query;
use sqlx::{Any, AnyConnection, AssertSqlSafe, Connection, Row};
use uuid::Uuid;

use crate::Database;
use crate::audit::Act;
use crate::error::StoreError;
use crate::files::{self, FileRecord, Viewer};
use crate::inferences::json;
use crate::page::{Order, Page};
use crate::patience::patiently;
use crate::statement::{Select, clean};
use crate::stored_chats::pair;
use job::{COLUMNS, read, read_checkpoint, read_event, state};
pub use job::{FineTuningCheckpoint, FineTuningDraft, FineTuningEvent, FineTuningJob, FineTuningState, News};

/// What a training said since it was last listened to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Heard {
    /// How much of it was read by now.
    pub read_bytes: u64,
    /// Steps taken.
    pub step: u64,
    /// All steps.
    pub steps: u64,
    /// The step of the last evaluation.
    pub evaluated: u64,
    /// Tokens computed.
    pub tokens: Option<u64>,
    /// When it will end, in microseconds since 1970.
    pub estimated_finish: Option<i64>,
    /// What is worth telling.
    pub news: Vec<News>,
}

/// What a job ends with.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// Name of the new model.
    pub model: String,
    /// The metrics, where there are any. The content lies in its place.
    pub result: Option<FileRecord>,
    /// Models that can be used.
    pub checkpoints: Vec<FineTuningCheckpoint>,
}

/// The fine-tuning jobs of a database. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct FineTunings {
    database: Database,
}

/// A value of a statement.
enum Bind {
    Text(Option<String>),
    Integer(Option<i64>),
}

impl Bind {
    fn json(value: &Value) -> Self {
        Self::Text(Some(clean(&value.to_string()).into_owned()))
    }

    fn count(count: u64) -> Self {
        Self::Integer(Some(count.cast_signed()))
    }
}

/// A change of one row: `set` names values from `$3` on.
struct Change<'a> {
    from: &'a [FineTuningState],
    set: &'a str,
    values: Vec<Bind>,
    news: &'a [News],
    /// Who wanted it, where somebody did.
    act: Option<Act>,
}

impl FineTunings {
    /// Over a database whose tables are there.
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    /// Writes a new job; `false` when one of its files was deleted meanwhile.
    pub async fn insert(&self, draft: &FineTuningDraft, news: &[News], act: Act) -> Result<bool, StoreError> {
        patiently(async {
            let mut connection = self.database.write().acquire().await?;
            let mut transaction = connection.begin().await?;
            for file in [Some(draft.training_file), draft.validation_file].into_iter().flatten() {
                let found = sqlx::query("SELECT id FROM files WHERE id = $1").bind(file.to_string());
                if found.fetch_optional(&mut *transaction).await?.is_none() {
                    return Ok(false);
                }
            }
            let text = "INSERT INTO fine_tuning_jobs (id, created, key_id, model, base, method, suffix, seed, training_file, validation_file, \
                 metadata, result_file, place, state, served, has_result, step, steps, read_bytes, attempts, events) \
                 VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,'validating_files',0,0,0,0,0,0,$14)";
            sqlx::query(text)
                .bind(draft.id.to_string())
                .bind(draft.created)
                .bind(draft.key_id.clone())
                .bind(clean(&draft.model).into_owned())
                .bind(clean(&draft.base).into_owned())
                .bind(clean(&draft.method.to_string()).into_owned())
                .bind(draft.suffix.clone())
                .bind(draft.seed)
                .bind(draft.training_file.to_string())
                .bind(draft.validation_file.map(|file| file.to_string()))
                .bind(draft.metadata.as_ref().map(|metadata| clean(&json(metadata)).into_owned()))
                .bind(draft.result_file.to_string())
                .bind(draft.place.clone())
                .bind(news.len() as i64)
                .execute(&mut *transaction)
                .await?;
            for (name, value) in draft.metadata.iter().flatten() {
                sqlx::query("INSERT INTO fine_tuning_metadata (job_id, pair) VALUES ($1, $2)")
                    .bind(draft.id.to_string())
                    .bind(pair(name, value.as_str().unwrap_or_default()))
                    .execute(&mut *transaction)
                    .await?;
            }
            tell(&mut transaction, draft.id, 1, news, draft.created).await?;
            act.write(&mut transaction).await?;
            transaction.commit().await?;
            Ok(true)
        })
        .await
    }

    /// The job of this id, if it is there for `viewer`.
    pub async fn find(&self, id: Uuid, viewer: &Viewer) -> Result<Option<FineTuningJob>, StoreError> {
        patiently(async {
            let text = format!("SELECT {COLUMNS} FROM fine_tuning_jobs WHERE id = $1");
            let query = sqlx::query(AssertSqlSafe(text)).bind(id.to_string());
            let found = query.fetch_optional(self.database.read()).await?.as_ref().map(read).transpose()?;
            Ok(found.filter(|job| viewer.sees(job.draft.key_id.as_deref())))
        })
        .await
    }

    /// The job that made the model of this name, if it is there for `viewer` and the model was not deleted.
    pub async fn find_model(&self, model: &str, viewer: &Viewer) -> Result<Option<FineTuningJob>, StoreError> {
        patiently(async {
            let text = format!("SELECT {COLUMNS} FROM fine_tuning_jobs WHERE fine_tuned_model = $1 AND served = 1");
            let query = sqlx::query(AssertSqlSafe(text)).bind(clean(model).into_owned());
            let found = query.fetch_optional(self.database.read()).await?.as_ref().map(read).transpose()?;
            Ok(found.filter(|job| viewer.sees(job.draft.key_id.as_deref())))
        })
        .await
    }

    /// A page of the jobs that are there for `viewer` and have all of these pairs, the newest first.
    pub async fn list(
        &self,
        viewer: &Viewer,
        metadata: &[(String, String)],
        after: Option<Uuid>,
        limit: usize,
    ) -> Result<Page<FineTuningJob>, StoreError> {
        patiently(async {
            let order = Order::NewestFirst;
            let mut select = Select::new(&format!("SELECT {COLUMNS} FROM fine_tuning_jobs"));
            select.text_option("key_id = ?", viewer.key_id());
            for (name, value) in metadata {
                let one = "EXISTS (SELECT 1 FROM fine_tuning_metadata WHERE job_id = fine_tuning_jobs.id AND pair = ?)";
                select.text(one, &pair(name, value));
            }
            select.text_option(&order.after("id"), after.map(|id| id.to_string()).as_deref());
            select.end(&format!(" ORDER BY id {} LIMIT {}", order.sql(), limit + 1));
            let rows = select.query().fetch_all(self.database.read()).await?;
            Ok(Page::of(rows.iter().map(read).collect::<Result<_, _>>()?, limit))
        })
        .await
    }

    /// The jobs of a data directory in which something is still to be done, the oldest first.
    pub async fn open(&self, place: &str) -> Result<Vec<FineTuningJob>, StoreError> {
        let states = words(&FineTuningState::OPEN);
        self.all(&format!("place = $1 AND state IN {states} ORDER BY id"), place).await
    }

    /// The jobs of a data directory whose models are served, the newest first and at most `limit`.
    pub async fn served(&self, place: &str, limit: usize) -> Result<Vec<FineTuningJob>, StoreError> {
        self.all(&format!("place = $1 AND state = 'succeeded' AND served = 1 ORDER BY id DESC LIMIT {limit}"), place).await
    }

    /// The jobs, of any data directory, whose models are learnt further by one in which something is still to be done.
    pub async fn learnt_from(&self) -> Result<Vec<Uuid>, StoreError> {
        patiently(async {
            let text = format!(
                "SELECT DISTINCT c.job_id FROM fine_tuning_checkpoints c JOIN fine_tuning_jobs j ON j.model = c.model \
                 WHERE j.model <> j.base AND j.state IN {}",
                words(&FineTuningState::OPEN)
            );
            let rows = sqlx::query(AssertSqlSafe(text)).fetch_all(self.database.read()).await?;
            rows.iter().map(job::id_of).collect()
        })
        .await
    }

    async fn all(&self, condition: &str, place: &str) -> Result<Vec<FineTuningJob>, StoreError> {
        patiently(async {
            let text = format!("SELECT {COLUMNS} FROM fine_tuning_jobs WHERE {condition}");
            let query = sqlx::query(AssertSqlSafe(text)).bind(place.to_owned());
            query.fetch_all(self.database.read()).await?.iter().map(read).collect()
        })
        .await
    }

    /// Moves a job that is in one of the states `from`, as somebody wants; `false` when it is in none of them.
    pub async fn enter(
        &self,
        id: Uuid,
        from: &[FineTuningState],
        to: FineTuningState,
        news: &[News],
        act: Act,
    ) -> Result<bool, StoreError> {
        let now = act.at;
        let values = vec![Bind::Text(Some(to.as_str().to_owned())), Bind::Integer(to.ended().then_some(now))];
        let set = "state = $3, finished = $4, estimated_finish = NULL, attempts = 0";
        Ok(self.change(id, Change { from, set, values, news, act: Some(act) }, None, now).await?.is_some())
    }

    /// The files are valid: `method` has numbers where it said `auto`.
    pub async fn validated(&self, id: Uuid, method: &Value, steps: u64, news: &[News], now: i64) -> Result<bool, StoreError> {
        let (from, set) = ([FineTuningState::ValidatingFiles], "state = 'queued', method = $3, steps = $4");
        let change = Change { from: &from, set, values: vec![Bind::json(method), Bind::count(steps)], news, act: None };
        Ok(self.change(id, change, None, now).await?.is_some())
    }

    /// `more` processes, 1 or 0, are about to train; says how many have in a row without a new step, these included, or `None` when the
    /// job is not to run.
    pub async fn begin(&self, id: Uuid, more: u64, news: &[News], now: i64) -> Result<Option<u64>, StoreError> {
        let (from, set) = ([FineTuningState::Queued, FineTuningState::Running], "state = 'running', attempts = attempts + $3");
        let row =
            self.change(id, Change { from: &from, set, values: vec![Bind::count(more)], news, act: None }, None, now).await?;
        row.map(|row| Ok(row.try_get::<i64, _>("attempts")?.unsigned_abs())).transpose()
    }

    /// The process of a job that runs waits for its card, or has it after it waited; `false` where somebody wants something else of the job.
    pub async fn wait(&self, id: Uuid, waits: bool, now: i64) -> Result<bool, StoreError> {
        let (from, set) = match waits {
            true => (FineTuningState::Running, "state = 'queued'"),
            false => (FineTuningState::Queued, "state = 'running'"),
        };
        Ok(self.change(id, Change { from: &[from], set, values: Vec::new(), news: &[], act: None }, None, now).await?.is_some())
    }

    /// The process of a job that runs, or waits for its card, was told to stop: that it took no step counts for nothing.
    pub async fn forgive(&self, id: Uuid, now: i64) -> Result<bool, StoreError> {
        let from = [FineTuningState::Queued, FineTuningState::Running];
        let change = Change { from: &from, set: "attempts = 0", values: Vec::new(), news: &[], act: None };
        Ok(self.change(id, change, None, now).await?.is_some())
    }

    /// Takes over what a training said. Later states take nothing any more: `false`.
    pub async fn hear(&self, id: Uuid, heard: &Heard, now: i64) -> Result<bool, StoreError> {
        let set = "read_bytes = $3, attempts = CASE WHEN step < $4 THEN 0 ELSE attempts END, step = $4, steps = $5, \
                   trained_tokens = COALESCE($6, trained_tokens), estimated_finish = $7, evaluated = $8";
        let values = vec![
            Bind::count(heard.read_bytes),
            Bind::count(heard.step),
            Bind::count(heard.steps),
            Bind::Integer(heard.tokens.map(u64::cast_signed)),
            Bind::Integer(heard.estimated_finish),
            Bind::count(heard.evaluated),
        ];
        let from = [FineTuningState::Queued, FineTuningState::Running, FineTuningState::Paused];
        let change = Change { from: &from, set, values, news: &heard.news, act: None };
        Ok(self.change(id, change, None, now).await?.is_some())
    }

    /// Ends a job without a model; `false` when it had ended.
    pub async fn fail(&self, id: Uuid, error: &Value, news: &[News], now: i64) -> Result<bool, StoreError> {
        let set = "state = 'failed', error = $3, finished = $4, estimated_finish = NULL";
        let values = vec![Bind::json(error), Bind::Integer(Some(now))];
        let change = Change { from: &FineTuningState::OPEN, set, values, news, act: None };
        Ok(self.change(id, change, None, now).await?.is_some())
    }

    /// Ends a job that runs, with its model; `false` when it does not.
    pub async fn succeed(&self, id: Uuid, made: &Made, news: &[News], now: i64) -> Result<bool, StoreError> {
        let set =
            "state = 'succeeded', fine_tuned_model = $3, served = 1, has_result = $4, finished = $5, estimated_finish = NULL";
        let values = vec![
            Bind::Text(Some(made.model.clone())),
            Bind::Integer(Some(i64::from(made.result.is_some()))),
            Bind::Integer(Some(now)),
        ];
        let change = Change { from: &[FineTuningState::Running], set, values, news, act: None };
        Ok(self.change(id, change, Some(made), now).await?.is_some())
    }

    /// The model is not served any more, as somebody wants.
    pub async fn unserve(&self, id: Uuid, news: &[News], act: Act) -> Result<bool, StoreError> {
        let now = act.at;
        let from = [FineTuningState::Succeeded];
        let change = Change { from: &from, set: "served = 0", values: Vec::new(), news, act: Some(act) };
        Ok(self.change(id, change, None, now).await?.is_some())
    }

    /// Changes a row and tells of it, in one.
    async fn change(&self, id: Uuid, change: Change<'_>, made: Option<&Made>, now: i64) -> Result<Option<AnyRow>, StoreError> {
        patiently(async {
            let mut connection = self.database.write().acquire().await?;
            let mut transaction = connection.begin().await?;
            let text = format!(
                "UPDATE fine_tuning_jobs SET {}, events = events + $2 WHERE id = $1 AND state IN {} RETURNING events, attempts",
                change.set,
                words(change.from)
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(id.to_string()).bind(change.news.len() as i64);
            let query = change.values.into_iter().fold(query, bind);
            let Some(row) = query.fetch_optional(&mut *transaction).await? else { return Ok(None) };
            let last: i64 = row.try_get("events")?;
            tell(&mut transaction, id, last - change.news.len() as i64 + 1, change.news, now).await?;
            if let Some(act) = &change.act {
                act.write(&mut transaction).await?;
            }
            if let Some(made) = made {
                for checkpoint in &made.checkpoints {
                    let text =
                        "INSERT INTO fine_tuning_checkpoints (job_id, step, created, model, metrics) VALUES ($1,$2,$3,$4,$5)";
                    sqlx::query(text)
                        .bind(id.to_string())
                        .bind(checkpoint.step.cast_signed())
                        .bind(checkpoint.created)
                        .bind(checkpoint.model.clone())
                        .bind(checkpoint.metrics.to_string())
                        .execute(&mut *transaction)
                        .await?;
                }
                if let Some(file) = &made.result {
                    files::insert(&mut transaction, file).await?;
                }
            }
            transaction.commit().await?;
            Ok(Some(row))
        })
        .await
    }

    /// A page of a job's events, the newest first; `before` is the number of the last one of the page before.
    pub async fn events(&self, id: Uuid, before: Option<u64>, limit: usize) -> Result<Page<FineTuningEvent>, StoreError> {
        let columns = "number, created, level, message, data FROM fine_tuning_events";
        self.page(id, columns, "number", before, limit, read_event).await
    }

    /// A page of a job's checkpoints, the latest first; `before` is the step of the last one of the page before.
    pub async fn checkpoints(
        &self,
        id: Uuid,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Page<FineTuningCheckpoint>, StoreError> {
        let columns = "step, created, model, metrics FROM fine_tuning_checkpoints";
        self.page(id, columns, "step", before, limit, read_checkpoint).await
    }

    async fn page<T>(
        &self,
        id: Uuid,
        columns: &str,
        order: &str,
        before: Option<u64>,
        limit: usize,
        read: fn(&AnyRow) -> Result<T, StoreError>,
    ) -> Result<Page<T>, StoreError> {
        patiently(async {
            let mut select = Select::new(&format!("SELECT {columns}"));
            select.text("job_id = ?", &id.to_string());
            select.integer(&format!("{order} < ?"), before.map(u64::cast_signed));
            select.end(&format!(" ORDER BY {order} DESC LIMIT {}", limit + 1));
            let rows = select.query().fetch_all(self.database.read()).await?;
            Ok(Page::of(rows.iter().map(read).collect::<Result<_, _>>()?, limit))
        })
        .await
    }

    /// The state of a job now; `None` when there is none.
    pub async fn state(&self, id: Uuid) -> Result<Option<FineTuningState>, StoreError> {
        patiently(async {
            let query = sqlx::query("SELECT state FROM fine_tuning_jobs WHERE id = $1").bind(id.to_string());
            let row = query.fetch_optional(self.database.read()).await?;
            row.map(|row| state(&id.to_string(), &row.try_get::<String, _>(0)?)).transpose()
        })
        .await
    }
}

type Statement = Query<'static, Any, AnyArguments>;

fn bind(query: Statement, value: Bind) -> Statement {
    match value {
        Bind::Text(text) => query.bind(text),
        Bind::Integer(integer) => query.bind(integer),
    }
}

/// `('a','b')`
fn words(states: &[FineTuningState]) -> String {
    let words: Vec<String> = states.iter().map(|state| format!("'{}'", state.as_str())).collect();
    format!("({})", words.join(","))
}

async fn tell(sql: &mut AnyConnection, id: Uuid, first: i64, news: &[News], now: i64) -> Result<(), StoreError> {
    for (news, number) in news.iter().zip(first..) {
        sqlx::query("INSERT INTO fine_tuning_events (job_id, number, created, level, message, data) VALUES ($1,$2,$3,$4,$5,$6)")
            .bind(id.to_string())
            .bind(number)
            .bind(now)
            .bind(news.level)
            .bind(clean(&news.message).into_owned())
            .bind(news.metrics.as_ref().map(|metrics| clean(&metrics.to_string()).into_owned()))
            .execute(&mut *sql)
            .await?;
    }
    Ok(())
}
