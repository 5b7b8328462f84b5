//! The matrices of experts, under the names and in the groups that files have them.

use std::ops::Range;

use tidemill_kernels::Format;

use super::{FileMatrix, ModelFiles};
use crate::load_error::LoadError;
use crate::model::weight_names::Naming;
use crate::model_config::{ExpertConfig, Family, ModelConfig};
use crate::tensor_file::Tensor;

/// A matrix of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExpertPart {
    /// `[intermediate, hidden]`
    Gate,
    /// `[intermediate, hidden]`
    Up,
    /// `[hidden, intermediate]`
    Down,
}

/// A matrix of a layer with experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mixture {
    /// `[experts, hidden]`, which chooses the experts of a token.
    Router,
    /// An expert's.
    Expert(usize, ExpertPart),
    /// That of the expert that every token goes to.
    Shared(ExpertPart),
    /// `[1, hidden]`, how much of that expert a token gets.
    SharedGate,
}

/// A matrix of a layer with experts, as it lies in the file.
#[derive(Clone, Copy, Debug)]
pub struct MixtureMatrix<'a> {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Storage format.
    pub format: Format,
    data: &'a [u8],
    /// The file has its columns as rows.
    is_turned: bool,
}

impl<'a> MixtureMatrix<'a> {
    /// Bytes in the file.
    pub(crate) fn bytes(&self) -> usize {
        self.data.len()
    }

    /// As it lies in the file, where its rows do.
    pub(crate) fn by_rows(&self) -> Option<FileMatrix<'a>> {
        let &Self { n, k, format, data, is_turned } = self;
        (!is_turned).then_some(FileMatrix { n, k, format, data, row_order: None })
    }

    /// Its rows within `columns`, copied from a file that has its columns as rows.
    pub(crate) fn turned(&self, columns: Range<usize>) -> Vec<u8> {
        let column = self.data.len() / self.k.max(1);
        let data = &self.data[columns.start * column..columns.end * column];
        match self.format {
            Format::F32 => transposed::<4>(data, columns.len(), self.n),
            // Two bytes, too: `ModelFiles::mixture` turns no blocks.
            _ => transposed::<2>(data, columns.len(), self.n),
        }
    }
}

/// Rows of a tensor: its name, its dimensions before the last one, and which of its rows are meant.
struct Place {
    name: String,
    outer: Vec<usize>,
    first: usize,
}

impl ExpertPart {
    /// In Mixtral's files, in others, and in GGUF.
    const fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            ExpertPart::Gate => ("w1", "gate_proj", "ffn_gate"),
            ExpertPart::Up => ("w3", "up_proj", "ffn_up"),
            ExpertPart::Down => ("w2", "down_proj", "ffn_down"),
        }
    }

    /// In DBRX's files.
    const fn dbrx_name(self) -> &'static str {
        match self {
            ExpertPart::Gate => "w1",
            ExpertPart::Up => "v1",
            ExpertPart::Down => "w2",
        }
    }
}

impl ModelConfig {
    /// Every matrix of a layer with experts; none where the layers have none.
    pub fn mixtures(&self) -> Vec<Mixture> {
        let Some(ExpertConfig { count, shared, .. }) = self.experts else { return Vec::new() };
        let parts = [ExpertPart::Gate, ExpertPart::Up, ExpertPart::Down];
        let experts = (0..count).flat_map(|expert| parts.map(|part| Mixture::Expert(expert, part)));
        let shared = shared.map(|_| parts.map(Mixture::Shared).into_iter().chain([Mixture::SharedGate]));
        std::iter::once(Mixture::Router).chain(experts).chain(shared.into_iter().flatten()).collect()
    }
}

