//! Every CUDA kernel compiles for every kind of card that we name, without a warning, and in the registers that it may take. Needs
//! NVRTC, which `make test` fetches, and no card.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

use std::collections::BTreeMap;

use tidemill_kernels::cuda::compile::compile;
use tidemill_kernels::cuda::device::Source;

/// What the assembler reports of a kernel.
#[derive(Clone, Copy, Debug, Default)]
struct Report {
    stack: u32,
    spilled: u32,
    registers: u32,
}

fn number_before(line: &str, what: &str) -> u32 {
    assert!(line.contains(what), "no {what:?} in {line:?}");
    let end = line.find(what).unwrap();
    line[..end].split_whitespace().last().unwrap().parse().unwrap()
}

/// By kernel.
fn reports(log: &str) -> BTreeMap<String, Report> {
    let mut all: BTreeMap<String, Report> = BTreeMap::new();
    let mut kernel = String::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().unwrap().into();
        } else if line.contains("bytes stack frame") {
            let report = all.entry(kernel.clone()).or_default();
            report.stack = number_before(line, " bytes stack frame");
            report.spilled = number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
        } else if line.contains(" registers") && line.contains("Used ") {
            all.entry(kernel.clone()).or_default().registers = number_before(line, " registers");
        }
    }
    all
}

/// Every kernel for one kind of card.
fn compiles_without_warnings_or_spills(architecture: &str) {
    for source in Source::ALL.into_iter().filter(|source| source.is_for(architecture)) {
        let compiled = compile(source, architecture, true).unwrap();
        assert!(compiled.cubin.starts_with(b"\x7fELF"), "{source:?}");
        assert!(!compiled.log.contains("warning"), "{}", compiled.log);
        // What the assembler says where it makes products of warpgroups wait for each other.
        assert!(!compiled.log.contains("Performance Loss"), "{}", compiled.log);
        let reports = reports(&compiled.log);
        let names: Vec<&str> = source.text().match_indices("\nKERNEL").map(|(at, _)| &source.text()[at..]).collect();
        assert!(reports.len() >= names.len() && !reports.is_empty(), "{source:?}: {} reports\n{}", reports.len(), compiled.log);
        for (kernel, report) in reports {
            println!("{architecture} {kernel}: {report:?}");
            assert!(report.registers > 0, "{kernel}: {report:?}");
            assert!(report.spilled == 0, "{architecture} {kernel}: {report:?}");
            // A stack frame is local memory, which is as slow as any.
            assert!(!kernel.contains("attention") || report.stack == 0, "{architecture} {kernel}: {report:?}");
        }
    }
}

// A test for each kind of card, so that they are compiled beside each other.
#[test]
fn kernels_compile_for_ampere_without_warnings_or_spills() {
    compiles_without_warnings_or_spills("sm_80");
}

#[test]
fn kernels_compile_for_ada_without_warnings_or_spills() {
    compiles_without_warnings_or_spills("sm_89");
}

#[test]
fn kernels_compile_for_hopper_without_warnings_or_spills() {
    compiles_without_warnings_or_spills("sm_90a");
}

/// What a later kind of card does not have must not be asked of it.
#[test]
fn kernels_compile_for_cards_that_came_later() {
    for source in Source::ALL.into_iter().filter(|source| source.is_for("sm_120")) {
        let compiled = compile(source, "sm_120", false).unwrap();
        assert!(compiled.cubin.starts_with(b"\x7fELF") && !compiled.log.contains("warning"), "{source:?}: {}", compiled.log);
    }
    let unknown = compile(Source::Rows, "sm_999", false).unwrap_err().to_string();
    assert!(unknown.contains("makes no code for sm_999") && unknown.contains("nvidia-cuda-nvrtc"), "{unknown}");
}
