//! Which kernel a card computes the attention of prompts with: where it has two, both are tried when it is opened, over the same made-up
//! step, and the faster one is taken if it gives the same numbers. What came out is kept beside the compiled kernels.
//!
//! No rule stands in the place of the measurement, because there is none to be had without a card, and a card's clocks, caches and driver
//! differ. A step is computed by one kernel or the other as a whole, and by the same one until the server ends.

use std::path::{Path, PathBuf};

use super::ATTENTION_JOIN;
use super::attention::{Fast, cache_form, fast_attention, partial_bytes};
use super::calls::{Calls, failed};
use super::compile::text;
use super::device::{Address, Device, Launch, Params, Prefill, Source};
use super::driver::Card;
use super::images::{keep, read_kept};
use super::params::{self as p, all_bytes};
use super::plan::Plan;
use crate::error::KernelError;
use crate::ops::{HeadShape, KvDtype, SequenceSpan};
use crate::random::philox4x32;

/// Largest difference of the two results of a row and head, relative to its largest magnitude: weights of keys are rounded to bf16 in both,
/// against maxima of their own.
const TOLERANCE: f64 = 1e-2;
/// Head widths that both have a kernel for.
const WIDTHS: [usize; 2] = [64, 128];
/// Tokens of a block of the cache.
const BLOCK: usize = 32;

/// The step that is computed.
#[derive(Clone, Debug)]
pub struct Trial {
    /// Key-value heads.
    pub kv_heads: usize,
    /// Query heads that share one.
    pub group: usize,
    /// Rows and context of each sequence.
    pub sequences: Vec<(u32, u32)>,
    /// Measurements of each kernel, of which the shortest counts.
    pub rounds: usize,
}

impl Trial {
    /// Prompts as a server has them, on the heads of an 8B Llama: one whole, the end of a long one, two short ones, and a new turn of a long
    /// conversation, whose keys are cut into parts.
    pub fn serving() -> Self {
        let sequences = vec![(1024, 1024), (512, 4096), (200, 700), (37, 300), (40, 8192)];
        Trial { kv_heads: 8, group: 4, sequences, rounds: 5 }
    }
}

/// What came out for a head width.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Outcome {
    head_dim: usize,
    /// Milliseconds.
    mma: f64,
    wgmma: f64,
    /// Largest difference of a row and head, relative to its largest magnitude; infinite where a result is no number, or another one the
    /// next time.
    error: f64,
}

impl Outcome {
    fn agrees(&self) -> bool {
        self.error <= TOLERANCE
    }

    fn prefill(&self) -> Prefill {
        if self.agrees() && self.wgmma < self.mma { Prefill::Wgmma } else { Prefill::Mma }
    }

    fn line(&self) -> String {
        let Outcome { head_dim, mma, wgmma, error } = self;
        format!("{head_dim} {mma} {wgmma} {error}\n")
    }

    fn read(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let head_dim = words.next()?.parse().ok()?;
        let mut number = || words.next()?.parse().ok();
        Some(Outcome { head_dim, mma: number()?, wgmma: number()?, error: number()? })
    }
}

/// How a card computes attention of prompts.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// What somebody said.
    told: Option<Prefill>,
    tried: Vec<Outcome>,
    warnings: Vec<String>,
}

impl Choice {
    pub(super) fn prefill(&self, head_dim: usize) -> Prefill {
        let tried = || self.tried.iter().find(|outcome| outcome.head_dim == head_dim);
        self.told.or_else(|| tried().map(Outcome::prefill)).unwrap_or_default()
    }

    /// For the start-up lines; empty where there is nothing to say.
    pub(super) fn words(&self) -> String {
        let widths =
            WIDTHS.iter().filter(|width| self.prefill(**width) == Prefill::Wgmma).map(usize::to_string).collect::<Vec<_>>();
        if widths.is_empty() { String::new() } else { format!(", wgmma for prompts with heads of {}", widths.join(" and ")) }
    }
}

