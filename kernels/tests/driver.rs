//! The card itself, its captures, copies, memory and errors, over a driver that is not there and that keeps to a driver's rules.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

use std::path::Path;
use std::time::Duration;

use crate::support::decoder::Decoder;
use crate::support::driver::{FakeDriver, Machine, NamedImages};
use crate::support::emulation::Emulated;
use crate::support::serving::{LIMITS, decoder, serve};
use crate::support::steps::{Sequence, append};
use cudarc::driver::sys::CUresult;
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::cuda::device::{Address, Device, Kernel, Launch, Operands, Pieces, Prefill, Product, Source};
use tidemill_kernels::cuda::driver::Card;
use tidemill_kernels::cuda::trial::Trial;
use tidemill_kernels::*;

const IMAGES: NamedImages = NamedImages::GOOD;

fn open(driver: &FakeDriver) -> Result<Card<FakeDriver>, KernelError> {
    Card::over(driver.clone(), 0, &IMAGES)
}

fn error(driver: &FakeDriver, number: usize) -> String {
    Card::over(driver.clone(), number, &IMAGES).map_or_else(|error| error.to_string(), |_| "it opened".into())
}

#[test]
fn a_card_that_is_opened_and_closed_gives_everything_back() {
    let driver = FakeDriver::recording(Machine::default());
    let card = open(&driver).unwrap();
    assert_eq!(card.describe(), "a card that is not there, sm_90a, 132 multiprocessors, 80 GiB, CUDA 13.0");
    driver.take_log();
    drop(card);
    driver.assert_empty();
    assert_eq!(driver.take_log().last(), Some(&"release_context"));
}

#[test]
fn whatever_call_fails_while_a_card_is_opened_it_says_so_and_nothing_is_left() {
    for code in [CUresult::CUDA_ERROR_OUT_OF_MEMORY, CUresult::CUDA_ERROR_UNKNOWN, CUresult::CUDA_ERROR_ECC_UNCORRECTABLE] {
        for after in 0.. {
            let driver = FakeDriver::recording(Machine::default());
            driver.fail_after(after, code);
            let opened = open(&driver);
            if !driver.has_failed() {
                assert!(after > 15 && opened.is_ok(), "{after} calls");
                break;
            }
            let call = driver.failed().unwrap();
            match opened.err() {
                // A file that it can do without.
                None => assert_eq!(call, "load_module"),
                Some(KernelError::Memory { .. }) => assert_eq!(code, CUresult::CUDA_ERROR_OUT_OF_MEMORY),
                Some(KernelError::Device(text)) => assert!(text.contains(&format!("{code:?}")), "{text}"),
                // What does not even begin may be given up for the processor.
                Some(KernelError::Unsupported(text)) if ["driver_version", "init"].contains(&call) => {
                    assert!(text.contains(&format!("{code:?}")), "{text}")
                }
                other => panic!("{call}: {other:?}"),
            }
            driver.assert_empty();
        }
    }
}

#[test]
fn a_machine_that_will_not_do_is_named() {
    let machine = Machine::default();
    let old = FakeDriver::recording(Machine { version: 11_080, ..machine });
    assert!(error(&old, 0).contains("it is for CUDA 11.8"));
    let none = FakeDriver::recording(Machine { cards: 0, ..machine });
    assert!(error(&none, 0).contains("shows none"));
    let two = FakeDriver::recording(Machine { cards: 2, ..machine });
    assert!(error(&two, 2).contains("no card 2") && error(&two, usize::MAX).contains("cards 0 to 1"));
    let turing = FakeDriver::recording(Machine { capability: (7, 5), ..machine });
    assert!(error(&turing, 0).contains("compute capability 7.5"));
    for (call, code, words) in [
        ("init", CUresult::CUDA_ERROR_NO_DEVICE, "shows none"),
        ("init", CUresult::CUDA_ERROR_STUB_LIBRARY, "stand-in"),
        ("driver_version", CUresult::CUDA_ERROR_STUB_LIBRARY, "stand-in"),
        ("init", CUresult::CUDA_ERROR_SYSTEM_NOT_READY, "nvidia-fabricmanager"),
        ("init", CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "different versions"),
        ("init", CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE, "cuda-compat"),
        ("init", CUresult::CUDA_ERROR_UNKNOWN, "nvidia-smi"),
        ("retain_context", CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE, "compute mode"),
    ] {
        let driver = FakeDriver::recording(machine);
        driver.fail_next(call, code);
        let refused = Card::over(driver.clone(), 0, &IMAGES).err().unwrap();
        // Who asked for any device gets the processor.
        assert!(matches!(&refused, KernelError::Unsupported(text) if text.contains(words)), "{refused}");
        driver.assert_empty();
    }
    [old, none, two, turing].iter().for_each(FakeDriver::assert_empty);
}

