//! The two products, a few rows at a time.

use super::packed::{PackedPart, PackedSite};
use super::{PANEL, Task};
use crate::cpu::attention::lanes::Lanes;

/// Sums of a row that are made side by side and added at the end: enough that one row alone hides the latency of an addition.
const CHAINS: usize = 4;

/// # Safety
/// As [`super::LoraCall::run_task`], with the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn run<L: Lanes>(task: &Task<'_>) {
    let mut done = 0;
    while done < task.rows.len() {
        let left = task.rows.len() - done;
        // SAFETY: the contract; `done + R` rows are within the task's.
        unsafe {
            if left >= 4 && L::N == PANEL {
                block::<L, 4>(task, done);
                done += 4;
            } else if left >= 2 {
                block::<L, 2>(task, done);
                done += 2;
            } else {
                block::<L, 1>(task, done);
                done += 1;
            }
        }
    }
}

/// `R` rows from `first` on.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn block<L: Lanes, const R: usize>(task: &Task<'_>, first: usize) {
    let Task { site, rows, x, x_stride, out, out_stride, sums } = *task;
    // SAFETY: the contract: rows are within the buffers, sums within the scratch.
    unsafe {
        let x: [*const f32; R] = std::array::from_fn(|r| x.add(rows[first + r] as usize * x_stride));
        let out: [*mut f32; R] = std::array::from_fn(|r| out.add(rows[first + r] as usize * out_stride));
        let sums: [*mut f32; R] = std::array::from_fn(|r| sums.add((first + r) * site.width));
        shrink::<L, R>(site, x, sums);
        for part in &site.parts {
            expand::<L, R>(site, part, sums, out);
        }
    }
}

/// `sums[r] = A x[r]`. Element `i` of the input goes to sum `i mod CHAINS`.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn shrink<L: Lanes, const R: usize>(site: &PackedSite, x: [*const f32; R], sums: [*mut f32; R]) {
    let k = site.k;
    for panel in 0..site.width / PANEL {
        for lane in (0..PANEL).step_by(L::N) {
            // SAFETY: `a` has `k` rows of `PANEL` in this panel; `x` has `k` elements, `sums` has `width`.
            unsafe {
                let a = site.a.as_ptr().add(panel * k * PANEL + lane);
                let mut chains = [[L::splat(0.0); R]; CHAINS];
                let whole = k / CHAINS * CHAINS;
                for i in (0..whole).step_by(CHAINS) {
                    for (c, chain) in chains.iter_mut().enumerate() {
                        add::<L, R>(chain, a, x, i + c);
                    }
                }
                for (c, chain) in chains.iter_mut().enumerate().take(k - whole) {
                    add::<L, R>(chain, a, x, whole + c);
                }
                let [p, q, s, t] = chains;
                for r in 0..R {
                    L::store(sums[r].add(panel * PANEL + lane), L::add(L::add(p[r], q[r]), L::add(s[r], t[r])));
                }
            }
        }
    }
}

/// `chain[r] += x[r][i] · a[i]`
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn add<L: Lanes, const R: usize>(chain: &mut [L::V; R], a: *const f32, x: [*const f32; R], i: usize) {
    // SAFETY: `i` is one of the input's elements.
    unsafe {
        let factor = L::load(a.add(i * PANEL));
        for (sum, x) in chain.iter_mut().zip(x) {
            *sum = L::fma(L::splat(*x.add(i)), factor, *sum);
        }
    }
}

/// `out[r][part's columns] += B sums[r]`, ranks ascending.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn expand<L: Lanes, const R: usize>(site: &PackedSite, part: &PackedPart, sums: [*mut f32; R], out: [*mut f32; R]) {
    let rank = part.ranks.len();
    for panel in 0..part.n.div_ceil(PANEL) {
        let columns = PANEL.min(part.n - panel * PANEL);
        for lane in (0..columns).step_by(L::N) {
            // SAFETY: `b` has `rank` rows of `PANEL` in this panel; the sums are initialised; columns are within the output.
            unsafe {
                let b = site.b.as_ptr().add(part.b + panel * rank * PANEL + lane);
                let mut update = [L::splat(0.0); R];
                for j in 0..rank {
                    let factor = L::load(b.add(j * PANEL));
                    for r in 0..R {
                        update[r] = L::fma(L::splat(*sums[r].add(part.ranks.start + j)), factor, update[r]);
                    }
                }
                for r in 0..R {
                    let to = out[r].add(part.column + panel * PANEL + lane);
                    if lane + L::N <= columns {
                        L::store(to, L::add(L::load(to), update[r]));
                    } else {
                        let mut last = [0f32; PANEL];
                        L::store(last.as_mut_ptr(), update[r]);
                        for (c, value) in last.iter().enumerate().take(columns - lane) {
                            *to.add(c) += value;
                        }
                    }
                }
            }
        }
    }
}
