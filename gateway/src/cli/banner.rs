//! What the server says on standard output when it starts.

use crate::upstream::LocalModel;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

/// A model was loaded: what it is and where the memory went.
pub fn loaded(model: &LocalModel, path: &Path, took: Duration) {
    say(&model_lines(model, path, took));
}

fn model_lines(model: &LocalModel, path: &Path, took: Duration) -> String {
    let memory = model.engine().memory();
    let limits = model.engine().limits();
    let tokens = memory.kv_blocks.saturating_mul(memory.block_size);
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{}  ({:.1} s)", model.name(), took.as_secs_f64());
    let _ = writeln!(text, "  model        {}", model.engine().description());
    let _ = writeln!(text, "  from         {}", path.display());
    let _ = writeln!(text, "  weights      {}", bytes(memory.weights));
    let _ = writeln!(
        text,
        "  keys/values  {}: {} blocks of {} = {} tokens; up to {} per sequence, {} sequences at once",
        bytes(memory.kv),
        memory.kv_blocks,
        memory.block_size,
        tokens,
        limits.max_model_len,
        limits.max_seqs
    );
    let _ = writeln!(text, "  activations  {}: {} tokens per step", bytes(memory.activations), limits.max_batch_tokens);
    if memory.swap > 0 {
        let _ = writeln!(text, "  swap         {} of the machine's memory for preempted answers", bytes(memory.swap));
    }
    let _ = writeln!(text, "  computes on  {}", memory.backend);
    text
}

/// Everything is loaded: a command to try.
pub fn ready(model: &str, address: SocketAddr, keys: bool, tls: bool) {
    let base = format!("{}://{}", if tls { "https" } else { "http" }, reachable(address));
    let question = serde_json::json!([{"role": "user", "content": "What is a tide mill?"}]);
    // Bounded: a small model left to itself may talk until its context is full.
    let body = serde_json::json!({"model": model, "messages": question, "max_tokens": 128});
    // Single quotes inside single quotes, as a shell reads them.
    let body = body.to_string().replace('\'', r"'\''");
    let (note, header) = if keys {
        ("OpenAI's API; keys from `tidemill key create`", " -H \"Authorization: Bearer $TIDEMILL_KEY\"")
    } else {
        ("OpenAI's API; no key yet, so only this machine can connect", "")
    };
    say(&format!(
        "\nReady at {base}/v1  ({note})\n\n  curl {base}/v1/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'\n\n"
    ));
}

/// An address that a client on this machine can connect to.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn say(text: &str) {
    // A closed standard output is no reason not to serve.
    let _ = std::io::stdout().write_all(text.as_bytes());
    let _ = std::io::stdout().flush();
}

/// Such as `1.5 GiB`.
fn bytes(count: usize) -> String {
    let mut value = count as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_for_people() {
        for (count, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn the_curl_line_connects_to_this_machine() {
        assert_eq!(reachable("0.0.0.0:8080".parse().unwrap()).to_string(), "127.0.0.1:8080");
        assert_eq!(reachable("[::]:1".parse().unwrap()).to_string(), "[::1]:1");
        assert_eq!(reachable("10.1.2.3:9".parse().unwrap()).to_string(), "10.1.2.3:9");
    }
}
