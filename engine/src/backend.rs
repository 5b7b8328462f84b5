//! Which backend computes: the processor's, that of a card, or those of several cards together.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::cuda::device::{Device as _, Prefill};
use tidemill_kernels::cuda::driver::Card;
use tidemill_kernels::cuda::trial::Trial;
use tidemill_kernels::cuda::{CudaBackend, nccl};
use tidemill_kernels::{Abort, Activations, KernelError, Limits, Ops};

use crate::model::tensor_parallel::RankOps;
use crate::options::{CardShare, StartError};

/// Where to compute.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// NVIDIA cards, by their numbers among those that the driver shows; without any, as many of those as the model needs.
    Cuda(Vec<usize>),
    /// The cards that the model needs where they can serve, else the processor.
    Auto,
}

impl Device {
    /// Whether it may be the card of this number, or have it among its own: who names none may get any.
    pub fn may_be(&self, card: usize) -> bool {
        match self {
            Device::Cpu => false,
            Device::Cuda(numbers) => numbers.is_empty() || numbers.contains(&card),
            Device::Auto => true,
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = "expected cpu, cuda, cuda:N with the number of a card, cuda:N,N,... with those of several, or auto";
        match text {
            "cpu" => Ok(Device::Cpu),
            "auto" => Ok(Device::Auto),
            "cuda" => Ok(Device::Cuda(Vec::new())),
            _ => {
                let mut cards: Vec<usize> = Vec::new();
                for number in text.strip_prefix("cuda:").ok_or(wrong)?.split(',') {
                    let card = number.parse().map_err(|_| wrong)?;
                    if cards.contains(&card) {
                        return Err(format!("names card {card} twice"));
                    }
                    cards.push(card);
                }
                Ok(Device::Cuda(cards))
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(cards) if cards.is_empty() => f.write_str("cuda"),
            Device::Cuda(cards) => {
                let numbers: Vec<String> = cards.iter().map(usize::to_string).collect();
                write!(f, "cuda:{}", numbers.join(","))
            }
            Device::Auto => f.write_str("auto"),
        }
    }
}

/// What decides how many cards a model gets where nobody says.
#[derive(Clone, Debug)]
pub(crate) struct Needs {
    /// Bytes of the packed weights.
    pub weights: u64,
    /// Numbers of cards that it can be shared out among, ascending.
    pub degrees: Vec<usize>,
    /// Every card decides for itself which experts a token goes to, and all must decide alike.
    pub routes: bool,
}

impl Needs {
    /// How many of `visible` cards with `free` bytes each. One where the weights take half of it at most: every further card costs two
    /// exchanges a layer. Else the fewest of which that is true, or as many as there are.
    fn cards(&self, free: usize, visible: usize) -> usize {
        let possible = || self.degrees.iter().copied().filter(|degree| *degree <= visible);
        let fits = |degree: &usize| self.weights / *degree as u64 <= free as u64 / 2;
        possible().find(fits).or_else(|| possible().next_back()).unwrap_or(1)
    }
}

/// What is wrong with these cards, by number and kind, for a model whose every rank routes: different kernels, or other ways to multiply, round
/// differently, and two experts that are almost as likely change places.
fn unlike(kinds: &[(usize, String)]) -> Option<String> {
    let (first, kind) = kinds.first()?;
    let (other, another) = kinds.iter().find(|(_, other)| other != kind)?;
    Some(format!(
        "must name cards of one kind for a model with experts, so that all send a token to the same ones: {first} is {kind}, {other} is \
         {another}"
    ))
}

/// What computes.
pub(crate) enum Backend {
    /// A whole model.
    One(Box<dyn Ops>),
    /// A part of it each.
    Several {
        /// In the order of their ranks.
        ranks: Vec<RankOps>,
        /// Ends what they wait for each other with.
        abort: Arc<dyn Abort>,
    },
}

/// How a backend is opened.
pub(crate) struct Opening<'a> {
    pub device: &'a Device,
    /// Cards that are to compute the model together, where somebody says.
    pub tensor_parallel: Option<usize>,
    pub threads: Option<usize>,
    /// The largest step.
    pub limits: Limits,
    /// Keeps compiled kernels, and what cards were found to do faster.
    pub cache: Option<&'a Path>,
    /// What the cache leaves of a card.
    pub left: Option<CardShare>,
    /// How attention of prompts is computed, where somebody says.
    pub attention: Option<Prefill>,
    /// What activations are where weights of 8-bit floats are multiplied.
    pub activations: Activations,
    pub needs: Needs,
}

impl Opening<'_> {
    /// Opens it.
    pub fn open(&self) -> Result<Backend, StartError> {
        match self.device {
            Device::Cpu => self.processor(),
            Device::Cuda(numbers) => self.cards(numbers),
            Device::Auto => match self.cards(&[]) {
                Err(StartError::Backend(KernelError::Unsupported(why)))
                    // The processor does not do what was asked of a card.
                    if self.tensor_parallel.is_none_or(|cards| cards == 1)
                        && self.attention.is_none()
                        && self.activations == Activations::Bf16 =>
                {
                    tracing::info!(why, "no card can serve; computing on the processor");
                    self.processor()
                }
                opened => opened,
            },
        }
    }

