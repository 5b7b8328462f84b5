//! The threads that compute a step, and how they share it.
//!
//! A step is *one* parallel region: the caller opens it, works, and closes it; workers that are awake in time join. Inside,
//! every thread walks the same list of stages. A stage is a number of tasks that threads claim from an atomic counter, and a
//! stage is over when its *tasks* are done, not when every thread has arrived. So a worker whose core was taken away (HTTP
//! threads and clients share the machine) delays the others by at most the tasks it holds, and one that overslept finds the
//! finished stages finished and catches up. Between steps workers spin for some microseconds, then park.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Looks at an atomic this often before giving the core to whoever waits for it: about two microseconds.
const SPINS_BEFORE_YIELD: u32 = 64;
/// Spins an idle worker makes before it parks: about 50 µs, the gap between two steps of a busy engine.
const SPINS_BEFORE_PARK: u32 = 1500;

const OPEN: u64 = 1 << 32;
const EPOCH: u64 = 1 << 33;
const ACTIVE: u64 = OPEN - 1;

/// Progress of one stage: tasks claimed and tasks done. Alone on its cache lines (the prefetcher fetches pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Stage {
    next: AtomicU32,
    done: AtomicU32,
}

impl Stage {
    /// Makes the stage ready for another step. Only between regions.
    pub fn reset(&mut self) {
        *self.next.get_mut() = 0;
        *self.done.get_mut() = 0;
    }
}

/// One thread's view of a running region.
#[derive(Clone, Copy)]
pub struct Member<'a> {
    /// 0 is the caller; workers count from 1.
    pub index: usize,
    abort: &'a AtomicBool,
}

impl Member<'_> {
    /// Does its share of `total` tasks, claimed `grain` at a time, then waits until all are done: what the tasks wrote is visible
    /// to every thread that comes out. `false` when some thread panicked: leave the region.
    #[inline]
    #[must_use]
    pub fn share(&self, stage: &Stage, total: u32, grain: u32, mut task: impl FnMut(Range<usize>)) -> bool {
        let mut mine = 0;
        // A late thread would push the counter ever further beyond the end, so look before claiming.
        while stage.next.load(Ordering::Relaxed) < total {
            let first = stage.next.fetch_add(grain, Ordering::Relaxed);
            if first >= total {
                break;
            }
            let last = total.min(first + grain);
            task(first as usize..last as usize);
            mine += last - first;
        }
        if mine > 0 && stage.done.fetch_add(mine, Ordering::AcqRel) + mine == total {
            return !self.abort.load(Ordering::Relaxed);
        }
        let mut spins = 0;
        while stage.done.load(Ordering::Acquire) != total {
            if self.abort.load(Ordering::Relaxed) {
                return false;
            }
            relax(&mut spins);
        }
        true
    }
}

/// One turn of a waiting loop.
#[inline]
fn relax(spins: &mut u32) {
    if *spins < SPINS_BEFORE_YIELD {
        *spins += 1;
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

type Work<'a> = dyn Fn(Member<'_>) + Sync + 'a;

struct Shared {
    /// Threads inside (low 32 bits), whether the region is open, and its number.
    state: AtomicU64,
    /// What to do in the open region. Written only while it is closed and empty.
    work: UnsafeCell<Option<*const Work<'static>>>,
    abort: AtomicBool,
    stop: AtomicBool,
    /// Text of the first panic.
    panic: Mutex<Option<String>>,
}

// SAFETY: `work` is written by the one caller (`Pool::run` takes `&mut`) while no worker is inside, and read by workers only
// after the acquiring compare-exchange on `state` that lets them in.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `work` is only followed inside a region, during which `Pool::run` keeps its target alive.
unsafe impl Send for Shared {}

impl Shared {
    fn execute(&self, index: usize, work: &Work<'_>) {
        let member = Member { index, abort: &self.abort };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| work(member))) {
            let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
            let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(text);
            self.abort.store(true, Ordering::Release);
        }
    }

    fn serve(&self, index: usize) {
        let mut seen = 0;
        let mut spins = 0;
        while !self.stop.load(Ordering::Acquire) {
            let state = self.state.load(Ordering::Acquire);
            let epoch = state / EPOCH;
            if state & OPEN == 0 || epoch == seen {
                if spins < SPINS_BEFORE_PARK {
                    spins += 1;
                    std::hint::spin_loop();
                } else {
                    std::thread::park();
                    spins = 0;
                }
                continue;
            }
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            seen = epoch;
            // SAFETY: the region was open when this thread entered, so `work` is set and is not written before it leaves.
            if let Some(work) = unsafe { *self.work.get() } {
                // SAFETY: `Pool::run` does not return, and so does not drop the closure, while a thread is inside.
                self.execute(index, unsafe { &*work });
            }
            self.state.fetch_sub(1, Ordering::Release);
            spins = 0;
        }
    }
}

/// A region in which some thread panicked; its results are worthless, the pool is not.
#[derive(Debug)]
pub struct Panicked(pub String);

