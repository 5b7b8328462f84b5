//! Kernel files to machine code, by NVRTC, which is a library that a driver's machine has and that needs no card.

use std::ffi::{CStr, CString, c_char};

use cudarc::nvrtc::{result, sys};

use super::device::{HEADER, Source};
use super::libraries::{Library, check_architecture, check_compiler, compiler_version, known_architectures};
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
    Library::Nvrtc.require()?;
    let version = compiler_version()?;
    check_compiler(version, None)?;
    check_architecture(version, &known_architectures()?, architecture)?;
    let wrong =
        |what: &str, e: result::NvrtcError| KernelError::Unsupported(format!("NVRTC cannot {what} {}: {e}", source.name()));
    let text = CString::new(text(source)).map_err(|_| KernelError::Unsupported("a kernel file holds a zero byte".into()))?;
    let name =
        CString::new(source.name()).map_err(|_| KernelError::Unsupported("a kernel file's name holds a zero byte".into()))?;
    let mut options = vec![format!("--gpu-architecture={architecture}"), OPTIONS.into()];
    if report {
        options.push("--ptxas-options=-v".into());
    }
    let program = Program(result::create_program(&text, Some(&name)).map_err(|e| wrong("read", e))?);
    // SAFETY: the program is alive until the end of this function.
    let outcome = unsafe { result::compile_program(program.0, &options) };
    // SAFETY: as above.
    let log = unsafe { result::get_program_log(program.0) }.map_err(|e| wrong("report on", e))?;
    let log = log_text(&log);
    if let Err(e) = outcome {
        return Err(KernelError::Unsupported(format!("NVRTC cannot compile {} for {architecture}: {e}\n{log}", source.name())));
    }
    let mut bytes = 0;
    // SAFETY: as above; the buffer has the size that was asked for.
    let cubin = unsafe {
        sys::nvrtcGetCUBINSize(program.0, &mut bytes).result().map_err(|e| wrong("assemble", e))?;
        let mut cubin = vec![0u8; bytes];
        sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()).result().map_err(|e| wrong("assemble", e))?;
        cubin
    };
    Ok(Compiled { cubin, log })
}

fn log_text(log: &[c_char]) -> String {
    let bytes: Vec<u8> = log.iter().map(|c| *c as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map(|text| text.to_string_lossy().trim().to_string()).unwrap_or_default()
}

/// A program that is destroyed with its owner.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once. Nothing can be done about a failure.
        let _ = unsafe { result::destroy_program(self.0) };
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
