//! How much memory the KV cache gets.

use crate::block_pool::BLOCK_SIZE;
use crate::options::{EngineOptions, StartError};
use std::path::Path;

/// What was decided about the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvPlan {
    /// Blocks of the pool.
    pub blocks: usize,
    /// Most tokens of a sequence.
    pub max_model_len: usize,
}

/// Where the cache's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Free {
    /// The machine's: bytes that are free, for everybody on it. `None` where the system does not say.
    Machine(Option<usize>),
    /// A card's: bytes that nothing else will want.
    Card(usize),
}

/// Sizes the pool. `context` is what the model supports.
///
/// A given `kv_memory` is used whole. Otherwise three quarters of the machine's free memory are, or all that a card can spare, or this
/// engine's share of them, but never more than `max_seqs` sequences of full length need. Without a given `max_model_len` it shrinks to
/// what the pool holds.
pub fn plan(options: &EngineOptions, context: usize, block_bytes: usize, free: Free) -> Result<KvPlan, StartError> {
    let wanted = options.max_model_len.unwrap_or(context);
    if wanted > context {
        let message = format!("must be at most {context}, the model's context, not {wanted}");
        return Err(StartError::Option { option: "--max-model-len", message });
    }
    let blocks_each = wanted.div_ceil(BLOCK_SIZE);
    let useful = options.max_seqs.saturating_mul(blocks_each);
    let available = options.kv_memory.unwrap_or_else(|| match free {
        Free::Machine(Some(free)) => free / 4 * 3 / options.kv_share.max(1),
        Free::Machine(None) => useful.saturating_mul(block_bytes),
        Free::Card(spare) => spare / options.kv_share.max(1),
    });
    let fit = (available / block_bytes.max(1)).min(i32::MAX as usize / BLOCK_SIZE);
    let blocks = if options.kv_memory.is_some() { fit } else { fit.min(useful) };
    if blocks == 0 || (options.max_model_len.is_some() && blocks < blocks_each) {
        let sized = options.kv_memory.is_none() && matches!(free, Free::Card(_));
        let left = options.left.filter(|left| sized && options.device.may_be(left.card));
        return Err(StartError::KvMemory { available, blocks, block_bytes, needed: blocks_each, left });
    }
    Ok(KvPlan { blocks, max_model_len: wanted.min(blocks * BLOCK_SIZE) })
}

/// Swap memory when nobody says how much.
const SWAP: usize = 4 << 30;

/// Places for blocks of preempted sequences in the machine's memory, of which `free` bytes are free. Never more than the cache has
/// blocks: who would fill more has nobody left who runs.
pub fn swap_places(options: &EngineOptions, block_bytes: usize, blocks: usize, free: Option<usize>) -> usize {
    let quarter = free.map_or(SWAP, |free| free / 4 / options.kv_share.max(1));
    let bytes = options.swap_memory.unwrap_or_else(|| SWAP.min(quarter));
    (bytes / block_bytes.max(1)).min(blocks)
}

/// Bytes that this process may still take: what the kernel calls available, within the limits of its control groups.
/// `None` where the system does not say.
pub fn free_memory() -> Option<usize> {
    let available = meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let rooms = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (controllers, path) = (parts.nth(1)?, parts.next()?.trim_start_matches('/'));
        match controllers {
            "" => group_room(Path::new("/sys/fs/cgroup"), path, "memory.max", "memory.current"),
            names if names.split(',').any(|name| name == "memory") => {
                let root = Path::new("/sys/fs/cgroup/memory");
                group_room(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => None,
        }
    });
    Some(rooms.fold(available, usize::min))
}

/// The least room in a control group and those above it. Inside a container the path may not exist; then the root stands for it.
fn group_room(root: &Path, path: &str, limit: &str, usage: &str) -> Option<usize> {
    let read = |file: std::path::PathBuf| std::fs::read_to_string(file).ok()?.trim().parse::<usize>().ok();
    // Pages of files, such as those of a model that was just read, give way when memory is needed.
    let cache = |folder: &Path| -> usize {
        let names = if limit == "memory.max" {
            ["active_file ", "inactive_file "]
        } else {
            ["total_active_file ", "total_inactive_file "]
        };
        let text = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let counts = text.lines().filter_map(|line| names.iter().find_map(|name| line.strip_prefix(name)));
        counts.filter_map(|count| count.trim().parse::<usize>().ok()).sum()
    };
    let group = root.join(path);
    group
        .ancestors()
        .take_while(|folder| folder.starts_with(root))
        .filter_map(|folder| {
            let taken = read(folder.join(usage))?.saturating_sub(cache(folder));
            Some(read(folder.join(limit))?.saturating_sub(taken))
        })
        .min()
}

