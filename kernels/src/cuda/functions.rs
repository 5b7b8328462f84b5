//! What we call of NVIDIA's libraries, as tables that are filled when a library is first needed. Types and constants are the bindings'; their
//! own calls are not made, as they take a result for an enumeration: a later version may have numbers that ours does not, which
//! Rust must never see as one.

use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys as cu;
use cudarc::nccl::sys as nccl;
use cudarc::nvrtc::sys::nvrtcProgram;

use super::libraries::Library;
use crate::error::KernelError;

/// A result as it comes; 0 where all went well.
pub(super) type Outcome = c_int;

macro_rules! out {
    () => {
        Outcome
    };
    ($given:ty) => {
        $given
    };
}

/// A table of functions, by our names and the library's; they return an outcome where nothing else is said.
macro_rules! functions {
    ($(#[$about:meta])* $table:ident, $library:ident: $($field:ident = $name:ident($($argument:ty),*) $(-> $out:ty)?;)*) => {
        $(#[$about])*
        pub(super) struct $table {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> out!($($out)?),)*
        }

        impl $table {
            pub(super) const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];

            /// Errors say what is missing or too old, and what to install.
            pub(super) fn find() -> Result<&'static Self, KernelError> {
                static FOUND: OnceLock<Option<$table>> = OnceLock::new();
                Library::$library.require()?;
                let found = FOUND.get_or_init(|| {
                    // SAFETY: the functions of these names have these types since the oldest version that has them all.
                    unsafe {
                        Some($table {
                            $($field: std::mem::transmute::<
                                *mut c_void,
                                unsafe extern "C" fn($($argument),*) -> out!($($out)?),
                            >(Library::$library.symbol(stringify!($name))?),)*
                        })
                    }
                });
                found.as_ref().ok_or_else(|| Library::$library.too_old("it lacks what it had a moment ago"))
            }
        }
    };
}

functions! {
    /// NVIDIA's driver.
    DriverFunctions, Driver:
    init = cuInit(c_uint);
    version = cuDriverGetVersion(*mut c_int);
    error_name = cuGetErrorName(Outcome, *mut *const c_char);
    error_string = cuGetErrorString(Outcome, *mut *const c_char);
    device_count = cuDeviceGetCount(*mut c_int);
    device = cuDeviceGet(*mut cu::CUdevice, c_int);
    device_name = cuDeviceGetName(*mut c_char, c_int, cu::CUdevice);
    device_attribute = cuDeviceGetAttribute(*mut c_int, cu::CUdevice_attribute, cu::CUdevice);
    retain_context = cuDevicePrimaryCtxRetain(*mut cu::CUcontext, cu::CUdevice);
    release_context = cuDevicePrimaryCtxRelease_v2(cu::CUdevice);
    set_current = cuCtxSetCurrent(cu::CUcontext);
    memory_info = cuMemGetInfo_v2(*mut usize, *mut usize);
    alloc = cuMemAlloc_v2(*mut u64, usize);
    free = cuMemFree_v2(u64);
    alloc_host = cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    free_host = cuMemFreeHost(*mut c_void);
    fill = cuMemsetD8Async(u64, c_uchar, usize, cu::CUstream);
    copy_to_device = cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, cu::CUstream);
    copy_from_device = cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, cu::CUstream);
    copy_pieces = cuMemcpy2DAsync_v2(*const cu::CUDA_MEMCPY2D, cu::CUstream);
    create_stream = cuStreamCreate(*mut cu::CUstream, c_uint);
    query_stream = cuStreamQuery(cu::CUstream);
    destroy_stream = cuStreamDestroy_v2(cu::CUstream);
    create_event = cuEventCreate(*mut cu::CUevent, c_uint);
    record_event = cuEventRecord(cu::CUevent, cu::CUstream);
    query_event = cuEventQuery(cu::CUevent);
    elapsed = cuEventElapsedTime(*mut f32, cu::CUevent, cu::CUevent);
    destroy_event = cuEventDestroy_v2(cu::CUevent);
    load_module = cuModuleLoadData(*mut cu::CUmodule, *const c_void);
    unload_module = cuModuleUnload(cu::CUmodule);
    function = cuModuleGetFunction(*mut cu::CUfunction, cu::CUmodule, *const c_char);
    set_function_attribute = cuFuncSetAttribute(cu::CUfunction, cu::CUfunction_attribute, c_int);
    launch = cuLaunchKernel(cu::CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, cu::CUstream, *mut *mut c_void, *mut *mut c_void);
    begin_capture = cuStreamBeginCapture_v2(cu::CUstream, cu::CUstreamCaptureMode);
    end_capture = cuStreamEndCapture(cu::CUstream, *mut cu::CUgraph);
    instantiate = cuGraphInstantiateWithFlags(*mut cu::CUgraphExec, cu::CUgraph, c_ulonglong);
    destroy_graph = cuGraphDestroy(cu::CUgraph);
    launch_graph = cuGraphLaunch(cu::CUgraphExec, cu::CUstream);
    destroy_executable = cuGraphExecDestroy(cu::CUgraphExec);
}

