//! Operands rearranged into strips, in the order in which the inner loops read them.
//!
//! A strip is a few neighbouring *lines* of an operand (rows of the left one, columns of the right one) over a slice of the inner
//! dimension. Lines and steps that the operand does not have are zeros.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;

use std::ops::Range;

use super::operand::{Block, DECODE, Operand, View, decode};
use crate::cpu::elementwise::Level;

/// Steps of the inner dimension that one bf16 tile covers; slices are multiples of it.
pub(super) const TILE_K: usize = 32;

/// How a strip lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// f32 `[k][width]`.
    Lanes(usize),
    /// bf16 `[k / 2][16][2]`: the right operand of a matrix-unit tile.
    Pairs,
    /// bf16 `[k / 32][16][32]`: the left operand of a matrix-unit tile.
    Tiles,
}

impl Layout {
    /// Lines per strip.
    pub fn width(self) -> usize {
        match self {
            Layout::Lanes(width) => width,
            Layout::Pairs | Layout::Tiles => 16,
        }
    }

    /// `k` steps, rounded up to whole tiles where strips have them.
    pub fn whole(self, k: usize) -> usize {
        match self {
            Layout::Lanes(_) => k,
            Layout::Pairs | Layout::Tiles => k.next_multiple_of(TILE_K),
        }
    }

    /// Bytes of a strip over `k` steps.
    pub fn strip_bytes(self, k: usize) -> usize {
        match self {
            Layout::Lanes(width) => k * width * 4,
            Layout::Pairs | Layout::Tiles => k.next_multiple_of(TILE_K) * 16 * 2,
        }
    }
}

/// An operand as lines over the inner dimension.
#[derive(Clone, Copy)]
pub(super) enum Lines<'a> {
    /// Element `(line, step)` is `data[line * stride + step]`.
    Along { data: &'a [f32], stride: usize },
    /// Element `(line, step)` is `data[step * stride + line]`.
    Across { data: &'a [f32], stride: usize },
    /// Lines are rows of the stack, `k` steps long.
    StackAlong { blocks: &'a [Block<'a>], k: usize },
    /// Steps are rows of the stack; there are `k` lines.
    StackAcross { blocks: &'a [Block<'a>], k: usize },
}

impl<'a> Lines<'a> {
    /// The rows of a left operand.
    pub fn of_left(view: View<'a>) -> Self {
        match view {
            View::Rows { data, stride } => Lines::Along { data, stride },
            View::Columns { data, stride } => Lines::Across { data, stride },
        }
    }

    /// The columns of a right operand `[k, n]`.
    pub fn of_right(operand: Operand<'a>, k: usize, n: usize) -> Self {
        match operand {
            Operand::View(View::Rows { data, stride }) => Lines::Across { data, stride },
            Operand::View(View::Columns { data, stride }) => Lines::Along { data, stride },
            Operand::Stack(blocks) => Lines::StackAcross { blocks, k: n },
            Operand::StackT(blocks) => Lines::StackAlong { blocks, k },
        }
    }
}

/// Packs lines `lines` (whole strips, but for the last) over `steps` steps to `out`, strip after strip, each `bytes` from the one before.
///
/// # Safety
/// The processor runs `level`. `out` is writable for the strips and aligned for vectors. The operand was checked to hold the lines
/// and all of `steps`; `scratch` holds [`scratch_len`] values. Stacks across want `lines.start` at a multiple of [`DECODE`].
pub(super) unsafe fn pack(
    level: Level,
    layout: Layout,
    source: Lines<'_>,
    lines: Range<usize>,
    steps: usize,
    out: *mut u8,
    bytes: usize,
    scratch: &mut [f32],
) {
    let width = layout.width();
    let strip = |line: usize| (line - lines.start) / width;
    // SAFETY: the caller's promise; parts lie within the strips.
    unsafe {
        match source {
            Lines::Along { data, stride } => {
                for first in lines.clone().step_by(width) {
                    let valid = (lines.end - first).min(width);
                    let part = Part { data: &data[first * stride..], stride, valid, len: steps, at: 0 };
                    part.write::<true>(level, layout, out.add(strip(first) * bytes));
                }
            }
            Lines::Across { data, stride } => {
                // A few steps of all strips at a time: neighbouring strips read neighbouring memory.
                for begin in (0..steps).step_by(TILE_K) {
                    let len = TILE_K.min(steps - begin);
                    for first in lines.clone().step_by(width) {
                        let valid = (lines.end - first).min(width);
                        let part = Part { data: &data[begin * stride + first..], stride, valid, len, at: begin };
                        part.write::<false>(level, layout, out.add(strip(first) * bytes));
                    }
                }
            }
            Lines::StackAlong { blocks, k } => {
                for first in lines.clone().step_by(width) {
                    let valid = (lines.end - first).min(width);
                    for begin in (0..steps).step_by(DECODE) {
                        let end = (begin + DECODE).min(steps);
                        decode(level, blocks, k, first..first + valid, begin..end, scratch, DECODE);
                        let part = Part { data: scratch, stride: DECODE, valid, len: end - begin, at: begin };
                        part.write::<true>(level, layout, out.add(strip(first) * bytes));
                    }
                }
            }
            Lines::StackAcross { blocks, k } => {
                for group in lines.clone().step_by(DECODE) {
                    let group = group..(group + DECODE).min(lines.end);
                    for begin in (0..steps).step_by(TILE_K) {
                        let end = (begin + TILE_K).min(steps);
                        decode(level, blocks, k, begin..end, group.clone(), scratch, DECODE);
                        for first in group.clone().step_by(width) {
                            let valid = (group.end - first).min(width);
                            let data = &scratch[first - group.start..];
                            let part = Part { data, stride: DECODE, valid, len: end - begin, at: begin };
                            part.write::<false>(level, layout, out.add(strip(first) * bytes));
                        }
                    }
                }
            }
        }
    }
}

