//! Weights as kernels read them: rows of a multiple of 128 elements, so that every lane reads whole 16 bytes; see `Form` in
//! `kernels/cuda/device.cuh`.

use half::{bf16, f16};

use crate::blocks::{dequantize_row, four_bit_row, is_four_bit};
use crate::e4m3;
use crate::error::KernelError;
use crate::ops::{Format, MatrixSource, WeightFormat};
use crate::shapes::Shapes;

/// How a matrix is held; the numbers are those of `Form` in the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Form {
    /// 8-bit floats, a scale for each row.
    Fp8 = 4,
    /// Nibbles in groups of 32 with a scale and a minimum.
    Int4 = 3,
    /// Signed bytes, a scale for each row.
    Int8 = 2,
    /// bfloat16.
    Bf16 = 1,
    /// Single.
    F32 = 0,
}

/// Elements of a row are padded to a multiple of this.
pub const PADDING: usize = 128;

/// A matrix in its packed form, on the host.
#[derive(Debug)]
pub struct Packed {
    /// Form.
    pub form: Form,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Input features, padding included.
    pub stride: usize,
    /// Elements.
    pub data: Vec<u8>,
    /// Scales: `f32 [n]` for the 8-bit forms, pairs of f16 `[n, stride / 32]` for int4, else empty.
    pub scales: Vec<u8>,
}

fn form(sources: &[MatrixSource<'_>], wanted: WeightFormat) -> Form {
    let natural = |format: Format| match format {
        Format::F32 => Form::F32,
        Format::F16 | Format::Bf16 => Form::Bf16,
        four if is_four_bit(four) => Form::Int4,
        _ => Form::Int8,
    };
    // The widest of the sources' own.
    let widest = || sources.iter().map(|s| natural(s.format)).min_by_key(|form| *form as u32).unwrap_or(Form::F32);
    match wanted {
        WeightFormat::Auto => widest(),
        WeightFormat::F32 => Form::F32,
        WeightFormat::Bf16 => Form::Bf16,
        WeightFormat::Int8 => Form::Int8,
        WeightFormat::Fp8 => Form::Fp8,
    }
}

/// Bytes of packed rows that are worth a thread.
const PIECE: usize = 1 << 20;

/// Packs sources, stacked along `n`; large ones by all of the machine's processors, each some rows.
///
/// Errors: sources that do not fit each other; see [`Shapes::stacked`].
pub fn pack(sources: &[MatrixSource<'_>], wanted: WeightFormat) -> Result<Packed, KernelError> {
    let (n, k) = Shapes::stacked(sources)?;
    let form = form(sources, wanted);
    let stride = k.checked_next_multiple_of(PADDING).ok_or_else(|| KernelError::Weight("too many input features".into()))?;
    let row_bytes = match form {
        Form::F32 => stride * 4,
        Form::Bf16 => stride * 2,
        Form::Int8 | Form::Fp8 => stride,
        Form::Int4 => stride / 2,
    };
    let scale_bytes = match form {
        Form::Int8 | Form::Fp8 => 4,
        Form::Int4 => stride / 32 * 4,
        Form::F32 | Form::Bf16 => 0,
    };
    let mut packed =
        Packed { form, n, k, stride, data: zeros(n.checked_mul(row_bytes))?, scales: zeros(n.checked_mul(scale_bytes))? };
    let rows: Vec<(Format, &[u8])> = sources.iter().flat_map(rows_of).collect();
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get()).min(packed.data.len() / PIECE + 1);
    let each = n.div_ceil(threads).max(1);
    let scales = packed.scales.chunks_mut((each * scale_bytes).max(1)).chain(std::iter::repeat_with(Default::default));
    let places = packed.data.chunks_mut((each * row_bytes).max(1)).zip(scales);
    let mut pieces = rows.chunks(each).zip(places).map(|(rows, (data, scales))| Piece { rows, data, scales });
    let pack_piece = |piece: Piece<'_>| -> Result<(), KernelError> {
        let mut scratch = Scratch { row: vec![0.0; k], quants: vec![0; k], steps: vec![(0.0, 0.0); k / 32] };
        for (i, (format, from)) in piece.rows.iter().enumerate() {
            let to = &mut piece.data[i * row_bytes..(i + 1) * row_bytes];
            scratch.pack_row(form, *format, from, to, &mut piece.scales[i * scale_bytes..(i + 1) * scale_bytes])?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        // This thread has a piece, too.
        let own = pieces.next();
        let others: Vec<_> = pieces.map(|piece| scope.spawn(move || pack_piece(piece))).collect();
        let own = own.map_or(Ok(()), pack_piece);
        let others = others.into_iter().map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        std::iter::once(own).chain(others).collect::<Result<(), _>>()
    })?;
    Ok(packed)
}

