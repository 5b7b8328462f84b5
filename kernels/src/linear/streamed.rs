//! The AMX path's 4-bit product for up to 32 rows: a panel is expanded and multiplied in one pass over `k`.
//!
//! With few rows an expanded panel is used once or twice, so expanding all of it first would leave the matrix unit idle, then wait for it.
//! Here the vector units expand step `s + 1` while the matrix unit multiplies step `s`; the sums stay in tmm0–3 from step to step,
//! which holds because compiled code never uses tile registers.

use std::arch::asm;
use std::arch::x86_64::*;

use super::avx512::Steps;
use crate::packed::INT4_BLOCK;

/// Activation tiles at most: one set of sums each.
pub(super) const TILES: usize = 4;
/// Bytes of scratch: steps that are on their way from the vector to the matrix unit.
const IN_FLIGHT: usize = 4 * 1024;

/// Multiplies `a` (one pointer per activation tile, each to one tile per 64 input features) by a 4-bit panel and stores the sums' tiles
/// one after the other to `out`. Lines of `ahead` are fetched as the panel's are used.
///
/// # Safety
/// The thread's tiles are configured; the AMX path runs on this machine; pointers as said, with `1 <= tiles <= TILES`; `scratch` is 64-byte
/// aligned.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn multiply(
    a: [*const u8; TILES],
    tiles: usize,
    panel: &[u8],
    ahead: *const u8,
    scratch: &mut [u8],
    out: *mut u8,
) {
    let steps = panel.as_chunks::<{ 2 * INT4_BLOCK }>().0;
    let scratch = scratch[..IN_FLIGHT].as_mut_ptr();
    // SAFETY: the caller's promise; each step's kilobyte lies in the scratch.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nostack, nomem));
        for (step, blocks) in steps.iter().enumerate() {
            for line in 0..2 * INT4_BLOCK / 64 {
                _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(step * 2 * INT4_BLOCK + line * 64).cast());
            }
            expand_step(blocks, scratch.add(step * 1024 % IN_FLIGHT));
            if step > 0 {
                multiply_step(a, tiles, step - 1, scratch);
            }
        }
        multiply_step(a, tiles, steps.len() - 1, scratch);
        asm!("tilestored [{out} + {row}], tmm0", "tilestored [{out} + {row} + 1024], tmm1",
            "tilestored [{out} + {row} + 2048], tmm2", "tilestored [{out} + {row} + 3072], tmm3",
            out = in(reg) out, row = in(reg) 64usize, options(nostack));
    }
}

/// # Safety
/// `to` has room for 1,024 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn expand_step(blocks: &[u8; 2 * INT4_BLOCK], to: *mut u8) {
    for (index, block) in blocks.as_chunks::<INT4_BLOCK>().0.iter().enumerate() {
        let steps = Steps::of(block);
        for eighth in 0..4 {
            let [even, odd] = steps.expand(block, eighth);
            // SAFETY: 512 bytes per block.
            unsafe {
                let to = to.add(index * 512 + eighth * 128);
                _mm512_storeu_si512(to.cast(), even);
                _mm512_storeu_si512(to.add(64).cast(), odd);
            }
        }
    }
}

/// # Safety
/// As [`multiply`]; the step was expanded.
#[inline]
unsafe fn multiply_step(a: [*const u8; TILES], tiles: usize, step: usize, scratch: *const u8) {
    // SAFETY: the caller's promise. Sums are kept in tmm0–3 on purpose: see the module text.
    unsafe {
        let b = scratch.add(step * 1024 % IN_FLIGHT);
        let [a0, a1, a2, a3] = a.map(|a| a.wrapping_add(step * 1024));
        match tiles {
            1 => asm!("tileloadd tmm6, [{b} + {row}]", "tileloadd tmm4, [{a0} + {row}]", "tdpbsud tmm0, tmm4, tmm6",
                b = in(reg) b, a0 = in(reg) a0, row = in(reg) 64usize,
                out("tmm0") _, out("tmm4") _, out("tmm6") _, options(nostack)),
            2 => asm!("tileloadd tmm6, [{b} + {row}]", "tileloadd tmm4, [{a0} + {row}]", "tdpbsud tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a1} + {row}]", "tdpbsud tmm1, tmm5, tmm6",
                b = in(reg) b, a0 = in(reg) a0, a1 = in(reg) a1, row = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, options(nostack)),
            3 => asm!("tileloadd tmm6, [{b} + {row}]", "tileloadd tmm4, [{a0} + {row}]", "tdpbsud tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a1} + {row}]", "tdpbsud tmm1, tmm5, tmm6",
                "tileloadd tmm7, [{a2} + {row}]", "tdpbsud tmm2, tmm7, tmm6",
                b = in(reg) b, a0 = in(reg) a0, a1 = in(reg) a1, a2 = in(reg) a2, row = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)),
            _ => asm!("tileloadd tmm6, [{b} + {row}]", "tileloadd tmm4, [{a0} + {row}]", "tdpbsud tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a1} + {row}]", "tdpbsud tmm1, tmm5, tmm6",
                "tileloadd tmm7, [{a2} + {row}]", "tdpbsud tmm2, tmm7, tmm6",
                "tileloadd tmm4, [{a3} + {row}]", "tdpbsud tmm3, tmm4, tmm6",
                b = in(reg) b, a0 = in(reg) a0, a1 = in(reg) a1, a2 = in(reg) a2, a3 = in(reg) a3, row = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                out("tmm7") _, options(nostack)),
        }
    }
}