#[test]
fn an_image_that_the_driver_refuses_is_made_anew_once() {
    let driver = FakeDriver::recording(Machine::default());
    drop(Card::over(driver.clone(), 0, &NamedImages { stale: true, ..IMAGES }).unwrap());
    let files = Source::ALL.into_iter().filter(|source| !source.trains() && source.is_for("sm_90a")).count();
    assert_eq!(driver.take_log().iter().filter(|call| **call == "load_module").count(), 2 * files);
    driver.assert_empty();
    let refused = Card::over(driver.clone(), 0, &NamedImages { stale: true, broken: true, ..IMAGES }).err().unwrap().to_string();
    assert!(refused.contains("refuses a kernel file: CUDA_ERROR_INVALID_IMAGE"), "{refused}");
    driver.assert_empty();
}

#[test]
fn a_card_does_without_a_file_that_only_makes_it_faster_and_says_why() {
    const HOPPER: &[Source] = &[Source::AttentionHopper];
    for (images, words) in [
        (NamedImages { uncompiled: HOPPER, ..IMAGES }, "NVRTC cannot compile attention_hopper.cu"),
        (NamedImages { refused: HOPPER, ..IMAGES }, "refuses a kernel file: CUDA_ERROR_INVALID_IMAGE"),
    ] {
        let driver = FakeDriver::recording(Machine::default());
        let mut card = Card::over(driver.clone(), 0, &images).unwrap();
        driver.take_log();
        card.choose_prefill(None, &trial(), None).unwrap();
        assert_eq!((card.prefill(64), card.prefill(128), driver.take_log().len()), (Prefill::Mma, Prefill::Mma, 0));
        let [warning] = card.warnings() else { panic!("{:?}", card.warnings()) };
        assert!(warning.starts_with("attention_hopper.cu is left out") && warning.contains(words), "{warning}");
        // Who asked for the other kernel wants no news of this one; who asks for it hears why not.
        card.choose_prefill(Some(Prefill::Mma), &trial(), None).unwrap();
        assert_eq!(card.warnings(), &[] as &[String]);
        let refused = card.choose_prefill(Some(Prefill::Wgmma), &trial(), None).unwrap_err().to_string();
        assert!(refused.contains(words) && refused.contains("--attention-backend auto or mma"), "{refused}");
        serve(&mut captured(card), false).unwrap();
        driver.assert_empty();
    }
    // Without any other there is no card.
    for images in [NamedImages { uncompiled: &[Source::Rows], ..IMAGES }, NamedImages { refused: &[Source::Rows], ..IMAGES }] {
        let driver = FakeDriver::recording(Machine::default());
        assert!(Card::over(driver.clone(), 0, &images).is_err());
        if !images.uncompiled.is_empty() {
            assert!(!driver.take_log().contains(&"retain_context"), "it was known before anything was reserved");
            continue;
        }
        driver.assert_empty();
    }
}

