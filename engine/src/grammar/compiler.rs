//! Constraints to grammars, within bounds of time and memory.

use super::crew::Crew;
use super::{Constraint, Grammar, GrammarError, gbnf, schema, text, vocabulary};
use crate::tokenizer::Tokenizer;
use flume::RecvTimeoutError;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{ParserFactory, TokenParser};
use serde_json::Value;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Largest text of a constraint, bytes.
pub const MAX_CONSTRAINT_BYTES: usize = 256 * 1024;
/// A constraint that takes longer to compile is refused.
const LONGEST_COMPILATION: Duration = Duration::from_secs(10);
/// Compilations under way, those included that took too long and were given up: more are refused.
pub(super) const MOST_COMPILATIONS: usize = 4;
/// llguidance descends by recursion into what our checks let pass.
const STACK: usize = 64 << 20;
/// Attempts at finding which part of a schema is at fault.
const MOST_ATTEMPTS: usize = 64;

/// Makes grammars for one model's vocabulary.
pub(crate) struct Compiler(pub(super) Arc<Inner>);

pub(super) struct Inner {
    longest: Duration,
    tokenizer: Tokenizer,
    end_of_turn: Vec<u32>,
    /// Logits of the model.
    vocabulary: usize,
    /// Made for the first constraint: most servers never see one.
    tools: OnceLock<Result<Tools, String>>,
    pub(super) under_way: AtomicUsize,
}

struct Tools {
    factory: ParserFactory,
    crew: Arc<Crew>,
    ends: Arc<[u32]>,
}

impl Compiler {
    pub(crate) fn new(tokenizer: Tokenizer, end_of_turn: Vec<u32>, vocabulary: usize) -> Self {
        Self::waiting(LONGEST_COMPILATION, tokenizer, end_of_turn, vocabulary)
    }

    /// The same with another bound on the time of each compilation.
    pub(crate) fn waiting(longest: Duration, tokenizer: Tokenizer, end_of_turn: Vec<u32>, vocabulary: usize) -> Self {
        let (tools, under_way) = (OnceLock::new(), AtomicUsize::new(0));
        Self(Arc::new(Inner { longest, tokenizer, end_of_turn, vocabulary, tools, under_way }))
    }

    /// Blocks until the grammar is there, for a bounded time.
    pub(crate) fn compile(&self, constraint: &Constraint) -> Result<Arc<Grammar>, GrammarError> {
        let size = constraint.size();
        if size > MAX_CONSTRAINT_BYTES {
            return Err(GrammarError::whole(format!("must be at most {MAX_CONSTRAINT_BYTES} bytes, not {size}")));
        }
        let more = |count| (count < MOST_COMPILATIONS).then_some(count + 1);
        if self.0.under_way.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_err() {
            return Err(GrammarError::busy("the server is busy with other constraints; send the request again later"));
        }
        let (answer, answered) = flume::bounded(1);
        let (inner, constraint) = (Arc::clone(&self.0), constraint.clone());
        let run = move || {
            let under_way = UnderWay(inner);
            let compiled = under_way.0.compile(&constraint);
            // Before the answer: whoever waits for it may compile the next thing at once.
            drop(under_way);
            // Nobody listens any more when it took too long.
            answer.send(compiled).ok();
        };
        if let Err(error) = std::thread::Builder::new().name("tidemill-grammar".into()).stack_size(STACK).spawn(run) {
            self.0.under_way.fetch_sub(1, Ordering::AcqRel);
            return Err(GrammarError::busy(format!("the server has no thread to compile it: {error}")));
        }
        answered.recv_timeout(self.0.longest).unwrap_or_else(|error| {
            Err(GrammarError::whole(match error {
                RecvTimeoutError::Timeout => "takes too long to compile; make it simpler",
                RecvTimeoutError::Disconnected => "cannot be compiled",
            }))
        })
    }
}

/// Counts a compilation until its thread ends, whatever ends it.
struct UnderWay(Arc<Inner>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Inner {
    fn compile(&self, constraint: &Constraint) -> Result<Arc<Grammar>, GrammarError> {
        let tools = self.tools.get_or_init(|| self.tools()).as_ref().map_err(|error| GrammarError::whole(error.as_str()))?;
        let parser = match constraint {
            Constraint::JsonSchema { schema, strict } => tools.schema(schema, *strict)?,
            Constraint::JsonObject => tools.schema(&serde_json::json!({"type": "object"}), false)?,
            Constraint::Regex(regex) => tools.parser(TopLevelGrammar::from_lark(text::regular(regex)?))?,
            Constraint::Choice(choices) => tools.parser(TopLevelGrammar::from_lark(text::one_of(choices)?))?,
            Constraint::Lark(grammar) => {
                let lark = if gbnf::is_gbnf(grammar) { gbnf::to_lark(grammar)? } else { grammar.clone() };
                text::check_nesting(&lark)?;
                tools.parser(TopLevelGrammar::from_lark(lark))?
            }
        };
        Grammar::new(constraint.clone(), parser, Arc::clone(&tools.crew), Arc::clone(&tools.ends)).map(Arc::new)
    }

    fn tools(&self) -> Result<Tools, String> {
        let env = vocabulary::token_env(&self.tokenizer, &self.end_of_turn, self.vocabulary);
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| format!("the vocabulary does not fit: {error}"))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        let crew = Crew::start().map_err(|error| format!("the server has no thread for grammars: {error}"))?;
        Ok(Tools { factory, crew: Arc::new(crew), ends: vocabulary::end_tokens(&self.end_of_turn, self.vocabulary).into() })
    }
}

/// What a grammar may cost. A token's mask takes at most about 10 ms of computing, a grammar's automaton at most about 50 MB.
fn limits() -> ParserLimits {
    ParserLimits {
        step_lexer_fuel: 100_000,
        max_lexer_states: super::MOST_LEXER_STATES,
        max_grammar_size: 200_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

impl Tools {
    fn parser(&self, grammar: TopLevelGrammar) -> Result<TokenParser, GrammarError> {
        self.factory.create_parser(grammar).map_err(|error| GrammarError::whole(plain(&error.to_string())))
    }

    fn schema(&self, source: &Value, strict: bool) -> Result<TokenParser, GrammarError> {
        let checked = schema::check(source, strict)?;
        let compile = |schema: Value| self.parser(TopLevelGrammar::from_json_schema(schema));
        compile(checked.to_value()).map_err(|error| {
            let mut attempts = MOST_ATTEMPTS;
            let fails = |schema: Value| {
                attempts = attempts.saturating_sub(1);
                (attempts > 0).then(|| compile(schema).err()).flatten()
            };
            schema::blame(&checked, fails).unwrap_or(error)
        })
    }
}

/// llguidance's message without the state that it adds.
fn plain(message: &str) -> String {
    let end = message.find("\n<").unwrap_or(message.len());
    let text: String = message[..end].chars().take(500).collect();
    text.trim().to_owned()
}
