//! Steps that are under way: set going, and collected in the order in which they were.
//!
//! The device does everything in the order in which it is asked for, so a step may be begun while the one before it runs: what it writes,
//! lists, tiles, blocks and samples, is written behind that step's work. What comes back of a step is copied right behind it into a place
//! of its own.

use std::collections::VecDeque;

use super::CudaBackend;
use super::device::{Device, FETCHES, Fetch};
use super::sampling::Drew;
use crate::error::KernelError;
use crate::ops::StepOutput;

/// What was asked for and has not been handed over.
#[derive(Default)]
pub(super) struct Steps {
    under_way: VecDeque<(Fetch, Drew, Option<String>)>,
    /// Tokens that the step being enqueued draws from; 0 while it draws none.
    pub vocabulary: usize,
    returned: Vec<u8>,
}

impl<D: Device> CudaBackend<D> {
    /// Whether another step may be begun.
    pub(super) fn check_room(&self) -> Result<(), KernelError> {
        if self.steps.under_way.len() < FETCHES {
            return Ok(());
        }
        Err(KernelError::Limit(format!("{FETCHES} steps are under way; collect the first")))
    }

    pub(super) fn submit_step(&mut self) -> Result<(), KernelError> {
        self.run_recorded();
        let going = match self.error.take() {
            Some(error) => Err(error),
            None => self.fetch_drawn(),
        };
        if going.is_err() {
            // What was asked for before is done before anybody goes on; the first error is the cause.
            let _ = self.device.wait();
        }
        going
    }

    fn fetch_drawn(&mut self) -> Result<(), KernelError> {
        let vocabulary = std::mem::take(&mut self.steps.vocabulary);
        let drew = if vocabulary > 0 { self.sampling.drew() } else { Drew::default() };
        let fetch = self.device.fetch(self.sampling.drawn().0, drew.bytes())?;
        self.steps.under_way.push_back((fetch, drew, self.captures.untold.take()));
        self.shapes.submitted(&self.batch, vocabulary);
        Ok(())
    }

    pub(super) fn collect_step(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        out.samples.clear();
        let Some((fetch, drew, refused)) = self.steps.under_way.pop_front() else {
            return Err(KernelError::Limit("no step is under way".into()));
        };
        let returned = &mut self.steps.returned;
        returned.resize(drew.bytes(), 0);
        self.device.fetched(fetch, returned)?;
        out.refused_capture = refused;
        drew.read(returned, &mut out.samples);
        Ok(())
    }

    pub(super) fn finish_step(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        out.samples.clear();
        if !self.steps.under_way.is_empty() {
            return Err(KernelError::Limit("a step before this one was not collected".into()));
        }
        self.submit_step()?;
        self.collect_step(out)
    }
}