impl ModelFiles {
    /// A matrix of a layer with experts, checked against the configuration. Publishers keep experts one by one or all in one tensor, and
    /// gate and up apart or one behind the other; each is read as it lies.
    pub fn mixture(&self, layer: usize, which: Mixture) -> Result<MixtureMatrix<'_>, LoadError> {
        let Some(experts) = self.config.experts else {
            return Err(LoadError::invalid(&self.path, "num_experts", "the model has no experts"));
        };
        let (n, k) = self.mixture_shape(experts, which);
        // DBRX's down projections lie as they are before they are transposed.
        let is_turned = self.naming() == Naming::Dbrx && matches!(which, Mixture::Expert(_, ExpertPart::Down));
        let (rows, columns) = if is_turned { (k, n) } else { (n, k) };
        let places = self.places(layer, which, experts, rows);
        for Place { name, outer, first } in &places {
            if let Some(tensor) = self.weights.tensor(name)? {
                let FileMatrix { format, data, .. } = rows_of(tensor, outer, *first, rows, columns)?;
                if is_turned && format.block_len() > 1 {
                    let found = format!("a matrix to transpose stored as {format:?}");
                    return Err(LoadError::unsupported(tensor.path, name, found, "use F32, F16 or BF16"));
                }
                return Ok(MixtureMatrix { n, k, format, data, is_turned });
            }
        }
        let name = places.into_iter().next().map_or_else(String::new, |place| place.name);
        Err(LoadError::invalid(&self.path, name, "the tensor is missing; fetch the model again, all of its files"))
    }

    /// What the tensor is called that a matrix of a layer with experts lies in; the usual name where there is none.
    pub(crate) fn mixture_name(&self, layer: usize, which: Mixture) -> String {
        let Some(experts) = self.config.experts else { return String::new() };
        let places = self.places(layer, which, experts, self.mixture_shape(experts, which).0);
        let found = places.iter().position(|place| matches!(self.weights.tensor(&place.name), Ok(Some(_)))).unwrap_or(0);
        places.into_iter().nth(found).map_or_else(String::new, |place| place.name)
    }

    /// `[n, k]`
    fn mixture_shape(&self, experts: ExpertConfig, which: Mixture) -> (usize, usize) {
        let hidden = self.config.hidden;
        let part = |part, width| if part == ExpertPart::Down { (hidden, width) } else { (width, hidden) };
        match which {
            Mixture::Router => (experts.count, hidden),
            Mixture::Expert(_, expert) => part(expert, self.config.intermediate),
            Mixture::Shared(expert) => part(expert, experts.shared.unwrap_or(0)),
            Mixture::SharedGate => (1, hidden),
        }
    }

    /// Where the `n` rows of a matrix may be, the usual place first.
    fn places(&self, layer: usize, which: Mixture, experts: ExpertConfig, n: usize) -> Vec<Place> {
        let naming = self.naming();
        let prefix = naming.layer(layer);
        let at = |name: String, outer: &[usize], first| Place { name: format!("{prefix}{name}"), outer: outer.to_vec(), first };
        let alone = |name: String| at(name, &[n], 0);
        // Mixtral's own names, and everybody's.
        let by_family = |names: [String; 2]| {
            let mut places = names.map(alone);
            if self.config.family != Family::Mixtral {
                places.reverse();
            }
            Vec::from(places)
        };
        let count = experts.count;
        match (naming, which) {
            (Naming::Dbrx, Mixture::Router) => vec![alone("ffn.router.layer.weight".to_owned())],
            (Naming::Dbrx, Mixture::Expert(expert, part)) => {
                vec![at(format!("ffn.experts.mlp.{}", part.dbrx_name()), &[count * n], expert * n)]
            }
            (Naming::Gguf | Naming::GgufDbrx | Naming::GgufMpt, Mixture::Router) => vec![alone("ffn_gate_inp.weight".to_owned())],
            (Naming::Gguf | Naming::GgufDbrx | Naming::GgufMpt, Mixture::SharedGate) => {
                vec![alone("ffn_gate_inp_shexp.weight".to_owned())]
            }
            (Naming::Gguf | Naming::GgufDbrx | Naming::GgufMpt, Mixture::Shared(part)) => {
                vec![alone(format!("{}_shexp.weight", part.names().2))]
            }
            (Naming::Gguf | Naming::GgufDbrx | Naming::GgufMpt, Mixture::Expert(expert, part)) => {
                let name = part.names().2;
                let mut places = vec![
                    at(format!("{name}_exps.weight"), &[count, n], expert * n),
                    // Of files from before llama.cpp put them together.
                    alone(format!("{name}.{expert}.weight")),
                ];
                let second = usize::from(part == ExpertPart::Up);
                if part != ExpertPart::Down {
                    places.push(at("ffn_gate_up_exps.weight".to_owned(), &[count, 2 * n], (2 * expert + second) * n));
                }
                places
            }
            (_, Mixture::Router) => by_family(["block_sparse_moe.gate.weight".to_owned(), "mlp.gate.weight".to_owned()]),
            (_, Mixture::SharedGate) => vec![alone("mlp.shared_expert_gate.weight".to_owned())],
            (_, Mixture::Shared(part)) => vec![alone(format!("mlp.shared_expert.{}.weight", part.names().1))],
            (_, Mixture::Expert(expert, part)) => {
                let (mixtral, name, _) = part.names();
                // The last is what transformers 5 has in memory, and saves where it is not asked for the published form.
                let together = match part {
                    ExpertPart::Down => at("mlp.experts.down_proj".to_owned(), &[count, n], expert * n),
                    _ => {
                        let second = usize::from(part == ExpertPart::Up);
                        at("mlp.experts.gate_up_proj".to_owned(), &[count, 2 * n], (2 * expert + second) * n)
                    }
                };
                let mixtral = format!("block_sparse_moe.experts.{expert}.{mixtral}.weight");
                let mut places = by_family([mixtral, format!("mlp.experts.{expert}.{name}.weight")]);
                places.push(together);
                places
            }
        }
    }

    /// Weights that a token meets: all but those of the experts that it does not go to.
    pub fn active_parameters(&self) -> u64 {
        let Some(experts) = self.config.experts else { return self.parameters() };
        let one = 3 * self.config.hidden as u64 * self.config.intermediate as u64;
        let idle = (experts.count - experts.each) as u64 * self.config.layers as u64;
        self.parameters().saturating_sub(one.saturating_mul(idle))
    }
}

