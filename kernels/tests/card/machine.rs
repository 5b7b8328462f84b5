//! What a machine has, for whoever reads the report of one that is not theirs; whether its first card opens; and a rehearsal of failures.

use std::ffi::CStr;
use std::fs::read_to_string;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use tidemill_kernels::cuda::calls::{CallError, Calls};
use tidemill_kernels::cuda::device::Device;
use tidemill_kernels::cuda::driver::{Card, Cuda};
use tidemill_kernels::cuda::libraries::Library;

use super::cases::{Cases, say};
use super::{CANNOT_OPEN, NO_CARD};

/// Bytes that are copied to the card and back.
const COPIED: usize = 64 << 20;

fn row(what: &str, value: &str) {
    let value = value.replace('|', "/");
    if !value.trim().is_empty() {
        say(&format!("| {what} | {} |", value.trim().replace('\n', " ")));
    }
}

/// The first line of a file that begins so, without its beginning.
fn line_of(file: &str, beginning: &str) -> String {
    let text = read_to_string(file).unwrap_or_default();
    let found = text.lines().find_map(|line| line.strip_prefix(beginning));
    found.map_or(String::new(), |rest| rest.trim_matches(|c: char| c.is_whitespace() || ":=\"".contains(c)).to_owned())
}

/// Rows of the table: the system, the driver, its cards, and the libraries that are found.
pub fn tell() {
    row("this program", &format!("{}, {}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH));
    row(
        "system",
        &format!("{}, kernel {}", line_of("/etc/os-release", "PRETTY_NAME"), line_of("/proc/sys/kernel/osrelease", "")),
    );
    // SAFETY: a text of the library's that stays.
    #[cfg(target_env = "gnu")]
    row("glibc", unsafe { CStr::from_ptr(libc::gnu_get_libc_version()) }.to_str().unwrap_or_default());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    row("processor", &format!("{}, {cores} of it for us", line_of("/proc/cpuinfo", "model name")));
    row("memory", &format!("{}, {} free", line_of("/proc/meminfo", "MemTotal"), line_of("/proc/meminfo", "MemAvailable")));
    for (name, value) in std::env::vars() {
        if ["CUDA_", "NVIDIA_", "NCCL_", "LD_LIBRARY_PATH"].iter().any(|start| name.starts_with(start)) {
            row(&name, &value);
        }
    }
    row("the driver's kernel module", &line_of("/proc/driver/nvidia/version", "NVRM version"));
    if let Err(error) = cards() {
        row("cards", &error);
    }
    for (what, library) in [("NVRTC", Library::Nvrtc), ("cuBLASLt", Library::CublasLt), ("NCCL", Library::Nccl)] {
        row(what, &library.version().unwrap_or_else(|error| error.to_string()));
    }
    let maps = read_to_string("/proc/self/maps").unwrap_or_default();
    let mut files: Vec<&str> = maps.lines().filter_map(|line| Some(&line[line.find('/')?..])).collect();
    files.retain(|file| ["libcuda", "libnvrtc", "libcublasLt", "libnccl"].iter().any(|name| file.contains(name)));
    files.sort_unstable();
    files.dedup();
    row("opened", &files.join(", "));
}

fn cards() -> Result<(), String> {
    let calls = Cuda::find().map_err(|error| error.to_string())?;
    let failed = |call: &str, e: CallError| format!("{call}: {} {}", e.name, e.words);
    let version = calls.driver_version().map_err(|e| failed("cuDriverGetVersion", e))?;
    row("the driver's CUDA", &version.to_string());
    calls.init().map_err(|e| failed("cuInit", e))?;
    let count = calls.device_count().map_err(|e| failed("cuDeviceGetCount", e))?;
    row("cards", &count.to_string());
    for number in 0..count {
        let device = calls.device(number).map_err(|e| failed("cuDeviceGet", e))?;
        let mut words = vec![calls.device_name(device).map_err(|e| failed("cuDeviceGetName", e))?];
        for (what, which) in [
            ("major", Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            ("minor", Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
            ("multiprocessors", Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            ("kHz", Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE),
            ("kHz of memory", Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE),
            ("bits of its bus", Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH),
            ("bytes of L2", Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE),
            ("bytes shared by a block at most", Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
            ("bytes shared on a multiprocessor", Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR),
            ("ECC", Attribute::CU_DEVICE_ATTRIBUTE_ECC_ENABLED),
            ("compute mode", Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_MODE),
            ("integrated", Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED),
            ("copy engines", Attribute::CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT),
            ("memory pools", Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED),
            ("pageable memory", Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS),
            ("of several cards on a board", Attribute::CU_DEVICE_ATTRIBUTE_MULTI_GPU_BOARD),
            ("PCI bus", Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID),
        ] {
            // SAFETY: a device that the driver has just given.
            let value = unsafe { calls.device_attribute(device, which) };
            words.push(value.map_or_else(|e| failed(what, e), |value| format!("{what} {value}")));
        }
        row(&format!("card {number}"), &words.join(", "));
    }
    Ok(())
}

/// Opens the first card twice and copies there and back. The exit status says whether there is one, and whether it opens.
pub fn open(images: &Path) -> ExitCode {
    let mut held = None;
    for time in ["at first", "again, while it is open"] {
        let started = Instant::now();
        match Card::open(Some(images)) {
            Ok(card) => {
                row(&format!("opened {time}"), &format!("{} in {:.2} s", card.describe(), started.elapsed().as_secs_f64()));
                held = Some(card);
            }
            Err(error) => {
                eprintln!("{error}");
                let none = Cuda::find().map_or(0, |calls| calls.init().and_then(|()| calls.device_count()).unwrap_or(1));
                return ExitCode::from(if none == 0 { NO_CARD } else { CANNOT_OPEN });
            }
        }
    }
    let mut card = held.unwrap();
    row("free and all of its memory", &format!("{:?}", card.memory().unwrap()));
    let bytes: Vec<u8> = (0..COPIED).map(|i| (i * 7 % 251) as u8).collect();
    let at = card.alloc("a test", COPIED).unwrap();
    let started = Instant::now();
    card.write(at, &bytes).unwrap();
    card.wait().unwrap();
    let (there, mut back) = (started.elapsed(), vec![0; COPIED]);
    card.read(at, &mut back).unwrap();
    let rate = |time: Duration| COPIED as f64 / time.as_secs_f64() / 1e9;
    let (there, and_back) = (rate(there), rate(started.elapsed().saturating_sub(there)));
    row("copies there and back, GB/s", &format!("{there:.1}, {and_back:.1}{}", if back == bytes { "" } else { ", **wrong**" }));
    card.free(at);
    if back == bytes { ExitCode::SUCCESS } else { ExitCode::from(CANNOT_OPEN) }
}

/// Cases that end their process in every way that a card may; for tests of this program.
pub fn rehearsal(cases: &mut Cases) -> ExitCode {
    if cases.take("a case that goes well") {
        cases.seen("an operation", "reference", 0.01, 0.1);
    }
    if cases.take("a call that fails") {
        panic!("no_such_kernel: CUDA_ERROR_NOT_FOUND");
    }
    if cases.take("an error that is too large") {
        cases.seen("an operation", "reference", 0.5, 0.1);
    }
    if cases.take("a process that is killed") {
        std::process::abort();
    }
    if cases.take("a card that hangs") {
        std::thread::sleep(Duration::from_secs(600));
    }
    if cases.take("the last") {
        cases.seen("an operation", "reference", 0.02, 0.1);
        cases.seen("another", "reference", 0.0, 0.0);
    }
    ExitCode::SUCCESS
}
