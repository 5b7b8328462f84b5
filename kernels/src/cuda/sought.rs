//! A card that is looked for, and what is told of one that is not to be had.

use cudarc::driver::sys::{self, CUresult};

use super::calls::{CallError, Calls, Cuda, failed};
use super::libraries::{Library, check_driver};
use crate::error::KernelError;

/// A card that the kernels run on, and that nothing was reserved on yet.
pub(super) struct Sought {
    pub device: sys::CUdevice,
    pub name: String,
    pub capability: (u32, u32),
    pub processors: i32,
    pub version: i32,
}

impl Sought {
    pub fn card<C: Calls>(calls: &C, number: usize) -> Result<Self, KernelError> {
        // The first call of all: what is no driver says so here.
        let version = calls.driver_version().map_err(|e| does_not_start(number, e))?;
        check_driver(version)?;
        calls.init().map_err(|e| does_not_start(number, e))?;
        let count = calls.device_count().map_err(|e| failed("the driver counts no cards", e))?;
        let ordinal = i32::try_from(number).ok().filter(|ordinal| *ordinal < count).ok_or_else(|| no_card(number, count))?;
        let device = calls.device(ordinal).map_err(|e| failed("the card is not to be had", e))?;
        let name = calls.device_name(device).map_err(|e| failed("the card has no name", e))?;
        let attribute = |which| {
            // SAFETY: a device that the driver has just given.
            unsafe { calls.device_attribute(device, which) }.map_err(|e| failed("the card says nothing of itself", e))
        };
        let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let processors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        if major < 8 {
            return Err(KernelError::Unsupported(format!(
                "{name} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later. Use --device cpu"
            )));
        }
        Ok(Self { device, name, capability: (major as u32, minor as u32), processors, version })
    }
}

/// Whether there is a card of this number for a training to be opened on later, and all that this needs. Nothing is reserved on the card.
pub fn check_card(number: usize) -> Result<(), KernelError> {
    Sought::card(&Cuda::find()?, number)?;
    Library::Nvrtc.require()?;
    Library::CublasLt.require()
}

/// Whether the machine has a card of this number, also where something else is missing or wrong; only what says for certain that there is none
/// is a no.
pub fn has_card(number: usize) -> bool {
    Library::Driver.is_there() && Cuda::find().map_or(true, |calls| counts(&calls, number))
}

fn counts<C: Calls>(calls: &C, number: usize) -> bool {
    let counted = calls.driver_version().and_then(|_| calls.init()).and_then(|()| calls.device_count());
    match counted {
        Ok(count) => i32::try_from(number).is_ok_and(|ordinal| ordinal < count),
        Err(error) => error.code != CUresult::CUDA_ERROR_NO_DEVICE as u32,
    }
}

fn no_card(number: usize, count: i32) -> KernelError {
    let seen = match count {
        0 => "none".to_owned(),
        1 => "card 0 only".to_owned(),
        count => format!("cards 0 to {}", count - 1),
    };
    KernelError::Unsupported(format!(
        "no card {number}: the NVIDIA driver shows {seen} (CUDA_VISIBLE_DEVICES hides the others); choose another with --device \
         cuda:N, or use --device cpu"
    ))
}

fn does_not_start(number: usize, e: CallError) -> KernelError {
    const NO_DEVICE: u32 = CUresult::CUDA_ERROR_NO_DEVICE as u32;
    const STUB_LIBRARY: u32 = CUresult::CUDA_ERROR_STUB_LIBRARY as u32;
    const NOT_READY: u32 = CUresult::CUDA_ERROR_SYSTEM_NOT_READY as u32;
    const MISMATCH: u32 = CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH as u32;
    const COMPAT: u32 = CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE as u32;
    match e.code {
        NO_DEVICE => no_card(number, 0),
        STUB_LIBRARY => KernelError::Unsupported(
            "the libcuda.so that was found is the toolkit's stand-in for linking, and no driver; see to it that the driver's comes \
             first on the loader's path, or use --device cpu"
                .into(),
        ),
        // Whatever it is, nothing was begun: who may compute elsewhere does.
        code => {
            let hint = match code {
                NOT_READY => "where cards are joined by NVSwitch, the service nvidia-fabricmanager must run",
                MISMATCH => {
                    "libcuda.so.1 and the kernel's module are of different versions: restart the machine, or give the container the \
                     library of the machine"
                }
                COMPAT => {
                    "the libcuda.so.1 that was found is of a package cuda-compat, which this card does not take: take it off the \
                     loader's path"
                }
                _ => "nvidia-smi says whether the driver works, and a container needs the devices /dev/nvidia*, nvidia-uvm among them",
            };
            let CallError { name, words, .. } = e;
            KernelError::Unsupported(format!("the driver does not start: {name} {words}; {hint}; or use --device cpu"))
        }
    }
}

pub(super) fn no_context(card: &str, e: CallError) -> KernelError {
    const UNAVAILABLE: u32 = CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE as u32;
    match e.code {
        UNAVAILABLE => KernelError::Unsupported(format!(
            "{card} is not to be had: {} {}; another process has it for itself, or its compute mode forbids it (nvidia-smi -q -d \
             COMPUTE); choose another with --device cuda:N, or use --device cpu",
            e.name, e.words
        )),
        _ => failed("no context", e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_a_card_that_is_not_there_is_told_which_are() {
        assert!(no_card(0, 0).to_string().contains("shows none"));
        assert!(no_card(3, 1).to_string().contains("card 0 only"));
        let text = no_card(9, 8).to_string();
        assert!(text.contains("no card 9") && text.contains("cards 0 to 7") && text.contains("--device cpu"), "{text}");
    }
}
