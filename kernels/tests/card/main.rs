//! What a card computes, and how fast; `make gpu-check` runs it there (docs/gpu.md). It prints a table: each operation against the scalar reference and
//! whole decoders against the CPU backend, then bandwidth and rate of each kernel at the sizes of an 8B Llama, against ceilings measured in
//! the same run. Each part is a process of its own with a limit: one that hangs or loses the card costs its own rows only.
//!
//! Without arguments, as in `make test`, everything runs on the emulated device in tiny sizes, which shows that the program works.

#![allow(clippy::unwrap_used, reason = "a check stops at the first error")]

mod clock;
mod parity;
mod rates;
#[path = "../support/mod.rs"]
mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clock::Clock;
use rates::{Ceilings, Sizes};
use support::emulation::Emulated;
use support::exchange;
use tidemill_kernels::collective::Member;
use tidemill_kernels::cuda::device::{Device, Prefill};
use tidemill_kernels::cuda::driver::{Card, prepare};
use tidemill_kernels::cuda::trial::Trial;
use tidemill_kernels::cuda::{CudaBackend, nccl};
use tidemill_kernels::{Activations, KernelError, Limits};

/// Cards that kernels are compiled for ahead.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_89", "sm_90a"];

/// Exit status where there is no card to check.
const NO_CARD: u8 = 2;

const USAGE: &str = "card: without arguments, a check of this program on the emulated device
card images FOLDER                       compile the kernels for every card that is named, into FOLDER
card check FOLDER REPORT [SECONDS]       check the first card; the table goes to REPORT, too
card part FOLDER NAME [COPY PRODUCT]     one part of it
card part FOLDER NAME brief              with a sample of its cases";

/// A part of the check: its name, the section of the table it belongs to, and how long it may take.
const PARTS: [(&str, Section, u64); 25] = [
    ("parity rows", Section::Parity, 20),
    ("parity linears", Section::Parity, 20),
    ("parity attention", Section::Parity, 40),
    ("parity attention wgmma", Section::Parity, 60),
    ("parity fp8", Section::Parity, 40),
    ("parity fp8 activations", Section::Parity, 20),
    ("parity low-rank", Section::Parity, 20),
    ("parity sampling", Section::Parity, 20),
    ("parity company", Section::Parity, 20),
    ("parity decoders", Section::Parity, 40),
    ("parity large", Section::Parity, 60),
    ("parity exchanges", Section::Parity, 60),
    ("ceilings", Section::Ceilings, 40),
    ("rates rows", Section::Rates, 30),
    ("rates bf16", Section::Rates, 60),
    ("rates int8", Section::Rates, 60),
    ("rates int4", Section::Rates, 60),
    ("rates fp8", Section::Rates, 60),
    ("rates fp8 activations", Section::Rates, 60),
    ("rates low-rank", Section::Rates, 30),
    ("rates decode", Section::Rates, 60),
    ("rates decode fp8", Section::Rates, 60),
    ("rates prefill", Section::Rates, 30),
    ("rates prefill wgmma", Section::Rates, 30),
    ("rates sampling", Section::Rates, 30),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    Parity,
    Ceilings,
    Rates,
}

impl Section {
    fn heading(self) -> &'static str {
        match self {
            Section::Parity => {
                "\n### The same numbers\n\n| operation | against | cases | largest error | allowed | |\n|---|---|--:|--:|--:|---|"
            }
            Section::Ceilings => "\n### Ceilings, in this run\n\n| what | |\n|---|--:|",
            Section::Rates => {
                "\n### Kernels at the sizes of an 8B Llama\n\n| kernel | sizes | µs | GB/s | of the copy | TFLOP/s | of the product |\n\
                 |---|---|--:|--:|--:|--:|--:|"
            }
        }
    }
}

