//! The moments as bytes, and back.

use std::collections::BTreeMap;

use super::Optimizer;
use crate::tensors::{self, Lists, TensorsError};

/// A state that is not this optimizer's.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The moments cannot be read.
    #[error("optimizer state: {0}")]
    Tensors(#[from] TensorsError),
    /// It is about other parameters.
    #[error("optimizer state: {0}")]
    Other(String),
}

impl Optimizer {
    /// The moments as a safetensors file: `mean.NAME` and `square.NAME` for every parameter.
    pub fn moments(&self) -> Result<Vec<u8>, StateError> {
        let lists = self.slots.iter().flat_map(|slot| {
            let name = &slot.parameter.name;
            [(format!("mean.{name}"), slot.mean.as_slice()), (format!("square.{name}"), slot.square.as_slice())]
        });
        Ok(tensors::write(lists)?)
    }

    /// Steps that each parameter has taken, by name.
    pub fn steps(&self) -> BTreeMap<String, u64> {
        self.slots.iter().map(|slot| (slot.parameter.name.clone(), slot.steps)).collect()
    }

    /// Goes on from what [`Optimizer::moments`] and [`Optimizer::steps`] gave. Changes nothing when it fails.
    pub fn restore(&mut self, moments: &[u8], steps: &BTreeMap<String, u64>) -> Result<(), StateError> {
        let lists = Lists::read(moments)?;
        if lists.len() != 2 * self.slots.len() || steps.len() != self.slots.len() {
            let (found, expected) = (steps.len(), self.slots.len());
            return Err(StateError::Other(format!("it has {found} parameters, the model {expected}")));
        }
        let mut read = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            let (name, length) = (&slot.parameter.name, slot.mean.len());
            let steps = steps.get(name).ok_or_else(|| StateError::Other(format!("it knows no parameter {name}")))?;
            read.push((*steps, lists.get(&format!("mean.{name}"), length)?, lists.get(&format!("square.{name}"), length)?));
        }
        for (slot, (steps, mean, square)) in self.slots.iter_mut().zip(read) {
            (slot.steps, slot.mean, slot.square) = (steps, mean, square);
        }
        self.discard();
        Ok(())
    }
}
