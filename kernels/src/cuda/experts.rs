//! A mixture of experts on the device; see `kernels/cuda/moe.cu`.

use super::CudaBackend;
use super::device::{Address, Device, Kernel, Launch, Source};
use super::params::{self as p, all_bytes};
use super::weights::{self, Form};
use crate::error::KernelError;
use crate::ops::*;

const TOP_K: Kernel = Kernel::new(Source::Moe, "moe_top_k", 256);
const ALIGN: Kernel = Kernel::new(Source::Moe, "moe_align", 256);
const COMBINE: Kernel = Kernel::new(Source::Moe, "moe_combine", 256);
const GATE_ROWS: Kernel = Kernel::new(Source::Moe, "gate_rows", 256);

/// Features and bytes of shared memory of a block that takes 64 rows.
const BLOCK_FEATURES: usize = 128;
const BLOCK_SHARED: usize = 2 * (64 + BLOCK_FEATURES) * 64 * 2;

/// Rows of a tile.
const HEIGHTS: [usize; 3] = [8, 16, 64];

/// One matrix of each expert of a layer.
#[derive(Clone, Copy)]
pub(super) struct HeldExperts {
    form: Form,
    /// A [`p::Weights`] for each.
    table: Address,
    n: usize,
}

/// Room for a step's routing.
#[derive(Clone, Copy)]
pub(super) struct HeldRouting {
    shape: RoutingShape,
    chosen: Address,
    weights: Address,
    rows: Address,
    places: Address,
    tiles: Address,
    tile_count: Address,
    /// Rows of a tile in this step.
    height: usize,
    /// Tiles that the step has at most.
    tiles_at_most: usize,
}

/// Rows of a tile where so many tokens go to `each` of the experts: few where an expert has few. Decided for all numbers of tokens that
/// a captured step pads alike, so that padding changes no sum.
fn height(tokens: usize, shape: RoutingShape) -> usize {
    let rows = tokens.next_power_of_two() * shape.each;
    if rows <= 4 * shape.experts {
        HEIGHTS[0]
    } else if rows <= 10 * shape.experts {
        HEIGHTS[1]
    } else {
        HEIGHTS[2]
    }
}

/// Tiles that so many rows make at most: each expert may have one that is not full.
fn most_tiles(rows: usize, experts: usize, height: usize) -> usize {
    rows.min(rows / height + experts)
}

/// The kernel for tiles of a height, the features that a block takes, and its shared memory.
fn kernel(form: Form, height: usize) -> (Kernel, usize, usize) {
    const fn linear(name: &'static str) -> Kernel {
        Kernel::new(Source::Moe, name, 256)
    }
    let [few, some, many] = match form {
        Form::F32 => return (linear("expert_linear_f32"), 8, 0),
        Form::Bf16 => [linear("expert_linear_bf16_8"), linear("expert_linear_bf16_16"), linear("expert_linear_bf16_64")],
        Form::Int8 => [linear("expert_linear_int8_8"), linear("expert_linear_int8_16"), linear("expert_linear_int8_64")],
        Form::Fp8 => [linear("expert_linear_fp8_8"), linear("expert_linear_fp8_16"), linear("expert_linear_fp8_64")],
        Form::Int4 => [linear("expert_linear_int4_8"), linear("expert_linear_int4_16"), linear("expert_linear_int4_64")],
    };
    match height {
        8 => (few, 16, 8 * 16 * 8 * 4),
        16 => (some, 16, 8 * 16 * 16 * 4),
        _ => (many, BLOCK_FEATURES, BLOCK_SHARED),
    }
}

