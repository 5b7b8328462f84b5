//! Precedence and places of errors.

use super::*;

fn flags(settings: &[(&'static str, &str)]) -> Layer {
    let mut layer = Layer::default();
    for (key, text) in settings {
        layer.flag(key, Some(&(*text).to_owned()));
    }
    layer
}

fn env(settings: &[(&str, &str)]) -> Vec<(String, String)> {
    settings.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

fn written(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tidemill.toml");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

#[test]
fn a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default() {
    let (_folder, path) = written("port = 1\nmax_seqs = 2\nthreads = 3\nmodel = [\"x\", \"y\"]\n");
    let config = Config::load(
        flags(&[("port", "11")]),
        Some(&path),
        env(&[("TIDEMILL_PORT", "12"), ("TIDEMILL_MAX_SEQS", "13"), ("TIDEMILL_MODEL", "a, b")]),
    )
    .unwrap();
    assert_eq!((config.port, config.max_seqs, config.threads, config.max_waiting), (11, 13, Some(3), 1024));
    assert_eq!(config.models.iter().map(|m| m.0.as_str()).collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn a_bad_value_names_flag_variable_or_line() {
    let (_folder, path) = written("host = \"0.0.0.0\"\nport = 70000\n");
    let from_file = Config::load(Layer::default(), Some(&path), env(&[])).unwrap_err().to_string();
    assert!(from_file.contains("tidemill.toml:2: `port`: expected a port"), "{from_file}");
    let from_env = Config::load(Layer::default(), None, env(&[("TIDEMILL_KV_MEMORY", "lots")])).unwrap_err().to_string();
    assert!(from_env.starts_with("TIDEMILL_KV_MEMORY: expected a size"), "{from_env}");
    let from_flag = Config::load(flags(&[("kv_dtype", "f8")]), None, env(&[])).unwrap_err().to_string();
    assert_eq!(from_flag, "--kv-dtype: expected one of bf16, f32, not `f8`");
}

#[test]
fn the_environment_can_name_the_file() {
    let (_folder, path) = written("port = 4321");
    let config = Config::load(Layer::default(), None, env(&[("TIDEMILL_CONFIG", path.to_str().unwrap())])).unwrap();
    assert_eq!(config.port, 4321);
    let missing = Config::load(Layer::default(), Some(Path::new("/no/such/file.toml")), env(&[])).unwrap_err().to_string();
    assert!(missing.contains("/no/such/file.toml"), "{missing}");
}

#[test]
fn kubernetes_service_links_are_left_alone() {
    let config =
        Config::load(Layer::default(), None, env(&[("TIDEMILL_PORT", "tcp://10.0.0.7:8080"), ("TIDEMILL_SERVICE_HOST", "x")]));
    assert_eq!(config.unwrap().port, 8080);
}
