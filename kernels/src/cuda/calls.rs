//! The calls of NVIDIA's driver that we make, one method for each, and nothing else in them: so that all that is behind them, a card with
//! its captures, copies and memory, runs in tests over a driver that is not there.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUevent, CUfunction, CUgraph, CUgraphExec, CUmodule, CUresult, CUstream,
};

use super::device::{Address, Pieces, Product};
use super::functions::{DriverFunctions, Outcome, words};
use super::product::Products;
use crate::error::KernelError;

/// A call that was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallError {
    /// The driver's number of the reason, as it comes: a later driver has more of them than the bindings' enumeration.
    pub code: u32,
    /// The driver's name for it.
    pub name: String,
    /// The driver's own words.
    pub words: String,
}

const OUT_OF_MEMORY: u32 = CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32;
const NOT_READY: u32 = CUresult::CUDA_ERROR_NOT_READY as u32;

/// Any call may find no memory, as a driver loads kernels when they are first asked for or launched (12.2 and later) and brings graphs to the card
/// when they are: the card is none the worse for that.
pub(super) fn failed(what: &'static str, e: CallError) -> KernelError {
    match e.code {
        OUT_OF_MEMORY => KernelError::Memory { what, bytes: 0 },
        _ => KernelError::Device(format!("{what}: {} {}", e.name, e.words)),
    }
}

/// The same for a call that reserves memory.
pub(super) fn not_reserved(what: &'static str, bytes: usize, e: CallError) -> KernelError {
    match e.code {
        OUT_OF_MEMORY => KernelError::Memory { what, bytes },
        _ => failed("memory is not to be had", e),
    }
}

/// What a call gives.
pub type Called<T = ()> = Result<T, CallError>;

/// Matrix products on a card's stream.
pub trait Multiplier: Send {
    /// Whether there is a plan for products of this shape.
    fn has_plan(&mut self, product: Product) -> bool;
    /// Makes one; never while a stream is captured.
    fn plan(&mut self, product: Product) -> Result<(), KernelError>;
    /// Sets a product going that there is a plan for.
    fn run(&mut self, product: Product, stream: CUstream) -> Result<(), KernelError>;
    /// Gives everything back; the context is current, and the stream done.
    fn close(&mut self);
}

