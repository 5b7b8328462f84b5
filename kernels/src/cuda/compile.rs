//! Kernel files to machine code, by NVRTC, which is a library that a driver's machine has and that needs no card.

use std::ffi::{CStr, CString, c_char, c_int};

use cudarc::nvrtc::sys::nvrtcProgram;

use super::device::{HEADER, Source};
use super::functions::{NvrtcFunctions, Outcome};
use super::libraries::{check_architecture, check_compiler, compiled, compiler_version, known_architectures};
use crate::error::KernelError;

/// What a compiler made of a kernel file.
#[derive(Debug)]
pub struct Compiled {
    /// Machine code for one architecture.
    pub cubin: Vec<u8>,
    /// What the compiler said.
    pub log: String,
}

/// The architecture that kernels are compiled for on a card of this compute capability: on 9.0 with the instructions that later
/// cards do not have.
pub fn architecture((major, minor): (u32, u32)) -> String {
    let own = if (major, minor) == (9, 0) { "a" } else { "" };
    format!("sm_{major}{minor}{own}")
}

/// What every file is compiled with, beside its architecture.
pub(super) const OPTIONS: &str = "--std=c++17";

/// What is compiled: the header, then the file, with line numbers of their own.
pub fn text(source: Source) -> String {
    format!("#line 1 \"device.cuh\"\n{HEADER}\n#line 1 \"{}\"\n{}", source.name(), source.text())
}

/// Compiles a kernel file for an architecture (`sm_90a`). `report` asks for registers and memory of each kernel in the log.
///
/// Errors: NVRTC is missing, or does not know the architecture; what it says of the text.
pub fn compile(source: Source, architecture: &str, report: bool) -> Result<Compiled, KernelError> {
    let nvrtc = NvrtcFunctions::find()?;
    let version = compiler_version()?;
    check_compiler(version, None)?;
    check_architecture(version, &known_architectures()?, architecture)?;
    let wrong = |what: &str, e: String| KernelError::Unsupported(format!("NVRTC cannot {what} {}: {e}", source.name()));
    let zero = |_| KernelError::Unsupported(format!("{} or an option holds a zero byte", source.name()));
    let (text, name) = (CString::new(text(source)).map_err(zero)?, CString::new(source.name()).map_err(zero)?);
    let mut options = vec![format!("--gpu-architecture={architecture}"), OPTIONS.into()];
    if report {
        options.push("--ptxas-options=-v".into());
    }
    let options = options.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>().map_err(zero)?;
    let list: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = Program(nvrtc, std::ptr::null_mut());
    let none = std::ptr::null();
    // SAFETY: texts that end, and no headers; a program to write to.
    let made = unsafe { (nvrtc.create)(&raw mut program.1, text.as_ptr(), name.as_ptr(), 0, none, none) };
    compiled(nvrtc, made).map_err(|e| wrong("read", e))?;
    // SAFETY: the program and the options are alive until the end of this function.
    let outcome = unsafe { (nvrtc.compile)(program.1, list.len() as c_int, list.as_ptr()) };
    // SAFETY: as above.
    let log = unsafe { fetch(nvrtc, program.1, nvrtc.log_size, nvrtc.log) }.map_err(|e| wrong("report on", e))?;
    let log = CStr::from_bytes_until_nul(&log).map(|text| text.to_string_lossy().trim().to_string()).unwrap_or_default();
    if let Err(e) = compiled(nvrtc, outcome) {
        return Err(KernelError::Unsupported(format!("NVRTC cannot compile {} for {architecture}: {e}\n{log}", source.name())));
    }
    // SAFETY: as above.
    let cubin = unsafe { fetch(nvrtc, program.1, nvrtc.cubin_size, nvrtc.cubin) }.map_err(|e| wrong("assemble", e))?;
    Ok(Compiled { cubin, log })
}

type SizeOf = unsafe extern "C" fn(nvrtcProgram, *mut usize) -> Outcome;
type BytesOf = unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> Outcome;

/// What the compiler has of a program, by the call that says how much it is and the one that gives it.
///
/// # Safety
/// The program is alive, and the two calls belong together.
unsafe fn fetch(nvrtc: &NvrtcFunctions, program: nvrtcProgram, size: SizeOf, get: BytesOf) -> Result<Vec<u8>, String> {
    let mut bytes = 0;
    // SAFETY: the caller's; a number to write to.
    compiled(nvrtc, unsafe { size(program, &raw mut bytes) })?;
    let mut found = vec![0u8; bytes];
    // SAFETY: the caller's; as many bytes as were asked for.
    compiled(nvrtc, unsafe { get(program, found.as_mut_ptr().cast()) })?;
    Ok(found)
}

/// A program that is destroyed with its owner.
struct Program(&'static NvrtcFunctions, nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        if !self.1.is_null() {
            // SAFETY: created once, destroyed once. Nothing can be done about a failure.
            let _ = unsafe { (self.0.destroy)(&raw mut self.1) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hopper_has_instructions_of_its_own() {
        assert_eq!(architecture((8, 0)), "sm_80");
        assert_eq!(architecture((8, 9)), "sm_89");
        assert_eq!(architecture((9, 0)), "sm_90a");
    }
}
