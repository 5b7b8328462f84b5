//! `tidemill data`

use std::io::{BufRead, IsTerminal, Write};

use clap::Subcommand;
use tidemill_store::Erasure;

use crate::cli::COMMAND_LINE;
use crate::cli::store_args::{StoreArgs, StoreCommandError};

/// What is kept about people.
#[derive(Debug, clap::Args)]
pub struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    /// Remove everything a person asked, was answered and judged, and say which datasets and adapters were made from it.
    Erase {
        /// The person, as requests name them in `user` or `safety_identifier`, and feedback in `author`
        #[arg(long, value_name = "KEY")]
        user: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        store: StoreArgs,
    },
}

/// Runs the command.
pub fn run(args: &DataArgs) -> Result<(), StoreCommandError> {
    let DataCommand::Erase { user, yes, store } = &args.command;
    if user.is_empty() {
        return Err(StoreCommandError::Usage("--user must name someone".to_owned()));
    }
    if !yes && !agreed(user)? {
        return Err(StoreCommandError::Usage("nothing was erased".to_owned()));
    }
    let erasure = store.with(|store| async move { Ok(store.erase_user(user, COMMAND_LINE).await?) })?;
    // A closed standard output is no reason to fail: the work is done.
    let _ = std::io::stdout().write_all(report(&erasure).as_bytes());
    Ok(())
}

fn agreed(user: &str) -> Result<bool, StoreCommandError> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(StoreCommandError::Usage("this cannot be undone and nobody is there to ask; say it with --yes".to_owned()));
    }
    let _ = write!(std::io::stderr(), "Erase all records of `{user}`? This cannot be undone. Type yes: ");
    let mut line = String::new();
    stdin.lock().read_line(&mut line)?;
    Ok(line.trim().eq_ignore_ascii_case("yes"))
}

fn report(erasure: &Erasure) -> String {
    let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    format!(
        "erased: {} answers, {} stored chats and responses, {} judgements, {} labeling tasks\nsnapshots that hold some of it, now marked: {}\nadapters trained on those, now marked: {}\n",
        erasure.inferences,
        erasure.stored,
        erasure.feedback,
        erasure.labels,
        list(&erasure.snapshots),
        list(&erasure.adapters)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_names_what_is_marked() {
        let erasure = Erasure {
            inferences: 2,
            stored: 3,
            feedback: 1,
            labels: 0,
            snapshots: vec!["a@1".into(), "b@2".into()],
            adapters: vec![],
        };
        let text = report(&erasure);
        assert!(text.contains("2 answers, 3 stored chats and responses, 1 judgements"), "{text}");
        assert!(text.contains("now marked: a@1, b@2\n") && text.ends_with("now marked: none\n"), "{text}");
    }
}