/// The driver. Each method is the call of its name.
///
/// # Safety
/// Handles and memory are those that the same driver gave and has not been given back, of the context that is current, and memory that
/// copies read or write stays until the stream has come past them: what NVIDIA's driver asks of its callers.
#[allow(clippy::missing_safety_doc, reason = "one contract for all, above")]
pub trait Calls: Send {
    /// `cuInit`
    fn init(&self) -> Called;
    /// `cuDriverGetVersion`: 1000 · major + 10 · minor of CUDA.
    fn driver_version(&self) -> Called<i32>;
    /// `cuDeviceGetCount`
    fn device_count(&self) -> Called<i32>;
    /// `cuDeviceGet`
    fn device(&self, ordinal: i32) -> Called<CUdevice>;
    /// `cuDeviceGetName`
    fn device_name(&self, device: CUdevice) -> Called<String>;
    /// `cuDeviceGetAttribute`
    unsafe fn device_attribute(&self, device: CUdevice, which: CUdevice_attribute) -> Called<i32>;
    /// `cuDevicePrimaryCtxRetain`
    unsafe fn retain_context(&self, device: CUdevice) -> Called<CUcontext>;
    /// `cuDevicePrimaryCtxRelease`
    unsafe fn release_context(&self, device: CUdevice) -> Called;
    /// `cuCtxSetCurrent`
    unsafe fn set_current(&self, context: CUcontext) -> Called;
    /// `cuMemGetInfo`: free and total bytes.
    fn memory_info(&self) -> Called<(usize, usize)>;
    /// `cuMemAlloc`
    unsafe fn alloc(&self, bytes: usize) -> Called<u64>;
    /// `cuMemFree`, which waits for the work before.
    unsafe fn free(&self, at: u64) -> Called;
    /// `cuMemHostAlloc`
    unsafe fn alloc_host(&self, bytes: usize) -> Called<*mut c_void>;
    /// `cuMemFreeHost`
    unsafe fn free_host(&self, at: *mut c_void) -> Called;
    /// `cuMemsetD8Async`
    unsafe fn fill(&self, at: u64, value: u8, bytes: usize, stream: CUstream) -> Called;
    /// `cuMemcpyHtoDAsync`
    unsafe fn copy_to_device(&self, to: u64, from: &[u8], stream: CUstream) -> Called;
    /// `cuMemcpyDtoHAsync`
    unsafe fn copy_from_device(&self, to: &mut [u8], from: u64, stream: CUstream) -> Called;
    /// `cuMemcpy2DAsync` from the device: pieces, to beside each other in the machine's memory.
    unsafe fn copy_pieces_from_device(&self, to: *mut c_void, from: Pieces, stream: CUstream) -> Called;
    /// `cuMemcpy2DAsync` to the device.
    unsafe fn copy_pieces_to_device(&self, to: Pieces, from: *const c_void, stream: CUstream) -> Called;
    /// `cuStreamCreate`, of a stream that waits for no other.
    unsafe fn create_stream(&self) -> Called<CUstream>;
    /// `cuStreamQuery`: whether all that was asked for is done.
    unsafe fn is_done(&self, stream: CUstream) -> Called<bool>;
    /// `cuStreamDestroy`
    unsafe fn destroy_stream(&self, stream: CUstream) -> Called;
    /// `cuEventCreate`, of an event that takes no times.
    unsafe fn create_event(&self) -> Called<CUevent>;
    /// `cuEventRecord`
    unsafe fn record_event(&self, event: CUevent, stream: CUstream) -> Called;
    /// `cuEventQuery`: whether all that was asked for before it is done.
    unsafe fn is_past(&self, event: CUevent) -> Called<bool>;
    /// `cuEventCreate`, of an event that takes times.
    unsafe fn create_timer(&self) -> Called<CUevent>;
    /// `cuEventElapsedTime`: milliseconds between two events that are behind.
    unsafe fn elapsed(&self, from: CUevent, to: CUevent) -> Called<f32>;
    /// `cuEventDestroy`
    unsafe fn destroy_event(&self, event: CUevent) -> Called;
    /// `cuModuleLoadData`
    unsafe fn load_module(&self, image: &[u8]) -> Called<CUmodule>;
    /// `cuModuleUnload`
    unsafe fn unload_module(&self, module: CUmodule) -> Called;
    /// `cuModuleGetFunction`
    unsafe fn function(&self, module: CUmodule, name: CString) -> Called<CUfunction>;
    /// `cuFuncSetAttribute` of the most shared memory that a launch may ask for.
    unsafe fn allow_shared(&self, function: CUfunction, bytes: u32) -> Called;
    /// `cuLaunchKernel` of a kernel that takes one structure.
    unsafe fn launch(
        &self,
        function: CUfunction,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        stream: CUstream,
        params: &[u8],
    ) -> Called;
    /// `cuStreamBeginCapture`, keeping this thread only to the rules of a capture.
    unsafe fn begin_capture(&self, stream: CUstream) -> Called;
    /// `cuStreamEndCapture`
    unsafe fn end_capture(&self, stream: CUstream) -> Called<CUgraph>;
    /// `cuGraphInstantiateWithFlags`
    unsafe fn instantiate(&self, graph: CUgraph) -> Called<CUgraphExec>;
    /// `cuGraphDestroy`
    unsafe fn destroy_graph(&self, graph: CUgraph) -> Called;
    /// `cuGraphLaunch`
    unsafe fn launch_graph(&self, graph: CUgraphExec, stream: CUstream) -> Called;
    /// `cuGraphExecDestroy`
    unsafe fn destroy_executable(&self, graph: CUgraphExec) -> Called;

    /// The library of matrix products, which may use `bytes` of memory at `workspace`.
    fn multiplier(&self, workspace: Address, bytes: usize) -> Result<Box<dyn Multiplier>, KernelError>;
}