/// The caller and `threads - 1` workers.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts the workers; `threads` counts the caller.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            abort: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut pool = Pool { shared, workers: Vec::new() };
        for index in 1..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let builder = std::thread::Builder::new().name(format!("kernel-{index}"));
            pool.workers.push(builder.spawn(move || shared.serve(index))?);
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `work` on the caller and on every worker that comes in time; returns when all have left. `work` must be such that
    /// the caller alone can complete it.
    pub fn run(&mut self, work: &Work<'_>) -> Result<(), Panicked> {
        if self.workers.is_empty() {
            self.shared.execute(0, work);
            return self.outcome();
        }
        // SAFETY: only the lifetime changes. Workers follow the pointer only while inside the region, which is over below.
        let forever = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(std::ptr::from_ref(work)) };
        // SAFETY: the region is closed and empty (the end of the last run), so no worker reads `work` now.
        unsafe { *self.shared.work.get() = Some(forever) };
        let epoch = self.shared.state.load(Ordering::Relaxed) / EPOCH + 1;
        self.shared.state.store((epoch * EPOCH) | OPEN, Ordering::Release);
        for worker in &self.workers {
            worker.thread().unpark();
        }
        self.shared.execute(0, work);
        self.shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.shared.state.load(Ordering::Acquire) & ACTIVE != 0 {
            relax(&mut spins);
        }
        self.outcome()
    }

    fn outcome(&mut self) -> Result<(), Panicked> {
        if !self.shared.abort.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let text = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        Err(Panicked(text.unwrap_or_default()))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches its panics, so there is nothing to report.
            let _ = worker.join();
        }
    }
}

/// Threads that this process may use.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    fn stages(n: usize) -> Vec<Stage> {
        (0..n).map(|_| Stage::default()).collect()
    }

    #[test]
    fn every_task_runs_once_and_stages_run_in_order() {
        for threads in 1..=4 {
            let mut pool = Pool::new(threads).unwrap();
            let mut list = stages(50);
            for round in 0..200u32 {
                list.iter_mut().for_each(Stage::reset);
                let totals: Vec<u32> = (0..50).map(|i| 1 + (i * 7 + round) % 23).collect();
                let counts: Vec<AtomicUsize> = (0..50).map(|_| AtomicUsize::new(0)).collect();
                pool.run(&|member| {
                    for (i, stage) in list.iter().enumerate() {
                        let kept = member.share(stage, totals[i], 1 + i as u32 % 3, |tasks| {
                            if i > 0 {
                                assert_eq!(counts[i - 1].load(Ordering::Relaxed), totals[i - 1] as usize, "stage {i} early");
                            }
                            counts[i].fetch_add(tasks.len(), Ordering::Relaxed);
                        });
                        assert!(kept);
                    }
                })
                .unwrap();
                for (count, total) in counts.iter().zip(&totals) {
                    assert_eq!(count.load(Ordering::Relaxed), *total as usize);
                }
            }
        }
    }

    #[test]
    fn a_panic_comes_back_as_an_error_and_the_pool_lives_on() {
        for threads in 1..=4 {
            let mut pool = Pool::new(threads).unwrap();
            for round in 0..20 {
                let mut list = stages(3);
                let outcome = pool.run(&|member| {
                    for (i, stage) in list.iter().enumerate() {
                        let kept = member.share(stage, 8, 1, |tasks| {
                            assert!(i != 1 || tasks.start != round % 8, "task {round} broke");
                        });
                        if !kept {
                            return;
                        }
                    }
                });
                assert!(outcome.unwrap_err().0.contains("broke"));
                list.iter_mut().for_each(Stage::reset);
                let sum = AtomicUsize::new(0);
                pool.run(&|member| {
                    let _ = member.share(&list[0], 10, 1, |tasks| {
                        sum.fetch_add(tasks.start, Ordering::Relaxed);
                    });
                })
                .unwrap();
                assert_eq!(sum.into_inner(), 45);
            }
        }
    }

    #[test]
    fn a_worker_that_sleeps_through_a_region_is_not_waited_for() {
        let mut pool = Pool::new(2).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        let list = stages(1);
        for _ in 0..100 {
            // The caller takes the only task at once: nothing is left for the worker, whether it wakes or not.
            pool.run(&|member| {
                let _ = member.share(&list[0], 1, 1, |_| ());
            })
            .unwrap();
        }
    }

    #[test]
    fn idle_workers_use_no_processor_time() {
        let pool = Pool::new(3).unwrap();
        let spent = || cpu_time(&pool).iter().sum::<Duration>();
        // On a machine with other work a worker may get to its first wait late. One that did not wait would use all the time that
        // it gets, in every window.
        let mut windows = Vec::new();
        for _ in 0..50 {
            let before = spent();
            std::thread::sleep(Duration::from_millis(200));
            windows.push(spent() - before);
            if windows.last().is_some_and(|used| *used < Duration::from_millis(1)) {
                return;
            }
        }
        panic!("idle workers used {windows:?}");
    }

    /// Processor time of the workers alone: other tests of this process run on other threads.
    fn cpu_time(pool: &Pool) -> Vec<Duration> {
        use std::os::unix::thread::JoinHandleExt;
        pool.workers
            .iter()
            .map(|worker| {
                let mut clock = 0;
                let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
                // SAFETY: the thread is alive (the pool holds it) and both out-pointers are valid.
                unsafe {
                    assert_eq!(libc::pthread_getcpuclockid(worker.as_pthread_t(), &mut clock), 0);
                    assert_eq!(libc::clock_gettime(clock, &mut time), 0);
                }
                Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
            })
            .collect()
    }
}
