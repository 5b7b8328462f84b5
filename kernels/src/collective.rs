//! Devices that compute one model together: each has a part of the weights, and all have what they exchange.
//!
//! A rank is one of them. Exchanges are collective: every rank asks for the same ones in the same order, and none is done before all have
//! asked. So a rank that fails would leave the others waiting; whoever learns of it calls [`Abort::abort`], and nobody waits for ever.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::KernelError;

/// Which of the ranks a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// From 0.
    pub rank: usize,
    /// All of them, ≥ 1.
    pub ranks: usize,
}

impl Place {
    /// A device that computes its model by itself.
    pub const ALONE: Place = Place { rank: 0, ranks: 1 };

    /// Whether there is nobody to exchange with.
    pub const fn is_alone(self) -> bool {
        self.ranks == 1
    }
}

/// Ends what ranks wait for each other with.
pub trait Abort: Send + Sync {
    /// Ends the exchange under way, and every later one, with an error on every rank. From any thread, and without waiting.
    fn abort(&self, why: &str);
}

/// How long a rank waits for the others before it breaks the exchange off. Longer than any step; a bound and no timing.
const PATIENCE: Duration = Duration::from_secs(300);

/// A rank among threads of one process, which exchange through its memory: how tests have several devices without a card.
#[derive(Debug)]
pub struct Member {
    place: Place,
    table: Arc<Table>,
}

/// Where members put what they exchange.
#[derive(Debug)]
pub struct Table {
    round: Mutex<Round>,
    changed: Condvar,
}

