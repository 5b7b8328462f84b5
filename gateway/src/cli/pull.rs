//! `tidemill pull`

use std::io::Write;
use std::path::PathBuf;

use tidemill_store::DataDir;

use crate::pull::{self, PullError, PullRequest, catalog};

/// Fetches a model, goes on where an earlier pull was cut off, and checks every byte.
#[derive(Debug, clap::Args)]
pub struct PullArgs {
    /// A short name (see --list) or `organisation/name` on the Hugging Face hub
    #[arg(default_value = catalog::DEFAULT_MODEL)]
    name: String,
    /// Directory for models and records
    #[arg(long, value_name = "DIR", default_value = "./data", env = "TIDEMILL_DATA")]
    data: PathBuf,
    /// Branch, tag or commit of a hub repository
    #[arg(long, default_value = "main")]
    revision: String,
    /// The GGUF file wanted, where a repository has several
    #[arg(long, value_name = "NAME.gguf")]
    file: Option<String>,
    /// List the short names and the models that are here
    #[arg(long)]
    list: bool,
}

/// Runs the command.
pub fn run(args: &PullArgs) -> Result<(), PullError> {
    let data = DataDir::new(&args.data);
    let mut out = std::io::stdout();
    // A closed standard output is no reason to stop a download.
    let mut say = |text: String| drop(writeln!(out, "{text}"));
    if args.list {
        for entry in catalog::entries() {
            say(format!("{:28} {} ({})", entry.name, entry.requirement, entry.license));
        }
        for (folder, record) in data.list_models()? {
            say(format!("{:28} {} in {}", record.name, record.source, folder.display()));
        }
        return Ok(());
    }
    let request = PullRequest { name: args.name.clone(), revision: args.revision.clone(), file: args.file.clone() };
    let path = pull::pull(&data, &request, &pull::terminal_progress)?;
    say(format!("{} is at {}", args.name, path.display()));
    Ok(())
}