/// Where the parts run.
enum Place<'a> {
    /// On a card, with compiled kernels from a folder.
    Card(&'a Path),
    Emulated,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["images", folder] => images(Path::new(folder)),
        ["check", folder, report, rest @ ..] => {
            let seconds = rest.first().and_then(|s| s.parse().ok()).unwrap_or(300);
            check(&Place::Card(Path::new(folder)), Some(Path::new(report)), Duration::from_secs(seconds))
        }
        ["part", folder, name, rest @ ..] => {
            let place = if *folder == "-" { Place::Emulated } else { Place::Card(Path::new(folder)) };
            part(&place, name, rest)
        }
        // As the test harness is called: a filter of names, or flags.
        [] => check(&Place::Emulated, None, Duration::from_secs(600)),
        [filter, ..] if filter.starts_with('-') && *filter != "--help" => match words.contains(&"--list") {
            true => ExitCode::SUCCESS,
            false => check(&Place::Emulated, None, Duration::from_secs(600)),
        },
        [filter, ..] if !["--help", "images", "check", "part"].contains(filter) => ExitCode::SUCCESS,
        _ => {
            println!("{USAGE}");
            ExitCode::FAILURE
        }
    }
}

fn images(folder: &Path) -> ExitCode {
    match ARCHITECTURES.iter().try_for_each(|architecture| prepare(architecture, folder)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn check(place: &Place<'_>, report: Option<&Path>, limit: Duration) -> ExitCode {
    let start = Instant::now();
    let mut table = Table { lines: Vec::new(), report: report.map(Path::to_owned), failed: false };
    match place {
        // Opened here first, so that a machine without one gets one plain line.
        Place::Card(images) => match Card::open(Some(images)) {
            Ok(card) => table.line(&card.describe()),
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::from(NO_CARD);
            }
        },
        Place::Emulated => table.line("Emulated, in tiny sizes: the numbers say nothing."),
    }
    let (mut section, mut ceilings) = (None, Ceilings::default());
    for (name, own, seconds) in PARTS {
        if section.replace(own) != Some(own) {
            table.line(own.heading());
        }
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            table.line(&format!("| {name} | not run: the limit of {} s was reached |", limit.as_secs()));
            continue;
        }
        // An emulated thread is slow, and tests share their processors: only the whole is limited.
        let most = if matches!(place, Place::Emulated) { left } else { left.min(Duration::from_secs(seconds)) };
        run_part(place, name, &mut ceilings, most, &mut table);
    }
    table.line(&format!("\n{:.0} s in all.", start.elapsed().as_secs_f64()));
    if table.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// What was printed so far, also kept in a file: a run that is killed leaves what it had.
struct Table {
    lines: Vec<String>,
    report: Option<PathBuf>,
    failed: bool,
}

impl Table {
    fn line(&mut self, line: &str) {
        println!("{line}");
        self.lines.push(line.to_owned());
        if let Some(report) = &self.report {
            std::fs::write(report, self.lines.join("\n") + "\n").unwrap();
        }
    }
}

/// Runs a part in a process of its own, and takes over its rows as they come.
fn run_part(place: &Place<'_>, name: &str, ceilings: &mut Ceilings, limit: Duration, table: &mut Table) {
    let folder = match place {
        Place::Card(folder) => folder.as_os_str(),
        Place::Emulated => "-".as_ref(),
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("part").arg(folder).arg(name).args([ceilings.copy, ceilings.product].map(|v| v.to_string()));
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let (rows, started) = (child.stdout.take().unwrap(), Instant::now());
    let (sender, receiver) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(rows).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    // The sender is dropped at the end of the output.
    while let Ok(line) = receiver.recv_timeout(limit.saturating_sub(started.elapsed())) {
        ceilings.hear(&line);
        table.failed |= line.ends_with("| **wrong** |");
        table.line(&line);
    }
    if started.elapsed() >= limit {
        table.line(&format!("| {name} | stopped after {} s |", limit.as_secs()));
        table.failed = true;
        // It may have ended meanwhile.
        child.kill().ok();
    }
    let status = child.wait().unwrap();
    reader.join().unwrap();
    if !status.success() && started.elapsed() < limit {
        table.line(&format!("| {name} | failed: {status} |"));
        table.failed = true;
    }
}

fn part(place: &Place<'_>, name: &str, rest: &[&str]) -> ExitCode {
    let numbers: Vec<f64> = rest.iter().filter_map(|s| s.parse().ok()).collect();
    let ceilings = match numbers.as_slice() {
        [copy, product, ..] => Ceilings { copy: *copy, product: *product },
        _ => Ceilings::default(),
    };
    if name == "parity exchanges" {
        exchanges(place);
        return ExitCode::SUCCESS;
    }
    let by_warpgroups = name.ends_with("wgmma");
    let activations = if name.ends_with("activations") { Activations::Fp8 } else { Activations::Bf16 };
    match place {
        Place::Card(images) => {
            if by_warpgroups && let Err(why) = chooses(images) {
                println!("| {name} | not run: {why} |");
                return ExitCode::SUCCESS;
            }
            let one = Limits { max_tokens: 1, max_samples: 1, max_positions: 1 };
            let opened = CudaBackend::new(Card::open(Some(images)).unwrap(), one).with_activations(activations);
            if let Some(why) = opened.err() {
                println!("| {name} | not run: {why} |");
                return ExitCode::SUCCESS;
            }
            let open = |limits: Limits| {
                let mut card = Card::open(Some(images)).unwrap();
                let prefill = if by_warpgroups { Prefill::Wgmma } else { Prefill::Mma };
                card.choose_prefill(Some(prefill), &Trial::serving(), None).unwrap();
                CudaBackend::new(card, limits).with_activations(activations).unwrap()
            };
            on(open, name, &Sizes::serving(), ceilings, rest.contains(&"brief"))
        }
        Place::Emulated => {
            let open = |limits| {
                let mut device = Emulated::default();
                device.prefill = if by_warpgroups { Prefill::Wgmma } else { Prefill::Mma };
                CudaBackend::new(device, limits).with_activations(activations).unwrap()
            };
            on(open, name, &Sizes::tiny(), ceilings, true)
        }
    }
}

/// A row of what a server would choose on this card, if it knows both ways.
fn chooses(images: &Path) -> Result<(), KernelError> {
    let mut card = Card::open(Some(images))?;
    card.choose_prefill(Some(Prefill::Wgmma), &Trial::serving(), None)?;
    card.choose_prefill(None, &Trial::serving(), None)?;
    let words = [64, 128].map(|width| format!("heads of {width} by {:?}", card.prefill(width)));
    println!("| a server's own trial: prompts with {} {} | | | | | |", words.join(", "), card.warnings().join("; "));
    Ok(())
}

/// Steps with exchanges, captured where they can be, on as many cards as there are, four at most; on two emulated ones.
fn exchanges(place: &Place<'_>) {
    let off = match place {
        Place::Emulated => exchange::worst_of(on_devices(Member::group(2).into_iter().map(Emulated::of_group))).0,
        Place::Card(images) => {
            let open = |number| Card::open_number(number, Some(images)).unwrap();
            let first = open(0);
            let visible = first.visible().unwrap().min(4);
            if visible < 2 {
                println!("| exchanges between cards | not run: the driver shows one card |");
                return;
            }
            let cards = std::iter::once(first).chain((1..visible).map(open)).collect();
            let (cards, _) = nccl::join(cards).unwrap();
            exchange::worst_of(on_devices(cards.into_iter())).0
        }
    };
    let verdict = if off < 1e-6 { "ok" } else { "**wrong**" };
    println!("| exchanges between cards | reference | 1 | {off:.1e} | 1.0e-6 | {verdict} |");
}

fn on_devices<D: Device>(devices: impl Iterator<Item = D>) -> Vec<CudaBackend<D>> {
    devices.map(|device| CudaBackend::new(device, exchange::LIMITS).capturing()).collect()
}

/// A part on a device. `briefly`: a sample of the cases.
fn on<D: Clock>(
    open: impl Fn(Limits) -> CudaBackend<D>,
    name: &str,
    sizes: &Sizes,
    ceilings: Ceilings,
    briefly: bool,
) -> ExitCode {
    let mut row = |line: String| {
        println!("{line}");
        std::io::stdout().flush().unwrap();
    };
    if !PARTS.iter().any(|(part, ..)| *part == name) {
        eprintln!("there is no part {name:?}; there are: {}", PARTS.map(|(part, ..)| part).join(", "));
        return ExitCode::FAILURE;
    }
    match name.split_once(' ') {
        Some(("parity", what)) => parity::part(open, what, sizes, briefly, &mut row),
        Some(("rates", what)) => rates::part(open, what, sizes, ceilings, &mut row),
        _ => rates::ceilings(open, sizes, &mut row),
    }
    ExitCode::SUCCESS
}
