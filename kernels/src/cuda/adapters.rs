//! Low-rank adapters on the device.

use super::device::{Address, Device};
use super::float_bytes;
use super::params::{LoraPart, LoraSite, all_bytes};
use super::room::Room;
use crate::error::KernelError;
use crate::ops::LowRank;

/// An adapter: its memory, and for each site its parts.
#[derive(Default)]
struct Held {
    factors: Option<(Address, usize)>,
    sites: Vec<Vec<LoraPart>>,
}

/// All adapters, by slot, and the tables that kernels find them by.
#[derive(Default)]
pub(super) struct Adapters {
    held: Vec<Held>,
    sites: Room,
    parts: Room,
    tables: Option<Tables>,
}

/// What kernels are told.
#[derive(Clone, Copy)]
pub(super) struct Tables {
    /// `[slots, sites_per_slot]`
    pub sites: Address,
    pub parts: Address,
    pub sites_per_slot: usize,
    /// The largest rank.
    pub most_rank: usize,
}

impl Adapters {
    /// Puts an adapter into a slot, in place of what was there.
    pub(super) fn load<D: Device>(&mut self, device: &mut D, slot: usize, sites: &[Vec<LowRank<'_>>]) -> Result<(), KernelError> {
        self.unload(device, slot);
        let mut factors = Vec::new();
        let mut held = Held::default();
        for parts in sites {
            let mut list = Vec::with_capacity(parts.len());
            for part in parts {
                // How far into the memory they begin; where that is, is not known yet.
                let [a, b] = [part.a, part.b].map(|values| {
                    let start = factors.len();
                    factors.extend_from_slice(&float_bytes(values));
                    Address(start as u64)
                });
                let [column, n, k, rank] = [part.column, part.n, part.k, part.rank].map(|v| v as u32);
                list.push(LoraPart { a, b, column, n, k, rank, scale: part.scale, unused: 0 });
            }
            held.sites.push(list);
        }
        if !factors.is_empty() {
            let at = device.alloc("adapters", factors.len())?;
            held.factors = Some((at, factors.len()));
            held.sites.iter_mut().flatten().flat_map(|part| [&mut part.a, &mut part.b]).for_each(|place| place.0 += at.0);
        }
        if self.held.len() <= slot {
            self.held.resize_with(slot + 1, Held::default);
        }
        let at = held.factors;
        self.held[slot] = held;
        at.map_or(Ok(()), |(at, _)| device.write(at, &factors))
    }

    /// Empties a slot and frees its memory.
    pub(super) fn unload<D: Device>(&mut self, device: &mut D, slot: usize) {
        self.tables = None;
        if let Some((at, _)) = self.held.get_mut(slot).and_then(|held| std::mem::take(held).factors) {
            device.free(at);
        }
    }

    /// The tables as they are now, on the device.
    pub(super) fn tables<D: Device>(&mut self, device: &mut D) -> Result<Tables, KernelError> {
        if let Some(tables) = self.tables {
            return Ok(tables);
        }
        let sites_per_slot = self.held.iter().map(|a| a.sites.len()).max().unwrap_or(0).max(1);
        let (mut sites, mut parts, mut most_rank) = (Vec::new(), Vec::new(), 0);
        for adapter in &self.held {
            for site in 0..sites_per_slot {
                let own = adapter.sites.get(site).map_or(&[][..], Vec::as_slice);
                sites.push(LoraSite { first: parts.len() as u32, count: own.len() as u32 });
                parts.extend_from_slice(own);
                most_rank = own.iter().map(|part| part.rank as usize).fold(most_rank, usize::max);
            }
        }
        let sites = self.sites.write(device, "adapters", &all_bytes(&sites))?;
        let parts = self.parts.write(device, "adapters", &all_bytes(&parts))?;
        Ok(*self.tables.insert(Tables { sites, parts, sites_per_slot, most_rank }))
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.held.iter().filter_map(|a| a.factors).map(|(_, bytes)| bytes).sum::<usize>() + self.sites.bytes + self.parts.bytes
    }

    /// How often the tables have moved.
    pub(super) fn moves(&self) -> usize {
        self.sites.moves + self.parts.moves
    }

    /// All memory, to be freed.
    pub(super) fn addresses(&self) -> impl Iterator<Item = Address> {
        let rooms = [self.sites, self.parts].into_iter().filter(|room| room.bytes > 0).map(|room| room.at);
        self.held.iter().filter_map(|a| a.factors.map(|(at, _)| at)).chain(rooms)
    }
}