    fn processor(&self) -> Result<Backend, StartError> {
        let options = CpuOptions { threads: self.threads.unwrap_or(0), isa: None, limits: self.limits };
        Ok(Backend::One(Box::new(CpuBackend::new(options)?)))
    }

    fn cards(&self, named: &[usize]) -> Result<Backend, StartError> {
        let wrong = |message: String| StartError::Option { option: "--tensor-parallel", message };
        let asked = match (self.tensor_parallel, named.len()) {
            (Some(cards), names) if names > 0 && cards != names => {
                let numbers = if names == 1 { "one card".to_owned() } else { format!("{names} cards") };
                return Err(wrong(format!("must be {names}, not {cards}: --device names {numbers}")));
            }
            (Some(cards), _) => Some(cards),
            (None, names) => Some(names).filter(|names| *names > 0),
        };
        // Before anything is opened.
        if let Some(cards) = asked
            && !self.needs.degrees.contains(&cards)
        {
            let degrees: Vec<String> = self.needs.degrees.iter().map(usize::to_string).collect();
            return Err(wrong(format!(
                "cannot be {cards} for this model: its heads, widths and blocks divide by {}",
                degrees.join(", ")
            )));
        }
        let number = named.first().copied().unwrap_or(0);
        let first = self.card(number)?;
        let visible = first.visible()?;
        let count = match asked {
            Some(cards) if named.is_empty() && cards > visible => {
                return Err(wrong(format!("must be at most {visible}, the cards that the NVIDIA driver shows, not {cards}")));
            }
            Some(cards) => cards,
            None if visible == 1 => 1,
            None => self.needs.cards(first.memory()?.0.saturating_sub(self.left_on(number)), visible),
        };
        if count == 1 {
            return Ok(Backend::One(self.backend(number, first)?));
        }
        let numbers: Vec<usize> = if named.is_empty() { (0..count).collect() } else { named.to_vec() };
        tracing::info!(cards = ?numbers, "the model is shared out among several cards");
        let others: Vec<Result<Card, KernelError>> = std::thread::scope(|scope| {
            let open = |number: &usize| {
                let number = *number;
                scope.spawn(move || self.card(number))
            };
            let threads: Vec<_> = numbers[1..].iter().map(open).collect();
            let panicked = |_| Err(KernelError::Device("a thread that opens a card panicked".to_owned()));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
        });
        let cards = std::iter::once(Ok(first)).chain(others).collect::<Result<Vec<_>, _>>()?;
        if self.needs.routes {
            let kinds: Vec<(usize, String)> = numbers.iter().copied().zip(cards.iter().map(Card::kind)).collect();
            if let Some(message) = unlike(&kinds) {
                if asked.is_none()
                    && let Some(first) = cards.into_iter().next()
                {
                    tracing::info!(message, "one card computes the model");
                    return Ok(Backend::One(self.backend(number, first)?));
                }
                return Err(StartError::Option { option: "--device", message });
            }
        }
        let (cards, abort) = nccl::join(cards)?;
        let rank = |(number, card)| Ok((format!("cuda:{number}"), self.backend(number, card)?));
        let ranks = numbers.into_iter().zip(cards).map(rank).collect::<Result<_, KernelError>>()?;
        Ok(Backend::Several { ranks, abort })
    }

    fn card(&self, number: usize) -> Result<Card, KernelError> {
        let mut card = Card::open_number(number, self.cache)?;
        card.choose_prefill(self.attention, &Trial::serving(), self.cache)?;
        for warning in card.warnings() {
            tracing::warn!(card = number, "{warning}");
        }
        Ok(card)
    }

