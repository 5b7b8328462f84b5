//! What one answer of another server is counted by: the record, the limits, the trace, the server's own numbers. It is settled once,
//! however the answer ends.

use crate::limits::Meter;
use crate::recording::{RemoteAnswer, RemoteRecord};
use crate::telemetry::Follower;
use crate::upstream::remote::Kind;
use crate::upstream::remote::chunk::{Gathering, RemoteUsage};
use crate::upstream::remote::retry::Failure;
use crate::upstream::remote::server::Turn;
use serde_json::Value;
use tidemill_store::records::Status;

/// An answer under way. One that is dropped was called off: its client left.
pub struct Account {
    gathering: Gathering,
    record: Option<RemoteRecord>,
    meter: Meter,
    follower: Option<Follower>,
    turn: Option<Turn>,
    /// Tokens of the prompt, guessed.
    estimate: usize,
    instead_of: Option<String>,
    begun: bool,
    settled: bool,
}

impl Account {
    /// Of an answer with `n` choices to a prompt of about `estimate` tokens.
    pub fn new(n: usize, estimate: usize, meter: Meter, record: Option<RemoteRecord>, follower: Option<Follower>) -> Self {
        let gathering = Gathering::new(n);
        Self { gathering, record, meter, follower, turn: None, estimate, instead_of: None, begun: false, settled: false }
    }

    /// The same, in the place of the model that the client asked for.
    pub fn instead_of(mut self, model: Option<&str>) -> Self {
        self.instead_of = model.map(str::to_owned);
        self
    }

    /// A server is asked, with these parameters.
    pub fn asks(&mut self, turn: &Turn, params: Value) {
        let spec = turn.server().spec();
        let provider = match spec.kind {
            Kind::OpenAi => "openai",
            Kind::Azure { .. } => "azure.ai.openai",
        };
        if let Some(follower) = &mut self.follower {
            follower.asks(&spec.name, provider);
        }
        if let Some(record) = &mut self.record {
            record.inference.params = Some(params);
        }
    }

    /// The server answers.
    pub fn answers(&mut self, turn: Turn) {
        self.turn = Some(turn);
    }

    /// Takes note of a chunk, or of a whole answer, before anything in it is changed. `streamed`: it is the first token that comes, not
    /// the last.
    pub fn take(&mut self, answer: &Value, streamed: bool) {
        self.gathering.take(answer);
        if streamed && !self.begun && self.gathering.pieces > 0 {
            self.begun = true;
            if let Some(record) = &mut self.record {
                record.first_token();
            }
            if let Some(follower) = &mut self.follower {
                follower.first_token();
            }
            if let Some(turn) = &self.turn {
                turn.first_token();
            }
        }
    }

    /// Whether every choice has ended.
    pub fn is_whole(&self) -> bool {
        self.gathering.is_whole()
    }

    /// What an error in the middle of the answer says.
    pub fn reported(&self, error: &Value) -> Failure {
        self.turn.as_ref().map_or_else(|| Failure::Broken("it reported an error".into()), |turn| turn.reported(error))
    }

    /// The answer broke off.
    pub fn failed(&mut self, failure: &Failure) {
        if let Some(turn) = &mut self.turn {
            turn.failed(failure);
        }
        self.settle(if *failure == Failure::Deadline { Status::Cancelled } else { Status::Failed });
    }

    /// The answer is over.
    pub fn settle(&mut self, status: Status) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        let guess = || RemoteUsage { prompt: self.estimate, cached: 0, output: self.gathering.pieces };
        let usage = self.gathering.usage.unwrap_or_else(guess);
        let cost = self.meter.answered(usage.prompt, usage.cached, usage.output);
        if let Some(turn) = &self.turn {
            turn.spent(usage.prompt, usage.cached, usage.output, cost.0);
        }
        if let Some(mut follower) = self.follower.take() {
            let choices = self.gathering.choices.iter().map(|one| (one.choice.text.as_str(), one.finish.as_deref()));
            follower.answered((usage.prompt, usage.cached, usage.output), self.gathering.model.clone(), choices);
            if status == Status::Failed {
                follower.failed();
            }
        }
        if let Some(record) = self.record.take() {
            let upstream = self.turn.as_ref().map(|turn| turn.server().spec().name.as_str());
            let (gathering, instead_of) = (&self.gathering, self.instead_of.as_deref());
            record.finish(status, &RemoteAnswer { gathering, usage, cost, upstream, instead_of });
        }
        self.turn = None;
    }

    /// There is no answer and nothing to record: nobody was asked, or nobody answered.
    pub fn discard(mut self) {
        self.settled = true;
        if let Some(mut follower) = self.follower.take() {
            follower.failed();
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.settle(Status::Cancelled);
    }
}
