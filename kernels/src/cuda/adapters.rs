//! Low-rank adapters on the device: their factors, by slot, and what a step's rows get of them; see `kernels/cuda/lora.cu`.

use super::CudaBackend;
use super::device::{Address, Device, Kernel, Launch, Source};
use super::params::{self as p, LoraPart, LoraSite, all_bytes};
use super::room::Room;
use super::segments::TILE;
use crate::error::KernelError;
use crate::ops::{Buf, LowRank};

const SHRINK: Kernel = Kernel::new(Source::Lora, "lora_shrink", 256);
const EXPAND: Kernel = Kernel::new(Source::Lora, "lora_expand", 256);

/// Input features of a slice, ranks that a warp takes and warps of a block; output features of a block, and its shared memory.
const SLICE: usize = 512;
const RANKS: usize = 4;
const WARPS: usize = 8;
const COLUMNS: usize = 256;
const SHARED: usize = 32 * TILE * 4;
/// Tiles that are computed before the next: so many fill a card, and what lies between the two products stays small, in memory and in the
/// second-level cache.
const WAVE: usize = 64;
/// Floats that are read at once.
const QUAD: usize = 4;

/// An adapter: its memory, and for each site the place of its first factors and its parts.
#[derive(Default)]
struct Held {
    factors: Option<(Address, usize)>,
    sites: Vec<(Address, Vec<LoraPart>)>,
}

/// All adapters, by slot, and the tables that kernels find them by.
#[derive(Default)]
pub(super) struct Adapters {
    held: Vec<Held>,
    sites: Room,
    parts: Room,
    /// Between the two products.
    inner: Room,
    tables: Option<Tables>,
    widest: Vec<Widest>,
}

/// What kernels are told.
#[derive(Clone, Copy)]
struct Tables {
    /// `[slots, sites_per_slot]`
    sites: Address,
    parts: Address,
    sites_per_slot: usize,
}

/// The most that any adapter has at a site.
#[derive(Clone, Copy, Default)]
struct Widest {
    /// Of all parts together.
    ranks: usize,
    /// Of `COLUMNS` output features of one part.
    blocks: usize,
}

/// Appends floats, and zeros up to where a read of four may begin.
fn append(factors: &mut Vec<u8>, values: impl Iterator<Item = f32>) {
    factors.extend(values.flat_map(f32::to_le_bytes));
    factors.resize(factors.len().next_multiple_of(QUAD * 4), 0);
}

