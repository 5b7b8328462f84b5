//! NCCL: how the cards of a machine exchange what they compute, each from a thread of its own.
//!
//! Exchanges are asked for on a card's stream like everything else, and are captured with it.

use std::ffi::{c_int, c_void};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};

use super::device::Address;
use super::driver::Card;
use super::functions::{NcclFunctions, Outcome, words};
use super::libraries::Library;
use crate::collective::{Abort, Place};
use crate::error::KernelError;

/// The first for CUDA 12: 10,000 · major + 100 · minor + patch.
const OLDEST: c_int = 21_600;
/// How long cards may take to find each other.
const JOINING: Duration = Duration::from_secs(180);
/// How long a card that is given back waits for its part in the exchanges to end. Others may have to end theirs first.
const LEAVING: Duration = Duration::from_secs(2);

impl NcclFunctions {
    /// Errors say what is missing or too old, and what to install.
    fn of_today() -> Result<&'static Self, KernelError> {
        let functions = Self::find()?;
        let version = functions.number()?;
        if version < OLDEST {
            return Err(Library::Nccl.too_old(&format!("it is {}, cards need {}", dotted(version), dotted(OLDEST))));
        }
        Ok(functions)
    }

    fn number(&self) -> Result<c_int, KernelError> {
        let mut version = 0;
        // SAFETY: a number to write to.
        let outcome = unsafe { (self.version)(&raw mut version) };
        self.check("has no version", outcome)?;
        Ok(version)
    }

    fn check(&self, what: &str, outcome: Outcome) -> Result<(), KernelError> {
        if outcome == 0 {
            return Ok(());
        }
        // SAFETY: the library has a text that stays for every number, its own or "unknown".
        let words = unsafe { words((self.error_string)(outcome)) };
        Err(KernelError::Device(format!("NCCL {what}: {words} ({outcome})")))
    }
}

/// As people write it.
fn dotted(version: c_int) -> String {
    format!("{}.{}", version / 10_000, version % 10_000 / 100)
}

/// A card's place in the exchanges, until they are broken off.
struct Comm(ncclComm_t);

// SAFETY: the library may be called from any thread; the mutex around it keeps calls apart.
unsafe impl Send for Comm {}

/// What the cards that compute a model together share.
struct Group {
    functions: &'static NcclFunctions,
    comms: Vec<Mutex<Option<Comm>>>,
    aborted: OnceLock<String>,
}

impl Group {
    fn lock(&self, rank: usize) -> MutexGuard<'_, Option<Comm>> {
        // It holds a pointer or none.
        self.comms[rank].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For whoever breaks the exchanges off.
struct Breaker(Arc<Group>);

impl Abort for Breaker {
    fn abort(&self, why: &str) {
        self.0.aborted.get_or_init(|| why.to_owned());
        for rank in 0..self.0.comms.len() {
            leave(&self.0, rank);
        }
    }
}

/// Ends a rank's part in the exchanges, on a thread of its own: the call comes back when the card's kernels have seen it, other ranks have
/// ended theirs and every captured exchange is given back, which may be never. Returns what hears of it.
fn leave(group: &Arc<Group>, rank: usize) -> std::sync::mpsc::Receiver<()> {
    let (done, ended) = channel();
    let group = Arc::clone(group);
    let run = move || {
        // Whoever is inside an exchange has it; one that waits for a rank that left fails by that.
        if let Some(comm) = group.lock(rank).take() {
            // SAFETY: made once, and taken out by one. Nothing can be done about a failure.
            let _ = unsafe { (group.functions.abort)(comm.0) };
        }
        // Who does not wait any more does not hear it.
        let _ = done.send(());
    };
    // Without a thread the exchange stays as it is; the waiting for it is bounded.
    let _ = std::thread::Builder::new().name(format!("nccl-leaves-{rank}")).spawn(run);
    ended
}

/// A card's side of the exchanges.
pub(super) struct Communicator {
    group: Arc<Group>,
    place: Place,
}

impl Communicator {
    pub(super) fn place(&self) -> Place {
        self.place
    }