#[test]
fn products_of_8_bit_floats_are_refused_by_a_card_that_has_none() {
    let backend = |capability| {
        let driver = FakeDriver::recording(Machine { capability, ..Machine::default() });
        let card = open(&driver).unwrap();
        CudaBackend::new(card, LIMITS).with_activations(Activations::Fp8).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!((backend((8, 9)), backend((9, 0)), backend((12, 0))), (Ok(()), Ok(()), Ok(())));
    let refused = backend((8, 6)).unwrap_err();
    assert!(refused.contains("sm_86") && refused.contains("8.9") && refused.contains("--activations"), "{refused}");
}

const RMS_NORM: Kernel = Kernel::new(Source::Rows, "rms_norm", 256);

#[test]
fn each_failure_is_told_as_what_it_is() {
    let driver = FakeDriver::recording(Machine::default());
    let mut card = open(&driver).unwrap();
    let at = card.alloc("a test", 64).unwrap();
    driver.fail_next("alloc", CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    assert!(matches!(card.alloc("weights", 9), Err(KernelError::Memory { what: "weights", bytes: 9 })));
    driver.fail_next("alloc_host", CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    assert!(matches!(card.alloc_host("blocks", 9), Err(KernelError::Memory { what: "blocks", bytes: 9 })));
    // Memory that cannot be cleared is not kept.
    driver.fail_next("fill", CUresult::CUDA_ERROR_INVALID_VALUE);
    assert!(matches!(card.alloc("weights", 9), Err(KernelError::Device(text)) if text.contains("cleared")));
    let missing = Kernel::new(Source::Rows, "no_such_kernel", 32);
    let error = card.launch(missing, Launch::blocks(1), &[]).unwrap_err().to_string();
    assert!(error.contains("no_such_kernel: CUDA_ERROR_NOT_FOUND"), "{error}");
    let error = card.launch(RMS_NORM, Launch::blocks(1).with_shared(300 << 10), &[]).unwrap_err().to_string();
    assert!(error.contains("rms_norm: CUDA_ERROR_INVALID_VALUE"), "{error}");
    // None of these is the end. What a kernel was allowed once stays so: a captured launch may need it.
    driver.take_log();
    for shared in [90 << 10, 60 << 10, 90 << 10] {
        card.launch(RMS_NORM, Launch::blocks(1).with_shared(shared), &[]).unwrap();
    }
    assert_eq!(driver.take_log().iter().filter(|call| **call == "allow_shared").count(), 1);
    card.wait().unwrap();
    driver.fail_next("launch", CUresult::CUDA_ERROR_LAUNCH_FAILED);
    let error = card.launch(RMS_NORM, Launch::blocks(1), &[]).unwrap_err();
    assert!(matches!(&error, KernelError::Device(text) if text == "rms_norm: CUDA_ERROR_LAUNCH_FAILED as the test wants it"));
    // That is: every call says it now, and closing neither hangs nor panics.
    assert!(matches!(card.wait(), Err(KernelError::Device(text)) if text.contains("LAUNCH_FAILED")));
    assert!(matches!(card.alloc("weights", 9), Err(KernelError::Device(_))));
    card.free(at);
    drop(card);
    driver.assert_empty();
}

#[test]
fn what_is_staged_and_fetched_stays_until_the_card_has_read_it() {
    let driver = FakeDriver::running(Machine::default());
    let mut card = open(&driver).unwrap();
    let places: Vec<Address> = (0..40).map(|_| card.alloc("a test", (1 << 20) + 1).unwrap()).collect();
    let pattern = |round: usize, i: usize| vec![(round * 40 + i) as u8 ^ 0x5a; 1 << 20];
    // Far more than may be staged, while nobody waits: nothing is overwritten on its way.
    for round in 0..2 {
        for (i, at) in places.iter().enumerate() {
            card.write(*at, &pattern(round, i)).unwrap();
        }
        for (i, at) in places.iter().enumerate() {
            let mut back = vec![0; 1 << 20];
            card.read(*at, &mut back).unwrap();
            assert!(back == pattern(round, i), "round {round}, {i}");
        }
    }
    // Two fetches of which the first is handed over while the second is under way, and what was staged between them.
    let mut back = [0; 100];
    card.write(places[0], &[1; 100]).unwrap();
    let mut first = card.fetch(places[0], 100).unwrap();
    for round in 2..200u8 {
        card.write(places[0], &[round; 100]).unwrap();
        card.write(places[1], &vec![round; 700 << 10]).unwrap();
        let second = card.fetch(places[0], 100).unwrap();
        assert!(matches!(card.fetch(places[0], 100), Err(KernelError::Limit(_))), "two are under way");
        card.fetched(first, &mut back).unwrap();
        assert_eq!(back, [round - 1; 100]);
        first = second;
    }
    assert!(card.fetched(first, &mut [0; 99]).is_err(), "another length");
    card.fetched(first, &mut back).unwrap();
    assert_eq!(back, [199; 100]);
    // What is too much for its place is waited for; nothing at all is a mark.
    let (large, mark) = (card.fetch(places[1], (1 << 20) + 1), card.fetch(Address::NONE, 0));
    let mut whole = vec![0; (1 << 20) + 1];
    card.fetched(large.unwrap(), &mut whole).unwrap();
    assert_eq!((whole[0], whole[(700 << 10) - 1], whole[700 << 10]), (199, 199, pattern(1, 1)[0]));
    card.fetched(mark.unwrap(), &mut []).unwrap();
    places.into_iter().for_each(|at| card.free(at));
    drop(card);
    driver.assert_empty();
}

#[test]
fn pieces_go_and_come_back_behind_what_was_asked_for_before() {
    let driver = FakeDriver::running(Machine::default());
    let mut card = open(&driver).unwrap();
    let (at, host) = (card.alloc("a test", 1000).unwrap(), card.alloc_host("a test", 300).unwrap());
    let pieces = |start| Pieces { at: at.plus(start), bytes: 100, count: 3, stride: 300 };
    let bytes: Vec<u8> = (0..1000).map(|i| (i * 7 % 251) as u8).collect();
    card.write(at, &bytes).unwrap();
    card.save(pieces(0), host).unwrap();
    card.write(at, &[0; 1000]).unwrap();
    card.restore(host, pieces(150)).unwrap();
    let mut back = vec![9; 1000];
    card.read(at, &mut back).unwrap();
    let mut want = vec![0; 1000];
    for start in [0, 300, 600] {
        want[start + 150..start + 250].copy_from_slice(&bytes[start..start + 100]);
    }
    assert!(back == want);
    card.save(pieces(0), host).unwrap();
    // Freed while a copy is under way: it is waited for.
    card.free_host(host);
    card.free(at);
    drop(card);
    driver.assert_empty();
}

/// A step that is small enough for emulated threads: more keys than a stretch, and a tile with rows of another sequence's.
fn trial() -> Trial {
    Trial { kv_heads: 1, group: 2, sequences: vec![(40, 140), (20, 20), (20, 2100)], rounds: 2 }
}

fn chosen(driver: &FakeDriver, cache: Option<&Path>) -> (Prefill, Prefill, Vec<String>) {
    let mut card = open(driver).unwrap();
    card.choose_prefill(None, &trial(), cache).unwrap();
    (card.prefill(64), card.prefill(128), card.warnings().to_vec())
}

#[test]
fn a_card_that_knows_two_ways_takes_the_faster_one_that_gives_the_same_numbers() {
    let driver = FakeDriver::running(Machine::default());
    driver.set_cost("attention_hopper_64", 0.5);
    assert_eq!(chosen(&driver, None), (Prefill::Wgmma, Prefill::Mma, vec![]));
    driver.leave_out("attention_hopper_64");
    let (narrow, _, warnings) = chosen(&driver, None);
    assert!(
        narrow == Prefill::Mma && warnings.len() == 1 && warnings[0].starts_with("attention_hopper_64 is not used"),
        "{warnings:?}"
    );
    // What was asked for is not tried, and no other head width has two.
    let mut card = open(&driver).unwrap();
    driver.take_log();
    card.choose_prefill(Some(Prefill::Wgmma), &trial(), None).unwrap();
    assert_eq!((card.prefill(64), driver.take_log().len()), (Prefill::Wgmma, 0));
    assert!(card.describe().ends_with("wgmma for prompts with heads of 64 and 128"), "{}", card.describe());
    drop(card);
    driver.assert_empty();
    let ampere = FakeDriver::recording(Machine { capability: (8, 0), ..Machine::default() });
    let mut card = open(&ampere).unwrap();
    card.choose_prefill(None, &trial(), None).unwrap();
    assert_eq!(card.prefill(128), Prefill::Mma);
    let refused = card.choose_prefill(Some(Prefill::Wgmma), &trial(), None).unwrap_err().to_string();
    assert!(refused.contains("has no wgmma") && refused.contains("--attention-backend"), "{refused}");
}

#[test]
fn what_a_trial_found_is_kept_for_cards_of_the_same_make() {
    // Two head widths, two kernels, once and measured twice, each with what joins.
    const LAUNCHES: usize = 2 * 2 * 3 * 2;
    let folder = tempfile::tempdir().unwrap();
    let launches = |driver: &FakeDriver| driver.take_log().iter().filter(|call| **call == "launch").count();
    let driver = FakeDriver::running(Machine::default());
    driver.set_cost("attention_hopper_128", 0.25);
    let want = (Prefill::Mma, Prefill::Wgmma, vec![]);
    assert_eq!((chosen(&driver, Some(folder.path())), launches(&driver)), (want.clone(), LAUNCHES));
    // Kept: a card that is slow today is not asked again. A newer driver is.
    driver.set_cost("attention_hopper_128", 9.0);
    assert_eq!((chosen(&driver, Some(folder.path())), launches(&driver)), (want.clone(), 0));
    let newer = FakeDriver::running(Machine { version: 13_010, ..Machine::default() });
    assert_eq!((chosen(&newer, Some(folder.path())).1, launches(&newer)), (Prefill::Mma, LAUNCHES));
    // What is no longer as it was kept is found out anew.
    for file in std::fs::read_dir(folder.path()).unwrap() {
        std::fs::write(file.unwrap().path(), "64 1 0 0\n128 1 0 0\n").unwrap();
    }
    assert_eq!((chosen(&driver, Some(folder.path())).1, launches(&driver)), (Prefill::Mma, LAUNCHES));
}

#[test]
fn whatever_call_fails_in_a_trial_it_says_so_and_nothing_is_left() {
    for code in [CUresult::CUDA_ERROR_OUT_OF_MEMORY, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS] {
        for after in (0..).step_by(3) {
            let driver = FakeDriver::recording(Machine::default());
            let mut card = open(&driver).unwrap();
            driver.fail_after(after, code);
            let outcome = card.choose_prefill(None, &trial(), None);
            if !driver.has_failed() {
                assert!(after > 60 && outcome.is_ok(), "{after} calls");
                break;
            }
            match outcome {
                Ok(()) => {
                    let told = card.warnings().iter().any(|warning| warning.contains("to try wgmma with"));
                    // Or it was lost when all was done, which the next call says.
                    assert!(told || card.wait().is_err(), "{after} {:?}", card.warnings());
                }
                Err(error) => assert!(error.to_string().contains("--attention-backend mma"), "{error}"),
            }
            drop(card);
            driver.assert_empty();
        }
    }
}

fn captured<D: Device>(device: D) -> Decoder<CudaBackend<D>> {
    decoder(CudaBackend::new(device, LIMITS).capturing())
}

#[test]
fn a_model_on_a_card_that_works_as_late_as_it_may_gives_the_same_numbers() {
    let want = serve(&mut captured(Emulated::new(false)), false).unwrap();
    for ahead in [false, true] {
        let driver = FakeDriver::running(Machine::default());
        let mut decoder = captured(open(&driver).unwrap());
        driver.take_log();
        assert!(serve(&mut decoder, ahead).unwrap() == want, "ahead {ahead}");
        let log = driver.take_log();
        let count = |name: &str| log.iter().filter(|call| **call == name).count();
        assert!(count("begin_capture") >= 1 && count("launch_graph") >= 3, "{log:?}");
        assert_eq!((count("copy_pieces_from_device"), count("copy_pieces_to_device")), (4, 4));
        // The host waits for events only.
        assert_eq!((count("is_done"), count("is_past")), (0, 2 * 9));
        drop(decoder);
        driver.assert_empty();
    }
}

#[test]
fn a_card_that_does_not_come_back_is_given_up() {
    let driver = FakeDriver::running(Machine::default());
    let mut decoder = captured(open(&driver).unwrap().with_patience(Duration::from_millis(30)));
    driver.hang();
    let error = serve(&mut decoder, true).err().unwrap().to_string();
    assert!(error.contains("did not come back from its work in 0.03 s"), "{error}");
    // The driver might wait for it without an end.
    driver.take_log();
    drop(decoder);
    assert_eq!(driver.take_log(), [""; 0]);
    // What was on it stays.
    std::mem::forget(driver);
}

#[test]
fn a_model_is_served_on_cards_that_share_less() {
    for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
        let driver = FakeDriver::recording(Machine { capability, ..Machine::default() });
        let mut decoder = captured(open(&driver).unwrap());
        serve(&mut decoder, true).unwrap();
        assert_eq!(decoder.ops.captures().1.map(ToString::to_string), None);
        drop(decoder);
        driver.assert_empty();
    }
}

/// A step that computes a token of each of so many sequences that a library multiplies.
fn library_step(decoder: &mut Decoder<CudaBackend<Card<FakeDriver>>>) {
    let mut batch = StepBatch::default();
    for i in 0..20 {
        append(&mut batch, &mut Sequence { tokens: vec![i; 4], table: vec![i % 12], computed: i as usize / 12 }, 1);
    }
    batch.samples.push(SampleRow::greedy(0));
    decoder.forward(&batch, &mut StepOutput::default()).unwrap();
}

#[test]
fn how_a_library_multiplies_is_decided_before_a_capture_and_never_in_one() {
    let driver = FakeDriver::recording(Machine::default());
    let mut decoder = captured(open(&driver).unwrap());
    let calls = |decoder: &mut _| {
        driver.take_log();
        library_step(decoder);
        let log = driver.take_log();
        ["plan", "begin_capture", "launch_graph"].map(|name| log.iter().filter(|call| **call == name).count())
    };
    let [plans, captures, _] = calls(&mut decoder);
    assert!(plans > 2 && captures == 0);
    // Its plans went to others meanwhile: the step is done plainly, which makes them, and captured the next time.
    driver.forget_plans();
    assert_eq!(calls(&mut decoder), [plans, 1, 0]);
    let why = decoder.ops.captures().1.map_or(String::new(), ToString::to_string);
    assert!(why.contains("no plan"), "{why}");
    assert_eq!([calls(&mut decoder), calls(&mut decoder)], [[0, 1, 1], [0, 0, 1]]);
    drop(decoder);
    driver.assert_empty();
}

#[test]
fn a_captured_step_that_the_card_has_no_memory_for_is_done_plainly() {
    let driver = FakeDriver::recording(Machine::default());
    let mut decoder = captured(open(&driver).unwrap());
    (0..3).for_each(|_| library_step(&mut decoder));
    for round in 0..3 {
        driver.fail_next("launch_graph", CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        driver.take_log();
        library_step(&mut decoder);
        let log = driver.take_log();
        assert!(driver.has_failed() && log.contains(&"launch") && log.contains(&"destroy_executable"), "{round}: {log:?}");
        let why = decoder.ops.captures().1.map_or(String::new(), ToString::to_string);
        assert!(why.contains("no memory left"), "{why}");
    }
    // It was tried often enough.
    driver.take_log();
    library_step(&mut decoder);
    let log = driver.take_log();
    assert!(!log.contains(&"begin_capture") && !log.contains(&"launch_graph"), "{log:?}");
    drop(decoder);
    driver.assert_empty();
}

#[test]
fn no_library_decides_starts_or_ends_while_another_card_captures() {
    let (one, other) = (FakeDriver::recording(Machine::default()), FakeDriver::recording(Machine::default()));
    let mut card = open(&one).unwrap();
    let mut capturing = open(&other).unwrap();
    let multiply = {
        let at = card.alloc("a test", 1 << 12).unwrap();
        move |rows| {
            let product = Product { operands: Operands::Bf16, x: at, w: at, out: at, rows, n: 8, stride: 8, add: false };
            card.product(product).map(|()| card.free(at)).unwrap();
            card
        }
    };
    capturing.capture().unwrap();
    one.take_log();
    let began = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            began.wait();
            drop(multiply(3));
            drop(open(&one).unwrap());
        });
        began.wait();
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert_eq!((one.take_log(), worker.is_finished()), (vec!["set_current"], false), "it waits");
        let graph = capturing.captured().unwrap();
        worker.join().unwrap();
        capturing.forget(graph);
    });
    let log = one.take_log();
    assert!(log.contains(&"plan") && log.contains(&"multiplier") && log.contains(&"release_context"), "{log:?}");
    one.assert_empty();
}