impl Adapters {
    /// Puts an adapter into a slot, in place of what was there.
    pub(super) fn load<D: Device>(&mut self, device: &mut D, slot: usize, sites: &[Vec<LowRank<'_>>]) -> Result<(), KernelError> {
        self.unload(device, slot);
        let mut factors = Vec::new();
        let mut held = Held::default();
        for parts in sites {
            // How far into the memory they begin; where that is, is not known yet.
            let a = Address(factors.len() as u64);
            for part in parts {
                part.a.chunks_exact(part.k).for_each(|row| append(&mut factors, row.iter().copied()));
            }
            let (mut list, mut first_rank) = (Vec::with_capacity(parts.len()), 0);
            for part in parts {
                let b = Address(factors.len() as u64);
                append(&mut factors, (0..part.rank).flat_map(|r| part.b.iter().skip(r).step_by(part.rank).copied()));
                let [column, n, rank] = [part.column, part.n, part.rank].map(|v| v as u32);
                list.push(LoraPart { b, column, n, rank, first_rank, scale: part.scale, unused: 0 });
                first_rank += rank;
            }
            held.sites.push((a, list));
        }
        if !factors.is_empty() {
            let at = device.alloc("adapters", factors.len())?;
            held.factors = Some((at, factors.len()));
            for (a, parts) in &mut held.sites {
                a.0 += at.0;
                parts.iter_mut().for_each(|part| part.b.0 += at.0);
            }
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

    /// How many there are.
    pub(super) fn loaded(&self) -> usize {
        self.held.iter().filter(|held| !held.sites.is_empty()).count()
    }

    /// The tables as they are now, on the device.
    fn tables<D: Device>(&mut self, device: &mut D) -> Result<Tables, KernelError> {
        if let Some(tables) = self.tables {
            return Ok(tables);
        }
        let sites_per_slot = self.held.iter().map(|a| a.sites.len()).max().unwrap_or(0).max(1);
        let (mut sites, mut parts) = (Vec::new(), Vec::new());
        self.widest.clear();
        self.widest.resize(sites_per_slot, Widest::default());
        for adapter in &self.held {
            for (site, widest) in self.widest.iter_mut().enumerate() {
                let (a, own) = adapter.sites.get(site).map_or((Address::NONE, &[][..]), |(a, own)| (*a, own));
                let ranks = own.iter().map(|part| part.rank).sum::<u32>();
                sites.push(LoraSite { a, first: parts.len() as u32, count: own.len() as u32, ranks, unused: 0 });
                parts.extend_from_slice(own);
                let blocks = own.iter().map(|part| (part.n as usize).div_ceil(COLUMNS)).sum();
                *widest = Widest { ranks: widest.ranks.max(ranks as usize), blocks: widest.blocks.max(blocks) };
            }
        }
        let sites = self.sites.write(device, "adapters", &all_bytes(&sites))?;
        let parts = self.parts.write(device, "adapters", &all_bytes(&parts))?;
        Ok(*self.tables.insert(Tables { sites, parts, sites_per_slot }))
    }

    /// The same, what is widest at a site of so many input features, and room for what `tiles` have between the two products.
    fn prepare<D: Device>(
        &mut self,
        device: &mut D,
        site: usize,
        k: usize,
        tiles: usize,
    ) -> Result<(Tables, Widest), KernelError> {
        let tables = self.tables(device)?;
        let widest = self.widest.get(site).copied().unwrap_or_default();
        let rows = tiles.min(WAVE) * TILE * k.div_ceil(SLICE);
        self.inner.reserve(device, "adapters", rows * widest.ranks.next_multiple_of(RANKS) * 4)?;
        Ok((tables, widest))
    }

    fn rooms(&self) -> [Room; 3] {
        [self.sites, self.parts, self.inner]
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        let factors = self.held.iter().filter_map(|a| a.factors).map(|(_, bytes)| bytes);
        factors.chain(self.rooms().map(|room| room.bytes)).sum()
    }

    /// How often the tables and the room have moved.
    pub(super) fn moves(&self) -> usize {
        self.rooms().map(|room| room.moves).iter().sum()
    }

    /// All memory, to be freed.
    pub(super) fn addresses(&self) -> impl Iterator<Item = Address> {
        let rooms = self.rooms().into_iter().filter(|room| room.bytes > 0).map(|room| room.at);
        self.held.iter().filter_map(|a| a.factors.map(|(at, _)| at)).chain(rooms)
    }
}

impl<D: Device> CudaBackend<D> {
    /// Sees to it that all is there that an update reads and writes: nothing may be reserved during a capture.
    pub(super) fn prepare_update(&mut self, x: Buf, site: usize) -> Result<(), KernelError> {
        let k = self.buffers[x.0 as usize].width;
        self.adapters.prepare(&mut self.device, site, k, self.lists.segments).map(|_| ())
    }

    /// Adds what the rows' adapters have for a site.
    pub(super) fn update(&mut self, x: Buf, site: usize, out: Buf) -> Result<(), KernelError> {
        let [k, out_width] = [x, out].map(|buf| self.buffers[buf.0 as usize].width);
        let all = self.lists.segments;
        let (tables, widest) = self.adapters.prepare(&mut self.device, site, k, all)?;
        self.stale(out);
        let items = widest.ranks.div_ceil(RANKS) * k.div_ceil(SLICE);
        for first in (0..all).step_by(WAVE) {
            let params = p::Lora {
                x: self.at(x),
                out: self.at(out),
                inner: self.adapters.inner.at,
                rows: self.lists.adapted,
                tiles: self.lists.tiles.plus(first * size_of::<p::LoraTile>()),
                sites: tables.sites,
                parts: tables.parts,
                sites_per_slot: tables.sites_per_slot as u32,
                site: site as u32,
                x_width: k as u32,
                out_width: out_width as u32,
                ranks: widest.ranks.next_multiple_of(RANKS) as u32,
                unused: 0,
            };
            let tiles = WAVE.min(all - first);
            self.launch(SHRINK, Launch::grid(tiles, items.div_ceil(WARPS)), params)?;
            self.launch(EXPAND, Launch::grid(tiles, widest.blocks).with_shared(SHARED), params)?;
        }
        Ok(())
    }
}