impl<D: Device> CudaBackend<D> {
    /// Experts lie one after the other: a card gives memory in pieces larger than many an expert.
    pub(super) fn hold_experts(
        &mut self,
        experts: &[Vec<MatrixSource<'_>>],
        format: WeightFormat,
    ) -> Result<HeldExperts, KernelError> {
        let mut table: Vec<p::Weights> = Vec::with_capacity(experts.len());
        let (mut data, mut scales, mut held) = (Address::NONE, Address::NONE, None);
        for (index, sources) in experts.iter().enumerate() {
            let packed = weights::pack(sources, format)?;
            if held.is_none() {
                let all = |bytes: usize| bytes.checked_mul(experts.len());
                data = self.hold("weights", all(packed.data.len()))?;
                if !packed.scales.is_empty() {
                    scales = self.hold("weights", all(packed.scales.len()))?;
                }
            }
            let (form, n) = *held.get_or_insert((packed.form, packed.n));
            if packed.form != form {
                let detail =
                    format!("experts of a layer are held as {form:?} and {:?}; choose int8 or bf16 for all", packed.form);
                return Err(KernelError::Weight(detail));
            }
            let place = data.plus(index * packed.data.len());
            self.device.write(place, &packed.data)?;
            let scales = match packed.scales.is_empty() {
                true => Address::NONE,
                false => {
                    let place = scales.plus(index * packed.scales.len());
                    self.device.write(place, &packed.scales)?;
                    place
                }
            };
            self.memory.weights += packed.data.len() + packed.scales.len();
            let [n, k, stride] = [n, packed.k, packed.stride].map(|v| v as u32);
            table.push(p::Weights { data: place, scales, form: form as u32, n, k, stride });
        }
        let bytes = all_bytes(&table);
        let at = self.hold("weights", Some(bytes.len()))?;
        self.device.write(at, &bytes)?;
        self.memory.weights += bytes.len();
        let (form, n) = held.unwrap_or((Form::F32, 0));
        Ok(HeldExperts { form, table: at, n })
    }

    /// Room for the largest step.
    pub(super) fn hold_routing(&mut self, shape: RoutingShape) -> Result<HeldRouting, KernelError> {
        let rows = self.shapes.capacity(Rows::Routed { each: shape.each });
        let tiles = most_tiles(rows, shape.experts, HEIGHTS[0]);
        let mut hold = |bytes: usize| {
            self.memory.activations += bytes;
            self.hold("routing", Some(bytes))
        };
        Ok(HeldRouting {
            shape,
            chosen: hold(rows * 4)?,
            weights: hold(rows * 4)?,
            rows: hold(rows * 4)?,
            places: hold(rows * 4)?,
            tiles: hold(tiles * size_of::<p::ExpertTile>())?,
            tile_count: hold(4)?,
            height: 0,
            tiles_at_most: 0,
        })
    }

    pub(super) fn send(&mut self, logits: Buf, normalised: bool, routing: Routing) -> Result<(), KernelError> {
        let (rows, logits, tokens) = (self.rows(logits), self.at(logits), self.lists.count);
        let held = &mut self.routings[routing.0 as usize];
        let RoutingShape { experts, each } = held.shape;
        held.height = height(rows, held.shape);
        held.tiles_at_most = most_tiles(rows * each, experts, held.height);
        let HeldRouting { chosen, weights, rows: sorted, places, tiles, tile_count, height, .. } = *held;
        let [row_count, experts32, each32, normalised] = [rows, experts, each, usize::from(normalised)].map(|v| v as u32);
        let params = p::TopK { logits, tokens, chosen, weights, rows: row_count, experts: experts32, each: each32, normalised };
        self.launch(TOP_K, Launch::blocks(rows.div_ceil(8)), params)?;
        if rows == 0 {
            return Ok(());
        }
        let (entries, height) = ((rows * each) as u32, height as u32);
        let params = p::Align { chosen, rows: sorted, places, tiles, tile_count, entries, experts: experts32, height, unused: 0 };
        // Warps count their four choices in the same places as experts.
        self.launch(ALIGN, Launch::blocks(experts).with_shared(64 + experts.max(8 * 4) * 4), params)
    }

    pub(super) fn multiply_experts(&mut self, x: Buf, experts: Experts, routing: Routing, out: Buf) -> Result<(), KernelError> {
        let HeldExperts { form, table, n } = self.experts[experts.0 as usize];
        let held = self.routings[routing.0 as usize];
        self.stale(out);
        if self.rows(out) == 0 {
            return Ok(());
        }
        let by_token = self.buffers[x.0 as usize].rows == Rows::Tokens;
        let x = if form == Form::F32 { self.at(x) } else { self.halved(x)? };
        let (kernel, features, shared) = kernel(form, held.height);
        let params = p::ExpertLinear {
            x,
            experts: table,
            entries: if by_token { held.rows } else { Address::NONE },
            tiles: held.tiles,
            tile_count: held.tile_count,
            out: self.at(out),
            n: n as u32,
            each: held.shape.each as u32,
        };
        self.launch(kernel, Launch::grid(n.div_ceil(features), held.tiles_at_most).with_shared(shared), params)
    }

    pub(super) fn add_up(&mut self, x: Buf, routing: Routing, out: Buf, store: Store) -> Result<(), KernelError> {
        let HeldRouting { shape, weights, places, .. } = self.routings[routing.0 as usize];
        let (rows, width) = (self.rows(out), self.buffers[out.0 as usize].width);
        self.stale(out);
        let params = p::Combine {
            x: self.at(x),
            weights,
            places,
            tokens: self.lists.count,
            out: self.at(out),
            width: width as u32,
            each: shape.each as u32,
            add: u32::from(store == Store::Add),
            unused: 0,
        };
        self.launch(COMBINE, Launch::grid(rows, width.div_ceil(256)), params)
    }

    pub(super) fn scale_rows(&mut self, gate: Buf, x: Buf) -> Result<(), KernelError> {
        let (half, half_stride) = self.produce(x);
        let width = self.buffers[x.0 as usize].width;
        let params = p::GateRows { gate: self.at(gate), x: self.at(x), half, width: width as u32, half_stride };
        self.launch(GATE_ROWS, Launch::grid(self.rows(x), width.div_ceil(256)), params)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    #[test]
    fn tiles_grow_with_the_rows_of_an_expert_and_padding_changes_no_height() {
        let few = RoutingShape { experts: 8, each: 2 };
        assert_eq!([1, 16, 17, 32, 33, 500].map(|tokens| height(tokens, few)), [8, 8, 16, 16, 64, 64]);
        let many = RoutingShape { experts: 60, each: 4 };
        for (tokens, padded) in [(33, 48), (49, 64), (65, 96), (97, 128), (129, 192), (193, 256)] {
            assert_eq!(height(tokens, many), height(padded, many));
        }
    }

    #[test]
    fn no_routing_makes_more_tiles_than_there_is_room_for() {
        for case in 0..2000 {
            let draw = |i: u64, n: usize| (uniform(case, i) * n as f64) as usize;
            let experts = 1 + draw(0, 20);
            // Uneven, many of them empty or with one row more than whole tiles have.
            let rows = |i: usize| [0, 1, draw(i as u64 + 9, 300), 64 * draw(i as u64 + 50, 5) + 1][draw(i as u64 + 90, 4)];
            let counts: Vec<usize> = (0..experts).map(rows).collect();
            let all = counts.iter().sum();
            for height in HEIGHTS {
                let tiles: usize = counts.iter().map(|count| count.div_ceil(height)).sum();
                assert!(tiles <= most_tiles(all, experts, height), "{counts:?}");
                assert!(most_tiles(all, experts, height) <= most_tiles(all, experts, HEIGHTS[0]));
            }
        }
    }
}
