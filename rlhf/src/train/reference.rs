//! Log-probabilities of the model before training: computed once per dataset, kept on disk.

use std::{io::ErrorKind, path::Path};

use candle_core::{Device, Result, Tensor};

use super::{
    TrainError,
    checkpoint::hash,
    policy::{Pass, Policy},
};
use crate::{
    collate::{Item, Layout, Micro, batches, pack},
    durable,
    loss::sum_by,
    parameters::read,
    tensors::{self, Lists},
};

/// Items that are laid out together: enough to fill batches well, few enough to plan quickly.
const WINDOW: usize = 256;
const NAME: &str = "log_probs";

/// The log-probability of each completion of the batch: the sum over its labels, `[spans]`.
pub(super) fn completion_sums(model: &dyn Policy, micro: &Micro, pass: Pass) -> Result<Tensor> {
    let log_probs = model.log_probs(&micro.batch, pass)?;
    let owners = Tensor::new(micro.owners(), &Device::Cpu)?;
    sum_by(&log_probs, &owners, micro.spans.len())
}

/// The sums of all completions of `items`, in order, without gradient. `watch` hears how many items are done.
pub(crate) fn sums(
    model: &dyn Policy,
    items: &[Item<'_>],
    layout: Layout,
    budget: usize,
    pass: Pass,
    mut watch: impl FnMut(usize),
) -> Result<Vec<f32>> {
    let offsets: Vec<usize> = items
        .iter()
        .scan(0, |next, item| {
            let own = *next;
            *next += item.completions.len();
            Some(own)
        })
        .collect();
    let mut found = vec![0.0; items.iter().map(|item| item.completions.len()).sum()];
    let mut done = 0;
    for (window, members) in items.chunks(WINDOW).enumerate() {
        let sizes: Vec<usize> = members.iter().map(|item| item.rows(layout)).collect();
        for batch in batches(&sizes, budget) {
            let places: Vec<usize> = batch.iter().map(|index| window * WINDOW + index).collect();
            let micro = pack(places.iter().map(|place| Item { sample: *place, ..items[*place] }), layout);
            let sums = completion_sums(model, &micro, pass)?;
            read(&sums, |sums| {
                for (span, sum) in micro.spans.iter().zip(sums) {
                    found[offsets[span.sample] + span.completion] = *sum;
                }
            })?;
            done += batch.len();
            watch(done);
        }
    }
    Ok(found)
}

/// [`sums`] of the reference, read from `cache` when they were computed before for this reference and these tokens.
pub(super) fn kept(
    model: &dyn Policy,
    items: &[Item<'_>],
    layout: Layout,
    budget: usize,
    cache: Option<&Path>,
    watch: impl FnMut(usize),
) -> std::result::Result<Vec<f32>, TrainError> {
    let Some(cache) = cache else { return Ok(sums(model, items, layout, budget, Pass::REFERENCE, watch)?) };
    let count = items.iter().map(|item| item.completions.len()).sum();
    let path = cache.join(format!("reference-{}.safetensors", key(&model.frozen()?, items)));
    match std::fs::read(&path) {
        Ok(bytes) => match Lists::read(&bytes).and_then(|lists| lists.get(NAME, count)) {
            Ok(found) => return Ok(found),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "kept reference log-probabilities are damaged; computing them again")
            }
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(TrainError::io(&path)(error)),
    }
    let found = sums(model, items, layout, budget, Pass::REFERENCE, watch)?;
    let bytes = tensors::write([(NAME.to_owned(), found.as_slice())])?;
    std::fs::create_dir_all(cache).map_err(TrainError::io(cache))?;
    durable::replace(&path, &bytes).map_err(TrainError::io(&path))?;
    Ok(found)
}

/// Names what the sums are a function of.
fn key(frozen: &str, items: &[Item<'_>]) -> String {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(hash(frozen.as_bytes()).as_bytes());
    for item in items {
        describe(item, &mut bytes);
    }
    hash(&bytes)
}

/// Everything about an item that its log-probabilities depend on, without ambiguity.
pub(super) fn describe(item: &Item<'_>, bytes: &mut Vec<u8>) {
    let mut number = |value: u32| bytes.extend_from_slice(&value.to_le_bytes());
    let mut list = |tokens: &[u32]| {
        number(tokens.len() as u32);
        tokens.iter().for_each(|token| number(*token));
    };
    list(item.prompt);
    list(&[item.completions.len() as u32]);
    for completion in item.completions {
        list(&completion.tokens);
        let unlearnt: Vec<u32> =
            (0..completion.tokens.len()).filter(|place| !completion.learns(*place)).map(|place| place as u32).collect();
        list(&unlearnt);
    }
}