functions! {
    /// The compiler of kernels.
    NvrtcFunctions, Nvrtc:
    version = nvrtcVersion(*mut c_int, *mut c_int);
    count_architectures = nvrtcGetNumSupportedArchs(*mut c_int);
    architectures = nvrtcGetSupportedArchs(*mut c_int);
    create = nvrtcCreateProgram(*mut nvrtcProgram, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char);
    compile = nvrtcCompileProgram(nvrtcProgram, c_int, *const *const c_char);
    destroy = nvrtcDestroyProgram(*mut nvrtcProgram);
    log_size = nvrtcGetProgramLogSize(nvrtcProgram, *mut usize);
    log = nvrtcGetProgramLog(nvrtcProgram, *mut c_char);
    cubin_size = nvrtcGetCUBINSize(nvrtcProgram, *mut usize);
    cubin = nvrtcGetCUBIN(nvrtcProgram, *mut c_char);
    error_string = nvrtcGetErrorString(Outcome) -> *const c_char;
}

functions! {
    /// Matrix products.
    CublasLtFunctions, CublasLt:
    create = cublasLtCreate(*mut lt::cublasLtHandle_t);
    destroy = cublasLtDestroy(lt::cublasLtHandle_t);
    multiply = cublasLtMatmul(
        lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, *const c_void, *const c_void, lt::cublasLtMatrixLayout_t, *const c_void,
        lt::cublasLtMatrixLayout_t, *const c_void, *const c_void, lt::cublasLtMatrixLayout_t, *mut c_void, lt::cublasLtMatrixLayout_t,
        *const lt::cublasLtMatmulAlgo_t, *mut c_void, usize, lt::cudaStream_t);
    heuristic = cublasLtMatmulAlgoGetHeuristic(
        lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t,
        lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatmulPreference_t, c_int, *mut c_void, *mut c_int);
    create_description = cublasLtMatmulDescCreate(*mut lt::cublasLtMatmulDesc_t, lt::cublasComputeType_t, lt::cudaDataType_t);
    destroy_description = cublasLtMatmulDescDestroy(lt::cublasLtMatmulDesc_t);
    describe = cublasLtMatmulDescSetAttribute(lt::cublasLtMatmulDesc_t, lt::cublasLtMatmulDescAttributes_t, *const c_void, usize);
    create_preference = cublasLtMatmulPreferenceCreate(*mut lt::cublasLtMatmulPreference_t);
    destroy_preference = cublasLtMatmulPreferenceDestroy(lt::cublasLtMatmulPreference_t);
    prefer = cublasLtMatmulPreferenceSetAttribute(lt::cublasLtMatmulPreference_t, lt::cublasLtMatmulPreferenceAttributes_t, *const c_void, usize);
    create_layout = cublasLtMatrixLayoutCreate(*mut lt::cublasLtMatrixLayout_t, lt::cudaDataType, u64, u64, i64);
    destroy_layout = cublasLtMatrixLayoutDestroy(lt::cublasLtMatrixLayout_t);
    status_name = cublasLtGetStatusName(Outcome) -> *const c_char;
    version = cublasLtGetVersion() -> usize;
}

functions! {
    /// Exchanges between cards.
    NcclFunctions, Nccl:
    version = ncclGetVersion(*mut c_int);
    unique_id = ncclGetUniqueId(*mut nccl::ncclUniqueId);
    init_rank = ncclCommInitRank(*mut nccl::ncclComm_t, c_int, nccl::ncclUniqueId, c_int);
    all_reduce = ncclAllReduce(*const c_void, *mut c_void, usize, nccl::ncclDataType_t, nccl::ncclRedOp_t, nccl::ncclComm_t, nccl::cudaStream_t);
    all_gather = ncclAllGather(*const c_void, *mut c_void, usize, nccl::ncclDataType_t, nccl::ncclComm_t, nccl::cudaStream_t);
    broadcast = ncclBroadcast(*const c_void, *mut c_void, usize, nccl::ncclDataType_t, c_int, nccl::ncclComm_t, nccl::cudaStream_t);
    abort = ncclCommAbort(nccl::ncclComm_t);
    error_string = ncclGetErrorString(Outcome) -> *const c_char;
}

/// What a library says in words; empty where it says nothing.
///
/// # Safety
/// A text of the library's that stays, or null.
pub(super) unsafe fn words(text: *const c_char) -> String {
    match text.is_null() {
        true => String::new(),
        // SAFETY: as the caller says.
        false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
    }
}
