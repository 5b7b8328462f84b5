//! Throughput of the linear op per weight form, instruction path and batch size on the shapes of SmolLM2-135M.
//!
//! `cargo bench -p tidemill-kernels --bench linear [-- FILTER] [THREADS]` with FILTER a part of `path/form`, such as `amx/int4`. One line per batch
//! size: GOP/s (2 n k rows; the two halves of an activation count once) and GB/s of weights read, over all layers and the output
//! head once per pass as a model does it, so that weights come from where they come from in use.

#![allow(clippy::expect_used, reason = "a benchmark stops at the first surprise")]

use std::time::{Duration, Instant};

use tidemill_kernels::activations::Activations;
use tidemill_kernels::aligned::AlignedBuf;
use tidemill_kernels::blocks::quantize_row;
use tidemill_kernels::isa::Isa;
use tidemill_kernels::linear::TileScratch;
use tidemill_kernels::packed::PackedMatrix;
use tidemill_kernels::{Format, MatrixSource, WeightFormat};

const LAYERS: usize = 30;
/// `[n, k]` of a layer: qkv, attention output, gate and up, down; then the output head.
const LAYER: [(usize, usize); 4] = [(960, 576), (576, 576), (3072, 576), (576, 1536)];
const HEAD: (usize, usize) = (49152, 576);
const BATCHES: [usize; 6] = [1, 4, 8, 32, 128, 512];

fn main() {
    let (numbers, filter): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).filter(|a| !a.starts_with("--")).partition(|a| a.parse::<usize>().is_ok());
    let threads = numbers
        .first()
        .and_then(|n| n.parse().ok())
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    println!("{threads} threads, best path {}", Isa::detect().name());
    println!("{:<24}{:>6}{:>12}{:>10}{:>10}{:>12}", "path/form", "rows", "us", "GOP/s", "GB/s", "head us");
    for (name, file, as_) in [
        ("int4", Format::Q4_1, WeightFormat::Auto),
        ("int8", Format::Q8_0, WeightFormat::Auto),
        ("bf16", Format::Bf16, WeightFormat::Auto),
        ("f32", Format::F32, WeightFormat::Auto),
    ] {
        let wanted: Vec<Isa> = Isa::available()
            .into_iter()
            .rev()
            .filter(|isa| {
                let label = format!("{}/{name}", isa.name());
                *isa != Isa::Portable && (filter.is_empty() || filter.iter().any(|f| label.contains(f.as_str())))
            })
            .collect();
        if wanted.is_empty() {
            continue;
        }
        let (model, packing) = Model::new(file, as_, threads);
        println!("# packed {:.1} MB with {:.0} ms of processor time", model.bytes() as f64 / 1e6, packing.as_secs_f64() * 1e3);
        for isa in wanted {
            for rows in BATCHES {
                let (body, head) = model.measure(isa, rows, threads);
                let parameters = |m: &PackedMatrix| (m.n() * m.k()) as f64;
                let operations = 2.0 * rows as f64 * model.layers.iter().map(parameters).sum::<f64>();
                let bytes: usize = model.layers.iter().map(PackedMatrix::bytes).sum();
                println!(
                    "{:<24}{:>6}{:>12.0}{:>10.0}{:>10.1}{:>12.0}",
                    format!("{}/{name}", isa.name()),
                    rows,
                    body.as_secs_f64() * 1e6,
                    operations / body.as_secs_f64() / 1e9,
                    bytes as f64 / body.as_secs_f64() / 1e9,
                    head.as_secs_f64() * 1e6,
                );
            }
        }
    }
}

struct Model {
    layers: Vec<PackedMatrix>,
    head: PackedMatrix,
}

impl Model {
    fn new(file: Format, as_: WeightFormat, threads: usize) -> (Self, Duration) {
        let pack = |(n, k): (usize, usize), data: &[u8]| {
            let source = MatrixSource { n, k, format: file, data, row_order: None };
            PackedMatrix::pack(&[source], as_, Isa::detect(), threads).expect("sizes fit")
        };
        let layer: Vec<Vec<u8>> = LAYER.iter().map(|shape| random(file, *shape)).collect();
        let head = random(file, HEAD);
        let start = processor_time();
        let layers = (0..LAYERS).flat_map(|_| LAYER.iter().zip(&layer).map(|(shape, data)| pack(*shape, data))).collect();
        let model = Model { layers, head: pack(HEAD, &head) };
        (model, processor_time() - start)
    }

    fn bytes(&self) -> usize {
        self.layers.iter().map(PackedMatrix::bytes).sum::<usize>() + self.head.bytes()
    }

    /// Sum over the layers of each one's best time, and the head's. Threads take a product's items in turns and go through the model
    /// side by side without waiting for each other, so that other work on the machine costs samples, not truth.
    fn measure(&self, isa: Isa, rows: usize, threads: usize) -> (Duration, Duration) {
        let x: Vec<f32> = (0..1536).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect();
        let acts: Vec<Activations> = [576, 1536]
            .into_iter()
            .map(|k| {
                let acts = Activations::new(rows, k).expect("fits");
                for row in 0..rows {
                    // SAFETY: one thread, inside the capacity.
                    unsafe { acts.set_row(isa, self.head.activation_kind(), row, &x[..k]) };
                }
                acts
            })
            .collect();
        let passes = if rows >= 128 { 8 } else { 32 };
        let worker = |index: usize| {
            let mut scratch = TileScratch::new(1536).expect("fits");
            let mut out = AlignedBuf::<f32>::zeroed(rows * HEAD.0, "output").expect("fits");
            let mut best = vec![Duration::MAX; self.layers.len() + 1];
            for _ in 0..passes {
                for (matrix, best) in self.layers.iter().chain([&self.head]).zip(&mut best) {
                    let acts = if matrix.k() == 576 { &acts[0] } else { &acts[1] };
                    let items = matrix.items(rows);
                    let start = Instant::now();
                    for item in (index..items).step_by(threads) {
                        // SAFETY: the rows were set for this k and path; the output is this thread's own.
                        unsafe {
                            matrix.run_item(isa, item, acts, rows, out.as_mut_ptr(), matrix.n(), None, false, &mut scratch);
                        }
                    }
                    *best = start.elapsed().min(*best);
                }
            }
            best
        };
        let worker = &worker;
        let best: Vec<Vec<Duration>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|i| scope.spawn(move || worker(i))).collect();
            workers.into_iter().map(|w| w.join().expect("worker")).collect()
        });
        let slowest = |i: usize| best.iter().map(|b| b[i]).max().unwrap_or_default();
        ((0..self.layers.len()).map(slowest).sum(), slowest(self.layers.len()))
    }
}

/// Time that all threads of this process ran, whatever else the machine did.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists on every Linux; the struct is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// A matrix of noise in a file format.
fn random(file: Format, (n, k): (usize, usize)) -> Vec<u8> {
    let bytes = file.row_bytes(k).expect("whole blocks");
    let mut data = vec![0u8; n * bytes];
    let mut state = 1u64;
    for row in data.chunks_mut(bytes) {
        let values: Vec<f32> = (0..k)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ((state >> 40) as f32) / (1u64 << 23) as f32 - 1.0
            })
            .collect();
        quantize_row(file, &values, row).expect("an encoder");
    }
    data
}
