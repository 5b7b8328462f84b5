//! How urgent a training is beside a server on the same machine.

use serde::{Deserialize, Serialize};

/// What a job adds to its niceness.
const NICE: i32 = 10;

/// How urgent a training is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum TrainingPriority {
    /// It takes what nobody else wants, and steps aside at once; a machine that is never idle never gets on with it.
    #[default]
    Idle,
    /// It takes a small share whatever happens; a step of the server may wait for the end of the training's turn.
    Low,
}

impl TrainingPriority {
    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Low => "low",
        }
    }

    /// Gives this process that priority; to be called before it starts a thread. Where the system refuses, the training is as urgent as
    /// anything, which is no reason not to do it.
    pub fn take(self) {
        #[cfg(target_os = "linux")]
        if self == Self::Idle {
            use thread_priority::{NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy};
            let policy = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
            let own = thread_priority::thread_native_id();
            let _ = thread_priority::set_thread_priority_and_policy(own, ThreadPriority::Min, policy);
        }
        let _ = rustix::process::nice(NICE);
    }
}
