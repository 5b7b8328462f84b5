//! NVIDIA's libraries, opened at run time. A function is only called after its library was found to be there, to have it, and to be
//! new enough.

use std::ffi::{CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::functions::{CublasLtFunctions, DriverFunctions, NcclFunctions, NvrtcFunctions, Outcome, words};
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

/// What each library is called, the system's name before those of its versions.
const NCCL: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
// A toolkit has a `libcuda.so`, too, which is none.
const DRIVER: [&str; 2] = ["libcuda.so.1", "libcuda.so"];
/// Versions of CUDA that are looked for beside the driver's own.
const VERSIONS: [i32; 2] = [13, 12];

/// Where a toolkit has its libraries, which need not be on the loader's path.
fn toolkits() -> Vec<PathBuf> {
    let named = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os);
    let toolkits = named.chain(["/usr/local/cuda".into()]).map(PathBuf::from);
    // An empty one would be the folder that the server was started in.
    toolkits.filter(|toolkit| toolkit.is_absolute()).map(|toolkit| toolkit.join("lib64")).collect()
}

/// A library by its name, looked for by the loader, or by its path.
fn open(file: &Path) -> Option<usize> {
    let file = CString::new(file.as_os_str().as_bytes()).ok()?;
    // SAFETY: opening a library of NVIDIA's runs its initialisers and nothing else.
    let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) } as usize;
    (handle != 0).then_some(handle)
}

/// NVRTC asks the loader for its second library by name, which finds it where it is open already.
fn open_builtins(folder: &Path) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().as_bytes().starts_with(b"libnvrtc-builtins.so")) {
        // Without it NVRTC says what it misses.
        let _ = open(&entry.path());
    }
}

/// Names of a library that comes in versions of CUDA, those first that a driver of this version takes: of its own version, then of
/// older ones, then the one that the system has without a number.
fn versioned(name: &str, driver: Option<i32>) -> Vec<String> {
    let newest = driver.unwrap_or(VERSIONS[0]);
    let (mut taken, mut newer) = (vec![newest], Vec::new());
    for version in VERSIONS {
        if version > newest {
            newer.push(version);
        } else if version != newest {
            taken.push(version);
        }
    }
    let numbered = |version: i32| format!("{name}.{version}");
    taken.into_iter().map(numbered).chain([name.to_owned()]).chain(newer.into_iter().map(numbered)).collect()
}

impl Library {
    /// Finds the library and what we call in it, or says what was looked for and what to install.
    pub fn require(self) -> Result<(), KernelError> {
        match self.absent() {
            None => Err(self.not_found()),
            Some(absent) if absent.is_empty() => Ok(()),
            Some(absent) => Err(self.too_old(&format!("it has no {}", absent.join(", ")))),
        }
    }

    /// Whether there is such a library, of whatever version.
    pub fn is_there(self) -> bool {
        self.opened().is_some()
    }