impl<C: Calls> Card<C> {
    /// Decides how the attention of prompts is computed: as `asked`, or by a trial where the card knows both ways, whose outcome is kept in
    /// `cache`. What is worth a warning is in [`Card::warnings`].
    ///
    /// Errors: `wgmma` is asked for and the card does not have it; the card fails.
    pub fn choose_prefill(&mut self, asked: Option<Prefill>, trial: &Trial, cache: Option<&Path>) -> Result<(), KernelError> {
        let able = self.has(Source::AttentionHopper);
        let left_out = self.left_out(Source::AttentionHopper).map(|why| format!("attention_hopper.cu is left out: {why}"));
        if asked == Some(Prefill::Wgmma)
            && let Some(why) = left_out
        {
            return Err(KernelError::Unsupported(format!("{why}; use --attention-backend auto or mma")));
        }
        if asked == Some(Prefill::Wgmma) && !able {
            return Err(KernelError::Unsupported(format!(
                "{} has no wgmma, which cards of compute capability 9.0 (H100, H200) have; use --attention-backend auto or mma",
                self.describe()
            )));
        }
        let warnings = left_out.filter(|_| asked.is_none()).map(|why| format!("{why}; prompts are computed without")).into_iter();
        self.choice = Choice { told: asked, warnings: warnings.collect(), ..Choice::default() };
        if asked.is_some() || !able {
            return Ok(());
        }
        let kept = cache.map(|folder| self.kept_at(folder, trial));
        let known = kept.as_deref().and_then(read_kept).and_then(|bytes| String::from_utf8(bytes).ok());
        let known = known.and_then(|text| text.lines().map(Outcome::read).collect::<Option<Vec<_>>>());
        self.choice.tried = match known {
            Some(known) => known,
            None => match WIDTHS.iter().map(|head_dim| self.try_both(trial, *head_dim)).collect() {
                Ok(tried) => {
                    if let Some(path) = kept {
                        keep(&path, Vec::from_iter(&tried).into_iter().map(Outcome::line).collect::<String>().as_bytes());
                    }
                    tried
                }
                Err(KernelError::Memory { bytes, .. }) => {
                    let warning = format!("no {bytes} bytes on the card to try wgmma with: prompts are computed without");
                    self.choice.warnings.push(warning);
                    Vec::new()
                }
                Err(e) => {
                    return Err(KernelError::Device(format!(
                        "{e}, while kernels for the attention of prompts were tried; --attention-backend mma leaves attention_hopper out"
                    )));
                }
            },
        };
        for outcome in self.choice.tried.iter().filter(|outcome| !outcome.agrees()) {
            self.choice.warnings.push(format!(
                "attention_hopper_{} is not used: its results differ by {:e} from those of attention_many_{0}, and {TOLERANCE:e} is allowed",
                outcome.head_dim, outcome.error
            ));
        }
        Ok(())
    }

    /// What is to be told of the choice.
    pub fn warnings(&self) -> &[String] {
        &self.choice.warnings
    }

    fn kept_at(&self, folder: &Path, trial: &Trial) -> PathBuf {
        let kernels = [Source::Attention, Source::AttentionHopper].map(text).concat();
        let hash = blake3::hash(format!("{}\n{trial:?}\n{kernels}", self.make()).as_bytes()).to_hex();
        folder.join(format!("attention-{}.txt", &hash[..32]))
    }

    fn try_both(&mut self, trial: &Trial, head_dim: usize) -> Result<Outcome, KernelError> {
        let mut held = Vec::new();
        let outcome = self.compare(trial, head_dim, &mut held);
        held.into_iter().for_each(|at| self.free(at));
        outcome
    }

