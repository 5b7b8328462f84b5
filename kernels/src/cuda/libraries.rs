//! NVIDIA's libraries, opened at run time. A function is only called after its library was found to be there, to have it, and to be
//! new enough: the bindings panic where one is missing.

use cudarc::nvrtc;

use super::nccl;
use crate::error::KernelError;

/// A library that serving on a card needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// The driver.
    Driver,
    /// The compiler of kernels.
    Nvrtc,
    /// Matrix products.
    CublasLt,
    /// Exchanges between cards.
    Nccl,
}

/// Every version of the driver's interface that this binary was written for knows the same calls.
const OLDEST_DRIVER: i32 = 12_000;
/// `sm_90a` came with it.
const OLDEST_NVRTC: (i32, i32) = (12, 0);

/// What we call of each library.
const DRIVER: [&str; 38] = [
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpy2DAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
];
const NVRTC: [&str; 10] = [
    "nvrtcCompileProgram",
    "nvrtcCreateProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetCUBIN",
    "nvrtcGetCUBINSize",
    "nvrtcGetNumSupportedArchs",
    "nvrtcGetProgramLog",
    "nvrtcGetProgramLogSize",
    "nvrtcGetSupportedArchs",
    "nvrtcVersion",
];
const CUBLAS_LT: [&str; 12] = [
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
];

impl Library {
    /// Finds the library and what we call in it, or says what was looked for and what to install.
    pub fn require(self) -> Result<(), KernelError> {
        match self.absent() {
            None => Err(self.not_found()),
            Some(absent) if absent.is_empty() => Ok(()),
            Some(absent) => Err(self.too_old(&format!("it has no {}", absent.join(", ")))),
        }
    }

    /// What the library lacks of what we call; `None` where there is no library.
    fn absent(self) -> Option<Vec<&'static str>> {
        macro_rules! look {
            ($library:ident, $names:expr) => {{
                use cudarc::$library::sys;
                // SAFETY: opening a library of NVIDIA's runs its initialisers and nothing else; names are looked up, and not called.
                unsafe {
                    if !sys::is_culib_present() {
                        return None;
                    }
                    let library = sys::culib();
                    $names.into_iter().filter(|name| library.get::<*const ()>(name.as_bytes()).is_err()).collect()
                }
            }};
        }
        Some(match self {
            Library::Driver => look!(driver, DRIVER),
            Library::Nvrtc => look!(nvrtc, NVRTC),
            Library::CublasLt => look!(cublaslt, CUBLAS_LT),
            Library::Nccl => return nccl::absent(),
        })
    }

    /// What it is, what file was looked for, and what brings it.
    const fn words(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Library::Driver => ("NVIDIA driver", "libcuda.so and libcuda.so.1", "NVIDIA's driver, version 525 or later"),
            Library::Nvrtc => (
                "NVRTC, the compiler of the kernels,",
                "libnvrtc.so, libnvrtc.so.13 and libnvrtc.so.12",
                "the CUDA toolkit, or the Python package nvidia-cuda-nvrtc with its folder lib in LD_LIBRARY_PATH",
            ),
            Library::CublasLt => (
                "cuBLASLt, for large matrix products,",
                "libcublasLt.so, libcublasLt.so.13 and libcublasLt.so.12",
                "the CUDA toolkit, or the Python package nvidia-cublas with its folder lib in LD_LIBRARY_PATH",
            ),
            Library::Nccl => (
                "NCCL, by which several cards compute one model,",
                "libnccl.so.2 and libnccl.so",
                "the package libnccl2 of NVIDIA's repository, or the Python package nvidia-nccl-cu13 or nvidia-nccl-cu12 with its folder \
                 lib in LD_LIBRARY_PATH",
            ),
        }
    }

    /// What works without it.
    const fn instead(self) -> &'static str {
        match self {
            Library::Driver | Library::Nvrtc | Library::CublasLt => "use --device cpu",
            Library::Nccl => "use one card: --tensor-parallel 1",
        }
    }

    fn not_found(self) -> KernelError {
        let ((what, files, install), instead) = (self.words(), self.instead());
        KernelError::Unsupported(format!(
            "no {what} found: looked for {files} on the loader's path (LD_LIBRARY_PATH and the system's folders); install {install}, \
             or {instead}"
        ))
    }

    pub(super) fn too_old(self, how: &str) -> KernelError {
        let ((what, _, install), instead) = (self.words(), self.instead());
        KernelError::Unsupported(format!("the {what} that was found is too old: {how}; install {install}, or {instead}"))
    }
}

/// Whether a driver of this version (1000 · major + 10 · minor of CUDA) is new enough.
pub(super) fn check_driver(version: i32) -> Result<(), KernelError> {
    if version >= OLDEST_DRIVER {
        return Ok(());
    }
    Err(Library::Driver.too_old(&format!("it is for CUDA {}, the kernels need {}", dotted(version), dotted(OLDEST_DRIVER))))
}