    /// What the library lacks of what we call; `None` where there is no library.
    fn absent(self) -> Option<Vec<&'static str>> {
        self.opened()?;
        let names = match self {
            Library::Driver => DriverFunctions::NAMES,
            Library::Nvrtc => NvrtcFunctions::NAMES,
            Library::CublasLt => CublasLtFunctions::NAMES,
            Library::Nccl => NcclFunctions::NAMES,
        };
        Some(names.iter().copied().filter(|name| self.symbol(name).is_none()).collect())
    }

    /// Its file names, in the order in which they are looked for.
    fn files(self) -> Vec<String> {
        let plain = |names: [&str; 2]| names.map(str::to_owned).to_vec();
        match self {
            Library::Driver => plain(DRIVER),
            Library::Nccl => plain(NCCL),
            Library::Nvrtc => versioned("libnvrtc.so", driver_major()),
            Library::CublasLt => versioned("libcublasLt.so", driver_major()),
        }
    }

    /// The library, where there is one. It is never closed.
    fn opened(self) -> Option<usize> {
        static OPENED: [OnceLock<Option<usize>>; 4] = [const { OnceLock::new() }; 4];
        *OPENED[self as usize].get_or_init(|| {
            let folders = match self {
                Library::Nvrtc | Library::CublasLt => toolkits(),
                Library::Driver | Library::Nccl => Vec::new(),
            };
            let in_toolkit = |file: &str, folder: &PathBuf| {
                let path = Some(folder.join(file)).filter(|path| path.is_file())?;
                if self == Library::Nvrtc {
                    open_builtins(folder);
                }
                open(&path)
            };
            // A version that the driver takes is better than one that lies nearer.
            self.files()
                .iter()
                .find_map(|file| open(Path::new(file)).or_else(|| folders.iter().find_map(|folder| in_toolkit(file, folder))))
        })
    }

    pub(super) fn symbol(self, name: &str) -> Option<*mut c_void> {
        let (library, name) = (self.opened()?, CString::new(name).ok()?);
        // SAFETY: a library that is never closed; the name is looked up, and not called.
        Some(unsafe { libc::dlsym(library as *mut c_void, name.as_ptr()) }).filter(|found| !found.is_null())
    }

    /// What a version that is found says of itself, for whoever reads the report of a machine.
    pub fn version(self) -> Result<String, KernelError> {
        Ok(match self {
            Library::Driver => driver_version()?.to_string(),
            Library::Nvrtc => {
                let (major, minor) = compiler_version()?;
                format!("{major}.{minor}, for {:?}", known_architectures()?)
            }
            // SAFETY: it only returns a number.
            Library::CublasLt => unsafe { (CublasLtFunctions::find()?.version)() }.to_string(),
            Library::Nccl => {
                let mut version = 0;
                // SAFETY: a number to write to.
                let outcome = unsafe { (NcclFunctions::find()?.version)(&raw mut version) };
                if outcome == 0 { version.to_string() } else { format!("ncclGetVersion: {outcome}") }
            }
        })
    }

    /// What it is, what file was looked for, and what brings it.
    const fn words(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Library::Driver => ("NVIDIA driver", "libcuda.so.1 and libcuda.so", "NVIDIA's driver, version 525 or later"),
            Library::Nvrtc => (
                "NVRTC, the compiler of the kernels,",
                "libnvrtc.so.13, libnvrtc.so.12 and libnvrtc.so",
                "the CUDA toolkit, or the Python package nvidia-cuda-nvrtc with its folder lib in LD_LIBRARY_PATH",
            ),
            Library::CublasLt => (
                "cuBLASLt, for large matrix products,",
                "libcublasLt.so.13, libcublasLt.so.12 and libcublasLt.so",
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
        let toolkit = match self {
            Library::Nvrtc | Library::CublasLt => " and in lib64 of CUDA_HOME, CUDA_PATH and /usr/local/cuda",
            Library::Driver | Library::Nccl => "",
        };
        KernelError::Unsupported(format!(
            "no {what} found: looked for {files} on the loader's path (LD_LIBRARY_PATH and the system's folders){toolkit}; install \
             {install}, or {instead}"
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

/// What the compiler says of a call that was not done.
pub(super) fn compiled(nvrtc: &NvrtcFunctions, outcome: Outcome) -> Result<(), String> {
    if outcome == 0 {
        return Ok(());
    }
    // SAFETY: the library has a text that stays for every number, its own or one that says that it does not know it.
    Err(unsafe { words((nvrtc.error_string)(outcome)) })
}

/// The architectures that the compiler makes code for.
pub(super) fn known_architectures() -> Result<Vec<i32>, KernelError> {
    let nvrtc = NvrtcFunctions::find()?;
    let unknown = |e| KernelError::Unsupported(format!("NVRTC does not say what it makes code for: {e}"));
    let mut count = 0;
    // SAFETY: a number to write to.
    compiled(nvrtc, unsafe { (nvrtc.count_architectures)(&raw mut count) }).map_err(unknown)?;
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: as many numbers as were asked for.
    compiled(nvrtc, unsafe { (nvrtc.architectures)(known.as_mut_ptr()) }).map_err(unknown)?;
    Ok(known)
}

/// Of the driver, which need not have been started: 1000 · major + 10 · minor of CUDA.
fn driver_version() -> Result<i32, KernelError> {
    let driver = DriverFunctions::find()?;
    let mut version = 0;
    // SAFETY: a number to write to.
    match unsafe { (driver.version)(&raw mut version) } {
        0 => Ok(version),
        outcome => Err(KernelError::Unsupported(format!("the driver has no version: error {outcome}"))),
    }
}

/// The major version of CUDA that the driver is for; `None` where there is no driver.
fn driver_major() -> Option<i32> {
    driver_version().ok().map(|version| version / 1000)
}

/// As people write it.
pub(super) fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The compiler's version.
pub(super) fn compiler_version() -> Result<(i32, i32), KernelError> {
    let nvrtc = NvrtcFunctions::find()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: numbers to write to.
    let asked = compiled(nvrtc, unsafe { (nvrtc.version)(&raw mut major, &raw mut minor) });
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
    fn what_the_driver_takes_is_looked_for_first() {
        let names = |driver| versioned("lib.so", driver).join(" ");
        assert_eq!(names(None), "lib.so.13 lib.so.12 lib.so");
        assert_eq!(names(Some(13)), "lib.so.13 lib.so.12 lib.so");
        assert_eq!(names(Some(12)), "lib.so.12 lib.so lib.so.13");
        assert_eq!(names(Some(14)), "lib.so.14 lib.so.13 lib.so.12 lib.so");
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
