//! Low-rank updates: `out[r] += scale · B (A x[r])`, each row by the factors of its own adapter.
//!
//! Rows are grouped by adapter; a task takes a few rows of one group through both products, so that the small product in between
//! stays in the nearest cache. A row's sums are always made in one order, whichever rows are computed beside it.

mod packed;
mod plan;
mod tile;

pub(super) use packed::PackedAdapter;
pub(super) use plan::LoraPlan;

use self::packed::PackedSite;
use self::plan::Group;
use super::attention::lanes::Portable;
use super::elementwise::Level;
use super::holdings::Buffer;

/// Columns of a panel of factors: the widest vector.
const PANEL: usize = 16;
/// Most rows of one task.
const GROUP_ROWS: usize = 32;

/// Floats of scratch that a thread needs for adapters whose sites have up to `width` padded ranks.
pub(super) fn scratch_len(width: usize) -> usize {
    GROUP_ROWS * width
}

/// One site's update of a step.
pub(super) struct LoraCall<'a> {
    pub level: Level,
    pub adapters: &'a [Option<PackedAdapter>],
    pub plan: &'a LoraPlan,
    pub site: usize,
    pub x: &'a Buffer,
    pub out: &'a Buffer,
}

/// The pointers of a task.
struct Task<'a> {
    site: &'a PackedSite,
    rows: &'a [u32],
    x: *const f32,
    x_stride: usize,
    out: *mut f32,
    out_stride: usize,
    /// `[rows, site.width]`
    sums: *mut f32,
}

impl LoraCall<'_> {
    /// Runs task `task` of the plan.
    ///
    /// # Safety
    /// - The processor has the instructions of `level`.
    /// - `plan` was built for this step, whose rows `x` and `out` have; their widths were checked against the adapters' sites.
    /// - `task < plan.tasks()`, each task runs once; nobody else touches its rows of `out`, nobody writes its rows of `x`.
    /// - `scratch` is as long as [`scratch_len`] says for every loaded adapter.
    pub unsafe fn run_task(&self, task: usize, scratch: &mut [f32]) {
        let Group { slot, first, rows } = self.plan.group(task);
        let adapter = self.adapters.get(slot as usize).and_then(Option::as_ref);
        let Some(site) = adapter.and_then(|adapter| adapter.site(self.site)) else { return };
        debug_assert!(rows * site.width <= scratch.len());
        let task = Task {
            site,
            rows: self.plan.rows(first, rows),
            x: self.x.start(),
            x_stride: self.x.stride,
            out: self.out.start(),
            out_stride: self.out.stride,
            sums: scratch.as_mut_ptr(),
        };
        // SAFETY: the contract.
        unsafe {
            match self.level {
                Level::Portable => tile::run::<Portable>(&task),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => x86::avx2(&task),
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => x86::avx512(&task),
                #[cfg(not(target_arch = "x86_64"))]
                _ => tile::run::<Portable>(&task),
            }
        }
    }
}

/// One function per level, so that the generic body is compiled for its instructions.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::attention::lanes::{Avx2, Avx512};
    use super::{Task, tile};

    macro_rules! level {
        ($name:ident, $features:literal, $lanes:ty) => {
            #[target_feature(enable = $features)]
            pub unsafe fn $name(task: &Task<'_>) {
                // SAFETY: the contract of `LoraCall::run_task`.
                unsafe { tile::run::<$lanes>(task) }
            }
        };
    }

    level!(avx2, "avx2,fma", Avx2);
    level!(avx512, "avx512f,avx512bw,avx512vl,avx512dq,fma", Avx512);
}
