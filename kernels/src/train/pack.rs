//! Operands rearranged into strips, in the order in which the inner loops read them.
//!
//! A strip is a few neighbouring *lines* of an operand (rows of the left one, columns of the right one) over a slice of the inner
//! dimension. Lines and steps that the operand does not have are zeros.

use std::ops::Range;

use super::operand::{Block, DECODE, Operand, View, decode};
use crate::cpu::attention::bf16;
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

/// Packs lines `lines` (whole strips, but for the last) of `count` over steps `steps` to `out`, strip after strip.
///
/// # Safety
/// The processor runs `level`. `out` is writable for the strips and aligned for vectors. The operand was checked to hold `count` lines
/// and all of `steps`; `scratch` holds [`scratch_len`] values. Stacks across want `lines.start` at a multiple of [`DECODE`].
pub(super) unsafe fn pack(
    level: Level,
    layout: Layout,
    source: Lines<'_>,
    count: usize,
    lines: Range<usize>,
    steps: Range<usize>,
    out: *mut u8,
    scratch: &mut [f32],
) {
    let width = layout.width();
    let lines = lines.start..lines.end.min(count);
    let strip = |line: usize| (line - lines.start) / width;
    let bytes = layout.strip_bytes(steps.len());
    // SAFETY: the caller's promise; parts lie within the strips.
    unsafe {
        match source {
            Lines::Along { data, stride } => {
                for first in lines.clone().step_by(width) {
                    let valid = (lines.end - first).min(width);
                    let part = Part { data: &data[first * stride + steps.start..], stride, valid, len: steps.len(), at: 0 };
                    part.write::<true>(level, layout, out.add(strip(first) * bytes));
                }
            }
            Lines::Across { data, stride } => {
                for first in lines.clone().step_by(width) {
                    let valid = (lines.end - first).min(width);
                    let part = Part { data: &data[steps.start * stride + first..], stride, valid, len: steps.len(), at: 0 };
                    part.write::<false>(level, layout, out.add(strip(first) * bytes));
                }
            }
            Lines::StackAlong { blocks, k } => {
                for first in lines.clone().step_by(width) {
                    let valid = (lines.end - first).min(width);
                    for begin in steps.clone().step_by(DECODE) {
                        let end = (begin + DECODE).min(steps.end);
                        decode(blocks, k, first..first + valid, begin..end, scratch, DECODE);
                        let part = Part { data: scratch, stride: DECODE, valid, len: end - begin, at: begin - steps.start };
                        part.write::<true>(level, layout, out.add(strip(first) * bytes));
                    }
                }
            }
            Lines::StackAcross { blocks, k } => {
                for group in lines.clone().step_by(DECODE) {
                    let group = group..(group + DECODE).min(lines.end);
                    for begin in steps.clone().step_by(TILE_K) {
                        let end = (begin + TILE_K).min(steps.end);
                        decode(blocks, k, begin..end, group.clone(), scratch, DECODE);
                        for first in group.clone().step_by(width) {
                            let valid = (group.end - first).min(width);
                            let data = &scratch[first - group.start..];
                            let part = Part { data, stride: DECODE, valid, len: end - begin, at: begin - steps.start };
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
    /// As [`Part::write`] on a processor with these.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
    unsafe fn write_avx512<const ALONG: bool>(self, layout: Layout, strip: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { self.write_body::<ALONG>(layout, strip) }
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
                Layout::Pairs => {
                    let padded = self.len.next_multiple_of(TILE_K);
                    let out = std::slice::from_raw_parts_mut(strip.cast::<u32>().add(self.at / 2 * 16), padded / 2 * 16);
                    self.pairs::<ALONG>(out);
                }
                Layout::Tiles => {
                    let padded = self.len.next_multiple_of(TILE_K);
                    let out = std::slice::from_raw_parts_mut(strip.cast::<u16>().add(self.at * 16), padded * 16);
                    self.tiles::<ALONG>(out);
                }
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

    /// `out [len / 2][16]` pairs of steps: the first in the low half.
    #[inline(always)]
    fn pairs<const ALONG: bool>(self, out: &mut [u32]) {
        let out = out.as_chunks_mut::<16>().0;
        let whole = self.len / 2;
        if self.valid < 16 || self.len < out.len() * 2 {
            out.fill([0; 16]);
        }
        if ALONG {
            for lane in 0..self.valid {
                let line = &self.data[lane * self.stride..][..self.len];
                for (pair, values) in out.iter_mut().zip(line.as_chunks::<2>().0) {
                    pair[lane] = join(values[0], values[1]);
                }
                if self.len % 2 == 1 {
                    out[whole][lane] = join(line[self.len - 1], 0.0);
                }
            }
        } else {
            for (p, pair) in out.iter_mut().enumerate().take(self.len.div_ceil(2)) {
                let low = &self.data[2 * p * self.stride..][..self.valid];
                if 2 * p + 1 < self.len {
                    let high = &self.data[(2 * p + 1) * self.stride..][..self.valid];
                    for ((out, low), high) in pair.iter_mut().zip(low).zip(high) {
                        *out = join(*low, *high);
                    }
                } else {
                    for (out, low) in pair.iter_mut().zip(low) {
                        *out = join(*low, 0.0);
                    }
                }
            }
        }
    }

    /// `out [len / 32][16][32]`.
    #[inline(always)]
    fn tiles<const ALONG: bool>(self, out: &mut [u16]) {
        if self.valid < 16 || !self.len.is_multiple_of(TILE_K) {
            out.fill(0);
        }
        for (tile, out) in out.as_chunks_mut::<{ 16 * TILE_K }>().0.iter_mut().enumerate() {
            let first = tile * TILE_K;
            let len = (self.len - first).min(TILE_K);
            if ALONG {
                for (lane, row) in out.as_chunks_mut::<TILE_K>().0.iter_mut().enumerate().take(self.valid) {
                    let line = &self.data[lane * self.stride + first..][..len];
                    for (out, value) in row.iter_mut().zip(line) {
                        *out = bf16(*value);
                    }
                }
            } else {
                for p in 0..len {
                    let line = &self.data[(first + p) * self.stride..][..self.valid];
                    for (lane, value) in line.iter().enumerate() {
                        out[lane * TILE_K + p] = bf16(*value);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn join(low: f32, high: f32) -> u32 {
    u32::from(bf16(low)) | u32::from(bf16(high)) << 16
}
