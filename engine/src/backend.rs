//! Which backend computes: the processor's, or that of a card.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::cuda::driver::Card;
use tidemill_kernels::{KernelError, Limits, Ops};

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA card, by its number among those that the driver shows.
    Cuda(usize),
    /// The first card where one can serve, else the processor.
    Auto,
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
        match (text, number) {
            ("cpu", _) => Ok(Device::Cpu),
            ("auto", _) => Ok(Device::Auto),
            ("cuda", _) => Ok(Device::Cuda(0)),
            (_, Some(number)) => Ok(Device::Cuda(number)),
            _ => Err("expected cpu, cuda, cuda:N with the number of a card, or auto".to_owned()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(number) => write!(f, "cuda:{number}"),
            Device::Auto => f.write_str("auto"),
        }
    }
}

/// The backend for steps up to `limits`. Compiled kernels are kept in `cache`, where there is one.
pub(crate) fn open(
    device: Device,
    threads: Option<usize>,
    limits: Limits,
    cache: Option<&Path>,
) -> Result<Box<dyn Ops>, KernelError> {
    let cpu = || -> Result<Box<dyn Ops>, KernelError> {
        Ok(Box::new(CpuBackend::new(CpuOptions { threads: threads.unwrap_or(0), isa: None, limits })?))
    };
    let card = |number| -> Result<Box<dyn Ops>, KernelError> {
        Ok(Box::new(CudaBackend::new(Card::open_number(number, cache)?, limits).capturing()))
    };
    match device {
        Device::Cpu => cpu(),
        Device::Cuda(number) => card(number),
        Device::Auto => match card(0) {
            Err(KernelError::Unsupported(why)) => {
                tracing::info!(why, "no card can serve; computing on the processor");
                cpu()
            }
            opened => opened,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for (text, device) in
            [("cpu", Device::Cpu), ("cuda:0", Device::Cuda(0)), ("cuda:3", Device::Cuda(3)), ("auto", Device::Auto)]
        {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "cuda0"] {
            assert!(text.parse::<Device>().unwrap_err().contains("cuda:N"), "{text}");
        }
    }

    #[test]
    fn auto_computes_somewhere_on_every_machine() {
        let limits = Limits { max_tokens: 4, max_samples: 4, max_positions: 16 };
        let backend = open(Device::Auto, Some(1), limits, None).unwrap();
        assert_eq!(backend.limits(), limits);
        assert!(!backend.describe().is_empty());
    }
}