/// Whether a compiler of this version makes code that we need and, where there is a driver, code that it takes: that of its own major
/// version and older ones.
pub(super) fn check_compiler((major, minor): (i32, i32), driver: Option<i32>) -> Result<(), KernelError> {
    if (major, minor) < OLDEST_NVRTC {
        let (oldest_major, oldest_minor) = OLDEST_NVRTC;
        return Err(Library::Nvrtc.too_old(&format!("it is {major}.{minor}, the kernels need {oldest_major}.{oldest_minor}")));
    }
    match driver {
        Some(driver) if driver / 1000 < major => Err(KernelError::Unsupported(format!(
            "NVRTC {major}.{minor} makes code that the driver, which is for CUDA {}, does not take; install a newer driver or NVRTC {}, \
             or use --device cpu",
            dotted(driver),
            driver / 1000
        ))),
        _ => Ok(()),
    }
}

/// Whether a compiler that knows these architectures (90 for `sm_90` and `sm_90a`) knows this one. A card may be newer than it.
pub(super) fn check_architecture((major, minor): (i32, i32), known: &[i32], architecture: &str) -> Result<(), KernelError> {
    let digits = architecture.trim_start_matches("sm_").trim_end_matches(|c: char| c.is_ascii_alphabetic());
    if digits.parse().is_ok_and(|number| known.contains(&number)) {
        return Ok(());
    }
    let ends = match (known.iter().min(), known.iter().max()) {
        (Some(first), Some(last)) => format!("sm_{first} to sm_{last}"),
        _ => "none".into(),
    };
    let what = format!("{major}.{minor} makes no code for {architecture}, but for {ends}; one of the driver's CUDA version does");
    Err(Library::Nvrtc.too_old(&what))
}

/// The architectures that the compiler makes code for. The library must be there.
pub(super) fn known_architectures() -> Result<Vec<i32>, KernelError> {
    let unknown = |e| KernelError::Unsupported(format!("NVRTC does not say what it makes code for: {e}"));
    let mut count = 0;
    // SAFETY: a number to write to.
    unsafe { nvrtc::sys::nvrtcGetNumSupportedArchs(&raw mut count) }.result().map_err(unknown)?;
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: as many numbers as were asked for.
    unsafe { nvrtc::sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result().map_err(unknown)?;
    Ok(known)
}

/// As people write it.
pub(super) fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The compiler's version. The library must be there.
pub(super) fn compiler_version() -> Result<(i32, i32), KernelError> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: numbers to write to.
    let asked = unsafe { nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result();
    asked.map_err(|e| KernelError::Unsupported(format!("NVRTC has no version: {e}")))?;
    Ok((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_lacks_a_library_is_told_what_was_looked_for_and_what_to_install() {
        for (library, words) in [
            (Library::Driver, ["libcuda.so.1", "NVIDIA's driver", "--device cpu"]),
            (Library::Nvrtc, ["libnvrtc.so.12", "nvidia-cuda-nvrtc", "LD_LIBRARY_PATH"]),
            (Library::CublasLt, ["libcublasLt.so.13", "nvidia-cublas", "LD_LIBRARY_PATH"]),
            (Library::Nccl, ["libnccl.so.2", "nvidia-nccl-cu13", "--tensor-parallel 1"]),
        ] {
            let text = library.not_found().to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
        assert!(Library::Nvrtc.too_old("it has no nvrtcGetCUBIN").to_string().contains("too old: it has no nvrtcGetCUBIN"));
    }

    #[test]
    fn versions_that_do_not_go_together_are_refused() {
        assert!(check_driver(12_000).is_ok() && check_driver(13_020).is_ok());
        let old = check_driver(11_080).unwrap_err().to_string();
        assert!(old.contains("11.8") && old.contains("525"), "{old}");
        assert!(check_compiler((13, 0), None).is_ok());
        assert!(check_compiler((12, 4), Some(12_020)).is_ok());
        assert!(check_compiler((12, 9), Some(13_000)).is_ok());
        let newer = check_compiler((13, 0), Some(12_080)).unwrap_err().to_string();
        assert!(newer.contains("NVRTC 13.0") && newer.contains("12.8"), "{newer}");
        assert!(check_compiler((11, 8), None).unwrap_err().to_string().contains("too old"));
        let known = [50, 80, 90];
        assert!(["sm_80", "sm_90", "sm_90a"].iter().all(|sm| check_architecture((12, 4), &known, sm).is_ok()));
        let newer = check_architecture((12, 4), &known, "sm_120").unwrap_err().to_string();
        assert!(newer.contains("12.4 makes no code for sm_120") && newer.contains("sm_50 to sm_90"), "{newer}");
    }

    #[test]
    fn a_library_that_is_there_has_what_we_call() {
        // Where it is not there, nothing of it may be called; that must be an error, and no panic.
        for library in [Library::Driver, Library::Nvrtc, Library::CublasLt, Library::Nccl] {
            match library.absent() {
                Some(absent) => assert_eq!(absent, Vec::<&str>::new(), "{library:?}"),
                None => assert!(library.require().is_err()),
            }
        }
    }
}
