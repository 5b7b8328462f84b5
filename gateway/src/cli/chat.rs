//! `tidemill chat`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use crate::chat::client::{ChatClient, ClientError};
use crate::chat::terminal;

/// Lines in, answers out as they come. With a pipe on standard input, the whole input is one message.
#[derive(Debug, clap::Args)]
pub struct ChatArgs {
    /// Where the API is
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080/v1", env = "OPENAI_BASE_URL")]
    base_url: String,
    /// Model [default: the first that the server lists]
    #[arg(long)]
    model: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 is greedy, 2 is wild [default: the server's]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Most tokens of an answer [default: the server's]
    #[arg(long, value_name = "N")]
    max_tokens: Option<u64>,
}

/// Runs the command. The key comes from `OPENAI_API_KEY`, so that it shows in no process list.
pub fn run(args: &ChatArgs) -> Result<(), ClientError> {
    let mut client = ChatClient::new(&args.base_url, std::env::var("OPENAI_API_KEY").ok());
    client.model = match &args.model {
        Some(model) => model.clone(),
        None => client.models()?.into_iter().next().ok_or_else(|| ClientError::Broken("the server lists no model".to_owned()))?,
    };
    if let Some(temperature) = args.temperature {
        client.extra.insert("temperature".into(), json!(temperature));
    }
    if let Some(most) = args.max_tokens {
        client.extra.insert("max_tokens".into(), json!(most));
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    watch_for_interrupts(Arc::clone(&interrupted)).map_err(|error| ClientError::Broken(error.to_string()))?;
    terminal::run(&client, args.system.clone(), &interrupted)
}

/// Ctrl-C while an answer comes sets the flag; at the prompt the line editor sees the key itself.
fn watch_for_interrupts(flag: Arc<AtomicBool>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("tidemill-interrupt".into()).spawn(move || {
        runtime.block_on(async {
            while tokio::signal::ctrl_c().await.is_ok() {
                // The flag is seen when the next line arrives. Told again, there was none: leave.
                if flag.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
            }
        });
    })?;
    Ok(())
}