/// NVIDIA's driver.
pub struct Cuda(&'static DriverFunctions);

impl Cuda {
    /// Finds the library, or says what was looked for and what to install.
    pub fn find() -> Result<Self, KernelError> {
        DriverFunctions::find().map(Cuda)
    }

    /// What the driver says of a call's outcome.
    fn told(&self, outcome: Outcome) -> Called {
        type Text = unsafe extern "C" fn(Outcome, *mut *const c_char) -> Outcome;
        if outcome == 0 {
            return Ok(());
        }
        let text = |call: Text| {
            let mut text = std::ptr::null();
            // SAFETY: a place to write to; the text stays. For a number that it does not know the driver writes null.
            unsafe {
                let _ = call(outcome, &raw mut text);
                words(text)
            }
        };
        let (name, words) = (text(self.0.error_name), text(self.0.error_string));
        let name = if name.is_empty() { format!("error {outcome}") } else { name };
        Err(CallError { code: outcome as u32, name, words })
    }
}

impl Cuda {
    /// What the driver says of whether something is done.
    fn ready(&self, outcome: Outcome) -> Called<bool> {
        match outcome as u32 {
            NOT_READY => Ok(false),
            _ => self.told(outcome).map(|()| true),
        }
    }
}

/// Distances between pieces that every card's copies know.
const MOST_PITCH: usize = i32::MAX as usize;

/// Pieces beside each other in the machine's memory, and in the device's.
fn pieces(at: *const c_void, pieces: Pieces, to_device: bool) -> sys::CUDA_MEMCPY2D {
    let (host, device) = (sys::CUmemorytype::CU_MEMORYTYPE_HOST, sys::CUmemorytype::CU_MEMORYTYPE_DEVICE);
    let Pieces { at: card, bytes, count, stride } = pieces;
    let ends = |is_device| if is_device { (device, stride) } else { (host, bytes) };
    let ((from, from_pitch), (to, to_pitch)) = (ends(!to_device), ends(to_device));
    let null = null_mut();
    sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: from,
        srcHost: if to_device { at } else { null },
        srcDevice: if to_device { 0 } else { card.0 },
        srcArray: null.cast(),
        srcPitch: from_pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: to,
        dstHost: if to_device { null } else { at.cast_mut() },
        dstDevice: if to_device { card.0 } else { 0 },
        dstArray: null.cast(),
        dstPitch: to_pitch,
        WidthInBytes: bytes,
        Height: count,
    }
}

/// Pieces that one copy takes: all of them, or each alone where they lie too far apart.
fn in_copies(all: Pieces) -> impl Iterator<Item = (usize, Pieces)> {
    let (copies, each) = if all.stride > MOST_PITCH { (all.count, 1) } else { (1, all.count) };
    (0..copies).map(move |i| {
        let stride = if each == 1 { all.bytes } else { all.stride };
        (i * all.bytes, Pieces { at: all.at.plus(i * all.stride), count: each, stride, ..all })
    })
}

// The contracts are those of the trait.
impl Calls for Cuda {
    fn init(&self) -> Called {
        // SAFETY: it may be called at any time.
        self.told(unsafe { (self.0.init)(0) })
    }

    fn driver_version(&self) -> Called<i32> {
        let mut version = 0;
        // SAFETY: a number to write to.
        self.told(unsafe { (self.0.version)(&raw mut version) })?;
        Ok(version)
    }

    fn device_count(&self) -> Called<i32> {
        let mut count = 0;
        // SAFETY: a number to write to.
        self.told(unsafe { (self.0.device_count)(&raw mut count) })?;
        Ok(count)
    }

    fn device(&self, ordinal: i32) -> Called<CUdevice> {
        let mut device = 0;
        // SAFETY: a number to write to.
        self.told(unsafe { (self.0.device)(&raw mut device, ordinal) })?;
        Ok(device)
    }

    fn device_name(&self, device: CUdevice) -> Called<String> {
        let mut name = [0u8; 256];
        // SAFETY: as many bytes to write to; the driver ends what it writes.
        self.told(unsafe { (self.0.device_name)(name.as_mut_ptr().cast(), name.len() as c_int, device) })?;
        Ok(CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default())
    }

