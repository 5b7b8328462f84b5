//! Where a training or an evaluation computes: the processor, or a card that the model, those that judge and an engine share.
//!
//! A card's memory is given out in this order: weights and the largest batch of the model ([`Model::rehearse`]), then the engine's weights
//! and steps, then adapters; keys and values get what is left, and no more than they can use.

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

use tidemill_engine::{CardShare, Device, Engine, EngineOptions, LoadError, StartError};
use tidemill_kernels::KernelError;
use tidemill_kernels::cuda::device::{Device as Computer, Prefill};
use tidemill_kernels::cuda::driver::Card;

use crate::job::JobError;
use crate::model::{Model, ModelError};

/// The cards of a machine; in tests, devices that run their kernels on the host.
pub trait Cards: Debug + Send + Sync {
    /// Opens the card of this number with what trainings run on it.
    fn open(&self, number: usize) -> Result<Box<dyn Computer>, KernelError>;

    /// Starts an engine, on the card that the options name.
    fn start(&self, options: EngineOptions) -> Result<Engine, StartError>;
}

/// Those that NVIDIA's driver shows.
#[derive(Debug, Default)]
pub struct DriverCards {
    /// Folder that keeps the kernels compiled for them; without it they are compiled every time.
    pub kernel_cache: Option<PathBuf>,
}

impl Cards for DriverCards {
    fn open(&self, number: usize) -> Result<Box<dyn Computer>, KernelError> {
        Ok(Box::new(Card::open_for_training(number, self.kernel_cache.as_deref())?))
    }

    fn start(&self, options: EngineOptions) -> Result<Engine, StartError> {
        Engine::start(EngineOptions { kernel_cache: self.kernel_cache.clone(), ..options }, &mut |_, _| {})
    }
}

/// The number of the one card that a device names; none for the processor. Else what would be right.
pub fn one_card(device: &Device) -> Result<Option<usize>, String> {
    match device {
        Device::Cpu => Ok(None),
        Device::Cuda(numbers) if numbers.len() > 1 => {
            Err(format!("{device} are several cards, and this takes one; name it, as cuda:N"))
        }
        Device::Cuda(numbers) => Ok(Some(numbers.first().copied().unwrap_or(0))),
        Device::Auto => Err("auto may be another device the next time; name cpu, cuda or cuda:N".to_owned()),
    }
}

/// Where something computes.
#[derive(Clone, Debug)]
pub struct Workplace {
    /// The card's number; none for the processor.
    card: Option<usize>,
    /// Bytes of the card's memory that may be held.
    memory: Option<usize>,
    cards: Arc<dyn Cards>,
}

impl Default for Workplace {
    fn default() -> Self {
        Self { card: None, memory: None, cards: Arc::new(DriverCards::default()) }
    }
}

impl Workplace {
    /// On the processor, or on one of `cards`, of whose memory `memory` bytes may be held. The error names the field and what would be right.
    pub fn new(device: &Device, memory: Option<usize>, cards: Arc<dyn Cards>) -> Result<Self, JobError> {
        let card = one_card(device).map_err(|fix| JobError::Spec { field: "device", fix })?;
        if card.is_none() && memory.is_some() {
            let fix = "is for a card's memory; leave it out, or name a card with device".to_owned();
            return Err(JobError::Spec { field: "device_memory", fix });
        }
        Ok(Self { card, memory, cards })
    }

    /// The model, computing here.
    pub fn take(&self, model: Model) -> Result<Model, ModelError> {
        match self.card {
            None => Ok(model),
            Some(number) => model.computing_on(self.cards.open(number)?, self.memory),
        }
    }

    /// An engine beside `model`, which has been rehearsed; `adapters` are the bytes of all that it will hold at once.
    pub fn start(&self, options: EngineOptions, model: &Model, adapters: usize) -> Result<Engine, JobError> {
        let (Some(card), Some(memory)) = (self.card, model.device_memory().map_err(JobError::from)?) else {
            return Ok(self.cards.start(options)?);
        };
        let outside = memory.free.saturating_sub(memory.left);
        let options = EngineOptions {
            device: Device::Cuda(vec![card]),
            left: Some(CardShare { card, bytes: outside.saturating_add(adapters) }),
            // Whoever is set back is computed again: the machine's memory has the optimizer in it.
            swap_memory: Some(0),
            // Without a trial, which would be of a card that others use.
            attention_backend: Some(Prefill::Mma),
            ..options
        };
        self.cards.start(options).map_err(|error| match too_large(&error) {
            Some(what) => JobError::Beside { held: memory.held, left: memory.left, what },
            None => JobError::Engine(error),
        })
    }
}

/// What of an engine had no room, where that is why it did not start.
fn too_large(error: &StartError) -> Option<String> {
    match error {
        StartError::KvMemory { available, block_bytes, needed, .. } => Some(format!(
            "the keys and values of one answer of full length take {} where {available} are to be had",
            needed.saturating_mul(*block_bytes)
        )),
        StartError::Backend(KernelError::Memory { what, bytes })
        | StartError::Model(LoadError::Kernel { source: KernelError::Memory { what, bytes }, .. }) => {
            Some(format!("its {what} take {bytes} more"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_card_is_taken_and_what_is_none_is_refused_by_field() {
        let place = |device: &str, memory| Workplace::new(&device.parse().unwrap(), memory, Arc::new(DriverCards::default()));
        assert_eq!(place("cpu", None).unwrap().card, None);
        assert_eq!(place("cuda", Some(1 << 30)).unwrap().card, Some(0));
        assert_eq!(place("cuda:3", None).unwrap().card, Some(3));
        for (device, memory, begin, fix) in [
            ("auto", None, "device: auto", "name cpu, cuda or cuda:N"),
            ("cuda:0,1", None, "device: cuda:0,1", "as cuda:N"),
            ("cpu", Some(1), "device_memory: ", "leave it out"),
        ] {
            let refused = place(device, memory).unwrap_err().to_string();
            assert!(refused.starts_with(begin) && refused.contains(fix), "{refused}");
        }
    }
}