/// `n` rows of `k`, from row `first` of a tensor with these outer dimensions on.
pub(super) fn rows_of<'a>(
    tensor: Tensor<'a>,
    outer: &[usize],
    first: usize,
    n: usize,
    k: usize,
) -> Result<FileMatrix<'a>, LoadError> {
    // One row is a vector to some.
    if !(outer == [1] && tensor.shape == [k]) {
        tensor.expect_shape(&outer.iter().copied().chain([k]).collect::<Vec<_>>())?;
    }
    let rows = outer.iter().product::<usize>();
    let row = tensor.format.row_bytes(k).filter(|row| row.checked_mul(rows) == Some(tensor.data.len()));
    let data = row.and_then(|row| tensor.data.get(first * row..(first + n) * row)).ok_or_else(|| {
        let detail = format!("{} bytes are not {rows} rows of {k} in {:?}", tensor.data.len(), tensor.format);
        LoadError::corrupt(tensor.path, tensor.name, detail)
    })?;
    Ok(FileMatrix { n, k, format: tensor.format, data, row_order: None })
}

/// A matrix `[rows, columns]` of elements of `SIZE` bytes as `[columns, rows]`.
fn transposed<const SIZE: usize>(data: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    const SIDE: usize = 32;
    // By squares of which both the rows read and the rows written stay in the nearest cache.
    let mut turned = vec![0; data.len()];
    for first_row in (0..rows).step_by(SIDE) {
        for first_column in (0..columns).step_by(SIDE) {
            for column in first_column..columns.min(first_column + SIDE) {
                for row in first_row..rows.min(first_row + SIDE) {
                    let (from, to) = ((row * columns + column) * SIZE, (column * rows + row) * SIZE);
                    turned[to..to + SIZE].copy_from_slice(&data[from..from + SIZE]);
                }
            }
        }
    }
    turned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_matrix_has_its_columns_as_rows() {
        for (rows, columns) in [(1, 1), (3, 5), (32, 33), (70, 64)] {
            let data: Vec<u8> = (0..rows * columns).flat_map(|i| (i as u16).to_le_bytes()).collect();
            let turned = transposed::<2>(&data, rows, columns);
            for (at, bytes) in turned.chunks(2).enumerate() {
                let (column, row) = (at / rows, at % rows);
                assert_eq!(u16::from_le_bytes([bytes[0], bytes[1]]) as usize, row * columns + column);
            }
            assert_eq!(transposed::<2>(&turned, columns, rows), data);
        }
    }
}
