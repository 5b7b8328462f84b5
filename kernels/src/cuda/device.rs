//! What a backend needs of a device: memory, copies, launches, and a library's matrix product. The driver of a card is one; tests
//! have one that runs the kernels on the host, and one that only writes down what it was asked for.

use crate::collective::Place;
use crate::error::KernelError;

/// An address in a device's memory; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Address(pub u64);

impl Address {
    /// No address.
    pub const NONE: Address = Address(0);

    /// `bytes` further on.
    pub const fn plus(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }
}

/// A kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// Row by row.
    Rows,
    /// Products of few rows with a weight.
    Linear,
    /// Low-rank updates of adapters.
    Lora,
    /// Paged attention.
    Attention,
    /// That of many rows, with instructions of `sm_90a`.
    AttentionHopper,
    /// Logits to tokens.
    Sampling,
    /// A mixture of experts.
    Moe,
    /// What is around products of 8-bit floats.
    Fp8,
    /// Products and attention of training.
    Train,
    /// Training, row by row.
    TrainRows,
}

/// What all kernel files are compiled after.
pub const HEADER: &str = include_str!("../../cuda/device.cuh");

/// A kernel file after what it shares with others, with line numbers of their own.
macro_rules! with {
    ($($name:literal),+) => {
        concat!($("#line 1 \"", $name, "\"\n", include_str!(concat!("../../cuda/", $name)), "\n"),+)
    };
}

impl Source {
    /// All of them.
    pub const ALL: [Source; 10] = [
        Source::Rows,
        Source::Linear,
        Source::Lora,
        Source::Attention,
        Source::AttentionHopper,
        Source::Sampling,
        Source::Moe,
        Source::Fp8,
        Source::Train,
        Source::TrainRows,
    ];

    /// Whether only trainings need it.
    pub const fn trains(self) -> bool {
        matches!(self, Source::Train | Source::TrainRows)
    }

    /// Whether a card can do without it: what it computes, another file does, too.
    pub const fn is_spare(self) -> bool {
        matches!(self, Source::AttentionHopper)
    }

    /// Whether it can be compiled for an architecture.
    pub fn is_for(self, architecture: &str) -> bool {
        self != Source::AttentionHopper || architecture == "sm_90a"
    }

    /// File name, for messages of the compiler.
    pub const fn name(self) -> &'static str {
        match self {
            Source::Rows => "rows.cu",
            Source::Linear => "linear.cu",
            Source::Lora => "lora.cu",
            Source::Attention => "attention.cu",
            Source::AttentionHopper => "attention_hopper.cu",
            Source::Sampling => "sampling.cu",
            Source::Moe => "moe.cu",
            Source::Fp8 => "fp8.cu",
            Source::Train => "train.cu",
            Source::TrainRows => "train_rows.cu",
        }
    }

    /// The text, without [`HEADER`].
    pub const fn text(self) -> &'static str {
        match self {
            Source::Rows => with!("rows.cuh", "rows.cu"),
            Source::Linear => with!("few_rows.cuh", "linear.cu"),
            Source::Lora => include_str!("../../cuda/lora.cu"),
            Source::Attention => with!("attention.cuh", "attention.cu"),
            Source::AttentionHopper => with!("hopper.cuh", "attention.cuh", "attention_hopper.cu"),
            Source::Sampling => include_str!("../../cuda/sampling.cu"),
            Source::Moe => with!("few_rows.cuh", "moe.cu"),
            Source::Fp8 => include_str!("../../cuda/fp8.cu"),
            Source::Train => include_str!("../../cuda/train.cu"),
            Source::TrainRows => include_str!("../../cuda/train_rows.cu"),
        }
    }
}

/// A kernel by its name in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Where it is.
    pub source: Source,
    /// Its name.
    pub name: &'static str,
    /// Threads of a block.
    pub threads: u32,
}

impl Kernel {
    /// A kernel of a file.
    pub const fn new(source: Source, name: &'static str, threads: u32) -> Self {
        Kernel { source, name, threads }
    }

    /// With blocks of another size, which its bound must allow.
    pub(super) const fn of_threads(self, threads: u32) -> Self {
        Kernel { threads, ..self }
    }
}

/// How many blocks are launched, and with how much shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Bytes of shared memory for each block.
    pub shared: u32,
}

impl Launch {
    /// A block for each of `x`.
    pub const fn blocks(x: usize) -> Self {
        Launch { grid: [x as u32, 1, 1], shared: 0 }
    }

    /// A block for each pair.
    pub const fn grid(x: usize, y: usize) -> Self {
        Launch { grid: [x as u32, y as u32, 1], shared: 0 }
    }

    /// With shared memory.
    pub const fn with_shared(self, bytes: usize) -> Self {
        Launch { shared: bytes as u32, ..self }
    }
}

/// What a library multiplies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Operands {
    /// bfloat16.
    #[default]
    Bf16,
    /// 8-bit floats ([`crate::e4m3`]); `n` and `stride` are multiples of 16.
    Fp8,
}

impl Operands {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Operands::Bf16 => 2,
            Operands::Fp8 => 1,
        }
    }
}

/// `out [rows, n] = x [rows, k] · w [n, k]ᵀ` (or added to `out`); operands with rows of `stride` elements, f32 sums and result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// What x and w hold.
    pub operands: Operands,
    /// `[rows, stride]`.
    pub x: Address,
    /// `[n, stride]`.
    pub w: Address,
    /// f32 `[rows, n]`.
    pub out: Address,
    /// Rows.
    pub rows: usize,
    /// Output features.
    pub n: usize,
    /// Input features, padding included: what is padded is 0 in both.
    pub stride: usize,
    /// Add to `out`.
    pub add: bool,
}