/// What an exchange is, and of how many numbers; the same for all ranks.
type Subject = (&'static str, usize);

#[derive(Debug, Default)]
struct Round {
    /// What each rank brought.
    parts: Vec<Option<Vec<f32>>>,
    subject: Option<Subject>,
    /// Ranks that have read what all brought.
    left: usize,
    aborted: Option<String>,
}

impl Member {
    /// The members of a new group.
    pub fn group(ranks: usize) -> Vec<Member> {
        let round = Round { parts: vec![None; ranks], ..Round::default() };
        let table = Arc::new(Table { round: Mutex::new(round), changed: Condvar::new() });
        (0..ranks).map(|rank| Member { place: Place { rank, ranks }, table: Arc::clone(&table) }).collect()
    }

    /// Which member it is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// To end the group's exchanges with.
    pub fn abort_handle(&self) -> Arc<dyn Abort> {
        self.table.clone()
    }

    /// `values` becomes the sum over all ranks, added in their order, so that all have the same bits.
    pub fn all_reduce(&self, values: &mut [f32]) -> Result<(), KernelError> {
        self.exchange(("all_reduce", values.len()), values.to_vec(), |parts| {
            values.fill(0.0);
            for part in parts {
                values.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
            }
        })
    }

    /// What each rank brought, one after the other.
    pub fn all_gather(&self, values: &[f32]) -> Result<Vec<f32>, KernelError> {
        let mut all = Vec::with_capacity(values.len() * self.place.ranks);
        self.exchange(("all_gather", values.len()), values.to_vec(), |parts| parts.for_each(|part| all.extend_from_slice(part)))?;
        Ok(all)
    }

    /// `values` become those that the first rank brought.
    pub fn broadcast(&self, values: &mut [u32]) -> Result<(), KernelError> {
        // Their bits travel, and nobody computes with them.
        let mine = values.iter().map(|value| f32::from_bits(*value)).collect();
        self.exchange(("broadcast", values.len()), mine, |parts| {
            let first = parts.next().unwrap_or_default();
            values.iter_mut().zip(first).for_each(|(value, bits)| *value = bits.to_bits());
        })
    }

    fn exchange(
        &self,
        subject: Subject,
        mine: Vec<f32>,
        take: impl FnOnce(&mut dyn Iterator<Item = &[f32]>),
    ) -> Result<(), KernelError> {
        let Place { rank, ranks } = self.place;
        // The round before is over when all have read it.
        let mut round = self.wait_until(self.table.lock(), |round| round.parts[rank].is_none())?;
        if *round.subject.get_or_insert(subject) != subject {
            let text = format!("rank {rank} asks for {subject:?} where others ask for {:?}", round.subject);
            drop(round);
            self.table.abort(&text);
            return Err(KernelError::Device(text));
        }
        round.parts[rank] = Some(mine);
        self.table.changed.notify_all();
        let mut round = self.wait_until(round, |round| round.parts.iter().all(Option::is_some))?;
        take(&mut round.parts.iter().flatten().map(Vec::as_slice));
        round.left += 1;
        if round.left == ranks {
            *round = Round { parts: vec![None; ranks], ..Round::default() };
            self.table.changed.notify_all();
        }
        Ok(())
    }

    fn wait_until<'a>(
        &self,
        mut round: MutexGuard<'a, Round>,
        come: impl Fn(&Round) -> bool,
    ) -> Result<MutexGuard<'a, Round>, KernelError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(why) = &round.aborted {
                return Err(KernelError::Device(format!("the exchange between ranks was broken off: {why}")));
            }
            if come(&round) {
                return Ok(round);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                round.aborted = Some(format!("rank {} waited {} s for the others", self.place.rank, PATIENCE.as_secs()));
                self.table.changed.notify_all();
                continue;
            }
            round = self.table.changed.wait_timeout(round, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Round> {
        // A rank that panicked put its part there whole or not at all.
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Abort for Table {
    fn abort(&self, why: &str) {
        self.lock().aborted.get_or_insert_with(|| why.to_owned());
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each rank of a group gets from `work`.
    fn each<T: Send>(ranks: usize, work: impl Fn(Member) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = Member::group(ranks).into_iter().map(|member| scope.spawn(|| work(member))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn all_ranks_have_the_same_sums_and_parts_round_after_round() {
        for ranks in [1, 2, 3, 4] {
            let outcomes = each(ranks, |member| {
                let rank = member.place().rank as f32;
                let mut seen = Vec::new();
                for round in 0..200u32 {
                    let mut values = [rank + 0.1, rank * round as f32];
                    member.all_reduce(&mut values).unwrap();
                    seen.extend(values);
                    seen.extend(member.all_gather(&[rank, -1.0]).unwrap());
                    let mut words = [round << 8 | member.place().rank as u32, u32::MAX - member.place().rank as u32];
                    member.broadcast(&mut words).unwrap();
                    assert_eq!(words, [round << 8, u32::MAX]);
                }
                seen
            });
            assert!(outcomes.iter().all(|seen| *seen == outcomes[0]));
            let parts: Vec<f32> = (0..ranks).flat_map(|rank| [rank as f32, -1.0]).collect();
            assert_eq!(outcomes[0][2..2 + 2 * ranks], parts);
            assert_eq!(outcomes[0][3 + 2 * ranks], (0..ranks).sum::<usize>() as f32);
        }
    }

    #[test]
    fn an_abort_ends_the_waiting_and_every_later_exchange() {
        let outcomes = each(3, |member| {
            if member.place().rank == 1 {
                std::thread::sleep(Duration::from_millis(20));
                member.abort_handle().abort("rank 1 is lost");
            }
            let first = member.all_reduce(&mut [1.0]).unwrap_err().to_string();
            (first, member.all_gather(&[1.0]).is_err())
        });
        assert!(outcomes.iter().all(|(first, later)| first.contains("rank 1 is lost") && *later), "{outcomes:?}");
    }

    #[test]
    fn ranks_that_ask_for_different_exchanges_are_told() {
        let outcomes = each(2, |member| match member.place().rank {
            0 => member.all_reduce(&mut [1.0]),
            _ => member.all_gather(&[1.0]).map(|_| ()),
        });
        assert!(outcomes.iter().all(Result::is_err));
    }
}
