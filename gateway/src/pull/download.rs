//! One file over HTTP, resumed from what is there.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use indicatif::ProgressBar;
use ureq::tls::{RootCerts, TlsConfig};

use super::error::PullError;

const ATTEMPTS: u32 = 5;

/// An HTTP client that trusts what the machine trusts (a company's own certificate authority too).
fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        // For one try: a connection that died without a word is given up, and the next try goes on from there.
        .timeout_recv_body(Some(Duration::from_secs(900)))
        .http_status_as_error(false)
        .build()
        .into()
}

/// Fetches `url` into `path`, appending to what an earlier try left there. Tries again with a growing pause when the transfer breaks.
pub fn fetch(url: &str, path: &Path, what: &str, progress: &dyn Fn(&str, u64) -> ProgressBar) -> Result<(), PullError> {
    let agent = agent();
    let mut last = String::new();
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(Duration::from_millis(300 << attempt));
        }
        match transfer(&agent, url, path, what, progress) {
            Ok(()) => return Ok(()),
            Err(Broken::Retry(reason)) => last = reason,
            Err(Broken::Final(reason)) => return Err(PullError::Transfer { what: what.to_owned(), reason }),
        }
    }
    Err(PullError::Transfer { what: what.to_owned(), reason: format!("{last} ({ATTEMPTS} tries)") })
}

enum Broken {
    Retry(String),
    Final(String),
}

fn transfer(
    agent: &ureq::Agent,
    url: &str,
    path: &Path,
    what: &str,
    progress: &dyn Fn(&str, u64) -> ProgressBar,
) -> Result<(), Broken> {
    let local = |error: std::io::Error| Broken::Final(format!("{}: {error}", path.display()));
    let have = std::fs::metadata(path).map(|found| found.len()).unwrap_or(0);
    let mut request = agent.get(url);
    if have > 0 {
        request = request.header("Range", format!("bytes={have}-"));
    }
    let mut response = request.call().map_err(|error| Broken::Retry(error.to_string()))?;
    let length = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (file, start, total) = match response.status().as_u16() {
        200 => {
            let total = length("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
            (File::create(path).map_err(local)?, 0, total)
        }
        206 => {
            let range = length("content-range").unwrap_or_default();
            let total = range.rsplit('/').next().and_then(|text| text.parse().ok()).unwrap_or(0);
            if !range.starts_with(&format!("bytes {have}-")) {
                return Err(Broken::Final(format!("the server answered with the range '{range}', wanted from {have}")));
            }
            (OpenOptions::new().append(true).open(path).map_err(local)?, have, total)
        }
        // Everything is there already: the checksum decides.
        416 => return Ok(()),
        status @ (408 | 429 | 500..) => return Err(Broken::Retry(format!("the server answered {status}"))),
        status => return Err(Broken::Final(format!("the server answered {status}"))),
    };
    let bar = progress(what, total);
    bar.set_position(start);
    let received = copy(&mut response.body_mut().as_reader(), file, &bar);
    bar.finish_and_clear();
    let end = start + received.map_err(|error| Broken::Retry(error.to_string()))?;
    if total > 0 && end < total {
        return Err(Broken::Retry(format!("the connection closed after {end} of {total} bytes")));
    }
    Ok(())
}

fn copy(from: &mut dyn Read, mut to: File, bar: &ProgressBar) -> std::io::Result<u64> {
    let mut buffer = vec![0; 256 << 10];
    let mut received = 0;
    loop {
        match from.read(&mut buffer)? {
            0 => {
                to.sync_all()?;
                return Ok(received);
            }
            read => {
                to.write_all(&buffer[..read])?;
                received += read as u64;
                bar.inc(read as u64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc;

    use super::*;

    /// Serves `contents` with ranges; `cut` bytes into its first answer it hangs up.
    fn serve(contents: &'static [u8], cut: usize) -> (String, mpsc::Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/file", listener.local_addr().unwrap());
        let (sender, ranges) = mpsc::channel();
        std::thread::spawn(move || {
            let mut first = true;
            for stream in listener.incoming() {
                let stream: TcpStream = stream.unwrap();
                let mut range = String::new();
                for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                    let line = line.unwrap();
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                        range = value.to_owned();
                    }
                    if line.is_empty() {
                        break;
                    }
                }
                let start: usize = range.trim_end_matches('-').parse().unwrap_or(0);
                let _ = sender.send(range);
                let rest = &contents[start..];
                let head = if start == 0 {
                    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", rest.len())
                } else {
                    format!(
                        "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {start}-{}/{}\r\nconnection: close\r\n\r\n",
                        rest.len(),
                        contents.len() - 1,
                        contents.len()
                    )
                };
                let send = if std::mem::take(&mut first) { &rest[..cut.min(rest.len())] } else { rest };
                let mut stream = stream;
                let _ = stream.write_all(head.as_bytes());
                let _ = stream.write_all(send);
            }
        });
        (url, ranges)
    }

    #[test]
    fn a_transfer_that_breaks_goes_on_where_it_stopped() {
        static CONTENTS: [u8; 100_000] = [7; 100_000];
        let (url, ranges) = serve(&CONTENTS, 40_000);
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("file");
        fetch(&url, &path, "file", &|_, _| ProgressBar::hidden()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), CONTENTS);
        assert_eq!(ranges.recv().unwrap(), "");
        let resumed: usize = ranges.recv().unwrap().trim_end_matches('-').parse().unwrap();
        assert!(resumed > 0 && resumed <= 40_000, "{resumed}");
    }

    #[test]
    fn a_missing_file_is_not_tried_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/file", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        });
        let temp = tempfile::tempdir().unwrap();
        let error = fetch(&url, &temp.path().join("file"), "file", &|_, _| ProgressBar::hidden()).unwrap_err();
        assert!(error.to_string().contains("404"), "{error}");
    }
}
