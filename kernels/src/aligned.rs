//! Memory for vector loads: aligned to a cache line, zeroed, in huge pages when it is large.

use std::alloc::Layout;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::error::KernelError;

/// Types for which any bit pattern, zero included, is a value.
pub trait Pod: Copy + Send + Sync + 'static + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! pod {
    ($($t:ty),*) => { $(impl sealed::Sealed for $t {} impl Pod for $t {})* };
}
pod!(u8, i8, u16, i16, u32, i32, u64, i64, f32);

/// Alignment of every buffer: a cache line, which is also the widest vector and a row of a matrix tile.
pub const ALIGN: usize = 64;
/// From this size a buffer is mapped on its own, with huge pages asked for: weights are read in long streams, and 4 KiB pages
/// would cost a page walk every 64 cache lines.
const HUGE_FROM: usize = 4 << 20;
const HUGE_PAGE: usize = 2 << 20;

/// A fixed-size zero-initialised buffer, 64-byte aligned.
pub struct AlignedBuf<T: Pod> {
    ptr: NonNull<T>,
    len: usize,
    memory: Memory,
}

enum Memory {
    /// Nothing was allocated.
    Empty,
    Heap(Layout),
    #[cfg(target_os = "linux")]
    Mapped {
        base: *mut libc::c_void,
        bytes: usize,
    },
}

// SAFETY: the buffer owns its memory, and `T: Pod` is Send and Sync.
unsafe impl<T: Pod> Send for AlignedBuf<T> {}
// SAFETY: shared access only reads through `&self`.
unsafe impl<T: Pod> Sync for AlignedBuf<T> {}

impl<T: Pod> AlignedBuf<T> {
    /// `len` zeros. `what` names the buffer in the error.
    pub fn zeroed(len: usize, what: &'static str) -> Result<Self, KernelError> {
        let failed = |bytes| KernelError::Memory { what, bytes };
        let bytes =
            len.checked_mul(size_of::<T>()).filter(|b| *b <= isize::MAX as usize - HUGE_PAGE).ok_or(failed(usize::MAX))?;
        if bytes == 0 {
            return Ok(AlignedBuf { ptr: NonNull::dangling(), len: 0, memory: Memory::Empty });
        }
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_FROM {
            return Self::mapped(len, bytes).ok_or(failed(bytes));
        }
        let layout = Layout::from_size_align(bytes, ALIGN).map_err(|_| failed(bytes))?;
        // SAFETY: the layout is not empty.
        let raw = unsafe { std::alloc::alloc_zeroed(layout) };
        let ptr = NonNull::new(raw.cast::<T>()).ok_or(failed(bytes))?;
        Ok(AlignedBuf { ptr, len, memory: Memory::Heap(layout) })
    }

    /// An anonymous mapping with its start moved up to a huge page.
    #[cfg(target_os = "linux")]
    fn mapped(len: usize, bytes: usize) -> Option<Self> {
        let total = bytes + HUGE_PAGE;
        // SAFETY: a fresh private anonymous mapping touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                total,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        let offset = base.align_offset(HUGE_PAGE);
        // SAFETY: `offset < HUGE_PAGE`, so start and start + bytes lie in the mapping. Advice that fails changes nothing.
        let ptr = unsafe {
            let start = base.cast::<u8>().add(offset);
            libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
            NonNull::new_unchecked(start.cast::<T>())
        };
        Some(AlignedBuf { ptr, len, memory: Memory::Mapped { base, bytes: total } })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// The start, for kernels that share the buffer between threads by disjoint ranges. Writing through it while a reference
    /// to the same elements lives is undefined.
    pub fn as_shared_ptr(&self) -> *mut T {
        self.ptr.as_ptr()
    }
}

impl<T: Pod> Drop for AlignedBuf<T> {
    fn drop(&mut self) {
        match self.memory {
            Memory::Empty => {}
            // SAFETY: allocated with this layout in `zeroed`.
            Memory::Heap(layout) => unsafe { std::alloc::dealloc(self.ptr.as_ptr().cast(), layout) },
            #[cfg(target_os = "linux")]
            // SAFETY: mapped with this base and length in `mapped`.
            Memory::Mapped { base, bytes } => unsafe {
                libc::munmap(base, bytes);
            },
        }
    }
}

impl<T: Pod> Deref for AlignedBuf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised elements, owned by self.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: `len` initialised elements, owned by self and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_buffers_are_aligned_zeroed_and_writable() {
        for len in [0usize, 1, 63, 4096, (HUGE_FROM / 4) - 1, HUGE_FROM / 4, HUGE_FROM / 4 + 1000] {
            let mut buf = AlignedBuf::<f32>::zeroed(len, "test").unwrap();
            assert_eq!(buf.len(), len);
            assert!(buf.iter().all(|v| v.to_bits() == 0));
            if len > 0 {
                assert_eq!(buf.as_ptr() as usize % ALIGN, 0);
                buf[len - 1] = 1.5;
                assert_eq!(buf[len - 1], 1.5);
            }
        }
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        assert!(matches!(AlignedBuf::<f32>::zeroed(usize::MAX / 2, "test"), Err(KernelError::Memory { what: "test", .. })));
    }
}