/// Rows that one thread packs, and where they go.
struct Piece<'a> {
    rows: &'a [(Format, &'a [u8])],
    data: &'a mut [u8],
    scales: &'a mut [u8],
}

/// The rows of a source in the order that they are wanted in.
fn rows_of<'a>(source: &MatrixSource<'a>) -> impl Iterator<Item = (Format, &'a [u8])> {
    let MatrixSource { n, format, data, row_order, .. } = *source;
    let bytes = data.len() / n;
    (0..n).map(move |i| {
        let row = row_order.map_or(i, |order| order[i] as usize);
        (format, &data[row * bytes..(row + 1) * bytes])
    })
}

fn zeros(bytes: Option<usize>) -> Result<Vec<u8>, KernelError> {
    let bytes = bytes.unwrap_or(usize::MAX);
    let mut data = Vec::new();
    data.try_reserve_exact(bytes).map_err(|_| KernelError::Memory { what: "weights", bytes })?;
    data.resize(bytes, 0);
    Ok(data)
}

struct Scratch {
    row: Vec<f32>,
    quants: Vec<u8>,
    steps: Vec<(f32, f32)>,
}

impl Scratch {
    fn pack_row(&mut self, form: Form, format: Format, from: &[u8], to: &mut [u8], scales: &mut [u8]) -> Result<(), KernelError> {
        if form == Form::Int4 {
            four_bit_row(format, from, &mut self.quants, &mut self.steps)?;
            for (byte, pair) in to.iter_mut().zip(self.quants.as_chunks::<2>().0) {
                *byte = pair[0] | pair[1] << 4;
            }
            for (word, (scale, minimum)) in scales.as_chunks_mut::<4>().0.iter_mut().zip(&self.steps) {
                let [low, high] = [scale, minimum].map(|v| u32::from(f16::from_f32(*v).to_bits()));
                *word = (low | high << 16).to_le_bytes();
            }
            return Ok(());
        }
        if (form, format) == (Form::Bf16, Format::Bf16) {
            to[..from.len()].copy_from_slice(from);
            return Ok(());
        }
        dequantize_row(format, from, &mut self.row)?;
        match form {
            Form::F32 => to.as_chunks_mut().0.iter_mut().zip(&self.row).for_each(|(to, v)| *to = v.to_le_bytes()),
            Form::Bf16 => {
                to.as_chunks_mut().0.iter_mut().zip(&self.row).for_each(|(to, v)| *to = bf16::from_f32(*v).to_le_bytes())
            }
            Form::Int8 | Form::Fp8 | Form::Int4 => {
                let largest = if form == Form::Fp8 { e4m3::LARGEST } else { 127.0 };
                let scale = self.row.iter().fold(0.0f32, |most, v| most.max(v.abs())) / largest;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                let row = to.iter_mut().zip(&self.row);
                match form {
                    Form::Fp8 => row.for_each(|(to, v)| *to = e4m3::encode(v * inverse)),
                    _ => row.for_each(|(to, v)| *to = (v * inverse).round() as i8 as u8),
                }
                scales.copy_from_slice(&scale.to_le_bytes());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::quantize_row;

    fn source(format: Format, data: &[u8], n: usize, k: usize) -> MatrixSource<'_> {
        MatrixSource { n, k, format, data, row_order: None }
    }

    #[test]
    fn rows_are_padded_with_zeros_and_the_widest_form_is_taken() {
        let values: Vec<f32> = (0..96).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut four = vec![0; Format::Q4_0.row_bytes(96).unwrap()];
        quantize_row(Format::Q4_0, &values, &mut four).unwrap();
        let mut eight = vec![0; Format::Q8_0.row_bytes(96).unwrap()];
        quantize_row(Format::Q8_0, &values, &mut eight).unwrap();
        let alone = pack(&[source(Format::Q4_0, &four, 1, 96)], WeightFormat::Auto).unwrap();
        assert_eq!((alone.form, alone.stride, alone.data.len(), alone.scales.len()), (Form::Int4, 128, 64, 16));
        assert!(alone.data[48..].iter().all(|b| *b == 0) && alone.scales[12..].iter().all(|b| *b == 0));
        let both = pack(&[source(Format::Q4_0, &four, 1, 96), source(Format::Q8_0, &eight, 1, 96)], WeightFormat::Auto).unwrap();
        assert_eq!((both.form, both.n, both.data.len(), both.scales.len()), (Form::Int8, 2, 256, 8));
        assert!(both.data[96..128].iter().all(|b| *b == 0));
    }

    #[test]
    fn many_rows_are_what_they_are_alone() {
        // Several pieces, of which the last is smaller, whose rows come in another order.
        let (n, k) = (5001, 1000);
        let values: Vec<u8> = (0..n * k).flat_map(|i| bf16::from_f32((i as f32 * 0.37).sin()).to_le_bytes()).collect();
        let order: Vec<u32> = (0..n as u32).rev().collect();
        let first = source(Format::Bf16, &values[..k * 2], 1, k);
        let rest = MatrixSource { row_order: Some(&order), ..source(Format::Bf16, &values, n, k) };
        for format in [WeightFormat::Auto, WeightFormat::Fp8, WeightFormat::Int8, WeightFormat::F32] {
            let packed = pack(&[first, rest], format).unwrap();
            let of_row = |bytes: &[u8], i: usize| {
                let each = bytes.len() / (n + 1);
                bytes[i * each..(i + 1) * each].to_vec()
            };
            for (i, row) in [(0, 0), (1, n - 1), (2, n - 2), (1600, n - 1600), (2501, n - 2501), (n, 0)] {
                let alone = pack(&[source(Format::Bf16, &values[row * k * 2..(row + 1) * k * 2], 1, k)], format).unwrap();
                let both = [of_row(&packed.data, i), of_row(&packed.scales, i)];
                assert!(both == [alone.data, alone.scales], "{format:?}, row {i}");
            }
        }
    }

    #[test]
    fn a_row_of_zeros_has_no_scale() {
        for format in [WeightFormat::Int8, WeightFormat::Fp8] {
            let packed = pack(&[source(Format::F32, &[0; 256], 1, 64)], format).unwrap();
            assert!(packed.data.iter().chain(&packed.scales).all(|b| *b == 0));
        }
    }

    #[test]
    fn a_row_of_8_bit_floats_uses_their_whole_range() {
        let values: Vec<f32> = (0..64).map(|i| (i as f32 - 20.0) * 0.01).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let packed = pack(&[source(Format::F32, &bytes, 1, 64)], WeightFormat::Fp8).unwrap();
        let scale = f32::from_le_bytes(packed.scales.as_slice().try_into().unwrap());
        assert_eq!((packed.form, packed.data[63], packed.data.len()), (Form::Fp8, 0x7e, 128));
        for (byte, value) in packed.data.iter().zip(&values) {
            // Half a unit of 3 bits.
            assert!((e4m3::decode(*byte) * scale - value).abs() <= value.abs() / 16.0 + scale / 1024.0, "{value}");
        }
    }
}
