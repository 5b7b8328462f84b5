//! What a card computes, and how fast; `make gpu-check` runs it there (docs/gpu.md). It prints a table: each operation against the scalar reference and
//! whole decoders against the CPU backend, then bandwidth and rate of each kernel at the sizes of an 8B Llama, against ceilings measured in
//! the same run. Each part is a process of its own with a limit: one that hangs or loses the card costs the case that it was at, is told with
//! what it said, and goes on behind that case.
//!
//! Without arguments, as in `make test`, everything runs on the emulated device in tiny sizes, which shows that the program works.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a case stops at the first error")]

mod cases;
mod check;
mod clock;
mod machine;
mod parity;
mod rates;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use cases::{Cases, say};
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
const ARCHITECTURES: [&str; 7] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_103", "sm_120"];

/// Exit status where there is no card to check.
const NO_CARD: u8 = 2;
/// Where there is one, and it cannot be used.
const CANNOT_OPEN: u8 = 3;
/// Nothing is wrong, but the time was over before all was done.
const UNFINISHED: u8 = 4;

const USAGE: &str = "card: without arguments, a check of this program on the emulated device
card images FOLDER [ARCHITECTURE...]     compile the kernels into FOLDER, for these alone where any is named (sm_90a)
card check FOLDER REPORT [SECONDS]       check the first card; the table goes to REPORT, too
card part FOLDER NAME [COPY PRODUCT]     one part of it
card part FOLDER NAME brief              with a sample of its cases
card part FOLDER NAME from=N [only]      from its Nth case on, or that alone
Exit status: 1 where something is wrong, 2 where there is no card, 3 where there is one that cannot be used";

/// A part of the check: its name, the section of the table it belongs to, and how long it may take.
const PARTS: [(&str, Section, u64); 30] = [
    ("machine", Section::Machine, 20),
    ("open", Section::Machine, 60),
    ("parity rows", Section::Parity, 20),
    ("parity linears", Section::Parity, 20),
    ("parity attention", Section::Parity, 40),
    ("parity attention wgmma", Section::Parity, 60),
    ("parity fp8", Section::Parity, 40),
    ("parity fp8 activations", Section::Parity, 20),
    ("parity low-rank", Section::Parity, 20),
    ("parity experts", Section::Parity, 30),
    ("parity sampling", Section::Parity, 20),
    ("parity company", Section::Parity, 20),
    ("parity decoders", Section::Parity, 40),
    ("parity captures", Section::Parity, 30),
    ("parity training", Section::Parity, 40),
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
    // Last: the processor takes its time.
    ("parity large", Section::Parity, 60),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    Machine,
    Parity,
    Ceilings,
    Rates,
}