    fn backend(&self, number: usize, card: Card) -> Result<Box<dyn Ops>, KernelError> {
        let backend = CudaBackend::new(card, self.limits).with_activations(self.activations)?;
        Ok(Box::new(backend.capturing().leaving(self.left_on(number))))
    }

    /// Bytes of a card that are somebody else's.
    fn left_on(&self, card: usize) -> usize {
        self.left.filter(|left| left.card == card).map_or(0, |left| left.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for (text, device) in [
            ("cpu", Device::Cpu),
            ("cuda", Device::Cuda(vec![])),
            ("cuda:0", Device::Cuda(vec![0])),
            ("cuda:3,1", Device::Cuda(vec![3, 1])),
            ("auto", Device::Auto),
        ] {
            assert_eq!(text.parse(), Ok(device.clone()));
            assert_eq!(device.to_string(), text);
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0,", "CPU", "cuda0"] {
            assert!(text.parse::<Device>().unwrap_err().contains("cuda:N"), "{text}");
        }
        assert!("cuda:1,0,1".parse::<Device>().unwrap_err().contains("card 1 twice"));
    }

    fn opening(device: &Device, tensor_parallel: Option<usize>) -> Opening<'_> {
        let limits = Limits { max_tokens: 4, max_samples: 4, max_positions: 16 };
        let needs = Needs { weights: 1 << 30, degrees: vec![1, 2, 4], routes: false };
        Opening {
            device,
            tensor_parallel,
            threads: Some(1),
            limits,
            cache: None,
            left: None,
            attention: None,
            activations: Activations::Bf16,
            needs,
        }
    }

    #[test]
    fn what_is_somebody_elses_is_left_on_its_card_alone() {
        let (device, left) = (Device::Cpu, Some(CardShare { card: 1, bytes: 7 }));
        let opening = Opening { left, ..opening(&device, None) };
        assert_eq!([0, 1, 2].map(|card| opening.left_on(card)), [0, 7, 0]);
    }

    #[test]
    fn auto_computes_somewhere_on_every_machine() {
        let Backend::One(backend) = opening(&Device::Auto, Some(1)).open().unwrap() else { panic!("one was asked for") };
        assert_eq!(backend.limits().max_tokens, 4);
        assert!(!backend.describe().is_empty());
    }

    #[test]
    fn a_model_gets_the_fewest_cards_that_hold_it_and_room_for_a_cache() {
        const GIB: u64 = 1 << 30;
        let needs = |gib: u64| Needs { weights: gib * GIB, degrees: vec![1, 2, 4, 8], routes: false };
        let free = 80 << 30;
        let cards: Vec<usize> = [1, 40, 41, 80, 81, 160, 400].map(|gib| needs(gib).cards(free, 8)).to_vec();
        assert_eq!(cards, [1, 1, 2, 2, 4, 4, 8]);
        // What there is, and what divides.
        assert_eq!(needs(400).cards(free, 3), 2);
        assert_eq!(Needs { degrees: vec![1, 3], ..needs(100) }.cards(free, 8), 3);
        assert_eq!(Needs { degrees: vec![1], ..needs(100) }.cards(free, 8), 1);
    }

    #[test]
    fn cards_that_route_are_of_one_kind() {
        let kinds = |names: &[&str]| names.iter().enumerate().map(|(i, name)| (2 * i, (*name).to_owned())).collect::<Vec<_>>();
        assert_eq!(unlike(&kinds(&["H100, sm_90a"; 4])), None);
        let text = unlike(&kinds(&["H100, sm_90a", "H100, sm_90a", "A100, sm_80"])).unwrap();
        assert!(text.contains("0 is H100, sm_90a, 4 is A100, sm_80"), "{text}");
    }

    #[test]
    fn numbers_of_cards_that_make_no_sense_are_named_before_a_card_is_opened() {
        let refused = |device: &str, tensor_parallel| {
            let device = device.parse().unwrap();
            match opening(&device, tensor_parallel).open() {
                Err(error) => error.to_string(),
                Ok(_) => panic!("was opened"),
            }
        };
        let text = refused("cuda:0,1", Some(4));
        assert!(text.starts_with("--tensor-parallel must be 2, not 4") && text.contains("2 cards"), "{text}");
        assert!(refused("cuda:1", Some(2)).contains("names one card"));
        for text in [refused("cuda", Some(3)), refused("cuda:0,1,2", None)] {
            assert!(text.contains("cannot be 3") && text.contains("divide by 1, 2, 4"), "{text}");
        }
    }
}
