//! Memory for vector loads: aligned to a cache line, zeroed, in huge pages when it is large.

use std::alloc::Layout;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

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
/// Size of an arena's mappings.
const ARENA_PIECE: usize = 32 << 20;

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
    /// A part of a mapping that lives as long as its parts.
    Mapped {
        _whole: Arc<Mapping>,
    },
}

/// An anonymous mapping of zeros, from which huge pages were asked for.
struct Mapping {
    base: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: an address range; who may touch which part is the business of the buffers cut from it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `bytes` zeros that start on a huge page, and where.
    fn new(bytes: usize) -> Option<(Mapping, NonNull<u8>)> {
        let total = bytes.checked_add(HUGE_PAGE)?;
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
        // SAFETY: `offset < HUGE_PAGE`, so start and start + bytes lie in the mapping, which is not at address 0. Advice that fails
        // changes nothing.
        let start = unsafe {
            let start = base.cast::<u8>().add(offset);
            #[cfg(target_os = "linux")]
            libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
            NonNull::new_unchecked(start)
        };
        Some((Mapping { base, bytes: total }, start))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this base and length in `new`; no buffer cut from it is left.
        unsafe { libc::munmap(self.base, self.bytes) };
    }
}

/// Puts buffers side by side into huge pages. A model has hundreds of matrices, most of them smaller than a huge page; on pages of
/// their own, reading them would stop at a page walk every 4 KiB, where the hardware's prefetching stops too.
#[derive(Default)]
pub struct Arena {
    /// The mapping in use, and the start and length of what is left of it.
    current: Option<(Arc<Mapping>, NonNull<u8>, usize)>,
}

// SAFETY: the pointer is into the mapping that is held beside it, to memory that nobody else has been given.
unsafe impl Send for Arena {}
// SAFETY: nothing can be done with a shared reference.
unsafe impl Sync for Arena {}

impl Arena {
    /// `len` zeros. `what` names the buffer in the error.
    pub fn zeroed<T: Pod>(&mut self, len: usize, what: &'static str) -> Result<AlignedBuf<T>, KernelError> {
        let bytes = size_in_bytes::<T>(len, what)?;
        if bytes == 0 {
            return AlignedBuf::zeroed(0, what);
        }
        // Whole lines, so that the next buffer is aligned too.
        let taken = bytes.next_multiple_of(ALIGN);
        let (whole, start, left) = match self.current.take() {
            Some(current) if current.2 >= taken => current,
            _ => {
                let size = taken.max(ARENA_PIECE);
                let (whole, start) = Mapping::new(size).ok_or(KernelError::Memory { what, bytes })?;
                (Arc::new(whole), start, size)
            }
        };
        // SAFETY: `taken <= left`, the bytes from `start` on.
        let rest = unsafe { start.add(taken) };
        self.current = Some((Arc::clone(&whole), rest, left - taken));
        Ok(AlignedBuf { ptr: start.cast(), len, memory: Memory::Mapped { _whole: whole } })
    }

    /// A copy of `buf` in this arena.
    pub fn copy<T: Pod>(&mut self, buf: &AlignedBuf<T>, what: &'static str) -> Result<AlignedBuf<T>, KernelError> {
        let mut copy = self.zeroed(buf.len(), what)?;
        copy.copy_from_slice(buf);
        Ok(copy)
    }
}

/// Bytes of `len` elements, if a buffer can have as many.
fn size_in_bytes<T>(len: usize, what: &'static str) -> Result<usize, KernelError> {
    let bytes = len.checked_mul(size_of::<T>()).filter(|b| *b <= isize::MAX as usize - HUGE_PAGE);
    bytes.ok_or(KernelError::Memory { what, bytes: usize::MAX })
}

// SAFETY: the buffer owns its memory, and `T: Pod` is Send and Sync.
unsafe impl<T: Pod> Send for AlignedBuf<T> {}
// SAFETY: shared access only reads through `&self`.
unsafe impl<T: Pod> Sync for AlignedBuf<T> {}

impl<T: Pod> AlignedBuf<T> {
    /// `len` zeros. `what` names the buffer in the error.
    pub fn zeroed(len: usize, what: &'static str) -> Result<Self, KernelError> {
        let failed = |bytes| KernelError::Memory { what, bytes };
        let bytes = size_in_bytes::<T>(len, what)?;
        if bytes == 0 {
            return Ok(AlignedBuf { ptr: NonNull::dangling(), len: 0, memory: Memory::Empty });
        }
        if bytes >= HUGE_FROM {
            let (whole, start) = Mapping::new(bytes).ok_or(failed(bytes))?;
            return Ok(AlignedBuf { ptr: start.cast(), len, memory: Memory::Mapped { _whole: Arc::new(whole) } });
        }
        let layout = Layout::from_size_align(bytes, ALIGN).map_err(|_| failed(bytes))?;
        // SAFETY: the layout is not empty.
        let raw = unsafe { std::alloc::alloc_zeroed(layout) };
        let ptr = NonNull::new(raw.cast::<T>()).ok_or(failed(bytes))?;
        Ok(AlignedBuf { ptr, len, memory: Memory::Heap(layout) })
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
            Memory::Empty | Memory::Mapped { .. } => {}
            // SAFETY: allocated with this layout in `zeroed`.
            Memory::Heap(layout) => unsafe { std::alloc::dealloc(self.ptr.as_ptr().cast(), layout) },
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
    fn buffers_of_an_arena_are_apart_and_outlive_it() {
        let mut arena = Arena::default();
        let lens = [1usize, 0, 63, 4096, ARENA_PIECE / 4 - 1, 17, ARENA_PIECE / 4 + 5, 1000];
        let mut bufs: Vec<AlignedBuf<f32>> = lens.iter().map(|len| arena.zeroed(*len, "test").unwrap()).collect();
        for (i, (buf, len)) in bufs.iter_mut().zip(lens).enumerate() {
            assert!(buf.len() == len && (len == 0 || (buf.as_ptr() as usize).is_multiple_of(ALIGN)));
            assert!(buf.iter().all(|v| v.to_bits() == 0));
            buf.fill(i as f32 + 1.0);
        }
        let copy = arena.copy(&bufs[3], "test").unwrap();
        drop(arena);
        bufs.swap_remove(0);
        for buf in &bufs {
            assert!(buf.iter().all(|v| *v == buf[0]));
        }
        assert_eq!((copy.len(), copy[0], copy[4095]), (4096, 4.0, 4.0));
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        let huge = [AlignedBuf::<f32>::zeroed(usize::MAX / 2, "test"), Arena::default().zeroed(usize::MAX / 2, "test")];
        assert!(huge.iter().all(|huge| matches!(huge, Err(KernelError::Memory { what: "test", .. }))));
    }
}