fn meminfo(text: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::CardShare;

    fn options() -> EngineOptions {
        EngineOptions { max_seqs: 4, ..EngineOptions::new("m") }
    }

    #[test]
    fn free_memory_is_used_in_part_and_never_more_than_can_be_used() {
        let plenty = plan(&options(), 100, 1000, Free::Machine(Some(1 << 30))).unwrap();
        assert_eq!(plenty, KvPlan { blocks: 16, max_model_len: 100 });
        let scarce = plan(&options(), 100, 1000, Free::Machine(Some(4000))).unwrap();
        assert_eq!(scarce, KvPlan { blocks: 3, max_model_len: 96 });
    }

    #[test]
    fn all_that_a_card_can_spare_is_used_and_shared_by_its_models() {
        let card = Free::Card(4000);
        assert_eq!(plan(&options(), 100, 1000, card).unwrap(), KvPlan { blocks: 4, max_model_len: 100 });
        let one_of_two = EngineOptions { kv_share: 2, ..options() };
        assert_eq!(plan(&one_of_two, 100, 1000, card).unwrap(), KvPlan { blocks: 2, max_model_len: 64 });
        assert!(plan(&options(), 100, 1000, Free::Card(999)).is_err());
        let bounded = EngineOptions { kv_memory: Some(3000), ..options() };
        assert_eq!(plan(&bounded, 100, 1000, card).unwrap().blocks, 3);
    }

    #[test]
    fn swap_memory_is_a_part_of_what_is_free_and_not_more_than_the_cache() {
        let places = |options: &EngineOptions, free| swap_places(options, 1 << 20, 100_000, free);
        assert_eq!(places(&options(), Some(64 << 30)), 4096);
        assert_eq!(places(&options(), Some(4 << 30)), 1024);
        assert_eq!(places(&EngineOptions { kv_share: 2, ..options() }, Some(4 << 30)), 512);
        assert_eq!(places(&options(), None), 4096);
        let given = |bytes| EngineOptions { swap_memory: Some(bytes), ..options() };
        assert_eq!(places(&given(10 << 30), Some(1 << 30)), 10_240);
        assert_eq!(places(&given(0), Some(64 << 30)), 0);
        assert_eq!(swap_places(&options(), 1 << 20, 7, None), 7);
    }

    #[test]
    fn a_given_size_is_used_whole() {
        let given = EngineOptions { kv_memory: Some(50_000), ..options() };
        assert_eq!(plan(&given, 100, 1000, Free::Machine(Some(0))).unwrap(), KvPlan { blocks: 50, max_model_len: 100 });
    }

    #[test]
    fn a_length_that_does_not_fit_is_refused_only_when_it_was_asked_for() {
        let small = EngineOptions { kv_memory: Some(2000), ..options() };
        assert_eq!(plan(&small, 100, 1000, Free::Machine(None)).unwrap(), KvPlan { blocks: 2, max_model_len: 64 });
        let asked = EngineOptions { max_model_len: Some(100), ..small.clone() };
        assert!(plan(&asked, 100, 1000, Free::Machine(None)).unwrap_err().to_string().contains("--kv-memory"));
        let beyond = EngineOptions { max_model_len: Some(101), ..small.clone() };
        assert!(plan(&beyond, 100, 1000, Free::Machine(None)).unwrap_err().to_string().contains("at most 100"));
        assert!(plan(&EngineOptions { kv_memory: Some(999), ..small }, 100, 1000, Free::Machine(None)).is_err());
    }

    #[test]
    fn who_leaves_too_much_of_its_card_hears_of_it() {
        let refused = |device: &str, kv_memory| {
            let left = Some(CardShare { card: 1, bytes: 77 });
            let options = EngineOptions { device: device.parse().unwrap(), left, kv_memory, ..options() };
            plan(&options, 100, 1000, Free::Card(0)).unwrap_err().to_string()
        };
        let hint = "or lower --training-memory, which leaves 77 bytes of card 1 to trainings";
        for device in ["auto", "cuda", "cuda:0,1"] {
            assert!(refused(device, None).ends_with(hint), "{}", refused(device, None));
        }
        for other in [refused("cuda:0", None), refused("cuda:1", Some(0))] {
            assert!(other.ends_with("raise --kv-memory or free memory"), "{other}");
        }
    }

    #[test]
    fn the_kernels_word_is_read() {
        assert_eq!(meminfo("MemTotal:       100 kB\nMemAvailable:    42 kB\n"), Some(42 * 1024));
        assert_eq!(meminfo("MemTotal: 100 kB\n"), None);
    }

    #[test]
    fn the_tightest_control_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b");
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::write(inner.join("memory.max"), "max\n").unwrap();
        std::fs::write(inner.join("memory.current"), "5\n").unwrap();
        std::fs::write(root.path().join("a/memory.max"), "100\n").unwrap();
        std::fs::write(root.path().join("a/memory.current"), "30\n").unwrap();
        assert_eq!(group_room(root.path(), "a/b", "memory.max", "memory.current"), Some(70));
        assert_eq!(group_room(root.path(), "c", "memory.max", "memory.current"), None);
        // A model file's pages in the cache are room, not use.
        let stat = "anon 10\nactive_file 5\ninactive_file 7\nslab 3\n";
        std::fs::write(root.path().join("a/b/memory.stat"), stat).unwrap();
        std::fs::write(root.path().join("a/memory.stat"), stat).unwrap();
        assert_eq!(group_room(root.path(), "a/b", "memory.max", "memory.current"), Some(82));
    }
}
