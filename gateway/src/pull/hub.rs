//! A repository of the Hugging Face hub. `HF_ENDPOINT`, `HF_TOKEN` and the token file of the Python client are honoured.

use std::path::Path;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::ProgressBar;
use tidemill_store::{ModelFile, ModelRecord};

use super::error::PullError;
use super::{PullRequest, checksum};

/// What a model needs beside its weights, where a repository has it.
const COMPANIONS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// Quantisations by preference when a repository has several GGUF files and none was named: small, good, and fast on a CPU.
const PREFERRED_GGUF: &[&str] = &["Q4_K_M", "Q4_1", "Q4_0", "Q4_K_S", "Q8_0", "Q5_K_M", "Q6_K"];

/// Fetches the files of a repository that the engine reads.
pub fn fetch(
    request: &PullRequest,
    folder: &Path,
    progress: &dyn Fn(&str, u64) -> ProgressBar,
) -> Result<ModelRecord, PullError> {
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.trim().is_empty()).or_else(|| Cache::from_env().token());
    let builder = ApiBuilder::from_env().with_token(token.map(|token| token.trim().to_owned())).with_retries(5);
    fetch_with(builder, request, folder, progress)
}

fn fetch_with(
    builder: ApiBuilder,
    request: &PullRequest,
    folder: &Path,
    progress: &dyn Fn(&str, u64) -> ProgressBar,
) -> Result<ModelRecord, PullError> {
    let cache = folder.join(".hub");
    let api =
        builder.with_cache_dir(cache.clone()).with_progress(false).build().map_err(|error| PullError::Hub(error.to_string()))?;
    let repo = api.repo(Repo::with_revision(request.name.clone(), RepoType::Model, request.revision.clone()));
    let info = repo.info().map_err(|error| explain(&request.name, &error))?;
    let listed: Vec<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
    let (wanted, entry) = choose(&listed, request)?;
    let mut files = Vec::with_capacity(wanted.len());
    for name in &wanted {
        files.push(fetch_file(&api, &repo, name, folder, progress)?);
    }
    if cache.exists() {
        std::fs::remove_dir_all(&cache).map_err(|source| PullError::Io { path: cache, source })?;
    }
    Ok(ModelRecord {
        name: request.name.clone(),
        source: format!("{}@{}", request.name, info.sha),
        revision: request.revision.clone(),
        entry,
        files,
    })
}

fn fetch_file(
    api: &Api,
    repo: &ApiRepo,
    name: &str,
    folder: &Path,
    progress: &dyn Fn(&str, u64) -> ProgressBar,
) -> Result<ModelFile, PullError> {
    let failed = |error: ApiError| PullError::Transfer { what: name.to_owned(), reason: error.to_string() };
    let metadata = api.metadata(&repo.url(name)).map_err(failed)?;
    let bytes = metadata.size() as u64;
    let place = folder.join(name);
    let io = |source| PullError::Io { path: place.clone(), source };
    let there = std::fs::metadata(&place).is_ok_and(|found| found.len() == bytes);
    if !there || checksum::verify(&place, name, metadata.etag()).is_err() {
        let bar = HubProgress { bar: progress(name, bytes) };
        let fetched = repo.download_with_progress(name, bar).map_err(failed)?;
        let blob = fetched.canonicalize().map_err(io)?;
        checksum::verify(&blob, name, metadata.etag())?;
        if let Some(parent) = place.parent() {
            std::fs::create_dir_all(parent).map_err(io)?;
        }
        std::fs::rename(&blob, &place).map_err(io)?;
    }
    Ok(ModelFile { path: name.to_owned(), bytes, sha256: checksum::sha256(&place)? })
}

struct HubProgress {
    bar: ProgressBar,
}

impl hf_hub::api::Progress for HubProgress {
    fn init(&mut self, size: usize, _filename: &str) {
        self.bar.set_length(size as u64);
        self.bar.set_position(0);
    }

    fn update(&mut self, size: usize) {
        self.bar.inc(size as u64);
    }

