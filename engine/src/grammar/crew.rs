//! Threads that work out masks while the model computes.

use super::follower::Job;
use flume::Sender;

/// Jobs that wait: a running sequence has one at most, a cancelled one may leave one behind. When it is full the engine's thread
/// waits, as it would for the masks.
const QUEUE: usize = 4096;
/// A mask takes microseconds and the cores belong to the model: one thread for this many.
const CORES_PER_THREAD: usize = 8;
const MOST_THREADS: usize = 4;

/// The threads; they end when this is dropped.
pub(super) struct Crew {
    quick: Sender<Job>,
    /// For choices whose masks have taken long: nobody else's mask waits behind theirs.
    slow: Sender<Job>,
}

impl Crew {
    pub fn start() -> std::io::Result<Crew> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let quick = line("tidemill-mask", (cores / CORES_PER_THREAD).clamp(1, MOST_THREADS))?;
        Ok(Crew { quick, slow: line("tidemill-slow-mask", 1)? })
    }

    /// Has a job done. Without threads it is dropped, and with it the promise of a mask.
    pub fn hand(&self, job: Job) {
        let line = if job.is_slow() { &self.slow } else { &self.quick };
        line.send(job).ok();
    }
}

/// Threads that take their jobs from one queue.
fn line(name: &str, threads: usize) -> std::io::Result<Sender<Job>> {
    let (jobs, queue) = flume::bounded::<Job>(QUEUE);
    for index in 0..threads {
        let queue = queue.clone();
        let run = move || queue.iter().for_each(Job::run);
        std::thread::Builder::new().name(format!("{name}-{index}")).spawn(run)?;
    }
    Ok(jobs)
}
