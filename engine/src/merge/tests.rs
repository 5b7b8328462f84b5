//! Bases in several files.

use super::*;
use crate::gguf::{Gguf, Pairs, Planned, padding, storage_number};

/// The model of a file in three files, as llama-gguf-split leaves them: all metadata in the first, tensors one after another.
fn split(model: &Path, folder: &Path) -> PathBuf {
    let whole = Gguf::open(model).unwrap();
    let tensors = whole.descriptions().unwrap();
    let place = |number: usize| folder.join(format!("tiny-{number:05}-of-00003.gguf"));
    let cut = tensors.len() / 3;
    for (index, part) in [&tensors[..cut], &tensors[cut..2 * cut], &tensors[2 * cut..]].into_iter().enumerate() {
        let pairs = if index == 0 { whole.pairs(&[]).unwrap() } else { Pairs::default() };
        let pairs = pairs.raw("split.no", 2, &(index as u16).to_le_bytes()).raw("split.count", 2, &3u16.to_le_bytes()).raw(
            "split.tensors.count",
            5,
            &(tensors.len() as i32).to_le_bytes(),
        );
        let planned: Vec<Planned> = part
            .iter()
            .map(|one| Planned { name: one.name.clone(), shape: one.shape.clone(), storage: one.storage, len: one.bytes.len() })
            .collect();
        let mut bytes = pairs.before_data(&planned, 32);
        for one in part {
            bytes.extend(&whole.file.map[one.bytes.clone()]);
            bytes.resize(bytes.len() + padding(one.bytes.len(), 32), 0);
        }
        std::fs::write(place(index + 1), bytes).unwrap();
    }
    place(1)
}

#[test]
fn a_base_in_several_files_becomes_the_same_file_as_one_that_is_whole() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/llama");
    let adapter = Adapter::read(&folder.join("adapters/all")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let whole = folder.join("llama.gguf");
    let parts = split(&whole, out.path());
    let options = MergeOptions { container: Container::Gguf, storage: None, files_from: None };
    let made = |base: &Path, name: &str| {
        let to = out.path().join(name);
        let merged = merge(&ModelFiles::open(base).unwrap(), &adapter, &to, &options).unwrap();
        let bytes = std::fs::read(&to).unwrap();
        assert_eq!((merged.matrices, merged.bytes), (adapter.pairs.len(), bytes.len() as u64));
        bytes
    };
    let (joined, wanted) = (made(&parts, "joined.gguf"), made(&whole, "wanted.gguf"));
    assert!(joined == wanted, "{} bytes and {}", joined.len(), wanted.len());
    let file = Gguf::open(&out.path().join("joined.gguf")).unwrap();
    assert_eq!(file.integer("split.count").unwrap(), None);
    // f32 stays what it is, and so does everything that the adapter leaves alone.
    let source = Gguf::open(&whole).unwrap();
    for (mine, theirs) in file.descriptions().unwrap().into_iter().zip(source.descriptions().unwrap()) {
        assert_eq!((&mine.name, &mine.shape, mine.storage), (&theirs.name, &theirs.shape, storage_number(Format::F32)));
    }
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 5, "three parts and two models");
}