    fn compare(&mut self, trial: &Trial, head_dim: usize, held: &mut Vec<Address>) -> Result<Outcome, KernelError> {
        let Trial { kv_heads, group, .. } = *trial;
        let shape = HeadShape { heads: kv_heads * group, kv_heads, head_dim };
        let mut spans: Vec<SequenceSpan> = Vec::new();
        let (mut rows, mut blocks) = (0, 0);
        for &(of_sequence, context_len) in &trial.sequences {
            spans.push(SequenceSpan { first_row: rows, rows: of_sequence, context_len, first_block: blocks });
            rows += of_sequence;
            blocks += context_len.div_ceil(BLOCK as u32);
        }
        let (rows, blocks) = (rows as usize, blocks as usize);
        let outputs = rows * shape.heads * head_dim;
        let place = |card: &mut Self, held: &mut Vec<Address>, bytes: &[u8]| {
            let at = card.alloc("a trial of attention", bytes.len()).inspect(|at| held.push(*at))?;
            card.write(at, bytes).map(|()| at)
        };
        let qkv: Vec<f32> = noise(1, rows * (shape.heads + 2 * kv_heads) * head_dim).collect();
        let qkv = place(self, held, &qkv.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())?;
        let cached = |card: &mut Self, held: &mut Vec<Address>, seed| {
            let values = noise(seed, blocks * kv_heads * BLOCK * head_dim);
            place(card, held, &values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect::<Vec<u8>>())
        };
        let (keys, values) = (cached(self, held, 2)?, cached(self, held, 3)?);
        let table = place(self, held, &(0..blocks as u32).rev().flat_map(u32::to_le_bytes).collect::<Vec<u8>>())?;
        let out = place(self, held, &vec![0; outputs * 4])?;

        let mut tried = [Prefill::Mma, Prefill::Wgmma].map(|prefill| (prefill, f64::INFINITY, Vec::new()));
        for (prefill, best, result) in &mut tried {
            let unknown = || KernelError::Unsupported(format!("no kernel for heads of {head_dim}"));
            let Fast { many, many_rows, many_shared, .. } =
                fast_attention(head_dim, KvDtype::Bf16, *prefill).ok_or_else(unknown)?;
            let mut plan = Plan::default();
            plan.build(spans.iter().copied(), shape, Some(many_rows));
            let partials = self.alloc("a trial of attention", partial_bytes(plan.partials, shape).max(1))?;
            held.push(partials);
            let for_many = p::Attention {
                qkv,
                keys,
                values,
                blocks: table,
                tiles: place(self, held, &all_bytes(&plan.many))?,
                out,
                half: Address::NONE,
                partials,
                slopes: Address::NONE,
                half_stride: 0,
                heads: shape.heads as u32,
                kv_heads: kv_heads as u32,
                head_dim: head_dim as u32,
                block_size: BLOCK as u32,
                cache_form: cache_form(KvDtype::Bf16),
                window: 0,
                scale: 1.0 / (head_dim as f32).sqrt(),
                soft_cap: 0.0,
                unused: 0,
            };
            let for_joins = p::Attention { tiles: place(self, held, &all_bytes(&plan.joins))?, ..for_many };
            let launch = Launch::grid(plan.many.len(), kv_heads).with_shared(many_shared);
            let attend = |card: &mut Self| {
                card.launch(many, launch, for_many.bytes())?;
                match plan.joins.len() {
                    0 => Ok(()),
                    joins => card.launch(ATTENTION_JOIN, Launch::grid(joins, kv_heads), for_joins.bytes()),
                }
            };
            let mut try_it = |card: &mut Self| {
                // NaN where nothing is written.
                card.fill(out, 0xff, outputs * 4)?;
                attend(card)?;
                let first = card.floats(out, outputs)?;
                for _ in 0..trial.rounds {
                    *best = card.milliseconds(attend)?.min(*best);
                }
                // Sums are made in one order: what comes out otherwise once it is warm read what was not there yet.
                let last = card.floats(out, outputs)?;
                let same = first.iter().zip(&last).all(|(a, b)| a.to_bits() == b.to_bits());
                *result = if same { first } else { vec![f32::NAN; outputs] };
                Ok(())
            };
            try_it(self).map_err(|e: KernelError| match e {
                KernelError::Device(said) => KernelError::Device(format!("{}: {said}", many.name)),
                other => other,
            })?;
        }
        let [(_, mma, want), (_, wgmma, got)] = tried;
        Ok(Outcome { head_dim, mma, wgmma, error: difference(&got, &want, head_dim) })
    }