    /// The context of the card must be current, here and below.
    pub(super) fn all_reduce(&self, at: Address, count: usize, stream: CUstream) -> Result<(), KernelError> {
        let (float, sum) = (ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
        let place = at.0 as *mut c_void;
        // SAFETY: the backend reserved what it names; a sum may be made in place.
        self.exchange("all_reduce", |nccl, comm| unsafe {
            (nccl.all_reduce)(place, place, count, float, sum, comm, stream.cast())
        })
    }

    pub(super) fn all_gather(&self, from: Address, to: Address, count: usize, stream: CUstream) -> Result<(), KernelError> {
        let (from, to) = (from.0 as *const c_void, to.0 as *mut c_void);
        // SAFETY: the backend reserved what it names.
        self.exchange("all_gather", |nccl, comm| unsafe {
            (nccl.all_gather)(from, to, count, ncclDataType_t::ncclFloat32, comm, stream.cast())
        })
    }

    pub(super) fn broadcast(&self, at: Address, count: usize, stream: CUstream) -> Result<(), KernelError> {
        let (numbers, place) = (ncclDataType_t::ncclUint32, at.0 as *mut c_void);
        // SAFETY: the backend reserved what it names; what the first rank sends may lie where it comes to.
        self.exchange("broadcast", |nccl, comm| unsafe { (nccl.broadcast)(place, place, count, numbers, 0, comm, stream.cast()) })
    }

    fn exchange(&self, what: &str, call: impl FnOnce(&NcclFunctions, ncclComm_t) -> Outcome) -> Result<(), KernelError> {
        let Group { functions, aborted, .. } = &*self.group;
        match &*self.group.lock(self.place.rank) {
            Some(comm) => functions.check(what, call(functions, comm.0)),
            None => {
                let why = aborted.get().map_or("it was given back", String::as_str);
                Err(KernelError::Device(format!("the exchange between cards was broken off: {why}")))
            }
        }
    }

    /// Ends it. What was captured of it should be given back before.
    pub(super) fn close(&self) {
        // One that does not end in time ends when the other cards' do.
        let _ = leave(&self.group, self.place.rank).recv_timeout(LEAVING);
    }
}

/// Joins cards so that they compute a model together; a card's rank is its place in the list.
///
/// Errors: NCCL is missing or too old, or does not bring the cards together.
pub fn join(cards: Vec<Card>) -> Result<(Vec<Card>, Arc<dyn Abort>), KernelError> {
    let functions = NcclFunctions::of_today()?;
    let mut id = ncclUniqueId { internal: [0; 128] };
    // SAFETY: a structure to write to.
    functions.check("names no group", unsafe { (functions.unique_id)(&raw mut id) })?;
    let ranks = cards.len();
    let comms = (0..ranks).map(|_| Mutex::new(None)).collect();
    let group = Arc::new(Group { functions, comms, aborted: OnceLock::new() });
    let breaker = Breaker(Arc::clone(&group));
    let (joined, outcomes) = channel();
    for (rank, mut card) in cards.into_iter().enumerate() {
        let (group, joined) = (Arc::clone(&group), joined.clone());
        let run = move || {
            let mut comm: ncclComm_t = std::ptr::null_mut();
            let outcome = card.current().and_then(|()| {
                // SAFETY: a pointer to write to; the card's context is current, by which the library knows the card. The call returns
                // when all ranks have made it.
                functions.check("does not bring the cards together", unsafe {
                    (functions.init_rank)(&raw mut comm, ranks as c_int, id, rank as c_int)
                })
            });
            let outcome = outcome.map(|()| {
                *group.lock(rank) = Some(Comm(comm));
                card.join(Communicator { group, place: Place { rank, ranks } });
                card
            });
            // Who does not wait any more does not hear it.
            let _ = joined.send((rank, outcome));
        };
        std::thread::Builder::new().name(format!("nccl-joins-{rank}")).spawn(run)?;
    }
    drop(joined);
    let deadline = Instant::now() + JOINING;
    let mut found: Vec<Option<Card>> = (0..ranks).map(|_| None).collect();
    while found.iter().any(Option::is_none) {
        match outcomes.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((rank, Ok(card))) => found[rank] = Some(card),
            Ok((_, Err(error))) => {
                breaker.abort("a card did not join");
                return Err(error);
            }
            Err(ended) => {
                breaker.abort("cards did not join");
                let how = match ended {
                    RecvTimeoutError::Timeout => format!("did not find each other in {} s", JOINING.as_secs()),
                    RecvTimeoutError::Disconnected => "have a thread that failed".to_owned(),
                };
                return Err(KernelError::Device(format!("{ranks} cards {how}; NCCL_DEBUG=INFO shows what NCCL was doing")));
            }
        }
    }
    Ok((found.into_iter().flatten().collect(), Arc::new(breaker)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_written_as_people_write_them() {
        assert_eq!(dotted(21_805), "2.18");
        assert_eq!(dotted(OLDEST), "2.16");
    }

    #[test]
    fn where_it_is_there_it_says_its_version_and_where_not_what_to_install() {
        match NcclFunctions::of_today() {
            Ok(functions) => assert!(functions.number().unwrap() >= OLDEST),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("libnccl.so.2") && text.contains("nvidia-nccl"), "{text}");
                assert!(text.contains("--tensor-parallel 1"), "{text}");
            }
        }
    }
}
