//! An adapter's factors as the products read them.

use std::ops::Range;

use super::PANEL;
use crate::aligned::AlignedBuf;
use crate::error::KernelError;
use crate::ops::LowRank;

const WHAT: &str = "an adapter";

/// The factors of one adapter, by site.
pub(in crate::cpu) struct PackedAdapter {
    sites: Vec<Option<PackedSite>>,
}

/// The updates of one linear. They share its input, so their `A`s are one matrix, `[ranks of all parts, k]`.
pub(super) struct PackedSite {
    pub k: usize,
    /// Ranks of all parts, padded to whole panels.
    pub width: usize,
    /// `[width / PANEL][k][PANEL]`
    pub a: AlignedBuf<f32>,
    pub parts: Vec<PackedPart>,
    /// The parts' `B`s, times their scales.
    pub b: AlignedBuf<f32>,
}

/// The update of some neighbouring columns.
pub(super) struct PackedPart {
    /// First column of the output, and how many.
    pub column: usize,
    pub n: usize,
    /// Its part of the ranks.
    pub ranks: Range<usize>,
    /// Where its `[n / PANEL, rounded up][rank][PANEL]` starts in `b`.
    pub b: usize,
}

impl PackedAdapter {
    /// Packs what [`crate::shapes::Shapes::adapter`] found good.
    pub fn pack(sites: &[Vec<LowRank<'_>>]) -> Result<Self, KernelError> {
        let pack = |site: &Vec<LowRank<'_>>| if site.is_empty() { Ok(None) } else { PackedSite::pack(site).map(Some) };
        Ok(PackedAdapter { sites: sites.iter().map(pack).collect::<Result<_, _>>()? })
    }

    pub(super) fn site(&self, site: usize) -> Option<&PackedSite> {
        self.sites.get(site)?.as_ref()
    }

    /// The largest padded rank of a site.
    pub fn width(&self) -> usize {
        self.sites.iter().flatten().map(|site| site.width).max().unwrap_or(0)
    }

    pub fn bytes(&self) -> usize {
        self.sites.iter().flatten().map(|site| site.a.bytes() + site.b.bytes()).sum()
    }
}

impl PackedSite {
    fn pack(parts: &[LowRank<'_>]) -> Result<Self, KernelError> {
        let k = parts.first().map_or(0, |part| part.k);
        let width = parts.iter().map(|part| part.rank).sum::<usize>().next_multiple_of(PANEL);
        let mut a = AlignedBuf::zeroed(width * k, WHAT)?;
        let b_len = parts.iter().map(|part| part.n.next_multiple_of(PANEL) * part.rank).sum();
        let mut b = AlignedBuf::zeroed(b_len, WHAT)?;
        let (mut packed, mut rank, mut at) = (Vec::with_capacity(parts.len()), 0, 0);
        for part in parts {
            for (j, row) in part.a.chunks_exact(k).enumerate() {
                let (panel, lane) = ((rank + j) / PANEL, (rank + j) % PANEL);
                for (i, &value) in row.iter().enumerate() {
                    a[(panel * k + i) * PANEL + lane] = value;
                }
            }
            for (n, row) in part.b.chunks_exact(part.rank).enumerate() {
                for (j, &value) in row.iter().enumerate() {
                    b[at + (n / PANEL * part.rank + j) * PANEL + n % PANEL] = value * part.scale;
                }
            }
            packed.push(PackedPart { column: part.column, n: part.n, ranks: rank..rank + part.rank, b: at });
            rank += part.rank;
            at += part.n.next_multiple_of(PANEL) * part.rank;
        }
        Ok(PackedSite { k, width, a, parts: packed, b })
    }
}