    unsafe fn device_attribute(&self, device: CUdevice, which: CUdevice_attribute) -> Called<i32> {
        let mut made = 0;
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.device_attribute)(&raw mut made, which, device) })?;
        Ok(made)
    }

    unsafe fn retain_context(&self, device: CUdevice) -> Called<CUcontext> {
        let mut made = null_mut();
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.retain_context)(&raw mut made, device) })?;
        Ok(made)
    }

    unsafe fn release_context(&self, device: CUdevice) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.release_context)(device) })
    }

    unsafe fn set_current(&self, context: CUcontext) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.set_current)(context) })
    }

    fn memory_info(&self) -> Called<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: numbers to write to.
        self.told(unsafe { (self.0.memory_info)(&raw mut free, &raw mut total) })?;
        Ok((free, total))
    }

    unsafe fn alloc(&self, bytes: usize) -> Called<u64> {
        let mut made = 0;
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.alloc)(&raw mut made, bytes) })?;
        Ok(made)
    }

    unsafe fn free(&self, at: u64) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.free)(at) })
    }

    unsafe fn alloc_host(&self, bytes: usize) -> Called<*mut c_void> {
        let mut made = null_mut();
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.alloc_host)(&raw mut made, bytes, 0) })?;
        Ok(made)
    }

    unsafe fn free_host(&self, at: *mut c_void) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.free_host)(at) })
    }

    unsafe fn fill(&self, at: u64, value: u8, bytes: usize, stream: CUstream) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.fill)(at, value, bytes, stream) })
    }

    unsafe fn copy_to_device(&self, to: u64, from: &[u8], stream: CUstream) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.copy_to_device)(to, from.as_ptr().cast(), from.len(), stream) })
    }

    unsafe fn copy_from_device(&self, to: &mut [u8], from: u64, stream: CUstream) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.copy_from_device)(to.as_mut_ptr().cast(), from, to.len(), stream) })
    }

    unsafe fn copy_pieces_from_device(&self, to: *mut c_void, from: Pieces, stream: CUstream) -> Called {
        for (offset, part) in in_copies(from) {
            let copy = pieces(to.wrapping_byte_add(offset), part, false);
            // SAFETY: the caller's.
            self.told(unsafe { (self.0.copy_pieces)(&raw const copy, stream) })?;
        }
        Ok(())
    }

    unsafe fn copy_pieces_to_device(&self, to: Pieces, from: *const c_void, stream: CUstream) -> Called {
        for (offset, part) in in_copies(to) {
            let copy = pieces(from.wrapping_byte_add(offset), part, true);
            // SAFETY: the caller's.
            self.told(unsafe { (self.0.copy_pieces)(&raw const copy, stream) })?;
        }
        Ok(())
    }

    unsafe fn create_stream(&self) -> Called<CUstream> {
        let mut made = null_mut();
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.create_stream)(&raw mut made, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint) })?;
        Ok(made)
    }

    unsafe fn is_done(&self, stream: CUstream) -> Called<bool> {
        // SAFETY: the caller's.
        self.ready(unsafe { (self.0.query_stream)(stream) })
    }

    unsafe fn destroy_stream(&self, stream: CUstream) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.destroy_stream)(stream) })
    }

    unsafe fn create_event(&self) -> Called<CUevent> {
        let mut made = null_mut();
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.create_event)(&raw mut made, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint) })?;
        Ok(made)
    }

    unsafe fn create_timer(&self) -> Called<CUevent> {
        let mut made = null_mut();
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.create_event)(&raw mut made, sys::CUevent_flags::CU_EVENT_DEFAULT as c_uint) })?;
        Ok(made)
    }

    unsafe fn elapsed(&self, from: CUevent, to: CUevent) -> Called<f32> {
        let mut made = 0.0;
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.elapsed)(&raw mut made, from, to) })?;
        Ok(made)
    }

    unsafe fn record_event(&self, event: CUevent, stream: CUstream) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.record_event)(event, stream) })
    }

    unsafe fn is_past(&self, event: CUevent) -> Called<bool> {
        // SAFETY: the caller's.
        self.ready(unsafe { (self.0.query_event)(event) })
    }

    unsafe fn destroy_event(&self, event: CUevent) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.destroy_event)(event) })
    }

    unsafe fn load_module(&self, image: &[u8]) -> Called<CUmodule> {
        let mut made = null_mut();
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.load_module)(&raw mut made, image.as_ptr().cast()) })?;
        Ok(made)
    }

    unsafe fn unload_module(&self, module: CUmodule) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.unload_module)(module) })
    }

    unsafe fn function(&self, module: CUmodule, name: CString) -> Called<CUfunction> {
        let mut made = null_mut();
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.function)(&raw mut made, module, name.as_ptr()) })?;
        Ok(made)
    }

    unsafe fn allow_shared(&self, function: CUfunction, bytes: u32) -> Called {
        let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.set_function_attribute)(function, most, bytes as c_int) })
    }

    unsafe fn launch(
        &self,
        function: CUfunction,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        stream: CUstream,
        params: &[u8],
    ) -> Called {
        let [x, y, z] = grid;
        let mut list = [params.as_ptr() as *mut c_void];
        // SAFETY: the caller's; the driver copies the structure before it returns.
        self.told(unsafe { (self.0.launch)(function, x, y, z, threads, 1, 1, shared, stream, list.as_mut_ptr(), null_mut()) })
    }

    unsafe fn begin_capture(&self, stream: CUstream) -> Called {
        // Other threads may have cards' memory to reserve meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.begin_capture)(stream, mode) })
    }

    unsafe fn end_capture(&self, stream: CUstream) -> Called<CUgraph> {
        let mut made = null_mut();
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.end_capture)(stream, &raw mut made) })?;
        Ok(made)
    }

    unsafe fn instantiate(&self, graph: CUgraph) -> Called<CUgraphExec> {
        let mut made = null_mut();
        // SAFETY: the caller's; a place to write to.
        self.told(unsafe { (self.0.instantiate)(&raw mut made, graph, 0) })?;
        Ok(made)
    }

    unsafe fn destroy_graph(&self, graph: CUgraph) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.destroy_graph)(graph) })
    }

    unsafe fn launch_graph(&self, graph: CUgraphExec, stream: CUstream) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.launch_graph)(graph, stream) })
    }

    unsafe fn destroy_executable(&self, graph: CUgraphExec) -> Called {
        // SAFETY: the caller's.
        self.told(unsafe { (self.0.destroy_executable)(graph) })
    }

    fn multiplier(&self, workspace: Address, bytes: usize) -> Result<Box<dyn Multiplier>, KernelError> {
        Ok(Box::new(Products::open(workspace, bytes)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_too_far_apart_for_one_copy_are_copied_one_by_one() {
        let near = Pieces { at: Address(1 << 40), bytes: 100, count: 3, stride: 1000 };
        assert_eq!(in_copies(near).collect::<Vec<_>>(), [(0, near)]);
        let far = Pieces { stride: 3 << 30, ..near };
        let alone = |i: usize| (i * 100, Pieces { at: far.at.plus(i * (3 << 30)), count: 1, stride: 100, ..far });
        assert_eq!(in_copies(far).collect::<Vec<_>>(), [alone(0), alone(1), alone(2)]);
    }

    #[test]
    fn a_copy_of_pieces_names_both_ends() {
        let part = Pieces { at: Address(77), bytes: 100, count: 3, stride: 1000 };
        let place = 0x500 as *const c_void;
        let (up, down) = (pieces(place, part, true), pieces(place, part, false));
        let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        assert!((up.srcHost, up.srcPitch, up.dstDevice, up.dstPitch, up.dstMemoryType) == (place, 100, 77, 1000, device));
        assert!((down.dstHost.cast_const(), down.dstPitch, down.srcDevice, down.srcPitch) == (place, 100, 77, 1000));
        assert!(down.srcMemoryType == device && (up.WidthInBytes, up.Height) == (100, 3) && up.srcDevice == 0);
    }

    #[test]
    fn who_runs_short_of_memory_has_not_lost_the_card() {
        let e = |code: CUresult| CallError { code: code as u32, name: format!("{code:?}"), words: "words".into() };
        let short = not_reserved("weights", 7, e(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        assert!(matches!(short, KernelError::Memory { what: "weights", bytes: 7 }));
        let short = failed("rms_norm", e(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        assert!(short.to_string().starts_with("the card has no memory left (rms_norm); lower --kv-memory"), "{short}");
        let lost = not_reserved("weights", 7, e(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
        assert!(matches!(lost, KernelError::Device(text) if text.contains("CUDA_ERROR_ILLEGAL_ADDRESS words")));
    }
}
