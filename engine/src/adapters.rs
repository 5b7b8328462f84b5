//! Which adapters an engine serves.
//!
//! A generation is what was loaded once; it never changes. A new load under a name is a new generation, and requests go on with the
//! one they were given: each holds a lease, and the memory is freed when the last lease is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::adapter::AdapterError;
use crate::request::AdapterGeneration;

/// Longest name of an adapter.
const MAX_NAME: usize = 200;

/// An adapter that is loaded; whoever holds one keeps it so.
#[derive(Clone, Debug)]
pub struct AdapterLease(Arc<Loaded>);

#[derive(Debug)]
struct Loaded {
    name: String,
    digest: [u8; 32],
    slot: u32,
    base: String,
    rank: usize,
    bytes: usize,
    /// In seconds since 1970, told by whoever loaded it.
    created: u64,
    pinned: AtomicBool,
    /// When it was last asked for, on the table's clock.
    used: AtomicU64,
}

/// What describes an adapter when it is put into the table.
#[derive(Clone, Debug)]
pub(crate) struct Description {
    pub(crate) name: String,
    pub(crate) digest: [u8; 32],
    pub(crate) base: String,
    pub(crate) rank: usize,
    pub(crate) bytes: usize,
    pub(crate) created: u64,
    pub(crate) pinned: bool,
}

impl AdapterLease {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Names its contents: equal factors have equal generations, on every machine and after every start. Never 0.
    pub fn generation(&self) -> AdapterGeneration {
        generation(&self.0.digest)
    }

    /// What its maker called the base.
    pub fn base(&self) -> &str {
        &self.0.base
    }

    /// Its largest rank.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// Bytes of its factors.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// When it was loaded, in seconds since 1970.
    pub fn created(&self) -> u64 {
        self.0.created
    }

    /// Whether it stays when room is needed.
    pub fn pinned(&self) -> bool {
        self.0.pinned.load(Ordering::Relaxed)
    }

    /// The backend's place for it.
    pub(crate) fn slot(&self) -> u32 {
        self.0.slot
    }