/// How matrix units compute the attention of many rows, where a card knows both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefill {
    /// Each warp by itself, as every card can: `attention.cu`.
    #[default]
    Mma,
    /// Four warps together (`wgmma`), as cards of compute capability 9.0 can: `attention_hopper.cu`.
    Wgmma,
}

/// A structure that a kernel takes by value, as bytes.
pub trait Params: Copy {
    /// Its bytes. Padding between fields must not exist.
    fn bytes(&self) -> &[u8];
}

/// Work that was written down once and can be done many times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub u64);

/// A copy from the device that was asked for and is not handed over yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fetch(pub u64);

/// Fetches that may be under way at once.
pub const FETCHES: usize = 2;

/// An address in memory of the machine that the device reads and writes by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostAddress(pub u64);

impl HostAddress {
    /// `bytes` further on.
    pub const fn plus(self, bytes: usize) -> HostAddress {
        HostAddress(self.0 + bytes as u64)
    }
}

/// Pieces of a device's memory that lie at equal distances; beside each other where they are kept in the machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pieces {
    /// The first.
    pub at: Address,
    /// Bytes of each.
    pub bytes: usize,
    /// How many.
    pub count: usize,
    /// From the beginning of one to the beginning of the next, bytes.
    pub stride: usize,
}

/// A device. Work is done in the order in which it is asked for; [`Device::read`] and [`Device::wait`] wait for all of it,
/// [`Device::fetched`] for what was asked for before its fetch.
///
/// Between [`Device::capture`] and [`Device::captured`], launches, products and exchanges are written down and not done, and nothing else may be
/// asked for.
pub trait Device: Send {
    /// For the start-up lines.
    fn describe(&self) -> String;
    /// Free and total bytes of memory.
    fn memory(&self) -> Result<(usize, usize), KernelError>;
    /// Reserves memory filled with zeros, aligned to 128 bytes or more.
    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<Address, KernelError>;
    /// Gives memory back once all work that was asked for is done.
    fn free(&mut self, at: Address);
    /// Copies to the device.
    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<(), KernelError>;
    /// Fills with zeros.
    fn clear(&mut self, at: Address, bytes: usize) -> Result<(), KernelError>;
    /// Copies from the device, when all work before is done.
    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), KernelError>;
    /// Copies from the device behind all work so far, without waiting. At most [`FETCHES`] are under way; 0 bytes are a mark in the work.
    fn fetch(&mut self, from: Address, bytes: usize) -> Result<Fetch, KernelError>;
    /// Waits for the oldest fetch and the work before it; `to` has the length that was asked for.
    fn fetched(&mut self, fetch: Fetch, to: &mut [u8]) -> Result<(), KernelError>;
    /// Reserves memory of the machine for [`Device::save`].
    fn alloc_host(&mut self, what: &'static str, bytes: usize) -> Result<HostAddress, KernelError>;
    /// Gives it back once all work that was asked for is done.
    fn free_host(&mut self, at: HostAddress);
    /// Copies pieces of the device's memory to the machine's, without waiting.
    fn save(&mut self, from: Pieces, to: HostAddress) -> Result<(), KernelError>;
    /// Copies them back, to the same pieces or others, without waiting.
    fn restore(&mut self, from: HostAddress, to: Pieces) -> Result<(), KernelError>;
    /// Runs a kernel.
    fn launch(&mut self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), KernelError>;
    /// A matrix product of many rows.
    fn product(&mut self, product: Product) -> Result<(), KernelError>;
    /// How it computes the attention of many rows with heads of this width.
    fn prefill(&self, _head_dim: usize) -> Prefill {
        Prefill::Mma
    }
    /// Whether it has products of [`Operands::Fp8`].
    fn multiplies_fp8(&self) -> bool {
        false
    }
    /// Which of the devices it is that compute a model together.
    fn place(&self) -> Place {
        Place::ALONE
    }
    /// `count` floats at `at` become their sums over all ranks, the same bits on each. Whether it is captured must be the same on all.
    fn all_reduce(&mut self, _at: Address, _count: usize) -> Result<(), KernelError> {
        Err(KernelError::Unsupported("this device computes alone".into()))
    }
    /// `to [ranks, count]` becomes the `count` floats that each rank has at `from`. Whether it is captured must be the same on all.
    fn all_gather(&mut self, _from: Address, _to: Address, _count: usize) -> Result<(), KernelError> {
        Err(KernelError::Unsupported("this device computes alone".into()))
    }
    /// The `count` numbers of 32 bits at `at` become those that the first rank has there. Never captured.
    fn broadcast(&mut self, _at: Address, _count: usize) -> Result<(), KernelError> {
        Err(KernelError::Unsupported("this device computes alone".into()))
    }
    /// Waits for all work.
    fn wait(&mut self) -> Result<(), KernelError>;
    /// Begins to write work down.
    fn capture(&mut self) -> Result<(), KernelError>;
    /// Ends what `capture` began, also when something between them failed. The work reads and writes the addresses that it was given.
    fn captured(&mut self) -> Result<Graph, KernelError>;
    /// Does all of what was written down.
    fn replay(&mut self, graph: Graph) -> Result<(), KernelError>;
    /// Gives it back.
    fn forget(&mut self, graph: Graph);
}
