//! Cards whose devices run their kernels on the host, and which know what was asked of them.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tidemill_engine::{Decoder, Device, Engine, EngineOptions, MemoryReport, ModelFiles, ServedModel, StartError};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::cuda::device::Device as Computer;
use tidemill_kernels::{KernelError, Limits, Ops};
use tidemill_rlhf::workplace::Cards;

use crate::emulation::{CardMemory, Emulated};

/// One card, number 1, of so much memory.
#[derive(Debug)]
pub struct EmulatedCards {
    pub memory: Arc<CardMemory>,
    pub engines: Mutex<Vec<Started>>,
}

/// An engine that was started.
#[derive(Clone, Debug)]
pub struct Started {
    pub options: EngineOptions,
    /// Bytes that keys and values could have had.
    pub spare: usize,
    /// Bytes of the card that were used when it had.
    pub used: usize,
    /// What it took; nothing where it did not start.
    pub report: Option<MemoryReport>,
}

impl EmulatedCards {
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self { memory: CardMemory::new(bytes), engines: Mutex::default() })
    }

    /// Waits until all of the memory is given back: an engine's thread ends a moment after its last handle is gone.
    pub fn emptied(&self) {
        let began = Instant::now();
        while self.memory.used() > 0 {
            assert!(began.elapsed() < Duration::from_secs(60), "{} bytes are held", self.memory.used());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The last engine that was started.
    pub fn engine(&self) -> Started {
        self.engines.lock().unwrap().last().unwrap().clone()
    }
}

impl Cards for EmulatedCards {
    fn open(&self, number: usize) -> Result<Box<dyn Computer>, KernelError> {
        assert_eq!(number, 1);
        Ok(Box::new(Emulated::on_card(&self.memory)))
    }

    fn start(&self, options: EngineOptions) -> Result<Engine, StartError> {
        assert_eq!(options.device, Device::Cuda(vec![1]));
        let left = options.left.unwrap();
        assert_eq!(left.card, 1);
        let files = ModelFiles::open(&options.model)?;
        let positions = options.max_model_len.unwrap();
        let limits = Limits { max_tokens: options.max_batch_tokens, max_samples: options.max_seqs, max_positions: positions };
        let backend = CudaBackend::new(Emulated::on_card(&self.memory), limits).capturing().leaving(left.bytes);
        let decoder = Decoder::load(&files, Box::new(backend) as Box<dyn Ops>, options.weight_format, &mut |_, _| {})?;
        let spare = tidemill_engine::model::Model::spare_memory(&decoder)?.unwrap();
        let (context, description) = (files.config().max_positions, files.describe());
        let served = ServedModel { model: Box::new(decoder), frontend: files.into_frontend(), context, description };
        let engine = Engine::with_model(served, options.clone());
        let report = engine.as_ref().ok().map(|engine| engine.memory().clone());
        self.engines.lock().unwrap().push(Started { options, spare, used: self.memory.used(), report });
        engine
    }
}
