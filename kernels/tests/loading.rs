//! The driver's and cuBLASLt's calls as they are really made, into libraries that stand in for NVIDIA's and have only what version 12.0 has: the
//! bindings end a program that calls what is not there, and structures and numbers go through the C interface.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

use std::path::Path;
use std::process::Command;

use crate::support::driver::NamedImages;
use crate::support::serving::{LIMITS, decoder, serve};
use tidemill_kernels::KernelError;
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::cuda::device::{Address, Device, Operands, Pieces, Product};
use tidemill_kernels::cuda::driver::{Card, Cuda};

const STAND_INS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/emulation/libcuda.c");

fn build(library: &Path, flags: &[&str]) {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let mut command = Command::new(&compiler);
    command.args(["-x", "c", "-std=gnu11", "-O1", "-fPIC", "-shared", "-o"]).arg(library).args(flags).arg(STAND_INS);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_driver_of_the_oldest_version_has_what_is_called() {
    let folder = tempfile::tempdir().unwrap();
    build(&folder.path().join("libcuda.so.1"), &[]);
    // In a toolkit that is not on the loader's path. The one that is there is none that the driver takes.
    std::fs::create_dir_all(folder.path().join("toolkit/lib64")).unwrap();
    build(&folder.path().join("toolkit/lib64/libcublasLt.so.12"), &["-DCUBLAS_LT"]);
    build(&folder.path().join("libcublasLt.so.13"), &["-DCUBLAS_LT", "-DTOO_NEW=1"]);
    // Libraries are opened once for a process, so this is another.
    let own = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "loading::over_the_stand_ins", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env("CUDA_HOME", folder.path().join("toolkit"))
        .output()
        .unwrap();
    let said = [own.stdout, own.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(own.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "of the test above, in a process where the stand-ins are found"]
fn over_the_stand_ins() {
    let images = NamedImages::GOOD;
    let mut card = Card::over(Cuda::find().unwrap(), 0, &images).unwrap();
    assert_eq!(card.describe(), "a stand-in, sm_80, 100 multiprocessors, 64 GiB, CUDA 12.0");
    // More than lies ready at once.
    let bytes: Vec<u8> = (0..20usize << 20).map(|i| (i * 7 % 251) as u8).collect();
    let at = card.alloc("a test", bytes.len()).unwrap();
    let before = card.mark().unwrap();
    card.write(at, &bytes).unwrap();
    let after = card.mark().unwrap();
    assert!((card.seconds(&before, &after).unwrap() - 1.5).abs() < 1e-9);
    let mut back = vec![0; bytes.len()];
    card.read(at, &mut back).unwrap();
    assert!(back == bytes);
    let pieces = |start| Pieces { at: at.plus(start), bytes: 100, count: 3, stride: 1000 };
    let host = card.alloc_host("a test", 300).unwrap();
    card.save(pieces(0), host).unwrap();
    card.restore(host, pieces(500)).unwrap();
    card.read(at, &mut back[..3000]).unwrap();
    (0..3).for_each(|i| assert!(back[i * 1000 + 500..][..100] == bytes[i * 1000..][..100]));
    card.free_host(host);

    // Numbers that later versions may have are told as they are.
    let later = card.alloc_host("a test", 4242).unwrap_err().to_string();
    assert!(later.contains("error 4242"), "{later}");
    let product = |rows| Product { operands: Operands::Bf16, x: at, w: at, out: at, rows, n: 64, stride: 64, add: false };
    let later = card.product(Product { w: Address::NONE, ..product(1) }).unwrap_err().to_string();
    assert!(later.contains("refuses a product: unknown (4242)"), "{later}");
    let short = card.product(Product { x: Address::NONE, ..product(1) }).unwrap_err();
    assert!(matches!(short, KernelError::Memory { .. }), "{short}");
    // The stand-in makes room for so many plans alone.
    (1..3000).for_each(|rows| card.product(product(rows)).unwrap());
    (1..3000).for_each(|rows| card.product(product(rows)).unwrap());

    // The library chooses before a capture, and not in one: what it was not asked for by then is told of, and can be asked for afterwards.
    card.capture().unwrap();
    card.product(product(2999)).unwrap();
    let unplanned = card.product(product(3000)).unwrap_err().to_string();
    assert!(unplanned.contains("no plan") && !unplanned.contains("(14)"), "{unplanned}");
    let graph = card.captured().unwrap();
    card.forget(graph);
    card.product(product(3000)).unwrap();
    card.capture().unwrap();
    card.product(product(3000)).unwrap();
    let graph = card.captured().unwrap();
    card.forget(graph);

    card.free(at);
    drop((before, after, card));

    let card = Card::over(Cuda::find().unwrap(), 0, &images).unwrap();
    let mut decoder = decoder(CudaBackend::new(card, LIMITS).capturing());
    assert_eq!(serve(&mut decoder, true).unwrap().len(), 9);
    let (replayed, refused) = decoder.ops.captures();
    assert!(replayed > 2 && refused.is_none(), "{replayed} {refused:?}");
}