    fn floats(&mut self, at: Address, count: usize) -> Result<Vec<f32>, KernelError> {
        let mut bytes = vec![0; count * 4];
        self.read(at, &mut bytes)?;
        Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    /// How long the card takes for some work.
    fn milliseconds(&mut self, work: impl FnOnce(&mut Self) -> Result<(), KernelError>) -> Result<f64, KernelError> {
        let no_clock = |e| failed("no clock", e);
        // SAFETY: events of the context that is current, recorded on a stream of our own and destroyed once.
        unsafe {
            let from = self.calls.create_timer().map_err(no_clock)?;
            let measured = self.calls.create_timer().map_err(no_clock).and_then(|to| {
                let measured = (self.calls.record_event(from, self.stream).map_err(no_clock))
                    .and_then(|()| work(self))
                    .and_then(|()| self.calls.record_event(to, self.stream).map_err(no_clock))
                    .and_then(|()| self.wait_until(|| self.calls.is_past(to)))
                    .and_then(|()| self.calls.elapsed(from, to).map_err(no_clock));
                let _ = self.calls.destroy_event(to);
                measured
            });
            let _ = self.calls.destroy_event(from);
            measured.map(f64::from)
        }
    }
}

/// Numbers between -1 and 1, each rounded to what bf16 holds.
fn noise(seed: u32, count: usize) -> impl Iterator<Item = f32> {
    let four = move |i: usize| philox4x32([i as u32, 0, 0, 0], [seed, 0]);
    (0..count.div_ceil(4)).flat_map(four).map(|bits| (bits >> 24) as f32 / 128.0 - 1.0).take(count)
}

/// Of pieces of `width`: over all of them, a row that sees one key would hide what is wrong with one that sees thousands, whose mean is small.
fn difference(got: &[f32], want: &[f32], width: usize) -> f64 {
    let of_piece = |(got, want): (&[f32], &[f32])| {
        let largest = want.iter().fold(1e-20f64, |most, v| most.max(f64::from(v.abs())));
        let apart = got.iter().zip(want).map(|(g, w)| f64::from((g - w).abs()));
        apart.map(|d| if d.is_nan() { f64::INFINITY } else { d }).fold(0.0, f64::max) / largest
    };
    got.chunks(width).zip(want.chunks(width)).map(of_piece).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_faster_one_is_taken_only_if_it_gives_the_same_numbers() {
        let outcome = Outcome { head_dim: 64, mma: 2.0, wgmma: 1.0, error: 1e-3 };
        assert_eq!(outcome.prefill(), Prefill::Wgmma);
        for other in
            [Outcome { wgmma: 2.0, ..outcome }, Outcome { error: 0.02, ..outcome }, Outcome { error: f64::NAN, ..outcome }]
        {
            assert_eq!(other.prefill(), Prefill::Mma);
        }
        let lost = Outcome { error: f64::INFINITY, ..outcome };
        assert_eq!((Outcome::read(lost.line().trim()), Outcome::read("64 2 x 1")), (Some(lost), None));
    }

    #[test]
    fn what_is_no_number_differs() {
        assert_eq!(difference(&[1.0, f32::NAN], &[1.0, 2.0], 2), f64::INFINITY);
        assert_eq!(difference(&[1.0, f32::NAN], &[1.0, f32::NAN], 2), f64::INFINITY);
        assert_eq!(difference(&[1.0, 2.5], &[1.0, 2.0], 2), 0.25);
        // Of a row by its own measure.
        assert_eq!(difference(&[100.0, 2.5], &[100.0, 2.0], 1), 0.25);
    }
}
