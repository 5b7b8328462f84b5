//! Against `golden/blocks.txt`, made by the `gguf` package of llama.cpp (see `golden/generate.py`).

use super::*;

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[i * 2..i * 2 + 2], 16).unwrap()).collect()
}

fn floats(text: &str) -> Vec<f32> {
    unhex(text).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn format(name: &str) -> Format {
    match name {
        "Q4_0" => Format::Q4_0,
        "Q4_1" => Format::Q4_1,
        "Q5_0" => Format::Q5_0,
        "Q5_1" => Format::Q5_1,
        "Q8_0" => Format::Q8_0,
        "Q4_K" => Format::Q4K,
        "Q5_K" => Format::Q5K,
        "Q6_K" => Format::Q6K,
        other => panic!("{other}"),
    }
}

fn golden(what: &str) -> Vec<(Format, &'static str, &'static str)> {
    let lines = include_str!("golden/blocks.txt").lines().map(|line| line.split(' ').collect::<Vec<_>>());
    lines.filter(|line| line[0] == what).map(|line| (format(line[1]), line[2], line[3])).collect()
}

#[test]
fn blocks_decode_to_the_golden_values() {
    let cases = golden("decode");
    assert_eq!(cases.len(), 8);
    for (format, bytes, values) in cases {
        let (bytes, values) = (unhex(bytes), floats(values));
        let mut got = vec![0.0; values.len()];
        dequantize_row(format, &bytes, &mut got).unwrap();
        for (i, (got, want)) in got.iter().zip(&values).enumerate() {
            assert!((got - want).abs() <= want.abs() * 1e-6 + 1e-7, "{format:?} weight {i}: {got} for {want}");
        }
    }
}

#[test]
fn four_bit_rows_come_apart_into_quants_and_steps() {
    let cases: Vec<_> = golden("decode").into_iter().filter(|case| is_four_bit(case.0)).collect();
    assert_eq!(cases.len(), 3);
    for (format, bytes, values) in cases {
        let (bytes, values) = (unhex(bytes), floats(values));
        let (mut quants, mut steps) = (vec![0; values.len()], vec![(0.0, 0.0); values.len() / 32]);
        four_bit_row(format, &bytes, &mut quants, &mut steps).unwrap();
        for (i, want) in values.iter().enumerate() {
            let got = f32::from(quants[i]) * steps[i / 32].0 + steps[i / 32].1;
            assert!(quants[i] < 16 && (got - want).abs() <= want.abs() * 1e-5 + 1e-6, "{format:?} weight {i}: {got} for {want}");
        }
    }
    assert!(four_bit_row(Format::Q8_0, &[0; 34], &mut [0; 32], &mut [(0.0, 0.0)]).is_err());
}

#[test]
fn rows_encode_to_the_golden_bytes() {
    let cases = golden("encode");
    assert_eq!(cases.len(), 3);
    for (format, values, bytes) in cases {
        let (values, bytes) = (floats(values), unhex(bytes));
        let mut got = vec![0; bytes.len()];
        quantize_row(format, &values, &mut got).unwrap();
        assert_eq!(got, bytes, "{format:?}");
    }
}

#[test]
fn plain_formats_go_there_and_back() {
    let values = [0.0f32, -1.5, 3.25e-3, 65504.0, f32::MIN_POSITIVE];
    for (format, exact) in [(Format::F32, 5), (Format::F16, 2), (Format::Bf16, 2)] {
        let mut bytes = vec![0; format.row_bytes(5).unwrap()];
        let mut back = [0.0; 5];
        quantize_row(format, &values, &mut bytes).unwrap();
        dequantize_row(format, &bytes, &mut back).unwrap();
        assert_eq!(back[..exact], values[..exact], "{format:?}");
        assert!((back[3] - values[3]).abs() < 300.0 && (back[2] - values[2]).abs() < 2e-5, "{format:?}");
    }
}

#[test]
fn rows_of_another_length_are_errors() {
    let mut out = [0.0; 32];
    assert!(dequantize_row(Format::Q4_0, &[0; 17], &mut out).is_err());
    assert!(dequantize_row(Format::Q4_0, &[0; 18], &mut out[..31]).is_err());
    assert!(dequantize_row(Format::Q4K, &[0; 18], &mut out).is_err());
    assert!(dequantize_row(Format::F32, &[0; 127], &mut out).is_err());
    assert!(quantize_row(Format::Q6K, &[0.0; 256], &mut [0; 210]).is_err());
}