#[test]
fn a_capture_that_a_driver_does_not_take_is_done_without_and_says_why() {
    for (call, words) in [("begin_capture", "does not begin"), ("end_capture", "was broken off"), ("instantiate", "is refused")] {
        let driver = FakeDriver::recording(Machine::default());
        let mut decoder = captured(open(&driver).unwrap());
        driver.fail_next(call, CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        serve(&mut decoder, false).unwrap();
        assert!(driver.has_failed());
        let why = decoder.ops.captures().1.map_or(String::new(), ToString::to_string);
        assert!(why.contains(words) && why.contains("CAPTURE_INVALIDATED"), "{why}");
        drop(decoder);
        driver.assert_empty();
    }
}

#[test]
fn whatever_call_fails_while_a_model_serves_nothing_is_leaked_or_used_again() {
    let (lost, short) = (CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    for (code, step) in [(lost, 5), (short, 1)] {
        let mut failures = 0;
        for after in (0..).step_by(step) {
            let driver = FakeDriver::recording(Machine::default());
            let mut decoder = captured(open(&driver).unwrap());
            driver.fail_after(after, code);
            // The fake asserts a driver's rules at every call.
            let outcome = serve(&mut decoder, true);
            if !driver.has_failed() {
                assert!(after > 100 && outcome.is_ok(), "{after} calls");
                break;
            }
            if let Err(error) = outcome {
                failures += 1;
                // Want of memory is told as such, whichever call finds none.
                let told = match code == short {
                    true => matches!(error, KernelError::Memory { .. }),
                    false => matches!(error, KernelError::Device(_)),
                };
                assert!(told, "{:?}: {error:?}", driver.failed());
            }
            if code == short {
                // A card that ran short goes on: what was under way is collected or forgotten, and a step goes well.
                while decoder.ops.collect(&mut StepOutput::default()).is_ok() {}
                let mut sequence = Sequence { tokens: vec![1, 2, 3], table: vec![11], computed: 0 };
                let mut batch = StepBatch::default();
                append(&mut batch, &mut sequence, 3);
                batch.samples.push(SampleRow::greedy(2));
                decoder.forward(&batch, &mut StepOutput::default()).unwrap();
            }
            drop(decoder);
            driver.assert_empty();
        }
        assert!(failures > 20, "{failures}");
    }
}