    /// Nobody else holds it.
    fn is_last(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

/// The first 63 bits of the digest (a database's integers have a sign); 0 is the base model.
pub(crate) fn generation(digest: &[u8; 32]) -> AdapterGeneration {
    let [a, b, c, d, e, f, g, h, ..] = *digest;
    AdapterGeneration((u64::from_le_bytes([a, b, c, d, e, f, g, h]) >> 1).max(1))
}

/// Why an adapter was not loaded, unloaded or pinned. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum AdapterRefused {
    /// The files are not right, or do not fit the model.
    #[error(transparent)]
    Files(#[from] AdapterError),
    /// The name cannot be one.
    #[error("\"{0}\" cannot be an adapter's name; use 1 to {MAX_NAME} visible characters without spaces, \":\" and \"@\"")]
    Name(String),
    /// The name promises other contents.
    #[error("the files are of generation {found}, not what \"{name}\" says; they were changed, restore them")]
    Generation {
        /// The name, with the generation that was promised.
        name: String,
        /// The generation of the files.
        found: AdapterGeneration,
    },
    /// Its rank is above the limit.
    #[error("the rank {rank} is above {limit}, the largest that this server takes; start it with a higher --max-lora-rank")]
    Rank {
        /// The adapter's.
        rank: usize,
        /// The server's.
        limit: usize,
    },
    /// Every place is taken by a pinned adapter.
    #[error("all {0} places for adapters are taken by pinned ones; unload one, or start the server with a higher --max-loras")]
    Full(usize),
    /// Too many generations that were replaced still answer requests.
    #[error("{0} adapters that were replaced or unloaded still answer requests; try again when those have ended")]
    Draining(usize),
    /// No adapter has the name.
    #[error("no adapter is called \"{0}\"")]
    Unknown(String),
    /// The model takes none.
    #[error("this server serves no adapters; start it with --max-loras above 0")]
    Off,
    /// The backend refused.
    #[error("the adapter could not be loaded: {0}")]
    Backend(#[from] tidemill_kernels::KernelError),
    /// The engine is gone.
    #[error("the engine has stopped")]
    Stopped,
}

/// Fails for a text that cannot name an adapter.
pub(crate) fn check_name(name: &str) -> Result<(), AdapterRefused> {
    let fits = !name.is_empty() && name.chars().count() <= MAX_NAME;
    if fits && !name.chars().any(|c| c.is_control() || c.is_whitespace() || c == ':' || c == '@') {
        return Ok(());
    }
    Err(AdapterRefused::Name(name.chars().take(MAX_NAME).collect()))
}

/// Splits `NAME@GENERATION`, a name that promises what is loaded under it.
pub(crate) fn split_generation(name: &str) -> (&str, Option<AdapterGeneration>) {
    let parts = name.rsplit_once('@').filter(|(_, digits)| digits.len() == 16);
    match parts.and_then(|(name, digits)| Some((name, u64::from_str_radix(digits, 16).ok()?))) {
        Some((name, generation)) => (name, Some(AdapterGeneration(generation))),
        None => (name, None),
    }
}

/// The adapters that can be asked for, and those that are on their way out. A value: knows no model and no clock.
#[derive(Debug)]
pub(crate) struct AdapterTable {
    current: Vec<AdapterLease>,
    /// Replaced, unloaded or pushed out, and still leased.
    leaving: Vec<AdapterLease>,
    max: usize,
    clock: u64,
}

impl AdapterTable {
    pub(crate) fn new(max: usize) -> Self {
        Self { current: Vec::new(), leaving: Vec::new(), max, clock: 0 }
    }

    /// The generation that has the name now.
    pub(crate) fn find(&mut self, name: &str) -> Option<AdapterLease> {
        self.clock += 1;
        let lease = self.current.iter().find(|lease| lease.name() == name)?;
        lease.0.used.store(self.clock, Ordering::Relaxed);
        Some(lease.clone())
    }

    /// All that can be asked for, in the order in which they were loaded.
    pub(crate) fn list(&self) -> Vec<AdapterLease> {
        self.current.clone()
    }

    /// The same contents under the same name, if they are there.
    pub(crate) fn same(&self, wanted: &Description) -> Option<AdapterLease> {
        self.current.iter().find(|lease| lease.name() == wanted.name && lease.0.digest == wanted.digest).cloned()
    }

    /// Makes one that is on its way out, with these contents under this name, the one that is asked for again: it needs no other slot.
    pub(crate) fn revive(&mut self, wanted: &Description) -> Result<Option<AdapterLease>, AdapterRefused> {
        let is_same = |lease: &AdapterLease| lease.name() == wanted.name && lease.0.digest == wanted.digest;
        let Some(index) = self.leaving.iter().position(is_same) else { return Ok(None) };
        let gives_way = self.gives_way(&wanted.name)?;
        let lease = self.leaving.remove(index);
        self.push_out(gives_way);
        self.clock += 1;
        lease.0.used.store(self.clock, Ordering::Relaxed);
        lease.0.pinned.store(wanted.pinned, Ordering::Relaxed);
        self.current.push(lease.clone());
        Ok(Some(lease))
    }

    fn push_out(&mut self, index: Option<usize>) {
        let leaving = index.map(|index| self.current.remove(index));
        self.leaving.extend(leaving);
    }

    /// The slot for a new adapter, or why there is none.
    pub(crate) fn place(&self, wanted: &Description) -> Result<u32, AdapterRefused> {
        if self.max == 0 {
            return Err(AdapterRefused::Off);
        }
        if self.leaving.len() >= self.max {
            return Err(AdapterRefused::Draining(self.leaving.len()));
        }
        self.gives_way(&wanted.name)?;
        let taken = |slot: u32| self.current.iter().chain(&self.leaving).any(|lease| lease.slot() == slot);
        Ok((0..).find(|slot| !taken(*slot)).unwrap_or_default())
    }

    /// Which adapter leaves for one of this name: the one that has the name, else, when all places are taken, the one that was not
    /// asked for the longest.
    fn gives_way(&self, name: &str) -> Result<Option<usize>, AdapterRefused> {
        if let Some(index) = self.current.iter().position(|lease| lease.name() == name) {
            return Ok(Some(index));
        }
        if self.current.len() < self.max {
            return Ok(None);
        }
        let free = self.current.iter().enumerate().filter(|(_, lease)| !lease.pinned());
        let oldest = free.min_by_key(|(_, lease)| lease.0.used.load(Ordering::Relaxed));
        oldest.map(|(index, _)| Some(index)).ok_or(AdapterRefused::Full(self.max))
    }

    /// Makes the adapter in `slot` the one that is asked for by its name.
    pub(crate) fn put(&mut self, slot: u32, wanted: Description) -> Result<AdapterLease, AdapterRefused> {
        let gives_way = self.gives_way(&wanted.name)?;
        self.push_out(gives_way);
        self.clock += 1;
        let Description { name, digest, base, rank, bytes, created, pinned } = wanted;
        let (pinned, used) = (AtomicBool::new(pinned), AtomicU64::new(self.clock));
        let lease = AdapterLease(Arc::new(Loaded { name, digest, slot, base, rank, bytes, created, pinned, used }));
        self.current.push(lease.clone());
        Ok(lease)
    }

    /// Nobody can ask for it any more.
    pub(crate) fn unload(&mut self, name: &str) -> Result<(), AdapterRefused> {
        let index = self.current.iter().position(|lease| lease.name() == name);
        if index.is_none() {
            return Err(AdapterRefused::Unknown(name.to_owned()));
        }
        self.push_out(index);
        Ok(())
    }

    /// Keeps it when room is needed, or no longer.
    pub(crate) fn pin(&self, name: &str, pinned: bool) -> Result<(), AdapterRefused> {
        let lease = self.current.iter().find(|lease| lease.name() == name);
        let lease = lease.ok_or_else(|| AdapterRefused::Unknown(name.to_owned()))?;
        lease.0.pinned.store(pinned, Ordering::Relaxed);
        Ok(())
    }

    /// Slots that nobody needs any more. They count as free from now on.
    pub(crate) fn freed(&mut self) -> Vec<u32> {
        let mut slots = Vec::new();
        self.leaving.retain(|lease| {
            if lease.is_last() {
                slots.push(lease.slot());
            }
            !lease.is_last()
        });
        slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(name: &str, content: u8) -> Description {
        Description {
            name: name.into(),
            digest: [content; 32],
            base: String::new(),
            rank: 4,
            bytes: 100,
            created: 0,
            pinned: false,
        }
    }

    fn load(table: &mut AdapterTable, name: &str, content: u8) -> Result<AdapterLease, AdapterRefused> {
        if let Some(lease) = table.revive(&wanted(name, content))? {
            return Ok(lease);
        }
        let slot = table.place(&wanted(name, content))?;
        table.put(slot, wanted(name, content))
    }

    fn names(table: &AdapterTable) -> Vec<String> {
        table.list().iter().map(|lease| lease.name().to_owned()).collect()
    }

    #[test]
    fn a_new_load_is_a_new_generation_and_the_old_one_stays_as_long_as_it_is_leased() {
        let mut table = AdapterTable::new(4);
        load(&mut table, "a", 1).unwrap();
        let old = table.find("a").unwrap();
        let new = load(&mut table, "a", 2).unwrap();
        assert_ne!((old.generation(), old.slot()), (new.generation(), new.slot()));
        assert_eq!(table.find("a").unwrap().generation(), new.generation());
        assert_eq!(table.freed(), Vec::<u32>::new());
        let copy = old.clone();
        drop(old);
        assert_eq!(table.freed(), Vec::<u32>::new());
        let slot = copy.slot();
        drop(copy);
        assert_eq!(table.freed(), [slot]);
        assert_eq!(table.freed(), Vec::<u32>::new());
        assert_eq!(load(&mut table, "b", 3).unwrap().slot(), slot);
        assert!(table.same(&wanted("a", 2)).is_some() && table.same(&wanted("a", 1)).is_none());
    }

    #[test]
    fn the_one_not_asked_for_the_longest_gives_way_unless_pinned() {
        let mut table = AdapterTable::new(3);
        for (content, name) in ["a", "b", "c"].into_iter().enumerate() {
            load(&mut table, name, content as u8).unwrap();
        }
        table.find("a").unwrap();
        table.pin("b", true).unwrap();
        load(&mut table, "d", 9).unwrap();
        assert_eq!(names(&table), ["a", "b", "d"]);
        table.pin("a", true).unwrap();
        table.pin("d", true).unwrap();
        assert!(matches!(load(&mut table, "e", 8), Err(AdapterRefused::Full(3))));
        assert_eq!(names(&table), ["a", "b", "d"]);
        // One of the same name takes its own place, pinned or not.
        load(&mut table, "a", 7).unwrap();
        assert_eq!(names(&table), ["b", "d", "a"]);
    }

    #[test]
    fn what_is_left_over_is_bounded() {
        let mut table = AdapterTable::new(2);
        let mut held = vec![load(&mut table, "a", 0).unwrap()];
        held.push(load(&mut table, "a", 1).unwrap());
        held.push(load(&mut table, "a", 2).unwrap());
        assert!(matches!(load(&mut table, "a", 3), Err(AdapterRefused::Draining(2))));
        held.remove(0);
        assert_eq!(table.freed().len(), 1);
        load(&mut table, "a", 3).unwrap();
        assert!(matches!(load(&mut AdapterTable::new(0), "a", 0), Err(AdapterRefused::Off)));
    }

    #[test]
    fn one_that_still_answers_comes_back_as_it_is() {
        let mut table = AdapterTable::new(1);
        load(&mut table, "a", 1).unwrap();
        let answering = table.find("a").unwrap();
        load(&mut table, "b", 2).unwrap();
        assert!(table.find("a").is_none());
        // There is one place, and one generation that was replaced answers: for others there is no room.
        assert!(matches!(load(&mut table, "a", 3), Err(AdapterRefused::Draining(1))));
        let back = load(&mut table, "a", 1).unwrap();
        assert_eq!((back.slot(), names(&table)), (answering.slot(), vec!["a".to_owned()]));
        drop((answering, back));
        assert_eq!(table.freed().len(), 1, "the other one's, which nobody uses");
        table.find("a").unwrap();
        assert_eq!(table.freed(), Vec::<u32>::new());
    }

    #[test]
    fn unloaded_ones_cannot_be_asked_for_and_unknown_ones_are_named() {
        let mut table = AdapterTable::new(2);
        load(&mut table, "a", 1).unwrap();
        table.unload("a").unwrap();
        assert!(table.find("a").is_none());
        assert_eq!(table.freed(), [0]);
        assert!(table.unload("a").unwrap_err().to_string().contains("\"a\""));
        assert!(table.pin("a", true).is_err());
        for name in ["", "a b", "a:b", "a@1", "a\n", "ft:a::1"] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        assert!(check_name("org/my-adapter.v2").is_ok());
        assert_eq!(split_generation("a@000000000000002f"), ("a", Some(AdapterGeneration(47))));
        for name in ["a@2f", "a@000000000000002g", "a"] {
            assert_eq!(split_generation(name), (name, None));
        }
    }
}
