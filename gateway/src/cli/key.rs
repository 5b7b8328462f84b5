//! `tidemill key`

use std::io::Write;

use clap::Subcommand;
use tidemill_store::{ApiKey, KeyTerms, Limits, MAX_WEIGHT, Scope, Tier};

use crate::cli::store_args::{StoreArgs, StoreCommandError};
use crate::cli::{COMMAND_LINE, when};
use crate::clock::now;
use crate::config::value::choice;
use crate::keys::{KeySpec, check_name, parse_moment, set_limit, span};

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
        /// What it may do: chat, feedback, label, train, look, admin
        #[arg(long = "scope", value_name = "SCOPE,SCOPE", value_delimiter = ',', required = true)]
        scopes: Vec<String>,
        #[command(flatten)]
        terms: TermArgs,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Change what a key may use; what is not named stays. A running server follows within seconds.
    Set {
        /// Its name or id
        name: String,
        #[command(flatten)]
        terms: TermArgs,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Give a key a new secret and print it, once; the old one works for a while.
    Rotate {
        /// Its name or id
        name: String,
        /// How long the old secret works, such as 24h or 7d; 0 ends it now
        #[arg(long, value_name = "TIME", default_value = "24h")]
        overlap: String,
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

/// What a key is granted.
#[derive(Debug, clap::Args)]
struct TermArgs {
    /// Models that it may use, or `all`
    #[arg(long = "model", value_name = "MODEL,MODEL", value_delimiter = ',')]
    models: Option<Vec<String>>,
    /// When it ends, such as 90d, or `never`
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Limits over all models, such as requests_per_minute=60,concurrent=4, or `none`; the others are input_tokens_per_minute,
    /// output_tokens_per_minute, cost_per_day
    #[arg(long = "limit", value_name = "LIMIT=N,…", value_delimiter = ',')]
    limits: Option<Vec<String>>,
    /// Limits for one model beside these, such as MODEL:requests_per_minute=6, or `none`
    #[arg(long = "model-limit", value_name = "MODEL:LIMIT=N,…", value_delimiter = ',')]
    model_limits: Option<Vec<String>>,
    /// The most urgent tier that it may have: priority, default, flex
    #[arg(long, value_name = "TIER")]
    tier: Option<String>,
    /// Its share of a full engine beside other keys, 1 to 100
    #[arg(long, value_name = "N")]
    weight: Option<u32>,
}

impl TermArgs {
    fn spec(&self) -> Result<KeySpec, String> {
        let in_flag = |flag: &'static str| move |why: String| format!("{flag}: {why}");
        let tiers = Tier::ALL.map(|tier| (tier.as_str(), tier));
        if self.weight.is_some_and(|weight| weight == 0 || weight > MAX_WEIGHT) {
            return Err(format!("--weight: expected a whole number from 1 to {MAX_WEIGHT}"));
        }
        Ok(KeySpec {
            scopes: None,
            expires: self.expires.as_deref().map(|text| parse_moment(text, now())).transpose().map_err(in_flag("--expires"))?,
            models: self.models.as_ref().map(|models| (models.as_slice() != ["all"]).then(|| models.clone())),
            limits: self.limits.as_deref().map(limits).transpose().map_err(in_flag("--limit"))?,
            model_limits: self.model_limits.as_deref().map(by_model).transpose().map_err(in_flag("--model-limit"))?,
            tier: self.tier.as_deref().map(|text| choice(text, &tiers)).transpose().map_err(in_flag("--tier"))?,
            weight: self.weight,
        })
    }
}

fn limits(pairs: &[String]) -> Result<Limits, String> {
    let mut limits = Limits::default();
    for pair in pairs.iter().filter(|pair| *pair != "none") {
        put(&mut limits, pair)?;
    }
    Ok(limits)
}

fn by_model(pairs: &[String]) -> Result<std::collections::BTreeMap<String, Limits>, String> {
    let mut models = std::collections::BTreeMap::<String, Limits>::new();
    for pair in pairs.iter().filter(|pair| *pair != "none") {
        // A model's name may hold colons, a limit's does not.
        let (model, limit) = pair.rsplit_once(':').ok_or_else(|| format!("expected MODEL:LIMIT=N, not `{pair}`"))?;
        put(models.entry(model.to_owned()).or_default(), limit)?;
    }
    Ok(models)
}

fn put(limits: &mut Limits, pair: &str) -> Result<(), String> {
    let (name, number) = pair.split_once('=').ok_or_else(|| format!("expected LIMIT=N, not `{pair}`"))?;
    set_limit(limits, name.trim(), number.trim()).map_err(|why| format!("{why}, not `{pair}`"))
}

/// Runs the command.
pub fn run(args: &KeyArgs) -> Result<(), StoreCommandError> {
    match &args.command {
        KeyCommand::Create { name, scopes, terms, store } => {
            let name = check_name(name).ok_or_else(|| {
                StoreCommandError::Usage("--name must be 1 to 100 visible characters that are no id".to_owned())
            })?;
            let scopes = scopes.iter().map(|word| word.trim().parse()).collect::<Result<Vec<Scope>, _>>()?;
            let spec = terms.spec().map_err(StoreCommandError::Usage)?;
            let mut terms = KeyTerms::default();
            spec.change_terms(&mut terms);
            let (key, secret) = store.with(|store| async move {
                Ok(store.create_key_with(name, &scopes, spec.expires.flatten(), terms, COMMAND_LINE).await?)
            })?;
            tell(&format!("{} may {}. This is the key; it is shown only now:", key.name, words(&key)));
            say(&secret);
        }
        KeyCommand::Set { name, terms, store } => {
            let spec = terms.spec().map_err(StoreCommandError::Usage)?;
            if spec.is_empty() {
                return Err(StoreCommandError::Usage("name something to change; `tidemill key set --help` lists it".to_owned()));
            }
            let changed =
                store.with(|store| async move { Ok(store.change_key(name, |key| spec.change(key), COMMAND_LINE).await?) })?;
            let key = changed.ok_or_else(|| unknown(name))?;
            say(&format!("{} ({}) is changed; a running server follows within 5 seconds", key.name, key.id));
        }
        KeyCommand::Rotate { name, overlap, store } => {
            let overlap = span(overlap).map_err(|why| StoreCommandError::Usage(format!("--overlap: {why}")))?;
            let rotated = store.with(|store| async move { Ok(store.rotate_key(name, overlap, COMMAND_LINE).await?) })?;
            let (key, secret) = rotated.ok_or_else(|| unknown(name))?;
            tell(&format!(
                "The old secret of {} works for {} s. This is the new one; it is shown only now:",
                key.name,
                overlap.as_secs()
            ));
            say(&secret);
        }
        KeyCommand::List { store } => {
            let keys = store.with(|store| async move { Ok(store.list_keys().await?) })?;
            say(&format!(
                "{:36}  {:20}  {:9}  {:24}  {:8}  {:16}  {:16}  revoked",
                "id", "name", "begins", "scopes", "tier", "created", "expires"
            ));
            for key in keys {
                let time = |time: Option<i64>| time.map_or_else(String::new, when);
                let (scopes, tier, created) = (words(&key), key.terms.tier.as_str(), when(key.created));
                let (expires, revoked) = (time(key.expires), time(key.revoked));
                say(&format!(
                    "{}  {:20}  {:9}  {scopes:24}  {tier:8}  {created:16}  {expires:16}  {revoked}",
                    key.id, key.name, key.prefix
                ));
            }
        }
        KeyCommand::Revoke { name, store } => {
            let revoked = store.with(|store| async move { Ok(store.revoke_key(name, COMMAND_LINE).await?) })?;
            let key = revoked.ok_or_else(|| unknown(name))?;
            say(&format!("{} ({}) is revoked; a running server refuses it within 5 seconds", key.name, key.id));
        }
    }
    Ok(())
}

fn unknown(name: &str) -> StoreCommandError {
    StoreCommandError::Usage(format!("no key in use is called `{name}`; `tidemill key list` shows them"))
}

fn words(key: &ApiKey) -> String {
    let scopes: Vec<&str> = key.scopes.iter().map(|scope| scope.as_str()).collect();
    scopes.join(",")
}

/// To the person: a secret alone goes to standard output, so that a script can take it.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn say(text: &str) {
    // A closed standard output is no reason to fail: the work is done.
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_from_pairs_also_for_models_with_colons() {
        let pairs = ["a:b:concurrent=2".to_owned(), "a:b:requests_per_minute=5".to_owned()];
        let limits = Limits { concurrent: Some(2), requests_per_minute: Some(5), ..Limits::default() };
        assert_eq!(by_model(&pairs).unwrap()["a:b"], limits);
        assert_eq!(super::limits(&["none".to_owned()]).unwrap(), Limits::default());
        for bad in ["concurrent", "concurrent=x", "speed=1"] {
            assert!(super::limits(&[bad.to_owned()]).unwrap_err().contains(bad), "{bad}");
        }
    }
}