/// Values of scratch that [`pack`] needs.
pub(super) const fn scratch_len() -> usize {
    TILE_K * DECODE
}

/// Some steps of one strip.
#[derive(Clone, Copy)]
struct Part<'a> {
    data: &'a [f32],
    stride: usize,
    /// Lines that exist.
    valid: usize,
    /// Steps.
    len: usize,
    /// First of them within the strip; a multiple of [`TILE_K`].
    at: usize,
}

impl Part<'_> {
    /// # Safety
    /// As [`pack`]; `strip` is the strip's start.
    unsafe fn write<const ALONG: bool>(self, level: Level, layout: Layout, strip: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe {
            match level {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => self.write_avx512::<ALONG>(layout, strip),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => self.write_avx2::<ALONG>(layout, strip),
                _ => self.write_body::<ALONG>(layout, strip),
            }
        }
    }

    /// # Safety
    /// As [`Part::write`] on a processor with these; with a matrix unit, which the bf16 layouts are for, it converts to bf16, too.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
    unsafe fn write_avx512<const ALONG: bool>(self, layout: Layout, strip: *mut u8) {
        // SAFETY: the caller's promise; steps `at..at + len` of the strip.
        unsafe {
            match layout {
                Layout::Tiles => self.tiles::<ALONG>(strip.cast::<u16>().add(self.at * 16)),
                Layout::Pairs => self.pairs::<ALONG>(strip.cast::<u32>().add(self.at / 2 * 16)),
                Layout::Lanes(12) if ALONG => self.lanes_along::<12>(strip.cast::<f32>().add(self.at * 12)),
                Layout::Lanes(32) if ALONG => self.lanes_along::<32>(strip.cast::<f32>().add(self.at * 32)),
                _ => self.write_body::<ALONG>(layout, strip),
            }
        }
    }

    /// # Safety
    /// As [`Part::write`] on a processor with these.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    unsafe fn write_avx2<const ALONG: bool>(self, layout: Layout, strip: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { self.write_body::<ALONG>(layout, strip) }
    }

    /// # Safety
    /// As [`Part::write`].
    #[inline(always)]
    unsafe fn write_body<const ALONG: bool>(self, layout: Layout, strip: *mut u8) {
        let width = layout.width();
        // SAFETY: steps `at..at + len` of the strip, rounded up to whole tiles in bf16.
        unsafe {
            match layout {
                Layout::Lanes(_) => {
                    let out = std::slice::from_raw_parts_mut(strip.cast::<f32>().add(self.at * width), self.len * width);
                    match width {
                        32 => self.lanes::<ALONG, 32>(out),
                        16 => self.lanes::<ALONG, 16>(out),
                        12 => self.lanes::<ALONG, 12>(out),
                        8 => self.lanes::<ALONG, 8>(out),
                        6 => self.lanes::<ALONG, 6>(out),
                        _ => self.lanes::<ALONG, 4>(out),
                    }
                }
                // Written by [`Self::write_avx512`] alone: a matrix unit has these around it.
                Layout::Pairs | Layout::Tiles => {}
            }
        }
    }

    #[inline(always)]
    fn lanes<const ALONG: bool, const WIDTH: usize>(self, out: &mut [f32]) {
        let out = out.as_chunks_mut::<WIDTH>().0;
        if self.valid < WIDTH {
            out.fill([0.0; WIDTH]);
        }
        if ALONG {
            for lane in 0..self.valid {
                let line = &self.data[lane * self.stride..][..self.len];
                for (step, value) in out.iter_mut().zip(line) {
                    step[lane] = *value;
                }
            }
        } else if self.valid == WIDTH {
            for (p, step) in out.iter_mut().enumerate() {
                step.copy_from_slice(&self.data[p * self.stride..][..WIDTH]);
            }
        } else {
            for (p, step) in out.iter_mut().enumerate() {
                step[..self.valid].copy_from_slice(&self.data[p * self.stride..][..self.valid]);
            }
        }
    }
}
