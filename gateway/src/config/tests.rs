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
    assert_eq!(from_flag, "--kv-dtype: expected one of bf16, f32, fp8, not `f8`");
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

#[test]
fn tables_declare_metrics_and_what_is_recorded() {
    let text = "record = \"metadata\"\nrecord_share = 0.5\n[metrics.helpful]\ntype = \"number\"\noptimize = \"max\"\nmin = 0\nmax = 10.5\n\
                [metrics.solved]\ntype = \"boolean\"\noptimize = \"max\"\nclosed = true\nlevel = \"conversation\"\n\
                [recording.\"org/m\"]\nrecord = \"full\"\n[recording.chat]\nshare = 0.1\n";
    let (_folder, path) = written(text);
    let config = Config::load(Layer::default(), Some(&path), env(&[])).unwrap();
    let helpful = config.metrics.get("helpful").unwrap();
    assert_eq!((helpful.min, helpful.max, helpful.closed), (Some(0.0), Some(10.5), false));
    assert!(config.metrics.get("solved").unwrap().closed);
    assert_eq!((config.recording.level, config.recording.share), (Level::Metadata, 0.5));
    assert_eq!(config.recording.of("chat", "org/m"), (Level::Full, 0.1));
    assert_eq!(config.recording.of("completion", "other"), (Level::Metadata, 0.5));
}

#[test]
fn tables_limit_models_and_price_their_tokens() {
    let text = "[limits.\"org/m\"]\nconcurrent = 8\ncost_per_day = 2.5\n[prices.\"org/m\"]\ninput = 0.15\noutput = 1\n";
    let (_folder, path) = written(text);
    let config = Config::load(Layer::default(), Some(&path), env(&[("TIDEMILL_AUTH_GRACE", "5m")])).unwrap();
    let limits = config.model_limits["org/m"];
    assert_eq!((limits.concurrent, limits.cost_per_day.map(|cost| cost.0)), (Some(8), Some(2_500_000_000)));
    let price = config.prices["org/m"];
    assert_eq!((price.input, price.cached_input, price.output), (150, 150, 1000));
    assert_eq!(config.auth_grace.as_secs(), 300);
}

#[test]
fn a_wrong_table_names_its_line_and_key() {
    for (text, expected) in [
        ("[metrics.a]\ntype = \"text\"", "tidemill.toml:2: `metrics.a.type`: expected one of number, boolean"),
        ("\n[metrics.a]\ntype = \"number\"", "tidemill.toml:2: `metrics.a`: needs `optimize"),
        (
            "[metrics.a]\ntype = \"number\"\noptimize = \"max\"\nmin = 2\nmax = 1",
            "tidemill.toml:5: `metrics.a.max`: must be above",
        ),
        ("[metrics.a]\ncolour = 1", "tidemill.toml:2: `metrics.a.colour`: unknown key `colour`"),
        ("[metrics]\na = 1", "tidemill.toml:2: `metrics.a`: expected a table"),
        ("[recording.chat]\nshare = 2", "tidemill.toml:2: `recording.chat.share`: expected a share"),
        ("[limits.m]\nrequests = 1", "tidemill.toml:2: `limits.m.requests`: unknown key `requests`"),
        ("[limits.m]\nconcurrent = -1", "tidemill.toml:2: `limits.m.concurrent`: expected a whole number"),
        ("[prices.m]\noutput = 0.0001", "tidemill.toml:2: `prices.m.output`: expected dollars per million"),
        ("record = \"some\"", "tidemill.toml:1: `record`: expected one of full, metadata, off"),
    ] {
        let (_folder, path) = written(text);
        let message = Config::load(Layer::default(), Some(&path), env(&[])).unwrap_err().to_string();
        assert!(message.contains(expected), "{text}: {message}");
    }
}

#[test]
fn trainings_are_on_the_processor_unless_a_card_is_named_and_share_it_only_by_what_is_said() {
    let read = |settings: &[(&'static str, &str)]| Config::load(flags(settings), None, env(&[]));
    assert_eq!(read(&[("device", "cuda")]).unwrap().training_device, TrainingDevice::default());
    let beside = read(&[("device", "cuda:0"), ("training_device", "cuda:1")]).unwrap();
    assert_eq!((beside.training_device.card(), beside.training_device.share()), (Some(1), None));
    let shared = read(&[("device", "cuda"), ("training_device", "cuda"), ("training_memory", "40GiB")]).unwrap();
    let share = shared.training_device.share().unwrap();
    assert_eq!((share.card, share.bytes), (0, 40 << 30));
    let model = ModelSpec { name: "m".to_owned(), path: "m.gguf".into() };
    assert_eq!(shared.engine_options(&model, 1).left, Some(share));
    for (settings, expected) in [
        (vec![("training_device", "auto")], "--training-device: auto may be another device"),
        (vec![("training_device", "cuda:0,1")], "--training-device: cuda:0,1 are several cards"),
        (vec![("training_device", "gpu")], "--training-device: expected cpu, cuda"),
        (vec![("training_memory", "1GiB")], "--training-memory: is a part of a card's memory; name the card"),
        (vec![("training_device", "cuda:1"), ("training_memory", "lots")], "--training-memory: expected a size"),
        (vec![("device", "cuda:0,1"), ("training_device", "cuda:1")], "--training-device: serving may have that card, too"),
        (vec![("device", "auto"), ("training_device", "cuda:7")], "say with `training_memory`"),
    ] {
        let refused = read(&settings).unwrap_err().to_string();
        assert!(refused.contains(expected), "{settings:?}: {refused}");
    }
}