    fn finish(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Which files of a repository are needed, and what `--model` will open (empty: the folder).
fn choose(listed: &[String], request: &PullRequest) -> Result<(Vec<String>, String), PullError> {
    // A repository can name anything: only plain relative paths are written below the folder.
    let safe =
        |name: &&String| name.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\\'));
    let ggufs: Vec<&String> = listed.iter().filter(safe).filter(|name| name.ends_with(".gguf")).collect();
    let weights: Vec<&String> = listed
        .iter()
        .filter(safe)
        .filter(|name| name.ends_with(".safetensors") && !name.contains('/') && !name.starts_with("consolidated"))
        .collect();
    if let Some(file) = &request.file {
        let found = ggufs.iter().find(|name| name.as_str() == file).ok_or_else(|| {
            let there: Vec<&str> = ggufs.iter().map(|name| name.as_str()).collect();
            PullError::Hub(format!("{} has no file {file}; GGUF files there: {}", request.name, there.join(", ")))
        })?;
        return Ok((parts(found, &ggufs), (*found).clone()));
    }
    if !weights.is_empty() {
        let companions =
            COMPANIONS.iter().filter(|name| listed.iter().any(|there| there == *name)).map(|name| (*name).to_owned());
        return Ok((companions.chain(weights.into_iter().cloned()).collect(), String::new()));
    }
    let preferred = PREFERRED_GGUF
        .iter()
        .find_map(|tag| ggufs.iter().find(|name| name.to_ascii_uppercase().contains(tag)))
        .or(ggufs.first())
        .ok_or_else(|| PullError::Hub(format!("{} holds no safetensors and no GGUF weights", request.name)))?;
    Ok((parts(preferred, &ggufs), (*preferred).clone()))
}

/// All parts of a split GGUF (`…-00001-of-00003.gguf`), or the one file.
fn parts(name: &str, ggufs: &[&String]) -> Vec<String> {
    let stem = |name: &str| {
        let base = name.strip_suffix(".gguf")?;
        let (rest, total) = base.rsplit_once("-of-")?;
        let (prefix, index) = rest.rsplit_once('-')?;
        (index.len() == 5 && total.len() == 5).then(|| (prefix.to_owned(), total.to_owned()))
    };
    match stem(name) {
        Some(wanted) => {
            ggufs.iter().filter(|other| stem(other).as_ref() == Some(&wanted)).map(|other| (*other).clone()).collect()
        }
        None => vec![name.to_owned()],
    }
}

fn explain(name: &str, error: &ApiError) -> PullError {
    let text = error.to_string();
    let next = if text.contains("401") || text.contains("403") {
        "the repository is private or gated: accept its terms on the hub and set HF_TOKEN"
    } else if text.contains("404") {
        "check the spelling (organisation/name) and --revision"
    } else {
        "check the connection, or set HF_ENDPOINT to a mirror; a model's path works offline: --model PATH"
    };
    PullError::Hub(format!("cannot read {name} on the Hugging Face hub: {text}; {next}"))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    use super::*;

    fn request(file: Option<&str>) -> PullRequest {
        PullRequest { name: "org/m".into(), revision: "main".into(), file: file.map(str::to_owned) }
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_safetensors_repository_gives_its_shards_and_companions_only() {
        let listed = names(&[
            "README.md",
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "consolidated.safetensors",
            "original/x.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
        ]);
        let (files, entry) = choose(&listed, &request(None)).unwrap();
        assert_eq!(entry, "");
        assert_eq!(
            files,
            names(&[
                "config.json",
                "tokenizer.json",
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors"
            ])
        );
    }

    #[test]
    fn the_preferred_gguf_is_taken_unless_one_is_named_and_splits_stay_together() {
        let listed = names(&["m-Q8_0.gguf", "m-Q4_K_M.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf"]);
        assert_eq!(choose(&listed, &request(None)).unwrap().1, "m-Q4_K_M.gguf");
        let (files, entry) = choose(&listed, &request(Some("big-00001-of-00002.gguf"))).unwrap();
        assert_eq!((files.len(), entry.as_str()), (2, "big-00001-of-00002.gguf"));
        assert!(choose(&listed, &request(Some("none.gguf"))).unwrap_err().to_string().contains("m-Q8_0.gguf"));
    }

    #[test]
    fn names_that_leave_the_folder_are_never_chosen() {
        let listed = names(&["../evil.gguf", "a//b.gguf", "..\\x.gguf"]);
        assert!(choose(&listed, &request(None)).is_err());
    }

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    /// Answers like the hub: the listing, the one-byte probe with etag and commit, and ranges. `cut` bytes into the first
    /// transfer it hangs up once.
    fn serve_hub(files: &'static [(&'static str, &'static [u8], &'static str)], cut: usize) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let mut cut = Some(cut);
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let lines: Vec<String> = BufReader::new(stream.try_clone().unwrap())
                    .lines()
                    .map_while(Result::ok)
                    .take_while(|line| !line.is_empty())
                    .collect();
                let path = lines[0].split(' ').nth(1).unwrap().to_owned();
                let range =
                    lines.iter().find_map(|line| line.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
                if path.starts_with("/api/models/") {
                    let siblings: Vec<_> = files.iter().map(|file| serde_json::json!({"rfilename": file.0})).collect();
                    let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
                    let _ =
                        write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
                    continue;
                }
                let Some((_, contents, etag)) = files.iter().find(|file| path == format!("/org/m/resolve/main/{}", file.0))
                else {
                    let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                    continue;
                };
                let (start, end) = match range.as_deref() {
                    Some("0-0") => (0, 1),
                    Some(range) => (range.trim_end_matches('-').parse().unwrap(), contents.len()),
                    None => (0, contents.len()),
                };
                let body = &contents[start..end];
                let _ = write!(
                    stream,
                    "HTTP/1.1 206 Partial Content\r\netag: \"{etag}\"\r\nx-repo-commit: {COMMIT}\r\ncontent-length: {}\r\ncontent-range: bytes {start}-{}/{}\r\nconnection: close\r\n\r\n",
                    body.len(),
                    end - 1,
                    contents.len()
                );
                let sent = if body.len() > 1 { cut.take().unwrap_or(body.len()).min(body.len()) } else { body.len() };
                let _ = stream.write_all(&body[..sent]);
            }
        });
        endpoint
    }

    fn builder(endpoint: String) -> ApiBuilder {
        ApiBuilder::new().with_endpoint(endpoint).with_token(None).with_retries(2)
    }

    #[test]
    fn a_repository_is_fetched_checked_and_recorded_even_when_the_connection_breaks() {
        static FILES: &[(&str, &[u8], &str)] = &[
            ("config.json", b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
            ("model.safetensors", b"hello\n", "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"),
        ];
        let temp = tempfile::tempdir().unwrap();
        let record =
            fetch_with(builder(serve_hub(FILES, 3)), &request(None), temp.path(), &|_, _| ProgressBar::hidden()).unwrap();
        assert_eq!(record.source, format!("org/m@{COMMIT}"));
        assert_eq!(record.files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(), ["config.json", "model.safetensors"]);
        assert_eq!(std::fs::read(temp.path().join("model.safetensors")).unwrap(), b"hello\n");
        assert!(!temp.path().join(".hub").exists());
    }

    #[test]
    fn bytes_that_differ_from_the_hubs_checksum_are_refused() {
        static FILES: &[(&str, &[u8], &str)] =
            &[("m.gguf", b"tampered", "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03")];
        let temp = tempfile::tempdir().unwrap();
        let result =
            fetch_with(builder(serve_hub(FILES, usize::MAX)), &request(None), temp.path(), &|_, _| ProgressBar::hidden());
        assert!(matches!(result, Err(PullError::Checksum { .. })), "{result:?}");
        assert!(!temp.path().join("m.gguf").exists());
    }

    #[test]
    fn an_unknown_repository_says_what_to_check() {
        let temp = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        });
        let error = fetch_with(builder(endpoint), &request(None), temp.path(), &|_, _| ProgressBar::hidden()).unwrap_err();
        assert!(error.to_string().contains("check the spelling"), "{error}");
    }
}
