//! Where the process of a fine-tuning job asks its graders' models: a socket in the job's folder.
//!
//! The process has no key and knows no address. Only the user that the server runs as may connect; the server knows whose job it is,
//! asks on behalf of the key that made it, as it is at that moment, and no other models than the job's grader names. A server that is
//! started again opens the desk again, and a process that has outlived the one before goes on asking.

use crate::graders::asking::ask;
use crate::http::Caller;
use crate::http::inside::Inside;
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as Connection;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tidemill_rlhf::reward::grader::{Oracle, Question, Reply};
use tidemill_store::Store;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// The socket's name.
const SOCKET: &str = "grader.sock";
/// Longest question and reply.
const MAX_BYTES: u64 = 4 << 20;
/// Questions of a job at once; more wait.
const AT_ONCE: usize = 16;
/// How long a question may take to be written.
const READING: Duration = Duration::from_secs(30);
/// How often a process looks for a server, and whether it is to stop.
const LOOK: Duration = Duration::from_millis(250);
/// How long it goes on without one.
const PATIENCE: Duration = Duration::from_secs(3600);

/// The name of the socket in `folder`, which stays open: the path of a socket may have no more than 107 bytes, and that of a folder more.
fn address(folder: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()))
}

/// Whose questions are answered.
pub struct Petitioner {
    /// Named in the records of what it asks.
    pub job: String,
    /// The key that made the job.
    pub key_id: Option<String>,
    /// The models that it may ask.
    pub models: Vec<String>,
}

/// An open desk; dropped, it is closed.
pub struct Desk {
    task: JoinHandle<()>,
    socket: PathBuf,
}

impl Desk {
    /// Opens the desk in a job's folder.
    pub fn open(folder: &Path, inside: Inside, store: Store, petitioner: Petitioner) -> io::Result<Self> {
        let socket = folder.join(SOCKET);
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(address(&File::open(folder)?))?;
        std::fs::set_permissions(&socket, Permissions::from_mode(0o600))?;
        let clerk = Arc::new(Clerk { inside, store, petitioner });
        Ok(Self { task: tokio::spawn(clerk.serve(listener)), socket })
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.task.abort();
        // The next one removes it, too.
        std::fs::remove_file(&self.socket).ok();
    }
}

struct Clerk {
    inside: Inside,
    store: Store,
    petitioner: Petitioner,
}

impl Clerk {
    async fn serve(self: Arc<Self>, listener: UnixListener) {
        let places = Arc::new(Semaphore::new(AT_ONCE));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((connection, _)) => {
                    let clerk = Arc::clone(&self);
                    tokio::spawn(async move {
                        // Whoever asked and has left wants no answer.
                        if let Err(error) = clerk.answer(connection).await {
                            tracing::debug!(%error, "a question of a grader was not answered");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a question of a grader could not be taken");
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    }

    /// One question, one reply.
    async fn answer(&self, mut connection: UnixStream) -> io::Result<()> {
        let mut bytes = Vec::new();
        let (reading, mut writing) = connection.split();
        tokio::time::timeout(READING, reading.take(MAX_BYTES).read_to_end(&mut bytes)).await??;
        let reply = match serde_json::from_slice::<Question>(&bytes) {
            Err(error) => Err(format!("the question cannot be read: {error}")),
            Ok(question) if !self.petitioner.models.contains(&question.model) => {
                Err(format!("the job's grader names no model `{}`", question.model))
            }
            Ok(question) => match self.reply(&question).await {
                Some(reply) => reply,
                // The end without a reply says that the server leaves.
                None => return Ok(()),
            },
        };
        writing.write_all(&serde_json::to_vec(&reply).map_err(io::Error::other)?).await?;
        writing.shutdown().await
    }

    async fn reply(&self, question: &Question) -> Option<Result<Reply, String>> {
        let Petitioner { job, key_id, .. } = &self.petitioner;
        loop {
            match Caller::of_key(&self.store, key_id.as_deref()).await {
                Ok(Some(caller)) => return ask(&self.inside, &caller, question, job).await,
                Ok(None) => return Some(Err("the key that made the job does not work any more".to_owned())),
                Err(error) => {
                    tracing::warn!(job, %error, "cannot look up the key of a fine-tuning job; trying again in a moment");
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    }
}

/// Asks at the desk, from the job's process.
pub struct DeskOracle {
    folder: PathBuf,
    stop: Arc<AtomicBool>,
    /// What is done when the process is to stop while it waits.
    leave: fn(),
}

impl DeskOracle {
    /// At the desk in `folder`. When `stop` is set while a reply is waited for, `leave` is called: what was asked for is asked again after
    /// a restart.
    pub fn new(folder: &Path, stop: Arc<AtomicBool>, leave: fn()) -> Self {
        Self { folder: folder.to_owned(), stop, leave }
    }

    fn look(&self) {
        if self.stop.load(Ordering::Relaxed) {
            (self.leave)();
        }
    }

    /// The reply; `None` when no server is there, or it left.
    fn once(&self, question: &[u8]) -> io::Result<Option<Result<Reply, String>>> {
        let folder = File::open(&self.folder)?;
        let mut connection = Connection::connect(address(&folder))?;
        connection.set_read_timeout(Some(LOOK))?;
        connection.write_all(question)?;
        connection.shutdown(std::net::Shutdown::Write)?;
        let (mut bytes, mut some) = (Vec::new(), [0; 4096]);
        loop {
            match connection.read(&mut some) {
                Ok(0) if bytes.is_empty() => return Ok(None),
                Ok(0) => return serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
                Ok(count) => bytes.extend_from_slice(&some[..count]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => self.look(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Oracle for DeskOracle {
    fn ask(&self, question: &Question) -> Result<Reply, String> {
        let bytes = serde_json::to_vec(question).map_err(|error| error.to_string())?;
        if bytes.len() as u64 >= MAX_BYTES {
            return Err(format!("the question is longer than {} MiB", MAX_BYTES >> 20));
        }
        let began = Instant::now();
        loop {
            let why = match self.once(&bytes) {
                Ok(Some(reply)) => return reply,
                Ok(None) => "the server left".to_owned(),
                Err(error) => error.to_string(),
            };
            if began.elapsed() > PATIENCE {
                return Err(format!("no server has answered for an hour ({why}); start it, and the job goes on"));
            }
            self.look();
            std::thread::sleep(LOOK);
        }
    }
}
