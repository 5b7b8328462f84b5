use super::*;
use crate::blocks::{dequantize_row, quantize_row};
use crate::isa::Isa;
use crate::ops::{Format, MatrixSource, WeightFormat};

fn source(format: Format, n: usize, k: usize, data: &[u8]) -> MatrixSource<'_> {
    MatrixSource { n, k, format, data, row_order: None }
}

/// Rows of different sizes, encoded.
fn encode(format: Format, n: usize, k: usize) -> Vec<u8> {
    let row_bytes = format.row_bytes(k).unwrap();
    let mut data = vec![0; n * row_bytes];
    for (row, out) in data.chunks_mut(row_bytes).enumerate() {
        let values: Vec<f32> = (0..k).map(|i| ((i * 7 + row * 13) % 31) as f32 * 0.01 * (row + 1) as f32 - 0.15).collect();
        quantize_row(format, &values, out).unwrap();
    }
    data
}

fn pack(sources: &[MatrixSource<'_>], format: WeightFormat, threads: usize) -> Result<PackedMatrix, KernelError> {
    PackedMatrix::pack(sources, format, Isa::detect(), threads)
}

/// Largest difference of a packed row to the file's, relative to the row's largest weight.
fn row_error(w: &PackedMatrix, n: usize, format: Format, bytes: &[u8]) -> f32 {
    let (mut got, mut want) = (vec![0.0; w.k()], vec![0.0; w.k()]);
    w.dequantize_row(n, &mut got).unwrap();
    dequantize_row(format, bytes, &mut want).unwrap();
    let largest = want.iter().fold(1e-9f32, |a, v| a.max(v.abs()));
    got.iter().zip(&want).fold(0.0f32, |a, (g, w)| a.max((g - w).abs())) / largest
}

fn forms(w: &PackedMatrix) -> String {
    w.forms().into_iter().collect::<Vec<_>>().join("+")
}

#[test]
fn stacked_sources_keep_their_rows_order_and_form() {
    let k = 96;
    let (four, eight) = (encode(Format::Q4_1, 40, k), encode(Format::Q8_0, 9, k));
    let order: Vec<u32> = (0..40).rev().collect();
    let sources =
        [MatrixSource { row_order: Some(&order), ..source(Format::Q4_1, 40, k, &four) }, source(Format::Q8_0, 9, k, &eight)];
    for threads in [1, 2, 3, 7] {
        let w = pack(&sources, WeightFormat::Auto, threads).unwrap();
        assert_eq!((w.n(), w.k(), forms(&w).as_str()), (49, k, "int4+int8"));
        assert!(w.regrid_error() > 0.0 && w.regrid_error() < MAX_REGRID_ERROR);
        for row in 0..49 {
            let error = match row {
                0..40 => row_error(&w, row, Format::Q4_1, &four[(39 - row) * 60..][..60]),
                _ => row_error(&w, row, Format::Q8_0, &eight[(row - 40) * 102..][..102]),
            };
            assert!(error <= 0.54 / 127.0, "row {row}: {error}");
        }
    }
}

#[test]
fn float_forms_keep_the_weights() {
    let k = 33;
    for (format, as_, form, bound) in [
        (Format::F32, WeightFormat::Auto, "f32", 0.0),
        (Format::F16, WeightFormat::F32, "f32", 0.0),
        (Format::Bf16, WeightFormat::Auto, "bf16", 0.0),
        (Format::F16, WeightFormat::Auto, "bf16", 1.0 / 256.0),
    ] {
        let data = encode(format, 19, k);
        let w = pack(&[source(format, 19, k, &data)], as_, 2).unwrap();
        assert_eq!(forms(&w), form);
        for (row, bytes) in data.chunks(format.row_bytes(k).unwrap()).enumerate() {
            assert!(row_error(&w, row, format, bytes) <= bound, "{format:?} row {row}");
        }
    }
}

#[test]
fn next_to_a_float_source_everything_takes_the_widest_form() {
    let (four, half) = (encode(Format::Q4_0, 16, 64), encode(Format::Bf16, 16, 64));
    let w = pack(&[source(Format::Q4_0, 16, 64, &four), source(Format::Bf16, 16, 64, &half)], WeightFormat::Auto, 1).unwrap();
    assert_eq!((forms(&w).as_str(), w.activation_kind()), ("bf16", ActivationKind::Bf16));
}

#[test]
fn a_matrix_that_an_int8_grid_would_spoil_becomes_bf16() {
    // One weight a hundred times the others makes the grid's unit nearly as large as they are.
    let k = 256;
    let mut values: Vec<f32> = (0..k).map(|i| if i % 2 == 0 { 0.01 } else { -0.01 }).collect();
    values[5] = 1.0;
    let mut row = vec![0; Format::Q8_0.row_bytes(k).unwrap()];
    quantize_row(Format::Q8_0, &values, &mut row).unwrap();
    let (spoiled, mild) = (row.repeat(16), encode(Format::Q8_0, 16, k));
    let packed = |data: &[u8], as_| pack(&[source(Format::Q8_0, 16, k, data)], as_, 2).unwrap();
    assert_eq!(forms(&packed(&mild, WeightFormat::Auto)), "int8");
    assert_eq!(forms(&packed(&spoiled, WeightFormat::Auto)), "bf16");
    let forced = packed(&spoiled, WeightFormat::Int8);
    assert_eq!(forms(&forced), "int8");
    assert!(forced.regrid_error() > MAX_REGRID_ERROR);
}

#[test]
fn wrong_sizes_are_errors() {
    let data = encode(Format::Q8_0, 4, 64);
    let shape = |sources: &[MatrixSource<'_>]| matches!(pack(sources, WeightFormat::Auto, 2), Err(KernelError::Shape { .. }));
    let weight = |sources: &[MatrixSource<'_>]| matches!(pack(sources, WeightFormat::Auto, 2), Err(KernelError::Weight(_)));
    assert!(shape(&[]));
    assert!(shape(&[source(Format::Q8_0, 0, 64, &[])]));
    assert!(shape(&[source(Format::Q8_0, 4, 64, &data), source(Format::Q8_0, 8, 32, &data)]));
    assert!(weight(&[source(Format::Q8_0, 5, 64, &data)]));
    assert!(weight(&[source(Format::Q8_0, 4, 63, &data)]));
    assert!(weight(&[source(Format::Q8_0, usize::MAX / 2, 64, &data)]));
    assert!(shape(&[source(Format::F32, 1, 0, &[])]));
    for order in [&[0u32, 1, 2][..], &[0, 1, 2, 4]] {
        assert!(shape(&[MatrixSource { row_order: Some(order), ..source(Format::Q8_0, 4, 64, &data) }]));
    }
}

#[test]
fn weights_that_are_not_finite_are_errors_in_integer_forms() {
    for format in [Format::Q8_0, Format::Q4_0, Format::F32] {
        let mut data = encode(format, 20, 64);
        let at = data.len() / 2 / format.block_bytes() * format.block_bytes();
        data[at..at + 4].fill(0xff);
        let result = pack(&[source(format, 20, 64, &data)], WeightFormat::Int8, 2);
        assert!(matches!(result, Err(KernelError::Weight(text)) if text.contains("row 10")), "{format:?}");
    }
}

#[test]
fn rows_out_of_range_are_errors() {
    let data = encode(Format::F32, 3, 8);
    let w = pack(&[source(Format::F32, 3, 8, &data)], WeightFormat::Auto, 1).unwrap();
    assert!(w.dequantize_row(3, &mut [0.0; 8]).is_err());
    assert!(w.dequantize_row(0, &mut [0.0; 7]).is_err());
}
