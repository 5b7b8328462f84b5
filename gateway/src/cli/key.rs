//! `tidemill key`

use std::io::Write;

use clap::Subcommand;
use serde_json::json;
use tidemill_store::{ApiKey, Scope};

use crate::cli::store_args::{StoreArgs, StoreCommandError};
use crate::cli::when;

/// Keys that clients send as `Authorization: Bearer KEY`. The first key closes a running server to callers without one.
#[derive(Debug, clap::Args)]
pub struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a key and print it, once.
    Create {
        /// Whose it is; an annotator's name is the rater in the records
        #[arg(long)]
        name: String,
        /// What it may do: chat, feedback, label, train, admin
        #[arg(long = "scope", value_name = "SCOPE,SCOPE", value_delimiter = ',', required = true)]
        scopes: Vec<String>,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// List the keys, without their secrets.
    List {
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Take a key back; a running server refuses it within seconds.
    Revoke {
        /// Its name or id
        name: String,
        #[command(flatten)]
        store: StoreArgs,
    },
}

/// Runs the command.
pub fn run(args: &KeyArgs) -> Result<(), StoreCommandError> {
    match &args.command {
        KeyCommand::Create { name, scopes, store } => {
            let name = name.trim();
            if name.is_empty() || name.chars().count() > 100 || name.chars().any(char::is_control) {
                return Err(StoreCommandError::Usage("--name must be 1 to 100 visible characters".to_owned()));
            }
            let scopes = scopes.iter().map(|word| word.trim().parse()).collect::<Result<Vec<Scope>, _>>()?;
            let (key, secret) = store.with(|store| async move {
                let made = store.create_key(name, &scopes).await?;
                store.audit("command line", "key.create", name, json!({"scopes": made.0.scopes})).await?;
                Ok(made)
            })?;
            // The secret alone goes to standard output, so that a script can take it.
            let _ = writeln!(std::io::stderr(), "{} may {}. This is the key; it is shown only now:", key.name, words(&key));
            say(&secret);
        }
        KeyCommand::List { store } => {
            let keys = store.with(|store| async move { Ok(store.list_keys().await?) })?;
            say(&format!("{:36}  {:20}  {:9}  {:24}  {:16}  revoked", "id", "name", "begins", "scopes", "created"));
            for key in keys {
                let revoked = key.revoked.map_or_else(String::new, when);
                let (scopes, created) = (words(&key), when(key.created));
                say(&format!("{}  {:20}  {:9}  {:24}  {:16}  {}", key.id, key.name, key.prefix, scopes, created, revoked));
            }
        }
        KeyCommand::Revoke { name, store } => {
            let revoked = store.with(|store| async move {
                let revoked = store.revoke_key(name).await?;
                if let Some(key) = &revoked {
                    store.audit("command line", "key.revoke", &key.name, json!({"id": key.id})).await?;
                }
                Ok(revoked)
            })?;
            match revoked {
                Some(key) => say(&format!("{} ({}) is revoked; a running server refuses it within 5 seconds", key.name, key.id)),
                None => {
                    let message = format!("no key in use is called `{name}`; `tidemill key list` shows them");
                    return Err(StoreCommandError::Usage(message));
                }
            }
        }
    }
    Ok(())
}

fn words(key: &ApiKey) -> String {
    let scopes: Vec<&str> = key.scopes.iter().map(|scope| scope.as_str()).collect();
    scopes.join(",")
}

fn say(text: &str) {
    // A closed standard output is no reason to fail: the work is done.
    let _ = writeln!(std::io::stdout(), "{text}");
}
