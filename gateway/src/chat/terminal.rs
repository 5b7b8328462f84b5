//! Reads lines, prints answers as they come.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustyline::error::ReadlineError;

use super::client::{Answer, ChatClient, ClientError};
use super::conversation::{Conversation, Line, Role};

const HELP: &str = "\
  /clear         forget the conversation
  /retry         ask the last question again
  /system TEXT   set the system message (empty: none)
  /save FILE     write the conversation as JSON
  /quit          leave (Ctrl-D too)
  Ctrl-C stops an answer; a line that ends with \\ goes on.";

/// Colours when a person looks, none when a file does.
struct Paint {
    on: bool,
}

impl Paint {
    fn dim(&self, text: &str) -> String {
        if self.on { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn prompt(&self) -> String {
        if self.on { "\x1b[1;36m› \x1b[0m".to_owned() } else { "› ".to_owned() }
    }
}

/// Runs until the person leaves. Without a terminal on standard input, everything there is one message and its answer is printed.
pub fn run(client: &ChatClient, system: Option<String>, interrupted: &Arc<AtomicBool>) -> Result<(), ClientError> {
    let mut chat = Conversation::new(system);
    let paint = Paint { on: io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() };
    if !io::stdin().is_terminal() {
        let mut message = String::new();
        io::stdin().read_to_string(&mut message).map_err(|error| ClientError::Broken(error.to_string()))?;
        chat.push(Role::User, message.trim());
        answer(client, &mut chat, interrupted)?;
        return Ok(());
    }
    say(&format!("{} {}", client.model, paint.dim("· /help for commands, Ctrl-D to leave")));
    let mut editor = rustyline::DefaultEditor::new().map_err(|error| ClientError::Broken(error.to_string()))?;
    loop {
        let typed = match read(&mut editor, &paint) {
            Ok(typed) => typed,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(ClientError::Broken(error.to_string())),
        };
        match Line::parse(&typed) {
            Line::Empty => {}
            Line::Quit => return Ok(()),
            Line::Help => say(HELP),
            Line::Clear => {
                chat.clear();
                say(&paint.dim("forgotten"));
            }
            Line::System(text) => chat.set_system(&text),
            Line::Save(path) => match std::fs::write(&path, format!("{:#}\n", chat.messages())) {
                Ok(()) => say(&paint.dim(&format!("saved to {path}"))),
                Err(error) => say(&format!("cannot write {path}: {error}")),
            },
            Line::Unknown(name) => say(&format!("there is no /{name}; /help lists what there is")),
            Line::Retry if !chat.retry() => say("there is nothing to ask again"),
            Line::Retry => report(answer(client, &mut chat, interrupted), &paint),
            Line::Message(text) => {
                chat.push(Role::User, text);
                report(answer(client, &mut chat, interrupted), &paint);
            }
        }
    }
}

fn read(editor: &mut rustyline::DefaultEditor, paint: &Paint) -> Result<String, ReadlineError> {
    let mut typed = editor.readline(&paint.prompt())?;
    while typed.ends_with('\\') {
        typed.pop();
        typed.push('\n');
        typed.push_str(&editor.readline("  ")?);
    }
    // History is a comfort: a line that cannot be remembered was still typed.
    let _ = editor.add_history_entry(&typed);
    Ok(typed)
}

/// Asks with the conversation as it stands; a failed question is taken back, so that the next one starts clean.
fn answer(client: &ChatClient, chat: &mut Conversation, interrupted: &AtomicBool) -> Result<Answer, ClientError> {
    interrupted.store(false, Ordering::Relaxed);
    let mut out = io::stdout().lock();
    let result = client.stream(chat.messages(), interrupted, |piece| {
        // A closed pipe shows at the next read of the stream; there is nobody to tell.
        let _ = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
    });
    let _ = writeln!(out);
    drop(out);
    match result {
        Ok(answer) => {
            chat.push(Role::Assistant, answer.text.clone());
            Ok(answer)
        }
        Err(error) => {
            chat.drop_question();
            Err(error)
        }
    }
}

fn report(result: Result<Answer, ClientError>, paint: &Paint) {
    match result {
        Ok(answer) => {
            let after_first = (answer.total_s - answer.first_s).max(1e-9);
            let rate = answer.tokens.saturating_sub(1) as f64 / after_first;
            let note = match answer.finish.as_str() {
                "stop" => String::new(),
                other => format!(" · {other}"),
            };
            say(&paint.dim(&format!(
                "{} tokens · {rate:.0} tok/s · first after {:.0} ms{note}",
                answer.tokens,
                answer.first_s * 1e3
            )));
        }
        Err(error) => say(&error.to_string()),
    }
}

fn say(text: &str) {
    // When standard output is gone there is nobody to tell.
    let _ = writeln!(io::stdout(), "{text}");
}