impl Section {
    fn heading(self) -> &'static str {
        match self {
            Section::Machine => "\n### The machine\n\n| what | |\n|---|---|",
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

impl Place<'_> {
    /// How long a case may be silent.
    fn silence(&self) -> Option<Duration> {
        match self {
            Place::Card(_) => Some(check::SILENCE),
            Place::Emulated => None,
        }
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["images", folder, rest @ ..] => images(Path::new(folder), rest),
        ["check", folder, report, rest @ ..] => {
            let seconds = rest.first().and_then(|s| s.parse().ok()).unwrap_or(300);
            check::check(&Place::Card(Path::new(folder)), Some(Path::new(report)), Duration::from_secs(seconds))
        }
        ["part", folder, name, rest @ ..] => {
            let place = if *folder == "-" { Place::Emulated } else { Place::Card(Path::new(folder)) };
            part(&place, name, rest)
        }
        // As the test harness is called: a filter of names, or flags.
        [] => emulated(),
        [filter, ..] if filter.starts_with('-') && *filter != "--help" => match words.contains(&"--list") {
            true => ExitCode::SUCCESS,
            false => emulated(),
        },
        [filter, ..] if !["--help", "images", "check", "part"].contains(filter) => ExitCode::SUCCESS,
        _ => {
            println!("{USAGE}");
            ExitCode::FAILURE
        }
    }
}

fn images(folder: &Path, wanted: &[&str]) -> ExitCode {
    if let Some(unknown) = wanted.iter().find(|name| !ARCHITECTURES.contains(name)) {
        eprintln!("no architecture {unknown}: one of {}", ARCHITECTURES.join(", "));
        return ExitCode::FAILURE;
    }
    let named = |name: &&&str| wanted.is_empty() || wanted.contains(name);
    match ARCHITECTURES.iter().filter(named).try_for_each(|architecture| prepare(architecture, folder)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn emulated() -> ExitCode {
    match check::check(&Place::Emulated, None, Duration::from_secs(600)) {
        ExitCode::SUCCESS => check::rehearse(),
        failed => failed,
    }
}

fn part(place: &Place<'_>, name: &str, rest: &[&str]) -> ExitCode {
    let numbers: Vec<f64> = rest.iter().filter_map(|s| s.parse().ok()).collect();
    let ceilings = match numbers.as_slice() {
        [copy, product, ..] => Ceilings { copy: *copy, product: *product },
        _ => Ceilings::default(),
    };
    let cases = &mut Cases::of(rest);
    match (name, place) {
        ("machine", _) => {
            machine::tell();
            return ExitCode::SUCCESS;
        }
        ("open", Place::Card(images)) => return machine::open(images),
        ("open", Place::Emulated) => return ExitCode::SUCCESS,
        ("rehearsal", _) => return machine::rehearsal(cases),
        _ => {}
    }
    let by_warpgroups = name.ends_with("wgmma");
    let activations = if name.ends_with("activations") { Activations::Fp8 } else { Activations::Bf16 };
    // While it is open the driver keeps what a card has for this process, so that those opened for a case are opened fast.
    let _kept = match place {
        Place::Card(images) => Some(Card::open(Some(images)).unwrap()),
        Place::Emulated => None,
    };
    match (name, place) {
        ("parity exchanges", _) => exchanges(place, cases),
        ("parity training", Place::Card(images)) => {
            parity::training(&|| Box::new(Card::open_for_training(0, Some(images)).unwrap()), cases);
        }
        ("parity training", Place::Emulated) => parity::training(&|| Box::new(Emulated::default()), cases),
        (_, Place::Card(images)) => {
            if by_warpgroups && let Err(why) = chooses(images, rest.contains(&"brief")) {
                assert!(matches!(why, KernelError::Unsupported(_)), "{why}");
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
            return on(open, name, &Sizes::serving(), ceilings, rest.contains(&"brief"), cases);
        }
        (_, Place::Emulated) => {
            let open = |limits| {
                let mut device = Emulated::default();
                device.prefill = if by_warpgroups { Prefill::Wgmma } else { Prefill::Mma };
                CudaBackend::new(device, limits).with_activations(activations).unwrap()
            };
            return on(open, name, &Sizes::tiny(), ceilings, true, cases);
        }
    }
    ExitCode::SUCCESS
}

/// A row of what a server would choose on this card, if it knows both ways; `briefly`: only whether it does.
fn chooses(images: &Path, briefly: bool) -> Result<(), KernelError> {
    let mut card = Card::open(Some(images))?;
    card.choose_prefill(Some(Prefill::Wgmma), &Trial::serving(), None)?;
    if briefly {
        return Ok(());
    }
    card.choose_prefill(None, &Trial::serving(), None)?;
    let words = [64, 128].map(|width| format!("heads of {width} by {:?}", card.prefill(width)));
    println!("| a server's own trial: prompts with {} {} | | | | | |", words.join(", "), card.warnings().join("; "));
    Ok(())
}

/// Steps with exchanges, captured where they can be, on as many cards as there are, four at most; on two emulated ones.
fn exchanges(place: &Place<'_>, cases: &mut Cases) {
    let group = || Member::group(2).into_iter().map(Emulated::of_group);
    let joined = |images: &Path| {
        let open = |number| Card::open_number(number, Some(images)).unwrap();
        let first = open(0);
        let visible = first.visible().unwrap().min(4);
        (visible > 1).then(|| nccl::join(std::iter::once(first).chain((1..visible).map(open)).collect()).unwrap().0)
    };
    let mut take = |what: &str, ranks: usize| cases.take(&format!("{what}, {ranks} cards"));
    let (mut off, mut ahead) = (None, None);
    let same = |(drawn, wanted)| if drawn == wanted { 0.0 } else { f64::INFINITY };
    match place {
        Place::Emulated => {
            off = take("exchanges", 2).then(|| exchange::worst_of(on_devices(group())).0);
            ahead = take("exchanges, one step ahead", 2).then(|| same(exchange::ahead(on_devices(group()))));
        }
        Place::Card(images) => {
            let Some(cards) = joined(images) else {
                say("| exchanges between cards | not run: the driver shows one card |");
                return;
            };
            let ranks = cards.len();
            if take("exchanges", ranks) {
                off = Some(exchange::worst_of(on_devices(cards.into_iter())).0);
            } else {
                drop(cards);
            }
            if take("exchanges, one step ahead", ranks) {
                // Those of before are given back first.
                ahead = joined(images).map(|cards| same(exchange::ahead(on_devices(cards.into_iter()))));
            }
        }
    }
    for (what, off) in [("exchanges between cards", off), ("exchanges between cards, one step ahead", ahead)] {
        off.into_iter().for_each(|off| cases.seen(what, "reference", off, 1e-6));
    }
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
    cases: &mut Cases,
) -> ExitCode {
    let mut row = |line: String| say(&line);
    if !PARTS.iter().any(|(part, ..)| *part == name) {
        eprintln!("there is no part {name:?}; there are: {}", PARTS.map(|(part, ..)| part).join(", "));
        return ExitCode::FAILURE;
    }
    match name.split_once(' ') {
        Some(("parity", what)) => parity::part(open, what, sizes, briefly, cases),
        Some(("rates", what)) => rates::part(open, what, sizes, ceilings, &mut row),
        _ => rates::ceilings(open, sizes, &mut row),
    }
    ExitCode::SUCCESS
}
